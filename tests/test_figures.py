"Figures and tables from files: the same bytes each time, bad files named, missing ones with the command that makes them."
import json
import shutil
import warnings
from pathlib import Path

import pytest
from test_language_results import results as language_results  # noqa: F401  a fixture
from test_project import fake_result
from test_project import results as vision_results  # noqa: F401  a fixture

from treelora.cli import main
from treelora.paper.figures import _BOUNDS, _SKETCH, CIFAR, CUB, FASHION, caption, figure, load_results, round_schematic, save_all, save_figure
from treelora.paper.language_figures import families, pareto, save_language_figures
from treelora.paper.tables import PHOTOS, _pixels, contest_table, parts_table, read_results, table

DIGITS = ("split-digits", "quick")


def folder(results: Path, *place: str) -> Path: return results.joinpath(*place)


def bytes_of(paths: list[Path]) -> dict[str, bytes]: return {p.name: p.read_bytes() for p in paths}


def test_the_command_twice_gives_the_same_bytes(vision_results, tmp_path, capsys):
    for out in "ab": assert main(["figures", "--results", str(vision_results), "--out", str(tmp_path / out)]) == 0
    first, again = ({p.name: p.read_bytes() for p in (tmp_path / out).iterdir()} for out in "ab")
    assert first == again and len(first) == 13  # six figures of two kinds, and the captions
    for name, data in first.items():
        if name.endswith("svg"): assert b"<dc:date>" not in data and b"Matplotlib v" not in data, name
    capsys.readouterr()


def test_other_results_give_other_bytes(vision_results, tmp_path):
    first = bytes_of(save_figure(figure(1, vision_results), "f", tmp_path))
    (folder(vision_results, *DIGITS) / "seqlora-seed0.json").write_text(json.dumps(fake_result("seqlora", 0, 0.6)))
    again = bytes_of(save_figure(figure(1, vision_results), "f", tmp_path))
    assert all(again[name] != first[name] for name in ("f.svg", "f.png"))


def test_language_figures_are_the_same_bytes(language_results, tmp_path):
    first = bytes_of(save_language_figures(language_results, tmp_path / "a"))
    assert len(first) == 6 and bytes_of(save_language_figures(language_results, tmp_path / "b")) == first


BAD = {"half of it": '{"format": 1, "config": {"met', "no object": "[]", "another version": '{"format": 2}', "no text": b"\x80\x81",
       "no scores": json.dumps({**fake_result("seqlora", 7, 0.5), "scores": {}}), "no method": json.dumps({**fake_result("seqlora", 7, 0.5), "config": {}})}
WHY = {"half of it": "no valid JSON", "no object": "format None", "another version": "of format 2, but this version reads format 1", "no text": "no valid JSON",
       "no scores": "lacks scores.op", "no method": "lacks config.method, config.seed"}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_named_and_left_out(vision_results, what):
    before, rows = load_results(vision_results), table(1, vision_results).rows
    bad = folder(vision_results, *DIGITS) / "seqlora-seed7.json"
    bad.write_bytes(BAD[what] if isinstance(BAD[what], bytes) else BAD[what].encode())
    for read in (lambda: load_results(vision_results), lambda: read_results(vision_results, *DIGITS)):
        with pytest.warns(UserWarning, match=f"seqlora-seed7.json is left out: .*{WHY[what]}"): assert read() == before
    with pytest.warns(UserWarning, match="seqlora-seed7.json"): assert table(1, vision_results).rows == rows
    for make in (contest_table, parts_table):
        with pytest.warns(UserWarning, match="seqlora-seed7.json"): assert len(make(vision_results).rows) == 2


def test_only_bad_files_are_no_results(tmp_path):
    place = folder(tmp_path, *DIGITS)
    place.mkdir(parents=True)
    (place / "seqlora-seed0.json").write_text("{")
    with pytest.warns(UserWarning, match="seqlora-seed0.json"), pytest.raises(FileNotFoundError, match="treelora figures --run missing"): figure(4, tmp_path)


