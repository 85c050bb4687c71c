"""A folder as pieces that travel one by one, and back. Needs the standard library only."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path
from typing import Any

PIECE_BYTES = 58 * 2**20


def pack(whole: Path, pieces: Path) -> None:
    """The folder as one compressed archive, cut into `part_00`, `part_01`, ..."""
    shutil.rmtree(pieces, ignore_errors=True)
    pieces.mkdir(parents=True)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:xz", preset=1) as tar:
        tar.add(whole, arcname=".")
    data = archive.getvalue()
    for number, start in enumerate(range(0, len(data), PIECE_BYTES)):
        path = pieces / f"part_{number:02}"
        path.write_bytes(data[start : start + PIECE_BYTES])
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


def unpack(pieces: Path, whole: Path) -> None:
    """The folder that was packed."""
    archive = io.BytesIO(b"".join(path.read_bytes() for path in sorted(pieces.glob("part_*"))))
    # Python before 3.10.12 and 3.11.4 has no filters.
    careful: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(fileobj=archive, mode="r:xz") as tar:
        tar.extractall(whole, **careful)
