"""Detector: pictures in, Detections out, the same whatever is under the floor."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from small_models import HW, exported_tiny, fused_tiny, info_of, tiny

from yolov7_deploy.boxes import detections_of
from yolov7_deploy.checkpoint import Checkpoint, save_checkpoint
from yolov7_deploy.detections import Detections
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import DeviceError, ImageError, LoadError, SourceError, UsageError
from yolov7_deploy.image import fit_letterbox, to_network_input
from yolov7_deploy.options import Thresholds

# Two runtimes add up in another order; boxes are up to 1500 pixels wide, and small pictures come back enlarged.
BOX_TOLERANCE = 0.05
SCORE_TOLERANCE = 2e-5
CONF, MAX_DET = 0.6, 300
SUPPRESSION = {"conf": CONF, "iou": 0.45, "max_det": MAX_DET}

needs_no_cuda = pytest.mark.skipif(
    torch.cuda.is_available() or "CUDAExecutionProvider" in onnxruntime.get_available_providers(),
    reason="this machine has CUDA",
)


def noise(height, width, seed=0):
    """A picture with structure at every scale, so that pictures differ after the network."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 7, 3), np.uint8)
    fine = rng.integers(-40, 40, (height, width, 3))
    return np.clip(cv2.resize(coarse, (width, height)).astype(int) + fine, 0, 255).astype(np.uint8)


PICTURES = [noise(128, 192), noise(90, 60, 1), noise(300, 400, 2), noise(20, 190, 3), noise(128, 192, 4)]


def assert_same(ours: Detections, expected: Detections):
    """Equal but for rounding; neighbours of nearly the same score may have changed places."""
    assert len(ours) == len(expected)
    assert ours.image_hw == expected.image_hw
    np.testing.assert_allclose(ours.scores, expected.scores, atol=SCORE_TOLERANCE)
    same = (
        (ours.class_ids[:, None] == expected.class_ids[None])
        & (np.abs(ours.scores[:, None] - expected.scores[None]) <= SCORE_TOLERANCE)
        & (np.abs(ours.boxes[:, None] - expected.boxes[None]) <= BOX_TOLERANCE).all(-1)
    )
    assert same.any(0).all() and same.any(1).all()


