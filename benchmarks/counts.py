"""What a training step asks of the host: operations issued, and times that the host waits for the device (G8).

Operations are those that compute or copy, forward, backward and update, as the profiler sees them; views of a tensor
and memory that is only reserved are left out. Waits are counted by `benchmarks.sync_audit`, with the making of the
views.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import baseline, own
from benchmarks.step import published_step
from benchmarks.sync_audit import SyncAudit
from dataset.augment.color import count_without_waiting
from record.tables import markdown_table
from utils.command_line import at_least

ROOT = Path(__file__).parent.parent
FREE = frozenset(
    f"aten::{name}"
    for name in (
        *("view", "_unsafe_view", "reshape", "as_strided", "t", "transpose", "permute", "expand", "expand_as", "slice"),
        *("select", "narrow", "squeeze", "unsqueeze", "unbind", "split", "chunk", "flatten", "unflatten", "alias"),
        *("detach", "detach_", "lift_fresh", "empty", "empty_like", "empty_strided", "result_type", "to", "resize_"),
        *(
            "view_as",
            "contiguous",
            "is_nonzero",
            "set_",
            "_reshape_alias",
            "resolve_conj",
            "resolve_neg",
            "movedim",
            "_has_compatible_shallow_copy_type",
        ),
    )
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark beside the common ones."""
    parser.add_argument("--arch", default="resnet110", help="backbone (default resnet110)")
    parser.add_argument("--batch_size", type=at_least(1), default=128, help="images (default 128)")
    parser.add_argument("--cases", default="fp32+loop", help="comma list such as bf16+stacked (default fp32+loop)")


def run(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Count for the published step and every case.

    Raises:
        UserError: a case or an architecture that does not exist.
    """
    subject = f"training step of {options.arch} S={options.split_factor}, batch {options.batch_size}"
    published = published_step(options, device)
    before, waits = count_operations(published), count_waits(published, device)
    forms = {"baseline_dtype": baseline.precision_name(device), "baseline_layout": "NCHW"}
    rows = [_row(subject, "published step", before, waits, None)]
    with tempfile.TemporaryDirectory() as folder:
        for i, case in enumerate(options.cases.split(",")):
            flags = ["--arch", options.arch, "--split_factor", str(options.split_factor), "--workers", "0"]
            flags += ["--batch_size", str(options.batch_size), *own.case_flags(case)]
            trainer = own.open_trainer(flags, Path(folder) / str(i), device)
            with_views = count_waits(own.training_step(trainer, ready_views=False), device)
            operations = count_operations(own.training_step(trainer))
            own_forms = {"dtype": own.case_dtype(case), "layout": own.layout(trainer)}
            rows.append(_row(subject, case, operations, with_views, before) | own_forms | forms)
    return rows


def _row(subject: str, case: str, operations: int, waits: list[str], before: int | None) -> dict[str, Any]:
    ratio = None if before is None else before / operations
    return {
        "goal": None if before is None else "G8",
        "subject": subject,
        "case": case,
        "baseline": None if before is None else "published step",
        "operations": operations,
        "ratio": ratio,
        "ratio_min": ratio,  # a count does not vary
        "ratio_max": ratio,
        "memory_mib": None,
        "host_waits": len(waits),
        "waits": waits,
        "commit": 0,
        "met": before is not None and not waits,
    }


def count_operations(step: Callable[[], object]) -> int:
    """Operations that one step issues, from every thread of autograd."""
    for _ in range(2):
        step()
    # one cycle, so acc_events changes no count: without it older versions of torch warn, of cycles that there are not
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded:
        step()
    events = recorded.events() or []
    return sum(
        event.name.startswith("aten::")
        and event.name not in FREE
        and not any(child.name.startswith("aten::") and child.name not in FREE for child in event.cpu_children)
        for event in events
    )


def count_waits(step: Callable[[], object], device: torch.device) -> list[str]:
    """Where one step makes the host wait for the device, or would on a GPU."""
    for _ in range(2):
        step()
    # on a CPU the views count by bincount, on a GPU by what does not wait: audit the latter
    with patch("torch.bincount", count_without_waiting), SyncAudit(device) as audit:
        step()
    return [line.replace(f"{ROOT}/", "") for line in audit.found]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    titles = ("goal", "subject", "case", "operations", "fewer than published", "host waits")
    cells = [
        (
            row["goal"] or "–",
            row["subject"],
            row["case"],
            f"{row['operations']:,}",
            "–" if row["ratio"] is None else f"{row['ratio']:.2f}×",
            str(row["host_waits"]),
        )
        for row in rows
    ]
    return markdown_table(titles, (False, False, False, True, True, True), [cells])
