"Starts of several kinds: the old ones are special cases, recipes give the adapters that they stand for, and a race goes on after a break."
import json

import pytest
import torch
from hypothesis import given, strategies as st
from torch.nn.functional import cross_entropy

from test_algorithm import data, learn
from test_branch import short_tasks
from treelora.algorithm import VARIANTS, TreeLoRA
from treelora.engine.options import KINDS
from treelora.engine.starts import Race, Start
from treelora.tree import TaskTree, merge_lora


def made(make_net, tasks=4, **changes):
    "A `TreeLoRA` that looks before each task's first step, after some tasks."
    tl = TreeLoRA(make_net(), **VARIANTS["branch"] | {"lam": 0.001} | changes)
    for k in range(tasks): train(tl, f"t{k}", k)
    return tl


def batch_loss(tl, seed):
    x, y = data(seed)
    return lambda i: cross_entropy(tl.model(x[4 * i:4 * i + 4]), y[4 * i:4 * i + 4])


def train(tl, name, seed, steps=4, look=True):
    x, y = data(seed)
    opt = torch.optim.Adam(tl.params, 0.02)
    with tl.task(name):
        while look and tl.look(batch_loss(tl, seed)): pass
        for _ in range(steps): cross_entropy(tl.model(x), y).backward(), tl.step(), opt.step(), opt.zero_grad()
    return tl


def test_leaves_alone_are_todays_branch(make_net):
    one, other = made(make_net), made(make_net, starts=["leaf"])
    assert torch.equal(one.bank.adapters, other.bank.adapters) and one.found == other.found
    assert one.config == other.config and "starts" not in one.config and "starts" not in one.state()[0]


@pytest.mark.parametrize("kind", ["last", "fresh"])
def test_one_start_alone_is_that_init(make_net, kind):
    "No look is spent, and without a pull the adapters are those of `init` to the bit."
    one = made(make_net, lam=0.0, penalty="l1", starts=(kind,))
    other = TreeLoRA(make_net(), lam=0.0, init=kind)
    for k in range(4): train(other, f"t{k}", k, look=False)
    assert torch.equal(one.bank.adapters, other.bank.adapters) and one.last.looked == 0
    assert one.found["kind"] == kind and one.found["loss"] == {}


def test_recipes_give_their_adapters(make_net):
    tl = made(make_net, starts=KINDS)
    make = lambda *recipe: tl.starts_of.adapter(Start(*recipe), tl.initial)
    assert torch.equal(make("vector", ("t3", "t1"), 0.0), make("last", ("t3",)))
    assert torch.equal(make("fresh"), tl.initial) and torch.equal(make("leaf", ("t2",)), tl.bank.adapter("t2"))
    views = [tl.layout.views(make(*r)) for r in (("leaf", ("t0",)), ("leaf", ("t2",)), ("leaf", ("t3",)), ("node", ("t0", "t2", "t3")))]
    for i in range(0, len(views[0]), 2):
        pairs = [(v[i], v[i + 1][0]) for v in views]
        assert all(map(torch.equal, merge_lora(pairs[:3]), pairs[3]))


def test_what_a_task_has_changed_is_what_it_has_changed(make_net):
    "Whatever it started from; measured in the loop against the recipe."
    tl = TreeLoRA(make_net(), **VARIANTS["branch"] | {"lam": 0.001, "starts": ("last", "vector")})
    for k in range(5):
        x, y = data(k)
        opt = torch.optim.Adam(tl.params, 0.02)
        with tl.task(f"t{k}"):
            while tl.look(lambda i: cross_entropy(tl.model(x), y) - (tl._now.race._unseen() or Start("last")).name.count("vector")): pass
            before = tl.live.read()
            for _ in range(4): cross_entropy(tl.model(x), y).backward(), tl.step(), opt.step(), opt.zero_grad()
        torch.testing.assert_close(tl.starts_of.vector(f"t{k}", tl.initial), tl.live.read() - before)
    assert tl.found["kind"] == "vector"


@given(st.integers(1, 9), st.integers(1, 24), st.lists(st.sampled_from(KINDS), min_size=1, unique=True), st.integers(0, 99))
def test_a_race_spends_its_looks_and_no_more(n, most, kinds, seed):
    "Each start's i-th look is at batch i, no start has a look that the leading two did not earn, and a break changes nothing."
    g = torch.Generator().manual_seed(seed)
    tree, true = TaskTree(), {}
    for k in range(n): tree.insert(f"t{k}", torch.randn(3, 2, generator=g))
    new = lambda: Race(tuple(kinds), tree, dict.fromkeys(tree.tasks), most)
    if not list(new()._all()): return
    batches, race = torch.randn(most, generator=g).tolist(), new()
    while race.chosen is None:
        start, i = race.next_look()
        assert i == len(race.looks.losses[race.starts.index(start)]) if start in race.starts else i == 0
        race.saw(start, true.setdefault(start, torch.rand(1, generator=g).item()) + batches[i])
        again = new()
        again.restore(json.loads(json.dumps(race.state())))
        assert again.chosen == race.chosen and (race.chosen is not None or again.next_look() == race.next_look())
    assert race.looked in (0, most) and len(set(race.starts)) == len(race.starts)
    if race.looked: assert race.start == min(race.starts, key=true.get)
    assert sum(race.found()["rounds"].values()) == race.looked


