"""Look at the site's pages in a browser, without Quarto: `.ci/docs_look.py [PAGE ...]`, as `.ci/docs_look.py core/00_nano`; without a page, at all of them.

The pages are built with nbdev's processing (.ci/docs_process.py) and pandoc's HTML (.ci/docs_html.py) under the site's stylesheet, and served on 127.0.0.1. At 1400 and at 400 px each one is looked at
for parts wider than the screen, cut code, missing pictures, markdown that was left as it is written, errors on the console, requests to other hosts, and the serious findings of axe (accessibility); on a dark page for contrast.
Prints a table of findings; the exit code is 1 if there is one. Pictures of ten pages, or of those that were named, go to _look/pictures."""
import argparse, functools, http.server, importlib.util, os, shutil, subprocess, sys, threading
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # where tests run this file by its path
ROOT = Path(__file__).resolve().parent.parent
SOURCE, LOOK = ROOT / "nbs", ROOT / "_look"
SITE = LOOK / "site"
WIDTHS, HEIGHT, TALL = {"wide": 1400, "phone": 400}, 900, 4500  # pixels of the window, and of a picture at most
SHOWN = ("index", "core/00_nano", "core/05_search", "core/06_pull", "learning/09_decompose", "theory/02_regret", "methods/10_methods", "experiments/02_language", "paper/04_tables", "paper/06_report")
PATIENCE = 300_000  # milliseconds that a step may take on a busy machine
KINDS = {"wider than the screen": "wide", "cut code": "cut", "missing picture": "picture", "raw markdown": "raw", "console error": "console", "other host": "host", "axe": "axe", "axe, dark": "dark"}

WIDER = """() => {
  const wide = document.documentElement.clientWidth, found = [];
  if (document.documentElement.scrollWidth <= wide) return found;
  const inside = e => { for (let p = e.parentElement; p; p = p.parentElement) if (getComputedStyle(p).overflowX !== 'visible' && p !== document.body && p !== document.documentElement) return true; return false; };
  for (const e of document.body.querySelectorAll('*')) {
    const box = e.getBoundingClientRect();
    if (box.width && box.right > wide + 1 && !inside(e)) found.push(e.tagName.toLowerCase() + '.' + [...e.classList].join('.') + ' to ' + Math.round(box.right) + ' px: ' + (e.textContent || e.alt || '').trim().slice(0, 40));
  }
  return found.slice(-1).concat(found.length ? [] : ['the page is ' + document.documentElement.scrollWidth + ' px wide']);
}"""
CUT = """() => [...document.querySelectorAll('div.sourceCode, pre')].filter(e => e.offsetParent && !(e.tagName === 'PRE' && e.closest('div.sourceCode')))
  .filter(e => e.scrollWidth > e.clientWidth + 1 && (e.matches('div.sourceCode') || getComputedStyle(e).overflowX === 'hidden' || getComputedStyle(e).overflowX === 'visible'))
  .map(e => e.textContent.trim().slice(0, 50))"""
MISSING = "() => [...document.images].filter(e => e.complete && !e.naturalWidth).map(e => e.getAttribute('src').slice(0, 80))"
RAW = """() => [...document.querySelectorAll('main p, main li, main td, main figcaption')].map(e => {
  const bare = e.cloneNode(true);
  bare.querySelectorAll('code, pre, .math, script, style').forEach(x => x.replaceWith(' '));
  return bare.textContent.trim();
}).filter(x => /\\]\\(|\\*\\*|^#{2,} /.test(x)).map(x => x.slice(0, 80))"""
AXE = """async only => (await axe.run(document, only ? {runOnly: {type: 'rule', values: only}} : {resultTypes: ['violations']})).violations
  .filter(v => v.impact === 'serious' || v.impact === 'critical').map(v => [v.id, v.nodes.length, v.nodes[0].target.join(' '), v.nodes[0].any.concat(v.nodes[0].all).map(a => a.message).join('; ').slice(0, 160)])"""


def browser() -> str:
    "Where Debian's chromium lies."
    return shutil.which("chromium") or sys.exit("docs-look needs Debian's chromium: apt-get install chromium.")


def axe() -> str:
    "The text of axe-core, which a package of .venv-look carries."
    return (Path(importlib.util.find_spec("axe_playwright_python").submodule_search_locations[0]) / "axe.min.js").read_text(encoding="utf-8")


def names(asked: list[str]) -> list[str]:
    "The pages to look at, as paths below nbs/."
    from docs_html import order
    there = [p for p, _ in order(SOURCE)] + [p.name for p in SOURCE.glob("*.qmd")]
    found = [next((p for p in there if p.rpartition(".")[0] == a.removesuffix(".ipynb").removesuffix(".qmd").removeprefix("nbs/")), None) for a in asked]
    missing = [a for a, p in zip(asked, found) if p is None]
    if missing: sys.exit(f"{', '.join(missing)}: no such page; a page is named as in nbs/sidebar.yml, as core/00_nano.")
    return found or there


