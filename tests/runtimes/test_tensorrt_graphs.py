"""CUDA graphs of an engine: when they are captured, what they contain, which are kept, and what runs without them."""

import ctypes
import logging
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.fakes.fake_trt_runtime import RTX
from tests.support.trt_kit import HW, assert_detected, environment, expected_boxes, infer, make_image, toy
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import DeviceError
from yolov7_deploy.image import fit_letterbox
from yolov7_deploy.options import Thresholds
from yolov7_deploy.runtimes.tensorrt_engine import MAX_FAILED_CAPTURES
from yolov7_deploy.runtimes.tensorrt_executor import MAX_GRAPHS_PER_SHAPE, MAX_SHAPES

__all__ = ["environment"]

COPY, LAUNCH, CAPTURE = "cudaMemcpyAsync", "cudaGraphLaunch", "cudaStreamBeginCapture"


def assert_detects(runtime, *images, **options):
    for found, image in zip(infer(runtime, images, **options).detections, images, strict=True):
        assert_detected(found, image)


def test_runs_of_the_same_size_become_one_graph(environment):
    runtime, calls = environment.open(), environment.calls()
    assert_detects(runtime, make_image(0))
    plain = Counter(calls())
    assert (plain[COPY], plain[LAUNCH], plain[CAPTURE]) == (2, 0, 0), "upload and download"
    assert_detects(runtime, make_image(1))
    second = Counter(calls())
    assert (second[COPY], second[LAUNCH], second[CAPTURE]) == (2, 1, 1), "captured, then launched"
    for seed in range(2, 5):
        assert_detects(runtime, make_image(seed))
        assert calls() == ["cudaGetDevice", LAUNCH, "cudaStreamSynchronize"]


def test_one_graph_serves_frames_of_every_size(environment):
    runtime, calls = environment.open(), environment.calls()
    for seed, size in enumerate([(300, 200), (50, 60), (20, 30), (64, 96), (90, 70), (48, 80), (33, 17)]):
        assert_detects(runtime, make_image(seed, *size))
    names = Counter(calls())
    assert names[CAPTURE] == 1
    assert names[LAUNCH] == 6
    assert_detects(runtime, make_image(9, 77, 55))
    assert Counter(calls())[COPY] == 1, "the upload; the download is in the graph"


@pytest.mark.parametrize(
    ("size", "copies"),
    [
        ((1500, 700), [2, 2, 0]),  # 128 rows are read, 0.3 MB: without a graph, captured, launched
        ((2000, 5000), [3, 3, 2]),  # 76 rows are read, 1.1 MB: two pieces, and only the rest is in the graph
    ],
)
def test_large_frames_are_uploaded_in_pieces_while_the_host_writes_the_rest(environment, size, copies):
    runtime, calls = environment.open(), environment.calls()
    found = []
    for colour in (30, 90, 200):
        calls()
        assert_detects(runtime, np.full((*size, 3), colour, np.uint8))
        names = Counter(calls())
        found.append(names[COPY])
        assert names[LAUNCH] == (colour > 30)
    assert found == copies


def test_each_batch_size_keeps_its_graph(environment):
    runtime, calls = environment.open(toy(None)), environment.calls()
    for _ in range(3):
        for count in (1, 2, 4):
            assert_detects(runtime, *[make_image(seed) for seed in range(count)])
    assert len(environment.trt.contexts) == 3, "one for each shape"
    calls()
    for count in (4, 1, 2, 1):
        assert_detects(runtime, *[make_image(seed + 7) for seed in range(count)])
    names = Counter(calls())
    assert (names[CAPTURE], names[LAUNCH]) == (0, 4)


def test_a_new_shape_reuses_the_context_of_the_least_recently_used_one(environment):
    runtime = environment.open(toy(None), batches=(1, 8))
    for count in (1, 2, 3, 5, 6, 7, 1, 2, 3, 8, 1, 1, 1):
        assert_detects(runtime, *[make_image(seed) for seed in range(count)])
    assert len(environment.trt.contexts) == MAX_SHAPES


