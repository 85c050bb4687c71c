"""The suite's part `int8` on stand-ins for TensorRT and a GPU: what it measures, and that what is missed fails."""

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
from tests.gpu import PARTS, building, int8, int8_files, weights
from tests.gpu import __main__ as gpu_suite
from tests.gpu import fakes as stand_ins
from tests.gpu import targets as goals
from tests.gpu.environment import PLUGIN, Setting
from tests.support.engines import HAS_RTX, NO_RTX
from tests.support.sample_images import noise
from tests.support.small_models import exported_tiny, metadata_of, tiny
from yolov7_deploy.benchmark import benchmark as speed
from yolov7_deploy.benchmark import sampling
from yolov7_deploy.checkpoint import Checkpoint, save_checkpoint
from yolov7_deploy.detector import Detector
from yolov7_deploy.evaluation import synthetic_image as street
from yolov7_deploy.hardware.gpu import read_gpu
from yolov7_deploy.inspection.engine_file import read_engine_file
from yolov7_deploy.precision.fp16 import to_fp16
from yolov7_deploy.precision.int8_summary import count_int8
from yolov7_deploy.tensorrt.inspector import layers_of
from yolov7_deploy.tensorrt.onnx_rewrite import open_onnx
from yolov7_deploy.visualize import write_image

