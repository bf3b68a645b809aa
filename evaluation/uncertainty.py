"""The report of --uncertainty, --ood, --shift and --conformal: passes over further images, figures, files.

S networks, N images, K classes. A figure without a value is null in JSON and "–" in tables.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dataset import ImageSet
from dataset.source.corrupted import CorruptedSets, open_corrupted
from evaluation.answer_plots import plot_diversity, plot_ood, plot_risk_coverage, plot_shift
from evaluation.answers import Answers
from evaluation.calibration import binned, scores_of
from evaluation.cascade import Stages, at_stage
from evaluation.collecting import Logits, collect_logits
from evaluation.conformal import conformal_figures, conformal_sets
from evaluation.diversity import PAIRS, diversity_figures
from evaluation.files import written
from evaluation.foreign import fitted, open_foreign
from evaluation.ood import FIGURES, SCORES, ood_figures, ood_scores
from evaluation.selective import CONFIDENCES, confidence_of, curve_points, selective_figures
from evaluation.session import Session, class_names_and_statistics
from evaluation.shift import ALEXNET, Errors, mean_name, shift_figures
from evaluation.tuning import UNIFORM_TEST, cascade_scores, log_probs_of, uniform_of
from record.checkpoint import write_file
from record.tables import csv_table
from utils.plain_json import plain_json

SELECTIVE = ("aurc", "e_aurc", "augrc", "coverage_at_risk", "risk_at_coverage", "coverage_reached")


@dataclass(frozen=True, kw_only=True)
class Shifted:
    """What corrupted images gave: rows of (corruption, severity) with figures; errors in percent by both."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    errors: dict[str, dict[int, float]] = field(default_factory=dict)
    large_errors: dict[str, dict[int, float]] | None = None
    missing: list[str] = field(default_factory=list)
    has_arrays: bool = True


@dataclass(frozen=True, kw_only=True)
class Doubt:
    """What was seen of further images.

    Attributes:
        foreign: logits [S, N, K] of every set of --ood.
        shifted: of --shift; None without.
    """

    foreign: Mapping[str, Tensor]
    shifted: Shifted | None


def is_asked(session: Session, answers: Answers) -> bool:
    """Whether there is anything to report."""
    options = session.options
    return bool(options.uncertainty or options.ood or options.shift or answers.conformal)


@dataclass(frozen=True)
class FurtherImages:
    """The images of --ood and --shift, opened, so that wrong paths fail before any pass."""

    foreign: Mapping[str, ImageSet]
    corrupted: CorruptedSets | None

    @classmethod
    def open(cls, session: Session) -> "FurtherImages":
        """Raises UserError as `open_foreign` and `open_corrupted`."""
        options = session.options
        foreign = open_foreign(session) if options.ood else {}
        if options.shift is None:
            return cls(foreign, None)
        classes, _, _ = class_names_and_statistics(session)
        return cls(foreign, open_corrupted(Path(options.shift), classes))


def collect_doubt(
    session: Session, answers: Answers, mode: str, further: FurtherImages, large: Session | None
) -> Doubt:
    """Run the networks over the further images; every process takes part.

    Raises:
        UserError, RunError: as `collect_logits` and `CorruptedSets.images`.
    """
    foreign = {name: _run(session, images, f"--ood {name}").logits_SNK for name, images in further.foreign.items()}
    if further.corrupted is None:
        return Doubt(foreign=foreign, shifted=None)
    corrupted = further.corrupted
    shifted = Shifted(
        large_errors=None if large is None else {}, missing=corrupted.missing, has_arrays=corrupted.size is not None
    )
    for row in corrupted.rows:
        for severity, images in corrupted.images(row):
            what = f"--shift {row.name}/{severity}"
            logits = _run(session, _at_its_size(session, images), what)
            figures = shifted_figures(answers, mode, logits)
            shifted.rows.append({"corruption": row.name, "severity": severity, **figures})
            shifted.errors.setdefault(row.name, {})[severity] = 100 - figures["acc1"]
            if large is not None and shifted.large_errors is not None:
                found = _run(large, _at_its_size(large, images), f"{what}, undivided")
                wrong = found.logits_SNK[0].argmax(dim=-1) != found.labels_N
                shifted.large_errors.setdefault(row.name, {})[severity] = 100 * float(wrong.double().mean())
    return Doubt(foreign=foreign, shifted=shifted)


