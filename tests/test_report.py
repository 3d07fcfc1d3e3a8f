"The reproduction report and README: every number stands in a results file, bad files are named and left out, missing ones give a command."
import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from treelora.experiments.photographs import APART
from treelora.metrics import bwt, op
from treelora.paper.evidence import Evidence, Missing
from treelora.paper.figures import look
from treelora.paper.report import CLAIMS, FAILS, HOLDS, PARTLY, UNTESTED, VERDICTS, Report, judge, report, tally
from treelora.paper.statistics import paired

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
BY_ID = {c.id: c for c in CLAIMS}


def one(claim, folder):
    "The finding for one claim."
    return judge(folder, [BY_ID[claim]])[claim]


# Numbers on the first page and in the report

def readme_rows():
    "(title, method, cells) of each row of README's results tables, with the heads of their columns."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for title, table in re.findall(r"\*\*Parts of the method on (\S+) \(scale quick[^*]*\*\*\n\n((?:\|.*\n)+)", text):
        head, _, *rows = [[c.strip() for c in line.strip().strip("|").split("|")] for line in table.splitlines()]
        for row in rows: yield title, row[0].split(" (")[0], dict(zip(head[2:], row[2:]))


def measured(stream, method):
    "What the results files say, under the heads of README's columns, from R itself."
    runs = [json.loads(p.read_text()) for p in sorted((RESULTS / stream / "quick").glob(f"{method}-seed*.json"))]
    assert runs, f"README has {method} on {stream}, results/ has not"
    joint = [r for r in runs if r["scores"].get("bwt") is None]
    columns = {"time s": [r["seconds"]["train"] + r["seconds"]["end_of_task"] for r in runs], "kept kB": [r["memory"]["stored_bytes"] / 1000 for r in runs]}
    columns["ACC %"] = columns["OP"] = [100 * op(r["R"]) for r in runs]
    if not joint: columns["BWT"] = [100 * bwt(r["R"]) for r in runs]
    return columns


def test_readme_has_the_tables():
    assert {title for title, _, _ in readme_rows()} == {"split-digits", "cldr"}


@pytest.mark.parametrize("stream, method, cells", [pytest.param(*row, id=f"{row[0]}-{row[1]}") for row in readme_rows()])
def test_every_number_of_readme_stands_in_a_results_file(stream, method, cells):
    columns = measured(stream, method)
    for head, cell in cells.items():
        values = columns.get(head)
        if cell == "–":
            assert values is None
            continue
        mean, _, spread = cell.partition(" ± ")
        digits = len(mean.partition(".")[2])
        assert float(mean) == pytest.approx(np.mean(values), abs=0.51 * 10 ** -digits), f"{head} of {method}"
        if spread: assert float(spread) == pytest.approx(np.std(values, ddof=1), abs=0.51 * 10 ** -digits), f"{head} of {method}"
        else: assert len(values) == 1


def photo_rows():
    "(label, cells) of each row of README's table of photographs."
    table = re.search(r"\*\*Split CIFAR-100[^*]*\*\*\n\n((?:\|.*\n)+)", (ROOT / "README.md").read_text(encoding="utf-8"))[1]
    head, _, *rows = [[c.strip() for c in line.strip().strip("|").split("|")] for line in table.splitlines()]
    return [(row[0], dict(zip(head[1:], row[1:]))) for row in rows]


def photo_runs(label):
    "The runs of README's row, by the label that it has there."
    folder = RESULTS / "split-cifar100" / "small"
    by_label = {look(p.name.partition("-seed")[0])["label"]: sorted(folder.glob(f"{p.name.partition('-seed')[0]}-seed*.json")) for p in folder.glob("*-seed0.json")}
    apart = {name: sorted((folder / place).glob(f"{method}-seed*.json")) for place, (method, name) in APART.items()}
    paths = apart.get(label) or by_label[label]
    return [json.loads(p.read_text()) for p in paths]


