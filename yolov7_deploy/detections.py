"""Detections: boxes, scores and class ids of one image, and how to filter, draw, save and convert them.

Libraries that only one conversion needs (supervision, pandas) are imported when that conversion is called.
"""

from __future__ import annotations

import difflib
import importlib
import json
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, SupportsIndex, cast

import numpy as np
import numpy.typing as npt

from yolov7_deploy._text import json_escape, printable_line, shorten
from yolov7_deploy.errors import ImageError, MissingLibraryError, UsageError
from yolov7_deploy.image import FloatArray, Image, ImageBytes, IntArray, PilImage, as_bgr, read_image
from yolov7_deploy.options import Thresholds, split_classes
from yolov7_deploy.visualize import draw_boxes, write_image

_INDEX_FIX = "Pass an int, a slice, a list of ints, or a mask of one bool per detection."
Index = int | slice | Sequence[int] | Sequence[bool] | npt.NDArray[np.bool_] | npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Milliseconds per image; for a batch, the time of the batch divided by its size."""

    preprocess_ms: float = 0.0
    inference_ms: float = 0.0
    postprocess_ms: float = 0.0

    @property
    def total_ms(self) -> float:
        """The sum of the three."""
        return self.preprocess_ms + self.inference_ms + self.postprocess_ms


@dataclass(frozen=True, kw_only=True, slots=True)
class Detection:
    """One object: `box` is (x1, y1, x2, y2) in source pixels."""

    box: tuple[float, float, float, float]
    score: float
    class_id: int
    class_name: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False, repr=False)
class Detections:
    """The objects detected in one image, best score first; empty if there are none.

    Attributes:
        boxes: float32 [N, 4] xyxy in source pixels, clipped to the image.
        scores: float32 [N].
        class_ids: int64 [N].
        class_names: All names of the model, indexed by class id.
        image_hw: Height and width of the source image.
        path: File or source of the image, empty for arrays.
        speed: Time spent on the image.
        error: Why the image could not be read, with `on_error="skip"`; there are no detections and no size then.

    Raises:
        UsageError: The arrays differ in length or shape, a value is NaN or infinite, or a class id has no name.

    Example:
        >>> with Detector("yolov7-tiny-shapes") as detector:
        ...     detections = detector("street.jpg")
        >>> for detection in detections.filter(conf=0.4):
        ...     name, score, (x1, y1, x2, y2) = detection.class_name, detection.score, detection.box
        >>> detections.save("detected.jpg")
    """

    boxes: FloatArray
    scores: FloatArray
    class_ids: IntArray
    class_names: tuple[str, ...]
    image_hw: tuple[int, int]
    path: str = ""
    speed: Speed = Speed()
    error: str = ""

    def __post_init__(self) -> None:
        for name, kind in (("boxes", np.float32), ("scores", np.float32), ("class_ids", np.int64)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=kind))
        count = len(self.scores) if self.scores.ndim == 1 else -1
        if self.boxes.shape != (count, 4) or self.class_ids.shape != (count,):
            raise UsageError(
                f"boxes {self.boxes.shape}, scores {self.scores.shape} and class_ids {self.class_ids.shape} "
                "do not describe the same detections.",
                fix="Pass boxes [N, 4], scores [N] and class_ids [N].",
            )
        if not (np.isfinite(self.boxes).all() and np.isfinite(self.scores).all()):
            raise UsageError(
                "A box or score is NaN or infinite, so the model is damaged or overflows in its precision.",
                fix="Compare it with its weights:  y7 verify --weights WEIGHTS.pt --against FILE   "
                "or export it again:  y7 export --weights WEIGHTS.pt --precision fp32",
            )
        if count and not 0 <= self.class_ids.min() <= self.class_ids.max() < len(self.class_names):
            raise UsageError(
                f"Class ids range from {self.class_ids.min()} to {self.class_ids.max()}, "
                f"but there are {len(self.class_names)} class names.",
                fix="Pass one name per class in class_names.",
            )

    def __repr__(self) -> str:
        parts = [self.describe(), f"image_hw={self.image_hw}"]
        parts += [f"{name}={getattr(self, name)!r}" for name in ("path", "error") if getattr(self, name)]
        return f"Detections({', '.join(parts)})"

    def __len__(self) -> int:
        """Return the number of detections."""
        return len(self.scores)

    def __iter__(self) -> Iterator[Detection]:
        """Yield each `Detection`, best score first: `box`, `score`, `class_id`, `class_name`."""
        for (x1, y1, x2, y2), score, class_id in zip(
            self.boxes.tolist(), self.scores.tolist(), self.class_ids.tolist(), strict=True
        ):
            yield Detection(box=(x1, y1, x2, y2), score=score, class_id=class_id, class_name=self.class_names[class_id])

    def __getitem__(self, index: Index) -> Detections:
        """Return new Detections, also for a single index.

        Args:
            index: An int, a slice, ints in any order, or a mask of one bool per detection.

        Raises:
            UsageError: A mask has another length, or the index is of another type (floats, names, two dimensions).
            IndexError: An int is out of range.
        """
        rows = _checked_slice(index) if isinstance(index, slice) else _rows(index, len(self))
        return replace(self, boxes=self.boxes[rows], scores=self.scores[rows], class_ids=self.class_ids[rows])

    def filter(
        self, *, conf: float | None = None, classes: int | str | Iterable[int | str] | None = None
    ) -> Detections:
        """Return the detections with a score above `conf` (strictly) and one of `classes` (ids or names).

        Raises:
            UsageError: `conf` is not between 0 and 1, or the model does not have one of the classes.
        """
        keep = np.ones(len(self), dtype=np.bool_)
        if conf is not None:
            keep &= self.scores > Thresholds(conf=conf).conf
        if classes is not None:
            keep &= np.isin(self.class_ids, find_classes(classes, self.class_names))
        return self[keep]

    @property
    def names(self) -> tuple[str, ...]:
        """The class name of each detection."""
        return tuple(self.class_names[i] for i in self.class_ids.tolist())

    def describe(self) -> str:
        """Return the number of detections per class, in class order: `person: 2, dog: 1`."""
        ids, counts = np.unique(self.class_ids, return_counts=True)
        parts = [f"{printable_line(self.class_names[i])}: {count}" for i, count in zip(ids, counts, strict=True)]
        return ", ".join(parts) or "no detections"

    def plot(self, image: Image | PilImage | ImageBytes | None = None) -> Image:
        """Return a copy of the image, uint8 BGR [H, W, 3], with boxes and labels.

        Args:
            image: The image that was detected: an array, BGR, a PIL image, or the bytes of a file. It may be omitted
                if the detections are of a file, which is read again.

        Raises:
            ImageError: It is not an image; see `as_bgr`.
            UsageError: It does not have the size of `image_hw`, or it is omitted and `path` is not an image file.
        """
        image_bgr = self._read_own_image() if image is None else as_bgr(image)
        if image_bgr.shape[:2] != self.image_hw:
            raise UsageError(
                f"The image is {image_bgr.shape[0]}x{image_bgr.shape[1]}; the detections belong to an image of "
                f"{self.image_hw[0]}x{self.image_hw[1]} (height x width).",
                fix="Pass the image that was given to the Detector, before any resizing.",
            )
        labels = [f"{item.class_name} {item.score:.2f}" for item in self]
        return draw_boxes(image_bgr, self.boxes, labels=labels, class_ids=self.class_ids.tolist())

    def save(self, path: str | Path, image: Image | PilImage | ImageBytes | None = None) -> None:
        """Write the image with boxes and labels; the suffix selects the format. The image may be omitted as in `plot`.

        Raises:
            ImageError: The format is unknown or the file cannot be written; see also `plot`.
            UsageError: See `plot`.
        """
        write_image(path, self.plot(image))

    def _read_own_image(self) -> Image:
        fix = "Pass the image:  detections.plot(image)  or  detections.save('result.jpg', image)"
        if not self.path:
            raise UsageError("These detections are of an image in memory, which they do not keep.", fix=fix)
        try:
            return read_image(self.path)
        except ImageError as error:
            raise UsageError(f"These detections are not of an image file: {error.message}", fix=fix) from error

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that converts back to the same float32 values. Timings are omitted: they never repeat."""
        return {
            "path": self.path,
            **({"error": self.error} if self.error else {}),
            "image_hw": list(self.image_hw),
            "detections": [
                {"box": _shortest(box), "score": _shortest([score])[0], "class_id": class_id, "class_name": name}
                for box, score, class_id, name in zip(
                    self.boxes, self.scores, self.class_ids.tolist(), self.names, strict=True
                )
            ],
        }

    def to_json(self) -> str:
        """Return `to_dict` as one line of JSON with sorted keys: same detections, same bytes."""
        return json_escape(json.dumps(self.to_dict(), sort_keys=True, ensure_ascii=False))

    def to_coco(self, image_id: int | str, *, category_ids: Sequence[int | str] | None = None) -> list[dict[str, Any]]:
        """Return COCO results: xywh rounded to 3 decimals and scores to 5, as the official test program writes them.

        Args:
            image_id: The image's id in the annotation file.
            category_ids: The dataset's category id of each class id; `None` if they are the same.
        """
        boxes_xywh = np.hstack([self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]])
        # A float32 times 1000 is exact in float64, so the array is rounded to the same numbers as by `round`.
        boxes, scores = boxes_xywh.astype(np.float64).round(3), self.scores.astype(np.float64).round(5)
        return [
            {
                "image_id": image_id,
                "category_id": class_id if category_ids is None else category_ids[class_id],
                "bbox": box,
                "score": score,
            }
            for box, score, class_id in zip(boxes.tolist(), scores.tolist(), self.class_ids.tolist(), strict=True)
        ]

    def to_yolo(self, *, save_conf: bool = False) -> str:
        """Return YOLO labels: one line `class cx cy w h [score]` each, coordinates as fractions of width and height."""
        height, width = self.image_hw
        centre, size = (self.boxes[:, :2] + self.boxes[:, 2:]) / 2, self.boxes[:, 2:] - self.boxes[:, :2]
        rows = np.hstack([centre, size]) / np.array([width, height, width, height], dtype=np.float32)
        rows = np.hstack([rows, self.scores[:, None]]) if save_conf else rows
        return "".join(
            f"{class_id} {' '.join(f'{value:g}' for value in row)}\n"
            for class_id, row in zip(self.class_ids.tolist(), rows.tolist(), strict=True)
        )

    def to_supervision(self) -> Any:  # noqa: ANN401 (an optional library's type)
        """Return a `supervision.Detections` with float boxes, class ids and `data['class_name']`.

        Raises:
            MissingLibraryError: supervision is not installed.
        """
        supervision = _import_library("supervision", needed_for="to_supervision()")
        return supervision.Detections(
            xyxy=self.boxes.copy(),
            confidence=self.scores.copy(),
            class_id=self.class_ids.astype(int),
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def to_pandas(self) -> Any:  # noqa: ANN401 (an optional library's type)
        """Return a `pandas.DataFrame` with the columns of the YOLOv5 and YOLOv7 hub models.

        Raises:
            MissingLibraryError: pandas is not installed.
        """
        pandas = _import_library("pandas", needed_for="to_pandas()")
        table = pandas.DataFrame(self.boxes, columns=["xmin", "ymin", "xmax", "ymax"])
        table["confidence"] = self.scores
        table["class"] = self.class_ids
        table["name"] = list(self.names)
        return table

    def as_ultralytics(self) -> UltralyticsView:
        """Return the detections under the attribute names of an ultralytics result, for libraries that read one.

        `supervision.Detections.from_ultralytics(detections.as_ultralytics())` works, and so do trackers written
        for `result.boxes.xyxy.cpu().numpy()`.
        """
        x1, y1, x2, y2 = self.boxes.T
        xywh = np.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], axis=1)
        boxes = UltralyticsBoxes(
            xyxy=self.boxes.view(HostTensor),
            xywh=xywh.view(HostTensor),
            conf=self.scores.view(HostTensor),
            cls=self.class_ids.view(HostTensor),
        )
        return UltralyticsView(
            boxes=boxes, names=dict(enumerate(self.class_names)), path=self.path, orig_shape=self.image_hw
        )


