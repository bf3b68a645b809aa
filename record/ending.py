"""What somebody at a terminal sees when a training has ended, in place of the line of JSON."""

from collections.abc import Mapping
from typing import Any

from record.epoch_line import duration


def format_ending(results: Mapping[str, Any]) -> str:
    """The last and the best epoch side by side, what was trained, and where it lies.

    Args:
        results: results.json of a training run, perhaps of an earlier version: what it lacks is left out.
    """
    last, best = results["last"], results["best"]
    titles = [f"epoch {max(one['epoch'], 1)}" for one in (last, best)]
    rows = [(f"{results['reported_on']} images", f"last, {titles[0]}", f"best, {titles[1]}")]
    several = len(last["acc1"]) > 1
    rows.append(("ensemble top-1 %" if several else "top-1 %", *_cells(last, best, "ensemble_acc1", 2)))
    for i in range(len(last["acc1"]) if several else 0):
        rows.append((f"network {i + 1} top-1 %", _number(last["acc1"][i], 2), _number(best["acc1"][i], 2)))
    for name in last["extra"]:
        rows.append((f"{name} top-1 %", _number(last["extra"][name], 2), _number(best["extra"].get(name), 2)))
    whole = "ensemble " if several else ""
    for title, name, digits in (
        (f"{whole}top-5 %", "ensemble_acc5", 2),
        (f"{whole}NLL", "ensemble_nll", 4),
        (f"{whole}ECE", "ensemble_ece", 4),
        (f"val {whole}top-1 %", "val_ensemble_acc1", 2),
        ("training loss, per network" if several else "training loss", "train_loss_per_network", 4),
    ):
        if name in last and name in best:
            rows.append((title, *_cells(last, best, name, digits)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{title:<{widths[0]}}  {a:>{widths[1]}}  {b:>{widths[2]}}" for title, a, b in rows]
    lines.insert(1, "-" * len(lines[0]))
    saved = results["best_saved_epoch"]
    lines += [
        "",
        f"best epoch chosen on the {results['best_chosen_on']} images",
        f"{results['params_total'] / 1e6:.3f} M parameters, {results['epochs']} epochs in "
        f"{duration(results['seconds'])}",
        f"results.json, curves.png{'' if saved is None else ', model_best.pth.tar'}: {results['model_dir']}",
    ]
    return "\n" + "\n".join(lines)


def _cells(last: Mapping[str, Any], best: Mapping[str, Any], name: str, digits: int) -> tuple[str, str]:
    return _number(last[name], digits), _number(best[name], digits)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
