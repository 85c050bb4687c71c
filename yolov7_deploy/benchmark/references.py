"""Numbers that a speed report shows beside its own: the paper's row of the model, and the AP measured with the file."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from yolov7_deploy._serialization import from_plain, shown
from yolov7_deploy.benchmark.report import PaperSpeed
from yolov7_deploy.errors import UsageError
from yolov7_deploy.paper import paper_row

PAPER_SPAN = "PyTorch FP16 forward pass of the network only: no letterbox, no upload, no NMS"
VAL2017 = 5000  # images, of which the paper's AP is; a report of another number says so beside its AP
_HOW = "y7 val --weights FILE --data DATA --json val.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Accuracy:
    """What is read of a record of `y7 val`."""

    ap: float
    weights: str
    images: int
    weights_sha256: str = ""


def paper_speed(variant: str, input_hw: tuple[int, int]) -> PaperSpeed:
    """What the paper has of this model, at this size where it has several.

    Raises:
        UsageError: The paper has no such model.
    """
    row = paper_row(variant)
    with suppress(UsageError):  # measured at a size of one's own: the report tells both
        row = paper_row(variant, size=max(input_hw))
    assert row.size is not None, "an official model"
    return PaperSpeed(
        model=row.model,
        size=row.size,
        source=row.source,
        device=row.device or "V100",
        fps=row.fps,
        batch32_ms=row.batch32_ms,
        ap=row.val.ap if row.val else None,
        span=PAPER_SPAN,
    )


def read_ap(path: Path, weights: Path, *, sha256: str) -> tuple[float, str]:
    """The AP (0 to 1) in a report of `y7 val --json` about this file, and where it is from in words.

    Raises:
        UsageError: The report cannot be read, is none, has no AP, or is about another file.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError(f"it holds {shown(raw)}")
        record = from_plain(_Accuracy, raw)
        if not 0 <= record.ap <= 1:
            raise ValueError(f"ap is {record.ap:g}")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.", fix=f"Write one:  {_HOW}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no report of y7 val: {error}.", fix=f"Write one:  {_HOW}") from error
    told = record.weights_sha256
    if told != sha256 if told else Path(record.weights).name != weights.name:
        raise UsageError(
            f"{path} is about {record.weights}, and {weights} is another file: its AP is not known.",
            fix=_HOW.replace("FILE", str(weights)),
        )
    return record.ap, str(path) if record.images == VAL2017 else f"{path}, {record.images} images"
