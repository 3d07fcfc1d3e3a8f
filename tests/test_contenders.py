"The contest: what is there stays, what is missing is tuned and run, at both budgets."
import json

import pytest
import torch

from treelora.cli import main
from treelora.experiments.contenders import CONTENDERS, contend, places
from treelora.methods import get_method
from treelora.streams import TaskStream, register_stream


def tiny_stream(scale, seed, root):
    "Four classes of bright squares in different corners."
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(4).repeat(8)
    images = torch.rand(32, 1, 16, 16, generator=g) * 0.2
    for image, c in zip(images, labels.tolist()): image[0, 8 * (c // 2):8 * (c // 2) + 8, 8 * (c % 2):8 * (c % 2) + 8] += 0.8
    return TaskStream.from_arrays("tiny-squares", images, labels, images[:8], labels[:8], classes_per_task=2, seed=seed, class_order=range(4))


register_stream("tiny-squares", ["quick"], tiny_stream)


@pytest.mark.slow
def test_runs_what_is_missing(tmp_path, capsys):
    ask = dict(stream="tiny-squares", methods=["seqlora"], seeds=[0], results=tmp_path, progress=False)
    paths = contend(**ask)
    folder = tmp_path / "tiny-squares" / "quick"
    assert paths == [folder / "seqlora-seed0.json", folder / "one-epoch" / "seqlora-seed0.json"]
    rates = [json.loads((p.parent / "tuning.json").read_text())["lr"]["seqlora"] for p in paths]
    assert [json.loads(p.read_text())["config"]["lr"] for p in paths] == rates
    assert [json.loads(p.read_text())["config"]["epochs"] for p in paths] == [5, 1]
    times = [p.stat().st_mtime_ns for p in (*paths, folder / "tuning.json")]
    contend(**ask)
    assert [p.stat().st_mtime_ns for p in (*paths, folder / "tuning.json")] == times
    paths[1].unlink()  # as if it had been stopped before
    assert main(["compare", "--stream", "tiny-squares", "--methods", "seqlora", "--seeds", "0", "--results", str(tmp_path), "--quiet"]) == 0
    assert paths[1].exists() and "seqlora" in capsys.readouterr().out


def test_methods_of_the_other_kind():
    with pytest.raises(ValueError, match="ogd is not among the contenders for vision"): contend(methods=["ogd"], progress=False)
    assert main(["compare", "--methods", "fix", "--quiet"]) == 2
    of_images = {m for m in CONTENDERS["vision"] if not m.endswith(("-tap", "-ca", "-pet", "-r10"))}
    assert not of_images - set(CONTENDERS["language"]) - {"hideprompt", "inflora", "joint"}


def test_contenders_are_registered_and_have_class_statistics_where_their_names_say_so():
    for kind, names in CONTENDERS.items():
        assert len(set(names)) == len(names)
        for name in names: assert get_method(name, kind).name == name
    plain = {"ewc-tap": "ewc", "l2p-tap": "l2p", "dualprompt-tap": "dualprompt", "inflora-ca": "inflora"}
    assert set(plain) <= set(CONTENDERS["vision"]) and set(plain.values()) <= set(CONTENDERS["vision"])
    for name, other in plain.items():
        assert "class moments" in get_method(name, "vision").stores and "class moments" not in get_method(other, "vision").stores
    assert {f"{m}-authors" for m in ("gem", "olora", "hidelora")} <= set(CONTENDERS["language"])


def test_the_authors_forms_of_rivals_are_not_among_the_rivals(tmp_path):
    "What the paper's repository runs under a rival's name says nothing about the rival."
    saved_runs(tmp_path / "cldr" / "quick", {"seqlora": (0.2, 0.2, 0.2), "hidelora": (0.35, 0.40, 0.44), "alone": (0.45, 0.46, 0.47), "gem-authors": (0.1, 0.1, 0.1),
                                             "hidelora-authors": (0.5, 0.5, 0.5), "treelora": (0.35, 0.41, 0.44), "treelora-branch": (0.36, 0.41, 0.45)})
    found = {row["what"]: row for row in places(tmp_path, "cldr")}
    assert found["no rival below plain sequential LoRA"]["reached"].startswith("hidelora 39.7, seqlora 20.0")
    assert found["alone above the best rival"]["reached"].startswith("alone 46.0, hidelora 39.7")


def test_rates_of_another_stream(tmp_path):
    (tmp_path / "other" / "quick").mkdir(parents=True)
    (tmp_path / "other" / "quick" / "tuning.json").write_text('{"lr": {"seqlora": 0.003}}')
    ask = dict(stream="tiny-squares", methods=["seqlora"], seeds=[0], results=tmp_path, progress=False)
    paths = contend(**ask, rates="other", epochs=1)
    assert [p.relative_to(tmp_path / "tiny-squares/quick").name for p in paths] == ["seqlora-seed0.json"] and not (tmp_path / "tiny-squares" / "quick" / "tuning.json").exists()
    assert json.loads(paths[0].read_text())["config"]["lr"] == 0.003
    with pytest.raises(ValueError, match="no learning rates tuned on 'nothing'"): contend(**ask, rates="nothing")
    with pytest.raises(ValueError, match="no learning rates tuned on 'other' for gem"): contend(**ask | {"methods": ["seqlora", "gem"]}, rates="other", epochs=1)


def saved_runs(folder, levels):
    "Made-up results: method -> final scores of three seeds."
    folder.mkdir(parents=True)
    for method, scores in levels.items():
        for seed, op in enumerate(scores):
            result = {"format": 1, "config": {"stream": "cldr", "scale": "quick", "method": method, "seed": seed}, "scores": {"op": op, "bwt": 0.01}, "memory": {"stored_bytes": 0}, "tasks": ["a"], "R": [[op]], "seconds": {"train": 1.0}, "device": "none"}
            (folder / f"{method}-seed{seed}.json").write_text(json.dumps(result))


def test_places_are_decided_seed_by_seed(tmp_path):
    "Error bars that overlap do not put a method on top that is below on every seed."
    saved_runs(tmp_path / "cldr" / "quick", {"seqlora": (0.2, 0.2, 0.2), "hidelora": (0.35, 0.40, 0.44), "alone": (0.32, 0.36, 0.41),
                                             "treelora": (0.35, 0.41, 0.44), "treelora-branch": (0.36, 0.41, 0.45)})
    found = {row["what"]: row for row in places(tmp_path, "cldr")}
    top = found["alone above the best rival"]
    assert not top["holds"] and top["reached"] == "alone 36.3, hidelora 39.7, difference -3.3 ± 0.6"
    assert found["the paper's form: at least the accuracy of the best rival"]["holds"]
    assert found["the paper's form: the least forgetting"]["holds"]


@pytest.mark.parametrize("words, sentence", [
    (["--epochs", "0"], "epochs=0"), (["--batch-size", "0"], "batch_size=0"), (["--seeds", "0", "-1"], "seed=-1 must be"), (["--seeds", "1", "1"], "seeds=[1, 1] has a seed twice")])
def test_settings_that_cannot_be_are_refused_before_anything_is_tuned(tmp_path, capsys, words, sentence):
    assert main(["compare", "--quiet", "--methods", "seqlora", "--results", str(tmp_path / "results"), *words]) != 0
    assert sentence in capsys.readouterr().err and not (tmp_path / "results").exists()
