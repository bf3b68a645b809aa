"""The entry `answers`: written, read back, refused where damaged; and a running cascade beside stored logits."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from evaluation.answers import Answers, CascadeAnswers, check_tuned_for, read_answers, read_answers_file
from evaluation.calibration import Temperatures
from evaluation.cascade import at_stage
from evaluation.conformal import Conformal
from evaluation.ensemble import ensemble_scores
from model.cascade import Cascade
from utils.errors import UserError


def answers_of(
    bounds: tuple[tuple[float, ...], ...] = ((0.4,), (0.3,)), kind: str = "leave", mode: str = "both"
) -> Answers:
    return Answers(
        weights="raw",
        weights_sha256="ab",
        rule="mean_softmax",
        tuned_on={"source": "val", "images": 100},
        mode=mode,
        temperatures=Temperatures(ensemble=1.5, networks=(1.0, 2.0, 0.5), both=1.1, stages=(1.2, 1.3, 1.1)),
        cascade=CascadeAnswers(
            kind=kind,
            order=(2, 0, 1),
            confidence="margin",
            bounds=bounds,
            accept=0.5 if kind == "window" else None,
            target={"name": "no_loss"},
            macs=(5, 6, 7),
            held_out={"acc1": 90.0},
        ),
        conformal=(Conformal(kind="raps", alpha=0.1, q=None, penalty=0.1, free_ranks=1, randomised=True),),
        held_out={"ensemble": {"acc1": 91.0}},
    )


@pytest.mark.parametrize("answers", [answers_of(), answers_of(((0.2, 0.4), (0.1, 0.9)), "window")])
def test_read_back(answers: Answers, tmp_path: Path) -> None:
    assert read_answers(answers.as_dict(), 3, "answers of X") == answers
    path = tmp_path / "answers.json"
    path.write_text(answers.as_json())
    assert read_answers_file(path, 3) == answers


def test_without_temperatures_and_cascade() -> None:
    values = answers_of().as_dict() | {"calibration": None, "cascade": None, "conformal": []}
    read = read_answers(values, 3, "answers of X")
    assert (read.mode, read.temperatures, read.cascade, read.conformal) == ("none", None, None, ())
    assert read.stage_temperatures() is None
    assert read.network_temperatures() is None


DAMAGES: list[tuple[tuple[Any, ...], Any, str]] = [
    (("format_version",), 2, "format_version"),
    (("rule",), "median", "rule"),
    (("weights",), 3, "weights"),
    (("weights_sha256",), None, "weights_sha256"),
    (("tuned_on",), [1], "tuned_on"),
    (("tuned_on",), {}, "tuned_on.source"),
    (("calibration",), "warm", "calibration"),
    (("calibration", "mode"), "hot", "calibration.mode"),
    (("calibration", "ensemble"), math.nan, "calibration.ensemble"),
    (("calibration", "ensemble"), 21.0, "calibration.ensemble"),
    (("calibration", "ensemble"), "1.0", "calibration.ensemble"),
    (("calibration", "both"), True, "calibration.both"),
    (("calibration", "networks"), [1.0, 1.0], "calibration.networks"),
    (("calibration", "networks"), [1.0, 1.0, 0.01], "calibration.networks"),
    (("calibration", "stages"), [1.0], "calibration.stages"),
    (("cascade", "kind"), "lift", "cascade.kind"),
    (("cascade", "order"), [1, 2, 2], "cascade.order"),
    (("cascade", "order"), [1, 2], "cascade.order"),
    (("cascade", "confidence"), "luck", "cascade.confidence"),
    (("cascade", "thresholds"), [0.1], "cascade.thresholds"),
    (("cascade", "thresholds"), [0.1, 2.5], "cascade.thresholds"),
    (("cascade", "thresholds"), [0.1, None], "cascade.thresholds"),
    (("cascade", "thresholds"), "0.1", "cascade.thresholds"),
    (("cascade", "macs"), [1, 2, -3], "cascade.macs"),
    (("cascade", "accept"), 3, "cascade.accept"),
    (("conformal",), {}, "conformal"),
    (("conformal", 0, "kind"), "box", r"conformal\[0\].kind"),
    (("conformal", 0, "alpha"), math.inf, r"conformal\[0\].alpha"),
    (("conformal", 0, "randomised"), 1, r"conformal\[0\].randomised"),
    (("cascade", "macs"), [0, 1, 1], "cascade.macs"),
    (("calibration", "both"), 10**400, "calibration.both"),  # JSON has such numbers
    (("cascade", "held_out"), 3, "cascade.held_out"),
    (("cascade", "held_out", "acc1"), "90", "cascade.held_out.acc1"),
    (("cascade", "held_out", "networks_acc1"), [90.0, 91.0], "cascade.held_out.networks_acc1"),
    (("cascade", "held_out", "stages_acc1"), [90.0, "91", 92.0], "cascade.held_out.stages_acc1"),
    (("cascade", "held_out", "curve"), "steep", "cascade.held_out.curve"),
    (("cascade", "held_out", "curve"), [{"acc1": 90.0}], r"cascade.held_out.curve\[0\].thresholds"),
    (("cascade", "held_out", "curve"), [{"thresholds": [0, 2], "acc1": []}], r"cascade.held_out.curve\[0\].acc1"),
    (("held_out",), [], "held_out"),
    (("held_out", "calibration"), 3, "held_out.calibration"),
    (("held_out", "calibration"), [{"when": "before"}], r"held_out.calibration\[0\].what"),
    (("held_out", "calibration"), [{"what": "a", "when": "b", "split": "c", "nll": "d"}], r"calibration\[0\].nll"),
]


@pytest.mark.parametrize(("where", "value", "named"), DAMAGES)
def test_damage_is_named(where: tuple[Any, ...], value: object, named: str) -> None:
    values: Any = copy.deepcopy(answers_of().as_dict())
    inner = values
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    with pytest.raises(UserError, match=f"answers of X: .*{named}.* damaged"):
        read_answers(values, 3, "answers of X")


@pytest.mark.parametrize(
    "windows", [[[0.1, 0.2]], [[0.1, 0.2], [0.3]], [[0.1, 0.2], [0.5, 0.3]], "ab", [[0, 1], [0, "1"]]]
)
def test_damaged_windows_are_named(windows: object) -> None:
    values = answers_of(((0.2, 0.4), (0.1, 0.9)), "window").as_dict()
    values["cascade"]["windows"] = windows
    with pytest.raises(UserError, match=r"cascade.windows is damaged"):
        read_answers(values, 3, "answers of X")


def test_what_is_no_file_of_answers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--answers .*missing.json: cannot be read as JSON"):
        read_answers_file(tmp_path / "missing.json", 3)
    (tmp_path / "list.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match=r"list.json: they are damaged"):
        read_answers_file(tmp_path / "list.json", 3)


def test_other_networks_are_refused() -> None:
    answers = answers_of()
    same = {"weights_sha256": "ab", "weights": "raw", "rule": "mean_softmax", "source": "answers of X"}
    check_tuned_for(answers, **same)
    for other in ({"weights_sha256": "cd"}, {"weights": "ema"}, {"rule": "mean_logits"}):
        with pytest.raises(UserError, match=r"answers of X: tuned for .*: tune again"):
            check_tuned_for(answers, **{**same, **other})


class Counting(nn.Module):
    """A linear network that counts the images it sees."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = 0.5 * torch.randn(12, 5, generator=torch.Generator().manual_seed(seed))
        self.seen = 0

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        self.seen += len(images_BCHW)
        return images_BCHW.flatten(1) @ self.weight


