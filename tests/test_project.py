"The package as others get it: what it imports, what it carries, its command line, its figures from files."
import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import treelora
from treelora.cli import main
from treelora.paper.figures import caption, figure, load_results, save_all
from treelora.paper.tables import contest_table, parts_table, table

ROOT = Path(__file__).parent.parent
BLOCK = """
import sys
for name in ('nbdev', 'fastcore', 'execnb', 'datasets', 'gguf', 'IPython'): sys.modules[name] = None
"""


IMPORT_EACH = BLOCK + """
import importlib, os, traceback
import accelerate, matplotlib.pyplot, peft, sklearn.datasets, sklearn.model_selection, timm, torch, transformers  # none of ours, and slow: each child has them already
for module in sys.argv[1:]:
    if not (child := os.fork()):
        try: importlib.import_module(module)
        except BaseException: traceback.print_exc(), os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]: print(module)
"""


@pytest.mark.slow
def test_modules_import_without_development_packages():
    modules = sorted(str(p.relative_to(ROOT))[:-3].replace("/", ".") for p in (ROOT / "treelora").rglob("*.py") if p.name not in ("_modidx.py", "__init__.py"))
    done = subprocess.run([sys.executable, "-c", IMPORT_EACH, *modules], capture_output=True, text=True)
    assert len(modules) > 40 and done.returncode == 0 and done.stdout == "", done.stdout + done.stderr


def test_core_needs_nothing_above_it():
    code = "import sys, treelora.algorithm; print([m for m in ('timm', 'matplotlib', 'accelerate', 'treelora.learner') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_package_data_and_version():
    assert treelora.__version__ in (ROOT / "settings.ini").read_text()
    files = resources.files("treelora")
    assert files.joinpath("data/paper_tables.csv").is_file()
    weights = files.joinpath("weights/glyph_vit.safetensors")
    assert 0 < len(weights.read_bytes()) < 4_000_000


def fake_result(method, seed, op, trees=()):
    R = [[1.0, None], [op, op]]
    return {"format": 1, "config": {"stream": "split-digits", "scale": "quick", "method": method, "seed": seed, "model": "m", "epochs": 1, "lr": 0.002},
            "tasks": ["d-0-1", "d-2-3"], "R": R, "scores": {"op": op, "bwt": 1 - op, "average_curve": [1.0, op]}, "seconds": {"train": 2.0 + seed}, "memory": {"stored_bytes": 3000, "stored": {"signatures": 1000, "adapters": 2000}},
            "samples_per_second": 100.0 + seed, "curves": [{"task": "d-2-3", "samples": [1, 10], "accuracy": [0.5, op]}] * 2,
            "trees": list(trees), "device": "none"}


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results" / "split-digits" / "quick"
    folder.mkdir(parents=True)
    trees = [{"after": "d-0-1", "groups": [[["d-0-1"]]]}, {"after": "d-2-3", "groups": [[["d-0-1", "d-2-3"]], [["d-0-1"], ["d-2-3"]]]}]
    for method, op in (("seqlora", 0.2), ("treelora", 0.9)):
        for seed in (0, 1):
            result = fake_result(method, seed, op + 0.02 * seed, trees if method == "treelora" else ())
            if method == "treelora": result["extra"] = {"picks_of_last_task": [[3], [5]]}
            (folder / f"{method}-seed{seed}.json").write_text(json.dumps(result))
    return tmp_path / "results"


def test_figures_from_files(results, tmp_path):
    paths = save_all(results, tmp_path / "figures")
    assert {p.name for p in paths} == {f"figure{n}.{s}" for n in (1, 2, 3, 4, 5, 8) for s in ("svg", "png")}
    assert all(p.stat().st_size > 1000 for p in paths)
    first = [p.read_bytes() for p in paths]
    assert [p.read_bytes() for p in save_all(results, tmp_path / "figures")] == first
    assert "seeds 0, 1" in caption(4, results)
    captions = (tmp_path / "figures" / "captions.md").read_text()
    assert [int(x.split()[1].rstrip(".")) for x in captions.strip().split("\n\n")] == [1, 2, 3, 4, 5, 8] and f"Figure 2. {caption(2)}" in captions


def test_table_puts_ours_beside_the_papers(results):
    rows = {r[0]: r for r in table(1, results).rows}
    assert rows["TreeLoRA"][1] == "88.54 ± 0.05" and rows["TreeLoRA"][-8:-4] == ["91.00 ± 1.41", "9.00 ± 1.41", "2.50 ± 0.71", "3 ± 0"]
    assert rows["GEM"][-8:] == rows["TreeLoRA"][-4:] * 2 == ["–"] * 8
    assert [r[-4:] for r in table(1, results, stream="split-digits").rows if r[0] == "TreeLoRA"] == [rows["TreeLoRA"][-8:-4]]
    assert [r[0] for r in table(11, results).rows] == ["InfLoRA", "TreeLoRA"]  # none that the paper's table lacks
    best = contest_table(results)
    assert [r[0] for r in best.rows] == ["treelora", "seqlora"] and best.rows[0][-1] == "adapters, signatures"
    assert [r[0] for r in parts_table(results).rows] == ["seqlora", "treelora"]


def test_missing_and_broken_results(results, tmp_path):
    with pytest.raises(FileNotFoundError, match="treelora figures --run missing"): figure(4, tmp_path / "none")
    with pytest.raises(ValueError, match="known are"): figure(9, results)
    with pytest.raises(ValueError, match="tables 1 to 13"): table(0)
    (results / "split-digits" / "quick" / "seqlora-seed0.json").write_text("[]")
    with pytest.warns(UserWarning, match="seqlora-seed0.json is left out"): assert len(load_results(results)["seqlora"]) == 1


def test_command_line(results, tmp_path, capsys):
    assert main(["table", "1", "--results", str(results)]) == 0 and "TreeLoRA" in capsys.readouterr().out
    assert main(["figures", "--results", str(results), "--out", str(tmp_path / "f")]) == 0
    assert "12 files" in capsys.readouterr().out
    assert main(["streams"]) == 0 and "split-tiny-imagenet" in capsys.readouterr().out
    assert main(["run", "--stream", "none", "--quiet"]) == 2 and "split-digits" in capsys.readouterr().err
    assert main(["run", "--stream", "split-fashion-mnist", "--root", str(tmp_path / "none")]) == 2
    assert "dataset-fashion-mnist" in capsys.readouterr().err
    with pytest.raises(SystemExit): main(["no-such-command"])


def test_run_writes_its_result(tmp_path, capsys):
    assert main(["run", "--method", "seqlora", "--epochs", "1", "--quiet", "--results", str(tmp_path)]) == 0
    saved = json.loads((tmp_path / "split-digits" / "quick" / "seqlora-seed0.json").read_text())
    assert saved["config"]["epochs"] == 1 and len(saved["R"]) == 5
    assert "OP" in capsys.readouterr().out
