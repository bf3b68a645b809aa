"""What every backbone with stages offers, so that branches, exits and stacking need no knowledge of a family."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from model.registry import BackboneRequest, backbones, known_request


class Staged:
    """A network in the parts stem -> stage 1 ... N -> tail -> classifier, under one set of names for all networks.

    Our own networks have these names themselves (`StagedBackbone`). For a library's network, whose attributes may have
    any name, an object beside it has them.

    Attributes:
        request: what the network was built from; fresh copies of its parts need it.
    """

    request: BackboneRequest | None = None

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """The network whose parts these are."""

    @property
    def probe_side(self) -> int:
        """Side in pixels of an image that is cheap and not too small for the network."""
        return 64

    @property
    def channel_dim(self) -> int:
        """The dimension of the stages' features that counts channels: 1, or -1 of tokens and of [B, H, W, C]."""
        return 1

    def as_map(self, features: Tensor) -> Tensor:
        """A stage's features as a map [B, C, H, W]; class and register tokens are left out."""
        return features

    @property
    @abstractmethod
    def stages(self) -> list[nn.Module]:
        """The stages in order; stage i maps the feature map of stage i-1 (or the stem) to its own."""

    @abstractmethod
    def stem(self, images_BCHW: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> the feature map that stage 1 takes."""

    @abstractmethod
    def tail(self, features_BCHW: Tensor) -> Tensor:
        """The last stage's map -> pooled embedding [B, D] (final norm and activation included, dropout not)."""

    @abstractmethod
    def classify(self, embedding_BD: Tensor) -> Tensor:
        """Embedding [B, D] -> logits [B, K] (classifier dropout included)."""

    @property
    @abstractmethod
    def classifier_name(self) -> str:
        """Name of the submodule that holds the final linear layer ("fc"); re-initialised when fine-tuning."""

    def unused_parameter_names(self) -> set[str]:
        """Parameters that no forward pass runs, kept (frozen) because released checkpoints hold them; mostly none."""
        return set()

    def forward_features(self, images_BCHW: Tensor) -> tuple[list[Tensor], Tensor]:
        """Images -> (the feature map after each stage, embedding [B, D])."""
        features = self.stem(images_BCHW)
        taps = []
        for stage in self.stages:
            features = stage(features)
            taps.append(features)
        return taps, self.tail(features)

    def composed(self, images_BCHW: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> logits [B, K], part by part."""
        return self.classify(self.forward_features(images_BCHW)[1])

    @property
    def exit_plan(self) -> tuple[tuple[int, int | None], ...]:
        """Auxiliary exits of layer-wise mutual learning as (tap, blocks), shallowest first.

        The exit hangs behind stage `tap` (0: the stem) and has `blocks` blocks in each remaining stage, None: all.
        Our rule where nothing is published: an exit behind each of the up to three stages before the last.
        """
        last = len(self.stages)
        return tuple((tap, None) for tap in range(max(1, last - 3), last))

    def become_auxiliary(self) -> None:
        """Change what the family initialises differently when parts of the network serve as an auxiliary head."""

    def halved_depth(self) -> int:
        """How many blocks a branch with half of the last stage keeps of it: half, rounded down, at least 1.

        Raises:
            ValueError: a last stage that a family does not halve.
        """
        return max(1, len(list(self.stages[-1].children())) // 2)


def half_of_blocks(stage: nn.Module) -> int:
    """How many parts half of a library's stage is: all where these are a downsampling layer and sequences of blocks."""
    parts = [*stage.children()]
    return len(parts) if any(isinstance(part, nn.Sequential) for part in parts) else max(1, len(parts) // 2)


class StagedBackbone(Staged, nn.Module):
    """A network that has the names of its parts itself; `forward` is their composition and nothing else.

    Submodule names stay those of the released checkpoints, so that these load.
    """

    @property
    def network(self) -> nn.Module:
        return self

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> logits [B, K]."""
        return self.composed(images_BCHW)


def staged_parts(network: nn.Module) -> Staged | None:
    """The parts of a network; None where it has none that run one after another."""
    if isinstance(network, Staged):
        return network
    request = known_request(network)
    if request is None:
        return None
    parts = backbones.get(request.arch).parts
    found = None if parts is None else parts(network, request)
    assert found is None or isinstance(found, Staged)
    return found


class MemberLayer(nn.Module):
    """A layer of several members, in the place that the plain one had in a network.

    Attributes:
        layer: the plain one, without what each member has of its own.
    """

    layer: nn.Conv2d | nn.Linear


class BesideNetwork(nn.Module):
    """Parts that stand within a network's module, so that they are kept with it, and are none of its own layers."""


def beside_names(network: nn.Module) -> tuple[str, ...]:
    """The beginnings of the names of all that is beside a network."""
    return tuple(f"{name}." for name, module in network.named_modules() if isinstance(module, BesideNetwork))


def classifier_names(network: nn.Module) -> tuple[str, ...]:
    """Names of the layers that give the logits, mostly one linear layer; none where there is no such layer.

    That is what the network's own `get_classifier()` says (timm), else its last linear layer, else its last
    convolution. Networks with several heads, as those that were distilled through a token of its own, answer by the
    mean of all; which layers these are, timm's configuration of their weights says. Of members it is the layer with all
    that is theirs, and not the plain one within.
    """
    if isinstance(network, Staged):
        return (network.classifier_name,)
    ask = getattr(network, "get_classifier", None)
    said = ask() if callable(ask) else None
    layers: dict[str, type] = {}
    for name, module in _own_layers(network):
        plain = module.layer if isinstance(module, MemberLayer) else module
        for kind in (nn.Linear, nn.Conv2d):
            if isinstance(plain, kind):
                if module is said:
                    return (name,)
                layers[name] = kind
    configuration = getattr(network, "pretrained_cfg", None)
    heads = configuration.get("classifier") if isinstance(configuration, Mapping) else None
    if isinstance(heads, tuple) and layers.keys() >= {*heads}:
        return heads
    linear = [name for name, kind in layers.items() if kind is nn.Linear]
    return tuple((linear or [*layers])[-1:])


def classifier_name(network: nn.Module) -> str | None:
    """The last of `classifier_names`; None where there is none."""
    return (classifier_names(network) or (None,))[-1]


def _own_layers(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of what is a network's own, layers of members whole."""
    hidden = beside_names(network)
    for name, module in network.named_modules():
        if not name.startswith(hidden):
            yield name, module
            if isinstance(module, MemberLayer):
                hidden = *hidden, f"{name}."
