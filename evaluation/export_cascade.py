"""A tuned cascade as one file that runs without this project, for one image at a time: .pt2 or .onnx.

Written flat: scores and their number are carried through, and each further network is one `torch.cond` (in ONNX one
`If`). Nested conditions would store the weights of the tail again and again. K classes.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from evaluation.answers import Answers
from evaluation.export import own_warnings_ignored, require
from evaluation.selective import plogp
from model.fold import fold_batch_norm
from model.splitnet import SplitNet
from utils.precision import lay_out

CASCADE_OUTPUTS = ("ensemble", "networks")

ExportedCascade = Callable[[Tensor], tuple[Tensor, int]]


class FlatCascade(nn.Module):
    """One image [1, 3, H, W] -> (scores of the stage that answered [1, K], how many networks ran, int64 [1]).

    Args:
        networks: in the order in which they run.
        answers: with a cascade.
    """

    def __init__(self, networks: Sequence[nn.Module], answers: Answers) -> None:
        super().__init__()
        cascade = answers.cascade
        assert cascade is not None
        self.models = nn.ModuleList(networks)
        self.rule, self.confidence = answers.rule, cascade.confidence
        own, of_stages = answers.network_temperatures(), answers.stage_temperatures()
        order, size = cascade.order, len(networks)
        self.temperatures: Tensor
        self.stage_temperatures: Tensor
        self.bounds: Tensor
        self.register_buffer("temperatures", torch.tensor([1.0] * size if own is None else [own[s] for s in order]))
        self.register_buffer("stage_temperatures", torch.tensor([1.0] * size if of_stages is None else [*of_stages]))
        # an image goes on where low <= c <= high; of a threshold t where not c >= t, so that low is out of reach
        self.is_window = cascade.kind == "window"
        self.register_buffer("bounds", torch.tensor([[*bounds] for bounds in cascade.bounds]))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        carried = self._own(images, 0)
        count = torch.ones(1, dtype=torch.int64)
        for k in range(1, len(self.models)):
            goes_on = self._goes_on(self._scores(carried, count), k - 1) & (count == k)

            def add(images: Tensor, carried: Tensor, count: Tensor, k: int = k) -> tuple[Tensor, Tensor]:
                return self._joined(carried, self._own(images, k)), count + 1

            def keep(images: Tensor, carried: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
                return carried * 1.0, count * 1  # branches must give new tensors

            carried, count = torch.cond(goes_on, add, keep, (images, carried, count))
        return self._scores(carried, count), count

    def _own(self, images: Tensor, k: int) -> Tensor:
        """What one network adds."""
        logits_BK = self.models[k](images) / self.temperatures[k]
        return logits_BK if self.rule.endswith("logits") else logits_BK.log_softmax(dim=-1)

    def _joined(self, carried: Tensor, own: Tensor) -> Tensor:
        if self.rule == "mean_softmax":
            return torch.stack([carried, own]).logsumexp(dim=0)
        return torch.maximum(carried, own) if self.rule.startswith("max") else carried + own

    def _scores(self, carried: Tensor, count: Tensor) -> Tensor:
        return carried / count if self.rule in ("mean_logits", "geometric_mean") else carried * 1.0

    def _goes_on(self, scores_BK: Tensor, stage: int) -> Tensor:
        log_probs_BK = (scores_BK / self.stage_temperatures[stage]).log_softmax(dim=-1)
        if self.confidence == "max_prob":
            confidence_B = log_probs_BK.amax(dim=-1).exp()
        elif self.confidence == "margin":
            best_B2 = log_probs_BK.topk(2, dim=-1).values.exp()
            confidence_B = best_B2[:, 0] - best_B2[:, 1]
        else:
            classes = torch.tensor(float(scores_BK.shape[-1]))
            confidence_B = 1 + plogp(log_probs_BK).sum(dim=-1) / classes.log()
        if self.is_window:
            return ~((confidence_B < self.bounds[stage, 0]) | (confidence_B > self.bounds[stage, 1]))
        return ~(confidence_B >= self.bounds[stage, 0])


def export_cascade(network: SplitNet, answers: Answers, image_shape: Sequence[int]) -> ExportedProgram:
    """The cascade as one graph for one image, in evaluation mode, batch norm folded; `network` is left as it was.

    Args:
        image_shape: [C, H, W] of the image.
    """
    cascade = answers.cascade
    assert cascade is not None
    folded = fold_batch_norm(network, image_shape)
    assert isinstance(folded, SplitNet)
    lay_out(folded, torch.contiguous_format)
    flat = FlatCascade([folded.models[s] for s in cascade.order], answers).eval()
    with torch.no_grad():
        return torch.export.export(flat, (torch.zeros(1, *image_shape),))


def load_cascade(path: Path) -> ExportedCascade:
    """An exported cascade as image [1, C, H, W] -> (scores [1, K], how many networks ran).

    Raises:
        UserError: a package for .onnx is missing.
    """
    if path.suffix == ".onnx":
        require(("onnxruntime",))
        import onnxruntime

        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])

        def run(image_1CHW: Tensor) -> tuple[Tensor, int]:
            scores, count = session.run(list(CASCADE_OUTPUTS), {"images": image_1CHW.contiguous().numpy()})
            return torch.from_numpy(scores), int(count[0])

        return run
    with own_warnings_ignored():
        module = torch.export.load(io.BytesIO(path.read_bytes())).module()

    def run_program(image_1CHW: Tensor) -> tuple[Tensor, int]:
        scores, count = module(image_1CHW)
        return scores, int(count)

    return run_program
