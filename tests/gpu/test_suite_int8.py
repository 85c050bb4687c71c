"""The part `int8` of the GPU suite with fakes of TensorRT and a GPU: its measurements and targets."""

import json
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import onnx
import pytest

pytest.importorskip("torch")
pytest.importorskip("faster_coco_eval")

from tests.fakes.emulated_kernels import compile_described
from tests.gpu import PARTS, engine_build, fakes, int8, int8_files, targets, weights
from tests.gpu import __main__ as gpu_suite
from tests.gpu.environment import PLUGIN, Environment
from tests.support.engines import HAS_RTX, NO_RTX
from tests.support.sample_images import noise
from tests.support.small_models import exported_tiny, metadata_of, tiny
from yolov7_deploy.benchmarking import benchmark as speed
from yolov7_deploy.benchmarking import sampling
from yolov7_deploy.checkpoint import Checkpoint, save_checkpoint
from yolov7_deploy.detector import Detector
from yolov7_deploy.evaluation.synthetic_image import street_scene
from yolov7_deploy.hardware.gpu import list_cuda_gpus
from yolov7_deploy.inspection.engine_file import read_engine_file
from yolov7_deploy.precision.fp16 import to_fp16
from yolov7_deploy.precision.int8_summary import summarize_int8
from yolov7_deploy.tensorrt.inspector import engine_layers
from yolov7_deploy.tensorrt.onnx_rewrite import open_onnx
from yolov7_deploy.visualize import write_image