@pytest.mark.parametrize("label, cells", [pytest.param(*row, id=row[0]) for row in photo_rows()])
def test_every_number_on_photographs_stands_in_a_results_file(label, cells):
    runs = photo_runs(label)
    assert len(runs) == 3
    values = {"accuracy, %": [100 * op(r["R"]) for r in runs], "minutes": [min((r["seconds"]["train"] + r["seconds"]["end_of_task"]) / 60 for r in runs)]}
    if cells["BWT"] != "–": values["BWT"] = [100 * bwt(r["R"]) for r in runs]
    for head, own in values.items():
        mean, _, spread = cells[head].partition(" ± ")
        assert float(mean) == pytest.approx(np.mean(own), abs=0.051), f"{head} of {label}"
        if spread: assert float(spread) == pytest.approx(np.std(own, ddof=1), abs=0.051), f"{head} of {label}"


def shown_table():
    "The claims' table as the executed notebook shows it: the cells of each row."
    notebook = json.loads((ROOT / "nbs" / "paper" / "06_report.ipynb").read_text(encoding="utf-8"))
    shown = ["".join(o["data"]["text/markdown"]) for c in notebook["cells"] for o in c.get("outputs", []) if "text/markdown" in o.get("data", {})]
    table = next(s for s in shown if "| verdict |" in s)
    return [re.split(r"(?<!\\) \| ", line.strip()[2:-2]) for line in table.splitlines()[2:]]


def test_the_report_shows_what_the_files_say():
    "The page was run after the last results came: its table is what the files give now, to the letter."
    made = [re.split(r"(?<!\\) \| ", line.strip()[2:-2]) for line in report(RESULTS)._repr_markdown_().splitlines()[2:]]
    assert [row[0] for row in made] == [c.id for c in CLAIMS]
    for shown, now in zip(shown_table(), made, strict=True): assert shown == now, f"{now[0]}: run nbs/paper/06_report.ipynb again"


def test_every_file_that_the_report_names_is_there():
    for row in shown_table():
        tested = row[4] != f"**{UNTESTED}**"
        folders = re.findall(r"/tree/main/results/([^)]+)\)", row[5])
        assert bool(folders) == tested
        for folder in folders: assert (RESULTS / folder).exists(), folder


def test_no_page_says_a_measured_number_by_hand():
    "The report's own prose has no scores: they come from code. (Bounds of rules are in docstrings, the paper's numbers in the claims.)"
    notebook = json.loads((ROOT / "nbs" / "paper" / "06_report.ipynb").read_text(encoding="utf-8"))
    prose = "\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown")
    assert not re.findall(r"\d+\.\d+|\d+ %", prose)


def test_the_papers_numbers_in_the_claims_are_in_its_tables():
    data = (ROOT / "treelora" / "data" / "paper_tables.csv").read_text()
    numbers = set(re.findall(r"[\d.]+", data))
    for claim in CLAIMS:
        for number in re.findall(r"\d\d\.\d\d", claim.says): assert number in numbers, f"{claim.id}: {number}"


# Rules, on made-up results

def fake(method, seed, last, forgotten=0.0, stream="split-digits", curve=(0.5, 1.0), **extra):
    R = [[last + forgotten, None], [last, last]]
    return {"format": 1, "config": {"stream": stream, "kind": "vision", "method": method, "seed": seed, "model": "m", "epochs": 5}, "tasks": ["a", "b"], "R": R,
            "scores": {"op": op(R)}, "seconds": {"train": 1.0}, "memory": {"stored_bytes": 2_000_000}, "trees": [],
            "curves": [{"task": "b", "samples": [10, 100], "accuracy": list(curve)}], "device": "cpu (none)"} | extra


def put(root, run, folder="quick"):
    path = root / run["config"]["stream"] / folder / f"{run['config']['method']}-seed{run['config']['seed']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run))
    return path


def fill(root, levels, folder="quick", seeds=(0, 1, 2), **more):
    for method, (last, forgotten) in levels.items():
        for seed in seeds: put(root, fake(method, seed, last + 0.01 * seed, forgotten, **more), folder)


def rows(root, name, content):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": content, "device": "cpu (none)"}))


