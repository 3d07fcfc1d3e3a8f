"GEM and OGD: the quadratic programme against reference solvers, group gradients against loops, constraints and orthogonality in every step of real runs."
import numpy as np
import pytest
import torch
from scipy.optimize import minimize, nnls
from test_language import tiny_run as text_run
from test_learner import tiny_run as image_run, tiny_stream as image_stream, tiny_vit

from treelora.learning.language import Collator, answer_loss
from treelora.methods.replay import GEM, OGD, Directions, GEMAuthorsText, GEMText, OGDText, authors_project, flat, gem_project, nonnegative_qp, write_
from treelora.learning.text import Example


def problem(n, P, seed, dependent=0):
    "A gradient and the gradients of n memories; some repeat others, one is zero."
    g = torch.Generator().manual_seed(seed)
    G = torch.randn(n, P, generator=g, dtype=torch.float64) * 10 ** torch.empty(n, 1, dtype=torch.float64).uniform_(-3, 3, generator=g)
    if dependent: G = torch.cat([G, 2 * G[:dependent], G[:1] + G[1:2], torch.zeros(1, P)])
    return torch.randn(P, generator=g, dtype=torch.float64), G


@pytest.mark.parametrize("n, P, dependent", [(1, 3, 0), (5, 8, 0), (12, 40, 0), (8, 4, 0), (6, 20, 3)])
def test_qp_equals_nnls(n, P, dependent):
    for seed in range(20):
        g, G = problem(n, P, seed, dependent)
        v = nonnegative_qp(G @ G.T, G @ g)
        reference = torch.from_numpy(nnls(G.T.numpy(), -g.numpy(), maxiter=10000)[0])
        assert (v >= 0).all()
        assert torch.allclose(G.T @ v, G.T @ reference, atol=1e-7)  # v itself is not unique where gradients depend on each other


@pytest.mark.parametrize("strength", [0.0, 0.05, 1.0])
def test_projection_is_the_primal_solution(strength):
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        start, G = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((12,), (4, 12)))
        x = gem_project(start, G, strength)
        goal = (start + strength * G.sum(0)).numpy() if (G @ start < 0).any() else start.numpy()
        primal = minimize(lambda z: 0.5 * ((z - goal) ** 2).sum(), goal, jac=lambda z: z - goal, method="SLSQP", options={"ftol": 1e-14, "maxiter": 1000},
                          constraints={"type": "ineq", "fun": lambda z: G.numpy() @ z, "jac": lambda z: G.numpy()})
        assert primal.success and np.allclose(x, primal.x, atol=1e-5)
        assert (G @ x).min() > -1e-9


def test_one_memory_has_a_formula():
    g, G = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([[0.5, 1.0, 0.0]])
    assert torch.allclose(gem_project(g, G), g - (G[0] @ g) * G[0] / G[0].square().sum(), atol=1e-6)
    assert torch.equal(gem_project(-g, G), -g)


def test_no_solution():
    g, G = problem(3, 6, 0)
    with pytest.raises(ValueError, match="no solution: a gradient is not finite"): gem_project(g * torch.inf, G)
    with pytest.raises(ValueError, match="no solution: its matrix"): nonnegative_qp(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), torch.tensor([-1.0, -1.0]))


def text_method(make, cls, **options):
    method = cls(*make(), 3, **({"dropout": 0.3} | options))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in method.trained: p.copy_(0.3 * torch.randn(p.shape, generator=g))
    method.begin_task([0], "first", 1, 1)
    return method


def texts(n=7): return [Example("ab"[i % 2] + "c" * i + ": say", " " + str(i) * (1 + i % 3)) for i in range(n)]


def test_group_gradients_of_text_equal_a_loop(tiny_language):
    method, which = text_method(tiny_language, GEMText), torch.tensor([0, 2, 1, 2, 0, 2, 2])
    G, counts = method.group_gradients(method.collate(texts()), which, 3)
    method.model.eval()  # without dropout, as group gradients are
    for k in range(3):
        method.model.zero_grad()
        loss = answer_loss(method.model, method.collate([e for e, w in zip(texts(), which) if w == k]))
        loss.backward()
        assert torch.allclose(G[k] / counts[k], flat(p.grad for p in method.trained), atol=1e-5)
    assert not any(m._forward_hooks for m in method.model.modules()) and all(p.requires_grad for p in method.trained)


def test_kept_texts_are_the_batches_rows(tiny_language):
    method = text_method(tiny_language, GEMText)
    batch = Collator(tiny_language()[1])(texts())
    again = method.pack(method.split(batch))
    real = batch["attention_mask"].bool()
    assert all(torch.equal(again[k], batch[k]) for k in ("attention_mask", "position_ids", "labels"))
    assert torch.equal(again["input_ids"][real], batch["input_ids"][real])


