"""`y7 val`: COCO average precision of any model file, by the published protocol."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from yolov7_deploy.cli.options import Device, Half, Img, JsonPath, Weights, parse_img
from yolov7_deploy.options import ValOptions

if TYPE_CHECKING:
    from yolov7_deploy.evaluation.accuracy import AccuracyReport

DEFAULTS = ValOptions()
MAX_REMARKS = 20
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
    data: Annotated[Path, typer.Option("--data", help="Dataset YAML, or a COCO instances JSON.")],
    weights: Weights = "yolov7",
    images: Annotated[
        Path | None, typer.Option("--images", help="Image folder of a JSON; guessed where it is in a usual place.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Part of the dataset: val, test or train.")] = "val",
    img: Img = None,
    batch: Annotated[int, typer.Option("--batch", "--batch-size", help="Images that run together.")] = DEFAULTS.batch,
    rect: Annotated[
        bool | None,
        typer.Option("--rect/--no-rect", help="Published protocol or plain letterbox; rect where the model allows it."),
    ] = DEFAULTS.rect,
    conf: Annotated[float, typer.Option("--conf", "--conf-thres", help="Keep scores above this.")] = DEFAULTS.conf,
    iou: Annotated[
        float, typer.Option("--iou", "--iou-thres", help="Suppress boxes that overlap a better one by more than this.")
    ] = DEFAULTS.iou,
    max_det: Annotated[
        int, typer.Option("--max-det", "--topk-all", help="At most this many boxes an image.")
    ] = DEFAULTS.max_det,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first so many images.")] = None,
    device: Device = "auto",
    half: Half = None,
    json_path: JsonPath = None,
    predictions: Annotated[
        str | None, typer.Option("--predictions", "--save-json", help="Write the detections as a COCO results file.")
    ] = None,
    per_class: Annotated[bool, typer.Option("--per-class", "--verbose", help="Print AP of every class.")] = False,
) -> None:
    """Measure COCO average precision."""
    options = ValOptions(rect=rect, batch=batch, conf=conf, iou=iou, max_det=max_det)
    input_size = parse_img(img)
    from yolov7_deploy._console import progress, write_json
    from yolov7_deploy.datasets import open_dataset
    from yolov7_deploy.detector import Detector
    from yolov7_deploy.evaluation.accuracy import evaluate
    from yolov7_deploy.hub import file_digest, find_weights
    from yolov7_deploy.runtimes.base import backend_row

    dataset = open_dataset(data, images=images, split=split, limit=limit)
    with progress("download") as show:
        path = find_weights(weights, progress=show)
    place = f"cuda:{device}" if device.isdigit() else device
    with Detector(path, device=place, img=input_size, half=half) as detector, progress("val") as show:
        report = evaluate(detector, dataset, options=options, progress=show)
    report = replace(report, weights=str(path), weights_sha256=file_digest(path), backend=backend_row(path).name)
    typer.echo(describe(report, per_class=per_class), err="-" in (json_path, predictions))
    for document, target in ((report.predictions, predictions), (report.to_dict(), json_path)):
        if target is not None:
            write_json(document, target)


def describe(report: AccuracyReport, *, per_class: bool) -> str:
    """The report for people: what was measured and how, the twelve numbers, the classes if wanted, what to know."""
    from yolov7_deploy._console import table

    kept, speed = report.thresholds, report.speed_ms
    parts = [
        f"{report.weights} ({report.backend}, {report.precision}) on {report.images} images",
        f"protocol: {report.protocol}; conf {kept.conf:g}, iou {kept.iou:g}, max-det {kept.max_det}, "
        + ("every class of a box" if kept.multi_label else "best class of a box"),
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
    remarks = [f"note: {note}" for note in report.notes]
    remarks += [f"skipped {item.path}: {item.reason}" for item in report.skipped]
    parts += remarks[:MAX_REMARKS]
    if len(remarks) > MAX_REMARKS:
        parts.append(f"and {len(remarks) - MAX_REMARKS} more notes and skipped images: all of them are in --json")
    return "\n".join(parts)


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"
