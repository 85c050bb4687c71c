"""Tables 6 to 8 of the paper in small: what the assigner, the constraint and the auxiliary heads do to AP.

python benchmarks/ablations.py --table 6 --data shapes

Every row of the table is trained from scratch once per seed, on generated shapes (or another dataset YAML), and
measured as an exported ONNX file through `Detector`. Seeds fix weights and batches, so rows are compared seed by seed:
the difference from the first row has a 95 % confidence interval (Student, over the seeds). The network is E6 or E6E
with an eighth of the channels and a third of the depth (`scale`), at 64 instead of 1280 pixels, and it sees some
thousand images instead of 300 epochs of COCO. So the result says how large an effect would have to be to show here, and
whether a row breaks the training; it does not decide about tenths of AP.

With `--work FOLDER` finished trainings are kept, so an interrupted comparison continues, and tables share theirs.
Results go to results/MACHINE/ablations.json, one entry per table; the entries of other tables stay.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from recording import RESULTS, parser, record

from yolov7_deploy._console import write_json
from yolov7_deploy._statistics import student_t_quantile
from yolov7_deploy.datasets import Dataset, open_dataset
from yolov7_deploy.datasets.samples import as_single_class
from yolov7_deploy.datasets.synthetic import write_shapes
from yolov7_deploy.detector import Detector
from yolov7_deploy.evaluation.accuracy import evaluate
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.model.configs import CONFIGS, find_variant
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.layer_table import Variant
from yolov7_deploy.model.scaling import scale
from yolov7_deploy.model.yolov7 import Yolov7
from yolov7_deploy.onnx_export.onnx_exporter import export_onnx
from yolov7_deploy.options import ExportOptions, TrainOptions, ValOptions
from yolov7_deploy.paper import TABLE_6, TABLE_7, TABLE_8, PaperRow
from yolov7_deploy.training.augment import Augmentation
from yolov7_deploy.training.dataloader import TrainLoader
from yolov7_deploy.training.dataset import ImageStore
from yolov7_deploy.training.distributed import DistributedContext
from yolov7_deploy.training.hyperparameters import Hyperparameters
from yolov7_deploy.training.optimizer import Schedule
from yolov7_deploy.training.train_step import TrainStep

# Rows as in the paper, with the options that select them.
TABLES: dict[int, tuple[str, tuple[PaperRow, ...], tuple[dict[str, object], ...]]] = {
    6: (
        "yolov7-e6",
        TABLE_6,
        (
            {"auxiliary": "none"},
            {"assigner": "independent"},
            {"assigner": "lead-guided"},
            {"assigner": "coarse-to-fine"},
        ),
    ),
    7: ("yolov7-e6", TABLE_7, ({"auxiliary": "none"}, {"constraint": False}, {"constraint": True})),
    8: ("yolov7-e6e", TABLE_8, ({"auxiliary": "none"}, {"auxiliary": "full"}, {"auxiliary": "partial"})),
}
WIDTH, DEPTH = 1 / 8, 1 / 3
SIZE, BATCH = 64, 16
SHAPES_SEED, TRAIN_IMAGES, VAL_IMAGES = 5, 512, 150
LEARNED_AP = 5.0  # below this the networks have hardly learned
# Whole images without mosaic: some hundred steps are too few to learn from quarters of such small images.
HYP = Hyperparameters(
    lr0=0.004, lrf=0.05, warmup_epochs=0.5, mosaic=0.0, mixup=0.0, paste_in=0.0, translate=0.1, scale=0.2, obj=2.0
)


def small_variant(name: str) -> Variant:
    """Return E6 or E6E with an eighth of the channels and a third of the depth."""
    config = scale(CONFIGS[name], depth=DEPTH, width=WIDTH, block_width=WIDTH)
    return replace(find_variant(name), name=f"{name}-small", size=SIZE, build_table=config.build_table)


def train_small(variant: Variant, dataset: Dataset, *, options: TrainOptions, steps: int) -> Yolov7:
    """Train from scratch, and return the moving average in eval mode."""
    torch.manual_seed(options.seed)
    model = Yolov7(variant, classes=len(dataset.class_names), training_form=True, auxiliary=options.auxiliary)
    store = ImageStore(dataset, size=SIZE, cache_bytes=2**28)
    loader = TrainLoader(store, Augmentation(hyp=HYP, size=SIZE), batch=BATCH, workers=0, seed=options.seed)
    epochs = math.ceil(steps / loader.steps)
    schedule = Schedule(
        hyp=HYP, epochs=epochs, steps_per_epoch=loader.steps, batch=BATCH, nominal_batch=BATCH, linear=False
    )
    trainer = TrainStep(
        model, hyp=HYP, options=replace(options, epochs=epochs), schedule=schedule, distributed=DistributedContext()
    )
    trainer.train()
    step = 0
    for epoch in range(epochs):
        for index, batch in enumerate(loader.epoch(epoch)):
            metrics = trainer.run(batch, epoch=epoch, step=step, epoch_step=index)
            assert metrics.is_finite, f"the loss of step {step} is not finite"
            step += 1
    loader.close()
    model.load_state_dict(trainer.ema.tensors)
    return model.eval()


def average_precision(model: Yolov7, dataset: Dataset, path: Path) -> dict[str, float]:
    """Export the model to a file, and return AP, AP50 and AP75 in percent."""
    fused = fuse(model)
    metadata = ModelMetadata(
        variant=model.variant.name, class_names=dataset.class_names, strides=fused.head.strides, anchors=fused.anchors
    )
    options = ExportOptions(input_hw=(SIZE, SIZE), nms="none", simplify=False)
    export_onnx(fused, metadata, options).save(path)
    with Detector(path, device="cpu") as detector:
        report = evaluate(detector, dataset, options=ValOptions(rect=False))
    path.unlink()
    return {"ap": 100 * report.ap, "ap50": 100 * report.ap50, "ap75": 100 * report.ap75}


def compare(table: int, data: str, *, seeds: int, steps: int, work: Path) -> dict[str, object]:
    """Train every row of a table with every seed, and return the rows beside the paper's."""
    name, rows, changes = TABLES[table]
    train, val = (as_single_class(open_dataset(source(data, work), split=split)) for split in ("train", "val"))
    measured: list[list[dict[str, float]]] = [[] for _ in rows]
    for seed in range(seeds):
        for row, change, results in zip(rows, changes, measured, strict=True):
            base = TrainOptions(batch=BATCH, nominal_batch=BATCH, img=SIZE, adam=True, seed=seed)
            options = replace(base, **change)  # type: ignore[arg-type]
            results.append(train_and_measure(name, train, val, options=options, steps=steps, work=work))
            print(f"seed {seed}, {row.model}: {results[-1]}", flush=True)
    compared = [
        summarize(row, change, own, measured[0]) for row, change, own in zip(rows, changes, measured, strict=True)
    ]
    return {
        "network": f"{name}, width x {WIDTH:g}, depth x {DEPTH:.3g}, {SIZE} pixels, one class",
        "data": f"{data}: {len(train)} images for training, {len(val)} for validation",
        "steps": steps,
        "batch": BATCH,
        "seeds": seeds,
        "rows": compared,
        "reading": reading(compared),
    }


