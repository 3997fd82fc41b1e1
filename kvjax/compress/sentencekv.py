"""SentenceKV: sentences are found by their mean keys, and read together."""

from kvjax.cache import (
    Chain,
    best_spans,
    chain,
    ends_every,
    ends_in,
    prune,
    store,
    window_attention,
)
from kvjax.compress.common import Storage, is_number, per_token, size

ENDINGS = (".", "!", "?", "…", "\n\n", "。", "\uff01", "\uff1f")  # the last two of full width
ENDS = "sentence_ends"


def sentencekv(
    tokens: int = 1024,
    factor: float = 3,
    keep: float | None = None,
    first: int = 32,
    recent: int = 32,
    window: int = 32,
    kernel: int = 7,
    dense_steps: int = 2,
    query: str = "sentence",
    chunk: int | None = None,
    shortest: int = 8,
    each_query: bool = False,
    storage: Storage = None,
    host: bool = False,
) -> Chain:
    """Of a prompt, what its last rows attend to; of that, each step reads the sentences that suit.

        prune(factor * tokens, window_attention(window, kernel, "max")) >
        store(storage, reader=best_spans(tokens, ends_in(".", "!", "?", ...), first, recent))
        s = q . mean(k_j, j in sentence);  q the sum of queries of the sentence being written

    Once a prompt is complete each KV head drops what the last rows do not attend to. What is left
    of a sentence is found by its mean key, after rotary embedding. Sentences are read best first,
    each from its beginning, until `tokens` are read. What is written forms sentences too, once they
    end. The prompt itself attends to everything.

    Which tokens end a sentence is a list of the vocabulary, `kvjax.decode.token_lists(tokenizer,
    method)`, for the cache's constants: tokens whose text, but for spaces, ends in . ! ? or an
    ellipsis, two line breaks, or their CJK forms.

    Choices where paper and released code differ: votes and likeness are summed over the query heads
    that share a KV head (the code repeats KV instead; `each_query` chooses as it does); the queries
    of the unfinished sentence count at every step, as in the code; slot number `first` can be read
    like any other (the code skips it); where complete sentences are fewer than the room left for
    them, the sentence being written fills it (in the code its older tokens go unread); ties go to
    the earlier token; a sentence has no most tokens.

    Args:
      tokens: read per KV head and step, the new token included.
      factor: times `tokens` are kept of a prompt. keep: in its place, the fraction of the prompt
        kept; 1.0: everything, and the prompt is stored as it comes.
      first, recent: of the tokens kept, the first and the newest are always read; the new token is
        one of the latter.
      window: last rows of the prompt that vote. kernel: neighbours over which the largest vote
        counts (odd; 1: none).
      dense_steps: so many steps of each written sentence read everything: that of the token that
        ends the one before, that of its first token (2, as released); 0: none.
      query: "sentence", or "token": ask with the newest query alone.
      chunk: equal chunks of so many tokens in place of sentences; None: sentences.
      shortest: there is room for one sentence per so many tokens; where a prompt has more,
        neighbours are one.
      each_query: each query head chooses sentences of its own; False: one choice per KV head.
      storage: codec of the tokens; None: exactly.
      host: they lie in host memory, where the platform has it; sums of sentences on the device.

    Raises:
      ValueError: arguments out of range; on init_cache, a prompt of which less is left than the
        window, or no list of tokens.

    Source: SentenceKV: Efficient LLM Inference via Sentence-Level Semantic KV Caching,
    arXiv 2504.00970.

    >>> method = sentencekv(tokens=256)
    >>> method.stages[0].n, method.stages[1].reader.pages  # 768 are kept, 255 and the new one read
    (768, 255)
    """
    for name, number, least in (
        ("tokens", tokens, 1),
        ("first", first, 0),
        ("recent", recent, 1),
        ("dense_steps", dense_steps, 0),
        ("shortest", shortest, 1),
        ("chunk", 1 if chunk is None else chunk, 1),
    ):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ValueError(
                f"sentencekv({name}={number!r}): expected an integer of at least {least}"
            )
    if query not in ("sentence", "token"):
        raise ValueError(f"sentencekv(query={query!r}): expected 'sentence' or 'token'")
    if tokens <= first + recent:
        raise ValueError(
            f"sentencekv(tokens={tokens}): first={first} and recent={recent} are among them, so "
            "expected more than these"
        )
    if not (is_number(factor) and factor >= 1):
        raise ValueError(f"sentencekv(factor={factor!r}): expected a number of at least 1")
    kept = int(factor * tokens)
    if keep is None and kept < window:
        raise ValueError(
            f"sentencekv(tokens={tokens}, factor={factor}) keeps {kept} tokens of a prompt, "
            f"expected at least window={window}"
        )
    kept, keep = size("sentencekv", keep, None, default=kept)
    reader = best_spans(
        tokens - 1,
        ends_every(chunk) if chunk else ends_in(*ENDINGS, name=ENDS),
        first=first,
        recent=recent - 1,
        shortest=shortest,
        mean=query == "sentence",
        whole_steps=dense_steps,
        each_query=each_query,
    )
    held = store(per_token("sentencekv", storage), reader=reader, host=host)
    if keep == 1:
        return chain(held)
    return chain(prune(kept, window_attention(window, kernel, "max"), keep=keep), held)
