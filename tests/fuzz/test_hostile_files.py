"""Files with false content, each of which once made a loader crash, hang or use all memory.

They were found by the fuzz test. The tests check the error messages, and that valid files can still be opened.
"""

from __future__ import annotations

import json
import struct
import zlib

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.fuzz import fuzz_seeds
from yolov7_deploy.datasets import open_dataset
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import DatasetError, ExportError, ImageError, LoadError, SourceError
from yolov7_deploy.hub import find_weights
from yolov7_deploy.image import MAX_PIXELS, read_image, read_image_hw
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.precision.ort_runner import NetworkRunner
from yolov7_deploy.sources import open_source
from yolov7_deploy.sources.video import VideoFile

HUGE = 30_000  # width and height; OpenCV needed 5 GB and 45 s for these 900 megapixels from a JPEG of 1.6 kB


def written(path, data):
    path.write_bytes(data)
    return path


def sized(suffix, width, height):
    """Return a small image whose header contains another size."""
    image = fuzz_seeds.make_image()
    data = bytearray(fuzz_seeds.encoded(suffix, image))
    match suffix:
        case ".png":
            data[16:24] = struct.pack(">II", width, height)
            data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        case ".jpg":
            at = data.index(b"\xff\xc0")
            data[at + 5 : at + 9] = struct.pack(">HH", height, width)
        case ".gif":
            data[6:10] = struct.pack("<HH", width, height)
        case ".bmp":
            data[18:26] = struct.pack("<ii", width, -height)
        case ".tiff":
            for tag, side in ((256, width), (257, height)):
                at = data.index(struct.pack("<HH", tag, 3))
                data[at : at + 12] = struct.pack("<HHII", tag, 4, 1, side)
        case ".jp2":
            at = data.index(b"\xff\x4f\xff\x51")
            data[at + 8 : at + 16] = struct.pack(">II", width, height)
        case ".avif":
            data = data.replace(struct.pack(">II", fuzz_seeds.SIDE, 48), struct.pack(">II", width, height))
        case ".webp":
            extended = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
            data[12:12] = b"VP8X" + struct.pack("<I", 10) + bytes(4) + extended
    return bytes(data)


# --- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".bmp", ".tiff", ".jp2", ".avif", ".webp"])
def test_an_image_larger_than_the_limit_is_refused_by_its_header(tmp_path, suffix):
    path = written(tmp_path / f"bomb{suffix}", sized(suffix, HUGE, HUGE - 1))
    with pytest.raises(ImageError, match=f"has {HUGE - 1}x{HUGE} pixels .*more than 180 million") as caught:
        read_image(path)
    assert caught.value.fix


@pytest.mark.parametrize("suffix", [".jpg", ".gif"])
def test_an_image_with_fewer_bytes_than_its_pixels_need_is_refused(tmp_path, suffix):
    path = written(tmp_path / f"short{suffix}", sized(suffix, 13_000, 13_001))
    assert MAX_PIXELS > 13_000 * 13_001
    with pytest.raises(ImageError, match=r"is truncated: .* cannot contain the 13001x13000 pixels"):
        read_image(path)


def test_a_grey_float_map_becomes_bgr(tmp_path):
    data = b"Pf\n6 4\n-1\n" + np.arange(24, dtype="<f4").tobytes()
    assert read_image(written(tmp_path / "grey.pfm", data)).shape == (4, 6, 3)


def test_a_jpeg_segment_shorter_than_its_length_field_is_refused(tmp_path):
    path = written(tmp_path / "a.jpg", b"\xff\xd8\xff\xe0\x00\x00" + b"JFIF")
    with pytest.raises(ImageError, match="not an image"):
        read_image_hw(path)


def test_the_size_of_a_jpeg_is_found_after_other_segments_and_garbage(tmp_path):
    bomb = sized(".jpg", HUGE, HUGE)
    for between in (b"rubbish", b"\xff\xff\xff", b"\xff\xe1\x00\x06abcd", b"\xff\xd0"):
        with pytest.raises(ImageError, match="more than 180 million"):
            read_image(written(tmp_path / "bomb.jpg", bomb[:2] + between + bomb[2:]))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".bmp", ".tiff", ".webp", ".jp2"])
