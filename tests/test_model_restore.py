"""Networks come back from every kind of checkpoint, and what does not fit is named in one line."""

import math
import sys
import types
from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn

from model import BackboneRequest, build_splitnet
from model.registry import request_of
from model.restore import published_keys, restore_splitnet
from record.checkpoint import load_checkpoint
from utils.errors import UserError

REQUEST = BackboneRequest(arch="resnet20", split_factor=2, num_classes=10, dataset="digits", crop_size=16)


@pytest.fixture(scope="module")
def network():
    return build_splitnet(REQUEST, seed=3)


@pytest.fixture
def ours(network):
    """What a checkpoint of ours holds, as far as networks are concerned."""
    return {
        "epoch": 7,
        "arch": "resnet20",
        "state_dict": published_keys(network.state_dict()),
        "best_acc1": 97.5,
        "config": {"arch": "resnet20", "split_factor": 2, "dataset": "digits", "is_train_sep": False},
        "classes": [str(i) for i in range(10)],
        "mean": [0.1, 0.2, 0.3],
        "std": [1, 2, 3],
        "crop_size": 16,
        "data_recipe": "digits",
    }


@pytest.fixture
def released(network):
    """What a published checkpoint holds."""
    return {"epoch": 300, "arch": "resnet20", "state_dict": published_keys(network.state_dict()), "best_acc1": 1.0}


def same(restored, network):
    own = network.state_dict()
    return restored.state_dict().keys() == own.keys() and all(
        torch.equal(value, own[key]) for key, value in restored.state_dict().items()
    )


def test_ours_needs_no_flags(ours, network):
    restored, info = restore_splitnet(ours)
    assert same(restored, network)
    assert not restored.training
    assert (info.archs, info.split_factor, info.num_classes, info.dataset) == (("resnet20",), 2, 10, "digits")
    assert (info.crop_size, info.weights, info.epoch, info.best_acc1) == (16, "raw", 7, 97.5)
    assert info.classes == tuple("0123456789")
    assert info.mean == (0.1, 0.2, 0.3)
    assert info.std == (1.0, 2.0, 3.0)
    assert info.data_recipe == "digits"


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_released_needs_the_data_set_only(released, network, prefix):
    released["state_dict"] = {prefix + key: value for key, value in network.state_dict().items()}
    restored, info = restore_splitnet(released, dataset="cifar10")
    assert same(restored, network)
    assert info.classes is None
    assert info.mean is None
    assert info.crop_size == 32
    with pytest.raises(UserError, match="add --dataset"):
        restore_splitnet(released)


def test_num_classes_comes_from_the_classifier():
    network = build_splitnet(replace(REQUEST, num_classes=7), seed=0)
    content = {"arch": "resnet20", "state_dict": network.state_dict()}
    restored, info = restore_splitnet(content, dataset="cifar10")
    assert info.num_classes == 7
    assert same(restored, network)
    with pytest.raises(UserError, match="--num_classes 10 contradicts"):
        restore_splitnet(content, dataset="cifar10", num_classes=10)


def test_flags_that_contradict_the_file(ours, released):
    for content in (ours, released):
        with pytest.raises(UserError, match=r"--arch resnet32 contradicts --resume x\.tar"):
            restore_splitnet(content, arch="resnet32", dataset="digits", source="--resume x.tar")
        with pytest.raises(UserError, match="--split_factor 4 contradicts"):
            restore_splitnet(content, split_factor=4, dataset="digits")
    restore_splitnet(ours, arch="resnet20", split_factor=2, num_classes=10)


def test_arch_of_a_file_that_does_not_say(released, network):
    del released["arch"]
    with pytest.raises(UserError, match="add --arch"):
        restore_splitnet(released, dataset="cifar10")
    assert same(restore_splitnet(released, arch="resnet20", dataset="cifar10")[0], network)


def test_arch_of_a_file_that_calls_it_otherwise(released, network):
    released["arch"] = "resnet20_of_others"
    with pytest.raises(UserError, match=r"x\.tar.*'resnet20_of_others'.*add --arch"):
        restore_splitnet(released, dataset="cifar10", source="--resume x.tar")
    assert same(restore_splitnet(released, arch="resnet20", dataset="cifar10")[0], network)


