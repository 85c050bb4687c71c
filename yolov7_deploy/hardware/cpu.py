"""Processor cores this process may keep busy: in a container, fewer than the machine has."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from yolov7_deploy.hardware.jetson import ROOT, read_text

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


def usable_cores(root: Path = ROOT) -> int | None:
    """Physical cores this process may run on, within the time its control groups give it; `None` outside Linux.

    Two hardware threads of a core count once: they share its arithmetic units. Part of a core's time counts as a core.
    `root` is the folder that `proc` and `sys` are looked for in.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    siblings = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    cores = {read_text(root / siblings.format(one)) or str(one) for one in os.sched_getaffinity(0)}
    return max(1, min([len(cores), *(math.ceil(limit) for limit in _limits(root))]))


def _limits(root: Path) -> Iterator[float]:
    """What our control groups, and those around them, allow: seconds of processor time per second.

    Version 2 writes "max 100000" for no limit, version 1 a quota of -1. Containers see the path of their host, but
    their own group at the top.
    """
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        folder = top / path.lstrip("/")
        for group in (folder, *folder.parents):
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
            found = re.fullmatch(r"(\d+)\s+(\d+)", " ".join(read_text(group / name).strip() for name in names))
            if found and int(found[2]) > 0:
                yield int(found[1]) / int(found[2])
            if group == top:
                break
