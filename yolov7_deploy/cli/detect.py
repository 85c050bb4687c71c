"""`y7 detect`: detect objects in images, videos, cameras and streams; write annotated images, labels and JSON."""

from __future__ import annotations

import contextlib
import functools
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from yolov7_deploy._output import echo, is_terminal, note
from yolov7_deploy._process import Interrupted, deferred_signals
from yolov7_deploy.cli.options import (
    DEFAULT_FROM_MODEL,
    Conf,
    Device,
    ExistOk,
    Half,
    Img,
    Iou,
    JsonPath,
    MaxDet,
    Name,
    RuntimeName,
    SaveDir,
    Weights,
    check_thresholds,
    label_rule,
    locate_weights,
    parse_classes,
    parse_img,
)
from yolov7_deploy.errors import Y7Error

if TYPE_CHECKING:
    from yolov7_deploy.detections import Detections
    from yolov7_deploy.detector import Detector
    from yolov7_deploy.sources import Frame, Source
    from yolov7_deploy.workflows.predict import AnnotateOptions, Detect, PredictionReport

RUNS = Path("runs/detect")

SourceText = Annotated[
    str,
    typer.Option(
        "--source",
        "-s",
        metavar="SOURCE",
        help="Image, folder, 'pattern', video, camera number, rtsp:// or http:// address, or a .txt list of these.",
    ),
]
Classes = Annotated[
    list[str] | None,
    typer.Option(
        "--classes", metavar="CLASSES", help="Detect only these classes: names or numbers, 'person,dog' or '0 16'."
    ),
]
MultiLabel = Annotated[
    bool | None,
    typer.Option(
        "--multi-label/--best-class",
        help=f"Keep all classes of a box above --conf, or only its best {DEFAULT_FROM_MODEL.format('its best')}.",
    ),
]
AgnosticNms = Annotated[
    bool | None, typer.Option("--agnostic-nms", help="Class-agnostic NMS: boxes of different classes compete.")
]
Rect = Annotated[
    bool,
    typer.Option(
        "--rect",
        help="Pad to the smallest multiple of the stride, as detect.py does; needs weights or an export --dynamic.",
    ),
]
Project = Annotated[Path, typer.Option("--project", help="Folder of all runs.")]
SaveTxt = Annotated[bool, typer.Option("--save-txt", help="Write YOLO label files to labels/.")]
SaveConf = Annotated[bool, typer.Option("--save-conf", help="With --save-txt: add the score to each line.")]
View = Annotated[
    bool, typer.Option("--view", "--view-img", help="Show each image in a window; any key continues, q or Esc quits.")
]
NoSave = Annotated[bool, typer.Option("--nosave", help="Do not write images and videos with drawn boxes.")]


def detect(
    *,
    source: SourceText,
    weights: Weights = "yolov7",
    conf: Conf = None,
    iou: Iou = None,
    max_det: MaxDet = None,
    classes: Classes = None,
    img: Img = None,
    rect: Rect = False,
    device: Device = "auto",
    runtime: RuntimeName = "auto",
    half: Half = None,
    multi_label: MultiLabel = None,
    agnostic_nms: AgnosticNms = None,
    project: Project = RUNS,
    name: Name = "exp",
    exist_ok: ExistOk = False,
    save_dir: SaveDir = None,
    save_txt: SaveTxt = False,
    save_conf: SaveConf = False,
    json_path: JsonPath = None,
    view: View = False,
    nosave: NoSave = False,
) -> None:
    """Detect objects in images, videos, cameras or streams.

    Example:  y7 detect --weights yolov7.onnx --source street.jpg
    """
    thresholds: dict[str, Any] = {"conf": conf, "iou": iou, "max_det": max_det}
    check_thresholds(**thresholds)
    thresholds |= {"multi_label": multi_label, "class_agnostic": agnostic_nms}
    class_filter, input_size = parse_classes(classes), parse_img(img)
    from yolov7_deploy._output_folder import new_run_folder
    from yolov7_deploy.detector import Detector
    from yolov7_deploy.sources import open_source
    from yolov7_deploy.workflows.predict import AnnotateOptions

    opened = open_source(source, on_error="skip")
    with contextlib.ExitStack() as stack:
        if nosave and not save_txt:
            save_dir = None  # nothing is written into it
        elif save_dir is None:
            save_dir = stack.enter_context(new_run_folder(project / name, exist_ok=exist_ok))
        options = AnnotateOptions(
            save_dir=save_dir,
            save_drawn=not nosave,
            save_txt=save_txt,
            save_conf=save_conf,
            keep_records=json_path is not None,
            view=view,
        )
        detector = Detector(
            locate_weights(weights),
            device=device,
            runtime=runtime,
            img=input_size,
            rect=rect,
            half=half,
            **thresholds,
        )
        _run(stack.enter_context(detector), opened, classes=class_filter, options=options, json_path=json_path)