def _at_its_size(session: Session, images: ImageSet) -> ImageSet:
    """Arrays at the size of a session's networks; files are read at it."""
    return images if images.images is None else replace(fitted(session, images.images), targets=images.targets)


def _run(session: Session, images: ImageSet, what: str) -> Logits:
    _, mean, std = class_names_and_statistics(session)
    return collect_logits(session, images, recipe=session.file_recipe, mean=mean, std=std, what=what)


def shifted_figures(answers: Answers, mode: str, logits: Logits) -> dict[str, Any]:
    """Of one corruption and severity: the ensemble's figures, and the cascade's accuracy and average MACs."""
    log_probs_NK = log_probs_of(answers, logits.logits_SNK, mode)
    right_N = log_probs_NK.argmax(dim=-1) == logits.labels_N
    figures: dict[str, Any] = {
        "images": len(right_N),
        "acc1": 100 * float(right_N.double().mean()),
        "nll": -float(log_probs_NK.gather(1, logits.labels_N[:, None]).mean()),
        "ece": binned(log_probs_NK.amax(dim=-1).exp(), right_N).error(),
        "cascade_acc1": None,
        "cascade_macs": None,
    }
    if answers.cascade is not None:
        stages = answers.stages(logits.logits_SNK)
        stage_N = answers.cascade.leave(stages.confidence_SN)
        right_N = at_stage(stages.predictions_SN, stage_N) == logits.labels_N
        figures["cascade_acc1"] = 100 * float(right_N.double().mean())
        figures["cascade_macs"] = answers.cascade.average_macs(stage_N)
    return figures


