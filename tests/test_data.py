"Data that cannot move: the names of CLDR, the hash of every stream and of the weights, and tables that never mix results of different data."
import errno
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from treelora.experiments import ablations, campaigns, vision as experiments, language as experiments_llm, paper_vs_code, training_time
from treelora.learning import cldr
from treelora.experiments.ablations import Change, ablate, ablation_table, load_ablation
from treelora.engine.checkpoint import file_sha256, weights_sha256
from treelora.learning.cldr import CLDR_SHA256, LEAST, cldr_bytes, cldr_entry, cldr_languages, cldr_names, compare_cldr, read_cldr, rebuild_cldr, shipped_cldr
from treelora.cli import main
from treelora.experiments.contenders import contend, places
from treelora.experiments.vision import run_set
from treelora.paper.figures import caption, figure, load_results
from treelora.learning.language import language_weights_file, packaged_smollm2
from treelora.learner import run
from treelora.learning.models import get_model, save_weights, weights_file
from treelora.experiments.paper_vs_code import run_switches, switch_table
from treelora.paper.evidence import Evidence
from treelora.paper.report import report
from treelora.streams import FASHION_DEBIAN, ImageSet, Stream, Task, TaskStream, get_stream
from treelora.paper.tables import BEFORE, contest_table, parts_table, read_results, table
from treelora.learning.text import Example, TextSet, TextStream, TextTask, cldr_split
from treelora.experiments.training_time import load_times, measure_time, time_table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
# of seed 0, on every processor and with every library: a change here makes all saved results incomparable
HASHES = {"split-digits": "21cc6b5cdf1cd967", "permuted-digits": "d91b15c540762633", "split-fashion-mnist": "af88b87b6a92180d", "cldr": "6089a866c8e3129a", "cldr-blind": "b7c77353fc385487"}


def fresh(code: str, **env) -> str:
    "What another Python prints."
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)} | env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# The names of CLDR

@pytest.fixture(scope="module")
def made() -> dict:
    "The names of the installed babel."
    pytest.importorskip("babel", exc_type=ImportError)
    return cldr.names_from_babel()


def test_the_shipped_names_are_those_of_the_babel_that_made_them(made):
    names = shipped_cldr()
    assert (names["cldr"], names["babel"]) == ("47", "2.18.0")
    if made["babel"] == names["babel"]: assert made == names and compare_cldr(names, made).endswith("0 names changed in 0 languages and variants")
    else: assert made != names and f"(babel {made['babel']})" in compare_cldr(names, made)


def test_names_titles_and_split_are_what_babel_itself_says(made):
    if made["babel"] != shipped_cldr()["babel"]: pytest.skip("another version of babel")
    from babel import Locale
    english = Locale.parse("en")
    for code in [*sorted(shipped_cldr()["languages"])[::7], "pt", "pt_BR", "pt_PT", "es_MX", "zh_TW", "zh_Hant", "sr_Latn", "iw"]:
        other, found = Locale.parse(code), {}
        for ours, theirs in ((english.territories, other.territories), (english.languages, other.languages)):
            for key in sorted(ours.keys() & theirs.keys()):
                if ours[key] != theirs[key] and max(len(ours[key]), len(theirs[key])) < 28: found.setdefault(ours[key], theirs[key])
        assert list(cldr_names(code).items()) == list(found.items()), code
        assert cldr_entry(code).title == (other.get_display_name("en") or other.get_display_name() or str(other)), code
    assert set(sum(cldr_split(0), [])) == {*english.territories.values(), *english.languages.values()}


def test_every_language_has_enough_names():
    codes = cldr_languages()
    assert len(codes) == 154 and all(len(cldr_names(code)) >= LEAST for code in codes if code != "en") and cldr_names("en") == {}
    assert cldr_entry("es_MX").languages["ace"] != cldr_entry("es").languages["ace"] and cldr_entry("es_MX").territories["DE"] == "Alemania"
    assert cldr_entry("PT-br").code == "pt_BR" and cldr_entry("zh_TW").code == "zh_Hant_TW"
    for unknown in ("klingon", "aa", "", "es_XX"):
        with pytest.raises(ValueError, match=r"CLDR knows no language .*list\(treelora\.learning\.text\.cldr_languages\(\)\).*`treelora cldr`"): cldr_entry(unknown)


