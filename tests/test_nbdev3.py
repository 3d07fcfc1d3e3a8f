"nbdev 2, which this project uses, and the newest nbdev 3 make the same package of the notebooks."
import re
import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest

try: import tomllib
except ImportError: import tomli as tomllib  # Python 3.10; pytest needs it there, too

ROOT = Path(__file__).parent.parent
NBDEV3 = ROOT / ".venv-nbdev3" / "bin" / "nbdev-export"


@pytest.fixture
def copy(tmp_path) -> Path:
    "The checkout's sources, without what was exported before."
    for name in ("nbs", "settings.ini", "pyproject.toml", "_quarto.yml", "README.md"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    (tmp_path / "treelora").mkdir()
    shutil.copy(ROOT / "treelora" / "__init__.py", tmp_path / "treelora")  # the version: nbdev 2 writes it there, nbdev 3 reads it there
    return tmp_path


def without_site(index: str) -> str:
    "The index of names without the site's address, which nbdev 3 reads from another place."
    return re.sub(r"'settings': \{.*?\},", "", index, flags=re.S)


@pytest.mark.slow
@pytest.mark.skipif(not NBDEV3.exists(), reason="nbdev 3 has an environment of its own: `make test-slow` installs it")
def test_both_export_the_same_package(copy):
    done = subprocess.run([NBDEV3], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    exported = {p.relative_to(copy): p.read_text(encoding="utf-8") for p in (copy / "treelora").rglob("*.py")}
    index = Path("treelora/_modidx.py")
    ours = {p.relative_to(ROOT): p.read_text(encoding="utf-8") for p in (ROOT / "treelora").rglob("*.py")}
    assert without_site(exported.pop(index)) == without_site(ours.pop(index))
    assert len(ours) > 40 and sorted(exported) == sorted(ours)
    assert [str(name) for name in ours if exported[name] != ours[name]] == []


def test_nbdev3_is_told_what_settings_say():
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    told = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["nbdev"]
    assert {key: str(value) for key, value in told.items()} == {key: config["DEFAULT"][key] for key in told}
