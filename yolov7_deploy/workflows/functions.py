"""The commands as functions: `export`, `train`, `validate`, `benchmark` and `report`.

They have the options and defaults of `y7 export`, `y7 train`, `y7 val`, `y7 bench` and `y7 report`, and print nothing:
results are returned, progress goes to callbacks and the log. Libraries are imported when a function is called, so each
needs only its own extra.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypedDict, TypeVar

from yolov7_deploy._output_folder import new_run_folder
from yolov7_deploy._text import suggest
from yolov7_deploy.errors import UsageError, missing_library, suggests_arguments
from yolov7_deploy.hub import find_weights
from yolov7_deploy.metadata import InputKind
from yolov7_deploy.options import (
    BenchOptions,
    EngineOptions,
    ExportOptions,
    Int8Options,
    QuantizeOptions,
    ReportOptions,
    TrainOptions,
    ValOptions,
    parse_size,
)
from yolov7_deploy.paper import ABLATIONS, VARIANTS

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from yolov7_deploy.benchmarking.benchmark import Frames
    from yolov7_deploy.benchmarking.report import SpeedReport, SpeedRow
    from yolov7_deploy.evaluation.accuracy import AccuracyReport
    from yolov7_deploy.sources import SourceLike
    from yolov7_deploy.training.checkpoints import QatOptions
    from yolov7_deploy.training.hyperparameters import Hyperparameters
    from yolov7_deploy.training.loggers import TrainCallback
    from yolov7_deploy.training.trainer import TrainReport
    from yolov7_deploy.workflows.export import ExportReport, Int8Request
    from yolov7_deploy.workflows.report import DeploymentReport

PathLike = str | os.PathLike[str]
Size = int | tuple[int, int]
Progress = Callable[[int, int], None]
P = ParamSpec("P")
R = TypeVar("R")

TRAIN_RUNS = Path("runs/train")
_EXPORT = ExportOptions()
_TRAIN = TrainOptions()
_VAL = ValOptions()
_BENCH = BenchOptions()
_INT8 = Int8Options()
_REPORT = ReportOptions()


def _with_clear_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function name the extra of a missing library, and suggest the argument that an unknown one means."""
    more = TrainKeywords.__annotations__ if function.__name__ == "train" else ()
    checked = suggests_arguments(function, more)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return checked(*args, **kwargs)
        except ModuleNotFoundError as error:
            raise missing_library(error, f"for {function.__name__}") from error

    return wrapper


# --- export -----------------------------------------------------------------------------------------------------------


