"""Run TensorRT in a separate process, in which it may abort, run out of memory or be killed.

The process finds `libtensorrt_rtx.so` in a private folder: the parser of TensorRT-RTX opens that name, the wheel only
contains `libtensorrt_rtx.so.1`, and the loader reads its search path when a process starts.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from yolov7_deploy._process import deferred_signals, python_command, temporary_folder
from yolov7_deploy._serialization import from_dict
from yolov7_deploy._text import get_logger
from yolov7_deploy.errors import EngineError, is_out_of_memory
from yolov7_deploy.hardware.gpu import free_gpu_memory
from yolov7_deploy.hardware.system import free_host_memory
from yolov7_deploy.tensorrt.build_messages import (
    LOG_FILE,
    MODEL_FILE,
    PLAN_FILE,
    REPORT_FILE,
    REQUEST_FILE,
    BuildReport,
    BuildRequest,
    Installation,
)
from yolov7_deploy.tensorrt.build_record import Product
from yolov7_deploy.tensorrt.preflight import format_gib

logger = get_logger(__name__)

RTX_LIBRARY = "libtensorrt_rtx.so"
RTX_WHEEL = "tensorrt_rtx_libs"
LAST_LINES = 6  # of TensorRT's log and of what the process prints, each, in an error message

OnEvent = Callable[[str, Any], None]

_START = "from yolov7_deploy.tensorrt.build_main import main; main(sys.argv[1:])"
_REQUESTED_BYTES = re.compile(r"(?:requested|allocat\w+|size)\D{0,40}?(\d{6,})\s*bytes|\b(\d{6,}) bytes", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessResult:
    """The result of a process: return code (negative for a signal), last lines of its logs, peak main memory."""

    returncode: int
    log_lines: tuple[str, ...]
    peak_memory_bytes: int


def is_installed(module: str) -> bool:
    """Return whether Python finds a module; does not import it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError, AttributeError):  # a blocked, partially loaded or broken module
        return False


def probe(product: Product) -> Installation:
    """Return the installed TensorRT, with `error` set if it cannot be imported or cannot build on this machine."""
    found: list[Installation] = []

    def on_event(kind: str, value: Any) -> None:  # noqa: ANN401 - JSON
        if kind == "installation":
            found.append(from_dict(Installation, value))

    with temporary_folder("y7-engine") as folder:
        result = run_process(["probe", product], folder, on_event)
    if found and result.returncode == 0:
        return found[0]
    error = result.log_lines[-1] if result.log_lines else f"importing it ended Python with {result.returncode}"
    return Installation(product=product, version="", error=error)


def run_build(request: BuildRequest, graph: bytes, on_event: OnEvent) -> tuple[bytes, BuildReport, tuple[str, ...]]:
    """Return the plan, the report and the last lines of the log; the plan is empty if the report has a failure.

    Args:
        request: Options of the build.
        graph: A serialized ONNX model.
        on_event: Called with the events `log`, `parsed` and `progress`.

    Raises:
        EngineError: The process ended before its report: it crashed, was killed or ran out of memory.
    """
    with temporary_folder("y7-engine") as folder:
        (folder / MODEL_FILE).write_bytes(graph)
        (folder / REQUEST_FILE).write_text(json.dumps(asdict(request)), encoding="utf-8")
        result = run_process(["build", str(folder)], folder, on_event)
        if result.returncode != 0 or not (folder / REPORT_FILE).exists():
            raise _crash_error(result)
        report = from_dict(BuildReport, json.loads((folder / REPORT_FILE).read_text(encoding="utf-8")))
        plan = b"" if report.failure else (folder / PLAN_FILE).read_bytes()
        return plan, report, result.log_lines


