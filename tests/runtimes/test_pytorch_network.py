"""The PyTorch network, the candidates among its outputs, and captured graphs, on a CPU with fakes for CUDA graphs."""

import copy
import logging
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.sample_images import IMAGES
from tests.support.small_models import HW, fused_tiny
from yolov7_deploy.errors import is_out_of_memory
from yolov7_deploy.image import fit_letterbox, to_network_input
from yolov7_deploy.options import Thresholds
from yolov7_deploy.postprocess import postprocess
from yolov7_deploy.runtimes.pytorch_network import (
    CapturedGraph,
    CapturedGraphPool,
    GraphCapturer,
    TorchNetwork,
    select_candidates,
    split_by_image,
)

CPU = torch.device("cpu")
# FP16 has 11 bits. With these weights, whose boxes are up to 1420 pixels wide, 0.0030 and 3.9 pixels were measured.
# Another CPU adds up in another order, so the limits are three times as large.
FP16_SCORE, FP16_BOX_PX = 0.01, 12
CANVASES = [fit_letterbox(image.shape[:2], HW).apply(image) for image in IMAGES]


def network(half=False):
    return TorchNetwork(copy.deepcopy(fused_tiny()), CPU, half=half)


def without_graph(forward):
    return forward


def decoded_by(net, canvases):
    """Return the decoded output without a captured graph."""
    with torch.inference_mode():
        images = net.empty_input(len(canvases), canvases[0].shape[:2])
        return net.predict(net.prepare(torch.from_numpy(np.stack(canvases)), images)).clone()


# --- network ------------------------------------------------------------------------------------------------------


def test_canvases_become_the_network_input_of_the_host_bit_for_bit():
    net = network()
    canvases = [*CANVASES[:2], np.arange(np.prod(HW) * 3, dtype=np.uint8).reshape(*HW, 3)]
    images = net.prepare(torch.from_numpy(np.stack(canvases)), net.empty_input(3, HW))
    np.testing.assert_array_equal(images.numpy(), to_network_input(canvases))
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_in_fp16_the_network_input_is_rounded_once():
    net = network(half=True)
    images = net.prepare(torch.from_numpy(np.stack(CANVASES[:1])), net.empty_input(1, HW))
    np.testing.assert_array_equal(images.numpy(), to_network_input(CANVASES[:1]).astype(np.float16))


def test_fp16_runs_in_fp16_and_decodes_in_float32():
    net = network(half=True)
    fp32, fp16 = decoded_by(network(), CANVASES), decoded_by(net, CANVASES)
    with torch.inference_mode():
        maps = net.maps(net.empty_input(1, HW))
    assert {x.dtype for x in maps} == {torch.float16} and fp16.dtype == torch.float32
    assert (fp16[..., 4:] - fp32[..., 4:]).abs().max() < FP16_SCORE
    assert (fp16[..., :4] - fp32[..., :4]).abs().max() < FP16_BOX_PX
    # Decoded in FP16, all of them would be representable in FP16.
    for part in (fp16[..., :2], fp16[..., 2:4], fp16[..., 4:]):
        assert not torch.equal(part, part.half().float())


# --- candidates ---------------------------------------------------------------------------------------------------

# Few values, so that scores tie and equal the threshold; 0.1 is not a float32.
LEVELS = np.array([0, 0.1, 0.25, 0.5, 0.75, 1, np.nan], dtype=np.float32)


def random_outputs(seed, *, images, anchors, classes, broken):
    rng = np.random.default_rng(seed)
    outputs = rng.choice(LEVELS[: len(LEVELS) if broken else -1], (images, anchors, 5 + classes))
    outputs[..., :4] = rng.uniform(0, 64, (images, anchors, 4))
    return outputs.astype(np.float32)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    images=st.integers(1, 3),
    anchors=st.integers(0, 40),
    classes=st.integers(1, 4),
    conf=st.sampled_from([0.0, 0.1, 0.25, 0.1875, 0.3, 1.0]),
    multi_label=st.booleans(),
    only=st.sampled_from([None, (0,), (1, 2)]),
    broken=st.booleans(),
)
def test_detections_of_the_candidates_are_those_of_all_anchors(
    seed, images, anchors, classes, conf, multi_label, only, broken
):
    outputs = random_outputs(seed, images=images, anchors=anchors, classes=classes, broken=broken)
    thresholds = Thresholds(conf=conf, multi_label=multi_label, classes=only)
    rows = split_by_image(*select_candidates(torch.from_numpy(outputs), conf), images)
    assert len(rows) == images
    for chosen, output in zip(rows, outputs, strict=True):
        for ours, expected in zip(postprocess(chosen, thresholds), postprocess(output, thresholds), strict=True):
            np.testing.assert_array_equal(ours, expected)


def test_only_rows_with_a_score_above_the_threshold_leave_the_device():
    outputs = torch.zeros(3, 6, 7)
    outputs[1, 2, 4:] = torch.tensor([0.9, 0.1, 0.5])  # 0.45
    outputs[1, 3, 4:] = torch.tensor([0.9, 0.1, 0.2])  # objectness alone is above
    outputs[1, 5, 4:] = torch.tensor([0.5, 0.8, 0.0])  # the threshold itself
    rows, images = select_candidates(outputs, 0.4)
    assert images.tolist() == [1] and torch.equal(rows[0], outputs[1, 2])
    assert [len(part) for part in split_by_image(rows, images, 3)] == [0, 1, 0]


# --- captured graphs ----------------------------------------------------------------------------------------------


