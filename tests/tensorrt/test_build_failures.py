"""Builds that fail: what TensorRT cannot do, and a builder that crashes, is killed or runs out of memory."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.engines import HAS_RTX, NO_RTX, exported, files, foreign, left_behind, rtx
from yolov7_deploy.cli.app import INTERRUPTED
from yolov7_deploy.errors import EngineError
from yolov7_deploy.export.onnx_model import OnnxModel
from yolov7_deploy.options import EngineOptions
from yolov7_deploy.tensorrt import builder as build_module
from yolov7_deploy.tensorrt.build_messages import Failure, ParserFault
from yolov7_deploy.tensorrt.build_process import out_of_memory
from yolov7_deploy.tensorrt.builder import BuildCallbacks, build_engine, build_file
from yolov7_deploy.tensorrt.onnx_rewrite import open_onnx

needs_rtx = pytest.mark.skipif(not HAS_RTX, reason=NO_RTX)
MIB = 2**20
TIMEOUT_S = 120


# --- what TensorRT says -----------------------------------------------------------------------------------------------


@needs_rtx
@pytest.mark.parametrize("op,domain", [("Frobnicate", ""), ("FusedConv", "com.microsoft")])
def test_an_unknown_operator_is_named_with_its_node(op, domain):
    model = OnnxModel(foreign(op, domain), exported().metadata)
    with pytest.raises(EngineError) as caught:
        build_engine(model, on=rtx())
    assert f"node last ({f'{domain}.' if domain else ''}{op}): Plugin not found" in caught.value.message
    assert f"ai.onnx 17{f', {domain} 1' if domain else ''}" in caught.value.message


def test_a_node_known_by_number_only_is_looked_up_in_the_graph():
    fault = ParserFault(node=1, name="", op="", words="no")
    failure = Failure(message="TensorRT 8.6.1 cannot read the graph", parser=(fault,))
    error = build_module._failed(failure, foreign("Frobnicate", "theirs"), (), 0)
    assert "node last (theirs.Frobnicate): no" in error.message


@needs_rtx
def test_a_target_that_is_not_known_is_named_with_those_that_are(small):
    with pytest.raises(EngineError, match=r"not for 9\.0") as caught:
        build_engine(open_onnx(small), EngineOptions(targets=("sm90",)), on=rtx())
    assert "sm86,sm89" in caught.value.fix


@needs_rtx
@pytest.mark.parametrize(
    "options,says",
    [
        ({"hardware_compatible": "ampere+"}, r"--hardware-compatible ampere\+: TensorRT-RTX"),
        ({"version_compatible": True}, "--version-compatible: TensorRT-RTX"),
        ({"timing_cache": Path("kernels.timing")}, "--timing-cache means nothing to TensorRT-RTX"),
        ({"dla": 0}, "DLA"),
        ({"max_batch": 4}, "--max-batch 4: the file was exported for a batch of 1"),
        ({"plugin": "on"}, "--plugin on: the graph has no node"),
    ],
)
def test_an_option_that_cannot_be_had_is_named(small, options, says):
    with pytest.raises(EngineError, match=says):
        build_engine(open_onnx(small), EngineOptions(**options), on=rtx())


@needs_rtx
def test_a_workspace_that_is_too_small_is_said_to_be(small):
    with pytest.raises(EngineError, match="workspace limit") as caught:
        build_engine(open_onnx(small), EngineOptions(workspace_gib=1e-9), on=rtx())
    assert "--workspace 2" in caught.value.fix


# --- a builder that dies ----------------------------------------------------------------------------------------------


def during_the_build(act):
    """Runs `act(process)` with the building process when the graph is parsed and the build begins."""

    def say(what, seconds):
        if what.startswith("parsed"):
            for child in psutil.Process().children(recursive=True):
                act(child)

    return BuildCallbacks(say=say)


@needs_rtx
def test_a_build_that_is_killed_says_the_need_and_the_have():
    with pytest.raises(EngineError, match=r"it had [\d.]+ [MG]iB and wanted more.*main memory has [\d.]+ [MG]iB free"):
        build_engine(exported(), on=rtx(), telling=during_the_build(lambda child: child.kill()))
    assert left_behind() == []


@needs_rtx
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
def test_a_build_that_crashes_is_our_error(number):
    with pytest.raises(EngineError, match=number.name):
        build_engine(exported(), on=rtx(), telling=during_the_build(lambda child: child.send_signal(number)))
    assert left_behind() == []


@needs_rtx
def test_a_build_without_memory_says_so(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")  # else every thread takes addresses by the 64 MiB

    def starve(child):
        stacks = 8 * MIB * psutil.cpu_count()
        limit = child.memory_info().vms + stacks + 120 * MIB  # its threads fit, the build does not
        resource.prlimit(child.pid, resource.RLIMIT_AS, (limit, limit))

    with pytest.raises(EngineError, match="ran out of memory while it built") as caught:
        build_engine(exported(), on=rtx(), telling=during_the_build(starve))
    assert "free" in caught.value.message
    assert left_behind() == []


@needs_rtx
def test_an_interrupt_ends_the_builder_and_leaves_nothing(tiny):
    def interrupt(child):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_file(
            tiny, tiny.with_suffix(".engine"), options=EngineOptions(), on=rtx(), telling=during_the_build(interrupt)
        )
    assert psutil.Process().children(recursive=True) == []
    assert (files(tiny.parent), left_behind()) == (["tiny.onnx"], [])


@needs_rtx
def test_ctrl_c_at_the_command_leaves_nothing(tiny, tmp_path_factory):
    temporary = tmp_path_factory.mktemp("of the command")
    command = [sys.executable, "-m", "yolov7_deploy", "build", "--weights", str(tiny)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    ) as process:
        assert any("prepared" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == INTERRUPTED, said
    assert "Traceback" not in said
    assert (files(tiny.parent), files(temporary)) == (["tiny.onnx"], [])


@needs_rtx
def test_a_builder_does_not_outlive_a_caller_that_was_killed(tiny):
    command = [sys.executable, "-m", "yolov7_deploy", "build", "--weights", str(tiny)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert any("prepared" in line for line in process.stdout)
        builders = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    _, alive = psutil.wait_procs(builders, timeout=TIMEOUT_S)
    assert (len(alive), files(tiny.parent)) == (0, ["tiny.onnx"])


@pytest.mark.parametrize(
    "line,need",
    [
        ("ERROR: [defaultAllocator.cpp::allocate] Error Code 1: Cuda Runtime (out of memory)", "out of memory"),
        ("WARNING: Requested amount of GPU memory (5368709120 bytes) could not be allocated.", "5.0 GiB at once"),
        ("ERROR: 2: [utils.cpp::resize] Error Code 2: OutOfMemory (no further information)", "OutOfMemory"),
    ],
)
def test_a_gpu_without_memory_is_read_from_the_log(line, need):
    error = out_of_memory(("INFO: hello", line), peak_memory_bytes=300 * MIB)
    assert need in error.message and "having 300 MiB already" in error.message
    assert "--workspace" in error.fix


def test_a_log_that_does_not_speak_of_memory_is_none_of_its_business():
    assert out_of_memory(("ERROR: no tactics",), peak_memory_bytes=0) is None
