"""`y7 info`: the cost of a variant compared with the paper, or the contents of a weights file, ONNX file or engine."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from yolov7_deploy._output import echo
from yolov7_deploy.cli.options import JsonPath, label_rule, locate_weights
from yolov7_deploy.errors import UsageError, missing_library

if TYPE_CHECKING:
    from yolov7_deploy.inspection.complexity import Complexity, LayerCost, PaperCost, VariantRecord, WeightsRecord
    from yolov7_deploy.inspection.engine_file import EngineFile
    from yolov7_deploy.inspection.onnx_file import OnnxFile, TensorInfo
    from yolov7_deploy.metadata import ModelMetadata
    from yolov7_deploy.model.layer_table import Anchors

MAX_NAMES = 100
LINE = 100  # characters per line of wrapped text
INDENT = 12
NO_BREAK = "\u00a0"
LAYER_COLUMNS = ("layer", "type", "channels", "k/s", "1/res", "parameters", "fused", "from", "form")


def info(
    target: Annotated[
        str,
        typer.Argument(
            metavar="WEIGHTS-or-VARIANT",
            help="A .pt, .safetensors, .onnx or .engine file, or a variant such as yolov7.",
        ),
    ],
    json_path: JsonPath = None,
    layers: Annotated[bool, typer.Option("--layers", help="Print the table of layers.")] = False,
) -> None:
    """Show the cost of a variant, or the contents of a model file.

    Example:  y7 info yolov7-tiny
    """
    from yolov7_deploy._console import write_json
    from yolov7_deploy.hub import ENGINE_SUFFIXES
    from yolov7_deploy.model.ablations import ABLATIONS
    from yolov7_deploy.model.configs import VARIANTS

    record: VariantRecord | WeightsRecord | OnnxFile | EngineFile
    extra: dict[str, object] = {}
    if target in VARIANTS or target in ABLATIONS:
        kind, (record, text) = "variant", _variant(target, layers=layers)
    elif Path(target).suffix.lower() == ".onnx":
        kind, (record, extra, text) = "onnx", _onnx(target, layers=layers)
    elif Path(target).suffix.lower() in ENGINE_SUFFIXES:
        kind, (record, text) = "engine", _engine(target, layers=layers)
    else:
        kind, (record, text) = "weights", _weights(target, layers=layers)
    echo(text, err=json_path == "-")
    if json_path is not None:
        write_json({"kind": kind, **asdict(record), **extra}, json_path)


def _variant(name: str, *, layers: bool) -> tuple[VariantRecord, str]:
    from yolov7_deploy.inspection.complexity import inspect_variant

    record = inspect_variant(name)
    return record, _variant_text(record, layers=layers)


def _weights(target: str, *, layers: bool) -> tuple[WeightsRecord, str]:
    from yolov7_deploy.inspection.complexity import inspect_weights

    record = inspect_weights(locate_weights(target))
    return record, _weights_text(record, layers=layers)


def _onnx(target: str, *, layers: bool) -> tuple[OnnxFile, dict[str, object], str]:
    from yolov7_deploy.hub import find_weights
    from yolov7_deploy.inspection.onnx_file import read_onnx

    if layers:
        raise UsageError(
            f"--layers is for variants, weights and engines; {target} is an ONNX file, whose nodes are always counted.",
            fix=f"y7 info {target}",
        )
    path = find_weights(target)
    record = read_onnx(path)
    int8_record, int8_lines = _int8(path, record)
    return record, int8_record, _onnx_text(record, int8_lines)


def _int8(path: Path, record: OnnxFile) -> tuple[dict[str, object], list[str]]:
    """Return what a quantized file computes in INT8, as a record and as text lines; both are empty for other files.

    Counting needs onnx; without it, one line names the extra that installs it.
    """
    if not {"QuantizeLinear", "DequantizeLinear"} & set(record.nodes):
        return {}, []
    from yolov7_deploy.inspection.onnx_file import int8_lines, int8_to_dict, read_int8_summary

    try:
        account = read_int8_summary(path)
    except ModuleNotFoundError as error:
        return {}, [_field("int8", f"not counted: {missing_library(error, 'to count it')}".replace("\n", "  "))]
    computes, pairs = int8_lines(account)
    return {"int8": int8_to_dict(account)}, [_field("int8", computes), _field("", pairs)]


def _engine(target: str, *, layers: bool) -> tuple[EngineFile, str]:
    from yolov7_deploy.inspection.engine_file import read_engine_file

    record = read_engine_file(target)
    return record, _engine_text(record, layers=layers)


# --- variants and weights ---------------------------------------------------------------------------------------------


def _variant_text(record: VariantRecord, *, layers: bool) -> str:
    cost = record.cost
    parts = [
        f"{record.variant}: {_layer_count(cost)}, {record.activation}, strides {_listed(record.strides)}",
        _anchors_text(record.anchors, record.strides),
        _cost_table(cost),
        *([_paper_table(record)] if record.paper else []),
        *(textwrap.fill(f"note: {note}", LINE, subsequent_indent="      ") for note in record.notes),
    ]
    return "\n\n".join([*parts, *([_layer_table(record.layers)] if layers else [])])


def _weights_text(record: WeightsRecord, *, layers: bool) -> str:
    cost = record.cost
    title = "custom anchors, different from the variant's" if record.custom_anchors else "anchors of the variant"
    parts = [
        f"{record.path}: {record.variant}, {record.form} form, {len(record.class_names)} classes",
        "\n".join(
            [
                _field("file", f"{_megabytes(record.size_bytes)}, sha256 {record.sha256}"),
                _field("network", f"{_layer_count(cost)}, {record.parameters:,} parameters in the file"),
                _field("strides", _listed(record.strides)),
                *_origin_fields(record.training_size, record.origin, record.origin_sha256, record.version),
            ]
        ),
        _anchors_text(record.anchors, record.strides, title=title),
        _cost_table(cost),
        _names_text(record.class_names),
    ]
    return "\n\n".join([*parts, *([_layer_table(record.layers)] if layers else [])])


def _origin_fields(training_size: int | None, source: str, sha256: str, version: str) -> list[str]:
    """Return lines with the training size, the source and the writer of a file, as far as they are known."""
    origin = f"{source} {sha256}".strip()
    return [
        *([_field("trained at", f"{training_size}x{training_size}")] if training_size else []),
        *([_field("source", origin)] if origin else []),
        *([_field("written by", f"yolov7-deploy {version}")] if version else []),
    ]


def _layer_count(cost: Complexity) -> str:
    training = f" ({cost.layers_training} in training form)" if cost.layers_training != cost.layers else ""
    return f"{cost.layers} layers{training}"


def _cost_table(cost: Complexity) -> str:
    from yolov7_deploy._console import table

    rows: list[list[object]] = [
        ["training form", f"{cost.parameters_training:>11,}", f"{cost.gflops_training:.2f}"],
        ["deploy form, as published", f"{cost.parameters_deploy:>11,}", None],
        ["fused, as executed", f"{cost.parameters_fused:>11,}", f"{cost.gflops:.2f}"],
    ]
    return table(rows, ["", " parameters", f"GFLOPs at {cost.size}"], f"cost with {cost.classes} classes")


def _paper_table(record: VariantRecord) -> str:
    from yolov7_deploy._console import table

    return table(
        [row for entry in record.paper for row in _paper_rows(entry, record.cost)],
        ["", "size", "parameters", "GFLOPs", "AP val", "AP test", "FPS V100", "ms at batch 32"],
        "compared with the paper (COCO AP in percent)",
    )


def _paper_rows(entry: PaperCost, cost: Complexity) -> list[list[object]]:
    row = entry.row
    val, test = (None if precision is None else precision.ap for precision in (row.val, row.test))
    ours = [f"{cost.parameters_fused / 1e6:.1f}M", f"{entry.gflops:.1f}"]
    return [
        [
            "paper",
            entry.size,
            f"{row.params_m}M" if row.params_m else None,
            row.gflops,
            val,
            test,
            row.fps,
            row.batch32_ms,
        ],
        ["this package, fused", entry.size, *ours, None, None, None, None],
    ]


def _anchors_text(anchors: Anchors, strides: Iterable[int], *, title: str = "anchors") -> str:
    from yolov7_deploy._console import table

    rows = [
        [stride, *(f"{width:g},{height:g}" for width, height in level)]
        for stride, level in zip(strides, anchors, strict=True)
    ]
    columns = ["stride", *(f"anchor {i + 1}" for i in range(len(anchors[0])))]
    return table(rows, columns, f"{title} (width,height in pixels, as in the official configurations)")


def _layer_table(layers: Iterable[LayerCost]) -> str:
    from yolov7_deploy._console import table

    rows = [
        [
            row.index,
            row.kind,
            row.c_out,
            row.kernel_stride,
            row.reduction,
            row.parameters,
            row.parameters_fused,
            ",".join("img" if source < 0 else str(source) for source in row.sources),
            "" if row.form == "both" else row.form,
        ]
        for row in layers
    ]
    return table(rows, LAYER_COLUMNS)


def _names_text(names: tuple[str, ...]) -> str:
    entries = [f"{index} {name}".replace(" ", NO_BREAK) for index, name in enumerate(names[:MAX_NAMES])]
    more = f", and {len(names) - MAX_NAMES} more, all of them in --json" if len(names) > MAX_NAMES else ""
    return _field("classes", ", ".join(entries) + more).replace(NO_BREAK, " ")


# --- ONNX -------------------------------------------------------------------------------------------------------------


def _onnx_text(record: OnnxFile, int8_lines: list[str]) -> str:
    opsets = ", ".join(f"{domain} {version}".strip() for domain, version in record.opsets.items())
    lines = [
        _field("file", f"{_megabytes(record.size_bytes)}, written by {record.producer or 'an unnamed program'}"),
        _field("opset", f"{opsets} (IR version {record.ir_version})"),
        *(_field("input" if i == 0 else "", _port_text(tensor)) for i, tensor in enumerate(record.inputs)),
        *(_field("output" if i == 0 else "", _port_text(tensor)) for i, tensor in enumerate(record.outputs)),
        _field("nodes", f"{sum(record.nodes.values())}: {_counts(record.nodes)}"),
        *(_field("function", f"{name}, {count} nodes") for name, count in record.functions.items()),
        _field("parameters", f"{record.parameters:,} in convolutions and matrix multiplications"),
        *int8_lines,
    ]
    metadata = (
        _metadata_text(record.metadata) if record.metadata else _field("metadata", "none: not written by this package")
    )
    headline = f"{record.path}: {record.metadata.variant if record.metadata else 'ONNX'}"
    return "\n\n".join([headline, "\n".join(lines), metadata])


def _metadata_text(metadata: ModelMetadata) -> str:
    nms = metadata.nms
    size = "any size" if metadata.input_hw is None else f"{metadata.input_hw[0]}x{metadata.input_hw[1]}"
    batch = "any batch" if metadata.batch is None else f"batch {metadata.batch}"
    nms_text = "not in the model: the output is the decoded head"
    if nms is not None:
        thresholds = "changeable at run time" if nms.runtime_thresholds else "fixed"
        nms_text = (
            f"{nms.kind}, conf {nms.conf:g} and iou {nms.iou:g} ({thresholds}), max-det {nms.max_det}, "
            f"{label_rule(nms.multi_label)}"
        )
    precision = metadata.precision if metadata.int8 is None else f"int8 for {metadata.int8.target}"
    lines = [
        _field("metadata", f"{metadata.variant}, {precision}, {len(metadata.class_names)} classes"),
        _field("accepts", f"{size} (height x width), {batch}, {metadata.input_kind}"),
        _field("NMS", nms_text),
        _field("strides", _listed(metadata.strides)),
        *_origin_fields(metadata.training_size, metadata.source, metadata.source_sha256, metadata.version),
        *(_field("note", note) for note in metadata.notes),
        _names_text(metadata.class_names),
    ]
    anchors = [_anchors_text(metadata.anchors, metadata.strides)] if metadata.anchors else []
    return "\n\n".join(["\n".join(lines), *anchors])


def _port_text(tensor: TensorInfo) -> str:
    return f"{tensor.name} {tensor.dtype} [{_listed(tensor.shape)}]{' (optional)' if tensor.has_default else ''}"


def _counts(nodes: dict[str, int]) -> str:
    return ", ".join(f"{count} {op}" for op, count in nodes.items())


# --- engines ----------------------------------------------------------------------------------------------------------


def _engine_text(file: EngineFile, *, layers: bool) -> str:
    from yolov7_deploy.inspection.engine_file import build_fields, layer_fields, layer_table
    from yolov7_deploy.tensorrt.build_record import TITLES

    record = file.record
    writer = f"{TITLES[file.product]} {file.tensorrt}" if file.product in TITLES else ""
    headline = f"{record.metadata.variant}, {record.metadata.precision}" if record else "TensorRT engine"
    lines = [
        _field("file", f"{_megabytes(file.size_bytes)}, sha256 {file.sha256}"),
        *([_field("written by", f"{writer}, according to the plan")] if writer and record is None else []),
        *([_field("runs on", f"compute capability {_listed(file.targets)}")] if file.targets and not record else []),
        *(_field(name, text) for name, text in (build_fields(record) if record else ())),
        *(_field("note", note) for note in file.notes),
    ]
    if record is None:
        tool = "tensorrt_rtx" if file.product == "tensorrt_rtx" else "trtexec"
        command = f"{tool} --loadEngine={file.path} --dumpLayerInfo --skipInference"
        lines.append(f"{'layers'.ljust(INDENT)}on its GPU:  {command}")  # not wrapped, so that it can be copied
    parts = [f"{file.path}: {headline}", "\n".join(lines)]
    if record is not None:
        parts.append(_metadata_text(record.metadata))
    if file.summary is not None and file.table is not None:
        parts.append("\n".join(_field(name, text) for name, text in layer_fields(file.summary)))
        parts += [layer_table(file.table)] if layers else []
    elif layers:
        parts.append("The layers of this engine are not known.")
    return "\n\n".join(parts)


# --- text -------------------------------------------------------------------------------------------------------------


def _field(name: str, text: str) -> str:
    return textwrap.fill(
        text,
        LINE,
        initial_indent=name.ljust(INDENT),
        subsequent_indent=" " * INDENT,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _listed(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in values)


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"
