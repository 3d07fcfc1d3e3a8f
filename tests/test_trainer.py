"The Trainer callback: the same run as a bare loop in every setting, resumed runs, interrupted runs, and mistakes."
import os
import subprocess
import sys
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch.utils.data import SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from treelora.algorithm import VARIANTS, TreeLoRA
from treelora.engine.loops import WATCH
from treelora.trainer import Batches, TreeLoraCallback, restore_task, task_state

SIZE, EPOCHS, LR = 8, 2, 0.01


OLD = int(transformers.__version__.split(".")[0]) < 5


@pytest.fixture(autouse=True)
def own_precision():
    "Transformers 4 leaves a Trainer's precision behind for the next one in the process."
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@cache
def built(dropout):
    "The tiny model, made once for all tests."
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, lora_alpha=4, lora_dropout=dropout, target_modules=["q_proj", "v_proj"]))
    for name, p in model.named_parameters():
        if "lora_B" in name: torch.nn.init.normal_(p, std=0.1)
    return model


def tiny_model(dropout=0.0):
    "A copy of it; dropout and whatever else is drawn begins anew."
    model = deepcopy(built(dropout))
    torch.manual_seed(1)
    return model


def sequences(step, n=40, length=10):
    starts = torch.randint(29, (n, 1), generator=torch.Generator().manual_seed(step % 7))
    rows = 3 + (starts + step * torch.arange(length)) % 29
    labels = [torch.where(torch.arange(length) < 1 + i % 4, -100, row) for i, row in enumerate(rows)]  # uneven numbers of answer tokens
    return [{"input_ids": x, "labels": y, "attention_mask": torch.ones_like(x)} for x, y in zip(rows, labels)]


TASKS = {"up": sequences(1), "down": sequences(-1), "two": sequences(2)}


class InOrder(Trainer):
    "Takes the examples in the order of the data."
    def _get_train_sampler(self, *args): return SequentialSampler(self.train_dataset)


def trainer(tl, callbacks, folder, data=TASKS["up"], model=None, **changes):
    arguments = dict(output_dir=folder, per_device_train_batch_size=SIZE, num_train_epochs=EPOCHS, learning_rate=LR, lr_scheduler_type="constant",
                     optim="adamw_torch", report_to="none", logging_strategy="no", save_strategy="no",
                     use_cpu=True, disable_tqdm=True) | changes
    made = InOrder(model or tl.model, TrainingArguments(**arguments), train_dataset=data, callbacks=callbacks)
    made.remove_callback(PrinterCallback)
    return made


def with_trainer(tl, folder, names=TASKS, **changes):
    for name in names: trainer(tl, [TreeLoraCallback(tl, name)], folder, TASKS[name], **changes).train()
    return tl


