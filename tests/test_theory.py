"Smooth trees, games and bounds: against slow readings of the same formulas, and against what the theory says must be so."
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from test_learner import tiny_stream, tiny_vit
from treelora.bandit import get_search
from treelora.theory.smooth_tree import NOISES, Replay, SmoothTree, bound_terms, chain, first_depth, lopsided, needle, play, pulls_bound, regret_bound, smoothness_slack
from treelora.learner import run
from treelora.theory.complexity import stored_numbers
from treelora.theory.regret import Recorder, bank_environment, bound_of, game, measured_terms, save
from treelora.tree import TaskTree


def spread_by_hand(means, delta, gamma, depth=0):
    "The smallest slack of Assumption 1 on halves in order, by recursion."
    own = delta * gamma ** depth - (max(means) - min(means))
    half = (len(means) + 1) // 2
    if len(means) == 1: return math.inf
    return min(own, spread_by_hand(means[:half], delta, gamma, depth + 1), spread_by_hand(means[half:], delta, gamma, depth + 1))


@given(st.integers(1, 7), st.floats(0, 2), st.floats(0.05, 0.95), st.integers(0, 10 ** 6))
def test_trees_are_smooth_by_construction(depth, delta, gamma, seed):
    tree = SmoothTree(depth, delta, gamma, seed)
    slack = smoothness_slack(tree)
    assert slack == pytest.approx(spread_by_hand(tree.means.tolist(), delta, gamma), abs=1e-12) and slack > -1e-9
    assert len(tree) == 2 ** depth and tree.gaps.min() == 0


@pytest.mark.parametrize("tree", [lopsided(8), lopsided(100, 5, seed=2), needle(3), needle(8), SmoothTree(3, 0.7, 0.3, 1, branching=4), SmoothTree(2, 0.7, 0.3, 1, branching=8),
                                  SmoothTree(5, 0.9, 0.5, 4, leaves=19)])
def test_other_shapes_are_smooth_too(tree):
    assert smoothness_slack(tree) > -1e-9


def test_violations_are_seen():
    broken = SmoothTree.of(torch.tensor([0.1, 0.9, 0.1, 0.9]), delta=1.0, gamma=0.5)
    assert smoothness_slack(broken) == pytest.approx(0.5 - 0.8, abs=1e-6)
    assert chain(3).means.tolist() == pytest.approx([1 / 3, 2 / 3, 1, 0]) and chain(3).newick() == "(0,(1,(2,3)));"


@pytest.mark.parametrize("noise", NOISES)
def test_noise_has_the_mean_it_is_given(noise):
    m = torch.linspace(0, 1, 9).double()[:, None].expand(9, 50_000)
    x = NOISES[noise](m, torch.rand(m.shape, generator=torch.Generator().manual_seed(0)).double())
    assert x.min() >= 0 and x.max() <= 1 and (x.mean(1) - m[:, 0]).abs().max() < 0.01


def slow_choice(search, width):
    "The arm that a literal recursion over the tree chooses, for the first layer."
    nodes, counts, means = search.nodes, search.counts[0], search.means[0]
    def own(i): return means[i].item() - width(counts[i].item()) if counts[i] > 0 else -math.inf
    def bound(i):
        if nodes.arm[i] >= 0 or counts[i] == 0: return own(i)
        return max(min(bound(nodes.left[i]), bound(nodes.right[i])), own(i) - search.delta[i].item())
    i = torch.tensor(0)
    while nodes.arm[i] < 0: i = min((nodes.left[i], nodes.right[i]), key=lambda j: (bound(j), nodes.first[j].item()))
    return nodes.arm[i].item()


