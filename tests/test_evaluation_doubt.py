"""Selective classification, foreign images, conformal sets and diversity: golden figures and identities."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evaluation.calibration import calibrated_log_probs
from evaluation.conformal import (
    Conformal,
    conformal_figures,
    conformal_scores,
    conformal_sets,
    fit_conformal,
    parse_alphas,
    quantile_rank,
    wilson_interval,
)
from evaluation.diversity import diversity_figures, pair_matrices
from evaluation.ensemble import ensemble_scores
from evaluation.ood import SCORES, ood_figures, ood_scores
from evaluation.selective import confidence_of, operating_point, selective_figures
from tests.answer_cases import CASES, GOLDEN, make
from utils.errors import RunError

EDGES = GOLDEN["edges"]


def near(value: float | None) -> object:
    return None if value is None else pytest.approx(value, rel=1e-6, abs=1e-9)


def nested(value: object) -> object:
    if isinstance(value, dict):
        return {key: nested(one) for key, one in value.items()}
    if isinstance(value, list):
        return [nested(one) for one in value]
    return near(value) if isinstance(value, float) else value


@pytest.mark.parametrize("name", CASES)
def test_golden_selective(name: str) -> None:
    case = make(name)
    scores = ensemble_scores(case.test, "mean_logits")
    wrong = scores.argmax(dim=-1) != case.test_labels
    for kind, figures in GOLDEN["cases"][name]["selective"].items():
        confidence = confidence_of(scores, kind.removesuffix("_rounded_1_decimal"))
        if kind.endswith("decimal"):
            confidence = (confidence * 10).round() / 10
        found = selective_figures(confidence, wrong)
        assert found == {key: near(figures[key]) for key in found}, kind


@pytest.mark.parametrize("case", EDGES["selective"])
def test_edges_of_selective(case: dict) -> None:
    confidence = torch.tensor([math.nan if c is None else c for c in case["confidence"]], dtype=torch.float64)
    found = selective_figures(confidence, torch.tensor(case["wrong"], dtype=torch.bool))
    assert found == {key: near(case[key]) for key in found}


def test_no_image_has_no_figures() -> None:
    nothing = torch.zeros(0, dtype=torch.float64)
    assert set(selective_figures(nothing, nothing.bool()).values()) == {None}


def test_operating_points() -> None:
    confidence = torch.tensor([0.9, 0.8, 0.8, 0.6, 0.5], dtype=torch.float64)
    wrong = torch.tensor([False, False, True, False, True])
    assert operating_point(confidence, wrong, "risk", 0.05) == (0.9, pytest.approx(0.8))
    assert operating_point(confidence, wrong, "risk", 0.34) == (0.6, pytest.approx(0.2))
    assert operating_point(confidence, wrong, "coverage", 0.4) == (0.8, pytest.approx(0.4))
    assert operating_point(confidence, wrong, "tpr", 0.95) == (0.5, 0.0)
    assert operating_point(confidence, ~wrong, "risk", 0.0) == (2.0, 1.0)


@pytest.mark.parametrize("name", CASES)
def test_golden_foreign_images(name: str) -> None:
    case = make(name)
    own, foreign = (
        ood_scores(logits, calibrated_log_probs(logits, "mean_logits", "none", None))
        for logits in (case.test, case.ood)
    )
    assert own.keys() == set(SCORES)
    golden = GOLDEN["cases"][name]["ood"]
    for score, own_N in own.items():
        foreign_M = foreign[score]
        if own_N is None or foreign_M is None:
            assert score not in golden
            continue
        assert ood_figures(own_N, foreign_M) == nested(golden[score]), score


@pytest.mark.parametrize("case", EDGES["ood"])
def test_edges_of_foreign_images(case: dict) -> None:
    found = ood_figures(*(torch.tensor(case[side], dtype=torch.float64) for side in ("id", "ood")))
    assert found == {key: near(case[key]) for key in found}


def test_an_empty_side_and_a_score_that_is_not_finite() -> None:
    some, none = torch.tensor([0.1, 0.2]), torch.zeros(0)
    assert set(ood_figures(some, none).values()) == set(ood_figures(none, some).values()) == {None}
    with pytest.raises(RunError, match="--ood folder: a score is not finite"):
        ood_figures(some, torch.tensor([math.nan]), "--ood folder")


@pytest.mark.parametrize("name", CASES)
def test_golden_conformal(name: str) -> None:
    case = make(name)
    held, test = (calibrated_log_probs(z, "mean_logits", "none", None).exp() for z in (case.held, case.test))
    for row in GOLDEN["cases"][name]["conformal"]:
        held_u, test_u = (case.held_uniform, case.test_uniform) if row["randomised"] else (None, None)
        one = fit_conformal(held, case.held_labels, row["kind"], row["alpha"], held_u)
        assert one.q == near(row["q"]), row
        assert Conformal.from_dict(one.as_dict()) == one
        found = conformal_figures(*conformal_sets(test, one, test_u), case.test_labels)
        for key in ("raw_coverage", "raw_mean_size", "empty_share", "coverage", "mean_size", "singletons"):
            assert found[key] == near(row[key]), (key, row)
        low, high = found["coverage_interval"]
        assert low <= found["coverage"] <= high
        assert sum(part["images"] for part in found["by_size"].values()) == len(test)
        assert found["worst_class_coverage"] <= found["coverage"] + 1e-12


@pytest.mark.parametrize("case", EDGES["conformal"])
def test_ranks_of_quantiles(case: dict) -> None:
    assert quantile_rank(case["n"], case["alpha"]) == case["rank"]


def test_too_few_images_give_all_classes(caplog: pytest.LogCaptureFixture) -> None:
    probs = torch.full((8, 3), 1 / 3, dtype=torch.float64)
    one = fit_conformal(probs, torch.zeros(8, dtype=torch.int64), "aps", 0.1)
    assert one.q is None
    assert "8 images are too few" in caplog.text
    assert "9 or more" in caplog.text
    assert conformal_sets(probs, one)[1].all()


def test_sets_hold_the_top_class_and_ranks_go_by_index() -> None:
    probs = torch.tensor([[0.4, 0.4, 0.2]], dtype=torch.float64)
    assert conformal_scores(probs, "aps").tolist() == [[pytest.approx(0.4), pytest.approx(0.8), pytest.approx(1.0)]]
    assert conformal_scores(probs, "raps").tolist() == [[pytest.approx(0.4), pytest.approx(0.9), pytest.approx(1.2)]]
    raw, sets = conformal_sets(probs, Conformal(kind="aps", alpha=0.5, q=0.1))
    assert raw.tolist() == [[False, False, False]]
    assert sets.tolist() == [[True, False, False]]


def test_alphas() -> None:
    assert parse_alphas("0.1,0.05") == [0.1, 0.05]
    for bad in ("0", "1", "0.1,x", "", "nan"):
        with pytest.raises(ValueError, match=r".*"):
            parse_alphas(bad)


def test_wilson_interval() -> None:
    assert wilson_interval(0, 0) is None
    assert wilson_interval(8, 10) == [pytest.approx(0.4901625), pytest.approx(0.9433178)]
    assert wilson_interval(0, 5)[0] == 0
    assert wilson_interval(5, 5)[1] == 1


@pytest.mark.parametrize("name", CASES)
def test_golden_diversity(name: str) -> None:
    case = make(name)
    found = diversity_figures(case.test, case.test_labels, "mean_logits")
    assert found == nested(GOLDEN["cases"][name]["diversity"])


@pytest.mark.parametrize("which", ["diversity_identical_answers", "diversity_one_class_answered"])
def test_edges_of_diversity(which: str) -> None:
    case = EDGES[which]
    choices = torch.tensor(case["logits"]).argmax(dim=-1)
    found = pair_matrices(choices, torch.tensor(case["labels"]))
    for name in found.keys() & case.keys():
        assert found[name] == nested(case[name]), name


@given(
    st.integers(1, 4), st.integers(1, 9), st.integers(1, 5), st.sampled_from([0.0, 1.0, 30.0, 1e4]), st.integers(0, 999)
)
@settings(max_examples=60, deadline=None)
def test_identities_of_the_accounts(networks: int, images: int, classes: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * (2 * torch.rand(networks, images, classes, generator=generator, dtype=torch.float64) - 1)
    labels = torch.randint(classes, (images,), generator=generator)

    def nll(scores: Tensor) -> float:
        return -float(scores.log_softmax(dim=-1).gather(1, labels[:, None]).mean())

    found = diversity_figures(logits, labels, "mean_softmax")
    account, likelihood, brier, entropy = (found[key] for key in ("accuracy", "nll", "brier", "entropy"))
    gained = account["rescued"] - account["spoiled"]
    assert account["ensemble"] == pytest.approx(account["mean_network"] + gained, rel=1e-9, abs=1e-9)
    for mean, rule in (("geometric", "mean_logits"), ("arithmetic", "mean_softmax")):
        explained = likelihood["mean_network"] - likelihood[f"ambiguity_{mean}"]
        assert likelihood[mean] == pytest.approx(explained, rel=1e-9, abs=1e-9)
        assert likelihood[mean] == pytest.approx(nll(ensemble_scores(logits, rule)), rel=1e-9, abs=1e-9)
        assert likelihood[f"ambiguity_{mean}"] >= -1e-9
    assert brier["arithmetic"] == pytest.approx(brier["mean_network"] - brier["ambiguity"], rel=1e-9, abs=1e-9)
    total = entropy["expected"] + entropy["mutual_information"]
    assert entropy["total"] == pytest.approx(total, rel=1e-9, abs=1e-9)
    if networks == 1:
        assert account["gain"] == 0
        assert set(found["means"].values()) == {None}
