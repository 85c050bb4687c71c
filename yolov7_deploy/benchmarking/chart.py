"""Chart of accuracy against speed, like figure 1 of the paper, with measured detectors on it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from yolov7_deploy._charts import GREY, chart_style, replace_missing_glyphs, write_chart
from yolov7_deploy.benchmarking.report import SpeedReport
from yolov7_deploy.paper import PAPER, TABLE_2, VARIANTS, PaperRow

DPI = 160
WIDTH, HEIGHT, MIN_AXES_HEIGHT = 10.0, 6.25, 3.4  # of the image and of the axes, in inches
# Wong's palette (Nature Methods 8, 441, 2011), which colour-blind readers can distinguish. The paper's line is blue.
PAPER_COLOUR = "#0072B2"
COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000", "#56B4E9")
# Other detectors in the paper: start and end of their names, marker, dashes, grey tone.
OTHER_DETECTORS: tuple[tuple[str, str, str, tuple[float, ...], str], ...] = (
    ("YOLOR", "", "s", (), "#8C8C8C"),
    ("PPYOLOE", "", "P", (4, 2), "#A6A6A6"),
    ("YOLOX", "", "X", (6, 2, 1, 2), "#A6A6A6"),
    ("YOLOv5", "(r6.1)", "*", (1, 2), "#8C8C8C"),
)
# Markers of measured detectors, by the origin of the AP.
MARKERS = {"measured": "o", "published": "D", "unknown": "v"}
ORIGINS = {
    "measured": "AP measured with this file",
    "published": "AP published for the official model, not measured with this file",
    "unknown": "AP not known at this size: drawn at the bottom",
}
ENGINE = "engine: the network, and NMS where the file has it"
END_TO_END = "end to end: from an image in memory to its boxes"
# The axis is linear, as in the paper, if all times are in this range; the slowest detector in the paper takes 29 ms.
LINEAR_MS = (0.8, 40.0)
ENGINE_SIZE, END_TO_END_SIZE, PAPER_SIZE = 6.5, 10.0, 5.0  # of markers, in points
LEFT, COLUMNS = 0.06, (0.06, 0.34, 0.66)  # of axes and legends, in figure widths
COLUMN_CHARACTERS, CAPTION_CHARACTERS, LABEL_CHARACTERS = 44, 170, 28
MARGIN, XLABEL, LEGEND_LINE, CAPTION_LINE = 0.19, 0.53, 0.172, 0.122  # heights in inches
LEADER_PX = 30  # a label that is farther from its point gets a line to it
# Positions that are tried for a label: directions around its point, and pixels from the point to the label.
DIRECTIONS = 32
RADII = (14, 18, 24, 32, 42, 54, 68, 84, 104, 128, 160, 200, 250)
DOT_SPACING = 6  # pixels between the dots that represent a line
DOT_COST = 12.0  # cost of covering a dot, in pixels of distance

Xy = tuple[float, float]
Box = tuple[float, float, float, float]  # left, bottom, right, top


@dataclass(frozen=True, kw_only=True, slots=True)
class _Point:
    """One report at batch 1.

    Attributes:
        label: Text near the point, such as the name of the model.
        series: Machine, runtime and precision.
        engine_ms, end_to_end_ms: Medians.
        ap: AP in percent; `None` where unknown.
        origin: Origin of the AP, a key of `ORIGINS`.
    """

    label: str
    series: str
    engine_ms: float
    end_to_end_ms: float
    ap: float | None
    origin: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Label:
    """A text to be placed near a point of the axes."""

    text: str
    xy: Xy
    colour: str


Legend = tuple[str, list[tuple[Line2D, str]]]


def speed_accuracy_chart(reports: Sequence[SpeedReport], path: Path) -> None:
    """Write a PNG of AP against time at batch 1: the paper's detectors, and engine and end-to-end time of each report.

    The paper is left out if a report is of a model with other classes than COCO, whose AP is not comparable.

    The image has 1600 x 1000 pixels, and is higher where many reports need a long legend. AP is the one measured with
    the file of a report; otherwise that of the report's row of the paper if sizes agree, which is drawn differently. A
    report without either shows only its time. A report without a row of batch 1 is named below the chart. The time axis
    is linear like the paper's, and logarithmic where times are far apart. The same reports give the same bytes. The
    file is written atomically, and missing folders are created.

    Raises:
        UsageError: The name does not end in .png, or the file cannot be written.
    """
    write_chart(lambda: draw_chart(reports), path, dpi=DPI)


@chart_style()
def draw_chart(reports: Sequence[SpeedReport], *, labels: Sequence[str] = ()) -> Figure:
    """Return the chart as a matplotlib figure; `labels` replace the names of the models."""
    names = labels or [VARIANTS.get(report.variant, Path(report.weights).stem) for report in reports]
    points = [point for report, name in zip(reports, names, strict=True) if (point := _point(report, name))]
    with_paper = all(report.is_coco for report in reports)
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(p.series for p in points))}
    legends = [*([_paper_legend()] if with_paper else []), _measured_legend(colours), _marker_legend(points)]
    captions = _captions(reports, with_paper=with_paper)
    lines = max(1 + sum(text.count("\n") + 1 for _, text in entries) for _, entries in legends)
    top = MARGIN + CAPTION_LINE * len(captions) + LEGEND_LINE * lines
    height = max(HEIGHT, top + XLABEL + MIN_AXES_HEIGHT + MARGIN)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    FigureCanvasAgg(figure)  # attaches itself to the figure
    axes = figure.add_axes((LEFT, (top + XLABEL) / height, 0.92, (height - top - XLABEL - MARGIN) / height))
    _set_axes(axes, points, with_paper=with_paper)
    layout = LabelLayout(frame=axes.bbox.extents)
    drawn = _draw_measured(axes, points, colours, layout)
    if with_paper:
        drawn += _draw_paper(axes, layout)
    for label in drawn:
        _draw_label(axes, label, layout)
    for x, (title, entries) in zip(COLUMNS, legends, strict=False):
        handles, texts = zip(*entries, strict=True)
        corner = (x, top / height)
        legend = figure.legend(handles, texts, title=title, loc="upper left", bbox_to_anchor=corner, alignment="left")
        legend.get_title().set_fontweight("bold")
    figure.text(LEFT, 0.1 / height, "\n".join(captions), fontsize=6.5, color=GREY, va="bottom", linespacing=1.3)
    return figure


def _point(report: SpeedReport, label: str = "") -> _Point | None:
    """Return the report at batch 1; `None` where it was not measured there."""
    row = next((row for row in report.rows if row.batch == 1), None)
    if row is None:
        return None
    # AP that is published for one size does not apply to another.
    has_size = report.paper is not None and report.paper.size == max(report.input_hw)
    published = report.paper.ap if report.paper and has_size and report.is_coco else None
    origin = "measured" if report.ap is not None else "unknown" if published is None else "published"
    return _Point(
        label=_shorten(label),
        series=replace_missing_glyphs(f"{report.machine}, {report.runtime} {report.precision}"),
        engine_ms=row.stage("engine").p50,
        end_to_end_ms=row.stage("end_to_end").p50,
        ap=published if report.ap is None else 100 * report.ap,
        origin=origin,
    )


def _shorten(name: str) -> str:
    """Return a short label: `v7-X` for `YOLOv7-X`."""
    text = replace_missing_glyphs(name.removeprefix("YOLO"))
    return text if len(text) <= LABEL_CHARACTERS else f"{text[: LABEL_CHARACTERS - 1]}…"


def _paper_legend() -> Legend:
    entries = [(Line2D([], [], color=PAPER_COLOUR, marker="s", markersize=PAPER_SIZE, linewidth=1.6), "YOLOv7")]
    entries += [
        (_other_line([], marker, dashes, tone), f"{start} {end}".rstrip())
        for start, end, marker, dashes, tone in OTHER_DETECTORS
    ]
    return "Paper: V100, PyTorch FP16, network only", entries


def _measured_legend(colours: dict[str, str]) -> Legend:
    entries = [
        (Line2D([], [], color=colour, linewidth=5, solid_capstyle="butt"), _wrap(series))
        for series, colour in colours.items()
    ]
    return "Measured (medians)", entries or [(Line2D([], [], linestyle="none"), "nothing at batch 1")]


def _marker_legend(points: Sequence[_Point]) -> Legend:
    """Explain fill and shape of the markers that occur."""
    stages = [(GREY, ENGINE_SIZE, ENGINE), ("white", END_TO_END_SIZE, END_TO_END)]
    entries = [(_marker("o", size, face), _wrap(text)) for face, size, text in stages]
    origins = {point.origin for point in points}
    for name in MARKERS:
        if name in origins:
            either = _marker(MARKERS[name], ENGINE_SIZE, GREY)
            either.set_fillstyle("left")
            entries.append((either, _wrap(ORIGINS[name])))
    return "Markers of measured detectors", entries


def _marker(shape: str, size: float, face: str) -> Line2D:
    line = Line2D([], [], color=GREY, marker=shape, markersize=size, markerfacecolor=face, linestyle="none")
    line.set_markeredgewidth(1.4)
    return line


def _wrap(text: str) -> str:
    return "\n".join(textwrap.wrap(text, COLUMN_CHARACTERS))


def _captions(reports: Sequence[SpeedReport], *, with_paper: bool) -> list[str]:
    """Return the sources of the numbers, for the bottom of the chart."""
    parts = [f"Paper: {PAPER}, Table 2."] if with_paper else ["Models with other classes than COCO: not in the paper."]
    sources: dict[str, list[str]] = {}
    for report in reports:
        if report.ap is not None and report.ap_source:
            sources.setdefault(replace_missing_glyphs(report.ap_source), []).append(_file_name(report))
    parts += [f"AP of {', '.join(dict.fromkeys(names))}: {source}." for source, names in sources.items()]
    missing = [_file_name(report) for report in reports if _point(report) is None]
    if missing:
        parts.append(f"Not measured at batch 1, so not drawn: {', '.join(missing)}.")
    return textwrap.wrap(" ".join(parts), CAPTION_CHARACTERS)


def _file_name(report: SpeedReport) -> str:
    return replace_missing_glyphs(Path(report.weights).name)


def _set_axes(axes: Axes, points: Sequence[_Point], *, with_paper: bool) -> None:
    """Set scales, limits and titles. Nothing moves after this, so labels can be placed in pixels."""
    rows = [*_paper_rows("YOLOv7"), *(row for start, end, *_ in OTHER_DETECTORS for row in _paper_rows(start, end))]
    in_paper = [_paper_xy(row) for row in rows] if with_paper else []
    measured_ms = [time for point in points for time in (point.engine_ms, point.end_to_end_ms)]
    times = [*measured_ms, *(x for x, _ in in_paper)] or [*LINEAR_MS]
    aps = [*(point.ap for point in points if point.ap is not None), *(y for _, y in in_paper)]
    _set_time_axis(axes, times, is_linear=all(LINEAR_MS[0] <= time <= LINEAR_MS[1] for time in measured_ms))
    low, high = (min(aps), max(aps)) if aps else (0.0, 100.0)
    margin = 0.05 * (high - low) or 1.0
    bottom = 2 * margin if any(point.ap is None for point in points) else 0.0
    axes.set_ylim(low - margin - bottom, high + 1.5 * margin)
    axes.set_ylabel("AP on COCO val2017 (%)" if with_paper else "AP on the model's own classes (%)")
    axes.yaxis.set_visible(bool(aps))
    axes.grid(color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)


def _set_time_axis(axes: Axes, times: Sequence[float], *, is_linear: bool) -> None:
    if is_linear:
        axes.set_xlim(0.0, 1.06 * max(times))
        axes.set_xlabel("time per image, batch 1 (ms)")
    else:
        axes.set_xscale("log")
        axes.set_xlim(min(times) / 1.35, 1.35 * max(times))
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("time per image, batch 1 (ms, logarithmic)")


def _paper_rows(start: str, end: str = "") -> list[PaperRow]:
    """Return the rows of Table 2 whose names start and end like this, fastest first."""
    rows = [row for row in TABLE_2 if row.model.startswith(start) and row.model.endswith(end)]
    return sorted(rows, key=_paper_xy)


def _paper_xy(row: PaperRow) -> Xy:
    """Return milliseconds and AP, which every row of Table 2 has."""
    assert row.fps and row.val
    return 1000 / row.fps, row.val.ap


def _draw_measured(axes: Axes, points: Sequence[_Point], colours: dict[str, str], layout: LabelLayout) -> list[_Label]:
    """Draw engine and end-to-end time of every point, join the engine times of a series, and return the labels."""
    for series, colour in colours.items():
        joined = sorted((p.engine_ms, p.ap) for p in points if p.series == series and p.ap is not None)
        if len(joined) > 1:
            axes.plot(*zip(*joined, strict=True), color=colour, linewidth=1.4, zorder=4)
            layout.add_line(_pixels(axes, joined))
    labels = []
    for point in points:
        colour, y = colours[point.series], axes.get_ylim()[0] if point.ap is None else point.ap
        positions = [(point.engine_ms, y), (point.end_to_end_ms, y)]
        axes.plot(*zip(*positions, strict=True), color=colour, linewidth=1.2, linestyle=":", zorder=4, clip_on=False)
        layout.add_line(_pixels(axes, positions), marker=_marker_px(END_TO_END_SIZE))
        faces, sizes = (colour, "white"), (ENGINE_SIZE, END_TO_END_SIZE)
        for position, face, size, order in zip(positions, faces, sizes, (6, 5), strict=True):
            marker = _marker(MARKERS[point.origin], size, face)
            marker.set(xdata=[position[0]], ydata=[y], color=colour, markerfacecolor=face, zorder=order, clip_on=False)
            axes.add_line(marker)
        labels.append(_Label(text=point.label, xy=positions[0], colour=colour))
    return labels


def _draw_paper(axes: Axes, layout: LabelLayout) -> list[_Label]:
    """Draw other detectors as grey series and YOLOv7 as the paper's line, and return the labels."""
    for start, end, marker, dashes, tone in OTHER_DETECTORS:
        for size in (640, 1280):
            line = [_paper_xy(row) for row in _paper_rows(start, end) if row.size == size]
            axes.add_line(_other_line(line, marker, dashes, tone))
            layout.add_line(_pixels(axes, line), marker=_marker_px(PAPER_SIZE))
    rows = _paper_rows("YOLOv7")
    line = [_paper_xy(row) for row in rows]
    axes.plot(*zip(*line, strict=True), color=PAPER_COLOUR, marker="s", markersize=PAPER_SIZE, linewidth=1.6, zorder=3)
    layout.add_line(_pixels(axes, line), marker=_marker_px(PAPER_SIZE))
    return [_Label(text=_shorten(row.model), xy=xy, colour=PAPER_COLOUR) for row, xy in zip(rows, line, strict=True)]


