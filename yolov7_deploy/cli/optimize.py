"""`y7 optimize`: find the fastest detector of this machine that keeps the AP."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from yolov7_deploy._output import echo, note
from yolov7_deploy.cli.bench import parse_numbers
from yolov7_deploy.cli.options import CheckpointWeights, Device, JsonPath, locate_weights
from yolov7_deploy.cli.quantize import CALIB_LIMIT, Calib, CalibLimit
from yolov7_deploy.errors import UsageError
from yolov7_deploy.options import OptimizeOptions

DEFAULTS = OptimizeOptions()
RUNS = Path("runs/optimize")
LIMIT = 200
RECORD = "optimize.json"

Data = Annotated[
    Path, typer.Option("--data", help="Labelled images for AP and time: dataset YAML, or COCO annotations JSON.")
]
Limit = Annotated[int, typer.Option("--limit", help="Measure AP on the first LIMIT images.")]
MaxDrop = Annotated[
    float, typer.Option("--max-drop", help="Largest allowed loss in AP points (of 100) against the checkpoint.")
]
Batch = Annotated[
    str, typer.Option("--batch", "--batch-size", help="Images per call: 1, or several values to try as 1,8.")
]
Concurrency = Annotated[int, typer.Option("--concurrency", help="Threads that call at the same time.")]
Duration = Annotated[float, typer.Option("--duration", help="Maximum seconds of the final measurement.")]
Candidates = Annotated[
    list[Path] | None,
    typer.Option("--candidate", metavar="FILE", help="Another exported file to try; repeat for several."),
]
SaveDir = Annotated[
    Path | None, typer.Option("--save-dir", help="Folder for the results (default: a new folder runs/optimize/expN).")
]


def optimize(
    *,
    weights: CheckpointWeights = "yolov7",
    data: Data,
    calib: Calib = None,
    max_drop: MaxDrop = DEFAULTS.max_drop,
    limit: Limit = LIMIT,
    calib_limit: CalibLimit = CALIB_LIMIT,
    batch: Batch = "1",
    concurrency: Concurrency = DEFAULTS.callers,
    duration: Duration = DEFAULTS.duration_s,
    candidate: Candidates = None,
    device: Device = "auto",
    save_dir: SaveDir = None,
    json_path: JsonPath = None,
) -> None:
    """Find the fastest detector of this machine that keeps the AP.

    Exports the checkpoint in every precision, runs each file in every installed runtime, rejects what loses more AP
    than allowed, and times the others against each other.

    Example:  y7 optimize --weights best.pt --calib images/train --data data.yaml
    """
    options = OptimizeOptions(
        max_drop=max_drop, batches=parse_numbers(batch, "batch"), callers=concurrency, duration_s=duration
    )
    from yolov7_deploy._console import progress, write_json
    from yolov7_deploy._output_folder import new_run_folder
    from yolov7_deploy.datasets import open_dataset
    from yolov7_deploy.hub import find_weights
    from yolov7_deploy.precision.calibration_images import open_calibration
    from yolov7_deploy.workflows.optimize import Optimizer, describe

    path = _checkpoint(weights)
    dataset = open_dataset(data, limit=limit)
    images = open_calibration(calib, limit=calib_limit) if calib is not None else None
    others = [find_weights(str(one)) for one in candidate or ()]
    to_stderr = json_path == "-"
    with nullcontext(save_dir) if save_dir else new_run_folder(RUNS / "exp") as folder:
        report = Optimizer(
            path,
            dataset,
            images,
            options,
            folder=folder,
            others=others,
            device=device,
            log=lambda text: note(text, err=to_stderr),
            show=progress,
        ).run()
        echo(describe(report), err=to_stderr)
        if report.candidates:
            write_json(report.to_dict(), folder / RECORD)
            note(f"record: {folder / RECORD}", err=to_stderr)
    if json_path is not None:
        write_json(report.to_dict(), json_path)
    if report.interrupted is not None:
        raise report.interrupted


def _checkpoint(weights: str) -> Path:
    from yolov7_deploy.hub import CHECKPOINT_SUFFIXES

    path = locate_weights(weights)
    if path.suffix.lower() not in CHECKPOINT_SUFFIXES:
        raise UsageError(
            f"{weights} is not a checkpoint; y7 optimize exports one in every precision.",
            fix=f"y7 optimize --weights WEIGHTS.pt --candidate {weights}",
        )
    return path
