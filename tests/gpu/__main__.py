"""Command line of the GPU test suite: prepare its files, run its parts, each in its own process.

On a machine without a GPU, write everything that the parts need to .gpu/:

    python -m tests.gpu prepare --plugin liby7_plugin.so

With trained YOLOv7 weights and labelled images (`--weights`, `--data`) this takes up to ten minutes longer; `--int8`
without models leaves the INT8 files out. Copy .gpu/archive/part_* to the GPU machine, and there:

    python -m tests.gpu unpack --archive FOLDER
    python -m tests.gpu run --out results [--kit /opt/trt86]

A machine without TensorRT needs a kit, which tests/gpu/kit.py writes. `run` takes less than ten minutes and leaves out
the longest parts, which run on their own, up to ten minutes each. `soak` uses the engine of `runtime`. `int8` builds
eight engines and resumes with those of an earlier run:

    python -m tests.gpu run --parts engines --total 590
    python -m tests.gpu run --parts runtime --total 590
    python -m tests.gpu run --parts int8 --total 590
    python -m tests.gpu run --parts train --total 590
    python -m tests.gpu run --parts torch_speed --total 400
    python -m tests.gpu run --parts soak --total 598

`train` needs no prepared files. Its AP needs faster_coco_eval for the Python version of the GPU machine; if that is
another version than the one of `prepare`, install it there, or with `pip install --target .gpu/files/site`.

To try the suite without a GPU, on emulated kernels:  python -m tests.gpu run --emulated

If a part crashes, hangs or fails, the other parts still run, and what it recorded before is kept. The exit status is 1
if a part failed, or if one that `--parts` names was skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu import COMPILED_FOR, HIDDEN, PARTS, ROOT, Part
from tests.gpu.archive import unpack
from tests.gpu.kit import open_kit, write_kit
from tests.gpu.targets import summarize_targets

FOLDER = Path(".gpu")
KIT = Path("/opt/trt86")
TOTAL_S = 550.0
MIN_PART_S = 8.0  # a part with less time left is not started
PROBED_LIBRARIES = ("torch", "tensorrt", "tensorrt_rtx")
MODELS = ("yolov7-tiny", "yolov7", "yolov7-w6")


@dataclass(frozen=True, kw_only=True, slots=True)
class Interpreter:
    """A Python interpreter with its environment variables, and which of the probed libraries it has."""

    path: str
    environment: dict[str, str]
    libraries: frozenset[str]


def main() -> None:
    options = argument_parser().parse_args()
    match options.command:
        case "prepare":
            from tests.gpu.prepare_files import prepare

            prepare(
                options.folder,
                weights=options.weights,
                image_path=options.image,
                plugin=options.plugin,
                architecture=options.architecture,
                models=options.models,
                int8=options.int8,
                data=options.data,
            )
        case "unpack":
            unpack(options.archive, options.folder)
        case "kit":
            write_kit(options.archive, options.python, wheel=options.wheel)
        case "run":
            sys.exit(run(options))
        case "part":
            run_part(options)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="write the files for the GPU machine")
    prepare.add_argument("--folder", type=Path, default=FOLDER)
    prepare.add_argument("--weights", default="yolov7", help="trained YOLOv7, as for y7 export")
    prepare.add_argument("--image", type=Path, help="image with objects (default: a synthetic street)")
    prepare.add_argument("--plugin", type=Path, help="liby7_plugin.so built with TensorRT 8.6 headers")
    prepare.add_argument("--architecture", default="90", help="compute capability of the kernels library")
    prepare.add_argument("--models", nargs="*", choices=MODELS, default=MODELS)
    prepare.add_argument("--int8", nargs="*", choices=MODELS[:2], default=MODELS[:2], help="models of the part int8")
    prepare.add_argument("--data", type=Path, default=shared_data(), help="labelled dataset for the part int8")
    unpacking = commands.add_parser("unpack", help="restore the files on the GPU machine")
    unpacking.add_argument("--archive", type=Path, default=FOLDER / "archive")
    unpacking.add_argument("--folder", type=Path, default=FOLDER / "files")
    packing = commands.add_parser("kit", help="write TensorRT 8.6 for a GPU machine without it")
    packing.add_argument("--archive", type=Path, default=FOLDER / "kit")
    packing.add_argument("--python", default="python3.10", help="interpreter of the version that the wheel is for")
    packing.add_argument("--wheel", type=Path, help="wheel of TensorRT (default: downloaded)")
    running = commands.add_parser("run", help="run the parts")
    running.add_argument("--folder", type=Path, default=FOLDER / "files")
    running.add_argument("--out", type=Path, help="default: $OUT, or benchmarks/results/NAME OF THE GPU")
    running.add_argument("--parts", nargs="*", choices=[part.name for part in PARTS])
    running.add_argument("--total", type=float, default=TOTAL_S, help="time limit in seconds for all parts")
    running.add_argument("--kit", type=Path, help=f"TensorRT 8.6 of tests/gpu/kit.py (default: {KIT}, if it is there)")
    running.add_argument("--kit-python", help="Python for it (default: that of the kit)")
    running.add_argument("--emulated", action="store_true", help="run on the emulated GPU, with few small cases")
    part = commands.add_parser("part", help="run one part in this process; used by `run`")
    part.add_argument("name")
    part.add_argument("--folder", type=Path, required=True)
    part.add_argument("--result", type=Path, required=True)
    part.add_argument("--emulated", action="store_true")
    return parser


def shared_data() -> Path | None:
    """Return the labelled images in `$Y7_SHARED`, if they are there."""
    data = Path(os.environ.get("Y7_SHARED", ""), "coco-mini", "coco-mini.yaml")
    return data if "Y7_SHARED" in os.environ and data.is_file() else None


def run_part(options: argparse.Namespace) -> None:
    from tests.gpu.environment import Environment

    sys.path.append(str(options.folder / "site" / COMPILED_FOR))
    functions = {part.name: part.function for part in PARTS} | HIDDEN
    module, function = functions[options.name].split(":")
    env = Environment(folder=options.folder, result=options.result, emulated=options.emulated)
    getattr(importlib.import_module(f"tests.gpu.{module}"), function)(env)


def run(options: argparse.Namespace) -> int:
    """Run the parts one after the other; return 1 if one failed or a named one was skipped, else 0."""
    started = time.monotonic()
    interpreters = find_interpreters(options)
    out = options.out or (
        Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "benchmarks" / "results" / gpu_name()
    )
    out.mkdir(parents=True, exist_ok=True)
    document: dict[str, object] = {"benchmark": "gpu_suite", "emulated": options.emulated}
    document["interpreters"] = [{"path": one.path, "libraries": sorted(one.libraries)} for one in interpreters]
    results: dict[str, dict[str, object]] = {}
    document["result"] = results
    with (out / "gpu_suite.log").open("w", encoding="utf-8") as log:
        for part in PARTS:
            if options.parts and part.name not in options.parts:
                continue
            left = options.total - (time.monotonic() - started)
            results[part.name] = outcome = run_one_part(part, options, interpreters, left, log.fileno())
            document["seconds"] = round(time.monotonic() - started, 1)
            write(document, out / "gpu_suite.json")
            print(
                f"{part.name:20} {outcome['state']:10} {outcome.get('seconds', '')} {outcome.get('why', '')}",
                flush=True,
            )
    bad = {"failed", "timed out", "skipped"} if options.parts else {"failed", "timed out"}
    return int(any(outcome["state"] in bad for outcome in results.values()))


def run_one_part(
    part: Part, options: argparse.Namespace, interpreters: list[Interpreter], left: float, log: int
) -> dict[str, object]:
    """Run a part in its own process and return its outcome: state, results, and the reason for the state."""
    if options.emulated and not part.emulated:
        return {"state": "skipped", "why": "needs a GPU"}
    if part.alone and not options.parts:
        return {"state": "skipped", "why": f"runs alone: python -m tests.gpu run --parts {part.name} --total 590"}
    needs = part.needs_emulated if options.emulated and part.needs_emulated else part.needs
    python = find_interpreter(needs, interpreters)
    if python is None:
        return {"state": "skipped", "why": f"no Python interpreter here has {' or '.join(needs)}"}
    budget = min(part.budget_s, left)
    if budget < MIN_PART_S:
        return {"state": "skipped", "why": f"only {left:.0f} s were left"}
    with tempfile.TemporaryDirectory() as work:
        result = Path(work, "result.json")
        command = [python.path, "-m", "tests.gpu", "part", part.name]
        command += ["--folder", str(options.folder.resolve()), "--result", str(result)]
        command += ["--emulated"] if options.emulated else []
        os.write(log, f"\n=== {part.name}: {python.path}\n".encode())
        started = time.monotonic()
        code = call(command, python.environment, budget, log)
        outcome: dict[str, Any] = {"seconds": round(time.monotonic() - started, 1), "python": python.path}
        outcome["results"] = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    rows = outcome["results"].get("targets")
    reasons = [summarize_targets(rows)] if rows else []
    if code is None:
        outcome["state"], reasons = "timed out", [f"after {budget:.0f} s", *reasons]
    elif code:
        outcome["state"], reasons = "failed", [f"exit {code}, see the log", *reasons]
    else:
        outcome["state"] = "passed"
    if reasons:
        outcome["why"] = "; ".join(reasons)
    return outcome


def find_interpreter(needs: tuple[str, ...], interpreters: list[Interpreter]) -> Interpreter | None:
    """Return the first interpreter with the first of the libraries that any interpreter has."""
    if not needs:
        return next(iter(interpreters), None)
    return next((one for library in needs for one in interpreters if library in one.libraries), None)


def call(command: list[str], environment: dict[str, str], budget_s: float, log: int) -> int | None:
    """Return the exit status of a command, or `None` if it exceeded its time limit; kill everything that it started."""
    process = subprocess.Popen(
        command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        return process.wait(budget_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the process group contains only this command and its children
        process.wait()


def find_interpreters(options: argparse.Namespace) -> list[Interpreter]:
    """Return this interpreter, and that of the kit if there is one.

    Raises:
        SystemExit: The kit is not there, or its TensorRT cannot be imported.
    """
    site = (options.folder / "site").resolve()
    found = [probe_interpreter(sys.executable, [ROOT, site], [])]
    folder = options.kit or (KIT if KIT.exists() else None)
    if folder is not None:
        try:
            kit = open_kit(folder.resolve(), options.kit_python)
        except FileNotFoundError as error:
            sys.exit(str(error))
        found.append(probe_interpreter(kit.python, [kit.site, ROOT, site], list(kit.libraries), imported="tensorrt"))
    return found


def probe_interpreter(path: str, packages: list[Path], libraries: list[Path], *, imported: str = "") -> Interpreter:
    """Return an interpreter with the libraries that it finds.

    Args:
        path: The interpreter.
        packages: Folders for `$PYTHONPATH`, before those that are in it.
        libraries: Folders for `$LD_LIBRARY_PATH`, likewise.
        imported: A module that it must be able to import.

    Raises:
        SystemExit: It does not start, or cannot import the module.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    for name, folders in (("PYTHONPATH", packages), ("LD_LIBRARY_PATH", libraries)):
        if folders:
            environment[name] = os.pathsep.join(filter(None, [*map(str, folders), os.environ.get(name, "")]))
    probe = f"import importlib.util as u, json; print(json.dumps([n for n in {PROBED_LIBRARIES} if u.find_spec(n)]))"
    probe += f"; import {imported}" if imported else ""
    try:
        done = subprocess.run([path, "-c", probe], env=environment, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"{path} does not work: {getattr(error, 'stderr', '') or error}")
    return Interpreter(path=path, environment=environment, libraries=frozenset(json.loads(done.stdout)))


def gpu_name() -> str:
    """Return the name of the first GPU as a folder name."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "emulated"
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    name = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return name[0].strip().lower().replace(" ", "-") if name else "emulated"


def write(document: dict[str, object], path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    main()
