"""Weights to start from: whose they are, which networks take them, what they want to see, and what does not fit."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from torchvision.models import get_model, get_model_weights

from model import LARGE, BackboneRequest, SplitNet, build_splitnet
from model.pretrained import Start, archs_that_fit, has_layer_norm
from model.registry import MemberForm, request_of
from model.restore import published_keys
from model.slices import cut
from model.staged import staged_parts
from recipe.preprocessing import Preprocessing
from utils.errors import UserError

SMALL_RESNET = BackboneRequest(arch="resnet20", split_factor=2, num_classes=10, dataset="digits", crop_size=16)
RESNET18 = BackboneRequest(arch="torchvision/resnet18", num_classes=5, dataset="folder", shape=LARGE, crop_size=64)


def start_of(*contents: Mapping[str, Any] | None) -> Start:
    names = ["library" if content is None else f"{i}.pth" for i, content in enumerate(contents)]
    read = dict(zip(names, contents, strict=True))
    return Start.open(",".join(names), len(names), lambda name: read[name])


def resnet18(seed: int, num_classes: int = 1000) -> dict[str, torch.Tensor]:
    """The content of a file as torchvision releases them, of random weights."""
    torch.manual_seed(seed)
    return get_model("resnet18", num_classes=num_classes).state_dict()


def same(one: Mapping[str, Any], other: Mapping[str, Any], *, but: str = "-") -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one if not k.startswith(but))


# ---- who takes them --------------------------------------------------------------------------------------------------


def test_one_file_serves_every_full_network_and_new_heads_differ_by_seed() -> None:
    network = build_splitnet(RESNET18, seed=1, archs=["torchvision/resnet18"] * 3)
    heads = [one.fc.weight.clone() for one in network.models]
    file = resnet18(0)
    assert start_of(file).load_into(network) == [f"models.{i}.fc" for i in range(3)]
    for one, head in zip(network.models, heads, strict=True):
        assert same(one.state_dict(), file, but="fc")
        assert torch.equal(one.fc.weight, head)
    assert not torch.equal(heads[0], heads[1])


def test_a_list_gives_each_network_its_own_and_a_head_of_the_same_size_comes_too() -> None:
    network = build_splitnet(RESNET18, seed=1, archs=["torchvision/resnet18"] * 2)
    files = [resnet18(0, 5), {"model": resnet18(1, 5)}]
    assert start_of(*files).load_into(network) == []
    assert same(network.models[0].state_dict(), files[0])
    assert same(network.models[1].state_dict(), files[1]["model"])


def test_networks_of_several_archs_take_files_of_their_own() -> None:
    network = build_splitnet(RESNET18, seed=1, archs=["torchvision/resnet18", "torchvision/squeezenet1_1"])
    torch.manual_seed(3)
    squeezenet = get_model("squeezenet1_1", num_classes=5).state_dict()
    start_of(resnet18(0), squeezenet).load_into(network)
    assert same(network.models[1].state_dict(), squeezenet)
    with pytest.raises(UserError, match=r"1\.pth.*models.1.*is missing"):
        start_of(resnet18(0), resnet18(0)).load_into(network)


FORMS = {
    "batch_ensemble": {"norm": "shared", "init": 0},
    "batch_ensemble, norms of its own": {"norm": "member", "init": 0},
    "mimo": {},
    "mc_dropout": {"place": "stages", "rate": 0.2, "mask_seed": 5},
    "gated": {"branches": 3},
}


def members(form: str, count: int, request: BackboneRequest = RESNET18) -> Any:
    kind = form.partition(",")[0]
    return build_splitnet(replace(request, form=MemberForm(kind=kind, members=count, numbers=FORMS[form])), seed=3)


@pytest.mark.parametrize("form", FORMS)
def test_members_that_share_a_network_take_one_networks_file(form: str) -> None:
    """In evaluation they answer as it does, up to what is their own: factors of 1, no masks, the gate at branch 1."""
    count = 1 if form == "gated" else 2
    network, file = members(form, count), resnet18(0, 5)
    plain = build_splitnet(RESNET18, seed=9).models[0].eval()
    plain.load_state_dict(file)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    renewed = start_of(file).load_into(network)
    assert renewed == ["models.0.fc"] * (form == "mimo")
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    network.eval()
    if form == "mimo":  # its classifier is its own, what comes before is not
        assert torch.equal(network.models[0].fc.weight, before["models.0.fc.weight"])
        network.models[0].fc = plain.fc = torch.nn.Identity()
    with torch.no_grad():
        expected = plain(images)
        if form == "gated":
            parts = staged_parts(network.models[0])
            assert torch.equal(network.ensemble(parts, images)[0][0], expected)
            state = network.state_dict()
            own = [key for key in state if "native_ensemble" in key]
            assert own
            assert all(torch.equal(state[key], before[key]) for key in own)
            return
        if form == "mc_dropout":
            assert all(torch.equal(network.models[0].state_dict()[key], value) for key, value in file.items())
            return
        views = images.repeat(1, 2, 1, 1) if form == "mimo" else None
        answers = network(images) if views is None else network.models[0](views)[None]
    torch.testing.assert_close(answers, expected.expand_as(answers), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_a_classifier_of_other_classes_is_new_for_members_too(form: str) -> None:
    """Also where M times K happens to be the number of the file's classes."""
    network = members(form, 1 if form == "gated" else 2)
    before = {key: value.clone() for key, value in network.state_dict().items() if ".fc." in key}
    assert start_of(resnet18(0, 10)).load_into(network) == ["models.0.fc"]
    state = network.state_dict()
    assert all(torch.equal(state[key], value) for key, value in before.items())
    norm = "models.0.layer4.1.bn2.1.weight" if "own" in form else "models.0.layer4.1.bn2.weight"
    assert torch.equal(state[norm], resnet18(0)["layer4.1.bn2.weight"])


