"""`y7 train`: from a dataset to weights that every other command takes as they are."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from yolov7_deploy.cli.detect import split_classes
from yolov7_deploy.cli.options import JsonPath, parse_img
from yolov7_deploy.errors import UsageError
from yolov7_deploy.options import ASSIGNERS, AUXILIARY_HEADS, TrainOptions

if TYPE_CHECKING:
    from yolov7_deploy.training.config import TrainRequest
    from yolov7_deploy.training.hyperparameters import Hyperparameters
    from yolov7_deploy.training.loggers import EpochRecord

RUNS = Path("runs/train")
DEFAULTS = TrainOptions()
NO_DATA = "y7 train --data D.yaml, or a generated set:  y7 shapes --output shapes"
WORKERS = min(DEFAULTS.workers, os.cpu_count() or 1)
CHANGEABLE = {"resume", "save_dir", "data", "device", "json_path"}

Data = Annotated[Path | None, typer.Option("--data", help="Dataset YAML with train and val, or one of `y7 shapes`.")]
Weights = Annotated[
    str | None, typer.Option("--weights", "-w", help="Begin with these: a file or an official name; else at random.")
]
VariantName = Annotated[
    str | None, typer.Option("--variant", help="yolov7, yolov7-tiny, yolov7x, yolov7-w6, ...; that of --weights.")
]
Hyp = Annotated[
    str | None, typer.Option("--hyp", help="tiny, p5, p6, custom, or a YAML file (default: by variant and weights).")
]
Set = Annotated[list[str] | None, typer.Option("--set", help="One value of the recipe, as lr0=0.001; repeatable.")]
ShowHyp = Annotated[bool, typer.Option("--show-hyp", help="Print the recipe as a file, and end.")]
Epochs = Annotated[int, typer.Option("--epochs", help="Passes over the training images.")]
BatchSize = Annotated[int, typer.Option("--batch", "--batch-size", help="Images of a step, of all processes.")]
NominalBatch = Annotated[int, typer.Option("--nominal-batch", help="Images whose gradients make an update.")]
Img = Annotated[str, typer.Option("--img", "--img-size", "--imgsz", help="Input side.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda:0, or 0; several GPUs: start with torchrun.")]
Workers = Annotated[int, typer.Option("--workers", help="Processes that prepare images; 0 is none.")]
Cache = Annotated[
    float | None, typer.Option("--cache", help="GiB for prepared images (default: a quarter of what is free).")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the training in --save-dir, or with the newest, as it was begun.")
]
SaveDir = Annotated[Path | None, typer.Option("--save-dir", help="Folder of the run (default: runs/train/expN).")]
Seed = Annotated[int, typer.Option("--seed", help="Of everything random.")]
Freeze = Annotated[
    str | None, typer.Option("--freeze", help="Layers that stay: 50 is the first fifty, 0,1,2 are these.")
]
Classes = Annotated[str | None, typer.Option("--classes", help="Only these: names or numbers, 'person,dog' or '0 16'.")]
SingleClass = Annotated[bool, typer.Option("--single-cls", help="All boxes are of one class.")]
MultiScale = Annotated[bool, typer.Option("--multi-scale", help="Sizes from half to one and a half of --img.")]
Rect = Annotated[bool, typer.Option("--rect", help="Images of one shape together, without mosaic.")]
CloseMosaic = Annotated[int, typer.Option("--close-mosaic", help="Last epochs without mosaic, mixup and pasting.")]
ImageWeights = Annotated[bool, typer.Option("--image-weights", help="Images of badly found classes more often.")]
AutoAnchor = Annotated[bool, typer.Option("--autoanchor/--noautoanchor", help="Fit anchors if they reach too little.")]
Half = Annotated[
    bool | None,
    typer.Option("--half/--no-half", help="Mixed precision: float16 on a GPU (default there), bfloat16 on a CPU."),
]
Adam = Annotated[bool, typer.Option("--adam", help="AdamW instead of SGD.")]
LinearLr = Annotated[bool, typer.Option("--linear-lr", help="The rate falls linearly instead of as a cosine.")]
SyncBn = Annotated[bool, typer.Option("--sync-bn/--no-sync-bn", help="BatchNorm over all processes.")]
RebaseBn = Annotated[
    bool, typer.Option("--rebase-bn/--no-rebase-bn", help="With --weights: BatchNorm statistics of these images.")
]
Patience = Annotated[int, typer.Option("--patience", help="End after so many epochs without progress; 0 is never.")]
ValEvery = Annotated[int, typer.Option("--val-every", help="Epochs from one validation to the next; 0: only the last.")]
SaveMinutes = Annotated[float, typer.Option("--save-minutes", help="Minutes from one resume point to the next.")]
Ota = Annotated[bool, typer.Option("--ota/--no-ota", help="Positives by matching, or every candidate as in YOLOv5.")]
Assigner = Annotated[str, typer.Option("--assigner", help=f"Of auxiliary heads (table 6): {', '.join(ASSIGNERS)}.")]
Constraint = Annotated[
    bool, typer.Option("--constraint/--no-constraint", help="Upper bound for coarse positives (table 7).")
]
Auxiliary = Annotated[str, typer.Option("--auxiliary", help=f"Heads (table 8): {', '.join(AUXILIARY_HEADS)}.")]
TensorBoard = Annotated[
    bool | None, typer.Option("--tensorboard/--no-tensorboard", help="Write events (default: where it is installed).")
]


def train(
    context: typer.Context,
    *,
    data: Data = None,
    weights: Weights = None,
    variant: VariantName = None,
    hyp: Hyp = None,
    set_values: Set = None,
    show_hyp: ShowHyp = False,
    epochs: Epochs = DEFAULTS.epochs,
    batch: BatchSize = DEFAULTS.batch,
    nominal_batch: NominalBatch = DEFAULTS.nominal_batch,
    img: Img = str(DEFAULTS.img),
    device: Device = "auto",
    workers: Workers = WORKERS,
    cache: Cache = DEFAULTS.cache_gib,
    resume: Resume = False,
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
    rebase_bn: RebaseBn = DEFAULTS.rebase_bn,
    patience: Patience = DEFAULTS.patience,
    val_every: ValEvery = DEFAULTS.val_every,
    save_minutes: SaveMinutes = DEFAULTS.save_minutes,
    ota: Ota = DEFAULTS.ota,
    assigner: Assigner = DEFAULTS.assigner,
    constraint: Constraint = DEFAULTS.constraint,
    auxiliary: Auxiliary = DEFAULTS.auxiliary,
    tensorboard: TensorBoard = None,
    json_path: JsonPath = None,
) -> None:
    """Train a network: losses, assignment and schedule of the paper, from scratch or from weights."""
    asked = locals()
    options = _options(asked)
    if resume:
        _refuse_changes(context)
        _resume(save_dir, data=data, device=None if device == "auto" else device, json_path=json_path)
        return
    from yolov7_deploy.training.hyperparameters import hyperparameters_text, preset_for, read_hyperparameters

    path, name = _beginning(weights, variant)
    recipe = read_hyperparameters(hyp or preset_for(name, pretrained=path is not None), changes=_values(set_values))
    if show_hyp:
        typer.echo(hyperparameters_text(recipe), nl=False)
        return
    if data is None:
        raise UsageError("y7 train needs --data.", fix=NO_DATA)
    _begin(_request(asked, options, recipe, variant=name, weights=str(path or "")), json_path)


def _options(asked: Mapping[str, Any]) -> TrainOptions:
    """What was asked, checked; the parameters of the command are called as the options."""
    parsed = {**asked, "img": _square(asked["img"]), "freeze": _numbers(asked["freeze"]), "cache_gib": asked["cache"]}
    return TrainOptions(**{field.name: parsed[field.name] for field in fields(TrainOptions)})


def _request(
    asked: Mapping[str, Any], options: TrainOptions, recipe: Hyperparameters, *, variant: str, weights: str
) -> TrainRequest:
    from yolov7_deploy.training.config import TrainRequest

    return TrainRequest(
        data=str(asked["data"]),
        folder=str(asked["save_dir"] or _new_folder()),
        variant=variant,
        weights=weights,
        device=asked["device"],
        classes=tuple(map(str, split_classes([asked["classes"] or ""]) or ())),
        single_class=asked["single_class"],
        tensorboard=asked["tensorboard"],
        hyp=recipe,
        options=options,
    )


def _begin(request: TrainRequest, json_path: str | None) -> None:
    from yolov7_deploy.training.run import train as train_network

    _finish(train_network(request, watch=ConsoleCallback(json_path)), json_path)


def _refuse_changes(context: typer.Context) -> None:
    """A training goes on as it was begun; only where things are may be another place."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name not in CHANGEABLE and source is not None and source.name == "COMMANDLINE":
            raise UsageError(
                f"{parameter.opts[0]} cannot be changed with --resume: a training goes on as it was begun.",
                fix="Leave it out, or begin anew from its weights:  --weights runs/train/exp/last.safetensors",
            )


