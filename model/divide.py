"""`divide(module_or_name, S)`: S copies with the budget of one network, for somebody else's program. Ours."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from model.backbone import torchvision_nets
from model.build import build_splitnet
from model.division.plan import division_plan, usual_request
from model.division.rechannel import ChannelGraph, trace
from model.division.solver import solve_widths
from model.library import divide_rates, rates_of, refuse_a_miss, reset_parameters
from model.registry import BackboneRequest, DivisionPlan, build_network, planned
from model.splitnet import SplitNet
from utils.errors import UserError, reason
from utils.macs import count_macs, count_params
from utils.seed import STREAM_INIT, fold_in


def divide(
    module_or_name: nn.Module | str,
    split_factor: int,
    *,
    num_classes: int | None = None,
    crop_size: int | None = None,
    divide_by: str | None = None,
    seed: int = 0,
) -> tuple[SplitNet, DivisionPlan]:
    """S networks that cost together what one costs, on the CPU, and the plan: widths, parameters and MACs.

    Of a name the networks are those of `--arch NAME --split_factor S`. Of an instance its channels are followed through
    one pass without storage, as for torchvision's networks, and every copy is resized and has new values; the instance
    is left as it was. Where they cannot be followed, and the instance is a network of torchvision or timm as these make
    it, it is divided as by its name: built again with smaller arguments. What else cannot be followed is refused: no
    copy ever keeps a layer at full width in silence.

    Args:
        module_or_name: a classifier [B, 3, H, W] -> logits [B, K], or a name: of ours, torchvision/NAME, timm/NAME,
            FILE.py:FACTORY.
        split_factor: S; 1 gives a copy of an instance, values included.
        num_classes: K, of a name [default: 1000]; an instance has its own.
        crop_size: side of the images in pixels [default: a name's own; 224].
        divide_by: what the copies together match, "params" (default) or "macs".
        seed: network i is initialised from (seed, i); the global random state is left as it was.

    Raises:
        UserError: unknown name, a module that cannot be followed, or an S that no widths meet within 2 %.
    """
    if split_factor < 1:
        raise UserError(f"divide: split_factor must be 1 or more, got {split_factor}.")
    if isinstance(module_or_name, str):
        request = usual_request(
            module_or_name, split_factor, num_classes=num_classes or 1000, crop_size=crop_size, divide_by=divide_by
        )
        plan = division_plan(request)
        solved = request if plan.divide_by == "table" else planned(request, plan)
        return build_splitnet(solved, seed=seed), plan
    if not isinstance(module_or_name, nn.Module):
        raise UserError(f"divide: expected a module or a name, got {type(module_or_name).__name__}.")
    if num_classes is not None:
        raise UserError("divide: num_classes goes with a name; a module has its own.")
    if divide_by not in (None, "params", "macs"):
        raise UserError(f"divide: divide_by is params or macs, got {divide_by!r}.")
    crop_size, divide_by = crop_size or 224, divide_by or "params"
    try:
        return _divide_module(module_or_name, split_factor, crop_size, divide_by, seed)
    except UserError as refused:
        named = named_request(module_or_name, split_factor, crop_size, divide_by) if split_factor > 1 else None
        if named is None:
            raise
        try:
            plan = division_plan(named)
        except UserError:
            raise refused from None
    return build_splitnet(planned(named, plan), seed=seed), plan


def named_request(
    module: nn.Module, split_factor: int, crop_size: int, divide_by: str | None = None
) -> BackboneRequest | None:
    """What a network of torchvision or timm is by its name; None where no name gives just this network.

    Its class, its tensors' names and shapes, and every plain number, text and switch of its parts must be those of the
    network that the library makes of the name: heads, windows and rates show in no tensor.
    """
    image = (3, crop_size, crop_size)
    try:
        num_classes = _logits(copy.deepcopy(module).to("meta"), image)
    except Exception:  # somebody else's code may raise anything
        return None
    for arch in _names_of_the_class(module):
        request = usual_request(arch, split_factor, num_classes=num_classes, crop_size=crop_size, divide_by=divide_by)
        request = replace(request, fits_images=False)
        try:
            with torch.device("meta"):
                one = build_network(replace(request, split_factor=1))
        except UserError:
            continue
        if _described(one) == _described(module):
            return request
    return None


def _names_of_the_class(module: nn.Module) -> Iterable[str]:
    """Names that may have made a network: what timm noted in it, or all of torchvision's of the same file."""
    home = type(module).__module__
    if home.startswith("timm."):
        noted = getattr(module, "pretrained_cfg", None)
        name = noted.get("architecture") if isinstance(noted, Mapping) else None
        return [f"timm/{name}"] if isinstance(name, str) else []
    if not home.startswith("torchvision.models."):
        return []
    names = torchvision.models.list_models(module=torchvision.models)
    same = [name for name in names if torchvision.models.get_model_builder(name).__module__ == home]
    return [f"{torchvision_nets.PREFIX}{name}" for name in same]


def _described(network: nn.Module) -> tuple[object, ...]:
    """Class, tensors and plain attributes of a network; whether it trains is none of these."""
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    plain = {
        (name, key): value
        for name, part in network.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, bool | int | float | str | tuple) and key != "training" and not key.startswith("_")
    }
    return type(network), shapes, plain


