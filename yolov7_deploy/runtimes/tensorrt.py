"""Runs a TensorRT engine: TensorRT 8.6 to 11 and TensorRT-RTX through one path, tensors by name on streams.

Images go up as they are and are letterboxed on the GPU. Calls of several threads run at once, each in a slot of its
own (`trt_slots.py`); what they share is read-only. Results are copies, which belong to the caller.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np

from yolov7_deploy.errors import DeviceError, LoadError, MissingLibraryError, PluginError, UsageError, missing_library
from yolov7_deploy.image import Image, Letterbox
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.options import Thresholds
from yolov7_deploy.postprocess import postprocess
from yolov7_deploy.runtimes.base import RawDetections, RuntimeResult, TimingBreakdown, check_request_supported
from yolov7_deploy.runtimes.cuda import Cuda, Device, open_cuda
from yolov7_deploy.runtimes.device_arrays import GpuImage, gpu_image, is_gpu_array
from yolov7_deploy.runtimes.executor_pool import TrtExecutorPool
from yolov7_deploy.runtimes.letterbox_kernel import Kernels, find_kernels
from yolov7_deploy.runtimes.nms_outputs import check_nms_compatible, filter_outputs
from yolov7_deploy.runtimes.tensorrt_engine import OVERFLOW, TrtEngine, TrtLog
from yolov7_deploy.runtimes.tensorrt_executor import Results, TrtExecutor
from yolov7_deploy.tensorrt.build_record import TITLES, EngineMachine, EngineRecord, PluginUse, Product
from yolov7_deploy.tensorrt.capabilities import Dialect, Trt, load_tensorrt
from yolov7_deploy.tensorrt.engine import Engine, plan_version
from yolov7_deploy.tensorrt.plugin_library import (
    PLUGIN_NAME,
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
    PluginLibrary,
    find_plugin,
)
from yolov7_deploy.tensorrt.progress import logger_of

logger = logging.getLogger(__name__)

# TensorRT has one registry of plugins a process, and one logger, the first it was given, which it calls to the end.
_registry_lock = threading.Lock()
_loggers: dict[Product, tuple[Trt, TrtLog, Trt]] = {}


class TrtBackend:
    """An engine ready to run.

    Args:
        engine: The opened engine.
        info: Its metadata.
        cuda: The CUDA runtime, whose GPU number `index` it runs on.
        kernels: Our kernels for that GPU, if they are built.
    """

    def __init__(
        self, engine: TrtEngine, metadata: ModelMetadata, cuda: Cuda, kernels: Kernels | None, *, index: int
    ) -> None:
        self.metadata, self.device = metadata, f"cuda:{index}"
        self.max_batch_size: int | None = engine.batches[1]
        self.takes_gpu_arrays = kernels is not None
        self._engine, self._cuda, self._kernels, self._index = engine, cuda, kernels, index
        self._overflowed = False
        self._slots = TrtExecutorPool(lambda: TrtExecutor(cuda, engine, kernels))

    @classmethod
    def open(cls, path: Path, *, device: str, input_hw: tuple[int, int] | None, half: bool | None = None) -> TrtBackend:
        """See `open_backend`; a size or precision other than the file's own is refused.

        Raises:
            LoadError: Also where the engine does not fit this machine; it names the field, both values and the repair.
        """
        file, index = Engine.load(path), _gpu_number(device)
        record = file.record
        wrote = plan_version(file.plan)
        product = record.product if record else cast(Product, wrote[0]) if wrote else "tensorrt"
        dialect = _dialect(product, path)
        cuda = open_cuda()
        with cuda.working_on(index):
            gpu = cuda.device()
            _load_plugins(dialect, path, record, gpu)
            engine = _deserialised(dialect, path, file)
            metadata = engine.metadata(record.metadata if record else None)
            check_request_supported(path, metadata, input_hw=input_hw, half=half, export="--engine")
            kernels = _kernels(gpu)
            if record is None:
                logger.warning("%s: %s", path, "; ".join(metadata.notes))
            opened = cls(engine, replace(metadata, notes=(*metadata.notes, *file.notes)), cuda, kernels, index=index)
        logger.info("%s on %s: %s", path, gpu.name, ", ".join(f"{name} {value}" for name, value in opened.runtime_info))
        return opened

    @property
    def runtime_info(self) -> tuple[tuple[str, str], ...]:
        """See `Backend.runtime_info`."""
        letterbox = "GPU kernel" if self._kernels else "host (y7 plugin builds that of the GPU)"
        return (
            ("runtime", self._engine.dialect.title),
            ("letterbox", letterbox),
            ("CUDA graph", self._engine.graph_state),
            ("transfers", "included"),
            ("calls at once", str(self._slots.most)),
        )

    def infer(
        self,
        images: Sequence[Image],
        letterboxes: Sequence[Letterbox],
        thresholds: Thresholds,
        *,
        timed: bool = False,
    ) -> RuntimeResult:
        """See `Backend.infer`; images may be arrays on this GPU, which are not copied.

        Lists above the largest batch run in parts, those below the smallest are filled up with their last image.
        """
        self._check_usable()
        if self.metadata.nms is not None:
            check_nms_compatible(self.metadata.nms, thresholds)
        size = self._engine.batches[1]
        parts = [slice(start, start + size) for start in range(0, len(images), size)]
        done = []
        for part in parts:
            self._check_canvases(letterboxes[part])
            with self._cuda.working_on(self._index), self._slots.slot() as slot:
                done.append(self._run(slot, images[part], letterboxes[part], thresholds, timed=timed))
        return _together(done, timed=timed)

    def _run(
        self,
        slot: TrtExecutor,
        images: Sequence[Image],
        letterboxes: Sequence[Letterbox],
        thresholds: Thresholds,
        *,
        timed: bool,
    ) -> RuntimeResult:
        """One part in one slot, which is free again when the results are copies."""
        started = time.perf_counter()
        inputs = [self._image(image, slot) for image in images]
        taken = time.perf_counter()
        batch = max(len(images), self._engine.batches[0])
        run = slot.run(inputs, letterboxes, thresholds, batch=batch, timed=timed)
        ran = time.perf_counter()
        found = self._found(run.results, len(images), thresholds)
        postprocess_ms = (time.perf_counter() - ran) * 1e3
        return RuntimeResult(
            found=found,
            preprocess_ms=run.preprocess_ms + (taken - started) * 1e3,
            inference_ms=run.inference_ms,
            postprocess_ms=postprocess_ms,
            spans=replace(run.spans, postprocess_ms=postprocess_ms) if run.spans else None,
        )

    def _image(self, image: Image, slot: TrtExecutor) -> Image | GpuImage:
        return gpu_image(image, slot.stream, device=self._index) if is_gpu_array(image) else image

    def _found(self, results: Results, count: int, thresholds: Thresholds) -> list[RawDetections]:
        if not self._engine.suppresses:
            decoded = results[self._engine.wanted[0]]
            found = [postprocess(output.astype(np.float32, copy=False), thresholds) for output in decoded[:count]]
            return [RawDetections(boxes=boxes, scores=scores, class_ids=classes) for boxes, scores, classes in found]
        boxes, scores = (results[name].astype(np.float32, copy=False) for name in ("det_boxes", "det_scores"))
        rows = results["num_dets"].reshape(-1).tolist()
        if OVERFLOW in results and results[OVERFLOW][:count].any():
            self._warn_of_overflow()
        return [
            filter_outputs(rows[i], boxes[i], scores[i], results["det_classes"][i], thresholds) for i in range(count)
        ]

    def _warn_of_overflow(self) -> None:
        if not self._overflowed:
            self._overflowed = True
            limit = self.metadata.nms.max_candidates if self.metadata.nms else 0
            logger.warning(
                "%s: more boxes passed the threshold than NMS takes (%s); the weakest were left out. "
                "Raise conf, or export with more:  y7 export --max-candidates N",
                self._engine.name,
                limit or "its limit",
            )

    def _check_usable(self) -> None:
        fault = self._cuda.fault
        if fault is not None:
            raise DeviceError(f"{self._engine.name} cannot run any more: {fault.message}", fix=fault.fix) from fault

    def _check_canvases(self, letterboxes: Sequence[Letterbox]) -> None:
        engine, (height, width) = self._engine, letterboxes[0].canvas_hw
        low, high = engine.canvas_hw(engine.smallest), engine.canvas_hw(engine.largest)
        if any(letterbox.canvas_hw != (height, width) for letterbox in letterboxes):
            raise UsageError("Images of one call have canvases of different sizes.", fix="Call once for each size.")
        if not (low[0] <= height <= high[0] and low[1] <= width <= high[1]):
            takes = f"{low[0]}x{low[1]}" if low == high else f"{low[0]}x{low[1]} to {high[0]}x{high[1]}"
            raise UsageError(
                f"{engine.name} takes inputs of {takes}, not {height}x{width}.",
                fix=f"y7 export --weights WEIGHTS.pt --img {height},{width} --engine",
            )

    def close(self) -> None:
        """Waits for the calls of other threads, then frees the slots; calling it twice is fine."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(DeviceError):  # of a GPU that is lost
                stack.enter_context(self._cuda.working_on(self._index))
            self._slots.close()


