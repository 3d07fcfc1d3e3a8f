"A model before the first step and a bank on another model: each case is right, or refused in one sentence that leaves model and files as they were."
import json
from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy

from treelora.algorithm import TreeLoRA
from treelora.engine.checkpoint import fingerprint, weights_sha256
from treelora.engine.checks import ModelRecord, Weight, as_text, base_weights, checksum, difference, from_text
from treelora.learning.hub import pull, push
from treelora.lora import LoRALinear, add_lora, adapters_off, lora_layers, row_adapters

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x): return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def config(**changes): return LoraConfig(**dict(r=2, lora_alpha=8, target_modules=["a", "b"]) | changes)
def make(seed=0, name="default", **changes): return get_peft_model(net(seed), config(**changes), adapter_name=name)
def ours(seed=0, alpha=8): return add_lora(net(seed), ["a", "b"], r=2, alpha=alpha)


def noisy(model, name="default"):
    "A model whose adapter does something."
    with torch.no_grad():
        for layer in lora_layers(model, name): layer.B.normal_(generator=torch.Generator().manual_seed(1))
    return model


def train(tl, name, k=0, steps=5, model=None):
    "Some steps, and the logits after them."
    model = tl.model if model is None else model
    opt, y = torch.optim.SGD(tl.params, 0.1), (X[:, k] * 2).long().clamp(0, 2)
    with tl.task(name):
        for _ in range(steps):
            cross_entropy(model(X), y).backward()
            tl.step(), opt.step(), opt.zero_grad()
    return answers(model)


@torch.no_grad()
def answers(model): return model(X.to(list(base_weights(model).values())[-1].dtype)).float()


def state(model): return {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[n][0], b[n][0]) and a[n][1] == b[n][1] for n in a)


# Before the first step

def with_two(active=("default", "old"), trains=False):
    model = noisy(make())
    model.add_adapter("old", config())
    noisy(model, "old").base_model.set_adapter(list(active))
    for name, p in model.named_parameters():
        if ".old." in name: p.requires_grad_(trains)
    return model


def loaded(folder, **how):
    make().save_pretrained(folder)
    return PeftModel.from_pretrained(net(), folder, **how)


def merged(model):
    model.merge_adapter()
    return model


def off(model):
    for m in model.modules():
        if hasattr(m, "enable_adapters") and hasattr(m, "lora_A"): m.enable_adapters(False)
    return model


def half_frozen():
    model = ours()
    model.b.lora_A.requires_grad_(False)
    return model


BEFORE = {  # a model, the adapter that is asked for, and the words of the sentence; None: it works
    "plain": (lambda path: make(), "default", None),
    "without adapters": (lambda path: net(), "default", "no LoRA layers named 'default': call"),
    "missing": (lambda path: make(name="mine"), "default", "no LoRA layers named 'default', but of 'mine'"),
    "loaded frozen": (loaded, "default", r"'default' is frozen in 2 of 2 layers, such as 'base_model.model.a'; load it with is_trainable=True"),
    "loaded to train": (lambda path: loaded(path, is_trainable=True), "default", None),
    "one matrix frozen": (lambda path: half_frozen(), "default", "is frozen in 1 of 2 layers, such as 'b'"),
    "inactive": (lambda path: with_two(["old"]), "default", r"'default' is not active \(active: 'old'\); call model.set_adapter\('default'\)"),
    "merged": (lambda path: merged(make()), "default", "merged into the frozen weights; call model.unmerge_adapter"),
    "switched off": (lambda path: off(make()), "default", "'default' is switched off; leave disable_adapter"),
    "another trains": (lambda path: with_two(trains=True), "default", r"are active and train \('old'\).*freeze them, or call model.set_adapter"),
    "another is frozen": (lambda path: with_two(), "default", None),
    "compiled": (lambda path: torch.compile(make(), backend="eager"), "default", None),
}


@pytest.mark.parametrize("case", BEFORE)
def test_before_the_first_step(case, tmp_path):
    build, adapter, words = BEFORE[case]
    model = build(tmp_path)
    before = state(model)
    if words is None: TreeLoRA(model, adapter=adapter)
    else:
        with pytest.raises(ValueError, match=words) as told: TreeLoRA(model, adapter=adapter)
        assert "loss.backward" not in str(told.value) and "\n" not in str(told.value)
    assert same(state(model), before)


