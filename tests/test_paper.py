"""The paper's tables as data."""

import pytest

from yolov7_deploy import paper
from yolov7_deploy.errors import UsageError
from yolov7_deploy.paper import TABLE_1, TABLE_2, TABLE_9, TABLE_10, VARIANTS, paper_row


def test_the_tables_have_all_rows():
    assert [len(table) for table in (TABLE_1, TABLE_2, TABLE_9, TABLE_10)] == [16, 31, 47, 4]


def test_every_row_names_its_table():
    for number, table in ((1, TABLE_1), (2, TABLE_2), (9, TABLE_9), (10, TABLE_10)):
        assert {row.source for row in table} == {f"arXiv 2207.02696, Table {number}"}


def test_table_9_is_ordered_by_speed_per_device():
    for device in ("V100", "A100"):
        speeds = [row.fps for row in TABLE_9 if row.device == device]
        assert speeds == sorted(speeds, reverse=True)


@pytest.mark.parametrize(
    ("variant", "size", "ap_val", "ap_test", "fps", "batch32_ms"),
    [
        ("yolov7-tiny", 416, 35.2, None, None, 0.4),
        ("yolov7-tiny-silu", 640, 38.7, 38.7, 286, 0.8),
        ("yolov7", 640, 51.2, 51.4, 161, 2.8),
        ("yolov7x", 640, 52.9, 53.1, 114, 4.3),
        ("yolov7-w6", 1280, 54.6, 54.9, 84, 7.6),
        ("yolov7-e6", 1280, 55.9, 56.0, 56, 12.3),
        ("yolov7-d6", 1280, 56.3, 56.6, 44, 15.0),
        ("yolov7-e6e", 1280, 56.8, 56.8, 36, 18.7),
    ],
)
def test_a_paper_row_merges_accuracy_and_speed(variant, size, ap_val, ap_test, fps, batch32_ms):
    row = paper_row(variant)
    assert (row.size, row.val.ap, row.fps, row.batch32_ms) == (size, ap_val, fps, batch32_ms)
    assert (row.test.ap if row.test else None) == ap_test


def test_a_paper_row_has_ap_by_object_size_of_val_and_test():
    row = paper_row("yolov7")
    assert (row.val.ap75, row.val.ap_small, row.test.ap75, row.test.ap_small) == (55.5, 35.2, 55.9, 31.8)
    assert "Table 1" in row.source and "Table 2" in row.source


def test_yolov7_tiny_has_a_second_size():
    row = paper_row("yolov7-tiny", size=320)
    assert (row.gflops, row.val.ap, row.batch32_ms) == (3.5, 30.8, None)


def test_models_that_are_not_in_the_paper_are_an_error():
    with pytest.raises(UsageError, match="yolov8"):
        paper_row("yolov8")
    with pytest.raises(UsageError, match="at 1280"):
        paper_row("yolov7", size=1280)


@pytest.mark.parametrize(("number", "rows"), [(3, 4), (4, 6), (5, 6), (6, 4), (7, 3), (8, 3)])
def test_the_tables_of_the_ablations_have_all_rows(number, rows):
    table = getattr(paper, f"TABLE_{number}")
    assert len(table) == rows
    assert {row.source for row in table} == {f"arXiv 2207.02696, Table {number}"}
    for row in table:
        assert row.val.ap75 < row.val.ap50 and row.val.ap < row.val.ap75
        assert row.val.ap_large is None or row.val.ap_small < row.val.ap_medium < row.val.ap_large


def test_a_network_of_the_ablations_has_its_row():
    row = paper_row("yolov7x-depth")
    assert (row.params_m, row.gflops, row.size, row.val.ap) == (69.3, 187.6, 640, 52.7)
    merged = paper_row("yolor-w6")
    assert (merged.params_m, merged.gflops, merged.fps) == (79.8, 453.2, 66)
    assert paper_row("yolov7-elan3-c").params_m is None
    with pytest.raises(UsageError, match="does not have yolov7-elan3-n"):
        paper_row("yolov7-elan3-n")


def test_every_variant_has_a_row():
    assert all(paper_row(variant).val for variant in VARIANTS)
