"""Dividing by constructor arguments: what is recorded, what the rules choose, and what a stored plan may say."""

import dataclasses
import math
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import nn

from model import BackboneRequest, backbones, build_network, solved_request
from model.division.arguments import Arguments, Structure, divide, grouped, leaf_kind, pattern
from model.division.fitting import fitted_arguments, image_arguments, sizes_around
from model.division.plan import division_plan
from model.division.recording import Recording, watched_constructor
from model.library import rates_of
from utils.errors import UserError
from utils.macs import count_params

timm = pytest.importorskip("timm")

# §3 of the rules: heads, head size, width, ratio
GOLDEN = {
    ("vit_tiny_patch16_224", 2): (2, 64, 128, 4.58),
    ("vit_tiny_patch16_224", 4): (2, 48, 96, 3.54),
    ("deit3_small_patch16_224", 2): (4, 64, 256, 4.67),
    ("deit3_small_patch16_224", 4): (3, 64, 192, 3.77),
    ("beit_base_patch16_224", 2): (8, 64, 512, 4.71),
    ("beit_base_patch16_224", 4): (6, 64, 384, 3.89),
    ("swin_tiny_patch4_window7_224", 2): ((2, 4, 8, 16), 32, 64, 4.72),
    ("swin_tiny_patch4_window7_224", 4): ((2, 4, 8, 16), 24, 48, 3.80),
}


def request_for(arch: str, split_factor: int = 1, crop_size: int = 224, **changes) -> BackboneRequest:
    values = {"arch": arch, "split_factor": split_factor, "num_classes": 1000, "crop_size": crop_size}
    return BackboneRequest(**(values | {"shape": "large", "dataset": "imagenet"} | changes))


@pytest.mark.parametrize(("name", "split_factor"), GOLDEN)
def test_whole_heads_first(name, split_factor):
    heads, size, width, ratio = GOLDEN[name, split_factor]
    plan = division_plan(request_for(f"timm/{name}", split_factor))
    found = dict(zip(plan.stages, plan.widths, strict=True))
    counts = tuple(value for key, value in found.items() if key.startswith("num_heads"))
    assert counts == (heads if isinstance(heads, tuple) else (heads,))
    assert found["embed_dim"] == width == counts[0] * size
    assert found["mlp_ratio"] == pytest.approx(ratio, rel=0.01)
    assert plan.way == "arguments"
    assert abs(plan.params_difference) <= 0.001
    assert plan.library == f"timm {timm.__version__}"


def test_a_class_that_hands_everything_on_is_divided_as_the_one_that_it_hands_it_to():
    """Its signature says nothing of heads and ratios: timm's distilled DeiT and LeViT."""
    plan = division_plan(request_for("timm/deit_tiny_distilled_patch16_224", 2))
    found = dict(zip(plan.stages, plan.widths, strict=True))
    assert (found["kwargs.num_heads"], found["kwargs.embed_dim"]) == (2, 128)
    assert found["kwargs.mlp_ratio"] == pytest.approx(4.49, rel=0.01)


class Whole(nn.Module):
    def __init__(self, width: int, ratio: float = 2.0, heads: int = 8, flat: bool = True) -> None:
        super().__init__()
        self.one = nn.Linear(width, int(ratio * width))


class HandsOn(Whole):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)


class Shorter(Whole):
    def __init__(self, width: int, **kwargs) -> None:
        super().__init__(width, ratio=3.0, **kwargs)  # a second `ratio` would be refused


def test_numbers_that_a_base_takes_by_default_are_leaves_where_they_can_be_given():
    recording = Recording(lambda: HandsOn(width=16, heads=4))
    assert recording.leaves == {"kwargs.width": 16, "kwargs.ratio": 2.0, "kwargs.heads": 4}
    assert recording.build({"kwargs.ratio": 3.0}).one.out_features == 48
    assert recording.build({"kwargs.width": 8}).one.out_features == 16
    assert Recording(lambda: HandsOn(16, 3.0)).leaves == {"args.0": 16, "args.1": 3.0}
    assert Recording(lambda: Shorter(16)).leaves == {"width": 16}