# the name is one of ours too in the second case, and of another network
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_file_of_a_librarys_training_script(name):
    theirs = torchvision.models.get_model(name, num_classes=5)
    content = {"epoch": 9, "arch": name, "best_acc1": 70.0, "optimizer": {}}
    content["state_dict"] = {f"module.{key}": value for key, value in theirs.state_dict().items()}
    restored, info = restore_splitnet(content, arch=f"torchvision/{name}", dataset="imagenet", crop_size=64)
    assert info.archs == (f"torchvision/{name}",)
    images_BCHW = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(restored(images_BCHW)[0], theirs.eval()(images_BCHW))


@pytest.mark.parametrize(
    ("arch", "dataset", "options"),
    [
        ("efficientnetb0", "imagenet", {"is_lukemelas_efficientnet": True}),
        ("efficientnetb0", "imagenet", {"is_lukemelas_efficientnet": False}),
        ("densenet190", "cifar100", {"is_official_densenet": False}),
        ("densenet190", "cifar100", {"is_official_densenet": True}),
    ],
)
def test_the_names_of_the_tensors_tell_the_implementation(arch, dataset, options):
    shape = "large" if dataset == "imagenet" else "small"
    request = BackboneRequest(arch=arch, split_factor=4, num_classes=5, shape=shape, dataset=dataset, options=options)
    network = build_splitnet(request, seed=3)
    content = {"arch": arch, "state_dict": published_keys(network.state_dict())}
    restored, info = restore_splitnet(content, dataset=dataset)
    assert same(restored, network)
    assert options.items() <= info.request.options.items()
    ((flag, value),) = options.items()
    with pytest.raises(UserError, match=f"not the weights.*--arch {arch}"):
        restore_splitnet(content, dataset=dataset, options={flag: not value})


def test_moving_average_is_preferred(ours, network):
    average = build_splitnet(REQUEST, seed=4)
    ours["ema"] = published_keys(average.state_dict())
    for weights, expected in (("auto", average), ("ema", average), ("raw", network)):
        restored, info = restore_splitnet(ours, weights=weights)
        assert same(restored, expected)
        assert info.weights == ("raw" if expected is network else "ema")
    del ours["ema"]
    with pytest.raises(UserError, match="--weights raw"):
        restore_splitnet(ours, weights="ema")


def test_one_network_trained_alone(ours, released):
    alone = build_splitnet(REQUEST, seed=3, train_separately=True)
    for content in (ours, released):
        content["state_dict"] = published_keys(alone.state_dict())
    ours["config"]["is_train_sep"] = True
    restored, info = restore_splitnet(ours)
    assert same(restored, alone)
    assert info.split_factor == 2
    restored, _ = restore_splitnet(released, dataset="digits", split_factor=2, train_separately=True)
    assert same(restored, alone)
    with pytest.raises(UserError, match=r"not the weights.*--arch resnet20 --dataset digits --split_factor 1"):
        restore_splitnet(released, dataset="digits")


@pytest.mark.parametrize(
    ("arch", "wrapped", "prefix"),
    [("torchvision/resnet18", False, ""), ("torchvision/resnet18", True, "module."), ("timm/resnet18", False, "")],
)
def test_a_librarys_plain_state_dict(arch, wrapped, prefix):
    if arch.startswith("timm"):
        theirs = pytest.importorskip("timm").create_model("resnet18", num_classes=5)
    else:
        theirs = torchvision.models.resnet18(num_classes=5)
    nn.init.normal_(theirs.bn1.running_mean)
    # the oldest files lack this counter
    state = {prefix + key: value for key, value in theirs.state_dict().items() if "num_batches" not in key}
    content = {"state_dict": state, "epoch": 3} if wrapped else state
    restored, info = restore_splitnet(content, arch=arch, dataset="imagenet", crop_size=32)
    images_BCHW = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(restored(images_BCHW)[0], theirs.eval()(images_BCHW))
    assert (info.num_classes, info.num_networks) == (5, 1)
    with pytest.raises(UserError, match=r"which backbone.*add --arch"):
        restore_splitnet(content, dataset="imagenet")
    with pytest.raises(UserError, match=r"not the weights.*--arch torchvision/resnet34"):
        restore_splitnet(content, arch="torchvision/resnet34", dataset="imagenet")


