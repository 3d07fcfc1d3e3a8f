"Runs that are cut off and resumed, files that are damaged, disks that are full, and states of all kinds."
import errno
import json
import os
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from test_language import tiny_stream as text_stream
from test_learner import tiny_stream, tiny_vit

from treelora.engine import checkpoint
from treelora.algorithm import TreeLoRA
from treelora.bandit import SEARCHES
from treelora.engine.checkpoint import Checkpoints, check_writable
from treelora.engine.files import replace_file
from treelora.engine.packer import Packer
from treelora.cli import main
from treelora.learner import run
from treelora.methods import VisionMethod, get_method, list_methods
from treelora.methods.base import AdapterMethod

VISION = [m["name"] for m in list_methods() if "vision" in m["kinds"]]
LANGUAGE = [m["name"] for m in list_methods() if "language" in m["kinds"]]


class CutOff(Exception): pass


def cutting(name, kind, at):
    "A method's class that breaks off in stage `at[0]`: after step at[1], or, if that is None, in the evaluation; and the list of what was made."
    base, made = get_method(name, kind), []

    class Cut(base):
        fixed = (*base.fixed, "steps")

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.steps = 0
            made.append(self)

        def begin_task(self, tasks, *rest, **kwargs):
            super().begin_task(tasks, *rest, **kwargs)
            self.steps = 0

        def after_step(self):
            super().after_step()
            self.steps += 1
            if at and (self.task, self.steps) == at: raise CutOff

        def predictor(self, task):
            if at and at == (self.task, None): raise CutOff
            return super().predictor(task)
    return Cut, made


def learn(kind, name, folder=None, at=None, make=None, stream=None, **changes):
    "One run, cut off or not: its result and its method."
    method, made = cutting(name, kind, at)
    model, stream = (tiny_vit(), stream or tiny_stream()) if kind == "vision" else (make(), stream or text_stream())
    settings = dict(epochs=2, batch_size=8 if kind == "vision" else 4, lr=0.01, progress=False, curves=3, model=model)
    kept = {} if folder is None else dict(checkpoints=folder, checkpoint_every=2)
    return run(stream, method, **(settings | kept | changes)), made[0]


def assert_same(a, b):
    "Equal to the last bit: R, trees, curves, every weight, every stored adapter."
    (one, x), (two, y) = a, b
    assert np.array_equal(one.R, two.R, equal_nan=True) and one.trees == two.trees and one.curves == two.curves and one.extra == two.extra
    for p, q in zip(x.model.state_dict().values(), y.model.state_dict().values(), strict=True): assert torch.equal(p, q)
    for p, q in zip(tensors_in(x), tensors_in(y), strict=True): assert torch.equal(p, q)


def tensors_in(method):
    packer = Packer(method, method.model)
    packer.note_built({"method": method.state()})
    return list(packer.pack({"method": method.state()})[1].values())


@pytest.mark.parametrize("at", [(0, 1), (0, 3), (1, 1), (1, 5), (1, None)])
@pytest.mark.parametrize("name", VISION)
def test_resumed_vision_runs_are_the_same(name, at, tmp_path):
    if name == "joint" and at[0] == 0: pytest.skip("has one stage, whose last task is 1")
    if name == "lda" and at[1] is not None: pytest.skip("takes no steps that could be cut off")
    with pytest.raises(CutOff): learn("vision", name, tmp_path, at)
    assert_same(learn("vision", name), learn("vision", name, tmp_path, resume=True))


@pytest.mark.parametrize("name", LANGUAGE)
def test_resumed_language_runs_are_the_same(name, tiny_language, tmp_path):
    whole = learn("language", name, make=tiny_language)
    for at in ((1, 5), (2, None)) if name != "fix" else ((2, None),):
        with pytest.raises(CutOff): learn("language", name, tmp_path, at, tiny_language, resume=True)
    assert_same(whole, learn("language", name, tmp_path, None, tiny_language, resume=True))


def test_checkpoints_change_nothing_and_a_finished_run_is_not_run_again(tmp_path):
    assert_same(learn("vision", "treelora"), learn("vision", "treelora", tmp_path))
    again, method = learn("vision", "treelora", tmp_path, at=(0, 1), resume=True)
    assert np.array_equal(again.R, learn("vision", "treelora")[0].R, equal_nan=True) and again.seconds_by_phase["restarts"] == 1


