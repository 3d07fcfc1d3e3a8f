"Routing by the nearest group: exact up to `EXACT` groups, whatever the tree of tasks says; a descent of centroids beyond."
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from treelora.algorithm import TreeLoRA
from treelora.engine import routing
from treelora.engine.features import FeatureStats
from treelora.engine.routing import CentroidTree, Groups, nearest, route
from treelora.learning.decompose import sample_features


def brute_force(x, means):
    "One direct distance at a time."
    return torch.stack([(row - means).square().sum(1).argmin() for row in x])


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 10 ** 6), st.sampled_from([0.0, 1.0, 1e6]))
def test_the_product_is_brute_force(n, width, seed, offset):
    g = torch.Generator().manual_seed(seed)
    groups = [torch.randn(1 + k % 3, width, generator=g).double() + offset for k in range(n)]
    x = torch.cat(groups)[torch.randint(n, (30,), generator=g)] + 0.5 * torch.randn(30, width, generator=g).double()
    owner = torch.arange(n).repeat_interleave(torch.tensor([len(rows) for rows in groups]))
    assert torch.equal(route(x, groups), owner[brute_force(x, torch.cat(groups))])


def test_a_tree_of_unrelated_gradients_hides_no_task(make_net):
    "64 tasks whose gradients, and so the tree of tasks, say nothing of their features: a descent of that tree misses some."
    torch.manual_seed(0)
    tl = TreeLoRA(make_net(), lam=0.0, search="random", seed=1)
    where = torch.randn(64, 2, 8) + 2 * torch.randn(64, 1, 8)
    for k in range(64):
        for p in tl.params: p.grad = torch.randn_like(p)
        with tl.task(f"task {k}"):
            tl.step()
            tl.record_features(where[k].repeat(20, 1) + 0.05 * torch.randn(40, 8), [0, 1] * 20)
    x, own = where.flatten(0, 1) + 0.1 * torch.randn(128, 8), torch.arange(64).repeat_interleave(2)
    assert torch.equal(tl.route(x), own)
    W, means = tl.stats.whitener(), torch.stack(list(tl.stats.means.values()))
    x = x + torch.randn(128, 8)  # now far from any group
    assert torch.equal(tl.route(x), brute_force(x.double() @ W.T, means @ W.T) // 2)


def test_groups_that_nearly_coincide_far_from_the_centre_are_told_apart():
    pair = torch.tensor([[1e8, 0.0], [1e8, 1e-3]], dtype=torch.float64)
    groups = [-pair[:1], pair[:1], pair[1:]]
    x = pair + torch.tensor([0.0, 1e-4])
    d = x.square().sum(1)[:, None] - 2 * x @ torch.cat(groups).T + torch.cat(groups).square().sum(1)
    assert d.argmin(1).tolist() != [1, 2]  # the product alone does not
    assert route(x, groups).tolist() == [1, 2]


def test_of_equally_near_groups_the_first_wins_whatever_the_block(monkeypatch):
    same = [torch.ones(2, 3), torch.zeros(1, 3), torch.ones(1, 3), torch.zeros(2, 3)]
    x = torch.cat([torch.ones(5, 3), torch.zeros(4, 3)])
    for entries in (2 ** 22, 7, 1):  # many rows in a block, one, and less than one
        monkeypatch.setattr(routing, "ENTRIES", entries)
        assert route(x, same).tolist() == [0] * 5 + [1] * 4
    assert route(x[:0], same).tolist() == []


def test_memory_holds_a_block_of_distances(monkeypatch):
    largest, product = 0, torch.addmm
    def watched(*args, **kwargs):
        nonlocal largest
        out = product(*args, **kwargs)
        largest = max(largest, out.numel())
        return out
    monkeypatch.setattr(torch, "addmm", watched)
    monkeypatch.setattr(routing, "ENTRIES", 1000)
    x, means = torch.randn(500, 4).double(), torch.randn(90, 4).double()
    assert torch.equal(nearest(x, means), brute_force(x, means)) and largest <= 1000


@given(st.integers(1, 400), st.integers(2, 9), st.integers(0, 10 ** 6))
def test_a_centroid_tree_is_balanced_and_complete_and_with_all_leaves_exact(n, leaf, seed):
    g = torch.Generator().manual_seed(seed)
    means, x = torch.randn(n, 3, generator=g).double(), torch.randn(20, 3, generator=g).double()
    tree = CentroidTree(means, leaf)
    sizes = tree.cuts.diff()
    assert torch.equal(tree.order.sort().values, torch.arange(n)) and torch.equal(tree.rows, means[tree.order])
    assert sizes.max() <= leaf and sizes.max() - sizes.min() <= 1 and [len(level) for level in tree.levels] == [2 ** (d + 1) for d in range(len(tree.levels))]
    for level in tree.levels[-1:]:
        for centroid, a, b in zip(level, tree.cuts, tree.cuts[1:]): assert torch.allclose(centroid, tree.rows[a:b].mean(0))
    assert torch.equal(tree.find(x, beam=len(sizes)), brute_force(x, means))


def test_equal_means_make_a_tree_too():
    tree = CentroidTree(torch.ones(300, 4).double())
    assert tree.find(torch.ones(3, 4).double(), beam=2).shape == (3,)


def test_beyond_the_exact_number_a_descent_finds_most(monkeypatch):
    g = torch.Generator().manual_seed(0)
    family = 4 * torch.randn(40, 1, 16, generator=g)
    means = (family + torch.randn(40, 50, 16, generator=g)).flatten(0, 1)
    x, groups = means[::7] + 0.2 * torch.randn(286, 16, generator=g), list(means.split(2))
    exact = route(x, groups)
    assert Groups(groups).tree is None
    monkeypatch.setattr(routing, "EXACT", 1000)
    assert Groups(groups).tree is not None
    few, many = ((route(x, groups, beam) == exact).double().mean() for beam in (1, 32))
    assert few < many and many > 0.95 and torch.equal(route(x, groups, 64), exact)


def test_the_groups_are_made_anew_when_a_task_is_added_or_a_state_is_restored(make_net):
    def learn(tl, name, at):
        for p in tl.params: p.grad = torch.ones_like(p)
        with tl.task(name):
            tl.step()
            tl.record_features(at + 0.1 * torch.randn(30, 4, generator=torch.Generator().manual_seed(0)))
    tl, x = TreeLoRA(make_net()), torch.tensor([[0.0] * 4, [3.0] * 4, [9.0] * 4])
    learn(tl, "a", 0.0), learn(tl, "b", 9.0)
    assert tl.route(x).tolist() == [0, 0, 1]
    kept = tl.router._groups()
    assert tl.router._groups()[1] is kept[1]  # made once
    state = tl.state()
    learn(tl, "c", 3.0)
    assert tl.route(x).tolist() == [0, 2, 1]
    other = TreeLoRA(make_net())
    learn(other, "a", 9.0), learn(other, "b", 0.0)
    assert other.route(x).tolist() == [1, 1, 0]
    other.restore(*state)
    assert other.route(x).tolist() == [0, 0, 1]
    with tl.task("d"):
        for p in tl.params: p.grad = torch.ones_like(p)
        tl.step()
    with pytest.raises(ValueError, match="needs features of every task"): tl.route(x)


def test_features_that_are_no_numbers_are_refused():
    stats, x = FeatureStats(), torch.randn(4, 3)
    stats.update(x, list("aabb"))
    before = stats.means["a"].clone(), stats.scatter.clone()
    for bad in (torch.nan, torch.inf):
        odd = x.clone()
        odd[1, 2] = bad
        for refused in (lambda: stats.update(odd, list("aabb")), lambda: stats.distances(odd)):
            with pytest.raises(ValueError, match="1 of 4 inputs have features that are NaN or infinite"): refused()
    assert torch.equal(stats.means["a"], before[0]) and torch.equal(stats.scatter, before[1]) and stats.counts == {"a": 2, "b": 2}


def test_groups_of_one_example_are_told_apart():
    "No scatter: the ridge alone is left, and both distance and samples stay finite."
    stats = FeatureStats()
    stats.update(5 * torch.eye(3), [0, 1, 2])
    assert stats.distances(5 * torch.eye(3)).argmin(1).tolist() == [0, 1, 2]
    assert torch.allclose(sample_features(stats, 1)[0], 5 * torch.eye(3), atol=1e-6)
