"""Runs a TensorRT engine: one implementation for TensorRT 8.6 to 11 and TensorRT-RTX, with tensors addressed by name.

Images are uploaded as they are and letterboxed on the GPU. Calls of several threads run concurrently, each with its own
executor (`TrtExecutorPool`); what they share is read-only. Results are copies that belong to the caller.
"""

from __future__ import annotations

import contextlib
import platform
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from yolov7_deploy._process import call_after_fork, gpu_fork_error, never_free
from yolov7_deploy._text import get_logger
from yolov7_deploy.errors import DeviceError, LoadError, PluginError, UsageError, broken_library, missing_library
from yolov7_deploy.hardware.gpu import parse_device
from yolov7_deploy.image import Image, Letterbox
from yolov7_deploy.metadata import OVERFLOW_OUTPUT, ModelMetadata
from yolov7_deploy.options import Thresholds, size_text
from yolov7_deploy.output_layout import read_detections
from yolov7_deploy.postprocess import check_nms_compatible
from yolov7_deploy.runtimes.base import RuntimeResult, TimingBreakdown, check_request_supported, split_batches
from yolov7_deploy.runtimes.cuda import Cuda, Device, open_cuda
from yolov7_deploy.runtimes.device_arrays import GpuImage, gpu_image, is_gpu_array
from yolov7_deploy.runtimes.letterbox_kernel import Kernels, find_kernels
from yolov7_deploy.runtimes.tensorrt_engine import TrtEngine, TrtLog
from yolov7_deploy.runtimes.tensorrt_executor import TrtExecutor, TrtExecutorPool
from yolov7_deploy.tensorrt.build_record import TITLES, EngineEnvironment, EngineRecord, PluginUse, Product
from yolov7_deploy.tensorrt.capabilities import Trt, TrtCapabilities, create_logger, load_tensorrt
from yolov7_deploy.tensorrt.engine import Engine, plan_version
from yolov7_deploy.tensorrt.plugin_library import (
    PLUGIN_NAME,
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
    PluginLibrary,
    find_plugin,
)

logger = get_logger(__name__)

# TensorRT has one plugin registry per process. It keeps the first logger it was given and calls it until the end.
_registry_lock = threading.Lock()
_loggers: dict[Product, tuple[Trt, TrtLog, Trt]] = {}


