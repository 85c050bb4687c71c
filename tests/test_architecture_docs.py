"""Every command, option and Python name in README.md, docs/ and examples/ exists."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
import typer

from yolov7_deploy.cli.app import COMMANDS, app
from yolov7_deploy.cli.official import TABLES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [path for folder in ("docs", "examples") for path in (ROOT / folder).glob("*.md")]
DOCUMENTS = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in PAGES)]
EXAMPLES = sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").rglob("*") if path.suffix in (".py", ".cpp")
)
SHELL_BLOCKS = re.findall(r"^```sh\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def options() -> dict[str, set[str]]:
    """Return every option of every command of `y7`, also those of the official program."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return {
        name: {spelling for parameter in command.params for spelling in (*parameter.opts, *parameter.secondary_opts)}
        | {"--help", *TABLES.get(command.callback.__name__, {})}
        for name, command in commands.items()
    }


def test_there_are_two_commands_and_each_is_one_line():
    assert [block.count("\n") for block in SHELL_BLOCKS] == [1, 1]
    assert SHELL_BLOCKS[0].endswith("&& y7 demo\n")
    assert SHELL_BLOCKS[1].endswith("&& ruff check . && ruff format --check . && mypy && pytest -n 2\n")


def test_the_continuous_integration_runs_the_second_command():
    shown = subprocess.run([str(ROOT / ".ci" / "run"), "--show"], capture_output=True, text=True, check=True)
    assert shown.stdout == SHELL_BLOCKS[1]


def command_lines(name: str) -> list[tuple[str, str]]:
    """Return (command, arguments) of every `y7 COMMAND ARGUMENTS` in a document."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(r"\by7 ([a-z]+)([^`\n&|#]*)", text)


def test_the_readme_shows_the_main_commands():
    assert {command for command, _ in command_lines("README.md")} >= {"demo", "detect", "export", "val", "verify"}


@pytest.mark.parametrize("name", [*DOCUMENTS, *EXAMPLES])
def test_every_command_line_in_a_document_has_existing_options(name):
    known = options()
    lines = command_lines(name)
    assert {command for command, _ in lines} <= set(known)
    typed = {(command, option) for command, arguments in lines for option in re.findall(r"--[a-z0-9-]+", arguments)}
    assert {(command, option) for command, option in typed if option not in known[command]} == set()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_option_that_a_document_quotes_exists(name):
    known = {option for spellings in options().values() for option in spellings}
    quoted = set(re.findall(r"`(--[a-z0-9_-]+)", (ROOT / name).read_text(encoding="utf-8")))
    assert {option.replace("_", "-") for option in quoted} - known == set()


def test_the_table_of_commands_in_the_readme_lists_all_commands_with_existing_options():
    known = options()
    rows = re.findall(r"^\| `y7 ([a-z]+)[^`]*` \|(.*)$", README, flags=re.MULTILINE)
    canonical = {command.__name__ for command, _ in COMMANDS}
    assert {command for command, _ in rows} == canonical
    quoted = {(command, option) for command, row in rows for option in re.findall(r"`(--[a-z0-9-]+)", row)}
    assert {(command, option) for command, option in quoted if option not in known[command]} == set()


def test_every_name_that_the_python_example_imports_exists():
    (example,) = re.findall(r"^```python\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    imports = [node for node in ast.parse(example, "README.md").body if isinstance(node, ast.ImportFrom)]
    assert imports
    exec(compile(ast.Module(imports, type_ignores=[]), "README.md", "exec"), {})
