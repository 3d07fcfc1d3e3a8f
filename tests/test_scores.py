"Scores of text: published values, ranges, identities, symmetries, and bad input."
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treelora.learning.scores import METRICS, accuracy, chrf, edit, exact, letter, rouge_l, sari, sari_sentence, score

word = st.text("abcdefgh", min_size=1, max_size=5)
sentence = st.lists(word, min_size=1, max_size=8).map(" ".join)
pairs = st.lists(st.tuples(sentence, sentence, sentence), min_size=1, max_size=4).map(lambda rows: [list(column) for column in zip(*rows)])
SOURCE = "About 95 species are currently accepted ."
REFERENCES = ["About 95 species are currently known .", "About 95 species are now accepted .", "95 species are now accepted ."]


@pytest.mark.parametrize("output, original", [("About 95 you now get in .", 0.2682782411698074), ("About 95 species are now agreed .", 0.5889995423074248),
                                              ("About 95 species are currently agreed .", 0.5071608864657479)])
def test_sari_of_the_authors_program(output, original):
    assert sari_sentence(SOURCE, output, REFERENCES, original=True) == pytest.approx(original, abs=1e-12)


def test_sari_of_hugging_faces_metric_card():
    plain = [t.replace(" .", ".") for t in (SOURCE, "About 95 you now get in .", *REFERENCES)]
    assert 100 * sari_sentence(plain[0], plain[1], plain[2:]) == pytest.approx(26.953601953601954, abs=1e-9)


def test_sari_by_hand():
    # one word a text: nothing of two to four words, which counts as perfect; adding is right, keeping has nothing to do, deleting is right
    assert sari_sentence("a", "b", ["b"]) == 1
    # unigrams: added c is wrong and b wanted (0), nothing kept or keepable (1), a rightly deleted (1); the rest perfect
    assert sari_sentence("a", "c", ["b"]) == pytest.approx((2 + 9) / 12)
    assert sari_sentence("a", "c", ["b"], original=True) == pytest.approx(1 / 12)


@pytest.mark.parametrize("name", list(METRICS))
@given(pairs)
def test_range(name, columns):
    assert 0 <= score(name, *columns) <= 1 + 1e-9


@pytest.mark.parametrize("name", [m for m in METRICS if m != "sari"])
@given(st.lists(sentence, min_size=1, max_size=4))
def test_identity(name, texts):
    assert score(name, texts, texts) == pytest.approx(1)
    assert score(name, [f" {t}\n" for t in texts], texts) == pytest.approx(1)  # white space around does not count


@given(st.lists(word, min_size=1, max_size=8, unique=True), st.lists(word, min_size=1, max_size=8, unique=True))
def test_sari_identity_without_repeated_words(source, words):
    assert sari_sentence(" ".join(source), " ".join(words), [" ".join(words)]) == pytest.approx(1)


@pytest.mark.parametrize("metric", [accuracy, letter, exact, rouge_l, edit])
@given(pairs)
def test_symmetry(metric, columns):
    a, b, _ = columns
    assert metric(a, b) == pytest.approx(metric(b, a))


@given(pairs, st.randoms())
def test_order_of_the_examples_does_not_matter(columns, random):
    order = list(range(len(columns[0])))
    random.shuffle(order)
    shuffled = [[column[i] for i in order] for column in columns]
    for name in METRICS: assert score(name, *shuffled) == pytest.approx(score(name, *columns))


def test_right_or_wrong():
    assert accuracy(["a", "A ", "17.0", ""], ["A", "A", "17", "B"]) == 0.25
    assert letter(["B. because", "The B", "b", ""], ["B\nreason"] * 4) == 0.25
    assert exact(["Very  positive.", "very-positive"], ["very positive"] * 2) == 0.5  # a hyphen goes without leaving a space


def test_edit_writes_out_marks():
    assert edit(["a = '<STR_LIT:hi>'"], ["a = 'hi'"]) == 1
    assert edit(["f ( <NUM_LIT> , <STR_LIT> )"], ["f ( 0 ,  )"]) == 1
    assert edit(["abc"], ["abd"]) == pytest.approx(2 * 2 / 6)


def test_chrf_weighs_recall_double():
    assert chrf(["abcd"], ["abcdefgh"]) < chrf(["abcdefgh"], ["abcd"])
    assert chrf([""], ["abc"]) == 0


def test_rouge_knows_latin_letters_only():
    assert rouge_l(["Ελλάδα"], ["Ελλάδα"]) == 0


@pytest.mark.parametrize("args, words", [
    (("taste", ["a"], ["a"]), "no metric 'taste'"), (("accuracy", [], []), "nothing to score"), (("chrf", ["a", "b"], ["a"]), "2 outputs for 1 answers"),
    (("sari", ["a"], ["a"]), "pass the prompts"), (("sari", ["a"], ["a"], []), "0 prompts for 1 answers")])
def test_bad_input(args, words):
    with pytest.raises(ValueError, match=words): score(*args)


def test_sari_without_reference():
    with pytest.raises(ValueError, match="at least one reference"): sari_sentence("a", "b", [])
    with pytest.raises(ValueError, match="pass the prompts"): sari(["a"], ["a"])