@pytest.mark.parametrize("best, verdict", [(0.80, HOLDS), (0.90, HOLDS), (0.93, FAILS)])
def test_c1_compares_with_the_best_rival(tmp_path, best, verdict):
    fill(tmp_path, {"treelora": (0.9, 0), "seqlora": (0.2, 0), "hidelora": (best, 0)})
    assert one("C1", tmp_path).verdict == verdict
    fill(tmp_path, {"treelora": (0.9, 0), "gem": (0.97 if verdict == HOLDS else 0.5, 0)}, stream="split-fashion-mnist")
    assert one("C1", tmp_path).verdict == PARTLY


def test_numbers_move_with_the_files(tmp_path):
    fill(tmp_path, {"treelora": (0.9, 0), "hidelora": (0.8, 0)})
    before = one("C1", tmp_path)
    fill(tmp_path, {"treelora": (0.7, 0)})
    after = one("C1", tmp_path)
    assert "91.0" in before.found and "71.0" in after.found and (before.verdict, after.verdict) == (HOLDS, FAILS)
    assert before.files == tuple(sorted(f"split-digits/quick/{m}-seed{s}.json" for m in ("treelora", "hidelora") for s in (0, 1, 2)))


def test_fewer_seeds_do_not_decide(tmp_path):
    fill(tmp_path, {"treelora": (0.9, 0), "hidelora": (0.8, 0)}, seeds=(0, 1))
    assert one("C1", tmp_path).verdict == UNTESTED
    fill(tmp_path, {"treelora": (0.5, 0), "hidelora": (0.8, 0)}, stream="split-fashion-mnist")
    found = one("C1", tmp_path)
    assert found.verdict == FAILS and "2 seeds, not counted" in found.found


@pytest.mark.parametrize("rival, verdict", [((0.4, 0.2), HOLDS), ((0.6, 0.2), PARTLY), ((0.4, 0.0), PARTLY), ((0.6, 0.0), FAILS)])
def test_c3_has_two_parts(tmp_path, rival, verdict):
    fill(tmp_path, {"treelora": (0.5, 0.1), "gem": rival}, stream="cldr")
    assert one("C3", tmp_path).verdict == verdict


@pytest.mark.parametrize("plain, saved, op_saved, verdict", [(100, 100, 0.9, HOLDS), (300, 100, 0.9, PARTLY), (300, 100, 0.8, FAILS), (300, 300, 0.9, FAILS)])
def test_c2_wants_the_factor_at_equal_accuracy(tmp_path, plain, saved, op_saved, verdict):
    content = [{"method": m, "savings": s, "seed": k, "op": x, "bwt": 0.0, "train": t, "steps": [1]} for k in (0, 1, 2)
               for m, s, x, t in (("hidelora", [], 0.9, 330), ("treelora", [], 0.9, plain), ("treelora", ["stop"], op_saved, saved))]
    rows(tmp_path, "split-digits/time.json", content)
    assert one("C2", tmp_path).verdict == verdict
    assert one("C4", tmp_path).verdict == UNTESTED


def test_c5_keeps_more_than_its_rival(tmp_path):
    fill(tmp_path, {"treelora": (0.8, 0), "hidelora": (0.8, 0)})
    fill(tmp_path, {"treelora": (0.8, 0), "hidelora": (0.7, 0)}, "quick/one-epoch")
    assert one("C5", tmp_path).verdict == HOLDS
    fill(tmp_path, {"hidelora": (0.8, 0)}, "quick/one-epoch")
    assert one("C5", tmp_path).verdict == PARTLY
    fill(tmp_path, {"treelora": (0.6, 0)}, "quick/one-epoch")
    assert one("C5", tmp_path).verdict == FAILS


def test_c6_counts_samples(tmp_path):
    fill(tmp_path, {"treelora": (0.8, 0), "hidelora": (0.8, 0)}, curve=(0.95, 1.0))
    fill(tmp_path, {"seqlora": (0.2, 0)})
    found = one("C6", tmp_path)
    assert found.verdict == HOLDS and "TreeLoRA 10, SeqLoRA 100" in found.found
    fill(tmp_path, {"treelora": (0.8, 0)})
    assert one("C6", tmp_path).verdict == FAILS


