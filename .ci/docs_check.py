"""Check the site's sources without Quarto: nbdev processes the notebooks, then links, pictures, titles, outputs, the sidebar, the rules of .ci/notebook_rules.py and the limits of .ci/limits.py are checked."""
import re, sys
from collections import Counter
from pathlib import Path

import nbformat, yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))  # where tests run this file by its path
from limits import limit_faults
from notebook_rules import FENCED, cited_faults, rendered_faults, rule_faults

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 1_500_000  # bytes of a notebook
ELSEWHERE = re.compile(r"(https?|mailto|data):")
HEADING = re.compile(r"^#{1,6} (.+)$", re.M)
DOCUMENTS = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")


def slug(heading: str) -> str:
    "The anchor that pandoc gives a heading."
    named = re.search(r"\{[^}]*#([^\s}]+)[^}]*\}\s*$", heading)
    if named: return named.group(1)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    text = re.sub(r"[`*]|\{[^}]*\}|\$", "", text).strip().lower()
    text = re.sub(r"[^\w\s.\-]", "", text)
    return re.sub(r"^[\W\d_]+", "", re.sub(r"\s+", "-", text)) or "section"


def text_of(nb) -> str:
    "All markdown of a notebook, without blocks of code."
    return "\n\n".join(FENCED.sub("", c.source) for c in nb.cells if c.cell_type == "markdown")


def anchors(nb) -> set[str]:
    "Where links into a page may point: headings, and the exported functions that nbdev shows there."
    exported = "\n".join(c.source for c in nb.cells if c.cell_type == "code" and re.match(r"#\|\s*exports?\b", c.source))
    found = Counter(slug(h) for h in HEADING.findall(text_of(nb)))
    again = {f"{name}-{i}" for name, n in found.items() for i in range(1, n)}  # what pandoc calls equal headings
    return set(found) | again | {name.lower() for name in re.findall(r"^(?:def|class) ([A-Za-z]\w*)", exported, re.M)}


def targets(text: str) -> list[str]:
    "Where the links and pictures of a text lead."
    prose = re.sub(r"`[^`\n]*`", "", text)
    found = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+[\"'][^)]*[\"'])?\s*\)", prose)  # [text](target "title")
    found += re.findall(r"^\s{0,3}\[[^\]^][^\]]*\]:\s*<?([^\s>]+)", prose, re.M)  # [name]: target
    return found + re.findall(r"<(?:img|a|source|video)\b[^>]*?\b(?:src|href)\s*=\s*[\"']([^\"']+)", prose)


def link_faults(path: Path, nb, pages: dict[Path, set[str]], source: Path) -> list[str]:
    "Links and pictures of a page that lead nowhere."
    faults, attached = [], {name for c in nb.cells for name in c.get("attachments", {})}
    outputs = [o.get("data", {}).get("text/markdown", "") for c in nb.cells for o in c.get("outputs", [])]
    for target in targets("\n\n".join([text_of(nb), *outputs])):
        if ELSEWHERE.match(target): continue
        if target.startswith("attachment:"):
            if target.partition(":")[2] not in attached: faults.append(f"picture {target}, which is not in the notebook")
            continue
        file, _, anchor = target.partition("#")
        to = (path.parent / file).resolve() if file else path.resolve()
        to = to.with_suffix(".ipynb") if to.suffix == ".html" else to
        if not to.exists(): faults.append(f"link to {target}, which does not exist")
        elif not to.is_relative_to(source.resolve()): faults.append(f"link to {target}, which is not on the site: it lies outside nbs/")
        elif to.suffix == ".ipynb" and to not in pages: faults.append(f"link to {target}, which is no page")
        elif anchor and to in pages and anchor.lower() not in pages[to]: faults.append(f"link to {target}: no such heading")
    return faults


def dropped(cell) -> list[str]:
    "Lines of a first markdown cell that nbdev does not take into the page's front matter."
    if cell.cell_type != "markdown": return []
    lines = [line for line in cell.source.splitlines() if line.strip() and not re.match(r"- \S.*:.*\S", line)]
    titles, quotes = [x for x in lines if re.match(r"#\s", x)], [x for x in lines if re.match(r">\s", x)]
    return [x for x in lines if x not in titles[:1] + quotes[:1]]


