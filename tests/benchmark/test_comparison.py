"""Telling a change of speed from noise, tried on noise whose truth is known."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest

from tests.support.speeds import report, row, span
from yolov7_deploy.benchmark.comparison import (
    LEVEL,
    LOADED,
    RELEVANT,
    compare_reports,
    student_quantile,
    student_tail,
)
from yolov7_deploy.benchmark.report_text import describe_comparison
from yolov7_deploy.benchmark.sampling import BLOCKS

TRIALS = 400
# Three standard errors of a share of 5 % in so many trials.
SLACK = 3 * math.sqrt(LEVEL * (1 - LEVEL) / TRIALS)
ROW = row()
NOISE = 0.03  # of a call, as a busy machine has it


def noisy(seed, count, *, ms=100.0, correlation=0.0, calls=200, noise=NOISE):
    """Spans whose calls follow their neighbours: each deviation is `correlation` times the last, plus its own."""
    rng = np.random.default_rng(seed)
    deviations = rng.normal(0, noise, (calls, count))
    for step in range(1, calls):
        own = deviations[step] * math.sqrt(1 - correlation**2)
        deviations[step] = correlation * deviations[step - 1] + own
    return [span("end_to_end", values) for values in (ms * np.exp(deviations)).T]


def verdicts(seed, *, factor, spans=1, trials=TRIALS, **noise):
    """Of pairs of runs, the second slower by `factor`: the verdicts, one list a pair."""
    runs = []
    for number, by in enumerate((1.0, factor)):
        made = noisy((seed, number), trials * spans, ms=100 * by, **noise)
        named = [replace(one, name=f"{i % spans}") for i, one in enumerate(made)]
        runs.append([report(rows=(bare_row(*named[i : i + spans]),)) for i in range(0, len(named), spans)])
    return [[one.verdict for one in compare_reports(old, new).differences] for old, new in zip(*runs, strict=True)]


def bare_row(*spans):
    return replace(ROW, spans=spans)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9, 0.97])
def test_two_runs_of_the_same_speed_are_told_apart_no_oftener_than_stated(correlation):
    found = verdicts(1, factor=1.0, correlation=correlation)
    assert np.mean([one != ["no change"] for one in found]) <= LEVEL


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_the_rate_of_false_alarms_at_the_edge_of_what_is_relevant_is_the_stated_one(correlation):
    """The hardest case that counts as no change: a true ratio of exactly `RELEVANT` more."""
    found = verdicts(2, factor=1 + RELEVANT, correlation=correlation, noise=0.01)
    rate = np.mean([one == ["slower"] for one in found])
    assert LEVEL - SLACK <= rate <= LEVEL + SLACK


def test_many_spans_together_give_no_more_false_alarms_than_one():
    found = verdicts(3, factor=1 + RELEVANT, spans=8, trials=TRIALS // 4, noise=0.01)
    assert np.mean(["slower" in one for one in found]) <= LEVEL + 2 * SLACK


@pytest.mark.parametrize(("factor", "verdict"), [(1.05, "slower"), (1 / 1.05, "faster")])
@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_a_change_of_five_percent_is_found(factor, verdict, correlation):
    found = verdicts(4, factor=factor, correlation=correlation, trials=100)
    assert np.mean([one == [verdict] for one in found]) >= 0.9


def test_a_change_of_five_percent_is_found_among_many_spans():
    found = verdicts(5, factor=1.05, spans=8, noise=0.015, trials=100)
    assert np.mean([one == ["slower"] * 8 for one in found]) >= 0.9


def test_a_change_that_is_certain_but_not_relevant_is_no_change():
    found = verdicts(6, factor=1.01, noise=0.001, trials=50)
    assert {one[0] for one in found} == {"no change"}


def test_the_interval_holds_the_true_ratio_as_often_as_it_says():
    inside = []
    for old, new in zip(noisy(7, TRIALS), noisy(8, TRIALS, ms=103), strict=True):
        (one,) = compare_reports(report(rows=(bare_row(old),)), report(rows=(bare_row(new),))).differences
        inside.append(one.low <= 1.03 <= one.high)
    assert abs(np.mean(inside) - 0.95) <= SLACK


@pytest.mark.parametrize(
    ("t", "freedom", "tail"),
    # From printed tables of Student's distribution.
    [(0.0, 5, 0.5), (2.571, 5, 0.025), (-2.571, 5, 0.975), (1.812, 10, 0.05), (2.042, 30, 0.025), (12.706, 1, 0.025)],
)
def test_students_distribution_is_that_of_the_tables(t, freedom, tail):
    assert student_tail(t, freedom) == pytest.approx(tail, rel=2e-3)
    if t > 0:
        assert student_quantile(1 - tail, freedom) == pytest.approx(t, rel=1e-3)


def test_runs_without_any_noise_are_compared():
    old, same, slower = (report(rows=(bare_row(span("engine", [ms] * 40)),)) for ms in (10.0, 10.0, 12.0))
    assert [one.verdict for one in compare_reports(old, same).differences] == ["no change"]
    (one,) = compare_reports(old, slower).differences
    assert (one.verdict, one.ratio, one.p) == ("slower", pytest.approx(1.2), 0.0)


def test_too_few_blocks_are_no_verdict():
    old, new = (report(rows=(bare_row(span("engine", [ms] * 4)),)) for ms in (10.0, 20.0))
    comparison = compare_reports(old, new)
    assert [one.verdict for one in comparison.differences] == ["too few blocks"]
    assert "too few blocks" in describe_comparison(comparison)
    json.dumps(asdict(comparison), allow_nan=False)


def test_times_that_cannot_be_are_compared_all_the_same():
    """A file is anybody's: zeros, negative and huge times."""
    blocks = ([0.0, 1e300] * 10, [-1.0] * 20, [1e-300, 1e300, 5.0] * 7, [1e300, 1e290] * 9, [1.0, 0.0], [1e300])
    spans = [replace(span("engine", [1.0]), p50=1.0, blocks=tuple(one)) for one in blocks]
    for old in spans:
        for new in spans:
            (one,) = compare_reports(report(rows=(bare_row(old),)), report(rows=(bare_row(new),))).differences
            assert one.verdict
            json.dumps(asdict(one), allow_nan=False)


