"The command line in words: bad input is one sentence, nothing is left behind, and results of other settings never mix."
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from treelora import cli
from treelora.algorithm import TreeLoRA
from treelora.cli import catalogue, main
from treelora.engine.options import Options
from treelora.experiments.vision import result_path
from treelora.learning import result as result_page
from treelora.learning.places import stream_folder
from treelora.methods import list_methods
from treelora.metrics import bwt, forgetting, op, score_matrix
from treelora.paper.tables import read_results
from treelora.streams import TaskStream, register_stream

ROOT = Path(__file__).parent.parent


def squares(scale, seed, root):
    "Two tasks of two classes, which the quick backbone takes."
    g, y = torch.Generator().manual_seed(seed), torch.arange(4).repeat(2)
    x = torch.rand(8, 1, 16, 16, generator=g)
    return TaskStream.from_arrays("squares", x, y, x, y, 2, seed, scale=scale)


register_stream("squares", ["quick"], squares)


def said(capsys, *words):
    "Exit code and standard error of a command."
    try: code = main([str(w) for w in words])
    except SystemExit as stop: code = stop.code
    return code, capsys.readouterr().err


@pytest.mark.parametrize("words, sentence", [
    (["--option", "lam=abc"], "lam='abc' of 'treelora' must be a number"), (["--option", "relative=maybe"], "must be true or false"),
    (["--option", "per_class=few"], "per_class='few' of 'treelora' must be a number"), (["--epochs", "x"], "must be a whole number, or one for each task"),
    (["--seed", "-1"], "seed=-1 must be a whole number from 0"), (["--seed", str(2 ** 32)], "must be a whole number from 0"), (["--curves", "-1"], "curves=-1 must be"),
    (["--stream", "nope"], "There is no stream 'nope'"), (["--stream", "../nope"], "There is no stream"), (["--stream", "cldr:../../x"], "knows no language"),
    (["--method", "../x"], "Unknown method"), (["--scale", "../.."], "Unknown scale")])
def test_bad_input_is_one_sentence_and_leaves_no_folder(tmp_path, capsys, words, sentence):
    stream = [] if "--stream" in words else ["--stream", "squares"]
    code, err = said(capsys, "run", *stream, *words, "--quiet", "--results", tmp_path / "r")
    assert code == 2 and sentence in err and "Traceback" not in err
    assert not (tmp_path / "r").exists() or words[0] == "--option" and not list((tmp_path / "r").rglob("*.json"))


@pytest.mark.parametrize("stream, sentence", [("nope", "no results of 'nope'"), ("../x", "cannot be a folder's")])
def test_a_table_of_an_unknown_stream_is_refused(tmp_path, capsys, stream, sentence):
    code, err = said(capsys, "table", 3, "--stream", stream, "--results", tmp_path)
    assert code == 2 and sentence in err


def test_an_interrupted_run_says_how_it_goes_on(tmp_path, capsys, monkeypatch):
    def stop(*args, **kw): raise KeyboardInterrupt
    monkeypatch.setattr("treelora.learner.run", stop)
    run = ["run", "--stream", "squares", "--results", tmp_path]
    code, err = said(capsys, *run)
    assert code == 130 and "With --resume a run writes checkpoints" in err and err.count("\n") == 1
    assert "goes on from the latest checkpoint" in said(capsys, *run, "--resume")[1]
    monkeypatch.setattr(cli, "_print_table", stop)
    assert said(capsys, "table", 1) == (130, "treelora: stopped. What was finished is kept in its folder.\n")


def test_help_is_in_groups(capsys):
    with pytest.raises(SystemExit): main(["run", "--help"])
    out = capsys.readouterr().out
    assert all(f"\n{title}:\n" in out for title in ("what runs", "how it trains", "what is written"))
    assert out.index("--stream NAME") < out.index("what runs:")


def test_methods_are_listed_without_importing_them():
    assert catalogue() == [m | {"kinds": tuple(m["kinds"])} for m in list_methods()]
    code = "import sys; from treelora.cli import main; main(['methods']); print(sorted({'torch', 'numpy', 'timm', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stdout.endswith("[]\n") and "treelora-branch" in done.stdout


