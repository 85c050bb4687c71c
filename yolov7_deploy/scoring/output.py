"""The output folder of `y7 score`: one file per shard of the input, each complete or absent, so that a run can resume.

score.json          the settings of the run, written first
part-00000.jsonl    the detections of the first shard, one JSON object per image, in the order of the input
summary.json        counts, unreadable images and speed, written last
coco_results.json   on request: the detections of all images as one list, for programs that compute COCO AP
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from yolov7_deploy._atomic_file import atomic_write, is_partial_file
from yolov7_deploy._bounded_read import read_text
from yolov7_deploy._console import plural, write_json, write_text
from yolov7_deploy._output_folder import LOCK_NAME
from yolov7_deploy._serialization import parse_json
from yolov7_deploy._text import printable_line
from yolov7_deploy.datasets.coco import read_coco
from yolov7_deploy.datasets.samples import CocoId
from yolov7_deploy.errors import SourceError, UsageError

SETTINGS, SUMMARY, COCO_RESULTS = "score.json", "summary.json", "coco_results.json"
FORMATS = ("jsonl", "parquet")
SCHEMA = 1
_MAX_SETTINGS_BYTES = 2**20
_ANOTHER = "Choose another folder:  --output DIR"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shards:
    """The division of the input into output files.

    Attributes:
        folder: The output folder.
        images: Number of images.
        size: Number of images in each file; the last one may have fewer.
        format: `jsonl` or `parquet`.
    """

    folder: Path
    images: int
    size: int
    format: str

    def __len__(self) -> int:
        return -(-self.images // self.size)

    def path(self, shard: int) -> Path:
        """Return the file of a shard."""
        return self.folder / f"part-{shard:05d}.{self.format}"

    def numbers(self, shard: int) -> range:
        """Return the numbers of its images in the input."""
        return range(shard * self.size, min((shard + 1) * self.size, self.images))

    def missing(self) -> list[int]:
        """Return the shards without a file."""
        return [shard for shard in range(len(self)) if not self.path(shard).is_file()]

    def read(self, shard: int) -> Iterator[dict[str, Any]]:
        """Yield the records of a finished shard, in the form of `Detections.to_dict`.

        Raises:
            SourceError: The file is damaged or incomplete.
        """
        path, count = self.path(shard), 0
        for record in _read_records(path):
            count += 1
            yield record
        if count != len(self.numbers(shard)):
            raise _damaged(path, f"it has {plural(count, 'image')} instead of {len(self.numbers(shard)):,}")


class ShardWriter:
    """Collects the records of images in any order, and writes each shard when it is complete.

    Args:
        shards: The division into files.

    Attributes:
        written: Numbers of the shards that were written.
    """

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._collected: defaultdict[int, dict[int, str]] = defaultdict(dict)
        self.written: set[int] = set()

    def add(self, number: int, record: str) -> None:
        """Add the record of an image, one line of JSON; adding an image again changes nothing.

        Raises:
            UsageError: A complete shard cannot be written.
        """
        shard = number // self._shards.size
        if shard in self.written:
            return
        collected = self._collected[shard]
        collected[number] = record
        if len(collected) == len(self._shards.numbers(shard)):
            self._write(shard, [collected[number] for number in sorted(collected)])
            del self._collected[shard]
            self.written.add(shard)

    def _write(self, shard: int, records: Sequence[str]) -> None:
        path = self._shards.path(shard)
        if self._shards.format == "jsonl":
            write_text(path, "".join(f"{record}\n" for record in records))
            return
        from yolov7_deploy.scoring.parquet import write_rows

        try:
            with atomic_write(path) as temporary:
                write_rows(temporary, [json.loads(record) for record in records])
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror or error}.", fix=_ANOTHER) from error


def create_output(folder: Path) -> None:
    """Create the output folder.

    Raises:
        UsageError: It cannot be written, or has files of others.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = [entry for entry in folder.iterdir() if entry.name != LOCK_NAME and not is_partial_file(entry)]
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror or error}.", fix=_ANOTHER) from error
    if others and not (folder / SETTINGS).is_file():
        raise UsageError(
            f"{folder} is not empty, and y7 score did not write it: it has {printable_line(others[0].name)} and no "
            f"{SETTINGS}.",
            fix=_ANOTHER,
        )
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{folder} cannot be written: it is read-only.", fix=_ANOTHER)


