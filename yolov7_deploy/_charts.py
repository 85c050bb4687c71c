"""How a chart looks, and how it becomes a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from yolov7_deploy._atomic_file import whole_file
from yolov7_deploy.errors import UsageError

FONT = "DejaVu Sans"  # comes with matplotlib, so the same everywhere
GREY = "#555555"


def check_chart_name(path: Path) -> None:
    """Refuses a name that no chart can have, for those who measure long before they draw.

    Raises:
        UsageError: It does not end in .png.
    """
    if path.suffix.lower() != ".png":
        raise UsageError(f"{path}: a chart is a PNG.", fix=f"Name it {path.stem}.png")


def write_chart(draw: Callable[[], Figure], path: Path, *, dpi: int) -> None:
    """Writes a PNG: same figure, same bytes. The file appears complete or not at all, and folders are made.

    Raises:
        UsageError: The name does not end in .png, or the file cannot be written.
    """
    check_chart_name(path)
    data = BytesIO()
    with chart_style():
        draw().savefig(data, format="png", dpi=dpi, metadata={"Software": None})
    try:
        with whole_file(path) as unfinished:
            unfinished.write_bytes(data.getvalue())
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}.", fix="Choose another path.") from error


def drawable(text: str) -> str:
    """The text with a question mark for every sign that the font lacks, of which matplotlib would warn."""
    known = get_font(findfont(FONT)).get_charmap()
    return "".join(sign if ord(sign) in known else "?" for sign in text)


@contextmanager
def chart_style() -> Iterator[None]:
    """Matplotlib's own defaults and ours on top; the user's settings come back afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rc("font", family=FONT, size=9.0)
        matplotlib.rc("text", parse_math=False)  # file names may hold dollar signs
        matplotlib.rc("axes", edgecolor=GREY)
        matplotlib.rc("axes.spines", top=False, right=False)
        matplotlib.rc("legend", frameon=False, fontsize=8.0, title_fontsize=8.0, borderaxespad=0.0, borderpad=0.0)
        matplotlib.rc("legend", handlelength=2.4)
        yield