def _other_line(points: Sequence[Xy], marker: str, dashes: tuple[float, ...], tone: str) -> Line2D:
    x, y = zip(*points, strict=True) if points else ((), ())
    line = Line2D(x, y, color=tone, marker=marker, linestyle=(0, dashes), linewidth=0.9, markersize=5.5, zorder=2)
    line.set_markeredgewidth(0.0)
    return line


def _pixels(axes: Axes, points: Sequence[Xy]) -> list[Xy]:
    return [(float(x), float(y)) for x, y in axes.transData.transform(points)] if points else []


def _marker_px(size: float) -> float:
    return math.sqrt(2) * size * DPI / 72  # a diamond is a square on its corner


def _draw_label(axes: Axes, label: _Label, layout: LabelLayout) -> None:
    """Draw the label at the best free position near its point; leave it out if there is none."""
    text = axes.text(0, 0, label.text, color=label.colour, fontsize=7.5, ha="center", va="center", zorder=7)
    # Positions are in pixels at `DPI`; in inches they are right in an SVG, too, which has 72 dots per inch.
    inches = axes.figure.dpi_scale_trans
    text.set_transform(inches)
    text.set_path_effects([withStroke(linewidth=1.5, foreground="white")])
    extent = text.get_window_extent()
    (point,) = _pixels(axes, [label.xy])
    centre = layout.place(point, (extent.width + 4, extent.height + 2))
    if centre is None:
        text.remove()
        return
    text.set_position((centre[0] / DPI, centre[1] / DPI))
    axis_values = zip(point, centre, (extent.width, extent.height), strict=True)
    nearest = [min(max(value, middle - side / 2), middle + side / 2) for value, middle, side in axis_values]
    if math.dist(point, nearest) > LEADER_PX:
        ends = np.array([point, nearest]).T / DPI
        leader = Line2D(*ends, color=label.colour, linewidth=0.6, zorder=3)
        leader.set_transform(inches)
        axes.add_line(leader)


