"""Every notebook runs from top to bottom, and its two files hold the same cells.

A notebook is a pair: the `.py` that people edit and review (jupytext's percent format) and the `.ipynb` with outputs that people
read. To run and save one after a change:

    python -m tests.test_notebooks notebooks/01_softmax_by_ift.py
"""

import json
import os
import pathlib
import sys
import tempfile

import jupytext
import nbclient
import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


class ThisInterpreter(AsyncKernelManager):
    """A kernel of the interpreter that runs the tests, whether or not one is installed where Jupyter looks."""

    @property
    def kernel_spec(self):
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")


def run(notebook: nbformat.NotebookNode, scratch: pathlib.Path, *, small: bool, timeout: int) -> None:
    """Executes all cells in the folder `scratch`; raises with the source and the error of the first cell that fails."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "IPYTHONDIR": str(scratch / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(scratch / "runtime"),
        "DECLARATIVE_SMALL": "1" if small else "0",
    }
    client = nbclient.NotebookClient(
        notebook,
        timeout=timeout,
        record_timing=False,
        coalesce_streams=True,
        kernel_manager_class=ThisInterpreter,
        resources={"metadata": {"path": str(scratch)}},
    )
    client.execute(env=environment)


def code_cells(notebook: nbformat.NotebookNode) -> list[str]:
    return [cell.source.strip() for cell in notebook.cells if cell.cell_type == "code"]


# Those that compile longest are in the exhaustive tier: run them after a change to what they show.
LONG = (
    "02_optnet",
    "03_memory",
    "04_neural_ode",
    "05_semi_amortised_inference",
    "06_posterior_collapse",
    "07_deep_equilibrium",
    "08_declarative_zoo",
)


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=pytest.mark.full if p.stem in LONG else pytest.mark.slow, id=p.stem) for p in NOTEBOOKS],
)
def test_runs(path, tmp_path):
    run(nbformat.read(path, as_version=4), tmp_path, small=True, timeout=240)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_pair_is_in_step(path):
    notebook, source = nbformat.read(path, as_version=4), jupytext.read(path.with_suffix(".py"))
    assert [cell.source.strip() for cell in notebook.cells] == [cell.source.strip() for cell in source.cells]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_clean(path):
    """Executed in order, without errors, small, and free of the machine that it ran on."""
    text = path.read_text()
    notebook = nbformat.reads(text, as_version=4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert all(out.output_type != "error" for cell in notebook.cells for out in cell.get("outputs", []))
    assert len(text) < 300_000
    for place in (
        f"{pathlib.Path.home()}/",
        f"{tempfile.gettempdir()}/",
        sys.prefix,
        "/home/",
        "/Users/",
        "site-packages",
    ):
        assert place not in text
    assert not any(
        "timestamp" in json.dumps(cell.metadata) or "iopub" in json.dumps(cell.metadata) for cell in notebook.cells
    )


def build(source: pathlib.Path) -> None:
    """Writes `source` (.py) as an executed .ipynb that changes only where its content does."""
    notebook = jupytext.read(source)
    with tempfile.TemporaryDirectory() as scratch:
        run(notebook, pathlib.Path(scratch), small=False, timeout=600)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # jupytext draws new ones each time
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, source.with_suffix(".ipynb"))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        build(pathlib.Path(name))
