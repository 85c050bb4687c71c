"""The clock of a Jetson's GPU, as the kernel scales it (devfreq)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from yolov7_deploy.machine.jetson import ROOT
from yolov7_deploy.machine.sampling import read_number

# 57000000.gpu (Nano), 17000000.gp10b (TX2), .gv11b (Xavier), .ga10b or .gpu (Orin), gpu-gpc-0 (Thor, whose other
# domain gpu-nvd-0 is video).
_GPU = re.compile(r"\d+\.(?:gpu|g[a-z]\d\d[a-z])|gpu-gpc-\d+")


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuClock:
    """A scaled clock in MHz: now, and the limits it moves between, which the power mode sets."""

    folder: Path
    mhz: float
    least_mhz: float
    most_mhz: float

    @property
    def pinned(self) -> bool:
        """It cannot move, as after `sudo jetson_clocks`."""
        return self.least_mhz == self.most_mhz


def read_gpu_clock(root: Path = ROOT) -> GpuClock | None:
    """The clock now; `None` on other machines and where it is not shown."""
    for folder in sorted((root / "sys/class/devfreq").glob("*")):
        numbers = [read_number(folder / f"{name}_freq") for name in ("cur", "min", "max")]
        now, least, most = (None if number is None else number / 1e6 for number in numbers)
        if _GPU.fullmatch(folder.name) and now is not None and least is not None and most is not None:
            return GpuClock(folder=folder, mhz=now, least_mhz=least, most_mhz=most)
    return None
