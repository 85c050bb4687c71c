"""Entry point of the build process, which isolates the caller from crashes and memory use of TensorRT.

It reads a request and a graph from a folder and writes the plan and a report into it. Events are JSON objects on
standard output, one per line. Everything that TensorRT prints goes to standard error. It does not need onnx.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

from yolov7_deploy._atomic_file import atomic_write
from yolov7_deploy._bounded_read import read_bytes
from yolov7_deploy._serialization import from_dict
from yolov7_deploy.errors import EngineError
from yolov7_deploy.hardware.gpu import driver_version, list_cuda_gpus, supported_cuda_version
from yolov7_deploy.tensorrt.build_messages import (
    MODEL_FILE,
    PLAN_FILE,
    REPORT_FILE,
    REQUEST_FILE,
    BuildReport,
    BuildRequest,
    Failure,
    Installation,
)
from yolov7_deploy.tensorrt.build_process import peak_memory_bytes
from yolov7_deploy.tensorrt.build_record import Product
from yolov7_deploy.tensorrt.capabilities import Trt, TrtCapabilities, create_logger, load_tensorrt
from yolov7_deploy.tensorrt.plugin_library import BUILD_COMMAND, PLUGIN_NAME, PLUGIN_NAMESPACE, PLUGIN_VERSION

SendEvent = Callable[[str, object], None]

PLUGIN_KEY = (PLUGIN_NAME, PLUGIN_VERSION, PLUGIN_NAMESPACE)
MAX_CACHE_BYTES = 2**30  # of a timing cache
PROGRESS_STEPS = 100  # total of the progress events
_PR_SET_PDEATHSIG = 1  # sys/prctl.h


def main(arguments: list[str]) -> None:
    """Run `probe PRODUCT` or `build FOLDER`."""
    send = _event_stream()
    _exit_with_parent()
    command, argument = arguments
    if command == "probe":
        send("installation", asdict(probe(cast(Product, argument))))
        return
    folder = Path(argument)
    request = from_dict(BuildRequest, json.loads((folder / REQUEST_FILE).read_text(encoding="utf-8")))
    try:
        capabilities = TrtCapabilities(request.product, load_tensorrt(request.product))
        report = build(capabilities, request, folder, send)
    except EngineError as error:
        report = BuildReport(failure=Failure(message=error.message, fix=error.fix))
    (folder / REPORT_FILE).write_text(json.dumps(asdict(report)), encoding="utf-8")


def probe(product: Product) -> Installation:
    """Return the installed TensorRT, with `error` set if it cannot be imported or cannot build on this machine."""
    try:
        trt = load_tensorrt(product)
    except (ImportError, OSError) as error:
        return Installation(product=product, version="", error=str(error))
    capabilities = TrtCapabilities(product, trt)
    messages: list[str] = []
    logger = create_logger(trt, lambda message: messages.append(message))
    try:
        capabilities.register_builtin_plugins(logger)
        builder = trt.Builder(logger)
    except (TypeError, RuntimeError) as error:  # pybind raises these for a null pointer
        return _installation(capabilities, error=messages[-1] if messages else str(error), builder=None)
    return _installation(capabilities, error="", builder=builder)


def _installation(capabilities: TrtCapabilities, *, error: str, builder: Trt | None) -> Installation:
    gpu = next(iter(list_cuda_gpus()), None)
    plugins = {name for name, _, _ in capabilities.registered_plugins()} if builder is not None else set()
    return Installation(
        product=capabilities.product,
        version=capabilities.version,
        abi=capabilities.abi,
        error=error,
        gpu=gpu.name if gpu else "",
        compute_capability=gpu.compute_capability if gpu else "",
        driver=driver_version() if gpu else "",
        cuda=supported_cuda_version() if gpu else "",
        targets=tuple(capabilities.targets),
        dla_cores=int(builder.num_DLA_cores) if builder is not None else 0,
        plugins=tuple(sorted(plugins)),
    )


def build(capabilities: TrtCapabilities, request: BuildRequest, folder: Path, send: SendEvent) -> BuildReport:
    """Parse `MODEL_FILE` and write `PLAN_FILE`; the report contains the failure if TensorRT cannot build it.

    Raises:
        EngineError: This TensorRT or this machine does not support an option.
    """
    trt = capabilities.trt
    listings: list[str] = []
    last_messages: deque[str] = deque(maxlen=1)

    def on_message(message: str) -> None:
        last_messages.append(message)
        send("log", message)

    logger = create_logger(trt, on_message, listings.append)
    builder = _create_builder(capabilities, request, logger, last_messages)
    installation = _installation(capabilities, error="", builder=builder)
    capabilities.check_request_supported(
        request, compute_capability=installation.compute_capability, dla_cores=installation.dla_cores
    )
    typed = capabilities.strongly_typed(request)
    network = builder.create_network(capabilities.network_flags(typed=typed))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse((folder / MODEL_FILE).read_bytes())
    if not parsed or not network.num_outputs:
        errors = capabilities.parser_errors(parser)
        failure = Failure(message=f"{capabilities.title} cannot read the graph", parser_errors=errors)
        return BuildReport(failure=failure, installation=installation)
    inputs, outputs = capabilities.network_tensors(network)
    layers = capabilities.network_layers(network)
    send("parsed", len(layers))
    config = builder.create_builder_config()
    pinned = capabilities.pin_float32_layers(network, request, typed=typed)
    flags = capabilities.configure(config, request, typed=typed, layers=layers, has_pinned_layers=pinned > 0)
    monitor = create_progress_monitor(trt, lambda done, total: send("progress", [done, total]))
    if monitor is not None:
        config.progress_monitor = monitor
    cache = _timing_cache(capabilities, request, installation)
    cache.load_into(config)
    capabilities.add_profile(builder, config, network, request.shapes)
    plan = builder.build_serialized_network(network, config)
    report = BuildReport(
        installation=installation,
        strongly_typed=typed,
        flags=flags,
        dla=None if request.dla is None else capabilities.dla_use(config, network, request.dla),
        inputs=inputs,
        outputs=outputs,
        network_layers=layers,
        listing="".join(listings[-1:]),
        workspace_bytes=int(config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)),
        optimization_level=int(getattr(config, "builder_optimization_level", -1)),
        notes=cache.save_from(config) if plan is not None else cache.notes,
        timing_cache=cache.path,
        failure=None if plan is not None else Failure(message=f"{capabilities.title} cannot build the engine"),
        peak_memory_bytes=peak_memory_bytes(),
    )
    if plan is None:
        return report
    send("progress", [PROGRESS_STEPS, PROGRESS_STEPS])
    (folder / PLAN_FILE).write_bytes(plan)
    return _inspect(capabilities, report, plan, logger, request)


def _create_builder(
    capabilities: TrtCapabilities, request: BuildRequest, logger: Trt, last_messages: Sequence[str]
) -> Trt:
    try:
        capabilities.register_builtin_plugins(logger)
        if request.plugin:
            _load_plugin(capabilities, request)
        return capabilities.trt.Builder(logger)
    except (TypeError, RuntimeError) as error:  # pybind raises these for a null pointer
        reason = last_messages[-1] if last_messages else str(error)
        raise EngineError(f"{capabilities.title} cannot build here: {reason}", fix="See  y7 doctor") from error


def _load_plugin(capabilities: TrtCapabilities, request: BuildRequest) -> None:
    reason = f"after loading it, the plugin {PLUGIN_NAME} version {PLUGIN_VERSION} is not registered"
    try:
        capabilities.load_plugin(request.plugin)
    except OSError as error:
        reason = str(error)
    if PLUGIN_KEY not in capabilities.registered_plugins():
        raise EngineError(
            f"{capabilities.title} cannot use the plugin library {request.plugin}: {reason}.",
            fix=f"Build it for this TensorRT:  {BUILD_COMMAND}   or build without it:  --plugin off",
        )


def _inspect(
    capabilities: TrtCapabilities, report: BuildReport, plan: Trt, logger: Trt, request: BuildRequest
) -> BuildReport:
    """Add the information of the EngineInspector, which requires a GPU that the engine was built for."""
    trt = capabilities.trt
    here = report.installation.compute_capability if report.installation else ""
    if not here or (request.targets and here not in request.targets):
        return report
    _runtime, engine = capabilities.deserialize_engine(plan, logger, version_compatible=request.version_compatible)
    if engine is None:
        return replace(report, notes=(*report.notes, "the engine was built, but cannot be opened on this machine"))
    inspector = engine.create_engine_inspector()
    return replace(
        report,
        inspector=inspector.get_engine_information(trt.LayerInformationFormat.JSON),
        device_memory_bytes=capabilities.device_memory_bytes(engine),
        peak_memory_bytes=peak_memory_bytes(),
    )


def _event_stream() -> SendEvent:
    """Reserve standard output for events; everything that libraries print there goes to standard error."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lock = threading.Lock()

    def send(kind: str, value: object) -> None:
        with lock:
            stream.write(json.dumps({kind: value}) + "\n")
            stream.flush()

    return send


