"""Build an Engine from an OnnxModel with the installed TensorRT."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from yolov7_deploy._bounded_read import MAX_MODEL_BYTES, read_bytes
from yolov7_deploy._serialization import sha256_hex
from yolov7_deploy._text import get_logger
from yolov7_deploy._version import __version__
from yolov7_deploy.errors import EngineError, missing_library
from yolov7_deploy.hardware.jetson import version_numbers
from yolov7_deploy.hub import ENGINE_SUFFIXES, cache_dir
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.onnx_export.nms import OP
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.options import EngineOptions
from yolov7_deploy.tensorrt.build_messages import BuildReport, BuildRequest, Failure, Installation, ParserError
from yolov7_deploy.tensorrt.build_process import is_installed, out_of_memory, probe, run_build
from yolov7_deploy.tensorrt.build_record import (
    AMPERE,
    EngineRecord,
    HardwareCompatibility,
    InputShape,
    PluginUse,
    Product,
)
from yolov7_deploy.tensorrt.engine import Engine
from yolov7_deploy.tensorrt.inspector import engine_layers
from yolov7_deploy.tensorrt.onnx_rewrite import PreparedGraph, has_nms_node, open_onnx, prepare_graph
from yolov7_deploy.tensorrt.plugin_library import BUILD_COMMAND, PluginLibrary, find_plugin
from yolov7_deploy.tensorrt.preflight import PlannedBuild, preflight

logger = get_logger(__name__)

DEFAULT_MAX_BATCH = 8  # for a dynamic batch
PRODUCTS: tuple[Product, ...] = ("tensorrt", "tensorrt_rtx")
# Devices of a GPU driver, on Jetson boards too.
_GPU_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/nvhost-gpu"), Path("/dev/nvgpu"))
_LEVELS: dict[str, HardwareCompatibility] = {
    "none": "none",
    "ampere+": "ampere_plus",
    "same-cc": "same_compute_capability",
}
_NMS_BY = {
    "plugin": "NMS by the plugin",
    "operators": "NMS by operators of the graph",
    "none": "without NMS",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildCallbacks:
    """Callbacks for the progress of a build.

    Attributes:
        on_step: Called after each step with its description and its duration in seconds.
        on_progress: Called with (done, total) during the TensorRT build, if TensorRT reports progress.
        on_log: Called with each message of TensorRT's log.
    """

    on_step: Callable[[str, float], None] | None = None
    on_progress: Callable[[int, int], None] | None = None
    on_log: Callable[[str], None] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineReport:
    """An engine file and the record of its build."""

    path: Path
    record: EngineRecord


def build_engine(
    model: OnnxModel,
    options: EngineOptions | None = None,
    *,
    installation: Installation | None = None,
    output_folder: Path | None = None,
    callbacks: BuildCallbacks | None = None,
) -> Engine:
    """Build the engine of a model. Takes seconds with TensorRT-RTX and minutes with TensorRT.

    The NMS node `Y7NMS` is run by our plugin if it is built, else by operators of the graph. Its thresholds become
    inputs of the engine, so they can be changed per call (unless `fixed_thresholds` is set), and its flag for a full
    candidate list becomes the output `overflow`.

    Args:
        model: An exported model, also in FP16 or INT8.
        options: See `EngineOptions`.
        installation: The result of `find_tensorrt`, if it is already known.
        output_folder: Where the engine will be written, to check its free space.
        callbacks: Receive the progress of the build.

    Raises:
        MissingLibraryError: TensorRT is not installed.
        PluginError: The plugin library exists and cannot be used.
        EngineError: TensorRT cannot build the engine here; the message names the node, the option or the memory.

    Example:
        >>> build_engine(OnnxModel.load("shapes.onnx"), EngineOptions(targets=("sm86",))).save("shapes.engine")
    """
    options = options or EngineOptions()
    _check_int8_target(model.metadata)
    progress = _Progress(callbacks or BuildCallbacks())
    installation = installation or find_tensorrt(options)
    targets, target_notes = _select_targets(options, installation)
    library, plugin_notes = select_plugin(model, options, targets, installation)
    graph = prepare_graph(
        model,
        use_plugin=library is not None,
        builtin_plugins=installation.plugins,
        float_weights=installation.abi == "v2",
        fixed_thresholds=options.fixed_thresholds,
    )
    request = _build_request(model, graph, options, targets, installation, library)
    data = graph.proto.SerializeToString(deterministic=True)
    warnings = _preflight(request, installation, len(data), output_folder)
    progress.step(f"prepared the graph for {installation.title}: {_NMS_BY[graph.nms_by]}")
    started = time.perf_counter()
    plan, report, log_lines = run_build(request, data, progress.on_event)
    if report.failure is not None:
        raise _build_error(report.failure, graph.proto, log_lines, report.peak_memory_bytes)
    record = _build_record(model, graph, request, report, library)
    record = replace(
        record,
        plan_bytes=len(plan),
        plan_sha256=sha256_hex(plan),
        build_s=round(time.perf_counter() - started, 3),
        notes=(*plugin_notes, *target_notes, *_host_code(options), *warnings, *report.notes, *_missing_int8(record)),
    )
    progress.step(f"built {len(plan) / 1e6:.1f} MB")
    return Engine(plan=plan, record=record)


def build_file(
    onnx_file: Path,
    output: Path,
    *,
    options: EngineOptions,
    installation: Installation | None = None,
    callbacks: BuildCallbacks | None = None,
) -> EngineReport:
    """Build the engine of an ONNX file and write it with its record. An existing engine is replaced at the end.

    Args:
        onnx_file: A file of this package or of another exporter.
        output: The `.engine` file to write.
        options: See `EngineOptions`.
        installation: The result of `find_tensorrt`, if it is already known.
        callbacks: Receive the progress of the build.

    Raises:
        LoadError: The file is not an ONNX file.
        MissingLibraryError: TensorRT is not installed.
        EngineError: TensorRT cannot build it, or the engine cannot be written.
    """
    _check_output(output)
    model = open_onnx(onnx_file)
    onnx_sha256 = sha256_hex(read_bytes(onnx_file, max_bytes=MAX_MODEL_BYTES))
    engine = build_engine(model, options, installation=installation, output_folder=output.parent, callbacks=callbacks)
    assert engine.record is not None, "a build has a record"
    record = replace(engine.record, onnx_sha256=onnx_sha256)
    replace(engine, record=record).save(output)
    return EngineReport(path=output, record=record)


def _check_output(output: Path) -> None:
    """Check the output path before minutes of building."""
    if output.suffix not in ENGINE_SUFFIXES:
        raise EngineError(f"{output} is not named like an engine.", fix=f"--output {output.with_suffix('.engine')}")
    folder = next(folder for folder in output.absolute().parents if folder.exists())  # `Engine.save` creates the rest
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise EngineError(f"{folder} is not a writable folder.", fix="Choose another:  --output F.engine")


# --- TensorRT and the plugin ------------------------------------------------------------------------------------------


def find_tensorrt(options: EngineOptions) -> Installation:
    """Return the TensorRT to build with: `tensorrt` if it can build here, else TensorRT-RTX; targets need TensorRT-RTX.

    Takes about a second, because each is imported in a separate process.

    Raises:
        MissingLibraryError: Neither is installed.
        EngineError: What is installed cannot build on this machine.
    """
    candidates = PRODUCTS[1:] if options.targets else PRODUCTS
    present = [product for product in candidates if is_installed(product)]
    if not present:
        has_gpu = any(device.exists() for device in _GPU_DEVICES)
        needed = "tensorrt" if has_gpu and not options.targets else "tensorrt_rtx"
        purpose = "to build an engine" + ("" if has_gpu else " on a machine without a GPU")
        raise missing_library(ModuleNotFoundError(name=needed), purpose)
    errors = []
    for product in present:
        installation = probe(product)
        if not installation.error:
            return installation
        errors.append(f"{installation.title} cannot build here: {installation.error}")
        logger.warning(errors[-1])
    fix = "See  y7 doctor"
    if "tensorrt_rtx" not in present:
        fix = "TensorRT-RTX builds without a GPU:  pip install 'yolov7-deploy[tensorrt-rtx]'"
    raise EngineError("\n".join(errors), fix=fix)


def select_plugin(
    model: OnnxModel, options: EngineOptions, targets: tuple[str, ...], installation: Installation
) -> tuple[PluginLibrary | None, tuple[str, ...]]:
    """Return the plugin library for the NMS node, or `None` for NMS by operators, and notes for the build record.

    Args:
        model: The model.
        options: See `EngineOptions`.
        targets: Compute capabilities to build for; empty for the default ones.
        installation: The TensorRT that builds.

    Raises:
        EngineError: The plugin is required and not available.
        PluginError: The library exists and cannot be used.
    """
    if not has_nms_node(model.proto):
        if options.plugin == "on":
            kind = model.metadata.nms.kind if model.metadata.nms else "none"
            raise EngineError(
                f"--plugin on: the graph has no node for the plugin (it was exported with --nms {kind}).",
                fix="Export it with  --nms plugin",
            )
        return None, ()
    if options.plugin == "off":
        return None, ()
    library = find_plugin(installation.abi)
    if library is None:
        reason = f"there is no plugin library for {installation.title} ({installation.abi})"
    else:
        required = targets or _default_targets(installation)
        missing = [target for target in required if not library.runs_on(int(target.replace(".", "")))]
        reason = f"the plugin library {library.path} has no code for compute capability {', '.join(missing)}"
        if not missing:
            return library, ()
        if not targets and len(missing) < len(required):
            return library, (f"{reason}, so the engine does not run there; {BUILD_COMMAND} builds it for all",)
    if options.plugin == "on":
        raise EngineError(f"--plugin on: {reason}.", fix=f"Build it:  {BUILD_COMMAND}")
    return None, (f"{reason}, so operators of the graph run NMS; {BUILD_COMMAND} builds it",)


def _select_targets(options: EngineOptions, installation: Installation) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the compute capabilities to build for, empty for the default ones, and notes for the build record."""
    if options.targets or installation.product != "tensorrt_rtx":
        return options.targets, ()
    here, ampere = installation.compute_capability, ".".join(map(str, AMPERE))
    if here in installation.targets and version_numbers(here) < AMPERE:
        return (here,), (f"built for compute capability {here}, the GPU of this machine",)
    return (), (f"built for every GPU of compute capability {ampere} or later, because --target was not given",)