class HostTensor(np.ndarray[Any, np.dtype[Any]]):
    """A NumPy array with the methods `.cpu()` and `.numpy()` of torch tensors."""

    def cpu(self) -> HostTensor:
        """Return the array itself, which is already in host memory."""
        return self

    def numpy(self) -> npt.NDArray[Any]:
        """Return the plain array, without a copy."""
        return self.view(np.ndarray)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class UltralyticsBoxes:
    """Boxes `xyxy` and `xywh` [N, 4], `conf` [N], `cls` [N]; `id`, which trackers set, is always `None`."""

    xyxy: HostTensor
    xywh: HostTensor
    conf: HostTensor
    cls: HostTensor
    id: None = None

    def __len__(self) -> int:
        return len(self.conf)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class UltralyticsView:
    """The parts of an ultralytics result that describe boxes; see `Detections.as_ultralytics`."""

    boxes: UltralyticsBoxes
    names: dict[int, str]
    path: str
    orig_shape: tuple[int, int]
    masks: None = None
    obb: None = None
    keypoints: None = None
    probs: None = None

    def __len__(self) -> int:
        return len(self.boxes)


def find_classes(classes: int | str | Iterable[int | str], class_names: Sequence[str]) -> tuple[int, ...]:
    """Return the sorted class ids for a mix of ids and names; a name shared by several classes selects all of them.

    A text may have several, as in `person,dog` or `0 16`.

    Raises:
        UsageError: The model does not have one of the ids or names, or it is neither an int nor text.
    """
    ids: set[int] = set()
    for item in _class_items(classes, class_names):
        matches = _matches(item, class_names)
        if not matches:
            raise _unknown_class(item, class_names)
        ids.update(matches)
    return tuple(sorted(ids))