def ablation(root, name, levels):
    rows(root, "split-digits/ablations.json", [{"ablation": name, "label": label, "method": "treelora", "seed": s, "op": x + 0.001 * s, "bwt": 0.0, "train": 1.0} for label, x in levels.items() for s in (0, 1, 2)])


@pytest.mark.parametrize("random, lcb, verdict", [(0.8, 0.9, HOLDS), (0.8, 0.8, PARTLY), (0.7, 0.7, FAILS)])
def test_c7_takes_penalty_and_search_apart(tmp_path, random, lcb, verdict):
    ablation(tmp_path, "parts", {"no penalty, no search": 0.7, "penalty, random search": random, "penalty, LCB search": lcb})
    assert one("C7", tmp_path).verdict == verdict
    assert one("C8", tmp_path).verdict == one("C9", tmp_path).verdict == UNTESTED


@pytest.mark.parametrize("levels, verdict", [((0.6, 0.7, 0.8), HOLDS), ((0.6, 0.8, 0.7), PARTLY), ((0.7, 0.8, 0.6), FAILS)])
def test_c9_wants_each_step_up(tmp_path, levels, verdict):
    ablation(tmp_path, "depth", {f"adapted blocks: {n}": x for n, x in zip((1, 2, 10), levels)})
    assert one("C9", tmp_path).verdict == verdict


def test_one_margin_decides_for_all_claims():
    "A mean that is larger than its spread, but not than the 95 % limit, shows nothing in either direction."
    ours, level = {0: 0.0, 1: 0.6, 2: 0.8}, dict.fromkeys(range(3), 0.0)
    more, less = paired(ours, level), paired(level, ours)
    assert more.mean > more.spread and not more.above and not less.below
    assert not more.below and more.at_least and not less.at_least
    clear = paired({0: 0.5, 1: 0.6, 2: 0.7}, level)
    assert clear.above and paired(level, {0: 0.5, 1: 0.6, 2: 0.7}).below
    assert not paired({0: 1.0}, {0: 0.0}).above  # one seed shows nothing


@pytest.mark.parametrize("last, verdict", [((0.955, 0.956, 0.945), FAILS), ((0.965, 0.961, 0.950), HOLDS)])
def test_c9_does_not_hold_on_a_gain_within_the_margin(tmp_path, last, verdict):
    content = [{"ablation": "depth", "label": f"adapted blocks: {n}", "method": "treelora", "seed": s, "op": x, "bwt": 0.0, "train": 1.0}
               for n, levels in ((1, (0.955, 0.950, 0.936)), (6, last)) for s, x in enumerate(levels)]
    rows(tmp_path, "split-digits/ablations.json", content)
    found = one("C9", tmp_path)
    assert found.verdict == verdict
    if verdict == FAILS: assert "+0.5 ± 0.5" in found.found or "+0.5 ± 0.4" in found.found


@pytest.mark.parametrize("wins, verdict", [((0.0, 0.0, 0.0), HOLDS), ((0.2, -0.2, 0.0), FAILS)])
def test_c18_counts_no_gain_within_the_margin(tmp_path, wins, verdict):
    "Two rivals are a quarter worse in the mean; where the seeds disagree by more than that, nothing was shown."
    for seed, win in enumerate(wins):
        for method, level in (("treelora", 0.5 + win), ("gem", 0.38), ("ewc", 0.38), ("seqlora", 0.1)): put(tmp_path, fake(method, seed, level))
    assert one("C18", tmp_path).verdict == verdict


def test_c3_names_no_rival_within_the_margin(tmp_path):
    for seed, lead in enumerate((0.0, 0.006, 0.008)):
        for method, level in (("treelora", 0.5), ("gem", 0.5 + lead)): put(tmp_path, fake(method, seed, level, stream="cldr"))
    found = one("C3", tmp_path)
    assert "OP 50.0; better: none" in found.found and found.verdict == PARTLY


def test_c11_compares_gains_seed_by_seed(tmp_path):
    "A larger mean gain on related tasks counts only beyond the margin."
    for stream, each in {"math-llm": (0.0, 0.1, 0.3), "trace": (0.1, 0.1, 0.1)}.items():
        for seed, gain in enumerate(each):
            for method, score in (("seqlora", 0.4), ("treelora", 0.4 + gain)): put(tmp_path, fake(method, seed, score, stream=stream))
    assert one("C11", tmp_path).verdict == FAILS