# --- label layout -----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class LabelLayout:
    """Positions for labels: near their points, on no other label or marker, and over few lines; all in pixels.

    Attributes:
        frame: Area that all labels stay inside.
        boxes: Areas that no label touches; every placed label is added.
        dots: Points along lines, which a label covers only where the alternative is farther away.
    """

    frame: Box
    boxes: list[Box] = field(default_factory=list)
    dots: list[Xy] = field(default_factory=list)

    def add_line(self, points: Sequence[Xy], *, marker: float = 0.0) -> None:
        """Add a line through the points, with markers of this width on them (0: no markers)."""
        for (x1, y1), (x2, y2) in pairwise(points):
            steps = max(1, round(math.hypot(x2 - x1, y2 - y1) / DOT_SPACING))
            self.dots += [(x1 + (x2 - x1) * i / steps, y1 + (y2 - y1) * i / steps) for i in range(steps + 1)]
        half = marker / 2
        if marker:
            self.boxes += [(x - half, y - half, x + half, y + half) for x, y in points]

    def place(self, xy: Xy, size: tuple[float, float]) -> Xy | None:
        """Place a label of this (width, height) near a point, and return its centre; `None` if no position is free."""
        left, bottom, right, top = self._candidates(xy, size).T
        frame = self.frame
        free = (left >= frame[0]) & (bottom >= frame[1]) & (right <= frame[2]) & (top <= frame[3])
        for box in self.boxes:
            free &= (left >= box[2]) | (right <= box[0]) | (bottom >= box[3]) | (top <= box[1])
        if not free.any():
            return None
        x, y = np.array(self.dots, dtype=np.float64).reshape(-1, 2).T[:, :, None]
        covered = ((x >= left) & (x <= right) & (y >= bottom) & (y <= top)).sum(axis=0)
        cost = np.repeat(RADII, DIRECTIONS) + DOT_COST * covered
        best = int(np.where(free, cost, np.inf).argmin())
        self.boxes.append((float(left[best]), float(bottom[best]), float(right[best]), float(top[best])))
        return float(left[best] + right[best]) / 2, float(bottom[best] + top[best]) / 2

    @staticmethod
    def _candidates(xy: Xy, size: tuple[float, float]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        """Return boxes [RADII x DIRECTIONS, 4] around the point, nearest first."""
        angle = 2 * np.pi * np.arange(DIRECTIONS) / DIRECTIONS
        radius = np.array(RADII, dtype=np.float64)[:, None]
        x = (xy[0] + np.cos(angle) * (radius + size[0] / 2)).ravel()
        y = (xy[1] + np.sin(angle) * (radius + size[1] / 2)).ravel()
        return np.stack([x - size[0] / 2, y - size[1] / 2, x + size[0] / 2, y + size[1] / 2], axis=1)