def test_a_blank_image_which_compresses_best_is_read(tmp_path, suffix):
    image = np.full((2000, 3000, 3), 114, np.uint8)
    path = written(tmp_path / f"blank{suffix}", fuzz_seeds.encoded(suffix, image))
    assert read_image(path).shape == image.shape


def test_a_blank_progressive_jpeg_is_read(tmp_path):
    data = fuzz_seeds.encoded(".jpg", np.full((4000, 4000), 128, np.uint8), 1, 1, 2, 1, 3, 1)  # quality, progressive
    assert read_image(written(tmp_path / "blank.jpg", data)).shape == (4000, 4000, 3)


class FakeCapture:
    """A capture with a given frame size, which fails as OpenCV does when a frame is read."""

    def __init__(self, side):
        self.side, self.released = side, False

    def isOpened(self):  # noqa: N802
        return True

    def get(self, what):
        return float(self.side)

    def read(self):
        return cv2.resize(fuzz_seeds.make_image(), (0, 0))

    def release(self):
        self.released = True


def test_a_video_of_huge_frames_is_refused_before_one_is_read():
    capture = FakeCapture(HUGE)
    with pytest.raises(SourceError, match="frames of 30000x30000 pixels") as caught:
        VideoFile("a.mp4", opener=lambda address: capture)
    assert caught.value.fix
    assert capture.released


def test_an_error_of_opencv_while_reading_a_video_becomes_a_source_error():
    with pytest.raises(SourceError, match="cannot be decoded") as caught:
        list(VideoFile("a.mp4", opener=lambda address: FakeCapture(64)).read())
    assert caught.value.fix


# --- metadata ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("class_names", 5),
        ("class_names", ["cat", {"a": 1}]),
        ("strides", [8, "16", 32]),
        ("strides", [8, 16, 0]),
        ("anchors", [[[1, 2], [3, 4], [5]]] * 3),
        ("anchors", [[[1, 2]], [[1, 2], [3, 4]], [[1, 2]]]),
        ("anchors", [[[1, float("nan")]]] * 3),
        ("input_hw", [640]),
        ("input_hw", [640, 10**9]),
        ("batch", 0),
        ("batch", True),
        ("nms", {"kind": "plugin"}),
        ("notes", "text"),
        ("input_kind", "complex64"),
    ],
)
def test_the_error_about_invalid_metadata_names_the_field(field, value):
    document = json.loads(fuzz_seeds.metadata_texts()[1])
    with pytest.raises(
        LoadError, match=f"metadata inside the file cannot be read .*{'kind|conf|' * (field == 'nms')}{field}"
    ):
        ModelMetadata.from_json(json.dumps({**document, field: value}))


def test_a_class_name_with_a_lone_surrogate_can_be_printed():
    document = json.loads(fuzz_seeds.metadata_texts()[0])
    metadata = ModelMetadata.from_json(json.dumps({**document, "class_names": ["\ud800", "bär"]}))
    assert metadata.class_names == ("?", "bär")


# --- datasets ---------------------------------------------------------------------------------------------------------

LAUGHS = "\n".join(
    ["a0: &a0 x", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)), "names: *a11", "val: ."]
)

