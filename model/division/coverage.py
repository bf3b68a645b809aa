"""Which networks of torchvision and timm divide: the tables of `python -m model.division --coverage`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from model.division.plan import division_plan
from model.registry import BackboneRequest, DivisionPlan, backbones, image_shape
from utils.errors import UserError

# one of each family of timm, measured when the rules were made
TIMM = (
    *("resnet18", "resnet50", "resnet50d", "resnetv2_50", "resnext50_32x4d", "seresnet50", "ecaresnet50d"),
    *("resnest14d", "res2net50_26w_4s", "densenet121", "vgg16_bn", "efficientnet_b0", "efficientnetv2_rw_t"),
    *("tf_efficientnetv2_s", "mobilenetv2_100", "mobilenetv3_large_100", "mobilenetv4_conv_small"),
    *("mobilenetv4_hybrid_medium", "mnasnet_100", "fbnetc_100", "ghostnet_100", "ghostnetv2_100", "lcnet_100"),
    *("tinynet_a", "mixnet_s", "regnetx_004", "regnety_004", "regnetz_b16", "convnext_atto", "convnext_tiny"),
    *("convnextv2_atto", "convnextv2_tiny", "nfnet_f0", "dm_nfnet_f0", "nf_resnet50", "rexnet_100", "repvgg_a0"),
    *("mobileone_s0", "fastvit_t8", "hgnetv2_b0", "cspresnet50", "cspdarknet53", "dla34", "dpn68", "selecsls42"),
    *("hrnet_w18_small", "xception41", "skresnet18", "legacy_seresnet18", "vit_tiny_patch16_224"),
    *("deit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_dinov2", "eva02_tiny_patch14_224"),
    *("beit_base_patch16_224", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "maxvit_nano_rw_256"),
    *("coatnet_nano_rw_224", "cait_xxs24_224", "crossvit_tiny_240", "levit_128", "mobilevit_xs", "mobilevitv2_050"),
    *("edgenext_xx_small", "efficientformer_l1", "efficientvit_b0", "poolformer_s12", "caformer_s18"),
    *("mixer_s16_224", "resmlp_12_224", "pvt_v2_b0", "tiny_vit_5m_224", "davit_tiny", "focalnet_tiny_srf"),
    *("hiera_tiny_224", "starnet_s1", "shvit_s1", "inception_next_atto"),
)
# one of each class of torchvision
TORCHVISION = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "maxvit_t", "mnasnet1_0", "mobilenet_v2"),
    *("mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x1_0", "squeezenet1_0", "swin_t"),
    *("swin_v2_t", "vgg11", "vit_b_16", "googlenet", "inception_v3"),
)
# other classes of timm, for which no rule was made
HELD_OUT = (
    *("bat_resnext26ts", "convmixer_768_32", "convit_tiny", "coat_lite_tiny", "deit_tiny_distilled_patch16_224"),
    *("efficientformerv2_s0", "efficientvit_m0", "flexivit_small", "gcvit_xxtiny", "gmixer_24_224"),
    *("gmlp_s16_224", "inception_v4", "mambaout_femto", "mvitv2_tiny", "nest_tiny", "nextvit_small"),
    *("pit_ti_224", "pnasnet5large", "repghostnet_100", "repvit_m0_9", "sequencer2d_s", "tnt_s_patch16_224"),
    *("twins_svt_small", "visformer_tiny", "xcit_nano_12_p16_224"),
)
LISTS = {
    "torchvision": tuple(f"torchvision/{name}" for name in TORCHVISION),
    "timm": tuple(f"timm/{name}" for name in TIMM),
    "held out": tuple(f"timm/{name}" for name in HELD_OUT),
}
TITLES = ("network", "S", "way", "leaves or stages of one copy", "parameters", "MACs")


def plan_or_reason(arch: str, split_factor: int, divide_by: str = "params") -> DivisionPlan | str:
    """The plan of a network at its own image size with 1000 classes, or the line that refuses it."""
    try:
        crop_size = backbones.get(arch).crop_size or 224
        return division_plan(
            BackboneRequest(
                arch=arch,
                split_factor=split_factor,
                num_classes=1000,
                shape=image_shape("folder", crop_size),
                dataset="imagenet",
                crop_size=crop_size,
                divide_by=divide_by,
            )
        )
    except UserError as error:
        return str(error)


def named_widths(names: Sequence[str], widths: Sequence[float]) -> str:
    """Widths in order, those of one kind together: named by the last word of their arguments, without repetitions.

    Args:
        names: dotted paths of arguments (`cfg.blocks.0.c`), or "" for widths of stages.
        widths: as many.
    """
    kinds: dict[str, list[str]] = {}
    for name, width in zip(names, widths, strict=True):
        kind = next((word for word in reversed(name.split(".")) if not word.isdigit()), "")
        shown = f"{width:.4g}"
        of_kind = kinds.setdefault(kind, [])
        if not kind or shown not in of_kind[-1:]:
            of_kind.append(shown)
    return "; ".join(f"{kind} {', '.join(shown)}".lstrip() for kind, shown in kinds.items())


def coverage(archs: Sequence[str], split_factors: Sequence[int] = (2, 4)) -> Iterator[str]:
    """Lines of a table in Markdown, and of each S how many networks divide."""
    yield f"| {' | '.join(TITLES)} |"
    yield f"|{' --- |' * len(TITLES)}"
    divided = dict.fromkeys(split_factors, 0)
    for arch in archs:
        for split_factor in split_factors:
            plan = plan_or_reason(arch, split_factor)
            if isinstance(plan, str):
                reason = re.split(r" Others( that can be divided)?:", plan)[0].removeprefix(f"--arch {arch} ")
                yield f"| {arch} | {split_factor} | refused | {reason} | | |"
                continue
            divided[split_factor] += 1
            names = [""] * len(plan.stages) if plan.way == "channels" else plan.stages
            yield (
                f"| {arch} | {split_factor} | {plan.way} | {named_widths(names, plan.widths)} | "
                f"{plan.params_difference:+.2%} | {plan.macs_difference:+.0%} |"
            )
    yield ""
    yield ", ".join(f"S = {s}: {count} of {len(archs)} divide" for s, count in divided.items()) + "."
