"""A dataset with some of its classes, or with all of them as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from yolov7_deploy.datasets._text import some
from yolov7_deploy.datasets.samples import Dataset, IntArray, Record
from yolov7_deploy.errors import DatasetError

SINGLE_NAME = "object"
LEFT_OUT = -1


def with_classes(dataset: Dataset, names_or_ids: Sequence[str | int]) -> Dataset:
    """The same images with boxes of the chosen classes only, numbered from 0 in the order given.

    Images that lose all of their boxes stay, as background.

    Args:
        dataset: Not changed.
        names_or_ids: Class names, or class ids (also as text, where no class is called so).

    Raises:
        DatasetError: None is chosen, one twice, or one is no class of the dataset.
    """
    ids = [_class_id(dataset, chosen) for chosen in names_or_ids]
    if not ids or len(set(ids)) < len(ids):
        twice = some(dataset.class_names[i] for i in dict.fromkeys(ids) if ids.count(i) > 1)
        raise DatasetError(
            f"Class {twice} is chosen more than once." if ids else "No class is chosen.",
            fix=f"Name each class once, of {some(dataset.class_names)}",
        )
    numbers = np.full(len(dataset.class_names), LEFT_OUT, dtype=np.int64)
    numbers[ids] = np.arange(len(ids))
    return _renumbered(
        dataset,
        lambda class_ids: numbers[class_ids],
        class_names=tuple(dataset.class_names[i] for i in ids),
        category_ids=tuple(dataset.category_ids[i] for i in ids),
    )


def as_single_class(dataset: Dataset) -> Dataset:
    """The same images and boxes, all of one class called `object`; a dataset of one class keeps its name."""
    return _renumbered(
        dataset,
        np.zeros_like,
        class_names=dataset.class_names if len(dataset.class_names) == 1 else (SINGLE_NAME,),
        category_ids=dataset.category_ids[:1],
    )


def _class_id(dataset: Dataset, chosen: str | int) -> int:
    if chosen in dataset.class_names:
        return dataset.class_names.index(str(chosen))
    text = str(chosen).strip()
    if text.isdecimal() and int(text) < len(dataset.class_names):
        return int(text)
    raise DatasetError(
        f"{dataset.source} has no class {chosen!r:.100}; it has {some(dataset.class_names)}.",
        fix=f"Choose by name, or by number 0..{len(dataset.class_names) - 1}.",
    )


def _renumbered(
    dataset: Dataset,
    number: Callable[[IntArray], IntArray],
    *,
    class_names: tuple[str, ...],
    category_ids: tuple[int, ...],
) -> Dataset:
    return Dataset(
        [_with_ids(dataset.record(i), number) for i in range(len(dataset))],
        source=dataset.source,
        class_names=class_names,
        category_ids=category_ids,
        problems=dataset.problems,
    )


def _with_ids(record: Record, number: Callable[[IntArray], IntArray]) -> Record:
    """The record with other class ids, without those that become `LEFT_OUT`."""
    labels, class_ids = record.labels, number(record.labels.class_ids)
    kept = class_ids != LEFT_OUT
    return replace(
        record,
        areas=None if record.areas is None else record.areas[kept],
        labels=replace(
            labels,
            boxes=labels.boxes[kept],
            class_ids=class_ids[kept],
            crowd=labels.crowd[kept],
            polygons=tuple(polygon for polygon, keep in zip(labels.polygons, kept, strict=True) if keep),
        ),
    )
