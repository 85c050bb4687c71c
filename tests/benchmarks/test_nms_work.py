"""The committed counts of benchmarks/nms_work.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from nms_work import count_cases

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "counted" / "nms_work.json"


@pytest.mark.slow
def test_the_committed_counts_are_those_of_the_kernels():
    counted = json.loads(json.dumps(count_cases()))
    assert counted == json.loads(RESULT.read_text(encoding="utf-8"))["result"]
    for case in counted.values():
        ours, theirs = case["ours"], case["EfficientNMS_TRT, at least"]
        assert (ours["memsets"], ours["kernels"]) == (1, 2)
        assert all(ours[name] < theirs[name] for name in theirs), "a lower bound"
