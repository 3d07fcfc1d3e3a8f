"Anybody's loop: one optimiser for all tasks, accumulation, evaluation inside a task, odd precisions, threads and forks, failures, and wrong arguments."
import copy
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from test_trainer import SIZE, TASKS, Cut, CutOff, assert_same, built, tiny_model, trainer, with_bare_loop
from treelora.algorithm import VARIANTS, TreeLoRA
from treelora.engine.loops import WATCH
from treelora.trainer import TreeLoraCallback


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
    for form in ("l1", "prox", "start", "held") if kind == "AdamW" else ("prox",):
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
    model = made().model
    head = model.base_model.model.head.requires_grad_(True)
    tl = TreeLoRA(model, shared="head")
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

@pytest.mark.parametrize("form, where", [("l1", "before a step"), ("prox", "after backward"), ("l1", "after a step"), ("start", "after a step"), ("held", "after backward"), ("prox", "at the end"), ("held", "at the end")])
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
@pytest.mark.parametrize("form", ["l1", "prox", "dot", "update", "budget", "file"])
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


# other precisions

SLOW = pytest.mark.slow
PRECISE = [(torch.bfloat16, "l1"), (torch.bfloat16, "prox"), (torch.float16, "l1"), (torch.float16, "branch"), (torch.float64, "l1"), (torch.float64, "prox"), (torch.float64, "held")]


@pytest.mark.parametrize("dtype, form", [*PRECISE, *(pytest.param(d, f, marks=SLOW) for d in (torch.float16, torch.bfloat16, torch.float64) for f in [*FORMS, "branch", "reference"] if (d, f) not in PRECISE)], ids=str)
def test_adapters_in_other_precisions(form, dtype, tmp_path):
    "Training, files and serving; what comes back is the adapter, in double precision to seven digits."
    options = (FORMS | {"branch": VARIANTS["branch"], "reference": dict(signature="reference", init="branch")})[form]
    tl = made(dtype, **options)
    for k, name in enumerate("abc"):
        opt = torch.optim.AdamW(tl.params, 0.02, eps=1e-4)
        with tl.task(name, rounds=4):
            if tl.signature == "reference": tl.refer(lambda i: loss_of(tl, k))
            steps(tl, k, opt, 4)
    assert all(p.dtype == dtype and p.isfinite().all() for p in tl.params)
    own = [p.detach().clone() for p in tl.params]
    tl.load_adapter("c")
    for p, x in zip(tl.params, own): assert (p - x).abs().max() <= (1e-7 if dtype == torch.float64 else 0)
    tl.save(tmp_path)
    again = TreeLoRA.load(tmp_path, made(dtype).model)
    assert same(state(again), state(tl))
    alone, x = [], X[:2].to(dtype)
    for name in "abc":
        again.load_adapter(name)
        alone.append(again.model.eval()(x))
    with tl.serving([0, 0, 1, 1, 2, 2]): together = tl.model.eval()(x.repeat(3, 1))
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-2)


def test_a_failed_task_gives_double_precision_back_exactly():
    tl = train(made(torch.float64), "a")
    before = [p.detach().clone() for p in tl.params]
    with pytest.raises(KeyboardInterrupt), tl.task("b"):
        steps(tl, 1, torch.optim.AdamW(tl.params, 0.02), 3)
        raise KeyboardInterrupt
    assert all(torch.equal(p, x) for p, x in zip(tl.params, before))


# evaluation inside a task

@pytest.mark.parametrize("form", ["prox", "fresh", "held", "branch"])
def test_evaluation_inside_a_task_disturbs_nothing(form):
    "With dropout: answers by the model, by serving and by routing between the steps, and the run is the one without them."
    def run(evaluates):
        tl = made(dropout=0.3, **(FORMS | {"branch": VARIANTS["branch"] | {"search_rounds": 2}})[form])
        torch.manual_seed(5)
        for k, name in enumerate("abc"):
            opt = torch.optim.AdamW(tl.params, 0.02)
            with tl.task(name, rounds=12):
                if tl.signal == "loss":
                    while tl.look(lambda i: loss_of(tl, k)): pass
                for _ in range(6):
                    tl.model.train()
                    steps(tl, k, opt, 2)
                    tl.record_features(X[:8] + 3 * k)
                    if evaluates: evaluate(tl)
        return tl
    a, b = run(True), run(False)
    assert same(state(a), state(b)) and all(torch.equal(x, y) for x, y in zip(a.last.picks, b.last.picks, strict=True))