def test_c16_is_about_growth(tmp_path):
    for times, verdict in (((1, 1.5, 1, 1), HOLDS), ((1, 50, 1, 3), PARTLY), ((1, 50, 1, 9), FAILS)):
        rows(tmp_path, "theory/cost.json", [{"search": s, "N": n, "round_ms": t} for (s, n), t in zip([("tree-lcb", 8), ("tree-lcb", 64), ("bast", 8), ("bast", 64)], times)])
        assert one("C16", tmp_path).verdict == verdict


def test_an_untested_part_is_not_shown(tmp_path):
    fill(tmp_path, {"treelora": (0.9, 0), "inflora": (0.5, 0)})
    assert one("C17", tmp_path).verdict == PARTLY


def test_tally_and_pairs():
    assert [tally(v) for v in ([True], [True, False], [False])] == [HOLDS, PARTLY, FAILS]
    with pytest.raises(ValueError, match="needs a vote"): tally([])
    assert paired({0: 2.0, 1: 2.0}, {1: 1.0, 5: 0.0}).n == 1


# Bad input

@pytest.mark.parametrize("harm, says", [
    (lambda r: "{", "damaged"), (lambda r: "[]", "lacks format"), (lambda r: r | {"format": 2}, "format 2"),
    (lambda r: r | {"R": [[None, None], [None, 0.5]]}, "not complete"), (lambda r: r | {"scores": {"op": 0.5}}, "do not follow"),
    (lambda r: r | {"config": r["config"] | {"stream": "cldr"}}, "belongs elsewhere"), (lambda r: r | {"config": r["config"] | {"seed": 7}}, "belongs elsewhere")])
