"""Reading images, and the letterbox and its inverse against the official formulas."""

import math

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from yolov7_deploy.errors import ImageError, UsageError
from yolov7_deploy.image import (
    PAD_GREY,
    as_bgr,
    decode_image,
    fit_evaluation_letterbox,
    fit_letterbox,
    fit_rect_letterbox,
    read_image,
    read_image_hw,
    to_network_input,
)

# A box may be displaced by this many canvas pixels: half a pixel from rounding the resized side, half from an odd
# padding.
MAX_CANVAS_OFFSET_PX = 1.0
# float32 coordinates up to some thousands, divided by gains down to 0.01.
FLOAT32_TOLERANCE = 1e-5
# OpenCV converts 16-bit files by a shift, arrays are divided by 257: the difference is one level.
MAX_LEVEL_DIFFERENCE = 1

sides = st.integers(1, 3000)
canvas_sides = st.integers(1, 42).map(lambda cells: 32 * cells)
hws = st.tuples(sides, sides)
canvas_hws = st.tuples(canvas_sides, canvas_sides)


def noise(height, width, channels=3, *, dtype=np.uint8, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def official_pads(canvas, resized):
    """Return the pixels before and after the image along one axis."""
    half = (canvas - resized) / 2
    return round(half - 0.1), round(half + 0.1)


def official_canvas(image, resized_hw, canvas_hw, method):
    """Return the canvas of the official letterbox: resize if needed, then a grey border on four sides."""
    if image.shape[:2] != resized_hw:
        image = cv2.resize(image, resized_hw[::-1], interpolation=method)
    top, bottom = official_pads(canvas_hw[0], resized_hw[0])
    left, right = official_pads(canvas_hw[1], resized_hw[1])
    return cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_CONSTANT, value=(114, 114, 114))


# --- the inference letterbox ----------------------------------------------------------------------------------------


@settings(max_examples=500)
@given(hws, canvas_hws)
@example((1, 3000), (640, 640))
@example((640, 480), (640, 640))
@example((1080, 1920), (640, 640))
def test_the_image_is_scaled_to_fit_and_positioned_as_in_the_official_letterbox(source, canvas):
    letterbox = fit_letterbox(source, canvas)
    ratio = min(canvas[0] / source[0], canvas[1] / source[1])
    for axis, before in ((0, letterbox.top), (1, letterbox.left)):
        resized = letterbox.resized_hw[axis]
        assert resized == max(1, round(source[axis] * ratio))
        first, last = official_pads(canvas[axis], resized)
        assert before == first >= 0
        assert first + resized + last == canvas[axis]
    assert any(side == limit for side, limit in zip(letterbox.resized_hw, canvas, strict=True))


@settings(max_examples=300)
@given(hws, canvas_hws, st.data())
def test_a_box_is_scaled_back_to_its_position(source, canvas, data):
    letterbox = fit_letterbox(source, canvas)
    ys = data.draw(st.tuples(st.floats(0, source[0]), st.floats(0, source[0])).map(sorted))
    xs = data.draw(st.tuples(st.floats(0, source[1]), st.floats(0, source[1])).map(sorted))
    box = np.array([xs[0], ys[0], xs[1], ys[1]])
    # The true position of the pixels: the scale of the resized image, and an integer padding.
    scale = np.array([resized / side for resized, side in zip(letterbox.resized_hw, source, strict=True)])[[1, 0, 1, 0]]
    on_canvas = box * scale + [letterbox.left, letterbox.top] * 2
    back = letterbox.undo(on_canvas[None].astype(np.float32))
    assert back.dtype == np.float32
    np.testing.assert_allclose(back[0], box, atol=MAX_CANVAS_OFFSET_PX / letterbox.gain * 1.001, rtol=FLOAT32_TOLERANCE)


@settings(max_examples=300)
@given(hws, canvas_hws, st.integers(0, 2**32 - 1))
def test_undo_is_the_official_formula(source, canvas, seed):
    boxes = np.random.default_rng(seed).uniform(-50, 1400, (20, 4)).astype(np.float32)
    kept = boxes.copy()
    back = fit_letterbox(source, canvas).undo(boxes)
    gain = min(canvas[0] / source[0], canvas[1] / source[1])
    resized = [max(1, round(side * gain)) for side in source]
    pad_x, pad_y = (canvas[1] - resized[1]) / 2, (canvas[0] - resized[0]) / 2
    expected = boxes.astype(np.float64)
    expected[:, [0, 2]] = ((expected[:, [0, 2]] - pad_x) / gain).clip(0, source[1])
    expected[:, [1, 3]] = ((expected[:, [1, 3]] - pad_y) / gain).clip(0, source[0])
    # Cancellation: the rounding of the canvas coordinate, divided by the gain.
    np.testing.assert_allclose(back, expected, rtol=FLOAT32_TOLERANCE, atol=1400 * 2**-22 / gain)
    np.testing.assert_array_equal(boxes, kept)


