"""Opening an engine: mismatches with this machine, missing libraries, foreign plans, and plugins."""

import importlib.util
import json
import logging
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import helper

from tests.fakes.fake_trt_runtime import ABSENT, RTX, Context, Engine, Runtime
from tests.support.foreign_graphs import (
    BOX,
    DOG,
    HW,
    SCORE,
    anchors_rows,
    cells_rows,
    constant_graph,
    end_to_end_rows,
    nms_rows,
    official_rows,
)
from tests.support.trt_kit import INFO, NMS, assert_detected, environment, infer, make_image, toy
from yolov7_deploy.errors import DeviceError, LoadError, MissingLibraryError, UsageError
from yolov7_deploy.runtimes import tensorrt as trt
from yolov7_deploy.runtimes.base import open_runtime
from yolov7_deploy.tensorrt.build_record import PluginUse
from yolov7_deploy.tensorrt.onnx_rewrite import open_onnx
from yolov7_deploy.tensorrt.plugin_library import PLUGIN_VARIABLE, PLUGIN_VERSION, PluginLibrary

__all__ = ["environment"]

FAKE_ONLY = {"absent"}  # members of the fake that TensorRT does not have
OUR_PLUGIN = PluginUse(path="/there/liby7_plugin.so", version=PLUGIN_VERSION, abi="v3")


def opened(path, **options):
    return open_runtime(path, **{"device": "auto", "input_hw": None, **options})


@pytest.mark.parametrize(
    ("fields", "named", "built", "here"),
    [
        ({"tensorrt": "9.9.9"}, "tensorrt", "TensorRT 9.9.9", "this machine has TensorRT"),
        ({"compute_capability": "8.6"}, "compute_capability", "8.6", "9.0"),
        ({"platform": "linux-aarch64"}, "platform", "linux-aarch64", "linux-"),
        ({"plugin": OUR_PLUGIN}, "plugin", f"the plugin {PLUGIN_VERSION} (v3)", "none"),
    ],
)
def test_an_engine_of_another_machine_is_refused_with_field_values_and_fix(environment, fields, named, built, here):
    environment.monkeypatch.setattr(trt, "find_plugin", lambda abi: None)
    with pytest.raises(LoadError) as caught:
        environment.open(**fields)
    assert f" {named}: the engine was built" in caught.value.message
    assert built in caught.value.message and here in caught.value.message
    assert f"y7 build --weights {environment.folder}/toy.onnx" in caught.value.fix
    assert environment.trt.contexts == []


@pytest.mark.parametrize(("product", "extra"), [("tensorrt", "tensorrt"), ("tensorrt_rtx", "tensorrt-rtx")])
def test_a_missing_tensorrt_names_its_extra(environment, product, extra):
    environment.use(RTX if product == "tensorrt_rtx" else "10.3.0")
    path = environment.engine()
    environment.monkeypatch.setitem(sys.modules, product, None)
    with pytest.raises(MissingLibraryError, match=f"{product} is needed to run toy.engine") as caught:
        opened(path)
    assert caught.value.fix == f"pip install 'yolov7-deploy[{extra}]'"


def test_a_tensorrt_that_does_not_load_is_reported_with_the_cause(environment):
    path = environment.engine()

    def broken(product):
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    environment.monkeypatch.setattr(trt, "load_tensorrt", broken)
    with pytest.raises(MissingLibraryError, match=r"does not load: libnvinfer\.so\.10"):
        opened(path)


def test_a_refused_plan_is_reported_with_tensorrts_log(environment):
    environment.trt.refusal = "Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed."
    with pytest.raises(LoadError, match=r"TensorRT [0-9.]+ cannot deserialize .*\n.*ERROR: Serialization assertion"):
        environment.open()


def test_a_plan_without_a_record_opens_with_assumptions(environment, caplog):
    runtime = environment.open(toy(None), recorded=False)
    assert runtime.metadata.class_names[:2] == ("class_0", "class_1")
    assert runtime.metadata.nms.runtime_thresholds and runtime.metadata.nms.max_det == 3
    assert (runtime.metadata.input_hw, runtime.metadata.batch) == ((64, 96), None)
    text = "\n".join(record.message for record in caplog.records if record.levelno == logging.WARNING)
    assert "no build record" in text and "assumed" in text
    assert_detected(infer(runtime, [make_image(1)]).detections[0], make_image(1))


def test_the_classes_of_a_foreign_plan_without_nms_are_counted(environment):
    runtime = environment.open(constant_graph(anchors_rows(3), image_shape=(1, 3, *HW)), recorded=False)
    assert runtime.metadata.class_names == ("class_0", "class_1", "class_2")
    assert len(infer(runtime, [make_image(1)], hw=HW).detections[0].scores) > 0


