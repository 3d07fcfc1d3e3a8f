"What makes it fast must not change what it computes: the search against a full computation, the bank's growth, many tasks at once."
import errno, hashlib, json, math, os, resource
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from treelora.engine import device
from treelora.engine.bank import Bank
from treelora.engine.device import Cache
from treelora.algorithm import TreeLoRA
from treelora.engine.fused import CompiledArithmetic, pull_group
from treelora.bandit import LCB, SearchTree, TreeLCB, get_search
from treelora.experiments.bench import Report, _adapters, bench_training, has_compiler, save_scale
from treelora.cli import main
from treelora.lora import lora_layers
from treelora.signature import Layout, Rows, groups
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


@pytest.mark.parametrize("n, kind", [(64, LCB), (65, TreeLCB)])
def test_a_search_by_name_takes_the_faster_way(n, kind):
    assert type(get_search("tree-lcb", random_tree(n), 3, c=0.2)) is kind


def test_tables_set_from_outside_and_earlier_rounds_are_noticed():
    tree, g = random_tree(20), torch.Generator().manual_seed(1)
    a, b = TreeLCB(tree, 2), TreeLCB(tree, 2)
    for t in range(1, 40): a.update(a.choose(t), torch.rand(2, generator=g).double())
    for k in ("counts", "means", "squares"): getattr(b, k).copy_(getattr(a, k))
    assert torch.equal(b.choose(40), a.choose(40))
    torch.testing.assert_close(b._kept, a._kept, rtol=1e-12, atol=1e-12)
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
        tl.live.groups = groups(tl.layout, numbers=numbers)
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


def train(tl, names, steps=4, seed=0):
    for k, name in enumerate(names):
        g = torch.Generator().manual_seed(seed + k)
        with tl.task(name):
            for _ in range(steps):
                for p in tl.params: p.grad = torch.randn(p.shape, generator=g)
                tl.step()
                with torch.no_grad():
                    for p in tl.params: p -= 0.1 * p.grad
    return tl


def equal(a, b):
    return (torch.equal(a.bank.adapters, b.bank.adapters) and torch.equal(a.bank.signatures, b.bank.signatures) and a.tree.newick() == b.tree.newick()
            and torch.equal(torch.stack(a.last.picks), torch.stack(b.last.picks)))


def mapped_from(x):
    "The file that a tensor's memory is a map of; empty for ordinary memory."
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(v, 16) for v in line.split()[0].split("-"))
        if start <= x.data_ptr() < end: return " ".join(line.split()[5:])


def own_memory():
    "Bytes of this process that are not pages of a file."
    return 1024 * int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")).split()[1])


linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at Linux's table of maps")


@pytest.mark.parametrize("budget, root", [(None, "input"), (None, "output"), (3, "input")])
def test_a_bank_in_files_gives_the_same_run(tmp_path, make_net, budget, root):
    names = [f"task {k}" for k in range(7)]
    plain, filed = (train(TreeLoRA(make_net(), budget=budget, root=root, bank_folder=folder), names) for folder in (None, tmp_path))
    assert equal(plain, filed) and not list(tmp_path.iterdir())
    filed.save(tmp_path / "s")
    for folder in (None, tmp_path):
        again = train(TreeLoRA.load(tmp_path / "s", make_net(), bank_folder=folder), ["new", "newer"], seed=50)
        assert equal(again, train(TreeLoRA.load(tmp_path / "s", make_net()), ["new", "newer"], seed=50))
    assert equal(again, train(plain, ["new", "newer"], seed=50))


