"Invariants of the task tree under random insertions and removals."
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treelora.tree import SMALL, TaskTree, cut, merge_lora

RULES = ("axis", "l1", "dot", "dot-diff")


@st.composite
def histories(draw):
    "A tree, and what was done to it: insertions of ragged rows, some equal, and removals."
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    tree = TaskTree(draw(st.sampled_from(RULES)), depth=draw(st.sampled_from([None, 1, 2, 9])))
    g, left = torch.Generator().manual_seed(draw(st.integers(0, 10 ** 6))), []
    for k in range(draw(st.integers(1, 40))):
        if left and draw(st.integers(0, 3)) == 0:
            tree.remove(left.pop(draw(st.integers(0, len(left) - 1))))
        else:
            rows = [torch.randint(0, 3, (s,), generator=g).float() for s in sizes]
            tree.insert(k, rows)
            left.append(k)
    return tree, left, len(sizes)


@given(histories())
def test_every_task_is_in_exactly_one_leaf(history):
    tree, left, n_layers = history
    assert tree.tasks == left
    assert sorted(t for leaf in tree.leaves() for t in leaf) == sorted(left)
    for depth in range(n_layers + 2):
        groups = tree.groups(depth)
        assert sorted(t for g in groups for t in g) == sorted(left)
    limit = n_layers if tree.depth is None else min(n_layers, tree.depth)
    for task in left:
        path = tree.path(task)
        assert len(path) - 1 <= limit and path[0] == left and task in path[-1]
        assert path[-1] in tree.leaves()


@given(histories())
def test_leaves_end_for_a_reason(history):
    tree, left, n_layers = history
    for node in tree.root.walk() if tree.root else ():
        if node.children: assert all(c.tasks for c in node.children)
        elif len(node.tasks) > 1 and node.depth < tree.limit:
            rows = tree.rows(node.tasks, node.depth)
            compare = torch.cat([rows[:1], rows.diff(dim=0)]) if tree.split == "dot-diff" else rows
            assert (compare == compare[0]).all()


