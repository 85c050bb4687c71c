"""The layers of an engine: both formats of the inspector's JSON, names only, the builder's list, the parsed network.

The fixtures have the formats that TensorRT documents and prints; the layers are a part of YOLOv7.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolov7_deploy.errors import LoadError
from yolov7_deploy.metadata import Int8Metadata, ModelMetadata
from yolov7_deploy.tensorrt.build_record import EngineRecord, NetworkLayer
from yolov7_deploy.tensorrt.builder import _missing_int8
from yolov7_deploy.tensorrt.inspector import LayerTensor, engine_layers, network_table, read_inspector, read_listing

FIXTURES = Path(__file__).parents[1] / "fixtures" / "inspector"
JSON_FILES = sorted(path.name for path in FIXTURES.glob("*.json"))
LISTING = (FIXTURES / "listing_rtx_1.7.txt").read_text(encoding="utf-8")  # lines of three builds with 1.7.1


def text(name: str) -> str:
    return (FIXTURES / name).read_text(encoding="utf-8")


def test_the_format_up_to_10_has_types_precisions_and_layouts():
    table = read_inspector(text("detailed_8.6.json"))
    assert table.detail == "detailed"
    assert table.types == {"Reformat": 2, "CaskConvolution": 2, "PluginV2": 1}
    # The second convolution computes in INT8, like its weights, although its output is FP16.
    assert [layer.precision for layer in table.layers] == ["fp32", "fp16", "fp16", "int8", "fp16"]
    assert [layer.inputs[0].format for layer in table.layers] == ["LINEAR", "HWC4", "HWC8", "CHW32", "LINEAR"]
    assert table.layers[1].outputs == (
        LayerTensor(name="/model.0/act/Mul_output_0", shape=(1, 32, 640, 640), dtype="fp16", format="HWC8"),
    )
    assert table.layers[1].tactic.startswith("sm80_xmma") and table.layers[0].tactic == "0x00000000000003ea"


def test_a_reformat_that_quantizes_is_not_counted_as_a_reformat():
    table = read_inspector(text("detailed_8.6.json"))
    assert [layer.name for layer in table.layers if layer.is_reformat] == [
        "Reformatting CopyNode for Input Tensor 0 to /model.0/conv/Conv"
    ]
    assert table.reformats == 1
    assert table.precisions == {"fp16": 3, "int8": 1}


def test_the_size_of_weights_depends_on_their_type():
    table = read_inspector(text("detailed_8.6.json"))
    assert [layer.weights_bytes for layer in table.layers] == [None, (864 + 32) * 2, None, 73440 + 255 * 4, None]
    assert table.weights_bytes == (864 + 32) * 2 + 73440 + 255 * 4


def test_the_layers_of_further_profiles_are_not_counted():
    table = read_inspector(text("detailed_8.6.json"))
    assert not any("[profile 1]" in layer.name for layer in table.layers)
    assert [port.name for port in table.io] == ["images", "num_dets", "det_boxes"]


def reformat(name, tensor_in, tensor_out):
    return {"Name": name, "LayerType": "Reformat", "Inputs": [{"Name": tensor_in}], "Outputs": [{"Name": tensor_out}]}


def test_reformats_around_a_plugin_are_counted():
    plugin = {
        "Name": "nms",
        "LayerType": "PluginV3",
        "PluginType": "Y7NMS",
        "Inputs": [{"Name": "a linear"}, {"Name": "b"}],
        "Outputs": [{"Name": "boxes"}],
    }
    layers = [
        reformat("first", "images", "x"),
        reformat("before", "a", "a linear"),
        plugin,
        reformat("after", "boxes", "det_boxes"),
    ]
    table = read_inspector(json.dumps({"Layers": layers, "Bindings": ["images", "det_boxes"]}))
    assert (table.reformats, table.plugin_reformats) == (3, 2)


def test_the_name_of_a_plugin_is_its_type_or_else_its_layer():
    assert read_inspector(text("detailed_8.6.json")).plugins == ("Y7NMS",)
    assert read_inspector(text("detailed_10.json")).plugins == ("/model.77/Y7NMS",)


def test_compiled_layers_of_version_10_have_a_type_and_list_their_weights_as_constants():
    table = read_inspector(text("detailed_10.json"))
    assert table.types == {"conv": 1, "kgen": 1, "PluginV3": 1}
    assert table.precisions == {"fp16": 2, "fp32": 1}
    assert [tensor.format for tensor in table.layers[0].outputs] == [""]
    assert table.weights_bytes == 32 * 3 * 3 * 3 * 2


def test_the_format_of_version_11_also_has_the_shapes_of_each_profile():
    table = read_inspector(text("detailed_11.json"))
    assert table.types == {"Reformat": 1, "CaskConvolution": 1, "PluginV3": 1}
    assert table.layers[1].outputs == (LayerTensor(name="c0", shape=(1, 32, 640, 640), dtype="fp16", format="HWC8"),)
    assert (table.reformats, table.plugins, table.precisions) == (1, ("Y7NMS",), {"fp16": 2})
    images, num_dets = table.io
    assert (images.name, images.mode, images.dtype, images.shape) == ("images", "input", "fp32", (-1, 3, 640, 640))
    assert images.profiles == (((1, 3, 640, 640), (4, 3, 640, 640), (8, 3, 640, 640)),)
    assert (num_dets.mode, num_dets.dtype, num_dets.profiles) == ("output", "int32", ())


@pytest.mark.parametrize("name", ["names_10.json", "names_11.json"])
def test_a_table_of_names_has_no_types_precisions_and_sizes(name):
    table = read_inspector(text(name))
    assert table.detail == "names"
    assert [layer.name for layer in table.layers][2] == "/model.105/Y7NMS"
    assert (table.types, table.precisions, table.weights_bytes, table.peak_activation_bytes) == ({}, {}, None, None)
    assert table.reformats == 1
    assert [port.name for port in table.io] == ["images", "num_dets"]


def test_with_dynamic_shapes_layout_and_activations_are_unknown_but_not_the_weights():
    table = read_inspector(text("dynamic_8.6.json"))
    (layer,) = table.layers
    assert (layer.precision, layer.inputs[0].dtype, layer.inputs[0].format) == ("fp16", "", "")
    assert (table.peak_activation_bytes, table.weights_bytes) == (None, (864 + 32) * 2)


def test_peak_activations_are_the_largest_total_at_one_time():
    def layer(name, inputs, outputs):
        side = {"a": 10, "b": 100, "c": 20, "d": 30}
        tensors = [
            [{"Name": t, "Dimensions": [1, side[t]], "Format/Datatype": "Float"} for t in g] for g in (inputs, outputs)
        ]
        return {"Name": name, "LayerType": "kgen", "Inputs": tensors[0], "Outputs": tensors[1]}

    chain = [layer("1", "a", "b"), layer("2", "b", "c"), layer("3", "c", "d")]
    assert read_inspector(json.dumps({"Layers": chain})).peak_activation_bytes == (100 + 20) * 4
    # a is read again at the end, so it exists throughout.
    kept = [*chain[:2], layer("3", "ca", "d")]
    assert read_inspector(json.dumps({"Layers": kept})).peak_activation_bytes == (10 + 100 + 20) * 4


@pytest.mark.parametrize(
    ("layout", "stored"),
    [("LINEAR", 3 * 4 * 4 * 2), ("HWC8", 8 * 4 * 4 * 2), ("CHW32", 32 * 4 * 4 * 2), ("HWC", 3 * 4 * 4 * 2)],
)
def test_channels_are_padded_as_the_layout_requires(layout, stored):
    assert LayerTensor(name="x", shape=(1, 3, 4, 4), dtype="fp16", format=layout).stored_bytes == stored


@pytest.mark.parametrize(
    ("description", "dtype", "layout"),
    [
        ("Row major linear FP32", "fp32", "LINEAR"),
        ("Row major Int8 format", "int8", "LINEAR"),
        ("Two wide channel vectorized row major FP16 format", "fp16", "CHW2"),
        ("Thirty-two wide channel vectorized row major Int8 format with 3 spatial dimensions", "int8", "CDHW32"),
        ("Channel major FP16 format where channel % 8 == 0 with 3 spatial dimensions", "fp16", "DHWC8"),
        ("Channel major FP32 format", "fp32", "HWC"),
        ("Row major linear BFloat16 format", "bf16", "LINEAR"),
        ("Row major linear UInt8 format", "uint8", "LINEAR"),
        ("Half(64,1:8,...)", "fp16", ""),
        ("BFloat16", "bf16", ""),
        ("N/A due to dynamic shapes", "", ""),
        ("Unknown format", "", ""),
    ],
)
def test_format_descriptions_are_parsed_into_type_and_layout(description, dtype, layout):
    document = {"Layers": [{"Name": "x", "Inputs": [{"Name": "t", "Dimensions": [1], "Format/Datatype": description}]}]}
    (tensor,) = read_inspector(json.dumps(document)).layers[0].inputs
    assert (tensor.dtype, tensor.format) == (dtype, layout)


def test_a_parsed_network_is_a_table():
    table = network_table(
        [
            NetworkLayer(name="/model.0/conv/Conv", type="CONVOLUTION", precision="HALF"),
            NetworkLayer(name="/model.105/Y7NMS", type="PLUGIN_V3", precision="INT32"),
            NetworkLayer(name="/model.0/act/Mul", type="ELEMENTWISE", precision="float16"),
        ]
    )
    assert table.detail == "network"
    assert table.types == {"CONVOLUTION": 1, "PLUGIN_V3": 1, "ELEMENTWISE": 1}
    assert table.precisions == {"fp16": 2, "int32": 1}
    assert table.plugins == ("/model.105/Y7NMS",)
    assert table.peak_activation_bytes is None


@pytest.mark.parametrize(
    "broken", ["", "{", "null", "7", '"text"', "{}", '{"Layers": 3}', '{"Layers": {}}', "[" * 100_000]
)
def test_an_invalid_document_is_a_load_error(broken):
    with pytest.raises(LoadError, match=r"The EngineInspector's description of the engine cannot be read"):
        read_inspector(broken)


@pytest.mark.parametrize("name", JSON_FILES)
def test_a_truncated_document_is_a_load_error(name):
    with pytest.raises(LoadError, match="not JSON"):
        read_inspector(text(name)[:-20])


def test_line_breaks_inside_names_and_a_trailing_null_byte_are_accepted():
    table = read_inspector('{"Layers": ["a\nb"]}\n\0')
    assert [layer.name for layer in table.layers] == ["a\nb"]


KEYS = [
    "Name", "LayerType", "Inputs", "Outputs", "Weights", "Bias", "Constants", "Count", "Type", "Dimensions", "Origin",
    "Format/Datatype", "Format", "DataType", "ProfileInfo", "MinShape", "OptShape", "MaxShape", "IOMode", "Precision",
]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=20,
)


@given(layers=st.lists(JSON, max_size=4), io=JSON)
def test_arbitrary_values_do_not_raise(layers, io):
    table = read_inspector(json.dumps({"Layers": layers, "I/O Tensors": io}))
    assert len(table.layers) <= len(layers)
    _ = (
        table.types,
        table.precisions,
        table.reformats,
        table.plugins,
        table.weights_bytes,
        table.peak_activation_bytes,
    )


def test_characters_that_cannot_be_printed_are_replaced():
    table = read_inspector('{"Layers": ["a\\ud800b"], "Bindings": []}')
    assert [layer.name for layer in table.layers] == ["a?b"]


def test_convolutions_are_counted_by_the_type_of_their_weights():
    assert read_inspector(text("detailed_8.6.json")).convolutions == {"fp16": 1, "int8": 1}
    assert read_inspector(text("detailed_10.json")).convolutions == {"fp16": 1}
    assert read_inspector(text("names_10.json")).convolutions == {}


# --- the builder's list of layers -------------------------------------------------------------------------------------


def test_the_builders_list_is_a_table_of_fused_layers():
    table = read_listing(LISTING)
    assert table.detail == "compiled"
    assert [layer.type for layer in table.layers] == [
        "kgen", "correlation", "signal", "wait", "maxpool", "runtime_fusion", "runtime_fusion", "correlation", "cjmp",
        "custom_layer",
    ]  # fmt: skip
    kernel, convolution = table.layers[:2]
    assert kernel.inputs == (LayerTensor(name="images", shape=(1, 3, 128, 128), dtype="fp32", format="LINEAR"),)
    assert kernel.outputs[0].dtype == "int8"
    assert convolution.name == "model.0.conv_U173_myl0_1"
    assert (convolution.inputs[0].shape, convolution.inputs[0].dtype) == ((1, 4, 128, 128), "int8")
    assert (convolution.outputs[0].dtype, convolution.outputs[0].format) == ("fp32", "HWC")
    assert convolution.tactic == "__myelin_CASK_STUB"


def test_the_precision_of_a_listed_convolution_is_the_type_of_its_weights():
    table = read_listing(LISTING)
    assert [layer.precision for layer in table.layers if layer.is_convolution] == ["int8", "fp16", "fp16", "fp16"]
    assert table.convolutions == {"fp16": 3, "int8": 1}
    assert table.precisions == {"fp16": 4, "int8": 1 + 1, "fp32": 1, "bool": 1}


def test_the_size_of_listed_weights_includes_their_scales():
    assert read_listing(LISTING).layers[1].weights_bytes == 32 * 4 * 3 * 3 + 2 * 32 * 4


def test_a_listed_plugin_has_its_name_in_the_graph():
    assert read_listing(LISTING).plugins == ("nms",)


@pytest.mark.parametrize(
    "broken", ["", "Layers:\n", "Layers:\nName: x\n", LISTING.replace(", Inputs: [", ", inputs: [")]
)
def test_a_text_without_layers_is_not_a_table(broken):
    assert read_listing(broken) is None


def test_a_line_of_another_format_is_ignored():
    lines = LISTING.splitlines()
    lines[2] = lines[2][:300]
    assert len(read_listing("\n".join(lines)).layers) == len(read_listing(LISTING).layers) - 1


@pytest.mark.parametrize("dimensions", ["", "1,x", "1,,2", "-", "9" * 5000, "1, 2", "\u0663"])
def test_invalid_dimensions_are_an_unknown_shape(dimensions):
    table = read_listing(LISTING.replace("Dimensions: [1,4,128,128]", f"Dimensions: [{dimensions}]"))
    assert table.layers[1].inputs[0].shape == ()
    assert table.layers[1].precision == "int8"


PARTS = sorted({*LISTING.split("["), *LISTING.split(", "), "\n", "\0", "{ Name: ", "Name: ", "]", "}", "-1", "\udc80"})


@given(parts=st.lists(st.sampled_from(PARTS) | st.text(max_size=8), max_size=60), offset=st.integers(0, len(LISTING)))
def test_arbitrary_text_does_not_raise(parts, offset):
    for broken in ("".join(parts), f"{LISTING[:offset]}{''.join(parts)}{LISTING[offset:]}"):
        table = read_listing(broken)
        if table is not None:
            _ = (table.types, table.precisions, table.convolutions, table.plugins, table.weights_bytes)
            assert table.peak_activation_bytes is None and table.io == ()


@pytest.mark.parametrize(
    "part", ["Name: ", "{ Name: ", ", LayerType: ", "], Constants: [", ", Dimensions: [", "123456789,", "\n"]
)
def test_the_time_to_read_a_list_is_linear_in_its_length(part):
    head = LISTING.splitlines()[2].partition(" ], Constants: ")[0]
    started = time.perf_counter()
    read_listing(f"{head}{part * (2_000_000 // len(part))}")
    assert time.perf_counter() - started < 20  # quadratic time would take hours


def test_the_table_of_a_record_is_the_inspected_engine_else_the_list_else_the_parsed_network():
    metadata = ModelMetadata(variant="custom", class_names=(), strides=(), anchors=())
    layer = NetworkLayer(name="conv", type="CONVOLUTION", precision="float16")
    known = {"inspector": text("detailed_10.json"), "listing": LISTING, "network_layers": (layer,)}
    for detail in ("detailed", "compiled", "network"):
        record = EngineRecord(
            metadata=metadata, plan_bytes=0, plan_sha256="", product="tensorrt", tensorrt="10", **known
        )
        table, notes = engine_layers(record)
        assert (table.detail, notes) == (detail, ())
        known.pop(next(iter(known)))
    broken = EngineRecord(
        metadata=metadata,
        plan_bytes=0,
        plan_sha256="",
        product="tensorrt",
        tensorrt="10",
        inspector="{",
        listing=LISTING,
    )
    table, notes = engine_layers(broken)
    assert table.detail == "compiled" and "not JSON" in notes[0]


def test_float_convolutions_of_an_int8_file_are_a_note_also_for_an_inspected_engine(caplog):
    int8 = Int8Metadata(
        target="tensorrt", reduce_range=False, method="max", images=1, images_sha256="", fallback="fp16",
        convolutions=2, int8_convolutions=2, share=1.0, float_layers=(),
    )  # fmt: skip
    metadata = ModelMetadata(variant="custom", class_names=(), strides=(), anchors=(), precision="int8", int8=int8)
    record = EngineRecord(metadata=metadata, plan_bytes=0, plan_sha256="", product="tensorrt", tensorrt="8.6.1")
    inspected = replace(record, inspector=text("detailed_8.6.json"))  # one convolution in FP16 and one in INT8
    (note,) = _missing_int8(inspected)
    assert note.startswith("1 of the 2 INT8 convolutions") and note in caplog.text
    mixed = replace(metadata, int8=replace(int8, int8_convolutions=1))
    assert _missing_int8(replace(inspected, metadata=mixed)) == ()
    network = (NetworkLayer(name="conv", type="CONVOLUTION", precision="float16"),) * 2
    assert _missing_int8(replace(record, network_layers=network)) == ()


def test_a_record_without_a_listing_loads():
    metadata = ModelMetadata(variant="custom", class_names=(), strides=(), anchors=())
    record = EngineRecord(metadata=metadata, plan_bytes=0, plan_sha256="", product="tensorrt_rtx", tensorrt="1.7")
    older = json.loads(record.to_json())
    del older["listing"]
    assert EngineRecord.from_json(json.dumps(older)) == record


@pytest.mark.parametrize(
    "text", ["x" * 200_000, "two " * 50_000, "k" * 200_000 + " wide channel", "HWC" + "1" * 200_000]
)
def test_a_long_format_text_takes_no_time(text):
    layer = {"Name": "a", "LayerType": "x", "Inputs": [{"Name": "b", "Format/Datatype": text}]}
    started = time.process_time()
    read_inspector(json.dumps({"Layers": [layer]}))
    assert time.process_time() - started < 1


@pytest.mark.parametrize("shape", [[10**400], [10**18], [2] * 9, [2**200, 2]])
def test_sizes_that_no_tensor_has_are_unknown(shape):
    tensor = {"Name": "b", "Dimensions": shape, "Format/Datatype": "Row major linear FP16 format"}
    layer = {
        "Name": "a",
        "LayerType": "x",
        "Inputs": [],
        "Outputs": [tensor],
        "Weights": {"Type": "Half", "Count": shape[0]},
    }
    table = read_inspector(json.dumps({"Layers": [layer]}))
    assert table.peak_activation_bytes is None
    assert table.weights_bytes == (4 if shape[0] == 2 else None)