def _default_targets(installation: Installation) -> tuple[str, ...]:
    """Return the compute capabilities without --target: this GPU's, or with TensorRT-RTX all from Ampere on."""
    if installation.product == "tensorrt_rtx":
        return tuple(target for target in installation.targets if version_numbers(target) >= AMPERE)
    return (installation.compute_capability,) if installation.compute_capability else ()


# --- the request to the build process ---------------------------------------------------------------------------------


def _check_int8_target(metadata: ModelMetadata) -> None:
    """Refuse asymmetric activations, which TensorRT does not know."""
    if metadata.int8 is not None and metadata.int8.target != "tensorrt":
        raise EngineError(
            f"The model was quantized for {metadata.int8.target}; TensorRT needs symmetric int8 activations.",
            fix="Quantize the FP32 file for it:  y7 quantize --weights FILE.onnx --calib FOLDER --int8-target tensorrt",
        )


def _host_code(options: EngineOptions) -> tuple[str, ...]:
    """Return a note for the build record if the plan contains code that runs on the host."""
    if not options.version_compatible:
        return ()
    return ("the plan contains the lean runtime: a program that loads it must set engine_host_code_allowed",)


def _build_request(
    model: OnnxModel,
    graph: PreparedGraph,
    options: EngineOptions,
    targets: tuple[str, ...],
    installation: Installation,
    library: PluginLibrary | None,
) -> BuildRequest:
    cache = str(options.timing_cache) if options.timing_cache else f"{cache_dir() / 'timing'}/"
    return BuildRequest(
        product=installation.product,
        precision=model.metadata.precision,
        plugin=str(library.path) if library else "",
        targets=targets,
        shapes=_input_shapes(graph.proto, options),
        workspace_bytes=int((options.workspace_gib or 0) * 2**30),
        opt_level=-1 if options.opt_level is None else options.opt_level,
        timing_cache=cache if options.use_timing_cache else "",
        timing_cache_required=options.timing_cache is not None,
        version_compatible=options.version_compatible,
        hardware_compatible=_LEVELS[options.hardware_compatible],
        sparse=options.sparse,
        dla=options.dla,
    )


