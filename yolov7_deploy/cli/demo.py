"""`y7 demo`: the whole way once, explained: checkpoint, verified ONNX file, detections in a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            "-w",
            help="A checkpoint, or an official name. Left out: yolov7 where this machine has it, else random numbers.",
        ),
    ] = None,
    source: Annotated[Path | None, typer.Option("--source", "-s", help="A picture, instead of a drawn one.")] = None,
    save_dir: Annotated[Path, typer.Option("--save-dir", help="Folder for everything it writes.")] = Path("demo"),
) -> None:
    """Show the whole way on this machine: export, verify, detect."""
    from yolov7_deploy.demo import run_demo
    from yolov7_deploy.measure.report import progress
    from yolov7_deploy.weights import find_local_weights, find_weights

    if weights is None:
        path = find_local_weights("yolov7")
    else:
        with progress("download") as show:
            path = find_weights(weights, progress=show)
    run_demo(weights=path, source=source, save_dir=save_dir, say=typer.echo)
