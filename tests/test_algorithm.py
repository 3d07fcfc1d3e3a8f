"TreeLoRA in a bare loop: the step against a literal loop over layers, files, and every mistake that a user can make."
import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import _global_optimizer_post_hooks

from treelora.engine import files
from treelora.signature import Rows
from treelora.algorithm import VARIANTS, TreeLoRA


def data(seed, n=64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=g)
    return x, (x[:, seed % 2] > 0).long()


def learn(tl, name, seed, rounds=6, optimizer=torch.optim.Adam):
    x, y = data(seed)
    opt = optimizer(tl.params, 0.02)
    with tl.task(name, rounds=rounds, epoch=rounds // 2):
        for _ in range(rounds):
            loss = lambda: cross_entropy(tl.model(x), y)
            value = loss()
            value.backward()
            tl.step(value.detach() if tl.penalty == "dot" else loss)
            opt.step(), opt.zero_grad()
    return tl


def state(tl):
    "All that a mistake must leave alone."
    return (tl.tree.newick(), list(tl.bank.names), tl.bank.adapters.clone(), tl.bank.signatures.clone(), tl.live.read())


def same(a, b):
    return all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b))


@pytest.fixture
def trained(make_net):
    tl = TreeLoRA(make_net(), lam=0.05, seed=3)
    for i, name in enumerate("abc"): learn(tl, name, i)
    return tl


@pytest.mark.parametrize("options", [{}, {"relative": True}, {"penalty": "prox"}])
def test_a_model_in_double_precision_trains(make_net, options):
    tl = TreeLoRA(make_net().double(), lam=0.05, **options)
    x, y = data(0)
    for name in "ab":
        opt = torch.optim.Adam(tl.params, 0.02)
        with tl.task(name):
            for _ in range(3):
                cross_entropy(tl.model(x.double()), y).backward()
                tl.step()
                opt.step(), opt.zero_grad()
    assert tl.bank.names == ["a", "b"] and not torch.equal(*tl.bank.adapters)


def test_step_is_algorithm_1_layer_by_layer(make_net, trained):
    tl, (x, y) = trained, data(4)
    with tl.task("d"):
        for _ in range(5):
            tl.model.zero_grad()
            cross_entropy(tl.model(x), y).backward()
            grads = [p.grad.clone() for p in tl.params]
            tl.step()
            arms = tl._now.arms
            for l, k in enumerate(arms.tolist()):
                theta_k = tl.bank.adapter(tl.bank.names[k])[l]
                for p, g, at in ((tl.params[2 * l], grads[2 * l], 0), (tl.params[2 * l + 1], grads[2 * l + 1], tl.params[2 * l].numel())):
                    branch = theta_k[at:at + p.numel()].view_as(p)
                    assert torch.allclose(p.grad, g + 0.05 * torch.sign(p - branch), atol=1e-6)
        assert tl._now.signature.count == 5


def test_observed_losses_are_scaled_distances(trained):
    tl, (x, y), seen = trained, data(5), []
    with tl.task("d"):
        update = tl._now.search.update
        tl._now.search.update = lambda arms, losses: (seen.append((arms.clone(), losses.clone())), update(arms, losses))
        total, largest = None, torch.zeros(2, dtype=torch.float64)
        for t in range(4):
            tl.model.zero_grad()
            cross_entropy(tl.model(x), y).backward()
            grad = Rows(tl.layout).load_([p.grad for p in tl.params]).matrix.clone()
            tl.step()
            mean = grad if t == 0 else total / t
            arms, losses = seen[-1]
            d = torch.stack([(mean[l] - tl.bank.signatures[k, l]).abs().sum() for l, k in enumerate(arms.tolist())]).double()
            largest = torch.maximum(largest, d)
            assert torch.allclose(losses, d / largest, atol=1e-5)
            total = grad if total is None else total + grad