def with_bare_loop(tl, names=TASKS, accumulate=1, clip=1.0, autocast=False, skip=()):
    "The same in plain PyTorch: `skip` has steps to leave out."
    tl.model.train()
    for name in names:
        data, optimizer = TASKS[name], torch.optim.AdamW(tl.params, LR, weight_decay=0.0)
        parts = [data[i:i + SIZE] for i in range(0, len(data), SIZE)]
        batches = [{k: torch.stack([x[k] for x in part]) for k in part[0]} for part in parts]
        steps = [batches[i:i + accumulate] for i in range(0, len(batches), accumulate)] * EPOCHS
        with tl.task(name, rounds=len(steps), epoch=len(steps) // EPOCHS):
            if tl.init == "branch" and tl.signal == "loss": look(tl, steps)
            if tl.signature == "reference": tl.refer(lambda i: tl.model(**steps[i][0]).loss)
            for step in (s for i, s in enumerate(steps) if i not in skip):
                items = sum(b["labels"][:, 1:].ne(-100).sum() for b in step)
                def losses():
                    for b in step:
                        with torch.autocast("cpu", torch.bfloat16, enabled=autocast): yield tl.model(**b, num_items_in_batch=items).loss
                value = 0
                for loss in losses():
                    loss.backward()
                    value = value + loss.detach()
                if clip: torch.nn.utils.clip_grad_norm_(tl.model.parameters(), clip)
                tl.step(value if tl.signal == "stored" else lambda: sum(losses()))
                optimizer.step(), optimizer.zero_grad()
    return tl


def assert_same(a, b):
    "Adapter, bank, tree and what the last search did are equal, bit for bit."
    assert a.bank.names == b.bank.names and a.tree.newick() == b.tree.newick()
    for x, y in ((a.bank.adapters, b.bank.adapters), (a.bank.signatures, b.bank.signatures), (a.live.read(), b.live.read()), (a.initial, b.initial)):
        assert torch.equal(x, y)
    assert a.last.round == b.last.round and len(a.last.picks) == len(b.last.picks)
    assert all(torch.equal(x, y) for x, y in zip(a.last.picks, b.last.picks))
    assert (a.stats.scatter is None) == (b.stats.scatter is None)
    if a.stats.scatter is not None: assert torch.equal(a.stats.scatter, b.stats.scatter) and a.stats.counts == b.stats.counts


def look(tl, steps):
    "The search before training, on the data in their order."
    tl.model.eval()
    while tl.look(lambda i: tl.model(**steps[i % len(steps)][0]).loss): pass
    tl.model.train()


FORMS = {"l1": {}, "prox": dict(penalty="prox"), "dot": dict(penalty="dot"), "loss": dict(signal="loss"), "fresh": dict(signal="fresh"),
         "update": dict(signature="update", search="random"), "top": dict(top_fraction=0.5, budget=2),
         "authors": VARIANTS["authors"], "branch": VARIANTS["branch"] | dict(search_rounds=7), "held": dict(init="branch", search_rounds=3), "relative": dict(relative=True, lam=0.5),
         "reference": dict(signature="reference", init="branch", reference={"batches": 2})}
QUICK = ("l1", "prox", "loss", "branch", "reference")  # of the forms; the others are run with the slow tests


def some_slow(forms): return [form if form in QUICK else pytest.param(form, marks=pytest.mark.slow) for form in forms]


@pytest.mark.parametrize("form", some_slow(FORMS))
def test_same_as_the_bare_loop(form, tmp_path):
    a, b = (TreeLoRA(tiny_model(), **FORMS[form]) for _ in range(2))
    assert_same(with_trainer(a, tmp_path), with_bare_loop(b))
    assert not torch.equal(a.bank.adapters[0], a.bank.adapters[-1])


@pytest.mark.parametrize("setting, form", [(s, f) for s in ("accumulate", "clip", "bf16", "checkpointing") for f in ("l1", "fresh")]
                         + [("no clip", "l1"), ("accumulate", "dot"), ("accumulate", "loss"), ("checkpointing", "prox")])
def test_same_in_every_setting(form, setting, tmp_path):
    if OLD and setting == "bf16": pytest.skip("the Trainer of transformers 4 rounds the loss in bf16, too")
    word = "gradient" if OLD else "activation"
    changes, loop = {"accumulate": (dict(gradient_accumulation_steps=2), dict(accumulate=2)), "clip": (dict(max_grad_norm=0.01), dict(clip=0.01)),
                     "no clip": (dict(max_grad_norm=0), dict(clip=None)), "bf16": (dict(bf16=True), dict(autocast=True)),
                     "checkpointing": ({f"{word}_checkpointing": True, f"{word}_checkpointing_kwargs": {"use_reentrant": False}}, {})}[setting]
    a, b = (TreeLoRA(tiny_model(), **FORMS[form]) for _ in range(2))
    for tl in (a, b): tl.model.enable_input_require_grads()
    names = ["up", "down"]
    assert_same(with_trainer(a, tmp_path, names, **changes), with_bare_loop(b, names, **loop))


def test_looking_at_losses_leaves_dropout_alone(tmp_path):
    "With a penalty of strength 0, training is the same to the last bit whether or not the search looks at the loss."
    looks, not_looks = (TreeLoRA(tiny_model(dropout=0.3), lam=0, signal=s) for s in ("fresh", "stored"))
    for tl in (looks, not_looks): with_trainer(tl, tmp_path)
    assert torch.equal(looks.bank.adapters, not_looks.bank.adapters)


class Scaled(TrainerCallback):
    "Which steps were left out."
    def __init__(self): self.skipped = []
    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if optimizer.step_was_skipped: self.skipped.append(state.global_step)


@pytest.mark.parametrize("form", ["l1", "prox"])
@pytest.mark.parametrize("power, overflows", [(16, False), pytest.param(68, True, marks=pytest.mark.skipif(OLD, reason="the Trainer of transformers 4 takes no norm without clipping"))])
def test_grad_scaler(form, power, overflows, tmp_path):
    "Scales that are powers of two change nothing but the steps that overflow (here: in the gradient's norm); those are no rounds."
    a, b = (TreeLoRA(tiny_model(), **FORMS[form]) for _ in range(2))
    left_out = []
    for name in ("up", "down"):
        count = Scaled()
        made = trainer(a, [TreeLoraCallback(a, name), count], tmp_path, TASKS[name], max_grad_norm=0)
        made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** power, growth_interval=10 ** 6)
        made.train()
        left_out += count.skipped
        with_bare_loop(b, [name], clip=None, skip=count.skipped)
    assert_same(a, b)
    assert bool(left_out) == overflows


