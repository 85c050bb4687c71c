"""Engine: a TensorRT plan and the record of its build, loaded and saved together.

The plan stays a bare file that trtexec can load; the record is `NAME.engine.json` beside `NAME.engine`. Needs neither
TensorRT nor onnx, so a deployment image can check an engine before it touches the GPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from yolov7_deploy._atomic_file import whole_file
from yolov7_deploy.errors import EngineError, LoadError
from yolov7_deploy.tensorrt.build_record import EngineRecord

__all__ = ["Engine", "EngineRecord", "digest", "plan_version", "record_path"]

logger = logging.getLogger(__name__)

# Every plan starts with four letters that end so: "ftrt" is TensorRT's, "vtrt" TensorRT-RTX's.
_TAG_END = b"trt"
_PRODUCTS = {b"ftrt": "tensorrt", b"vtrt": "tensorrt_rtx"}
# In the header of serialization version 0, what `trtexec --getPlanVersionOnly` prints: one byte a number.
_VERSION_BYTES = slice(24, 28)


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """A plan and the record of its build.

    Attributes:
        plan: What TensorRT deserializes.
        record: How it was built; `None` for a plan that came without one.
        notes: What a reader should know, such as the absence of the record.
    """

    plan: bytes
    record: EngineRecord | None
    notes: tuple[str, ...] = ()

    def save(self, path: str | Path) -> None:
        """Writes plan and record under temporary names, then renames them, the plan first; folders are made.

        An older engine of the same name stays until then. A run that is killed between the two renames leaves a plan
        with the record of another, which `load` notices by its digest.

        Raises:
            EngineError: The disk is full or the folder cannot be written.
        """
        path = Path(path)
        try:
            with contextlib.ExitStack() as files:  # the one that is opened last gets its name first
                if self.record is not None:
                    _write(files.enter_context(whole_file(record_path(path))), self.record.to_json().encode())
                _write(files.enter_context(whole_file(path)), self.plan)
        except OSError as error:
            raise EngineError(
                f"{error.filename or path} cannot be written: {error.strerror or error}.",
                fix="Choose another place:  --output F.engine",
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> Engine:
        """The plan in a file and the record beside it; a plan without one opens with a warning.

        Raises:
            LoadError: The file is absent or no plan, or plan and record do not belong together; the message names the
                field that differs and the command that repairs it.
        """
        path = Path(path)
        plan = _read(path)
        try:
            text = record_path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            return _foreign(path, plan)
        except (OSError, UnicodeDecodeError) as error:
            raise LoadError(f"{record_path(path)} cannot be read: {error}.", fix=_rebuild(path)) from error
        record = EngineRecord.from_json(text, name=record_path(path).name)
        _check(path, plan, record)
        return cls(plan=plan, record=record)


def record_path(path: Path) -> Path:
    """`NAME.engine.json` for `NAME.engine`."""
    return path.with_name(f"{path.name}.json")


def plan_version(plan: bytes) -> tuple[str, str] | None:
    """Product (`tensorrt`, `tensorrt_rtx`) and version (`10.3.0.26`) that wrote a plan; `None` where it does not say.

    The last number is stored in one byte.
    """
    product = _PRODUCTS.get(plan[:4])
    numbers = plan[_VERSION_BYTES]
    if product is None or len(numbers) < 4 or any(plan[4:8]):
        return None
    return product, ".".join(str(number) for number in numbers)


def digest(plan: bytes) -> str:
    """The SHA-256 of a plan, as the record holds it."""
    return hashlib.sha256(plan).hexdigest()


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())  # the rename must not overtake the data when the power fails


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise LoadError(
            f"{path} does not exist.", fix="Check the path, or build it:  y7 build --weights NAME.onnx"
        ) from error
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error.strerror or error}.", fix="Check the path.") from error


def _foreign(path: Path, plan: bytes) -> Engine:
    if plan[1:4] != _TAG_END:
        start = f"it begins with {plan[:8]!r}" if plan else "it is empty"
        raise LoadError(f"{path} is no TensorRT engine: {start}.", fix=_rebuild(path))
    wrote = plan_version(plan)
    origin = f", written by {wrote[0]} {wrote[1]}" if wrote else ""
    note = (
        f"no build record ({record_path(path).name}) beside the plan{origin}: class names, letterbox and RGB order are "
        "assumed, and only TensorRT itself can tell whether it fits this machine"
    )
    logger.warning("%s: %s", path, note)
    return Engine(plan=plan, record=None, notes=(note,))


def _check(path: Path, plan: bytes, record: EngineRecord) -> None:
    beside = record_path(path).name
    if len(plan) != record.plan_bytes:
        short = "cut off" if len(plan) < record.plan_bytes else "replaced"
        raise LoadError(
            f"{path} was {short}: it has {len(plan)} bytes, plan_bytes in {beside} says {record.plan_bytes}.",
            fix=_rebuild(path),
        )
    found = digest(plan)
    if found != record.plan_sha256:
        raise LoadError(
            f"{path} is damaged or was replaced: its plan_sha256 is {found[:12]}..., {beside} says "
            f"{record.plan_sha256[:12]}... .",
            fix=_rebuild(path),
        )


def _rebuild(path: Path) -> str:
    return f"Build it again:  y7 build --weights {path.stem}.onnx --output {path}"
