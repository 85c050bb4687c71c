"""The PyTorch runtime: precision, captured graphs against eager execution, stages of a call, and out of memory."""

import copy
import gc
import logging
import threading
import time
import weakref

import numpy as np
import pytest
import torch

from tests.runtimes.test_pytorch_network import FP16_BOX_PX, FP16_SCORE, without_graph
from tests.support.sample_images import CONF, IMAGES, assert_same
from tests.support.small_models import HW, fused_tiny, metadata_of
from yolov7_deploy.detections import Detections
from yolov7_deploy.errors import DeviceError, UsageError
from yolov7_deploy.image import fit_letterbox, to_network_input
from yolov7_deploy.options import Thresholds
from yolov7_deploy.postprocess import RawDetections
from yolov7_deploy.runtimes.base import open_runtime
from yolov7_deploy.runtimes.pytorch import MAX_GRAPHS, PytorchRuntime
from yolov7_deploy.runtimes.pytorch_network import TorchNetwork, capture_graph, select_candidates

THRESHOLDS = Thresholds(conf=CONF)
SLEEP_S = 0.1
# Share of the detections in one precision that have a match in the other; the rest are close to a threshold. 1 of 616
# had none.
FP16_MATCHED = 0.95

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch does not find a GPU")


def open_model(**options):
    model = copy.deepcopy(fused_tiny())
    return PytorchRuntime(model, metadata_of(model), **options)


def infer(runtime, images, thresholds=THRESHOLDS, *, timed=False, hw=HW):
    letterboxes = [fit_letterbox(image.shape[:2], hw) for image in images]
    return runtime.infer(images, letterboxes, thresholds, timed=timed)


def as_detections(found):
    return Detections(
        boxes=found.boxes,
        scores=found.scores,
        class_ids=found.class_ids,
        class_names=metadata_of(fused_tiny()).class_names,
        image_hw=HW,
    )


def assert_alike(ours, expected):
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        assert len(b.scores) > 0
        assert_same(as_detections(a), as_detections(b))


# --- what runs ----------------------------------------------------------------------------------------------------


def test_a_cpu_runs_fp32_and_reports_it():
    runtime = open_model()
    assert (runtime.device, runtime.metadata.precision) == ("cpu", "fp32")
    assert dict(runtime.runtime_info)["memory layout"] == "channels last"
    assert "CUDA graph" not in dict(runtime.runtime_info)


def test_fp16_on_a_cpu_is_refused_with_a_fix(files):
    with pytest.raises(UsageError, match="FP16 needs a GPU") as caught:
        open_runtime(files(), device="cpu", input_hw=HW, half=True)
    assert "--no-half" in caught.value.fix
    assert open_runtime(files(), device="cpu", input_hw=HW, half=False).metadata.precision == "fp32"


@pytest.mark.parametrize("multi_label", [False, True])
def test_captured_graphs_detect_what_eager_execution_detects(multi_label):
    thresholds = Thresholds(conf=CONF, multi_label=multi_label)
    eager, captured = open_model(), open_model(capture=without_graph)
    for images in (IMAGES[:1], IMAGES):
        assert_alike(infer(captured, images, thresholds).detections, infer(eager, images, thresholds).detections)


def test_fp16_in_captured_graphs_is_reported_and_detects_nearly_the_same():
    fp32, fp16 = open_model(), open_model(half=True, capture=without_graph)
    assert fp16.metadata.precision == "fp16"
    assert_close_boxes(infer(fp16, IMAGES).detections, infer(fp32, IMAGES).detections)