@pytest.mark.parametrize("n", [-1, 0, 14, 100])
def test_a_table_that_the_paper_has_not(n, tmp_path, capsys):
    with pytest.raises(ValueError, match=f"no table {n}; it has tables 1 to 13"): table(n, tmp_path)
    assert main(["table", str(n), "--results", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"treelora: The paper has no table {n}; it has tables 1 to 13.\n"


def test_all_tables_stand_without_results(tmp_path):
    for n in range(1, 14): assert f"Table {n}:" in str(table(n, tmp_path)), n


@pytest.mark.parametrize("n, place", [(1, DIGITS), (3, DIGITS), (4, DIGITS), (5, DIGITS), (6, FASHION), (7, CUB), (8, DIGITS)])
def test_missing_results_say_which_command_makes_them(n, place, tmp_path):
    command = "campaign campaigns/cub200.toml --root DATA`" if place == CUB else "figures --run missing --stream {} --scale {}`".format(*place)
    for draw in (figure, caption):
        with pytest.raises(FileNotFoundError, match=f"treelora {command}"): draw(n, tmp_path)
    with pytest.raises(FileNotFoundError, match="treelora compare --stream split-digits --scale quick`"): figure(n, tmp_path, "split-digits", "quick/one-epoch")


def test_figures_without_their_part_of_the_results(vision_results, tmp_path):
    for path in folder(vision_results, *DIGITS).glob("*.json"):
        result = json.loads(path.read_text())
        path.write_text(json.dumps({**result, "curves": [], "trees": []}))
    with pytest.raises(FileNotFoundError, match="treelora run --method treelora --stream split-digits --scale quick --curves 14"): figure(1, vision_results)
    with pytest.raises(FileNotFoundError, match="treelora run --method treelora --stream split-digits --scale quick`"): figure(5, vision_results)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        paths = save_all(vision_results, tmp_path / "f")
    assert {p.name for p in paths} == {f"figure{n}.{kind}" for n in (2, 4) for kind in ("svg", "png")}
    assert [str(w.message).partition(" is left out")[0] for w in said] == [f"Figure {n} of split-digits" for n in (1, 3, 5, 8)]


def test_drawings_need_no_results_and_are_the_same_bytes(tmp_path):
    for draw in (lambda: figure(2, tmp_path), round_schematic):
        first = bytes_of(save_figure(draw(), "f", tmp_path))
        assert bytes_of(save_figure(draw(), "f", tmp_path)) == first
    assert "nothing in it is measured" in caption(2, tmp_path)


def test_drawings_are_of_no_stream(vision_results, tmp_path):
    shutil.copytree(folder(vision_results, *DIGITS), folder(vision_results, *FASHION))
    assert not [p for p in save_all(vision_results, tmp_path, *FASHION) if p.name.startswith("figure2")]


@pytest.mark.parametrize("draw", [lambda: figure(2), round_schematic])
def test_texts_of_drawings_are_readable_and_do_not_overlap(draw):
    fig = draw()
    fig.draw_without_rendering()
    words = [t for ax in fig.axes for t in (*ax.texts, ax.title, ax._left_title) if t.get_text()]
    boxes = [t.get_window_extent() for t in words]
    assert len(words) > 15 and all(t.get_fontsize() >= 8 for t in words)
    for i, a in enumerate(boxes):
        assert fig.bbox.x0 <= a.x0 and a.x1 <= fig.bbox.x1 and fig.bbox.y0 <= a.y0 and a.y1 <= fig.bbox.y1, words[i].get_text()
        for j in range(i): assert not a.overlaps(boxes[j]), (words[i].get_text(), words[j].get_text())


def test_the_drawn_bounds_obey_eq_2():
    for node, bound in _BOUNDS.items():  # max(own, smaller child's): never under the latter
        if isinstance(node, tuple): assert min(_BOUNDS[child] for child in node) <= bound
    at = _SKETCH
    while isinstance(at, tuple): at = min(at, key=_BOUNDS.get)
    assert at == "4"  # where the red path ends


def test_photographs_come_first_once_they_were_run(vision_results, tmp_path):
    for path in folder(vision_results, *DIGITS).glob("*.json"):
        result = json.loads(path.read_text())
        result["config"] |= {"stream": CIFAR[0], "scale": CIFAR[1]}
        result |= {"classes": [[0, 1], [2, 3]], "train_sizes": [20, 20]}
        new = folder(vision_results, *CIFAR) / path.name
        new.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps(result))
    assert "Stream split-cifar100" in caption(4, vision_results) and "images for each of" in caption(4, vision_results)
    assert "Stream split-digits" in caption(4, vision_results, "split-digits")
    shown = table(1, vision_results)
    assert sum("split-cifar100" in h for h in shown.head) == 4 and "split-cifar100 at scale small" in shown.title and "70 pixels" in shown.note
    assert main(["figures", "--results", str(vision_results), "--out", str(tmp_path)]) == 0
    assert {"figure4.svg", "figure4-split-digits.svg"} <= {p.name for p in tmp_path.iterdir()}


def test_captions_know_the_pixels_of_each_stream(): assert [_pixels(s) for s in PHOTOS] == [70, 98, 70]


def test_figure_6_joins_once_its_stream_was_run(vision_results, tmp_path):
    shutil.copytree(folder(vision_results, *DIGITS), folder(vision_results, *FASHION))
    assert {"figure6.svg", "figure6.png"} <= {p.name for p in save_all(vision_results, tmp_path)}
    assert "Stream split-fashion-mnist" in (tmp_path / "captions.md").read_text()


def test_language_figures_without_their_part_of_the_results(language_results, tmp_path):
    shutil.rmtree(folder(language_results, "cldr", "quick", "lambda"))
    with pytest.raises(FileNotFoundError, match="treelora figures --run missing --stream cldr"): pareto(language_results)
    with pytest.raises(FileNotFoundError, match="alone on cldr with seed 9"): families(language_results, seed=9)
    with pytest.raises(FileNotFoundError, match="treelora on cldr with seed 0|No results of none"): families(language_results, method="none")
    with pytest.warns(UserWarning, match="pareto-cldr is left out"): paths = save_language_figures(language_results, tmp_path)
    assert {p.stem for p in paths} == {"matrix-cldr", "families-cldr"}


def test_axis_labels_lie_within_the_page(vision_results):
    fig = figure(4, vision_results)
    fig.draw_without_rendering()
    page = fig.bbox
    for ax in fig.axes:
        box = ax.xaxis.label.get_window_extent()
        assert page.x0 <= box.x0 and box.x1 <= page.x1, ax.get_xlabel()
