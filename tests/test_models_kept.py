"Model x option: whatever trains during a task is kept per task, shared on purpose, or refused; stock PEFT reads every shared folder. `pytest -s` shows the table."
import copy
import logging
import warnings
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, ViTConfig,
                          ViTForImageClassification)

from treelora.algorithm import TreeLoRA
from treelora.learning.hub import push, task_folder

warnings.filterwarnings("ignore", module="peft")
logging.getLogger("transformers").setLevel(logging.ERROR)
IDS = torch.randint(0, 24, (3, 5), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def llama(**options): return LlamaForCausalLM(LlamaConfig(vocab_size=24, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                                                          max_position_embeddings=16, pad_token_id=0, initializer_range=0.3, **options))
def gpt2(): return GPT2LMHeadModel(GPT2Config(vocab_size=24, n_embd=16, n_inner=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0, initializer_range=0.3))
def bert(): return BertForSequenceClassification(BertConfig(vocab_size=24, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                                                            max_position_embeddings=16, num_labels=3, initializer_range=0.3))
def vit(): return ViTForImageClassification(ViTConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4, num_labels=3, initializer_range=0.3))


class Kind:
    "A tiny model, its inputs, and what its layers are called."

    def __init__(self, make, qv, head, embedding=None, images=False):
        self.make, self.qv, self.head, self.embedding, self.images = make, qv, head, embedding, images

    def base(self) -> nn.Module:
        torch.manual_seed(1)
        return self.make().eval()

    def logits(self, model) -> torch.Tensor: return (model(pixel_values=IMAGES.to(next(model.parameters()).dtype)) if self.images else model(input_ids=IDS)).logits


def vit_names() -> list[str]:
    "Newer versions of transformers call the projections differently."
    names = {n.rpartition(".")[2] for n, m in vit().named_modules() if isinstance(m, nn.Linear)}
    return ["query", "value"] if "query" in names else ["q_proj", "v_proj"]


KINDS = {"Llama": Kind(llama, ["q_proj", "v_proj"], "lm_head", "embed_tokens"), "Llama, tied": Kind(partial(llama, tie_word_embeddings=True), ["q_proj", "v_proj"], "lm_head", "embed_tokens"),
         "GPT-2": Kind(gpt2, ["c_attn"], "lm_head", "wte"), "BERT": Kind(bert, ["query", "value"], "classifier", "word_embeddings"),
         "ViT": Kind(vit, vit_names(), "classifier", images=True)}

# what an option adds to LoraConfig, given the kind of model; None: the model has no such part
OPTIONS = {
    "LoRA": lambda k: {},
    "rsLoRA": lambda k: dict(use_rslora=True, lora_alpha=3),
    "DoRA": lambda k: dict(use_dora=True),
    "PiSSA": lambda k: dict(init_lora_weights="pissa"),
    "PiSSA, fast": lambda k: dict(init_lora_weights="pissa_niter_4", use_rslora=True),
    "OLoRA": lambda k: None if k.make is gpt2 else dict(init_lora_weights="olora", lora_alpha=2),  # PEFT itself cannot: Conv1D
    "Gaussian start": lambda k: dict(init_lora_weights="gaussian"),
    "orthogonal start": lambda k: dict(init_lora_weights="orthogonal"),
    "ranks and alphas": lambda k: dict(rank_pattern={k.qv[0]: 3}, alpha_pattern={k.qv[-1]: 5}),
    "biases of LoRA layers": lambda k: None if k.make is not gpt2 and "Llama" in k.base().__class__.__name__ else dict(bias="lora_only"),
    "all biases": lambda k: dict(bias="all"),
    "lora_bias": lambda k: dict(lora_bias=True) if all(getattr(m, "bias", None) is not None for n, m in k.base().named_modules() if n.endswith(tuple(k.qv))) else None,
    "head": lambda k: dict(modules_to_save=[k.head]),
    "head of SEQ_CLS": lambda k: dict(task_type="SEQ_CLS", target_modules="all-linear") if k.make is bert else None,
    "embedding": lambda k: dict(modules_to_save=[k.embedding]) if k.embedding else None,
    "tokens": lambda k: dict(trainable_token_indices={k.embedding: [1, 5]}) if k.embedding else None,
    "embedding, tied": lambda k: dict(modules_to_save=[k.embedding], ensure_weight_tying=True) if k.embedding and k.make is not bert else None,
    "all-linear": lambda k: dict(target_modules="all-linear"),
    "LoRA on the embedding": lambda k: dict(target_modules=[*k.qv, k.embedding]) if k.embedding else None,
    "LoRA on the head": lambda k: dict(target_modules=[*k.qv, k.head]),
    "DoRA, biases, head": lambda k: dict(use_dora=True, bias="all", modules_to_save=[k.head]),
}
TABLE: dict[tuple[str, str], str] = {}


def adapted(kind: Kind, options: dict, name="default") -> nn.Module:
    options, then = dict(options), options.get("then", lambda model: None)
    options.pop("then", None)
    torch.manual_seed(2)
    model = get_peft_model(kind.base(), LoraConfig(**{"r": 2, "target_modules": kind.qv} | options), adapter_name=name).eval()
    then(model)
    return model


def learn(tl: TreeLoRA, kind: Kind, name: str, target: float, steps=2) -> torch.Tensor:
    "The logits right after a task."
    optimizer = torch.optim.Adam([p for p in tl.model.parameters() if p.requires_grad], 0.05)
    with tl.task(name):
        for _ in range(steps):
            (kind.logits(tl.model) - target).square().mean().backward()
            tl.step()
            optimizer.step()
            optimizer.zero_grad()
    return kind.logits(tl.model).detach()


