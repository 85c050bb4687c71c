"""Runs the worker: a Python of its own in which TensorRT may abort, run out of memory or be killed.

The child finds `libtensorrt_rtx.so` in a private folder: the parser of TensorRT-RTX opens that name, the wheel has only
`libtensorrt_rtx.so.1`, and the loader reads its path when a process starts.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from yolov7_deploy._serialization import from_plain
from yolov7_deploy.errors import EngineError
from yolov7_deploy.tensorrt.build_messages import JOB, LOG, MODEL, PLAN, REPORT, BuildJob, BuildReport, Installation
from yolov7_deploy.tensorrt.build_record import Product
from yolov7_deploy.tensorrt.memory_estimate import free_gpu_memory, free_host_memory, in_gib

RTX_LIBRARY = "libtensorrt_rtx.so"
RTX_WHEEL = "tensorrt_rtx_libs"
LAST_LINES = 6  # of the log, in a message

OnEvent = Callable[[str, Any], None]

# The child sees the modules that its caller sees, and nothing of a file that lies beside by chance.
_START = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); " + (
    "from yolov7_deploy.tensorrt.build_worker import main; main(sys.argv[1:])"
)
_OUT_OF_MEMORY = re.compile(
    r"out ?of ?memory|bad_alloc|could not be allocated|(?:cannot|failed to) allocate", re.IGNORECASE
)
_WANTED_BYTES = re.compile(r"(?:requested|allocat\w+|size)\D{0,40}?(\d{6,})\s*bytes|\b(\d{6,}) bytes", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessResult:
    """How a child ended: exit code (negative for a signal), last lines of its log, most memory it was seen with."""

    code: int
    lines: tuple[str, ...]
    peak_memory_bytes: int


def is_installed(module: str) -> bool:
    """Python would find it; nothing is imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError, AttributeError):  # a blocked, half-loaded or broken module
        return False


def probe(product: Product) -> Installation:
    """What is installed under this name, and whether it can build here."""
    found: list[Installation] = []

    def take(kind: str, value: Any) -> None:  # noqa: ANN401 - JSON
        if kind == "installation":
            found.append(from_plain(Installation, value))

    with _workplace() as folder:
        ended = run_worker(["probe", product], folder, take)
    if found and ended.code == 0:
        return found[0]
    last = ended.lines[-1] if ended.lines else f"its import ended Python with {ended.code}"
    return Installation(product=product, version="", fault=last)


def run_build(job: BuildJob, graph: bytes, on_event: OnEvent) -> tuple[bytes, BuildReport, tuple[str, ...]]:
    """Plan, report and the last lines of the log; the plan is empty where the report has a failure.

    Args:
        job: What to do.
        graph: An ONNX model.
        on_event: Called with `log`, `parsed` and `progress` as they come.

    Raises:
        EngineError: The process ended before its report: it crashed, was killed or ran out of memory.
    """
    with _workplace() as folder:
        (folder / MODEL).write_bytes(graph)
        (folder / JOB).write_text(json.dumps(asdict(job)), encoding="utf-8")
        ended = run_worker(["build", str(folder)], folder, on_event)
        if ended.code != 0 or not (folder / REPORT).exists():
            raise _death(ended)
        report = from_plain(BuildReport, json.loads((folder / REPORT).read_text(encoding="utf-8")))
        plan = b"" if report.failure else (folder / PLAN).read_bytes()
        return plan, report, ended.lines


def run_worker(arguments: list[str], folder: Path, on_event: OnEvent) -> ProcessResult:
    """Runs the worker to its end; whatever ends the waiting (Ctrl-C, an error in `on_event`) ends the worker too."""
    lines: deque[str] = deque(maxlen=LAST_LINES)
    peak = 0
    process = None
    try:
        with _interrupt_held():
            process = _started(arguments, folder)
        assert process.stdout is not None, "asked for a pipe"
        for text in process.stdout:
            peak = max(peak, peak_memory_bytes(process.pid))
            try:
                kind, value = next(iter(json.loads(text).items()))
            except ValueError:
                break  # half a line is the last of a process that was killed
            if kind == "log" and not value.startswith(("INFO", "VERBOSE")):
                lines.append(value.strip())
            on_event(kind, value)
        process.wait()
    finally:
        if process is not None:
            process.kill()  # nothing where it has ended
            process.wait()
            if process.stdout:
                process.stdout.close()
    lines.extend(_tail(folder / LOG))
    return ProcessResult(code=process.returncode, lines=tuple(lines), peak_memory_bytes=peak)


