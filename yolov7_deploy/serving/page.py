"""The web page: one HTML file with its styles and script, which loads nothing from anywhere."""

from __future__ import annotations

import functools
from pathlib import Path

PAGE = Path(__file__).with_name("page.html")


@functools.cache
def read_page() -> str:
    """Return the HTML of the page."""
    return PAGE.read_text(encoding="utf-8")
