"""Convert a checkpoint to ours or to safetensors: `python script/convert_checkpoint.py IN OUT [--arch NAME]`.

IN is ours, a published one, safetensors, or the plain state dict of one torchvision or timm network; what OUT is, its
name says: *.safetensors; without an ending a folder with model.safetensors and config.json, the layout of the Hugging
Face hub, which timm reads where it is one network of timm's (`local-dir:OUT`); else a checkpoint of ours. The networks
and what eval.py needs to know of them are kept; the state of the run (optimiser, sampler) is not.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, Python looks in script/ only

from dataset import sources
from model.restore import PUBLISHED_PREFIX, NetworkInfo, network_state, published_keys, restore_splitnet
from record import safe_tensors
from record.checkpoint import FORMAT_VERSION, load_checkpoint, save_checkpoint, write_file
from utils.command_line import OneLineParser
from utils.errors import RunError, UserError, reason
from utils.text import fit_streams

# of a checkpoint of ours: what says which networks these are, and what they were trained on
CONFIG = "config.json"
LONE = f"{PUBLISHED_PREFIX}models.0."
KEPT = (
    *("epoch", "arch", "widths", "way", "width_names", "library", "form", "best_acc1", "config", "classes", "mean"),
    *("codes", "std", "crop_size", "data_recipe"),
    "preprocessing",
)


def hub_config(info: NetworkInfo, content: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the Hugging Face hub's layout: for one network with timm's keys, for all with ours beside them."""
    config: dict[str, Any] = {
        "architecture": info.archs[0].removeprefix("timm/"),
        "num_classes": info.num_classes,
        "networks": info.num_networks,
        "archs": list(info.archs),
        "split_factor": info.split_factor,
    }
    if info.classes is not None:
        config["label_names"] = list(info.classes)
    steps = info.preprocessing
    if steps is not None:
        config["preprocessing"] = steps.as_dict()
        config["pretrained_cfg"] = {
            "input_size": [3, steps.crop, steps.crop],
            "interpolation": steps.interpolation,
            "crop_pct": steps.crop / steps.resize,
            "crop_mode": "center",
            "mean": list(steps.mean),
            "std": list(steps.std),
            "num_classes": info.num_classes,
        }
    return config


def convert(
    source: Path, target: Path, *, arch: str | None = None, split_factor: int | None = None, dataset: str | None = None
) -> dict[str, Any]:
    """Write `target` from `source`; a name without an ending is a folder in the hub's layout. Returns what was written.

    Args:
        source, target: the files.
        arch, split_factor, dataset: what the source does not say.

    Raises:
        UserError: the source is no checkpoint of these networks, there is no such data set, or the target is the
            source.
        RunError: the target cannot be written.
    """
    if source.resolve() == target.resolve():
        raise UserError(f"{target}: is the file that is read; name another one to write.")
    if dataset is not None:
        sources.get(dataset)
    content = load_checkpoint(source, "IN")
    _, info = restore_splitnet(
        content, arch=arch, split_factor=split_factor, dataset=dataset, weights="raw", source=f"IN {source}"
    )
    state, _ = network_state(content, "raw", f"IN {source}")
    written = {key: content[key] for key in KEPT if key in content}
    config = written.get("config") or {}
    named = {"arch": ",".join(info.archs), "split_factor": info.split_factor, "dataset": info.dataset}
    written["config"] = {**named, **config}
    # a library's training script wrote the name without the library's
    written["arch"] = written["config"]["arch"]
    written["format_version"] = FORMAT_VERSION
    if isinstance(written.get("best_acc1"), Tensor):
        written["best_acc1"] = float(written["best_acc1"])
    written["state_dict"] = published_keys(state)
    if content.get("ema"):
        written["ema"] = published_keys(network_state(content, "ema", f"IN {source}")[0])
    is_folder = not target.suffix or target.is_dir()
    if is_folder and info.num_networks == 1:  # under the names of the network's own library, whose readers take them
        for key in ("state_dict", "ema"):
            if key in written:
                written[key] = {name.removeprefix(LONE): value for name, value in written[key].items()}
    try:
        (target if is_folder else target.parent).mkdir(parents=True, exist_ok=True)
        if is_folder:
            save_checkpoint(written, target / safe_tensors.MODEL)
            write_file(target / CONFIG, json.dumps(hub_config(info, written), indent=2) + "\n")
        else:
            save_checkpoint(written, target)
    except OSError as error:
        raise RunError(f"{target}: cannot be written: {reason(error)}.") from None
    return written


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    fit_streams()
    parser = OneLineParser(prog="python script/convert_checkpoint.py", description=__doc__)
    parser.add_argument("source", metavar="IN", type=Path)
    parser.add_argument(
        "target",
        metavar="OUT",
        type=Path,
        help="*.safetensors; a folder for model.safetensors and config.json; or any other name for ours",
    )
    parser.add_argument("--arch", help="backbone, where IN does not say it (torchvision/resnet50)")
    parser.add_argument("--split_factor", type=int, metavar="S", help="where IN does not say it")
    parser.add_argument("--dataset", help="what the networks were trained on, where IN does not say it")
    given = parser.parse_args(argv)
    try:
        written = convert(
            given.source, given.target, arch=given.arch, split_factor=given.split_factor, dataset=given.dataset
        )
    except (UserError, RunError) as error:
        print(f"convert_checkpoint.py: {error}", file=sys.stderr)
        return error.exit_code
    average = " and their moving average" if "ema" in written else ""
    print(f"{given.target}: {written['arch']}, {len(written['state_dict'])} tensors{average}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
