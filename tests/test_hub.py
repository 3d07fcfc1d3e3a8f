"Sharing: a folder that TreeLoRA and PEFT alone read back, the hub's calls, and mistakes."
import re
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from treelora.algorithm import TreeLoRA
from treelora.learning.hub import OURS, model_card, pull, push, task_folder
from treelora.lora import add_lora

TASKS = ("es", "pt|br", "../../etc", "日本語")
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


def base() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def with_peft(r=2, name="default") -> nn.Module: return get_peft_model(base(), LoraConfig(r=r, lora_alpha=2, target_modules=["0", "2"]), adapter_name=name)
def with_ours() -> nn.Module: return add_lora(base(), ["0", "2"], r=2, alpha=2)


def learned(model, tasks=TASKS, **options) -> TreeLoRA:
    "Each task pulls the outputs elsewhere."
    tl = TreeLoRA(model, **options)
    for i, name in enumerate(tasks):
        optimizer = torch.optim.SGD(tl.params, 0.1)
        with tl.task(name):
            for _ in range(3):
                (model(X) - i).square().mean().backward()
                tl.step()
                optimizer.step()
                optimizer.zero_grad()
    return tl


def front(folder: Path) -> dict: return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])


def test_there_and_back_in_one_folder(tmp_path):
    tl = learned(with_peft())
    assert push(tl, tmp_path / "shared", license="apache-2.0", base_model="me/base", stream="four tasks") == str(tmp_path / "shared")
    tl.load_adapter("es")
    again = pull(str(tmp_path / "shared"), other := with_peft())
    assert again.bank.names == list(TASKS) and again.tree.newick() == tl.tree.newick() and again.config == tl.config
    assert torch.equal(again.bank.adapters, tl.bank.adapters) and torch.equal(again.bank.signatures, tl.bank.signatures)
    again.load_adapter("es")
    assert torch.equal(other(X), tl.model(X))
    learned_more = again
    with learned_more.task("a fifth"):
        other(X).square().mean().backward()
        learned_more.step()
    assert len(learned_more.bank.names) == 5


@pytest.mark.parametrize("name", ["default", "mine"])
def test_plain_peft_reads_every_task(tmp_path, name):
    tl = learned(with_peft(name=name), adapter=name)
    push(tl, tmp_path, license="mit")
    outputs = []
    for task in tl.bank.names:
        tl.load_adapter(task)
        outputs.append(tl.model(X))
        plain = PeftModel.from_pretrained(base(), str(tmp_path), subfolder=task_folder(tl, task))
        assert torch.allclose(plain(X), outputs[-1], atol=1e-6)
    assert torch.allclose(PeftModel.from_pretrained(base(), str(tmp_path))(X), outputs[-1], atol=1e-6)  # the last one is at the top
    assert not torch.allclose(outputs[0], outputs[-1], atol=1e-3)


def test_all_files_lie_within_the_folder(tmp_path):
    tl = learned(with_peft())
    push(tl, tmp_path / "a", license="mit")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    places = [task_folder(tl, t) for t in tl.bank.names]
    assert len(set(places)) == 4 and all(re.fullmatch(r"tasks/[1-4][\w-]*", p, re.ASCII) for p in places)
    assert {p.name for p in (tmp_path / "a/tasks").iterdir()} == {p.removeprefix("tasks/") for p in places}


def test_card_says_what_is_inside(tmp_path):
    tl = learned(with_peft())
    push(tl, tmp_path, license="apache-2.0", base_model="me/base", stream="four tasks")
    assert front(tmp_path) == {"library_name": "peft", "base_model": "me/base", "license": "apache-2.0", "tags": ["treelora", "lora", "continual-learning"]}
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    for part in ("# TreeLoRA adapters of me/base", "four tasks", r"| 2 | pt\|br | `tasks/2-pt-br` |", tl.tree.newick(), "arxiv.org/abs/2506.10355", "from treelora.learning.hub import pull", "| lam | 0.1 |"):
        assert part in text, part
    code = re.findall(r"```python\n(.*?)```", text, re.S)
    scope = {"model": with_peft(), "base": base()}
    for block in code: exec(block, scope)  # what the card tells people to run
    assert scope["tl"].bank.names == list(TASKS) and isinstance(scope["model"], PeftModel)


def test_a_model_without_peft(tmp_path):
    tl = learned(with_ours())
    push(tl, tmp_path, license="mit")
    assert front(tmp_path)["library_name"] == "treelora" and "base_model" not in front(tmp_path)
    assert not (tmp_path / "tasks").exists() and "With PEFT alone" not in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert torch.equal(pull(tmp_path, with_ours()).bank.adapters, tl.bank.adapters)


