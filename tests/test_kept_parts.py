"What is kept beside A and B goes with the adapter: abort, resume, starts, merges, serving, routing, files, and PEFT's names."
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy

from treelora.algorithm import TreeLoRA
from treelora.engine.checkpoint import peft_names, read_peft, write_peft
from treelora.learning.hub import push, task_folder
from treelora.lora import adapters_off, add_lora

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
HEAD = dict(modules_to_save=["head"])
PARTS = {"head": HEAD, "DoRA": dict(use_dora=True), "biases": dict(bias="lora_only"), "lora_bias": dict(lora_bias=True), "all": dict(use_dora=True, bias="all", **HEAD)}


class Net(nn.Module):
    def __init__(self, norm=False):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        if norm: self.head = nn.Sequential(nn.BatchNorm1d(8), self.head)

    def forward(self, x): return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


def base(**how) -> nn.Module:
    torch.manual_seed(1)
    return Net(**how)


def net(options=HEAD, name="default", **how) -> nn.Module:
    torch.manual_seed(2)
    return get_peft_model(base(**how), LoraConfig(r=2, target_modules=["a", "b"], **options), adapter_name=name)


def labels(k): return (X[:, k % 6] * 2).long().clamp(0, 2)


def step(tl, k, optimizer, extra=None):
    cross_entropy(tl.model(X), labels(k)).backward()
    tl.step(extra)
    optimizer.step()
    optimizer.zero_grad()


def opt(tl): return torch.optim.SGD([p for p in tl.model.parameters() if p.requires_grad], 0.1)


def learn(tl, name, k, steps=8, look=False) -> torch.Tensor:
    "The logits right after a task."
    optimizer = opt(tl)
    with tl.task(name):
        if tl.signature == "reference": tl.refer(lambda i: cross_entropy(tl.model(X[i::3]), labels(k)[i::3]))
        while look and tl.look(lambda i: cross_entropy(tl.model(X), labels(k))): pass
        for _ in range(steps): step(tl, k, optimizer, lambda: cross_entropy(tl.model(X), labels(k)))
    return out(tl)


def out(tl) -> torch.Tensor: return tl.model(X).detach()


def trained(options=HEAD, tasks=2, **settings):
    tl = TreeLoRA(net(options), lam=0.01, **settings)
    return tl, {f"t{k}": learn(tl, f"t{k}", k) for k in range(tasks)}


@pytest.mark.parametrize("options", PARTS.values(), ids=PARTS)
def test_there_and_back(options, tmp_path):
    tl, wanted = trained(options, bank_folder=tmp_path)  # in a mapped file
    tl.save(tmp_path / "s")
    for its in (tl, TreeLoRA.load(tmp_path / "s", net(options))):
        for task, logits in wanted.items():
            its.load_adapter(task)
            assert torch.equal(out(its), logits)
    assert tl.bank.stored_bytes == sum(x.numel() * x.element_size() for x in tl.bank.blocks.values()) and len(tl.kept) == tl.bank.blocks["kept"].shape[1]


@pytest.mark.parametrize("options", PARTS.values(), ids=PARTS)
def test_a_task_that_fails_leaves_no_trace(options):
    tl, wanted = trained(options)
    before = {n: x.clone() for n, x in tl.model.state_dict().items()}
    with pytest.raises(RuntimeError), tl.task("broken"):
        for _ in range(3): step(tl, 4, opt(tl))
        raise RuntimeError
    assert all(torch.equal(x, before[n]) for n, x in tl.model.state_dict().items()) and tl.bank.names == ["t0", "t1"]


@pytest.mark.parametrize("init", ["last", "fresh"])
def test_where_a_task_starts(init):
    tl, wanted = trained(PARTS["all"], init=init)
    optimizer = opt(tl)
    with tl.task("new"):
        assert torch.equal(out(tl), wanted["t1"] if init == "last" else net(PARTS["all"])(X))
        step(tl, 3, optimizer)