def test_prox_gives_exact_zeros_and_its_hook_goes(make_net):
    hooks = len(_global_optimizer_post_hooks)
    tl = TreeLoRA(make_net(), lam=1.0, penalty="prox")
    learn(tl, "a", 0), learn(tl, "b", 1, optimizer=torch.optim.SGD)
    delta = tl.bank.adapter("b") - tl.bank.adapter("a")
    assert (delta == 0).float().mean() > 0.3 and delta.abs().max() > 0 or (delta == 0).all()
    assert len(_global_optimizer_post_hooks) == hooks
    with pytest.raises(RuntimeError):
        with tl.task("c"): raise RuntimeError
    assert len(_global_optimizer_post_hooks) == hooks


def test_prox_leaves_other_optimisers_alone(make_net):
    tl, other = TreeLoRA(make_net(), lam=1e6, penalty="prox"), nn.Parameter(torch.ones(1))
    learn(tl, "a", 0)
    opt = torch.optim.SGD([other], 0.1)
    x, y = data(1)
    with tl.task("b"):
        cross_entropy(tl.model(x), y).backward()
        tl.step()
        tl.live.write(tl.live.read() + 1.0)
        before = tl.live.read()
        other.grad = torch.ones(1)
        opt.step()
        assert torch.equal(tl.live.read(), before)


@pytest.mark.parametrize("signal", ["stored", "fresh", "loss"])
@pytest.mark.parametrize("init", ["last", "fresh", "branch"])
def test_signals_and_inits(make_net, signal, init):
    tl = TreeLoRA(make_net(), lam=0.01, signal=signal, init=init)
    for i, name in enumerate("abcd"): learn(tl, name, i, rounds=8)
    assert tl.tree.tasks == list("abcd") and torch.isfinite(tl.bank.adapters).all()
    width = 1 if signal == "loss" else 2
    assert all(p.shape == (width,) for p in tl.last.picks)
    assert len(tl.last.picks) == (2 if init == "branch" else 8)  # a quarter of the steps looks for the branch


def test_signals_with_a_forward_leave_the_adapter_alone(trained):
    x, y = data(7)
    for signal in ("fresh", "loss"):
        trained.signal = signal
        with trained.task(signal):
            cross_entropy(trained.model(x), y).backward()
            before, grads = trained.live.read(), [p.grad.clone() for p in trained.params]
            trained.lam = 0.0
            trained.step(lambda: cross_entropy(trained.model(x), y))
            assert torch.equal(trained.live.read(), before)
            assert all(torch.equal(p.grad, g) for p, g in zip(trained.params, grads))


def test_branch_starts_from_the_best_arm(make_net):
    tl = TreeLoRA(make_net(), lam=0.0, signal="loss", init="branch", search_rounds=4)
    learn(tl, "a", 0, rounds=40), learn(tl, "b", 1, rounds=40)
    x, y = data(2)
    with pytest.warns(UserWarning, match="All 4 steps of task 'c' went to the search"), tl.task("c"):
        for _ in range(4):
            cross_entropy(tl.model(x), y).backward()
            held = tl.live.read()
            tl.step(lambda: cross_entropy(tl.model(x), y))
            assert all(p.grad is None for p in tl.params)
        assert tl.bank.names[tl._now.arms.item()] == "a"
        assert torch.equal(tl.live.read(), tl.bank.adapter("a")) and not torch.equal(held, tl.live.read())
    assert tl._now is None


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_repeat_with_their_seed(make_net, name):
    runs = []
    for _ in range(2):
        tl = TreeLoRA.variant(name, make_net(), seed=5)
        for i, task in enumerate("abc"): learn(tl, task, i)
        runs.append(tl.bank.adapters)
    assert torch.equal(*runs)


def test_budget_merges_adapters(make_net):
    tl = TreeLoRA(make_net(), budget=2)
    for i, name in enumerate("abcd"): learn(tl, name, i)
    assert len(tl.bank.adapters) == 2 and sorted(tl.bank.weight) in ([1, 3], [2, 2])
    for name in "abcd":
        assert tl.bank.slot[tl.bank.names.index(name)] == tl.bank.slot[tl.bank.names.index(tl.tree.key_of(name))]
        tl.load_adapter(name)
    learn(tl, "e", 4)
    assert len(tl.bank.adapters) == 2 and len(tl.tree.keys) == 2


