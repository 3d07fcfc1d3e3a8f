"""What a notebook must keep to so that Quarto builds it and its page reads well: one function a rule, each returns sentences about what is wrong."""
import ast, io, re, tokenize
from pathlib import Path

import yaml

WIDTH = 95  # characters of a line of code that the site shows without cutting
NBDEV = {"default_exp", "export", "exporti", "exports", "hide", "exec_doc", "filter_stream", "slow", "gpu"}
HIDDEN = re.compile(r"^#\|\s*(export\b|exporti\b|hide\b|default_exp\b|echo: *false|include: *false)", re.M)
SILENT = re.compile(r"^#\|\s*(hide\b|include: *false|output: *false)", re.M)
RAW = re.compile(r"<[^<>\n]* at 0x[0-9a-fA-F]+>|<(?:function|bound method|built-in) [^<>\n]*>|<[\w.]+ object>|(?<==)<lambda>|\b__main__\.\w+")  # nbdev_clean leaves <function f>
UNKNOWN = re.compile(r"\b(?:DESIGN|STYLE|HOUSE)\b(?:\.md)?(?: \d+(?:\.\d+)*)?|\bPAPER\.md\b|(?<![\w)\]])\([1-9]\.\d\)|\b[Ss]ec(?:\.|tions?) \d+(?:\.\d+)* of the design\b")
DOCUMENT = re.compile(r"\b[A-Z][A-Z_]{2,}\.md\b")
DIRECTIVE = re.compile(r"\s*#\s*\|")
KEYED = re.compile(r"\s*#\s*\|\s*([\w-]+)\s*:(.*)")
FOREIGN = ("application/javascript", "application/vnd.jupyter.widget-view+json")  # outputs for which Quarto loads scripts of other hosts
FENCED = re.compile(r"^(```+|~~~+).*?^\1", re.M | re.S)


def head(source: str) -> list[str]:
    "The `#|` lines at the top of a cell, where nbdev and Quarto look for them."
    lines = []
    for line in source.splitlines():
        if line.strip() and not DIRECTIVE.match(line): break
        if line.strip(): lines.append(line)
    return lines


def is_shown(source: str) -> bool:
    "Whether the site shows a cell's code."
    return not HIDDEN.search(source)


def loaded(text: str, what: str):
    "YAML as Quarto reads it, and what is wrong with it."
    try: return yaml.safe_load(text), []
    except yaml.YAMLError as error: return None, [f"{what} is not YAML ({getattr(error, 'problem', None) or 'it cannot be read'}): put a value with a colon, # or quotes into double quotes"]


def directive_faults(source: str) -> list[str]:
    "Directives that Quarto cannot read, or would read as something else."
    lines = head(source)
    keyed = [m for m in map(KEYED.match, lines) if m]
    found, faults = loaded("\n".join(f"{m[1]}: {m[2].strip()}" for m in keyed), "the block of #| lines")
    strange = [x.strip() for x in lines if not KEYED.match(x) and (x.split("|", 1)[1].split() or [""])[0] not in NBDEV]
    faults += [f"{x!r}: neither nbdev nor Quarto knows this line" for x in strange]
    below = [x.strip() for x in source.splitlines()[len(lines):] if re.match(r"#\|\s*[\w-]+:", x) and x not in lines]
    faults += [f"{x!r} stands below the code, where Quarto does not read it" for x in below]
    for m in keyed if isinstance(found, dict) else []:
        key, value, written = m[1], found.get(m[1]), m[2].strip()
        if key not in ("fig-cap", "fig-alt"): continue
        if not isinstance(value, str) or not value.strip(): faults.append(f"#| {key} says nothing: it must be a text")
        elif written[0] not in "\"'|>" and value != written: faults.append(f"#| {key} is cut short to {value!r}: put it into double quotes")
    return faults


def matter_faults(cell, first: bool) -> list[str]:
    "Front matter that is not YAML: between --- at the top, or as `- key: value` under the title."
    if cell.cell_type == "code": return []
    block = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", cell.source, re.S)
    if block: return loaded(block[1], "the front matter")[1]
    keyed = re.findall(r"^-\s+(\S.*:.*\S)\s*$", cell.source, re.M) if first and re.search(r"^# \S", cell.source, re.M) else []
    return loaded("\n".join(keyed), "the front matter")[1]


def texts(output) -> list[str]:
    "The texts of an output that a page shows: the plain one only where there is nothing richer."
    data = output.get("data", {})
    rich = [x for kind, x in data.items() if kind in ("text/html", "text/markdown")]
    plain = [] if rich or any(kind.startswith("image/") for kind in data) else [data.get("text/plain", "")]
    return [output.get("text", ""), *rich, *plain]


