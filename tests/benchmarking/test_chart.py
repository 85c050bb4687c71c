"""The chart of speed against accuracy: its points, labels, legends and captions."""

from __future__ import annotations

import struct
import subprocess
import sys
from functools import partial
from itertools import combinations

import matplotlib
import numpy as np
import pytest

from tests.support import speed_reports
from yolov7_deploy.benchmarking.chart import (
    COLOURS,
    DPI,
    MIN_AXES_HEIGHT,
    PAPER_COLOUR,
    LabelLayout,
    draw_chart,
    speed_accuracy_chart,
)
from yolov7_deploy.errors import UsageError
from yolov7_deploy.image import read_image
from yolov7_deploy.paper import TABLE_2, VARIANTS, paper_row

speed_report = partial(speed_reports.speed_report, engine_ms=300.0, end_to_end_ms=305.0)
H200 = {"machine": "NVIDIA H200", "runtime": "tensorrt", "precision": "fp16"}


def series(share, **where):
    """Reports of all variants at a share of the paper's times, 2.5 ms where it has none."""
    times = {variant: share * 1000 / (paper_row(variant).fps or 400) for variant in VARIANTS}
    return [
        speed_report(
            variant,
            engine_ms=ms,
            end_to_end_ms=1.1 * ms,
            size=paper_row(variant).size,
            with_paper=True,
            **where,
        )
        for variant, ms in times.items()
    ]


SITUATIONS = {
    "nothing": [],
    "one CPU": [speed_report(with_paper=True)],
    "one GPU": [speed_report(engine_ms=1.0, end_to_end_ms=1.13, ap=0.511, **H200)],
    "other classes": [speed_report(is_coco=False, ap=0.7), speed_report(is_coco=False, machine="B")],
    "no AP": [speed_report(), speed_report("", weights="mine.onnx", engine_ms=290.0)],
    "a GPU's series": series(0.6, **H200),
    "two series and a CPU": [*series(0.2, **H200), *series(0.6), speed_report(ap=0.5365)],
    "many machines": [speed_report(machine=f"machine {i}", engine_ms=5 + i, ap=0.512) for i in range(14)],
}


def text_outside_axes(figure):
    """Legends and captions, as one line."""
    texts = [text for legend in figure.legends for text in (legend.get_title(), *legend.get_texts())]
    return " ".join(" ".join(text.get_text().split()) for text in (*texts, *figure.texts))


def markers(figure, colour):
    """(shape, milliseconds, AP, filled) of each measured marker of a colour."""
    return [
        (line.get_marker(), line.get_xdata()[0], line.get_ydata()[0], line.get_markerfacecolor() == colour)
        for line in figure.axes[0].lines
        if line.get_color() == colour and line.get_linestyle() == "None"
    ]


def test_the_chart_is_a_png_of_the_documented_size(tmp_path):
    path = tmp_path / "new" / "folder" / "speed.png"
    speed_accuracy_chart([speed_report(ap=0.51)], path)
    assert read_image(path).shape == (1000, 1600, 3)
    assert [entry.name for entry in path.parent.iterdir()] == ["speed.png"]


def test_the_same_reports_give_the_same_bytes_with_any_user_settings(tmp_path):
    speed_accuracy_chart(SITUATIONS["a GPU's series"], tmp_path / "a.png")
    settings = {"font.size": 30.0, "axes.facecolor": "red", "savefig.dpi": 17.0, "text.usetex": True}
    with matplotlib.rc_context(settings):
        speed_accuracy_chart(SITUATIONS["a GPU's series"], tmp_path / "b.png")
        assert {name: matplotlib.rcParams[name] for name in settings} == settings
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_file_holds_pixels_only(tmp_path):
    speed_accuracy_chart([], tmp_path / "a.png")
    data, kinds, offset = (tmp_path / "a.png").read_bytes(), set(), 8
    while offset < len(data):
        length, kind = struct.unpack_from(">I4s", data, offset)
        kinds.add(kind)
        offset += 12 + length
    assert kinds == {b"IHDR", b"pHYs", b"IDAT", b"IEND"}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_no_label_lies_on_another_or_leaves_the_axes(situation):
    figure = draw_chart(SITUATIONS[situation])
    axes = figure.axes[0]
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) >= (2 if situation == "other classes" else 7)
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert all(axes.bbox.x0 <= b.x0 and b.x1 <= axes.bbox.x1 for b in boxes)
    assert all(axes.bbox.y0 <= b.y0 and b.y1 <= axes.bbox.y1 for b in boxes)


