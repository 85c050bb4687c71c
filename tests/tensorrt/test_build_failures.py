"""Builds that fail: unsupported graphs and options, and a build process that crashes, is killed or lacks memory."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from tests.support.engines import HAS_RTX, NO_RTX, exported, files, foreign, left_behind, rtx
from yolov7_deploy.errors import EngineError
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.options import EngineOptions
from yolov7_deploy.tensorrt import build_process
from yolov7_deploy.tensorrt import builder as build_module
from yolov7_deploy.tensorrt.build_messages import Failure, ParserError
from yolov7_deploy.tensorrt.build_process import out_of_memory
from yolov7_deploy.tensorrt.builder import BuildCallbacks, build_engine, build_file
from yolov7_deploy.tensorrt.onnx_rewrite import open_onnx

needs_rtx = pytest.mark.skipif(not HAS_RTX, reason=NO_RTX)
MIB = 2**20
TIMEOUT_S = 120


# --- graphs and options -----------------------------------------------------------------------------------------------


@needs_rtx
@pytest.mark.parametrize("op,domain", [("Frobnicate", ""), ("FusedConv", "com.microsoft")])
def test_an_unknown_operator_is_an_error_that_names_the_node(op, domain):
    model = OnnxModel(foreign(op, domain), exported().metadata)
    with pytest.raises(EngineError) as caught:
        build_engine(model, installation=rtx())
    assert f"node last ({f'{domain}.' if domain else ''}{op}): Plugin not found" in caught.value.message
    assert f"ai.onnx 17{f', {domain} 1' if domain else ''}" in caught.value.message


def test_a_node_reported_by_index_is_looked_up_in_the_graph():
    parser_error = ParserError(node=1, name="", op="", message="no")
    failure = Failure(message="TensorRT 8.6.1 cannot read the graph", parser_errors=(parser_error,))
    error = build_module._build_error(failure, foreign("Frobnicate", "theirs"), (), 0)
    assert "node last (theirs.Frobnicate): no" in error.message


@needs_rtx
def test_an_unsupported_target_is_an_error_with_the_supported_targets(foreign_onnx):
    with pytest.raises(EngineError, match=r"not for 9\.0") as caught:
        build_engine(open_onnx(foreign_onnx), EngineOptions(targets=("sm90",)), installation=rtx())
    assert "sm86,sm89" in caught.value.fix


@needs_rtx
@pytest.mark.parametrize(
    "options,message",
    [
        ({"hardware_compatible": "ampere+"}, "--hardware-compatible ampere+: TensorRT-RTX"),
        ({"version_compatible": True}, "--version-compatible: TensorRT-RTX"),
        ({"timing_cache": Path("kernels.timing")}, "--timing-cache has no effect with TensorRT-RTX"),
        ({"dla": 0}, "DLA"),
        ({"max_batch": 4}, "--max-batch 4: the file was exported for a batch of 1"),
        ({"plugin": "on"}, "--plugin on: the graph has no node"),
    ],
)
def test_an_unsupported_option_is_an_error_that_names_it(foreign_onnx, options, message):
    with pytest.raises(EngineError) as caught:
        build_engine(open_onnx(foreign_onnx), EngineOptions(**options), installation=rtx())
    assert message in caught.value.message


@needs_rtx
def test_a_workspace_that_is_too_small_is_an_error(foreign_onnx):
    with pytest.raises(EngineError, match="workspace limit") as caught:
        build_engine(open_onnx(foreign_onnx), EngineOptions(workspace_gib=1e-9), installation=rtx())
    assert "--workspace 2" in caught.value.fix


# --- the build process ------------------------------------------------------------------------------------------------


def during_the_build(action):
    """Return callbacks that call `action(process)` with the build process when the graph is parsed."""

    def on_step(description, seconds):
        if description.startswith("parsed"):
            for process in psutil.Process().children(recursive=True):
                action(process)

    return BuildCallbacks(on_step=on_step)


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory, monkeypatch):
    """Temporary folders are in a folder of the test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))


@needs_rtx
def test_a_killed_build_is_an_error_with_the_used_and_the_free_memory():
    with pytest.raises(
        EngineError, match=r"it had [\d.]+ [MG]iB and requested more.*main memory has [\d.]+ [MG]iB free"
    ):
        build_engine(exported(), installation=rtx(), callbacks=during_the_build(lambda process: process.kill()))
    assert left_behind() == []


