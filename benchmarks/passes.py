"""Operations that the host issues for a training step, an evaluation batch and an inference batch of small batches.

As torch's dispatcher sees them: one of a list of tensors, or a fused one, is one; views, and memory that is only
reserved, are none. On a GPU each is a launch, or a few where a list is long. They do not depend on the batch size.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks import own
from benchmarks.counts import FREE
from benchmarks.dispatched import CountedOperations
from evaluation.contenders import Contender, candidates_of
from evaluation.counts import EvaluationCounts
from record.tables import markdown_table
from train_split import Trainer
from utils.errors import UserError
from utils.precision import autocast

NETWORKS = "resnet110:1,resnet110:2,resnet110:4,wide_resnet28_10:1,wide_resnet28_10:2,wide_resnet28_10:4"
NETWORKS += ",efficientnetb0:2"
OPTIMIZERS = {"efficientnetb0": "RMSpropTF"}  # of the published recipes, where it is not SGD
SETTLED = 3  # passes after which nothing is made for the first time any more


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark beside the common ones."""
    parser.add_argument("--networks", default=NETWORKS, help="comma list of ARCH:S (default: seven)")
    parser.add_argument("--case", default="bf16+loop", help="precision and execution (default bf16+loop)")


def run(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Count for every network.

    Raises:
        UserError: a network, an architecture or a case that does not exist.
    """
    for name in options.networks.split(","):
        arch, _, factor = name.partition(":")
        if not factor.isdecimal():
            raise UserError(f"--networks {name}: expected ARCH:S, as resnet110:4.")
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            flags = ["--arch", arch, "--split_factor", factor, "--batch_size", "2", "--workers", "0"]
            flags += ["--optimizer", OPTIMIZERS.get(arch, "SGD"), *own.case_flags(options.case)]
            trainer = own.open_trainer(flags, Path(folder), device)
            own.close_with(stack, trainer)
            counts = {
                "training step": dispatched(own.training_step(trainer)),
                "evaluation batch": _of_evaluation(trainer),
                "inference batch": _of_inference(trainer),
            }
        for what, operations in counts.items():
            yield {
                "goal": None,
                "subject": f"{what} of {arch} S={factor}",
                "case": options.case,
                "dtype": own.case_dtype(options.case),
                "operations": operations,
                "ratio": None,
                "memory_mib": None,
            }


def dispatched(call: Callable[[], object]) -> int:
    """Operations of a call, once it has settled."""
    for _ in range(SETTLED):
        call()
    with CountedOperations() as counted:
        call()
    return sum(number for operation, number in counted.calls.items() if operation.name().partition(".")[0] not in FREE)


def _of_evaluation(trainer: Trainer) -> int:
    """Of a batch in the middle: with autocast around all of them, weights are cast in the first."""
    trainer.method.eval()
    batch = next(iter(trainer.loader.epoch(0)))
    precision, views = trainer.precision, trainer.training_step.views
    counts = EvaluationCounts(trainer.num_networks, len(trainer.source.classes), "mean_logits", trainer.world.device)

    def call() -> None:
        images = views.evaluate(batch.images, precision.weights, memory_format=precision.memory_format)
        counts.update(trainer.network(images), batch.labels_B)

    with torch.no_grad(), autocast(trainer.world.device, precision.autocast):
        return dispatched(call)


def _of_inference(trainer: Trainer) -> int:
    precision = trainer.precision
    shape = (2, 3, trainer.config.crop_size, trainer.config.crop_size)
    images = torch.zeros(shape, device=trainer.world.device, dtype=precision.autocast or precision.weights)
    (candidate, *_) = candidates_of(Contender("ensemble", trainer.network.eval(), None), images, precision, ("loop",))

    @torch.no_grad()  # in inference mode, the dispatcher would not see what operations are made of
    def call() -> None:
        with autocast(trainer.world.device, precision.autocast):
            candidate.forward(images)

    return dispatched(call)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    cells = [(row["subject"], row["case"], f"{row['operations']:,}") for row in rows]
    return markdown_table(("subject", "case", "operations"), (False, False, True), [cells])
