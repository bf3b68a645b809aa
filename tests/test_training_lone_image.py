"""One image for a process: every network trains on it, or the run is refused before its first epoch."""

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import train_split
from dataset import ImageSet
from dataset.loader import TrainLoader
from method import methods
from method.independent import Independent
from model import BackboneRequest, backbones, build_network, build_splitnet
from model.splitnet import SplitNet
from tests.networks import needs_timm
from tests.test_method_contract import make
from tests.test_model_contract import FORMS, REQUESTS, large_split, make_images, make_request, request_id
from training.lone_image import is_lone_image, lone_norm

representatives = pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS.keys())


def alone(networks: list[nn.Module]) -> Any:
    kind = methods.get("independent")
    return kind(SplitNet(networks), kind.Options())


def trains(network: nn.Module, images_BCHW: Tensor) -> bool:
    try:
        network.train()(images_BCHW).sum().backward()
    except ValueError as error:
        if not is_lone_image(error):
            raise
        return False
    return True


@representatives
def test_what_is_foretold_of_one_image_is_what_happens(request_: Any) -> None:
    network = build_splitnet(request_, seed=3, train_separately=True).models[0]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    name = lone_norm(alone([network]), request_.crop_size)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert trains(network, make_images(request_, 1)) == (name is None), request_id(request_)
    assert name is None or isinstance(alone([network]).get_submodule(name), nn.BatchNorm2d)


@pytest.mark.parametrize(("arch", "shape"), FORMS)
def test_every_backbone_can_be_asked(arch: str, shape: str) -> None:
    request = make_request(arch, shape, large_split(arch, shape))
    with torch.device("meta"):
        network = build_splitnet(request, seed=3, train_separately=True).models[0]
    name = lone_norm(alone([network]), request.crop_size)
    images_BCHW = torch.empty(1, 3, request.crop_size, request.crop_size, device="meta")
    assert trains(copy.deepcopy(network), images_BCHW) == (name is None)
    # with larger maps only those norms are left that follow a pool of the whole map
    if lone_norm(alone([network]), request.crop_size * 8) is not None:
        assert backbones.get(arch).family in ("resnest", "resnexst", "hcgnet")


@pytest.mark.parametrize(
    ("arch", "side", "name"),
    [
        ("torchvision/resnet18", 32, "network.models.0.layer4.0.bn1"),
        ("torchvision/resnet18", 64, None),
        pytest.param("timm/test_efficientnet", 32, "network.models.0.blocks.", marks=needs_timm),
        ("torchvision/vit_b_16", 224, None),
    ],
)
def test_other_libraries_networks_can_be_asked(arch: str, side: int, name: str | None) -> None:
    request = BackboneRequest(arch=arch, num_classes=5, crop_size=side)
    found = lone_norm(alone([build_network(request)]), side)
    assert (found is None) == (name is None)
    assert found is None or found.startswith(str(name))


@pytest.mark.parametrize("name", methods.names())
def test_every_method_can_be_asked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = make(name)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    asked: list[str] = []
    kind = type(method)
    original = kind.extra_logits
    monkeypatch.setattr(kind, "extra_logits", lambda self, images: asked.append(name) or original(self, images))
    # the gate of a native ensemble normalises numbers, not maps
    assert lone_norm(method, 32) == ("ensembles.0.gate.norm" if name == "one" else None)
    assert asked == [name]  # nothing stopped it before
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


def test_a_methods_own_heads_are_asked_too() -> None:
    class WithHead(Independent):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 7))

        def extra_logits(self, images_BCHW: Tensor) -> dict[str, Tensor]:
            return {"head": self.head(images_BCHW)}

    method = WithHead(alone([nn.Sequential(nn.Flatten(), nn.Linear(192, 7))]).network, Independent.Options())
    assert lone_norm(method, 8) == "head.1"


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [True, False])
def test_the_smallest_part_of_a_batch_is_known(world_size: int, drop_last: bool) -> None:
    for count in range(3, 14):
        images = ImageSet(
            targets=torch.zeros(count, dtype=torch.int64), images=torch.zeros(count, 3, 4, 4, dtype=torch.uint8)
        )
        for batch_size in range(world_size, 9):
            loaders = [
                TrainLoader(
                    images,
                    batch_size=batch_size,
                    num_views=1,
                    seed=0,
                    rank=rank,
                    world_size=world_size,
                    device=torch.device("cpu"),
                    workers=0,
                    crop=None,
                    drop_last=drop_last,
                )
                for rank in range(world_size)
            ]
            parts = np.array([[len(batch.labels_B) for batch in loader.epoch(0)] for loader in loaders])
            found = [loaders[-1].fewest_images(i) for i in range(loaders[0].steps_per_epoch)]
            assert found == parts.min(axis=0).tolist()
            assert min(found) in (found[0], found[-1])


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    """A run over 9 images of 32 pixels, of networks that need two images."""
    for split, count in (("train", 3), ("val", 1)):
        for label in range(3):
            folder = tmp_path / "data" / split / f"c{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                Image.linear_gradient("L").resize((32, 32)).rotate(30 * i + 70 * label).convert("RGB").save(
                    folder / f"{i}.png"
                )
    flags = ["--dataset", "folder", "--data", str(tmp_path / "data"), "--arch", "hcgnet_A1_cifar", "--no_cuda"]
    flags += ["--epochs", "1", "--is_autoaugment", "0", "--seed", "1", "--amp_dtype", "fp32"]
    return [*flags, "--workers", "0", "--model_dir", str(tmp_path / "m")]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--batch_size", "4", "--drop_last", "0"],
            "the last batch of every epoch has no more.*Give --drop_last 1, or",
        ),
        (["--batch_size", "1"], "every batch has no more.*Give a larger --batch_size"),
    ],
)
def test_a_run_that_will_meet_one_image_is_refused_before_its_first_epoch(
    flags: list[str], said: str, argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_split.Trainer, "train_epoch", lambda self: pytest.fail("an epoch began"))
    assert train_split.main([*argv, *flags]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "one image" in line]
    assert "hcgnet_A1_cifar" in line
    assert re.search(said, line), line


def test_a_run_that_will_not_is_not_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*argv, "--batch_size", "4", "--drop_last", "0"]
    assert train_split.main([*argv, "--max_steps", "1"]) == 0, capsys.readouterr().err  # it ends before the last batch
    argv[argv.index("hcgnet_A1_cifar")] = "resnet20"
    assert train_split.main([*argv, "--model_dir", argv[argv.index("--model_dir") + 1] + "2"]) == 0
    capsys.readouterr()


def test_one_image_that_is_left_of_a_batch_ends_in_one_line(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TrainLoader.epoch

    def one_left(self: TrainLoader, *arguments: Any, **named: Any) -> Any:
        for batch in original(self, *arguments, **named):
            yield batch._replace(
                images=batch.images[..., :1, :, :, :],
                labels_B=batch.labels_B[:1],
                indices_B=batch.indices_B[:1],
                positions_B=batch.positions_B[:1],
            )

    monkeypatch.setattr(TrainLoader, "epoch", one_left)
    assert train_split.main([*argv, "--batch_size", "4", "--on_bad_image", "skip"]) == 1
    error = capsys.readouterr().err
    assert "Step 0: process 0 has one image that can be read" in error
    assert "Traceback" not in error
