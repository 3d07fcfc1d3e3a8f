"Imports go one way through the house, and the public names are where they were."
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / ".ci"))
from limits import imports, module_name  # noqa: E402

FLOORS = [  # of the package; a module imports its own floor and those below it
    ("patch", "arguments"), ("lora", "signature", "tree", "bandit", "sparse", "metrics"), ("engine",), ("algorithm",), ("learning", "streams", "trainer"), ("methods",), ("learner",),
    ("theory",), ("paper.numbers", "paper.tables", "paper.figures", "paper.statistics"), ("experiments",), ("paper",), ("cli",)]
PUBLIC = {
    "treelora.lora": "LoRALinear add_lora lora_layers", "treelora.tree": "TaskTree", "treelora.bandit": "get_search SEARCHES", "treelora.algorithm": "TreeLoRA VARIANTS",
    "treelora.trainer": "TreeLoraCallback", "treelora.metrics": "op bwt forgetting average_curve", "treelora.streams": "get_stream list_streams",
    "treelora.methods": "get_method list_methods", "treelora.learner": "run Result", "treelora.theory": "SmoothTree play regret_bound",
    "treelora.paper": "figure table claims", "treelora.sparse": "prox_", "treelora.signature": "get_signature", "treelora.cli": "main"}


def floor(module: str) -> int:
    "The floor of a module: that of the longest name that it begins with."
    named = [(len(name), n) for n, names in enumerate(FLOORS) for name in names if f"{module}.".startswith(f"{name}.")]
    return max(named)[1]


def test_imports_go_one_way():
    package = ROOT / "treelora"
    names = {module_name(p, package): p for p in package.rglob("*.py") if p.name != "_modidx.py"}
    names.pop("")
    up = [f"{name} imports {other}" for name, path in names.items() for other in imports(path, name, package.name, set(names)) if floor(other) > floor(name)]
    assert not up, "\n".join(up)


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module):
    found = importlib.import_module(module)
    assert not [name for name in PUBLIC[module].split() if not hasattr(found, name)]


def test_paper_by_number(tmp_path):
    from treelora import paper
    assert paper.figure(2).axes and paper.table(1, tmp_path).rows and set(paper.claims(tmp_path).counts()) == set(paper.claims(ROOT / "results").counts())
    with pytest.raises(ValueError, match="Figure 9"): paper.figure(9)
