"""Make the built site need no other host: `.ci/docs_offline.py _docs`; exit code 1, with the places, where a page would still load something from elsewhere.

For a page with HTML among its outputs Quarto adds require.js and jQuery from another host, which nothing here uses; they are taken out."""
import re, sys
from pathlib import Path

ADDED = re.compile(r'<script src="https://cdnjs\.cloudflare\.com/ajax/libs/(?:require\.js|jquery)/[^>]*></script>\s*|<script[^>]*>define\(\'jquery\', \[\],function\(\) \{return window\.jQuery;\}\)</script>\s*')
LOADS = re.compile(r'<(?:script|img|iframe|source|video|audio|embed|object)\b[^>]*?\b(?:src|data)="((?:https?:)?//[^"]+)"|<link\b(?=[^>]*\brel="(?:stylesheet|preload|icon|shortcut icon|modulepreload)")[^>]*?\bhref="((?:https?:)?//[^"]+)"')
IMPORTS = re.compile(r'@import\s+(?:url\()?["\']?((?:https?:)?//[^"\')\s;]+)|url\(["\']?((?:https?:)?//[^"\')\s]+)')


def faults(text: str, kind: str) -> list[str]:
    "What a page or a stylesheet would load from other hosts."
    return [a or b for a, b in (LOADS if kind == ".html" else IMPORTS).findall(text)]


def main(folder: Path) -> int:
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".html", ".css")):
        text = path.read_text(encoding="utf-8")
        kept = ADDED.sub("", text)
        if kept != text: path.write_text(kept, encoding="utf-8")
        found += [f"{path.relative_to(folder)} loads {address}" for address in faults(kept, path.suffix)]
    for fault in found: print(fault, file=sys.stderr)
    if not found: print("no page loads anything from another host")
    return bool(found)


if __name__ == "__main__": sys.exit(main(Path(sys.argv[1])))
