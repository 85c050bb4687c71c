"""`y7 demo`: the whole way once, explained: checkpoint, verified ONNX files, accuracy, speed, detections."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from yolov7_deploy.errors import UsageError


def demo(
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            "-w",
            help="A checkpoint, or an official name, for FP32 only. Left out: the small network that comes along.",
        ),
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--source", "-s", help="With --weights: an image, instead of a drawn one.")
    ] = None,
    save_dir: Annotated[Path, typer.Option("--save-dir", help="Folder for everything it writes.")] = Path("demo"),
) -> None:
    """Show the whole way on this machine: export, verify, measure, detect."""
    if weights is None and source is not None:
        raise UsageError(
            "The network that comes along finds generated shapes only, nothing in an image of yours.",
            fix=f"y7 demo --weights yolov7 --source {source}",
        )
    from yolov7_deploy.workflows.demo import run_demo, run_shapes_demo

    if weights is None:
        run_shapes_demo(save_dir=save_dir, say=typer.echo)
        return
    from yolov7_deploy._console import progress
    from yolov7_deploy.hub import find_weights

    with progress("download") as show:
        path = find_weights(weights, progress=show)
    run_demo(weights=path, source=source, save_dir=save_dir, say=typer.echo)
