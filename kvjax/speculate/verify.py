"""Verification: which nodes of a draft the target accepts, and what it says next. Exact."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache.types import pytree
from kvjax.decode.process import Processor, processors
from kvjax.decode.sample import Sampler
from kvjax.speculate.tree import Tree


@pytree()
class Verdict:
    """What verification found.

    Attributes:
      path: int32 [B, depth + 1], accepted nodes from the root on, -1 after the last.
      accepted: int32 [B], how many of them were guesses (the root not counted).
      next: int32 [B], the token that follows the last accepted node.
      logprobs: float32 [B, depth + 1], of the accepted guesses and then of `next`, as
        `Sampler.draw` gives them; 0 beyond.
      processor: state of the logits processor after the accepted guesses.
    """

    path: Array
    accepted: Array
    next: Array
    logprobs: Array
    processor: Any


def verify(
    tree: Tree,
    logits: Array,
    *,
    sampler: Sampler | None = None,
    key: Array | None = None,
    index: Array | None = None,
    allowed: Array | None = None,
    stop: tuple[int, ...] = (),
    processor: Processor | None = None,
    state: Any = None,
) -> Verdict:
    """Goes down the tree as long as the target agrees; what comes out has the target's own law.

    Guesses without a law (`tree.q` None), and every greedy target: at each node the target's
    token is drawn once; where a child has that token, the walk goes on there. Token n of a row uses
    the key that `generate` uses for its token n, so that the tokens are those of plain decoding,
    sampled or greedy.

    Guesses drawn from q: a child x is accepted with probability min(1, p(x) / q(x)); after a
    rejection p becomes the normalised positive part of p - q, for the next sibling or, after the
    last, for the draw. Exact for chains, and for trees whose siblings were drawn in turn.

    The walk stops before a stop token, which is returned as `next`.

    Args:
      logits: float32 [B, N, V], the target's, of all nodes. p is the law that `sampler` and
        `processor` make of them.
      sampler: None: greedy. key: PRNG key, not needed by greedy.
      index: int32 [B], number of the first token after the root among the draws of its row.
      allowed: int32 [B], the most guesses to accept; None: no bound. The token after the last
        allowed one is drawn afresh, whatever was drafted.
      stop: token ids.
      processor, state: of the logits processor, after the root.

    Sources: Fast Inference from Transformers via Speculative Decoding, arXiv 2211.17192;
    Accelerating Large Language Model Decoding with Speculative Sampling, arXiv 2302.01318;
    siblings drawn in turn: Sequoia, arXiv 2402.12374.

    >>> from kvjax.speculate import chain_of
    >>> tree = chain_of(jnp.asarray([[7, 1, 2, 0]]))  # the root is 7
    >>> logits = jax.nn.one_hot(jnp.asarray([[1, 2, 5, 0]]), 8)  # the target says 1, 2, 5
    >>> found = verify(tree, logits)
    >>> found.path.tolist(), found.next.tolist()
    ([[0, 1, 2, -1]], [5])
    """
    sampler = Sampler() if sampler is None else sampler
    if sampler.temperature > 0 and key is None:
        raise ValueError("verify: sampling needs key=jax.random.key(seed)")
    if logits.shape[:2] != tree.tokens.shape:
        raise ValueError(
            f"logits of shape {logits.shape} are not those of the nodes {tree.tokens.shape}"
        )
    batch = tree.tokens.shape[0]
    zeros = jnp.zeros((batch,), jnp.int32)
    index = zeros if index is None else index
    allowed = jnp.full((batch,), tree.depth) if allowed is None else allowed
    key = jax.random.key(0) if key is None else key
    law = _Law(sampler, processors() if processor is None else processor, stop, key, index)
    start = _Walk(
        zeros, zeros, jnp.zeros((batch,), bool), zeros,
        jnp.full((batch, tree.depth + 1), -1, jnp.int32).at[:, 0].set(0),
        jnp.zeros((batch, tree.depth + 1), jnp.float32), () if state is None else state,
    )  # fmt: skip
    judge = _match if tree.q is None or sampler.temperature == 0 else _test
    walk = judge(tree, logits, law, start, jnp.minimum(allowed, tree.depth))
    return Verdict(walk.path, walk.accepted, walk.next, walk.logprobs, walk.state)


@pytree("sampler", "processor", "stop")
class _Law:
    """How the target draws a token."""

    sampler: Sampler
    processor: Processor
    stop: tuple[int, ...]
    key: Array
    index: Array

    def keys(self, after: Array) -> Array:
        """Keys [B] of the token that comes `after` [B] accepted guesses; as in `generate`."""
        rows = jnp.arange(after.shape[0])
        one = lambda n, row: jax.random.fold_in(jax.random.fold_in(self.key, n), row)  # noqa: E731
        return jax.vmap(one)(self.index + after, rows)

    def stops(self, token: Array) -> Array:
        ends = [token == s for s in self.stop]
        return functools.reduce(jnp.logical_or, ends, jnp.zeros_like(token, bool))


@pytree()
class _Walk:
    """Where each row stands. `done`: `next` is known."""

    node: Array
    accepted: Array
    done: Array
    next: Array
    path: Array
    logprobs: Array
    state: Any

    def step(self, law: _Law, move: Array, end: Array, child: Array, token: Array, lp: Array):
        """Rows where `move` go down to `child`, those where `end` have their next token."""
        row = jnp.arange(move.shape[0])
        known = jnp.where(move | end, self.accepted, -1)  # negative: nothing to write
        slot = jnp.where(known >= 0, known, self.logprobs.shape[1])
        down = jnp.where(move, self.accepted + 1, self.path.shape[1])
        return _Walk(
            jnp.where(move, child, self.node),
            self.accepted + move,
            self.done | end,
            jnp.where(end, token, self.next),
            self.path.at[row, down].set(child, mode="drop"),
            self.logprobs.at[row, slot].set(lp, mode="drop"),
            law.processor.update(self.state, jnp.where(move, token, -1)),
        )


def _match(tree: Tree, logits: Array, law: _Law, start: _Walk, allowed: Array) -> _Walk:
    """Draw, then look for the child that has the token; only D + 1 rows are ever read."""
    there = tree.positions(jnp.zeros_like(allowed)) >= 0

    def body(walk: _Walk) -> _Walk:
        own = jnp.take_along_axis(logits, walk.node[:, None, None], 1)[:, 0]
        own = law.processor(walk.state, own)
        token, logprob = law.sampler.draw(own, law.keys(walk.accepted))
        fits = there & (tree.parent == walk.node[:, None]) & (tree.tokens == token[:, None])
        child = jnp.argmax(fits, 1).astype(jnp.int32)  # of equal siblings only the first counts
        free = ~walk.done
        move = free & jnp.any(fits, 1) & (walk.accepted < allowed) & ~law.stops(token)
        return walk.step(law, move, free & ~move, child, token, logprob)

    return jax.lax.while_loop(lambda walk: ~jnp.all(walk.done), body, start)


def _test(tree: Tree, logits: Array, law: _Law, start: _Walk, allowed: Array) -> _Walk:
    """Tests node after node: those whose parent is where the row stands are its candidates."""
    there = (tree.tokens >= 0) & (tree.positions(jnp.zeros_like(allowed)) >= 0)
    parent = jnp.broadcast_to(tree.parent, there.shape)

    def probabilities(state: Any, own: Array) -> tuple[Array, Array]:
        own = law.processor(state, own)
        return own, jax.nn.softmax(law.sampler.filter(own), -1)

    def body(carry: Any, node: Any) -> Any:
        walk, own, p = carry
        number, token, parent, there, q, after = node
        token = jnp.maximum(token, 0)
        at = lambda x: jnp.take_along_axis(x, token[:, None], 1)[:, 0]  # noqa: E731
        keys = jax.vmap(lambda k: jax.random.fold_in(k, number))(law.keys(walk.accepted))
        u = jax.vmap(jax.random.uniform)(keys)
        tried = there & (parent == walk.node) & ~walk.done & (walk.accepted < allowed)
        yes = tried & (u * at(q) < at(p))
        ends = law.stops(token)
        logprob = at(own) - jax.nn.logsumexp(own, -1)
        walk = walk.step(law, yes & ~ends, yes & ends, jnp.full_like(token, number), token, logprob)
        rest = jnp.maximum(p - q, 0.0)
        whole = jnp.sum(rest, -1, keepdims=True)
        rest = jnp.where(whole > 0, rest / jnp.where(whole > 0, whole, 1.0), p)
        p = jnp.where((tried & ~yes)[:, None], rest, p)
        fresh = probabilities(walk.state, after)
        own, p = (jnp.where((yes & ~ends)[:, None], a, b) for a, b in zip(fresh, (own, p)))
        return (walk, own, p), None

    number = jnp.arange(1, tree.size, dtype=jnp.int32)
    turn = lambda x: jnp.moveaxis(x[:, 1:], 1, 0)  # noqa: E731
    nodes = (number, *map(turn, (tree.tokens, parent, there, tree.q, logits)))
    begin = (start, *probabilities(start.state, logits[:, 0]))
    (walk, own, p), _ = jax.lax.scan(body, begin, nodes)
    keys = jax.vmap(lambda k: jax.random.fold_in(k, 0))(law.keys(walk.accepted))
    token = jax.vmap(jax.random.categorical)(keys, jnp.log(p)).astype(jnp.int32)
    logprob = jnp.take_along_axis(own, token[:, None], 1)[:, 0] - jax.nn.logsumexp(own, -1)
    never = jnp.zeros_like(walk.done)
    return walk.step(law, never, ~walk.done, walk.node, token, logprob)
