"""CUDA graphs of an engine: when they are recorded, what they hold, which are kept, and what runs without them."""

import logging
from collections import Counter

import numpy as np
import pytest

from tests.fakes.fake_trt_runtime import RTX
from tests.support.trt_kit import assert_found, boxes_in, infer, make_image, setting, toy
from yolov7_deploy.errors import DeviceError
from yolov7_deploy.runtimes.tensorrt_executor import GRAPHS, SHAPES

__all__ = ["setting"]

COPY, LAUNCH, RECORD = "cudaMemcpyAsync", "cudaGraphLaunch", "cudaStreamBeginCapture"


def checked(backend, *images, **options):
    for found, image in zip(infer(backend, images, **options).found, images, strict=True):
        assert_found(found, image)


def test_the_same_size_becomes_one_graph_of_everything(setting):
    backend, calls = setting.backend(), setting.calls()
    checked(backend, make_image(0))
    plain = Counter(calls())
    assert (plain[COPY], plain[LAUNCH], plain[RECORD]) == (2, 0, 0), "up and down"
    checked(backend, make_image(1))
    second = Counter(calls())
    assert (second[COPY], second[LAUNCH], second[RECORD]) == (2, 1, 1), "recorded, then launched"
    for seed in range(2, 5):
        checked(backend, make_image(seed))
        assert calls() == ["cudaGetDevice", LAUNCH, "cudaStreamSynchronize"]


def test_one_graph_serves_frames_of_every_size(setting):
    backend, calls = setting.backend(), setting.calls()
    for seed, size in enumerate([(300, 200), (50, 60), (20, 30), (64, 96), (90, 70), (48, 80), (33, 17)]):
        checked(backend, make_image(seed, *size))
    names = Counter(calls())
    assert names[RECORD] == 1
    assert names[LAUNCH] == 6
    checked(backend, make_image(9, 77, 55))
    assert Counter(calls())[COPY] == 1, "the upload; the download is in the graph"


@pytest.mark.parametrize(
    ("size", "copies"),
    [
        ((1500, 700), [2, 2, 0]),  # 128 rows are read, which are 0.3 MB: plain, recorded, launched
        ((2000, 5000), [3, 3, 2]),  # 76 rows are read, which are 1.1 MB: two pieces, and only the rest is in the graph
    ],
)
def test_large_frames_go_up_in_pieces_while_the_host_writes_the_rest(setting, size, copies):
    backend, calls = setting.backend(), setting.calls()
    found = []
    for colour in (30, 90, 200):
        calls()
        checked(backend, np.full((*size, 3), colour, np.uint8))
        names = Counter(calls())
        found.append(names[COPY])
        assert names[LAUNCH] == (colour > 30)
    assert found == copies


def test_each_batch_size_keeps_its_graph(setting):
    backend, calls = setting.backend(toy(None)), setting.calls()
    for _ in range(3):
        for count in (1, 2, 4):
            checked(backend, *[make_image(seed) for seed in range(count)])
    assert len(setting.trt.contexts) == 3, "one for each shape"
    calls()
    for count in (4, 1, 2, 1):
        checked(backend, *[make_image(seed + 7) for seed in range(count)])
    names = Counter(calls())
    assert (names[RECORD], names[LAUNCH]) == (0, 4)


def test_the_shape_that_rested_longest_gives_its_context_away(setting):
    backend = setting.backend(toy(None), batches=(1, 8))
    for count in (1, 2, 3, 5, 6, 7, 1, 2, 3, 8, 1, 1, 1):
        checked(backend, *[make_image(seed) for seed in range(count)])
    assert len(setting.trt.contexts) == SHAPES


def test_an_engine_with_one_context_serves_every_shape_with_it(setting):
    setting.use("8.6.2")
    setting.trt.most_contexts = 1
    backend = setting.backend(toy(None))
    for count in (1, 1, 1, 2, 2, 2, 1, 4, 1, 1):
        checked(backend, *[make_image(seed) for seed in range(count)])
    assert len(setting.trt.contexts) == 1


def test_only_the_last_few_graphs_of_a_shape_are_kept(setting):
    backend, calls = setting.backend(), setting.calls()
    sizes = [(20 + 4 * step, 40) for step in range(2 * GRAPHS)]
    for seed, size in enumerate(sizes):
        for _ in range(3):
            checked(backend, make_image(seed, *size))
    names = Counter(calls())
    recorded = names[RECORD]
    assert recorded > GRAPHS
    assert names["cudaGraphExecDestroy"] == recorded - GRAPHS


