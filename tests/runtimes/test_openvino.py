"""ONNX files in OpenVINO: the same boxes as in ONNX Runtime and PyTorch, or a refusal that names the command."""

import os
import shutil
import subprocess
import sys
import threading
from functools import lru_cache

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.support.child_processes import in_forked_child, passes_without_amx
from tests.support.sample_images import assert_identical, assert_same, noise
from tests.support.slow_cases import some_fast
from tests.support.small_models import exported_tiny
from yolov7_deploy.checkpoint import load_checkpoint
from yolov7_deploy.datasets import open_dataset
from yolov7_deploy.datasets.synthetic import write_shapes
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import DeviceError, EngineError, LoadError, UsageError
from yolov7_deploy.evaluation.parity import compare, comparison_thresholds, make_artifact
from yolov7_deploy.hub import bundled_weights
from yolov7_deploy.image import read_image
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.yolov7 import build_model
from yolov7_deploy.onnx_export.onnx_exporter import export_onnx
from yolov7_deploy.options import ExportOptions, Int8Options, Thresholds
from yolov7_deploy.precision.calibrate import calibrate
from yolov7_deploy.precision.fp16 import to_fp16
from yolov7_deploy.precision.int8 import to_int8
from yolov7_deploy.runtimes import base
from yolov7_deploy.runtimes.base import open_runtime, runtime_entry
from yolov7_deploy.tensorrt.builder import build_engine

pytest.importorskip("openvino", reason="OpenVINO is not installed")
from yolov7_deploy.runtimes import openvino as runtime_module
from yolov7_deploy.runtimes.openvino_graph import rewrite_for_openvino

HW = (192, 192)
FP32_FILES = [
    {"nms": nms, "input_kind": kind, "batch": batch}
    for nms in ("plugin", "standard", "efficient", "none")
    for kind in ("float32", "uint8")
    for batch in (1, None)
]
# Box corners in pixels and scores by which INT8 may differ, between two libraries and from FP32.
INT8_BOX, INT8_SCORE = 6.0, 0.12


@pytest.fixture(scope="module")
def fused():
    checkpoint = load_checkpoint(bundled_weights())
    return fuse(build_model(checkpoint)), checkpoint.metadata


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    data = open_dataset(write_shapes(tmp_path_factory.mktemp("data"), train=1, val=6, size=HW[0], seed=5))
    return [read_image(data.path(index)) for index in range(len(data))]


@pytest.fixture(scope="module")
def make_file(fused, images, tmp_path_factory):
    """Return a function that writes a file of the weights of this package, once per kind."""
    folder, paths = tmp_path_factory.mktemp("files"), {}

    @lru_cache
    def exported(key):
        return export_onnx(*fused, ExportOptions(input_hw=HW, **dict(key)))

    @lru_cache
    def calibrated(key):
        return calibrate(exported(key), images)

    def make(precision="fp32", target="tensorrt", *, reduce_range=False, **options):
        key = (precision, target, reduce_range, tuple(sorted(options.items())))
        if key not in paths:
            model = exported(key[3])
            if precision == "fp16":
                model = to_fp16(model, images[:1])
            if precision == "int8":
                choice = Int8Options(target=target, reduce_range=reduce_range)
                model = to_int8(model, calibrated(key[3]), choice)
            paths[key] = folder / f"{len(paths)}.onnx"
            model.save(paths[key])
        return paths[key]

    return make


def detect(path, images, **options):
    with Detector(path, device="cpu", **options) as detector:
        return detector.batch(images)


@pytest.fixture(scope="module")
def expected(images):
    """Detections of the checkpoint in PyTorch."""
    found = detect(bundled_weights(), images, img=HW)
    assert sum(map(len, found)) > 15
    return found


def assert_all_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


def assert_close(found, expected):
    """Check that INT8 detections agree with others up to some steps; those near the threshold may be missing."""
    matched = total = 0
    for ours, theirs in zip(found, expected, strict=True):
        same = (
            (ours.class_ids[:, None] == theirs.class_ids[None])
            & (np.abs(ours.scores[:, None] - theirs.scores[None]) <= INT8_SCORE)
            & (np.abs(ours.boxes[:, None] - theirs.boxes[None]) <= INT8_BOX).all(-1)
        )
        matched += int(same.any(0).sum()) + int(same.any(1).sum())
        total += len(ours) + len(theirs)
    assert matched >= 0.95 * total, (matched, total)


