"The claims as cards and as a file: what they say is what the report says, and the saved file is of today's results."
import hashlib
import json
from pathlib import Path

import pytest

from treelora.cli import main
from treelora.paper.cards import HALVES, Cards, cards, claims_text, measured
from treelora.paper.report import CLAIMS, UNTESTED, VERDICTS, report

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"


@pytest.fixture(scope="module")
def deck(): return cards(RESULTS)


def test_cards_say_what_the_report_says(deck):
    found = report(RESULTS).findings
    assert [c["id"] for c in deck] == [c.id for c in CLAIMS]
    for c in deck:
        assert (c["verdict"], c["found"], c["on"]) == (found[c["id"]].verdict, found[c["id"]].found, found[c["id"]].on)
        assert c["halves"] and set(c["halves"]) <= set(HALVES)
        assert c["command"].startswith(("treelora ", "python ")), c["id"]
        for n in c["numbers"]: assert f"{abs(n['value']):g}".split(".")[0] in c["found"].replace(",", "")


def test_the_saved_file_is_of_todays_results(deck):
    saved = json.loads((ROOT / "nbs" / "claims.json").read_text(encoding="utf-8"))
    assert saved == json.loads(claims_text(deck)), "run: treelora report --json nbs/claims.json"
    for c in saved["claims"]:
        for file, sha256 in c["results"].items():
            assert hashlib.sha256((RESULTS / file).read_bytes()).hexdigest() == sha256
    assert sum(saved["counts"].values()) == len(CLAIMS)


@pytest.mark.parametrize("found, numbers", [
    ("a: 95.2, difference -0.9 ± 0.8", [(95.2, None, ""), (-0.9, 0.8, "")]),
    ("from 8 to 4,096 tasks 2.7x as long", [(8, None, ""), (4096, None, ""), (2.7, None, "x")]),
    ("keeps 100.5 %; on split-digits none", [(100.5, None, "%")]),
    ("no results; to be made by `x`", []), ("over OLoRA2 and glyph-7", []),
])
def test_numbers_of_a_sentence(found, numbers):
    assert [(n["value"], n["band"], n["unit"]) for n in measured(found)] == numbers


def test_each_claim_is_a_card_in_each_of_its_halves(deck):
    html = Cards(deck)._repr_html_()
    assert html.count("<article") == len(CLAIMS) and "<script" not in html
    for v in VERDICTS: assert html.count(f"</h4>") == len(CLAIMS) and html.count(f'">{v}</b>') == sum(c["verdict"] == v for c in deck)


def test_a_folder_without_results_says_what_makes_them(tmp_path):
    none = cards(tmp_path)
    assert {c["verdict"] for c in none} == {UNTESTED}
    assert all(c["command"] in c["found"] and not c["results"] for c in none)


def test_the_command_writes_the_file(tmp_path, capsys):
    assert main(["report", "--results", str(tmp_path), "--json", str(tmp_path / "c.json")]) == 0
    assert f"{len(CLAIMS)} {UNTESTED}" in capsys.readouterr().out
    assert json.loads((tmp_path / "c.json").read_text())["counts"][UNTESTED] == len(CLAIMS)
    assert main(["report", "--results", str(tmp_path / "none")]) == 2