class CutOff(Exception): pass


class Cut(TrainerCallback):
    "Training breaks off after a step."
    def __init__(self, step): self.step = step
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step: raise CutOff


class Features(TrainerCallback):
    "Takes in some features in each step, as a user of routing would."
    def __init__(self, tl): self.tl = tl
    def on_optimizer_step(self, args, state, control, **kwargs):
        self.tl.record_features(torch.randn(4, 3, generator=torch.Generator().manual_seed(state.global_step)), [0, 0, 1, 1])


@pytest.mark.parametrize("where, form", [pytest.param("new process", form, marks=() if form in QUICK else pytest.mark.slow) for form in FORMS] + [("same process", "prox"), ("bank loaded", "fresh")])
def test_resumed_run_is_the_same(form, where, tmp_path):
    "Cut off in the third task, after step 5, and resumed from the checkpoint of step 4 (`held`: from within the search for the branch)."
    def run(tl, folder, *more, resume=None):
        made = trainer(tl, [TreeLoraCallback(tl, "two"), Features(tl), *more], folder, TASKS["two"], save_strategy="steps", save_steps=2, save_total_limit=2)
        made.train(resume_from_checkpoint=resume)
        return tl
    make = lambda: TreeLoRA(tiny_model(dropout=0.2), **FORMS[form])
    cut = with_bare_loop(make(), ["up", "down"])
    cut.save(tmp_path / "bank")
    whole = run(TreeLoRA.load(tmp_path / "bank", tiny_model(dropout=0.2)), tmp_path / "whole")
    last, step = (3, 2) if form == "held" else (5, 4)
    with pytest.raises(CutOff): run(cut, tmp_path / "cut", Cut(last))
    if where == "new process": cut = make()
    if where == "bank loaded": cut = TreeLoRA.load(tmp_path / "bank", tiny_model(dropout=0.2))
    assert_same(whole, run(cut, tmp_path / "cut", resume=str(tmp_path / "cut" / f"checkpoint-{step}")))


def test_first_task_resumes_too(tmp_path):
    whole, cut = (TreeLoRA(tiny_model(), init="fresh") for _ in range(2))
    save = dict(save_strategy="steps", save_steps=3)
    trainer(whole, [TreeLoraCallback(whole, "up")], tmp_path / "a", **save).train()
    with pytest.raises(CutOff): trainer(cut, [TreeLoraCallback(cut, "up"), Cut(4)], tmp_path / "b", **save).train()
    new = TreeLoRA(tiny_model(), init="fresh")
    trainer(new, [TreeLoraCallback(new, "up")], tmp_path / "b", **save).train(resume_from_checkpoint=True)
    assert_same(whole, new)


def test_a_resumed_run_that_fails_goes_back_to_before_the_task(tmp_path):
    tl = TreeLoRA(tiny_model())
    before, save = tl.live.read(), dict(save_strategy="steps", save_steps=3)
    with pytest.raises(CutOff): trainer(tl, [TreeLoraCallback(tl, "up"), Cut(4)], tmp_path, **save).train()
    new = TreeLoRA(tiny_model())
    with pytest.raises(CutOff), TreeLoraCallback(new, "up") as callback:
        trainer(new, [callback, Cut(7)], tmp_path, **save).train(resume_from_checkpoint=True)
    assert torch.equal(new.live.read(), before) and new._now is None and len(new.bank) == 0