# --- every kind of file ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", some_fast(FP32_FILES, every=3), ids=lambda options: "-".join(map(str, options.values()))
)
def test_fp32_files_find_the_boxes_of_the_checkpoint_in_every_runtime(make_file, images, expected, options):
    path = make_file(**options)
    for runtime in ("onnxruntime", "openvino"):
        assert_all_same(detect(path, images, runtime=runtime), expected)


@pytest.mark.parametrize("nms", ["plugin", "none"])
def test_fp16_files_find_the_same_boxes_in_every_runtime(make_file, images, nms):
    found = [detect(make_file("fp16", nms=nms), images, runtime=name) for name in ("onnxruntime", "openvino")]
    assert_close(*found)


@pytest.mark.parametrize("options", [{"nms": "plugin"}, {"nms": "none"}, {"input_kind": "uint8"}, {"batch": None}])
def test_int8_files_for_cpus_find_the_same_boxes_in_every_runtime(make_file, images, expected, options):
    path = make_file("int8", "cpu", reduce_range=True, **options)
    found = [detect(path, images, runtime=name) for name in ("onnxruntime", "openvino")]
    assert_close(*found)
    for detections in found:
        assert_close(detections, expected)


@pytest.mark.parametrize("batch", [1, None])
def test_openvino_alone_runs_files_with_nms_of_standard_operators(make_file, images, expected, batch):
    """The way that docs/deployment.md shows, with float32, because the default is BF16 where the CPU has it."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(str(make_file(nms="standard", batch=batch)), "CPU", settings)
    for image, detections in zip(images, expected, strict=True):
        found = model({"images": image[None, :, :, ::-1].transpose(0, 3, 1, 2).astype(np.float32) / 255})
        count = int(found["num_dets"].item())
        np.testing.assert_array_equal(found["det_classes"][0, :count], detections.class_ids)
        np.testing.assert_allclose(found["det_scores"][0, :count], detections.scores, atol=1e-4)
        boxes = found["det_boxes"][0, :count].clip(0, HW[0])
        np.testing.assert_allclose(boxes, detections.boxes, atol=0.01)


def test_opencv_runs_files_without_nms(make_file, images):
    import cv2

    path = make_file(nms="none")
    array = images[0][:, :, ::-1].transpose(2, 0, 1)[None].astype(np.float32) / 255
    network = cv2.dnn.readNetFromONNX(str(path))
    network.setInput(array)
    decoded = network.forward()
    import onnxruntime

    (expected,) = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(
        None, {"images": array}
    )
    np.testing.assert_allclose(decoded.reshape(expected.shape), expected, rtol=1e-3, atol=1e-2)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_int8_files_for_tensorrt_are_refused(make_file):
    path = make_file("int8", "tensorrt")
    with pytest.raises(LoadError, match="OpenVINO computes them wrongly on CPUs without AMX") as caught:
        Detector(path, runtime="openvino")
    assert "--int8-target cpu" in caught.value.fix


@pytest.mark.slow
def test_the_parity_test_fails_for_a_refused_file(make_file, fused, images, monkeypatch, request):
    """Without the refusal, the comparison with PyTorch finds what OpenVINO computes wrongly without AMX."""
    if passes_without_amx(request):
        return
    from yolov7_deploy.runtimes.pytorch import PytorchRuntime

    path = make_file("int8", "tensorrt")
    monkeypatch.setattr(runtime_module, "_check_int8", lambda *_: None)
    monkeypatch.setattr(runtime_module, "has_vnni", lambda: True)
    reports = {}
    for name in ("onnxruntime", "openvino"):
        runtime = open_runtime(path, device="cpu", input_hw=None, runtime=name)
        reports[name] = compare(
            make_artifact("torch", PytorchRuntime(*fused), None, input_hw=HW),
            make_artifact(name, runtime, path, input_hw=HW),
            images,
            thresholds=comparison_thresholds(runtime.metadata),
        )
        runtime.close()
    assert reports["onnxruntime"].ok
    assert reports["openvino"].first_failure.stage == "head"


def test_bfloat16_is_verified_with_its_own_limits(make_file, fused, images):
    """The head maps that are compared are those that OpenVINO computes in bfloat16."""
    import openvino

    from yolov7_deploy.runtimes.pytorch import PytorchRuntime

    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU does not compute in bfloat16")
    path = make_file()
    runtime = open_runtime(path, device="cpu", input_hw=None, runtime="openvino-bf16")
    assert runtime.metadata.precision == "bf16"
    report = compare(
        make_artifact("torch", PytorchRuntime(*fused), None, input_hw=HW),
        make_artifact("bf16", runtime, path, input_hw=HW),
        images,
        thresholds=comparison_thresholds(runtime.metadata),
    )
    head = report.stages[0]
    assert report.ok and head.stage == "head" and head.differences["rms / std"] > 1e-3


def test_weights_of_8_bits_are_refused_on_a_cpu_without_vnni(make_file, monkeypatch):
    path = make_file("int8", "cpu")
    monkeypatch.setattr(runtime_module, "has_vnni", lambda: False)
    with pytest.raises(UsageError, match="would saturate") as caught:
        Detector(path, runtime="openvino")
    assert "--reduce-range" in caught.value.fix
    monkeypatch.setattr(runtime_module, "has_vnni", lambda: True)
    Detector(path, runtime="openvino").close()


def test_tensorrt_refuses_int8_files_for_cpus(fused, images):
    model = export_onnx(*fused, ExportOptions(input_hw=HW))
    quantized = to_int8(model, calibrate(model, images[:1]), Int8Options(target="cpu"))
    with pytest.raises(EngineError, match="quantized for cpu") as caught:
        build_engine(quantized)
    assert "--int8-target tensorrt" in caught.value.fix


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"runtime": "openvino", "device": "cuda:0"}, DeviceError, "no device 'cuda:0'"),
        ({"runtime": "openvino", "device": "intel:npu"}, DeviceError, "no NPU here"),
        ({"runtime": "opnvino"}, UsageError, "runtime=.opnvino. is unknown"),
        ({"runtime": "tensorrt"}, UsageError, "runs with onnxruntime or openvino, not with tensorrt"),
        ({"runtime": "openvino", "half": True}, UsageError, "its precision is in the file"),
        ({"runtime": "openvino", "img": 64}, UsageError, "has a fixed input of 192x192"),
    ],
)
def test_other_requests_are_refused(make_file, options, error, message):
    with pytest.raises(error, match=message) as caught:
        Detector(make_file(), **options)
    assert caught.value.fix


@pytest.mark.parametrize("content", [b"", b"not onnx", b"\x08\x07\x3a\xff\xff\xff\xff\x0f"])
def test_damaged_files_are_refused(tmp_path, content):
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(LoadError) as caught:
        Detector(tmp_path / "a.onnx", runtime="openvino")
    assert caught.value.fix


def test_bf16_runs_or_is_refused_by_name(make_file, images, expected):
    try:
        found = detect(make_file(), images, runtime="openvino-bf16")
    except DeviceError as error:
        assert "This CPU does not compute in bf16" in error.message
    else:
        assert_close(found, expected)


def test_float16_is_for_files_whose_decoding_and_nms_are_on_the_host(make_file, images, expected):
    """In float16, decoding loses half a pixel and NMS mixes up anchors, which the comparison with PyTorch found."""
    try:
        found = detect(make_file(), images, runtime="openvino-f16")
    except DeviceError as error:
        assert "This CPU does not compute in f16" in error.message
        return
    assert_close(found, expected)
    for nms in ("standard", "efficient", "none"):
        with pytest.raises(UsageError, match="would compute in float16, too") as caught:
            Detector(make_file(nms=nms), runtime="openvino-f16")
        assert "--nms plugin" in caught.value.fix


@pytest.mark.parametrize(
    ("runtime", "quantized"), [("openvino-bf16", ()), ("openvino-bf16", ("int8", "cpu")), ("openvino-f16", ())]
)
def test_the_nms_that_is_verified_is_the_one_that_runs(make_file, fused, images, quantized, runtime):
    """The copy with head maps as outputs has its NMS on the host, too, and finds the same boxes at confidence 0."""
    from yolov7_deploy.runtimes.pytorch import PytorchRuntime

    path = make_file(*quantized)
    try:
        opened = open_runtime(path, device="cpu", input_hw=None, runtime=runtime)
    except DeviceError as error:
        pytest.skip(error.message)
    report = compare(
        make_artifact("torch", PytorchRuntime(*fused), None, input_hw=HW),
        make_artifact(runtime, opened, path, input_hw=HW),
        images,
        thresholds=comparison_thresholds(opened.metadata),
    )
    assert report.ok and [stage.stage for stage in report.stages] == ["head", "decode", "nms", "detections"]


# --- the choice of `auto` -------------------------------------------------------------------------------------------


def test_auto_is_openvino_where_it_is_faster(make_file, monkeypatch):
    monkeypatch.setattr(base, "has_vnni", lambda: False)
    expected = {
        make_file(): "onnxruntime",
        make_file("fp16", nms="plugin"): "openvino",
        make_file("int8", "cpu", reduce_range=True, nms="plugin"): "openvino",
        make_file("int8", "cpu"): "onnxruntime",
        make_file("int8", "tensorrt"): "onnxruntime",
    }
    assert {path: runtime_entry(path).name for path in expected} == expected
    monkeypatch.setattr(base, "has_vnni", lambda: True)
    assert runtime_entry(make_file("int8", "cpu")).name == "openvino"
    with Detector(make_file("int8", "cpu", reduce_range=True, nms="plugin"), device="cpu") as detector:
        assert detector.runtime == "openvino"


# --- calls ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [{"multi_label": True}, {"class_agnostic": True}, {"conf": 0.6}, {"iou": 0.9}])
def test_thresholds_can_be_chosen_at_run_time(make_file, images, option):
    changed = {"conf": 0.01, "iou": 0.3, **option}
    found = [detect(make_file(), images, runtime=name, **changed) for name in ("onnxruntime", "openvino")]
    assert_all_same(*found)


def test_callers_in_threads_get_their_own_results_and_each_core_runs_an_image(make_file, images):
    with Detector(make_file(), device="cpu", runtime="openvino") as detector:
        expected = detector.batch(images)
        assert dict(detector.runtime_info)["streams"] == "1"
        failures = []

        def call(number):
            for turn in range(30):
                index = (number + turn) % len(images)
                try:
                    assert_same(detector(images[index]), expected[index])
                except Exception as error:  # noqa: BLE001 - raised in the main thread
                    failures.append(error)

        threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        networks = detector._runtime._session.get()
        if networks.compiling is not None:  # calls overlapped on several cores
            networks.compiling.join()
            assert dict(detector.runtime_info)["streams"] != "1"


def test_a_call_that_cannot_start_the_thread_for_throughput_is_not_counted_as_running(make_file, images, monkeypatch):
    def fail(thread):
        raise RuntimeError("can't start new thread")

    with Detector(make_file(), device="cpu", runtime="openvino") as detector:
        session = detector._runtime._session
        networks, session._cores = session.get(), 2
        networks.running = 1  # another call
        with monkeypatch.context() as patched, pytest.raises(DeviceError, match="can't start new thread") as caught:
            patched.setattr(threading.Thread, "start", fail)
            detector(images[0])
        assert "--device" not in caught.value.fix
        assert (networks.running, networks.compiling) == (1, None)
        detector(images[0])
        networks.compiling.join()
        assert networks.throughput is not None


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_opens_the_file_again(make_file, images):
    with Detector(make_file(), device="cpu", runtime="openvino") as detector:
        expected = detector(images[0])

        def work():
            assert_identical(detector(images[0]), expected)
            return True

        assert in_forked_child(work)
        assert_identical(detector(images[0]), expected)


def test_a_closed_detector_refuses_calls(make_file, images):
    detector = Detector(make_file(), runtime="openvino")
    detector.close()
    with pytest.raises(UsageError, match="closed"):
        detector(images[0])


# --- rewriting the file ---------------------------------------------------------------------------------------------


def test_files_of_other_programs_open(make_file, images, tmp_path, expected):
    proto = onnx.load(make_file(nms="none"))
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "foreign.onnx")
    found = detect(tmp_path / "foreign.onnx", images, runtime="openvino", conf=0.25)
    assert [len(entry) for entry in found] == [len(entry) for entry in expected]


def test_a_file_with_nothing_to_rewrite_is_unchanged(make_file):
    data = make_file(nms="none").read_bytes()
    graph = rewrite_for_openvino(data)
    assert graph.data is data and not graph.is_changed


def _operators(data):
    return [node.op_type for node in onnx.load_model_from_string(data).graph.node]


def test_the_nms_operator_is_replaced_and_the_head_maps_are_the_outputs(make_file):
    graph = rewrite_for_openvino(make_file(nms="plugin").read_bytes())
    after = onnx.load_model_from_string(graph.data)
    onnx.checker.check_model(after)
    assert [output.name for output in after.graph.output] == list(graph.heads)
    assert [entry.name for entry in after.graph.input] == ["images"]
    assert not {"TopK", "Loop", "Y7NMS"} & set(_operators(graph.data))
    assert graph.nms.strides == (8, 16, 32) and graph.nms.classes == 6 and graph.nms.anchors.shape == (3, 3, 2)


def _with_another_output(graph):
    graph.output.append(helper.make_tensor_value_info(graph.node[0].output[0], TensorProto.FLOAT, None))


def _without_anchor(graph):
    node = next(node for node in graph.node if node.op_type == "Y7NMS")
    next(attribute for attribute in node.attribute if attribute.name == "anchors").floats.pop()


def _with_fixed_thresholds(graph):
    for entry in [entry for entry in graph.input if entry.name != "images"]:
        graph.input.remove(entry)


@pytest.mark.parametrize("change", [_with_another_output, _without_anchor, _with_fixed_thresholds])
def test_an_nms_operator_that_cannot_be_replaced_becomes_its_body(make_file, change):
    model = onnx.load(make_file(nms="plugin"))
    change(model.graph)
    graph = rewrite_for_openvino(model.SerializeToString())
    assert graph.nms is None and {"TopK", "Loop"} <= set(_operators(graph.data))


@pytest.mark.parametrize("options", [{}, {"batch": None}, {"batch": None, "dynamic_size": True}], ids=str)
@pytest.mark.parametrize("conf", some_fast([0.0, 0.25, 0.001, 1.0], every=2))
def test_nms_outside_the_network_finds_the_boxes_of_the_operators_of_the_file(make_file, images, options, conf):
    """Both sum in another order than ONNX Runtime, so the operators run in OpenVINO, too."""
    path = make_file(nms="plugin", **options)
    changed = path.with_suffix(".changed.onnx")
    model = onnx.load(path)
    _with_another_output(model.graph)
    onnx.save(model, changed)
    found = [detect(file, images, runtime="openvino", conf=conf) for file in (path, changed)]
    assert_all_same(*found)


def test_functions_that_call_functions_are_inlined_with_their_attributes():
    """Attributes of the call, missing inputs, subgraphs and unused outputs become those of the inlined nodes."""
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    then = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["doubled"])],
        "then",
        [],
        [helper.make_tensor_value_info("doubled", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["same"])],
        "else",
        [],
        [helper.make_tensor_value_info("same", TensorProto.FLOAT, None)],
    )
    leaky = helper.make_node("LeakyRelu", ["branch"], ["y"])
    leaky.attribute.append(onnx.AttributeProto(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT))
    inner = helper.make_function(
        "own",
        "Inner",
        ["x", "flag"],
        ["y", "unused"],
        [
            helper.make_node("If", ["flag"], ["branch"], then_branch=then, else_branch=other),
            leaky,
            helper.make_node("Neg", ["x"], ["unused"]),
        ],
        opsets,
        attributes=["slope"],
    )
    outer = helper.make_function(
        "own",
        "Outer",
        ["x", "flag"],
        ["y"],
        [
            helper.make_node("Inner", ["x", "flag"], ["first", ""], domain="own", slope=0.5),
            helper.make_node("Mul", ["first", "first"], ["y"]),
        ],
        opsets,
    )
    graph = helper.make_graph(
        [helper.make_node("Outer", ["x", "flag"], ["y"], domain="own")],
        "graph",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [4]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
    )
    model = helper.make_model(graph, opset_imports=opsets, functions=[inner, outer], ir_version=9)
    rewritten = onnx.load_model_from_string(rewrite_for_openvino(model.SerializeToString()).data)
    assert not rewritten.functions and all(not node.domain for node in rewritten.graph.node)
    from onnx.reference import ReferenceEvaluator

    x = np.array([-2, -1, 0, 3], np.float32)
    for flag in (True, False):
        expected = np.square(np.where(x > 0, x, 0.5 * x) * (2 if flag else 1))
        (found,) = ReferenceEvaluator(rewritten).run(None, {"x": x, "flag": np.array(flag)})
        np.testing.assert_allclose(found, expected)


def test_functions_have_the_default_values_of_their_attributes():
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    leaky = helper.make_node("LeakyRelu", ["x"], ["y"])
    leaky.attribute.append(onnx.AttributeProto(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT))
    function = helper.make_function(
        "own", "Leaky", ["x"], ["y"], [leaky], opsets, attribute_protos=[helper.make_attribute("slope", 0.5)]
    )
    nodes = [
        helper.make_node("Leaky", ["x"], ["default"], domain="own"),
        helper.make_node("Leaky", ["x"], ["given"], domain="own", slope=0.25),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "default", "given")]
    graph = helper.make_graph(nodes, "graph", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=9)
    rewritten = onnx.load_model_from_string(rewrite_for_openvino(model.SerializeToString()).data)
    assert [node.attribute[0].f for node in rewritten.graph.node] == [0.5, 0.25]


@pytest.mark.parametrize("kind", [np.int8, np.uint8])
def test_the_zero_point_of_activations_may_be_a_constant_node(kind):
    constants = {"scale": np.float32(1), "zero": kind(0)}
    nodes = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(value)))
        for name, value in constants.items()
    ]
    nodes.append(helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"]))
    values = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [2]),
        helper.make_tensor_value_info("y", helper.np_dtype_to_tensor_dtype(np.dtype(kind)), [2]),
    ]
    model = helper.make_model(helper.make_graph(nodes, "graph", values[:1], values[1:]))
    assert rewrite_for_openvino(model.SerializeToString()).has_int8_activations == (kind is np.int8)


def test_inner_pairs_are_removed(make_file):
    data = make_file("int8", "cpu", reduce_range=True, nms="plugin").read_bytes()
    before, after = onnx.load_model_from_string(data), onnx.load_model_from_string(rewrite_for_openvino(data).data)
    onnx.checker.check_model(after)
    pairs = [sum(node.op_type == "QuantizeLinear" for node in model.graph.node) for model in (before, after)]
    assert pairs[1] < pairs[0]
    names = {name for node in after.graph.node for name in node.input if name}
    produced = {name for node in after.graph.node for name in node.output}
    known = produced | {tensor.name for tensor in after.graph.initializer} | {entry.name for entry in after.graph.input}
    assert names <= known


def test_the_network_of_another_test_has_the_same_detections(tmp_path):
    """Rectangular input, five classes, and 300 detections of noise."""
    path = tmp_path / "tiny.onnx"
    exported_tiny(nms="plugin", max_det=300).save(path)
    image = noise(128, 192, seed=3)
    found = [detect(path, [image], runtime=name, conf=0.2) for name in ("onnxruntime", "openvino")]
    assert len(found[0][0]) > 20
    assert_all_same(*found)
    assert Thresholds().max_det == 300


# --- signals ----------------------------------------------------------------------------------------------------------


def test_a_signal_after_a_detector_was_freed_in_another_thread_does_not_end_the_process(files, tmp_path):
    """OpenVINO gives the thread that loads its CPU plugin a stack for signals, and unmaps it with the plugin."""
    script = tmp_path / "signal_after_close.py"
    script.write_text(
        f"""
