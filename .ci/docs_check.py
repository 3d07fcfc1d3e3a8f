"""Check the site's sources without Quarto: nbdev processes the notebooks, then links, titles, outputs and the sidebar are checked."""
import re, sys
from pathlib import Path

import nbformat, yaml
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 1_500_000  # bytes of a notebook


def slug(heading: str) -> str:
    "The anchor that pandoc gives a heading."
    text = re.sub(r"[`*]|\{[^}]*\}|\$", "", heading).strip().lower()
    text = re.sub(r"[^\w\s.\-]", "", text)
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", text))


def text_of(nb) -> str:
    "All markdown of a notebook."
    return "\n\n".join(c.source for c in nb.cells if c.cell_type == "markdown")


def anchors(nb) -> set[str]:
    "Where links into a page may point."
    return {slug(h) for h in re.findall(r"^#{1,6} (.+)$", text_of(nb), flags=re.M)}


def link_faults(path: Path, nb, pages: dict[Path, set[str]], base: Path) -> list[str]:
    "Links and images of a page that lead nowhere."
    faults, prose = [], re.sub(r"```.*?```|`[^`\n]*`", "", text_of(nb), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"(https?|mailto|attachment):", target): continue
        file, _, anchor = target.partition("#")
        to = (path.parent / file).resolve() if file else path.resolve()
        to = to.with_suffix(".ipynb") if to.suffix == ".html" else to
        if not to.exists(): faults.append(f"link to {target}, which does not exist")
        elif anchor and to in pages and anchor not in pages[to]: faults.append(f"link to {target}: no such heading")
    return faults


def page_faults(path: Path, nb) -> list[str]:
    "What is wrong with a page by itself."
    faults = [] if nb.cells and re.search(r"^(# .+|title:)", nb.cells[0].source, flags=re.M) else ["no title (# ...) in the first cell"]
    if path.stat().st_size > LIMIT: faults.append(f"{path.stat().st_size:,} bytes, more than {LIMIT:,}")
    if any(o.output_type == "error" for c in nb.cells for o in c.get("outputs", [])): faults.append("an error among its outputs")
    return faults


def sidebar_pages(entry) -> list[str]:
    "All pages that the sidebar names."
    if isinstance(entry, str): return [entry]
    if isinstance(entry, list): return [p for e in entry for p in sidebar_pages(e)]
    return sidebar_pages(entry.get("contents", entry.get("href", []))) + ([entry["href"]] if "href" in entry and "contents" in entry else [])


def main() -> int:
    source = ROOT / "nbs"
    proc_nbs()  # nbdev's own processing, into _proc; raises where it fails
    notebooks = {p: nbformat.read(p, 4) for p in sorted(source.rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts}
    pages = {p.resolve(): anchors(nb) for p, nb in notebooks.items()}
    faults = [f"{p.relative_to(ROOT)}: {f}" for p, nb in notebooks.items() for f in page_faults(p, nb) + link_faults(p, nb, pages, source)]
    listed = set(sidebar_pages(yaml.safe_load((source / "sidebar.yml").read_text())["website"]["sidebar"]["contents"]))
    there = {p.relative_to(source).as_posix() for p in notebooks}
    faults += [f"nbs/sidebar.yml names {p}, which does not exist" for p in sorted(listed - there)]
    faults += [f"nbs/{p} is not in nbs/sidebar.yml" for p in sorted(there - listed)]
    for fault in faults: print(fault, file=sys.stderr)
    if not faults: print(f"{len(notebooks)} pages: titles, links, outputs, sizes and sidebar are right")
    return bool(faults)


if __name__ == "__main__": sys.exit(main())
