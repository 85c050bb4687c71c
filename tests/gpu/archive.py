"""Packs a folder into archive parts of limited size and unpacks them. Uses only the standard library."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

PART_BYTES = 24 * 2**20  # a transfer of one and the project, which has 31 MB, stays below 64 MiB


def pack(folder: Path, archive: Path) -> None:
    """Write `folder` as one compressed archive, split into `part_00`, `part_01`, ..."""
    shutil.rmtree(archive, ignore_errors=True)
    archive.mkdir(parents=True)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz", preset=1) as tar:
        tar.add(folder, arcname=".")
    data = buffer.getvalue()
    for number, start in enumerate(range(0, len(data), PART_BYTES)):
        path = archive / f"part_{number:02}"
        path.write_bytes(data[start : start + PART_BYTES])
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


def unpack(archive: Path, folder: Path) -> None:
    """Restore the packed folder."""
    buffer = io.BytesIO(b"".join(path.read_bytes() for path in sorted(archive.glob("part_*"))))
    with tarfile.open(fileobj=buffer, mode="r:xz") as tar:
        if hasattr(tarfile, "data_filter"):  # since Python 3.10.12 and 3.11.4
            tar.extractall(folder, filter="data")
        else:
            tar.extractall(folder)