def test_a_bad_file_is_named_and_left_out(tmp_path, harm, says):
    fill(tmp_path, {"treelora": (0.9, 0)})
    bad = tmp_path / "split-digits" / "quick" / "treelora-seed1.json"
    harmed = harm(json.loads(bad.read_text()))
    bad.write_text(harmed if isinstance(harmed, str) else json.dumps(harmed))
    evidence = Evidence(tmp_path)
    with pytest.warns(UserWarning, match=f"split-digits/quick/treelora-seed1.json is left out.*{says}"): runs = evidence.runs("split-digits")
    assert list(runs["treelora"]) == [0, 2] and list(evidence.left_out) == ["split-digits/quick/treelora-seed1.json"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evidence.runs("split-digits")  # said once


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": 3}', '{"rows": [], "format": 2}'])
def test_a_bad_table_counts_as_missing(tmp_path, content):
    (tmp_path / "theory").mkdir()
    (tmp_path / "theory" / "cost.json").write_text(content)
    with pytest.warns(UserWarning, match="theory/cost.json is left out"): found = one("C16", tmp_path)
    assert found.verdict == UNTESTED and "run_cost" in found.found


def test_missing_results_give_commands(tmp_path):
    for id_, found in judge(tmp_path).items():
        assert found.verdict == UNTESTED and re.fullmatch(r"no results; to be made by `(treelora|python -c) .+`", found.found), id_
    with pytest.raises(Missing, match="treelora compare --stream cldr --scale quick"): Evidence(tmp_path).runs("cldr", "quick/half")


def test_commands_name_functions_that_exist(tmp_path):
    from importlib import import_module
    from treelora.cli import parser
    for found in judge(tmp_path).values():
        command = found.found.split("`")[1]
        if command.startswith("treelora "): parser().parse_args(command.split()[1:])
        else:
            module, name = re.search(r"from (treelora[.\w]+) import (\w+)", command).groups()
            assert hasattr(import_module(module), name), command


@pytest.mark.parametrize("gains, verdict", [({"math-llm": (0.1, 0.1, 0.11)}, PARTLY), ({"math-llm": (0.3, -0.3, 0.1)}, FAILS), ({"math-llm": (0.1, 0.1)}, UNTESTED),
                                            ({"math-llm": (0.1, 0.1, 0.1), "trace": (0.05, 0.05, 0.05)}, HOLDS), ({"math-llm": (0.1, 0.1, 0.1), "trace": (0.2, 0.2, 0.2)}, FAILS),
                                            ({"math-llm": (0.1, 0.1, 0.1), "trace": (0.2,)}, PARTLY)])
def test_c11_compares_gains(gains, verdict, tmp_path):
    for stream, each in gains.items():
        for seed, gain in enumerate(each):
            for method, score in (("seqlora", 0.4), ("treelora", 0.4 + gain)): put(tmp_path, fake(method, seed, score, stream=stream))
    assert one("C11", tmp_path).verdict == verdict


ORDERS = [f"cl-benchmark-{k}" for k in range(1, 7)]


@pytest.mark.parametrize("streams, scale, lead, verdict", [
    (["cl-benchmark-1"], "quick", 0.1, PARTLY), (["cl-benchmark-1"], "quick", -0.1, FAILS), (["long-15", *ORDERS], "small", 0.1, HOLDS),
    (["long-15", "cl-benchmark-2"], "small", [0.1, -0.1], PARTLY)])
def test_c14_wants_all_orders_to_hold(streams, scale, lead, verdict, tmp_path):
    for stream, ahead in zip(streams, lead if isinstance(lead, list) else [lead] * len(streams)):
        for seed in range(3):
            for method, score in (("seqlora", 0.3), ("olora", 0.4), ("treelora", 0.4 + ahead)): put(tmp_path, fake(method, seed, score, stream=stream), scale)
    found = one("C14", tmp_path)
    assert found.verdict == verdict and "best rival O-LoRA 40.0" in found.found and found.on.startswith(f"{scale} scale, {streams[0]}")


def test_c14_wants_three_seeds(tmp_path):
    for method in ("olora", "treelora"): put(tmp_path, fake(method, 0, 0.4, stream="cl-benchmark-1"))
    assert one("C14", tmp_path).verdict == UNTESTED


def test_c10_reads_the_trees(tmp_path):
    "A saved tree that is the family tree holds, one that is not does not."
    tasks = ["es", "de", "pt", "nl"]
    families, mixed = ([[tasks], [[a, b], [c, d]], [[a], [b], [c], [d]]] for a, b, c, d in (("es", "pt", "de", "nl"), ("es", "de", "pt", "nl")))
    for groups, verdict in ((families, HOLDS), (mixed, FAILS)):
        fill(tmp_path, {"treelora": (0.5, 0)}, stream="cldr", tasks=tasks, trees=[{"after": "nl", "groups": groups}])
        assert one("C10", tmp_path).verdict == verdict


def test_c10_does_not_count_a_tree_that_no_run_used(tmp_path):
    "Signatures that would make the family tree are shown, and decide nothing."
    from test_language_results import family_gram
    tasks = ["es", "de", "pt", "sv", "it", "nl"]
    mixed = [[tasks], [["es", "de", "sv"], ["pt", "it", "nl"]], [["es", "de"], ["sv"], ["pt", "nl"], ["it"]], [[t] for t in tasks]]
    fill(tmp_path, {"treelora": (0.5, 0)}, stream="cldr", tasks=tasks, trees=[{"after": "nl", "groups": mixed}])
    fill(tmp_path, {"alone": (0.5, 0)}, stream="cldr", tasks=tasks, extra={"gram": {"grad": family_gram().tolist()}})
    found = one("C10", tmp_path)
    assert found.verdict == FAILS and "made afterwards, from gradients of the same start near the output, 100 %" in found.found


def test_the_table_has_a_row_a_claim():
    table = Report(judge("no-such-folder"))
    assert table.counts() == dict.fromkeys(VERDICTS, 0) | {UNTESTED: 18}
    assert all(line.count(" | ") == 5 for line in table._repr_markdown_().splitlines())


def test_a_copy_of_the_results_gives_the_same_verdict(tmp_path):
    "Verdicts depend on the files alone, not on where they lie."
    shutil.copytree(RESULTS / "theory", tmp_path / "theory")
    assert one("C16", tmp_path) == one("C16", RESULTS)
