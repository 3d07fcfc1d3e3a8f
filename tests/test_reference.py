"The signature `reference`: taken at one point, without a trace in the model, and the same whatever was learned before."
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from test_algorithm import data
from test_learner import tiny_stream, tiny_vit
from treelora.algorithm import TreeLoRA
from treelora.engine.options import Options
from treelora.engine.reference import Reference, reference_gradient, reference_point
from treelora.learner import Learner
from treelora.lora import add_lora, lora_layers
from treelora.methods import get_method
from treelora.signature import Layout, Rows


def family(axis, seed):
    "Inputs, and the sign of one of them."
    x = torch.randn(96, 6, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, axis] > 0).long()


def losses(tl, x, y, seen=None):
    "The loss of the i-th batch, and a note of who was asked."
    def loss(i):
        if seen is not None: seen.append(i)
        return cross_entropy(tl.model(x[i::3]), y[i::3])
    return loss


def begin(tl, x, y, steps, opt=None):
    "Steps within an open task."
    opt = opt or torch.optim.Adam(tl.params, 0.02)
    for _ in range(steps):
        loss = lambda: cross_entropy(tl.model(x), y)
        loss().backward()
        tl.step(loss), opt.step(), opt.zero_grad()
    return opt


def learn(tl, name, x, y, steps=8):
    "One task, referred first where that is asked for."
    with tl.task(name):
        if tl.signature == "reference": tl.refer(losses(tl, x, y))
        begin(tl, x, y, steps)
    return tl


def row(tl, name): return tl.bank.signatures[tl.bank.names.index(name)]


def dropping():
    "A network with dropout, one part of which is not training."
    torch.manual_seed(0)
    net = add_lora(nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 2)), ["0", "3"], 2, 2).train()
    net[2].eval()
    return net


def test_all_is_put_back_bit_for_bit():
    net = dropping()
    layout, (x, y) = Layout(lora_layers(net)), data(0)
    cross_entropy(net(x), y).backward()
    kept = lambda: [t.detach().clone() for t in (*net.parameters(), *net.buffers(), *[p.grad for p in net.parameters() if p.grad is not None], torch.get_rng_state())]
    before, modes = kept(), [m.training for m in net.modules()]
    fresh = Rows(layout).load_([p.detach() for p in layout.params]).matrix
    noisy = lambda: cross_entropy(net(x + 0 * torch.randn_like(x)), y)
    one, two = (reference_gradient(net, layout, [noisy] * 2, reference_point(layout, fresh)) for _ in range(2))
    assert torch.equal(one, two)                              # no dropout
    after = kept()
    assert len(before) == len(after) and all(map(torch.equal, before, after))
    assert [m.training for m in net.modules()] == modes

    def broken(): raise RuntimeError("no batch")
    with pytest.raises(RuntimeError, match="no batch"): reference_gradient(net, layout, [broken], reference_point(layout, fresh))
    assert all(map(torch.equal, before, kept())) and [m.training for m in net.modules()] == modes


def test_it_is_the_mean_gradient_at_the_point(make_net):
    net = make_net()
    layout, (x, y) = Layout(lora_layers(net)), data(0)
    fresh = Rows(layout).load_([p.detach() for p in layout.params]).matrix
    point = reference_point(layout, fresh, 0.1, seed=3)
    parts = [lambda i=i: cross_entropy(net(x[i::4]), y[i::4]) for i in range(4)]
    found = reference_gradient(net, layout, parts, point, unit=False)
    with torch.no_grad():
        for p, v in zip(layout.params, layout.views(point)): p.copy_(v)
    cross_entropy(net(x), y).backward()
    assert torch.allclose(found, Rows(layout).load_([p.grad for p in layout.params]).matrix, atol=1e-6)
    assert torch.allclose(found / found.abs().sum(1, keepdim=True), reference_gradient(net, layout, parts, point), atol=1e-6)
    assert not torch.equal(point, reference_point(layout, fresh, 0.1, seed=4))
    at_zero = reference_gradient(net, layout, parts, reference_point(layout, fresh, 0.0))
    assert at_zero[layout.a_mask()].abs().max() == 0 < found[layout.a_mask()].abs().max()