@torch.no_grad()
def evaluate(tl):
    "All ways to answer that are open inside a task."
    before, flags = tl.live.read(), [p.requires_grad for p in tl.model.parameters()]
    tl.model.eval()
    tl.model(X)
    if len(tl.bank):
        with tl.serving([0] * len(X)): tl.model(X)
        tl.route(X), tl.router.infer(X, tl.model, lambda x: x), tl.found, tl.config, tl.device_bytes, tl.state()
    assert torch.equal(tl.live.read(), before) and [p.requires_grad for p in tl.model.parameters()] == flags
    tl.model.train()


# threads and forks

@pytest.mark.parametrize("form", ["l1", "prox"])
def test_two_threads_train_two_models(form):
    "Tasks begin and end while the other thread's optimiser steps."
    def run(k): return train(made(start=k, **FORMS[form]), "abcdef", n=20, optimizer=torch.optim.SGD)
    found = {}
    def work(k):
        try: found[k] = run(k)
        except BaseException as error: found[k] = error
    threads = [threading.Thread(target=work, args=[k]) for k in range(2)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    for k in range(2):
        assert isinstance(found[k], TreeLoRA), found[k]
        assert found[k].bank.names == list("abcdef") and found[k].bank.adapters.isfinite().all()
    assert not WATCH.loops


class Rows(torch.utils.data.Dataset):
    "Examples that are made in the worker, which may ask the TreeLoRA of the parent's task."
    def __init__(self, tl): self.tl = tl
    def __len__(self): return len(X)
    def __getitem__(self, i): return X[i], LABELS[1][i], len(self.tl.bank)


@pytest.mark.parametrize("where", ["memory", "file"])
def test_forked_workers_inside_a_task(where, tmp_path):
    def run(workers):
        tl = train(made(penalty="prox", **({"bank_folder": tmp_path} if where == "file" else {})), "ac")
        opt, loader = torch.optim.AdamW(tl.params, 0.02), DataLoader(Rows(tl), 8, num_workers=workers, multiprocessing_context="fork" if workers else None)
        with tl.task("b"):
            for x, y, n in loader:
                assert (n == 2).all()
                cross_entropy(tl.model(x), y).backward()
                tl.step(), opt.step(), opt.zero_grad()
        return tl
    assert same(state(run(2)), state(run(0)))


# accumulation

@pytest.mark.parametrize("form, parts", [("l1", 8), ("fresh", 2), pytest.param("loss", 2, marks=SLOW)])
def test_accumulation_is_the_whole_batch(form, parts):
    "Answers of unequal length, weighted by their tokens, in a loop of one's own."
    def run(parts):
        tl = TreeLoRA(tiny_model(), **FORMS[form])
        for name in ("up", "down"):
            data, opt = TASKS[name], torch.optim.AdamW(tl.params, 0.01)
            with tl.task(name):
                for start in range(0, 32, 8):
                    batches = [{k: torch.stack([x[k] for x in data[i:i + 8 // parts]]) for k in data[0]} for i in range(start, start + 8, 8 // parts)]
                    tokens = [b["labels"][:, 1:].ne(-100).sum() for b in batches]
                    losses = lambda: (tl.model(**b).loss * n / sum(tokens) for b, n in zip(batches, tokens))
                    for loss in losses(): loss.backward()
                    tl.step(lambda: sum(losses()))
                    opt.step(), opt.zero_grad()
        return tl
    whole, cut = run(1), run(parts)
    assert (whole.bank.adapters - cut.bank.adapters).abs().max() < 1e-6 and whole.tree.newick() == cut.tree.newick()
    assert all(torch.equal(a, b) for a, b in zip(whole.last.picks, cut.last.picks, strict=True))


def with_parts(folder, size, accumulate, **options):
    tl = TreeLoRA(tiny_model(), **options)
    for name in ("up", "down"):  # 36 examples: the last group is half full
        trainer(tl, [TreeLoraCallback(tl, name)], folder, TASKS[name][:36], per_device_train_batch_size=size, gradient_accumulation_steps=accumulate).train()
    return tl


@pytest.mark.slow
def test_accumulation_in_the_trainer_is_the_whole_batch(tmp_path):
    whole = with_parts(tmp_path, SIZE, 1)
    cut = with_parts(tmp_path, SIZE // 4, 4)
    assert (whole.bank.adapters - cut.bank.adapters).abs().max() < 1e-6 and cut.last.round == whole.last.round == 10
    assert all(torch.equal(a, b) for a, b in zip(whole.last.picks, cut.last.picks, strict=True))


# the Trainer

def shuffled(tl, folder, *more, resume=None, name="two", **changes):
    "A Trainer as everybody has it, which shuffles; the task's callback, trained."
    arguments = dict(output_dir=folder, per_device_train_batch_size=SIZE, num_train_epochs=2, learning_rate=0.01, optim="adamw_torch", report_to="none", use_cpu=True,
                     save_strategy="steps", save_steps=3, logging_strategy="no", disable_tqdm=True) | changes
    metrics = arguments.pop("compute_metrics", None)
    made = Trainer(tl.model, TrainingArguments(**arguments), train_dataset=TASKS[name], eval_dataset=TASKS[name][:9], callbacks=[*([TreeLoraCallback(tl, name)] if name else []), *more], compute_metrics=metrics)
    made.remove_callback(PrinterCallback)
    made.train(resume_from_checkpoint=resume)
    return made


def named(kind, **options):
    "Models whose adapter has a name: alone, or beside a frozen one."
    model = tiny_model(dropout=0.2)
    torch.manual_seed(2)
    config = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.2, target_modules=["q_proj"])
    if kind == "default": return TreeLoRA(model, **options)
    if kind == "alone": model = get_peft_model(model.unload(), config, adapter_name="mine")
    else:
        model.add_adapter("mine", config)
        model.set_adapter("mine")
    return TreeLoRA(model, adapter="mine", **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("default", marks=SLOW), "beside another", pytest.param("alone", marks=SLOW)])
def test_resume_in_the_middle_of_a_shuffled_epoch(kind, tmp_path):
    "Two epochs of five steps; cut off after step 7, resumed from step 6, with dropout."
    make = lambda: named(kind, penalty="prox", signal="fresh")
    def before(): return with_bare_loop(make(), ["up"])
    whole, cut, new = before(), before(), before()
    others = [p.detach().clone() for n, p in whole.model.named_parameters() if ".default." in n and kind == "beside another"]
    shuffled(whole, tmp_path / "whole")
    with pytest.raises(CutOff): shuffled(cut, tmp_path / "cut", Cut(7))
    shuffled(new, tmp_path / "cut", resume=str(tmp_path / "cut" / "checkpoint-6"))
    assert_same(whole, new)
    assert all(torch.equal(p, x) for p, x in zip([p for n, p in new.model.named_parameters() if ".default." in n], others))


class BestAtThree(TrainerCallback):
    "The evaluation after step 3 is the best."
    def on_evaluate(self, args, state, control, metrics=None, **kwargs): metrics["eval_loss"] = float(state.global_step != 3)


BEST = dict(eval_strategy="steps", eval_steps=3, load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False)


@pytest.mark.parametrize("kind", [pytest.param("default", marks=SLOW), "beside another", "alone"])
def test_the_best_adapter_is_kept_whatever_its_name(kind, tmp_path):
    tl = named(kind)
    best = shuffled(tl, tmp_path, BestAtThree(), **BEST).state.best_model_checkpoint
    saved = load_file(f"{best}/{'' if kind == 'default' else 'mine/'}adapter_model.safetensors")
    own = {n.replace(f".{tl.adapter}.weight", ".weight"): p for n, p in tl.model.named_parameters() if f".{tl.adapter}." in n}
    assert best.endswith("checkpoint-3") and saved.keys() == own.keys() and all(torch.equal(own[n], x) for n, x in saved.items())
    assert torch.equal(tl.bank.adapter("two"), tl.live.read()) and all(p.requires_grad for p in tl.params) and not (kind == "default" and tl.last.round != 10)
    shuffled(tl, tmp_path / "next", name="up", num_train_epochs=1, save_strategy="no")  # and the next task trains
    assert not torch.equal(tl.bank.adapter("up"), tl.bank.adapter("two"))


@SLOW
def test_a_best_checkpoint_without_the_adapter_is_said(tmp_path):
    class Lost(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 9: (tmp_path / "checkpoint-3" / "mine").rename(tmp_path / "lost")
    tl = named("alone")
    with pytest.warns(UserWarning, match="has no folder of the adapter 'mine', so the bank keeps the last adapter, not the best"): shuffled(tl, tmp_path, BestAtThree(), Lost(), **BEST)
    assert tl.bank.names == ["two"]


@pytest.mark.slow
def test_metrics_and_evaluation_without_label_names(tmp_path):
    "Metrics are there, and a run that evaluates is the one without our callback, dropout and all (the Trainer's evaluation draws by itself)."
    def run(callback, **options):
        tl = TreeLoRA(tiny_model(dropout=0.3), lam=0, **options)
        settings = dict(save_strategy="no", eval_strategy="steps", eval_steps=3, compute_metrics=lambda p: {"right": float((p.predictions.argmax(-1) == p.label_ids).mean())})
        if callback: return tl, shuffled(tl, tmp_path, **settings)
        plain = Trainer(tl.model, TrainingArguments(output_dir=tmp_path, per_device_train_batch_size=SIZE, num_train_epochs=2, learning_rate=0.01, optim="adamw_torch", report_to="none",
                                                    use_cpu=True, save_strategy="no", eval_strategy="steps", eval_steps=3, logging_strategy="no", disable_tqdm=True),
                        train_dataset=TASKS["two"], eval_dataset=TASKS["two"][:9], compute_metrics=settings["compute_metrics"])
        plain.train()
        return tl, plain
    (plain, made), (looks, ours) = run(False), run(True, signal="fresh")
    assert torch.equal(plain.live.read(), looks.live.read())
    assert [h["eval_right"] for h in made.state.log_history if "eval_right" in h] == [h["eval_right"] for h in ours.state.log_history if "eval_right" in h] != []


@pytest.mark.slow
def test_one_trainer_for_two_tasks(tmp_path):
    "Its optimiser is the same object in the second task."
    one, two = TreeLoRA(tiny_model(), penalty="prox"), TreeLoRA(tiny_model(), penalty="prox")
    made = trainer(one, [TreeLoraCallback(one, "up")], tmp_path, TASKS["up"])
    made.train()
    first = made.optimizer
    made.pop_callback(TreeLoraCallback), made.add_callback(TreeLoraCallback(one, "down"))
    made.train_dataset = TASKS["down"]
    made.train()
    assert getattr(made.optimizer, "optimizer", made.optimizer) is getattr(first, "optimizer", first)
    for name in ("up", "down"): trainer(two, [TreeLoraCallback(two, name)], tmp_path, TASKS[name]).train()
    assert_same(one, two)


# engines that cut adapters up

@pytest.mark.parametrize("engine, options, words", [("deepspeed", dict(penalty="prox"), 'With DeepSpeed the callback works with signal="stored", penalty="l1" and init="last"'), ("fsdp", {}, "needs each gradient as a whole; FSDP cuts it up.*ZeRO-2.*treelora.engine.shard")])
def test_the_callback_says_what_an_engine_lacks(engine, options, words, tmp_path):
    tl = TreeLoRA(tiny_model(), **options)
    before, callback = tl.live.read(), TreeLoraCallback(tl, "up")
    made = trainer(tl, [], tmp_path)
    setattr(made.args, engine, "on")
    with pytest.raises(ValueError, match=words):
        callback.on_train_begin(made.args, made.state, made.control, model=tl.model, train_dataloader=made.get_train_dataloader())
    assert torch.equal(tl.live.read(), before) and tl._now is None


@pytest.fixture
def one_process(tmp_path):
    "A group of one process."
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("made_first", [True, False])
def test_sharded_adapters_are_refused_when_a_task_begins(made_first, one_process):
    from torch.distributed.fsdp import fully_shard
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    tl = made()
    fully_shard(tl.model, mesh=mesh)
    with pytest.raises(ValueError, match=r"cut up over processes \(DTensor\); leave the adapters out .*shard_frozen"):
        tl.task("a") if made_first else TreeLoRA(tl.model)
    assert tl._now is None and not tl.bank.names


def test_flattened_adapters_are_refused_when_a_task_begins():
    "As FSDP with use_orig_params leaves them in each process."
    tl = made()
    tl.params[1].data = tl.params[1].data.flatten()
    with pytest.raises(ValueError, match="flattened by FSDP; leave the adapters out"): tl.task("a")


def test_parameters_of_a_deepspeed_engine_are_refused():
    tl = made()
    tl.params[0]._hp_mapping = None
    with pytest.raises(ValueError, match="DeepSpeed's ZeRO keeps the gradients of these adapters in parts of its own"), tl.task("a"): tl.step()
    tl.params[0].ds_id = 0
    with pytest.raises(ValueError, match="cut up by DeepSpeed's ZeRO stage 3"): tl.task("a")


ZERO = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import deepspeed.comm
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # needs minutes of a compiler
from test_trainer import TASKS, TreeLoRA, tiny_model, with_trainer
torch.set_num_threads(1)
config = {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
config |= {k: "auto" for k in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")}
tl = with_trainer(TreeLoRA(tiny_model()), sys.argv[2], ["up", "down"], per_device_train_batch_size=4, deepspeed=config, ddp_backend="gloo")
torch.save((tl.bank.adapters, tl.bank.signatures), f"{sys.argv[2]}/{torch.distributed.get_rank()}.pt")
"""


@SLOW
def test_deepspeeds_zero_2_takes_the_steps_of_one_process(tmp_path):
    "Where DeepSpeed is installed; TREELORA_DEEPSPEED names another environment's python that has it."
    python = os.environ.get("TREELORA_DEEPSPEED") or sys.executable
    if subprocess.run([python, "-c", "import importlib.util as u; assert u.find_spec('deepspeed')"], capture_output=True).returncode: pytest.skip("DeepSpeed is not installed")
    (tmp_path / "script.py").write_text(ZERO)
    done = subprocess.run([python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "script.py"), str(Path(__file__).parent), str(tmp_path)],
                          capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})
    assert done.returncode == 0, done.stderr[-3000:]
    (a, s), (b, t) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(a, b) and torch.equal(s, t)
    one = with_bare_loop(TreeLoRA(tiny_model()), ["up", "down"])
    off = [(a - one.bank.adapters).abs().max().item(), (s - one.bank.signatures).abs().max().item()]
    print("ZeRO-2 in two processes: adapters and signatures are off by", *off)
    assert max(off) < 1e-5


CUT_UP = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP, fully_shard
from test_loops import TreeLoRA, made
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
def refuses(f, words):
    try: f()
    except ValueError as error: assert words in str(error), error
    else: raise AssertionError(f"{words}: nothing was refused")
mesh = torch.distributed.init_device_mesh("cpu", (2,))
tl = made()
FSDP(tl.model, use_orig_params=True, device_id=torch.device("cpu"))
refuses(lambda: tl.task("a"), "flattened by FSDP; leave the adapters out")
refuses(lambda: TreeLoRA(tl.model), "flattened by FSDP; leave the adapters out")
tl = made()
fully_shard(tl.model, mesh=mesh)
refuses(lambda: tl.task("a"), "cut up over processes (DTensor); leave the adapters out")
refuses(lambda: TreeLoRA(tl.model), "cut up over processes (DTensor); leave the adapters out")
torch.distributed.destroy_process_group()
"""


@SLOW
def test_adapters_cut_up_over_two_processes_are_refused(tmp_path):
    (tmp_path / "script.py").write_text(CUT_UP)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "script.py"), str(Path(__file__).parent)],
                          capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
