"""`torchvision/NAME`: torchvision's classifiers, divided by model/division/solver.py.

Undivided they are torchvision's own networks; divided, its layers with other channel counts and its initial values.
"""

import re
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import (
    VGG,
    ConvNeXt,
    DenseNet,
    EfficientNet,
    MNASNet,
    MobileNetV2,
    MobileNetV3,
    RegNet,
    ResNet,
    SwinTransformer,
    VisionTransformer,
    get_model,
    get_model_weights,
    list_models,
)

from model.library import Family, Library, layers_of, normal_by_outputs, zero_bias
from model.registry import Backbone, backbones
from model.serial import Layout, in_runs
from recipe.preprocessing import Preprocessing
from utils.errors import UserError, reason
from utils.registry import nearest_name

PREFIX = "torchvision/"
# they give more than logits in training
WITH_AUXILIARY_LOGITS = ("googlenet", "inception_v3")
# keys of torchvision's oldest released files
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")


def _initialise_resnet(network: nn.Module) -> None:
    for module in layers_of(network):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _initialise_regnet(network: nn.Module) -> None:
    for module in layers_of(network):
        if isinstance(module, nn.Conv2d):
            normal_by_outputs(module)  # biases of squeeze-and-excitation keep torch's values
        else:
            nn.init.normal_(module.weight, 0.0, 0.01)
            zero_bias(module)


def _initialise_by_fan_out(network: nn.Module, *, linear: str) -> None:
    """MobileNet, EfficientNet, MNASNet and VGG differ in their linear layers only."""
    for module in layers_of(network):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif linear == "normal":
            nn.init.normal_(module.weight, 0.0, 0.01)
        elif linear == "uniform":
            bound = module.out_features**-0.5
            nn.init.uniform_(module.weight, -bound, bound)
        else:
            nn.init.kaiming_uniform_(module.weight, mode="fan_out", nonlinearity="sigmoid")
        zero_bias(module)


def _initialise_convnext(network: nn.Module) -> None:
    for module in layers_of(network):
        nn.init.trunc_normal_(module.weight, std=0.02)
        zero_bias(module)
    for name, parameter in network.named_parameters():
        if name.endswith("layer_scale"):
            nn.init.constant_(parameter, 1e-6)


def _initialise_densenet(network: nn.Module) -> None:
    for module in layers_of(network):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        else:
            zero_bias(module)


def _pooled(network: Any, features_BCHW: Tensor) -> Tensor:
    return torch.flatten(network.avgpool(features_BCHW), 1)


def _mean(network: Any, features_BCHW: Tensor) -> Tensor:
    return torch.flatten(F.adaptive_avg_pool2d(features_BCHW, 1), 1)


def _features(network: Any) -> list[nn.Module]:
    return list(network.features)


FAMILIES = (
    Family(
        kind=ResNet,
        trunk=lambda n: [n.conv1, n.bn1, n.relu, n.maxpool, n.layer1, n.layer2, n.layer3, n.layer4],
        stem=4,
        embed=_pooled,
        classify=lambda n, embedding_BD: n.fc(embedding_BD),
        classifier="fc",
        initialise=_initialise_resnet,
    ),
    Family(
        kind=RegNet,
        trunk=lambda n: [n.stem, *n.trunk_output],
        stem=1,
        embed=_pooled,
        classify=lambda n, embedding_BD: n.fc(embedding_BD),
        classifier="fc",
        initialise=_initialise_regnet,
    ),
    Family(
        kind=MobileNetV2,
        trunk=_features,
        stem=1,
        tail=1,
        embed=_mean,
        classify=lambda n, embedding_BD: n.classifier(embedding_BD),
        classifier="classifier.1",
        initialise=partial(_initialise_by_fan_out, linear="normal"),
    ),
    Family(
        kind=MobileNetV3,
        trunk=_features,
        stem=1,
        tail=1,
        embed=lambda n, features_BCHW: n.classifier[:2](_pooled(n, features_BCHW)),
        classify=lambda n, embedding_BD: n.classifier[2:](embedding_BD),
        classifier="classifier.3",
        initialise=partial(_initialise_by_fan_out, linear="normal"),
    ),
    Family(
        kind=EfficientNet,
        trunk=_features,
        stem=1,
        tail=1,
        embed=_pooled,
        classify=lambda n, embedding_BD: n.classifier(embedding_BD),
        classifier="classifier.1",
        initialise=partial(_initialise_by_fan_out, linear="uniform"),
    ),
    Family(
        kind=MNASNet,
        trunk=lambda n: list(n.layers),
        stem=8,
        tail=3,
        embed=_mean,
        classify=lambda n, embedding_BD: n.classifier(embedding_BD),
        classifier="classifier.1",
        initialise=partial(_initialise_by_fan_out, linear="kaiming"),
    ),
    Family(
        kind=ConvNeXt,
        trunk=_features,
        stem=1,
        embed=lambda n, features_BCHW: n.classifier[:2](n.avgpool(features_BCHW)),
        classify=lambda n, embedding_BD: n.classifier[2:](embedding_BD),
        classifier="classifier.2",
        initialise=_initialise_convnext,
    ),
    Family(
        kind=DenseNet,
        trunk=_features,
        stem=4,
        tail=1,
        embed=lambda n, features_BCHW: _mean(n, F.relu(features_BCHW)),
        classify=lambda n, embedding_BD: n.classifier(embedding_BD),
        classifier="classifier",
        initialise=_initialise_densenet,
    ),
    Family(
        kind=VGG,
        trunk=_features,
        stem=2,
        embed=lambda n, features_BCHW: n.classifier[:5](_pooled(n, features_BCHW)),
        classify=lambda n, embedding_BD: n.classifier[5:](embedding_BD),
        classifier="classifier.6",
        initialise=partial(_initialise_by_fan_out, linear="normal"),
    ),
)


