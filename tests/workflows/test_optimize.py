"""`y7 optimize`: the fastest candidate that keeps the AP wins, everything else has a reason."""

import ast
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support.child_processes import passes_without_amx
from tests.tensorrt.test_engine import PLAN, record_of
from yolov7_deploy.cli.app import app
from yolov7_deploy.datasets import open_dataset
from yolov7_deploy.datasets.synthetic import write_shapes
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import ParityError, UsageError
from yolov7_deploy.hardware import machine
from yolov7_deploy.hub import bundled_weights
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.options import Int8Options, OptimizeOptions
from yolov7_deploy.precision.calibrate import calibrate
from yolov7_deploy.precision.calibration_images import open_calibration
from yolov7_deploy.precision.int8 import to_int8
from yolov7_deploy.runtimes.base import installed_runtimes
from yolov7_deploy.tensorrt.engine import Engine
from yolov7_deploy.workflows import optimize as module
from yolov7_deploy.workflows.export import export_weights

SIZE = 416


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small dataset and a signed INT8 file."""
    folder = tmp_path_factory.mktemp("optimize")
    write_shapes(folder / "shapes", train=4, val=6, size=SIZE, seed=3)
    export_weights(bundled_weights(), folder / "fp32.onnx", options=module.ExportOptions(), verify=False)
    model = OnnxModel.load(folder / "fp32.onnx")
    images = open_calibration(folder / "shapes/images/train")
    to_int8(model, calibrate(model, images, count=4), Int8Options(fallback="fp32")).save(folder / "signed.onnx")
    return folder


@pytest.fixture
def y7(folder, monkeypatch):
    """Run the command in that folder, with options that keep it short."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(module, "WARMUP_S", 0.1)

    def run(*arguments):
        base = f"optimize --weights {bundled_weights()} --data shapes/shapes.yaml --duration 1 --max-drop 10".split()
        return CliRunner().invoke(app, [*base, *arguments])

    return run


@pytest.mark.slow
def test_the_winner_is_kept_and_used_by_two_lines_of_python(y7, tmp_path):
    result = y7("--calib", "shapes/images/train", "--save-dir", str(tmp_path), "--candidate", "signed.onnx")
    assert result.exception is None, result.output
    record = json.loads((tmp_path / "optimize.json").read_text())
    timed = [one for one in record["candidates"] if one["rounds"]]
    assert record["complete"] and record["winner"] == record["candidates"][0] == timed[0]
    fastest = min(one["median_ms_per_image"] for one in timed)
    assert record["winner"]["median_ms_per_image"] <= 1.1 * fastest  # medians differ from the means of the ratios
    files = {(one["file"], one["runtime"]) for one in record["candidates"]}
    stem = bundled_weights().stem
    for name in ("onnxruntime", "openvino"):
        if name in installed_runtimes(tmp_path / "x.onnx", "cpu"):
            assert {(f"{stem}-fp32.onnx", name), (f"{stem}-int8.onnx", name), ("signed.onnx", name)} <= files
    for one in record["candidates"]:
        assert one["rejected"] or one["accuracy"]["points"] <= 10
    # The winner is the only file that is left, and the printed code opens it.
    kept = {path.name for path in tmp_path.iterdir()} - {"optimize.json"}
    assert kept == ({record["winner"]["file"]} if record["winner"]["file"].startswith(stem + "-") else set())
    lines = [line for line in result.output.splitlines() if line.startswith(("from yolov7", "detector ="))]
    scope = {}
    exec("\n".join(lines), scope)
    assert len(lines) == 2 and isinstance(scope["detector"], Detector)
    scope["detector"].close()


@pytest.mark.slow
def test_a_file_that_a_runtime_computes_wrongly_is_rejected_by_its_ap(y7, tmp_path, monkeypatch, request):
    pytest.importorskip("openvino", reason="needs OpenVINO: pip install 'yolov7-deploy[openvino]'")
    if passes_without_amx(request):
        return
    from yolov7_deploy.runtimes import openvino

    monkeypatch.setattr(openvino, "_check_int8", lambda *_: None)
    monkeypatch.setattr(openvino, "has_vnni", lambda: True)
    monkeypatch.setattr(module, "_CPU_RUNTIMES", ("openvino",))
    result = y7("--save-dir", str(tmp_path), "--candidate", "signed.onnx", "--max-drop", "1")
    assert result.exception is None, result.output
    record = json.loads((tmp_path / "optimize.json").read_text())
    (signed,) = (one for one in record["candidates"] if one["file"] == "signed.onnx")
    assert "more than --max-drop 1" in signed["rejected"] and signed["accuracy"]["points"] > 1
    assert "INT8 needs calibration images:  --calib FOLDER" in result.output