@pytest.mark.parametrize("search", SEARCHES)
def test_every_search_goes_on_where_it_was(search, make_net):
    def rounds(tl, a, b):
        for i in range(a, b):
            g = torch.Generator().manual_seed(i)
            for p in tl.params: p.grad = torch.randn(p.shape, generator=g)
            tl.step()
            with torch.no_grad(): [p.sub_(0.01 * p.grad) for p in tl.params]

    def made():
        tl = TreeLoRA(make_net(), search=search)
        for k in range(5):
            with tl.task(f"t{k}"): rounds(tl, 10 * k, 10 * k + 4)
        return tl
    whole, cut, new = made(), made(), TreeLoRA(make_net(), search=search)
    with whole.task("new"): rounds(whole, 0, 12)
    with cut.task("new"):
        rounds(cut, 0, 7)
        plain, tensors = cut.state()
    new.restore(json.loads(json.dumps(plain)), tensors)
    with pytest.raises(ValueError, match="in the middle of task 'new'"), new.task("other"): pass
    with new.task("new"): rounds(new, 7, 12)
    assert torch.equal(new.live.read(), whole.live.read()) and all(torch.equal(a, b) for a, b in zip(new.last.picks, whole.last.picks, strict=True))
    assert torch.equal(new.bank.signatures, whole.bank.signatures) and new.tree.newick() == whole.tree.newick()


def test_a_restored_task_that_fails_goes_back_to_before_it(make_net):
    tl, new = TreeLoRA(make_net()), TreeLoRA(make_net())
    before = tl.live.read()
    with tl.task("a"):
        for p in tl.params: p.grad = torch.ones_like(p)
        tl.step()
        with torch.no_grad(): tl.params[0].add_(1)
        saved = tl.state()
        with pytest.raises(ValueError, match="is open"): tl.restore(*saved)
    new.restore(*saved)
    with pytest.raises(CutOff), new.task("a"): raise CutOff
    assert torch.equal(new.live.read(), before) and len(new.bank) == 0
    with pytest.raises(ValueError, match="other settings .*lam"): TreeLoRA(make_net(), lam=0.3).restore(*saved)


def test_language_checkpoints_are_adapters_for_plain_peft(tiny_language, tmp_path):
    from peft import PeftModel
    _, method = learn("language", "treelora", tmp_path, make=tiny_language)
    last = sorted(tmp_path.glob("checkpoint-*"))[-1]
    assert [p.name for p in sorted((last / "adapters").iterdir())] == ["001-task-0", "002-task-1", "003-task-2"]
    for k, folder in enumerate([*sorted((last / "adapters").iterdir()), last / "adapter"]):
        plain = PeftModel.from_pretrained(tiny_language()[0], folder)
        if k < 3: method.tl.load_adapter(f"task-{k}")
        for (n, p), (m, q) in zip(plain.named_parameters(), method.model.named_parameters(), strict=True): assert n == m and torch.equal(p, q)
    tree = TreeLoRA.load(last / "tree", method.model)
    assert tree.tree.newick() == method.tl.tree.newick() and torch.equal(tree.bank.adapters, method.tl.bank.adapters)
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} <= {".json", ".safetensors"}


