"""Cases of a test that are left to the slow suite, where every few of them say the same."""

from __future__ import annotations

from collections.abc import Iterable

import pytest


def some_fast(cases: Iterable[object], *, every: int) -> list[object]:
    """Return arguments of `parametrize`: of `every` cases in a row, the first is fast and the others are slow."""
    arguments: list[object] = []
    for index, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        arguments.append(pytest.param(*values, marks=[] if index % every == 0 else [pytest.mark.slow]))
    return arguments