@needs_rtx
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
def test_a_crashed_build_is_an_engine_error(number):
    with pytest.raises(EngineError, match=number.name):
        build_engine(
            exported(), installation=rtx(), callbacks=during_the_build(lambda process: process.send_signal(number))
        )
    assert left_behind() == []


# A build process that logs an error of TensorRT, prints more lines than an error message shows, and crashes.
CRASHING = """
import os, sys
print('{"log": "INFO: hello"}\\n{"log": "ERROR: Cuda Runtime (out of memory)"}', flush=True)
print(*range(20), sep="\\n", file=sys.stderr, flush=True)
os.abort()
"""


def test_errors_of_tensorrt_are_kept_beside_what_the_process_prints(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(build_process, "_START", CRASHING)
    with caplog.at_level("DEBUG"):
        result = build_process.run_process([], tmp_path, lambda kind, value: None)
    assert result.returncode == -signal.SIGABRT
    assert result.log_lines[0] == "ERROR: Cuda Runtime (out of memory)"
    assert result.log_lines[-1] == "19"
    assert "ran out of memory" in build_process._crash_error(result).message
    assert "\n".join(map(str, range(20))) in caplog.text


@needs_rtx
def test_a_build_without_memory_is_an_error(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")  # otherwise every thread reserves 64 MiB of addresses

    def limit_memory(process):
        stacks = 8 * MIB * psutil.cpu_count()
        limit = process.memory_info().vms + stacks + 120 * MIB  # enough for its threads, not for the build
        resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, limit))

    with pytest.raises(EngineError, match="ran out of memory during the build") as caught:
        build_engine(exported(), installation=rtx(), callbacks=during_the_build(limit_memory))
    assert "free" in caught.value.message
    assert left_behind() == []


@needs_rtx
def test_an_interrupt_ends_the_build_process_and_removes_its_files(tiny_onnx):
    def interrupt(process):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_file(
            tiny_onnx,
            tiny_onnx.with_suffix(".engine"),
            options=EngineOptions(),
            installation=rtx(),
            callbacks=during_the_build(interrupt),
        )
    assert psutil.Process().children(recursive=True) == []
    assert (files(tiny_onnx.parent), left_behind()) == (["tiny.onnx"], [])


@needs_rtx
@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_command_removes_all_files(tiny_onnx, tmp_path_factory, number, exit_code):
    temporary = tmp_path_factory.mktemp("temporary")
    command = [sys.executable, "-m", "yolov7_deploy", "build", "--weights", str(tiny_onnx)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs of a shell ignore SIGINT
    ) as process:
        assert any("prepared" in line for line in process.stdout)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == exit_code, stderr
    assert "Traceback" not in stderr
    assert (files(tiny_onnx.parent), files(temporary)) == (["tiny.onnx"], [])


@needs_rtx
def test_the_build_process_ends_when_its_caller_is_killed(tiny_onnx):
    command = [sys.executable, "-m", "yolov7_deploy", "build", "--weights", str(tiny_onnx)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert any("prepared" in line for line in process.stdout)
        builders = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    _, alive = psutil.wait_procs(builders, timeout=TIMEOUT_S)
    assert (len(alive), files(tiny_onnx.parent)) == (0, ["tiny.onnx"])


@pytest.mark.parametrize(
    "line,need",
    [
        ("ERROR: [defaultAllocator.cpp::allocate] Error Code 1: Cuda Runtime (out of memory)", "out of memory"),
        ("WARNING: Requested amount of GPU memory (5368709120 bytes) could not be allocated.", "5.0 GiB at once"),
        ("ERROR: 2: [utils.cpp::resize] Error Code 2: OutOfMemory (no further information)", "OutOfMemory"),
    ],
)
def test_a_gpu_memory_error_is_recognized_in_the_log(line, need):
    error = out_of_memory(("INFO: hello", line), peak_memory_bytes=300 * MIB)
    assert need in error.message and "already had 300 MiB" in error.message
    assert "--workspace" in error.fix


def test_a_log_without_a_memory_error_is_not_a_memory_error():
    assert out_of_memory(("ERROR: no tactics",), peak_memory_bytes=0) is None
