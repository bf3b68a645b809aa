"""The weights that a run starts from, and what they want to see: --pretrained FILE, library, or a list of these."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.division.fitting import are_fitted
from model.members import MemberNet
from model.registry import LARGE, BackboneRequest, backbones, build_network, request_of, split_list
from model.restore import library_state, load_state, network_state, stored_networks, stored_plan
from model.slices import cut
from model.splitnet import SplitNet
from model.staged import classifier_names
from recipe.datasets import ROWS
from recipe.preprocessing import Preprocessing, eval_resize
from utils.errors import UserError

logger = logging.getLogger(__name__)

LIBRARY = "library"  # in place of a file


@dataclass(frozen=True)
class Start:
    """Weights to start from, read.

    Attributes:
        names: what --pretrained names: one for all networks, or one for each.
        contents: what each file holds; None for the library's.
    """

    names: tuple[str, ...]
    contents: tuple[Mapping[str, Any] | None, ...]

    @classmethod
    def open(cls, text: str, num_networks: int, read: Callable[[str], Mapping[str, Any]]) -> Start:
        """Read what --pretrained names.

        Args:
            text: a file, `library`, or a comma list of as many as there are networks.
            num_networks: S.
            read: path -> content of a checkpoint.

        Raises:
            UserError: a list of another length; as `read`.
        """
        names = (text,) if Path(text).is_file() else tuple(split_list(text))
        if len(names) not in (1, num_networks):
            raise UserError(
                f"--pretrained names {len(names)} files and there are {num_networks} networks: name one for each, or "
                "one for all."
            )
        return cls(names, tuple(None if name == LIBRARY else read(name) for name in names))

    @property
    def is_fitted(self) -> bool:
        """Whether networks of a file have patches or windows that were fitted to small images.

        Raises:
            UserError: a file's plan is damaged.
        """
        plans = [
            stored_plan(content, f"--pretrained {name}")
            for name, content in zip(self.names, self.contents, strict=True)
            if content is not None
        ]
        return any(are_fitted(plan["width_names"]) for plan in plans)

    def preprocessing(self, archs: Sequence[str], *, may_differ: bool = False) -> Preprocessing | None:
        """What the weights of the first network of which it is known were trained to see; None where nobody says it.

        Args:
            archs: the backbone of each network, or one for all.
            may_differ: the means and deviations are settled otherwise.

        Raises:
            UserError: the networks' weights want different means or deviations.
        """
        count = max(len(archs), len(self.names))
        wanted = {}
        for i in range(count):
            which = i if len(self.names) > 1 else 0
            name, arch = self.names[which], archs[i if len(archs) > 1 else 0]
            found = _wanted(name, self.contents[which], arch)
            if found is not None:
                wanted[f"{name} ({arch})"] = found
        if not wanted:
            return None
        (first, one), *others = wanted.items()
        for name, other in others:
            if (one.mean, one.std) != (other.mean, other.std) and not may_differ:
                raise UserError(
                    f"--pretrained: {first} wants images of mean {_shown(one.mean)} and deviation {_shown(one.std)}, "
                    f"{name} of {_shown(other.mean)} and {_shown(other.std)}, and a run gives all networks the same: "
                    "choose by --mean and --std."
                )
        return one

    def is_parent(self, network: SplitNet) -> bool:
        """Whether the weights are those of one whole network, and the networks parts of its division: slices of it."""
        if len(self.names) > 1 or request_of(network.models[0]).split_factor == 1:
            return False
        content = self.contents[0]
        if content is None:
            return True
        state, _ = network_state(content, "auto", f"--pretrained {self.names[0]}")
        return stored_networks(state) == [0] and not _has(network.models[0], _of_one(_renamed(state, network)))

    def load_into(self, network: SplitNet, *, seed: int = 0) -> list[str]:
        """Give the networks the weights; returns the names of the classifiers that another size keeps as new.

        A file of one network serves each of several full ones, and members that share one (`model.members`); a file of
        S networks serves S; a whole network gives the parts of its division slices (`model.slices`), whose running
        statistics are to be made anew.

        Args:
            seed: of the run; decides which channels a part takes.

        Raises:
            UserError: the weights are not those of this structure.
        """
        state: dict[str, Tensor] = {}
        if self.is_parent(network):
            return load_state(network, self._sliced(network, seed), f"--pretrained {self.names[0]}")
        if len(self.names) == 1:
            state = self._state(0, network)
        else:
            for i in range(len(network.models)):
                state |= self._one(i, network)
        if isinstance(network, MemberNet) and _has(plain := _plain(network), _of_one(state)):
            return _into_members(network, _of_one(state), _heads(plain))
        try:
            return load_state(network, state, f"--pretrained {','.join(self.names)}")
        except UserError as error:
            form = request_of(network.models[0]).form
            if form is not None and form.kind != "mc_dropout":
                one = (
                    ""
                    if form.kind == "packed"
                    else f" one network's of --arch {request_of(network.models[0]).arch}, or"
                )
                raise UserError(
                    f"--pretrained {','.join(self.names)}: members of the form {form.kind} are not built as the file's "
                    f"networks are. Give{one} a checkpoint of the same form and number of members, or leave the flag "
                    "away."
                ) from None
            near = self._near(network, state)
            raise UserError(f"{error}{near}") from None

    def _state(self, which: int, network: SplitNet) -> dict[str, Tensor]:
        """Weights of all networks out of one entry."""
        content, count = self.contents[which], len(network.models)
        if content is None:
            return {f"models.{i}.{k}": v for i, one in enumerate(network.models) for k, v in library_state(one).items()}
        state, _ = network_state(content, "auto", f"--pretrained {self.names[which]}")
        if stored_networks(state) == [0] and count > 1:
            state = {name.replace("models.0.", f"models.{i}.", 1): v for i in range(count) for name, v in state.items()}
        return _renamed(state, network)

    def _one(self, i: int, network: SplitNet) -> dict[str, Tensor]:
        """Weights of network i out of the entry that is its own."""
        content, name = self.contents[i], self.names[i]
        if content is None:
            return {f"models.{i}.{key}": value for key, value in library_state(network.models[i]).items()}
        state, _ = network_state(content, "auto", f"--pretrained {name}")
        if stored_networks(state) != [0]:
            raise UserError(
                f"--pretrained {name}: holds {len(stored_networks(state))} networks; in a list, each file is of one."
            )
        return _renamed({f"models.{i}.{key.removeprefix('models.0.')}": v for key, v in state.items()}, network)

    def _sliced(self, network: SplitNet, seed: int) -> dict[str, Tensor]:
        """Weights of the parts of a division, cut from those of the whole network."""
        request, content, source = request_of(network.models[0]), self.contents[0], f"--pretrained {self.names[0]}"
        if content is None:
            whole = dict(library_state(network.models[0], divided=True))
        else:
            whole = _of_one(_renamed(network_state(content, "auto", source)[0], network))
        count = len(network.models)
        found = cut(whole, request, networks=count, seed=seed, source=source)
        logger.info(
            "%s: one whole network; each of the %d starts from a slice of it (two of them share %.0f %% of their "
            "channels): sliced, not trained.",
            source,
            count,
            100 * found.shared,
        )
        # a classifier for other classes keeps its old size here, and so is seen to be another
        return {f"models.{i}.{key}": value for i in range(count) for key, value in (whole | found.states[i]).items()}

    def _near(self, network: SplitNet, state: Mapping[str, Tensor]) -> str:
        """Which other --arch the file fits, in words."""
        if self.contents[0] is None:
            return ""
        names = archs_that_fit(_of_one(state), request_of(network.models[0]))
        if not names:
            return ""
        return f" {' or '.join(names)} load{'s' * (len(names) == 1)} this file: --arch {names[0]}."


def _plain(network: MemberNet) -> nn.Module:
    """The network that members share as it is without them, on the meta device."""
    with torch.device("meta"):
        return build_network(replace(request_of(network.models[0]), form=None))


def _into_members(network: MemberNet, state: Mapping[str, Tensor], own_heads: tuple[str, ...]) -> list[str]:
    """Give members the weights of one plain network; returns the names of the classifiers where they start anew.

    Args:
        state: by the plain network's own names.
        own_heads: prefixes of its classifiers' names.
    """
    given, own = network.from_whole(state), network.models[0].state_dict()
    heads = {key for key in given if key.startswith(own_heads)}
    is_new = not heads or any(given[key].shape != own[key].shape for key in heads)
    kept = {key: value for key, value in given.items() if not (is_new and key in heads)}
    network.models[0].load_state_dict({**own, **kept})
    return [f"models.0.{head.removesuffix('.')}" for head in own_heads if is_new]


def _of_one(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the first network, by its own names."""
    return {key.removeprefix("models.0."): v for key, v in state.items() if key.startswith("models.0.")}


