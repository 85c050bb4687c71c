"""Functions in a child process of `os.fork`, which must end, and tests in a process of their own."""

import os
import pickle
import select
import signal
import subprocess
import sys
from pathlib import Path

TIMEOUT_S = 60
ISA_VARIABLE = "ONEDNN_MAX_CPU_ISA"  # instructions that OpenVINO uses at most


def in_forked_child(function):
    """Return what a function returns in a forked child, or raise what it raises; a child that hangs is an error."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            outcome = function()
        except BaseException as error:  # noqa: BLE001 - raised again in the parent
            outcome = error
        try:
            os.write(writer, pickle.dumps(outcome))
        finally:
            os._exit(0)
    os.close(writer)
    try:
        ready, _, _ = select.select([reader], [], [], TIMEOUT_S)
        if not ready:
            os.kill(pid, signal.SIGKILL)
            raise TimeoutError("the child process hangs")
        with os.fdopen(reader, "rb", closefd=False) as file:
            outcome = pickle.loads(file.read())
    finally:
        os.close(reader)
        os.waitpid(pid, 0)
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def passes_without_amx(request):
    """Run a test again in a process without AMX, and return whether that was done; on other CPUs nothing is."""
    if "amx_int8" not in Path("/proc/cpuinfo").read_text() or ISA_VARIABLE in os.environ:
        return False
    command = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", f"{request.path}::{request.node.name}"]
    environment = {**os.environ, ISA_VARIABLE: "AVX512_CORE_VNNI"}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout
    return True
