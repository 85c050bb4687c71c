"""`y7 detect`: images, videos, cameras and streams in; drawn images, labels and JSON out."""

from __future__ import annotations

import functools
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from yolov7_deploy.cli.options import (
    OWN,
    Conf,
    Device,
    Half,
    Img,
    Iou,
    JsonPath,
    MaxDet,
    Weights,
    check_thresholds,
    parse_img,
)
from yolov7_deploy.errors import SourceError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from yolov7_deploy.detections import Detections
    from yolov7_deploy.detector import Detector
    from yolov7_deploy.sources import Frame, Source
    from yolov7_deploy.workflows.predict import AnnotateOptions, Detect, Report

RUNS = Path("runs/detect")


SourceText = Annotated[
    str,
    typer.Option(
        "--source",
        "-s",
        help="Image, folder, 'pattern', video, camera number, rtsp:// or http:// address, or .txt list of these.",
    ),
]
Classes = Annotated[
    list[str] | None, typer.Option("--classes", help="Only these: names or numbers, 'person,dog' or '0 16'.")
]
MultiLabel = Annotated[
    bool | None,
    typer.Option(
        "--multi-label/--best-class",
        help=f"Every class of a box above --conf, or its best only {OWN.format('its best')}.",
    ),
]
AgnosticNms = Annotated[bool | None, typer.Option("--agnostic-nms", help="Boxes suppress those of other classes too.")]
SaveDir = Annotated[
    Path | None, typer.Option("--save-dir", help="Write here instead of a new folder runs/detect/expN.")
]
SaveTxt = Annotated[bool, typer.Option("--save-txt", help="Write YOLO label files to labels/.")]
SaveConf = Annotated[bool, typer.Option("--save-conf", help="With --save-txt: add the score to each line.")]
View = Annotated[bool, typer.Option("--view", "--view-img", help="Show each image; any key goes on, q or Esc ends.")]
NoSave = Annotated[bool, typer.Option("--nosave", help="Write no drawn images and videos.")]


def detect(
    *,
    source: SourceText,
    weights: Weights = "yolov7",
    conf: Conf = None,
    iou: Iou = None,
    max_det: MaxDet = None,
    classes: Classes = None,
    img: Img = None,
    device: Device = "auto",
    half: Half = None,
    multi_label: MultiLabel = None,
    agnostic_nms: AgnosticNms = None,
    save_dir: SaveDir = None,
    save_txt: SaveTxt = False,
    save_conf: SaveConf = False,
    json_path: JsonPath = None,
    view: View = False,
    nosave: NoSave = False,
) -> None:
    """Find objects in images, videos, cameras or streams."""
    check_thresholds(conf=conf, iou=iou, max_det=max_det)
    wanted, input_size = split_classes(classes), parse_img(img)

    from yolov7_deploy._console import progress
    from yolov7_deploy.detector import Detector
    from yolov7_deploy.hub import find_weights
    from yolov7_deploy.sources import open_source
    from yolov7_deploy.workflows.predict import AnnotateOptions, next_run_folder

    if save_dir is None and (save_txt or not nosave):
        save_dir = next_run_folder(RUNS)
    options = AnnotateOptions(
        save_dir=save_dir,
        save_drawn=not nosave,
        save_txt=save_txt,
        save_conf=save_conf,
        keep_records=json_path is not None,
        view=view,
    )
    opened = open_source(source, on_error="skip")
    with progress("download") as show:
        path = find_weights(weights, progress=show)
    with Detector(
        path,
        device=f"cuda:{device}" if device.isdigit() else device,
        img=input_size,
        half=half,
        conf=conf,
        iou=iou,
        max_det=max_det,
        multi_label=multi_label,
        class_agnostic=agnostic_nms,
    ) as detector:
        _run(detector, opened, classes=wanted, options=options, json_path=json_path)