def source(data: str, work: Path) -> Path:
    """Return the dataset YAML; `shapes` is generated once."""
    if data != "shapes":
        return Path(data)
    return write_shapes(work / "shapes", train=TRAIN_IMAGES, val=VAL_IMAGES, size=SIZE, seed=SHAPES_SEED)


def train_and_measure(
    name: str, train: Dataset, val: Dataset, *, options: TrainOptions, steps: int, work: Path
) -> dict[str, float]:
    """Return AP of a training, and its CPU seconds; a finished training of the work folder is not repeated."""
    chosen = (name, options.auxiliary, options.assigner, options.constraint, steps, options.seed)
    if options.auxiliary == "none":  # the other options are about auxiliary heads
        chosen = (name, "none", steps, options.seed)
    path = work / f"{'-'.join(map(str, chosen))}.json"
    if not path.exists():
        start = time.process_time()
        model = train_small(small_variant(name), train, options=options, steps=steps)
        result = average_precision(model, val, path.with_suffix(".onnx"))
        write_json({**result, "cpu_s": round(time.process_time() - start, 1)}, path)
    kept: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return kept


def summarize(
    row: PaperRow, change: dict[str, object], own: list[dict[str, float]], base: list[dict[str, float]]
) -> dict[str, object]:
    """Return a row: AP of each seed, the mean, and the difference from the first row with its 95 % interval."""
    assert row.val is not None
    ap, difference = ([r["ap"] for r in own], [r["ap"] - b["ap"] for r, b in zip(own, base, strict=True)])
    return {
        "paper_row": row.model,
        "options": change,
        "paper": {"ap": row.val.ap, "ap50": row.val.ap50, "ap75": row.val.ap75},
        "seeds": own,
        "mean": {key: round(float(np.mean([r[key] for r in own])), 2) for key in ("ap", "ap50", "ap75")},
        "ap_interval": interval(ap),
        "difference_from_base": round(float(np.mean(difference)), 2),
        "difference_interval": interval(difference),
    }


