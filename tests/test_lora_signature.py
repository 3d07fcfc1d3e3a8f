"LoRA layers and the matrix view on them: PEFT, fused projections, ragged layers, half precision."
import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from treelora.lora import LoRALinear, add_lora, adapters_off, lora_layers, row_adapters
from treelora.signature import SIGNATURES, Layout, Rows


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(0, 10 ** 6))
def test_equals_peft(r, d_in, d_out, seed):
    torch.manual_seed(seed)
    theirs = get_peft_model(nn.Sequential(nn.Linear(d_in, d_out)), LoraConfig(r=r, lora_alpha=3, target_modules=["0"]))
    module, ours = theirs.base_model.model[0], LoRALinear(nn.Linear(d_in, d_out), r, 3)
    with torch.no_grad():
        ours.lora_B.normal_()
        ours.base.load_state_dict(module.base_layer.state_dict())
        module.lora_A["default"].weight.copy_(ours.lora_A)
        module.lora_B["default"].weight.copy_(ours.lora_B[0])
    x = torch.randn(5, d_in)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)


@pytest.mark.parametrize("parts", [("k", "v"), ("q",), ("v", "q"), ("q", "k", "v")])
def test_parts_touch_only_their_slices(parts):
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(4, 9), 2, 2, parts)
    with torch.no_grad(): layer.lora_B.normal_()
    x = torch.randn(3, 4)
    moved = (layer(x) - layer.base(x)).abs().sum(0).view(3, 3).sum(1) > 0
    assert {p for p, m in zip("qkv", moved.tolist()) if m} == set(parts)
    expected = layer.base(x)
    for i, p in enumerate(parts):
        s = "qkv".index(p) * 3
        expected[:, s:s + 3] += x @ layer.lora_A[2 * i:2 * i + 2].T @ layer.lora_B[i].T
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_blocks_and_freezing():
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleDict({"qkv": nn.Linear(4, 12)}) for _ in range(3)), "head": nn.Linear(4, 2)})
    add_lora(model, "qkv", 2, 2, blocks=[0, 2])
    assert [l.name for l in lora_layers(model)] == ["blocks.0.qkv", "blocks.2.qkv"]
    assert {n.split(".")[-1] for n, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    with pytest.raises(ValueError, match="No linear layer named 'fc'"): add_lora(model, "fc", 2, 2)
    assert len(lora_layers(model)) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_round_trip(dtype):
    torch.manual_seed(0)
    model = add_lora(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)).to(dtype), ["0", "1"], 2, 2)
    layout = Layout(lora_layers(model))
    assert layout.sizes == [16, 14] and layout.width == 16
    with torch.no_grad():
        for p in layout.params: p.normal_()
    rows = Rows(layout).load_([p.detach() for p in layout.params])
    assert rows.matrix.dtype == torch.float32 and (rows.matrix[1, 14:] == 0).all()
    out = [torch.zeros_like(p) for p in layout.params]
    rows.store_to(out)
    assert all(torch.equal(a, b) for a, b in zip(out, layout.params))
    rows.add_to(out, -1.0)
    assert all((a == 0).all() for a in out)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_their_definitions(name):
    torch.manual_seed(0)
    model = add_lora(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), ["0", "1"], 2, 2)
    layout = Layout(lora_layers(model))
    signature, thetas, grads = SIGNATURES[name](layout), [], []
    signature.begin(layout.params)
    flat = lambda tensors: Rows(layout).load_([t.detach() for t in tensors]).matrix.clone()
    start = flat(layout.params)
    for t in range(6):
        with torch.no_grad():
            for p in layout.params: p.add_(torch.randn_like(p))
        gs = [torch.randn_like(p) for p in layout.params]
        signature.observe([p.detach() for p in layout.params], gs, recent=t >= 4)
        thetas.append(flat(layout.params)), grads.append(flat(gs))
    want = {"grad": torch.stack(grads).mean(0), "update": thetas[-1] - start,
            "weight": torch.stack(thetas[4:]).mean(0) * layout.a_mask()}[name]
    assert torch.allclose(signature.value(), want, atol=1e-5)
    other = torch.randn_like(want)
    assert torch.allclose(signature.distance(other, torch.empty_like(other)), (want - other).abs().sum(1), rtol=1e-4)


