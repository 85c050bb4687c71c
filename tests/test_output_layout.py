"""Files of other exporters: the layout is found by shapes, and is read rightly or refused by name."""

import numpy as np
import pytest
from onnx import TensorProto, numpy_helper

from tests.support.foreign_graphs import (
    BOX,
    CELLS,
    CENTRE,
    DOG,
    HW,
    NAMES,
    SCORE,
    anchors_rows,
    cells_graph,
    cells_rows,
    constant_graph,
    end_to_end_rows,
    nms_rows,
    official_rows,
    saved,
)
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import LoadError
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.output_layout import TensorSpec, find_layout
from yolov7_deploy.tensorrt.onnx_rewrite import open_onnx

IMAGE = np.full((*HW, 3), 90, np.uint8)


def specs(*shapes, dtype="float32", name="output"):
    """Return outputs with these shapes; the first is called `output`."""
    return [TensorSpec(name=name if not i else f"{name}{i}", dtype=dtype, shape=s) for i, s in enumerate(shapes)]


def images(*shape, dtype="float32"):
    return [TensorSpec(name="images", dtype=dtype, shape=shape or (1, 3, *HW))]


def assert_one_dog(detections, *, class_id=DOG):
    np.testing.assert_allclose(detections.boxes, [BOX], atol=0.1)
    np.testing.assert_allclose(detections.scores, [SCORE], atol=1e-3)
    assert detections.class_ids.tolist() == [class_id]


# --- reading ----------------------------------------------------------------------------------------------------------

READABLE = {
    "yolov7 --grid": anchors_rows(),
    "yolov7-w6 --grid": anchors_rows(rows=3 * (CELLS + 5 * 4)),
    "yolov7 --grid, one class": anchors_rows(1),
    "yolov8": cells_rows(),
    "yolov8, one class": cells_rows(1),
    "yolov8 with stride 4": cells_rows(cells=CELLS + 80 * 64),
    "yolov10": end_to_end_rows(),
    "yolov10 with 20 rows": end_to_end_rows(20),
    "yolov7 --end2end": nms_rows(),
    "TensorRT-For-YOLO-Series": nms_rows(("num", "boxes", "scores", "classes")),
}


@pytest.mark.parametrize("layout", READABLE)
@pytest.mark.parametrize("kind", [np.float32, np.float16], ids=["float32", "float16"])
def test_each_layout_gives_the_one_box_that_is_in_it(layout, kind, tmp_path):
    rows = READABLE[layout]
    arrays = rows if isinstance(rows, dict) else {"output": rows}
    floats = {name: array.astype(kind) if array.dtype == np.float32 else array for name, array in arrays.items()}
    image_type = TensorProto.FLOAT16 if kind is np.float16 else TensorProto.FLOAT
    path = saved(constant_graph(floats, images=image_type), tmp_path / "m.onnx")
    with Detector(path, device="cpu") as detector:
        assert_one_dog(detector(IMAGE), class_id=0 if "one class" in layout else DOG)
        assert detector.input_hw == HW
        assert detector.metadata.precision == ("fp16" if kind is np.float16 else "fp32")


@pytest.mark.parametrize("declared", [["n", 7], ["batch", 7]])
def test_the_official_output_of_end2end_with_max_wh_is_read_image_by_image(declared, tmp_path):
    graph = constant_graph(official_rows((1, 1, 0)), shape=declared, image_shape=(2, 3, *HW))
    with Detector(saved(graph, tmp_path / "m.onnx"), device="cpu") as detector:
        first, second = detector.batch([IMAGE, IMAGE])
        assert_one_dog(first)
        assert len(second) == 2
        assert len(detector(IMAGE, conf=0.8)) == 0


def test_more_rows_than_the_usual_maximum_are_given_on_request(tmp_path):
    path = saved(constant_graph(official_rows([0] * 400), shape=["n", 7]), tmp_path / "m.onnx")
    with Detector(path, device="cpu") as detector:
        assert (len(detector(IMAGE)), len(detector(IMAGE, max_det=350))) == (300, 350)


def test_no_detection_at_all_is_read_as_none(tmp_path):
    graph = constant_graph(official_rows(()), shape=["n", 7])
    with Detector(saved(graph, tmp_path / "m.onnx"), device="cpu") as detector:
        assert len(detector(IMAGE)) == 0