def test_checkpoint_that_was_moved(tmp_path):
    whole, tl = (TreeLoRA(tiny_model()) for _ in range(2))
    trainer(whole, [TreeLoraCallback(whole, "up")], tmp_path / "whole").train()
    save = dict(save_strategy="steps", save_steps=3)
    with pytest.raises(CutOff): trainer(tl, [TreeLoraCallback(tl, "up"), Cut(4)], tmp_path / "old", **save).train()
    moved = (tmp_path / "old" / "checkpoint-3").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="checkpoint=folder"):
        trainer(tl, [TreeLoraCallback(tl, "up")], tmp_path / "new").train(resume_from_checkpoint=str(moved))
    trainer(tl, [TreeLoraCallback(tl, "up", checkpoint=moved)], tmp_path / "new").train(resume_from_checkpoint=str(moved))
    assert_same(whole, tl)


@pytest.fixture
def interrupted(tmp_path):
    "A TreeLoRA that has learned `up` and `down`, and a checkpoint in the middle of `two`."
    tl = with_trainer(TreeLoRA(tiny_model()), tmp_path / "first", ["up", "down"])
    with pytest.raises(CutOff), TreeLoraCallback(tl, "two") as callback:
        trainer(tl, [callback, Cut(4)], tmp_path, TASKS["two"], save_strategy="steps", save_steps=3).train()
    return tl, tmp_path


def refuses(tl, callback, folder, match, model=None):
    "Resuming raises, and bank and tree stay."
    names, tree, adapters = list(tl.bank.names), tl.tree.newick() if len(tl.bank) else None, tl.bank.adapters.clone()
    with pytest.raises(ValueError, match=match):
        trainer(tl, [callback], folder, TASKS["two"], model=model).train(resume_from_checkpoint=True)
    assert tl._now is None and tl.bank.names == names and torch.equal(tl.bank.adapters, adapters)
    assert tree is None or tl.tree.newick() == tree
    assert not listening(tl)


def listening(tl):
    "Whether this TreeLoRA still waits for optimiser steps."
    return any(loop.params is tl.params for loop in WATCH.loops)


@pytest.mark.slow
def test_resuming_something_else(interrupted):
    tl, folder = interrupted
    refuses(tl, TreeLoraCallback(tl, "three"), folder, "middle of task 'two', but this callback trains 'three'")
    other = with_trainer(TreeLoRA(tiny_model()), folder / "x", ["down", "up"])
    refuses(other, TreeLoraCallback(other, "two"), folder, r"after the tasks \['up', 'down'\], but this bank has \['down', 'up'\]")
    other = with_trainer(TreeLoRA(tiny_model()), folder / "x", ["up", "down"], learning_rate=0.02)
    refuses(other, TreeLoraCallback(other, "two"), folder, "other runs of the tasks")
    other = TreeLoRA(tiny_model(), lam=0.3)
    refuses(other, TreeLoraCallback(other, "two"), folder, r"other settings of TreeLoRA \(lam\)")
    with_trainer(other := TreeLoRA(tiny_model()), folder / "elsewhere", ["up"], save_strategy="steps", save_steps=3)
    new = TreeLoRA(tiny_model())
    refuses(new, TreeLoraCallback(new, "two", checkpoint=folder / "elsewhere" / "checkpoint-3"), folder, "middle of task 'up'")


def test_damaged_checkpoint(interrupted):
    tl, folder = interrupted
    [path] = (folder / "checkpoint-3" / "treelora" / "task").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-4])
    refuses(tl, TreeLoraCallback(tl, "two"), folder, "damaged")


def assert_untouched(tl, names, adapter):
    assert tl._now is None and tl.bank.names == names and torch.equal(tl.live.read(), adapter)
    assert not listening(tl) and not tl.model._forward_hooks and not tl.model._forward_pre_hooks