def _resume(save_dir: Path | None, *, data: Path | None, device: str | None, json_path: str | None) -> None:
    from yolov7_deploy.training.run import resume

    folder = save_dir or _newest()
    _finish(
        resume(folder, watch=ConsoleCallback(json_path), device=device, data=None if data is None else str(data)),
        json_path,
    )


def _finish(report: Any, json_path: str | None) -> None:  # noqa: ANN401 - its type is torch's side of the wall
    from yolov7_deploy._console import write_json
    from yolov7_deploy.training.run import describe_report, report_document

    if _is_first():
        typer.echo("\n".join(describe_report(report)), err=json_path == "-")
        if json_path is not None:
            write_json(report_document(report), json_path)


def _beginning(weights: str | None, variant: str | None) -> tuple[Path | None, str]:
    """The file to begin with, if any, and the variant."""
    if weights is None:
        return None, variant or "yolov7"
    from yolov7_deploy._console import progress
    from yolov7_deploy.checkpoint import load_checkpoint
    from yolov7_deploy.hub import find_weights

    with progress("download") as show:
        path = find_weights(weights, progress=show)
    return path, variant or load_checkpoint(path).variant


def _new_folder() -> Path:
    from yolov7_deploy.workflows.predict import next_run_folder

    return next_run_folder(RUNS)


