"""Forms in which M members share one network: BatchEnsemble, multi-input multi-output, Monte-Carlo dropout, branches.

Each looks like a SplitNet of M networks: images or views in, logits [M, B, K] out. State-dict keys are `models.0.*`.
Shapes: M members, B images, V views (M or 1), K classes, C and D channels.
"""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from model.heads import NativeEnsemble, require_stages
from model.layers.random import Dropout, RandomLayer, RandomScale
from model.registry import BackboneRequest, MemberForm, build_network, note_request, request_of
from model.splitnet import SplitNet
from model.staged import MemberLayer, Staged, classifier_names, staged_parts
from utils.errors import UserError
from utils.seed import STREAM_INIT, STREAM_METHOD, fold_in, stream_uniform, torch_generator

logger = logging.getLogger(__name__)

_MEMBER_INIT = 2_000_000  # the part of the initialisation stream that members draw their own numbers from


class MemberNet(SplitNet):
    """M members in one network.

    Args:
        network: the one network, changed in place.
        form: what the members are.
    """

    def __init__(self, network: nn.Module, form: MemberForm) -> None:
        super().__init__([network])
        self.form = form
        note_request(network, replace(request_of(network), form=form))

    @property
    def num_members(self) -> int:
        return self.form.members

    @property
    def execution(self) -> str:
        return "loop"

    @execution.setter
    def execution(self, name: str) -> None:
        if name != "loop":
            logger.info("execution %s: these members share one network; it runs as it is (loop).", name)

    def from_whole(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a plain network of this backbone gives the members; what it does not give stays as it is.

        Args:
            state: the plain network's tensors, by its own names.

        Returns:
            tensors by the names of `models[0]`.
        """
        return dict(state)

    def members_first(self, views_VBCHW: Tensor) -> Tensor:
        """Every member's view [M, B, C, H, W]: one view is repeated without a copy.

        Raises:
            ValueError: the number of views is neither 1 nor M.
        """
        views = views_VBCHW.unsqueeze(0) if views_VBCHW.dim() == 4 else views_VBCHW
        if len(views) not in (1, self.num_members):
            raise ValueError(f"{self.num_members} members take 1 or {self.num_members} views, got {len(views)}")
        return views.expand(self.num_members, *views.shape[1:])


def build_members(request: BackboneRequest, *, seed: int) -> MemberNet:
    """The network that a request with a form stands for, on the CPU; initial weights depend on `seed` only.

    Raises:
        UserError: as `check_request`, or a network that cannot take the form.
    """
    form = request.form
    assert form is not None
    kind = FORMS[form.kind]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(fold_in(seed, STREAM_INIT, 0))
        network = build_network(replace(request, form=None))
        return kind(network, form, seed)


# ---- BatchEnsemble ---------------------------------------------------------------------------------------------------


class RankOne(MemberLayer):
    """A layer with one kernel and, for each member, a factor of every input and output channel, and a bias.

        y_m = s_m ∘ ( W * (r_m ∘ x_m) ) + b_m        (Wen et al., arXiv:2002.06715)

    Args:
        layer: convolution or linear layer; its bias, if any, becomes every member's.
        members: M.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, members: int) -> None:
        super().__init__()
        if isinstance(layer, nn.Conv2d):
            inputs, outputs, self.channel_dim = layer.in_channels, layer.out_channels, 2
        else:
            inputs, outputs, self.channel_dim = layer.in_features, layer.out_features, -1
        self.layer = layer
        self.r = nn.Parameter(torch.ones(members, inputs))
        self.s = nn.Parameter(torch.ones(members, outputs))
        own = layer.bias
        self.bias = None if own is None else nn.Parameter(own.detach().expand(members, -1).clone())
        layer.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """Members one after another in the batch: [M · B, ...] -> the same, channels as the layer's."""
        members = len(self.r)
        x = (x.unflatten(0, (members, -1)) * self._across(self.r, x)).flatten(0, 1)
        y: Tensor = self.layer(x)
        y_MB = y.unflatten(0, (members, -1)) * self._across(self.s, y)
        if self.bias is not None:
            y_MB = y_MB + self._across(self.bias, y)
        return y_MB.flatten(0, 1)

    def _across(self, values_MC: Tensor, x: Tensor) -> Tensor:
        """Values of channels so that they broadcast over [M, B, ...]."""
        shape = [1] * (x.dim() + 1)
        shape[0], shape[self.channel_dim] = values_MC.shape
        return values_MC.reshape(shape).to(x.dtype)

    def folded(self, member: int) -> nn.Module:
        """A plain layer with W_m = s_m W r_m and the member's bias; grouped and depthwise convolutions alike."""
        layer = copy.deepcopy(self.layer)
        weight, r, s = self.layer.weight.detach(), self.r[member].detach(), self.s[member].detach()
        groups = self.layer.groups if isinstance(self.layer, nn.Conv2d) else 1
        tail = [1] * (weight.dim() - 2)
        inputs = r.reshape(groups, 1, -1).expand(-1, len(s) // groups, -1).reshape(len(s), -1, *tail)
        layer.weight = nn.Parameter(weight * inputs * s.reshape(-1, 1, *tail))
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias[member].detach().clone())
        return layer


