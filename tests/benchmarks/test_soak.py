"""Many threads that call one Detector: their results, their resources, and their order."""

import gc
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from tests.support.sample_images import CONF, IMAGES, MAX_DET
from tests.support.small_models import HW
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import ImageError, UsageError
from yolov7_deploy.hardware.system import usable_cores
from yolov7_deploy.runtimes.onnxruntime import FairSemaphore

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import soak

THREADS = 8
WAIT_S = 60


@pytest.fixture
def opened(files):
    """A Detector with dynamic batch size, and its detections in each image from a single call."""
    with Detector(files("plugin", batch=None), img=HW, conf=CONF, max_det=MAX_DET, device="cpu") as detector:
        yield detector, [detector(image) for image in IMAGES]


# --- the soak -----------------------------------------------------------------------------------------------------


def test_eight_threads_get_the_same_results_as_one(opened):
    detector, expected = opened
    done = soak.soak(detector, IMAGES, expected, threads=THREADS, calls=200)
    assert len(done.call_ms) == sum(done.calls_by_thread) == 200
    assert done.unequal == 0
    assert min(done.calls_by_thread) >= 10
    assert not [what for what in done.failures() if "increased" in what]


@pytest.mark.slow
def test_two_thousand_calls_of_eight_threads_do_not_leak_and_are_as_fast_as_the_best_single_thread(files):
    # A usual small size: at HW a call takes 6 ms, so the load of the machine would dominate.
    path = files("plugin", batch=None, input_hw=(320, 320))
    with Detector(path, conf=0.95, max_det=MAX_DET, device="cpu") as detector:
        expected = [detector(image) for image in IMAGES]
        done = soak.soak(detector, IMAGES, expected, threads=THREADS, calls=2000)
        assert done.failures() == []
        rates = soak.throughput(detector, IMAGES, threads=THREADS, block_s=2.0)
    best, ratio = soak.best_ratio(rates)
    assert ratio >= soak.MIN_RATIO, f"{ratio:.3f} of {best}"


def test_a_soak_ends_after_the_given_seconds(opened):
    detector, expected = opened
    begin = time.perf_counter()
    done = soak.soak(detector, IMAGES, expected, threads=2, seconds=1.0)
    assert 1.0 <= time.perf_counter() - begin < 30
    assert done.call_ms


def test_a_soak_detects_a_different_result(opened):
    detector, expected = opened
    moved = replace(expected[0], boxes=np.nextafter(expected[0].boxes, np.float32(np.inf)))
    done = soak.soak(detector, IMAGES, [moved, *expected[1:]], threads=2, calls=10)
    assert done.unequal == 2
    assert "2 results differ" in done.failures()[0]


def test_a_soak_raises_the_error_of_a_call(opened):
    detector, expected = opened
    with pytest.raises(ImageError):
        soak.soak(detector, [*IMAGES[:4], IMAGES[4].astype(float)], expected, threads=4, calls=100)


def test_a_soak_distinguishes_a_leak_from_noise():
    def soak_with(memory):
        samples = [soak.Sample(calls=10 * i, memory_mb=mb, threads=9, files=5) for i, mb in enumerate(memory, 1)]
        return soak.Soak(samples=samples, call_ms=[1.0] * 1000)

    noise = np.random.default_rng(0).normal(0, 2, 100)
    warming = np.minimum(np.arange(100) * 20, 300)  # until 150 calls
    assert soak_with(300 + noise + warming).failures() == []
    leaking = soak_with(600 + noise + np.arange(100) * 0.5)  # 40 MB while settled
    assert leaking.memory_growth == pytest.approx(40 / 610, rel=0.1)
    assert leaking.failures() == [f"memory grew by {leaking.memory_growth:.1%}"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("threads", "threads increased from 9 to 10"), ("files", "open files increased from 5 to 6")],
)
def test_a_soak_distinguishes_more_threads_or_files_from_a_short_peak(name, message):
    steady = [soak.Sample(calls=10 * i, memory_mb=300, threads=9, files=5) for i in range(1, 101)]
    more = replace(steady[0], **{name: getattr(steady[0], name) + 1})

    def failures(samples):
        return soak.Soak(samples=samples, call_ms=[1.0] * 1000).failures()

    peak = [replace(more, calls=one.calls) if one.calls in (300, 900) else one for one in steady]
    assert failures(peak) == []
    assert failures([replace(more, calls=one.calls) if one.calls > 700 else one for one in steady]) == [message]