def _input_shapes(proto: onnx.ModelProto, options: EngineOptions) -> tuple[InputShape, ...]:
    """Return the minimum, optimum and maximum shape of each input.

    Raises:
        EngineError: A dimension other than the batch is dynamic, or the file does not have the requested batch.
    """
    weights = {weight.name for weight in proto.graph.initializer}
    smallest = options.min_batch or 1
    largest = options.max_batch or max(DEFAULT_MAX_BATCH, smallest, options.opt_batch or 1)
    batches = (smallest, options.opt_batch or largest, largest)
    shapes = []
    for entry in (entry for entry in proto.graph.input if entry.name not in weights):
        dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in entry.type.tensor_type.shape.dim]
        if any(size < 1 for size in dims[1:]):
            raise EngineError(
                f"The input {entry.name} {dims} has dynamic dimensions other than the batch; an engine has a fixed "
                "image size.",
                fix="Export it with a fixed size:  y7 export --img 640",
            )
        is_dynamic = bool(dims) and dims[0] < 1
        low, best, high = (tuple([batch, *dims[1:]] if is_dynamic else dims) for batch in batches)
        if not is_dynamic and len(dims) > 1:
            _check_fixed_batch(options, dims[0])
        shapes.append(InputShape(name=entry.name, min=low, opt=best, max=high))
    return tuple(shapes)