def _together(done: Sequence[RuntimeResult], *, timed: bool) -> RuntimeResult:
    """The parts of one call as one."""
    spans = [one.spans for one in done if one.spans]
    names = TimingBreakdown.__dataclass_fields__
    return RuntimeResult(
        found=[found for one in done for found in one.found],
        preprocess_ms=sum(one.preprocess_ms for one in done),
        inference_ms=sum(one.inference_ms for one in done),
        postprocess_ms=sum(one.postprocess_ms for one in done),
        spans=TimingBreakdown(**{name: sum(getattr(one, name) for one in spans) for name in names}) if timed else None,
    )


# --- opening --------------------------------------------------------------------------------------------------------


def _gpu_number(device: str) -> int:
    kind, _, index = (f"cuda:{device}" if device.isdigit() else device).partition(":")
    if device == "auto":
        return 0
    if kind != "cuda" or not (index or "0").isdigit():
        raise DeviceError(
            f"A TensorRT engine runs on an NVIDIA GPU, not on {device!r}.",
            fix="--device cuda:0   or run the .onnx it was built from:  --weights NAME.onnx",
        )
    return int(index or 0)


def _dialect(product: Product, path: Path) -> Dialect:
    try:
        return Dialect(product, load_tensorrt(product))
    except ModuleNotFoundError as error:
        raise missing_library(ModuleNotFoundError(name=product), f"to run {path.name}") from error
    except (ImportError, OSError) as error:
        raise MissingLibraryError(
            f"{TITLES[product]} is needed to run {path.name}; it is installed and does not load: {error}",
            fix="y7 doctor shows what is installed; pip install --force-reinstall  repairs a broken wheel.",
        ) from error


