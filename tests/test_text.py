"Text streams: CLDR, folders of TRACE and of O-LoRA's benchmark, batches, evaluation, and bad input."
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from treelora.learning.cldr import blind_prompt, cldr_entry, told_apart
from treelora.streams import TaskStream, get_stream, list_streams
from treelora.learning.text import (CL_KINDS, CL_ORDERS, CLDR_LANGUAGES, FAMILIES, TRACE, Example, LengthBuckets, TextSet, TextStream, TextTask, cl_prompt,
                           cldr_languages, cldr_names, cldr_split, cldr_stream, read_records)


def put(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(records if isinstance(records, str) else json.dumps(records), encoding="utf-8")


def sums(n): return [{"prompt": f"{a} + 1 =", "answer": str(a + 1)} for a in range(n)]


@pytest.fixture
def trace(tmp_path):
    "TRACE's layout with all tasks."
    for task in TRACE:
        put(tmp_path / task / "train.json", sums(70))
        put(tmp_path / task / "test.json", sums(30))
    return tmp_path


@pytest.fixture
def cl(tmp_path):
    "O-LoRA's layout with all tasks."
    for task, kind in CL_KINDS.items():
        for split in ("train", "test"): put(tmp_path / kind / task / f"{split}.json", [{"label": l, "sentence": f"This is {l}."} for l in ("Good", "Bad")])
        put(tmp_path / kind / task / "labels.json", ["Good", "Bad"])
    return tmp_path


def text_task(name="a", n=3, answer=" yes", **kw):
    examples = TextSet([Example("?" * (i + 1), answer) for i in range(n)])
    return TextTask(name, examples, examples, **{"metric": "accuracy", "max_answer": 4} | kw)


# CLDR

def names_of(data): return {e.prompt.split("English: ")[1].split("\n")[0] for e in data}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_concept_is_tested_in_one_language_and_trained_in_another(seed):
    stream = cldr_stream(("es", "de", "pt", "sv", "it", "nl", "fr", "is"), seed=seed)
    assert not set.union(*(names_of(t.train) for t in stream)) & set.union(*(names_of(t.test) for t in stream))
    assert {(len(t.train), len(t.test), t.metric, t.max_answer) for t in stream} == {(320, 60, "chrf", 16)}


def test_cldr_examples():
    stream = get_stream("cldr")
    assert (stream.name, stream.kind, [t.name for t in stream]) == ("cldr", "language", list(CLDR_LANGUAGES))
    for example in stream["es"].train:
        name = example.prompt.removeprefix("English: ").removesuffix("\nSpanish:")
        assert example.answer == " " + cldr_names("es")[name] and name != example.answer.strip() and max(len(name), len(example.answer) - 1) < 28
    answers = {e.prompt: e.answer for e in stream["de"].test}
    assert stream.evaluate("de", lambda prompts: [answers[p] for p in prompts]) == pytest.approx(1)
    assert stream.evaluate("de", lambda prompts: ["" for _ in prompts]) == 0


def test_cldr_is_fixed_by_its_seed_and_does_not_depend_on_the_other_languages():
    alone, among = cldr_stream(["pt"], seed=3)["pt"], cldr_stream(["es", "pt"], seed=3)["pt"]
    assert alone.train.examples == among.train.examples and alone.test.examples == among.test.examples
    assert cldr_stream(["pt"], 100, 20, seed=3)["pt"].test.examples == alone.test.examples[:20]
    assert cldr_stream(["pt"], seed=4)["pt"].test.examples != alone.test.examples
    assert set(cldr_split(3)[0]) | set(cldr_split(3)[1]) == set(cldr_split(4)[0]) | set(cldr_split(4)[1])


def test_cldr_by_name():
    assert [t.name for t in get_stream("cldr:fr, ro,ca")] == ["fr", "ro", "ca"]
    assert get_stream("cldr:fr").name == "cldr:fr"
    assert get_stream("cldr:pt_BR").tasks[0].train[0].prompt.endswith("\nPortuguese (Brazil):")
    assert len(cldr_stream([code for code in FAMILIES if code != "en"], 160, 40)) == len(FAMILIES) - 1
    assert set(FAMILIES) <= set(cldr_languages())


@pytest.mark.parametrize("name, words", [
    ("cldr:klingon", "'klingon'.*cldr_languages"), ("cldr:xx", "'xx'"), ("cldr:es,,de", "''"), ("cldr:en", "0 names in English"), ("cldr:es,es", "more than one task"),
    ("cldr:", "should come codes of languages"), ("trace:FOMC", "nothing after a colon"), ("cldr-2", "no stream 'cldr-2'")])
def test_bad_names(name, words):
    with pytest.raises(ValueError, match=words): get_stream(name)


def test_too_few_names():
    with pytest.raises(ValueError, match=r"has \d+ names in Dutch \(nl\) to train with and \d+ to test with, but 500 and 60"): cldr_stream(["nl"], n_train=500)


# The same names, without the language's name in the prompt

def solved(example): return example.prompt.split("\n")[0].split(" = ")


@pytest.mark.parametrize("seed", [0, 5])
def test_blind_prompts_ask_for_the_same_names_after_a_solved_pair_of_the_training_names(seed):
    named, blind = (get_stream(name, seed=seed) for name in ("cldr", "cldr-blind"))
    assert (blind.name, blind.kind, [t.name for t in blind]) == ("cldr-blind", "language", list(CLDR_LANGUAGES))
    for one, other in zip(named, blind):
        assert (one.metric, one.max_answer) == (other.metric, other.max_answer)
        trained = {next(iter(names_of(TextSet([e])))): e.answer.strip() for e in one.train}
        tested = {e.answer.strip().casefold() for e in other.test}
        for split in ("train", "test"):
            for plain, example in zip(getattr(one, split), getattr(other, split), strict=True):
                (asked, shown), answer = solved(example), example.answer.strip()
                question = example.prompt.split("\n")[1].removesuffix(" =")
                assert example.answer == plain.answer and plain.prompt.startswith(f"English: {question}\n")
                assert trained[asked] == shown and asked != question and answer.casefold() not in shown.casefold()
                assert shown.casefold() not in tested
        assert len({tuple(solved(e)) for e in other.train}) > 100  # each question has a pair of its own


def test_blind_prompts_name_no_language():
    for code in cldr_languages():
        if code == "en": continue
        entry = cldr_entry(code)
        called = {entry.title.casefold(), entry.languages.get(code, entry.title).casefold()}
        try: task = cldr_stream([code], 150, 40, seed=1, blind=True).tasks[0]
        except ValueError as error:
            assert "to train with" in str(error)
            continue
        for example in [*task.train, *task.test]:
            first = " = ".join(solved(example)).casefold()
            assert not any(name in first for name in called), (code, first)
            assert example.prompt.count("\n") == 1 and example.prompt.endswith(" =")


@pytest.mark.slow
def test_a_blind_stream_is_fixed_by_its_seed_in_every_process_and_whatever_else_is_in_it():
    alone, among = (cldr_stream(codes, seed=3, blind=True)["pt"] for codes in (["pt"], ["es", "pt"]))
    assert alone.train.examples == among.train.examples and alone.test.examples == among.test.examples
    code = "from treelora.streams import get_stream; print(get_stream('cldr-blind:pt', seed=3).sha256)"
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONHASHSEED": h}).stdout.strip() for h in ("1", "2")}
    assert runs == {get_stream("cldr-blind:pt", seed=3).sha256} and get_stream("cldr:pt", seed=3).sha256 not in runs
    assert get_stream("cldr-blind:fr, ro").name == "cldr-blind:fr,ro" and "cldr-blind" in list_streams()


@pytest.mark.parametrize("name, words", [
    ("cldr-blind:klingon", "'klingon'.*cldr_languages"), ("cldr-blind:en", "0 names in English"), ("cldr-blind:es,es", "more than one task"), ("cldr-blind:", "should come codes of languages"),
    ("cldr-blind:iw,he", "'iw' and 'he' have the same names"), ("cldr-blind:de,de_AT", "have the same names")])
def test_bad_names_of_blind_streams(name, words):
    with pytest.raises(ValueError, match=words): get_stream(name)


def test_a_pair_that_gives_the_answer_away_is_not_shown():
    with pytest.raises(ValueError, match="'France' in 'de': train more names"): blind_prompt("de", "France", "Frankreich", {"France": "Frankreich", "Old France": "altes Frankreich"})
    assert cldr_stream(["es"], 2, 2, blind=True)["es"].train[0].prompt.count("=") == 2
    with pytest.raises(ValueError, match="train more names"): cldr_stream(["es"], 1, 1, blind=True)


def test_tasks_that_can_hardly_be_told_apart_are_said():
    with pytest.warns(UserWarning, match=r"'cldr-blind:nb,nn' has tasks that its prompts hardly tell apart: \d+ % of nb, \d+ % of nn read the same.*finds the task of \d+ % of the prompts, chance of 50 %"):
        get_stream("cldr-blind:nb,nn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("cldr-blind", "cldr-blind:nb,da", "cldr-blind:sr,hr", "cldr:nb,nn"): get_stream(name)
    assert told_apart(["es", "pt", "de"], [["Brazil", "France"], ["Brazil", "France"], ["France", "Spain"]]) == [(0.5, 0.75)] * 2 + [(0.0, 1.0)]


# Folders

def test_trace(trace):
    stream = get_stream("trace", "paper", root=trace)
    assert [(t.name, t.metric) for t in stream] == [(t, m) for t, (m, _) in TRACE.items()] and stream.skipped == ()
    assert [t.name for t in get_stream("math-llm", "paper", root=trace)] == ["ScienceQA", "NumGLUE-cm", "NumGLUE-ds"]
    assert stream.evaluate("NumGLUE-cm", lambda prompts: [str(int(p.split()[0]) + 1) for p in prompts]) == 1


def test_trace_quick_is_a_seeded_draw(trace):
    tasks = [get_stream("trace", root=trace, seed=s)["Py150"] for s in (0, 0, 1)]
    assert [(len(t.train), len(t.test), t.max_answer) for t in tasks] == [(60, 20, 64)] * 3
    assert tasks[0].train.examples == tasks[1].train.examples != tasks[2].train.examples


def test_the_scale_small_takes_all_of_a_short_task_and_says_so(trace):
    put(trace / "FOMC" / "train.json", sums(200))
    with pytest.warns(UserWarning, match=r"asks for 160 training examples a task; these have fewer, and all of them are taken: C-STANCE \(70\)") as caught:
        stream = get_stream("trace", "small", root=trace)
    assert [len(stream[t].train) for t in ("C-STANCE", "FOMC")] == [70, 160] and stream[0].max_answer == 8 and stream["20Minuten"].max_answer == 128
    assert len(caught) == 1 and "FOMC" not in str(caught[0].message) and caught[0].filename == __file__


@pytest.mark.parametrize("place", ["trace-500", "trace", "."])
def test_trace_is_found_in_subfolders_and_by_the_environment(place, trace, tmp_path_factory, monkeypatch):
    outer = tmp_path_factory.mktemp("data")
    trace.rename(outer / place) if place != "." else None
    monkeypatch.setenv("TREELORA_DATA", str(outer if place != "." else trace))
    assert len(get_stream("trace", "paper")) == 8
    with pytest.raises(FileNotFoundError): get_stream("trace", "paper", root=tmp_path_factory.mktemp("empty"))


def test_a_task_that_lacks_a_file_is_left_out(trace):
    (trace / "MeetingBank" / "train.json").unlink()
    with pytest.warns(UserWarning, match="leaves out the task 'MeetingBank', because there is no train.json in") as caught: stream = get_stream("trace", "paper", root=trace)
    assert stream.skipped == ("MeetingBank",) and len(stream) == 7 and len(caught) == 1 and caught[0].filename == __file__


def test_nothing_there(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="<TASK>/train.json"): get_stream("trace", root=tmp_path)
    with pytest.raises(FileNotFoundError, match="labels.json"): get_stream("long-15", root=tmp_path)
    monkeypatch.delenv("TREELORA_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"TREELORA_DATA \(not set\)"): get_stream("math-llm")


@pytest.mark.parametrize("records, words", [
    ('[{"prompt": "a", ', "test.json is not valid JSON"), ("{}", "list of records, but holds a dict"), ("[3]", "Record 0 .*test.json should be an object"),
    ([*sums(2), {"prompt": "a"}], "Record 2 .*test.json has no 'answer'"), ([{"prompt": "a", "answer": 1}], "Record 0 .*'answer' that is not text but a int"),
    ([*sums(1), {"prompt": "a", "answer": " "}], "'FOMC' has an empty answer in record 1 .*test.json"), ([], "'FOMC' has no examples in .*test.json")])
def test_broken_files(records, words, trace):
    put(trace / "FOMC" / "test.json", records)
    with pytest.raises(ValueError, match=words): get_stream("trace", "paper", root=trace)


def test_not_utf8(tmp_path):
    (tmp_path / "x.json").write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(ValueError, match="x.json is not valid JSON"): read_records(tmp_path / "x.json", ["a"])


@pytest.mark.parametrize("order", CL_ORDERS)
def test_cl_benchmark_orders(order, cl):
    stream = get_stream(f"cl-benchmark-{order}", "paper", root=cl)
    assert [t.name for t in stream] == CL_ORDERS[order].split() and {t.metric for t in stream} == {"exact"} and stream[0].labels == ("Good", "Bad")
    if order == 4: assert [t.name for t in get_stream("long-15", "paper", root=cl)] == [t.name for t in stream]


def test_cl_benchmark_prompts(cl):
    stream = get_stream("cl-benchmark-4", "paper", root=cl)
    assert stream["agnews"].train[0] == Example("Task:TC\nDataset:agnews\nWhat is the topic of the following paragraph? Choose one from the option.\n"
                                                "Option: Good, Bad \nThis is Good.\nAnswer:", "Good")
    assert stream["COPA"].train[1].prompt == "Task:COPA\nDataset:COPA\nThis is Bad.\nAnswer:" == cl_prompt("COPA", (), "This is Bad.")
    assert stream.evaluate("QQP", lambda prompts: [" good." for _ in prompts]) == 0.5


@pytest.mark.parametrize("file, content, words", [
    ("labels.json", "[", "labels.json is not valid JSON"), ("labels.json", [1], "list of labels"), ("labels.json", [], "list of labels"),
    ("train.json", [{"label": "Fine", "sentence": ""}], "Record 0 .*train.json has the label 'Fine', which is not one of"), ("test.json", [{"label": "Good"}], "no 'sentence'")])
def test_cl_benchmark_broken_files(file, content, words, cl):
    put(cl / "SC/yelp" / file, content)
    with pytest.raises(ValueError, match=words): get_stream("long-15", "paper", root=cl)


# Streams, batches, evaluation

@pytest.mark.parametrize("tasks, words", [
    ([], "no tasks"), ([text_task(), text_task()], "more than one task named 'a'"), ([text_task(n=0)], "'a' has no training examples"),
    ([text_task(answer="\n")], "'a' has an empty answer in its training example 0"), ([text_task(metric="taste")], "unknown metric 'taste'"), ([text_task(max_answer=0)], "at least one token")])
def test_streams_check_themselves(tasks, words):
    with pytest.raises(ValueError, match=words): TextStream("s", "quick", 0, tasks)


def test_a_task_by_position_or_name():
    stream = TextStream("s", "quick", 0, [text_task("a"), text_task("b")])
    assert stream["b"] is stream[1] is list(stream)[1] and len(stream) == 2
    with pytest.raises(ValueError, match="no task 'c'"): stream["c"]
    with pytest.raises(ValueError, match="'train' or 'test'"): stream.loader("a", "valid")
    with pytest.raises(ValueError, match="at least one"): stream.loader([])
    with pytest.raises(ValueError, match="at least 1"): stream.loader("a", batch_size=0)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=120), st.integers(1, 20), st.integers(0, 5), st.integers(1, 10))
def test_buckets_visit_every_example_once(lengths, batch_size, seed, pool):
    sampler, again = LengthBuckets(lengths, batch_size, seed, pool), LengthBuckets(lengths, batch_size, seed, pool)
    for _ in range(2):
        batches = list(sampler)
        assert batches == list(again) and len(batches) == len(sampler)
        assert sorted(sum(batches, [])) == list(range(len(lengths))) and max(map(len, batches)) <= batch_size


def padding(batches, lengths): return sum(max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b) for b in batches)