import faulthandler, gc, os, signal, threading
faulthandler.enable()
from yolov7_deploy import Detector
kept = [Detector({str(files("plugin"))!r}, runtime="openvino")]
def free():
    kept.pop().close()
    gc.collect()
thread = threading.Thread(target=free)
thread.start()
thread.join()
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "interrupted"), done.stderr


# --- compiled networks on disk ----------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "yolov7_deploy" / "openvino"


def open_openvino(path):
    with Detector(path, runtime="openvino") as detector:
        return len(detector(noise(128, 192)))


def test_a_compiled_network_is_kept_and_used_again(files, cache):
    found = open_openvino(files("plugin"))
    (blob,) = cache.iterdir()
    written = blob.stat().st_mtime_ns
    assert open_openvino(files("plugin")) == found
    assert list(cache.iterdir()) == [blob] and blob.stat().st_mtime_ns == written


def test_the_networks_that_were_used_longest_ago_are_removed(files, cache, monkeypatch):
    cache.mkdir(parents=True)
    for age, name in enumerate(("new", "old", "older")):
        (cache / name).write_bytes(bytes(1000))
        os.utime(cache / name, (1e9 - age, 1e9 - age))
    monkeypatch.setattr(runtime_module, "MAX_CACHE_BYTES", 2000)
    open_openvino(files("plugin"))
    assert {"new", "old"} <= {path.name for path in cache.iterdir()} and not (cache / "older").exists()


def test_a_file_that_an_export_verifies_is_not_kept(files, cache, tmp_path):
    partial = tmp_path / f".tiny.{'0' * 16}.partial.onnx"
    shutil.copy(files("plugin"), partial)
    open_openvino(partial)
    assert not cache.exists() or not list(cache.iterdir())


def test_a_cache_that_cannot_be_created_is_no_error(files, cache):
    cache.parent.parent.write_text("a file in the way")
    assert open_openvino(files("plugin")) >= 0
