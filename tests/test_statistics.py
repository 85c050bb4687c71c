"""Student's t-distribution against printed tables."""

from __future__ import annotations

import pytest

from yolov7_deploy._statistics import student_t_quantile, student_t_tail


@pytest.mark.parametrize(
    ("t", "freedom", "tail"),
    # From printed tables.
    [(0.0, 5, 0.5), (2.571, 5, 0.025), (-2.571, 5, 0.975), (1.812, 10, 0.05), (2.042, 30, 0.025), (12.706, 1, 0.025)],
)
def test_tails_and_quantiles_are_those_of_printed_tables(t, freedom, tail):
    assert student_t_tail(t, freedom) == pytest.approx(tail, rel=2e-3)
    if t > 0:
        assert student_t_quantile(1 - tail, freedom) == pytest.approx(t, rel=1e-3)


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.70620), (2, 4.30265), (9, 2.26216), (30, 2.04227), (100, 1.98397), (10_000, 1.96020)],
)
def test_the_quantiles_of_95_percent_intervals_are_exact_to_1e_5(freedom, quantile):
    assert student_t_quantile(0.975, freedom) == pytest.approx(quantile, rel=2e-5)
