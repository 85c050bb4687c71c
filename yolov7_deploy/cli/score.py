"""`y7 score`: detections of all images of a folder, list or Parquet file, in this process or on a Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from yolov7_deploy._output import echo, note
from yolov7_deploy.cli.detect import AgnosticNms, Classes, MultiLabel
from yolov7_deploy.cli.options import (
    Conf,
    Device,
    Half,
    Img,
    Iou,
    JsonPath,
    MaxDet,
    RuntimeName,
    Weights,
    check_thresholds,
    locate_weights,
    one_of,
    parse_classes,
    parse_img,
)

if TYPE_CHECKING:
    from yolov7_deploy.scoring.score import ScoreOptions, ScoreReport

MAX_LISTED = 10  # unreadable images in the terminal; all are in summary.json

Input = Annotated[
    str,
    typer.Option(
        "--input",
        "-i",
        metavar="INPUT",
        help="Folder of images (with its subfolders), a .txt list of paths, or a .parquet file with images or paths.",
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Output folder; one with results of this run is resumed.")]
Workers = Annotated[
    int, typer.Option("--workers", help="Ray worker processes, each with its own model; 0: this process, without Ray.")
]
Batch = Annotated[int, typer.Option("--batch", "--batch-size", help="Batch size.")]
Cpus = Annotated[
    float | None, typer.Option("--cpus", help="CPU cores of each worker (default: all cores, divided by --workers).")
]
Gpus = Annotated[
    float | None, typer.Option("--gpus", help="GPUs of each worker, also 0.5 (default: 1 with --device cuda).")
]
Address = Annotated[
    str | None,
    typer.Option("--address", help="Running Ray cluster, such as 10.0.0.1:6379 (default: start Ray on this machine)."),
]
Column = Annotated[
    str | None, typer.Option("--column", help="Column of a Parquet file (default: image, bytes or path).")
]
Format = Annotated[str, one_of(("jsonl", "parquet"), "--format", text="Format of the output files.")]
ShardSize = Annotated[int, typer.Option("--shard-size", help="Number of images in each output file.")]
Coco = Annotated[
    Path | None,
    typer.Option("--coco", metavar="FILE", help="Also write coco_results.json, with the ids of this annotation file."),
]


def score(
    *,
    source: Input,
    output: Output,
    weights: Weights = "yolov7",
    workers: Workers = 0,
    batch: Batch = 8,
    conf: Conf = None,
    iou: Iou = None,
    max_det: MaxDet = None,
    classes: Classes = None,
    multi_label: MultiLabel = None,
    agnostic_nms: AgnosticNms = None,
    img: Img = None,
    device: Device = "auto",
    runtime: RuntimeName = "auto",
    half: Half = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    address: Address = None,
    column: Column = None,
    output_format: Format = "jsonl",
    shard_size: ShardSize = 1000,
    coco: Coco = None,
    json_path: JsonPath = None,
) -> None:
    """Detect objects in many images, on one machine or on a Ray cluster; an interrupted run resumes.

    Example:  y7 score --weights yolov7.onnx --input images/ --output results --workers 4
    """
    check_thresholds(conf=conf, iou=iou, max_det=max_det)
    detector: dict[str, Any] = {
        "device": device,
        "runtime": runtime,
        "img": parse_img(img),
        "half": half,
        "conf": conf,
        "iou": iou,
        "max_det": max_det,
        "classes": parse_classes(classes),
        "multi_label": multi_label,
        "class_agnostic": agnostic_nms,
    }
    from yolov7_deploy.scoring.score import ScoreOptions

    options = ScoreOptions(
        workers=workers,
        batch=batch,
        cpus=cpus,
        gpus=gpus,
        address=address,
        format=output_format,
        shard_size=shard_size,
        coco=coco,
    )
    _run(source, output, column=column, weights=weights, detector=detector, options=options, json_path=json_path)


def _run(
    source: str,
    output: Path,
    *,
    column: str | None,
    weights: str,
    detector: dict[str, Any],
    options: ScoreOptions,
    json_path: str | None,
) -> None:
    from yolov7_deploy._console import plural, progress, write_json
    from yolov7_deploy.scoring.input import open_input
    from yolov7_deploy.scoring.score import score as score_images
    from yolov7_deploy.sources.files import summarize_left_out

    images, to_stderr = open_input(source, column=column), json_path == "-"
    note(f"{plural(len(images), 'image')} in {source}", err=to_stderr)
    if images.left_out:
        echo(f"Left out: {summarize_left_out(images.left_out)}", err=True)
    with progress("score") as show:
        report = score_images(
            images, output, weights=locate_weights(weights), detector=detector, options=options, progress=show
        )
    _print(report, output, to_stderr=to_stderr)
    if json_path is not None:
        write_json(report.to_dict(), json_path)


def _print(report: ScoreReport, output: Path, *, to_stderr: bool) -> None:
    from yolov7_deploy._console import duration, plural

    for item in report.unreadable[:MAX_LISTED]:
        echo(f"Unreadable: {item.path}: {item.reason}", err=True)
    if len(report.unreadable) > MAX_LISTED:
        echo(f"... and {len(report.unreadable) - MAX_LISTED:,} more, see {output / 'summary.json'}", err=True)
    for text in report.notes:
        echo(f"coco_results.json: {text}", err=True)
    resumed = f" ({plural(report.resumed, 'file')} existed)" if report.resumed else ""
    echo(
        f"{plural(report.images, 'image')}: {plural(report.detections, 'detection')}, "
        f"{len(report.unreadable):,} unreadable; {plural(report.shards, 'file')}{resumed} in {output}",
        err=to_stderr,
    )
    if report.processed:
        note(
            f"{plural(report.processed, 'image')} in {duration(report.seconds)}, "
            f"{report.images_per_second:.1f} images/s, {plural(len(report.workers), 'process')}",
            err=to_stderr,
        )