def test_masks_of_images():
    within, seen = OGD(tiny_vit(), [(0, 1), (2, 3)], blocks=2), GEM(tiny_vit(), [(0, 1), (2, 3)], blocks=2)
    for method in (within, seen):
        for task in (0, 1): method.begin_task([task], str(task), 1, 1)
    assert within.allowed(torch.tensor([0, 3])).tolist() == [[True, True, False, False], [False, False, True, True]]
    assert seen.allowed(torch.tensor([0, 3])).all()


def watch_gem(cls):
    "The class, with each step's inner products over the norms, before and after the projection."
    before, after = [], []

    class Watched(cls):
        def memory_gradients(self):
            self.G = super().memory_gradients()
            return self.G

        def after_backward(self, batch, loss):
            g = flat(p.grad for p in self.trained)
            super().after_backward(batch, loss)
            if not self.memories: return
            x = flat(p.grad for p in self.trained)
            for seen, y in ((before, g), (after, x)): seen.append(((self.G @ y) / self.G.norm(dim=1) / y.norm()).min().item())

    return Watched, before, after


def test_gem_keeps_every_constraint_in_every_step(tiny_language):
    for cls, start in ((GEM, lambda c: image_run(c, image_stream(n=24))), (GEMText, lambda c: text_run(tiny_language, c, epochs=3))):
        watched, before, after = watch_gem(cls)
        start(watched)
        assert min(before) < -0.05 and min(after) > -1e-5


def watch_ogd(cls):
    "The class, with the share of each step that lies in the stored span."
    shares = []

    class Watched(cls):
        def after_backward(self, batch, loss):
            super().after_backward(batch, loss)
            self.was = flat(self.trained)

        def after_step(self):
            super().after_step()
            if self.kept.Q is None: return
            step = flat(self.trained) - self.was
            shares.append(((self.kept.Q @ step).norm() / step.norm()).item())

    return Watched, shares


def test_ogd_steps_are_orthogonal_to_all_stored_directions(tiny_language):
    for cls, start in ((OGD, lambda c: image_run(c, directions=6)), (OGDText, lambda c: text_run(tiny_language, c, directions=6))):
        watched, shares = watch_ogd(cls)
        start(watched)
        assert len(shares) >= 3 and max(shares) < 1e-4


def test_directions_are_the_gradients_of_right_logits(tiny_language):
    method, collate = text_method(tiny_language, OGDText, directions=3, dropout=0.0), Collator(tiny_language()[1])
    method.end_task([collate(texts(3))])
    assert method.kept.Q.shape[0] == 3
    for example in texts(3):
        method.model.zero_grad()
        batch = collate([example])
        logits = method.model(**{k: batch[k] for k in ("input_ids", "attention_mask", "position_ids")}).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        logits.gather(2, labels.clamp(min=0)[..., None])[..., 0][labels >= 0].sum().backward()
        g = flat(p.grad for p in method.trained)
        assert method.kept.project(g).norm() < 1e-3 * g.norm()


def test_directions_stay_orthonormal():
    g, kept = torch.Generator().manual_seed(0), Directions()
    base = torch.randn(30, 60, generator=g)
    for _ in range(12):  # nearly dependent, of all sizes, more than there is room for
        kept.add(torch.randn(8, 30, generator=g) @ base + 1e-3 * torch.randn(8, 60, generator=g) * base.norm())
        kept.add(1e-6 * torch.randn(2, 60, generator=g))
    assert 30 <= len(kept.Q) <= 60
    assert torch.allclose(kept.Q @ kept.Q.T, torch.eye(len(kept.Q)), atol=1e-4)
    kept = Directions()
    kept.add(torch.zeros(2, 60))
    assert len(kept.Q) == 0


def test_flat_and_back():
    pieces = [torch.randn(2, 3), torch.randn(()), torch.randn(4)]
    vector = flat(pieces)
    copy = [torch.zeros_like(p) for p in pieces]
    write_(copy, vector)
    assert all(torch.equal(a, b) for a, b in zip(copy, pieces)) and len(vector) == 11


@pytest.mark.parametrize("cls", [GEM, OGD])
def test_images_end_to_end(cls):
    a, b = (image_run(cls) for _ in range(2))
    assert np.array_equal(a.R, b.R, equal_nan=True) and not np.isnan(a.R[1]).any()
    assert a.memory["stored_bytes"] > 0


@pytest.mark.parametrize("cls", [GEMText, OGDText])
def test_texts_end_to_end(tiny_language, cls):
    a, b = (text_run(tiny_language, cls) for _ in range(2))
    assert np.array_equal(a.R, b.R, equal_nan=True) and not np.isnan(a.R[2]).any()
    assert a.memory["stored_bytes"] > 0


