"""GPU test suite: checks and measurements that need an NVIDIA GPU, each run in its own process.

A part is a function that takes an `Environment`, records what it measures, and raises if a result is wrong.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMPILED_FOR = f"python{sys.version_info.major}.{sys.version_info.minor}"  # folder of packages for one version
# The parts import the package, and functions of the scripts in benchmarks/; neither has to be installed.
for _folder in (str(ROOT), str(ROOT / "benchmarks")):
    if _folder not in sys.path:
        sys.path.insert(0, _folder)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One part of the suite.

    Attributes:
        name: Name on the command line and in the results.
        function: `module:function` in this package.
        budget_s: Time limit in seconds; then the process is killed, and what it recorded before is kept.
        needs: Libraries of which the Python interpreter must have one, preferred first; empty if NumPy is enough.
        emulated: True if the part also runs on the emulated GPU.
        alone: True if the part needs a run of its own; the budgets of the others add up to less than one run.
        needs_emulated: Replaces `needs` on the emulated GPU, unless it is empty.
    """

    name: str
    function: str
    budget_s: float
    needs: tuple[str, ...] = ()
    emulated: bool = True
    alone: bool = False
    needs_emulated: tuple[str, ...] = ()


# The most important first, then those that run alone.
PARTS = (
    Part(name="machine", function="machine:describe", budget_s=30),
    Part(name="integration", function="integration:check", budget_s=40),
    Part(name="nms", function="nms:check", budget_s=130),
    Part(name="letterbox", function="letterbox:check", budget_s=30),
    Part(name="nms_times", function="nms:measure", budget_s=60),
    Part(name="letterbox_times", function="letterbox:measure", budget_s=20),
    Part(name="against_torch", function="against_torch:measure", budget_s=40, needs=("torch",)),
    Part(
        name="against_efficient",
        function="against_efficient_nms:measure",
        budget_s=90,
        needs=("tensorrt",),
        emulated=False,
    ),
    Part(name="sanitizer", function="sanitizer:check", budget_s=50),
    Part(name="rtx", function="rtx:check", budget_s=55, needs=("tensorrt_rtx",)),
    Part(name="engines", function="engines:check", budget_s=580, needs=("tensorrt",), emulated=False, alone=True),
    Part(name="runtime", function="runtime:measure", budget_s=560, needs=("tensorrt",), emulated=False, alone=True),
    Part(
        name="int8",
        function="int8:measure",
        budget_s=590,
        needs=("tensorrt", "tensorrt_rtx"),
        needs_emulated=("torch",),
        alone=True,
    ),
    Part(name="train", function="train:measure", budget_s=540, needs=("torch",), alone=True),
    Part(name="torch_speed", function="torch_speed:measure", budget_s=300, needs=("torch",), alone=True),
    Part(name="soak", function="runtime:soak", budget_s=600, needs=("tensorrt",), emulated=False, alone=True),
)
# Parts that only other parts start.
HIDDEN = {"sanitized": "sanitizer:work"}
