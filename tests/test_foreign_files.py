"Files that others have made, changed or cut: nothing is executed, written elsewhere or taken for what it is not, and each mistake is one sentence."
import copy
import gzip
import json
import os
import random
import resource
import shutil
import signal
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from test_hub import base, learned, with_ours, with_peft
from torch import nn
from transformers import GPT2Config

from treelora import streams
from treelora.algorithm import TreeLoRA
from treelora.engine.bank import Bank
from treelora.engine.checkpoint import INDEX, MOVING, STILL, Checkpoints, Damaged, read_peft, write_peft
from treelora.engine.files import digest_of, read_json, read_state, sealed
from treelora.engine.lock import Lock
from treelora.engine.packer import Packer
from treelora.engine.validate import FIELDS, Field, check_state
from treelora.learning import language, models
from treelora.learning.hub import model_card, pull, push, task_folder
from treelora.lora import lora_layers
from treelora.signature import Layout

TASKS = ("es", "pt", "ca")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    "A shared folder, and what it was made of."
    tl, folder = learned(with_peft(), TASKS), tmp_path_factory.mktemp("shared") / "hub"
    tl.last = None
    push(tl, folder, license="mit")
    return folder, tl


@pytest.fixture
def folder(shared, tmp_path):
    "A copy that may be changed."
    return Path(shutil.copytree(shared[0], tmp_path / "copy"))


def rewritten(folder, change, anew=True):
    "Change the JSON of a state, and compute its digest anew, or leave that out."
    plain = json.loads((folder / "treelora.json").read_text())
    change(plain)
    (folder / "treelora.json").write_text(json.dumps(sealed(plain) if anew else {k: v for k, v in plain.items() if k != "digest"}))


def bank_file(folder): return next(folder.glob("bank-*.safetensors"))


def same(a, b):
    return a.bank.names == b.bank.names and torch.equal(a.bank.adapters, b.bank.adapters) and torch.equal(a.bank.signatures, b.bank.signatures) \
        and a.tree.newick() == b.tree.newick() and a.config == b.config and torch.equal(a.bank.slot, b.bank.slot)


# ---- a state's JSON

def test_no_single_bit_of_the_json_can_be_turned(folder, shared):
    index, chance, taken = folder / "treelora.json", random.Random(0), 0
    whole = index.read_bytes()
    plain = json.loads(whole)
    for bit in chance.sample(range(8 * len(whole)), 700):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        index.write_bytes(data)
        try:
            found, tensors = read_state(folder)
            check_state(found, tensors)
        except (ValueError, OSError) as error: assert "\n" not in str(error)
        else:
            taken += 1
            assert {k: v for k, v in found.items() if k != "digest"} == {k: v for k, v in plain.items() if k != "digest"}
    assert taken < 5


