"""examples/README.md lists every script with its own pip line, and each script states how it is run."""

import ast
import re

import pytest

from tests.support.example_scripts import EXAMPLES, head_comment, pip_requirements, python_options

README = (EXAMPLES / "README.md").read_text(encoding="utf-8")
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))


def row(name):
    """Return the row of the table that links to a file."""
    (found,) = re.findall(rf"^\| \[`{re.escape(name)}`\]\({re.escape(name)}\) \|.*$", README, flags=re.MULTILINE)
    return found


def test_the_table_lists_exactly_the_files():
    listed = re.findall(r"^\| \[`([^`]+)`\]", README, flags=re.MULTILINE)
    sources = [path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.cpp")]
    assert sorted(listed) == sorted([*SCRIPTS, *sources])


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_table_has_the_pip_line_and_the_command_of_the_script(name):
    comment = head_comment(name)
    (install,) = re.findall(r"^\s+(pip install .*)$", comment, flags=re.MULTILINE)
    (command,) = re.findall(rf"^\s+(python {re.escape(name)}.*)$", comment, flags=re.MULTILINE)
    assert f"`{install}`" in row(name) and f"`{command}`" in row(name)
    assert pip_requirements(name)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_command_has_options_of_the_script(name):
    source = (EXAMPLES / name).read_text(encoding="utf-8")
    literals = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
    missing = {text for text in python_options(name) if text not in literals and text[2:] not in literals}
    assert missing == set()
