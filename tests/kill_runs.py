"Kill runs at random moments (SIGKILL), resume them until they are done, and compare with runs that nobody touched: `python tests/kill_runs.py --kills 25`."
import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from process_runs import small_language  # noqa: E402

from treelora.engine.checkpoint import _read  # noqa: E402
from treelora.learner import run, where  # noqa: E402
from treelora.learning.text import cldr_stream  # noqa: E402


def vision(**kept):
    return run("split-digits", "treelora", epochs=1, progress=False, **kept)


def language(**kept):
    return run(cldr_stream(("es", "de"), n_train=32, n_test=6), "treelora-branch", model=small_language(), epochs=3, batch_size=4, lr=0.01, progress=False, **kept)


RUNS = {"vision": vision, "language": language}


def start(kind: str, folder: Path) -> int:
    "A new process that runs, or goes on with a run; its number."
    if pid := os.fork(): return pid
    try: RUNS[kind](checkpoints=folder / "checkpoints", checkpoint_every=3, resume=True).save(folder / "result.json")
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def killed(pid: int, after: float) -> bool:
    "Wait; kill the process if it has not ended by then. Raises RuntimeError when it failed by itself."
    end, done = time.monotonic() + after, 0
    while not done and time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        time.sleep(0.001)
    if not done:
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status): raise RuntimeError("A run ended with an error; see above.")
    return os.WIFSIGNALED(status)


def stage_of(folder: Path) -> str:
    "The latest whole checkpoint; empty before the first. Raises ValueError when one that has its name is not whole."
    names = sorted((folder / "checkpoints").glob("checkpoint-*"))
    for path in names: _read(path)
    return names[-1].name if names else ""


def reference(kind: str) -> tuple[dict, float]:
    "The same run, whole, in a process of its own: its result, and how long it took."
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        killed(start(kind, Path(folder)), 3600)
        return _learned(Path(folder)), time.monotonic() - begun


def _learned(folder: Path) -> dict:
    "What must be equal: scores, trees, and the files of tree and adapters, by their checksums."
    result = json.loads((folder / "result.json").read_text())
    saved, index = _read(sorted((folder / "checkpoints").glob("checkpoint-*"))[-1])
    files = sorted((n.rsplit("-", 1)[0], e["sha256"]) for n, e in index["files"].items() if n.endswith(".safetensors") and "/" in n)  # the last part of a name is drawn
    weights = {k: x.tolist() for k, x in saved.tensors.items() if k.startswith("weights.")}
    return {"R": result["R"], "trees": result["trees"], "files": files, "weights": weights}


def kill_often(kind: str, kills: int, seed: int = 0, shortest: float = 0.02) -> dict:
    "Kill runs until there have been so many kills; compare each run that has ended."
    whole, seconds = reference(kind)
    chance, counts = random.Random(seed), {"kills": 0, "resumes": 0, "runs": 0, "same": 0, "files lost": 0, "in the middle of a write": 0, "seconds of a whole run": round(seconds, 2)}
    while counts["kills"] < kills:
        with tempfile.TemporaryDirectory() as folder:
            folder, begun, before, left = Path(folder), False, "", set()
            while True:
                enough = counts["kills"] >= kills
                dead = killed(start(kind, folder), 600 if enough else chance.uniform(shortest, 0.3 * seconds))
                counts["resumes"] += begun
                now = stage_of(folder)
                counts["files lost"] += now < before  # a checkpoint that was there is gone, and no later one has come
                halves = {p.stat().st_mtime_ns for p in (folder / "checkpoints").glob(".[po]*")}  # parts, and old ones
                counts["in the middle of a write"] += bool(halves - left)
                begun, before, left = True, now, halves
                if not dead: break
                counts["kills"] += 1
                print(f"{kind}: {counts['kills']} kills, now at {now or 'the start'}", file=sys.stderr, flush=True)
            counts["runs"] += 1
            counts["same"] += _learned(folder) == whole
    return counts


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=25, help="of each kind of run")
    parser.add_argument("--out", type=Path, default=Path("results/crashes/kills.json"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    counts = {kind: kill_often(kind, args.kills, args.seed) for kind in RUNS}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"command": f"python tests/kill_runs.py --kills {args.kills}", **counts, **where(torch.device("cpu"))}, indent=1) + "\n")
    print(json.dumps(counts, indent=1))
    return 0 if all(c["same"] == c["runs"] and not c["files lost"] for c in counts.values()) else 1


if __name__ == "__main__": sys.exit(main())
