"The page that shows paper and code side by side: its lines are the package's, its tests exist, Eq. 1 is what it says; and the moving picture."
import re
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path

import nbformat
import pytest
import torch

from treelora.paper.side_by_side import LOSSES, STEPS, beside_paper, check_test, lines_of, one_round
from treelora.tree import cut

ROOT = Path(__file__).parent.parent
PAGE = nbformat.read(ROOT / "nbs" / "paper" / "08_side_by_side.ipynb", 4)
SHOWN = [c for c in PAGE.cells if c.cell_type == "code" and re.search(r"^show\(", c.source, re.M)]


@pytest.mark.parametrize("seed", range(20))
def test_l1_is_equation_1(seed):
    "Word for word: the mean row, the L1 distance to it, the median, and who lies at most so far."
    n, width = 3 + seed % 8, 1 + seed % 5
    rows = torch.randn(n, width, generator=torch.Generator().manual_seed(seed)).double()
    mean = [sum(row[i].item() for row in rows) / n for i in range(width)]
    scores = [sum(abs(row[i].item() - mean[i]) for i in range(width)) for row in rows]
    ordered = sorted(scores)
    median = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    left, made = cut(rows, "l1")
    assert made.threshold == pytest.approx(median)
    if min(abs(s - median) for s in scores) > 1e-9 or n % 2:
        assert [l for l, s in zip(left.tolist(), scores) if abs(s - median) > 1e-9] == [s <= median for s in scores if abs(s - median) > 1e-9]


def test_every_equation_and_line_is_there():
    assert len(SHOWN) > 20
    text = "\n".join(c.source for c in PAGE.cells if c.cell_type == "markdown")
    assert [f"## {name}" in text for name in ("Eq. 1", "Eq. 2", "Eq. 3", "Algorithm 1")] == [True] * 4
    assert re.findall(r"\*\*(\d)\.", text) == list("123456789")


@pytest.mark.parametrize("cell", SHOWN, ids=lambda c: re.search(r'"([\w.:]+)"', c.source)[1])
def test_the_page_shows_the_package_as_it_is(cell):
    "Run nbs/paper/08_side_by_side.ipynb again where this fails."
    made = eval(re.sub(r"^#\|.*\n", "", cell.source, flags=re.M), {"show": partial(beside_paper, tests=ROOT / "tests")})
    assert "".join(cell.outputs[0]["data"]["text/markdown"]) == made._repr_markdown_()


def test_what_is_gone_is_named():
    with pytest.raises(ValueError, match="no line that begins with 'while'"): lines_of("treelora.sparse:ramp", "while")
    with pytest.raises(ValueError, match="no test test_tree.py::test_x"): check_test("test_tree.py::test_x", ROOT / "tests")
    assert lines_of("treelora.sparse:ramp").startswith("def ramp(")


@pytest.mark.parametrize("shape", ["svg", "narrow"])
def test_the_moving_picture_is_whole_and_loads_nothing(shape):
    svg = getattr(one_round(), shape)
    root = ET.fromstring(svg)
    words = [e.text for e in root.iter() if e.tag.endswith("text")]
    assert all(any(step in w for w in words) for step in STEPS) and sum(w.startswith("task ") for w in words) == 2 * len(LOSSES)
    moving = [e for e in root.iter() if e.tag.endswith("animate")]
    assert moving and len({e.get("dur") for e in moving}) == 1 and len(svg) < 30_000
    assert not re.search(r"href|url\(|<script", svg)


def test_a_screen_shows_one_shape_of_the_moving_picture():
    html = one_round()._repr_html_()
    names = re.findall(r'<svg class="([\w-]+)"', html)
    style = re.search(r"<style>(.*)</style>", html)[1]
    everywhere, narrow = style.split("@media(max-width:600px)")
    assert len(names) == 2 and f".{names[1]}{{display:none}}" in everywhere and f".{names[0]}{{display:none}}" in narrow and f".{names[1]}{{display:block}}" in narrow
