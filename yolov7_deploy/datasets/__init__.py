"""COCO annotation files and YOLO label folders as one sequence of samples.

Labels are cached on disk only on request, and every cache entry is checked against its files: a stale label cache is
worse than reading small text files again.
"""

from __future__ import annotations

from pathlib import Path

from yolov7_deploy._text import similar_file
from yolov7_deploy.datasets.coco import open_coco
from yolov7_deploy.datasets.samples import Dataset, Sample
from yolov7_deploy.errors import DatasetError
from yolov7_deploy.hub import MODEL_SUFFIXES

__all__ = ["Dataset", "Sample", "check_dataset_file", "open_dataset"]

DATASET_SUFFIXES = (".yaml", ".yml", ".json")
_TAKES = "--data takes a dataset YAML or a COCO instances JSON."


def open_dataset(
    data: str | Path,
    *,
    images: str | Path | None = None,
    split: str = "val",
    limit: int | None = None,
    cache: bool = False,
) -> Dataset:
    """Open a COCO `instances.json` or a YOLO dataset YAML; samples are ordered by path.

    A YAML has `train`, `val`, `test` (text list, folder, or several of them), `nc`, `names` and optionally `path` and
    `annotations` (a COCO file per split, whose boxes are then used). Its paths are relative to the YAML file or, as in
    the official program, to the working directory; `../train/images`, as Roboflow writes it, also means a folder next
    to the YAML file.

    The files of a folder and the entries of a list are found by the rules of `open_source`, in all subfolders. The
    label file of `images/val/a.jpg` is `labels/val/a.txt` or `images/val/a.txt`; links are followed. `Dataset.notes`
    says how many images have no label file, and what was left out.

    Args:
        data: The JSON or YAML file.
        images: Image folder of a JSON file; by default the usual folders next to the file are tried.
        split: The split of a YAML to open, and the folder to look for with a JSON file.
        limit: Open only the first `limit` images.
        cache: Keep parsed labels and image sizes in the user's cache folder, and read only label files and image
            headers that have changed. Headers are then read now, not when a size is requested.

    Raises:
        DatasetError: Files are missing, malformed or contradict each other; the message lists the first ones.
    """
    path = Path(data)
    if limit is not None and limit < 1:
        raise DatasetError(f"limit must be at least 1, not {limit}.", fix="For example: --limit 100")
    check_dataset_file(path)
    if path.suffix.lower() == ".json":
        return open_coco(path, images=None if images is None else Path(images), split=split, limit=limit)
    if path.suffix.lower() in (".yaml", ".yml"):
        # Imported here because it needs PyYAML, which exporting and generated datasets do without.
        from yolov7_deploy.datasets.yolo import open_yaml

        if images is not None:
            raise DatasetError(
                f"{path} names its image folders; an image folder is an option of COCO annotations only.",
                fix=f"Leave out --images, or name the folder in {path.name}.",
            )
        return open_yaml(path, split=split, limit=limit, cache=cache)
    raise DatasetError(f"{path} is neither .yaml nor .json.", fix=_TAKES)


def check_dataset_file(path: Path) -> None:
    """Check that the YAML or JSON file of a dataset exists.

    Raises:
        DatasetError: It does not, is a folder, or is weights; the fix names the file that was probably meant.
    """
    if path.suffix.lower() in MODEL_SUFFIXES and path.is_file():
        raise DatasetError(f"{path} is a model file, not a dataset.", fix=f"Pass it as --weights:  --weights {path}")
    if path.is_file():
        return
    if path.is_dir():
        found = [path / "data.yaml", *sorted(path.glob("*.yaml")), *sorted(path.glob("*.yml")), *path.glob("*.json")]
        found = [file for file in found if file.is_file()]
        raise DatasetError(
            f"{path} is a folder, not a dataset YAML or COCO JSON.",
            fix=f"Pass the file inside it:  --data {found[0]}" if found else _TAKES,
        )
    similar = similar_file(path, suffixes=DATASET_SUFFIXES)
    raise DatasetError(f"{path} does not exist.", fix=_TAKES if similar is None else f"Did you mean {similar}?")
