"""Several forms of one model against the one to trust: stages, matched boxes, AP."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from yolov7_deploy.datasets import Dataset, open_dataset
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import UsageError
from yolov7_deploy.evaluation.accuracy import evaluate
from yolov7_deploy.evaluation.parity import ParityReport, compare, comparison_thresholds, form
from yolov7_deploy.evaluation.synthetic_image import drawn_image
from yolov7_deploy.image import Image
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.options import ValOptions
from yolov7_deploy.runtimes.base import Backend, backend_row, open_backend
from yolov7_deploy.sources import open_source

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class FormAccuracy:
    """AP (0..1) of one form, all forms by the plain letterbox of the same size."""

    weights: str
    precision: str
    ap: float
    ap50: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """The outcome: one report a form, AP of each (the trusted one first) if data was given, and what was lost."""

    reports: tuple[ParityReport, ...]
    accuracy: tuple[FormAccuracy, ...]
    images: int
    losses: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "ok": not self.losses,
            "losses": list(self.losses),
            "images": self.images,
            "reports": [report.to_dict() for report in self.reports],
            "accuracy": [
                {"weights": row.weights, "precision": row.precision, "ap": row.ap, "ap50": row.ap50}
                for row in self.accuracy
            ],
        }


def verify_forms(
    trusted: Path,
    others: Sequence[Path],
    *,
    images: Path | None = None,
    data: Path | None = None,
    limit: int = 16,
    max_drop: float = 0.3,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Verification:
    """Compares each of `others` with `trusted` on the same images.

    Args:
        trusted, others: Model files.
        images: Folder, file, pattern or list; images of `data`, or a drawn one, where absent.
        data: Dataset to measure AP on.
        limit: At most so many images for the stages, and for AP.
        max_drop: AP points of 100 that may be lost.
        device: Where to run.
        progress: Called with steps done and in all.

    Raises:
        UsageError: The forms differ in input size or classes.
    """
    dataset = open_dataset(data, limit=limit) if data else None
    source = images or ([dataset.path(i) for i in range(len(dataset))] if dataset else None)
    frames = _images(source, limit)
    reports = [_stages(trusted, path, frames, device, progress) for path in others]
    accuracy = _accuracy([trusted, *others], dataset, device, progress) if dataset else []
    return Verification(
        reports=tuple(reports),
        accuracy=tuple(accuracy),
        images=len(dataset) if dataset else len(frames) or 1,
        losses=(*_stage_losses(reports), *_accuracy_losses(accuracy, max_drop)),
    )


def _stages(trusted: Path, path: Path, images: Sequence[Image], device: str, progress: Progress | None) -> ParityReport:
    other = open_backend(path, device=device, input_hw=None)
    hw = other.metadata.default_hw
    reference = open_backend(
        trusted, device=device, input_hw=None if _fixed(trusted) else hw, half=None if _fixed(trusted) else False
    )
    _check_same_classes(trusted, reference.metadata, path, other.metadata)
    return compare(
        form(str(trusted), reference, trusted, input_hw=reference.metadata.input_hw or hw),
        form(str(path), other, path, input_hw=hw),
        images or [drawn_image(hw)],
        thresholds=comparison_thresholds(_strictest(reference, other)),
        progress=progress,
    )


def _accuracy(paths: Sequence[Path], dataset: Dataset, device: str, progress: Progress | None) -> list[FormAccuracy]:
    """AP of each form at one input size: that of the first file whose size is fixed."""
    fixed = [open_backend(path, device=device, input_hw=None).metadata.input_hw for path in paths if _fixed(path)]
    size = next((hw for hw in fixed if hw is not None), None)
    accuracy = []
    for path in paths:
        # A checkpoint is what the others are measured by: float32 on every device.
        half = None if _fixed(path) else False
        with Detector(path, device=device, img=None if _fixed(path) else size, half=half) as detector:
            measured = evaluate(detector, dataset, options=ValOptions(rect=False, batch=1), progress=progress)
        accuracy.append(
            FormAccuracy(
                weights=str(path), precision=measured.precision, ap=measured.ap or 0.0, ap50=measured.ap50 or 0.0
            )
        )
    return accuracy


def _images(source: Path | list[Path] | None, limit: int) -> list[Image]:
    if source is None:
        return []
    with open_source(source) as frames:
        return [frame.image for frame in islice(frames, limit)]


def _fixed(path: Path) -> bool:
    return backend_row(path).name != "pytorch"


def _strictest(reference: Backend, other: Backend) -> ModelMetadata:
    """The metadata whose NMS cannot be changed, if any is inside a file."""
    return other.metadata if other.metadata.nms is not None else reference.metadata


def _check_same_classes(trusted: Path, reference: ModelMetadata, path: Path, other: ModelMetadata) -> None:
    if len(reference.class_names) != len(other.class_names):
        raise UsageError(
            f"{trusted} has {len(reference.class_names)} classes, {path} {len(other.class_names)}: not the same model.",
            fix="Compare a file with the weights it was exported from.",
        )


def _stage_losses(reports: Sequence[ParityReport]) -> list[str]:
    losses = []
    for report in reports:
        lost = report.first_loss
        if lost is not None:
            over = {
                name: lost.differences[name] for name, limit in lost.limits.items() if lost.differences[name] > limit
            }
            losses.append(f"{report.against} parts from {report.reference} at the stage {lost.stage!r}: {over}.")
    return losses


def _accuracy_losses(accuracy: Sequence[FormAccuracy], max_drop: float) -> list[str]:
    return [
        f"{row.weights} loses {(accuracy[0].ap - row.ap) * 100:.2f} AP points ({accuracy[0].ap:.4f} to {row.ap:.4f}), "
        f"more than --max-drop {max_drop:g}."
        for row in accuracy[1:]
        if (accuracy[0].ap - row.ap) * 100 > max_drop
    ]