@dataclass(frozen=True)
class Inner:
    channels: int = 64
    depth: int = 2


class Odd(nn.Module):
    """Widths in a dictionary, a float, a partial and a nested dataclass; half of one width is refused."""

    def __init__(self, inner: Inner = Inner(), head=None, num_classes=10, **more) -> None:
        super().__init__()
        if more["widths"]["last"] == 48:
            raise RuntimeError("48 channels are refused")
        hidden = int(more["float_width"])
        self.first = nn.Conv2d(3, inner.channels, 3, 2)
        self.blocks = nn.Sequential(*(nn.Conv2d(inner.channels, inner.channels, 3) for _ in range(inner.depth)))
        self.second = nn.Conv2d(inner.channels, hidden, 3)
        self.third = nn.Linear(hidden, more["widths"]["last"])
        self.fourth = head(in_features=more["widths"]["last"])
        self.fc = nn.Linear(self.fourth.out_features, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.second(self.blocks(self.first(images)).relu()).relu().mean((2, 3))
        return self.fc(self.fourth(self.third(features)))


class Heir(Odd):
    pass


def make_heir(kind: type = Heir) -> nn.Module:
    return kind(inner=Inner(64, 2), head=partial(nn.Linear, out_features=32), float_width=128.0, widths={"last": 96})


def test_a_class_written_oddly_divides_and_keeps_its_constructor():
    for kind in (Odd, Heir):
        before = kind.__init__
        recording = Recording(partial(make_heir, kind))
        assert recording.leaves["inner.channels"] == 64
        assert recording.leaves["more.widths.last"] == 96
        assert recording.leaves["more.float_width"] == 128.0
        assert recording.leaves["head.out_features"] == 32
        arguments = Arguments(recording, {}, count_params, lambda network: True, 2)
        names = {name for group in arguments.widths for name in group.names}
        assert names == {"inner.channels", "head.out_features", "more.widths.last", "more.float_width"}
        found = divide(arguments, "fc")
        assert found is not None
        assert not found.trouble
        one = recording.build(found.changes, meta=False)
        assert 2 * count_params(one) == pytest.approx(count_params(make_heir(kind)), rel=0.02)
        assert one(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
        assert kind.__init__ is before
        assert ("__init__" in vars(kind)) == (kind is Odd)
        with pytest.raises(RuntimeError, match="48"):
            recording.build({"more.widths.last": 48})
        with pytest.raises(ZeroDivisionError), watched_constructor(kind, lambda arguments: None):
            _ = 1 / 0
        assert kind.__init__ is before
    assert dataclasses.astuple(Inner()) == (64, 2)


def test_a_width_changes_sizes_and_nothing_else():
    def structure(channels: int, kernel: int = 3, extra: bool = False) -> Structure:
        layers = [nn.Conv2d(3, channels, kernel), nn.Conv2d(channels, 8, 1)]
        return Structure.of(nn.Sequential(*layers, *([nn.Linear(8, 8)] if extra else [])))

    base = structure(16)
    assert base.is_width_of(structure(32))
    assert not base.is_width_of(structure(16))
    assert not base.is_width_of(structure(32, kernel=5))
    assert not base.is_width_of(structure(32, extra=True))


def test_names_of_leaves():
    assert [leaf_kind(name) for name in ("num_heads.2", "cfg.mlp_ratio", "blocks.1.c", "img_size.0", "depths.1")] == [
        "heads",
        "ratio",
        "",
        "image",
        "kept",
    ]
    assert pattern("block_args.3.0.out_chs") == "block_args.*.*.out_chs"


def test_patches_and_windows_of_small_images():
    vit = {"img_size.0": 224, "patch_size": 16}
    swin = {"patch_size": 4, "window_size": 7}
    assert fitted_arguments(vit, 32) == {"patch_size": 4}
    assert fitted_arguments(vit, 64) == {"patch_size": 8}
    assert fitted_arguments(vit, 65) == {}
    assert fitted_arguments(swin, 32) == {"window_size": 4}
    assert fitted_arguments(swin, 64) == {"window_size": 4}
    assert fitted_arguments({"patch_size": 4, "window_size": 8}, 64) == {}
    assert fitted_arguments({"depth": 12}, 32) == {}
    assert image_arguments(vit, 32) == {"img_size.0": 32}
    assert image_arguments(vit, 224) == {}


def test_a_plan_is_rebuilt_without_the_solver(monkeypatch):
    request = solved_request(request_for("timm/vit_tiny_patch16_224", 2, 32, num_classes=10))
    assert dict(zip(request.width_names, request.widths, strict=True))["patch_size"] == 4

    def refuse(*args, **kwargs):
        raise AssertionError("solved again")

    for place in ("model.library.divide", "model.library.Arguments", "model.library.solve_widths"):
        monkeypatch.setattr(place, refuse)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = build_network(request)
        torch.manual_seed(1)
        again = build_network(replace(request, library="timm 0.1"))
    assert network.patch_embed.proj.weight.shape == (128, 3, 4, 4)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    undivided = backbones.get("timm/vit_tiny_patch16_224").build(solved_request(replace(request, split_factor=1)))
    assert [*undivided.state_dict()] == [*network.state_dict()]
    network(torch.zeros(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width_names": ("embed_dim", "emb")}, r"timm 9\.9.*no argument emb "),
        ({"width_names": ("embed_dim",)}, "1 names and 2 widths"),
        ({"widths": (1e9, 2)}, "embed_dim of 1e\\+09 cannot be.*damaged"),
        ({"widths": (128.5, 2)}, "embed_dim of 128.5 cannot be"),
        ({"widths": (128, math.nan)}, "num_heads of nan cannot be"),
        ({"width_names": ("embed_dim", "norm_layer")}, "no argument norm_layer"),
        (
            {"width_names": ("embed_dim", "dims.0"), "library": f"timm {timm.__version__}"},
            r"no argument dims\.0 there.*damaged\.$",
        ),
    ],
)
def test_a_damaged_plan_builds_nothing(changes, message):
    plan = {"way": "arguments", "width_names": ("embed_dim", "num_heads"), "widths": (128, 2), "library": "timm 9.9"}
    request = request_for("timm/vit_tiny_patch16_224", 2, **(plan | changes))
    with pytest.raises(UserError, match=message) as error, torch.device("meta"):
        build_network(request)
    assert "\n" not in str(error.value)


def test_rates_are_the_parents_over_the_root_of_s():
    arch = "timm/swin_tiny_patch4_window7_224"
    with torch.device("meta"):
        full, quarter = (build_network(request_for(arch, split)) for split in (1, 4))
    rates = rates_of(full)
    assert max(rates.values()) == pytest.approx(0.1)
    assert rates_of(quarter) == pytest.approx({key: rate / 2 for key, rate in rates.items()})


def test_image_sizes():
    with torch.device("meta"):
        network = build_network(request_for("timm/vit_tiny_patch16_224", 1, 192))
        assert network.pos_embed.shape[1] == 12 * 12 + 1
    with pytest.raises(
        UserError, match=r"--crop_size 200: does not run: .*patch size.*Sizes that it takes: 192, 224\."
    ):
        solved_request(request_for("torchvision/vit_b_32", 2, 200))
    assert [len(list(sizes)) for sizes in sizes_around({"patch_size": 16}, 10**9)] == [32, 8]  # each is a build


@pytest.mark.parametrize(
    ("arch", "way"),
    [
        ("torchvision/squeezenet1_1", "channels"),
        ("torchvision/alexnet", "channels"),
        ("timm/vgg11", "channels"),
        ("timm/regnetx_002", "channels"),
        ("timm/hrnet_w18_small", "channels"),  # parts of it give a list of maps
        ("timm/ecaresnet26t", "arguments"),
    ],
)
def test_which_way(arch, way):
    request = solved_request(request_for(arch, 2))
    assert request.way == way
    with torch.device("meta"):
        one, full = build_network(request), build_network(request_for(arch, 1))
    assert 2 * count_params(one) == pytest.approx(count_params(full), rel=0.02)
    assert [*one.state_dict()] == [*full.state_dict()]


def test_refused_by_name():
    with pytest.raises(UserError, match=r"timm/dpn68 .*: DPN takes no others.*Others that can be divided: resnet50"):
        solved_request(request_for("timm/dpn68", 2))


def leaves_of(arch: str, split_factor: int, crop_size: int) -> dict[str, float]:
    plan = division_plan(request_for(arch, split_factor, crop_size))
    assert plan.way == "arguments"
    assert abs(plan.params_difference) <= 0.02
    return dict(zip(plan.stages, plan.widths, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nfnet_f0", "dm_nfnet_f0"])
def test_groups_get_thinner_where_a_copy_has_less_than_one(name):
    """The first stage of NFNet-F0 has 128 channels inside, one group: 0.7 of them are none of 128."""
    found = leaves_of(f"timm/{name}", 2, 192)
    assert found["cfg.group_size"] == 88
    for stage, full in enumerate((256, 512, 1536, 1536)):
        assert found[f"cfg.channels.{stage}"] / full == pytest.approx(0.5**0.5, rel=0.03)
    assert "cfg.ch_div" not in found  # what widths are rounded to is none


@pytest.mark.long
def test_a_stage_of_one_head_stays_as_wide_as_a_head():
    """The first stage of MaxViT-pico has 32 channels, one head: 0.7 of them are none."""
    found = leaves_of("timm/maxvit_pico_rw_256", 2, 64)
    assert [found[f"cfg.embed_dim.{stage}"] for stage in range(4)] == [32, 32, 96, 160]
    assert found["cfg.conv_cfg.expand_ratio"] == pytest.approx(4.4, rel=0.01)


@pytest.mark.slow
def test_groups_keep_their_size_where_a_copy_has_some():
    found = leaves_of("timm/regnetz_b16", 2, 224)
    assert not [name for name in found if "group_size" in name]


def test_a_class_that_lists_what_each_layer_takes():
    """Every channel of SelecSls stands in the list twice or more, as what one block gives and another takes."""
    found = leaves_of("timm/selecsls42", 2, 224)
    assert "cfg.features.0.0" not in found  # the stem's 32 channels stand in the code
    for block in range(1, 6):
        assert found[f"cfg.features.{block}.0"] == found[f"cfg.features.{block - 1}.3"]
    assert found["cfg.head.0.0"] == found["cfg.features.5.3"]
    assert found["cfg.num_features"] == found["cfg.head.3.1"]


def test_tied_leaves_move_together():
    leaves = [("layers.0.out", 64), ("layers.1.in", 64), ("last", 64), ("layers.1.out", 32)]
    assert [group.names for group in grouped(leaves)] == [
        ("layers.0.out",),
        ("layers.1.in",),
        ("last",),
        ("layers.1.out",),
    ]
    assert [group.names for group in grouped(leaves, tied=True)] == [
        ("layers.0.out", "layers.1.in", "last"),
        ("layers.1.out",),
    ]


@pytest.mark.long
def test_a_factor_for_the_whole_network_stays_near_its_share():
    """A quarter of GhostNet's parameters is hardly more than its classifier, which keeps 1280 features."""
    with pytest.raises(UserError, match=r"the nearest plan takes width from 1 to 0\.0078125\. Others"):
        solved_request(request_for("timm/ghostnet_100", 4))
    assert solved_request(request_for("timm/ghostnetv2_100", 4)).way == "channels"