def damaged(how: str, whole: bytes) -> tuple[bytes | None, str]:
    "A damaged file, and what should be said."
    other = gzip.compress(gzip.decompress(whole).replace(b"Alemania", b"Alemanio"))
    return {"missing": (None, "there is no such file"), "cut": (whole[:-100], "no complete gzip file"), "no gzip": (b"{}", "no complete gzip file"),
            "empty": (b"", "found is e3b0c44298fc"), "one letter": (other, hashlib.sha256(gzip.decompress(other)).hexdigest())}[how]


@pytest.mark.parametrize("how", ["missing", "cut", "no gzip", "empty", "one letter"])
def test_a_damaged_file_of_names_is_named_with_its_checksums(how, tmp_path, monkeypatch):
    data, words = damaged(how, cldr._shipped_path().read_bytes())
    path = tmp_path / "cldr.json.gz"
    if data is not None: path.write_bytes(data)
    monkeypatch.setattr(cldr, "_shipped_path", lambda: path)
    cldr.shipped_cldr.cache_clear(), cldr._shipped_spellings.cache_clear()
    try:
        with pytest.raises(ValueError, match="install the package treelora again") as error: get_stream("cldr")
        assert all(word in str(error.value) for word in (str(path), CLDR_SHA256, words)) and "\n" not in str(error.value)
    finally: cldr.shipped_cldr.cache_clear(), cldr._shipped_spellings.cache_clear()


@pytest.mark.parametrize("content", [b"[]", b"{", b'{"languages": {}}', b'{"languages": {"en": {"title": 3}}, "cldr": "1", "babel": "2", "aliases": {}}', b"\xff"])
def test_other_content_is_not_taken_for_names(content, tmp_path):
    path, sha256 = tmp_path / "x.gz", hashlib.sha256(content).hexdigest()
    path.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match="not the expected JSON"): read_cldr(path, sha256)
    path.write_bytes(gzip.compress(cldr_bytes(shipped_cldr()), 1))  # other bytes of the same content
    assert read_cldr(path) == shipped_cldr()


def test_the_file_is_read_once(monkeypatch):
    calls, real = [], read_cldr
    monkeypatch.setattr(cldr, "read_cldr", lambda path: calls.append(path) or real(path))
    cldr.shipped_cldr.cache_clear()
    for language in ("es", "de", "pt_BR"): cldr_names(language)
    get_stream("cldr")
    assert len(calls) == 1


def test_rebuilding_without_babel(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "babel", None), monkeypatch.setitem(sys.modules, "babel.core", None)
    assert main(["cldr", "--out", str(tmp_path / "new.gz")]) == 2 and not list(tmp_path.iterdir())
    assert capsys.readouterr().err == "treelora: Rebuilding the names needs the package babel: pip install babel.\n"


def test_rebuilding_writes_a_file_that_can_be_read(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cldr, "names_from_babel", lambda: made)
    assert main(["cldr"]) == 0 and not list(tmp_path.iterdir())
    assert capsys.readouterr().out.startswith(f"CLDR 47 (babel 2.18.0) -> CLDR {made['cldr']} (babel {made['babel']})\n")
    assert main(["cldr", "--out", str(tmp_path / "new.gz")]) == 0
    said = capsys.readouterr().out.strip()
    assert read_cldr(tmp_path / "new.gz", said.split()[-1]) == made and gzip.open(tmp_path / "new.gz").read() == cldr_bytes(made)
    before = (tmp_path / "new.gz").read_bytes()
    def full(handle): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="what was there before is untouched"): rebuild_cldr(tmp_path / "new.gz")
    assert (tmp_path / "new.gz").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["new.gz"]


