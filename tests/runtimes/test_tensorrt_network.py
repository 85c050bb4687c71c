"""The TensorRT runtime on the graph of a real network, which needs torch; test_tensorrt.py has small graphs."""

from tests.support.sample_images import IMAGES, NMS_OPTIONS, assert_same
from tests.support.small_models import HW, exported_tiny
from tests.support.trt_kit import environment
from yolov7_deploy.detector import Detector
from yolov7_deploy.tensorrt.onnx_rewrite import prepare_graph

__all__ = ["environment"]


def test_a_real_network_gives_the_boxes_of_its_onnx_file(environment):
    model = exported_tiny(nms="plugin", batch=None, **NMS_OPTIONS, multi_label=False)
    prepared = prepare_graph(model, use_plugin=False)
    onnx_file = environment.folder / "tiny.onnx"
    model.save(onnx_file)
    engine = environment.engine(prepared.proto, metadata=model.metadata, nms_by="operators", name="tiny.engine")
    with Detector(engine) as ours, Detector(onnx_file, device="cpu") as theirs:
        assert ours.input_hw == HW
        assert (ours.device, ours.max_batch_size, ours.class_names) == ("cuda:0", 4, theirs.class_names)
        for found, expected in zip(ours.batch(IMAGES), theirs.batch(IMAGES), strict=True):
            assert len(found) > 5
            assert_same(found, expected)
        assert_same(ours(IMAGES[0], conf=0.75), theirs(IMAGES[0], conf=0.75))
        assert len(ours(IMAGES[0], iou=0.05)) < len(ours(IMAGES[0]))
