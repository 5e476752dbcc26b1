"""Each notebook is kept twice, as .py and as .ipynb with outputs, and both say the same.

`python tests/test_notebooks.py` makes every .ipynb anew from its .py.
"""

import copy
import re
import sys
import time
from pathlib import Path

import jupytext
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))
each_notebook = pytest.mark.parametrize("source", SOURCES, ids=[path.stem for path in SOURCES])

# All that a reader's Jupyter needs; versions and paths of the machine would differ every time.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
SECONDS = 60  # from the start of the kernel, on two cores


def execute(source):
    """The notebook of a .py, run top to bottom in a kernel of its own; an error raises."""
    notebook = jupytext.read(source)
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        # Otherwise how a print is cut into outputs depends on the moment it was read.
        coalesce_streams=True,
        resources={"metadata": {"path": str(ROOT / "notebooks")}},
    )
    client.execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat_minor = 5
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # random ones would change with every build
        cell.metadata = nbformat.from_dict({})
    return notebook


def read(source):
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def texts(cell):
    """What a code cell printed, or shows as text; a figure's repr has no place in it."""
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            yield output.text
        elif "image/png" not in output.get("data", {}):
            yield output.get("data", {}).get("text/plain", "")


def faults(notebook, source):
    """What is wrong with a stored notebook, as words; nothing is run."""
    found = []
    if cells(notebook) != cells(jupytext.read(source)):
        found.append("cells differ from the .py")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("not run once, top to bottom")
    for cell in code:
        kinds = [output.output_type for output in cell.outputs]
        if "error" in kinds:
            found.append("an error in the outputs")
        if any(output.get("name") == "stderr" for output in cell.outputs):
            found.append("stderr in the outputs")
        if "print(" in cell.source and "stream" not in kinds:
            found.append("a print without output")
        drawn = [o for o in cell.outputs if "image/png" in o.get("data", {})]
        if ("plt." in cell.source) != bool(drawn):
            found.append("a picture is missing, or too many")
        if any(
            re.search(r"(/home|/root|/tmp|/Users|/work)\b|[A-Z]:\\| at 0x", t) for t in texts(cell)
        ):
            found.append("a path or an address of a machine in the outputs")
    if notebook.metadata != METADATA or any(cell.metadata for cell in notebook.cells):
        found.append("metadata of a machine")
    return found


def test_there_are_notebooks():
    assert SOURCES
    kept = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert kept == {path.stem for path in SOURCES}


@each_notebook
def test_both_forms_say_the_same(source):
    assert faults(read(source), source) == []


@each_notebook
def test_faults_are_found(source):
    """Every rule of `faults` catches a notebook that breaks it."""
    sound = read(source)

    def broken(change):
        notebook = copy.deepcopy(sound)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        printing = next(cell for cell in code if "print(" in cell.source)
        drawing = next(cell for cell in code if "plt.sub" in cell.source)
        change(notebook, printing, drawing)
        return faults(notebook, source)

    def edit(notebook, printing, drawing):
        printing.source += "\nprint(1)"

    def drop(notebook, printing, drawing):
        del notebook.cells[0]

    def clear(notebook, printing, drawing):
        printing.outputs = []

    def undraw(notebook, printing, drawing):
        drawing.outputs = [o for o in drawing.outputs if "image/png" not in o.get("data", {})]

    def fail(notebook, printing, drawing):
        printing.outputs.append(nbformat.v4.new_output("error", ename="E", evalue="", traceback=[]))

    def warn(notebook, printing, drawing):
        printing.outputs.append(nbformat.v4.new_output("stream", name="stderr", text="a warning"))

    def leak(notebook, printing, drawing):
        printing.outputs[0].text += "/home/somebody/notebook.py:1\n"

    def address(notebook, printing, drawing):
        printing.outputs[0].text += "<Legend at 0x7f0000000000>\n"

    def jump(notebook, printing, drawing):
        printing.execution_count += 7

    def stamp(notebook, printing, drawing):
        printing.metadata = {"execution": {"iopub.status.idle": "2020-01-01"}}

    for change, words in (
        (edit, "cells differ from the .py"),
        (drop, "cells differ from the .py"),
        (clear, "a print without output"),
        (undraw, "a picture is missing, or too many"),
        (fail, "an error in the outputs"),
        (warn, "stderr in the outputs"),
        (leak, "a path or an address of a machine in the outputs"),
        (address, "a path or an address of a machine in the outputs"),
        (jump, "not run once, top to bottom"),
        (stamp, "metadata of a machine"),
    ):
        assert words in broken(change), change.__name__


NUMBER = re.compile(r"-?\d+\.?\d*(?:e[+-]?\d+)?")


@each_notebook
def test_runs_top_to_bottom(source):
    """It runs, in time, and what it prints is what is kept: the words exactly, the numbers to one
    per cent, since the order of sums differs between machines; below 1e-3 rounding may be all."""
    began = time.monotonic()
    made = execute(source)
    elapsed = time.monotonic() - began
    kept = read(source)
    assert faults(made, source) == []
    for new, old in zip(made.cells, kept.cells, strict=True):
        found, wanted = " ".join(texts(new)), " ".join(texts(old))
        words = [" ".join(NUMBER.sub("#", text).split()) for text in (found, wanted)]
        assert words[0] == words[1], new.source
        numbers = [[float(n) for n in NUMBER.findall(text)] for text in (found, wanted)]
        np.testing.assert_allclose(numbers[0], numbers[1], rtol=1e-2, atol=1e-3)
    assert elapsed < SECONDS, f"{elapsed:.0f} s"


if __name__ == "__main__":
    for path in SOURCES:
        nbformat.write(execute(path), path.with_suffix(".ipynb"))
        print(path.with_suffix(".ipynb").relative_to(ROOT), file=sys.stderr)