def assert_close_boxes(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        assert matched(a, b) >= FP16_MATCHED and matched(b, a) >= FP16_MATCHED


def matched(a: RawDetections, b: RawDetections):
    """Return the share of `a` that has a match in `b`."""
    same = (
        (a.class_ids[:, None] == b.class_ids[None])
        & (np.abs(a.scores[:, None] - b.scores[None]) <= FP16_SCORE)
        & (np.abs(a.boxes[:, None] - b.boxes[None]) <= FP16_BOX_PX).all(-1)
    )
    return same.any(1).mean()


def test_stages_are_float32_in_every_precision():
    canvas = IMAGES[0]
    fp32, fp16 = open_model().stages(canvas), open_model(half=True).stages(canvas)
    assert {x.dtype for x in (*fp16.heads, fp16.decoded)} == {np.dtype(np.float32)}
    assert np.abs(fp32.decoded[:, 4:] - fp16.decoded[:, 4:]).max() < FP16_SCORE
    expected = fused_tiny().predict(torch.from_numpy(to_network_input([canvas]))).numpy()[0]
    np.testing.assert_allclose(fp32.decoded, expected, rtol=1e-4, atol=1e-3)


def test_a_failed_capture_does_not_change_results(caplog):
    def fail_to_capture(forward):
        raise RuntimeError("capture is not supported")

    runtime = open_model(capture=fail_to_capture)
    with caplog.at_level(logging.WARNING):
        assert dict(runtime.runtime_info)["CUDA graph"] == "on"
        for images in (IMAGES[:1], IMAGES[:2]):
            assert_alike(infer(runtime, images).detections, infer(open_model(), images).detections)
    assert len(caplog.records) == 1
    assert dict(runtime.runtime_info)["CUDA graph"] == "failed"


# --- timing -------------------------------------------------------------------------------------------------------


def slow(forward):
    def run():
        time.sleep(SLEEP_S)
        return forward()

    return run


def test_engine_ms_is_the_network_and_inference_ms_includes_the_transfers():
    runtime = open_model(capture=slow)
    infer(runtime, IMAGES[:1])
    outputs = infer(runtime, IMAGES[:1], timed=True)
    timing = outputs.timing
    assert timing.engine_ms >= SLEEP_S * 1e3
    assert min(timing.preprocess_ms, timing.upload_ms, timing.download_ms, timing.postprocess_ms) > 0
    assert outputs.inference_ms == timing.upload_ms + timing.engine_ms + timing.download_ms
    assert infer(runtime, IMAGES[:1]).timing is None


def test_nothing_is_uploaded_or_downloaded_on_a_cpu():
    outputs = infer(open_model(), IMAGES[:2])
    assert (outputs.timing.upload_ms, outputs.timing.download_ms) == (0, 0)
    assert outputs.inference_ms == outputs.timing.engine_ms > 0
    assert outputs.preprocess_ms > 0 and outputs.postprocess_ms > 0


# --- memory -------------------------------------------------------------------------------------------------------


def test_out_of_memory_is_explained_and_the_next_call_works():
    short = [True]

    def capture(forward):
        def run():
            if short:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nLong advice")
            return forward()

        return run

    runtime = open_model(capture=capture)
    with pytest.raises(DeviceError) as caught:
        infer(runtime, IMAGES[:2])
    assert "2 images of 128x192 need more memory than cpu has: CUDA out of memory" in caught.value.message
    assert "advice" not in caught.value.message and "--batch" in caught.value.fix
    short.clear()
    assert_alike(infer(runtime, IMAGES[:2]).detections, infer(open_model(), IMAGES[:2]).detections)


def test_idle_graphs_of_other_sizes_are_freed_before_a_call_fails():
    calls = []

    def capture(forward):
        def run():
            calls.append(len(calls))
            if len(calls) == 2:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return forward()

        return run

    runtime = open_model(capture=capture)
    infer(runtime, IMAGES[:1])
    assert_alike(infer(runtime, IMAGES[:2]).detections, infer(open_model(), IMAGES[:2]).detections)
    assert len(calls) == 3


def test_a_failed_call_holds_no_tensors_when_idle_graphs_are_freed():
    """The traceback of torch's exception keeps tensors alive: their memory could not be freed."""
    held = []

    def capture(forward):
        def run():
            tensor = forward()
            held.append(weakref.ref(tensor))
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

        return run

    runtime = open_model(capture=capture)
    free_idle = runtime._free_idle_graphs

    def checked_free_idle():
        assert held[-1]() is None
        return free_idle()

    runtime._free_idle_graphs = checked_free_idle
    with pytest.raises(DeviceError):
        infer(runtime, IMAGES[:1])
    assert len(held) == 1


def test_errors_other_than_out_of_memory_are_not_changed():
    def capture(forward):
        def run():
            raise RuntimeError("shapes cannot be multiplied")

        return run

    with pytest.raises(RuntimeError, match="shapes"):
        infer(open_model(capture=capture), IMAGES[:1])


def test_closing_twice_is_fine():
    runtime = open_model(capture=without_graph)
    infer(runtime, IMAGES[:1])
    runtime.close()
    runtime.close()


@pytest.mark.parametrize("capture", [None, without_graph])
def test_closing_frees_the_network_and_later_calls_are_refused(capture):
    runtime = open_model(capture=capture)
    infer(runtime, IMAGES[:1])
    network = weakref.ref(runtime._network)
    runtime.close()
    gc.collect()
    assert network() is None
    with pytest.raises(UsageError, match="closed"):
        infer(runtime, IMAGES[:1])


# --- with a GPU ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graphed():
    runtime = open_model(device="cuda")
    yield runtime
    runtime.close()


@on_gpu
@pytest.mark.gpu
def test_a_gpu_runs_fp16_in_graphs(graphed):
    infer(graphed, IMAGES[:1])
    assert (graphed.device, graphed.metadata.precision) == ("cuda:0", "fp16")
    assert dict(graphed.runtime_info)["CUDA graph"] == "on"


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True])
def test_a_graph_changes_no_bit(half):
    graph, eager = open_model(device="cuda", half=half), open_model(device="cuda", half=half, capture=without_graph)
    for images in (IMAGES[:1], IMAGES, IMAGES[1:2]):
        for a, b in zip(infer(graph, images).detections, infer(eager, images).detections, strict=True):
            assert len(a.scores) > 0
            np.testing.assert_array_equal(a.boxes, b.boxes)
            np.testing.assert_array_equal(a.scores, b.scores)
            np.testing.assert_array_equal(a.class_ids, b.class_ids)