@_with_clear_errors
def export(
    weights: PathLike,
    output: PathLike | None = None,
    *,
    precision: str = "fp32",
    img: Size | None = None,
    batch: int | None = _EXPORT.batch,
    dynamic_size: bool = _EXPORT.dynamic_size,
    nms: str = _EXPORT.nms,
    conf: float = _EXPORT.conf,
    iou: float = _EXPORT.iou,
    max_det: int = _EXPORT.max_det,
    max_candidates: int = _EXPORT.max_candidates,
    multi_label: bool = _EXPORT.multi_label,
    class_agnostic: bool = _EXPORT.class_agnostic,
    input_kind: InputKind = _EXPORT.input_kind,
    opset: int = _EXPORT.opset,
    simplify: bool = _EXPORT.simplify,
    calib: PathLike | None = None,
    data: PathLike | None = None,
    max_drop: float | None = None,
    method: str | None = None,
    rounding: str = _INT8.rounding,
    int8_target: str = "auto",
    reduce_range: bool | None = None,
    verify: bool = True,
    image: PathLike | None = None,
    engine: bool | EngineOptions = False,
    log: Callable[[str, float], None] | None = None,
) -> ExportReport:
    """Export a checkpoint to one verified ONNX file for every runtime, and optionally build a TensorRT engine from it.

    The file is compared with PyTorch before it gets its name. An existing file is replaced.

    Args:
        weights: A `.pt` or `.safetensors` file, or an official name.
        output: The `.onnx` file to write; by default `NAME.onnx` or `NAME-PRECISION.onnx` in the working directory.
        precision: `fp32`, `fp16` or `int8`.
        img: Input size (one number for a square) or (height, width); by default the training size of the weights.
        batch: Fixed batch size; `None` accepts any batch size at run time.
        dynamic_size: Accept any height and width that are multiples of the stride; `img` is then the default.
        nms, conf, iou, max_det, max_candidates, multi_label, class_agnostic: See `ExportOptions`.
        input_kind, opset, simplify: See `ExportOptions`.
        calib: Calibration images, required by and only for `int8`: see `open_calibration`. Weights that were trained
            for INT8 (`train(qat=True)`) need none.
        data: With `int8`, a dataset on which to measure AP.
        max_drop: With `data`, exclude layers from INT8 until it loses at most this many AP points (of 100).
        method, rounding: How the activation ranges and the weights of `int8` are chosen: see `Int8Options`.
        int8_target: What will run the INT8 file: `tensorrt`, `cpu` or `arm`; `auto` is this machine.
        reduce_range: See `Int8Options`.
        verify: Compare the file with PyTorch in every installed runtime.
        image: Image for the verification and the range check of FP16; by default a synthetic one.
        engine: `True`, or its options: also build `NAME.engine` for this machine.
        log: Called with each finished step and its duration in seconds.

    Returns:
        The report: `path` of the file, `metadata`, `parity` (the verification), `quantized` (of INT8) and `engine`.

    Raises:
        UsageError: An option is invalid, or contradicts another one.
        LoadError: The weights do not exist or cannot be read.
        ExportError, EngineError: The file or engine cannot be made.
        ParityError: The file differs from the model; the message names the first stage that does.
        MissingLibraryError: A library is missing; the message names its extra.

    Example:
        >>> report = export("yolov7-tiny-shapes", "shapes.onnx", img=96)
        >>> report.path.name, report.metadata.input_hw, report.parity.verified
        ('shapes.onnx', (96, 96), True)
    """
    given = locals()
    same = {field.name: given[field.name] for field in fields(ExportOptions) if field.name in given}
    options = ExportOptions(**same, input_hw=parse_size(img))
    if dynamic_size and engine:
        raise UsageError("An engine has a fixed height and width.", fix="Leave out dynamic_size, or engine.")
    is_trained = precision == "int8" and _is_trained_for_int8(weights, given)
    if not is_trained:
        _check_int8_arguments(given)
    from yolov7_deploy.image import read_image
    from yolov7_deploy.workflows.export import default_output, engine_builder, export_weights

    # Before the export, which takes long: an error must not come after it.
    build = engine_builder(EngineOptions() if engine is True else engine) if engine else None
    request = None if calib is None else _int8_request(calib, data, given)
    path = find_weights(os.fspath(weights))
    report = export_weights(
        path,
        Path(output) if output is not None else default_output(os.fspath(weights), path, precision),
        options=options,
        precision=precision,
        int8=request,
        verify=verify,
        images=[] if image is None else [read_image(image)],
        log=log,
    )
    return report if build is None else replace(report, engine=build(report.path))


def _is_trained_for_int8(weights: PathLike, given: Mapping[str, Any]) -> bool:
    """Return whether weights were trained for INT8, after checking that the arguments suit them."""
    if not Path(weights).is_file():  # an official name
        return False
    from yolov7_deploy.workflows.export import trained_for_int8

    names = ("calib", "data", "max_drop", "method", "rounding", "int8_target", "reduce_range")
    wanted = {name: given[name] for name in names}
    return trained_for_int8(Path(weights), **wanted, for_engine=bool(given["engine"])) is not None


def _check_int8_arguments(given: Mapping[str, Any]) -> None:
    if given["precision"] == "int8" and given["calib"] is None:
        raise UsageError(
            "INT8 requires calibration images: activation ranges are measured on them.",
            fix="Add  --calib FOLDER  with 100 to 500 representative images, other than those used to measure AP.",
        )
    defaults = {"calib": None, "data": None, "max_drop": None, "method": None, "rounding": _INT8.rounding}
    needless = [name for name, default in defaults.items() if given[name] != default]
    if needless and given["precision"] != "int8":
        raise UsageError(
            f"--{needless[0].replace('_', '-')} has no effect without --precision int8.", fix="Add  --precision int8"
        )
    if given["max_drop"] is not None and given["data"] is None:
        raise UsageError("--max-drop limits the loss of AP, which requires a dataset.", fix="Add  --data D.yaml")