def test_rows_of_low_scores_are_given_only_on_request(tmp_path):
    path = saved(constant_graph(end_to_end_rows()), tmp_path / "m.onnx")
    with Detector(path, device="cpu") as detector:
        assert (detector.thresholds.conf, detector.thresholds.max_det) == (0.25, 300)
        assert len(detector(IMAGE)) == 1
        assert len(detector(IMAGE, conf=0.001)) == 2
        assert detector(IMAGE, conf=0.001, classes=[0]).class_ids.tolist() == []


def test_a_yolov8_file_has_nms_by_the_thresholds_of_the_call(tmp_path):
    rows = cells_rows()
    rows[0, :, 8], rows[0, :, 9] = rows[0, :, 7], rows[0, :, 7]
    rows[0, 0, 8] += 8  # a shifted box of the same dog
    rows[0, 4 + DOG, 9], rows[0, 4 + 3, 9] = 0, 0.5  # the same box as another class
    with Detector(saved(constant_graph(rows), tmp_path / "m.onnx"), device="cpu") as detector:
        assert detector(IMAGE).class_ids.tolist() == [DOG, 3]
        assert detector(IMAGE, iou=0.95).class_ids.tolist() == [DOG, DOG, 3]
        assert detector(IMAGE, conf=0.6).class_ids.tolist() == [DOG]


@pytest.mark.parametrize("size", [HW, (192, 448)])
@pytest.mark.parametrize(
    "graph",
    [
        cells_graph(84, [*CENTRE, *[0] * DOG, SCORE, *[0] * 63]),
        cells_graph(85, [*CENTRE, 1, *[0] * DOG, SCORE, *[0] * 63], per_cell=3, transpose=True),
    ],
    ids=["yolov8", "yolov7"],
)
def test_sizes_that_the_file_does_not_state_are_found_by_a_run(graph, size, tmp_path):
    with Detector(saved(graph, tmp_path / "m.onnx"), img=size, device="cpu") as detector:
        assert len(detector.class_names) == 80
        image = np.full((*size, 3), 90, np.uint8)
        for found in (detector(image), *detector.batch([image] * 3)):
            assert_one_dog(found)


def test_a_size_for_which_the_file_was_not_exported_is_refused_when_it_is_opened(tmp_path):
    graph = constant_graph(anchors_rows(), shape=["b", "rows", "columns"])
    graph.graph.node[0].op_type = "Reshape"  # to the exported size
    del graph.graph.node[0].attribute[:]
    graph.graph.node[0].input.append("exported")
    graph.graph.initializer.append(numpy_helper.from_array(np.array([1, 3, *HW]), "exported"))
    for dim in graph.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.Clear()
    path = saved(graph, tmp_path / "m.onnx")
    with pytest.raises(LoadError, match="does not run on an image of 640x640") as caught:
        Detector(path, device="cpu")
    assert "--img" in caught.value.fix
    with Detector(path, img=HW, device="cpu") as detector:
        assert_one_dog(detector(IMAGE))


def test_class_names_of_ultralytics_are_used(tmp_path):
    graph = constant_graph(cells_rows(), task="detect", names=NAMES)
    with Detector(saved(graph, tmp_path / "m.onnx"), device="cpu") as detector:
        assert [found.class_name for found in detector(IMAGE)] == [f"name {DOG}"]
    graph = constant_graph(end_to_end_rows(), task="detect", names=NAMES)
    with Detector(saved(graph, tmp_path / "m.onnx"), device="cpu") as detector:
        assert detector.class_names[-1] == "name 79"


@pytest.mark.parametrize(
    "names", ["[", "{0: 'a', 0: 'b'}", "{1: 'a'}", "{0: 'a: b'}", "{0: __import__('os')}", "1" * 2**20]
)
def test_other_texts_are_no_class_names(names):
    layout = find_layout("m.onnx", images(), specs((1, 84, CELLS)), properties={"names": names})
    assert (layout.class_names, layout.output.classes) == ((), 80)


@pytest.mark.parametrize(
    "graph",
    [
        constant_graph(cells_rows()),
        constant_graph(end_to_end_rows()),
        constant_graph(official_rows(), shape=["n", 7]),
        cells_graph(84, [*CENTRE, *[0] * DOG, SCORE, *[0] * 63], side=320),
    ],
    ids=["yolov8", "yolov10", "max-wh", "of unknown size"],
)
def test_a_file_that_was_quantized_here_keeps_its_layout(graph, tmp_path):
    path = saved(graph, tmp_path / "m.onnx")
    OnnxModel.of(graph, open_onnx(path).metadata).save(path)
    with Detector(path, device="cpu") as detector:
        assert_one_dog(detector(np.full((*detector.input_hw, 3), 90, np.uint8)))
        assert len(detector.class_names) in (80, 1000)