def _check_fixed_batch(options: EngineOptions, fixed: int) -> None:
    """Check that the options do not request another batch than the file's."""
    given = {"--min-batch": options.min_batch, "--opt-batch": options.opt_batch, "--max-batch": options.max_batch}
    for name, batch in given.items():
        if batch is not None and batch != fixed:
            raise EngineError(
                f"{name} {batch}: the file was exported for a batch of {fixed} and supports no other.",
                fix="Export it with a dynamic batch:  y7 export --dynamic-batch",
            )


def _preflight(
    request: BuildRequest, installation: Installation, model_bytes: int, output_folder: Path | None
) -> tuple[str, ...]:
    """Return the warnings of the checks before a build.

    Raises:
        EngineError: A check found a reason why the build cannot succeed.
    """
    image = next((shape.max for shape in request.shapes if len(shape.max) == 4), (0, 0, 0, 0))
    planned = PlannedBuild(
        product=installation.product,
        tensorrt=installation.version,
        gpu=installation.gpu,
        compute_capability=installation.compute_capability,
        targets=request.targets,
        known_targets=installation.targets,
        model_bytes=model_bytes,
        input_pixels=image[0] * image[1] * image[2] * image[3] // 3,
        workspace_bytes=request.workspace_bytes,
        dla_core=request.dla,
        folder=output_folder,
        cache_folder=Path(request.timing_cache) if request.timing_cache.endswith("/") else None,
    )
    warnings = []
    for finding in preflight(planned):
        if finding.level == "error":
            raise EngineError(finding.text, fix=finding.fix)
        if finding.level == "warning":
            warnings.append(f"{finding.text} {finding.fix}".strip())
            logger.warning(warnings[-1])
    return tuple(warnings)


class _Progress:
    """Log the progress of a build and pass it to the callbacks."""

    def __init__(self, callbacks: BuildCallbacks) -> None:
        self._callbacks, self._last = callbacks, time.perf_counter()

    def step(self, description: str) -> None:
        """Report a completed step."""
        seconds = time.perf_counter() - self._last
        logger.info("%s (%.1f s)", description, seconds)
        if self._callbacks.on_step:
            self._callbacks.on_step(description, seconds)
        self._last = time.perf_counter()

    def on_event(self, kind: str, value: Any) -> None:  # noqa: ANN401 - JSON
        """Report an event of the build process."""
        if kind == "parsed":
            self.step(f"parsed {value} layers")
        elif kind == "progress" and self._callbacks.on_progress:
            self._callbacks.on_progress(*value)
        elif kind == "log":
            logger.debug("TensorRT: %s", value)
            if self._callbacks.on_log:
                self._callbacks.on_log(value)


# --- the result -------------------------------------------------------------------------------------------------------


