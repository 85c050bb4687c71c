"""The process in which TensorRT parses and builds, so that its aborts and its memory are not the caller's.

It takes a folder with a job and a graph, writes plan and report into it, and tells progress on standard output, one
JSON object a line. What TensorRT itself prints goes to standard error. It needs no onnx.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

from yolov7_deploy._serialization import from_plain
from yolov7_deploy.errors import EngineError
from yolov7_deploy.hardware.gpu import read_gpu
from yolov7_deploy.tensorrt.build_messages import (
    JOB,
    MODEL,
    PLAN,
    REPORT,
    BuildJob,
    BuildReport,
    Failure,
    Installation,
)
from yolov7_deploy.tensorrt.build_process import peak_memory_bytes
from yolov7_deploy.tensorrt.build_record import Product
from yolov7_deploy.tensorrt.capabilities import Dialect, Trt, load_tensorrt
from yolov7_deploy.tensorrt.plugin_library import BUILD_COMMAND, PLUGIN_NAME, PLUGIN_NAMESPACE, PLUGIN_VERSION
from yolov7_deploy.tensorrt.progress import PARTS, logger_of, monitor_of
from yolov7_deploy.tensorrt.timing_cache import TimingCache

Tell = Callable[[str, object], None]

PLUGIN_KEY = (PLUGIN_NAME, PLUGIN_VERSION, PLUGIN_NAMESPACE)
_PR_SET_PDEATHSIG = 1  # sys/prctl.h


def main(arguments: list[str]) -> None:
    """`probe PRODUCT` or `build FOLDER`."""
    tell = _own_standard_output()
    _die_with_parent()
    verb, what = arguments
    if verb == "probe":
        tell("installation", asdict(probe(cast(Product, what))))
        return
    folder = Path(what)
    job = from_plain(BuildJob, json.loads((folder / JOB).read_text(encoding="utf-8")))
    try:
        report = build(Dialect(job.product, load_tensorrt(job.product)), job, folder, tell)
    except EngineError as error:
        report = BuildReport(failure=Failure(message=error.message, fix=error.fix))
    (folder / REPORT).write_text(json.dumps(asdict(report)), encoding="utf-8")


def probe(product: Product) -> Installation:
    """What is installed under this name and whether it can build here; an import that fails is a fault too."""
    try:
        trt = load_tensorrt(product)
    except (ImportError, OSError) as error:
        return Installation(product=product, version="", fault=str(error))
    dialect = Dialect(product, trt)
    lines: list[str] = []
    logger = logger_of(trt, lambda line: lines.append(line))
    try:
        dialect.register_own_plugins(logger)
        builder = trt.Builder(logger)
    except (TypeError, RuntimeError) as error:  # pybind's word for a null pointer
        return _installation(dialect, fault=lines[-1] if lines else str(error), builder=None)
    return _installation(dialect, fault="", builder=builder)


def _installation(dialect: Dialect, *, fault: str, builder: Trt | None) -> Installation:
    gpu = read_gpu()
    return Installation(
        product=dialect.product,
        version=dialect.version,
        abi=dialect.abi,
        fault=fault,
        gpu=gpu.name if gpu else "",
        compute_capability=gpu.compute_capability if gpu else "",
        driver=gpu.driver if gpu else "",
        cuda=gpu.cuda if gpu else "",
        targets=tuple(dialect.targets),
        dla_cores=int(builder.num_DLA_cores) if builder is not None else 0,
        plugins=tuple(sorted({name for name, _, _ in dialect.plugins()})) if builder is not None else (),
    )


def build(dialect: Dialect, job: BuildJob, folder: Path, tell: Tell) -> BuildReport:
    """Parses `MODEL` and writes `PLAN`; what keeps TensorRT from it is in the report.

    Raises:
        EngineError: An option that this TensorRT or this machine does not have.
    """
    trt = dialect.trt
    listings: list[str] = []
    logger = logger_of(trt, lambda line: tell("log", line), listings.append)
    dialect.register_own_plugins(logger)
    if job.plugin:
        _load_plugin(dialect, job)
    builder = trt.Builder(logger)
    found = _installation(dialect, fault="", builder=builder)
    dialect.check(job, compute_capability=found.compute_capability, dla_cores=found.dla_cores)
    typed = dialect.strongly_typed(job)
    network = builder.create_network(dialect.network_flags(typed=typed))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse((folder / MODEL).read_bytes())
    if not parsed or not network.num_outputs:
        faults = dialect.parser_faults(parser)
        return BuildReport(
            failure=Failure(message=f"{dialect.title} cannot read the graph", parser=faults), installation=found
        )
    inputs, outputs = dialect.tensors(network)
    layers = dialect.layers(network)
    tell("parsed", len(layers))
    config = builder.create_builder_config()
    flags = dialect.configure(config, job, typed=typed, layers=layers)
    monitor = monitor_of(trt, lambda done, total: tell("progress", [done, total]))
    if monitor is not None:
        config.progress_monitor = monitor
    cache = _timing_cache(dialect, job, found)
    cache.give_to(config)
    dialect.add_profile(builder, config, network, job.shapes)
    plan = builder.build_serialized_network(network, config)
    report = BuildReport(
        installation=found,
        strongly_typed=typed,
        flags=flags,
        targets=job.targets,
        dla=None if job.dla is None else dialect.dla_use(config, network, job.dla),
        inputs=inputs,
        outputs=outputs,
        network_layers=layers,
        listing="".join(listings[-1:]),
        workspace_bytes=int(config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)),
        optimization_level=int(getattr(config, "builder_optimization_level", -1)),
        notes=cache.keep(config) if plan is not None else cache.notes,
        timing_cache=cache.used,
        failure=None if plan is not None else Failure(message=f"{dialect.title} cannot build the engine"),
        peak_memory_bytes=peak_memory_bytes(),
    )
    if plan is None:
        return report
    tell("progress", [PARTS, PARTS])
    (folder / PLAN).write_bytes(plan)
    return _inspected(dialect, report, plan, logger, job)


def _load_plugin(dialect: Dialect, job: BuildJob) -> None:
    dialect.load_plugin(job.plugin)
    if PLUGIN_KEY not in dialect.plugins():
        raise EngineError(
            f"{dialect.title} does not take the plugin library {job.plugin}: after loading it, there is no plugin "
            f"{PLUGIN_KEY[0]} version {PLUGIN_KEY[1]}.",
            fix=f"Build it for this TensorRT:  {BUILD_COMMAND}   or build without it:  --plugin off",
        )


def _timing_cache(dialect: Dialect, job: BuildJob, found: Installation) -> TimingCache:
    """Only where kernels are measured."""
    place = "" if dialect.ahead_of_time else job.timing_cache
    device = [dialect.product, dialect.version, found.gpu or "gpu", found.compute_capability]
    return TimingCache(place, device="-".join(device))


def _inspected(dialect: Dialect, report: BuildReport, plan: Trt, logger: Trt, job: BuildJob) -> BuildReport:
    """What the engine says of itself, which takes a GPU that it was built for."""
    trt = dialect.trt
    found = report.installation
    here = found.compute_capability if found else ""
    if not here or (job.targets and here not in job.targets):
        return report
    runtime = trt.Runtime(logger)
    if job.version_compatible and hasattr(runtime, "engine_host_code_allowed"):
        runtime.engine_host_code_allowed = True  # the plan carries the lean runtime that was just put in
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return replace(report, notes=(*report.notes, "the engine was built, but cannot be opened on this machine"))
    inspector = engine.create_engine_inspector()
    name = "device_memory_size_v2" if hasattr(engine, "device_memory_size_v2") else "device_memory_size"
    return replace(
        report,
        inspector=inspector.get_engine_information(trt.LayerInformationFormat.JSON),
        device_memory_bytes=int(getattr(engine, name, 0)),
        peak_memory_bytes=peak_memory_bytes(),
    )


def _own_standard_output() -> Tell:
    """Keeps standard output for our lines; whatever a library prints there goes to standard error."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    lock = threading.Lock()

    def tell(kind: str, value: object) -> None:
        with lock:
            stream.write(json.dumps({kind: value}) + "\n")
            stream.flush()

    return tell


def _die_with_parent() -> None:
    """A builder whose caller was killed would go on for minutes."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
