"""The torch backend: precision, lanes against the plain path, spans and what happens without memory."""

import copy
import logging
import threading
import time
import weakref

import numpy as np
import pytest
import torch

from tests.runtimes.test_torch_cuda_graphs import HALF_BOX_PX, HALF_SCORE, as_it_is
from tests.support.sample_images import CONF, IMAGES, assert_same
from tests.support.small_models import HW, fused_tiny, metadata_of
from yolov7_deploy.detections import Detections
from yolov7_deploy.errors import DeviceError, UsageError
from yolov7_deploy.image import fit_letterbox, to_network_input
from yolov7_deploy.options import Thresholds
from yolov7_deploy.runtimes.base import RawDetections, open_backend
from yolov7_deploy.runtimes.pytorch import MOST_LANES, PytorchBackend
from yolov7_deploy.runtimes.torch_cuda_graphs import capture_graph
from yolov7_deploy.runtimes.torch_network import TorchNetwork, candidates

THRESHOLDS = Thresholds(conf=CONF)
SLEEP_S = 0.1
# So many detections of one precision have a partner in the other; the rest sit on a threshold. 1 of 616 had none.
HALF_MATCHED = 0.95

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")


def backend(**options):
    model = copy.deepcopy(fused_tiny())
    return PytorchBackend(model, metadata_of(model), **options)


def infer(runner, images, thresholds=THRESHOLDS, *, timed=False, hw=HW):
    letterboxes = [fit_letterbox(image.shape[:2], hw) for image in images]
    return runner.infer(images, letterboxes, thresholds, timed=timed)


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


def test_a_cpu_runs_float32_and_says_so():
    runner = backend()
    assert (runner.device, runner.metadata.precision) == ("cpu", "fp32")
    assert dict(runner.runtime_info)["memory layout"] == "channels last"
    assert "CUDA graph" not in dict(runner.runtime_info)


def test_half_on_a_cpu_is_refused_with_the_way_out(files):
    with pytest.raises(UsageError, match="Half precision needs a GPU") as caught:
        open_backend(files(), device="cpu", input_hw=HW, half=True)
    assert "--no-half" in caught.value.fix
    assert open_backend(files(), device="cpu", input_hw=HW, half=False).metadata.precision == "fp32"


@pytest.mark.parametrize("multi_label", [False, True])
def test_lanes_find_what_the_plain_path_finds(multi_label):
    thresholds = Thresholds(conf=CONF, multi_label=multi_label)
    plain, lanes = backend(), backend(capture=as_it_is)
    for images in (IMAGES[:1], IMAGES):
        assert_alike(infer(lanes, images, thresholds).found, infer(plain, images, thresholds).found)


def test_half_in_lanes_is_told_and_finds_nearly_the_same():
    whole, half = backend(), backend(half=True, capture=as_it_is)
    assert half.metadata.precision == "fp16"
    assert_close_boxes(infer(half, IMAGES).found, infer(whole, IMAGES).found)


