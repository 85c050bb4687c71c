"""The parts of the GPU test suite: functions of a `Setting` that record what they found, and raise if it is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One part of the suite.

    Attributes:
        name: Of its results and on the command line.
        target: `module:function` in this package.
        budget_s: Longest time; then its process is ended, and what it had recorded stays.
        needs: The Python which runs it must have one of these libraries, the first if any has it; none for any Python
            with NumPy.
        emulated: It also runs on the emulated GPU.
        needs_emulated: The same there, where it is something else.
    """

    name: str
    target: str
    budget_s: float
    needs: tuple[str, ...] = ()
    emulated: bool = True
    needs_emulated: tuple[str, ...] = ()


# In order of worth: what comes late may find no time left.
PARTS = (
    Part(name="machine", target="machine:look", budget_s=40),
    Part(name="seam", target="integration:check", budget_s=40),
    Part(name="nms", target="nms:check", budget_s=130),
    Part(name="letterbox", target="letterbox:check", budget_s=40),
    Part(name="nms_times", target="nms:measure", budget_s=60),
    Part(name="letterbox_times", target="letterbox:measure", budget_s=20),
    Part(name="against_torch", target="against_torch:measure", budget_s=40, needs=("torch",)),
    Part(
        name="against_efficient",
        target="against_efficient_nms:measure",
        budget_s=110,
        needs=("tensorrt",),
        emulated=False,
    ),
    Part(name="sanitizer", target="sanitizer:check", budget_s=60),
    Part(name="engines", target="engines:check", budget_s=500, needs=("tensorrt",), emulated=False),
    Part(name="rtx", target="rtx:check", budget_s=60, needs=("tensorrt_rtx",)),
    Part(name="runtime", target="runtime:measure", budget_s=560, needs=("tensorrt",), emulated=False),
    Part(
        name="int8",
        target="int8:measure",
        budget_s=590,
        needs=("tensorrt", "tensorrt_rtx"),
        needs_emulated=("torch",),
    ),
    Part(name="train", target="train:measure", budget_s=540, needs=("torch",)),
    Part(name="torch_speed", target="torch_speed:measure", budget_s=300, needs=("torch",)),
    Part(name="soak", target="runtime:soak", budget_s=600, needs=("tensorrt",), emulated=False),
)
# Run by other parts only.
HIDDEN = {"sanitized": "sanitizer:work"}
