"""INT8 engines compared with FP16 engines: speed, layers, agreement with ONNX Runtime, and AP."""

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

from tests.gpu.comparison import MATCHED_SHARE, compare_detections
from tests.gpu.engine_build import cached_engine
from tests.gpu.environment import KERNELS, PLUGIN, Array, Environment
from tests.gpu.targets import Targets
from yolov7_deploy.benchmarking.benchmark import measure_speed, synthetic_frames
from yolov7_deploy.benchmarking.comparison import compare_reports
from yolov7_deploy.benchmarking.report import SpeedReport
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import PluginError, Y7Error
from yolov7_deploy.inspection.engine_file import read_engine_file
from yolov7_deploy.options import BenchOptions, EngineOptions, ValOptions
from yolov7_deploy.tensorrt.builder import find_tensorrt
from yolov7_deploy.tensorrt.plugin_library import PLUGIN_VARIABLE, describe_plugin

MODELS = ("yolov7", "yolov7-tiny")  # the first has targets for speed and AP
BATCHES, EMULATED_BATCHES = (16, 1), (2, 1)  # the first has the speed target, AP is measured with the last
PRECISIONS = ("fp16", "int8")
FILE = "{model}-{precision}-b{batch}.onnx"
REFERENCE, ACCURACY = "{}-int8.npz", "{}-int8.json"
LABELS, IMAGES = "labelled.json", "labelled"
OPT_LEVEL = "3"  # TensorRT's default
BUILD_OPTIONS = ("--no-timing-cache",)  # so that build times are independent
FRAME_HW, EMULATED_HW = (1080, 1920), (96, 128)
SECONDS = 4.0  # per latency and per throughput measurement
WARM_UP_S = 10.0

MIN_SPEEDUP = 1.3
MAX_AP_LOSS = 0.003  # AP
# ONNX Runtime can compute an INT8 file in two ways, with integers or (`session.disable_quant_qdq`) in float. With
# trained YOLOv7 on 82 images of COCO their AP differs by 0.0001, and 98.7 % of their detections above 0.3 are the
# same by comparison.py; between float32 and INT8 it is 80 %. With the synthetic weights of yolov7-tiny, the two ways
# share 51 % of their detections.
MAX_AP_DIFFERENCE = 0.002
NO_GPU, NOT_TRAINED = "times without a GPU are meaningless", "the weights are synthetic"


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The comparison of engines in one run of the part.

    Attributes:
        env: Environment of the part.
        targets: Targets of the part.
        plugin: Plugin library for the installed TensorRT, if there is one.
        unbuilt: Files whose build failed; a build takes minutes, so it is not tried twice.
    """

    env: Environment
    targets: Targets
    plugin: Path | None
    unbuilt: set[str] = field(default_factory=set)

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes of the engines."""
        return EMULATED_BATCHES if self.env.emulated else BATCHES

    def engine(self, model: str, precision: str, batch: int) -> Path:
        """Return an engine, built now or in an earlier run.

        Raises:
            AssertionError: It cannot be built; see `engine_build.build` for more.
        """
        name = FILE.format(model=model, precision=precision, batch=batch)
        assert name not in self.unbuilt, f"the engine of {name} could not be built"
        self.unbuilt.add(name)
        engine = cached_engine(self.env, name, self.plugin, level=OPT_LEVEL, more=BUILD_OPTIONS)
        self.unbuilt.remove(name)
        return engine

    def steps(self, model: str) -> list[tuple[str, partial[None]]]:
        """Return what is measured for a model, by the name of the result."""
        pairs = [(f"{model} batch {batch}", partial(compare_engines, self, model, batch)) for batch in self.batches]
        return pairs + ([(f"{model} accuracy", partial(check_accuracy, self, model))] if model == MODELS[0] else [])


def measure(env: Environment) -> None:
    """Measure one model after the other; failures and missed targets are raised at the end, after all were tried."""
    if not env.emulated:
        measure_all(env)
        return
    from tests.gpu.fakes import fake_environment

    with fake_environment(env) as emulated:
        measure_all(emulated)


