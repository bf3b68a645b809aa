"""The learning rate of a recipe, for another number of images in an update than the recipe's own. Ours.

For recipes of this project: fine-tuning, and the small default of images of a user's own. The published recipes keep
their rate, as --is_linear_lr 0 says.
"""


def scaled_rate(rate: float, *, batch_size: int, images_per_update: int) -> tuple[float, str]:
    """The rate in proportion to the images of an update (Goyal et al., arXiv:1706.02677); momentum stays.

    Args:
        rate: the recipe's, for `batch_size` images.
        batch_size: images of an update that the recipe was made for.
        images_per_update: those of this run: --batch_size, times --iters_to_accumulate, times nodes.

    Returns:
        the rate, and one line that says it; "" where nothing changes.
    """
    if images_per_update == batch_size:
        return rate, ""
    scaled = rate * images_per_update / batch_size
    return scaled, (
        f"lr {rate:g} of the recipe is for {batch_size} images an update: scaled to {scaled:g} for "
        f"{images_per_update}. --lr sets another."
    )
