"Activations that are computed ahead, training that ends early, blocks that are compiled: same results, less work, clear refusals."
import copy

import numpy as np
import pytest
import torch
from test_language import tiny_stream as text_stream
from test_learner import tiny_stream, tiny_vit
from torch import nn

from treelora.engine import ahead
from treelora import learner
from treelora.engine.ahead import check_still, input_of, stack_of, take_activations
from treelora.cli import parser
from treelora.learner import compile_blocks, run
from treelora.lora import add_lora
from treelora.methods import get_method
from treelora.learning.models import features

VISION = dict(epochs=3, batch_size=8, lr=0.01, progress=False, place="last", blocks=2)
TEXT = dict(epochs=2, batch_size=4, lr=0.01, progress=False, layers=1, dropout=0.0)


def vision(method, **settings):
    return run(tiny_stream(classes=6), method, model=tiny_vit(6), **VISION | settings)


def text(make, method, **settings):
    return run(text_stream(), method, model=make(), **TEXT | settings)


def keeping(name, kind, made):
    "A method's class that can be found after its run."
    class Kept(get_method(name, kind)):

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)
    return Kept


@pytest.mark.parametrize("name", ["seqlora", "joint", "hidelora", "olora", "inflora", "treelora", "treelora-tii", "treelora-branch"])
def test_vision_is_the_same_computed_ahead(name):
    made = []
    plain, fast = (vision(keeping(name, "vision", made), ahead=on) for on in (False, True))
    first, second = (torch.cat([p.detach().flatten() for p in m.layout.params]) for m in made)
    assert torch.allclose(first, second, atol=1e-4) and first.abs().max() > 1e-2
    assert np.allclose(plain.R, fast.R, atol=0.09, equal_nan=True) and fast.config["ahead"] and "ahead" not in plain.config


@pytest.mark.parametrize("name", ["seqlora", "alone", "hidelora", "olora", "tasl", "treelora", "treelora-routed", "treelora-branch"])
def test_text_is_the_same_computed_ahead(tiny_language, name):
    made = []
    plain, fast = (text(tiny_language, keeping(name, "language", made), ahead=on) for on in (False, True))
    first, second = (torch.cat([p.detach().flatten() for p in m.layout.params]) for m in made)
    assert torch.allclose(first, second, atol=1e-4) and first.abs().max() > 1e-2
    assert np.allclose(plain.R, fast.R, atol=0.05, equal_nan=True)


def test_training_steps_leave_lower_blocks_out():
    passed = []
    class Counted(get_method("hidelora", "vision")):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.model.blocks[0].register_forward_hook(self.count)

        def count(self, block, inputs, output):
            if torch.is_grad_enabled(): passed.append(len(output))
    for on, per_example in ((False, VISION["epochs"]), (True, 0)):
        passed.clear()
        run(tiny_stream(), Counted, model=tiny_vit(), **VISION, ahead=on)
        assert sum(passed) == per_example * 2 * 24


def test_activations_of_a_language_model(tiny_language):
    method = get_method("seqlora", "language")(*tiny_language(), 1, layers=1, dropout=0.0)
    batch = method.collate(list(text_stream()[0].train)[:5])
    for p in method.layout.params: nn.init.normal_(p, std=0.3)
    whole = method.loss(batch)
    method.prepare_ahead()
    items = method.below(batch)
    assert [len(i["labels"]) for i in items] == batch["attention_mask"].sum(1).tolist()
    assert method.loss(method.join(items)).item() == pytest.approx(whole.item(), rel=1e-5)
    assert method.loss(batch).item() == pytest.approx(whole.item(), rel=1e-6)
    assert torch.allclose(method.plain(method.join(items)), method.plain(batch), atol=1e-5)
    fewer = method.join(items[:2])  # other padding
    assert method.loss(fewer).item() == pytest.approx(method.loss(method.collate(list(text_stream()[0].train)[:2])).item(), rel=1e-5)


def test_copies_of_a_model_go_on_by_themselves():
    model = add_lora(tiny_vit(), "attn.qkv", 2, 2, [4], ("k", "v"))
    take_activations(model, "blocks", 4)
    twin, images = copy.deepcopy(model), torch.rand(2, 1, 8, 8)
    nn.init.normal_(model.blocks[4].attn.qkv.lora_B)
    tokens = input_of(twin.blocks[4], lambda: twin(images))
    assert torch.allclose(features(twin, tokens), features(twin, images), atol=1e-6)
    assert not torch.allclose(features(model, tokens), features(twin, tokens), atol=1e-4)


def test_what_cannot_be_computed_ahead(tiny_language):
    with pytest.raises(ValueError, match="nothing below the adapters"): vision("hidelora", place="first", ahead=True)
    for name in ("gem", "ewc"):
        with pytest.raises(ValueError, match=f"'{name}' has no part that could be computed ahead"): vision(name, ahead=True)
    with pytest.raises(ValueError, match="'sapt' has no part"): text(tiny_language, "sapt", ahead=True)
    with pytest.raises(ValueError, match="'l2p' has no part"): run(text_stream(), "l2p", model=tiny_language(), ahead=True, progress=False)
    with pytest.raises(ValueError, match="nothing below the adapters"): text(tiny_language, "seqlora", layers=None, ahead=True)
    model = tiny_vit(6)
    model.pos_drop.p = 0.2
    with pytest.raises(ValueError, match="pos_drop drops a random part below"): run(tiny_stream(classes=6), "hidelora", model=model, ahead=True, **VISION)
    with pytest.raises(ValueError, match="without reaching the block"): input_of(nn.Linear(2, 2), lambda: None)


