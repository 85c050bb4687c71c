"""`y7 export`: a checkpoint to one verified ONNX file, and on to an engine where asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from yolov7_deploy.cli.build import MaxBatch, OptLevel, Plugin, Target, Workspace, parse_targets, shown_progress
from yolov7_deploy.cli.build import describe as describe_engine
from yolov7_deploy.cli.build import to_dict as engine_record
from yolov7_deploy.cli.options import Img, JsonPath, parse_img
from yolov7_deploy.cli.quantize import Calib, Data, MaxDrop, asked_for_int8, open_data
from yolov7_deploy.errors import UsageError
from yolov7_deploy.options import PRECISIONS, EngineOptions, ExportOptions

if TYPE_CHECKING:
    from yolov7_deploy.tensorrt.build_messages import Installation
    from yolov7_deploy.tensorrt.builder import EngineReport
    from yolov7_deploy.workflows.export import ExportReport, Int8Request

DEFAULTS = ExportOptions()
_FLAGS = {"--fp16": "fp16", "--half": "fp16", "--int8": "int8"}
_BITS = {8: "int8", 16: "fp16", 32: "fp32"}

Weights = Annotated[str, typer.Option("--weights", "-w", help="A .pt or .safetensors file, or an official name.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Default: NAME.onnx here, or NAME-fp16.onnx.")]
Batch = Annotated[int, typer.Option("--batch", "--batch-size", help="Fixed batch size.")]
DynamicBatch = Annotated[bool, typer.Option("--dynamic-batch", help="Leave the batch size open.")]
Nms = Annotated[
    str, typer.Option("--nms", help="plugin (our op with a body for every runtime), standard, efficient or none.")
]
Conf = Annotated[float, typer.Option("--conf", "--conf-thres", help="Keep scores above this.")]
Iou = Annotated[float, typer.Option("--iou", "--iou-thres", help="Suppress boxes that overlap a better one by more.")]
MaxDet = Annotated[int, typer.Option("--max-det", "--topk-all", help="Rows of the outputs.")]
MaxCandidates = Annotated[int, typer.Option("--max-candidates", help="Best-scoring boxes that enter suppression.")]
MultiLabel = Annotated[
    bool, typer.Option("--multi-label/--best-class", help="Every class of a box above --conf, or its best only.")
]
AgnosticNms = Annotated[
    bool, typer.Option("--agnostic-nms", "--class-agnostic", help="Boxes suppress those of other classes too.")
]
InputKind = Annotated[
    str, typer.Option("--input", help="float32 (NCHW RGB 0..1) or uint8 (NHWC BGR, scaled inside the graph).")
]
Precision = Annotated[
    str | None,
    typer.Option("--precision", help="fp32, fp16 or int8 (input, outputs, decoding and NMS stay float32)."),
]
Fp16 = Annotated[bool, typer.Option("--fp16", help="Same as --precision fp16.")]
Half = Annotated[bool, typer.Option("--half", help="Same as --fp16.", hidden=True)]
Quantize = Annotated[int | None, typer.Option("--quantize", help="8 is --int8, 16 --fp16, 32 fp32.", hidden=True)]
Int8 = Annotated[bool, typer.Option("--int8", help="Same as --precision int8; needs --calib.")]
Opset = Annotated[int, typer.Option("--opset", help="ONNX operator set, 13 to 21.")]
Simplify = Annotated[bool, typer.Option("--simplify/--no-simplify", help="Run onnx-simplifier.")]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Compare ONNX Runtime with torch before the file is kept.")
]
Image = Annotated[
    Path | None, typer.Option("--image", help="Verify, and find what half can hold, on this one, not a drawn one.")
]
End2end = Annotated[bool, typer.Option("--end2end", help="Same as --nms efficient.", hidden=True)]
Grid = Annotated[bool, typer.Option("--grid", help="Decoding is always inside.", hidden=True)]
MakeEngine = Annotated[
    bool, typer.Option("--engine", help="Build a TensorRT engine of it too; y7 build has more options.")
]


def export(
    *,
    weights: Weights = "yolov7",
    output: Output = None,
    img: Img = None,
    batch: Batch = 1,
    dynamic_batch: DynamicBatch = False,
    nms: Nms = DEFAULTS.nms,
    conf: Conf = DEFAULTS.conf,
    iou: Iou = DEFAULTS.iou,
    max_det: MaxDet = DEFAULTS.max_det,
    max_candidates: MaxCandidates = DEFAULTS.max_candidates,
    multi_label: MultiLabel = DEFAULTS.multi_label,
    agnostic_nms: AgnosticNms = DEFAULTS.class_agnostic,
    input_kind: InputKind = DEFAULTS.input_kind,
    precision: Precision = None,
    fp16: Fp16 = False,
    half: Half = False,
    quantize: Quantize = None,
    int8: Int8 = False,
    calib: Calib = None,
    data: Data = None,
    max_drop: MaxDrop = None,
    opset: Opset = DEFAULTS.opset,
    simplify: Simplify = DEFAULTS.simplify,
    verify: Verify = True,
    image: Image = None,
    end2end: End2end = False,
    grid: Grid = False,
    engine: MakeEngine = False,
    target: Target = None,
    plugin: Plugin = "auto",
    workspace: Workspace = None,
    opt_level: OptLevel = None,
    max_batch: MaxBatch = None,
    json_path: JsonPath = None,
) -> None:
    """Export weights to one ONNX file for every runtime, and verify it."""
    flags = [name for name, given in (("--fp16", fp16), ("--half", half), ("--int8", int8)) if given]
    number_type = parse_precision(precision, quantize, flags)
    options = ExportOptions(
        input_hw=_input_hw(img),
        batch=_batch(batch, dynamic_batch=dynamic_batch),
        nms="efficient" if end2end else nms,
        conf=conf,
        iou=iou,
        max_det=max_det,
        max_candidates=max_candidates,
        multi_label=multi_label,
        class_agnostic=agnostic_nms,
        input_kind=input_kind,  # type: ignore[arg-type]
        opset=opset,
        simplify=simplify,
    )
    request = _int8_request(calib, data, max_drop, is_int8=number_type == "int8")
    build = _engine_options(target, plugin, workspace, opt_level, max_batch, asked=engine)
    to_stderr = json_path == "-"
    on = None if build is None else _find_tensorrt(build)
    report = _run(weights, output, options, number_type, request, verify=verify, image=image, to_stderr=to_stderr)
    _finish(report, None if build is None else _build(report.path, build, on, to_stderr=to_stderr), json_path)


def _input_hw(img: str | None) -> tuple[int, int] | None:
    size = parse_img(img)
    return (size, size) if isinstance(size, int) else size


def _batch(batch: int, *, dynamic_batch: bool) -> int | None:
    if dynamic_batch and batch != 1:
        raise UsageError(f"--dynamic-batch and --batch {batch} contradict each other.", fix="Leave one of them out.")
    return None if dynamic_batch else batch


def parse_precision(precision: str | None, quantize: int | None, flags: Sequence[str]) -> str:
    """One of `PRECISIONS` from what was typed; fp32 where nothing was.

    Args:
        precision: Of `--precision`.
        quantize: Bits, of `--quantize`.
        flags: Those of `--fp16`, `--half` and `--int8` that were given.

    Raises:
        UsageError: The precision is unknown, not available, or contradicts another flag.
    """
    asked = {flag: _FLAGS[flag] for flag in flags}
    if precision is not None:
        asked[f"--precision {precision}"] = precision.lower()
    if quantize is not None:
        asked[f"--quantize {quantize}"] = _BITS.get(quantize, f"{quantize} bits")
    for typed, name in asked.items():
        if name not in PRECISIONS:
            raise UsageError(f"{typed} is unknown.", fix=f"One of: --precision {', --precision '.join(PRECISIONS)}")
    if len(set(asked.values())) > 1:
        raise UsageError(f"{' and '.join(asked)} contradict each other.", fix="Leave one of them out.")
    return next(iter(asked.values()), "fp32")


def _run(
    weights: str,
    output: Path | None,
    options: ExportOptions,
    precision: str,
    int8: Int8Request | None,
    *,
    verify: bool,
    image: Path | None,
    to_stderr: bool,
) -> ExportReport:
    from yolov7_deploy._console import progress
    from yolov7_deploy.hub import find_weights
    from yolov7_deploy.image import read_image
    from yolov7_deploy.workflows.export import export_weights

    images = [read_image(image)] if image else []
    with progress("download") as show:
        path = find_weights(weights, progress=show)
    report = export_weights(
        path,
        output or Path(f"{_stem(weights, path)}{'' if precision == 'fp32' else f'-{precision}'}.onnx"),
        options=options,
        precision=precision,
        int8=int8,
        verify=verify,
        images=images,
        say=lambda what, seconds: typer.echo(f"{seconds:6.1f} s  {what}", err=to_stderr),
    )
    typer.echo(describe(report), err=to_stderr)
    return report


def _int8_request(
    calib: Path | None, data: Path | None, max_drop: float | None, *, is_int8: bool
) -> Int8Request | None:
    """Opens the images before the export, which takes long."""
    options = asked_for_int8(calib, data=data, max_drop=max_drop, is_int8=is_int8)
    if options is None or calib is None:
        return None
    from yolov7_deploy._console import progress
    from yolov7_deploy.precision.calibration_images import open_calibration
    from yolov7_deploy.workflows.export import Int8Request

    return Int8Request(images=open_calibration(calib), options=options, data=open_data(data, None), show=progress)


def _engine_options(
    target: str | None,
    plugin: str,
    workspace: float | None,
    opt_level: int | None,
    max_batch: int | None,
    *,
    asked: bool,
) -> EngineOptions | None:
    """How to build, if at all.

    Raises:
        UsageError: An option of the build without the build.
    """
    given = {
        "--target": target,
        "--plugin": None if plugin == "auto" else plugin,
        "--workspace": workspace,
        "--opt-level": opt_level,
        "--max-batch": max_batch,
    }
    typed = [f"{name} {value}" for name, value in given.items() if value is not None]
    if typed and not asked:
        raise UsageError(f"{typed[0]} is about an engine, and none is asked for.", fix="Add  --engine")
    options = EngineOptions(
        targets=parse_targets(target), plugin=plugin, workspace_gib=workspace, opt_level=opt_level, max_batch=max_batch
    )
    return options if asked else None


def _find_tensorrt(options: EngineOptions) -> Installation:
    """Looks for it before the export, which takes long."""
    from yolov7_deploy.tensorrt.selection import find_tensorrt

    return find_tensorrt(options)


def _build(path: Path, options: EngineOptions, on: Installation | None, *, to_stderr: bool) -> EngineReport:
    from yolov7_deploy.tensorrt.builder import build_file

    with shown_progress(verbose=False, to_stderr=to_stderr) as telling:
        report = build_file(path, path.with_suffix(".engine"), options=options, on=on, telling=telling)
    typer.echo(describe_engine(report), err=to_stderr)
    return report


def _finish(report: ExportReport, engine: EngineReport | None, json_path: str | None) -> None:
    if json_path is None:
        return
    from yolov7_deploy._console import write_json

    built = {} if engine is None else {"engine": engine_record(engine)}
    write_json(to_dict(report) | built, json_path)


def _stem(asked: str, found: Path) -> str:
    """The official name where one was asked for, else the file's."""
    return found.stem if Path(asked).suffix else asked


