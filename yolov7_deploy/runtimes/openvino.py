"""Runs an ONNX file with OpenVINO, on a CPU or on an Intel GPU or NPU.

One caller gets all cores for each image, which is the shortest time per image. If calls overlap, the network is
compiled a second time, for throughput: each core then runs an image of its own, without waiting for other cores at
every layer. Until that is ready, calls wait for each other.

A file of dynamic input size is compiled once for all sizes. For a size that is used often it is compiled again, with
this size fixed: yolov7-tiny is then 7 % faster in FP32 and 11 % in INT8, yolov7 in FP32 not measurably.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from yolov7_deploy._atomic_file import is_partial_file
from yolov7_deploy._bounded_read import MAX_MODEL_BYTES, read_bytes
from yolov7_deploy._text import get_logger, shorten
from yolov7_deploy.errors import DeviceError, LoadError, UsageError
from yolov7_deploy.hardware.system import has_vnni, usable_cores
from yolov7_deploy.hub import cache_dir
from yolov7_deploy.metadata import NMS_OUTPUTS, THRESHOLD_INPUTS, ModelMetadata
from yolov7_deploy.options import Thresholds
from yolov7_deploy.output_layout import TensorSpec
from yolov7_deploy.postprocess import HeadNms
from yolov7_deploy.runtimes.onnx_session import Array, OnnxRuntime, OnnxSession, file_version
from yolov7_deploy.runtimes.openvino_graph import OpenvinoGraph, rewrite_for_openvino

logger = get_logger(__name__)

# Names of devices here and in OpenVINO.
DEVICES = {"auto": "CPU", "cpu": "CPU", "intel:gpu": "GPU", "intel:npu": "NPU"}
_EXECUTION_PRECISIONS = {"bf16": "bf16", "f16": "fp16"}  # as in ModelMetadata
_CPU_CAPABILITIES = {"bf16": "BF16", "f16": "FP16"}
MAX_CACHE_BYTES = 2 << 30  # compiled networks on disk; yolov7 in FP32 has 150 MB
# After so many calls without overlap, calls use all cores for each image again.
_ALONE = 8
# Calls of one size before the network is compiled for it, and how many sizes are kept, those used last. Each needs the
# memory of its weights (150 MB for yolov7), and compiling takes as long as a few images.
SIZE_CALLS, MAX_SIZES = 16, 4
Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # names and shapes of all inputs


class _SignalStack(ctypes.Structure):
    """`stack_t` of Linux: the memory on which a thread runs signal handlers."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextlib.contextmanager
def _own_signal_stack() -> Iterator[None]:
    """Let this thread keep its stack for signal handlers while OpenVINO loads its CPU plugin.

    The plugin gives the thread another one, and unmaps it when the plugin is freed. If another thread frees it, the
    next signal, such as Ctrl-C, would end the process with a segmentation fault.
    """
    if sys.platform != "linux":
        yield
        return
    libc, before = ctypes.CDLL(None), _SignalStack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)


@dataclass(slots=True, eq=False)
class _Compiled:
    """A compiled network, and the requests that no call uses."""

    network: openvino.CompiledModel
    free: list[openvino.InferRequest] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Networks:
    """The networks of a session: one for short latency, and one for throughput once calls have overlapped.

    Attributes:
        latency: The network for short latency, of any size if that of the file is open.
        sizes: Networks for short latency with fixed shapes, least recently used first.
        size_calls: How often each size was used.
        throughput: The network for throughput.
        compiling: The thread that compiles it.
        running: Calls that run now.
        alone: Calls since the last overlap.
    """

    latency: _Compiled
    sizes: dict[Shapes, _Compiled] = field(default_factory=dict)
    size_calls: Counter[Shapes] = field(default_factory=Counter)
    throughput: _Compiled | None = None
    compiling: threading.Thread | None = None
    running: int = 0
    alone: int = _ALONE


