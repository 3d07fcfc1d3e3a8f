"The check of the site's sources: a good copy passes, each kind of damage is found and named."
import runpy
import shutil
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).parent.parent
ci = runpy.run_path(str(ROOT / ".ci" / "docs_check.py"))
check, slug = ci["check"], ci["slug"]
PNG = "iVBORw0KGgo="


def write(path: Path, *cells) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=list(cells)), path)


@pytest.fixture
def site(tmp_path) -> Path:
    "Two pages that are right: links of all kinds, a picture, a function."
    shutil.copy(ROOT / "_quarto.yml", tmp_path)
    source = tmp_path / "nbs"
    picture = new_output("display_data", {"image/png": PNG})
    write(source / "index.ipynb", new_markdown_cell("# Home\n\n> Where to begin.\n\n- order: 1"), new_markdown_cell("[method](core/one.ipynb), [part](core/one.ipynb#a-part-of-it), [function](core/one.html#cut), [here](#more), [web](https://example.org/x)\n\n## More"),
          new_code_cell('#| fig-alt: "A line."\ndraw()', outputs=[picture]), new_markdown_cell("![a dot](dot.png \"a title\")\n\n```\n[no](link.ipynb)\n# no heading\n```\n\n`[no](link.ipynb)`"))
    write(source / "core" / "one.ipynb", new_markdown_cell("# One"), new_markdown_cell("## A part: of *it*\n\n<a href=\"../index.ipynb\">home</a>"), new_code_cell("#| export\ndef cut(x): return x"))
    (source / "dot.png").write_bytes(b"dot")
    (source / "styles.css").write_text("")
    (source / "sidebar.yml").write_text("website:\n  sidebar:\n    contents:\n      - index.ipynb\n      - section: The method\n        contents:\n          - core/one.ipynb\n")
    shutil.copy(ROOT / "_quarto.yml", source / "_quarto.yml")
    return tmp_path


def faults(site: Path) -> list[str]: return check(site)[1]


def test_a_good_site_passes(site): assert check(site) == (2, [])


@pytest.mark.parametrize("markdown, said", [
    ("[x](none.ipynb)", "link to none.ipynb, which does not exist"),
    ("[x](none.html)", "link to none.html, which does not exist"),
    ("[x](core/one.ipynb#nowhere)", "link to core/one.ipynb#nowhere: no such heading"),
    ("[x](#nowhere)", "link to #nowhere: no such heading"),
    ("[x](#no-heading)", "link to #no-heading: no such heading"),
    ("[x](core/one.html#uncut)", "link to core/one.html#uncut: no such heading"),
    ("[x][y]\n\n[y]: none.ipynb", "link to none.ipynb, which does not exist"),
    ("[x](none.ipynb \"a title\")", "link to none.ipynb, which does not exist"),
    ("[x](../_quarto.yml)", "link to ../_quarto.yml, which is not on the site"),
    ("![x](none.png)", "link to none.png, which does not exist"),
    ("<img src=\"none.png\" alt=\"x\">", "link to none.png, which does not exist"),
    ("<a class='b' href='none.ipynb'>x</a>", "link to none.ipynb, which does not exist"),
    ("![x](attachment:none.png)", "picture attachment:none.png, which is not in the notebook"),
    ("![](dot.png)", "a picture without a text in its place in cell 2"),
])
def test_broken_links_and_pictures(site, markdown, said):
    write(site / "nbs" / "index.ipynb", new_markdown_cell("# Home"), new_markdown_cell(markdown + "\n\n```\n# no heading\n```"))
    [fault] = faults(site)
    assert fault.startswith("nbs/index.ipynb: ") and said in fault


@pytest.mark.parametrize("cell, said", [
    (new_code_cell("1 / 0", outputs=[new_output("error", ename="ZeroDivisionError", evalue="", traceback=[])]), "an error among the outputs of cell 2"),
    (new_code_cell("f()", outputs=[new_output("stream", name="stderr", text="beware")]), "a message on standard error among the outputs of cell 2"),
    (new_code_cell("draw()", outputs=[new_output("display_data", {"image/svg+xml": "<svg/>"})]), "a picture without #| fig-alt in cell 2"),
    (new_code_cell("print()", outputs=[new_output("stream", name="stdout", text="x" * 1_500_001)]), "more than 1,500,000"),
])
def test_bad_outputs(site, cell, said):
    write(site / "nbs" / "core" / "one.ipynb", new_markdown_cell("# One"), cell, new_markdown_cell("## A part of it"), new_code_cell("#| export\ndef cut(x): return x"))
    [fault] = faults(site)
    assert fault.startswith("nbs/core/one.ipynb: ") and said in fault