def interval(values: list[float]) -> list[float] | None:
    """Return the 95 % confidence interval of the mean (Student); `None` for a single value."""
    if len(values) < 2:
        return None
    half = student_t_quantile(0.975, len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    mean = float(np.mean(values))
    return [round(mean - half, 2), round(mean + half, 2)]


def reading(rows: list[dict[str, object]]) -> str:
    """Return in words which differences the intervals separate from zero, and whether AP is too low to tell."""
    shown = []
    for row in rows[1:]:
        bounds = row["difference_interval"]
        assert bounds is None or isinstance(bounds, list)
        verdict = "one seed tells nothing" if bounds is None else "not distinguishable from the base"
        if bounds is not None and not bounds[0] <= 0 <= bounds[1]:
            verdict = "better than the base" if bounds[0] > 0 else "worse than the base"
        shown.append(f"{row['paper_row']}: {row['difference_from_base']} AP, 95 % interval {bounds}: {verdict}")
    best = max(row["mean"]["ap"] for row in rows)  # type: ignore[index]
    early = f"AP is at most {best:g}: so early in training these rows say nothing about trained networks. "
    return early * (best < LEARNED_AP) + "; ".join(shown)


def text(result: dict[str, object]) -> str:
    """Return the rows as lines of a table."""
    lines = [f"{'row':30} {'paper AP':>8} {'AP here':>8}  95 % interval    difference, 95 % interval"]
    rows = result["rows"]
    assert isinstance(rows, list)
    for row in rows:
        lines.append(
            f"{row['paper_row']:30} {row['paper']['ap']:8.1f} {row['mean']['ap']:8.2f}  {row['ap_interval']!s:16} "
            f"{row['difference_from_base']:+.2f} {row['difference_interval']}"
        )
    return "\n".join(lines)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--table", type=int, choices=sorted(TABLES), required=True)
    arguments.add_argument("--data", default="shapes", help="`shapes`, or a dataset YAML (default: %(default)s)")
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--steps", type=int, default=192, help="training steps of 16 images for each row and seed")
    arguments.add_argument("--work", type=Path, help="folder for finished trainings (default: none are kept)")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        result = compare(options.table, options.data, seeds=options.seeds, steps=options.steps, work=work)
    print(text(result))
    path = RESULTS / options.machine / "ablations.json"
    earlier = json.loads(path.read_text(encoding="utf-8"))["result"] if path.exists() else {}
    tables = {**earlier, f"table_{options.table}": result}
    record("ablations", options.machine, {key: tables[key] for key in sorted(tables)})


if __name__ == "__main__":
    main()
