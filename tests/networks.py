"""Small networks of other libraries, one of each kind: what a rule over layers must hold for."""

import importlib.util

import pytest
import torchvision

from model.backbone.torchvision_nets import WITH_AUXILIARY_LOGITS

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="needs timm")


def smallest_of_each_torchvision_class() -> list[str]:
    """torchvision has a file for each class."""
    found: dict[str, tuple[int, str]] = {}
    for name in torchvision.models.list_models(module=torchvision.models):
        where = torchvision.models.get_model_builder(name).__module__
        if name not in WITH_AUXILIARY_LOGITS and not (where.endswith(".vgg") and not name.endswith("_bn")):
            size = torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]
            found[where] = min(found.get(where, (size, name)), (size, name))
    return [f"torchvision/{name}" for _, name in found.values()]


TIMM = (
    *("test_efficientnet", "test_resnet", "test_vit", "test_convnext", "test_byobnet", "mobilenetv3_small_050"),
    *("mobilenetv2_035", "regnetx_002", "densenet121", "ghostnet_050", "rexnet_100", "levit_128s", "repvgg_a0"),
    *("dla46_c", "ese_vovnet19b_slim", "mobilevit_xxs", "fastvit_t8", "skresnet18", "resnetv2_18", "hgnetv2_b0"),
    *("efficientvit_b0", "repvit_m0_9", "xcit_nano_12_p16_224", "tiny_vit_5m_224"),
)

LIBRARY_NETWORKS = [
    *smallest_of_each_torchvision_class(),
    *(pytest.param(f"timm/{name}", marks=needs_timm) for name in TIMM),
]
