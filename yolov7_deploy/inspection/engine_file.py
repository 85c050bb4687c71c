"""Contents of an engine file, from its build record, its inspector output and its header; needs no TensorRT."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from yolov7_deploy._bounded_read import MAX_MODEL_BYTES, open_file
from yolov7_deploy._serialization import sha256_hex
from yolov7_deploy.errors import LoadError
from yolov7_deploy.tensorrt.build_record import EngineRecord
from yolov7_deploy.tensorrt.engine import Engine, plan_version
from yolov7_deploy.tensorrt.inspector import Detail, LayerTable, engine_layers

# The header of a plan: four letters, version of the layout, ..., length of the plan, version of TensorRT. Then, in
# plans of TensorRT-RTX 1.7.1, a bit mask of the target compute capabilities.
_HEADER_BYTES = 28
_LENGTH = slice(16, 24)
_TARGETS = slice(32, 40)
_TARGET_BITS = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
# Other programs write a length and that many bytes of JSON before the plan.
_MAX_JSON = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSummary:
    """Statistics of the layers; see `LayerTable`."""

    detail: Detail
    layers: int
    types: dict[str, int]
    precisions: dict[str, int]
    convolutions: dict[str, int]
    reformats: int
    plugins: tuple[str, ...]
    weights_bytes: int | None
    peak_activation_bytes: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineFile:
    """Contents of an engine file.

    Attributes:
        path: Path as passed.
        size_bytes, sha256: Size and digest of the plan.
        product, tensorrt: Product and version that wrote the plan, from its header; empty if the header has none. Only
            the last byte of the last number of the version is stored.
        targets: Compute capabilities in the header of a TensorRT-RTX plan.
        record: Build record; `None` for a third-party engine.
        summary, table: The layers from the engine inspector, else as listed by the builder, else as parsed; `None` if
            unknown.
        notes: Remarks about the file.
    """

    path: str
    size_bytes: int
    sha256: str
    product: str
    tensorrt: str
    targets: tuple[str, ...]
    record: EngineRecord | None
    summary: LayerSummary | None
    table: LayerTable | None
    notes: tuple[str, ...]


def read_engine_file(path: str | Path) -> EngineFile:
    """Return the contents of an engine file and of its build record.

    Raises:
        LoadError: The file is missing, truncated or not a plan, or its build record cannot be read or belongs to
            another file.
    """
    path = Path(path)
    _refuse_wrapped(path)
    engine = Engine.load(path)
    _refuse_truncated(path, engine.plan)
    product, version = plan_version(engine.plan) or ("", "")
    record = engine.record
    table, notes = engine_layers(record) if record else (None, ())
    return EngineFile(
        path=str(path),
        size_bytes=len(engine.plan),
        sha256=record.plan_sha256 if record else sha256_hex(engine.plan),
        product=product,
        tensorrt=version,
        targets=_targets(engine.plan) if product == "tensorrt_rtx" else (),
        record=record,
        summary=_summary(table) if table else None,
        table=table,
        notes=(*engine.notes, *(record.notes if record else ()), *notes),
    )


def _summary(table: LayerTable) -> LayerSummary:
    return LayerSummary(
        detail=table.detail,
        layers=len(table.layers),
        types=table.types,
        precisions=table.precisions,
        convolutions=table.convolutions,
        reformats=table.reformats,
        plugins=table.plugins,
        weights_bytes=table.weights_bytes,
        peak_activation_bytes=table.peak_activation_bytes,
    )


def _refuse_wrapped(path: Path) -> None:
    """Raise an error for a plan that follows JSON of another program; the fix extracts the plan."""
    try:
        with open_file(path, max_bytes=MAX_MODEL_BYTES) as stream:
            length = int.from_bytes(stream.read(4), "little")
            if not 0 < length < _MAX_JSON or not stream.read(length).startswith(b"{"):
                return
            inside = plan_version(stream.read(64))
    except OSError:
        return  # `Engine.load` reports it
    if inside is not None:
        raise LoadError(
            f"{path} is a plan after {length} bytes of JSON, as written by Ultralytics; TensorRT cannot load it.",
            fix=f"Extract the plan:  tail -c +{length + 5} {path} > plan.engine",
        )


def _refuse_truncated(path: Path, plan: bytes) -> None:
    # The length is only known in headers of this layout.
    announced = int.from_bytes(plan[_LENGTH], "little") if plan_version(plan) else _HEADER_BYTES
    if announced > len(plan):
        raise LoadError(
            f"{path} is truncated: it has {len(plan)} bytes of at least {announced}.",
            fix=f"Copy it again, or build it again:  y7 build --weights {path.stem}.onnx",
        )


def _targets(plan: bytes) -> tuple[str, ...]:
    bits = int.from_bytes(plan[_TARGETS], "little")
    return tuple(name for at, name in enumerate(_TARGET_BITS) if bits >> at & 1)
