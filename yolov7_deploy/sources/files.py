"""Rules for the files of a folder, pattern or text list that are used; datasets and `open_source` share them.

Names that start with a dot are left out: macOS writes `._photo.jpg`, which is not an image, and Jupyter copies of
images to `.ipynb_checkpoints`. Links to folders are followed. What is left out is listed with its reason.
"""

from __future__ import annotations

import codecs
import fnmatch
import os
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from yolov7_deploy._bounded_read import read_bytes
from yolov7_deploy._text import expand_user, printable_line

GLOB_CHARACTERS = "*?["
LABEL_SUFFIX = ".txt"  # label files and lists beside images are neither used nor left out
MAX_TEXT_BYTES = 2**28  # of a text file; a list of five million images has about as many
HIDDEN = "hidden"
SUBFOLDER = "subfolder"
NO_SUFFIX = "file without suffix"
NOT_A_FILE = "not a regular file"
BROKEN_LINK = "broken link"
REPEATED_FOLDER = "link to a folder that is already included"
UNREADABLE_FOLDER = "folder that cannot be read"


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """A file or other item that is not used, and the reason."""

    path: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundFiles:
    """The files of a folder or pattern.

    Attributes:
        files: Sorted, each once.
        left_out: What else was found there.
    """

    files: tuple[Path, ...]
    left_out: tuple[Skipped, ...]


def list_folder(folder: Path, *, suffixes: Collection[str], recursive: bool) -> FoundFiles:
    """Return the files of a folder that have one of the suffixes (in lower case).

    Args:
        folder: The folder.
        suffixes: For example `.jpg`; the suffixes of files may be in any case.
        recursive: Include subfolders; otherwise they are left out.
    """
    files: list[Path] = []
    left_out: list[Skipped] = []
    for current, entries in _walk(folder, left_out) if recursive else [(folder, _scan(folder, left_out))]:
        for entry in entries:
            path = current / entry.name
            if entry.name.startswith("."):
                left_out.append(Skipped(path=str(path), reason=HIDDEN))
            elif not _is_folder(entry):
                _sort_file(path, suffixes, files, left_out)
            elif not recursive:
                left_out.append(Skipped(path=str(path), reason=SUBFOLDER))
    return FoundFiles(files=tuple(sorted(files)), left_out=tuple(left_out))


def has_files_below(folder: Path, *, suffixes: Collection[str], max_folders: int) -> bool:
    """Return whether a folder or a subfolder has a file with one of the suffixes; only so many folders are searched."""
    names = (entry.name for _, entries in islice(_walk(folder, []), max_folders) for entry in entries)
    return any(Path(name).suffix.lower() in suffixes and not name.startswith(".") for name in names)


def expand_pattern(folder: Path, parts: Sequence[str], *, suffixes: Collection[str]) -> FoundFiles:
    """Return the files with one of the suffixes that match a pattern, given as its parts below a folder.

    `*`, `?` and `[...]` match as in a shell, and `**` any number of folders; names with a leading dot only match a part
    that has it, too. A pattern that ends in `**` means all files below. A part that exists as it is, such as `cam[1]`,
    is that file or folder.

    Raises:
        re.error, RecursionError: The pattern is invalid.
    """
    merged = [part for i, part in enumerate(parts) if part != "**" or parts[i - 1 : i] != ["**"]]
    if merged[-1] == "**":
        merged.append("*")
    files: list[Path] = []
    left_out: list[Skipped] = []
    for path in sorted(set(_match(folder, merged, left_out))):
        _sort_file(path, suffixes, files, left_out)
    return FoundFiles(files=tuple(files), left_out=tuple(dict.fromkeys(left_out)))


def summarize_left_out(left_out: Iterable[Skipped], *, folder: Path | None = None) -> str:
    """Return the number and the first path of each reason: `2 x hidden (a/._1.png), 1 x .gif (b.gif)`.

    Args:
        left_out: What was left out.
        folder: The folder that the paths are in; they are shown relative to it.
    """
    by_reason: dict[str, list[str]] = {}
    for item in left_out:
        by_reason.setdefault(item.reason, []).append(item.path)
    return ", ".join(
        f"{len(paths)} x {reason} ({printable_line(Path(paths[0]).relative_to(folder) if folder else paths[0])})"
        for reason, paths in by_reason.items()
    )