def test_augmented_inputs_are_refused():
    stream = tiny_stream(classes=6)
    class Noisy(type(stream[0].train)):
        def __getitem__(self, i):
            image, label = super().__getitem__(i)
            return image + 0.1 * torch.rand_like(image), label
    for task in stream: object.__setattr__(task, "train", Noisy(task.train.images, task.train.labels))
    with pytest.raises(ValueError, match="another one when it is read again.*augmented"): run(stream, "hidelora", model=tiny_vit(6), ahead=True, **VISION)
    check_still(text_stream()[0].train)


def test_a_model_that_does_not_go_on_is_refused(monkeypatch):
    monkeypatch.setattr(ahead, "_features", lambda model, x, *a, stack, start, **k: type(model).forward_features(model, x) if x.dim() == 4 else model.norm(x))
    with pytest.raises(ValueError, match="something else of activations"): vision("hidelora", ahead=True)


def test_too_little_memory_falls_back(monkeypatch):
    class Memory: available = 1000
    monkeypatch.setattr(ahead.psutil, "virtual_memory", lambda: Memory)
    with pytest.warns(UserWarning, match="more than half of the free memory; they are computed in every step"): tight = vision("hidelora", ahead=True)
    assert np.array_equal(tight.R, vision("hidelora").R, equal_nan=True)


@pytest.mark.parametrize("settings, words", [(dict(place="middle"), 'must be "first" or "last"'), (dict(blocks=6), "between 1 and the model's 5 blocks"),
                                             (dict(blocks=0), "between 1 and the model's 5"), (dict(stop_loss=0.0), "must be positive")])
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words): vision("hidelora", **settings)


def test_bad_layers(tiny_language):
    with pytest.raises(ValueError, match="layers=3 must lie between 1 and the model's 2 layers"): text(tiny_language, "seqlora", layers=3)


def test_names_that_share_no_stack():
    assert stack_of(["a.layers.3.q", "a.layers.11.v"]) == ("a.layers", 3)
    with pytest.raises(ValueError, match="do not lie in one stack"): stack_of(["a.layers.3.q", "b.layers.3.q"])


def test_training_ends_when_the_loss_is_low(tiny_language):
    whole, soon, at_once = vision("treelora-branch", curves=3), vision("treelora-branch", stop_loss=0.3, epochs=8, curves=3), vision("hidelora", stop_loss=100.0)
    assert whole.seconds_by_phase["steps"] == [9, 9, 9] and all(n < 24 for n in soon.seconds_by_phase["steps"]) and soon.config["stop_loss"] == 0.3
    assert at_once.seconds_by_phase["steps"] == [3, 3, 3]  # one window: an epoch, since it is shorter than eight steps
    assert [c["samples"][-1] for c in soon.curves] == [8 * n for n in soon.seconds_by_phase["steps"]]  # the last point of a curve is where training ended
    assert text(tiny_language, "treelora-branch", stop_loss=100.0, epochs=4).seconds_by_phase["steps"] == [3, 3, 3]


@pytest.mark.parametrize("at", [5, 7])
def test_such_runs_resume(tmp_path, monkeypatch, at):
    settings = dict(method="treelora-branch", ahead=True, stop_loss=0.5, epochs=6, checkpoint_every=1)
    whole = vision(checkpoints=tmp_path / "whole", **settings)
    steps, before = [], learner.Learner._step
    def cut(self, *args):
        steps.append(1)
        if len(steps) == whole.seconds_by_phase["steps"][0] + at: raise KeyboardInterrupt
        return before(self, *args)
    monkeypatch.setattr(learner.Learner, "_step", cut)
    with pytest.raises(KeyboardInterrupt): vision(checkpoints=tmp_path / "cut", **settings)
    monkeypatch.setattr(learner.Learner, "_step", before)
    again = vision(checkpoints=tmp_path / "cut", resume=True, **settings)
    assert np.array_equal(again.R, whole.R, equal_nan=True) and again.seconds_by_phase["steps"] == whole.seconds_by_phase["steps"]
    with pytest.raises(ValueError, match="computed ahead: true there, false here"): vision(checkpoints=tmp_path / "cut", resume=True, **settings | {"ahead": False})


def test_compiled_blocks_train_the_same(monkeypatch):
    compile_, compiled = nn.Module.compile, []
    monkeypatch.setattr(nn.Module, "compile", lambda self: (compiled.append(self), compile_(self, backend="eager")))
    fast, plain = vision("treelora-branch", compile=True, epochs=1), vision("treelora-branch", epochs=1)
    assert len(compiled) == 5 and np.array_equal(fast.R, plain.R, equal_nan=True) and fast.config["compile"]
    with pytest.raises(ValueError, match="no stack of blocks of one kind"): compile_blocks(nn.Linear(2, 2))


def test_shell():
    args = parser().parse_args(["run", "--ahead", "--stop-loss", "0.1", "--compile", "--option", "place=last"])
    assert (args.ahead, args.stop_loss, args.compile) == (True, 0.1, True)
