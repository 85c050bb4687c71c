"""Options that several commands share, and how their texts are read."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib import import_module
from typing import Annotated, Any

import typer

from yolov7_deploy.errors import UsageError
from yolov7_deploy.options import Thresholds

DEFAULTS = Thresholds()

Weights = Annotated[
    str, typer.Option("--weights", "-w", help="A .pt, .safetensors, .onnx or .engine file, or an official name.")
]
OWN = "(default: the model file's own, else {})"
Conf = Annotated[
    float | None, typer.Option("--conf", "--conf-thres", help=f"Keep scores above this {OWN.format(DEFAULTS.conf)}.")
]
Iou = Annotated[
    float | None,
    typer.Option(
        "--iou",
        "--iou-thres",
        help=f"Suppress boxes that overlap a better one by more than this {OWN.format(DEFAULTS.iou)}.",
    ),
]
MaxDet = Annotated[
    int | None,
    typer.Option("--max-det", "--topk-all", help=f"At most this many boxes an image {OWN.format(DEFAULTS.max_det)}."),
]
Img = Annotated[
    str | None,
    typer.Option("--img", "--img-size", "--imgsz", help="Network input: 640, or height and width as 384x640."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda:0, or 0.")]
Half = Annotated[
    bool | None,
    typer.Option("--half/--no-half", help="Half precision for checkpoints (default: on a GPU, and only there)."),
]
JsonPath = Annotated[str | None, typer.Option("--json", help="Write the whole record; - is stdout.")]


def was_given(name: str) -> bool:
    """Return whether the user set a parameter of the running command, as an option or an environment variable.

    Args:
        name: The parameter's name in the command's function, such as `max_det`.

    Raises:
        LookupError: The command does not have this parameter.
    """
    # Newer versions of typer contain a copy of click; the base of its context class shows which one is used.
    click = import_module(typer.Context.__mro__[1].__module__.rpartition(".")[0] + ".globals")
    source = click.get_current_context().get_parameter_source(name)
    if source is None:
        raise LookupError(f"The command does not have a parameter {name}.")
    return source.name in ("COMMANDLINE", "ENVIRONMENT")


def check_thresholds(*, conf: float | None, iou: float | None, max_det: int | None) -> None:
    """Refuses what cannot be meant before a model is downloaded or loaded; `None` is the model's own.

    Raises:
        UsageError: A value outside its range.
    """
    given: dict[str, Any] = {"conf": conf, "iou": iou, "max_det": max_det}
    replace(Thresholds(), **{name: value for name, value in given.items() if value is not None})


def parse_img(text: str | None) -> int | tuple[int, int] | None:
    """`640`, or height and width as `384x640`, `384,640` or `384 640`.

    Raises:
        UsageError: Anything else.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*([1-9][0-9]*)(?:[xX, ]\s*([1-9][0-9]*))?\s*", text)
    if match is None:
        raise UsageError(f"--img {text} is not a size.", fix="For example: --img 640, or height x width: --img 384x640")
    return (int(match[1]), int(match[2])) if match[2] else int(match[1])
