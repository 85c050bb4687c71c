"""Options of every command as frozen dataclasses, which define the defaults. Imports nothing heavy."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from yolov7_deploy.errors import UsageError
from yolov7_deploy.metadata import MAX_SIDE, InputKind, NmsMetadata

NMS_KINDS = ("plugin", "standard", "efficient", "none")
INPUT_KINDS = ("float32", "uint8")
PRECISIONS = ("fp32", "fp16", "int8")
INT8_METHODS = ("mse", "lp", "percentile", "entropy", "max")
INT8_ROUNDINGS = ("nearest", "gptq")
INT8_FALLBACKS = ("fp16", "fp32")
INT8_TARGETS = ("tensorrt", "cpu", "arm")
# What runs an ONNX file; `openvino` computes in float32. The others have one runtime each.
ONNX_RUNTIMES = ("auto", "onnxruntime", "openvino", "openvino-bf16", "openvino-f16")
OPSETS = range(13, 22)
PLUGIN_USES = ("auto", "on", "off")
HARDWARE_COMPATIBILITIES = ("none", "ampere+", "same-cc")
OPT_LEVELS = range(6)
MAX_CONCURRENCY = 256  # of y7 bench
MAX_FRAME_SIDE = 16384
ASSIGNERS = ("independent", "lead-guided", "coarse-to-fine")
AUXILIARY_HEADS = ("partial", "full", "none")
TOPK_LIMIT = 3840  # the largest K of TensorRT's TopK layer
MAX_DEEPSTREAM_STREAMS = 1024  # NVDSINFER_MAX_BATCH_SIZE of DeepStream


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """Thresholds of confidence and NMS; the defaults are those of the official detection program.

    Attributes:
        conf: Keep boxes with a score greater than this.
        iou: NMS removes a box whose IoU with a better box of its class is greater than this.
        max_det: Maximum number of boxes per image, best first.
        classes: Keep only these class ids; `None` keeps all.
        multi_label: A box may be a detection of every class with a score above `conf`, as in the evaluation protocol;
            otherwise of its best class only, as in the official detection program.
        class_agnostic: NMS compares boxes of all classes with each other.

    Example:
        >>> Thresholds(conf=0.4).iou
        0.45
    """

    conf: float = 0.25
    iou: float = 0.45
    max_det: int = 300
    classes: tuple[int, ...] | None = None
    multi_label: bool = False
    class_agnostic: bool = False

    def __post_init__(self) -> None:
        for name in ("conf", "iou"):
            value = _checked(name, getattr(self, name), Real, fix=f"For example: --{name} 0.25")
            if not 0 <= value <= 1:
                raise UsageError(f"{name} must be between 0 and 1, not {value:g}.", fix=f"For example: --{name} 0.25")
            object.__setattr__(self, name, float(value))
        max_det = _checked("max_det", self.max_det, Integral, fix="For example: --max-det 100")
        if max_det < 1:
            raise UsageError(f"max_det must be at least 1, not {max_det}.", fix="For example: --max-det 100")
        object.__setattr__(self, "max_det", int(max_det))
        for name in ("multi_label", "class_agnostic"):
            value = getattr(self, name)
            if type(value).__name__ not in ("bool", "bool_"):  # Python's or NumPy's
                raise UsageError(f"{name} must be True or False, not {value!r}.", fix=f"For example: {name}=True")
            object.__setattr__(self, name, bool(value))


def _checked(name: str, value: Any, kind: type, *, fix: str) -> Any:  # noqa: ANN401 - a number of any library
    """Return the value of an option that must be a number; a bool is not one.

    Raises:
        UsageError: It is of another type.
    """
    if isinstance(value, kind) and not isinstance(value, bool):
        return value
    whole = "a whole number" if kind is Integral else "a number"
    raise UsageError(f"{name} must be {whole}, not {value!r}.", fix=fix)


def check_max_drop(max_drop: float) -> None:
    """Refuse a `--max-drop` that is not a number of AP points.

    Raises:
        UsageError: It is not a number from 0 to 100.
    """
    fix = "From 0 to 100, for example: --max-drop 0.3"
    if not 0 <= _checked("--max-drop", max_drop, Real, fix=fix) <= 100:
        raise UsageError(f"--max-drop {max_drop:g} is not a number of AP points.", fix=fix)


def split_classes(text: str, class_names: Sequence[str]) -> list[int | str]:
    """Return the names and ids in a text such as `person,dog` or `0 16`; a name may have commas itself.

    Args:
        text: Names or ids with commas between them, or ids with spaces.
        class_names: All names of the model or dataset, compared without case. A number that is a name is that name.
    """
    known = {name.strip().casefold() for name in class_names}
    parts, found = text.split(","), list[int | str]()
    while parts:
        counts = range(len(parts), 1, -1)
        count = next((n for n in counts if ",".join(parts[:n]).strip().casefold() in known), 1)
        item, parts = ",".join(parts[:count]).strip(), parts[count:]
        numbers = item.split()
        is_ids = item.casefold() not in known and all(n.isascii() and n.isdigit() and len(n) < 10 for n in numbers)
        found += [int(number) for number in numbers] if is_ids else [item]
    return found


def file_thresholds(nms: NmsMetadata) -> Thresholds:
    """Return the default thresholds of NMS inside a file."""
    return Thresholds(
        conf=nms.conf,
        iou=nms.iou,
        max_det=nms.max_det,
        multi_label=nms.multi_label,
        class_agnostic=nms.class_agnostic,
    )


def threshold_values(thresholds: Thresholds) -> tuple[float, float, float, float]:
    """Return the values of the inputs `THRESHOLD_INPUTS` of a model file, in their order."""
    return thresholds.conf, thresholds.iou, float(thresholds.multi_label), float(thresholds.class_agnostic)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """Options of the export from a fused model to an ONNX file.

    Attributes:
        input_hw: Height and width of the network input, multiples of the model's largest stride; `None` is the
            training size of the weights, or if it is unknown, the size of this kind of model in the paper.
        batch: Fixed batch size; `None` makes the batch dynamic.
        dynamic_size: Accept any height and width that are multiples of the stride; `input_hw` is then the default.
        nms: `plugin` (our op with a function body of standard operators), `standard` (that body inlined),
            `efficient` (EfficientNMS_TRT, with a body for other runtimes) or `none` (decoded output).
        conf, iou, max_det, multi_label, class_agnostic: See `Thresholds`. They are defaults of the file; all but
            `max_det` can be changed at run time, except with `efficient`.
        max_candidates: Number of best-scoring candidates that enter NMS.
        input_kind: `float32` (NCHW RGB 0..1) or `uint8` (NHWC BGR, scaling and layout inside the graph).
        opset: ONNX operator set, 13 to 21.
        simplify: Run onnx-simplifier on the graph.

    Example:
        >>> ExportOptions(input_hw=(384, 640), batch=None).max_det
        300
    """

    input_hw: tuple[int, int] | None = None
    batch: int | None = 1
    dynamic_size: bool = False
    nms: str = "plugin"
    conf: float = 0.25
    iou: float = 0.45
    max_det: int = 300
    multi_label: bool = False
    class_agnostic: bool = False
    max_candidates: int = TOPK_LIMIT
    input_kind: InputKind = "float32"
    opset: int = 17
    simplify: bool = True

    def __post_init__(self) -> None:
        Thresholds(conf=self.conf, iou=self.iou, max_det=self.max_det)
        if self.nms not in NMS_KINDS:
            raise UsageError(f"--nms {self.nms} is unknown.", fix=f"One of: {', '.join(NMS_KINDS)}")
        if self.input_kind not in INPUT_KINDS:
            raise UsageError(f"--input {self.input_kind} is unknown.", fix=f"One of: {', '.join(INPUT_KINDS)}")
        if self.opset not in OPSETS:
            raise UsageError(f"--opset {self.opset} is not supported.", fix=f"From {OPSETS[0]} to {OPSETS[-1]}.")
        if self.batch is not None:
            _checked("--batch", self.batch, Integral, fix="For example: --batch 8")
        if self.batch is not None and self.batch < 1:
            raise UsageError(f"--batch {self.batch} must be at least 1.", fix="For any size use --dynamic-batch")
        if self.max_det > TOPK_LIMIT:
            raise UsageError(
                f"max_det {self.max_det} is above {TOPK_LIMIT}, the limit of TensorRT's TopK.",
                fix=f"--max-det {TOPK_LIMIT}",
            )
        if self.max_candidates > TOPK_LIMIT:
            raise UsageError(
                f"max_candidates {self.max_candidates} is above {TOPK_LIMIT}, the limit of TensorRT's TopK.",
                fix=f"--max-candidates {TOPK_LIMIT}",
            )
        if self.max_candidates < self.max_det:
            raise UsageError(
                f"max_candidates {self.max_candidates} is below max_det {self.max_det}.",
                fix=f"For example: --max-candidates {self.max_det}",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Options:
    """Options of the INT8 quantization of a float32 graph.

    Attributes:
        target: What runs the file fastest: `tensorrt` (symmetric int8 activations), `cpu` (asymmetric uint8 ones, for
            ONNX Runtime and OpenVINO on x86), or `arm` (asymmetric int8 ones, for ONNX Runtime on ARM).
        method: How an activation range is chosen from the histogram: `mse` (least squared error; the default for
            TensorRT), `lp` (least error to the power of 2.4, which clips less; the default for CPUs), `percentile`
            (99.99 % of the values), `entropy` (as TensorRT's calibrator) or `max` (no clipping).
        rounding: How weights are rounded: `nearest` (each to the nearest step) or `gptq` (together, for a small error
            of the outputs on calibration images; `round_weights` does it, in minutes).
        exclude: Convolutions that stay float: the name of each and the reason.
        fallback: Precision of everything that is not INT8: `fp16` (the default for TensorRT) or `fp32` (the only one
            for CPUs, and for graphs whose values overflow FP16).
        reduce_range: Weights of 7 bits, the default for `cpu`. On x86 CPUs without VNNI, the INT8 kernels of OpenVINO
            and ONNX Runtime add pairs of products in 16 bits, which saturate with 8 bits. With 7 bits one file is right
            on every x86 CPU.
        correct_bias: Correct each bias by the mean error that rounding the weights causes.
        silu_floor: For CPUs: inputs of SiLU below minus this count as minus this. A small floor leaves smaller steps
            for all other inputs; a large one lets SiLU reach 0. `choose_silu_floor` measures which is better.

    Example:
        >>> Int8Options(target="cpu", reduce_range=True).fallback
        'fp32'
    """

    target: str = "tensorrt"
    method: str = ""
    rounding: str = "nearest"
    exclude: Mapping[str, str] = field(default_factory=dict)
    fallback: str = ""
    reduce_range: bool | None = None
    correct_bias: bool = True
    silu_floor: float = 9.0

    def __post_init__(self) -> None:
        fallback = self.fallback or ("fp16" if self.target == "tensorrt" else "fp32")
        object.__setattr__(self, "fallback", fallback)
        object.__setattr__(self, "method", self.method or ("mse" if self.target == "tensorrt" else "lp"))
        if self.reduce_range is None:
            object.__setattr__(self, "reduce_range", self.target == "cpu")
        for name, value, known in (
            ("int8-target", self.target, INT8_TARGETS),
            ("method", self.method, INT8_METHODS),
            ("rounding", self.rounding, INT8_ROUNDINGS),
            ("fallback", fallback, INT8_FALLBACKS),
        ):
            if value not in known:
                raise UsageError(f"--{name} {value} is unknown.", fix=f"One of: {', '.join(known)}")
        if self.target != "tensorrt" and fallback == "fp16":
            raise UsageError(
                f"--fallback fp16 is slower than float32 on a CPU, for which --int8-target {self.target} is.",
                fix="Leave it out, or use  --int8-target tensorrt",
            )
        if self.target != "cpu" and self.reduce_range:
            raise UsageError(
                f"--reduce-range is for x86 CPUs, not for --int8-target {self.target}.",
                fix="Leave it out, or use  --int8-target cpu",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeOptions:
    """Options of the workflow that produces an INT8 file.

    Attributes:
        int8: See `Int8Options`.
        max_drop: Maximum loss in AP points (of 100); layers are excluded from INT8 until it is met. `None`: no limit.
        sensitivity: Measure the sensitivity of each layer even if no layer needs to be excluded.
        cache: Calibration file; by default one in the cache folder, named after model and images.
    """

    int8: Int8Options = field(default_factory=Int8Options)
    max_drop: float | None = None
    sensitivity: bool = False
    cache: Path | None = None

    def __post_init__(self) -> None:
        if self.max_drop is not None:
            check_max_drop(self.max_drop)


@dataclass(frozen=True, kw_only=True, slots=True)
class ValOptions:
    """Options of the evaluation; the defaults are those of the official evaluation, except `batch`.

    Attributes:
        rect: Sort images by aspect ratio and choose a canvas for each batch (the published protocol). `False` is a
            letterbox of one size; `None` is rect if the model takes any input size.
        batch: Number of images that share a canvas and run together. The official program uses 32, which gives some
            images another canvas and needs four times the memory.
        conf, iou, max_det, multi_label: See `Thresholds`.
    """

    rect: bool | None = None
    batch: int = 8
    conf: float = 0.001
    iou: float = 0.65
    max_det: int = 300
    multi_label: bool = True

    def __post_init__(self) -> None:
        _ = self.thresholds
        _checked("batch", self.batch, Integral, fix="For example: --batch 8")
        if self.batch < 1:
            raise UsageError(f"batch must be at least 1, not {self.batch}.", fix="For example: --batch 8")

    @property
    def thresholds(self) -> Thresholds:
        """The thresholds of these options."""
        return Thresholds(conf=self.conf, iou=self.iou, max_det=self.max_det, multi_label=self.multi_label)


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchOptions:
    """Options of a benchmark, which measures a row for each batch size at each concurrency.

    Attributes:
        batches: Numbers of images per call.
        concurrency: Numbers of concurrent threads.
        duration_s: Seconds for each part of a row: latency with its stages, and throughput. A slow model takes longer,
            because a minimum number of calls is measured.
        warmup_s: Seconds after which the warm-up ends even if times are not stable yet.
    """

    batches: tuple[int, ...] = (1,)
    concurrency: tuple[int, ...] = (1,)
    duration_s: float = 5.0
    warmup_s: float = 15.0

    def __post_init__(self) -> None:
        for name, numbers in (("batch", self.batches), ("concurrency", self.concurrency)):
            for number in numbers:
                _checked(f"--{name}", number, Integral, fix=f"For example: --{name} 1,8")
            if not numbers or min(numbers) < 1:
                raise UsageError(f"--{name} {_listed(numbers)} must be at least 1.", fix=f"For example: --{name} 1,8")
        if max(self.concurrency) > MAX_CONCURRENCY:
            raise UsageError(
                f"--concurrency {max(self.concurrency)} is above {MAX_CONCURRENCY}.",
                fix="For example: --concurrency 1,2,4,8",
            )
        for name, seconds in (("duration", self.duration_s), ("warmup", self.warmup_s)):
            if not 0 <= seconds < float("inf"):
                raise UsageError(f"--{name} {seconds:g} is not a time in seconds.", fix=f"For example: --{name} 10")
        for name in ("batches", "concurrency"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportOptions:
    """Options of a deployment report.

    Attributes:
        limit: Measure AP on the first `limit` images; `None` on all.
        stage_limit: Compare the stages on at most this many images.
        max_drop: Largest allowed loss in AP points (of 100).
        device: Device of all runtimes.
        runtime: The only runtime for ONNX files; `auto` uses all that are installed.
        duration_s: Seconds to measure latency of each artifact, and again to measure throughput; 0 measures neither.
    """

    limit: int | None = None
    stage_limit: int = 16
    max_drop: float = 0.3
    device: str = "cpu"
    runtime: str = "auto"
    duration_s: float = 5.0

    def __post_init__(self) -> None:
        for name, number in (("limit", self.limit), ("stage-limit", self.stage_limit)):
            if number is not None and _checked(f"--{name}", number, Integral, fix=f"For example: --{name} 16") < 1:
                raise UsageError(f"--{name} {number} leaves no image.", fix=f"For example: --{name} 16")
        check_max_drop(self.max_drop)
        if not 0 <= self.duration_s < float("inf"):
            raise UsageError(
                f"--duration {self.duration_s:g} is not a time in seconds.", fix="For example: --duration 5"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """Options of the build from an ONNX file to a TensorRT engine.

    Attributes:
        targets: Compute capabilities (`sm86`, `8.6`) for TensorRT-RTX to build for; no such GPU is needed here.
            Any target selects TensorRT-RTX. Without targets, TensorRT builds for the GPU of this machine, and
            TensorRT-RTX chooses.
        plugin: `auto` (our plugin if it is built), `on` (our plugin, else an error) or `off` (operators of the graph).
        min_batch, opt_batch, max_batch: Optimization profile of a file with a dynamic batch; defaults are 1, the
            maximum, and 8. The engine is fastest at `opt_batch`.
        workspace_gib: Maximum GPU memory that a layer may use as scratch space; `None` is TensorRT's own limit.
        opt_level: Builder optimization level, 0 (fast build) to 5 (long search); TensorRT's default is 3.
        timing_cache: File of measured kernel times; by default one per device and version in the cache folder.
        use_timing_cache: `False` measures all kernels and writes no cache.
        version_compatible: The engine also runs with later versions of TensorRT.
        hardware_compatible: `none`, `ampere+` (Ampere and later) or `same-cc` (this compute capability).
        sparse: Allow sparse kernels for weights of the 2:4 pattern.
        dla: DLA core of a Jetson; layers that it cannot run stay on the GPU.
        fixed_thresholds: Compile the file's thresholds into the engine instead of making them inputs, for servers that
            take one input only (Triton, DeepStream).

    Example:
        >>> EngineOptions(targets=("sm86", "8.9"), max_batch=8).targets
        ('8.6', '8.9')
    """

    targets: tuple[str, ...] = ()
    plugin: str = "auto"
    min_batch: int | None = None
    opt_batch: int | None = None
    max_batch: int | None = None
    workspace_gib: float | None = None
    opt_level: int | None = None
    timing_cache: Path | None = None
    use_timing_cache: bool = True
    version_compatible: bool = False
    hardware_compatible: str = "none"
    sparse: bool = False
    dla: int | None = None
    fixed_thresholds: bool = False

    def __post_init__(self) -> None:
        capabilities = sorted({compute_capability(target) for target in self.targets}, key=_by_number)
        object.__setattr__(self, "targets", tuple(capabilities))
        for name, value, known in (
            ("plugin", self.plugin, PLUGIN_USES),
            ("hardware-compatible", self.hardware_compatible, HARDWARE_COMPATIBILITIES),
        ):
            if value not in known:
                raise UsageError(f"--{name} {value} is unknown.", fix=f"One of: {', '.join(known)}")
        given = [batch for batch in (self.min_batch, self.opt_batch, self.max_batch) if batch is not None]
        if given != sorted(given) or min(given, default=1) < 1:
            raise UsageError(
                f"--min-batch, --opt-batch, --max-batch must rise from at least 1, not {', '.join(map(str, given))}.",
                fix="For example: --min-batch 1 --opt-batch 4 --max-batch 8",
            )
        if self.workspace_gib is not None and not 0 < self.workspace_gib < float("inf"):
            raise UsageError(
                f"--workspace {self.workspace_gib:g} is not a size in GiB.", fix="For example: --workspace 4"
            )
        if self.opt_level is not None and self.opt_level not in OPT_LEVELS:
            raise UsageError(f"--opt-level {self.opt_level} is unknown.", fix="From 0 to 5; TensorRT's default is 3.")
        if self.dla is not None and self.dla < 0:
            raise UsageError(f"--dla {self.dla} is not the number of a DLA core.", fix="For example: --dla 0")
        if self.timing_cache is not None and not self.use_timing_cache:
            raise UsageError(
                "--timing-cache and --no-timing-cache contradict each other.", fix="Leave one of them out."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """Options of training; the hyperparameters are in a separate file.

    Attributes:
        epochs: Passes over the training images.
        batch: Images per step, over all processes.
        nominal_batch: Gradients are accumulated over several steps, up to about this many images.
        img: Input size in pixels, a multiple of the largest stride.
        seed: Seed of all random choices.
        workers: Data loading processes of each training process.
        cache_gib: Memory for cached images; `None` is a quarter of the free memory.
        half: Mixed precision: float16 on a GPU, bfloat16 on a CPU (faster only if the CPU has such instructions).
            `None` uses it on GPUs only.
        adam: AdamW instead of SGD.
        linear_lr: Linear learning rate schedule instead of the cosine.
        sync_bn: Synchronize BatchNorm over all processes.
        recalibrate_bn: Recompute the BatchNorm statistics of given weights on the training images, without changing
            the network's output.
        freeze: Layers that are not trained: one number freezes the first layers up to it, several numbers those layers.
        multi_scale: Train at random sizes from 0.5 to 1.5 times `img`, a new one for each step.
        rect: Batch images of similar aspect ratio on a canvas of that shape, without mosaic.
        close_mosaic: Number of last epochs without mosaic, mixup and copy-paste.
        image_weights: Sample images of classes with low AP more often.
        autoanchor: Fit new anchors if the recall of the current ones is too low (otherwise it is only reported).
        patience: Stop after this many epochs without improvement; 0 never stops early.
        val_every: Number of epochs between validations; 0 validates only after the last epoch.
        save_minutes: Minutes between saved training states within an epoch.
        ota, assigner, constraint: See `LossOptions`.
        auxiliary: `partial` (the official heads), `full` (in E6E: read the sum of both branches, table 8) or `none`.
    """

    epochs: int = 300
    batch: int = 16
    nominal_batch: int = 64
    img: int = 640
    seed: int = 0
    workers: int = 4
    cache_gib: float | None = None
    half: bool | None = None
    adam: bool = False
    linear_lr: bool = False
    sync_bn: bool = True
    recalibrate_bn: bool = True
    freeze: tuple[int, ...] = ()
    multi_scale: bool = False
    rect: bool = False
    close_mosaic: int = 0
    image_weights: bool = False
    autoanchor: bool = False
    patience: int = 0
    val_every: int = 1
    save_minutes: float = 10.0
    ota: bool = True
    assigner: str = "coarse-to-fine"
    constraint: bool = True
    auxiliary: str = "partial"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "nominal_batch", "img"):
            _at_least(1, name, getattr(self, name), Integral)
        for name in ("seed", "workers", "close_mosaic", "patience", "val_every"):
            _at_least(0, name, getattr(self, name), Integral)
        _at_least(0, "save_minutes", self.save_minutes)
        _at_least(0, "cache", self.cache_gib or 0)
        _at_least(0, "freeze", min(self.freeze, default=0))
        for name, value, known in (
            ("assigner", self.assigner, ASSIGNERS),
            ("auxiliary", self.auxiliary, AUXILIARY_HEADS),
        ):
            if value not in known:
                raise UsageError(f"--{name} {value} is unknown.", fix=f"One of: {', '.join(known)}")
        if self.rect and self.multi_scale:
            raise UsageError("--rect and --multi-scale contradict each other.", fix="Leave one of them out.")
        if self.rect and self.image_weights:
            raise UsageError("--rect and --image-weights contradict each other.", fix="Leave one of them out.")


def _at_least(least: int, name: str, value: float, kind: type = Real) -> None:
    option = name.replace("_", "-")
    _checked(f"--{option}", value, kind, fix=f"For example: --{option} {least + 1}")
    if not least <= value < float("inf"):
        raise UsageError(f"--{option} {value:g} must be at least {least}.", fix=f"For example: --{option} {least + 1}")


def size_text(hw: tuple[int, int]) -> str:
    """Return a size as `--img` takes it: `640` for a square, else height x width, such as `384x640`."""
    height, width = hw
    return str(height) if height == width else f"{height}x{width}"


def parse_size(img: object) -> tuple[int, int] | None:
    """Return height and width of an image size: a number of pixels for a square, or a pair; `None` stays `None`.

    Raises:
        UsageError: It is neither, or outside of 1 to `MAX_SIDE`.
    """
    if img is None:
        return None
    try:
        sides = tuple(img) if isinstance(img, Iterable) else (img, img)
        height, width = (0 if isinstance(side, bool) else operator.index(side) for side in sides)
    except (TypeError, ValueError):
        height = width = 0
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise UsageError(
            f"img must be a number of pixels or (height, width), from 1 to {MAX_SIDE}, not {img!r}.",
            fix="For example: --img 640 or --img 384x640",
        )
    return height, width


def compute_capability(text: str) -> str:
    """Return the compute capability as `8.6`, from `8.6`, `86`, `sm86` or `sm_86`.

    Raises:
        UsageError: The text is none of these.
    """
    found = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", text.strip().lower())
    if found is None:
        raise UsageError(f"--target {text!r} is not a compute capability.", fix="For example: --target sm86,sm89,sm120")
    return f"{int(found[1])}.{found[2]}"


def _listed(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


def _by_number(capability: str) -> tuple[int, ...]:
    return tuple(int(number) for number in capability.split("."))


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizeOptions:
    """Options of the search for the fastest detector.

    Attributes:
        max_drop: Maximum loss in AP points (of 100) against the checkpoint in FP32.
        batches: Numbers of images per call to try.
        callers: Concurrency, the number of threads that call at the same time.
        duration_s: Maximum duration of the final measurement in seconds.
    """

    max_drop: float = 0.3
    batches: tuple[int, ...] = (1,)
    callers: int = 1
    duration_s: float = 120.0

    def __post_init__(self) -> None:
        check_max_drop(self.max_drop)
        if not self.batches or min(self.batches) < 1:
            raise UsageError(f"--batch {_listed(self.batches)} must be at least 1.", fix="For example: --batch 1,8")
        if not 1 <= self.callers <= MAX_CONCURRENCY:
            raise UsageError(
                f"--concurrency {self.callers} is not between 1 and {MAX_CONCURRENCY}.",
                fix="For example: --concurrency 4",
            )
        if not 0 < self.duration_s < math.inf:
            raise UsageError(
                f"--duration {self.duration_s:g} is not a duration in seconds.", fix="For example: --duration 120"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepStreamOptions:
    """Options of a DeepStream application.

    Attributes:
        streams: Maximum number of streams, which is also the batch size.
        conf: Show detections with a score of at least this; `None` is the threshold of the file.
    """

    streams: int = 1
    conf: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.streams <= MAX_DEEPSTREAM_STREAMS:
            raise UsageError(
                f"--streams {self.streams} is not between 1 and {MAX_DEEPSTREAM_STREAMS}.",
                fix="For example: --streams 4",
            )
        if self.conf is not None and not 0 <= self.conf <= 1:
            raise UsageError(f"conf must be between 0 and 1, not {self.conf}.", fix="For example: --conf 0.25")
