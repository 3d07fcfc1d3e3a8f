"What a task's end costs, and what is kept of tasks that are over: one rule for all methods."
import json

import pytest
import torch
from accelerate import Accelerator
from test_language import tiny_stream as text_stream
from test_learner import tiny_stream, tiny_vit
from torch import nn

from treelora.engine.bank import Bank
from treelora.experiments.training_time import time_rows
from treelora.learner import run
from treelora.metrics import task_seconds, time_ratio, training_seconds
from treelora.methods import get_method
from treelora.methods.base import METHODS, classes_of, drawn
from treelora.paper.tables import UNCOUNTED, parts_table, timed

VISION = [name for name, kinds in METHODS.items() if "vision" in kinds]
TEXT = [name for name, kinds in METHODS.items() if "language" in kinds]

# Attributes that hold nothing of earlier tasks, by the class that has them.
APART = {
    "AdapterMethod": {"layout"},  # of the model's own parameters
    "AdaptedText": {"layout", "initial", "collate"},  # and the adapter before the first task; a tokenizer
    "TreeLoRA": {"layout", "initial", "params", "live", "arithmetic", "seen", "pull",  # the same; room where the running step is computed
                 "last"},  # the course of the task that ran last: its rounds and their arms
    "WithDirections": {"before"}, "Measured": {"before", "importance"}, "SAPT": {"start"},  # of the running step or task
    "Blocks": {"earlier"},  # blocks of the bank once more, on the device, for the running task
    "FIX": {"cut"},  # a tokenizer
    "VisionMethod": {"recall"},  # features of test batches, so that measuring is quicker; nothing of earlier tasks
    "Store": {"layout", "model"}, "Router": {"model", "_ready"}}  # and what it computes again from the statistics


def tensors_of(x, found, met):
    "All tensors that can be reached from an object, by storage, but for modules of the model and what is named apart."
    if id(x) in met: return
    met[id(x)] = x  # kept alive, so that no id comes twice
    if isinstance(x, torch.Tensor):
        at = x.untyped_storage().data_ptr()
        found[at] = max(found.get(at, 0), x.numel() * x.element_size())
    elif isinstance(x, (list, tuple, set, dict)):
        for v in x.values() if isinstance(x, dict) else x: tensors_of(v, found, met)
    elif hasattr(x, "__dict__") and not isinstance(x, type): tensors_of(parts_of(x), found, met)


def parts_of(x):
    "An object's attributes, without those that are named apart."
    if isinstance(x, Bank): return [x.adapters, x.signatures]  # not the room that no task has taken yet
    apart = set().union(*(APART.get(c.__name__, ()) for c in type(x).__mro__))
    return [v for k, v in vars(x).items() if k not in apart]


def kept_bytes(method):
    "Bytes of all tensors that a method reaches, without the model's, but for what it has put there to keep."
    inside = list(method.prompts.parameters()) if hasattr(method, "prompts") else []
    if method.name == "osf": inside = [b for n, b in method.model.named_buffers() if "_osf_" in n]  # directions that no task may change
    if method.name == "tasl": inside = method.layout.params  # its one adapter mixes all tasks, and is the model's
    mine = {id(p) for p in inside}
    own = {p.untyped_storage().data_ptr() for p in method.model.parameters() if id(p) not in mine}
    found, met = {}, {id(m): m for m in method.model.modules()}
    tensors_of(inside + parts_of(method), found, met)
    return sum(size for storage, size in found.items() if storage not in own)


def learned(name, kind, stream, model, **settings):
    "The method after a run, and its result."
    made = []
    class Kept(get_method(name, kind)):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)
    result = run(stream, Kept, model=model, progress=False, **({"epochs": 1, "batch_size": 4, "lr": 0.01} | settings))
    return made[0], result


def check_counted(method):
    "What is declared is what there is, but for some small counts."
    kept, said = kept_bytes(method), method.stored_bytes
    assert said == pytest.approx(kept, rel=0.03, abs=16), (method.stored(), kept)


@pytest.mark.parametrize("name", VISION)
def test_all_that_is_kept_counts(name):
    method, _ = learned(name, "vision", tiny_stream(), tiny_vit())
    check_counted(method)


@pytest.mark.parametrize("name", [n for n in TEXT if n != "fix"])  # keeps texts, not tensors
def test_all_that_is_kept_of_texts_counts(name, tiny_language):
    method, _ = learned(name, "language", text_stream(2), tiny_language())
    check_counted(method)


