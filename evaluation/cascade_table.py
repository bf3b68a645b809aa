"""The cascade beside everything that it could be compared with: rows, cascade.csv, cascade.md. S networks, N images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evaluation.answers import Answers
from evaluation.calibration import binned
from evaluation.cascade import Stages, Walk, at_stage, leave_stages, sign_test, walk_of
from evaluation.conformal import wilson_interval


@dataclass(frozen=True, kw_only=True)
class Large:
    """The undivided network.

    Attributes:
        macs: for one image.
        logits_NK: of the reported images; None where no checkpoint of it was given.
    """

    macs: int
    logits_NK: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to answer.

    Attributes:
        kind: "network", "first", "ensemble", "undivided" or "cascade".
        networks: their numbers from 1, in the order in which they run.
        thresholds: of a cascade; a window has two numbers for each stage.
        held_out_acc1, held_out_macs: in percent and MACs on average, on the images of the fit; None where not known.
        test_acc1, test_macs: the same on the reported images.
        macs_share: of the full ensemble's.
        left_S: share of the images that leave after each network.
        right, images: counts on the reported images.
        lost, won: images that only the full ensemble, and that only this gets right.
        nll, ece: with the temperatures that were fitted for it, if any.
        chosen: whether it is the cascade that was chosen.
        note: "hindsight, not a choice" of the cheapest cascade at the undivided network's accuracy.
    """

    kind: str
    networks: tuple[int, ...]
    thresholds: tuple[float, ...] = ()
    held_out_acc1: float | None = None
    held_out_macs: float | None = None
    test_acc1: float
    test_macs: float
    macs_share: float
    left_S: tuple[float, ...]
    right: int
    images: int
    lost: int
    won: int
    nll: float
    ece: float
    chosen: bool = False
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for results.json."""
        low_high = wilson_interval(self.right, self.images) or []
        return {
            "kind": self.kind,
            "networks": list(self.networks),
            "thresholds": list(self.thresholds),
            "held_out_acc1": self.held_out_acc1,
            "held_out_macs": self.held_out_macs,
            "test_acc1": self.test_acc1,
            "test_acc1_interval": [100 * value for value in low_high],
            "test_macs": self.test_macs,
            "macs_share": self.macs_share,
            "left": list(self.left_S),
            "lost": self.lost,
            "won": self.won,
            "sign_test_p": sign_test(self.lost, self.won),
            "nll": self.nll,
            "ece": self.ece,
            "chosen": self.chosen,
            "note": self.note,
        }


class CascadeTable:
    """Every row, from stored logits.

    Args:
        answers: with a cascade.
        logits_SNK, labels_N: of the reported images.
        stages: of the cascade on them, with their labels.
        large: the undivided network, if there is one.

    Attributes:
        rows: networks, first networks, ensemble, undivided network, the curve, the chosen cascade.
    """

    def __init__(
        self, answers: Answers, logits_SNK: Tensor, labels_N: Tensor, stages: Stages, large: Large | None
    ) -> None:
        assert answers.cascade is not None
        self._answers, self._cascade, self._labels_N = answers, answers.cascade, labels_N
        self._macs = self._cascade.ordered_macs()
        self._total = sum(self._macs)
        self._order = tuple(s + 1 for s in self._cascade.order)
        self._stages = stages
        self._right_SN = self._stages.predictions_SN == labels_N
        self.rows = [*self._networks(logits_SNK), *self._first()]
        if large is not None and large.logits_NK is not None:
            self.rows.append(self._undivided(large, large.logits_NK))
        self.rows += self._cascades()
        self.rows = with_hindsight(self.rows)

    def _networks(self, logits_SNK: Tensor) -> list[Row]:
        fitted, held_out = self._answers.temperatures, self._cascade.held_out
        alone = held_out.get("networks_acc1") or []
        rows = []
        for s, one_NK in enumerate(logits_SNK):
            temperature = 1.0 if fitted is None else fitted.networks[s]
            macs = self._cascade.macs[s]
            rows.append(
                self._of_scores(
                    "network",
                    (s + 1,),
                    one_NK.double() / temperature,
                    macs,
                    held_out_acc1=alone[s] if s < len(alone) else None,
                )
            )
        return rows

    def _first(self) -> list[Row]:
        accuracies = self._cascade.held_out.get("stages_acc1") or []
        rows = []
        for k in range(1, len(self._order)):
            macs = sum(self._macs[: k + 1])
            kind = "first" if k < len(self._order) - 1 else "ensemble"
            stage_N = torch.full_like(self._labels_N, k)
            walk = walk_of(stage_N, self._right_SN, self._macs)
            known = accuracies[k] if k < len(accuracies) else None
            rows.append(self._row(kind, self._order[: k + 1], stage_N, walk, held_out=(known, macs)))
        return rows

    def _undivided(self, large: Large, logits_NK: Tensor) -> Row:
        return self._of_scores("undivided", (), logits_NK.double(), large.macs)

    def _of_scores(
        self, kind: str, networks: tuple[int, ...], scores_NK: Tensor, macs: int, held_out_acc1: float | None = None
    ) -> Row:
        log_probs_NK = scores_NK.log_softmax(dim=-1)
        right_N, full_N = log_probs_NK.argmax(dim=-1) == self._labels_N, self._right_SN[-1]
        images = len(right_N)
        return Row(
            kind=kind,
            networks=networks,
            held_out_acc1=held_out_acc1,
            held_out_macs=None if held_out_acc1 is None else float(macs),
            test_acc1=100 * float(right_N.double().mean()),
            test_macs=float(macs),
            macs_share=macs / self._total,
            left_S=(),
            right=int(right_N.sum()),
            images=images,
            lost=int((full_N & ~right_N).sum()),
            won=int((right_N & ~full_N).sum()),
            nll=-float(log_probs_NK.gather(1, self._labels_N[:, None]).mean()),
            ece=binned(log_probs_NK.amax(dim=-1).exp(), right_N).error(),
        )

    def _cascades(self) -> list[Row]:
        cascade, held_out = self._cascade, self._cascade.held_out
        chosen = tuple(bound for bounds in cascade.bounds for bound in bounds)
        rows = []
        for one in held_out.get("curve") or []:
            thresholds = tuple(one["thresholds"])
            if thresholds != chosen:
                stage_N = leave_stages(self._stages.confidence_SN, thresholds)
                rows.append(self._cascade_row(thresholds, stage_N, (one.get("acc1"), one.get("average_macs"))))
        stage_N = cascade.leave(self._stages.confidence_SN)
        known = (held_out.get("acc1"), held_out.get("average_macs"))
        rows.append(self._cascade_row(chosen, stage_N, known, chosen=True))
        return rows

    def _cascade_row(
        self,
        thresholds: tuple[float, ...],
        stage_N: Tensor,
        held_out: tuple[float | None, float | None],
        *,
        chosen: bool = False,
    ) -> Row:
        walk = walk_of(stage_N, self._right_SN, self._macs)
        return self._row("cascade", self._order, stage_N, walk, thresholds=thresholds, held_out=held_out, chosen=chosen)

    def _row(
        self,
        kind: str,
        networks: tuple[int, ...],
        stage_N: Tensor,
        walk: Walk,
        *,
        held_out: tuple[float | None, float | None],
        thresholds: tuple[float, ...] = (),
        chosen: bool = False,
    ) -> Row:
        images = len(stage_N)
        stages: Stages = self._stages
        assert stages.label_log_probs_SN is not None
        return Row(
            kind=kind,
            networks=networks,
            thresholds=thresholds,
            held_out_acc1=held_out[0],
            held_out_macs=held_out[1] if held_out[0] is not None else None,
            test_acc1=100 * walk.right / images,
            test_macs=walk.macs / images,
            macs_share=walk.macs / images / self._total,
            left_S=tuple(count / images for count in walk.left_S) if kind == "cascade" else (),
            right=walk.right,
            images=images,
            lost=walk.lost,
            won=walk.won,
            nll=-float(at_stage(stages.label_log_probs_SN, stage_N).mean()),
            ece=binned(at_stage(stages.max_prob_SN, stage_N), at_stage(self._right_SN, stage_N)).error(),
            chosen=chosen,
        )


def with_hindsight(rows: Sequence[Row]) -> list[Row]:
    """Mark the cheapest cascade that is as accurate on the reported images as the undivided network, if one is."""
    large = next((row for row in rows if row.kind == "undivided"), None)
    if large is None:
        return list(rows)
    level = [row for row in rows if row.kind == "cascade" and row.test_acc1 >= large.test_acc1]
    cheapest = min(level, key=lambda row: (row.test_macs, -row.test_acc1), default=None)
    note = "hindsight, not a choice"
    return [Row(**{**vars(row), "note": note}) if row is cheapest else row for row in rows]


def dominating(rows: Sequence[Row]) -> Row | None:
    """The cascade marked by `with_hindsight` where it also takes fewer MACs than the undivided network; else None."""
    large = next((row for row in rows if row.kind == "undivided"), None)
    marked = next((row for row in rows if row.note), None)
    return marked if large is not None and marked is not None and marked.test_macs < large.test_macs else None


def csv_rows(rows: Sequence[Row], num_networks: int) -> tuple[list[str], list[list[Any]]]:
    """(titles, rows) of cascade.csv."""
    left = [f"left_after_{k + 1}" for k in range(num_networks)]
    titles = [
        "kind",
        "networks",
        "thresholds",
        "held_out_acc1",
        "held_out_macs",
        "test_acc1",
        "test_macs",
        "macs_share",
    ]
    titles += [*left, "lost", "won", "nll", "ece", "chosen"]
    found = []
    for row in rows:
        shares: list[Any] = [*row.left_S] or [""] * num_networks
        found.append(
            [
                row.kind,
                "+".join(map(str, row.networks)),
                " ".join(f"{threshold:.12g}" for threshold in row.thresholds),
                "" if row.held_out_acc1 is None else row.held_out_acc1,
                "" if row.held_out_macs is None else row.held_out_macs,
                row.test_acc1,
                row.test_macs,
                row.macs_share,
                *shares,
                row.lost,
                row.won,
                row.nll,
                row.ece,
                int(row.chosen),
            ]
        )
    return titles, found


NAMES = {"network": "network", "first": "first", "ensemble": "full ensemble", "undivided": "undivided network"}


def row_name(row: Row) -> str:
    """What the row is, for reading."""
    numbers = "+".join(map(str, row.networks))
    if row.kind == "cascade":
        return "**chosen cascade**" if row.chosen else "cascade"
    return f"{NAMES[row.kind]} {numbers}".strip()


def markdown(rows: Sequence[Row], title: str) -> str:
    """cascade.md: the rows without the curve, with intervals and what was lost and won against the full ensemble."""
    lines = [
        title,
        "",
        "| | top-1 % (95 %) | held-out top-1 % | average MACs | of the ensemble's | lost / won | p | NLL | ECE "
        "| leaving after 1, 2, … |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        if row.kind == "cascade" and not row.chosen and not row.note:
            continue
        name = row_name(row) + (f" ({row.note})" if row.note else "")
        low, high = wilson_interval(row.right, row.images) or (0.0, 0.0)
        held_out = "–" if row.held_out_acc1 is None else f"{row.held_out_acc1:.2f}"
        left = " ".join(f"{share:.3f}" for share in row.left_S) or "–"
        lines.append(
            f"| {name} | {row.test_acc1:.2f} ({100 * low:.2f} to {100 * high:.2f}) | {held_out} | "
            f"{row.test_macs:,.0f} | {row.macs_share:.3f} | {row.lost} / {row.won} | "
            f"{sign_test(row.lost, row.won):.3f} | {row.nll:.4f} | {row.ece:.4f} | {left} |"
        )
    lines += [
        "",
        "Thresholds were chosen on held-out images; lost and won count reported images that only the full ensemble, "
        "and that only the row gets right; p is the exact sign test of the two. NLL and ECE are with the fitted "
        "temperatures, if any.",
    ]
    return "\n".join(lines)
