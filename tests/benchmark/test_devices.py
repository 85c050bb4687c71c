"""The device of a benchmark: what its name means here, what it promises, and what a reader is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes.faked_cuda import fake_nvml
from tests.support.boards import BOARDS, laid_out, recorded, silent, write
from yolov7_deploy.benchmark.devices import choose_place
from yolov7_deploy.errors import DeviceError

V100 = "0000:3b:00.0 Tesla V100-SXM2-16GB"
T4 = "0000:af:00.0 NVIDIA T4"
EPYC = "processor\t: 0\nmodel name\t: AMD EPYC 7B13\n"


@pytest.fixture
def chosen(monkeypatch, tmp_path):
    """The place that a name means on a machine with these GPUs, where NVML says this."""
    path = fake_nvml()

    def choose(device, gpus="", text="", *, root=None, run=silent, **options):
        monkeypatch.setenv("FAKE_GPUS", gpus)
        monkeypatch.setenv("FAKE_NVML", text)
        monkeypatch.setenv("PATH", "/nowhere")  # no nvidia-smi of this machine
        monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
        tree = root or write(tmp_path, proc__cpuinfo=EPYC)
        return choose_place(device, root=tree, run=run, library=path, driver=path, **options)

    return choose


def board(name, tmp_path):
    return {"root": laid_out(name, tmp_path / "board"), "run": recorded(name)}


# --- names ------------------------------------------------------------------------------------------------------------


def test_cpu_is_the_processor_with_the_cores_it_may_use(chosen):
    place = chosen("cpu", T4)
    assert (place.device, place.machine, place.notes) == ("cpu", "AMD EPYC 7B13 (2 cores)", ())


@pytest.mark.parametrize(
    ("name", "device", "machine"),
    [("cuda", "cuda:0", "NVIDIA T4"), ("cuda:1", "cuda:1", "Tesla V100-SXM2-16GB"), ("0", "cuda:0", "NVIDIA T4")],
)
def test_a_gpu_is_counted_as_cuda_counts(chosen, name, device, machine):
    place = chosen(name, f"{T4};{V100}")
    assert (place.device, place.machine) == (device, machine)


def test_auto_is_the_first_gpu_and_says_so(chosen):
    place = chosen("auto", f"{T4};{V100}")
    assert (place.device, place.machine) == ("cuda:0", "NVIDIA T4")
    assert place.notes == ("auto took cuda:0: NVIDIA T4.",)


def test_auto_is_the_processor_where_there_is_no_gpu_and_says_so(chosen):
    place = chosen("auto")
    assert (place.device, place.machine) == ("cpu", "AMD EPYC 7B13 (2 cores)")
    assert place.notes == ("auto took the processor: CUDA shows no GPU here.",)


def test_auto_is_the_processor_where_the_runtime_cannot_use_the_gpu_and_says_so(chosen):
    place = chosen("auto", T4, gpu_usable=False)
    assert place.device == "cpu"
    assert place.notes == ("auto took the processor: the library that runs this model cannot use NVIDIA T4.",)


@pytest.mark.parametrize("name", ["tpu", "", "cuda:", "cuda:x", "cuda:-1", "cuda:" + "9" * 5000, "V100", "mps"])
def test_a_name_of_nothing_is_refused_with_the_names_there_are(chosen, name):
    with pytest.raises(DeviceError, match="auto, cpu, cuda, cuda:N, v100 and jetson") as caught:
        chosen(name, T4)
    assert name in caught.value.message and caught.value.fix == "y7 bench --device auto"


def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(chosen):
    with pytest.raises(DeviceError, match=r"no GPU cuda:7 here \(cuda:0 is NVIDIA T4\)") as caught:
        chosen("cuda:7", T4)
    assert caught.value.fix == "--device cuda:0"


def test_any_gpu_is_refused_where_there_is_none(chosen):
    with pytest.raises(DeviceError, match=r"no GPU cuda:0 here \(AMD EPYC 7B13 \(2 cores\), no GPU\)") as caught:
        chosen("cuda")
    assert "--device cpu" in caught.value.fix


def test_this_machine_is_some_place():
    assert choose_place("cpu").machine
    assert choose_place("auto").notes[0].startswith("auto took ")


# --- V100 -------------------------------------------------------------------------------------------------------------


def test_a_v100_is_found_wherever_cuda_has_it(chosen):
    text = "persistence=1 application.1=1530 application.2=877 highest.1=1530"
    place = chosen("v100", f"{T4};{V100}", text)
    assert (place.device, place.machine) == ("cuda:1", "Tesla V100-SXM2-16GB")
    assert place.settings == (("persistence mode", "on"), ("application clocks", "1530 MHz, memory 877 MHz"))
    assert len(place.notes) == 1 and "FP16" in place.notes[0]


def test_what_slows_a_v100_down_is_a_note_with_what_to_type(chosen):
    place = chosen("v100", V100, "persistence=0 application.1=1312 application.2=877 highest.1=1530")
    assert place.settings[0] == ("persistence mode", "off")
    assert "sudo nvidia-smi -pm 1" in place.notes[1]
    assert "1312 of 1530 MHz: sudo nvidia-smi -ac 877,1530" in place.notes[2]


def test_a_v100_whose_sensors_are_hidden_is_a_v100_all_the_same(chosen):
    place = chosen("v100", V100, "init=!4")
    assert (place.device, place.settings) == ("cuda:0", ())
    assert "Insufficient Permissions" in place.notes[1]
    assert chosen("v100", V100).settings == ()


def test_another_gpu_is_no_v100(chosen):
    with pytest.raises(DeviceError) as caught:
        chosen("v100", T4)
    assert caught.value.message == (
        "--device v100: this machine has no Tesla V100 but AMD EPYC 7B13 (2 cores), NVIDIA T4."
    )
    assert caught.value.fix.startswith("y7 bench --estimate v100")


# --- Jetson -----------------------------------------------------------------------------------------------------------


def test_another_machine_is_no_jetson_and_the_estimate_is_offered(chosen):
    with pytest.raises(DeviceError) as caught:
        chosen("jetson", f"{T4};{V100}")
    assert caught.value.message == (
        "--device jetson: this machine is no Jetson but AMD EPYC 7B13 (2 cores), NVIDIA T4, Tesla V100-SXM2-16GB."
    )
    offered, _, here = caught.value.fix.partition(", or measure this machine:  ")
    assert offered == "y7 bench --estimate orin-nx   (an estimate, from data sheets)"
    assert here == "y7 bench --device auto"


def test_a_board_in_its_best_mode_with_clocks_that_move_has_one_note(chosen, tmp_path):
    place = chosen("jetson", **board("orin_nx_5.1.3", tmp_path))
    assert (place.device, place.machine) == ("cuda:0", "NVIDIA Orin NX Developer Kit (JetPack 5.1.3)")
    assert place.settings == (
        ("power mode", "MAXN"),
        ("memory", "one for processor and GPU"),
        ("GPU clock", "306 to 918 MHz"),
    )
    assert len(place.notes) == 1 and "sudo jetson_clocks" in place.notes[0]


def test_a_board_in_a_slow_mode_has_a_note_with_the_number_of_the_fastest(chosen, tmp_path):
    place = chosen("jetson", **board("agx_orin_6.0", tmp_path))
    assert ("GPU clock", "1300 MHz, held") in place.settings
    assert place.notes == ("The board is in power mode MODE_30W; MAXN is faster: sudo nvpmodel -m 0",)


def test_a_board_that_tells_little_is_a_place_with_a_note(chosen):
    place = chosen("jetson", root=BOARDS / "container_6.2.1")
    assert place.settings == (("power mode", "unknown"), ("memory", "one for processor and GPU"))
    assert len(place.notes) == 1 and "nvpmodel -q" in place.notes[0]


def test_a_board_of_an_old_release_is_named_by_it(chosen, tmp_path):
    place = chosen("jetson", **board("nano_4.6.1", tmp_path))
    assert place.machine == "NVIDIA Jetson Nano Developer Kit (JetPack 4.x)"


def test_auto_on_a_board_is_its_gpu_with_the_boards_conventions(chosen, tmp_path):
    place = chosen("auto", "0000:00:00.0 Orin", **board("orin_nx_5.1.3", tmp_path))
    assert (place.device, place.machine) == ("cuda:0", "NVIDIA Orin NX Developer Kit (JetPack 5.1.3)")
    assert place.notes[0] == "auto took cuda:0: Orin." and len(place.notes) == 2


def test_auto_on_a_board_whose_gpu_cuda_does_not_show_is_the_processor_and_says_why(chosen, tmp_path):
    place = chosen("auto", **board("orin_nx_5.1.3", tmp_path))
    assert place.device == "cpu" and place.machine.startswith("NVIDIA Orin NX Developer Kit (JetPack 5.1.3), ")
    assert "CUDA shows none of the GPUs here (that of the board)" in place.notes[0]


def test_nothing_is_written_where_a_board_is_read(chosen, tmp_path):
    around = board("orin_nx_5.1.3", tmp_path)
    before = contents(around["root"])
    chosen("jetson", **around)
    assert contents(around["root"]) == before


def contents(root: Path):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
