"""The interface between the Detector and the runtimes: uint8 images go in, boxes in network-input pixels come out.

The Detector computes the letterbox geometry; each runtime applies it to the pixels, with OpenCV on a CPU or with a CUDA
kernel on a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar, cast

from yolov7_deploy._bounded_read import MAX_CHECKPOINT_BYTES, MAX_MODEL_BYTES, check_file
from yolov7_deploy._process import call_after_fork
from yolov7_deploy.errors import LoadError, UsageError, broken_library, missing_library
from yolov7_deploy.hardware.system import has_vnni
from yolov7_deploy.hub import CHECKPOINT_SUFFIXES, ENGINE_SUFFIXES
from yolov7_deploy.image import FloatArray, Image, Letterbox
from yolov7_deploy.inspection.onnx_file import read_onnx_metadata
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.options import ONNX_RUNTIMES, Thresholds, size_text
from yolov7_deploy.postprocess import RawDetections

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class TimingBreakdown:
    """Milliseconds of one call by stage; a stage that does not exist is 0 (nothing is uploaded on a CPU).

    Attributes:
        preprocess_ms: Letterbox and layout, on the host or on the GPU.
        upload_ms: Copies to the GPU, including those into page-locked memory.
        engine_ms: The network, including NMS if it is inside the model.
        download_ms: Copies from the GPU.
        postprocess_ms: NMS outside the model, and creating the results.
    """

    preprocess_ms: float
    upload_ms: float
    engine_ms: float
    download_ms: float
    postprocess_ms: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeResult:
    """Detections of a list of images, and the time of the whole call.

    Attributes:
        detections: One per image, in their order.
        preprocess_ms, postprocess_ms: As in `TimingBreakdown`.
        inference_ms: Everything between the prepared input and the raw outputs.
        timing: All stages; always present for a `timed` call.
    """

    detections: list[RawDetections]
    preprocess_ms: float
    inference_ms: float
    postprocess_ms: float
    timing: TimingBreakdown | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class IntermediateOutputs:
    """Intermediate outputs of a network for one canvas, as far as the file exposes them.

    Attributes:
        heads: Raw head maps float32 [3 * (5 + C), H, W], fine to coarse; empty if the file does not expose them.
        decoded: float32 [A, 5 + C]: cx, cy, w, h, objectness, classes; `None` if NMS follows directly.
        detections: Detections of NMS inside the file in the same run, with its default thresholds, but all scores if
            `conf` is an input; `None` without NMS.
    """

    heads: list[FloatArray]
    decoded: FloatArray | None
    detections: RawDetections | None = None


class Runtime(Protocol):
    """A model that is ready to run. `infer` may be called from several threads at the same time.

    Attributes:
        name: Name in `RUNTIMES`.
        metadata: The model's metadata.
        device: `cpu`, `cuda:N`, `intel:gpu` or `intel:npu`.
        max_batch_size: Maximum number of images per run of the network, `None` if unlimited; longer lists are split.
        takes_gpu_arrays: Images may be arrays on the GPU (`yolov7_deploy.runtimes.device_arrays`).
    """

    name: str
    metadata: ModelMetadata
    device: str
    max_batch_size: int | None
    takes_gpu_arrays: bool

    @property
    def runtime_info(self) -> tuple[tuple[str, str], ...]:
        """Execution settings as a benchmark reports them, such as ("CUDA graph", "on"); calls may change them."""
        ...

    def infer(
        self,
        images: Sequence[Image],
        letterboxes: Sequence[Letterbox],
        thresholds: Thresholds,
        *,
        timed: bool = False,
    ) -> RuntimeResult:
        """Run letterbox, network and NMS on contiguous uint8 BGR images.

        Args:
            images: Images [H, W, 3] of any sizes.
            letterboxes: Geometry of each image; all canvases have the same size.
            thresholds: Which detections to keep.
            timed: Measure every stage separately. On a GPU this synchronises between stages: for benchmarks.
        """
        ...

    def close(self) -> None:
        """Free the model; calling it twice is fine."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeEntry:
    """A runtime in the table of runtimes.

    Attributes:
        name: Name in messages, options and reports.
        suffixes: Suffixes of the files that it opens.
        module: Module of its class, imported when a file is opened.
        attribute: Name of its class.
        distributions: Distributions that its speed depends on, as reports name them with their versions.
    """

    name: str
    suffixes: tuple[str, ...]
    module: str
    attribute: str
    distributions: tuple[str, ...]