def test_the_branch_brings_its_head():
    tl, wanted = trained(PARTS["all"], tasks=3, signal="loss", init="branch")
    with tl.task("t1 once more"):
        now = out(tl)
        while tl.look(lambda i: cross_entropy(tl.model(X), labels(1))): assert torch.equal(out(tl), now)
        assert tl.found["branch"] == "t1" and torch.equal(out(tl), wanted["t1"])
        step(tl, 1, opt(tl), lambda: cross_entropy(tl.model(X), labels(1)))


def test_a_mixed_branch_takes_each_part_from_its_layer():
    tl, _ = trained(PARTS["all"])
    tl.live.become(torch.tensor([0, 1]))
    first, second = (tl.bank.blocks["kept"][k] for k in (0, 1))
    now, layer = tl.kept.read(), dict(zip(tl.kept.parts, tl.kept.layers))
    for name, span in zip(tl.kept.parts, tl.kept.spans):
        assert layer[name] == (0 if ".a." in name else 1) and torch.equal(now[span], (first if ".a." in name else second)[span]), name


def test_signatures_and_pull_stay_on_a_and_b():
    with_head, _ = trained()
    assert with_head.bank.signatures.shape == (2, 2, 32)
    head = with_head.model.base_model.model.head.modules_to_save["default"]
    with with_head.task("pulled"):
        cross_entropy(with_head.model(X), labels(2)).backward()
        grad = head.weight.grad.clone()
        with_head.step()
        assert torch.equal(head.weight.grad, grad)


@pytest.mark.parametrize("cut", [0, 3])
def test_resume_in_the_middle_of_a_task(cut):
    "State of a task that runs, in the middle or right at its start."
    whole, cutoff = (trained(PARTS["all"])[0] for _ in range(2))
    for tl in (whole, cutoff):
        optimizer = opt(tl)
        with tl.task("t2"):
            for i in range(6):
                if tl is cutoff and i == cut:
                    plain, tensors = tl.state()
                    saved = json.dumps(plain)
                    state = json.loads(saved), {n: x.clone() for n, x in tensors.items()}
                step(tl, 2, optimizer)
    new = TreeLoRA(net(PARTS["all"]), lam=0.01)
    new.restore(*state)
    with new.task("t2"):
        for _ in range(cut, 6): step(new, 2, opt(new))
    assert torch.equal(out(new), out(whole)) and all(torch.equal(x, new.bank.blocks[k]) for k, x in whole.bank.blocks.items())
    again = TreeLoRA(net(PARTS["all"]), lam=0.01)
    again.restore(json.loads(saved), state[1])
    with pytest.raises(RuntimeError), again.task("t2"): raise RuntimeError
    assert torch.equal(out(again), trained(PARTS["all"])[1]["t1"])  # aborted after the resume: as before the task


def test_merged_tasks_share_the_mean():
    tl, _ = trained(tasks=2)
    rows = tl.bank.blocks["kept"].clone()
    tl.bank.merge("t0", "t1")
    assert torch.equal(tl.bank.blocks["kept"], rows.mean(0, keepdim=True))
    tl, _ = trained(tasks=4, budget=2)
    assert len(tl.bank.blocks["kept"]) == 2 and tl.bank.names == ["t0", "t1", "t2", "t3"]
    for name in tl.bank.names: tl.load_adapter(name)


@pytest.mark.parametrize("options", PARTS.values(), ids=PARTS)
def test_serving_is_refused_before_anything_changes(options):
    tl, wanted = trained(options)
    with pytest.raises(ValueError, match=r"serving\(\) answers each row with its own A and B, but this model also keeps .* per task"): tl.serving(torch.tensor([0, 1]))
    assert torch.equal(out(tl), wanted["t1"])


def test_serving_where_all_rows_keep_the_same():
    tl, _ = trained()
    tl.bank.blocks["kept"][:] = tl.bank.blocks["kept"][1]
    with tl.serving(torch.tensor([0] * 16 + [1] * 16)): mixed = out(tl)
    for k, rows in ((0, slice(16)), (1, slice(16, 32))):
        tl.load_adapter(f"t{k}")
        assert torch.allclose(mixed[rows], out(tl)[rows], atol=1e-6)


