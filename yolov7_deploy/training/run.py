"""A complete training run: open the dataset, build model, loader and trainer as requested, train or resume."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from yolov7_deploy._atomic_file import remove_partial_files
from yolov7_deploy._console import plural
from yolov7_deploy._output_folder import lock_run_folder
from yolov7_deploy._process import keep_freed_memory
from yolov7_deploy.checkpoint import Checkpoint, load_checkpoint
from yolov7_deploy.checkpoint.quantization import TrainedQuantization
from yolov7_deploy.datasets import Dataset, open_dataset
from yolov7_deploy.datasets.samples import as_single_class, select_classes
from yolov7_deploy.datasets.statistics import describe_labels
from yolov7_deploy.errors import DatasetError, ImageError, UsageError
from yolov7_deploy.evaluation.plots import draw_evaluation
from yolov7_deploy.hardware.system import free_host_memory
from yolov7_deploy.model.configs import find_variant
from yolov7_deploy.model.layer_table import Anchors
from yolov7_deploy.model.yolov7 import Yolov7
from yolov7_deploy.options import TrainOptions
from yolov7_deploy.training.augment import Augmentation
from yolov7_deploy.training.autoanchor import evaluate_anchors, fit_anchors
from yolov7_deploy.training.batchnorm_recalibration import IMAGES, recalibrate_batchnorm
from yolov7_deploy.training.checkpoints import (
    LAST,
    STATE,
    RunState,
    TrainRequest,
    load_run_state,
)
from yolov7_deploy.training.dataloader import TrainLoader
from yolov7_deploy.training.dataset import ImageStore
from yolov7_deploy.training.distributed import DistributedContext, init_distributed, launch_command
from yolov7_deploy.training.initialization import initialize_model, refuse_quantized, require_variant
from yolov7_deploy.training.loggers import RunLog, TrainCallback, read_results, write_run
from yolov7_deploy.training.optimizer import Schedule
from yolov7_deploy.training.plots import draw_labels, draw_results
from yolov7_deploy.training.train_step import TrainStep, frozen_layers, multi_scale_sizes
from yolov7_deploy.training.trainer import Trainer, TrainReport

GIB = 2**30
CACHE_FRACTION = 0.25  # of the free memory, for cached images
MAX_NOTES = 10  # printed about each dataset
# Options without effect in quantization-aware training.
_NOT_WITH_QAT = ("--freeze", "--autoanchor", "--auxiliary", "--half")
SUFFICIENT_RECALL = 0.98  # best possible recall of anchors, below which new ones are fitted


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Datasets:
    """Training and validation dataset, and the digest of their labels."""

    train: Dataset
    val: Dataset
    sha256: str


def train(request: TrainRequest, *, callback: TrainCallback) -> TrainReport:
    """Start a training run.

    Args:
        request: The training run to start.
        callback: Receives messages, progress and metrics.

    Raises:
        UsageError: The options contradict each other, the folder already has a training run, or another process trains
            in it.
        DatasetError: Images or labels are missing or malformed.
        LoadError: The weights cannot be read.
        DeviceError: The device does not exist, or is out of memory; the message names the batch size that fits.
        TrainingError: The loss is not finite, or the state of the run cannot be written.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP, after the state was saved; see `Interrupted`.
    """
    _refuse_existing_run(Path(request.folder))
    with init_distributed(request.device) as distributed:
        request = distributed.broadcast(_resolve_cache(request))
        folder = Path(request.folder)
        _check_request(request, distributed)
        if request.qat is not None:  # FP16 would round what INT8 represents exactly
            request = replace(request, options=replace(request.options, half=False))
        checkpoint = load_checkpoint(request.weights) if request.weights else None
        if checkpoint is not None:
            refuse_quantized(checkpoint)
            require_variant(checkpoint, request.variant)
        datasets = _open_datasets(request)
        callback.on_message(_describe_datasets(datasets, request))
        anchors = checkpoint.anchors if checkpoint else find_variant(request.variant).anchors
        anchors = _select_anchors(request, datasets, anchors, callback)
        model, quantization = _initialize(request, checkpoint, anchors, datasets, distributed, callback)
        state = RunState(
            request=request,
            data_sha256=datasets.sha256,
            class_names=datasets.train.class_names,
            anchors=model.anchors,
            world_size=distributed.world_size,
            weights_sha256=checkpoint.source_sha256 if checkpoint else "",
            quantization=quantization,
        )
        with _lock(folder, distributed):
            if distributed.is_main_process:
                _refuse_existing_run(folder)
                _create_folder(folder, request, datasets, checkpoint)
            distributed.barrier()
            return _run(model, datasets, state, distributed, callback, resuming=False)


def resume(folder: Path, *, callback: TrainCallback, device: str | None = None, data: str | None = None) -> TrainReport:
    """Resume an interrupted training run from its last saved state; the result is that of an uninterrupted run.

    Args:
        folder: Folder of the run.
        callback: Receives messages, progress and metrics.
        device: Another device; the results are then not bit-identical.
        data: Another path of the dataset, if it was moved.

    Raises:
        LoadError: The folder does not have a state, or it is damaged.
        UsageError: The run is still running, the dataset has changed, or the number of processes is different.
        Y7Error: All errors of `train`.
    """
    state, _ = load_run_state(folder, with_tensors=False)
    with init_distributed(device or state.request.device) as distributed, _lock(folder, distributed):
        # Again, because the run may have gone on until the lock was free.
        state, _ = load_run_state(folder, with_tensors=False)
        if distributed.world_size != state.world_size:
            raise UsageError(
                f"This run was started with {plural(state.world_size, 'process')}, not with {distributed.world_size}.",
                fix=f"{launch_command(state.world_size)} train --resume --save-dir {folder}",
            )
        # Both may have been moved.
        request = replace(state.request, folder=str(folder), data=data or state.request.data)
        datasets = _open_datasets(request)
        if datasets.sha256 != state.data_sha256:
            raise UsageError(
                f"{request.data} is not the dataset that this run was started with: images or labels differ.",
                fix=f"Start a new training from its weights:  y7 train --data D.yaml --weights {folder / LAST}",
            )
        model = _restore(state)
        if distributed.is_main_process:
            remove_partial_files(folder)
        callback.on_message(_describe_resume(state, folder))
        return _run(model, datasets, replace(state, request=request), distributed, callback, resuming=True)


def _describe_resume(state: RunState, folder: Path) -> str:
    """Return where a run resumes, or that a finished one only writes its results again."""
    epochs = state.request.options.epochs
    if state.is_finished:
        return (
            f"this run is finished (epoch {state.epoch} of {epochs}): its results are written again; "
            f"to train longer, start a new one with --weights {folder / LAST}"
        )
    return f"resuming in epoch {state.epoch + 1} of {epochs}, after {state.step} of its steps"


def _initialize(
    request: TrainRequest,
    checkpoint: Checkpoint | None,
    anchors: Anchors,
    datasets: _Datasets,
    distributed: DistributedContext,
    callback: TrainCallback,
) -> tuple[Yolov7, TrainedQuantization | None]:
    """Return the model of a new run, and the INT8 quantization that it is trained for, if any."""
    if request.qat is not None:
        from yolov7_deploy.training.qat import initialize_qat  # imports onnxruntime

        assert checkpoint is not None, "_check_request has refused it"
        start = initialize_qat(
            checkpoint, request, datasets.train.class_names, distributed=distributed, callback=callback
        )
        return start.model, start.quantization
    initialized = initialize_model(
        request.variant,
        datasets.train.class_names,
        checkpoint=checkpoint,
        anchors=anchors,
        auxiliary=request.options.auxiliary,
        seed=request.options.seed,
    )
    callback.on_message(f"{request.variant} from {initialized.summary}, on {distributed.device}")
    return initialized.model, None


def _restore(state: RunState) -> Yolov7:
    """Return a model of the form of a run's, into which its state is loaded."""
    variant = state.request.variant
    if state.quantization is not None:
        from yolov7_deploy.training.qat import restore_qat

        return restore_qat(variant, state.anchors, len(state.class_names), state.quantization)
    auxiliary = state.request.options.auxiliary
    return initialize_model(variant, state.class_names, anchors=state.anchors, auxiliary=auxiliary).model


