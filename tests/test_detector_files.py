"""Opening and closing Detectors, and files of other exporters."""

import logging
import os
import subprocess
import sys
import threading

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.support.sample_images import (
    CONF,
    IMAGES,
    MAX_DET,
    assert_identical,
    needs_no_cuda,
    without_metadata,
)
from tests.support.small_models import HW
from yolov7_deploy._ort_options import ORT_ERRORS, base_session_options
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import DeviceError, LoadError, UsageError

# --- opening and closing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["torch", "plugin"])
def test_after_closing_every_call_is_refused(files, kind):
    with Detector(files(kind), img=HW, device="cpu") as detector:
        future = detector.submit(IMAGES[0])
        assert len(future.result(timeout=60)) > 0
    detector.close()
    for call in (detector, detector.submit):
        with pytest.raises(UsageError, match="closed") as caught:
            call(IMAGES[0])
        assert caught.value.fix
    with pytest.raises(UsageError, match="closed"):
        detector.batch([IMAGES[0]])
    with pytest.raises(UsageError, match="closed"):
        detector.warmup()


def test_closing_ends_all_threads(files):
    before = threading.active_count()
    with Detector(files("plugin"), device="cpu") as detector:
        detector.submit(IMAGES[0]).result(timeout=60)
        assert threading.active_count() > before
    assert threading.active_count() == before


def test_warmup_runs_without_an_image(detectors):
    detectors("torch").warmup()
    detectors("plugin").warmup(runs=1)


def test_the_device_is_reported(detectors):
    assert detectors("torch").device == detectors("plugin").device == "cpu"


@needs_no_cuda
@pytest.mark.parametrize("kind", ["torch", "plugin"])
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "0"])
def test_cuda_without_cuda_is_refused_with_a_fix(files, kind, device):
    with pytest.raises(DeviceError) as caught:
        Detector(files(kind), img=HW, device=device)
    assert "cpu" in caught.value.fix


@pytest.mark.parametrize("kind", ["torch", "plugin"])
@pytest.mark.parametrize("device", ["abacus", "cuda:x", ""])
def test_an_unknown_device_is_refused(files, kind, device):
    with pytest.raises(DeviceError):
        Detector(files(kind), img=HW, device=device)


def test_a_size_other_than_that_of_the_file_is_refused(files):
    with pytest.raises(UsageError, match="128x192, not 320x320") as caught:
        Detector(files("plugin"), img=320, device="cpu")
    assert "--img 320" in caught.value.fix


def test_a_size_the_stride_does_not_divide_is_refused(files):
    with pytest.raises(UsageError, match="stride 32") as caught:
        Detector(files("torch"), img=(100, 128), device="cpu")
    assert caught.value.fix == "--img 128"


def test_a_missing_file_or_unknown_suffix_is_refused(tmp_path):
    (tmp_path / "m.bin").touch()
    for name in ("absent.onnx", "m.bin"):
        with pytest.raises(LoadError, match=name) as caught:
            Detector(tmp_path / name, device="cpu")
        assert caught.value.fix


@pytest.mark.parametrize("part", [0, 100, 0.5])
def test_a_truncated_onnx_file_is_refused(files, tmp_path, part):
    data = files("plugin").read_bytes()
    path = tmp_path / "m.onnx"
    path.write_bytes(data[: int(len(data) * part) if part == 0.5 else part])
    with pytest.raises(LoadError, match=r"m\.onnx") as caught:
        Detector(path, device="cpu")
    assert caught.value.fix


def test_a_text_file_with_the_suffix_onnx_is_refused(tmp_path):
    (tmp_path / "m.onnx").write_text("not a model")
    with pytest.raises(LoadError, match=r"m\.onnx"):
        Detector(tmp_path / "m.onnx", device="cpu")


_RECORD_TELEMETRY = """
import onnxruntime
calls = []
onnxruntime.disable_telemetry_events = lambda: calls.append("disabled")
import yolov7_deploy.runtimes.onnxruntime
print(*calls)
"""


