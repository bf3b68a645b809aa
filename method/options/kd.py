"""Flags of distillation from a trained teacher."""

from dataclasses import dataclass

from method.options import method_options
from utils.options import BY_RECIPE, OF_CALL, SAME, TAKES, Options, option

TEACHER_RULES = ("mean_softmax", "mean_logits")  # see loss.distillation.joint_teacher


@method_options.register("kd")
@dataclass(frozen=True, kw_only=True)
class KDOptions(Options):
    """Flags of distillation from a trained teacher."""

    teacher: str | None = option(
        None,
        "checkpoint that teaches: of this project, several networks too, or a released file (with --teacher_arch)",
        metavar="PATH",
        default_text="none: needed",
        resume=OF_CALL,
    )
    teacher_arch: str | None = option(
        None,
        "backbone of a teacher whose file does not say it",
        metavar="ARCH",
        default_text="as the file says",
        resume=OF_CALL,
    )
    teacher_rule: str = option(
        "mean_softmax",
        "what several teaching networks say together: the mean of their softened probabilities, or of their logits",
        choices=TEACHER_RULES,
        resume=TAKES,
    )
    student_of: bool = option(
        False, "the student is one of the teacher's own divided networks, in place of --arch", resume=SAME
    )
    kd_loss: str = option(
        "kd", "what is distilled: all classes at once, or decoupled", choices=("kd", "dkd"), resume=TAKES
    )
    kd_temperature: float = option(4.0, "temperature T", default_text=BY_RECIPE, above=0, resume=TAKES)
    kd_ce_weight: float = option(0.1, "weight a of the labels", default_text=BY_RECIPE, least=0, resume=TAKES)
    kd_weight: float = option(0.9, "weight b of the teacher (kd)", default_text=BY_RECIPE, least=0, resume=TAKES)
    dkd_alpha: float = option(1.0, "weight of the labelled class against the others (dkd)", least=0, resume=TAKES)
    dkd_beta: float = option(
        8.0, "weight of the other classes among themselves (dkd)", default_text=BY_RECIPE, least=0, resume=TAKES
    )
    dkd_warm_up_epochs: int = option(
        20, "linear rise of the teacher's weight (dkd)", unit="epochs", default_text=BY_RECIPE, least=0, resume=TAKES
    )