def archs_that_fit(state: Mapping[str, Tensor], request: BackboneRequest) -> list[str]:
    """Names, near to the one that was asked for, of whole networks that have just these tensors.

    Args:
        state: of one network, by its own names.
        request: what was asked for.
    """
    base = request.arch.rpartition("/")[2].removesuffix("_imagenet").removesuffix("_cifar")
    near = [f"torchvision/{base}", f"{base}_imagenet", base, f"{base}_cifar", f"timm/{base}"]
    return [name for name in near if name != request.arch and _fits(name, state, request)]


def _fits(arch: str, state: Mapping[str, Tensor], request: BackboneRequest) -> bool:
    """Whether a network has these tensors, the classifier's size aside, in one of its forms."""
    try:
        entry = backbones.get(arch)
        networks = []
        for shape in entry.split_factors:
            side = entry.crop_size or (224 if shape == LARGE else 32)
            whole = replace(request, arch=arch, split_factor=1, widths=None, way="", width_names=())
            whole = replace(whole, shape=shape, crop_size=side)
            with torch.device("meta"):
                networks.append(build_network(whole))
    except UserError:
        return False
    return any(_has(network, state) for network in networks)


def _has(network: nn.Module, state: Mapping[str, Tensor]) -> bool:
    heads = _heads(network)
    shapes = {
        key: value.shape for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")
    }
    theirs = {key: value.shape for key, value in state.items() if not key.endswith("num_batches_tracked")}
    return shapes.keys() == theirs.keys() and all(
        theirs[key] == shape for key, shape in shapes.items() if not key.startswith(heads)
    )


