"""Runs an ONNX file with ONNX Runtime, on a CPU or a CUDA GPU.

Files exported by this package carry metadata. A file without metadata opens if its inputs and outputs have the usual
names and shapes of YOLOv7 exports.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from yolov7_deploy._ort_options import base_session_options
from yolov7_deploy.errors import DeviceError, LoadError, UsageError
from yolov7_deploy.hardware.cpu import usable_cores
from yolov7_deploy.hardware.device import parse_device
from yolov7_deploy.image import Image, Letterbox, to_network_input
from yolov7_deploy.metadata import (
    MAX_SIDE,
    METADATA_KEY,
    NMS_OUTPUTS,
    THRESHOLD_INPUTS,
    InputKind,
    ModelMetadata,
    assumed_metadata,
)
from yolov7_deploy.options import Thresholds, threshold_values
from yolov7_deploy.postprocess import RawDetections, check_nms_compatible, filter_outputs, postprocess
from yolov7_deploy.runtimes.base import (
    RuntimeResult,
    TimingBreakdown,
    assumed_nms_metadata,
    check_request_supported,
    split_batches,
)
from yolov7_deploy.runtimes.fork import call_after_fork, gpu_fork_error, never_free

logger = logging.getLogger(__name__)

# More concurrent runs gain nothing (four keep two cores busy), and each holds its own activations: 110 MB for YOLOv7 at
# 640. Fewer would leave cores idle during layers that run on one thread.
RUNS_PER_CORE = 2
# How long intra-op threads spin while they wait for the next layer. The default is a million iterations, 16 to 47 ms,
# which gains nothing for one caller and takes the cores from other callers and other programs.
SPIN_US = 50
_MAX_REASON = 500  # characters
_MAX_FOREIGN_CLASSES = 100_000
# ONNX Runtime's own exceptions, and what its Python binding raises for names that are not UTF-8 and for unknown errors.
_ORT_ERRORS: tuple[type[Exception], ...] = (
    *(value for value in vars(ort_state).values() if isinstance(value, type) and issubclass(value, Exception)),
    UnicodeDecodeError,
    RuntimeError,
)


class FairSemaphore:
    """A semaphore that serves waiting threads in the order of their arrival.

    With `threading.Semaphore`, a thread that returns quickly acquires it before the notified thread has woken up. With
    eight callers on two cores, some then got half as many runs as others and waited three times as long.

    Args:
        count: How many threads may hold it at the same time.

    Example:
        >>> with semaphore:
        ...     session.run(None, feeds)
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self.after_fork()
        call_after_fork(self)

    def after_fork(self) -> None:
        """Forget the threads of the parent process, which hold it or wait for it."""
        self._available = self._count
        self._lock = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()  # each is released when its thread may continue

    def __enter__(self) -> None:
        with self._lock:
            if self._available:
                self._available -= 1
                return
            waiter = threading.Lock()
            waiter.acquire()
            self._waiting.append(waiter)
        try:
            waiter.acquire()
        except BaseException:  # Ctrl-C while waiting must not lose a permit
            self._cancel(waiter)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._release_next()

    def _release_next(self) -> None:
        if self._waiting:
            self._waiting.popleft().release()
        else:
            self._available += 1

    def _cancel(self, waiter: threading.Lock) -> None:
        with self._lock:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            else:
                self._release_next()


class OrtSession:
    """A session of ONNX Runtime. In a child process of `os.fork`, the file is opened again when it is needed.

    Args:
        path: The file.
        providers: ONNX Runtime's providers.
        device: `cpu` or `cuda:N`.

    Raises:
        LoadError: ONNX Runtime cannot open it.
    """

    def __init__(self, path: Path, providers: list[Any], *, device: str) -> None:
        self._path, self._providers, self._device = path, providers, device
        self._absolute_path = path.absolute()  # a child may work in another folder
        self._version = _file_version(path)
        self._is_closed = False
        self._lock = threading.Lock()
        self._session: onnxruntime.InferenceSession | None = self._open(path)
        call_after_fork(self)

    def _open(self, path: Path) -> onnxruntime.InferenceSession:
        try:
            return onnxruntime.InferenceSession(str(path), session_options(), providers=self._providers)
        except _ORT_ERRORS as error:
            raise _load_error(self._path, error) from error

    def get(self) -> onnxruntime.InferenceSession:
        """Return the session.

        Raises:
            UsageError: It is closed.
            DeviceError: It was opened on a GPU by the parent process.
            LoadError: In a child process: the file has changed, or cannot be opened.
        """
        session = self._session
        if session is not None:
            return session
        with self._lock:
            if self._is_closed:
                raise UsageError("This model is closed.", fix="Open a new Detector, or keep it open longer.")
            if self._session is None:
                if self._device != "cpu":
                    raise gpu_fork_error(self._device)
                if _file_version(self._absolute_path) != self._version:
                    raise LoadError(
                        f"{self._path} has changed or was removed since the parent process opened it.",
                        fix="Open a new Detector in the child process.",
                    )
                self._session = self._open(self._absolute_path)
            return self._session

    def close(self) -> None:
        """Drop the session; it is freed after the running calls."""
        self._is_closed = True
        self._session = None

    def after_fork(self) -> None:
        """Leave the session to the parent process."""
        if self._session is not None:
            never_free(self._session)
        self._session, self._lock = None, threading.Lock()


