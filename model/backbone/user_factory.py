"""`FILE.py:FACTORY`: a user's own network. The file is a program that runs; nothing but the user's flag may name it."""

import importlib.util
import inspect
import logging
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from model.division import ANY_SPLIT
from model.division.solver import solve_factor
from model.library import refuse_a_miss
from model.registry import LARGE, SMALL, Backbone, BackboneRequest, DivisionPlan, backbones, names_user_code
from model.staged import Staged
from utils.errors import UserError, reason
from utils.macs import count_macs, count_params

logger = logging.getLogger(__name__)

Factory = Callable[..., nn.Module]
ARGUMENTS = ("width", "num_classes")


@lru_cache
def load_factory(arch: str) -> Factory:
    """Run the file and take its factory, `factory(width: float, num_classes: int) -> nn.Module`.

    Raises:
        UserError: no such file, the file raises, or it defines no such factory.
    """
    place, _, name = arch.rpartition(":")
    path = Path(place)
    if not path.is_file():
        raise UserError(f"--arch {arch}: there is no file {place}; expected FILE.py:FACTORY.")
    spec = importlib.util.spec_from_file_location(f"user_factory_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"--arch {arch}: {place} raises {type(error).__name__}: {reason(error)[:200]}.") from None
    factory = getattr(module, name, None)
    if not callable(factory):
        what = "defines no" if factory is None else "has something that cannot be called as"
        raise UserError(f"--arch {arch}: {place} {what} {name}; expected {name}(width, num_classes) -> nn.Module.")
    parameters = inspect.signature(factory).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    missing = [argument for argument in ARGUMENTS if argument not in parameters and not takes_all]
    if missing:
        raise UserError(
            f"--arch {arch}: {name} takes no argument {' and '.join(map(repr, missing))}; "
            f"expected {name}(width, num_classes) -> nn.Module, width a factor in (0, 1]."
        )
    others = [
        parameter.name
        for parameter in parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and parameter.name not in ARGUMENTS
    ]
    if others:
        raise UserError(
            f"--arch {arch}: {name} needs {', '.join(others)} too; give all but width and num_classes a default."
        )
    return factory


def _call(arch: str, width: float, num_classes: int) -> nn.Module:
    factory = load_factory(arch)
    try:
        network = factory(width=width, num_classes=num_classes)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"--arch {arch}: raises {type(error).__name__} for width={width:g}: {reason(error)[:200]}."
        ) from None
    if not isinstance(network, nn.Module):
        raise UserError(f"--arch {arch}: returns {type(network).__name__}, expected an nn.Module.")
    lazy = next((key for key, value in network.named_parameters() if is_lazy(value)), None)
    if lazy is not None:
        raise UserError(f"--arch {arch}: its parameter {lazy} has no size yet: give lazy layers their channels.")
    return network


@lru_cache
def _measure(arch: str, width: float, num_classes: int, crop_size: int) -> tuple[int, int]:
    """(parameters, multiply-adds) of the factory's network.

    Raises:
        UserError: it does not map one image to K logits.
    """
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        network = _call(arch, width, num_classes)
    try:
        macs = count_macs(network, (3, crop_size, crop_size))
        logits_BK = network.to("meta").eval()(torch.empty(2, 3, crop_size, crop_size, device="meta"))
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise UserError(
            f"--arch {arch} --crop_size {crop_size}: its network (width={width:g}) does not run: "
            f"{type(error).__name__}: {reason(error)[:200]}."
        ) from None
    shape = list(getattr(logits_BK, "shape", ()))
    if shape != [2, num_classes]:
        raise UserError(f"--arch {arch}: two images give {shape or 'no tensor'}, expected logits [2, {num_classes}].")
    return count_params(network), macs


def plan(request: BackboneRequest) -> DivisionPlan:
    """The one width factor of S copies that match the factory's network at width 1.

    Raises:
        UserError: as `load_factory`, or the factory's widths are too coarse to come within 2 %.
    """
    return _plan(
        request.arch, request.split_factor, request.num_classes, request.crop_size, request.divide_by or "params"
    )


@lru_cache
def _plan(arch: str, split_factor: int, num_classes: int, crop_size: int, divide_by: str) -> DivisionPlan:
    which = 0 if divide_by == "params" else 1

    def sizes(width: float) -> tuple[int, int]:
        return _measure(arch, width, num_classes, crop_size)

    width = solve_factor(lambda factor: sizes(factor)[which], split_factor)
    (params_full, macs_full), (params_one, macs_one) = sizes(1.0), sizes(width)
    found = DivisionPlan(
        arch=arch,
        split_factor=split_factor,
        divide_by=divide_by,
        stages=("width",),
        widths_full=(1.0,),
        widths=(width,),
        params_full=params_full,
        params_one=params_one,
        macs_full=macs_full,
        macs_one=macs_one,
    )
    refuse_a_miss(found)
    logger.info("%s", found.summary())
    return found


def build(request: BackboneRequest) -> nn.Module:
    """The factory's network at the width of one of S copies."""
    widths = request.widths or (plan(request).widths if request.split_factor > 1 else (1.0,))
    width = widths[0]
    if len(widths) > 1 or not (math.isfinite(width) and 0 < width <= 1):
        raise UserError(
            f"--arch {request.arch}: expected one width in (0, 1], and --stage_widths or the checkpoint has "
            f"{' '.join(f'{value:g}' for value in widths)}, which is outside (0, 1] or more than one."
        )
    _measure(request.arch, width, request.num_classes, request.crop_size)
    device = torch.get_default_device()
    with torch.device("cpu"):
        network = _call(request.arch, width, request.num_classes)
    if isinstance(network, Staged):
        network.request = request  # heads behind its stages are made of fresh copies
    return network.to(device)


@backbones.add_resolver
def user_backbone(arch: str) -> Backbone | None:
    """The entry of `FILE.py:FACTORY`, None for other names.

    Raises:
        UserError: as `load_factory`.
    """
    if not names_user_code(arch):
        return None
    load_factory(arch)
    return Backbone(
        build=build,
        family="user_factory",
        split_factors={SMALL: ANY_SPLIT, LARGE: ANY_SPLIT},
        plan=plan,
    )
