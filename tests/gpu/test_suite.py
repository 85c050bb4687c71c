"""The GPU suite without a GPU: parts run on the emulated GPU, and a failing part does not affect the others.

The tests marked `gpu` run parts of the suite on a real GPU.
"""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest

from tests.gpu import COMPILED_FOR, PARTS, archive, integration, kit, letterbox, nms, sanitizer, weights
from tests.gpu import __main__ as gpu_suite
from tests.gpu.comparison import compare_detections, compare_raw
from tests.gpu.environment import KERNELS, Environment
from yolov7_deploy.errors import Y7Error
from yolov7_deploy.image import fit_letterbox, to_network_input
from yolov7_deploy.postprocess import greedy_nms
from yolov7_deploy.runtimes.cuda import open_cuda

ROOT = Path(__file__).parents[2]
SUITE = [sys.executable, "-m", "tests.gpu"]


def suite(*arguments, **environment):
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([*SUITE, *arguments], env=variables, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_part_runs_on_the_emulated_gpu(tmp_path):
    parts = [part.name for part in PARTS if part.emulated and not part.needs]
    done = suite("run", "--emulated", "--out", str(tmp_path), "--parts", *parts)
    assert done.returncode == 0, done.stdout + (tmp_path / "gpu_suite.log").read_text()
    document = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert document["emulated"] is True
    assert {name: outcome["state"] for name, outcome in document["result"].items()} == dict.fromkeys(parts, "passed")
    results = {name: outcome["results"] for name, outcome in document["result"].items()}
    assert results["nms"]["random_cases"]["detections"] > 100
    assert results["nms"]["repetition"]["different_results"] == 1
    boxes = results["letterbox"]["against_opencv"]
    assert boxes["frames"] == boxes["bit_equal"] > 10
    assert {"plain_us", "graph_us", "repeated_us"} <= set(results["nms_times"]["rows"][0])
    assert results["sanitizer"]["worked"] is True


@pytest.mark.slow
def test_a_part_that_needs_torch_runs_on_the_emulated_gpu(tmp_path):
    pytest.importorskip("torch")
    done = suite("run", "--emulated", "--out", str(tmp_path), "--parts", "against_torch")
    assert done.returncode == 0, done.stdout + (tmp_path / "gpu_suite.log").read_text()
    (row,) = json.loads((tmp_path / "gpu_suite.json").read_text())["result"]["against_torch"]["results"]["rows"]
    assert row["detections"] and row["torch_detections"] and row["times_faster"]


def test_without_a_gpu_parts_fail_with_the_reason_and_do_not_affect_each_other(tmp_path):
    if has_gpu():
        pytest.skip("this machine has a GPU")
    done = suite(
        "run",
        "--out",
        str(tmp_path),
        "--folder",
        str(tmp_path),
        "--parts",
        "machine",
        "integration",
        "nms",
        "letterbox",
    )
    assert done.returncode == 1
    result = json.loads((tmp_path / "gpu_suite.json").read_text())["result"]
    assert result["machine"]["state"] == "passed", "it does not need a GPU, and is not affected by the others"
    assert result["machine"]["results"]["libraries"]["numpy"]
    assert [result[name]["state"] for name in ("nms", "letterbox")] == ["failed", "failed"]
    assert "Error: " in (tmp_path / "gpu_suite.log").read_text()


def test_results_recorded_before_a_crash_are_kept(tmp_path):
    program = (
        f"import sys, os; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\n"
        "from tests.gpu.environment import Environment\n"
        f"env = Environment(folder=Path(), result=Path({str(tmp_path / 'result.json')!r}))\n"
        "env.record('first', 1)\n"
        "os.abort()\n"
    )
    with (tmp_path / "log").open("w") as log:
        code = gpu_suite.call([sys.executable, "-c", program], dict(os.environ), 60, log.fileno())
    assert code not in (0, None)
    assert json.loads((tmp_path / "result.json").read_text()) == {"first": 1}


def test_a_part_over_its_time_limit_is_killed_with_its_child_processes(tmp_path):
    marker = tmp_path / "grandchild"
    child = f"import time; time.sleep(4); open({str(marker)!r}, 'w')"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    started = time.monotonic()
    with (tmp_path / "log").open("w") as log:
        assert gpu_suite.call([sys.executable, "-c", program], dict(os.environ), 1.5, log.fileno()) is None
    assert time.monotonic() - started < 4
    time.sleep(max(0.0, 5 - (time.monotonic() - started)))
    assert not marker.exists()


def test_a_part_without_time_or_library_is_skipped_with_the_reason(tmp_path):
    options = gpu_suite.argument_parser().parse_args(["run", "--folder", str(tmp_path), "--parts", "engines"])
    bare = gpu_suite.Interpreter(path=sys.executable, environment={}, libraries=frozenset())
    part = next(part for part in PARTS if part.needs == ("tensorrt",))
    assert gpu_suite.run_one_part(part, options, [bare], 100, 1)["why"] == "no Python interpreter here has tensorrt"
    interpreter = gpu_suite.Interpreter(path=sys.executable, environment={}, libraries=frozenset({"tensorrt"}))
    assert gpu_suite.run_one_part(part, options, [interpreter], 3, 1)["why"] == "only 3 s were left"


def test_the_parts_of_one_run_fit_into_its_time():
    budgets = [part.budget_s for part in PARTS if not part.alone]
    assert sum(budgets) <= gpu_suite.TOTAL_S <= 600, "the longest command on a borrowed machine"
    assert all(part.budget_s <= 600 for part in PARTS)


def test_a_part_that_runs_alone_is_named_with_its_command_and_a_named_one_that_is_skipped_fails(tmp_path):
    bare = gpu_suite.Interpreter(path=sys.executable, environment={}, libraries=frozenset({"tensorrt"}))
    engines = next(part for part in PARTS if part.name == "engines")
    options = gpu_suite.argument_parser().parse_args(["run"])
    outcome = gpu_suite.run_one_part(engines, options, [bare], 500, 1)
    assert outcome["state"] == "skipped" and "--parts engines --total 590" in outcome["why"]
    done = suite("run", "--emulated", "--out", str(tmp_path), "--parts", "engines")
    assert done.returncode == 1 and "needs a GPU" in done.stdout


def test_an_inherited_python_path_is_kept(tmp_path, monkeypatch):
    (tmp_path / "torch.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = gpu_suite.probe_interpreter(sys.executable, [ROOT], [])
    assert found.environment["PYTHONPATH"].split(os.pathsep) == [str(ROOT), str(tmp_path)]
    assert "torch" in found.libraries


def test_a_transfer_of_an_archive_part_and_the_project_stays_below_64_mib():
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    project = sum((ROOT / name).stat().st_size for name in files.split("\0") if name and (ROOT / name).is_file())
    assert project + archive.PART_BYTES < 64 * 2**20


# --- TensorRT 8.6 that travels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "there is no .*tensorrt"),
        (("site/tensorrt/__init__.py",), "no Python for it .*name one with --kit-python"),
    ],
)
def test_a_given_kit_that_is_incomplete_is_an_error(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    done = suite("run", "--emulated", "--parts", "machine", "--out", str(tmp_path / "out"), "--kit", str(tmp_path))
    assert done.returncode == 1
    assert re.search(message, done.stderr)
    assert not (tmp_path / "out").exists()


def test_a_kit_whose_tensorrt_cannot_be_imported_is_an_error(tmp_path):
    (tmp_path / "site" / "tensorrt").mkdir(parents=True)
    (tmp_path / "site" / "tensorrt" / "__init__.py").write_text("raise ImportError('libnvinfer.so.8 is missing')\n")
    done = suite("run", "--emulated", "--parts", "machine", "--kit", str(tmp_path), "--kit-python", sys.executable)
    assert done.returncode == 1
    assert "libnvinfer.so.8 is missing" in done.stderr


@pytest.mark.slow
def test_a_kit_travels_in_parts_and_brings_its_own_python(tmp_path, monkeypatch):
    """A wheel of the layout of TensorRT 8.6.0, for the Python of this test."""
    if shutil.which("gcc") is None or shutil.which("objdump") is None:
        pytest.skip("needs gcc and objdump")
    monkeypatch.setattr(archive, "PART_BYTES", 2 * 2**20)
    wheel, library = tmp_path / "tensorrt-8.6.0-any.whl", tmp_path / "libnvinfer_plugin.so.8"
    (tmp_path / "plugin.c").write_text("int marker(void) { return 86; }\n")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "plugin.c"], check=True)
    with zipfile.ZipFile(wheel, "w") as content:
        content.write(library, "tensorrt/libnvinfer_plugin.so.8")
        content.writestr("tensorrt/libnvinfer_lean.so.8", b"is not needed")
        program = "import ctypes\nassert ctypes.CDLL('libnvinfer_plugin.so.8').marker() == 86\n"
        content.writestr("tensorrt/__init__.py", program + "ctypes.CDLL('libcudnn.so.8')\n")
    kit.write_kit(tmp_path / "parts", sys.executable, wheel=wheel, packages=())
    sizes = [path.stat().st_size for path in (tmp_path / "parts").iterdir()]
    assert len(sizes) > 1 and max(sizes) <= archive.PART_BYTES
    archive.unpack(tmp_path / "parts", tmp_path / "kit")
    assert not (tmp_path / "kit" / "lib" / "libnvinfer_lean.so.8").exists()
    monkeypatch.setenv("PATH", "/nowhere")
    options = gpu_suite.argument_parser().parse_args(["run", "--kit", str(tmp_path / "kit")])
    _, found = gpu_suite.find_interpreters(options)
    assert found.path.startswith(str(tmp_path / "kit" / "python" / "bin" / "python3."))
    assert "tensorrt" in found.libraries


