"""Many threads on one engine: everybody's own results, bounded memory, waiting, closing, and a GPU that fails."""

import logging
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.trt_kit import assert_found, infer, make_image, setting, toy
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import DeviceError, UsageError
from yolov7_deploy.runtimes.executor_pool import MOST_SLOTS

__all__ = ["setting"]

SHORT_S = 1
WAIT_S = 20  # for what must happen; what must not is not waited for


def test_eight_threads_get_the_results_of_their_own_images(setting):
    backend = setting.backend(toy(None))
    images = [make_image(seed, 30 + 7 * (seed % 5), 40 + 3 * seed) for seed in range(24)]

    def work(number):
        for turn in range(12):
            chosen = [images[(number * 3 + turn + i) % 24] for i in range(1 + (number + turn) % 4)]
            for found, image in zip(infer(backend, chosen).found, chosen, strict=True):
                assert_found(found, image)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_calls_run_at_once_and_no_more_than_there_are_slots(setting):
    backend = setting.backend()
    inside, most, changed = 0, 0, threading.Condition()

    def at_run():
        nonlocal inside, most
        with changed:
            inside += 1
            most = max(most, inside)
            changed.notify_all()
            # Not for ever: a slot that still takes memory waits for the GPU, and those in here for a slot.
            changed.wait_for(lambda: most >= MOST_SLOTS, SHORT_S)
            inside -= 1

    setting.trt.at_run = at_run
    with ThreadPoolExecutor(3 * MOST_SLOTS) as pool:
        results = list(pool.map(lambda seed: infer(backend, [make_image(seed)]).found[0], range(10 * MOST_SLOTS)))
    setting.trt.at_run = lambda: None
    for seed, found in enumerate(results):
        assert_found(found, make_image(seed))
    assert most == MOST_SLOTS
    assert len(setting.trt.contexts) == MOST_SLOTS


def held(setting, backend):
    """A call that is on the GPU until the event is set, and its future."""
    arrived, go_on = threading.Event(), threading.Event()

    def at_run():
        arrived.set()
        assert go_on.wait(WAIT_S)

    setting.trt.at_run = at_run
    pool = ThreadPoolExecutor(1)
    future = pool.submit(infer, backend, [make_image(0)])
    assert arrived.wait(WAIT_S)
    setting.trt.at_run = lambda: None
    pool.shutdown(wait=False)
    return future, go_on


def test_without_memory_for_a_second_slot_the_first_is_waited_for(setting, caplog):
    backend = setting.backend()
    future, go_on = held(setting, backend)
    free, total = setting.cuda.memory()
    setting.monkeypatch.setenv("FAKE_CUDA_MEMORY", str(total - free))
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(infer, backend, [make_image(seed)]) for seed in (1, 2)]
        while not any("calls run at once" in record.message for record in caplog.records):
            assert not any(one.done() for one in waiting)
        go_on.set()
        for seed, one in enumerate([future, *waiting]):
            assert_found(one.result(WAIT_S).found[0], make_image(seed))
    assert dict(backend.runtime_info)["calls at once"] == "1"
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) <= 2


def test_without_memory_for_the_first_slot_it_says_what_is_missing(setting):
    setting.monkeypatch.setenv("FAKE_CUDA_MEMORY", "1000")
    with pytest.raises(DeviceError, match="MiB of GPU memory are needed") as caught:
        setting.backend()
    assert "--batch" in caught.value.fix


