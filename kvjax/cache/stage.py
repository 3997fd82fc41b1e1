"""What a stage of a chain is: the interface that every way of holding tokens implements."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from kvjax.cache.types import KV, Observation, Partial, Phase, Query, Rope, Spec, rotate
from kvjax.codecs import Codec, Dense

FOREVER = jnp.iinfo(jnp.int32).max // 2


@dataclasses.dataclass(frozen=True)
class Commit:
    """What a commit knows beside the tokens.

    Attributes:
      phase: "prefill" (the bulk of a prompt), "append", "decode" or "verify".
      rope: frequencies of all layers of the group.
      seen: attention statistics of the rows being committed, or None.
      stats: statistics of the whole prompt by name; only in the bulk commit of `finish`.
      constants: arrays of the transform (calibration, codebooks, shared prefixes).
      softcap: of the model's attention logits.
      layout: how the cache lies over devices (`kvjax.parallel.Layout`), or None; for writes.
      last: what this stage passes on is forgotten, so it need not be read.
      columns: those that the rows being committed bring, as `seen` has their queries.
      whole: the tokens are a whole prompt: the bulk commit of `finish`.
    """

    phase: Phase
    rope: Rope
    seen: Observation | None = None
    stats: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    constants: Any = None
    softcap: float | None = None
    layout: Any = None
    last: bool = False
    columns: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    whole: bool = False

    def rotated(self, kv: KV, unrotated: bool) -> Array:
        """The keys of `kv` [L, B, H, T, D], rotated at their positions."""
        return rotate(kv.k, kv.pos, self.rope) if unrotated else kv.k


@dataclasses.dataclass(frozen=True)
class Column:
    """A float32 that every held token carries; kept current at each commit.

    A subclass gives `update`. Equal columns of several stages are one column.
    """

    name: str

    @property
    def constants(self) -> tuple[str, ...]:
        """Names of the constants from which it is made."""
        return ()

    @property
    def observes(self) -> bool:
        """Whether `update` reads the attention statistics of the rows being committed."""
        return True

    @property
    def lasting(self) -> bool:
        """Whether tokens that bring it keep it to the end of the chain, whoever asks for it."""
        return False

    def update(self, old: Array, k: Array, pos: Array, context: Commit) -> Array:
        """The column after rows were committed.

        Args:
          old: float32 [L, B, H, N]; for the rows being committed themselves what they carry, or
            zeros.
          k: [L, B, H, N, D], rotated. pos: int32 [L or 1, B, H or 1, N].
        """
        raise NotImplementedError(f"column {self.name!r} has no update rule")

    def complete(self, old: Array, pos: Array) -> Array:
        """What becomes of it when a prompt is finished, before any token is dropped: old float32
        [L, B, H, N] and pos int32 [L or 1, B, H or 1, N], tokens by ascending position."""
        return old


@dataclasses.dataclass(frozen=True)
class Carried(Column):
    """A column that comes with the tokens (`New.kv.extra`), never changes, and goes with them from
    the stage that names it to the end of the chain. "bias" is added to the logits wherever held.
    """

    @property
    def observes(self) -> bool:
        return False

    @property
    def lasting(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class Mark(Carried):
    """A carried column for those stages alone that name it, such as which tokens are images."""

    @property
    def lasting(self) -> bool:
        return False


@dataclasses.dataclass(frozen=True)
class LayerMark(Mark):
    """A mark that differs from layer to layer: `forward` makes it."""


@dataclasses.dataclass(frozen=True)
class InputMark(LayerMark):
    """A mark that `forward` makes from what each layer reads."""

    def of_input(self, x: Array) -> Array:
        """x [B, T, D], the input of a layer before its norm -> float32 [B, T]."""
        raise NotImplementedError(f"column {self.name!r} is not made from a layer's input")


@dataclasses.dataclass(frozen=True)
class TokenMark(Mark):
    """A mark that `forward` makes from each token's id and position, alike for all layers; queries
    know it too (`Query.columns`)."""

    def of_tokens(self, tokens: Array, positions: Array, constants: Mapping[str, Any]) -> Array:
        """tokens, positions int32 [B, T], -1: padding -> float32 [B, T]; whatever for padding."""
        raise NotImplementedError(f"column {self.name!r} is not made from token ids")


@dataclasses.dataclass(frozen=True)
class Replay(Column):
    """What each token of a prompt received while the prompt was read again, before `finish`.

    See `replayed_attention`; tokens that come later have 0.

    Attributes:
      chunk: tokens read again at a time. hint: tokens before them that are shown first.
      sinks: first tokens of the prompt to which every replay attends.
    """

    name: str = "replayed"
    chunk: int = 2000
    hint: int = 8
    sinks: int = 4

    @property
    def observes(self) -> bool:
        return False


@dataclasses.dataclass(frozen=True)
class Statistic:
    """Something gathered over the rows of a prompt, for use when it is finished."""

    name: str

    def init(self, spec: Spec) -> Any:
        raise NotImplementedError(f"statistic {self.name!r} has no initial value")

    def update(self, value: Any, k: Array, context: Commit) -> Any:
        """After rows were committed: k [L, B, H, T, D] are their keys, rotated (zero for padding),
        and `context.seen` their queries."""
        raise NotImplementedError(f"statistic {self.name!r} has no update rule")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One way of holding tokens. Stages are values: equal fields, equal stage.

    A stage's state is a pytree of its own choosing, with all layers of a scan group on the
    leading axis. Methods are pure.
    """

    @property
    def streaming(self) -> bool:
        """Whether bulk, chunked and token-by-token commits of one stream give the same state."""
        return True

    @property
    def by_arrival(self) -> bool:
        """Whether what is held depends on the order in which tokens arrive."""
        return True

    @property
    def in_order(self) -> bool:
        """Whether tokens that arrive by ascending position also leave so."""
        return True

    @property
    def columns(self) -> tuple[Column, ...]:
        """Columns that tokens must carry by the time they arrive here."""
        return ()

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """Prompt statistics that the bulk commit of `finish` must find in its context."""
        return ()

    @property
    def unrotated(self) -> bool:
        """Whether keys must arrive before rotary rotation."""
        return False

    @property
    def first_only(self) -> bool:
        """Whether the stage must stand at the head of its chain."""
        return False

    @property
    def light(self) -> bool:
        """Whether a few tokens that are none cost next to nothing to commit, where nothing is
        passed on: such a last stage is committed to without asking whether any token comes."""
        return False

    @property
    def once(self) -> bool:
        """Whether it acts in `finish` alone, so that later tokens need not carry its columns."""
        return False

    @property
    def every_layer(self) -> bool:
        """Whether layers without this stage would miss tokens, so that none can be left out."""
        return False

    @property
    def observes(self) -> bool:
        """Whether commits after the prompt must bring the queries of the rows."""
        return False

    @property
    def looks_ahead(self) -> bool:
        """Whether it reads `Query.ahead`."""
        return False

    def constants(self, width: int) -> tuple[str, ...]:
        """Names of the constants that it reads, for heads of `width` channels."""
        return ()

    def given(self, constants: Mapping[str, Any], batch: int) -> tuple[Array, int] | None:
        """Tokens that rows see here though they never come by a commit; None: there are none.

        Returns:
          (tokens of each row, int32 [B]; the most of any row, static).
        """
        return None

    def init(self, spec: Spec) -> Any:
        """An empty state able to hold what `spec` says can come. Raises ValueError if it can't."""
        raise NotImplementedError

    def downstream(self, spec: Spec) -> Spec | None:
        """What can leave a stage that was initialised with `spec`; None: nothing ever does."""
        raise NotImplementedError

    def start(self, state: Any, pos: Array) -> Any:
        """What `attend` of the first layer is given as `carry`, for rows at pos [B, T]; the same
        structure goes from layer to layer."""
        return ()

    def attend(
        self, state: Any, layer: Array, query: Query, carry: Any
    ) -> tuple[Partial | None, Any]:
        """Attention of the query rows over this stage's own slots; None where it has none."""
        raise NotImplementedError

    def commit(self, state: Any, kv: KV, context: Commit) -> tuple[Any, KV | None]:
        """Takes tokens (compact, ascending); returns what overflows, compact and ascending."""
        raise NotImplementedError

    def releases(self, state: Any, kv: KV) -> Array | bool:
        """Whether `commit` of these tokens lets any leave: bool scalar, or a static answer."""
        return True

    def observe(self, state: Any, columns: tuple[Column, ...], context: Commit) -> Any:
        """Brings the columns of held tokens up to date with the rows being committed."""
        return state

    def held(self, state: Any) -> Array:
        """Tokens held per row, int32 [B]; the most over layers and heads."""
        raise NotImplementedError

    def tokens(self, state: Any) -> Array | int:
        """Tokens held, summed over layers, rows and key-value heads: int32 scalar."""
        return 0

    def slots(self, state: Any) -> int:
        """Tokens for which there is room, summed likewise; 0: it has no slots."""
        return 0

    def horizon(self, state: Any) -> tuple[Array, bool]:
        """(tokens, final). The commit of fewer than `tokens` [B] more changes neither what is
        visible here nor its form. `final`: whether tokens within the horizon stay here, so that
        later stages do not see them."""
        raise NotImplementedError