def in_double(kind: Kind, model: nn.Module) -> torch.Tensor:
    "Logits of the same numbers without the rounding of the passes, which differs from processor to processor."
    return kind.logits(copy.deepcopy(model).double()).detach()


def tried(kind: Kind, options: dict, folder, name="default", exact=True, **given) -> None:
    "Two tasks; each comes back, from the bank, from a file, and in PEFT alone."
    tl = TreeLoRA(adapted(kind, options, name), lam=0.01, adapter=name, **given)
    wanted = {task: learn(tl, kind, task, target) for task, target in (("one", 1.0), ("two", -1.0))}
    assert (wanted["one"] - wanted["two"]).abs().max() > 1e-3
    push(tl, folder, license="mit")
    again = TreeLoRA.load(folder, adapted(kind, options, name), name)
    for task, logits in wanted.items():
        for its in (tl, again):
            its.load_adapter(task)
            assert torch.equal(kind.logits(its.model), logits), task
        for where in ({"subfolder": task_folder(tl, task)}, *([{}] if task == "two" else [])):
            shared = PeftModel.from_pretrained(kind.base(), str(folder), **where).eval()
            alone = kind.logits(shared) if exact else in_double(kind, shared)
            assert torch.equal(alone, logits) if exact else torch.allclose(alone, in_double(kind, again.model), atol=1e-6), (task, (alone - logits).abs().max())


# every option once in the quick tests, with the models in which it is most apart; the whole table among the slow ones
QUICK = {("Llama", "LoRA"), ("Llama", "rsLoRA"), ("GPT-2", "DoRA"), ("Llama", "PiSSA"), ("BERT", "PiSSA, fast"), ("ViT", "OLoRA"), ("BERT", "Gaussian start"), ("GPT-2", "orthogonal start"),
         ("Llama", "ranks and alphas"), ("BERT", "biases of LoRA layers"), ("GPT-2", "all biases"), ("ViT", "lora_bias"), ("BERT", "head"), ("Llama, tied", "head"), ("BERT", "head of SEQ_CLS"),
         ("GPT-2", "embedding"), ("Llama, tied", "embedding, tied"), ("Llama, tied", "tokens"), ("GPT-2", "all-linear"), ("Llama, tied", "LoRA on the embedding"), ("GPT-2", "LoRA on the head"),
         ("ViT", "DoRA, biases, head")}
ROWS = [pytest.param(m, o, marks=[] if (m, o) in QUICK else pytest.mark.slow) for o in OPTIONS for m in KINDS]


@pytest.mark.parametrize("model, option", ROWS)
def test_a_task_comes_back(model, option, tmp_path):
    kind, options = KINDS[model], OPTIONS[option](KINDS[model])
    if options is None: pytest.skip("the model has no such part")
    if not set(options) <= set(LoraConfig.__dataclass_fields__): pytest.skip("this version of PEFT has no such option")
    tried(kind, options, tmp_path, exact="LoRA" == option or not str(options.get("init_lora_weights")).startswith(("pissa", "olora")))
    TABLE[model, option] = "right"


# what trains outside PEFT's adapter, given the model
OUTSIDE = {
    "plain head": lambda model, kind: head(model, kind).requires_grad_(True),
    "norms": lambda model, kind: [p.requires_grad_(True) for n, p in model.named_parameters() if "norm" in n.lower() or "ln_" in n],
    "base not frozen": lambda model, kind: [p.requires_grad_(True) for n, p in model.named_parameters() if "lora_" not in n],
}


def head(model, kind) -> nn.Module: return next(m for n, m in model.named_modules() if n.endswith(kind.head))


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("name", [n for n in KINDS if "tied" not in n])
def test_what_trains_outside_is_refused_or_kept_or_shared(name, outside, tmp_path):
    kind, free = KINDS[name], OUTSIDE[outside]
    model = adapted(kind, {})
    free(model, kind)
    before, flags = {n: x.clone() for n, x in model.state_dict().items()}, [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match='^The parameter "base_model.model.*trains outside the adapter.*keep="all".*shared=\\[') as refused: TreeLoRA(model)
    assert "\n" not in str(refused.value) and [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    TABLE[name, outside] = "refused"
    assert not TreeLoRA(model, shared="base_model").kept
    tried(kind, {"then": lambda m: free(m, kind)}, tmp_path, keep="all")
    TABLE[name, f'{outside}, keep="all"'] = "right"


def test_a_shared_head_goes_with_every_folder(tmp_path):
    kind = KINDS["BERT"]
    model = adapted(kind, {})
    head(model, kind).requires_grad_(True)
    tl = TreeLoRA(model, lam=0.01, shared=["classifier"])
    first, _ = (learn(tl, kind, name, target) for name, target in (("one", 1.0), ("two", -1.0)))
    push(tl, tmp_path, license="mit")
    assert not tl.kept and list(tl.bank.blocks) == ["adapters", "signatures"]
    tl.load_adapter("one")
    now = kind.logits(model)
    assert not torch.equal(now, first)  # the head has moved on, for all tasks
    assert torch.equal(kind.logits(PeftModel.from_pretrained(kind.base(), str(tmp_path), subfolder=task_folder(tl, "one")).eval()), now)


def test_the_table_in_words():
    "Shown by `pytest -s`."
    rows = list(dict.fromkeys(option for _, option in TABLE))
    print("", f"{'':24}" + "".join(f"{m:>14}" for m in KINDS), *(f"{o:24}" + "".join(f"{TABLE.get((m, o), '-'):>14}" for m in KINDS) for o in rows), sep="\n")
    assert set(TABLE.values()) <= {"right", "refused"}
