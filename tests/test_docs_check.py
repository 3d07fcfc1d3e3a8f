"The check of the site's sources: a good copy passes, each kind of damage is found and named."
import runpy
import shutil
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).parent.parent
ci = runpy.run_path(str(ROOT / ".ci" / "docs_check.py"))
check, slug, rendered_faults = ci["check"], ci["slug"], ci["rendered_faults"]
PNG = "iVBORw0KGgo="
PICTURE = new_output("display_data", {"image/png": PNG})


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
    for name in ("styles.css", "theme.scss", "site.lua", "favicon.svg", "card.png", "claims.json", "llms.txt", "vendor/katex/katex.min.js"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("")
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


def test_links_among_outputs(site):
    write(site / "nbs" / "index.ipynb", new_markdown_cell("# Home"), new_code_cell("table()", outputs=[new_output("display_data", {"text/markdown": "| [one](core/one.ipynb) | [two](core/two.ipynb) |"})]))
    assert faults(site) == ["nbs/index.ipynb: link to core/two.ipynb, which does not exist"]


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


@pytest.mark.parametrize("line, said", [("  search: true\n", "website: search"), ("  page-navigation: true\n", "website: page-navigation"), ("      dark: [darkly, theme.scss]\n", "theme: light and dark"),
                                        ("metadata-files: [nbdev.yml, sidebar.yml]", "metadata-files"), ("  repo-url: ", "website: repo-url"), ("    html-math-method: {method: katex, url: /vendor/katex/}\n", "html-math-method")])
def test_settings_of_the_site(site, line, said):
    path = site / "nbs" / "_quarto.yml"
    text = path.read_text()
    assert line in text
    path.write_text("".join(x for x in text.splitlines(True) if not x.startswith(line.rstrip("\n"))))
    assert any(said in f and "lacks" in f for f in faults(site)), faults(site)
    for name in ("styles.css", "theme.scss", "site.lua", "favicon.svg", "card.png"):
        (site / "nbs" / name).unlink()
        assert f"nbs/_quarto.yml names {name}, which does not exist" in faults(site)


@pytest.mark.parametrize("heading, anchor", [("Figures 5 and 8: the tree", "figures-5-and-8-the-tree"), ("What `push` says", "what-push-says"), ("[A link](x.ipynb) in it", "a-link-in-it"),
                                             ("Named {#mine}", "mine"), ("2. Second", "second"), ("Théorème", "théorème"), ("1", "section"), ("a - b", "a---b")])
def test_anchors_are_pandocs(heading, anchor): assert slug(heading) == anchor


def test_equal_headings_are_numbered(site):
    write(site / "nbs" / "index.ipynb", new_markdown_cell("# Home"), new_markdown_cell("## Same\n\n## Same\n\n[x](#same-1)"))
    assert faults(site) == []


def page(site: Path, *cells) -> list[str]:
    "The faults of a site whose second page has these cells, too."
    write(site / "nbs" / "core" / "one.ipynb", new_markdown_cell("# One"), *cells, new_markdown_cell("## A part of it"), new_code_cell("#| export\ndef cut(x): return x"))
    return [f.removeprefix("nbs/core/one.ipynb: ") for f in faults(site)]


def shown(text: str, kind: str = "text/plain"): return new_output("display_data", {kind: text})


@pytest.mark.parametrize("cell", [
    new_code_cell('#| fig-alt: "Three grids: letters and digits."\n#| fig-cap: A plain caption\ndraw()', outputs=[PICTURE]),
    new_code_cell("#| fig-cap: 'An animation'\ndraw()", outputs=[shown("<svg></svg>", "text/html")]),
    new_code_cell("#| export\n#| eval: false\n# #| fig-cap: a comment\nx = 1"),
    new_code_cell("#| hide\n#| slow\nx = 1"),
    new_code_cell("#| filter_stream Warning\n#| code-fold: true\nx = 1"),
    new_code_cell("#| hide\nf", outputs=[shown("<function f at 0x7f00>")]),
    new_code_cell("print('<function>, an object at last, __name__')", outputs=[new_output("stream", name="stdout", text="<function>, an object at last, __name__, key=<factory>")]),
    new_code_cell("#| fig-alt: A tree.\ntree", outputs=[new_output("display_data", {"text/plain": "<tree.Tree object>", "image/svg+xml": "<svg/>"})]),
    new_code_cell("x = '" + "y" * 88 + "'\n" + "#" * 95),
    new_code_cell("#| export\nx = '" + "y" * 200 + "'"),
    new_code_cell('#| hide\n#| fig-alt: "' + "y" * 200 + '"\nx = 1'),
    new_code_cell("#| echo: false\nx = '" + "y" * 200 + "'"),
    new_code_cell("#| export\ndef f(\n    tree,  # a TaskTree\n    name='#`',\n):\n    return tree  # `tree` itself"),
    new_markdown_cell("- The term (d), or a) and b).\n- (see below) and\n\n$$\n\\begin{aligned} a &= b, \\\\\n\\alpha &= c \\\\\\beta \\end{aligned}\n$$"),
    new_code_cell('design = "DESIGN"  # Sec. 3.2 and Eq. 2, an error of 0.4 (2.75 at most)\nf(2.6)'),
    new_markdown_cell("See Sec. 3.2, Eq. 2, Tab. 8 and (App. C). A value (2.64), $f(2.7)$, $(2.7)$, x(2.7), (10.5), (0.5). README.md is there only if it exists: no."),
    new_markdown_cell("::: {.callout-note}\nInside.\n\n:::: {.column}\nx\n::::\n:::\n\n| a | b |\n|---|---:|\n| `x|y` | $|z|$ |\n\nOne costs \\$5; $a < b$; `$HOME`; <https://example.org>, `<name>`, x < y.\n\n$$\na\n$$"),
])
def test_cells_that_keep_to_the_rules(site, cell):
    (site / "README.md").write_text("# Home\n")
    assert page(site, cell) == []


@pytest.mark.parametrize("source, said", [
    ("#| fig-alt: Three grids: letters and digits.\nx = 1", "cell 2: the block of #| lines is not YAML (mapping values are not allowed here)"),
    ('#| fig-alt: "The \\lambda of each task."\nx = 1', "cell 2: the block of #| lines is not YAML"),
    ('#| fig-alt: "Half\nx = 1', "cell 2: the block of #| lines is not YAML"),
    ("#| label: a\n#| tags: [a, b\nx = 1", "cell 2: the block of #| lines is not YAML"),
    ("#| fig-alt:\nx = 1", "cell 2: #| fig-alt says nothing"),
    ("#| fig-alt: 3\nx = 1", "cell 2: #| fig-alt says nothing"),
    ("#| fig-alt: Task #3 of # five\nx = 1", "cell 2: #| fig-alt is cut short to 'Task'"),
    ("#| exprot\nx = 1", "cell 2: '#| exprot': neither nbdev nor Quarto knows this line"),
    ("x = 1\n#| fig-alt: A line.", "cell 2: '#| fig-alt: A line.' stands below the code"),
    ("x = '" + "y" * 91 + "'", "cell 2: 1 lines of code wider than 95 characters (up to 97)"),
    ("#| exports\nx = '" + "y" * 91 + "'", "cell 2: 1 lines of code wider than 95 characters (up to 97)"),
    ("x = 1  # as DESIGN 2.6 has it", "cell 2: 'DESIGN 2.6' is cited, which a reader does not have"),
    ('#| export\ndef f():\n    "Descends (DESIGN 2.7)."', "cell 2: 'DESIGN 2.7' is cited, which a reader does not have"),
    ('#| hide\nclass A:\n    "See PAPER.md."', "cell 2: 'PAPER.md' is cited, which a reader does not have"),
    ("#| export\ndef f(\n    tree,  # a `TaskTree`\n): return tree", "cell 2: backticks in the comment of a parameter: 'a `TaskTree`'"),
    ('#| export\ndef f():\n    """Outside [0,\n    1]."""', "cell 2: the first line of a docstring leaves something open: 'Outside [0,'"),
    ("x = 1  # routed (2.7)", "cell 2: '(2.7)' is cited, which a reader does not have"),
])
def test_code_that_breaks_a_rule(site, source, said):
    [fault] = page(site, new_code_cell(source))
    assert fault.startswith(said)


def test_the_paper_itself_is_no_file_of_ours(site):
    (site / "PLAN.md").write_text("there")
    assert page(site, new_markdown_cell("See PLAN.md and NOTES.md.")) == ["cell 2: 'NOTES.md' is cited, which a reader does not have: cite the paper, link to a page, or leave it out"]


def test_outputs_of_a_cell_that_is_not_to_be_run(site):
    cell = new_code_cell("#| hide\n#| eval: false\n%pip install x", outputs=[new_output("stream", name="stdout", text="no network")])
    [fault] = page(site, cell)
    assert fault.startswith("cell 2: outputs of a cell with #| eval: false")
    cell.outputs = []
    assert page(site, cell) == []


@pytest.mark.parametrize("kind", ["application/javascript", "application/vnd.jupyter.widget-view+json"])
def test_outputs_that_need_scripts_of_other_hosts(site, kind):
    [fault] = page(site, new_code_cell("bar()", outputs=[new_output("display_data", {kind: "{}", "text/plain": "0%"})]))
    assert fault.startswith(f"cell 2: an output of the kind {kind}")


@pytest.mark.parametrize("text, said", [
    ("- $x$ is one.\n- (d) is another.", "cell 2: an item that begins with (d)"), ("1. a) is one.", "cell 2: an item that begins with a)"),
    ("It costs $200 \\\\cdot 768^2$ numbers.", "cell 2: a formula with two backslashes before a name: '\\\\\\\\cdot'"),
])
def test_markdown_that_pandoc_reads_otherwise(site, text, said):
    [fault] = page(site, new_markdown_cell(text))
    assert fault.startswith(said)


def test_signatures_as_nbdev_shows_them():
    shown_as = "### f\n\n```python\n\ndef f(\n    tree, # a [`TaskTree`](https://example.org/tree.html)\n    ax:NoneType=None, # or [0, 1](a)\n)\n```\n\n*See [`g`](https://example.org/g.html).*"
    found = rendered_faults(new_notebook(cells=[new_code_cell("", outputs=[new_output("display_data", {"text/markdown": shown_as})])]))
    assert [f.split(":", 1)[1].strip()[:30] for f in found] == ["a raw link in a signature: '# ", "'ax:NoneType=None' in a signat"]


@pytest.mark.parametrize("outputs, source", [([], "draw()"), ([shown("<Figure size 640x480 with 1 Axes>")], "draw()"), ([shown("<table></table>", "text/html")], "draw()")])
def test_a_caption_without_its_picture(site, outputs, source):
    [fault] = page(site, new_code_cell("#| fig-cap: A line\n" + source, outputs=outputs))
    assert fault.startswith("cell 2: a #| fig-cap without a picture among the outputs")


@pytest.mark.parametrize("output, said", [
    (shown("[<matplotlib.lines.Line2D at 0x7f12ab>]"), "'<matplotlib.lines.Line2D at 0x7f12ab>'"),
    (shown("def f(g=<function h at 0x7f12ab>)"), "'<function h at 0x7f12ab>'"),
    (shown("def f()->__main__.Saved | None:", "text/markdown"), "'__main__.Saved'"),
    (shown("def f(g=<lambda>)", "text/markdown"), "'<lambda>'"),
    (shown("<tree.Tree object>"), "'<tree.Tree object>'"), (shown("[<function h>]"), "'<function h>'"),
    (new_output("stream", name="stdout", text="<__main__.A object at 0x7f12ab>"), "'<__main__.A object at 0x7f12ab>'"),
])
def test_addresses_and_main_in_outputs(site, output, said):
    [fault] = page(site, new_code_cell("#| echo: false\nshow_doc(f)", outputs=[output]))
    assert fault.startswith(f"cell 2: {said} among the outputs")


@pytest.mark.parametrize("markdown, said", [
    ("As DESIGN says.", "cell 2: 'DESIGN' is cited"), ("Routed (2.7).", "cell 2: '(2.7)' is cited"), ("See `STYLE.md`.", "cell 2: 'STYLE.md' is cited"), ("Sec. 2.7 of the design.", "cell 2: 'Sec. 2.7 of the design' is cited"),
    ("::: {.callout-note}\nx", "cell 2: a ::: block that is not closed"), ("x\n\n:::", "cell 2: a ::: that closes nothing"),
    ("| a | b |\n|---|---|\n| 1 | 2 | 3 |", "cell 2: a row with 3 cells in a table of 2 columns: '| 1 | 2 | 3 |'"), ("Text.\n| a | b |\n|---|---|\n| 1 | 2 |", "cell 2: a table without a blank line before it: '| a | b |'"),
    ("It costs $5.\n\nNo more.", "cell 2: a $ without its partner: 'It costs $5.'"), ("$$\na", "cell 2: a $$ without its partner"), ("A folder <task> of them.", "cell 2: <task> is no HTML and vanishes"),
])
def test_markdown_that_breaks_a_rule(site, markdown, said):
    [fault] = page(site, new_markdown_cell(markdown))
    assert fault.startswith(said)


def test_front_matter(site):
    home = site / "nbs" / "core" / "one.ipynb"
    rest = [new_markdown_cell("## A part of it"), new_code_cell("#| export\ndef cut(x): return x")]
    write(home, new_markdown_cell("# One\n\n- order: 1\n- description: [a text"), *rest)
    [fault] = faults(site)
    assert "cell 1: the front matter is not YAML" in fault
    write(home, new_markdown_cell("# One"), new_markdown_cell("---\ntitle: One: two\n---\n"), *rest)
    [fault] = faults(site)
    assert "cell 2: the front matter is not YAML (mapping values are not allowed here)" in fault
    write(home, new_markdown_cell("# One\n\n- order: 1"), new_markdown_cell("- a list: of [things"), *rest)
    assert faults(site) == []


def test_documents_beside_the_notebooks_cite_what_is_there(site):
    (site / "README.md").write_text("# Home\n\nSee CONTRIBUTING.md.\n\n```\nDESIGN\n```\n")
    assert faults(site) == ["README.md: 'CONTRIBUTING.md' is cited, which a reader does not have: cite the paper, link to a page, or leave it out"]
    (site / "CONTRIBUTING.md").write_text("As DESIGN 2.7 wants it.")
    [fault] = faults(site)
    assert fault.startswith("CONTRIBUTING.md: 'DESIGN 2.7' is cited")


def test_what_nbdev_rendered_badly():
    nb = new_notebook(cells=[new_markdown_cell("# One"), new_code_cell("#| echo: false\nshow_doc(f)", outputs=[shown("def f(g=<function h at 0x7f12ab>)->__main__.A:", "text/markdown")])])
    assert [f.split(" among")[0] for f in rendered_faults(nb)] == ["cell 2: '<function h at 0x7f12ab>'", "cell 2: '__main__.A'"]
    nb.cells[1].outputs = [shown("def f(g=h)->A:", "text/markdown")]
    assert rendered_faults(nb) == []


@pytest.mark.parametrize("markdown, name", [
    ("See [[`cut`](https://x.org/a.html#cut)](one.ipynb).", "`cut`"), ("[[`a`](https://x.org/a) and [`b`](https://x.org/b)](one.ipynb)", "`a`"), ("[as [`cut`](https://x.org/a) does](one.ipynb)", "`cut`"),
    ("[![badge](https://x.org/a.svg)](https://x.org)", None), ("[`cut`](https://x.org/a) and [b](c.ipynb)", None), ("R[1, 2](x) [a [b] c](d.ipynb)", None), ("```\n[[`cut`](a)](b)\n```", None),
])
def test_links_within_links(markdown, name):
    found = rendered_faults(new_notebook(cells=[new_markdown_cell("# One"), new_markdown_cell(markdown)]))
    assert found == ([f"cell 2: nbdev makes {name} a link within a link: put the name outside of the link's text"] if name else [])


def test_limits_are_part_of_the_check(site, monkeypatch, capsys):
    scope = ci["main"].__globals__
    for name, value in {"ROOT": site, "limit_faults": lambda root: ["a cell grew"], "processed_faults": lambda root: []}.items(): monkeypatch.setitem(scope, name, value)
    assert ci["main"]() == 1 and capsys.readouterr().err == "a cell grew\n"
    monkeypatch.setitem(scope, "limit_faults", lambda root: [])
    assert ci["main"]() == 0