def test_solved_widths_come_back(ours):
    request = replace(REQUEST, arch="torchvision/resnet18", widths=(8, 16, 24, 40))
    network = build_splitnet(request, seed=0)
    ours |= {"arch": request.arch, "widths": [8, 16, 24, 40], "state_dict": network.state_dict()}
    ours["config"]["arch"] = request.arch
    restored, info = restore_splitnet(ours)
    assert same(restored, network)
    assert info.num_classes == 10
    del ours["widths"]
    with pytest.raises(UserError, match=r"models.0.conv1.weight is"):
        restore_splitnet(ours)


def test_several_full_networks():
    archs = ["resnet20", "resnet32"]
    network = build_splitnet(replace(REQUEST, split_factor=1), seed=0, archs=archs)
    content = {"arch": "resnet20, resnet32", "state_dict": network.state_dict()}
    restored, info = restore_splitnet(content, dataset="digits")
    assert same(restored, network)
    assert info.archs == ("resnet20", "resnet32")
    content["arch"] = "the pair"
    restored, _ = restore_splitnet(content, dataset="digits", backbone_names=lambda arch: archs)
    assert same(restored, network)
    content["arch"] = "resnet20,resnet32,resnet20"
    with pytest.raises(UserError, match="holds 2 networks"):
        restore_splitnet(content, dataset="digits")


def test_structure_options_come_from_the_file_or_the_user(ours):
    network = build_splitnet(replace(REQUEST, options={"output_stride": 2}), seed=3)
    ours["state_dict"] = published_keys(network.state_dict())
    with pytest.raises(UserError, match=r"models\.0\.layer2\.0\.downsample"):
        restore_splitnet(ours)
    assert same(restore_splitnet(ours, options={"output_stride": 2})[0], network)
    ours["config"]["output_stride"] = 2
    assert same(restore_splitnet(ours)[0], network)
    with pytest.raises(UserError, match=r"models\.0\.layer2\.0\.downsample"):
        restore_splitnet(ours, options={"output_stride": 8})


def break_missing(state):
    del state["module.models.1.layer1.0.conv1.weight"]
    return "models.1.layer1.0.conv1.weight is missing"


def break_shape(state):
    key = "module.models.0.layer1.0.conv1.weight"
    state[key] = state[key][:, :1]
    return r"models.0.layer1.0.conv1.weight is \[\d+, 1, 3, 3\], expected"


def break_unknown(state):
    state["module.models.0.extra"] = torch.zeros(1)
    return "models.0.extra is unknown"


@pytest.mark.parametrize("damage", [break_missing, break_shape, break_unknown])
def test_weights_of_another_structure(ours, damage):
    expected = damage(ours["state_dict"])
    with pytest.raises(UserError, match=expected) as error:
        restore_splitnet(ours, source="--resume x.tar")
    assert str(error.value).startswith("--resume x.tar")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("state_dict", None, "expected tensors by name"),
        ("state_dict", {"module.models.0.fc.weight": 3.0}, "expected tensors by name"),
        ("state_dict", {"fc.weight": torch.zeros(2, 2)}, "models.0.layer0.0.weight is missing"),
        ("state_dict", {}, "holds no networks"),
        ("widths", [1, "x"], "'widths'.*damaged.*positive numbers"),
        ("widths", 3, "'widths' is damaged"),
        ("widths", [math.inf], "'widths'.*damaged.*positive numbers"),
        ("widths", [10**400], "'widths'.*damaged.*positive numbers"),
        ("way", "channels", "plan .* damaged: way 'channels', 0 'widths' and 0 'width_names'"),
        ("width_names", ["embed_dim"], "plan .* damaged: way '', 0 'widths' and 1 'width_names'"),
        pytest.param("best_acc1", 10**400, "'best_acc1' is damaged: a number of 1329 bits", id="best_acc1-long"),
        ("state_dict", {"module.models.1.fc.weight": torch.zeros(2, 2)}, "holds no networks"),
        ("config", "x", "'config' is damaged"),
        ("config", {"arch": 3}, "'arch' is damaged"),
        ("config", {"arch": "resnet20", "dataset": 5}, "'dataset' is damaged"),
        ("config", {"arch": "resnet20", "is_train_sep": True, "split_factor": "2"}, "'split_factor' is damaged"),
        ("config", {"arch": "resnet0"}, "--arch 'resnet0'.*not a known"),
        ("crop_size", "16", "'crop_size' is damaged"),
        ("mean", [1, 2], "'mean'.*damaged.*three numbers"),
        ("mean", [1, 2, 10**400], "'mean'.*damaged.*three numbers"),
        ("std", "abc", "'std' is damaged"),
        ("std", [1, 2, "x"], "'std'.*damaged.*three numbers"),
        ("epoch", "x", "'epoch' is damaged"),
        ("classes", ["a", "b"], " 2 classes.*networks.* 10"),
    ],
)
def test_damaged_content(ours, key, value, message):
    ours[key] = value
    with pytest.raises(UserError, match=message):
        restore_splitnet(ours, dataset="digits")


