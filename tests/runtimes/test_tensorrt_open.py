"""Opening an engine: what does not fit this machine, what is missing, foreign plans, and what a plan needs."""

import importlib.util
import json
import logging
import subprocess
import sys
from dataclasses import replace

import onnx
import pytest
from onnx import helper

from tests.fakes.fake_trt_runtime import ABSENT, RTX, Context, Engine, Runtime
from tests.support.trt_kit import INFO, NMS, assert_found, infer, make_image, setting, toy
from yolov7_deploy.errors import DeviceError, LoadError, MissingLibraryError, UsageError
from yolov7_deploy.runtimes import tensorrt as trt
from yolov7_deploy.runtimes.base import open_backend
from yolov7_deploy.tensorrt.build_record import PluginUse
from yolov7_deploy.tensorrt.plugin_library import PLUGIN_VARIABLE, PLUGIN_VERSION, PluginLibrary

__all__ = ["setting"]

OWN = {"absent"}  # members of the fake that TensorRT does not have
OUR_PLUGIN = PluginUse(path="/there/liby7_plugin.so", version=PLUGIN_VERSION, abi="v3")


def opened(path, **options):
    return open_backend(path, **{"device": "auto", "input_hw": None, **options})


@pytest.mark.parametrize(
    ("fields", "named", "built", "here"),
    [
        ({"tensorrt": "10.4.0"}, "tensorrt", "TensorRT 10.4.0", "TensorRT 10.3.0"),
        ({"compute_capability": "8.6"}, "compute_capability", "8.6", "9.0"),
        ({"platform": "linux-aarch64"}, "platform", "linux-aarch64", "linux-"),
        ({"plugin": OUR_PLUGIN}, "plugin", f"the plugin {PLUGIN_VERSION} (v3)", "none"),
    ],
)
def test_an_engine_of_another_machine_names_field_values_and_repair(setting, fields, named, built, here):
    setting.monkeypatch.setattr(trt, "find_plugin", lambda abi: None)
    with pytest.raises(LoadError) as caught:
        setting.backend(**fields)
    assert f" {named}: the engine was built" in caught.value.message
    assert built in caught.value.message and here in caught.value.message
    assert f"y7 build --weights {setting.folder}/toy.onnx" in caught.value.fix
    assert setting.trt.contexts == []


@pytest.mark.parametrize(("product", "extra"), [("tensorrt", "tensorrt"), ("tensorrt_rtx", "tensorrt-rtx")])
def test_a_missing_tensorrt_names_its_extra(setting, product, extra):
    setting.use(RTX if product == "tensorrt_rtx" else "10.3.0")
    path = setting.engine()
    setting.monkeypatch.setitem(sys.modules, product, None)
    with pytest.raises(MissingLibraryError, match=f"{product} is needed to run toy.engine") as caught:
        opened(path)
    assert caught.value.fix == f"pip install 'yolov7-deploy[{extra}]'"


def test_a_tensorrt_that_does_not_load_says_why(setting):
    path = setting.engine()

    def broken(product):
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    setting.monkeypatch.setattr(trt, "load_tensorrt", broken)
    with pytest.raises(MissingLibraryError, match=r"does not load: libnvinfer\.so\.10"):
        opened(path)


def test_a_refused_plan_comes_with_tensorrts_last_words(setting):
    setting.trt.refusal = "Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed."
    with pytest.raises(LoadError, match=r"TensorRT 10\.3\.0 does not open .*\n.*ERROR: Serialization assertion"):
        setting.backend()


def test_a_plan_without_a_record_opens_with_assumptions(setting, caplog):
    backend = setting.backend(toy(None), recorded=False)
    assert backend.metadata.class_names[:2] == ("class_0", "class_1")
    assert backend.metadata.nms.runtime_thresholds and backend.metadata.nms.max_det == 3
    assert (backend.metadata.input_hw, backend.metadata.batch) == ((64, 96), None)
    text = "\n".join(record.message for record in caplog.records if record.levelno == logging.WARNING)
    assert "no build record" in text and "assumed" in text
    assert_found(infer(backend, [make_image(1)]).found[0], make_image(1))


def test_a_foreign_plan_of_raw_rows_counts_its_classes(setting):
    backend = setting.backend(toy(decoded=True), recorded=False)
    assert backend.metadata.class_names == ("class_0", "class_1", "class_2")
    assert len(infer(backend, [make_image(1)]).found[0].scores) > 0


def test_a_plan_says_by_its_first_letters_which_tensorrt_it_is_for(setting):
    setting.use(RTX)
    path = setting.engine(recorded=False)
    setting.monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert dict(opened(path).runtime_info)["runtime"] == f"TensorRT-RTX {RTX}"