def test_both_heads_of_a_distilled_network_are_new_for_other_classes() -> None:
    pytest.importorskip("timm")
    arch = "timm/deit_tiny_distilled_patch16_224"
    request = BackboneRequest(arch=arch, num_classes=5, shape=LARGE, crop_size=224, dataset="folder")
    network = build_splitnet(request, seed=1)
    before = {key: value.clone() for key, value in network.models[0].state_dict().items()}
    file = {key: torch.ones(7, *value.shape[1:]) if "head" in key else value + 1 for key, value in before.items()}
    assert start_of(file).load_into(network) == ["models.0.head", "models.0.head_dist"]
    for key, value in network.models[0].state_dict().items():
        assert torch.equal(value, (before if "head" in key else file)[key]), key


def test_members_take_a_file_of_their_own_form_and_no_other() -> None:
    plain = replace(SMALL_RESNET, split_factor=1)
    network, other = members("mimo", 2, plain), members("mimo", 2, replace(plain, dataset="cifar10"))
    other.models[0].fc.weight.data.add_(1)
    start_of({"state_dict": other.state_dict()}).load_into(network)
    assert same(network.state_dict(), other.state_dict())
    for content in (members("mimo", 3, plain).state_dict(), members("batch_ensemble", 2, plain).state_dict()):
        with pytest.raises(UserError, match=r"members of the form mimo .* one network's of --arch resnet20, or a"):
            start_of({"state_dict": content}).load_into(network)
    packed = MemberForm(kind="packed", members=2, numbers={"alpha": 1.0, "gamma": 1, "min_channels": 64})
    thin = build_splitnet(replace(plain, form=packed), seed=0)
    whole = {"state_dict": build_splitnet(plain, seed=1).state_dict()}
    with pytest.raises(UserError, match=r"--pretrained 0.pth: members of the form packed .*Give a checkpoint of the"):
        start_of(whole).load_into(thin)


def test_a_list_of_another_length_is_refused() -> None:
    with pytest.raises(UserError, match="--pretrained names 2 files and there are 3 networks"):
        Start.open("a,b", 3, lambda name: {})


def test_a_file_with_a_comma_in_its_name_is_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a,b.pth"
    path.touch()
    assert Start.open(str(path), 3, lambda name: {}).names == (str(path),)


def test_a_checkpoint_of_several_networks_serves_as_many(network: SplitNet) -> None:
    content = {"state_dict": published_keys(network.state_dict())}
    target = build_splitnet(replace(SMALL_RESNET, num_classes=3), seed=9)
    head = target.models[1].fc.weight.clone()
    assert start_of(content).load_into(target) == ["models.0.fc", "models.1.fc"]
    assert torch.equal(target.models[1].fc.weight, head)
    assert torch.equal(target.models[1].layer1[0].conv1.weight, network.models[1].layer1[0].conv1.weight)

    target = build_splitnet(SMALL_RESNET, seed=9)
    assert start_of(content).load_into(target) == []
    assert same(target.state_dict(), network.state_dict())

    target = build_splitnet(replace(SMALL_RESNET, split_factor=4), seed=9)
    with pytest.raises(UserError, match=r"--pretrained 0\.pth: not the weights.*4 networks"):
        start_of(content).load_into(target)
    target = build_splitnet(SMALL_RESNET, seed=0)
    with pytest.raises(UserError, match=r"0\.pth: holds 2 networks; in a list, each file is of one"):
        start_of(content, content).load_into(target)