def test_labels_stay_in_place_in_an_svg():
    """An SVG has 72 dots per inch, the PNG more."""
    figure = draw_chart([speed_report(engine_ms=4.0 + i, end_to_end_ms=6.0 + i, ap=0.5) for i in range(3)])
    before = label_positions(figure)
    figure.dpi = 72
    np.testing.assert_allclose(label_positions(figure), before, atol=1e-6)
    assert (before > 0).all() and (before < 1).all()


def label_positions(figure):
    """Return the centres of the labels, as shares of the width and height of the axes."""
    axes = figure.axes[0]
    pixels = [text.get_transform().transform(text.get_position()) for text in axes.texts]
    return axes.transAxes.inverted().transform(pixels)


def test_labels_can_replace_the_names_of_the_models():
    reports = [speed_report(ap=0.5), speed_report(batch=8), speed_report(ap=0.4)]
    drawn = [text.get_text() for text in draw_chart(reports, labels=["first", "second", "third"]).axes[0].texts]
    assert drawn[:2] == ["first", "third"]


def test_the_papers_rows_are_drawn_at_their_times_and_ap():
    figure = draw_chart([])
    (line,) = [line for line in figure.axes[0].lines if line.get_color() == PAPER_COLOUR]
    rows = sorted((row for row in TABLE_2 if row.model.startswith("YOLOv7")), key=lambda row: -row.fps)
    assert list(line.get_xdata()) == [1000 / row.fps for row in rows]
    assert list(line.get_ydata()) == [row.val.ap for row in rows]
    drawn = sum(len(line.get_xdata()) for line in figure.axes[0].lines if line.get_marker() != "None")
    assert drawn == len(TABLE_2)
    assert [text.get_text() for text in figure.axes[0].texts] == [row.model.removeprefix("YOLO") for row in rows]


@pytest.mark.parametrize(("ap", "label"), [(0.71, "AP on the model's own classes (%)"), (None, None)])
def test_models_with_other_classes_are_drawn_without_the_paper(ap, label):
    report = speed_report(engine_ms=4.0, end_to_end_ms=5.0, ap=ap, ap_source="val.json", with_paper=True, is_coco=False)
    figure = draw_chart([report])
    axes = figure.axes[0]
    assert {line.get_color() for line in axes.lines if len(line.get_xdata())} == {COLOURS[0]}
    assert "Paper" not in text_outside_axes(figure) and "YOLOR" not in text_outside_axes(figure)
    assert axes.yaxis.get_visible() == (label is not None)
    assert label is None or axes.get_ylabel() == label
    assert {marker[0] for marker in markers(figure, COLOURS[0])} == {"o" if ap else "v"}


def test_engine_markers_are_filled_and_end_to_end_markers_are_open():
    report = speed_report(engine_ms=4.0, end_to_end_ms=5.0, ap=0.514, ap_source="results/ap.json", with_paper=True)
    figure = draw_chart([report])
    assert sorted(markers(figure, COLOURS[0])) == [
        ("o", 4.0, pytest.approx(51.4), True),
        ("o", 5.0, pytest.approx(51.4), False),
    ]
    assert "AP measured with this file" in text_outside_axes(figure)
    assert "AP published" not in text_outside_axes(figure)
    assert "AP of yolov7.onnx: results/ap.json." in text_outside_axes(figure)


def test_a_published_ap_has_another_marker_and_legend():
    figure = draw_chart([speed_report("yolov7x", with_paper=True)])
    assert [marker[0::2] for marker in markers(figure, COLOURS[0])] == [("D", 52.9), ("D", 52.9)]
    assert "AP published for the official model, not measured with this file" in text_outside_axes(figure)
    assert "AP measured" not in text_outside_axes(figure)


def test_without_any_ap_the_time_is_drawn_at_the_bottom():
    figure = draw_chart([speed_report()])
    bottom = figure.axes[0].get_ylim()[0]
    assert [marker[:3] for marker in markers(figure, COLOURS[0])] == [("v", 300.0, bottom), ("v", 305.0, bottom)]
    assert bottom < min(row.val.ap for row in TABLE_2)
    assert "AP not known at this size: drawn at the bottom" in text_outside_axes(figure)


def test_an_ap_published_for_another_size_is_not_used():
    assert {marker[0] for marker in markers(draw_chart([speed_report(size=640, with_paper=True)]), COLOURS[0])} == {"D"}
    assert {marker[0] for marker in markers(draw_chart([speed_report(size=320, with_paper=True)]), COLOURS[0])} == {"v"}


