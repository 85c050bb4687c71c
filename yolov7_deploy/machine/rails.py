"""Power rails of Jetson boards: which of them together are all that goes in.

Rails contain each other: `VDD_IN` is the input of a module and holds `VDD_CPU_GPU_CV` and `VDD_SOC`; `VIN_SYS_5V0` of
an AGX Orin feeds `VDDQ_VDD2_1V8AO`. So only sets that NVIDIA's developer guides and carrier designs tell to be side by
side are ever added up.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

MODULE = "whole module"


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """Rails whose sum is what goes in, and what that feeds."""

    rails: tuple[str, ...]
    covers: str = MODULE

    def __str__(self) -> str:
        return f"{' + '.join(self.rails)} ({self.covers})"


# The first that a board has all rails of.
INPUTS = (
    Input(rails=("VIN",), covers="module and carrier board"),  # AGX Thor, by its INA238
    Input(rails=("VDD_IN",)),  # TX1, TX2, Xavier NX, Orin NX, Orin Nano
    Input(rails=("POM_5V_IN",)),  # Nano
    Input(rails=("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")),  # AGX Orin
    Input(rails=("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0")),  # AGX Thor
    Input(rails=("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V")),  # AGX Xavier
)


def find_input(rails: Collection[str]) -> Input | None:
    """The input of a board that has these rails; `None` where no set of them is known to be all of it."""
    return next((known for known in INPUTS if set(known.rails) <= set(rails)), None)
