"""Errors under corruption in percent: means, and mCE by a reference (Hendrycks & Dietterich, arXiv:1903.12261)."""

from collections.abc import Mapping, Sequence
from typing import Any

from dataset.source.corrupted import CORRUPTIONS, SEVERITIES

Errors = Mapping[str, Mapping[int, float]]  # corruption -> severity -> error in percent

# AlexNet's mean errors over the five severities of ImageNet-C, as published
ALEXNET = dict(
    zip(
        CORRUPTIONS,
        (
            *(88.6428, 89.4468, 92.2640, 81.9880, 82.6268, 78.5948, 79.8360),
            *(86.6816, 82.6572, 81.9324, 56.4592, 85.3204, 64.6056, 71.7840, 60.6500),
        ),
        strict=True,
    )
)


def mean(values: Sequence[float | None]) -> float | None:
    """Of the values that are there; None where none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def shift_figures(
    errors: Errors,
    clean: float,
    reference: Errors | None = None,
    reference_clean: float | None = None,
    reference_means: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Means over the corruptions of the benchmark that are there; extra and unknown ones are listed alone.

    Args:
        errors: of what is evaluated, in percent. clean: on the clean images.
        reference, reference_clean: the same of the undivided network.
        reference_means: mean errors over all five severities in its place; taken only for corruptions with all five.

    Returns:
        error_by_corruption; corruptions: how many a mean is over; mean_corruption_error; accuracy_by_severity;
        normalised_by_corruption, normalised_mce, relative_by_corruption and relative_mce, None without a reference, and
        where a denominator is 0 or less.
    """
    averaged = [name for name in errors if name in CORRUPTIONS]
    by_corruption = {name: mean(list(rows.values())) for name, rows in errors.items()}
    severities = [severity for severity in SEVERITIES if any(severity in errors[name] for name in averaged)]
    by_severity = [mean([errors[name][s] for name in averaged if s in errors[name]]) for s in severities]
    normalised: dict[str, float | None] = {}
    relative: dict[str, float | None] = {}
    for name in averaged:
        own = errors[name]
        if reference is not None and reference_clean is not None and name in reference:
            other = [reference[name][s] for s in own]
            normalised[name] = _percent(sum(own.values()), sum(other))
            relative[name] = _percent(
                sum(value - clean for value in own.values()), sum(value - reference_clean for value in other)
            )
        elif reference_means is not None and name in reference_means and len(own) == len(SEVERITIES):
            normalised[name] = _percent(sum(own.values()), len(SEVERITIES) * reference_means[name])
    return {
        "error_by_corruption": by_corruption,
        "corruptions": len(averaged),
        "mean_corruption_error": mean([by_corruption[name] for name in averaged]),
        "severities": severities,
        "accuracy_by_severity": [None if value is None else 100 - value for value in by_severity],
        "normalised_by_corruption": normalised,
        "normalised_mce": _mean_of_all(normalised),
        "relative_by_corruption": relative,
        "relative_mce": _mean_of_all(relative),
    }


def _percent(top: float, bottom: float) -> float | None:
    return 100 * top / bottom if bottom > 0 else None


def _mean_of_all(values: Mapping[str, float | None]) -> float | None:
    """None where one has no value: a mean over fewer would be another figure."""
    return None if None in values.values() else mean(list(values.values()))


def mean_name(figures: Mapping[str, Any]) -> str:
    """How a mean is called: mCE only over all 15 corruptions."""
    count = figures["corruptions"]
    return "mCE" if count == len(CORRUPTIONS) else f"mean of {count} corruption{'s' * (count != 1)}"
