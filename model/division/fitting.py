"""Image sizes: the arguments that follow the run's images, and patches and windows fitted to small ones. Ours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from model.division.arguments import PATCH, WINDOW, Changes, last_name, leaf_kind

SMALL_IMAGE = 64  # up to this side in pixels, patches and windows are fitted
SMALLER, LARGER = 32, 8  # sizes that are tried below and above one that a network does not take


def image_arguments(leaves: Mapping[str, int | float], crop_size: int) -> Changes:
    """The leaves that hold the side of an image, at the run's."""
    return {
        name: type(value)(crop_size)
        for name, value in leaves.items()
        if leaf_kind(name) == "image" and value != crop_size
    }


def fitted_arguments(leaves: Mapping[str, int | float], crop_size: int) -> Changes:
    """Patches and windows of a network for small images; {} where nothing is to be fitted.

    The patch becomes the largest divisor of the crop that is at most itself and an eighth of the crop, the window the
    largest divisor of the first grid of patches that is at most itself.

    Args:
        leaves: the numbers among the network's arguments.
        crop_size: side of an image in pixels.
    """
    patches = {name: int(value) for name, value in leaves.items() if last_name(name) == PATCH and value >= 1}
    if crop_size > SMALL_IMAGE or not patches:
        return {}
    fitted = {name: _largest_divisor(crop_size, min(patch, crop_size // 8)) for name, patch in patches.items()}
    grid = crop_size // next(iter(fitted.values()))
    windows = {name: int(value) for name, value in leaves.items() if last_name(name) == WINDOW and value >= 1}
    fitted |= {name: _largest_divisor(grid, window) for name, window in windows.items()}
    return {name: value for name, value in fitted.items() if value != leaves[name]}


def are_fitted(names: Iterable[str]) -> bool:
    """Whether a plan of these leaves has patches or windows that were fitted; nothing else sets them."""
    return any(last_name(name) in (PATCH, WINDOW) for name in names)


def _largest_divisor(number: int, most: int) -> int:
    return next((divisor for divisor in range(min(number, most), 1, -1) if number % divisor == 0), 1)


def sizes_around(leaves: Mapping[str, int | float], crop_size: int) -> tuple[Iterator[int], Iterator[int]]:
    """Smaller and larger sides that a network may take, the nearest first: in steps of 32 windows, or of the patch.

    They end, because each is tried by building the network: any number may stand in a file.
    """
    window = next((int(value) for name, value in leaves.items() if last_name(name) == WINDOW and value > 1), None)
    patch = next((int(value) for name, value in leaves.items() if last_name(name) == PATCH and value > 1), 32)
    step = 32 * window if window else patch
    below = (crop_size - 1) // step * step
    above = (crop_size // step + 1) * step
    return iter(range(below, max(0, below - SMALLER * step), -step)), iter(range(above, above + LARGER * step, step))