class CfgNode(dict):
    """As pickled by the library that Cream's released files keep their settings with."""

    def __init__(self, *content):
        super().__init__(*content)
        self.__dict__["_immutable"] = True


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("prefix", "average"), [("module.", True), ("", True), ("module.", False)])
def test_released_cream_files(tmp_path, monkeypatch, caplog, zipped, prefix, average):
    """Averaged weights, settings as objects, `module.` or not, and a name that is no backbone's."""
    request = BackboneRequest(arch="cream_14", num_classes=5, dataset="imagenet", shape="large", crop_size=64)
    raw, ema = (build_splitnet(request, seed=seed).models[0].state_dict() for seed in (1, 2))
    library = types.ModuleType("yacs.config")
    library.CfgNode = CfgNode
    monkeypatch.setattr(CfgNode, "__module__", "yacs.config")
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", library)
    content = {"epoch": 499, "arch": "Childnet_Testing", "version": 2, "metric": 53.7, "optimizer": {}}
    content["state_dict"] = {prefix + key: value for key, value in raw.items()}
    content["args"] = CfgNode({"LR": 0.064, "NET": CfgNode({"SELECTION": 14})})
    if average:
        content["state_dict_ema"] = {prefix + key: value for key, value in ema.items()}
    torch.save(content, tmp_path / "14.pth.tar", _use_new_zipfile_serialization=zipped)
    monkeypatch.undo()
    read = load_checkpoint(tmp_path / "14.pth.tar")
    assert read["args"]["NET"] == {"SELECTION": 14}
    restored, info = restore_splitnet(read, arch="cream_14", dataset="imagenet")
    assert (info.num_classes, info.crop_size, info.weights) == (5, 64, "ema" if average else "raw")
    assert ("holds no moving average of the weights; taking the raw ones" in caplog.text) == (not average)
    wanted = ema if average else raw
    assert all(torch.equal(value, wanted[key]) for key, value in restored.models[0].state_dict().items())
    assert all(
        torch.equal(value, raw[key])
        for key, value in restore_splitnet(read, arch="cream_14", dataset="imagenet", weights="raw")[0]
        .models[0]
        .state_dict()
        .items()
    )
    with pytest.raises(UserError, match="add --arch NAME"):
        restore_splitnet(read, dataset="imagenet")
    with pytest.raises(UserError, match=r"not the weights.*--arch cream_43"):
        restore_splitnet(read, arch="cream_43", dataset="imagenet")


def test_a_list_of_backbones_comes_back_where_the_first_is_fitted_to_small_images():
    pytest.importorskip("timm")
    archs = ["timm/test_vit", "resnet20"]
    network = build_splitnet(replace(REQUEST, arch=archs[0], split_factor=1), seed=3, archs=archs)
    plan = request_of(network.models[0])
    assert plan.width_names
    content = {
        "state_dict": published_keys(network.state_dict()),
        "config": {"arch": ",".join(archs), "split_factor": 1, "dataset": "digits"},
        "crop_size": 16,
        "widths": list(plan.widths),
        "way": plan.way,
        "width_names": list(plan.width_names),
        "library": plan.library,
    }
    restored, info = restore_splitnet(content)
    assert same(restored, network)
    assert info.archs == tuple(archs)
