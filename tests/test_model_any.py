"""Every classifier of torchvision and 79 families of timm, undivided: theirs in every name and number.

The smallest network of each class is in the default suite, all names in the long one.
"""

import json
from pathlib import Path

import pytest
import torch
import torchvision
from torchvision.models import get_model

from model import BackboneRequest, SplitNet, backbones, build_network
from model.library import build_on_meta
from utils.macs import count_macs, count_params

timm = pytest.importorskip("timm")

GOLDEN = json.loads((Path(__file__).parent / "golden" / "library_networks.json").read_text())
VERSIONS = {"torchvision": torchvision.__version__, "timm": timm.__version__}
# the smallest of their classes, as far as these are not among the small ones of tests/test_model_library.py
SMALLEST = (
    *("torchvision/squeezenet1_1", "torchvision/swin_t", "torchvision/swin_v2_t", "torchvision/vit_b_32"),
    *("torchvision/regnet_y_400mf", "torchvision/shufflenet_v2_x0_5", "torchvision/maxvit_t", "torchvision/alexnet"),
    *("timm/vit_tiny_patch16_224", "timm/convnext_atto", "timm/regnetx_004", "timm/hgnetv2_b0", "timm/cait_xxs24_224"),
    *(
        "timm/swinv2_tiny_window8_256",
        "timm/mixer_s16_224",
        "timm/levit_128",
        "timm/nfnet_f0",
        "timm/crossvit_tiny_240",
    ),
)


def request_for(arch: str, **changes) -> BackboneRequest:
    crop_size = backbones.get(arch).crop_size
    values = {"arch": arch, "num_classes": 1000, "shape": "large", "dataset": "imagenet", "crop_size": crop_size}
    return BackboneRequest(**(values | changes))


def create(arch: str, num_classes: int) -> torch.nn.Module:
    """The network as its library makes it."""
    library, _, name = arch.partition("/")
    if library == "timm":
        return timm.create_model(name, num_classes=num_classes)
    size = {"image_size": 518} if name == "vit_h_14" else {}  # torchvision's weights are for another size than it makes
    return get_model(name, weights=None, num_classes=num_classes, **size)


def check_undivided(arch: str) -> None:
    with torch.device("meta"):
        ours = build_network(request_for(arch))
    theirs = build_on_meta(lambda: create(arch, 1000))
    assert type(ours) is type(theirs)
    assert vars(ours).keys() == vars(theirs).keys()  # no attribute of ours on a library's network
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    whole = SplitNet([ours])
    assert vars(ours).keys() == vars(theirs).keys()
    assert {key: value.shape for key, value in whole.state_dict().items()} == {
        f"models.0.{key}": shape for key, shape in shapes.items()
    }
    side = backbones.get(arch).crop_size
    assert side is not None
    counts = [count_params(ours), count_macs(whole, (3, side, side))]
    library = arch.partition("/")[0]
    if VERSIONS[library].startswith(GOLDEN["versions"][library]):
        assert counts == GOLDEN["networks"][arch]
    else:
        assert counts == [count_params(theirs), count_macs(theirs, (3, side, side))]
    with torch.no_grad():
        assert whole.eval()(torch.empty(2, 3, side, side, device="meta")).shape == (1, 2, 1000)


def test_all_classifiers_of_torchvision_have_a_row():
    known = {f"torchvision/{name}" for name in torchvision.models.list_models(module=torchvision.models)}
    rows = {arch for arch in GOLDEN["networks"] if arch.startswith("torchvision/")}
    assert rows <= known
    if VERSIONS["torchvision"].startswith(GOLDEN["versions"]["torchvision"]):
        assert known - rows == {"torchvision/googlenet", "torchvision/inception_v3"}  # they give auxiliary logits
    assert sum(arch.startswith("timm/") for arch in GOLDEN["networks"]) == 79


@pytest.mark.parametrize("arch", SMALLEST)
def test_undivided_it_is_theirs_smallest_of_each_class(arch):
    check_undivided(arch)


@pytest.mark.long
@pytest.mark.parametrize("arch", sorted(GOLDEN["networks"].keys() - set(SMALLEST)))
def test_undivided_it_is_theirs(arch):
    check_undivided(arch)
