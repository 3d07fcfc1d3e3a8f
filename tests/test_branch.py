"The search for the branch: fair among batches of any difficulty, never at the cost of training, and the same after a break."
import json
import warnings

import pytest
import torch
from hypothesis import given, strategies as st
from torch.nn.functional import cross_entropy

from test_algorithm import data, learn
from test_learner import tiny_stream, tiny_vit
from treelora.algorithm import VARIANTS, TreeLoRA
from treelora.engine.options import Options
from treelora.engine.task import PairedLooks
from treelora.learner import Learner
from treelora.methods import get_method


def train(tl, name, steps, rounds=None, seed=0):
    "A task in a loop that does not look first."
    x, y = data(seed)
    opt = torch.optim.Adam(tl.params, 0.02)
    with tl.task(name, rounds=rounds):
        for _ in range(steps):
            loss = lambda: cross_entropy(tl.model(x), y)
            loss().backward()
            tl.step(loss), opt.step(), opt.zero_grad()
    return tl


def short_tasks(method="treelora-branch", tasks=12, **settings):
    "A stream of many tasks with six steps each, learned."
    size = 4 * -(-tasks // 2)  # of an image: a row per class
    stream = tiny_stream(classes=2 * tasks, size=size)
    made = get_method(method, "vision").for_stream(tiny_vit(2 * tasks, size), stream, **settings)
    loop = Learner(stream, made, epochs=2, batch_size=8, lr=0.01, progress=False)
    made.tap = made.tii = False                      # only the adapters are looked at here
    loop._evaluate = lambda tasks: None
    return made, loop.fit()


def test_every_short_task_trains():
    method, loop = short_tasks()
    bank, found = method.tl.bank, method.extra()
    assert loop.steps == [6] * 12 and method.tl.last.round == 6
    starts = [method.tl.initial] + [bank.adapter(b["branch"]) for b in found["branches"]]
    assert all(not torch.equal(bank.adapter(name), start) for name, start in zip(bank.names, starts))
    moved = [((bank.adapter(n) - s).norm() / s.norm()).item() for n, s in zip(bank.names, starts)]
    assert found["movement"] == pytest.approx(moved, abs=2e-6) and min(moved) > 1e-3
    assert [sum(b["rounds"].values()) for b in found["branches"]] == [2 * n for n in range(1, 12)]


@pytest.mark.parametrize("signal", ["stored", "fresh", "loss"])
def test_a_search_in_steps_takes_a_quarter_at_most(make_net, signal):
    tl = TreeLoRA(make_net(), lam=0.01, signal=signal, init="branch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(12): train(tl, f"t{i}", 6, rounds=6, seed=i)
    assert tl.last.round == 6 and tl.last.held == 1 and tl.last.looked == 1
    assert not any(torch.equal(a, b) for i, a in enumerate(tl.bank.adapters) for b in tl.bank.adapters[:i])
    train(tl, "long", 60, rounds=60)
    assert tl.last.held == 15                       # a quarter of the steps, not two per task
    train(tl, "longer", 200, rounds=200)
    assert tl.last.held == 2 * 13


@pytest.mark.parametrize("signature", ["grad", "update", "weight"])
@pytest.mark.parametrize("signal", ["stored", "fresh", "loss"])
def test_a_task_that_only_searched_says_so_and_is_its_branch(tmp_path, make_net, signal, signature):
    tl = TreeLoRA(make_net(), lam=0.01, signal=signal, init="branch", signature=signature)
    for i in range(4): train(tl, f"t{i}", 12, seed=i)
    with pytest.warns(UserWarning, match=r"All 3 steps of task 'short' went to the search.*rounds=.*search_rounds=.*look"):
        train(tl, "short", 3)
    for l, k in enumerate(tl.last.arms.expand(2).tolist()):
        assert torch.equal(tl.bank.adapters[-1][l], tl.bank.adapters[k][l])
        assert torch.equal(tl.bank.signatures[-1][l], tl.bank.signatures[k][l])
    assert torch.equal(tl.live.read(), tl.bank.adapter("short")) and tl.tree.tasks[-1] == "short"
    tl.save(tmp_path)
    again = TreeLoRA.load(tmp_path, make_net())
    for one in (tl, again): train(one, "more", 20)
    assert again.tree.newick() == tl.tree.newick() and torch.equal(again.bank.adapters, tl.bank.adapters)
    assert tl.last.trained and tl.last.held == 10


def looked(make_net, seed, n=8, gap=0.1, c=0.05, **changes):
    "A search over n tasks of which one is the best by `gap`, on batches that differ by ten times as much."
    g = torch.Generator().manual_seed(seed)
    tl = TreeLoRA.variant("branch", make_net(), **{"search_options": {"c": c}, "seed": seed} | changes)
    rank = torch.randperm(n, generator=g).float()
    arms = gap * (1 + (rank > 0) + 0.05 * rank)
    for k in range(n):
        tl.bank.add(f"t{k}", torch.randn(2, tl.layout.width, generator=g), arms[k] * torch.ones(2, tl.layout.width))
        tl.tree.insert(f"t{k}", [arms[k] * torch.ones(size) for size in tl.layout.sizes])
    batches = 3 + 10 * gap * torch.rand(200, generator=g)
    loss = lambda i: batches[i] + tl.params[0].detach().flatten()[0]
    return tl, loss, f"t{int(arms.argmin())}"


@pytest.mark.parametrize("c", [0.05, 1.0])
def test_the_best_branch_is_found_on_batches_of_any_difficulty(make_net, c):
    "Means over what each arm had seen were right in 20 (c = 0.05) and in 10 (c = 1, the width of the form for text) of these 20 searches."
    for seed in range(20):
        tl, loss, best = looked(make_net, seed, c=c)
        with pytest.raises(KeyboardInterrupt), tl.task("new"):
            while tl.look(loss): pass
            found, now = tl.found, tl._now
            raise KeyboardInterrupt
        assert found["branch"] == best == min(found["loss"], key=found["loss"].get)
        assert now.looked == sum(found["rounds"].values()) == 16 and now.round == 0
        first = found["rounds"]["t0"]
        assert max(found["rounds"].values()) == first


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_looks_are_two_per_task_and_64_at_most(make_net, n):
    tl, loss, _ = looked(make_net, 0, n)
    asked = []
    with pytest.raises(ValueError, match="without a step"), tl.task("new", rounds=3):
        while tl.look(lambda i: asked.append(i) or loss(i)): pass
        assert not tl.look(loss) and len(asked) == min(2 * n, 64) and tl._now.round == 0 and tl._now.rounds == 3
        assert set(asked) == set(range(max(asked) + 1))          # no batch is left out


@given(st.data())
def test_nobody_wins_by_fewer_or_easier_batches(drawn):
    "Whatever the numbers of looks: with additive batches the best of those that were seen is chosen, and losses differ by the true gaps."
    arms = drawn.draw(st.lists(st.integers(-50, 50), min_size=2, max_size=8, unique=True))
    batches = drawn.draw(st.lists(st.integers(-1000, 1000), min_size=1, max_size=12))
    looks = PairedLooks()
    for wanted in drawn.draw(st.lists(st.integers(0, len(arms) - 1), min_size=1, max_size=12 * len(arms))):
        arm, batch = looks.turn(wanted)
        assert batch == len(looks.losses[arm])
        if batch == len(batches): break
        assert looks.add(arm, float(arms[arm] + batches[batch])) == arms[arm] - arms[0]
        assert all(len(x) <= len(looks.losses[0]) for x in looks.losses.values())
    seen = [k for k, x in looks.losses.items() if x]
    best = min(seen, key=lambda k: arms[k])
    assert looks.best() == best
    levelled = looks.levelled(best)
    assert all(levelled[k] - levelled[best] == pytest.approx(arms[k] - arms[best]) for k in seen)


def test_a_lead_on_shared_batches_decides():
    looks = PairedLooks()
    looks.restore([[0, [1.0, 9.0, 1.0]], [1, [0.9, 8.0]], [2, [0.95]]])
    assert looks.best() == 1
    looks.restore([[0, [1.0, 9.0, 1.0]], [1, [0.9, 8.0]], [2, [0.85]]])
    assert looks.best() == 2
    again = PairedLooks()
    again.restore(json.loads(json.dumps(looks.state())))
    assert again.losses == looks.losses


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_chooses_nothing(make_net, value):
    tl, loss, _ = looked(make_net, 0)
    before = tl.live.read()
    with pytest.raises(ValueError, match="loss of batch 0 under the adapter of earlier task number 2 is"), tl.task("new"):
        while tl.look(lambda i: loss(i) if tl._now.looked != 1 else torch.tensor(value)): pass
    assert torch.equal(tl.live.read(), before) and tl._now is None


@pytest.mark.parametrize("search", ["tree-lcb", "tree-lcb-v", "flat-lcb", "uct", "random", "sweep", "softmax", "epsilon-greedy", "thompson"])
def test_a_search_that_is_put_aside_goes_on_alike(make_net, search):
    def run(cut):
        "The search of a last task, its looks, and two steps; put aside after `cut` looks."
        def make(): return TreeLoRA(make_net(), **VARIANTS["branch"] | {"search": search, "search_options": None})
        tl = make()
        for i in range(5): learn(tl, f"t{i}", i)
        x, y = data(9)
        def look(tl, upto=None):
            while (upto is None or tl._now.looked < upto) and tl.look(lambda i: cross_entropy(tl.model(x[4 * i:4 * i + 8]), y[4 * i:4 * i + 8])): pass
        def steps(tl):
            opt = torch.optim.SGD(tl.params, 0.1)
            for _ in range(2): cross_entropy(tl.model(x), y).backward(), tl.step(), opt.step(), opt.zero_grad()
        if cut is not None:
            with pytest.raises(KeyboardInterrupt), tl.task("new", rounds=2):
                look(tl, cut)
                plain, tensors = tl.state()
                raise KeyboardInterrupt
            tl = make()
            tl.restore(json.loads(json.dumps(plain)), tensors)
        with tl.task("new", rounds=2): look(tl), steps(tl)
        return tl, tl.found
    (whole, found), (other, again) = run(None), run(4)
    assert found == again and len(found["loss"]) > 1
    assert torch.equal(whole.bank.adapters, other.bank.adapters) and whole.tree.newick() == other.tree.newick()
    assert torch.equal(torch.stack(whole.last.picks), torch.stack(other.last.picks)) and whole.last.round == 2


def test_a_search_in_steps_compares_on_the_same_batch(make_net):
    "Batches that grow ever harder: the last arms to be looked at would lose by it."
    right = 0
    for seed in range(20):
        tl, loss, best = looked(make_net, seed, n=4)
        with tl.task("new"):
            for i in range(9):
                for p in tl.params: p.grad = torch.ones_like(p)
                tl.step(lambda: loss(i) + i)
            right += tl.found["branch"] == best
            assert tl._now.held == 8
    assert right == 20


def test_looking_leaves_the_model_in_its_mode(monkeypatch):
    method, _ = short_tasks(tasks=2)
    modes = []
    monkeypatch.setattr(method, "probe", lambda batch: modes.append(method.model.training) or torch.tensor(1.0))
    for training in (True, False):
        method.model.train(training)
        method.task, name = 1, f"again {training}"
        method.open.enter_context(method.tl.task(name))
        method.look([1, 2])
        assert method.model.training == training
        method.abort_task()
    assert modes and not any(modes)


def test_lambda_on_images_is_relative_and_the_papers_is_there():
    settings = {name: short_tasks(name, tasks=2)[0].options for name in ("treelora", "treelora-plain", "treelora-tii", "treelora-absolute", "treelora-branch")}
    assert {n: (o["lam"], o["relative"]) for n, o in settings.items()} == {
        "treelora": (1.0, True), "treelora-plain": (1.0, True), "treelora-tii": (1.0, True), "treelora-absolute": (0.1, False), "treelora-branch": (0.1, False)}
    assert "relative" not in VARIANTS["paper"] and "lam" not in VARIANTS["paper"]


@pytest.mark.parametrize("penalty", ["prox", "dot"])
def test_another_penalty_has_its_own_unit(penalty):
    options = short_tasks("treelora", tasks=2, penalty=penalty)[0].options
    assert (options["lam"], options["relative"]) == (0.1, False)
    assert short_tasks("treelora", tasks=2, penalty=penalty, lam=0.3)[0].options["lam"] == 0.3


@pytest.mark.parametrize("each", [2, 3])
def test_a_sweep_looks_at_all_alike(make_net, each):
    tl, loss, best = looked(make_net, 0, n=5, search="sweep", search_options=None, search_rounds=float(each))
    with pytest.raises(KeyboardInterrupt), tl.task("new"):
        while tl.look(loss): pass
        found = tl.found
        raise KeyboardInterrupt
    assert list(found["rounds"].values()) == 5 * [each] and found["branch"] == best


def test_a_single_look_takes_whom_the_search_wants(make_net):
    "A random start is random: no other task is looked at for comparison."
    branches = set()
    for seed in range(8):
        tl, loss, _ = looked(make_net, seed, n=5, search="random", search_options=None, search_rounds=1)
        with pytest.raises(KeyboardInterrupt), tl.task("new"):
            while tl.look(loss): pass
            assert sum(tl.found["rounds"].values()) == 1
            branches.add(tl.found["branch"])
            raise KeyboardInterrupt
    assert len(branches) > 1


@pytest.mark.parametrize("rounds, n, looks", [(None, 3, 6), (None, 50, 64), (7, 50, 7), (0.5, 1, 1), (0.5, 48, 24), (2.0, 48, 96)])
def test_looks_for_each_task_grow_with_them(rounds, n, looks):
    assert Options(search_rounds=rounds).looks(n) == looks


@pytest.mark.parametrize("rounds", [0.0, -0.5, float("nan"), float("inf")])
def test_looks_for_each_task_are_more_than_none_and_finite(rounds):
    with pytest.raises(ValueError, match="must be more than none, and a finite number"): Options(search_rounds=rounds)
