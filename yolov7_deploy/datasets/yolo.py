"""YOLO dataset YAMLs: class names, the images of a split, and their labels or annotation file."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from yolov7_deploy._serialization import short_repr
from yolov7_deploy.datasets.coco import coco_records, match_classes, read_coco
from yolov7_deploy.datasets.label_cache import read_labels_cached
from yolov7_deploy.datasets.samples import (
    Dataset,
    Record,
    is_file,
    join_names,
    path_exists,
    printable,
    short_text,
)
from yolov7_deploy.datasets.yolo_labels import read_label_files
from yolov7_deploy.errors import DatasetError
from yolov7_deploy.image import IMAGE_SUFFIXES

SPLITS = ("train", "val", "test")
MAX_CLASSES = 100_000
MAX_NODES = 1_000_000  # of a YAML with its aliases expanded


def open_yaml(path: Path, *, split: str, limit: int | None, cache: bool = False) -> Dataset:
    """Open one split; boxes come from the COCO file under `annotations` if there is one, or from label files.

    With `cache`, unchanged label files are not read again; a COCO file is always read.

    Raises:
        DatasetError: The YAML, its lists or its labels are malformed, or images are missing.
    """
    config = _read_yaml(path)
    names = _names(config, path)
    root = path.parent / _as_path_text(config.get("path") or ".", path)
    images = _images(config, split, root, path)
    annotations = config.get("annotations")
    # A single annotation file belongs to val; files for several splits are a mapping.
    entry = annotations.get(split) if isinstance(annotations, dict) else annotations if split == "val" else None
    if entry is None:
        return _open_labels(images, names, source=path.name, limit=limit, cache=cache)
    source = _locate(_as_path_text(entry, path), root, path)
    document = read_coco(source)
    class_names, category_ids = match_classes(document, names, source=source)
    pairs = _match_entries(images[:limit], document["images"], source)
    records = coco_records(pairs, document, category_ids, source=source)
    return Dataset(records, source=path.name, class_names=class_names, category_ids=category_ids)


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        _count_nodes(yaml.compose(text, yaml.SafeLoader))
        config = yaml.safe_load(text)
    except RecursionError as error:
        raise DatasetError(f"{path} is nested too deeply for a dataset YAML.", fix="Correct the file.") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DatasetError(
            f"{path} cannot be read as YAML: {short_text(error)}.", fix="Correct the line named above."
        ) from error
    if not isinstance(config, dict):
        raise DatasetError(f"{path} is not a dataset YAML.", fix="A dataset YAML has `names`, and `val` or `train`.")
    return config


def _count_nodes(root: yaml.Node | None) -> int:
    """Return the size of a document with all aliases expanded, so that a few lines cannot become gigabytes.

    Raises:
        ValueError: The document is too large for a dataset YAML, or contains itself.
    """
    counts: dict[int, int] = {}
    being_counted: set[int] = set()

    def count(node: yaml.Node) -> int:
        if id(node) in being_counted:
            raise ValueError("an alias contains itself")
        if id(node) not in counts:
            being_counted.add(id(node))
            children = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
            counts[id(node)] = 1 + sum(map(count, parts))
            being_counted.remove(id(node))
        if counts[id(node)] > MAX_NODES:
            raise ValueError(f"its aliases expand to more than {MAX_NODES} entries")
        return counts[id(node)]

    return count(root) if root is not None else 0


def _names(config: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    names, count = config.get("names"), config.get("nc")
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise DatasetError(f"{path}: the keys of names are not 0..{len(names) - 1}.", fix="Number classes from 0.")
        names = [names[i] for i in range(len(names))]
    if isinstance(count, int) and not 1 <= count <= MAX_CLASSES:
        raise DatasetError(
            f"{path} has nc: {short_repr(count)}.", fix=f"nc is the number of classes, 1 to {MAX_CLASSES}."
        )
    if names is None and isinstance(count, int):
        names = [f"class_{i}" for i in range(count)]
    if not isinstance(names, list) or not names:
        raise DatasetError(f"{path} has no names.", fix='Add for example:  names: ["cat", "dog"]')
    if count is not None and count != len(names):
        raise DatasetError(f"{path} has nc: {short_repr(count)} but {len(names)} names.", fix="Make them match.")
    wrong = [name for name in names if not isinstance(name, (str, int, float, datetime.date))]
    if wrong:
        raise DatasetError(
            f"{path}: {short_repr(wrong[0])} in names is not a string.", fix='Quote it:  names: ["cat", "yes"]'
        )
    texts = tuple(printable(str(name)) for name in names)
    repeated = [name for name, count in Counter(texts).items() if count > 1]
    if repeated:
        raise DatasetError(
            f"{path}: names has {join_names(repeated)} more than once.", fix="Give every class a different name."
        )
    return texts


def _images(config: Mapping[str, Any], split: str, root: Path, path: Path) -> list[Path]:
    entries = config.get(split)
    if not entries:
        available = ", ".join(key for key in SPLITS if config.get(key)) or f"none of {', '.join(SPLITS)}"
        raise DatasetError(
            f"{path} has no {split} images (it has {available}).", fix=f"Add for example:  {split}: images"
        )
    found: list[Path] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        location = _locate(_as_path_text(entry, path), root, path)
        found += _images_in_folder(location) if location.is_dir() else _images_in_list(location, root)
    images = sorted(dict.fromkeys(found))
    if not any(is_file(image) for image in images):
        example = f" (the first is {short_text(str(images[0]))})" if images else ""
        raise DatasetError(
            f"{path}: none of the {len(images)} images of {split}: {short_text(entries)} exists{example}.",
            fix="Correct the list, or `path` in the YAML.",
        )
    return images


def _as_path_text(value: object, path: Path) -> str:
    """Return an entry that names a file or folder as text."""
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise DatasetError(
            f"{path}: {short_repr(value)} is not a path.", fix="Give the path of a folder, list or file."
        )
    return str(value)


def _locate(entry: str, root: Path, path: Path) -> Path:
    """Find an entry of the YAML: under `path`, next to the YAML or, as officially, in the working directory."""
    tried = list(dict.fromkeys((root / entry, path.parent / entry, Path(entry).absolute())))
    for candidate in tried:
        if path_exists(candidate):
            return candidate
    raise DatasetError(
        f"{path} names {short_text(entry)}, which does not exist; looked for {', '.join(map(short_text, tried))}.",
        fix="Correct the entry, or `path` in the YAML.",
    )


def _images_in_folder(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES]


def _images_in_list(listing: Path, root: Path) -> Iterator[Path]:
    """Yield the images of a text list; relative entries are searched in the list's folder, then in the dataset root."""
    try:
        if not listing.is_file():
            raise ValueError("it is not a file")  # reading a device or pipe might never end
        lines = listing.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{listing} is not a text list of images: {short_text(error)}.", fix="Write one path per line."
        ) from error
    for entry in filter(None, map(str.strip, lines)):
        sibling = listing.parent / entry
        yield sibling if entry.startswith("./") or path_exists(sibling) else root / entry


