"""Training-only parts beside the networks: auxiliary classifiers, projection heads, gates, pair weights.

Shapes: B images, K classes, D embedding size of a network, E exits of a network (its own output included, last),
M exits of all networks, numbered network by network.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.registry import build_network, check_request, known_request, note_request
from model.staged import BesideNetwork, Staged, staged_parts
from utils.errors import UserError


def require_stages(network: nn.Module, method: str, *, at_least: int = 1) -> Staged:
    """The network, if it has stages that heads can hang on.

    Args:
        network: any.
        method: that hangs heads on it.
        at_least: how many stages there must be.

    Raises:
        UserError: it has none, or too few; the message names the method.
    """
    parts = staged_parts(network)
    request = known_request(network)
    name = type(network).__name__ if request is None else request.arch
    if parts is None:
        raise UserError(
            f"--method {method}: {name} has no stages that run one after another; use --method co_training, dml or "
            "independent, or another --arch."
        )
    if len(parts.stages) < at_least:
        raise UserError(
            f"--method {method} needs a backbone with {at_least} stages or more, and {name} has {len(parts.stages)}. "
            "Pick another --arch."
        )
    return parts


def embedding_size(network: Staged) -> int:
    """D, the size of the pooled embedding in front of the classifier."""
    classifier = network.network.get_submodule(network.classifier_name)
    assert isinstance(classifier, nn.Linear)
    return classifier.in_features


class AuxiliaryHead(nn.Module):
    """A private copy of what a network does behind one of its stages: the remaining stages, the tail, a classifier.

    Args:
        donor: a fresh network; its parts become the head's own, what lies before `tap` is dropped.
        tap: the head takes the feature map of this stage, counted from 1; 0 is the stem.
        depths: how many blocks each remaining stage keeps, None: all.
    """

    def __init__(self, donor: Staged, tap: int, depths: Iterable[int | None]) -> None:
        super().__init__()
        self.tap = tap
        donor.become_auxiliary()
        self.stages = nn.ModuleList(map(first_blocks, donor.stages[tap:], depths))
        unwanted = stem_parameters(donor) | {id(p) for stage in donor.stages for p in stage.parameters()}
        _drop(donor.network, unwanted)
        self.rest = donor.network
        self._parts = (donor,)  # in a tuple: no second owner of its modules

    def forward(self, features_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Feature map of stage `tap` -> (embedding [B, D], logits [B, K])."""
        for stage in self.stages:
            features_BCHW = stage(features_BCHW)
        (parts,) = self._parts
        embedding_BD = parts.tail(features_BCHW)
        return embedding_BD, parts.classify(embedding_BD)