def test_texts_that_are_kept_count(tiny_language):
    method, _ = learned("fix", "language", text_stream(2), tiny_language())
    assert method.stored() == {"examples": sum(len((e.prompt + e.answer).encode()) for own in method.examples.values() for e in own)}


def test_statistics_are_kept_once():
    branch, _ = learned("treelora-branch", "vision", tiny_stream(), tiny_vit())
    assert branch.parts.identity.stats.means and not branch.tl.stats.means and "feature statistics" not in branch.stored()
    moments, directions = 8 * (16 * 16 + 4 * 16), sum(4 * axes.numel() + 8 for axes in branch.parts.identity.axes.values())
    assert branch.stored()["class moments"] == 2 * moments + directions > 2 * moments
    plain, _ = learned("treelora", "vision", tiny_stream(), tiny_vit())  # never asks for a task's identity
    assert not plain.parts.identity.stats.means and "feature statistics" not in plain.stored()


@pytest.mark.parametrize("name, passes", [("seqlora-tap", 1), ("treelora", 1), ("hidelora", 2), ("treelora-branch", 2), ("inflora-ca", 2)])
def test_each_feature_is_computed_once(name, passes):
    seen = []
    class Counted(get_method(name, "vision")):
        def end_task(self, batches):
            hook = self.model.blocks[0].register_forward_hook(lambda block, args, out: seen.append(len(out)))
            super().end_task(batches)
            hook.remove()
    run(tiny_stream(), Counted, model=tiny_vit(), epochs=1, batch_size=8, lr=0.01, progress=False, per_class=5)
    assert sum(seen) == passes * 2 * 2 * 5  # two tasks of two classes


def test_text_features_come_from_some_examples(tiny_language):
    for name, stats in (("hidelora", lambda m: m.stats), ("treelora-branch", lambda m: m.tl.stats), ("treelora-routed", lambda m: m.tl.stats)):
        for n, found in ((5, 5), (100, 12), (None, 12)):
            method, result = learned(name, "language", text_stream(2), tiny_language(), per_task=n)
            assert list(stats(method).counts.values()) == [found, found] and result.config["method_config"]["per_task"] == n
    with pytest.raises(ValueError, match="per_task=0 examples tell nothing"): learned("hidelora", "language", text_stream(2), tiny_language(), per_task=0)


def test_methods_draw_alike(tiny_language):
    methods = [learned(name, "language", text_stream(2), tiny_language(), per_task=5)[0] for name in ("hidelora", "treelora-routed")]
    first, second = methods[0].stats, methods[1].tl.stats
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(first.means.values(), second.means.values()))


def rows(batches): return torch.cat([x for x, _ in batches])


def test_drawn():
    stream = tiny_stream()
    loaders = [stream.loader([0, 1], "train", 5, seed=seed) for seed in range(3)]
    a, b, placed = (drawn(x, 3, 7, classes_of) for x in (*loaders[:2], Accelerator(cpu=True).prepare(loaders[2])))
    assert torch.equal(rows(a), rows(b)) and torch.equal(rows(a), rows(placed)) and torch.equal(rows(a), rows(a))
    assert torch.cat([y for _, y in a]).bincount().tolist() == [3, 3, 3, 3] and max(len(y) for _, y in a) == 5
    assert not torch.equal(rows(a), rows(drawn(loaders[0], 3, 8, classes_of)))
    assert len(rows(drawn(loaders[0], 3))) == 3 and len(rows(drawn(loaders[0], 100, 0, classes_of))) == 48
    assert drawn(loaders[0], None) is loaders[0] and drawn([1, 2], 3) == [1, 2]
    with pytest.raises(ValueError, match="per_group=0 examples tell nothing"): drawn(loaders[0], 0)
    with pytest.raises(ValueError, match="per_class=0"): run(stream, "hideprompt", model=tiny_vit(), progress=False, per_class=0)


def test_a_draw_moves_no_generator():
    loader = tiny_stream().loader(0, "train", 5, seed=0)
    before, own = torch.get_rng_state(), loader.generator.get_state()
    rows(drawn(loader, 3, 7, classes_of))
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(loader.generator.get_state(), own)


def test_draws_are_the_same_with_activations(monkeypatch):
    both = [learned("hidelora", "vision", tiny_stream(), tiny_vit(), per_class=3, place="last", blocks=2, ahead=on)[0] for on in (False, True)]
    first, second = (m.parts.identity.stats for m in both)
    assert first.counts == second.counts == dict.fromkeys(range(4), 3)
    assert all(torch.allclose(a, second.means[c], atol=1e-4) for c, a in first.means.items())


