"Fifty tasks, nine ways to begin them: looks, loss given up, and the three claims, on made-up runs."
import json

import numpy as np
import pytest

from treelora.experiments.many_tasks import NAMES, as_good, chosen, claims, given_up, load_ways, looks_of, speed, ways_picture

TASKS = ["a", "b", "c"]


def made(op, seconds, seed, looks=None, method="treelora-branch"):
    "A run of three tasks; `looks`: for each later task, how often it looked at each earlier one, with losses that rise by 0.1 from task to task."
    found = [{"branch": min(r, key=lambda k: TASKS.index(k)), "rounds": r, "loss": {k: 1 + 0.1 * TASKS.index(k) for k in r}} for r in looks or []]
    return {"tasks": TASKS, "config": {"method": method, "seed": seed, "stream": "s", "kind": "vision"}, "scores": {"op": op, "bwt": 0.01, "average_curve": [op] * 3}, "R": [[op, None, None], [op, op, None], [op] * 3],
            "seconds": {"per_task": [seconds / 3] * 3, "end_per_task": [0.0] * 3, "train": seconds, "end_of_task": 0.0}, "extra": {"branches": found} if looks is not None else {}}


def ways(tree_op=0.80, half_seconds=40.0, tree_looks=({"a": 1}, {"a": 1, "b": 0}), sweep_looks=({"a": 4}, {"a": 4, "b": 4})):
    every = lambda *more, **kw: {s: made(*more, s, **kw) for s in range(3)}
    return {"hidelora": every(0.80, 90.0, method="hidelora"), "sweep": every(0.80, 120.0, looks=sweep_looks), "tree": every(tree_op, 100.0, looks=tree_looks),
            "fresh": {s: made(0.7, 80.0, s, looks=[{}, {}]) for s in ()}, "tree-half": every(0.80, half_seconds, looks=tree_looks)}


def some(**kw): return {k: v for k, v in ways(**kw).items() if v}


def test_looks_are_counted_task_by_task():
    assert looks_of(some()["sweep"][0]).tolist() == [4, 8]
    assert looks_of(some()["hidelora"][0]).tolist() == [0, 0]


def test_the_last_task_is_what_a_method_without_branches_starts_from():
    assert chosen(some()["hidelora"][0]) == ["a", "b"]
    assert chosen(some()["tree"][0]) == ["a", "a"]


def test_loss_given_up_is_over_the_lowest_that_the_sweep_saw():
    w = some()
    assert given_up(w["tree"][0], w["sweep"][0]).tolist() == [0, 0]
    assert given_up(w["hidelora"][0], w["sweep"][0]) == pytest.approx([0, 0.1])


def test_the_claims_hold_where_they_are_planted():
    assert [holds for *_, holds in claims(some())] == [True, True, True]
    assert speed(some()) == pytest.approx(90 / 40)


@pytest.mark.parametrize("changed, which", [(dict(tree_op=0.79), 0), (dict(tree_looks=({"a": 2}, {"a": 2, "b": 1})), 1), (dict(half_seconds=80.0), 2)])
def test_each_claim_can_fail(changed, which):
    assert not claims(some(**changed))[which][-1]


def test_a_tree_that_is_not_as_good_is_not_fast():
    w = some()
    w["tree"] = w["tree-half"] = {s: made(0.5, 1.0, s, looks=[{"a": 1}, {"a": 1}]) for s in range(3)}
    assert speed(w) == 0 and not as_good(w, "tree", "hidelora")


def test_runs_are_read_by_way_and_seed(tmp_path):
    for way, runs in some().items():
        for seed, run in runs.items():
            path = tmp_path / "s" / "many" / way / f"x-seed{seed}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(run))
    found = load_ways(tmp_path, "s")
    assert list(found) == [w for w in NAMES if w in some()] and set(found["tree"]) == {0, 1, 2}
    assert np.isfinite(given_up(found["tree"][0], found["sweep"][0])).all()
    assert len(ways_picture(found).axes) == 4