def test_what_changed_is_said():
    old, new = shipped_cldr(), json.loads(cldr_bytes(shipped_cldr()))
    new |= {"cldr": "48", "babel": "2.19.0"}
    new["languages"]["de"]["territories"]["FR"] = "Frankenreich"
    new["languages"]["de"]["title"] = "Deutsch"
    new["languages"]["xx"] = {"title": "New"}
    for code in [c for c in new["languages"] if c.split("_")[0] == "tr"]: del new["languages"][code]
    lines = compare_cldr(old, new).splitlines()
    assert lines[:3] == ["CLDR 47 (babel 2.18.0) -> CLDR 48 (babel 2.19.0)", "1 languages and variants added: xx", "3 languages and variants dropped: tr, tr_CY, tr_TR"]
    assert "de: 2, such as title: German -> Deutsch; FR: Frankreich -> Frankenreich" in "\n".join(lines)
    assert old["languages"]["de"]["title"] == "German"


# The hash of a stream

@pytest.mark.parametrize("name", HASHES)
def test_the_data_of_the_saved_results_has_not_moved(name):
    if name == "split-fashion-mnist" and not FASHION_DEBIAN.is_dir(): pytest.skip("Fashion-MNIST is not here")
    assert get_stream(name).sha256.startswith(HASHES[name])
    if name == "cldr-blind" and not RESULTS.joinpath(name).is_dir(): return  # no run is saved yet
    saved = {}
    for path in RESULTS.joinpath(name, "quick").rglob("*-seed*.json"):
        result = json.loads(path.read_text())
        saved.setdefault(result["config"]["seed"], set()).add(result["sha256"]["data"])
    assert set(saved) == {0, 1, 2}
    for seed, hashes in saved.items(): assert hashes == {get_stream(name, seed=seed).sha256}


def averaged(images: np.ndarray) -> np.ndarray:
    "Means over the areas of a 16 x 16 grid, in whole numbers, a half to the even one."
    out = np.zeros((len(images), 16, 16), int)
    cuts = [(i * 28 // 16, -(-(i + 1) * 28 // 16)) for i in range(16)]
    for i, (top, bottom) in enumerate(cuts):
        for j, (left, right) in enumerate(cuts):
            part = images[:, top:bottom, left:right].astype(int)
            low, rest = np.divmod(part.sum((1, 2)), part[0].size)
            twice = 2 * rest - part[0].size
            out[:, i, j] = low + ((twice > 0) | ((twice == 0) & (low % 2 == 1)))
    return out


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_the_same_on_every_processor_and_without_babel(capability, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (400, 28, 28), dtype=np.uint8)
    np.save(tmp_path / "large.npy", images)
    code = f"""
import sys; sys.modules["babel"] = None
import numpy as np, torch
from unittest.mock import patch
from treelora import streams
print(*(streams.get_stream(name).sha256[:16] for name in ("split-digits", "permuted-digits", "cldr", "cldr-blind")))
images, labels = torch.from_numpy(np.load({str(tmp_path / 'large.npy')!r})), torch.arange(10).repeat(40)
with patch.object(streams, "_fashion_arrays", lambda root: [images, labels, images, labels]): made = streams._fashion("small", 0, None)
np.save({str(tmp_path / 'small.npy')!r}, torch.cat([t.train.images for t in made]).numpy()[:, 0])
"""
    assert fresh(code, ATEN_CPU_CAPABILITY=capability).split() == [HASHES[name] for name in ("split-digits", "permuted-digits", "cldr", "cldr-blind")]
    order = np.concatenate([np.flatnonzero(np.isin(np.arange(400) % 10, pair)) for pair in ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))])
    assert (np.load(tmp_path / "small.npy") == averaged(images)[order]).all()  # Fashion-MNIST is made smaller exactly


def texts(*examples, name="a", stream="s"):
    data = TextSet([Example(*e) for e in examples])
    return TextStream(stream, "quick", 0, [TextTask(name, data, data, "accuracy", 4)])


