"""All checks that need a GPU, in one run of less than nine minutes; each part in a process of its own.

On a machine without a GPU:   python -m tests.gpu prepare --plugin liby7_plugin.so   (writes .gpu/)
Trained YOLOv7 and labelled images (`--weights`, `--data`) make it up to ten minutes longer; a bare `--int8` none.
Bring .gpu/pieces/part_* to the GPU machine, and there:
                              python -m tests.gpu unpack --pieces PLACE --folder .gpu/whole
                              python -m tests.gpu run --out results [--kit /opt/trt86]
What `run` has no time left for are runs of their own, of up to ten minutes; the soak takes the engine of `runtime`, and
`int8`, which builds eight engines, goes on with those of an earlier run that time ended:
                              python -m tests.gpu run --parts runtime --total 590
                              python -m tests.gpu run --parts int8 --total 590
                              python -m tests.gpu run --parts train --total 590
                              python -m tests.gpu run --parts torch_speed --total 400
                              python -m tests.gpu run --parts soak --total 598
`train` needs nothing that `prepare` wrote. Its AP needs faster_coco_eval for the Python of the GPU machine; where that
is another one than that of `prepare`, install its wheel there with `pip install --target .gpu/whole/site --upgrade`.
Without a GPU, to try the suite itself on emulated kernels:  python -m tests.gpu run --emulated

A part that crashes, hangs or fails loses nothing of the others, nor of what it recorded before.
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

from tests.gpu import HIDDEN, PARTS, ROOT, Part
from tests.gpu.components import unpack
from tests.gpu.targets import goal_words

FOLDER = Path(".gpu")
TOTAL_S = 520.0
LEAST_S = 8.0  # a part with less time left is not started
PROBED = ("torch", "tensorrt", "tensorrt_rtx")
MODELS = ("yolov7-tiny", "yolov7", "yolov7-w6")


@dataclass(frozen=True, kw_only=True, slots=True)
class Interpreter:
    """A Python with its environment, and which of the PROBED libraries it has."""

    path: str
    environment: dict[str, str]
    libraries: frozenset[str]


def main() -> None:
    options = arguments().parse_args()
    match options.verb:
        case "prepare":
            from tests.gpu.preparing import prepare

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
            unpack(options.pieces, options.folder)
        case "run":
            sys.exit(run(options))
        case "part":
            run_part(options)


def arguments() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = made.add_subparsers(dest="verb", required=True)
    prepare = verbs.add_parser("prepare", help="write what must be brought to the GPU machine")
    prepare.add_argument("--folder", type=Path, default=FOLDER)
    prepare.add_argument("--weights", default="yolov7", help="trained YOLOv7, as for y7 export")
    prepare.add_argument("--image", type=Path, help="with objects in it; a drawn street where left out")
    prepare.add_argument("--plugin", type=Path, help="liby7_plugin.so built with TensorRT 8.6 headers")
    prepare.add_argument("--architecture", default="90", help="compute capability of the kernels library")
    prepare.add_argument("--models", nargs="*", choices=MODELS, default=MODELS)
    prepare.add_argument("--int8", nargs="*", choices=MODELS[:2], default=MODELS[:2], help="models of the part int8")
    prepare.add_argument("--data", type=Path, default=shared_data(), help="labelled, for INT8 and its AP")
    unpacking = verbs.add_parser("unpack", help="put the pieces together on the GPU machine")
    unpacking.add_argument("--pieces", type=Path, default=FOLDER / "pieces")
    unpacking.add_argument("--folder", type=Path, default=FOLDER / "whole")
    running = verbs.add_parser("run", help="run the parts")
    running.add_argument("--folder", type=Path, default=FOLDER / "whole")
    running.add_argument("--out", type=Path, help="default: $OUT, or benchmarks/results/NAME OF THE GPU")
    running.add_argument("--parts", nargs="*", choices=[part.name for part in PARTS])
    running.add_argument("--total", type=float, default=TOTAL_S, help="seconds for everything")
    running.add_argument("--kit", type=Path, default=Path("/opt/trt86"), help="lib/ and site/ of TensorRT 8.6")
    running.add_argument("--kit-python", help="its Python 3.11; python3.11 of $PATH where left out")
    running.add_argument("--emulated", action="store_true", help="kernels on an emulated GPU, few small cases")
    part = verbs.add_parser("part", help="one part in this process; `run` calls it")
    part.add_argument("name")
    part.add_argument("--folder", type=Path, required=True)
    part.add_argument("--result", type=Path, required=True)
    part.add_argument("--emulated", action="store_true")
    return made


def shared_data() -> Path | None:
    """The images that the tests take, where they are."""
    data = Path(os.environ.get("Y7_SHARED", ""), "coco-mini", "coco-mini.yaml")
    return data if "Y7_SHARED" in os.environ and data.is_file() else None


def run_part(options: argparse.Namespace) -> None:
    from tests.gpu.environment import Setting

    targets = {part.name: part.target for part in PARTS} | HIDDEN
    module, function = targets[options.name].split(":")
    setting = Setting(folder=options.folder, result=options.result, emulated=options.emulated)
    getattr(importlib.import_module(f"tests.gpu.{module}"), function)(setting)


def run(options: argparse.Namespace) -> int:
    """Runs the parts one after the other; 1 if one failed."""
    started = time.monotonic()
    out = options.out or (
        Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "benchmarks" / "results" / gpu_name()
    )
    out.mkdir(parents=True, exist_ok=True)
    interpreters = find_interpreters(options)
    document: dict[str, object] = {"benchmark": "gpu_suite", "emulated": options.emulated}
    document["interpreters"] = [{"path": one.path, "libraries": sorted(one.libraries)} for one in interpreters]
    results: dict[str, dict[str, object]] = {}
    document["result"] = results
    with (out / "gpu_suite.log").open("w", encoding="utf-8") as log:
        for part in PARTS:
            if options.parts and part.name not in options.parts:
                continue
            left = options.total - (time.monotonic() - started)
            results[part.name] = outcome = one_part(part, options, interpreters, left, log.fileno())
            document["seconds"] = round(time.monotonic() - started, 1)
            write(document, out / "gpu_suite.json")
            print(
                f"{part.name:20} {outcome['state']:10} {outcome.get('seconds', '')} {outcome.get('why', '')}",
                flush=True,
            )
    return int(any(outcome["state"] in ("failed", "timed out") for outcome in results.values()))


def one_part(
    part: Part, options: argparse.Namespace, interpreters: list[Interpreter], left: float, log: int
) -> dict[str, object]:
    """Runs a part in a process of its own and gives what became of it."""
    if options.emulated and not part.emulated:
        return {"state": "skipped", "why": "needs a GPU"}
    needs = part.needs_emulated if options.emulated and part.needs_emulated else part.needs
    python = fitting(needs, interpreters)
    if python is None:
        return {"state": "skipped", "why": f"no Python here has {' or '.join(needs)}"}
    budget = min(part.budget_s, left)
    if budget < LEAST_S:
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
    goals = [goal_words(rows)] if (rows := outcome["results"].get("goals")) else []
    if code is None:
        return {**outcome, "state": "timed out", "why": "; ".join([f"after {budget:.0f} s", *goals])}
    if code:
        return {**outcome, "state": "failed", "why": "; ".join([f"exit {code}, see the log", *goals])}
    return {**outcome, "state": "passed", **({"why": goals[0]} if goals else {})}


def fitting(needs: tuple[str, ...], interpreters: list[Interpreter]) -> Interpreter | None:
    """The first Python with the first of the libraries that any has."""
    if not needs:
        return next(iter(interpreters), None)
    return next((one for library in needs for one in interpreters if library in one.libraries), None)


def call(command: list[str], environment: dict[str, str], budget_s: float, log: int) -> int | None:
    """Exit status of a command; none if it ran past its budget, when all that it started is ended with it."""
    process = subprocess.Popen(
        command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        return process.wait(budget_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its own session: nothing else is in it
        process.wait()


def find_interpreters(options: argparse.Namespace) -> list[Interpreter]:
    """This Python, and the one that can import the TensorRT of the kit."""
    site = (options.folder / "site").resolve()
    found = [probed(sys.executable, [ROOT, site], [])]
    python = options.kit_python or shutil.which("python3.11")
    if options.kit.exists() and python:
        libraries = [options.kit / "lib", Path(python).resolve().parent.parent / "lib"]
        found.append(probed(python, [options.kit / "site", ROOT, site], libraries))
    return [one for one in found if one is not None]


def probed(path: str, packages: list[Path], libraries: list[Path]) -> Interpreter | None:
    """An interpreter and what it can find; none where it does not start."""
    environment = {**os.environ, "PYTHONPATH": ":".join(map(str, packages)), "PYTHONUNBUFFERED": "1"}
    if libraries:
        environment["LD_LIBRARY_PATH"] = ":".join([*map(str, libraries), os.environ.get("LD_LIBRARY_PATH", "")])
    question = f"import importlib.util as u, json; print(json.dumps([n for n in {PROBED} if u.find_spec(n)]))"
    try:
        done = subprocess.run([path, "-c", question], env=environment, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"{path} does not start: {error}", file=sys.stderr)
        return None
    return Interpreter(path=path, environment=environment, libraries=frozenset(json.loads(done.stdout)))


def gpu_name() -> str:
    """Of the first GPU, as a folder."""
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