@given(st.integers(0, 10 ** 6), st.integers(2, 90))
def test_inner_nodes_are_balanced(seed, n):
    g, tree = torch.Generator().manual_seed(seed), TaskTree()
    for k in range(n): tree.insert(k, torch.randn(6, 3, generator=g))
    for k in range(0, n, 5): tree.remove(k)
    for node in tree.root.walk():
        if node.children:
            size = len(node.tasks)
            least = max(1, size // 4) if size <= SMALL else size // 6
            assert min(len(c.tasks) for c in node.children) >= least


@given(st.integers(0, 10 ** 6), st.sampled_from([(4, 4, 4, 4), (5, 3, 3, 5), (3, 5, 5, 3), (5, 3, 5, 3)]))
def test_planted_hierarchy_is_found_in_any_order(seed, sizes):
    g = torch.Generator().manual_seed(seed)
    group = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    supers = 3 * torch.randn(2, 2, 30, generator=g)
    centers = supers.repeat_interleave(2, 0) + torch.randn(4, 2, 30, generator=g)
    G = centers[group] + 0.02 * torch.randn(16, 2, 30, generator=g)
    tree = TaskTree()
    strangers = torch.randn(3, 2, 30, generator=g) * 5
    for i, k in enumerate(torch.randperm(16, generator=g).tolist()):
        tree.insert(k, G[k])
        if i % 6 == 2: tree.insert(f"stranger {i}", strangers[i // 6])
    for i in (2, 8, 14): tree.remove(f"stranger {i}")
    want = lambda labels: {frozenset((labels == v).nonzero().flatten().tolist()) for v in labels.unique()}
    assert {frozenset(s) for s in tree.groups(1)} == want(group // 2)
    assert {frozenset(s) for s in tree.groups(2)} == want(group)


def test_depth_grows_with_log_n():
    g, tree = torch.Generator().manual_seed(0), TaskTree()
    for k in range(300): tree.insert(k, torch.randn(40, 2, generator=g))
    assert max(len(tree.path(k)) for k in range(300)) <= 1 + 300 ** 0.5
    assert tree.n_splits < 300 * 40


@given(histories())
def test_state_round_trip_continues_alike(history):
    tree, left, n_layers = history
    again = TaskTree.from_state(*tree.state())
    assert again.newick() == tree.newick() and again.tasks == tree.tasks
    if not left: return
    rows = [r + 0.5 for r in tree.signature(left[0])]
    for t in (tree, again): t.insert("new", rows)
    assert again.newick() == tree.newick()
    assert again.groups(1) == tree.groups(1)


@given(st.integers(0, 10 ** 6), st.integers(1, 5), st.integers(1, 20))
def test_budget_is_kept_and_tasks_stay(seed, budget, n):
    g, tree = torch.Generator().manual_seed(seed), TaskTree(budget=budget)
    merges = [m for k in range(n) for m in tree.insert(k, torch.randn(3, 4, generator=g))]
    assert len(tree.keys) == min(n, budget) and len(merges) == max(0, n - budget)
    assert sorted(t for leaf in tree.leaves() for t in leaf) == list(range(n))
    for k in range(n): tree.remove(k)
    assert len(tree) == 0 and tree.root is None and tree.newick() == ";"


def test_merged_signature_is_the_mean_of_all_members():
    tree = TaskTree(budget=1)
    for k, x in enumerate((0.0, 3.0, 9.0)): tree.insert(k, [torch.tensor([x])])
    assert tree.signature(2)[0].item() == pytest.approx(4.0)
    tree.remove(0)
    assert tree.key_of(2) == 1 and tree.tasks == [1, 2]


@given(st.integers(0, 10 ** 6), st.integers(1, 4), st.integers(2, 4))
def test_merge_lora_is_the_best_low_rank_mean(seed, r, k):
    g = torch.Generator().manual_seed(seed)
    pairs = [(torch.randn(r, 9, generator=g), torch.randn(7, r, generator=g)) for _ in range(k)]
    w = torch.rand(k, generator=g) + 0.1
    mean = sum(x * (B @ A) for x, (A, B) in zip(w / w.sum(), pairs))
    U, S, Vh = torch.linalg.svd(mean)
    A, B = merge_lora(pairs, w.tolist())
    assert A.shape == (r, 9) and B.shape == (7, r)
    assert torch.allclose(B @ A, U[:, :r] * S[:r] @ Vh[:r], atol=1e-4)


def test_tie_splits_in_halves_in_task_order():
    left, made = cut(torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]), "l1")
    assert made.rule == "halves" and left.tolist() == [True, True, False, False]


@pytest.mark.parametrize("rows, words", [
    ([], "at least one layer"), ([torch.zeros(0)], "no empty rows"), ([torch.tensor([float("nan")]), torch.zeros(2)], "NaN or infinite"),
    ([torch.zeros(2), torch.zeros(2)], "have sizes"), ([torch.zeros(1)], "have sizes")])
def test_bad_rows_change_nothing(rows, words):
    tree = TaskTree()
    for k in range(3): tree.insert(k, [torch.full((1,), float(k)), torch.zeros(2)])
    before = tree.newick(), tree.tasks, tree.n_splits
    with pytest.raises(ValueError, match=words): tree.insert("bad", rows)
    assert (tree.newick(), tree.tasks, tree.n_splits) == before


def test_other_bad_input():
    tree = TaskTree()
    with pytest.raises(ValueError, match="empty tree"): tree.draw()
    tree.insert("a", [torch.zeros(1)])
    with pytest.raises(ValueError, match="already has"): tree.insert("a", [torch.zeros(1)])
    with pytest.raises(ValueError, match="no task 'b'"): tree.path("b")
    with pytest.raises(ValueError, match="at least 1"): TaskTree(depth=0)
    with pytest.raises(ValueError, match="known are"): TaskTree("median")
    assert tree.groups(0) == tree.groups(5) == [{"a"}] and tree.distance("a", "a") == 0


def test_newick_quotes_names():
    tree = TaskTree()
    for k, name in enumerate(("plain", "it's (odd)")): tree.insert(name, [torch.tensor([float(k)])])
    assert tree.newick() == "(plain,'it''s (odd)');"
    assert tree._repr_svg_().lstrip().startswith("<?xml")


def mirrored(tree, flips):
    "The same tree, some of its nodes with their sides exchanged, as another processor's rounding may have them."
    again = TaskTree.from_state(*tree.state())
    for node in again.root.walk():
        if next(flips): node.children = node.children[::-1]
    return again


def shown(tree):
    "What a tree prints and draws."
    places = {text.get_text(): text.xy for text in tree.draw().texts}
    return tree.newick(), repr(tree), tree.leaves(), [tree.groups(d) for d in range(5)], places


@settings(max_examples=10)
@given(histories(), st.randoms(use_true_random=False))
def test_what_is_shown_does_not_depend_on_sides(history, random):
    tree, left, _ = history
    if not left: return
    again = mirrored(tree, iter(lambda: random.random() < 0.5, None))
    assert shown(again) == shown(tree)
    assert [leaf[0] for leaf in tree.leaves()][0] == left[0]  # the earliest task comes first


@pytest.mark.parametrize("middle", [1e-6, -1e-6])
def test_the_last_bit_decides_no_string(middle):
    tree = TaskTree()
    for k, x in enumerate((middle, -3.0, 1.5, 1.5)): tree.insert(k, [torch.tensor([x])])
    sides = [child.tasks for child in tree.root.children]
    assert sides == ([[1], [0, 2, 3]] if middle < 0 else [[0, 2, 3], [1]])  # left and right do depend on it
    assert tree.newick() == "((0,2,3),1);" and tree.groups(1) == [{0, 2, 3}, {1}] and tree.leaves() == [[0, 2, 3], [1]]


@pytest.mark.parametrize("rule", RULES)
def test_states_keep_the_sides_that_were_cut(rule):
    g, tree = torch.Generator().manual_seed(0), TaskTree(rule)
    for k in range(12): tree.insert(k, torch.randn(4, 3, generator=g))
    again = mirrored(tree, itertools.repeat(True))
    plain, tensors = again.state()
    assert plain["nodes"] != tree.state()[0]["nodes"] and again.newick() == tree.newick()
    loaded = TaskTree.from_state(plain, tensors)
    assert [n.tasks for n in loaded.root.walk()] == [n.tasks for n in again.root.walk()]


def test_a_merged_entry_counts_from_its_earliest_task():
    tree = TaskTree(budget=2)
    for k, x in enumerate((0.0, 5.0, 0.1)): tree.insert(k, [torch.tensor([x])])
    assert tree.keys == [1, 0] and tree.newick() == "((0,2),1);" and tree.leaves() == [[0, 2], [1]]