def _heads(network: nn.Module) -> tuple[str, ...]:
    """How the names of a network's classifiers' tensors begin."""
    return tuple(f"{head}." for head in classifier_names(network))


def _renamed(state: Mapping[str, Tensor], network: SplitNet) -> dict[str, Tensor]:
    """The tensors by the names of today, where a library has released files with older ones."""
    released_name = backbones.get(request_of(network.models[0]).arch).released_name
    return dict(state) if released_name is None else {released_name(key): value for key, value in state.items()}


def _wanted(name: str, content: Mapping[str, Any] | None, arch: str) -> Preprocessing | None:
    """How one network's weights want images."""
    source = f"--pretrained {name}"
    stored = None if content is None else content.get("preprocessing")
    if isinstance(stored, Mapping):
        return Preprocessing.from_dict(stored, source)
    if content is not None and isinstance(content.get("config"), Mapping):
        return _of_older_checkpoint(content, source)
    entry = backbones.get(arch)
    return None if entry.preprocessing is None else entry.preprocessing(Path(name).name)


def _of_older_checkpoint(content: Mapping[str, Any], source: str) -> Preprocessing | None:
    """Of a checkpoint of this project that says it in several entries."""
    config, crop, row = content["config"], content.get("crop_size"), ROWS.get(str(content.get("data_recipe")))
    if not (isinstance(crop, int) and row is not None and "mean" in content and "std" in content):
        return None
    return Preprocessing.from_dict(
        {
            **Preprocessing(resize=1, interpolation="bicubic", crop=1, mean=(0, 0, 0), std=(1, 1, 1)).as_dict(),
            "resize": eval_resize(crop, config.get("crop_pct")) if row.is_large else crop,
            "interpolation": config.get("eval_interpolation", "bicubic"),
            "crop": crop,
            "mean": content["mean"],
            "std": content["std"],
        },
        source,
    )


def has_layer_norm(request: BackboneRequest) -> bool:
    """Whether a network normalises by layers: transformers and ConvNeXt do.

    Raises:
        UserError: as `build_network`.
    """
    one = replace(request, split_factor=1, widths=None, way="", width_names=(), divide_by=None)
    with torch.device("meta"):
        try:
            network = build_network(replace(one, fits_images=False))  # whether patches are fitted is not known here
        except UserError:
            network = build_network(one)
    return any("layernorm" in type(module).__name__.lower() for module in network.modules())


def _shown(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)
