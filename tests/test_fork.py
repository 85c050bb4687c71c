"""Runtimes in child processes of `os.fork`: a GPU is refused, and nothing of the parent is freed."""

import gc
import os
import sys
import weakref

import numpy as np
import pytest

from tests.support.child_processes import in_forked_child
from tests.support.trt_kit import assert_detected, environment, infer, make_image, toy
from yolov7_deploy._process import call_after_fork, never_free
from yolov7_deploy.errors import DeviceError
from yolov7_deploy.runtimes.cuda import DeviceBuffer, PinnedBuffer, Stream

__all__ = ["environment"]

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork processes"),
    # Python 3.12 warns about forks of processes with threads, which is what these tests are about.
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),
]


class Owner:
    """An object that records in which process it was called."""

    def __init__(self):
        self.process = None
        call_after_fork(self)

    def after_fork(self):
        self.process = os.getpid()


def test_an_object_is_called_in_every_child_and_not_in_the_parent():
    owner = Owner()
    for _ in range(2):
        assert in_forked_child(lambda: owner.process == os.getpid())
    assert owner.process is None


def test_registering_does_not_keep_an_object_alive():
    owner = Owner()
    reference = weakref.ref(owner)
    del owner
    assert reference() is None
    assert in_forked_child(lambda: True)


def test_an_object_that_is_never_freed_is_not_collected():
    owner = Owner()
    reference, before = weakref.ref(owner), sys.getrefcount(owner)
    never_free(owner)
    assert sys.getrefcount(owner) == before + 1
    del owner
    gc.collect()
    assert reference() is not None


def test_an_engine_is_refused_in_a_child_and_works_on_in_the_parent(environment):
    runtime, image = environment.open(toy(None)), make_image(0)
    infer(runtime, [image])
    calls = environment.calls()

    def work():
        with pytest.raises(DeviceError, match="cannot be used in a child process") as caught:
            infer(runtime, [image])
        runtime.close()
        environment.opened.clear()
        return caught.value.fix

    assert "spawn" in in_forked_child(work)
    assert calls() == []
    assert_detected(infer(runtime, [image]).detections[0], image)


def test_gpu_memory_of_the_parent_is_not_freed_by_a_child(environment):
    owners = [DeviceBuffer(environment.cuda, (8,), np.uint8), Stream(environment.cuda)]
    pinned = PinnedBuffer(environment.cuda, (8,), np.uint8)
    array = pinned.array
    calls = environment.calls()

    def work():
        nonlocal array
        for owner in owners:
            owner.close()
        owners.clear()
        pinned.close()
        del array
        gc.collect()

    in_forked_child(work)
    assert calls() == []
    for owner in owners:
        owner.close()
    pinned.close()
    del array
    assert sorted(calls()) == ["cudaFree", "cudaFreeHost", "cudaStreamDestroy"]