@pytest.mark.parametrize("page", ["ascii", "cp437", "cp932"])
def test_tables_are_printed_on_any_code_page(tmp_path, monkeypatch, page):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=page))
    assert main(["table", "3", "--results", str(ROOT / "results")]) == 0
    sys.stdout.flush()
    assert b"TreeLoRA" in raw.getvalue()


def test_files_are_read_and_written_in_utf8():
    lines = [line for path in (ROOT / "treelora").rglob("*.py") for line in path.read_text(encoding="utf-8").splitlines()
             if any(call in line for call in (".read_text(", ".write_text(", '.open("w"', '.open("r"'))]
    assert lines and [line for line in lines if "encoding=" not in line] == []


def test_help_explains_each_argument():
    told = TreeLoRA.__init__.__doc__
    for name in ("model", *Options.__dataclass_fields__):
        if name != "seed": assert f"\n    {name}: " in told, name
    assert "lambda, strength" in told


# Folders

def test_folders_have_names_that_every_system_takes(tmp_path):
    assert result_path(tmp_path, "cldr:fr,ro", "quick", "treelora", 0).parts[-3:] == ("cldr-fr,ro", "quick", "treelora-seed0.json")
    (tmp_path / "cldr:fr,ro").mkdir()  # an older version's
    assert stream_folder(tmp_path, "cldr:fr,ro").name == "cldr:fr,ro"
    for name in ("..", "a/../../b", "a\\b", ""):
        with pytest.raises(ValueError, match="cannot be a folder's"): stream_folder(tmp_path, name)


# Which results belong together

def test_results_of_other_settings_are_neither_joined_nor_replaced(tmp_path, capsys):
    run = ["run", "--stream", "squares", "--method", "seqlora", "--quiet", "--results", tmp_path, "--epochs"]
    assert said(capsys, *run, 1) == (0, "")
    path = tmp_path / "squares/quick/seqlora-seed0.json"
    first = path.read_bytes()
    for other in ([4], [4, "--seed", 1], [1, "--lr", 0.1], [1, "--batch-size", 4], [1, "--option", "blocks=3"], [1, "--stop-loss", 9]):
        code, err = said(capsys, *run, *other)
        assert code == 2 and f"{path} was run with" in err and "another folder" in err, other
    assert path.read_bytes() == first and [p.name for p in path.parent.iterdir()] == [path.name]
    assert main([str(w) for w in (*run, 1, "--seed", 1)]) == 0 and main([str(w) for w in (*run, 1)]) == 0
    again = capsys.readouterr().out.splitlines()
    assert "in place of" not in again[0] and f"{path}, in place of the one of {json.loads(first)['date']}" in again[1]
    assert [r["config"]["seed"] for r in read_results(tmp_path, "squares", "quick")["seqlora"]] == [0, 1]
    assert json.loads(path.read_bytes())["sha256"]["weights"]


def put(folder, seed, **changes):
    "A small result, with what is changed at dotted names."
    result = {"format": 1, "config": {"method": "seqlora", "seed": seed, "epochs": 1, "method_config": {"layers": 5}}, "tasks": ["a", "b"], "R": [[0.9, None], [0.5, 0.8]],
              "scores": {"op": 0.65}, "seconds": {"train": 1.0}, "memory": {"stored_bytes": 0, "peak_bytes": 1}, "device": "cpu", "sha256": {"data": "d", "weights": "w"}}
    for name, value in changes.items():
        *way, last = name.split("__")
        inner = result
        for key in way: inner = inner[key]
        inner[last] = value
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"seqlora-seed{seed if isinstance(seed, int) else 7}.json"
    path.write_text(json.dumps(result), encoding="utf-8")
    return path


@pytest.mark.parametrize("change", [{"config__epochs": 4}, {"config__method_config": {"layers": 4}}, {"sha256__weights": "x"}, {"config__lr": 0.1}])
def test_a_table_never_averages_over_settings(tmp_path, change):
    put(tmp_path / "s" / "quick", 0, config__lr=0.2), put(tmp_path / "s" / "quick", 1, **change)
    with pytest.raises(ValueError, match="seqlora-seed0.json was run with .* and .*seqlora-seed1.json with"): read_results(tmp_path, "s", "quick")


@pytest.mark.parametrize("change", [{"memory": {}}, {"config__seed": "one"}, {"scores__op": None}, {"scores__op": "high"}, {"seconds": []}, {"R": [[0.9]]}, {"R": [[0.9, 0.5], [0.0, 0.8]]},
                                    {"R": "x"}, {"config__method": ["seqlora"]}, {"tasks": 2}, {"scores__op": float("nan")}])