def test_a_hash_of_text_is_of_every_letter_and_its_place():
    base = texts(("ab", "c"), ("d", "e"))
    assert texts(("ab", "c"), ("d", "e"), stream="t").sha256 == base.sha256  # what the stream is called does not matter
    others = [texts(("a", "bc"), ("d", "e")), texts(("d", "e"), ("ab", "c")), texts(("ab", "c")), texts(("ab", "c"), ("d", "e"), name="b"), texts(("ab", "c"), ("d", "é"))]
    assert len({base.sha256, *(s.sha256 for s in others)}) == 6 and texts(("\ud800", "x")).sha256  # a lone surrogate, as JSON may hold


def pictures(images, labels, test=None, name="a"):
    data = ImageSet(images, labels)
    return TaskStream("s", "quick", 0, [Task(name, (0, 1), data, test or data)])


def test_a_hash_of_images_is_of_every_pixel_label_and_type():
    images, labels = torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 0, 1])
    bright = images.clone()
    bright[3, 0, 7, 7] = 2 ** -20
    streams = [pictures(images, labels), pictures(bright, labels), pictures(images, 1 - labels), pictures(images.byte(), labels), pictures(images[:2], labels[:2]),
               pictures(torch.zeros(4, 4, 4, 4), labels), pictures(images, labels, ImageSet(bright, labels)), pictures(bright, labels, ImageSet(images, labels)), pictures(images, labels, name="b")]
    assert len({s.sha256 for s in streams}) == len(streams)
    assert pictures(images.transpose(2, 3).contiguous().transpose(2, 3), labels).sha256 == streams[0].sha256  # how it lies in memory does not matter


def test_a_hash_of_a_data_set_of_ones_own():
    class Own(Dataset):
        def __init__(self, *items): self.items = items
        def __len__(self): return len(self.items)
        def __getitem__(self, i): return self.items[i]

    class Job:
        name = "job"
        def __init__(self, *items): self.train = self.test = Own(*items)

    item = {"x": torch.ones(2), "y": [1, "a"]}
    of = lambda *items: Stream("own", "quick", 0, [Job(*items)]).sha256
    assert of(item) == of({"y": [1, "a"], "x": torch.ones(2)})
    assert len({of(item), of(item, item), of(item | {"y": [1, "b"]}), of(item | {"y": ["1", "a"]}), of(item | {"x": np.ones(2)}), of((1, 2)), of(1, 2)}) == 7


def test_a_hash_is_computed_once(monkeypatch):
    stream, calls, real = texts(("a", "b")), [], TextSet.parts
    monkeypatch.setattr(TextSet, "parts", lambda self: calls.append(1) or real(self))
    assert stream.sha256 == stream.sha256 and len(calls) == 2  # training and test


# What a result records

@pytest.fixture(scope="module")
def squares() -> TaskStream:
    labels = torch.arange(4).repeat(4)
    return TaskStream.from_arrays("squares", torch.rand(16, 16, 16, generator=torch.Generator().manual_seed(0)), labels, torch.rand(4, 16, 16), torch.arange(4), classes_per_task=2)


def learned(stream, **settings): return run(stream, "seqlora", epochs=1, progress=False, **settings)


def test_two_files_of_weights_leave_two_hashes(squares, tmp_path):
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for seed, path in enumerate(files): save_weights(get_model("glyph-vit", 0, pretrained=False, seed=seed), path)
    shipped, *mine = [learned(squares, weights=path).as_dict()["sha256"] for path in (None, *files)]
    assert [m["weights"] for m in mine] == [hashlib.sha256(p.read_bytes()).hexdigest() for p in files] and mine[0]["weights"] != mine[1]["weights"]
    assert shipped["weights"] == hashlib.sha256(weights_file("glyph-vit").read_bytes()).hexdigest()
    assert {x["data"] for x in (shipped, *mine)} == {squares.sha256}


def test_a_model_that_is_passed_leaves_the_hash_of_its_parameters(squares, tmp_path):
    def of(change=0.0, head=0.0):
        model = get_model("glyph-vit", 4)
        with torch.no_grad():
            model.blocks[3].mlp.fc1.bias[5] += change
            model.head.bias += head
        return learned(squares, model=model).sha256["weights"]
    assert of() == of(head=1.0) != of(change=1e-3)  # the head belongs to the tasks


