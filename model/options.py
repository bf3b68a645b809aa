"""Flags of the networks, and of single families of backbones; read before torch is imported."""

import re
from dataclasses import dataclass

from model.registry import DIVIDE_BY
from utils.errors import UserError
from utils.options import OF_CALL, SAME, TAKES, Options, option

EXECUTIONS = ("loop", "parallel", "stacked", "auto")  # of the S networks, see model/execution/
WEIGHTS = ("auto", "raw", "ema")  # of a checkpoint
POOLS = ("avg", "max", "avgmax")  # before the head of Cream's networks
AUTO = "auto"  # widths of Packed-Ensembles that are solved
FREEZE = re.compile(r"stem|backbone|stages:([1-9]\d*)")
_EXPECTED = "stem, stages:N (the stem and the first N stages) or backbone (all but the classifier)"


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
        "width of every stage of one network, in the order and number of `python -m model.division ARCH`, for networks "
        "of ours with --by_channels, in place of the family's table or what the solver finds",
        above=0,
        default_text="as divided",
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


@dataclass(frozen=True, kw_only=True)
class CreamOptions(Options):
    """Cream networks and search space"""

    arch_list: str = option(
        "[[0],[3],[3,3],[3,1,3],[3,3,3,3],[3,3,3],[0]]",
        "network of --arch cream, as found.yaml of a search has it",
        resume=SAME,
    )
    honour_single_block: bool = option(
        False, "a stage of one block is what its index says; the released networks ignore that index", resume=SAME
    )
    dropout_rate: float = option(
        0.0, "dropout before the classifier of Cream networks, divided by sqrt(S)", least=0, below=1, resume=TAKES
    )
    global_pool: str = option("avg", "pooling before the head of Cream networks", choices=POOLS, resume=SAME)
    search_space: str | None = option(
        None,
        "YAML file, or YAML text, of a search space",
        default_text="the published space",
        metavar="FILE",
        resume=SAME,
    )
    flops_minimum: float = option(
        0.0, "lower end of the interval that sizes the supernet", unit="million operations", resume=SAME
    )
    flops_maximum: float = option(600.0, "upper end of that interval", unit="million operations", resume=SAME)
    sta_num: tuple[int, ...] = option(
        (), "blocks of every searchable stage, in place of that sizing", least=1, resume=SAME
    )
    slice: int = option(4, "images that an entry of the board keeps", unit="images per process", least=1, resume=SAME)


@dataclass(frozen=True, kw_only=True)
class DenseNetOptions(Options):
    """Flags of the DenseNets."""

    is_efficient_densenet: bool = option(
        False, "DenseNet: recompute half of each layer in the backward pass to save memory; same results", resume=TAKES
    )
    is_official_densenet: bool = option(
        True, "DenseNet: 1 the official implementation, 0 the variant densenet3", resume=SAME
    )
    densenet_p_shakedrop: float = option(
        0.0, "DenseNet: ShakeDrop rate of the last layer before division; 0 is off", least=0, most=1, resume=SAME
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.densenet_p_shakedrop and not self.is_official_densenet:
            raise UserError(
                f"--densenet_p_shakedrop {self.densenet_p_shakedrop} exists in the official DenseNet only: "
                "pass --is_official_densenet 1, or leave the rate at 0."
            )


@dataclass(frozen=True, kw_only=True)
class EfficientNetOptions(Options):
    """Flags of the EfficientNets."""

    is_lukemelas_efficientnet: bool = option(
        False, "EfficientNet: 1 the implementation of the released ImageNet weights, 0 LightNet++", resume=SAME
    )
    is_memory_efficient_swish: bool = option(
        True, "EfficientNet: swish that stores only its input for the backward pass", resume=TAKES
    )
    is_efficientnet_user_crop: bool = option(
        False,
        "EfficientNet on imagenet: 1 keeps --crop_size, 0 takes the size that belongs to the network",
        resume=SAME,
    )


@dataclass(frozen=True, kw_only=True)
class WrnOptions(Options):
    """Backbone family: wrn"""

    wrn_dropout: float = option(
        0.0,
        "dropout rate between the convolutions of a wrn_D_K block (published: 0 and 0.3)",
        least=0,
        below=1,
        resume=TAKES,
    )


@dataclass(frozen=True, kw_only=True)
class LibraryOptions(Options):
    """Networks of torchvision and timm"""

    drop_path: float | None = option(
        None,
        "rate of stochastic depth in the last block, before it is divided by sqrt(S)",
        default_text="the recipe's, else the library's own",
        least=0,
        below=1,
        resume=TAKES,
    )


FAMILIES: tuple[type, ...] = (CreamOptions, DenseNetOptions, EfficientNetOptions, WrnOptions, LibraryOptions)


def check_freeze(what: str) -> None:
    """Refuse a --freeze that is none.

    Raises:
        UserError: it is neither of the three.
    """
    if not FREEZE.fullmatch(what):
        raise UserError(f"--freeze {what}: expected {_EXPECTED}.")
