"""Error of `y7 bench --estimate` on published speeds that were held out of the fit.

Repeats all fits, which takes a minute. PyTorch on the paper's V100 rows: three variants are fitted and four held out,
then all 35 choices of three of seven, each selecting its structure. TensorRT on the other published speeds: one row,
then one device held out at a time. Nothing is measured; errors are of images per second, positive is too fast.

    python benchmarks/estimator_error.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from recording import parser, record

from yolov7_deploy.estimation.fitting import (
    CANDIDATES,
    FITTED,
    FITTED_VARIANTS,
    STRUCTURES,
    Fit,
    HeldOut,
    fit,
    leave_groups_out,
    leave_one_device_out,
    leave_one_row_out,
    score_held_out,
)
from yolov7_deploy.estimation.public_speeds import EVALUATION_ONLY, TENSORRT_SPEEDS, PublicSpeed, paper_speeds

TARGET = 0.15  # for the median held-out error on the paper's V100 speeds at batch 1


def main() -> None:
    arguments = parser(__doc__)
    arguments.set_defaults(machine="estimates")  # separate from measurements, and the same on every machine
    options = arguments.parse_args()
    record("estimator_error", options.machine, {**_torch(), **_tensorrt()})


def _torch() -> dict[str, object]:
    rows, structure = paper_speeds(), STRUCTURES["torch"]
    seen = [row for row in rows if row.variant in FITTED_VARIANTS]
    unseen = [row for row in rows if row.variant not in FITTED_VARIANTS]
    found = fit(seen, structure)
    splits, chosen = leave_groups_out(rows, CANDIDATES, fitted=len(FITTED_VARIANTS))
    result: dict[str, object] = {
        "torch constants": _constants(found),
        "torch constants in the package": _constants(FITTED["torch"]),
        "torch structure is the one selected": structure == min(CANDIDATES, key=lambda one: fit(seen, one).loss),
        "torch structures selected in splits": [[asdict(one), times] for one, times in chosen.items() if times],
    }
    result |= _rows("torch fitted", score_held_out(found, seen, structure))
    result |= _rows("torch held out", score_held_out(found, unseen, structure))
    for batch in (1, 32):
        held_out = _only(score_held_out(found, unseen, structure), lambda row, batch=batch: row.batch == batch)
        result[f"torch held out, batch {batch}"] = _summary(held_out)
        result[f"torch 35 splits, batch {batch}"] = _summary(_only(splits, lambda row, batch=batch: row.batch == batch))
    others = score_held_out(found, [row for row in EVALUATION_ONLY if row.runtime == "torch"], structure)
    return result | _rows("torch elsewhere", others) | {"torch elsewhere": _summary(others), "target": TARGET}


def _tensorrt() -> dict[str, object]:
    rows, structure = TENSORRT_SPEEDS, STRUCTURES["tensorrt"]
    found = fit(rows, structure)
    by_row, by_device = leave_one_row_out(rows, structure), leave_one_device_out(rows, structure)
    result: dict[str, object] = {
        "tensorrt constants": _constants(found),
        "tensorrt constants in the package": _constants(FITTED["tensorrt"]),
    }
    result |= _rows("tensorrt fitted", score_held_out(found, rows, structure))
    result |= _rows("tensorrt row left out", by_row)
    for device in dict.fromkeys(row.device for row, _ in by_row.rows):
        only = _only(by_row, lambda row, device=device: row.device == device)
        result[f"tensorrt rows left out, {device}"] = _summary(only)
    result |= _rows("tensorrt device left out", by_device)
    result["tensorrt devices left out"] = _summary(by_device)
    others = score_held_out(found, [row for row in EVALUATION_ONLY if row.runtime == "tensorrt"], structure)
    return result | _rows("tensorrt, more than the network", others)


def _constants(found: Fit) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in {**asdict(found.constants), **found.factors}.items()}


def _rows(title: str, held_out: HeldOut) -> dict[str, object]:
    return {
        f"{title}: {number}. {row.variant} {row.device} {row.precision} batch {row.batch}": {
            "published_fps": round(row.fps, 1),
            "estimated_fps": round(row.fps * (1 + error), 1),
            "error": round(error, 4),
            "source": row.source,
            "scope": row.scope,
        }
        for number, (row, error) in enumerate(held_out.rows, start=1)
    }


def _only(held_out: HeldOut, wanted: Callable[[PublicSpeed], bool]) -> HeldOut:
    return HeldOut(rows=tuple((row, error) for row, error in held_out.rows if wanted(row)))


def _summary(held_out: HeldOut) -> dict[str, float]:
    return {"median": round(held_out.median, 4), "worst": round(held_out.worst, 4), "rows": len(held_out.rows)}


if __name__ == "__main__":
    main()
