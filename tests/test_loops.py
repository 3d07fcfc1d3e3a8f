"Anybody's loop: one optimiser for all tasks, accumulation, evaluation inside a task, odd precisions, threads and forks, failures, and wrong arguments."
import copy
import pickle
import threading
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy

from treelora.algorithm import VARIANTS, TreeLoRA
from treelora.engine.loops import WATCH


class Net(nn.Module):
    "Three linear layers, of which `a` and `b` get adapters."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x): return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
LABELS = [(X[:, k % 6] * 2).long().clamp(0, 2) for k in range(6)]


def made(dtype=torch.float32, start=0, dropout=0.0, **options):
    "A small model with PEFT's adapters, some numbers in B, in a precision."
    torch.manual_seed(start)
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["a", "b"], lora_dropout=dropout), autocast_adapter_dtype=False)
    for name, p in model.named_parameters():
        if "lora_B" in name: nn.init.normal_(p, std=0.1)
    return TreeLoRA(model.to(dtype), **({"lam": 0.05} | options))


def loss_of(tl, k, rows=slice(None)):
    return cross_entropy(tl.model(X[rows].to(tl.params[0].dtype)).float(), LABELS[k][rows])


def steps(tl, k, opt, n=8, rows=slice(None)):
    "Some steps of a task that is open."
    for _ in range(n):
        loss = loss_of(tl, k, rows)
        loss.backward()
        tl.step(loss.detach() if tl.penalty == "dot" else lambda: loss_of(tl, k, rows))
        opt.step(), opt.zero_grad()


def train(tl, tasks="abc", optimizer=torch.optim.AdamW, shared=None, lr=0.02, n=8, **kwargs):
    "Tasks with an optimiser for each, or one that is shared."
    for name in tasks:
        opt = shared or optimizer(tl.params, lr, **kwargs)
        with tl.task(name, rounds=n, epoch=n // 2): steps(tl, ord(name) - ord("a"), opt, n)
    return tl


def state(tl):
    "All that a mistake must leave alone."
    return [tl.tree.newick() if len(tl.bank) else "", tl.bank.names, tl.bank.adapters.clone(), tl.bank.signatures.clone(), tl.live.read(), tl.stats.counts.copy()]


def same(a, b):
    return all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b, strict=True))


FORMS = {"l1": {}, "prox": dict(penalty="prox"), "dot": dict(penalty="dot"), "fresh": dict(signal="fresh"), "loss": dict(signal="loss"), "start": dict(init="fresh"),
         "held": dict(init="branch"), "top": dict(top_fraction=0.5), "relative": dict(relative=True), "update": dict(signature="update")}


# one optimiser for all tasks

@pytest.mark.parametrize("kind, options", [("AdamW", {}), ("SGD", dict(momentum=0.9, weight_decay=0.1)), ("Adagrad", {}), ("RMSprop", dict(momentum=0.9)), ("LBFGS", {})])
def test_one_optimiser_for_all_tasks_is_one_for_each(kind, options):
    if kind == "LBFGS": return lbfgs()
    optimizer = getattr(torch.optim, kind)
    for form in ("l1", "prox", "start", "held"):
        a, b = made(**FORMS[form]), made(**FORMS[form])
        train(a, optimizer=optimizer, **options), train(b, shared=optimizer(b.params, 0.02, **options))
        assert same(state(a), state(b)), form


def lbfgs():
    "Its memory is one for all parameters, and its step calls the model."
    def run(tl, shared):
        opt = shared
        for k in range(2):
            opt = shared or torch.optim.LBFGS(tl.params, 0.1, max_iter=1)
            def closure():
                opt.zero_grad()
                loss = loss_of(tl, k)
                loss.backward(), tl.step()
                return loss
            with tl.task(f"t{k}"):
                for _ in range(4): opt.step(closure)
        return tl
    a, b = made(), made()
    assert same(state(run(a, None)), state(run(b, torch.optim.LBFGS(b.params, 0.1, max_iter=1))))


def test_old_momentum_moved_the_adapter_before():
    "What the last test guards against: without forgetting, the second task differs."
    tl = made()
    opt = torch.optim.AdamW(tl.params, 0.02)
    train(tl, "a", shared=opt)
    kept = copy.deepcopy(opt.state_dict())
    train(tl, "b", shared=opt)
    other = train(made(), "a")
    old = torch.optim.AdamW(other.params, 0.02)
    with other.task("b", rounds=8, epoch=4):
        steps(other, 1, old, 1)
        old.load_state_dict(kept)  # as if nothing had been forgotten
        steps(other, 1, old, 7)
    assert (other.bank.adapter("b") - tl.bank.adapter("b")).abs().max() > 1e-3


