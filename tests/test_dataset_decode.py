import contextlib
import io
import os
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.decode import MAX_PIXELS, BadImage, read_rgb, read_size, resize_crop
from utils.errors import reason

ROOT = Path(__file__).parent.parent


def decode_image(path) -> np.ndarray:
    """uint8 [H, W, 3]."""
    return np.array(read_rgb(path))


def message_of(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


GRADIENT = np.stack([*np.meshgrid(np.arange(0, 240, 5), np.arange(0, 240, 10)), np.full((24, 48), 77)], -1).astype("u1")


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "tiff", "ppm", "PNG", "tga", "pcx", "sgi", "qoi", "jp2"])
def test_lossless_formats_come_back_exactly(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(GRADIENT).save(path)
    decoded = decode_image(path)
    assert (decoded == GRADIENT).all()
    assert (decoded.dtype, decoded.flags.writeable) == (np.uint8, True)
    assert read_size(path) == (48, 24)


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "JPG", "webp", "gif", "jfif", "avif"])
def test_lossy_formats_come_back_nearly(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(GRADIENT).save(path)
    assert np.abs(decode_image(path).astype(int) - GRADIENT).mean() < 6


def test_the_content_counts_and_not_the_extension(tmp_path):
    Image.fromarray(GRADIENT).save(tmp_path / "image.png")
    (tmp_path / "image.png").rename(tmp_path / "image.jpg")
    assert (decode_image(tmp_path / "image.jpg") == GRADIENT).all()


GREY = GRADIENT[..., 0]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Image.fromarray(GREY), GREY),
        (lambda: Image.fromarray(GREY > 100), np.where(GREY > 100, 255, 0)),
        (lambda: Image.fromarray(GREY.astype(np.uint16) * 257), GREY),
        (lambda: Image.fromarray(np.full((24, 48), 128 * 257 + 128, np.uint16)), np.full((24, 48), 128)),
        (lambda: Image.fromarray(np.full((24, 48), 128 * 257 + 129, np.uint16)), np.full((24, 48), 129)),
        (lambda: Image.fromarray(np.full((24, 48), 65535, np.uint16)), np.full((24, 48), 255)),
    ],
)
def test_grey_images_of_every_depth_become_three_equal_channels(tmp_path, make, expected):
    make().save(tmp_path / "image.png")
    assert (decode_image(tmp_path / "image.png") == expected[..., None]).all()
    assert decode_image(tmp_path / "image.png").shape == (24, 48, 3)


@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bit_tiff_and_pgm_are_scaled(tmp_path, order):
    wide = GREY.astype(np.uint16) * 257
    Image.fromarray(wide.astype(f"{order}u2")).save(tmp_path / "image.tif")
    assert (decode_image(tmp_path / "image.tif") == GREY[..., None]).all()
    (tmp_path / "image.pgm").write_bytes(b"P5 48 24 65535\n" + wide.astype(">u2").tobytes())
    assert (decode_image(tmp_path / "image.pgm") == GREY[..., None]).all()
    (tmp_path / "ten_bit.pgm").write_bytes(b"P5 48 24 1023\n" + np.full((24, 48), 1023, ">u2").tobytes())
    assert (decode_image(tmp_path / "ten_bit.pgm") == 255).all()


def test_palettes_are_resolved(tmp_path):
    image = Image.fromarray(GRADIENT).quantize(16)
    image.save(tmp_path / "image.png")
    assert (decode_image(tmp_path / "image.png") == np.asarray(image.convert("RGB"))).all()


