"""SplitNet: S networks side by side, one view each, logits out."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from model.execution import Execution
from model.layers.narrow_norm import widen_narrow_norms
from model.layers.onednn import mend_convolutions
from model.layers.random import RandomLayer, follow, replace_dropout
from utils.mesh import Mesh
from utils.recording import Recorder
from utils.seed import fold_in


class NumberedModules(nn.ModuleList):
    """Modules of a list that keep the numbers, and so the state-dict keys, that they have in the whole list.

    They are indexed from 0, as those of any other list.

    Args:
        modules: consecutive ones of the whole list.
        first: number of the first.
    """

    def __init__(self, modules: Iterable[nn.Module], first: int = 0) -> None:
        super().__init__()
        self.first = first
        for number, module in enumerate(modules, start=first):
            self.add_module(str(number), module)

    def _get_abs_string_index(self, idx: int) -> str:
        return str(self.first + int(super()._get_abs_string_index(idx)))


class SplitNet(nn.Module):
    """S networks that share a task but no weights (Zhao et al., arXiv:2011.14660, section 3).

    State-dict keys are `models.<i>.<name>`, as in the published checkpoints without their `module.` prefix.

    The networks given are changed in place, in nothing that a state dict or a float64 result shows: dropout draws by
    keys of its own (`begin_step`), and on CPUs some convolutions and narrow batch norms take other ways
    (model/layers/onednn.py, narrow_norm.py; `restore_narrow_norms` undoes the latter for torch.compile).

    Args:
        networks: S modules, each mapping [B, C, H, W] to logits [B, K]; usually of one structure.
        first: number of the first of them where they are some of more: random layers draw as they do among all.

    Attributes:
        asleep: names of submodules that are in evaluation mode whatever `train()` says, see `model.depth.freeze`.
        mesh: where the other networks are, after `hold`; None: all are here.
    """

    def __init__(self, networks: Sequence[nn.Module], *, first: int = 0) -> None:
        super().__init__()
        if not networks:
            raise ValueError("SplitNet needs at least one network.")
        for network in networks:
            replace_dropout(network)
            mend_convolutions(network)
            widen_narrow_norms(network)
        self.models = nn.ModuleList(networks)
        self._first = first
        self.asleep: tuple[str, ...] = ()
        self.mesh: Mesh | None = None
        self._execution = Execution()
        self._keys_S: Tensor | None = None
        self._key_is_given = False

    def hold(self, mesh: Mesh) -> None:
        """Keep only the networks that are this process's own, under their names; the logits stay those of all S.

        Every process of the mesh must call what gives logits together with the others.
        """
        held = mesh.held(len(self.models))
        self.models = NumberedModules(self.models[held.start : held.stop], held.start)
        self.mesh = mesh

    @property
    def split_factor(self) -> int:
        """S, the number of networks, also of those that other processes hold."""
        return len(self.models) * (1 if self.mesh is None else self.mesh.groups)

    @property
    def num_members(self) -> int:
        """How many rows of logits it gives: S, or more where members share a network (model/members.py)."""
        return self.split_factor

    def numbered(self) -> Iterator[tuple[int, nn.Module]]:
        """The networks held, each with the number in the names of its parameters."""
        return enumerate(self.models, start=0 if self.mesh is None else self.first_network)

    @property
    def first_network(self) -> int:
        """Number of the first network held, among all S."""
        return self._first if self.mesh is None else self.mesh.held(self.split_factor).start

    @property
    def execution(self) -> str:
        """How the networks run: a name of model.execution.EXECUTIONS; after the first pass, the strategy in use."""
        return self._execution.name

    @execution.setter
    def execution(self, name: str) -> None:
        self._execution = Execution(name)

    @property
    def recorder(self) -> Recorder | None:
        """What training passes are recorded by, so that `auto` times replays; None: it times the passes themselves."""
        return self._execution.recorder

    @recorder.setter
    def recorder(self, recorder: Recorder | None) -> None:
        self._execution.recorder = recorder

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode of everything but what is asleep, which is in evaluation mode."""
        super().train(mode)
        for name in self.asleep:
            self.get_submodule(name).train(False)
        return self

    def spread(self, devices: Sequence[torch.device]) -> None:
        """Run network i on the i-th of several GPUs, round and round; views come from, and logits go to, the first."""
        self._execution = Execution("parallel", devices)

    def begin_step(self, key: int) -> None:
        """Let random layers draw by `key` from now on: masks are a function of (key, network, layer) and place.

        A second pass under the same key meets the same masks. Without any call, every pass in training draws a key
        from torch's CPU generator. The key is written in place on the device, so a captured CUDA graph sees it.
        """
        self._key_is_given = True
        self._write_key(key)

    def _write_key(self, key: int) -> None:
        if not any(isinstance(module, RandomLayer) for module in self.models[0].modules()):
            return
        device = next(self.parameters()).device
        if self._keys_S is None or self._keys_S.device != device:
            self._keys_S = torch.zeros(len(self.models), dtype=torch.int64, device=device)
            for network, network_key in zip(self.models, self._keys_S, strict=True):
                follow(network, network_key)
        for i, network_key in enumerate(self._keys_S, start=self.first_network):
            network_key.fill_(fold_in(key, i))

    def forward(self, views_SBCHW: Tensor) -> Tensor:
        """Views [S, B, C, H, W], or one view for all [1, B, C, H, W] or [B, C, H, W] -> logits [S, B, K].

        After `hold`, views are those of the networks held, and the logits of the others are constants, at least
        float32.

        Raises:
            ValueError: the number of views is neither 1 nor that of the networks held.
        """
        views = self.expand_views(views_SBCHW)
        if self.training and not self._key_is_given and not torch.compiler.is_compiling():
            self._write_key(int(torch.randint(2**62, (), device="cpu").numpy()))
        logits = self._execution([*self.models], views)
        return logits if self.mesh is None else self.mesh.gather_networks(logits)

    def expand_views(self, views_SBCHW: Tensor) -> Tensor:
        """Give every network its view: [B, C, H, W] or [1, B, C, H, W] is repeated without a copy."""
        views = views_SBCHW.unsqueeze(0) if views_SBCHW.dim() == 4 else views_SBCHW
        num_networks = len(self.models)
        if len(views) == 1 and num_networks > 1:
            views = views.expand(num_networks, *views.shape[1:])
        if len(views) != num_networks:
            raise ValueError(
                f"SplitNet has S = {num_networks} networks but got {len(views)} views. "
                f"Make {num_networks} views, or pass --split_factor {len(views)}."
            )
        return views
