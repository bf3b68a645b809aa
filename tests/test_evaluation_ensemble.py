"""The ensemble rules."""

import math

import pytest
import torch
from torch import Tensor

from evaluation.ensemble import RULES, ensemble_log_probs, ensemble_rule, ensemble_scores
from utils.errors import UserError


def logits_of(num_networks: int, batch: int = 4, num_classes: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(num_networks)
    return 4 * torch.randn(num_networks, batch, num_classes, generator=generator, dtype=torch.float64)


def by_hand(rule: str, logits_SK: list[list[float]]) -> list[float]:
    """Normalised probabilities of one image, class by class."""
    classes = range(len(logits_SK[0]))
    probs_SK = [[math.exp(v) / sum(math.exp(w) for w in row) for v in row] for row in logits_SK]
    count = len(logits_SK)
    scores = {
        "mean_logits": [math.exp(sum(row[k] for row in logits_SK) / count) for k in classes],
        "mean_softmax": [sum(row[k] for row in probs_SK) / count for k in classes],
        "max_logits": [math.exp(max(row[k] for row in logits_SK)) for k in classes],
        "max_softmax": [max(row[k] for row in probs_SK) for k in classes],
        "geometric_mean": [math.prod(row[k] for row in probs_SK) ** (1 / count) for k in classes],
    }[rule]
    return [score / sum(scores) for score in scores]


@pytest.mark.parametrize("num_networks", [1, 2, 4])
@pytest.mark.parametrize("rule", RULES)
def test_rules_equal_their_definitions(rule: str, num_networks: int) -> None:
    logits_SBK = logits_of(num_networks)
    probs_BK = ensemble_log_probs(logits_SBK, rule).exp()
    for image, probs_K in enumerate(probs_BK.tolist()):
        assert probs_K == pytest.approx(by_hand(rule, logits_SBK[:, image].tolist()), rel=1e-12)
    assert torch.equal(ensemble_scores(logits_SBK, rule).argmax(dim=-1), probs_BK.argmax(dim=-1))


def test_mean_of_logits_is_the_default() -> None:
    logits_SBK = logits_of(3)
    assert torch.equal(ensemble_log_probs(logits_SBK), ensemble_log_probs(logits_SBK, "mean_logits"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rule", RULES)
def test_low_precision_logits_are_combined_in_float32(rule: str, dtype: torch.dtype) -> None:
    logits_SBK = torch.tensor([[[1e4, -1e4]], [[-1e4, 9e3]]]).to(dtype)
    log_probs_BK = ensemble_log_probs(logits_SBK, rule)
    assert log_probs_BK.dtype == torch.float32
    assert log_probs_BK.isfinite().all()


def test_flags_name_the_rules() -> None:
    names = [ensemble_rule(after_softmax, maximum) for maximum in (False, True) for after_softmax in (False, True)]
    assert names == ["mean_logits", "mean_softmax", "max_logits", "max_softmax"]


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(UserError, match="Ensemble rule 'median' is not known"):
        ensemble_log_probs(logits_of(2), "median")