RUNTIMES = (
    RuntimeEntry(
        name="pytorch",
        suffixes=CHECKPOINT_SUFFIXES,
        module="yolov7_deploy.runtimes.pytorch",
        attribute="PytorchRuntime",
        distributions=("torch",),
    ),
    RuntimeEntry(
        name="onnxruntime",
        suffixes=(".onnx",),
        module="yolov7_deploy.runtimes.onnxruntime",
        attribute="OrtRuntime",
        distributions=("onnxruntime", "onnxruntime-gpu"),
    ),
    RuntimeEntry(
        name="openvino",
        suffixes=(".onnx",),
        module="yolov7_deploy.runtimes.openvino",
        attribute="OvRuntime",
        distributions=("openvino",),
    ),
    RuntimeEntry(
        name="tensorrt",
        suffixes=ENGINE_SUFFIXES,
        module="yolov7_deploy.runtimes.tensorrt",
        attribute="TrtRuntime",
        distributions=("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-rtx-cu13", "cuda-python"),
    ),
)


def runtime_entry(path: Path, runtime: str = "auto", *, device: str = "cpu") -> RuntimeEntry:
    """Return the runtime that opens a file.

    Args:
        path: The file.
        runtime: One of `ONNX_RUNTIMES`. `auto` is OpenVINO for ONNX files that it runs faster on this CPU, if it is
            installed: INT8 for CPUs, and FP16; for other ONNX files ONNX Runtime, if it is installed.
        device: The device on which it will run.

    Raises:
        LoadError: No runtime opens files with this suffix.
        UsageError: The runtime is unknown, or does not open such files.
    """
    if runtime not in (*ONNX_RUNTIMES, *(entry.name for entry in RUNTIMES)):
        raise UsageError(f"--runtime {runtime} is unknown.", fix=f"One of: {', '.join(ONNX_RUNTIMES)}")
    entries = {entry.name: entry for entry in RUNTIMES if path.suffix.lower() in entry.suffixes}
    name = runtime.partition("-")[0]
    if name in entries:
        return entries[name]
    if entries and name != "auto":
        raise UsageError(
            f"{path} runs with {' or '.join(entries)}, not with {name}.",
            fix="Leave --runtime out, or export the weights:  y7 export --weights WEIGHTS.pt"
            + " --engine" * (name == "tensorrt"),
        )
    if "openvino" in entries and _prefers_openvino(path, device):
        return entries["openvino"]
    for entry in entries.values():
        return entry
    known = ", ".join(dict.fromkeys(suffix for entry in RUNTIMES for suffix in entry.suffixes))
    raise LoadError(
        f"{path} is not a model file by its suffix: those end in {known}.",
        fix="If it is one, rename it; else pass another file with --weights.",
    )


def installed_runtimes(path: Path, device: str) -> tuple[str, ...]:
    """Return the runtimes that can be expected to run a file here: all installed ones for ONNX files on a CPU."""
    if path.suffix.lower() != ".onnx" or device not in ("auto", "cpu") or (device == "auto" and _has_cuda()):
        return ("auto",)
    return tuple(name for name in ("onnxruntime", "openvino") if _is_installed(name)) or ("auto",)


def _is_installed(library: str) -> bool:
    try:
        return importlib.util.find_spec(library) is not None
    except (ImportError, ValueError):
        return False


def _prefers_openvino(path: Path, device: str) -> bool:
    if not _is_installed("openvino") or device not in ("auto", "cpu"):
        return device.startswith("intel:")
    if not _is_installed("onnxruntime"):
        return True
    metadata = read_onnx_metadata(path)
    if metadata is None or metadata.precision == "fp32" or (device == "auto" and _has_cuda()):
        return False
    int8 = metadata.int8
    return int8 is None or (int8.target == "cpu" and (int8.reduce_range or has_vnni() is not False))


def _has_cuda() -> bool:
    """Return True if ONNX Runtime is installed and has a CUDA provider."""
    if not _is_installed("onnxruntime"):
        return False
    from yolov7_deploy._ort_options import has_cuda_provider

    return has_cuda_provider()


