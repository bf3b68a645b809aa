"""Checkpoint -> networks: the structure comes from what the file says, the rest from the user's flags."""

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from model.build import BUILDERS, build_splitnet
from model.registry import (
    ARGUMENTS,
    CHANNELS,
    LARGE,
    BackboneRequest,
    MemberForm,
    backbones,
    build_network,
    image_shape,
    names_user_code,
    request_of,
    split_list,
)
from model.splitnet import SplitNet
from model.staged import classifier_name, classifier_names
from recipe.preprocessing import Preprocessing
from utils.errors import UserError
from utils.text import one_line

logger = logging.getLogger(__name__)

PUBLISHED_PREFIX = "module."  # of every tensor of a released checkpoint
# Entries of checkpoints like Cream's released ones, whose `arch` is the name of a run or of another library's network.
FOREIGN = frozenset({"state_dict_ema", "args", "version"})
LARGEST = 2**63 - 1  # of a number in a file; Python reads longer ones, which become no float
_NETWORK_KEY = re.compile(r"^models\.(\d+)\.")


def published_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A SplitNet's state dict under the published names `module.models.<i>...`."""
    return {PUBLISHED_PREFIX + name: value.detach() for name, value in state.items()}


def plain_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `published_keys`; keys without the prefix pass through."""
    return {name.removeprefix(PUBLISHED_PREFIX): value for name, value in state.items()}


@dataclass(frozen=True, kw_only=True)
class NetworkInfo:
    """What a checkpoint says about its networks, completed by the user's flags.

    Attributes:
        archs: name of every network's backbone; one name where all are parts of one division.
        num_networks: how many there are, S.
        split_factor: S of the division that gave the networks their structure; 1 for full networks.
        num_classes: K.
        dataset: data set that the networks were made for.
        crop_size: side of the input in pixels.
        weights: "raw", or "ema" where the moving average of the weights was taken.
        request: structure of the first network.
        codes: names of the classes in the data, where `classes` are others that a --class_map gave.
        classes, mean, std, data_recipe, preprocessing, epoch, best_acc1: of our checkpoints, None in released ones and
            older ones that lack them.
    """

    archs: tuple[str, ...]
    num_networks: int
    split_factor: int
    num_classes: int
    dataset: str
    crop_size: int
    weights: str
    request: BackboneRequest
    classes: tuple[str, ...] | None = None
    codes: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    data_recipe: str | None = None
    preprocessing: Preprocessing | None = None
    epoch: int | None = None
    best_acc1: float | None = None


def restore_splitnet(
    content: Mapping[str, Any],
    *,
    arch: str | None = None,
    split_factor: int | None = None,
    dataset: str | None = None,
    num_classes: int | None = None,
    crop_size: int | None = None,
    options: Mapping[str, Any] | None = None,
    train_separately: bool = False,
    backbone_names: Callable[[str], Sequence[str]] = split_list,
    weights: str = "auto",
    source: str = "--resume",
    arch_flag: str = "arch",
) -> tuple[SplitNet, NetworkInfo]:
    """Networks of a checkpoint, on the CPU, in evaluation mode, with the checkpoint's weights.

    Backbone, S and K come from the file: its `config`, else its `arch`, the number of networks among its keys and the
    shape of the classifier; a family's implementation, where it has two, from the names of the tensors. A released file
    names no data set; `dataset` is what it was trained on then.

    Args:
        content: a loaded checkpoint, keys of its `state_dict` (and `state_dict_ema`) with or without `module.` in
            front; or the plain state dict of one network, as libraries publish them.
        arch, split_factor, num_classes: what the user claims; None takes the file's.
        dataset, crop_size: the user's; they decide the structure only where the file does not say.
        options: flags of the backbone families that the user set, by name; they win over the file's.
        backbone_names: arch -> the backbones that it stands for, where a method has names of its own for lists.
        train_separately: one network with the structure of one of S (--is_train_sep, --network), where the file does
            not say.
        weights: "raw", "ema" (the moving average), or "auto": the moving average where there is one.
        source: how errors call the file ("--resume PATH").
        arch_flag: how they call the flag that gives `arch`.

    Raises:
        UserError: the file holds no such networks, does not say what they are, or contradicts a flag.
    """
    state, taken = network_state(content, weights, source)
    numbers = stored_networks(state)
    if not numbers or numbers != list(range(len(numbers))):
        raise UserError(f"{source}: holds no networks: expected weights named models.0.*, models.1.*, …")
    config = _entry(content, "config", dict, source) or {}

    in_file = _entry(config, "arch", str, source)
    if in_file is None and not FOREIGN & content.keys():
        in_file = _entry(content, "arch", str, source)
        if in_file is not None and not names_user_code(in_file):
            in_file = _released_arch(arch, in_file, backbone_names, source, arch_flag)
    arch = chosen_arch(arch, in_file, source, arch_flag)
    names = tuple(backbone_names(arch))
    train_separately = train_separately or bool(config.get("is_train_sep")) or config.get("network") is not None
    if len(names) > 1:
        found, factor = len(names), 1
    else:
        in_file = _entry(config, "split_factor", int, source) if train_separately else len(numbers)
        factor = _agreed("split_factor", split_factor, in_file, source) or 1
        found = 1 if train_separately else factor
    form = stored_form(content, source)
    if form is not None:
        found, factor = form.members if form.kind == "packed" else 1, 1
    if found != len(numbers):
        raise UserError(f"{source}: holds {len(numbers)} networks, and --arch {arch} is {found}.")

    made_for = _entry(config, "dataset", str, source) or dataset
    if made_for is None:
        raise UserError(f"{source}: does not say which data set its networks are for: add --dataset NAME.")
    size_in_file = _entry(content, "crop_size", int, source) or _entry(config, "crop_size", int, source)
    shape = image_shape(made_for, size_in_file or crop_size or 32)
    usual_size = (backbones.get(names[0]).crop_size or 224) if shape == LARGE else 32
    options_in = backbones.get(names[0]).options_in
    shown = options_in({key.removeprefix("models.0.") for key in state}) if options_in else {}
    request = BackboneRequest(
        arch=names[0],
        split_factor=factor,
        shape=shape,
        dataset=made_for,
        crop_size=crop_size or size_in_file or usual_size,
        options={**shown, **config, **(options or {})},
        divide_by=_entry(config, "divide_by", str, source),
        **stored_plan(content, source, is_list=len(names) > 1),
        form=form,
    )
    in_file = _num_classes(state, request) if form is None else len(content.get("classes") or ()) or None
    num_classes = _agreed("num_classes", num_classes, in_file, source)
    request = replace(request, num_classes=num_classes or request.num_classes)
    several = names if len(names) > 1 else None
    network = build_splitnet(request, seed=0, archs=several, train_separately=train_separately)
    _load(network, state, f"{source}: not the weights of --arch {arch} --dataset {made_for} --split_factor {factor}")
    classes = _entry(content, "classes", list, source)
    codes = _entry(content, "codes", list, source)
    best_acc1 = _entry(content, "best_acc1", (float, int, Tensor), source)
    preprocessing = _entry(content, "preprocessing", dict, source)
    info = NetworkInfo(
        archs=names,
        num_networks=network.num_members,
        split_factor=factor,
        num_classes=request.num_classes,
        dataset=made_for,
        crop_size=request.crop_size,
        weights=taken,
        request=request,
        classes=None if classes is None else tuple(one_line(str(name)) for name in classes),
        codes=None if codes is None else tuple(one_line(str(name)) for name in codes),
        mean=_per_channel(content, "mean", source),
        std=_per_channel(content, "std", source),
        data_recipe=_entry(content, "data_recipe", str, source),
        preprocessing=None if preprocessing is None else Preprocessing.from_dict(preprocessing, source),
        epoch=_entry(content, "epoch", int, source),
        best_acc1=None if best_acc1 is None else float(best_acc1),
    )
    if info.classes is not None and len(info.classes) != info.num_classes:
        raise UserError(f"{source}: names {len(info.classes)} classes, and its networks have {info.num_classes}.")
    return network.eval(), info


def load_state(network: SplitNet, state: Mapping[str, Tensor], source: str) -> list[str]:
    """Take weights into `network`; returns the names of the classifiers that another size keeps as new.

    Args:
        state: tensors as `models.<i>...`, of networks of this structure.
        source: how errors call where they come from.

    Raises:
        UserError: the weights are not those of this structure.
    """
    heads = {f"models.{i}.{head}" for i, one in enumerate(network.models) for head in classifier_names(one)}
    complaint = f"{source}: not the weights of these {len(network.models)} networks"
    return _load(network, state, complaint, heads=heads)


def library_state(network: nn.Module, *, divided: bool = False) -> Mapping[str, Tensor]:
    """The published weights of a network that is a library's own, by its state-dict names.

    Args:
        divided: of the whole network, where this one is a part of its division; else that is refused.

    Raises:
        UserError: the network is not a library's, or not whole, or its weights cannot be fetched.
    """
    request = request_of(network)
    fetch = backbones.get(request.arch).pretrained
    if fetch is None:
        raise UserError(
            f"--pretrained library takes a library's weights, and --arch {request.arch} is none of a library's "
            "(torchvision/NAME, timm/NAME). Give the path of a checkpoint."
        )
    if request.split_factor > 1 and not divided:
        raise UserError(
            f"--pretrained library: the library's weights are those of the undivided {request.arch}, and this run "
            f"divides it by {request.split_factor}. Leave --split_factor away, or give a PATH."
        )
    return fetch()


def stored_networks(state: Mapping[str, Tensor]) -> list[int]:
    """The numbers of the networks whose tensors these are."""
    return sorted({int(match[1]) for key in state if (match := _NETWORK_KEY.match(key))})


def stored_plan(content: Mapping[str, Any], source: str, *, is_list: bool = False) -> dict[str, Any]:
    """What the solver found for the networks of the file, as fields of a request; {} where there is no file.

    Args:
        is_list: they are several full networks by name.

    Raises:
        UserError: entries of another form.
    """
    if not content:
        return {}
    names = _entry(content, "width_names", list, source) or []
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"{source}: its entry 'width_names' is damaged: expected names.")
    fits = _entry(content, "fits_images", bool, source)
    way = _entry(content, "way", str, source) or ""
    if way not in ("", CHANNELS, ARGUMENTS):
        raise UserError(f"{source}: its entry 'way' is damaged: {one_line(way)[:40]!r}.")
    widths = stored_widths(content, source)
    # a part of a plan is never completed by solving again: the solver would find the plan of another network
    if (way and not widths) or (names and not way) or (way == ARGUMENTS and len(names) != len(widths or ())):
        raise UserError(
            f"{source}: the plan of its networks is damaged: way {way!r}, {len(widths or ())} 'widths' and "
            f"{len(names)} 'width_names', expected a way and as many of both."
        )
    return {
        "widths": widths,
        "way": way,
        "width_names": tuple(names),
        "library": one_line(_entry(content, "library", str, source) or "")[:40],
        # the plan is that of the first of a list of networks; the others are fitted for themselves, or none is
        "fits_images": is_list and fits is not False,
    }


def stored_widths(content: Mapping[str, Any], source: str) -> tuple[float, ...] | None:
    """The numbers of the plan of the file's networks, None where nothing was solved.

    Raises:
        UserError: they are none.
    """
    values = _entry(content, "widths", list, source)
    if values is not None and not all(_is_number(value) and value > 0 for value in values):
        raise UserError(f"{source}: its entry 'widths' is damaged: expected positive numbers.")
    return tuple(values) if values else None


def stored_form(content: Mapping[str, Any], source: str) -> MemberForm | None:
    """How members share the network of the file; None where they do not."""
    values = _entry(content, "form", dict, source)
    if values is None:
        return None
    kind, members, numbers = values.get("kind"), values.get("members"), values.get("numbers")
    if kind not in BUILDERS or not isinstance(members, int) or members < 1 or not isinstance(numbers, dict):
        raise UserError(f"{source}: its entry 'form' is damaged or of another version: {str(values)[:60]!r}.")
    return MemberForm(kind=kind, members=members, numbers=numbers)


def network_state(content: Mapping[str, Any], weights: str, source: str) -> tuple[dict[str, Tensor], str]:
    """(tensors as `models.<i>...`, which of the two were taken: "raw" or "ema").

    Raises:
        UserError: the file holds no such tensors.
    """
    average = content.get("ema") or content.get("state_dict_ema")
    if weights == "ema" and not average:
        raise UserError(f"{source}: holds no moving average of the weights; use --weights raw or auto.")
    taken = "ema" if average and weights != "raw" else "raw"
    if weights == "auto" and not average and FOREIGN & content.keys():
        logger.warning("%s: holds no moving average of the weights; taking the raw ones.", source)
    plain = bool(content) and all(isinstance(value, Tensor) for value in content.values())
    # DeiT's files and those of torchvision's training scripts call it "model"
    state = average if taken == "ema" else content if plain else content.get("state_dict", content.get("model"))
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{source}: expected tensors by name in its 'state_dict', the weights of the networks.")
    state = plain_keys(state)
    if not any(key.startswith("models.") for key in state):
        state = {f"models.0.{key}": value for key, value in state.items()}
    return state, taken


def _released_arch(
    claimed: str | None, in_file: str, backbone_names: Callable[[str], Sequence[str]], source: str, flag: str
) -> str | None:
    """The backbone that a file of others names, in our words; None where only the flag can say it."""
    if claimed is not None and claimed.rpartition("/")[2] == in_file:
        return claimed  # training scripts of the libraries write a network's name without the library's
    try:
        for name in backbone_names(in_file):
            backbones.get(name)
    except UserError:
        if claimed is None:
            raise UserError(
                f"{source}: calls its networks {in_file!r}, which is no backbone here: add --{flag} NAME."
            ) from None
        return None
    return in_file


def chosen_arch(claimed: str | None, in_file: str | None, source: str, flag: str = "arch") -> str:
    """The backbone that file and flag agree on; a file alone cannot make us run a program.

    Args:
        claimed, in_file: what the flag and the file say; None: nothing.
        source, flag: how errors call the two.

    Raises:
        UserError: neither says it, they contradict each other, or the file alone names a program.
    """
    if in_file is not None and names_user_code(in_file):
        if claimed is None:
            raise UserError(
                f"{source}: its networks come from the program {in_file}, which only you can choose to run: "
                f"add --{flag} FILE.py:FACTORY."
            )
        in_file = claimed if names_user_code(claimed) else in_file
    arch = _agreed(flag, claimed, in_file, source)
    if arch is None:
        raise UserError(f"{source}: does not say which backbone it holds: add --{flag} NAME.")
    return str(arch)


def _agreed(flag: str, claimed: Any, in_file: Any, source: str) -> Any:
    """What both say, or the one that says anything."""
    if claimed is not None and in_file is not None and claimed != in_file:
        raise UserError(f"--{flag} {claimed} contradicts {source}, which has {in_file}: leave the flag away.")
    return claimed if in_file is None else in_file


def _num_classes(state: Mapping[str, Tensor], request: BackboneRequest) -> int | None:
    """K by the rows of the first network's classifier; None where the weights are of another structure."""
    with torch.device("meta"):
        structure = build_network(request)
    weight = state.get(f"models.0.{classifier_name(structure)}.weight")
    return None if weight is None else len(weight)


