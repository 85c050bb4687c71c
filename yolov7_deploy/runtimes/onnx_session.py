"""Common parts of the runtimes of ONNX files: preparing inputs, reading outputs, metadata, and `os.fork`.

Files exported by this package carry metadata. Other files open if the shapes of their inputs and outputs are those of a
known layout (`output_layout.py`); if they do not state shapes, a run on a black image shows them.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from yolov7_deploy._process import call_after_fork, gpu_fork_error, never_free
from yolov7_deploy._text import get_logger
from yolov7_deploy.errors import DeviceError, LoadError, UsageError
from yolov7_deploy.image import Image, Letterbox, to_network_input
from yolov7_deploy.metadata import METADATA_KEY, NMS_OUTPUTS, THRESHOLD_INPUTS, ModelMetadata
from yolov7_deploy.options import Thresholds, threshold_values
from yolov7_deploy.output_layout import (
    InputLayout,
    OutputLayout,
    TensorSpec,
    find_input,
    find_layout,
    layout_metadata,
    read_detections,
    unknown_layout,
)
from yolov7_deploy.postprocess import RawDetections, check_nms_compatible
from yolov7_deploy.runtimes.base import RuntimeResult, TimingBreakdown, check_request_supported, split_batches

logger = get_logger(__name__)

DEFAULT_HW = (640, 640)  # of files of dynamic size, as in the official program
MAX_BUFFER_BYTES = 2**25  # for the input of a thread between calls: six images of 640x640
Array = npt.NDArray[Any]
_Model = TypeVar("_Model")


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


class OnnxSession(ABC, Generic[_Model]):
    """An ONNX file that a library has opened. In a child process of `os.fork`, it is opened again when it is needed.

    Subclasses set the attributes below, and implement the abstract methods.

    Args:
        path: The file.
        device: `cpu`, or the name of a GPU or NPU.

    Attributes:
        library: Name of the library.
        errors: Its exceptions.
        device: As given.
        inputs, outputs: Those of the graph, except thresholds.
        properties: The metadata of the file.
        thresholds: Names of the inputs that have a default value in the file.
        has_defaults: The library knows these values; otherwise every run needs them.
        takes_pixels: `run` takes images as uint8 [B, H, W, 3], BGR, though the input of the graph is float32.

    Raises:
        LoadError: The library cannot open it.
    """

    library: str
    errors: tuple[type[Exception], ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    properties: Mapping[str, str]
    thresholds: frozenset[str]
    has_defaults = True
    takes_pixels = False

    def __init__(self, path: Path, *, device: str) -> None:
        self._path, self.device = path, device
        self._absolute_path = path.absolute()  # a child may work in another folder
        self._version = file_version(path)
        self._is_closed = False
        self._lock = threading.Lock()
        self._model: _Model | None = self._open(path)
        call_after_fork(self)

    @abstractmethod
    def _open(self, path: Path) -> _Model:
        """Return the opened model of a file."""

    @abstractmethod
    def reason(self, error: Exception) -> str:
        """Return why one of `errors` was raised, in one line."""

    @abstractmethod
    def run(self, model: _Model, outputs: list[str] | None, feeds: dict[str, Array]) -> list[Array]:
        """Return outputs of a model that `get` returned, all of them for `None`.

        Raises:
            One of `errors`: The library cannot run it.
        """

    @property
    @abstractmethod
    def runtime_info(self) -> tuple[tuple[str, str], ...]:
        """See `Runtime.runtime_info`."""

    @abstractmethod
    def open_other(self, path: Path) -> OnnxSession[_Model]:
        """Return another file, opened with the settings of this one."""

    def get(self) -> _Model:
        """Return the opened model.

        Raises:
            UsageError: It is closed.
            DeviceError: It was opened on a GPU or NPU by the parent process.
            LoadError: In a child process: the file has changed, or cannot be opened.
        """
        model = self._model
        if model is not None:
            return model
        with self._lock:
            if self._is_closed:
                raise UsageError("This model is closed.", fix="Open a new Detector, or keep it open longer.")
            if self._model is None:
                if self.device != "cpu":
                    raise gpu_fork_error(self.device)
                if file_version(self._absolute_path) != self._version:
                    raise LoadError(
                        f"{self._path} has changed or was removed since the parent process opened it.",
                        fix="Open a new Detector in the child process.",
                    )
                self._model = self._open(self._absolute_path)
            return self._model

    def close(self) -> None:
        """Drop the model; it is freed after the running calls."""
        self._is_closed = True
        self._model = None

    def after_fork(self) -> None:
        """Leave the model to the parent process."""
        if self._model is not None:
            never_free(self._model)
        self._model, self._lock = None, threading.Lock()


def file_version(path: Path) -> tuple[int, int] | None:
    """Return size and modification time of a file, `None` if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


