"""One frozen dataclass per verb: defaults live here once. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from yolov7_deploy.errors import UsageError
from yolov7_deploy.info import InputKind

NMS_KINDS = ("plugin", "standard", "efficient", "none")
INPUT_KINDS = ("float32", "uint8")
OPSETS = range(13, 22)
TOPK_LIMIT = 3840  # the largest K of TensorRT's TopK layer


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """What is kept of a network's output. Defaults are the official detection defaults.

    Attributes:
        conf: Keep scores above this (strictly).
        iou: Suppress a box that overlaps a better one of its class by more than this.
        max_det: At most this many boxes a picture, best first.
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
class ValOptions:
    """How average precision is measured; the defaults are the official evaluation's, except `batch`.

    Attributes:
        rect: Pictures sorted by shape, each batch on a canvas of its own size (the published protocol); `False` is a
            plain letterbox; `None` is rect where the model takes any input size.
        batch: Pictures that share a canvas, and that run together. The official program takes 32, which gives some
            pictures another canvas and needs four times the memory.
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