@pytest.mark.parametrize("form", ["loss", *(pytest.param(form, marks=pytest.mark.slow) for form in ("l1", "prox"))])
def test_interrupted_training(form, tmp_path):
    tl = with_trainer(TreeLoRA(tiny_model(), **FORMS[form]), tmp_path, ["up"])
    adapter = tl.live.read()
    with pytest.raises(CutOff), TreeLoraCallback(tl, "down") as callback: trainer(tl, [callback, Cut(3)], tmp_path, TASKS["down"]).train()
    assert_untouched(tl, ["up"], adapter)
    callback = TreeLoraCallback(tl, "down")
    with pytest.raises(CutOff): trainer(tl, [callback, Cut(3)], tmp_path, TASKS["down"]).train()
    assert tl._now is not None and not torch.equal(tl.live.read(), adapter)
    callback.abort()
    assert_untouched(tl, ["up"], adapter)
    callback.abort()  # nothing to do
    with pytest.raises(CutOff): trainer(tl, [callback, Cut(3)], tmp_path, TASKS["down"]).train()
    with_trainer(tl, tmp_path, ["down"])  # another callback finds the open task and gives it up
    assert_same(tl, with_trainer(TreeLoRA(tiny_model(), **FORMS[form]), tmp_path, ["up", "down"]))


def test_stopping_early_ends_the_task(tmp_path):
    class Enough(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs): control.should_training_stop = state.global_step == 3
    tl = TreeLoRA(tiny_model())
    trainer(tl, [Enough(), TreeLoraCallback(tl, "up")], tmp_path).train()
    assert tl.bank.names == ["up"] and tl.last.round == 3


def test_nan_gradient(tmp_path):
    class Spoil(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 2: tl.params[0].grad.fill_(torch.nan)
    tl = TreeLoRA(tiny_model(), signal="loss")
    adapter = tl.live.read()
    with pytest.raises(ValueError, match="NaN or infinite gradient in task 'up', round 3"):
        trainer(tl, [Spoil(), TreeLoraCallback(tl, "up")], tmp_path).train()
    assert_untouched(tl, [], adapter)


def test_callback_twice(tmp_path):
    tl = TreeLoRA(tiny_model(), penalty="prox")
    adapter, callback = tl.live.read(), TreeLoraCallback(tl, "up")
    for callbacks in ([callback, callback], [TreeLoraCallback(tl, "up"), TreeLoraCallback(tl, "down")]):
        with pytest.raises(ValueError, match="two TreeLoraCallbacks"): trainer(tl, callbacks, tmp_path).train()
        assert_untouched(tl, [], adapter)
    with_trainer(tl, tmp_path, ["up"])


def test_same_task_again(tmp_path):
    tl = TreeLoRA(tiny_model())
    made = trainer(tl, [TreeLoraCallback(tl, "up")], tmp_path)
    made.train()
    adapter = tl.live.read()
    with pytest.raises(ValueError, match="learned already"): made.train()
    assert_untouched(tl, ["up"], adapter)


def test_task_opened_by_hand(tmp_path):
    tl = TreeLoRA(tiny_model())
    with pytest.raises(ValueError, match="'mine' is still open"), tl.task("mine"): trainer(tl, [TreeLoraCallback(tl, "up")], tmp_path).train()


def test_model_without_adapters(tmp_path):
    tl, plain = TreeLoRA(tiny_model()), LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                                                   num_attention_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    adapter = tl.live.read()
    with pytest.raises(ValueError, match="LlamaForCausalLM has no LoRA layers"): TreeLoRA(plain)
    for model in (plain, tiny_model()):
        with pytest.raises(ValueError, match="does not hold the LoRA layers of this TreeLoRA"):
            trainer(tl, [TreeLoraCallback(tl, "up")], tmp_path, model=model).train()
        assert_untouched(tl, [], adapter)


def test_no_loss_to_look_at(tmp_path):
    tl = with_trainer(TreeLoRA(tiny_model(), signal="loss"), tmp_path, ["up"])
    adapter = tl.live.read()
    with pytest.raises(ValueError, match="returned no loss"): with_trainer(tl, tmp_path, ["down"], label_smoothing_factor=0.1)
    assert_untouched(tl, ["up"], adapter)
    with_trainer(TreeLoRA(tiny_model()), tmp_path, ["up", "down"], label_smoothing_factor=0.1)


def test_scheduler_and_weight_decay_are_the_trainers_own(tmp_path):
    "With no penalty, a run with the callback is the run without it."
    runs = []
    for callback in (True, False):
        tl = TreeLoRA(tiny_model(dropout=0.1), lam=0)
        for name in ("up", "down"):
            trainer(tl, [TreeLoraCallback(tl, name)] if callback else None, tmp_path, TASKS[name], weight_decay=0.1, lr_scheduler_type="cosine", warmup_steps=2).train()
        runs.append(tl.live.read())
    assert torch.equal(*runs)


TWO_PROCESSES = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, torch.distributed as dist
from test_trainer import TASKS, TreeLoRA, tiny_model, with_trainer
torch.set_num_threads(1)
try: with_trainer(TreeLoRA(tiny_model(), signal="loss"), sys.argv[2], ["up"], ddp_backend="gloo")
except ValueError as error: assert "look at the loss of one process" in str(error)
else: raise AssertionError("nothing was refused")
tl = with_trainer(TreeLoRA(tiny_model()), sys.argv[2], ["up", "down"], per_device_train_batch_size=4, ddp_backend="gloo")
torch.save((tl.bank.adapters, tl.bank.signatures), f"{sys.argv[2]}/{dist.get_rank()}.pt")
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    "Both processes keep the same adapters, bit for bit; they are those of one process up to the rounding of the mean over processes."
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "script.py"), str(Path(__file__).parent), str(tmp_path)],
                   check=True, capture_output=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    one = with_bare_loop(TreeLoRA(tiny_model()), ["up", "down"])
    torch.testing.assert_close(first[0], one.bank.adapters, rtol=1e-4, atol=1e-5)


