"""Images of other libraries: PIL images keep their colours and orientation, and what is ambiguous is refused."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
import torch

from yolov7_deploy.errors import ImageError
from yolov7_deploy.image import as_bgr, read_image

PIL = pytest.importorskip("PIL", reason="Pillow is not installed")

from PIL import Image, ImageOps  # noqa: E402

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
# YCbCr rounds each channel once.
COLOUR_TOLERANCE = 2
# Two JPEG decoders may round differently.
JPEG_TOLERANCE = 6
ORIENTATION = 0x0112


def colours(size=(6, 4)):
    """Return an RGB image whose quadrants are red, green, blue and white, so that flips and swaps are seen."""
    image = Image.new("RGB", size, (255, 255, 255))
    width, height = size
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    return image


def in_mode(mode):
    """Return `colours` in a mode; some modes are only reached through another one."""
    way = {"PA": ("P", "PA"), "La": ("LA", "La"), "RGBa": ("RGBA", "RGBa")}.get(mode, (mode,))
    image = colours()
    for step in way:
        image = image.convert(step)
    return image


def bgr_of(rgb):
    return np.asarray(rgb)[:, :, ::-1]


def pil_file(image, kind, **options):
    """Return the image as PIL reads it from a file: not decoded yet."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(io.BytesIO(file.getvalue()))


# --- PIL ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "CMYK", "YCbCr", "HSV"])
def test_a_pil_image_of_a_colour_mode_becomes_bgr(mode):
    image = as_bgr(in_mode(mode))
    assert (image.dtype, image.shape, image.flags.c_contiguous) == (np.uint8, (4, 6, 3), True)
    np.testing.assert_allclose(image.astype(int), bgr_of(colours()).astype(int), atol=COLOUR_TOLERANCE)


@pytest.mark.parametrize("mode", ["L", "LA", "La", "1"])
def test_a_grey_pil_image_is_repeated(mode):
    image = as_bgr(in_mode(mode))
    expected = np.asarray(in_mode(mode).convert("LA" if mode == "La" else mode).convert("L"))
    np.testing.assert_array_equal(image, np.repeat(expected[:, :, None], 3, axis=2))


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_a_16_bit_pil_image_is_scaled_as_a_uint16_array(mode):
    values = np.linspace(0, 65535, 20).astype(np.uint16).reshape(4, 5)
    order = ">u2" if mode == "I;16B" else "<u2"
    image = Image.frombytes(mode, (5, 4), values.astype(order).tobytes())
    np.testing.assert_array_equal(as_bgr(image), as_bgr(values))
    np.testing.assert_array_equal(as_bgr(values.astype(order)), as_bgr(values))


