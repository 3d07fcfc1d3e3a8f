"Campaigns: a file is checked in one sentence, what is there stays, grids grow and are settled first, and a kill loses nothing."
import json, os, signal, subprocess, sys, time
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import torch
from test_contenders import tiny_stream  # is registered there

from treelora.cli import main
from treelora.experiments.campaigns import Driver, Estimates, jobs, ordered, probe, shortened, work_folder
from treelora.experiments.plan import Campaign, Planned, read_campaign, result_file
from treelora.experiments.tuning import Grid, beyond, grown, next_trials, read_tuning, tuned, tuning_file
from treelora.learning.text import Example, TextSet, TextStream, TextTask
from treelora.methods import get_method
from treelora.methods.base import METHODS, register

ROOT = Path(__file__).parent.parent


RUNS = """
[[runs]]
stream = "tiny-squares"
methods = ["seqlora"]
epochs = 1
lr = 0.01
"""
TUNED = """
side_by_side = 0
seeds = [0]
tuning_seeds = [100, 101]

[[tune]]
stream = "tiny-squares"
methods = ["seqlora"]
epochs = 1
grid = { lr = [0.01, 0.02] }
widen = 1

[[runs]]
stream = "tiny-squares"
methods = ["seqlora"]
epochs = 1
lr = "tuned"
"""


@pytest.fixture
def campaign_of(tmp_path):
    "A campaign of a text, with a results folder of its own."
    def make(text, **changes):
        (tmp_path / "camp.toml").write_text(text)
        return replace(read_campaign(tmp_path / "camp.toml"), **{"results": tmp_path / "results", "side_by_side": 0} | changes)
    return make


