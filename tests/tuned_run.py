"""A run directory whose networks classify digits without having been trained: their classifiers are fitted by least
squares on the features of random networks, from the images that a run with --val_fraction would train on.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from dataset import DataSource, SourceRequest, open_source
from dataset.views import ViewMaker, plain_spec
from model import BackboneRequest, build_splitnet
from model.restore import published_keys
from model.splitnet import SplitNet
from model.staged import classifier_name
from record.checkpoint import FORMAT_VERSION, save_checkpoint

VAL_FRACTION, SEED = 0.3, 1
REQUEST = BackboneRequest(arch="resnet20", split_factor=2, num_classes=10, dataset="digits", crop_size=16)


def digits() -> DataSource:
    """The data as the run saw it: train, val and test."""
    return open_source(SourceRequest(dataset="digits", root=Path(), val_fraction=VAL_FRACTION, seed=SEED))


def prepared(images: torch.Tensor) -> torch.Tensor:
    source = digits()
    return ViewMaker(plain_spec(16, source.mean, source.std), seed=0).evaluate(images)


def fitted_network(split_factor: int = 2, images: int = 300) -> SplitNet:
    """Networks with fitted classifiers, each from other training images."""
    network = build_splitnet(dataclasses.replace(REQUEST, split_factor=split_factor), seed=1).eval()
    train = digits().train
    for i, one in enumerate(network.models):
        part = slice(i * images, (i + 1) * images)
        head = one.get_submodule(classifier_name(one))
        features: list[torch.Tensor] = []
        hook = head.register_forward_pre_hook(lambda _, inputs, kept=features: kept.append(inputs[0]))
        with torch.inference_mode():
            one(prepared(train.images[part]))
        hook.remove()
        found = torch.cat([features[0].clone(), torch.ones(len(features[0]), 1)], dim=1).double()
        targets = 8 * torch.nn.functional.one_hot(train.targets[part], 10).double()
        squares = found.T @ found
        solved = torch.linalg.solve(squares + 1e-6 * squares.trace() * torch.eye(len(squares)), found.T @ targets)
        with torch.no_grad():
            head.weight.copy_(solved[:-1].T)
            head.bias.copy_(solved[-1])
    return network


def content_of(network: SplitNet, **changed: Any) -> dict[str, Any]:
    """A checkpoint of the networks, as a run with --val_fraction writes it."""
    source = digits()
    config = {
        "arch": "resnet20",
        "split_factor": len(network.models),
        "dataset": "digits",
        "method": "co_training",
        "seed": SEED,
        "val_fraction": VAL_FRACTION,
    }
    return {
        "epoch": 1,
        "arch": "resnet20",
        "state_dict": published_keys(network.state_dict()),
        "best_acc1": 50.0,
        "optimizer": {"state": {}},
        "rng": {"seed": SEED},
        "config": config,
        "classes": list(source.classes),
        "mean": list(source.mean),
        "std": list(source.std),
        "crop_size": 16,
        "data_recipe": "digits",
        "held_out_sha256": source.held_out_sha256,
        "format_version": FORMAT_VERSION,
        **changed,
    }


def write_run(folder: Path, network: SplitNet, **changed: Any) -> Path:
    """The run's model_best.pth.tar."""
    path = folder / "model_best.pth.tar"
    save_checkpoint(content_of(network, **changed), path)
    (folder / "hparams_train.json").write_text("{}")
    return path