def test_sharing_again_replaces_what_was_there(tmp_path):
    push(learned(with_peft()), tmp_path, license="mit")
    (tmp_path / "notes.txt").write_text("my own")
    push(learned(with_peft(), ("one",)), tmp_path, license="mit")
    assert [p.name for p in (tmp_path / "tasks").iterdir()] == ["1-one"] and len(list(tmp_path.glob("bank-*"))) == 1
    assert (tmp_path / "notes.txt").read_text() == "my own" and pull(tmp_path, with_peft()).bank.names == ["one"]


def test_to_the_hub_and_from_it(tmp_path):
    tl, calls = learned(with_peft()), []

    def create(self, repo_id, **how):
        calls.append(("create", repo_id, how))
        return f"page of {repo_id}"

    def upload(self, repo_id, folder_path, delete_patterns, **how):
        calls.append(("upload", repo_id, delete_patterns))
        shutil.copytree(folder_path, tmp_path / "hub")

    def download(repo_id, allow_patterns, **how):
        calls.append(("download", repo_id, how))
        (tmp_path / "got").mkdir()
        for pattern in allow_patterns:
            for p in (tmp_path / "hub").glob(pattern): shutil.copy(p, tmp_path / "got")
        return str(tmp_path / "got")

    with patch("huggingface_hub.HfApi.create_repo", create), patch("huggingface_hub.HfApi.upload_folder", upload), patch("huggingface_hub.snapshot_download", download):
        assert push(tl, "me/four", license="mit", private=False) == "page of me/four"
        again = pull("me/four", with_peft(), revision="v1", token="t")
    assert torch.equal(again.bank.adapters, tl.bank.adapters)
    assert calls == [("create", "me/four", {"private": False, "exist_ok": True}), ("upload", "me/four", OURS),
                     ("download", "me/four", {"revision": "v1", "token": "t"})]
    assert (tmp_path / "hub/tasks/1-es/adapter_model.safetensors").is_file() and 'pull("me/four", model)' in (tmp_path / "hub/README.md").read_text(encoding="utf-8")


def test_nothing_is_sent_when_something_is_wrong(tmp_path):
    tl = learned(with_peft())
    with patch("huggingface_hub.HfApi.create_repo") as create:
        with pytest.raises(ValueError, match="nothing to share"): push(TreeLoRA(with_peft()), "me/x", license="mit")
        with pytest.raises(ValueError, match="'open' is training"), tl.task("open"): push(tl, "me/x", license="mit")
        with pytest.raises(ValueError, match="licence 'do what you like' must be one word"): push(tl, "me/x", license="do what you like")
        with pytest.raises(ValueError, match="base model 'a b' must be one word"): push(tl, "me/x", license="mit", base_model="a b")
        for wrong in ("x", "a/b/c", " ", None, "me/x y"):
            with pytest.raises(ValueError, match="neither a folder nor a repository"): push(tl, wrong, license="mit")
        tl.model.add_adapter("second", LoraConfig(r=1, target_modules=["0"]))
        tl.model.set_adapter("second")
        with pytest.raises(ValueError, match="active adapter is 'second'"): push(tl, "me/x", license="mit")
    create.assert_not_called()


def test_mistakes_with_folders(tmp_path):
    tl = learned(with_peft())
    (tmp_path / "a").write_text("a file")
    with pytest.raises(ValueError, match="is a file; give a folder"): push(tl, tmp_path / "a", license="mit")
    with pytest.raises(ValueError, match=r"holds other things \(a\)"): push(tl, tmp_path, license="mit")
    with pytest.raises(FileNotFoundError, match="treelora.json is missing"): pull(tmp_path / "none", with_peft())
    push(tl, tmp_path / "b", license="mit")
    with pytest.raises(ValueError, match="saved from another model"): pull(tmp_path / "b", with_peft(r=1))
    with pytest.raises(ValueError, match="a folder, which has no revisions"): pull(tmp_path / "b", with_peft(), revision="main")
    bank = next((tmp_path / "b").glob("bank-*"))
    bank.write_bytes(bank.read_bytes()[:-8])
    with pytest.raises(ValueError, match="is damaged"): pull(tmp_path / "b", with_peft())


@pytest.mark.parametrize("error", [OSError("no route\nlong trace"), RuntimeError("401: who are you"), KeyError()])
def test_a_hub_that_says_no(tmp_path, error):
    tl = learned(with_peft(), ("one",))
    with patch("huggingface_hub.HfApi.create_repo", side_effect=error), pytest.raises(ConnectionError, match="me/x could not be pushed") as pushed: push(tl, "me/x", license="mit")
    with patch("huggingface_hub.snapshot_download", side_effect=error), pytest.raises(ConnectionError, match="me/x could not be pulled") as pulled: pull("me/x", with_peft())
    for raised in (pushed, pulled): assert type(error).__name__ in str(raised.value) and "\n" not in str(raised.value) and isinstance(raised.value, OSError)


def test_the_card_alone():
    tl = learned(with_ours(), ("a\nb",))
    assert "| 1 | a b |" in model_card(tl, "./x", "mit")