@pytest.mark.parametrize("first", ["no title", "## Second level", "#", "#hashtag"])
def test_a_page_without_a_title(site, first):
    write(site / "nbs" / "core" / "one.ipynb", new_markdown_cell(first), new_markdown_cell("## A part of it"), new_code_cell("#| export\ndef cut(x): return x"))
    assert faults(site) == ["nbs/core/one.ipynb: no title (# ...) in the first cell"]


@pytest.mark.parametrize("more", ["**A question?** An answer.", "> A second quote.", "## A part"])
def test_a_first_cell_that_nbdev_would_shorten(site, more):
    write(site / "nbs" / "core" / "one.ipynb", new_markdown_cell(f"# One\n\n> Kept.\n\n{more}"), new_markdown_cell("## A part of it"), new_code_cell("#| export\ndef cut(x): return x"))
    [fault] = faults(site)
    assert fault.startswith("nbs/core/one.ipynb: text in the first cell that nbdev drops from the site")


def test_nbdev_really_drops_it(tmp_path):
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor
    write(tmp_path / "a.ipynb", new_markdown_cell("# One\n\n> Kept.\n\nLost."), new_markdown_cell("Here."))
    done = NBProcessor(tmp_path / "a.ipynb", procs=[FrontmatterProc])
    done.process()
    text = "\n".join(c.source for c in done.nb.cells if c.source)
    assert "Kept." in text and "Here." in text and "Lost." not in text


def test_the_sidebar_has_every_page_once(site):
    sidebar = site / "nbs" / "sidebar.yml"
    good = sidebar.read_text()
    sidebar.write_text(good.replace("          - core/one.ipynb\n", "          - core/two.ipynb\n"))
    assert faults(site) == ["nbs/sidebar.yml names core/two.ipynb, which does not exist", "nbs/core/one.ipynb is not in nbs/sidebar.yml"]
    sidebar.write_text(good + "          - text: again\n            href: core/one.ipynb\n      - href: https://example.org\n")
    assert faults(site) == ["nbs/sidebar.yml names core/one.ipynb 2 times"]


@pytest.mark.parametrize("line, said", [("  search: true\n", "website: search"), ("  page-navigation: true\n", "website: page-navigation"), ("      dark: darkly\n", "theme: light and dark"),
                                        ("metadata-files: [nbdev.yml, sidebar.yml]", "metadata-files"), ("  repo-url: ", "website: repo-url"), ("    html-math-method: katex\n", "html-math-method")])
def test_settings_of_the_site(site, line, said):
    path = site / "nbs" / "_quarto.yml"
    text = path.read_text()
    assert line in text
    path.write_text("".join(x for x in text.splitlines(True) if not x.startswith(line.rstrip("\n"))))
    assert any(said in f and "lacks" in f for f in faults(site)), faults(site)
    (site / "nbs" / "styles.css").unlink()
    assert "nbs/_quarto.yml names styles.css, which does not exist" in faults(site)


@pytest.mark.parametrize("heading, anchor", [("Figures 5 and 8: the tree", "figures-5-and-8-the-tree"), ("What `push` says", "what-push-says"), ("[A link](x.ipynb) in it", "a-link-in-it"),
                                             ("Named {#mine}", "mine"), ("2. Second", "second"), ("Théorème", "théorème"), ("1", "section"), ("a - b", "a---b")])
def test_anchors_are_pandocs(heading, anchor): assert slug(heading) == anchor


def test_equal_headings_are_numbered(site):
    write(site / "nbs" / "index.ipynb", new_markdown_cell("# Home"), new_markdown_cell("## Same\n\n## Same\n\n[x](#same-1)"))
    assert faults(site) == []