def _divide_module(
    module: nn.Module, split_factor: int, crop_size: int, divide_by: str, seed: int
) -> tuple[SplitNet, DivisionPlan]:
    name, image = type(module).__name__, (3, crop_size, crop_size)
    graph, num_classes = _followed(module, image, name)
    which = 0 if divide_by == "params" else 1
    widths = solve_widths(graph.widths, graph.units, lambda w: graph.count(w)[which], split_factor)
    copies = []
    for i in range(split_factor):
        one = copy.deepcopy(module).to("cpu")
        if split_factor > 1:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(fold_in(seed, STREAM_INIT, i))
                _make_smaller(one, graph, widths, split_factor, name)
        copies.append(one)
    _check_runs(copies[0], image, num_classes, name)
    plan = DivisionPlan(
        arch=name,
        split_factor=split_factor,
        divide_by=divide_by,
        stages=graph.stages,
        widths_full=graph.widths,
        widths=widths,
        params_full=count_params(module),
        params_one=count_params(copies[0]),
        macs_full=count_macs(module, image),
        macs_one=count_macs(copies[0], image),
    )
    try:
        refuse_a_miss(plan)
    except UserError as error:
        raise UserError(f"divide: {str(error).replace('--', '')}") from None
    return SplitNet(copies), plan


def _refusal(name: str, why: str) -> UserError:
    return UserError(
        f"divide: this {name} cannot be followed: {why} A name (torchvision/NAME, timm/NAME) or a file with a factory, "
        "FILE.py:FACTORY(width, num_classes), may be divided."
    )


def _followed(module: nn.Module, image: tuple[int, int, int], name: str) -> tuple[ChannelGraph, int]:
    """(the module's channels, K).

    Raises:
        UserError: they cannot be followed.
    """
    twin = copy.deepcopy(module).to("meta")
    try:
        num_classes = _logits(twin, image)
        return trace(twin, image, name), num_classes
    except UserError as error:
        raise _refusal(name, str(error).removeprefix(f"--arch {name} ")) from None
    except Exception as error:  # somebody else's code may raise anything
        raise _refusal(name, f"{type(error).__name__}: {reason(error)[:200]}.") from None


def _logits(network: nn.Module, image: tuple[int, int, int]) -> int:
    """K of the logits [2, K] that a network without storage gives for two images.

    Raises:
        UserError: it gives something else.
    """
    logits_BK = network.eval()(torch.empty(2, *image, device="meta"))
    if not (isinstance(logits_BK, Tensor) and logits_BK.dim() == 2 and len(logits_BK) == 2):
        found = list(logits_BK.shape) if isinstance(logits_BK, Tensor) else type(logits_BK).__name__
        raise UserError(f"two images give {found}, expected logits [2, K].")
    return logits_BK.shape[1]


def _make_smaller(
    network: nn.Module, graph: ChannelGraph, widths: tuple[int, ...], split_factor: int, name: str
) -> None:
    """Resize a copy, and give every layer new values, by the library's rule where the class is known."""
    initialise = _initialiser(network)
    if initialise is None:
        for path in graph.loose:
            owner = network.get_submodule(path.rpartition(".")[0])
            if not callable(getattr(owner, "reset_parameters", None)):
                raise _refusal(name, f"its parameter {path} has no initial values: give its module reset_parameters().")
    graph.resize(network, widths)
    divide_rates(network, split_factor, rates_of(network))
    reset_parameters(network)
    if initialise is not None:
        with torch.no_grad():
            initialise(network)


def _initialiser(network: nn.Module) -> Any:
    """The initial values that a library gives networks of this class, None where the class is not known."""
    return next(
        (family.initialise for family in torchvision_nets.FAMILIES if type(network) is family.kind),
        None,
    )


def _check_runs(network: nn.Module, image: tuple[int, int, int], num_classes: int, name: str) -> None:
    """Refuse a copy that does not run: numbers in the module's code that did not follow."""
    twin = copy.deepcopy(network).to("meta").eval()
    try:
        shape = list(twin(torch.empty(2, *image, device="meta")).shape)
    except Exception as error:  # as above
        raise _refusal(name, f"a narrower one does not run: {type(error).__name__}: {reason(error)[:200]}.") from None
    if shape != [2, num_classes]:
        raise _refusal(name, f"a narrower one gives {shape} for two images, not [2, {num_classes}].")
