"""`y7 docker`: print the docker commands that build and run the image for this machine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from yolov7_deploy._output import echo, note
from yolov7_deploy.cli.options import JsonPath

if TYPE_CHECKING:
    from yolov7_deploy.doctor.containers import ContainerPlan


def docker(
    image: Annotated[
        str | None, typer.Option("--image", help="Name of another image (default: the one for this machine).")
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """Print the docker commands for this machine; nothing is run.

    With --quiet it prints two lines: the command that builds the image, and the one that runs it.

    Example:  y7 docker
    """
    from yolov7_deploy.doctor.containers import plan_container
    from yolov7_deploy.hardware.machine import read_machine

    plan = plan_container(read_machine(), image=image, is_root=os.geteuid() == 0 if hasattr(os, "geteuid") else False)
    _print(plan, to_stderr=json_path == "-")
    if json_path is not None:
        from yolov7_deploy._console import write_json

        write_json(plan, json_path)


def _print(plan: ContainerPlan, *, to_stderr: bool) -> None:
    note(f"image {plan.image}: {plan.reason}", err=to_stderr)
    for text in plan.notes:
        note(text, err=to_stderr)
    note("\nTo build it, in a clone of the repository:", err=to_stderr)
    echo(plan.build, err=to_stderr)
    note("\nTo run it, in the folder with your models and images; any command can replace doctor:", err=to_stderr)
    echo(plan.run, err=to_stderr)
