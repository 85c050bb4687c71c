"""ModelInfo: the metadata that travels with a model through every file format.

`.onnx` carries it in `metadata_props` under `METADATA_KEY`, `.safetensors` in its header under the same key,
`.engine` beside it in `NAME.engine.json`. A file without one still opens: `foreign_metadata` says what was assumed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from yolov7_deploy._serialization import from_plain, shown
from yolov7_deploy.errors import LoadError

METADATA_KEY = "yolov7_deploy"
SCHEMA = 1

# Beyond these a number is damage: no network takes such sides, and no list of detections has so many rows.
MAX_SIDE = 2**16
MAX_COUNT = 2**31 - 1

NmsKind = Literal["plugin", "standard", "efficient"]
InputKind = Literal["float32", "uint8"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NmsMetadata:
    """What the NMS inside a graph does.

    `conf` and `iou` are the values the file falls back to; with `runtime_thresholds` they are also optional
    inputs of the graph, so one file serves every threshold. The other fields are fixed by the export.
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
class Int8Info:
    """How the INT8 of a graph came about.

    Attributes:
        method: By which the ranges of activations were chosen.
        images: How many they were measured on.
        images_sha256: Of those images, in any order.
        rest: Type of what is not INT8: `fp16` or `fp32`.
        convolutions, int8_convolutions: How many there are, and how many of them compute in INT8.
        share: Part of all multiply-accumulates that INT8 does; `None` where shapes are open.
        kept: (layer, reason) of each convolution that stayed float.
    """

    method: str
    images: int
    images_sha256: str
    rest: str
    convolutions: int
    int8_convolutions: int
    share: float | None
    kept: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelMetadata:
    """Everything a runtime must know about a model that its tensors do not say.

    Attributes:
        variant: Official name (`yolov7-w6`), or `custom`.
        class_names: One name per class, in class-id order.
        strides: Pixels per cell of each head level, fine to coarse.
        anchors: Per level, three (width, height) in input pixels.
        input_hw: Fixed height and width of the network input; `None` takes any multiple of the largest stride.
        batch: Fixed batch size; `None` takes any.
        input_kind: `float32` is NCHW RGB 0..1; `uint8` is NHWC BGR 0..255.
        precision: `fp32`, `fp16` or `int8`.
        int8: How the ranges of INT8 came about; `None` in other precisions and in files of others.
        nms: NMS inside the file; `None` where the output is the decoded head.
        heads: Names of the raw head tensors inside an ONNX graph, fine to coarse.
        opset: ONNX opset, 0 for files that are not ONNX.
        source: Name of the weights file this came from.
        source_sha256: Digest of that file, empty where unknown.
        version: Version of this package that wrote the file.
        notes: What a reader should know (assumptions, layers kept in float32).
    """

    variant: str
    class_names: tuple[str, ...]
    strides: tuple[int, ...]
    anchors: tuple[tuple[tuple[float, float], ...], ...]
    input_hw: tuple[int, int] | None = None
    batch: int | None = None
    input_kind: InputKind = "float32"
    precision: str = "fp32"
    int8: Int8Info | None = None
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

    @property
    def stride(self) -> int:
        """The largest stride: input sides are multiples of it. 32 where no head is known."""
        return max(self.strides, default=32)

    @property
    def default_hw(self) -> tuple[int, int]:
        """The fixed input size, or the paper's size of this kind of model (Table 1: 640, P6 models 1280)."""
        side = 1280 if self.stride > 32 else 640
        return self.input_hw or (side, side)

    def to_json(self) -> str:
        """One line of sorted JSON, the same bytes for the same metadata."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> ModelMetadata:
        """The metadata written by `to_json`; fields of a newer writer are left out.

        Raises:
            LoadError: The text is not metadata of this schema; the message names the field.
        """
        try:
            metadata = from_plain(cls, _current(json.loads(text)))
            _check(metadata)
        except (ValueError, RecursionError) as error:
            raise LoadError(
                f"The metadata inside the file cannot be read ({error}).",
                fix="Export the model again:  y7 export --weights WEIGHTS.pt",
            ) from error
        return metadata


def _current(raw: object) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise ValueError(f"not an object but a {type(raw).__name__}")
    if raw.get("schema") != SCHEMA:
        raise ValueError(f"schema {shown(raw.get('schema'))}, this version reads {SCHEMA}")
    return raw


def _check(metadata: ModelMetadata) -> None:
    """Refuses numbers that nothing can be made with, before anybody allocates memory by them."""
    sides = {"input_hw": metadata.input_hw or (), "strides": metadata.strides}
    for name, values in sides.items():
        if not all(1 <= value <= MAX_SIDE for value in values):
            raise ValueError(f"{name} is {shown(values)}; sides go from 1 to {MAX_SIDE} pixels")
    if metadata.batch is not None and not 1 <= metadata.batch <= MAX_COUNT:
        raise ValueError(f"batch is {metadata.batch}")
    pairs = [len(level) for level in metadata.anchors]
    if pairs and (min(pairs) == 0 or len(set(pairs)) != 1):
        raise ValueError(f"anchors per level are {shown(pairs)}; every level has the same number")
    if not all(0 < side <= MAX_SIDE for level in metadata.anchors for pair in level for side in pair):
        raise ValueError(f"anchors are {shown(metadata.anchors)}; sides are above 0")
    if metadata.nms is not None:
        _check_nms(metadata.nms)


def _check_nms(nms: NmsMetadata) -> None:
    for name, threshold in (("conf", nms.conf), ("iou", nms.iou)):
        if not 0 <= threshold <= 1:
            raise ValueError(f"{name} is {threshold:g}; thresholds lie in 0..1")
    if not 1 <= nms.max_det <= MAX_COUNT or not 0 <= nms.max_candidates <= MAX_COUNT:
        raise ValueError(f"max_det is {shown(nms.max_det)} and max_candidates {shown(nms.max_candidates)}")


def foreign_metadata(
    *, classes: int, input_hw: tuple[int, int] | None, batch: int | None, input_kind: InputKind, nms: NmsMetadata | None
) -> ModelMetadata:
    """The metadata assumed for a file that carries none: classes are called `class_0`, `class_1`, ..."""
    return ModelMetadata(
        variant="custom",
        class_names=tuple(f"class_{i}" for i in range(classes)),
        strides=(),
        anchors=(),
        input_hw=input_hw,
        batch=batch,
        input_kind=input_kind,
        nms=nms,
        notes=("no metadata in the file: class names, letterbox and RGB order are assumed",),
    )
