"""`y7 doctor`: what it finds, what it concludes, and that it answers whatever is missing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from yolov7_deploy.cli.doctor import describe, doctor
from yolov7_deploy.doctor import diagnose
from yolov7_deploy.doctor.doctor import find_abilities, find_weight_files
from yolov7_deploy.doctor.known_issues import find_traps
from yolov7_deploy.doctor.packages import ROWS, Library, Row, _library, read_libraries
from yolov7_deploy.hardware.machine import Gpu, Jetson, Machine, read_gpus, read_jetson, read_machine

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "onnx", "onnxruntime", "tensorrt", "cv2")
T4 = Gpu(name="Tesla T4", compute_capability="7.5", driver="550.54.15", memory_gb=16.1)
V100 = replace(T4, name="Tesla V100", compute_capability="7.0")
ORIN = Jetson(model="NVIDIA Jetson AGX Orin", l4t="36.4.3", jetpack="6.2", compute_capability="8.7")
PLAIN = Machine(
    system="Linux", architecture="x86_64", cpu="a CPU", cores=4, usable_cores=2, memory_gb=8.0, gpus=(), jetson=None
)
WITH_T4 = replace(PLAIN, gpus=(T4,))


def library(name: str, *distributions: str, fault: str = "", details: tuple[str, ...] = ()) -> Library:
    """A library with these distributions, or absent without any."""
    row = next(row for row in ROWS if row.module == name)
    return Library(
        name=name,
        version=distributions[0].partition(" ")[2] if distributions else "",
        distributions=distributions,
        installed=bool(distributions),
        fault=fault,
        details=details,
        extra=row.extra,
    )


def everything(**changes: Library) -> dict[str, Library]:
    """All libraries installed for a CPU, but for those given."""
    known = {row.module: library(row.module, f"{row.distributions[0]} 1.0") for row in ROWS}
    known["torch"] = library("torch", "torch 2.6.0+cpu", details=("cpu",))
    known["onnxruntime"] = library("onnxruntime", "onnxruntime 1.20", details=("CPUExecutionProvider",))
    return {**known, **changes}


def ability(what: str, libraries: dict[str, Library], machine: Machine = PLAIN):
    found = [entry for entry in find_abilities(libraries, machine) if entry.what.startswith(what)]
    assert len(found) == 1
    return found[0]


def executable(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


# --- libraries --------------------------------------------------------------------------------------------------------


def test_versions_are_those_of_the_installed_distributions():
    found = read_libraries()
    assert list(found) == [row.module for row in ROWS]
    assert found["numpy"].version == importlib.metadata.version("numpy")
    assert found["onnxruntime"].works and "CPUExecutionProvider" in found["onnxruntime"].details


def test_heavy_libraries_are_not_imported_by_looking():
    code = (
        "import sys; from yolov7_deploy.doctor import diagnose; diagnose(); "
        f"print(sorted({{*{HEAVY!r}, 'tensorrt_rtx', 'numpy'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"


def test_torch_tells_its_cuda_without_an_import(tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    row = next(row for row in ROWS if row.module == "torch")
    for line, told in (
        ("cuda: Optional[str] = '12.6'", ("CUDA 12.6",)),
        ("cuda = '11.8'", ("CUDA 11.8",)),
        ("cuda: Optional[str] = None", ("cpu",)),
        ("something else", ()),
    ):
        (tmp_path / "torch/version.py").write_text(f"debug = False\n{line}\nhip = None\n")
        assert _library(row).details == told


def test_a_library_that_crashes_is_reported_and_takes_nothing_with_it(tmp_path, monkeypatch):
    bodies = {
        "y7_raises": "raise ImportError('libGL.so.1: cannot open shared object file')",
        "y7_dies": "import os; os._exit(7)",
    }
    for name, body in bodies.items():
        (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    raises, dies = (_library(Row(module=name, distributions=(), probe="''")) for name in bodies)
    assert raises.installed and not raises.works
    assert "libGL.so.1" in raises.fault
    assert dies.fault == "its import ended Python with 7"


def test_a_distribution_without_its_module_is_a_fault():
    found = _library(Row(module="y7_no_such_module", distributions=("numpy",)))
    assert not found.installed and "there is no module y7_no_such_module" in found.fault


def test_a_folder_of_the_same_name_is_no_library(tmp_path, monkeypatch):
    (tmp_path / "y7_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not _library(Row(module="y7_folder", distributions=())).installed


# --- machine ----------------------------------------------------------------------------------------------------------


def test_this_machine_has_cores_memory_and_a_name():
    machine = read_machine()
    assert 1 <= machine.usable_cores <= machine.cores
    assert machine.system and machine.cpu and machine.architecture
    if Path("/proc/meminfo").exists():
        assert machine.memory_gb > 0


def test_a_machine_that_tells_nothing_is_described_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    machine = read_machine(tmp_path)
    assert (machine.memory_gb, machine.gpus, machine.jetson) == (None, (), None)
    assert not machine.has_gpu


@pytest.mark.parametrize(
    "model,release,expected",
    [
        ("NVIDIA Jetson AGX Orin Developer Kit\0", "R36 (release), REVISION: 4.3", ("36.4.3", "6.2", "8.7")),
        ("NVIDIA Jetson Orin Nano Developer Kit\0", "R36 (release), REVISION: 4.0", ("36.4.0", "6.1", "8.7")),
        ("NVIDIA Jetson Xavier NX Developer Kit\0", "R35 (release), REVISION: 4.1", ("35.4.1", "5.1.2", "7.2")),
        ("NVIDIA Jetson AGX Thor Developer Kit\0", "R38 (release), REVISION: 2.0", ("38.2.0", "7.0", "11.0")),
        ("NVIDIA Jetson Nano Developer Kit\0", "R32 (release), REVISION: 7.1", ("32.7.1", "4.x", "5.3")),
        ("", "R36 (release), REVISION: 9.9", ("36.9.9", "6.x", "")),
        ("NVIDIA Jetson AGX Orin\0", "", ("", "", "8.7")),
    ],
)
def test_jetsons_tell_their_jetpack(tmp_path, model, release, expected):
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "etc").mkdir()
    if model:
        (tmp_path / "proc/device-tree/model").write_text(model)
    if release:
        (tmp_path / "etc/nv_tegra_release").write_text(f"# {release}, GCID: 1, BOARD: generic, EABI: aarch64\n")
    board = read_jetson(tmp_path)
    assert (board.l4t, board.jetpack, board.compute_capability) == expected
    assert "\0" not in board.model


def test_other_boards_are_no_jetsons(tmp_path):
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/model").write_text("Raspberry Pi 5 Model B Rev 1.0\0")
    assert read_jetson(tmp_path) is None


@pytest.mark.parametrize(
    "script,expected",
    [
        (
            "echo 'Tesla T4, 550.54.15, 15360, 7.5'; echo 'Tesla T4, 550.54.15, 15360, 7.5'",
            (T4, T4),
        ),
        (
            'case "$1" in *compute_cap*) exit 2;; esac; echo "Tesla T4, 440.33"',
            (Gpu(name="Tesla T4", compute_capability="", driver="440.33", memory_gb=None),),
        ),
        (
            "echo 'Orin (nvgpu), 540.4.0, [N/A], [N/A]'",
            (Gpu(name="Orin (nvgpu)", compute_capability="", driver="540.4.0", memory_gb=None),),
        ),
        ("echo 'NVIDIA-SMI has failed'; exit 9", ()),
        ("echo 'No devices were found'", ()),
    ],
    ids=["two T4", "old driver", "Jetson", "no driver", "no device"],
)
def test_gpus_are_those_nvidia_smi_lists(tmp_path, monkeypatch, script, expected):
    executable(tmp_path, "nvidia-smi", script)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert read_gpus() == expected


# --- what can run -----------------------------------------------------------------------------------------------------


def test_with_every_library_a_cpu_machine_does_all_but_gpu_work():
    entries = find_abilities(everything(), PLAIN)
    assert {entry.what for entry in entries if not entry.possible} == {
        "run .pt and .safetensors on the GPU",
        "run .onnx on the GPU",
        "build TensorRT engines",
        "run TensorRT engines",
    } - {entry.what for entry in entries if entry.possible}
    assert ability("export", everything()).possible
    assert "no NVIDIA GPU" in ability("run .onnx on the GPU", everything()).reason


@pytest.mark.parametrize(
    "missing,what,fix",
    [
        ("torch", "read and convert checkpoints", "pip install 'yolov7-deploy[export]'"),
        ("onnxsim", "export to ONNX", "pip install 'yolov7-deploy[export]'"),
        ("onnxruntime", "run .onnx on the CPU", "pip install 'yolov7-deploy[cpu]'"),
        ("faster_coco_eval", "measure accuracy", "pip install 'yolov7-deploy[val]'"),
        ("cv2", "run .onnx on the CPU", "pip install yolov7-deploy"),
    ],
)
def test_what_is_missing_is_named_with_the_line_that_brings_it(missing, what, fix):
    found = ability(what, everything(**{missing: library(missing)}))
    assert not found.possible
    assert (found.reason, found.fix) == (f"{missing} is not installed", fix)


def test_a_library_that_does_not_load_is_to_be_installed_anew():
    broken = library("onnxruntime", "onnxruntime 1.20", fault="ImportError: bad ELF")
    found = ability("run .onnx on the CPU", everything(onnxruntime=broken))
    assert "does not load: ImportError: bad ELF" in found.reason
    assert found.fix == "pip install --force-reinstall onnxruntime"


def test_on_a_gpu_the_builds_for_a_cpu_are_told():
    assert "without CUDA" in ability("run .pt and .safetensors on the GPU", everything(), WITH_T4).reason
    found = ability("run .onnx on the GPU", everything(), WITH_T4)
    assert "has only CPUExecutionProvider" in found.reason and "yolov7-deploy[gpu]" in found.fix


def test_with_the_builds_for_a_gpu_the_gpu_runs():
    ready = everything(
        torch=library("torch", "torch 2.6.0", details=("CUDA 12.6",)),
        onnxruntime=library("onnxruntime", "onnxruntime-gpu 1.20", details=("CUDAExecutionProvider",)),
    )
    assert ability("run .pt and .safetensors on the GPU", ready, WITH_T4).possible
    assert ability("run .onnx on the GPU", ready, WITH_T4).possible


def test_a_jetson_is_sent_to_wheels_that_exist_for_it():
    fix = ability("run .onnx on the GPU", everything(), replace(PLAIN, jetson=ORIN)).fix
    assert "onnxruntime-gpu --index-url https://pypi.jetson-ai-lab.io/jp6" in fix


# --- traps ------------------------------------------------------------------------------------------------------------


def trap(libraries: dict[str, Library], machine: Machine = PLAIN, *, about: str):
    return [entry for entry in find_traps(libraries, machine) if about in entry.what]


def test_two_opencvs_are_a_trap():
    both = library("cv2", "opencv-python-headless 4.10", "opencv-python 4.9")
    (found,) = trap(everything(cv2=both), about="share the folder cv2")
    assert found.fix == ("pip uninstall -y opencv-python-headless opencv-python; pip install opencv-python-headless")
    assert not trap(everything(), about="share the folder")


def test_onnxruntime_that_hides_its_gpu_build_is_a_trap():
    both = library("onnxruntime", "onnxruntime 1.20", "onnxruntime-gpu 1.20", details=("CPUExecutionProvider",))
    (found,) = trap(everything(onnxruntime=both), about="share the folder onnxruntime")
    assert found.fix == "pip uninstall -y onnxruntime onnxruntime-gpu; pip install onnxruntime-gpu"


@pytest.mark.parametrize("version,gpu,trapped", [("10.16.1", V100, 1), ("10.4.0", V100, 0), ("10.16.1", T4, 0)])
def test_a_tensorrt_that_dropped_the_gpu_is_a_trap(version, gpu, trapped):
    libraries = everything(tensorrt=library("tensorrt", f"tensorrt {version}"))
    assert len(trap(libraries, replace(PLAIN, gpus=(gpu,)), about="was the last that did")) == trapped


def rtx_wheel(tmp_path: Path, monkeypatch) -> Path:
    folder = tmp_path / "tensorrt_rtx_libs"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "libtensorrt_rtx.so.1").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt_rtx_libs", raising=False)
    return folder / "libtensorrt_rtx.so.1"


def test_the_rtx_wheel_without_its_link_is_a_trap(tmp_path, monkeypatch):
    real = rtx_wheel(tmp_path, monkeypatch)
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    (found,) = trap(everything(), about="TensorRT-RTX")
    assert f"ln -sf {real} " in found.fix and "LD_LIBRARY_PATH" in found.fix


def test_the_rtx_wheel_with_its_link_is_fine(tmp_path, monkeypatch):
    real = rtx_wheel(tmp_path, monkeypatch)
    links = tmp_path / "links"
    links.mkdir()
    (links / "libtensorrt_rtx.so").symlink_to(real)
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/nowhere{os.pathsep}{links}")
    assert not trap(everything(), about="TensorRT-RTX")


def test_opencv_without_display_libraries_is_replaced_by_the_one_that_needs_none():
    broken = library("cv2", "opencv-python 4.10", fault="ImportError: libGL.so.1: cannot open shared object file")
    (found,) = trap(everything(cv2=broken), about="cv2 does not load")
    assert found.fix.startswith("pip uninstall -y opencv-python; pip install opencv-python-headless")


# --- weights and the command ------------------------------------------------------------------------------------------


def test_weights_are_listed_by_the_place_they_are_found_in(tmp_path, monkeypatch):
    folders = {name: tmp_path / name for name in ("here", "chosen", "cache/yolov7_deploy")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    (folders["here"] / "yolov7-tiny.pt").touch()
    (folders["here"] / "mine.pt").touch()
    (folders["chosen"] / "yolov7.safetensors").touch()
    monkeypatch.chdir(folders["here"])
    monkeypatch.setenv("Y7_WEIGHTS_DIR", str(folders["chosen"]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert [(place.folder, place.files) for place in find_weight_files()] == [
        (str(folders["here"]), ("yolov7-tiny.pt",)),
        (str(folders["chosen"]), ("yolov7.safetensors",)),
        (str(folders["cache/yolov7_deploy"]), ()),
    ]
    monkeypatch.delenv("Y7_WEIGHTS_DIR")
    assert find_weight_files()[1].folder is None


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(doctor)
    return lambda *arguments: CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def test_the_command_prints_every_part(run):
    done = run()
    assert done.exit_code == 0
    for word in ("machine", "library", "onnxruntime", "export to ONNX", "weights are looked for in"):
        assert word in done.stdout


def test_the_record_on_stdout_is_json_alone(run):
    done = run("--json", "-")
    record = json.loads(done.stdout)
    assert set(record) == {"abilities", "libraries", "machine", "python", "traps", "version", "weights"}
    assert record["libraries"]["numpy"]["installed"] is True
    assert "library" in done.stderr


def test_people_read_what_to_type():
    text = describe(
        replace(
            diagnose(),
            libraries=everything(torch=library("torch")),
            abilities=tuple(find_abilities(everything(torch=library("torch")), WITH_T4)),
            machine=replace(WITH_T4, jetson=ORIN),
        )
    )
    assert "  pip install 'yolov7-deploy[export]'\n" in text
    assert "Tesla T4, 16.1 GB, compute capability 7.5, driver 550.54.15" in text
    assert "JetPack 6.2 (L4T 36.4.3)" in text


@pytest.mark.parametrize("how", ["refused", "absent"])
def test_it_answers_with_every_heavy_library_blocked(how):
    """Refused: a finder raises. Absent: the import system was told that there is no such module."""
    block = {
        "refused": "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {HEAVY!r}:\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Refuse())\n",
        "absent": f"sys.modules.update(dict.fromkeys({HEAVY!r}))\n",
    }
    code = (
        f"import sys\n{block[how]}import typer\nfrom yolov7_deploy.cli.doctor import doctor\n"
        "sys.argv = ['doctor', '--json', '-']\ntyper.run(doctor)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert not any(record["libraries"][name]["installed"] for name in HEAVY)
    possible = {entry["what"] for entry in record["abilities"] if entry["possible"]}
    assert not possible & {"export to ONNX", "run .onnx on the CPU"}
