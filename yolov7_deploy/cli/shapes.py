"""`y7 shapes`: a generated dataset to try training and measuring on, without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def shapes(
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder for images, labels and YAML.")],
    train: Annotated[int, typer.Option("--train", help="Images for training.")] = 2000,
    val: Annotated[int, typer.Option("--val", help="Images for validation.")] = 200,
    img: Annotated[int, typer.Option("--img", "--img-size", "--imgsz", help="Their height and width.")] = 320,
    seed: Annotated[int, typer.Option("--seed", help="Another one gives other images.")] = 0,
) -> None:
    """Generate a dataset of textured shapes, to try training on."""
    from yolov7_deploy._console import progress
    from yolov7_deploy.datasets.synthetic import CLASS_NAMES, write_shapes

    with progress("shapes") as show:
        path = write_shapes(output, train=train, val=val, size=img, seed=seed, progress=show)
    typer.echo(f"{path}: {train} images for training, {val} for validation; {', '.join(CLASS_NAMES)}")
    typer.echo(f"To train on them:  y7 train --data {path} --img {img}")
