"""Runs an ONNX file with ONNX Runtime, on a CPU or a CUDA GPU."""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import platform
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import onnxruntime

from yolov7_deploy._atomic_file import is_partial_file
from yolov7_deploy._bounded_read import MAX_MODEL_BYTES, open_file
from yolov7_deploy._ort_options import ORT_ERRORS, base_session_options, find_damage, ort_reason
from yolov7_deploy._text import get_logger, is_unicode
from yolov7_deploy.errors import DeviceError, LoadError
from yolov7_deploy.hardware.gpu import parse_device
from yolov7_deploy.hardware.system import has_vnni, usable_cores
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.output_layout import TensorSpec
from yolov7_deploy.runtimes.onnx_session import Array, FairSemaphore, OnnxRuntime, OnnxSession

logger = get_logger(__name__)

# More concurrent runs gain nothing (four keep two cores busy), and each holds its own activations: 110 MB for YOLOv7 at
# 640. Fewer would leave cores idle during layers that run on one thread.
RUNS_PER_CORE = 2
# How long intra-op threads spin while they wait for the next layer. The default is a million iterations, 16 to 47 ms,
# which gains nothing for one caller and takes the cores from other callers and other programs.
SPIN_US = 50
_CPU: list[Any] = ["CPUExecutionProvider"]
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(uint8)": "uint8",
    "tensor(double)": "float64",
}


class OrtSession(OnnxSession[onnxruntime.InferenceSession]):
    """A session of ONNX Runtime.

    The number of threads that run the network at the same time is limited (`RUNS_PER_CORE` for each core).

    Args:
        path: The file.
        providers: ONNX Runtime's providers.
        device: `cpu` or `cuda:N`.

    Raises:
        LoadError: ONNX Runtime cannot open it.
    """

    library, errors = "ONNX Runtime", ORT_ERRORS

    def __init__(self, path: Path, providers: list[Any], *, device: str) -> None:
        self._providers = providers
        self._exact_int8 = has_vnni() is not True
        super().__init__(path, device=device)
        model = self.get()
        try:
            # Inputs with a default value are not among the inputs.
            self.inputs, self.outputs = _specs(model.get_inputs()), _specs(model.get_outputs())
            self.properties = model.get_modelmeta().custom_metadata_map
            self.thresholds = frozenset(entry.name for entry in model.get_overridable_initializers())
        except ORT_ERRORS as error:
            raise _load_error(path, error) from error
        self._threads = model.get_session_options().intra_op_num_threads
        self._max_runs = RUNS_PER_CORE * (self._threads or os.cpu_count() or 1)
        self._semaphore = FairSemaphore(self._max_runs)

    def _open(self, path: Path) -> onnxruntime.InferenceSession:
        _check_damage(self._path, path)
        try:
            # ONNX Runtime refuses names that are not valid Unicode.
            model = str(path) if is_unicode(str(path)) else path.read_bytes()
            options = session_options(exact_int8=self._exact_int8)
            return onnxruntime.InferenceSession(model, options, providers=self._providers)
        except ORT_ERRORS as error:
            raise _load_error(self._path, error) from error

    @property
    def runtime_info(self) -> tuple[tuple[str, str], ...]:
        """See `Runtime.runtime_info`."""
        return (
            ("runtime", f"ONNX Runtime {onnxruntime.__version__}"),
            ("intra-op threads", str(self._threads or "default")),
            ("concurrent runs", f"at most {self._max_runs}"),
        )

    def open_other(self, path: Path) -> OrtSession:
        """See `OnnxSession.open_other`."""
        return OrtSession(path, self._providers, device=self.device)

    def reason(self, error: Exception) -> str:
        """See `OnnxSession.reason`."""
        return ort_reason(error)

    def run(
        self, model: onnxruntime.InferenceSession, outputs: list[str] | None, feeds: dict[str, Array]
    ) -> list[Array]:
        """See `OnnxSession.run`.

        The setting for exact INT8 breaks graphs of other programs whose weights have a scale per channel and no zero
        point: it adds a zero point of wrong shape, which only a run shows. They run without it.
        """
        with self._semaphore:
            try:
                return list(model.run(outputs, feeds))
            except ORT_ERRORS as error:
                if "zero_point" not in str(error):
                    raise
        if self.use_default_int8(model):
            logger.warning(
                "%s: its INT8 weights have no zero points, so ONNX Runtime uses its default INT8 kernels, which are "
                "less exact on CPUs without VNNI.",
                self._path,
            )
        with self._semaphore:
            return list(self.get().run(outputs, feeds))

    def use_default_int8(self, opened: onnxruntime.InferenceSession) -> bool:
        """Open the file again without the setting for exact INT8; return False if another thread was faster."""
        with self._lock:
            if self._model is not opened or not self._exact_int8:
                return False  # closed, another thread was faster, or they are in use
            self._exact_int8 = False
            self._model = self._open(self._absolute_path)
        return True


