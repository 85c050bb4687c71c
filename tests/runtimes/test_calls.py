"""Calls in progress: closing waits for them, cancels what has not started, and never waits for itself."""

import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait

import pytest

from yolov7_deploy.errors import UsageError
from yolov7_deploy.runtimes.base import CallTracker

WAIT_S = 30  # time limit for events that must happen
SHORT_S = 0.2  # time in which something that must not happen would happen


@pytest.fixture
def calls():
    tracker = CallTracker(2)
    yield tracker
    in_thread(tracker.close)


def in_thread(function):
    """Run a function in a thread that must end: a deadlock fails the test instead of hanging it."""
    outcome = []

    def run():
        try:
            outcome.append(function())
        except BaseException as error:  # noqa: BLE001 - raised again below
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(WAIT_S)
    assert not thread.is_alive(), "deadlock"
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def blocked(calls, count):
    """Submit calls that wait for an event; return it with their futures when the first ones run."""
    event, started = threading.Event(), threading.Semaphore(0)

    def work():
        started.release()
        assert event.wait(WAIT_S)
        return "done"

    futures = [calls.submit(work) for _ in range(count)]
    for _ in range(min(count, 2)):
        assert started.acquire(timeout=WAIT_S)
    return event, futures


def until(condition):
    deadline = time.monotonic() + WAIT_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def refused(function):
    with pytest.raises(UsageError, match="closed"):
        function()


def test_after_closing_calls_are_refused(calls):
    calls.close()
    calls.close()
    refused(lambda: calls.submit(int))
    refused(lambda: calls.running().__enter__())
    refused(calls.check_open)


def test_closing_waits_for_running_calls_and_cancels_the_others(calls):
    event, futures = blocked(calls, 5)
    closing = threading.Thread(target=calls.close)
    closing.start()
    until(futures[-1].cancelled)
    assert [future.cancelled() for future in futures] == [False, False, True, True, True]
    closing.join(SHORT_S)
    assert closing.is_alive()
    refused(lambda: calls.submit(int))
    event.set()
    closing.join(WAIT_S)
    assert not closing.is_alive()
    assert [future.result(timeout=0) for future in futures[:2]] == ["done", "done"]
    with pytest.raises(CancelledError):
        futures[2].result(timeout=0)


def test_closing_waits_for_calls_of_other_threads(calls):
    inside, event = threading.Event(), threading.Event()

    def work():
        with calls.running(), calls.running():
            inside.set()
            assert event.wait(WAIT_S)

    worker, closing = threading.Thread(target=work), threading.Thread(target=calls.close)
    worker.start()
    assert inside.wait(WAIT_S)
    closing.start()
    closing.join(SHORT_S)
    assert closing.is_alive()
    event.set()
    closing.join(WAIT_S)
    assert not closing.is_alive()
    worker.join()


def test_a_call_that_closes_does_not_wait_for_itself(calls):
    def work():
        with calls.running():
            calls.close()

    in_thread(work)


def test_two_calls_that_close_do_not_wait_for_each_other(calls):
    both = threading.Barrier(2, timeout=WAIT_S)

    def work(_):
        with calls.running():
            both.wait()
            calls.close()

    in_thread(lambda: list(ThreadPoolExecutor(2).map(work, range(2))))


@pytest.mark.parametrize("closing_thread", ["other", "callback"])
def test_callbacks_may_submit_and_close(calls, closing_thread):
    event, futures = blocked(calls, 6)
    outcomes = []

    def callback(_):
        calls.close()
        try:
            calls.submit(int)
        except UsageError as error:
            outcomes.append(error)

    for future in futures:
        future.add_done_callback(callback)
    threading.Timer(SHORT_S, event.set).start()
    if closing_thread == "other":
        in_thread(calls.close)
    until(lambda: len(outcomes) == 6)
    in_thread(calls.close)
    assert sum(future.cancelled() for future in futures) == 4


def test_callbacks_of_a_thousand_cancelled_calls_may_close(calls):
    event, futures = blocked(calls, 1000)
    for future in futures:
        future.add_done_callback(lambda _: calls.close())
    threading.Timer(SHORT_S, event.set).start()
    in_thread(calls.close)
    assert sum(future.cancelled() for future in futures) == 998


def test_closing_ends_the_threads():
    before = threading.active_count()
    calls = CallTracker(4)
    wait([calls.submit(time.sleep, 0.01) for _ in range(8)])
    assert threading.active_count() > before
    calls.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("attempt", range(5))
def test_a_submission_that_races_with_closing_is_accepted_or_refused(attempt):
    calls, barrier = CallTracker(2), threading.Barrier(5, timeout=WAIT_S)

    def submit(_):
        barrier.wait()
        futures = []
        try:
            for _ in range(1000):
                futures.append(calls.submit(int))
        except UsageError:
            return futures
        return futures

    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(submit, number) for number in range(4)]
        barrier.wait()
        time.sleep(attempt * 3e-4)
        calls.close()
        futures = [future for result in results for future in result.result(timeout=WAIT_S)]
    assert all(future.cancelled() or future.result(timeout=WAIT_S) == 0 for future in futures)


def test_a_submission_while_python_exits_is_refused(calls, monkeypatch):
    monkeypatch.setattr("concurrent.futures.thread._shutdown", True)
    with pytest.raises(UsageError, match="shutdown"):
        calls.submit(int)


def test_errors_of_calls_are_in_their_futures(calls):
    assert isinstance(calls.submit(int, "x").exception(timeout=WAIT_S), ValueError)
    with pytest.raises(ValueError), calls.running():
        raise ValueError
    in_thread(calls.close)