def test_out_of_memory_in_a_run_is_that_calls_error_only(setting):
    backend = setting.backend()
    assert_found(infer(backend, [make_image(0)]).found[0], make_image(0))
    free, total = setting.cuda.memory()
    setting.monkeypatch.setenv("FAKE_CUDA_MEMORY", str(total - free + 4096))
    with pytest.raises(DeviceError, match="MiB of GPU memory are needed"):
        infer(backend, [make_image(1, 2000, 900)])
    for _ in range(3):
        assert_found(infer(backend, [make_image(2, 20, 20)]).found[0], make_image(2, 20, 20))


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        ("cudaStreamSynchronize:700", "the GPU gave up on this process"),
        ("cudaMemcpyAsync:709", "the CUDA context that this was opened in was destroyed"),
        ("cudaGetDevice:201", "the CUDA context that this was opened in was destroyed"),
    ],
)
def test_a_lost_gpu_is_told_now_and_at_every_later_call(setting, failure, words):
    backend = setting.backend()
    setting.monkeypatch.setenv("FAKE_CUDA_FAIL", failure)
    with pytest.raises(DeviceError, match=words):
        infer(backend, [make_image(0)])
    setting.monkeypatch.delenv("FAKE_CUDA_FAIL")
    for _ in range(2):
        with pytest.raises(DeviceError, match=f"toy.engine cannot run any more: .*{words}") as caught:
            infer(backend, [make_image(0)])
        assert caught.value.fix
    backend.close()
    backend.close()


def test_a_failure_that_passes_costs_one_call(setting):
    backend, calls = setting.backend(), setting.calls()
    for _ in range(3):
        assert_found(infer(backend, [make_image(0)]).found[0], make_image(0))
    setting.monkeypatch.setenv("FAKE_CUDA_FAIL", "cudaGraphLaunch:999")
    with pytest.raises(DeviceError, match="cudaGraphLaunch failed"):
        infer(backend, [make_image(0)])
    setting.monkeypatch.delenv("FAKE_CUDA_FAIL")
    calls()
    for seed in range(4):
        assert_found(infer(backend, [make_image(seed)]).found[0], make_image(seed))
    assert Counter(calls())["cudaStreamCreateWithFlags"] == 1, "a new slot for the one whose work nobody knows"


def test_a_mistake_of_the_caller_costs_no_slot(setting):
    backend, calls = setting.backend(), setting.calls()
    with pytest.raises(UsageError):
        infer(backend, [make_image(0)], hw=(32, 32))
    infer(backend, [make_image(0)])
    assert "cudaStreamCreateWithFlags" not in calls()


def test_closing_waits_for_those_inside_and_refuses_those_who_come(setting):
    backend = setting.backend()
    backend._slots._most = 1  # so that another call waits for a slot
    future, go_on = held(setting, backend)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(infer, backend, [make_image(1)])
        closing = pool.submit(backend.close)
        with pytest.raises(UsageError, match="closed"):
            waiting.result(WAIT_S)
        assert not closing.done()
        go_on.set()
        closing.result(WAIT_S)
    assert_found(future.result(WAIT_S).found[0], make_image(0))
    with pytest.raises(UsageError, match="closed"):
        infer(backend, [make_image(0)])
    backend.close()


def test_a_closed_detector_says_so(setting):
    detector = Detector(setting.engine())
    detector(make_image(0))
    detector.close()
    detector.close()
    with pytest.raises(UsageError, match="closed"):
        detector(make_image(0))


def test_every_thread_works_on_the_detectors_gpu_and_gets_its_own_back(setting):
    setting.monkeypatch.setenv("FAKE_CUDA_DEVICES", "3")
    backend = setting.backend(device="cuda:2", compute_capability="9.2")
    assert backend.device == "cuda:2"
    seen = []
    setting.trt.at_run = lambda: seen.append(setting.cuda.value("cudaGetDevice"))

    def work(own):
        setting.cuda.set_device(own)
        for seed in range(3):
            assert_found(infer(backend, [make_image(seed)]).found[0], make_image(seed))
        return setting.cuda.value("cudaGetDevice")

    for own in (0, 1, 2):
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(work, own).result(WAIT_S) == own
    assert seen == [2] * 9


def test_submitted_images_come_back_in_their_futures(setting):
    with Detector(setting.engine()) as detector:
        futures = [detector.submit(make_image(seed)) for seed in range(12)]
        for seed, future in enumerate(futures):
            expected = detector(make_image(seed))
            assert (future.result(WAIT_S).boxes == expected.boxes).all()