def test_the_end_of_a_task_is_training_time():
    result = run(tiny_stream(), "hidelora", model=tiny_vit(), epochs=1, batch_size=8, lr=0.01, progress=False)
    phases = result.seconds_by_phase
    assert phases["end_of_task"] > 0 and result.seconds == phases["train"] + phases["end_of_task"]
    assert len(phases["end_per_task"]) == 2 and sum(phases["end_per_task"]) == pytest.approx(phases["end_of_task"])
    assert sum(task_seconds(phases)) == pytest.approx(result.seconds, abs=0.05 * result.seconds + 0.05)
    assert training_seconds(result.as_dict()["seconds"]) == result.seconds
    assert training_seconds({"train": 2.0}) == 2.0  # files that hold the steps alone


def test_task_seconds_of_old_and_new_files():
    assert task_seconds({"per_task": [1.0, 2.0]}) == [1.0, 2.0] and task_seconds({"per_task": [1.0, 2.0], "end_per_task": [0.5, 0.25]}) == [1.5, 2.25]
    old, new = {"train": 4.0}, {"train": 2.0, "end_of_task": 1.0}
    assert time_ratio(old, new) == 2.0 and time_ratio(new, new) == 1.0 and time_ratio({"train": 5.0, "end_of_task": 1.0}, new) == 2.0


def test_tables_count_the_ends(tmp_path):
    for name, seconds, stored in (("seqlora", {"train": 3.0, "end_of_task": 0.0}, {}), ("hidelora", {"train": 3.0, "end_of_task": 1.5}, {}), ("treelora", {"train": 2.0}, {"signatures": 8})):
        saved = {"format": 1, "config": {"method": name, "seed": 0, "kind": "vision"}, "tasks": ["a"], "R": [[0.5]], "scores": {"op": 0.5, "bwt": 0.0}, "seconds": seconds,
                 "memory": {"stored_bytes": 8, "stored": stored}, "device": "none", "sha256": {"data": "0" * 64}}
        path = tmp_path / "split-digits" / "quick" / f"{name}-seed0.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(saved))
    parts = parts_table(tmp_path)
    column = parts.head.index("time s")
    assert {r[0]: r[column] for r in parts.rows} == {"seqlora": "3.00", "hidelora": "4.50", "treelora": "2.00"} and UNCOUNTED in parts.note


def test_times_of_steps_are_not_mixed_with_whole_ones():
    rows = [{"method": m, "savings": [], "seed": 0, "op": 0.9, "steps": [5], "train": t} | end
            for m, t, end in (("hidelora", 4.0, {"end_of_task": 2.0}), ("treelora", 2.0, {"end_of_task": 1.0}), ("treelora-branch", 2.0, {}))]
    _, tree, branch = time_rows({"rows": rows}, [("hidelora", ())])
    assert tree[("hidelora", ())]["ratio"] == 2.0 and tree["train"] == 3.0
    assert branch[("hidelora", ())]["ratio"] == 2.0 and timed(rows) and not timed(rows[:2])


def test_a_run_that_goes_on_counts_the_ends(tmp_path):
    settings = dict(model=tiny_vit(), epochs=1, batch_size=8, lr=0.01, progress=False, checkpoints=tmp_path)
    first = run(tiny_stream(), "hidelora", **settings)
    again = run(tiny_stream(), "hidelora", **settings | {"model": tiny_vit()}, resume=True)
    assert again.seconds_by_phase["end_per_task"] == first.seconds_by_phase["end_per_task"] and again.seconds == first.seconds


@pytest.mark.parametrize("name", ["lda", "hidelora", "hideprompt", "hidelora-pet", "seqlora-tap", "inflora-ca"])
def test_features_at_a_tasks_end_are_of_the_runs_precision(name, monkeypatch):
    seen, real = [], torch.nn.functional.linear
    class Watched(get_method(name, "vision")):
        def end_task(self, batches):
            with monkeypatch.context() as m:
                m.setattr(torch.nn.functional, "linear", lambda x, *rest: seen.append(torch.is_autocast_enabled("cpu")) or real(x, *rest))
                super().end_task(batches)
    run(tiny_stream(), Watched, model=tiny_vit(), epochs=1, batch_size=8, lr=0.01, progress=False, precision="bf16")
    assert any(seen) and (name == "lda" or not all(seen))  # the head is trained in full precision
