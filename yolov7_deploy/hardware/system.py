"""The operating system's files and commands, periodic readings, the cores and load of the CPU, and free memory.

Functions take a `root` folder, so a recorded tree of files can represent a machine. A file or a command that is missing
gives an empty result; nothing here raises.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

ROOT = Path("/")
COMMAND_TIMEOUT_S = 20.0
# A GPU that fell off the bus can block a driver call for minutes; the measured program does not wait that long.
STOP_TIMEOUT_S = 2.0

CommandRunner = Callable[[Sequence[str]], str | None]


def run_command(command: Sequence[str]) -> str | None:
    """Return the standard output of a command; `None` where it is missing, fails or hangs."""
    try:
        done = subprocess.run(
            list(command), capture_output=True, text=True, errors="replace", timeout=COMMAND_TIMEOUT_S, check=True
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return done.stdout


def read_text(path: Path) -> str:
    """Return the text of a file; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def read_word(path: Path) -> str:
    """Return the text of a file without surrounding white space; empty where it cannot be read."""
    return read_text(path).strip()


def read_number(path: Path) -> int | None:
    """Return the integer in a kernel file; `None` where there is no integer or the sensor does not answer."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


class PeriodicSampler:
    """Calls `take_sample` on entry, then every `period_s` seconds in a thread, and once more on exit.

    The thread ends with the `with` block, however that ends, and with the process. `take_sample` handles its own
    errors; an unexpected exception is raised where the block ends. The sampler can be entered again.
    """

    def __init__(self, take_sample: Callable[[], None], *, period_s: float) -> None:
        self._take_sample, self._period_s = take_sample, period_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> PeriodicSampler:
        self._stop, self._failure = threading.Event(), None
        self._take_sample()
        self._thread = threading.Thread(target=self._run, name="y7-sampler", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        thread = self._thread
        if thread is None:
            return
        thread.join(STOP_TIMEOUT_S)
        if error is not None or thread.is_alive():
            return
        if self._failure is not None:
            raise self._failure
        self._take_sample()

    def _run(self) -> None:
        stop = self._stop  # a call that hangs may outlive its block; the next block has another event
        while not stop.wait(self._period_s):
            try:
                self._take_sample()
            except BaseException as error:  # noqa: BLE001 - raised again in __exit__, else the interpreter prints it
                self._failure = error
                return


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


_core_limit: int | None = None


def limit_cores(cores: float) -> None:
    """Let models that this process opens later use at most so many cores, for several processes that share a machine.

    A fraction of a core counts as a core.
    """
    global _core_limit
    _core_limit = max(1, math.ceil(cores))


def usable_cores(root: Path = ROOT) -> int | None:
    """Return the physical cores that this process may use within its cgroup CPU quota; `None` outside Linux.

    Two hardware threads of a core count once, because they share its arithmetic units. A fraction of a core counts as
    a core. `limit_cores` may have set a lower number. `root` is the folder that contains `proc` and `sys`.
    """
    if not hasattr(os, "sched_getaffinity"):
        return _core_limit
    siblings = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    cores = {read_text(root / siblings.format(cpu)) or str(cpu) for cpu in os.sched_getaffinity(0)}
    limits = [] if _core_limit is None else [_core_limit]
    return max(1, min([len(cores), *limits, *(math.ceil(quota) for quota in _cgroup_quotas(root))]))


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


# A control group without a limit reports a number near 2**63.
_NO_LIMIT = 2**60


@dataclass(frozen=True, kw_only=True, slots=True)
class FreeMemory:
    """Memory that is available to a new process, and the source of the number."""

    size: int
    source: str


def free_host_memory(*, root: Path = ROOT) -> FreeMemory | None:
    """Return the free main memory, limited by the container; `None` if it is unknown."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", read_text(root / "proc/meminfo"), re.MULTILINE)
    known = [FreeMemory(size=int(found[1]) * 1024, source="MemAvailable")] if found else []
    return min([*known, *_cgroups(root)], key=lambda memory: memory.size, default=None)


def _cgroups(root: Path) -> list[FreeMemory]:
    """Return the free memory of every control group of this process (v1 and v2); page cache counts as free."""
    files = root / "sys/fs/cgroup"
    group = re.search(r"^0::(/\S*)", read_text(root / "proc/self/cgroup"), re.MULTILINE)
    path = group[1].strip("/") if group else ""
    folders = [files / path, *(files / parent for parent in Path(path).parents)] if path else [files]
    free = [_free_in_cgroup(folder, "memory.max", "memory.current", "inactive_file") for folder in folders]
    free.append(
        _free_in_cgroup(files / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    return [FreeMemory(size=size, source="the container's memory limit") for size in free if size is not None]


def _free_in_cgroup(folder: Path, limit_file: str, usage_file: str, cache: str) -> int | None:
    limit, usage = read_text(folder / limit_file).strip(), read_text(folder / usage_file).strip()
    if not limit.isdecimal() or not usage.isdecimal() or int(limit) >= _NO_LIMIT:
        return None
    files = re.search(rf"^{cache} (\d+)$", read_text(folder / "memory.stat"), re.MULTILINE)
    return max(0, int(limit) - int(usage) + (int(files[1]) if files else 0))