MISTAKES = {
    "no blocks": ("seeds = [0]", "has neither"), "no TOML": ("seeds = [", "is not TOML"),
    "one bracket": (RUNS.replace("[[runs]]", "[runs]"), "two brackets"),
    "a key on top": ("seed = [0]\n" + RUNS, "there is no 'seed'"), "a key": (RUNS + "learning_rate = 1", "there is no 'learning_rate'"),
    "a stream": (RUNS.replace("tiny-squares", "split-nothing"), "no stream 'split-nothing'"),
    "a method": (RUNS.replace('"seqlora"', '"seqlore"'), "Unknown method 'seqlore'"),
    "of the other kind": (RUNS.replace('"seqlora"', '"fix"'), "learns language streams"),
    "no methods": (RUNS.replace('["seqlora"]', "[]"), "has no methods"),
    "a size": (RUNS + "batch_size = 0", "batch_size=0 must be positive"), "epochs": (RUNS.replace("epochs = 1", "epochs = [1, 2, 3]"), "3 numbers, but the stream has 2 tasks"),
    "a kind": (RUNS.replace("epochs = 1", 'epochs = "1"'), "must be a whole number or a list"), "a truth": (RUNS + "curves = true", "must be a whole number"),
    "a rate": (RUNS.replace("lr = 0.01", 'lr = "best"'), 'must be a number or "tuned"'), "seeds": ("seeds = []\n" + RUNS, "must be a list of whole numbers"),
    "twice": ("seeds = [1, 1]\n" + RUNS, "a seed twice"), "one file": (RUNS + RUNS.replace("0.01", "0.02"), "two different runs would write"),
    "value": (RUNS + "value = 0", "must be positive"), "many": ("side_by_side = 99\n" + RUNS, "between 0 and 8"), "hours": ("hours = 0\n" + RUNS, "must be positive"),
    "since": ("since = 3\n" + RUNS, "must be a day, such as 2026-12-31"), "log": ('log = "paper"\n' + RUNS, "is unknown"), "a grid of one": (TUNED.replace("[0.01, 0.02]", "[0.01]"), "a grid of one is no choice"),
    "a grid of words": (TUNED.replace("[0.01, 0.02]", '["a", "b"]'), "must be a list of numbers"),
    "two grids": (TUNED.replace("{ lr = [0.01, 0.02] }", "{ lr = [1, 2], lam = [1, 2] }"), "must name one number"),
    "tuned_on": (RUNS + 'tuned_on = "split-digits"', 'wants lr = "tuned"'),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_sentence(tmp_path, what, capsys):
    text, said = MISTAKES[what]
    (tmp_path / "wrong.toml").write_text(text)
    with pytest.raises(ValueError) as error: read_campaign(tmp_path / "wrong.toml")
    assert said in str(error.value) and "wrong.toml" in str(error.value) and "\n" not in str(error.value).strip()
    assert main(["campaign", str(tmp_path / "wrong.toml")]) == 2 and not (tmp_path / "results").exists()


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no campaign"): read_campaign(tmp_path / "none.toml")


def test_the_same_block_twice_is_run_once(campaign_of):
    campaign = campaign_of("seeds = [0]\n" + RUNS + RUNS)
    assert len({result_file(p, "r") for p in campaign.runs}) == 1 and campaign.runs[0] == campaign.runs[1]


def test_first_seeds_come_first(campaign_of):
    campaign = campaign_of(RUNS + "value = 6\nseeds = [3, 4, 5]")
    assert [(p.seed, p.value) for p in campaign.runs] == [(3, 6.0), (4, 3.0), (5, 2.0)]


def test_a_grid_grows_at_its_edge():
    assert beyond((0.001, 0.002, 0.005), True) == 0.013 and beyond((0.001, 0.002), False) == 0.0005
    assert beyond((0.0, 1.0), False) is None and beyond((0.0, 1.0), True) == 2.0
    assert grown((1.0, 2.0), {1.0: 0.1, 2.0: 0.2}.get, 3) == [1.0, 2.0, 4.0]
    assert grown((1.0, 2.0), {1.0: 0.1, 2.0: 0.2, 4.0: 0.1}.get, 3) == [1.0, 2.0, 4.0]
    assert grown((1.0, 2.0), {1.0: 0.1, 2.0: 0.2}.get, 0) == [1.0, 2.0]
    assert grown((0.0, 1.0), {0.0: 0.2, 1.0: 0.1}.get, 3) == [0.0, 1.0]


def test_a_strength_is_chosen_at_the_best_rate():
    grids = [Grid("s", ("m",), "quick", "quick", k, v, (100, 101), widen=0) for k, v in (("lr", (1.0, 2.0)), ("lam", (3.0, 4.0)))]
    rows, asked = [], []
    while open_ := next_trials(grids, rows)[1]:
        asked += [s for _, s, _ in open_]
        rows += [{"settings": s, "seed": seed, "op": s["lr"] + s.get("lam", 0)} for _, s, seed in open_]
    assert next_trials(grids, rows) == ({"lr": 2.0, "lam": 4.0}, []) and len(rows) == 8
    assert all(s["lr"] == 2.0 for s in asked if "lam" in s)
    assert next_trials(grids, [r for r in rows if r["seed"] == 100])[0] == {}  # one seed decides nothing


def test_tunes_runs_and_leaves_what_is_there(campaign_of):
    campaign, said = campaign_of(TUNED), []
    ready, waiting = jobs(campaign)
    assert [(j.trial["lr"], j.planned.seed) for j in ready] == [(0.01, 100), (0.01, 101), (0.02, 100), (0.02, 101)] and len(waiting) == 1
    assert Driver(campaign, said.append).drive() == {} and jobs(campaign) == ([], [])
    tuning = read_tuning(tuning_file(campaign.results, "tiny-squares", "quick"))
    tried = {r["settings"]["lr"] for r in tuning["rows"]["seqlora"]}
    assert {0.01, 0.02} < tried and all({r["seed"] for r in tuning["rows"]["seqlora"] if r["settings"]["lr"] == lr} == {100, 101} for lr in tried)
    mean = lambda lr: sum(r["op"] for r in tuning["rows"]["seqlora"] if r["settings"]["lr"] == lr)
    assert mean(tuning["lr"]["seqlora"]) == max(map(mean, tried))
    assert all(r["bwt"] is None for r in tuning["rows"]["seqlora"])  # only what decides is measured
    path = result_file(campaign.runs[0], campaign.results)
    assert json.loads(path.read_text())["config"]["lr"] == tuning["lr"]["seqlora"]
    assert not list((work_folder(campaign)).glob("trials/*")) and not list(work_folder(campaign).glob("checkpoints/*"))
    before = path.stat().st_mtime_ns
    assert Driver(campaign).drive() == {} and path.stat().st_mtime_ns == before
    assert any("left" in line for line in said) and "about" in said[0]


def test_what_is_there_of_other_settings_or_data_is_named(campaign_of):
    campaign = campaign_of("seeds = [0]\n" + RUNS)
    Driver(campaign).drive(probing=False)
    path = result_file(campaign.runs[0], campaign.results)
    with pytest.raises(ValueError, match=f"{path.name} is there, but differs in lr"): jobs(campaign_of("seeds = [0]\n" + RUNS.replace("0.01", "0.02")))
    saved = json.loads(path.read_text())
    saved["sha256"]["data"] = "0" * 64
    path.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="differs in data"): jobs(campaign)
    tomorrow = datetime.now(timezone.utc) + timedelta(days=1)
    assert len(jobs(replace(campaign, since=tomorrow))[0]) == 1  # all anew