class TrtRuntime:
    """A TensorRT engine on a GPU.

    Args:
        engine: The deserialized engine.
        metadata: Its metadata.
        cuda: The CUDA runtime.
        kernels: The letterbox kernel for this GPU, if it is built.
        index: Number of the GPU.
    """

    name = "tensorrt"

    def __init__(
        self, engine: TrtEngine, metadata: ModelMetadata, cuda: Cuda, kernels: Kernels | None, *, index: int
    ) -> None:
        self.metadata, self.device = metadata, f"cuda:{index}"
        self.max_batch_size: int | None = engine.batch_limits[1]
        self.takes_gpu_arrays = kernels is not None
        self._engine, self._cuda, self._kernels, self._index = engine, cuda, kernels, index
        self._overflowed = False
        self._executors = TrtExecutorPool(lambda: TrtExecutor(cuda, engine, kernels))
        self._is_inherited = False
        call_after_fork(self)

    @classmethod
    def open(cls, path: Path, *, device: str, input_hw: tuple[int, int] | None, half: bool | None = None) -> TrtRuntime:
        """Load an engine; see `open_runtime`. A size or precision other than that of the engine is refused.

        Raises:
            LoadError: Also if the engine was built for another environment; the message names the difference.
        """
        file, index = Engine.load(path), _gpu_index(device)
        record = file.record
        capabilities = _load_capabilities(record.product if record else _product_of(file.plan), path)
        cuda = open_cuda()
        with cuda.working_on(index):
            gpu = cuda.device()
            _load_plugins(capabilities, path, record, gpu)
            engine = _deserialize(capabilities, path, file)
            metadata = engine.metadata
            check_request_supported(path, metadata, input_hw=input_hw, half=half, export="--engine")
            kernels = _load_kernels(gpu)
            if record is None:
                logger.warning("%s: %s", path, "; ".join(metadata.notes))
            metadata = replace(metadata, notes=(*metadata.notes, *file.notes))
            runtime = cls(engine, metadata, cuda, kernels, index=index)
        info = ", ".join(f"{name} {value}" for name, value in runtime.runtime_info)
        logger.info("%s on %s: %s", path, gpu.name, info)
        return runtime

    @property
    def runtime_info(self) -> tuple[tuple[str, str], ...]:
        """See `Runtime.runtime_info`."""
        letterbox = "GPU kernel" if self._kernels else "host (y7 plugin builds the GPU kernel)"
        return (
            ("runtime", self._engine.capabilities.title),
            ("letterbox", letterbox),
            ("CUDA graph", self._engine.graph_state),
            ("transfers", "included"),
            ("concurrent calls", str(self._executors.limit)),
        )

    def infer(
        self,
        images: Sequence[Image],
        letterboxes: Sequence[Letterbox],
        thresholds: Thresholds,
        *,
        timed: bool = False,
    ) -> RuntimeResult:
        """See `Runtime.infer`. Images may be arrays on this GPU, which are not copied.

        Lists longer than the largest batch are split; a batch below the smallest size is padded with its last image.
        """
        self._check_usable()
        if self.metadata.nms is not None:
            check_nms_compatible(self.metadata.nms, thresholds)
        size = self._engine.batch_limits[1]
        results = []
        for batch, geometry in zip(split_batches(images, size), split_batches(letterboxes, size), strict=True):
            self._check_canvases(geometry)
            with self._cuda.working_on(self._index), self._executors.acquire() as executor:
                results.append(self._run(executor, batch, geometry, thresholds, timed=timed))
        return _merge(results, timed=timed)

    def _run(
        self,
        executor: TrtExecutor,
        images: Sequence[Image],
        letterboxes: Sequence[Letterbox],
        thresholds: Thresholds,
        *,
        timed: bool,
    ) -> RuntimeResult:
        """Run one batch and copy its results before the executor is released."""
        started = time.perf_counter()
        inputs = [self._input_image(image, executor) for image in images]
        prepared = time.perf_counter()
        batch = max(len(images), self._engine.batch_limits[0])
        run = executor.run(inputs, letterboxes, thresholds, batch=batch, timed=timed)
        downloaded = time.perf_counter()
        if OVERFLOW_OUTPUT in run.arrays and run.arrays[OVERFLOW_OUTPUT][: len(images)].any():
            self._warn_of_overflow()
        layout = self._engine.output_layout
        detections = read_detections(
            layout,
            [run.arrays[name] for name in layout.outputs],
            thresholds,
            batch=batch,
            canvas_hw=letterboxes[0].canvas_hw,
            count=len(images),
        )
        postprocess_ms = (time.perf_counter() - downloaded) * 1e3
        return RuntimeResult(
            detections=detections,
            preprocess_ms=run.preprocess_ms + (prepared - started) * 1e3,
            inference_ms=run.inference_ms,
            postprocess_ms=postprocess_ms,
            timing=replace(run.timing, postprocess_ms=postprocess_ms) if run.timing else None,
        )

    def _input_image(self, image: Image, executor: TrtExecutor) -> Image | GpuImage:
        return gpu_image(image, executor.stream, device=self._index) if is_gpu_array(image) else image

    def _warn_of_overflow(self) -> None:
        if not self._overflowed:
            self._overflowed = True
            limit = self.metadata.nms.max_candidates if self.metadata.nms else 0
            logger.warning(
                "%s: more boxes passed the threshold than enter NMS (%s); those with the lowest scores were dropped. "
                "Raise conf, or export with more:  y7 export --max-candidates N",
                self._engine.name,
                limit or "its limit",
            )

    def after_fork(self) -> None:
        """Leave the engine to the parent process: CUDA does not work in this one."""
        self._is_inherited = True
        never_free(self)

    def _check_usable(self) -> None:
        if self._is_inherited:
            raise gpu_fork_error(self.device)
        fault = self._cuda.fault
        if fault is not None:
            raise DeviceError(f"{self._engine.name} cannot run any more: {fault.message}", fix=fault.fix) from fault

    def _check_canvases(self, letterboxes: Sequence[Letterbox]) -> None:
        engine, (height, width) = self._engine, letterboxes[0].canvas_hw
        low, high = engine.canvas_hw(engine.min_shape), engine.canvas_hw(engine.max_shape)
        if any(letterbox.canvas_hw != (height, width) for letterbox in letterboxes):
            raise UsageError(
                "The letterboxes of one call have canvases of different sizes.", fix="Call once for each size."
            )
        if not (low[0] <= height <= high[0] and low[1] <= width <= high[1]):
            accepted = f"{low[0]}x{low[1]}" if low == high else f"{low[0]}x{low[1]} to {high[0]}x{high[1]}"
            raise UsageError(
                f"{engine.name} takes inputs of {accepted}, not {height}x{width}.",
                fix=f"y7 export --weights WEIGHTS.pt --img {size_text((height, width))} --engine",
            )

    def close(self) -> None:
        """Wait for the running calls, then free the executors and the engine; calling it twice is fine."""
        if self._is_inherited:
            return
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(DeviceError):  # the GPU may be lost
                stack.enter_context(self._cuda.working_on(self._index))
            self._executors.close()
            self._engine.close()


def _merge(results: Sequence[RuntimeResult], *, timed: bool) -> RuntimeResult:
    """Merge the results of the batches of one call."""
    if len(results) == 1:
        return results[0]
    timings = [result.timing for result in results if result.timing]
    timing = TimingBreakdown(
        preprocess_ms=sum(one.preprocess_ms for one in timings),
        upload_ms=sum(one.upload_ms for one in timings),
        engine_ms=sum(one.engine_ms for one in timings),
        download_ms=sum(one.download_ms for one in timings),
        postprocess_ms=sum(one.postprocess_ms for one in timings),
    )
    return RuntimeResult(
        detections=[raw for result in results for raw in result.detections],
        preprocess_ms=sum(result.preprocess_ms for result in results),
        inference_ms=sum(result.inference_ms for result in results),
        postprocess_ms=sum(result.postprocess_ms for result in results),
        timing=timing if timed else None,
    )


