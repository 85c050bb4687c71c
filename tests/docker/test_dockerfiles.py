"""The texts of docker/: versions are those of images.env, no image runs as root, and every copied file exists."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from yolov7_deploy import __version__
from yolov7_deploy.doctor.containers import CACHE, IMAGES, REPOSITORY, UID, WORK
from yolov7_deploy.tensorrt.plugin_library import SYSTEM_FOLDERS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docker"
NAMES = [image.name for image in IMAGES]
GPU_NAMES = [name for name in NAMES if name != "cpu"]
HEALTH_CHECK = ["y7", "doctor", "--ready"]


def instructions(name: str) -> list[tuple[str, str]]:
    """Return (instruction, arguments) of a Dockerfile, without comments, with continued lines joined."""
    text = (FOLDER / f"{name}.Dockerfile").read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", "", lines)
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def arguments(name: str, instruction: str) -> list[str]:
    return [rest for word, rest in instructions(name) if word == instruction]


def last_stage(name: str) -> list[tuple[str, str]]:
    found = instructions(name)
    start = max(index for index, (word, _) in enumerate(found) if word == "FROM")
    return found[start:]


def versions() -> dict[str, str]:
    """Return the names and values of images.env."""
    lines = (FOLDER / "images.env").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def defaults(name: str) -> dict[str, str]:
    return dict(text.split("=", 1) for text in arguments(name, "ARG") if "=" in text)


def test_there_is_one_dockerfile_for_each_image_of_the_command():
    assert sorted(path.name for path in FOLDER.glob("*.Dockerfile")) == sorted(f"{name}.Dockerfile" for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_versions_are_copies_of_the_one_place(name):
    own = {key: value for key, value in defaults(name).items() if key not in ("VERSION", "REVISION")}
    assert own and {key: versions().get(key) for key in own} == own


def test_every_version_is_used_and_has_a_prefix_of_its_image():
    prefixes = {name: name.rpartition("-")[2].upper() for name in NAMES}
    used = {key: name for name in NAMES for key in defaults(name) if key not in ("VERSION", "REVISION")}
    assert set(used) == set(versions())
    assert all(key.startswith(f"{prefixes[name]}_") for key, name in used.items())


def test_every_block_of_versions_names_where_they_were_seen():
    blocks = re.split(r"\n\n", (FOLDER / "images.env").read_text(encoding="utf-8"))[1:]
    assert len(blocks) == len(NAMES) and all(block.startswith("# --- ") for block in blocks)
    for block in blocks:
        for first, second in re.findall(r"(^# .*$)\n(\w+=)", block, re.MULTILINE):
            assert first and second
        assert re.search(r"[Uu]sed|repository|PyPI", block), block


@pytest.mark.parametrize("name", NAMES)
def test_base_images_have_a_tag_and_come_from_arguments_only(name):
    for stage in arguments(name, "FROM"):
        assert re.match(r"\$\{\w+\}( AS \w+)?$", stage), stage
    for key, value in versions().items():
        if key.endswith(("_BASE", "_BUILDER")):
            tag = value.rpartition("/")[2].partition(":")[2]
            assert tag and tag != "latest"


@pytest.mark.parametrize("name", NAMES)
def test_an_image_has_two_stages_and_copies_no_compiler(name):
    assert len(arguments(name, "FROM")) == 2
    installed = " ".join(rest for word, rest in last_stage(name) if word == "RUN")
    assert not re.search(r"\b(?:g\+\+|gcc|cmake|nvcc|torch|pip)\b", installed)
    copied = [rest for word, rest in last_stage(name) if word in ("COPY", "ADD")]
    assert all(rest.startswith("--from=builder ") for rest in copied)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_runs_as_another_user_than_root_with_a_health_check_and_a_volume(name):
    stage = dict(last_stage(name))
    assert stage["USER"] == str(UID)
    assert f"useradd --uid {UID}" in " ".join(rest for word, rest in last_stage(name) if word == "RUN")
    options, _, command = stage["HEALTHCHECK"].partition(" CMD ")
    assert json.loads(command) == HEALTH_CHECK and "--interval=30s" in options
    assert json.loads(stage["VOLUME"]) == [CACHE] and stage["WORKDIR"] == WORK
    assert json.loads(stage["ENTRYPOINT"]) == ["y7"]
    assert f"XDG_CACHE_HOME={CACHE}" in stage["ENV"]


@pytest.mark.parametrize("name", NAMES)
def test_an_image_has_the_labels_of_oci(name):
    (labels,) = [rest for word, rest in last_stage(name) if word == "LABEL"]
    found = dict(re.findall(r'org\.opencontainers\.image\.([\w.]+)="([^"]*)"', labels))
    assert found["title"] == f"{REPOSITORY} {name}" and found["licenses"] == "Apache-2.0"
    assert {"base.name", "description", "documentation", "revision", "source", "version"} <= set(found)
    assert defaults(name)["VERSION"] == __version__


@pytest.mark.parametrize("name", NAMES)
def test_a_dockerfile_has_no_heredoc_no_mount_and_no_syntax_line(name):
    """An old Docker on a board, without BuildKit, builds it, too."""
    text = (FOLDER / f"{name}.Dockerfile").read_text(encoding="utf-8")
    assert "<<" not in text and "--mount" not in text and "# syntax" not in text and "--chmod" not in text


@pytest.mark.parametrize("name", NAMES)
def test_every_copied_file_exists_and_is_not_ignored(name):
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignored
    for rest in arguments(name, "COPY"):
        if not rest.startswith("--from="):
            *sources, _ = rest.split()
            assert all((ROOT / source).exists() and f"!{source}" in ignored for source in sources), rest


@pytest.mark.parametrize("name", GPU_NAMES)
def test_an_image_for_a_gpu_has_the_plugin_where_it_is_searched(name):
    (plugin,) = [rest for rest in arguments(name, "COPY") if "liby7_plugin.so" in rest]
    assert Path(plugin.split()[-1]) in SYSTEM_FOLDERS and plugin.startswith("--from=builder")
    (environment,) = [rest for word, rest in last_stage(name) if word == "ENV"]
    assert "NVIDIA_VISIBLE_DEVICES=all" in environment and "compute" in environment


def test_the_compose_file_has_every_image_and_reserves_the_gpu():
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert set(services) == set(NAMES)
    for image in IMAGES:
        service = services[image.name]
        assert service["image"] == f"{REPOSITORY}:{image.name}" and service["profiles"] == [image.name]
        assert (FOLDER.parent / service["build"]["dockerfile"]).is_file()
        if image.gpu == ("--gpus", "all"):
            (device,) = service["deploy"]["resources"]["reservations"]["devices"]
            assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
        assert service.get("runtime", "") == ("nvidia" if image.gpu == ("--runtime", "nvidia") else "")


def test_the_figures_of_the_readme_are_those_of_the_recorded_run():
    results = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert set(results) <= set(NAMES)
    for name, figures in results.items():
        cells = [cell.strip() for cell in re.search(rf"^\| `{name}` \|(.*)\|$", text, re.MULTILINE)[1].split("|")]
        boxes = "; ".join(f"{found['boxes']}, {found['max_difference_px']:g} px" for found in figures["boxes"].values())
        expected = [figures["added_mb"], figures["added_compressed_mb"], figures["uid"], boxes, figures["ready_cpu_s"]]
        assert cells == [str(value) for value in expected]


def test_what_is_not_needed_is_removed_from_an_environment(tmp_path):
    packages = tmp_path / "lib" / "python3.12" / "site-packages"
    for name in ("numpy/_core/tests/a.py", "numpy/a.py", "pip/a.py", "onnxruntime/tools/a.py", "yolov7_deploy/a.py"):
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_text("x")
    (tmp_path / "bin").mkdir()
    for name in ("pip3", "y7"):
        (tmp_path / "bin" / name).write_text("x")
    done = subprocess.run(
        [sys.executable, str(FOLDER / "trim.py"), str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"{tmp_path}: ")
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    site = "lib/python3.12/site-packages"
    assert left == ["bin/y7", f"{site}/numpy/a.py", f"{site}/yolov7_deploy/a.py"]
