"The answers of the page `Reproduce it`: made from results alone, with commands that exist."
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from treelora.cli import parser
from treelora.paper.reproduce import QUESTIONS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"


@pytest.mark.parametrize("name", list(QUESTIONS))
def test_an_answer_has_a_command_that_exists_and_names_its_files(name):
    answer = QUESTIONS[name](RESULTS)
    assert answer.rows and answer.files and all(len(row) == len(answer.head) for row in answer.rows)
    assert all((RESULTS / f).exists() for f in answer.files)
    commands = answer.command.splitlines() + [c for row in answer.rows for cell in row for c in re.findall(r"`(treelora [^`]+)`", cell)]
    for line in commands:
        if line.startswith("treelora "): parser().parse_args(shlex.split(line)[1:])


@pytest.mark.parametrize("name", list(QUESTIONS))
def test_without_results_nothing_fails_and_nothing_is_made_up(name, tmp_path):
    answer = QUESTIONS[name](tmp_path)
    assert not answer.files and "No results are there yet." in answer._repr_markdown_()
    if name not in ("batch", "numbers", "versions"): assert not re.search(r"\d\.\d", str([row[1:] for row in answer.rows]))


def test_the_page_shows_what_the_files_say():
    "Run nbs/paper/09_reproduce.ipynb again where this fails."
    page = json.loads((ROOT / "nbs" / "paper" / "09_reproduce.ipynb").read_text(encoding="utf-8"))
    asked = {}
    for c in page["cells"]:
        if found := re.search(r'^ask\("(\w+)"\)$', "".join(c["source"]), re.M): asked[found[1]] = "".join(c["outputs"][0]["data"]["text/markdown"])
    assert list(asked) == list(QUESTIONS)
    for name, shown in asked.items(): assert shown == QUESTIONS[name](RESULTS)._repr_markdown_(), name


def test_numbers_move_with_the_files(tmp_path):
    folder = tmp_path / "split-digits" / "quick"
    folder.mkdir(parents=True)
    for seed in (0, 1, 2): shutil.copy(RESULTS / "split-digits" / "quick" / f"treelora-seed{seed}.json", folder)
    digits = lambda: next(row for row in QUESTIONS["vision"](tmp_path).rows if row[0].startswith("split-digits"))
    shown = digits()
    (folder / "treelora-seed2.json").unlink()
    assert digits()[1] != shown[1] and shown[2] == "–"
