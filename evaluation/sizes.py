"""--is_summary: parameters and MACs of what flags stand for, without data."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from method import methods
from method.costs import training_macs, training_params
from model import build_splitnet, network_requests
from model.division.plan import solver_plan
from model.summary import format_table, network_sizes
from parser_params import Config, resolve_config
from recipe.datasets import ROWS, row_for
from record.checkpoint import write_file
from record.run_folder import HPARAMS, RESULTS, as_json, make_folder
from utils.errors import UserError
from utils.program import show


def summarise(config: Config) -> dict[str, Any]:
    """Count what `config` stands for, show it as a table, and keep it in results.json of a --model_dir that was given.

    The results of a training run in that folder are left alone.

    Raises:
        UserError: a network that cannot be built, or a data set whose number of classes only --num_classes can say.
    """
    num_classes = ROWS[config.dataset].num_classes if config.dataset in ROWS else config.num_classes
    if num_classes is None:
        raise UserError(
            f"--is_summary opens no data, and --dataset {config.dataset} has any number of classes: add --num_classes."
        )
    if config.num_classes not in (None, num_classes):
        raise UserError(f"--num_classes {config.num_classes}: --dataset {config.dataset} has {num_classes} classes.")
    recipe = row_for(config.dataset, config.crop_size)
    config = resolve_config(config, data_recipe=recipe, crop_size=config.crop_size)
    request = config.backbone_request(num_classes)
    kind = methods.get(config.method)
    names = kind.backbone_names(config.arch, config.method_options)
    request = replace(request, form=kind.member_form(config.method_options, request, config.seed or 0))
    structure: dict[str, Any] = {
        "train_separately": config.is_train_sep,
        "archs": names if len(names) > 1 else None,
    }
    request = replace(request, arch=names[0])
    requests = network_requests(request, **structure)
    with torch.device("meta"):
        network = build_splitnet(request, seed=0, **structure)
    method = kind(network, config.method_options)
    result: dict[str, Any] = {
        "arch": config.arch,
        "dataset": config.dataset,
        "split_factor": config.split_factor if len(names) == 1 else len(names),
        "num_classes": num_classes,
        "crop": config.crop_size,
        **network_sizes(requests),
        "params_training": training_params(method),
        "macs_training": training_macs(method, config.crop_size),
    }
    show(_training_line(result))
    show(format_table([result]))
    plan = solver_plan(requests[0])
    if plan is not None:
        result["division"] = plan.as_dict()
        show(plan.table())
    folder = Path(config.model_dir)
    if "model_dir" in config.given and not (folder / HPARAMS).exists():
        make_folder(folder)
        write_file(folder / RESULTS, as_json(result))
    return result


def _training_line(result: dict[str, Any]) -> str:
    """What training costs beside what is deployed."""
    macs = result["macs_training"]
    shown = "not known" if macs is None else f"{macs / 1e6:.2f} M"
    return f"in training: {result['params_training'] / 1e6:.3f} M parameters more, {shown} MACs an image (forward)"
