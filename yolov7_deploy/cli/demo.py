"""Commands that need no file of the user: `y7 demo` runs the whole pipeline, `y7 shapes` generates a small dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from yolov7_deploy._output import echo, note
from yolov7_deploy.cli.options import locate_weights
from yolov7_deploy.errors import UsageError


def demo(
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            "-w",
            help="Checkpoint or official name, in FP32 only (default: the included network, in all precisions).",
        ),
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--source", "-s", help="With --weights: an image (default: a synthetic one).")
    ] = None,
    save_dir: Annotated[Path, typer.Option("--save-dir", help="Output folder.")] = Path("demo"),
) -> None:
    """Run the whole pipeline once, from checkpoint to detections.

    Exports a network, verifies the files stage by stage, and measures their AP and speed.

    Example:  y7 demo
    """
    if weights is None and source is not None:
        raise UsageError(
            "The demo network detects generated shapes only, nothing in other images.",
            fix=f"y7 demo --weights yolov7 --source {source}",
        )
    from yolov7_deploy.workflows.demo import run_demo, run_shapes_demo

    if weights is None:
        run_shapes_demo(save_dir=save_dir, log=echo)
        return
    run_demo(weights=locate_weights(weights), source=source, save_dir=save_dir, log=echo)


def shapes(
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for images, labels and the dataset YAML.")],
    train: Annotated[int, typer.Option("--train", help="Number of training images.")] = 2000,
    val: Annotated[int, typer.Option("--val", help="Number of validation images.")] = 200,
    img: Annotated[int, typer.Option("--img", "--img-size", "--imgsz", help="Height and width of the images.")] = 320,
    seed: Annotated[int, typer.Option("--seed", help="Random seed of the images.")] = 0,
) -> None:
    """Generate a dataset of textured shapes to train on.

    Example:  y7 shapes --output shapes
    """
    from yolov7_deploy._console import progress
    from yolov7_deploy.datasets.synthetic import CLASS_NAMES, write_shapes

    with progress("shapes") as show_progress:
        path = write_shapes(output, train=train, val=val, size=img, seed=seed, progress=show_progress)
    echo(f"{path}: {train} training images, {val} validation images; classes: {', '.join(CLASS_NAMES)}")
    note(f"Train on it:  y7 train --data {path} --img {img}")
