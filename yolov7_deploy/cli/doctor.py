"""`y7 doctor`: report what is installed, what can run on this machine, and how to install the rest."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from yolov7_deploy._output import echo, is_verbose
from yolov7_deploy._text import get_logger
from yolov7_deploy.cli.options import Device, JsonPath, complete_weights
from yolov7_deploy.errors import UsageError

if TYPE_CHECKING:
    from yolov7_deploy.doctor import Diagnosis
    from yolov7_deploy.doctor.packages import Library
    from yolov7_deploy.hardware.machine import Machine


def doctor(
    json_path: JsonPath = None,
    report: Annotated[
        bool, typer.Option("--report", help="Print Markdown for a bug report, without paths, user names and passwords.")
    ] = False,
    ready: Annotated[
        bool, typer.Option("--ready", help="Only open a model, for health checks: exit code 0 if that works, else 1.")
    ] = False,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            "-w",
            metavar="FILE",
            autocompletion=complete_weights,
            help="With --ready: the model (default: $Y7_READY_WEIGHTS, else the demo network).",
        ),
    ] = None,
    device: Device = "auto",
) -> None:
    """Report installed libraries, hardware, and what can run here.

    For what cannot run, it prints the command that installs the missing parts.

    Example:  y7 doctor
    """
    if ready and report:
        raise UsageError("--report and --ready are different outputs.", fix="y7 doctor --report")
    if ready:
        _check_ready(weights, device=device, json_path=json_path)
        return
    if weights is not None or device != "auto":
        raise UsageError("--weights and --device belong to --ready.", fix="y7 doctor --ready --weights FILE")
    from yolov7_deploy._console import write_json
    from yolov7_deploy.doctor import diagnose

    diagnosis = diagnose()
    echo(_bug_report(diagnosis) if report else describe(diagnosis), err=json_path == "-")
    if json_path is not None:
        write_json(diagnosis, json_path)


def _check_ready(weights: str | None, *, device: str, json_path: str | None) -> None:
    from yolov7_deploy.doctor.readiness import check_ready

    if not is_verbose():  # advice about this model, such as on its speed, would be repeated every half minute
        get_logger("yolov7_deploy").setLevel(logging.ERROR)
    found = check_ready(weights, device=device)
    opened = f"{found.runtime} opened {found.weights} on {found.device} in {found.seconds:.2f} s"
    echo(f"ready: {opened}", err=json_path == "-")
    if json_path is not None:
        from yolov7_deploy._console import write_json

        write_json(found, json_path)


def _bug_report(diagnosis: Diagnosis) -> str:
    from yolov7_deploy.doctor.bug_report import bug_report

    return bug_report(diagnosis)


def describe(diagnosis: Diagnosis) -> str:
    """Return the diagnosis as tables."""
    from yolov7_deploy._console import table

    libraries = [[entry.name, _version(entry), _details(entry)] for entry in diagnosis.libraries.values()]
    capabilities = [[entry.what, "yes" if entry.possible else "no", entry.reason] for entry in diagnosis.capabilities]
    folders = [[entry.label, entry.folder or "not set", ", ".join(entry.files) or None] for entry in diagnosis.weights]
    parts = [
        f"yolov7-deploy {diagnosis.version}, Python {diagnosis.python}",
        table(list(_machine(diagnosis.machine)), ["machine", ""]),
        table(libraries, ["library", "version", "details"]),
        table(capabilities, ["capability", "available", "with, or why not"]),
    ]
    fixes = dict.fromkeys(entry.fix for entry in diagnosis.capabilities if entry.fix)
    if fixes:
        parts.append("\n".join(["To install what is missing:", *(f"  {fix}" for fix in fixes)]))
    parts += [f"Known issue: {issue.what}\n  {issue.fix}" for issue in diagnosis.known_issues]
    parts.append(table(folders, ["weights are searched in", "folder", "official files found"]))
    return "\n\n".join(parts)


def _machine(machine: Machine) -> Iterator[list[object]]:
    yield ["system", f"{machine.system}, {machine.architecture}"]
    cores = f"{machine.cores} cores"
    yield ["CPU", f"{machine.cpu}, {cores}, {machine.usable_cores} usable"]
    yield ["memory", None if machine.memory_gb is None else f"{machine.memory_gb:.1f} GB"]
    board = machine.jetson
    if board is not None:
        capability = board.compute_capability or "unknown"
        release = f"JetPack {board.jetpack or 'unknown'} (L4T {board.l4t or 'unknown'})"
        yield ["Jetson", f"{board.model}, {release}, compute capability {capability}"]
    for gpu in machine.gpus:
        memory = "" if gpu.memory_gb is None else f", {gpu.memory_gb:.1f} GB"
        capability = gpu.compute_capability or "unknown"
        yield ["GPU", f"{gpu.name}{memory}, compute capability {capability}, driver {gpu.driver}"]
    if not machine.has_gpu:
        yield ["GPU", "no NVIDIA GPU is visible"]


def _version(library: Library) -> str | None:
    return library.version or ("unknown" if library.installed else None)


def _details(library: Library) -> str:
    if library.fault:
        return f"does not load: {library.fault}"
    others = [entry for entry in library.distributions if entry.partition(" ")[0] != library.name]
    return ", ".join([*others, *library.details])
