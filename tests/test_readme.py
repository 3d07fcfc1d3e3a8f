"README's snippets run as they stand: taken out of the file, with a tiny language model in the place of SmolLM2."
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from treelora.streams import get_stream

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


def play(snippet):
    "Run a snippet as a program; what it has defined."
    names = {"__name__": "__main__"}
    exec(compile(snippet, "README.md", "exec"), names)
    return names


def test_the_snippets_are_a_loop_and_a_trainer():
    assert ["Trainer" in s for s in SNIPPETS] == [False, True]


def test_the_loop_of_the_first_snippet(tmp_path, monkeypatch):
    "On the first two tasks of its stream: bank and tree hold them, and a saved state can be loaded."
    whole = get_stream("split-digits")
    monkeypatch.setattr("treelora.streams.get_stream", lambda name: replace(whole, tasks=whole.tasks[:2]) if name == whole.name else None)
    made = play(SNIPPETS[0])
    tl = made["tl"]
    assert tl.bank.names == [task.name for task in whole][:2] and sorted(tl.tree.tasks) == sorted(tl.bank.names)
    assert tl.last.round == 5 * len(whole.loader(1)) and tl.lam == 0.1 and not tl.relative
    tl.save(tmp_path / "saved")
    assert made["TreeLoRA"].load(tmp_path / "saved", made["model"]).bank.names == tl.bank.names


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_what_readme_says_of_the_first_snippet(seed):
    "About half of all digits with the penalty, little more than a quarter without."
    share = {}
    for lam in ("0.1", "0"):
        torch.manual_seed(seed)
        made = play(SNIPPETS[0].replace("lam=0.1", f"lam={lam}"))
        right = [(made["model"].eval()(images).argmax(1) == labels).float().mean().item()
                 for task in made["stream"] for images, labels in made["stream"].loader(task, "test", batch_size=100)]
        share[lam] = sum(right) / len(right)
    assert 0.4 < share["0.1"] < 0.65 and 0.2 < share["0"] < 0.34


def test_the_trainer_of_the_second_snippet(tiny_language, tmp_path, monkeypatch):
    "What language results recommend: lambda 4 in units of the mean absolute gradient."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("treelora.learning.language.load_smollm2", lambda: tiny_language())
    made = play(SNIPPETS[1])
    tl = made["tl"]
    assert tl.bank.names == ["es", "pt"] and (tl.lam, tl.relative) == (4.0, True)
    assert made["trainer"].state.global_step == tl.last.round > 0


@pytest.mark.parametrize("name", ["tutorials/01_own_loop", "tutorials/02_trainer", "tutorials/03_accelerate", "learning/15_hub"])
def test_tutorials_recommend_the_same_strength(name):
    page = (Path(__file__).parent.parent / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8")
    assert set(re.findall(r"lam=([\d.]+), relative=True", page)) == {"4.0"}
