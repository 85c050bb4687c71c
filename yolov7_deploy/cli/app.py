"""The command `y7`: registers all commands, and reports errors of this package as a message and exit code 1."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Annotated

import typer

from yolov7_deploy._output import (
    echo,
    finish_output,
    is_output_failure,
    is_verbose,
    prepare_streams,
    print_error,
    set_verbosity,
)
from yolov7_deploy._process import Interrupted, raise_interrupted
from yolov7_deploy._version import __version__
from yolov7_deploy.cli.bench import bench
from yolov7_deploy.cli.build import build
from yolov7_deploy.cli.command import Quiet, Verbose, Y7Command, Y7Group, with_verbosity
from yolov7_deploy.cli.deepstream import deepstream
from yolov7_deploy.cli.demo import demo, shapes
from yolov7_deploy.cli.detect import detect
from yolov7_deploy.cli.docker import docker
from yolov7_deploy.cli.doctor import doctor
from yolov7_deploy.cli.export import export
from yolov7_deploy.cli.info import info
from yolov7_deploy.cli.optimize import optimize
from yolov7_deploy.cli.plugin import plugin
from yolov7_deploy.cli.quantize import quantize
from yolov7_deploy.cli.report import report
from yolov7_deploy.cli.score import score
from yolov7_deploy.cli.train import train
from yolov7_deploy.cli.triton import triton
from yolov7_deploy.cli.val import val
from yolov7_deploy.cli.verify import verify
from yolov7_deploy.errors import Y7Error, missing_library

app = typer.Typer(
    name="y7",
    cls=Y7Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="y7 help COMMAND shows the options of a command.  First steps:  y7 demo",
)

COMMANDS: tuple[tuple[Callable[..., None], tuple[str, ...]], ...] = (
    (demo, ()),
    (train, ("train-aux",)),
    (export, ()),
    (quantize, ()),
    (optimize, ()),
    (build, ()),
    (detect, ("predict",)),
    (score, ()),
    (val, ("test",)),
    (bench, ("benchmark",)),
    (verify, ()),
    (report, ()),
    (info, ()),
    (doctor, ()),
    (docker, ()),
    (plugin, ()),
    (triton, ()),
    (deepstream, ()),
    (shapes, ()),
)

for _command, _aliases in COMMANDS:
    _function = with_verbosity(_command)
    app.command(cls=Y7Command)(_function)
    for _alias in _aliases:
        app.command(_alias, cls=Y7Command, hidden=True)(_function)


def _print_version(value: bool) -> None:
    if value:
        echo(f"yolov7-deploy {__version__}")
        raise typer.Exit


@app.callback()
def _group(
    *,
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """From a YOLOv7 checkpoint to the fastest verified detector on your machine."""
    set_verbosity(quiet=quiet, verbose=verbose)


@app.command("help", hidden=True)
def show_help(context: typer.Context, command: Annotated[str | None, typer.Argument(metavar="COMMAND")] = None) -> None:
    """Show the commands, or the options of one."""
    app(prog_name="y7", args=[*([command] if command else []), "--help"])


def main() -> None:
    """Run the command line and exit; errors of this package are printed without a traceback.

    The exit code is 0 for success, 1 for an error, 2 for wrong options, and 128 plus the number of the signal that
    ended the program, as in shells: 130 for Ctrl-C, 143 for SIGTERM.
    """
    prepare_streams()
    # Messages that OpenCV and FFmpeg print have file names and addresses; errors are reported by this package.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    sys.exit(finish_output(_run()))


def _run() -> int:
    try:
        with raise_interrupted():
            try:
                app(prog_name="y7")
            except ModuleNotFoundError as error:
                command = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "")
                raise missing_library(error, f"for y7 {command}".rstrip()) from error
    except Y7Error as error:
        if is_verbose():
            echo(traceback.format_exc().rstrip(), err=True)
        print_error(type(error).__name__, error)
        return 1
    except OSError as error:
        if not is_output_failure(error):
            raise
        echo(f"Standard output cannot be written: {error.strerror}.", err=True)
        return 1
    except (KeyboardInterrupt, SystemExit) as error:
        return _exit_code(error)
    return 0


def _exit_code(error: BaseException) -> int:
    """Return the exit code of a program that ends by an exception; typer turns every interruption into `Exit(130)`."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, Interrupted):
            return cause.exit_code
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return Interrupted(signal.SIGINT).exit_code
