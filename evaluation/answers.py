"""What was fitted on held-out images: the entry `answers` of a tuned checkpoint, and its checks. S networks, K classes.

Plain numbers, lists and strings, in a checkpoint and as answers.json.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evaluation.calibration import COLDEST, FIGURES, HOTTEST, Temperatures, scores_of
from evaluation.cascade import NOBODY, Stages, leave_stages, run_stages, window_stages
from evaluation.conformal import KINDS, Conformal
from evaluation.ensemble import RULES
from evaluation.options import CALIBRATIONS, CASCADE_KINDS, CONFIDENCES
from evaluation.selective import confidence_of
from model.cascade import Cascade
from utils.errors import UserError, reason
from utils.plain_json import plain_json

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class CascadeAnswers:
    """A cascade that was chosen.

    Attributes:
        kind: of CASCADE_KINDS.
        order: numbers of networks from 0, as they run.
        confidence: of `selective.CONFIDENCES`.
        bounds: of each stage but the last: (threshold,), or (low, high) of a window.
        accept: confidence from which an answer is accepted, at the operating point of --window_for; None: not known.
        target: what it was chosen for, in words of the flags.
        macs: of every network, by its number.
        held_out: its figures on the images that it was chosen on.
    """

    kind: str
    order: tuple[int, ...]
    confidence: str
    bounds: tuple[tuple[float, ...], ...]
    accept: float | None
    target: Mapping[str, Any]
    macs: tuple[int, ...]
    held_out: Mapping[str, Any]

    def leave(self, confidence_SN: Tensor) -> Tensor:
        """After which stage, from 0, every image leaves: int64 [N]."""
        if self.kind == "window":
            return window_stages(confidence_SN, [(low, high) for low, high in self.bounds])
        return leave_stages(confidence_SN, [threshold for (threshold,) in self.bounds])

    def ordered_macs(self) -> list[int]:
        """MACs of the networks as they run."""
        return [self.macs[s] for s in self.order]

    def average_macs(self, stage_N: Tensor) -> float:
        """MACs of an image on average, where images leave after these stages, counted from 0."""
        cost_S = torch.tensor(self.ordered_macs(), dtype=torch.float64).cumsum(0)
        return float(cost_S[stage_N].mean())

    def as_dict(self) -> dict[str, Any]:
        """The entry of `answers`."""
        is_window = self.kind == "window"
        bounds = [list(bounds) if is_window else bounds[0] for bounds in self.bounds]
        return {
            "kind": self.kind,
            "order": [s + 1 for s in self.order],
            "confidence": self.confidence,
            "windows" if is_window else "thresholds": bounds,
            "accept": self.accept,
            "target": dict(self.target),
            "macs": list(self.macs),
            "held_out": dict(self.held_out),
        }


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a tuned checkpoint knows beside its networks.

    Attributes:
        weights: "raw" or "ema". weights_sha256: `record.checkpoint.state_sha256` of the networks.
        rule: of the ensemble.
        tuned_on: source, images, conformal_images, sha256, also_chose_epoch.
        mode: of CALIBRATIONS, how probabilities are calibrated; "none" without temperatures.
        temperatures: None with mode "none".
        cascade: None where none was chosen.
        conformal: may be empty.
        held_out: figures on the images of the fit.
    """

    weights: str
    weights_sha256: str
    rule: str
    tuned_on: Mapping[str, Any]
    mode: str
    temperatures: Temperatures | None
    cascade: CascadeAnswers | None = None
    conformal: tuple[Conformal, ...] = ()
    held_out: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The entry `answers`: plain numbers, lists and strings."""
        fitted = self.temperatures
        return {
            "format_version": FORMAT_VERSION,
            "weights": self.weights,
            "weights_sha256": self.weights_sha256,
            "rule": self.rule,
            "tuned_on": dict(self.tuned_on),
            "calibration": None
            if fitted is None
            else {
                "mode": self.mode,
                "ensemble": fitted.ensemble,
                "networks": list(fitted.networks),
                "both": fitted.both,
                "stages": list(fitted.stages),
            },
            "cascade": None if self.cascade is None else self.cascade.as_dict(),
            "conformal": [one.as_dict() for one in self.conformal],
            "held_out": dict(self.held_out),
        }

    def as_json(self) -> str:
        """The contents of answers.json."""
        return json.dumps(plain_json(self.as_dict()), indent=2) + "\n"

    def network_temperatures(self) -> tuple[float, ...] | None:
        """By which the networks' logits are divided before a cascade joins them."""
        return None if self.temperatures is None else self.temperatures.of_networks(self.mode)

    def stage_temperatures(self) -> tuple[float, ...] | None:
        """By which a cascade divides the scores of each stage; None without."""
        return None if self.temperatures is None else self.temperatures.stages or None

    def stages(self, logits_SNK: Tensor, labels_N: Tensor | None = None) -> Stages:
        """What every stage of the cascade says of images."""
        assert self.cascade is not None
        return run_stages(
            logits_SNK,
            self.cascade.order,
            self.rule,
            self.cascade.confidence,
            temperatures_S=self.network_temperatures(),
            stage_temperatures=self.stage_temperatures(),
            labels_N=labels_N,
        )

    def running_cascade(self, networks: Sequence[nn.Module]) -> Cascade:
        """The cascade over networks: images -> the scores of the stage that answered, not divided by its temperature.

        Scores and confidences are float64, as those of stored logits.
        """
        cascade = self.cascade
        assert cascade is not None
        own, of_stages = self.network_temperatures(), self.stage_temperatures()

        def scores(logits_kBK: Tensor, stage: int) -> Tensor:
            first = None if own is None else [own[s] for s in cascade.order[: stage + 1]]
            return scores_of(logits_kBK, self.rule, first)

        def confidence(scores_BK: Tensor, stage: int) -> Tensor:
            return confidence_of(scores_BK / (1.0 if of_stages is None else of_stages[stage]), cascade.confidence)

        return Cascade(networks, cascade.order, scores=scores, confidence=confidence, bounds=cascade.bounds)

    def stage_log_probs(self, scores_BK: Tensor, stage_B: Tensor) -> Tensor:
        """Log-probabilities of a running cascade's scores, by the temperatures of their stages: float64 [B, K]."""
        of_stages = self.stage_temperatures()
        if of_stages is not None:
            scores_BK = scores_BK / scores_BK.new_tensor(of_stages)[stage_B][:, None]
        return scores_BK.double().log_softmax(dim=-1)


