"""Checkpoints converted to ours and to safetensors: nothing is lost on the way, and nothing runs."""

import json
import pickle

import pytest
import torch
import torchvision
from safetensors import torch as safetensors

from evaluation.loading import load
from model import BackboneRequest, build_splitnet
from model.restore import published_keys, restore_splitnet
from recipe.preprocessing import Preprocessing
from record import safe_tensors
from record.checkpoint import load_checkpoint
from script.convert_checkpoint import KEPT, main
from utils.errors import UserError

REQUEST = BackboneRequest(arch="resnet20", split_factor=2, num_classes=10, dataset="digits", crop_size=16)


@pytest.fixture
def ours(tmp_path):
    """A checkpoint of ours, with a moving average, and its path."""
    content = {
        "epoch": 7,
        "arch": "resnet20",
        "widths": [],
        "way": "",
        "width_names": [],
        "library": "",
        "form": None,
        "state_dict": published_keys(build_splitnet(REQUEST, seed=3).state_dict()),
        "ema": published_keys(build_splitnet(REQUEST, seed=4).state_dict()),
        "best_acc1": 97.5,
        "optimizer": {"state": {}},
        "config": {"arch": "resnet20", "split_factor": 2, "dataset": "digits", "is_train_sep": False, "seed": 3},
        "classes": [f"Ziffer {i} é" for i in range(10)],
        "codes": [f"n{i}" for i in range(10)],
        "mean": [0.1, 0.2, 0.3],
        "std": [1 / 3, 2.0, 3.0],
        "crop_size": 16,
        "data_recipe": "digits",
        "preprocessing": {
            "resize": 16,
            "interpolation": "bicubic",
            "crop": 16,
            "color_order": "RGB",
            "value_range": [0.0, 1.0],
            "mean": [0.1, 0.2, 0.3],
            "std": [1 / 3, 2.0, 3.0],
        },
    }
    path = tmp_path / "ours.pth.tar"
    torch.save(content, path)
    return content, path


def equal(left, right):
    return list(left) == list(right) and all(
        torch.equal(value, right[key]) and value.dtype == right[key].dtype for key, value in left.items()
    )


def test_round_trip(ours, tmp_path):
    content, path = ours
    there, back = tmp_path / "new" / "there.safetensors", tmp_path / "back.pth.tar"
    assert main([str(path), str(there)]) == 0
    assert main([str(there), str(back)]) == 0
    for found in (load_checkpoint(there), load_checkpoint(back)):
        assert {key: found.get(key) for key in KEPT} == {key: content.get(key) for key in KEPT}
        for name in ("state_dict", "ema"):
            assert set(found[name]) == set(content[name])
            assert all(torch.equal(value, content[name][key]) for key, value in found[name].items())
        assert "optimizer" not in found
    network, info = restore_splitnet(load_checkpoint(there))
    expected, known = restore_splitnet(content)
    assert equal(network.state_dict(), expected.state_dict())
    assert info == known


def test_a_published_file(ours, tmp_path, capsys):
    content, path = ours
    torch.save({key: content[key] for key in ("epoch", "arch", "state_dict", "best_acc1", "optimizer")}, path)
    target = tmp_path / "out.safetensors"
    assert main([str(path), str(target)]) == 2
    assert "add --dataset" in capsys.readouterr().err
    assert not target.exists()
    assert main([str(path), str(target), "--dataset", "digits"]) == 0
    found = load_checkpoint(target)
    assert found["config"] == {"arch": "resnet20", "split_factor": 2, "dataset": "digits"}
    assert equal(restore_splitnet(found)[0].state_dict(), restore_splitnet(content, weights="raw")[0].state_dict())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_librarys_state_dict(tmp_path, suffix, capsys):
    theirs = torchvision.models.mobilenet_v3_small(num_classes=4)
    source, target = tmp_path / f"plain{suffix}", tmp_path / "ours.pth.tar"
    if suffix == ".pth":
        torch.save(theirs.state_dict(), source)
    else:
        safetensors.save_file(theirs.state_dict(), source)
    assert main([str(source), str(target), "--dataset", "imagenet"]) == 2
    assert "add --arch" in capsys.readouterr().err
    flags = ["--dataset", "imagenet", "--arch"]
    assert main([str(source), str(target), *flags, "torchvision/resnet18"]) == 2
    assert "not the weights of --arch torchvision/resnet18" in capsys.readouterr().err
    assert main([str(source), str(target), *flags, "torchvision/mobilenet_v3_small"]) == 0
    network, info = restore_splitnet(load_checkpoint(target))
    assert equal(network.models[0].state_dict(), theirs.state_dict())
    assert (info.archs, info.num_classes, info.dataset) == (("torchvision/mobilenet_v3_small",), 4, "imagenet")


