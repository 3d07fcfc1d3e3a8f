"EWC: Fisher information against loops over single examples, springs against autograd, and what they do in runs."
import numpy as np
import pytest
import torch
from test_language import tiny_run as text_run
from test_learner import tiny_run as image_run, tiny_vit
from test_replay import text_method, texts

from treelora.learner import run
from treelora.learning.language import answer_loss
from treelora.methods.regularisation import EWC, EWCAdaptive, EWCText, Springs, draw_answers, fisher
from treelora.methods.replay import flat, negative_log_likelihood


def squares(method, examples, seed):
    "Mean of squared gradients, one example and one ordinary backward at a time, with answers drawn as `fisher` draws them."
    batch, n = method.pack(examples), len(examples)
    logits, labels = method.answers(batch, [p.detach()[None] for p in method.trained], torch.zeros(n, dtype=torch.long))
    drawn, total = draw_answers(logits, labels, torch.Generator().manual_seed(seed)), 0.0
    for i, example in enumerate(examples):
        single = method.pack([example])
        if isinstance(single, tuple): loss = method.loss((single[0], drawn[i]))
        else:
            answer = drawn[i][labels[i] >= 0]
            single["labels"][0, -len(answer):] = answer
            loss = answer_loss(method.model, single) * len(answer)
        method.model.zero_grad()
        loss.backward()
        total = total + flat(p.grad for p in method.trained).square()
    return total / n


def image_method():
    method = EWC(tiny_vit(), [(0, 1), (2, 3)], blocks=2)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in method.layout.params: p.copy_(0.3 * torch.randn(p.shape, generator=g))
    method.begin_task([1], "b", 1, 1)
    return method


def test_fisher_of_images():
    method = image_method()
    examples = method.split((torch.rand(9, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([2, 3, 2, 3, 2, 2, 3, 3, 2])))
    assert torch.allclose(fisher(method, examples, seed=5), squares(method, examples, 5), rtol=1e-3, atol=1e-7)


def test_fisher_of_texts(tiny_language):
    method = text_method(tiny_language, EWCText)
    method.model.eval()  # the loop, too, without dropout
    examples = method.split(method.collate(texts()))
    assert torch.allclose(fisher(method, examples, seed=5), squares(method, examples, 5), rtol=1e-3, atol=1e-6)


def test_chunks_only_change_the_draws():
    method = image_method()
    examples = method.split((torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([2, 3] * 4)))
    means = [torch.stack([fisher(method, examples, s, chunk) for s in range(12)]).mean(0) for chunk in (5, 8)]
    assert means[0].sum().item() == pytest.approx(means[1].sum().item(), rel=0.4)


def test_drawn_answers_follow_the_model():
    logits, labels = torch.tensor([[[0.0, 2.0, -1.0]]]).expand(4000, 2, 3), torch.tensor([[-100, 0]]).expand(4000, 2)
    drawn = draw_answers(logits, labels, torch.Generator().manual_seed(0))
    assert (drawn[:, 0] == -100).all()
    assert torch.allclose(drawn[:, 1].bincount() / 4000, logits[0, 0].softmax(0), atol=0.03)
    assert negative_log_likelihood(logits, labels)[0].item() == pytest.approx(-logits[0, 1].log_softmax(0)[0].item())


def test_two_vectors_hold_the_springs_of_all_tasks():
    g = torch.Generator().manual_seed(0)
    springs, theta, total = Springs(), torch.randn(7, generator=g, requires_grad=True), 0.0
    for _ in range(6):
        F, end = torch.rand(7, generator=g), torch.randn(7, generator=g)
        springs.add(F, end)
        total = total + 0.5 * (F * (theta - end).square()).sum()
    total.backward()
    assert torch.allclose(springs.gradient(theta.detach()), theta.grad, atol=1e-5)


def test_the_penalty_is_added_to_the_gradient():
    method = image_method()
    batch = torch.rand(6, 1, 8, 8), torch.tensor([2, 3] * 3)
    method.end_task([batch])
    at_rest, F = flat(method.trained), method.springs.stiffness
    grads = []
    for shift in (0.0, 0.1):
        with torch.no_grad(): method.trained[0].add_(shift)
        method.model.zero_grad()
        loss = method.loss(batch)
        loss.backward()
        plain = flat(p.grad for p in method.trained)
        method.after_backward(batch, loss)
        grads.append(flat(p.grad for p in method.trained) - plain)
    assert grads[0].abs().max() < 1e-4 * F.max()
    assert torch.allclose(grads[1], 50 * F * (flat(method.trained) - at_rest), atol=1e-4 * F.max().item() + 1e-6)


def test_springs_hold(tiny_language):
    def distance(run_it, cls, strength):
        ends = []

        class Watched(cls):
            def end_task(self, batches):
                super().end_task(batches)
                ends.append((flat(self.trained), self.springs.stiffness.clone()))
        run_it(Watched, strength)
        (first, F), (second, _) = ends[:2]
        return (F * (second - first).square()).sum().item()
    for cls, start in ((EWC, lambda c, s: image_run(c, strength=s)), (EWCText, lambda c, s: text_run(tiny_language, c, strength=s))):
        assert distance(start, cls, 1e5) < 0.5 * distance(start, cls, 0)


def test_images_and_texts_end_to_end(tiny_language):
    for start in (lambda: image_run(EWC), lambda: text_run(tiny_language, EWCText)):
        a, b = start(), start()
        assert np.array_equal(a.R, b.R, equal_nan=True) and not np.isnan(a.R[-1]).any()
        assert a.memory["stored"] == {"Fisher information": 2 * 4 * a.config["n_trained"]} and a.config["method_config"]["strength"] == 50


@pytest.mark.parametrize("options, words", [({"samples": 0}, "samples=0 must be at least 1"), ({"strength": -1.0}, "strength=-1.0 must be at least 0"), ({"strength": float("nan")}, "strength=nan")])
def test_bad_settings(options, words):
    with pytest.raises(ValueError, match=words): image_run(EWC, **options)


@pytest.mark.slow
def test_class_statistics_retrain_the_head_and_are_counted():
    plain, adaptive = (run("split-digits", cls, epochs=1, lr=0.002, progress=False) for cls in (EWC, EWCAdaptive))
    assert adaptive.op > plain.op + 0.1
    F = 96
    assert adaptive.memory["stored"] == plain.memory["stored"] | {"class moments": 8 * (F * F + 10 * F)}
    assert adaptive.config["method_config"] == plain.config["method_config"] | {"tap": True}

    class Watched(EWCAdaptive):
        name = "watched"
        def _observe(self, batches):
            super()._observe(batches)
            self.before = self.model.head.weight.detach().clone()
        def end_task(self, batches):
            super().end_task(batches)
            moved = (self.model.head.weight - self.before).abs().amax(1) > 1e-4
            assert moved.tolist() == [c in self.seen for c in range(4)]  # of all classes so far, old ones too
            at = self.springs.pull / self.springs.stiffness.clamp(min=1e-30)
            if self.task == 0: assert np.allclose(at[self.springs.stiffness > 1e-8], flat(self.trained)[self.springs.stiffness > 1e-8], atol=1e-2)  # at rest where the new head is

    image_run(Watched)