def _started(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    with (folder / LOG).open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(sys.path), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=_environment(folder),
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches this process only, which then ends the child
        )


@contextlib.contextmanager
def _interrupt_held() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: what is made in it has a name by then, and can be taken back."""
    came: list[int] = []
    try:
        before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    except ValueError:  # not the main thread, which is the one that is interrupted
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
        if came:
            signal.raise_signal(signal.SIGINT)


def peak_memory_bytes(process: int | str = "self") -> int:
    """Most main memory a running process had; 0 where the system does not tell.

    Not what `resource` says: that begins with the memory of the process that started this one.
    """
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def out_of_memory(lines: tuple[str, ...], *, peak_memory_bytes: int) -> EngineError | None:
    """The error for a log that speaks of memory, with the need and what is free; `None` if it does not."""
    telling = [line for line in lines if _OUT_OF_MEMORY.search(line)]
    if not telling:
        return None
    wanted = [int(a or b) for line in lines for a, b in _WANTED_BYTES.findall(line)]
    need = f"it wanted {in_gib(max(wanted))} at once" if wanted else f"it said {telling[-1]!r}"
    return _no_memory(f"TensorRT ran out of memory while it built: {need}, having {in_gib(peak_memory_bytes)} already")


def _no_memory(what: str) -> EngineError:
    host, device = free_host_memory(), free_gpu_memory()
    have = [f"main memory has {in_gib(host.size)} free"] if host else []
    have += [f"the GPU {in_gib(device.size)}"] if device else []
    return EngineError(
        f"{what}. Now {', '.join(have) or 'nothing says what is free'}.",
        fix="End other programs, limit what layers may use (--workspace 1), or export a smaller --img or --batch.",
    )


def _death(ended: ProcessResult) -> EngineError:
    said = "\n".join(ended.lines) or "It said nothing."
    memory = out_of_memory(ended.lines, peak_memory_bytes=ended.peak_memory_bytes)
    if memory is not None:
        return memory
    if ended.code == -signal.SIGKILL:
        return _no_memory(
            "The process that builds was killed, as the system does when memory runs out: it had "
            f"{in_gib(ended.peak_memory_bytes)} and wanted more"
        )
    how = f"exit code {ended.code}"
    if ended.code < 0:
        with contextlib.suppress(ValueError):
            how = signal.Signals(-ended.code).name
    return EngineError(
        f"TensorRT ended its process ({how}) instead of an answer. It last said:\n{said}",
        fix="All it said:  y7 build --verbose",
    )


def _tail(log: Path) -> list[str]:
    text = log.read_text(encoding="utf-8", errors="replace")
    return [line.strip() for line in text.splitlines() if line.strip()][-LAST_LINES:]


@contextlib.contextmanager
def _workplace() -> Iterator[Path]:
    """A folder for one child, gone afterwards."""
    folder = None
    try:
        with _interrupt_held():
            folder = _folder()
        yield Path(folder.name)
    finally:
        if folder is not None:
            with _interrupt_held():
                folder.cleanup()


def _folder() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix=f"y7-engine-{os.getpid()}-", ignore_cleanup_errors=True)
    except OSError as error:
        raise EngineError(
            f"No temporary folder for the build: {error.strerror or error}.",
            fix="Point TMPDIR to a folder with space.",
        ) from error


def _environment(folder: Path) -> dict[str, str]:
    environment = dict(os.environ)
    library = _rtx_library()
    if library is not None:
        links = folder / "lib"
        links.mkdir()
        (links / RTX_LIBRARY).symlink_to(library)
        searched = [str(links), *filter(None, [environment.get("LD_LIBRARY_PATH")])]
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(searched)
    return environment


def _rtx_library() -> Path | None:
    """The library under the only name it has in the wheel."""
    try:
        spec = importlib.util.find_spec(RTX_WHEEL)
    except (ImportError, ValueError, AttributeError):
        return None
    folders = [Path(name) for name in (spec.submodule_search_locations or ())] if spec else []
    return next((path for folder in folders for path in sorted(folder.glob(f"{RTX_LIBRARY}.*"))), None)