@pytest.mark.parametrize("transparency", [0, b"\x00\xff"])
def test_transparency_of_a_palette_does_not_change_colours(transparency):
    image = pil_file(colours().convert("P"), "PNG", transparency=transparency)
    assert (image.mode, "transparency" in image.info) == ("P", True)
    np.testing.assert_array_equal(as_bgr(image), bgr_of(colours()))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_pil_image_has_the_orientation_of_the_file(tmp_path, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    colours((96, 64)).save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    image = as_bgr(Image.open(tmp_path / "a.jpg"))
    np.testing.assert_array_equal(image, bgr_of(ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg"))))
    assert image.shape == ((96, 64, 3) if orientation > 4 else (64, 96, 3))
    assert image.flags.c_contiguous
    np.testing.assert_allclose(image.astype(int), read_image(tmp_path / "a.jpg").astype(int), atol=JPEG_TOLERANCE)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_a_tiff_file_is_rotated_once(compression):
    image = pil_file(colours(), "TIFF", tiffinfo={ORIENTATION: 6}, compression=compression)
    np.testing.assert_array_equal(as_bgr(image), bgr_of(colours().transpose(Image.Transpose.ROTATE_270)))
    np.testing.assert_array_equal(as_bgr(image), bgr_of(colours().transpose(Image.Transpose.ROTATE_270)))


def test_a_damaged_orientation_is_ignored_as_in_files():
    image = colours()
    image.info["exif"] = b"Exif\x00\x00MM\x00*\xff\xff\xff\xff"
    np.testing.assert_array_equal(as_bgr(image), bgr_of(colours()))


def test_a_pil_image_and_a_subclass_are_not_modified():
    class Photo(Image.Image):
        pass

    image = in_mode("P")
    before = image.tobytes()
    as_bgr(image)
    assert (image.mode, image.tobytes()) == ("P", before)
    photo = Photo()
    photo.__setstate__([{}, "RGB", (6, 4), None, colours().tobytes()])
    np.testing.assert_array_equal(as_bgr(photo), bgr_of(colours()))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_pil_image_without_a_range_is_refused(mode):
    with pytest.raises(ImageError, match=f"mode {mode}") as caught:
        as_bgr(colours().convert("L").convert(mode))
    assert "uint16" in caught.value.fix


def test_a_truncated_closed_or_empty_pil_image_is_refused():
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(file, "JPEG")
    closed = pil_file(colours(), "PNG")
    closed.close()
    for image in (Image.open(io.BytesIO(file.getvalue()[:-1000])), closed, Image.new("RGB", (0, 4))):
        with pytest.raises(ImageError) as caught:
            as_bgr(image)
        assert caught.value.fix


def test_pil_is_not_imported():
    code = (
        "import sys, numpy as np; from yolov7_deploy.image import as_bgr; "
        "as_bgr(np.zeros((4, 4, 3), np.uint8)); sys.exit('PIL' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- refused, with the expression that converts ---------------------------------------------------------------------

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)  # BGR
RGB = np.ascontiguousarray(PIXELS[:, :, ::-1])
ALPHA = np.dstack([RGB, RGB[:, :, :1]])
FLOATS = (RGB / 255).astype(np.float32)
PLANES = RGB.transpose(2, 0, 1)
CONVERTED = {
    "torch uint8": torch.from_numpy(RGB),
    "torch uint8 channels first": torch.from_numpy(PLANES),
    "torch float": torch.from_numpy(FLOATS),
    "torch float channels first": torch.from_numpy(FLOATS).permute(2, 0, 1),
    "torch float 0..255": torch.from_numpy(RGB).float(),
    "torch float64 with a gradient": torch.from_numpy(FLOATS).double().permute(2, 0, 1).requires_grad_(),
    "torch RGBA channels first": torch.from_numpy(ALPHA).permute(2, 0, 1),
    "torch int64": torch.from_numpy(RGB).long(),
    "numpy channels first": PLANES,
    "numpy float channels first": FLOATS.transpose(2, 0, 1),
    "numpy RGBA channels first": ALPHA.transpose(2, 0, 1),
    "numpy float": PIXELS / 255,
    "numpy float 0..255": PIXELS.astype(np.float32),
    "numpy int32": PIXELS.astype(np.int32),
}


@pytest.mark.parametrize("image", CONVERTED.values(), ids=CONVERTED)
def test_the_fix_is_the_expression_that_converts_the_image(image):
    with pytest.raises(ImageError) as caught:
        as_bgr(image)
    expression = caught.value.fix.removeprefix("Use ").partition("  for RGB")[0].strip()
    np.testing.assert_array_equal(as_bgr(eval(expression, {"image": image})), PIXELS)


@pytest.mark.parametrize("stack", [torch.stack, np.stack])
def test_the_fix_for_a_batch_calls_batch(stack):
    images = stack([CONVERTED["torch float channels first"]] * 2)

    class Detector:
        batch = staticmethod(list)

    with pytest.raises(ImageError) as caught:
        as_bgr(images)
    expression = caught.value.fix.removeprefix("Use ").partition("  for RGB")[0].strip()
    converted = eval(expression, {"detector": Detector, "images": images})
    assert [as_bgr(one).tobytes() for one in converted] == [PIXELS.tobytes()] * 2


@pytest.mark.parametrize("image", [torch.tensor([[[-2.1, 2.3, 0.5]]]), np.array([[[-2.1, 2.3, 0.5]]])])
def test_normalized_values_are_named(image):
    with pytest.raises(ImageError) as caught:
        as_bgr(image)
    assert "-2.1..2.3" in caught.value.fix


class Strange:
    """An array of an unknown library."""

    def __array__(self, dtype=None, copy=None):
        return RGB


@pytest.mark.parametrize(
    "image, hint",
    [
        (Strange(), "[..., ::-1]"),
        (np.float32(3), "numpy.asarray"),
        (io.BytesIO(b"\xff\xd8"), "image.read()"),
        (torch.empty(3, 4, 5, device="meta"), "NumPy"),
        (torch.zeros(3, 4, 5).to_sparse(), "NumPy"),
        (torch.full((3, 4, 5), float("nan")), "NumPy"),
        (torch.zeros(7), "NumPy"),
        ({"image": RGB}, "detector.batch"),
        ([RGB, RGB], "detector.batch"),
        (3, "path"),
    ],
)
def test_other_objects_are_refused_with_a_hint(image, hint):
    with pytest.raises(ImageError, match=type(image).__name__) as caught:
        as_bgr(image)
    assert hint in caught.value.fix
