"""Sizes that may shrink, not grow: how long code cells, lines and modules are, circles among imports, pages without a picture.

Compares the checkout with .ci/limits.json and fails when one got worse; with --write, records what got better (and all of them where the file is missing)."""
import ast, json, math, re, sys
from pathlib import Path

import nbformat

from notebook_rules import has_picture, is_shown

ROOT = Path(__file__).resolve().parent.parent
FILE = ".ci/limits.json"
LONG = 100  # characters
PICTURE = re.compile(r"""!\[[^\]]*\]\((?!https?:)|<svg\b|<(?:img|video)\b[^>]*\bsrc=["'](?!https?:)""")  # of this site: badges do not count


def code_lines(source: str) -> list[str]:
    "Lines of a cell that are neither empty nor directives."
    return [x for x in source.splitlines() if x.strip() and not x.startswith("#|")]


def sizes(cells: list[tuple[int, str]]) -> dict:
    "Longest, 90th percentile and median of the numbers of lines."
    ordered = sorted(n for n, _ in cells)
    at = lambda share: ordered[max(math.ceil(share * len(ordered)) - 1, 0)] if ordered else 0
    return {"longest": at(1), "90th percentile": at(0.9), "median": at(0.5)}


def circles(package: Path) -> list[list[str]]:
    "Modules of a package that import each other, directly or by way of others."
    names = {module_name(p, package): p for p in package.rglob("*.py")}
    edges = {name: imports(path, name, package.name, set(names)) for name, path in names.items()}
    return [sorted(group) for group in connected(edges) if len(group) > 1]


