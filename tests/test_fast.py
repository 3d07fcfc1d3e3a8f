"What makes it fast must not change what it computes: the search against a full computation, the bank's growth, many tasks at once."
import math

import pytest
import torch

from treelora.algorithm import Bank, TreeLoRA
from treelora.bandit import LCB, TreeLCB, SearchTree
from treelora.lora import lora_layers
from treelora.signature import Layout, groups
from treelora.tree import TaskTree


def random_tree(n, seed=0):
    tree = TaskTree()
    tree.extend(range(n), torch.randn(n, 8, 3, generator=torch.Generator().manual_seed(seed)))
    return tree


@pytest.mark.parametrize("n, c, delta", [(1, 1.0, 1.0), (13, 1.0, 1.0), (13, 0.05, 1.0), (200, 0.2, 0.3), (50, 0.1, math.inf)])
def test_lines_choose_as_a_full_computation(n, c, delta):
    L, g, tree = 3, torch.Generator().manual_seed(n), random_tree(n)
    fast, full = TreeLCB(tree, L, c=c, delta=delta), LCB(tree, L, c=c, delta=delta)
    level, largest = torch.rand(L, n, generator=g).double(), torch.full((L,), 1e-3).double()
    for t in range(1, 200):
        arms = fast.choose(t)
        assert torch.equal(arms, full.choose(t))
        losses = (level.gather(1, arms[:, None])[:, 0] + 0.1 * torch.randn(L, generator=g)).clamp(0)
        old, largest = largest, torch.maximum(largest, losses)
        for search in (fast, full):
            search.rescale(old / largest)
            search.update(arms, losses / largest)


def test_tables_set_from_outside_and_earlier_rounds_are_noticed():
    tree, g = random_tree(20), torch.Generator().manual_seed(1)
    a, b = TreeLCB(tree, 2), TreeLCB(tree, 2)
    for t in range(1, 40): a.update(a.choose(t), torch.rand(2, generator=g).double())
    for k in ("counts", "means", "squares"): getattr(b, k).copy_(getattr(a, k))
    assert torch.equal(b.choose(40), a.choose(40)) and torch.equal(b._kept, a._kept)
    assert torch.equal(a.choose(5), LCB.choose(a, 5))


def test_search_tree_of_many_tasks_reaches_each_arm():
    nodes = SearchTree(random_tree(3000))
    assert torch.equal(nodes.arm[nodes.leaves], torch.arange(3000)) and nodes.n_nodes == 5999
    for k in range(0, 3000, 500):
        path = [i for i in nodes.paths[k].tolist() if i < nodes.n_nodes]
        assert path[0] == 0 and path[-1] == nodes.leaves[k]
        assert all(b in (nodes.left[a], nodes.right[a]) for a, b in zip(path, path[1:]))


def test_extend_then_insert_touches_one_path_only():
    tree = random_tree(400)
    before, splits = {id(n) for n in tree.root.walk()}, tree.n_splits
    tree.insert("new", torch.randn(8, 3, generator=torch.Generator().manual_seed(9)))
    assert "new" in tree.root.tasks and tree.n_splits - splits < 100
    assert len({id(n) for n in tree.root.walk()} - before) < 100
    with pytest.raises(ValueError, match="already has"): tree.extend(["x", "x"], torch.randn(2, 8, 3))
    with pytest.raises(ValueError, match="does not merge"): TaskTree(budget=2).extend([0], torch.randn(1, 2, 2))
    assert len(tree) == 401


def test_bank_grows_without_copying_itself_for_each_task(make_net):
    bank, kept = Bank(Layout(lora_layers(make_net()))), []
    places = set()
    for k in range(40):
        kept.append(torch.randn(bank.layout.n_layers, bank.layout.width))
        bank.add(f"task {k}", kept[-1], 2 * kept[-1])
        places.add(bank.adapters.data_ptr())
    assert len(places) <= 5 and torch.equal(bank.signatures, torch.stack(kept)) and torch.equal(bank.adapters, 2 * torch.stack(kept))
    bank.merge("task 3", "task 5")
    assert torch.equal(bank.signatures[5], kept[6]) and torch.equal(bank.signatures[3], (kept[3] + kept[5]) / 2) and len(bank.adapters) == 39


def test_groups_of_any_size_give_the_same_step(make_net):
    def run(numbers):
        tl = TreeLoRA(make_net(), lam=0.1)
        tl._groups = groups(tl.layout, numbers=numbers)
        g = torch.Generator().manual_seed(0)
        for k in range(3):
            with tl.task(str(k)):
                for _ in range(5):
                    for p in tl.params: p.grad = torch.randn(p.shape, generator=g)
                    tl.step()
                    with torch.no_grad():
                        for p in tl.params: p -= 0.1 * p.grad
        return tl.bank.adapters, torch.stack(tl.last.picks)
    for a, b in zip(run(1), run(10 ** 6)): assert torch.equal(a, b)
