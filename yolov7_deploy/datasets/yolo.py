"""YOLO dataset YAMLs: which images a split has, and what judges them."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from yolov7_deploy.datasets._text import exists, is_file, printable, reason, short, shown, some
from yolov7_deploy.datasets.coco import coco_records, match_classes, read_coco
from yolov7_deploy.datasets.label_cache import read_labels_cached
from yolov7_deploy.datasets.samples import Dataset, Record
from yolov7_deploy.datasets.yolo_labels import read_label_files
from yolov7_deploy.errors import DatasetError
from yolov7_deploy.image import IMAGE_SUFFIXES

SPLITS = ("train", "val", "test")
MAX_CLASSES = 100_000
MAX_NODES = 1_000_000  # of a YAML with its aliases written out


def open_yaml(path: Path, *, split: str, limit: int | None, cache: bool = False) -> Dataset:
    """The samples of one split; boxes from the COCO file under `annotations` where there is one, else from labels.

    With `cache` label files that have not changed are not read again; a COCO file is one file and always read.

    Raises:
        DatasetError: The YAML, its lists or its labels are malformed, or images are missing.
    """
    config = _read_yaml(path)
    names = _names(config, path)
    root = path.parent / _text(config.get("path") or ".", path)
    images = _images(config, split, root, path)
    annotations = config.get("annotations")
    # A single annotation file is the ground truth of val: a file for every split would be a mapping.
    judge = annotations.get(split) if isinstance(annotations, dict) else annotations if split == "val" else None
    if judge is None:
        return _open_labels(images, names, source=path.name, limit=limit, cache=cache)
    source = _located(_text(judge, path), root, path)
    document = read_coco(source)
    class_names, category_ids = match_classes(document, names, source=source)
    pairs = _matched(images[:limit], document["images"], source)
    records = coco_records(pairs, document, category_ids, source=source)
    return Dataset(records, source=path.name, class_names=class_names, category_ids=category_ids)


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        _count_nodes(yaml.compose(text, yaml.SafeLoader))
        config = yaml.safe_load(text)
    except RecursionError as error:
        raise DatasetError(f"{path} is nested deeper than any dataset YAML.", fix="Correct the file.") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DatasetError(
            f"{path} cannot be read as YAML: {reason(error)}.", fix="Correct the line it names."
        ) from error
    if not isinstance(config, dict):
        raise DatasetError(f"{path} is not a dataset YAML.", fix="It needs names, and val or train.")
    return config


def _count_nodes(root: yaml.Node | None) -> int:
    """The size of a document with every alias written out, so that a few lines cannot become gigabytes.

    Raises:
        ValueError: It is larger than any dataset YAML, or contains itself.
    """
    counts: dict[int, int] = {}
    under_way: set[int] = set()

    def count(node: yaml.Node) -> int:
        if id(node) in under_way:
            raise ValueError("an alias contains itself")
        if id(node) not in counts:
            under_way.add(id(node))
            children = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
            counts[id(node)] = 1 + sum(map(count, parts))
            under_way.remove(id(node))
        if counts[id(node)] > MAX_NODES:
            raise ValueError(f"its aliases make more than {MAX_NODES} entries of it")
        return counts[id(node)]

    return count(root) if root is not None else 0


def _names(config: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    names, count = config.get("names"), config.get("nc")
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise DatasetError(f"{path}: the keys of names are not 0..{len(names) - 1}.", fix="Number classes from 0.")
        names = [names[i] for i in range(len(names))]
    if isinstance(count, int) and not 1 <= count <= MAX_CLASSES:
        raise DatasetError(f"{path} says nc: {shown(count)}.", fix="nc is the number of classes.")
    if names is None and isinstance(count, int):
        names = [f"class_{i}" for i in range(count)]
    if not isinstance(names, list) or not names:
        raise DatasetError(f"{path} has no names.", fix='Add for example:  names: ["cat", "dog"]')
    if count is not None and count != len(names):
        raise DatasetError(f"{path} says nc: {shown(count)} but has {len(names)} names.", fix="Make them agree.")
    wrong = [name for name in names if not isinstance(name, (str, int, float, datetime.date))]
    if wrong:
        raise DatasetError(f"{path}: {shown(wrong[0])} of names is no text.", fix='Quote it:  names: ["cat", "yes"]')
    texts = tuple(printable(str(name)) for name in names)
    twice = [name for name, times in Counter(texts).items() if times > 1]
    if twice:
        raise DatasetError(f"{path}: names has {some(twice)} more than once.", fix="Give each class a name of its own.")
    return texts


def _images(config: Mapping[str, Any], split: str, root: Path, path: Path) -> list[Path]:
    entries = config.get(split)
    if not entries:
        have = ", ".join(key for key in SPLITS if config.get(key)) or f"none of {', '.join(SPLITS)}"
        raise DatasetError(f"{path} has no {split} images (it has {have}).", fix=f"Add for example:  {split}: images")
    found: list[Path] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        place = _located(_text(entry, path), root, path)
        found += _in_folder(place) if place.is_dir() else _in_list(place, root)
    images = sorted(dict.fromkeys(found))
    if not any(is_file(image) for image in images):
        example = f" (the first is {short(str(images[0]))})" if images else ""
        raise DatasetError(
            f"{path}: none of the {len(images)} images of {split}: {shown(entries)} exists{example}.",
            fix="Correct the list, or `path` in the YAML.",
        )
    return images


def _text(value: object, path: Path) -> str:
    """An entry that names a file or folder."""
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise DatasetError(f"{path}: {shown(value)} is no path.", fix="Paths are text: of a folder, list or file.")
    return str(value)


def _located(entry: str, root: Path, path: Path) -> Path:
    """Where an entry of the YAML is: under `path`, beside the YAML, or as the official program has it, here."""
    tried = list(dict.fromkeys((root / entry, path.parent / entry, Path(entry).absolute())))
    for place in tried:
        if exists(place):
            return place
    raise DatasetError(
        f"{path} names {short(entry)}, which does not exist; looked for {', '.join(map(short, map(str, tried)))}.",
        fix="Correct the entry, or `path` in the YAML.",
    )


def _in_folder(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES]


def _in_list(listing: Path, root: Path) -> Iterator[Path]:
    """The images of a text list; relative entries belong to the list's folder, else to the dataset's root."""
    try:
        if not listing.is_file():
            raise ValueError("it is no file")  # a device or pipe would be read for ever
        lines = listing.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{listing} is not a text list of images: {reason(error)}.", fix="One path a line."
        ) from error
    for entry in filter(None, map(str.strip, lines)):
        beside = listing.parent / entry
        yield beside if entry.startswith("./") or exists(beside) else root / entry


def _matched(
    images: Sequence[Path], entries_in_file: Sequence[Mapping[str, Any]], source: Path
) -> list[tuple[Path, Mapping[str, Any]]]:
    """Each image with its entry, by file name; folders only decide between files of one name."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries_in_file:
        by_name.setdefault(Path(entry["file_name"]).name, []).append(entry)
    pairs = []
    for image in images:
        candidates = by_name.get(image.name, [])
        if len(candidates) > 1:
            candidates = [entry for entry in candidates if image.as_posix().endswith(f"/{entry['file_name']}")]
        if len(candidates) != 1:
            raise DatasetError(
                f"{short(str(image))} is {'not' if not candidates else 'more than once'} in {source}.",
                fix="Use the annotation file of these images, or leave `annotations` out of the YAML.",
            )
        pairs.append((image, candidates[0]))
    return pairs


def _open_labels(
    images: Sequence[Path], names: tuple[str, ...], *, source: str, limit: int | None, cache: bool
) -> Dataset:
    numbers = [int(image.stem) if image.stem.isdecimal() else -1 for image in images]
    # The official program takes the number in the file name; that works only if every name has its own.
    named_by_number = min(numbers) >= 0 and len(set(numbers)) == len(numbers)
    chosen = images[:limit]
    sizes: Sequence[tuple[int, int] | None]
    if cache:
        labels, sizes, problems = read_labels_cached(chosen, classes=len(names))
    else:
        (labels, problems), sizes = read_label_files(chosen, classes=len(names)), [None] * len(chosen)
    records = [
        Record(path=chosen[i], image_id=numbers[i] if named_by_number else i, image_hw=sizes[i], labels=labels[i])
        for i in range(len(chosen))
    ]
    return Dataset(
        records, source=source, class_names=names, category_ids=tuple(range(len(names))), problems=tuple(problems)
    )
