"""One frozen dataclass per verb: defaults live here once. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from yolov7_deploy.errors import UsageError
from yolov7_deploy.metadata import InputKind

NMS_KINDS = ("plugin", "standard", "efficient", "none")
INPUT_KINDS = ("float32", "uint8")
PRECISIONS = ("fp32", "fp16", "int8")
INT8_METHODS = ("mse", "percentile", "entropy", "max")
INT8_RESTS = ("fp16", "fp32")
OPSETS = range(13, 22)
PLUGIN_USES = ("auto", "on", "off")
HARDWARE_COMPATIBILITIES = ("none", "ampere+", "same-cc")
OPT_LEVELS = range(6)
MAX_THREADS = 256  # callers at the same time
MAX_FRAME_SIDE = 16384
ASSIGNERS = ("independent", "lead-guided", "coarse-to-fine")
AUXILIARY_HEADS = ("partial", "full", "none")
TOPK_LIMIT = 3840  # the largest K of TensorRT's TopK layer


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """What is kept of a network's output. Defaults are the official detection defaults.

    Attributes:
        conf: Keep scores above this (strictly).
        iou: Suppress a box that overlaps a better one of its class by more than this.
        max_det: At most this many boxes an image, best first.
        classes: Only these class ids; `None` keeps all.
        multi_label: Every class above `conf` is a detection, instead of a box's best class only
            (the evaluation protocol; official detection keeps the best class).
        class_agnostic: A box suppresses boxes of every class.
    """

    conf: float = 0.25
    iou: float = 0.45
    max_det: int = 300
    classes: tuple[int, ...] | None = None
    multi_label: bool = False
    class_agnostic: bool = False

    def __post_init__(self) -> None:
        for name, value in (("conf", self.conf), ("iou", self.iou)):
            if not 0 <= value <= 1:
                raise UsageError(f"{name} must be between 0 and 1, not {value}.", fix=f"For example: --{name} 0.25")
        if self.max_det < 1:
            raise UsageError(f"max_det must be at least 1, not {self.max_det}.", fix="For example: --max-det 100")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """How a fused model becomes an ONNX file.

    Attributes:
        input_hw: Height and width of the network input, multiples of the model's largest stride; the paper's size of
            this kind of model where left out.
        batch: Fixed batch size; `None` leaves the batch open.
        nms: `plugin` (our op with a function body of standard operators), `standard` (that body inlined),
            `efficient` (EfficientNMS_TRT, with a body for other runtimes) or `none` (decoded output).
        conf, iou, max_det, multi_label, class_agnostic: See `Thresholds`; `conf` and `iou` stay changeable at run
            time except with `efficient`.
        max_candidates: Best-scoring candidates that enter suppression.
        input_kind: `float32` (NCHW RGB 0..1) or `uint8` (NHWC BGR, scaling and layout inside the graph).
        opset: ONNX operator set, 13 to 21.
        simplify: Run onnx-simplifier over the graph.
    """

    input_hw: tuple[int, int] | None = None
    batch: int | None = 1
    nms: str = "plugin"
    conf: float = 0.25
    iou: float = 0.45
    max_det: int = 100
    multi_label: bool = True
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
        if self.batch is not None and self.batch < 1:
            raise UsageError(f"--batch {self.batch} must be at least 1.", fix="Or --dynamic-batch")
        if self.max_candidates > TOPK_LIMIT:
            raise UsageError(
                f"max_candidates {self.max_candidates} is above {TOPK_LIMIT}, the most TensorRT can sort.",
                fix=f"--max-candidates {TOPK_LIMIT}",
            )
        if self.max_candidates < self.max_det:
            raise UsageError(
                f"max_candidates {self.max_candidates} is below max_det {self.max_det}.",
                fix=f"For example: --max-candidates {self.max_det}",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Options:
    """How a float32 graph becomes INT8.

    Attributes:
        method: How the range of an activation is chosen from its histogram: `mse` (least squared difference),
            `percentile` (99.99 % of the values), `entropy` (as TensorRT's calibrator did) or `max` (nothing clipped).
        spare: Convolutions that stay float, by name, and why.
        rest: Type of what is not INT8: `fp16`, or `fp32`, which is for graphs whose values half cannot hold.
        correct_bias: Add to each bias what rounding the weights takes from the mean result.
    """

    method: str = "mse"
    spare: Mapping[str, str] = field(default_factory=dict)
    rest: str = "fp16"
    correct_bias: bool = True

    def __post_init__(self) -> None:
        for name, value, known in (("method", self.method, INT8_METHODS), ("rest", self.rest, INT8_RESTS)):
            if value not in known:
                raise UsageError(f"--{name} {value} is unknown.", fix=f"One of: {', '.join(known)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeOptions:
    """How an INT8 file is made.

    Attributes:
        int8: See `Int8Options`.
        max_drop: AP points (of 100) that INT8 may lose; layers are spared until it loses no more. `None` spares none.
        sensitivity: Find what each layer costs, also where nothing need be spared.
        cache: File that keeps the calibration; by default one in the cache folder, named after model and images.
    """

    int8: Int8Options = field(default_factory=Int8Options)
    max_drop: float | None = None
    sensitivity: bool = False
    cache: Path | None = None

    def __post_init__(self) -> None:
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            raise UsageError(
                f"--max-drop {self.max_drop:g} is no number of AP points.", fix="From 0 to 100, for example: 0.3"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ValOptions:
    """How average precision is measured; the defaults are the official evaluation's, except `batch`.

    Attributes:
        rect: Images sorted by shape, each batch on a canvas of its own size (the published protocol); `False` is a
            plain letterbox; `None` is rect where the model takes any input size.
        batch: Images that share a canvas, and that run together. The official program takes 32, which gives some
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
        if self.batch < 1:
            raise UsageError(f"batch must be at least 1, not {self.batch}.", fix="For example: --batch 8")

    @property
    def thresholds(self) -> Thresholds:
        """What is kept of the network's output."""
        return Thresholds(conf=self.conf, iou=self.iou, max_det=self.max_det, multi_label=self.multi_label)


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchOptions:
    """How speed is measured: a row for each batch size with each number of callers.

    Attributes:
        batches: Images of a call; each is measured by itself.
        threads: Callers at the same time.
        duration_s: Of either part of a row: latency with its spans, and throughput. A slow model takes longer, until
            there are calls enough.
        warmup_s: When the warm-up ends even if times are not stable yet.
    """

    batches: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = (1,)
    duration_s: float = 5.0
    warmup_s: float = 15.0

    def __post_init__(self) -> None:
        for name, numbers in (("batch", self.batches), ("threads", self.threads)):
            if not numbers or min(numbers) < 1:
                raise UsageError(f"--{name} {_listed(numbers)} must be at least 1.", fix=f"For example: --{name} 1,8")
        if max(self.threads) > MAX_THREADS:
            raise UsageError(
                f"--threads {max(self.threads)} is above {MAX_THREADS}.", fix="For example: --threads 1,2,4,8"
            )
        for name, seconds in (("duration", self.duration_s), ("warmup", self.warmup_s)):
            if not 0 <= seconds < float("inf"):
                raise UsageError(f"--{name} {seconds:g} is no time in seconds.", fix=f"For example: --{name} 10")
        for name in ("batches", "threads"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """How an ONNX file becomes a TensorRT engine.

    Attributes:
        targets: Compute capabilities (`sm86`, `8.6`) that TensorRT-RTX builds for, with or without such a GPU here.
            Any of them implies TensorRT-RTX; none leaves it to TensorRT-RTX, or means this machine's GPU.
        plugin: `auto` (our plugin where it is built), `on` (or an error) or `off` (operators of the graph).
        min_batch, opt_batch, max_batch: Of a file with an open batch; 1, the largest and 8 where left out. The engine
            is fastest at `opt_batch`.
        workspace_gib: Most memory of the GPU that a layer may use while it works; TensorRT's own limit where left out.
        opt_level: 0 (builds fast) to 5 (searches long); TensorRT's default is 3.
        timing_cache: File of measured kernel times; by default one per device and version in the cache folder.
        use_timing_cache: `False` measures everything anew and keeps nothing.
        version_compatible: The engine also runs with later versions of TensorRT.
        hardware_compatible: `none`, `ampere+` (Ampere and later) or `same-cc` (this compute capability).
        sparse: Use sparse kernels for weights of the 2:4 pattern.
        dla: Core of the deep learning accelerator of a Jetson; what it cannot run stays on the GPU.
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
            raise UsageError(f"--workspace {self.workspace_gib:g} is no size in GiB.", fix="For example: --workspace 4")
        if self.opt_level is not None and self.opt_level not in OPT_LEVELS:
            raise UsageError(f"--opt-level {self.opt_level} is unknown.", fix="From 0 to 5; TensorRT's default is 3.")
        if self.dla is not None and self.dla < 0:
            raise UsageError(f"--dla {self.dla} is no core.", fix="For example: --dla 0")
        if self.timing_cache is not None and not self.use_timing_cache:
            raise UsageError(
                "--timing-cache and --no-timing-cache contradict each other.", fix="Leave one of them out."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """How a network is trained; what a recipe calls hyper-parameters is in a file of its own.

    Attributes:
        epochs: Passes over the training images.
        batch: Images of a step, of all processes together.
        nominal_batch: Gradients of several steps are added up to about so many images.
        img: Input side, a multiple of the largest stride.
        seed: Of everything random.
        workers: Processes that prepare images, for each training process.
        cache_gib: Memory for prepared images; `None` is a quarter of what is free.
        half: Mixed precision: float16 on a GPU, bfloat16 on a CPU (fast where it has such instructions). `None` is on a
            GPU only.
        adam: AdamW instead of SGD.
        linear_lr: The learning rate falls linearly instead of as a cosine.
        sync_bn: BatchNorm over the images of all processes.
        rebase_bn: Weights that are given get the BatchNorm statistics of the images, with the same output.
        freeze: Layers that stay as they are: one number is the first so many, several are just these.
        multi_scale: Sizes from half to one and a half of `img`, another one each step.
        rect: Images of one shape together on a canvas of that shape, without mosaic.
        close_mosaic: Last epochs without mosaic, mixup and pasting.
        image_weights: Images of classes that are found badly come more often.
        autoanchor: Fit new anchors if too few targets are reached (they are only counted otherwise).
        patience: Epochs without progress until training ends; 0 is never.
        val_every: Epochs from one validation to the next; 0 is only the last.
        save_minutes: Minutes from one resume point to the next within an epoch.
        ota, assigner, constraint: See `LossOptions`.
        auxiliary: `partial` (the official heads), `full` (E6E's read the sum of both branches, table 8) or `none`.
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
    rebase_bn: bool = True
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
            _at_least(1, name, getattr(self, name))
        for name in ("seed", "workers", "close_mosaic", "patience", "val_every", "save_minutes"):
            _at_least(0, name, getattr(self, name))
        _at_least(0, "cache_gib", self.cache_gib or 0)
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


def _at_least(least: int, name: str, value: float) -> None:
    if not least <= value < float("inf"):
        option = name.replace("_", "-")
        raise UsageError(f"--{option} {value:g} must be at least {least}.", fix=f"For example: --{option} {least + 1}")


def compute_capability(text: str) -> str:
    """`8.6` for `8.6`, `86`, `sm86` or `sm_86`.

    Raises:
        UsageError: It is none of these.
    """
    found = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", text.strip().lower())
    if found is None:
        raise UsageError(f"--target {text!r} is no compute capability.", fix="For example: --target sm86,sm89,sm120")
    return f"{int(found[1])}.{found[2]}"


def _listed(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


def _by_number(capability: str) -> tuple[int, ...]:
    return tuple(int(number) for number in capability.split("."))
