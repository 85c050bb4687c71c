"""Tables 6 to 8 in small: the rows differ in the option that they are about, and intervals say what was seen."""

import sys
from pathlib import Path

import pytest

from yolov7_deploy.model.configs import find_variant
from yolov7_deploy.options import TrainOptions

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import ablations
from ablations import TABLES, interval, reading, small_variant, summarize


@pytest.mark.parametrize("table", TABLES)
def test_every_row_of_the_paper_is_a_training_of_its_own(table):
    _, rows, changes = TABLES[table]
    trainings = {repr(TrainOptions(**change)) for change in changes}  # checks the values, too
    assert len(rows) == len(changes) == len(trainings)
    assert changes[0] == {"auxiliary": "none"} and rows[0].model.startswith("base")


def test_the_small_networks_have_the_kinds_of_layers_of_the_large_ones():
    for name in ("yolov7-e6", "yolov7-e6e"):
        small, large = (variant.layers(training=True) for variant in (small_variant(name), find_variant(name)))
        assert {layer.kind for layer in small} == {layer.kind for layer in large}
        assert small[-1].c_in == tuple(c // 8 for c in large[-1].c_in)
        assert len(small) < len(large)


def test_an_interval_is_that_of_student():
    assert interval([1.0, 2.0, 3.0]) == [-0.48, 4.48]  # 2 -+ 4.303 / sqrt(3)
    assert interval([1.0]) is None


def rows_of(*differences):
    row = TABLES[7][1][1]
    base = [{"ap": 10.0, "ap50": 20.0, "ap75": 5.0}] * len(differences)
    return [summarize(row, {}, base, base), summarize(row, {}, [{**base[0], "ap": 10 + d} for d in differences], base)]


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ((1.0, 1.1, 0.9), "better than the base"),
        ((-1.0, -1.1, -0.9), "worse than the base"),
        ((1.0, -1.1, 0.4), "not distinguishable"),
        ((3.0,), "one seed tells nothing"),
    ],
)
def test_the_reading_claims_only_what_the_interval_separates_from_zero(differences, verdict):
    text = reading(rows_of(*differences))
    assert verdict in text and "say nothing about trained networks" not in text


def test_the_reading_of_networks_that_have_hardly_learned_says_so():
    rows = [{**row, "mean": {"ap": 0.4}} for row in rows_of(1.0, 1.1, 0.9)]
    assert reading(rows).startswith("AP is at most 0.4: so early in training these rows say nothing")


@pytest.mark.slow
def test_a_comparison_runs_to_the_end_and_continues_from_its_folder(tmp_path, monkeypatch):
    for name, value in (("TRAIN_IMAGES", 16), ("VAL_IMAGES", 8)):
        monkeypatch.setattr(ablations, name, value)
    result = ablations.compare(7, "shapes", seeds=2, steps=1, work=tmp_path)
    assert [row["paper"]["ap"] for row in result["rows"]] == [55.6, 55.9, 55.9]
    assert all(len(row["seeds"]) == 2 for row in result["rows"])
    monkeypatch.setattr(ablations, "train_small", None)  # nothing is trained again
    assert ablations.compare(7, "shapes", seeds=2, steps=1, work=tmp_path) == result