def test_while_the_adapters_are_off():
    for model in (make(), ours()):
        with adapters_off(model), pytest.raises(ValueError, match="switched off"): TreeLoRA(model)
        TreeLoRA(model)


LATER = {  # what is done to the model between two tasks
    "frozen": (lambda m: m.requires_grad_(False), "is frozen"),
    "merged": (lambda m: m.merge_adapter(), "call model.unmerge_adapter"),
    "another adapter": (lambda m: (m.add_adapter("old", config()), m.set_adapter("old")), "not active"),
    "a layer more": (lambda m: add_lora(m.base_model.model, ["head"], r=2, alpha=2), r"have changed since this TreeLoRA was made \(new: 'base_model.model.head'\)"),
    "a layer less": (lambda m: setattr(m.base_model.model, "a", nn.Linear(6, 8)), r"\(gone: 'base_model.model.a'\)"),
    "made anew": (lambda m: (m.add_adapter("old", config()), m.delete_adapter("default"), m.add_adapter("default", config()), m.set_adapter("default")),
                  r"\(other: 'base_model.model.a'\); make it anew"),
}


@pytest.mark.parametrize("case", LATER)
def test_when_a_task_begins(case):
    act, words = LATER[case]
    tl = TreeLoRA(make())
    train(tl, "one")
    act(tl.model)
    before = state(tl.model)
    with pytest.raises(ValueError, match=words): tl.task("two")
    assert same(state(tl.model), before) and tl.bank.names == ["one"] and tl._now is None


def test_merged_adapters_take_no_others(tmp_path):
    tl = TreeLoRA(make())
    right = train(tl, "one")
    train(tl, "two", 1)
    tl.model.merge_adapter()
    before = state(tl.model)
    for act in (lambda: tl.load_adapter("one"), lambda: tl.save(tmp_path), tl.state, lambda: push(tl, tmp_path / "p", license="mit"),
                lambda: tl.serving(torch.zeros(32, dtype=torch.long)).__enter__()):
        with pytest.raises(ValueError, match="merged into|unmerge"): act()
    assert same(state(tl.model), before) and not any(tmp_path.rglob("*.json"))
    tl.model.unmerge_adapter()
    tl.load_adapter("one")
    assert torch.allclose(answers(tl.model), right, atol=1e-6)


# Compiled models

@pytest.mark.slow
def test_states_of_compiled_and_plain_models_fit(tmp_path):
    model = make()
    compiled = torch.compile(model, backend="eager")
    tl = TreeLoRA(compiled)
    right = train(tl, "one", model=compiled)
    train(tl, "two", 1, model=compiled)
    push(tl, tmp_path, license="mit")
    assert "_orig_mod" not in (tmp_path / "treelora.json").read_text(encoding="utf-8") and tl.layout.names == TreeLoRA(make()).layout.names
    for other in (make(), torch.compile(make(), backend="eager")):
        again = pull(tmp_path, other)
        again.load_adapter("one")
        assert torch.equal(answers(other), right)
    assert torch.equal(answers(PeftModel.from_pretrained(net(), str(tmp_path), subfolder="tasks/1-one")), right)
    with torch.no_grad(), tl.serving(torch.arange(32) % 2): mixed = compiled(X)
    tl.load_adapter("one")
    assert torch.allclose(mixed[::2], right[::2], atol=1e-6) and not torch.allclose(mixed[1::2], right[1::2], atol=1e-3)


def test_parts_that_are_compiled():
    model = make()
    model.base_model.model.a = torch.compile(model.base_model.model.a, backend="eager")
    names = [x.name for x in lora_layers(model)]
    assert names == [x.name for x in lora_layers(make())] and list(base_weights(model)) == list(base_weights(make()))
    tl = TreeLoRA(model)
    assert torch.isfinite(train(tl, "one")).all()
    ModelRecord(make()).check(tl.state()[0]["model"])


# Quantised layers: a stand-in with the marks of bitsandbytes

class Params4bit(nn.Parameter):
    quant_state = None


class Linear4bit(nn.Linear):
    "Weights that are kept as whole numbers of 4 bits, and computed with as floats."
    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        scale = linear.weight.abs().max() / 7
        self.weight = Params4bit((linear.weight / scale).round().to(torch.int8), requires_grad=False)
        self.bias, self.unit = linear.bias, scale.item()

    def forward(self, x): return nn.functional.linear(x, self.weight.float() * self.unit, self.bias)


