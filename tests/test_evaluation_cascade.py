"""Cascades: order, thresholds, windows and the walk, against tests/golden/answers.json and by their definitions."""

import functools
import itertools
import math

import pytest
import torch
from torch import Tensor

from evaluation.cascade import (
    NOBODY,
    Choice,
    EachStage,
    Stages,
    Target,
    at_stage,
    candidate_cuts,
    choose_shared,
    curve_of,
    fit_window,
    greedy_order,
    leave_stages,
    quantiles,
    run_stages,
    shared_walks,
    sign_test,
    walk_of,
    window_stages,
)
from evaluation.options import CONFIDENCES
from evaluation.selective import confidence_of, selective_figures
from tests.answer_cases import GOLDEN, make
from utils.errors import UserError

ROWS = [(name, row) for name, case in GOLDEN["cases"].items() for row in case.get("cascade", ())]


def near(value: float) -> object:
    return pytest.approx(value, rel=1e-6, abs=1e-9)


@functools.cache
def _stages(name: str, order: tuple[int, ...], rule: str, kind: str, split: str) -> tuple[Stages, Tensor]:
    case = make(name)
    logits, labels = (case.held, case.held_labels) if split == "held_out" else (case.test, case.test_labels)
    stages = run_stages(logits, order, rule, kind, labels_N=labels)
    return stages, stages.predictions_SN == labels


def stages_of(name: str, row: dict, split: str) -> tuple[Stages, Tensor, list[int]]:
    """(what the stages say, whether they are right, MACs in their order)."""
    order = tuple(s - 1 for s in row["order"])
    stages, right = _stages(name, order, row["rule"], row["confidence"], split)
    return stages, right, [GOLDEN["cases"][name]["case"]["macs"][s] for s in order]


def check(choice: Choice, expected: dict, name: str, row: dict) -> None:
    for split in ("held_out", "test"):
        stages, right, macs = stages_of(name, row, split)
        walk = walk_of(leave_stages(stages.confidence_SN, choice.thresholds), right, macs)
        figures = expected[split]
        assert (walk.right, list(walk.left_S)) == (figures["correct"], figures["leaving"])
        assert walk.macs / right.shape[1] == near(figures["average_macs"])
        if "lost" in figures:
            assert (walk.lost, walk.won) == (figures["lost"], figures["won"])
        if split == "held_out":
            assert walk == choice.walk


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_golden_choices(name: str, row: dict) -> None:
    case = make(name)
    order = greedy_order(case.held, case.held_labels, case.numbers["macs"], row["rule"])
    assert [s + 1 for s in order] == row["order"]
    stages, right, macs = stages_of(name, row, "held_out")
    assert int(right[-1].sum()) == row["full"]["held_out_correct"]
    assert sum(macs) == row["full"]["macs"]
    each = EachStage(stages.confidence_SN, right, macs)
    assert [len(cuts) for cuts in each.cuts] == row["cuts"]
    for expected in row["targets"]:
        target = target_of(expected)
        choice = each.choose(target)
        assert choice.thresholds == [near(value) for value in expected["thresholds"]]
        check(choice, expected, name, row)
    walks = shared_walks(stages.confidence_SN, right, macs)
    for expected in row["one"]:
        choice = choose_shared(walks, target_of(expected), macs)
        assert choice.thresholds[0] == near(expected["threshold"])
        check(choice, expected, name, row)


def target_of(expected: dict) -> Target:
    if expected["target"] == "budget":
        return Target("budget", budget=expected["value"])
    return Target(expected["target"], tolerance=expected["value"] or 0.0)


