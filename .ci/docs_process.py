"""Process pages with nbdev, as nbdev_docs does, into a folder: what is hidden, folded, exported; parameters as tables. Of the named pages, those that are newer than what lies there."""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def stale(name: str, folder: Path) -> bool:
    "Whether a page was changed since it was processed."
    made = folder / name
    return not made.exists() or made.stat().st_mtime < (ROOT / "nbs" / name).stat().st_mtime


def run(folder: Path, names: list[str]) -> None:
    from nbdev.processors import FilterDefaults  # here: whoever only asks what is stale needs no nbdev
    from nbdev.serve_drv import main as process
    for name in (n for n in names if stale(n, folder)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        print(f"  {name}", flush=True)
        process((ROOT / "nbs" / name, folder / name, FilterDefaults))


if __name__ == "__main__": run(Path(sys.argv[1]), sys.argv[2:])