def test_a_day_from_which_results_count(campaign_of):
    campaign = campaign_of("since = 2030-01-02\nseeds = [0]\n" + RUNS)
    assert campaign.since == datetime(2030, 1, 2, tzinfo=timezone.utc)
    Driver(replace(campaign, since=None)).drive(probing=False)
    assert jobs(replace(campaign, since=None)) == ([], []) and len(jobs(campaign)[0]) == 1


def test_a_run_without_tuning_says_so(campaign_of):
    with pytest.raises(ValueError, match="Nothing was tuned for seqlora on tiny-squares"): jobs(campaign_of("seeds = [0]\n" + RUNS.replace("0.01", '"tuned"')))


def test_a_budget_takes_the_tuning_of_the_folder_above(campaign_of):
    campaign = campaign_of(TUNED)
    Driver(campaign).drive(probing=False)
    below = campaign_of("seeds = [0]\n" + RUNS.replace("0.01", '"tuned"') + 'folder = "quick/other"')
    assert jobs(below)[0][0].given["lr"] == tuned(campaign.results, "tiny-squares", "quick", "seqlora")["lr"]


def test_a_run_below_waits_for_the_grid_above(campaign_of):
    campaign = campaign_of(TUNED + RUNS.replace("0.01", '"tuned"') + 'folder = "quick/other"')
    assert [p.folder for p in jobs(campaign)[1]] == ["quick", "quick/other"]


def test_most_valuable_per_second_first(campaign_of):
    campaign = campaign_of("seeds = [0]\n" + RUNS + "value = 2\n" + RUNS.replace("seqlora", "treelora") + "value = 3\n" + RUNS.replace("seqlora", "ewc"))
    estimates = Estimates(campaign)
    for p, seconds in zip(campaign.runs, (10.0, 30.0, 4.0)): estimates.add(p, seconds)
    assert [job.planned.method for job in ordered(jobs(campaign)[0], estimates)] == ["ewc", "seqlora", "treelora"]


def test_nothing_begins_that_would_end_too_late(campaign_of):
    campaign = campaign_of("seeds = [0]\nhours = 0.01\n" + RUNS + RUNS.replace("seqlora", "ewc"))
    driver = Driver(campaign)
    for p, seconds in zip(campaign.runs, (3600.0, 5.0)): driver.estimates.add(p, seconds)
    assert driver.drive(probing=False) == {} and [p.method for p in campaign.runs if result_file(p, campaign.results).exists()] == ["ewc"]


class Broken(get_method("seqlora")):
    "Fails in its first step."
    name = "campaign-broken"

    def loss(self, batch): raise ValueError("the loss is broken")


def test_a_run_that_fails_is_named_and_others_go_on(campaign_of, tmp_path, capsys):
    register(Broken)
    try:
        campaign = campaign_of("seeds = [0]\n" + RUNS.replace("seqlora", "campaign-broken") + RUNS)
        failed = Driver(campaign).drive(probing=False)
    finally: del METHODS["campaign-broken"]
    assert len(failed) == 1 and "the loss is broken" in next(iter(failed.values()))
    assert result_file(campaign.runs[1], campaign.results).exists() and json.loads((work_folder(campaign) / "progress.json").read_text())["failed"] == failed


