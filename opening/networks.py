"""The networks of a training: the method around them, where they lie and run, and the weights that they start from."""

import logging
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from dataset import DataSource
from dataset.class_files import class_weights
from loss.classification import ClassLoss
from method import Method, TrainingData, methods
from method.costs import training_params
from model import BackboneRequest, build_splitnet
from model.depth import freeze
from model.pretrained import Start
from model.registry import request_of, solved_request
from model.restore import stored_plan
from model.splitnet import SplitNet
from parser_params import Config
from record import checkpoint as ckpt
from record.checkpoint import Checkpoint
from training.state import execution_before
from utils import distributed
from utils.errors import UserError
from utils.launch import World
from utils.mesh import build_mesh, choose_groups
from utils.seed import STREAM_INIT, fold_in

logger = logging.getLogger(__name__)

LABEL_SMOOTHING = 0.1
METHOD_INIT = 1_000_000  # the part of the initialisation stream that a method's own layers use


def count_networks(config: Config) -> int:
    """How many networks the flags ask for: those of a list, or S."""
    names = methods.get(config.method).backbone_names(config.arch, config.method_options)
    if len(names) > 1:
        return len(names)
    return 1 if config.is_train_sep else config.split_factor


def spread_over(world: World, config: Config) -> World:
    """The process's place with the networks spread over the processes, where --placement asks for it.

    Raises:
        UserError: one process, one network, or a number of groups that does not fit.
    """
    if config.placement == "data":
        return world
    num_networks = count_networks(config)
    if num_networks == 1:
        raise UserError("--placement networks needs several networks, and there is one: give a --split_factor.")
    groups = choose_groups(num_networks, world.world_size, config.network_groups)
    return replace(world, mesh=build_mesh(groups, world.device))


def open_start(config: Config) -> Start | None:
    """What --pretrained names, read; None without it.

    Raises:
        UserError: a file that is none of ours or of a library's, or another number of files than of networks.
    """
    if config.pretrained is None:
        return None
    return Start.open(config.pretrained, count_networks(config), partial(ckpt.load_checkpoint, flag="--pretrained"))


def load_start(
    start: Start, network: SplitNet, *, number: int | None, seed: int, identical_init: bool
) -> tuple[str, ...]:
    """Give the networks the weights to start from; returns the names of the heads that stay new, as prefixes.

    Args:
        number: of the one network of a job among all, which gets the weights that it has among all; None: all are here.
        seed, identical_init: of the run.

    Raises:
        UserError: the weights are not those of this structure.
    """
    if number is None:
        renewed = start.load_into(network, seed=seed)
    else:
        whole = build_splitnet(request_of(network.models[0]), seed=seed, identical_init=identical_init)
        heads = start.load_into(whole, seed=seed)
        own = f"models.{number}."
        network.models[0].load_state_dict(whole.models[number].state_dict())
        renewed = [f"models.0.{name.removeprefix(own)}" for name in heads if name.startswith(own)]
    for name in renewed:
        logger.info("--pretrained: the head %s has another size there and starts anew.", name)
    return tuple(f"network.{name}." for name in renewed)


def build_method(
    config: Config,
    source: DataSource,
    *,
    seed: int,
    world: World,
    before: Checkpoint | None,
    start: Start | None = None,
) -> Method[Any]:
    """The method with its networks, newly initialised, on the CPU.

    Args:
        source: the data; names classes, and is what `--class_weights balanced` counts.
        seed: of the run.
        world: this process's place, where the weights of the classes are to lie. Networks that are spread to other
            processes have structure alone here, to be counted.
        before: of the run that is gone on from; its networks' plan is taken.
        start: the weights that a new run starts from.

    Raises:
        UserError: flags that do not fit each other, the backbone or the data.
    """
    kind = methods.get(config.method)
    names = kind.backbone_names(config.arch, config.method_options)
    if len(names) > 1 and not kind.networks_from_list:
        raise UserError(f"--method {config.method} takes one backbone; --arch names {len(names)}.")
    request = config.backbone_request(len(source.classes))
    request = replace(
        request,
        form=kind.member_form(config.method_options, request, seed),
        arch=names[0],
        **_plan_before(config, request, before, start, is_list=len(names) > 1),
    )
    if request.form is None and len(names) == 1:  # one search for all processes, and one plan
        request = distributed.said_by_first(partial(solved_request, request))
    network = build_splitnet(
        request,
        seed=seed,
        identical_init=config.is_identical_init,
        train_separately=config.is_train_sep,
        archs=names if len(names) > 1 else None,
        number=config.network,
        held=_held(config, world, before),
    )
    weights_K = None if config.class_weights is None else class_weights(config.class_weights, source)
    class_loss = ClassLoss(
        kind=config.class_loss,
        label_smoothing=LABEL_SMOOTHING if config.is_label_smoothing else 0.0,
        weights_K=None if weights_K is None else weights_K.to(world.device),
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(fold_in(seed, STREAM_INIT, METHOD_INIT))
        method: Method[Any] = kind(network, config.method_options, class_loss=class_loss)
    method.meet(TrainingData(source.classes, source.mean, source.std, config.crop_size))
    return method


def _held(config: Config, world: World, before: Checkpoint | None) -> range | None:
    """Numbers of the networks that need memory here; None: all, also where a file has weights for all."""
    if world.mesh is None or (config.pretrained is not None and before is None):
        return None
    return world.mesh.held(count_networks(config))


def _plan_before(
    config: Config, request: BackboneRequest, before: Checkpoint | None, start: Start | None, *, is_list: bool
) -> dict[str, Any]:
    """The plan of the resumed run's networks; of a new run, whether the networks are fitted to small images.

    Where a run starts from weights, these were made for patches and windows: the library's own, or a run's that fitted.
    """
    if before is None:
        own = methods.get(config.method).network_plan(config.method_options)
        return {"fits_images": config.pretrained is None or (start is not None and start.is_fitted), **own}
    stored = stored_plan(before, "--resume", is_list=is_list)
    return stored | {"widths": stored["widths"] or request.widths}


def choose_execution(config: Config, method: Method[Any], before: Checkpoint | None) -> str:
    """How the networks run: as the resumed run's did, unless another strategy is asked for."""
    asked = config.execution
    if method.runs_networks_itself:
        if asked != "loop":
            logger.info("--execution %s: this method runs parts of networks, so it keeps to loop.", asked)
        return "loop"
    said = None if before is None else execution_before(before)
    return said if said and (asked == "auto" or "execution" not in config.given) else asked


def let_go_of_others(method: Method[Any], world: World, name: str) -> None:
    """Have the method keep the networks of this process alone, where --placement spreads them.

    Args:
        name: of the method.

    Raises:
        UserError: the method trains parameters that belong to no network.
    """
    mesh = world.mesh
    if mesh is None:
        return
    if training_params(method):
        raise UserError(
            f"--placement networks: --method {name} trains parameters beside its networks. Use --placement data."
        )
    method.mesh = mesh
    method.network.hold(mesh)
    if world.is_main:
        logger.info("--placement networks: %d group(s) of %d process(es)", mesh.groups, mesh.replicas)


def freeze_in_all(network: SplitNet, what: str, world: World) -> int:
    """Freeze a part of every network; how many parameters that are in all of them, here and elsewhere."""
    frozen = freeze(network, what)
    if world.mesh is None:
        return frozen
    return int(world.mesh.sum_networks(torch.tensor([frozen], device=world.device)))
