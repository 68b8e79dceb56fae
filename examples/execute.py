"""Run the notebooks of this folder again and keep their outputs: python examples/execute.py [NAME ...]

Needs nbclient and ipykernel (extra "notebooks"). What differs from machine to machine is left out.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def execute(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:  # what the cells write
        NotebookClient(notebook, timeout=900, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            bars = [each for each in cell.outputs if each.output_type == "stream" and each.name == "stderr"]
            cell.outputs = [each for each in cell.outputs if each not in bars]
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for path in sorted(HERE.glob("*.ipynb")):
        if len(sys.argv) == 1 or path.stem in sys.argv[1:]:
            execute(path)
            print(path)