def open_output(folder: Path, *, settings: Mapping[str, Any]) -> None:
    """Write the settings of a run into a new output folder, or compare them with those of the earlier run.

    Args:
        folder: The folder, see `create_output`.
        settings: Everything that the results depend on, as plain data.

    Raises:
        UsageError: The folder has results of a run with other settings, or cannot be written.
    """
    document = {"schema": SCHEMA, **settings}
    path = folder / SETTINGS
    if path.is_file():
        _check_settings(path, document)
    else:
        write_json(document, path)


def _check_settings(path: Path, document: Mapping[str, Any]) -> None:
    try:
        old = parse_json(read_text(path, max_bytes=_MAX_SETTINGS_BYTES))
        if not isinstance(old, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}.", fix=_ANOTHER) from error
    new = json.loads(json.dumps(document))
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if changed:
        listed = ", ".join(f"{name} was {old.get(name)} and is {new.get(name)}" for name in changed[:3])
        raise UsageError(
            f"{path.parent} has results of a run with other settings: {printable_line(listed)}.",
            fix=f"Repeat that run with its settings to resume it. {_ANOTHER}",
        )


def _read_records(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        from yolov7_deploy.scoring.parquet import read_rows

        yield from read_rows(path)
        return
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                record = parse_json(line)
                if not isinstance(record, dict) or "detections" not in record or "path" not in record:
                    raise ValueError("a line is not the record of an image")
                yield record
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, reason: str) -> SourceError:
    return SourceError(
        f"{path} is damaged: {printable_line(reason)}.", fix=f"Remove it, and run the same command again:  rm {path}"
    )


# --- COCO results -----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class CocoIds:
    """The ids of images and categories in a COCO annotation file.

    Attributes:
        images: Paths and ids of the images of each file name.
        categories: Ids by class name in lower case.
        unknown_images: Names of images that the file does not list, or lists more than once.
        unknown_classes: Class names that it does not have.
    """

    images: Mapping[str, list[tuple[str, CocoId]]]
    categories: Mapping[str, CocoId]
    unknown_images: list[str] = field(default_factory=list)
    unknown_classes: set[str] = field(default_factory=set)

    def image(self, name: str) -> CocoId | None:
        """Return the id of an image by its file name; folders decide between files with the same name."""
        path = PureWindowsPath(name)
        found = self.images.get(path.name, [])
        if len(found) > 1:
            found = [one for one in found if f"/{path.as_posix()}".endswith(f"/{one[0]}")]
        if len(found) == 1:
            return found[0][1]
        self.unknown_images.append(name)
        return None

    def category(self, name: str) -> CocoId | None:
        """Return the id of a class."""
        found = self.categories.get(_key(name))
        if found is None:
            self.unknown_classes.add(name)
        return found


def read_ids(annotations: Path) -> CocoIds:
    """Return the ids in an annotation file.

    Raises:
        DatasetError: It is not a COCO annotation file.
    """
    document = read_coco(annotations)
    images = defaultdict[str, list[tuple[str, CocoId]]](list)
    for image in document["images"]:
        path = PureWindowsPath(image["file_name"])
        images[path.name].append((path.as_posix(), image["id"]))
    return CocoIds(images=images, categories={_key(one["name"]): one["id"] for one in document["categories"]})


def write_coco(records: Iterable[dict[str, Any]], path: Path, *, ids: CocoIds) -> int:
    """Write the detections of all images as COCO results, and return their number.

    Images and classes without an id are left out, and collected in `ids`.

    Args:
        records: Images in the form of `Detections.to_dict`.
        path: The file.
        ids: The ids in the annotation file.

    Raises:
        UsageError: The file cannot be written.
    """
    count = 0
    try:
        with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.write("[")
            for record in records:
                for row in _rows(record, ids):
                    file.write(f"{',' if count else ''}\n{json.dumps(row)}")
                    count += 1
            file.write("\n]\n")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}.", fix="Free some space.") from error
    return count


def _rows(record: Mapping[str, Any], ids: CocoIds) -> list[dict[str, Any]]:
    """Return the detections of an image, rounded as by `Detections.to_coco`."""
    image_id = None if record.get("error") else ids.image(record["path"])
    if image_id is None:
        return []
    rows = []
    for one in record["detections"]:
        category = ids.category(one["class_name"])
        box = np.asarray(one["box"], dtype=np.float32)
        box[2:] -= box[:2]
        if category is not None:
            score = float(np.float32(one["score"]).astype(np.float64).round(5))
            bbox = box.astype(np.float64).round(3).tolist()
            rows.append({"image_id": image_id, "category_id": category, "bbox": bbox, "score": score})
    return rows


def _key(name: str) -> str:
    return name.strip().casefold()