@pytest.mark.parametrize("harm", ["cut", "flip", "remove", "empty", "index", "index flip", "folder"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(harm, tmp_path):
    whole = learn("vision", "treelora")
    with pytest.raises(CutOff): learn("vision", "treelora", tmp_path, (1, 5))
    older, latest = sorted(tmp_path.glob("checkpoint-*"))
    file = latest / ("checkpoint.json" if "index" in harm else "state.safetensors")
    data = file.read_bytes()
    if harm == "folder": shutil.rmtree(latest), latest.mkdir()
    elif harm == "remove": file.unlink()
    else:
        file.unlink()  # a hard link must not change the one before
        file.write_bytes({"cut": data[:-5], "index": data[:100], "empty": b""}.get(harm, data.replace(b'"done": 1', b'"done": 0') if "index" in harm else data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]))
    with pytest.warns(UserWarning, match=f"{latest.name}/{file.name if harm != 'folder' else 'checkpoint.json'} is .*going on from the one before, {older.name}"):
        resumed = learn("vision", "treelora", tmp_path, resume=True)
    assert_same(whole, resumed)


def test_when_no_checkpoint_is_whole(tmp_path):
    with pytest.raises(CutOff): learn("vision", "seqlora", tmp_path, (1, 5))
    for path in tmp_path.glob("checkpoint-*/still.safetensors"): path.write_bytes(b"")
    with pytest.raises(ValueError, match="No checkpoint in .* is whole: .*Delete the folder"): learn("vision", "seqlora", tmp_path, resume=True)


CHANGES = {"lr": (dict(lr=0.02), "learning rate: 0.01 there, 0.02 here"), "seed": (dict(seed=1), "seed: 0 there, 1 here"), "epochs": (dict(epochs=3), "epochs"),
           "batch": (dict(batch_size=4), "batch size"), "setting": (dict(lam=0.7), "settings"), "stream": (dict(stream=tiny_stream(classes=6)), "tasks"),
           "data": (dict(stream=tiny_stream(seed=3)), "data"), "method": (dict(name="seqlora"), "method"), "schedule": (dict(schedule="cosine"), "schedule")}


@pytest.mark.parametrize("change", CHANGES)
def test_checkpoints_of_another_run(change, tmp_path):
    with pytest.raises(CutOff): learn("vision", "treelora", tmp_path, (1, 3))
    changes, words = CHANGES[change]
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=f"belongs to another run .*{words}"): learn("vision", **({"name": "treelora"} | changes), folder=tmp_path, resume=True)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_checkpoints_of_another_model_or_format(tmp_path):
    with pytest.raises(CutOff): learn("vision", "treelora", tmp_path, (1, 3))
    other = tiny_vit()
    with torch.no_grad(): other.blocks[0].mlp.fc1.weight.mul_(1.01)
    with pytest.raises(ValueError, match="belongs to another run .*weights"): learn("vision", "treelora", tmp_path, resume=True, model=other)
    for path in tmp_path.glob("checkpoint-*/checkpoint.json"): path.write_text(path.read_text().replace('"format": 1', '"format": 2', 1))
    with pytest.raises(ValueError, match="of format 2, but this version reads format 1"): learn("vision", "treelora", tmp_path, resume=True)


def test_other_packages_are_a_warning(tmp_path):
    with pytest.raises(CutOff): learn("vision", "treelora", tmp_path, (1, 3))
    with patch("treelora.learning.keeper._version", lambda p: "9.9"), pytest.warns(UserWarning, match=r"written by .*now 9\.9.*last digits"): learn("vision", "treelora", tmp_path, resume=True)


def test_an_earlier_run_is_not_overwritten_by_mistake(tmp_path):
    with pytest.raises(CutOff): learn("vision", "treelora", tmp_path, (1, 3))
    with pytest.raises(ValueError, match="has checkpoints of an earlier run"): learn("vision", "treelora", tmp_path)
    with pytest.raises(ValueError, match="need a folder"): learn("vision", "treelora", resume=True)
    with pytest.raises(ValueError, match="checkpoint_every=0"): learn("vision", "treelora", tmp_path, resume=True, checkpoint_every=0)


def full_disk(allowed):
    "os.fsync fails, as on a full disk, after some calls."
    real, calls = os.fsync, iter(range(allowed))

    def fsync(handle):
        if next(calls, None) is None: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle)
    return patch("os.fsync", fsync)


@pytest.mark.parametrize("allowed", [0, 1, 17, 30, 43])
def test_full_disk(allowed, tmp_path):
    with full_disk(allowed), pytest.raises(OSError, match="No space left on device.*nothing of it was kept, and .* Make room"): learn("vision", "treelora", tmp_path)
    assert all(p.name.startswith("checkpoint-") for p in tmp_path.iterdir())
    assert_same(learn("vision", "treelora"), learn("vision", "treelora", tmp_path, resume=True))


