"""Laws of schedules, unmaskers and choices, on predictors that need no network."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax import diffusion
from kvjax.codecs import quantize
from kvjax.diffusion import (
    BlockSchedule,
    Choice,
    Prediction,
    Unmasker,
    View,
    blocks,
    denoise,
    factor,
    quota,
    ranks,
    threshold,
)
from kvjax.models import Config
from kvjax.models.llama import init

WIDTH, VOCABULARY, MASK = 12, 17, 0


@functools.cache
def fixed(seed=0):
    """A predictor whose logits [N, V] do not depend on the tokens."""
    logits = 2.0 * np.random.default_rng(seed).standard_normal((WIDTH, VOCABULARY))
    logits[:, MASK] = -np.inf
    return logits.astype(np.float32)


def predict(tokens):
    return jnp.broadcast_to(fixed(), (*tokens.shape, VOCABULARY))


def run(canvas, predictor=predict, **how):
    return denoise(predictor, jnp.asarray(canvas), mask_token=MASK, **how)


EMPTY = np.zeros((1, WIDTH), np.int32)


def test_a_block_of_one_is_left_to_right():
    out = run(EMPTY, schedule=blocks(1))
    assert out.order[0].tolist() == list(range(WIDTH)) and out.steps.tolist() == [WIDTH]
    assert out.tokens[0].tolist() == fixed().argmax(-1).tolist()


def test_given_tokens_stay_and_blocks_without_masks_take_no_step():
    canvas = EMPTY.copy()
    canvas[0, [0, 4, 5, 6, 7, 9]] = [3, 1, 2, 3, 4, 5]  # the second block of four is full
    out = run(canvas, schedule=blocks(4), unmasker=quota(2))
    given = canvas[0] != MASK
    assert np.array_equal(np.asarray(out.tokens)[0, given], canvas[0, given])
    assert (np.asarray(out.order)[0, given] == -1).all()
    assert out.steps.tolist() == [4] and int(out.evaluations) == 4
    assert not (np.asarray(out.tokens) == MASK).any()
    full = run(canvas + 1, schedule=blocks(4))
    assert int(full.evaluations) == 0 and full.tokens.tolist() == (canvas + 1).tolist()


def test_masks_before_the_origin_and_behind_the_row_stay():
    out = run(np.zeros((2, WIDTH), np.int32), origin=jnp.array([2, 5]), lengths=jnp.array([9, 12]))
    assert (np.asarray(out.tokens) == -1).tolist() == [[n >= 9 for n in range(12)], [False] * 12]
    assert (np.asarray(out.tokens) == 0).tolist() == [
        [n < 2 for n in range(12)], [n < 5 for n in range(12)],
    ]  # fmt: skip
    assert out.steps.tolist() == [7, 7]


@functools.partial(jax.jit, static_argnames="unmasker")
def select(unmasker, confidence, index, total):
    batch = confidence.shape[0]
    row = jnp.zeros((batch,), jnp.int32)
    mask = jnp.isfinite(confidence)
    view = View(mask * 0, mask, mask, row, row + WIDTH, row, row + WIDTH, index, total)
    return unmasker.select(view, Prediction(mask * 0, confidence), ())[0]


UNMASKERS = (quota(3), quota(5), quota(20), threshold(0.4), factor(0.5), factor(1.0))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_unmaskers_are_what_they_say(seed):
    """Against sorted lists, ties included: confidences are multiples of 1/8."""
    draw = np.random.default_rng(seed)
    confidence = draw.integers(0, 9, (3, WIDTH)).astype(np.float32) / 8
    confidence[draw.random(confidence.shape) < 0.3] = -np.inf
    index, total = draw.integers(0, 6, 3), draw.integers(0, WIDTH + 1, 3)
    for unmasker in UNMASKERS:
        got = np.asarray(select(unmasker, confidence, index, total))
        for b in range(3):
            best = sorted(range(WIDTH), key=lambda n: (-confidence[b, n], n))
            best = [n for n in best if np.isfinite(confidence[b, n])]
            if isinstance(unmasker, diffusion.unmask.Quota):
                count = total[b] // unmasker.steps + (index[b] < total[b] % unmasker.steps)
            elif isinstance(unmasker, diffusion.unmask.Threshold):
                count = max(sum(confidence[b, n] >= 0.4 for n in best), 1)
            else:
                f = unmasker.value
                fits = [m for m, n in enumerate(best, 1) if (m + 1) * (1 - confidence[b, n]) <= f]
                count = max([1, *fits])
            finite = np.isfinite(confidence[b])
            assert np.nonzero(got[b] & finite)[0].tolist() == sorted(best[:count])


def test_a_quota_commits_every_mask_in_its_steps():
    for steps in (1, 3, 5, 12, 40):
        out = run(EMPTY, unmasker=quota(steps))
        counts = np.bincount(np.asarray(out.order)[0])
        assert counts.sum() == WIDTH and out.steps.tolist() == [min(steps, WIDTH)]
        assert counts.max() - counts.min() <= 1 and (np.diff(counts) <= 0).all()


def test_limits_of_threshold_and_factor():
    one = run(EMPTY, unmasker=quota(WIDTH))
    for unmasker in (threshold(1.01), factor(0.0)):
        assert run(EMPTY, unmasker=unmasker).order.tolist() == one.order.tolist()
    for unmasker in (threshold(0.0), factor(WIDTH + 2.0)):
        assert run(EMPTY, unmasker=unmasker).steps.tolist() == [1]
    steps = [int(run(EMPTY, unmasker=threshold(t)).steps[0]) for t in (0.0, 0.2, 0.4, 0.6, 0.9)]
    assert steps == sorted(steps) and len(set(steps)) > 2


@dataclasses.dataclass(frozen=True)
class Alternating(Unmasker):
    """An unmasker of one's own, with memory: one, then two, then one, ... most confident."""

    def init(self, view):
        return jnp.zeros(view.limit.shape, jnp.int32)

    def select(self, view, prediction, state):
        return ranks(prediction.confidence) < 1 + (state % 2)[:, None], state + 1


