"""Turn processed notebooks into HTML pages as Quarto does: a notebook becomes pandoc's Markdown, pandoc makes HTML, a template puts header, contents and neighbours around it.

Quarto's theme is stood in for by .ci/look/base.css; the site's own settings, stylesheet, filter and scripts are those of nbs/. Needs pandoc, no Quarto."""
import base64, html, json, re, subprocess
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent / "look"
RICH = ("text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/html", "text/plain")  # best first, as Quarto chooses
CDN = "https://cdn.jsdelivr.net/npm/katex@latest/dist/"  # where pandoc looks for KaTeX by itself
LIBRARIES = "https://cdnjs.cloudflare.com/ajax/libs/require.js/2.3.6/require.min.js"  # what Quarto loads for HTML among outputs
READER = "markdown+tex_math_single_backslash-implicit_figures+autolink_bare_uris"


def text(value) -> str:
    "A notebook's text, which may be a list of lines."
    return value if isinstance(value, str) else "".join(value)


def directives(source: str) -> tuple[dict, str]:
    "The `#|` lines at the top of a cell, and the code below them."
    lines = source.splitlines()
    n = next((i for i, line in enumerate(lines) if not re.match(r"#\s*\|", line)), len(lines))
    keyed = "\n".join(re.sub(r"^#\s*\|\s*", "", line) for line in lines[:n] if ":" in line)
    return yaml.safe_load(keyed) or {}, "\n".join(lines[n:]).strip("\n")


def fence(code: str, head: str) -> str:
    "A block of code, fenced by more backticks than it holds in a row."
    ticks = "`" * max(3, 1 + max(map(len, re.findall(r"`+", code)), default=0))
    return f"{ticks} {head}\n{code}\n{ticks}"


def attribute(value) -> str: return html.escape(" ".join(str(value).split()), quote=True)


def picture(kind: str, data, said: dict, folder: Path, name: str) -> str:
    "A picture among the outputs: its file, and the Markdown that shows it."
    suffix = {"image/svg+xml": "svg", "image/png": "png", "image/jpeg": "jpg"}[kind]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.{suffix}").write_bytes(text(data).encode() if suffix == "svg" else base64.b64decode(text(data)))
    img = f'<img src="{folder.name}/{name}.{suffix}" class="img-fluid figure-img" alt="{attribute(said.get("fig-alt", ""))}">'
    caption = f'\n\n::: {{.figure-caption}}\n{said["fig-cap"]}\n:::\n' if said.get("fig-cap") else ""
    return f"::: {{.quarto-figure}}\n\n```{{=html}}\n{img}\n```\n{caption}\n:::"


def output(o: dict, said: dict, folder: Path, name: str) -> str:
    "One output of a cell, as Markdown."
    data = o.get("data", {"text/plain": o.get("text", "")})
    kind = next((k for k in RICH if k in data), None)
    if kind is None: return ""
    if kind.startswith("image/"): shown = picture(kind, data[kind], said, folder, name)
    elif kind == "text/markdown": shown = text(data[kind])
    elif kind == "text/html": shown = fence(text(data[kind]), "{=html}")
    else: shown = fence(text(data[kind]).rstrip("\n"), "")
    return shown if said.get("output") == "asis" else f":::: {{.cell-output}}\n\n{shown}\n\n::::"


def code_cell(cell: dict, folder: Path, name: str) -> str:
    "What the site shows of a code cell, as Markdown."
    said, code = directives(text(cell["source"]))
    if said.get("include") is False: return ""
    parts = []
    if code and said.get("echo") is not False:
        block, fold = fence(code, "{.python .cell-code}"), said.get("code-fold", False)
        summary = said.get("code-summary", "Code")
        parts.append(f'<details class="code-fold"{" open" if fold == "show" else ""}>\n<summary>{summary}</summary>\n\n{block}\n\n</details>' if fold else block)
    if said.get("output") is not False:
        parts += [output(o, said, folder, f"{name}-{i}") for i, o in enumerate(cell.get("outputs", []), 1)]
    body = "\n\n".join(p for p in parts if p)
    return body if said.get("output") == "asis" or not body else f"::::: {{.cell}}\n\n{body}\n\n:::::"


