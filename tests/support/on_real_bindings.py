"""A plugin of pytest: the tests of the TensorRT runtime use NVIDIA's Python bindings, with a functional libnvinfer.

    pytest -p tests.support.on_real_bindings tests/runtimes/test_tensorrt.py

The real module `tensorrt` is on `$PYTHONPATH`, and `tests/fakes/nvinfer` on `$LD_LIBRARY_PATH` as its libraries. Tests
for another major version are skipped.
"""

import sys

import pytest
import tensorrt

from tests.fakes.fake_trt_runtime import RTX
from tests.fakes.functional_nvinfer import FunctionalNvinfer
from tests.support import trt_kit

MAJOR = tensorrt.__version__.partition(".")[0]
VERSIONS = {"8": "8.6.2", "10": "10.3.0", "11": "11.1.0"}  # of the fake, for each version of the bindings

library = FunctionalNvinfer(int(MAJOR))


class RealBindings(trt_kit.TrtEnvironment):
    """A machine with the bindings of TensorRT and a fake GPU."""

    def __init__(self, folder, monkeypatch):
        super().__init__(folder, monkeypatch, VERSIONS[MAJOR])

    def use(self, version):
        if version == RTX or version.partition(".")[0] != MAJOR:
            pytest.skip(f"the bindings are those of TensorRT {tensorrt.__version__}")
        super().use(version)
        self.trt.absent = frozenset()  # the bindings decide which names exist
        self.trt.__version__ = tensorrt.__version__
        self.monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
        library.trt = self.trt


trt_kit.TrtEnvironment = RealBindings
