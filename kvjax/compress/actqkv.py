"""ActQKV: unusual tokens of a window say which blocks it reads; layers share the blocks."""

from kvjax.cache import Chain, Window, best_blocks, chain, first, store
from kvjax.cache.readers.probe import WEIGHTS
from kvjax.compress.common import Storage, per_token


def actqkv(
    blocks: int = 46,
    block: int = 32,
    sinks: int = 64,
    local: int = 512,
    least: int | None = None,
    representatives: int = 4,
    probe: str = "activation",
    dynamic: bool = True,
    warmup: int = 100,
    constant: bool = True,
    storage: Storage = None,
    host: bool = False,
) -> Chain:
    """Everything is held; a window of rows reads the first tokens, the newest, and a few blocks.

        first(sinks, positions=local - 1) >
        store(keys=Window(local, block), values=Window(local, block), rope="before",
              reach=local - 1, reader=best_blocks(blocks, block, window=local, ...))
        p = sum_t w_t h_t,  w_t ~ mean_c (h_tc - mean_c)^2 / (var_c + mean(var) / 100)
        s_i = cos(r_i, p) over all heads of a layer together;  the K_l largest s_i are read

    A window is what comes in one forward pass: `prefill(..., chunk=256)` runs a prompt as the paper
    does, where every window reads blocks of what came before it and itself exactly. A prompt in one
    piece attends to all of it, and rows decoded read blocks. Each of up to 16 rows at once chooses
    for itself (p = its query): such rows are decoded or verified. h_t are queries as they look at
    keys local - 1 tokens back; keys further back are read as if they stood there. r_i is the mean
    of the `representatives` keys, before rotation, of a block that received most attention from the
    rows less than `local` tokens after them, of each query head. K_l shares blocks * layers out
    from the first layer to the last: equally in windows and while fewer than `warmup` windows or
    rows were sampled, then by how flat the scores of each layer were, `least` <= K_l <= 2 blocks.

    Where the released code seems not to do what is meant, what is meant: statistics and samples are
    of each layer and each sequence (not of all that a process has seen); rows are weighted from the
    first window on (not after 1,000 calls) and by all rows before, without forgetting; blocks that
    were chosen are all read; a single block is no sample. The paper's equations were not at hand:
    this follows descriptions and code. The term for a known question is left out (it asks for the
    question's place; weight 0).

    Args:
      blocks: read per layer and window, on average, of `block` tokens each.
      sinks: first tokens, always read.
      local: newest tokens, always read; up to block - 1 more wait until they fill a block.
      least: the fewest blocks that a layer reads; None: as 32 of 46.
      representatives: tokens of a block whose keys stand for it.
      probe: weights of a window's rows, "activation", or to compare with: "mean" (all alike),
        "largest" (the most unusual row alone), "random".
      dynamic: False: every layer reads `blocks`.
      warmup: samples of each layer before budgets differ, and so many are remembered.
      constant: False: keys far back are read where they stand.
      storage: codec of the tokens in blocks; None: exactly.
      host: blocks lie in host memory, where the platform has it.

    Raises:
      ValueError: arguments out of range.

    Source: Activation-aware Probe-Query: Effective Key-Value Retrieval for Long-Context LLMs
    Inference, arXiv 2502.13542.

    >>> reader = actqkv().stages[1].reader  # 46 blocks of 32, 64 and 512 tokens: 2,048 are read
    >>> reader.least, reader.blocks, reader.pages
    (32, 46, 92)
    """
    least = max(blocks * 32 // 46, 1) if least is None else least
    for name, number, low in (
        ("blocks", blocks, 1),
        ("block", block, 1),
        ("sinks", sinks, 0),
        ("local", local, 1),
        ("least", least, 1),
        ("representatives", representatives, 1),
        ("warmup", warmup, 1),
    ):
        if isinstance(number, bool) or not isinstance(number, int) or number < low:
            raise ValueError(f"actqkv({name}={number!r}): expected an integer of at least {low}")
    if least > blocks or representatives > block:
        raise ValueError(
            f"actqkv(least={least}, blocks={blocks}, representatives={representatives}, "
            f"block={block}): expected least <= blocks and representatives <= block"
        )
    if probe not in WEIGHTS:
        raise ValueError(f"actqkv(probe={probe!r}): expected one of {', '.join(WEIGHTS)}")
    window = Window(local, block)
    reader = best_blocks(
        blocks,
        block,
        window=local,
        least=least if dynamic else blocks,
        most=2 * blocks if dynamic else blocks,
        tokens=representatives,
        weights=probe,
        warmup=warmup,
    )
    reach = local - 1 if constant else None
    held = store(
        per_token("actqkv", storage),
        keys=window, values=window, rope="before", reader=reader, reach=reach, host=host,
    )  # fmt: skip
    return chain(*([first(sinks, "true" if reach is None else reach)] if sinks else []), held)
