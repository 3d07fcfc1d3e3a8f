"Superclasses: WordNet's way for each of them, distances of signatures, and saved rows that follow from saved distances."
import json
from itertools import combinations
from pathlib import Path

import pytest
import torch

from treelora.experiments.language import agreement
from treelora.experiments.reference import near_kinship
from treelora.experiments.superclasses import DISTANCES, WORDNET, centred, compared, superclass, wordnet_kinship
from treelora.learning.photos import SUPERCLASSES

TASKS = [f"cifar100-{name}" for name in WORDNET]
SAVED = json.loads((Path(__file__).parent.parent / "results" / "split-cifar100" / "superclasses.json").read_text(encoding="utf-8"))


def test_every_superclass_has_its_way():
    assert set(WORDNET) == set(SUPERCLASSES) == set(map(superclass, TASKS))


@pytest.mark.parametrize("near, far", [(("fish", "reptiles"), ("fish", "insects")), (("fish", "insects"), ("fish", "trees")), (("vehicles_1", "vehicles_2"), ("vehicles_1", "household_furniture")), (("trees", "flowers"), ("trees", "people"))])
def test_who_is_nearer(near, far):
    kin = lambda pair: wordnet_kinship(*(f"cifar100-{name}" for name in pair))
    assert kin(near) > kin(far) and kin(near) == kin(near[::-1])


def test_kinship_is_that_of_a_tree():
    "Of three, the two smaller kinships are equal: no superclass is close to two that are far from each other."
    for a, b, c in combinations(TASKS, 3):
        low, middle, _ = sorted((wordnet_kinship(a, b), wordnet_kinship(a, c), wordnet_kinship(b, c)))
        assert low == middle


def test_signatures_that_are_the_groups_agree_and_noise_does_not():
    g = torch.Generator().manual_seed(0)
    words = sorted({" ".join(way.split()[:n]) for way in WORDNET.values() for n in range(1, len(way.split()) + 1)})
    column = {w: 3.0 * torch.randn(400, generator=g) for w in words}
    way = lambda task: WORDNET[superclass(task)].split()
    told = torch.stack([sum(column[" ".join(way(t)[:n])] for n in range(1, len(way(t)) + 1)) for t in TASKS])
    noise = torch.randn(told.shape, generator=g)
    best, chance = (max(r["agreement"] for r in compared(x[:, None], TASKS)) for x in (told, noise))
    assert best > 0.9 and chance < 0.6 and best > chance + 0.3


def test_centred_takes_off_what_all_have_in_common():
    G = torch.randn(5, 2, 7, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(centred(G + 100.0), centred(G), atol=1e-3, rtol=0)
    assert centred(G).shape == (2, 5, 5) and centred(G).diagonal(dim1=1, dim2=2).abs().max() < 1e-5


@pytest.mark.parametrize("place", ["none", "first", "last"])
@pytest.mark.parametrize("by", DISTANCES)
def test_saved_rows_follow_from_saved_distances(place, by):
    d, tasks = torch.tensor(SAVED["distances"][f"0 {place}"][by]), SAVED["tasks"]["0"]
    row = next(r for r in SAVED["rows"] if (r["seed"], r["place"], r["by"]) == (0, place, f"{by}, all layers"))
    assert agreement(near_kinship(d, tasks), wordnet_kinship, tasks) == pytest.approx(row["agreement"], abs=0.01)