def test_task_state_in_a_bare_loop():
    "State and restoration work without the Trainer, and the state is a copy."
    def step(tl, optimizer, seed):
        batch = {k: torch.stack([x[k] for x in TASKS["down"][seed:seed + 4]]) for k in TASKS["down"][0]}
        tl.model(**batch).loss.backward()
        tl.step(), optimizer.step(), optimizer.zero_grad()
    tl = with_bare_loop(TreeLoRA(tiny_model(), search="epsilon-greedy"), ["up", "two"])
    sgd = torch.optim.SGD(tl.params, 0.1)
    with tl.task("down"):
        for i in range(3): step(tl, sgd, i)
        saved = task_state(tl._now, tl.live)
        for i in range(3, 6): step(tl, sgd, i)
        end, picks = tl.live.read(), list(tl._now.picks)
        restore_task(tl._now, tl.live, *saved)
        assert not torch.equal(tl.live.read(), end) and tl._now.round == 3
        for i in range(3, 6): step(tl, sgd, i)
        assert torch.equal(tl.live.read(), end) and all(torch.equal(a, b) for a, b in zip(picks, tl._now.picks, strict=True))


def test_batches_of_positional_arguments():
    model = tiny_model().train()
    seen, ids = Batches(model), TASKS["up"][0]["input_ids"][None]
    loss = model(ids, labels=ids).loss
    assert torch.equal(seen.recomputed(), loss) and torch.equal(seen.value(), loss)
    seen.remove()


def with_head():
    "The tiny model with a head that PEFT trains along."
    model = deepcopy(built(0.0)).unload()
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]))


@pytest.mark.slow
def test_a_head_that_trains_along_resumes_with_its_adapter(tmp_path):
    whole, cut = (with_trainer(TreeLoRA(with_head()), tmp_path / "first", ["down"]) for _ in range(2))
    save = dict(save_strategy="steps", save_steps=3)
    trainer(whole, [TreeLoraCallback(whole, "up")], tmp_path / "a", **save).train()
    with pytest.raises(CutOff): trainer(cut, [TreeLoraCallback(cut, "up"), Cut(4)], tmp_path / "b", **save).train()
    new = TreeLoRA(with_head())
    trainer(new, [TreeLoraCallback(new, "up")], tmp_path / "b", **save).train(resume_from_checkpoint=True)
    assert_same(whole, new)
    assert torch.equal(whole.bank.blocks["kept"], new.bank.blocks["kept"]) and torch.equal(whole.kept.read(), new.kept.read())
