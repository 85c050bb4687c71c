"""The letterbox kernel, compiled for the emulated GPU, equals OpenCV's letterbox bit for bit."""

import ctypes
import mmap

import cv2
import numpy as np
import pytest

from tests.fakes.emulated_kernels import (
    BAD_ARGUMENT,
    FLOAT16,
    FLOAT32,
    OK,
    UINT8,
    Frame,
    Guarded,
    LetterboxParams,
    emulated,
)
from yolov7_deploy.image import PAD_GREY, fit_evaluation_letterbox, fit_letterbox, to_network_input

TYPES = {FLOAT32: np.float32, FLOAT16: np.float16, UINT8: np.uint8}
CANVAS = (96, 160)
LAYOUTS = (0, 5, 64)  # bytes between rows


@pytest.fixture(scope="module")
def kernels():
    return emulated("letterbox.cu")


@pytest.fixture(scope="module")
def checked_kernels():
    """Kernels for which an undefined operation ends the process."""
    return emulated("letterbox.cu", flags=("-fsanitize=undefined", "-fno-sanitize-recover=all"))


def noise(rng, height, width):
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def fenced(nbytes):
    """Return memory that ends at an unreadable page: reading further ends the process."""
    size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    pages = np.frombuffer(memory, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(pages.ctypes.data + size), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    return pages[size - nbytes : size]


def in_memory(frame, layout):
    """Return the frame as a view with the row pitch of a layout and no readable memory after its last pixel."""
    height, width = frame.shape[:2]
    pitch = 3 * width + LAYOUTS[layout % len(LAYOUTS)]
    memory = fenced((height - 1) * pitch + 3 * width)
    memory[:] = 0xEE
    view = np.lib.stride_tricks.as_strided(memory, (height, width, 3), (pitch, 3, 1))
    view[...] = frame
    return view


def frame_of(view, box):
    return Frame(
        pixels=view.ctypes.data,
        pitch=view.strides[0],
        height=view.shape[0],
        width=view.shape[1],
        resized_height=box.resized_hw[0],
        resized_width=box.resized_hw[1],
        top=box.top,
        left=box.left,
    )


def run(kernels, frames, canvas_hw, kind, pad=PAD_GREY):
    """Return the kernel's canvases for Frames."""
    array = (Frame * len(frames))(*frames)
    shape = (len(frames), *canvas_hw, 3) if kind == UINT8 else (len(frames), 3, *canvas_hw)
    canvas = Guarded(shape, TYPES[kind])
    params = LetterboxParams(batch=len(frames), height=canvas_hw[0], width=canvas_hw[1], type=kind, pad=pad)
    status = kernels.y7_letterbox(ctypes.byref(params), ctypes.addressof(array), canvas.address, None)
    assert status == OK, kernels.status_text(status)
    canvas.check()
    return canvas.array


def expected(pairs, kind):
    """Return the network input of OpenCV and NumPy for (frame, Letterbox) pairs."""
    canvases = [box.apply(frame) for frame, box in pairs]
    return np.stack(canvases) if kind == UINT8 else to_network_input(canvases).astype(TYPES[kind])


def sizes(rng, count):
    """Return sizes of every kind: large and small, far from square, one pixel, exact multiples, the canvas size."""
    fixed = [(1, 1), (1, 300), (300, 1), (2, 2), (1, 7), CANVAS, (2 * CANVAS[0], 2 * CANVAS[1]), (48, 80), (95, 160)]
    fixed += [(3 * CANVAS[0], 3 * CANVAS[1]), (32, 160), (96, 53), (1080, 1920), (7, 1000), (1000, 7)]
    return fixed + [tuple(map(int, np.exp(rng.uniform(0, np.log(420), 2)))) for _ in range(count - len(fixed))]


@pytest.mark.parametrize("kind", TYPES)
def test_the_kernel_equals_opencv_bit_for_bit_over_hundreds_of_sizes(kernels, kind):
    rng = np.random.default_rng(kind)
    for number, hw in enumerate(sizes(rng, 150)):
        view = in_memory(noise(rng, *hw), number)
        box = fit_letterbox(hw, CANVAS)
        found = run(kernels, [frame_of(view, box)], CANVAS, kind)
        np.testing.assert_array_equal(found, expected([(view, box)], kind), err_msg=f"{hw} on {CANVAS}")


def test_canvases_of_every_size_are_filled_to_the_edge(kernels):
    rng = np.random.default_rng(5)
    for canvas_hw in [(1, 1), (1, 40), (40, 1), (31, 33), (32, 32), (33, 31), (64, 65), (640, 640)]:
        frame = noise(rng, 37, 61)
        box = fit_letterbox((37, 61), canvas_hw)
        found = run(kernels, [frame_of(frame, box)], canvas_hw, FLOAT32)
        np.testing.assert_array_equal(found, expected([(frame, box)], FLOAT32), err_msg=str(canvas_hw))


def test_a_batch_takes_frames_of_different_sizes(kernels):
    rng = np.random.default_rng(6)
    pairs = [
        (noise(rng, *hw), fit_letterbox(hw, CANVAS)) for hw in [(480, 640), (33, 17), (96, 160), (1, 1), (50, 400)]
    ]
    for kind in TYPES:
        found = run(kernels, [frame_of(*pair) for pair in pairs], CANVAS, kind)
        np.testing.assert_array_equal(found, expected(pairs, kind))


def test_the_kernel_equals_an_enlarging_evaluation_letterbox_too(kernels):
    frame = noise(np.random.default_rng(7), 60, 100)
    box = fit_evaluation_letterbox((60, 100), (128, 160), size=150)
    assert not box.shrink_by_area
    found = run(kernels, [frame_of(frame, box)], (128, 160), UINT8)
    np.testing.assert_array_equal(found, expected([(frame, box)], UINT8))


def test_sides_beyond_the_range_of_exact_floats_are_scaled_as_opencv_does(kernels):
    # 2 * 1600 * 9000 is above 2^24, where the kernel changes from float to double division.
    rng = np.random.default_rng(8)
    for hw, canvas_hw in [((9000, 3), (1600, 8)), ((3, 12001), (8, 1536)), ((2, 9000), (4, 1600))]:
        frame = noise(rng, *hw)
        stretched = fit_letterbox(canvas_hw, canvas_hw)  # stretched over the canvas: a letterbox would leave one pixel
        entry = frame_of(frame, stretched)
        resized = cv2.resize(frame, canvas_hw[::-1], interpolation=cv2.INTER_LINEAR)
        np.testing.assert_array_equal(run(kernels, [entry], canvas_hw, UINT8)[0], resized)


def test_the_pad_value_is_a_parameter(kernels):
    frame = noise(np.random.default_rng(9), 10, 100)
    box = fit_letterbox((10, 100), CANVAS)
    for pad in (0, 77, 255):
        found = run(kernels, [frame_of(frame, box)], CANVAS, UINT8, pad)[0]
        assert (found[: box.top] == pad).all()
        np.testing.assert_array_equal(found[box.top : box.top + box.resized_hw[0]], cv2.resize(frame, (160, 16)))


BAD_FIELDS = [
    {"pixels": None},
    {"height": 0},
    {"height": -5},
    {"width": 0},
    {"width": 2**31 - 1},
    {"pitch": 29},
    {"pitch": -30},
    {"pitch": 0},
    {"resized_height": 0},
    {"resized_height": CANVAS[0] + 1},
    {"resized_height": 2**31 - 1},
    {"resized_width": -1},
    {"resized_width": CANVAS[1] + 1},
    {"top": -1},
    {"top": CANVAS[0]},
    {"top": 2**31 - 1},
    {"left": -(2**31)},
    {"left": CANVAS[1] - 5},
    {"rows": 2},
]


@pytest.mark.parametrize("fields", BAD_FIELDS, ids=str)
def test_a_frame_with_a_bad_field_gives_a_grey_canvas_and_does_not_affect_others(checked_kernels, fields):
    frame = noise(np.random.default_rng(10), 10, 10)
    box = fit_letterbox((10, 10), CANVAS)
    bad = frame_of(frame, box)
    for name, value in fields.items():
        setattr(bad, name, value)
    found = run(checked_kernels, [frame_of(frame, box), bad, frame_of(frame, box)], CANVAS, UINT8)
    canvas = expected([(frame, box)], UINT8)[0]
    np.testing.assert_array_equal(found[0], canvas)
    assert (found[1] == PAD_GREY).all()
    np.testing.assert_array_equal(found[2], canvas)


@pytest.mark.parametrize(
    "fields",
    [
        {"batch": 0},
        {"batch": 65536},
        {"height": 0},
        {"width": -1},
        {"height": 2**31 - 1},
        {"type": 3},
        {"type": -1},
        {"pad": -1},
        {"pad": 256},
    ],
    ids=str,
)
def test_parameters_out_of_range_are_refused(kernels, fields):
    params = LetterboxParams(**{"batch": 1, "height": 8, "width": 8, "type": FLOAT32, "pad": 114, **fields})
    frames, canvas = (Frame * 1)(), Guarded((1, 3, 8, 8), np.float32)
    before = canvas.array.tobytes()
    status = kernels.y7_letterbox(ctypes.byref(params), ctypes.addressof(frames), canvas.address, None)
    assert status == BAD_ARGUMENT
    assert canvas.array.tobytes() == before


def test_null_and_misaligned_pointers_are_refused(kernels):
    params = LetterboxParams(batch=1, height=8, width=8, type=FLOAT32, pad=114)
    frames, canvas = (Frame * 2)(), Guarded((1, 3, 8, 8), np.float32)
    at, to, given = ctypes.addressof(frames), canvas.address, ctypes.byref(params)
    bad = [(None, at, to), (given, None, to), (given, at, None), (given, at, to + 2), (given, at + 4, to)]
    assert [kernels.y7_letterbox(*arguments, None) for arguments in bad] == [BAD_ARGUMENT] * len(bad)
    assert kernels.y7_letterbox(given, at, to, None) == OK


def test_nothing_undefined_happens_on_extreme_frames(checked_kernels):
    rng = np.random.default_rng(11)
    for hw in [(1, 1), (1, 5000), (5000, 1), (2000, 3)]:
        view = in_memory(noise(rng, *hw), 1)
        box = fit_letterbox(hw, CANVAS)
        found = run(checked_kernels, [frame_of(view, box)], CANVAS, FLOAT16)
        np.testing.assert_array_equal(found, expected([(view, box)], FLOAT16))


def test_the_order_of_threads_and_blocks_does_not_matter(kernels):
    frame = noise(np.random.default_rng(12), 50, 70)
    box = fit_letterbox((50, 70), CANVAS)
    results = set()
    for seed in range(8):
        kernels.seed(seed)
        results.add(run(kernels, [frame_of(frame, box)], CANVAS, FLOAT32).tobytes())
    assert len(results) == 1