def test_transparency_is_laid_on_white(tmp_path):
    alpha = np.zeros((24, 48), np.uint8)
    alpha[:, 16:32], alpha[:, 32:] = 255, 51
    Image.fromarray(np.dstack([GRADIENT, alpha])).save(tmp_path / "rgba.png")
    decoded = decode_image(tmp_path / "rgba.png").astype(int)
    assert (decoded[:, :16] == 255).all()
    assert (decoded[:, 16:32] == GRADIENT[:, 16:32]).all()
    assert np.abs(decoded[:, 32:] - (0.2 * GRADIENT[:, 32:] + 0.8 * 255)).max() <= 1

    Image.fromarray(np.dstack([GREY, alpha]), mode="LA").save(tmp_path / "la.png")
    decoded = decode_image(tmp_path / "la.png")
    assert (decoded[:, :16] == 255).all()
    assert (decoded[:, 16:32] == GREY[:, 16:32, None]).all()

    palette = Image.fromarray(np.tile(np.array([0, 1, 2], np.uint8), (8, 4)), mode="P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    for name, transparency in (("one.png", 1), ("each.png", bytes([255, 0, 255])), ("one.gif", 1)):
        palette.save(tmp_path / name, transparency=transparency)
        assert decode_image(tmp_path / name)[0, :3].tolist() == [[10, 20, 30], [255, 255, 255], [70, 80, 90]]
    Image.fromarray(GRADIENT).save(tmp_path / "key.png", transparency=(0, 0, 77))
    assert decode_image(tmp_path / "key.png")[0, :2].tolist() == [[255, 255, 255], [5, 0, 77]]


def test_cmyk_becomes_rgb(tmp_path):
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[..., 0], ink[..., 3] = 255, 0  # pure cyan
    for name in ("image.jpg", "image.tif"):
        Image.fromarray(ink, mode="CMYK").save(tmp_path / name)
        assert np.abs(decode_image(tmp_path / name).astype(int) - [0, 255, 255]).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_rotation_is_applied_once(tmp_path, orientation, suffix):
    blocks = np.kron(
        np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[255, 255, 0], [0, 0, 0], [255] * 3]]), np.ones((16, 16, 1))
    )
    stored = blocks.astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(
        tmp_path / f"image.{suffix}", exif=exif, **({"lossless": True} if suffix == "webp" else {})
    )
    upright = {  # where the stored rows and columns belong, from the EXIF standard
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: stored.transpose(1, 0, 2)[:, ::-1],
        7: stored.transpose(1, 0, 2)[::-1, ::-1],
        8: stored.transpose(1, 0, 2)[::-1],
    }[orientation]
    decoded = decode_image(tmp_path / f"image.{suffix}")
    assert decoded.shape == upright.shape
    centres = (slice(8, None, 16), slice(8, None, 16))
    assert np.abs(decoded[centres].astype(int) - upright[centres]).max() < 12


def test_odd_metadata_do_not_spoil_an_image(tmp_path):
    path = tmp_path / "image.jpg"
    Image.fromarray(GRADIENT).save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage")
    assert decode_image(path).shape == (24, 48, 3)
    Image.fromarray(GRADIENT).save(path, exif=b"Exif\0\0not a header")
    assert decode_image(path).shape == (24, 48, 3)
    text_for_a_number = b"\0\x01" + struct.pack(">HHI4sI", 0x0112, 2, 4, b"abc\0", 0)
    Image.fromarray(GRADIENT).save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08" + text_for_a_number)
    assert decode_image(path).shape == (24, 48, 3)


def test_the_first_frame_of_an_animation_counts(tmp_path):
    frames = [Image.fromarray(np.full((8, 8, 3), v, np.uint8)) for v in (0, 255)]
    for suffix in ("gif", "webp", "tif", "png"):
        path = tmp_path / f"image.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        assert (decode_image(path) == 0).all()


def saved(suffix, array=None, **options):
    stream = io.BytesIO()
    Image.fromarray(noise(0, 64, 64, 3) if array is None else array).save(stream, suffix, **options)
    return stream.getvalue()


def huge_png(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IEND", b"")
    )


def icon_of(picture):
    """An icon that says 64x64, with a picture of any size inside."""
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 64, 64, 0, 0, 1, 32, len(picture), 22) + picture


