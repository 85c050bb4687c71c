"""From an OnnxModel to an Engine, through whichever TensorRT is installed."""

from __future__ import annotations

import logging
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from yolov7_deploy._version import __version__
from yolov7_deploy.errors import EngineError
from yolov7_deploy.export.nms import OP
from yolov7_deploy.export.onnx_model import OnnxModel
from yolov7_deploy.hub import cache_dir
from yolov7_deploy.options import EngineOptions
from yolov7_deploy.tensorrt.build_messages import BuildJob, BuildReport, Failure, Installation, ParserFault
from yolov7_deploy.tensorrt.build_process import out_of_memory, run_build
from yolov7_deploy.tensorrt.build_record import EngineRecord, HardwareCompatibility, InputShape, PluginUse
from yolov7_deploy.tensorrt.engine import Engine, digest
from yolov7_deploy.tensorrt.inspector import read_listing
from yolov7_deploy.tensorrt.onnx_rewrite import PreparedGraph, graph_digest, open_onnx, prepare_graph
from yolov7_deploy.tensorrt.plugin_library import BUILD_COMMAND, PluginLibrary
from yolov7_deploy.tensorrt.preflight import PlannedBuild, preflight
from yolov7_deploy.tensorrt.selection import AMPERE, choose_plugin, find_tensorrt, title

logger = logging.getLogger(__name__)

