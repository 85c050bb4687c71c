"""INT8 engines beside FP16 ones of the same network: speed, layers, the detections of ONNX Runtime, and AP."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np

from tests.gpu.building import kept_engine
from tests.gpu.comparing import MATCHED_SHARE, compare_detections
from tests.gpu.environment import KERNELS, PLUGIN, Array, Setting
from tests.gpu.targets import Goals
from yolov7_deploy.benchmark.benchmark import measure_speed
from yolov7_deploy.benchmark.comparison import compare_reports
from yolov7_deploy.benchmark.inputs import drawn_frames
from yolov7_deploy.benchmark.report import SpeedReport
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import PluginError, Y7Error
from yolov7_deploy.inspection.engine_file import read_engine_file
from yolov7_deploy.options import BenchOptions, EngineOptions, ValOptions
from yolov7_deploy.tensorrt.plugin_library import PLUGIN_VARIABLE, describe_plugin
from yolov7_deploy.tensorrt.selection import find_tensorrt

MODELS = ("yolov7", "yolov7-tiny")  # the first has goals of speed and AP
BATCHES, EMULATED_BATCHES = (16, 1), (2, 1)  # the first has the goal of speed, the last is for AP
PRECISIONS = ("fp16", "int8")
FILE = "{model}-{precision}-b{batch}.onnx"
REFERENCE, ACCURACY = "{}-int8.npz", "{}-int8.json"
LABELS, IMAGES = "labelled.json", "labelled"
OPT_LEVEL = "3"  # TensorRT's own
ALONE = ("--no-timing-cache",)  # what one build measured would shorten the next
FRAME_HW, EMULATED_HW = (1080, 1920), (96, 128)
SECONDS = 4.0  # of each half of a row
WARM_UP_S = 10.0

TIMES_FASTER = 1.3
MOST_LOST = 0.003  # AP
# ONNX Runtime can compute an INT8 file in two ways, with integers or (`session.disable_quant_qdq`) in float. With
# trained YOLOv7 on 82 images of COCO their AP differs by 0.0001, and 98.7 % of their detections above 0.3 are the
# same by comparing.py; of float32 and INT8 it is 80 %. With the made-up weights of yolov7-tiny it is 51 % of its own.
MOST_FROM_ORT = 0.002
NO_GPU, NOT_TRAINED = "times without a GPU mean nothing", "the weights are made up"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """Where engines are compared.

    Attributes:
        setting: Of the part.
        goals: Of the part.
        plugin: The library for the TensorRT that is here, if it was brought.
        unbuilt: Files whose build failed, which takes minutes and is not tried again.
    """

    setting: Setting
    goals: Goals
    plugin: Path | None
    unbuilt: set[str] = field(default_factory=set)

    @property
    def batches(self) -> tuple[int, ...]:
        """Of the engines."""
        return EMULATED_BATCHES if self.setting.emulated else BATCHES

    def engine(self, model: str, precision: str, batch: int) -> Path:
        """Built now, or in an earlier run.

        Raises:
            AssertionError: It was not built; see `building.build` for more.
        """
        name = FILE.format(model=model, precision=precision, batch=batch)
        assert name not in self.unbuilt, f"the engine of {name} could not be built"
        self.unbuilt.add(name)
        engine = kept_engine(self.setting, name, self.plugin, level=OPT_LEVEL, more=ALONE)
        self.unbuilt.remove(name)
        return engine

    def steps(self, model: str) -> list[tuple[str, partial[None]]]:
        """What is done with a model, by the name of its result."""
        pairs = [(f"{model} batch {batch}", partial(compare_engines, self, model, batch)) for batch in self.batches]
        return pairs + ([(f"{model} accuracy", partial(judge_accuracy, self, model))] if model == MODELS[0] else [])


def measure(setting: Setting) -> None:
    """One model after the other; what failed or was missed is raised at the end, when all was tried."""
    if not setting.emulated:
        measure_all(setting)
        return
    from tests.gpu.fakes import stand_ins

    with stand_ins(setting) as emulated:
        measure_all(emulated)


def measure_all(setting: Setting) -> None:
    """See `measure`.

    Raises:
        AssertionError: Something failed, a goal was missed, or nothing was measured.
    """
    goals = Goals(setting)
    bench = Bench(setting=setting, goals=goals, plugin=fitting_plugin(setting))
    failed: list[str] = []
    brought = [model for model in MODELS if (setting.folder / REFERENCE.format(model)).exists()]
    for model in MODELS:
        if model not in brought:
            goals.skip(model, "was not brought")
            continue
        for name, step in bench.steps(model):
            try:
                step()
            except (AssertionError, OSError, subprocess.SubprocessError, RuntimeError, Y7Error) as error:
                setting.record(name, {"failed": str(error)[-3000:]})
                failed.append(name)
    assert brought, f"neither of {', '.join(MODELS)} was brought"
    assert not failed and not goals.missed, f"failed: {failed}, missed: {goals.missed}"


def fitting_plugin(setting: Setting) -> Path | None:
    """The plugin library that was brought, if it is for the TensorRT that is here."""
    library = setting.folder / PLUGIN
    if not library.exists():
        return None
    found = find_tensorrt(EngineOptions())
    try:
        abi: str = describe_plugin(library).abi
    except PluginError as error:
        abi = error.message
    setting.record("plugin", f"{abi}, and {found.product} {found.version} takes {found.abi}")
    return library if abi == found.abi else None


@contextmanager
def opened(setting: Setting, engine: Path) -> Iterator[Detector]:
    """A Detector with the plugin that the engine was built with, else with our kernels where they were brought."""
    record = read_engine_file(engine).record
    library = Path(record.plugin.path) if record and record.plugin else setting.folder / KERNELS
    chosen = {PLUGIN_VARIABLE: str(library)} if library.exists() else {}
    with patch.dict(os.environ, chosen), Detector(engine, device="cuda:0") as detector:
        yield detector


# --- speed, layers, detections ----------------------------------------------------------------------------------------


def compare_engines(bench: Bench, model: str, batch: int) -> None:
    """Builds both engines, measures them one after the other, and compares what they find with ONNX Runtime's INT8.

    FP16 finds less of that, which shows what the comparison is worth. Where the last bit decides what is found, with
    made-up weights, it is told and not judged.
    """
    setting, name = bench.setting, f"{model} batch {batch}"
    reference = dict(np.load(setting.folder / REFERENCE.format(model)))
    reports: dict[str, SpeedReport] = {}
    found: dict[str, dict[str, float]] = {}
    for precision in PRECISIONS:
        engine = bench.engine(model, precision, batch)
        with opened(setting, engine) as detector:
            reports[precision] = report = _speed(setting, detector, batch)
            found[precision] = compare_with_reference(detector, reference)
        setting.record(f"{name} {precision}", described(engine) | {"report": report.to_dict()})
    faster = ratios(reports["fp16"], reports["int8"])
    setting.record(name, {**faster, "as INT8 in ONNX Runtime": found})
    trained, share = bool(reference["trained"]), found["int8"]["share"]
    _judge_parity(bench, f"{name}: detections as in ONNX Runtime", share, trained=trained)
    if (model, batch) == (MODELS[0], bench.batches[0]):
        _judge_speed(bench, f"{name}: INT8 to FP16, throughput of the engine", faster["engine_times_faster"])


def _judge_parity(bench: Bench, goal: str, share: float, *, trained: bool) -> None:
    if trained:
        bench.goals.at_least(goal, share, MATCHED_SHARE)
    else:
        bench.goals.skip(goal, NOT_TRAINED)


def _judge_speed(bench: Bench, goal: str, times_faster: float) -> None:
    if bench.setting.emulated:
        bench.goals.skip(goal, NO_GPU)
    else:
        bench.goals.at_least(goal, times_faster, TIMES_FASTER)


def _speed(setting: Setting, detector: Detector, batch: int) -> SpeedReport:
    """As `y7 bench` measures it."""
    seconds, warm_up_s = (0.1, 0.1) if setting.emulated else (SECONDS, WARM_UP_S)
    frames = drawn_frames(EMULATED_HW if setting.emulated else FRAME_HW)
    options = BenchOptions(batches=(batch,), duration_s=seconds, warmup_s=warm_up_s)
    return measure_speed(detector, frames, options=options)


def described(engine: Path) -> dict[str, object]:
    """What the build record and the inspector say of an engine."""
    file = read_engine_file(engine)
    record = file.record
    assert record is not None, "y7 build writes a record"
    int8 = record.metadata.int8
    return {
        "build_s": record.build_s,
        "plan_bytes": file.size_bytes,
        "tensorrt": f"{file.product} {file.tensorrt}",
        "NMS": record.nms_by,
        "strongly_typed": record.strongly_typed,
        "flags": record.flags,
        "layers": asdict(file.summary) if file.summary else None,
        "int8_convolutions_in_file": int8.int8_convolutions if int8 else 0,
        "notes": file.notes,
    }


def ratios(fp16: SpeedReport, int8: SpeedReport) -> dict[str, float]:
    """How many times faster INT8 is, by the median of a span, and the 95 % interval of that where there is one."""
    compared = {one.span: one for one in compare_reports(fp16, int8).differences}
    result = {}
    for name in ("engine", "end_to_end"):
        before, now = fp16.rows[0].span(name).p50, int8.rows[0].span(name).p50
        result[f"{name}_times_faster"] = round(before / now, 4) if now else math.nan
        interval = compared.get(name)
        if interval is not None and interval.low and interval.high:
            result[f"{name}_times_faster_low"] = round(1 / interval.high, 4)
            result[f"{name}_times_faster_high"] = round(1 / interval.low, 4)
    return result


def compare_with_reference(detector: Detector, reference: Mapping[str, Array]) -> dict[str, float]:
    """How many detections of ONNX Runtime the engine has too, of those that are not close to the threshold."""
    found = detector.batch(list(reference["canvases"]))
    matched = wanted = 0
    for number, one in enumerate(found):
        parts = [reference[f"{part}_{number}"] for part in ("boxes", "scores", "classes")]
        expected = listed(*parts, least=float(reference["least"]))
        row = compare_detections(listed(one.boxes, one.scores, one.class_ids), expected)
        matched, wanted = matched + int(str(row["matched"])), wanted + int(str(row["reference"]))
    share = matched / wanted if wanted else 0.0
    return {"images": len(found), "detections": sum(map(len, found)), "reference": wanted, "share": share}


def listed(boxes: Array, scores: Array, classes: Array, *, least: float = 0.0) -> dict[str, Array]:
    """Detections above a score as `compare_detections` takes them; boxes without area overlap not even themselves."""
    kept = (scores > least) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    return {
        "num_dets": np.array([kept.sum()]),
        "det_boxes": boxes[kept],
        "det_scores": scores[kept],
        "det_classes": classes[kept],
    }


# --- AP ---------------------------------------------------------------------------------------------------------------


def judge_accuracy(bench: Bench, model: str) -> None:
    """AP of both engines beside ONNX Runtime's of the float32 and the INT8 file on the same images."""
    lost, apart = f"{model}: AP that INT8 loses", f"{model}: AP between the INT8 engine and ONNX Runtime"
    folder, goals = bench.setting.folder, bench.goals
    told = json.loads((folder / ACCURACY.format(model)).read_text(encoding="utf-8"))
    why = told.get("skipped", "")
    try:
        from yolov7_deploy.datasets import open_dataset
        from yolov7_deploy.evaluation.accuracy import evaluate
        from yolov7_deploy.evaluation.accuracy_drop import accuracy_drop
    except ImportError as error:
        why = why or f"what judges AP was brought for another Python: {error}"
    if why:
        for name in (lost, apart):
            goals.skip(name, why)
        return
    dataset = open_dataset(folder / LABELS, images=folder / IMAGES)
    reports = {}
    for precision in PRECISIONS:
        engine = bench.engine(model, precision, bench.batches[-1])
        with opened(bench.setting, engine) as detector:
            reports[precision] = evaluate(detector, dataset, options=ValOptions(rect=False, batch=1))
    report = reports["int8"]
    drop = accuracy_drop(dataset, range(len(dataset)), told["fp32"]["predictions"], report.predictions)
    result: dict[str, object] = {f"{name} engine": one.ap for name, one in reports.items()}
    result |= {f"{name} ONNX Runtime": told[name]["ap"] for name in ("fp32", "int8")}
    result |= {"drop": drop.to_dict(), "images": report.images, "notes": report.notes}
    bench.setting.record(f"{model} accuracy", result)
    assert report.images == told["int8"]["images"], f"{report.skipped} could not be read here"
    ap = math.nan if report.ap is None else report.ap
    goals.at_most(lost, told["fp32"]["ap"] - ap, MOST_LOST)
    goals.at_most(apart, abs(ap - told["int8"]["ap"]), MOST_FROM_ORT)