def quantised(seed=0):
    model = make(seed)
    for layer in (model.base_model.model.a, model.base_model.model.b): layer.base_layer = Linear4bit(layer.base_layer).requires_grad_(False)
    return model


def test_quantised_bases_work_below_peft_and_are_refused_by_add_lora(tmp_path):
    tl = TreeLoRA(quantised())
    right = train(tl, "one")
    train(tl, "two", 1)
    tl.save(tmp_path)
    again = TreeLoRA.load(tmp_path, other := quantised())
    again.load_adapter("one")
    assert torch.equal(answers(other), right)
    with torch.no_grad(), again.serving(torch.zeros(32, dtype=torch.long)): assert torch.allclose(other(X), right, atol=1e-6)
    with pytest.raises(ValueError, match="[2-6] of 6 frozen weights"): TreeLoRA.load(tmp_path, quantised(1))
    with pytest.raises(ValueError, match="another base model"): TreeLoRA.load(tmp_path, make())
    model = net()
    model.a = Linear4bit(model.a)
    with pytest.raises(ValueError, match="Linear4bit is quantised; adapt it with PEFT"): add_lora(model, "a", r=2, alpha=2)
    assert isinstance(model.a, Linear4bit)
    with pytest.raises(ValueError, match="quantised"): LoRALinear(nn.Linear(4, 4).to(torch.float8_e4m3fn), 2, 2)


# A bank on another model

@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "A bank of two tasks in a folder, its TreeLoRA, and the first task's answers."
    tl = TreeLoRA(make())
    right = train(tl, "one")
    train(tl, "two", 1)
    push(tl, folder := tmp_path_factory.mktemp("bank"), license="mit")
    return folder, tl, right


def merged_before(tl): return get_peft_model(deepcopy(tl.model).merge_and_unload(), config())


def one_row_changed():
    model = make()
    with torch.no_grad(): model.base_model.model.b.base_layer.weight[3] += 1e-3
    return model


def in_and_out():
    model = noisy(make())
    model.merge_adapter(), model.unmerge_adapter()
    for layer, fresh in zip(lora_layers(model), lora_layers(make())): layer.B.data.zero_(), layer.A.data.copy_(fresh.A.data)
    return model


def beside_another():
    model = make()
    model.add_adapter("more", config(target_modules=["head"]))
    return model


OTHERS = {  # a model, the words of the sentence, and whether base_changed="allow" helps; None: it loads
    "the same": (lambda tl: make(), None, None),
    "half precision": (lambda tl: make().bfloat16(), None, None),
    "double precision": (lambda tl: make().double(), None, None),
    "merged and taken out": (lambda tl: in_and_out(), None, None),
    "beside another adapter": (lambda tl: beside_another(), None, None),
    "frozen": (lambda tl: make().requires_grad_(False), None, None),
    "another alpha": (lambda tl: make(lora_alpha=32), r"LoRA x 4.0 \(kind and scale\) in layer 'base_model.model.a', but this model's is LoRA x 16.0", False),
    "one layer's alpha": (lambda tl: make(alpha_pattern={"b": 2}), "in layer 'base_model.model.b', but this model's is LoRA x 1.0", False),
    "rsLoRA": (lambda tl: make(use_rslora=True), "LoRA x 4.0.*LoRA x 5.65.*same lora_alpha, r, use_rslora and use_dora", False),
    "DoRA": (lambda tl: make(use_dora=True), "DoRA x 4.0|another model", False),
    "a bias": (lambda tl: make(lora_bias=True), r"a bias of its own \(lora_bias\) x 4.0|another model", False),
    "another base": (lambda tl: make(1), r"another base model: 6 of 6 frozen weights differ, such as base_model.model.a.weight \(other values\).*base_changed=.allow", True),
    "merged before": (merged_before, "another base model: 2 of 6 frozen weights differ", True),
    "one row changed": (lambda tl: one_row_changed(), r"1 of 6 frozen weights differ, such as base_model.model.b.weight", True),
}


