"""What quantising found, for people and for machines."""

from __future__ import annotations

from typing import Any

from yolov7_deploy.measure.int8_file import account_lines, account_record
from yolov7_deploy.measure.report import table
from yolov7_deploy.quantization.quantize import Quantized

SHOWN = 20  # layers in the table; all are in the JSON


def describe(result: Quantized) -> str:
    """What was found beyond the steps that were told on the way: pairs, costs of layers, AP of the search."""
    parts = ["\n".join(account_lines(result.account))]
    if result.costs:
        kept = {layer for layer, _ in result.model.info.int8.kept} if result.model.info.int8 else set()
        rows: list[list[object]] = [
            [cost.layer, f"{cost.error:.4f}", _percent(cost.share), "kept float" if cost.layer in kept else ""]
            for cost in result.costs[:SHOWN]
        ]
        title = f"what INT8 costs alone in a layer, the {len(rows)} dearest of {len(result.costs)}"
        parts.append(table(rows, ["layer", "head error", "of all MACs", ""], title))
    if len(result.trials) > 1:
        rows = [[len(trial.spared), f"{trial.ap:.4f}", f"{trial.points:+.2f}"] for trial in result.trials]
        parts.append(table(rows, ["layers spared", "AP", "points lost"], "AP measured on the way"))
    return "\n\n".join(part for part in parts if part)


def to_record(result: Quantized) -> dict[str, Any]:
    """The whole record for machines."""
    return {
        "calibration": {
            "pictures": result.calibration.pictures,
            "pictures_sha256": result.calibration.pictures_sha256,
            "network_sha256": result.calibration.network_sha256,
        },
        "account": account_record(result.account),
        "accuracy": None if result.drop is None else result.drop.to_dict(),
        "layers": [
            {"layer": cost.layer, "head_error": cost.error, "share_of_macs": cost.share} for cost in result.costs
        ],
        "trials": [{"spared": list(trial.spared), "ap": trial.ap, "points": trial.points} for trial in result.trials],
        "notes": list(result.model.info.notes),
    }


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"