def test_the_telemetry_of_an_onnx_runtime_that_is_already_imported_is_disabled():
    done = subprocess.run([sys.executable, "-c", _RECORD_TELEMETRY], capture_output=True, text=True, check=True)
    assert done.stdout == "disabled\n"


def test_onnx_runtime_writes_no_files_of_telemetry(files, tmp_path):
    code = f"from yolov7_deploy import Detector; Detector({str(files('plugin'))!r}, device='cpu').warmup()"
    variables = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), str(tmp_path))
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    subprocess.run([sys.executable, "-c", code], env={**environment, **variables}, check=True)
    assert list(tmp_path.iterdir()) == []


# --- files of other exporters ---------------------------------------------------------------------------------------


def test_a_file_without_metadata_opens_with_a_warning(files, detectors, tmp_path, caplog):
    path = without_metadata(files("none"), tmp_path / "m.onnx")
    with caplog.at_level(logging.WARNING), Detector(path, conf=CONF, max_det=MAX_DET, device="cpu") as detector:
        assert any(
            "no metadata" in record.getMessage() and "m.onnx" in record.getMessage() for record in caplog.records
        )
        assert detector.class_names == tuple(f"class_{i}" for i in range(5))
        assert detector.input_hw == HW
        for image in IMAGES:
            assert_identical(detector(image), detectors("none")(image))


def test_a_foreign_file_with_nms_inside_opens(files, detectors, tmp_path):
    path = without_metadata(files("plugin"), tmp_path / "m.onnx", without_thresholds)
    with Detector(path, device="cpu") as detector:
        assert detector.input_hw == HW
        assert detector.class_names[:2] == ("class_0", "class_1")
        for image in IMAGES:
            assert_identical(detector(image), detectors("plugin")(image))
        assert len(detector(IMAGES[0], conf=0.75)) == len(detectors("plugin")(IMAGES[0], conf=0.75))


def without_thresholds(proto):
    """Make the thresholds constants, as other exporters do."""
    kept = [value for value in proto.graph.input if not value.name.endswith("_threshold")]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)


def test_a_foreign_file_whose_outputs_are_in_another_order_opens(files, detectors, tmp_path):
    def shuffled(proto):
        without_thresholds(proto)
        outputs = sorted(proto.graph.output, key=lambda value: value.name)
        assert outputs[0].name == "det_boxes"
        del proto.graph.output[:]
        proto.graph.output.extend(outputs)

    with Detector(without_metadata(files("plugin"), tmp_path / "m.onnx", shuffled), device="cpu") as detector:
        assert_identical(detector(IMAGES[0]), detectors("plugin")(IMAGES[0]))


def test_a_foreign_file_with_threshold_inputs_uses_the_thresholds_of_the_call(files, detectors, tmp_path):
    with Detector(without_metadata(files("plugin"), tmp_path / "m.onnx"), device="cpu") as detector:
        ours, expected = (one(IMAGES[0], conf=0.75) for one in (detector, detectors("plugin")))
        assert_identical(ours, expected)


def test_a_file_of_ours_that_another_program_gave_a_float16_input_runs(files, detectors, tmp_path):
    proto = onnx.load(files("plugin"))
    images = next(value for value in proto.graph.input if value.name == "images")
    images.name, images.type.tensor_type.elem_type = "half", TensorProto.FLOAT16
    proto.graph.node.insert(0, helper.make_node("Cast", ["half"], ["images"], to=TensorProto.FLOAT))
    onnx.save(proto, tmp_path / "m.onnx")
    with Detector(tmp_path / "m.onnx", device="cpu") as detector:
        found, expected = detector(IMAGES[0]), detectors("plugin")(IMAGES[0])
        assert abs(len(found) - len(expected)) <= 3
        np.testing.assert_allclose(found.scores[:20], expected.scores[:20], atol=5e-3)


def test_a_foreign_file_of_dynamic_size_uses_the_requested_size(files, detectors, tmp_path):
    proto = onnx.load(files("none"))
    for dim in proto.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.Clear()
        dim.dim_param = "side"
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "m.onnx")
    with Detector(tmp_path / "m.onnx", img=HW, conf=CONF, max_det=MAX_DET, device="cpu") as detector:
        assert_identical(detector(IMAGES[0]), detectors("none")(IMAGES[0]))