def test_a_language_model_leaves_its_hash(tiny_language, tmp_path):
    stream = texts(("two", " 2"), ("one", " 1"))
    hashes = [learned(stream, model=tiny_language(seed)).as_dict()["sha256"] for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] and hashes[0]["weights"] != hashes[2]["weights"] and hashes[2]["data"] == stream.sha256
    assert hashes[0]["weights"] == weights_sha256(dict(tiny_language(0)[0].named_parameters()))
    assert language_weights_file("smollm2") == packaged_smollm2() and language_weights_file("some/model") is None


def test_a_hash_of_weights_is_of_names_types_shapes_and_bytes():
    x = torch.arange(6.0)
    cases = [{"a": x}, {"b": x}, {"a": x.reshape(2, 3)}, {"a": x.bfloat16()}, {"a": x + 1}, {"a": x, "b": torch.tensor(1)}]
    assert len({weights_sha256(c) for c in cases}) == len(cases)


def test_a_file_that_changes_gets_another_hash(tmp_path):
    path = tmp_path / "w"
    for text in (b"one", b"other"):
        path.write_bytes(text)
        assert file_sha256(path) == hashlib.sha256(text).hexdigest()


# Results of different data

@pytest.fixture
def saved(tmp_path) -> Path:
    "A copy of the results on digits."
    shutil.copytree(RESULTS / "split-digits", tmp_path / "split-digits")
    return tmp_path


def changed(path: Path, data: str | None, pick=lambda content: [content]) -> None:
    "Give a result, or rows, another hash of data; None: none at all."
    content = json.loads(path.read_text())
    for r in pick(content):
        if data: r["sha256"]["data"] = data
        else: r.pop("sha256", None)
    path.write_text(json.dumps(content))


def last_row(content): return content["rows"][-1:]


OTHER = "0123456789abcdef" * 4
READERS = {"read_results": lambda r: read_results(r, "split-digits", "quick"), "half": lambda r: read_results(r, "split-digits", "quick/one-epoch"), "load_results": load_results, "table 1": lambda r: table(1, r, "split-digits"),
           "table 6": lambda r: table(6, r), "parts_table": parts_table, "contest_table": contest_table, "figure": lambda r: figure(4, r), "caption": lambda r: caption(4, r), "places": places,
           "report": report, "evidence": lambda r: Evidence(r).rows("split-digits/time.json", ""), "load_ablation": lambda r: load_ablation("parts", r), "ablation_table": lambda r: ablation_table("parts", r),
           "load_times": load_times, "time_table": time_table, "switch_table": switch_table}
PLACES = {"a result": ("quick/treelora-seed1.json", None), "another budget": ("quick/one-epoch/treelora-seed1.json", None), "a switched run": ("quick/paper-vs-code/treelora-split-seed1.json", None),
          "a row of an ablation": ("ablations.json", last_row), "a row of times": ("time.json", last_row)}


@pytest.mark.parametrize("reader", READERS)
def test_no_reader_mixes_results_of_different_data(reader, saved):
    READERS[reader](saved)  # the opposite: as they are, they are of the same data
    for name, pick in PLACES.values():
        path = saved / "split-digits" / name
        before = path.read_bytes()
        changed(path, OTHER, pick or (lambda content: [content]))
        with pytest.raises(ValueError, match="Results of split-digits at scale quick are of different data: ") as error: READERS[reader](saved)
        said = str(error.value)
        assert str(path) in said and "0123456789ab" in said and OTHER not in said and "--results" in said and "\n" not in said
        path.write_bytes(before)
    READERS[reader](saved)


@pytest.mark.parametrize("reader", ["read_results", "table 1", "figure", "report"])
def test_no_reader_mixes_results_that_started_from_different_weights(reader, saved):
    path = saved / "split-digits/quick/gem-seed1.json"
    content = json.loads(path.read_text())
    content["sha256"]["weights"] = OTHER
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="started from weights with the hash") as error: READERS[reader](saved)
    assert str(path) in str(error.value) and OTHER[:12] in str(error.value) and "\n" not in str(error.value)
    elsewhere = path.parent / "another-backbone" / path.name
    elsewhere.parent.mkdir()
    path.rename(elsewhere)
    READERS[reader](saved)