CHANGES = {
    "another slot": (lambda p: p["slot"].__setitem__(0, -1), "'slot' has -1 for task 0, but there are 3 adapters"),
    "a slot twice": (lambda p: p["slot"].__setitem__(0, 1), "'slot' leaves an adapter without a task"),
    "a circle": (lambda p: p["tree"]["nodes"][0].__setitem__("children", [0, 0]), "no tree"),
    "a setting": (lambda p: p["config"].update(lamb=1), "'lamb', which this version does not know"),
    "a folder": (lambda p: p["config"].update(bank_folder="/tmp"), "'bank_folder', which this version does not know"),
    "a strength": (lambda p: p["config"].update(lam="x"), "lam = 'x', which cannot be"),
    "no built": (lambda p: p["tree"]["nodes"][0].pop("built"), "lacks 'built'"),
    "other names": (lambda p: p["tree"]["tasks"].__setitem__(0, ["xx", "es"]), "other tasks than the bank"),
    "two names": (lambda p: p["names"].__setitem__(0, "pt"), "more than once"),
    "a shape": (lambda p: p["layers"][0].__setitem__("A", [2, 10 ** 12]), "has the shape"),
    "a field": (lambda p: p.update(surprise=1), "'surprise', which this version does not know"),
    "no tree": (lambda p: p.pop("tree"), "lacks 'tree'"),
    "a threshold": (lambda p: p["tree"]["nodes"][0]["cut"].__setitem__("threshold", float("nan")), "has the threshold nan"),
    "tensors elsewhere": (lambda p: p.update(tensors="/etc/passwd"), "no file beside it"),
    "tensors above": (lambda p: p.update(tensors="../x.safetensors"), "no file beside it"),
    "a number for a sum": (lambda p: p.update(sha256=7), "changed since it was saved"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_cannot_be_is_refused_even_with_the_right_digest(change, folder):
    how, words = CHANGES[change]
    rewritten(folder, how)
    model = with_peft()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words) as raised: pull(folder, model)
    assert "\n" not in str(raised.value) and all(torch.equal(x, before[k]) for k, x in model.state_dict().items())


def test_files_of_before_have_no_digest_and_load(folder, shared):
    rewritten(folder, lambda p: None, anew=False)
    old = folder / f"bank-{bank_file(folder).name[5:17]}.safetensors"
    bank_file(folder).rename(old)
    rewritten(folder, lambda p: p.update(tensors=old.name), anew=False)
    again = pull(folder, with_peft())
    assert same(again, shared[1])
    again.save(folder)  # and are replaced
    assert not old.exists() and "digest" in json.loads((folder / "treelora.json").read_text()) and same(pull(folder, with_peft()), shared[1])


def test_numbers_that_are_none(folder):
    _, tensors = read_state(folder)
    for name, value in (("adapters", float("nan")), ("initial", float("inf"))):
        tl = learned(with_ours(), ("one",))
        plain, state = tl.state()
        state[name][0] = value
        with pytest.raises(ValueError, match=f"NaN or infinite numbers in the tensor {name}"): learned(with_ours(), ()).restore(plain, state)


def test_another_part_adds_its_field_by_one_line(monkeypatch, folder):
    plain, tensors = read_state(folder)
    plain["notes"] = {"by": "me"}
    with pytest.raises(ValueError, match="'notes', which this version does not know"): check_state(plain, tensors)
    monkeypatch.setitem(FIELDS, "notes", Field(lambda value, state: None, ("notes.",), needed=False))
    check_state(plain, tensors | {"notes.x": torch.zeros(1)})


def test_a_search_of_another_kind_is_not_taken_up(make_net):
    def running(tl):
        for i in range(3):
            for p in tl.params: p.grad = torch.ones_like(p)
            tl.step()

    def made():
        tl = TreeLoRA(make_net())
        with tl.task("a"): running(tl)
        return tl
    tl = made()
    with tl.task("b"):
        running(tl)
        plain, tensors = tl.state()
    plain["task"]["search"]["surprise"] = 1
    new = TreeLoRA(make_net())
    new.restore(plain, tensors)
    with pytest.raises(ValueError, match="search is not this task's"), new.task("b"): pass
    plain["task"]["groups"] = 3
    with pytest.raises(ValueError, match="its 'task' is 3, but must be a list"): new.restore(plain, tensors)


def test_tasks_are_counted_where_they_go_when_a_later_slot_stays():
    layout = Layout(lora_layers(with_ours()))
    bank = Bank(layout)
    for k in range(4): bank.add(f"t{k}", torch.randn(layout.n_layers, layout.width), torch.randn(layout.n_layers, layout.width))
    bank.merge("t3", "t0")
    bank.merge("t2", "t1")
    assert bank.weight == bank.slot.bincount().tolist() == [2, 2]


# ---- links and other people's files

def test_nothing_is_written_through_a_link(folder, shared, tmp_path):
    outside, place = tmp_path / "outside.txt", tmp_path / "place"
    outside.write_text("dear diary"), place.mkdir()
    again = pull(folder, with_peft())
    for name in ("treelora.json.part", ".part-treelora.json", ".part-README.md", ".part-" + bank_file(folder).name): (folder / name).symlink_to(outside)
    for name in ("README.md", "adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink()
        (folder / name).symlink_to(outside)
    shutil.rmtree(folder / "tasks"), (folder / "tasks").symlink_to(place)
    again.save(folder)
    push(again, folder, license="mit")
    assert outside.read_text() == "dear diary" and not list(place.iterdir()) and not (folder / "tasks").is_symlink()
    assert same(pull(folder, with_peft()), shared[1])


def test_files_beside_the_state_stay(folder, shared):
    (folder / "bank-statements.safetensors").write_text("mine")
    (folder / "bank-0123456789ab.safetensors").write_text("mine, too")
    left = [folder / ".part-0123456789abcdef", folder / "bank-0123456789ab-01234567.safetensors"]
    for path in left:
        path.write_text("left by a killed process")
        os.utime(path, (1, 1))
    fresh = folder / ".part-fedcba9876543210"
    fresh.write_text("of a process that is just writing")
    shared[1].save(folder)
    assert (folder / "bank-statements.safetensors").read_text() == "mine" and (folder / "bank-0123456789ab.safetensors").exists() and fresh.exists()
    assert not any(path.exists() for path in left)


def child(work):
    "A process that does something; its number."
    if pid := os.fork(): return pid
    try: work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def test_two_that_save_and_one_that_reads(tmp_path):
    banks = [learned(with_ours(), names) for names in (("a",), ("b", "c"))]
    banks[0].save(tmp_path)

    def saving(tl):
        for _ in range(12): tl.save(tmp_path)
    pids, read = [child(lambda tl=tl: saving(tl)) for tl in banks], 0
    while any(os.waitpid(pid, os.WNOHANG) == (0, 0) for pid in pids[:1]):
        assert TreeLoRA.load(tmp_path, with_ours()).bank.names in (["a"], ["b", "c"])
        read += 1
    assert os.waitpid(pids[1], 0)[1] == 0 and read
    again = TreeLoRA.load(tmp_path, with_ours())
    assert any(same(again, tl) for tl in banks)


# ---- checkpoints

def written(folder, n=2):
    "A book with some checkpoints, and the tensors that stay and move."
    book, big, small = Checkpoints(folder, {"seed": 0}), torch.rand(50), torch.zeros(2)
    for step in range(1, n + 1):
        small += 1
        book.write(f"{step:04d}", {"step": step}, {"big": big, "small": small}, fresh=step == 1)
    return book, big, small


def test_everything_is_written_anew_when_the_last_checkpoint_is_gone(tmp_path):
    book, big, small = written(tmp_path, 1)
    shutil.rmtree(tmp_path / "checkpoint-0001")
    book.write("0002", {"step": 2}, {"big": big, "small": small}, fresh=False)
    (tmp_path / "checkpoint-0002" / STILL).unlink()
    path = book.write("0003", {"step": 3}, {"big": big, "small": small}, fresh=False)
    shutil.rmtree(tmp_path / "checkpoint-0002")
    saved = Checkpoints(tmp_path, {"seed": 0}).read()
    assert saved.path == path and torch.equal(saved.tensors["big"], big) and torch.equal(saved.tensors["small"], small)


@pytest.mark.parametrize("lost", [STILL, MOVING, INDEX, "index entry", "elsewhere", "sparse", "deep"])
def test_missing_parts_are_damage_and_the_one_before_is_used(lost, tmp_path):
    book, big, _ = written(tmp_path)
    latest = tmp_path / "checkpoint-0002"
    index = json.loads((latest / INDEX).read_text())
    if lost == "index entry": del index["files"][STILL]
    if lost == "elsewhere": index["files"]["/etc/passwd"] = {"bytes": 1, "sha256": "0"}
    if lost in ("index entry", "elsewhere"):
        from treelora.engine.checkpoint import _own_digest
        index.pop("sha256")
        (latest / INDEX).write_text(json.dumps(index | {"sha256": _own_digest(index)}))
    elif lost == "sparse": os.truncate(latest / MOVING, 60 * 2 ** 30)
    elif lost == "deep": (latest / INDEX).write_text("[" * 10 ** 6)
    else: (latest / lost).unlink()
    begun = time.process_time()
    with pytest.warns(UserWarning, match="going on from the one before, checkpoint-0001"): saved = Checkpoints(tmp_path, {"seed": 0}).read()
    assert saved.plain == {"step": 1} and torch.equal(saved.tensors["big"], big) and time.process_time() - begun < 5


def test_a_folder_has_one_writer_who_may_be_killed(tmp_path):
    def holding():
        lock = Lock(tmp_path).take()
        (tmp_path / "ready").touch()
        time.sleep(60)
        lock.release()
    pid = child(holding)
    while not (tmp_path / "ready").exists(): time.sleep(0.01)
    try:
        with pytest.raises(ValueError, match=f"process {pid} .* is writing into .*; wait until it has ended, or choose another folder"): written(tmp_path, 1)
        assert not list(tmp_path.glob("checkpoint-*"))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    book, *_ = written(tmp_path, 1)
    book.lock.release()
    assert Checkpoints(tmp_path, {"seed": 0}).read().plain == {"step": 1} and not (tmp_path / ".lock").exists()


def test_two_runs_into_one_folder(tmp_path):
    from test_learner import tiny_stream, tiny_vit
    from treelora.learner import run
    how = dict(epochs=1, progress=False, checkpoints=tmp_path, resume=True)
    with Lock(tmp_path), pytest.raises(ValueError, match="is writing into"): run(tiny_stream(), "seqlora", model=tiny_vit(), **how)
    run(tiny_stream(), "seqlora", model=tiny_vit(), **how)
    assert all(p.name.startswith("checkpoint-") for p in tmp_path.iterdir())


def test_a_lock_that_is_a_link(tmp_path):
    (tmp_path / "mine").write_text("dear diary")
    (tmp_path / ".lock").symlink_to(tmp_path / "mine")
    with Lock(tmp_path): pass
    assert (tmp_path / "mine").read_text() == "dear diary"


@pytest.mark.parametrize("value", [{"~": "dtype", "is": "load"}, {"~": "json", "is": 1}, {"~": "plain"}, {"~": []}, {"~": "scalar", "is": 1, "dtype": "O"},
                                   {"~": "numpy generator", "is": {"bit_generator": "default_rng"}}, {"~": "map", "kind": "os", "factory": None, "is": []},
                                   {"~": "tensor", "is": "gone", "host": True}, {"~": "device", "is": "nowhere"}, {"~": "bytes", "is": "xy"},
                                   {"~": "object", "class": "os:_wrap_close", "is": {}, "at": "x"}, {"~": "range", "is": [0, 1, 0]}])
def test_a_checkpoint_names_nothing_but_what_it_may(value):
    owner = nn.Linear(1, 1)
    with pytest.raises(ValueError) as raised: Packer(owner, owner).unpack({"x": value}, {}, {})
    assert "\n" not in str(raised.value)


# ---- what other libraries say

def test_an_adapter_of_another_model(tmp_path):
    write_peft(with_peft(), tmp_path)
    other = get_peft_model(base(), LoraConfig(r=2, target_modules=["0"]))
    assert read_peft(other, tmp_path)
    with pytest.raises(ValueError, match="of shape .* but the model's is"): read_peft(with_peft(r=1), tmp_path)
    write_peft(other, tmp_path)
    with pytest.raises(ValueError, match="lacks .* the adapter of another model"): read_peft(with_peft(), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match="is damaged or no such file"): read_peft(with_peft(), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="There is no adapter in"): read_peft(with_peft(), tmp_path)


def test_json_that_is_too_deep_or_too_large(tmp_path):
    deep, large = tmp_path / "deep.json", tmp_path / "large.json"
    deep.write_text("[" * 10 ** 6)
    with pytest.raises(ValueError, match="no valid JSON"): read_json(deep)
    large.touch(), os.truncate(large, 60 * 2 ** 30)
    with pytest.raises(ValueError, match="more than a file of its kind ever has"): read_json(large)


def test_weights_of_eight_bits(tmp_path):
    model = models.get_model("glyph-vit", 2, pretrained=False)
    state = {k: v.to(torch.float8_e4m3fn) for k, v in models._backbone(model.state_dict()).items()}
    save_file(state, tmp_path / "w.safetensors")
    assert models.load_weights(model, tmp_path / "w.safetensors").pos_embed.isfinite().all()
    save_file({k: v.int() for k, v in models._backbone(model.state_dict()).items()}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="weights are floats"): models.load_weights(model, tmp_path / "w.safetensors")


def parquet(path, images, labels):
    import pyarrow as pa
    import pyarrow.parquet as pq
    pq.write_table(pa.table({"image": images, "label": labels}), path)
    return [path]


def test_images_that_are_none(tmp_path):
    import io

    from PIL import Image
    def encoded(size):
        file = io.BytesIO()
        Image.new("1", size).save(file, "png")
        return {"bytes": file.getvalue()}
    good = encoded((4, 4))
    assert streams.read_parquet(parquet(tmp_path / "a.parquet", [good, good], [0, 1]))[1].tolist() == [0, 1]
    for images, labels in (([good, good], [0, None]), ([good, None], [0, 1]), ([encoded((14000, 14000))], [0]), ([good, encoded((5, 4))], [0, 1])):
        with pytest.raises(ValueError, match="cannot be read as images and labels"): streams.read_parquet(parquet(tmp_path / "a.parquet", images, labels))


def test_a_bomb_in_a_compressed_file(tmp_path):
    path, header = tmp_path / "x.gz", lambda *shape: bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header(4, 2, 2))
        for _ in range(64): file.write(bytes(2 ** 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="promises .4, 2, 2. bytes but holds more"): streams._read_idx(path, 3)
    path.write_bytes(gzip.compress(header(2 ** 31, 2 ** 31, 2 ** 31)))
    with pytest.raises(ValueError, match="no data set of this kind"): streams._read_idx(path, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024
    path.write_bytes(gzip.compress(header(2, 1, 2) + bytes(range(4))))
    assert streams._read_idx(path, 3).tolist() == [[[0, 1]], [[2, 3]]]


def test_a_class_with_a_huge_number():
    data = streams.ImageSet(np.zeros((2, 4, 4), np.uint8), [10 ** 9] * 2)
    with pytest.raises(ValueError, match="Class 1000000000 of task 't' is no number below"): streams.TaskStream("s", "quick", 0, [streams.Task("t", (10 ** 9,), data, data)])


# ---- sharing

def test_names_of_all_kinds_are_shared(tmp_path):
    names = ("a" * 300, "\ud800", "a\n```\n# b", "`x` | <b>", "con", "../x:y/ü", "a" * 299 + "b")
    tl = learned(with_peft(), names)
    push(tl, tmp_path / "f", license="mit", stream="of `mine`\n\n# and yours")
    assert len({task_folder(tl, name) for name in names}) == 7 and all(len(task_folder(tl, name)) < 90 for name in names)
    assert all((tmp_path / "f" / task_folder(tl, name) / "adapter_config.json").is_file() for name in names)
    assert pull(tmp_path / "f", with_peft()).bank.names == list(names) and [p.name for p in tmp_path.iterdir()] == ["f"]
    card = (tmp_path / "f" / "README.md").read_text(encoding="utf-8")
    assert "\n# b" not in card and "\n# and yours" not in card and r"\`x\` \| \<b>" in card and r"\ud800" in card and card == model_card(tl, tmp_path / "f", "mit", stream="of `mine`\n\n# and yours")


def test_a_folder_is_shared_as_a_whole_or_not_at_all(folder, shared, tmp_path, monkeypatch):
    def full(*args, **kwargs): raise OSError(28, "No space left on device")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with monkeypatch.context() as m:
        m.setattr("treelora.learning.hub.write_adapters", full)
        with pytest.raises(OSError, match="No space left on device.*what was shared there before is untouched"): push(shared[1], folder, license="mit")
        with pytest.raises(OSError, match="No space left"): push(shared[1], tmp_path / "new", license="mit")
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before and not (tmp_path / "new").exists()
    assert not list(folder.glob(".part-*"))


# ---- the converted language model

def test_a_damaged_cache_is_made_again(tmp_path, monkeypatch):
    packaged, made = tmp_path / "m.gguf", []
    packaged.write_bytes(b"weights")

    def convert(path, folder):
        part = folder.with_name(".part-new")
        part.mkdir()
        (part / "model.safetensors").write_bytes(b"converted")
        language.note_files(part)
        (folder.parent / ".part-x").mkdir()
        language._swap(part, folder)
        made.append(folder)
    monkeypatch.setattr(language, "packaged_smollm2", lambda: packaged)
    monkeypatch.setattr(language, "convert_gguf", convert)
    monkeypatch.setattr(language, "load_language_model", lambda folder, *args, **how: (folder / "model.safetensors").read_bytes())
    monkeypatch.setenv("TREELORA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="is not the file that this version knows"): language.load_smollm2()
    monkeypatch.setattr(language, "SMOLLM2_SHA256", language.file_sha256(packaged))
    (tmp_path / "cache" / ".part-killed").mkdir(parents=True)
    assert language.load_smollm2() == language.load_smollm2() == b"converted" and len(made) == 1
    assert not (tmp_path / "cache" / ".part-killed").exists()
    for harm in (lambda p: p.write_bytes(b"conv"), lambda p: p.write_bytes(b"converteD"), lambda p: p.unlink(), lambda p: (p.parent / language.NOTE).unlink()):
        harm(made[0] / "model.safetensors")
        shutil.rmtree(tmp_path / "cache" / "old", ignore_errors=True)
        assert language.load_smollm2() == b"converted"
    assert len(made) == 5 and language.load_smollm2() == b"converted" and len(made) == 5


def test_no_code_of_others_is_run(monkeypatch):
    asked = []

    def refuse(name, **how):
        asked.append(how)
        raise OSError("offline")
    for kind in ("AutoTokenizer", "AutoModelForCausalLM"): monkeypatch.setattr(f"treelora.learning.language.{kind}.from_pretrained", refuse)
    with pytest.raises(FileNotFoundError): language.load_language_model("some/model")
    monkeypatch.setattr("treelora.learning.language.AutoTokenizer.from_pretrained", lambda name, **how: asked.append(how))
    monkeypatch.setattr("treelora.learning.language.AutoConfig.from_pretrained", lambda name, **how: asked.append(how) or GPT2Config(n_layer=1))
    with pytest.raises(FileNotFoundError): language.load_language_model("some/model")
    assert all(how["trust_remote_code"] is False for how in asked) and asked[-1]["use_safetensors"] is True


# ---- a thousand mutated files

def flip(data, chance):
    "Some bits turned."
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 8))): data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def cut(data, chance):
    "Cut short, or with something behind."
    return data[:chance.randrange(len(data))] if chance.random() < 0.8 else data + bytes(chance.randrange(1, 100))


def swap(data, chance):
    "Two stretches exchanged."
    a, b = sorted(chance.randrange(len(data)) for _ in range(2))
    n = min(chance.randrange(1, 40), b - a or 1, len(data) - b)
    return data[:a] + data[b:b + n] + data[a + n:b] + data[a:a + n] + data[b + n:]


ODD = (None, -1, 0, 1, 2 ** 31, 10 ** 12, -10 ** 400, 1.5, float("nan"), float("inf"), "", "x", "\ud800", "../x", "/etc/passwd", True, [], [0, 0], [[]], {}, {"~": "dtype", "is": "load"}, "y" * 500)


def places(x, path=()):
    "All places within JSON values."
    if path: yield path
    for step in (x if isinstance(x, dict) else range(len(x)) if isinstance(x, list) else ()): yield from places(x[step], (*path, step))


def values(data, chance):
    "A value of the JSON replaced, removed, exchanged or added."
    plain = json.loads(data)
    paths = list(places(plain))
    for _ in range(chance.choice((1, 1, 2))):
        path, other = chance.choice(paths), chance.choice(paths)
        try:
            inner, there = plain, plain
            for step in path[:-1]: inner = inner[step]
            for step in other: there = there[step]
            how = chance.randrange(4)
            if how == 0: inner[path[-1]] = chance.choice(ODD)
            elif how == 1: inner[path[-1]] = copy.deepcopy(there)
            elif how == 2: del inner[path[-1]]
            elif isinstance(inner, dict): inner[chance.choice(("extra", "kept", "task", "cut", "is"))] = chance.choice(ODD)
            else: inner.insert(0, chance.choice(ODD))
        except (KeyError, IndexError, TypeError): pass  # gone by the mutation before
    return json.dumps(plain).encode()


def resealed(data, chance):
    "The same, with the checksums of whoever did it on purpose."
    plain = json.loads(values(data, chance))
    if "digest" in plain: plain["digest"] = digest_of(plain)
    elif "files" in plain:
        from treelora.engine.checkpoint import _own_digest
        plain.pop("sha256", None)
        plain["sha256"] = _own_digest(plain)
    return json.dumps(plain).encode()


def deep(data, chance): return b'{"format": 1, "a": ' + b"[" * 10 ** 5 + b"]" * 10 ** 5 + b"}"


BYTES, JSONS = (flip, cut, swap), (flip, cut, swap, values, values, resealed, resealed, deep)


class Subject:
    "Something that is loaded from files: which, how, and whether it is the original; formats of others have no checksum of their own."

    def __init__(self, folder, load, original, files, sealed=True):
        self.folder, self.load, self.original, self.files, self.sealed = folder, load, original, files, sealed


def subjects(root):
    "A shared folder, checkpoints with a state in them, an adapter alone, weights."
    tl = learned(with_peft(), TASKS)
    push(tl, root / "hub", license="mit")
    budget = learned(with_ours(), ("a", "b", "c", "d"), budget=2)
    budget.save(root / "state")
    plain, tensors = budget.state()
    book = Checkpoints(root / "book", {"seed": 0})
    for step in (1, 2): book.write(f"{step:04d}", {"step": step, "state": plain}, tensors, fresh=step == 1)
    book.lock.release()
    write_peft(tl.model, root / "adapter")
    model = models.get_model("glyph-vit", 2, pretrained=False)
    models.save_weights(model, root / "weights" / "w.safetensors")
    start = copy.deepcopy(models.get_model("glyph-vit", 2, pretrained=False).state_dict())
    own = read_peft(tl.model, root / "adapter")

    def resumed(folder):
        new = learned(with_ours(), (), budget=2)
        saved = Checkpoints(folder, {"seed": 0}).read()
        new.restore(saved.plain["state"], saved.tensors)
        return new

    def weights(folder): return models.load_weights(models.get_model("glyph-vit", 2, pretrained=False), folder / "w.safetensors").state_dict()
    wanted = weights(root / "weights")
    assert start.keys() == wanted.keys()
    return {"hub": Subject(root / "hub", lambda f: pull(f, with_peft()), lambda got: same(got, tl), ("treelora.json", "bank-*")),
            "state": Subject(root / "state", lambda f: TreeLoRA.load(f, with_ours()), lambda got: same(got, budget), ("treelora.json", "bank-*")),
            "book": Subject(root / "book", resumed, lambda got: same(got, budget), ("*/checkpoint.json", "*/*.safetensors")),
            "adapter": Subject(root / "adapter", lambda f: read_peft(with_peft(), f), lambda got: all(x.shape == own[k].shape for k, x in got.items()), ("adapter_model.safetensors",), sealed=False),
            "weights": Subject(root / "weights", weights, lambda got: all(x.isfinite().all() and x.shape == wanted[k].shape for k, x in got.items()), ("w.safetensors",), sealed=False)}


def mutate(subject, folder, seed):
    "Change one file of a copy; its kind, and whether somebody did it on purpose."
    chance = random.Random(seed)
    shutil.copytree(subject.folder, folder)
    path = chance.choice(sorted(p for pattern in subject.files for p in folder.glob(pattern)))
    how = chance.choice(JSONS if path.suffix == ".json" else BYTES)
    data = how(path.read_bytes(), chance)
    path.unlink()  # a hard link must not change the one before
    path.write_bytes(data)
    return how


def judged(subject, folder, how):
    "What became of it: refused or taken. Fails for anything else."
    try: got = subject.load(folder)
    except (ValueError, OSError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        said = str(error)
        assert "/treelora/" in frames[-1].filename and said and "\n" not in said and len(said) < 2000, (how.__name__, type(error), frames[-1], said)
        return "refused"
    if how is resealed:  # plausible values of somebody else: usable, at least
        if isinstance(got, TreeLoRA):
            for name in got.bank.names: got.load_adapter(name)
            assert got.tree.newick() and got.bank.slot.bincount().tolist() == got.bank.weight
        return "taken, made on purpose"
    assert subject.original(got), how.__name__
    return "taken, with the original values" if subject.sealed else "taken, right shapes (no checksum)"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_thousand_mutated_files(tmp_path_factory):
    root, counts, slowest = tmp_path_factory.mktemp("mutated"), {}, 0.0
    made = subjects(root)
    kinds = st.sampled_from(["hub"] * 3 + ["state"] * 3 + ["book"] * 3 + ["adapter", "weights"])

    @settings(max_examples=1000, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(kinds, st.integers(0, 2 ** 32))
    def one(kind, seed):
        nonlocal slowest
        folder = root / "copy"
        try:
            how, begun = mutate(made[kind], folder, seed), time.process_time()
            key = kind, how.__name__, judged(made[kind], folder, how)
            counts[key] = counts.get(key, 0) + 1
            slowest = max(slowest, time.process_time() - begun)
        finally: shutil.rmtree(folder, ignore_errors=True)
    for kind in made: judged(made[kind], made[kind].folder, flip)  # whole ones are taken
    before = memory()
    one()
    growth, verdicts = memory() - before, {}
    for (_, _, verdict), n in counts.items(): verdicts[verdict] = verdicts.get(verdict, 0) + n
    print(json.dumps({"files": sum(counts.values()), **verdicts, "slowest, seconds": round(slowest, 2), "growth, MB": round(growth / 2 ** 20)}))
    assert sum(counts.values()) >= 1000 and slowest < 5 and growth < 100 * 2 ** 20 and verdicts["refused"] > 500


def memory():
    "Bytes that this process has in memory."
    import psutil
    return psutil.Process().memory_info().rss
