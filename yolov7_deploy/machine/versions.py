"""Version texts as numbers that compare."""

from __future__ import annotations


def version_numbers(version: str) -> tuple[int, ...]:
    """`10.16.1` as (10, 16, 1), as far as it is numbers; nothing for an empty one."""
    numbers = []
    for part in version.split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)