def test_the_reference_letterbox_equals_opencv():
    rng = np.random.default_rng(0)
    for number in range(300):
        hw = tuple(map(int, np.exp(rng.uniform(0, np.log(600), 2))))
        canvas_hw = [(640, 640), (96, 160), (33, 64)][number % 3]
        frame = rng.integers(0, 256, (*hw, 3), dtype=np.uint8)
        placement, box = letterbox.fit(hw, canvas_hw), fit_letterbox(hw, canvas_hw)
        assert (placement.resized_hw, placement.top, placement.left) == (box.resized_hw, box.top, box.left)
        canvas = letterbox.reference_letterbox(frame, canvas_hw)
        np.testing.assert_array_equal(
            canvas, box.apply(frame), err_msg=f"{hw} on {canvas_hw}, OpenCV {cv2.__version__}"
        )
    np.testing.assert_array_equal(letterbox.as_input(canvas, 0), to_network_input([canvas])[0])


@pytest.mark.parametrize("count", [0, 100, 1000])
def test_random_heads_have_about_the_requested_number_of_pairs(count):
    heads = nms.yolov7_heads(np.random.default_rng(0), 1, count, np.float32, None)
    pairs = 0
    for level in heads.maps:
        raw = level.reshape(3, 85, -1)
        scores = 1 / ((1 + np.exp(-raw[:, 4:5])) * (1 + np.exp(-raw[:, 5:])))
        pairs += int((scores > nms.CONF).sum())
    assert 0.8 * count <= pairs <= 1.1 * count


