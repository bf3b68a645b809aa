"""Distillation from a trained teacher: KD (Hinton et al., arXiv:1503.02531) and DKD (Zhao et al., arXiv:2203.08679)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loss import at_least_float32
from loss.classification import CROSS_ENTROPY, ClassLoss
from loss.distillation import distillation_kl, joint_teacher, mixed_decoupled_kl
from method import Method, Progress, StepOutput, Targets, TrainingData, methods
from method.inner import Asleep, EpochNumber
from method.options.kd import KDOptions
from model.registry import ARGUMENTS, request_of
from model.restore import NetworkInfo, chosen_arch, restore_splitnet, stored_plan, stored_widths
from model.splitnet import SplitNet
from recipe.published import sgd_steps
from record.checkpoint import load_checkpoint, state_sha256
from utils.errors import UserError
from utils.text import one_line

# Published defaults (the code of arXiv:2203.08679) by kind of data and loss: T, weights a and b, alpha, beta, E.
_DEFAULTS: Mapping[tuple[bool, str], Mapping[str, Any]] = {
    (False, "kd"): {"kd_temperature": 4.0, "kd_ce_weight": 0.1, "kd_weight": 0.9},
    (True, "kd"): {"kd_temperature": 1.0, "kd_ce_weight": 0.5, "kd_weight": 0.5},
    (False, "dkd"): {"kd_temperature": 4.0, "kd_ce_weight": 1.0, "dkd_beta": 8.0, "dkd_warm_up_epochs": 20},
    (True, "dkd"): {"kd_temperature": 1.0, "kd_ce_weight": 1.0, "dkd_beta": 0.5, "dkd_warm_up_epochs": 1},
}


@methods.register("kd")
class Distillation(Method[KDOptions]):
    """Σ_s [ a · CE(s, labels) + b · T² KL(constant q ‖ softmax(s / T)) ], or DKD's two parts in place of the second.

    The teacher is frozen, in evaluation mode, and sees exactly the student's augmented, mixed and erased image in
    every step, one pass for each view (after Beyer et al., arXiv:2106.05237). Its weights are in no checkpoint of the
    students; its path and the hash of its weights are.

    Args:
        network: S students.
        options: flags.
        class_loss: what every prediction costs against the labels; smoothed labels do not touch the teacher's part.

    Raises:
        UserError: no teacher, one that cannot be read, or one for another number of classes.
    """

    Options = KDOptions
    exchanges = "the teacher's answers to the view of every network"

    def __init__(self, network: SplitNet, options: KDOptions, *, class_loss: ClassLoss = CROSS_ENTROPY) -> None:
        super().__init__(network, options, class_loss=class_loss)
        if options.teacher is None:
            raise UserError("--method kd needs a trained teacher: add --teacher PATH.")
        student = request_of(network.models[0])
        self._flag = f"--teacher {options.teacher}"
        teacher, self.teacher_info = restore_splitnet(
            load_checkpoint(options.teacher, "--teacher"),
            arch=options.teacher_arch,
            dataset=student.dataset,
            source=self._flag,
            arch_flag="teacher_arch",
        )
        if self.teacher_info.num_classes != student.num_classes:
            raise UserError(
                f"{self._flag}: knows {self.teacher_info.num_classes} classes, and the data has "
                f"{student.num_classes}: they must be the same ones, in the same order."
            )
        self.teacher_sha256 = state_sha256(teacher.state_dict())
        self.teacher = Asleep(teacher)
        self.warm_up = EpochNumber()
        self.register_buffer("_scale_3", torch.ones(3), persistent=False)
        self.register_buffer("_shift_3", torch.zeros(3), persistent=False)
        self._is_renormalised = False

    _scale_3: Tensor
    _shift_3: Tensor

    @classmethod
    def recipe(
        cls, dataset_recipe: str, epochs: int | None, given: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any]:
        """The published training on CIFAR and ImageNet, milestones scaled with the epochs; elsewhere the weights only.

        The published augmentation is crop and flip, without policy, erasing and mixup.
        """
        is_large = dataset_recipe == "imagenet"
        own = _DEFAULTS[is_large, (given or {}).get("kd_loss", "kd")]
        if not is_large and not dataset_recipe.startswith("cifar"):
            return own
        if is_large:
            rates = sgd_steps(epochs, usual=100, milestones=(30, 60, 90), batch_size=512, lr=0.2, weight_decay=1e-4)
        else:
            rates = sgd_steps(epochs, usual=240, milestones=(150, 180, 210), batch_size=64, lr=0.05, weight_decay=5e-4)
        return {**own, **rates}

    @classmethod
    def implied_flags(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """With --student_of 1, the structure of one of the teacher's networks."""
        if not given.get("student_of"):
            return {}
        for name in ("arch", "split_factor", "is_train_sep", "divide_by", "stage_widths"):
            if name in given:
                raise UserError(f"--student_of 1 takes the teacher's own network: leave --{name} away.")
        path = given.get("teacher")
        if path is None:
            raise UserError("--student_of 1 needs the teacher: add --teacher PATH.")
        content = load_checkpoint(path, "--teacher")
        trained = content.get("config")
        arch = trained.get("arch") if isinstance(trained, Mapping) else None
        if isinstance(arch, str):
            arch = chosen_arch(given.get("teacher_arch"), arch, f"--teacher {path}", "teacher_arch")
        factor = trained.get("split_factor") if isinstance(trained, Mapping) else None
        if not isinstance(arch, str) or "," in arch or not isinstance(factor, int):
            raise UserError(f"--student_of 1: --teacher {path} is no division of one network: give --arch.")
        assert isinstance(trained, Mapping)
        widths = stored_widths(content, f"--teacher {path}")
        implied = {"arch": arch, "split_factor": factor, "is_train_sep": True, "divide_by": trained.get("divide_by")}
        by_names = content.get("way") == ARGUMENTS  # numbers without order: `network_plan` has them
        return implied if widths is None or by_names else implied | {"stage_widths": widths}

    @classmethod
    def network_plan(cls, options: KDOptions) -> Mapping[str, Any]:
        """With --student_of 1, the teacher's plan where that is one of constructor arguments."""
        if not options.student_of or options.teacher is None:
            return {}
        content = load_checkpoint(options.teacher, "--teacher")
        return stored_plan(content, f"--teacher {options.teacher}") if content.get("way") == ARGUMENTS else {}

    def meet(self, data: TrainingData) -> None:
        """Hold the teacher against the data, and find the map from the student's normalisation to the teacher's."""
        info = self.teacher_info
        names = tuple(one_line(str(name)) for name in data.classes)
        if info.classes is not None and info.classes != names:
            at = next(i for i, (theirs, ours) in enumerate(zip(info.classes, names, strict=True)) if theirs != ours)
            raise UserError(
                f"{self._flag}: its class {at} is {info.classes[at]!r}, and the data's is {names[at]!r}: they must be "
                "the same ones, in the same order."
            )
        if info.crop_size != data.crop_size and (info.classes is not None or info.mean is not None):
            raise UserError(
                f"{self._flag}: was trained on images of {info.crop_size} pixels, and these have {data.crop_size}: "
                f"give --crop_size {info.crop_size}."
            )
        theirs = _statistics(info, data)
        if theirs == (tuple(data.mean), tuple(data.std)):
            return
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in theirs)
        own_mean, own_std = (torch.tensor(values, dtype=torch.float64) for values in (data.mean, data.std))
        self._scale_3.copy_(own_std / std)
        self._shift_3.copy_((own_mean - mean) / std)
        self._is_renormalised = True

    def before_step(self, views_SBCHW: Tensor, targets: Targets, progress: Progress) -> None:
        """Bring DKD's warm-up up to date: min(e / E, 1), the epoch e counted from 1."""
        length = self.options.dkd_warm_up_epochs if self.options.kd_loss == "dkd" else 0
        self.warm_up.write(min((progress.epoch + 1) / length, 1.0) if length else 1.0)

    def forward(self, views_SBCHW: Tensor, targets: Targets, progress: Progress) -> StepOutput:
        """Views [S, B, C, H, W], or one shared view -> loss, metrics, logits [S, B, K].

        Metrics, summed over the students and weighted: loss_ce, and loss_kd or loss_dkd.
        """
        logits_SBK = at_least_float32(self.network(views_SBCHW))
        teachers_VBK = [self.teach(view_BCHW) for view_BCHW in self._views(views_SBCHW)]
        if len(teachers_VBK) == 1:
            teachers_VBK = teachers_VBK * len(logits_SBK)
        loss_ce = self.options.kd_ce_weight * self.summed_class_loss(logits_SBK, targets)
        distilled = [self._distilled(*pair, targets) for pair in zip(logits_SBK, teachers_VBK, strict=True)]
        loss_kd = torch.stack(distilled).sum()
        metrics = {"loss_ce": loss_ce.detach(), f"loss_{self.options.kd_loss}": loss_kd.detach()}
        return StepOutput(loss_ce + loss_kd, metrics, logits_SBK.detach())

    def teach(self, view_BCHW: Tensor) -> Tensor:
        """The teacher's logits [B, K] for the student's images [B, C, H, W]; softmax(logits / T) is its answer q."""
        if self._is_renormalised:
            scale, shift = (values[:, None, None].to(view_BCHW.dtype) for values in (self._scale_3, self._shift_3))
            view_BCHW = view_BCHW * scale + shift
        options = self.options
        return joint_teacher(self.teacher(view_BCHW), temperature=options.kd_temperature, rule=options.teacher_rule)

    def training_state(self) -> dict[str, Any]:
        """Which teacher it was; its weights stay where they are."""
        return {"teacher": self.options.teacher, "weights_sha256": self.teacher_sha256}

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Refuse another teacher than the run had before.

        Raises:
            UserError: the file holds other weights.
        """
        if state["weights_sha256"] != self.teacher_sha256:
            raise UserError(
                f"{self._flag}: holds other weights than the teacher of the run before ({state['teacher']}): "
                "give that one, or start anew."
            )

    def _views(self, views_SBCHW: Tensor) -> Sequence[Tensor]:
        return [views_SBCHW] if views_SBCHW.dim() == 4 else [*views_SBCHW]

    def _distilled(self, student_BK: Tensor, teacher_BK: Tensor, targets: Targets) -> Tensor:
        """The teacher's part of one student's loss, weighted."""
        options = self.options
        if options.kd_loss == "kd":
            return (
                options.kd_weight * distillation_kl(student_BK, teacher_BK, temperature=options.kd_temperature).mean()
            )
        decoupled_B = mixed_decoupled_kl(
            student_BK,
            teacher_BK,
            targets,
            temperature=options.kd_temperature,
            alpha=options.dkd_alpha,
            beta=options.dkd_beta,
        )
        return self.warm_up(decoupled_B.dtype) * decoupled_B.mean()


def _statistics(info: NetworkInfo, data: TrainingData) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation that the teacher's images had; the data's own where its file does not say."""
    return tuple(info.mean or data.mean), tuple(info.std or data.std)
