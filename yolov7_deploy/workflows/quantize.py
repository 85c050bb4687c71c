"""INT8 quantization: calibrate, convert, measure AP, and exclude the layers that INT8 costs most."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolov7_deploy._console import plural, table
from yolov7_deploy._process import temporary_folder
from yolov7_deploy._text import get_logger
from yolov7_deploy.datasets import Dataset
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import ExportError, LoadError, ParityError, UsageError
from yolov7_deploy.hardware.machine import find_int8_target
from yolov7_deploy.image import Image
from yolov7_deploy.inspection.onnx_file import int8_lines, int8_to_dict
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.options import Int8Options, QuantizeOptions, ValOptions
from yolov7_deploy.precision.calibrate import Calibration, calibrate, image_digest, images_digest, network_digest
from yolov7_deploy.precision.calibration_cache import (
    check_calibration,
    default_cache_path,
    load_calibration,
    save_calibration,
)
from yolov7_deploy.precision.calibration_images import CalibrationImages, count_overlap
from yolov7_deploy.precision.int8 import RoundedConvolution, check_quantizable, to_int8
from yolov7_deploy.precision.int8_summary import Int8Summary, summarize_int8
from yolov7_deploy.precision.ort_runner import network_input
from yolov7_deploy.precision.sensitivity import (
    FLOOR_IMAGES,
    LayerSensitivity,
    choose_silu_floor,
    layer_sensitivities,
)
from yolov7_deploy.precision.subgraph import Network
from yolov7_deploy.precision.weight_rounding import ROUNDING_IMAGES, round_weights

if TYPE_CHECKING:
    from yolov7_deploy.evaluation.accuracy import AccuracyReport
    from yolov7_deploy.evaluation.accuracy_drop import AccuracyDrop

logger = get_logger(__name__)

Progress = Callable[[int, int], None]
Show = Callable[[str], AbstractContextManager[Progress]]
Log = Callable[[str], None]

RANKING_IMAGES = 2
DEFAULT_MAX_DROP = 0.3  # AP points; the limit of `y7 verify`
# With more excluded layers than this, the search does not try to return single layers to INT8: each trial is an AP
# measurement, which takes minutes.
MAX_PRUNED_LAYERS = 8
MAX_TABLE_ROWS = 20  # layers in the table; the JSON has all


def min_excluded_layers(most_sensitive: Sequence[str], fits: Callable[[frozenset[str]], bool]) -> frozenset[str] | None:
    """Return a small set of layers to exclude from INT8; `None` if the model fits with no such set.

    The search excludes the first 1, 2, 4, ... layers until the model fits, then bisects. The order does not prove that
    each of them is necessary: if they are few, each is tried in INT8 again, the least sensitive first.

    Args:
        most_sensitive: All layers, most sensitive first.
        fits: Whether the model fits without these layers in INT8; called once for each set.
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
    excluded = frozenset(most_sensitive[:most])
    if most <= MAX_PRUNED_LAYERS:
        for layer in reversed(most_sensitive[: most - 1]):  # the set without the last one did not fit
            if len(excluded) > 1 and fits(excluded - {layer}):
                excluded -= {layer}
    return excluded


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """AP with some layers excluded from INT8.

    Attributes:
        excluded: Names of the layers.
        ap: AP, 0 to 1.
        points: AP points (of 100) lost against FP32.
        low, high: 95 % confidence interval of `points`; `None` if unknown.
        share: Fraction of all multiply-accumulates in INT8; `None` for dynamic shapes.
    """

    excluded: tuple[str, ...]
    ap: float
    points: float
    low: float | None
    high: float | None
    share: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantized:
    """Result of a quantization.

    Attributes:
        model: The INT8 graph with its metadata.
        calibration: Calibration from which the activation ranges were chosen.
        summary: Which layers of the graph are INT8.
        drop: AP lost against FP32; `None` if it was not measured.
        sensitivities: Sensitivity of each layer, most sensitive first; empty if not requested and not needed.
        measurements: AP measurements of the search, in order.
    """

    model: OnnxModel
    calibration: Calibration
    summary: Int8Summary
    drop: AccuracyDrop | None
    sensitivities: tuple[LayerSensitivity, ...]
    measurements: tuple[Measurement, ...]


