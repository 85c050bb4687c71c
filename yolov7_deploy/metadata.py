"""`ModelMetadata`: what a runtime must know about a model, stored in every file format.

`.onnx` has it in `metadata_props` under `METADATA_KEY`, `.safetensors` in its header under the same key, and
`.engine` in the file `NAME.engine.json` next to it. A file without metadata can be opened, too: `assumed_metadata`
gives the defaults.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from yolov7_deploy._serialization import from_dict, parse_json, short_repr
from yolov7_deploy.errors import LoadError

METADATA_KEY = "yolov7_deploy"
SCHEMA = 1

# Tensor names of exported graphs and engines; those of NMS are the names that EfficientNMS_TRT made customary.
# Optional inputs, float32 [1]; the last two are 0 or 1.
CONF_INPUT, IOU_INPUT = "conf_threshold", "iou_threshold"
MULTI_LABEL_INPUT, CLASS_AGNOSTIC_INPUT = "multi_label", "class_agnostic"
THRESHOLD_INPUTS = (CONF_INPUT, IOU_INPUT, MULTI_LABEL_INPUT, CLASS_AGNOSTIC_INPUT)
RAW_OUTPUT = "output"  # decoded boxes, of files without NMS
NMS_OUTPUTS = ("num_dets", "det_boxes", "det_scores", "det_classes")
NMS_OPERATOR = ("y7", "Y7NMS")  # domain and name of our NMS operator
# Names of Q/DQ pairs between a convolution and its activation, which only ONNX Runtime needs, begin so.
INNER_PAIR_PREFIX = "inner_pair__"
OVERFLOW_OUTPUT = "overflow"  # int32 [B, 1], of engines with our plugin: more candidates than NMS takes

# Larger numbers mean a damaged file: no network takes such an image, and no list of detections is that long.
MAX_SIDE = 2**16
MAX_COUNT = 2**31 - 1
MAX_TEXT = 1000  # characters of a name or a version

NmsKind = Literal["plugin", "standard", "efficient"]
InputKind = Literal["float32", "uint8"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NmsMetadata:
    """Parameters of the NMS inside a graph.

    `conf` and `iou` are the defaults of the file. With `runtime_thresholds` they are also optional inputs of the
    graph, so one file serves all thresholds. The other fields are fixed by the export. For a file of another exporter,
    `max_candidates` is 0 and the other values are assumptions.
    """

    kind: NmsKind
    conf: float
    iou: float
    max_det: int
    max_candidates: int
    multi_label: bool
    class_agnostic: bool
    runtime_thresholds: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Metadata:
    """Record of the quantization of an INT8 graph.

    Attributes:
        target: `tensorrt`, `cpu` or `arm`; see `Int8Options`.
        reduce_range: The weights have 7 bits; see `Int8Options`.
        method: Calibration method that chose the activation ranges (see `Int8Options`), or `qat` for ranges that were
            learned in quantization-aware training.
        rounding: How the weights were rounded: `nearest` or `gptq`; see `Int8Options`.
        images: Number of calibration images.
        images_sha256: Digest of the calibration images, independent of their order.
        fallback: Precision of everything that is not INT8: `fp16` or `fp32`.
        convolutions, int8_convolutions: Number of all convolutions, and of those computed in INT8.
        share: Fraction of all multiply-accumulates computed in INT8; `None` for graphs with dynamic shapes.
        float_layers: (layer, reason) of each convolution that stays float.
    """

    target: str
    reduce_range: bool
    method: str
    images: int
    images_sha256: str
    fallback: str
    convolutions: int
    int8_convolutions: int
    share: float | None
    float_layers: tuple[tuple[str, str], ...]
    rounding: str = "nearest"


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class ModelMetadata:
    """Metadata of a model: what a runtime needs and the tensors do not contain.

    Attributes:
        variant: Official name (`yolov7-w6`), or `custom`.
        class_names: One name per class, in class-id order.
        strides: Stride of each head level in input pixels, fine to coarse.
        anchors: Three (width, height) in input pixels for each level.
        input_hw: Fixed height and width of the network input; `None` for any multiples of the largest stride.
        nominal_hw: Default height and width of a file that takes any size; `None` is the training size.
        training_size: Side in pixels of the square images of the training (the nominal one if it varied); `None` if
            unknown, as for official files.
        batch: Fixed batch size; `None` for any.
        input_kind: `float32` is NCHW RGB 0..1; `uint8` is NHWC BGR 0..255.
        precision: `fp32`, `fp16` or `int8`; that of an opened model may be `bf16`, if its runtime computes so.
        int8: Record of the quantization; `None` for other precisions and for third-party files.
        nms: NMS inside the file; `None` if the output is the decoded head.
        heads: Names of the raw head tensors inside an ONNX graph, fine to coarse.
        opset: ONNX opset, 0 for files that are not ONNX.
        source: Name of the weights file from which this model was created.
        source_sha256: Digest of that file, empty if unknown.
        version: Version of this package that wrote the file.
        notes: Remarks for users of the model (assumptions, layers that stay in float32).

    Example:
        >>> Detector("shapes.onnx").metadata.input_hw
        (96, 96)
    """

    variant: str
    class_names: tuple[str, ...]
    strides: tuple[int, ...]
    anchors: tuple[tuple[tuple[float, float], ...], ...]
    input_hw: tuple[int, int] | None = None
    nominal_hw: tuple[int, int] | None = None
    training_size: int | None = None
    batch: int | None = None
    input_kind: InputKind = "float32"
    precision: str = "fp32"
    int8: Int8Metadata | None = None
    nms: NmsMetadata | None = None
    heads: tuple[str, ...] = ()
    opset: int = 0
    source: str = ""
    source_sha256: str = ""
    version: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.strides) != len(self.anchors):
            raise ValueError(f"{len(self.strides)} strides for {len(self.anchors)} anchor levels")

    def __repr__(self) -> str:
        size = "x".join(map(str, self.input_hw)) if self.input_hw else f"any size, by default {self.default_hw[0]}"
        nms = f", nms {self.nms.kind}" if self.nms else ""
        classes = len(self.class_names)
        return f"ModelMetadata({self.variant} {self.precision}, {classes} classes, {size}{nms}, from {self.source!r})"

    @property
    def stride(self) -> int:
        """The largest stride, of which input sides are multiples; 32 if no head is known."""
        return max(self.strides, default=32)

    @property
    def default_hw(self) -> tuple[int, int]:
        """The fixed or nominal size, else the training size, else the paper's (Table 1: 640, P6 models 1280)."""
        side = self.training_size or (1280 if self.stride > 32 else 640)
        return self.input_hw or self.nominal_hw or (side, side)

    def to_json(self) -> str:
        """Return one line of JSON with sorted keys; the same metadata gives the same bytes."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> ModelMetadata:
        """Return the metadata that `to_json` wrote; fields that a newer version added are ignored.

        Raises:
            LoadError: The text is not metadata of this schema; the message names the field.
        """
        try:
            metadata = from_dict(cls, _current(parse_json(text)))
            _check(metadata)
        except ValueError as error:
            raise LoadError(
                f"The metadata inside the file cannot be read ({error}).",
                fix="Export the model again:  y7 export --weights WEIGHTS.pt",
            ) from error
        return metadata


def _current(raw: object) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise ValueError(f"not an object but a {type(raw).__name__}")
    if raw.get("schema") != SCHEMA:
        raise ValueError(f"schema {short_repr(raw.get('schema'))}, this version reads {SCHEMA}")
    return raw


def _check(metadata: ModelMetadata) -> None:
    """Reject impossible numbers before memory is allocated according to them, and texts that messages would repeat."""
    for name in (field.name for field in fields(metadata)):
        value = getattr(metadata, name)
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise ValueError(f"{name} has {len(value)} characters")
    sizes = (*(metadata.input_hw or ()), *(metadata.nominal_hw or ()))
    sides = {"input_hw": sizes, "strides": metadata.strides}
    for name, values in sides.items():
        if not all(1 <= value <= MAX_SIDE for value in values):
            raise ValueError(f"{name} is {short_repr(values)}; sides go from 1 to {MAX_SIDE} pixels")
    size = metadata.training_size
    if size is not None and (not metadata.stride <= size <= MAX_SIDE or size % metadata.stride):
        raise ValueError(f"training_size is {short_repr(size)}, not a multiple of the stride {metadata.stride}")
    if metadata.batch is not None and not 1 <= metadata.batch <= MAX_COUNT:
        raise ValueError(f"batch is {metadata.batch}")
    pairs = [len(level) for level in metadata.anchors]
    if pairs and (min(pairs) == 0 or len(set(pairs)) != 1):
        raise ValueError(f"anchors per level are {short_repr(pairs)}; every level has the same number")
    if not all(0 < side <= MAX_SIDE for level in metadata.anchors for pair in level for side in pair):
        raise ValueError(f"anchors are {short_repr(metadata.anchors)}; sides are above 0")
    if metadata.nms is not None:
        _check_nms(metadata.nms)


def _check_nms(nms: NmsMetadata) -> None:
    for name, threshold in (("conf", nms.conf), ("iou", nms.iou)):
        if not 0 <= threshold <= 1:
            raise ValueError(f"{name} is {threshold:g}; thresholds lie in 0..1")
    if not 1 <= nms.max_det <= MAX_COUNT or not 0 <= nms.max_candidates <= MAX_COUNT:
        raise ValueError(f"max_det is {short_repr(nms.max_det)} and max_candidates {short_repr(nms.max_candidates)}")


def assumed_metadata(
    *,
    classes: int,
    input_hw: tuple[int, int] | None,
    batch: int | None,
    input_kind: InputKind,
    nms: NmsMetadata | None,
    class_names: tuple[str, ...] = (),
) -> ModelMetadata:
    """Return the metadata that is assumed for a file without any: classes are called `class_0`, `class_1`, ..."""
    unknown = "letterbox and RGB order" if class_names else "class names, letterbox and RGB order"
    return ModelMetadata(
        variant="custom",
        class_names=class_names or tuple(f"class_{i}" for i in range(classes)),
        strides=(),
        anchors=(),
        input_hw=input_hw,
        batch=batch,
        input_kind=input_kind,
        nms=nms,
        notes=(f"no metadata in the file: {unknown} are assumed",),
    )
