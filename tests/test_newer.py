"EWC-LoRA, SD-LoRA and OSF: merges, Fisher information of full weights, frozen directions, kept singular directions, and runs."
import peft
import pytest
import torch
from test_language import tiny_run as text_run
from test_learner import tiny_run as image_run, tiny_vit
from torch import nn

from treelora.learning.models import features
from treelora.lora import adapters_off
from treelora.methods.newer import OSF, EWCLoRA, EWCLoRAText, SDLoRA, SDLoRAText, check_exact, merged_fisher, osf_model
from treelora.methods.regularisation import draw_answers
from treelora.methods.replay import negative_log_likelihood

CLASSES = [(0, 1), (2, 3)]
needs_osf = pytest.mark.skipif(not hasattr(peft, "OSFConfig"), reason="PEFT before 0.18 has no OSF")


def begun(cls, task=0, **options):
    "A method on a tiny transformer in the middle of a task, its adapters at random."
    method = cls(tiny_vit(), CLASSES, r=2, blocks=2, **options)
    method.begin_task([task], str(task), 1, 1)
    return shaken(method)


def shaken(method, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in method.layout.params: p.copy_(0.3 * torch.randn(p.shape, generator=g))
    return method


def images_of(n=9, classes=(0, 1)):
    x = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor(classes).repeat(n)[:n]


def test_fisher_is_that_of_the_full_weights():
    method, (images, labels) = begun(EWCLoRA), images_of()
    found = merged_fisher(method, method.updates, [(images[:5], labels[:5]), (images[5:], labels[5:])], 7, seed=4)
    g, expected = torch.Generator().manual_seed(4), [0.0] * len(method.updates)
    weights = [u.weight.requires_grad_() for u in method.updates]
    for part in (slice(0, 5), slice(5, 7)):  # answers are drawn batch by batch
        drawn = draw_answers(*method.answers_of((images[part], labels[part])), g)
        for image, y in zip(images[part], drawn):
            logits, _ = method.answers_of((image[None], y))
            grads = torch.autograd.grad(negative_log_likelihood(logits, y[None]).sum(), weights)
            expected = [total + grad.square() / 7 for total, grad in zip(expected, grads)]
    for F, total in zip(found, expected):
        assert F.max() > 0 and torch.allclose(F, total.unflatten(0, (3, -1))[1:], rtol=1e-3, atol=1e-9)


def test_fisher_against_finite_differences():
    method, batch = begun(EWCLoRA), images_of(1)
    F = merged_fisher(method, method.updates, [batch], 1, seed=0)[1]
    part, i, j = [int(k) for k in torch.unravel_index(F.argmax(), F.shape)]
    drawn = draw_answers(*method.answers_of(batch), torch.Generator().manual_seed(0))
    weight, values = method.updates[1].weight.unflatten(0, (3, -1)), []
    for step in (-1e-2, 1e-2):
        with torch.no_grad():
            weight[part + 1, i, j] += step
            values.append(negative_log_likelihood(method.answers_of(batch)[0], drawn).item())
            weight[part + 1, i, j] -= step
    assert ((values[1] - values[0]) / 2e-2) ** 2 == pytest.approx(F.max().item(), rel=0.05)


def test_a_merge_keeps_the_function_and_q():
    method, batch = begun(EWCLoRA), images_of()
    old, before = [u.weight.clone() for u in method.updates], features(method.model, batch[0]).detach()
    A = method.updates[0].A.clone()
    method.end_task([batch])
    assert torch.allclose(features(method.model, batch[0]), before, atol=1e-5)
    with adapters_off(method.model): assert torch.allclose(features(method.model, batch[0]), before, atol=1e-5)
    for u, w in zip(method.updates, old):
        assert torch.equal(u.weight[:16], w[:16]) and not torch.equal(u.weight[16:], w[16:]) and (u.B == 0).all()
    assert not torch.equal(method.updates[0].A, A)


def test_a_merge_of_peft_layers_keeps_the_function(tiny_language):
    model, tokenizer = tiny_language()
    method, ids = shaken(EWCLoRAText(model, tokenizer, 2, dropout=0.0)), torch.arange(1, 9)[None]
    method.begin_task([0], "a", 1, 1)
    method.model.eval()
    before = method.model(ids).logits.detach()
    for u in method.updates: u.merge()
    assert torch.allclose(method.model(ids).logits, before, atol=1e-4) and all((u.B == 0).all() for u in method.updates)


def test_strength_zero_is_merging_alone():
    class Bare(EWCLoRA):
        name = "bare"
        def _weigh(self, batches): pass

    ends = {}
    def watched(cls):
        class Watched(cls):
            def end_task(self, batches):
                super().end_task(batches)
                ends.setdefault(cls.name, []).append([u.weight.clone() for u in self.updates])
        return Watched
    for cls, options in ((EWCLoRA, {"strength": 0.0}), (Bare, {})): image_run(watched(cls), **options)
    for a, b in zip(*ends.values()):
        for x, y in zip(a, b): assert torch.allclose(x, y, atol=1e-6)


def moved(strength, start, cls):
    "Squared change of the second task's merged weights, weighed by the first's Fisher information."
    marks = []

    class Watched(cls):
        def end_task(self, batches):
            change = [u.matrix().detach().square() for u in self.updates]
            super().end_task(batches)
            marks.append((self.importance, change, self.stored_bytes))
    start(Watched, strength)
    F, change = marks[0][0], marks[1][1]
    assert len({size for *_, size in marks}) == 1  # memory does not grow
    return sum((f * c).sum().item() for f, c in zip(F, change))


def test_springs_hold_where_information_is(tiny_language):
    for cls, start in ((EWCLoRA, lambda c, s: image_run(c, strength=s, epochs=4)), (EWCLoRAText, lambda c, s: text_run(tiny_language, c, strength=s))):
        assert moved(1e6, start, cls) < 0.5 * moved(0.0, start, cls)


def test_information_decays():
    totals = {}
    for gamma in (0.0, 0.5, 1.0):
        method, batch = begun(EWCLoRA, gamma=gamma), images_of()
        method.end_task([batch])
        first = method.importance[0].clone()
        shaken(method, 3).end_task([batch])
        totals[gamma] = method.importance[0]
    assert torch.allclose(totals[1.0] - totals[0.0], first, atol=1e-7) and torch.allclose(totals[0.5] - totals[0.0], first / 2, atol=1e-7)


def test_directions_stay_and_magnitudes_move():
    marks = []

    class Watched(SDLoRA):
        def end_task(self, batches):
            super().end_task(batches)
            marks.append([(p.A.clone(), p.B.clone(), p.magnitudes.detach().clone()) for p in self.paths])
    result = image_run(Watched, epochs=4)
    for (A, B, m), (A2, B2, m2) in zip(*marks):
        assert torch.equal(A2[:, :4], A) and torch.equal(B2[..., :4], B) and m2.shape == (2, 2)
        assert torch.allclose(torch.linalg.matrix_norm(B @ A), torch.ones(2), atol=1e-5)
    assert max((m2[:, :1] - m).abs().max().item() for (*_, m), (*_, m2) in zip(*marks)) > 1e-4
    assert set(result.memory["stored"]) == {"adapters"}


def test_a_task_begins_where_the_last_one_ended(tiny_language):
    method, batch = begun(SDLoRA), images_of()
    for k in range(3):
        before = features(shaken(method, k).model, batch[0]).detach()
        method.end_task([batch])
        assert torch.allclose(features(method.model, batch[0]), before, atol=1e-4)
    assert len(method.parameters()) == len(method.layout.params) + 2 + len(method.paths)
    text = shaken(SDLoRAText(*tiny_language(), 2, dropout=0.0))
    text.begin_task([0], "a", 1, 1)
    before = text.model(torch.arange(1, 9)[None]).logits.detach()
    text.end_task([])
    assert torch.allclose(text.model(torch.arange(1, 9)[None]).logits, before, atol=1e-4)


def test_a_task_that_changed_nothing_has_magnitude_zero():
    method, batch = SDLoRA(tiny_vit(), CLASSES), images_of()
    method.begin_task([0], "a", 1, 1)
    method.end_task([batch])
    assert all((p.magnitudes == 0).all() and p.B.isfinite().all() for p in method.paths)
    assert method.loss(batch).isfinite()


@needs_osf
def test_kept_singular_directions_are_as_they_were(tiny_language):
    marks = []

    class Watched(OSF):
        name = "watched"

        def after_backward(self, batch, loss):
            for layer in self.layers:  # square or wide: U_low_init, or what V_high leaves
                U, S, V = torch.linalg.svd(layer.module.base_layer.weight, full_matrices=False)
                k, g = len(S) // 2, layer.factors
                assert (U[:, :k].T @ g["U_low"].grad).norm() < 1e-3 * g["U_low"].grad.norm() + 1e-7
                assert (g["V_low"].grad @ V[:k].T).norm() < 1e-3 * g["V_low"].grad.norm() + 1e-7

        def end_task(self, batches):
            old = [layer.module.base_layer.weight.detach().clone() for layer in self.layers]
            super().end_task(batches)
            marks.append([(a, layer.module.base_layer.weight.detach().clone()) for a, layer in zip(old, self.layers)])
    result = text_run(tiny_language, Watched, lr=1e-3)
    for old, new in (pair for pairs in marks for pair in pairs):
        U, S, V = torch.linalg.svd(old, full_matrices=False)
        k = len(S) // 2
        assert (new - old).norm() > 1e-4
        assert (U[:, :k].T @ (new - old)).norm() < 1e-3 * (new - old).norm() and ((new - old) @ V[:k].T).norm() < 1e-3 * (new - old).norm()
    assert result.memory["stored"]["singular directions"] > 0 and result.config["method_config"]["keep"] == 0.5


@needs_osf
def test_renewing_keeps_the_function(tiny_language):
    method, ids = OSF(*tiny_language(), 2, keep=0.25), torch.arange(1, 9)[None]
    with torch.no_grad():
        for layer in method.layers:
            layer.factors["S_low"].mul_(1.5)
            layer.factors["U_low"].add_(0.1)
            layer.project()
    before = method.model(ids).logits.detach()
    method.end_task([])
    assert torch.allclose(method.model(ids).logits, before, atol=1e-4)
    assert all(layer.module.get_delta_weight("default").abs().max() < 1e-5 for layer in method.layers)


def test_without_osf_in_peft(monkeypatch, tiny_language):
    monkeypatch.delattr(peft, "OSFConfig", raising=False)
    with pytest.raises(ValueError, match=f"osf needs PEFT 0.18 or newer, this is {peft.__version__}"): OSF(*tiny_language(), 2)


def test_weights_that_would_round_updates_away(tiny_language):
    model, tokenizer = tiny_language()
    with pytest.raises(ValueError, match="torch.bfloat16 would round .*float32"): EWCLoRAText(model.bfloat16(), tokenizer, 2)
    check_exact([torch.zeros(1), torch.zeros(1, dtype=torch.float64)])


@pytest.mark.parametrize("options, words", [({"samples": 0}, "samples=0 must be at least 1"), ({"strength": -1.0}, "strength=-1.0 must be at least 0"), ({"gamma": 1.5}, "gamma=1.5 must lie between 0 and 1")])
def test_bad_settings(options, words):
    with pytest.raises(ValueError, match=words): EWCLoRA(tiny_vit(), CLASSES, **options)


@needs_osf
def test_a_share_that_keeps_all_or_nothing():
    for keep in (0.0, 1.0):
        with pytest.raises(ValueError, match="between 0 and 1"): osf_model(nn.Sequential(nn.Linear(4, 4)), keep, ["0"])
