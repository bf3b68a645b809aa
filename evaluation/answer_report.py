"""What an evaluation says of answers: tuned, calibrated, by a cascade, and how sure. S networks, N images.

`eval.py` only calls it: opened before the evaluation, so that wrong flags fail early; fed with its logits; written by
the process that writes.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from evaluation.answer_plots import plot_cascade, plot_reliability
from evaluation.answers import Answers
from evaluation.calibration import FIGURES, binned
from evaluation.cascade import Stages
from evaluation.cascade_table import CascadeTable, Large, csv_rows, dominating, markdown
from evaluation.collecting import Logits, collect_logits
from evaluation.contenders import undivided
from evaluation.files import written
from evaluation.held_out import open_held_out, open_reported, test_fraction_of
from evaluation.session import Session, open_large
from evaluation.tuning import Request, calibration_rows, log_probs_of, read_alphas, tune, write_tuned
from evaluation.uncertainty import Doubt, FurtherImages, Report, collect_doubt, is_asked
from record.checkpoint import write_file
from record.tables import csv_table
from utils.errors import UserError
from utils.macs import count_macs

logger = logging.getLogger("eval")


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What was seen of the reported images.

    Attributes:
        logits: of the networks.
        large: the undivided network, if there is one.
        doubt: what was seen of further images; None where no uncertainty is reported.
    """

    logits: Logits
    large: Large | None
    doubt: Doubt | None


@dataclass(frozen=True, kw_only=True)
class AnswerReport:
    """Answers and everything that is said of them.

    Attributes:
        answers: tuned now or before; without temperatures and cascade where nothing was.
        mode: how the ensemble's probabilities are calibrated here.
        folder: of the results.
        large: the undivided network of --large.
        tuned: path of the checkpoint that was written now.
        further: the images of --ood and --shift.
    """

    session: Session
    answers: Answers
    mode: str
    folder: Path
    large: Session | None
    tuned: Path | None
    further: FurtherImages

    @staticmethod
    def is_asked(session: Session) -> bool:
        """Whether anything here is wanted."""
        options = session.options
        return bool(options.tune or session.answers or options.uncertainty or options.ood or options.shift)

    @classmethod
    def open(cls, session: Session, folder: Path) -> Self | None:
        """Check the flags and, with --tune, fit on the held-out images and write the tuned checkpoint.

        Raises:
            UserError: flags that do not fit, no held-out images; as `open_held_out` and `tune`.
            RunError: a logit that is not finite, a full disk.
        """
        options = session.options
        check_flags(session)
        if not cls.is_asked(session):
            return None
        request = None
        if options.tune:
            request = Request.of(options, session.info.num_networks, session.config.given)
        large = None if options.large is None else open_large(session)
        further = FurtherImages.open(session)
        answers, tuned = session.answers, None
        if request is not None:
            answers, _ = tune(session, request, open_held_out(session))
            open_reported(session, answers)  # refuses before anything is written
            if session.world.is_main:
                tuned = write_tuned(session, answers, folder)
                logger.info("tuned on %d held-out images: %s", answers.tuned_on["images"], tuned)
        if answers is None:
            answers = untuned(session)
        return cls(
            session=session,
            answers=answers,
            mode=report_mode(session, answers),
            folder=folder,
            large=large,
            tuned=tuned,
            further=further,
        )

    def collect(self, logits: Logits) -> Collected:
        """Run what else is to be run on the reported images; every process takes part."""
        session, info = self.session, self.session.info
        macs = None
        logits_NK = None
        if self.large is not None:
            other = self.large
            source = open_reported(session.at_size_of(other.info), self.answers)
            crop = other.info.crop_size
            macs = count_macs(other.network, (3, crop, crop))
            found = collect_logits(
                other,
                source.test,
                recipe=other.info.data_recipe or source.recipe,
                mean=other.info.mean or source.mean,
                std=other.info.std or source.std,
                what="test, undivided",
            )
            if len(found.labels_N) == len(logits.labels_N):
                logits_NK = found.logits_SNK[0]
        elif len(info.archs) == 1 and info.split_factor > 1:
            macs = count_macs(undivided(info.request), (3, info.crop_size, info.crop_size))
        doubt = None
        if is_asked(session, self.answers):
            doubt = collect_doubt(session, self.answers, self.mode, self.further, self.large)
        large = None if macs is None else Large(macs=macs, logits_NK=logits_NK)
        return Collected(logits=logits, large=large, doubt=doubt)

    def write(self, seen: Collected) -> tuple[dict[str, Any], str]:
        """Write the files; returns (entries of results.json, tables to print).

        Raises:
            WriteError: a file cannot be written.
        """
        results: dict[str, Any] = {}
        tables: list[str] = []
        answers, logits_SNK, labels_N = self.answers, seen.logits.logits_SNK, seen.logits.labels_N
        stages = None if answers.cascade is None else answers.stages(logits_SNK, labels_N)
        if answers.temperatures is not None or answers.cascade is not None:
            results["answers"] = answers.as_dict()
            if self.tuned is not None:
                results["tuned_checkpoint"] = str(self.tuned)
            results["reported_images"] = reported_words(answers)
        if answers.temperatures is not None:
            rows = [*answers.held_out.get("calibration", []), *self._calibration(seen, stages)]
            results["calibration"] = rows
            tables.append(calibration_table(rows))
        if stages is not None:
            table = CascadeTable(answers, logits_SNK, labels_N, stages, seen.large)
            results["cascade"] = {
                "rows": [row.as_dict() for row in table.rows],
                "undivided_macs": None if seen.large is None else seen.large.macs,
                "dominates_undivided": None if (found := dominating(table.rows)) is None else found.as_dict(),
            }
            tables.append(self._write_cascade(table, len(labels_N), seen.large))
        if seen.doubt is not None:
            report = Report(
                session=self.session,
                answers=answers,
                mode=self.mode,
                seen=seen.logits,
                stages=stages,
                large_logits=None if seen.large is None else seen.large.logits_NK,
                doubt=seen.doubt,
            )
            results["uncertainty"], text = report.write(self.folder)
            tables.append(text)
        return results, "\n\n".join(tables)

    def _calibration(self, seen: Collected, stages: Stages | None) -> list[dict[str, Any]]:
        logits_SNK, labels_N = seen.logits.logits_SNK, seen.logits.labels_N
        rows = calibration_rows(self.answers, logits_SNK, labels_N, "test", stages)
        held_out = self.answers.held_out.get("calibration", [])
        titles = ("what", "when", "split", *FIGURES)
        lines = [[row.get(title, "") for title in titles] for row in [*held_out, *rows]]
        write_file(self.folder / "calibration.csv", csv_table(titles, lines))
        panels = []
        for when, mode in (("before", "none"), ("after", self.answers.mode)):
            log_probs_NK = log_probs_of(self.answers, logits_SNK, mode)
            right_N = log_probs_NK.argmax(dim=-1) == labels_N
            figures = next(row for row in rows if (row["what"], row["when"]) == ("ensemble", when))
            panels.append((f"{when} calibration", binned(log_probs_NK.amax(dim=-1).exp(), right_N), figures))
        with written(self.folder / "reliability.png") as path:
            plot_reliability(panels, path)
        return rows

    def _write_cascade(self, table: CascadeTable, images: int, large: Large | None) -> str:
        tuned_on, networks = self.answers.tuned_on, self.session.info.num_networks
        title = (
            f"{self.session.config.dataset}, S = {networks}: {tuned_on.get('images')} held-out images, "
            f"{images} {self.session.options.split or 'test'} images"
        )
        write_file(self.folder / "cascade.csv", csv_table(*csv_rows(table.rows, networks)))
        text = markdown(table.rows, title)
        write_file(self.folder / "cascade.md", text + "\n")
        with written(self.folder / "cascade.png") as path:
            plot_cascade(table.rows, None if large is None else large.macs, title, path)
        return text


