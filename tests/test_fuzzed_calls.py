"A thousand calls with odd arguments: each works, or is one sentence of ours that leaves model and tree of tasks as they were."
import contextlib
import copy
import io
import json
import random
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from test_foreign_files import memory
from test_hub import X, base, learned, with_ours
from test_learner import tiny_stream, tiny_vit
from torch import nn

from treelora import learner, metrics, streams
from treelora.algorithm import TreeLoRA
from treelora.bandit import LCB, SEARCHES, get_search
from treelora.cli import main
from treelora.learning.hub import model_card, pull, push, task_folder
from treelora.streams import TaskStream
from treelora.lora import LoRALinear, add_lora, lora_layers, row_adapters
from treelora.tree import TaskTree

TASKS = ("es", "pt", "ca")
ODD = [None, True, False, 0, -1, 1, 2, 3, 10 ** 30, 0.0, -0.5, 0.5, 1e308, float("nan"), float("inf"), -float("inf"), 1j,
       "", "x", "es", "default", "a\0b", "a/b", "../x", "é" * 300, "{}", b"x", [], [0], ["es"], [None], [float("nan")], [[1, 2], [3]], (), ("leaf", "node"), {}, {"c": 1},
       {1: 2}, {"es"}, range(3), Path("."), object(), len, lambda *given: 0, lambda *given: "x", lambda *given: torch.tensor(float("nan")), nn.Linear(2, 2), nn.Identity(),
       torch.tensor(0.5), torch.tensor(float("nan"), requires_grad=True), torch.tensor([0, 1, 2]), torch.tensor([5, -1]), torch.zeros(0), torch.zeros(3, 5, 7),
       torch.full((4, 6), float("nan")), torch.zeros(2, 6, dtype=torch.float16), torch.zeros(2, 2, dtype=torch.complex64), torch.zeros(2, 6, device="meta"),
       np.int64(2), np.float32(0.5), np.array([1, 2]), np.zeros((2, 2)), np.array(["a", "b"]), np.array([object()])]


class Case:
    "What a call may use: a tree of three tasks around a small model."

    def __init__(self, root):
        self.root, self.tl = root, learned(with_ours(), TASKS)
        self.tl.record = None
        self.push_to = root / "pushed"

    def state(self): return {n: x.clone() for n, x in self.tl.model.state_dict().items()}, list(self.tl.bank.names), self.tl.tree.newick(), self.tl.bank.adapters.clone()


def stepped(tl, name="new", loss=None, **settings):
    "A task of two steps."
    optimizer = torch.optim.SGD(tl.params, 0.1)
    with tl.task(name, **settings):
        for _ in range(2):
            tl.model(X).square().mean().backward()
            tl.step(loss)
            optimizer.step(), optimizer.zero_grad()


def features(x): return x[:, :4] + torch.arange(4)


def routed(case):
    "The same with features of three tasks, for routing."
    tl = TreeLoRA(with_ours(), inference="routed")
    for i, name in enumerate(TASKS):
        with tl.task(name):
            tl.model(X).square().mean().backward()
            tl.step()
            tl.record_features(torch.randn(8, 4, generator=torch.Generator().manual_seed(i)) + i)
    case.tl = tl
    return tl


def recorded(case, **given):
    with case.tl.task("new"):
        case.tl.model(X).square().mean().backward()
        case.tl.step()
        case.tl.record_features(**given)


def served(case, **given):
    with case.tl.serving(**given), torch.no_grad(): case.tl.model(X[:3])


def rows_answered(case, names, **given):
    pairs = [(layer.A, layer.B) for layer in lora_layers(case.tl.model)]
    with row_adapters(case.tl.model, names, [tuple(x[None] for x in p) for p in pairs], **given), torch.no_grad(): case.tl.model(X[:3])


def looked(case, **given):
    tl = case.tl = learned(with_ours(), TASKS, init="branch", signal="loss", penalty="prox")
    with tl.task("new"):
        while tl.look(**given): pass
        tl.model(X).square().mean().backward()
        tl.step()


