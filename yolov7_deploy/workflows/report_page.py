"""The page of a deployment report: one HTML file with its styles, charts and images, which loads nothing."""

from __future__ import annotations

import base64
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from yolov7_deploy._atomic_file import PartialFile
from yolov7_deploy._bounded_read import open_file
from yolov7_deploy._console import plural
from yolov7_deploy._text import printable
from yolov7_deploy._version import __version__
from yolov7_deploy.benchmarking.benchmark import library_versions
from yolov7_deploy.datasets import Dataset
from yolov7_deploy.errors import UsageError
from yolov7_deploy.evaluation.accuracy import METRIC_TITLES
from yolov7_deploy.evaluation.image_differences import DetectedBox, ObjectDifference
from yolov7_deploy.evaluation.plots import draw_cell
from yolov7_deploy.hardware.machine import Machine, read_machine
from yolov7_deploy.image import Image, read_image
from yolov7_deploy.inspection.onnx_file import read_onnx
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.options import ReportOptions
from yolov7_deploy.paper import PaperRow, paper_row
from yolov7_deploy.runtimes.base import runtime_entry
from yolov7_deploy.visualize import jpeg_bytes
from yolov7_deploy.workflows.report import (
    ArtifactRecord,
    DeploymentReport,
    ImageRecord,
    LayerRanking,
    Progress,
    Show,
    collect_report,
)
from yolov7_deploy.workflows.report_charts import drop_svg, sensitivity_svg, speed_accuracy_svg