@pytest.mark.parametrize("load", [TreeLoRA.load, pull])
@pytest.mark.parametrize("case", OTHERS)
def test_a_bank_on_another_model(saved, case, load):
    folder, tl, right = saved
    build, words, insist = OTHERS[case]
    model, files = build(tl), {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    before = state(model)
    if words is None:
        again = load(folder, model)
        again.load_adapter("one")
        assert (answers(model) - right).abs().max() < (1e-5 if model.base_model.model.head.weight.dtype != torch.bfloat16 else 0.05)
    else:
        with pytest.raises(ValueError, match=words): load(folder, model)
        assert same(state(model), before)
        if insist: assert load(folder, model, base_changed="allow").bank.names == ["one", "two"]
        else:
            with pytest.raises(ValueError): load(folder, model, base_changed="allow")
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == files


def test_states_are_compared_too(saved):
    plain, tensors = saved[1].state()
    for model, words in ((make(lora_alpha=32), "LoRA x 16.0"), (make(1), "another base model")):
        other = TreeLoRA(model)
        before = state(model)
        with pytest.raises(ValueError, match=words): other.restore(plain, tensors)
        assert same(state(model), before) and other.bank.names == []
    other.restore(plain, tensors, base_changed="allow")
    assert other.bank.names == ["one", "two"]
    with pytest.raises(ValueError, match='base_changed=\'no\' must be "refuse" or "allow"'): other.restore(plain, tensors, base_changed="no")


def test_our_own_layers(tmp_path):
    tl = TreeLoRA(ours())
    right = train(tl, "one")
    tl.save(tmp_path)
    TreeLoRA.load(tmp_path, again := ours())
    assert torch.equal(answers(again), right)
    with pytest.raises(ValueError, match="LoRA x 4.0.*LoRA x 2.0"): TreeLoRA.load(tmp_path, ours(alpha=4))
    with pytest.raises(ValueError, match="another base model"): TreeLoRA.load(tmp_path, ours(1))


def test_files_of_before_still_load(saved, tmp_path):
    plain, tensors = saved[1].state()
    del plain["model"]
    other = TreeLoRA(make(1, lora_alpha=32))
    other.restore(json.loads(json.dumps(plain)), tensors)
    assert other.bank.names == ["one", "two"]


@pytest.mark.parametrize("change", [lambda r: [], lambda r: r | {"adapters": 3}, lambda r: {"base": r["base"]}, lambda r: r | {"base": {"a": 1}},
                                    lambda r: r | {"base": {"a": "float32 2 ffff 1"}}, lambda r: r | {"base": {"a": "float32 x - 0 0 0 0 0 0"}}])
def test_a_damaged_record_is_named(change):
    record = ModelRecord(make())
    with pytest.raises(ValueError, match="What the state says of its model is damaged"): record.check(change(record.describe()))


def test_a_frozen_model_answers_and_does_not_train(saved):
    folder, _, right = saved
    model = make().requires_grad_(False)
    tl = TreeLoRA.load(folder, model)
    tl.load_adapter("one")
    assert torch.equal(answers(model), right)
    with pytest.raises(ValueError, match="is frozen in 2 of 2 layers"): tl.task("three")


def test_what_trains_outside_the_adapter_may_differ(tmp_path):
    model = make()
    model.base_model.model.head.requires_grad_(True)
    tl = TreeLoRA(model, shared="head")
    train(tl, "one")
    tl.save(tmp_path)
    other = make()
    with torch.no_grad(): other.base_model.model.head.weight.add_(1)
    assert TreeLoRA.load(tmp_path, other).bank.names == ["one"]


def test_heads_that_peft_replaces_may_differ():
    model, other = (get_peft_model(net(), config(modules_to_save=["head"])) for _ in range(2))
    with torch.no_grad(): other.base_model.model.head.original_module.weight.add_(1)
    assert not any("head" in name for name in base_weights(model))
    ModelRecord(other).check(ModelRecord(model).describe())


# What is remembered of a weight

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.bool, torch.int64, torch.complex64]