def check_tuned_for(answers: Answers, *, weights_sha256: str, weights: str, rule: str, source: str) -> None:
    """Check that the answers are of these networks, joined by this rule.

    Raises:
        UserError: they are not.
    """
    if answers.weights != weights:
        raise UserError(
            f"{source}: tuned for the {answers.weights} weights, and these are the {weights} ones: tune again."
        )
    if answers.weights_sha256 != weights_sha256:
        raise UserError(f"{source}: tuned for other weights than these (weights_sha256 differs): tune again.")
    if answers.rule != rule:
        raise UserError(f"{source}: tuned for the rule {answers.rule}, and this evaluation uses {rule}: tune again.")


def read_answers_file(path: Path, num_networks: int) -> Answers:
    """The answers of --answers.

    Raises:
        UserError: no such file, or as `read_answers`.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--answers {path}: cannot be read as JSON: {reason(error)}.") from None
    return read_answers(values, num_networks, f"--answers {path}")


def read_answers(values: Any, num_networks: int, source: str) -> Answers:
    """Inverse of `Answers.as_dict`, trusting nothing.

    Args:
        num_networks: S.
        source: how errors call the place.

    Raises:
        UserError: an entry is missing, of another kind or length, or out of its range.
    """
    entry = _Entry(values, source)
    version = entry.number("format_version", 1, math.inf)
    if version != FORMAT_VERSION:
        raise entry.wrong("format_version", f"{FORMAT_VERSION}, as this version of the project reads")
    calibration, cascade = entry.inner("calibration"), entry.inner("cascade")
    conformal = entry.rows("conformal")
    held_out, tuned_on = entry.mapping("held_out"), entry.mapping("tuned_on")
    entry.within("tuned_on").text("source")  # or images of the fit could be reported
    _check_calibration_rows(entry.within("held_out"))
    return Answers(
        weights=entry.name("weights", ("raw", "ema")),
        weights_sha256=entry.text("weights_sha256"),
        rule=entry.name("rule", RULES),
        tuned_on=tuned_on,
        mode="none" if calibration is None else calibration.name("mode", CALIBRATIONS),
        temperatures=None if calibration is None else _read_temperatures(calibration, num_networks),
        cascade=None if cascade is None else _read_cascade(cascade, num_networks),
        conformal=tuple(_read_conformal(row) for row in conformal),
        held_out=held_out,
    )


class _Entry:
    """A mapping of the answers, read by keys; every complaint names the key."""

    def __init__(self, values: Any, source: str, prefix: str = "") -> None:
        if not isinstance(values, Mapping):
            raise UserError(f"{source}: {prefix or 'they are'} damaged: expected names with values.")
        self._values, self._source, self._prefix = values, source, prefix

    def wrong(self, key: str, expected: str) -> UserError:
        found = str(self._values.get(key, "nothing"))[:60]
        return UserError(f"{self._source}: {self._prefix}{key} is damaged: expected {expected}, found {found}.")

    def number(self, key: str, low: float, high: float) -> float:
        value = self._values.get(key)
        if value is None or not _is_number(value) or not low <= value <= high:
            raise self.wrong(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def perhaps_number(self, key: str, low: float, high: float) -> float | None:
        """None where the key is missing or has no value."""
        return None if self._values.get(key) is None else self.number(key, low, high)

    def numbers(self, key: str, count: int, low: float, high: float) -> tuple[float, ...]:
        values = self._values.get(key)
        if not isinstance(values, list) or len(values) != count or not all(map(_is_number, values)):
            raise self.wrong(key, f"{count} numbers")
        if not all(low <= value <= high for value in values):
            raise self.wrong(key, f"{count} numbers from {low:g} to {high:g}")
        return tuple(map(float, values))

    def text(self, key: str) -> str:
        value = self._values.get(key)
        if not isinstance(value, str):
            raise self.wrong(key, "a text")
        return value

    def name(self, key: str, names: Sequence[str]) -> str:
        if self._values.get(key) not in names:
            raise self.wrong(key, f"one of {', '.join(names)}")
        return self.text(key)

    def flag(self, key: str) -> bool:
        value = self._values.get(key)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def mapping(self, key: str) -> Mapping[str, Any]:
        value = self._values.get(key)
        if not isinstance(value, Mapping):
            raise self.wrong(key, "names with values")
        return value

    def inner(self, key: str) -> "_Entry | None":
        return None if self._values.get(key) is None else self.within(key)

    def within(self, key: str) -> "_Entry":
        return _Entry(self._values.get(key), self._source, f"{self._prefix}{key}.")

    def rows(self, key: str, default: Sequence[Any] | None = None) -> list["_Entry"]:
        values = self._values.get(key, default)
        if not isinstance(values, list):
            raise self.wrong(key, "a list")
        return [_Entry(value, self._source, f"{self._prefix}{key}[{i}].") for i, value in enumerate(values)]


def _is_number(value: Any) -> bool:
    """Whether it is finite as a float; JSON has whole numbers beyond all floats."""
    largest = sys.float_info.max
    return isinstance(value, int | float) and not isinstance(value, bool) and -largest <= value <= largest


def _check_calibration_rows(held_out: _Entry) -> None:
    for row in held_out.rows("calibration", default=[]):
        for name in ("what", "when", "split"):
            row.text(name)
        for name in FIGURES:
            row.perhaps_number(name, 0, math.inf)


def _check_promised(held_out: _Entry, num_networks: int) -> None:
    """The figures of a cascade on the images that it was chosen on, as far as they are there."""
    for name in ("networks_acc1", "stages_acc1"):
        if held_out.get(name) is not None:
            held_out.numbers(name, num_networks, 0, 100)
    curve = held_out.rows("curve", default=[])
    for row in curve:
        row.numbers("thresholds", num_networks - 1, 0, NOBODY)
    for row in (held_out, *curve):
        row.perhaps_number("acc1", 0, 100)
        row.perhaps_number("average_macs", 0, math.inf)


def _read_temperatures(entry: _Entry, num_networks: int) -> Temperatures:
    bounds = (COLDEST, HOTTEST)
    stages = entry.get("stages")
    return Temperatures(
        ensemble=entry.number("ensemble", *bounds),
        networks=entry.numbers("networks", num_networks, *bounds),
        both=entry.number("both", *bounds),
        stages=() if stages == [] else entry.numbers("stages", num_networks, *bounds),
    )


def _read_cascade(entry: _Entry, num_networks: int) -> CascadeAnswers:
    kind = entry.name("kind", CASCADE_KINDS)
    order = entry.numbers("order", num_networks, 1, num_networks)
    if sorted(order) != list(range(1, num_networks + 1)):
        raise entry.wrong("order", f"the numbers 1 to {num_networks}, each once")
    bounds: tuple[tuple[float, ...], ...]
    if kind == "window":
        windows = entry.get("windows")
        if not isinstance(windows, list) or len(windows) != num_networks - 1:
            raise entry.wrong("windows", f"{num_networks - 1} pairs")
        if not all(
            isinstance(one, list) and len(one) == 2 and all(map(_is_number, one)) and 0 <= one[0] <= one[1] <= NOBODY
            for one in windows
        ):
            raise entry.wrong("windows", f"{num_networks - 1} pairs of numbers from 0 to 2")
        bounds = tuple((float(low), float(high)) for low, high in windows)
    else:
        bounds = tuple((t,) for t in entry.numbers("thresholds", num_networks - 1, 0, NOBODY))
    macs = entry.numbers("macs", num_networks, 1, math.inf)
    held_out = entry.mapping("held_out")
    _check_promised(entry.within("held_out"), num_networks)
    return CascadeAnswers(
        kind=kind,
        order=tuple(int(s) - 1 for s in order),
        confidence=entry.name("confidence", CONFIDENCES),
        bounds=bounds,
        accept=entry.perhaps_number("accept", 0, NOBODY),
        target=entry.mapping("target"),
        macs=tuple(map(int, macs)),
        held_out=held_out,
    )


def _read_conformal(entry: _Entry) -> Conformal:
    return Conformal(
        kind=entry.name("kind", KINDS),
        alpha=entry.number("alpha", 0, 1),
        q=entry.perhaps_number("q", -math.inf, math.inf),
        penalty=entry.number("lambda", 0, math.inf),
        free_ranks=int(entry.number("k_reg", 0, math.inf)),
        randomised=entry.flag("randomised"),
    )
