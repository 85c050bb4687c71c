"""Train the bundled weights: generate shapes, train yolov7-tiny on them, store FP16, measure AP.

python benchmarks/demo_weights.py --work FOLDER

An interrupted training resumes when the script is run again with the same folder.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

from recording import parser, record

from yolov7_deploy._serialization import sha256_hex
from yolov7_deploy.checkpoint import load_checkpoint
from yolov7_deploy.checkpoint.loader import save_checkpoint
from yolov7_deploy.datasets import open_dataset
from yolov7_deploy.datasets.synthetic import write_shapes
from yolov7_deploy.detector import Detector
from yolov7_deploy.evaluation.accuracy import evaluate
from yolov7_deploy.hub import bundled_weights
from yolov7_deploy.options import ValOptions

SHAPES = "shapes --train 4000 --val 300 --img 320 --seed 0 --output shapes"
COMMON = (
    "train --data shapes/shapes.yaml --variant yolov7-tiny --hyp tiny --half --workers 1 --no-tensorboard "
    "--no-recalibrate-bn --set cls=3 --set mixup=0 --set paste_in=0"
)
# The recipe scales the gains of objectness and classes with image size and number of classes, here to a tenth and less;
# these values let both be learned in few epochs. Single images alternate with mosaics, whose shapes are half as large.
# Most epochs run at a small size, where a CPU is fast.
TRAININGS = (
    f"{COMMON} --img 256 --batch 32 --nominal-batch 32 --epochs 14 --val-every 4 --close-mosaic 2 --set lr0=0.02 "
    "--set obj=3 --set mosaic=0.5 --save-dir first",
    f"{COMMON} --weights first/best.safetensors --img 320 --batch 16 --nominal-batch 16 --epochs 7 --val-every 3 "
    "--close-mosaic 2 --seed 1 --set lr0=0.02 --set obj=2 --set mosaic=0.3 --save-dir second",
    f"{COMMON} --weights second/best.safetensors --img 416 --batch 16 --nominal-batch 16 --epochs 2 --val-every 2 "
    "--close-mosaic 1 --seed 2 --set lr0=0.008 --set obj=1.5 --set mosaic=0.2 --save-dir third",
    f"{COMMON} --weights third/best.safetensors --img 416 --batch 16 --nominal-batch 16 --epochs 8 --val-every 4 "
    "--close-mosaic 3 --seed 3 --set lr0=0.015 --set box=0.1 --set obj=1.5 --set mosaic=0.2 --save-dir fourth",
)
FOLDERS = tuple(command.rpartition(" ")[2] for command in TRAININGS)
Y7 = [sys.executable, "-m", "yolov7_deploy"]
SEED_UNSEEN, UNSEEN = 99, 300
SIZE = 416


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--work", type=Path, required=True, help="folder for dataset and runs; may contain both already"
    )
    options = arguments.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    subprocess.run([*Y7, *SHAPES.split()], check=True, cwd=options.work)
    for command, folder in zip(TRAININGS, FOLDERS, strict=True):
        train(command, options.work / folder)
    best, shipped = options.work / FOLDERS[-1] / "best.safetensors", bundled_weights()
    save_checkpoint(load_checkpoint(best), shipped, half=True)
    unseen = open_dataset(write_shapes(options.work / "unseen", train=1, val=UNSEEN, size=320, seed=SEED_UNSEEN))
    aps = {}
    for name, path in (("float32", best), ("shipped", shipped)):
        with Detector(path, device="cpu", img=SIZE) as detector:
            report = evaluate(detector, unseen, options=ValOptions(rect=False))
        aps[name] = {"ap": report.ap, "ap50": report.ap50, "classes": {row.name: row.ap for row in report.classes}}
    record(
        "demo_weights",
        options.machine,
        {
            "commands": [f"y7 {command}" for command in (SHAPES, *TRAININGS)],
            "epochs": {name: epochs(options.work / name) for name in FOLDERS},
            "unseen_images": UNSEEN,
            "unseen_seed": SEED_UNSEEN,
            "unseen": aps,
            "bytes": shipped.stat().st_size,
            "sha256": sha256_hex(shipped),
        },
    )


def train(command: str, run: Path) -> None:
    """Run a training, or resume it, unless it is complete."""
    if not (run / "state.safetensors").exists():
        subprocess.run([*Y7, *command.split()], check=True, cwd=run.parent)
    elif len(epochs(run)) < int(command.split("--epochs ")[1].split()[0]):
        subprocess.run([*Y7, "train", "--resume", "--save-dir", run.name], check=True, cwd=run.parent)


def epochs(run: Path) -> list[dict[str, str]]:
    """Return the rows of `results.csv` of a run."""
    with (run / "results.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