def choose_int8_options(
    target: str,
    reduce_range: bool | None,
    *,
    method: str | None = None,
    rounding: str = "nearest",
    for_engine: bool = False,
) -> Int8Options:
    """Return the options of an INT8 file for a target.

    Args:
        target: One of `INT8_TARGETS`, or `auto` for this machine.
        reduce_range: Weights of 7 bits; `None` is the default of the target.
        method: See `Int8Options`; `None` is the default of the target.
        rounding: See `Int8Options`.
        for_engine: A TensorRT engine will be built from the file: `auto` is `tensorrt`.
    """
    if target == "auto":
        target = "tensorrt" if for_engine else "cpu" if reduce_range else find_int8_target()
    return Int8Options(target=target, reduce_range=reduce_range, method=method or "", rounding=rounding)


@contextmanager
def silent(_: str) -> Iterator[Progress]:
    """Show no progress."""
    yield lambda done, total: None


class Quantizer:
    """Quantizes one FP32 model.

    Args:
        model: The FP32 graph.
        images: Calibration images.
        options: See `QuantizeOptions`.
        data: Labelled images on which to measure AP; they should not be calibration images.
        log: Called with each finished step.
        show: Opens a progress display for a step.

    Raises:
        ExportError: The model already has a lower precision.
        UsageError: `max_drop` without `data`.
    """

    def __init__(
        self,
        model: OnnxModel,
        images: CalibrationImages,
        options: QuantizeOptions,
        *,
        data: Dataset | None = None,
        log: Log = logger.info,
        show: Show = silent,
    ) -> None:
        check_quantizable(model)
        if options.max_drop is not None and data is None:
            raise UsageError("--max-drop limits the loss of AP, which requires a dataset.", fix="Add  --data D.yaml")
        self._model, self._images, self._options, self._data = model, images, options, data
        self._log, self._show = log, show
        self._reference: AccuracyReport | None = None
        self._measurements: list[Measurement] = []
        self._drops: dict[frozenset[str], AccuracyDrop] = {}
        self._rounded: dict[str, RoundedConvolution] | None = None

    def run(self) -> Quantized:
        """Calibrate, convert and measure the model, and exclude layers until it loses at most `max_drop`.

        Raises:
            ExportError: The graph has nothing to quantize, or values without a range.
            ParityError: It loses more than `max_drop` even with all layers but one excluded.
            UsageError: The calibration file belongs to another model or other images.
        """
        calibration = self._calibrate()
        few = self._some_images(calibration, FLOOR_IMAGES)
        options = choose_silu_floor(self._model, calibration, few, self._options.int8)
        self._options = replace(self._options, int8=options)
        if options.rounding != "nearest":
            self._rounded = self._round_weights(calibration, options)
        model = to_int8(self._model, calibration, options, self._rounded)
        for note in model.metadata.notes[len(self._model.metadata.notes) :]:
            self._log(note)
        drop = self._measure_drop(model, frozenset())
        exceeds = drop is not None and self._options.max_drop is not None and drop.points > self._options.max_drop
        sensitivities = self._rank_layers(calibration, options) if exceeds or self._options.sensitivity else ()
        if exceeds and self._options.max_drop is not None:
            excluded = self._search(calibration, sensitivities, self._options.max_drop)
            model = to_int8(self._model, calibration, self._excluding(excluded, sensitivities), self._rounded)
            drop = self._drops[frozenset(excluded)]
            self._log(f"excluded {plural(len(excluded), 'layer')} from INT8: {', '.join(excluded)}")
        model = self._with_drop_note(model, drop)
        return Quantized(
            model=model,
            calibration=calibration,
            summary=summarize_int8(model.proto),
            drop=drop,
            sensitivities=sensitivities,
            measurements=tuple(self._measurements),
        )

    # --- calibration --------------------------------------------------------------------------------------------------

    def _calibrate(self) -> Calibration:
        """Return the calibration from the cache file, or calibrate and save it there."""
        network = network_digest(Network(self._model))
        images = images_digest(image_digest(network_input(one, self._model.metadata)) for one in self._images)
        path = self._options.cache or default_cache_path(network, images)
        calibration = self._load_cached(path)
        if calibration is not None:
            check_calibration(calibration, path, network_sha256=network, images_sha256=images)
            self._log(f"calibration of {calibration.images} images from {path}")
        else:
            with self._show("calibrate") as progress:
                calibration = calibrate(self._model, self._images, count=len(self._images), progress=progress)
            self._log(f"calibrated on {calibration.images} images, {self._save(calibration, path)}")
        return replace(calibration, notes=(*self._images.notes, *self._overlap_notes()))

    def _load_cached(self, path: Path) -> Calibration | None:
        """Return the calibration in the file; a damaged one in the cache folder counts as missing."""
        if not path.exists():
            return None
        try:
            return load_calibration(path)
        except LoadError as error:
            if self._options.cache is not None:
                raise
            self._log(f"calibrating again: {error.message}")
            return None

    def _save(self, calibration: Calibration, path: Path) -> str:
        """Write the file, and report it; a cache folder that cannot be written is not an error."""
        try:
            save_calibration(calibration, path)
        except ExportError as error:
            if self._options.cache is not None:
                raise
            return f"not saved: {error.message}"
        return f"saved in {path}"

    def _overlap_notes(self) -> tuple[str, ...]:
        if self._data is None:
            return ()
        both = count_overlap(self._images, [self._data.path(index) for index in range(len(self._data))])
        return (f"{both} of the images used to measure AP are also calibration images",) if both else ()

    def _round_weights(self, calibration: Calibration, options: Int8Options) -> dict[str, RoundedConvolution]:
        """Round the weights once; when layers are excluded later, the others keep theirs."""
        images = self._some_images(calibration, ROUNDING_IMAGES)
        with self._show("round weights") as progress:
            rounded = round_weights(self._model, calibration, images, options, progress=progress)
        self._log(f"rounded the weights of {plural(len(rounded), 'convolution')} by {options.rounding}")
        return rounded

    # --- accuracy -----------------------------------------------------------------------------------------------------

    def _measure_drop(self, model: OnnxModel, excluded: frozenset[str]) -> AccuracyDrop | None:
        if self._data is None:
            return None
        if self._reference is None:
            self._reference = self._evaluate(self._model, "AP of FP32")
        without = f"{plural(len(excluded), 'layer')} excluded"
        drop = self._drops[excluded] = self._drop(self._evaluate(model, f"AP of INT8, {without}"))
        self._measurements.append(_measurement(model, drop, excluded))
        self._log(f"AP {drop.reference_ap:.4f} in FP32, {drop.ap:.4f} in INT8 with {without}")
        return drop

    def _drop(self, report: AccuracyReport) -> AccuracyDrop:
        from yolov7_deploy.evaluation.accuracy_drop import accuracy_drop

        assert self._data is not None and self._reference is not None
        return accuracy_drop(self._data, range(len(self._data)), self._reference.predictions, report.predictions)

    def _evaluate(self, model: OnnxModel, title: str) -> AccuracyReport:
        """Evaluate the file as users run it: written to disk, in ONNX Runtime, with a square letterbox."""
        # Imported here because faster-coco-eval is needed only with a dataset.
        from yolov7_deploy.evaluation.accuracy import evaluate

        assert self._data is not None
        with temporary_folder("y7-int8") as folder:
            path = folder / "model.onnx"
            model.save(path)
            with Detector(path, device="cpu") as detector, self._show(title) as progress:
                return evaluate(detector, self._data, options=ValOptions(rect=False, batch=1), progress=progress)

    # --- excluded layers ----------------------------------------------------------------------------------------------

    def _rank_layers(self, calibration: Calibration, options: Int8Options) -> tuple[LayerSensitivity, ...]:
        few = self._some_images(calibration, RANKING_IMAGES)
        with self._show("sensitivity of each layer") as progress:
            ranking = layer_sensitivities(self._model, calibration, few, options, progress=progress)
        self._log(f"ranked {len(ranking)} layers by INT8 sensitivity; the most sensitive is {ranking[0].layer}")
        return ranking

    def _some_images(self, calibration: Calibration, count: int) -> list[Image]:
        """Return evenly spaced calibration images."""
        step = max(1, calibration.images // count)
        return list(islice(self._images, 0, step * count, step))

    def _search(
        self, calibration: Calibration, ranking: tuple[LayerSensitivity, ...], max_drop: float
    ) -> tuple[str, ...]:
        def fits(layers: frozenset[str]) -> bool:
            model = to_int8(self._model, calibration, self._excluding(layers, ranking), self._rounded)
            drop = self._measure_drop(model, layers)
            return drop is not None and drop.points <= max_drop

        excluded = min_excluded_layers([entry.layer for entry in ranking[:-1]], fits)
        if excluded is None:
            raise ParityError(
                f"INT8 loses more than {max_drop:g} AP points even with all layers but one excluded: the loss is "
                "elsewhere, or there are too few images to measure it.",
                fix="Allow more (--max-drop), measure on more images (--data), or use  --precision fp16",
            )
        return tuple(entry.layer for entry in ranking if entry.layer in excluded)

    def _excluding(
        self, layers: frozenset[str] | tuple[str, ...], ranking: tuple[LayerSensitivity, ...]
    ) -> Int8Options:
        error = {entry.layer: entry.error for entry in ranking}
        reasons: Mapping[str, str] = {
            layer: f"excluded to keep AP: alone in INT8 it changes the head by {error[layer]:.3g}" for layer in layers
        }
        return replace(self._options.int8, exclude={**self._options.int8.exclude, **reasons})

    def _with_drop_note(self, model: OnnxModel, drop: AccuracyDrop | None) -> OnnxModel:
        """Log the AP and add it to the notes in the metadata."""
        if drop is None:
            return model
        from yolov7_deploy.evaluation.accuracy_drop import summarize_drop

        note = summarize_drop(drop, DEFAULT_MAX_DROP if self._options.max_drop is None else self._options.max_drop)
        self._log(note)
        return OnnxModel.of(model.proto, replace(model.metadata, notes=(*model.metadata.notes, note)))


def _measurement(model: OnnxModel, drop: AccuracyDrop, excluded: frozenset[str]) -> Measurement:
    int8 = model.metadata.int8
    return Measurement(
        excluded=tuple(sorted(excluded)),
        ap=drop.ap,
        points=drop.points,
        low=drop.low,
        high=drop.high,
        share=None if int8 is None else int8.share,
    )


def describe(result: Quantized) -> str:
    """Return the numbers of Q/DQ pairs and INT8 layers, the sensitivities and the AP of the search as text."""
    parts = ["\n".join(int8_lines(result.summary))]
    if result.sensitivities:
        floats = float_layers(result)
        rows: list[list[object]] = [
            [entry.layer, f"{entry.error:.4f}", _percent(entry.share), "float" if entry.layer in floats else ""]
            for entry in result.sensitivities[:MAX_TABLE_ROWS]
        ]
        title = f"INT8 sensitivity, each layer alone: the {len(rows)} most sensitive of {len(result.sensitivities)}"
        parts.append(table(rows, ["layer", "head error", "of all MACs", ""], title))
    if len(result.measurements) > 1:
        rows = [
            [len(one.excluded), _percent(one.share), f"{one.ap:.4f}", f"{one.points:+.2f}"]
            for one in result.measurements
        ]
        parts.append(table(rows, ["layers excluded", "MACs in INT8", "AP", "points lost"], "AP during the search"))
    return "\n\n".join(part for part in parts if part)


def to_dict(result: Quantized) -> dict[str, Any]:
    """Return the result as plain data for JSON."""
    return {
        "calibration": {
            "images": result.calibration.images,
            "images_sha256": result.calibration.images_sha256,
            "network_sha256": result.calibration.network_sha256,
        },
        "summary": int8_to_dict(result.summary),
        "accuracy": None if result.drop is None else result.drop.to_dict(),
        "layers": [
            {"layer": entry.layer, "head_error": entry.error, "share_of_macs": entry.share}
            for entry in result.sensitivities
        ],
        "measurements": [{**asdict(one), "excluded": list(one.excluded)} for one in result.measurements],
        "notes": list(result.model.metadata.notes),
    }


def float_layers(result: Quantized) -> set[str]:
    """Return the names of the convolutions that are not INT8."""
    int8 = result.model.metadata.int8
    return {layer for layer, _ in int8.float_layers} if int8 else set()


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"
