"""The binding of the letterbox kernel: libraries that it accepts, frames, and rows that are not uploaded."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import threading
from dataclasses import replace

import cv2
import numpy as np
import pytest

from tests.fakes.emulated_kernels import SOURCES, Guarded, compile_described
from yolov7_deploy.errors import DeviceError, PluginError
from yolov7_deploy.image import PAD_GREY, fit_evaluation_letterbox, fit_letterbox, to_network_input
from yolov7_deploy.runtimes.letterbox_kernel import (
    FRAME,
    MAX_ROW_SHARE,
    Kernels,
    find_kernels,
    frame_of,
    plan_rows,
    row_plan,
)
from yolov7_deploy.tensorrt import plugin_library as plugins
from yolov7_deploy.tensorrt.plugin_library import KERNELS_ABI, PLUGIN_VARIABLE, built_path

CANVAS = (96, 160)
BATCH = 64


@pytest.fixture(scope="module")
def library():
    """Path of a library with the emulated kernels."""
    return compile_described("letterbox.cu")


@pytest.fixture(scope="module")
def kernels(library):
    return Kernels.open(library)


@pytest.fixture
def nothing_built(monkeypatch, tmp_path):
    """Hide all built libraries, and use an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(PLUGIN_VARIABLE, raising=False)
    monkeypatch.setattr(plugins, "SYSTEM_FOLDERS", (tmp_path / "system",))


def compiled(source, folder):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    (folder / "library.cpp").write_text(source, encoding="utf-8")
    subprocess.run(
        ["g++", "-shared", "-fPIC", f"-I{SOURCES}", "-o", folder / "library.so", folder / "library.cpp"], check=True
    )
    return folder / "library.so"


def run(kernels, frames, canvas_hw, dtype=np.uint8):
    """Return the kernel's canvases for FRAME records."""
    entries = Guarded.of(np.array(frames, FRAME))
    shape = (len(frames), *canvas_hw, 3) if dtype == np.uint8 else (len(frames), 3, *canvas_hw)
    canvas = Guarded(shape, dtype)
    kernels.letterbox(
        batch=len(frames), canvas_hw=canvas_hw, dtype=dtype, frames=entries.address, canvas=canvas.address, stream=0
    )
    canvas.check()
    return canvas.array


def noise(seed, height, width):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# --- opening --------------------------------------------------------------------------------------------------------


def test_a_missing_library_is_refused(tmp_path):
    with pytest.raises(PluginError, match="does not exist"):
        Kernels.open(tmp_path / "absent.so")


