"""Processor cores this process may keep busy: in a container, fewer than the machine has."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

from yolov7_deploy.machine.jetson import ROOT, read_text


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
