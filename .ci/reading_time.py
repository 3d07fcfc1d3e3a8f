"""How long the core pages take to read: words of prose and lines of shown code, page by page in reading order; fails where it is more than one evening.

What is folded (cells with `#| code-fold: true`, collapsed callouts) is not counted: a reader opens it by choice."""
import re, sys
from pathlib import Path

import nbformat

from limits import code_lines
from notebook_rules import FENCED, is_shown

ROOT = Path(__file__).resolve().parent.parent
WORDS, LINES = 200, 12  # per minute
EVENING = 180  # minutes
FOLDED = re.compile(r"^#\| *code-fold: *true", re.M)
COLLAPSED = re.compile(r"^:::+ *\{[^}]*collapse=[^}]*\}.*?^:::+ *$", re.M | re.S)


def words(text: str) -> int:
    "Words of Markdown: a formula counts as one word, a link by its text, blocks of code, pictures and tags not at all."
    text = re.sub(r"\$\$.*?\$\$|\$[^$\n]+\$", " formula ", COLLAPSED.sub("", FENCED.sub("", text)), flags=re.S)
    text = re.sub(r"\[!\[[^\]]*\]\([^)]*\)\]\([^)]*\)|!\[[^\]]*\]\([^)]*\)|<[^<>\n]*>", "", text)
    return len(re.findall(r"\w[\w'’.,-]*", re.sub(r"\]\([^)]*\)", "]", text)))


def page(path: Path) -> tuple[int, int]:
    "Words of prose, captions included, and lines of code that the site shows."
    cells = nbformat.read(path, 4).cells
    shown = [c.source for c in cells if c.cell_type == "code" and is_shown(c.source) and not FOLDED.search(c.source)]
    captions = [m for c in cells if c.cell_type == "code" for m in re.findall(r"^#\| *fig-cap: *(.+)$", c.source, re.M)]
    prose = [c.source for c in cells if c.cell_type == "markdown"] + captions
    return sum(map(words, prose)), sum(len(code_lines(source)) for source in shown)


def minutes(n_words: int, n_lines: int) -> float: return n_words / WORDS + n_lines / LINES


def report(root: Path) -> tuple[list[str], float]:
    "One line per page, and the minutes of all."
    pages = {p.name: page(p) for p in sorted((root / "nbs" / "core").glob("*.ipynb"))}
    total = sum(minutes(*x) for x in pages.values())
    return [f"{name:22} {w:6} words {n:5} lines {minutes(w, n):5.0f} min" for name, (w, n) in pages.items()] + [f"all core pages: {total:.1f} minutes, at most {EVENING}"], total


def main() -> int:
    lines, total = report(ROOT)
    print(*lines, sep="\n")
    return int(total > EVENING)


if __name__ == "__main__": sys.exit(main())
