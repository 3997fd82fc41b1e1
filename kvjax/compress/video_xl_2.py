"""Video-XL-2: prompts computed in chunks that carriers connect, then read at two resolutions."""

from __future__ import annotations

from typing import Literal

from kvjax.cache import Chain, Store, attending, chain, groups, in_chunks, levels, store
from kvjax.compress.common import size


def video_xl_2(
    chunk: int = 4,
    previous: int = 3,
    stride: int = 4,
    block: int = 4,
    relevant: int = 4,
    keep: float = 1.0,
    positions: Literal["contiguous", "original", "centre"] = "contiguous",
    bias: bool = False,
    carry: bool = True,
    length: int = 148,
    carriers: int = 4,
    prefix: int = 0,
    window: int = 32,
    by: Literal["attention", "mean"] = "attention",
    storage: Store | Chain | None = None,
) -> Chain:
    """A prompt of groups, each opened by carrier tokens (time stamps, headings): chunks of groups
    attend to themselves and the chunks before; then blocks of groups that matter to the question
    are read densely, the others pooled.

        attending(in_chunks(groups, chunk, previous)) > levels(groups, stride, block, relevant)
            > storage

    Types of tokens come as a column "type": 0 text (system words, question), 1 carrier, 2 content
    (`prefill(..., columns={"type": ...})`). Where a row brings none, every `length` tokens are a
    group whose first `carriers` are carriers, so that it runs on any text.

    A question that comes later, as in the paper: `prefill(..., hold=True)` leaves the exact cache
    of the chunked prompt, `finish(cache, {"relevance": ...})` makes that of one question from it,
    and `extend` goes on with the question; see `kvjax.cache.levels`. Otherwise the question is part
    of the prompt, is computed on exact keys and values, and its last rows say what is relevant.

    Covered: the chunk mask (empty blocks of it are not computed), the two levels with keys pooled
    before rotation, blocks, renumbered positions, the question on the mixed cache. Positions of a
    mixed prompt end where the prompt ended, not at its new length: only distances matter to rotary
    embedding. Not covered: the vision tower and its token synthesis; the outside retriever (give
    its list by `kvjax.cache.named`; what rows that ask attend to, and mean keys, stand in for it);
    a pooled level kept beside the dense one while chunks finish. Where the paper's list of relevant
    units is empty all is dense; here blocks worth -inf are pooled, and all is dense where nobody
    says what is relevant.

    Args:
      chunk: groups of a chunk, in the prompt's attention.
      previous: how many chunks before its own a row sees.
      stride: content tokens that become one, within their group; the rest of a group is left out.
      block: groups that are read densely or pooled together.
      relevant: how many blocks are dense, beside the first and the last.
      keep: for which part of the prompt there is room; fewer blocks are dense where it is short.
      positions: of a mixed prompt: renumbered, of the first token of a window, or of the middle.
      bias: whether pooled tokens get the log of their number on their logits.
      carry: whether carriers see everything and are seen by all; False: as content.
      length, carriers, prefix: groups of rows that bring no types; length=0: none.
      window: last rows of the prompt that ask; 0: none.
      by: "attention" or "mean", how they ask.
      storage: what holds the result; None: exactly.

    Raises:
      ValueError: numbers out of range; on `prefill`, chunks of a prompt given one by one.

    Source: Video-XL-2: Towards Very Long-Video Understanding Through Task-Aware KV Sparsification,
    arXiv 2506.19225.

    >>> [type(stage).__name__ for stage in video_xl_2().stages]
    ['Attending', 'Levels', 'Store']
    """
    _, keep = size("video_xl_2", keep, None, default=1.0)
    storage = chain(store() if storage is None else storage)
    own = groups(length, carriers, prefix)
    rule = in_chunks(own, chunk, previous, carry)
    mixed = levels(
        own, stride, block, relevant, keep, positions, bias, window, by,
        turn=not storage.unrotated,
    )  # fmt: skip
    return chain(attending(rule), mixed, storage)
