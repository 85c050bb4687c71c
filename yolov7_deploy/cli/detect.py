"""`y7 detect`: detect objects in images, videos, cameras and streams; write annotated images, labels and JSON."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from yolov7_deploy._output import echo, is_terminal, note
from yolov7_deploy._process import Interrupted, deferred_signals
from yolov7_deploy.cli.detect_streams import LOOPBACK, StreamsConsole, StreamsRequest, check_jsonl_path
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
    from yolov7_deploy.workflows.predict import AnnotateOptions, PredictionReport

RUNS = Path("runs/detect")

Sources = Annotated[
    list[str],
    typer.Option(
        "--source",
        "-s",
        metavar="SOURCE",
        help="Image, folder, 'pattern', video, camera number, rtsp:// or http:// address, or a .txt list of these. "
        "Repeat it to detect several at the same time.",
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
        help="Pad to the smallest multiple of the stride, as detect.py does; for checkpoints and y7 export --dynamic.",
    ),
]
Project = Annotated[Path, typer.Option("--project", help="Folder of all runs.")]
SaveTxt = Annotated[bool, typer.Option("--save-txt", help="Write YOLO label files to labels/.")]
SaveConf = Annotated[bool, typer.Option("--save-conf", help="With --save-txt: add the score to each line.")]
View = Annotated[
    bool, typer.Option("--view", "--view-img", help="Show each image in a window; any key continues, q or Esc quits.")
]
NoSave = Annotated[bool, typer.Option("--nosave", help="Do not write images and videos with drawn boxes.")]
Batch = Annotated[
    int | None,
    typer.Option(
        "--batch", metavar="N", help="Maximum number of frames of different sources in one run of the network."
    ),
]
MaxAge = Annotated[
    float,
    typer.Option("--max-age", metavar="SECONDS", help="Drop camera frames that are older than this."),
]
Realtime = Annotated[
    bool, typer.Option("--realtime", help="Play videos at their frame rate, and drop frames as with a camera.")
]
Reconnects = Annotated[
    int,
    typer.Option(
        "--reconnects", metavar="N", help="End after N failed attempts to reopen a camera, if no other source runs."
    ),
]
JsonLines = Annotated[
    str | None,
    typer.Option(
        "--jsonl",
        metavar="FILE",
        callback=check_jsonl_path,
        help="Append one line of JSON per frame while the program runs; - is standard output.",
    ),
]
MetricsPort = Annotated[
    int | None,
    typer.Option("--metrics-port", metavar="PORT", help="Serve metrics for Prometheus; 0 takes a free port."),
]
MetricsHost = Annotated[
    str, typer.Option("--metrics-host", metavar="ADDRESS", help="Address for --metrics-port; 0.0.0.0 is all of them.")
]


def detect(
    *,
    source: Sources,
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
    batch: Batch = None,
    max_age: MaxAge = 1.0,
    realtime: Realtime = False,
    reconnects: Reconnects = 5,
    project: Project = RUNS,
    name: Name = "exp",
    exist_ok: ExistOk = False,
    save_dir: SaveDir = None,
    save_txt: SaveTxt = False,
    save_conf: SaveConf = False,
    json_path: JsonPath = None,
    jsonl: JsonLines = None,
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = LOOPBACK,
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
    reading: dict[str, Any] = {"batch": batch, "max_age_s": max_age, "realtime": realtime, "reconnects": reconnects}
    request = StreamsRequest(**reading, jsonl=jsonl, metrics_port=metrics_port, metrics_host=metrics_host)
    request.check(json_path=json_path)
    console = _open_console(source, request, to_stderr="-" in (json_path, jsonl))
    from yolov7_deploy.detector import Detector
    from yolov7_deploy.workflows.predict import AnnotateOptions

    with contextlib.ExitStack() as stack:
        if nosave and not save_txt:
            save_dir = None  # nothing is written into it
        elif save_dir is None:
            save_dir = stack.enter_context(_new_folder(project / name, exist_ok=exist_ok))
        saving: dict[str, Any] = {"save_drawn": not nosave, "save_txt": save_txt, "save_conf": save_conf, "view": view}
        options = AnnotateOptions(save_dir=save_dir, keep_records=json_path is not None, **saving)
        opening: dict[str, Any] = {"device": device, "runtime": runtime, "img": input_size, "rect": rect, "half": half}
        detector = stack.enter_context(Detector(locate_weights(weights), **opening, **thresholds))
        _run(detector, console, classes=class_filter, options=options, json_path=json_path)


def _new_folder(folder: Path, *, exist_ok: bool) -> contextlib.AbstractContextManager[Path]:
    from yolov7_deploy._output_folder import new_run_folder

    return new_run_folder(folder, exist_ok=exist_ok)


def _open_console(sources: list[str], request: StreamsRequest, *, to_stderr: bool) -> DetectConsole | StreamsConsole:
    """Find the sources, and return what runs the detector over them.

    A single source without options of streams is read as a sequence of images; a text list with several cameras is
    several sources.
    """
    from yolov7_deploy.sources import open_source
    from yolov7_deploy.sources.streams import resolve_streams

    is_list = sources[0].lower().endswith(".txt") and "://" not in sources[0]
    if len(sources) > 1 or is_list or request.is_used:
        found = resolve_streams(sources, on_error="skip")
        if len(found.streams) > 1 or request.is_used:
            return StreamsConsole(found, request, to_stderr=to_stderr)
    return DetectConsole(open_source(sources[0], on_error="skip"), to_stderr=to_stderr)


def _run(
    detector: Detector,
    console: DetectConsole | StreamsConsole,
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
    console.print(_headline(settings))
    if console.left_out:
        echo(f"Left out: {summarize_left_out(console.left_out)}", err=True)
    report = PredictionReport()
    finish = functools.partial(
        _finish, report, console, settings=settings, save_dir=options.save_dir, json_path=json_path
    )
    try:
        console.annotate(detector, classes=class_ids, options=options, report=report, settings=settings)
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
        self.to_stderr = to_stderr
        self.left_out = source.left_out

    def print(self, line: str) -> None:
        """Print one line."""
        note(line, err=self.to_stderr)

    def annotate(
        self,
        detector: Detector,
        *,
        classes: tuple[int, ...] | None,
        options: AnnotateOptions,
        report: PredictionReport,
        settings: Mapping[str, Any],
    ) -> None:
        """Run the detector over the source and fill the report; a pipe gets no progress beside the lines."""
        from yolov7_deploy._console import progress
        from yolov7_deploy.workflows.predict import annotate

        detect = functools.partial(detector, classes=classes)
        run = functools.partial(annotate, detect, self._source, options=options, report=report)
        if self._source.total == 1 or not is_terminal(sys.stderr):
            run(on_frame=self._print_frame)
            return
        with progress("detect") as show:

            def on_frame(frame: Frame, detections: Detections) -> None:
                self._print_frame(frame, detections)
                show(frame.index + 1, self._source.total or 0)

            run(on_frame=on_frame)

    def print_summary(self, report: PredictionReport) -> None:
        """Print nothing more than `_finish` does."""

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
    console: DetectConsole | StreamsConsole,
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
        console.print_summary(report)
        if save_dir is not None and save_dir.is_dir():
            echo(f"Results saved to {save_dir}", err=console.to_stderr)
        if json_path == "-":
            write_json({**report.to_dict(), **settings}, json_path)
