"""Reader for files written by `torch.save`, without torch and without executing them.

It also recognises model files by their content, because suffixes can be wrong: a `.pt` may be an ONNX graph, a
TorchScript archive, or the HTML error page of a failed download.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from yolov7_deploy._bounded_read import MAX_CHECKPOINT_BYTES, MAX_MODEL_BYTES, check_file, open_file
from yolov7_deploy._text import shorten
from yolov7_deploy.checkpoint.pickle_allowlist import Storage, TensorEntry
from yolov7_deploy.checkpoint.safe_pickle import MAX_BYTES, read_pickle
from yolov7_deploy.errors import CheckpointError, LoadError, UnsafeCheckpointError

NumberArray = NDArray[np.generic]

# bfloat16 is the upper half of a float32, so it is read as 16-bit words and widened.
_BFLOAT16 = "torch.BFloat16Storage"
_DTYPES = {
    "torch.HalfStorage": "f2",
    "torch.FloatStorage": "f4",
    "torch.DoubleStorage": "f8",
    _BFLOAT16: "u2",
    "torch.LongStorage": "i8",
    "torch.IntStorage": "i4",
    "torch.ShortStorage": "i2",
    "torch.CharStorage": "i1",
    "torch.ByteStorage": "u1",
    "torch.BoolStorage": "u1",
}

# Errors of `zipfile` for damaged, encrypted or unusual archives.
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, ValueError, OverflowError)

# Of the table of contents; that of E6E with moving average and optimizer state has 0.7 MB.
MAX_DIRECTORY_BYTES = 4 * 2**20

# Expanded or shared tensors may repeat numbers of the file, within reason.
_REPEATED_BYTES = 16 * 2**20

_COPY_AGAIN = "Copy or download the file again, and compare its size with the original."
_LEGACY_HEAD = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
_HEAD_BYTES = 512


class TorchFile:
    """An open checkpoint file; close it, or use it as a context manager.

    Attributes:
        root: What was saved: plain data with `Module` placeholders and `TensorEntry` leaves (see `safe_pickle`).

    Raises:
        LoadError: The file is absent, damaged, or of another kind; the message says which.
        CheckpointError: The archive is valid, but its contents are not.
        UnsafeCheckpointError: It refers to code that is not allowed.
    """

    root: object

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._name = self._path.name
        _require_torch(self._path)
        self._size = self._path.stat().st_size
        self._bytes_read = 0
        self._cache: dict[str, bytes] = {}
        self._file, self._zip = _open_zip(self._path)
        try:
            self._folder = _container_folder(self._zip, self._name)
            self._refuse_bombs()
            self._order = self._byte_order()
            pickle = self._member(f"{self._folder}data.pkl", limit=MAX_BYTES)
            self.root = read_pickle(pickle, source=self._name, check_storage=self._check_storage)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; arrays that were returned stay valid."""
        self._zip.close()
        self._file.close()

    def array(self, entry: TensorEntry) -> NumberArray:
        """Read a tensor as a contiguous array; bfloat16 is converted to float32.

        Raises:
            LoadError: The data is damaged (checksum), or the tensors repeat it far more often than in a checkpoint.
        """
        kind = entry.storage.kind
        dtype = np.dtype(_DTYPES[kind]).newbyteorder(self._order)
        elements = math.prod(entry.shape)
        self._count_bytes(elements * dtype.itemsize)
        flat = np.frombuffer(self._storage_bytes(entry.storage), dtype=dtype)
        if elements == 0:
            flat, view = flat[:0], flat[:0].reshape(entry.shape)
        else:
            steps = zip(entry.shape, entry.stride, strict=True)
            stride = tuple(step * dtype.itemsize if count > 1 else 0 for count, step in steps)
            view = np.lib.stride_tricks.as_strided(flat[entry.offset :], entry.shape, stride, writeable=False)
        native = np.array(view, dtype=dtype.newbyteorder("="), order="C")
        if kind == _BFLOAT16:
            return (native.astype(np.uint32) << 16).view(np.float32)
        return native != 0 if kind == "torch.BoolStorage" else native

    def _count_bytes(self, count: int) -> None:
        """Count the bytes of storages and of tensors that are read."""
        self._bytes_read += count
        if self._bytes_read > min(3 * self._size + _REPEATED_BYTES, MAX_MODEL_BYTES):
            raise LoadError(
                f"The tensors of {self._name} repeat its data far more often than a checkpoint does, or are larger "
                "than any YOLOv7 network.",
                fix="Save contiguous weights:  {k: v.contiguous() for k, v in model.state_dict().items()}",
            )

    def _storage_bytes(self, storage: Storage) -> bytes:
        if storage.key not in self._cache:
            self._count_bytes(storage.count * np.dtype(_DTYPES[storage.kind]).itemsize)
            self._cache[storage.key] = self._member(f"{self._folder}data/{storage.key}", limit=self._size)
        return self._cache[storage.key]

    def _check_storage(self, storage: Storage) -> None:
        """Check that a storage is a plain member of exactly the declared size, before a tensor refers to it."""
        shown = ascii(storage.key[:40])
        if not storage.key.isascii() or not storage.key.replace("_", "").isalnum():
            raise UnsafeCheckpointError(
                f"{self._name} refers to storage {shown}, which is not a plain member name.",
                fix="Do not use this file: no version of torch writes such names.",
            )
        expected = storage.count * np.dtype(_DTYPES[storage.kind]).itemsize
        try:
            size = self._zip.getinfo(f"{self._folder}data/{storage.key}").file_size
        except KeyError as error:
            raise LoadError(f"{self._name} lacks its storage {shown}.", fix=_COPY_AGAIN) from error
        if size != expected:
            raise CheckpointError(
                f"Storage {shown} of {self._name} has {size} bytes, but the pickle declares {expected}.",
                fix=_COPY_AGAIN,
            )

    def _member(self, name: str, *, limit: int) -> bytes:
        try:
            size = self._zip.getinfo(name).file_size
            if size > limit:
                raise CheckpointError(f"{name} in {self._name} takes {size} bytes, more than {limit}.", fix=_COPY_AGAIN)
            return self._zip.read(name)
        except (*_ZIP_ERRORS, KeyError, OSError, MemoryError) as error:
            raise LoadError(
                f"{self._name} is damaged: {name} cannot be read ({shorten(error)}).", fix=_COPY_AGAIN
            ) from error

    def _refuse_bombs(self) -> None:
        """Check the sizes: torch stores members uncompressed, so their sum cannot exceed the file."""
        members = self._zip.infolist()
        packed = next((m for m in members if m.compress_type != zipfile.ZIP_STORED or m.flag_bits & 1), None)
        if packed is not None:
            raise LoadError(
                f"{self._name} has the compressed or encrypted member {packed.filename!a}; torch never writes one.",
                fix="If it was repacked, save the checkpoint with torch.save instead.",
            )
        total = sum(member.file_size for member in members)
        if total > self._size or len({member.filename for member in members}) != len(members):
            raise LoadError(
                f"{self._name} declares {total} bytes of members in a file of {self._size}, or a member twice.",
                fix="Do not use this file: torch does not write such archives.",
            )

    def _byte_order(self) -> Literal["<", ">"]:
        name = f"{self._folder}byteorder"
        if name not in self._zip.NameToInfo:
            return "<"
        order = self._member(name, limit=16)
        if order not in (b"little", b"big"):
            raise LoadError(f"{self._name} has an unknown byte order.", fix=_COPY_AGAIN)
        return "<" if order == b"little" else ">"