def test_one_odd_result_is_left_out_and_named(tmp_path, change):
    "The others stay."
    put(tmp_path / "s" / "quick", 0), put(tmp_path / "s" / "quick", 1, **change)
    with pytest.warns(UserWarning, match="seqlora-seed1.json is left out"): runs = read_results(tmp_path, "s", "quick")
    assert [r["config"]["seed"] for r in runs["seqlora"]] == [0]


def test_rows_and_columns_exchanged_are_refused():
    R = [[0.9, None, None], [0.6, 0.8, None], [0.3, 0.7, 0.9]]
    full = [[x or 0.0 for x in row] for row in R]  # zeros above the diagonal are not used
    assert op(full) == op(R) and bwt(full) == bwt(R) and forgetting(full) == forgetting(R)
    assert bwt(R) == pytest.approx((0.6 + 0.1) / 3) and forgetting(R) == pytest.approx((0.6 + 0.1) / 2)
    assert "divided by N," in bwt.__doc__ and "divided by N - 1" in forgetting.__doc__
    for turned in ([list(row) for row in zip(*full)], [list(row) for row in zip(*R)]):
        with pytest.raises(ValueError, match="transpose it"): bwt(turned)
    assert score_matrix([[0.0, 0.0], [0.0, 0.0]])[1, 0] == 0  # all zero: nothing is turned


def test_only_this_projects_commit_is_recorded(tmp_path, monkeypatch):
    git = lambda *words: subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "treelora").mkdir()
    git("init", "-q"), git("commit", "-q", "--allow-empty", "-m", "theirs")
    monkeypatch.setattr(result_page.metrics, "__file__", str(tmp_path / "treelora" / "metrics.py"))
    assert result_page._commit() is None  # a foreign repository
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = treelora\n", encoding="utf-8")
    assert len(result_page._commit().rstrip("+")) == 40
    (tmp_path / "vendor" / "treelora").mkdir(parents=True), (tmp_path / "settings.ini").rename(tmp_path / "vendor" / "settings.ini")
    monkeypatch.setattr(result_page.metrics, "__file__", str(tmp_path / "vendor" / "treelora" / "metrics.py"))
    assert result_page._commit() is None  # a copy inside a foreign repository


def test_a_report_never_averages_over_settings_either(tmp_path):
    from treelora.paper.evidence import Evidence
    folder = tmp_path / "s" / "quick"
    for seed in (0, 1): put(folder, seed, config__epochs=seed + 1)
    kept = {p: json.loads(p.read_text(encoding="utf-8")) for p in folder.iterdir()}
    evidence = Evidence(tmp_path)
    evidence._read = lambda path, fault: kept[path]  # whatever else a report asks of a run
    with pytest.raises(ValueError, match="was run with epochs=1 and .* with epochs=2"): evidence.runs("s")


@pytest.mark.parametrize("words", [["bench", "vision"], ["bench", "serving"], ["bench", "language"], ["bench", "all"], ["pretrain"]])
def test_a_folder_in_place_of_a_file_is_refused_before_anything_is_measured(tmp_path, capsys, monkeypatch, words):
    measured = []
    for where in ("treelora.experiments.bench.bench", "treelora.experiments.speed.run_speed", "treelora.experiments.serving.run_serving", "treelora.experiments.tokens.run_tokens", "treelora.learning.pretrain.train"):
        monkeypatch.setattr(where, lambda *_, **__: measured.append(1))
    assert main([*words, "--out", str(tmp_path)]) != 0
    assert "is a folder; name a file in it" in capsys.readouterr().err and not measured and not list(tmp_path.iterdir())


def test_an_ablation_takes_each_seed_once(tmp_path, capsys):
    assert main(["ablate", "search", "--seeds", "0", "0", "--results", str(tmp_path / "results")]) != 0
    assert "has a seed twice" in capsys.readouterr().err and not (tmp_path / "results").exists()


def test_training_times_take_each_seed_once(tmp_path, capsys):
    assert main(["bench", "time", "--seeds", "1", "1", "--results", str(tmp_path / "results")]) != 0
    assert "has a seed twice" in capsys.readouterr().err and not (tmp_path / "results").exists()
