"""Functions that run in a child process of `os.fork`, which must end."""

import os
import pickle
import select
import signal

TIMEOUT_S = 60


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
