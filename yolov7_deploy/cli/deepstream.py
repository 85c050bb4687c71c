"""`y7 deepstream`: write an application for NVIDIA DeepStream."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from yolov7_deploy._output import echo, note
from yolov7_deploy.cli.options import JsonPath, Weights, locate_weights
from yolov7_deploy.options import DeepStreamOptions

DEFAULTS = DeepStreamOptions()


def deepstream(
    *,
    weights: Weights,
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder of the application.")],
    streams: Annotated[
        int, typer.Option("--streams", help="Maximum number of streams, which is the batch size.")
    ] = DEFAULTS.streams,
    conf: Annotated[
        float | None,
        typer.Option(
            "--conf", help="Show detections with a score of at least this (default: the threshold of the file)."
        ),
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """Write an application for DeepStream 7.1 to 9.x: configuration, parser, tracker and pipeline.

    Example:  y7 deepstream --weights yolov7.onnx --output deepstream
    """
    options = DeepStreamOptions(streams=streams, conf=conf)
    from yolov7_deploy.deployment.deepstream import write_deepstream

    application = write_deepstream(locate_weights(weights), output, options)
    to_stderr = json_path == "-"
    count = f"up to {streams} streams" if streams > 1 else "one stream"
    echo(f"{application.path}: DeepStream 7.1 to 9.x, {count}", err=to_stderr)
    for text in application.notes:
        echo(f"Note: {text}", err=to_stderr)
    note("On the machine with DeepStream:", err=to_stderr)
    for command in application.commands:
        note(f"  {command}", err=to_stderr)
    if json_path is not None:
        from yolov7_deploy._console import write_json

        write_json({**asdict(application), "path": str(application.path)}, json_path)