# --- opening --------------------------------------------------------------------------------------------------------


def _gpu_index(device: str) -> int:
    index = 0 if device == "auto" else parse_device(device).cuda_index
    if index is None:
        raise DeviceError(
            f"A TensorRT engine runs on an NVIDIA GPU, not on {device!r}.",
            fix="--device cuda:0   or run the .onnx it was built from:  --weights NAME.onnx",
        )
    return index


def _product_of(plan: bytes) -> Product:
    """Return the product that wrote a plan, by the plan's own header."""
    header = plan_version(plan)
    return cast(Product, header[0]) if header else "tensorrt"


def _load_capabilities(product: Product, path: Path) -> TrtCapabilities:
    try:
        return TrtCapabilities(product, load_tensorrt(product))
    except ModuleNotFoundError as error:
        raise missing_library(ModuleNotFoundError(name=product), f"to run {path.name}") from error
    except (ImportError, OSError) as error:
        raise broken_library(error, TITLES[product], f"to run {path.name}") from error


def _load_plugins(capabilities: TrtCapabilities, path: Path, record: EngineRecord | None, gpu: Device) -> None:
    """Check that the engine fits this environment, and register the plugins it needs, once per process.

    Our plugin is registered before TensorRT's own ones: TensorRT skips a whole library if one of its plugins is already
    registered.

    Raises:
        LoadError: The engine was built for another environment, or TensorRT does not accept the plugin that it needs.
        PluginError: The engine needs our plugin, and it is not built or damaged.
    """
    plugin = _find_plugin(capabilities, needed=record is not None and record.plugin is not None)
    if record is not None:
        _check_environment(capabilities, path, record, gpu, plugin)
    key = (PLUGIN_NAME, PLUGIN_VERSION, PLUGIN_NAMESPACE)
    with _registry_lock:
        if plugin is not None and (record is None or record.plugin) and key not in capabilities.registered_plugins():
            capabilities.load_plugin(str(plugin.path))
            if key not in capabilities.registered_plugins() and record is not None:
                raise LoadError(
                    f"{capabilities.title} does not accept the plugin {plugin.path}, which {path} needs.",
                    fix="Build it for this TensorRT:  y7 plugin",
                )
        capabilities.register_builtin_plugins(_log_and_logger(capabilities)[1])


def _find_plugin(capabilities: TrtCapabilities, *, needed: bool) -> PluginLibrary | None:
    try:
        return find_plugin(capabilities.abi)
    except PluginError as error:
        if needed:
            raise
        logger.debug("The NMS plugin is not loaded: %s", error.message)
        return None


def _check_environment(
    capabilities: TrtCapabilities, path: Path, record: EngineRecord, gpu: Device, plugin: PluginLibrary | None
) -> None:
    plugin_here = PluginUse(path=str(plugin.path), version=plugin.version, abi=plugin.abi) if plugin else None
    environment = EngineEnvironment(
        product=capabilities.product,
        tensorrt=capabilities.version,
        compute_capability=f"{gpu.compute_capability[0]}.{gpu.compute_capability[1]}",
        platform=f"{platform.system().lower()}-{platform.machine()}",
        plugin=plugin_here,
    )
    for mismatch in record.mismatches(environment, engine=str(path)):
        raise LoadError(f"{path} does not fit here. {mismatch}", fix=mismatch.fix)


def _deserialize(capabilities: TrtCapabilities, path: Path, file: Engine) -> TrtEngine:
    log, trt_logger = _log_and_logger(capabilities)
    compatible = file.record is not None and file.record.version_compatible
    runtime, engine = capabilities.deserialize_engine(file.plan, trt_logger, version_compatible=compatible)
    if engine is None:
        raise LoadError(
            f"{capabilities.title} cannot deserialize {path}. Its log:\n{log.tail}",
            fix=f"Build it here:  y7 build --weights {path.stem}.onnx",
        )
    recorded = file.record.metadata if file.record is not None else None
    # `y7 build` shares profiles (`TrtCapabilities.add_profile`); an engine does not tell whether another tool did.
    shares = file.record is not None
    return TrtEngine(capabilities, runtime, engine, log, name=str(path), recorded=recorded, shares_profiles=shares)


def _log_and_logger(capabilities: TrtCapabilities) -> tuple[TrtLog, Trt]:
    """Return the log of this TensorRT in this process, and the TensorRT logger that writes to it."""
    if capabilities.product not in _loggers or _loggers[capabilities.product][0] is not capabilities.trt:
        log = TrtLog()
        _loggers[capabilities.product] = (capabilities.trt, log, create_logger(capabilities.trt, log.append))
    return _loggers[capabilities.product][1:]


def _load_kernels(gpu: Device) -> Kernels | None:
    """Load the letterbox kernel for this GPU; without it the engine runs more slowly."""
    try:
        return find_kernels(gpu.compute_capability)
    except PluginError as error:
        logger.warning("The letterbox runs on the host: %s", error)
        return None
