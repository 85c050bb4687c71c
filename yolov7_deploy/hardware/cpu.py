"""The CPU: cores that this process may use, and load that other programs put on it."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from yolov7_deploy.hardware.system import ROOT, read_text

# Columns of the first line of /proc/stat (proc(5)): user, nice, system, idle, iowait, irq, softirq, steal. The time of
# guests of this machine is part of user and nice.
_COLUMNS = 8
_IDLE = (3, 4)


class OtherCpuLoad:
    """CPU load of other programs since this object was created.

    Args:
        root: Folder that contains `proc`.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root
        self._before = self._read()

    def share(self) -> float | None:
        """Return the share of all CPU time that other programs used, 0 to 1; `None` where the system does not show it.

        Time in which the host ran another virtual machine on our cores (steal) counts as theirs.
        """
        now = self._read()
        if now is None or self._before is None:
            return None
        busy, total, own = (after - before for after, before in zip(now, self._before, strict=True))
        return min(1.0, max(0.0, (busy - own) / total)) if total > 0 else None

    def _read(self) -> tuple[float, float, float] | None:
        """Return seconds: busy time of all cores, total time of all cores, and CPU time of this process."""
        fields = read_text(self._root / "proc/stat").partition("\n")[0].split()
        if fields[:1] != ["cpu"] or len(fields) <= _COLUMNS or not all(field.isdecimal() for field in fields[1:]):
            return None
        seconds = [int(field) / os.sysconf("SC_CLK_TCK") for field in fields[1 : 1 + _COLUMNS]]
        total = sum(seconds)
        return total - sum(seconds[column] for column in _IDLE), total, time.process_time()


def usable_cores(root: Path = ROOT) -> int | None:
    """Return the physical cores that this process may use within its cgroup CPU quota; `None` outside Linux.

    Two hardware threads of a core count once, because they share its arithmetic units. A fraction of a core counts as
    a core. `root` is the folder that contains `proc` and `sys`.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    siblings = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    cores = {read_text(root / siblings.format(cpu)) or str(cpu) for cpu in os.sched_getaffinity(0)}
    return max(1, min([len(cores), *(math.ceil(quota) for quota in _cgroup_quotas(root))]))


def has_vnni(root: Path = ROOT) -> bool | None:
    """Return whether an x86 CPU multiplies and adds 8-bit integers in 32 bits (VNNI); `None` if it is not known.

    Only Linux shows it. `root` is the folder that contains `proc`.
    """
    flags = re.search(r"^flags\s*:(.*)$", read_text(root / "proc/cpuinfo"), re.MULTILINE)
    return None if flags is None else bool({"avx512_vnni", "avx_vnni"}.intersection(flags[1].split()))


def _cgroup_quotas(root: Path) -> Iterator[float]:
    """Yield the quotas of our control groups and their parents, in seconds of CPU time per second.

    "No limit" is "max 100000" in cgroup v2 and a quota of -1 in v1. A container sees the path of its host, but its own
    group at the top.
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