def describe(report: ExportReport) -> str:
    """The check and the file for people."""
    from yolov7_deploy.cli.verify import stage_table

    metadata, parts = report.metadata, []
    if report.parity:
        parts.append(stage_table(report.parity))
    height, width = metadata.input_hw or (0, 0)
    batch = "open" if metadata.batch is None else str(metadata.batch)
    parts.append(
        f"{report.path}: {report.bytes / 1e6:.1f} MB, {metadata.variant} {width}x{height}, batch {batch}, input "
        f"{metadata.input_kind}, {metadata.precision}, opset {metadata.opset}"
    )
    if metadata.nms:
        kept = metadata.nms
        parts.append(
            f"NMS inside ({kept.kind}): conf {kept.conf:g}, iou {kept.iou:g}, max-det {kept.max_det}, "
            + ("every class of a box" if kept.multi_label else "best class of a box")
            + ("; conf and iou can be changed at run time" if kept.runtime_thresholds else "")
        )
    parts.append(f"Try it:  y7 detect --weights {report.path} --source IMAGE")
    return "\n".join(parts)


def to_dict(report: ExportReport) -> dict[str, object]:
    """The record for machines."""
    import json

    return {
        "path": str(report.path),
        "bytes": report.bytes,
        "metadata": json.loads(report.metadata.to_json()),
        "parity": report.parity.to_dict() if report.parity else None,
        **_int8_record(report),
    }


def _int8_record(report: ExportReport) -> dict[str, object]:
    if report.quantized is None:
        return {}
    from yolov7_deploy.workflows.quantize import to_dict as quantized_record

    return {"quantization": quantized_record(report.quantized)}
