"""Speed against accuracy as an image, in the manner of the paper's figure 1, with what was measured on it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import IdentityTransform

from yolov7_deploy._charts import GREY, chart_style, drawable, write_chart
from yolov7_deploy.benchmark.label_layout import LabelGround, Xy
from yolov7_deploy.benchmark.report import SpeedReport
from yolov7_deploy.paper import PAPER, TABLE_2, VARIANTS, PaperRow

DPI = 160
WIDTH, HEIGHT, LEAST_AXES = 10.0, 6.25, 3.4  # of the image and the axes, in inches
# Wong's palette (Nature Methods 8, 441, 2011), which colour-blind readers can tell apart. The paper has the blue.
PAPER_COLOUR = "#0072B2"
COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000", "#56B4E9")
# The rivals of the paper: what their names begin and end with, marker, dashes, tone.
RIVALS: tuple[tuple[str, str, str, tuple[float, ...], str], ...] = (
    ("YOLOR", "", "s", (), "#8C8C8C"),
    ("PPYOLOE", "", "P", (4, 2), "#A6A6A6"),
    ("YOLOX", "", "X", (6, 2, 1, 2), "#A6A6A6"),
    ("YOLOv5", "(r6.1)", "*", (1, 2), "#8C8C8C"),
)
# Markers of what is measured, by where the AP comes from.
MARKERS = {"measured": "o", "published": "D", "unknown": "v"}
ORIGINS = {
    "measured": "AP measured with this file",
    "published": "AP published for the official model, not measured with this file",
    "unknown": "AP not known at this size: only its time, at the foot",
}
ENGINE = "engine: the network, and NMS where the file has it"
END_TO_END = "end to end: from an image in memory to its boxes"
# All times in between: the linear axis of the paper, whose slowest real-time detector takes 29 ms.
LINEAR_MS = (0.8, 40.0)
ENGINE_SIZE, END_TO_END_SIZE, PAPER_SIZE = 6.5, 10.0, 5.0  # of markers, in points
LEFT, COLUMNS = 0.06, (0.06, 0.34, 0.66)  # of axes and legends, in figure widths
COLUMN_CHARACTERS, CAPTION_CHARACTERS, LABEL_CHARACTERS = 44, 170, 28
MARGIN, XLABEL, LEGEND_LINE, CAPTION_LINE = 0.19, 0.53, 0.172, 0.122  # heights in inches
LEADER_PX = 30  # a label farther from its point than this has a line to it


@dataclass(frozen=True, kw_only=True, slots=True)
class _Point:
    """One report at batch 1.

    Attributes:
        label: The model.
        series: What it ran on, in words.
        engine_ms, end_to_end_ms: Medians.
        ap: In percent; `None` where nobody knows it.
        origin: Of the AP, a key of `ORIGINS`.
    """

    label: str
    series: str
    engine_ms: float
    end_to_end_ms: float
    ap: float | None
    origin: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Label:
    """A text that wants a place near a point of the axes."""

    text: str
    xy: Xy
    colour: str


Legend = tuple[str, list[tuple[Line2D, str]]]


def speed_accuracy_chart(reports: Sequence[SpeedReport], path: Path) -> None:
    """A PNG of AP against time at batch 1: the paper's detectors, and every report's engine and end-to-end time.

    It has 1600 x 1000 pixels, and is higher where many reports need a long legend. AP is what was measured with a
    report's file; else that of the paper's row the report stands beside, where sizes agree, which is drawn
    differently; a report without either shows its time only. One without a row of batch 1 is named below the image.
    The time axis is linear like the paper's, and logarithmic where times are far apart. Same reports, same bytes; the
    file appears complete or not at all, and folders are made.

    Raises:
        UsageError: The name does not end in .png, or the file cannot be written.
    """
    write_chart(lambda: draw_chart(reports), path, dpi=DPI)


@chart_style()
def draw_chart(reports: Sequence[SpeedReport]) -> Figure:
    """The chart as a figure of matplotlib."""
    points = [point for report in reports if (point := _point(report))]
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(p.series for p in points))}
    legends = [_paper_legend(), _measured_legend(colours), _reading_legend(points)]
    captions = _captions(reports)
    lines = max(1 + sum(text.count("\n") + 1 for _, text in entries) for _, entries in legends)
    top = MARGIN + CAPTION_LINE * len(captions) + LEGEND_LINE * lines
    height = max(HEIGHT, top + XLABEL + LEAST_AXES + MARGIN)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    FigureCanvasAgg(figure)  # joins itself to the figure
    axes = figure.add_axes((LEFT, (top + XLABEL) / height, 0.92, (height - top - XLABEL - MARGIN) / height))
    _set_axes(axes, points)
    ground = LabelGround(frame=axes.bbox.extents)
    labels = [*_draw_measured(axes, points, colours, ground), *_draw_paper(axes, ground)]
    for label in labels:
        _write_label(axes, label, ground)
    for x, (title, entries) in zip(COLUMNS, legends, strict=True):
        handles, texts = zip(*entries, strict=True)
        corner = (x, top / height)
        legend = figure.legend(handles, texts, title=title, loc="upper left", bbox_to_anchor=corner, alignment="left")
        legend.get_title().set_fontweight("bold")
    figure.text(LEFT, 0.1 / height, "\n".join(captions), fontsize=6.5, color=GREY, va="bottom", linespacing=1.3)
    return figure


def _point(report: SpeedReport) -> _Point | None:
    """The report at batch 1, or `None` where it was not measured there."""
    row = next((row for row in report.rows if row.batch == 1), None)
    if row is None:
        return None
    # What is published for one size says nothing of another.
    published = report.paper.ap if report.paper and report.paper.size == max(report.input_hw) else None
    origin = "measured" if report.ap is not None else "unknown" if published is None else "published"
    return _Point(
        label=_shorten(VARIANTS.get(report.variant, Path(report.weights).stem)),
        series=drawable(f"{report.machine}, {report.backend} {report.precision}"),
        engine_ms=row.span("engine").p50,
        end_to_end_ms=row.span("end_to_end").p50,
        ap=published if report.ap is None else 100 * report.ap,
        origin=origin,
    )


def _shorten(name: str) -> str:
    """A label: `v7-X` for `YOLOv7-X`."""
    text = drawable(name.removeprefix("YOLO"))
    return text if len(text) <= LABEL_CHARACTERS else f"{text[: LABEL_CHARACTERS - 1]}…"


def _paper_legend() -> Legend:
    entries = [(Line2D([], [], color=PAPER_COLOUR, marker="s", markersize=PAPER_SIZE, linewidth=1.6), "YOLOv7")]
    entries += [
        (_rival_line([], marker, dashes, tone), f"{start} {end}".rstrip())
        for start, end, marker, dashes, tone in RIVALS
    ]
    return "Paper: V100, PyTorch FP16, network only", entries


def _measured_legend(colours: dict[str, str]) -> Legend:
    entries = [
        (Line2D([], [], color=colour, linewidth=5, solid_capstyle="butt"), _fold(series))
        for series, colour in colours.items()
    ]
    return "Measured (medians)", entries or [(Line2D([], [], linestyle="none"), "nothing at batch 1")]


def _reading_legend(points: Sequence[_Point]) -> Legend:
    """What fill and shape of the markers mean, as far as they occur."""
    spans = [(GREY, ENGINE_SIZE, ENGINE), ("white", END_TO_END_SIZE, END_TO_END)]
    entries = [(_marker("o", size, face), _fold(text)) for face, size, text in spans]
    origins = {point.origin for point in points}
    for name in MARKERS:
        if name in origins:
            either = _marker(MARKERS[name], ENGINE_SIZE, GREY)
            either.set_fillstyle("left")
            entries.append((either, _fold(ORIGINS[name])))
    return "Markers of what was measured", entries


def _marker(shape: str, size: float, face: str) -> Line2D:
    line = Line2D([], [], color=GREY, marker=shape, markersize=size, markerfacecolor=face, linestyle="none")
    line.set_markeredgewidth(1.4)
    return line


def _fold(text: str) -> str:
    return "\n".join(textwrap.wrap(text, COLUMN_CHARACTERS))


def _captions(reports: Sequence[SpeedReport]) -> list[str]:
    """Small print: where the numbers come from."""
    parts = [f"Paper: {PAPER}, Table 2."]
    sources: dict[str, list[str]] = {}
    for report in reports:
        if report.ap is not None and report.ap_source:
            sources.setdefault(drawable(report.ap_source), []).append(drawable(Path(report.weights).name))
    parts += [f"AP of {', '.join(dict.fromkeys(names))}: {source}." for source, names in sources.items()]
    absent = [drawable(Path(report.weights).name) for report in reports if _point(report) is None]
    if absent:
        parts.append(f"Not measured at batch 1, so not drawn: {', '.join(absent)}.")
    return textwrap.wrap(" ".join(parts), CAPTION_CHARACTERS)


def _set_axes(axes: Axes, points: Sequence[_Point]) -> None:
    """Scales, limits and words; nothing moves after this, so that labels can be placed in pixels."""
    rows = [*_paper_rows("YOLOv7"), *(row for start, end, *_ in RIVALS for row in _paper_rows(start, end))]
    ours = [time for point in points for time in (point.engine_ms, point.end_to_end_ms)]
    times = [*ours, *(x for x, _ in map(_spot, rows))]
    precisions = [*(point.ap for point in points if point.ap is not None), *(y for _, y in map(_spot, rows))]
    if all(LINEAR_MS[0] <= time <= LINEAR_MS[1] for time in ours):
        axes.set_xlim(0.0, 1.06 * max(times))
        axes.set_xlabel("time of one image, batch 1 (ms)")
    else:
        axes.set_xscale("log")
        axes.set_xlim(min(times) / 1.35, 1.35 * max(times))
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("time of one image, batch 1 (ms, logarithmic)")
    room = 0.05 * (max(precisions) - min(precisions))
    foot = 2 * room if any(point.ap is None for point in points) else 0.0
    axes.set_ylim(min(precisions) - room - foot, max(precisions) + 1.5 * room)
    axes.set_ylabel("AP on COCO val2017 (%)")
    axes.grid(color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)


def _paper_rows(start: str, end: str = "") -> list[PaperRow]:
    """Rows of Table 2 by how their names begin and end, the quickest first."""
    rows = [row for row in TABLE_2 if row.model.startswith(start) and row.model.endswith(end)]
    return sorted(rows, key=_spot)


def _spot(row: PaperRow) -> Xy:
    """Milliseconds and AP, both of which every row of Table 2 has."""
    assert row.fps and row.val
    return 1000 / row.fps, row.val.ap


def _draw_measured(axes: Axes, points: Sequence[_Point], colours: dict[str, str], ground: LabelGround) -> list[_Label]:
    """Engine and end to end of every point, the engines of a series joined; gives the labels that are wanted."""
    for series, colour in colours.items():
        joined = sorted((p.engine_ms, p.ap) for p in points if p.series == series and p.ap is not None)
        if len(joined) > 1:
            axes.plot(*zip(*joined, strict=True), color=colour, linewidth=1.4, zorder=4)
            ground.add_line(_pixels(axes, joined))
    labels = []
    for point in points:
        colour, y = colours[point.series], axes.get_ylim()[0] if point.ap is None else point.ap
        spots = [(point.engine_ms, y), (point.end_to_end_ms, y)]
        axes.plot(*zip(*spots, strict=True), color=colour, linewidth=1.2, linestyle=":", zorder=4, clip_on=False)
        ground.add_line(_pixels(axes, spots), marker=_marker_px(END_TO_END_SIZE))
        faces, sizes = (colour, "white"), (ENGINE_SIZE, END_TO_END_SIZE)
        for spot, face, size, order in zip(spots, faces, sizes, (6, 5), strict=True):
            marker = _marker(MARKERS[point.origin], size, face)
            marker.set(xdata=[spot[0]], ydata=[y], color=colour, markerfacecolor=face, zorder=order, clip_on=False)
            axes.add_line(marker)
        labels.append(_Label(text=point.label, xy=spots[0], colour=colour))
    return labels


def _draw_paper(axes: Axes, ground: LabelGround) -> list[_Label]:
    """The rivals as grey series, YOLOv7 as the paper's line; gives the labels that are wanted."""
    for start, end, marker, dashes, tone in RIVALS:
        for size in (640, 1280):
            line = [_spot(row) for row in _paper_rows(start, end) if row.size == size]
            axes.add_line(_rival_line(line, marker, dashes, tone))
            ground.add_line(_pixels(axes, line), marker=_marker_px(PAPER_SIZE))
    rows = _paper_rows("YOLOv7")
    line = [_spot(row) for row in rows]
    axes.plot(*zip(*line, strict=True), color=PAPER_COLOUR, marker="s", markersize=PAPER_SIZE, linewidth=1.6, zorder=3)
    ground.add_line(_pixels(axes, line), marker=_marker_px(PAPER_SIZE))
    return [_Label(text=_shorten(row.model), xy=xy, colour=PAPER_COLOUR) for row, xy in zip(rows, line, strict=True)]


