"""What is asked of a part's figures: met, missed, or not measured and why."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the suite itself needs the standard library only
    from tests.gpu.environment import Setting

Goal = dict[str, object]


class Goals:
    """Goals of a part by name, recorded as soon as they are known.

    Attributes:
        rows: `found`, its limit, and whether it was `met`; where it was not measured, `None` and the reason `why`.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.rows: dict[str, Goal] = {}

    @property
    def missed(self) -> list[str]:
        """Names of those that were not met."""
        return [name for name, row in self.rows.items() if row["met"] is False]

    def at_least(self, name: str, found: float, limit: float) -> None:
        """What is no number misses it."""
        self._keep(name, {"found": found, "at_least": limit, "met": bool(found >= limit)})

    def at_most(self, name: str, found: float, limit: float) -> None:
        """What is no number misses it."""
        self._keep(name, {"found": found, "at_most": limit, "met": bool(found <= limit)})

    def skip(self, name: str, why: str) -> None:
        """It was not measured, which is neither met nor missed."""
        self._keep(name, {"met": None, "why": why})

    def _keep(self, name: str, row: Goal) -> None:
        found = row.get("found")
        self.rows[name] = {**row, "found": None} if isinstance(found, float) and not math.isfinite(found) else row
        self._setting.record("goals", self.rows)


def goal_words(rows: dict[str, Goal]) -> str:
    """Which were missed, how many were met, and why others were not measured."""
    missed = [name for name, row in rows.items() if row["met"] is False]
    met = sum(row["met"] is True for row in rows.values())
    reasons = dict.fromkeys(str(row["why"]) for row in rows.values() if row["met"] is None)
    words = [f"missed: {', '.join(missed)}"] if missed else []
    words += [f"{met} goals met"]
    words += [f"{len(rows) - met - len(missed)} not measured: {', '.join(reasons)}"] if reasons else []
    return "; ".join(words)