def _file_version(path: Path) -> tuple[int, int] | None:
    """Return size and modification time of a file, `None` if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


class OrtRuntime:
    """An ONNX file in an ONNX Runtime session.

    The number of threads that run the network at the same time is limited (`RUNS_PER_CORE` for each core); others
    prepare images and postprocess.

    Args:
        session: The opened file.
        metadata: Its metadata.
        device: `cpu` or `cuda:N`.
    """

    takes_gpu_arrays = False

    def __init__(self, session: OrtSession, metadata: ModelMetadata, *, device: str) -> None:
        self.metadata, self.device = metadata, device
        self.max_batch_size = metadata.batch
        self._session, opened = session, session.get()
        self._threads = opened.get_session_options().intra_op_num_threads
        self._max_runs = RUNS_PER_CORE * (self._threads or os.cpu_count() or 1)
        self._semaphore = FairSemaphore(self._max_runs)
        self._overridable = {entry.name for entry in opened.get_overridable_initializers()}
        self._input = opened.get_inputs()[0].name
        # By name: files of other exporters have them in other orders.
        self._outputs = [opened.get_outputs()[0].name] if metadata.nms is None else list(NMS_OUTPUTS)

    @classmethod
    def open(cls, path: Path, *, device: str, input_hw: tuple[int, int] | None, half: bool | None = None) -> OrtRuntime:
        """Open a file; see `open_runtime`. A size or precision other than that of the file is refused."""
        providers, device_name = _providers(device)
        try:
            session = OrtSession(path, providers, device=device_name)
            metadata = _read_metadata(session.get(), path)
        except _ORT_ERRORS as error:
            raise _load_error(path, error) from error
        check_request_supported(path, metadata, input_hw=input_hw, half=half)
        return cls(session, metadata, device=device_name)

    @property
    def runtime_info(self) -> tuple[tuple[str, str], ...]:
        """See `Runtime.runtime_info`."""
        return (
            ("intra-op threads", str(self._threads or "default")),
            ("concurrent runs", f"at most {self._max_runs}"),
        )

    def infer(
        self,
        images: Sequence[Image],
        letterboxes: Sequence[Letterbox],
        thresholds: Thresholds,
        *,
        timed: bool = False,
    ) -> RuntimeResult:
        """See `Runtime.infer`.

        A model of fixed batch size runs several times if needed; the last batch is padded with its last image. With NMS
        inside the model, `classes` filters its outputs, and `max_det` cannot exceed its maximum detections. Waiting
        for other threads counts as `engine_ms`.
        """
        started = time.perf_counter()
        canvases = [letterbox.apply(image) for image, letterbox in zip(images, letterboxes, strict=True)]
        batches = [self._to_input(part) for part in split_batches(canvases, self.metadata.batch)]
        feeds = self._threshold_feeds(thresholds)
        prepared = time.perf_counter()
        try:
            outputs = [self._run({self._input: batch, **feeds}) for batch in batches]
        except _ORT_ERRORS as error:
            raise DeviceError(
                f"ONNX Runtime could not run {len(images)} images: {_reason(error)}",
                fix="Try fewer images at once, or --device cpu",
            ) from error
        inferred = time.perf_counter()
        detections: list[RawDetections] = []
        for batch, arrays in zip(batches, outputs, strict=True):
            _check_outputs(arrays, len(batch), self.metadata)
            detections += self._postprocess(arrays, thresholds)
        done = time.perf_counter()
        timing = TimingBreakdown(
            preprocess_ms=(prepared - started) * 1e3,
            upload_ms=0.0,  # with the CUDA provider, copies are part of the run
            engine_ms=(inferred - prepared) * 1e3,
            download_ms=0.0,
            postprocess_ms=(done - inferred) * 1e3,
        )
        return RuntimeResult(
            detections=detections[: len(images)],
            preprocess_ms=timing.preprocess_ms,
            inference_ms=timing.engine_ms,
            postprocess_ms=timing.postprocess_ms,
            timing=timing,
        )

    def close(self) -> None:
        """Free the network after the running calls."""
        self._session.close()

    def _run(self, feeds: dict[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        session = self._session.get()
        with self._semaphore:
            outputs: list[npt.NDArray[Any]] = session.run(self._outputs, feeds)
        return outputs

    def _to_input(self, canvases: Sequence[Image]) -> npt.NDArray[Any]:
        padding = (self.metadata.batch or 0) - len(canvases)
        canvases = [*canvases, *[canvases[-1]] * padding]
        return np.stack(canvases) if self.metadata.input_kind == "uint8" else to_network_input(canvases)

    def _threshold_feeds(self, thresholds: Thresholds) -> dict[str, npt.NDArray[np.float32]]:
        nms = self.metadata.nms
        if nms is None:
            return {}
        check_nms_compatible(nms, thresholds)
        return {
            name: np.array([value], dtype=np.float32)
            for name, value in zip(THRESHOLD_INPUTS, threshold_values(thresholds), strict=True)
            if name in self._overridable
        }

    def _postprocess(self, arrays: Sequence[npt.NDArray[Any]], thresholds: Thresholds) -> list[RawDetections]:
        if self.metadata.nms is None:
            return [postprocess(decoded, thresholds) for decoded in arrays[0]]
        return [
            filter_outputs(int(count.item()), boxes, scores, classes, thresholds)
            for count, boxes, scores, classes in zip(*arrays, strict=True)
        ]


def session_options() -> onnxruntime.SessionOptions:
    """Return the session options of the Detector, also for benchmarks that compare it with a bare session."""
    options = base_session_options()
    # The default counts the cores of the whole machine, even in a container with fewer. It also pins the threads to
    # cores, those of two sessions to the same ones.
    options.intra_op_num_threads = usable_cores() or 0
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))  # ignored by older versions
    return options


def _providers(device: str) -> tuple[list[Any], str]:
    """Return ONNX Runtime's providers for a device, and the device as `cpu` or `cuda:N`."""
    available = onnxruntime.get_available_providers()
    has_cuda = "CUDAExecutionProvider" in available
    if device == "auto":
        device = "cuda:0" if has_cuda else "cpu"
    if device == "cpu":
        return ["CPUExecutionProvider"], "cpu"
    index = parse_device(device).cuda_index
    if index is None:
        raise DeviceError(f"ONNX Runtime has no device {device!r} here.", fix="--device cpu  or  --device cuda:0")
    if not has_cuda:
        raise DeviceError(
            f"This ONNX Runtime has no CUDA provider (it has {', '.join(available)}).",
            fix="pip uninstall onnxruntime; pip install 'yolov7-deploy[gpu]'   or   --device cpu",
        )
    cuda = ("CUDAExecutionProvider", {"device_id": index})
    return [cuda, "CPUExecutionProvider"], f"cuda:{index}"