def run_process(arguments: list[str], folder: Path, on_event: OnEvent) -> ProcessResult:
    """Run the build process and wait for it. An exception (Ctrl-C, an error in `on_event`) also ends the process."""
    lines: deque[str] = deque(maxlen=LAST_LINES)
    peak = 0
    process = None
    try:
        with deferred_signals():
            process = _start(arguments, folder)
        assert process.stdout is not None, "stdout is a pipe"
        for text in process.stdout:
            peak = max(peak, peak_memory_bytes(process.pid))
            try:
                kind, value = next(iter(json.loads(text).items()))
            except ValueError:
                break  # an incomplete line is the last one of a killed process
            if kind == "log" and not value.startswith(("INFO", "VERBOSE")):
                lines.append(value.strip())
            on_event(kind, value)
        process.wait()
    finally:
        if process is not None:
            process.kill()  # no effect if it has ended
            process.wait()
            if process.stdout:
                process.stdout.close()
    printed = (folder / LOG_FILE).read_text(encoding="utf-8", errors="replace").strip()
    if printed:
        logger.debug("The build process printed:\n%s", printed)
    log_lines = (*lines, *_last_lines(printed))
    return ProcessResult(returncode=process.returncode, log_lines=log_lines, peak_memory_bytes=peak)


def _start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    with (folder / LOG_FILE).open("wb") as log:
        return subprocess.Popen(
            python_command(_START, *arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=_environment(folder),
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is sent to the calling process only, which then ends this one
        )


def peak_memory_bytes(pid: int | str = "self") -> int:
    """Return the peak main memory of a running process; 0 where the system does not report it.

    `resource.getrusage` is not suitable: its peak starts with the memory of the parent process.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def out_of_memory(lines: tuple[str, ...], *, peak_memory_bytes: int) -> EngineError | None:
    """Return an error with the needed and the free memory if the log reports a failed allocation, else `None`."""
    messages = [line for line in lines if is_out_of_memory(line)]
    if not messages:
        return None
    sizes = [int(a or b) for line in lines for a, b in _REQUESTED_BYTES.findall(line)]
    need = f"it requested {format_gib(max(sizes))} at once" if sizes else f"it reported {messages[-1]!r}"
    return _memory_error(
        f"TensorRT ran out of memory during the build: {need} and already had {format_gib(peak_memory_bytes)}"
    )


def _memory_error(text: str) -> EngineError:
    host, device = free_host_memory(), free_gpu_memory()
    free = [f"main memory has {format_gib(host.size)} free"] if host else []
    free += [f"the GPU has {format_gib(device.size)} free"] if device else []
    return EngineError(
        f"{text}. Now {', '.join(free) or 'the free memory is unknown'}.",
        fix="Close other programs, limit the memory of layers (--workspace 1), or export a smaller --img or --batch.",
    )


def _crash_error(result: ProcessResult) -> EngineError:
    memory = out_of_memory(result.log_lines, peak_memory_bytes=result.peak_memory_bytes)
    if memory is not None:
        return memory
    if result.returncode == -signal.SIGKILL:
        return _memory_error(
            "The build process was killed, as the system does when memory runs out: it had "
            f"{format_gib(result.peak_memory_bytes)} and requested more"
        )
    how = f"exit code {result.returncode}"
    if result.returncode < 0:
        with contextlib.suppress(ValueError):
            how = signal.Signals(-result.returncode).name
    log = "Its last log lines:\n" + "\n".join(result.log_lines) if result.log_lines else "Its log is empty."
    return EngineError(
        f"TensorRT ended the build process ({how}). {log}", fix="For the complete log:  y7 build --verbose"
    )


def _last_lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()][-LAST_LINES:]


def _environment(folder: Path) -> dict[str, str]:
    environment = dict(os.environ)
    library = _rtx_library()
    if library is not None:
        links = folder / "lib"
        links.mkdir()
        (links / RTX_LIBRARY).symlink_to(library)
        search_path = [str(links), *filter(None, [environment.get("LD_LIBRARY_PATH")])]
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(search_path)
    return environment


def _rtx_library() -> Path | None:
    """Return the library of the wheel, whose name ends with a version; `None` if it is not installed."""
    try:
        spec = importlib.util.find_spec(RTX_WHEEL)
    except (ImportError, ValueError, AttributeError):
        return None
    folders = [Path(name) for name in (spec.submodule_search_locations or ())] if spec else []
    return next((path for folder in folders for path in sorted(folder.glob(f"{RTX_LIBRARY}.*"))), None)