def untuned(session: Session) -> Answers:
    """Answers of networks that nothing was fitted for."""
    return Answers(
        weights=session.info.weights,
        weights_sha256=session.weights_sha256,
        rule=session.rule,
        tuned_on={},
        mode="none",
        temperatures=None,
        held_out={},
    )


def check_flags(session: Session) -> None:
    """Check the flags of answers against each other, before anything is run.

    Raises:
        UserError: flags that do not fit.
    """
    options, given = session.options, session.config.given
    read_alphas(options)
    if options.tune_on != "val":
        test_fraction_of(options.tune_on)
        if not options.tune:
            raise UserError("--tune_on is for --tune: add it, or leave the flag away.")
    if options.tune and options.answers:
        raise UserError("--tune makes answers, and --answers gives them: use one of them.")
    if options.conformal and not options.tune and not (session.answers and session.answers.conformal):
        raise UserError("--conformal needs quantiles: add --tune conformal, or give a checkpoint that was tuned so.")
    if options.answer == "cascade" and options.tta != "none":
        raise UserError(f"--answer cascade runs each network once, and --tta {options.tta} twice: use one of them.")
    if options.answer == "cascade":
        if session.info.num_networks == 1:
            raise UserError("--answer cascade: there is one network, and a cascade needs two or more.")
        if not options.tune and (session.answers is None or session.answers.cascade is None):
            raise UserError("--answer cascade needs a tuned cascade: run eval.py --tune cascade first.")
    if session.answers is not None and "calibrate" in given:
        report_mode(session, session.answers)


def report_mode(session: Session, answers: Answers) -> str:
    """How probabilities are calibrated: as tuned, or not at all.

    Raises:
        UserError: --calibrate asks for another way than was tuned.
    """
    asked = session.config.given.get("calibrate", answers.mode)
    if asked not in ("none", answers.mode):
        raise UserError(f"--calibrate {asked}: the answers were tuned with --calibrate {answers.mode}: tune again.")
    return str(asked)


def reported_words(answers: Answers) -> str:
    """Which images the figures are of."""
    source = str(answers.tuned_on.get("source", ""))
    if test_fraction_of(source) is None:
        return "all of the split"
    return f"the rest of the test images, without the part that was tuned on (--tune_on {source})"


def calibration_table(rows: Sequence[dict[str, Any]]) -> str:
    """The figures of the reported images before and after calibration, as a Markdown table."""
    lines = [
        "| calibration | | top-1 % | NLL | Brier | ECE | adaptive ECE | classwise ECE |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if row["split"] == "test":
            cells = [
                "–" if row.get(name) is None else f"{row[name]:.{2 if name == 'acc1' else 4}f}" for name in FIGURES
            ]
            lines.append(f"| {row['what']} | {row['when']} | {' | '.join(cells)} |")
    return "\n".join(lines)