def _load(network: SplitNet, state: Mapping[str, Tensor], complaint: str, *, heads: Collection[str] = ()) -> list[str]:
    """Load by exact keys and shapes; an error names the first that differs.

    The tensors of `heads` (submodule names) may have other shapes; such a head is left as it is, and its name returned.
    """
    expected = network.state_dict()
    # files older than this counter lack it, and nothing but an unset momentum needs it
    counters = {key: value for key, value in expected.items() if key.endswith("num_batches_tracked")}
    state = {**counters, **state}
    renewed = {
        key.rpartition(".")[0]: None
        for key, value in expected.items()
        if key.rpartition(".")[0] in heads and key in state and state[key].shape != value.shape
    }
    for key, value in expected.items():
        if key not in state:
            raise UserError(f"{complaint}: {key} is missing.")
        if state[key].shape != value.shape and key.rpartition(".")[0] not in renewed:
            raise UserError(f"{complaint}: {key} is {list(state[key].shape)}, expected {list(value.shape)}.")
    for key in state:
        if key not in expected:
            raise UserError(f"{complaint}: {key} is unknown.")
    kept = {key: expected[key] if key.rpartition(".")[0] in renewed else state[key] for key in expected}
    network.load_state_dict(kept, strict=True)
    return list(renewed)


def _entry(values: Mapping[str, Any], key: str, kind: Any, source: str) -> Any:
    """An entry of the file, None where it is missing."""
    value = values.get(key)
    if value is None:
        return None
    if isinstance(value, int) and not _is_number(value):  # its digits are not even to be printed
        raise UserError(f"{source}: its entry {key!r} is damaged: a number of {value.bit_length()} bits.")
    if not isinstance(value, kind):
        raise UserError(f"{source}: its entry {key!r} is damaged: {str(value)[:40]!r}.")
    return value


def _is_number(value: Any) -> bool:
    """Whether something is a number that computers count with: an integer of 64 bits, or a float of their range."""
    return isinstance(value, float | int) and -LARGEST <= value <= LARGEST


def _per_channel(content: Mapping[str, Any], key: str, source: str) -> tuple[float, ...] | None:
    values = _entry(content, key, list, source)
    if values is not None and not (len(values) == 3 and all(map(_is_number, values))):
        raise UserError(f"{source}: its entry {key!r} is damaged: expected three numbers.")
    return None if values is None else tuple(map(float, values))