@linux
def test_a_loaded_bank_is_read_when_it_is_looked_at_and_copied_when_it_grows(tmp_path):
    tl = TreeLoRA(_adapters(8, 16384))
    for k in range(16): tl.bank.add(f"task {k}", torch.randn(8, 16384), torch.randn(8, 16384))
    tl.tree.extend(tl.bank.names, [[row[:2] for row in s] for s in tl.bank.signatures])
    tl.save(tmp_path)
    size, wanted = tl.bank.stored_bytes, tl.bank.adapters[3].clone()  # 16 MiB
    model = _adapters(8, 16384)
    model.load_state_dict(tl.model.state_dict())
    before = own_memory()
    again = TreeLoRA.load(tmp_path, model)
    assert own_memory() - before < size / 4
    file = next(tmp_path.glob("bank-*.safetensors"))
    assert {mapped_from(x) for x in (again.bank.adapters, again.bank.signatures)} == {str(file)}
    assert torch.equal(again.bank.adapter("task 3"), wanted)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    again.bank.merge("task 0", "task 1")  # on write, a map is copied
    for name in ("in the merged one's room", "in new room"): again.bank.add(name, torch.ones(8, 16384), torch.ones(8, 16384))
    assert not mapped_from(again.bank.adapters).startswith("/") and hashlib.sha256(file.read_bytes()).hexdigest() == digest


@linux
def test_a_bank_in_files_takes_no_memory_of_its_own(tmp_path):
    bank, rows = Bank(Layout(lora_layers(_adapters(4, 16384))), tmp_path), torch.randn(4, 16384)
    before = own_memory()
    for k in range(40): bank.add(f"task {k}", rows, rows)
    assert own_memory() - before < bank.stored_bytes / 4 and "deleted" in mapped_from(bank.adapters)
    assert (bank.adapters == rows).all()


def test_a_full_disk_is_an_error_and_the_bank_stays(tmp_path, make_net):
    tl = train(TreeLoRA(make_net(), bank_folder=tmp_path), "abcd")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * 4 * tl.layout.n_layers * tl.layout.width, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot be kept in .* choose another bank_folder"): train(tl, "e", seed=4)
        with pytest.raises(OSError, match="could not be written .* choose another folder"): tl.save(tmp_path / "s")
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert tl.bank.names == list("abcd") and tl.tree.tasks == list("abcd") and not list(tmp_path.rglob("*.*"))
    assert equal(train(tl, "e", seed=4), train(train(TreeLoRA(make_net()), "abcd"), "e", seed=4))


def test_a_disk_without_room_for_pages_is_an_error(tmp_path, make_net, monkeypatch):
    tl = train(TreeLoRA(make_net(), bank_folder=tmp_path), "ab")
    def full(data): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    file = tl.bank._blocks["signatures"].file
    monkeypatch.setattr(tl.bank._blocks["signatures"], "file", type("Full", (), {"seek": file.seek, "write": staticmethod(full)}))
    with pytest.raises(OSError, match="No space left"): train(tl, "c", seed=2)
    monkeypatch.undo()
    assert equal(train(tl, "c", seed=2), train(train(TreeLoRA(make_net()), "ab"), "c", seed=2))


def test_a_folder_that_cannot_be_written(tmp_path, make_net):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot be kept in .*file"): TreeLoRA(make_net(), bank_folder=tmp_path / "file")
    with pytest.raises(OSError, match="could not be written"): train(TreeLoRA(make_net()), "a").save(tmp_path / "file" / "s")
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_signature_that_the_tree_refuses_leaves_the_bank_alone(make_net):
    tl = train(TreeLoRA(make_net()), "ab")
    with pytest.raises(ValueError, match="NaN or infinite"), tl.task("c"):
        for p in tl.params: p.grad = torch.zeros_like(p)
        tl.step()
        tl._now.signature.total.matrix[0, 0] = math.inf
    assert tl.bank.names == tl.tree.tasks == list("ab") and len(tl.bank.adapters) == 2


def test_a_cache_of_rows_is_least_recently_used_and_changes_nothing(make_net):
    bank, g = Bank(Layout(lora_layers(make_net()))), torch.Generator().manual_seed(0)
    for k in range(9): bank.add(f"task {k}", torch.randn(2, 28, generator=g), torch.randn(2, 28, generator=g))
    cache, out, used = Cache(bank.layout, 3, "cpu"), torch.empty(2, 28), [[], []]
    for _ in range(200):
        arms = torch.randint(0, 9, (2,), generator=g)
        rows = bank.rows_of(arms)
        here = [row in held for row, held in zip(rows.tolist(), cache.held.tolist())]
        assert here == [k in order[-3:] for k, order in zip(arms.tolist(), used)]
        assert torch.equal(cache.fetch(bank, rows, slice(0, 2), out), bank.gather(bank.adapters, arms, torch.empty(2, 28)))
        used = [[x for x in order if x != k] + [k] for k, order in zip(arms.tolist(), used)]


