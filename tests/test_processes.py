"Two processes with half of each batch against one with all of it, a process that dies, and what several processes refuse; real processes under torch's launcher."
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent

def launch(case, out, processes=2, check=True, **settings):
    "Run a case of process_runs.py under torch's launcher."
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), str(HERE / "process_runs.py"), case, str(out), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if check: assert done.returncode == 0, done.stderr[-3000:]
    return done


def outcome(out, rank):
    return torch.load(Path(out) / f"{rank}.pt")


@pytest.mark.parametrize("case", ["vision", "vision-tails", "language", "language-branch", "bare"])
def test_two_processes_take_the_steps_of_one(case, tmp_path):
    launch(case, tmp_path / "two")
    launch(case, tmp_path / "one", 1)
    one, (first, second) = outcome(tmp_path / "one", 0), (outcome(tmp_path / "two", r) for r in range(2))
    for a, b in ((first, second), (first, one)):
        assert a["tree"] == b["tree"] and a["names"] == b["names"] and a["groups"] == b["groups"]
    assert torch.equal(first["adapters"], second["adapters"]) and torch.equal(first["signatures"], second["signatures"])
    difference = (first["adapters"] - one["adapters"]).abs().max().item()
    print(case, "largest difference of an adapter", difference, "largest entry", one["adapters"].abs().max().item())
    assert difference < 1e-5 and one["adapters"].abs().max() > 1e-2
    if "R" in one: assert torch.equal(first["R"].nan_to_num(), second["R"].nan_to_num()) and (first["R"] - one["R"]).nan_to_num().abs().max() < 0.02