def _int8_request(calib: PathLike, data: PathLike | None, given: Mapping[str, Any]) -> Int8Request:
    from yolov7_deploy.datasets import open_dataset
    from yolov7_deploy.precision.calibration_images import open_calibration
    from yolov7_deploy.workflows.export import Int8Request
    from yolov7_deploy.workflows.quantize import choose_int8_options

    int8 = choose_int8_options(
        given["int8_target"],
        given["reduce_range"],
        method=given["method"],
        rounding=given["rounding"],
        for_engine=bool(given["engine"]),
    )
    return Int8Request(
        images=open_calibration(os.fspath(calib)),
        options=QuantizeOptions(int8=int8, max_drop=given["max_drop"]),
        data=None if data is None else open_dataset(os.fspath(data)),
    )


# --- train ------------------------------------------------------------------------------------------------------------


# Arguments of `train` that a resumed run may have.
_RESUME_ARGUMENTS = ("data", "device", "save_dir", "project", "name", "resume", "callback")


class TrainKeywords(TypedDict, total=False):
    """The fields of `TrainOptions` that `train` does not list as arguments; `TrainOptions` has their defaults."""

    nominal_batch: int
    seed: int
    cache_gib: float | None
    half: bool | None
    adam: bool
    linear_lr: bool
    sync_bn: bool
    recalibrate_bn: bool
    freeze: tuple[int, ...]
    multi_scale: bool
    rect: bool
    close_mosaic: int
    image_weights: bool
    autoanchor: bool
    patience: int
    val_every: int
    save_minutes: float
    ota: bool
    assigner: str
    constraint: bool
    auxiliary: str


