"Streams and the learner on a tiny stream and a tiny transformer: every method, results, and bad input."
import json
import math

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from treelora import learner
from treelora.experiments.tuning import choose, tuned_rate, tuning_file
from treelora.experiments.vision import run_set
from treelora.learner import run
from treelora.methods import VisionMethod, get_method, list_methods
from treelora.streams import TaskStream, get_stream

NAMES = [m["name"] for m in list_methods() if "vision" in m["kinds"]]


def tiny_stream(classes=4, per_task=2, size=8, n=12, seed=0):
    "Images of noise around a bright row, which is the class."
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(classes).repeat_interleave(n)
    x = 0.2 * torch.rand(len(y), 1, size, size, generator=g)
    x[torch.arange(len(y)), 0, y] += 0.7
    return TaskStream.from_arrays("rows", x, y, x[::3], y[::3], classes_per_task=per_task, class_order=range(classes))


def tiny_vit(n_classes=4, size=8, chans=1):
    torch.manual_seed(0)
    return VisionTransformer(img_size=size, patch_size=4, in_chans=chans, num_classes=n_classes, embed_dim=16, depth=5, num_heads=2, mlp_ratio=1.0)


def tiny_run(method, stream=None, **kw):
    return run(stream or tiny_stream(), method, model=tiny_vit(), **({"epochs": 2, "batch_size": 8, "lr": 0.01, "progress": False} | kw))


@pytest.mark.parametrize("name", NAMES)
def test_every_method_runs_and_repeats(name):
    a, b = tiny_run(name, curves=3), tiny_run(name, history=False)
    assert np.array_equal(a.R[-1], b.R[-1]) and np.isnan(b.R[0]).all()  # measuring in between changes nothing
    assert np.isnan(a.R[0, 1]) and not np.isnan(a.R[1]).any() and ((0 <= a.R[1]) & (a.R[1] <= 1)).all()
    stages = 1 if name == "joint" else 2
    assert len(a.curves) == (0 if name == "lda" else stages) and b.curves == []  # it takes no steps that could be measured
    assert len(a.seconds_by_phase["per_task"]) == stages
    assert (len(a.trees) == 2) == name.startswith("treelora")
    assert a.memory["peak_bytes"] > 0 and (a.memory["stored_bytes"] > 0) == (name not in ("seqlora", "seqlora-wtp", "joint"))


@pytest.mark.parametrize("name", ["seqlora-tap", "treelora-tii", "inflora-ca", "l2p-tap", "hidelora-pet"])
def test_class_statistics_take_single_images_and_constant_features(name):
    g, y = torch.Generator().manual_seed(0), torch.arange(4)
    made = lambda x, y, k: TaskStream.from_arrays("few", x, y, x, y, classes_per_task=k)
    one, flat = torch.rand(4, 1, 8, 8, generator=g), torch.ones(8, 1, 8, 8)
    for stream in (made(one, y, 2), made(one, y, 1), made(flat, y.repeat(2), 2)): assert 0 <= tiny_run(name, stream, epochs=1).op <= 1


def test_result_file(tmp_path):
    result = tiny_run("treelora", curves=2)
    saved = json.loads(result.save(tmp_path / "deep" / "one.json").read_text())
    assert {"format", "config", "tasks", "classes", "train_sizes", "test_sizes", "R", "scores", "seconds", "samples_per_second", "curves",
            "trees", "extra", "memory", "device", "packages", "commit", "date"} <= set(saved)
    assert saved["R"][0][1] is None and saved["scores"]["op"] == pytest.approx(result.op)
    assert saved["config"]["method"] == "treelora" and saved["config"]["method_config"]["lam"] == 1.0 and saved["config"]["method_config"]["relative"]
    assert len(saved["extra"]["movement"]) == 2
    assert saved["trees"][-1]["after"] == saved["tasks"][-1] and saved["packages"]["torch"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["one.json"]


def test_joint_has_one_row():
    result = tiny_run("joint")
    assert np.isnan(result.R[0]).all() and not np.isnan(result.R[1]).any()
    assert "bwt" not in result.as_dict()["scores"]
    with pytest.raises(ValueError): result.bwt


def test_one_task_only():
    for name in ("treelora", "treelora-branch", "joint"):
        result = tiny_run(name, tiny_stream(2, 2))
        assert result.R.shape == (1, 1) and (name == "joint" or result.bwt == 0)


def test_a_method_of_ones_own():
    class Constant(VisionMethod):
        name = "constant"

        def predict(self, inputs): return torch.full((len(inputs),), self.seen[0])

    result = tiny_run(Constant)
    assert result.R[1].tolist() == [0.5, 0.0]


def test_interrupted_task_is_closed(monkeypatch):
    made = []

    class Breaks(get_method("treelora")):
        name = "breaks"

        def after_step(self):
            made.append(self)
            if self.tl._now.name.endswith("2-3") and self.tl._now.round == 2: raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt): tiny_run(Breaks)
    tl = made[-1].tl
    assert tl._now is None and len(tl.bank) == 1 and len(tl.tree) == 1


