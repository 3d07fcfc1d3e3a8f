"Two processes with half of each batch against one with all of it, a process that dies, and what several processes refuse; real processes under torch's launcher."
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kill_runs import kill_often
from process_runs import vision
from torch.distributed.fsdp import fully_shard

from treelora.learning.processes import Shares
from treelora.engine.shard import repeated_blocks

HERE = Path(__file__).parent

def launch(case, out, processes=2, check=True, look_every=0.1, **settings):
    "Run a case of process_runs.py under torch's launcher, which looks every so many seconds whether all processes live."
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--monitor_interval", str(look_every), "--nproc_per_node", str(processes), str(HERE / "process_runs.py"), case, str(out), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if check: assert done.returncode == 0, done.stderr[-3000:]
    return done


def outcome(out, rank):
    return torch.load(Path(out) / f"{rank}.pt")


SHARDED = pytest.mark.skipif("ignored_params" not in inspect.signature(fully_shard).parameters, reason="torch before 2.7 cannot shard around adapters")
CASES = ["vision", "vision-tails", "language", "language-branch", "bare"]


@pytest.mark.slow
@pytest.mark.parametrize("case, settings", [*((c, {}) for c in CASES), *(pytest.param(c, {"shard": True}, marks=SHARDED) for c in CASES[1:4]),
                                            pytest.param("language-branch", {"shard": True, "ahead": True, "layers": 1}, marks=SHARDED)])
def test_two_processes_take_the_steps_of_one(case, settings, tmp_path):
    launch(case, tmp_path / "two", **settings)
    launch(case, tmp_path / "one", 1, **{k: v for k, v in settings.items() if k != "shard"})
    one, (first, second) = outcome(tmp_path / "one", 0), (outcome(tmp_path / "two", r) for r in range(2))
    for a, b in ((first, second), (first, one)):
        assert a["tree"] == b["tree"] and a["names"] == b["names"] and a["groups"] == b["groups"]
    assert torch.equal(first["adapters"], second["adapters"]) and torch.equal(first["signatures"], second["signatures"])
    difference = (first["adapters"] - one["adapters"]).abs().max().item()
    print(case, "largest difference of an adapter", difference, "largest entry", one["adapters"].abs().max().item())
    assert difference < 1e-5 and one["adapters"].abs().max() > 1e-2
    if "R" in one: assert torch.equal(first["R"].nan_to_num(), second["R"].nan_to_num()) and (first["R"] - one["R"]).nan_to_num().abs().max() < 0.02
    if case == "language-branch":  # each process measures some of the tasks
        assert first["routing"] == second["routing"] and first["routing"]["identity"] == pytest.approx(one["routing"]["identity"], abs=0.3)
        assert first["routing"]["oracle"] == pytest.approx(one["routing"]["oracle"], abs=0.02)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_and_it_goes_on(tmp_path):
    kept = dict(checkpoints=str(tmp_path / "checkpoints"), checkpoint_every=2)
    died = launch("vision", tmp_path / "out", check=False, look_every=25, die=[1, 4], **kept)  # time for the other process to say what it saw
    assert died.returncode != 0 and not (tmp_path / "out").exists()
    assert "ConnectionError: Process 0 of 2 lost contact with another one, which has probably died, in stage 2 of 3; its checkpoints are in" in died.stderr and "--resume" in died.stderr
    launch("vision", tmp_path / "out", resume=True, **kept)
    launch("vision", tmp_path / "whole")
    resumed, whole = (outcome(tmp_path / name, 0) for name in ("out", "whole"))
    assert torch.equal(resumed["adapters"], whole["adapters"]) and torch.equal(resumed["R"].nan_to_num(), whole["R"].nan_to_num()) and resumed["trees"] == whole["trees"]
    assert resumed["restarts"] == 1
    with pytest.raises(ValueError, match="belongs to another run .processes: 2 there, 1 here"): vision(checkpoints=tmp_path / "checkpoints", resume=True)


@pytest.mark.slow
def test_what_several_processes_refuse(tmp_path):
    refused = launch("fresh", tmp_path, check=False)
    assert refused.returncode != 0 and 'signal="fresh" needs the gradient of the whole batch' in refused.stderr
    refused = launch("own-ways", tmp_path, check=False)
    assert refused.returncode != 0 and "the processes have different weights: the method 'own-ways'" in refused.stderr


@pytest.mark.slow
def test_results_are_written_once(tmp_path):
    (tmp_path / "shell.py").write_text("import sys\nfrom treelora.cli import main\nsys.exit(main())\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "shell.py"), "run", "--epochs", "1", "--quiet", "--results", str(tmp_path / "r")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout.count("treelora on split-digits: OP") == 1
    assert json.loads((tmp_path / "r/split-digits/quick/treelora-seed0.json").read_text())["config"]["processes"] == 2


@pytest.mark.slow
@SHARDED
def test_a_sharded_run_is_kept_and_goes_on(tmp_path):
    kept = dict(checkpoints=str(tmp_path / "checkpoints"), checkpoint_every=2, shard=True)
    assert launch("vision", tmp_path / "out", check=False, die=[1, 4], **kept).returncode != 0
    launch("vision", tmp_path / "out", resume=True, **kept)
    launch("vision", tmp_path / "whole")
    resumed, whole = (outcome(tmp_path / name, 0) for name in ("out", "whole"))
    assert torch.equal(resumed["adapters"], whole["adapters"]) and torch.equal(resumed["R"].nan_to_num(), whole["R"].nan_to_num()) and resumed["restarts"] == 1


def test_what_sharding_refuses():
    with pytest.raises(ValueError, match="There is one process, so there is nothing to share|needs torch 2.7"): vision(shard=True)
    with pytest.raises(ValueError, match="compile=True and shard=True do not go together"): vision(shard=True, compile=True)
    with pytest.raises(ValueError, match="has no stack of blocks of one kind"): repeated_blocks(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_sharded_models_are_refused(kind, monkeypatch):
    from accelerate import Accelerator
    from accelerate.utils import DistributedType
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType[kind]))
    with pytest.raises(ValueError, match=f"needs each gradient as a whole; {kind} cuts it up"): vision()


def test_shares_of_batches():
    batches = [list(range(8)), list(range(7)), [5]]
    pieces = [Shares(batches, rank, 3) for rank in range(3)]
    for batch, own in zip(batches, zip(*pieces)):
        sizes = [p.sizes.popleft() for p in pieces]
        assert [i for piece, (n, _) in zip(own, sizes) for i in piece[:n]] == batch and all(piece for piece in own)
        assert max(n for n, _ in sizes) - min(n for n, _ in sizes) <= 1 and {total for _, total in sizes} == {len(batch)}


@pytest.mark.slow
def test_random_kills():
    "A short form of `python tests/kill_runs.py`, which kills 25 runs of each kind."
    counts = kill_often("language", 3)
    assert counts["kills"] == 3 and counts["resumes"] == 3 and counts["same"] == counts["runs"] and counts["files lost"] == 0
