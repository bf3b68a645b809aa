"""Temperatures and calibration figures, against tests/golden/answers.json and by their definitions."""

import logging
import math

import pytest
import torch
from torch import Tensor

from evaluation.calibration import (
    adaptive_error,
    binned,
    calibrated_log_probs,
    calibration_figures,
    check_finite,
    fit_stages,
    fit_temperature,
    fit_temperatures,
)
from evaluation.cascade import greedy_order
from evaluation.options import CALIBRATIONS
from tests.answer_cases import CASES, GOLDEN, make
from utils.errors import RunError

RULES = ("mean_logits", "mean_softmax")


def near(value: float) -> object:
    return pytest.approx(value, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", CASES)
def test_golden_temperatures_and_figures(name: str, rule: str) -> None:
    case, golden = make(name), GOLDEN["cases"][name]["calibration"][rule]
    fitted = fit_temperatures(case.held, case.held_labels, rule)
    assert fitted.ensemble == near(golden["T_ensemble"])
    assert list(fitted.networks) == [near(value) for value in golden["T_networks"]]
    assert fitted.both == near(golden["T_ensemble_after_networks"])
    for split, logits, labels in (
        ("held_out", case.held, case.held_labels),
        ("test", case.test, case.test_labels),
    ):
        for mode, figures in golden[split].items():
            found = calibration_figures(calibrated_log_probs(logits, rule, mode, fitted), labels)
            assert found == {key: near(value) for key, value in figures.items()}, (split, mode)
    if "T_stages" in golden:
        order = greedy_order(case.held, case.held_labels, case.numbers["macs"], rule)
        assert [s + 1 for s in order] == golden["order"]
        stages = fit_stages(case.held, case.held_labels, rule, order, None)
        assert list(stages) == [near(value) for value in golden["T_stages"]]
        assert stages[-1] == pytest.approx(fitted.ensemble, rel=1e-9)


@pytest.mark.parametrize("case", GOLDEN["edges"]["temperature"])
def test_temperatures_at_the_bounds_warn(case: dict, caplog: pytest.LogCaptureFixture) -> None:
    scores = torch.tensor(case["logits"], dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        assert fit_temperature(scores, torch.tensor(case["labels"])) == near(case["T"])
    assert bool(caplog.records) == (case["T"] in (0.05, 1.0, 20.0))


def test_one_temperature_for_all_modes_of_the_class() -> None:
    """A temperature of the ensemble never changes the class; `none` needs nothing fitted."""
    case = make("four")
    fitted = fit_temperatures(case.held, case.held_labels, "mean_softmax")
    raw = calibrated_log_probs(case.test, "mean_softmax", "none", None)
    assert torch.equal(raw, calibrated_log_probs(case.test, "mean_softmax", "none", fitted))
    for mode in CALIBRATIONS:
        log_probs = calibrated_log_probs(case.test, "mean_softmax", mode, fitted)
        assert torch.allclose(log_probs.exp().sum(dim=-1), torch.ones(len(log_probs), dtype=torch.float64))
        same = torch.equal(log_probs.argmax(dim=-1), raw.argmax(dim=-1))
        assert same == (mode in ("none", "ensemble", "stages"))


def test_the_minimum_is_one() -> None:
    """The fitted temperature has a smaller NLL than its neighbours."""
    case = make("mixed")
    scores = case.held.mean(dim=0)
    found = fit_temperature(scores, case.held_labels)

    def nll(temperature: float) -> float:
        log_probs = (scores / temperature).log_softmax(dim=-1)
        return -float(log_probs.gather(1, case.held_labels[:, None]).mean())

    assert nll(found) < min(nll(found * 1.001), nll(found / 1.001))


def test_bins_at_their_edges() -> None:
    edges = GOLDEN["edges"]["ece_edges"]
    confidence = torch.tensor([1 / 15, 2 / 15, 1.0, 0.2, 0.2], dtype=torch.float64)
    right = torch.tensor(edges["correct"], dtype=torch.bool)
    bins = binned(confidence, right)
    assert [m + 1 for m in bins.images_M.nonzero().flatten().tolist()] == sorted(set(edges["bins_1_based"]))
    assert bins.error() == near(edges["ece"])
    assert adaptive_error(confidence, right, 2) == near(edges["adaptive_ece_2_bins"])
    assert binned(torch.zeros(1, dtype=torch.float64), torch.tensor([False])).images_M[0] == 1


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make("four")
    whole = calibration_figures(calibrated_log_probs(case.test, "mean_logits", "none", None), case.test_labels)
    monkeypatch.setattr("evaluation.calibration.CHUNK", 7)
    parts = calibration_figures(calibrated_log_probs(case.test, "mean_logits", "none", None), case.test_labels)
    assert parts == {key: pytest.approx(value, rel=1e-12) for key, value in whole.items()}
    assert fit_temperatures(case.held, case.held_labels, "mean_logits").ensemble == pytest.approx(
        GOLDEN["cases"]["four"]["calibration"]["mean_logits"]["T_ensemble"], rel=1e-9
    )


@pytest.mark.parametrize(("images", "classes"), [(0, 3), (1, 1), (1, 3), (20, 4)])
def test_edges_of_figures(images: int, classes: int) -> None:
    logits = torch.zeros(images, classes, dtype=torch.float64)
    labels = torch.zeros(images, dtype=torch.int64)
    figures = calibration_figures(logits.log_softmax(dim=-1), labels)
    if not images:
        assert set(figures.values()) == {None}
        return
    assert figures["acc1"] == 100
    assert figures["nll"] == pytest.approx(math.log(classes))
    assert figures["ece"] == pytest.approx(1 - 1 / classes)
    assert figures["adaptive_ece"] == pytest.approx(1 - 1 / classes)
    assert figures["classwise_ece"] == pytest.approx(2 * (classes - 1) / classes / classes)


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], dtype=torch.float64)
    figures = calibration_figures(logits.log_softmax(dim=-1), torch.tensor([0, 0]))
    assert figures["nll"] == pytest.approx(1e4)
    assert fit_temperature(logits, torch.tensor([0, 0])) == 20.0


def nan_at(network: int, image: int) -> Tensor:
    logits = torch.zeros(2, 10, 3)
    logits[network, image, 1] = math.nan
    return logits


def test_a_logit_that_is_not_finite_is_named() -> None:
    check_finite(torch.zeros(2, 10, 3), "held-out images")
    with pytest.raises(RunError, match=r"network 2 .* image 7 of the held-out images"):
        check_finite(nan_at(1, 7), "held-out images")
