"""`y7 doctor`: the libraries and hardware it finds, its conclusions, and that it works if anything is missing."""

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
from yolov7_deploy.doctor.doctor import find_capabilities, find_known_issues, find_weight_files
from yolov7_deploy.doctor.packages import KNOWN_PACKAGES, KnownPackage, Library, _library, read_libraries
from yolov7_deploy.hardware.gpu import InstalledGpu
from yolov7_deploy.hardware.machine import Jetson, Machine, read_jetson, read_machine
from yolov7_deploy.runtimes import cudart

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "onnx", "onnxruntime", "tensorrt", "cv2")
T4 = InstalledGpu(name="Tesla T4", compute_capability="7.5", driver="550.54.15", memory_gb=16.1)
V100 = replace(T4, name="Tesla V100", compute_capability="7.0")
ORIN = Jetson(model="NVIDIA Jetson AGX Orin", l4t="36.4.3", jetpack="6.2", compute_capability="8.7")
PLAIN = Machine(
    system="Linux", architecture="x86_64", cpu="a CPU", cores=4, usable_cores=2, memory_gb=8.0, gpus=(), jetson=None
)
WITH_T4 = replace(PLAIN, gpus=(T4,))


def library(name: str, *distributions: str, fault: str = "", details: tuple[str, ...] = ()) -> Library:
    """Return a library with these distributions; without any it is not installed."""
    package = next(package for package in KNOWN_PACKAGES if package.module == name)
    return Library(
        name=name,
        version=distributions[0].partition(" ")[2] if distributions else "",
        distributions=distributions,
        installed=bool(distributions),
        fault=fault,
        details=details,
        extra=package.extra,
    )


def everything(**changes: Library) -> dict[str, Library]:
    """Return all libraries as installed for a CPU, with these changes."""
    known = {package.module: library(package.module, f"{package.distributions[0]} 1.0") for package in KNOWN_PACKAGES}
    known["torch"] = library("torch", "torch 2.6.0+cpu", details=("cpu",))
    known["onnxruntime"] = library("onnxruntime", "onnxruntime 1.20", details=("CPUExecutionProvider",))
    return {**known, **changes}


def capability(what: str, libraries: dict[str, Library], machine: Machine = PLAIN):
    found = [entry for entry in find_capabilities(libraries, machine) if entry.what.startswith(what)]
    assert len(found) == 1
    return found[0]


# --- libraries --------------------------------------------------------------------------------------------------------


def test_versions_are_those_of_the_installed_distributions():
    found = read_libraries()
    assert list(found) == [package.module for package in KNOWN_PACKAGES]
    assert found["numpy"].version == importlib.metadata.version("numpy")
    assert found["onnxruntime"].works and "CPUExecutionProvider" in found["onnxruntime"].details