def _refuse_existing_run(folder: Path) -> None:
    if (folder / STATE).exists():
        raise UsageError(
            f"{folder} already has a training run.",
            fix=f"Resume it:  y7 train --resume --save-dir {folder}  or choose another folder",
        )


def _lock(folder: Path, distributed: DistributedContext) -> contextlib.AbstractContextManager[None]:
    """Lock the folder in the main process; the others wait for it in their first collective."""
    return lock_run_folder(folder) if distributed.is_main_process else contextlib.nullcontext()


def _run(
    model: Yolov7,
    datasets: _Datasets,
    state: RunState,
    distributed: DistributedContext,
    callback: TrainCallback,
    *,
    resuming: bool,
) -> TrainReport:
    request, options, folder = state.request, state.request.options, Path(state.request.folder)
    if distributed.device.type == "cpu":
        keep_freed_memory()
    with contextlib.ExitStack() as stack:
        loader = _create_loader(datasets.train, request, distributed, stride=max(model.variant.strides))
        stack.callback(loader.close)
        if request.weights and request.qat is None and options.recalibrate_bn and not resuming:
            _recalibrate_batchnorm(model, request, loader, distributed, callback)
        schedule = Schedule(
            hyp=request.hyp,
            epochs=options.epochs,
            steps_per_epoch=loader.steps,
            batch=options.batch,
            nominal_batch=options.nominal_batch,
            linear=options.linear_lr,
        )
        train_step = TrainStep(model, hyp=request.hyp, options=options, schedule=schedule, distributed=distributed)
        log = None
        if distributed.is_main_process:
            first_epoch = state.epoch + 1
            log = stack.enter_context(RunLog(folder, tensorboard=request.tensorboard, first_epoch=first_epoch))
        trainer = Trainer(train_step, loader, datasets.val, state=state, log=log, callback=callback)
        if resuming:
            trainer.resume()
        elif request.qat is not None:
            trainer.validate_start()
        report = trainer.run()
        if log is not None:
            _draw_charts(folder, report, datasets, log)
        return report