def _run(
    detector: Detector,
    source: Source,
    *,
    classes: list[str] | None,
    options: AnnotateOptions,
    json_path: str | None,
) -> None:
    from yolov7_deploy.detections import find_classes
    from yolov7_deploy.sources.files import summarize_left_out
    from yolov7_deploy.workflows.predict import PredictionReport

    class_ids = None if classes is None else find_classes(classes, detector.metadata.class_names)
    settings = {
        "weights": str(detector.path),
        "precision": detector.metadata.precision,
        "device": detector.device,
        "input_hw": list(detector.input_hw),
        "rect": detector.rect,
        "thresholds": asdict(replace(detector.thresholds, classes=class_ids)),
    }
    console = DetectConsole(source, to_stderr=json_path == "-")
    console.print(_headline(settings))
    if source.left_out:
        echo(f"Left out: {summarize_left_out(source.left_out)}", err=True)
    report = PredictionReport()
    finish = functools.partial(
        _finish, report, console, settings=settings, save_dir=options.save_dir, json_path=json_path
    )
    try:
        console.annotate(functools.partial(detector, classes=class_ids), options=options, report=report)
    except (Y7Error, KeyboardInterrupt, OSError):
        # A camera may disconnect after hours: keep what was detected until then.
        if report.frames:
            finish()
        raise
    finish()
    if report.stopped_by:
        raise Interrupted(report.stopped_by)  # all results are written; the exit code says why it ended


class DetectConsole:
    """Terminal output of `y7 detect`: one line per frame, and for several frames a progress bar below the lines."""

    def __init__(self, source: Source, *, to_stderr: bool) -> None:
        self._source = source
        self._to_stderr = to_stderr

    def print(self, line: str) -> None:
        """Print one line."""
        note(line, err=self._to_stderr)

    def annotate(self, detector: Detect, *, options: AnnotateOptions, report: PredictionReport) -> None:
        """Run the detector over the source and fill the report; a pipe gets no progress beside the lines."""
        from yolov7_deploy._console import progress
        from yolov7_deploy.workflows.predict import annotate

        run = functools.partial(annotate, detector, self._source, options=options, report=report)
        if self._source.total == 1 or not is_terminal(sys.stderr):
            run(on_frame=self._print_frame)
            return
        with progress("detect") as show:

            def on_frame(frame: Frame, detections: Detections) -> None:
                self._print_frame(frame, detections)
                show(frame.index + 1, self._source.total or 0)

            run(on_frame=on_frame)

    def _print_frame(self, frame: Frame, detections: Detections) -> None:
        total = self._source.total
        number = f"{frame.index + 1}/{total}" if total else f"{frame.index + 1}"
        height, width = detections.image_hw
        name = frame.path if frame.is_live else Path(frame.path).name
        dropped = f", {frame.dropped} dropped" if frame.dropped else ""
        time_ms = f"{detections.speed.total_ms:.1f}ms"
        self.print(f"{number} {name} {height}x{width}: {detections.describe()}, {time_ms}{dropped}")


def _headline(settings: dict[str, Any]) -> str:
    height, width = settings["input_hw"]
    thresholds = settings["thresholds"]
    return (
        f"{settings['weights']} ({settings['precision']}, {settings['device']}, "
        f"{'rect up to ' if settings['rect'] else ''}{height}x{width}): "
        f"conf {thresholds['conf']}, iou {thresholds['iou']}, max-det {thresholds['max_det']}, "
        f"{label_rule(thresholds['multi_label'])}"
    )


def _finish(
    report: PredictionReport,
    console: DetectConsole,
    *,
    settings: dict[str, Any],
    save_dir: Path | None,
    json_path: str | None,
) -> None:
    """Write the JSON result and print the summary."""
    from yolov7_deploy._console import write_json

    with deferred_signals():
        if json_path is not None and json_path != "-":
            write_json({**report.to_dict(), **settings}, json_path)
        for item in report.skipped:
            echo(f"Skipped: {item.reason}", err=True)
        speed = report.speed
        console.print(
            f"Speed: {speed.preprocess_ms:.1f}ms preprocess, {speed.inference_ms:.1f}ms inference, "
            f"{speed.postprocess_ms:.1f}ms postprocess per image"
        )
        if save_dir is not None and save_dir.is_dir():
            echo(f"Results saved to {save_dir}", err=json_path == "-")
        if json_path == "-":
            write_json({**report.to_dict(), **settings}, json_path)
