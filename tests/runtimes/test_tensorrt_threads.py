"""Many threads on one engine: separate results, bounded memory, waiting, closing, and a GPU that fails."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.trt_kit import assert_detected, environment, infer, make_image, toy
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import DeviceError, UsageError
from yolov7_deploy.runtimes.cudart import current_context, restore_context
from yolov7_deploy.runtimes.tensorrt_executor import MAX_EXECUTORS

__all__ = ["environment"]

SHORT_S = 1
WAIT_S = 20  # time limit for events that must happen


def test_eight_threads_get_the_results_of_their_own_images(environment):
    runtime = environment.open(toy(None))
    images = [make_image(seed, 30 + 7 * (seed % 5), 40 + 3 * seed) for seed in range(24)]

    def work(number):
        for repetition in range(12):
            chosen = [images[(number * 3 + repetition + i) % 24] for i in range(1 + (number + repetition) % 4)]
            for found, image in zip(infer(runtime, chosen).detections, chosen, strict=True):
                assert_detected(found, image)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_as_many_calls_run_concurrently_as_there_are_executors(environment):
    runtime = environment.open()
    inside, most, changed = 0, 0, threading.Condition()

    def at_run():
        nonlocal inside, most
        with changed:
            inside += 1
            most = max(most, inside)
            changed.notify_all()
            # With a time limit: an executor that still allocates memory waits for the GPU, and these calls for it.
            changed.wait_for(lambda: most >= MAX_EXECUTORS, SHORT_S)
            inside -= 1

    environment.trt.at_run = at_run
    with ThreadPoolExecutor(3 * MAX_EXECUTORS) as pool:
        results = list(
            pool.map(lambda seed: infer(runtime, [make_image(seed)]).detections[0], range(10 * MAX_EXECUTORS))
        )
    environment.trt.at_run = lambda: None
    for seed, found in enumerate(results):
        assert_detected(found, make_image(seed))
    assert most == MAX_EXECUTORS
    assert len(environment.trt.contexts) == MAX_EXECUTORS


def held(environment, runtime):
    """Start a call that stays on the GPU until the event is set; return its future and the event."""
    arrived, resume = threading.Event(), threading.Event()

    def at_run():
        arrived.set()
        assert resume.wait(WAIT_S)

    environment.trt.at_run = at_run
    pool = ThreadPoolExecutor(1)
    future = pool.submit(infer, runtime, [make_image(0)])
    assert arrived.wait(WAIT_S)
    environment.trt.at_run = lambda: None
    pool.shutdown(wait=False)
    return future, resume


def test_without_memory_for_a_second_executor_calls_wait_for_the_first(environment, caplog):
    runtime = environment.open()
    future, resume = held(environment, runtime)
    free, total = environment.cuda.memory()
    environment.monkeypatch.setenv("FAKE_CUDA_MEMORY", str(total - free))
    assert_calls_wait_for(future, resume, runtime, caplog)


def assert_calls_wait_for(future, resume, runtime, caplog):
    """Check that calls of other threads wait for the one that is on the GPU, after a warning."""
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(infer, runtime, [make_image(seed)]) for seed in (1, 2)]
        while not any("Concurrent calls are limited" in record.message for record in caplog.records):
            assert not any(one.done() for one in waiting)
        resume.set()
        for seed, one in enumerate([future, *waiting]):
            assert_detected(one.result(WAIT_S).detections[0], make_image(seed))
    assert dict(runtime.runtime_info)["concurrent calls"] == "1"
    limits = [record for record in caplog.records if "Concurrent calls are limited" in record.message]
    assert 1 <= len(limits) <= 2, "two calls may fail at the same time"


def test_without_memory_for_the_first_executor_the_error_states_what_is_needed(environment):
    environment.monkeypatch.setenv("FAKE_CUDA_MEMORY", "1000")
    with pytest.raises(DeviceError, match="MiB of GPU memory are needed") as caught:
        environment.open()
    assert "--batch" in caught.value.fix


def test_out_of_memory_in_a_run_fails_only_that_call(environment):
    runtime = environment.open()
    assert_detected(infer(runtime, [make_image(0)]).detections[0], make_image(0))
    free, total = environment.cuda.memory()
    environment.monkeypatch.setenv("FAKE_CUDA_MEMORY", str(total - free + 4096))
    with pytest.raises(DeviceError, match="MiB of GPU memory are needed"):
        infer(runtime, [make_image(1, 2000, 900)])
    for _ in range(3):
        assert_detected(infer(runtime, [make_image(2, 20, 20)]).detections[0], make_image(2, 20, 20))


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        ("cudaStreamSynchronize:700", "the CUDA context is lost"),
        ("cudaMemcpyAsync:709", "the CUDA context that this model was opened in was destroyed"),
        ("cudaGetDevice:201", "the CUDA context that this model was opened in was destroyed"),
    ],
)
def test_a_lost_gpu_is_reported_now_and_at_every_later_call(environment, failure, text):
    runtime = environment.open()
    environment.monkeypatch.setenv("FAKE_CUDA_FAIL", failure)
    with pytest.raises(DeviceError, match=text):
        infer(runtime, [make_image(0)])
    environment.monkeypatch.delenv("FAKE_CUDA_FAIL")
    for _ in range(2):
        with pytest.raises(DeviceError, match=f"toy.engine cannot run any more: .*{text}") as caught:
            infer(runtime, [make_image(0)])
        assert caught.value.fix
    runtime.close()
    runtime.close()


def test_a_transient_failure_fails_one_call(environment):
    runtime, calls = environment.open(), environment.calls()
    for _ in range(3):
        assert_detected(infer(runtime, [make_image(0)]).detections[0], make_image(0))
    environment.monkeypatch.setenv("FAKE_CUDA_FAIL", "cudaGraphLaunch:999")
    with pytest.raises(DeviceError, match="cudaGraphLaunch failed"):
        infer(runtime, [make_image(0)])
    environment.monkeypatch.delenv("FAKE_CUDA_FAIL")
    calls()
    for seed in range(4):
        assert_detected(infer(runtime, [make_image(seed)]).detections[0], make_image(seed))
    assert Counter(calls())["cudaStreamCreateWithFlags"] == 1, "a new executor replaces the one in an unknown state"


def test_an_invalid_call_does_not_replace_the_executor(environment):
    runtime, calls = environment.open(), environment.calls()
    with pytest.raises(UsageError):
        infer(runtime, [make_image(0)], hw=(32, 32))
    infer(runtime, [make_image(0)])
    assert "cudaStreamCreateWithFlags" not in calls()


def test_closing_waits_for_running_calls_and_refuses_new_ones(environment):
    runtime = environment.open()
    runtime._executors._limit = 1  # so that another call waits
    future, resume = held(environment, runtime)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(infer, runtime, [make_image(1)])
        closing = pool.submit(runtime.close)
        with pytest.raises(UsageError, match="closed"):
            waiting.result(WAIT_S)
        assert not closing.done()
        resume.set()
        closing.result(WAIT_S)
    assert_detected(future.result(WAIT_S).detections[0], make_image(0))
    with pytest.raises(UsageError, match="closed"):
        infer(runtime, [make_image(0)])
    runtime.close()


def test_closing_frees_the_engine(environment):
    runtime = environment.open()
    infer(runtime, [make_image(0)])
    assert runtime._engine.engine is not None
    runtime.close()
    assert runtime._engine.engine is None and runtime._engine._runtime is None


def test_a_closed_detector_refuses_calls(environment):
    detector = Detector(environment.engine())
    detector(make_image(0))
    detector.close()
    detector.close()
    with pytest.raises(UsageError, match="closed"):
        detector(make_image(0))


def test_every_thread_runs_on_the_detectors_gpu_and_its_current_device_is_restored(environment):
    environment.monkeypatch.setenv("FAKE_CUDA_DEVICES", "3")
    runtime = environment.open(device="cuda:2", compute_capability="9.2")
    assert runtime.device == "cuda:2"
    seen = []
    environment.trt.at_run = lambda: seen.append(environment.cuda.value("cudaGetDevice"))

    def work(own):
        environment.cuda.set_device(own)
        for seed in range(3):
            assert_detected(infer(runtime, [make_image(seed)]).detections[0], make_image(seed))
        return environment.cuda.value("cudaGetDevice")

    for own in (0, 1, 2):
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(work, own).result(WAIT_S) == own
    assert seen == [2] * 9


def test_a_call_restores_the_context_of_another_library_on_another_gpu(environment):
    environment.monkeypatch.setenv("FAKE_CUDA_DEVICES", "2")
    runtime = environment.open()
    pycuda_context = 0x2001  # on the second GPU

    def work():
        restore_context(pycuda_context)
        for seed in range(3):
            assert_detected(infer(runtime, [make_image(seed)]).detections[0], make_image(seed))
        return current_context()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result(WAIT_S) == pycuda_context


def test_futures_hold_the_detections_of_their_images(environment):
    with Detector(environment.engine()) as detector:
        futures = [detector.submit(make_image(seed)) for seed in range(12)]
        for seed, future in enumerate(futures):
            expected = detector(make_image(seed))
            assert (future.result(WAIT_S).boxes == expected.boxes).all()
