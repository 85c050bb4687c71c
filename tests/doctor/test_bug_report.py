"""`y7 doctor --report`: Markdown for bug reports that has no paths, user names or credentials in it."""

from __future__ import annotations

import getpass
import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from yolov7_deploy.cli.app import app
from yolov7_deploy.doctor import diagnose
from yolov7_deploy.doctor.bug_report import bug_report, hide_private
from yolov7_deploy.doctor.doctor import Capability, KnownIssue, WeightsFolder

SECRETS = ("/home/jane", "jane", "customer", "hunter2", "secret project")


@pytest.fixture(scope="module")
def diagnosis():
    return diagnose()


@pytest.fixture
def private(diagnosis, monkeypatch):
    """A diagnosis with a private path, name or password wherever the real one has a text from outside."""
    monkeypatch.setattr(getpass, "getuser", lambda: "jane")
    monkeypatch.setenv("Y7_PLUGIN", "/home/jane/secret project/liby7_plugin.so")
    fault = "/home/jane/customer/venv/lib/libGL.so.1: cannot open | shared object"
    onnx = replace(diagnosis.libraries["onnx"], fault=fault)
    path = "/home/jane/secret project/liby7_plugin.so"
    return replace(
        diagnosis,
        libraries={**diagnosis.libraries, "onnx": onnx},
        capabilities=(Capability(what="run", possible=False, reason=f"{path} has no code for 8.7, says jane"),),
        known_issues=(KnownIssue(what="pip used http://jane:hunter2@pypi.local/simple", fix="none"),),
        weights=(WeightsFolder(label="cache", folder="/home/jane/customer", files=("yolov7.pt",)),),
    )


def test_the_report_names_versions_machine_libraries_and_capabilities(diagnosis):
    text = bug_report(diagnosis)
    assert f"| yolov7-deploy | {diagnosis.version} |" in text
    assert f"| Python | {diagnosis.python} |" in text
    assert f"| numpy | {diagnosis.libraries['numpy'].version} |" in text
    for capability in diagnosis.capabilities:
        assert f"| {capability.what} | {'yes' if capability.possible else 'no'} |" in text


def test_the_report_has_no_private_text(private):
    text = bug_report(private)
    assert [secret for secret in SECRETS if secret in text] == []
    assert "…/liby7_plugin.so has no code for 8.7, says USER" in text
    assert "…/libGL.so.1: cannot open \\| shared object" in text
    assert "cache: yolov7.pt" in text
    assert "Y7_PLUGIN" in text


def test_the_report_of_this_machine_has_no_folder_of_it(diagnosis):
    text = bug_report(diagnosis)
    assert str(Path.home()) not in text.replace("\\", "/") or Path.home() == Path("/")
    assert re.findall(r"(?<![\w:/.…<])/[\w.-]+/", text) == []


def test_every_table_is_valid_markdown(private):
    blocks = [block.splitlines() for block in bug_report(private).split("\n\n") if block.startswith("|")]
    assert len(blocks) == 3
    for block in blocks:
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in block}
        assert len(columns) == 1 and re.fullmatch(r"\|( --- \|)+", block[1])


@pytest.mark.parametrize(
    "text,expected",
    [
        ("/a/b/lib.so is old", "…/lib.so is old"),
        ("C:\\Users\\jane\\lib.dll is old", "…/lib.dll is old"),
        ("~/models/best.pt", "…/best.pt"),
        ("Debian GNU/Linux 12, x86_64", "Debian GNU/Linux 12, x86_64"),
        ("see https://pypi.local/simple/a", "see https://pypi.local/simple/a"),
        ("CPUExecutionProvider, 8.7/8.9", "CPUExecutionProvider, 8.7/8.9"),
    ],
)
def test_paths_lose_their_folders_and_other_texts_stay(text, expected):
    assert hide_private(text) == expected


def test_the_command_prints_it_and_refuses_it_beside_ready(tmp_path):
    shown = CliRunner().invoke(app, ["doctor", "--report"])
    assert shown.exit_code == 0 and shown.stdout.startswith("<details><summary>y7 doctor --report</summary>\n\n|")
    refused = CliRunner().invoke(app, ["doctor", "--report", "--ready"])
    assert refused.exit_code == 1