@dataclass(frozen=True, kw_only=True)
class Report:
    """Figures and files.

    Attributes:
        mode: how the ensemble's probabilities are calibrated.
        seen: of the reported images.
        stages: of the cascade on them; None without one.
        large_logits: of the undivided network on them, [N, K]; None without.
    """

    session: Session
    answers: Answers
    mode: str
    seen: Logits
    stages: Stages | None
    large_logits: Tensor | None
    doubt: Doubt

    def answerers(self, logits_SNK: Tensor, stages: Stages | None) -> dict[str, Tensor]:
        """Log-probabilities of the ensemble, of each network and of the cascade: float64 [N, K].

        Args:
            stages: of the cascade on these images; None without one.
        """
        answers = self.answers
        found = {"ensemble": log_probs_of(answers, logits_SNK, self.mode)}
        own = None if answers.temperatures is None else answers.temperatures.of_networks(self.mode)
        for s, one_NK in enumerate(logits_SNK):
            scores_NK = scores_of(one_NK[None], "mean_logits", None if own is None else [own[s]])
            found[f"network {s + 1}"] = scores_NK.log_softmax(dim=-1)
        if answers.cascade is not None and stages is not None:
            stage_N = answers.cascade.leave(stages.confidence_SN)
            found["cascade"] = answers.stage_log_probs(cascade_scores(answers, logits_SNK, stage_N), stage_N)
        return found

    def write(self, folder: Path) -> tuple[dict[str, Any], str]:
        """Write uncertainty.json and .md with their pictures; returns (the figures, the table).

        Raises:
            WriteError: a file cannot be written.
        """
        figures: dict[str, Any] = {}
        rows = self.answerers(self.seen.logits_SNK, self.stages)
        wrong = {name: one_NK.argmax(dim=-1) != self.seen.labels_N for name, one_NK in rows.items()}
        if self.session.options.uncertainty:
            figures["selective"] = {
                name: {kind: selective_figures(confidence_of(one_NK, kind), wrong[name]) for kind in CONFIDENCES}
                for name, one_NK in rows.items()
            }
            curves = {name: curve_points(one_NK.amax(dim=-1).exp(), wrong[name]) for name, one_NK in rows.items()}
            with written(folder / "risk_coverage.png") as path:
                plot_risk_coverage(curves, oracle_curve(wrong["ensemble"]), path)
            figures["diversity"] = diversity_figures(self.seen.logits_SNK, self.seen.labels_N, self.answers.rule)
            with written(folder / "diversity.png") as path:
                plot_diversity(figures["diversity"], path)
        if self.doubt.foreign:
            figures["ood"] = self._foreign(rows, folder)
        if self.doubt.shifted is not None:
            figures["shift"] = self._shifted(self.doubt.shifted, 100 * float(wrong["ensemble"].double().mean()), folder)
        if self.answers.conformal:
            figures["conformal"] = self._conformal(rows["ensemble"])
        text = tables(figures)
        write_file(folder / "uncertainty.json", json_text(figures))
        write_file(folder / "uncertainty.md", text + "\n")
        return figures, text

    def _foreign(self, rows: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
        own = self._scores(self.seen.logits_SNK, rows)
        found: dict[str, Any] = {}
        pictures = {}
        for name, logits_SNK in self.doubt.foreign.items():
            stages = None if self.answers.cascade is None else self.answers.stages(logits_SNK)
            foreign = self._scores(logits_SNK, self.answerers(logits_SNK, stages))
            found[name] = {
                "images": logits_SNK.shape[1],
                "fpr95": "share of foreign images accepted where 95 % of the own are; fpr95_out: the reverse",
                "rows": {
                    who: {
                        score: None
                        if own_N is None or (other_N := foreign[who][score]) is None
                        else ood_figures(own_N, other_N, f"--ood {name}")
                        for score, own_N in scores.items()
                    }
                    for who, scores in own.items()
                },
            }
            ensemble = {score: row for score, row in found[name]["rows"]["ensemble"].items() if row is not None}
            best = max(ensemble, key=lambda score: ensemble[score]["auroc"] or 0.0)
            pictures[name] = (best, own["ensemble"][best], foreign["ensemble"][best], ensemble[best]["auroc"])
        with written(folder / "ood.png") as path:
            plot_ood(pictures, path)
        return found

    def _scores(self, logits_SNK: Tensor, rows: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor | None]]:
        """Scores of every row; of the cascade only those of its probabilities."""
        found: dict[str, dict[str, Tensor | None]] = {}
        for name, log_probs_NK in rows.items():
            if name == "ensemble":
                found[name] = ood_scores(logits_SNK, log_probs_NK)
            elif name == "cascade":
                alone = ood_scores(log_probs_NK[None], log_probs_NK)
                found[name] = {score: alone[score] for score in ("max_prob", "entropy")}
            else:
                one = int(name.rpartition(" ")[2]) - 1
                found[name] = ood_scores(logits_SNK[one : one + 1], log_probs_NK)
        return found

    def _shifted(self, shifted: Shifted, clean: float, folder: Path) -> dict[str, Any]:
        reference_clean, means = None, None
        reference: Errors | None = shifted.large_errors
        if self.large_logits is not None:
            wrong_N = self.large_logits.argmax(dim=-1) != self.seen.labels_N
            reference_clean = 100 * float(wrong_N.double().mean())
        elif not shifted.has_arrays:
            reference, means = None, ALEXNET
        figures = shift_figures(shifted.errors, clean, reference, reference_clean, means)
        figures |= {
            "clean_error": clean,
            "reference": "--large" if reference_clean is not None else "AlexNet, published" if means else None,
            "mean_name": mean_name(figures),
            "missing": shifted.missing,
            "rows": shifted.rows,
        }
        titles = ("corruption", "severity", "images", "acc1", "nll", "ece", "cascade_acc1", "cascade_macs")
        lines = [["" if row[title] is None else row[title] for title in titles] for row in shifted.rows]
        write_file(folder / "shift.csv", csv_table(titles, lines))
        with written(folder / "shift.png") as path:
            plot_shift(shifted.rows, clean, figures["mean_name"], path)
        return figures

    def _conformal(self, log_probs_NK: Tensor) -> list[dict[str, Any]]:
        uniform_N = uniform_of(self.session.seed, UNIFORM_TEST, len(log_probs_NK))
        rows = []
        for fitted_sets in self.answers.conformal:
            sets = conformal_sets(log_probs_NK.exp(), fitted_sets, uniform_N)
            rows.append({**fitted_sets.as_dict(), **conformal_figures(*sets, self.seen.labels_N)})
        return rows


def oracle_curve(wrong_N: Tensor) -> dict[str, list[float]]:
    """Risk and coverage where all errors come last."""
    right, images = int((~wrong_N).sum()), len(wrong_N)
    ranks = range(1, images + 1)
    return {"coverage": [k / images for k in ranks], "risk": [max(k - right, 0) / k for k in ranks]}


def json_text(figures: Mapping[str, Any]) -> str:
    """The contents of uncertainty.json."""
    return json.dumps(plain_json(dict(figures)), indent=2) + "\n"


def cell(value: float | None, digits: int = 4) -> str:
    """A figure of a table."""
    return "–" if value is None else f"{value:.{digits}f}"