def page_faults(path: Path, nb) -> list[str]:
    "What is wrong with a page by itself."
    faults = [] if nb.cells and re.search(r"^(# \S|title: *\S)", nb.cells[0].source, flags=re.M) else ["no title (# ...) in the first cell"]
    if faults == [] and dropped(nb.cells[0]): faults.append("text in the first cell that nbdev drops from the site: only title, quote and `- key: value` lines stay; give it a cell of its own")
    if path.stat().st_size > LIMIT: faults.append(f"{path.stat().st_size:,} bytes, more than {LIMIT:,}")
    for number, cell in enumerate(nb.cells, 1):
        outputs = cell.get("outputs", [])
        if any(o.output_type == "error" for o in outputs): faults.append(f"an error among the outputs of cell {number}")
        if any(o.get("name") == "stderr" for o in outputs): faults.append(f"a message on standard error among the outputs of cell {number}")
        pictures = any(kind.startswith("image/") for o in outputs for kind in o.get("data", {}))
        if pictures and not re.search(r"^#\|\s*(fig-alt|hide\b|include: *false|output: *false)", cell.source, re.M): faults.append(f"a picture without #| fig-alt in cell {number}")
        if "![](" in cell.source and cell.cell_type == "markdown": faults.append(f"a picture without a text in its place in cell {number}")
    return faults


def sidebar_pages(entry) -> list[str]:
    "All pages that the sidebar names."
    if isinstance(entry, str): return [entry]
    if isinstance(entry, list): return [p for e in entry for p in sidebar_pages(e)]
    return sidebar_pages(entry.get("contents", [])) + [entry[key] for key in ("href", "file") if key in entry]


def sidebar_faults(source: Path, notebooks: list[Path]) -> list[str]:
    "Pages that the sidebar lacks, has twice, or invents."
    listed = Counter(p for p in sidebar_pages(yaml.safe_load((source / "sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]) if not ELSEWHERE.match(p))
    there = {p.relative_to(source).as_posix() for p in notebooks}
    return ([f"nbs/sidebar.yml names {p}, which does not exist" for p in sorted(set(listed) - there)] + [f"nbs/{p} is not in nbs/sidebar.yml" for p in sorted(there - set(listed))]
            + [f"nbs/sidebar.yml names {p} {n} times" for p, n in sorted(listed.items()) if n > 1])


def settings_faults(source: Path) -> list[str]:
    "What the site's settings lack of search, two themes, links to the source, and a way to the pages before and after."
    quarto = yaml.safe_load((source / "_quarto.yml").read_text(encoding="utf-8"))
    site, html = quarto.get("website", {}), quarto.get("format", {}).get("html", {})
    has = {"website: search": site.get("search"), "website: page-navigation": site.get("page-navigation"), "website: repo-url": site.get("repo-url"),
           "format: html: theme: light and dark": {"light", "dark"} <= set(html.get("theme") or ()), "format: html: html-math-method": html.get("html-math-method"),
           "metadata-files: nbdev.yml and sidebar.yml": {"nbdev.yml", "sidebar.yml"} <= set(quarto.get("metadata-files") or ())}
    card = [(site.get(kind) or {}).get("image") if isinstance(site.get(kind), dict) else None for kind in ("open-graph", "twitter-card")]
    themes = [t for some in (html.get("theme") or {}).values() for t in (some if isinstance(some, list) else [some]) if "." in t]
    files = [html.get("css"), site.get("favicon"), *card, *themes, *quarto.get("filters", ()), *quarto.get("project", {}).get("resources", ())]
    return [f"nbs/_quarto.yml lacks {name}" for name, there in has.items() if not there] + [f"nbs/_quarto.yml names {f}, which does not exist" for f in files if f and not any(source.glob(f))]


def check(root: Path) -> tuple[int, list[str]]:
    "How many pages a checkout has, and all their faults."
    source = root / "nbs"
    notebooks = {p: nbformat.read(p, 4) for p in sorted(source.rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts}
    pages = {p.resolve(): anchors(nb) for p, nb in notebooks.items()}
    faults = [f"{p.relative_to(root)}: {f}" for p, nb in notebooks.items() for f in page_faults(p, nb) + rule_faults(nb, root) + link_faults(p, nb, pages, source)]
    faults += [f"{name}: {f}" for name in DOCUMENTS if (root / name).exists() for f in cited_faults(FENCED.sub("", (root / name).read_text(encoding="utf-8")), root)]
    return len(notebooks), faults + sidebar_faults(source, list(notebooks)) + settings_faults(source)


def processed_faults(root: Path) -> list[str]:
    "Let nbdev process the notebooks into _proc; those that did not arrive, and what it rendered badly. Raises where nbdev fails."
    from nbdev.serve import proc_nbs  # here: the checks by themselves need no nbdev
    proc_nbs()
    names = sorted(p.relative_to(root / "nbs") for p in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    there = [name for name in names if (root / "_proc" / name).is_file()]
    return ([f"nbs/{name}: nbdev has not processed it" for name in names if name not in there]
            + [f"_proc/{name}: {f}" for name in there for f in rendered_faults(nbformat.read(root / "_proc" / name, 4))])


def main() -> int:
    n, faults = check(ROOT)
    faults += limit_faults(ROOT) + processed_faults(ROOT)
    for fault in faults: print(fault, file=sys.stderr)
    if not faults: print(f"{n} pages: titles, links, pictures, outputs, rules, sizes, sidebar and settings are right")
    return bool(faults)


if __name__ == "__main__": sys.exit(main())