def _exit_with_parent() -> None:
    """Make the kernel kill this process when its parent is killed; a build may otherwise run for minutes."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


# --- progress ---------------------------------------------------------------------------------------------------------


def create_progress_monitor(trt: Trt, on_progress: Callable[[int, int], None]) -> Trt | None:
    """Return an IProgressMonitor that calls `on_progress(done, total)`; `None` if TensorRT has none (8.x).

    TensorRT calls it from its own threads.
    """
    if not hasattr(trt, "IProgressMonitor"):
        return None
    phases = ProgressPhases(on_progress)

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            phases.step(phase_name, step)
            return True  # continue the build

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()


@dataclass(slots=True)
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class ProgressPhases:
    """The nested phases of a build as one number: a phase is the current step of its parent.

    Args:
        on_progress: Called with (done, total) whenever `done` increases.
    """

    def __init__(self, on_progress: Callable[[int, int], None]) -> None:
        self._on_progress = on_progress
        self._phases: dict[str, _Phase] = {}
        self._done = -1
        self._lock = threading.Lock()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """Begin a phase."""
        with self._lock:
            self._phases[name] = _Phase(parent, max(steps, 1))
            self._update()

    def step(self, name: str, step: int) -> None:
        """Complete a step of a phase; the first step is 0."""
        with self._lock:
            phase = self._phases.get(name)
            if phase is not None:
                phase.done = max(phase.done, min(step + 1, phase.steps))
                self._update()

    def finish(self, name: str) -> None:
        """End a phase, complete or not."""
        with self._lock:
            self._phases.pop(name, None)

    def _fraction(self, name: str) -> float:
        phase = self._phases[name]
        children = [self._fraction(child) for child, other in self._phases.items() if other.parent == name]
        return min(1.0, (phase.done + max(children, default=0.0)) / phase.steps)

    def _update(self) -> None:
        roots = [name for name, phase in self._phases.items() if phase.parent not in self._phases]
        done = int(PROGRESS_STEPS * max((self._fraction(name) for name in roots[:1]), default=0.0))
        if done > self._done:  # phases may start late or end early; progress never decreases
            self._done = done
            self._on_progress(done, PROGRESS_STEPS)


# --- timing cache -----------------------------------------------------------------------------------------------------


class TimingCache:
    """The timing cache of a build: measured kernel times per device and TensorRT version, for later builds.

    A file that cannot be read, used or written is a note in the build record and never an error.

    Args:
        location: A file, or a folder (ends with a slash) with one file per device; empty for no cache.
        device: Identifies the device and TensorRT version for which the times are valid.
    """

    def __init__(self, location: str, *, device: str) -> None:
        self.notes: tuple[str, ...] = ()
        self._path: Path | None = None
        if location.endswith("/"):
            self._path = Path(location) / f"{re.sub(r'[^A-Za-z0-9.]+', '-', device)}.timing"
        elif location:
            self._path = Path(location)

    @property
    def path(self) -> str:
        """The file; empty for no cache."""
        return str(self._path) if self._path else ""

    def load_into(self, config: Trt) -> None:
        """Set the stored cache in a builder configuration, or an empty one."""
        if self._path is None:
            return
        if not self._set(config, self._read()):
            self._note("belongs to another TensorRT or device, or is damaged; a new one is measured")
            self._set(config, b"")

    def save_from(self, config: Trt) -> tuple[str, ...]:
        """Write the cache of a builder configuration atomically; return the notes."""
        cache = config.get_timing_cache() if self._path else None
        if self._path is None or cache is None:
            return self.notes
        try:
            with atomic_write(self._path) as temporary:
                temporary.write_bytes(cache.serialize())
        except OSError as error:
            self._note(f"cannot be written ({error.strerror or error}); the next build measures again")
        return self.notes

    def _set(self, config: Trt, data: bytes) -> bool:
        try:
            cache = config.create_timing_cache(data)
        except (TypeError, RuntimeError):  # pybind raises these for a null pointer
            return False
        return cache is not None and bool(config.set_timing_cache(cache, False))

    def _read(self) -> bytes:
        try:
            return read_bytes(self._path, max_bytes=MAX_CACHE_BYTES) if self._path else b""
        except FileNotFoundError:
            return b""
        except OSError as error:
            self._note(f"cannot be read ({error.strerror or error})")
            return b""

    def _note(self, text: str) -> None:
        self.notes = (*self.notes, f"the timing cache {self._path} {text}")


def _timing_cache(capabilities: TrtCapabilities, request: BuildRequest, installation: Installation) -> TimingCache:
    """Return the timing cache of this device; empty for TensorRT-RTX, which does not time kernels."""
    location = "" if capabilities.ahead_of_time else request.timing_cache
    gpu = (installation.gpu or "gpu", installation.compute_capability)
    return TimingCache(location, device="-".join((capabilities.product, capabilities.version, *gpu)))
