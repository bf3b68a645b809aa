"""Image files -> RGB pixels, and the cut of a file to a square. PIL does the decoding and the resizing."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from utils.errors import RunError, reason

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
        return f"{self.path}: {self.reason}"


def refusal(bad: BadImage) -> RunError:
    """What --on_bad_image fail raises for a file."""
    return RunError(f"{bad}. Mend or remove the file, or pass --on_bad_image skip to leave such files out.")


def read_rgb(path: str | os.PathLike[str]) -> Image.Image:
    """The first frame of an image file as an 8-bit RGB PIL image, the way a viewer shows it.

    EXIF rotation is applied; transparency is laid on white; 16-bit grey is scaled by 1/257; grey, palette, CMYK and
    the rest go through PIL's conversion. Not for several threads at once (it silences PIL's warnings).

    Raises:
        BadImage: missing, empty, truncated, not an image, more than MAX_PIXELS, or pixels without a known range.
    """
    with _opened(path) as image:
        image.load()
        transpose = _TRANSPOSE.get(_orientation(image))
        rgb = _to_rgb(image, path)
        return rgb if transpose is None else rgb.transpose(transpose)


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Width and height in pixels from the header alone, EXIF rotation left out.

    Raises:
        BadImage: as `read_rgb`, as far as the header tells.
    """
    with _opened(path) as image:
        return image.size


def resize_crop(image: Image.Image, resize: int, crop: int, interpolation: str = "bicubic") -> Image.Image:
    """Short side to `resize` pixels (antialiased, aspect kept), then the central `crop` x `crop` pixels.

    Rounding is torchvision's: the long side is cut off to whole pixels, the crop's corner rounds half to even.
    """
    width, height = image.size
    short = min(width, height)
    if short != resize:
        image = image.resize((resize * width // short, resize * height // short), INTERPOLATIONS[interpolation])
    left, top = round((image.width - crop) / 2), round((image.height - crop) / 2)
    return image.crop((left, top, left + crop, top + crop))


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """The file opened by PIL, nothing decoded yet; whatever goes wrong inside comes out as BadImage."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata and large sizes; what matters raises
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadImage(path, _too_large(f"{image.width}x{image.height}"))
                yield image
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise BadImage(path, _too_large("it")) from None
    except Image.UnidentifiedImageError:
        empty = os.path.getsize(path) == 0
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
        grey_HW = np.asarray(image).astype(np.int64)
        if grey_HW.min() < 0 or grey_HW.max() > 65535:
            raise BadImage(path, "32-bit pixels outside 0..65535 have no agreed range; save it as 8 or 16 bit")
        image = Image.fromarray(((grey_HW + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # PIL would copy it