@pytest.mark.parametrize("dtype", TYPES)
def test_weights_of_all_types(dtype):
    for shape in ((), (0,), (1,), (5,), (7, 9), (3, 4, 5)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(3).to(dtype)
        w = Weight.of(x)
        assert from_text(as_text(w)).code == w.code and difference(from_text(as_text(w)), w) is None
        assert len(w.numbers) == 6 and Weight.of(x.clone()) == w


def test_the_checksum_is_of_all_bits():
    x = torch.randn(1001, generator=torch.Generator().manual_seed(0))
    for i in (0, 1, 500, 999, 1000):
        y = x.clone()
        y.view(torch.int32)[i] ^= 1
        assert checksum(y) != checksum(x)
    assert checksum(torch.cat([torch.zeros(1), x])[1:]) == checksum(x) == checksum(x.repeat(2, 1).T.contiguous().T[0].contiguous())
    assert Weight.of(torch.ones(3, 5).T).code == Weight.of(torch.ones(5, 3)).code


def test_what_cannot_be_read_is_compared_by_shape():
    away = Weight.of(torch.empty(3, 4, device="meta"))
    assert difference(away, Weight.of(torch.ones(3, 4))) is None and difference(away, Weight.of(torch.ones(4, 3))) == "another shape"


def test_two_tiny_language_models(tiny_llama, tmp_path):
    "Tied weights, names as in use; the record is the same for a copy and differs in one number of one weight."
    model = deepcopy(tiny_llama(0))
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    record = ModelRecord(peft)
    plain = json.loads(json.dumps(record.describe()))
    record.check(plain)
    assert len(plain["adapters"]) == 4 and not any("lora" in n or "base_layer" in n for n in plain["base"])
    other = get_peft_model(deepcopy(tiny_llama(0)), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    other.get_base_model().model.layers[1].mlp.up_proj.weight.data[5, 5] += 0.01
    with pytest.raises(ValueError, match=r"1 of \d+ frozen weights differ, such as base_model.model.model.layers.1.mlp.up_proj.weight"): ModelRecord(other).check(plain)


# Adapters beside each other, and adapters by row

def test_frozen_adapters_stay_frozen_and_off_layers_off():
    tl = TreeLoRA(with_two())
    old = {n: p.detach().clone() for n, p in tl.model.named_parameters() if ".old." in n}
    opt, y = torch.optim.SGD([p for p in tl.model.parameters() if p.requires_grad], 0.1), (X[:, 0] * 2).long().clamp(0, 2)
    flags = {n: p.requires_grad for n, p in tl.model.named_parameters()}
    with tl.task("one"):
        for _ in range(3):
            with adapters_off(tl.model): assert torch.allclose(answers(tl.model), answers(net()), atol=1e-6)
            assert flags == {n: p.requires_grad for n, p in tl.model.named_parameters()}
            cross_entropy(tl.model(X), y).backward()
            tl.step(), opt.step(), opt.zero_grad()
    assert all(torch.equal(p, old[n]) for n, p in tl.model.named_parameters() if n in old)


@pytest.mark.parametrize("build", [lambda: noisy(make()), lambda: noisy(ours())])
def test_contexts_in_contexts(build):
    model = build()
    on, plain = answers(model), answers(net())
    with adapters_off(model):
        with adapters_off(model): pass
        assert torch.allclose(answers(model), plain, atol=1e-6)
    assert torch.equal(answers(model), on)


SERVED = {
    "plain": (lambda: make(), None), "rsLoRA": (lambda: make(use_rslora=True), None), "ours": (lambda: ours(), None),
    "DoRA": (lambda: make(use_dora=True), "one has DoRA"), "lora_bias": (lambda: make(lora_bias=True), r"one has a bias of its own \(lora_bias\)"),
    "a second adapter": (lambda: with_two(), r"one has other active adapters, too \(old\)"), "merged": (lambda: merged(make()), "unmerge"),
}


@pytest.mark.parametrize("case", SERVED)
def test_adapters_by_row(case):
    build, words = SERVED[case]
    model = noisy(build())
    layers, right, before = lora_layers(model), answers(model), state(model)
    pairs = [(x.A.detach()[None], x.B.detach()[None]) for x in layers]
    served = row_adapters(model, [x.name for x in layers], pairs, torch.zeros(32, dtype=torch.long))
    if words is None:
        with served: assert torch.allclose(answers(model), right, atol=1e-6)
    else:
        with pytest.raises(ValueError, match=f"{words}.*run the model once a task instead"):
            with served: pass
    assert same(state(model), before) and torch.equal(answers(model), right)


def test_a_record_leaves_the_weights_own_storage_alone(tmp_path):
    "Storage that NumPy has seen can never be resized again, which is what FSDP does after each backward pass."
    model = ours()
    tl = TreeLoRA(model)
    train(tl, "one")
    tl.save(tmp_path)
    fingerprint(model), weights_sha256(base_weights(model))
    assert all(x.untyped_storage().resizable() for x in base_weights(model).values())