@pytest.mark.parametrize("options", [{}, {"budget": 3}, {"penalty": "prox"}, {"signal": "fresh"}, {"signal": "loss", "init": "branch", "penalty": "prox"}])
def test_runs_with_a_cache_are_equal(make_net, options):
    def run(cache):
        tl = TreeLoRA(make_net(), lam=0.1, cache=cache, **options)
        for name in "abcdef":
            g, opt = torch.Generator().manual_seed(ord(name)), torch.optim.SGD(tl.params, 0.1)
            with tl.task(name):
                for _ in range(12):
                    x, y = torch.randn(8, 6, generator=g), torch.randint(0, 2, (8,), generator=g)
                    loss = lambda: cross_entropy(tl.model(x), y)
                    loss().backward(), tl.step(loss), opt.step(), opt.zero_grad()
        return tl
    plain = run(0)
    assert plain.live.cache is None and all(equal(plain, run(cache)) for cache in (1, 2, 7))


ON_THE_HOST = {"model", "params", "layout", "bank", "tree", "stats", "initial", "before", "picks", "arms", "scale", "search", "last", "device"}


def on_the_device(x, found=None):
    "Bytes of all tensors that can be reached from a value, less the model's and those that live on the host by design."
    found = {} if found is None else found
    if isinstance(x, torch.Tensor): found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    elif isinstance(x, dict): [on_the_device(v, found) for v in x.values()]
    elif isinstance(x, (list, tuple)): [on_the_device(v, found) for v in x]
    elif type(x).__module__.startswith("treelora."): on_the_device({k: v for k, v in vars(x).items() if k not in ON_THE_HOST}, found)
    return sum(found.values())


@pytest.mark.parametrize("form", ["paper", "branch"])
def test_device_memory_is_below_three_adapters_however_many_tasks(form):
    def most(n_tasks):
        tl, seen = TreeLoRA.variant(form, _adapters(16, 16384), cache=1), []
        adapter = sum(p.numel() * p.element_size() for p in tl.params)
        for k in range(n_tasks): tl.bank.add(f"task {k}", torch.randn(16, 16384), torch.randn(16, 16384))
        tl.tree.extend(tl.bank.names, [[row[:2] for row in s] for s in tl.bank.signatures])
        train_one = lambda i: (seen.append(on_the_device(tl) / adapter), sum(p.square().sum() for p in tl.params) * 1e-3 * (1 + i))[1]
        tl._tree_rows = lambda signature: [row[:2] for row in signature]
        for name in ("first", "second"):
            with tl.task(name):
                opt = torch.optim.SGD(tl.params, 0.1)
                while form == "branch" and tl.look(train_one): pass
                for i in range(4): train_one(i).backward(), tl.step(), opt.step(), opt.zero_grad(), seen.append(on_the_device(tl) / adapter)
        return max(seen)
    few, many = most(2), most(40)
    assert 2 <= few == many < 3


def test_a_cache_that_does_not_fit_is_left_out_and_said(make_net, monkeypatch):
    plain = train(TreeLoRA(make_net()), "abc")
    monkeypatch.setattr(device, "_free_memory", lambda device: 100)
    with pytest.warns(UserWarning, match="cache of 2 adapters .* does not fit .* without one"): small = train(TreeLoRA(make_net(), cache=2), "abc")
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="does not fit"): huge = train(TreeLoRA(make_net(), cache=10 ** 12), "abc")
    assert equal(plain, small) and equal(plain, huge) and small.live.cache is huge.live.cache is None


@pytest.mark.parametrize("kwargs, words", [({"cache": 0.5}, "cache=0.5 must be a whole number"), ({"cache": -1}, "cache=-1"), ({"budget": 0}, "budget=0 must be at least 1")])
def test_sizes_below_one_adapter_are_refused(make_net, kwargs, words):
    with pytest.raises(ValueError, match=words): TreeLoRA(make_net(), **kwargs)