TEMPLATE = Path(__file__).with_name("report_page.html")
MAX_BYTES = 5_000_000  # of the page
IMAGE_PX = 560  # longer side of an image on the page
QUALITIES = (82, 65, 45, 25)  # of JPEG; the first with which the page is small enough
MAX_OBJECTS = 6  # of an image that are numbered and listed
MIN_VALUE = 0.005  # differences below are rounded to nothing in the table
MAX_LAYERS = 20  # layers in the table of sensitivities; the chart has all
DASH = "–"
HTML_START = b"<!doctype html"


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One half of a pair of images: data URL, alternative text, and size in pixels."""

    url: str
    alt: str
    width: int
    height: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """An image as the reference and another artifact detect it; `objects` are those with a number on the image."""

    path: Path
    record: ImageRecord
    sides: tuple[Side, Side]
    objects: tuple[ObjectDifference, ...]


@contextmanager
def _silent(_: str) -> Iterator[Progress]:
    yield lambda done, total: None


def write_report(
    reference: Path,
    others: Sequence[Path],
    *,
    data: Path,
    output: Path,
    options: ReportOptions = ReportOptions(),  # noqa: B008 - frozen
    bench: Sequence[Path] = (),
    sensitivity: Sequence[Path] = (),
    show: Show = _silent,
) -> DeploymentReport:
    """Compare artifacts with their reference, and write the page about it.

    The page is written if artifacts are wrong, too: it says so at its top.

    Args:
        reference: The weights that were deployed.
        others: Files made from them; ONNX files are run in every installed runtime.
        data: Dataset YAML or COCO JSON.
        output: The HTML file; one that exists is replaced.
        options: What to measure.
        bench: Files of `y7 bench --json`, which replace the measurement of the same file in the same runtime.
        sensitivity: Files of `y7 quantize --sensitivity --json` about some of the files.
        show: Opens a progress display for a step.

    Raises:
        UsageError: No file to compare was given, the output cannot be written, a JSON file is about another model
            file, or an artifact is of another model.
        DatasetError: The dataset is missing or malformed, or has other classes than the model.
        LoadError, MissingLibraryError, DeviceError: An artifact cannot be run.
    """
    if not others:
        raise UsageError("No file was given to compare with the weights.", fix="For example: --against yolov7.onnx")
    with _reserve(output) as file:
        report = collect_report(
            reference,
            others,
            data=data,
            output=output,
            options=options,
            bench=bench,
            sensitivity=sensitivity,
            show=show,
        )
        with show("draw") as progress:
            page = render_page(report, progress=progress)
        try:
            file.temporary.write_text(page, encoding="utf-8")
            file.commit()
        except OSError as error:
            raise _not_written(output, error) from error
    return report


@contextmanager
def _reserve(path: Path) -> Iterator[PartialFile]:
    """Yield the unfinished file of the page, which is created before minutes of work, and removed after an error.

    Raises:
        UsageError: It cannot be created, or would replace a file that is not HTML.
    """
    if path.is_dir():
        raise UsageError(f"{path} cannot be written: it is a folder.", fix="Choose another path.")
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{path} does not end in .html.", fix=f"--output {path}.html")
    if path.is_file() and not _is_html(path):
        raise UsageError(f"{path} exists and is not HTML. It is not replaced.", fix="Choose another path.")
    try:
        file = PartialFile(path)
    except OSError as error:
        raise _not_written(path, error) from error
    try:
        yield file
    finally:
        file.discard()


def _is_html(path: Path) -> bool:
    try:
        with open_file(path, max_bytes=2**40) as file:
            start = file.read(len(HTML_START)).lower()
    except OSError:
        return False
    return start in (b"", HTML_START)


def _not_written(path: Path, error: OSError) -> UsageError:
    return UsageError(f"{path} cannot be written: {error.strerror or error}.", fix="Choose another path.")


def render_page(report: DeploymentReport, *, progress: Callable[[int, int], None]) -> str:
    """Return the HTML of a report, less than `MAX_BYTES` long.

    Args:
        report: Its results.
        progress: Called with the number of drawn and of all images.

    Raises:
        UsageError: It is longer even with the smallest images, because of thousands of classes or artifacts.
    """
    template = _environment().get_template(TEMPLATE.name)
    context = _context(report)
    drawn = list(_draw_pairs(report, progress))
    for quality in QUALITIES:
        pairs = [_encode(*one, quality=quality) for one in drawn]
        page = template.render(**context, pairs=pairs)
        if len(page.encode()) < MAX_BYTES:
            return page
    raise UsageError(
        f"The page would have {len(page.encode()) / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:g}.",
        fix="Compare fewer files at once.",
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_readable,
    )
    environment.filters.update(
        breakable=_breakable,
        bytes=_bytes,
        hw=_hw,
        ms=_ms,
        number=_number,
        plural=lambda n, noun: plural(n, noun),
        signed=_signed,
        size=_size,
    )
    return environment


def _context(report: DeploymentReport) -> dict[str, Any]:
    reference = report.artifacts[0]
    speeds = [one.speed for one in report.artifacts if one.speed is not None]
    drops = [(one.name, one.drop) for one in report.artifacts if one.drop is not None]
    return {
        "report": report,
        "reference": reference,
        "others": report.artifacts[1:],
        "verdicts": sorted({one.verdict(report.options.max_drop) for one in report.artifacts[1:]}),
        "machine": _machine_rows(read_machine(), report),
        "metric_titles": METRIC_TITLES,
        "classes": _class_rows(report),
        "drop_chart": Markup(drop_svg(drops, max_drop=report.options.max_drop)),
        "speed_chart": Markup(speed_accuracy_svg(speeds)) if speeds else None,
        "paper": _paper(reference.metadata),
        "int8": [_int8(one, report) for one in _files(report) if one.metadata.precision == "int8"],
        "files": _files(report),
        "opsets": {one.path: _opset(one.path) for one in _files(report)},
        "speed_sources": _speed_sources(report),
        "created": report.created_at[:16].replace("T", " ") + " UTC",
        "version": __version__,
        "dash": DASH,
    }


# --- texts ------------------------------------------------------------------------------------------------------------


def _readable(value: object) -> object:
    """Return a value for the page: a dash for `None`; control characters of texts become escapes."""
    if value is None:
        return DASH
    return printable(value) if isinstance(value, str | Path) and not isinstance(value, Markup) else value


def _breakable(name: str) -> Markup:
    """Return a name as HTML that a line may break after each `_`, `.` and `-`."""
    return Markup(re.sub("([_.-])", r"\1<wbr>", str(escape(printable(name)))))


def _number(value: float | None, digits: int = 4) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


def _signed(value: float | None, digits: int = 2) -> str:
    """Return a number with its sign, with a real minus sign, and without one for zero."""
    if value is None:
        return DASH
    text = f"{round(value, digits) + 0.0:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def _ms(value: float | None) -> str:
    return DASH if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _bytes(value: int) -> str:
    return f"{value / 1e6:.1f} MB"


def _hw(value: tuple[int, int] | None) -> str:
    return "any" if value is None else f"{value[0]} × {value[1]}"


def _size(metadata: ModelMetadata) -> str:
    batch = "any batch" if metadata.batch is None else f"batch {metadata.batch}"
    return f"{_hw(metadata.input_hw)} (height × width), {batch}, {metadata.input_kind}"


# --- tables -----------------------------------------------------------------------------------------------------------


def _files(report: DeploymentReport) -> list[ArtifactRecord]:
    """Return the first record of each file; a file that runs in two runtimes has two records."""
    return list({one.path: one for one in reversed(report.artifacts)}.values())[::-1]


def _opset(path: Path) -> str | None:
    """Return the operator sets of an ONNX file; `None` for other files."""
    if path.suffix.lower() != ".onnx":
        return None
    return ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in read_onnx(path).opsets.items())


def _machine_rows(machine: Machine, report: DeploymentReport) -> dict[str, str]:
    """Return this machine and the versions of the libraries that ran the artifacts, by name."""
    runtimes = [runtime_entry(one.path, one.runtime) for one in report.artifacts]
    libraries = dict.fromkeys(("numpy", "opencv-python-headless", *(d for r in runtimes for d in r.distributions)))
    memory = "" if machine.memory_gb is None else f", {machine.memory_gb:g} GB memory"
    rows = {
        "system": machine.system,
        "CPU": f"{machine.cpu}, {machine.usable_cores} of {machine.cores} cores{memory}",
        **{f"GPU {i}": f"{gpu.name}, driver {gpu.driver}" for i, gpu in enumerate(machine.gpus)},
        **({"board": f"{machine.jetson.model}, {machine.jetson.jetpack}"} if machine.jetson else {}),
        "Python": platform.python_version(),
        "yolov7-deploy": __version__,
    }
    return rows | dict(library_versions(list(libraries)))


def _speed_sources(report: DeploymentReport) -> dict[str, list[str]]:
    """Return machine, images and file of the times, each with the names of the artifacts."""
    sources: dict[str, list[str]] = {}
    for one in report.artifacts:
        if one.speed is not None:
            origin = one.speed_source or "measured for this report"
            text = f"{one.speed.machine}, device {one.speed.device}; {one.speed.frames}; {origin}"
            sources.setdefault(text, []).append(one.name)
    return sources


def _class_rows(report: DeploymentReport) -> list[tuple[Any, list[float | None], float]]:
    """Return each class with boxes: its record of the reference, the AP of every artifact, and the largest loss.

    The class that loses most comes first.
    """
    columns = [one.accuracy.classes for one in report.artifacts]
    rows = []
    for one, *others in zip(*columns, strict=True):
        if one.instances:
            losses = [(one.ap or 0.0) - (other.ap or 0.0) for other in others]
            rows.append((one, [other.ap for other in (one, *others)], 100 * max(losses, default=0.0)))
    return sorted(rows, key=lambda row: -row[2])


def _paper(metadata: ModelMetadata) -> PaperRow | None:
    try:
        return paper_row(metadata.variant)
    except UsageError:
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Section:
    """Section about one INT8 file; `chart` and `layers` are there if its sensitivities are known."""

    artifact: ArtifactRecord
    ranking: LayerRanking | None
    chart: Markup | None
    floats: Mapping[str, str]

    @property
    def layers(self) -> list[Any]:
        """The most sensitive layers, the most sensitive first."""
        entries = [] if self.ranking is None else self.ranking.layers
        return sorted(entries, key=lambda entry: -entry.error)[:MAX_LAYERS]


def _int8(one: ArtifactRecord, report: DeploymentReport) -> Int8Section:
    floats = dict(one.metadata.int8.float_layers) if one.metadata.int8 else {}
    ranking, chart = report.rankings.get(one.sha256), None
    if ranking is not None:
        name = f"layers-{one.sha256[:8]}"
        chart = Markup(sensitivity_svg(ranking.layers, floats, name=name, path=one.path))
    return Int8Section(artifact=one, ranking=ranking, chart=chart, floats=floats)


# --- images -----------------------------------------------------------------------------------------------------------

Drawn = tuple["ImageRecord", Path, tuple[Image, Image], tuple[str, str], tuple[ObjectDifference, ...]]


def _draw_pairs(report: DeploymentReport, progress: Callable[[int, int], None]) -> Iterator[Drawn]:
    """Yield each record with its two images, their alternative texts, and the objects that have a number."""
    reference = report.artifacts[0]
    for done, record in enumerate(report.images, 1):
        path = report.dataset.path(record.index)
        image, objects = read_image(path), record.objects[record.worst]
        numbered = tuple(one for one in objects if one.value >= MIN_VALUE)[:MAX_OBJECTS]
        sides = [[one.reference for one in objects], [one.other for one in objects]]
        cells = [_draw_side(image, objects, boxes, len(numbered), report.dataset) for boxes in sides]
        texts = [
            f"{path.name}, {name}: {_count_text(objects, boxes, report.dataset)}"
            for name, boxes in zip((reference.name, record.worst), sides, strict=True)
        ]
        yield record, path, (cells[0], cells[1]), (texts[0], texts[1]), numbered
        progress(done, len(report.images))


def _draw_side(
    image: Image,
    objects: Sequence[ObjectDifference],
    boxes: Sequence[DetectedBox | None],
    numbered: int,
    dataset: Dataset,
) -> Image:
    """Return an image with the boxes above the threshold; the first ones have their number and score."""
    shown = [(i, box) for i, box in enumerate(boxes) if box is not None and box.shown]
    height, width = image.shape[:2]
    scale = min(1.0, IMAGE_PX / max(height, width))
    labels = [f"{i + 1} {class_name(dataset, objects[i])} {box.score:.2f}" if i < numbered else "" for i, box in shown]
    class_ids = [dataset.category_ids.index(objects[i].category_id) for i, _ in shown]
    coordinates = np.array([box.box for _, box in shown], dtype=np.float32).reshape(-1, 4)
    return draw_cell(
        image, coordinates, labels, class_ids, (max(1, round(height * scale)), max(1, round(width * scale)))
    )


def class_name(dataset: Dataset, one: ObjectDifference) -> str:
    """Return the name of the class of an object."""
    return dataset.class_names[dataset.category_ids.index(one.category_id)]


def _count_text(objects: Sequence[ObjectDifference], boxes: Sequence[DetectedBox | None], dataset: Dataset) -> str:
    """Return the number of detections per class as `person: 2, dog: 1`."""
    names = [class_name(dataset, one) for one, box in zip(objects, boxes, strict=True) if box is not None and box.shown]
    counts = {name: names.count(name) for name in sorted(set(names))}
    return ", ".join(f"{name}: {count}" for name, count in counts.items()) or "no detections"


def _encode(
    record: ImageRecord,
    path: Path,
    cells: tuple[Image, Image],
    texts: tuple[str, str],
    objects: tuple[ObjectDifference, ...],
    *,
    quality: int,
) -> Pair:
    first, second = (_side(cell, text, quality) for cell, text in zip(cells, texts, strict=True))
    return Pair(path=path, record=record, sides=(first, second), objects=objects)


def _side(cell: Image, text: str, quality: int) -> Side:
    data = base64.b64encode(jpeg_bytes(cell, quality=quality)).decode("ascii")
    height, width = cell.shape[:2]
    return Side(url=f"data:image/jpeg;base64,{data}", alt=text, width=width, height=height)
