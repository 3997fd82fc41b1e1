"""Shards cover a source exactly once; batches resume where they were."""

import collections
import json

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.data import ListOperations, TokenWindows, batches, shard


def parts(count, drop=False):
    return [grain.sharding.ShardOptions(i, count, drop) for i in range(count)]


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 40), count=st.integers(1, 7))
def test_shards_cover_the_set_exactly_once(size, count):
    own = [list(shard(range(size), options)) for options in parts(count)]
    assert [x for part in own for x in part] == list(range(size))
    assert max(map(len, own)) - min(map(len, own)) <= 1


@settings(max_examples=20, deadline=None)
@given(size=st.integers(8, 40), count=st.integers(1, 4), shuffled=st.booleans())
def test_an_epoch_over_all_processes_is_the_set(size, count, shuffled):
    """What drop_remainder=False keeps is everything, and no process sees another's examples."""
    seen = collections.Counter()
    for options in parts(count):
        data = batches(
            range(size), 2 * count, seed=1 if shuffled else None, epochs=1, options=options,
            drop_remainder=False,
        )  # fmt: skip
        for batch in data:
            seen.update(batch.tolist())
    assert seen == collections.Counter(range(size))


def test_processes_have_as_many_batches_where_the_remainder_is_dropped():
    counts, seen = [], collections.Counter()
    for options in parts(3, drop=True):
        rows = [b.tolist() for b in batches(range(29), 6, epochs=1, options=options)]
        counts.append(len(rows))
        seen.update(x for row in rows for x in row)
    assert counts == [4, 4, 4] and max(seen.values()) == 1 and len(seen) == 24


def test_epochs_are_shuffled_anew_and_each_is_the_set():
    data = iter(batches(range(12), 4, seed=7, epochs=3))
    flat = [x for batch in data for x in batch.tolist()]
    epochs = [flat[i : i + 12] for i in (0, 12, 24)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = [x for batch in batches(range(12), 4, seed=7, epochs=3) for x in batch.tolist()]
    assert again == flat


@pytest.mark.parametrize("threads", [0, 2])
def test_an_iterator_goes_on_from_its_state(threads):
    data = batches(ListOperations(100, seed=2), 8, seed=0, threads=threads)
    first = iter(data)
    for _ in range(17):  # into the second epoch
        next(first)
    state = json.loads(json.dumps(first.get_state()))  # as a file would hold it
    expected = [next(first)["tokens"] for _ in range(3)]
    second = iter(data)
    second.set_state(state)
    for batch in expected:
        np.testing.assert_array_equal(next(second)["tokens"], batch)


def test_transforms_act_on_examples_in_order():
    data = batches(range(4), 2, epochs=1, transforms=(lambda x: x + 1, lambda x: 10 * x))
    assert [b.tolist() for b in data] == [[10, 20], [30, 40]]


def test_refused():
    with pytest.raises(ValueError, match=r"batch=5: .*3 processes"):
        batches(range(30), 5, options=parts(3)[0])
    with pytest.raises(ValueError, match=r"batch=0"):
        batches(range(30), 0)
    with pytest.raises(ValueError, match=r"3 examples on 2 processes do not fill"):
        batches(range(3), 4, options=parts(2)[1])


def test_windows_of_a_text():
    windows = TokenWindows(np.arange(100, dtype=np.int64), length=30, stride=20)
    rows = [windows[i]["tokens"] for i in range(len(windows))]
    assert len(rows) == 4 and all(r.dtype == np.int32 for r in rows)
    assert [int(r[0]) for r in rows] == [0, 20, 40, 60] and int(rows[-1][-1]) == 89
    batch = next(iter(batches(windows, 2)))
    assert batch["tokens"].shape == (2, 30)
    with pytest.raises(IndexError):
        windows[4]
    with pytest.raises(ValueError, match="length=101: there are 100 tokens only"):
        TokenWindows(np.arange(100), 101)
    with pytest.raises(ValueError, match="stride=0"):
        TokenWindows(np.arange(100), 10, 0)
