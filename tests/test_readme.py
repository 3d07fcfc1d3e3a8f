"README's snippets run as they stand: taken out of the file, with a tiny language model in the place of SmolLM2."
import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


def play(snippet):
    "Run a snippet as a program; what it has defined."
    names = {"__name__": "__main__"}
    exec(compile(snippet, "README.md", "exec"), names)
    return names


def test_the_snippets_are_a_loop_and_a_trainer():
    assert ["Trainer" in s for s in SNIPPETS] == [False, True]


def test_the_loop_of_the_first_snippet(tmp_path):
    "Real digits: the last task is learned, bank and tree hold all of them, and a saved state can be loaded."
    torch.manual_seed(0)
    made = play(SNIPPETS[0])
    tl, stream = made["tl"], made["stream"]
    assert tl.bank.names == [task.name for task in stream] and sorted(tl.tree.tasks) == sorted(tl.bank.names)
    images, labels = next(iter(stream.loader(stream[-1], "test", batch_size=100)))
    assert (made["model"].eval()(images).argmax(1) == labels).float().mean() > 0.8
    assert tl.lam == 0.1 and not tl.relative
    tl.save(tmp_path / "saved")
    assert made["TreeLoRA"].load(tmp_path / "saved", made["model"]).bank.names == tl.bank.names


def test_the_trainer_of_the_second_snippet(tiny_language, tmp_path, monkeypatch):
    "What language results recommend: lambda 4 in units of the mean absolute gradient."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("treelora.language.load_smollm2", lambda: tiny_language())
    made = play(SNIPPETS[1])
    tl = made["tl"]
    assert tl.bank.names == ["es", "pt"] and (tl.lam, tl.relative) == (4.0, True)
    assert made["trainer"].state.global_step == tl.last.round > 0


@pytest.mark.parametrize("name", ["70_own_loop", "71_trainer", "72_accelerate", "77_share"])
def test_tutorials_recommend_the_same_strength(name):
    page = (Path(__file__).parent.parent / "nbs" / "tutorials" / f"{name}.ipynb").read_text(encoding="utf-8")
    assert set(re.findall(r"lam=([\d.]+), relative=True", page)) == {"4.0"}