DAMAGED = {
    "empty.jpg": (lambda: b"", "empty"),
    "text.jpg": (lambda: b"this is no image\n" * 50, "not an image"),
    "html.png": (lambda: b"<html></html>", "not an image"),
    "zeros.jpg": (lambda: bytes(5000), "not an image"),
    "noise.jpg": (lambda: noise(5, 5000).tobytes(), "not an image"),
    "header.jpg": (lambda: saved("JPEG")[:10], ""),
    "half.jpg": (lambda: saved("JPEG")[:-2000], "truncated"),
    "half.png": (lambda: saved("PNG")[:-2000], "truncated"),
    "half.bmp": (lambda: saved("BMP")[:-2000], "truncated"),
    "half.gif": (lambda: saved("GIF")[:-1500], "truncated"),
    "half.webp": (lambda: saved("WEBP")[:-1500], ""),
    "half.tif": (lambda: saved("TIFF")[:-2000], ""),
    "half.ppm": (lambda: saved("PPM")[:-2000], "truncated"),
    "crc.png": (lambda: saved("PNG")[:60] + b"XXXX" + saved("PNG")[64:], ""),
    "float.tif": (lambda: saved("TIFF", np.ones((8, 8), np.float32)), "floating-point"),
    "wide.tif": (lambda: saved("TIFF", np.full((8, 8), 70000, np.int32)), "32-bit"),
    "negative.tif": (lambda: saved("TIFF", np.full((8, 8), -1, np.int32)), "32-bit"),
    "bomb.png": (lambda: huge_png(30_000, 30_000), "89,478,485 pixels"),
    "large.png": (lambda: huge_png(MAX_PIXELS // 8000 + 1, 8000), "89,478,485 pixels"),
    "icon.ico": (lambda: icon_of(huge_png(10_000, 10_000)), "89,478,485 pixels"),
    "flat.bmp": (lambda: struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 54, 0, 0, 54, 40, 0, 9, 1, 24, 0, 0, 1, 1, 0, 0), ""),
    "script.jpg": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_every_damage_is_one_line_with_the_path(tmp_path, name):
    make, expected = DAMAGED[name]
    path = tmp_path / name
    path.write_bytes(make())
    with pytest.raises(BadImage) as error:
        read_rgb(path)
    assert message_of(error).startswith(f"{path}: ")
    assert expected in error.value.reason
    assert error.value.reason
    assert error.value.path == path
    copy = pickle.loads(pickle.dumps(error.value))  # it travels out of worker processes
    assert (copy.path, copy.reason) == (path, error.value.reason)


def test_missing_files_and_folders_are_bad_images_too(tmp_path):
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("missing.png", "link.png", "folder.png"):
        with pytest.raises(BadImage) as error:
            read_rgb(tmp_path / name)
        assert message_of(error).startswith(str(tmp_path / name))


def test_a_bomb_is_refused_from_its_header(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(huge_png(30_000, 30_000))
    with pytest.raises(BadImage, match="pixels"):
        read_size(path)
    path.write_bytes(huge_png(MAX_PIXELS // 5, 5))
    assert read_size(path) == (MAX_PIXELS // 5, 5)


def test_no_damage_of_a_file_escapes_as_another_error(tmp_path):
    generator = np.random.default_rng(0)
    for suffix in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"):
        whole = np.frombuffer(saved(suffix, noise(1, 12, 12, 3)), np.uint8)
        for _ in range(60):
            broken = whole.copy()
            spots = generator.integers(0, min(len(broken), 200), 4)
            broken[spots] = generator.integers(0, 256, 4)
            path = tmp_path / "image.bin"
            path.write_bytes(broken[: generator.integers(len(broken) // 2, len(broken) + 1)].tobytes())
            with contextlib.suppress(BadImage):
                assert decode_image(path).shape[2] == 3


def test_resize_crop_is_torchvisions():
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    for seed, (width, height) in enumerate([(50, 40), (40, 50), (33, 33), (101, 37), (37, 101), (24, 90)]):
        image = Image.fromarray(noise(seed, height, width, 3))
        for resize, crop in ((32, 28), (33, 28), (37, 32), (24, 24), (27, 13)):
            for name in ("bicubic", "bilinear"):
                yardstick = Compose([Resize(resize, InterpolationMode(name)), CenterCrop(crop)])(image)
                assert (np.asarray(resize_crop(image, resize, crop, name)) == np.asarray(yardstick)).all()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(1700, 100), (100, 1700), (5000, 7), (9, 4000), (3000, 1), (1, 700)])
def test_of_a_long_image_only_what_is_kept_is_resized(size, interpolation, monkeypatch):
    small = noise(1, max(size[1] // 9, 1), max(size[0] // 9, 1), 3)
    image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
    for resize, crop in ((73, 64), (257, 224), (32, 32), (5, 3)):
        kept = np.asarray(resize_crop(image, resize, crop, interpolation), np.int16)
        monkeypatch.setattr("dataset.decode.LONGEST", 1 << 30)
        whole = np.asarray(resize_crop(image, resize, crop, interpolation), np.int16)
        monkeypatch.undo()
        assert kept.shape == (crop, crop, 3)
        assert np.abs(kept - whole).max() <= 2


PEAKS = """
import sys
from dataset.decode import read_rgb
from dataset.cut import CentreCut, RandomCrops, Request, ResizedCropSpec
import numpy as np

def memory(kind):
    return int(next(line for line in open("/proc/self/status") if line.startswith(kind)).split()[1]) / 1024

request = Request(0, np.zeros(1, np.int64), np.zeros(1, np.int64), 1)
cuts = [RandomCrops(ResizedCropSpec(size=224), 2, 0), CentreCut(257, 224, "bicubic"), CentreCut(64, 64, "bicubic")]
for path in sys.argv[1:]:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is now what is in use
    before = memory("VmRSS")
    image = read_rgb(path)
    for cut in cuts:
        cut.prepare(request)(image, 0)
    print(memory("VmHWM") - before)
    del image
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="asks Linux for its memory")
def test_a_small_file_takes_no_more_memory_than_its_pixels_ask_for(tmp_path):
    """SECURITY.md: 25 bytes a pixel at most, and 13 in the formats whose decoders keep no copies."""
    turned = Image.Exif()
    turned[0x0112] = 6
    side = 3000
    files = (
        ("wide.png", "RGB", (200_000, 1), {}, 25),
        ("tall.png", "RGB", (1, 200_000), {}, 25),
        ("long.png", "RGB", (60_000, 3), {}, 25),
        ("rgba.png", "RGBA", (side, side), {}, 13),
        ("turned.png", "RGBA", (side, side), {"exif": turned}, 13),
        ("grey.png", "I;16", (side, side), {}, 13),
        ("lzw.tif", "RGBA", (side, side), {"compression": "tiff_lzw"}, 13),
        ("cmyk.jpg", "CMYK", (side, side), {"progressive": True}, 13),
        ("rgba.jp2", "RGBA", (side, side), {}, 25),
    )
    for name, mode, size, options, _ in files:
        Image.new(mode, size).save(tmp_path / name, **options)
    words = [sys.executable, "-c", PEAKS, *(str(tmp_path / name) for name, *_ in files)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, check=True)
    for (name, _, size, _, bytes_per_pixel), peak in zip(files, done.stdout.split(), strict=True):
        # what strips and crops of this size take, and the decoder's own tables
        allowed = bytes_per_pixel * size[0] * size[1] / 2**20 + 30
        assert float(peak) < allowed, name


def test_pipes_and_devices_are_bad_images_and_do_not_wait(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/zero", tmp_path):
        with pytest.raises(BadImage, match="not a file"):
            read_rgb(path)


def test_reasons_are_one_line_and_never_empty():
    assert reason(ValueError("a\n  b")) == "a b"
    assert reason(KeyError()) == "KeyError"
    assert reason(FileNotFoundError(2, "No such file or directory", "x")) == "No such file or directory"