def test_the_legend_says_what_each_time_includes_and_where_it_was_measured():
    legend = text_outside_axes(draw_chart([speed_report(ap=0.5), speed_report(ap=0.5, **H200)]))
    assert "Paper: V100, PyTorch FP16, network only" in legend
    assert "AMD EPYC, onnxruntime fp32" in legend and "NVIDIA H200, tensorrt fp16" in legend
    assert "engine: the network, and NMS where the file has it" in legend
    assert "end to end: from an image in memory to its boxes" in legend


def test_a_series_is_joined_in_the_order_of_its_times():
    reports = series(0.6, **H200)
    figure = draw_chart(list(reversed(reports)))
    (line,) = [line for line in figure.axes[0].lines if line.get_color() == COLOURS[0] and line.get_linestyle() == "-"]
    assert list(line.get_xdata()) == sorted(report.rows[0].stage("engine").p50 for report in reports)


@pytest.mark.parametrize(("engine_ms", "scale"), [(0.5, "log"), (1.0, "linear"), (30.0, "linear"), (300.0, "log")])
def test_the_axis_is_logarithmic_where_times_are_far_from_the_papers(engine_ms, scale):
    axes = draw_chart([speed_report(engine_ms=engine_ms, end_to_end_ms=1.1 * engine_ms, ap=0.5)]).axes[0]
    assert axes.get_xscale() == scale
    assert ("logarithmic" in axes.get_xlabel()) == (scale == "log")
    assert axes.get_xlim()[0] < engine_ms < axes.get_xlim()[1]


def test_a_report_without_batch_1_is_named_and_not_drawn():
    figure = draw_chart([speed_report(batch=8, ap=0.5)])
    assert "Not measured at batch 1, so not drawn: yolov7.onnx." in text_outside_axes(figure)
    assert "nothing at batch 1" in text_outside_axes(figure)
    assert markers(figure, COLOURS[0]) == []


def test_many_machines_make_the_image_higher_and_not_the_axes_lower():
    figure = draw_chart(SITUATIONS["many machines"])
    assert figure.get_figheight() > 6.25
    assert figure.axes[0].bbox.height >= MIN_AXES_HEIGHT * DPI - 1


@pytest.mark.parametrize(
    "name", ["$a$ ^{b}_\\frac.onnx", "零件\n检测.onnx", "_hidden.onnx", "x" * 300 + ".onnx", "\udcff.pt"]
)
def test_any_file_name_can_be_drawn(tmp_path, name):
    report = speed_report("", weights=name, machine=f"_{name}", ap=0.4, ap_source=name)
    speed_accuracy_chart([report], tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").shape[1] == 1600


def test_other_formats_are_rejected_with_the_name_to_use(tmp_path):
    with pytest.raises(UsageError, match=r"speed\.svg: a chart is a PNG") as caught:
        speed_accuracy_chart([], tmp_path / "speed.svg")
    assert caught.value.fix == "Name it speed.png"


def test_a_path_that_cannot_be_written_is_named_and_nothing_is_left(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "taken.png").mkdir()
    for path in (tmp_path / "file" / "a.png", tmp_path / "taken.png"):
        with pytest.raises(UsageError, match=f"{path.name} cannot be written"):
            speed_accuracy_chart([], path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "taken.png"]


def test_without_matplotlib_the_extra_is_named():
    code = """
import sys
sys.modules["matplotlib"] = None
from yolov7_deploy.errors import missing_library
try:
    import yolov7_deploy.benchmarking.chart
except ModuleNotFoundError as error:
    print(missing_library(error, "for y7 bench"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "matplotlib is needed for y7 bench.\npip install 'yolov7-deploy[bench]'\n"


def test_drawing_does_not_load_pyplot():
    code = """
import sys
from yolov7_deploy.benchmarking.chart import draw_chart
draw_chart([])
print("matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_label_covers_no_marker_and_the_fewest_lines():
    layout = LabelLayout(frame=(0.0, 0.0, 400.0, 400.0))
    layout.add_line([(0.0, 200.0), (400.0, 200.0)])
    layout.add_line([(200.0, 200.0)], marker=20.0)
    layout.boxes.append((0.0, 210.0, 400.0, 400.0))
    x, y = layout.place((200.0, 200.0), (60.0, 20.0))
    assert abs(x - 200.0) <= 60.0 and 150.0 < y <= 190.0


def test_placed_labels_do_not_overlap():
    layout = LabelLayout(frame=(0.0, 0.0, 100.0, 24.0))
    centres = [layout.place((50.0, 12.0), (20.0, 20.0)) for _ in range(6)]
    placed = [centre for centre in centres if centre]
    assert 2 <= len(placed) < 6
    assert all(abs(a[0] - b[0]) >= 20.0 for a, b in combinations(placed, 2))
    assert layout.place((50.0, 12.0), (20.0, 30.0)) is None
