"""A Ray Serve application: images over HTTP in, detections as JSON out, and a web page to try it.

    serve run yolov7_deploy.serving:app weights=yolov7.onnx

`app` is imported when it is first used, so the other modules of this package need neither Ray nor Starlette.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yolov7_deploy.serving.application import app as app

__all__ = ["app"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a function of the application
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from yolov7_deploy.serving.application import app
    except ModuleNotFoundError as error:
        from yolov7_deploy.errors import missing_library

        raise missing_library(error, "for yolov7_deploy.serving") from error
    return app