@pytest.mark.parametrize("kind", ["leave", "window"])
@pytest.mark.parametrize("mode", ["both", "ensemble"])
@pytest.mark.parametrize("batch", [1, 7, 128])
def test_running_gives_what_stored_logits_say(batch: int, mode: str, kind: str) -> None:
    bounds = ((0.6,), (0.3,)) if kind == "leave" else ((0.1, 0.7), (0.1, 0.5))
    answers = answers_of(bounds, kind, mode)
    networks = [Counting(seed) for seed in range(3)]
    images = torch.randn(128, 3, 2, 2, generator=torch.Generator().manual_seed(9))
    logits = torch.stack([torch.cat([network(one) for one in images.split(batch)]) for network in networks])
    stages = answers.stages(logits)
    stage = answers.cascade.leave(stages.confidence_SN)
    assert len(stage.unique()) == 3
    for network in networks:
        network.seen = 0
    parts = [answers.running_cascade(networks)(one) for one in images.split(batch)]
    assert torch.equal(torch.cat([part.stage_B for part in parts]), stage)
    scores = torch.cat([part.scores_BK for part in parts])
    assert torch.equal(scores.argmax(dim=-1), at_stage(stages.predictions_SN, stage))
    log_probs = answers.stage_log_probs(scores, stage)
    assert torch.allclose(log_probs.amax(dim=-1).exp(), at_stage(stages.max_prob_SN, stage), rtol=1e-5)
    ran = torch.cat([part.logits_SBK for part in parts], dim=1)
    used = [int((stage >= answers.cascade.order.index(s)).sum()) for s in range(3)]
    assert [network.seen for network in networks] == used
    assert [int((~ran[s].isnan().any(dim=-1)).sum()) for s in range(3)] == used


def test_nobody_leaves_is_the_full_ensemble() -> None:
    answers = answers_of(((2.0,), (2.0,)), mode="ensemble")
    networks = [Counting(seed) for seed in range(3)]
    images = torch.randn(33, 3, 2, 2, generator=torch.Generator().manual_seed(9))
    found = answers.running_cascade(networks)(images)
    ordered = torch.stack([networks[s](images) for s in (2, 0, 1)])
    assert torch.equal(found.scores_BK, ensemble_scores(ordered.double(), "mean_softmax"))
    assert found.stage_B.tolist() == [2] * 33
    assert not found.logits_SBK.isnan().any()


def test_an_order_that_is_none() -> None:
    with pytest.raises(ValueError, match="order"):
        Cascade([Counting(0)], [1], scores=lambda a, k: a, confidence=lambda a, k: a, bounds=[])