def _check_outputs(outputs: Sequence[Any], batch: int, metadata: ModelMetadata) -> None:
    """Check the shapes and types of the outputs: they may be dynamic in the graph, and known only after a run.

    Raises:
        LoadError: They are not those of a YOLOv7 layout.
    """
    shapes: list[tuple[int, ...]] = [getattr(value, "shape", ()) for value in outputs]
    if metadata.nms is None:
        fits = [len(shape) == 3 and shape[::2] == (batch, 5 + len(metadata.class_names)) for shape in shapes]
    else:
        rows = shapes[2][1] if len(shapes[2]) == 2 else -1
        expected = [(batch, 1), (batch, rows, 4), (batch, rows), (batch, rows)]
        fits = [shape == required for shape, required in zip(shapes, expected, strict=True)]
        # Some exporters omit the dimension of 1 of num_dets.
        fits[0] = fits[0] or shapes[0] == (batch,)
    numeric = all(getattr(value, "dtype", np.dtype(object)).kind in "fiu" for value in outputs)
    if not numeric or not all(fits):
        raise LoadError(
            f"The file returns outputs of shapes {str(shapes)[:200]} for {batch} images, which is not a YOLOv7 layout.",
            fix="Export the weights here:  y7 export --weights WEIGHTS.pt",
        )