@pytest.mark.parametrize("options", [{}, {"relative": True}, {"penalty": "prox"}, {"penalty": "dot"}, {"signature": "update"}, {"signature": "weight"}, {"top_fraction": 0.5},
                                     {"signal": "loss", "init": "branch", "penalty": "prox"}, {"signal": "fresh"}])
def test_adapters_in_bfloat16_train_and_come_back(tmp_path, make_net, options):
    tl = TreeLoRA(make_net().bfloat16(), lam=0.1, **options)
    for name in "abc":
        g, opt = torch.Generator().manual_seed(ord(name)), torch.optim.SGD(tl.params, 0.1)
        with tl.task(name):
            for _ in range(8):
                x, y = torch.randn(8, 6, generator=g).bfloat16(), torch.randint(0, 2, (8,), generator=g)
                loss = lambda: cross_entropy(tl.model(x), y)
                value = loss()
                value.backward(), tl.step(value.detach() if tl.penalty == "dot" else loss), opt.step(), opt.zero_grad()
    assert tl.bank.adapters.dtype == tl.bank.signatures.dtype == torch.float32 and tl.params[0].dtype == torch.bfloat16
    assert torch.equal(tl.bank.adapter("c"), tl.live.read())
    tl.save(tmp_path)
    again = TreeLoRA.load(tmp_path, make_net(seed=5).bfloat16(), base_changed="allow")
    assert all(torch.equal(p, q) for p, q in zip(again.params, tl.params)) and torch.equal(again.bank.signatures, tl.bank.signatures)


def test_the_pull_on_bfloat16_has_float32s_direction(make_net):
    def pull(dtype):
        tl = TreeLoRA(make_net().to(dtype), lam=0.5)
        g = torch.Generator().manual_seed(0)
        for name in "ab":
            with tl.task(name):
                for p in tl.params: p.data = torch.randn(p.shape, generator=g).bfloat16().to(dtype)
                for p in tl.params: p.grad = torch.randn(p.shape, generator=g).bfloat16().to(dtype)
                tl.step()
        with tl.task("c"):
            for p in tl.params: p.data, p.grad = torch.randn(p.shape, generator=g).bfloat16().to(dtype), torch.zeros_like(p)
            tl.step()
            return torch.cat([p.grad.flatten() for p in tl.params]).float(), tl._now.arms
    (a, arms), (b, same) = pull(torch.float32), pull(torch.bfloat16)
    assert torch.equal(a, b) and torch.equal(arms, same) and a.abs().unique().tolist() == [0.5]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("options", [{}, {"signal": "loss", "init": "branch", "penalty": "prox"}])
def test_a_compiled_model_trains_alike(make_net, backend, options):
    def run(compiled):
        tl = TreeLoRA(make_net(), lam=0.1, **options)
        model = torch.compile(tl.model, backend=backend, fullgraph=True) if compiled else tl.model
        for name in "abc":
            g, opt = torch.Generator().manual_seed(ord(name)), torch.optim.Adam(tl.params, 0.02)
            with tl.task(name):
                for _ in range(8):
                    x, y = torch.randn(8, 6, generator=g), torch.randint(0, 2, (8,), generator=g)
                    loss = lambda: cross_entropy(model(x), y)
                    loss().backward(), tl.step(loss), opt.step(), opt.zero_grad()
        return tl
    plain, compiled = run(False), run(True)
    assert torch.allclose(plain.bank.adapters, compiled.bank.adapters, atol=1e-5) and plain.tree.newick() == compiled.tree.newick()


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler and Python's headers")])])
@pytest.mark.parametrize("options", [{}, {"relative": True, "lam": 0.5}, {"signature": "weight", "cache": 2}, {"search": "sweep"}])
def test_a_compiled_step_is_the_same_step(tmp_path, make_net, monkeypatch, backend, options):
    if backend == "inductor" and options not in ({}, {"signature": "weight", "cache": 2}): pytest.skip("two of them are enough to compile")
    torch._dynamo.reset()
    plain = train(TreeLoRA(make_net(), **{"lam": 0.1} | options), "abcd")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    compiled = train(TreeLoRA(make_net(), compile=True, **{"lam": 0.1} | options), "abcd")
    assert torch.allclose(plain.bank.adapters, compiled.bank.adapters, atol=1e-6) and plain.tree.newick() == compiled.tree.newick()
    assert torch.equal(torch.stack(plain.last.picks), torch.stack(compiled.last.picks)) and "compile" not in compiled.config
    compiled.save(tmp_path)
    again = TreeLoRA.load(tmp_path, make_net(), compile=True)
    assert isinstance(again.arithmetic, CompiledArithmetic) and equal(train(compiled, "ef"), train(again, "ef"))


