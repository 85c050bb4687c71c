"""The energy counters of an x86 processor (RAPL), which Linux shows under /sys/class/powercap for Intel and AMD.

A package's counter holds its cores, caches and graphics; main memory is outside it. It moves every millisecond and
starts again from zero after `max_energy_range_uj`, on a large server within minutes. Since Linux 5.10 only root may
read it (CVE-2020-8694).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from yolov7_deploy.hardware.jetson import ROOT
from yolov7_deploy.hardware.sampling import read_number, read_word

FOLDER = "sys/class/powercap"


@dataclass(slots=True)
class Packages:
    """The processor packages of a machine, and what they have taken since they were first read.

    Attributes:
        folders: One for each package.
    """

    folders: tuple[Path, ...]
    _before_uj: list[int] = field(default_factory=list)
    _total_uj: int = 0

    def energy_j(self) -> float | None:
        """Joules since the first call, of all packages; `None` where one does not answer.

        A counter that started again in between is made up for, once: call it more often than that happens.
        """
        now_uj = [number for folder in self.folders if (number := read_number(folder / "energy_uj")) is not None]
        if len(now_uj) < len(self.folders):
            return None
        passed_uj = 0
        for folder, before, now in zip(self.folders, self._before_uj or now_uj, now_uj, strict=True):
            span = 0 if now >= before else read_number(folder / "max_energy_range_uj")
            if span is None:
                return None
            passed_uj += now - before + span
        self._before_uj = now_uj
        self._total_uj += passed_uj
        return self._total_uj / 1e6


def open_packages(root: Path = ROOT) -> Packages | str:
    """The counters of this machine, or the sentence why there are none to read."""
    # Packages only: "core", "uncore" and "dram" are parts, "psys" contains them, and intel-rapl-mmio counts again.
    domains = sorted(path for path in (root / FOLDER).glob("intel-rapl:*") if re.fullmatch(r"[\w-]+:\d+", path.name))
    folders = tuple(path for path in domains if read_word(path / "name").startswith("package"))
    if not folders:
        return (
            f"This processor shows no energy counter (no package in /{FOLDER}): virtual machines, containers and ARM "
            "have none. On an x86 machine itself: sudo modprobe intel_rapl_msr"
        )
    packages = Packages(folders)
    files = " ".join(f"/{(path / 'energy_uj').relative_to(root)}" for path in folders)
    try:
        for path in folders:
            (path / "energy_uj").read_bytes()
    except PermissionError:
        return f"The energy counter of this processor can be read by root only: sudo chmod a+r {files}"
    except OSError as error:
        return f"The energy counter of this processor does not answer ({error.strerror}): cat {files}"
    if packages.energy_j() is None:
        return f"The energy counter of this processor says no number: cat {files}"
    return packages