def test_the_header_of_a_plan_selects_the_tensorrt_that_opens_it(environment):
    environment.use(RTX)
    path = environment.engine(recorded=False)
    environment.monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert dict(opened(path).runtime_info)["runtime"] == f"TensorRT-RTX {RTX}"


def graph_of(*tensors):
    """Return a graph with the inputs before `None` and the outputs after it: (name, type, shape)."""
    values = [one and helper.make_tensor_value_info(one[0], one[1], one[2]) for one in tensors]
    border = values.index(None)
    inputs, outputs = values[:border], values[border + 1 :]
    nodes = [
        helper.make_node("Cast", [inputs[0].name], [one.name], to=one.type.tensor_type.elem_type) for one in outputs
    ]
    graph = helper.make_graph(nodes, "foreign", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


FLOAT, UINT8, INT32 = onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8, onnx.TensorProto.INT32


FOREIGN = {
    "yolov7 --grid": anchors_rows(batch=2),
    "yolov8": cells_rows(batch=2),
    "yolov8, one class": cells_rows(1, batch=2),
    "yolov10": end_to_end_rows(batch=2),
    "yolov7 --end2end": nms_rows(batch=2),
    "TensorRT-For-YOLO-Series": nms_rows(("num", "boxes", "scores", "classes"), batch=2),
    "yolov7 --end2end --max-wh, of fixed size": official_rows((1, 0)),
}


@pytest.mark.parametrize("layout", FOREIGN)
@pytest.mark.parametrize("recorded", [False, True], ids=["foreign plan", "our build"])
@pytest.mark.parametrize("kind", [np.float32, np.float16], ids=["float32", "float16"])
def test_engines_of_other_exporters_give_the_boxes_that_are_in_their_outputs(environment, layout, recorded, kind):
    arrays = FOREIGN[layout] if isinstance(FOREIGN[layout], dict) else {"output": FOREIGN[layout]}
    arrays = {name: array.astype(kind) if array.dtype == np.float32 else array for name, array in arrays.items()}
    image_type = onnx.TensorProto.FLOAT16 if kind is np.float16 else FLOAT
    graph = constant_graph(arrays, images=image_type, image_shape=(2, 3, *HW))
    onnx.save(graph, environment.folder / "toy.onnx")
    metadata = open_onnx(environment.folder / "toy.onnx").metadata
    runtime = environment.open(graph, recorded=recorded, metadata=metadata)
    detected = infer(
        runtime, [make_image(1)], hw=HW, multi_label=layout in ("yolov7 --end2end", "TensorRT-For-YOLO-Series")
    ).detections
    assert len(detected) == 1, "the second image is padding"
    np.testing.assert_allclose(detected[0].boxes, [BOX], atol=0.1)
    np.testing.assert_allclose(detected[0].scores, [SCORE], atol=1e-3)
    assert detected[0].class_ids.tolist() == [0 if "one class" in layout else DOG]
    assert (runtime.metadata.input_hw, runtime.metadata.batch) == (HW, 2)


def test_an_engine_whose_number_of_rows_depends_on_the_image_is_refused_when_it_is_opened(environment):
    graph = constant_graph(official_rows(), shape=["n", 7])
    with pytest.raises(LoadError, match="number of rows depends on the image"):
        environment.open(graph, recorded=False)


@pytest.mark.parametrize(
    "tensors",
    [
        [("images", FLOAT, [1, 3, 8, 8]), None, ("output", FLOAT, [1, 3, 8, 8])],
        [("images", INT32, [1, 3, 8, 8]), None, ("output", FLOAT, [1, 8, 8])],
        [("images", FLOAT, [1, 4, 8, 8]), None, ("output", FLOAT, [1, 8, 8])],
        [("images", UINT8, [1, 3, 8, 8]), None, ("output", FLOAT, [1, 8, 8])],
        [("images", FLOAT, [1, 3, 8]), None, ("output", FLOAT, [1, 3, 8])],
        [("images", FLOAT, [1, 3, 8, 8]), ("more", FLOAT, [1]), None, ("output", FLOAT, [1, 8, 8])],
    ],
)
def test_unknown_layouts_are_refused_with_the_tensors_of_the_engine(environment, tensors):
    with pytest.raises(LoadError, match="which is not a YOLOv7 layout") as caught:
        environment.open(graph_of(*tensors), recorded=False)
    assert tensors[0][0] in caught.value.message


def test_an_engine_that_contradicts_its_metadata_is_refused(environment):
    with pytest.raises(LoadError, match="not a YOLOv7 layout"):
        environment.open(toy(), metadata=replace(INFO, nms=None))


def plugin_at(folder):
    return PluginLibrary(
        path=folder / "liby7_plugin.so",
        abi="v3",
        version=PLUGIN_VERSION,
        kernels_abi=2,
        compute_capabilities=(90,),
        ptx=(),
        cuda="13.0",
        headers="10.3",
    )


def test_our_plugin_is_registered_before_the_plan_is_deserialized(environment):
    environment.monkeypatch.setattr(trt, "find_plugin", lambda abi: plugin_at(environment.folder))
    loaded_before = []
    real = environment.trt.Runtime

    def runtime(logger):
        loaded_before.extend(environment.trt.loaded)
        return real(logger)

    environment.monkeypatch.setattr(environment.trt, "Runtime", runtime)
    environment.open(plugin=OUR_PLUGIN)
    environment.open(plugin=OUR_PLUGIN, name="again.engine")
    assert loaded_before == ["Y7NMS", "Y7NMS"]
    assert environment.trt.loaded == ["Y7NMS"], "once per process"


def test_a_plugin_that_tensorrt_does_not_accept_is_an_error(environment):
    environment.monkeypatch.setattr(trt, "find_plugin", lambda abi: plugin_at(environment.folder))
    environment.monkeypatch.setattr(trt.TrtCapabilities, "load_plugin", lambda capabilities, path: None)
    with pytest.raises(LoadError, match="does not accept the plugin") as caught:
        environment.open(plugin=OUR_PLUGIN)
    assert "y7 plugin" in caught.value.fix


def test_a_damaged_kernel_library_disables_the_gpu_letterbox_and_not_the_engine(environment, caplog):
    broken = environment.folder / "broken.so"
    broken.write_bytes(b"not a library")
    environment.monkeypatch.setenv(PLUGIN_VARIABLE, str(broken))
    runtime = environment.open()
    assert dict(runtime.runtime_info)["letterbox"].startswith("host")
    assert any("The letterbox runs on the host" in record.message for record in caplog.records)
    assert_detected(infer(runtime, [make_image(1)]).detections[0], make_image(1))


def test_a_size_or_precision_other_than_that_of_the_file_is_refused(environment):
    path = environment.engine()
    with pytest.raises(UsageError, match="fixed input of 64x96, not 640x640") as caught:
        opened(path, input_hw=(640, 640))
    assert "--img 640 --engine" in caught.value.fix
    with pytest.raises(UsageError, match="is fp32; its precision is in the file"):
        opened(path, half=True)
    opened(path, input_hw=(64, 96), half=False).close()


@pytest.mark.parametrize("device", ["cpu", "gpu", "cuda:x", "cuda:-1"])
def test_a_device_that_is_not_a_gpu_is_refused(environment, device):
    with pytest.raises(DeviceError, match="runs on an NVIDIA GPU") as caught:
        environment.open(device=device)
    assert ".onnx" in caught.value.fix


@pytest.mark.parametrize("device", ["cuda:3", "3"])
def test_a_missing_gpu_is_reported(environment, device):
    with pytest.raises(DeviceError, match="no such GPU"):
        environment.open(device=device)


@pytest.mark.parametrize("allowed", [True, False])
def test_host_code_in_a_plan_is_allowed_only_if_the_record_states_it(environment, allowed):
    environment.open(version_compatible=allowed)
    assert environment.trt.host_code_allowed is allowed


def test_a_tensorrt_that_cannot_create_a_context_is_a_device_error(environment):
    environment.trt.most_contexts = 0
    with pytest.raises(DeviceError, match="cannot create a context"):
        environment.open()


def test_threshold_inputs_of_the_engine_decide_whether_thresholds_can_change(environment):
    assert environment.open().metadata.nms == NMS
    closed = replace(INFO, nms=replace(NMS, runtime_thresholds=False))
    assert environment.open(metadata=closed, name="b.engine").metadata.nms == NMS


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")
def test_the_real_tensorrt_rtx_has_the_names_that_run_an_engine_and_those_of_the_fake():
    program = (
        "import json, sys, tensorrt_rtx as trt\n"
        "kinds = [trt, trt.Runtime, trt.ICudaEngine, trt.IExecutionContext, trt.IRuntimeConfig]\n"
        "print(json.dumps({kind.__name__: dir(kind) for kind in kinds}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    real = json.loads(done.stdout.splitlines()[-1])
    for ours, theirs in ((Runtime, "Runtime"), (Engine, "ICudaEngine"), (Context, "IExecutionContext")):
        members = {name for name in vars(ours) if not name.startswith("_")} - ABSENT[RTX] - FAKE_ONLY
        assert members <= set(real[theirs]), theirs
        assert not set(real[theirs]) & ABSENT[RTX]
    assert {"CudaGraphStrategy", "ExecutionContextAllocationStrategy", "IPluginV3", "ILogger"} <= set(
        real["tensorrt_rtx"]
    )
    assert {"cuda_graph_strategy", "set_execution_context_allocation_strategy"} <= set(real["IRuntimeConfig"])
