"""Targets for the measured values of a part: met, missed, or not measured with the reason."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the suite itself needs the standard library only
    from tests.gpu.environment import Environment

Target = dict[str, object]


class Targets:
    """The targets of a part by name, recorded as soon as they are evaluated.

    Attributes:
        rows: Per target the value `found`, its limit, and `met`; if it was not measured, `met` is `None` and `why` is
            the reason.
    """

    def __init__(self, env: Environment) -> None:
        self._env = env
        self.rows: dict[str, Target] = {}

    @property
    def missed(self) -> list[str]:
        """The names of the targets that were not met."""
        return [name for name, row in self.rows.items() if row["met"] is False]

    def at_least(self, name: str, found: float, limit: float) -> None:
        """Evaluate a target with a lower limit; NaN misses it."""
        self._record(name, {"found": found, "at_least": limit, "met": bool(found >= limit)})

    def at_most(self, name: str, found: float, limit: float) -> None:
        """Evaluate a target with an upper limit; NaN misses it."""
        self._record(name, {"found": found, "at_most": limit, "met": bool(found <= limit)})

    def skip(self, name: str, why: str) -> None:
        """Record that a target was not measured, which is neither met nor missed."""
        self._record(name, {"met": None, "why": why})

    def _record(self, name: str, row: Target) -> None:
        found = row.get("found")
        self.rows[name] = {**row, "found": None} if isinstance(found, float) and not math.isfinite(found) else row
        self._env.record("targets", self.rows)


def summarize_targets(rows: dict[str, Target]) -> str:
    """Return which targets were missed, how many were met, and why others were not measured."""
    missed = [name for name, row in rows.items() if row["met"] is False]
    met = sum(row["met"] is True for row in rows.values())
    reasons = dict.fromkeys(str(row["why"]) for row in rows.values() if row["met"] is None)
    parts = [f"missed: {', '.join(missed)}"] if missed else []
    parts += [f"{met} targets met"]
    parts += [f"{len(rows) - met - len(missed)} not measured: {', '.join(reasons)}"] if reasons else []
    return "; ".join(parts)
