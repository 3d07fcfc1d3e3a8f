"The searches against slow, literal readings of their formulas."
import math
import random
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from treelora import bandit
from treelora.bandit import LCB, SEARCHES, TreeLCB, get_search
from treelora.bandit import fast, rivals, search as core
from treelora.tree import TaskTree


def random_tree(n, seed, layers=4):
    g, tree = torch.Generator().manual_seed(seed), TaskTree()
    for k in range(n): tree.insert(f"task {k}", torch.randn(layers, 3, generator=g))
    return tree


class Literal:
    "Eq. 2 for one layer, as nested tuples and dictionaries: a node is the tuple of its arms."

    def __init__(self, tree, c=1.0, delta=1.0, gamma=0.5, variance=False):
        self.index = {t: i for i, t in enumerate(tree.tasks)}
        self.children, self.depth, self.c, self.delta, self.gamma, self.variance = {}, {}, c, delta, gamma, variance
        self.root = self._grow(tree, tree.root, [self.index[t] for t in tree._names(tree.root)], 0)
        self.seen = {}

    def _grow(self, tree, node, arms, depth):
        me = tuple(arms)
        self.depth[me] = depth
        if len(arms) > 1:
            if node is not None and node.children: halves = [(c, [self.index[t] for t in tree._names(c)]) for c in node.children]
            else: halves = [(None, arms[:(len(arms) + 1) // 2]), (None, arms[(len(arms) + 1) // 2:])]
            self.children[me] = [self._grow(tree, n, a, depth + 1) for n, a in halves]
        return me

    def own(self, node, t):
        xs = self.seen[node]
        n, mean = len(xs), sum(xs) / len(xs)
        if not self.variance: return mean - 2 * self.c * math.sqrt(math.log(t) / n)
        var = sum((x - mean) ** 2 for x in xs) / n
        return mean - self.c * (math.sqrt(2 * var * math.log(t) / n) + 3 * math.log(t) / n)

    def lcb(self, node, t):
        if node not in self.seen: return -math.inf
        if len(node) == 1: return self.own(node, t)
        lowest = min(self.lcb(child, t) for child in self.children[node])
        return max(lowest, self.own(node, t) - self.delta * self.gamma ** self.depth[node])

    def choose(self, t):
        node = self.root
        while len(node) > 1: node = min(self.children[node], key=lambda c: (self.lcb(c, t), min(c)))
        return node[0]

    def update(self, arm, loss):
        for node in self.depth:
            if arm in node: self.seen.setdefault(node, []).append(loss)


@given(st.integers(1, 12), st.integers(0, 10 ** 6), st.sampled_from([1.0, 0.2]), st.booleans())
def test_tree_lcb_is_equation_2(n, seed, c, variance):
    tree, rng, L = random_tree(n, seed), random.Random(seed), 3
    search = get_search("tree-lcb-v" if variance else "tree-lcb", tree, L, c=c)
    literal = [Literal(tree, c=c, variance=variance) for _ in range(L)]
    level = [[rng.random() for _ in range(n)] for _ in range(L)]
    for t in range(1, 40):
        arms = search.choose(t)
        assert arms.dtype == torch.long and arms.shape == (L,)
        assert arms.tolist() == [one.choose(t) for one in literal]
        losses = [min(1.0, max(0.0, level[l][a] + rng.gauss(0, 0.1))) for l, a in enumerate(arms.tolist())]
        search.update(arms, torch.tensor(losses, dtype=torch.float64))
        for one, a, x in zip(literal, arms.tolist(), losses): one.update(a, x)


@given(st.integers(1, 10), st.integers(0, 10 ** 6))
def test_flat_lcb_is_its_formula(n, seed):
    tree, rng, seen = random_tree(n, seed), random.Random(seed), {}
    search = get_search("flat-lcb", tree, 1)
    for t in range(1, 30):
        bound = lambda k: sum(seen[k]) / len(seen[k]) - 2 * math.sqrt(math.log(t) / len(seen[k])) if k in seen else -math.inf
        want = min(range(n), key=lambda k: (bound(k), k))
        assert search.choose(t).tolist() == [want]
        x = rng.random()
        search.update(torch.tensor([want]), torch.tensor([x], dtype=torch.float64))
        seen.setdefault(want, []).append(x)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
def test_means_and_variances_are_exact(xs):
    search = get_search("random", random_tree(2, 0), 1)
    for x in xs: search.update(torch.tensor([1]), torch.tensor([x], dtype=torch.float64))
    leaf = search.nodes.leaves[1]
    values = torch.tensor(xs, dtype=torch.float64)
    assert search.means[0, leaf].item() == pytest.approx(values.mean().item(), abs=1e-12)
    assert search.squares[0, leaf].item() == pytest.approx(((values - values.mean()) ** 2).sum().item(), abs=1e-9)
    assert search.counts[0, 0].item() == len(xs) and search.pulls().tolist() == [[0, len(xs)]]


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_plays_and_repeats(name):
    tree = random_tree(9, 1)
    picks = []
    for _ in range(2):
        search = get_search(name, tree, 4, seed=7)
        picks.append([])
        for t in range(1, 60):
            arms = search.choose(t)
            assert arms.dtype == torch.long and ((0 <= arms) & (arms < 9)).all()
            search.update(arms, arms.double() / 9)
            picks[-1].append(arms.tolist())
    assert picks[0] == picks[1]


@pytest.mark.parametrize("name", ["tree-lcb", "tree-lcb-v", "flat-lcb", "sweep", "epsilon-greedy"])
def test_the_nearest_task_wins_in_the_long_run(name):
    tree = random_tree(8, 2)
    options = {"c": 0.1} if "lcb" in name else {}
    search = get_search(name, tree, 2, **options)
    losses = torch.linspace(0.9, 0.1, 8).double()
    for t in range(1, 400): 
        arms = search.choose(t)
        search.update(arms, losses[arms])
    assert search.best().tolist() == [7, 7]
    assert (search.pulls()[:, 7] > 200).all()


def test_sweep_takes_all_losses():
    search = get_search("sweep", random_tree(3, 0), 2)
    search.update_all(torch.tensor([[0.3, 0.1, 0.2], [0.0, 0.5, 0.4]]))
    assert search.choose(2).tolist() == [1, 0] and search.pulls().tolist() == [[1, 1, 1]] * 2


def test_softmax_prefers_the_farther_tasks():
    shares = []
    for near in range(4):
        search, losses, hits = get_search("softmax", random_tree(4, near), 8, horizon=500), torch.ones(4).double(), 0.0
        losses[near] = 0.1
        for t in range(1, 501):
            arms = search.choose(t)
            search.update(arms, losses[arms])
            hits += (arms == near).double().mean().item() / 500
        shares.append(hits)
    assert sum(shares) / 4 < 0.2  # blind chance is 0.25


def softmax_share(near, epoch, rounds=500):
    "Share of the picks that the near one of four tasks gets from the authors' search."
    search, losses, hits = get_search("softmax", random_tree(4, near), 8, seed=near, horizon=epoch), torch.ones(4).double(), 0.0
    losses[near] = 0.1
    for t in range(1, rounds + 1):
        if t % epoch == 1: search.new_epoch(t - 1)
        arms = search.choose(t)
        search.update(arms, losses[arms])
        hits += (arms == near).double().mean().item() / rounds
    return hits


def test_the_authors_draw_gives_the_near_task_less_than_chance_whichever_it_is():
    shares = [softmax_share(near, 500) for near in range(4)]
    assert 0.1 < min(shares) and max(shares) < 0.2  # blind chance is 0.25
    assert sum(shares) < sum(softmax_share(near, 25) for near in range(4)) < 4 * 0.25


@pytest.mark.parametrize("n, seed", [(2, 0), (5, 1), (9, 2)])
def test_the_authors_score_is_distance_plus_width_over_its_range(n, seed):
    search, rng, t = get_search("softmax", random_tree(n, seed), 3, horizon=60), random.Random(seed), 41
    seen = [[[] for _ in range(n)] for _ in range(3)]
    for _ in range(40):
        arms, xs = [rng.randrange(n - 1) for _ in range(3)], [rng.random() for _ in range(3)]  # the last arm is never seen
        search.update(torch.tensor(arms), torch.tensor(xs, dtype=torch.float64))
        for layer, (a, x) in enumerate(zip(arms, xs)): seen[layer][a].append(x)
    log = math.log(2 * 60 * (t + 1) * (t + 2))
    want = torch.tensor([[(sum(xs) / len(xs) if xs else 0) + math.sqrt(log / (2 * len(xs) + 1e-5)) for xs in row] for row in seen], dtype=torch.float64)
    factor = want.median(1, keepdim=True).values.clamp(max=1.5)
    want = torch.where(search.in_branch, want * factor, want)
    scores = search.scores(t)
    assert torch.allclose(scores, want / (want.max() - want.min() + 1e-5))
    assert (scores.max() - scores.min()).item() == pytest.approx(1, abs=1e-4)


def test_among_equally_often_seen_tasks_the_farther_scores_higher():
    search, losses = get_search("softmax", random_tree(6, 0), 1), [0.1, 0.9, 0.3, 0.7, 0.5, 0.2]
    for _ in range(30):
        for k, x in enumerate(losses): search.update(torch.tensor([k]), torch.tensor([x]))
    scores = search.scores(181)[0]
    for branch in (search.in_branch, ~search.in_branch):
        arms = branch.nonzero().flatten().tolist()
        assert sorted(arms, key=lambda k: scores[k]) == sorted(arms, key=lambda k: losses[k])


@pytest.mark.parametrize("name", SEARCHES)
def test_only_the_authors_search_forgets_when_an_epoch_begins(name):
    search, fresh = (get_search(name, random_tree(5, 0), 2, seed=1) for _ in range(2))
    for t in range(1, 13):
        arms = search.choose(t)
        search.update(arms, (arms + 1.0) / 5)
    before = search.pulls()
    search.new_epoch(12)
    assert search.per_epoch == (name == "softmax")
    assert search.pulls().sum().item() == (0 if search.per_epoch else 24) and (search.per_epoch or torch.equal(search.pulls(), before))
    if search.per_epoch:  # it goes on as a new one would
        search.rng.set_state(fresh.rng.get_state())
        for t in range(1, 9):
            arms = search.choose(12 + t)
            assert torch.equal(arms, fresh.choose(t))
            for one in (search, fresh): one.update(arms, (arms + 1.0) / 5)


def test_rescale_shrinks_means_only_of_its_layer():
    search = get_search("tree-lcb", random_tree(2, 0), 2)
    search.update(torch.tensor([0, 0]), torch.tensor([1.0, 1.0]))
    search.rescale(torch.tensor([0.5, 1.0]).double())
    assert search.leaf_means()[:, 0].tolist() == [0.5, 1.0]


@pytest.mark.parametrize("losses, words", [
    ([1.5], r"\[0, 1\]"), ([float("nan")], r"\[0, 1\]"), ([-0.1], r"\[0, 1\]"), ([0.1, 0.2], "shape")])
def test_bad_losses_change_nothing(losses, words):
    search = get_search("tree-lcb", random_tree(2, 0), 1)
    search.update(torch.tensor([0]), torch.tensor([0.5]))
    before = search.counts.clone(), search.means.clone()
    with pytest.raises(ValueError, match=words): search.update(torch.tensor([0]), torch.tensor(losses))
    assert torch.equal(search.counts, before[0]) and torch.equal(search.means, before[1])


def test_unknown_names_and_empty_trees():
    with pytest.raises(ValueError, match="known are tree-lcb, tree-lcb-v, flat-lcb"): get_search("best", random_tree(2, 0), 1)
    with pytest.raises(ValueError, match="tree is empty"): get_search("uct", TaskTree(), 1)
    with pytest.raises(ValueError, match="n_layers=0"): get_search("uct", random_tree(2, 0), 0)
    assert get_search("tree-lcb", random_tree(1, 0), 3).choose(1).tolist() == [0, 0, 0]


def nested(nodes, i=0):
    "A search tree as nested pairs, the child with the lower task first; a leaf is its arm."
    if nodes.arm[i] >= 0: return nodes.arm[i].item()
    return tuple(nested(nodes, j) for j in nodes.pair[i])


def naive(node, n, mu, t, c, depth=0):
    "The recursion of the page that teaches the search: a lower bound of the best leaf below a node."
    own = mu[node] - 2 * c * math.sqrt(math.log(t) / n[node]) if n[node] else -math.inf
    if isinstance(node, int) or not n[node]: return own
    return max(min(naive(child, n, mu, t, c, depth + 1) for child in node), own - 0.5 ** depth)


@pytest.mark.parametrize("kind", [LCB, TreeLCB])
@pytest.mark.parametrize("n, c", [(1, 1.0), (8, 1.0), (8, 0.05), (33, 0.2)])
def test_the_naive_recursion_chooses_the_same_for_hundreds_of_rounds(kind, n, c):
    search, rng = kind(random_tree(n, n), 1, c=c), random.Random(n)
    tree, counts, means, level = nested(search.nodes), defaultdict(int), defaultdict(float), [rng.random() for _ in range(n)]
    for t in range(1, 301):
        path = [tree]
        while not isinstance(path[-1], int): path.append(min(path[-1], key=lambda x: naive(x, counts, means, t, c, len(path))))
        assert search.choose(t).tolist() == path[-1:]
        loss = min(1.0, max(0.0, level[path[-1]] + rng.gauss(0, 0.1)))
        search.update(torch.tensor(path[-1:]), torch.tensor([loss], dtype=torch.float64))
        for node in path:
            counts[node] += 1
            means[node] += (loss - means[node]) / counts[node]
    assert search.bounds(301)[0, 0].item() == pytest.approx(naive(tree, counts, means, 301, c), abs=1e-12)


def test_all_public_names_are_in_the_package_and_its_modules_import_one_way():
    assert set(bandit.__all__) == {
        "FEW", "SEARCHES", "SearchTree", "Search", "LCB", "PrintedLCB", "TreeLCBV", "FlatLCB", "UCT", "EpsilonGreedy", "Thompson",
        "Random", "Sweep", "Softmax", "TreeLCB", "PathLCB", "BAST", "tree_lcb", "check_search", "get_search"}
    for module in (core, fast, rivals):
        assert all(getattr(bandit, name) is getattr(module, name) for name in module.__all__)
    sources = {m.__name__: Path(m.__file__).read_text(encoding="utf-8") for m in (core, fast, rivals)}
    for name, before in (("search", ()), ("fast", ("search",)), ("rivals", ("search",))):
        assert not any(f"from .{other} import" in sources[f"treelora.bandit.{name}"] for other in {"search", "fast", "rivals"} - set(before))


def test_methods_given_to_a_class_are_methods_of_it():
    assert core.Search.update.__qualname__ == "Search.update" and TreeLCB.choose is not LCB.choose
    assert TreeLCB.bounds is LCB.bounds and "update" not in core.__all__