def test_undo_accepts_no_boxes():
    assert fit_letterbox((480, 640), (640, 640)).undo(np.empty((0, 4), np.float32)).shape == (0, 4)


@settings(max_examples=100, deadline=None)
@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.tuples(st.integers(1, 8), st.integers(1, 8)).map(lambda c: (32 * c[0], 32 * c[1])),
)
def test_the_canvas_equals_the_official_one(source, canvas):
    image = noise(*source)
    letterbox = fit_letterbox(source, canvas)
    ours = letterbox.apply(image)
    np.testing.assert_array_equal(ours, official_canvas(image, letterbox.resized_hw, canvas, cv2.INTER_LINEAR))
    assert ours.dtype == np.uint8


def test_an_image_that_fits_keeps_its_pixels_and_is_padded_with_grey():
    image = noise(96, 63)
    kept = image.copy()
    canvas = fit_letterbox((96, 63), (96, 96)).apply(image)
    np.testing.assert_array_equal(canvas[:, 16:79], kept)
    canvas[:, 16:79] = PAD_GREY
    assert (canvas == 114).all()
    np.testing.assert_array_equal(image, kept)


def test_an_image_of_the_canvas_size_is_copied():
    image = noise(64, 64)
    canvas = fit_letterbox((64, 64), (64, 64)).apply(image)
    np.testing.assert_array_equal(canvas, image)
    assert not np.shares_memory(canvas, image)


def test_letterboxes_have_known_sizes_and_offsets():
    full_hd = fit_letterbox((1080, 1920), (640, 640))
    assert (full_hd.resized_hw, full_hd.top, full_hd.left) == ((360, 640), 140, 0)
    odd = fit_letterbox((427, 640), (640, 640))  # 213 rows of padding: 106 above, 107 below
    assert (odd.resized_hw, odd.top, odd.offset_xy) == ((427, 640), 106, (0.0, 106.5))
    up = fit_letterbox((10, 20), (640, 640))
    assert (up.resized_hw, up.gain) == ((320, 640), 32)


# --- the rectangular letterbox --------------------------------------------------------------------------------------


def official_auto(source, size, stride):
    """Return what the official detection program computes: (resized, top, left, canvas, gain, pad_x, pad_y)."""
    ratio = min(size[0] / source[0], size[1] / source[1])
    resized = [max(1, round(side * ratio)) for side in source]
    padding = [(limit - side) % stride / 2 for limit, side in zip(size, resized, strict=True)]
    before, after = ([round(half + sign * 0.1) for half in padding] for sign in (-1, 1))
    canvas = tuple(first + side + last for first, side, last in zip(before, resized, after, strict=True))
    gain = min(side / own for side, own in zip(canvas, source, strict=True))
    pad_y, pad_x = ((side - own * gain) / 2 for side, own in zip(canvas, source, strict=True))
    return tuple(resized), *before, canvas, gain, pad_x, pad_y


@settings(max_examples=1000)
@given(hws, st.sampled_from([32, 64]), st.tuples(st.integers(1, 21), st.integers(1, 21)))
@example((1, 3000), 32, (20, 20))
@example((427, 640), 32, (20, 20))
@example((333, 500), 32, (20, 20))
@example((701, 1000), 32, (20, 20))  # 448.64, so the canvas has 480 rows
def test_the_rect_letterbox_is_the_official_one(source, stride, cells):
    size = (stride * cells[0], stride * cells[1])
    ours = fit_rect_letterbox(source, size, stride=stride)
    resized, top, left, canvas, gain, pad_x, pad_y = official_auto(source, size, stride)
    assert (ours.resized_hw, ours.top, ours.left, ours.canvas_hw) == (resized, top, left, canvas)
    assert ours.gain == gain
    assert ours.offset_xy == (pad_x, pad_y)
    assert not any(side % stride for side in canvas)
    square = fit_letterbox(source, size)
    assert (square.resized_hw, square.shrink_by_area) == (ours.resized_hw, ours.shrink_by_area)


