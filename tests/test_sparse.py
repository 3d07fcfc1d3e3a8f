"Gradients of the penalties against autograd, and the proximal step against its definition."
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from treelora.sparse import dot_gradient, keep_top_, l1_gradient, prox_, ramp

shapes = st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(0, 10 ** 6))


def draw(shape, n=2):
    g = torch.Generator().manual_seed(shape[2])
    return [torch.randn(shape[:2], generator=g) for _ in range(n)]


@given(shapes)
def test_l1_is_autograds(shape):
    theta, branch = draw(shape)
    theta[0, 0] = branch[0, 0]
    theta.requires_grad_()
    (theta - branch).abs().sum().backward()
    assert torch.equal(l1_gradient(theta.detach(), branch), theta.grad)


@given(shapes, st.floats(0.1, 5))
def test_dot_is_autograds(shape, loss):
    theta, branch = draw(shape)
    theta.requires_grad_()
    dot = (theta * branch).sum()
    (-dot * (loss / dot.abs()).detach()).backward()
    assert torch.allclose(dot_gradient(theta.detach(), branch, loss), theta.grad, rtol=1e-4)


def test_dot_of_nothing_is_nothing():
    assert torch.equal(dot_gradient(torch.zeros(1, 2), torch.ones(1, 2), 1.0), torch.zeros(1, 2))


@given(shapes, st.floats(0.01, 2))
def test_prox_minimises_its_objective(shape, threshold):
    theta, branch = draw(shape)
    result = prox_(theta, branch, threshold)
    objective = lambda x: (x - theta).square() / 2 + threshold * (x - branch).abs()
    for step in (-1e-2, 1e-2): assert (objective(result) <= objective(result + step) + 1e-6).all()
    near = (theta - branch).abs() <= threshold
    assert torch.equal(result[near], branch[near])
    assert ((result - branch).abs()[~near] > 0).all()


@given(st.integers(1, 200), st.floats(0.01, 1), st.integers(0, 10 ** 6))
def test_keep_top_keeps_the_largest(n, fraction, seed):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    grads = [x[: n // 2].clone(), x[n // 2:].clone()]
    keep_top_(grads, fraction)
    kept, wanted = torch.cat(grads), max(1, round(fraction * n))
    assert (kept != 0).sum() == wanted
    assert set(kept[kept != 0].tolist()) == set(x[x.abs().argsort(descending=True)[:wanted]].tolist())


@pytest.mark.parametrize("fraction", [0, -1, 1.1])
def test_fraction_outside_is_refused(fraction):
    grads = [torch.ones(3)]
    with pytest.raises(ValueError, match=r"\(0, 1\]"): keep_top_(grads, fraction)
    assert torch.equal(grads[0], torch.ones(3))


def test_ramp_ends_at_lambda():
    assert ramp(0.4, 5, 10) == pytest.approx(0.2) and ramp(0.4, 10, 10) == ramp(0.4, 99, 10) == 0.4