@pytest.mark.parametrize("name", ["tree-lcb-path", "bast"])
@pytest.mark.parametrize("delta", [0.8, math.inf])
def test_bounds_kept_on_the_path_choose_as_a_full_computation(name, delta):
    T, tree = 120, lopsided(11, 3)
    search, g = tree.search(name, 1, horizon=T, delta=delta, c=0.2), torch.Generator().manual_seed(3)
    M = search.nodes.n_nodes
    width = (lambda n: 0.4 * math.sqrt(math.log(T) / n)) if name == "tree-lcb-path" else (lambda n: 0.2 * math.sqrt(math.log(2 * M * T * n * (n + 1)) / (2 * n)))
    for t in range(1, T + 1):
        arm = search.choose(t)
        assert arm.item() == slow_choice(search, width)
        search.update(arm, torch.rand(1, generator=g).double())  # no ties: losses are continuous


def test_rescaling_keeps_path_bounds_right():
    search = SmoothTree(3, 0.8, 0.5).search("bast", 2, horizon=50)
    for t in range(1, 20): search.update(search.choose(t), torch.rand(2, generator=torch.Generator().manual_seed(t)).double())
    search.rescale(torch.tensor([0.5, 1.0]).double())
    torch.testing.assert_close(search._kept[:, :-1], search.bounds(50), rtol=1e-12, atol=1e-12)  # two orders of the same sums


def test_infinite_delta_is_the_flat_player():
    tree, g = SmoothTree(4, 0.8, 0.5, 3), torch.Generator().manual_seed(0)
    a, b = tree.search("tree-lcb", 4, delta=math.inf), tree.search("flat-lcb", 4)
    for t in range(1, 200):
        arms = a.choose(t)
        assert torch.equal(arms, b.choose(t))
        losses = torch.rand(4, generator=g).double()
        a.update(arms, losses), b.update(arms, losses)


def test_equation_2_as_printed_is_another_bound():
    tree = SmoothTree.of(torch.tensor([0.2, 0.4, 0.6, 0.8]))
    printed, right = (get_search(name, tree, 1, delta=0.5) for name in ("tree-lcb-printed", "tree-lcb"))
    for search in (printed, right):
        for arm in range(4): search.update(torch.tensor([arm]), tree.means[[arm]])
    w = lambda n: 2 * math.sqrt(math.log(5) / n)
    pair = (0.2 - w(1)) + 0.3 - w(2) - 0.25  # smaller child's bound + mean - width - delta of depth 1
    left = printed.nodes.left[0]
    assert printed.bounds(5)[0, left].item() == pytest.approx(pair)
    assert right.bounds(5)[0, left].item() == pytest.approx(max(0.2 - w(1), 0.3 - w(2) - 0.25))
    assert printed.bounds(5)[0, 0].item() == pytest.approx(pair + 0.5 - w(4) - 0.5)


@pytest.mark.parametrize("name", ["thompson", "bast", "tree-lcb-path", "tree-lcb", "uct"])
def test_players_prefer_the_good_leaf(name):
    played = play(lopsided(8, 1, noise="bounded").search(name, 5, **({"horizon": 2000} if name in ("bast", "tree-lcb-path") else {})), 2000, [200, 2000])
    assert (played.pulls.argmax(1) == 0).all()
    assert (played.hits[1] / 2000 > played.hits[0] / 200).all()


def test_play_counts_right():
    tree, seen = SmoothTree(2, 0.5, 0.5, 1), []
    played = play(tree.search("random", 3), 50, [10, 50], watch=lambda search, t: seen.append(t))
    assert seen == list(range(1, 51)) and played.rounds == [10, 50]
    assert torch.allclose(played.regret[-1], played.pulls.double() @ tree.gaps)
    assert torch.equal(played.hits[-1], played.pulls[:, tree.gaps.argmin()].double())
    again = play(tree.search("random", 3), 50, [10, 50])
    assert torch.equal(again.regret, played.regret)
    sweep = play(tree.search("sweep", 3), 50, [50])
    assert sweep.comparisons == 200 and (sweep.pulls == 50).all()