def test_rect_letterboxes_have_known_sizes():
    assert fit_rect_letterbox((480, 640), (640, 640), stride=32).canvas_hw == (480, 640)
    assert fit_rect_letterbox((427, 640), (640, 640), stride=32).canvas_hw == (448, 640)
    assert fit_rect_letterbox((1080, 1920), (640, 640), stride=32).canvas_hw == (384, 640)
    assert fit_rect_letterbox((1920, 1080), (1280, 1280), stride=64).canvas_hw == (1280, 768)
    assert fit_rect_letterbox((700, 700), (640, 640), stride=32).canvas_hw == (640, 640)


# --- the evaluation letterbox ---------------------------------------------------------------------------------------


def official_evaluation(source, canvas, size):
    """Return what the official test program computes: (resized, top, left, gain, pad_x, pad_y, by area)."""
    height, width = source
    ratio = size / max(height, width)
    if ratio != 1:
        height, width = int(height * ratio), int(width * ratio)
    # Then the letterbox without scaling up; the canvas of a rectangular batch holds every image of it.
    assert min(canvas[0] / height, canvas[1] / width, 1) == 1
    pad_x, pad_y = (canvas[1] - width) / 2, (canvas[0] - height) / 2
    top, left = official_pads(canvas[0], height)[0], official_pads(canvas[1], width)[0]
    return (height, width), top, left, height / source[0], pad_x, pad_y, ratio < 1


def rect_canvas(resized_hw, stride=32, pad=0.5):
    """Return the canvas of a single image in the official rectangular mode."""
    return tuple(math.ceil(side / stride + pad) * stride for side in resized_hw)


@st.composite
def evaluations(draw):
    """Draw (source, canvas, size) in which no side is truncated to zero."""
    size = draw(st.sampled_from([64, 640, 1280]))
    source = draw(hws.filter(lambda hw: int(min(hw) * size / max(hw)) >= 1))
    resized = [math.ceil(side * size / max(source)) for side in source]
    extra = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    canvas = tuple(side + 32 * more for side, more in zip(rect_canvas(resized), extra, strict=True))
    return source, canvas, size


@settings(max_examples=500)
@given(evaluations())
@example(((480, 640), (512, 672), 640))
@example(((427, 640), (448, 672), 640))
def test_the_evaluation_letterbox_is_the_official_one(case):
    source, canvas, size = case
    letterbox = fit_evaluation_letterbox(source, canvas, size=size)
    resized, top, left, gain, pad_x, pad_y, by_area = official_evaluation(source, canvas, size)
    assert (letterbox.resized_hw, letterbox.top, letterbox.left) == (resized, top, left)
    assert letterbox.gain == gain
    assert letterbox.offset_xy == (pad_x, pad_y)
    assert letterbox.shrink_by_area == by_area


@pytest.mark.parametrize("source", [(500, 375), (60, 100), (640, 480), (427, 640), (33, 640)])
def test_the_evaluation_canvas_equals_the_official_one(source):
    image = noise(*source)
    resized, *_, by_area = official_evaluation(source, (2048, 2048), 320)
    canvas = rect_canvas(resized)
    ours = fit_evaluation_letterbox(source, canvas, size=320).apply(image)
    method = cv2.INTER_AREA if by_area else cv2.INTER_LINEAR
    np.testing.assert_array_equal(ours, official_canvas(image, resized, canvas, method))


def test_evaluation_boxes_are_scaled_back_by_the_height_ratio_on_both_axes():
    letterbox = fit_evaluation_letterbox((427, 1000), (320, 672), size=640)  # 273 x 640, by 273/427 and not 0.64
    back = letterbox.undo(np.array([[116, 123.5, 216, 223.5]], np.float32))
    gain = 273 / 427
    expected = [[(116 - 16) / gain, (123.5 - 23.5) / gain, (216 - 16) / gain, (223.5 - 23.5) / gain]]
    np.testing.assert_allclose(back, expected, rtol=FLOAT32_TOLERANCE)


def test_a_side_truncated_to_zero_keeps_one_pixel():
    assert fit_evaluation_letterbox((1, 3000), (32, 672), size=640).resized_hw == (1, 640)