SIDE, BATCHES = 128, (2, 1)
CONF = 0.5
MODEL = int8.MODELS[0]
SPEED = f"{MODEL} batch 2: INT8 to FP16, throughput of the engine"
PARITY = [f"{MODEL} batch {batch}: detections as in ONNX Runtime" for batch in BATCHES]
LOST, APART = f"{MODEL}: AP that INT8 loses", f"{MODEL}: AP between the INT8 engine and ONNX Runtime"
needs_rtx = pytest.mark.skipif(not HAS_RTX, reason=NO_RTX)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Weights of a small network, and images labelled with what it finds in them."""
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
def brought(source, tmp_path_factory):
    """What `prepare` writes of them."""
    folder = tmp_path_factory.mktemp("brought")
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
    """A COCO document in which every image shows what the network finds in it, by the protocol of the evaluation."""
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
def place(brought, tmp_path, monkeypatch):
    """An emulated Setting of its own with these files; measurements are short, and AP may be lost."""
    folder = tmp_path / "whole"
    shutil.copytree(brought, folder)
    monkeypatch.setattr(int8, "MODELS", (MODEL,))
    monkeypatch.setattr(int8, "MOST_LOST", 1.0)
    monkeypatch.setattr(speed, "TURN_S", 0.0)
    monkeypatch.setattr(speed, "LEAST_CALLS", 8)
    monkeypatch.setattr(sampling, "STABLE_BLOCK_S", 0.0)
    with stand_ins.fake_tensorrt(folder):
        yield Setting(folder=folder, result=tmp_path / "result.json", emulated=True)


@pytest.fixture
def bench(place):
    return int8.Bench(setting=place, goals=goals.Goals(place), plugin=None)


def results(setting):
    return json.loads(setting.result.read_text())


def met(setting):
    return {name: row["met"] for name, row in results(setting)["goals"].items()}


# --- what travels -----------------------------------------------------------------------------------------------------


def test_the_file_of_another_batch_size_travels_without_weights_and_finds_the_same(brought, tmp_path):
    sizes = {}
    for precision in int8.PRECISIONS:
        for batch in BATCHES:
            path = brought / int8.FILE.format(model=MODEL, precision=precision, batch=batch)
            sizes[precision, batch] = path.stat().st_size
            (tmp_path / path.name).write_bytes(weights.filled(path.read_bytes(), brought))
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


def test_a_file_of_several_images_becomes_half_by_running_one():
    model = exported_tiny(batch=2)
    assert int8_files.in_half(model).proto == to_fp16(model, [street()]).proto
    assert int8_files.in_half(model).metadata == to_fp16(model, [street()]).metadata


def test_weights_that_another_part_brings_do_not_travel_again(tmp_path):
    values = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    shared = onnx.numpy_helper.from_array(values, "a")
    small, own = (onnx.numpy_helper.from_array(values[:rows] + 1, name) for rows, name in ((1, "b"), (64, "c")))
    files = [
        onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], initializer=tensors)).SerializeToString()
        for tensors in ([shared], [onnx.numpy_helper.from_array(values, "other name"), small, own])
    ]
    known = {}
    assert weights.unshared(files[0], known, file="first.onnx") == files[0]
    left = weights.unshared(files[1], known, file="second.onnx")
    assert len(files[1]) - len(left) == pytest.approx(values.nbytes, rel=0.01)
    (tmp_path / "first.onnx").write_bytes(files[0])
    assert weights.filled(left, tmp_path) == files[1]
    with pytest.raises(AssertionError, match=r"other name is in first\.onnx"):
        weights.filled(left)


def test_made_up_int8_weights_stay_behind_and_come_back():
    made = weights.made_up("a.weight", (64, 32, 3, 3))
    rounded = weights.round_weight(made).values
    tensors = [onnx.numpy_helper.from_array(value, "a.weight__int8") for value in (rounded, rounded[::-1].copy())]
    whole = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], initializer=tensors))
    before = whole.SerializeToString()
    left = weights.stripped(whole, {"a.weight"})
    assert len(before) - len(left) == pytest.approx(rounded.nbytes, rel=0.01), "the other is not made up"
    assert weights.filled(left) == before


def test_labelled_images_travel_with_what_onnx_runtime_finds_in_them(brought):
    told = json.loads((brought / int8.ACCURACY.format(MODEL)).read_text())
    assert len(list((brought / int8.IMAGES).iterdir())) == told["fp32"]["images"] == told["int8"]["images"] == 4
    assert told["fp32"]["ap"] > 0.7, "the labels are what float32 finds"
    assert len(told["int8"]["predictions"]) > 20


def test_without_labels_or_trained_weights_the_reason_travels(tmp_path, monkeypatch):
    monkeypatch.setattr(int8_files, "MODELS", ("yolov7-tiny",))
    int8_files.write_int8(tmp_path, models=("yolov7-tiny",), data=tmp_path / "absent.json", side=SIDE, batches=(1,))
    assert json.loads((tmp_path / "yolov7-tiny-int8.json").read_text()) == {"skipped": int8.NOT_TRAINED}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2**20, "made-up weights stay behind"
    assert not np.load(tmp_path / "yolov7-tiny-int8.npz")["trained"]


# --- what is measured -------------------------------------------------------------------------------------------------


def test_both_engines_are_measured_described_and_compared(place):
    int8.measure_all(place)
    told = results(place)
    file = open_onnx(place.folder / "engines" / int8.FILE.format(model=MODEL, precision="int8", batch=2))
    expected = count_int8(file.proto)
    for batch in BATCHES:
        half, whole = (told[f"{MODEL} batch {batch} {precision}"] for precision in int8.PRECISIONS)
        assert half["layers"]["convolutions"] == {"fp16": len(expected.convolutions)}
        assert whole["layers"]["convolutions"]["int8"] == whole["int8_convolutions_in_file"] > 50
        assert whole["layers"]["convolutions"]["int8"] == expected.int8_convolutions
        assert whole["layers"]["reformats"] == 1
        assert whole["plan_bytes"] < 0.6 * half["plan_bytes"]
        assert [row["batch"] for row in whole["report"]["rows"]] == [batch]
        compared = told[f"{MODEL} batch {batch}"]
        assert compared["engine_times_faster"] > 0 and compared["end_to_end_times_faster"] > 0
        found = compared["as INT8 in ONNX Runtime"]
        assert found["int8"]["reference"] > 1000
        assert found["int8"]["share"] == 1.0, "ONNX Runtime stands in for TensorRT"
        assert found["fp16"]["share"] < 0.9, "FP16 finds other things"
    assert met(place) == {SPEED: None, **dict.fromkeys([*PARITY, LOST, APART], True)}
    assert told["goals"][SPEED]["why"] == int8.NO_GPU
    accuracy = told[f"{MODEL} accuracy"]
    assert accuracy["int8 engine"] == pytest.approx(accuracy["int8 ONNX Runtime"], abs=1e-3)
    assert accuracy["fp16 engine"] > 0.7 and accuracy["images"] == 4
    assert accuracy["drop"]["points"] == pytest.approx(100 * (accuracy["fp32 ONNX Runtime"] - accuracy["int8 engine"]))


def test_what_was_built_in_an_earlier_run_is_not_built_again(bench):
    engine = bench.engine(MODEL, "int8", 1)
    (bench.setting.folder / engine.with_suffix(".onnx").name).unlink()
    assert bench.engine(MODEL, "int8", 1) == engine


@pytest.mark.parametrize(("limit", "is_met"), [(0.0, True), (1e9, False)])
def test_the_goal_of_speed_is_judged_on_a_gpu(place, monkeypatch, limit, is_met):
    monkeypatch.setattr(int8, "TIMES_FASTER", limit)
    monkeypatch.setattr(int8, "BATCHES", BATCHES)
    monkeypatch.setattr(int8, "FRAME_HW", int8.EMULATED_HW)
    monkeypatch.setattr(int8, "SECONDS", 0.0)
    monkeypatch.setattr(int8, "WARM_UP_S", 0.0)
    place.emulated = False
    bench = int8.Bench(setting=place, goals=goals.Goals(place), plugin=None)
    int8.compare_engines(bench, MODEL, 2)
    row = results(place)["goals"][SPEED]
    assert row["met"] is is_met
    assert row["found"] == results(place)[f"{MODEL} batch 2"]["engine_times_faster"]


def test_other_detections_than_those_of_onnx_runtime_are_told(bench):
    path = bench.setting.folder / int8.REFERENCE.format(MODEL)
    reference = dict(np.load(path))
    np.savez(path, **{name: rows + 9 if name.startswith("boxes") else rows for name, rows in reference.items()})
    int8.compare_engines(bench, MODEL, 1)
    assert bench.goals.missed == [PARITY[1]]
    assert results(bench.setting)["goals"][PARITY[1]]["found"] < 0.5


@pytest.mark.parametrize(
    ("form", "ap", "missed"), [("fp32", 2.5, [LOST]), ("int8", 1.5, [APART]), ("fp32", float("nan"), [LOST])]
)
def test_an_ap_too_far_from_that_of_onnx_runtime_is_told(bench, form, ap, missed):
    path = bench.setting.folder / int8.ACCURACY.format(MODEL)
    told = json.loads(path.read_text())
    told[form]["ap"] = ap
    path.write_text(json.dumps(told))
    int8.judge_accuracy(bench, MODEL)
    assert bench.goals.missed == missed


def test_a_missed_goal_fails_the_part_and_is_never_met(place, monkeypatch):
    monkeypatch.setattr(int8, "MOST_LOST", -1.0)
    with pytest.raises(AssertionError, match=f"failed: .., missed: .*{LOST}"):
        int8.measure_all(place)
    assert met(place) == {SPEED: None, LOST: False, **dict.fromkeys([*PARITY, APART], True)}


def test_an_engine_that_cannot_be_built_fails_the_part_and_the_others_go_on(place):
    name = int8.FILE.format(model=MODEL, precision="int8", batch=1)
    (place.folder / name).unlink()
    with pytest.raises(AssertionError, match=rf"failed: \['{MODEL} batch 1', '{MODEL} accuracy'\], missed: \[\]"):
        int8.measure_all(place)
    assert name in results(place)[f"{MODEL} batch 1"]["failed"]
    assert results(place)[f"{MODEL} accuracy"]["failed"] == f"the engine of {name} could not be built", "no second try"
    assert met(place) == {SPEED: None, PARITY[0]: True}, "what was not measured is not among them"


def test_ap_that_nobody_can_judge_is_skipped_with_the_reason(bench, monkeypatch):
    for module in ("accuracy", "drop"):
        monkeypatch.delitem(sys.modules, f"yolov7_deploy.evaluation.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    int8.judge_accuracy(bench, MODEL)
    rows = results(bench.setting)["goals"]
    assert [row["met"] for row in rows.values()] == [None, None]
    assert all("faster_coco_eval" in row["why"] for row in rows.values())


def test_a_part_to_which_nothing_was_brought_fails(tmp_path):
    setting = Setting(folder=tmp_path, result=tmp_path / "result.json")
    with pytest.raises(AssertionError, match="neither of yolov7, yolov7-tiny was brought"):
        int8.measure_all(setting)
    assert met(setting) == dict.fromkeys(int8.MODELS)


# --- goals in words, and which Python runs what -----------------------------------------------------------------------


def test_what_is_no_number_misses_every_goal(tmp_path):
    made = goals.Goals(Setting(folder=tmp_path, result=tmp_path / "result.json"))
    made.at_least("a", float("nan"), 0)
    made.at_most("b", float("nan"), 0)
    made.at_most("c", 1.0, 1.0)
    made.skip("d", "no time")
    assert made.missed == ["a", "b"]
    assert json.loads((tmp_path / "result.json").read_text())["goals"]["a"]["found"] is None
    assert goals.goal_words(made.rows) == "missed: a, b; 1 goals met; 1 not measured: no time"


def test_tensorrt_is_taken_before_tensorrt_rtx():
    def has(*libraries):
        return gpu_suite.Interpreter(path=" ".join(libraries), environment={}, libraries=frozenset(libraries))

    needs = next(part.needs for part in PARTS if part.name == "int8")
    rtx, kit = has("tensorrt_rtx", "torch"), has("tensorrt")
    assert gpu_suite.fitting(needs, [rtx, kit]) is kit
    assert gpu_suite.fitting(needs, [rtx]) is rtx
    assert gpu_suite.fitting(needs, [has("torch")]) is None
    assert gpu_suite.fitting((), [rtx, kit]) is rtx


# --- with a real TensorRT-RTX, which builds without a GPU -------------------------------------------------------------


@needs_rtx
def test_the_command_that_users_type_builds_the_int8_file_with_its_int8_layers(brought, tmp_path):
    setting = Setting(folder=brought, result=tmp_path / "result.json")
    name = int8.FILE.format(model=MODEL, precision="int8", batch=2)
    engine = building.build(setting, brought / name, None, level="0", into=tmp_path, more=int8.ALONE)
    told = int8.described(engine)
    assert told["build_s"] > 0 and told["tensorrt"].startswith("tensorrt_rtx")
    assert told["layers"]["detail"] == "compiled"
    assert told["layers"]["convolutions"]["int8"] == told["int8_convolutions_in_file"] > 50
    table, _ = layers_of(read_engine_file(engine).record)
    assert Counter(layer.reformat for layer in table.layers)[True] == told["layers"]["reformats"]


@needs_rtx
def test_a_library_for_another_tensorrt_is_left_out_and_said_so(tmp_path):
    setting = Setting(folder=tmp_path, result=tmp_path / "result.json")
    assert int8.fitting_plugin(setting) is None
    shutil.copy(compile_described("letterbox.cu"), tmp_path / PLUGIN)
    assert int8.fitting_plugin(setting) is None
    assert results(setting)["plugin"].startswith("kernels, and tensorrt_rtx 1.")
    (tmp_path / PLUGIN).write_bytes(b"no library")
    assert int8.fitting_plugin(setting) is None
    assert "not a usable plugin library" in results(setting)["plugin"]


# --- as a run ---------------------------------------------------------------------------------------------------------


def run_suite(*arguments):
    command = [sys.executable, "-m", "tests.gpu", "run", "--parts", "int8", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_part_runs_on_the_emulated_gpu_and_claims_no_goal(tmp_path):
    done = run_suite("--emulated", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + (tmp_path / "gpu_suite.log").read_text()
    outcome = json.loads((tmp_path / "gpu_suite.json").read_text())["result"]["int8"]
    assert outcome["state"] == "passed"
    assert {row["met"] for row in outcome["results"]["goals"].values()} == {None}
    assert "0 goals met; 6 not measured" in done.stdout and int8.NO_GPU in done.stdout
    assert outcome["results"][f"{MODEL} batch 2 int8"]["layers"]["convolutions"]["int8"] > 80


@pytest.mark.slow
@needs_rtx
@pytest.mark.skipif(read_gpu() is not None, reason="this machine has a GPU")
def test_without_a_gpu_a_real_run_builds_fails_and_meets_nothing(source, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    int8_files.write_int8(whole, models=(MODEL,), weights=source / "weights.safetensors", side=SIDE)
    done = run_suite("--out", str(tmp_path), "--folder", str(whole))
    assert done.returncode == 1
    outcome = json.loads((tmp_path / "gpu_suite.json").read_text())["result"]["int8"]
    assert outcome["state"] == "failed"
    assert "0 goals met" in done.stdout
    told = outcome["results"]
    for batch in int8.BATCHES:
        assert told[f"{MODEL}-fp16-b{batch} build"]["exit"] == 0
        assert "no NVIDIA driver" in told[f"{MODEL} batch {batch}"]["failed"]
    why = {name: row["why"] for name, row in told["goals"].items()}
    assert why == {
        **dict.fromkeys([LOST, APART], "no labelled images were given to prepare"),
        int8.MODELS[1]: "was not brought",
    }