@pytest.mark.parametrize("signal", ["stored", "fresh", "loss"])
def test_an_adapter_that_is_held_still_moves_by_zero(signal):
    tl = made(init="branch", signal=signal)
    opt = torch.optim.AdamW(tl.params, 0.02, weight_decay=0.1)
    train(tl, "ab", shared=opt)
    start, held = tl.live.read(), 0
    with tl.task("c", rounds=16):
        while tl._now.searching:
            assert torch.equal(tl.live.read(), start)
            steps(tl, 2, opt, 1)
            held += 1
        for l, k in enumerate(tl._now.arms.expand(2).tolist()): assert torch.equal(tl.live.read()[l], tl.bank.adapters[k][l])
        steps(tl, 2, opt, 1)
    assert held == 4 and not torch.equal(tl.live.read(), start)


def test_a_head_beside_the_adapter_keeps_its_memory():
    tl = made()
    head = tl.model.base_model.model.head.requires_grad_(True)
    opt = torch.optim.AdamW([*tl.params, *head.parameters()], 0.02)
    train(tl, "ab", shared=opt)
    assert opt.state[head.weight]["step"] == 16 and opt.state[tl.params[0]]["step"] == 8


def test_a_resumed_task_keeps_its_optimisers_memory():
    whole, cut = made(penalty="prox"), made(penalty="prox")
    for tl in (whole, cut): train(tl, "ab")
    opt = torch.optim.AdamW(whole.params, 0.02)
    with whole.task("c"): steps(whole, 2, opt, 8)
    opt = torch.optim.AdamW(cut.params, 0.02)
    with pytest.raises(KeyboardInterrupt), cut.task("c"):
        steps(cut, 2, opt, 3)
        plain, tensors, memory = *cut.state(), copy.deepcopy(opt.state_dict())
        raise KeyboardInterrupt
    again = made(penalty="prox")
    again.restore(plain, tensors)
    opt = torch.optim.AdamW(again.params, 0.02)
    opt.load_state_dict(memory)
    with again.task("c"): steps(again, 2, opt, 5)
    assert same(state(whole), state(again))


# failures

@pytest.mark.parametrize("where", ["before a step", "after backward", "after a step", "at the end"])
@pytest.mark.parametrize("form", ["l1", "prox", "held", "start"])
def test_a_task_that_fails_leaves_everything_as_it_was(form, where, monkeypatch):
    tl = made(**FORMS[form])
    opt = torch.optim.AdamW(tl.params, 0.02)
    train(tl, "ab", shared=opt)
    before, memory, mode = state(tl), copy.deepcopy(opt.state_dict()), tl.model.training
    with pytest.raises(KeyboardInterrupt), tl.task("c", rounds=8):
        tl.record_features(X[:4]) if len(tl.bank) else None
        if where == "before a step": raise KeyboardInterrupt
        steps(tl, 2, opt, 4)
        if where == "after backward": loss_of(tl, 2).backward()
        if where == "at the end": monkeypatch.setattr(type(tl.tree), "insert", interrupted)
        else: raise KeyboardInterrupt
    monkeypatch.undo()
    assert same(state(tl), before) and tl.model.training == mode and not WATCH.loops
    assert all(p.grad is None for p in tl.model.parameters())
    after = opt.state_dict()
    assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(after["state"][i][k])) for i, entry in memory["state"].items() for k, x in entry.items())
    other = train(made(**FORMS[form]), "ab")
    for one, own in ((tl, opt), (other, None)): train(one, "c", shared=own)
    assert same(state(tl), state(other))


def interrupted(*args, **kwargs): raise KeyboardInterrupt


def test_a_task_that_cannot_begin_changes_nothing():
    tl = train(made(init="fresh"), "a")
    before = state(tl)
    tl.live.prepare, kept = interrupted, tl.live.prepare
    with pytest.raises(KeyboardInterrupt), tl.task("b"): pass
    tl.live.prepare = kept
    assert same(state(tl), before) and tl._now is None
    train(tl, "b")


def test_two_tasks_at_once_are_refused_when_the_second_begins():
    tl = train(made(), "a")
    first, second = tl.task("b"), tl.task("c")
    before = state(tl)
    with pytest.raises(ValueError, match="Task 'b' is still open; end it before 'c' begins"):
        with first:
            with second: pass
    assert same(state(tl), before) and tl._now is None
    third, fourth = tl.task("d"), tl.task("d")
    with third: steps(tl, 3, torch.optim.SGD(tl.params, 0.1), 2)
    with pytest.raises(ValueError, match="learned already"), fourth: pass
    assert tl.bank.names == ["a", "d"]


# copies