def _vision_transformer(network: Any) -> Layout:
    blocks = tuple(f"encoder.layers.{name}" for name, _ in network.encoder.layers.named_children())
    return Layout(
        members=blocks,
        stages=in_runs(len(blocks)),
        after=("encoder.ln",),
        classifier="heads.head",
        pool=lambda n, tokens_BNC: tokens_BNC[:, 0],
        is_tokens=True,
        prefix_tokens=1,
    )


def _swin(network: Any) -> Layout:
    """`features` are the patches, then blocks, then merging and blocks in turn."""
    parts = tuple(f"features.{i}" for i in range(1, len(network.features)))
    return Layout(
        members=parts,
        stages=((0, 1), *((i, i + 2) for i in range(1, len(parts), 2))),
        after=("norm", "permute", "avgpool", "flatten"),
        classifier="head",
        pool=lambda n, embedding_BD: embedding_BD,
        channels_last=True,
    )


def released_name(key: str) -> str:
    """Today's name of a tensor in a released file."""
    return _OLD_DENSENET.sub(r"\1\2", key)


LIBRARY = Library(
    prefix=PREFIX,
    create=lambda name, num_classes: get_model(name, weights=None, num_classes=num_classes),
    families=FAMILIES,
    released_name=released_name,
    layouts={VisionTransformer: _vision_transformer, SwinTransformer: _swin},
    by_channels=frozenset(("AlexNet", "SqueezeNet")),
    version=f"torchvision {torchvision.__version__}",
    examples="resnet50, resnext50_32x4d, wide_resnet50_2, regnet_y_400mf, mobilenet_v2, mobilenet_v3_small, "
    "efficientnet_b0, convnext_tiny, densenet121, mnasnet1_0, vgg11_bn",
)


def fetch_weights(name: str) -> Mapping[str, Tensor]:
    """torchvision's best published weights of a network, by its state-dict names; kept in torch's download cache.

    Raises:
        UserError: they cannot be downloaded, or the file is damaged.
    """
    weights: Any = get_model_weights(name)
    try:
        state = weights.DEFAULT.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (URLError, OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"--pretrained: torchvision's weights of {name} cannot be fetched from {weights.DEFAULT.url} "
            f"({reason(error)[:150]}). Put the file into {torch.hub.get_dir()}/checkpoints, or give --pretrained PATH."
        ) from None
    return {released_name(key): value for key, value in state.items()}


def weights_of(name: str, file: str) -> Any:
    """The entry of torchvision's weights that a file of this name is, else its best one."""
    weights: Any = get_model_weights(name)
    return next((one for one in weights if one.url.rpartition("/")[2] == file), weights.DEFAULT)


def preprocessing(name: str, file: str) -> Preprocessing:
    """How a file of weights wants images, as torchvision evaluates it (`weights.transforms()`)."""
    asked = weights_of(name, file).transforms()
    return Preprocessing(
        resize=asked.resize_size[0],
        interpolation=asked.interpolation.value,
        crop=asked.crop_size[0],
        mean=tuple(asked.mean),
        std=tuple(asked.std),
    )


@backbones.add_lister
def torchvision_names() -> list[str]:
    """Every `torchvision/NAME` that the resolver knows."""
    names = list_models(module=torchvision.models)
    return [f"{PREFIX}{name}" for name in names if name not in WITH_AUXILIARY_LOGITS]


@backbones.add_resolver
@lru_cache
def torchvision_backbone(arch: str) -> Backbone | None:
    """The entry of `torchvision/NAME`, None for other names.

    Raises:
        UserError: torchvision has no such classifier.
    """
    if not arch.startswith(PREFIX):
        return None
    name = arch.removeprefix(PREFIX)
    known = list_models(module=torchvision.models)
    if name not in known:
        raise UserError(
            f"--arch {arch}: torchvision {torchvision.__version__} has no classifier {name!r}."
            f"{nearest_name(name, known)} It has, for example, {LIBRARY.examples}."
        )
    if name in WITH_AUXILIARY_LOGITS:
        raise UserError(
            f"--arch {arch} gives auxiliary logits too, and a network here gives one set of logits. "
            f"Others: {LIBRARY.examples}."
        )
    weights: Any = get_model_weights(name)
    crop_size = weights.DEFAULT.transforms.keywords["crop_size"]
    return LIBRARY.backbone(
        name,
        crop_size=crop_size,
        pretrained=partial(fetch_weights, name),
        preprocessing=partial(preprocessing, name),
    )