def markdown(nb: dict, folder: Path) -> tuple[dict, str]:
    "Front matter and body of a processed notebook."
    matter, parts = {}, []
    for i, cell in enumerate(nb["cells"], 1):
        source = text(cell["source"])
        block = re.match(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", source, re.S)
        if block and not matter: matter, source = yaml.safe_load(block[1]), source[block.end():]
        parts.append(code_cell(cell, folder, f"cell-{i}") if cell["cell_type"] == "code" else source)
    return matter, "\n\n".join(p for p in parts if p.strip())


def pandoc(body: str, source: Path, katex: str, filters: list[str], program: str) -> tuple[str, str]:
    "The HTML of a body of Markdown, and its table of contents."
    command = [program, "-f", READER, "-t", "html5", "--standalone", f"--template={HERE / 'body.html'}", f"--katex={katex}", "--toc", "--toc-depth=3",
               "--wrap=none", "--metadata=title:page", *(f"--lua-filter={source / f}" for f in filters)]
    made = subprocess.run(command, input=body, text=True, capture_output=True, check=True, cwd=source).stdout
    toc, _, made = made.partition("<!-- body -->")
    return made, toc


def callouts(made: str) -> str:
    "Callouts as Quarto lays them out: a head that opens and closes, and a body."
    pattern = re.compile(r'<div class="callout-(\w+)"[^>]*>\s*<h(\d)([^>]*)>(.*?)</h\2>', re.S)
    return pattern.sub(r'<div class="callout callout-style-default callout-\1 callout-titled"><div class="callout-header"><div class="callout-title-container flex-fill">\4</div></div>', made)


def order(source: Path) -> list[tuple[str, str]]:
    "All pages in reading order with their section."
    found = []
    for entry in yaml.safe_load((source / "sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]:
        if isinstance(entry, str): found.append((entry, ""))
        else: found += [(page, entry["section"]) for page in entry["contents"] if isinstance(page, str)]
    return found


def title_of(path: Path) -> str:
    "The heading of a notebook."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    found = re.search(r"^# (.+)$|^title: *(.+)$", text(cells[0]["source"]), re.M)
    return re.sub(r"[`*]", "", (found[1] or found[2]).strip("\"'")) if found else path.stem


def at(page: str, root: str) -> str: return root + re.sub(r"\.(ipynb|qmd)$", ".html", page)


def sidebar(pages, titles: dict, here: str, root: str) -> str:
    "The list of all pages, by sections, that of this page open."
    mine, parts, section = dict(pages).get(here), [], None
    for page, its in pages:
        if its != section:
            if section: parts.append("</ul></details></li>")
            if its: parts.append(f'<li class="sidebar-item sidebar-item-section"><details{" open" if its == mine else ""}><summary class="sidebar-link">{html.escape(its)}</summary><ul class="list-unstyled sidebar-section">')
            section = its
        active = ' active" aria-current="page' if page == here else ""
        parts.append(f'<li class="sidebar-item"><a href="{at(page, root)}" class="sidebar-item-text sidebar-link{active}">{html.escape(titles[page])}</a></li>')
    return "".join(parts) + ("</ul></details></li>" if section else "")


def neighbours(pages, titles: dict, here: str, root: str) -> str:
    "The ways to the pages before and after."
    names = [p for p, _ in pages]
    i = names.index(here) if here in names else len(names)
    link = lambda p, way: f'<div class="nav-page nav-page-{way}"><a href="{at(p, root)}" class="pagination-link"><span class="nav-page-text">{html.escape(titles[p])}</span></a></div>'
    return (link(names[i - 1], "previous") if 0 < i < len(names) else "<div></div>") + (link(names[i + 1], "next") if i + 1 < len(names) else "")


def includes(settings: dict, key: str, root: str) -> str:
    "What the settings put into every page; addresses that start at the site's root are made relative, as Quarto makes them."
    found = settings.get(key) or []
    found = found if isinstance(found, list) else [found]
    return re.sub(r'((?:src|href)=["\'])/(?!/)', rf"\1{root}", "\n".join(f["text"] for f in found if isinstance(f, dict)))


def rooted(made: str, root: str) -> str:
    "Links to pages end in .html, and what starts at the site's root is made relative."
    made = re.sub(r'((?:src|href)=")/(?!/)', rf"\1{root}", made)
    return re.sub(r'(href="(?![a-z]+:)[^"#]*)\.(?:ipynb|qmd)([#"])', r"\1.html\2", made)


def page(name: str, processed: Path, source: Path, site: Path, titles: dict, program: str) -> Path:
    "Write one page of the site; returns its file."
    quarto = yaml.safe_load((source / "_quarto.yml").read_text(encoding="utf-8"))
    settings, website = quarto["format"]["html"], quarto["website"]
    root = "../" * name.count("/")
    target = site / re.sub(r"\.\w+$", ".html", name)
    target.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".ipynb"): matter, body = markdown(nb := json.loads((processed / name).read_text(encoding="utf-8")), target.parent / f"{target.stem}_files")
    else: nb, (matter, body) = {"cells": []}, markdown({"cells": [{"cell_type": "raw", "source": (source / name).read_text(encoding="utf-8")}]}, target.parent)
    math = settings.get("html-math-method")
    katex = root + math["url"].lstrip("/") if isinstance(math, dict) else CDN
    made, toc = pandoc(body, source, katex, quarto.get("filters", []), program)
    mime = {k for c in nb["cells"] for o in c.get("outputs", []) for k in o.get("data", {})}
    library = f'<script src="{LIBRARIES}"></script>' if mime & {"text/html", "application/javascript", "application/vnd.jupyter.widget-view+json"} and not (source.parent / ".ci" / "docs_offline.py").exists() else ""
    pages = order(source)
    fields = {"title": html.escape(matter.get("title", titles.get(name, name))), "description": html.escape(matter.get("description", "") or ""), "root": root, "toc": toc, "body": rooted(callouts(made), root),
              "css": settings["css"], "wrap": "code-wrap" if settings.get("code-overflow") == "wrap" else "", "head": includes(settings, "include-in-header", root) + library,
              "end": includes(settings, "include-after-body", root), "section": html.escape(dict(pages).get(name, "")), "sidebar": sidebar(pages, titles, name, root), "neighbours": neighbours(pages, titles, name, root),
              "site": "TreeLoRA companion", "icon": f'<link href="{root}{website["favicon"]}" rel="icon">' if "favicon" in website else "",
              "tools": "".join(f'<a class="nav-link" href="{t["href"]}"' + (f' aria-label="{t["aria-label"]}"' if "aria-label" in t else "") + '><i class="bi"></i></a>' for t in website["navbar"]["right"])}
    target.write_text(re.sub(r"\{\{(\w+)\}\}", lambda m: fields[m[1]], (HERE / "page.html").read_text(encoding="utf-8")), encoding="utf-8")
    return target