def open_runtime(
    path: Path, *, device: str, input_hw: tuple[int, int] | None, half: bool | None = None, runtime: str = "auto"
) -> Runtime:
    """Load the model in `path` on a device (`auto`, `cpu`, `cuda`, `cuda:0`, `intel:gpu`, `intel:npu`).

    `half` selects FP16 or FP32; `None` leaves the choice to the runtime. Files with a fixed precision (`.onnx`,
    `.engine`) refuse any other.

    Raises:
        LoadError: The file is missing or broken.
        MissingLibraryError: The library for this kind of file is not installed, or does not load.
        DeviceError: The machine or the library has no such device.
        UsageError: The file has another fixed size or precision.
    """
    entry = runtime_entry(path, runtime, device=device)
    try:
        check_file(path, max_bytes=MAX_CHECKPOINT_BYTES if entry.name == "pytorch" else MAX_MODEL_BYTES)
    except FileNotFoundError as error:
        fix = "Check the path, or export it:  y7 export --weights yolov7"
        raise LoadError(f"{path} does not exist.", fix=fix) from error
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error.strerror or error}.", fix="Check the path.") from error
    try:
        module = importlib.import_module(entry.module)
    except ModuleNotFoundError as error:
        raise missing_library(error, f"to run {path.name}") from error
    except (ImportError, OSError) as error:
        raise broken_library(error, entry.distributions[0], f"to run {path.name}") from error
    options = {"precision": runtime.partition("-")[2]} if "-" in runtime else {}
    opened = getattr(module, entry.attribute).open(path, device=device, input_hw=input_hw, half=half, **options)
    return cast(Runtime, opened)


def check_request_supported(
    path: Path, metadata: ModelMetadata, *, input_hw: tuple[int, int] | None, half: bool | None, export: str = ""
) -> None:
    """Refuse an input size or precision other than the fixed one of a file.

    Args:
        path: The file.
        metadata: Its metadata.
        input_hw: The requested size, if any.
        half: The requested precision, if any.
        export: More options that `y7 export` needs to create such a file.

    Raises:
        UsageError: The message names both, and the fix is the command that creates the requested file.
    """
    weights, precision = metadata.source or "WEIGHTS.pt", "fp16" if half else "fp32"
    if input_hw is not None and metadata.input_hw is not None and input_hw != metadata.input_hw:
        fixed, requested = metadata.input_hw, input_hw
        raise UsageError(
            f"{path} has a fixed input of {fixed[0]}x{fixed[1]}, not {requested[0]}x{requested[1]}.",
            fix=f"Leave --img out, or:  y7 export --weights {weights} --img {size_text(requested)} {export}".rstrip(),
        )
    check_multiple(input_hw, metadata)
    if half is not None and half != (metadata.precision == "fp16"):
        raise UsageError(
            f"{path} is {metadata.precision}; its precision is in the file.",
            fix=f"Leave {'--half' if half else '--no-half'} out, or:  y7 export --weights {weights} "
            f"--precision {precision} {export}".rstrip(),
        )


