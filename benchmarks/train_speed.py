"""Training speed on a CPU beside the official program, from the generated shapes: seconds of an epoch after the first.

    git clone https://github.com/WongKinYiu/yolov7 official
    python benchmarks/train_speed.py --official official --official-python official/.venv/bin/python

Both commands train the same variant from scratch in float32 with the same images, size, batch, augmentation preset and
number of loading processes, without validation and plots, in turn. An epoch ends when its line is in the results file.
The first one, with the start of the processes and the label cache, does not count, nor does the last one, which the
official program ends with a validation.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from recording import parser, record

from yolov7_deploy.datasets.synthetic import write_shapes

# The official program uses names that NumPy removed in 1.24 and 2.0.
RUN_OFFICIAL = (
    "import sys, runpy, numpy as np; np.int, np.float, np.trapz = int, float, np.trapezoid; sys.path.insert(0, '.'); "
    "sys.argv = ['train.py', *sys.argv[1:]]; runpy.run_path('train.py', run_name='__main__')"
)
POLL_S = 0.02


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--official", type=Path, required=True, help="clone of the official repository")
    arguments.add_argument("--official-python", default=sys.executable, help="Python with its requirements")
    arguments.add_argument("--variant", default="yolov7-tiny")
    arguments.add_argument("--img", type=int, default=320)
    arguments.add_argument("--batch", type=int, default=16)
    arguments.add_argument("--images", type=int, default=160)
    arguments.add_argument("--epochs", type=int, default=6)
    arguments.add_argument("--rounds", type=int, default=2)
    options = arguments.parse_args()
    epochs: dict[str, list[float]] = {"official": [], "ours": [], "ours, bfloat16": []}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "shapes"
        write_shapes(data, train=options.images, val=16, size=options.img, seed=0)
        for number in range(options.rounds):
            for name, times in epochs.items():
                run = Path(folder) / f"{name.replace(', ', '-')}{number}"
                command, log, cwd = arrange(name, options, data=data, run=run)
                new = epoch_seconds(command, log=log, cwd=cwd, epochs=options.epochs)[1:-1]
                print(f"{name}: {[round(second, 2) for second in new]}", flush=True)
                times.extend(new)
    result = {name: vars(options)[name] for name in ("variant", "img", "batch", "images", "epochs", "rounds")}
    for name, times in epochs.items():
        result[f"{name}, epoch_s"] = [round(second, 3) for second in times]
        result[f"{name}, images_per_s"] = round(options.images / median(times), 2)
    for name in ("ours", "ours, bfloat16"):
        result[f"{name}, times as fast"] = round(median(epochs["official"]) / median(epochs[name]), 2)
    record(f"train_speed_{options.variant}", options.machine, result)


def arrange(name: str, options: argparse.Namespace, *, data: Path, run: Path) -> tuple[list[str], Path, Path]:
    """Return the command of a program, its results file, and the folder to run it in."""
    shared = ["--epochs", str(options.epochs), "--batch-size", str(options.batch), "--workers", "2", "--device", "cpu"]
    preset = "tiny" if options.variant == "yolov7-tiny" else "p5"
    if name == "official":
        command = [options.official_python, "-c", RUN_OFFICIAL, "--weights", "", "--cfg"]
        command += [f"cfg/training/{options.variant}.yaml", "--data", str(official_yaml(data)), *shared]
        command += ["--hyp", f"data/hyp.scratch.{preset}.yaml", "--img-size", str(options.img), str(options.img)]
        command += ["--project", str(run.parent), "--name", run.name, "--notest", "--noautoanchor"]
        return command, run / "results.txt", options.official
    command = [sys.executable, "-m", "yolov7_deploy", "train", "--data", str(data / "shapes.yaml"), *shared]
    command += ["--variant", options.variant, "--hyp", preset, "--img", str(options.img), "--save-dir", str(run)]
    command += ["--val-every", "0", "--noautoanchor", "--half" if "bfloat16" in name else "--no-half"]
    return command, run / "results.csv", Path.cwd()


def official_yaml(data: Path) -> Path:
    """Write the dataset file with absolute paths, which the official program needs, and return its path."""
    import yaml

    document = yaml.safe_load((data / "shapes.yaml").read_text())
    names = document["names"]
    names = list(names.values()) if isinstance(names, dict) else names
    paths = {split: str(data / document[split]) for split in ("train", "val")}
    path = data / "official.yaml"
    path.write_text(yaml.safe_dump({**paths, "nc": len(names), "names": names}))
    return path


def epoch_seconds(command: list[str], *, log: Path, cwd: Path, epochs: int) -> list[float]:
    """Return the seconds of each epoch of a training, by the lines of its results file."""
    # The official program loads its own checkpoint as a pickle at the end, which PyTorch 2.6 and later refuse.
    environment = {**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=output, stderr=subprocess.STDOUT)
        ends, started = [], time.perf_counter()
        while process.poll() is None:
            lines = log.read_text().splitlines() if log.exists() else []
            rows = [line for line in lines if line and line.split(",")[0].strip()[:1].isdigit()]
            ends += [time.perf_counter()] * (len(rows) - len(ends))
            time.sleep(POLL_S)
        output.seek(0)
        if process.returncode or len(ends) < epochs:
            raise SystemExit(f"{shutil.which(command[0])} failed:\n{output.read().decode()[-3000:]}")
    return [end - begin for begin, end in zip([started, *ends], ends, strict=False)]


if __name__ == "__main__":
    main()