def test_an_engine_with_one_context_serves_every_shape_with_it(environment):
    environment.use("8.6.2")
    environment.trt.most_contexts = 1
    runtime = environment.open(toy(None))
    for count in (1, 1, 1, 2, 2, 2, 1, 4, 1, 1):
        assert_detects(runtime, *[make_image(seed) for seed in range(count)])
    assert len(environment.trt.contexts) == 1


@pytest.mark.parametrize("version", ["8.6.2", "10.3.0", "11.1.0"])
def test_shapes_share_the_one_profile_that_another_tool_gave_an_engine(environment, version):
    environment.use(version)
    environment.trt.shares_profiles = False
    runtime = environment.open(toy(None), recorded=False)
    for count in (1, 1, 1, 2, 2, 2, 1, 4, 1, 1):
        assert_detects(runtime, *[make_image(seed) for seed in range(count)])


def test_each_context_has_its_own_profile_if_there_are_several(environment):
    environment.trt.shares_profiles, environment.trt.profiles = False, 3
    runtime, calls = environment.open(toy(None), recorded=False), environment.calls()
    for _ in range(3):
        for count in (1, 2, 4):
            assert_detects(runtime, *[make_image(seed) for seed in range(count)])
    calls()
    for count in (1, 2, 4):
        assert_detects(runtime, *[make_image(seed) for seed in range(count)])
    assert CAPTURE not in calls(), "each shape keeps its context and its graph"


def test_only_the_last_few_graphs_of_a_shape_are_kept(environment):
    runtime, calls = environment.open(), environment.calls()
    sizes = [(20 + 4 * step, 40) for step in range(2 * MAX_GRAPHS_PER_SHAPE)]
    for seed, size in enumerate(sizes):
        for _ in range(3):
            assert_detects(runtime, make_image(seed, *size))
    names = Counter(calls())
    captured = names[CAPTURE]
    assert captured > MAX_GRAPHS_PER_SHAPE
    assert names["cudaGraphExecDestroy"] == captured - MAX_GRAPHS_PER_SHAPE


def test_the_staging_buffer_grows_for_a_larger_frame(environment):
    runtime, calls = environment.open(), environment.calls()
    for seed, size in enumerate([(48, 80)] * 3 + [(200, 300)] * 3 + [(48, 80)] * 3 + [(700, 900)] * 3 + [(48, 80)] * 3):
        assert_detects(runtime, make_image(seed, *size))
    names = Counter(calls())
    assert 2 <= names["cudaHostAlloc"] == names["cudaFreeHost"] <= 4
    calls()
    assert_detects(runtime, make_image(0, 700, 900))
    assert "cudaMalloc" not in calls()


def test_thresholds_change_without_a_new_graph(environment):
    runtime, calls = environment.open(), environment.calls()
    for conf, rows in ((0.25, 3), (0.25, 3), (0.25, 3), (0.7, 1), (0.5, 2), (0.25, 3)):
        (found,) = infer(runtime, [make_image(1)], conf=conf).detections
        assert_detected(found, make_image(1), rows=rows)
    assert Counter(calls())[CAPTURE] == 1


def test_work_that_cannot_be_captured_runs_without_a_graph_and_warns_once(environment, caplog):
    runtime = environment.open(toy(None))
    environment.monkeypatch.setenv("FAKE_CUDA_FAIL", "cudaGraphInstantiateWithFlags:801")
    for seed in range(2 + MAX_FAILED_CAPTURES):
        assert_detects(runtime, make_image(seed))
    environment.monkeypatch.delenv("FAKE_CUDA_FAIL")
    calls = environment.calls()
    for _ in range(3):
        assert_detects(runtime, make_image(1), make_image(2))
    assert CAPTURE not in calls()
    (warning,) = [record for record in caplog.records if "without CUDA graphs" in record.message]
    assert warning.levelno == logging.WARNING
    assert dict(runtime.runtime_info)["CUDA graph"].startswith("off: cudaGraphInstantiateWithFlags failed")


