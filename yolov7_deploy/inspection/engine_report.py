"""Text report of an engine: its build record and layers as (name, text) fields and a table."""

from __future__ import annotations

from collections.abc import Iterable

from yolov7_deploy._console import table as drawn_table
from yolov7_deploy.inspection.engine_file import LayerSummary
from yolov7_deploy.tensorrt.build_record import TITLES, EngineRecord, EngineTensor, InputShape
from yolov7_deploy.tensorrt.inspector import EngineLayer, LayerTable

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
