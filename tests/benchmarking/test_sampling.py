"""Timing of calls: warm-up, interleaved series, percentiles, concurrency, and load of other programs."""

from __future__ import annotations

import gc
import os
import threading
import time

import pytest

from yolov7_deploy.benchmarking.sampling import (
    BLOCKS,
    STABLE_BLOCK_S,
    interleave,
    no_garbage_collection,
    run_concurrently,
    stage_time,
    warm_up,
)
from yolov7_deploy.errors import DeviceError
from yolov7_deploy.hardware.system import OtherCpuLoad


def test_the_warm_up_lasts_until_times_are_stable():
    durations = iter([0.2, 0.15, 0.1, *[0.05] * 100])
    warmup = warm_up(lambda: time.sleep(next(durations)), limit_s=60)
    assert warmup.stable
    assert warmup.seconds >= 3 * STABLE_BLOCK_S
    assert 0.05 * warmup.calls < warmup.seconds < 30


def test_the_warm_up_of_unstable_calls_ends_at_its_limit():
    durations = (0.3 + 0.1 * (number % 2) for number in range(1000))
    warmup = warm_up(lambda: time.sleep(next(durations)), limit_s=1.0)
    assert not warmup.stable and warmup.calls <= 5


def test_percentiles_and_blocks_are_those_of_the_samples():
    values = [float(number) for number in range(1, 101)]
    measured = stage_time("engine", values)
    assert (measured.p50, measured.mean, measured.min) == (50.5, 50.5, 1.0)
    assert measured.p90 == pytest.approx(90.1) and measured.p99 == pytest.approx(99.01)
    assert measured.blocks == tuple(3.0 + 5 * block for block in range(BLOCKS))
    assert stage_time("engine", [2.0, 4.0]).blocks == (2.0, 4.0)


def test_every_other_round_runs_in_reverse_order():
    order: list[str] = []
    shares: list[float] = []
    series = [lambda: order.append("a"), lambda: order.append("b")]
    interleave(series, slice_s=0, seconds=0, min_rounds=4, on_progress=shares.append)
    assert "".join(order) == "abbaabba"
    assert shares == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("was_on", [True, False])
def test_the_garbage_collector_is_restored(was_on):
    try:
        (gc.enable if was_on else gc.disable)()
        with pytest.raises(RuntimeError), no_garbage_collection():
            assert not gc.isenabled()
            raise RuntimeError
        assert gc.isenabled() == was_on
    finally:
        gc.enable()


@pytest.mark.parametrize("concurrency", [1, 4])
def test_threads_that_sleep_do_not_slow_each_other(concurrency):
    done = run_concurrently(lambda _: time.sleep(0.02), concurrency=concurrency, seconds=0.5, min_calls=3)
    rate = done.calls / done.seconds
    assert 0.5 * concurrency / 0.02 < rate <= concurrency / 0.02
    assert min(done.samples_ms) >= 20


def test_threads_that_share_a_lock_are_not_faster_than_one():
    lock = threading.Lock()

    def call(_: int) -> None:
        with lock:
            time.sleep(0.01)

    done = run_concurrently(call, concurrency=4, seconds=0.4, min_calls=3)
    assert done.calls / done.seconds <= 100


def test_a_call_that_crosses_the_end_counts_by_its_part():
    """One thread is so slow that counting only whole calls would distort its rate."""
    done = run_concurrently(
        lambda thread: time.sleep(0.3 if thread else 0.05), concurrency=2, seconds=0.75, min_calls=1
    )
    assert done.calls == pytest.approx(done.seconds / 0.05 + done.seconds / 0.3, rel=0.2)
    assert done.calls % 1 != 0
    assert len(done.samples_ms) > done.calls - 2


def test_an_error_in_one_thread_ends_all_and_is_raised():
    seen = []

    def call(thread: int) -> None:
        seen.append(thread)
        if thread == 2 and len(seen) > 20:
            raise DeviceError("out of memory")
        time.sleep(0.001)

    with pytest.raises(DeviceError, match="out of memory"):
        run_concurrently(call, concurrency=4, seconds=60, min_calls=3)
    assert not [thread for thread in threading.enumerate() if "run" in thread.name]


def test_an_error_before_the_start_leaves_no_thread_waiting():
    def call(thread: int) -> None:
        if thread == 1:
            raise DeviceError("no second context")

    with pytest.raises(DeviceError, match="second context"):
        run_concurrently(call, concurrency=3, seconds=60, min_calls=3)


def stat(folder, *, user, idle, steal=0):
    (folder / "proc").mkdir(exist_ok=True)
    (folder / "proc/stat").write_text(f"cpu  {user} 0 0 {idle} 0 0 0 {steal} 0 0\ncpu0 1 2 3\n")


def test_the_load_of_other_programs_excludes_our_own(tmp_path):
    stat(tmp_path, user=1000, idle=1000)
    load = OtherCpuLoad(tmp_path)
    stat(tmp_path, user=21000, idle=61000, steal=20000)
    assert load.share() == pytest.approx(0.4, abs=0.01)  # our own load is negligible in a thousand seconds
    (tmp_path / "proc/stat").write_text("cpu nothing\n")
    assert load.share() is None and OtherCpuLoad(tmp_path / "absent").share() is None


def test_work_of_this_process_is_not_load_of_other_programs():
    load, until = OtherCpuLoad(), time.process_time() + 0.5
    started = time.perf_counter()
    while time.process_time() < until:
        pass
    seconds = time.perf_counter() - started
    share = load.share()
    assert share is not None and share <= 1 - 0.4 / seconds / os.cpu_count()
