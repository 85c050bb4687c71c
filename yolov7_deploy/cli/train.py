"""`y7 train`: train a model on a dataset, from random or given weights, or resume a training run."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from yolov7_deploy._output import echo, note
from yolov7_deploy._output_folder import new_run_folder
from yolov7_deploy.cli.options import (
    ExistOk,
    JsonPath,
    Name,
    SaveDir,
    complete_weights,
    locate_weights,
    one_of,
    parse_classes,
    parse_img,
    was_given,
)
from yolov7_deploy.cli.quantize import Int8Target, ReduceRange, int8_options
from yolov7_deploy.errors import UsageError
from yolov7_deploy.options import ASSIGNERS, AUXILIARY_HEADS, TrainOptions
from yolov7_deploy.paper import VARIANTS

if TYPE_CHECKING:
    from yolov7_deploy.training.checkpoints import QatOptions
    from yolov7_deploy.training.hyperparameters import Hyperparameters
    from yolov7_deploy.training.loggers import EpochRecord
    from yolov7_deploy.training.trainer import TrainReport

RUNS = Path("runs/train")
DEFAULTS = TrainOptions()
DEFAULT_WORKERS = min(DEFAULTS.workers, os.cpu_count() or 1)
# Options that are allowed together with --resume.
RESUME_OPTIONS = {"resume", "project", "name", "save_dir", "data", "device", "json_path", "quiet", "verbose"}
_QAT_OPTIONS = {"calib": "--calib", "int8_target": "--int8-target", "reduce_range": "--reduce-range"}
NO_DATA = UsageError(
    "y7 train needs --data.", fix="y7 train --data data.yaml, or a generated dataset:  y7 shapes --output shapes"
)
FROM_SCRATCH = """\
WARNING: neither --weights nor --variant is given, so yolov7 is trained from RANDOM weights. That takes a dataset as
large as COCO and about 300 epochs. To fine-tune published weights:  --weights yolov7  or  --weights yolov7-tiny"""
HEADING = " epoch     box     obj     cls       P       R    AP50      AP   img/s      GB       s     left"

Data = Annotated[Path | None, typer.Option("--data", help="Dataset YAML with train and val; see also `y7 shapes`.")]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        "-w",
        metavar="FILE",
        autocompletion=complete_weights,
        help="Initial weights: a file or an official name (default: random).",
    ),
]
VariantName = Annotated[
    str | None,
    one_of(
        tuple(VARIANTS),
        "--variant",
        text="Network (default: that of --weights, else yolov7), or one of the paper's ablations (docs/ablations.md).",
    ),
]
Hyp = Annotated[
    str | None,
    typer.Option(
        "--hyp",
        metavar="tiny|p5|p6|custom|qat|FILE",
        help="Hyperparameters (default: by variant; custom with --weights; qat with --qat).",
    ),
]
SetValues = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Set a hyperparameter: lr0=0.001. Repeatable."),
]
ShowHyp = Annotated[bool, typer.Option("--show-hyp", help="Print the hyperparameters as YAML and exit.")]
Epochs = Annotated[int, typer.Option("--epochs", help="Number of epochs.")]
BatchSize = Annotated[int, typer.Option("--batch", "--batch-size", help="Images per step, over all processes.")]
NominalBatch = Annotated[
    int, typer.Option("--nominal-batch", help="Images per weight update, with gradient accumulation.")
]
Img = Annotated[
    str, typer.Option("--img", "--img-size", "--imgsz", metavar="SIZE", help="Height and width of images in pixels.")
]
Device = Annotated[
    str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda:0, or 0; for several GPUs use torchrun.")
]
Workers = Annotated[int, typer.Option("--workers", help="Data loading processes; 0 loads in the training process.")]
Cache = Annotated[
    float | None,
    typer.Option("--cache", help="GiB of memory for cached images (default: a quarter of the free memory)."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Resume the run in --save-dir, or the newest unfinished one in --project.")
]
Project = Annotated[Path, typer.Option("--project", help="Folder of all runs.")]
Seed = Annotated[int, typer.Option("--seed", help="Random seed.")]
Freeze = Annotated[
    str | None,
    typer.Option(
        "--freeze", metavar="LAYERS", help="Layers to freeze: 50 for the first fifty, or a list such as 0,1,2."
    ),
]
Classes = Annotated[
    list[str] | None,
    typer.Option(
        "--classes", metavar="CLASSES", help="Train on these classes only: names or numbers, 'person,dog' or '0 16'."
    ),
]
SingleClass = Annotated[bool, typer.Option("--single-cls", help="Merge all classes into one.")]
MultiScale = Annotated[bool, typer.Option("--multi-scale", help="Random image sizes from 0.5 to 1.5 times --img.")]
Rect = Annotated[bool, typer.Option("--rect", help="Batches of images of similar aspect ratio, without mosaic.")]
CloseMosaic = Annotated[
    int, typer.Option("--close-mosaic", help="Number of last epochs without mosaic, mixup and copy-paste.")
]
ImageWeights = Annotated[bool, typer.Option("--image-weights", help="Sample images of classes with low AP more often.")]
AutoAnchor = Annotated[
    bool, typer.Option("--autoanchor/--noautoanchor", help="Fit new anchors if the recall of the current ones is low.")
]
Half = Annotated[
    bool | None,
    typer.Option("--half/--no-half", help="Mixed precision: float16 on a GPU (default there), bfloat16 on a CPU."),
]
Adam = Annotated[bool, typer.Option("--adam", help="AdamW instead of SGD.")]
LinearLr = Annotated[bool, typer.Option("--linear-lr", help="Linear instead of cosine decay of the learning rate.")]
SyncBn = Annotated[bool, typer.Option("--sync-bn/--no-sync-bn", help="Synchronize BatchNorm over all processes.")]
RecalibrateBn = Annotated[
    bool,
    typer.Option(
        "--recalibrate-bn/--no-recalibrate-bn",
        help="With --weights: compute the BatchNorm statistics on the training images first.",
    ),
]
Patience = Annotated[
    int, typer.Option("--patience", help="Stop after this many epochs without improvement; 0 never stops early.")
]
ValEvery = Annotated[
    int,
    typer.Option("--val-every", help="Number of epochs between validations; 0 validates only after the last epoch."),
]
SaveMinutes = Annotated[
    float, typer.Option("--save-minutes", help="Minutes between saved training states within an epoch.")
]
Ota = Annotated[
    bool, typer.Option("--ota/--no-ota", help="Assign positives with SimOTA, or use every candidate as in YOLOv5.")
]
Assigner = Annotated[
    str, one_of(ASSIGNERS, "--assigner", text="How labels are assigned to auxiliary heads (paper, table 6).")
]
Constraint = Annotated[
    bool,
    typer.Option(
        "--constraint/--no-constraint", help="Limit how far the centres of auxiliary heads may move (paper, table 7)."
    ),
]
Auxiliary = Annotated[
    str,
    one_of(
        AUXILIARY_HEADS, "--auxiliary", text="Auxiliary heads of W6, E6, D6 and E6E; full is for E6E (paper, table 8)."
    ),
]
Qat = Annotated[
    bool, typer.Option("--qat", help="Quantization-aware training: train --weights for INT8; see docs/int8.md.")
]
QatCalib = Annotated[
    str | None,
    typer.Option("--calib", help="With --qat: calibration images or file (default: the training images of --data)."),
]
TensorBoard = Annotated[
    bool | None,
    typer.Option("--tensorboard/--no-tensorboard", help="Write TensorBoard events (default: if it is installed)."),
]


def train(
    context: typer.Context,
    *,
    data: Data = None,
    weights: Weights = None,
    variant: VariantName = None,
    hyp: Hyp = None,
    set_values: SetValues = None,
    show_hyp: ShowHyp = False,
    epochs: Epochs = DEFAULTS.epochs,
    batch: BatchSize = DEFAULTS.batch,
    nominal_batch: NominalBatch = DEFAULTS.nominal_batch,
    img: Img = str(DEFAULTS.img),
    device: Device = "auto",
    workers: Workers = DEFAULT_WORKERS,
    cache: Cache = DEFAULTS.cache_gib,
    resume: Resume = False,
    project: Project = RUNS,
    name: Name = "exp",
    exist_ok: ExistOk = False,
    save_dir: SaveDir = None,
    seed: Seed = DEFAULTS.seed,
    freeze: Freeze = None,
    classes: Classes = None,
    single_class: SingleClass = False,
    multi_scale: MultiScale = DEFAULTS.multi_scale,
    rect: Rect = DEFAULTS.rect,
    close_mosaic: CloseMosaic = DEFAULTS.close_mosaic,
    image_weights: ImageWeights = DEFAULTS.image_weights,
    autoanchor: AutoAnchor = DEFAULTS.autoanchor,
    half: Half = DEFAULTS.half,
    adam: Adam = DEFAULTS.adam,
    linear_lr: LinearLr = DEFAULTS.linear_lr,
    sync_bn: SyncBn = DEFAULTS.sync_bn,
    recalibrate_bn: RecalibrateBn = DEFAULTS.recalibrate_bn,
    patience: Patience = DEFAULTS.patience,
    val_every: ValEvery = DEFAULTS.val_every,
    save_minutes: SaveMinutes = DEFAULTS.save_minutes,
    ota: Ota = DEFAULTS.ota,
    assigner: Assigner = DEFAULTS.assigner,
    constraint: Constraint = DEFAULTS.constraint,
    auxiliary: Auxiliary = DEFAULTS.auxiliary,
    qat: Qat = False,
    calib: QatCalib = None,
    int8_target: Int8Target = "auto",
    reduce_range: ReduceRange = None,
    tensorboard: TensorBoard = None,
    json_path: JsonPath = None,
) -> None:
    """Train a model on a dataset, or resume a training run.

    Example:  y7 train --data data.yaml --weights yolov7-tiny --epochs 100
    """
    options = _options(context.params)
    if resume:
        _resume(context)
        return
    qat_options = _qat_options(qat, calib, int8_target, reduce_range, to_stderr=json_path == "-")
    _start(
        data=data, save_dir=save_dir, new_folder=functools.partial(new_run_folder, project / name, exist_ok=exist_ok),
        variant=variant, weights=weights, device=device, classes=classes, single_class=single_class, hyp=hyp,
        set_values=set_values, show_hyp=show_hyp, tensorboard=tensorboard, options=options, qat=qat_options,
        json_path=json_path,
    )  # fmt: skip


def _options(values: Mapping[str, Any]) -> TrainOptions:
    """Return the options of the values of all parameters."""
    same = {field.name: values[field.name] for field in fields(TrainOptions) if field.name in values}
    parsed = {"img": _square_size(values["img"]), "freeze": _parse_layers(values["freeze"])}
    return TrainOptions(**{**same, **parsed, "cache_gib": values["cache"]})


def _qat_options(
    qat: bool, calib: str | None, int8_target: str, reduce_range: bool | None, *, to_stderr: bool
) -> QatOptions | None:
    """Return the options of quantization-aware training; `None` without `--qat`."""
    if not qat:
        for name, option in _QAT_OPTIONS.items():
            if was_given(name):
                raise UsageError(f"{option} has no effect without --qat.", fix="Add  --qat")
        return None
    from yolov7_deploy.training.checkpoints import QatOptions

    int8 = int8_options(int8_target, reduce_range, to_stderr=to_stderr)
    return QatOptions(calib=calib or "", target=int8.target, reduce_range=int8.reduce_range)


def _start(
    *,
    data: Path | None,
    save_dir: Path | None,
    new_folder: Callable[[], AbstractContextManager[Path]],
    variant: str | None,
    weights: str | None,
    device: str,
    classes: list[str] | None,
    single_class: bool,
    hyp: str | None,
    set_values: list[str] | None,
    show_hyp: bool,
    tensorboard: bool | None,
    options: TrainOptions,
    qat: QatOptions | None,
    json_path: str | None,
) -> None:
    from yolov7_deploy.datasets import check_dataset_file
    from yolov7_deploy.training.hyperparameters import default_preset
    from yolov7_deploy.workflows.functions import initial_weights

    if not show_hyp:
        if data is None:
            raise NO_DATA
        check_dataset_file(data)
    path, name = initial_weights(weights, variant, find=locate_weights)
    preset = hyp or default_preset(name, pretrained=path is not None, qat=qat is not None)
    recipe = _read_recipe(preset, set_values, show=show_hyp)
    from yolov7_deploy.training.checkpoints import TrainRequest
    from yolov7_deploy.training.run import train as start_training

    if weights is variant is None and _is_main_process():
        echo(FROM_SCRATCH, err=True)
    with contextlib.ExitStack() as stack:
        if save_dir is None:  # the main process sends its folder to the others
            save_dir = stack.enter_context(new_folder()) if _is_main_process() else RUNS
        request = TrainRequest(
            data=str(data),
            folder=str(save_dir),
            variant=name,
            weights=str(path or ""),
            device=device,
            classes=tuple(parse_classes(classes) or ()),
            single_class=single_class,
            tensorboard=tensorboard,
            hyp=recipe,
            options=options,
            qat=qat,
        )
        callback = ConsoleCallback(json_path)
        callback.on_message(
            f"hyperparameters {preset}{' and --set' * bool(set_values)}; epochs {options.epochs}, "
            f"batch {options.batch}, images {options.img}x{options.img}; results in {save_dir}"
        )
        _print_report(start_training(request, callback=callback), json_path)


def _resume(context: typer.Context) -> None:
    """Resume the run of `--save-dir` or `--name`, or the newest unfinished one."""
    values = context.params
    folder = values["save_dir"] or values["project"] / values["name"]
    for parameter in context.command.params:
        if parameter.name and parameter.name not in RESUME_OPTIONS and was_given(parameter.name):
            raise UsageError(
                f"{parameter.opts[0]} cannot be changed with --resume: a run keeps the options it was started with.",
                fix=f"Leave it out, or start a new run from its weights:  --weights {folder / 'last.safetensors'}",
            )
    from yolov7_deploy.training.checkpoints import find_unfinished_run
    from yolov7_deploy.training.run import resume

    report = resume(
        folder if values["save_dir"] or was_given("name") else find_unfinished_run(values["project"]),
        callback=ConsoleCallback(values["json_path"]),
        device=values["device"] if was_given("device") else None,
        data=str(values["data"]) if values["data"] else None,
    )
    _print_report(report, values["json_path"])


def _print_report(report: TrainReport, json_path: str | None) -> None:
    from yolov7_deploy._console import write_json

    if _is_main_process():
        echo(report.summary(), err=json_path == "-")
        if json_path is not None:
            write_json(report.to_dict(), json_path)


def _read_recipe(hyp: str, set_values: list[str] | None, *, show: bool) -> Hyperparameters:
    """Return the hyperparameters of a preset or file; with `show`, print them and exit."""
    from yolov7_deploy.training.hyperparameters import format_hyperparameters, read_hyperparameters

    recipe = read_hyperparameters(hyp, changes=_parse_values(set_values or []))
    if show:
        echo(format_hyperparameters(recipe).rstrip("\n"))
        raise typer.Exit
    return recipe


def _is_main_process() -> bool:
    """Return whether this process prints; of the processes that torchrun starts, only rank 0 does."""
    return os.environ.get("RANK", "0") == "0"


def _square_size(text: str) -> int:
    size = parse_img(text)
    if isinstance(size, tuple):
        if len(set(size)) > 1:
            raise UsageError(f"--img {text}: training images are square.", fix=f"--img {max(size)}, and --rect")
        size = size[0]
    assert size is not None
    return size


def _parse_layers(text: str | None) -> tuple[int, ...]:
    parts = (text or "").replace(",", " ").split()
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"--freeze {text} is not a list of layers.", fix="For example: --freeze 50, or --freeze 0,1,2")
    return tuple(map(int, parts))


def _parse_values(texts: list[str]) -> dict[str, float]:
    values = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            values[name.strip()] = float(number)
        except ValueError as error:
            raise UsageError(f"--set {text} is not name=number.", fix="For example: --set lr0=0.001") from error
    return values


class ConsoleCallback:
    """Prints a line per epoch to standard output (to standard error with JSON output), and progress to standard error.

    Only the main process prints.
    """

    def __init__(self, json_path: str | None) -> None:
        self._has_heading, self._to_stderr = False, json_path == "-"
        self._epochs, self._seconds = 0, list[float]()

    def on_message(self, text: str) -> None:
        """Print a message."""
        if _is_main_process():
            note(text, err=True)

    def on_epoch_end(self, record: EpochRecord) -> None:
        """Print a line of the table, with the time that is left at the mean speed of the epochs so far."""
        from yolov7_deploy._console import duration

        if not self._has_heading:
            note(HEADING, err=self._to_stderr)
            self._has_heading = True
        self._seconds.append(record.seconds)
        left_s = (self._epochs - record.epoch) * sum(self._seconds) / len(self._seconds)
        metrics = (record.precision, record.recall, record.ap50, record.ap)
        columns = [f"{record.epoch:6d}", *(f"{loss:7.4f}" for loss in (record.box, record.obj, record.cls))]
        columns += ["      -" if value is None else f"{value:7.4f}" for value in metrics]
        columns += [f"{record.images_per_s:7.1f}", f"{(record.memory_bytes or 0) / 1e9:7.2f}", f"{record.seconds:7.1f}"]
        note(" ".join([*columns, f"{duration(left_s):>8}"]), err=self._to_stderr)

    def epoch_progress(self, epoch: int, epochs: int) -> AbstractContextManager[Callable[[int, int, str], None]]:
        """Show the progress of an epoch."""
        from yolov7_deploy._console import progress_with_note

        self._epochs = epochs
        return progress_with_note(f"epoch {epoch + 1}/{epochs}") if _is_main_process() else _no_progress()

    def progress(self, description: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """Show the progress of another operation."""
        from yolov7_deploy._console import progress

        return progress(description)


@contextlib.contextmanager
def _no_progress() -> Iterator[Callable[[int, int, str], None]]:
    yield lambda done, total, note: None