def test_parts_of_a_division_start_from_slices_of_a_whole_network(caplog: pytest.LogCaptureFixture) -> None:
    network = build_splitnet(SMALL_RESNET, seed=0)
    whole = build_splitnet(replace(SMALL_RESNET, split_factor=1), seed=0).models[0].state_dict()
    start = start_of(whole)
    assert start.is_parent(network)
    with caplog.at_level("INFO"):
        assert start.load_into(network, seed=3) == []
    assert re.search(
        r"each of the 2 starts from a slice of it \(two of them share \d+ % of their channels\)", caplog.text
    )
    expected = cut(whole, request_of(network.models[0]), networks=2, seed=3, source="P").states
    for one, states in zip(network.models, expected, strict=True):
        assert all(torch.equal(value, states[name]) for name, value in one.state_dict().items())
    other = build_splitnet(replace(SMALL_RESNET, num_classes=SMALL_RESNET.num_classes + 1), seed=0)
    assert start.load_into(other, seed=3) == ["models.0.fc", "models.1.fc"]


def test_what_fits_as_it_is_is_no_parent() -> None:
    network = build_splitnet(SMALL_RESNET, seed=0)
    assert not start_of(network.models[0].state_dict()).is_parent(build_splitnet(SMALL_RESNET, seed=0))
    assert not start_of(network.models[0].state_dict()).is_parent(
        build_splitnet(replace(SMALL_RESNET, split_factor=1), seed=0)
    )


@pytest.fixture(scope="module")
def network() -> SplitNet:
    return build_splitnet(SMALL_RESNET, seed=3)


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "name"), [("resnet50", "resnet50"), pytest.param("resnet18_imagenet", "resnet34", marks=pytest.mark.slow)]
)
def test_names_that_load_a_file_are_told(arch: str, name: str) -> None:
    request = replace(RESNET18, arch=arch, crop_size=224)
    with torch.device("meta"):
        file = get_model(name).state_dict()
        network = build_splitnet(request, seed=0)
    expected = {"torchvision/resnet50", "resnet50_imagenet"} if name == "resnet50" else set()
    found = set(archs_that_fit(file, request))
    assert expected <= found
    assert bool(expected) == bool(found)
    with pytest.raises(UserError) as error:
        start_of(file).load_into(network)
    assert ("torchvision/resnet50 or resnet50_imagenet" in str(error.value)) == bool(expected)