def test_a_step_without_a_compiler_says_so_and_changes_nothing(make_net, monkeypatch):
    def broken(graph, inputs): raise OSError("no compiler here")
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    tl = TreeLoRA(make_net(), compile=True)
    def backward(): tl.model(torch.ones(3, 6)).square().sum().backward()
    with tl.task("a"): backward(), tl.step()
    with pytest.raises(RuntimeError, match="compile=True needs a compiler"), tl.task("b"):
        before = [p.grad.clone() for p in tl.params]
        try: tl.step()
        finally: assert tl._now.round == 0 and all(torch.equal(p.grad, g) for p, g in zip(tl.params, before))
    assert tl.bank.names == ["a"]


def test_the_arithmetic_of_a_step_is_one_graph(make_net):
    layout, g = Layout(lora_layers(make_net())), torch.Generator().manual_seed(0)
    grads, values = ([torch.randn(p.shape, generator=g) for p in layout.params] for _ in range(2))
    def arithmetic(total, rows, scratch, views, grads, values):
        torch._foreach_add_(total.views, grads)
        away = torch.sub(total.matrix, rows, alpha=3, out=scratch).abs_().sum(1) / 3
        scratch.copy_(rows)
        pull_group(grads, values, scratch, views, 0.1, None)
        return away
    def run(f):
        total, rows = Rows(layout), torch.randn(2, 28, generator=torch.Generator().manual_seed(1))
        (group,), own = groups(layout), [x.clone() for x in grads]
        return f(total, rows, group.scratch, group.views, own, values), total.matrix, own
    plain, compiled = run(arithmetic), run(torch.compile(arithmetic, backend="eager", fullgraph=True))
    assert torch.equal(plain[0], compiled[0]) and torch.equal(plain[1], compiled[1]) and all(map(torch.equal, plain[2], compiled[2]))


def test_bench_scale_writes_its_files_and_reports_come_back(tmp_path, capsys):
    assert main(["bench", "scale", "--quick", "--out", str(tmp_path), "--figures", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "scale.json").read_text())
    assert [s["tasks"] for s in found["steps"]] == [8, 32] and found["growth"] > 0 and "<svg" in (tmp_path / "scale.svg").read_text()
    drawn = [(tmp_path / f"scale.{kind}").read_bytes() for kind in ("svg", "png")]
    assert [p.read_bytes() for p in save_scale(tmp_path / "scale.json", tmp_path / "again")] == drawn  # the same results, the same files
    report = Report(found["steps"], found["searches"], [], 1.0, 2.0, 3.0, {"device": "here"})
    report.save(tmp_path / "bench.json")
    assert str(Report.load(tmp_path / "bench.json")) == str(report) and "peak memory of the process 3 MB" in str(report)
    with pytest.raises(FileNotFoundError, match="measure it with"): Report.load(tmp_path / "other.json")
    with pytest.raises(ValueError, match="another version"): Report.load(tmp_path / "scale.json")


def test_steps_with_and_without_alternate_and_leave_no_trace(make_net):
    net, calls = make_net(), []
    found = bench_training(net, lambda: (calls.append(1), net(torch.ones(3, 6)).square().sum())[1], pairs=6)
    assert len(calls) == 2 + 2 + 12 and found["pairs"] == 6 and 0 < found["share"] and found["step_ms"] < found["treelora_ms"]
