"""Flags of layer-wise mutual contrastive learning."""

from dataclasses import dataclass

from method.options import method_options
from utils.options import SAME, TAKES, Options, option


@method_options.register("l_mcl")
@dataclass(frozen=True, kw_only=True)
class LMCLOptions(Options):
    """Flags of layer-wise mutual contrastive learning."""

    number_net: int = option(2, "networks behind a name lmcl_<backbone>", least=2, resume=SAME)
    contrast: str = option(
        "batch", "what an image is compared with: its batch, or memory banks", choices=("batch", "bank"), resume=SAME
    )
    feat_dim: int = option(128, "size of the space in which images are compared", least=1, resume=SAME)
    tau: float = option(0.1, "temperature of the contrast", above=0, resume=TAKES)
    kd_T: float = option(3.0, "temperature of the distillation from the aggregated predictions", above=0, resume=TAKES)
    soft_T: float | None = option(
        None, "second temperature of the soft contrast terms", default_text="--kd_T", above=0, resume=TAKES
    )
    alpha: float = option(0.1, "weight of the contrast inside each network (VCL)", least=0, resume=TAKES)
    beta: float = option(0.1, "weight of the contrast across networks (ICL)", least=0, resume=TAKES)
    gamma: float = option(1.0, "weight of the soft contrast inside each network (Soft-VCL)", least=0, resume=TAKES)
    lam: float = option(1.0, "weight of the soft contrast across networks (Soft-ICL)", least=0, resume=TAKES)
    times: int = option(2, "virtual steps on the contrast in a meta round", unit="steps", least=1, resume=TAKES)
    meta_freq: int = option(50, "interval between meta rounds", unit="steps", least=1, resume=TAKES)
    pos_k: int = option(
        1, "memory bank: positives per image beside its own entry", unit="images", least=1, resume=TAKES
    )
    neg_k: int = option(8192, "memory bank: negatives per image", unit="images", least=1, resume=TAKES)
    nce_m: float = option(0.5, "memory bank: share of the old entry in an update", least=0, most=1, resume=TAKES)
