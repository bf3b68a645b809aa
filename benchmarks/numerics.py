"""How far ways of running the same training drift apart: every case trains the same steps from the same weights.

In float64 they agree to rounding (the tests ask for 1e-12); here in the precision that is used.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import own
from benchmarks.report import failure, release
from utils.command_line import at_least
from utils.errors import RunError, reason
from utils.plain_json import plain_json


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark beside the common ones."""
    parser.add_argument("--arch", default="resnet20", help="backbone (default resnet20)")
    parser.add_argument("--batch_size", type=at_least(1), default=128, help="images (default 128)")
    parser.add_argument("--steps", type=at_least(1), default=200, help="training steps (default 200)")
    parser.add_argument("--most", type=float, help="met: weights at most so far apart, relative to the first case's")
    parser.add_argument(
        "--most_drift", type=float, help="met: the mean loss of the last 20 steps drifts at most so far"
    )
    parser.add_argument("--cases", help="comma list; the first is what the others are compared with (default: all)")


def run(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Train with each case and compare the losses and the final weights with the first case's.

    Raises:
        UserError: a case or an architecture that does not exist.
        RunError: the first case fails; another one's row says why it does.
    """
    names = own.chosen_cases(options.cases, device)
    subject = f"{options.steps} steps of {options.arch} S={options.split_factor}, batch {options.batch_size}"
    first: Trained | None = None
    for name in names:
        error = ""
        try:
            found = _trained(name, options, device)
        except RuntimeError as caught:
            error = reason(caught)[:300]
        release(device)
        if error and first is None:
            raise RunError(f"{name}: {error}")
        if error:
            yield failure(None, subject, name, own.case_dtype(name), error)
            continue
        first = first or found
        drift = float((found.losses_T[-20:].mean() / first.losses_T[-20:].mean() - 1).abs())
        distance = float((found.weights_P - first.weights_P).norm() / first.weights_P.norm())
        limits = ((distance, options.most), (drift, options.most_drift))
        verdict = [value <= limit for value, limit in limits if limit is not None]
        yield plain_json(
            {
                "goal": None,
                "subject": subject,
                "case": name,
                "baseline": names[0],
                "dtype": own.case_dtype(name),
                "loss_first": float(found.losses_T[0]),
                "loss_last": float(found.losses_T[-20:].mean()),
                "loss_drift_first_step": float((found.losses_T[0] / first.losses_T[0] - 1).abs()),
                "loss_drift_last_20": drift,
                "weight_distance": distance,
            }
            | ({"met": all(verdict)} if verdict else {})
        )


class Trained(NamedTuple):
    """What a case has come to: the loss of each of T steps, and all P weights, in float64 on the CPU."""

    losses_T: torch.Tensor
    weights_P: torch.Tensor


def _trained(name: str, options: argparse.Namespace, device: torch.device) -> Trained:
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--arch", options.arch, "--split_factor", str(options.split_factor), "--workers", "0"]
        flags += ["--batch_size", str(options.batch_size), "--print_freq", "1", *own.case_flags(name)]
        steps = str(options.steps)
        trainer = own.open_trainer([*flags, "--max_steps", steps, "--epochs", steps], Path(folder), device)
        losses = []
        while not trainer.has_ended():
            trainer.method.train()
            for batch in trainer.loader.epoch(trainer.position.epoch):
                metrics = trainer.training_step(batch, trainer.progress(batch))
                trainer.advance(batch, metrics)
                losses.append(float(metrics["loss"]))
                if trainer.has_ended():
                    break
            trainer.position.epoch, trainer.position.batch = trainer.position.epoch + 1, 0
        parameters = [p.detach().double().flatten().cpu() for p in trainer.network.parameters()]
    return Trained(torch.tensor(losses, dtype=torch.float64), torch.cat(parameters))


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table; drifts are relative to the first case."""
    lines = [
        "| subject | case | first loss | mean of last 20 | drift at first | drift of last 20 | weights apart |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['subject']} | {row['case']} | failed: {row['error']} | | | | |")
            continue
        drifts = (f"{row[name]:.1e}" for name in ("loss_drift_first_step", "loss_drift_last_20", "weight_distance"))
        cells = (row["subject"], row["case"], f"{row['loss_first']:.4f}", f"{row['loss_last']:.4f}", *drifts)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
