"""YOLO dataset YAMLs: class names, the images of a split, and their labels or annotation file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from yolov7_deploy._serialization import short_repr
from yolov7_deploy.datasets.coco import annotate_images, match_classes, read_coco
from yolov7_deploy.datasets.label_cache import read_labels_cached
from yolov7_deploy.datasets.samples import (
    Dataset,
    Record,
    is_file,
    join_names,
    printable,
    short_reason,
    short_text,
)
from yolov7_deploy.datasets.yaml_file import read_yaml
from yolov7_deploy.datasets.yolo_labels import read_label_files
from yolov7_deploy.errors import DatasetError, MissingSplitError
from yolov7_deploy.image import IMAGE_SUFFIXES
from yolov7_deploy.sources.files import list_folder, locate, path_exists, read_list, summarize_left_out

SPLITS = ("train", "val", "test")
OTHER_KEYS = {"val": ("valid", "validation", "dev")}  # by which other programs call a split
NAME_FILES = (".txt", ".names")
PATH_FIX = "Write paths with / or in single quotes."
MAX_CLASSES = 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitImages:
    """The images of a split.

    Attributes:
        paths: Sorted, each once.
        problems: What was left out or does not exist, one message each.
        are_complete: These are all images of their folders; a text list may name only some.
    """

    paths: tuple[Path, ...]
    problems: tuple[str, ...]
    are_complete: bool = False


def open_yaml(path: Path, *, split: str, limit: int | None, cache: bool = False) -> Dataset:
    """Open one split; boxes come from the COCO file under `annotations` if there is one, or from label files.

    With `cache`, unchanged label files are not read again; a COCO file is always read.

    Raises:
        DatasetError: The YAML, its lists or its labels are malformed, or images are missing.
    """
    config = _read_yaml(path)
    root = path.parent / _as_path_text(config.get("path") or ".", path)
    names = _names(config, root, path)
    images = _find_images(config, split, root, path)
    annotations = config.get("annotations")
    # A single annotation file belongs to val; files for several splits are a mapping.
    entry = annotations.get(split) if isinstance(annotations, dict) else annotations if split == "val" else None
    if entry is None:
        return _open_labels(images, names, source=path.name, limit=limit, cache=cache)
    source = _locate(_as_path_text(entry, path), root, path)
    document = read_coco(source)
    class_names, category_ids = match_classes(document, names, source=source)
    pairs = _match_entries(images.paths, document["images"], source)
    unused = len(document["images"]) - len(pairs)
    not_used = (f"{unused} of {len(document['images'])} images of {source.name} are not in {split} of {path.name}",)
    annotated = annotate_images(pairs[:limit], document, category_ids, source=source)
    return Dataset(
        annotated.records,
        source=path.name,
        class_names=class_names,
        category_ids=category_ids,
        problems=(*(not_used if unused else ()), *images.problems, *annotated.problems),
        left_out=images.problems,
        coverage=annotated.coverage(),
    )


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        config = read_yaml(path, texts=("names",))
    except UnicodeError as error:
        raise DatasetError(f"{path} is not UTF-8 text: {short_reason(error)}.", fix="Save it as UTF-8.") from error
    except (OSError, ValueError) as error:
        fix = PATH_FIX if "escape character" in str(error) else "Correct the file."
        raise DatasetError(f"{path} cannot be read as YAML: {short_reason(error)}.", fix=fix) from error
    if not isinstance(config, dict):
        raise DatasetError(f"{path} is not a dataset YAML.", fix="A dataset YAML has `names`, and `val` or `train`.")
    return config


def _names(config: Mapping[str, Any], root: Path, path: Path) -> tuple[str, ...]:
    """Return the class names of any form: a list, `0: cat` lines, `cat, dog`, or a file with a name per line."""
    count, names = _class_count(config, path), config.get("names")
    if isinstance(names, str):
        names = _split_names(names.strip(), count, root, path)
    if isinstance(names, dict):
        names = _in_class_order(names, path)
    if names is None and count is not None:
        names = [f"class_{i}" for i in range(count)]
    if not isinstance(names, list) or not names:
        raise DatasetError(f"{path} has no names.", fix='Add for example:  names: ["cat", "dog"]')
    if count not in (None, len(names)):
        raise DatasetError(f"{path} has nc: {count} but {len(names)} names.", fix="Make them match.")
    wrong = [name for name in names if not isinstance(name, str) or not name.strip()]
    if wrong:
        raise DatasetError(f"{path}: {short_repr(wrong[0])} in names is not a name.", fix='names: ["cat", "dog"]')
    texts = tuple(printable(name.strip()) for name in names)
    repeated = [name for name, count in Counter(texts).items() if count > 1]
    if repeated:
        raise DatasetError(
            f"{path}: names has {join_names(repeated)} more than once.", fix="Give every class a different name."
        )
    return texts


def _class_count(config: Mapping[str, Any], path: Path) -> int | None:
    value = config.get("nc")
    if value is None:
        return None
    text = str(value).strip().removesuffix(".0")
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= MAX_CLASSES):
        raise DatasetError(
            f"{path} has nc: {short_repr(value)}.", fix=f"nc is the number of classes, 1 to {MAX_CLASSES}."
        )
    return int(text)


def _split_names(text: str, count: int | None, root: Path, path: Path) -> list[str]:
    if text.lower().endswith(NAME_FILES):
        try:
            return [name for _, name in read_list(_locate(text, root, path))]
        except (OSError, ValueError) as error:
            raise DatasetError(
                f"{short_text(text)}, the names of {path}, cannot be read: {short_reason(error)}.",
                fix="Write one name per line.",
            ) from error
    if count == 1:
        return [text]
    return [part for part in text.replace(",", "\n").splitlines() if part.strip()]


def _in_class_order(names: Mapping[str, str], path: Path) -> list[str]:
    """Return the names of a mapping by class id, `0: cat`, or from the names, `cat: 0`."""
    numbers = {str(number) for number in range(len(names))}
    for by_id in (names, {name: key for key, name in names.items() if isinstance(name, str)}):
        if set(by_id) == numbers:
            return [by_id[str(number)] for number in range(len(names))]
    raise DatasetError(
        f"{path}: names are numbered {join_names(names)}, and not from 0 to {len(names) - 1}.",
        fix=f"Number them from 0 to {len(names) - 1}, as the label files do.",
    )


def _split_fix(config: Mapping[str, Any], split: str) -> str:
    other = next((key for key in OTHER_KEYS.get(split, ()) if config.get(key)), None)
    if other is not None:
        return f"Rename `{other}` to `{split}`."
    if split in SPLITS:
        return f"Add for example:  {split}: images"
    meant = next((name for name, others in OTHER_KEYS.items() if split in others), SPLITS[0])
    return f"For example:  --split {meant}"


def _find_images(config: Mapping[str, Any], split: str, root: Path, path: Path) -> SplitImages:
    entries = config.get(split)
    if not entries:
        available = ", ".join(key for key in SPLITS if config.get(key)) or f"none of {', '.join(SPLITS)}"
        missing = f"{split} images" if split in SPLITS else f"split {split!r}"
        raise MissingSplitError(f"{path} has no {missing} (it has {available}).", fix=_split_fix(config, split))
    found: list[Path] = []
    problems: list[str] = []
    are_complete = True
    for entry in entries if isinstance(entries, list) else [entries]:
        location = _locate(_as_path_text(entry, path), root, path)
        part = _images_in_folder(location) if location.is_dir() else _images_in_list(location, root)
        found += part.paths
        problems += part.problems
        are_complete &= part.are_complete
    images = _without_repetitions(found)
    if not any(is_file(image) for image in images):
        example = f" (the first is {short_text(str(images[0]))})" if images else ""
        message = f"{path}: none of the {len(images)} images of {split}: {short_text(entries)} exists{example}."
        raise DatasetError("\n".join((message, *problems)), fix="Correct the list, or `path` in the YAML.")
    if len(images) < len(found):
        problems.append(f"{len(found) - len(images)} images of {split} are named more than once; each is used once")
    if locate(str(root), [Path()]) is None:
        place = f"{split} is in {short_text(images[0].parent)}"
        problems.insert(0, f"the path of {path.name} does not exist ({short_text(root)}); {place}")
    return SplitImages(paths=images, problems=tuple(problems), are_complete=are_complete)


def _without_repetitions(images: Sequence[Path]) -> tuple[Path, ...]:
    """Return the images sorted; one that is reached by two paths, such as `a/../b` and `b`, once."""
    real_folders = {folder: _real_path(folder) for folder in dict.fromkeys(image.parent for image in images)}
    unique = {(real_folders[image.parent], image.name): image for image in sorted(images, reverse=True)}
    return tuple(sorted(unique.values()))


def _real_path(folder: Path) -> Path:
    try:
        return Path(os.path.realpath(folder))
    except (OSError, ValueError):  # a name that no file can have
        return folder


def _as_path_text(value: object, path: Path) -> str:
    """Return an entry that names a file or folder as text."""
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise DatasetError(
            f"{path}: {short_repr(value)} is not a path.", fix="Give the path of a folder, list or file."
        )
    return str(value)


def _locate(entry: str, root: Path, path: Path) -> Path:
    """Find an entry of the YAML: under `path`, next to the YAML or, as officially, in the working directory.

    Roboflow writes `../train/images` for the folder `train` next to the YAML, and `NAME-1/train/images` for that of a
    YAML in the folder `NAME-1`.
    """
    inside, folder = entry.replace("\\", "/").removeprefix("../"), path.absolute().parent
    places = ((root, entry), (folder, entry), (folder, inside), (folder.parent, entry), (Path.cwd(), entry))
    for place, text in places:
        found = locate(text, [place])
        if found is not None:
            return found
    tried = dict.fromkeys((root / entry, path.parent / entry, Path.cwd() / entry))
    raise DatasetError(
        f"{path} names {short_text(entry)}, which does not exist; looked for {', '.join(map(short_text, tried))}.",
        fix=_suggest_path(entry, folder),
    )


def _suggest_path(entry: str, folder: Path) -> str:
    """Return what to write instead: the end of the entry if it exists next to the YAML, as after a move."""
    if not entry.isprintable():  # YAML reads "images\\val" as a vertical tab
        return PATH_FIX
    parts = [part for part in entry.replace("\\", "/").split("/") if part.strip(".")]
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    end = next((end for end in ends if path_exists(folder / end)), None)
    if end is None:
        return "Correct the entry, or `path` in the YAML."
    return f"{short_text(folder / end)} exists: write  {short_text(end)}  in the YAML."


def _images_in_folder(folder: Path) -> SplitImages:
    found = list_folder(folder, suffixes=IMAGE_SUFFIXES, recursive=True)
    if not found.left_out:
        return SplitImages(paths=found.files, problems=(), are_complete=True)
    left_out = f"left out of {short_text(folder)}: {summarize_left_out(found.left_out, folder=folder)}"
    return SplitImages(paths=found.files, problems=(left_out,), are_complete=True)


def _images_in_list(listing: Path, root: Path) -> SplitImages:
    """Return the images of a text list and of folders in it.

    Entries are relative to the list, the dataset root or the working directory.
    """
    try:
        entries = read_list(listing)
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{listing} is not a text list of images: {short_reason(error)}.", fix="Write one path per line."
        ) from error
    folders = (listing.parent, root, Path.cwd())
    paths: list[Path] = []
    absent: list[str] = []
    problems: list[str] = []
    for _, entry in entries:
        path = locate(entry, folders)
        if path is None:
            absent.append(entry)
        if path is not None and path.is_dir():
            part = _images_in_folder(path)
            paths += part.paths
            problems += part.problems
        else:
            paths.append(path or root / entry)
    if absent:
        problems.insert(0, f"{len(absent)} images of {listing.name} do not exist; the first is {short_text(absent[0])}")
    return SplitImages(paths=tuple(paths), problems=tuple(problems))


def _match_entries(
    images: Sequence[Path], entries: Sequence[Mapping[str, Any]], source: Path
) -> list[tuple[Path, Mapping[str, Any]]]:
    """Pair each image with its entry by file name; folders decide between files with the same name."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        by_name.setdefault(PureWindowsPath(entry["file_name"]).name, []).append(entry)
    pairs = []
    for image in images:
        candidates = by_name.get(image.name, [])
        if len(candidates) > 1:
            ends = [f"/{PureWindowsPath(entry['file_name']).as_posix()}" for entry in candidates]
            candidates = [e for e, end in zip(candidates, ends, strict=True) if image.as_posix().endswith(end)]
        if len(candidates) != 1:
            raise DatasetError(
                f"{short_text(str(image))} is {'not' if not candidates else 'more than once'} in {source}.",
                fix="Use the annotation file of these images, or leave `annotations` out of the YAML.",
            )
        pairs.append((image, candidates[0]))
    return pairs


def _open_labels(
    images: SplitImages, names: tuple[str, ...], *, source: str, limit: int | None, cache: bool
) -> Dataset:
    numbers = [int(image.stem) if image.stem.isdecimal() else -1 for image in images.paths]
    # As in the official program, the number in the file name is the id; this needs a different number in every name.
    ids_in_names = min(numbers) >= 0 and len(set(numbers)) == len(numbers)
    selected = images.paths[:limit]
    sizes: Sequence[tuple[int, int] | None]
    are_complete = images.are_complete and len(selected) == len(images.paths)
    if cache:
        found, sizes = read_labels_cached(selected, classes=len(names), are_complete=are_complete)
    else:
        found = read_label_files(selected, classes=len(names), are_complete=are_complete)
        sizes = [None] * len(selected)
    records = [
        Record(path=selected[i], image_id=numbers[i] if ids_in_names else i, image_hw=sizes[i], labels=labels)
        for i, labels in enumerate(found.labels)
    ]
    return Dataset(
        records,
        source=source,
        class_names=names,
        category_ids=tuple(range(len(names))),
        problems=(*images.problems, *found.problems),
        left_out=images.problems,
        coverage=found.coverage(),
    )