def read_list(path: Path) -> list[tuple[int, str]]:
    """Return line number and text of each entry of a list; blank lines and lines that start with # are ignored.

    Raises:
        OSError: The file cannot be read, is not a regular file, or is too large.
        UnicodeError: It is not text.
    """
    lines = enumerate(read_text(path).splitlines(), start=1)
    stripped = ((number, line.strip()) for number, line in lines)
    return [(number, line) for number, line in stripped if line and not line.startswith("#")]


def read_text(path: Path, *, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Return a text file, UTF-8 or, with a byte order mark, UTF-16 (as Windows PowerShell writes it).

    Raises:
        OSError: The file cannot be read, is not a regular file, or has more than `max_bytes`.
        UnicodeError: It is not text.
    """
    data = read_bytes(path, max_bytes=max_bytes)
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if is_utf16 else "utf-8-sig")


def locate(entry: str, folders: Iterable[Path]) -> Path | None:
    """Return an entry of a list, relative to the first of the folders that has it, or `None`.

    Backslashes separate folders if no file has them in its name: lists are often written on Windows.
    """
    folders = list(folders)
    for text in dict.fromkeys((entry, entry.replace("\\", "/"))):
        for folder in folders:
            path = folder / expand_user(text)
            if path_exists(path):
                return path
    return None


def path_exists(path: Path) -> bool:
    """Return whether a file or folder exists; unlike `Path.exists`, names that are too long do not raise."""
    return os.path.exists(path)  # noqa: PTH110


def _sort_file(path: Path, suffixes: Collection[str], files: list[Path], left_out: list[Skipped]) -> None:
    """Append the path to the files, or to what is left out."""
    suffix = path.suffix.lower()
    if suffix == LABEL_SUFFIX:
        return
    if suffix not in suffixes:
        left_out.append(Skipped(path=str(path), reason=printable_line(suffix) or NO_SUFFIX))
    elif not os.path.isfile(path):  # noqa: PTH113
        left_out.append(Skipped(path=str(path), reason=NOT_A_FILE if path_exists(path) else BROKEN_LINK))
    else:
        files.append(path)


def _walk(folder: Path, left_out: list[Skipped]) -> Iterator[tuple[Path, list[os.DirEntry[str]]]]:
    """Yield each folder and its entries: first the real folders, then those that links lead to; hidden ones are not.

    Each folder is read once, so loops of links end, and a link next to its folder does not repeat the images.
    """
    seen: set[tuple[int, int]] = set()
    folders, links = deque([folder]), deque[Path]()
    while folders or links:
        current = (folders or links).popleft()
        try:
            status = current.stat()
        except OSError:
            left_out.append(Skipped(path=str(current), reason=UNREADABLE_FOLDER))
            continue
        if (status.st_dev, status.st_ino) in seen:
            left_out.append(Skipped(path=str(current), reason=REPEATED_FOLDER))
            continue
        seen.add((status.st_dev, status.st_ino))
        entries = _scan(current, left_out)
        for entry in entries:
            if _is_folder(entry) and not entry.name.startswith("."):
                (links if entry.is_symlink() else folders).append(current / entry.name)
        yield current, entries


def _scan(folder: Path, left_out: list[Skipped]) -> list[os.DirEntry[str]]:
    """Return the entries of a folder by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        left_out.append(Skipped(path=str(folder), reason=UNREADABLE_FOLDER))
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


def _matching_names(folder: Path, pattern: str, left_out: list[Skipped]) -> list[str]:
    """Return the entries that match a part of a pattern; brackets may also be part of a name, as in `cam[1]`."""
    if path_exists(folder / pattern):
        return [pattern]
    names = [entry.name for entry in _scan(folder, left_out)]
    found = [name for name in names if fnmatch.fnmatch(name, pattern)]
    return found or [name for name in names if fnmatch.fnmatch(name, pattern.replace("[", "[[]"))]


def _match(folder: Path, parts: Sequence[str], left_out: list[Skipped]) -> Iterator[Path]:
    """Yield what matches the parts of a pattern and is not a folder."""
    first, rest = parts[0], parts[1:]
    if first == "**":
        for subfolder, _ in _walk(folder, left_out):
            yield from _match(subfolder, rest, left_out)
        return
    names = [first]
    if any(character in first for character in GLOB_CHARACTERS):
        names = _matching_names(folder, first, left_out)
    for name in names:
        path = folder / name
        if bool(rest) != path.is_dir():
            continue
        if name.startswith(".") and not first.startswith("."):
            left_out.append(Skipped(path=str(path), reason=HIDDEN))
        elif rest:
            yield from _match(path, rest, left_out)
        else:
            yield path
