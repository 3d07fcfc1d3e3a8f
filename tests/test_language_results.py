"What is read off language results: agreement with the families, the goals, figures; on small made-up files and a tiny model."
import json

import numpy as np
import pytest
import torch
from test_language import tiny_run, tiny_stream

from treelora.experiments.language import FORMS, LAMBDAS, agreement, closest_pair, family_agreement, family_kinship, fast_precision, in_family, language_bars, tree_from_gram, watched
from treelora.paper.figures import caption, figure
from treelora.paper.language_figures import families, family_groups, matrices, pareto, save_language_figures
from treelora.paper.tables import parts_table, table

LANGUAGES = ("es", "de", "pt", "sv", "it", "nl")


def family_gram(n_layers=6):
    "Gram matrices of rows that are as alike as the languages are related."
    alike = torch.tensor([[1.0 if a == b else 0.3 * family_kinship(a, b) for b in LANGUAGES] for a in LANGUAGES])
    return alike.expand(n_layers, -1, -1)


def fake(method, seed, last, forgetting, **extra):
    R = [[last + forgetting if i == j else last if i < j else None for i in range(6)] for j in range(6)]
    R[5] = [last] * 5 + [last + forgetting]
    branches = [{"task": t, "branch": LANGUAGES[k], "rounds": {x: 2 for x in LANGUAGES[:k + 1]}, "loss": {}} for k, t in enumerate(LANGUAGES[1:])]
    return {"format": 1, "config": {"stream": "cldr", "kind": "language", "scale": "quick", "method": method, "seed": seed, "model": "m", "epochs": 2, "metrics": ["chrf"] * 6,
                                    "method_config": {"lam": 4.0} | extra}, "tasks": list(LANGUAGES), "R": R, "curves": [],
            "scores": {"op": float(np.mean(R[5])), "bwt": forgetting * 5 / 6, "average_curve": [last] * 6}, "seconds": {"train": 10.0}, "memory": {"stored_bytes": 0}, "samples_per_second": 5.0,
            "trees": [{"after": "es", "groups": [[["es"]]]}, {"after": "de", "groups": [[["de", "es"]], [["de"], ["es"]]]}],
            "extra": {"gram": {s: family_gram().tolist() for s in ("grad", "update", "weight")}, "branches": branches}, "device": "none"}


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results" / "cldr" / "quick"
    for sub in ("half", "lambda"): (folder / sub).mkdir(parents=True)
    scores = {"seqlora": (0.30, 0.10), "treelora-authors": (0.31, 0.09), "treelora": (0.35, 0.03), "treelora-routed": (0.41, 0.0), "treelora-branch": (0.45, 0.0), "alone": (0.41, 0.0)}
    for m in FORMS:
        for seed in (0, 1): (folder / f"{m}-seed{seed}.json").write_text(json.dumps(fake(m, seed, *scores[m])))
    (folder / "half" / "treelora-branch-seed0.json").write_text(json.dumps(fake("treelora-branch", 0, 0.40, 0.0)))
    for lam in LAMBDAS: (folder / "lambda" / f"treelora-lam{lam:g}-seed0.json").write_text(json.dumps(fake("treelora", 0, 0.3 + lam / 100, 0.1, lam=lam)))
    return tmp_path / "results"


def test_closest_pairs():
    assert closest_pair(family_kinship, ("es", "it", "nl")) == {"es", "it"}
    assert closest_pair(lambda a, b: 0, ("a", "b", "c")) is None
    assert agreement(lambda a, b: -family_kinship(a, b), family_kinship, LANGUAGES) == 0
    with pytest.raises(ValueError, match="true closest pair"): agreement(family_kinship, family_kinship, ("es", "de", "fi"))
    with pytest.raises(ValueError, match="'xx' is not known"): family_kinship("es", "xx")


def test_a_tree_of_related_rows_is_the_family_tree():
    groups = {frozenset(g) for d in range(6) for g in tree_from_gram(family_gram(), LANGUAGES).groups(d)}
    assert {frozenset(("es", "pt", "it")), frozenset(("de", "sv", "nl")), frozenset(("es", "pt")), frozenset(("de", "nl"))} <= groups
    assert set(family_agreement(fake("alone", 0, 0.4, 0.0)).values()) == {1.0}