def inserted(case, rows, name, **given):
    tree = TaskTree(**given)
    for i in range(3): tree.insert(f"t{i}", [torch.full((4,), float(i)) for _ in range(2)])
    tree.insert(name, rows)


def commanded(case, words):
    "The command line, whose own way to refuse is to end with 2 and one line."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: code = main(words)
        except SystemExit as left: code = left.code
    if code in (0, None): return
    said = err.getvalue().strip()
    assert code in (1, 2) and said and "Traceback" not in said, (code, said)
    raise ValueError(said.splitlines()[-1])


def moved(case, plain, tensors, **given):
    own = case.tl.state()
    new = case.tl = TreeLoRA(with_ours())
    new.restore(own[0] if plain == "own" else plain, own[1] if tensors == "own" else tensors, **given)


Y = torch.randint(0, 3, (24,), generator=torch.Generator().manual_seed(0)).numpy()
PIXELS = np.zeros((24, 8, 8, 3), dtype=np.uint8)
OPTIONS = dict(lam=0.1, signature="grad", search="tree-lcb", signal="stored", penalty="l1", depth=None, budget=None, init="last", inference="latest", search_rounds=None,
               starts=("leaf",), split="axis", root="input", search_options=None, reference=None, ramp=False, relative=False, top_fraction=None, adapter="default",
               frozen=False, seed=0, cache=None, keep="adapter", shared=(), bank_folder=None, compile=False)
WORDS = ["run", "figures", "report", "bench", "campaign", "--seed", "--epochs", "--scale", "--lr", "--root", "--results", "--method", "--stream", "--quiet", "--help", "-1", "nan", "1e999", "",
         "x", "../x", "quick", "treelora", "split-digits", "--option", "lam=x", "lam=nan", "=", "--what"]


def built(case, **given):
    case.tl = TreeLoRA(with_ours(), **given)
    stepped(case.tl, "one", **({"rounds": 2} if case.tl.options.ramp else {}))
    stepped(case.tl, "two", loss=lambda: case.tl.model(X).square().mean(), **({"rounds": 2} if case.tl.options.ramp else {}))