def test_a_capture_that_another_thread_invalidated_is_repeated(environment, caplog):
    runtime, calls = environment.open(), environment.calls()
    for failures in range(1, 2 * MAX_FAILED_CAPTURES):
        size = (20 + 4 * failures, 40)
        assert_detects(runtime, make_image(0, *size))
        environment.monkeypatch.setenv("FAKE_CUDA_FAIL", "cudaStreamEndCapture:901")
        assert_detects(runtime, make_image(1, *size))
        environment.monkeypatch.delenv("FAKE_CUDA_FAIL")
        calls()
        assert_detects(runtime, make_image(2, *size))
        assert_detects(runtime, make_image(3, *size))
        assert Counter(calls())[LAUNCH] == 2
    assert dict(runtime.runtime_info)["CUDA graph"] == "on"
    assert "without CUDA graphs" not in caplog.text


def test_a_warm_up_captures_the_graph_of_frames_that_fill_the_input(environment):
    with Detector(environment.engine()) as detector:
        detector.warmup()
        calls = environment.calls()
        for seed in range(3):
            detector(make_image(seed, *HW))
    names = Counter(calls())
    assert (names[CAPTURE], names[LAUNCH]) == (0, 3)


def test_captures_and_new_contexts_take_turns_in_the_process(environment):
    first, second = environment.open(name="a.engine"), environment.open(toy(None), name="b.engine")
    inside, most = 0, 0

    def hold():
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.002)
        inside -= 1

    environment.trt.at_context = environment.trt.at_capture = hold
    work = [
        *(lambda seed=seed: assert_detects(first, make_image(seed, 20 + 4 * (seed // 2), 40)) for seed in range(16)),
        *(lambda count=count: assert_detects(second, *[make_image(5)] * count) for count in (1, 2, 3, 1, 2, 3) * 2),
    ]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda call: call(), work))
    environment.trt.at_context = environment.trt.at_capture = lambda: None
    assert most == 1


def test_a_timed_run_neither_captures_nor_launches_graphs(environment):
    runtime, calls = environment.open(), environment.calls()
    for _ in range(3):
        assert_detects(runtime, make_image(1), timed=True)
    assert not {LAUNCH, CAPTURE} & set(calls())
    assert_detects(runtime, make_image(1))
    assert_detects(runtime, make_image(2))
    assert LAUNCH in calls()


def test_tensorrt_rtx_captures_work_that_only_it_can_capture(environment):
    environment.use(RTX)
    environment.trt.records = False
    runtime, calls = environment.open(), environment.calls()
    for seed in range(4):
        assert_detects(runtime, make_image(seed))
    assert CAPTURE not in calls()
    assert dict(runtime.runtime_info)["CUDA graph"] == "inside TensorRT-RTX"
    assert environment.trt.contexts[-1].strategy == "whole"


def test_tensorrt_rtx_with_dynamic_shapes_captures_its_own_graphs(environment):
    environment.use(RTX)
    runtime, calls = environment.open(toy(None)), environment.calls()
    for seed in range(4):
        assert_detects(runtime, make_image(seed))
    assert CAPTURE not in calls()
    assert {context.strategy for context in environment.trt.contexts} == {"whole"}


def test_tensorrt_rtx_with_fixed_shapes_is_part_of_the_executors_graph(environment):
    environment.use(RTX)
    runtime, calls = environment.open(), environment.calls()
    for seed in range(4):
        assert_detects(runtime, make_image(seed))
    assert Counter(calls())[CAPTURE] == 1
    assert environment.trt.contexts[-1].strategy == "disabled"


def test_with_the_letterbox_on_the_host_whole_canvases_are_part_of_the_graph(environment):
    environment.without_kernels()
    runtime, calls = environment.open(toy(None)), environment.calls()
    for seed, size in enumerate([(48, 80), (500, 400), (20, 30), (64, 96)]):
        for found in infer(runtime, [make_image(seed, *size)]).detections:
            np.testing.assert_allclose(found.boxes, expected_boxes(make_image(seed, *size)), atol=2e-3)
    names = Counter(calls())
    assert names[CAPTURE] == 1 and names[LAUNCH] == 3


def test_a_failure_of_tensorrt_is_reported_and_passes(environment):
    runtime = environment.open()
    environment.trt.failing = True
    with pytest.raises(DeviceError, match=r"TensorRT could not run .*toy\.engine with 1 images"):
        infer(runtime, [make_image(0)])
    environment.trt.failing = False
    assert_detects(runtime, make_image(1))


# --- the work of one frame --------------------------------------------------------------------------------------------

TO_DEVICE, TO_HOST = 1, 2
MOST_PYTHON_CALLS = 88  # measured: 83 functions of the package for a frame of a video


@pytest.mark.parametrize(
    ("frame_hw", "rows"),
    [((48, 80), 48), ((64, 96), 64), ((1080, 1920), 108), ((2160, 3840), 108)],
)
def test_a_frame_uploads_the_rows_that_are_read_and_downloads_the_results(environment, frame_hw, rows):
    runtime, image = environment.open(), make_image(0, *frame_hw)
    environment.library.fake_cuda_copied.restype = ctypes.c_longlong
    for _ in range(4):
        before = [environment.library.fake_cuda_copied(kind) for kind in (TO_DEVICE, TO_HOST)]
        assert_detects(runtime, image)
        after = [environment.library.fake_cuda_copied(kind) for kind in (TO_DEVICE, TO_HOST)]
    upload, download = (end - start for start, end in zip(before, after, strict=True))
    pixels = rows * frame_hw[1] * 3
    assert pixels <= upload <= pixels + 3 * 1024, "and thresholds, the frame's record and its table of rows"
    results = 4 + 3 * 4 * 4 + 3 * 4 + 3 * 4 + 4  # num_dets, det_boxes, det_scores, det_classes, overflow
    assert results <= download <= results + 5 * 256, "each output starts at a multiple of 256 bytes"


def test_an_integrated_gpu_reads_frames_where_they_are(environment):
    """Only thresholds and the frame's record are uploaded; an array with gaps between its pixels is staged."""
    environment.monkeypatch.setenv("FAKE_CUDA_HOST", "1")
    environment.library.fake_cuda_copied.restype = ctypes.c_longlong
    runtime, sizes = environment.open(toy(None)), [(48, 80), (480, 640), (300, 200)]
    for number in range(9):
        images = [make_image(number + shift, *sizes[(number + shift) % 3]) for shift in range(1 + number % 3)]
        before = environment.library.fake_cuda_copied(TO_DEVICE)
        assert_detects(runtime, *images)
        assert environment.library.fake_cuda_copied(TO_DEVICE) - before < 2048
    wide, pixels = np.zeros((48, 200, 3), np.uint8), make_image(1)
    wide[:, 60:140] = pixels
    before = environment.library.fake_cuda_copied(TO_DEVICE)
    assert_detects(runtime, wide[:, 60:140])
    assert environment.library.fake_cuda_copied(TO_DEVICE) - before < 2048, "rows may have a pitch"
    assert_detects(runtime, np.asfortranarray(pixels))
    assert environment.library.fake_cuda_copied(TO_DEVICE) - before > pixels.nbytes
    timed = infer(runtime, [pixels], timed=True)
    assert_detected(timed.detections[0], pixels)


def test_a_frame_of_a_video_costs_three_calls_of_cuda_and_few_of_python(environment):
    runtime, calls, count = environment.open(), environment.calls(), 0

    def profile(frame, event, _):
        nonlocal count
        count += (
            event == "call" and "yolov7_deploy" in frame.f_code.co_filename and "fakes" not in frame.f_code.co_filename
        )

    images = [make_image(seed) for seed in range(6)]
    letterbox = fit_letterbox(images[0].shape[:2], HW)
    for image in images[:5]:
        runtime.infer([image], [letterbox], Thresholds(conf=0.25, max_det=100, multi_label=True))
    calls()
    sys.setprofile(profile)
    try:
        runtime.infer(images[5:], [letterbox], Thresholds(conf=0.25, max_det=100, multi_label=True))
    finally:
        sys.setprofile(None)
    assert calls() == ["cudaGetDevice", LAUNCH, "cudaStreamSynchronize"]
    assert count <= MOST_PYTHON_CALLS, count