def test_in_family():
    assert in_family({"task": "it", "branch": "pt"}, ["es", "de", "pt"]) is True
    assert in_family({"task": "it", "branch": "de"}, ["es", "de"]) is False
    assert in_family({"task": "de", "branch": "es"}, ["es"]) is None


def test_goals_are_computed_from_the_files(results):
    bars = {b["what"]: b for b in language_bars(results)}
    assert bars["paper's form: BWT over SeqLoRA's"]["reached"] == "0.30" and bars["paper's form: BWT over SeqLoRA's"]["holds"]
    assert bars["branch: OP over each task alone"]["reached"] == "+4.0"
    assert not bars["branch, half the epochs: OP over each task alone"]["holds"] and not bars["branch: chosen within the family"]["holds"]
    own, afterwards = bars["treelora, its own trees: triples that agree"], next(b for what, b in bars.items() if what.startswith("the best of 18 trees made afterwards"))
    assert not own["holds"] and (afterwards["reached"], afterwards["holds"]) == ("100%", True)
    assert list(bars).index(own["what"]) < list(bars).index(afterwards["what"])


def test_own_trees_are_shown_before_the_one_made_afterwards(results):
    titles = [ax.get_title() for ax in families(results, seed=1).axes]
    assert titles[0] == "language families" and titles[1].startswith("TreeLoRA's own tree, seed 1: ") and titles[2].startswith("TreeLoRA-branch's own tree")
    assert titles[3].startswith("made afterwards, the best: ") and titles[3].endswith(": 100%")
    for path in (results / "cldr" / "quick").glob("treelora*-seed1.json"): path.unlink()
    assert [ax.get_title()[:8] for ax in families(results, seed=1).axes] == ["language", "made aft"]


def test_figures_and_tables(results, tmp_path):
    paths = save_language_figures(results, tmp_path / "figures")
    assert {p.name for p in paths} == {f"{n}-cldr.{s}" for n in ("matrix", "pareto", "families") for s in ("svg", "png")}
    first = [p.read_bytes() for p in paths]
    assert [p.read_bytes() for p in save_language_figures(results, tmp_path / "figures")] == first
    for n in (4, 5, 8): figure(n, results, "cldr")
    assert "chrF" in caption(4, results, "cldr")
    rows = {r[0]: r for r in table(3, results).rows}
    assert rows["TreeLoRA"][-4].startswith("35.50") and rows["O-LoRA"][-1] == "–"
    shown = parts_table(results, "cldr")
    assert shown.head[2] == "OP" and [r[0] for r in shown.rows][0] == "seqlora"


def test_missing_results(tmp_path):
    for draw in (matrices, pareto, families, language_bars):
        with pytest.raises(FileNotFoundError, match="treelora figures --run missing --stream cldr"): draw(tmp_path)


def test_family_groups(): assert family_groups(("de", "sv", "nl"))[2] == [["de", "nl"], ["sv"]]


def test_a_watched_method_has_the_same_numbers(tiny_language):
    plain, seen = tiny_run(tiny_language, "seqlora"), tiny_run(tiny_language, watched("seqlora"))
    assert np.array_equal(plain.R, seen.R, equal_nan=True) and seen.config["method"] == "seqlora"
    assert {s: np.shape(g) for s, g in seen.extra["gram"].items()} == {s: (4, 3, 3) for s in ("grad", "update", "weight")}
    assert len(tiny_stream()) == 3


def test_precision_can_be_wished_for(monkeypatch):
    for wish in ("no", "bf16"):
        monkeypatch.setenv("TREELORA_PRECISION", wish)
        assert fast_precision() == wish
    monkeypatch.setenv("TREELORA_PRECISION", "half")
    with pytest.raises(ValueError, match="TREELORA_PRECISION='half' is no precision; known are no, bf16 and fp16."): fast_precision()
    monkeypatch.setenv("TREELORA_PRECISION", "")
    assert fast_precision() in ("no", "bf16")