def test_save_and_load_continue_alike(tmp_path, make_net, trained):
    trained.save(tmp_path / "s")
    again = TreeLoRA.load(tmp_path / "s", make_net(seed=1))
    assert same(state(again), state(trained)) and again.config == trained.config
    for tl in (trained, again): learn(tl, "d", 3)
    assert same(state(again), state(trained))


def test_save_replaces_and_survives_a_crash(tmp_path, make_net, trained, monkeypatch):
    trained.save(tmp_path)
    before = state(trained)
    learn(trained, "d", 3)
    replace = files.replace_file

    def crash(path, data):
        if path.name == "treelora.json": raise OSError("power failure")
        replace(path, data)

    monkeypatch.setattr(files, "replace_file", crash)
    with pytest.raises(OSError): trained.save(tmp_path)
    assert same(state(TreeLoRA.load(tmp_path, make_net())), before)
    monkeypatch.undo()
    trained.save(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert TreeLoRA.load(tmp_path, make_net()).bank.names == list("abcd")


def damage(folder, how):
    index = folder / "treelora.json"
    bank = next(folder.glob("*.safetensors"))
    if how == "tensors truncated": bank.write_bytes(bank.read_bytes()[:-100])
    if how == "tensors changed": bank.write_bytes(bank.read_bytes()[:-1] + b"\x00" if bank.read_bytes()[-1] else bank.read_bytes()[:-1] + b"\x01")
    if how == "tensors missing": bank.unlink()
    if how == "index truncated": index.write_text(index.read_text()[:50])
    if how == "index missing": index.unlink()
    if how == "other format": index.write_text(json.dumps({"format": 99}))


@pytest.mark.parametrize("how, error, words", [
    ("tensors truncated", ValueError, "damaged"), ("tensors changed", ValueError, "damaged"), ("tensors missing", FileNotFoundError, "missing"),
    ("index truncated", ValueError, "no valid JSON"), ("index missing", FileNotFoundError, "treelora.json is missing"),
    ("other format", ValueError, "format 1")])
def test_damaged_files_are_named(tmp_path, make_net, trained, how, error, words):
    trained.save(tmp_path)
    damage(tmp_path, how)
    model = make_net(seed=9)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(error, match=words): TreeLoRA.load(tmp_path, model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_another_model_is_refused(tmp_path, trained):
    trained.save(tmp_path)
    other = nn.Sequential(nn.Linear(3, 3))
    from treelora.lora import add_lora
    with pytest.raises(ValueError, match="another model"): TreeLoRA.load(tmp_path, add_lora(other, "0", 2, 2))


def test_routing(make_net):
    tl = TreeLoRA(make_net(), inference="routed")
    for i, name in enumerate("abc"):
        x, y = data(i)
        with tl.task(name):
            cross_entropy(tl.model(x), y).backward()
            tl.step()
            with torch.no_grad():
                for p in tl.params: p.add_(0.1 * (i + 1))
            tl.record_features(x + 10 * i, y)
    inputs = torch.cat([data(9)[0][:4] + 10 * i for i in (2, 0, 1)])
    tasks = tl.route(inputs)
    assert tasks.tolist() == [2] * 4 + [0] * 4 + [1] * 4
    own = tl.live.read()
    outputs = tl.infer(inputs, tl.model, features=lambda x: x)
    assert torch.equal(tl.live.read(), own)
    for k, name in enumerate("abc"):
        tl.load_adapter(name)
        assert torch.allclose(outputs[tasks == k], tl.model(inputs[tasks == k]), atol=1e-6)
    with pytest.raises(ValueError, match="features=f"): tl.infer(inputs, tl.model)


def test_peft_model(tmp_path):
    def make():
        torch.manual_seed(0)
        return get_peft_model(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)), LoraConfig(r=2, target_modules=["0", "2"]))
    tl = TreeLoRA(make(), lam=0.01)
    for i, name in enumerate("ab"): learn(tl, name, i)
    tl.save(tmp_path)
    assert same(state(TreeLoRA.load(tmp_path, make())), state(tl))