# --- the network input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_network_input_equals_the_obvious_expression_bit_for_bit(count):
    canvases = [noise(64, 96, seed=i) for i in range(count)]
    canvases[0][0, :, 0] = np.arange(96)
    obvious = np.stack(canvases)[..., ::-1].transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    ours = to_network_input(canvases)
    assert (ours.dtype, ours.shape) == (np.float32, (count, 3, 64, 96))
    assert ours.tobytes() == np.ascontiguousarray(obvious).tobytes()
    assert ours.flags.c_contiguous


def test_every_pixel_value_is_scaled_as_torch_scales_it():
    torch = pytest.importorskip("torch")
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    np.testing.assert_array_equal(to_network_input([values])[0, 0], (torch.from_numpy(values)[..., 0].float() / 255.0))


# --- arrays as images -----------------------------------------------------------------------------------------------


def test_bgr_is_returned_without_a_copy():
    image = noise(4, 5)
    assert as_bgr(image) is image or np.shares_memory(as_bgr(image), image)


def test_grey_is_repeated():
    grey = noise(4, 5, 0)
    for image in (grey, grey[:, :, None]):
        bgr = as_bgr(image)
        assert bgr.shape == (4, 5, 3)
        assert all((bgr[:, :, c] == grey).all() for c in range(3))


def test_alpha_is_dropped():
    image = noise(4, 5, 4)
    np.testing.assert_array_equal(as_bgr(image), image[:, :, :3])


def test_uint16_is_scaled_to_uint8():
    image = noise(40, 50, dtype=np.uint16)
    image[0, 0] = (0, 257, 65535)
    np.testing.assert_array_equal(as_bgr(image), (image // 257).astype(np.uint8))
    assert as_bgr(image)[0, 0].tolist() == [0, 1, 255]


@pytest.mark.parametrize("view", [np.s_[::-1], np.s_[:, ::-1], np.s_[..., ::-1], np.s_[::2, 1::2]])
def test_the_result_is_contiguous_with_the_same_pixels(view):
    image = noise(8, 9)[view]
    assert as_bgr(image).flags.c_contiguous
    np.testing.assert_array_equal(as_bgr(image), image)


def test_a_nested_list_is_refused_because_it_may_be_several_images():
    with pytest.raises(ImageError, match="this one is a list"):
        as_bgr([[[1, 2, 3]]])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.bool_, np.complex64])
def test_other_number_types_are_refused_with_a_fix(dtype):
    with pytest.raises(ImageError, match=np.dtype(dtype).name) as caught:
        as_bgr(np.ones((4, 5, 3), dtype))
    assert "astype" in caught.value.fix


@pytest.mark.parametrize(
    "shape", [(0, 5, 3), (5, 0, 3), (0, 0), (4, 5, 2), (4, 5, 5), (3, 40, 50), (1, 4, 5, 3), (7,), ()]
)
def test_other_shapes_are_refused_and_shown(shape):
    with pytest.raises(ImageError) as caught:
        as_bgr(np.zeros(shape, np.uint8))
    assert str(shape) in caught.value.message


@pytest.mark.parametrize("value", [None, [], "street.jpg", [[1, 2], [3]]])
def test_objects_other_than_arrays_are_refused(value):
    with pytest.raises(ImageError):
        as_bgr(value)


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_png_is_read_exactly(tmp_path):
    image = noise(20, 30)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), image)
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.png")), image)


def test_a_grey_png_becomes_bgr(tmp_path):
    grey = noise(20, 30, 0)
    cv2.imwrite(str(tmp_path / "a.png"), grey)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.repeat(grey[:, :, None], 3, 2))


def test_an_rgba_png_loses_its_alpha_and_keeps_its_colours(tmp_path):
    image = noise(20, 30, 4)
    image[0, :, 3] = 0
    cv2.imwrite(str(tmp_path / "a.png"), image)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), image[:, :, :3])


@pytest.mark.parametrize("channels", [0, 3])
def test_a_16_bit_png_becomes_8_bit(tmp_path, channels):
    image = noise(20, 30, channels, dtype=np.uint16)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    read = read_image(tmp_path / "a.png")
    assert (read.dtype, read.shape) == (np.uint8, (20, 30, 3))
    np.testing.assert_allclose(read.astype(int), as_bgr(image).astype(int), atol=MAX_LEVEL_DIFFERENCE)