def _build_record(
    model: OnnxModel, graph: PreparedGraph, request: BuildRequest, report: BuildReport, library: PluginLibrary | None
) -> EngineRecord:
    """Return the record without the fields that depend on the plan."""
    installation = report.installation
    assert installation is not None, "the report of a successful build has the installation"
    return EngineRecord(
        metadata=model.metadata,
        plan_bytes=0,
        plan_sha256="",
        product=installation.product,
        tensorrt=installation.version,
        cuda=installation.cuda,
        driver=installation.driver,
        gpu=installation.gpu,
        compute_capability=installation.compute_capability,
        targets=request.targets,
        platform=f"{platform.system().lower()}-{platform.machine()}",
        plugin=PluginUse(path=str(library.path), version=library.version, abi=library.abi) if library else None,
        nms_by=graph.nms_by,
        runtime_thresholds=graph.runtime_thresholds,
        strongly_typed=report.strongly_typed,
        flags=report.flags,
        version_compatible=request.version_compatible,
        hardware_compatible=request.hardware_compatible,
        dla=report.dla,
        shapes=request.shapes,
        inputs=report.inputs,
        outputs=report.outputs,
        workspace_bytes=report.workspace_bytes,
        optimization_level=report.optimization_level,
        timing_cache=report.timing_cache,
        network_layers=report.network_layers,
        listing="" if report.inspector else report.listing,
        inspector=report.inspector,
        device_memory_bytes=report.device_memory_bytes,
        peak_memory_bytes=report.peak_memory_bytes,
        onnx_sha256=sha256_hex(model.proto.SerializeToString(deterministic=True)),
        y7_version=__version__,
    )


def _missing_int8(record: EngineRecord) -> tuple[str, ...]:
    """Return a note if the engine has more float convolutions than the file; TensorRT may merge those of one type."""
    int8 = record.metadata.int8
    table = engine_layers(record)[0] if int8 is not None else None
    if int8 is None or table is None or table.detail in ("names", "network"):
        return ()
    in_engine = sum(count for precision, count in table.convolutions.items() if precision != "int8")
    missing = in_engine - (int8.convolutions - int8.int8_convolutions)
    if missing <= 0:
        return ()
    note = f"{missing} of the {int8.int8_convolutions} INT8 convolutions of the file run as float in this engine"
    if "7.5" in record.targets:
        note += ": TensorRT-RTX has none for compute capability 7.5, and all targets of a plan share its layers"
    logger.warning(note)
    return (note,)


def _build_error(
    failure: Failure, proto: onnx.ModelProto, log_lines: tuple[str, ...], peak_memory_bytes: int
) -> EngineError:
    """Return the error of a build without an engine."""
    memory = out_of_memory(log_lines, peak_memory_bytes=peak_memory_bytes)
    if memory is not None:
        return memory
    if failure.parser_errors:
        errors = "\n".join(f"  {_describe_parser_error(error, proto)}" for error in failure.parser_errors)
        opsets = ", ".join(f"{entry.domain or 'ai.onnx'} {entry.version}" for entry in proto.opset_import)
        return EngineError(
            f"{failure.message}:\n{errors}\nIts operator sets are {opsets}.",
            fix=_parser_fix(failure.parser_errors, proto),
        )
    if failure.fix or not log_lines:
        return EngineError(failure.message, fix=failure.fix)
    log = "\n".join(f"  {line}" for line in log_lines)
    fix = "For the complete log:  y7 build --verbose"
    if any("workspace" in line.lower() for line in log_lines):
        fix = "Allow its layers more memory, such as  --workspace 2, or leave out --workspace."
    return EngineError(f"{failure.message}. Its last log lines:\n{log}", fix=fix)


def _node_of(error: ParserError, proto: onnx.ModelProto) -> tuple[str, str, str]:
    """Return name, op type and domain of a node. The parser has no domain, and before TensorRT 10 only an index."""
    if 0 <= error.node < len(proto.graph.node):
        node = proto.graph.node[error.node]
        if error.op in ("", node.op_type):
            return error.name or node.name, node.op_type, node.domain
    return error.name, error.op, ""


def _describe_parser_error(error: ParserError, proto: onnx.ModelProto) -> str:
    name, op, domain = _node_of(error, proto)
    message = re.sub(r'^\w+ && "(.*)"$', r"\1", error.message)  # the text of a C++ assertion
    if not op:
        return message
    return f"node {name or error.node} ({f'{domain}.' if domain else ''}{op}): {message}"


def _parser_fix(errors: tuple[ParserError, ...], proto: onnx.ModelProto) -> str:
    if any(_node_of(error, proto)[1] == OP for error in errors):
        return f"Build the plugin:  {BUILD_COMMAND}   or build without it:  --plugin off"
    return "Export the weights with yolov7-deploy, which uses operators of TensorRT:  y7 export --weights WEIGHTS.pt"