def test_buckets_pad_less_and_change_from_pass_to_pass():
    lengths = torch.randint(1, 200, (320,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = LengthBuckets(lengths, 16)
    first, second = list(sampler), list(sampler)
    assert padding(first, lengths) < padding(LengthBuckets(lengths, 16, pool=1), lengths) / 2
    assert {frozenset(b) for b in first} != {frozenset(b) for b in second}
    means = [sum(lengths[i] for i in b) for b in first]
    assert means != sorted(means)  # short and long batches come mixed


def test_loader():
    stream = TextStream("s", "quick", 0, [text_task("a", 5), text_task("b", 4)])
    assert [[len(e.prompt) for e in b] for b in stream.loader("a", "test", 2)] == [[5, 4], [3, 2], [1]]
    assert sorted(e.prompt for b in stream.loader([0, "b"], batch_size=2) for e in b) == sorted(e.prompt for t in stream for e in t.train)
    loader, other = stream.loader("a", batch_size=2, seed=1), stream.loader("a", batch_size=2, seed=1)
    assert [list(loader), list(loader)] == [list(other), list(other)]
    assert list(stream.loader(stream[0], batch_size=5, collate=len)) == [5]


def test_loader_leaves_global_random_numbers_alone():
    state = torch.get_rng_state()
    list(cldr_stream(["es"]).loader("es"))
    assert torch.equal(torch.get_rng_state(), state)


def test_accelerate_keeps_the_order():
    from accelerate import Accelerator
    stream = TextStream("s", "quick", 0, [text_task("a", 40)])
    lengths = lambda batch: torch.tensor([len(e.prompt) for e in batch])
    plain, prepared = stream.loader("a", batch_size=4, collate=lengths), Accelerator(cpu=True).prepare(stream.loader("a", batch_size=4, collate=lengths))
    assert [b.tolist() for _ in range(2) for b in plain] == [b.tolist() for _ in range(2) for b in prepared]


def test_evaluate_puts_outputs_back_in_order():
    examples = [Example("x" * n, str(n)) for n in (3, 1, 4, 1, 5)]
    stream = TextStream("s", "quick", 0, [TextTask("a", TextSet(examples), TextSet(examples), "accuracy", 4)])
    seen = []
    def count(prompts):
        seen.append([len(p) for p in prompts])
        return [str(len(p)) for p in prompts]
    assert stream.evaluate("a", count, batch_size=2) == stream.evaluate(stream[0], count) == 1
    assert seen[:3] == [[5, 4], [3, 1], [1]]
    with pytest.raises(ValueError, match="5 prompts were given, but 4 outputs came back"): stream.evaluate(0, lambda prompts: prompts[1:])


# Images answer to the same calls

def test_images_have_the_same_interface():
    x, y = torch.rand(12, 1, 8, 8), torch.arange(4).repeat_interleave(3)
    stream = TaskStream.from_arrays("noise", x, y, x, y, classes_per_task=2, class_order=range(4))
    assert stream.kind == "vision"
    assert stream.evaluate(0, lambda images: torch.zeros(len(images), dtype=torch.long), batch_size=4) == 0.5
    assert stream.evaluate(1, lambda images: torch.full((len(images),), 2), prepare=lambda loader: list(loader)[:1]) == 0.5
    assert torch.cat([labels for _, labels in stream.loader([1, 0], "test")]).tolist() == [2, 2, 2, 3, 3, 3, 0, 0, 0, 1, 1, 1]
    assert list(stream.loader(0, "test", 4, collate=len)) == [4, 2]


def test_image_batches_come_in_the_order_of_a_plain_loader():
    x, y = torch.rand(12, 1, 8, 8), torch.zeros(12, dtype=torch.long)
    stream = TaskStream.from_arrays("noise", x, y, x, y, classes_per_task=1)
    plain = torch.utils.data.DataLoader(stream[0].train, 5, shuffle=True, generator=torch.Generator().manual_seed(7))
    ours = stream.loader(0, batch_size=5, seed=7)
    for _ in range(2): assert torch.equal(torch.cat([a for a, _ in plain]), torch.cat([a for a, _ in ours]))


def test_text_is_imported_when_asked_for_and_babel_when_needed():
    code = ("import sys; import treelora.streams; assert 'treelora.learning.text' not in sys.modules; treelora.streams.list_streams(); "
            "heavy = {'babel', 'datasets', 'sacrebleu', 'rapidfuzz', 'rouge_score'} & set(sys.modules); assert 'treelora.learning.text' in sys.modules and not heavy, heavy")
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {"cldr", "trace", "math-llm", "long-15", *(f"cl-benchmark-{i}" for i in range(1, 7)), "split-digits"} <= set(list_streams())


def test_no_warning_when_all_is_there(cl):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_stream("long-15", root=cl)
