"""What an engine file holds, by its build record, by its inspection and by its first bytes; needs no TensorRT."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from yolov7_deploy.errors import LoadError
from yolov7_deploy.tensorrt.build_record import EngineRecord
from yolov7_deploy.tensorrt.engine import Engine, digest, plan_version
from yolov7_deploy.tensorrt.inspector import Detail, LayerTable, layers_of

# The header of a plan: four letters, version of the layout, ..., length of the whole plan, version of TensorRT. Then,
# in plans of TensorRT-RTX 1.7.1, a bit for each compute capability they are for.
_HEADER_BYTES = 28
_LENGTH = slice(16, 24)
_TARGETS = slice(32, 40)
_TARGET_BITS = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
# Other programs put a length and that many bytes of JSON before the plan.
_MAX_JSON = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSummary:
    """The layers in numbers; see `LayerTable`."""

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
    """What an engine file holds.

    Attributes:
        path: As it was given.
        size_bytes, sha256: Of the plan.
        product, tensorrt: What wrote the plan, by its own header; empty where that does not say. The last number of
            the version is only its last byte.
        targets: Compute capabilities by the header of a TensorRT-RTX plan.
        record: How it was built; `None` for a foreign engine.
        summary, table: The layers, as they run where the engine was inspected, else as its builder listed them, else as
            they were parsed; `None` where nothing is known of them.
        notes: What a reader should know.
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
    """The contents of an engine file and of the record beside it.

    Raises:
        LoadError: The file is absent, truncated or no plan, or the record beside it cannot be read or is of another.
    """
    path = Path(path)
    _refuse_wrapped(path)
    engine = Engine.load(path)
    _refuse_truncated(path, engine.plan)
    product, version = plan_version(engine.plan) or ("", "")
    record = engine.record
    table, notes = layers_of(record) if record else (None, ())
    return EngineFile(
        path=str(path),
        size_bytes=len(engine.plan),
        sha256=record.plan_sha256 if record else digest(engine.plan),
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
    """A plan behind another program's JSON is told apart from garbage, and how to cut it out."""
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(4), "little")
            if not 0 < length < _MAX_JSON or not stream.read(length).startswith(b"{"):
                return
            inside = plan_version(stream.read(64))
    except OSError:
        return  # what it is, loading says
    if inside is not None:
        raise LoadError(
            f"{path} is a plan behind {length} bytes of JSON, as Ultralytics writes them; TensorRT itself loads no "
            "such file.",
            fix=f"Cut the plan out:  tail -c +{length + 5} {path} > plan.engine",
        )


def _refuse_truncated(path: Path, plan: bytes) -> None:
    # A header of another layout announces nothing that we could read.
    announced = int.from_bytes(plan[_LENGTH], "little") if plan_version(plan) else _HEADER_BYTES
    if announced > len(plan):
        raise LoadError(
            f"{path} is cut off: it has {len(plan)} bytes of at least {announced}.",
            fix=f"Copy it again, or build it again:  y7 build --weights {path.stem}.onnx",
        )


def _targets(plan: bytes) -> tuple[str, ...]:
    bits = int.from_bytes(plan[_TARGETS], "little")
    return tuple(name for at, name in enumerate(_TARGET_BITS) if bits >> at & 1)