# Every mapping merges ten times the previous one; PyYAML repeats the pairs of a merged mapping, equal or not.
MERGES = "\n".join(
    ["a0: &a0 {k: x}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 12)), "val: ."]
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "aliases expand to more than"),
        (f"a: &a {'x' * 100_000}\nval: .\nnames: [{'*a, ' * 1000}]\n", "aliases expand to more than"),
        (MERGES, "aliases expand to more than"),
        ("val: .\nnames: &a [*a]\n", "contains itself"),
        ("val: .\nnc: 9999999999999\n", "has nc: 9999999999999"),
        ("val: .\nnames: " + "[" * 20_000, "nested too deeply"),
        ("val: .\nnames: [[cat], dog]\n", "is not a name"),
        ("val: {a: b}\nnames: [cat]\n", "is not a path"),
        ("val: " + "x" * 70_000 + "\nnames: [cat]\n", "does not exist"),
        ("val: /dev/zero\nnames: [cat]\n", "it is a device, not a file"),
    ],
    ids=["laughs", "text", "merges", "itself", "classes", "deep", "names", "mapping", "long", "device"],
)
def test_a_hostile_yaml_is_refused_with_a_short_message(tmp_path, text, message):
    path = tmp_path / "data.yaml"
    path.write_text(text)
    with pytest.raises(DatasetError, match=message) as caught:
        open_dataset(path)
    assert caught.value.fix
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("images", {"id": {}}),
        ("images", {"height": 10**400}),
        ("images", {"file_name": ["1.png"]}),
        ("categories", {"id": [3]}),
        ("categories", {"name": {"a": 1}}),
        ("annotations", {"bbox": [1, 2, [3], 4]}),
        ("annotations", {"bbox": [1, 2, 1e308, 4]}),
        ("annotations", {"area": {}}),
        ("annotations", {"category_id": []}),
        ("annotations", {"segmentation": [[1, 2, "x", 4]]}),
        ("annotations", {"image_id": [1]}),
    ],
)
def test_the_error_about_an_invalid_coco_entry_shows_it(tmp_path, section, change):
    document = json.loads(fuzz_seeds.coco_documents()[0])
    document[section][0].update(change)
    path = written(tmp_path / "instances.json", json.dumps(document).encode())
    written(tmp_path / "2.png", fuzz_seeds.encoded(".png", fuzz_seeds.make_image()))
    with pytest.raises(DatasetError, match="is malformed") as caught:
        open_dataset(path)
    assert caught.value.fix
    assert len(str(caught.value)) < 1000


def test_a_deeply_nested_coco_file_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="cannot be read as JSON"):
        open_dataset(written(tmp_path / "instances.json", b"[" * 100_000))


# --- sources and names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x" * 5000, "does not exist"),
        ("~no-such-user/a.jpg", "does not exist"),
        ("9" * 5000, "does not exist"),
        ("http://[", "is not a valid URL"),
        ("[" * 8_000, "is not a valid pattern"),
        ("/dev/null", "is not a file"),
    ],
    ids=["long", "user", "number", "address", "pattern", "device"],
)
def test_an_invalid_source_is_refused_with_a_short_message(tmp_path, text, message):
    for source in (text, written(tmp_path / "list.txt", text.encode())):
        with pytest.raises(SourceError, match=message) as caught:
            open_source(source)
        assert caught.value.fix
        assert len(str(caught.value)) < 1000


def test_a_weights_name_too_long_for_any_file_is_refused():
    with pytest.raises(LoadError, match="neither a file nor an official name"):
        find_weights("x" * 5000)


# --- graphs -----------------------------------------------------------------------------------------------------------


def open_changed(path, change):
    """Open a Detector of the small graph with raw outputs (the first seed), changed by a function."""
    proto = onnx.load_model_from_string(fuzz_seeds.graphs()[0])
    change(proto)
    return Detector(written(path, proto.SerializeToString()), device="cpu")


def test_a_graph_with_names_that_are_not_utf_8_is_refused(tmp_path):
    data = fuzz_seeds.graphs()[0].replace(b"images", b"imag\xff\xfe")
    with pytest.raises(LoadError, match=r"cannot open|not a YOLOv7 layout") as caught:
        Detector(written(tmp_path / "names.onnx", data), device="cpu")
    assert caught.value.fix


def test_metadata_with_another_size_than_the_graph_is_refused(tmp_path):
    def change(proto):
        metadata = json.loads(proto.metadata_props[0].value)
        proto.metadata_props[0].value = json.dumps({**metadata, "input_hw": [60_000, 60_000]})

    with pytest.raises(LoadError, match=r"metadata of .* states .*60000.*its graph .*64"):
        open_changed(tmp_path / "size.onnx", change)


def test_metadata_with_other_classes_than_the_outputs_is_refused(tmp_path):
    def change(proto):
        metadata = json.loads(proto.metadata_props[0].value)
        proto.metadata_props[0].value = json.dumps({**metadata, "class_names": ["only one"]})

    with (
        open_changed(tmp_path / "classes.onnx", change) as detector,
        pytest.raises(LoadError, match="not a YOLOv7 layout"),
    ):
        detector(fuzz_seeds.make_image())