def test_seed_changes_the_numbers():
    losses = [tiny_run("seqlora", seed=s).curves for s in (0, 1)]
    stream = get_stream("split-digits", seed=1)
    assert not torch.equal(stream[0].train.labels, get_stream("split-digits", seed=0)[0].train.labels)
    assert losses == [[], []]


@pytest.mark.parametrize("kwargs, words", [
    ({"method": "magic"}, "Unknown method 'magic'; known are seqlora"), ({"scale": "huge"}, "known are quick, small, paper"),
    ({"stream": "split-none"}, "split-digits"), ({"epochs": 0}, "epochs=0"), ({"lr": -1.0}, "lr=-1.0"), ({"batch_size": 0}, "batch_size=0")])
def test_unknown_names_and_numbers(kwargs, words):
    with pytest.raises(ValueError, match=words): run(**({"stream": "split-digits", "method": "seqlora", "progress": False} | kwargs))


def test_images_of_a_wrong_size():
    with pytest.raises(ValueError, match="1 x 12 x 12 .* takes 1 x 8 x 8"):
        run(tiny_stream(size=12), "seqlora", model=tiny_vit(), epochs=1, progress=False)
    with pytest.raises(ValueError, match="takes 3 x 8 x 8"):
        run(tiny_stream(), "seqlora", model=tiny_vit(chans=3), epochs=1, progress=False)


def test_bad_streams():
    stream = tiny_stream()
    with pytest.raises(ValueError, match="no tasks"): TaskStream("none", "quick", 0, [])
    with pytest.raises(ValueError, match="more than one task named"): TaskStream("twice", "quick", 0, [stream[0], stream[0]])
    x, y = torch.rand(4, 1, 8, 8), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"labels \[5\]"): TaskStream.from_arrays("odd", x, y, x, torch.tensor([0, 0, 1, 5]), 1)
    with pytest.raises(ValueError, match="no training images"): TaskStream.from_arrays("empty", x[:0], y[:0], x, y, 1)
    with pytest.raises(ValueError, match="from 1 to 2"): TaskStream.from_arrays("odd", x, y, x, y, 3)


def test_labels_outside_the_task():
    method = get_method("treelora")(tiny_vit(), [(0, 1), (2, 3)])
    method.begin_task([0], "first", 2, 1)
    with pytest.raises(ValueError, match=r"Labels \[3\] are not among the task's classes \[0, 1\]"):
        method.loss((torch.rand(2, 1, 8, 8), torch.tensor([0, 3])))
    method.abort_task()


def test_missing_data_says_where_to_get_it(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError) as error: get_stream("split-fashion-mnist", root=tmp_path / "nowhere")
    assert all(w in str(error.value) for w in ("dataset-fashion-mnist", "TREELORA_DATA", "hub"))
    with pytest.raises(FileNotFoundError, match="nowhere"): get_stream("split-tiny-imagenet", "small", root=tmp_path / "nowhere")


def test_run_set_resumes_and_takes_tuned_rates(tmp_path, monkeypatch):
    calls = []

    def fake(stream, method, scale, seed, lr=None, progress=True, **settings):
        calls.append((method, seed, lr))
        return tiny_run(method, seed=seed, lr=lr or 0.01, epochs=1)

    monkeypatch.setattr("treelora.experiments.vision.run", fake)
    monkeypatch.setattr("treelora.experiments.vision.get_stream", lambda *where: tiny_stream())  # what is there is compared with its data
    choose(tuning_file(tmp_path, "rows", "quick"), "seqlora", {"lr": 0.02})
    assert tuned_rate(tmp_path, "rows", "quick", "seqlora") == 0.02
    paths = run_set("rows", methods=("seqlora", "treelora"), seeds=(0, 1), results=tmp_path)
    assert [p.exists() for p in paths] == [True] * 4 and len(calls) == 4
    assert all(lr == 0.02 for m, _, lr in calls if m == "seqlora")
    paths[0].unlink(), calls.clear()
    run_set("rows", methods=("seqlora", "treelora"), seeds=(0, 1), results=tmp_path, missing_only=True)
    assert len(calls) == 1


def test_curve_marks_are_within_the_task():
    for total in (1, 5, 100):
        marks = learner._marks(total, 14)
        assert min(marks) == 1 and max(marks) == total
    assert learner._marks(10, 0) == set()
    assert not math.isnan(tiny_run("seqlora", curves=2).curves[0]["accuracy"][0])


def test_steps_that_overflow_are_no_rounds():
    from types import SimpleNamespace

    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    Accelerator()
    p, seen, scaler = torch.nn.Parameter(torch.ones(2)), [], torch.amp.GradScaler("cpu", init_scale=2.0 ** 127)
    optimizer = AcceleratedOptimizer(torch.optim.Adam([p]), scaler=scaler)
    own = learner.Learner.__new__(learner.Learner)
    own.compile = False
    own.accelerator = SimpleNamespace(scaler=scaler, backward=lambda loss: scaler.scale(loss).backward())
    own.method = SimpleNamespace(loss=lambda batch: (3.0 * p).sum(), after_backward=lambda batch, loss: seen.append(p.grad.clone()), after_step=lambda: None)
    for _ in range(6): own._step(None, optimizer)
    assert 0 < len(seen) < 6 and all(torch.equal(g, torch.full((2,), 3.0)) for g in seen)