# --- refusing when the file is opened ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ([(1, CELLS, 85)], "YOLOX, YOLOv6"),
        ([(1, CELLS, 84)], "transposed YOLOv8"),
        ([(1, 85, 3 * CELLS)], "swapped"),
        ([(1, 300, 38)], "5040 .* rows"),
        ([(1, 300, 7)], "rows of 5"),
        ([(1, 116, CELLS), (1, 32, 80, 64)], "segmentation"),
        ([(1, 3, 40, 32, 85), (1, 3, 20, 16, 85), (1, 3, 10, 8, 85)], "raw head maps"),
        ([(1, 255, 40, 32), (1, 255, 20, 16), (1, 255, 10, 8)], "raw head maps"),
        ([(1, 1000)], "not a YOLOv7 layout"),
        ([(100, 6)], "not a YOLOv7 layout"),
        ([(1, None, 6)], "do not show"),
        ([(1, None, None)], "do not show"),
        ([], "nothing"),
    ],
)
def test_other_layouts_are_refused_by_name(shapes, reason):
    with pytest.raises(LoadError, match=reason) as caught:
        find_layout("m.onnx", images(), specs(*shapes))
    assert "which is not a YOLOv7 layout" in caught.value.message
    assert "y7 export" in caught.value.fix


def test_two_outputs_that_may_be_detections_are_refused():
    outputs = specs((1, 84, CELLS), (1, 84, CELLS), name="main")
    with pytest.raises(LoadError, match="several of these outputs"):
        find_layout("m.onnx", images(), outputs)


def test_raw_heads_beside_the_decoded_output_are_not_read():
    outputs = specs((1, 3 * CELLS, 85), (1, 3, 40, 32, 85), (1, 3, 20, 16, 85), (1, 3, 10, 8, 85))
    assert find_layout("m.onnx", images(), outputs).output.outputs == ("output",)


@pytest.mark.parametrize("task", ["pose", "segment", "obb", "classify"])
def test_files_of_another_task_are_refused(task, tmp_path):
    graph = constant_graph(cells_rows(52), task=task)
    with pytest.raises(LoadError, match=f"task is '{task}'"):
        Detector(saved(graph, tmp_path / "m.onnx"), device="cpu")


def test_more_columns_than_classes_are_refused():
    with pytest.raises(LoadError, match="names 80 classes and has columns for 112"):
        find_layout("m.onnx", images(), specs((1, 116, CELLS)), properties={"names": NAMES})


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((1, *HW, 3), "float32", "images are NCHW"),
        ((1, 3, *HW), "uint8", "images are NHWC"),
        ((1, 1, *HW), "float32", "three channels"),
        ((1, 3, *HW), "float64", "not float64"),
        ((1, 3, *HW), "int32", "not int32"),
    ],
)
def test_other_images_are_refused_by_name(shape, dtype, reason):
    with pytest.raises(LoadError, match=reason):
        find_layout("m.onnx", images(*shape, dtype=dtype), specs((1, 84, CELLS)))


# --- values that contradict the layout --------------------------------------------------------------------------------


def changed(rows, index, value):
    rows[index] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (changed(anchors_rows(1), (0, 9, 5), 16), "probability above 1"),
        (changed(cells_rows(), (0, 9, 9), 3.5), "scores above 1"),
        (changed(end_to_end_rows(), (0, 3, 5), 0.5), "not integers"),
        (changed(end_to_end_rows(), (0, 3, 4), 47), "scores above 1"),
        (changed(end_to_end_rows(), (0, 0, 5), -1), "class ids"),
        (changed(official_rows((0, 0)), (0, 0), 3), "number of an image"),
        (np.array([[0, 16, 0.9, 120, 120, 200, 200]], np.float32), "not integers|scores above 1"),
    ],
)
def test_values_that_contradict_the_layout_are_an_error_and_no_box(rows, reason, tmp_path):
    with Detector(saved(constant_graph(rows), tmp_path / "m.onnx"), device="cpu") as detector:
        with pytest.raises(LoadError, match=reason) as caught:
            detector(IMAGE)
        assert "y7 export" in caught.value.fix