def without_zero_points(proto):
    """Make the second convolution INT8, with a weight scale per channel and without zero points of the weights."""
    graph = proto.graph
    index, conv = [(index, node) for index, node in enumerate(graph.node) if node.op_type == "Conv"][1]
    weight = next(tensor for tensor in graph.initializer if tensor.name == conv.input[1])
    floats = numpy_helper.to_array(weight)
    scales = np.abs(floats).max(axis=(1, 2, 3)) / 127
    int8 = np.round(floats / scales[:, None, None, None]).astype(np.int8)
    weight.CopyFrom(numpy_helper.from_array(int8, weight.name))
    constants = {"w_scale": scales, "x_scale": np.float32(0.05), "x_zero": np.uint8(128)}
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    added = [
        helper.make_node("QuantizeLinear", [conv.input[0], "x_scale", "x_zero"], ["x_int8"]),
        helper.make_node("DequantizeLinear", ["x_int8", "x_scale", "x_zero"], ["x"]),
        helper.make_node("DequantizeLinear", [weight.name, "w_scale"], ["w"], axis=0),
    ]
    conv.input[0], conv.input[1] = "x", "w"
    for node in reversed(added):
        graph.node.insert(index, node)


def fails_with_exact_int8(path):
    session = onnxruntime.InferenceSession(path, base_session_options(), providers=["CPUExecutionProvider"])
    try:
        session.run(None, {"images": np.zeros((1, 3, *HW), np.float32)})
    except ORT_ERRORS:
        return True
    return False


def test_a_foreign_int8_file_without_zero_points_runs(files, detectors, tmp_path, caplog):
    path = without_metadata(files("none"), tmp_path / "m.onnx", without_zero_points)
    with Detector(path, conf=CONF, max_det=MAX_DET, device="cpu") as detector:
        with caplog.at_level(logging.WARNING):
            found, _, _ = (detector(IMAGES[0]) for _ in range(3))
        expected = detectors("none")(IMAGES[0])
    np.testing.assert_allclose(found.scores[:10], expected.scores[:10], atol=0.05)
    reports = [record for record in caplog.records if "zero points" in record.getMessage()]
    assert len(reports) == fails_with_exact_int8(path)


def test_a_run_whose_session_another_thread_has_replaced_is_repeated_on_the_new_one(files, tmp_path):
    path = without_metadata(files("none"), tmp_path / "m.onnx", without_zero_points)
    if not fails_with_exact_int8(path):
        pytest.skip("ONNX Runtime runs the file on this CPU with exact INT8 kernels")
    with Detector(path, device="cpu") as detector:
        session = detector._runtime._session
        replaced, feeds = session.get(), {"images": np.zeros((1, 3, *HW), np.float32)}
        expected = session.run(replaced, None, feeds)
        assert session.get() is not replaced
        np.testing.assert_array_equal(session.run(replaced, None, feeds)[0], expected[0])


@pytest.mark.parametrize(
    "input_shape, output_shape", [([1, 10], [1, 10]), ([1, 3, 64, 64], [1, 1000]), ([1, 3, 64, 64], [1, 63, 4])]
)
def test_an_onnx_file_of_another_layout_is_refused(tmp_path, input_shape, output_shape):
    nodes = [
        helper.make_node("Constant", [], ["y0"], value=helper.make_tensor("c", TensorProto.FLOAT, [1], [1.0])),
        helper.make_node(
            "Constant", [], ["s"], value=helper.make_tensor("s", TensorProto.INT64, [len(output_shape)], output_shape)
        ),
        helper.make_node("Expand", ["y0", "s"], ["y1"]),
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Add", ["y1", "sum"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, input_shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output_shape)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    with pytest.raises(LoadError, match="not a YOLOv7 layout") as caught:
        Detector(tmp_path / "m.onnx", device="cpu")
    assert str(input_shape) in caught.value.message
    assert caught.value.fix