def assert_identical(ours: Detections, expected: Detections):
    np.testing.assert_array_equal(ours.boxes, expected.boxes)
    np.testing.assert_array_equal(ours.scores, expected.scores)
    np.testing.assert_array_equal(ours.class_ids, expected.class_ids)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights files by kind, each written once."""
    folder = tmp_path_factory.mktemp("files")

    def get(kind="torch", **options):
        name = "_".join([kind, *(f"{key}-{value}" for key, value in sorted(options.items()))])
        path = folder / f"{name}.{'safetensors' if kind == 'torch' else 'onnx'}"
        if not path.exists() and kind == "torch":
            model = tiny()
            checkpoint = Checkpoint(
                tensors=model.state_dict(),
                variant="yolov7-tiny",
                training=False,
                class_names=info_of(model).class_names,
                anchors=model.anchors,
            )
            save_checkpoint(checkpoint, path)
        elif not path.exists():
            inside = {} if kind == "none" else SUPPRESSION
            exported_tiny(nms=kind, **{**inside, "multi_label": False, **options}).save(path)
        return path

    return get


@pytest.fixture(scope="module")
def detectors(files):
    """Open Detectors by kind, with the same thresholds."""
    opened = {}

    def get(kind, **options):
        key = (kind, *sorted(options.items()))
        if key not in opened:
            opened[key] = Detector(files(kind, **options), img=HW, conf=CONF, max_det=MAX_DET, device="cpu")
        return opened[key]

    yield get
    for detector in opened.values():
        detector.close()


@pytest.fixture
def detector(detectors):
    """One whose suppression is outside, so that everything may be asked of it."""
    return detectors("torch")


@pytest.fixture
def plugin(detectors):
    """One whose suppression is inside the file."""
    return detectors("plugin")


def foreign(path, target, change=lambda proto: None):
    """The same network without a passport."""
    proto = onnx.load(path)
    del proto.metadata_props[:]
    change(proto)
    onnx.save(proto, target)
    return target


# --- the same boxes everywhere ------------------------------------------------------------------------------------


def test_the_detector_is_letterbox_network_suppression_and_back(detector):
    for picture in PICTURES:
        letterbox = fit_letterbox(picture.shape[:2], HW)
        with torch.no_grad():
            decoded = fused_tiny().predict(torch.from_numpy(to_network_input([letterbox.apply(picture)])))[0].numpy()
        boxes, scores, class_ids = detections_of(decoded, Thresholds(conf=CONF, max_det=MAX_DET))
        found = detector(picture)
        assert len(found) > 5
        np.testing.assert_allclose(found.boxes, letterbox.undo(boxes), atol=BOX_TOLERANCE)
        np.testing.assert_allclose(found.scores, scores, atol=SCORE_TOLERANCE)
        np.testing.assert_array_equal(found.class_ids, class_ids)


@pytest.mark.parametrize("kind", ["none", "standard", "plugin"])
@pytest.mark.parametrize("batch", [1, 4, None])
def test_every_file_gives_the_boxes_of_torch(detectors, kind, batch):
    if kind == "standard" and batch is not None:
        pytest.skip("the body of plugin")
    ours = detectors(kind, batch=batch)
    assert ours.info.batch == batch
    for count in (1, 4, 5):
        for found, expected in zip(
            ours.batch(PICTURES[:count]), detectors("torch").batch(PICTURES[:count]), strict=True
        ):
            assert len(found) > 5
            assert_same(found, expected)


def test_a_uint8_file_gives_the_boxes_of_torch(detectors):
    for found, expected in zip(
        detectors("plugin", input_kind="uint8", batch=None).batch(PICTURES),
        detectors("torch").batch(PICTURES),
        strict=True,
    ):
        assert_same(found, expected)


def test_boxes_are_sorted_clipped_and_typed(detectors):
    for kind in ("torch", "plugin"):
        for picture, found in zip(PICTURES, detectors(kind).batch(PICTURES), strict=True):
            height, width = picture.shape[:2]
            assert (found.boxes.dtype, found.scores.dtype, found.class_ids.dtype) == (np.float32, np.float32, np.int64)
            assert (np.diff(found.scores) <= 0).all() and (found.scores > np.float32(CONF)).all()
            assert found.boxes.min() >= 0
            assert (found.boxes <= [width, height, width, height]).all()
            assert found.image_hw == (height, width)
            assert found.class_names == tuple(f"thing {i}" for i in range(5))
            assert found.speed.inference_ms > 0


# --- ways to call it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["torch", "plugin"])
def test_no_pictures_give_no_detections(detectors, kind):
    assert detectors(kind).batch([]) == []


@pytest.mark.parametrize("kind", ["torch", "plugin"])
def test_nothing_found_is_empty_and_never_none(detectors, kind):
    found = detectors(kind)(PICTURES[0], conf=1.0)
    assert len(found) == 0
    assert found.boxes.shape == (0, 4)


def test_paths_and_arrays_give_the_same(detector, tmp_path):
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), PICTURES[1])
    expected = detector(PICTURES[1])
    assert expected.path == ""
    for given in (path, str(path)):
        found = detector(given)
        assert found.path == str(path)
        assert_identical(found, expected)
    mixed = detector.batch([PICTURES[1], path])
    assert [one.path for one in mixed] == ["", str(path)]


def test_grey_and_bgra_pictures_are_taken(detector):
    grey = PICTURES[0][:, :, 0]
    assert_identical(detector(grey), detector(np.repeat(grey[:, :, None], 3, 2)))
    assert_identical(detector(np.dstack([PICTURES[0], grey])), detector(PICTURES[0]))


def test_the_picture_is_left_as_it_was(detector):
    picture = PICTURES[0].copy()
    detector(picture)
    np.testing.assert_array_equal(picture, PICTURES[0])


def test_a_picture_that_is_none_is_refused(detector, tmp_path):
    with pytest.raises(ImageError, match="float32"):
        detector(PICTURES[0].astype(np.float32))
    with pytest.raises(ImageError):
        detector(tmp_path / "absent.jpg")


def test_a_list_given_to_a_call_is_refused_with_the_way_to_batch(detector):
    for pictures in (PICTURES[:2], [PICTURES[0], PICTURES[4]]):
        with pytest.raises(ImageError) as caught:
            detector(pictures)
        assert "batch" in caught.value.fix


def test_more_pictures_than_enter_at_once_come_back_in_order(detector):
    pictures = [PICTURES[i % 5] for i in range(35)]
    found = detector.batch(pictures)
    assert len(found) == 35
    for i, one in enumerate(found):
        assert one.image_hw == pictures[i].shape[:2]
        assert_same(one, found[i % 5])


@pytest.mark.parametrize("kind", ["torch", "plugin"])
def test_submitted_pictures_come_back_in_their_futures(detectors, kind):
    detector = detectors(kind)
    futures = [detector.submit(picture, conf=0.7) for picture in PICTURES]
    for future, picture in zip(futures, PICTURES, strict=True):
        assert_same(future.result(timeout=60), detector(picture, conf=0.7))


def test_a_future_holds_the_error(detector, tmp_path):
    future = detector.submit(tmp_path / "absent.jpg")
    assert isinstance(future.exception(timeout=60), ImageError)


@pytest.mark.parametrize("kind", ["torch", "plugin"])
def test_eight_threads_get_equal_results(detectors, kind):
    detector = detectors(kind)
    expected = [detector(picture) for picture in PICTURES]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: detector(PICTURES[i % 5]), range(40)))
    for i, found in enumerate(results):
        assert_same(found, expected[i % 5])


def test_stream_gives_the_pictures_of_a_folder_in_order(detector, tmp_path):
    for i, picture in enumerate(PICTURES[:3]):
        cv2.imwrite(str(tmp_path / f"{i}.png"), picture)
    seen = list(detector.stream(tmp_path, max_det=5))
    assert [frame.path for frame, _ in seen] == [str(tmp_path / f"{i}.png") for i in range(3)]
    for i, (frame, found) in enumerate(seen):
        assert found.path == frame.path
        assert_identical(found, detector(PICTURES[i], max_det=5))


def test_stream_of_an_empty_folder_says_so(detector, tmp_path):
    with pytest.raises(SourceError):
        next(detector.stream(tmp_path))


# --- thresholds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["torch", "none", "plugin"])
def test_thresholds_of_a_call_replace_those_of_the_detector(detectors, kind):
    detector = detectors(kind)
    kept = detector.thresholds
    everything = detector(PICTURES[0])
    above = detector(PICTURES[0], conf=0.75)
    assert 0 < len(above) < len(everything)
    assert_identical(above, everything.filter(conf=0.75))
    assert len(detector(PICTURES[0], iou=0.05)) < len(everything) < len(detector(PICTURES[0], iou=0.95))
    assert_identical(detector(PICTURES[0], max_det=3), everything[:3])
    assert detector.thresholds == kept
    assert_identical(detector(PICTURES[0]), everything)


@pytest.mark.parametrize("kind", ["torch", "plugin"])
def test_only_the_wanted_classes_come_back(detectors, kind):
    detector = detectors(kind)
    everything = detector(PICTURES[0])
    counts = np.bincount(everything.class_ids, minlength=5)
    wanted = int(counts.argmax())
    assert 0 < counts[wanted] < len(everything) < MAX_DET
    assert_identical(detector(PICTURES[0], classes=[wanted]), everything.filter(classes=wanted))


def test_lower_thresholds_than_the_file_was_exported_with_find_more(plugin, detector):
    assert_same(plugin(PICTURES[0], conf=0.5), detector(PICTURES[0], conf=0.5))
    assert len(plugin(PICTURES[0], conf=0.5)) > len(plugin(PICTURES[0]))


def test_thresholds_left_out_are_those_of_the_file(files):
    with Detector(files("plugin"), device="cpu") as detector:
        assert detector.thresholds == Thresholds(conf=CONF, iou=0.45, max_det=MAX_DET)
        assert detector.input_hw == HW
    with Detector(files("torch"), img=HW, device="cpu") as detector:
        assert detector.thresholds == Thresholds()


def test_without_a_size_the_papers_is_taken(files):
    with Detector(files("torch"), device="cpu") as detector:
        assert detector.input_hw == (640, 640)


@pytest.mark.parametrize("kind", ["torch", "plugin"])
@pytest.mark.parametrize("class_id", [5, -1])
def test_an_unknown_class_id_is_refused(detectors, files, kind, class_id):
    with pytest.raises(UsageError, match=f"Class id {class_id} .* 5 classes") as caught:
        detectors(kind)(PICTURES[0], classes=[0, class_id])
    assert "0 to 4" in caught.value.fix
    with pytest.raises(UsageError, match="Class id"):
        Detector(files(kind), classes=[class_id], device="cpu")


@pytest.mark.parametrize("options", [{"conf": 1.5}, {"iou": -1}, {"max_det": 0}])
def test_thresholds_without_a_meaning_are_refused(detector, options):
    with pytest.raises(UsageError) as caught:
        detector(PICTURES[0], **options)
    assert next(iter(options)) in caught.value.message


@pytest.mark.parametrize("option", [{"multi_label": True}, {"class_agnostic": True}])
def test_what_the_suppression_inside_cannot_do_is_refused(files, option):
    with Detector(files("plugin"), device="cpu", **option) as detector:
        with pytest.raises(UsageError, match=next(iter(option))) as caught:
            detector(PICTURES[0])
        assert caught.value.fix


def test_what_the_suppression_outside_can_do_is_done(files, detectors):
    with Detector(files("none"), conf=CONF, max_det=MAX_DET, multi_label=True, device="cpu") as detector:
        assert len(detector(PICTURES[0])) > len(detectors("none")(PICTURES[0]))


def test_an_efficient_file_takes_higher_thresholds_and_refuses_lower_ones(files):
    with Detector(files("efficient", multi_label=True), device="cpu") as detector:
        everything = detector(PICTURES[0])
        assert_identical(detector(PICTURES[0], conf=0.75), everything.filter(conf=0.75))
        for option in ({"conf": 0.3}, {"iou": 0.6}, {"iou": 0.3}):
            with pytest.raises(UsageError, match=next(iter(option))):
                detector(PICTURES[0], **option)


# --- opening and closing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["torch", "plugin"])
def test_after_closing_every_call_is_refused(files, kind):
    with Detector(files(kind), img=HW, device="cpu") as detector:
        future = detector.submit(PICTURES[0])
        assert len(future.result(timeout=60)) > 0
    detector.close()
    for call in (detector, detector.submit):
        with pytest.raises(UsageError, match="closed") as caught:
            call(PICTURES[0])
        assert caught.value.fix
    with pytest.raises(UsageError, match="closed"):
        detector.batch([PICTURES[0]])
    with pytest.raises(UsageError, match="closed"):
        detector.warmup()


def test_closing_leaves_no_thread_behind(files):
    before = threading.active_count()
    with Detector(files("plugin"), device="cpu") as detector:
        detector.submit(PICTURES[0]).result(timeout=60)
        assert threading.active_count() > before
    assert threading.active_count() == before


def test_warmup_runs_without_a_picture(detectors):
    detectors("torch").warmup()
    detectors("plugin").warmup(runs=1)


def test_the_device_is_told(detectors):
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
def test_a_device_nobody_has_is_refused(files, kind, device):
    with pytest.raises(DeviceError):
        Detector(files(kind), img=HW, device=device)


def test_a_size_other_than_the_files_is_refused(files):
    with pytest.raises(UsageError, match="128x192, not 320x320") as caught:
        Detector(files("plugin"), img=320, device="cpu")
    assert "--img 320,320" in caught.value.fix


def test_a_size_the_stride_does_not_divide_is_refused(files):
    with pytest.raises(UsageError, match="stride 32") as caught:
        Detector(files("torch"), img=(100, 128), device="cpu")
    assert caught.value.fix == "--img 128,128"


def test_a_file_that_is_absent_or_of_no_kind_is_refused(tmp_path):
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


def test_text_with_the_suffix_of_onnx_is_refused(tmp_path):
    (tmp_path / "m.onnx").write_text("not a model")
    with pytest.raises(LoadError, match=r"m\.onnx"):
        Detector(tmp_path / "m.onnx", device="cpu")


# --- files of others ----------------------------------------------------------------------------------------------


def test_a_file_without_a_passport_opens_with_a_warning(files, detectors, tmp_path, caplog):
    path = foreign(files("none"), tmp_path / "m.onnx")
    with caplog.at_level(logging.WARNING), Detector(path, conf=CONF, max_det=MAX_DET, device="cpu") as detector:
        assert any(
            "no passport" in record.getMessage() and "m.onnx" in record.getMessage() for record in caplog.records
        )
        assert detector.class_names == tuple(f"class_{i}" for i in range(5))
        assert detector.input_hw == HW
        for picture in PICTURES:
            assert_identical(detector(picture), detectors("none")(picture))


def test_a_foreign_file_with_suppression_inside_opens(files, detectors, tmp_path):
    path = foreign(files("plugin"), tmp_path / "m.onnx", without_thresholds)
    with Detector(path, device="cpu") as detector:
        assert detector.input_hw == HW
        assert detector.class_names[:2] == ("class_0", "class_1")
        for picture in PICTURES:
            assert_identical(detector(picture), detectors("plugin")(picture))
        assert len(detector(PICTURES[0], conf=0.75)) == len(detectors("plugin")(PICTURES[0], conf=0.75))


def without_thresholds(proto):
    """Thresholds frozen into the file, as other exporters do."""
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

    with Detector(foreign(files("plugin"), tmp_path / "m.onnx", shuffled), device="cpu") as detector:
        assert_identical(detector(PICTURES[0]), detectors("plugin")(PICTURES[0]))


def test_a_foreign_file_with_overridable_thresholds_takes_them(files, detectors, tmp_path):
    with Detector(foreign(files("plugin"), tmp_path / "m.onnx"), device="cpu") as detector:
        ours, expected = (one(PICTURES[0], conf=0.75) for one in (detector, detectors("plugin")))
        assert_identical(ours, expected)


def test_a_foreign_file_of_open_size_takes_the_size_asked_for(files, detectors, tmp_path):
    proto = onnx.load(files("none"))
    for dim in proto.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.Clear()
        dim.dim_param = "side"
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "m.onnx")
    with Detector(tmp_path / "m.onnx", img=HW, conf=CONF, max_det=MAX_DET, device="cpu") as detector:
        assert_identical(detector(PICTURES[0]), detectors("none")(PICTURES[0]))


@pytest.mark.parametrize(
    "input_shape, output_shape", [([1, 10], [1, 10]), ([1, 3, 64, 64], [1, 1000]), ([1, 3, 64, 64], [1, 63, 4])]
)
def test_an_onnx_file_that_is_no_yolov7_is_refused(tmp_path, input_shape, output_shape):
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
    with pytest.raises(LoadError, match="no YOLOv7 layout") as caught:
        Detector(tmp_path / "m.onnx", device="cpu")
    assert str(input_shape) in caught.value.message
    assert caught.value.fix
