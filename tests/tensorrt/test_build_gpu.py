"""The GPU a build would run on, as a driver tells it."""

import shutil
import subprocess

import pytest

from yolov7_deploy.hardware import gpu
from yolov7_deploy.hardware.gpu import BuildGpu, read_gpu

# The functions of libcuda that are asked, for one GPU of compute capability 8.6 under CUDA 12.8.
DRIVER = r"""
#include <string.h>
int cuInit(unsigned flags) { return STATUS; }
int cuDeviceGet(int* device, int ordinal) { *device = 7; return ordinal == 0 ? COUNT : 1; }
int cuDeviceGetName(char* name, int size, int device) { strncpy(name, "NVIDIA A10", size); return device != 7; }
int cuDeviceGetAttribute(int* value, int which, int device) { *value = which == 75 ? 8 : 6; return device != 7; }
int cuDriverGetVersion(int* version) { *version = 12080; return 0; }
"""
NVRM = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 22:50:36 UTC 2025\nGCC version: 12.2.0\n"


@pytest.fixture
def driver(tmp_path):
    """Compiles a driver; `status` is what cuInit answers, `count` is not 0 where there is no device."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")

    def make(*, status=0, count=0):
        source, library = tmp_path / "driver.c", tmp_path / "libdriver.so"
        source.write_text(DRIVER.replace("STATUS", str(status)).replace("COUNT", str(count)))
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
        return str(library)

    return make


def test_the_first_gpu_is_named_with_its_driver(driver, tmp_path, monkeypatch):
    version = tmp_path / "version"
    version.write_text(NVRM)
    monkeypatch.setattr(gpu, "DRIVER_VERSION", version)
    assert read_gpu(driver()) == BuildGpu(name="NVIDIA A10", compute_capability="8.6", driver="570.86.15", cuda="12.8")


def test_a_driver_that_does_not_tell_its_version_leaves_it_empty(driver, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "DRIVER_VERSION", tmp_path / "absent")
    found = read_gpu(driver())
    assert found is not None and found.driver == ""


@pytest.mark.parametrize("answers", [{"status": 100}, {"count": 101}], ids=["no driver", "no device"])
def test_without_a_device_there_is_no_gpu(driver, answers):
    assert read_gpu(driver(**answers)) is None


@pytest.mark.parametrize("library", ["libnothing_of_this_name.so.1", "libc.so.6"])
def test_without_a_driver_there_is_no_gpu(library):
    assert read_gpu(library) is None