def test_a_frame_larger_than_the_staging_buffer_lets_it_grow(setting):
    backend, calls = setting.backend(), setting.calls()
    for seed, size in enumerate([(48, 80)] * 3 + [(200, 300)] * 3 + [(48, 80)] * 3 + [(700, 900)] * 3 + [(48, 80)] * 3):
        checked(backend, make_image(seed, *size))
    names = Counter(calls())
    assert 2 <= names["cudaHostAlloc"] == names["cudaFreeHost"] <= 4
    calls()
    checked(backend, make_image(0, 700, 900))
    assert "cudaMalloc" not in calls()


def test_thresholds_change_without_a_new_graph(setting):
    backend, calls = setting.backend(), setting.calls()
    for conf, rows in ((0.25, 3), (0.25, 3), (0.25, 3), (0.7, 1), (0.5, 2), (0.25, 3)):
        (found,) = infer(backend, [make_image(1)], conf=conf).found
        assert_found(found, make_image(1), rows=rows)
    assert Counter(calls())[RECORD] == 1


def test_what_cannot_be_recorded_runs_without_a_graph_and_says_so_once(setting, caplog):
    backend = setting.backend(toy(None))
    setting.monkeypatch.setenv("FAKE_CUDA_FAIL", "cudaGraphInstantiateWithFlags:801")
    for seed in range(4):
        checked(backend, make_image(seed))
    setting.monkeypatch.delenv("FAKE_CUDA_FAIL")
    calls = setting.calls()
    for _ in range(3):
        checked(backend, make_image(1), make_image(2))
    assert RECORD not in calls()
    (warning,) = [record for record in caplog.records if "without CUDA graphs" in record.message]
    assert warning.levelno == logging.WARNING
    assert dict(backend.runtime_info)["CUDA graph"].startswith("off: cudaGraphInstantiateWithFlags failed")


def test_a_timed_run_leaves_the_graphs_alone(setting):
    backend, calls = setting.backend(), setting.calls()
    for _ in range(3):
        checked(backend, make_image(1), timed=True)
    assert not {LAUNCH, RECORD} & set(calls())
    checked(backend, make_image(1))
    checked(backend, make_image(2))
    assert LAUNCH in calls()


def test_tensorrt_rtx_records_by_itself_what_nobody_else_may(setting):
    setting.use(RTX)
    setting.trt.records = False
    backend, calls = setting.backend(), setting.calls()
    for seed in range(4):
        checked(backend, make_image(seed))
    assert RECORD not in calls()
    assert dict(backend.runtime_info)["CUDA graph"] == "inside TensorRT-RTX"
    assert setting.trt.contexts[-1].strategy == "whole"


def test_tensorrt_rtx_with_open_shapes_records_by_itself(setting):
    setting.use(RTX)
    backend, calls = setting.backend(toy(None)), setting.calls()
    for seed in range(4):
        checked(backend, make_image(seed))
    assert RECORD not in calls()
    assert {context.strategy for context in setting.trt.contexts} == {"whole"}


def test_tensorrt_rtx_with_fixed_shapes_is_part_of_our_graph(setting):
    setting.use(RTX)
    backend, calls = setting.backend(), setting.calls()
    for seed in range(4):
        checked(backend, make_image(seed))
    assert Counter(calls())[RECORD] == 1
    assert setting.trt.contexts[-1].strategy == "disabled"


def test_on_the_host_letterbox_whole_canvases_are_part_of_the_graph(setting):
    setting.without_kernels()
    backend, calls = setting.backend(toy(None)), setting.calls()
    for seed, size in enumerate([(48, 80), (500, 400), (20, 30), (64, 96)]):
        for found in infer(backend, [make_image(seed, *size)]).found:
            np.testing.assert_allclose(found.boxes, boxes_in(make_image(seed, *size)), atol=2e-3)
    names = Counter(calls())
    assert names[RECORD] == 1 and names[LAUNCH] == 3


def test_a_failure_of_tensorrt_comes_with_its_own_words(setting):
    backend = setting.backend()
    setting.trt.failing = True
    with pytest.raises(DeviceError, match=r"TensorRT could not run .*toy\.engine with 1 images"):
        infer(backend, [make_image(0)])
    setting.trt.failing = False
    checked(backend, make_image(1))
