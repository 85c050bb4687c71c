"""The TensorRT headers and libraries that tests of the plugin compile and load; what is not there skips its test.

`$Y7_TENSORRT_INCLUDE` may name the headers of TensorRT 10 or later (else they are searched for), and
`$Y7_TENSORRT86` a TensorRT 8.6: its libraries in lib/, its Python bindings in site/, its headers in include/.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from yolov7_deploy.errors import PluginError
from yolov7_deploy.tensorrt.plugin_build import find_tools

HEADERS_VARIABLE, OLD_VARIABLE = "Y7_TENSORRT_INCLUDE", "Y7_TENSORRT86"


def headers_or_skip() -> Path:
    """The headers of TensorRT 10 or later."""
    named = os.environ.get(HEADERS_VARIABLE)
    try:
        return find_tools(tensorrt_include=Path(named) if named else None).headers
    except PluginError as error:
        pytest.skip(error.message)


def old_or_skip() -> Path:
    """The folder of a TensorRT 8.6."""
    named = os.environ.get(OLD_VARIABLE)
    if not named:
        pytest.skip(f"needs a TensorRT 8.6 in the folder that ${OLD_VARIABLE} names")
    return Path(named)
