"""Plans of libraries' networks, one of a kind: what every plan must be, and what another process builds from it."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from model import BackboneRequest, backbones, build_network, solved_request
from model.division.arguments import LEFT_BEHIND, SHARE_LEFT, leaf_kind
from model.division.plan import division_plan
from model.library import Library
from model.staged import classifier_name
from utils.errors import UserError
from utils.macs import count_macs, count_params

pytest.importorskip("timm")

# widths of the networks that were divided by their channels before others were by their arguments
GOLDEN = json.loads((Path(__file__).parent / "golden" / "library_widths.json").read_text())["plans"]
QUICK = ("torchvision/resnet18 2", "torchvision/resnet18 4", "timm/lcnet_100 2")
# whole heads, widths, one factor, followed channels
PLANNED = (
    ("timm/vit_tiny_patch16_224", 2, "params"),
    ("timm/ecaresnet26t", 4, "params"),
    ("timm/mobilevitv2_050", 2, "params"),
    ("timm/hgnetv2_b0", 4, "params"),
    ("timm/vit_tiny_patch16_224", 4, "macs"),
    ("torchvision/squeezenet1_1", 2, "macs"),
)
# builds every request that it reads, with a solver that must not be asked, and prints the shapes
REBUILD = """
import json, sys, torch
import model.library
from model import BackboneRequest, build_network

def refuse(*args, **kwargs):
    raise AssertionError("solved again")

for name in ("divide", "Arguments", "solve_widths"):
    setattr(model.library, name, refuse)
for fields in json.load(sys.stdin):
    request = BackboneRequest(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    with torch.device("meta"):
        network = build_network(request)
    print(json.dumps({name: list(value.shape) for name, value in network.state_dict().items()}))
"""
# another size than the class's own
SIZES = {
    "timm/vit_small_patch14_dinov2": 224,
    "timm/swin_tiny_patch4_window7_224": 448,
    "timm/swinv2_tiny_window8_256": 192,
    "timm/maxvit_nano_rw_256": 192,
    "timm/convnext_atto": 192,
    "timm/mixer_s16_224": 192,
}


def request_for(arch: str, split_factor: int, crop_size: int | None = None, **changes: Any) -> BackboneRequest:
    side = crop_size or backbones.get(arch).crop_size or 224
    values = {"arch": arch, "split_factor": split_factor, "num_classes": 1000, "crop_size": side}
    return BackboneRequest(**(values | {"shape": "large", "dataset": "imagenet"} | changes))


def on_meta(request: BackboneRequest) -> nn.Module:
    with torch.device("meta"):
        return build_network(request)


def check_division(request: BackboneRequest, one: nn.Module, full: nn.Module) -> None:
    """The budget, the names of the undivided network, and every part narrower by about the same factor."""
    image, split_factor = (3, request.crop_size, request.crop_size), request.split_factor
    costs = [count_macs(n, image) if request.divide_by == "macs" else count_params(n) for n in (one, full)]
    assert split_factor * costs[0] == pytest.approx(costs[1], rel=0.02)
    assert [*one.state_dict()] == [*full.state_dict()]
    factor = split_factor**-0.5
    plan = division_plan(request)
    for name, width, before in zip(plan.stages, plan.widths, plan.widths_full, strict=True):
        if plan.way == "channels" or leaf_kind(name) in ("", "factor"):
            assert factor / 2 <= width / before <= 2 * factor or 1 < before <= 64
    whole = {name: value.numel() for name, value in full.named_parameters() if value.dim() > 1}
    counted = whole.keys() - {next(iter(whole)), f"{classifier_name(full)}.weight"}
    left = [n for name, n in sizes_of(one).items() if name in counted and n > LEFT_BEHIND * factor * whole[name]]
    assert sum(left) <= SHARE_LEFT * count_params(full)


def sizes_of(network: nn.Module) -> dict[str, int]:
    return {name: value.numel() for name, value in network.named_parameters()}


@pytest.mark.slow
def test_plans_keep_the_contract_and_another_process_builds_them_without_the_solver() -> None:
    requests, shapes = [], []
    for arch, split_factor, divide_by in PLANNED:
        request = solved_request(request_for(arch, split_factor, divide_by=divide_by))
        one = on_meta(request)
        check_division(request, one, on_meta(request_for(arch, 1)))
        requests.append(asdict(request))
        shapes.append({name: list(value.shape) for name, value in one.state_dict().items()})
    command = [sys.executable, "-c", REBUILD]
    built = subprocess.run(command, input=json.dumps(requests), capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert [json.loads(line) for line in built.stdout.splitlines()] == shapes


@pytest.mark.parametrize(
    "network", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in GOLDEN]
)
def test_widths_that_must_not_change(network: str) -> None:
    arch, split_factor = network.split()
    plan = division_plan(request_for(arch, int(split_factor)))
    assert (plan.way, [*plan.widths], plan.params_one, plan.macs_one) == ("channels", *GOLDEN[network])


def test_the_solver_finds_the_same_plan_twice() -> None:
    request = request_for("timm/ecaresnet26t", 2)
    first = division_plan(request)
    Library._plan.cache_clear()
    assert division_plan(request) == first


@pytest.mark.slow
@pytest.mark.parametrize("arch", SIZES)
def test_other_sizes_of_images(arch: str) -> None:
    side = SIZES[arch]
    request = solved_request(request_for(arch, 2, side, num_classes=10))
    assert not [name for name in request.width_names if name in ("patch_size", "window_size")]
    for one in (on_meta(request_for(arch, 1, side, num_classes=10)), on_meta(request)):
        assert one.eval()(torch.empty(2, 3, side, side, device="meta")).shape == (2, 10)


def test_a_size_that_a_class_refuses_is_named_with_one_that_it_takes() -> None:
    with pytest.raises(UserError, match=r"--crop_size 192: does not run: .*\. Sizes that it takes: 224\."):
        on_meta(request_for("torchvision/maxvit_t", 1, 192))
