"""Runs an ONNX file with ONNX Runtime, on a CPU or a CUDA GPU.

Files exported by this package carry metadata. Other files open if the shapes of their inputs and outputs are those of a
known layout (`output_layout.py`); if they do not state shapes, a run on a black image shows them.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from yolov7_deploy._ort_options import ORT_ERRORS, base_session_options, ort_reason
from yolov7_deploy._process import call_after_fork, gpu_fork_error, never_free
from yolov7_deploy._text import get_logger, is_unicode
from yolov7_deploy.errors import DeviceError, LoadError, UsageError
from yolov7_deploy.hardware.cpu import usable_cores
from yolov7_deploy.hardware.device import parse_device
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

# More concurrent runs gain nothing (four keep two cores busy), and each holds its own activations: 110 MB for YOLOv7 at
# 640. Fewer would leave cores idle during layers that run on one thread.
RUNS_PER_CORE = 2
# How long intra-op threads spin while they wait for the next layer. The default is a million iterations, 16 to 47 ms,
# which gains nothing for one caller and takes the cores from other callers and other programs.
SPIN_US = 50
DEFAULT_HW = (640, 640)  # of files of dynamic size, as in the official program
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(uint8)": "uint8",
    "tensor(double)": "float64",
}


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
        self._exact_int8 = True
        self._lock = threading.Lock()
        self._session: onnxruntime.InferenceSession | None = self._open(path)
        call_after_fork(self)

    def _open(self, path: Path) -> onnxruntime.InferenceSession:
        try:
            # ONNX Runtime refuses names that are not valid Unicode.
            model = str(path) if is_unicode(str(path)) else path.read_bytes()
            return onnxruntime.InferenceSession(
                model, session_options(exact_int8=self._exact_int8), providers=self._providers
            )
        except ORT_ERRORS as error:
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

    def run(
        self,
        session: onnxruntime.InferenceSession,
        outputs: list[str] | None,
        feeds: dict[str, npt.NDArray[Any]],
    ) -> list[npt.NDArray[Any]]:
        """Return the outputs of a session that `get` returned.

        The setting for exact INT8 breaks graphs of other programs whose weights have a scale per channel and no zero
        point: it adds a zero point of wrong shape, which only a run shows. They run without it.

        Raises:
            ORT_ERRORS: ONNX Runtime cannot run it.
        """
        try:
            return list(session.run(outputs, feeds))
        except ORT_ERRORS as error:
            if "zero_point" not in str(error) or not self._exact_int8:
                raise
        self._reopen_without_exact_int8(session)
        return list(self.get().run(outputs, feeds))

    def _reopen_without_exact_int8(self, failed: onnxruntime.InferenceSession) -> None:
        with self._lock:
            if self._session is not failed:
                return  # closed, or another thread was faster
            self._exact_int8 = False
            self._session = self._open(self._absolute_path)
        logger.warning(
            "%s: its INT8 weights have no zero points, so ONNX Runtime uses its default INT8 kernels, which are less "
            "exact on CPUs without VNNI.",
            self._path,
        )

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
        images: Its image input.
        layout: The layout of its outputs.
        device: `cpu` or `cuda:N`.
    """

    takes_gpu_arrays = False

    def __init__(
        self,
        session: OrtSession,
        metadata: ModelMetadata,
        images: InputLayout,
        layout: OutputLayout,
        *,
        device: str,
    ) -> None:
        self.metadata, self.device = metadata, device
        self.max_batch_size = metadata.batch
        self._session = session
        self._threads = session.get().get_session_options().intra_op_num_threads
        self._max_runs = RUNS_PER_CORE * (self._threads or os.cpu_count() or 1)
        self._semaphore = FairSemaphore(self._max_runs)
        self._input, self._layout = images, layout

    @classmethod
    def open(cls, path: Path, *, device: str, input_hw: tuple[int, int] | None, half: bool | None = None) -> OrtRuntime:
        """Open a file; see `open_runtime`. A size or precision other than that of the file is refused."""
        providers, device_name = _providers(device)
        try:
            session = OrtSession(path, providers, device=device_name)
            metadata, images, layout = _read_layout(session, path, input_hw)
        except ORT_ERRORS as error:
            raise _load_error(path, error) from error
        check_request_supported(path, metadata, input_hw=input_hw, half=half)
        return cls(session, metadata, images, layout, device=device_name)

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
            outputs = [self._run({self._input.name: batch, **feeds}) for batch in batches]
        except ORT_ERRORS as error:
            raise DeviceError(
                f"ONNX Runtime could not run {len(images)} images: {ort_reason(error)}",
                fix="Try fewer images at once, or --device cpu",
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
            return self._session.run(session, list(self._layout.outputs), feeds)

    def _to_input(self, canvases: Sequence[Image]) -> npt.NDArray[Any]:
        padding = (self.metadata.batch or 0) - len(canvases)
        canvases = [*canvases, *[canvases[-1]] * padding]
        if self._input.kind == "uint8":
            return np.stack(canvases)
        return to_network_input(canvases).astype(self._input.dtype, copy=False)

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


def session_options(*, exact_int8: bool = True) -> onnxruntime.SessionOptions:
    """Return the session options of the Detector, also for benchmarks that compare it with a bare session."""
    options = base_session_options(exact_int8=exact_int8)
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


def _load_error(path: Path, error: Exception) -> LoadError:
    return LoadError(
        f"ONNX Runtime {onnxruntime.__version__} cannot open {path}: {ort_reason(error)}",
        fix="Check the file, or export it again:  y7 export --weights WEIGHTS.pt",
    )


# --- metadata and layout --------------------------------------------------------------------------------------------


def _read_layout(
    opened: OrtSession, path: Path, input_hw: tuple[int, int] | None
) -> tuple[ModelMetadata, InputLayout, OutputLayout]:
    """Return the metadata, or what is assumed for a file without any, and the layout of inputs and outputs.

    Raises:
        LoadError: The metadata is damaged or belongs to another graph, or the graph is not a known layout.
    """
    session = opened.get()
    inputs, outputs = _specs(session.get_inputs()), _specs(session.get_outputs())  # inputs with a default: not listed
    images = find_input(str(path), inputs, outputs)
    properties = session.get_modelmeta().custom_metadata_map
    text = properties.get(METADATA_KEY)
    metadata = None if text is None else ModelMetadata.from_json(text)
    with_default = {entry.name for entry in session.get_overridable_initializers()}
    has_thresholds = set(THRESHOLD_INPUTS) <= with_default
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
        outputs = _run_shapes(opened, images, outputs, canvas_hw, path)
    found = find_layout(str(path), inputs, outputs, canvas_hw=canvas_hw, properties=properties)
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


def _specs(nodes: Sequence[Any]) -> tuple[TensorSpec, ...]:
    """Return names, types and shapes of ONNX Runtime's `NodeArg`s; the shape of what is not a tensor is empty."""
    return tuple(
        TensorSpec(
            name=node.name,
            dtype=_DTYPES.get(node.type, node.type),
            shape=tuple(size if isinstance(size, int) else None for size in node.shape or ()),
        )
        for node in nodes
    )


def _is_dynamic(images: InputLayout, outputs: Sequence[TensorSpec]) -> bool:
    """Return True if only a run shows the rows and columns of the outputs."""
    if set(NMS_OUTPUTS) <= {output.name for output in outputs}:
        return False
    return images.input_hw is None or any(not output.shape or None in output.shape[1:] for output in outputs)


def _run_shapes(
    session: OrtSession,
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
    except ORT_ERRORS as error:
        raise LoadError(
            f"{path} does not state the size of its outputs, and does not run on an image of "
            f"{canvas_hw[0]}x{canvas_hw[1]}: {ort_reason(error)}",
            fix="Pass the size for which it was exported:  --img HEIGHT,WIDTH",
        ) from error
    return tuple(
        replace(output, shape=tuple(getattr(array, "shape", ()))) for output, array in zip(outputs, arrays, strict=True)
    )