class MemberNorms(nn.ModuleList):
    """A normalisation for each member of M · B maps, member by member."""

    def forward(self, x: Tensor) -> Tensor:
        """[M · B, ...] -> the same."""
        return torch.cat([norm(part) for norm, part in zip(self, x.chunk(len(self)), strict=True)])


class BatchEnsembleNet(MemberNet):
    """M rank-1 perturbations of one network, run as M · B images through it.

    Normalisations share weights and statistics over all maps, unless the form's `norm` is "member". The factors are
    drawn from (seed, member): from N(1, σ²) where the form's `init` is -σ, or 1 with probability p and -1 else, where
    it is p > 0; 0: all are 1.
    """

    def __init__(self, network: nn.Module, form: MemberForm, seed: int) -> None:
        super().__init__(network, form)
        for parent, name, layer in [*_layers(network)]:
            setattr(parent, name, RankOne(layer, form.members))
        if form.numbers["norm"] == "member":
            norms = [(p, n, m) for p in network.modules() for n, m in p.named_children() if isinstance(m, NORMS)]
            for parent, name, norm in norms:
                setattr(parent, name, MemberNorms(copy.deepcopy(norm) for _ in range(form.members)))
        self._draw(float(form.numbers["init"]), seed)

    @torch.no_grad()
    def _draw(self, init: float, seed: int) -> None:
        for member in range(self.num_members):
            generator = torch_generator(seed, STREAM_INIT, _MEMBER_INIT + member)
            for factors in self.fast_parameters().values():
                size = factors.shape[1]
                if init < 0:
                    values = 1 - init * torch.randn(size, generator=generator, device="cpu")
                elif init > 0:
                    values = 2.0 * (torch.rand(size, generator=generator, device="cpu") < init) - 1
                else:
                    values = torch.ones(size, device="cpu")
                if not factors.is_meta:
                    factors[member].copy_(values)

    def fast_parameters(self) -> dict[str, nn.Parameter]:
        """The factors r and s [M, C] of every layer, by name."""
        parts = ((name, part) for name, part in self.named_modules() if isinstance(part, RankOne))
        return {f"{name}.{which}": getattr(part, which) for name, part in parts for which in ("r", "s")}

    def from_whole(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Kernels are shared, biases every member's, norms too where each has its own; the factors stay as drawn."""
        given: dict[str, Tensor] = {}
        for name, value in state.items():
            owner, _, leaf = name.rpartition(".")
            part = self.models[0].get_submodule(owner)
            if isinstance(part, MemberNorms):
                given |= {f"{owner}.{member}.{leaf}": value for member in range(self.num_members)}
            elif isinstance(part, RankOne) and leaf == "bias":
                given[name] = value.expand(self.num_members, -1)
            else:
                given[f"{owner}.layer.{leaf}" if isinstance(part, RankOne) else name] = value
        return given

    def forward(self, views_VBCHW: Tensor) -> Tensor:
        """Views [M, B, C, H, W], or one for all -> logits [M, B, K]."""
        views = self.members_first(views_VBCHW)
        logits: Tensor = self.models[0](views.flatten(0, 1))
        return logits.unflatten(0, (self.num_members, -1))

    def folded(self) -> SplitNet:
        """M plain networks that give the same logits in evaluation mode."""
        networks = []
        for member in range(self.num_members):
            network = copy.deepcopy(self.models[0])
            for parent in [*network.modules()]:
                for name, part in [*parent.named_children()]:
                    if isinstance(part, RankOne):
                        setattr(parent, name, part.folded(member))
                    elif isinstance(part, MemberNorms):
                        setattr(parent, name, part[member])
            note_request(network, replace(request_of(network), form=None))
            networks.append(network)
        return SplitNet(networks).train(self.training)


NORMS = (nn.BatchNorm2d, nn.BatchNorm1d, nn.LayerNorm, nn.GroupNorm)


def _layers(network: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Conv2d | nn.Linear]]:
    """(parent, name, layer) of every convolution and linear layer; attention's projections are none of their own."""
    for parent in network.modules():
        if isinstance(parent, nn.MultiheadAttention):
            continue
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                yield parent, name, layer