class _InputBuffer(threading.local):
    """The network input of each thread's last call, so that not every call has to map the pages of a new array."""

    def __init__(self) -> None:
        self._array: npt.NDArray[np.float32] = np.empty(0, np.float32)

    def of(self, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """Return an array float32 of this shape, which is kept for the next call unless it is large."""
        if self._array.shape == shape:
            return self._array
        array = np.empty(shape, np.float32)
        if array.nbytes <= MAX_BUFFER_BYTES:
            self._array = array
        return array


class OnnxRuntime:
    """An ONNX file in one of the libraries that run it.

    Args:
        session: The opened file.
        path: The file.
        input_hw: The requested size, if any; another than that of the file is refused.
        half: The requested precision, if any; another than that of the file is refused.
    """

    name: str
    takes_gpu_arrays = False

    def __init__(
        self, session: OnnxSession[Any], path: Path, *, input_hw: tuple[int, int] | None, half: bool | None
    ) -> None:
        self._session, self._buffer = session, _InputBuffer()
        self.metadata: ModelMetadata
        try:
            self.metadata, self._input, self._layout = _read_layout(session, path, input_hw)
            check_request_supported(path, self.metadata, input_hw=input_hw, half=half)
        except BaseException:
            session.close()
            raise
        self.device = session.device
        self.max_batch_size = self.metadata.batch

    def open_graph(self, path: Path) -> OnnxSession[Any]:
        """Open another ONNX file with the device and the settings of this one, to read its tensors by name.

        Raises:
            LoadError: The library cannot open it.
        """
        return self._session.open_other(path)

    def open_copy(self, path: Path) -> OnnxRuntime:
        """Open a changed copy of the file with the device and the settings of this one.

        Raises:
            LoadError: The library cannot open it.
        """
        return type(self)(self._session.open_other(path), path, input_hw=None, half=None)

    @property
    def runtime_info(self) -> tuple[tuple[str, str], ...]:
        """See `Runtime.runtime_info`."""
        return self._session.runtime_info

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
        parts = list(split_batches(canvases, self.metadata.batch))
        batches = [self._to_input(part, reuse=len(parts) == 1) for part in parts]
        feeds = self._threshold_feeds(thresholds)
        prepared = time.perf_counter()
        try:
            outputs = [self._run({self._input.name: batch, **feeds}) for batch in batches]
        except self._session.errors as error:
            raise DeviceError(
                f"{self._session.library} could not run {len(images)} images: {self._session.reason(error)}",
                fix="Try fewer images at once" + (", or --device cpu" if self.device != "cpu" else "."),
            ) from error
        inferred = time.perf_counter()
        detections: list[RawDetections] = []
        for batch, arrays in zip(batches, outputs, strict=True):
            detections += read_detections(
                self._layout, arrays, thresholds, batch=len(batch), canvas_hw=letterboxes[0].canvas_hw
            )
        done = time.perf_counter()
        timing = TimingBreakdown(
            preprocess_ms=(prepared - started) * 1e3,
            upload_ms=0.0,  # with the CUDA provider of ONNX Runtime, copies are part of the run
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

    def _run(self, feeds: dict[str, Array]) -> list[Array]:
        return self._session.run(self._session.get(), list(self._layout.outputs), feeds)

    def _to_input(self, canvases: Sequence[Image], *, reuse: bool) -> Array:
        padding = (self.metadata.batch or 0) - len(canvases)
        canvases = [*canvases, *[canvases[-1]] * padding]
        if self._input.kind == "uint8" or self._session.takes_pixels:
            return np.stack(canvases) if len(canvases) > 1 else canvases[0][None]
        out = self._buffer.of((len(canvases), 3, *canvases[0].shape[:2])) if reuse else None
        return to_network_input(canvases, out=out).astype(self._input.dtype, copy=False)

    def _threshold_feeds(self, thresholds: Thresholds) -> dict[str, npt.NDArray[np.float32]]:
        nms = self.metadata.nms
        if nms is None:
            return {}
        check_nms_compatible(nms, thresholds)
        if not nms.runtime_thresholds:
            return {}
        return {
            name: np.array([value], dtype=np.float32)
            for name, value in zip(THRESHOLD_INPUTS, threshold_values(thresholds), strict=True)
        }


# --- metadata and layout --------------------------------------------------------------------------------------------


def _read_layout(
    session: OnnxSession[Any], path: Path, input_hw: tuple[int, int] | None
) -> tuple[ModelMetadata, InputLayout, OutputLayout]:
    """Return the metadata, or what is assumed for a file without any, and the layout of inputs and outputs.

    Raises:
        LoadError: The metadata is damaged or belongs to another graph, or the graph is not a known layout.
    """
    inputs, outputs = session.inputs, session.outputs
    images = find_input(str(path), inputs, outputs)
    text = session.properties.get(METADATA_KEY)
    metadata = None if text is None else ModelMetadata.from_json(text)
    required = {entry.name for entry in inputs} - {images.name} | (
        set() if session.has_defaults else session.thresholds
    )
    has_thresholds = set(THRESHOLD_INPUTS) <= session.thresholds | required
    if required and not has_thresholds:
        known = ", ".join(sorted(required))
        raise unknown_layout(str(path), inputs, outputs, f"of the thresholds for NMS, it has {known} only")
    if metadata is not None:
        _check_metadata(metadata, images, path)
        if metadata.nms is not None:
            metadata = replace(metadata, nms=replace(metadata.nms, runtime_thresholds=has_thresholds))
    if metadata is not None and metadata.strides:
        layout = OutputLayout.of(metadata, output=outputs[0].name)
        if not set(layout.outputs) <= {output.name for output in outputs}:
            raise unknown_layout(str(path), inputs, outputs)
        return metadata, images, layout
    canvas_hw = images.input_hw or input_hw or DEFAULT_HW
    if _is_dynamic(images, outputs):
        outputs = _run_shapes(session, images, outputs, canvas_hw, path)
    found = find_layout(str(path), inputs, outputs, canvas_hw=canvas_hw, properties=session.properties)
    assumed = layout_metadata(found, runtime_thresholds=has_thresholds, recorded=metadata)
    if metadata is None:
        logger.warning("%s: %s", path, "; ".join(assumed.notes))
    return assumed, images, found.output


def _check_metadata(metadata: ModelMetadata, images: InputLayout, path: Path) -> None:
    in_graph = (images.batch, images.input_hw, images.kind)
    in_metadata = (metadata.batch, metadata.input_hw if images.input_hw else None, metadata.input_kind)
    if in_metadata != in_graph:
        raise LoadError(
            f"The metadata of {path} states batch, size and type {in_metadata}, its graph {in_graph}.",
            fix="They belong to different files: export it again:  y7 export --weights WEIGHTS.pt",
        )


def _is_dynamic(images: InputLayout, outputs: Sequence[TensorSpec]) -> bool:
    """Return True if only a run shows the rows and columns of the outputs."""
    if set(NMS_OUTPUTS) <= {output.name for output in outputs}:
        return False
    return images.input_hw is None or any(not output.shape or None in output.shape[1:] for output in outputs)


def _run_shapes(
    session: OnnxSession[Any],
    images: InputLayout,
    outputs: Sequence[TensorSpec],
    canvas_hw: tuple[int, int],
    path: Path,
) -> tuple[TensorSpec, ...]:
    """Return the outputs with the shapes of a run on black images."""
    batch = images.batch or 1
    shape = (batch, *canvas_hw, 3) if images.kind == "uint8" else (batch, 3, *canvas_hw)
    try:
        arrays = session.run(session.get(), None, {images.name: np.zeros(shape, images.dtype)})
    except session.errors as error:
        raise LoadError(
            f"{path} does not state the size of its outputs, and does not run on an image of "
            f"{canvas_hw[0]}x{canvas_hw[1]}: {session.reason(error)}",
            fix="Pass the size for which it was exported:  --img HEIGHT,WIDTH",
        ) from error
    return tuple(
        replace(output, shape=tuple(getattr(array, "shape", ()))) for output, array in zip(outputs, arrays, strict=True)
    )
