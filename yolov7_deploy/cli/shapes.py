"""`y7 shapes`: generate a small dataset to try training and evaluation on, without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from yolov7_deploy._output import echo, note


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