def module_name(path: Path, package: Path) -> str:
    "A module's name within its package; empty for the package itself."
    return ".".join(path.relative_to(package).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def imports(path: Path, name: str, package: str, known: set[str]) -> set[str]:
    "The modules of the package that a module imports, anywhere in it."
    inside = name.split(".") if path.name == "__init__.py" and name else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([package, *inside[: len(inside) - node.level + 1]] if node.level else [])
            base = ".".join(x for x in (base, node.module) if x)
            found |= {base} | {f"{base}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__"):
            found |= {a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return {x.removeprefix(package + ".") for x in found if x.startswith(package + ".")} & known - {name}


def connected(edges: dict[str, set[str]]) -> list[set[str]]:
    "Strongly connected components: who reaches whom, both ways."
    reached = {name: set() for name in edges}
    for name in edges:
        waiting = list(edges[name])
        while waiting:
            if (x := waiting.pop()) not in reached[name]:
                reached[name].add(x)
                waiting += edges[x]
    groups = {frozenset({name} | {x for x in reached[name] if name in reached[x]}) for name in edges}
    return [set(g) for g in sorted(groups, key=sorted)]


def no_picture(nb) -> bool:
    "Whether a page shows no picture at all."
    return not any(PICTURE.search(c.source) if c.cell_type == "markdown" else has_picture(c) for c in nb.cells)


def measure(root: Path) -> tuple[dict, dict]:
    "All sizes of a checkout, and where the largest are."
    cells, widths, bare, where = {}, {"all code": [(0, "")], "shown code": [(0, "")]}, [], {}
    for path in sorted(p for p in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts):
        nb, page = nbformat.read(path, 4), path.relative_to(root).as_posix()
        if no_picture(nb): bare.append(page)
        for number, cell in enumerate(nb.cells, 1):
            lines, place = code_lines(cell.source) if cell.cell_type == "code" else [], f"{page}, cell {number}"
            if not lines: continue
            for folder in (path.parent.relative_to(root).as_posix(), "all"): cells.setdefault(folder, []).append((len(lines), place))
            for kind in ("all code", "shown code") if is_shown(cell.source) else ("all code",): widths[kind] += [(len(x), place) for x in lines]
    modules = [(len(p.read_text(encoding="utf-8").splitlines()), p.relative_to(root).as_posix()) for p in sorted((root / "treelora").rglob("*.py")) if p.name != "_modidx.py"] or [(0, "")]
    where = {f"cells/{folder}/longest": max(x)[1] for folder, x in cells.items()} | {f"widest line/{kind}": max(x)[1] for kind, x in widths.items()} | {"longest module": max(modules)[1]}
    return {"cells": {folder: sizes(x) for folder, x in sorted(cells.items())}, "widest line": {kind: max(x)[0] for kind, x in widths.items()},
            f"lines over {LONG}": sum(n > LONG for n, _ in widths["all code"]), "longest module": max(modules)[0],
            "import circles": circles(root / "treelora"), "pages without a picture": bare}, where


def numbers(limits: dict, name: str = "") -> dict[str, int]:
    "The numbers of limits, by their path."
    return {k: n for key, x in limits.items() for k, n in (numbers(x, f"{name}{key}/") if isinstance(x, dict) else {f"{name}{key}": x}).items() if isinstance(n, int)}


def compare(old: dict, new: dict, where: dict) -> tuple[list[str], list[str]]:
    "What got worse, and what got better, in sentences."
    worse, better, before, now = [], [], numbers(old), numbers(new)
    for key, n in now.items():
        if key not in before: worse += [f"{key}: {n}, and .ci/limits.json has no limit for it: run .ci/limits.py --write"]
        elif n > before[key]: worse.append(f"{key}: {n}, recorded are {before[key]}" + (f" ({where[key]})" if where.get(key) else ""))
        elif n < before[key]: better.append(f"{key}: {n}, recorded are {before[key]}")
    better += [f"{key}: is gone" for key in before if key not in now]
    return worse + more_circles(old, new) + more_bare(old, new), better + fewer(old, new)


def more_circles(old: dict, new: dict) -> list[str]:
    "Circles of imports that were not there."
    known = [set(c) for c in old["import circles"]]
    return [f"import circle: {' and '.join(c)} import each other, recorded are {len(known)} circles without it" for c in new["import circles"] if not any(set(c) <= k for k in known)]


def more_bare(old: dict, new: dict) -> list[str]:
    "Pages that lack a picture: any new one in nbs/core, a larger number elsewhere."
    core = lambda pages: {p for p in pages if p.startswith("nbs/core/")}
    a, b = set(old["pages without a picture"]), set(new["pages without a picture"])
    faults = [f"{p}: a page of nbs/core without a picture" for p in sorted(core(b) - core(a))]
    rest, had = b - core(b), a - core(a)
    return faults + ([f"pages without a picture outside nbs/core: {len(rest)}, recorded are {len(had)} (new: {', '.join(sorted(rest - had))})"] if len(rest) > len(had) else [])


def fewer(old: dict, new: dict) -> list[str]:
    "Circles and pages without a picture that are gone."
    circles = [f"import circle: {' and '.join(c)} is gone" for c in old["import circles"] if c not in new["import circles"]]
    return circles + [f"{p}: has a picture now" for p in old["pages without a picture"] if p not in new["pages without a picture"]]


def limit_faults(root: Path) -> list[str]:
    "What of a checkout got worse than its .ci/limits.json."
    return compare(json.loads((root / FILE).read_text(encoding="utf-8")), *measure(root))[0]


def lowered(old: dict, new: dict) -> dict:
    "The limits after an improvement: each number the smaller one, new names as they are, no new circle or bare page."
    if isinstance(new, dict): return {k: lowered(old[k], x) if k in old else x for k, x in new.items()}
    if isinstance(new, int): return min(old, new)
    return new


def main(write: bool) -> int:
    new, where = measure(ROOT)
    path = ROOT / FILE
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else new
    worse, better = compare(old, new, where)
    missing = [x for x in worse if "has no limit for it" in x]
    if write:
        worse = [x for x in worse if x not in missing]
        if not worse: path.write_text(json.dumps(lowered(old, new), indent=1) + "\n", encoding="utf-8")
    for x in worse: print(x, file=sys.stderr)
    if worse and write: print("Nothing was recorded: limits only go down.", file=sys.stderr)
    elif worse: print("Make it smaller; where it must be so, edit .ci/limits.json by hand and say why in the commit.", file=sys.stderr)
    for x in better: print(x)
    if better and not write: print("Better than recorded: run .ci/limits.py --write")
    return bool(worse)


if __name__ == "__main__": sys.exit(main("--write" in sys.argv[1:]))
