"""Random resized crops: which box of an image a view shows. Drawing only: the workers that decode cut and resize."""

import numpy as np

TRIES = 10
RESIZED_CROP_SLOTS = 2 * TRIES + 2  # an area and a ratio for each try, then the place


def draw_resized_crops(
    uniforms: np.ndarray,
    heights: np.ndarray | int,
    widths: np.ndarray | int,
    area: tuple[float, float] = (0.1, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """Boxes of random area and shape: int64 [..., 4] of (top, left, height, width) in pixels.

    The distribution is that of torchvision's RandomResizedCrop: up to ten tries at an area and a log-uniform ratio,
    and after ten failures the largest centred box whose ratio is in range.

    Args:
        uniforms: float64 [..., RESIZED_CROP_SLOTS] in [0, 1).
        heights, widths: of the images in pixels; broadcast against [...].
        area: smallest and largest part of the image.
        ratio: smallest and largest width / height.
    """
    heights = np.broadcast_to(np.asarray(heights, dtype=np.int64), uniforms.shape[:-1])
    widths = np.broadcast_to(np.asarray(widths, dtype=np.int64), uniforms.shape[:-1])
    areas = (heights * widths)[..., None] * (area[0] + (area[1] - area[0]) * uniforms[..., :TRIES])
    log_lo, log_hi = np.log(ratio)
    ratios = np.exp(log_lo + (log_hi - log_lo) * uniforms[..., TRIES : 2 * TRIES])
    try_widths = np.rint(np.sqrt(areas * ratios)).astype(np.int64)
    try_heights = np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    fits = (try_widths > 0) & (try_widths <= widths[..., None])
    fits &= (try_heights > 0) & (try_heights <= heights[..., None])

    first = fits.argmax(axis=-1)[..., None]
    crop_heights = np.take_along_axis(try_heights, first, axis=-1)[..., 0]
    crop_widths = np.take_along_axis(try_widths, first, axis=-1)[..., 0]
    tops = (uniforms[..., 2 * TRIES] * (heights - crop_heights + 1)).astype(np.int64)
    lefts = (uniforms[..., 2 * TRIES + 1] * (widths - crop_widths + 1)).astype(np.int64)
    drawn = np.stack([tops, lefts, crop_heights, crop_widths], axis=-1)

    shapes = widths / heights
    centre_heights = np.where(shapes < ratio[0], np.rint(widths / ratio[0]).astype(np.int64), heights)
    centre_widths = np.where(shapes > ratio[1], np.rint(heights * ratio[1]).astype(np.int64), widths)
    centred = np.stack(
        [(heights - centre_heights) // 2, (widths - centre_widths) // 2, centre_heights, centre_widths], axis=-1
    )
    return np.where(fits.any(axis=-1)[..., None], drawn, centred)
