"""Write colab/treelora_nano.ipynb, the twin of nbs/core/00_nano.ipynb that needs torch and matplotlib only; with --check, only compare.

The twin has no `#|` lines, no hidden cells and no outputs. Sections whose code imports the package are left out, and say so."""
import hashlib, posixpath, re, sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
PAGE, TWIN = "core/00_nano.ipynb", "colab/treelora_nano.ipynb"
SITE = "https://treelora-companion.github.io/treelora-companion/"
OURS = re.compile(r"^\s*(?:from|import)\s+(?:treelora|nbdev|fastcore)\b", re.M)
HIDDEN = re.compile(r"^#\|\s*(?:hide\s*$|include:\s*false|default_exp)", re.M)


def plain(source: str) -> str:
    "Code without its directives."
    return "\n".join(line for line in source.splitlines() if not line.startswith("#|")).strip("\n")


def absolute(target: str) -> str:
    "Where a link of the page leads, from anywhere."
    if re.match(r"(https?|mailto):", target): return target
    file, mark, anchor = target.partition("#")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(PAGE), file)) if file else PAGE
    return SITE + re.sub(r"(^|/)\d+[a-z]?_(?=[^/]*$)", r"\1", re.sub(r"\.ipynb$", ".html", path)) + mark + anchor  # nbdev drops the numbers


def prose(source: str) -> str:
    "Markdown with absolute links, and without what only Quarto reads."
    source = re.sub(r"^::: *\{.*?title=\"([^\"]*)\".*\}$", r"**\1**\n", source, flags=re.M)
    source = re.sub(r"^:::\s*$", "", source, flags=re.M)
    source = re.sub(r"^\[!\[[^\]]*\]\([^)]*\)\]\([^)]*\)$\n?", "", source, flags=re.M)  # the badge that led here
    return re.sub(r"\]\(([^)\s]+)\)", lambda m: f"]({absolute(m[1])})", source).strip()


def sections(cells: list) -> list[list]:
    "The cells, cut before each heading of the second level."
    found = [[]]
    for cell in cells:
        if cell.cell_type == "markdown" and cell.source.startswith("## "): found.append([])
        found[-1].append(cell)
    return found


def shortened(section: list) -> list:
    "A section that needs the package: its heading and where to read it; markdown from a later heading on stays."
    heading, last = section[0].source.splitlines()[0], section[-1]
    note = f"{heading}\n\nThis part needs the package. Read it on [the page]({absolute(posixpath.basename(PAGE))})."
    cells = [nbformat.v4.new_markdown_cell(note, id=section[0].id)]
    later = re.search(r"^## .*", last.source, re.M | re.S) if last is not section[0] else None
    return cells + ([nbformat.v4.new_markdown_cell(later[0], id=last.id)] if later else [])


def twin(page) -> str:
    "The text of the twin's file."
    cells = [c for c in page.cells if not (c.cell_type == "code" and HIDDEN.search(c.source))]
    needs = lambda section: any(c.cell_type == "code" and OURS.search(c.source) for c in section)
    kept = [c for s in sections(cells) for c in (shortened(s) if needs(s) else s)]
    made = [nbformat.v4.new_code_cell("%pip install -q torch matplotlib", id=hashlib.md5(b"install").hexdigest()[:8])]
    for c in kept:
        if c.cell_type == "code": made.append(nbformat.v4.new_code_cell(plain(c.source), id=c.id))
        else: made.append(nbformat.v4.new_markdown_cell(prose(c.source), id=c.id))
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return nbformat.writes(nbformat.v4.new_notebook(cells=made, metadata=kernel, nbformat_minor=5)) + "\n"


def main(check: bool, root: Path = ROOT) -> int:
    text, path = twin(nbformat.read(root / "nbs" / PAGE, 4)), root / TWIN
    if not check:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return 0
    if path.is_file() and path.read_text(encoding="utf-8") == text: return 0
    print(f"{TWIN} differs from nbs/{PAGE}: run `python .ci/colab.py` and commit.", file=sys.stderr)
    return 1


if __name__ == "__main__": sys.exit(main("--check" in sys.argv[1:]))
