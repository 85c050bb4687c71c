"""Races: the fastest function wins, slow ones leave early, and an interruption loses nothing."""

import itertools
import time

import numpy as np
import pytest

from yolov7_deploy.benchmarking.race import MIN_ROUNDS, compare, fastest, race

DURATIONS = {"slow": 0.012, "fast": 0.003, "slower": 0.02}


def run_race(calls, **options):
    samples, shares = {}, []
    race(calls, samples, items=dict.fromkeys(calls, 1), on_round=shares.append, **options)
    return samples, shares


def test_the_fastest_wins_in_every_run_and_the_others_leave_early():
    calls = {name: lambda seconds=seconds: time.sleep(seconds) for name, seconds in DURATIONS.items()}
    for _ in range(2):
        samples, shares = run_race(calls, seconds=20.0)
        assert fastest(samples, list(samples)) == "fast"
        assert len(samples["fast"]) < 200 and shares[-1] == 1.0 and shares == sorted(shares)


def test_equal_functions_run_until_the_time_is_over():
    started = time.perf_counter()
    samples, _ = run_race({name: lambda: time.sleep(0.01) for name in "ab"}, seconds=1.5)
    assert time.perf_counter() - started >= 1.5 and min(map(len, samples.values())) >= MIN_ROUNDS


def test_times_are_per_item():
    samples = {}
    calls = {"one": lambda: time.sleep(0.01), "ten": lambda: time.sleep(0.04)}
    race(calls, samples, seconds=0.1, items={"one": 1, "ten": 10})
    assert fastest(samples, list(samples)) == "ten" and np.median(samples["ten"]) < 10


def test_an_interruption_keeps_complete_rounds():
    numbers = itertools.count()

    def call():
        time.sleep(0.05)
        if next(numbers) == 20:
            raise KeyboardInterrupt

    samples = {}
    with pytest.raises(KeyboardInterrupt):
        race({"a": call, "b": lambda: None}, samples, seconds=60.0, items={"a": 1, "b": 1})
    assert 2 <= len(samples["a"]) <= 10 and len(samples["b"]) >= len(samples["a"])


def test_the_ratio_is_that_of_the_rounds_that_both_ran():
    generator = np.random.default_rng(0)
    drift = np.exp(np.cumsum(generator.normal(0, 0.1, 50)))
    fast = drift * np.exp(generator.normal(0, 0.02, 50))
    slow = 1.5 * drift * np.exp(generator.normal(0, 0.02, 50))
    found = compare(slow[:30].tolist(), fast.tolist())
    assert found.low < 1.5 < found.high and found.ratio == pytest.approx(1.5, rel=0.02)
    assert found.high / found.low < 1.05