ENGINE_SUFFIXES = (".engine", ".plan", ".trt")
MAX_BATCH = 8  # of a file with an open batch, where nobody says
_LEVELS: dict[str, HardwareCompatibility] = {
    "none": "none",
    "ampere+": "ampere_plus",
    "same-cc": "same_compute_capability",
}
_SUPPRESSION = {
    "plugin": "NMS by the plugin",
    "operators": "NMS by operators of the graph",
    "none": "no NMS inside",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildCallbacks:
    """Where a build tells what it does.

    Attributes:
        say: Called with each finished step and its seconds.
        progress: Called with (done, total) while TensorRT builds, where it tells.
        log: Called with each line of TensorRT's log.
    """

    say: Callable[[str, float], None] | None = None
    progress: Callable[[int, int], None] | None = None
    log: Callable[[str], None] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineReport:
    """What a build wrote."""

    path: Path
    record: EngineRecord


def build_engine(
    model: OnnxModel,
    options: EngineOptions | None = None,
    *,
    on: Installation | None = None,
    folder: Path | None = None,
    telling: BuildCallbacks | None = None,
) -> Engine:
    """The engine of a model: plan and record. Takes seconds with TensorRT-RTX and minutes with TensorRT.

    Our NMS node becomes our plugin where that is built, and operators otherwise. Its thresholds become inputs
    of the engine, so they change from call to call, and its flag for a full list of candidates an output `overflow`.

    Args:
        model: As exported, or of the precision station.
        options: See `EngineOptions`.
        on: What `find_tensorrt` gave, if it was asked before.
        folder: Where the engine will be written, to look for room.
        telling: Who hears of it.

    Raises:
        MissingLibraryError: There is no TensorRT.
        PluginError: The plugin library is there and cannot be used.
        EngineError: TensorRT cannot build it here; the message names the node, the option or the memory.
    """
    options = options or EngineOptions()
    events = _Events(telling or BuildCallbacks())
    found = on or find_tensorrt(options)
    library, notes = choose_plugin(model, options, found)
    graph = prepare_graph(model, own_plugin=library is not None, plugins=found.plugins, float_weights=found.abi == "v2")
    job, decisions = _job(model, graph, options, found, library)
    data = graph.proto.SerializeToString(deterministic=True)
    warnings = _preflight(job, found, len(data), folder)
    events.step(f"prepared the graph for {title(found)}: {_SUPPRESSION[graph.nms_by]}")
    started = time.perf_counter()
    plan, report, lines = run_build(job, data, events.take)
    if report.failure is not None:
        raise _failed(report.failure, graph.proto, lines, report.peak_memory_bytes)
    record = _record(model, graph, job, report, library)
    record = replace(
        record,
        plan_bytes=len(plan),
        plan_sha256=digest(plan),
        build_s=round(time.perf_counter() - started, 3),
        notes=(*notes, *decisions, *warnings, *report.notes, *_lost_int8(record)),
    )
    events.step(f"built {len(plan) / 1e6:.1f} MB")
    return Engine(plan=plan, record=record)


def build_file(
    onnx_file: Path,
    output: Path,
    *,
    options: EngineOptions,
    on: Installation | None = None,
    telling: BuildCallbacks | None = None,
) -> EngineReport:
    """Builds the engine of an ONNX file and writes it with its record; an older one stays until then.

    Args:
        onnx_file: Of this package, or another's.
        output: The `.engine` file to write.
        options: See `EngineOptions`.
        on: What `find_tensorrt` gave, if it was asked before.
        telling: Who hears of it.

    Raises:
        LoadError: The file is no ONNX file.
        MissingLibraryError: There is no TensorRT.
        EngineError: TensorRT cannot build it, or the engine cannot be written.
    """
    _check_output(output)
    model = open_onnx(onnx_file)
    engine = build_engine(model, options, on=on, folder=output.parent, telling=telling)
    assert engine.record is not None, "a build has a record"
    engine.save(output)
    return EngineReport(path=output, record=engine.record)


def _check_output(output: Path) -> None:
    """What can be known before minutes of building."""
    if output.suffix not in ENGINE_SUFFIXES:
        raise EngineError(f"{output} is not named like an engine.", fix=f"--output {output.with_suffix('.engine')}")
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise EngineError(
            f"{output.parent} is no folder that can be written to.", fix="Choose another:  --output F.engine"
        )


# --- what is asked of TensorRT ----------------------------------------------------------------------------------------


def _job(
    model: OnnxModel, graph: PreparedGraph, options: EngineOptions, found: Installation, library: PluginLibrary | None
) -> tuple[BuildJob, tuple[str, ...]]:
    """The job, and what was decided on the way."""
    targets, notes = options.targets, []
    if found.product == "tensorrt_rtx" and not targets:
        here = found.compute_capability
        if here in found.targets and float(here) < AMPERE:
            targets = (here,)
            notes.append(f"built for compute capability {here}, the GPU of this machine")
        else:
            notes.append(f"built for every GPU of compute capability {AMPERE} or later, as no --target was named")
    if options.version_compatible:
        notes.append("the plan carries the lean runtime: a program that loads it must set engine_host_code_allowed")
    cache = str(options.timing_cache) if options.timing_cache else f"{cache_dir() / 'timing'}/"
    job = BuildJob(
        product=found.product,
        precision=model.metadata.precision,
        plugin=str(library.path) if library else "",
        targets=targets,
        shapes=_shapes(graph.proto, options),
        workspace_bytes=int((options.workspace_gib or 0) * 2**30),
        opt_level=-1 if options.opt_level is None else options.opt_level,
        timing_cache=cache if options.use_timing_cache else "",
        timing_cache_asked=options.timing_cache is not None,
        version_compatible=options.version_compatible,
        hardware_compatible=_LEVELS[options.hardware_compatible],
        sparse=options.sparse,
        dla=options.dla,
    )
    return job, tuple(notes)


def _shapes(proto: onnx.ModelProto, options: EngineOptions) -> tuple[InputShape, ...]:
    """Smallest, best and largest shape of each input.

    Raises:
        EngineError: A dimension other than the batch is open, or a batch was asked for that the file does not have.
    """
    weights = {weight.name for weight in proto.graph.initializer}
    smallest = options.min_batch or 1
    largest = options.max_batch or max(MAX_BATCH, smallest, options.opt_batch or 1)
    batches = (smallest, options.opt_batch or largest, largest)
    shapes = []
    for entry in (entry for entry in proto.graph.input if entry.name not in weights):
        sides = [side.dim_value if side.HasField("dim_value") else -1 for side in entry.type.tensor_type.shape.dim]
        if any(side < 1 for side in sides[1:]):
            raise EngineError(
                f"The input {entry.name} {sides} is open in more than its batch; an engine is tuned for one size.",
                fix="Export it with a fixed size:  y7 export --img 640",
            )
        is_open = bool(sides) and sides[0] < 1
        low, best, high = (tuple([batch, *sides[1:]] if is_open else sides) for batch in batches)
        if not is_open and len(sides) > 1:
            _refuse_batches(options, sides[0])
        shapes.append(InputShape(name=entry.name, min=low, opt=best, max=high))
    return tuple(shapes)


def _refuse_batches(options: EngineOptions, fixed: int) -> None:
    """A file of fixed batch has no other."""
    asked = {"--min-batch": options.min_batch, "--opt-batch": options.opt_batch, "--max-batch": options.max_batch}
    for name, batch in asked.items():
        if batch is not None and batch != fixed:
            raise EngineError(
                f"{name} {batch}: the file was exported for a batch of {fixed} and runs with no other.",
                fix="Export it with an open batch:  y7 export --dynamic-batch",
            )


def _preflight(job: BuildJob, found: Installation, model_bytes: int, folder: Path | None) -> tuple[str, ...]:
    """Warnings to keep.

    Raises:
        EngineError: Something that the build cannot get past.
    """
    image = next((shape.max for shape in job.shapes if len(shape.max) == 4), (0, 0, 0, 0))
    planned = PlannedBuild(
        product=found.product,
        tensorrt=found.version,
        gpu=found.gpu,
        compute_capability=found.compute_capability,
        targets=job.targets,
        known_targets=found.targets,
        model_bytes=model_bytes,
        input_pixels=image[0] * image[1] * image[2] * image[3] // 3,
        workspace_bytes=job.workspace_bytes,
        dla_core=job.dla,
        folder=folder,
        cache_folder=Path(job.timing_cache) if job.timing_cache.endswith("/") else None,
    )
    warnings = []
    for finding in preflight(planned):
        if finding.level == "error":
            raise EngineError(finding.text, fix=finding.fix)
        if finding.level == "warning":
            warnings.append(f"{finding.text} {finding.fix}".strip())
            logger.warning(warnings[-1])
    return tuple(warnings)


class _Events:
    """Passes on what a build tells."""

    def __init__(self, telling: BuildCallbacks) -> None:
        self._telling, self._last = telling, time.perf_counter()

    def step(self, what: str) -> None:
        """A finished step."""
        seconds = time.perf_counter() - self._last
        logger.info("%s (%.1f s)", what, seconds)
        if self._telling.say:
            self._telling.say(what, seconds)
        self._last = time.perf_counter()

    def take(self, kind: str, value: Any) -> None:  # noqa: ANN401 - JSON
        """An event of the worker."""
        if kind == "parsed":
            self.step(f"parsed {value} layers")
        elif kind == "progress" and self._telling.progress:
            self._telling.progress(*value)
        elif kind == "log":
            logger.debug("TensorRT: %s", value)
            if self._telling.log:
                self._telling.log(value)


# --- what came of it --------------------------------------------------------------------------------------------------


def _record(
    model: OnnxModel, graph: PreparedGraph, job: BuildJob, report: BuildReport, library: PluginLibrary | None
) -> EngineRecord:
    """The record, without what only the plan tells."""
    found = report.installation
    assert found is not None, "a build without failure says where"
    return EngineRecord(
        metadata=model.metadata,
        plan_bytes=0,
        plan_sha256="",
        product=found.product,
        tensorrt=found.version,
        cuda=found.cuda,
        driver=found.driver,
        gpu=found.gpu,
        compute_capability=found.compute_capability,
        targets=job.targets,
        platform=f"{platform.system().lower()}-{platform.machine()}",
        plugin=PluginUse(path=str(library.path), version=library.version, abi=library.abi) if library else None,
        nms_by=graph.nms_by,
        runtime_thresholds=graph.runtime_thresholds,
        strongly_typed=report.strongly_typed,
        flags=report.flags,
        version_compatible=job.version_compatible,
        hardware_compatible=job.hardware_compatible,
        dla=report.dla,
        shapes=job.shapes,
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
        onnx_sha256=graph_digest(model.proto),
        y7_version=__version__,
    )


def _lost_int8(record: EngineRecord) -> tuple[str, ...]:
    """A note where convolutions that are INT8 in the file are not in the engine, as far as its builder listed them."""
    listed = read_listing(record.listing) if record.metadata.int8 else None
    if record.metadata.int8 is None or listed is None:
        return ()
    wanted = record.metadata.int8.int8_convolutions
    lost = wanted - listed.convolutions.get("int8", 0)
    if lost <= 0:
        return ()
    note = f"{lost} of the {wanted} INT8 convolutions of the file run as float in this engine"
    if "7.5" in record.targets:
        note += ": TensorRT-RTX has none for compute capability 7.5, and all targets of a plan share its layers"
    logger.warning(note)
    return (note,)


def _failed(failure: Failure, proto: onnx.ModelProto, lines: tuple[str, ...], peak_memory_bytes: int) -> EngineError:
    """The error of a build that came to its end without an engine."""
    memory = out_of_memory(lines, peak_memory_bytes=peak_memory_bytes)
    if memory is not None:
        return memory
    if failure.parser:
        said = "\n".join(f"  {_fault_text(fault, proto)}" for fault in failure.parser)
        sets = ", ".join(f"{entry.domain or 'ai.onnx'} {entry.version}" for entry in proto.opset_import)
        return EngineError(
            f"{failure.message}:\n{said}\nIts operator sets are {sets}.", fix=_parser_fix(failure.parser, proto)
        )
    if failure.fix or not lines:
        return EngineError(failure.message, fix=failure.fix)
    said = "\n".join(f"  {line}" for line in lines)
    fix = "All it said:  y7 build --verbose"
    if any("workspace" in line.lower() for line in lines):
        fix = "Allow its layers more memory, as  --workspace 2, or leave --workspace out."
    return EngineError(f"{failure.message}. It last said:\n{said}", fix=fix)


def _node_of(fault: ParserFault, proto: onnx.ModelProto) -> tuple[str, str, str]:
    """Name, op and domain; the parser does not tell the domain, and before 10 it tells the number only."""
    if 0 <= fault.node < len(proto.graph.node):
        node = proto.graph.node[fault.node]
        if fault.op in ("", node.op_type):
            return fault.name or node.name, node.op_type, node.domain
    return fault.name, fault.op, ""


def _fault_text(fault: ParserFault, proto: onnx.ModelProto) -> str:
    name, op, domain = _node_of(fault, proto)
    words = re.sub(r'^\w+ && "(.*)"$', r"\1", fault.words)  # a C++ assertion
    if not op:
        return words
    return f"node {name or fault.node} ({f'{domain}.' if domain else ''}{op}): {words}"


def _parser_fix(faults: tuple[ParserFault, ...], proto: onnx.ModelProto) -> str:
    if any(_node_of(fault, proto)[1] == OP for fault in faults):
        return f"Build our plugin:  {BUILD_COMMAND}   or build without it:  --plugin off"
    return "Export the weights here, with operators TensorRT has:  y7 export --weights WEIGHTS.pt"