@pytest.mark.parametrize(("overlap", "kept"), [(True, range(20, 40)), (False, range(200, 301))])
def test_overlapping_pairs_are_a_few_objects(overlap, kept):
    heads = nms.yolov7_heads(np.random.default_rng(0), 1, 300, np.float32, None, overlap=overlap)
    parts = []
    for level, stride, anchors in zip(heads.maps, nms.STRIDES, nms.ANCHORS, strict=True):
        side = level.shape[-1]
        raw = 1 / (1 + np.exp(-level.reshape(3, 85, side, side).transpose(0, 2, 3, 1)))
        row, column = np.mgrid[:side, :side]
        centre = (2 * raw[..., :2] - 0.5 + np.stack([column, row], axis=-1)) * stride
        half = (2 * raw[..., 2:4]) ** 2 * np.array(anchors)[:, None, None] / 2
        scores = raw[..., 4:5] * raw[..., 5:]
        parts.append(np.concatenate([centre - half, centre + half, scores], axis=-1).reshape(-1, 84))
    rows = np.concatenate(parts)
    rows = rows[rows[:, 4:].max(axis=1) > nms.CONF]
    rows = rows[np.argsort(-rows[:, 4:].max(axis=1), kind="stable")].astype(np.float32)
    found = greedy_nms(rows[:, :4], rows[:, 4:].argmax(axis=1), iou=nms.IOU, max_det=300)
    assert len(found) in kept


def test_synthetic_weights_are_removed_and_restored():
    made = weights.synthetic_weights("a.weight", (64, 32, 3, 3))
    small = np.ones((2, 2, 1, 1), np.float32)
    tensors = [
        onnx.numpy_helper.from_array(made, "a.weight"),
        onnx.numpy_helper.from_array(made.astype(np.float16), "a.weight__half"),
        onnx.numpy_helper.from_array(made + 1, "a.weight_changed"),
        onnx.numpy_helper.from_array(small, "b.weight"),
    ]
    graph = onnx.helper.make_graph([], "g", [], [], initializer=tensors)
    model = onnx.helper.make_model(graph)
    before = model.SerializeToString()
    left = weights.without_weights(model, {"a.weight", "b.weight"})
    assert len(before) - len(left) == pytest.approx(made.nbytes * 1.5, rel=0.01)
    assert weights.with_weights(left) == before
    assert weights.with_weights(before) == before


