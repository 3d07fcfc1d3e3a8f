"How long the core pages take to read: what counts as a word, what as a shown line, and when it is too much."
import runpy
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / ".ci"))
ci = runpy.run_path(str(ROOT / ".ci" / "reading_time.py"))
words, page, report = (ci[name] for name in ("words", "page", "report"))
FOLDED = '::: {.callout-tip collapse="true" title="Solutions"}\nnobody counts these words\n:::\n'


def write(path: Path, *cells) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=list(cells)), path)
    return path


@pytest.mark.parametrize("text, n", [
    ("Two words.", 2), ("A [link text](https://example.org/long/address) here", 4), ("so $a + b$ is", 3), ("$$ a + b $$", 1),
    ("one\n\n```python\nx = 1\n```", 1), ("[![Run](https://a/b.svg)](https://c/d) now", 1), ("before\n\n" + FOLDED + "\nafter", 2),
])
def test_words(text, n):
    assert words(text) == n


def test_only_shown_lines_and_captions_count(tmp_path):
    cells = [new_code_cell(x) for x in ("a = 1\n\nb = 2", "#| hide\nc = 3", "#| export\nd = 4", "#| exports\ne = 5", "#| code-fold: true\n#| fig-cap: \"Three more words.\"\nf = 6")]
    assert page(write(tmp_path / "x.ipynb", new_markdown_cell("One two"), *cells)) == (5, 3)


def test_minutes_of_all_pages(tmp_path):
    write(tmp_path / "nbs" / "core" / "a.ipynb", new_markdown_cell("word " * 400))
    write(tmp_path / "nbs" / "core" / "b.ipynb", new_code_cell("\n".join(f"x{i} = {i}" for i in range(24))))
    write(tmp_path / "nbs" / "theory" / "c.ipynb", new_markdown_cell("word " * 400))
    lines, total = report(tmp_path)
    assert total == 4 and [x.split()[0] for x in lines] == ["a.ipynb", "b.ipynb", "all"] and "4.0 minutes" in lines[-1]
