"Tokens per second: the forms of a training step learn the same, and what each leaves out is really left out."
import json

import pytest
import torch

from treelora.cli import main
from treelora.experiments.tokens import Form, Loop, batches_of, bench_text, forms, mean_loss, padding, plain_loss, run_tokens, tokens_table
from treelora.learning.language import answer_loss
from treelora.learning.text import Example, TextSet

DATA = TextSet([Example("say " + "ab" * (1 + 7 * i % 20) + ".", " " + "c" * (1 + i % 5)) for i in range(48)])


def loop(tiny_language, form): return Loop(form, DATA, lambda dtype: (tiny_language()[0].to(dtype), tiny_language()[1]), size=4)


def test_a_pass_has_every_example_once_and_alike_batches_hold_less_filling(tiny_language):
    for alike in (False, True): assert sorted(i for batch in batches_of(DATA, 5, alike) for i in batch) == list(range(48))
    collate = loop(tiny_language, forms(False, 2)[0]).method.collate
    at_random, by_length = (padding([collate([DATA[i] for i in b]) for b in batches_of(DATA, 4, alike)]) for alike in (False, True))
    assert 0 < by_length < 0.5 * at_random < 0.5


def test_the_padding_of_a_batch_by_hand():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert padding([{"attention_mask": mask}]) == 0.25 and padding([{"attention_mask": mask[1:]}]) == 0


def test_answers_columns_give_the_plain_loss_and_its_gradients(tiny_language):
    one = loop(tiny_language, Form("plain"))
    learned = [p for p in one.model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in learned: p.add_(0.1)  # B starts at zero, and so would the gradients of A
    for batch in one.batches[:3]:
        losses = [kind(one.model, batch) for kind in (plain_loss, answer_loss)]
        grads = [torch.cat([g.flatten() for g in torch.autograd.grad(x, learned)]) for x in losses]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
        assert grads[0].abs().max() > 1e-4
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-6)


def test_every_form_starts_from_the_same_loss_and_is_counted_by_the_same_tokens(tiny_language):
    rows = bench_text([loop(tiny_language, form) for form in forms(False, 2)], repeats=2)
    assert [r["name"] for r in rows] == ["plain", "similar lengths", "answers' columns", "last 1 layers", "last 1 layers, kept inputs"]
    assert len({r["tokens"] for r in rows}) == 1 and all(r["loss"] == pytest.approx(rows[0]["loss"], abs=1e-4) for r in rows)
    assert all(0 < r["slowest"] <= r["per_second"] <= r["fastest"] for r in rows)
    assert tokens_table(rows).count("\n") == 6 and "| 1.00 |" in tokens_table(rows).splitlines()[2]


def test_kept_inputs_go_around_the_lower_layers(tiny_language):
    one = loop(tiny_language, Form("ahead", layers=1, ahead=True))
    before = mean_loss(one)
    torch.nn.init.zeros_(one.model.get_input_embeddings().weight)  # tied to the head in no tiny model
    assert mean_loss(one) == before and "input_ids" not in one.batches[0]


def test_a_model_of_one_layer_has_nothing_below_it(): assert [f.layers for f in forms(True, 1)] == [None] * 4


def test_bfloat16_multiplies_in_bfloat16(tiny_language):
    one = loop(tiny_language, Form("bfloat16", bf16=True))
    assert one.model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert mean_loss(one) == pytest.approx(mean_loss(loop(tiny_language, Form("plain"))), rel=0.02)


def test_bench_language_writes_what_it_measured(tmp_path, capsys, tiny_language):
    model, tokenizer = tiny_language()
    model.save_pretrained(tmp_path / "model"), tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "language.json"
    assert main(["bench", "language", "--quick", "--task", "de", "--model", str(tmp_path / "model"), "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["task"] == "de" and found["examples"] == 8 and "times plain" in capsys.readouterr().out
    assert found["rows"][-1]["ahead"] and found["rows"][-1]["layers"] == 1
    assert all(r["loss"] == pytest.approx(found["rows"][0]["loss"], rel=0.02) for r in found["rows"])


@pytest.mark.parametrize("options, words", [
    (["--stream", "split-digits"], "'split-digits' is a stream of images"), (["--stream", "no-such"], "no stream 'no-such'"), (["--task", "xx"], "xx")])
def test_bench_language_says_what_was_wrong(options, words, capsys):
    assert main(["bench", "language", "--quick", *options]) != 0
    assert words in capsys.readouterr().err
