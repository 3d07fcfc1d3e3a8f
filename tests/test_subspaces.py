"O-LoRA and InfLoRA: sums of adapters, the penalty, input spaces, interference, tiny runs, and the tutorial's length."
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from test_language import tiny_run as text_run
from test_learner import tiny_run, tiny_stream, tiny_vit
from treelora.learning.language import add_adapters
from treelora.lora import LoRALinear, adapters_off, lora_layers
from treelora.methods.subspaces import Frozen, InfLoRA, InfLoRAAligned, InputSpace, OLoRA, OLoRAAuthorsText, OLoRAText, input_moments
from treelora.learning.models import features
from treelora.methods.language import SeqLoRA as SeqLoRAText

CLASSES = [(0, 1), (2, 3)]
TUTORIAL = Path(__file__).parent.parent / "nbs" / "tutorials" / "05_own_method.ipynb"


def orthonormal(d, k, g): return torch.linalg.qr(torch.randn(d, k, generator=g, dtype=torch.float64))[0]


def moment(basis, g, n=200):
    "Second moment of random inputs in the span of some columns."
    x = torch.randn(n, basis.shape[1], generator=g, dtype=torch.float64) @ basis.T
    return x.T @ x / n


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(0, 3), st.booleans())
def test_penalty_is_zero_exactly_for_orthogonal_rows(seed, r, earlier, parts):
    g, d = torch.Generator().manual_seed(seed), 16
    layer = LoRALinear(nn.Linear(d, 12), r, r, ("k", "v") if parts else None)
    path, n = Frozen(layer, layer.lora_A, layer.lora_B), len(layer.slots)
    base = orthonormal(d, d, g).float()
    for i in range(earlier): path.keep((torch.randn(n * r, r, generator=g) @ base[:, i * r:(i + 1) * r].T), layer.lora_B)
    apart = torch.randn(n * r, r, generator=g) @ base[:, earlier * r:(earlier + 1) * r].T
    assert path.overlap(apart).item() < 1e-4
    leaning = apart + 0.1 * base[:, :r].sum(1)
    assert earlier == 0 or path.overlap(leaning).item() > 1e-3
    by_hand = sum((a @ b.T).abs().sum() for kept in path.A.unflatten(1, (earlier, r)).unbind(1) for a, b in zip(kept, leaning.chunk(n))) if earlier else 0.0
    assert path.overlap(leaning).item() == pytest.approx(float(by_hand), rel=1e-4, abs=1e-6)


def test_keys_and_values_do_not_count_as_overlap():
    layer = LoRALinear(nn.Linear(6, 12), 1, 1, ("k", "v"))
    path, eye = Frozen(layer, layer.lora_A, layer.lora_B), torch.eye(6)
    path.keep(eye[:2], layer.lora_B)
    assert path.overlap(eye[:2].flip(0)).item() == 0 and path.overlap(eye[:2]).item() == 2


def test_peft_path_is_the_sum_and_can_be_switched_off(tiny_language):
    model = add_adapters(tiny_language()[0], dropout=0.0).eval()
    layers, ids = lora_layers(model), torch.arange(1, 9)[None]
    paths = [Frozen(model.get_submodule(l.name), l.A, l.B) for l in layers]
    plain, g = model(ids).logits, torch.Generator().manual_seed(0)
    with torch.no_grad():
        for l in layers: l.B.copy_(0.05 * torch.randn(l.B.shape, generator=g))
        one = model(ids).logits
        for path, l in zip(paths, layers):
            path.keep(l.A, l.B)
            l.B.zero_()
    assert torch.allclose(model(ids).logits, one, atol=1e-5) and not torch.allclose(plain, one, atol=1e-3)
    with adapters_off(model): assert torch.allclose(model(ids).logits, plain, atol=1e-6)


