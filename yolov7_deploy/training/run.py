"""A whole training: data, network and loop put together by what was asked for."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from yolov7_deploy.checkpoint import Checkpoint, load_checkpoint
from yolov7_deploy.datasets import Dataset, open_dataset
from yolov7_deploy.datasets.class_filter import as_single_class, with_classes
from yolov7_deploy.datasets.statistics import describe_labels
from yolov7_deploy.errors import DatasetError, ImageError, TrainingError, UsageError
from yolov7_deploy.model.configs import Anchors, find_variant
from yolov7_deploy.model.yolov7 import Yolov7
from yolov7_deploy.tensorrt.memory_estimate import free_host_memory
from yolov7_deploy.training.augment import Augmentation
from yolov7_deploy.training.autoanchor import anchor_fit, fitted_anchors
from yolov7_deploy.training.batchnorm_recalibration import IMAGES, rebase_norms
from yolov7_deploy.training.callbacks import TrainCallback
from yolov7_deploy.training.checkpoints import LAST, STATE, remove_leftovers
from yolov7_deploy.training.config import TrainRequest
from yolov7_deploy.training.dataloader import TrainLoader
from yolov7_deploy.training.dataset import ImageStore
from yolov7_deploy.training.distributed import DistributedContext, open_world
from yolov7_deploy.training.initialization import require_variant, starting_model
from yolov7_deploy.training.loggers import RunLog, read_results, write_run
from yolov7_deploy.training.optimizer import Schedule
from yolov7_deploy.training.plots import draw_labels, draw_precision_recall, draw_results
from yolov7_deploy.training.resume_state import RunState, load_run_state
from yolov7_deploy.training.train_step import TrainStep, frozen_layers, training_sizes
from yolov7_deploy.training.trainer import Trainer, TrainReport

logger = logging.getLogger(__name__)

GIB = 2**30
FREE_PART = 0.25  # of the free memory, for prepared images
ENOUGH_RECALL = 0.98  # of anchors: below it new ones are worth fitting


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Data:
    train: Dataset
    val: Dataset
    sha256: str


def train(request: TrainRequest, *, watch: TrainCallback) -> TrainReport:
    """Trains what is asked for, from the beginning.

    Raises:
        UsageError: The request contradicts itself, or its folder already holds a training.
        DatasetError: Images or labels are missing or malformed.
        LoadError: The weights cannot be read.
        DeviceError: There is no such device, or its memory is too small; the message says which batch fits.
        TrainingError: The loss is no number any more.
        KeyboardInterrupt: Ctrl-C, after everything needed to go on was written.
    """
    folder = Path(request.folder)
    if (folder / STATE).exists():
        raise UsageError(
            f"{folder} already holds a training.",
            fix=f"Go on with it:  y7 train --resume --save-dir {folder}  or choose another folder",
        )
    with open_world(request.device) as world:
        request = world.agreed(_with_budget(request))
        folder = Path(request.folder)
        _check(request, world)
        checkpoint = load_checkpoint(request.weights) if request.weights else None
        variant = find_variant(request.variant)
        if checkpoint is not None:
            require_variant(checkpoint, request.variant)
        data = _open_data(request)
        watch.say(_about(data, request))
        anchors = checkpoint.anchors if checkpoint else variant.anchors
        anchors = _anchors(request, data, anchors, watch)
        start = starting_model(
            request.variant,
            data.train.class_names,
            checkpoint=checkpoint,
            anchors=anchors,
            auxiliary=request.options.auxiliary,
            seed=request.options.seed,
        )
        watch.say(f"{request.variant} from {start.words}, on {world.device}")
        state = RunState(
            request=request,
            data_sha256=data.sha256,
            class_names=data.train.class_names,
            anchors=start.model.anchors,
            world=world.size,
        )
        if world.is_first:
            _begin_folder(folder, request, data, checkpoint)
        world.wait()
        return _run(start.model, data, state, world, watch, resuming=False)


def resume(folder: Path, *, watch: TrainCallback, device: str | None = None, data: str | None = None) -> TrainReport:
    """Goes on with a training that was interrupted, exactly where its last state was written.

    Args:
        folder: Of that training.
        watch: Who looks on.
        device: Another one than before; the results are then no longer bit for bit the same.
        data: Where the dataset is now, if it was moved.

    Raises:
        LoadError: There is no state in the folder, or it is damaged.
        UsageError: The dataset is not the one it was, or the processes are not as many.
        Y7Error: Everything that `train` raises.
    """
    state, _ = load_run_state(folder / STATE)
    request = replace(state.request, folder=str(folder), data=data or state.request.data)  # they may have been moved
    with open_world(device or request.device) as world:
        opened = _open_data(request)
        if opened.sha256 != state.data_sha256:
            raise UsageError(
                f"{request.data} is not the dataset this training began with: images or labels differ.",
                fix=f"Begin anew from its weights:  y7 train --data D.yaml --weights {folder / LAST}",
            )
        if world.size != state.world:
            raise UsageError(
                f"This training ran in {state.world} processes, not in {world.size}.",
                fix=f"torchrun --nproc-per-node {state.world} -m yolov7_deploy train --resume --save-dir {folder}",
            )
        model = starting_model(
            request.variant, state.class_names, anchors=state.anchors, auxiliary=request.options.auxiliary
        ).model
        if world.is_first:
            remove_leftovers(folder)
        watch.say(f"goes on in epoch {state.epoch + 1} of {request.options.epochs}, after {state.step} steps of it")
        return _run(model, opened, replace(state, request=request), world, watch, resuming=True)


def _run(
    model: Yolov7, data: _Data, state: RunState, world: DistributedContext, watch: TrainCallback, *, resuming: bool
) -> TrainReport:
    request, folder = state.request, Path(state.request.folder)
    loader = _loader(data.train, request, world, stride=max(model.variant.strides))
    options = request.options
    schedule = Schedule(
        hyp=request.hyp,
        epochs=options.epochs,
        steps=loader.steps,
        batch=options.batch,
        nominal_batch=options.nominal_batch,
        linear=options.linear_lr,
    )
    try:
        if request.weights and options.rebase_bn and not resuming:
            model.to(world.device)
            few = islice(loader.epoch(0), -(-IMAGES // options.batch))
            frozen = frozen_layers(options.freeze, model)
            watch.say(rebase_norms(model, few, frozen=frozen, world=world).words())
        learner = TrainStep(model, hyp=request.hyp, options=options, schedule=schedule, world=world)
        with contextlib.ExitStack() as open_files:
            log = None
            if world.is_first:
                first_epoch = state.epoch + 1
                log = open_files.enter_context(RunLog(folder, tensorboard=request.tensorboard, first_epoch=first_epoch))
            trainer = Trainer(learner, loader, data.val, state=state, log=log, watch=watch)
            if resuming:
                trainer.resume()
            report = trainer.run()
            if log is not None:
                _draw(folder, report, data, log)
            return report
    finally:
        loader.close()


def _loader(dataset: Dataset, request: TrainRequest, world: DistributedContext, *, stride: int) -> TrainLoader:
    options = request.options
    budget = (options.cache_gib or 0) * GIB / world.size
    store = ImageStore(dataset, size=options.img, cache_bytes=int(budget))
    closes = options.epochs - options.close_mosaic if options.close_mosaic else None
    return TrainLoader(
        store,
        Augmentation(hyp=request.hyp, size=options.img, plain_from_epoch=closes),
        batch=options.batch // world.size,
        workers=options.workers,
        seed=options.seed,
        rank=world.rank,
        world=world.size,
        rect=options.rect,
        stride=stride,
        pin_memory=world.device.type == "cuda",
    )


def _with_budget(request: TrainRequest) -> TrainRequest:
    """With the memory for prepared images as a number, which decides how they are scaled where not all find room."""
    if request.options.cache_gib is not None:
        return request
    free = free_host_memory()
    gib = round(FREE_PART * free.size / GIB, 2) if free else 0.0
    return replace(request, options=replace(request.options, cache_gib=gib))


def _check(request: TrainRequest, world: DistributedContext) -> None:
    """Refuses what cannot be meant, before anything takes time."""
    options, variant = request.options, find_variant(request.variant)
    stride = max(variant.strides)
    if options.img % stride:
        up = -(-options.img // stride) * stride
        raise UsageError(f"--img {options.img} is no multiple of {variant.name}'s stride {stride}.", fix=f"--img {up}")
    if options.batch % world.size:
        up = -(-options.batch // world.size) * world.size
        raise UsageError(
            f"--batch {options.batch} cannot be shared by {world.size} processes.",
            fix=f"--batch {up} (of all together)",
        )
    if options.auxiliary != "partial" and not variant.has_auxiliary:
        raise UsageError(
            f"--auxiliary {options.auxiliary}: {variant.name} has no auxiliary heads.",
            fix="Leave it out, or --variant yolov7-w6, -e6, -d6 or -e6e",
        )
    smallest = training_sizes(options.img, stride)[0] if options.multi_scale else options.img
    together = options.batch if options.sync_bn else options.batch // world.size
    if together == 1 and smallest == stride:
        raise UsageError(
            f"One image of {smallest} pixels leaves {variant.name}'s BatchNorm one value a channel.",
            fix=f"--batch {2 * world.size}, or --img {options.img + stride}",
        )


def _open_data(request: TrainRequest) -> _Data:
    train_set, val_set = (open_dataset(request.data, split=split, cache=True) for split in ("train", "val"))
    if train_set.class_names != val_set.class_names:
        raise DatasetError(
            f"{request.data}: train and val have different classes.", fix="Make their annotations agree."
        )
    if request.classes:
        train_set, val_set = (with_classes(dataset, request.classes) for dataset in (train_set, val_set))
    if request.single_class:
        train_set, val_set = (as_single_class(dataset) for dataset in (train_set, val_set))
    for dataset in (train_set, val_set):
        dataset.require_boxes()
        _require_a_image(dataset)
    return _Data(train=train_set, val=val_set, sha256=_digest(train_set, val_set))


def _require_a_image(dataset: Dataset) -> None:
    """Returns when any image has a header, which is found out before anything takes time."""
    reasons = []
    for index in range(len(dataset)):
        try:
            dataset.image_hw(index)
        except ImageError as error:
            reasons.append(error.message)
        else:
            return
    raise DatasetError(
        f"None of the {len(dataset)} images of {dataset.source} can be read. The first: {reasons[0]}",
        fix="Check the images that its train and val name.",
    )


def _digest(*datasets: Dataset) -> str:
    """Of classes, names and labels; the pixels are not read."""
    digest = hashlib.sha256("\n".join(datasets[0].class_names).encode())
    for dataset in datasets:
        digest.update(len(dataset).to_bytes(8, "little"))
        for index in range(len(dataset)):
            labels = dataset.record(index).labels
            digest.update(dataset.path(index).name.encode("utf-8", "replace"))
            digest.update(labels.class_ids.tobytes() + labels.boxes.tobytes())
    return digest.hexdigest()


def _about(data: _Data, request: TrainRequest) -> str:
    counts = f"{len(data.train)} images to train on, {len(data.val)} to validate"
    problems = [*data.train.problems[:3], *data.val.problems[:3]]
    return "\n".join(
        [f"{request.data}: {counts}", describe_labels(data.train, size=request.options.img).words(), *problems]
    )


def _anchors(request: TrainRequest, data: _Data, anchors: Anchors, watch: TrainCallback) -> Anchors:
    """The anchors to train with: as they are, unless new ones are asked for and needed."""
    size, ratio = request.options.img, request.hyp.anchor_t
    fit = anchor_fit(data.train, anchors, size=size, anchor_t=ratio)
    watch.say(fit.words())
    if fit.best_possible_recall >= ENOUGH_RECALL:
        return anchors
    if not request.options.autoanchor:
        watch.say("anchors reach few of these targets; --autoanchor fits new ones")
        return anchors
    fitted = fitted_anchors(data.train, levels=len(anchors), size=size, anchor_t=ratio, seed=request.options.seed)
    better = anchor_fit(data.train, fitted, size=size, anchor_t=ratio)
    if better.best_possible_recall <= fit.best_possible_recall:
        return anchors
    watch.say(f"new anchors: {better.words()}")
    return fitted


def _begin_folder(folder: Path, request: TrainRequest, data: _Data, checkpoint: Checkpoint | None) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"{folder} cannot be made ({error.strerror}).", fix="--save-dir ANOTHER") from error
    source = {"source": checkpoint.source, "sha256": checkpoint.source_sha256} if checkpoint else None
    document = {
        "request": asdict(request),
        "command": sys.argv[1:],
        "data_sha256": data.sha256,
        "images": {"train": len(data.train), "val": len(data.val)},
        "classes": list(data.train.class_names),
        "weights": source,
    }
    write_run(folder, document)
    boxes, class_ids = _all_labels(data.train)
    draw_labels(class_ids, boxes, data.train.class_names, folder / "labels.png")


def _all_labels(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Boxes as cx, cy, w, h in fractions, and their classes."""
    labels = [dataset.record(index).labels for index in range(len(dataset))]
    corners = np.concatenate([one.boxes[~one.crowd] for one in labels])
    boxes = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], axis=1)
    return boxes, np.concatenate([one.class_ids[~one.crowd] for one in labels])


