"""The recipe of transformers: what it supplies, to which networks, and what wins over it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from model import BackboneRequest, build_splitnet, solved_request
from model.library import rates_of
from model.mixing import mixes_tokens
from parser_params import Config, parse_config, resolve_config
from training.optim import parameter_groups
from training.options import OptimizerOptions
from utils.errors import UserError

timm = pytest.importorskip("timm")

VIT = "timm/vit_tiny_patch16_224"


def resolved(*argv: object, data: str = "imagenet", nodes: int = 1, **changes: Any) -> Config:
    config = parse_config(["--dataset", data, "--arch", VIT, *map(str, argv)])
    return resolve_config(config, data_recipe=data, nodes=nodes, **changes)


def test_what_it_supplies_and_who_says_so() -> None:
    config = resolved("--split_factor", 4)
    assert (config.optimizer, config.optimizer_eps, config.no_decay) == ("AdamW", 1e-8, "one_dimensional")
    assert (config.lr, config.batch_size) == (1e-3 * 256 / 1024, 256)
    assert config.weight_decay == 0.05  # not divided by S
    assert (config.lr_mode, config.slow_start_lr, config.end_lr, config.slow_start_epochs) == ("cos", 1e-6, 1e-5, 8)
    assert (config.is_mixup, config.mix_alpha, config.cutmix_alpha, config.mix_switch_prob) == (True, 0.8, 1.0, 0.5)
    assert (config.randaa, config.is_autoaugment, config.is_label_smoothing) == ("rand-m9-mstd0.5", False, True)
    assert (config.is_cutout, config.erase_p, config.erase_mode) == (True, 0.25, "pixel")
    assert (config.clip_grad, config.values()["drop_path"]) == (None, 0.1)
    for name in ("lr", "weight_decay", "erase_p", "drop_path"):
        assert config.origins[name] == "recipe: transformers"


def test_a_warm_up_of_a_fifteenth_and_the_rate_of_the_batch() -> None:
    config = resolved("--epochs", 300, "--batch_size", 1024)
    assert (config.slow_start_epochs, config.lr) == (20, pytest.approx(1e-3))
    assert "scaled to 0.001" in config.warnings[0]
    assert resolved("--batch_size", 512, "--is_linear_lr", 1).lr == pytest.approx(1e-3 * 512 / 1024)
    assert resolved(nodes=4).lr == pytest.approx(1e-3)


def test_flags_win() -> None:
    config = resolved("--lr", 0.3, "--is_mixup", 0, "--is_div_wd", 1, "--split_factor", 2, "--drop_path", 0.0)
    assert (config.lr, config.is_mixup, config.values()["drop_path"]) == (0.3, False, 0.0)
    assert config.weight_decay == pytest.approx(0.05 * 0.6065, rel=1e-3)
    other = resolved("--optimizer", "SGD")
    assert (other.optimizer, other.lr, other.weight_decay, other.no_decay) == ("SGD", 0.1, 1e-4, "bias")


def test_small_images_are_not_erased_and_digits_keep_their_views() -> None:
    small, digits = resolved(data="cifar10"), resolved(data="digits")
    assert (small.is_cutout, small.randaa, small.is_mixup, small.optimizer) == (False, "rand-m9-mstd0.5", True, "AdamW")
    assert (digits.randaa, digits.is_mixup, digits.is_label_smoothing) == (None, False, False)
    assert (digits.optimizer, digits.lr) == ("AdamW", pytest.approx(1e-3 * 64 / 1024))


def test_images_of_imagenet_have_the_networks_own_size() -> None:
    sizes = {"timm/swinv2_tiny_window8_256": 256, "timm/maxvit_pico_rw_256": 256, "torchvision/efficientnet_b1": 224}
    assert {arch: resolved("--arch", arch).crop_size for arch in sizes} == sizes
    dino = "timm/vit_small_patch14_dinov2"
    given = resolved("--arch", dino, "--crop_size", 224)
    assert [given.crop_size, resolved("--arch", dino).crop_size] == [224, 518]
    # small images keep their own, and so does a run that goes on
    assert [resolved("--arch", dino, data="cifar10").crop_size, resolved("--arch", dino, began_at=224).crop_size] == [
        32,
        224,
    ]


def test_swin_clips_and_keeps_its_own_stochastic_depth() -> None:
    config = resolved("--arch", "timm/swin_tiny_patch4_window7_224")
    assert (config.clip_grad, config.values()["drop_path"]) == (5.0, None)
    assert "drop_path" not in config.origins or config.origins["drop_path"] == "default"


@pytest.mark.parametrize("arch", ["timm/levit_128", "torchvision/convnext_tiny", "timm/resnet18", "resnet50"])
def test_others_train_as_before(arch: str) -> None:
    config = resolved("--arch", arch)
    assert (config.optimizer, config.no_decay, config.values()["drop_path"]) == ("SGD", "bias", None)


def test_a_run_from_before_goes_on_as_it_began_and_methods_keep_their_epochs() -> None:
    before = resolved(by_network=False)
    assert (before.optimizer, before.lr, before.values()["drop_path"]) == ("SGD", 0.1, None)
    mutual = resolved("--method", "dks", data="cifar10")
    assert (mutual.optimizer, mutual.values()["is_wd_all"], mutual.no_decay) == ("AdamW", False, "one_dimensional")


def test_a_network_of_a_user_s_own_is_not_run_to_find_out(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text("raise SystemExit('run')")
    assert resolved("--arch", f"{tmp_path}/nets.py:small", data="cifar10").optimizer == "SGD"


def test_which_networks_mix_tokens() -> None:
    class Heads(nn.Module):
        num_heads = 3

    assert mixes_tokens(nn.Sequential(nn.Linear(2, 2), Heads()))
    assert not mixes_tokens(nn.Sequential(nn.BatchNorm2d(2), Heads()))
    assert not mixes_tokens(nn.Sequential(nn.Conv2d(3, 2, 1)))
    with torch.device("meta"):
        assert mixes_tokens(timm.create_model("mixer_s32_224"))
        assert not mixes_tokens(timm.create_model("nf_resnet26"))


def test_what_is_not_decayed() -> None:
    with torch.device("meta"):
        network = nn.Sequential(timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32, patch_size=8))
    groups = parameter_groups(network, network.named_parameters(), OptimizerOptions(no_decay="one_dimensional"))
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    decayed, spared = ({names[id(parameter)] for parameter in group["params"]} for group in groups)
    assert {"0.pos_embed", "0.cls_token"} <= spared  # by the network's own word
    assert spared == {n for n, p in network.named_parameters() if p.dim() <= 1} | {"0.pos_embed", "0.cls_token"}
    assert "0.blocks.0.attn.qkv.weight" in decayed


def test_drop_path_is_divided_like_every_rate() -> None:
    values = {"arch": VIT, "num_classes": 3, "crop_size": 32, "dataset": "cifar10", "options": {"drop_path": 0.2}}
    with torch.device("meta"):
        for split_factor in (1, 4):
            request = solved_request(BackboneRequest(**values, split_factor=split_factor))
            network = build_splitnet(request, seed=0, train_separately=True).models[0]
            rates = [rate for (name, attribute), rate in rates_of(network).items() if attribute == "drop_prob"]
            assert max(rates) == pytest.approx(0.2 / split_factor**0.5)
        for arch, split_factor in (("torchvision/vit_b_32", 1), ("timm/convnext_atto", 2)):
            request = BackboneRequest(**(values | {"arch": arch, "split_factor": split_factor, "crop_size": 224}))
            with pytest.raises(UserError, match=rf"--drop_path.*--arch {arch}.*Leave the flag away"):
                build_splitnet(request, seed=0, train_separately=True)
