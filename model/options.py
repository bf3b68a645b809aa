"""Flags of the networks; those of single families stand with their backbones."""

from dataclasses import dataclass

from model.division.plan import DIVIDE_BY
from utils.options import OF_CALL, SAME, TAKES, Options, option


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """Networks"""

    arch: str = option(
        "resnet50",
        "backbone: one of those listed below, torchvision/NAME, timm/NAME or FILE.py:FACTORY; a comma list of full "
        "networks where the method takes several",
        resume=SAME,
    )
    method: str = option("co_training", "how the networks learn together", resume=SAME)
    split_factor: int = option(1, "S: into how many small networks the backbone is divided", least=1, resume=SAME)
    divide_by: str | None = option(
        None,
        "what the S copies of a torchvision/NAME, timm/NAME or FILE.py:FACTORY match together",
        choices=DIVIDE_BY,
        default_text="params; our own backbones have the paper's tables",
        resume=SAME,
    )
    stage_widths: tuple[float, ...] = option(
        (),
        "width of every stage of one network, in the order and number of `python -m model.division ARCH`, in place of "
        "what the solver finds",
        above=0,
        default_text="solved",
        resume=SAME,
    )
    norm_mode: str = option("batch", "normalisation", choices=("batch",), resume=SAME)
    is_syncbn: bool = option(False, "synchronise batch normalisation across processes", resume=TAKES)
    output_stride: int = option(8, "2 selects the CIFAR strides 1, 1, 2 in the resnet family", resume=SAME)
    is_identical_init: bool = option(
        False,
        "start all networks from the weights of the first (ablation)",
        resume="the networks are those of the checkpoint",
    )
    is_train_sep: bool = option(False, "train one of the S small networks alone (ablation)", resume=SAME)
    freeze: str | None = option(
        None,
        "what is not trained: the stem; stages:N, the stem and the first N stages; or the backbone, all but the "
        "classifier. Its norms keep their statistics",
        metavar="stem|stages:N|backbone",
        resume=SAME,
    )
    gn_num_groups: int = option(8, "unused in the published code; accepted", resume=OF_CALL)
