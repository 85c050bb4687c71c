"""Matplotlib style of all charts, and writing them as PNG files or as SVG elements of a page."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO, StringIO
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from yolov7_deploy._atomic_file import atomic_write
from yolov7_deploy.errors import UsageError

FONT = "DejaVu Sans"  # part of matplotlib, so charts look the same everywhere
GREY = "#555555"


def check_chart_path(path: Path) -> None:
    """Check the file name of a chart; call it before a long measurement whose result will be drawn.

    Raises:
        UsageError: The name does not end in .png.
    """
    if path.suffix.lower() != ".png":
        raise UsageError(f"{path}: a chart is a PNG.", fix=f"Name it {path.stem}.png")


def write_chart(draw: Callable[[], Figure], path: Path, *, dpi: int) -> None:
    """Write a PNG file atomically; the same figure gives the same bytes. Missing folders are created.

    Raises:
        UsageError: The name does not end in .png, or the file cannot be written.
    """
    check_chart_path(path)
    data = BytesIO()
    with chart_style():
        draw().savefig(data, format="png", dpi=dpi, metadata={"Software": None})
    try:
        with atomic_write(path) as temporary:
            temporary.write_bytes(data.getvalue())
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}.", fix="Choose another path.") from error


def chart_svg(draw: Callable[[], Figure], *, name: str, label: str) -> str:
    """Return a chart as an SVG element for an HTML page; the same figure gives the same text.

    Its background is transparent and its size that of the element around it. Texts stay texts.

    Args:
        draw: Returns the figure.
        name: Prefix of all ids, so that one page can have several charts.
        label: The alternative text.
    """
    data = StringIO()
    with chart_style(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        draw().savefig(data, format="svg", transparent=True, metadata={"Date": None})
    text = data.getvalue()
    # Its style sheet would apply to the whole page, and its metadata names matplotlib's site.
    text = re.sub(r"<(style|metadata)\b.*?</\1>", "", text[text.index("<svg") :], flags=re.DOTALL)
    head, _, body = text.partition(">")
    head = re.sub(r' (?:width|height|version|xmlns(?::xlink)?)="[^"]*"', "", head)
    body = re.sub(r'(<[^<>]*? (?:id="|(?:xlink:)?href="#)|="url\(#|: ?url\(#)', rf"\g<1>{name}-", body)
    return f'{head} role="img" aria-label="{html.escape(label)}">{body}'.replace("xlink:href", "href").rstrip()


def replace_missing_glyphs(text: str) -> str:
    """Return the text with a question mark for every character that the font lacks (matplotlib would warn)."""
    known = get_font(findfont(FONT)).get_charmap()
    return "".join(character if ord(character) in known else "?" for character in text)


@contextmanager
def chart_style() -> Iterator[None]:
    """Apply matplotlib's defaults and our changes to them; the user's settings are restored afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rc("font", family=FONT, size=9.0)
        matplotlib.rc("text", parse_math=False)  # file names may hold dollar signs
        matplotlib.rc("axes", edgecolor=GREY)
        matplotlib.rc("axes.spines", top=False, right=False)
        matplotlib.rc("legend", frameon=False, fontsize=8.0, title_fontsize=8.0, borderaxespad=0.0, borderpad=0.0)
        matplotlib.rc("legend", handlelength=2.4)
        yield