def test_replay_gives_what_was_recorded():
    losses = torch.rand(6, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    env = Replay(losses)
    assert torch.equal(env.observe(4, torch.tensor([2, 0]), None), torch.stack([losses[3, 0, 2], losses[3, 1, 0]]))
    played = play(SmoothTree.of(torch.rand(3)).search("sweep", 2), 6, [6], environment=env)
    assert (played.regret[-1] >= 0).all() and played.comparisons == 18


def test_bank_environment_rebuilds_the_tree():
    row = {"names": ["a", "b", "c", "d"], "losses": torch.rand(3, 2, 4).tolist(), "groups": [[["a", "b", "c", "d"]], [["a", "c"], ["b", "d"]], [["a"], ["b", "d"], ["c"]]]}
    tree, replay = bank_environment(row)
    assert tree.newick() == "((0,2),(1,3));" and replay.gaps.shape == (2, 4)


# --- the bound

def test_the_flat_bound_comes_back():
    n, T = 16, 10_000
    flat = math.sqrt(n * T) * (1 + 6 * math.log(4 * T ** 2))
    assert regret_bound(T, n) == pytest.approx(flat)
    assert regret_bound(T, n, n, math.inf, 0.5, math.inf) == pytest.approx(flat)
    assert math.isinf(regret_bound(T, n, 2, math.inf, 0.5, 0.3))  # without smoothness a finite eta promises nothing
    rising = [regret_bound(T, n, n, delta, 0.5, 0.3) for delta in (0.1, 0.5, 1.0, 10.0)]
    assert rising == sorted(rising)


def test_terms_are_those_of_the_proof():
    t = bound_terms(10_000, 64, 4, 1.0, 0.5, 0.3)
    assert t["threshold"] == pytest.approx(0.02) and t["a"] == pytest.approx(200)
    assert t["c"] == pytest.approx(6 * 4 / 0.02 * math.log(4 * 64 * 10_000 / 0.02 ** 2))
    assert t["d"] == pytest.approx(54 * 3 / 0.3 ** 3 * math.log(4 * 64 * 10_000 / 0.3 ** 2))  # c = 1 for gamma = 1/2
    redone = bound_terms(10_000, 64, 4, 1.0, 0.5, 0.3, "redone")
    assert redone["a"] + redone["c"] < t["a"] + t["c"]
    assert redone["d"] == pytest.approx(2 ** first_depth(1.0, 0.5, 0.3) * 54 / 0.09 * math.log(36 * 64 * 10_000 / 0.09))


@given(st.floats(0.01, 1), st.integers(2, 10 ** 7), st.integers(2, 5000))
def test_lemma_1_closes_its_inequality(gap, T, n):
    count = math.floor(pulls_bound(gap, T, n)) + 1  # beyond the lemma's number BAST's width is too small for another pull
    assert 2 * math.sqrt(math.log(2 * (2 * n - 1) * count * (count + 1) * T) / (2 * count)) < gap
    assert 4 * math.sqrt(math.log(T) / pulls_bound(gap, T, n, "eq2")) <= gap


def test_lemma_1_and_theorem_1_hold_in_a_game():
    tree, T = lopsided(16), 1500
    played = game(tree, "BAST", T, 10)
    bad = tree.gaps > 0
    limits = torch.tensor([pulls_bound(g, T, 16) for g in tree.gaps[bad].tolist()])
    assert (played.pulls[:, bad] <= limits).all()
    for constants in ("paper", "redone"):
        bound = bound_of(tree, T, constants, 0.3)
        got = measured_terms(tree, played.pulls.double(), 0.3, bound["threshold"])
        assert all(got[k].max() <= bound[k] for k in "acd")
        assert torch.allclose(sum(got.values()), played.regret[-1])
    assert game(tree, "BAST, flat", T, 10).mean[-1] > 1.2 * played.mean[-1]


def test_wrong_delta_is_fatal_on_the_chain():
    trap = chain(6)
    lost, flat = (play(trap.search("tree-lcb", 1, c=0.1, delta=delta), 800, [800]).mean[-1] for delta in (1.0, math.inf))
    assert lost > 3 * flat


@pytest.mark.parametrize("make, words", [
    (lambda: SmoothTree(3, 1.0, 0.0), "gamma=0.0 must lie between 0 and 1"), (lambda: SmoothTree(3, 1.0, 1.0), "gamma=1.0"), (lambda: SmoothTree(3, 1.0, math.nan), "gamma=nan"),
    (lambda: SmoothTree(3, -1.0, 0.5), "delta=-1.0 must not be negative"), (lambda: SmoothTree(3, math.nan, 0.5), "delta=nan"), (lambda: SmoothTree(0, 1.0, 0.5), "depth=0"),
    (lambda: SmoothTree(4, 1.0, 0.5, leaves=8), "deeper than 8 leaves allow"), (lambda: SmoothTree(2, 1.0, 0.5, leaves=5), "at most 4 leaves"),
    (lambda: SmoothTree(2, 1.0, 0.5, branching=3), "power of two"), (lambda: SmoothTree(2, 1.0, 0.5, noise="loud"), "known are none"),
    (lambda: SmoothTree.of(torch.tensor([0.2, 1.1])), r"must lie in \[0, 1\]"), (lambda: Replay(torch.full((2, 1, 2), 1.5)), r"must lie in \[0, 1\]"),
    (lambda: play(SmoothTree(2, 1.0, 0.5).search("random", 1), 0), "T=0 must be at least 1"), (lambda: regret_bound(0, 8), "T=0"),
    (lambda: regret_bound(10, 8, near=9), "near=9"), (lambda: regret_bound(10, 8, eta=0.0), "eta=0.0"), (lambda: regret_bound(10, 8, delta=-1), "delta=-1"),
    (lambda: SmoothTree(2, 1.0, 0.5).search("bast", 1, horizon=0), "horizon=0"), (lambda: chain(0), "depth=0"), (lambda: lopsided(4), "at least 5 leaves"),
    (lambda: stored_numbers("GEM", 2), "known are OGD")])
def test_bad_input_is_one_clear_sentence(make, words):
    with pytest.raises(ValueError, match=words): make()


def test_losses_outside_the_range_are_refused():
    search = SmoothTree(2, 1.0, 0.5).search("bast", 1)
    with pytest.raises(ValueError, match=r"\[0, 1\]"): search.update(torch.tensor([0]), torch.tensor([1.2]))
    assert search.counts.sum() == 0 and torch.isinf(search._kept).all()


def test_a_plain_tree_is_no_environment():
    plain = TaskTree()
    plain.insert("a", torch.ones(1, 2))
    with pytest.raises(ValueError, match="plain tree, which has no losses"): play(get_search("random", plain, 1), 5)


def test_results_are_written_with_their_conditions(tmp_path):
    path = save(tmp_path, "x", {"T": 3}, [{"mean": 1.0}])
    saved = json.loads(path.read_text())
    assert path == tmp_path / "theory" / "x.json" and saved["config"] == {"T": 3} and saved["packages"]["torch"]


def test_stored_numbers_grow_as_said():
    assert stored_numbers("LoRA", 50) == stored_numbers("LoRA", 1)
    for method in ("OGD", "O-LoRA", "TreeLoRA"): assert stored_numbers(method, 50) == 50 * stored_numbers(method, 1)


def test_a_run_writes_down_the_loss_of_every_arm():
    "In each step of the last task, under both signals; the environment of the saved bank is made of them."
    made = run(tiny_stream(classes=6), Recorder, model=tiny_vit(6), epochs=1, batch_size=8, lr=0.01, progress=False)
    steps, layers = made.seconds_by_phase["steps"][-1], 5  # one for each block
    for losses in made.extra["losses"].values():
        assert torch.tensor(losses).shape == (steps, layers, 2) and torch.tensor(losses).amax((0, 1)).gt(0).all()
    assert made.extra["names"] == made.tasks[:2]
    stored = torch.tensor(made.extra["losses"]["stored"])
    rows = {"names": made.extra["names"], "groups": made.extra["groups"], "losses": (stored / stored.amax((0, 2), keepdim=True)).tolist()}
    assert bank_environment(rows)[1].losses.shape == (steps, layers, 2)