@_with_clear_errors
def train(
    data: PathLike | None = None,
    weights: PathLike | None = None,
    *,
    variant: str | None = None,
    hyp: str | Mapping[str, float] | None = None,
    epochs: int = _TRAIN.epochs,
    batch: int = _TRAIN.batch,
    img: int = _TRAIN.img,
    device: str | int = "auto",
    workers: int = min(_TRAIN.workers, os.cpu_count() or 1),
    classes: Iterable[str | int] = (),
    single_class: bool = False,
    save_dir: PathLike | None = None,
    project: PathLike = TRAIN_RUNS,
    name: str = "exp",
    exist_ok: bool = False,
    resume: bool = False,
    qat: bool = False,
    calib: PathLike | None = None,
    int8_target: str = "auto",
    reduce_range: bool | None = None,
    tensorboard: bool | None = None,
    callback: TrainCallback | None = None,
    **options: Unpack[TrainKeywords],
) -> TrainReport:
    """Train a model on a dataset, or resume a training run.

    The run's folder gets `best.safetensors`, `last.safetensors`, `results.csv` and charts.

    Args:
        data: Dataset YAML with `train` and `val`; only a run that is resumed does not need it.
        weights: Initial weights: a file or an official name; `None` trains `variant` from random weights.
        variant: The network, such as `yolov7-tiny`; by default that of the weights, else `yolov7`.
        hyp: `tiny`, `p5`, `p6`, `custom`, `qat`, a YAML file, or values that replace those of the default.
        epochs, batch, img, workers: See `TrainOptions`.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or the number of a GPU.
        classes: Names or ids of the classes to train on; all without any.
        single_class: Merge all classes into one.
        save_dir: Folder of the run, instead of a new one in `project`.
        project, name: The new folder is `project/name`; a number is added if it exists.
        exist_ok: Use the folder `project/name` even if it exists.
        resume: Resume the run in `save_dir` or `project/name`, or the newest unfinished one in `project`. Only `device`
            and `data` may differ from those it was started with.
        qat: Quantization-aware training: train the weights for INT8. `export(..., precision="int8")` then needs no
            calibration.
        calib: With `qat`, calibration images or a calibration file; by default the training images.
        int8_target: With `qat`, what will run the INT8 file: `tensorrt`, `cpu` or `arm`; `auto` is this machine.
        reduce_range: With `qat`, see `Int8Options`.
        tensorboard: Write TensorBoard events; `None` does so if it is installed.
        callback: Receives messages, progress and the metrics of each epoch; by default they are logged (`logging`).
        **options: All other fields of `TrainOptions`, such as `patience=20`.

    Returns:
        The report: `weights` (the best ones), `best_epoch`, `accuracy` (with `ap`) and `folder`.

    Raises:
        UsageError: An option is invalid, or contradicts another one.
        DatasetError: Images or labels are missing or malformed.
        LoadError: The weights do not exist or cannot be read.
        DeviceError: The device does not exist, or is out of memory.
        TrainingError: The loss is not finite.
        MissingLibraryError: A library is missing; the message names its extra.

    Example:
        >>> report = train("data.yaml", "yolov7-tiny-shapes", epochs=1, img=64, batch=4, workers=0)
        >>> report.weights.name, 0 <= report.accuracy.ap <= 1
        ('best.safetensors', True)
    """
    given = {**locals(), **options}
    from yolov7_deploy.training import run
    from yolov7_deploy.training.checkpoints import TrainRequest, find_unfinished_run
    from yolov7_deploy.training.loggers import LogCallback

    callback, folder = callback or LogCallback(), Path(save_dir) if save_dir is not None else None
    if resume:
        _check_resume_arguments(given)
        folder = folder or (Path(project) / name if name != "exp" else find_unfinished_run(Path(project)))
        moved = {"device": None if device == "auto" else str(device), "data": None if data is None else os.fspath(data)}
        return run.resume(folder, callback=callback, **moved)
    if data is None:
        raise UsageError("train needs a dataset.", fix="For example: train('data.yaml', weights='yolov7-tiny')")
    qat_options = _qat_options(qat, calib, int8_target, reduce_range)
    chosen = TrainOptions(epochs=epochs, batch=batch, img=img, workers=workers, **options)
    initial, network = initial_weights(weights, variant)
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = stack.enter_context(new_run_folder(Path(project) / name, exist_ok=exist_ok))
        request = TrainRequest(
            data=os.fspath(data),
            folder=str(folder),
            variant=network,
            weights=str(initial or ""),
            device=str(device),
            classes=tuple(map(str, classes)),
            single_class=single_class,
            tensorboard=tensorboard,
            hyp=_hyperparameters(hyp, network, pretrained=initial is not None, qat=qat),
            options=chosen,
            qat=qat_options,
        )
        return run.train(request, callback=callback)


