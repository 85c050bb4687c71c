"""Makes the weights that come along: generates shapes, trains yolov7-tiny on them, stores them in half, measures AP.

python benchmarks/demo_weights.py --work FOLDER

An interrupted training goes on when the recipe is run again with the same folder.
"""

from __future__ import annotations

import csv
import shlex
import subprocess
import sys
from pathlib import Path

from recording import parser, record

from yolov7_deploy.checkpoint import load_checkpoint
from yolov7_deploy.checkpoint.checkpoint import save_checkpoint
from yolov7_deploy.dataset import open_dataset
from yolov7_deploy.dataset.shapes import write_shapes
from yolov7_deploy.detector import Detector
from yolov7_deploy.measure.accuracy import evaluate
from yolov7_deploy.options import ValOptions
from yolov7_deploy.weights import file_digest, shipped_weights

SHAPES = ("shapes", "--train", "4000", "--val", "300", "--img", "320", "--seed", "0")
# The gains of objectness and classes are scaled to 256 pixels and 6 classes by the recipe, to a tenth and less; with
# these values both are learned in few epochs. Single pictures take turns with mosaics, whose shapes are half as large.
RECIPE = "--set lr0=0.02 --set cls=3 --set obj=3 --set mosaic=0.5 --set mixup=0 --set paste_in=0"
TRAIN = (
    "train --variant yolov7-tiny --img 256 --batch 32 --nominal-batch 32 --epochs 14 --half --val-every 4 "
    f"--close-mosaic 2 --workers 1 --no-tensorboard {RECIPE}"
)
SEED_UNSEEN, UNSEEN = 99, 500


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--work", type=Path, required=True, help="folder for dataset and run; may hold both already")
    options = arguments.parse_args()
    data, run = options.work / "shapes", options.work / "run"
    y7 = [sys.executable, "-m", "yolov7_deploy"]
    subprocess.run([*y7, *SHAPES, "--output", str(data)], check=True)
    command = [*shlex.split(TRAIN), "--data", str(data / "shapes.yaml"), "--save-dir", str(run)]
    if not (run / "state.safetensors").exists():
        subprocess.run([*y7, *command], check=True)
    elif len(epochs(run)) < int(command[command.index("--epochs") + 1]):
        subprocess.run([*y7, "train", "--resume", "--save-dir", str(run)], check=True)
    best, shipped = run / "best.safetensors", shipped_weights()
    save_checkpoint(load_checkpoint(best), shipped, half=True)
    unseen = open_dataset(write_shapes(options.work / "unseen", train=1, val=UNSEEN, size=320, seed=SEED_UNSEEN))
    aps = {}
    for name, path in (("float32", best), ("shipped", shipped)):
        with Detector(path, device="cpu", img=256) as detector:
            report = evaluate(detector, unseen, options=ValOptions(rect=False))
        aps[name] = {"ap": report.ap, "ap50": report.ap50, "classes": {row.name: row.ap for row in report.classes}}
    record(
        "demo_weights",
        options.machine,
        {
            "commands": [f"y7 {' '.join(SHAPES)} --output shapes", f"y7 {TRAIN} --data shapes/shapes.yaml"],
            "epochs": epochs(run),
            "unseen_pictures": UNSEEN,
            "unseen_seed": SEED_UNSEEN,
            "unseen": aps,
            "bytes": shipped.stat().st_size,
            "sha256": file_digest(shipped),
        },
    )


def epochs(run: Path) -> list[dict[str, str]]:
    """What `results.csv` of a run says."""
    with (run / "results.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