def _rival_line(points: Sequence[Xy], marker: str, dashes: tuple[float, ...], tone: str) -> Line2D:
    x, y = zip(*points, strict=True) if points else ((), ())
    line = Line2D(x, y, color=tone, marker=marker, linestyle=(0, dashes), linewidth=0.9, markersize=5.5, zorder=2)
    line.set_markeredgewidth(0.0)
    return line


def _pixels(axes: Axes, points: Sequence[Xy]) -> list[Xy]:
    return [(float(x), float(y)) for x, y in axes.transData.transform(points)] if points else []


def _marker_px(size: float) -> float:
    return math.sqrt(2) * size * DPI / 72  # diamonds stand on a corner


def _write_label(axes: Axes, label: _Label, ground: LabelGround) -> None:
    """Writes the label at the best free place near its point; one that finds none is left out."""
    text = axes.text(0, 0, label.text, color=label.colour, fontsize=7.5, ha="center", va="center", zorder=7)
    text.set_transform(IdentityTransform())
    text.set_path_effects([withStroke(linewidth=1.5, foreground="white")])
    extent = text.get_window_extent()
    (point,) = _pixels(axes, [label.xy])
    middle = ground.place(point, (extent.width + 4, extent.height + 2))
    if middle is None:
        text.remove()
        return
    text.set_position(middle)
    sides = zip(point, middle, (extent.width, extent.height), strict=True)
    nearest = [min(max(place, centre - side / 2), centre + side / 2) for place, centre, side in sides]
    if math.dist(point, nearest) > LEADER_PX:
        leader = Line2D(*zip(point, nearest, strict=True), color=label.colour, linewidth=0.6, zorder=3)
        leader.set_transform(IdentityTransform())
        axes.add_line(leader)
