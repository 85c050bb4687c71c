"""Runs an ONNX file through ONNX Runtime, on a CPU or a CUDA GPU.

Ours are recognised by their metadata; a foreign file opens if its inputs and outputs have the field's names and shapes.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from yolov7_deploy.errors import DeviceError, LoadError, UsageError
from yolov7_deploy.hardware.cpu import usable_cores
from yolov7_deploy.image import Image, Letterbox, to_network_input
from yolov7_deploy.metadata import MAX_SIDE, METADATA_KEY, InputKind, ModelMetadata, NmsMetadata, foreign_metadata
from yolov7_deploy.options import Thresholds
from yolov7_deploy.postprocess import postprocess
from yolov7_deploy.runtimes.base import RawDetections, RuntimeResult, TimingBreakdown, check_request_supported
from yolov7_deploy.runtimes.fair_semaphore import FairSemaphore
from yolov7_deploy.runtimes.nms_outputs import NMS_OUTPUTS, UNKNOWN_CLASSES, check_nms_compatible, filter_outputs

logger = logging.getLogger(__name__)

# More runs at a time bring nothing (two cores are kept busy by four), and each holds activations of its own: 110 MB for
# YOLOv7 at 640. Fewer would leave cores idle while layers that cannot be divided run.
RUNS_PER_CORE = 2
# Workers of the runtime wait for the next layer awake for this long. Its own choice is a loop of a million turns, 16 to
# 47 ms, which gains a single caller nothing and takes the cores from other callers and other programs.
AWAKE_US = 50
_ERRORS_ONLY = 3
_MAX_REASON = 500  # characters
_MAX_FOREIGN_CLASSES = 100_000
# Its own classes, and what its binding makes of texts that are not UTF-8 and of exceptions that it does not know.
_ORT_ERRORS: tuple[type[Exception], ...] = (
    *(value for value in vars(ort_state).values() if isinstance(value, type) and issubclass(value, Exception)),
    UnicodeDecodeError,
    RuntimeError,
)


class OrtBackend:
    """An ONNX file ready to run.

    Calls from many threads take turns in the network (`RUNS_PER_CORE`) while others prepare images and make results.

    Args:
        session: The opened file.
        info: Its metadata.
        device: Where it runs, in our words.
    """

    takes_gpu_arrays = False

    def __init__(self, session: onnxruntime.InferenceSession, metadata: ModelMetadata, *, device: str) -> None:
        self.metadata, self.device = metadata, device
        self.max_batch_size = metadata.batch
        self._session: onnxruntime.InferenceSession | None = session
        self._threads = session.get_session_options().intra_op_num_threads
        self._runs = RUNS_PER_CORE * (self._threads or os.cpu_count() or 1)
        self._turns = FairSemaphore(self._runs)
        self._overridable = {entry.name for entry in session.get_overridable_initializers()}
        self._input = session.get_inputs()[0].name
        # By name, because foreign files have them in other orders.
        self._outputs = [session.get_outputs()[0].name] if metadata.nms is None else list(NMS_OUTPUTS)

    @classmethod
    def open(cls, path: Path, *, device: str, input_hw: tuple[int, int] | None, half: bool | None = None) -> OrtBackend:
        """See `open_backend`; a size or precision other than the file's own is refused."""
        providers, place = _providers(device)
        try:
            session = onnxruntime.InferenceSession(str(path), session_options(), providers=providers)
            metadata = _info(session, path)
        except _ORT_ERRORS as error:
            raise LoadError(
                f"ONNX Runtime {onnxruntime.__version__} cannot open {path}: {_reason(error)}",
                fix="Check the file, or export it again:  y7 export --weights WEIGHTS.pt",
            ) from error
        check_request_supported(path, metadata, input_hw=input_hw, half=half)
        return cls(session, metadata, device=place)

    @property
    def runtime_info(self) -> tuple[tuple[str, str], ...]:
        """See `Backend.runtime_info`."""
        return (
            ("threads of the runtime", str(self._threads or "its own choice")),
            ("runs at a time", f"at most {self._runs}"),
        )

    def infer(
        self,
        images: Sequence[Image],
        letterboxes: Sequence[Letterbox],
        thresholds: Thresholds,
        *,
        timed: bool = False,
    ) -> RuntimeResult:
        """See `Backend.infer`.

        A file of fixed batch runs as often as needed, the last time filled up with its last image. With NMS
        inside the file, `classes` filters what the file gives, and `max_det` cannot exceed its rows. Waiting for a turn
        counts as time of the network.
        """
        started = time.perf_counter()
        canvases = [letterbox.apply(image) for image, letterbox in zip(images, letterboxes, strict=True)]
        batches = [self._as_input(part) for part in _parts(canvases, self.metadata.batch)]
        feeds = self._threshold_feeds(thresholds)
        prepared = time.perf_counter()
        try:
            results = [self._run({self._input: batch, **feeds}) for batch in batches]
        except _ORT_ERRORS as error:
            raise DeviceError(
                f"ONNX Runtime could not run {len(images)} images: {_reason(error)}",
                fix="Try fewer images at once, or --device cpu",
            ) from error
        inferred = time.perf_counter()
        for batch, result in zip(batches, results, strict=True):
            _check_result(result, len(batch), self.metadata)
        found = [one for result in results for one in self._found(result, thresholds)][: len(images)]
        done = time.perf_counter()
        spans = TimingBreakdown(
            preprocess_ms=(prepared - started) * 1e3,
            upload_ms=0.0,  # with a GPU's provider, copies are part of the run
            engine_ms=(inferred - prepared) * 1e3,
            download_ms=0.0,
            postprocess_ms=(done - inferred) * 1e3,
        )
        return RuntimeResult(
            found=found,
            preprocess_ms=spans.preprocess_ms,
            inference_ms=spans.engine_ms,
            postprocess_ms=spans.postprocess_ms,
            spans=spans,
        )

    def close(self) -> None:
        """Frees the network, as soon as the calls that are inside have come out."""
        self._session = None

    def _run(self, feeds: dict[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        session = self._session  # which `close` may take away meanwhile
        if session is None:
            raise UsageError("This model is closed.", fix="Open a new Detector, or keep it open longer.")
        with self._turns:
            results: list[npt.NDArray[Any]] = session.run(self._outputs, feeds)
        return results

    def _as_input(self, canvases: Sequence[Image]) -> npt.NDArray[Any]:
        return np.stack(canvases) if self.metadata.input_kind == "uint8" else to_network_input(canvases)

    def _threshold_feeds(self, thresholds: Thresholds) -> dict[str, npt.NDArray[np.float32]]:
        nms = self.metadata.nms
        if nms is None:
            return {}
        check_nms_compatible(nms, thresholds)
        wanted = {"conf_threshold": thresholds.conf, "iou_threshold": thresholds.iou}
        return {
            name: np.array([value], dtype=np.float32) for name, value in wanted.items() if name in self._overridable
        }

    def _found(self, result: Sequence[npt.NDArray[Any]], thresholds: Thresholds) -> Iterator[RawDetections]:
        if self.metadata.nms is None:
            for output in result[0]:
                boxes, scores, class_ids = postprocess(output, thresholds)
                yield RawDetections(boxes=boxes, scores=scores, class_ids=class_ids)
            return
        for count, boxes, scores, classes in zip(*result, strict=True):
            yield filter_outputs(int(count.item()), boxes, scores, classes, thresholds)


def session_options() -> onnxruntime.SessionOptions:
    """How ONNX Runtime is asked to run, on every device; a bare loop to compare with takes the same."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY  # it warns of every input that has a default, as our thresholds do
    # Its own count is that of the whole machine, also where a container has a part of it; and it would tie its threads
    # to cores, those of two sessions to the same ones.
    options.intra_op_num_threads = usable_cores() or 0
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(AWAKE_US))  # older ones do not know it
    return options


def _parts(canvases: Sequence[Image], batch: int | None) -> list[list[Image]]:
    if batch is None:
        return [list(canvases)]
    parts = [list(canvases[start : start + batch]) for start in range(0, len(canvases), batch)]
    parts[-1] += [parts[-1][-1]] * (batch - len(parts[-1]))
    return parts


def _providers(device: str) -> tuple[list[Any], str]:
    """ONNX Runtime's provider list for a device name, and the device in our words."""
    available = onnxruntime.get_available_providers()
    has_cuda = "CUDAExecutionProvider" in available
    if device == "auto":
        device = "cuda:0" if has_cuda else "cpu"
    if device == "cpu":
        return ["CPUExecutionProvider"], "cpu"
    kind, _, index = (f"cuda:{device}" if device.isdigit() else device).partition(":")
    if kind != "cuda" or not (index or "0").isdigit():
        raise DeviceError(f"{device!r} is no device ONNX Runtime has here.", fix="--device cpu  or  --device cuda:0")
    if not has_cuda:
        raise DeviceError(
            f"This ONNX Runtime has no CUDA provider (it has {', '.join(available)}).",
            fix="pip uninstall onnxruntime; pip install 'yolov7-deploy[gpu]'   or   --device cpu",
        )
    cuda = ("CUDAExecutionProvider", {"device_id": int(index or 0)})
    return [cuda, "CPUExecutionProvider"], f"cuda:{index or 0}"


def _check_result(result: Sequence[Any], batch: int, metadata: ModelMetadata) -> None:
    """Refuses what a graph gives instead of what it announces; its sizes may be open until it runs.

    Raises:
        LoadError: The results have other shapes than the layout.
    """
    shapes: list[tuple[int, ...]] = [getattr(value, "shape", ()) for value in result]
    if metadata.nms is None:
        fits = [len(shape) == 3 and shape[::2] == (batch, 5 + len(metadata.class_names)) for shape in shapes]
    else:
        rows = shapes[2][1] if len(shapes[2]) == 2 else -1
        # Some exporters leave out the dimension of one behind num_dets.
        wanted = [(batch, 1), (batch, rows, 4), (batch, rows), (batch, rows)]
        fits = [shape == want for shape, want in zip(shapes, wanted, strict=True)]
        fits[0] = fits[0] or shapes[0] == (batch,)
    numeric = all(getattr(value, "dtype", np.dtype(object)).kind in "fiu" for value in result)
    if not numeric or not all(fits):
        raise LoadError(
            f"The file gives results of shapes {str(shapes)[:200]} for {batch} images, which is no YOLOv7 layout.",
            fix="Export the weights here:  y7 export --weights WEIGHTS.pt",
        )


def _reason(error: Exception) -> str:
    """The first line, as far as it can be read: ONNX Runtime quotes names of the file."""
    if isinstance(error, UnicodeDecodeError):
        return "a name or text in it is not UTF-8."
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= _MAX_REASON else f"{lines[0][:_MAX_REASON]}..."


# --- what a file says about itself --------------------------------------------------------------------------------


def _info(session: onnxruntime.InferenceSession, path: Path) -> ModelMetadata:
    """The metadata, or what is assumed of a file without one.

    Raises:
        LoadError: The metadata is damaged or of another graph, or the graph is none of ours or of the field's.
    """
    inputs, outputs = session.get_inputs(), session.get_outputs()
    names = tuple(output.name for output in outputs)
    refusal = LoadError(
        f"{path} takes {_layout(inputs)} to {_layout(outputs)}, which is no YOLOv7 layout.",
        fix="Export the weights here:  y7 export --weights WEIGHTS.pt",
    )
    if len(inputs) != 1 or not outputs or len(_shape(inputs[0])) != 4:  # those with a default are not among them
        raise refusal
    metadata = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if metadata is None:
        metadata = _foreign(session, refusal)
        logger.warning("%s: %s", path, "; ".join(metadata.notes))
        return metadata
    metadata = ModelMetadata.from_json(metadata)
    if metadata.nms is not None and not set(NMS_OUTPUTS) <= set(names):
        raise refusal
    batch, input_hw, input_kind = _takes(inputs[0])
    said = (metadata.batch, metadata.input_hw if input_hw else None, metadata.input_kind)
    if said != (batch, input_hw, input_kind):
        raise LoadError(
            f"The metadata of {path} says batch, size and type {said}, its graph {(batch, input_hw, input_kind)}.",
            fix="They are of different files: export it again:  y7 export --weights WEIGHTS.pt",
        )
    return metadata


def _shape(node: Any) -> list[Any]:  # noqa: ANN401 - ONNX Runtime's NodeArg
    """Sizes and names; empty for what is no tensor."""
    return list(node.shape) if isinstance(node.shape, list) else []


def _layout(nodes: Sequence[Any]) -> str:
    return str([(node.name, node.shape) for node in nodes])[:_MAX_REASON]


def _takes(node: Any) -> tuple[int | None, tuple[int, int] | None, InputKind]:  # noqa: ANN401
    """Batch, height and width, and kind of an input of rank 4; `None` for what is open."""
    shape, is_uint8 = _shape(node), node.type == "tensor(uint8)"
    sides = shape[1:3] if is_uint8 else shape[2:4]
    input_hw = (int(sides[0]), int(sides[1])) if all(isinstance(side, int) for side in sides) else None
    batch = shape[0] if isinstance(shape[0], int) else None
    return batch, input_hw, "uint8" if is_uint8 else "float32"


def _foreign(session: onnxruntime.InferenceSession, refusal: LoadError) -> ModelMetadata:
    outputs = {output.name: _shape(output) for output in session.get_outputs()}
    first = next(iter(outputs.values()))
    batch, input_hw, input_kind = _takes(session.get_inputs()[0])
    if not all(1 <= size <= MAX_SIDE for size in (batch or 1, *(input_hw or ()))):
        raise refusal
    if set(NMS_OUTPUTS) <= set(outputs):
        if len(outputs["det_boxes"]) != 3:
            raise refusal
        limit = outputs["det_boxes"][1]
        nms = NmsMetadata(
            kind="efficient",
            conf=0.0,
            iou=0.45,
            max_det=limit if isinstance(limit, int) and limit > 0 else 100,
            max_candidates=0,
            multi_label=True,
            class_agnostic=False,
            runtime_thresholds=False,
        )
        return foreign_metadata(classes=UNKNOWN_CLASSES, input_hw=input_hw, batch=batch, input_kind=input_kind, nms=nms)
    columns = first[-1] if len(first) == 3 else None
    if not isinstance(columns, int) or not 6 <= columns <= 5 + _MAX_FOREIGN_CLASSES:
        raise refusal
    return foreign_metadata(classes=columns - 5, input_hw=input_hw, batch=batch, input_kind=input_kind, nms=None)
