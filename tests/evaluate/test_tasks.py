"""Long-context tasks: seeded, right by construction, within their length; and their metrics."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

import numpy as np
import pytest

from kvjax.evaluate import (
    TASKS,
    Sample,
    associative_recall,
    contained,
    first_right,
    joint_recall,
    language_reference,
    needles,
)
from kvjax.evaluate.tasks import vocabulary
from tests.experiments.conftest import tiny_tokenizer

TEXT = language_reference()[:12000]
LENGTH = {"niah_multikey_3": 2400, "cwe": 2400, "niah_multiquery": 1800}


@pytest.fixture(scope="module")
def tokenizer():
    found = tiny_tokenizer(TEXT)
    found.template = "<user>{% for m in messages %}{{ m.content }}{% endfor %}</user>\n<model>"
    return found


@pytest.fixture(scope="module")
def drawn(tokenizer):
    """Three samples of every task."""
    return {name: make(name, tokenizer) for name in TASKS}


def make(name, tokenizer, count=3, **how):
    return TASKS[name].samples(tokenizer, LENGTH.get(name, 1600), count, text=TEXT, **how)


def words_of(tokenizer, sample):
    return tokenizer.decode(sample.context), tokenizer.decode(sample.question)


every = pytest.mark.parametrize("name", TASKS)


@every
def test_a_seed_is_a_sample(name, tokenizer, drawn):
    again = make(name, tokenizer)
    assert again == drawn[name]
    assert make(name, tokenizer, 2) == drawn[name][:2]  # however many are drawn
    other = make(name, tokenizer, 1, seed=1)
    assert other[0].context != drawn[name][0].context
    assert len({s.context for s in again}) == 3


@every
def test_fits_and_is_nearly_full(name, tokenizer, drawn):
    """Within the length, and one more unit of haystack would be too much."""
    length = LENGTH.get(name, 1600)
    for sample in drawn[name]:
        assert sample.length <= length
        # The longest unit: a place with all its things, two needles, a line of noise.
        assert sample.length > length - 260
        assert sample.new_tokens == TASKS[name].new_tokens


@every
def test_answers_stand_where_it_says(name, tokenizer, drawn):
    for sample in drawn[name]:
        assert len(sample.spans) == len(sample.answers)
        for answer, (start, stop) in zip(sample.answers, sample.spans):
            assert answer in tokenizer.decode(sample.context[start:stop])
            assert answer not in tokenizer.decode(sample.context[start + 1 : stop])
        assert 0 <= sample.depth <= 1 and 0 <= sample.chance < 1


@every
def test_what_is_right_is_scored_right(name, drawn):
    for sample in drawn[name]:
        said = ", ".join(sample.answers)
        assert contained(sample, said.upper()) == 1 and first_right(sample, " " + said)
        assert contained(sample, "nothing") == 0 and not first_right(sample, "nothing 0 NO")


def test_no_more_is_decoded_than_answers_need(tokenizer):
    for name in ("niah_multivalue", "passkey"):
        sample = TASKS[name].samples(tokenizer, 1600, 1, text=TEXT, spare=2)[0]
        own = sum(len(tokenizer.encode(" " + a)) + 2 for a in sample.answers)
        assert sample.new_tokens == min(own, TASKS[name].new_tokens)
        assert 1340 < sample.length <= 1600


def test_chat_puts_the_prefix_into_the_answer(tokenizer, drawn):
    plain, chat = (make("passkey", tokenizer, 1, chat=c)[0] for c in (False, True))
    context, question = words_of(tokenizer, chat)
    assert context.startswith("<user>There is") and "The pass key is" in context
    assert question == "\nWhat is the pass key?</user>\n<model> The pass key is"
    assert words_of(tokenizer, plain)[1] == "\nWhat is the pass key? The pass key is"
    (start, stop), answer = chat.spans[0], chat.answer
    assert answer in tokenizer.decode(chat.context[start:stop])


@pytest.mark.parametrize("name", [n for n in TASKS if n.startswith("niah")])
def test_needles_occur_once(name, tokenizer, drawn):
    for sample in drawn[name]:
        context, question = words_of(tokenizer, sample)
        needle = r"One of the special magic (numbers|uuids) for ([\w-]+) is: ([\w-]+)\."
        found = re.findall(needle, context)
        assert all(context.count(answer) == 1 for answer in sample.answers)
        asked = {key for _, key, value in found if value in sample.answers}
        assert all(key in question for key in asked)
        # All values of the keys asked for, and of no other.
        assert sorted(v for _, k, v in found if k in asked) == sorted(sample.answers)
        keys = len({k for _, k, _ in found})
        shape = {
            "niah_multikey_1": (4, 1), "niah_multivalue": (1, 4), "niah_multiquery": (4, 4),
        }.get(name)  # fmt: skip
        if "multikey_2" in name or "multikey_3" in name:
            assert keys > 4 and sample.chance == pytest.approx(1 / keys)
        else:
            assert (keys, len(sample.answers)) == (shape or (1, 1))
        single = len(sample.answers) == 1
        assert context.startswith("A special magic" if single else "Some special magic")
        assert (" is the special magic" in question) == single


def test_depth_grows_with_position(tokenizer):
    samples = make("niah_single_1", tokenizer, 8)
    starts = [s.spans[0][0] for s in samples]
    depths = [s.depth for s in samples]
    assert np.argsort(starts).tolist() == np.argsort(depths).tolist()
    assert min(depths) < 0.4 and max(depths) > 0.6


def test_variables_form_one_chain(tokenizer, drawn):
    for sample in drawn["vt"]:
        context, question = words_of(tokenizer, sample)
        value = re.search(r"value (\d+)", question)[1]
        main = context.split("Memorize and track")[2]  # after the solved example
        said = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", main))

        def origin(name, said=said):
            while name in said:
                name = said[name]
            return name

        assert [n for n in said if origin(n) == value] == list(sample.answers)
        assert len(said) == 5 and all(len(n) == 5 for n in said)
        example = context.split("Memorize and track")[1]
        assert len(re.findall(r"VAR [A-Z]{3} = ", example)) == 5
        assert not set(re.findall(r"\b[A-Z]{3}\b", example)) & set(sample.answers)


def test_common_words_are_the_most_common(tokenizer, drawn):
    for sample in drawn["cwe"]:
        context, _ = words_of(tokenizer, sample)
        listed = re.findall(r"\d+\. ([\w-]+)", context.split("attend")[0].split("Below is")[-1])
        often = Counter(listed)
        assert {w for w, n in often.items() if n == 6} == set(sample.answers)
        assert set(often.values()) == {6, 1}
        assert sample.chance == pytest.approx(10 / len(often))


def test_frequent_words_are_ranked(tokenizer, drawn):
    for sample in drawn["fwe"]:
        context, _ = words_of(tokenizer, sample)
        said = Counter(context.split("coded words. ")[1].split())
        ranked = [word for word, _ in said.most_common(4)]
        assert ranked[0] == "..." and tuple(ranked[1:]) == sample.answers
        counts = [said[w] for w in ranked]
        assert len(set(counts)) == 4
        n = counts[0] * np.pi**2 / 6  # about
        assert all(abs(c - n / k**2 / (np.pi**2 / 6)) < 1.5 for k, c in enumerate(counts, 1))


def test_passkey_stands_between_noise(tokenizer, drawn):
    for sample in drawn["passkey"]:
        lines = words_of(tokenizer, sample)[0].split("\n")
        assert len(lines) == 4
        assert lines[2] == f"The pass key is {sample.answer}. Remember it. {sample.answer} is " \
            "the pass key."  # fmt: skip
        assert 1 <= int(sample.answer) <= 50_000
        for line in (lines[1], lines[3]):
            assert (vocabulary.NOISE + " " + vocabulary.NOISE).startswith(line[:60])


def test_pairs_are_asked_again(tokenizer, drawn):
    for sample in drawn["mqar"]:
        context, question = words_of(tokenizer, sample)
        table = dict(re.findall(r"^([\w-]+): (\d{5})$", context, re.M))
        shown = re.findall(r"^([\w-]+): (\d{5})$", question, re.M)
        asked = question.rsplit("\n", 1)[1].rstrip(":")
        assert len(shown) == 3 and all(table[k] == v for k, v in shown)
        assert table[asked] == sample.answer and asked not in dict(shown)
        assert sample.chance == 1 / len(table)


def test_joint_recall_text_has_one_value_per_place_and_thing(tokenizer, drawn):
    for sample in drawn["joint_recall"]:
        context, question = words_of(tokenizer, sample)
        line = r"In ([\w-]+) the (\w+) is (\w+)\."
        found = re.findall(line, context)
        table = {(p, t): c for p, t, c in found}
        assert len(table) == len(found) and len({t for _, t in table}) == 4
        assert all(table[p, t] == c for p, t, c in re.findall(line, question))
        place, thing = re.search(r"In ([\w-]+) the (\w+) is$", question).groups()
        assert table[place, thing] == sample.answer


def test_too_short_a_length_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"niah_single_1: length=200: .* \d+ tokens are needed"):
        TASKS["niah_single_1"].samples(tokenizer, 200, 1)
    with pytest.raises(ValueError, match="natural text"):
        TASKS["niah_single_2"].samples(tokenizer, 1600, 1)


def test_needles_are_those_of_before(tokenizer):
    """The numbers and places that figures in the documents were measured with."""
    found = needles(TEXT, tokenizer, 160, 2, seed=0)
    random = np.random.default_rng(0)
    ids = tokenizer.encode(TEXT, special=False)
    for i, sample in enumerate(found):
        number = str(random.integers(10000, 100000))
        fact = tokenizer.encode(
            f"\nThe magic number is {number}. Remember it: the magic number is {number}.\n"
        )
        hay = 160 - len(fact)
        start, at = int(random.integers(0, len(ids) - hay)), int((i + 0.5) / 2 * hay)
        assert list(sample.context) == ids[start:][:at] + fact + ids[start + at :][: hay - at]
        assert sample.answer == number and tokenizer.decode(sample.question).endswith("number is")
        a, b = sample.spans[0]
        assert number in tokenizer.decode(sample.context[a:b])


# --- metrics, by hand ---

THREE = Sample("any", (), (), ("Red", "blue", "12"), 8, form=r"\w+")


@pytest.mark.parametrize(
    ("text", "part", "first"),
    [
        ("red, BLUE and 12", 1.0, True),
        ("green, red", 1 / 3, False),
        ("\n\x00 blue. 12", 2 / 3, True),
        ("infrared 112", 2 / 3, False),  # containment, as in RULER, is no more than that
        ("", 0.0, False),
    ],
)
def test_metrics(text, part, first):
    assert contained(THREE, text) == pytest.approx(part) and first_right(THREE, text) is first


def test_first_number_counts():
    number = dataclasses.replace(THREE, answers=("123",), form=r"\d+")
    assert first_right(number, "it is 123, not 5") and not first_right(number, "5 or 123")
    assert not first_right(number, "1234") and contained(number, "1234") == 1


# --- as ids ---


@pytest.mark.parametrize(("length", "pairs"), [(64, 4), (64, 16), (8, 2)])
def test_associative_recall(length, pairs):
    data = associative_recall(50, length, pairs, vocab=128, seed=3)
    again = associative_recall(50, length, pairs, vocab=128, seed=3)
    assert (data.tokens == again.tokens).all() and (data.labels == again.labels).all()
    asked = data.labels != -100
    assert (asked.sum(1) == pairs).all() and not asked[:, : 2 * pairs].any()
    assert not asked[:, 1::2].any()
    for own, labels in zip(data.tokens, data.labels):
        table = dict(zip(own[: 2 * pairs : 2], own[1 : 2 * pairs : 2]))
        assert len(table) == pairs and len(set(table.values())) == pairs
        assert all(1 <= k < 64 <= v < 128 for k, v in table.items())
        at = np.flatnonzero(labels != -100)
        assert {own[i]: labels[i] for i in at} == table  # every key once, with its value
    bare = associative_recall(50, length, pairs, vocab=128, seed=3, fill=False)
    assert ((bare.tokens == 0) | (bare.tokens > 0)).all()
    assert (np.count_nonzero(bare.tokens, 1) == 3 * pairs).all()


def test_associative_recall_asks_near_first():
    """Gaps follow (g + 1)^(a - 1): of the first gap against the second two to one, about."""
    data = associative_recall(4000, 64, 1, vocab=64)
    gap = (np.argmax(data.labels != -100, 1) - 2) // 2
    often = np.bincount(gap, minlength=31)
    law = np.arange(1, 32) ** -0.99
    expected = 4000 * law / law.sum()
    assert (np.abs(often - expected) < 5 * np.sqrt(expected) + 1).all()


def test_joint_recall():
    data = joint_recall(40, (3, 5), (3, 5), values=4, seed=1)
    again = joint_recall(40, (3, 5), (3, 5), values=4, seed=1)
    assert (data.tokens == again.tokens).all()
    for own, labels in zip(data.tokens, data.labels):
        n = int((own != 3).sum())
        assert own[0] == 1 and (own[n:] == 3).all()
        middle = int(np.flatnonzero(own == 4)[0])
        tables = []
        for start, stop in ((1, middle), (middle + 1, n)):
            table, at, context = {}, start, -1
            while at < stop:
                if own[at] >= 42:
                    context, at = own[at], at + 1
                    continue
                assert 26 <= own[at] < 42 and 10 <= own[at + 1] < 14
                table[context, own[at]] = own[at + 1]
                asked = labels[at] != -100
                assert asked == (start > 1) and (not asked or labels[at] == own[at + 1])
                at += 2
            tables.append(table)
        assert tables[0] == tables[1]
        assert (labels != -100).sum() == len(tables[0])
    assert data.accuracy(np.where(data.labels == -100, 0, data.labels)) == 1
    assert data.accuracy(np.eye(60)[data.tokens]) == 0
    full = joint_recall(1, (16, 16), (16, 16))
    assert full.tokens.shape == (1, 1058)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: associative_recall(1, 63, 4), "length=63"),
        (lambda: associative_recall(1, 64, 17), "pairs=17: expected 1 to 16"),
        (lambda: joint_recall(1, (0, 4)), r"contexts=\(0, 4\)"),
        (lambda: joint_recall(1, keys=(3, 17)), r"keys=\(3, 17\)"),
        (lambda: joint_recall(1, values=20), "values=20"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()
