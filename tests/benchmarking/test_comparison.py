"""Comparison of two reports, with noise whose true ratio is known."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest

from tests.support.speed_reports import speed_report, speed_row
from yolov7_deploy.benchmarking.comparison import (
    LEVEL,
    MIN_CHANGE,
    UNDER_LOAD,
    compare_reports,
    describe_comparison,
)
from yolov7_deploy.benchmarking.sampling import BLOCKS, stage_time

TRIALS = 400
# Three standard errors of a share of 5 % in this many trials.
SLACK = 3 * math.sqrt(LEVEL * (1 - LEVEL) / TRIALS)
ROW = speed_row()
NOISE = 0.03  # of a call, as on a busy machine


def noisy(seed, count, *, ms=100.0, correlation=0.0, calls=200, noise=NOISE):
    """Stages with correlated calls: each deviation is `correlation` times the last one, plus its own."""
    rng = np.random.default_rng(seed)
    deviations = rng.normal(0, noise, (calls, count))
    for step in range(1, calls):
        own = deviations[step] * math.sqrt(1 - correlation**2)
        deviations[step] = correlation * deviations[step - 1] + own
    return [stage_time("end_to_end", values) for values in (ms * np.exp(deviations)).T]


def verdicts(seed, *, factor, stages=1, trials=TRIALS, **noise):
    """Verdicts on pairs of runs, the second slower by `factor`: one list for each pair."""
    runs = []
    for number, by in enumerate((1.0, factor)):
        made = noisy((seed, number), trials * stages, ms=100 * by, **noise)
        named = [replace(one, name=f"{i % stages}") for i, one in enumerate(made)]
        runs.append([speed_report(rows=(bare_row(*named[i : i + stages]),)) for i in range(0, len(named), stages)])
    return [[one.verdict for one in compare_reports(old, new).differences] for old, new in zip(*runs, strict=True)]


def bare_row(*stages):
    return replace(ROW, stages=stages)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9, 0.97])
def test_two_runs_of_the_same_speed_differ_no_more_often_than_stated(correlation):
    found = verdicts(1, factor=1.0, correlation=correlation)
    assert np.mean([one != ["no change"] for one in found]) <= LEVEL


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_the_rate_of_false_alarms_at_the_edge_of_no_change_is_the_stated_one(correlation):
    """The hardest case of no change: a true ratio of exactly 1 + `MIN_CHANGE`."""
    found = verdicts(2, factor=1 + MIN_CHANGE, correlation=correlation, noise=0.01)
    rate = np.mean([one == ["slower"] for one in found])
    assert LEVEL - SLACK <= rate <= LEVEL + SLACK


def test_many_stages_together_give_no_more_false_alarms_than_one():
    found = verdicts(3, factor=1 + MIN_CHANGE, stages=8, trials=TRIALS // 4, noise=0.01)
    assert np.mean(["slower" in one for one in found]) <= LEVEL + 2 * SLACK


@pytest.mark.parametrize(("factor", "verdict"), [(1.05, "slower"), (1 / 1.05, "faster")])
@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_a_change_of_five_percent_is_detected(factor, verdict, correlation):
    found = verdicts(4, factor=factor, correlation=correlation, trials=100)
    assert np.mean([one == [verdict] for one in found]) >= 0.9


def test_a_change_of_five_percent_is_detected_among_many_stages():
    found = verdicts(5, factor=1.05, stages=8, noise=0.015, trials=100)
    assert np.mean([one == ["slower"] * 8 for one in found]) >= 0.9


def test_a_change_that_is_certain_but_too_small_is_no_change():
    found = verdicts(6, factor=1.01, noise=0.001, trials=50)
    assert {one[0] for one in found} == {"no change"}


def test_the_interval_contains_the_true_ratio_as_often_as_stated():
    inside = []
    for old, new in zip(noisy(7, TRIALS), noisy(8, TRIALS, ms=103), strict=True):
        (one,) = compare_reports(speed_report(rows=(bare_row(old),)), speed_report(rows=(bare_row(new),))).differences
        inside.append(one.low <= 1.03 <= one.high)
    assert abs(np.mean(inside) - 0.95) <= SLACK


def test_runs_without_noise_are_compared():
    old, same, slower = (speed_report(rows=(bare_row(stage_time("engine", [ms] * 40)),)) for ms in (10.0, 10.0, 12.0))
    assert [one.verdict for one in compare_reports(old, same).differences] == ["no change"]
    (one,) = compare_reports(old, slower).differences
    assert (one.verdict, one.ratio, one.p) == ("slower", pytest.approx(1.2), 0.0)


def test_too_few_blocks_have_no_verdict():
    old, new = (speed_report(rows=(bare_row(stage_time("engine", [ms] * 4)),)) for ms in (10.0, 20.0))
    comparison = compare_reports(old, new)
    assert [one.verdict for one in comparison.differences] == ["too few blocks"]
    assert "too few blocks" in describe_comparison(comparison)
    json.dumps(asdict(comparison), allow_nan=False)


def test_impossible_times_are_compared_without_an_error():
    """A file may contain anything: zeros, negative and huge times."""
    blocks = ([0.0, 1e300] * 10, [-1.0] * 20, [1e-300, 1e300, 5.0] * 7, [1e300, 1e290] * 9, [1.0, 0.0], [1e300])
    stages = [replace(stage_time("engine", [1.0]), p50=1.0, blocks=tuple(one)) for one in blocks]
    for old in stages:
        for new in stages:
            (one,) = compare_reports(
                speed_report(rows=(bare_row(old),)), speed_report(rows=(bare_row(new),))
            ).differences
            assert one.verdict
            json.dumps(asdict(one), allow_nan=False)


def test_rows_are_paired_by_batch_and_concurrency_and_stages_of_a_batch_are_compared_once():
    under_load = stage_time("end_to_end", [5.0] * 40)
    rows = (speed_row(), speed_row(concurrency=4, under_load=under_load), speed_row(batch=8))
    comparison = compare_reports(speed_report(rows=rows), speed_report(rows=(rows[1], rows[0])))
    compared = [(one.batch, one.concurrency, one.stage) for one in comparison.differences]
    names = ["preprocess", "engine", "postprocess", "end_to_end", UNDER_LOAD]
    assert compared == [(1, 4, name) for name in names]
    assert comparison.warnings == ()


def test_stages_that_take_no_time_are_left_out():
    assert "upload" not in [one.stage for one in compare_reports(speed_report(), speed_report()).differences]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"machine": "another"}, "machine: was AMD EPYC, is another"),
        ({"runtime": "tensorrt"}, "runtime: was onnxruntime, is tensorrt"),
        ({"frames": "others"}, "frames: "),
        ({"environment": (("numpy", "1"),)}, "numpy: was 2, is 1"),
        ({"settings": ()}, "threads: was 2, is not reported"),
        ({"rows": (replace(ROW, other_cpu_load=0.4),)}, "in the new run other programs used 40% of the CPU time"),
        ({"rows": (speed_row(batch=8),)}, "no row has the same batch size"),
    ],
)
def test_other_differences_are_warnings(change, text):
    comparison = compare_reports(speed_report(), replace(speed_report(), **change))
    assert any(text in warning for warning in comparison.warnings)
    assert f"warning: {text}" in describe_comparison(comparison)


def test_the_text_names_the_test_and_what_is_too_noisy_to_tell():
    wild = [speed_report(rows=(bare_row(one),)) for one in noisy(9, 2, noise=0.6, calls=BLOCKS)]
    text = describe_comparison(compare_reports(*wild, name="old.json"))
    assert "Welch's t-test" in text and "Holm" in text and "compared with old.json" in text
    assert "too noisy to tell" in text
    assert "too noisy" not in describe_comparison(compare_reports(speed_report(), speed_report()))


@pytest.mark.parametrize("is_terminal", [False, True])
def test_the_comparison_fits_100_columns(monkeypatch, is_terminal):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, raising=False)
    slow = [speed_report(engine_ms=ms, end_to_end_ms=1.1 * ms, batch=32) for ms in (12345.0, 13000.0)]
    lines = describe_comparison(compare_reports(*slow, name="runs/bench/exp12/bench.json")).splitlines()
    rows = [line for line in lines if line.strip().startswith(("batch ", "32 "))]
    assert len(rows) > 3 and max(map(len, rows)) <= 100
