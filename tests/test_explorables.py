"The figures that can be played with: short, without anything from the network, the same in the page as in their file; their logic where node is installed."
import json
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest

NBS = Path(__file__).parent.parent / "nbs"
PAGES = {"bandit": "core/01_bandits.ipynb", "threshold": "core/06_pull.ipynb", "languages": "experiments/02_language.ipynb"}
LOGIC = {
    "bandit": "const game = x.newGame(1); for (let t = 0; t < 60; t++) x.step(game, 0.05, 0.8); [game.t, game.n[1], game.n.slice(16).reduce((a, b) => a + b), game.n[18] > 30, game.n.slice(16).filter(n => n === 0).length > 3]",
    "threshold": "[x.soft(0.5, 0.2) > 0.29, x.soft(-0.5, 0.2) < -0.29, x.soft(0.1, 0.2) === 0, x.picture(x.WEIGHTS, 0.2).match(/<circle/g).length, x.WEIGHTS.filter(w => Math.abs(w) <= 0.2).length]",
    "languages": "const tree = x.nodes([[['a', 'b', 'c']], [['a', 'b', 'c']], [['a', 'c'], ['b']], [['a'], ['c'], ['b']]]); [tree.children.length, tree.children[0].children.length, x.placed(tree).length]",
}
EXPECTED = {"bandit": [60, 60, 60, True, True], "threshold": [True, True, True, 10, 10], "languages": [2, 2, 5]}


@pytest.mark.parametrize("name", PAGES)
def test_script_is_short_and_needs_no_network(name):
    script = (NBS / "explorables" / f"{name}.js").read_text()
    assert len(script.splitlines()) < 150
    assert not re.search(r"https?:|//cdn|\bimport\b|\bfetch\b|XMLHttpRequest|</script", script)
    assert "<button type=\"button\"" in script and "<label" in script and "currentColor" in script


@pytest.mark.parametrize("name", PAGES)
def test_page_holds_the_script_as_it_is(name):
    cells = [c for c in nbformat.read(NBS / PAGES[name], 4).cells if c.cell_type == "code" and f'data-explorable="{name}"' in c.source]
    (html,) = [o.data["text/html"] for c in cells for o in c.outputs]
    assert (NBS / "explorables" / f"{name}.js").read_text() in html and "<noscript>" in html


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.parametrize("name", LOGIC)
def test_logic(name):
    code = f"const x = require({json.dumps(str(NBS / 'explorables' / f'{name}.js'))}); const run = () => {{ {LOGIC[name].rpartition('; ')[0]}; return {LOGIC[name].rpartition('; ')[2]}; }}; console.log(JSON.stringify(run()))"
    done = subprocess.run(["node", "-e", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == EXPECTED[name]