def graph_of(*tensors):
    """Inputs before `None`, outputs behind it: (name, type, shape)."""
    values = [one and helper.make_tensor_value_info(one[0], one[1], one[2]) for one in tensors]
    border = values.index(None)
    inputs, outputs = values[:border], values[border + 1 :]
    nodes = [
        helper.make_node("Cast", [inputs[0].name], [one.name], to=one.type.tensor_type.elem_type) for one in outputs
    ]
    graph = helper.make_graph(nodes, "foreign", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


FLOAT, UINT8, INT32 = onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8, onnx.TensorProto.INT32


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
def test_layouts_that_are_none_are_refused_with_what_was_found(setting, tensors):
    with pytest.raises(LoadError, match="which is no YOLOv7 layout") as caught:
        setting.backend(graph_of(*tensors), recorded=False)
    assert tensors[0][0] in caught.value.message


def test_an_engine_that_does_not_do_what_its_metadata_says_is_refused(setting):
    with pytest.raises(LoadError, match="no YOLOv7 layout"):
        setting.backend(toy(), metadata=replace(INFO, nms=None))


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


def test_our_plugin_is_in_the_registry_before_the_plan_is_read(setting):
    setting.monkeypatch.setattr(trt, "find_plugin", lambda abi: plugin_at(setting.folder))
    loaded_then = []
    real = setting.trt.Runtime

    def runtime(logger):
        loaded_then.extend(setting.trt.loaded)
        return real(logger)

    setting.monkeypatch.setattr(setting.trt, "Runtime", runtime)
    setting.backend(plugin=OUR_PLUGIN)
    setting.backend(plugin=OUR_PLUGIN, name="again.engine")
    assert loaded_then == ["Y7NMS", "Y7NMS"]
    assert setting.trt.loaded == ["Y7NMS"], "once a process"


def test_a_plugin_that_tensorrt_does_not_take_is_an_error(setting):
    setting.monkeypatch.setattr(trt, "find_plugin", lambda abi: plugin_at(setting.folder))
    setting.monkeypatch.setattr(trt.Dialect, "load_plugin", lambda dialect, path: None)
    with pytest.raises(LoadError, match="does not take the plugin") as caught:
        setting.backend(plugin=OUR_PLUGIN)
    assert "y7 plugin" in caught.value.fix


def test_a_damaged_kernels_library_costs_the_gpu_letterbox_and_not_the_engine(setting, caplog):
    broken = setting.folder / "broken.so"
    broken.write_bytes(b"not a library")
    setting.monkeypatch.setenv(PLUGIN_VARIABLE, str(broken))
    backend = setting.backend()
    assert dict(backend.runtime_info)["letterbox"].startswith("host")
    assert any("the letterbox stays on the host" in record.message for record in caplog.records)
    assert_found(infer(backend, [make_image(1)]).found[0], make_image(1))


def test_another_size_or_precision_than_the_files_is_refused(setting):
    path = setting.engine()
    with pytest.raises(UsageError, match="fixed input of 64x96, not 640x640") as caught:
        opened(path, input_hw=(640, 640))
    assert "--img 640,640 --engine" in caught.value.fix
    with pytest.raises(UsageError, match="is fp32; its precision is in the file"):
        opened(path, half=True)
    opened(path, input_hw=(64, 96), half=False).close()


@pytest.mark.parametrize("device", ["cpu", "gpu", "cuda:x", "cuda:-1"])
def test_what_is_no_gpu_is_refused(setting, device):
    with pytest.raises(DeviceError, match="runs on an NVIDIA GPU") as caught:
        setting.backend(device=device)
    assert ".onnx" in caught.value.fix


@pytest.mark.parametrize("device", ["cuda:3", "3"])
def test_a_gpu_that_is_not_there_is_named_as_such(setting, device):
    with pytest.raises(DeviceError, match="no such GPU"):
        setting.backend(device=device)


@pytest.mark.parametrize("allowed", [True, False])
def test_code_inside_a_plan_runs_only_where_the_record_says_there_is_some(setting, allowed):
    setting.backend(version_compatible=allowed)
    assert setting.trt.host_code_allowed is allowed


def test_a_tensorrt_that_makes_no_context_is_an_error_of_the_device(setting):
    setting.trt.most_contexts = 0
    with pytest.raises(DeviceError, match="makes no context to run"):
        setting.backend()


def test_thresholds_of_the_metadata_are_open_as_far_as_the_engine_takes_them(setting):
    assert setting.backend().metadata.nms == NMS
    closed = replace(INFO, nms=replace(NMS, runtime_thresholds=False))
    assert setting.backend(metadata=closed, name="b.engine").metadata.nms == NMS


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")
def test_the_real_tensorrt_rtx_has_the_names_that_run_an_engine_and_those_the_fake_has():
    program = (
        "import json, sys, tensorrt_rtx as trt\n"
        "kinds = [trt, trt.Runtime, trt.ICudaEngine, trt.IExecutionContext, trt.IRuntimeConfig]\n"
        "print(json.dumps({kind.__name__: dir(kind) for kind in kinds}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    real = json.loads(done.stdout.splitlines()[-1])
    for ours, theirs in ((Runtime, "Runtime"), (Engine, "ICudaEngine"), (Context, "IExecutionContext")):
        members = {name for name in vars(ours) if not name.startswith("_")} - ABSENT[RTX] - OWN
        assert members <= set(real[theirs]), theirs
        assert not set(real[theirs]) & ABSENT[RTX]
    assert {"CudaGraphStrategy", "ExecutionContextAllocationStrategy", "IPluginV3", "ILogger"} <= set(
        real["tensorrt_rtx"]
    )
    assert {"cuda_graph_strategy", "set_execution_context_allocation_strategy"} <= set(real["IRuntimeConfig"])