def measure_all(env: Environment) -> None:
    """Measure all models; see `measure`.

    Raises:
        AssertionError: A measurement failed, a target was missed, or nothing was measured.
    """
    targets = Targets(env)
    bench = Comparison(env=env, targets=targets, plugin=compatible_plugin(env))
    failed: list[str] = []
    available = [model for model in MODELS if (env.folder / REFERENCE.format(model)).exists()]
    for model in MODELS:
        if model not in available:
            targets.skip(model, "its files are missing")
            continue
        for name, step in bench.steps(model):
            try:
                step()
            except (AssertionError, OSError, subprocess.SubprocessError, RuntimeError, Y7Error) as error:
                env.record(name, {"failed": str(error)[-3000:]})
                failed.append(name)
    assert available, f"the files of {', '.join(MODELS)} are missing"
    assert not failed and not targets.missed, f"failed: {failed}, missed: {targets.missed}"


def compatible_plugin(env: Environment) -> Path | None:
    """Return the plugin library if it is built for the installed TensorRT."""
    library = env.folder / PLUGIN
    if not library.exists():
        return None
    tensorrt = find_tensorrt(EngineOptions())
    try:
        abi: str = describe_plugin(library).abi
    except PluginError as error:
        abi = error.message
    env.record("plugin", f"{abi}, and {tensorrt.product} {tensorrt.version} needs {tensorrt.abi}")
    return library if abi == tensorrt.abi else None


@contextmanager
def open_detector(env: Environment, engine: Path) -> Iterator[Detector]:
    """Open a Detector with the plugin that the engine was built with, else with our kernels if they are there."""
    record = read_engine_file(engine).record
    library = Path(record.plugin.path) if record and record.plugin else env.folder / KERNELS
    variables = {PLUGIN_VARIABLE: str(library)} if library.exists() else {}
    with patch.dict(os.environ, variables), Detector(engine, device="cuda:0") as detector:
        yield detector


# --- speed, layers, detections ----------------------------------------------------------------------------------------


def compare_engines(bench: Comparison, model: str, batch: int) -> None:
    """Build both engines, measure them one after the other, and compare their detections with ONNX Runtime in INT8.

    FP16 agrees less with it, which shows that the comparison is meaningful. With synthetic weights, where rounding
    decides which boxes are detected, the agreement is recorded but not a target.
    """
    env, name = bench.env, f"{model} batch {batch}"
    reference = dict(np.load(env.folder / REFERENCE.format(model)))
    reports: dict[str, SpeedReport] = {}
    found: dict[str, dict[str, float]] = {}
    for precision in PRECISIONS:
        engine = bench.engine(model, precision, batch)
        with open_detector(env, engine) as detector:
            reports[precision] = report = _speed(env, detector, batch)
            found[precision] = compare_with_reference(detector, reference)
        env.record(f"{name} {precision}", engine_summary(engine) | {"report": report.to_dict()})
    speedups = speedup(reports["fp16"], reports["int8"])
    env.record(name, {**speedups, "as INT8 in ONNX Runtime": found})
    trained, share = bool(reference["trained"]), found["int8"]["share"]
    _check_parity(bench, f"{name}: detections as in ONNX Runtime", share, trained=trained)
    if (model, batch) == (MODELS[0], bench.batches[0]):
        _check_speed(bench, f"{name}: INT8 to FP16, throughput of the engine", speedups["engine_times_faster"])


def _check_parity(bench: Comparison, target: str, share: float, *, trained: bool) -> None:
    if trained:
        bench.targets.at_least(target, share, MATCHED_SHARE)
    else:
        bench.targets.skip(target, NOT_TRAINED)


def _check_speed(bench: Comparison, target: str, times_faster: float) -> None:
    if bench.env.emulated:
        bench.targets.skip(target, NO_GPU)
    else:
        bench.targets.at_least(target, times_faster, MIN_SPEEDUP)


def _speed(env: Environment, detector: Detector, batch: int) -> SpeedReport:
    """Measure the speed as `y7 bench` does."""
    seconds, warm_up_s = (0.1, 0.1) if env.emulated else (SECONDS, WARM_UP_S)
    frames = synthetic_frames(EMULATED_HW if env.emulated else FRAME_HW)
    options = BenchOptions(batches=(batch,), duration_s=seconds, warmup_s=warm_up_s)
    return measure_speed(detector, frames, options=options)