def _draw(folder: Path, report: TrainReport, data: _Data, log: RunLog) -> None:
    draw_results(read_results(log.path), folder / "results.png")
    curves = report.accuracy.curves if report.accuracy else None
    if curves is not None:
        draw_precision_recall(curves, data.val.class_names, folder / "precision_recall.png")


def report_document(report: TrainReport) -> dict[str, object]:
    """The same for machines."""
    return {
        "folder": str(report.folder),
        "weights": str(report.weights),
        "epochs": report.epochs,
        "best_epoch": report.best_epoch,
        "accuracy": report.accuracy.to_dict() if report.accuracy else None,
        "unreadable": list(report.unreadable),
        "seconds": report.seconds,
    }


def describe_report(report: TrainReport) -> Sequence[str]:
    """What came of it, for people."""
    lines = []
    if report.accuracy is not None and report.accuracy.ap is not None:
        lines.append(
            f"best epoch {report.best_epoch} of {report.epochs}: AP {report.accuracy.ap:.4f}, "
            f"AP50 {report.accuracy.ap50 or 0:.4f} on {report.accuracy.images} images"
        )
    lines.append(f"{report.seconds / 60:.1f} minutes; weights in {report.weights}, charts beside them")
    lines.append(f"Next:  y7 export --weights {report.weights}")
    return lines