@on_gpu
@pytest.mark.gpu
def test_a_gpu_prepares_inputs_and_selects_candidates_as_the_host_does():
    net = TorchNetwork(copy.deepcopy(fused_tiny()), torch.device("cuda"), half=False)
    canvas = np.arange(np.prod(HW) * 3, dtype=np.uint8).reshape(*HW, 3)
    images = net.prepare(torch.from_numpy(canvas)[None].cuda(), net.empty_input(1, HW))
    np.testing.assert_array_equal(images.cpu().numpy(), to_network_input([canvas]))
    decoded = net.predict(images)
    for ours, expected in zip(select_candidates(decoded, CONF), select_candidates(decoded.cpu(), CONF), strict=True):
        assert torch.equal(ours.cpu(), expected)


@on_gpu
@pytest.mark.gpu
def test_threads_on_a_gpu_get_each_their_own_result(graphed):
    expected = [infer(graphed, [image]).detections[0] for image in IMAGES]
    wrong = []

    def call(number):
        for repetition in range(20):
            index = (number + repetition) % len(IMAGES)
            found = infer(graphed, [IMAGES[index]]).detections[0]
            if not np.array_equal(found.boxes, expected[index].boxes):
                wrong.append(index)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(2 * MAX_GRAPHS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not wrong and not any(thread.is_alive() for thread in threads)


@on_gpu
@pytest.mark.gpu
def test_fp16_on_a_gpu_detects_nearly_what_fp32_on_a_cpu_detects(graphed):
    assert_close_boxes(infer(graphed, IMAGES).detections, infer(open_model(), IMAGES).detections)


@on_gpu
@pytest.mark.gpu
def test_a_gpu_without_memory_is_explained_and_works_again(graphed):
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        with pytest.raises(DeviceError, match="need more memory than cuda:0 has"):
            infer(graphed, IMAGES[:1] * 64)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(infer(graphed, IMAGES[:1]).detections[0].scores) > 0


@on_gpu
@pytest.mark.gpu
def test_a_replay_runs_no_python():
    forwards = []

    def forward():
        forwards.append(1)
        return number * 2

    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
        number = torch.ones(1, device="cuda")
        replay = capture_graph(forward)
        captured = len(forwards)
        number.fill_(21)
        assert replay().item() == 42 and len(forwards) == captured
