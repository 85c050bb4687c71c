"""`y7 val`: COCO average precision of any model file, with the published protocol."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from yolov7_deploy._output import echo
from yolov7_deploy.cli.options import (
    Device,
    Half,
    Img,
    JsonPath,
    Weights,
    check_json_path,
    label_rule,
    locate_weights,
    parse_img,
)
from yolov7_deploy.options import ValOptions

if TYPE_CHECKING:
    from yolov7_deploy.evaluation.accuracy import AccuracyReport

DEFAULTS = ValOptions()
MAX_NOTES = 20
METRICS = {
    "ap": "AP  IoU 0.50:0.95",
    "ap50": "AP  IoU 0.50",
    "ap75": "AP  IoU 0.75",
    "ap_small": "AP  small",
    "ap_medium": "AP  medium",
    "ap_large": "AP  large",
    "ar1": "AR  1 detection",
    "ar10": "AR  10 detections",
    "ar100": "AR  100 detections",
    "ar_small": "AR  small",
    "ar_medium": "AR  medium",
    "ar_large": "AR  large",
}


def val(
    data: Annotated[Path, typer.Option("--data", help="Dataset YAML, or COCO annotations (instances JSON).")],
    weights: Weights = "yolov7",
    images: Annotated[
        Path | None,
        typer.Option("--images", help="Image folder for COCO annotations (default: searched near the JSON file)."),
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Split of the dataset: val, test or train.")] = "val",
    img: Img = None,
    batch: Annotated[int, typer.Option("--batch", "--batch-size", help="Batch size.")] = DEFAULTS.batch,
    rect: Annotated[
        bool | None,
        typer.Option(
            "--rect/--no-rect",
            help="Rectangular batches as published, or square letterbox (default: rect if the model accepts it).",
        ),
    ] = DEFAULTS.rect,
    conf: Annotated[
        float, typer.Option("--conf", "--conf-thres", help="Confidence threshold, 0 to 1.")
    ] = DEFAULTS.conf,
    iou: Annotated[float, typer.Option("--iou", "--iou-thres", help="IoU threshold of NMS, 0 to 1.")] = DEFAULTS.iou,
    max_det: Annotated[
        int, typer.Option("--max-det", "--topk-all", help="Maximum number of detections per image.")
    ] = DEFAULTS.max_det,
    limit: Annotated[int | None, typer.Option("--limit", help="Evaluate only the first N images.")] = None,
    device: Device = "auto",
    half: Half = None,
    json_path: JsonPath = None,
    predictions: Annotated[
        str | None,
        typer.Option(
            "--predictions",
            "--save-json",
            help="Write the detections as a COCO results JSON.",
            callback=check_json_path,
        ),
    ] = None,
    per_class: Annotated[bool, typer.Option("--per-class", "--verbose", help="Print the AP of every class.")] = False,
) -> None:
    """Measure COCO average precision (AP) on a dataset.

    Example:  y7 val --weights yolov7.onnx --data coco.yaml
    """
    options = ValOptions(rect=rect, batch=batch, conf=conf, iou=iou, max_det=max_det)
    input_size = parse_img(img)
    from yolov7_deploy._console import progress, write_json
    from yolov7_deploy._serialization import sha256_hex
    from yolov7_deploy.datasets import open_dataset
    from yolov7_deploy.detector import Detector
    from yolov7_deploy.evaluation.accuracy import evaluate
    from yolov7_deploy.runtimes.base import runtime_entry

    dataset = open_dataset(data, images=images, split=split, limit=limit)
    path = locate_weights(weights)
    with (
        Detector(path, device=device, img=input_size, half=half) as detector,
        progress("val") as show_progress,
    ):
        report = evaluate(detector, dataset, options=options, progress=show_progress)
    report = replace(report, weights=str(path), weights_sha256=sha256_hex(path), runtime=runtime_entry(path).name)
    echo(describe(report, per_class=per_class), err="-" in (json_path, predictions))
    if predictions is not None:
        write_json(report.predictions, predictions)
    if json_path is not None:
        write_json(report.to_dict(), json_path)


def describe(report: AccuracyReport, *, per_class: bool) -> str:
    """Return the report as text: protocol, the twelve COCO metrics, classes if requested, speed and notes."""
    from yolov7_deploy._console import table

    thresholds, speed = report.thresholds, report.speed_ms
    parts = [
        f"{report.weights} ({report.runtime}, {report.precision}) on {report.images} images",
        f"protocol: {report.protocol}; conf {thresholds.conf:g}, iou {thresholds.iou:g}, "
        f"max-det {thresholds.max_det}, {label_rule(thresholds.multi_label)}",
    ]
    if per_class:
        rows = [[c.name, c.images, c.instances, _number(c.ap), _number(c.ap50)] for c in report.classes if c.instances]
        parts.append(table(rows, ["class", "images", "instances", "AP", "AP50"]))
    values = [[label, _number(getattr(report, name))] for name, label in METRICS.items()]
    parts.append(table(values, ["metric", "value"]))
    parts.append(
        f"speed per image: {speed['preprocess']:.1f} ms preprocess, {speed['inference']:.1f} ms inference, "
        f"{speed['postprocess']:.1f} ms postprocess"
    )
    notes = [f"note: {note}" for note in report.notes]
    notes += [f"skipped {item.path}: {item.reason}" for item in report.skipped]
    parts += notes[:MAX_NOTES]
    if len(notes) > MAX_NOTES:
        parts.append(f"and {len(notes) - MAX_NOTES} more notes and skipped images, all of them in --json")
    return "\n".join(parts)


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"
