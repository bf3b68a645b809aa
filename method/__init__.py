"""Ways of learning together: one file a method, their contract with the trainer, and their flags."""

from typing import TYPE_CHECKING

from method.options import NoOptions, method_options
from utils.lazy import lazily

if TYPE_CHECKING:
    from method.contract import Method, Progress, StepOutput, Targets, TrainingData, methods

__all__ = ["Method", "NoOptions", "Progress", "StepOutput", "Targets", "TrainingData", "method_options", "methods"]
__getattr__ = lazily(__name__, "contract")
