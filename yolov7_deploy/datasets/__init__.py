"""COCO annotation files and YOLO label folders as one sequence of samples.

Only who asks for it gets a cache on disk, and each of its entries is checked against its files first: a stale label
cache is worse than reading small text files again.
"""

from __future__ import annotations

from pathlib import Path

from yolov7_deploy.datasets.coco import open_coco
from yolov7_deploy.datasets.samples import Dataset, Sample
from yolov7_deploy.datasets.yolo import open_yaml
from yolov7_deploy.errors import DatasetError

__all__ = ["Dataset", "Sample", "open_dataset"]


def open_dataset(
    data: str | Path,
    *,
    images: str | Path | None = None,
    split: str = "val",
    limit: int | None = None,
    cache: bool = False,
) -> Dataset:
    """The samples of a COCO `instances.json` or of a YOLO dataset YAML, ordered by path.

    A YAML has `train`, `val`, `test` (text list, folder, or several), `nc`, `names` and optionally `path` and
    `annotations` (a COCO file per split, which then gives the boxes). Its paths are relative to the file itself,
    or as the official program has it to the working folder.

    Args:
        data: The JSON or YAML file.
        images: Image folder of a JSON; without it the usual places beside the file are tried.
        split: Which part of a YAML, and which folder to guess for a JSON.
        limit: Only the first so many images.
        cache: Of label files and image headers read only those that have changed since the last time, and keep what
            they say in the user's cache folder. Headers are then read at once, not when a size is asked for.

    Raises:
        DatasetError: Files are missing, malformed or contradict each other; the message lists the first offenders.
    """
    path = Path(data)
    if limit is not None and limit < 1:
        raise DatasetError(f"limit must be at least 1, not {limit}.", fix="For example: --limit 100")
    if not path.is_file():
        raise DatasetError(f"{path} is not a file.", fix="--data takes a dataset YAML or a COCO instances JSON.")
    if path.suffix.lower() == ".json":
        return open_coco(path, images=None if images is None else Path(images), split=split, limit=limit)
    if path.suffix.lower() in (".yaml", ".yml"):
        return open_yaml(path, split=split, limit=limit, cache=cache)
    raise DatasetError(
        f"{path} is neither .yaml nor .json.", fix="--data takes a dataset YAML or a COCO instances JSON."
    )
