"""FILE.py:FACTORY: a user's own network, divided by its width; a file that does not fit is refused in one line."""

import pytest
import torch

from model import BackboneRequest, build_network, build_splitnet, names_user_code
from model.division.plan import division_plan
from model.restore import published_keys, restore_splitnet
from utils.errors import UserError

GOOD = """
from torch import nn

def tiny(width, num_classes, depth=1):
    c = max(1, round(160 * width))
    return nn.Sequential(nn.Conv2d(3, c, 3), nn.ReLU(), nn.Conv2d(c, 2 * c, 3), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * c, num_classes))

def coarse(width, num_classes):
    return tiny(0.75 if width < 1 else 1.0, num_classes)

def wrong_shape(width, num_classes):
    return tiny(width, num_classes + 1)

def no_width(num_classes):
    return tiny(1, num_classes)

def more(width, num_classes, depth):
    return tiny(width, num_classes)

def raising(width, num_classes):
    raise KeyError("of mine")

def nothing(width, num_classes):
    return None

def too_deep(width, num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 99), tiny(width, num_classes))

def leaving(width, num_classes):
    raise SystemExit(3)

class Failing(nn.Module):
    def __init__(self, width, num_classes):
        super().__init__()
        self.fc = nn.Linear(3, num_classes)

    def forward(self, images):
        return {}["mine"]

def lazy(width, num_classes):
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))

number = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(GOOD)
    return path


def request_for(arch, split_factor=1, **changes):
    return BackboneRequest(arch=arch, split_factor=split_factor, num_classes=10, crop_size=16, **changes)


def test_its_width_is_solved_and_kept(file):
    arch = f"{file}:tiny"
    for divide_by in ("params", "macs"):
        plan = division_plan(request_for(arch, 4, divide_by=divide_by))
        assert abs(plan.params_difference if divide_by == "params" else plan.macs_difference) <= 0.02
        assert plan.stages == ("width",)
        assert 0.4 < plan.widths[0] < 0.6
    network = build_splitnet(request_for(arch, 4), seed=0)
    assert len(network.models) == 4
    assert not torch.equal(network.models[0][0].weight, network.models[1][0].weight)
    assert build_network(request_for(arch))[0].out_channels == 160
    assert build_network(request_for(arch, 2, widths=(0.25,)))[0].out_channels == 40
    with pytest.raises(UserError, match=r"outside \(0, 1\]"):
        build_network(request_for(arch, 2, widths=(7.0,)))
    with torch.device("meta"):
        assert build_network(request_for(arch, 2))[0].weight.is_meta


@pytest.mark.parametrize(
    ("name", "split_factor", "message"),
    [
        ("nope", 1, "defines no nope"),
        ("number", 1, "cannot be called as number"),
        ("no_width", 1, "no_width takes no argument 'width'"),
        ("more", 1, "needs depth too"),
        ("raising", 1, "raises KeyError.*width=1.*'of mine'"),
        ("nothing", 1, r"NoneType.*expected.*nn\.Module"),
        ("wrong_shape", 1, r"\[2, 11\].*expected logits \[2, 10\]"),
        ("too_deep", 1, r"--crop_size 16.*\(width=1\) does not run"),
        ("leaving", 1, "raises SystemExit.*width=1.*3"),
        ("Failing", 1, r"its network \(width=1\) does not run: KeyError: 'mine'"),
        ("lazy", 1, r"its parameter 0\.weight has no size yet"),
        ("coarse", 4, "no widths of .* 4 copies.*params.*nearest"),
    ],
)
def test_refusals(file, name, split_factor, message):
    with pytest.raises(UserError, match=message) as error:
        build_network(request_for(f"{file}:{name}", split_factor))
    assert "\n" not in str(error.value)


def test_a_file_that_is_missing_or_broken(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        build_network(request_for(f"{tmp_path}/none.py:tiny"))
    (tmp_path / "syntax.py").write_text("def (")
    with pytest.raises(UserError, match="raises SyntaxError"):
        build_network(request_for(f"{tmp_path}/syntax.py:tiny"))
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)")
    with pytest.raises(UserError, match="raises SystemExit"):
        build_network(request_for(f"{tmp_path}/leaves.py:tiny"))


def test_a_checkpoint_cannot_make_us_run_a_file(file, tmp_path):
    network = build_splitnet(request_for(f"{file}:tiny", 2), seed=0)
    widths = list(division_plan(request_for(f"{file}:tiny", 2)).widths)
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + GOOD)
    arch = f"{evil}:tiny"
    for content in (
        {"arch": arch},
        {"arch": "resnet20", "config": {"arch": arch, "dataset": "digits"}},
        {"arch": f"resnet20,{arch}"},
    ):
        content |= {"state_dict": published_keys(network.state_dict()), "widths": widths, "crop_size": 16}
        with pytest.raises(UserError, match=r"the program .*only you can choose.*add --arch"):
            restore_splitnet(content, dataset="digits")
    assert not (tmp_path / "ran").exists()
    # the user's own choice, whatever the file calls it
    restored, info = restore_splitnet(content | {"arch": arch}, arch=f"{file}:tiny", dataset="digits")
    assert not (tmp_path / "ran").exists()
    assert info.num_networks == 2
    assert torch.equal(restored.models[1][0].weight, network.models[1][0].weight)
    with pytest.raises(UserError, match="--arch resnet20 contradicts"):
        restore_splitnet(content | {"arch": arch}, arch="resnet20", dataset="digits")


def test_names():
    assert names_user_code("a/b.py:f")
    assert not names_user_code("torchvision/resnet18")