@dataclasses.dataclass(frozen=True)
class UpToTheSurest(BlockSchedule):
    """A schedule of one's own: a block ends behind the most confident of the next masks."""

    def begin(self, view, after, first):
        return first

    def end(self, view, prediction):
        return jnp.argmax(prediction.confidence, 1).astype(jnp.int32) + 1


def test_parts_of_ones_own():
    out = run(np.zeros((2, WIDTH), np.int32), unmasker=Alternating(), lengths=jnp.array([12, 7]))
    assert np.bincount(np.asarray(out.order)[0]).tolist() == [1, 2, 1, 2, 1, 2, 1, 2]
    assert np.bincount(np.asarray(out.order)[1, :7]).tolist() == [1, 2, 1, 2, 1]
    p = np.exp(fixed().astype(np.float64))
    p = (p / p.sum(-1, keepdims=True)).max(-1)
    begin, expected, step = 0, [], 0
    while begin < WIDTH:
        end = begin + int(p[begin : begin + 5].argmax()) + 1
        order = sorted(range(begin, end), key=lambda n: -p[n])
        expected += [step + order.index(n) for n in range(begin, end)]
        step, begin = step + end - begin, end
    out = run(EMPTY, schedule=UpToTheSurest(5), unmasker=threshold(1.01))
    assert out.order[0].tolist() == expected