def test_a_damaged_library_is_refused_without_a_crash(library, tmp_path):
    content = library.read_bytes()
    for length in (0, 3, 64, len(content) // 2, len(content) - 1):
        (tmp_path / "damaged.so").write_bytes(content[:length])
        with pytest.raises(PluginError, match="is not a usable plugin library"):
            Kernels.open(tmp_path / "damaged.so")


def test_a_library_of_another_project_is_refused(tmp_path):
    with pytest.raises(PluginError, match="it is another library"):
        Kernels.open(compiled("int y7_letterbox() { return 0; }", tmp_path))


def description_source(kernels_abi):
    return (
        r'extern "C" const char* y7_plugin_description() { return "{\"name\": \"Y7NMS\", \"abi\": \"kernels\", '
        r"\"version\": \"1\", \"compute_capabilities\": [86], \"exact\": [], \"ptx\": [], \"cuda\": \"13.0\", "
        rf'\"headers\": \"\", \"kernels_abi\": {kernels_abi}}}"; }}'
    )


def test_kernels_of_another_version_are_refused_with_both_numbers_and_the_command(tmp_path):
    with pytest.raises(PluginError, match=f"has kernels 1; .* needs kernels {KERNELS_ABI}") as caught:
        Kernels.open(compiled(description_source(1), tmp_path))
    assert caught.value.fix.endswith("y7 plugin")


def test_a_library_without_the_functions_it_describes_is_refused(tmp_path):
    with pytest.raises(PluginError, match="y7_letterbox"):
        Kernels.open(compiled(description_source(KERNELS_ABI), tmp_path))


def test_kernels_are_found_for_the_gpus_that_they_run_on(library, nothing_built):
    assert find_kernels((8, 6)) is None, "nothing is built"
    built_path("kernels").parent.mkdir(parents=True)
    shutil.copy(library, built_path("kernels"))
    assert find_kernels((8, 6)).path == built_path("kernels")
    assert find_kernels((12, 0)).path == built_path("kernels"), "the driver compiles its PTX"
    assert find_kernels((7, 5)) is None
    built_path("kernels").unlink()  # a new file of the same name: the old one is still loaded in this process
    built_path("kernels").write_bytes(library.read_bytes()[:-1])
    with pytest.raises(PluginError, match="is not a usable plugin library"):
        find_kernels((8, 6))


# --- calling --------------------------------------------------------------------------------------------------------


def test_a_frame_record_equals_the_struct_of_the_header_byte_for_byte(tmp_path):
    names = ", ".join(f"offsetof(Y7Frame, {name}), sizeof(Y7Frame::{name})" for name in FRAME.names)
    source = f'#include "kernels.h"\nextern "C" const size_t layout[] = {{{names}, sizeof(Y7Frame)}};\n'
    layout = (ctypes.c_size_t * (2 * len(FRAME.names) + 1)).in_dll(
        ctypes.CDLL(str(compiled(source, tmp_path))), "layout"
    )
    fields = [FRAME.fields[name] for name in FRAME.names]
    assert list(layout) == [number for kind, offset in fields for number in (offset, kind.itemsize)] + [FRAME.itemsize]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint8])
def test_a_batch_equals_opencv_bit_for_bit(kernels, dtype):
    images = [noise(seed, *hw) for seed, hw in enumerate([(48, 80), (200, 33), (1, 1), (288, 480)])]
    boxes = [fit_letterbox(image.shape[:2], CANVAS) for image in images]
    frames = [
        frame_of(box, pixels=image.ctypes.data, pitch=image.strides[0])
        for image, box in zip(images, boxes, strict=True)
    ]
    canvases = [box.apply(image) for image, box in zip(images, boxes, strict=True)]
    expected = np.stack(canvases) if dtype == np.uint8 else to_network_input(canvases).astype(dtype)
    np.testing.assert_array_equal(run(kernels, frames, CANVAS, dtype), expected)


@pytest.mark.parametrize(
    "wrong",
    [{"batch": 0}, {"batch": 65536}, {"canvas_hw": (8, -1)}, {"frames": 0}, {"canvas": 0}, {"frames": 4}],
    ids=str,
)
def test_a_refused_call_quotes_the_library(kernels, wrong):
    good = {"batch": 1, "canvas_hw": (8, 8), "dtype": np.float32, "frames": 64, "canvas": 64, "stream": 0}
    with pytest.raises(DeviceError, match="an argument is out of range, null or misaligned") as caught:
        kernels.letterbox(**{**good, **wrong})
    assert caught.value.fix.startswith("y7 doctor")


def test_threads_may_call_at_once(kernels):
    images = [noise(seed, 60 + seed, 90) for seed in range(4)]
    boxes = [fit_letterbox(image.shape[:2], CANVAS) for image in images]
    equal = []

    def work(image, box):
        frames = [frame_of(box, pixels=image.ctypes.data, pitch=image.strides[0])] * 4
        expected = np.stack([box.apply(image)] * 4)
        equal.extend((run(kernels, frames, CANVAS) == expected).all() for _ in range(10))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(images, boxes, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * 40


def test_a_letterbox_that_shrinks_by_area_is_refused():
    box = fit_evaluation_letterbox((60, 100), (64, 64), size=64)
    assert box.shrink_by_area
    assert row_plan(box) is None
    with pytest.raises(ValueError, match="by area"):
        frame_of(box, pixels=64, pitch=300)


# --- Rows that are not uploaded -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hw", "rows"),
    [
        ((1080, 1920), list(range(1, 1080, 3))),
        ((2160, 3840), [row for first in range(2, 2160, 6) for row in (first, first + 1)]),
        ((3240, 5760), list(range(4, 3240, 9))),
    ],
)
def test_integer_ratios_need_a_third_of_the_rows_or_less(hw, rows):
    plan = row_plan(fit_letterbox(hw, (640, 640)))
    assert plan.rows.tolist() == rows
    assert plan.rows.dtype == plan.table.dtype == np.int32
    assert plan.table.shape == (360, 2)


