"""Blocks of code in Markdown pages."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

_BLOCK = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


def all_blocks(path: Path) -> list[tuple[str, str]]:
    """Return (language, code) of the fenced blocks of a page, in order; the language may be empty."""
    return [(language, textwrap.dedent(code)) for _, language, code in _BLOCK.findall(path.read_text(encoding="utf-8"))]


def code_blocks(path: Path, *languages: str) -> list[str]:
    """Return the blocks of a page in one of these languages."""
    return [code for language, code in all_blocks(path) if language in languages]