def engine_summary(engine: Path) -> dict[str, object]:
    """Return what the build record and the inspector contain about an engine."""
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


def speedup(fp16: SpeedReport, int8: SpeedReport) -> dict[str, float]:
    """Return how many times faster INT8 is, by the median of a stage, with the 95 % interval if there is one."""
    compare_executions = {one.stage: one for one in compare_reports(fp16, int8).differences}
    result = {}
    for name in ("engine", "end_to_end"):
        before, now = fp16.rows[0].stage(name).p50, int8.rows[0].stage(name).p50
        result[f"{name}_times_faster"] = round(before / now, 4) if now else math.nan
        interval = compare_executions.get(name)
        if interval is not None and interval.low and interval.high:
            result[f"{name}_times_faster_low"] = round(1 / interval.high, 4)
            result[f"{name}_times_faster_high"] = round(1 / interval.low, 4)
    return result


def compare_with_reference(detector: Detector, reference: Mapping[str, Array]) -> dict[str, float]:
    """Count the detections of ONNX Runtime, except those close to the threshold, that the engine finds too."""
    found = detector.batch(list(reference["canvases"]))
    matched = total = 0
    for number, one in enumerate(found):
        parts = [reference[f"{part}_{number}"] for part in ("boxes", "scores", "classes")]
        expected = detections_dict(*parts, least=float(reference["least"]))
        row = compare_detections(detections_dict(one.boxes, one.scores, one.class_ids), expected)
        matched, total = matched + int(str(row["matched"])), total + int(str(row["reference"]))
    share = matched / total if total else 0.0
    return {"images": len(found), "detections": sum(map(len, found)), "reference": total, "share": share}


def detections_dict(boxes: Array, scores: Array, classes: Array, *, least: float = 0.0) -> dict[str, Array]:
    """Return detections above a score in the format of `compare_detections`, without boxes of zero area."""
    kept = (scores > least) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    return {
        "num_dets": np.array([kept.sum()]),
        "det_boxes": boxes[kept],
        "det_scores": scores[kept],
        "det_classes": classes[kept],
    }


# --- AP ---------------------------------------------------------------------------------------------------------------


def check_accuracy(bench: Comparison, model: str) -> None:
    """Compare the AP of both engines with that of the float32 and the INT8 file in ONNX Runtime on the same images."""
    loss, difference = f"{model}: AP that INT8 loses", f"{model}: AP between the INT8 engine and ONNX Runtime"
    folder, targets = bench.env.folder, bench.targets
    accuracy = json.loads((folder / ACCURACY.format(model)).read_text(encoding="utf-8"))
    why = accuracy.get("skipped", "")
    try:
        from yolov7_deploy.datasets import open_dataset
        from yolov7_deploy.evaluation.accuracy import evaluate
        from yolov7_deploy.evaluation.accuracy_drop import accuracy_drop
    except ImportError as error:
        why = why or f"faster_coco_eval is for another Python version: {error}"
    if why:
        for name in (loss, difference):
            targets.skip(name, why)
        return
    dataset = open_dataset(folder / LABELS, images=folder / IMAGES)
    reports = {}
    for precision in PRECISIONS:
        engine = bench.engine(model, precision, bench.batches[-1])
        with open_detector(bench.env, engine) as detector:
            reports[precision] = evaluate(detector, dataset, options=ValOptions(rect=False, batch=1))
    report = reports["int8"]
    drop = accuracy_drop(dataset, range(len(dataset)), accuracy["fp32"]["predictions"], report.predictions)
    result: dict[str, object] = {f"{name} engine": one.ap for name, one in reports.items()}
    result |= {f"{name} ONNX Runtime": accuracy[name]["ap"] for name in ("fp32", "int8")}
    result |= {"drop": drop.to_dict(), "images": report.images, "notes": report.notes}
    bench.env.record(f"{model} accuracy", result)
    assert report.images == accuracy["int8"]["images"], f"{report.skipped} could not be read"
    ap = math.nan if report.ap is None else report.ap
    targets.at_most(loss, accuracy["fp32"]["ap"] - ap, MAX_AP_LOSS)
    targets.at_most(difference, abs(ap - accuracy["int8"]["ap"]), MAX_AP_DIFFERENCE)
