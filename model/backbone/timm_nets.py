"""`timm/NAME`: the networks of the package timm, an optional one; divided by the solver (model/division/solver.py).

Undivided they are timm's own networks; divided, its layers with other channel counts and its initial values.
"""

import logging
import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from model.library import Family, Library, layers_of, zero_bias
from model.registry import Backbone, backbones
from recipe.preprocessing import INTERPOLATIONS, Preprocessing
from utils.errors import UserError, reason
from utils.registry import nearest_name

logger = logging.getLogger(__name__)

PREFIX = "timm/"


def _initialise_resnet(network: Any) -> None:
    network.init_weights()


def _initialise_densenet(network: nn.Module) -> None:
    for module in layers_of(network):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        else:
            zero_bias(module)


def _initialise_convnext(network: nn.Module, *, timm: Any) -> None:
    for name, module in network.named_modules():
        timm.models.convnext._init_weights(module, name)
    for name, parameter in network.named_parameters():
        if name.endswith("gamma"):
            nn.init.constant_(parameter, 1e-6)
        elif ".grn." in name:
            nn.init.zeros_(parameter)


def _initialise_regnet(network: nn.Module, *, timm: Any) -> None:
    for module in network.modules():
        timm.models.regnet._init_weights(module, zero_init_last=True)


def _embed(network: Any, features_BCHW: Tensor) -> Tensor:
    embedding_BD: Tensor = network.forward_head(features_BCHW, pre_logits=True)
    return embedding_BD


def _classify(network: Any, embedding_BD: Tensor) -> Tensor:
    logits_BK: Tensor = network.get_classifier()(embedding_BD)
    return logits_BK


def layer_numbers(network: Any) -> Mapping[str, int] | None:
    """The layer of every parameter, as timm's `param_groups_layer_decay` counts them; None where it cannot."""
    network = getattr(network, "_network", network)
    if not hasattr(network, "group_matcher"):  # PiT and MetaFormer have none
        return None
    numbers: Mapping[str, int] = _import().models.group_parameters(
        network, network.group_matcher(coarse=False), reverse=True
    )
    return numbers


@lru_cache
def library() -> Library:
    """timm, imported.

    Raises:
        UserError: it is not installed.
    """
    timm = _import()
    models = timm.models

    def family(
        kind: type,
        trunk: Callable[[Any], list[nn.Module]],
        initialise: Callable[[nn.Module], None],
        *,
        stem: int,
        tail: int = 0,
        classifier: str = "classifier",
    ) -> Family:
        return Family(
            kind=kind,
            trunk=trunk,
            stem=stem,
            tail=tail,
            embed=_embed,
            classify=_classify,
            classifier=classifier,
            initialise=initialise,
        )

    return Library(
        prefix=PREFIX,
        create=lambda name, num_classes: timm.create_model(name, num_classes=num_classes),
        families=(
            family(
                models.resnet.ResNet,
                lambda n: [n.conv1, n.bn1, n.act1, n.maxpool, n.layer1, n.layer2, n.layer3, n.layer4],
                _initialise_resnet,
                stem=4,
                classifier="fc",
            ),
            family(
                models.regnet.RegNet,
                lambda n: [n.stem, n.s1, n.s2, n.s3, n.s4, n.final_conv],
                partial(_initialise_regnet, timm=timm),
                stem=1,
                tail=1,
                classifier="head.fc",
            ),
            family(
                models.efficientnet.EfficientNet,
                lambda n: [n.conv_stem, n.bn1, *n.blocks, n.conv_head, n.bn2],
                models._efficientnet_builder.efficientnet_init_weights,
                stem=2,
                tail=2,
            ),
            family(
                models.mobilenetv3.MobileNetV3,
                lambda n: [n.conv_stem, n.bn1, *n.blocks],
                models._efficientnet_builder.efficientnet_init_weights,
                stem=2,
            ),
            family(
                models.convnext.ConvNeXt,
                lambda n: [n.stem, *n.stages, n.norm_pre],
                partial(_initialise_convnext, timm=timm),
                stem=1,
                tail=1,
                classifier="head.fc",
            ),
            family(models.densenet.DenseNet, lambda n: list(n.features), _initialise_densenet, stem=3, tail=1),
        ),
        layer_numbers=layer_numbers,
        by_channels=frozenset(
            ("VGG", "XceptionAligned", "Xception", "SENet", "StarNet", "HighPerfGpuNet", "HighResolutionNet")
        ),
        version=f"timm {timm.__version__}",
        examples="resnet50, resnext50_32x4d, seresnet50, wide_resnet50_2, regnety_004, mobilenetv2_100, "
        "mobilenetv3_small_100, efficientnet_b0, convnext_atto, densenet121",
    )


def _import() -> ModuleType:
    try:
        import timm
        import timm.models
    except ImportError as error:
        raise UserError(
            f"--arch timm/NAME needs the package timm, which is not installed ({reason(error)}): pip install timm."
        ) from None
    return timm


def fetch_weights(name: str) -> Mapping[str, Tensor]:
    """timm's published weights of a network, by its state-dict names; kept in the download cache of the hub.

    Raises:
        UserError: there are none, or they cannot be downloaded.
    """
    timm: Any = _import()
    try:
        network: nn.Module = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise UserError(
            f"--pretrained: timm's weights of {name} cannot be fetched ({reason(error)[:150]}). Give --pretrained PATH."
        ) from None
    return network.state_dict()


def preprocessing(published: Any, file: str) -> Preprocessing:
    """How timm's weights want images, as timm evaluates them; whatever the file is called.

    Where it cuts otherwise than a square out of the centre of a resized image, that square; where it resizes neither
    bicubically nor bilinearly, bicubically.
    """
    crop = published.input_size[-1]
    return Preprocessing(
        resize=math.floor(crop / published.crop_pct),
        interpolation=published.interpolation if published.interpolation in INTERPOLATIONS else INTERPOLATIONS[0],
        crop=crop,
        mean=tuple(published.mean),
        std=tuple(published.std),
    )


@backbones.add_lister
def timm_names() -> list[str]:
    """Every `timm/NAME`; none, and a line in the log, where timm is not installed."""
    try:
        timm: Any = _import()
    except UserError as error:
        logger.warning("%s", error)
        return []
    return [f"{PREFIX}{name}" for name in timm.list_models()]


@backbones.add_resolver
@lru_cache
def timm_backbone(arch: str) -> Backbone | None:
    """The entry of `timm/NAME`, None for other names.

    Raises:
        UserError: timm is missing, or has no such network.
    """
    if not arch.startswith(PREFIX):
        return None
    name = arch.removeprefix(PREFIX)
    timm: Any = _import()
    if not timm.is_model(name):
        raise UserError(
            f"--arch {arch}: timm {timm.__version__} has no network {name!r}."
            f"{nearest_name(name, timm.list_models())} It has, for example, {library().examples}."
        )
    published = timm.get_pretrained_cfg(name)
    crop_size = None if published is None else published.input_size[-1]
    return library().backbone(
        name,
        crop_size=crop_size,
        pretrained=partial(fetch_weights, name),
        preprocessing=None if published is None else partial(preprocessing, published),
    )
