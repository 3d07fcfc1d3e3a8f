"The ratchet of sizes: equal passes, worse fails and is named, better is said and can be recorded."
import json
import runpy
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / ".ci"))
ci = runpy.run_path(str(ROOT / ".ci" / "limits.py"))
compare, measure, limit_faults, circles, lowered = (ci[name] for name in ("compare", "measure", "limit_faults", "circles", "lowered"))
PICTURE = new_output("display_data", {"image/png": "iVBORw0KGgo="})
CODE = "a = 1\nb = 2\nc = 3"


def write(path: Path, *sources: str, picture: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [new_markdown_cell("# A page"), *map(new_code_cell, sources)]
    if picture: cells[-1].outputs = [PICTURE]
    nbformat.write(new_notebook(cells=cells), path)


@pytest.fixture
def root(tmp_path) -> Path:
    "A checkout with two pages and a package, and its limits."
    write(tmp_path / "nbs" / "core" / "one.ipynb", CODE, "#| export\n" + CODE + "\n\nd = 4  " + "#" * 100)
    write(tmp_path / "nbs" / "cli" / "two.ipynb", CODE, picture=False)
    package = tmp_path / "treelora"
    (package / "methods").mkdir(parents=True)
    for name, text in {"__init__": "", "a": "from treelora.b import x\n", "b": "x = 1\n", "c": "import torch\nfrom .b import x\n", "methods/__init__": "", "methods/base": "from ..a import x\n"}.items():
        (package / f"{name}.py").write_text(text)
    (tmp_path / ".ci").mkdir()
    record(tmp_path)
    return tmp_path


def record(root: Path) -> None: (root / ".ci" / "limits.json").write_text(json.dumps(measure(root)[0]))
def old(root: Path) -> dict: return json.loads((root / ".ci" / "limits.json").read_text())


def test_what_was_recorded_passes(root):
    assert compare(old(root), *measure(root)) == ([], [])
    limits = old(root)
    assert limits["cells"] == {"all": {"longest": 4, "90th percentile": 4, "median": 3}, "nbs/cli": {"longest": 3, "90th percentile": 3, "median": 3}, "nbs/core": {"longest": 4, "90th percentile": 4, "median": 3}}
    assert (limits["widest line"], limits["lines over 100"], limits["longest module"]) == ({"all code": 107, "shown code": 5}, 1, 2)
    assert (limits["import circles"], limits["pages without a picture"]) == ([], ["nbs/cli/two.ipynb"])


@pytest.mark.parametrize("source, said", [
    (CODE + "\nd = 4\ne = 5", "cells/nbs/core/longest: 5, recorded are 4 (nbs/core/one.ipynb, cell 2)"),
    ("x = '" + "y" * 80 + "'", "widest line/shown code: 86, recorded are 5 (nbs/core/one.ipynb, cell 2)"),
    ("#| hide\nx = '" + "y" * 200 + "'", "widest line/all code: 206, recorded are 107 (nbs/core/one.ipynb, cell 2)"),
    ("#| hide\nx = '" + "y" * 98 + "'", "lines over 100: 2, recorded are 1"),
])
def test_a_cell_that_grew_is_named(root, source, said):
    write(root / "nbs" / "core" / "one.ipynb", source, "#| export\n" + CODE + "\nd = 4  " + "#" * 100)
    assert said in limit_faults(root)


def test_many_longer_cells_move_median_and_percentile(root):
    write(root / "nbs" / "core" / "one.ipynb", *[CODE + "\nd = 4"] * 9)
    said = limit_faults(root)
    assert "cells/nbs/core/median: 4, recorded are 3" in said and not any("longest" in x for x in said)


def test_directives_and_empty_lines_are_no_code(root):
    write(root / "nbs" / "core" / "one.ipynb", "#| fig-alt: " + "x" * 300 + "\n\n\n" + CODE, "#| export\n" + CODE + "\nd = 4  " + "#" * 100)
    assert limit_faults(root) == []


@pytest.mark.parametrize("source", ["from treelora.a import x", "import treelora.a", "from treelora import a", "from . import a", "def f():\n    from .a import x",
                                    "from importlib import import_module\nimport_module('treelora.a')", "import importlib\ndef f(): return importlib.import_module('treelora.a')"])
def test_every_way_to_import_closes_a_circle(root, source):
    (root / "treelora" / "b.py").write_text(source + "\n")
    assert circles(root / "treelora") == [["a", "b"]]
    assert any(x.startswith("import circle: a and b import each other") for x in limit_faults(root))


def test_a_long_way_round_and_a_module_of_a_folder(root):
    (root / "treelora" / "b.py").write_text("from treelora.methods.base import x\n")
    assert circles(root / "treelora") == [["a", "b", "methods.base"]]


def test_what_closes_no_circle(root):
    (root / "treelora" / "b.py").write_text('"""import treelora.a"""\nimport a\nfrom other.a import x\n')
    assert circles(root / "treelora") == []


def test_a_known_circle_may_shrink_and_not_grow(root):
    (root / "treelora" / "b.py").write_text("import treelora.a\n")
    record(root)
    assert limit_faults(root) == []
    (root / "treelora" / "b.py").write_text("import treelora.c\nimport treelora.a\n")
    assert any("a and b and c import each other" in x for x in limit_faults(root))
    (root / "treelora" / "b.py").write_text("x = 1\n")
    assert "import circle: a and b is gone" in compare(old(root), *measure(root))[1]


def test_pages_without_a_picture(root):
    write(root / "nbs" / "core" / "one.ipynb", CODE, "#| export\n" + CODE + "\nd = 4  " + "#" * 100, picture=False)
    assert limit_faults(root) == ["nbs/core/one.ipynb: a page of nbs/core without a picture"]
    write(root / "nbs" / "cli" / "three.ipynb", CODE, picture=False)
    assert limit_faults(root)[1:] == ["pages without a picture outside nbs/core: 2, recorded are 1 (new: nbs/cli/three.ipynb)"]
    write(root / "nbs" / "cli" / "two.ipynb", CODE)
    assert limit_faults(root) == ["nbs/core/one.ipynb: a page of nbs/core without a picture"]
    assert "nbs/cli/two.ipynb: has a picture now" in compare(old(root), *measure(root))[1]


@pytest.mark.parametrize("markdown, counts", [("![a tree](tree.png)", True), ("<img src='tree.png' alt='a tree'>", True), ("[![Colab](https://example.org/badge.svg)](https://example.org)", False), ("`no picture`", False)])
def test_a_badge_is_no_picture(root, markdown, counts):
    nbformat.write(new_notebook(cells=[new_markdown_cell("# A page"), new_markdown_cell(markdown), new_code_cell(CODE)]), root / "nbs" / "cli" / "two.ipynb")
    assert ("nbs/cli/two.ipynb" not in measure(root)[0]["pages without a picture"]) == counts


def test_a_longer_module_is_named(root):
    (root / "treelora" / "b.py").write_text("x = 1\n" * 50)
    (root / "treelora" / "_modidx.py").write_text("x = 1\n" * 99)  # nbdev's index of the package does not count
    assert limit_faults(root) == ["longest module: 50, recorded are 2 (treelora/b.py)"]


def test_a_new_folder_wants_a_limit(root):
    write(root / "nbs" / "new" / "page.ipynb", CODE)
    assert any(x.startswith("cells/nbs/new/longest: 3, and .ci/limits.json has no limit for it") for x in limit_faults(root))


@pytest.fixture
def main(root, monkeypatch):
    "The command, on the small checkout."
    run = ci["main"]
    monkeypatch.setitem(run.__globals__, "ROOT", root)
    return run


def test_the_command_passes_and_says_what_got_better(root, main, capsys):
    assert main(False) == 0 and capsys.readouterr().out == ""
    write(root / "nbs" / "core" / "one.ipynb", "a = 1")
    before = old(root)
    assert main(False) == 0
    assert "Better than recorded: run .ci/limits.py --write" in capsys.readouterr().out and old(root) == before
    assert main(True) == 0 and old(root)["cells"]["nbs/core"]["longest"] == 1
    write(root / "nbs" / "core" / "one.ipynb", CODE)
    assert main(False) == 1 and "cells/nbs/core/longest: 3, recorded are 1 (nbs/core/one.ipynb, cell 2)" in capsys.readouterr().err


def test_the_command_never_records_what_got_worse(root, main, capsys):
    before = old(root)
    (root / "treelora" / "b.py").write_text("x = 1\n" * 50)
    write(root / "nbs" / "core" / "one.ipynb", "a = 1")
    assert main(True) == 1 and "Nothing was recorded" in capsys.readouterr().err and old(root) == before


def test_the_command_writes_what_is_missing(root, main):
    (root / ".ci" / "limits.json").unlink()
    assert main(True) == 0 and old(root) == measure(root)[0]
    write(root / "nbs" / "new" / "page.ipynb", CODE)
    assert main(False) == 1
    assert main(True) == 0 and main(False) == 0


def test_lowered_takes_the_smaller_number():
    assert lowered({"a": {"b": 3, "c": 1}, "d": ["x", "y"]}, {"a": {"b": 2, "c": 4}, "d": ["x"], "e": 5}) == {"a": {"b": 2, "c": 1}, "d": ["x"], "e": 5}


def test_the_checkout_keeps_to_its_limits(): assert limit_faults(ROOT) == []
