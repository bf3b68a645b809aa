"""Image files -> RGB pixels, and the cut of a file to a square. PIL does the decoding and the resizing."""

import contextlib
import io
import math
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from utils.errors import RunError, reason
from utils.text import escaped

Image.init()

# PIL opens more than these. Left out are formats that need another program (EPS), that are only identified (HDF5,
# MPEG), or whose signature is so weak that a file of noise could pass for an image.
FORMATS = tuple(
    name
    for name in (
        *("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000"),
        *("AVIF", "DIB", "ICO", "PCX", "QOI", "SGI", "TGA"),
    )
    if name in Image.OPEN  # AVIF and others depend on how PIL was built
)
EXTENSIONS = frozenset(extension for extension, name in Image.registered_extensions().items() if name in FORMATS)

MAX_PIXELS = 89_478_485  # a larger image is refused from its header alone; the count at which PIL itself starts to warn

LONGEST = 16  # times its short side: up to here an image is resized whole, beyond only what is kept of it
STRIP_PIXELS = 1 << 20  # pixels that are worked on at a time where a conversion needs several copies of them
_REACH = {"bilinear": 1, "bicubic": 2}  # pixels that the filter reads to either side

INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(RunError):
    """A file that gives no image. `str()` is one line: path and reason."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(path, reason)
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{escaped(self.path)}: {self.reason}"


def refusal(bad: BadImage) -> RunError:
    """What --on_bad_image fail raises for a file."""
    return RunError(f"{bad}. Mend or remove the file, or pass --on_bad_image skip to leave such files out.")


def read_rgb(path: str | os.PathLike[str], content: bytes | None = None) -> Image.Image:
    """The first frame of an image file as an 8-bit RGB PIL image, the way a viewer shows it.

    EXIF rotation is applied; transparency is laid on white; 16-bit grey is scaled by 1/257; grey, palette, CMYK and
    the rest go through PIL's conversion. Not for several threads at once (it silences PIL's warnings).

    At most about 25 bytes a pixel, so 2.3 GB, are in use at a time: by JPEG 2000, whose decoder keeps copies of its
    own; 18 by WebP, 13 by the other formats.

    Args:
        path: of the file.
        content: the file's, where it lies in a larger one; `path` is its name then.

    Raises:
        BadImage: missing, empty, truncated, not a file, not an image, more than MAX_PIXELS, or pixels without a known
            range.
    """
    with _opened(path, content) as image:
        image.load()
        return as_rgb(image, path)


def as_rgb(image: Image.Image, source: str | os.PathLike[str]) -> Image.Image:
    """A PIL image as `read_rgb` gives that of a file; `source` is what an error calls it.

    Raises:
        BadImage: pixels without a known range.
    """
    transpose = _TRANSPOSE.get(_orientation(image))
    rgb = _to_rgb(image, source)
    return rgb if transpose is None else rgb.transpose(transpose)


def read_size(path: str | os.PathLike[str], content: bytes | None = None) -> tuple[int, int]:
    """Width and height in pixels from the header alone, EXIF rotation left out; arguments as of `read_rgb`.

    Raises:
        BadImage: as `read_rgb`, as far as the header tells.
    """
    with _opened(path, content) as image:
        return image.size


def resize_crop(image: Image.Image, resize: int, crop: int, interpolation: str = "bicubic") -> Image.Image:
    """Short side to `resize` pixels (antialiased, aspect kept), then the central `crop` x `crop` pixels.

    Rounding is torchvision's: the long side is cut off to whole pixels, the crop's corner rounds half to even. Of an
    image that is more than LONGEST times as long as wide only the kept pixels are made, the same but for rounding, so
    that no intermediate holds more pixels than the image, or than LONGEST x `resize` x `resize`.
    """
    width, height = image.size
    short, resample = min(width, height), INTERPOLATIONS[interpolation]
    sides = (resize * width // short, resize * height // short)
    left, top = (round((side - crop) / 2) for side in sides)
    if max(width, height) > LONGEST * short:
        # what the filter reads is cut out first, because Pillow has 24 bits for the corners of a box
        spans = [
            _read_span(start, crop, side, whole, interpolation)
            for start, side, whole in zip((left, top), sides, image.size, strict=True)
        ]
        (x0, x1), (y0, y1) = ((first, last) for first, last, _ in spans)
        (bx0, bx1), (by0, by1) = (box for _, _, box in spans)
        return image.crop((x0, y0, x1, y1)).resize((crop, crop), resample, box=(bx0, by0, bx1, by1))
    if short != resize:
        image = image.resize(sides, resample)
    return image.crop((left, top, left + crop, top + crop))


def _read_span(
    start: int, length: int, side: int, whole: int, interpolation: str
) -> tuple[int, int, tuple[float, float]]:
    """What `length` pixels from `start` on, of `whole` ones resized to `side`, are made of, along one axis.

    Returns:
        first and last (not included) pixel that the filter reads; the part of them that is resized, counted from the
        first.
    """
    scale = whole / side
    low, high = start * scale, (start + length) * scale
    margin = _REACH[interpolation] * max(scale, 1.0) + 1.0
    first, last = max(math.floor(low - margin), 0), min(math.ceil(high + margin), whole)
    return first, last, (low - first, min(high, whole) - first)


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str], content: bytes | None) -> Iterator[Image.Image]:
    """The file opened by PIL, nothing decoded yet; whatever goes wrong inside comes out as BadImage."""
    try:
        if content is None and not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would keep its reader waiting
            raise BadImage(path, "not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata; what matters raises
            # what a file holds inside, such as the pictures of an icon, may be larger than its header says
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path if content is None else io.BytesIO(content), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadImage(path, _too_large(f"{image.width}x{image.height}"))
                if not image.width * image.height:
                    raise BadImage(path, "it has no pixels")
                yield image
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage(path, _too_large("it")) from None
    except Image.UnidentifiedImageError:
        empty = (os.path.getsize(path) if content is None else len(content)) == 0
        raise BadImage(path, "the file is empty" if empty else "not an image of a known format") from None
    except Exception as error:  # damaged files make PIL's decoders fail in every way there is
        raise BadImage(path, reason(error)) from None


def _too_large(size: str) -> str:
    return f"{size} has more than the {MAX_PIXELS:,} pixels that are accepted"


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # the pixels are sound even where the metadata is not
        return 1


def _to_rgb(image: Image.Image, path: str | os.PathLike[str]) -> Image.Image:
    if image.mode == "F":
        raise BadImage(path, "floating-point pixels have no agreed range; save it as 8 or 16 bit")
    if image.mode.startswith("I"):
        try:
            return _in_strips(image, _from_16_bit)
        except OverflowError:
            reason = "32-bit pixels outside 0..65535 have no agreed range; save it as 8 or 16 bit"
            raise BadImage(path, reason) from None
    if image.has_transparency_data:
        return _in_strips(image, _on_white)
    return image if image.mode == "RGB" else image.convert("RGB")  # PIL would copy it


def _in_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """An RGB image put together from conversions of its parts, so that these need little memory."""
    rgb = Image.new("RGB", image.size)
    width = min(image.width, STRIP_PIXELS)
    height = max(STRIP_PIXELS // width, 1)
    for top in range(0, image.height, height):
        for left in range(0, image.width, width):
            corner = (left, top, min(left + width, image.width), min(top + height, image.height))
            rgb.paste(convert(image.crop(corner)), corner)
    return rgb


def _from_16_bit(image: Image.Image) -> Image.Image:
    grey_HW = np.asarray(image).astype(np.int64)
    if grey_HW.min() < 0 or grey_HW.max() > 65535:
        raise OverflowError
    return Image.fromarray(((grey_HW + 128) // 257).astype(np.uint8)).convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
