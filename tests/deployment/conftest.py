"""The interface of Triton's Python backend, for tests without the server."""

import importlib
import json
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import cv2
import numpy as np
import pytest

from tests.support.model_config import parameters, parse_config

MODULES = ("triton_python_backend_utils", "yolov7_deploy.deployment.triton_backend")


@dataclass
class Tensor:
    name: str
    values: np.ndarray

    def as_numpy(self):
        return self.values


@dataclass
class TritonError:
    message: str


@dataclass
class InferenceResponse:
    output_tensors: list = field(default_factory=list)
    error: TritonError | None = None

    @property
    def output(self):
        return {tensor.name: tensor.values for tensor in self.output_tensors}


@pytest.fixture
def python_backend():
    """Functions that open the model of a repository and make requests; see `tests/fakes/README.md`."""
    utils = ModuleType(MODULES[0])
    vars(utils).update(Tensor=Tensor, TritonError=TritonError, InferenceResponse=InferenceResponse)
    utils.get_input_tensor_by_name = lambda request, name: request[name]
    sys.modules[MODULES[0]] = utils
    yield SimpleNamespace(open=_open, request=_request, encode=_encode)
    for name in MODULES:
        sys.modules.pop(name, None)


def _open(repository, name):
    config = parse_config((repository / name / "config.pbtxt").read_text())
    entries = {key: {"string_value": value} for key, value in parameters(config).items()}
    model = importlib.import_module(MODULES[1]).TritonPythonModel()
    model.initialize(
        {
            "model_config": json.dumps({"parameters": entries}),
            "model_repository": str(repository / name),
            "model_version": "1",
            "model_instance_kind": "CPU",
            "model_instance_device_id": "0",
        }
    )
    return model


def _request(images):
    return {"image": Tensor("image", np.array(images, dtype=np.object_).reshape(len(images), 1))}


def _encode(image):
    return cv2.imencode(".png", image)[1].tobytes()