def test_full_disk_when_the_result_is_written(tmp_path):
    result, _ = learn("vision", "seqlora")
    result.save(tmp_path / "r.json")
    before = (tmp_path / "r.json").read_bytes()
    with full_disk(0), pytest.raises(OSError, match="what was there before is untouched"): result.save(tmp_path / "r.json")
    assert (tmp_path / "r.json").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_folder_that_cannot_be_written_is_found_before_training(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("treelora.learner.run", lambda *a, **k: pytest.fail("training started"))
    assert main(["run", "--results", str(tmp_path / "file" / "results"), "--quiet"]) == 2
    assert "Nothing can be written into" in capsys.readouterr().err

    def read_only(*args, **kwargs): raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    with pytest.raises(OSError, match="Read-only file system.*make it writable"): check_writable(tmp_path)
    assert main(["run", "--results", str(tmp_path), "--quiet"]) == 2


def test_files_that_change_with_a_step_only_are_written(tmp_path):
    with pytest.raises(CutOff): learn("vision", "treelora", tmp_path, (1, 5))
    older, latest = sorted(tmp_path.glob("checkpoint-*"))
    assert (older / "tree" / "treelora.json").samefile(latest / "tree" / "treelora.json") and not (older / "state.safetensors").samefile(latest / "state.safetensors")


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    with pytest.raises(CutOff): learn("vision", "seqlora", tmp_path, (1, 5))
    for name in (".part-0001-0000006", ".old-checkpoint-0000-0000002"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.safetensors").write_bytes(b"half")
    learn("vision", "seqlora", tmp_path, resume=True)
    assert len(list(tmp_path.iterdir())) == checkpoint.KEEP


class Odd(AdapterMethod):
    "Keeps what cannot be written, from the second task on."
    name = "odd"

    def end_task(self, batches): self.iterator = iter(batches)


class Grown:
    def __init__(self, x): self.x = x


class Rich(AdapterMethod):
    "Memory of many kinds, that decides what is learned; a frozen weight that changes after all."
    name = "rich"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.memory, self.rng, self.np_rng, self.old = {}, torch.Generator().manual_seed(5), np.random.default_rng(3), []
        self.rule, self.twin = torch.relu, self.layout
        self.counts, self.lists, self.net = Counter(), defaultdict(list), torch.nn.Linear(2, 2)

    def after_backward(self, batch, loss):
        images, labels = batch
        key = (self.task, int(labels[0]))
        self.memory.setdefault(key, []).append(Grown(images[:1].clone()))
        noise = torch.randn(1, generator=self.rng).item() + self.np_rng.normal() + float(torch.rand(1)) + sum(g.x.sum().item() for g in self.memory[key])
        for p in self.parameters(): p.grad += 1e-3 * noise

    def end_task(self, batches):
        self.counts[self.task, "a"] += 2
        self.lists[self.task].append(torch.ones(2) * self.task)
        with torch.no_grad(): self.net.weight.add_(self.task)
        self.old.append((self.task, {p.shape for p in self.parameters()}, torch.stack([x.mean() for x, _ in batches])))
        self.model.blocks[0].mlp.fc1.bias.data += 0.1


@pytest.mark.parametrize("at", [(0, 3), (1, 1), (1, 5), (1, None)])
def test_methods_need_nothing_of_their_own(at, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("treelora.methods.base", fromlist=["x"]).METHODS, "rich", {"vision": Rich})
    with pytest.raises(CutOff): learn("vision", "rich", tmp_path, at)
    whole, resumed = learn("vision", "rich"), learn("vision", "rich", tmp_path, resume=True)
    assert_same(whole, resumed)
    assert [g.x.shape for g in resumed[1].memory[0, 0]] == [g.x.shape for g in whole[1].memory[0, 0]] and resumed[1].twin is resumed[1].layout
    assert resumed[1].counts == whole[1].counts and type(resumed[1].lists) is defaultdict and torch.equal(resumed[1].net.weight, whole[1].net.weight)


def test_what_cannot_be_written_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot hold the attribute iterator of Odd, a .*name it in the class's `fixed`"): run(tiny_stream(), Odd, model=tiny_vit(), epochs=1, progress=False, checkpoints=tmp_path)

    class Early(VisionMethod):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.file = (x for x in "ab")
    with pytest.raises(ValueError, match="attribute file of Early, a generator"): run(tiny_stream(), Early, model=tiny_vit(), epochs=1, progress=False, checkpoints=tmp_path)


def test_command_line(tmp_path, capsys):
    shell = lambda *more: main(["run", "--epochs", "1", "--quiet", "--results", str(tmp_path), *more])
    assert shell("--checkpoint-every", "7") == 0
    first = json.loads((tmp_path / "split-digits/quick/treelora-seed0.json").read_text())
    assert shell("--checkpoint-every", "7") == 2 and "--resume" in capsys.readouterr().err
    assert shell("--resume", "--checkpoint-every", "7") == 0
    again = json.loads((tmp_path / "split-digits/quick/treelora-seed0.json").read_text())
    assert again["R"] == first["R"] and again["trees"] == first["trees"] and again["seconds"]["restarts"] == 1
    assert Path(tmp_path / "checkpoints/split-digits/quick/treelora-seed0").is_dir()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
def test_changed_weights_are_seen_in_every_precision(dtype):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2, dtype=dtype), torch.nn.BatchNorm1d(2))
    before = checkpoint._marks(model)
    assert checkpoint._marks(model) == before
    model[0].weight.data[0, 0] += 1
    assert [n for n, mark in checkpoint._marks(model).items() if mark != before[n]] == ["0.weight"]
