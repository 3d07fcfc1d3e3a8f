"The notebooks under other seeds, instructions and numbers of threads: which seeds change, what is run, what is reported."
import ast
import json
import runpy
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).parent.parent
ci = runpy.run_path(str(ROOT / ".ci" / "machines.py"))
other_seeds, reseeded, main, SETTINGS = ci["other_seeds"], ci["reseeded"], ci["main"], ci["SETTINGS"]


@pytest.mark.parametrize("cell, other", [
    ("torch.manual_seed(0)", "torch.manual_seed(7 + 0)"),
    ("rng = np.random.default_rng(3); run(method, seed=0, lr=0.1)", "rng = np.random.default_rng(7 + 3); run(method, seed=7 + 0, lr=0.1)"),
    ("def planted(n=4, seed=0): pass", "def planted(n=4, seed=7 + 0): pass"),
    ("def planted(n, *, seed=0, m=1): pass", "def planted(n, *, seed=7 + 0, m=1): pass"),
    ("for seed in range(20): f(seed)", "for seed in range(7, 7 + 20): f(seed)"),
    ("[f(seed, x) for seed, x in enumerate(xs)]", "[f(seed, x) for seed, x in enumerate(xs, 7)]"),
    ("[make(seed=i) for i in range(3)]", "[make(seed=7 + i) for i in range(3)]"),
    ('s = "é"; f(seed=0)\ng(\n    seed=1)', 's = "é"; f(seed=7 + 0)\ng(\n    seed=7 + 1)'),
])
def test_every_seed_that_is_written_down_becomes_another(cell, other):
    assert other_seeds(cell, 7) == other
    ast.parse(other)


@pytest.mark.parametrize("cell", [
    "torch.manual_seed(seed)", "f(seed=seed + 1)", 'play(seed=row["seed"])', "for i in range(20): f(i)", 'path = "run-seed0.json"', "x = 0  # seed=0",
    "for seed in (1, 2): f(seed)", "#| export\ndef f(seed=0): pass", "#| eval: false\n!f(seed=0)", "f(seed=0)  # this seed: the picture is made for it"])
def test_what_is_no_literal_seed_stays(cell): assert other_seeds(cell, 7) == cell


def test_the_copy_leads_to_the_same_files(tmp_path):
    root, copy = tmp_path / "root", tmp_path / "copy"
    for folder in ("nbs/core", "results", ".git"): (root / folder).mkdir(parents=True)
    (root / "results" / "a.json").write_text("{}")
    copy.mkdir()
    nbformat.write(new_notebook(cells=[new_code_cell("torch.manual_seed(0)"), new_code_cell("f(seed=1)  # this seed: saved")]), root / "nbs/core/a.ipynb")
    reseeded(root, copy, 7)
    assert [c.source for c in nbformat.read(copy / "nbs/core/a.ipynb", 4).cells] == ["torch.manual_seed(7 + 0)", "f(seed=1)  # this seed: saved"]
    assert (copy / "nbs/core/../../results/a.json").read_text() == "{}" and not (copy / ".git").exists()
    assert nbformat.read(root / "nbs/core/a.ipynb", 4).cells[0].source == "torch.manual_seed(0)"


def test_some_notebooks_draw_and_exemptions_say_why():
    changed, reasons = set(), []
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] != "code": continue
            if other_seeds(source) != source: changed.add(path.name)
            if ci["EXEMPT"] in source: reasons += [line.split(ci["EXEMPT"])[1].strip() for line in source.splitlines() if ci["EXEMPT"] in line]
    assert len(changed) > 20 and all(len(reason.split()) > 2 for reason in reasons)


def test_the_settings_cover_what_they_promise():
    threads, environments, seeds = zip(*SETTINGS.values())
    assert set(threads) == {1, 2} and seeds.count(True) == 1
    assert {e.get("ATEN_CPU_CAPABILITY") for e in environments} == {None, "avx2", "default"} and any("TREELORA_PRECISION" in e for e in environments)


@pytest.fixture
def commands(monkeypatch):
    "What would be run; the notebook of the name `bad` and the test of that name fail."
    seen = []

    def logged(command, log, cwd, env):
        seen.append((command, cwd, env))
        if any("pytest" in part for part in command): return "FAILED tests/test_a.py::test_bad - assert\n" if "avx2" in log.name else ""
        return "Traceback\n\nnbdev Tests Failed On The Following Notebooks:\n====\n\tbad.ipynb\n" if env["OMP_NUM_THREADS"] == "2" else ""

    for f in ("notebooks", "tests"): monkeypatch.setitem(ci[f].__globals__, "logged", logged)
    return seen


def test_all_settings_run_and_failures_are_named(commands, tmp_path, capsys):
    assert main(["--only", "own-2threads", "--only", "avx2-1thread", "--only", "other-seed", "--out", str(tmp_path / "logs")]) == 1
    own, avx2, seed = capsys.readouterr().out.splitlines()
    assert "failed: bad.ipynb" in own and "failed: tests/test_a.py::test_bad" in avx2 and seed.endswith("passed")
    assert [cwd == ROOT for _, cwd, _ in commands] == [True] * 4 + [False]  # other seeds are drawn in a copy, and by notebooks only
    assert commands[2][2]["ATEN_CPU_CAPABILITY"] == "avx2" and "not slow" in commands[3][0]
    assert main(["--only", "float32-1thread", "--out", str(tmp_path / "logs")]) == 0


def test_some_files_alone(commands, tmp_path):
    assert main(["--only", "other-seed", "--out", str(tmp_path), "nbs/core/04_tree.ipynb", "tests/test_tree.py"]) == 0
    (command, _, _), = commands
    assert Path(command[0]).name == "nbdev_test" and command[-2:] == ["--path", "nbs/core/04_tree.ipynb"]


@pytest.mark.slow
def test_one_notebook_for_real(tmp_path):
    assert main(["--only", "other-seed", "--out", str(tmp_path), "nbs/methods/10_methods.ipynb"]) == 0
    log = (tmp_path / "other-seed-notebooks-10_methods.txt").read_text()
    assert log.count("Completed") == 1 and "Success." in log
