"""Checks before a build: the GPU, the targets, memory and disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.fakes.faked_cuda import install_fake_nvml
from tests.support.boards import BOARDS, about, findings, silent, write
from yolov7_deploy.hardware.gpu import free_gpu_memory
from yolov7_deploy.hardware.jetson import version_numbers
from yolov7_deploy.hardware.system import free_host_memory
from yolov7_deploy.tensorrt.preflight import (
    GIB,
    GPUS,
    MIB,
    RTX_CAPABILITIES,
    Finding,
    PlannedBuild,
    format_gib,
    free_disk,
    predict_memory,
    preflight,
)

YOLOV7_BYTES = 148_200_459
PIXELS = 640 * 640
# Maximum resident set size of builds with TensorRT-RTX 1.7.1 (GNU time): model bytes, peak bytes.
RTX_PEAKS = [(25_007_000, 317 * MIB), (148_181_408, 790 * MIB), (148_195_330, 809 * MIB)]
RTX_PEAK_TOLERANCE = 0.05


@pytest.fixture
def unknown(tmp_path, monkeypatch):
    """Options of `preflight` for a machine with unknown properties."""
    monkeypatch.setattr("yolov7_deploy.tensorrt.preflight.free_gpu_memory", lambda: None)
    return {"root": tmp_path, "run": silent, "wheels": ()}


# --- GPU and TensorRT -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["10.5.0", "10.16.1.11", "11.4.1"])
def test_a_v100_is_an_error_that_names_the_last_supporting_tensorrt(unknown, version):
    build = PlannedBuild(product="tensorrt", tensorrt=version, gpu="Tesla V100-SXM2-16GB", compute_capability="7.0")
    (finding,) = preflight(build, **unknown)
    assert (finding.level, finding.field, finding.fix) == (
        "error",
        "compute_capability",
        "pip install tensorrt==10.4.0",
    )
    assert version in finding.text and "Tesla V100-SXM2-16GB" in finding.text and "10.4 was the last" in finding.text


@pytest.mark.parametrize("version", ["8.6.1", "10.4.0", "10.4.0.26", ""])
def test_a_v100_with_a_supporting_tensorrt_is_a_note_not_to_upgrade(unknown, version):
    (finding,) = preflight(PlannedBuild(product="tensorrt", tensorrt=version, compute_capability="7.0"), **unknown)
    assert finding.level == "note" and "do not upgrade" in finding.text


def test_a_xavier_needs_the_tensorrt_of_jetpack_5():
    found = findings("xavier_nx_5.1.2", PlannedBuild(product="tensorrt", tensorrt="10.3.0"))
    (finding,) = about("compute_capability", found)
    assert finding.level == "error" and "8.5 was the last" in finding.text and "JetPack 5" in finding.fix
    supported = findings("xavier_nx_5.1.2", PlannedBuild(product="tensorrt", tensorrt="8.5.2.2"))
    assert [finding.level for finding in about("compute_capability", supported)] == ["note"]


@pytest.mark.parametrize(
    ("capability", "version", "level"),
    [
        ("7.5", "8.6.1", None), ("7.5", "11.4.0", None), ("8.6", "8.5.1", None), ("9.0", "10.13.0", None),
        ("12.0", "10.7.0", "error"), ("12.0", "10.8.0", None), ("11.0", "10.12.0", "error"), ("11.0", "10.13.3", None),
        ("10.0", "8.6.1", "error"), ("6.1", "10.3.0", "note"),
    ],
)  # fmt: skip
def test_each_gpu_has_a_first_supporting_tensorrt(unknown, capability, version, level):
    found = preflight(PlannedBuild(product="tensorrt", tensorrt=version, compute_capability=capability), **unknown)
    assert [finding.level for finding in found] == ([level] if level else [])


def test_only_volta_has_a_last_supporting_tensorrt():
    assert {capability for capability, (_, _, last) in GPUS.items() if last is not None} == {"7.0", "7.2"}


@pytest.mark.parametrize("target", ["9.0", "7.0", "8.7"])
def test_an_unsupported_target_is_an_error_with_the_supported_targets(unknown, target):
    build = PlannedBuild(product="tensorrt_rtx", tensorrt="1.7.1", targets=("8.6", target))
    (finding,) = preflight(build, **unknown)
    assert (finding.level, finding.field) == ("error", "targets")
    assert f"not for {target}" in finding.text and "7.5, 8.0, 8.6, 8.9, 12.0, 12.1" in finding.text
    assert "--target sm75,sm80,sm86,sm89,sm120,sm121" in finding.fix


def test_a_newer_tensorrt_rtx_may_support_more_targets(unknown):
    build = PlannedBuild(
        product="tensorrt_rtx", tensorrt="2.0", targets=("9.0",), known_targets=(*RTX_CAPABILITIES, "9.0")
    )
    assert preflight(build, **unknown) == []


def test_an_unsupported_gpu_is_a_warning_that_the_engine_runs_elsewhere(unknown):
    build = PlannedBuild(product="tensorrt_rtx", tensorrt="1.7.1", gpu="NVIDIA H200", compute_capability="9.0")
    (finding,) = preflight(build, **unknown)
    assert finding.level == "warning" and "NVIDIA H200" in finding.text and "pip install tensorrt" in finding.fix
    volta = replace(build, gpu="V100", compute_capability="7.0")
    assert "pip install tensorrt==10.4.0" in preflight(volta, **unknown)[0].fix


def test_targets_without_the_gpu_of_this_machine_are_a_warning(unknown):
    build = PlannedBuild(product="tensorrt_rtx", tensorrt="1.7.1", targets=("8.6",), compute_capability="8.9")
    (finding,) = preflight(build, **unknown)
    assert finding.level == "warning" and finding.fix.endswith("--target sm86,sm89")
    assert preflight(replace(build, targets=("8.6", "8.9")), **unknown) == []
    assert preflight(replace(build, compute_capability=""), **unknown) == []


def test_tensorrt_rtx_on_a_jetson_is_an_error():
    found = findings("agx_orin_6.0", PlannedBuild(product="tensorrt_rtx", tensorrt="1.7.1"))
    assert found[0].level == "error" and "does not run on a Jetson" in found[0].text


def test_a_dla_core_on_a_gpu_without_dla_is_an_error(unknown):
    build = PlannedBuild(product="tensorrt", tensorrt="10.3.0", compute_capability="8.6", dla_core=0)
    assert [finding.field for finding in preflight(build, **unknown)] == ["dla"]


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "peak"), RTX_PEAKS)
def test_the_estimate_matches_the_measured_peaks_of_tensorrt_rtx(model, peak):
    need = predict_memory(product="tensorrt_rtx", tensorrt="1.7.1", model_bytes=model, input_pixels=PIXELS)
    assert need.host_bytes == pytest.approx(peak, rel=RTX_PEAK_TOLERANCE)
    assert (need.device_bytes, need.workspace_bytes) == (0, 0)


def test_the_estimate_increases_with_each_of_its_terms():
    small = {
        "product": "tensorrt",
        "tensorrt": "8.6.1",
        "model_bytes": 10 * MIB,
        "input_pixels": 100,
        "workspace_bytes": MIB,
    }
    base = predict_memory(**small)
    larger = predict_memory(**{**small, "model_bytes": 11 * MIB})
    assert larger.host_bytes > base.host_bytes and larger.device_bytes > base.device_bytes
    assert predict_memory(**{**small, "input_pixels": 200}).device_bytes > base.device_bytes
    assert predict_memory(**{**small, "tensorrt": "10.3.0"}).host_bytes > base.host_bytes
    assert predict_memory(**small, on_jetson=True).host_bytes < base.host_bytes
    assert predict_memory(**{**small, "workspace_bytes": GIB}).workspace_bytes == GIB


def jetson_build(**changes):
    return replace(
        PlannedBuild(product="tensorrt", tensorrt="10.3.0", model_bytes=YOLOV7_BYTES, input_pixels=PIXELS), **changes
    )


def test_a_build_that_fits_into_the_memory_of_a_board_is_not_a_finding():
    assert about("memory", findings("agx_orin_6.0", jetson_build(tensorrt="8.6.2"))) == []


def test_on_a_board_cpu_and_gpu_share_the_memory():
    # 3.15 GiB are free: enough for main or GPU memory alone, but not for both with a workspace of 2 GiB.
    (finding,) = about("memory", findings("orin_nano_super_6.2", jetson_build(workspace_bytes=2 * GIB)))
    assert finding.level == "warning"
    assert "3.1 GiB are free (MemAvailable)" in finding.text and "estimate" in finding.text
    assert "workspace 2.0 GiB" in finding.text and finding.fix.startswith("Limit the workspace:  --workspace ")
    gib = float(finding.fix.split("--workspace ")[1].split()[0])
    assert about("memory", findings("orin_nano_super_6.2", jetson_build(workspace_bytes=int(gib * GIB * 0.95)))) == []


def test_a_build_that_does_not_fit_is_an_error_with_the_needed_and_the_free_memory():
    (finding,) = about("memory", findings("orin_nano_super_6.2", jetson_build(input_pixels=64 * 1280 * 1280)))
    need = predict_memory(
        product="tensorrt", tensorrt="10.3.0", model_bytes=YOLOV7_BYTES, input_pixels=64 * 1280 * 1280, on_jetson=True
    )
    assert finding.level == "error"
    assert format_gib(need.host_bytes + need.device_bytes + need.workspace_bytes) in finding.text
    assert "3.1 GiB are free" in finding.text and "--batch" in finding.fix


def test_a_container_limit_below_the_free_memory_is_used(tmp_path):
    write(tmp_path, proc__meminfo="MemTotal: 64000000 kB\nMemAvailable:   60000000 kB\n")
    assert free_host_memory(root=tmp_path).source == "MemAvailable"
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text(f"{4 * GIB}\n")
    (group / "memory.current").write_text(f"{3 * GIB}\n")
    (group / "memory.stat").write_text(f"anon 12\ninactive_file {GIB // 2}\nactive_file 7\n")
    free = free_host_memory(root=tmp_path)
    assert (free.size, free.source) == (GIB + GIB // 2, "the container's memory limit")


def test_the_limit_of_a_parent_control_group_is_used(tmp_path):
    write(tmp_path, proc__meminfo="MemAvailable: 60000000 kB\n", proc__self__cgroup="0::/user.slice/job.scope\n")
    outer, inner = tmp_path / "sys/fs/cgroup/user.slice", tmp_path / "sys/fs/cgroup/user.slice/job.scope"
    inner.mkdir(parents=True)
    for folder, limit in ((outer, str(2 * GIB)), (inner, "max")):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text(str(GIB))
    assert free_host_memory(root=tmp_path).size == GIB


def test_the_limit_of_a_v1_control_group_is_used_unless_it_is_unlimited(tmp_path):
    folder = tmp_path / "sys/fs/cgroup/memory"
    folder.mkdir(parents=True)
    (folder / "memory.usage_in_bytes").write_text("1048576")
    (folder / "memory.limit_in_bytes").write_text("9223372036854771712")
    assert free_host_memory(root=tmp_path) is None
    (folder / "memory.limit_in_bytes").write_text(str(GIB))
    assert free_host_memory(root=tmp_path).size == GIB - MIB


def test_unknown_memory_is_not_a_finding(unknown):
    assert preflight(jetson_build(compute_capability="8.6"), **unknown) == []


def test_gpu_memory_is_read_through_nvml(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_GPUS", "0000:3b:00.0 NVIDIA A10")
    install_fake_nvml(monkeypatch)
    monkeypatch.setenv("FAKE_NVML", "used=!3")
    assert free_gpu_memory() is None
    monkeypatch.setenv("FAKE_NVML", f"total={1000 * MIB} used={300 * MIB}")
    assert free_gpu_memory().size == 700 * MIB
    found = preflight(jetson_build(compute_capability="8.6"), root=tmp_path, wheels=())
    (finding,) = found
    assert (finding.level, finding.field) == ("error", "memory")
    assert "GPU memory" in finding.text and "700 MiB are free (NVML)" in finding.text


@pytest.mark.parametrize(
    ("fastest", "order", "visible", "used_of"),
    [
        ("0", None, None, 0),
        ("1", None, None, 1),
        ("1", "PCI_BUS_ID", None, 0),
        ("0", None, "1", 1),
        ("0", None, "1,0", 1),
        ("1", None, "1", 0),
        ("1", "PCI_BUS_ID", "1", 1),
    ],
)
def test_the_free_memory_is_that_of_the_gpu_that_builds(monkeypatch, fastest, order, visible, used_of):
    """It builds on `cuda:0`, which CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER determine, and NVML ignores both."""
    monkeypatch.setenv("FAKE_GPUS", "0000:3b:00.0 NVIDIA A10;0000:af:00.0 NVIDIA A10")
    monkeypatch.setenv("FAKE_FASTEST", fastest)
    for name, value in (("CUDA_DEVICE_ORDER", order), ("CUDA_VISIBLE_DEVICES", visible)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    install_fake_nvml(monkeypatch)
    used = (100 * MIB, 20_000 * MIB)
    monkeypatch.setenv("FAKE_NVML", f"total={24_000 * MIB} used={used[0]} used.1={used[1]}")
    assert free_gpu_memory().size == 24_000 * MIB - used[used_of]


def test_tensorrt_rtx_needs_no_gpu_memory_to_build(tmp_path):
    build = jetson_build(product="tensorrt_rtx", tensorrt="1.7.1", compute_capability="8.6")
    assert preflight(build, root=tmp_path, run=lambda _: "1\n", wheels=()) == []


# --- disk and order ---------------------------------------------------------------------------------------------------


def test_a_full_disk_is_an_error_before_the_build_and_one_of_the_timing_cache_a_warning(unknown, tmp_path):
    build = jetson_build(compute_capability="8.6", folder=tmp_path, cache_folder=tmp_path / "cache")
    full = preflight(build, **unknown, disk=lambda folder: MIB if folder == tmp_path else GIB)
    assert [(finding.level, finding.field) for finding in full] == [("error", "disk")]
    assert "the engine takes about" in full[0].text and "--output" in full[0].fix
    cache = preflight(build, **unknown, disk=lambda folder: GIB if folder == tmp_path else MIB)
    assert [(finding.level, finding.field) for finding in cache] == [("warning", "disk")]
    assert "--no-timing-cache" in cache[0].fix
    rtx = replace(build, product="tensorrt_rtx")
    assert preflight(rtx, **unknown, disk=lambda folder: GIB if folder == tmp_path else MIB) == []
    assert preflight(build, **unknown, disk=lambda _: GIB) == []


def test_the_free_disk_of_a_missing_folder_is_that_of_its_parent(tmp_path):
    assert free_disk(tmp_path / "not" / "yet") == pytest.approx(free_disk(tmp_path), rel=0.01)


def test_findings_are_sorted_by_level():
    build = jetson_build(tensorrt="11.4.1", dla_core=0, workspace_bytes=2 * GIB)
    levels = [finding.level for finding in findings("orin_nano_super_6.2", build)]
    assert levels == sorted(levels, key=["error", "warning", "note"].index) and {"error", "warning"} <= set(levels)


@pytest.mark.parametrize("name", sorted(path.name for path in BOARDS.iterdir()))
def test_every_finding_has_a_text_and_every_error_a_fix(name):
    for version in ("", "8.5.2", "10.3.0", "10.16.2", "11.4.1", "nonsense"):
        for product in ("tensorrt", "tensorrt_rtx"):
            build = jetson_build(product=product, tensorrt=version, dla_core=0, workspace_bytes=200 * GIB)
            for finding in findings(name, build, wheels=("tensorrt-cu12-libs 10.13.0",)):
                assert finding.text.endswith((".", ")"))
                assert finding.fix or finding.level != "error"


def test_this_machine_can_be_checked():
    build = PlannedBuild(product="tensorrt", tensorrt="10.3.0", model_bytes=MIB, input_pixels=PIXELS, folder=Path())
    assert all(isinstance(finding, Finding) for finding in preflight(build))


def test_versions_are_parsed_up_to_the_first_non_number():
    assert version_numbers("10.16.1.11") == (10, 16, 1, 11)
    assert version_numbers("1.7rc") == (1,)
    assert version_numbers("") == ()
