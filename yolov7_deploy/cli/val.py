"""`y7 val`: COCO average precision of any model file, with the published protocol."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from yolov7_deploy._output import echo, note
from yolov7_deploy._output_folder import new_run_folder
from yolov7_deploy.cli.options import (
    Device,
    ExistOk,
    Half,
    Img,
    JsonPath,
    Name,
    RuntimeName,
    SaveDir,
    Weights,
    check_json_path,
    locate_weights,
    one_of,
    parse_img,
)
from yolov7_deploy.errors import UsageError, missing_library
from yolov7_deploy.options import ValOptions

if TYPE_CHECKING:
    from yolov7_deploy.datasets import Dataset
    from yolov7_deploy.detector import Detector
    from yolov7_deploy.evaluation.accuracy import AccuracyReport

DEFAULTS = ValOptions()
RUNS = Path("runs/val")

Data = Annotated[Path, typer.Option("--data", help="Dataset YAML, or COCO annotations (instances JSON).")]
Images = Annotated[
    Path | None,
    typer.Option("--images", help="Image folder for COCO annotations (default: searched near the JSON file)."),
]
Split = Annotated[str, one_of(("val", "test", "train"), "--split", text="Split of the dataset.")]
Limit = Annotated[int | None, typer.Option("--limit", help="Evaluate only the first N images.")]
SingleClass = Annotated[
    bool, typer.Option("--single-cls", help="Merge all classes of the dataset, for a model of one class.")
]
Batch = Annotated[int, typer.Option("--batch", "--batch-size", help="Batch size.")]
Rect = Annotated[
    bool | None,
    typer.Option(
        "--rect/--no-rect",
        help="Rectangular batches as published, or square letterbox (default: rect if the model accepts it).",
    ),
]
Conf = Annotated[float, typer.Option("--conf", "--conf-thres", help="Confidence threshold, 0 to 1.")]
Iou = Annotated[float, typer.Option("--iou", "--iou-thres", help="IoU threshold of NMS, 0 to 1.")]
MaxDet = Annotated[int, typer.Option("--max-det", "--topk-all", help="Maximum number of detections per image.")]
Predictions = Annotated[
    str | None,
    typer.Option(
        "--predictions",
        "--save-json",
        metavar="FILE",
        callback=check_json_path,
        help="Write the detections as a COCO results JSON.",
    ),
]
PerClass = Annotated[bool, typer.Option("--per-class", help="Print the table of classes even if there are over 50.")]
Project = Annotated[Path, typer.Option("--project", help="Folder of all runs, for charts.")]
NoSave = Annotated[bool, typer.Option("--nosave", help="Do not write charts.")]


def val(
    *,
    data: Data,
    weights: Weights = "yolov7",
    images: Images = None,
    split: Split = "val",
    limit: Limit = None,
    single_class: SingleClass = False,
    img: Img = None,
    batch: Batch = DEFAULTS.batch,
    rect: Rect = DEFAULTS.rect,
    conf: Conf = DEFAULTS.conf,
    iou: Iou = DEFAULTS.iou,
    max_det: MaxDet = DEFAULTS.max_det,
    device: Device = "auto",
    runtime: RuntimeName = "auto",
    half: Half = None,
    predictions: Predictions = None,
    per_class: PerClass = False,
    json_path: JsonPath = None,
    project: Project = RUNS,
    name: Name = "exp",
    exist_ok: ExistOk = False,
    save_dir: SaveDir = None,
    nosave: NoSave = False,
) -> None:
    """Measure COCO average precision (AP) on a dataset.

    Example:  y7 val --weights yolov7.onnx --data coco.yaml
    """
    _require_two_files(predictions, json_path)
    options = ValOptions(rect=rect, batch=batch, conf=conf, iou=iou, max_det=max_det)
    input_size = parse_img(img)
    from yolov7_deploy._console import progress, write_json
    from yolov7_deploy._serialization import sha256_hex
    from yolov7_deploy.datasets import open_dataset
    from yolov7_deploy.datasets.samples import as_single_class
    from yolov7_deploy.detector import Detector
    from yolov7_deploy.evaluation.accuracy import evaluate

    dataset = open_dataset(data, images=images, split=split, limit=limit)
    if single_class:
        dataset = as_single_class(dataset)
    path = locate_weights(weights)
    with (
        Detector(path, device=device, img=input_size, half=half, runtime=runtime) as detector,
        progress("val") as show_progress,
    ):
        if single_class:
            _require_one_class(detector)
        report = evaluate(detector, dataset, options=options, progress=show_progress)
    report = replace(report, weights=str(path), weights_sha256=sha256_hex(path), runtime=detector.runtime)
    to_stderr = "-" in (json_path, predictions)
    echo(report.summary(per_class=per_class or None), err=to_stderr)
    for document, file in ((report.predictions, predictions), (report.to_dict(), json_path)):
        if file is not None:
            write_json(document, file)
    if not nosave:
        folder = contextlib.nullcontext(save_dir) if save_dir else new_run_folder(project / name, exist_ok=exist_ok)
        _draw_charts(report, dataset, folder, to_stderr=to_stderr)


def _require_two_files(predictions: str | None, json_path: str | None) -> None:
    if predictions is not None and predictions == json_path:
        raise UsageError(
            f"--predictions and --json both write {predictions}.", fix="Give each a path, such as predictions.json"
        )


def _require_one_class(detector: Detector) -> None:
    count = len(detector.metadata.class_names)
    if count > 1:
        raise UsageError(
            f"--single-cls is for a model of one class; {detector.path} has {count}.", fix="Leave --single-cls out."
        )


def _draw_charts(
    report: AccuracyReport, dataset: Dataset, new_folder: AbstractContextManager[Path], *, to_stderr: bool
) -> None:
    """Write the charts of the report; without matplotlib, say how to get them."""
    try:
        from yolov7_deploy.evaluation.plots import draw_evaluation
    except ModuleNotFoundError as error:
        note(f"no charts: {missing_library(error, 'for charts')}", err=True)
        return
    with new_folder as folder:
        draw_evaluation(report, dataset, folder)
    echo(f"confusion matrix, curves and examples in {folder}", err=to_stderr)