def _load_error(path: Path, error: Exception) -> LoadError:
    return LoadError(
        f"ONNX Runtime {onnxruntime.__version__} cannot open {path}: {_reason(error)}",
        fix="Check the file, or export it again:  y7 export --weights WEIGHTS.pt",
    )


def _reason(error: Exception) -> str:
    """Return the first line of an error, shortened: ONNX Runtime quotes names of the file."""
    if isinstance(error, UnicodeDecodeError):
        return "a name or text in it is not UTF-8."
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= _MAX_REASON else f"{lines[0][:_MAX_REASON]}..."


# --- metadata ------------------------------------------------------------------------------------------------------


def _read_metadata(session: onnxruntime.InferenceSession, path: Path) -> ModelMetadata:
    """Return the metadata, or what is assumed for a file without any.

    Raises:
        LoadError: The metadata is damaged or belongs to another graph, or the graph is not a known YOLOv7 layout.
    """
    inputs, outputs = session.get_inputs(), session.get_outputs()
    names = tuple(output.name for output in outputs)
    refusal = LoadError(
        f"{path} takes {_layout(inputs)} to {_layout(outputs)}, which is not a YOLOv7 layout.",
        fix="Export the weights here:  y7 export --weights WEIGHTS.pt",
    )
    if len(inputs) != 1 or not outputs or len(_shape(inputs[0])) != 4:  # inputs with a default are not listed
        raise refusal
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if text is None:
        assumed = _assume_metadata(session, refusal)
        logger.warning("%s: %s", path, "; ".join(assumed.notes))
        return assumed
    metadata = ModelMetadata.from_json(text)
    if metadata.nms is not None and not set(NMS_OUTPUTS) <= set(names):
        raise refusal
    in_graph = _input_signature(inputs[0])
    in_metadata = (metadata.batch, metadata.input_hw if in_graph[1] else None, metadata.input_kind)
    if in_metadata != in_graph:
        raise LoadError(
            f"The metadata of {path} states batch, size and type {in_metadata}, its graph {in_graph}.",
            fix="They belong to different files: export it again:  y7 export --weights WEIGHTS.pt",
        )
    return metadata


def _shape(node: Any) -> list[Any]:  # noqa: ANN401 - ONNX Runtime's NodeArg
    """Return sizes and names of dimensions; empty if the value is not a tensor."""
    return list(node.shape) if isinstance(node.shape, list) else []


def _layout(nodes: Sequence[Any]) -> str:
    return str([(node.name, node.shape) for node in nodes])[:_MAX_REASON]


def _input_signature(node: Any) -> tuple[int | None, tuple[int, int] | None, InputKind]:  # noqa: ANN401
    """Return batch, (height, width) and kind of an input of rank 4; `None` for dynamic dimensions."""
    shape, is_uint8 = _shape(node), node.type == "tensor(uint8)"
    sides = shape[1:3] if is_uint8 else shape[2:4]
    input_hw = (int(sides[0]), int(sides[1])) if all(isinstance(side, int) for side in sides) else None
    batch = shape[0] if isinstance(shape[0], int) else None
    return batch, input_hw, "uint8" if is_uint8 else "float32"


def _assume_metadata(session: onnxruntime.InferenceSession, refusal: LoadError) -> ModelMetadata:
    outputs = {output.name: _shape(output) for output in session.get_outputs()}
    first = next(iter(outputs.values()))
    batch, input_hw, input_kind = _input_signature(session.get_inputs()[0])
    if not all(1 <= size <= MAX_SIDE for size in (batch or 1, *(input_hw or ()))):
        raise refusal
    if set(NMS_OUTPUTS) <= set(outputs):
        if len(outputs["det_boxes"]) != 3:
            raise refusal
        limit = outputs["det_boxes"][1]
        return assumed_nms_metadata(
            input_hw=input_hw,
            batch=batch,
            input_kind=input_kind,
            conf=0.0,
            max_det=limit if isinstance(limit, int) and limit > 0 else 100,
            runtime_thresholds=False,
        )
    columns = first[-1] if len(first) == 3 else None
    if not isinstance(columns, int) or not 6 <= columns <= 5 + _MAX_FOREIGN_CLASSES:
        raise refusal
    return assumed_metadata(classes=columns - 5, input_hw=input_hw, batch=batch, input_kind=input_kind, nms=None)