def test_archive_parts_restore_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "PART_BYTES", 1000)
    folder = tmp_path / "files"
    (folder / "inner").mkdir(parents=True)
    (folder / "a").write_bytes(np.random.default_rng(0).bytes(3500))
    (folder / "inner" / "b").write_text("text")
    archive.pack(folder, tmp_path / "archive")
    assert len(list((tmp_path / "archive").iterdir())) > 3
    archive.unpack(tmp_path / "archive", tmp_path / "again")
    for name in ("a", "inner/b"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_the_packages_that_travel_need_no_others(tmp_path):
    pytest.importorskip("torch")
    from tests.gpu.prepare_files import copy_site

    copy_site(tmp_path)
    compiled = tmp_path / "site" / COMPILED_FOR / "faster_coco_eval"
    assert compiled.is_dir() and not (tmp_path / "site" / compiled.name).exists(), "another Python uses its own"
    program = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import pytest, psutil, yaml"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", [np.float32, np.float16])
@pytest.mark.parametrize("end", ["efficient", "plugin", "none"])
def test_nms_networks_have_head_maps_as_inputs_and_leave_nms_to_a_plugin(end, kind):
    pytest.importorskip("torch")
    from tests.gpu.prepare_files import nms_network

    model = nms_network(end, kind, 2)
    assert not model.functions
    assert [tensor.name for tensor in model.graph.input][:3] == ["head_0", "head_1", "head_2"]
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    assert shape == [2, 255, 80, 80]
    foreign = [node.op_type for node in model.graph.node if node.domain]
    assert foreign == {"efficient": ["EfficientNMS_TRT"], "plugin": ["Y7NMS"], "none": []}[end]


def detections(boxes, scores, classes):
    arrays = {"det_boxes": boxes, "det_scores": scores, "det_classes": classes}
    return {
        "num_dets": np.array([len(scores)]),
        **{name: np.array(value, np.float32) for name, value in arrays.items()},
    }


def test_moved_or_changed_detections_are_not_the_same():
    boxes = [[0, 0, 10, 10], [20, 20, 60, 60]]
    expected = detections(boxes, [0.9, 0.5], [1, 2])
    assert compare_detections(detections(boxes[::-1], [0.49, 0.91], [2, 1]), expected)["same"]
    for other in (
        detections([[5, 0, 15, 10], boxes[1]], [0.9, 0.5], [1, 2]),
        detections(boxes, [0.9, 0.4], [1, 2]),
        detections(boxes, [0.9, 0.5], [1, 3]),
        detections(boxes[:1], [0.9], [1]),
    ):
        assert not compare_detections(other, expected)["same"]
    assert not compare_detections(expected, detections([], [], []))["same"], "an empty reference proves nothing"


def test_raw_outputs_are_compared_relative_to_the_box_size():
    expected = np.array([[100, 100, 50, 200, 0.5, 0.5]] * 10, np.float32)
    assert compare_raw(expected + np.array([0.5, 2, 0.5, 2, 0.01, 0.01], np.float32), expected)["same"]
    assert not compare_raw(expected + np.array([8, 0, 0, 0, 0, 0], np.float32), expected)["same"]
    assert not compare_raw(expected + np.array([0, 0, 0, 0, 0, 0.2], np.float32), expected)["same"]
    with pytest.raises(AssertionError, match="finite"):
        compare_raw(expected * np.nan, expected)


# --- on a real GPU ----------------------------------------------------------------------------------------------------


def has_gpu():
    try:
        open_cuda()
    except Y7Error:
        return False
    return True


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The environment of the GPU of this machine, with kernels built for it."""
    if not has_gpu():
        pytest.skip("needs an NVIDIA GPU")
    folder = tmp_path_factory.mktemp("gpu")
    if "Y7_KERNELS" not in os.environ:
        if shutil.which("cmake") is None or shutil.which("nvcc") is None:
            pytest.skip("needs cmake and nvcc, or the path of the library in $Y7_KERNELS")
        command = ["cmake", "-S", str(ROOT / "plugins"), "-B", str(folder), "-DY7_KERNELS_ONLY=ON"]
        subprocess.run([*command, "-DCMAKE_CUDA_ARCHITECTURES=native"], check=True)
        subprocess.run(["cmake", "--build", str(folder), "--target", "y7_kernels"], check=True)
        ctypes.CDLL(str(folder / KERNELS))
    return Environment(folder=folder, result=folder / "result.json")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "check", [integration.check, nms.check, letterbox.check, sanitizer.work], ids=lambda f: f.__module__
)
def test_the_part_passes_on_a_real_gpu(real, check):
    check(real)


@pytest.mark.gpu
@pytest.mark.slow
def test_decoding_and_nms_take_40_us_at_batch_1(real):
    nms.measure(real)
    assert real.results["batch_1_300_pairs"]["met"], real.results["batch_1_300_pairs"]
