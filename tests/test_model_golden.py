"""Every registered architecture against the published networks: sizes, state dicts and logits.

Rows and fixtures of architectures that are not registered are left out, so a new family is tested by being there.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model import BackboneRequest, backbones, build_network, build_splitnet, image_shape
from model.splitnet import SplitNet
from tests.golden.fill import fill, image
from utils.macs import count_macs, count_params

GOLDEN = Path(__file__).parent / "golden"
NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "svhn": 10, "imagenet": 1000}
OPTIONS_OF_VARIANT = {
    None: {},
    "official": {"is_official_densenet": True},
    "densenet3": {"is_official_densenet": False},
    "lightnet": {"is_lukemelas_efficientnet": False, "is_efficientnet_user_crop": True},
    "lukemelas": {"is_lukemelas_efficientnet": True, "is_efficientnet_user_crop": True},
}


def request_of(row: dict[str, Any], crop_size: int) -> BackboneRequest:
    """The request that builds the network of a row or a fixture."""
    return BackboneRequest(
        arch=row["arch"],
        split_factor=row["split_factor"],
        num_classes=NUM_CLASSES[row["dataset"]],
        shape=image_shape(row["dataset"], crop_size),
        dataset=row["dataset"],
        crop_size=crop_size,
        options=OPTIONS_OF_VARIANT[row.get("variant")],
    )


def is_registered(arch: str) -> bool:
    return arch in backbones


ROWS = [row for row in json.loads((GOLDEN / "params_macs.json").read_text()) if is_registered(row["arch"])]
FIXTURES = [
    path
    for path in sorted((GOLDEN / "checkpoints").glob("*.json.gz"))
    if is_registered(path.name.removesuffix(".json.gz").rsplit("_", 2)[0])
]


def row_id(row: dict[str, Any]) -> str:
    parts = (row["arch"], row.get("variant"), row["dataset"], row["crop"], f"s{row['split_factor']}")
    return "-".join(str(part) for part in parts if part is not None)


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_params_and_macs(row):
    with torch.device("meta"):
        network = build_network(request_of(row, row["crop"]))
    split_factor = row["split_factor"]
    assert count_params(network) == row["params_one"]
    assert count_params(network) * split_factor == row["params_total"]
    assert count_macs(network, (3, row["crop"], row["crop"])) * split_factor == row["macs_total"]
    assert sum(b.numel() for b in network.buffers() if b.dim() > 0) * split_factor == row["bn_buffers_total"]
    unused = network.unused_parameter_names() if hasattr(network, "unused_parameter_names") else set()
    unused_total = sum(network.get_parameter(name).numel() for name in unused) * split_factor
    assert row["params_total"] - unused_total == row.get("params_used_total", row["params_total"])


def published_state(network: SplitNet) -> list[list[Any]]:
    """[key, shape, dtype] of every entry, as a released file has them."""
    return [
        [f"module.{key}", list(value.shape), str(value.dtype).removeprefix("torch.")]
        for key, value in network.state_dict().items()
    ]


def fixture_of(path: Path) -> Any:
    name = path.name.removesuffix(".json.gz")
    return pytest.param(path, id=name, marks=pytest.mark.slow if name.endswith("_imagenet") else ())


@pytest.mark.parametrize("path", [fixture_of(path) for path in FIXTURES])
def test_released_checkpoint(path):
    golden = json.loads(gzip.decompress(path.read_bytes()))
    with torch.device("meta"):
        network = build_splitnet(request_of(golden, golden["image_size"]), seed=0)
    assert published_state(network) == golden["state"]

    contents = {
        key.removeprefix("module."): torch.from_numpy(fill(key, shape, golden["fill_rules"]))
        for key, shape, _ in golden["state"]
    }
    network.load_state_dict(contents, strict=True, assign=True)
    network.eval()
    images_BCHW = torch.from_numpy(image(golden["input_shape"], golden["input_key"]))
    abs_max = golden["logits_abs_max_f64"]

    with torch.inference_mode():
        logits_SBK = network(images_BCHW)
        assert_near(logits_SBK[..., :10], golden["logits_f32"], 1e-5 * abs_max)
        assert_near(logits_SBK.mean(0)[..., :10], golden["ensemble_f32"], 1e-5 * abs_max)

        logits_SBK = network.double()(images_BCHW.double())
    assert_near(logits_SBK[..., :10], golden["logits_f64"], 1e-8 * abs_max)
    assert_near(logits_SBK.mean(0)[..., :10], golden["ensemble_f64"], 1e-8 * abs_max)
    assert_near(logits_SBK.abs().max(), abs_max, 1e-8 * abs_max)
    torch.testing.assert_close(
        logits_SBK.norm(dim=-1), torch.tensor(golden["logits_l2_f64"], dtype=torch.float64), rtol=1e-8, atol=0
    )
    assert logits_SBK.argmax(-1).tolist() == golden["argmax_f64"]
    assert logits_SBK.mean(0).argmax(-1).tolist() == golden["ensemble_argmax_f64"]


def assert_near(actual: torch.Tensor, expected: Any, tolerance: float) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance)