def _recalibrate_batchnorm(
    model: Yolov7, request: TrainRequest, loader: TrainLoader, distributed: DistributedContext, callback: TrainCallback
) -> None:
    model.to(distributed.device)
    batches = islice(loader.epoch(0), -(-IMAGES // request.options.batch))
    frozen = frozen_layers(request.options.freeze, model.variant)
    callback.on_message(recalibrate_batchnorm(model, batches, frozen=frozen, distributed=distributed).summary())


def _create_loader(
    dataset: Dataset, request: TrainRequest, distributed: DistributedContext, *, stride: int
) -> TrainLoader:
    options = request.options
    cache_bytes = (options.cache_gib or 0) * GIB / distributed.world_size
    store = ImageStore(dataset, size=options.img, cache_bytes=int(cache_bytes))
    close_mosaic_epoch = options.epochs - options.close_mosaic if options.close_mosaic else None
    return TrainLoader(
        store,
        Augmentation(hyp=request.hyp, size=options.img, close_mosaic_epoch=close_mosaic_epoch),
        batch=options.batch // distributed.world_size,
        workers=options.workers,
        seed=options.seed,
        rank=distributed.rank,
        world_size=distributed.world_size,
        rect=options.rect,
        stride=stride,
        pin_memory=distributed.device.type == "cuda",
    )


def _resolve_cache(request: TrainRequest) -> TrainRequest:
    """Return the request with the size of the image cache as a number.

    The number is stored with the run, because it decides how images are scaled if not all of them fit.
    """
    if request.options.cache_gib is not None:
        return request
    free = free_host_memory()
    gib = round(CACHE_FRACTION * free.size / GIB, 2) if free else 0.0
    return replace(request, options=replace(request.options, cache_gib=gib))


def _check_request(request: TrainRequest, distributed: DistributedContext) -> None:
    """Refuse options that contradict each other, before any long operation."""
    options, variant, processes = request.options, find_variant(request.variant), distributed.world_size
    stride = max(variant.strides)
    if options.img % stride:
        larger = -(-options.img // stride) * stride
        raise UsageError(
            f"--img {options.img} is not a multiple of {variant.name}'s stride {stride}.", fix=f"--img {larger}"
        )
    if options.batch % processes:
        larger = -(-options.batch // processes) * processes
        raise UsageError(
            f"--batch {options.batch} cannot be split over {processes} processes.",
            fix=f"--batch {larger} (of all processes together)",
        )
    if options.auxiliary != "partial" and not variant.has_auxiliary:
        raise UsageError(
            f"--auxiliary {options.auxiliary}: {variant.name} does not have auxiliary heads.",
            fix="Leave it out, or --variant yolov7-w6, -e6, -d6 or -e6e",
        )
    frozen_layers(options.freeze, variant)
    if request.qat is not None:
        _check_qat_options(options, request.weights)
        return
    smallest = multi_scale_sizes(options.img, stride)[0] if options.multi_scale else options.img
    norm_images = options.batch if options.sync_bn else options.batch // processes
    if norm_images == 1 and smallest == stride:
        raise UsageError(
            f"With one image of {smallest} pixels, BatchNorm layers of {variant.name} have one value per channel.",
            fix=f"--batch {2 * processes}, or --img {options.img + stride}",
        )


def _check_qat_options(options: TrainOptions, weights: str) -> None:
    """Check that no option contradicts quantization-aware training."""
    if not weights:
        raise UsageError(
            "--qat trains weights for INT8 that already detect well in float.",
            fix="Add them:  --weights runs/train/exp/best.safetensors",
        )
    values = (options.freeze, options.autoanchor, options.auxiliary != "partial", options.half)
    for option, value in zip(_NOT_WITH_QAT, values, strict=True):
        if value:
            raise UsageError(
                f"{option} cannot be used with --qat, which trains the fused network, with all its layers and its "
                "anchors, in FP32.",
                fix="Leave it out, or use it in a training without --qat first.",
            )


def _open_datasets(request: TrainRequest) -> _Datasets:
    if Path(request.data).suffix.lower() == ".json":
        raise UsageError(
            f"{request.data} has one split; a training needs images to train on and others to validate on.",
            fix="Name a JSON file for each in a dataset YAML:  annotations: {train: train.json, val: val.json}",
        )
    train_set, val_set = (open_dataset(request.data, split=split, cache=True) for split in ("train", "val"))
    if request.classes:
        train_set, val_set = (select_classes(dataset, request.classes) for dataset in (train_set, val_set))
    if request.single_class:
        train_set, val_set = (as_single_class(dataset) for dataset in (train_set, val_set))
    for dataset in (train_set, val_set):
        dataset.require_boxes()
        _require_readable_image(dataset)
    return _Datasets(train=train_set, val=val_set, sha256=_digest(train_set, val_set))


def _require_readable_image(dataset: Dataset) -> None:
    """Check that at least one image has a readable header, before any long operation."""
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
    """Return the SHA-256 of class names, file names and labels; pixels are not read."""
    digest = hashlib.sha256("\n".join(datasets[0].class_names).encode())
    for dataset in datasets:
        digest.update(len(dataset).to_bytes(8, "little"))
        for index in range(len(dataset)):
            labels = dataset.record(index).labels
            digest.update(dataset.path(index).name.encode("utf-8", "replace"))
            digest.update(labels.class_ids.tobytes() + labels.boxes.tobytes() + labels.crowd.tobytes())
            for polygon in labels.polygons:
                digest.update(len(polygon).to_bytes(8, "little") + polygon.tobytes())
    return digest.hexdigest()


def _describe_datasets(datasets: _Datasets, request: TrainRequest) -> str:
    statistics = describe_labels(datasets.train, image_size=request.options.img)
    lines = [
        f"{request.data}: {plural(len(datasets.train), 'training image')}, "
        f"{plural(len(datasets.val), 'validation image')}",
        statistics.summary(),
        *(f"train: {note}" for note in _first_notes(datasets.train)),
        *(f"val: {note}" for note in _first_notes(datasets.val)),
    ]
    return "\n".join(lines)


def _first_notes(dataset: Dataset) -> Sequence[str]:
    notes = dataset.notes
    return notes if len(notes) <= MAX_NOTES else (*notes[:MAX_NOTES], f"and {len(notes) - MAX_NOTES} more notes")


def _select_anchors(request: TrainRequest, datasets: _Datasets, anchors: Anchors, callback: TrainCallback) -> Anchors:
    """Return the given anchors, or new ones if `autoanchor` is set and their recall is too low."""
    options, dataset, anchor_t = request.options, datasets.train, request.hyp.anchor_t
    fit = evaluate_anchors(dataset, anchors, image_size=options.img, anchor_t=anchor_t)
    callback.on_message(fit.summary())
    if fit.best_possible_recall >= SUFFICIENT_RECALL:
        return anchors
    if not options.autoanchor:
        callback.on_message("the anchors do not fit these objects well; --autoanchor fits new ones")
        return anchors
    fitted = fit_anchors(dataset, levels=len(anchors), image_size=options.img, anchor_t=anchor_t, seed=options.seed)
    fitted_fit = evaluate_anchors(dataset, fitted, image_size=options.img, anchor_t=anchor_t)
    if fitted_fit.best_possible_recall <= fit.best_possible_recall:
        callback.on_message("new anchors do not fit better; the current ones are kept")
        return anchors
    callback.on_message(f"new anchors: {fitted_fit.summary()}")
    return fitted


def _create_folder(folder: Path, request: TrainRequest, datasets: _Datasets, checkpoint: Checkpoint | None) -> None:
    document = {
        "request": asdict(request),
        "data_sha256": datasets.sha256,
        "images": {"train": len(datasets.train), "val": len(datasets.val)},
        "classes": list(datasets.train.class_names),
        "weights": {"source": checkpoint.source, "sha256": checkpoint.source_sha256} if checkpoint else None,
    }
    write_run(folder, document)
    boxes_cxcywh, class_ids = _all_labels(datasets.train)
    draw_labels(class_ids, boxes_cxcywh, datasets.train.class_names, folder / "labels.png")


def _all_labels(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes as cx, cy, w, h in fractions of the image, and class ids, without crowd regions."""
    labels = [dataset.record(index).labels.without_crowd() for index in range(len(dataset))]
    corners = np.concatenate([item.boxes for item in labels])
    boxes = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], axis=1)
    return boxes, np.concatenate([item.class_ids for item in labels])


def _draw_charts(folder: Path, report: TrainReport, datasets: _Datasets, log: RunLog) -> None:
    draw_results(read_results(log.path), folder / "results.png")
    if report.accuracy is not None:
        draw_evaluation(report.accuracy, datasets.val, folder)