def test_routed_answers_go_task_by_task():
    tl = TreeLoRA(net(PARTS["all"]), lam=0.01, inference="routed")
    seen = lambda x: tl.model.base_model.model.a(x)  # a feature that the adapter and the biases change
    wanted = {}
    for k in range(2):
        with tl.task(f"t{k}"):
            for _ in range(8): step(tl, k, opt(tl))
            with tl.unadapted(), torch.no_grad(): tl.record_features(seen(X + 9 * k))
        wanted[k] = tl.model(X + 9 * k).detach()
    mixed = torch.cat([X[:5], X[:7] + 9])
    answers = tl.infer(mixed, tl.model, seen)
    assert torch.allclose(answers, torch.cat([wanted[0][:5], wanted[1][:7]]), atol=1e-6)
    assert torch.equal(tl.model(X + 9).detach(), wanted[1])  # and the model is as it was


def test_the_reference_stands_at_the_first_head():
    tl, _ = trained(signature="reference")
    alone = TreeLoRA(net(), lam=0.01, signature="reference")
    learn(alone, "t1", 1)
    assert torch.allclose(alone.bank.signatures[0], tl.bank.signatures[1], atol=1e-6)


@pytest.mark.parametrize("options", [HEAD, {}], ids=["kept head", "frozen head"])
def test_running_means(options, tmp_path):
    tl = TreeLoRA(net(options, norm=True), lam=0.01)
    wanted = {}
    for k, name in enumerate(("one", "two")):
        optimizer = opt(tl)
        with tl.task(name):
            for _ in range(8): step(tl.model.train() and tl, k, optimizer)
        wanted[name] = tl.model.eval()(X).detach()
    push(tl, tmp_path, license="mit")
    for name in wanted:
        tl.load_adapter(name)
        alone = PeftModel.from_pretrained(base(norm=True), str(tmp_path), subfolder=task_folder(tl, name)).eval()
        assert torch.equal(tl.model.eval()(X), wanted[name]) and torch.equal(alone(X), wanted[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_parts_of_other_types_lose_nothing(dtype):
    model = net()
    head = model.base_model.model.head.modules_to_save["default"].to(dtype)
    model.base_model.model.head.register_forward_pre_hook(lambda module, args: (args[0].to(dtype),))
    head.register_forward_hook(lambda module, args, made: made.float())
    tl = TreeLoRA(model, lam=0.01)
    wanted = learn(tl, "one", 0)
    learn(tl, "two", 1)
    tl.load_adapter("one")
    assert torch.equal(out(tl), wanted) and tl.kept.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("name", ["default", "a", "lora", "m", "model", "b", "weight", "modules_to_save"])
@pytest.mark.parametrize("options", [{}, PARTS["all"]], ids=["plain", "all"])
def test_an_adapter_may_be_called_anything(name, options, tmp_path):
    tl = TreeLoRA(net(options, name), lam=0.01, adapter=name)
    wanted = {f"t{k}": learn(tl, f"t{k}", k) for k in range(2)}
    push(tl, tmp_path, license="mit")
    theirs = get_peft_model_state_dict(net(options))  # for an adapter that is called "default"
    theirs = {n for n in theirs if "modules_to_save" not in n and "original_module" not in n}  # biases that PEFT names wrongly; they are there twice
    for task, logits in wanted.items():
        assert set(load_file(tmp_path / task_folder(tl, task) / "adapter_model.safetensors")) == theirs
        assert torch.equal(PeftModel.from_pretrained(base(), str(tmp_path), subfolder=task_folder(tl, task))(X), logits)


@pytest.mark.parametrize("options", [{}, PARTS["all"]], ids=["plain", "all"])
def test_a_compiled_model_is_shared_as_a_plain_one(options, tmp_path):
    model = torch.compile(net(options), backend="eager")
    tl = TreeLoRA(model, lam=0.01)
    wanted = {f"t{k}": learn(tl, f"t{k}", k) for k in range(2)}
    push(tl, tmp_path, license="mit")
    assert not any("_orig_mod" in n for n in [*tl.kept.parts, *load_file(tmp_path / "adapter_model.safetensors")])
    for task, logits in wanted.items():
        tl.load_adapter(task)
        assert torch.equal(out(tl), logits)
        assert torch.allclose(PeftModel.from_pretrained(base(), str(tmp_path), subfolder=task_folder(tl, task))(X), logits, atol=1e-6)


def test_nothing_more_is_written_where_nothing_more_is_kept(tmp_path):
    tl, _ = trained({})
    tl.save(tmp_path)
    plain = json.loads((tmp_path / "treelora.json").read_text())
    assert "kept" not in plain and set(load_file(tmp_path / plain["tensors"])) >= {"adapters", "signatures", "initial", "current"}
    assert not any("kept" in n for n in load_file(tmp_path / plain["tensors"])) and not {"keep", "shared"} & set(plain["config"])
    assert list(tl.state()[1]) == list(load_file(tmp_path / plain["tensors"]).keys()) or not any("kept" in n for n in tl.state()[1])


def test_files_of_another_model(tmp_path):
    tl, _ = trained()
    tl.save(tmp_path / "head")
    trained({})[0].save(tmp_path / "plain")
    for folder, options in (("head", {}), ("plain", HEAD), ("head", PARTS["all"])):
        model = net(options)
        before = {n: x.clone() for n, x in model.state_dict().items()}
        with pytest.raises(ValueError, match="of another model: beside the LoRA layers it keeps .* per task, this model"): TreeLoRA.load(tmp_path / folder, model)
        assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    plain, tensors = tl.state()
    other = TreeLoRA(net({}))
    with pytest.raises(ValueError, match="beside the LoRA layers it keeps"): other.restore(plain, tensors)
    assert len(other.bank) == 0


@pytest.mark.parametrize("change, words", [({"kept": 3}, "is damaged"), ({"kept": {"keep": "adapter"}}, "is damaged"), ({"kept": {"keep": 1, "shared": [], "parts": []}}, "is damaged"),
                                           ({"kept": {"keep": "all", "shared": [[]], "parts": []}}, "is damaged"), ({"kept": {"keep": "all", "shared": [], "parts": [1]}}, "is damaged"),
                                           ({"kept": {"keep": "most", "shared": [], "parts": []}}, "Unknown keep 'most'"), ({"kept": {"keep": "all", "shared": [], "parts": []}}, "it keeps nothing per task")])
def test_files_that_say_odd_things_of_what_is_kept(change, words, tmp_path):
    trained()[0].save(tmp_path)
    index = tmp_path / "treelora.json"
    index.write_text(json.dumps({k: v for k, v in json.loads(index.read_text()).items() if k != "digest"} | change))
    with pytest.raises(ValueError, match=words): TreeLoRA.load(tmp_path, net())


def test_kept_tensors_of_another_size():
    tl, _ = trained()
    _, tensors = tl.state()
    for name in ("kept", "kept.initial", "kept.current"):
        for odd in ({name: tensors[name][..., :-1]}, {name: tensors[name] * float("nan")}, {name: tensors[name].long()}):
            with pytest.raises(ValueError, match=f"{name} of shape|NaN or infinite numbers in {name}"): tl.kept.check_tensors(tensors | odd, 2)


def with_free_head(tuned=True):
    model = net({})
    model.base_model.model.head.requires_grad_(tuned)
    return model


def test_files_remember_what_is_shared_and_old_ones_share_with_a_warning(tmp_path):
    tl = TreeLoRA(with_free_head(), lam=0.01, shared="head")
    learn(tl, "one", 0)
    tl.save(tmp_path / "new")
    assert TreeLoRA.load(tmp_path / "new", with_free_head()).kept.shared == ["head"]
    TreeLoRA(net({})).save(tmp_path / "old")  # as files of before: they say nothing
    with pytest.warns(UserWarning, match="says nothing of 'base_model.model.head.weight', which trains outside"): old = TreeLoRA.load(tmp_path / "old", with_free_head())
    assert old.kept.shared == ["base_model.model.head.weight", "base_model.model.head.bias"] and not old.kept
    assert TreeLoRA.load(tmp_path / "old", with_free_head(), shared=["head"]).kept.shared == ["head"]


def test_mistakes():
    with pytest.raises(ValueError, match="Unknown keep 'some'; known are adapter, all"): TreeLoRA(net(), keep="some")
    with pytest.raises(ValueError, match="shared names 'haed', but nothing in the model has that name"): TreeLoRA(with_free_head(), shared=["haed"])
    tl = TreeLoRA(with_free_head(False), lam=0.01)
    learn(tl, "one", 0)
    tl.model.base_model.model.head.requires_grad_(True)
    with pytest.raises(ValueError, match='"base_model.model.head.weight" trains now, but did not when TreeLoRA was made'): tl.task("two")
    tl.model.base_model.model.head.requires_grad_(False)
    learn(tl, "two", 1)


def test_a_kept_part_may_be_shared_on_purpose():
    tl = TreeLoRA(net(PARTS["all"]), shared=["head"])
    assert tl.kept.parts and not any("head" in n for n in tl.kept.parts)


def test_our_own_lora_with_a_head():
    torch.manual_seed(1)
    model = add_lora(Net(), ["a", "b"], r=2, alpha=2)
    model.head.requires_grad_(True)
    with pytest.raises(ValueError, match='"head.weight" \\(and 1 more\\) trains outside the adapter.*shared=\\["head"\\]'): TreeLoRA(model)
    tl = TreeLoRA(model, lam=0.01, keep="all")
    wanted = learn(tl, "one", 0)
    learn(tl, "two", 1)
    tl.load_adapter("one")
    assert torch.equal(out(tl), wanted)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_changed_base_is_shared_from_a_fresh_start_only(start, tmp_path):
    model = net(dict(init_lora_weights=start))
    with torch.no_grad(): model.base_model.model.a.lora_B["default"].weight.add_(0.1)
    tl = TreeLoRA(model, lam=0.01)
    learn(tl, "one", 0)
    with pytest.raises(ValueError, match="has changed the base weights, and the adapter was not fresh when TreeLoRA was made"): push(tl, tmp_path / "a", license="mit")
    model = net(dict(init_lora_weights=start, use_rslora=True, rank_pattern={"a": 3}))
    tl = TreeLoRA(model, lam=0.01)
    learn(tl, "one", 0)
    with pytest.raises(ValueError, match="scales cannot be doubled"): push(tl, tmp_path / "b", license="mit")


@pytest.mark.parametrize("options", PARTS.values(), ids=PARTS)
def test_checkpoints_hold_all_that_belongs_to_the_adapter(options, tmp_path):
    tl, wanted = trained(options)
    write_peft(tl.model, tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base(), str(tmp_path))(X), wanted["t1"])
    found, now = read_peft(tl.model, tmp_path), dict(tl.model.named_parameters())
    assert found.keys() == peft_names(tl.model).keys() and all(torch.equal(x, now[n]) for n, x in found.items())


def test_one_optimiser_for_all_tasks_forgets_what_is_kept_too():
    "A head that is kept per task begins each task as with an optimiser of its own."
    def learned(one):
        tl = TreeLoRA(net(), lam=0.01)
        make = lambda: torch.optim.AdamW([*tl.params, *tl.kept.params], 0.02)
        optimizer = make()
        for k in range(3):
            if not one: optimizer = make()
            with tl.task(f"t{k}"):
                for _ in range(4): step(tl, k, optimizer)
        return tl.live.whole()
    for a, b in zip(learned(True), learned(False)): assert torch.equal(a, b)


def test_a_search_in_steps_holds_what_is_kept_still():
    tl, _ = trained(init="branch", penalty="prox", search_rounds=3)
    optimizer = torch.optim.AdamW([*tl.params, *tl.kept.params], 0.02)
    with tl.task("new"):
        before = tl.live.whole()
        for _ in range(2): step(tl, 2, optimizer)
        assert all(torch.equal(a, b) for a, b in zip(tl.live.whole(), before))
        for _ in range(4): step(tl, 2, optimizer)
    assert not torch.equal(tl.live.whole()[1], before[1])