def test_which_hashes_and_files_is_said(saved):
    changed(saved / "split-digits/quick/gem-seed1.json", OTHER)
    with pytest.raises(ValueError) as error: contest_table(saved)
    right = json.loads((RESULTS / "split-digits/quick/gem-seed1.json").read_text())["sha256"]["data"]
    assert f"gem-seed1.json has the data hash {OTHER[:12]} for seed 1" in str(error.value) and f"more have the data hash {right[:12]} for seed 1" in str(error.value)
    assert main(["table", "1", "--stream", "split-digits", "--results", str(saved)]) == 2


@pytest.mark.parametrize("reader", READERS)
def test_results_from_before_hashes_are_shown_but_never_beside_others(reader, saved):
    folder = saved / "split-digits"
    changed(folder / "quick/gem-seed2.json", None)
    with pytest.raises(ValueError, match="gem-seed2.json has no data hash, being from before hashes"): READERS[reader](saved)
    for path in folder.joinpath("quick").rglob("*-seed*.json"): changed(path, None)
    with pytest.raises(ValueError, match="no data hash, being from before hashes"): READERS[reader](saved)  # rows still have theirs
    for name in ("ablations.json", "time.json"): changed(folder / name, None, lambda content: content["rows"])
    shown = READERS[reader](saved)
    if "table" in reader or reader == "caption": assert f"{BEFORE}: split-digits." in str(shown)
    if reader == "report": assert "before data hashes" in shown.findings["C1"].on and "before data hashes" in shown.findings["C7"].on


@pytest.mark.parametrize("reader", [r for r in READERS if "table" in r or r in ("caption", "report")])
def test_nothing_is_said_of_results_with_hashes(reader, saved):
    shown = READERS[reader](saved)
    assert BEFORE not in str(shown) and "before data hashes" not in str(shown)
    if hasattr(shown, "_repr_markdown_"): assert BEFORE not in shown._repr_markdown_()  # what it says of memory is another matter


def test_a_damaged_file_still_spoils_no_table(saved):
    (saved / "split-digits/quick/gem-seed2.json").write_text('{"config": ')
    (saved / "split-digits/quick/ewc-seed2.json").write_text("[3]")
    with pytest.warns(UserWarning, match="is left out"): found = read_results(saved, "split-digits", "quick")
    assert len(found["gem"]) == len(found["ewc"]) == 2


# What is there already

def forbidden(*args, **kwargs): raise AssertionError("nothing should be run")


WRITERS = {"run_set": (experiments, lambda r, **more: run_set(results=r, methods=["treelora"], progress=False, **{"missing_only": True} | more)),
           "contend": (campaigns, lambda r, **more: contend(results=r, methods=["treelora"], progress=False, **more)),
           "run_switches": (paper_vs_code, lambda r, **more: run_switches(["split"], results=r, **more)),
           "ablate": (ablations, lambda r: ablate(["parts"], results=r, progress=False)),
           "measure_time": (training_time, lambda r: measure_time(results=r, progress=False, plan=[("treelora", ())]))}


@pytest.fixture
def no_runs(monkeypatch):
    for module, _ in WRITERS.values(): monkeypatch.setattr(module, "run", forbidden)
    monkeypatch.setattr(experiments_llm, "run", forbidden)


@pytest.mark.parametrize("name, writer", [(name, write) for name, (_, write) in WRITERS.items()])
def test_what_is_there_stays_only_if_it_is_of_todays_data(name, writer, saved, no_runs):
    writer(saved)  # the opposite: all is there, and of today's data
    for path in saved.rglob("*.json"):
        if "-seed1" in path.name: changed(path, OTHER)
    for rows in ("ablations.json", "time.json"): changed(saved / "split-digits" / rows, OTHER, lambda content: [r for r in content["rows"] if r.get("data_seed", r["seed"]) == 1])
    with pytest.raises(ValueError, match=f"Results of split-digits are there already: .* the data hash {OTHER[:12]} for seed 1, but today's data has caa84f227165"): writer(saved)


