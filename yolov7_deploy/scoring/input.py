"""The input of `y7 score`: the images of a folder, a list or a Parquet file, numbered in an order that never changes.

Images are divided into chunks, which name their images and are small enough to be sent to another machine. A worker
reads the images itself, so paths must be valid there, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from yolov7_deploy._text import expand_user, hide_credentials, printable_line, similar_file
from yolov7_deploy.errors import SourceError, UsageError, missing_library
from yolov7_deploy.image import IMAGE_SUFFIXES
from yolov7_deploy.sources import Skipped
from yolov7_deploy.sources.files import (
    FoundFiles,
    list_folder,
    locate,
    path_exists,
    read_list,
    summarize_left_out,
)

if TYPE_CHECKING:
    from yolov7_deploy.scoring.parquet import ImageTable

LIST_SUFFIX, PARQUET_SUFFIX = ".txt", ".parquet"
_KINDS = f"Pass a folder of images, a {LIST_SUFFIX} list with one path per line, or a {PARQUET_SUFFIX} file."


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One image.

    Attributes:
        name: What results call it: its path as it was given.
        image: Absolute path, or the content of an image file, which is empty if the input has none.
    """

    name: str
    image: str | bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Consecutive images of the input that one worker processes together.

    Attributes:
        first: Number of the first image in the input.
        count: Number of images.
        names: Names of images in files.
        paths: Absolute paths of these.
        rows: The rows of a Parquet file, if the images are in one.
    """

    first: int
    count: int
    names: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    rows: ParquetRows | None = None

    def items(self) -> Iterator[Item]:
        """Yield the images in order.

        Raises:
            SourceError: A Parquet file cannot be read.
        """
        if self.rows is not None:
            yield from self.rows.items(self.count)
        else:
            yield from (Item(name=name, image=path) for name, path in zip(self.names, self.paths, strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class ParquetRows:
    """A place in a Parquet file with image bytes.

    Attributes:
        path: Absolute path of the file.
        name: The file in names of images, `images.parquet#12` for row 12; rows with a path of their own have that.
        column: Column of the images.
        group: Number of the row group.
        offset: Number of the first row in the group.
        first_row: Number of that row in the file.
    """

    path: str
    name: str
    column: str
    group: int
    offset: int
    first_row: int

    def items(self, count: int) -> Iterator[Item]:
        """Yield this many images, starting at the row."""
        from yolov7_deploy.scoring.parquet import read_images

        rows = read_images(self.path, column=self.column, group=self.group, offset=self.offset, count=count)
        for number, (name, image) in enumerate(rows, start=self.first_row):
            yield Item(name=name or f"{self.name}#{number}", image=image)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreInput:
    """All images of the input.

    Attributes:
        origin: Absolute path of the folder, list or Parquet file.
        names: Names of images in files.
        paths: Absolute paths of these.
        groups: Row groups of Parquet files with image bytes, in order, with their numbers of rows.
        left_out: What folders have besides images.
    """

    origin: str
    names: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    groups: tuple[tuple[ParquetRows, int], ...] = ()
    left_out: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return len(self.names) or sum(count for _, count in self.groups)

    def digest(self) -> str:
        """Return a SHA-256 of the names of all images; it says nothing about their content."""
        total = hashlib.sha256(self.origin.encode("utf-8", "surrogateescape"))
        for name in self.names:
            total.update(b"\0" + name.encode("utf-8", "surrogateescape"))
        for rows, count in self.groups:
            total.update(f"\0{rows.name} {rows.column} {rows.group} {count}".encode("utf-8", "surrogateescape"))
        return total.hexdigest()

    def chunks(self, wanted: Iterable[range], *, size: int) -> Iterator[Chunk]:
        """Yield the images with the wanted numbers, at most `size` per chunk; a chunk never has images of two ranges.

        Args:
            wanted: Ranges of image numbers, ascending.
            size: Maximum number of images in a chunk.
        """
        for numbers in wanted:
            if self.groups:
                yield from self._chunks_of_groups(numbers, size)
                continue
            for part in _divide(numbers, size):
                chosen = slice(part.start, part.stop)
                yield Chunk(first=part.start, count=len(part), names=self.names[chosen], paths=self.paths[chosen])

    def _chunks_of_groups(self, numbers: range, size: int) -> Iterator[Chunk]:
        begin = 0
        for rows, count in self.groups:
            for part in _divide(range(max(numbers.start, begin), min(numbers.stop, begin + count)), size):
                skipped = part.start - begin
                place = replace(rows, offset=skipped, first_row=rows.first_row + skipped)
                yield Chunk(first=part.start, count=len(part), rows=place)
            begin += count


def _divide(numbers: range, size: int) -> Iterator[range]:
    yield from (range(first, min(first + size, numbers.stop)) for first in range(numbers.start, numbers.stop, size))


def open_input(text: str, *, column: str | None = None) -> ScoreInput:
    """Return the images of a folder, a list or a Parquet file.

    A folder is searched with its subfolders, but without hidden files and folders. The paths of a list are relative to
    its folder, else to the working directory; those that do not exist are reported later, as unreadable images.

    Args:
        text: Path of the folder, list or Parquet file, or of a folder with Parquet files.
        column: Column of a Parquet file with image bytes or with paths; by default `image`, `bytes` or `path`.

    Raises:
        SourceError: It does not exist, cannot be read, or has no images.
        UsageError: `column` is given, and the input is not a Parquet file.
        MissingLibraryError: PyArrow, which reads Parquet files, is not installed.
    """
    path = expand_user(text)
    if not path_exists(path):
        similar = similar_file(path)
        fix = "Check the path." if similar is None else f"Did you mean {similar}?"
        raise SourceError(f"{hide_credentials(text)} does not exist.", fix=fix)
    if path.is_dir():
        found = list_folder(path, suffixes=IMAGE_SUFFIXES, recursive=True)
        tables = () if found.files else list_folder(path, suffixes=(PARQUET_SUFFIX,), recursive=True).files
    else:
        found, tables = None, (path,) if path.suffix.lower() == PARQUET_SUFFIX else ()
    if tables:
        return _open_parquet(path, tables, column)
    if column is not None:
        raise UsageError(f"--column names a column of a Parquet file; {path} is not one.", fix="Leave out --column")
    if found is not None:
        return _open_folder(path, found)
    if path.suffix.lower() == LIST_SUFFIX:
        return _open_list(path)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return _from_files(path, [path])
    raise SourceError(f"{path} is neither a folder, a list nor a Parquet file.", fix=_KINDS)


def _open_folder(folder: Path, found: FoundFiles) -> ScoreInput:
    if not found.files:
        others = f", only {summarize_left_out(found.left_out, folder=folder)}" if found.left_out else ""
        raise SourceError(f"The folder {folder} has no image in it{others}.", fix=_KINDS)
    return replace(_from_files(folder, found.files), left_out=found.left_out)


def _from_files(origin: Path, files: Sequence[Path]) -> ScoreInput:
    paths = tuple(str(path.absolute()) for path in files)
    return ScoreInput(origin=str(origin.absolute()), names=tuple(map(str, files)), paths=paths)


def _open_list(path: Path) -> ScoreInput:
    try:
        entries = [(path.parent, entry) for _, entry in read_list(path)]
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise SourceError(f"The list {path} cannot be read: {reason or error}.", fix="Check the file.") from error
    if not entries:
        raise SourceError(f"The list {path} has no line with a path.", fix="Write one path per line.")
    return _from_entries(path, entries)


def _from_entries(origin: Path, entries: Sequence[tuple[Path, str]]) -> ScoreInput:
    """Return the images of a list or table: pairs of its folder and a path, which is looked for there first."""
    shown = [_shown(entry) for _, entry in entries]
    paths = (
        locate(entry, (folder, Path())) or folder / expand_user(name)
        for (folder, entry), name in zip(entries, shown, strict=True)
    )
    return ScoreInput(
        origin=str(origin.absolute()), names=tuple(shown), paths=tuple(str(path.absolute()) for path in paths)
    )


def _shown(entry: str) -> str:
    """Return a path without the credentials that an address may have; fast, because lists have millions of paths."""
    return hide_credentials(entry) if any(mark in entry for mark in "@=%") else entry


def _open_parquet(origin: Path, files: Sequence[Path], column: str | None) -> ScoreInput:
    try:
        from yolov7_deploy.scoring.parquet import describe_images, read_paths
    except ModuleNotFoundError as error:
        raise missing_library(error, f"to read {printable_line(files[0].name)}") from error
    tables = [(path, describe_images(path, column=column)) for path in files]
    if not any(sum(table.group_sizes) for _, table in tables):
        raise SourceError(f"{origin} has no rows.", fix=_KINDS)
    kinds = {table.has_paths for _, table in tables}
    if len(kinds) > 1:
        raise SourceError(
            f"Some of the {len(files)} Parquet files in {origin} have image bytes, others have paths.",
            fix="Pass them one after the other, each with an --output of its own.",
        )
    if kinds == {True}:
        entries = [(path.parent, entry) for path, table in tables for entry in read_paths(path, column=table.column)]
        return _from_entries(origin, entries)
    groups = tuple(group for path, table in tables for group in _groups(path, table))
    return ScoreInput(origin=str(origin.absolute()), groups=groups)


def _groups(path: Path, table: ImageTable) -> Iterator[tuple[ParquetRows, int]]:
    first = 0
    for group, count in enumerate(table.group_sizes):
        place = ParquetRows(
            path=str(path.absolute()), name=str(path), column=table.column, group=group, offset=0, first_row=first
        )
        yield place, count
        first += count