def run_in_pool(pool, canvases, conf=0.6):
    with pool.acquire((len(canvases), *HW)) as graph, graph.on_stream():
        graph.upload(canvases)
        graph.prepare()
        return graph.download(graph.run(), conf)


def expected_rows(net, canvases, conf=0.6):
    return split_by_image(*select_candidates(decoded_by(net, canvases), conf), len(canvases))


def assert_equal_rows(ours, expected):
    assert [len(rows) for rows in ours] == [len(rows) for rows in expected]
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(a, b)


class StaticGraph:
    """A fake CUDA graph: one output that every replay overwrites. Counts captures."""

    captures = 0

    def __call__(self, forward):
        self.captures += 1
        output = forward().clone()

        def replay():
            return output.copy_(forward())

        return replay


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_a_captured_graph_returns_what_the_network_returns(half, count):
    net = network(half)
    pool = CapturedGraphPool(lambda size: CapturedGraph(net, size, capture=without_graph), limit=1)
    assert_equal_rows(run_in_pool(pool, CANVASES[:count]), expected_rows(net, CANVASES[:count]))


def test_results_outlive_the_next_call_of_the_same_graph():
    net, graph = network(), StaticGraph()
    pool = CapturedGraphPool(lambda size: CapturedGraph(net, size, capture=graph), limit=1)
    first = run_in_pool(pool, CANVASES[:1])
    assert len(first[0]) > 0
    run_in_pool(pool, CANVASES[1:2])
    assert_equal_rows(first, expected_rows(net, CANVASES[:1]))
    assert graph.captures == 1


def test_eight_threads_get_each_their_own_result():
    net, graph = network(), StaticGraph()
    pool = CapturedGraphPool(lambda size: CapturedGraph(net, size, capture=graph), limit=3)
    expected = [expected_rows(net, [canvas]) for canvas in CANVASES]
    wrong = []

    def call(number):
        for repetition in range(6):
            index = (number + repetition) % len(CANVASES)
            try:
                assert_equal_rows(run_in_pool(pool, [CANVASES[index]]), expected[index])
            except AssertionError as error:
                wrong.append(error)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not wrong and not any(thread.is_alive() for thread in threads)
    assert graph.captures <= 3


class StubGraph:
    """A fake captured graph that only has a size."""

    def __init__(self, size):
        self.size = size


def stub_pool(limit):
    made = []

    def make(size):
        made.append(size)
        return StubGraph(size)

    return CapturedGraphPool(make, limit=limit), made


def use(pool, number):
    with pool.acquire((1, number, 32)) as graph:
        return weakref.ref(graph)


def test_the_least_recently_used_graph_is_freed_for_a_new_size():
    pool, made = stub_pool(limit=2)
    for number in (1, 2, 1, 3, 1, 2):
        use(pool, number)
    assert [height for _, height, _ in made] == [1, 2, 3, 2]


def test_callers_beyond_the_limit_wait_for_a_graph():
    pool, made = stub_pool(limit=1)
    entered = threading.Event()
    waiting = threading.Thread(target=lambda: (use(pool, 2), entered.set()))
    with pool.acquire((1, 1, 32)):
        waiting.start()
        assert not entered.wait(0.1)
    assert entered.wait(10)
    waiting.join()
    assert len(made) == 2


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_graph_is_not_used_again_after_a_failed_call(error):
    pool, made = stub_pool(limit=1)
    with pytest.raises(error), pool.acquire((1, 1, 32)):
        raise error
    use(pool, 1)
    assert len(made) == 2


def test_a_graph_that_could_not_be_captured_does_not_count():
    def make(size):
        raise ValueError("no")

    pool = CapturedGraphPool(make, limit=1)
    for _ in range(3):
        with pytest.raises(ValueError, match="no"):
            use(pool, 1)


def alive(graph):
    return graph() is not None


def test_free_idle_frees_graphs():
    pool, _ = stub_pool(limit=4)
    idle = use(pool, 1)
    assert alive(idle)
    assert pool.free_idle() == 1
    assert not alive(idle)
    assert pool.free_idle() == 0


def test_closing_frees_graphs_and_those_in_use_at_the_end_of_their_call():
    pool, _ = stub_pool(limit=4)
    idle = use(pool, 1)
    with pool.acquire((1, 2, 32)) as graph:
        busy = weakref.ref(graph)
        pool.close()
        assert not alive(idle) and alive(busy)
    del graph
    assert not alive(busy)
    assert not alive(use(pool, 3)), "a call after closing keeps no graph"


# --- capturing ----------------------------------------------------------------------------------------------------


def test_a_failed_capture_is_logged_once_and_runs_without_a_graph(caplog):
    tried = []

    def fail_to_capture(forward):
        tried.append(forward)
        raise RuntimeError("operation not permitted when stream is capturing\nlong advice")

    capturer = GraphCapturer(fail_to_capture)
    with caplog.at_level(logging.WARNING):
        assert capturer(without_graph) is without_graph and capturer(without_graph) is without_graph
    (record,) = caplog.records
    assert "(operation not permitted when stream is capturing)" in record.getMessage()
    assert len(tried) == 1 and not capturer.available


def test_out_of_memory_during_a_capture_does_not_disable_graphs():
    def exhaust(forward):
        try:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    capturer = GraphCapturer(exhaust)
    with pytest.raises(RuntimeError, match="previous error") as caught:
        capturer(without_graph)
    assert is_out_of_memory(caught.value) and capturer.available


def test_only_one_graph_is_captured_at_a_time():
    inside, most = [], []

    def slow(forward):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return forward

    threads = [threading.Thread(target=GraphCapturer(slow), args=(without_graph,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]


def test_other_errors_are_not_mistaken_for_out_of_memory():
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