def is_safetensors(path: str | Path) -> bool:
    """Return whether the content is a safetensors file: an 8-byte header length, then a JSON object of that length."""
    file = Path(path)
    if not file.is_file():
        return False
    head = _head(file)
    length = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and 2 <= length <= file.stat().st_size - 8


def require_file(path: str | Path) -> None:
    """Check that a path is a regular file that is not empty, and not larger than any checkpoint.

    Raises:
        LoadError: It is absent, a folder, a pipe or device, empty, or too large.
    """
    file = Path(path)
    if file.is_dir():
        raise LoadError(f"{file} is a folder, not a weights file.", fix=f"Name the file inside it:  {file}/NAME.pt")
    try:
        size = check_file(file, max_bytes=MAX_CHECKPOINT_BYTES)
    except FileNotFoundError as error:
        raise LoadError(
            f"{file} does not exist.", fix="Check the path, or use an official name such as yolov7."
        ) from error
    except OSError as error:
        raise LoadError(f"{file} cannot be read: {error.strerror or error}.", fix="Check the path.") from error
    if size == 0:
        raise LoadError(f"{file} is empty (0 bytes).", fix=_COPY_AGAIN)


def _head(path: Path) -> bytes:
    try:
        with open_file(path, max_bytes=MAX_CHECKPOINT_BYTES) as stream:
            return stream.read(_HEAD_BYTES)
    except OSError as error:
        raise LoadError(
            f"{path} cannot be read ({error.strerror or error}).", fix="Check its permissions and the disk."
        ) from error


