"""The GPUs that CUDA shows, the installed ones, and what is reported without a driver or without NVML."""

import pytest

from tests.fakes.faked_cuda import install_fake_nvml
from yolov7_deploy.hardware import gpu
from yolov7_deploy.hardware.gpu import (
    CudaGpu,
    InstalledGpu,
    driver_version,
    list_cuda_gpus,
    list_installed_gpus,
    open_gpu,
    supported_cuda_version,
)

A10 = "0000:3b:00.0 NVIDIA A10"
T4 = InstalledGpu(name="Tesla T4", compute_capability="7.5", driver="550.54.15", memory_gb=16.1)
NVRM = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 22:50:36 UTC 2025\nGCC version: 12.2.0\n"


@pytest.fixture
def nvml(monkeypatch):
    """Return a function that installs the fake NVML with given GPUs and answers."""

    def install(gpus, answers="", *options, driver=None):
        monkeypatch.setenv("FAKE_GPUS", gpus)
        monkeypatch.setenv("FAKE_NVML", answers)
        if driver is not None:
            monkeypatch.setenv("FAKE_DRIVER", driver)
        install_fake_nvml(monkeypatch, *options)

    return install


def test_the_gpus_of_cuda_have_name_address_and_compute_capability(nvml):
    nvml(f"{A10};0000:af:00.0 NVIDIA A10G", "major=8 minor=6")
    assert list_cuda_gpus() == (
        CudaGpu(index=0, name="NVIDIA A10", pci_bus_id="0000:3b:00.0", compute_capability="8.6"),
        CudaGpu(index=1, name="NVIDIA A10G", pci_bus_id="0000:af:00.0", compute_capability="8.6"),
    )
    assert supported_cuda_version() == "12.8"


def test_the_driver_version_is_that_of_its_kernel_module(tmp_path, monkeypatch):
    version = tmp_path / "version"
    version.write_text(NVRM)
    monkeypatch.setattr(gpu, "DRIVER_VERSION", version)
    assert driver_version() == "570.86.15"


def test_a_driver_that_does_not_show_its_version_leaves_it_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "DRIVER_VERSION", tmp_path / "absent")
    assert driver_version() == ""


def test_without_a_device_there_is_no_gpu(nvml):
    nvml("")
    assert list_cuda_gpus() == () and list_installed_gpus() == ()


@pytest.mark.parametrize("library", ["libnothing_of_this_name.so.1", "libc.so.6"])
def test_without_a_driver_there_is_no_gpu(monkeypatch, library):
    monkeypatch.setattr(gpu, "CUDA_DRIVER", library)
    assert list_cuda_gpus() == () and supported_cuda_version() == ""


@pytest.mark.parametrize(
    ("gpus", "answers", "options", "driver", "expected"),
    [
        (
            "0000:3b:00.0 Tesla T4;0000:af:00.0 Tesla T4",
            "major=7 minor=5 used=0 total=16106127360",
            (),
            "550.54.15",
            (T4, T4),
        ),
        (
            "0000:3b:00.0 Tesla T4",
            "",
            ("-DOLD_DRIVER",),
            "440.33",
            (InstalledGpu(name="Tesla T4", compute_capability="", driver="440.33", memory_gb=None),),
        ),
        (
            "0000:00:00.0 Orin (nvgpu)",
            "",
            (),
            "540.4.0",
            (InstalledGpu(name="Orin (nvgpu)", compute_capability="", driver="540.4.0", memory_gb=None),),
        ),
        ("", "", (), "550.54.15", ()),
    ],
    ids=["two T4", "old driver", "Jetson", "no device"],
)
def test_installed_gpus_are_those_of_nvml(nvml, gpus, answers, options, driver, expected):
    nvml(gpus, answers, *options, driver=driver)
    assert list_installed_gpus() == expected


@pytest.mark.parametrize("reason", ["nvml fails", "no pynvml"])
def test_without_nvml_the_installed_gpus_are_those_of_cuda(nvml, monkeypatch, tmp_path, reason):
    nvml(A10, "major=8 minor=6" + (" init=!9" if reason == "nvml fails" else ""))
    if reason == "no pynvml":
        monkeypatch.setattr(gpu, "pynvml", None)
    version = tmp_path / "version"
    version.write_text(NVRM)
    monkeypatch.setattr(gpu, "DRIVER_VERSION", version)
    expected = InstalledGpu(name="NVIDIA A10", compute_capability="8.6", driver="570.86.15", memory_gb=None)
    assert list_installed_gpus() == (expected,)


def test_without_the_python_library_of_nvml_the_fix_is_named(nvml, monkeypatch):
    nvml(A10)
    monkeypatch.setattr(gpu, "pynvml", None)
    reason = open_gpu(0)
    assert "NVIDIA A10" in reason and "pip install nvidia-ml-py" in reason