class AuxiliaryHeads(nn.ModuleList):
    """The auxiliary heads of one network, the shallowest first."""

    def __init__(self, heads: Iterable[AuxiliaryHead]) -> None:
        super().__init__(heads)

    def forward(self, network: Staged, images_BCHW: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Images [B, 3, H, W] -> embeddings [B, D] and logits [B, K] of every head and, last, of the network itself."""
        _, embeddings, logits = self.with_taps(network, images_BCHW)
        return embeddings, logits

    def with_taps(self, network: Staged, images_BCHW: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The same, behind the maps of the stem and of every stage."""
        taps = [network.stem(images_BCHW)]
        for stage in network.stages:
            taps.append(stage(taps[-1]))
        embeddings, logits = [], []
        for head in self:
            assert isinstance(head, AuxiliaryHead)
            embedding_BD, logits_BK = head(taps[head.tap])
            embeddings.append(embedding_BD)
            logits.append(logits_BK)
        embedding_BD = network.tail(taps[-1])
        return taps, [*embeddings, embedding_BD], [*logits, network.classify(embedding_BD)]


def first_blocks(stage: nn.Module, depth: int | None) -> nn.Module:
    """The stage with its first `depth` blocks only, None: as it is.

    Raises:
        UserError: the stage is no sequence of blocks.
    """
    if depth is None:
        return stage
    if not is_sequence(stage):
        raise UserError(f"--arch: a stage of this backbone cannot be cut to {depth} blocks. Pick another --arch.")
    # not stage[:depth]: a subclass of a library may take other arguments
    blocks = ((name, block) for name, block in stage._modules.items() if block is not None)
    return nn.Sequential(OrderedDict(islice(blocks, depth)))


def is_sequence(stage: nn.Module) -> bool:
    """Whether the stage runs its children one after the other and does nothing else."""
    return isinstance(stage, nn.Sequential) and type(stage).forward is nn.Sequential.forward


def _probe(network: Staged) -> Tensor:
    """An image for trials; as many, or as many side by side, as the members of the network need."""
    parameter = next(network.network.parameters())
    form = None if network.request is None else network.request.form
    shape = *((1, 3) if form is None else form.least_input), network.probe_side, network.probe_side
    return torch.zeros(shape, device=parameter.device, dtype=parameter.dtype)


def stem_parameters(network: Staged) -> set[int]:
    """Ids of the parameters that the stem uses: autograd knows, whatever their names and order."""
    parameters = [*network.network.parameters()]
    modes = {module: module.training for module in network.network.modules()}
    trained = [parameter.requires_grad for parameter in parameters]
    network.network.eval().requires_grad_(True)
    with torch.enable_grad():
        features = network.stem(_probe(network))
    gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
    for module, mode in modes.items():
        module.training = mode
    for parameter, is_trained in zip(parameters, trained, strict=True):
        parameter.requires_grad_(is_trained)
    return {id(p) for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


def _drop(module: nn.Module, unwanted: set[int]) -> None:
    """Replace every submodule that holds nothing but unwanted parameters by an identity, and single ones by nothing."""
    for name, parameter in module.named_parameters(recurse=False):
        if id(parameter) in unwanted:
            setattr(module, name, None)  # class tokens and positions
    for name, child in module.named_children():
        found = [id(p) in unwanted for p in child.parameters()]
        if found and all(found):
            setattr(module, name, _placeholder(child))
        elif any(found):
            _drop(child, unwanted)


def _placeholder(module: nn.Module) -> nn.Module:
    """An identity, in a container of as many: networks of libraries find their parts in one by position."""
    if isinstance(module, nn.Sequential | nn.ModuleList):
        return nn.Sequential(*map(_placeholder, module))
    return nn.Identity()


def fresh_network(network: Staged, *, wide: bool = False) -> Staged:
    """Another network of the same structure with initial weights of its own, drawn from the global generator.

    Args:
        network: made by `model.registry.build_network`.
        wide: twice the width in the last stage where the family can express it, else the same width.
    """
    if network.request is None:
        raise ValueError("a network needs a `request`, as model.build_network sets it, to be built again")
    request, entry = network.request, check_request(network.request)
    if wide and entry.build_wide is not None:
        if request.widths is not None:
            raise UserError(
                f"--stage_widths: a branch of --method dks has a last stage of twice the width that the table of "
                f"--arch {request.arch} gives, which other widths do not have. Leave the flag away."
            )
        built = entry.build_wide(request)
        if not isinstance(built, Staged):
            note_request(built, request)
    else:
        built = build_network(request)
    fresh = staged_parts(built)
    assert fresh is not None
    return fresh


def exit_heads(network: Staged) -> AuxiliaryHeads:
    """Auxiliary exits of layer-wise mutual learning, shallowest first, by the network's `exit_plan`."""
    num_stages = len(network.stages)
    return AuxiliaryHeads(
        AuxiliaryHead(fresh_network(network), tap, [blocks] * (num_stages - tap)) for tap, blocks in network.exit_plan
    )


def synergy_branches(network: Staged, taps: Sequence[int] | None = None) -> AuxiliaryHeads:
    """Branches of deeply-supervised knowledge synergy (arXiv:1906.00675), shallowest first.

    Published for WRN-d-k only; the rule for other backbones is ours and gives the published branches there. A branch
    is a copy of the remaining stages and of the head. The one behind stage N - 1 has a last stage of doubled width,
    where the family can express that, else of equal width. Every earlier one keeps half of the blocks of its last
    stage, rounded down, at least 1; all of them where blocks change the width, so that half of a stage would not fit
    the tail.

    Args:
        network: N stages.
        taps: the stages, counted from 1, that the branches hang behind; None: N - 2 and N - 1.

    Raises:
        UserError: a stage that does not exist, one named twice, or one that the family cannot serve.
    """
    last = len(network.stages)
    if taps is None:
        taps = range(max(1, last - 2), last)
    if len(set(taps)) < len(taps) or any(not 1 <= tap < last for tap in taps):
        raise UserError(
            f"--dks_branches {' '.join(map(str, taps))}: this --arch takes different stages from 1 to {last - 1}."
        )
    branches = []
    for tap in sorted(taps):
        nearest = tap == last - 1
        donor = fresh_network(network, wide=nearest)
        depths: list[int | None] = [None] * (last - tap)
        if not nearest:
            try:
                half = network.halved_depth()
            except ValueError as error:
                raise UserError(
                    f"--dks_branches {tap}: the branch there keeps half of the last stage, and this --arch has none "
                    f"({error}): choose that, or --dks_branches {last - 1}."
                ) from None
            if _can_lose_blocks(network, half):
                depths[-1] = half
        branches.append(AuxiliaryHead(donor, tap, depths))
    return AuxiliaryHeads(branches)


@torch.no_grad()
def _can_lose_blocks(network: Staged, depth: int) -> bool:
    """Whether the first `depth` blocks of the last stage give a map of the same shape as the whole stage."""
    *before, last = network.stages
    if not is_sequence(last):
        return False
    training = network.network.training
    network.network.eval()
    features = network.stem(_probe(network))
    for stage in before:
        features = stage(features)
    whole, part = last(features), first_blocks(last, depth)(features)
    network.network.train(training)
    return part.shape == whole.shape


def peer_branches(network: Staged, count: int) -> AuxiliaryHeads:
    """`count` fresh copies of what a network does behind its last stage but one, with initial weights of their own."""
    last = len(network.stages)
    return AuxiliaryHeads(AuxiliaryHead(fresh_network(network), last - 1, [None]) for _ in range(count))


@torch.no_grad()
def stage_maps(network: Staged) -> list[tuple[int, int]]:
    """(channels, side in pixels) of the map that each stage gives for the images that the network was built for."""
    assert network.request is not None
    whole, side = network.network, network.request.crop_size
    training = whole.training
    whole.eval()
    taps, _ = network.forward_features(next(whole.parameters()).new_zeros(1, 3, side, side))
    whole.train(training)
    maps = map(network.as_map, taps)
    return [(one.shape[1], one.shape[-1]) for one in maps]


def _full_precision(tensor: Tensor) -> torch.autocast:
    """No automatic mixed precision on the device of a tensor; tensors without storage have none to switch off."""
    return torch.autocast("cpu" if tensor.is_meta else tensor.device.type, enabled=False)


class MapGate(nn.Module):
    """Mixing weights of M branches from the map that they share, in float32 (Lan et al., arXiv:1806.04606).

    Global average -> linear -> batch norm -> ReLU -> softmax.

    Args:
        channels: of the map.
        num_branches: M.
    """

    def __init__(self, channels: int, num_branches: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, num_branches)
        self.norm = nn.BatchNorm1d(num_branches)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Map [B, C, H, W] -> weights [B, M] that sum to 1 for each image."""
        with _full_precision(features_BCHW):
            pooled_BC = features_BCHW.to(self.linear.weight.dtype).mean(dim=(2, 3))
            return F.relu(self.norm(self.linear(pooled_BC))).softmax(dim=-1)


class NativeEnsemble(BesideNetwork):
    """What an on-the-fly native ensemble has beside its network: M - 1 branches beside the network's own, and the gate.

    Args:
        network: N stages; stem and stages 1 to N - 1 are the trunk that the branches share.
        num_branches: M.
    """

    def __init__(self, network: Staged, num_branches: int) -> None:
        super().__init__()
        self.branches = peer_branches(network, num_branches - 1)
        self.gate = MapGate(stage_maps(network)[-2][0], num_branches)

    def forward(self, network: Staged, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] -> logits [M, B, K], the network's own first, and the gate's weights [B, M]."""
        taps, _, logits = self.branches.with_taps(network, images_BCHW)
        return torch.stack([logits[-1], *logits[:-1]]), self.gate(network.as_map(taps[-2]))

    @staticmethod
    def mixture(logits_MBK: Tensor, weights_BM: Tensor) -> Tensor:
        """The branches' logits, mixed by the gate's weights -> [B, K]."""
        return (weights_BM.T.to(logits_MBK.dtype)[..., None] * logits_MBK).sum(dim=0)


class PeerAttention(nn.Module):
    """How much each of P peers listens to each, by embeddings in a smaller space (Chen et al., arXiv:1912.00350).

    Args:
        size_D: of the embeddings.
        factor: the space has D / factor dimensions, rounded down, at least 1.
    """

    def __init__(self, size_D: int, factor: int) -> None:
        super().__init__()
        inner = max(1, size_D // factor)
        self.query = nn.Linear(size_D, inner, bias=False)
        self.key = nn.Linear(size_D, inner, bias=False)

    def forward(self, embeddings: Sequence[Tensor]) -> Tensor:
        """P embeddings [B, D] -> attention [B, P, P] in float32 or better; rows sum to 1, the own entry included."""
        with _full_precision(embeddings[0]):
            stacked_BPD = torch.stack([*embeddings], dim=1).to(self.query.weight.dtype)
            return (self.query(stacked_BPD) @ self.key(stacked_BPD).mT).softmax(dim=-1)


class BottleneckExit(nn.Module):
    """An exit of be-your-own-teacher (Zhang et al., arXiv:1905.08094): a bottleneck to the network's embedding size.

    Args:
        channels: of the stage's map.
        stride: of the bottleneck, also the size of its kernel: the stage's side over that of the last stage.
        size_D: of the network's embedding.
        num_classes: K.
    """

    def __init__(self, channels: int, stride: int, size_D: int, num_classes: int) -> None:
        super().__init__()
        inner = max(1, size_D // 4)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, inner, 1),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, inner, stride, stride),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, size_D, 1),
            nn.BatchNorm2d(size_D),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(size_D, num_classes)
        for module in self.layers:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, features_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Map of the stage -> (embedding [B, D], logits [B, K])."""
        embedding_BD: Tensor = self.layers(features_BCHW)
        return embedding_BD, self.classifier(embedding_BD)


class BottleneckExits(nn.ModuleList):
    """Exits behind every stage of a network but the last, the shallowest first.

    Args:
        network: two stages or more.
    """

    def __init__(self, network: Staged) -> None:
        *maps, (_, last_side) = stage_maps(network)
        assert network.request is not None
        size_D, num_classes = embedding_size(network), network.request.num_classes
        super().__init__(
            BottleneckExit(channels, max(1, side // last_side), size_D, num_classes) for channels, side in maps
        )

    def forward(self, network: Staged, images_BCHW: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Images -> embeddings [B, D] and logits [B, K] of every exit and, last, of the network itself."""
        taps, embedding_BD = network.forward_features(images_BCHW)
        found = [one(network.as_map(tap)) for one, tap in zip(self, taps[:-1], strict=True)]
        embeddings, logits = [pair[0] for pair in found], [pair[1] for pair in found]
        return [*embeddings, embedding_BD], [*logits, network.classify(embedding_BD)]


class ProjectionHead(nn.Sequential):
    """Embedding [B, in_features] -> point [B, out_features] on the unit sphere, in float32 or better."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(
            nn.Linear(in_features, out_features), nn.ReLU(inplace=True), nn.Linear(out_features, out_features)
        )

    def forward(self, embedding_BD: Tensor) -> Tensor:
        projected = super().forward(embedding_BD)
        return F.normalize(projected.to(torch.promote_types(projected.dtype, torch.float32)), dim=-1)


class Gate(nn.Module):
    """Mixes the logits of a network's exits into one aggregated prediction, by weights that sum to 1 for each image.

    Args:
        num_exits: E.
        embedding_size: D.
    """

    def __init__(self, num_exits: int, embedding_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(num_exits * embedding_size, embedding_size),
            nn.ReLU(inplace=True),
            nn.Linear(embedding_size, num_exits),
        )

    def weights(self, embeddings: Sequence[Tensor]) -> Tensor:
        """E embeddings [B, D] -> mixing weights [B, E]."""
        scores = self.layers(torch.cat([*embeddings], dim=-1))
        return scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(dim=-1)

    def forward(self, embeddings: Sequence[Tensor], logits_EBK: Tensor) -> Tensor:
        """E embeddings [B, D] and the exits' logits [E, B, K] -> aggregated logits [B, K]."""
        return (self.weights(embeddings).T.unsqueeze(-1) * logits_EBK).sum(dim=0)


class PairWeights(nn.Module):
    """Meta-network: a weight in (0.269, 0.731) for each pair of exits and each image, from the two embeddings.

    Args:
        embedding_sizes: D of each of the M exits.
        size: of the space in which the two are compared.
    """

    def __init__(self, embedding_sizes: Sequence[int], size: int = 128) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(embedding_size, size) for embedding_size in embedding_sizes)

    def forward(self, embeddings: Sequence[Tensor], pairs_2P: Tensor) -> Tensor:
        """M embeddings [B, D_m] and pairs of exits [2, P] -> sigmoid of the cosine similarity, [P, B]."""
        compared_MBU = torch.stack([layer(e) for layer, e in zip(self.layers, embeddings, strict=True)])
        compared_MBU = compared_MBU.to(torch.promote_types(compared_MBU.dtype, torch.float32))
        first_PBU, second_PBU = compared_MBU[pairs_2P]
        return F.cosine_similarity(first_PBU, second_PBU, dim=-1).sigmoid()