def test_a_race_that_is_put_aside_goes_on_alike(make_net):
    def run(cut):
        tl = made(make_net, starts=KINDS)
        if cut is not None:
            with pytest.raises(KeyboardInterrupt), tl.task("new"):
                while tl._now.race.looked < cut and tl.look(batch_loss(tl, 9)): pass
                plain, tensors = tl.state()
                raise KeyboardInterrupt
            tl = TreeLoRA(make_net(), **VARIANTS["branch"] | {"lam": 0.001, "starts": KINDS})
            tl.restore(json.loads(json.dumps(plain)), tensors)
        return train(tl, "new", 9)
    whole, *others = (run(cut) for cut in (None, 3, 8))
    for other in others:
        assert other.found == whole.found and torch.equal(other.bank.adapters, whole.bank.adapters)
        assert other.bank.starts == whole.bank.starts


def test_files_keep_the_recipes(tmp_path, make_net):
    tl = made(make_net, starts=KINDS)
    tl.save(tmp_path)
    again = TreeLoRA.load(tmp_path, make_net())
    assert again.config == tl.config and again.bank.starts == tl.bank.starts and set(tl.bank.starts) == set(tl.bank.names)
    for one in (tl, again): train(one, "more", 7)
    assert torch.equal(again.bank.adapters, tl.bank.adapters) and again.found == tl.found


def test_a_step_before_the_start_is_found_says_what_to_do(make_net):
    tl = made(make_net, starts=("leaf", "last"), tasks=2)
    before = tl.live.read()
    with pytest.raises(ValueError, match=r"has not found its start.*tl\.look"): train(tl, "new", 2, look=False)
    assert torch.equal(tl.live.read(), before) and tl._now is None
    with pytest.raises(ValueError, match="loss of batch 0 under the start last:t1 is nan"), tl.task("new"):
        tl.look(lambda i: torch.tensor(float("nan")))
    assert torch.equal(tl.live.read(), before)


def test_fresh_weights_have_no_pull(make_net):
    tl = made(make_net, tasks=2, lam=1e6, starts=("fresh",))
    assert tl.found["branch"] is None and tl.last.arms is None
    assert not torch.equal(tl.bank.adapter("t1"), tl.initial)


def test_the_vision_form_takes_starts():
    method, loop = short_tasks(tasks=4, starts=("leaf", "node", "last", "vector"))
    branches = method.extra()["branches"]
    assert [sum(b["rounds"].values()) for b in branches] == [0, 4, 6]
    assert {b["kind"] for b in branches} <= set(KINDS) and loop.steps == [6] * 4
    assert method.options["starts"] == ["leaf", "node", "last", "vector"]


def test_starts_of_a_language_model_are_measured_and_not_again(tmp_path, tiny_language):
    from test_language import tiny_stream
    from treelora.experiments.starts import Bench, measure_starts
    from treelora.learning.language import add_adapters
    def bench():
        model, tokenizer = tiny_language()
        return Bench(add_adapters(model.requires_grad_(False), r=2, alpha=4), tokenizer, tiny_stream(), 100, steps=2, lr=0.01)
    path, names = tmp_path / "starts" / "measured.json", ["task-0", "task-1"]
    measure_starts(bench(), names, "task-2", path, most=3)
    rows = json.loads(path.read_text())
    first = {r["start"]: sum(r["first"]) for r in rows if r["what"] == "first"}
    trained = [r for r in rows if r["what"] == "start" and r["task"] == "task-2"]
    assert {"last", "fresh", "leaf task-0", "last + 0.5 task-0", "merged task-0+task-1", "last, low third of task-0"} <= set(first)
    assert [r["start"] for r in trained] == sorted(first, key=first.get)[:3] and all(set(r["nll"]) == {"0", "2"} for r in trained)
    assert [r["start"] for r in rows if r["task"] in names] == ["fresh", "last"]
    path.write_text(json.dumps(rows[:-1]))          # as if the last one had been cut off
    measure_starts(bench(), names, "task-2", path, most=3)
    again = json.loads(path.read_text())
    assert again == rows


def test_the_language_form_takes_starts(tiny_language):
    from test_language import tiny_run
    result = tiny_run(tiny_language, "treelora-branch", starts=("leaf", "last", "vector"))
    branches = result.as_dict()["extra"]["branches"]
    assert [b["task"] for b in branches] == ["task-1", "task-2"] and all(b["kind"] in ("leaf", "last", "vector") for b in branches)
    json.dumps(branches)
