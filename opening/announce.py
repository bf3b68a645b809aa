"""What a training says of itself at its start: what was decided and by whom, and which flags have no effect."""

import logging

from model.depth import layer_rates
from model.registry import SMALL, has_two_forms, image_shape
from parser_params import Config
from training.state import RunState

logger = logging.getLogger(__name__)


def warn_of_unused_flags(config: Config) -> None:
    """Say which of the flags, and of the keys in a published --config, have no effect."""
    for line in config.warnings:
        logger.warning("%s", line)
    for name in ("gn_num_groups", "div_wd_den", "amp_opt_level"):
        if name in config.given:
            logger.warning("--%s has no effect, as in the published code.", name)


def announce(config: Config, state: RunState, *, params: int, macs: int, frozen: int) -> None:
    """Say at the start what was decided and by whom.

    Args:
        state: of the run that begins.
        params, macs: of all networks.
        frozen: how many of these parameters are not trained.
    """
    source, method = state.data, state.method
    held_out = "held-out" if config.val_fraction else "validation"
    names = {"val": "validation", "test": "test"}
    evaluated = f"{len(source.test)} {names[source.reported]}"
    if source.val is not None:
        evaluated = f"{len(source.val)} {held_out}, {evaluated}"
    supplied: dict[str, list[str]] = {}
    for name, item in config.described().items():
        if item["origin"].startswith("recipe"):
            supplied.setdefault(item["origin"], []).append(f"{name} {item['value']}")
    logger.info(
        "%s: %d x %s (S = %d) on %s, %d classes, %d training, %s images; %.3f M parameters, %.1f M MACs",
        config.method,
        method.network.num_members,
        config.arch,
        config.split_factor,
        config.dataset,
        len(source.classes),
        len(source.train),
        evaluated,
        params / 1e6,
        macs / 1e6,
    )
    logger.info(
        "device %s, precision %s, %d process(es), seed %d, best epoch chosen on the %s images",
        state.world.device,
        state.precision.name,
        state.world.world_size,
        state.seed,
        names[source.reported] if source.val is None else held_out,
    )
    small = [name for name in dict.fromkeys(config.archs()) if has_two_forms(name)]
    if small and image_shape(config.dataset, config.crop_size) == SMALL:
        logger.info(
            "%s: the CIFAR form, for images of %d pixels (3x3 stem, fewer strides); on ImageNet it is another network",
            ", ".join(small),
            config.crop_size,
        )
    if method.peers is not None:
        logger.info(
            "network %d of %d (from 0), with its peers through %s every %d steps after %d epoch(s) alone",
            *(config.network, config.split_factor, config.exchange, config.exchange_every),
            method.peers.burn_in,
        )
    for origin, flags in supplied.items():
        logger.info("from the %s: %s", origin, ", ".join(flags))
    if config.freeze:
        logger.info("--freeze %s: %.3f of %.3f M parameters are not trained", config.freeze, frozen / 1e6, params / 1e6)
    if config.layer_decay < 1:
        for line in layer_rates(method.network, config.layer_decay, config.lr):
            logger.info("learning rates of %s", line)