def test_a_path_with_spaces_and_accents_is_read(tmp_path):
    path = tmp_path / "straße с пробелом.png"
    path.write_bytes(cv2.imencode(".png", noise(4, 5))[1].tobytes())
    assert read_image(path).shape == (4, 5, 3)


def refusal(path):
    with pytest.raises(ImageError) as caught:
        read_image(path)
    assert str(path) in caught.value.message
    assert caught.value.fix
    return caught.value.message


def test_an_empty_file_is_reported(tmp_path):
    (tmp_path / "a.jpg").touch()
    assert "0 bytes" in refusal(tmp_path / "a.jpg")


def test_a_text_file_is_refused(tmp_path):
    (tmp_path / "a.jpg").write_text("not an image")
    assert "12 bytes" in refusal(tmp_path / "a.jpg")


def test_a_jpeg_truncated_in_its_header_is_refused(tmp_path):
    data = cv2.imencode(".jpg", noise(200, 200))[1].tobytes()
    (tmp_path / "a.jpg").write_bytes(data[:100])
    assert "not an image" in refusal(tmp_path / "a.jpg")


def test_a_png_whose_chunk_states_gigabytes_is_refused_before_they_are_allocated(tmp_path):
    data = bytearray(cv2.imencode(".png", noise(20, 20))[1].tobytes())
    at = data.index(b"IDAT")
    data[at - 4 : at] = (0xFF000000).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(data)
    assert "bytes of a chunk are missing" in refusal(tmp_path / "a.png")


def test_a_big_tiff_with_an_impossible_offset_is_refused(tmp_path):
    (tmp_path / "a.tif").write_bytes(b"II+\0\x08\0\0\0" + b"\xff" * 100)
    assert "not an image" in refusal(tmp_path / "a.tif")


JPEG_FORMS = {
    "baseline": [],
    "progressive": [cv2.IMWRITE_JPEG_PROGRESSIVE, 1],
    "restarts": [cv2.IMWRITE_JPEG_RST_INTERVAL, 5],
    "optimized": [cv2.IMWRITE_JPEG_OPTIMIZE, 1],
}


@pytest.mark.parametrize("form", JPEG_FORMS)
@pytest.mark.parametrize("grey", [False, True])
def test_a_jpeg_without_its_last_bytes_is_read_as_opencv_reads_the_file(tmp_path, caplog, form, grey):
    image = noise(60, 80)[..., 0] if grey else noise(60, 80)
    data = cv2.imencode(".jpg", image, JPEG_FORMS[form])[1].tobytes()
    path = tmp_path / "a.jpg"
    for missing in (0, 1, 2, 3, 10, 100, len(data) // 2):
        caplog.clear()
        path.write_bytes(data[: len(data) - missing])
        np.testing.assert_array_equal(read_image(path), cv2.imread(str(path)))
        np.testing.assert_array_equal(decode_image(path.read_bytes()), cv2.imread(str(path)))
        assert read_image_hw(path) == (60, 80)
        assert ("last bytes" in caplog.text) or missing < 3
    assert str(path) in caplog.text


@pytest.mark.parametrize("form", [bytes, bytearray, memoryview, lambda data: np.frombuffer(data, dtype=np.uint8)])
def test_the_bytes_of_a_file_are_an_image(tmp_path, form):
    data = cv2.imencode(".png", noise(6, 8))[1].tobytes()
    np.testing.assert_array_equal(decode_image(form(data)), noise(6, 8))
    if form(data).__class__ is not np.ndarray:
        np.testing.assert_array_equal(as_bgr(form(data)), noise(6, 8))


def test_bytes_that_are_not_an_image_are_refused_with_their_name():
    with pytest.raises(ImageError, match=r"^upload is not an image OpenCV can decode \(5 bytes\)"):
        decode_image(b"hello", name="upload")
    with pytest.raises(ImageError, match=r"^The image is empty"):
        decode_image(b"")


@pytest.mark.parametrize("reduced", [0, 3, 16])
def test_another_reduction_than_those_of_jpeg_is_refused(reduced):
    with pytest.raises(UsageError, match=rf"reduced must be 1, 2, 4 or 8, not {reduced}"):
        decode_image(cv2.imencode(".png", noise(6, 8))[1], reduced=reduced)


def test_a_missing_file_is_reported(tmp_path):
    assert "No such file" in refusal(tmp_path / "a.jpg")


def test_a_folder_is_reported_as_a_folder(tmp_path):
    assert "is a folder, not an image" in refusal(tmp_path)