@pytest.mark.parametrize("name", [name for name, case in GOLDEN["cases"].items() if "window_two_stages" in case])
def test_golden_windows(name: str) -> None:
    case, golden = make(name), GOLDEN["cases"][name]["window_two_stages"]
    order = greedy_order(case.held, case.held_labels, case.numbers["macs"], golden["rule"])

    def two_stages(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        stages = run_stages(logits, order, golden["rule"], "max_prob", labels_N=labels)
        return stages.confidence_SN[[0, -1]], stages.predictions_SN[[0, -1]] != labels

    confidence, wrong = two_stages(case.held, case.held_labels)
    test_confidence, test_wrong = two_stages(case.test, case.test_labels)
    for row in golden["rows"]:
        window = fit_window(confidence[0], wrong[0], row["task"], row["value"], 0.1)
        assert window.tau == near(row["tau"])
        assert window.rejected == near(row["rejected"])
        assert window.low == near(row["lo"])
        assert window.high == near(row["hi"])
        stage = window_stages(test_confidence, [(window.low, window.high)])
        assert float(stage.double().mean()) == near(row["going_on"])
        found = selective_figures(at_stage(test_confidence, stage), at_stage(test_wrong, stage))
        for key, value in found.items():
            assert value == near(row["selective"][key]), key


def test_nothing_kept_gives_a_window_at_the_top() -> None:
    confidence = torch.linspace(0.5, 0.9, 11, dtype=torch.float64)
    window = fit_window(confidence, torch.ones(11, dtype=torch.bool), "risk", 0.05, 0.1)
    assert (window.tau, window.rejected) == (2.0, 1.0)
    assert (window.low, window.high) == (pytest.approx(0.86), pytest.approx(0.9))


def draw(networks: int, images: int = 60, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    logits = torch.randn(networks, images, classes, generator=generator)
    logits[:, torch.arange(images), labels] += 2 * torch.rand(images, generator=generator)
    return logits, labels


@pytest.mark.parametrize("kind", CONFIDENCES)
def test_thresholds_of_nobody_and_everybody(kind: str) -> None:
    """t = 2: the full ensemble, bit for bit; t = 0: the first network."""
    logits, labels = draw(3)
    stages = run_stages(logits, [2, 0, 1], "mean_softmax", kind, labels_N=labels)
    nobody, everybody = (leave_stages(stages.confidence_SN, [t, t]) for t in (NOBODY, 0.0))
    assert nobody.tolist() == [2] * 60
    assert everybody.tolist() == [0] * 60
    assert torch.equal(at_stage(stages.predictions_SN, everybody), logits[2].argmax(dim=-1))


def test_nan_never_leaves_early() -> None:
    confidence = torch.tensor([[math.nan, 0.5], [math.nan, 0.9], [0.1, 0.1]], dtype=torch.float64)
    assert leave_stages(confidence, [0.0, 0.0]).tolist() == [2, 0]
    assert window_stages(confidence, [(0.0, 1.0), (0.0, 0.2)]).tolist() == [2, 1]
    assert candidate_cuts(torch.tensor([0.25, math.nan, 0.75])) == [0.0, 0.5, 2.0]


def test_cuts_are_thinned_evenly() -> None:
    values = torch.arange(1000, dtype=torch.float64) / 1000
    cuts = candidate_cuts(values)
    assert len(cuts) == 130
    assert (cuts[1], cuts[128]) == (pytest.approx(0.0005), pytest.approx(0.9985))
    assert cuts == sorted(cuts)
    near_one = torch.tensor([1.0, math.nextafter(1.0, 2.0)], dtype=torch.float64)
    assert candidate_cuts(near_one)[1] == float(near_one[1])


def test_the_best_order_of_equal_networks_starts_with_the_best() -> None:
    logits, labels = draw(4)
    logits[2, torch.arange(60), labels] += 5
    order = greedy_order(logits, labels, [7, 7, 7, 7], "mean_logits")
    assert order[0] == 2
    assert sorted(order) == [0, 1, 2, 3]
    assert greedy_order(logits, labels, [7, 5, 7, 6], "mean_logits")[:3] == [1, 3, 2]


def test_permuted_images_give_the_same_choice() -> None:
    logits, labels = draw(3, images=200)
    shuffled = torch.randperm(200, generator=torch.Generator().manual_seed(5))
    found = []
    for z, y in ((logits, labels), (logits[:, shuffled], labels[shuffled])):
        stages = run_stages(z, [0, 1, 2], "mean_logits", "margin", labels_N=y)
        right = stages.predictions_SN == y
        each = EachStage(stages.confidence_SN, right, [3, 3, 3])
        shared = choose_shared(shared_walks(stages.confidence_SN, right, [3, 3, 3]), Target(), [3, 3, 3])
        found.append((shared, each.choose(Target())))
    assert found[0] == found[1]


def test_each_is_at_least_as_good_as_every_pair_of_cuts() -> None:
    """S = 2: exhaustive search finds nothing better, for every target."""
    logits, labels = draw(2, images=100)
    stages = run_stages(logits, [0, 1], "mean_logits", "margin", labels_N=labels)
    right, macs = stages.predictions_SN == labels, [2, 3]
    every = shared_walks(stages.confidence_SN, right, macs)
    each = EachStage(stages.confidence_SN, right, macs)
    full = int(right[-1].sum())
    best = min(every, key=lambda one: (-one.walk.right, one.walk.macs, one.thresholds))
    assert each.choose(Target("best")) == best
    within = [one for one in every if one.walk.macs <= 300]
    cheapest = min(within, key=lambda one: (-one.walk.right, one.walk.macs)).walk
    assert each.choose(Target("budget", budget=3)).walk == cheapest
    safe = [one for one in every if one.walk.right >= full - 1]
    fewest = min(safe, key=lambda one: (one.walk.macs, -one.walk.right)).walk
    assert each.choose(Target(tolerance=1.0)).walk == fewest


def test_no_loss_stops_at_the_first_failure() -> None:
    """A lucky dip below a cut that fails is not taken."""

    def walk(lost: int, won: int, macs: int, cut: float) -> Choice:
        left = (50, 50)
        return Choice(
            [cut],
            walk_of(torch.zeros(0, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.bool), [1, 1])._replace(
                lost=lost, won=won, macs=macs, left_S=left, right=50
            ),
        )

    walks = [walk(0, 0, 100, 0.0), walk(9, 0, 110, 0.3), walk(1, 1, 150, 0.6), walk(0, 0, 200, 2.0)]
    assert choose_shared(walks, Target(tolerance=2.0, margin=1.0), [1, 1]).thresholds == [0.6]
    assert choose_shared(walks, Target(tolerance=1.0, margin=1.0), [1, 1]).thresholds == [2.0]
    assert choose_shared(walks, Target(tolerance=0.0, margin=0.0), [1, 1]).thresholds == [0.6]


def test_bad_budgets_and_too_many_stages() -> None:
    logits, labels = draw(9)
    stages = run_stages(logits, range(9), "mean_logits", "margin", labels_N=labels)
    right = stages.predictions_SN == labels
    walks = shared_walks(stages.confidence_SN, right, [10] * 9)
    with pytest.raises(UserError, match=r"--cascade_budget 0\.1: 9 MACs are less than the 10 of the first network"):
        choose_shared(walks, Target("budget", budget=0.1), [10] * 9)
    assert choose_shared(walks, Target("budget", budget=10.5), [10] * 9).walk.left_S[0] == 60
    with pytest.raises(UserError, match="--cascade_thresholds each takes 2 to 8 networks, not 9"):
        EachStage(stages.confidence_SN, right, [10] * 9)


def test_pareto_set_and_curve() -> None:
    logits, labels = draw(3, images=300)
    stages = run_stages(logits, [0, 1, 2], "mean_logits", "margin", labels_N=labels)
    right = stages.predictions_SN == labels
    front = EachStage(stages.confidence_SN, right, [1, 1, 1]).pareto(30)
    for one, other in itertools.pairwise(front):
        assert one.walk.macs < other.walk.macs
        assert one.walk.right < other.walk.right
    curve = curve_of(shared_walks(stages.confidence_SN, right, [1, 1, 1]))
    assert len(curve) == 30
    assert (curve[0].thresholds, curve[-1].thresholds) == ([0.0, 0.0], [2.0, 2.0])


def test_golden_confidences() -> None:
    golden = GOLDEN["confidence"]
    scores = torch.tensor(golden["scores"], dtype=torch.float64)
    for kind in CONFIDENCES:
        assert confidence_of(scores, kind).tolist() == [near(value) for value in golden[kind]]
        assert confidence_of(torch.zeros(2, 1), kind).tolist() == [1.0, 1.0]
        assert math.isnan(confidence_of(torch.tensor([[math.nan, 0.0]]), kind).item())
        assert math.isnan(confidence_of(torch.tensor([[math.nan]]), kind).item())
    for name, case in GOLDEN["cases"].items():
        made = make(name)
        for kind, rows in case["confidence"].items():
            # the ensembles of the first k networks, in the order of their numbers
            found = run_stages(made.test[:, :3], range(made.numbers["S"]), "mean_logits", kind).confidence_SN
            assert found.tolist() == [[near(value) for value in row] for row in rows]


def test_quantiles_are_linear() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.rand(17, dtype=torch.float64, generator=generator)
    shares = torch.tensor([0.0, 0.13, 0.5, 0.99, 1.0], dtype=torch.float64)
    assert torch.allclose(quantiles(values, shares), torch.quantile(values, shares))


def test_sign_test() -> None:
    assert sign_test(0, 0) == 1
    assert sign_test(5, 5) == 1
    assert sign_test(0, 5) == pytest.approx(2 / 32)
    assert sign_test(106, 69) == pytest.approx(sign_test(69, 106))
    assert sign_test(9, 1) == pytest.approx(2 * 11 / 1024)
