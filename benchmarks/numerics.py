"""How far ways of running the same training drift apart: every case trains the same steps from the same weights.

In float64 they agree to rounding (the tests ask for 1e-12); here in the precision that is used.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import own
from utils.command_line import at_least
from utils.plain_json import plain_json


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark beside the common ones."""
    parser.add_argument("--arch", default="resnet20", help="backbone (default resnet20)")
    parser.add_argument("--batch_size", type=at_least(1), default=128, help="images (default 128)")
    parser.add_argument("--steps", type=at_least(1), default=200, help="training steps (default 200)")
    parser.add_argument("--cases", help="comma list; the first is what the others are compared with (default: all)")


def run(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Train with each case and compare the losses and the final weights with the first case's.

    Raises:
        UserError: a case or an architecture that does not exist.
    """
    names = options.cases.split(",") if options.cases else own.default_cases(device)
    subject = f"{options.steps} steps of {options.arch} S={options.split_factor}, batch {options.batch_size}"
    losses: dict[str, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--arch", options.arch, "--split_factor", str(options.split_factor), "--workers", "0"]
            flags += ["--batch_size", str(options.batch_size), "--print_freq", "1", *own.case_flags(name)]
            steps = str(options.steps)
            trainer = own.open_trainer([*flags, "--max_steps", steps, "--epochs", steps], Path(folder), device)
            found = []
            while not trainer.has_ended():
                trainer.method.train()
                for batch in trainer.loader.epoch(trainer.position.epoch):
                    metrics = trainer.training_step(batch, trainer.progress(batch))
                    trainer.advance(batch, metrics)
                    found.append(float(metrics["loss"]))
                    if trainer.has_ended():
                        break
                trainer.position.epoch, trainer.position.batch = trainer.position.epoch + 1, 0
            losses[name] = torch.tensor(found, dtype=torch.float64)
            parameters = [p.detach().double().flatten().cpu() for p in trainer.network.parameters()]
            weights[name] = torch.cat(parameters)
    first = names[0]
    return [
        plain_json(
            {
                "goal": None,
                "subject": subject,
                "case": name,
                "baseline": first,
                "dtype": own.case_dtype(name),
                "loss_first": float(losses[name][0]),
                "loss_last": float(losses[name][-20:].mean()),
                "loss_drift_first_step": float((losses[name][0] - losses[first][0]).abs() / losses[first][0].abs()),
                "loss_drift_last_20": float((losses[name][-20:].mean() / losses[first][-20:].mean() - 1).abs()),
                "weight_distance": float((weights[name] - weights[first]).norm() / weights[first].norm()),
            }
        )
        for name in names
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table; drifts are relative to the first case."""
    lines = [
        "| subject | case | first loss | mean of last 20 | drift at first | drift of last 20 | weights apart |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        drifts = (f"{row[name]:.1e}" for name in ("loss_drift_first_step", "loss_drift_last_20", "weight_distance"))
        cells = (row["subject"], row["case"], f"{row['loss_first']:.4f}", f"{row['loss_last']:.4f}", *drifts)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
