"""What the README promises is there: its commands, its names and its tree."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import typer

from yolov7_deploy.cli.app import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL_BLOCKS = re.findall(r"^```sh\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def options() -> dict[str, set[str]]:
    """Every option of every command of `y7`."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return {
        name: {spelling for parameter in command.params for spelling in (*parameter.opts, *parameter.secondary_opts)}
        for name, command in commands.items()
    }


def test_there_are_two_commands_and_each_is_one_line():
    assert [block.count("\n") for block in SHELL_BLOCKS] == [1, 1]
    assert SHELL_BLOCKS[0].endswith("&& y7 demo\n")
    assert SHELL_BLOCKS[1].endswith("&& ruff check . && ruff format --check . && mypy && pytest\n")


def test_the_continuous_integration_runs_the_second_command():
    shown = subprocess.run([str(ROOT / ".ci" / "run"), "--show"], capture_output=True, text=True, check=True)
    assert shown.stdout == SHELL_BLOCKS[1]


def test_every_command_line_in_the_readme_has_existing_options():
    known = options()
    lines = re.findall(r"\by7 ([a-z]+)([^`\n&|]*)", README)
    assert {verb for verb, _ in lines} >= {"demo", "detect", "export", "val", "verify"}
    typed = {(verb, option) for verb, rest in lines for option in re.findall(r"--[a-z0-9-]+", rest)}
    wrong = {(verb, option) for verb, option in typed if option not in known[verb]}
    assert wrong == set()


def test_every_name_that_the_python_example_imports_is_there():
    (example,) = re.findall(r"^```python\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    imports = [node for node in ast.parse(example, "README.md").body if isinstance(node, ast.ImportFrom)]
    assert len(imports) == 2
    exec(compile(ast.Module(imports, type_ignores=[]), "README.md", "exec"), {})
