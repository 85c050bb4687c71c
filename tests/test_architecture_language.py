"""The text of the project uses the field's standard terms, and docstrings are sentences.

The lists are short on purpose: they name what earlier revisions used and what reviewers kept finding.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Recorded data, the licence and this list itself.
NOT_CHECKED = (
    "LICENSE",
    "tests/golden/",
    "tests/fixtures/",
    "benchmarks/results/",
    "tests/test_architecture_language.py",
)

METAPHORS = re.compile(r"\b(?:house|porch|forge|shelf|passports?|stations?|workshop)\b", re.IGNORECASE)
OLD_TERMS = re.compile(
    r"\b(?:pictures?|suppression|somebody|nobody|whoever|anew|shall|dearest|meanwhile|what came of it|by itself|"
    r"at hand|comes? along|begins? with given|(?<!there )(?<!There )is no (?!longer\b|more\b|need\b|way\b|such\b))\b"
)
BAD_FIRST_WORDS = {
    "And", "As", "How", "None", "Of", "Somebody", "That", "Those",
    "What", "Where", "Whether", "Which", "Who", "Whoever",
}  # fmt: skip


def text_files() -> Iterator[tuple[str, str]]:
    """(path, text) of every tracked text file that people read."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        path = ROOT / name
        if name.startswith(NOT_CHECKED) or not path.is_file():
            continue
        try:
            yield name, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def matches(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{name}:{number}: {line.strip()[:120]}"
        for name, text in text_files()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


@pytest.fixture(scope="module", autouse=True)
def _checkout():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so the tracked files are unknown")


def test_there_are_no_metaphors_for_architecture():
    assert matches(METAPHORS) == []


def test_terms_are_those_of_the_field():
    assert matches(OLD_TERMS) == []


def test_no_docstring_begins_with_a_fragment():
    wrong = []
    for name, text in text_files():
        if not name.endswith(".py"):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                doc = ast.get_docstring(node) or ""
                if doc.split(" ", 1)[0].rstrip(",") in BAD_FIRST_WORDS:
                    wrong.append(f"{name}:{getattr(node, 'lineno', 1)}: {doc.splitlines()[0]}")
    assert wrong == []
