"""Process pages with nbdev, as nbdev_docs does, into a folder: what is hidden, folded, exported; parameters as tables. Pages that are newer than what lies there, unless named."""
import sys
from pathlib import Path

from nbdev.processors import FilterDefaults
from nbdev.serve_drv import main as process

ROOT = Path(__file__).resolve().parent.parent


def stale(name: str, folder: Path) -> bool:
    "Whether a page was changed since it was processed."
    made = folder / name
    return not made.exists() or made.stat().st_mtime < (ROOT / "nbs" / name).stat().st_mtime


def run(folder: Path, names: list[str]) -> None:
    for name in names:
        if not stale(name, folder): continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        print(f"  {name}", flush=True)
        process((ROOT / "nbs" / name, folder / name, FilterDefaults))


if __name__ == "__main__": run(Path(sys.argv[1]), sys.argv[2:])
