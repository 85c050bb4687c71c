"""Device names of a benchmark: the device they resolve to, its settings and notes, and rejected names."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes.faked_cuda import install_fake_nvml
from tests.support.boards import BOARDS, laid_out, recorded, silent, write
from yolov7_deploy.benchmarking.devices import resolve_device
from yolov7_deploy.errors import DeviceError

V100 = "0000:3b:00.0 Tesla V100-SXM2-16GB"
T4 = "0000:af:00.0 NVIDIA T4"
EPYC = "processor\t: 0\nmodel name\t: AMD EPYC 7B13\n"


@pytest.fixture
def resolved(monkeypatch, tmp_path):
    """Resolves a name on a machine with these GPUs and answers of NVML."""
    install_fake_nvml(monkeypatch)

    def resolve(device, gpus="", answers="", *, root=None, run=silent, **options):
        monkeypatch.setenv("FAKE_GPUS", gpus)
        monkeypatch.setenv("FAKE_NVML", answers)
        monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
        tree = root or write(tmp_path, proc__cpuinfo=EPYC)
        return resolve_device(device, root=tree, run=run, **options)

    return resolve


def board(name, tmp_path):
    return {"root": laid_out(name, tmp_path / "board"), "run": recorded(name)}


# --- names ------------------------------------------------------------------------------------------------------------


def test_cpu_has_the_cores_that_the_process_may_use(resolved):
    profile = resolved("cpu", T4)
    assert (profile.device, profile.machine, profile.notes) == ("cpu", "AMD EPYC 7B13 (2 cores)", ())


@pytest.mark.parametrize(
    ("name", "device", "machine"),
    [("cuda", "cuda:0", "NVIDIA T4"), ("cuda:1", "cuda:1", "Tesla V100-SXM2-16GB"), ("0", "cuda:0", "NVIDIA T4")],
)
def test_gpus_are_numbered_as_by_cuda(resolved, name, device, machine):
    profile = resolved(name, f"{T4};{V100}")
    assert (profile.device, profile.machine) == (device, machine)


def test_auto_is_the_first_gpu_with_a_note(resolved):
    profile = resolved("auto", f"{T4};{V100}")
    assert (profile.device, profile.machine) == ("cuda:0", "NVIDIA T4")
    assert profile.notes == ("device=auto: cuda:0, NVIDIA T4.",)


def test_auto_is_the_cpu_without_a_gpu_with_a_note(resolved):
    profile = resolved("auto")
    assert (profile.device, profile.machine) == ("cpu", "AMD EPYC 7B13 (2 cores)")
    assert profile.notes == ("device=auto: CPU, because CUDA shows no GPU here.",)


def test_auto_is_the_cpu_where_the_runtime_cannot_use_the_gpu_with_a_note(resolved):
    profile = resolved("auto", T4, gpu_usable=False)
    assert profile.device == "cpu"
    assert profile.notes == ("device=auto: CPU, because the library that runs this model cannot use NVIDIA T4.",)


@pytest.mark.parametrize("name", ["tpu", "", "cuda:", "cuda:x", "cuda:-1", "cuda:" + "9" * 5000, "V100", "mps"])
def test_an_unknown_name_is_rejected_with_the_known_names(resolved, name):
    with pytest.raises(DeviceError, match="auto, cpu, cuda, cuda:N, v100 and jetson") as caught:
        resolved(name, T4)
    assert name in caught.value.message and caught.value.fix == "y7 bench --device auto"


def test_a_missing_gpu_is_rejected_with_those_that_exist(resolved):
    with pytest.raises(DeviceError, match=r"no GPU cuda:7 here \(cuda:0 is NVIDIA T4\)") as caught:
        resolved("cuda:7", T4)
    assert caught.value.fix == "--device cuda:0"


def test_every_gpu_is_rejected_where_there_is_none(resolved):
    with pytest.raises(DeviceError, match=r"no GPU cuda:0 here \(AMD EPYC 7B13 \(2 cores\), no GPU\)") as caught:
        resolved("cuda")
    assert "--device cpu" in caught.value.fix


def test_this_machine_has_a_device():
    assert resolve_device("cpu").machine
    assert resolve_device("auto").notes[0].startswith("device=auto: ")


# --- V100 -------------------------------------------------------------------------------------------------------------


def test_a_v100_is_found_at_any_index(resolved):
    text = "persistence=1 application.1=1530 application.2=877 highest.1=1530"
    profile = resolved("v100", f"{T4};{V100}", text)
    assert (profile.device, profile.machine) == ("cuda:1", "Tesla V100-SXM2-16GB")
    assert profile.settings == (("persistence mode", "on"), ("application clocks", "1530 MHz, memory 877 MHz"))
    assert len(profile.notes) == 1 and "FP16" in profile.notes[0]


def test_a_setting_that_slows_a_v100_down_is_a_note_with_the_command(resolved):
    profile = resolved("v100", V100, "persistence=0 application.1=1312 application.2=877 highest.1=1530")
    assert profile.settings[0] == ("persistence mode", "off")
    assert "sudo nvidia-smi -pm 1" in profile.notes[1]
    assert "1312 of 1530 MHz: sudo nvidia-smi -ac 877,1530" in profile.notes[2]


def test_a_v100_with_hidden_sensors_is_still_a_v100(resolved):
    profile = resolved("v100", V100, "init=!4")
    assert (profile.device, profile.settings) == ("cuda:0", ())
    assert "Insufficient Permissions" in profile.notes[1]
    assert resolved("v100", V100).settings == ()


def test_another_gpu_is_not_a_v100(resolved):
    with pytest.raises(DeviceError) as caught:
        resolved("v100", T4)
    assert caught.value.message == (
        "--device v100: this machine has no Tesla V100; found: AMD EPYC 7B13 (2 cores), NVIDIA T4."
    )
    assert caught.value.fix.startswith("y7 bench --estimate v100")


# --- Jetson -----------------------------------------------------------------------------------------------------------


def test_another_machine_is_not_a_jetson_and_an_estimate_is_offered(resolved):
    with pytest.raises(DeviceError) as caught:
        resolved("jetson", f"{T4};{V100}")
    assert caught.value.message == (
        "--device jetson: this machine is not a Jetson but AMD EPYC 7B13 (2 cores), NVIDIA T4, Tesla V100-SXM2-16GB."
    )
    offered, _, here = caught.value.fix.partition(", or measure this machine:  ")
    assert offered == "y7 bench --estimate orin-nx   (an estimate, from data sheets)"
    assert here == "y7 bench --device auto"


def test_a_board_in_its_best_mode_with_changing_clocks_has_one_note(resolved, tmp_path):
    profile = resolved("jetson", **board("orin_nx_5.1.3", tmp_path))
    assert (profile.device, profile.machine) == ("cuda:0", "NVIDIA Orin NX Developer Kit (JetPack 5.1.3)")
    assert profile.settings == (
        ("power mode", "MAXN"),
        ("memory", "shared by CPU and GPU"),
        ("GPU clock", "306 to 918 MHz"),
    )
    assert len(profile.notes) == 1 and "sudo jetson_clocks" in profile.notes[0]


def test_a_board_in_a_slow_mode_has_a_note_with_the_number_of_the_fastest(resolved, tmp_path):
    profile = resolved("jetson", **board("agx_orin_6.0", tmp_path))
    assert ("GPU clock", "1300 MHz, fixed") in profile.settings
    assert profile.notes == ("The board is in power mode MODE_30W; MAXN is faster: sudo nvpmodel -m 0",)


def test_a_board_with_little_information_has_a_note(resolved):
    profile = resolved("jetson", root=BOARDS / "container_6.2.1")
    assert profile.settings == (("power mode", "unknown"), ("memory", "shared by CPU and GPU"))
    assert len(profile.notes) == 1 and "nvpmodel -q" in profile.notes[0]


def test_the_title_of_a_board_has_its_release(resolved, tmp_path):
    profile = resolved("jetson", **board("nano_4.6.1", tmp_path))
    assert profile.machine == "NVIDIA Jetson Nano Developer Kit (JetPack 4.x)"


def test_auto_on_a_board_is_its_gpu_with_the_settings_of_the_board(resolved, tmp_path):
    profile = resolved("auto", "0000:00:00.0 Orin", **board("orin_nx_5.1.3", tmp_path))
    assert (profile.device, profile.machine) == ("cuda:0", "NVIDIA Orin NX Developer Kit (JetPack 5.1.3)")
    assert profile.notes[0] == "device=auto: cuda:0, Orin." and len(profile.notes) == 2


def test_auto_on_a_board_whose_gpu_cuda_does_not_show_is_the_cpu_with_the_reason(resolved, tmp_path):
    profile = resolved("auto", **board("orin_nx_5.1.3", tmp_path))
    assert profile.device == "cpu" and profile.machine.startswith("NVIDIA Orin NX Developer Kit (JetPack 5.1.3), ")
    assert "CUDA shows none of the GPUs here (the GPU of the board)" in profile.notes[0]


def test_reading_a_board_writes_nothing(resolved, tmp_path):
    files = board("orin_nx_5.1.3", tmp_path)
    before = contents(files["root"])
    resolved("jetson", **files)
    assert contents(files["root"]) == before


def contents(root: Path):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
