"""Build torch archives member by member, so that tests can write files that `torch.save` would never write."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

PROTO = b"\x80\x02"


def write_archive(path: Path, pickle: bytes, members: dict[str, bytes] | None = None, *, compression: int = 0) -> Path:
    """Write a torch archive with this `data.pkl` and these storages (`data/KEY`), and return its path."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickle)
        for key, data in (members or {}).items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", b"3\n")
    return path


def name(module: str, attribute: str) -> bytes:
    """Return the opcode that loads a class or function by name."""
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def counts(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(key: str = "0", count: int = 6, kind: str = "FloatStorage") -> bytes:
    return b"(" + text("storage") + name("torch", kind) + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(offset: int, size: bytes, stride: bytes, where: bytes | None = None) -> bytes:
    arguments = (where or storage()) + number(offset) + size + stride + b"\x89N"
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"tR"
