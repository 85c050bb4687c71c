"""`y7 export`: a checkpoint to one verified ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from yolov7_deploy.cli.detect import parse_img
from yolov7_deploy.errors import UsageError
from yolov7_deploy.options import ExportOptions

if TYPE_CHECKING:
    from yolov7_deploy.pipeline import ExportReport

DEFAULTS = ExportOptions()


Weights = Annotated[str, typer.Option("--weights", "-w", help="A .pt or .safetensors file, or an official name.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Default: NAME.onnx here.")]
Img = Annotated[
    str | None,
    typer.Option("--img", "--img-size", "--imgsz", help="Network input: 640, or height and width as 384x640."),
]
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
Opset = Annotated[int, typer.Option("--opset", help="ONNX operator set, 13 to 21.")]
Simplify = Annotated[bool, typer.Option("--simplify/--no-simplify", help="Run onnx-simplifier.")]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Compare ONNX Runtime with torch before the file is kept.")
]
Picture = Annotated[Path | None, typer.Option("--picture", help="Verify on this picture instead of a drawn one.")]
End2end = Annotated[bool, typer.Option("--end2end", help="Same as --nms efficient.", hidden=True)]
Grid = Annotated[bool, typer.Option("--grid", help="Decoding is always inside.", hidden=True)]
JsonPath = Annotated[str | None, typer.Option("--json", help="Write the whole record; - is stdout.")]


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
    opset: Opset = DEFAULTS.opset,
    simplify: Simplify = DEFAULTS.simplify,
    verify: Verify = True,
    picture: Picture = None,
    end2end: End2end = False,
    grid: Grid = False,
    json_path: JsonPath = None,
) -> None:
    """Export weights to one ONNX file for every runtime, and verify it."""
    if dynamic_batch and batch != 1:
        raise UsageError(f"--dynamic-batch and --batch {batch} contradict each other.", fix="Leave one of them out.")
    size = parse_img(img)
    options = ExportOptions(
        input_hw=(size, size) if isinstance(size, int) else size,
        batch=None if dynamic_batch else batch,
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
    report = _run(weights, output, options, verify=verify, picture=picture, to_stderr=json_path == "-")
    typer.echo(describe(report), err=json_path == "-")
    if json_path is not None:
        from yolov7_deploy.measure.report import write_json

        write_json(to_record(report), json_path)


def _run(
    weights: str, output: Path | None, options: ExportOptions, *, verify: bool, picture: Path | None, to_stderr: bool
) -> ExportReport:
    from yolov7_deploy.image import read_image
    from yolov7_deploy.measure.report import progress
    from yolov7_deploy.pipeline import export_weights
    from yolov7_deploy.weights import find_weights

    pictures = [read_image(picture)] if picture else []
    with progress("download") as show:
        path = find_weights(weights, progress=show)
    return export_weights(
        path,
        output or Path(f"{_stem(weights, path)}.onnx"),
        options=options,
        verify=verify,
        pictures=pictures,
        say=lambda what, seconds: typer.echo(f"{seconds:6.1f} s  {what}", err=to_stderr),
    )


def _stem(asked: str, found: Path) -> str:
    """The official name where one was asked for, else the file's."""
    return found.stem if Path(asked).suffix else asked


def describe(report: ExportReport) -> str:
    """The check and the file for people."""
    from yolov7_deploy.cli.verify import stage_table

    info, parts = report.info, []
    if report.parity:
        parts.append(stage_table(report.parity))
    height, width = info.input_hw or (0, 0)
    batch = "open" if info.batch is None else str(info.batch)
    parts.append(
        f"{report.path}: {report.bytes / 1e6:.1f} MB, {info.variant} {width}x{height}, batch {batch}, input "
        f"{info.input_kind}, opset {info.opset}"
    )
    if info.nms:
        kept = info.nms
        parts.append(
            f"NMS inside ({kept.kind}): conf {kept.conf:g}, iou {kept.iou:g}, max-det {kept.max_det}, "
            + ("every class of a box" if kept.multi_label else "best class of a box")
            + ("; conf and iou can be changed at run time" if kept.runtime_thresholds else "")
        )
    parts.append(f"Try it:  y7 detect --weights {report.path} --source PICTURE")
    return "\n".join(parts)


def to_record(report: ExportReport) -> dict[str, object]:
    """The record for machines."""
    import json

    return {
        "path": str(report.path),
        "bytes": report.bytes,
        "passport": json.loads(report.info.to_json()),
        "parity": report.parity.to_dict() if report.parity else None,
    }