class OvSession(OnnxSession[_Networks]):
    """An ONNX file in OpenVINO.

    Args:
        path: The file.
        device: A key of `DEVICES`.
        precision: Precision of everything that is not INT8: `f32`, `bf16` or `f16`.

    Raises:
        LoadError: OpenVINO cannot open it, or computes it wrongly.
        DeviceError: There is no such device, or it does not compute in this precision.
    """

    library = "OpenVINO"
    has_defaults = False
    errors = (RuntimeError, openvino.Exception) if hasattr(openvino, "Exception") else (RuntimeError,)

    def __init__(self, path: Path, *, device: str, precision: str) -> None:
        self.precision, self._cores = precision, usable_cores()
        super().__init__(path, device="cpu" if DEVICES[device] == "CPU" else device)

    @_own_signal_stack()
    def _open(self, path: Path) -> _Networks:
        graph = _read(path)
        _check_int8(self._path, graph)
        try:
            core = openvino.Core()
            _check_device(core, self.device, self.precision)
            self._graph: bytes | str = graph.data if graph.is_changed else str(self._absolute_path)
            model = core.read_model(self._graph)
            self.takes_pixels = graph.nms is not None and _takes_float_images(model)
            self.inputs = tuple(
                _spec(entry) for entry in model.inputs if not graph.thresholds.intersection(entry.get_names())
            )
            self._nms, self._heads = graph.nms, graph.heads
            self.outputs = _nms_outputs(self.inputs) if graph.nms else tuple(map(_spec, model.outputs))
            self._has_open_size = any(None in spec.shape[1:] for spec in self.inputs)
            if self.takes_pixels:
                model = _with_pixels(model)
            compiled = core.compile_model(model, DEVICES[self.device], self._settings("LATENCY"))
        except self.errors as error:
            raise LoadError(
                f"OpenVINO {openvino.__version__} cannot open {self._path}: {self.reason(error)}",
                fix="Run it with ONNX Runtime:  --runtime onnxruntime   or export it again:  y7 export --weights FILE",
            ) from error
        self.properties, self.thresholds = graph.properties, frozenset(graph.thresholds)
        return _Networks(_Compiled(compiled))

    def _settings(self, hint: str) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": hint,
            "INFERENCE_PRECISION_HINT": self.precision,
            "CACHE_DIR": _cache_folder(self._path),
        }
        if self.device == "cpu":
            # The default counts the cores of the whole machine, even in a container with fewer.
            settings["INFERENCE_NUM_THREADS"] = self._cores or 0
        return settings

    @property
    def has_host_nms(self) -> bool:
        """True if decoding and NMS run in NumPy, after the network."""
        return self._nms is not None

    @property
    def runtime_info(self) -> tuple[tuple[str, str], ...]:
        """See `Runtime.runtime_info`."""
        networks = self.get()
        used = networks.throughput or networks.latency
        return (
            ("runtime", f"OpenVINO {openvino.__version__}"),
            ("execution precision", self.precision),
            ("threads", str(used.network.get_property("INFERENCE_NUM_THREADS")) if self.device == "cpu" else "device"),
            ("streams", str(used.network.get_property("NUM_STREAMS"))),
        )

    def open_other(self, path: Path) -> OvSession:
        """See `OnnxSession.open_other`."""
        return OvSession(path, device=self.device, precision=self.precision)

    def reason(self, error: Exception) -> str:
        """See `OnnxSession.reason`."""
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        text = " ".join(line for line in lines if not line.startswith("Exception from"))
        return shorten(text)

    def run(self, model: _Networks, outputs: list[str] | None, feeds: dict[str, Array]) -> list[Array]:
        """See `OnnxSession.run`; every threshold needs a value, because they have no defaults in OpenVINO."""
        assert self.thresholds <= feeds.keys(), "every threshold has a value"
        names = outputs if outputs is not None else [spec.name for spec in self.outputs]
        images = {name: array for name, array in feeds.items() if self._nms is None or name not in THRESHOLD_INPUTS}
        shapes = tuple((name, array.shape) for name, array in images.items())
        if self._has_open_size:
            self._count_size(model, shapes)
        with self._request(model, shapes) as request:
            request.infer(images, share_inputs=True)
            if self._nms is None:
                return [request.get_tensor(name).data.copy() for name in names]
            heads = {name: request.get_tensor(name).data for name in self._heads}
            found = _run_nms(self._nms, list(heads.values()), feeds)
            return [found[name] if name in found else heads[name].copy() for name in names]

    @contextlib.contextmanager
    def _request(self, model: _Networks, shapes: Shapes) -> Iterator[openvino.InferRequest]:
        """Yield a request that no other call uses until the end of the block, and count the call."""
        with self._lock:
            model.running += 1
        request = None
        try:
            with self._lock:
                compiled = self._choose(model, shapes)
                request = compiled.free.pop() if compiled.free else None
            if request is None:
                request = compiled.network.create_infer_request()
            yield request
        finally:
            with self._lock:
                model.running -= 1
                if request is not None:
                    compiled.free.append(request)

    @_own_signal_stack()
    def _count_size(self, model: _Networks, shapes: Shapes) -> None:
        """Compile the network for a size at its `SIZE_CALLS`-th call; other threads do not wait for it."""
        with self._lock:
            model.size_calls[shapes] += 1
            if model.size_calls[shapes] != SIZE_CALLS:
                return
        try:
            core = openvino.Core()
            network = self._read_again(core)
            network.reshape({name: list(shape) for name, shape in shapes})
            compiled = _Compiled(core.compile_model(network, DEVICES[self.device], self._settings("LATENCY")))
        except self.errors as error:  # such as no memory: calls continue with the network of any size
            logger.warning("OpenVINO could not compile %s for %s: %s", self._path, shapes, self.reason(error))
            return
        with self._lock:
            model.sizes[shapes] = compiled
            if len(model.sizes) > MAX_SIZES:
                oldest = next(iter(model.sizes))
                del model.sizes[oldest], model.size_calls[oldest]

    def _choose(self, model: _Networks, shapes: Shapes) -> _Compiled:
        """Return the network for a call, and compile the one for throughput at the first overlap; needs the lock."""
        model.alone = model.alone + 1 if model.running == 1 else 0
        if shapes in model.sizes:
            model.sizes[shapes] = model.sizes.pop(shapes)  # now used last
        latency = model.sizes.get(shapes, model.latency)
        if model.alone >= _ALONE or self.device != "cpu" or self._cores == 1:
            return latency
        if model.throughput is None and model.compiling is None:
            thread = threading.Thread(target=self._compile_throughput, args=(model,), daemon=True)
            thread.start()
            model.compiling = thread
        return model.throughput or latency

    @_own_signal_stack()
    def _compile_throughput(self, model: _Networks) -> None:
        try:
            core = openvino.Core()
            network = core.compile_model(self._read_again(core), "CPU", self._settings("THROUGHPUT"))
        except self.errors as error:  # such as no memory: calls continue with the other network
            logger.warning("OpenVINO could not compile %s for throughput: %s", self._path, self.reason(error))
            return
        model.throughput = _Compiled(network)

    def _read_again(self, core: openvino.Core) -> openvino.Model:
        """Return the network that was opened, not compiled.

        Raises:
            One of `errors`: Its file has changed since then, or cannot be read.
        """
        if isinstance(self._graph, str) and file_version(self._absolute_path) != self._version:
            raise RuntimeError("the file has changed or was removed since it was opened")
        model = core.read_model(self._graph)
        return _with_pixels(model) if self.takes_pixels else model