def test_rows_are_paired_by_batch_and_callers_and_spans_of_a_batch_are_compared_once():
    loaded = span("end_to_end", [5.0] * 40)
    rows = (row(), row(threads=4, loaded=loaded), row(batch=8))
    comparison = compare_reports(report(rows=rows), report(rows=(rows[1], rows[0])))
    told = [(one.batch, one.threads, one.span) for one in comparison.differences]
    assert told == [(1, 4, "preprocess"), (1, 4, "engine"), (1, 4, "postprocess"), (1, 4, "end_to_end"), (1, 4, LOADED)]
    assert comparison.warnings == ()


def test_spans_that_do_not_exist_are_left_out():
    assert "upload" not in [one.span for one in compare_reports(report(), report()).differences]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"machine": "another"}, "machine: a machine then, another now"),
        ({"backend": "tensorrt"}, "backend: onnxruntime then, tensorrt now"),
        ({"frames": "others"}, "frames: "),
        ({"environment": (("numpy", "1"),)}, "numpy: 2 then, 1 now"),
        ({"settings": ()}, "threads: 2 then, not told now"),
        ({"rows": (replace(ROW, other_load=0.4),)}, "in the new run other programs had 40% of the processors"),
        ({"rows": (row(batch=8),)}, "no row has the same batch size"),
    ],
)
def test_what_else_differs_is_warned_of(change, words):
    comparison = compare_reports(report(), replace(report(), **change))
    assert any(words in warning for warning in comparison.warnings)
    assert f"warning: {words}" in describe_comparison(comparison)


def test_the_comparison_names_its_test_and_says_what_is_too_noisy_to_tell():
    wild = [report(rows=(bare_row(one),)) for one in noisy(9, 2, noise=0.6, calls=BLOCKS)]
    text = describe_comparison(compare_reports(*wild, name="old.json"))
    assert "Welch's t-test" in text and "Holm" in text and "against old.json" in text
    assert "no change seen, too noisy to tell" in text
    assert "too noisy" not in describe_comparison(compare_reports(report(), report()))