def test_a_graph_with_additional_inputs_is_refused(tmp_path):
    def change(proto):
        proto.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))

    with pytest.raises(LoadError, match=r"'more'.* is not a YOLOv7 layout"):
        open_changed(tmp_path / "more.onnx", change)


def test_a_foreign_graph_with_a_billion_columns_is_refused(tmp_path):
    nodes = [
        helper.make_node("ReduceMax", ["images"], ["most"], axes=[2, 3], keepdims=0),
        helper.make_node("Unsqueeze", ["most", "axes"], ["one"]),
        helper.make_node("Expand", ["one", "shape"], ["output"]),
    ]
    constants = [
        numpy_helper.from_array(np.array([2]), "axes"),
        numpy_helper.from_array(np.array([1, 3, 10**9]), "shape"),
    ]
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 64, 64])]
    outputs = [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 3, 10**9])]
    graph = helper.make_graph(nodes, "wide", inputs, outputs, constants)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(LoadError, match="not a YOLOv7 layout"):
        Detector(written(tmp_path / "wide.onnx", proto.SerializeToString()), device="cpu")


def _node_without_input(op, place):
    """Return an ONNX model with a node that lacks one of its inputs: in the graph, in a branch, or in a function."""
    node = helper.make_node(op, ["x", ""], ["y"], name="broken")
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 32, 32])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, 32, 32])
    functions, imports = [], [helper.make_opsetid("", 17)]
    nodes = [node]
    if place == "branch":
        branch = helper.make_graph([node], "branch", [], [result])
        condition = helper.make_node(
            "Constant",
            [],
            ["c"],
            value=numpy_helper.from_array(np.array(True)),
        )
        nodes = [condition, helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)]
    if place == "function":
        imports.append(helper.make_opsetid("own", 1))
        functions = [helper.make_function("own", "F", ["x"], ["y"], [node], [helper.make_opsetid("", 17)])]
        nodes = [helper.make_node("F", ["x"], ["y"], domain="own")]
    graph = helper.make_graph(nodes, "g", [value], [result])
    return helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=8)


@pytest.mark.parametrize("place", ["graph", "branch", "function"])
@pytest.mark.parametrize("op", ["Max", "Mean", "Min", "Sum"])
def test_an_operator_without_one_of_its_inputs_does_not_crash_onnx_runtime(tmp_path, op, place):
    model = _node_without_input(op, place)
    onnx.save(model, tmp_path / "damaged.onnx")
    with pytest.raises(LoadError, match=rf"damaged\.onnx is damaged: an input of broken \({op}\) is missing"):
        Detector(tmp_path / "damaged.onnx", runtime="onnxruntime", device="cpu")
    if place != "function":
        with pytest.raises(ExportError, match=rf"an input of broken \({op}\) is missing"):
            NetworkRunner(model, list(model.graph.node), ["y"])


@pytest.mark.parametrize("size", [-(2**63) + 4, -2, 2**62])
@pytest.mark.parametrize("as_node", [True, False])
@pytest.mark.parametrize("op", ["ConstantOfShape", "Expand", "Reshape", "Tile"])
def test_a_shape_that_no_tensor_has_does_not_crash_onnx_runtime(tmp_path, op, as_node, size):
    shape = numpy_helper.from_array(np.array([1, size], np.int64), "shape")
    inputs = ["shape"] if op == "ConstantOfShape" else ["x", "shape"]
    nodes = [helper.make_node(op, inputs, ["y"], name="broken")]
    if as_node:
        nodes.insert(0, helper.make_node("Constant", [], ["shape"], value=shape))
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 32, 32])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [value], [result], initializer=[] if as_node else [shape])
    onnx.save(helper.make_model(graph, ir_version=8), tmp_path / "damaged.onnx")
    with pytest.raises(LoadError, match=rf"damaged: broken \({op}\) has a shape that no tensor has"):
        Detector(tmp_path / "damaged.onnx", runtime="onnxruntime", device="cpu")