def test_diagnosis_does_not_import_heavy_libraries():
    code = (
        "import sys; from yolov7_deploy.doctor import diagnose; diagnose(); "
        f"print(sorted({{*{HEAVY!r}, 'tensorrt_rtx', 'numpy'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"


def test_the_cuda_version_of_torch_is_read_without_an_import(tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    package = next(package for package in KNOWN_PACKAGES if package.module == "torch")
    for line, expected in (
        ("cuda: Optional[str] = '12.6'", ("CUDA 12.6",)),
        ("cuda = '11.8'", ("CUDA 11.8",)),
        ("cuda: Optional[str] = None", ("cpu",)),
        ("something else", ()),
    ):
        (tmp_path / "torch/version.py").write_text(f"debug = False\n{line}\nhip = None\n")
        assert _library(package).details == expected


def test_a_library_that_crashes_is_reported_as_broken(tmp_path, monkeypatch):
    bodies = {
        "y7_raises": "raise ImportError('libGL.so.1: cannot open shared object file')",
        "y7_dies": "import os; os._exit(7)",
    }
    for name, body in bodies.items():
        (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    raises, dies = (_library(KnownPackage(module=name, distributions=(), probe="''")) for name in bodies)
    assert raises.installed and not raises.works
    assert "libGL.so.1" in raises.fault
    assert dies.fault == "importing it ended Python with exit code 7"


def test_a_distribution_without_its_module_is_a_fault():
    found = _library(KnownPackage(module="y7_no_such_module", distributions=("numpy",)))
    assert not found.installed and "there is no module y7_no_such_module" in found.fault


def test_a_folder_of_the_same_name_is_not_a_library(tmp_path, monkeypatch):
    (tmp_path / "y7_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not _library(KnownPackage(module="y7_folder", distributions=())).installed


# --- machine ----------------------------------------------------------------------------------------------------------


def test_this_machine_has_cores_memory_and_a_name():
    machine = read_machine()
    assert 1 <= machine.usable_cores <= machine.cores
    assert machine.system and machine.cpu and machine.architecture
    if Path("/proc/meminfo").exists():
        assert machine.memory_gb > 0


def test_a_machine_without_any_information_is_still_described(tmp_path, monkeypatch):
    monkeypatch.setattr("yolov7_deploy.hardware.machine.list_installed_gpus", lambda: ())
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
def test_the_jetpack_version_of_a_jetson_is_read(tmp_path, model, release, expected):
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "etc").mkdir()
    if model:
        (tmp_path / "proc/device-tree/model").write_text(model)
    if release:
        (tmp_path / "etc/nv_tegra_release").write_text(f"# {release}, GCID: 1, BOARD: generic, EABI: aarch64\n")
    board = read_jetson(tmp_path)
    assert (board.l4t, board.jetpack, board.compute_capability) == expected
    assert "\0" not in board.model


def test_other_boards_are_not_jetsons(tmp_path):
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/model").write_text("Raspberry Pi 5 Model B Rev 1.0\0")
    assert read_jetson(tmp_path) is None


# --- what can run -----------------------------------------------------------------------------------------------------


def test_with_every_library_a_cpu_machine_can_do_everything_except_gpu_work():
    entries = find_capabilities(everything(), PLAIN)
    assert {entry.what for entry in entries if not entry.possible} == {
        "run .pt and .safetensors on the GPU",
        "run .onnx on the GPU",
        "build TensorRT engines",
        "run TensorRT engines",
    } - {entry.what for entry in entries if entry.possible}
    assert capability("export", everything()).possible
    assert "no NVIDIA GPU" in capability("run .onnx on the GPU", everything()).reason


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
def test_a_missing_library_is_named_with_the_command_that_installs_it(missing, what, fix):
    found = capability(what, everything(**{missing: library(missing)}))
    assert not found.possible
    assert (found.reason, found.fix) == (f"{missing} is not installed", fix)


def test_a_library_that_does_not_load_is_to_be_reinstalled():
    broken = library("onnxruntime", "onnxruntime 1.20", fault="ImportError: bad ELF")
    found = capability("run .onnx on the CPU", everything(onnxruntime=broken))
    assert "does not load: ImportError: bad ELF" in found.reason
    assert found.fix == "pip install --force-reinstall onnxruntime"


def test_cpu_builds_on_a_machine_with_a_gpu_are_reported():
    assert "without CUDA" in capability("run .pt and .safetensors on the GPU", everything(), WITH_T4).reason
    found = capability("run .onnx on the GPU", everything(), WITH_T4)
    assert "has only CPUExecutionProvider" in found.reason and "yolov7-deploy[gpu]" in found.fix


def test_with_gpu_builds_the_gpu_is_available():
    ready = everything(
        torch=library("torch", "torch 2.6.0", details=("CUDA 12.6",)),
        onnxruntime=library("onnxruntime", "onnxruntime-gpu 1.20", details=("CUDAExecutionProvider",)),
    )
    assert capability("run .pt and .safetensors on the GPU", ready, WITH_T4).possible
    assert capability("run .onnx on the GPU", ready, WITH_T4).possible


def test_engines_run_with_cuda_python_or_a_libcudart_and_not_with_pycuda(monkeypatch):
    without, what = everything(cuda=library("cuda")), "run TensorRT engines"
    monkeypatch.setattr(cudart, "cuda_bindings", lambda: iter(()))
    assert capability(what, without, WITH_T4).reason == "cuda is not installed"
    monkeypatch.setattr(cudart, "cuda_bindings", lambda: iter(("libcudart.so.13",)))
    assert capability(what, without, WITH_T4).possible


def test_the_fix_for_a_jetson_names_wheels_for_jetson():
    fix = capability("run .onnx on the GPU", everything(), replace(PLAIN, jetson=ORIN)).fix
    assert "onnxruntime-gpu --index-url https://pypi.jetson-ai-lab.io/jp6" in fix


# --- known issues -----------------------------------------------------------------------------------------------------


def issue(libraries: dict[str, Library], machine: Machine = PLAIN, *, about: str):
    return [entry for entry in find_known_issues(libraries, machine) if about in entry.what]


def test_two_opencv_packages_are_a_known_issue():
    both = library("cv2", "opencv-python-headless 4.10", "opencv-python 4.9")
    (found,) = issue(everything(cv2=both), about="share the folder cv2")
    assert found.fix == ("pip uninstall -y opencv-python-headless opencv-python; pip install opencv-python-headless")
    assert not issue(everything(), about="share the folder")


def test_two_onnxruntime_packages_are_a_known_issue():
    both = library("onnxruntime", "onnxruntime 1.20", "onnxruntime-gpu 1.20", details=("CPUExecutionProvider",))
    (found,) = issue(everything(onnxruntime=both), about="share the folder onnxruntime")
    assert found.fix == "pip uninstall -y onnxruntime onnxruntime-gpu; pip install onnxruntime-gpu"


@pytest.mark.parametrize("version,gpu,issues", [("10.16.1", V100, 1), ("10.4.0", V100, 0), ("10.16.1", T4, 0)])
def test_a_tensorrt_that_dropped_the_gpu_is_a_known_issue(version, gpu, issues):
    libraries = everything(tensorrt=library("tensorrt", f"tensorrt {version}"))
    assert len(issue(libraries, replace(PLAIN, gpus=(gpu,)), about="was the last that did")) == issues


def rtx_wheel(tmp_path: Path, monkeypatch) -> Path:
    folder = tmp_path / "tensorrt_rtx_libs"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "libtensorrt_rtx.so.1").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt_rtx_libs", raising=False)
    return folder / "libtensorrt_rtx.so.1"


def test_the_rtx_wheel_without_its_link_is_a_known_issue(tmp_path, monkeypatch):
    real = rtx_wheel(tmp_path, monkeypatch)
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    (found,) = issue(everything(), about="TensorRT-RTX")
    assert f"ln -sf {real} " in found.fix and "LD_LIBRARY_PATH" in found.fix


def test_the_rtx_wheel_with_its_link_is_fine(tmp_path, monkeypatch):
    real = rtx_wheel(tmp_path, monkeypatch)
    links = tmp_path / "links"
    links.mkdir()
    (links / "libtensorrt_rtx.so").symlink_to(real)
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/nowhere{os.pathsep}{links}")
    assert not issue(everything(), about="TensorRT-RTX")


def test_opencv_without_libgl_is_to_be_replaced_by_the_headless_package():
    broken = library("cv2", "opencv-python 4.10", fault="ImportError: libGL.so.1: cannot open shared object file")
    (found,) = issue(everything(cv2=broken), about="cv2 does not load")
    assert found.fix.startswith("pip uninstall -y opencv-python; pip install opencv-python-headless")


# --- weights and the command ------------------------------------------------------------------------------------------


def test_weights_are_listed_by_folder(tmp_path, monkeypatch):
    folders = {name: tmp_path / name for name in ("here", "chosen", "cache/yolov7_deploy")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    (folders["here"] / "yolov7-tiny.pt").touch()
    (folders["here"] / "mine.pt").touch()
    (folders["chosen"] / "yolov7.safetensors").touch()
    monkeypatch.chdir(folders["here"])
    monkeypatch.setenv("Y7_WEIGHTS_DIR", str(folders["chosen"]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert [(found.folder, found.files) for found in find_weight_files()] == [
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
    for text in ("machine", "library", "onnxruntime", "export to ONNX", "weights are searched in"):
        assert text in done.stdout


def test_json_on_stdout_is_the_only_output_there(run):
    done = run("--json", "-")
    record = json.loads(done.stdout)
    assert set(record) == {"capabilities", "known_issues", "libraries", "machine", "python", "version", "weights"}
    assert record["libraries"]["numpy"]["installed"] is True
    assert "library" in done.stderr


def test_the_text_shows_the_commands_to_type():
    text = describe(
        replace(
            diagnose(),
            libraries=everything(torch=library("torch")),
            capabilities=tuple(find_capabilities(everything(torch=library("torch")), WITH_T4)),
            machine=replace(WITH_T4, jetson=ORIN),
        )
    )
    assert "  pip install 'yolov7-deploy[export]'\n" in text
    assert "Tesla T4, 16.1 GB, compute capability 7.5, driver 550.54.15" in text
    assert "JetPack 6.2 (L4T 36.4.3)" in text


@pytest.mark.parametrize("how", ["refused", "absent"])
def test_doctor_works_if_every_heavy_library_is_blocked(how):
    """Refused: a finder raises an error. Absent: the entry in `sys.modules` is `None`."""
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
    possible = {entry["what"] for entry in record["capabilities"] if entry["possible"]}
    assert not possible & {"export to ONNX", "run .onnx on the CPU"}
