"""Parquet files of `y7 score`: images or paths of images in, detections out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from yolov7_deploy.errors import SourceError, UsageError

IMAGE_COLUMNS = ("image", "bytes", "path")  # in this order; `image` may be a struct with the fields `bytes` and `path`
NAME_COLUMNS = ("path", "file_name")  # of a table with image bytes: what results call the image
_ROWS_AT_ONCE = 32
_FIX = "Pass a Parquet file with image bytes or paths of images."
_BOX = pyarrow.list_(pyarrow.float32(), 4)
RESULT_SCHEMA = pyarrow.schema(
    [
        ("path", pyarrow.string()),
        ("height", pyarrow.int32()),
        ("width", pyarrow.int32()),
        ("boxes", pyarrow.list_(_BOX)),
        ("scores", pyarrow.list_(pyarrow.float32())),
        ("class_ids", pyarrow.list_(pyarrow.int32())),
        ("class_names", pyarrow.list_(pyarrow.string())),
        ("error", pyarrow.string()),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageTable:
    """A Parquet file with images.

    Attributes:
        column: The column of the images.
        has_paths: It has paths of images, not their bytes.
        group_sizes: Number of rows of each row group.
    """

    column: str
    has_paths: bool
    group_sizes: tuple[int, ...]


def describe_images(path: Path, *, column: str | None) -> ImageTable:
    """Return where the images are in a Parquet file.

    Args:
        path: The file.
        column: The column; by default the first one of `IMAGE_COLUMNS` that exists.

    Raises:
        SourceError: The file is damaged, or has no such column.
        UsageError: The column has neither bytes nor text.
    """
    with _open(path) as file:
        schema, metadata = file.schema_arrow, file.metadata
        name = column or next((name for name in IMAGE_COLUMNS if name in schema.names), None)
        if name is None or name not in schema.names:
            missing = f"column {name!r}" if name else f"column named {', '.join(IMAGE_COLUMNS[:-1])} or path"
            fix = f"Name the column of the images with --column; its columns: {', '.join(schema.names)}"
            raise SourceError(f"{path} does not have a {missing}.", fix=fix)
        sizes = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        return ImageTable(column=name, has_paths=_has_paths(path, schema.field(name)), group_sizes=sizes)


def _has_paths(path: Path, field: Any) -> bool:  # noqa: ANN401 - PyArrow is not typed
    kind = field.type
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        return True
    if pyarrow.types.is_struct(kind) and "bytes" in {kind.field(i).name for i in range(kind.num_fields)}:
        kind = kind.field("bytes").type
    if pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind):
        return False
    raise UsageError(
        f"The column {field.name!r} of {path} has values of type {field.type}, neither bytes nor paths.",
        fix="Name the column of the images:  --column NAME",
    )


def read_paths(path: Path, *, column: str) -> list[str]:
    """Return the paths in a column; a missing one is an empty text.

    Raises:
        SourceError: The file is damaged.
    """
    with _open(path) as file:
        try:
            return [text or "" for text in file.read(columns=[column]).column(column).to_pylist()]
        except (OSError, pyarrow.ArrowException) as error:
            raise _damaged(path, error) from error


def read_images(path: str, *, column: str, group: int, offset: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the images in rows of one row group; a missing image is empty.

    Args:
        path: The file.
        column: Column of the images.
        group: Number of the row group.
        offset: Number of the first row in the group.
        count: Number of rows.

    Raises:
        SourceError: The file is damaged, or has fewer rows than before.
    """
    with _open(Path(path)) as file:
        names = [name for name in NAME_COLUMNS if name in file.schema_arrow.names and name != column][:1]
        position = left = 0
        try:
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, row_groups=[group], columns=[column, *names]):
                rows = batch.slice(max(offset - position, 0)) if position + len(batch) > offset else batch.slice(0, 0)
                position += len(batch)
                for row in rows.slice(0, count - left).to_pylist():
                    left += 1
                    yield _image(row[column], row[names[0]] if names else None)
                if left == count:
                    return
        except (OSError, pyarrow.ArrowException) as error:
            raise _damaged(Path(path), error) from error
    raise SourceError(f"{path} has fewer rows than before: it was replaced.", fix="Start again with a new --output.")


def _image(value: Any, name: object) -> tuple[str, bytes]:  # noqa: ANN401 - a value of any column
    if isinstance(value, dict):  # the image type of Hugging Face datasets
        name, value = value.get("path") or name, value.get("bytes")
    return (name if isinstance(name, str) else ""), value or b""


def write_rows(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write detections of images, in the form of `Detections.to_dict`, one row per image.

    Raises:
        OSError: The file cannot be written.
    """
    rows = [_result_row(record) for record in records]
    table = pyarrow.Table.from_pylist(rows, schema=RESULT_SCHEMA)
    pyarrow.parquet.write_table(table, path, compression="zstd")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of `write_rows` in the form of `Detections.to_dict`.

    Raises:
        SourceError: The file is damaged.
    """
    with _open(path) as file:
        try:
            return [_record(row) for row in file.read().to_pylist()]
        except (OSError, KeyError, pyarrow.ArrowException) as error:
            raise _damaged(path, error) from error


def _result_row(record: dict[str, Any]) -> dict[str, Any]:
    height, width = record["image_hw"]
    found = record["detections"]
    return {
        "path": record["path"],
        "height": height,
        "width": width,
        "boxes": [one["box"] for one in found],
        "scores": [one["score"] for one in found],
        "class_ids": [one["class_id"] for one in found],
        "class_names": [one["class_name"] for one in found],
        "error": record.get("error"),
    }


def _record(row: dict[str, Any]) -> dict[str, Any]:
    columns = (row[name] for name in ("boxes", "scores", "class_ids", "class_names"))
    return {
        "path": row["path"],
        **({"error": row["error"]} if row["error"] else {}),
        "image_hw": [row["height"], row["width"]],
        "detections": [
            {"box": box, "score": score, "class_id": class_id, "class_name": name}
            for box, score, class_id, name in zip(*columns, strict=True)
        ],
    }


def _open(path: Path) -> Any:  # noqa: ANN401 - PyArrow is not typed
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> SourceError:
    reason = str(error).strip().partition("\n")[0]
    return SourceError(f"{path} cannot be read as a Parquet file: {reason}", fix=_FIX)