def has_picture(cell) -> bool:
    "Whether an output of a cell is a picture, or HTML or Markdown that shows one."
    data = [o.get("data", {}) for o in cell.get("outputs", [])]
    return any(kind.startswith("image/") or re.search(r"<(svg|img|video|canvas)\b|!\[", x) is not None for d in data for kind, x in d.items() if kind.startswith(("image/", "text/html", "text/markdown")))


def caption_faults(cell) -> list[str]:
    "A caption whose picture is missing."
    lacks = any(re.match(r"\s*#\s*\|\s*fig-cap\s*:", x) for x in head(cell.source)) and not has_picture(cell)
    return ["a #| fig-cap without a picture among the outputs: run the notebook with inline figures"] if lacks else []


def resting_faults(cell) -> list[str]:
    "Outputs of a cell that is not to be run: they are of another machine."
    rests = re.search(r"^#\| *eval: *false", cell.source, re.M) and cell.get("outputs")
    return ["outputs of a cell with #| eval: false: run the notebook with .ci/execute.py"] if rests else []


def raw_faults(cell) -> list[str]:
    "Addresses in memory, and names of __main__, that the page would show."
    if cell.cell_type != "code" or SILENT.search(cell.source): return []
    return [f"{x!r} among the outputs: give it a name or a text to show" for x in dict.fromkeys(x for o in cell.get("outputs", []) for t in texts(o) for x in RAW.findall(t))]


def foreign_faults(cell) -> list[str]:
    "Outputs that a page can only show with scripts of other hosts."
    kinds = dict.fromkeys(k for o in cell.get("outputs", []) for k in o.get("data", {}) if k in FOREIGN)
    return [f"an output of the kind {k}, for which the site would load scripts of another host: run the notebook with .ci/execute.py" for k in kinds]


def signature_faults(source: str) -> list[str]:
    "Backticks in the comments of exported parameters, of which nbdev makes links that a signature shows raw."
    if not re.search(r"^#\|\s*exports?\b", source, re.M): return []
    try: found = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    except SyntaxError: return []
    lines = source.splitlines()
    heads = [line for n in found for line in lines[n.lineno - 1:max(n.lineno, n.body[0].lineno - 1)]]
    return [f"backticks in the comment of a parameter: {line.split('#', 1)[1].strip()[:60]!r}" for line in heads if re.search(r"\s#[^#\"']*`", line)]


def docstring_faults(source: str) -> list[str]:
    "Exported docstrings whose first line, which nbdev sets in italics by itself, leaves a bracket or a backtick open."
    if not re.search(r"^#\|\s*exports?\b", source, re.M): return []
    try: nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
    except SyntaxError: return []
    firsts = [(ast.get_docstring(n) or "").split("\n")[0] for n in nodes]
    return [f"the first line of a docstring leaves something open: {x[:60]!r}" for x in firsts if x.count("`") % 2 or x.count("[") != x.count("]")]


def wide_faults(source: str) -> list[str]:
    "Lines of shown code that the site cuts."
    wide = [len(x) for x in source.splitlines() if len(x) > WIDTH and not DIRECTIVE.match(x)] if is_shown(source) else []
    return [f"{len(wide)} lines of code wider than {WIDTH} characters (up to {max(wide)})"] if wide else []


def said(source: str) -> str:
    "The comments and docstrings of code, or the whole where it is not Python."
    try:
        comments = [t.string for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]
        nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
    except (SyntaxError, tokenize.TokenError): return source
    return "\n".join(comments + [ast.get_docstring(n) or "" for n in nodes])


def cited_faults(text: str, root: Path) -> list[str]:
    "Documents, or their sections, that a reader does not have."
    names = [m.group() for m in UNKNOWN.finditer(text)] + [x for x in DOCUMENT.findall(text) if not (root / x).exists()]
    return [f"{name!r} is cited, which a reader does not have: cite the paper, link to a page, or leave it out" for name in dict.fromkeys(names)]


def written(text: str) -> str:
    "Markdown without blocks of code and formulas."
    return re.sub(r"\$\$.*?\$\$|\$[^$\n]+\$", "", FENCED.sub("", text), flags=re.S)


def prose(text: str) -> str:
    "Markdown without code and formulas."
    return written(re.sub(r"`[^`\n]*`", "", FENCED.sub("", text)))


def div_faults(text: str) -> list[str]:
    "Blocks between ::: that are not closed, or closed twice."
    fences, depth = re.findall(r"^ {0,3}(:{3,})[ \t]*(.*)$", FENCED.sub("", text), re.M), 0
    for _, attributes in fences:
        depth += 1 if attributes.strip() else -1
        if depth < 0: return ["a ::: that closes nothing"]
    return ["a ::: block that is not closed"] if depth else []


