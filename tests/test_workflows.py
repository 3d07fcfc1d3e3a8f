"What runs on other people's machines in our name: pinned actions, no rights but those that are named, and the commands of the Makefile."
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def faults(text: str) -> list[str]:
    "What a workflow does that it should not."
    flow = yaml.safe_load(text)
    steps = [step for job in flow["jobs"].values() for step in job["steps"]]
    found = [f"{step['uses']} is not pinned by its commit" for step in steps if "uses" in step and not re.search(r"@[0-9a-f]{40}$", step["uses"])]
    if flow.get("permissions") != {}: found.append("rights are given to all jobs")
    found += [f"job {name} does not name its rights" for name, job in flow["jobs"].items() if not job.get("permissions")]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    wanted = [target for step in steps for target in re.findall(r"^make ([a-z-]+)", step.get("run", ""), re.M)]
    return found + [f"make {target} does not exist" for target in wanted if target not in targets]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflows(path): assert faults(path.read_text(encoding="utf-8")) == []


def test_there_are_three(): assert [p.stem for p in WORKFLOWS] == ["docs", "newest", "test"]


@pytest.mark.parametrize("old, new, said", [
    (r"checkout@[0-9a-f]{40}", "checkout@v4", "actions/checkout@v4 is not pinned by its commit"),
    (r"^permissions: \{\}", "permissions: write-all", "rights are given to all jobs"),
    (r"    permissions: \{contents: read\}\n", "", "job test does not name its rights"),
    (r"bash \.ci/run", "make no-such", "make no-such does not exist"),
])
def test_what_is_found(old, new, said):
    text, n = re.subn(old, new, (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"), count=1, flags=re.M)
    assert n == 1 and faults(text) == [said]


def test_the_cache_is_kept_by_the_lock():
    for path in WORKFLOWS:
        text = path.read_text(encoding="utf-8")
        assert text.count("cache: pip") == text.count("cache-dependency-path: requirements.lock")