def test_adapters_off_restores_after_an_error():
    torch.manual_seed(0)
    model = add_lora(nn.Sequential(nn.Linear(3, 3)), "0", 2, 2)
    with torch.no_grad(): model[0].lora_B.normal_()
    x = torch.randn(2, 3)
    on = model(x)
    with pytest.raises(RuntimeError):
        with adapters_off(model):
            assert torch.equal(model(x), model[0].base(x))
            raise RuntimeError
    assert torch.equal(model(x), on)


def test_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="no LoRA layers"): lora_layers(nn.Linear(2, 2))


# Modules that read a layer's weight instead of calling the layer

class BeitQKV(nn.Module):
    "timm's attention of BEiT, alone."
    def __init__(self):
        super().__init__()
        from timm.models.beit import Attention
        self.attn = Attention(12, num_heads=2, qkv_bias=True)

    def forward(self, x): return self.attn(x)


class SelfAttention(nn.Module):
    def __init__(self): super().__init__(); self.attn = nn.MultiheadAttention(12, 2, batch_first=True)
    def forward(self, x): return self.attn(x, x, x)[0]


READERS = [(SelfAttention, "out_proj", None), (BeitQKV, "qkv", None), (BeitQKV, "qkv", ("k", "v")),
           (lambda: nn.TransformerEncoderLayer(12, 2, 16, 0.0, batch_first=True), ["linear1", "linear2", "out_proj"], None),
           (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 16, 0.0, batch_first=True), 2), "linear1", None)]


@pytest.mark.parametrize("build, target, parts", READERS)
@pytest.mark.parametrize("training", [True, False])
def test_the_adapter_acts_where_weights_are_read(build, target, parts, training):
    "The same numbers, and gradients, as a model whose weights hold the correction."
    torch.manual_seed(0)
    model = build().train(training)
    merged, plain = copy.deepcopy(model), copy.deepcopy(model)
    add_lora(model, target, 2, 4, parts=parts)
    x = torch.randn(3, 5, 12)
    adapted = {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    for name, layer in adapted.items():
        with torch.no_grad():
            layer.lora_B.normal_()
            merged.get_submodule(name).weight += layer.spread(layer.delta(torch.eye(layer.base.in_features))).T
    for grad in (torch.enable_grad(), torch.no_grad()):
        with grad:
            assert torch.allclose(model(x), merged(x), atol=1e-5) and not torch.allclose(model(x), plain(x), atol=1e-2)
            with adapters_off(model): assert torch.allclose(model(x), plain(x), atol=1e-6)
    model(x).square().sum().backward(), merged(x).square().sum().backward()
    for name, layer in adapted.items():
        full = merged.get_submodule(name).weight.grad
        assert layer.lora_A.grad.abs().sum() > 0 and layer.base.weight.grad is None
        if parts is None: assert torch.allclose(layer.lora_B.grad[0], full @ layer.lora_A.T * layer.scale, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("build, target", [(READERS[3][0], "linear1"), (SelfAttention, "out_proj")])
def test_rows_of_many_tasks_are_right_or_refused(build, target):
    "A layer that is called serves rows; one whose weight alone is read cannot."
    torch.manual_seed(0)
    model, x = add_lora(build(), target, 2, 4).eval(), torch.randn(3, 5, 12)
    layer, = lora_layers(model)
    pairs = [(torch.randn(2, *layer.A.shape), torch.randn(2, *layer.B.shape))]
    try:
        with torch.no_grad(), row_adapters(model, [layer.name], pairs, torch.tensor([0, 1, 0])): mixed = model(x)
    except ValueError as error: mixed, said = None, str(error)
    if target == "out_proj": assert mixed is None and "reads an adapted layer's weight" in said and "once per task" in said
    with torch.no_grad():
        for k, rows in ((0, [0, 2]), (1, [1])):
            layer.A.copy_(pairs[0][0][k]), layer.B.copy_(pairs[0][1][k])
            own = model(x)[rows]  # by_row is over: the weight can be read again
            assert mixed is None or torch.allclose(own, mixed[rows], atol=1e-5)
