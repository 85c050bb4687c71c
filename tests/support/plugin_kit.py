"""TensorRT headers and libraries for tests of the plugin; a test is skipped if they are not installed.

`$Y7_TENSORRT_INCLUDE` is the folder of the headers of TensorRT 10 or later (default: searched), `$Y7_TENSORRT86` the
folder of a TensorRT 8.6, with libraries in lib/, Python bindings in site/ and headers in include/.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from yolov7_deploy.errors import PluginError
from yolov7_deploy.tensorrt.plugin_build import find_tools

HEADERS_VARIABLE, TENSORRT86_VARIABLE = "Y7_TENSORRT_INCLUDE", "Y7_TENSORRT86"


def headers_or_skip() -> Path:
    """Return the folder of the headers of TensorRT 10 or later, or skip the test."""
    named = os.environ.get(HEADERS_VARIABLE)
    try:
        return find_tools(tensorrt_include=Path(named) if named else None).headers
    except PluginError as error:
        pytest.skip(error.message)


def tensorrt86_or_skip() -> Path:
    """Return the folder of a TensorRT 8.6, or skip the test."""
    named = os.environ.get(TENSORRT86_VARIABLE)
    if not named:
        pytest.skip(f"needs a TensorRT 8.6 in the folder that ${TENSORRT86_VARIABLE} names")
    return Path(named)