def _class_items(classes: object, class_names: Sequence[str]) -> list[int | str]:
    """Return ids as ints of Python, and single names.

    Raises:
        UsageError: One of them is something else, such as a float or a bool.
    """
    is_one = isinstance(classes, str | bytes | bool) or not isinstance(classes, Iterable)
    try:
        items = [classes] if is_one else list(cast(Iterable[object], classes))
    except TypeError:  # arrays and tensors without dimensions
        items = [classes]
    found: list[int | str] = []
    for item in items:
        try:
            if isinstance(item, bool | np.bool_):
                raise TypeError("a bool is not a class")
            if isinstance(item, str):
                found += split_classes(item, class_names)
            else:
                found.append(operator.index(cast(SupportsIndex, item)))
        except TypeError as error:
            raise UsageError(
                f"A class is an id or a name, not {item!r} ({type(item).__name__}).",
                fix="For example: classes=[0, 16]   or   classes=['person', 'dog']",
            ) from error
    return found


def _matches(item: int | str, class_names: Sequence[str]) -> list[int]:
    if isinstance(item, str):
        return [i for i, name in enumerate(class_names) if name.casefold() == item.strip().casefold()]
    return [item] if 0 <= item < len(class_names) else []


def _unknown_class(item: int | str, class_names: Sequence[str]) -> UsageError:
    if not isinstance(item, str):
        return UsageError(
            f"Class id {item} does not exist; the model has {len(class_names)} classes.",
            fix=f"Use ids from 0 to {len(class_names) - 1}.",
        )
    spelling = {name.casefold(): name for name in reversed(class_names)}
    near = difflib.get_close_matches(item.casefold(), list(spelling), n=3, cutoff=0.5)
    if near:
        meant = " or ".join(repr(spelling[name]) for name in near)
        return UsageError(f"The model has no class {item!r}.", fix=f"Did you mean {meant}?")
    some = ", ".join(map(repr, class_names[:10])) + (", ..." if len(class_names) > 10 else "")
    return UsageError(f"The model has no class {item!r}.", fix=f"Its {len(class_names)} classes: {some}")