def _check_resume_arguments(given: Mapping[str, object]) -> None:
    """Refuse arguments that a resumed run would ignore."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(train).parameters.items()}
    for name, value in given.items():
        if name not in (*_RESUME_ARGUMENTS, "options") and value != defaults.get(name):
            raise UsageError(
                f"{name} cannot be changed with resume=True: a run keeps the options it was started with.",
                fix="Leave it out, or start a new run: train('data.yaml', 'runs/train/exp/last.safetensors')",
            )


def initial_weights(
    weights: PathLike | None, variant: str | None, *, find: Callable[[str], Path] = find_weights
) -> tuple[Path | None, str]:
    """Return the file of the initial weights of a training, if any, and the variant of the network.

    Args:
        weights: A file or an official name; `None` for random weights.
        variant: The requested variant; by default that of the weights, else `yolov7`.
        find: Returns the file of a name.

    Raises:
        UsageError: The variant is unknown, or the weights are an exported file.
        LoadError: The weights do not exist or cannot be read.
    """
    if variant is not None and variant not in (known := [*VARIANTS, *ABLATIONS]):
        raise UsageError(f"--variant {variant} is unknown.", fix=suggest(variant, known))
    if weights is None:
        return None, variant or "yolov7"
    from yolov7_deploy.checkpoint import load_checkpoint

    path = find(os.fspath(weights))
    return path, variant or load_checkpoint(path).variant


def _qat_options(qat: bool, calib: PathLike | None, int8_target: str, reduce_range: bool | None) -> QatOptions | None:
    """Return the options of quantization-aware training; `None` without `qat`."""
    given = {"--calib": calib, "--int8-target": None if int8_target == "auto" else int8_target}
    needless = [name for name, value in {**given, "--reduce-range": reduce_range}.items() if value is not None]
    if not qat:
        if needless:
            raise UsageError(f"{needless[0]} has no effect without --qat.", fix="Add  --qat")
        return None
    from yolov7_deploy.training.checkpoints import QatOptions
    from yolov7_deploy.workflows.quantize import choose_int8_options

    int8 = choose_int8_options(int8_target, reduce_range)
    calib = "" if calib is None else os.fspath(calib)
    return QatOptions(calib=calib, target=int8.target, reduce_range=int8.reduce_range)


def _hyperparameters(
    hyp: str | Mapping[str, float] | None, variant: str, *, pretrained: bool, qat: bool
) -> Hyperparameters:
    from yolov7_deploy.training.hyperparameters import default_preset, read_hyperparameters

    changes = hyp if isinstance(hyp, Mapping) else None
    name = default_preset(variant, pretrained=pretrained, qat=qat) if hyp is None or changes is not None else hyp
    return read_hyperparameters(str(name), changes=changes)


# --- validate ---------------------------------------------------------------------------------------------------------


@_with_clear_errors
def validate(
    weights: PathLike,
    data: PathLike,
    *,
    images: PathLike | None = None,
    split: str = "val",
    limit: int | None = None,
    single_class: bool = False,
    img: Size | None = None,
    batch: int = _VAL.batch,
    rect: bool | None = _VAL.rect,
    conf: float = _VAL.conf,
    iou: float = _VAL.iou,
    max_det: int = _VAL.max_det,
    device: str | int = "auto",
    runtime: str = "auto",
    half: bool | None = None,
    save_dir: PathLike | None = None,
    progress: Progress | None = None,
) -> AccuracyReport:
    """Measure the COCO average precision (AP) of any model file on a dataset, with the published protocol.

    Args:
        weights: A `.pt`, `.safetensors`, `.onnx` or `.engine` file, or an official name.
        data: Dataset YAML, or COCO annotations (instances JSON).
        images: Image folder of COCO annotations; by default it is searched near the JSON file.
        split: `val`, `test` or `train`.
        limit: Evaluate only the first images.
        single_class: Merge all classes of the dataset, for a model of one class.
        img: Input size (one number for a square) or (height, width); by default the training size of the weights.
        batch, rect, conf, iou, max_det: See `ValOptions`.
        device, runtime, half: See `Detector`.
        save_dir: Folder for charts: confusion matrix, curves, examples; `None` draws none.
        progress: Called with the numbers of finished and of all images.

    Returns:
        The report: `ap`, `ap50`, the classes and the predictions; `summary()` is a table.

    Raises:
        UsageError: An option is invalid, or contradicts the file.
        LoadError: The weights do not exist or cannot be read.
        DatasetError: The dataset is missing or malformed, or has other classes than the model.
        DeviceError: The device does not exist.
        MissingLibraryError: A library is missing; the message names its extra.

    Example:
        >>> report = validate("yolov7-tiny-shapes", "data.yaml", img=96)
        >>> report.images, 0 <= report.ap <= 1
        (4, True)
    """
    options = ValOptions(rect=rect, batch=batch, conf=conf, iou=iou, max_det=max_det)
    from yolov7_deploy._serialization import sha256_hex
    from yolov7_deploy.datasets import open_dataset
    from yolov7_deploy.datasets.samples import as_single_class
    from yolov7_deploy.detector import Detector
    from yolov7_deploy.evaluation.accuracy import evaluate

    dataset = open_dataset(os.fspath(data), images=None if images is None else Path(images), split=split, limit=limit)
    if single_class:
        dataset = as_single_class(dataset)
    path = find_weights(os.fspath(weights))
    with Detector(path, device=device, img=img, half=half, runtime=runtime) as detector:
        if single_class:
            _require_one_class(detector.class_names, path)
        report = evaluate(detector, dataset, options=options, progress=progress)
    if save_dir is not None:
        from yolov7_deploy.evaluation.plots import draw_evaluation

        draw_evaluation(report, dataset, Path(save_dir))
    return replace(report, weights=str(path), weights_sha256=sha256_hex(path), runtime=detector.runtime)


def _require_one_class(class_names: Sequence[str], path: Path) -> None:
    if len(class_names) > 1:
        raise UsageError(
            f"--single-cls is for a model of one class; {path} has {len(class_names)}.", fix="Leave --single-cls out."
        )


# --- benchmark --------------------------------------------------------------------------------------------------------


@_with_clear_errors
def benchmark(
    weights: PathLike,
    *,
    batch: int | Sequence[int] | None = None,
    device: str | int = "auto",
    runtime: str = "auto",
    img: Size | None = None,
    half: bool | None = None,
    concurrency: int | Sequence[int] = 1,
    source: SourceLike | None = None,
    frame: tuple[int, int] | None = None,
    conf: float | None = None,
    iou: float | None = None,
    max_det: int | None = None,
    duration_s: float = _BENCH.duration_s,
    warmup_s: float = _BENCH.warmup_s,
    paper: bool = False,
    val_report: PathLike | None = None,
    progress: Progress | None = None,
    on_row: Callable[[SpeedRow], None] | None = None,
) -> SpeedReport:
    """Measure the speed of any model file: latency by stage, throughput, power and memory.

    Args:
        weights: A `.pt`, `.safetensors`, `.onnx` or `.engine` file, or an official name.
        batch: Images per call, or several such numbers; by default the fixed batch of the file, else 1.
        device: `auto`, `cpu`, a GPU (`cuda:0` or 0), or `v100` or `jetson` to require such a machine.
        runtime, img, half, conf, iou, max_det: See `Detector`.
        concurrency: Threads that call at the same time, or several such numbers.
        source: Images to measure with, as in `open_source`; by default a synthetic image.
        frame: Height and width of the synthetic image; by default 1080 x 1920.
        duration_s: Seconds to measure latency, and again to measure throughput.
        warmup_s: Maximum duration of the warm-up in seconds.
        paper: Add the paper's row of this network to the report.
        val_report: Output of `y7 val --json` for the same file, to show its AP.
        progress: Called with the finished and the total number of steps.
        on_row: Called with each complete row.

    Returns:
        The report: one row for each batch size at each concurrency, with the machine's description.

    Raises:
        UsageError: An option is invalid, or contradicts the file.
        LoadError: The weights do not exist or cannot be read.
        DeviceError: The device does not exist.
        SourceError: The source has no image.
        MissingLibraryError: A library is missing; the message names its extra.

    Example:
        >>> report = benchmark("yolov7-tiny-shapes", img=96, frame=(120, 160), duration_s=0.1, warmup_s=0.1)
        >>> report.rows[0].batch, report.rows[0].stage("end_to_end").p50 > 0
        (1, True)
    """
    options = BenchOptions(
        batches=_numbers(batch) or _BENCH.batches,
        concurrency=_numbers(concurrency),
        duration_s=duration_s,
        warmup_s=warmup_s,
    )
    from yolov7_deploy._serialization import sha256_hex
    from yolov7_deploy.benchmarking.benchmark import measure_speed
    from yolov7_deploy.benchmarking.devices import resolve_device
    from yolov7_deploy.benchmarking.report import paper_speed, read_ap
    from yolov7_deploy.detector import Detector
    from yolov7_deploy.hardware.machine import gpu_memory_used

    frames = _frames(source, frame)
    profile = None if device == "auto" else resolve_device(str(device))
    path = find_weights(os.fspath(weights))
    ap, ap_source = (None, "") if val_report is None else read_ap(Path(val_report), path, sha256=sha256_hex(path))
    name = profile.device if profile else "auto"
    gpu_baseline = gpu_memory_used("cuda:0" if name == "auto" else name)
    opened = Detector(path, device=name, runtime=runtime, img=img, half=half, conf=conf, iou=iou, max_det=max_det)
    with opened as detector:
        row = paper_speed(detector.metadata.variant, detector.input_hw) if paper else None
        report = measure_speed(
            detector,
            frames,
            options=options if batch is not None else replace(options, batches=(detector.metadata.batch or 1,)),
            profile=profile or resolve_device("auto", gpu_usable=detector.device != "cpu"),
            gpu_baseline_bytes=None if detector.device == "cpu" else gpu_baseline,
            progress=progress,
            on_row=on_row,
        )
    return replace(report, paper=row, ap=ap, ap_source=ap_source)


def _numbers(value: int | Sequence[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _frames(source: SourceLike | None, hw: tuple[int, int] | None) -> Frames:
    from yolov7_deploy.benchmarking.benchmark import SYNTHETIC_HW, read_frames, synthetic_frames

    if source is None:
        return synthetic_frames(hw or SYNTHETIC_HW)
    if hw is not None:
        raise UsageError("--frame is the size of the synthetic image, which --source replaces.", fix="Leave one out.")
    return read_frames(source)


# --- report -----------------------------------------------------------------------------------------------------------


@_with_clear_errors
def report(
    weights: PathLike,
    against: PathLike | Sequence[PathLike],
    data: PathLike,
    output: PathLike = Path("report.html"),
    *,
    limit: int | None = _REPORT.limit,
    stage_limit: int = _REPORT.stage_limit,
    max_drop: float = _REPORT.max_drop,
    duration_s: float = _REPORT.duration_s,
    bench: Sequence[PathLike] = (),
    sensitivity: Sequence[PathLike] = (),
    device: str | int = _REPORT.device,
    runtime: str = _REPORT.runtime,
) -> DeploymentReport:
    """Write one HTML page that shows whether exported files equal their weights: parity, AP, speed, and differences.

    The page is written if files are wrong, too; it and the report say so.

    Args:
        weights: The reference: a model file or an official name.
        against: Model files to compare with it; ONNX files run in every installed runtime.
        data: Dataset YAML, or COCO annotations (instances JSON).
        output: The `.html` file to write; one that exists is replaced.
        limit, stage_limit, max_drop, runtime: See `ReportOptions`.
        duration_s: Seconds to measure latency of each file, and again to measure throughput; 0 measures no speed.
        bench: Files of `y7 bench --json`, for files whose speed is not measured again.
        sensitivity: Files of `y7 quantize --sensitivity --json`.
        device: Device of all files: `cpu`, a GPU (`cuda:0` or 0) or `auto`.

    Returns:
        The report: `ok`, `failures`, `warnings`, and an entry with `accuracy`, `drop`, `parity` and `speed` for each of
        the `artifacts`.

    Raises:
        UsageError: An option is invalid, the page cannot be written, or a file is of another model.
        LoadError: A file does not exist or cannot be read.
        DatasetError: The dataset is missing or malformed, or has other classes than the model.
        DeviceError: The device does not exist.
        MissingLibraryError: A library is missing; the message names its extra.

    Example:
        >>> found = report("yolov7-tiny-shapes", "shapes.onnx", "data.yaml", "report.html", duration_s=0)
        >>> found.ok, found.path.name
        (True, 'report.html')
    """
    options = ReportOptions(
        limit=limit,
        stage_limit=stage_limit,
        max_drop=max_drop,
        duration_s=duration_s,
        device=str(device),
        runtime=runtime,
    )
    files = [against] if isinstance(against, str | os.PathLike) else list(against)
    from yolov7_deploy.workflows.report_page import write_report

    return write_report(
        find_weights(os.fspath(weights)),
        [find_weights(os.fspath(file)) for file in files],
        data=Path(data),
        output=Path(output),
        options=options,
        bench=[Path(file) for file in bench],
        sensitivity=[Path(file) for file in sensitivity],
    )