def exact(codec: Codec, dtype: Any) -> bool:
    """Whether a codec gives back, bit for bit, what was stored in `dtype`."""
    return isinstance(codec, Dense) and codec.dtype in (None, jnp.dtype(dtype).name)


def total(count: Array, spec: Spec) -> Array:
    """Sum of [L or 1, B, H or 1] over all layers, rows and heads."""
    return jnp.sum(jnp.broadcast_to(count, (spec.layers, spec.batch, spec.kv_heads)))


def room_of(pos: Array, spec: Spec) -> int:
    """Slots of all layers, rows and heads, where positions are [L or 1, B, H or 1, N]."""
    return spec.layers * spec.batch * spec.kv_heads * pos.shape[-1]


def most(count: Array) -> Array:
    """[L or 1, B, H or 1] -> [B], the largest over layers and heads."""
    return jnp.max(count, axis=(0, 2))


def least(count: Array) -> Array:
    """[L or 1, B, H or 1] -> [B], the smallest over layers and heads."""
    return jnp.min(count, axis=(0, 2))


def observe_slots(kv: KV, columns: tuple[Column, ...], context: Commit, unrotated: bool) -> KV:
    """Updates the columns of an exact buffer."""
    if not columns:
        return kv
    k = context.rotated(kv, unrotated)
    extra = {c.name: c.update(kv.extra[c.name], k, kv.pos, context) for c in columns}
    return dataclasses.replace(kv, extra={**kv.extra, **extra})
