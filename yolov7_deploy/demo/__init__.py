"""The whole way once, without a network, explained step by step."""

from yolov7_deploy.demo.demo import DemoReport, run_demo
from yolov7_deploy.demo.shapes_road import ShapesReport, run_shapes_demo
from yolov7_deploy.demo.street import street

__all__ = ["DemoReport", "ShapesReport", "run_demo", "run_shapes_demo", "street"]