SIDE, BATCHES = 128, (2, 1)
CONF = 0.5
MODEL = int8.MODELS[0]
SPEED = f"{MODEL} batch 2: INT8 to FP16, throughput of the engine"
PARITY = [f"{MODEL} batch {batch}: detections as in ONNX Runtime" for batch in BATCHES]
AP_LOSS, AP_DIFFERENCE = f"{MODEL}: AP that INT8 loses", f"{MODEL}: AP between the INT8 engine and ONNX Runtime"
needs_rtx = pytest.mark.skipif(not HAS_RTX, reason=NO_RTX)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with the weights of a small network, and images labelled with its detections."""
    source = tmp_path_factory.mktemp("source")
    model = tiny()
    names = metadata_of(model).class_names
    checkpoint = Checkpoint(
        tensors=model.state_dict(), variant="yolov7-tiny", training=False, class_names=names, anchors=model.anchors
    )
    save_checkpoint(checkpoint, source / "weights.safetensors")
    for number in range(4):
        write_image(source / f"{number}.png", noise(96, 128, number))
    (source / "labels.json").write_text(json.dumps(labels(source, names)))
    return source


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory):
    """The files that `prepare` writes from `source`."""
    folder = tmp_path_factory.mktemp("prepared")
    int8_files.write_int8(
        folder,
        models=(MODEL,),
        weights=source / "weights.safetensors",
        data=source / "labels.json",
        side=SIDE,
        batches=BATCHES,
    )
    return folder


def labels(folder, names):
    """Return COCO annotations that contain the detections of the network, with the thresholds of the evaluation."""
    images, annotations = [], []
    protocol = {"conf": CONF, "iou": 0.65, "max_det": 300, "multi_label": True}
    with Detector(folder / "weights.safetensors", img=SIDE, device="cpu", **protocol) as detector:
        for number, path in enumerate(sorted(folder.glob("*.png")), 1):
            found = detector(path)
            height, width = found.image_hw
            images.append({"id": number, "file_name": path.name, "height": height, "width": width})
            for row in found.to_coco(number, category_ids=range(1, len(names) + 1)):
                _, _, w, h = row["bbox"]
                box = {"bbox": row["bbox"], "area": w * h, "iscrowd": 0, "category_id": row["category_id"]}
                annotations.append({"id": len(annotations) + 1, "image_id": number, **box})
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def env(prepared, tmp_path, monkeypatch):
    """An emulated environment with a copy of these files, short measurements and no limit on AP loss."""
    folder = tmp_path / "files"
    shutil.copytree(prepared, folder)
    monkeypatch.setattr(int8, "MODELS", (MODEL,))
    monkeypatch.setattr(int8, "MAX_AP_LOSS", 1.0)
    monkeypatch.setattr(speed, "SLICE_S", 0.0)
    monkeypatch.setattr(speed, "MIN_CALLS", 8)
    monkeypatch.setattr(sampling, "STABLE_BLOCK_S", 0.0)
    with fakes.fake_tensorrt(folder):
        yield Environment(folder=folder, result=tmp_path / "result.json", emulated=True)


@pytest.fixture
def bench(env):
    return int8.Comparison(env=env, targets=targets.Targets(env), plugin=None)


def results(env):
    return json.loads(env.result.read_text())


def met(env):
    return {name: row["met"] for name, row in results(env)["targets"].items()}


# --- prepared files ---------------------------------------------------------------------------------------------------


def test_the_file_of_another_batch_size_is_stored_without_weights_and_detects_the_same(prepared, tmp_path):
    sizes = {}
    for precision in int8.PRECISIONS:
        for batch in BATCHES:
            path = prepared / int8.FILE.format(model=MODEL, precision=precision, batch=batch)
            sizes[precision, batch] = path.stat().st_size
            (tmp_path / path.name).write_bytes(weights.with_weights(path.read_bytes(), prepared))
    first, second = BATCHES
    assert all(sizes[precision, second] < sizes[precision, first] / 5 for precision in int8.PRECISIONS)
    assert sizes["int8", first] < 0.6 * sizes["fp16", first]
    images = [noise(96, 128, seed) for seed in range(2)]
    for precision in int8.PRECISIONS:
        names = [int8.FILE.format(model=MODEL, precision=precision, batch=batch) for batch in BATCHES]
        with Detector(tmp_path / names[0], device="cpu") as two, Detector(tmp_path / names[1], device="cpu") as one:
            assert (two.metadata.batch, one.metadata.batch, one.metadata.precision) == (2, 1, precision)
            for found, expected in zip(two.batch(images), one.batch(images), strict=True):
                assert len(found) > 5
                np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)


def test_a_file_with_a_larger_batch_is_converted_to_fp16_with_one_image():
    model = exported_tiny(batch=2)
    assert int8_files.to_fp16_one_image(model).proto == to_fp16(model, [street_scene()]).proto
    assert int8_files.to_fp16_one_image(model).metadata == to_fp16(model, [street_scene()]).metadata


def test_weights_of_another_file_are_not_stored_twice(tmp_path):
    values = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    shared = onnx.numpy_helper.from_array(values, "a")
    small, own = (onnx.numpy_helper.from_array(values[:rows] + 1, name) for rows, name in ((1, "b"), (64, "c")))
    files = [
        onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], initializer=tensors)).SerializeToString()
        for tensors in ([shared], [onnx.numpy_helper.from_array(values, "other name"), small, own])
    ]
    known = {}
    assert weights.without_shared_weights(files[0], known, file="first.onnx") == files[0]
    left = weights.without_shared_weights(files[1], known, file="second.onnx")
    assert len(files[1]) - len(left) == pytest.approx(values.nbytes, rel=0.01)
    (tmp_path / "first.onnx").write_bytes(files[0])
    assert weights.with_weights(left, tmp_path) == files[1]
    with pytest.raises(AssertionError, match=r"other name is in first\.onnx"):
        weights.with_weights(left)


def test_synthetic_int8_weights_are_removed_and_restored():
    made = weights.synthetic_weights("a.weight", (64, 32, 3, 3))
    rounded = weights.quantize_weight(made).values
    tensors = [onnx.numpy_helper.from_array(value, "a.weight__int8") for value in (rounded, rounded[::-1].copy())]
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], initializer=tensors))
    before = model.SerializeToString()
    left = weights.without_weights(model, {"a.weight"})
    assert len(before) - len(left) == pytest.approx(rounded.nbytes, rel=0.01), "the other tensor is not synthetic"
    assert weights.with_weights(left) == before


def test_labelled_images_are_stored_with_the_detections_of_onnx_runtime(prepared):
    accuracy = json.loads((prepared / int8.ACCURACY.format(MODEL)).read_text())
    assert (
        len(list((prepared / int8.IMAGES).iterdir())) == accuracy["fp32"]["images"] == accuracy["int8"]["images"] == 4
    )
    assert accuracy["fp32"]["ap"] > 0.7, "the labels are the detections of float32"
    assert len(accuracy["int8"]["predictions"]) > 20


def test_without_labels_or_trained_weights_the_reason_is_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(int8_files, "MODELS", ("yolov7-tiny",))
    int8_files.write_int8(tmp_path, models=("yolov7-tiny",), data=tmp_path / "absent.json", side=SIDE, batches=(1,))
    assert json.loads((tmp_path / "yolov7-tiny-int8.json").read_text()) == {"skipped": int8.NOT_TRAINED}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2**20, "synthetic weights are removed"
    assert not np.load(tmp_path / "yolov7-tiny-int8.npz")["trained"]


# --- measurements -----------------------------------------------------------------------------------------------------


def test_both_engines_are_measured_described_and_compared(env):
    int8.measure_all(env)
    accuracy = results(env)
    file = open_onnx(env.folder / "engines" / int8.FILE.format(model=MODEL, precision="int8", batch=2))
    expected = summarize_int8(file.proto)
    for batch in BATCHES:
        fp16_row, int8_row = (accuracy[f"{MODEL} batch {batch} {precision}"] for precision in int8.PRECISIONS)
        assert fp16_row["layers"]["convolutions"] == {"fp16": len(expected.convolutions)}
        assert int8_row["layers"]["convolutions"]["int8"] == int8_row["int8_convolutions_in_file"] > 50
        assert int8_row["layers"]["convolutions"]["int8"] == expected.int8_convolutions
        assert int8_row["layers"]["reformats"] == 1
        assert int8_row["plan_bytes"] < 0.6 * fp16_row["plan_bytes"]
        assert [row["batch"] for row in int8_row["report"]["rows"]] == [batch]
        compare_executions = accuracy[f"{MODEL} batch {batch}"]
        assert compare_executions["engine_times_faster"] > 0 and compare_executions["end_to_end_times_faster"] > 0
        found = compare_executions["as INT8 in ONNX Runtime"]
        assert found["int8"]["reference"] > 1000
        assert found["int8"]["share"] > 0.998, "ONNX Runtime is used in place of TensorRT; rounding may change a tie"
        assert found["fp16"]["share"] < 0.9, "FP16 has different detections"
    assert met(env) == {SPEED: None, **dict.fromkeys([*PARITY, AP_LOSS, AP_DIFFERENCE], True)}
    assert accuracy["targets"][SPEED]["why"] == int8.NO_GPU
    accuracy = accuracy[f"{MODEL} accuracy"]
    assert accuracy["int8 engine"] == pytest.approx(accuracy["int8 ONNX Runtime"], abs=1e-3)
    assert accuracy["fp16 engine"] > 0.7 and accuracy["images"] == 4
    assert accuracy["drop"]["points"] == pytest.approx(100 * (accuracy["fp32 ONNX Runtime"] - accuracy["int8 engine"]))


def test_an_engine_of_an_earlier_run_is_not_built_again(bench):
    engine = bench.engine(MODEL, "int8", 1)
    (bench.env.folder / engine.with_suffix(".onnx").name).unlink()
    assert bench.engine(MODEL, "int8", 1) == engine


@pytest.mark.parametrize(("limit", "is_met"), [(0.0, True), (1e9, False)])
def test_the_speed_target_is_evaluated_on_a_gpu(env, monkeypatch, limit, is_met):
    monkeypatch.setattr(int8, "MIN_SPEEDUP", limit)
    monkeypatch.setattr(int8, "BATCHES", BATCHES)
    monkeypatch.setattr(int8, "FRAME_HW", int8.EMULATED_HW)
    monkeypatch.setattr(int8, "SECONDS", 0.0)
    monkeypatch.setattr(int8, "WARM_UP_S", 0.0)
    env.emulated = False
    bench = int8.Comparison(env=env, targets=targets.Targets(env), plugin=None)
    int8.compare_engines(bench, MODEL, 2)
    row = results(env)["targets"][SPEED]
    assert row["met"] is is_met
    assert row["found"] == results(env)[f"{MODEL} batch 2"]["engine_times_faster"]


def test_detections_that_differ_from_onnx_runtime_miss_the_target(bench):
    path = bench.env.folder / int8.REFERENCE.format(MODEL)
    reference = dict(np.load(path))
    np.savez(path, **{name: rows + 9 if name.startswith("boxes") else rows for name, rows in reference.items()})
    int8.compare_engines(bench, MODEL, 1)
    assert bench.targets.missed == [PARITY[1]]
    assert results(bench.env)["targets"][PARITY[1]]["found"] < 0.5


@pytest.mark.parametrize(
    ("precision", "ap", "missed"),
    [("fp32", 2.5, [AP_LOSS]), ("int8", 1.5, [AP_DIFFERENCE]), ("fp32", float("nan"), [AP_LOSS])],
)
def test_an_ap_too_far_from_onnx_runtime_misses_the_target(bench, precision, ap, missed):
    path = bench.env.folder / int8.ACCURACY.format(MODEL)
    accuracy = json.loads(path.read_text())
    accuracy[precision]["ap"] = ap
    path.write_text(json.dumps(accuracy))
    int8.check_accuracy(bench, MODEL)
    assert bench.targets.missed == missed


def test_a_missed_target_fails_the_part(env, monkeypatch):
    monkeypatch.setattr(int8, "MAX_AP_LOSS", -1.0)
    with pytest.raises(AssertionError, match=f"failed: .., missed: .*{AP_LOSS}"):
        int8.measure_all(env)
    assert met(env) == {SPEED: None, AP_LOSS: False, **dict.fromkeys([*PARITY, AP_DIFFERENCE], True)}


def test_an_engine_that_cannot_be_built_fails_the_part_after_the_other_measurements(env):
    name = int8.FILE.format(model=MODEL, precision="int8", batch=1)
    (env.folder / name).unlink()
    with pytest.raises(AssertionError, match=rf"failed: \['{MODEL} batch 1', '{MODEL} accuracy'\], missed: \[\]"):
        int8.measure_all(env)
    assert name in results(env)[f"{MODEL} batch 1"]["failed"]
    assert results(env)[f"{MODEL} accuracy"]["failed"] == f"the engine of {name} could not be built", "no second try"
    assert met(env) == {SPEED: None, PARITY[0]: True}, "targets that were not measured are not listed"


def test_ap_that_cannot_be_measured_is_skipped_with_the_reason(bench, monkeypatch):
    for module in ("accuracy", "drop"):
        monkeypatch.delitem(sys.modules, f"yolov7_deploy.evaluation.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    int8.check_accuracy(bench, MODEL)
    rows = results(bench.env)["targets"]
    assert [row["met"] for row in rows.values()] == [None, None]
    assert all("faster_coco_eval" in row["why"] for row in rows.values())


def test_the_part_fails_without_any_files(tmp_path):
    env = Environment(folder=tmp_path, result=tmp_path / "result.json")
    with pytest.raises(AssertionError, match="the files of yolov7, yolov7-tiny are missing"):
        int8.measure_all(env)
    assert met(env) == dict.fromkeys(int8.MODELS)


# --- summary of targets, and choice of the Python interpreter ---------------------------------------------------------


def test_nan_misses_every_target(tmp_path):
    evaluated = targets.Targets(Environment(folder=tmp_path, result=tmp_path / "result.json"))
    evaluated.at_least("a", float("nan"), 0)
    evaluated.at_most("b", float("nan"), 0)
    evaluated.at_most("c", 1.0, 1.0)
    evaluated.skip("d", "no time")
    assert evaluated.missed == ["a", "b"]
    assert json.loads((tmp_path / "result.json").read_text())["targets"]["a"]["found"] is None
    assert targets.summarize_targets(evaluated.rows) == "missed: a, b; 1 targets met; 1 not measured: no time"


def test_tensorrt_is_preferred_to_tensorrt_rtx():
    def has(*libraries):
        return gpu_suite.Interpreter(path=" ".join(libraries), environment={}, libraries=frozenset(libraries))

    needs = next(part.needs for part in PARTS if part.name == "int8")
    rtx, kit = has("tensorrt_rtx", "torch"), has("tensorrt")
    assert gpu_suite.find_interpreter(needs, [rtx, kit]) is kit
    assert gpu_suite.find_interpreter(needs, [rtx]) is rtx
    assert gpu_suite.find_interpreter(needs, [has("torch")]) is None
    assert gpu_suite.find_interpreter((), [rtx, kit]) is rtx


# --- with a real TensorRT-RTX, which builds without a GPU -------------------------------------------------------------


@needs_rtx
def test_y7_build_builds_the_int8_file_with_its_int8_layers(prepared, tmp_path):
    env = Environment(folder=prepared, result=tmp_path / "result.json")
    name = int8.FILE.format(model=MODEL, precision="int8", batch=2)
    engine = engine_build.build(env, prepared / name, None, level="0", into=tmp_path, more=int8.BUILD_OPTIONS)
    accuracy = int8.engine_summary(engine)
    assert accuracy["build_s"] > 0 and accuracy["tensorrt"].startswith("tensorrt_rtx")
    assert accuracy["layers"]["detail"] == "compiled"
    assert accuracy["layers"]["convolutions"]["int8"] == accuracy["int8_convolutions_in_file"] > 50
    table, _ = engine_layers(read_engine_file(engine).record)
    assert Counter(layer.is_reformat for layer in table.layers)[True] == accuracy["layers"]["reformats"]


@needs_rtx
def test_a_library_for_another_tensorrt_is_not_used_and_recorded(tmp_path):
    env = Environment(folder=tmp_path, result=tmp_path / "result.json")
    assert int8.compatible_plugin(env) is None
    shutil.copy(compile_described("letterbox.cu"), tmp_path / PLUGIN)
    assert int8.compatible_plugin(env) is None
    assert results(env)["plugin"].startswith("kernels, and tensorrt_rtx 1.")
    (tmp_path / PLUGIN).write_bytes(b"no library")
    assert int8.compatible_plugin(env) is None
    assert "not a usable plugin library" in results(env)["plugin"]


# --- complete runs ----------------------------------------------------------------------------------------------------


def run_suite(*arguments):
    command = [sys.executable, "-m", "tests.gpu", "run", "--parts", "int8", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_part_runs_on_the_emulated_gpu_without_evaluating_targets(tmp_path):
    done = run_suite("--emulated", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + (tmp_path / "gpu_suite.log").read_text()
    outcome = json.loads((tmp_path / "gpu_suite.json").read_text())["result"]["int8"]
    assert outcome["state"] == "passed"
    assert {row["met"] for row in outcome["results"]["targets"].values()} == {None}
    assert "0 targets met; 6 not measured" in done.stdout and int8.NO_GPU in done.stdout
    assert outcome["results"][f"{MODEL} batch 2 int8"]["layers"]["convolutions"]["int8"] > 80


@needs_rtx
@pytest.mark.skipif(list_cuda_gpus(), reason="this machine has a GPU")
def test_without_a_gpu_a_real_run_builds_engines_and_fails(source, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    int8_files.write_int8(folder, models=(MODEL,), weights=source / "weights.safetensors", side=SIDE)
    done = run_suite("--out", str(tmp_path), "--folder", str(folder))
    assert done.returncode == 1
    outcome = json.loads((tmp_path / "gpu_suite.json").read_text())["result"]["int8"]
    assert outcome["state"] == "failed"
    assert "0 targets met" in done.stdout
    accuracy = outcome["results"]
    for batch in int8.BATCHES:
        assert accuracy[f"{MODEL}-fp16-b{batch} build"]["exit"] == 0
        assert "no NVIDIA driver" in accuracy[f"{MODEL} batch {batch}"]["failed"]
    why = {name: row["why"] for name, row in accuracy["targets"].items()}
    assert why == {
        **dict.fromkeys([AP_LOSS, AP_DIFFERENCE], "no labelled images were given to prepare"),
        int8.MODELS[1]: "its files are missing",
    }