# ---- multi-input multi-output ----------------------------------------------------------------------------------------


class MimoNet(MemberNet):
    """M inputs and M outputs of one network: M views side by side in its channels, M · K logits (arXiv:2010.06610)."""

    def __init__(self, network: nn.Module, form: MemberForm, seed: int) -> None:
        super().__init__(network, form)
        request = request_of(network)
        self._wider: tuple[str, tuple[str, ...]] = "", ()  # names of the layers with M inputs, and with M outputs
        if form.members == 1:
            return
        first, last = _first_convolution(network, request), classifier_names(network)
        if first is None or not last:
            raise UserError(
                f"--arch {request.arch} has no convolution of the image and no classifier for --method mimo."
            )
        self._wider = first, last
        generator = torch_generator(seed, STREAM_INIT, _MEMBER_INIT)
        for name in (first, *last):
            parent, _, own = name.rpartition(".")
            layer = network.get_submodule(name)
            wider = copy.deepcopy(layer)
            assert isinstance(wider, nn.Conv2d | nn.Linear)
            if isinstance(wider, nn.Conv2d):
                wider.in_channels *= form.members
                shape = (wider.out_channels, wider.in_channels, *wider.kernel_size)
            else:
                wider.out_features *= form.members
                shape = (wider.out_features, wider.in_features)
            fan_in = shape[1] * (shape[2] * shape[3] if len(shape) == 4 else 1)
            like = wider.weight
            values = torch.randn(shape, generator=generator, device="cpu") * (2.0 / fan_in) ** 0.5
            wider.weight = nn.Parameter(like.new_empty(shape) if like.is_meta else values.to(like.dtype))
            if wider.bias is not None and isinstance(wider, nn.Linear):
                wider.bias = nn.Parameter(wider.bias.new_zeros(wider.out_features))
            setattr(network.get_submodule(parent), own, wider)

    def from_whole(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The first kernel M times, each 1/M of it: M equal images give what one gave. The classifier stays new."""
        if self.num_members == 1:
            return super().from_whole(state)
        first, last = self._wider
        given = {name: value for name, value in state.items() if name.rpartition(".")[0] not in last}
        kernel = f"{first}.weight"
        given[kernel] = given[kernel].repeat(1, self.num_members, 1, 1) / self.num_members
        return given

    def forward(self, views_VBCHW: Tensor) -> Tensor:
        """Views [M, B, C, H, W], or one for all -> logits [M, B, K]; all members in one pass."""
        views = self.members_first(views_VBCHW)
        logits: Tensor = self.models[0](views.transpose(0, 1).flatten(1, 2))
        return logits.unflatten(1, (self.num_members, -1)).transpose(0, 1)


def _first_convolution(network: nn.Module, request: BackboneRequest) -> str | None:
    """Name of the convolution that reads the image, found by a pass without storage."""
    found: list[str] = []
    handles = [
        layer.register_forward_pre_hook(lambda *_, name=name: found.append(name))
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Conv2d)
    ]
    state = {name: value.to("meta") for name, value in (*network.named_parameters(), *network.named_buffers())}
    training = network.training
    with torch.no_grad():
        functional_call(network.eval(), state, torch.empty(1, 3, request.crop_size, request.crop_size, device="meta"))
    network.train(training)
    for handle in handles:
        handle.remove()
    return found[0] if found else None


# ---- Monte-Carlo dropout ---------------------------------------------------------------------------------------------


class FixedDropout(RandomScale):
    """Dropout that draws for every image in training, and by a fixed mask of each member in evaluation.

    Args:
        rate: p; kept numbers are multiplied by 1 / (1 - p).
        by_channel: whole channels are dropped, else single numbers.
        dim: of the features, counts channels.
    """

    def __init__(self, rate: float, *, by_channel: bool, dim: int = 1) -> None:
        super().__init__()
        self.rate, self.by_channel, self.dim = rate, by_channel, dim
        self.member_key: Tensor | None = None
        self.place = 0

    @property
    def is_random(self) -> bool:
        return self.rate > 0 and (self.training or self.member_key is not None)

    def draw(self, features: Tensor) -> tuple[Tensor, ...]:
        rest = [*features.shape[1:]]
        if self.by_channel:
            rest = [1] * len(rest)
            rest[self.dim - (self.dim > 0)] = features.shape[self.dim]
        if self.training or self.member_key is None:
            uniform = self.uniform((len(features), *rest), features.device)
        else:
            uniform = stream_uniform(self.member_key, self.place, (1, *rest))
        return ((uniform >= self.rate) / (1 - self.rate),)


class MCDropoutNet(MemberNet):
    """T passes of one network with dropout on (arXiv:1506.02142), whose masks are fixed: ours.

    The mask of (pass, layer) is drawn once from (seed, pass, layer), a number for each channel or unit, and serves
    every image, so that a prediction is a function of the image alone. What lies before the first active dropout runs
    once.
    """

    keys_T: Tensor

    def __init__(self, network: nn.Module, form: MemberForm, seed: int) -> None:
        super().__init__(network, form)
        place, rate = str(form.numbers["place"]), float(form.numbers["rate"])
        keys = [fold_in(int(form.numbers["mask_seed"]), STREAM_METHOD, member) for member in range(form.members)]
        self.register_buffer("keys_T", torch.tensor(keys, dtype=torch.int64, device="cpu"), persistent=False)
        drops: list[FixedDropout] = []
        # in a tuple, so that it is no part of the state; kept, because a copy of a library's network does not know it
        self._staged: tuple[Staged, ...] = ()
        if place != "own":
            parts = staged_parts(network)
            if parts is None:
                raise UserError(
                    f"--method mc_dropout: {request_of(network).arch} has no stages that run one after another; pick "
                    "another --arch, or --mc_dropout_place own."
                )
            self._staged = (parts,)
            count = len(parts.stages) if place == "stages" else 0
            drops = [FixedDropout(rate, by_channel=True, dim=parts.channel_dim) for _ in range(count)]
            drops.append(FixedDropout(rate, by_channel=False))
            # beside the network's own parts, so that random layers are told apart; no tensors, so no names in a state
            network.add_module("mc_dropout", nn.ModuleList(drops))
        else:
            for parent in [*network.modules()]:
                for name, layer in [*parent.named_children()]:
                    if isinstance(layer, RandomLayer) and isinstance(layer, nn.Dropout | nn.Dropout2d) and layer.p > 0:
                        own = FixedDropout(layer.p, by_channel=not isinstance(layer, Dropout))
                        setattr(parent, name, own)
                        drops.append(own)
            if not drops:
                raise UserError(
                    "--mc_dropout_place own: --arch has no dropout layers of its own. Take stages or classifier."
                )
        for number, drop in enumerate(drops):
            drop.place = number

    def _drops(self) -> list[FixedDropout]:
        return [part for part in self.models[0].modules() if isinstance(part, FixedDropout)]

    def forward(self, views_VBCHW: Tensor) -> Tensor:
        """Images [B, C, H, W], or one view -> logits [T, B, K]; in training [1, B, K], of one pass."""
        images = views_VBCHW if views_VBCHW.dim() == 4 else views_VBCHW[0]
        parts = self._staged[0] if self._staged else None
        drops = self._drops()
        shared = self._before(images, parts)
        if self.training:
            return self._pass(shared, parts, drops).unsqueeze(0)
        passes = []
        try:
            for key in self.keys_T:
                for drop in drops:
                    drop.member_key = key
                passes.append(self._pass(shared, parts, drops))
        finally:
            for drop in drops:
                drop.member_key = None
        return torch.stack(passes)

    def _before(self, images: Tensor, parts: Staged | None) -> Tensor:
        """What all passes share: up to the first stage, up to the embedding, or nothing but the images."""
        if parts is None:
            return images
        if self.form.numbers["place"] == "classifier":
            return parts.forward_features(images)[1]
        found: Tensor = parts.stages[0](parts.stem(images))
        return found

    def _pass(self, shared: Tensor, parts: Staged | None, drops: Sequence[FixedDropout]) -> Tensor:
        """Logits [B, K] of one pass, from what all passes share."""
        if parts is None:
            logits: Tensor = self.models[0](shared)
            return logits
        *of_stages, of_embedding = drops
        if of_stages:
            shared = of_stages[0](shared)
            for stage, drop in zip(parts.stages[1:], of_stages[1:], strict=True):
                shared = drop(stage(shared))
            shared = parts.tail(shared)
        return parts.classify(of_embedding(shared))


# ---- branches and their gate -----------------------------------------------------------------------------------------


class GatedNet(MemberNet):
    """A network with branches behind its last stage but one, and their gated mixture as its answer (arXiv:1806.04606).

    Branch 1 is the network's own last stage; the one member is the mixture.

    Raises:
        UserError: a network without stages, or with one only.
    """

    def __init__(self, network: nn.Module, form: MemberForm, seed: int) -> None:
        parts = require_stages(network, "one", at_least=2)
        ensemble = NativeEnsemble(parts, int(form.numbers["branches"]))
        super().__init__(network, form)
        # in a tuple, as above
        self._staged = (parts,)
        network.add_module("native_ensemble", ensemble)

    @property
    def ensemble(self) -> NativeEnsemble:
        """The branches beside the network's own, and the gate."""
        found = self.models[0].native_ensemble
        assert isinstance(found, NativeEnsemble)
        return found

    def forward(self, views_VBCHW: Tensor) -> Tensor:
        """Images [B, C, H, W], or one view -> logits [1, B, K] of the mixture."""
        images = views_VBCHW if views_VBCHW.dim() == 4 else views_VBCHW[0]
        logits_MBK, weights_BM = self.ensemble(self._staged[0], images)
        return self.ensemble.mixture(logits_MBK.to(weights_BM.dtype), weights_BM)[None]


FORMS: Mapping[str, Any] = {
    "batch_ensemble": BatchEnsembleNet,
    "mimo": MimoNet,
    "mc_dropout": MCDropoutNet,
    "gated": GatedNet,
}