def test_memory_is_bounded_and_counted(tiny_language):
    result = image_run(GEM, image_stream(n=12), memory=5)
    assert result.memory["stored"] == {"examples": 2 * 5 * (8 * 8 * 4 + 8)}
    assert result.config["method_config"]["memory"] == 5
    result = text_run(tiny_language, OGDText, directions=2)
    assert result.memory["stored"] == {"directions": 3 * 2 * result.config["n_trained"] * 4}


@pytest.mark.parametrize("start", [lambda **o: image_run(GEM, **o), lambda **o: GEM(tiny_vit(), [(0, 1), (2, 3)], **o)])
@pytest.mark.parametrize("options, words", [({"memory": 0}, "memory=0 must be at least 1"), ({"sample": 0}, "sample=0"), ({"strength": -0.1}, "strength=-0.1")])
def test_gem_bad_settings(start, options, words):
    with pytest.raises(ValueError, match=words): start(**options)


def test_other_bad_settings(tiny_language):
    with pytest.raises(ValueError, match="directions=0 must be at least 1"): image_run(OGD, directions=0)
    with pytest.raises(ValueError, match="memory=0 must be at least 1"): text_run(tiny_language, GEMText, memory=0)
    with pytest.raises(ValueError, match="'gem' has no setting 'size'"): image_run(GEM, size=3)


def test_a_gradient_that_is_not_finite_stops_gem():
    method = GEM(tiny_vit(), [(0, 1), (2, 3)], blocks=2)
    method.begin_task([0], "a", 1, 1)
    method.end_task([(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 0, 1]))])
    method.begin_task([1], "b", 1, 1)
    batch = torch.rand(4, 1, 8, 8), torch.tensor([2, 3, 2, 3])
    loss = method.loss(batch)
    loss.backward()
    method.trained[0].grad.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"): method.after_backward(batch, loss)


def test_the_authors_programme_is_solved_and_turns_against_old_tasks():
    for seed in range(8):
        g, G = problem(3, 12, seed)
        G = G / G.norm(dim=1, keepdim=True)
        x = authors_project(g, G)
        if (G @ g >= 0).all():
            assert torch.equal(x, g)
            continue
        P = (G @ G.T + 1e-3 * torch.eye(3)).numpy()
        v = minimize(lambda v: 0.5 * v @ P @ v - v @ (G @ g).numpy(), [0.0] * 3, method="SLSQP", bounds=[(None, 0.5)] * 3, options={"ftol": 1e-14, "maxiter": 500}).x
        assert np.allclose(x, (g + G.T @ torch.from_numpy(v)), atol=1e-4)
    g, G = torch.tensor([-1.0, 2.0]), torch.tensor([[1.0, 0.0]])
    assert (authors_project(g, G) @ G[0]).item() == pytest.approx(-2, abs=0.01) and (gem_project(g, G) @ G[0]).item() == pytest.approx(0, abs=1e-6)


def test_the_authors_gem_keeps_exactly_one_gradient_per_task(tiny_language):
    kept, last = [], []

    class Watched(GEMAuthorsText):
        name = "watched"
        def after_backward(self, batch, loss):
            super().after_backward(batch, loss)
            last.append(flat(p.grad for p in self.layout.params))
        def end_task(self, batches):
            super().end_task(batches)
            kept.append((len(self.gradients), self.gradients[-1], last[-1]))

    result = text_run(tiny_language, Watched, epochs=2)
    assert [n for n, *_ in kept] == [1, 2, 3] and result.memory["stored"] == {"gradients": 3 * 2 * result.config["n_trained"]}
    assert all(torch.equal(gradient, of_last_batch.bfloat16()) for _, gradient, of_last_batch in kept)
    assert result.config["method_config"]["margin"] == 0.5 and result.config["method_config"]["ridge"] == 1e-3


def test_the_authors_gem_projects_each_matrix_for_itself(tiny_language):
    method = GEMAuthorsText(*tiny_language(), 3)
    with torch.no_grad():
        for B in method.layout.params[1::2]: B.normal_()
    method.begin_task([0], "first", 1, 1)
    batch = method.collate(texts())

    def gradients():
        method.model.zero_grad()
        torch.manual_seed(0)  # of the dropout
        loss = method.loss(batch)
        loss.backward()
        before = [p.grad.clone() for p in method.layout.params]
        method.after_backward(batch, loss)
        return before, [p.grad for p in method.layout.params]

    before, after = gradients()
    assert all(torch.equal(a, b) for a, b in zip(before, after))  # the first task is left alone
    kept = [-g.bfloat16().float() if i % 2 else g.bfloat16().float() for i, g in enumerate(before)]  # every other matrix in conflict
    method.gradients.append(flat(kept).bfloat16())
    before, after = gradients()
    for i, (a, b, k) in enumerate(zip(before, after, kept)):
        assert torch.equal(a, b) if i % 2 == 0 else torch.allclose(b.flatten(), authors_project(a.flatten(), k.flatten()[None]), atol=1e-6) and not torch.equal(a, b)