def build(pages: list[str]) -> dict[str, str]:
    "Process pages and write their HTML; returns the address of each."
    import pypandoc
    from docs_html import order, page, title_of
    from docs_process import stale
    notebooks = [p for p in pages if p.endswith(".ipynb") and stale(p, LOOK / "proc")]
    process = [ROOT / ".venv" / "bin" / "python", ROOT / ".ci" / "docs_process.py", LOOK / "proc", *notebooks]
    if notebooks: subprocess.run(process, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    shutil.copytree(SOURCE, SITE, dirs_exist_ok=True, ignore=lambda folder, found: [n for n in found if n.endswith((".ipynb", ".qmd")) or n.startswith((".", "_"))])
    shutil.copy(ROOT / ".ci" / "look" / "base.css", SITE)
    titles = {p: title_of(SOURCE / p) for p, _ in order(SOURCE)}
    return {p: page(p, LOOK / "proc", SOURCE, SITE, titles, pypandoc.get_pandoc_path()).relative_to(SITE).as_posix() for p in pages}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_): pass


def serve(folder: Path) -> http.server.ThreadingHTTPServer:
    "Serve a folder on a free port of 127.0.0.1."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def darken(tab) -> None:
    "What Quarto's switch does to a page."
    tab.evaluate("() => document.body.classList.replace('quarto-light', 'quarto-dark')")


def photograph(tab, file: Path, w: int) -> None:
    "A picture of a page's first screens."
    tab.set_viewport_size({"width": w, "height": min(TALL, tab.evaluate("() => document.documentElement.scrollHeight"))})
    tab.screenshot(path=str(file))
    tab.set_viewport_size({"width": w, "height": HEIGHT})


def look(tab, address: str, host: str, width: str, script: str, shot: Path | None) -> list[tuple[str, str]]:
    "What is wrong with a page at one width: kind and sentence."
    found, w = [], WIDTHS[width]
    said = lambda m: m.type == "error" and "ERR_BLOCKED" not in m.text and found.append(("console error", m.text[:160]))
    failed = lambda e: found.append(("console error", str(e)[:160]))
    def routed(route):
        if route.request.url.startswith((host, "data:", "blob:")): return route.continue_()
        found.append(("other host", route.request.url[:120]))
        route.abort("blockedbyclient")
    tab.on("console", said), tab.on("pageerror", failed), tab.route("**/*", routed)
    tab.goto(host + address, wait_until="load")
    tab.evaluate("() => document.fonts.ready")
    found += [("wider than the screen", x) for x in tab.evaluate(WIDER)] + [("cut code", x) for x in tab.evaluate(CUT)] + [("missing picture", x) for x in tab.evaluate(MISSING)]
    found += [("raw markdown", x) for x in tab.evaluate(RAW)]
    tab.add_script_tag(content=script)
    rules = lambda kind, only: [(kind, f"{rule} ({n}): {where} {why}") for rule, n, where, why in tab.evaluate(AXE, only)]
    found += rules("axe", None)
    if shot: photograph(tab, shot, w)
    if width == "wide":
        darken(tab)
        found += rules("axe, dark", ["color-contrast"])
    if shot:
        if width == "phone": darken(tab)
        photograph(tab, shot.with_stem(shot.stem + "-dark"), w)
    tab.remove_listener("console", said), tab.remove_listener("pageerror", failed), tab.unroute("**/*")
    return found


def say(name: str, found: list[tuple[str, str, str]], most: int) -> None:
    "Print a page's findings, at most so many of a kind and width."
    counts = Counter()
    for width, kind, why in found:
        counts[width, kind] += 1
        if counts[width, kind] <= most: print(f"{name} ({width}): {kind}: {why}", flush=True)


def look_at_all(addresses: dict[str, str], shown: list[str], most: int) -> dict[str, list[tuple[str, str, str]]]:
    "All findings, by page: width, kind and sentence; printed as they come."
    from playwright.sync_api import sync_playwright
    findings, server, script = {}, serve(SITE), axe()
    host, pictures = f"http://127.0.0.1:{server.server_port}/", LOOK / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser(), args=["--no-sandbox"] if os.geteuid() == 0 else [])
        tabs = {width: chromium.new_page(viewport={"width": w, "height": HEIGHT}, bypass_csp=True) for width, w in WIDTHS.items()}
        for tab in tabs.values(): tab.set_default_timeout(PATIENCE)
        for name, address in addresses.items():
            stem = name.rpartition(".")[0]
            shots = {width: pictures / f"{stem.replace('/', '-')}-{width}.png" if stem in shown else None for width in tabs}
            findings[name] = [(width, kind, why) for width, tab in tabs.items() for kind, why in look(tab, address, host, width, script, shots[width])]
            say(name, findings[name], most)
        chromium.close()
    server.shutdown()
    return findings


def table(findings) -> str:
    "One row per page with a finding, a number per kind, and the sum."
    rows = [(name, Counter(kind for _, kind, _ in found)) for name, found in findings.items() if found]
    total = sum((c for _, c in rows), Counter())
    lines = [f"{'page':34}" + "".join(f"{short:>9}" for short in KINDS.values())]
    return "\n".join(lines + [f"{name:34}" + "".join(f"{c[k] or '':>9}" for k in KINDS) for name, c in [*rows, (f"{len(rows)} of {len(findings)} pages", total)]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", help="pages, as core/00_nano; all, if none is named")
    parser.add_argument("--all", action="store_true", help="print each finding, not only the first three of a kind and page")
    asked = parser.parse_args()
    browser()
    pages = names(asked.pages)
    shown = [p.rpartition(".")[0] for p in pages] if asked.pages else list(SHOWN)
    findings = look_at_all(build(pages), shown, 10_000 if asked.all else 3)
    print(f"{len(findings)} pages: nothing found" if not any(findings.values()) else table(findings))
    return int(any(findings.values()))


if __name__ == "__main__": sys.exit(main())