def _takes_float_images(model: openvino.Model) -> bool:
    if len(model.inputs) != 1 or model.inputs[0].element_type != openvino.Type.f32:
        return False
    shape = model.inputs[0].partial_shape
    return shape.rank.is_static and len(shape) == 4 and shape[1] == openvino.Dimension(3)


def _with_pixels(model: openvino.Model) -> openvino.Model:
    """Return the network for images uint8 [B, H, W, 3], BGR, which it converts with all its threads."""
    steps = openvino.preprocess.PrePostProcessor(model)
    images, layout = steps.input(), openvino.Layout
    images.tensor().set_element_type(openvino.Type.u8).set_layout(layout("NHWC"))
    images.tensor().set_color_format(openvino.preprocess.ColorFormat.BGR)
    images.model().set_layout(layout("NCHW"))
    images.preprocess().convert_element_type(openvino.Type.f32)
    images.preprocess().convert_color(openvino.preprocess.ColorFormat.RGB).scale(255.0)
    return steps.build()


def _nms_outputs(inputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Return the outputs of a file whose NMS runs in NumPy."""
    batch = inputs[0].shape[0] if inputs and inputs[0].shape else None
    shapes: tuple[tuple[int | None, ...], ...] = ((batch, 1), (batch, None, 4), (batch, None), (batch, None))
    kinds = ("int32", "float32", "float32", "int32")
    return tuple(
        TensorSpec(name=name, dtype=kind, shape=shape)
        for name, kind, shape in zip(NMS_OUTPUTS, kinds, shapes, strict=True)
    )


def _run_nms(nms: HeadNms, heads: Sequence[Array], values: Mapping[str, Array]) -> dict[str, Array]:
    """Return the outputs of the NMS operator by name, with as many rows as the image with most detections has."""
    conf, iou, multi_label, class_agnostic = (float(values[name][0]) for name in THRESHOLD_INPUTS)
    thresholds = Thresholds(
        conf=conf, iou=iou, max_det=nms.max_det, multi_label=multi_label > 0.5, class_agnostic=class_agnostic > 0.5
    )
    images = nms(heads, thresholds)
    counts = [len(image.scores) for image in images]
    boxes = np.zeros((len(images), max(counts), 4), dtype=np.float32)
    scores = np.zeros(boxes.shape[:2], dtype=np.float32)
    classes = np.zeros(boxes.shape[:2], dtype=np.int32)
    for number, (count, image) in enumerate(zip(counts, images, strict=True)):
        boxes[number, :count], scores[number, :count], classes[number, :count] = image
    arrays = (np.array(counts, dtype=np.int32)[:, None], boxes, scores, classes)
    return dict(zip(NMS_OUTPUTS, arrays, strict=True))


def _cache_folder(path: Path) -> str:
    """Return the folder of compiled networks, without the oldest beyond `MAX_CACHE_BYTES`; empty: do not cache."""
    folder = cache_dir() / "openvino"
    if is_partial_file(path):  # a file that an export verifies: it is opened once
        return ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            return ""
        _remove_oldest(folder, MAX_CACHE_BYTES)
    except OSError:  # such as a read-only home folder of a container
        return ""
    return str(folder)


def _remove_oldest(folder: Path, max_bytes: int) -> None:
    """Remove the files of a folder that were read or written longest ago, until the others are small enough."""
    with os.scandir(folder) as entries:
        stats = [(entry.path, entry.stat()) for entry in entries if entry.is_file(follow_symlinks=False)]
    kept = 0
    for path, stat in sorted(stats, key=lambda item: max(item[1].st_atime, item[1].st_mtime), reverse=True):
        kept += stat.st_size
        if kept > max_bytes:
            Path(path).unlink(missing_ok=True)


class OvRuntime(OnnxRuntime):
    """An ONNX file in OpenVINO."""

    name = "openvino"

    def __init__(self, session: OvSession, path: Path, *, input_hw: tuple[int, int] | None, half: bool | None) -> None:
        super().__init__(session, path, input_hw=input_hw, half=half)
        if session.precision in _EXECUTION_PRECISIONS and self.metadata.int8 is None:
            self.metadata = replace(self.metadata, precision=_EXECUTION_PRECISIONS[session.precision])

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        device: str,
        input_hw: tuple[int, int] | None,
        half: bool | None = None,
        precision: str = "f32",
    ) -> OvRuntime:
        """Open a file; see `open_runtime`. A size or precision other than that of the file is refused."""
        if device not in DEVICES:
            raise DeviceError(
                f"OpenVINO has no device {device!r}.", fix=f"One of: {', '.join(DEVICES)}; or  --runtime onnxruntime"
            )
        session = OvSession(path, device=device, precision=precision)
        _check_decoding(path, session)
        runtime = cls(session, path, input_hw=input_hw, half=half)
        _check_saturation(path, runtime.metadata, runtime.device)
        return runtime


def _read(path: Path) -> OpenvinoGraph:
    try:
        graph = rewrite_for_openvino(read_bytes(path, max_bytes=MAX_MODEL_BYTES))
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error.strerror or error}.", fix="Check the path.") from error
    except (ValueError, IndexError, RecursionError) as error:
        raise LoadError(
            f"{path} is not an ONNX file, or is truncated ({error}).", fix="Export it:  y7 export --weights WEIGHTS.pt"
        ) from error
    if graph.has_external_data and graph.is_changed:
        raise LoadError(
            f"{path} has functions and keeps its weights in other files, which OpenVINO cannot open together.",
            fix="Run it with ONNX Runtime:  --runtime onnxruntime",
        )
    return graph


def _check_int8(path: Path, graph: OpenvinoGraph) -> None:
    """Refuse int8 activations: without AMX, OpenVINO 2026.4 computes convolutions after a Concat wrongly with them."""
    if graph.has_int8_activations:
        raise LoadError(
            f"{path} has int8 activations (for TensorRT or ARM); OpenVINO computes them wrongly on CPUs without AMX.",
            fix="Quantize the FP32 file for CPUs:  y7 quantize --weights FILE.onnx --calib FOLDER --int8-target cpu",
        )


def _check_saturation(path: Path, metadata: ModelMetadata, device: str) -> None:
    """Refuse INT8 weights of 8 bits on a CPU without VNNI, where the sums of OpenVINO's kernels saturate."""
    if metadata.int8 is not None and device == "cpu" and not metadata.int8.reduce_range and has_vnni() is False:
        raise UsageError(
            f"{path} has weights of 8 bits, and this CPU has no VNNI: sums in OpenVINO's INT8 kernels would saturate.",
            fix="Quantize the FP32 file for it:  y7 quantize --weights FILE.onnx --calib FOLDER --reduce-range   "
            "or use  --runtime onnxruntime",
        )


def _check_decoding(path: Path, session: OvSession) -> None:
    """Refuse float16 for decoding and NMS: coordinates over 512 lose half a pixel, and indices over 2048 change."""
    if session.precision == "f16" and not session.has_host_nms:
        raise UsageError(
            f"{path} has decoding or NMS in its graph, which OpenVINO would compute in float16, too.",
            fix="Use  --runtime openvino  or openvino-bf16, or a file of  y7 export --nms plugin  (the default)",
        )


def _check_device(core: openvino.Core, device: str, precision: str) -> None:
    name = DEVICES[device]
    available = {entry.partition(".")[0] for entry in core.available_devices}
    if name not in available:
        raise DeviceError(f"OpenVINO has no {name} here (it has {', '.join(sorted(available))}).", fix="--device cpu")
    needed = _CPU_CAPABILITIES.get(precision)
    if name == "CPU" and needed and needed not in core.get_property(name, "OPTIMIZATION_CAPABILITIES"):
        raise DeviceError(f"This CPU does not compute in {precision}.", fix="--runtime openvino  computes in float32.")


def _spec(port: Any) -> TensorSpec:  # noqa: ANN401 - an openvino.Output, input or output
    shape = port.partial_shape
    dims = [None if dim.is_dynamic else dim.get_length() for dim in shape] if shape.rank.is_static else []
    return TensorSpec(name=port.any_name, dtype=_dtype(port.element_type), shape=tuple(dims))


def _dtype(kind: openvino.Type) -> str:
    try:
        return str(np.dtype(kind.to_dtype()).name)
    except (RuntimeError, TypeError, ValueError):
        return str(kind)
