"""Write nbs/llms.txt: every page of the site with its address, its sentence and the question that it answers; with --check, only compare."""
import re, sys
from pathlib import Path

import nbformat
import yaml

from colab import absolute

ROOT = Path(__file__).resolve().parent.parent
HEAD = """# TreeLoRA companion

> A tested, literate implementation of TreeLoRA (Qian and others, ICML 2025, arXiv 2506.10355): continual learning of pre-trained transformers with LoRA adapters, a K-D tree of tasks and a bandit search. Each page below is a notebook that exports a part of the Python package `treelora`.

The paper's claims with verdicts, numbers and hashes of results: https://treelora-companion.github.io/treelora-companion/claims.json
Source: https://github.com/treelora-companion/treelora-companion
"""


def flat(text: str) -> str:
    "Markdown without links and line breaks."
    return " ".join(re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text).split())


def entry(page: str) -> str:
    "A page's line: title, address, summary, question."
    cells = [c.source for c in nbformat.read(ROOT / "nbs" / page, 4).cells if c.cell_type == "markdown"]
    text = "\n\n".join(cells)
    title = re.search(r"^# (.+)$", text, re.M) or re.search(r"^title: *\"?(.+?)\"?$", text, re.M)
    summary, asked = re.search(r"^> (.+)$", text, re.M), re.search(r"\*\*([^*]*\?[^*]*)\*\*", text, re.S)
    said = " ".join(flat(m[1]) for m in (summary, asked) if m)
    return f"- [{flat(title[1]) if title else page}]({absolute('../' + page)}): {said}"


def lines(contents: list, level: int = 2) -> list[str]:
    "The sidebar as headings and lines."
    found = []
    for item in contents:
        if isinstance(item, str): found.append(entry(item))
        elif "section" in item: found += ["", "#" * level + " " + item["section"], "", *lines(item["contents"], level + 1)]
    return found


def render() -> str:
    "The text of llms.txt."
    sidebar = yaml.safe_load((ROOT / "nbs" / "sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    return HEAD + "\n" + re.sub(r"\n{3,}", "\n\n", "\n".join(lines(sidebar))) + "\n"


def main() -> int:
    path, text = ROOT / "nbs" / "llms.txt", render()
    if "--check" not in sys.argv: path.write_text(text, encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != text:
        print("nbs/llms.txt is not what the pages say; run .ci/llms.py (make readme)")
        return 1
    return 0


if __name__ == "__main__": sys.exit(main())
