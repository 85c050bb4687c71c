"""`y7 triton`: write a model repository for the Triton Inference Server."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from yolov7_deploy._output import echo, note
from yolov7_deploy.cli.options import JsonPath, Weights, locate_weights, one_of
from yolov7_deploy.deployment.triton_config import TRITON_BACKENDS, TRITON_DEVICES, TRITON_MAX_BATCH, TritonOptions
from yolov7_deploy.errors import UsageError

if TYPE_CHECKING:
    from yolov7_deploy.deployment.triton import TritonRepository

DEFAULTS = TritonOptions()


def triton(
    *,
    weights: Weights,
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder of the model repository.")],
    backend: Annotated[
        str,
        one_of(
            TRITON_BACKENDS,
            "--backend",
            text="What runs the network; python takes encoded images and returns boxes in their pixels (default: by "
            "the kind of file).",
        ),
    ] = DEFAULTS.backend,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the model (default: the name of the file).")
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(
            "--max-batch", help=f"Maximum batch size (default: that of the file, at most {TRITON_MAX_BATCH})."
        ),
    ] = None,
    preferred_batch: Annotated[
        str | None,
        typer.Option(
            "--preferred-batch", metavar="SIZES", help="Batch sizes to wait for: 4,8 (default: half and full)."
        ),
    ] = None,
    queue_delay: Annotated[
        float, typer.Option("--queue-delay", help="Milliseconds that a request may wait for a batch.")
    ] = DEFAULTS.queue_delay_ms,
    instances: Annotated[
        int, typer.Option("--instances", help="Instances of the model that run at the same time, on each GPU.")
    ] = DEFAULTS.instances,
    device: Annotated[
        str, one_of(TRITON_DEVICES, "--device", text="auto: a GPU if the server has one.")
    ] = DEFAULTS.device,
    container: Annotated[
        str, typer.Option("--container", metavar="IMAGE", help="Docker image of the server.")
    ] = DEFAULTS.container,
    json_path: JsonPath = None,
) -> None:
    """Write a model repository for the Triton Inference Server, and a client for it.

    Example:  y7 triton --weights yolov7.onnx --output models
    """
    options = TritonOptions(
        backend=backend,
        name=name or "",
        max_batch=max_batch,
        preferred=_sizes(preferred_batch),
        queue_delay_ms=queue_delay,
        instances=instances,
        device=device,
        container=container,
    )
    from yolov7_deploy.deployment.triton import write_triton_repository

    repository = write_triton_repository(locate_weights(weights), output, options)
    _report(repository, to_stderr=json_path == "-")
    if json_path is not None:
        from yolov7_deploy._console import write_json

        write_json({**asdict(repository), "path": str(repository.path)}, json_path)


def _sizes(text: str | None) -> tuple[int, ...]:
    """Return the numbers in a list such as `4,8`.

    Raises:
        UsageError: The text is something else.
    """
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise UsageError(
            f"--preferred-batch {text} is not a list of numbers.", fix="For example: --preferred-batch 4,8"
        ) from None


def _report(repository: TritonRepository, *, to_stderr: bool) -> None:
    batch = f"batches up to {repository.max_batch}" if repository.max_batch > 1 else "single images"
    echo(f"{repository.path}: model {repository.name}, backend {repository.backend}, {batch}", err=to_stderr)
    for text in repository.notes:
        echo(f"Note: {text}", err=to_stderr)
    note(f"Start the server:  {repository.command}", err=to_stderr)
    note(f"Then:  python {repository.path / 'client.py'} IMAGE", err=to_stderr)