def _require_torch(path: Path) -> None:
    """Raise the error that names the kind of file, unless it is a zip archive."""
    require_file(path)
    head = _head(path)
    if head.startswith(b"PK"):
        return
    name = path.name
    if head.startswith(_LEGACY_HEAD):
        raise LoadError(
            f"{name} is in the format torch wrote before 1.6, which cannot be read without running it.",
            fix="If you trust the file, save it again:  torch.save(torch.load(F, map_location='cpu', "
            f"weights_only=False), '{name}')   (weights_only=True is enough for a plain state dict)",
        )
    if _looks_like_onnx(head):
        raise _exported_file(path, "an ONNX graph", ".onnx")
    if head[:4] in (b"ftrt", b"ptrt"):
        raise _exported_file(path, "a TensorRT engine", ".engine")
    if head.startswith(b"version https://git-lfs"):
        raise LoadError(f"{name} is a Git LFS pointer, not the file itself.", fix="Fetch the file:  git lfs pull")
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise LoadError(
            f"{name} is a bare pickle, not a torch file; it is not read, because a pickle is a program.",
            fix="Save the weights with torch.save(model.state_dict(), 'weights.pt').",
        )
    if _looks_like_text(head):
        line = head.decode("utf-8", "replace").strip().splitlines()[:1] or [""]
        raise LoadError(
            f"{name} is a text file (it begins with {line[0][:60]!a}), not a checkpoint.",
            fix="A failed download often saves an error page instead of the file: open it to check.",
        )
    raise LoadError(f"{name} is not a torch file (it starts with {head[:8]!r}).", fix=_COPY_AGAIN)


def _exported_file(path: Path, kind: str, suffix: str) -> LoadError:
    message = f"{path.name} is {kind}, not a checkpoint."
    if path.suffix.lower() != suffix:
        return LoadError(message, fix=f"Rename it:  {path.stem}{suffix}")
    beside = (path.with_suffix(other) for other in (".safetensors", ".pt", ".pth"))
    weights = next((str(other) for other in beside if other.is_file()), "WEIGHTS.pt")
    return LoadError(message, fix=f"Use the weights from which it was exported:  --weights {weights}")


def _looks_like_onnx(head: bytes) -> bool:
    """Return whether the data starts like an ONNX ModelProto: ir_version, then producer, opsets or graph."""
    return (
        len(head) > 3 and head[0] == 0x08 and 1 <= head[1] <= 0x20 and head[2] in (0x12, 0x1A, 0x22, 0x2A, 0x3A, 0x42)
    )


def _looks_like_text(head: bytes) -> bool:
    return all(byte >= 0x20 or byte in b"\t\n\r\f\x1b" for byte in head)


class _ZipReader(io.BufferedReader):
    """File that refuses to read a huge table of contents, whose size `zipfile` takes from the file."""

    is_opening = True

    def read(self, size: int | None = -1, /) -> bytes:
        if self.is_opening and (size or 0) > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"its table of contents has {size} bytes, more than {MAX_DIRECTORY_BYTES}")
        return super().read(size)


def _open_zip(path: Path) -> tuple[_ZipReader, zipfile.ZipFile]:
    try:
        file = _ZipReader(open_file(path, max_bytes=MAX_CHECKPOINT_BYTES).detach())
        try:
            archive = zipfile.ZipFile(file)
        except BaseException:
            file.close()
            raise
        file.is_opening = False
        return file, archive
    except (*_ZIP_ERRORS, OSError, MemoryError) as error:
        raise LoadError(
            f"{path.name} ({path.stat().st_size} bytes) is a damaged or truncated torch file ({shorten(error)}).",
            fix=_COPY_AGAIN,
        ) from error


def _container_folder(archive: zipfile.ZipFile, name: str) -> str:
    """Return the top folder of the archive with its slash; every torch file has one."""
    members = archive.namelist()
    folders = sorted(m.removesuffix("data.pkl") for m in members if m == "data.pkl" or m.endswith("/data.pkl"))
    folder = min(folders, key=len, default=None)
    if folder is None:
        shown = ", ".join(ascii(member[:40]) for member in members[:3])
        raise LoadError(
            f"{name} is a zip archive but not a torch file (it contains {shown or 'nothing'}).", fix=_COPY_AGAIN
        )
    if any(m == f"{folder}constants.pkl" or m.startswith(f"{folder}code/") for m in members):
        raise LoadError(
            f"{name} is a TorchScript archive: a program, whose weights have lost their official names.",
            fix="Use the checkpoint it was traced from (yolov7.pt, not yolov7.torchscript.pt).",
        )
    return folder