@pytest.mark.parametrize("hw", [(720, 1280), (480, 640), (640, 640), (100, 100), (1080, 1440)])
def test_a_frame_that_needs_most_of_its_rows_is_uploaded_completely(hw):
    box = fit_letterbox(hw, (640, 640))
    assert row_plan(box) is None
    assert len(plan_rows(hw[0], box.resized_hw[0]).rows) > MAX_ROW_SHARE * hw[0]


def test_a_plan_is_cached_and_read_only():
    plan = plan_rows(1080, 360)
    assert plan_rows(1080, 360) is plan
    for array in (plan.rows, plan.table):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def pairs():
    """Return thousands of (source, resized) heights: small, of videos, random, and beyond exact floats."""
    rng = np.random.default_rng(3)
    small = [(source, resized) for source in range(1, 49) for resized in range(1, 49)]
    video = [(source, resized) for source in (240, 480, 576, 720, 1080, 1440, 2160) for resized in (240, 360, 384)]
    drawn = np.exp(rng.uniform(0, np.log([4000, 400]), (700, 2))).astype(int)
    far = [(9000, 1600), (12001, 1536), (16384, 1537), (20000, 999), (30001, 640)]
    return [*small, *video, *((int(source), int(resized)) for source, resized in drawn), *far]


def test_the_rows_of_a_plan_are_those_that_the_kernel_reads(kernels):
    """The width stays three columns, so that only rows are scaled; rows of noise differ from their neighbours."""
    tested = sorted(pairs(), key=lambda pair: pair[1])
    for start in range(0, len(tested), BATCH):
        part = tested[start : start + BATCH]
        canvas_hw = (part[-1][1], 3)
        frames, kept, expected = [], [], np.full((len(part), *canvas_hw, 3), PAD_GREY, np.uint8)
        for number, (source, resized) in enumerate(part):
            image, plan = noise(number, source, 3), plan_rows(source, resized)
            assert (np.unique(plan.table) == np.arange(len(plan.rows))).all(), (source, resized)
            kept.append(image[plan.rows])
            box = replace(fit_letterbox((source, 3), canvas_hw), resized_hw=(resized, 3), top=0, left=0)
            at = {"pixels": kept[-1].ctypes.data, "pitch": 9, "rows": plan.table.ctypes.data}
            frames.append(frame_of(box, **at))
            expected[number, :resized] = cv2.resize(image, (3, resized), interpolation=cv2.INTER_LINEAR)
        found = run(kernels, frames, canvas_hw)
        assert [pair for pair, one, other in zip(part, found, expected, strict=True) if (one != other).any()] == []


@pytest.mark.parametrize("hw", [(1080, 1920), (2160, 3840), (1440, 2560), (1080, 810)])
def test_gathered_rows_give_the_canvas_of_the_complete_frame(kernels, hw):
    """The canvas is smaller than usual, with padding, and the gathered rows have another pitch."""
    image = noise(1, *hw)
    box = fit_letterbox(hw, CANVAS)
    plan = row_plan(box)
    staged = np.full((len(plan.rows), hw[1] + 5, 3), 0xEE, np.uint8)
    staged[:, : hw[1]] = image[plan.rows]
    frame = frame_of(box, pixels=staged.ctypes.data, pitch=staged.strides[0], rows=plan.table.ctypes.data)
    np.testing.assert_array_equal(run(kernels, [frame], CANVAS)[0], box.apply(image))
