"""The command `y7`: registers all commands, and reports errors of this package as a message and exit code 1."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from yolov7_deploy.cli.bench import bench
from yolov7_deploy.cli.build import build
from yolov7_deploy.cli.demo import demo
from yolov7_deploy.cli.detect import detect
from yolov7_deploy.cli.doctor import doctor
from yolov7_deploy.cli.export import export
from yolov7_deploy.cli.info import info
from yolov7_deploy.cli.plugin import plugin
from yolov7_deploy.cli.quantize import quantize
from yolov7_deploy.cli.shapes import shapes
from yolov7_deploy.cli.train import train
from yolov7_deploy.cli.val import val
from yolov7_deploy.cli.verify import verify
from yolov7_deploy.errors import Y7Error, missing_library

INTERRUPTED = 130  # exit code after Ctrl-C, as in shells: 128 + SIGINT

app = typer.Typer(
    name="y7",
    help="From an official YOLOv7 checkpoint to the fastest verified detector on your machine.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

COMMANDS: tuple[tuple[Callable[..., None], tuple[str, ...]], ...] = (
    (demo, ()),
    (train, ()),
    (export, ()),
    (quantize, ()),
    (build, ()),
    (detect, ("predict",)),
    (val, ("test",)),
    (bench, ("benchmark",)),
    (verify, ()),
    (info, ()),
    (doctor, ()),
    (plugin, ()),
    (shapes, ()),
)

for _command, _aliases in COMMANDS:
    app.command()(_command)
    for _alias in _aliases:
        app.command(_alias, hidden=True)(_command)


def main() -> None:
    """Run the command line; print errors of this package without a traceback."""
    try:
        try:
            app(prog_name="y7")
        except ModuleNotFoundError as error:
            raise missing_library(error, f"for y7 {' '.join(sys.argv[1:2])}") from error
    except Y7Error as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201 - the command line prints
        sys.exit(1)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)  # noqa: T201
        sys.exit(INTERRUPTED)
