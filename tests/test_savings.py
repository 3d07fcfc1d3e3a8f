"Training times and ablations: files that grow row by row, ratios, tables, and what they refuse."
import json

import pytest

from treelora.experiments import ablations, training_time
from treelora.experiments.ablations import ABLATIONS, Change, ablate, ablation_table, load_ablation
from treelora.bandit import SEARCHES
from treelora.paper.tables import table
from treelora.experiments.training_time import PLANS, RIVALS, SAVINGS, load_times, measure_time, time_rows, time_table


def row(method, savings=(), seed=0, op=0.9, train=8.0, steps=(5, 5)):
    return {"method": method, "savings": list(savings), "seed": seed, "op": op, "bwt": 0.0, "train": train, "steps": list(steps)}


def write(folder, rows, stream="split-digits", kind="vision"):
    (folder / stream).mkdir(parents=True)
    (folder / stream / "time.json").write_text(json.dumps({"kind": kind, "rows": rows}))


def test_ratios_are_taken_within_a_seed():
    rival = ("hidelora", ())
    rows = [row("hidelora", seed=s, train=8.0 * (1 + s), op=0.9 + 0.01 * s) for s in range(3)] + [row("treelora", ("stop",), s, train=2.0 * (1 + s), op=0.9 + 0.01 * s) for s in range(3)]
    found = time_rows({"rows": rows}, [rival])
    assert [r[rival] for r in found] == [{"ratio": 1.0, "as accurate": True}, {"ratio": 4.0, "as accurate": True}]
    assert found[1]["steps"] == 10 and found[1]["savings"] == ("stop",)


def test_less_accurate_is_said(tmp_path):
    write(tmp_path, [row("hidelora"), row("treelora", op=0.8, train=2.0), row("treelora-branch", seed=1)])
    lines = time_table(tmp_path).splitlines()
    assert "4.00 (less accurate)" in lines[3] and lines[4].rstrip().endswith("|  |")  # of a seed that the rival has not: no ratio
    with pytest.raises(FileNotFoundError, match="no training times of cldr"): load_times(tmp_path, "cldr")


def test_every_saving_of_a_plan_is_known():
    for kind, plan in PLANS.items():
        assert {s for _, savings in plan for s in savings} <= set(SAVINGS[kind]) and set(RIVALS[kind]) <= set(plan)


@pytest.mark.slow
def test_times_are_measured_once(tmp_path, monkeypatch):
    ran, before = [], training_time.run
    monkeypatch.setattr(training_time, "run", lambda *args, **kwargs: (ran.append(kwargs), before(*args, **kwargs))[1])
    plan = [("seqlora", ()), ("treelora", ("last blocks", "ahead", "fewer epochs"))]
    path = measure_time(seeds=[0], results=tmp_path, plan=plan[:1], progress=False, epochs=1)
    measure_time(seeds=[0], results=tmp_path, plan=plan, progress=False)
    rows = json.loads(path.read_text())["rows"]
    assert len(ran) == 2 and ran[1]["place"] == "last" and ran[1]["ahead"] and ran[1]["epochs"] == 1
    assert [(r["method"], r["savings"]) for r in rows] == [("seqlora", []), ("treelora", ["last blocks", "ahead", "fewer epochs"])]
    assert rows[1]["op"] > 0.8 and rows[1]["train"] > 0 and len(rows[1]["steps"]) == 5


@pytest.mark.slow
def test_ablations_go_on(tmp_path, monkeypatch):
    monkeypatch.setitem(ABLATIONS, "parts", [Change("no penalty, no search", {"lam": 0.0, "epochs": 1}), Change("penalty, LCB search", {"epochs": 1})])
    path = ablate(["parts"], seeds=[0], results=tmp_path, progress=False)
    monkeypatch.setattr(ablations, "run", lambda *a, **k: pytest.fail("ran again"))
    assert ablate(["parts"], seeds=[0], results=tmp_path, progress=False) == path
    found = load_ablation("parts", tmp_path)
    assert list(found) == [("no penalty, no search", "treelora"), ("penalty, LCB search", "treelora")] and all(r[0]["op"] > 0.75 for r in found.values())
    assert ablation_table("parts", tmp_path).count("\n") == 3
    text = str(table(5, tmp_path))
    assert "ours (split-digits), penalty, LCB search" in text and "54.77±1.10" in text and "nothing run" not in text
    with pytest.raises(FileNotFoundError, match="no ablation 'depth' of split-digits"): load_ablation("depth", tmp_path)
    with pytest.raises(ValueError, match="Unknown ablation 'colour'"): ablate(["colour"], results=tmp_path)


def test_every_search_and_variant_is_in_an_ablation():
    assert {c.settings["search"] for c in ABLATIONS["search"]} == set(SEARCHES) - {"tree-lcb-printed"}
    assert len({(n, c.label, c.method) for n, changes in ABLATIONS.items() for c in changes}) == sum(map(len, ABLATIONS.values()))