def _load_plugins(dialect: Dialect, path: Path, record: EngineRecord | None, gpu: Device) -> None:
    """Brings what the plan needs into TensorRT's registry, once a process, after checking that it fits this machine.

    Ours comes before TensorRT's own: of a library that finds any of its plugins there, TensorRT takes none.

    Raises:
        LoadError: The engine was built for another machine, or needs a plugin that is not built.
    """
    plugin = _plugin(dialect, needed=record is not None and record.plugin is not None)
    if record is not None:
        _check_machine(dialect, path, record, gpu, plugin)
    key = (PLUGIN_NAME, PLUGIN_VERSION, PLUGIN_NAMESPACE)
    with _registry_lock:
        if plugin is not None and (record is None or record.plugin) and key not in dialect.plugins():
            dialect.load_plugin(str(plugin.path))
            if key not in dialect.plugins() and record is not None:
                raise LoadError(
                    f"{dialect.title} does not take the plugin {plugin.path}, which {path} needs.",
                    fix="Build it for this TensorRT:  y7 plugin",
                )
        dialect.register_own_plugins(_logger(dialect)[1])


def _plugin(dialect: Dialect, *, needed: bool) -> PluginLibrary | None:
    try:
        return find_plugin(dialect.abi)
    except PluginError as error:
        if needed:
            raise
        logger.debug("our plugin is left out: %s", error.message)
        return None


def _check_machine(
    dialect: Dialect, path: Path, record: EngineRecord, gpu: Device, plugin: PluginLibrary | None
) -> None:
    here = PluginUse(path=str(plugin.path), version=plugin.version, abi=plugin.abi) if plugin else None
    machine = EngineMachine(
        product=dialect.product,
        tensorrt=dialect.version,
        compute_capability=f"{gpu.compute_capability[0]}.{gpu.compute_capability[1]}",
        platform=f"{platform.system().lower()}-{platform.machine()}",
        plugin=here,
    )
    for found in record.mismatches(machine, engine=str(path)):
        raise LoadError(
            f"{path} does not fit here. {found.field}: the engine was built {found.built}; this machine has "
            f"{found.here}.",
            fix=found.repair,
        )


def _deserialised(dialect: Dialect, path: Path, file: Engine) -> TrtEngine:
    log, tell = _logger(dialect)
    compatible = file.record is not None and file.record.version_compatible
    runtime, engine = dialect.open_plan(file.plan, tell, version_compatible=compatible)
    if engine is None:
        raise LoadError(
            f"{dialect.title} does not open {path}. It said:\n{log.words}",
            fix=f"Build it here:  y7 build --weights {path.stem}.onnx",
        )
    return TrtEngine(dialect, runtime, engine, log, name=str(path))


def _logger(dialect: Dialect) -> tuple[TrtLog, Trt]:
    """This process's log of a TensorRT, and the logger that fills it."""
    if dialect.product not in _loggers or _loggers[dialect.product][0] is not dialect.trt:
        log = TrtLog()
        _loggers[dialect.product] = (dialect.trt, log, logger_of(dialect.trt, log.take))
    return _loggers[dialect.product][1:]


def _kernels(gpu: Device) -> Kernels | None:
    """Our kernels for this GPU; a library that cannot be used costs speed, not the engine."""
    try:
        return find_kernels(gpu.compute_capability)
    except PluginError as error:
        logger.warning("the letterbox stays on the host: %s", error)
        return None