@given(st.integers(0, 10_000), st.integers(3, 12), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_spaces_hold_all_old_inputs(seed, d, sizes):
    g, space, seen = torch.Generator().manual_seed(seed), InputSpace(d), []
    for k in sizes:
        seen.append(orthonormal(d, min(k, d), g))
        space.grow(moment(seen[-1], g), 1.0)
    free = space.free()
    assert all((old.T @ free).norm() < 1e-4 for old in seen) and torch.allclose(free.T @ free, torch.eye(free.shape[1]).double(), atol=1e-5)
    assert space.used == torch.linalg.matrix_rank(torch.cat(seen, 1), rtol=1e-6) == d - free.shape[1]
    assert space.basis.shape[1] == min(space.used, d - space.used)


def test_spaces_take_no_more_than_the_share():
    g, space = torch.Generator().manual_seed(0), InputSpace(10)
    values = torch.tensor([4.0, 2, 1, 0.5, 0.1, 0, 0, 0, 0, 0]).double()  # singular values of the moment
    basis = orthonormal(10, 10, g)
    C = basis @ torch.diag(values) @ basis.T
    share = values.square().cumsum(0) / values.square().sum()
    for k, eps in ((1, share[0] - 0.01), (2, share[1] - 0.001), (2, share[1] - 0.001), (4, share[3] - 1e-5)):
        space.grow(C, float(eps))
        held = (C - space.free() @ space.free().T @ C).square().sum() / C.square().sum()
        assert space.used == k and held >= eps
    assert (space.free().T @ basis[:, :4]).norm() < 1e-5


def test_moments_are_those_of_all_tokens():
    layer, batches = nn.Linear(5, 2), [torch.randn(n, 3, 5) for n in (4, 2)]
    with input_moments([layer]) as moments:
        for x in batches: layer(x)
    x = torch.cat([b.flatten(0, 1) for b in batches])
    assert torch.allclose(moments[0], x.T @ x / len(x), atol=1e-5) and not layer._forward_pre_hooks


def prepared(epsilon=1 - 1e-12, cls=InfLoRA, n=1, r=2):
    "InfLoRA after a first task of n images a class, ready for the second."
    stream = tiny_stream(n=max(n, 3))
    method = cls(tiny_vit(), CLASSES, epsilon=epsilon, r=r)
    batches = [[(t.train.images[:n], t.train.labels[:n])] for t in stream]
    method.begin_task([0], "first", 1, 1)
    method.look(batches[0])
    with torch.no_grad():
        for layer in method.layers: layer.lora_B.normal_()
    method.end_task(batches[0])
    method.begin_task([1], "second", 1, 1)
    method.look(batches[1])
    return method, batches


def test_old_outputs_do_not_change_under_any_b():
    method, batches = prepared()
    images = [b[0][0] for b in batches]
    before = [features(method.model, x).detach() for x in images]
    with torch.no_grad():
        for layer in method.layers: layer.lora_B.normal_()
        after = [features(method.model, x) for x in images]
    assert (after[0] - before[0]).norm() < 0.02 * (after[1] - before[1]).norm()
    for layer, space in zip(method.layers, method.spaces): assert 0 < space.used < 16 and layer.lora_A.norm() > 0.1


def test_merging_keeps_the_function_and_the_subspace():
    method, batches = prepared(0.95)
    images, start = batches[1][0][0], [layer.base.weight.clone() for layer in method.layers]
    optimizer = torch.optim.Adam(method.parameters(), 0.05)
    for _ in range(3):
        method.loss(batches[1][0]).backward()
        optimizer.step(), optimizer.zero_grad()
    before = features(method.model, images).detach()
    method.end_task(batches[1])
    assert torch.allclose(features(method.model, images), before, atol=1e-5) and all((l.lora_B == 0).all() for l in method.layers)
    for layer, old in zip(method.layers, start):
        q, k, v = (layer.base.weight - old).detach().chunk(3)
        rows = torch.linalg.qr(layer.lora_A[:2].T)[0]
        assert (q == 0).all() and k.norm() + v.norm() > 1e-4
        assert all((change - change @ rows @ rows.T).norm() < 1e-5 for change in (k, v))


def test_only_b_and_head_train():
    method = InfLoRA(tiny_vit(), CLASSES)
    assert {id(p) for p in method.parameters()} == {id(l.lora_B) for l in method.layers} | {id(p) for p in method.model.head.parameters()}


def test_a_full_space_leaves_the_layer_as_it_is():
    method, batches = prepared(n=3)
    for space in method.spaces: space.grow(torch.eye(16), 1.0)
    assert [space.used for space in method.spaces] == [16] * len(method.spaces) and all(space.basis.numel() == 0 for space in method.spaces)
    method.look(batches[1])
    assert all((layer.lora_A == 0).all() for layer in method.layers)
    assert math.isfinite(method.loss(batches[1][0]).item())
    method.end_task(batches[1])


def test_olora_starts_each_task_from_other_rows():
    seen = []

    class Watched(OLoRA):
        name = "watched"
        def begin_task(self, tasks, name, **settings):
            super().begin_task(tasks, name, **settings)
            seen.append((self.layout.params[0].clone(), self.layout.params[1].clone()))

    tiny_run(Watched)
    (A, _), (other, B) = seen
    assert not torch.allclose(A, other) and (B == 0).all() and other.abs().max() <= 1 / math.sqrt(16)


@pytest.mark.parametrize("cls", [InfLoRA, InfLoRAAligned, OLoRA])
def test_vision_runs_and_repeats(cls):
    a, b = tiny_run(cls), tiny_run(cls)
    assert np.array_equal(a.R, b.R, equal_nan=True) and not np.isnan(a.R[1]).any()
    kept = {InfLoRA: {"subspaces"}, InfLoRAAligned: {"subspaces", "class moments"}, OLoRA: {"adapters"}}[cls]
    assert set(a.memory["stored"]) == kept and min(a.memory["stored"].values()) > 0


def test_language_runs_and_repeats(tiny_language):
    first, second = (text_run(tiny_language, OLoRAText) for _ in range(2))
    assert np.array_equal(first.R, second.R, equal_nan=True) and first.config["method_config"]["lam"] == 0.5
    layers = lora_layers(add_adapters(tiny_language()[0]))
    assert first.memory["stored"] == {"adapters": 3 * 4 * sum(l.size for l in layers)}


def test_penalty_separates_in_a_run():
    kept = {}

    class Watched(OLoRA):
        name = "watched"
        def end_task(self, batches):
            before = self.penalty().item()
            super().end_task(batches)
            kept.setdefault(self.lam, []).append(before)

    for lam in (0.0, 0.5): tiny_run(Watched, lam=lam, epochs=6)
    assert kept[0.5][0] == kept[0.0][0] == 0 and kept[0.5][1] < 0.5 * kept[0.0][1]


@pytest.mark.parametrize("cls, options, words", [
    (InfLoRA, {"r": 17}, "larger than the 16 inputs"), (OLoRA, {"r": 17}, "larger than the 16 inputs"), (OLoRA, {"lam": -0.5}, "must not be negative"),
    (OLoRA, {"lam": float("nan")}, "must not be negative"), (InfLoRA, {"epsilon": 0.0}, "between 0 and 1"), (InfLoRA, {"epsilon": 1.0}, "between 0 and 1")])
def test_bad_settings(cls, options, words):
    with pytest.raises(ValueError, match=words): cls(tiny_vit(), CLASSES, **options)


def test_the_tutorial_has_at_most_sixty_lines():
    cells = json.loads(TUTORIAL.read_text())["cells"]
    lines = [line for c in cells if c["cell_type"] == "code" for line in "".join(c["source"]).splitlines() if line.strip()]
    assert 10 < len(lines) <= 60


def test_the_authors_olora_is_sequential_training_step_by_step(tiny_language):
    def steps(cls):
        seen = []

        class Watched(cls):
            name = "watched"
            def after_step(self):
                super().after_step()
                seen.append([p.detach().clone() for p in self.layout.params])
                if cls is OLoRAAuthorsText: assert self.penalty().item() == 0

        return text_run(tiny_language, Watched), seen

    (ours, a), (plain, b) = steps(OLoRAAuthorsText), steps(SeqLoRAText)
    assert len(a) == len(b) > 6 and all(torch.equal(x, y) for one, other in zip(a, b) for x, y in zip(one, other))
    assert np.array_equal(ours.R, plain.R, equal_nan=True) and ours.memory["stored_bytes"] == 0 and ours.config["method_config"]["lam"] == 0.5
    (_, own), seen = steps(OLoRAText), a
    assert not all(torch.equal(x, y) for one, other in zip(own, seen) for x, y in zip(one, other))
