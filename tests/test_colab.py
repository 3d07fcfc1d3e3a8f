"The twin for Colab: it agrees with its page, leaves out what it must, and runs where only torch and matplotlib are."
import os
import runpy
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).parent.parent
ci = runpy.run_path(str(ROOT / ".ci" / "colab.py"))
BLOCKED = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("treelora", "nbdev", "fastcore"): raise ImportError(name)
sys.meta_path.insert(0, Missing())
"""


@pytest.fixture
def site(tmp_path) -> Path:
    "A small page and its twin."
    cells = [new_markdown_cell("# A page\n\n> What it is."),
             new_markdown_cell("[![badge](https://x.org/b.svg)](https://x.org/c)\n\n[a](01_a.ipynb#here) [b](../b/02_b.ipynb)"),
             new_code_cell("#| hide\nimport secret"), new_code_cell('#| fig-alt: "A dot."\nprint(1)'),
             new_markdown_cell("## 1. One"), new_code_cell("x = 1"),
             new_markdown_cell("## 2. Two\n\nwith the package"), new_code_cell("from treelora.tree import TaskTree"), new_code_cell("TaskTree()"),
             new_markdown_cell("A table.\n\n## Exercises\n\n::: {.callout-tip collapse=\"true\" title=\"Solutions\"}\nNone.\n:::")]
    (tmp_path / "nbs" / "core").mkdir(parents=True)
    nbformat.write(new_notebook(cells=cells), tmp_path / "nbs" / ci["PAGE"])
    assert ci["main"](False, tmp_path) == 0
    return tmp_path


def cells_of(root: Path) -> list: return nbformat.read(root / ci["TWIN"], 4).cells


def test_the_twin_agrees_with_its_page(): assert ci["main"](True) == 0


def test_a_twin_that_differs_or_is_missing_is_named(site, capsys):
    assert ci["main"](True, site) == 0
    page = nbformat.read(site / "nbs" / ci["PAGE"], 4)
    page.cells[5].source = "x = 2"
    nbformat.write(page, site / "nbs" / ci["PAGE"])
    assert ci["main"](True, site) == 1 and "colab/treelora_nano.ipynb differs" in capsys.readouterr().err
    (site / ci["TWIN"]).unlink()
    assert ci["main"](True, site) == 1


def test_what_the_twin_has_and_has_not(site):
    cells = cells_of(site)
    code = [c.source for c in cells if c.cell_type == "code"]
    assert code == ["%pip install -q torch matplotlib", "print(1)", "x = 1"]
    text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    assert "(https://treelora-companion.github.io/treelora-companion/core/a.html#here)" in text
    assert "(https://treelora-companion.github.io/treelora-companion/b/b.html)" in text
    assert "## 2. Two\n\nThis part needs the package." in text and "with the package" not in text
    assert "## Exercises" in text and "**Solutions**" in text and ":::" not in text and "badge" not in text


@pytest.mark.slow
def test_the_twin_runs_without_the_package(tmp_path):
    code = [c.source for c in cells_of(ROOT) if c.cell_type == "code"]
    script = tmp_path / "twin.py"
    script.write_text("\n".join([BLOCKED, *(c for c in code if not c.startswith("%pip"))]), encoding="utf-8")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the last task" in done.stdout
