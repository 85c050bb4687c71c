"""`y7 demo`: run the whole pipeline once, from a checkpoint to verified ONNX files, AP, speed and detections."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from yolov7_deploy._output import echo
from yolov7_deploy.cli.options import locate_weights
from yolov7_deploy.errors import UsageError


def demo(
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            "-w",
            help="A checkpoint or an official name, shown in FP32 only (default: the small demo network).",
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
