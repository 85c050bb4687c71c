"""The verification of an export in several runtimes."""

from __future__ import annotations

import threading

import pytest

from yolov7_deploy.errors import LoadError
from yolov7_deploy.hardware.system import FreeMemory
from yolov7_deploy.hub import bundled_weights
from yolov7_deploy.options import ExportOptions
from yolov7_deploy.workflows import export as export_module
from yolov7_deploy.workflows.export import export_weights

pytest.importorskip("openvino", reason="OpenVINO is not installed")
from yolov7_deploy.runtimes import openvino as runtime_module

HW = (96, 96)


@pytest.mark.parametrize("memory", [1, None], ids=["one after the other", "at the same time"])
def test_an_export_is_verified_in_every_runtime(tmp_path, monkeypatch, memory):
    free = None if memory is None else FreeMemory(size=memory, source="a test")
    monkeypatch.setattr(export_module, "free_host_memory", lambda: free)
    threads, open_one = set(), export_module.open_runtime
    monkeypatch.setattr(
        export_module, "open_runtime", lambda *a, **k: threads.add(threading.get_ident()) or open_one(*a, **k)
    )
    steps = []
    options = ExportOptions(input_hw=HW)
    export_weights(bundled_weights(), tmp_path / "a.onnx", options=options, log=lambda step, _: steps.append(step))
    for name in ("onnxruntime", "openvino"):
        assert sum(step.startswith(f"verified in {name} against torch on 1 image") for step in steps) == 1, steps
    assert (threading.get_ident() in threads) == (memory == 1)


def test_a_runtime_that_cannot_open_an_export_is_named(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise LoadError("no operator X.")

    monkeypatch.setattr(runtime_module, "rewrite_for_openvino", refuse)
    steps = []
    options = ExportOptions(input_hw=HW)
    export_weights(bundled_weights(), tmp_path / "a.onnx", options=options, log=lambda step, _: steps.append(step))
    assert "not run in openvino: no operator X." in steps