def assert_close_boxes(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        assert matched(a, b) >= HALF_MATCHED and matched(b, a) >= HALF_MATCHED


def matched(a: RawDetections, b: RawDetections):
    """Part of `a` that has a partner in `b`."""
    same = (
        (a.class_ids[:, None] == b.class_ids[None])
        & (np.abs(a.scores[:, None] - b.scores[None]) <= HALF_SCORE)
        & (np.abs(a.boxes[:, None] - b.boxes[None]) <= HALF_BOX_PX).all(-1)
    )
    return same.any(1).mean()


def test_stages_are_float32_in_every_precision():
    canvas = IMAGES[0]
    whole, half = backend().stages(canvas), backend(half=True).stages(canvas)
    assert {x.dtype for x in (*half.heads, half.decoded)} == {np.dtype(np.float32)}
    assert np.abs(whole.decoded[:, 4:] - half.decoded[:, 4:]).max() < HALF_SCORE
    expected = fused_tiny().predict(torch.from_numpy(to_network_input([canvas]))).numpy()[0]
    np.testing.assert_allclose(whole.decoded, expected, rtol=1e-4, atol=1e-3)


def test_a_graph_that_cannot_be_made_leaves_results_as_they_are(caplog):
    def refuse(forward):
        raise RuntimeError("capture is not supported")

    runner = backend(capture=refuse)
    with caplog.at_level(logging.WARNING):
        assert dict(runner.runtime_info)["CUDA graph"] == "on"
        for images in (IMAGES[:1], IMAGES[:2]):
            assert_alike(infer(runner, images).found, infer(backend(), images).found)
    assert len(caplog.records) == 1
    assert dict(runner.runtime_info)["CUDA graph"] == "failed"


# --- spans --------------------------------------------------------------------------------------------------------


def slow(forward):
    def run():
        time.sleep(SLEEP_S)
        return forward()

    return run


def test_the_engine_span_is_the_network_and_inference_what_lies_around_it():
    runner = backend(capture=slow)
    infer(runner, IMAGES[:1])
    outputs = infer(runner, IMAGES[:1], timed=True)
    spans = outputs.spans
    assert spans.engine_ms >= SLEEP_S * 1e3
    assert min(spans.preprocess_ms, spans.upload_ms, spans.download_ms, spans.postprocess_ms) > 0
    assert outputs.inference_ms == spans.upload_ms + spans.engine_ms + spans.download_ms
    assert infer(runner, IMAGES[:1]).spans is None


def test_nothing_is_uploaded_or_downloaded_on_a_cpu():
    outputs = infer(backend(), IMAGES[:2])
    assert (outputs.spans.upload_ms, outputs.spans.download_ms) == (0, 0)
    assert outputs.inference_ms == outputs.spans.engine_ms > 0
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

    runner = backend(capture=capture)
    with pytest.raises(DeviceError) as caught:
        infer(runner, IMAGES[:2])
    assert "2 images of 128x192 need more memory than cpu has: CUDA out of memory" in caught.value.message
    assert "advice" not in caught.value.message and "--batch" in caught.value.fix
    short.clear()
    assert_alike(infer(runner, IMAGES[:2]).found, infer(backend(), IMAGES[:2]).found)


def test_lanes_of_other_sizes_make_room_before_a_call_fails():
    calls = []

    def capture(forward):
        def run():
            calls.append(len(calls))
            if len(calls) == 2:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return forward()

        return run

    runner = backend(capture=capture)
    infer(runner, IMAGES[:1])
    assert_alike(infer(runner, IMAGES[:2]).found, infer(backend(), IMAGES[:2]).found)
    assert len(calls) == 3


def test_a_failed_call_holds_no_tensors_when_memory_is_given_back():
    """The exception of torch and its frames must be gone by then, or there is nothing to give back."""
    held = []

    def capture(forward):
        def run():
            tensor = forward()
            held.append(weakref.ref(tensor))
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

        return run

    runner = backend(capture=capture)
    give_up = runner._give_up_lanes

    def giving_up():
        assert held[-1]() is None
        return give_up()

    runner._give_up_lanes = giving_up
    with pytest.raises(DeviceError):
        infer(runner, IMAGES[:1])
    assert len(held) == 1


def test_errors_that_are_no_lack_of_memory_stay_what_they_are():
    def capture(forward):
        def run():
            raise RuntimeError("shapes cannot be multiplied")

        return run

    with pytest.raises(RuntimeError, match="shapes"):
        infer(backend(capture=capture), IMAGES[:1])


def test_closing_twice_is_fine():
    runner = backend(capture=as_it_is)
    infer(runner, IMAGES[:1])
    runner.close()
    runner.close()


# --- with a GPU ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graphed():
    runner = backend(device="cuda")
    yield runner
    runner.close()


@on_gpu
@pytest.mark.gpu
def test_a_gpu_runs_half_in_graphs(graphed):
    infer(graphed, IMAGES[:1])
    assert (graphed.device, graphed.metadata.precision) == ("cuda:0", "fp16")
    assert dict(graphed.runtime_info)["CUDA graph"] == "on"


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True])
def test_a_graph_changes_no_bit(half):
    graph, eager = backend(device="cuda", half=half), backend(device="cuda", half=half, capture=as_it_is)
    for images in (IMAGES[:1], IMAGES, IMAGES[1:2]):
        for a, b in zip(infer(graph, images).found, infer(eager, images).found, strict=True):
            assert len(a.scores) > 0
            np.testing.assert_array_equal(a.boxes, b.boxes)
            np.testing.assert_array_equal(a.scores, b.scores)
            np.testing.assert_array_equal(a.class_ids, b.class_ids)


@on_gpu
@pytest.mark.gpu
def test_a_gpu_prepares_and_chooses_as_the_host_does():
    net = TorchNetwork(copy.deepcopy(fused_tiny()), torch.device("cuda"), half=False)
    canvas = np.arange(np.prod(HW) * 3, dtype=np.uint8).reshape(*HW, 3)
    images = net.prepare(torch.from_numpy(canvas)[None].cuda(), net.empty_input(1, HW))
    np.testing.assert_array_equal(images.cpu().numpy(), to_network_input([canvas]))
    decoded = net.predict(images)
    for ours, expected in zip(candidates(decoded, CONF), candidates(decoded.cpu(), CONF), strict=True):
        assert torch.equal(ours.cpu(), expected)


@on_gpu
@pytest.mark.gpu
def test_threads_on_a_gpu_get_each_their_own_result(graphed):
    expected = [infer(graphed, [image]).found[0] for image in IMAGES]
    wrong = []

    def call(number):
        for turn in range(20):
            which = (number + turn) % len(IMAGES)
            found = infer(graphed, [IMAGES[which]]).found[0]
            if not np.array_equal(found.boxes, expected[which].boxes):
                wrong.append(which)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(2 * MOST_LANES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not wrong and not any(thread.is_alive() for thread in threads)


@on_gpu
@pytest.mark.gpu
def test_half_on_a_gpu_finds_nearly_what_float32_on_a_cpu_finds(graphed):
    assert_close_boxes(infer(graphed, IMAGES).found, infer(backend(), IMAGES).found)


@on_gpu
@pytest.mark.gpu
def test_a_gpu_without_memory_is_explained_and_works_again(graphed):
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        with pytest.raises(DeviceError, match="need more memory than cuda:0 has"):
            infer(graphed, IMAGES[:1] * 64)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(infer(graphed, IMAGES[:1]).found[0].scores) > 0


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