def test_one_task_and_one_layer():
    from treelora.lora import add_lora
    torch.manual_seed(0)
    tl = TreeLoRA(add_lora(nn.Sequential(nn.Linear(6, 2)), "0", 2, 2))
    learn(tl, "only", 0)
    assert tl.tree.groups(1) == [{"only"}] and tl.last.picks == []
    learn(tl, "second", 1)
    assert len(tl.tree.leaves()) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_bad_gradients_are_named_and_nothing_is_recorded(trained, value):
    x, y = data(4)
    before = state(trained)
    with pytest.raises(ValueError, match=r"task 'd', round 3, layers \['2'\]"):
        with trained.task("d"):
            for t in range(3):
                trained.model.zero_grad()
                cross_entropy(trained.model(x), y).backward()
                if t == 2:
                    trained.params[3].grad[0, 0, 0] = value
                    counts, total = trained._now.search.counts.clone(), trained._now.signature.value()
                try: trained.step()
                except ValueError:
                    assert torch.equal(trained._now.search.counts, counts) and torch.equal(trained._now.signature.value(), total)
                    assert trained._now.round == 2
                    raise
    assert same(state(trained), before) and trained._now is None


MISTAKES = {
    "outside a task": lambda tl: tl.step(),
    "learned already": lambda tl: tl.task("a"),
    "non-empty string": lambda tl: tl.task(""),
    "No adapter of a task 'z'": lambda tl: tl.load_adapter("z"),
    "outside": lambda tl: tl.record_features(torch.zeros(1, 2)),
    "needs features of every task": lambda tl: tl.route(torch.zeros(1, 2)),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_outside_a_task(trained, words):
    before = state(trained)
    with pytest.raises(ValueError, match=words): MISTAKES[words](trained)
    assert same(state(trained), before)


def nested(tl): tl.task("e")
def before_backward(tl): tl.model.zero_grad(), tl.step()
def saved_in_between(tl): tl.save("nowhere")
def loaded_in_between(tl): tl.load_adapter("a")
def without_a_step(tl): pass


@pytest.mark.parametrize("act, words", [(nested, "still open"), (before_backward, "loss.backward"), (saved_in_between, "save after"),
                                        (loaded_in_between, "is training"), (without_a_step, "without a step")])
def test_mistakes_inside_a_task(trained, act, words):
    before = state(trained)
    with pytest.raises(ValueError, match=words):
        with trained.task("d"): act(trained)
    assert same(state(trained), before)
    learn(trained, "d", 3)


@pytest.mark.parametrize("kwargs, words", [
    ({"search": "best"}, "known are tree-lcb"), ({"signal": "none"}, "known are stored, fresh, loss"), ({"penalty": "l2"}, "known are l1, prox, dot"),
    ({"signature": "x"}, "known are grad, update, weight"), ({"init": "x"}, "known are last, fresh, branch"),
    ({"inference": "x"}, "known are latest, routed"), ({"split": "x"}, "known are l1, dot"), ({"lam": -1}, "must not be negative"),
    ({"depth": 0}, "at least 1")])
def test_unknown_names(make_net, kwargs, words):
    with pytest.raises(ValueError, match=words): TreeLoRA(make_net(), **kwargs)


def test_options_that_need_something(make_net):
    with pytest.raises(ValueError, match="needs the number of steps"): TreeLoRA(make_net(), ramp=True).task("a")
    x, y = data(0)
    for options, words in (({"penalty": "dot"}, "scaled to the task's loss"), ({"signal": "loss"}, "needs step")):
        tl = learn(TreeLoRA(make_net(), **options), "a", 0)
        with pytest.raises(ValueError, match=words):
            with tl.task("b"):
                cross_entropy(tl.model(x), y).backward()
                tl.step()
    with pytest.raises(ValueError, match="known are paper, authors, branch"): TreeLoRA.variant("mine", make_net())
    with pytest.raises(ValueError, match="no LoRA layers"): TreeLoRA(nn.Linear(2, 2))


def test_late_mail_gives_the_same_training_one_round_later(make_net):
    "What a GPU does, on the CPU: news of a round arrives with the next."
    tl = TreeLoRA(make_net(), lam=0.05)
    for i, name in enumerate("abc"): learn(tl, name, i)
    x, y = data(4)
    with tl.task("d"):
        tl._now.norms.late = tl._now.losses.late = True
        for t in range(4):
            tl.model.zero_grad()
            cross_entropy(tl.model(x), y).backward()
            tl.step()
            assert tl._now.search.pulls().sum().item() == 2 * t
    assert "d" in tl.bank
    with pytest.raises(ValueError, match="round 1"):
        with tl.task("e"):
            tl._now.norms.late = tl._now.losses.late = True
            cross_entropy(tl.model(x * math.nan), y).backward()
            tl.step()
    assert "e" not in tl.bank


def dot_steps(tl, steps):
    "What the dot penalty alone adds to each gradient, step by step, while the adapter stands still."
    added = []
    for _ in range(steps):
        for p in tl.params: p.grad = torch.zeros_like(p)
        tl.step(2.0)
        added.append([p.grad.clone() for p in tl.params])
    return added


def test_the_authors_penalty_acts_on_A_alone_and_its_ramp_begins_anew_in_every_epoch(make_net):
    tl = TreeLoRA(make_net(), penalty="dot", ramp=True, lam=0.3, search="random")
    for p in tl.params: nn.init.normal_(p)
    with tl.task("a", rounds=1, epoch=1): dot_steps(tl, 1)
    a = tl.layout.views(tl.bank.adapter("a"))[::2]
    with torch.no_grad():
        for p in tl.params: p.add_(0.1 * torch.randn_like(p))
    product = sum((p * x).sum() for p, x in zip(tl.params[::2], a)).abs()
    with tl.task("b", rounds=10, epoch=4): added = dot_steps(tl, 10)
    for step, share in zip(added, (1, 2, 3, 4, 1, 2, 3, 4, 1, 2)):
        assert all(not g.any() for g in step[1::2])
        for g, x in zip(step[::2], a): assert torch.allclose(g, -0.3 * share / 4 * 2.0 / product * x, rtol=1e-4)
    with tl.task("c", rounds=10): added = dot_steps(tl, 3)  # no epoch is known: over the task
    sizes = [step[0].norm().item() for step in added]
    assert sizes[2] / sizes[0] == pytest.approx(3, rel=0.2)  # the draw of the branch changes them a little


def test_the_authors_search_counts_anew_in_every_epoch_and_old_states_load(make_net):
    tl = TreeLoRA.variant("authors", make_net(), lam=0.01)
    for i, name in enumerate("ab"): learn(tl, name, i)
    x, y = data(4)
    counts = []
    with tl.task("c", rounds=9, epoch=4):
        for _ in range(9):
            value = cross_entropy(tl.model(x), y)
            value.backward()
            tl.step(value.detach())
            tl.model.zero_grad()
            counts.append(tl._now.search.pulls()[0].sum().item())
            if len(counts) == 6: plain, tensors = json.loads(json.dumps(tl.state()[0])), tl.state()[1]
    assert counts == [1, 2, 3, 4, 1, 2, 3, 4, 1]
    assert plain["task"]["search"]["before"] == 4
    del plain["task"]["search"]["before"]  # as states were before it was counted by epochs
    again = TreeLoRA.variant("authors", make_net(), lam=0.01)
    again.restore(plain, tensors)
    with again.task("c", rounds=9, epoch=4):
        assert again._now.search.before == 0 and again._now.search.pulls()[0].sum() == 2
        for _ in range(3):
            value = cross_entropy(again.model(x), y)
            value.backward()
            again.step(value.detach())
            again.model.zero_grad()
        assert again._now.search.before == 8 and again._now.search.pulls()[0].sum() == 1


def test_news_of_the_old_epoch_arrives_before_the_new_one_begins(make_net):
    tl = TreeLoRA.variant("authors", make_net(), lam=0.01)
    learn(tl, "a", 0)
    x, y, counts = *data(4), []
    with tl.task("b", rounds=6, epoch=3):
        tl._now.norms.late = tl._now.losses.late = True
        for _ in range(6):
            value = cross_entropy(tl.model(x), y)
            value.backward()
            tl.step(value.detach())
            tl.model.zero_grad()
            counts.append(tl._now.search.pulls()[0].sum().item())
    assert counts == [0, 1, 2, 0, 1, 2]
