"""TensorRT's log and progress as calls of ours. Both are made from classes of the TensorRT that is installed.

TensorRT calls them from threads of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Trt = Any  # the module or an object of it

PARTS = 100  # that the whole build is divided into
LISTING = "Layers:\n"  # how the message begins in which a builder lists the layers of the engine it just made


def logger_of(trt: Trt, tell: Callable[[str], None], listing: Callable[[str], None] | None = None) -> Trt:
    """A logger that gives each line but the chatter to `tell`, as `ERROR: words`.

    Args:
        trt: The module.
        tell: Takes the lines.
        listing: Takes the one message of the chatter, of 20,000 in a build, that lists the layers of an engine.
    """

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Trt, message: str) -> None:
            if severity.name != "VERBOSE":
                tell(f"{severity.name}: {message}")
            elif listing is not None and message.startswith(LISTING):
                listing(message)

    return Log()


def monitor_of(trt: Trt, tell: Callable[[int, int], None]) -> Trt | None:
    """A progress monitor that gives (done, total) to `tell` as it rises; `None` where TensorRT has none (8.x)."""
    if not hasattr(trt, "IProgressMonitor"):
        return None
    phases = Phases(tell)

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            phases.step(phase_name, step)
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()


@dataclass(slots=True)
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Phases:
    """Nested phases as one number: a phase is the step of its parent that is being done.

    Args:
        tell: Called with (done, total) whenever it rose by a hundredth.
    """

    def __init__(self, tell: Callable[[int, int], None]) -> None:
        self._tell = tell
        self._phases: dict[str, _Phase] = {}
        self._told = -1
        self._lock = threading.Lock()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase of so many steps begins."""
        with self._lock:
            self._phases[name] = _Phase(parent, max(steps, 1))
            self._update()

    def step(self, name: str, step: int) -> None:
        """The step of this number (from 0) is complete."""
        with self._lock:
            phase = self._phases.get(name)
            if phase is not None:
                phase.done = max(phase.done, min(step + 1, phase.steps))
                self._update()

    def finish(self, name: str) -> None:
        """A phase ends, complete or not."""
        with self._lock:
            self._phases.pop(name, None)

    def _fraction(self, name: str) -> float:
        phase = self._phases[name]
        inside = [self._fraction(child) for child, other in self._phases.items() if other.parent == name]
        return min(1.0, (phase.done + max(inside, default=0.0)) / phase.steps)

    def _update(self) -> None:
        roots = [name for name, phase in self._phases.items() if phase.parent not in self._phases]
        self._say(int(PARTS * max((self._fraction(name) for name in roots[:1]), default=0.0)))

    def _say(self, done: int) -> None:
        if done > self._told:  # phases may start late or end early; a bar never goes back
            self._told = done
            self._tell(done, PARTS)