@pytest.mark.parametrize("copied", [copy.deepcopy, lambda tl: pickle.loads(pickle.dumps(tl))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("form", [*FORMS, "budget", "file"])
def test_a_copy_goes_on_as_the_original(form, copied, tmp_path):
    tl = made(**(FORMS | {"budget": dict(budget=2), "file": dict(bank_folder=tmp_path)})[form])
    train(tl, "ab")
    tl.load_adapter("a")
    twin = copied(tl)
    assert same(state(twin), state(tl)) and twin.model is not tl.model and all(any(p is q for q in twin.model.parameters()) for p in twin.params)
    before = state(tl)
    train(twin, "cd")
    assert same(state(tl), before)
    train(tl, "cd")
    assert same(state(twin), state(tl)) and twin.bank.adapters[-1].abs().sum() > 0
    twin.load_adapter("b")
    with twin.serving(torch.tensor([0, 1, 2])): twin.model(X[:3])


def test_a_running_task_is_not_copied():
    tl = train(made(), "a")
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(ValueError, match="Task 'b' is open; copy or pickle a TreeLoRA outside of it"), tl.task("b"): copied(tl)


# wrong arguments

nan = float("nan")
OPTIONS = [dict(search_rounds="x"), dict(search_rounds=-1), dict(budget=1.5), dict(budget="x"), dict(lam=nan), dict(lam="x"), dict(lam=float("inf")), dict(depth=1.5), dict(seed="x"), dict(seed=None),
           dict(search_options={"zz": 1}), dict(search_options=3), dict(search_options={"c": nan}), dict(top_fraction=2.0), dict(top_fraction="x"), dict(signal=["x"]), dict(search={}), dict(ramp="x"),
           dict(adapter=3), dict(cache="x"), dict(reference=3, signature="reference"), dict(reference={"batches": 1.5}, signature="reference"), dict(split=3), dict(compile="x"), dict(relative=1)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_wrong_option_is_named(options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"{name}|search_options|batches|no option 'zz'|Unknown"): made(**options)


@pytest.fixture(scope="module")
def two_tasks():
    tl = made()
    for k, name in enumerate("ab"):
        with tl.task(name):
            steps(tl, k, torch.optim.SGD(tl.params, 0.1), 2)
            tl.record_features(torch.randn(4, 3, generator=torch.Generator().manual_seed(k)), [0, 0, 1, 1])
    return tl


CALLS = {
    "serving -1": (lambda tl: tl.serving([-1]), "between -1 and -1, but there are 2"), "serving 5": (lambda tl: tl.serving(torch.tensor([5, 0])), "between 0 and 5"),
    "serving 0.5": (lambda tl: tl.serving(torch.tensor([0.5])), "whole numbers"), "serving x": (lambda tl: tl.serving("x"), "whole numbers"), "serving nested": (lambda tl: tl.serving([[0, 1]]), "whole numbers"),
    "route nan": (lambda tl: tl.route(torch.full((2, 3), nan)), "NaN or infinite in 2 rows"), "route wide": (lambda tl: tl.route(torch.ones(2, 5)), "have 5 numbers per row"),
    "route flat": (lambda tl: tl.route(torch.ones(3)), r"\(n, F\)"), "route list": (lambda tl: tl.route([[1.0, 2.0, 3.0]]), "not list"), "beam": (lambda tl: tl.route(torch.ones(2, 3), beam=0), "beam=0"),
    "lam nan": (lambda tl: setattr(tl, "lam", nan), "lam=nan"), "lam -1": (lambda tl: setattr(tl, "lam", -1), "lam=-1"),
    "rounds": (lambda tl: tl.task("c", rounds="x"), "rounds='x'"), "epoch": (lambda tl: tl.task("c", epoch=-1), "epoch=-1"),
}
INSIDE = {
    "features nan": (lambda tl: tl.record_features(torch.full((2, 3), nan)), "the first is row 0"), "features wide": (lambda tl: tl.record_features(torch.ones(2, 5)), "5 numbers per row"),
    "labels": (lambda tl: tl.record_features(torch.ones(2, 3), [1]), "1 labels for 2 rows"), "letters": (lambda tl: tl.record_features(torch.ones(2, 3), ["x", "y"]), "whole numbers"),
}
LOSSES = {"text": ("x", dict(penalty="dot")), "nan": (nan, dict(penalty="dot")), "many": (torch.ones(3), dict(penalty="dot")), "no number": (lambda: None, dict(signal="loss")),
          "nan function": (lambda: torch.tensor(nan), dict(signal="loss")), "many from a function": (lambda: torch.ones(3), dict(signal="loss")), "no gradient": (lambda: torch.tensor(1.0), dict(signal="fresh"))}


@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_call_is_refused(two_tasks, call):
    act, words = CALLS[call]
    before = state(two_tasks)
    with pytest.raises(ValueError, match=words): act(two_tasks)
    assert same(state(two_tasks), before) and two_tasks._now is None and two_tasks.lam == 0.05


@pytest.mark.parametrize("call", INSIDE)
def test_a_wrong_call_inside_a_task_is_refused(two_tasks, call):
    act, words = INSIDE[call]
    before = state(two_tasks)
    with pytest.raises(ValueError, match=words), two_tasks.task("c"): act(two_tasks)
    assert same(state(two_tasks), before)


@pytest.mark.parametrize("what", LOSSES)
def test_a_wrong_loss_is_refused(what):
    value, options = LOSSES[what]
    tl = train(made(**options), "a", n=2)
    before = state(tl)
    with pytest.raises(ValueError, match="[lL]oss"), tl.task("b"):
        loss_of(tl, 1).backward()
        tl.step(value)
    assert same(state(tl), before)


def test_more_rows_than_tasks(two_tasks):
    with pytest.raises(ValueError, match="The tasks of 2 rows were given, but the batch has 3"), two_tasks.serving([0, 1]): two_tasks.model(X[:3])