def test_the_best_configuration_is_selected_over_all_rounds_and_the_ratio_is_paired():
    rates = {"one thread, 1 per call": [10, 12, 30], "one thread, 2 per call": [20, 22, 10], "threads": [22, 11, 20]}
    assert soak.best_ratio(rates) == ("one thread, 2 per call", pytest.approx(1.1))


# --- errors and closing under load --------------------------------------------------------------------------------


def test_a_bad_image_raises_only_in_its_own_call(opened):
    detector, expected = opened
    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(detector, np.zeros((0, 3, 3)) if i % 7 == 3 else IMAGES[i % 5]) for i in range(40)]
    for i, future in enumerate(futures):
        if i % 7 == 3:
            assert isinstance(future.exception(), ImageError)
        else:
            assert soak.equal(future.result(), expected[i % 5])


def test_closing_during_calls_gives_results_or_a_closed_error(opened):
    detector, expected = opened
    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(detector, IMAGES[i % 5]) for i in range(60)]
        wait(futures[:10])
        detector.close()
    errors = [(i, future.exception()) for i, future in enumerate(futures)]
    assert all(soak.equal(futures[i].result(), expected[i % 5]) for i, error in errors if error is None)
    refused = [error for _, error in errors if error is not None]
    assert refused and all(isinstance(error, UsageError) and "closed" in str(error) for error in refused)


def test_closing_frees_the_network_although_the_detector_still_exists(opened):
    detector, _ = opened
    gc.collect()
    before = len(_sessions())
    detector.close()
    assert len(_sessions()) == before - 1


def _sessions():
    return [one for one in gc.get_objects() if type(one) is onnxruntime.InferenceSession]


def test_the_runtime_info_contains_the_number_of_concurrent_runs(opened):
    cores = usable_cores()
    runtime_info = dict(opened[0].runtime_info)
    assert runtime_info == {
        "runtime": f"ONNX Runtime {onnxruntime.__version__}",
        "intra-op threads": str(cores),
        "concurrent runs": f"at most {2 * cores}",
    }


# --- the fair semaphore -------------------------------------------------------------------------------------------


def test_at_most_the_given_number_of_threads_enter():
    semaphore, inside, counts = FairSemaphore(3), [], []

    def enter(number):
        with semaphore:
            inside.append(number)
            counts.append(len(inside))
            time.sleep(0.002)
            inside.remove(number)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(enter, range(60)))
    assert max(counts) == 3


def test_threads_enter_in_the_order_of_arrival():
    semaphore, entered, threads = FairSemaphore(1), [], []

    def enter(number):
        with semaphore:
            entered.append(number)

    with semaphore:
        for number in range(6):
            threads.append(threading.Thread(target=enter, args=(number,)))
            threads[-1].start()
            wait_until(lambda: len(semaphore._waiting) == len(threads))
    for thread in threads:
        thread.join(WAIT_S)
    assert entered == list(range(6))


def test_an_error_releases_the_semaphore():
    semaphore = FairSemaphore(1)
    for _ in range(3):
        with pytest.raises(ValueError, match="inside"), semaphore:
            raise ValueError("inside")
    with semaphore:
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="no signal reaches one thread there")
def test_ctrl_c_while_waiting_does_not_acquire_the_semaphore(request):
    # A background job of a shell ignores SIGINT.
    request.addfinalizer(
        partial(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler))
    )
    semaphore, acquired, release = FairSemaphore(1), threading.Event(), threading.Event()

    def hold():
        with semaphore:
            acquired.set()
            release.wait(WAIT_S)

    def interrupt():
        wait_until(lambda: semaphore._waiting)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    holder, interrupter = threading.Thread(target=hold), threading.Thread(target=interrupt)
    holder.start()
    assert acquired.wait(WAIT_S)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt), semaphore:
        pass
    release.set()
    holder.join(WAIT_S)
    interrupter.join(WAIT_S)
    assert not semaphore._waiting
    with semaphore:
        pass


def wait_until(condition):
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
