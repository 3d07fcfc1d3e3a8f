"The lock fits settings.ini on every Python that it names, and says in one sentence where it does not."
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / ".ci" / "lock.py"
lock = runpy.run_path(str(SCRIPT))
misfits, drift, pins, Misfit = (lock[name] for name in ("misfits", "drift", "pins", "Misfit"))
TEXT = (ROOT / "requirements.lock").read_text(encoding="utf-8")


def test_the_lock_fits():
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_every_line_is_exact_and_of_one_place():
    found = pins(TEXT)
    assert len(found) > 150 and all([s.operator for s in pin.specifier] == ["=="] and pin.url is None for pin in found)
    assert not any(word in TEXT for word in ("http://", "https://", "file:", "--index", "--find-links"))
    assert {"torch==2.14.1", "torchvision==0.29.1"} <= {str(pin) for pin in found}


@pytest.mark.parametrize("lines, python, said", [
    ("", "3.10", "torch has no exact version for Python 3.10 in requirements.lock"),
    ("torch>=2.14", "3.11", "torch has no exact version for Python 3.11"),
    ("torch==2.5.0", "3.11", "torch>=2.6 is asked for, but requirements.lock has 2.5.0 for Python 3.11"),
    ("torch==2.7 ; python_version < '3.12'", "3.12", "torch has no exact version for Python 3.12"),
    ("torch==2.7\nTorch==2.8", "3.13", "torch has 2 exact versions for Python 3.13"),
])
def test_what_does_not_fit(lines, python, said):
    assert misfits(["torch>=2.6"], lines, python)[0].startswith(said)


@pytest.mark.parametrize("lines, python", [("torch==2.6", "3.10"), ("torch==2.6 ; python_version < '3.12'\ntorch==2.14 ; python_version >= '3.12'", "3.13")])
def test_what_fits(lines, python): assert misfits(["torch>=2.6"], lines, python) == []


def test_a_damaged_line_is_named():
    with pytest.raises(Misfit, match=r"Line 2 of requirements.lock is no requirement: '<<<<<<< HEAD'; run `make lock`"): pins("# note\n<<<<<<< HEAD\n")


def test_another_python_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 14, 0))
    with pytest.raises(Misfit, match=r"made for Python 3.10 to 3.13, but this is 3.14: remove .venv and name another one"): lock["check"]()


def test_drift_names_what_differs():
    assert drift("pytest==0.1\npytest==0.2 ; python_version < '3'\nno-such-package==1") == [f"pytest {pytest.__version__} (locked: 0.1)"]
    assert drift(f"pytest=={pytest.__version__}") == []
