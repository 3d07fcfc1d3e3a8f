"Pages built without Quarto: what of a notebook is shown, and how; which pages are looked at; the table of findings. No browser and no pandoc is needed here."
import json
import os
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / ".ci"))
pages, look, process = (runpy.run_path(str(ROOT / ".ci" / f"docs_{name}.py")) for name in ("html", "look", "process"))
PNG = "iVBORw0KGgo="


def code(source: str, *outputs) -> dict: return {"cell_type": "code", "source": source.splitlines(True), "outputs": list(outputs)}


def data(kind: str, value: str) -> dict: return {"output_type": "display_data", "data": {kind: value, "text/plain": "plain"}}


def shown(folder: Path, cell: dict) -> str: return pages["code_cell"](cell, folder, "cell-1")


def test_code_is_shown_folded_or_hidden(tmp_path):
    assert "``` {.python .cell-code}\nx = 1\n```" in shown(tmp_path, code("x = 1")) and "<details" not in shown(tmp_path, code("x = 1"))
    assert '<details class="code-fold">\n<summary>Code</summary>' in shown(tmp_path, code("#| code-fold: true\nx = 1"))
    opened = shown(tmp_path, code('#| code-fold: show\n#| code-summary: "Exported source"\nx = 1'))
    assert '<details class="code-fold" open>\n<summary>Exported source</summary>' in opened and "#|" not in opened
    assert shown(tmp_path, code("#| include: false\nx = 1", data("text/markdown", "a"))) == ""
    assert "x = 1" not in shown(tmp_path, code("#| echo: false\nx = 1", data("text/markdown", "a")))
    assert "`````" not in shown(tmp_path, code("x = 1")) and "````` {.python" in shown(tmp_path, code("x = '````'"))


def test_outputs_are_the_best_of_their_kinds(tmp_path):
    assert shown(tmp_path, code("#| echo: false\n#| output: asis\nx", data("text/markdown", "### f"))) == "### f"
    assert "**a**" in shown(tmp_path, code("x", data("text/markdown", "**a**"))) and "plain" not in shown(tmp_path, code("x", data("text/markdown", "**a**")))
    assert "```` {=html}" not in shown(tmp_path, code("x", data("text/html", "<b>a</b>"))) and "{=html}\n<b>a</b>" in shown(tmp_path, code("x", data("text/html", "<b>a</b>")))
    assert "said\n" in shown(tmp_path, code("x", {"output_type": "stream", "name": "stdout", "text": ["said\n"]}))
    assert "a" not in shown(tmp_path, code("#| output: false\nx", data("text/markdown", "a"))).replace("cell", "").replace("python", "").replace("code", "")


def test_a_picture_becomes_a_file_with_its_text_and_caption(tmp_path):
    folder = tmp_path / "one_files"
    made = shown(folder, code('#| fig-alt: "A line, \\"up\\"."\n#| fig-cap: What $x$ does.\ndraw()', data("image/png", PNG)))
    assert (folder / "cell-1-1.png").read_bytes().startswith(b"\x89PNG")
    assert 'src="one_files/cell-1-1.png"' in made and 'alt="A line, &quot;up&quot;."' in made and "{.figure-caption}\nWhat $x$ does." in made


def test_front_matter_is_taken_off(tmp_path):
    matter, body = pages["markdown"]({"cells": [{"cell_type": "raw", "source": "---\ntitle: One\ndescription: It is.\n---\n"}, {"cell_type": "markdown", "source": ["## A\n", "text"]}]}, tmp_path)
    assert matter == {"title": "One", "description": "It is."} and body == "## A\ntext"


def test_addresses_within_the_site():
    made = pages["rooted"]('<a href="../core/one.ipynb#a">a</a> <a href="https://x.org/y.ipynb">b</a> <a href="/index.ipynb">c</a> <img src="/badge.svg">', "../")
    assert made == '<a href="../core/one.html#a">a</a> <a href="https://x.org/y.ipynb">b</a> <a href="../index.html">c</a> <img src="../badge.svg">'


def test_callouts_get_a_head():
    made = pages["callouts"]('<div class="callout-tip" data-collapse="true">\n<h2 id="solution">Solution</h2>\n<p>It is so.</p>\n</div>')
    assert 'class="callout callout-style-default callout-tip callout-titled"' in made and "<h2" not in made and made.count("<div") == made.count("</div>")


def test_pages_are_named_as_in_the_sidebar():
    assert look["names"](["core/00_nano", "nbs/index.ipynb", "404"]) == ["core/00_nano.ipynb", "index.ipynb", "404.qmd"]
    everything = look["names"]([])
    assert {"index.ipynb", "404.qmd", *(f"{name}.ipynb" for name in look["SHOWN"])} <= set(everything)
    with pytest.raises(SystemExit, match="core/none: no such page"): look["names"](["core/none"])


def test_no_browser_is_said_in_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="docs-look needs Debian's chromium: apt-get install chromium."): look["browser"]()


def test_the_table_counts_by_page_and_kind():
    lines = look["table"]({"a.ipynb": [("wide", "cut code", "x"), ("phone", "cut code", "y"), ("phone", "axe", "z")], "b.ipynb": []}).splitlines()
    assert [line.split() for line in lines] == [["page", "wide", "cut", "picture", "raw", "console", "host", "axe", "dark"], ["a.ipynb", "2", "1"], ["1", "of", "2", "pages", "2", "1"]]


def test_only_what_is_newer_is_processed_anew(tmp_path):
    stale, name = process["stale"], "core/00_nano.ipynb"
    assert stale(name, tmp_path)
    (tmp_path / "core").mkdir()
    (tmp_path / name).write_text(json.dumps({}))
    assert not stale(name, tmp_path)
    os.utime(tmp_path / name, (0, 0))
    assert stale(name, tmp_path)
