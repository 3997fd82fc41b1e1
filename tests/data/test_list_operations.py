"""Examples by index: their layout, their answers, and what counts as right."""

import dataclasses
import statistics

import numpy as np
import pytest

from kvjax.data import ListOperations
from kvjax.data.list_operations import (
    BLANK,
    EOS,
    EQUALS,
    MASK,
    OPERATIONS,
    VOCABULARY,
    correct,
    text,
    tokenizer,
)  # fmt: skip

SOURCE = ListOperations(500, seed=3)
ROWS = [SOURCE[i] for i in range(len(SOURCE))]
TOKENS = np.stack([row["tokens"] for row in ROWS])
START = SOURCE.prompt_length


def words(row):
    return [VOCABULARY[t] for t in row]


def test_layout():
    for row in ROWS:
        tokens, count = row["tokens"], int(row["items"].sum())
        assert tokens.shape == (3 + 2 * 16,) and tokens.dtype == np.int32
        given = tokens[2 : 2 + count]
        assert len(set(given)) == count and 4 <= count <= 16
        assert all(w in "abcdefghijklmnopqrstuvwxyz" for w in words(given))
        assert (tokens[2 + count : START - 1] == BLANK).all() and tokens[START - 1] == EQUALS
        assert (tokens[START + count :] == EOS).all()
        assert row["answer"].tolist() == [False] * START + [True] * 16
        assert row["items"].tolist() == [False] * START + [True] * count + [False] * (16 - count)
        name = VOCABULARY[tokens[0]]
        assert (tokens[1] != BLANK) == (name == "replace") and tokens[1] not in given
        assert MASK not in tokens


def test_answers_are_what_the_operations_say():
    """Stated again on words, with Python's own lists."""
    for row in ROWS:
        w, n = words(row["tokens"]), int(row["items"].sum())
        given, answer = w[2 : 2 + n], w[START : START + n]
        expected = {"copy": given, "reverse": given[::-1], "sort": sorted(given)}.get(w[0])
        if expected is not None:
            assert answer == expected
        elif w[0] == "replace":
            assert answer in [[*given[:i], w[1], *given[i + 1 :]] for i in range(n)]
        else:
            assert sorted(answer) == sorted(given) and answer != given


def test_an_example_depends_on_seed_and_index_alone():
    again = ListOperations(10**9, seed=3)
    np.testing.assert_array_equal(again[7]["tokens"], SOURCE[7]["tokens"])
    other = np.stack([ListOperations(500, seed=4)[i]["tokens"] for i in range(500)])
    assert (other != TOKENS).any(1).all()
    assert len({row.tobytes() for row in TOKENS}) == 500


def test_operations_lengths_and_places_are_even():
    many = ListOperations(4000, seed=5, min_items=4, max_items=7)
    rows = [many[i] for i in range(len(many))]
    names = [VOCABULARY[r["tokens"][0]] for r in rows]
    for name in OPERATIONS:
        assert abs(names.count(name) / 4000 - 0.2) < 0.03  # 4.7 standard deviations
    counts = [int(r["items"].sum()) for r in rows]
    assert all(abs(counts.count(n) / 4000 - 0.25) < 0.035 for n in (4, 5, 6, 7))
    places = []
    for name, n, row in zip(names, counts, rows):
        if name == "replace":
            answer = row["tokens"][many.prompt_length :][:n]
            places.append(int(np.argmax(answer == row["tokens"][1])) / (n - 1))
    assert abs(statistics.mean(places) - 0.5) < 0.06


def test_right_answers_and_wrong_ones():
    assert correct(TOKENS).all()
    given = TOKENS.copy()  # the given list as the answer
    counts = [int(row["items"].sum()) for row in ROWS]
    for row, n in zip(given, counts):
        row[START : START + n] = row[2 : 2 + n]
    names = np.array([VOCABULARY[t] for t in TOKENS[:, 0]])
    ascending = (given == TOKENS).all(1)
    assert correct(given)[names == "copy"].all()
    assert not correct(given)[(names != "copy") & ~ascending].any()
    for place in range(START, START + 16):  # any one token changed to one that is nowhere right
        broken = TOKENS.copy()
        broken[:, place] = MASK
        assert not correct(broken).any()


@pytest.mark.parametrize(
    ("answer", "right"),
    [("x b c d", True), ("a b c x", True), ("x b c x", False), ("a b c d", False),
     ("b a c x", False), ("x b c d e", False), ("x b c", False)],
)  # fmt: skip
def test_replace_accepts_every_place_and_nothing_else(answer, right):
    padded = " ".join((answer.split() + ["<eos>"] * 5)[:5])
    row = tokenizer().encode(f"replace x a b c d _ = {padded}")
    assert correct(np.array(row)).tolist() == [right]


def test_shuffle_accepts_every_order_but_the_given_one():
    def right(answer):
        return bool(correct(np.array(tokenizer().encode(f"shuffle _ a b c = {answer}")))[0])

    orders = ("a b c", "a c b", "b a c", "b c a", "c a b", "c b a", "a a b", "a b d")
    assert [o for o in orders if right(o)] == list(orders[1:6])


def test_tokenizer_and_text_are_inverse(tmp_path):
    from kvjax.models.tokenizer import load_tokenizer

    tokenizer().save(tmp_path)
    for own in (tokenizer(), load_tokenizer(tmp_path)):
        assert own.encode(text(TOKENS[0])) == TOKENS[0].tolist()
        assert own.decode(TOKENS[0]) == text(TOKENS[0][TOKENS[0] != EOS])
        assert own.eos == (EOS,) and len(own) == len(VOCABULARY)


def test_lists_of_one_length_in_a_wider_layout():
    source = ListOperations(50, min_items=6, max_items=6, slots=16)
    row = source[3]
    assert row["items"].sum() == 6 and row["tokens"].shape == (35,)
    assert correct(np.stack([source[i]["tokens"] for i in range(50)])).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"operations": ("copy", "rotate")}, r"rotate.*expected some of copy"),
        ({"operations": ()}, "at least one"),
        ({"size": 0}, "size=0"),
        ({"min_items": 1}, "min_items=1"),
        ({"min_items": 9, "max_items": 8}, "min_items=9, max_items=8"),
        ({"max_items": 26}, "max_items=26"),
        ({"slots": 8}, "slots=8.*max_items=16"),
    ],
)
def test_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ListOperations(10, slots=None), **change)


def test_index_out_of_range():
    for index in (-1, 500):
        with pytest.raises(IndexError, match="500 examples"):
            SOURCE[index]