def _checked_slice(index: slice) -> slice:
    try:
        index.indices(0)
    except (TypeError, ValueError) as error:
        raise UsageError(f"Detections cannot be indexed with {index}: {error}.", fix=_INDEX_FIX) from error
    return index


def _rows(index: object, count: int) -> npt.NDArray[Any]:
    """Return an index of any type other than a slice as an array of ints, or as a mask of `count` entries.

    Raises:
        UsageError: See `Detections.__getitem__`.
    """
    try:
        array = np.asarray(index)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"Detections cannot be indexed with a {type(index).__name__}.", fix=_INDEX_FIX) from error
    is_sequence = isinstance(index, Sequence) and not isinstance(index, str | bytes)
    if is_sequence and array.shape == (0,):
        return array.astype(np.int64)
    if array.dtype == np.bool_ and array.shape != (count,):
        raise UsageError(
            f"A mask of shape {array.shape} does not select from {count} detections.",
            fix="Pass one bool per detection, for example: detections[detections.scores > 0.5]",
        )
    # NumPy would read True in a list of ints as 1.
    is_mixed = is_sequence and array.dtype != np.bool_ and any(isinstance(i, bool) for i in cast(Sequence[Any], index))
    if array.ndim > 1 or array.dtype.kind not in "biu" or is_mixed:
        raise UsageError(f"Detections cannot be indexed with {_short(index)}.", fix=_INDEX_FIX)
    return np.atleast_1d(array)


def _short(index: object) -> str:
    return f"{shorten(repr(index), 60)} ({type(index).__name__})"


def _shortest(values: Iterable[Any]) -> list[float]:
    """Return float32 values as the shortest decimals that convert back to them (244.943, not 244.94300842285156)."""
    return [float(str(np.float32(value))) for value in values]


def _import_library(name: str, *, needed_for: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise MissingLibraryError(f"{name} is needed for {needed_for}.", fix=f"pip install {name}") from error
