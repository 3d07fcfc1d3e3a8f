"The site by itself: what its pages load lies beside them, and what Quarto adds from elsewhere is taken out."
import re
import runpy
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "nbs"
offline = runpy.run_path(str(ROOT / ".ci" / "docs_offline.py"))
PAGE = """<head><link rel="stylesheet" href="../vendor/katex/katex.min.css"><link rel="canonical" href="https://example.org/"></head>
<script src="https://cdnjs.cloudflare.com/ajax/libs/require.js/2.3.6/require.min.js" integrity="sha512-x" crossorigin="anonymous"></script>
<script src="https://cdnjs.cloudflare.com/ajax/libs/jquery/3.5.1/jquery.min.js" data-relocate-top="true"></script>
<script type="application/javascript" data-relocate-top="true">define('jquery', [],function() {return window.jQuery;})</script>
<a href="https://example.org">out</a> <img src="a.png"> <script>play()</script>"""


def test_a_page_keeps_its_own_and_loads_nothing_from_elsewhere(tmp_path):
    (tmp_path / "a.html").write_text(PAGE)
    (tmp_path / "a.css").write_text("@font-face { src: url(fonts/a.woff2) } b { background: url('data:image/svg+xml,<svg xmlns=\"http://www.w3.org/2000/svg\"/>') }")
    assert offline["main"](tmp_path) == 0
    kept = (tmp_path / "a.html").read_text()
    assert "cdnjs" not in kept and "jQuery" not in kept and "play()" in kept and "https://example.org" in kept


def test_what_is_left_of_other_hosts_is_named(tmp_path, capsys):
    (tmp_path / "a.html").write_text(PAGE + '<img alt="x" src="https://example.org/x.svg"><script src="//example.org/x.js"></script><link href="https://example.org/x.css" rel="stylesheet">')
    (tmp_path / "a.css").write_text("@import url(https://fonts.example.org/css);")
    assert offline["main"](tmp_path) == 1
    assert capsys.readouterr().err.splitlines() == ["a.css loads https://fonts.example.org/css", "a.html loads https://example.org/x.svg", "a.html loads //example.org/x.js", "a.html loads https://example.org/x.css"]


def test_katex_is_whole_and_of_the_site():
    math = yaml.safe_load((ROOT / "_quarto.yml").read_text())["format"]["html"]["html-math-method"]
    folder = SOURCE / math["url"].strip("/")
    css = (folder / "katex.min.css").read_text()
    fonts = set(re.findall(r"url\(([^)]+)\)", css))
    assert fonts and all(f.endswith(".woff2") and (folder / f).is_file() for f in fonts)
    assert {f"fonts/{p.name}" for p in (folder / "fonts").iterdir()} == fonts
    assert "MIT" in (folder / "LICENSE").read_text() and "version" in (folder / "katex.min.js").read_text()


def test_own_stylesheets_and_scripts_name_no_other_host():
    for name in ("styles.css", "theme.scss", "site.js"): assert not re.search(r"(@import|url\(|src=|fetch\()[^;]*//", (SOURCE / name).read_text()), name
    assert "$web-font-path: false" in (SOURCE / "theme.scss").read_text()


# The search. Quarto cuts a page at its headings of the second level; Fuse.js looks for the words in a
# page's title, the heading and the text, weighs these 2 : 2 : 1, and prefers what stands in short texts.

def sections(page: Path) -> list[tuple[str, str, str, str]]:
    "(page, title, heading, text) of each part of a page."
    cells = nbformat.read(page, 4).cells
    text = "\n".join(c.source for c in cells if c.cell_type == "markdown" or not re.search(r"^#\|\s*(hide\b|export\b)", c.source, re.M))
    title = re.search(r"^# (.+)$", text, re.M)[1]
    parts = re.split(r"^## (.+)$", text, flags=re.M)
    return [(page.relative_to(SOURCE).as_posix(), title, heading.replace("`", ""), body) for heading, body in zip(["", *parts[1::2]], parts[::2])]


def found(query: str) -> list[tuple[str, str]]:
    "(page, heading) of what a search shows, the best first."
    def badness(section):
        worst = 1.0
        for text, weight in zip(section[1:], (0.4, 0.4, 0.2)):
            if query.lower() in text.lower(): worst *= 0.001 ** (weight / len(text.split()) ** 0.5)
        return worst
    every = [s for page in sorted(SOURCE.rglob("*.ipynb")) if ".ipynb_checkpoints" not in page.parts for s in sections(page)]
    return [(s[0], s[2]) for s in sorted(every, key=badness) if badness(s) < 1]


def test_a_class_is_found_where_it_is_defined():
    assert found("TreeLCB")[0] == ("engine/08_search_fast.ipynb", "TreeLCB, the class")
    assert found("TaskTree")[0] == ("core/04_tree.ipynb", "TaskTree, method by method")


def test_lambda_leads_to_the_penalty():
    best = [page for page, _ in found("lambda")[:8]]
    assert "core/06_pull.ipynb" in best[:2]
    assert {"core/06_pull.ipynb", "engine/18_pulls.ipynb", "experiments/04_ablations.ipynb", "paper/08_side_by_side.ipynb"} <= set(best)


def test_the_sidebar_is_collapsed_and_engineering_comes_last():
    assert yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["collapse-level"] == 1
    contents = yaml.safe_load((SOURCE / "sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    first = [part["contents"][0].partition("/")[0] for part in contents[1:]]
    assert contents[0] == "index.ipynb" and first == ["core", "tutorials", "learning", "methods", "theory", "experiments", "paper", "engine"]
