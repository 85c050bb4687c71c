"""How busy other programs, and other guests of the same host, keep the processors meanwhile."""

from __future__ import annotations

import os
import time
from pathlib import Path

from yolov7_deploy.machine.jetson import ROOT, read_text

# Columns of the first line of /proc/stat (proc(5)): user, nice, system, idle, iowait, irq, softirq, steal. What guests
# of this machine take is in user and nice already.
_COLUMNS = 8
_IDLE = (3, 4)


class OtherLoad:
    """Counts from when it is made.

    Args:
        root: The folder that `proc` is looked for in.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root
        self._before = self._read()

    def share(self) -> float | None:
        """Of all processor time since then, the share that others had: 0 to 1. `None` where the system does not tell.

        Time in which the host ran somebody else in our place counts as theirs.
        """
        now = self._read()
        if now is None or self._before is None:
            return None
        busy, whole, own = (after - before for after, before in zip(now, self._before, strict=True))
        return min(1.0, max(0.0, (busy - own) / whole)) if whole > 0 else None

    def _read(self) -> tuple[float, float, float] | None:
        """Seconds: of all processors at work, of all processors together, and of this process at work."""
        fields = read_text(self._root / "proc/stat").partition("\n")[0].split()
        if fields[:1] != ["cpu"] or len(fields) <= _COLUMNS or not all(field.isdecimal() for field in fields[1:]):
            return None
        ticks = [int(field) / os.sysconf("SC_CLK_TCK") for field in fields[1 : 1 + _COLUMNS]]
        whole = sum(ticks)
        return whole - sum(ticks[column] for column in _IDLE), whole, time.process_time()