def test_the_same_data_are_near_and_others_far(make_net):
    tl = TreeLoRA(make_net(), lam=0.001, signature="reference")
    for name, axis, seed in (("a", 0, 0), ("again", 0, 0), ("like", 0, 1), ("other", 1, 0)): learn(tl, name, *family(axis, seed), steps=20)
    apart = lambda name: (row(tl, name) - row(tl, "a")).abs().sum().item()
    assert apart("again") == 0 and apart("other") > 1.5 * apart("like") > 0


def test_it_does_not_depend_on_what_was_learned_before(make_net):
    def both(signature):
        first = learn(TreeLoRA(make_net(), lam=0.001, signature=signature), "a", *family(0, 0))
        later = TreeLoRA(make_net(), lam=0.001, signature=signature)
        for name, axis in (("b", 1), ("c", 2), ("a", 0)): learn(later, name, *family(axis, axis), steps=40)
        return row(first, "a"), row(later, "a")
    assert torch.equal(*both("reference")) and not torch.allclose(*both("grad"), rtol=0.1)


def test_training_is_as_without_it(make_net):
    runs = {signature: learn(TreeLoRA(make_net(), signature=signature), "a", *family(0, 0)) for signature in ("grad", "reference")}
    assert torch.equal(runs["grad"].bank.adapters, runs["reference"].bank.adapters)


def test_who_forgets_it_is_told_so(make_net):
    tl, (x, y) = TreeLoRA(make_net(), signature="reference"), family(0, 0)
    with tl.task("a"):
        cross_entropy(tl.model(x), y).backward()
        with pytest.raises(ValueError, match=r'signature="reference" is taken before a task\'s first step; call tl.refer\(loss\)'): tl.step()
        tl.refer(losses(tl, x, y))                    # nothing was recorded: it may come now
        tl.step()
    assert tl.last.round == 1
    with pytest.raises(ValueError, match="outside a task"): tl.refer(losses(tl, x, y))
    other = TreeLoRA(make_net())
    with pytest.raises(ValueError, match='the signature is "grad"'), other.task("a"): other.refer(losses(other, x, y))


def test_a_gradient_that_is_not_finite_leaves_no_trace(make_net):
    tl = TreeLoRA(make_net(), signature="reference")
    before = tl.live.read()
    with pytest.raises(ValueError, match="NaN or infinite in the layers"), tl.task("a"): tl.refer(lambda i: cross_entropy(tl.model(torch.full((4, 6), float("inf"))), torch.zeros(4).long()))
    assert torch.equal(tl.live.read(), before) and len(tl.bank) == 0 and tl.model.training


def test_the_branch_is_found_before_the_first_step_without_earlier_adapters(make_net):
    tl = TreeLoRA(make_net(), lam=0.01, signature="reference", init="branch", reference={"batches": 2})
    for name, axis in (("a", 0), ("b", 1), ("c", 2)): learn(tl, name, *family(axis, axis), steps=30)
    (x, y), seen = family(1, 9), []
    with tl.task("b2"):
        tl.refer(losses(tl, x, y, seen))
        assert seen == [0, 1]                             # K passes, and no more
        assert tl.found["branch"] == "b" and torch.equal(tl.live.read(), tl.bank.adapter("b"))
        assert sum(tl.found["rounds"].values()) == 6 and min(tl.found["loss"], key=tl.found["loss"].get) == "b"
        tl.refer(losses(tl, x, y, seen))                  # taken once
        begin(tl, x, y, 5)
    assert seen == [0, 1] and tl.last.round == 5 and tl.last.held == 0


@pytest.mark.parametrize("init, signal", [("last", "stored"), ("branch", "loss"), ("branch", "fresh"), ("fresh", "stored")])
def test_it_goes_with_every_start_and_signal(make_net, init, signal):
    tl = TreeLoRA(make_net(), lam=0.01, signature="reference", init=init, signal=signal)
    for i in range(3):
        x, y = family(i % 2, i)
        with tl.task(f"t{i}", rounds=40):
            tl.refer(losses(tl, x, y))
            while signal == "loss" and tl.look(losses(tl, x, y)): pass
            begin(tl, x, y, 40)
    assert torch.allclose(tl.bank.signatures.abs().sum(2), torch.ones(3, 2), atol=1e-4)


