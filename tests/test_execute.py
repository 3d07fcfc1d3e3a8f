"Notebooks are run with their outputs kept, but for cells that are not to be run; a failing one is left as it was."
import runpy
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook, new_output

ROOT = Path(__file__).parent.parent
main = runpy.run_path(str(ROOT / ".ci" / "execute.py"))["main"]
OLD = [new_output("stream", name="stdout", text="from another machine")]


def test_cells_that_are_not_to_be_run(tmp_path):
    path = tmp_path / "page.ipynb"
    cells = [new_code_cell("#| eval: false\n1 / 0", outputs=OLD), new_code_cell("from pathlib import Path\nprint(Path.cwd().name)"), new_code_cell("#| eval: false\n1 / 0", metadata={"tags": ["mine"]})]
    nbformat.write(new_notebook(cells=cells), path)
    assert main([str(path)]) == 0
    first, second, third = nbformat.read(path, 4).cells
    assert first.outputs == [] and "tags" not in first.metadata and third.metadata["tags"] == ["mine"]
    assert second.outputs[0]["text"].strip() == tmp_path.name


def test_a_failing_notebook_is_left_as_it_was(tmp_path):
    path = tmp_path / "page.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("1 / 0")]), path)
    before = path.read_bytes()
    with pytest.raises(CellExecutionError): main([str(path)])
    assert path.read_bytes() == before
