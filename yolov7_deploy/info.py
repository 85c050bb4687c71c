"""ModelInfo: the passport that travels with a model through every file format.

`.onnx` carries it in `metadata_props` under `PASSPORT_KEY`, `.safetensors` in its header under the same key,
`.engine` beside it in `NAME.engine.json`. A file without one still opens: `foreign_info` says what was assumed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from yolov7_deploy.errors import LoadError

PASSPORT_KEY = "yolov7_deploy"
SCHEMA = 1

NmsKind = Literal["plugin", "standard", "efficient"]
InputKind = Literal["float32", "uint8"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NmsInfo:
    """What the suppression inside a graph does.

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
class ModelInfo:
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
        nms: Suppression inside the file; `None` where the output is the decoded head.
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
    nms: NmsInfo | None = None
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
        """One line of sorted JSON, the same bytes for the same passport."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> ModelInfo:
        """The passport written by `to_json`.

        Raises:
            LoadError: The text is not a passport of this schema.
        """
        try:
            return cls(**_typed(json.loads(text)))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise LoadError(
                f"The passport inside the file cannot be read ({error}).",
                fix="Export the model again:  y7 export --weights WEIGHTS.pt",
            ) from error


def _typed(raw: dict[str, Any]) -> dict[str, Any]:
    """JSON values as the field types; unknown fields of a newer writer are left out."""
    if raw.get("schema") != SCHEMA:
        raise ValueError(f"schema {raw.get('schema')!r}, this version reads {SCHEMA}")
    known = {field.name for field in fields(ModelInfo)}
    values = {key: _frozen(value) for key, value in raw.items() if key in known}
    if raw.get("nms"):
        values["nms"] = NmsInfo(**{f.name: raw["nms"][f.name] for f in fields(NmsInfo)})
    return values


def _frozen(value: object) -> object:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def foreign_info(
    *, classes: int, input_hw: tuple[int, int] | None, batch: int | None, input_kind: InputKind, nms: NmsInfo | None
) -> ModelInfo:
    """The passport assumed for a file that carries none: classes are called `class_0`, `class_1`, ..."""
    return ModelInfo(
        variant="custom",
        class_names=tuple(f"class_{i}" for i in range(classes)),
        strides=(),
        anchors=(),
        input_hw=input_hw,
        batch=batch,
        input_kind=input_kind,
        nms=nms,
        notes=("no passport in the file: class names, letterbox and RGB order are assumed",),
    )