# name -> the call and arguments that work; odd ones take their places
CALLS = {
    "TreeLoRA": (built, OPTIONS),
    "TreeLoRA, model": (lambda case, model: TreeLoRA(model), dict(model=with_ours())),
    "variant": (lambda case, name, **given: TreeLoRA.variant(name, with_ours(), **given), dict(name="branch", lam=0.1, seed=0)),
    "add_lora": (lambda case, **given: add_lora(base(), **given), dict(target=["0", "2"], r=2, alpha=2, blocks=None, parts=None)),
    "LoRALinear": (lambda case, **given: LoRALinear(**given)(torch.zeros(1, 2)), dict(base=nn.Linear(2, 2), r=2, alpha=2, parts=None)),
    "task": (lambda case, **given: stepped(case.tl, **given), dict(name="new", rounds=2, epoch=1)),
    "step": (lambda case, loss: stepped(case.tl, loss=loss), dict(loss=None)),
    "step, signal loss": (lambda case, loss: stepped(TreeLoRA(with_ours(), signal="loss"), loss=loss), dict(loss=None)),
    "load_adapter": (lambda case, name: case.tl.load_adapter(name), dict(name="es")),
    "record_features": (recorded, dict(features=torch.zeros(5, 4), labels=None)),
    "route": (lambda case, **given: routed(case).route(**given), dict(features=torch.zeros(5, 4), beam=16)),
    "infer": (lambda case, forward, **given: routed(case).infer(forward=forward if forward != "model" else case.tl.model, **given),
              dict(inputs=X, forward="model", features=features)),
    "serving": (served, dict(tasks=torch.tensor([0, 1, 2]))),
    "row_adapters": (rows_answered, dict(names=["0", "2"], which=torch.tensor([0, 0, 0]), adapter="default")),
    "look": (looked, dict(loss=lambda i: torch.tensor(1.0))),
    "save": (lambda case, folder: case.tl.save(case.root / folder if isinstance(folder, str) else folder), dict(folder="saved")),
    "load": (lambda case, folder, **given: TreeLoRA.load(case.root / folder if isinstance(folder, str) else folder, **given),
             dict(folder="kept", model=with_ours(), adapter="default", base_changed="refuse", cache=None)),
    "restore": (moved, dict(plain="own", tensors="own", base_changed="refuse")),
    "push": (lambda case, folder, **given: push(case.tl, case.root / folder if isinstance(folder, str) else folder, **given),
             dict(folder="pushed", license="mit", base_model=None, stream=None)),
    "pull": (lambda case, place, **given: pull(case.root / place if isinstance(place, str) else place, **given), dict(place="shared", model=with_ours())),
    "task_folder": (lambda case, task: task_folder(case.tl, task), dict(task="es")),
    "model_card": (lambda case, **given: model_card(case.tl, **given), dict(place="me/x", license="mit", base_model=None, stream=None)),
    "TaskTree": (inserted, dict(rows=[torch.zeros(4), torch.zeros(4)], name="new", split="axis", depth=None, budget=None)),
    "LCB": (lambda case, **given: LCB(case.tl.tree, **given).choose(1), dict(n_layers=2, seed=0, c=1.0, delta=1.0, gamma=0.5)),
    "get_search": (lambda case, **given: get_search(tree=case.tl.tree, **given).choose(1), dict(name="tree-lcb", n_layers=2, seed=0)),
    "get_stream": (lambda case, **given: streams.get_stream(**given), dict(name="split-digits", scale="quick", seed=0, root=None)),
    "from_arrays": (lambda case, **given: TaskStream.from_arrays(**given), dict(name="own", images=PIXELS, labels=Y, test_images=PIXELS, test_labels=Y, classes_per_task=1, seed=0)),
    "ImageSet": (lambda case, **given: streams.ImageSet(**given), dict(images=torch.zeros(4, 3, 8, 8), labels=torch.zeros(4, dtype=torch.long))),
    "op": (lambda case, R: metrics.op(R), dict(R=[[0.5]])),
    "bwt": (lambda case, R: metrics.bwt(R), dict(R=[[0.5, None], [0.4, 0.5]])),
    "forgetting": (lambda case, R: metrics.forgetting(R), dict(R=[[0.5, None], [0.4, 0.5]])),
    "average_curve": (lambda case, R: metrics.average_curve(R), dict(R=[[0.5, None], [0.4, 0.5]])),
    "run": (lambda case, **given: learner.run(**dict(stream=tiny_stream(classes=2, n=4), model=tiny_vit(2), progress=False) | given),
            dict(method="treelora", seed=0, epochs=1, batch_size=4, lr=0.01, schedule="constant", precision="no", ahead=False, stop_loss=None, compile=False,
                 shard=False, curves=0, checkpoints=None, checkpoint_every=None, resume=False, lam=0.1)),
    "run, stream": (lambda case, **given: learner.run(progress=False, epochs=1, **given), dict(stream="split-digits", scale="quick", root=None, model=None, weights=None)),
    "settings": (lambda case, **given: learner.settings(**given), dict(scale="quick", kind="vision")),
}


def judged(case, name, given):
    "What became of a call: done or refused. Fails for anything else."
    before = case.state()
    try: CALLS[name][0](case, **given)
    except Exception as error:
        frame, said = traceback.extract_tb(error.__traceback__)[-1], str(error)
        assert isinstance(error, (ValueError, TypeError, OSError, ImportError)) and "/treelora/" in frame.filename and "raise" in frame.line and said and "\n" not in said and len(said) < 2000, \
            (name, given, type(error).__name__, frame, said)
        unchanged(before, case.state())
        return "refused"
    assert case.tl._now is None and case.tl.bank.adapters.isfinite().all() and all(x.isfinite().all() for x in case.tl.params), (name, given)
    return "done"


def unchanged(before, after):
    assert before[1:3] == after[1:3] and torch.equal(before[3], after[3]) and before[0].keys() == after[0].keys()
    assert all(torch.equal(x, after[0][n]) for n, x in before[0].items())
