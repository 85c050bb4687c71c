"""What of an ONNX file computes in INT8, counted in its graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from yolov7_deploy.precision.int8_summary import Int8Account, count_int8
from yolov7_deploy.tensorrt.onnx_rewrite import open_onnx

_REASONS = {
    "Conv": "in front of convolutions",
    "Resize": "in front of upsampling, which then moves bytes",
    "Add": "in front of residual sums",
}


def read_account(path: Path) -> Int8Account:
    """The INT8 account of a file, ours or a foreign one.

    Raises:
        LoadError: The file is absent, empty, cut off or no ONNX.
    """
    return count_int8(open_onnx(path).proto)


def account_lines(account: Int8Account) -> tuple[str, str]:
    """How much computes in INT8, and how many Q/DQ pairs there are, with the rule that asks for each."""
    share = "shapes are open" if account.share is None else f"{account.share:.1%} of all multiply-accumulates"
    pairs = [f"{count} {_REASONS.get(kind, f'in front of {kind}')}" for kind, count in account.pairs.items()]
    twice = f"; {len(account.pairs_twice)} tensors have more than one" if account.pairs_twice else ""
    return (
        f"{account.int8_convolutions} of {len(account.convolutions)} convolutions, {share}",
        f"{sum(account.pairs.values())} Q/DQ pairs, one a tensor: {', '.join(pairs) or 'none'}{twice}; "
        f"{account.scales} scales; {account.weights} weights stored as int8",
    )


def account_record(account: Int8Account) -> dict[str, Any]:
    """Plain data for JSON."""
    return {
        "convolutions": [
            {"layer": cost.name, "macs": cost.macs, "int8": cost.is_int8} for cost in account.convolutions
        ],
        "int8_convolutions": account.int8_convolutions,
        "int8_share_of_macs": account.share,
        "pairs": dict(account.pairs),
        "pairs_twice": list(account.pairs_twice),
        "int8_weights": account.weights,
        "scales": account.scales,
    }