def test_old_names_in_torchvisions_files_are_todays(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build_splitnet(replace(RESNET18, arch="torchvision/densenet121"), seed=0)
    today = {key: value + 1 for key, value in network.models[0].state_dict().items()}
    old = {key.replace("norm1", "norm.1").replace("conv2", "conv.2"): value for key, value in today.items()}
    assert old.keys() != today.keys()
    start_of(old).load_into(network)
    assert same(network.models[0].state_dict(), today)


# ---- a library's own -------------------------------------------------------------------------------------------------


def test_a_librarys_published_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real download code finds the file in torch's cache; without the file it says where to put it."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    request = replace(RESNET18, arch="torchvision/mobilenet_v3_small")
    target = build_splitnet(request, seed=0)

    def no_network(*args: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(UserError, match=r"cannot be fetched.*https.*no route to host.*file into") as error:
        start_of(None).load_into(target)
    assert "\n" not in str(error.value)

    published = torchvision.models.mobilenet_v3_small()
    name = torchvision.models.MobileNet_V3_Small_Weights.DEFAULT.url.rpartition("/")[2]
    torch.save(published.state_dict(), tmp_path / "checkpoints" / name)
    assert start_of(None).load_into(target) == ["models.0.classifier.3"]
    assert same(target.models[0].state_dict(), published.state_dict(), but="classifier.3")

    with pytest.raises(UserError, match=r"--arch resnet20.*library"):
        start_of(None).load_into(build_splitnet(replace(SMALL_RESNET, split_factor=1), seed=0))
    halves = build_splitnet(replace(request, split_factor=2), seed=0)
    assert start_of(None).load_into(halves, seed=3) == ["models.0.classifier.3", "models.1.classifier.3"]
    with pytest.raises(UserError, match="undivided torchvision/mobilenet_v3_small"):
        start_of(None, None).load_into(halves)


def test_timms_published_weights_fail_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    target = build_splitnet(replace(RESNET18, arch="timm/resnet18"), seed=0)

    def no_network(*args: object, **kwargs: object) -> None:
        assert kwargs["pretrained"]
        raise OSError("cannot reach the hub\nat all")

    with monkeypatch.context() as patched:
        patched.setattr(timm, "create_model", no_network)
        with pytest.raises(UserError, match=r"timm.*resnet18.*cannot be fetched.*cannot reach the hub"):
            start_of(None).load_into(target)
    published = timm.create_model("resnet18", num_classes=5)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: published)
    assert start_of(None).load_into(target) == []
    assert same(target.models[0].state_dict(), published.state_dict())


# ---- what they want to see -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file", "expected"),
    [
        ("resnet50", "resnet50-0676ba61.pth", (256, "bilinear", 224)),
        ("resnet50", "resnet50-11ad3fa6.pth", (232, "bilinear", 224)),
        ("resnet50", "mine.pth", (232, "bilinear", 224)),  # torchvision's best
        ("efficientnet_b3", "library", (320, "bicubic", 300)),
    ],
)
def test_torchvisions_weights_see_what_torchvision_shows_them(
    name: str, file: str, expected: tuple[int, str, int]
) -> None:
    content = None if file == "library" else resnet18(0)
    asked = Start((file,), (content,)).preprocessing([f"torchvision/{name}"])
    assert asked is not None
    assert (asked.resize, asked.interpolation, asked.crop) == expected
    assert (asked.mean, asked.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_every_classifier_of_torchvision_says_what_its_weights_see() -> None:
    for name in torchvision.models.list_models(module=torchvision.models):
        if name in ("googlenet", "inception_v3"):
            continue
        for weights in get_model_weights(name):
            file = weights.url.rpartition("/")[2]
            asked = Start((file,), ({},)).preprocessing([f"torchvision/{name}"])
            theirs = weights.transforms()
            assert asked is not None
            assert ([asked.resize], [asked.crop]) == (theirs.resize_size, theirs.crop_size)
            assert (asked.interpolation, list(asked.mean)) == (theirs.interpolation.value, theirs.mean)
            assert Preprocessing.from_dict(asked.as_dict(), "x") == asked


@pytest.mark.parametrize("name", ["resnet50.a1_in1k", "convnext_atto", "vit_base_patch16_224.augreg_in21k"])
def test_timms_weights_see_what_timm_shows_them(name: str) -> None:
    timm = pytest.importorskip("timm")
    asked = start_of(None).preprocessing([f"timm/{name}"])
    theirs = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    assert asked is not None
    assert asked.crop == theirs["input_size"][-1]
    assert asked.resize == int(asked.crop / theirs["crop_pct"])
    assert (asked.mean, asked.std) == (theirs["mean"], theirs["std"])
    assert asked.interpolation == theirs["interpolation"]


def test_a_checkpoint_of_ours_says_it_itself() -> None:
    own = Preprocessing(resize=73, interpolation="bilinear", crop=64, mean=(0.1, 0.2, 0.3), std=(1, 2, 3))
    assert start_of({"preprocessing": own.as_dict()}).preprocessing(["torchvision/resnet18"]) == own
    older = {"config": {"crop_pct": 0.5}, "mean": [0.1, 0.2, 0.3], "std": [1, 2, 3], "crop_size": 32}
    asked = start_of({**older, "data_recipe": "imagenet"}).preprocessing(["torchvision/resnet18"])
    assert asked == replace(own, resize=64, crop=32, interpolation="bicubic")
    assert start_of({**older, "data_recipe": "cifar10"}).preprocessing(["resnet20"]) == replace(asked, resize=32)
    assert start_of({"state_dict": {}}).preprocessing(["resnet20"]) is None


def test_networks_of_one_run_see_one_kind_of_images() -> None:
    own = Preprocessing(resize=73, interpolation="bilinear", crop=64, mean=(0.1, 0.2, 0.3), std=(1, 2, 3))
    archs = ["torchvision/resnet18"] * 2
    start = start_of({}, {"preprocessing": own.as_dict()})
    with pytest.raises(UserError, match=r"mean 0.485 0.456 0.406.*0.1 0.2 0.3.*choose by --mean and --std"):
        start.preprocessing(archs)
    chosen = start.preprocessing(archs, may_differ=True)
    assert chosen is not None
    assert chosen.crop == 224


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("torchvision/resnet18", False),
        ("torchvision/efficientnet_b0", False),
        ("torchvision/vgg11", False),
        ("torchvision/convnext_tiny", True),
        ("torchvision/swin_t", True),
        ("timm/convnext_atto", True),
        ("timm/vit_tiny_patch16_224", True),
    ],
)
def test_networks_that_normalise_by_layers_are_known(arch: str, expected: bool) -> None:
    if arch.startswith("timm/"):
        pytest.importorskip("timm")
    assert has_layer_norm(replace(RESNET18, arch=arch, crop_size=224)) is expected
