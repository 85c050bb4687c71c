"""Contents of an engine file, from its build record, its inspector output and its header; needs no TensorRT."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from yolov7_deploy._bounded_read import MAX_MODEL_BYTES, open_file
from yolov7_deploy._console import table as drawn_table
from yolov7_deploy._serialization import sha256_hex
from yolov7_deploy.errors import LoadError
from yolov7_deploy.tensorrt.build_record import TITLES, EngineRecord, EngineTensor, InputShape
from yolov7_deploy.tensorrt.engine import Engine, plan_version
from yolov7_deploy.tensorrt.inspector import Detail, EngineLayer, LayerTable, engine_layers

# The header of a plan: four letters, version of the layout, ..., length of the plan, version of TensorRT. Then, in
# plans of TensorRT-RTX 1.7.1, a bit mask of the target compute capabilities.
_HEADER_BYTES = 28
_LENGTH = slice(16, 24)
_TARGETS = slice(32, 40)
_TARGET_BITS = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
# Other programs write a length and that many bytes of JSON before the plan.
_MAX_JSON = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSummary:
    """Statistics of the layers; see `LayerTable`."""

    detail: Detail
    layers: int
    types: dict[str, int]
    precisions: dict[str, int]
    convolutions: dict[str, int]
    reformats: int
    plugins: tuple[str, ...]
    weights_bytes: int | None
    peak_activation_bytes: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineFile:
    """Contents of an engine file.

    Attributes:
        path: Path as passed.
        size_bytes, sha256: Size and digest of the plan.
        product, tensorrt: Product and version that wrote the plan, from its header; empty if the header has none. Only
            the last byte of the last number of the version is stored.
        targets: Compute capabilities in the header of a TensorRT-RTX plan.
        record: Build record; `None` for a third-party engine.
        summary, table: The layers from the engine inspector, else as listed by the builder, else as parsed; `None` if
            unknown.
        notes: Remarks about the file.
    """

    path: str
    size_bytes: int
    sha256: str
    product: str
    tensorrt: str
    targets: tuple[str, ...]
    record: EngineRecord | None
    summary: LayerSummary | None
    table: LayerTable | None
    notes: tuple[str, ...]


def read_engine_file(path: str | Path) -> EngineFile:
    """Return the contents of an engine file and of its build record.

    Raises:
        LoadError: The file is missing, truncated or not a plan, or its build record cannot be read or belongs to
            another file.
    """
    path = Path(path)
    _refuse_wrapped(path)
    engine = Engine.load(path)
    _refuse_truncated(path, engine.plan)
    product, version = plan_version(engine.plan) or ("", "")
    record = engine.record
    table, notes = engine_layers(record) if record else (None, ())
    return EngineFile(
        path=str(path),
        size_bytes=len(engine.plan),
        sha256=record.plan_sha256 if record else sha256_hex(engine.plan),
        product=product,
        tensorrt=version,
        targets=_targets(engine.plan) if product == "tensorrt_rtx" else (),
        record=record,
        summary=_summary(table) if table else None,
        table=table,
        notes=(*engine.notes, *(record.notes if record else ()), *notes),
    )


def _summary(table: LayerTable) -> LayerSummary:
    return LayerSummary(
        detail=table.detail,
        layers=len(table.layers),
        types=table.types,
        precisions=table.precisions,
        convolutions=table.convolutions,
        reformats=table.reformats,
        plugins=table.plugins,
        weights_bytes=table.weights_bytes,
        peak_activation_bytes=table.peak_activation_bytes,
    )


def _refuse_wrapped(path: Path) -> None:
    """Raise an error for a plan that follows JSON of another program; the fix extracts the plan."""
    try:
        with open_file(path, max_bytes=MAX_MODEL_BYTES) as stream:
            length = int.from_bytes(stream.read(4), "little")
            if not 0 < length < _MAX_JSON or not stream.read(length).startswith(b"{"):
                return
            inside = plan_version(stream.read(64))
    except OSError:
        return  # `Engine.load` reports it
    if inside is not None:
        raise LoadError(
            f"{path} is a plan after {length} bytes of JSON, as written by Ultralytics; TensorRT cannot load it.",
            fix=f"Extract the plan:  tail -c +{length + 5} {path} > plan.engine",
        )


def _refuse_truncated(path: Path, plan: bytes) -> None:
    # The length is only known in headers of this layout.
    announced = int.from_bytes(plan[_LENGTH], "little") if plan_version(plan) else _HEADER_BYTES
    if announced > len(plan):
        raise LoadError(
            f"{path} is truncated: it has {len(plan)} bytes of at least {announced}.",
            fix=f"Copy it again, or build it again:  y7 build --weights {path.stem}.onnx",
        )


def _targets(plan: bytes) -> tuple[str, ...]:
    bits = int.from_bytes(plan[_TARGETS], "little")
    return tuple(name for at, name in enumerate(_TARGET_BITS) if bits >> at & 1)


Field = tuple[str, str]

COLUMNS = ("", "layer", "type", "precision", "output", "format", "weights", "kernel")
MAX_CELL = 60  # characters of a layer name, which TensorRT concatenates from several
MAX_TYPES = 12
_DETAILS = {
    "detailed": "as executed",
    "names": "as executed; only their names are stored",
    "compiled": "as compiled ahead of time, before kernels are selected on the GPU",
    "network": "as parsed, before fusion by TensorRT: the engine could not be opened on the build machine",
}
_WIDER = {"ampere_plus": ", and any from Ampere on", "same_compute_capability": ", on every GPU that has it"}


def build_fields(record: EngineRecord) -> list[Field]:
    """Return how, where and for which GPU an engine was built; unknown fields are left out."""
    level = f", optimization level {record.optimization_level}" if record.optimization_level >= 0 else ""
    limit = f"at most {record.workspace_bytes / 2**30:.2f} GiB" if record.workspace_bytes else "chosen by TensorRT"
    fields = [
        ("built by", f"{TITLES[record.product]} {record.tensorrt} in {record.build_s:.1f} s{level}"),
        ("built on", _built_on(record)),
        ("runs on", _runs_on(record)),
        ("typed", "strongly, as in the graph" if record.strongly_typed else "weakly: flags allow other precisions"),
        ("flags", _listed(record.flags)),
        ("NMS", _nms(record)),
        *_ports("input", record.inputs),
        *(("shapes", _shapes(shape)) for shape in record.shapes if shape.min != shape.max),
        *_ports("output", record.outputs),
        ("workspace", limit),
        ("memory", _memory(record)),
        ("cache", record.timing_cache),
        ("DLA", _dla(record)),
        ("ONNX", f"sha256 {record.onnx_sha256}" if record.onnx_sha256 else ""),
        ("built with", f"yolov7-deploy {record.y7_version}" if record.y7_version else ""),
    ]
    return [(name, text) for name, text in fields if text]


def layer_fields(summary: LayerSummary) -> list[Field]:
    """Return the statistics of the layers."""
    types = list(summary.types.items())
    shown = [f"{count} {name}" for name, count in types[:MAX_TYPES]]
    rest = sum(count for _, count in types[MAX_TYPES:])
    counted = f": {_listed([*shown, *([f'{rest} others'] if rest else [])])}" if shown else ""
    fields = [
        ("layers", f"{summary.layers} {_DETAILS[summary.detail]}{counted}"),
        ("precision", _listed(f"{count} {name}" for name, count in summary.precisions.items()) or "not known"),
        ("plugin", _listed(summary.plugins) or ("not known" if summary.detail == "names" else "none")),
    ]
    if summary.convolutions and summary.detail != "network":  # the parser knows types of outputs, not of weights
        fields.insert(2, ("conv layers", _listed(f"{count} {name}" for name, count in summary.convolutions.items())))
    if summary.detail in ("detailed", "names"):
        fields.insert(-1, ("reformats", str(summary.reformats)))
    if summary.weights_bytes is not None:
        fields.append(("weights", _megabytes(summary.weights_bytes)))
    if summary.peak_activation_bytes is not None:
        fields.append(("activations", f"about {_megabytes(summary.peak_activation_bytes)} at the peak"))
    return fields


def layer_table(table: LayerTable) -> str:
    """Return a table with one line per layer; empty columns are left out, and long names are shortened."""
    rows = [[index, *_cells(layer)] for index, layer in enumerate(table.layers)]
    used = [i for i in range(len(COLUMNS)) if any(row[i] not in ("", None) for row in rows)]
    return drawn_table([[row[i] for i in used] for row in rows], [COLUMNS[i] for i in used])


def _built_on(record: EngineRecord) -> str:
    parts = [
        record.platform,
        f"{record.gpu} (compute capability {record.compute_capability})" if record.gpu else "no GPU",
        f"CUDA {record.cuda}" if record.cuda else "",
        f"driver {record.driver}" if record.driver else "",
    ]
    return _listed(part for part in parts if part)


def _runs_on(record: EngineRecord) -> str:
    capabilities = record.targets or ((record.compute_capability,) if record.compute_capability else ())
    here = f"compute capability {_listed(capabilities)}" if capabilities else "the GPUs that TensorRT chose"
    later = "; also with later versions of TensorRT" if record.version_compatible else ""
    return f"{here}{_WIDER.get(record.hardware_compatible, '')}{later}"


def _nms(record: EngineRecord) -> str:
    if record.nms_by == "plugin" and record.plugin is not None:
        return f"our plugin, version {record.plugin.version} ({record.plugin.abi}), {record.plugin.path}"
    texts = {
        "plugin": "TensorRT's EfficientNMS_TRT",
        "operators": "operators of the graph",
        "none": "none: the output is the decoded head",
    }
    return texts[record.nms_by]


def _memory(record: EngineRecord) -> str:
    parts = [
        f"{_megabytes(record.device_memory_bytes)} for an execution context" if record.device_memory_bytes else "",
        f"{_megabytes(record.peak_memory_bytes)} of main memory during the build" if record.peak_memory_bytes else "",
    ]
    return _listed(part for part in parts if part)


def _dla(record: EngineRecord) -> str:
    if record.dla is None:
        return ""
    fallback = record.dla.fallback
    layers = f"{len(fallback)} layers on the GPU instead: {_listed(fallback)}" if fallback else "all layers run on it"
    return f"core {record.dla.core}; {layers}"


def _ports(name: str, ports: Iterable[EngineTensor]) -> list[Field]:
    """Return one field per tensor; only the first one has the name."""
    texts = [f"{port.name} {port.dtype} [{_listed(port.shape)}]" for port in ports]
    return [(name if i == 0 else "", text) for i, text in enumerate(texts)]


def _shapes(shape: InputShape) -> str:
    low, best, high = ("x".join(map(str, sides)) for sides in (shape.min, shape.opt, shape.max))
    return f"{shape.name} {low} to {high}, optimized for {best}"


def _cells(layer: EngineLayer) -> list[object]:
    output = layer.outputs[0] if layer.outputs else None
    return [
        _shortened(layer.name),
        layer.type,
        layer.precision,
        "x".join(map(str, output.shape)) if output else "",
        output.format if output else "",
        None if layer.weights_bytes is None else f"{layer.weights_bytes:,}",
        _shortened(layer.tactic),
    ]


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_CELL else f"{text[: MAX_CELL - 3]}..."


def _listed(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in values)


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"
