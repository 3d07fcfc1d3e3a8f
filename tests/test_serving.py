"Answers do not depend on the batch: its size, the side of its padding, and who stands beside; and our mixed batches are PEFT's, number for number."
import json

import pytest
import torch

from treelora.cli import main
from treelora.experiments.serving import bench_serving, learned, serving_table
from treelora.learning.language import Collator, add_adapters, generate, prompt_features

PROMPTS = ["a: say", "b: say it twice, please", "c", "dd", "what is it that you say to that?"]
WHICH = torch.tensor([2, 0, 1, 1, 2])


@pytest.fixture(scope="module")
def served(tiny_llama, letters):
    "A tiny Llama with three adapters in its bank, and the statistics of their prompts."
    from copy import deepcopy
    model = add_adapters(deepcopy(tiny_llama(0)), dropout=0.0).eval()
    tl, collator = learned(model, 3), Collator(deepcopy(letters))
    for k, name in enumerate(tl.bank.names):
        tl.stats.update(prompt_features(model, collator.prompt([c * (3 + k) + " say" for c in "abcdefgh"[2 * k:2 * k + 3]])), [(name, 0)] * 3)
    return tl, collator


def rows_of(collator, prompts, side):
    "A batch that is padded on one side."
    left = collator.prompt(prompts)
    if side == "left": return left
    real = [row[mask.bool()] for row, mask in zip(left["input_ids"], left["attention_mask"])]
    pad = lambda row, value: torch.cat([row, row.new_full((left["input_ids"].shape[1] - len(row),), value)])
    mask = torch.stack([pad(torch.ones_like(row), 0) for row in real])
    return {"input_ids": torch.stack([pad(row, collator.tokenizer.pad_token_id) for row in real]), "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@torch.no_grad()
def last_logits(tl, batch, which):
    "What follows each prompt, under its own task's adapter."
    last = batch["attention_mask"].cumsum(1).argmax(1)
    with tl.serving(which): return tl.model(**batch, use_cache=False).logits[torch.arange(len(last)), last]


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_do_not_depend_on_the_batch(served, side):
    tl, collator = served
    whole = last_logits(tl, rows_of(collator, PROMPTS, "left"), WHICH)
    assert torch.allclose(last_logits(tl, rows_of(collator, PROMPTS, side), WHICH), whole, atol=1e-5)
    for rows in ([0], [3], [1, 2], [4, 0, 2]):
        part = last_logits(tl, rows_of(collator, [PROMPTS[i] for i in rows], side), WHICH[rows])
        assert torch.allclose(part, whole[rows], atol=1e-5)
    others = last_logits(tl, rows_of(collator, PROMPTS, side), torch.tensor([2, 1, 0, 0, 1]))  # the neighbours change their tasks
    assert torch.allclose(others[0], whole[0], atol=1e-5) and not torch.allclose(others[1], whole[1], atol=1e-2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_routes_do_not_depend_on_the_batch(served, side):
    tl, collator = served
    whole = prompt_features(tl.model, rows_of(collator, PROMPTS, "left"))
    assert torch.allclose(prompt_features(tl.model, rows_of(collator, PROMPTS, side)), whole, atol=1e-5)
    alone = torch.cat([prompt_features(tl.model, rows_of(collator, [p], side)) for p in PROMPTS])
    assert torch.allclose(alone, whole, atol=1e-5) and torch.equal(tl.route(alone), tl.route(whole))


def test_generated_answers_do_not_depend_on_the_batch(served):
    tl, collator = served

    def answers(rows):
        with tl.serving(WHICH[rows]): return generate(tl.model, collator, [PROMPTS[i] for i in rows], 6)
    whole = answers([0, 1, 2, 3, 4])
    assert [answers([i])[0] for i in range(5)] == whole and answers([4, 2, 0]) == [whole[i] for i in (4, 2, 0)] and len(set(whole)) > 1


def test_mixed_batches_are_pefts():
    found = bench_serving((2, 6), rows=5, tokens=(1, 7), repeats=1, hidden=32, layers=2)
    assert [(r["adapters"], r["tokens"]) for r in found] == [(2, 1), (2, 7), (6, 1), (6, 7)] and all(r["tasks"] > 1 for r in found)
    for r in found: assert r["gap"] < 1e-4 and r["ours"] > 0 and r["ratio"] == pytest.approx(r["ours"] / r["peft"])
    assert len(serving_table(found).splitlines()) == 5


def test_the_command_line_measures_it(tmp_path, capsys):
    assert main(["bench", "serving", "--quick", "--out", str(tmp_path / "serving.json")]) == 0 and "PEFT, tokens/s" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "serving.json").read_text(encoding="utf-8"))["rows"]) == 4
