"""The diagnosis as a Markdown block for bug reports, without paths, user names and credentials.

What remains of a path is its last part: `…/liby7_plugin.so`. Of environment variables only the names are shown.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from yolov7_deploy._text import hide_credentials, printable_line
from yolov7_deploy.doctor.doctor import Diagnosis
from yolov7_deploy.doctor.packages import Library
from yolov7_deploy.hardware.machine import Machine
from yolov7_deploy.hub import cache_dir

CUT = "…"
BACKSLASH = "\\"
PREFIXES = ("Y7_", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "ORT_")  # of variables that matter
MIN_USER_NAME = 3  # characters; a shorter user name is probably part of other words
SHARED_NAMES = {"root", "user", "admin", "ubuntu", "nvidia"}
# An absolute path, or the rest of one whose beginning was cut; not the path of an address or the slash in GNU/Linux.
_PATH = re.compile(rf"(?<![\w:/.-])(?:{CUT}|~|[A-Za-z]:)?(?:[/\\]+[^\s/\\:,;'\"()]+)+[/\\]*")


def bug_report(diagnosis: Diagnosis) -> str:
    """Return the diagnosis as Markdown that GitHub folds: versions, machine, libraries, capabilities, known issues."""
    missing = [entry.name for entry in diagnosis.libraries.values() if not entry.installed and not entry.fault]
    present = [entry for entry in diagnosis.libraries.values() if entry.name not in missing]
    possible = [[entry.what, "yes" if entry.possible else "no", entry.reason] for entry in diagnosis.capabilities]
    weights = [f"{entry.label}: {', '.join(entry.files)}" for entry in diagnosis.weights if entry.files]
    parts = [
        "<details><summary>y7 doctor --report</summary>",
        _table(["yolov7-deploy", diagnosis.version], _machine(diagnosis)),
        _table(["library", "version", "details"], [_library(entry) for entry in present]),
        _table(["capability", "available", "with, or why not"], possible),
        *(f"**Known issue:** {_cell(issue.what)}" for issue in diagnosis.known_issues),
        f"Not installed: {', '.join(missing) or 'nothing'}.",
        f"Official weights: {_cell('; '.join(weights)) or 'none'}.",
        f"Variables that are set: {', '.join(_variables()) or 'none'}.",
        "</details>",
    ]
    return "\n\n".join(parts)


def hide_private(text: str) -> str:
    """Return a text without the folders of absolute paths, the name of the user, and credentials."""
    text = hide_credentials(text)
    for folder in sorted(set(_private_folders()), key=len, reverse=True):
        text = re.sub(rf"{re.escape(folder)}(?![\w-])", CUT, text)
    text = _PATH.sub(_last_part, text)
    name = _user_name()
    return re.sub(rf"\b{re.escape(name)}\b", "USER", text) if name else text


def _private_folders() -> Iterator[str]:
    """Yield folders whose names may have spaces, so that the pattern of a path would not find them whole."""
    paths = [Path.cwd(), Path(sys.prefix), Path(sys.base_prefix), cache_dir(), Path(tempfile.gettempdir())]
    with contextlib.suppress(RuntimeError):  # no home folder
        paths.append(Path.home())
    values = [value for name, value in os.environ.items() if name.startswith("Y7_") and os.path.isabs(value)]  # noqa: PTH117
    paths += [Path(value) if Path(value).is_dir() else Path(value).parent for value in values]
    for path in paths:
        for folder in (path, path.parent):
            if len(folder.parts) > 1:
                yield str(folder)


def _last_part(path: re.Match[str]) -> str:
    return f"{CUT}/{path[0].replace(BACKSLASH, '/').rstrip('/').rpartition('/')[2]}"


def _user_name() -> str:
    with contextlib.suppress(OSError, KeyError, ImportError):
        name = getpass.getuser()
        if len(name) >= MIN_USER_NAME and name not in SHARED_NAMES:
            return name
    return ""


def _variables() -> list[str]:
    return sorted(name for name in os.environ if name.startswith(PREFIXES))


def _machine(diagnosis: Diagnosis) -> Iterator[list[str]]:
    machine = diagnosis.machine
    yield ["Python", diagnosis.python]
    yield ["system", f"{machine.system}, {machine.architecture}"]
    memory = "" if machine.memory_gb is None else f", {machine.memory_gb:.1f} GB"
    yield ["CPU", f"{machine.cpu}, {machine.usable_cores} of {machine.cores} cores{memory}"]
    yield from (["GPU", text] for text in _gpus(machine) or ["no NVIDIA GPU is visible"])


def _gpus(machine: Machine) -> list[str]:
    found = [
        f"{gpu.name}, compute capability {gpu.compute_capability or 'unknown'}, driver {gpu.driver}"
        for gpu in machine.gpus
    ]
    if machine.jetson is not None:
        found.append(f"{machine.jetson.model}, JetPack {machine.jetson.jetpack}, L4T {machine.jetson.l4t}")
    return found


def _library(library: Library) -> list[str]:
    fault = [f"does not load: {library.fault}"] if library.fault else []
    return [library.name, library.version or "unknown", ", ".join([*library.distributions, *library.details, *fault])]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """Return a text for a cell of a Markdown table."""
    return printable_line(hide_private(text)).replace("|", "\\|").replace("<", "&lt;")