@pytest.mark.parametrize("init", ["last", "branch"])
def test_saved_and_resumed(tmp_path, make_net, init):
    options = dict(lam=0.01, signature="reference", init=init, reference={"layers": None}, seed=3)
    whole = TreeLoRA(make_net(), **options)
    for i in range(3): learn(whole, f"t{i}", *family(i % 2, i), steps=10)
    whole.save(tmp_path)
    again = TreeLoRA.load(tmp_path, make_net(seed=5), base_changed="allow")     # the point is kept, not the model's adapter
    assert again.config == whole.config and again.options.point == Reference(layers=None)
    again.model.load_state_dict(whole.model.state_dict())
    for tl in (whole, again): learn(tl, "more", *family(0, 7), steps=10)
    assert torch.equal(whole.bank.signatures, again.bank.signatures) and whole.tree.newick() == again.tree.newick()

    cut, (x, y) = TreeLoRA(make_net(), **options), family(1, 8)
    for i in range(3): learn(cut, f"t{i}", *family(i % 2, i), steps=10)
    with pytest.raises(KeyboardInterrupt), cut.task("half"):
        cut.refer(losses(cut, x, y))
        opt = begin(cut, x, y, 4)
        state, moments = cut.state(), deepcopy(opt.state_dict())
        begin(cut, x, y, 6, opt)
        wanted = cut.live.read(), cut._now.signature.value().clone()
        raise KeyboardInterrupt
    resumed = TreeLoRA(make_net(), **options)
    resumed.restore(*state)
    opt = torch.optim.Adam(resumed.params, 0.02)
    opt.load_state_dict(moments)
    with resumed.task("half"):
        resumed.refer(lambda i: pytest.fail("taken already"))
        begin(resumed, x, y, 6, opt)
        assert torch.equal(resumed.live.read(), wanted[0])
    assert torch.equal(row(resumed, "half"), wanted[1])


def test_states_and_settings_of_before_are_as_they_were():
    assert "reference" not in Options().config
    assert Options(signature="reference").config["reference"] == {"batches": 3, "deviation": 0.02, "unit": True, "layers": 5}
    for wrong, said in (({"batch": 1}, "known are batches"), ({"batches": 0}, "at least 1"), ({"layers": 0}, "None, or at least 1"), ({"deviation": -1.0}, "is negative")):
        with pytest.raises(ValueError, match=said): Options(signature="reference", reference=wrong)
    with pytest.raises(ValueError, match='belongs to signature="reference"'): Options(reference={"batches": 1})


@pytest.mark.parametrize("name", ["treelora", "treelora-branch"])
def test_methods_for_images_refer_before_the_first_step(name):
    stream = tiny_stream(classes=6, size=12)
    method = get_method(name, "vision").for_stream(tiny_vit(6, 12), stream, signature="reference", signal="stored", init="branch")
    loop = Learner(stream, method, epochs=1, batch_size=8, lr=0.01, progress=False)
    loop._evaluate = lambda tasks: None
    seen = []
    method.reference_loss = lambda batch, own=method.reference_loss: seen.append(method.model.training) or own(batch)
    loop.fit()
    found = method.extra()
    assert found["reference_passes"] == len(seen) == 9 and not any(seen)
    assert [b["task"] for b in found["branches"]] == method.tl.bank.names[1:]
    assert torch.isfinite(method.tl.bank.signatures).all() and method.tl.bank.signatures.abs().sum() > 0


def test_methods_for_text_refer_before_the_first_step(tiny_language):
    from treelora.learning.text import cldr_stream
    stream = cldr_stream(("es", "pt"), n_train=16, n_test=4)
    method = get_method("treelora", "language").for_stream(tiny_language(), stream, signature="reference")
    loop = Learner(stream, method, epochs=1, batch_size=8, lr=0.01, progress=False)
    loop._evaluate = lambda tasks: None
    loop.fit()
    assert len(method.tl.bank) == 2 and method.extra()["reference_passes"] == 6
    assert method.options["reference"]["batches"] == 3