def test_a_gpu_that_is_not_there(campaign_of, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="there is no GPU here"): Driver(campaign_of('device = "cuda"\n' + RUNS))


def test_a_short_stream_is_the_same_kind():
    few = shortened(tiny_stream("quick", 0, None), 6, tests=2, tasks=1)
    assert len(few) == 1 and len(few[0].train) == 6 and len(few[0].test) == 2
    text = TextStream("words", "quick", 0, [TextTask("a", TextSet([Example(f"{i}?", "x") for i in range(9)]), TextSet([Example("q", "y")] * 3), "accuracy", 2)])
    few = shortened(text, 4, tests=2)
    assert [e.prompt for e in few[0].train] == ["0?", "2?", "5?", "8?"] and len(few[0].test) == 2


def test_an_estimate_is_of_the_right_size(campaign_of):
    "Not a speed: the estimate of a run and the run lie within a factor that no load explains away."
    campaign = campaign_of("seeds = [0]\n" + RUNS.replace("epochs = 1", "epochs = 6"))
    start = time.perf_counter()
    guess = probe(jobs(campaign)[0][0], campaign)
    Driver(campaign).drive(probing=False)
    assert guess > 0 and guess < 50 * (time.perf_counter() - start)


def test_the_projects_own_campaigns_can_be_read(tmp_path):
    root, read = os.environ.get("TREELORA_DATA", str(tmp_path)), set()  # with a folder nobody asks the hub
    for path in sorted((ROOT / "campaigns").glob("*.toml")):
        try: campaign = read_campaign(path, root=root)
        except FileNotFoundError: continue  # data that is not on this machine
        except ValueError as error:  # TRACE's folder may lack a task
            assert path.stem == "paper-llm" and "8 numbers, but the stream has 7 tasks" in str(error)
            continue
        assert campaign.runs or campaign.grids
        read.add(path.stem)
    assert {"digits", "cldr", "many-images", "many-languages"} <= read


DIGITS = """
seeds = [0, 1]
side_by_side = 2

[[runs]]
stream = "split-digits"
methods = ["seqlora"]
epochs = 2
lr = 0.005
"""


def start_driver(folder):
    command = [sys.executable, "-c", "from treelora.cli import main; import sys; sys.exit(main(sys.argv[1:]))", "campaign", str(folder / "digits.toml"), "--results", str(folder / "results"), "--quiet"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def workers_of(folder):
    "Processes that run for a results folder."
    found = []
    for entry in Path("/proc").iterdir():
        try: line = (entry / "cmdline").read_bytes().decode(errors="replace")
        except (OSError, ValueError): continue
        if "campaigns import work" in line and str(folder) in line: found.append(int(entry.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_a_kill_loses_nothing(tmp_path):
    (tmp_path / "digits.toml").write_text(DIGITS)
    driver = start_driver(tmp_path)
    checkpoints = tmp_path / "results" / "campaigns" / "digits" / "checkpoints"
    deadline = time.monotonic() + 300
    while not list(checkpoints.glob("*/*/state.json")) and not list(checkpoints.glob("*/*")) and time.monotonic() < deadline: time.sleep(0.2)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    while workers_of(tmp_path) and time.monotonic() < deadline: time.sleep(0.2)
    assert not workers_of(tmp_path)  # they end with their driver
    again = start_driver(tmp_path)
    out, _ = again.communicate(timeout=600)
    assert again.returncode == 0, out
    paths = [tmp_path / "results" / "split-digits" / "quick" / f"seqlora-seed{s}.json" for s in (0, 1)]
    whole = [json.loads(p.read_text()) for p in paths]
    plain = __import__("treelora.learner", fromlist=["run"]).run("split-digits", "seqlora", seed=0, epochs=2, lr=0.005, progress=False)
    assert plain.as_dict()["R"] == whole[0]["R"]
    assert json.loads((tmp_path / "results" / "campaigns" / "digits" / "progress.json").read_text())["to_do"] == 0
