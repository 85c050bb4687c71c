"""Select some classes of a dataset, or merge all of them into one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from yolov7_deploy.datasets.samples import Dataset, IntArray, Record, join_names
from yolov7_deploy.errors import DatasetError

SINGLE_CLASS_NAME = "object"
REMOVED = -1


def select_classes(dataset: Dataset, names_or_ids: Sequence[str | int]) -> Dataset:
    """Return the same images with the boxes of some classes only, renumbered from 0 in the given order.

    Images without a box of these classes remain, as background.

    Args:
        dataset: The dataset, which is not changed.
        names_or_ids: Class names, or class ids (also as text, unless a class has that name).

    Raises:
        DatasetError: No class is given, one is given twice, or one is not in the dataset.
    """
    ids = [_class_id(dataset, name_or_id) for name_or_id in names_or_ids]
    if not ids or len(set(ids)) < len(ids):
        repeated = join_names(dataset.class_names[i] for i in dict.fromkeys(ids) if ids.count(i) > 1)
        raise DatasetError(
            f"Class {repeated} is selected more than once." if ids else "No class is selected.",
            fix=f"Name each class once, of {join_names(dataset.class_names)}",
        )
    new_ids = np.full(len(dataset.class_names), REMOVED, dtype=np.int64)
    new_ids[ids] = np.arange(len(ids))
    return _renumber(
        dataset,
        new_ids,
        class_names=tuple(dataset.class_names[i] for i in ids),
        category_ids=tuple(dataset.category_ids[i] for i in ids),
    )


def as_single_class(dataset: Dataset) -> Dataset:
    """Return the same images and boxes with a single class, `object`; a dataset with one class keeps its name."""
    return _renumber(
        dataset,
        np.zeros(len(dataset.class_names), dtype=np.int64),
        class_names=dataset.class_names if len(dataset.class_names) == 1 else (SINGLE_CLASS_NAME,),
        category_ids=dataset.category_ids[:1],
    )


def _class_id(dataset: Dataset, name_or_id: str | int) -> int:
    if name_or_id in dataset.class_names:
        return dataset.class_names.index(str(name_or_id))
    text = str(name_or_id).strip()
    if text.isdecimal() and int(text) < len(dataset.class_names):
        return int(text)
    raise DatasetError(
        f"{dataset.source} does not have class {name_or_id!r:.100}; it has {join_names(dataset.class_names)}.",
        fix=f"Use a name, or a number from 0 to {len(dataset.class_names) - 1}.",
    )


def _renumber(
    dataset: Dataset, new_ids: IntArray, *, class_names: tuple[str, ...], category_ids: tuple[int, ...]
) -> Dataset:
    """Return the dataset with class ids mapped by `new_ids`, int64 [C]; boxes that become `REMOVED` are dropped."""
    return Dataset(
        [_renumber_record(dataset.record(i), new_ids) for i in range(len(dataset))],
        source=dataset.source,
        class_names=class_names,
        category_ids=category_ids,
        problems=dataset.problems,
        coverage=dataset.coverage,
    )


def _renumber_record(record: Record, new_ids: IntArray) -> Record:
    class_ids = new_ids[record.labels.class_ids]
    keep = class_ids != REMOVED
    return replace(
        record,
        areas=None if record.areas is None else record.areas[keep],
        labels=replace(record.labels.select(keep), class_ids=class_ids[keep]),
    )
