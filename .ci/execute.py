"""Run notebooks from top to bottom and keep their outputs, pictures inline: `python .ci/execute.py nbs/core/04_tree.ipynb ...`.

Cells with `#| eval: false` stay as they are; the first of them installs the package where a notebook is opened by itself."""
import os, re, sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

SKIP = "skip-execution"  # nbclient's tag for it
WIDGET = "application/vnd.jupyter.widget-view+json"  # a progress bar, which is empty without the kernel that drew it


def execute(path: Path) -> None:
    "Run one notebook in its own folder. Raises CellExecutionError, and leaves the file as it was, when a cell fails."
    nb = nbformat.read(path, 4)
    resting = [c for c in nb.cells if c.cell_type == "code" and re.search(r"^#\| *eval: *false", c.source, re.M)]
    tags = [list(c.metadata.get("tags", [])) for c in resting]
    for cell, old in zip(resting, tags): cell.metadata["tags"], cell["outputs"] = [*old, SKIP], []
    NotebookClient(nb, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell, old in zip(resting, tags): cell.metadata.pop("tags") if not old else cell.metadata.update(tags=old)
    for cell in nb.cells:
        if cell.cell_type == "code": cell["outputs"] = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
    nbformat.write(nb, path)


def main(names: list[str]) -> int:
    os.environ.pop("MPLBACKEND", None)  # pictures belong into the notebook
    for name in names: execute(Path(name))
    return 0


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
