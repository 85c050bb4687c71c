"""Every command, option, Python name, extra, link and figure in README.md, docs/ and examples/ exists.

`tests/test_docs_code.py` runs the code of these pages, and `tests/test_docs_site.py` builds the site.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import typer

from docs import generate
from tests.support.code_blocks import code_blocks
from yolov7_deploy._charts import write_chart
from yolov7_deploy.cli.app import COMMANDS, app
from yolov7_deploy.cli.official import TABLES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [path for folder in ("docs", "examples") for path in (ROOT / folder).glob("*.md")]
DOCUMENTS = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in PAGES)]
EXAMPLES = sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").rglob("*") if path.suffix in (".py", ".cpp")
)
# Markdown whose links are checked, beside DOCUMENTS.
LINKED = ["CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md", "docker/README.md"]
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
    assert SHELL_BLOCKS[1].endswith("&& ruff check . && ruff format --check . && mypy && pytest -n 2 --dist loadfile\n")


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


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_name_that_a_python_example_imports_exists(name):
    for block in code_blocks(ROOT / name, "python"):
        for node in ast.walk(ast.parse(block, name)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("yolov7_deploy"):
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_shell_example_is_valid_shell(name):
    for block in code_blocks(ROOT / name, "sh", "bash"):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


def test_every_extra_in_a_document_exists():
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in (*DOCUMENTS, *LINKED)]
    named = {extra for text in texts for group in EXTRAS.findall(text) for extra in group.split(",")}
    assert named - set(project["optional-dependencies"]) == set()
    assert len(named) > 5


EXTRAS = re.compile(r"(?:yolov7-deploy|'\.)\[([a-z,-]+)\]")


def test_the_command_reference_and_the_tables_of_figures_are_current():
    assert generate.outdated() == [], "Run: python docs/generate.py"


@pytest.mark.slow
@pytest.mark.parametrize("name", generate.CHARTS)
def test_the_charts_show_the_current_figures(name, tmp_path):
    write_chart(generate.CHARTS[name], tmp_path / name, dpi=generate.DPI)
    drawn, committed = (cv2.imread(str(folder / name)) for folder in (tmp_path, ROOT / "docs" / "images"))
    assert drawn.shape == committed.shape
    # Versions of matplotlib differ in single pixels of texts; a bar or a point that moves is far above this.
    assert np.abs(drawn.astype(int) - committed).mean() < 1.0, "Run: python docs/generate.py"


# --- links ------------------------------------------------------------------------------------------------------------


def slugs(text: str) -> set[str]:
    """Return the anchors that GitHub, and the site, give to the headings of a page."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} (.+)$", re.sub(r"^```.*?^```", "", text, flags=FENCED), flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {slug if not number else f"{slug}-{number}" for slug, last in found.items() for number in range(last + 1)}


FENCED = re.DOTALL | re.MULTILINE


@pytest.mark.parametrize("name", [*DOCUMENTS, *LINKED])
def test_every_link_leads_to_a_file_and_a_heading_of_it(name):
    text = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(encoding="utf-8"), flags=FENCED)
    targets = {target for target in re.findall(r"\]\(([^)\s]+)\)", text) if ":" not in target}
    broken = []
    for target in sorted(targets):
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        anchors = (
            slugs(file.read_text(encoding="utf-8")) if anchor and file.suffix == ".md" and file.exists() else {anchor}
        )
        if not file.exists() or anchor not in anchors:
            broken.append(target)
    assert broken == []


def test_the_menu_of_the_site_lists_every_page():
    menu = set(re.findall(r": ([a-z0-9-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - menu == set()


@pytest.mark.parametrize("name", [*DOCUMENTS, *LINKED])
def test_nested_lists_are_indented_by_four_spaces(name):
    """GitHub also nests with two, the site does not."""
    text = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(encoding="utf-8"), flags=FENCED)
    assert re.findall(r"^ {1,3}(?:[*-]|\d+\.) .*$", text, flags=re.MULTILINE) == []


def test_every_image_of_a_page_is_described():
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert [target for alt, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", text) if len(alt) < 20] == [], name