def test_measures_of_confidence():
    logits = fixed(3)[None]
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    position, keys = jnp.arange(WIDTH)[None] + 5, jax.random.split(jax.random.key(0), (1, WIDTH))
    best = np.sort(p, -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = np.where(p > 0, p * np.log(p), 0.0).sum(-1)
    expected = {
        "probability": best[..., -1],
        "margin": best[..., -1] - best[..., -2],
        "entropy": entropy,
        "left_to_right": -np.arange(5.0, 5 + WIDTH)[None],
    }
    for name, value in expected.items():
        token, confidence = Choice(confidence=name)(jnp.asarray(logits), position, keys)
        assert token.tolist() == logits.argmax(-1).tolist()
        np.testing.assert_allclose(confidence, value, rtol=2e-6, atol=1e-6)
    _, drawn = Choice(confidence="random")(jnp.asarray(logits), position, keys)
    assert (
        len(set(drawn[0].tolist())) == WIDTH and 0 <= float(drawn.min()) <= float(drawn.max()) < 1
    )
    chosen = int(logits[0, 0].argmax())
    token, confidence = Choice(suppress=(chosen,))(jnp.asarray(logits), position, keys)
    assert token[0, 0] != chosen and (token[0] != chosen).all()
    token, confidence = Choice(defer=(chosen,))(jnp.asarray(logits), position, keys)
    assert token[0, 0] == chosen and confidence[0, 0] == 0


def test_temperature_draws_from_the_softmax():
    logits = jnp.broadcast_to(jnp.asarray(fixed(4)[:1]), (1, 20_000, VOCABULARY))
    keys = jax.random.split(jax.random.key(1), (1, 20_000))
    token, _ = jax.jit(Choice(temperature=1.5))(logits, jnp.zeros((1, 20_000)), keys)
    share = np.bincount(np.asarray(token)[0], minlength=VOCABULARY) / 20_000
    p = np.asarray(jax.nn.softmax(logits[0, 0] / 1.5))
    assert (np.abs(share - p) <= 5 * np.sqrt(p * (1 - p) / 20_000)).all()


def shuffle(tokens):
    """The exact posterior of a random order of the items 1 to N: those that are left, equally."""
    used = jax.nn.one_hot(tokens, WIDTH + 1).sum(1).at[:, MASK].set(1.0)
    logits = jnp.where(used > 0, -jnp.inf, 0.0)
    return jnp.broadcast_to(logits[:, None], (*tokens.shape, WIDTH + 1))


def test_shuffle_by_parallel_draws_is_as_often_right_as_theory_says():
    """Sampling k of m items independently: P(m, k) / m^k per step (ParallelBench, 2510.04767)."""
    rows, choice = 4000, Choice(temperature=1.0, confidence="random")
    for k in (1, 3):
        out = run(
            np.zeros((rows, WIDTH), np.int32), shuffle, unmasker=quota(WIDTH // k), choice=choice,
            key=jax.random.key(k),
        )  # fmt: skip
        right = (np.sort(np.asarray(out.tokens), 1) == np.arange(1, WIDTH + 1)).all(1).mean()
        left = np.arange(WIDTH, 0, -k)
        exact = math.prod(math.perm(m, k) / m**k for m in left.tolist())
        assert abs(right - exact) <= 4 * math.sqrt(exact * (1 - exact) / rows)
        assert exact == 1 or 0 < right < 1


CAUSAL = Config(VOCABULARY, 8, 8, 1, 1, 1, 8, mask_token=MASK)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: blocks(0), "size=0"),
        (lambda: quota(0), "steps=0"),
        (lambda: factor(-1), "value=-1"),
        (lambda: diffusion.dkv_decode(0), "refresh=0"),
        (lambda: diffusion.dkv_decode(4, delay=2), "delay=2"),
        (
            lambda: diffusion.dkv_decode(codec=quantize(4, axis="channel", group=4)),
            "codes 4 tokens together",
        ),
        (lambda: diffusion.llada(30, 10, 8), "new_tokens=30.*block=8"),
        (lambda: diffusion.llada(32, 10, 8), "steps=10.*4"),
        (lambda: Choice(temperature=-1), "temperature=-1"),
        (lambda: Choice(confidence="luck"), "confidence='luck'.*probability"),
        (lambda: run(EMPTY, choice=Choice(1.0)), "needs key"),
        (lambda: run(EMPTY, cache=diffusion.dkv_decode()), "no keys and values"),
        (lambda: run(EMPTY, sizes=(6,)), r"sizes=\(6,\).*from 12"),
        (lambda: run(EMPTY[0]), r"shape \(12,\)"),
        (lambda: run(EMPTY, guidance=-1.0), "guidance=-1"),
        (lambda: denoise(predict, EMPTY), "mask_token=None"),
        (lambda: denoise(init(CAUSAL, jax.random.key(0)), EMPTY), "causal"),
        (lambda: diffusion.generate(predict, EMPTY, 0, mask_token=MASK), "new_tokens=0"),
    ],
)
def test_refusals(call, match):
    with pytest.raises(ValueError, match=match):
        call()