def _newest() -> Path:
    states = sorted(RUNS.glob("*/state.safetensors"), key=lambda path: path.stat().st_mtime)
    if not states:
        raise UsageError(f"There is no training in {RUNS} to go on with.", fix="Name its folder:  --save-dir DIR")
    return states[-1].parent


def _is_first() -> bool:
    """Of several processes that torchrun started, only the first speaks."""
    return os.environ.get("RANK", "0") == "0"


def _square(text: str) -> int:
    size = parse_img(text)
    if isinstance(size, tuple):
        if len(set(size)) > 1:
            raise UsageError(f"--img {text}: training canvases are square.", fix=f"--img {max(size)}, and --rect")
        size = size[0]
    assert size is not None
    return size


def _numbers(text: str | None) -> tuple[int, ...]:
    parts = (text or "").replace(",", " ").split()
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"--freeze {text} is no list of layers.", fix="For example: --freeze 50, or --freeze 0,1,2")
    return tuple(map(int, parts))


def _values(texts: list[str] | None) -> dict[str, float]:
    values = {}
    for text in texts or []:
        name, _, number = text.partition("=")
        try:
            values[name.strip()] = float(number)
        except ValueError as error:
            raise UsageError(f"--set {text} is not name=number.", fix="For example: --set lr0=0.001") from error
    return values


class ConsoleCallback:
    """Shows a training to people: a line an epoch on standard output, unless JSON is there; the rest beside it."""

    def __init__(self, json_path: str | None) -> None:
        self._headed, self._aside = False, json_path == "-"

    def say(self, words: str) -> None:
        """A line."""
        if _is_first():
            typer.echo(words, err=True)

    def epoch(self, epoch: int, epochs: int) -> AbstractContextManager[Callable[[int, int, str], None]]:
        """Progress of an epoch."""
        from yolov7_deploy._console import progress_with_note

        return progress_with_note(f"epoch {epoch + 1}/{epochs}") if _is_first() else _silence()

    @contextlib.contextmanager
    def counting(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Progress of something else."""
        from yolov7_deploy._console import progress

        with progress(what) as show:
            yield show

    def epoch_done(self, record: EpochRecord) -> None:
        """A line of the table."""
        if not self._headed:
            heading = " epoch     box     obj     cls      AP    AP50   img/s      GB       s"
            typer.echo(heading, err=self._aside)
            self._headed = True
        ap, ap50 = ("      -" if value is None else f"{value:7.4f}" for value in (record.ap, record.ap50))
        memory = (record.memory_bytes or 0) / 1e9
        typer.echo(
            f"{record.epoch:6d} {record.box:7.4f} {record.obj:7.4f} {record.cls:7.4f} {ap} {ap50} "
            f"{record.images_per_s:7.1f} {memory:7.2f} {record.seconds:7.1f}",
            err=self._aside,
        )


@contextlib.contextmanager
def _silence() -> Iterator[Callable[[int, int, str], None]]:
    yield lambda done, total, note: None
