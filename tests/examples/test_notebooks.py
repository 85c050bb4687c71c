"""The notebooks of examples/ are small, have no outputs, and run from the first cell to the last."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support.example_scripts import EXAMPLES

NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
ROOT = EXAMPLES.parent
MAX_BYTES = 20_000
TIMEOUT_S = 600


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_there_are_two_and_the_readme_names_them():
    names = [path.name for path in NOTEBOOKS]
    assert names == ["get_started.ipynb", "your_own_model.ipynb"]
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"[{name}]({name})" in readme for name in names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_small_and_has_no_outputs_and_no_machine_in_it(path):
    notebook = read(path)
    assert path.stat().st_size < MAX_BYTES
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["name"]) == (4, "python3")
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::PendingDeprecationWarning"
)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="the notebooks need: pip install 'yolov7-deploy[docs]'")
    nbclient = pytest.importorskip("nbclient", reason="the notebooks need: pip install 'yolov7-deploy[docs]'")
    pytest.importorskip("ipykernel", reason="the notebooks need: pip install 'yolov7-deploy[docs]'")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=TIMEOUT_S, resources={"metadata": {"path": tmp_path}}).execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output
    )
    assert "AP 0." in printed
    assert (tmp_path / ("own-int8.onnx" if "own" in path.name else "shapes-int8.onnx")).is_file()
