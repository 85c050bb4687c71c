"""Calibrates, places, measures, and spares what INT8 costs too much."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from yolov7_deploy._charts import write_chart
from yolov7_deploy._console import table
from yolov7_deploy.datasets import Dataset
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import ExportError, LoadError, ParityError, UsageError
from yolov7_deploy.evaluation.accuracy import AccuracyReport, evaluate
from yolov7_deploy.evaluation.accuracy_drop import AccuracyDrop, accuracy_drop, summarize_drop
from yolov7_deploy.export.onnx_model import OnnxModel
from yolov7_deploy.inspection.onnx_file import int8_lines, int8_to_dict
from yolov7_deploy.options import Int8Options, QuantizeOptions, ValOptions
from yolov7_deploy.precision.calibrate import Calibration, calibrate, image_digest, images_digest, network_digest
from yolov7_deploy.precision.calibration_cache import (
    check_calibration,
    default_cache_path,
    load_calibration,
    save_calibration,
)
from yolov7_deploy.precision.calibration_images import CalibrationImages, count_overlap
from yolov7_deploy.precision.int8 import check_quantizable, to_int8
from yolov7_deploy.precision.int8_summary import Int8Summary, summarize_int8
from yolov7_deploy.precision.ort_runner import network_input
from yolov7_deploy.precision.sensitivity import LayerSensitivity, layer_sensitivities
from yolov7_deploy.precision.subgraph import Network

# Below this many, each spared layer is tried without the others; a trial is an AP measurement, which takes minutes.
MAX_PRUNED_LAYERS = 8


def min_excluded_layers(most_sensitive: Sequence[str], fits: Callable[[frozenset[str]], bool]) -> frozenset[str] | None:
    """A small set of layers to spare with which the model fits; `None` if it does not fit with all of them spared.

    The dearest one, two, four, ... are spared until it fits, then the number is halved in between. A rank is no proof
    that each of them is needed, so each of a few is tried in INT8 once more, the cheapest first.

    Args:
        dearest: All layers, the one that INT8 costs most first.
        fits: Measures with these spared; called with each set once.
    """
    least, most = 0, 1
    while not fits(frozenset(most_sensitive[:most])):
        if most >= len(most_sensitive):
            return None
        least, most = most, min(2 * most, len(most_sensitive))
    while most - least > 1:
        middle = (least + most) // 2
        if fits(frozenset(most_sensitive[:middle])):
            most = middle
        else:
            least = middle
    spared = frozenset(most_sensitive[:most])
    if most <= MAX_PRUNED_LAYERS:
        for layer in reversed(most_sensitive[: most - 1]):  # without the last it was tried already
            if len(spared) > 1 and fits(spared - {layer}):
                spared -= {layer}
    return spared


logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
Show = Callable[[str], AbstractContextManager[Progress]]
Say = Callable[[str], None]

RANKING_IMAGES = 2
TOLD_AGAINST = 0.3  # AP points; what `y7 verify` allows where nothing is asked


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """AP with some layers spared."""

    spared: tuple[str, ...]
    ap: float
    points: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantized:
    """An INT8 model and how it came about.

    Attributes:
        model: The graph with its metadata.
        calibration: What its ranges were chosen from.
        account: What of it is INT8.
        drop: AP it loses against float32; `None` where none was measured.
        costs: Of each layer, the dearest first; empty where they were not needed.
        trials: The AP measurements of the search, in order.
    """

    model: OnnxModel
    calibration: Calibration
    account: Int8Summary
    drop: AccuracyDrop | None
    costs: tuple[LayerSensitivity, ...]
    trials: tuple[Measurement, ...]


@contextmanager
def silent(_: str) -> Iterator[Progress]:
    """Shows nothing."""
    yield lambda done, total: None


class Quantizer:
    """One float32 model on its way to INT8.

    Args:
        model: The float32 graph.
        images: To calibrate on.
        options: See `QuantizeOptions`.
        data: To measure AP on, which should be other images.
        say: Called with each finished step.
        show: Opens a progress display for a step.

    Raises:
        ExportError: The model is of lower precision already.
    """

    def __init__(
        self,
        model: OnnxModel,
        images: CalibrationImages,
        options: QuantizeOptions,
        *,
        data: Dataset | None = None,
        say: Say = logger.info,
        show: Show = silent,
    ) -> None:
        check_quantizable(model)
        if options.max_drop is not None and data is None:
            raise UsageError("--max-drop is about AP, and there is nothing to measure it on.", fix="Add  --data D.yaml")
        self._model, self._images, self._options, self._data = model, images, options, data
        self._say, self._show = say, show
        self._reference: AccuracyReport | None = None
        self._trials: list[Measurement] = []
        self._reports: dict[frozenset[str], AccuracyReport] = {}

    def run(self) -> Quantized:
        """Calibrates, writes, measures, and spares layers where `max_drop` asks for it.

        Raises:
            ExportError: There is nothing to quantise, or values without a range.
            ParityError: More than `max_drop` is lost even with every layer spared.
            UsageError: The calibration file is of another model or of other images.
        """
        calibration = self._calibrated()
        options, model = self._options.int8, to_int8(self._model, calibration, self._options.int8)
        for note in model.metadata.notes[len(self._model.metadata.notes) :]:
            self._say(note)
        drop = self._measured(model, frozenset())
        exceeds = drop is not None and self._options.max_drop is not None and drop.points > self._options.max_drop
        costs = self._ranked(calibration, options) if exceeds or self._options.sensitivity else ()
        if exceeds and self._options.max_drop is not None:
            spared = self._search(calibration, costs, self._options.max_drop)
            model = to_int8(self._model, calibration, self._with(spared, costs))
            drop = self._drop(self._reports[frozenset(spared)])
            self._say(f"spared {len(spared)}: {', '.join(spared)}")
        model = self._told(model, drop)
        return Quantized(
            model=model,
            calibration=calibration,
            account=summarize_int8(model.proto),
            drop=drop,
            costs=costs,
            trials=tuple(self._trials),
        )

    # --- calibration --------------------------------------------------------------------------------------------------

    def _calibrated(self) -> Calibration:
        """From the file if it is of this model and these images, else measured and kept."""
        network = network_digest(Network(self._model))
        images = images_digest(image_digest(network_input(one, self._model.metadata)) for one in self._images)
        place = self._options.cache or default_cache_path(network, images)
        calibration = self._kept(place)
        if calibration is not None:
            check_calibration(calibration, place, network_sha256=network, images_sha256=images)
            self._say(f"calibration of {calibration.images} images from {place}")
        else:
            with self._show("calibrate") as progress:
                calibration = calibrate(self._model, self._images, count=len(self._images), progress=progress)
            self._say(f"calibrated on {calibration.images} images, {self._keep(calibration, place)}")
        return replace(calibration, notes=(*self._images.notes, *self._overlapping()))

    def _kept(self, place: Path) -> Calibration | None:
        """What is in the file; one in the cache folder that cannot be read is made again."""
        if not place.exists():
            return None
        try:
            return load_calibration(place)
        except LoadError as error:
            if self._options.cache is not None:
                raise
            self._say(f"made again: {error.message}")
            return None

    def _keep(self, calibration: Calibration, place: Path) -> str:
        """Writes the file; that the cache folder cannot be written is no reason to stop."""
        try:
            save_calibration(calibration, place)
        except ExportError as error:
            if self._options.cache is not None:
                raise
            return f"not kept: {error.message}"
        return f"kept in {place}"

    def _overlapping(self) -> tuple[str, ...]:
        if self._data is None:
            return ()
        both = count_overlap(self._images, [self._data.path(index) for index in range(len(self._data))])
        return (f"{both} of the images AP is measured on were calibrated on",) if both else ()

    # --- accuracy -----------------------------------------------------------------------------------------------------

    def _measured(self, model: OnnxModel, spared: frozenset[str]) -> AccuracyDrop | None:
        if self._data is None:
            return None
        if self._reference is None:
            self._reference = self._accuracy(self._model, "AP of float32")
        report = self._reports[spared] = self._accuracy(model, f"AP of INT8 with {len(spared)} spared")
        drop = self._drop(report)
        trial = Measurement(spared=tuple(sorted(spared)), ap=drop.ap, points=drop.points)
        self._trials.append(trial)
        self._say(f"AP {drop.reference_ap:.4f} in float32, {drop.ap:.4f} in INT8 with {len(spared)} layers spared")
        return drop

    def _drop(self, report: AccuracyReport) -> AccuracyDrop:
        assert self._data is not None and self._reference is not None
        return accuracy_drop(self._data, range(len(self._data)), self._reference.predictions, report.predictions)

    def _accuracy(self, model: OnnxModel, what: str) -> AccuracyReport:
        """By the shipped path: the file as it will be written, in ONNX Runtime, by the plain letterbox."""
        assert self._data is not None
        with tempfile.TemporaryDirectory(prefix="y7-int8-") as folder:
            path = Path(folder) / "model.onnx"
            model.save(path)
            with Detector(path, device="cpu") as detector, self._show(what) as progress:
                return evaluate(detector, self._data, options=ValOptions(rect=False, batch=1), progress=progress)

    # --- what is spared -----------------------------------------------------------------------------------------------

    def _ranked(self, calibration: Calibration, options: Int8Options) -> tuple[LayerSensitivity, ...]:
        step = max(1, calibration.images // RANKING_IMAGES)
        few = list(islice(self._images, 0, step * RANKING_IMAGES, step))
        with self._show("cost of each layer") as progress:
            costs = layer_sensitivities(self._model, calibration, few, options, progress=progress)
        self._say(f"ranked {len(costs)} layers by what INT8 costs in each; the dearest is {costs[0].layer}")
        return costs

    def _search(
        self, calibration: Calibration, costs: tuple[LayerSensitivity, ...], max_drop: float
    ) -> tuple[str, ...]:
        def fits(layers: frozenset[str]) -> bool:
            model = to_int8(self._model, calibration, self._with(layers, costs))
            drop = self._measured(model, layers)
            return drop is not None and drop.points <= max_drop

        spared = min_excluded_layers([cost.layer for cost in costs[:-1]], fits)
        if spared is None:
            raise ParityError(
                f"INT8 loses more than {max_drop:g} AP points even with all layers but one spared: it is lost "
                "elsewhere, or the images are too few to tell.",
                fix="Allow more (--max-drop), measure on more images (--data), or take  --precision fp16",
            )
        return tuple(cost.layer for cost in costs if cost.layer in spared)

    def _with(self, layers: frozenset[str] | tuple[str, ...], costs: tuple[LayerSensitivity, ...]) -> Int8Options:
        error = {cost.layer: cost.error for cost in costs}
        reasons: Mapping[str, str] = {
            layer: f"spared for AP: alone in INT8 it moves the head by {error[layer]:.3g}" for layer in layers
        }
        return replace(self._options.int8, exclude={**self._options.int8.exclude, **reasons})

    def _told(self, model: OnnxModel, drop: AccuracyDrop | None) -> OnnxModel:
        """The AP goes into the metadata too."""
        if drop is None:
            return model
        words = summarize_drop(drop, TOLD_AGAINST if self._options.max_drop is None else self._options.max_drop)
        self._say(words)
        return OnnxModel.of(model.proto, replace(model.metadata, notes=(*model.metadata.notes, words)))


SHOWN = 20  # layers in the table; all are in the JSON


def describe(result: Quantized) -> str:
    """What was found beyond the steps that were told on the way: pairs, costs of layers, AP of the search."""
    parts = ["\n".join(int8_lines(result.account))]
    if result.costs:
        kept = {layer for layer, _ in result.model.metadata.int8.float_layers} if result.model.metadata.int8 else set()
        rows: list[list[object]] = [
            [cost.layer, f"{cost.error:.4f}", _percent(cost.share), "kept float" if cost.layer in kept else ""]
            for cost in result.costs[:SHOWN]
        ]
        title = f"what INT8 costs alone in a layer, the {len(rows)} dearest of {len(result.costs)}"
        parts.append(table(rows, ["layer", "head error", "of all MACs", ""], title))
    if len(result.trials) > 1:
        rows = [[len(trial.spared), f"{trial.ap:.4f}", f"{trial.points:+.2f}"] for trial in result.trials]
        parts.append(table(rows, ["layers spared", "AP", "points lost"], "AP measured on the way"))
    return "\n\n".join(part for part in parts if part)


def to_dict(result: Quantized) -> dict[str, Any]:
    """The whole record for machines."""
    return {
        "calibration": {
            "images": result.calibration.images,
            "images_sha256": result.calibration.images_sha256,
            "network_sha256": result.calibration.network_sha256,
        },
        "account": int8_to_dict(result.account),
        "accuracy": None if result.drop is None else result.drop.to_dict(),
        "layers": [
            {"layer": cost.layer, "head_error": cost.error, "share_of_macs": cost.share} for cost in result.costs
        ],
        "trials": [{"spared": list(trial.spared), "ap": trial.ap, "points": trial.points} for trial in result.trials],
        "notes": list(result.model.metadata.notes),
    }


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


DPI = 110
WIDTH, ROW, MARGIN = 9.0, 0.17, 1.5  # inches
# Wong's palette (Nature Methods 8, 441, 2011), which colour-blind readers can tell apart.
INT8_COLOUR, SPARED_COLOUR = "#0072B2", "#D55E00"


def write_sensitivity_chart(result: Quantized, path: Path, *, title: str) -> None:
    """A PNG with a bar for each layer in the order they run: how far it moves the head maps when it alone is INT8.

    Layers that stayed float in the file have another colour. Same result, same bytes; the file appears complete or not
    at all.

    Raises:
        UsageError: The name does not end in .png, or the file cannot be written.
    """
    write_chart(lambda: _figure(result, title), path, dpi=DPI)


def _figure(result: Quantized, title: str) -> Figure:
    order = {cost.name: place for place, cost in enumerate(result.account.convolutions)}
    costs = sorted(result.costs, key=lambda cost: order.get(cost.layer, -1))
    int8 = result.model.metadata.int8
    spared = {layer for layer, _ in int8.float_layers} if int8 else set()
    figure = Figure(figsize=(WIDTH, MARGIN + ROW * len(costs)))
    FigureCanvasAgg(figure)
    axes: Axes = figure.add_axes((0.2, 0.75 / figure.get_figheight(), 0.76, 1 - MARGIN / figure.get_figheight()))
    colours = [SPARED_COLOUR if cost.layer in spared else INT8_COLOUR for cost in costs]
    axes.barh(range(len(costs)), [cost.error for cost in costs], color=colours, height=0.75)
    axes.set_yticks(range(len(costs)), [cost.layer for cost in costs], fontsize=7)
    axes.set_ylim(len(costs) - 0.4, -0.6)
    axes.set_xlabel("root mean squared change of the head maps (logits, weighted with objectness)", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(f"{title}: what INT8 costs in each layer alone", fontsize=10, loc="left")
    if spared.intersection(cost.layer for cost in costs):
        handles = [Patch(color=INT8_COLOUR, label="INT8"), Patch(color=SPARED_COLOUR, label="stays float")]
        axes.legend(handles=handles, fontsize=8, loc="lower right")
    return figure