def _run(
    detector: Detector,
    source: Source,
    *,
    classes: list[int | str] | None,
    options: AnnotateOptions,
    json_path: str | None,
) -> None:
    from yolov7_deploy.detections import find_classes
    from yolov7_deploy.workflows.predict import Report

    ids = None if classes is None else find_classes(classes, detector.metadata.class_names)
    record = {
        "weights": str(detector.path),
        "precision": detector.metadata.precision,
        "device": detector.device,
        "input_hw": list(detector.input_hw),
        "thresholds": asdict(replace(detector.thresholds, classes=ids)),
    }
    lines = Lines(source, to_stderr=json_path == "-")
    lines.say(_headline(record))
    report = Report()
    try:
        lines.run(functools.partial(detector, classes=ids), options=options, report=report)
    except SourceError:
        # a camera that is lost after hours: what was found until then is worth keeping
        if report.frames:
            _conclude(report, lines, record=record, save_dir=options.save_dir, json_path=json_path)
        raise
    _conclude(report, lines, record=record, save_dir=options.save_dir, json_path=json_path)


class Lines:
    """What the user sees: a line a frame, and on a terminal a progress bar below them."""

    def __init__(self, source: Source, *, to_stderr: bool) -> None:
        from rich.console import Console

        self._source = source
        self._to_stderr = to_stderr
        self._console = Console(stderr=to_stderr)
        self._progress: tuple[Progress, TaskID] | None = None

    def say(self, line: str) -> None:
        """One line, above the progress bar where there is one."""
        if self._progress is None:
            typer.echo(line, err=self._to_stderr)
        else:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def run(self, detector: Detect, *, options: AnnotateOptions, report: Report) -> None:
        """Fills the report, with a bar for more than one frame on a terminal."""
        from rich.progress import Progress

        from yolov7_deploy.workflows.predict import annotate

        if not self._console.is_terminal or self._source.total == 1:
            annotate(detector, self._source, options=options, report=report, on_frame=self._frame)
            return
        with Progress(console=self._console, transient=True) as progress:
            self._progress = (progress, progress.add_task("detecting", total=self._source.total))
            try:
                annotate(detector, self._source, options=options, report=report, on_frame=self._frame)
            finally:
                self._progress = None

    def _frame(self, frame: Frame, detections: Detections) -> None:
        total = self._source.total
        place = f"{frame.index + 1}/{total}" if total else f"{frame.index + 1}"
        height, width = detections.image_hw
        name = frame.path if frame.is_live else Path(frame.path).name
        lost = f", {frame.dropped} dropped" if frame.dropped else ""
        self.say(f"{place} {name} {width}x{height}: {detections.describe()}, {detections.speed.total_ms:.1f}ms{lost}")
        if self._progress is not None:
            self._progress[0].advance(self._progress[1])


def _headline(record: dict[str, Any]) -> str:
    height, width = record["input_hw"]
    thresholds = record["thresholds"]
    kept = "every class of a box" if thresholds["multi_label"] else "best class of a box"
    return (
        f"{record['weights']} ({record['precision']}, {record['device']}, {height}x{width}): "
        f"conf {thresholds['conf']}, iou {thresholds['iou']}, max-det {thresholds['max_det']}, {kept}"
    )


def _conclude(
    report: Report, lines: Lines, *, record: dict[str, Any], save_dir: Path | None, json_path: str | None
) -> None:
    from yolov7_deploy._console import write_json

    for item in report.skipped:
        typer.echo(f"Skipped: {item.reason}", err=True)
    speed = report.speed
    lines.say(
        f"Speed: {speed.preprocess_ms:.1f}ms preprocess, {speed.inference_ms:.1f}ms inference, "
        f"{speed.postprocess_ms:.1f}ms postprocess per image"
    )
    if save_dir is not None and save_dir.is_dir():
        lines.say(f"Results saved to {save_dir}")
    if json_path is not None:
        write_json({**report.to_dict(), **record}, json_path)


def split_classes(texts: list[str] | None) -> list[int | str] | None:
    """`["person,dog"]`, `["0 16"]` or `["0", "16"]` as single names and numbers; names may contain spaces."""
    if not texts:
        return None
    parts = [part.strip() for text in texts for part in text.split(",")]
    words = [word for part in parts for word in (part.split() if part.replace(" ", "").isdigit() else [part])]
    return [int(word) if word.isascii() and word.isdigit() else word for word in words if word]
