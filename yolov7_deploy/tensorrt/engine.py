"""Engine: a TensorRT plan and the record of its build, loaded and saved together.

The plan is a plain file that trtexec can load; the record is `NAME.engine.json` next to `NAME.engine`. This module
needs neither TensorRT nor onnx, so a deployment image can check an engine before it uses the GPU.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from yolov7_deploy._atomic_file import atomic_write
from yolov7_deploy._bounded_read import MAX_MODEL_BYTES, read_bytes, read_text
from yolov7_deploy._serialization import sha256_hex
from yolov7_deploy._text import get_logger
from yolov7_deploy.errors import EngineError, LoadError
from yolov7_deploy.tensorrt.build_record import EngineRecord

logger = get_logger(__name__)

# Bytes 1 to 3 of every plan. The first four are "ftrt" for TensorRT and "vtrt" for TensorRT-RTX.
_TAG_SUFFIX = b"trt"
_PRODUCTS = {b"ftrt": "tensorrt", b"vtrt": "tensorrt_rtx"}
# Position of the version that `trtexec --getPlanVersionOnly` prints, one byte per number (serialization version 0).
_VERSION_BYTES = slice(24, 28)


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """A plan and the record of its build.

    Attributes:
        plan: The serialized engine.
        record: Record of the build; `None` for a plan without a record.
        notes: Warnings, such as a missing record.

    Example:
        >>> engine = build_engine(OnnxModel.load("shapes.onnx"))
        >>> engine.save("shapes.engine")
        >>> Engine.load("shapes.engine").record == engine.record
        True
    """

    plan: bytes
    record: EngineRecord | None
    notes: tuple[str, ...] = ()

    def save(self, path: str | Path) -> None:
        """Write plan and record under temporary names, then rename them, the plan first; create missing folders.

        An existing engine is replaced only by the renames. If the process is killed between them, the new plan has
        the old record, which `load` detects by its SHA-256.

        Raises:
            EngineError: The disk is full or the folder cannot be written.
        """
        path = Path(path)
        try:
            with contextlib.ExitStack() as files:  # files are renamed in reverse order
                if self.record is not None:
                    _write(files.enter_context(atomic_write(record_path(path))), self.record.to_json().encode())
                _write(files.enter_context(atomic_write(path)), self.plan)
            if self.record is None:
                record_path(path).unlink(missing_ok=True)  # that of a replaced engine
        except OSError as error:
            raise EngineError(
                f"{error.filename or path} cannot be written: {error.strerror or error}.",
                fix="Choose another path:  --output F.engine",
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> Engine:
        """Load a plan and the record next to it; a plan without a record loads with a warning.

        Raises:
            LoadError: The file is missing or not a plan, or the record belongs to another plan; the message names the
                field that differs and the command that fixes it.
        """
        path = Path(path)
        plan = _read(path)
        try:
            text = read_text(record_path(path))
        except FileNotFoundError:
            return _without_record(path, plan)
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise LoadError(f"{record_path(path)} cannot be read: {reason}.", fix=_rebuild(path)) from error
        record = EngineRecord.from_json(text, name=record_path(path).name)
        _check(path, plan, record)
        return cls(plan=plan, record=record)


def record_path(path: Path) -> Path:
    """Return the path of an engine's record: `NAME.engine.json` for `NAME.engine`."""
    return path.with_name(f"{path.name}.json")


def plan_version(plan: bytes) -> tuple[str, str] | None:
    """Return the product (`tensorrt`, `tensorrt_rtx`) and version (`10.3.0.26`) of a plan; `None` if it is unknown.

    Each number is stored modulo 256.
    """
    product = _PRODUCTS.get(plan[:4])
    numbers = plan[_VERSION_BYTES]
    if product is None or len(numbers) < 4 or any(plan[4:8]):
        return None
    return product, ".".join(str(number) for number in numbers)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())  # the data must be on disk before the rename, in case of a power failure


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path, max_bytes=MAX_MODEL_BYTES)
    except FileNotFoundError as error:
        onnx_file = path.with_suffix(".onnx")
        name = onnx_file if onnx_file.is_file() else "NAME.onnx"
        fix = f"Check the path, or build it:  y7 build --weights {name}"
        raise LoadError(f"{path} does not exist.", fix=fix) from error
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error.strerror or error}.", fix="Check the path.") from error


def _without_record(path: Path, plan: bytes) -> Engine:
    if plan[1:4] != _TAG_SUFFIX:
        start = f"it starts with {plan[:8]!r}" if plan else "it is empty"
        raise LoadError(f"{path} is not a TensorRT engine: {start}.", fix=_rebuild(path))
    version = plan_version(plan)
    origin = f", written by {version[0]} {version[1]}" if version else ""
    note = (
        f"no build record ({record_path(path).name}) next to the plan{origin}: class names, letterbox and RGB order "
        "are assumed, and only TensorRT can determine whether the plan runs on this machine"
    )
    logger.warning("%s: %s", path, note)
    return Engine(plan=plan, record=None, notes=(note,))


def _check(path: Path, plan: bytes, record: EngineRecord) -> None:
    record_name = record_path(path).name
    if len(plan) != record.plan_bytes:
        what = "truncated" if len(plan) < record.plan_bytes else "replaced"
        raise LoadError(
            f"{path} was {what}: it has {len(plan)} bytes, plan_bytes in {record_name} is {record.plan_bytes}.",
            fix=_rebuild(path),
        )
    found = sha256_hex(plan)
    if found != record.plan_sha256:
        raise LoadError(
            f"{path} is damaged or was replaced: its plan_sha256 is {found[:12]}..., in {record_name} it is "
            f"{record.plan_sha256[:12]}... .",
            fix=_rebuild(path),
        )


def _rebuild(path: Path) -> str:
    return f"Build it again:  y7 build --weights {path.stem}.onnx --output {path}"