def check_multiple(input_hw: tuple[int, int] | None, metadata: ModelMetadata) -> None:
    """Refuse a requested size that is not a multiple of the stride; a model without known strides takes any.

    Raises:
        UsageError: The fix is the next larger size.
    """
    stride = metadata.stride
    if input_hw is None or not metadata.strides or not any(side < 1 or side % stride for side in input_hw):
        return
    height, width = (max(1, -(-side // stride)) * stride for side in input_hw)
    raise UsageError(
        f"An input of {input_hw[0]}x{input_hw[1]} is not a multiple of this model's stride {stride}.",
        fix=f"--img {size_text((height, width))}",
    )


def join_results(results: Sequence[RuntimeResult], groups: Sequence[Sequence[int]]) -> RuntimeResult:
    """Return one result for several runs, with the sum of their times.

    Args:
        results: Result of each run.
        groups: Positions of the images of each run in the joined result.
    """
    by_position = {
        position: found
        for result, group in zip(results, groups, strict=True)
        for position, found in zip(group, result.detections, strict=True)
    }
    timings = [result.timing for result in results if result.timing is not None]
    return RuntimeResult(
        detections=[by_position[position] for position in range(len(by_position))],
        preprocess_ms=sum(result.preprocess_ms for result in results),
        inference_ms=sum(result.inference_ms for result in results),
        postprocess_ms=sum(result.postprocess_ms for result in results),
        timing=_sum_timings(timings) if len(timings) == len(results) else None,
    )


def _sum_timings(timings: Sequence[TimingBreakdown]) -> TimingBreakdown:
    names = [entry.name for entry in fields(TimingBreakdown)]
    return TimingBreakdown(**{name: sum(getattr(timing, name) for timing in timings) for name in names})


def check_rect_supported(path: Path, runtime: Runtime) -> None:
    """Refuse rectangular input for files of a fixed size, and for engines.

    Raises:
        UsageError: The fix is the command that creates a file of dynamic input size.
    """
    fixed = runtime.metadata.input_hw
    if fixed is None and runtime.name != "tensorrt":
        return
    what = "is an engine" if fixed is None else f"has a fixed input of {fixed[0]}x{fixed[1]}"
    raise UsageError(
        f"{path} {what}; rectangular input needs a file that takes any height and width.",
        fix="Leave --rect out, use the weights (.pt), or export them:  y7 export --weights WEIGHTS.pt --dynamic",
    )


def split_batches(items: Sequence[_T], size: int | None) -> list[Sequence[_T]]:
    """Split items into consecutive batches of `size`; the last may be smaller. `None` keeps them together."""
    if size is None:
        return [items]
    return [items[start : start + size] for start in range(0, len(items), size)]


_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class CallTracker:
    """Counts calls of the caller's threads, runs submitted ones in threads of its own, and waits for both.

    No lock is held while a callback of a future runs, so callbacks may call every method.

    Args:
        threads: Maximum number of threads for submitted calls; they are started when they are needed.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._is_closed = False
        self._reset()
        call_after_fork(self)

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._running: dict[int, int] = {}  # number of calls by thread
        self._closing: set[int] = set()  # threads that wait in `close`; others do not wait for their calls
        self._submitted: set[Future[object]] = set()
        self._pool: ThreadPoolExecutor | None = None
        self._pool_threads: set[int] = set()

    def after_fork(self) -> None:
        """Forget the calls and the threads of the parent process."""
        self._reset()

    def check_open(self) -> None:
        """Raise `UsageError` after `close`."""
        if self._is_closed:
            raise UsageError("This Detector is closed.", fix="Open a new one, or keep it open longer.")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count a call of this thread until the end of the block.

        Raises:
            UsageError: Closed.
        """
        thread = threading.get_ident()
        with self._changed:
            self.check_open()
            self._running[thread] = self._running.get(thread, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                count = self._running.pop(thread, 1)
                if count > 1:
                    self._running[thread] = count - 1
                elif self._is_closed:
                    self._changed.notify_all()

    def submit(
        self, function: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> Future[_Result]:
        """Call a function in a thread of the pool, also if `close` is called before it ends.

        Raises:
            UsageError: Closed, or Python cannot start a thread, because it exits or the system allows no more.
        """
        with self._changed:
            self.check_open()
            if self._pool is None:
                self._pool = ThreadPoolExecutor(
                    self._threads, thread_name_prefix="yolov7-deploy", initializer=self._add_pool_thread
                )
            try:
                future = self._pool.submit(function, *args, **kwargs)
            except RuntimeError as error:
                raise UsageError(f"Nothing can be submitted any more: {error}.", fix="Call the Detector.") from error
            self._submitted.add(future)  # type: ignore[arg-type]
        future.add_done_callback(self._submitted.discard)
        return future

    def _add_pool_thread(self) -> None:
        self._pool_threads.add(threading.get_ident())

    def close(self) -> bool:
        """Refuse further calls, cancel submitted calls that have not started, and wait for all others.

        A call does not wait for itself if it, or a callback of its future, calls this. Calling it twice is fine.

        Returns:
            True if no call is running any more; False in the callback of a call that an outer `close` of this thread
            has just cancelled.
        """
        thread = threading.get_ident()
        with self._changed:
            self._is_closed = True
            if thread in self._closing:
                return False
            self._closing.add(thread)
            self._changed.notify_all()
            submitted = list(self._submitted)
        try:
            for future in submitted:
                future.cancel()  # not through the pool, which would run callbacks under its lock
            wait([future for future in submitted if future.running()])
            with self._changed:
                self._changed.wait_for(lambda: not self._running.keys() - self._closing)
        finally:
            self._closing.discard(thread)
        if self._pool is not None:
            self._pool.shutdown(wait=thread not in self._pool_threads)
        return True