class OrtRuntime(OnnxRuntime):
    """An ONNX file in an ONNX Runtime session."""

    name = "onnxruntime"

    @classmethod
    def open(cls, path: Path, *, device: str, input_hw: tuple[int, int] | None, half: bool | None = None) -> OrtRuntime:
        """Open a file; see `open_runtime`. A size or precision other than that of the file is refused."""
        providers, device_name = _providers(device)
        session = OrtSession(path, providers, device=device_name)
        if device_name != "cpu" and not _uses_cuda(session):
            session.close()
            if device != "auto":
                raise _no_cuda(device_name)
            logger.warning("%s runs on the CPU: %s", path, _no_cuda(device_name))
            device_name = "cpu"
            session = OrtSession(path, _CPU, device=device_name)
        runtime = cls(session, path, input_hw=input_hw, half=half)
        if device_name == "cpu":
            _prepare_low_precision(session, path, runtime.metadata)
        return runtime


def _prepare_low_precision(session: OrtSession, path: Path, metadata: ModelMetadata) -> None:
    """Log a warning about files that are slow on this CPU, and choose the kernels of INT8 files."""
    if metadata.precision == "fp16":
        _warn(
            path,
            "is FP16, which ONNX Runtime computes slower than FP32 on a CPU. Use an FP32 file, or OpenVINO "
            "(pip install 'yolov7-deploy[openvino]'):  --runtime openvino",
        )
    if metadata.int8 is None:
        return
    fitting = "arm" if platform.machine().lower() in ("aarch64", "arm64") else "cpu"
    if metadata.int8.target != fitting:
        _warn(
            path,
            f"was quantized for {metadata.int8.target}, which is slower than FP32 on this CPU. Quantize the FP32 file "
            f"for it:  y7 quantize --weights FILE.onnx --calib FOLDER --int8-target {fitting}",
        )
    elif metadata.int8.reduce_range:
        session.use_default_int8(session.get())  # nothing saturates, and these kernels are faster
    elif has_vnni() is False:
        _warn(
            path,
            "has weights of 8 bits, and this CPU has no VNNI: ONNX Runtime uses slower kernels to be exact. "
            "Quantize the FP32 file with  --reduce-range",
        )


def _warn(path: Path, message: str) -> None:
    """Log a warning about a file once, since commands open a file several times."""
    if is_partial_file(path):  # a file that an export verifies
        logger.debug("%s %s", path, message)
    else:
        _warn_once(path, message)


@lru_cache(maxsize=1000)
def _warn_once(path: Path, message: str) -> None:
    logger.warning("%s %s", path, message)


def session_options(*, exact_int8: bool | None = None) -> onnxruntime.SessionOptions:
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
        return _CPU, "cpu"
    index = parse_device(device).cuda_index
    if index is None:
        raise DeviceError(f"ONNX Runtime has no device {device!r} here.", fix="--device cpu  or  --device cuda:0")
    if not has_cuda:
        raise DeviceError(
            f"This ONNX Runtime has no CUDA provider (it has {', '.join(available)}).",
            fix="Use  --device cpu   or, with a GPU:  pip uninstall onnxruntime; pip install 'yolov7-deploy[gpu]'",
        )
    if hasattr(onnxruntime, "preload_dlls"):  # since 1.21: finds the libraries that pip installed
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            onnxruntime.preload_dlls()
    cuda = ("CUDAExecutionProvider", {"device_id": index})
    return [cuda, "CPUExecutionProvider"], f"cuda:{index}"


def _uses_cuda(session: OrtSession) -> bool:
    """Return whether a session that asked for CUDA got it: ONNX Runtime falls back to the CPU without an error."""
    return "CUDAExecutionProvider" in session.get().get_providers()


def _no_cuda(device: str) -> DeviceError:
    return DeviceError(
        f"ONNX Runtime cannot use {device}: its CUDA libraries (cuBLAS, cuDNN) are missing or of another version.",
        fix="pip install 'onnxruntime-gpu[cuda,cudnn]'   or use  --device cpu",
    )


def _check_damage(name: Path, path: Path) -> None:
    """Refuse a file that would crash the process."""
    try:
        with open_file(path, max_bytes=MAX_MODEL_BYTES) as file:
            damage = find_damage(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
    except (OSError, ValueError):  # ONNX Runtime reports it
        return
    if damage:
        raise LoadError(
            f"{name} is damaged: {damage}.",
            fix="Export it again:  y7 export --weights WEIGHTS.pt",
        )


def _load_error(path: Path, error: Exception) -> LoadError:
    return LoadError(
        f"ONNX Runtime {onnxruntime.__version__} cannot open {path}: {ort_reason(error)}",
        fix="Check the file, or export it again:  y7 export --weights WEIGHTS.pt",
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