def _match_entries(
    images: Sequence[Path], entries: Sequence[Mapping[str, Any]], source: Path
) -> list[tuple[Path, Mapping[str, Any]]]:
    """Pair each image with its entry by file name; folders decide between files with the same name."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        by_name.setdefault(Path(entry["file_name"]).name, []).append(entry)
    pairs = []
    for image in images:
        candidates = by_name.get(image.name, [])
        if len(candidates) > 1:
            candidates = [entry for entry in candidates if image.as_posix().endswith(f"/{entry['file_name']}")]
        if len(candidates) != 1:
            raise DatasetError(
                f"{short_text(str(image))} is {'not' if not candidates else 'more than once'} in {source}.",
                fix="Use the annotation file of these images, or leave `annotations` out of the YAML.",
            )
        pairs.append((image, candidates[0]))
    return pairs


def _open_labels(
    images: Sequence[Path], names: tuple[str, ...], *, source: str, limit: int | None, cache: bool
) -> Dataset:
    numbers = [int(image.stem) if image.stem.isdecimal() else -1 for image in images]
    # As in the official program, the number in the file name is the id; this needs a different number in every name.
    ids_in_names = min(numbers) >= 0 and len(set(numbers)) == len(numbers)
    selected = images[:limit]
    sizes: Sequence[tuple[int, int] | None]
    if cache:
        labels, sizes, problems = read_labels_cached(selected, classes=len(names))
    else:
        (labels, problems), sizes = read_label_files(selected, classes=len(names)), [None] * len(selected)
    records = [
        Record(path=selected[i], image_id=numbers[i] if ids_in_names else i, image_hw=sizes[i], labels=labels[i])
        for i in range(len(selected))
    ]
    return Dataset(
        records, source=source, class_names=names, category_ids=tuple(range(len(names))), problems=tuple(problems)
    )