def tables(figures: Mapping[str, Any]) -> str:
    """uncertainty.md: what was found, as Markdown tables."""
    parts = []
    if "selective" in figures:
        lines = _header(
            "selective, by max_prob", ("AURC", "E-AURC", "AUGRC", "coverage at 5 % risk", "risk at 80 %", "reached")
        )
        for name, kinds in figures["selective"].items():
            row = kinds["max_prob"]
            lines.append(f"| {name} | {' | '.join(cell(row[key]) for key in SELECTIVE)} |")
        parts.append("\n".join(lines))
    if "diversity" in figures:
        parts.append(diversity_table(figures["diversity"]))
    for name, found in (figures.get("ood") or {}).items():
        lines = _header(f"foreign images, {name} ({found['images']})", ("score", *FIGURES))
        for who, scores in found["rows"].items():
            for score in SCORES:
                if scores.get(score) is not None:
                    cells = " | ".join(cell(scores[score][key]) for key in FIGURES)
                    lines.append(f"| {who} | {score} | {cells} |")
        lines += ["", f"fpr95: {found['fpr95']}."]
        parts.append("\n".join(lines))
    if "shift" in figures:
        parts.append(shift_table(figures["shift"]))
    if "conformal" in figures:
        lines = _header(
            "conformal sets", ("alpha", "q", "coverage (95 %)", "raw", "mean size", "single", "worst class")
        )
        for row in figures["conformal"]:
            low, high = row["coverage_interval"] or (None, None)
            lines.append(
                f"| {row['kind'].upper()} | {row['alpha']:g} | {'∞' if row['q'] is None else cell(row['q'])} | "
                f"{cell(row['coverage'])} ({cell(low)} to {cell(high)}) | {cell(row['raw_coverage'])} | "
                f"{cell(row['mean_size'], 2)} | {cell(row['singletons'])} | {cell(row['worst_class_coverage'])} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _header(first: str, titles: Sequence[str]) -> list[str]:
    return [f"| {first} | {' | '.join(titles)} |", f"|---|{'---:|' * len(titles)}"]


def diversity_table(figures: Mapping[str, Any]) -> str:
    """Means over pairs, and both sides of every account."""
    means, accuracy = figures["means"], figures["accuracy"]
    nll, brier, entropy = figures["nll"], figures["brier"], figures["entropy"]
    lines = _header("diversity, mean over pairs", PAIRS)
    lines.append(f"| | {' | '.join(cell(means[name]) for name in PAIRS)} |")
    lines += [
        "",
        f"Accuracy: {accuracy['ensemble']:.2f} = mean network {accuracy['mean_network']:.2f} + rescued "
        f"{accuracy['rescued']:.2f} − spoiled {accuracy['spoiled']:.2f}; any right {accuracy['any_right']:.2f}, "
        f"all right {accuracy['all_right']:.2f} %.",
        f"NLL: geometric mean {nll['geometric']:.4f} = mean network {nll['mean_network']:.4f} − "
        f"{nll['ambiguity_geometric']:.4f}; arithmetic mean {nll['arithmetic']:.4f} = {nll['mean_network']:.4f} − "
        f"{nll['ambiguity_arithmetic']:.4f}.",
        f"Brier: {brier['arithmetic']:.4f} = {brier['mean_network']:.4f} − {brier['ambiguity']:.4f}. Entropy: "
        f"{entropy['total']:.4f} = expected {entropy['expected']:.4f} + mutual information "
        f"{entropy['mutual_information']:.4f}.",
    ]
    return "\n".join(lines)


def shift_table(figures: Mapping[str, Any]) -> str:
    """Errors of every corruption, and their means."""
    lines = _header("shift", ("error %", "normalised %", "relative %"))
    for name, error in figures["error_by_corruption"].items():
        normalised = figures["normalised_by_corruption"].get(name)
        relative = figures["relative_by_corruption"].get(name)
        lines.append(f"| {name} | {cell(error, 2)} | {cell(normalised, 2)} | {cell(relative, 2)} |")
    means = (figures["mean_corruption_error"], figures["normalised_mce"], figures["relative_mce"])
    lines.append(f"| {figures['mean_name']} | {' | '.join(cell(value, 2) for value in means)} |")
    if figures["missing"]:
        lines += ["", f"Missing: {', '.join(figures['missing'])}."]
    return "\n".join(lines)