@pytest.mark.parametrize("name, writer", [(name, write) for name, (_, write) in WRITERS.items()])
def test_new_runs_do_not_stand_beside_results_from_before_hashes(name, writer, saved, no_runs):
    for path in saved.joinpath("split-digits/quick").rglob("*-seed*.json"): changed(path, None)
    for rows in ("ablations.json", "time.json"): changed(saved / "split-digits" / rows, None, lambda content: content["rows"])
    writer(saved)  # all is there: nothing new, nothing mixed
    for path in [*saved.rglob("treelora-seed1.json"), *saved.rglob("treelora-split-seed1.json")]: path.unlink()
    for rows in ("ablations.json", "time.json"):
        content = json.loads((saved / "split-digits" / rows).read_text())
        content["rows"] = [r for r in content["rows"] if r["seed"] != 1]
        (saved / "split-digits" / rows).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="no data hash, being from before hashes, so that no new runs fit beside them"): writer(saved)


def test_all_of_them_can_be_run_again(saved, monkeypatch, no_runs):
    "With missing_only=False the files that are written anew do not matter; others that stay do."
    for path in saved.rglob("*-seed1.json"): changed(path, OTHER)
    again = []
    class Done:
        def save(self, path): again.append(path)
    monkeypatch.setattr(experiments, "run", lambda *args, **kwargs: Done())
    with pytest.raises(ValueError, match="but today's data has"): run_set(results=saved, methods=["treelora"], missing_only=False, progress=False)
    for path in [p for p in saved.rglob("*-seed1.json") if p.name != "treelora-seed1.json" or p.parent.name != "quick"]: path.unlink()
    assert run_set(results=saved, methods=["treelora"], missing_only=False, progress=False) == again and len(again) == 3


def test_the_language_set_looks_as_well(tmp_path, no_runs):
    shutil.copytree(RESULTS / "cldr", tmp_path / "cldr")
    assert all(p.exists() for p in experiments_llm.run_language_set(results=tmp_path, missing_only=True, progress=False))
    changed(tmp_path / "cldr/quick/half/treelora-branch-seed0.json", OTHER)
    with pytest.raises(ValueError, match=f"the data hash {OTHER[:12]} for seed 0, but today's data has {HASHES['cldr'][:12]}"):
        experiments_llm.run_language_set(results=tmp_path, missing_only=True, progress=False)


def test_what_is_there_is_shown_where_the_data_is_not(tmp_path, no_runs, monkeypatch):
    shutil.copytree(RESULTS / "split-fashion-mnist", tmp_path / "split-fashion-mnist")
    def nowhere(*args, **kwargs): raise FileNotFoundError("no data")
    monkeypatch.setattr(experiments, "get_stream", nowhere)
    ask = dict(stream="split-fashion-mnist", methods=["treelora"], results=tmp_path, missing_only=True, progress=False)
    assert len(run_set(**ask)) == 3
    (tmp_path / "split-fashion-mnist/quick/treelora-seed1.json").unlink()
    with pytest.raises(FileNotFoundError, match="no data"): run_set(**ask)


def test_rows_say_of_which_data_they_are(tmp_path, monkeypatch):
    stream = "permuted-digits:2"
    monkeypatch.setitem(ablations.ABLATIONS, "order", [Change("order 3", {"epochs": 1}, stream={"seed": 23})])
    content = json.loads(ablate(["order"], stream, [0], tmp_path, progress=False).read_text())
    assert content["rows"][0]["data_seed"] == 23 and content["rows"][0]["sha256"]["data"] == get_stream(stream, seed=23).sha256
    content = json.loads(measure_time(stream, [0], tmp_path, [("seqlora", ("fewer epochs",))], progress=False).read_text())
    assert content["rows"][0]["sha256"]["data"] == get_stream(stream).sha256