def test_refusals(ours, tmp_path, capsys):
    _, path = ours
    target = tmp_path / "out.safetensors"
    assert main([str(path), str(path)]) == 2
    assert main([str(tmp_path / "none.pth"), str(target)]) == 2
    assert "does not exist" in capsys.readouterr().err

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"state_dict": Evil()}))
    assert main([str(tmp_path / "evil.pth"), str(target)]) == 2
    assert not (tmp_path / "ran").exists()

    assert main([str(path), str(target)]) == 0
    data = target.read_bytes()
    header = {"format": "pt", safe_tensors.HEADER: "[1]"}
    for damaged in (b"", data[:50], data[:-7], b"x" * 200, safetensors.save({"a": torch.zeros(1)}, metadata=header)):
        target.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged") as error:
            load_checkpoint(target)
        assert "\n" not in str(error.value)
    (tmp_path / "file").write_text("")
    assert main([str(path), str(tmp_path / "file" / "out.safetensors")]) == 1


def test_the_header_is_plain_json(ours, tmp_path):
    _, path = ours
    target = tmp_path / "out.safetensors"
    main([str(path), str(target)])
    size = int.from_bytes(target.read_bytes()[:8], "little")
    header = json.loads(target.read_bytes()[8 : 8 + size])
    assert json.loads(header["__metadata__"][safe_tensors.HEADER])["classes"][3] == "Ziffer 3 é"


def test_a_file_of_a_librarys_training_script(tmp_path, capsys):
    theirs = torchvision.models.resnet18(num_classes=5)
    path, target = tmp_path / "checkpoint.pth.tar", tmp_path / "ours.pth.tar"
    torch.save({"epoch": 9, "arch": "resnet18", "state_dict": published_keys(theirs.state_dict())}, path)
    argv = [str(path), str(target), "--arch", "torchvision/resnet18", "--dataset"]
    assert main([*argv, "imagenette"]) == 2
    assert "--dataset 'imagenette' is not a known data set" in capsys.readouterr().err
    assert main([*argv, "imagenet"]) == 0
    assert load_checkpoint(target)["arch"] == "torchvision/resnet18"
    restored, _ = restore_splitnet(load_checkpoint(target))
    assert torch.equal(restored.models[0].fc.weight, theirs.fc.weight)


def test_a_folder_for_the_hub(ours, tmp_path):
    content, path = ours
    assert main([str(path), str(tmp_path / "hub")]) == 0
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert (config["networks"], config["num_classes"], config["architecture"]) == (2, 10, "resnet20")
    assert config["label_names"] == content["classes"]
    assert config["preprocessing"] == content["preprocessing"]
    loaded, before = load(tmp_path / "hub"), load(path)
    images_BCHW = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.network(images_BCHW), before.network(images_BCHW))
    assert loaded.preprocessing == before.preprocessing


def test_timm_reads_one_network_of_its_own(tmp_path):
    timm = pytest.importorskip("timm")
    network = timm.create_model("resnet10t", num_classes=4)
    content = {
        "arch": "timm/resnet10t",
        "state_dict": {f"module.models.0.{name}": value for name, value in network.state_dict().items()},
        "config": {"arch": "timm/resnet10t", "split_factor": 1, "dataset": "folder"},
        "classes": ["a", "b", "c", "d"],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.2, 0.2, 0.2],
        "crop_size": 96,
        "preprocessing": Preprocessing(
            resize=109, interpolation="bilinear", crop=96, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)
        ).as_dict(),
    }
    torch.save(content, tmp_path / "one.pth.tar")
    assert main([str(tmp_path / "one.pth.tar"), str(tmp_path / "hub")]) == 0
    theirs = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    images_BCHW = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        torch.testing.assert_close(theirs(images_BCHW), network.eval()(images_BCHW), rtol=0, atol=1e-6)
        torch.testing.assert_close(load(tmp_path / "hub").network(images_BCHW)[0], theirs(images_BCHW))
    assert theirs.pretrained_cfg["mean"] == [0.5, 0.5, 0.5]
    assert theirs.pretrained_cfg["crop_pct"] == pytest.approx(96 / 109)