def table_faults(text: str) -> list[str]:
    "Tables whose rows have another number of cells than their head."
    faults, lines = [], FENCED.sub("", text).splitlines()
    width = lambda row: len(re.sub(r"\\\||`[^`]*`|\$[^$]+\$", "", row.strip().strip("|")).split("|"))
    for i, line in enumerate(lines[1:], 1):
        if not re.match(r"^\s*\|?(\s*:?-{2,}:?\s*\|)+\s*(:?-{2,}:?\s*)?\|?\s*$", line) or "|" not in lines[i - 1]: continue
        if i > 1 and lines[i - 2].strip() and "|" not in lines[i - 2]: faults.append(f"a table without a blank line before it: {lines[i - 1].strip()[:40]!r}")
        rows = [lines[i - 1]]
        for row in lines[i + 1:]:
            if "|" not in row: break
            rows.append(row)
        faults += [f"a row with {width(r)} cells in a table of {width(line)} columns: {r.strip()[:40]!r}" for r in rows if width(r) != width(line)]
    return faults


def formula_faults(text: str) -> list[str]:
    "Formulas whose dollar is missing."
    plain = re.sub(r"`[^`\n]*`|\\\$", "", FENCED.sub("", text))
    if plain.count("$$") % 2: return ["a $$ without its partner"]
    broken = [f"a formula with two backslashes before a name: {m!r}" for m in re.findall(r"\$[^$]*?(?<!\\)(\\\\[a-z]{2,})", plain)]
    if broken: return broken
    odd = [p for p in re.split(r"\n\s*\n", re.sub(r"\$\$.*?\$\$", "", plain, flags=re.S)) if p.count("$") % 2]
    return [f"a $ without its partner: {p.strip()[:60]!r}" for p in odd]


def item_faults(text: str) -> list[str]:
    "Items of a list that begin with (a) or a): pandoc makes a list within the list of them."
    found = re.findall(r"^ *(?:[-*+]|\d+\.) +(\(?(?:[a-zA-Z]|[ivx]+|\d+)\)) ", FENCED.sub("", text), re.M)
    return [f"an item that begins with {x}, which becomes a list of its own: begin it with a word" for x in found]


def markdown_faults(text: str) -> list[str]:
    "What Quarto would render other than it was meant."
    tags = dict.fromkeys(re.findall(r"<(?!https?:|mailto:|/?(?:a|abbr|br|code|details|div|em|figcaption|figure|img|kbd|p|small|source|span|strong|sub|summary|sup|table|td|th|tr|u|video)\b|!--)/?[A-Za-z][^<>\n]*>", prose(text)))
    return div_faults(text) + table_faults(text) + formula_faults(text) + item_faults(text) + [f"{t} is no HTML and vanishes: write it as code" for t in tags]


def cell_faults(cell, first: bool, root: Path) -> list[str]:
    "What is wrong with a cell."
    if cell.cell_type != "code": return matter_faults(cell, first) + markdown_faults(cell.source) + cited_faults(written(cell.source), root)
    return directive_faults(cell.source) + caption_faults(cell) + resting_faults(cell) + foreign_faults(cell) + raw_faults(cell) + signature_faults(cell.source) + docstring_faults(cell.source) + wide_faults(cell.source) + cited_faults(said(cell.source), root)


def rule_faults(nb, root: Path) -> list[str]:
    "What is wrong with the cells of a notebook, each with the cell's number."
    return [f"cell {i}: {f}" for i, cell in enumerate(nb.cells, 1) for f in cell_faults(cell, i == 1, root)]


def nested_links(text: str) -> list[str]:
    "Links within the text of a link, which nbdev makes of a name in backticks."
    inner = r"\[([^\[\]\n]*)\]\([^()\n]*\)"
    found = re.findall(rf"(?<!!)\[[^\[\]\n!]*{inner}(?:[^\[\]\n]*{inner})*[^\[\]\n]*\]\(", FENCED.sub("", text))
    return [f"nbdev makes {x} a link within a link: put the name outside of the link's text" for x, _ in found]


def shown_signature_faults(cell) -> list[str]:
    "Links in signatures, which show them raw, and defaults of None without a type, which nbdev calls NoneType."
    code = "\n".join(m for o in cell.get("outputs", []) for m in re.findall(r"^``` ?python\n(.*?)^```", o.get("data", {}).get("text/markdown", ""), re.M | re.S))
    found = [f"a raw link in a signature: {m[:60]!r}; take the backticks from the comment" for m in re.findall(r"# .*\]\(http.*", code)]
    return found + [f"{m!r} in a signature: give the parameter a type" for m in re.findall(r"\w+: ?NoneType ?= ?None", code)]


def rendered_faults(nb) -> list[str]:
    "What nbdev rendered badly in a processed notebook: addresses, names of __main__, raw links and NoneType in signatures, links within links."
    return [f"cell {i}: {f}" for i, cell in enumerate(nb.cells, 1) for f in (nested_links(cell.source) if cell.cell_type == "markdown" else raw_faults(cell) + shown_signature_faults(cell))]
