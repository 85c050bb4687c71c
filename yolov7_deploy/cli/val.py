"""`y7 val`: COCO average precision of any model file, with the published protocol."""

from __future__ import annotations

import contextlib
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
    locate_weights,
    parse_img,
)
from yolov7_deploy.errors import missing_library
from yolov7_deploy.options import ValOptions

if TYPE_CHECKING:
    from yolov7_deploy.datasets import Dataset
    from yolov7_deploy.evaluation.accuracy import AccuracyReport

DEFAULTS = ValOptions()
RUNS = Path("runs/val")

Rect = Annotated[
    bool | None,
    typer.Option(
        "--rect/--no-rect",
        help="Rectangular batches as published, or square letterbox (default: rect if the model accepts it).",
    ),
]
Predictions = Annotated[
    str | None,
    typer.Option(
        "--predictions",
        "--save-json",
        help="Write the detections as a COCO results JSON.",
        callback=check_json_path,
    ),
]
PerClass = Annotated[
    bool, typer.Option("--per-class", "--verbose", help="Print the table of classes even if there are over 50.")
]
SaveDir = Annotated[Path | None, typer.Option("--save-dir", help="Folder of the charts (default: runs/val/expN).")]
NoSave = Annotated[bool, typer.Option("--nosave", help="Do not write charts.")]


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
    rect: Rect = DEFAULTS.rect,
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
    predictions: Predictions = None,
    per_class: PerClass = False,
    save_dir: SaveDir = None,
    nosave: NoSave = False,
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
    to_stderr = "-" in (json_path, predictions)
    echo(report.summary(per_class=per_class or None), err=to_stderr)
    if predictions is not None:
        write_json(report.predictions, predictions)
    if json_path is not None:
        write_json(report.to_dict(), json_path)
    if not nosave:
        _draw_charts(report, dataset, save_dir, to_stderr=to_stderr)


def _draw_charts(report: AccuracyReport, dataset: Dataset, save_dir: Path | None, *, to_stderr: bool) -> None:
    """Write the charts of the report; without matplotlib, say how to get them."""
    from yolov7_deploy._output_folder import new_run_folder

    try:
        from yolov7_deploy.evaluation.plots import draw_evaluation
    except ModuleNotFoundError as error:
        echo(f"no charts: {missing_library(error, 'for charts')}", err=True)
        return
    with contextlib.nullcontext(save_dir) if save_dir else new_run_folder(RUNS) as folder:
        draw_evaluation(report, dataset, folder)
    echo(f"confusion matrix, curves and examples in {folder}", err=to_stderr)