def test_an_interruption_keeps_what_was_measured(y7, tmp_path, monkeypatch):
    def interrupted(calls, samples, **_):
        samples.update({name: [4.0 / (1 + number)] * 9 for number, name in enumerate(calls)})
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "race", interrupted)
    monkeypatch.setattr(module, "_CPU_RUNTIMES", ("onnxruntime",))
    result = y7("--save-dir", str(tmp_path))
    record = json.loads((tmp_path / "optimize.json").read_text())
    assert result.exit_code == 130 and not record["complete"]
    assert record["winner"]["runtime"] == "pytorch"  # the last one, which was the fastest
    assert all(one["rounds"] == 9 for one in record["candidates"])


def test_a_checkpoint_without_ap_cannot_be_optimized(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CPU_RUNTIMES", ("onnxruntime",))
    data = write_shapes(tmp_path / "shapes", train=1, val=2, size=SIZE, seed=3)
    for path in (tmp_path / "shapes/labels/val").iterdir():
        path.write_text("0 0.01 0.01 0.01 0.01\n")  # nothing is there
    arguments = f"optimize --weights {bundled_weights()} --data {data} --save-dir {tmp_path}".split()
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ParityError) and "has AP 0" in result.exception.message


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_drop": -1.0}, "--max-drop -1 is not a number of AP points"),
        ({"batches": (0,)}, "--batch 0 must be at least 1"),
        ({"callers": 0}, "--concurrency 0 is not between 1"),
        ({"duration_s": 0.0}, "--duration 0 is not a duration"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(UsageError) as raised:
        OptimizeOptions(**options)
    assert message in raised.value.message


def test_an_onnx_file_is_a_candidate_and_not_the_reference(folder, monkeypatch):
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, ["optimize", "--weights", "fp32.onnx", "--data", "shapes/shapes.yaml"])
    assert isinstance(result.exception, UsageError)
    assert result.exception.fix == "y7 optimize --weights WEIGHTS.pt --candidate fp32.onnx"


def optimizer_in(folder, tmp_path, **options):
    data = open_dataset(folder / "shapes/shapes.yaml")
    return module.Optimizer(
        bundled_weights(),
        data,
        None,
        OptimizeOptions(duration_s=0.5),
        folder=tmp_path / "kept",
        device="cpu",
        **options,
    )


def test_files_of_one_name_in_different_folders_are_both_timed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WARMUP_S", 0.1)
    optimizer = optimizer_in(folder, tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copyfile(folder / "fp32.onnx", tmp_path / name / "m.onnx")
        optimizer._candidates.append(module.Candidate(path=tmp_path / name / "m.onnx", runtime="onnxruntime"))
    optimizer._race()
    assert all(len(one.samples_ms) >= module.MIN_ROUNDS for one in optimizer._candidates)
    assert optimizer._find_winner() in optimizer._candidates


@pytest.mark.parametrize(("last_ms", "winner"), [(99.0, 1), (93.0, 2)])
def test_of_candidates_that_are_as_fast_the_most_precise_wins(folder, tmp_path, last_ms, winner):
    optimizer = optimizer_in(folder, tmp_path)
    for name, time_ms in (("onnxruntime", 130.0), ("openvino", 100.0), ("openvino-bf16", last_ms)):
        optimizer._candidates.append(module.Candidate(path=folder / "fp32.onnx", runtime=name))
        optimizer._candidates[-1].samples_ms = [time_ms + 0.1 * number for number in range(module.MIN_ROUNDS)]
    assert optimizer._find_winner() is optimizer._candidates[winner]


def test_an_engine_is_kept_with_its_build_record(folder, tmp_path):
    engine = Engine(plan=PLAN, record=record_of())
    engine.save(tmp_path / "fast.engine")
    kept = optimizer_in(folder, tmp_path)._keep(tmp_path / "fast.engine")
    assert Engine.load(kept) == engine


@pytest.mark.parametrize("name", ["it's fast.onnx", 'a"b.onnx', "ä.onnx"])
def test_the_printed_code_is_valid_for_every_file_name(name):
    lines = module._usage(module.Candidate(path=Path(name), runtime="onnxruntime")).strip().splitlines()
    (call,) = [node for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, ast.Call)]
    assert call.args[0].value == name


def test_int8_files_for_the_cpu_of_a_machine_with_a_gpu_are_for_cpus(monkeypatch):
    monkeypatch.setattr(machine, "list_installed_gpus", lambda: ("a GPU",))
    assert machine.find_int8_target() == "tensorrt"
    assert machine.find_int8_target(use_gpu=False) in ("cpu", "arm")
