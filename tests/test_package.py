"The package as it is built: what the archives hold and say of themselves, and what it takes to import them without the tools that made them."
import email
import re
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

import treelora
from treelora.cli import main

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "peft", "timm", "accelerate", "datasets", "matplotlib", "sklearn")
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {'nbdev', 'fastcore', 'execnb', 'datasets', 'gguf', 'IPython'}: raise ImportError(name)
sys.meta_path.insert(0, Block())
"""


def settings() -> dict:
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(config["DEFAULT"])


def python(code: str, *path: Path) -> str:
    "What a fresh interpreter prints that sees only this copy of the package."
    env = {"PYTHONPATH": ":".join(map(str, path or (ROOT,))), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    "A wheel and a source archive, built from the files under version control without a network."
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    names = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if names.returncode: pytest.skip("the list of files is git's, and this is no checkout")
    for name in names.stdout.split("\0"):
        if not name.startswith(("treelora/", "settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CITATION.cff")): continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    code = f"from setuptools import build_meta as b; b.build_sdist({str(out)!r}); b.build_wheel({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def wheel(built) -> zipfile.ZipFile: return zipfile.ZipFile(next(built.glob("*.whl")))


@pytest.fixture(scope="module")
def metadata(wheel): return email.message_from_bytes(wheel.read(next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))))


def test_wheel_holds_the_whole_package(wheel):
    names = set(wheel.namelist())
    ours = {p.relative_to(ROOT).as_posix() for p in (ROOT / "treelora").rglob("*") if p.suffix in (".py", ".csv", ".safetensors", ".gz", ".txt")}
    assert ours <= names, sorted(ours - names)
    assert {"treelora/weights/glyph_vit.safetensors", "treelora/data/paper_tables.csv", "treelora/data/cldr.json.gz", "treelora/data/UNICODE-LICENSE.txt"} <= names
    strangers = {n for n in names if not n.startswith(("treelora/", f"treelora-{treelora.__version__}.dist-info/"))}
    assert not strangers, strangers
    licenses = {n.rpartition("/")[2] for n in names if ".dist-info/licenses/" in n}
    assert licenses == {"LICENSE", "CITATION.cff", "UNICODE-LICENSE.txt"}
    scripts = wheel.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert "treelora = treelora.cli:main" in scripts and "treelora = treelora._modidx:d" in scripts


def test_metadata_say_what_it_is(metadata):
    cfg = settings()
    assert (metadata["Name"], metadata["Version"], metadata["License-Expression"]) == ("treelora", treelora.__version__, "Apache-2.0 AND Unicode-3.0")
    assert metadata["Requires-Python"] == f">={cfg['min_python']}" and metadata["Description-Content-Type"] == "text/markdown"
    minors = {c.rpartition(".")[2] for c in metadata.get_all("Classifier") if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", c)}
    assert min(minors, key=int) == cfg["min_python"].partition(".")[2]
    assert not any(c.startswith("License ::") for c in metadata.get_all("Classifier"))  # the expression says it
    needs = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert len(needs) == len(cfg["requirements"].split())
    for name in ("torch", "transformers", "timm", "peft"): assert any(re.match(rf"{name}>=\d", r) for r in needs), name


def test_description_links_lead_somewhere_from_elsewhere(metadata):
    links = re.findall(r"\]\(([^)\s]+)\)", metadata.get_payload())
    assert links and all(re.match(r"https://|#", link) for link in links), [x for x in links if not re.match(r"https://|#", x)]


def test_source_archive_can_be_built_from(built):
    names = {n.partition("/")[2] for n in tarfile.open(next(built.glob("*.tar.gz"))).getnames()}
    assert {"setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE", "CITATION.cff", "treelora/weights/glyph_vit.safetensors",
            "treelora/data/cldr.json.gz", "treelora/data/UNICODE-LICENSE.txt"} <= names


@pytest.mark.slow
def test_installed_wheel_works_without_development_packages(built, wheel, tmp_path):
    wheel.extractall(tmp_path)  # what an installer does with a wheel of pure Python
    where, version = python(BLOCK + "import treelora; print(treelora.__file__, treelora.__version__)", tmp_path).split()
    assert Path(where).is_relative_to(tmp_path) and version == treelora.__version__
    code = BLOCK + "from treelora.cli import main\ntry: main(['--version'])\nexcept SystemExit as e: assert not e.code"
    assert python(code, tmp_path) == f"treelora {version}"
    weights = BLOCK + "from treelora.learning.models import get_model; print(type(get_model('glyph-vit', 2)).__name__)"
    assert python(weights, tmp_path) == "VisionTransformer"
    names = BLOCK.replace("{'nbdev'", "{'babel', 'nbdev'") + "from treelora.learning.cldr import cldr_names; print(cldr_names('es')['Germany'])"
    assert python(names, tmp_path) == "Alemania"


def test_import_is_quick_and_light():
    took = python("import time; t = time.process_time(); import treelora, treelora.cli; print(time.process_time() - t)")
    assert float(took) < 1, took
    assert python(f"import sys, treelora, treelora.cli; print([m for m in {HEAVY} if m in sys.modules])") == "[]"


def test_version_flag(capsys):
    with pytest.raises(SystemExit) as end: main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out.strip() == f"treelora {treelora.__version__}"


def test_oldest_versions_are_those_of_the_settings():
    pins = python(f"import runpy; runpy.run_path({str(ROOT / '.ci/oldest.py')!r})").splitlines()
    assert [p.replace("==", ">=") for p in pins] == settings()["requirements"].split() and "torch==2.6" in pins


def test_citation_names_this_version():
    assert f"version: {treelora.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
