"""MustDrop: visual tokens are judged while an image is encoded, a prompt read, and at its end."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from kvjax.cache import Chain, attending, chain, dropping, marked, overall
from kvjax.compress.common import Storage, held, is_number, pruned


def mustdrop(
    tau_g: float = 0.001,
    tau_x: float = 0.001,
    layers: tuple[int, ...] = (2, 6, 10, 14),
    visual: tuple[int, int] | None = None,
    keep: float | None = None,
    shares: tuple[float, ...] | None = None,
    seed: int | None = None,
    storage: Storage = None,
) -> Chain:
    """Visual tokens to which the text attends little end behind four layers of the prompt's pass.

        attending(dropping(layers, total=tau_g, single=tau_x)) > storage
        g_j = sum_i a_ij,  x_j = max_i a_ij over text rows i, mean over heads
        dropped if g_j < tau_g sum g and x_j < tau_x, unless in the key set

    Layers before the first of these hold every token, the others those that are left in the end
    (what the paper calls output-aware). Tokens generated later are all kept. Which tokens are
    visual, and which of them are in the key set, tokens bring as columns of 1 and 0:
    `prefill(..., columns={"visual": ..., "key": ...})`. `merge_windows` and `key_set` are the
    paper's part in the image encoder. Positions stay those of the whole prompt; the released code
    numbers again what is left. Thresholds suit one model and one length of text.

    Rows that end are masked: memory is saved, time of the prompt's pass is not.

    Args:
      tau_g, tau_x: thresholds on the share of all attention, and on that from a single text token.
      layers: behind which tokens end, ascending.
      visual: positions [first, end) of visual tokens where tokens bring no column.
      keep: room for so large a part of the prompt, mean over layers, in one pool of all layers and
        heads; the least attended are dropped if there are more. None: room for all, everywhere.
      shares: for comparison, which part of the visual tokens is left behind each of `layers`, the
        best by g_j, in place of thresholds. seed: drawn at random instead.
      storage: what holds what is left: any chain; None: exactly.

    Raises:
      ValueError: thresholds, layers, shares or sizes out of range; on `prefill`, chunks.

    Source: Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model,
    arXiv 2411.10803.

    >>> from kvjax.cache import store
    >>> mustdrop(0.01, 0.01) == chain(attending(dropping(total=0.01, single=0.01)), store())
    True
    """
    if keep is not None and not (is_number(keep) and 0 < keep <= 1):
        raise ValueError(f"mustdrop(keep={keep!r}): a part of the prompt lies in (0, 1]")
    if keep is not None and 0 in layers:
        raise ValueError(f"mustdrop(keep={keep}, layers={layers}): expected layers from 1 on")
    rule = dropping(layers, tau_g, tau_x, visual, shares, seed)
    if keep is None:
        return chain(attending(rule), held(storage))
    return chain(attending(rule), pruned(None, keep, marked(rule.mark), storage, overall()))


def merge_windows(
    x: Array, window: int = 3, threshold: float = 0.8, class_token: bool = True
) -> tuple[Array, Array]:
    """Windows of patches that look alike become one token each.

    A window's score is the mean cosine of its pairs of patches; where it is at least `threshold`
    the window becomes the mean of its patches.

    Args:
      x: [B, N, D], patches of a square grid row by row, a class token before them where
        `class_token` says so.
      window: patches along a side of a window; divides the side of the grid.

    Returns:
      (tokens [B, N, D]: class token, merged windows by descending score, other patches in their
      order, then zeros; their number int32 [B]). Each image decides for itself; the released code
      merges as many windows in all images of a batch as in the one that has fewest.

    Raises:
      ValueError: patches that are no square grid of whole windows.

    >>> tokens, count = merge_windows(jnp.ones((1, 36, 4)), class_token=False)
    >>> tokens.shape, count.tolist()
    ((1, 36, 4), [4])
    """
    front, patches = (x[:, :1], x[:, 1:]) if class_token else (x[:, :0], x)
    batch, number = patches.shape[:2]
    side = round(number**0.5)
    if side * side != number or window < 1 or side % window:
        raise ValueError(
            f"merge_windows(x.shape={x.shape}, window={window}): {number} patches are no square of "
            "whole windows"
        )
    grid = jnp.arange(number).reshape(side // window, window, side // window, window)
    members = jnp.moveaxis(grid, 2, 1).reshape(-1, window * window)  # [windows, patches of each]
    own = patches.astype(jnp.float32)[:, members]
    norm = jnp.linalg.norm(own, axis=-1, keepdims=True)
    unit = own / jnp.maximum(norm, 1e-8)
    pairs = jnp.einsum("bwid,bwjd->bwij", unit, unit)
    each = window * window
    score = jnp.sum(pairs, (-2, -1)) - jnp.trace(pairs, axis1=-2, axis2=-1)
    score = score / max(each * (each - 1), 1)
    merged = score >= threshold  # [B, windows]
    order = jnp.argsort(jnp.where(merged, -score, jnp.inf), axis=1, stable=True)
    means = jnp.take_along_axis(jnp.mean(own, 2), order[..., None], 1)
    windows = jnp.sum(merged, 1, dtype=jnp.int32)
    window_of = (
        jnp.zeros(number, jnp.int32)
        .at[members.reshape(-1)]
        .set(jnp.repeat(jnp.arange(len(members)), each))
    )
    stays = ~merged[:, window_of]  # [B, N]
    first = jnp.argsort(~stays, axis=1, stable=True)
    rest = jnp.take_along_axis(patches, first[..., None], 1)
    count = windows + jnp.sum(stays, 1, dtype=jnp.int32)
    at = jnp.arange(number)
    mean = jnp.take_along_axis(
        means, jnp.minimum(at, len(members) - 1)[None, :, None].repeat(batch, 0), 1
    )
    other = jnp.take_along_axis(rest, jnp.maximum(at - windows[:, None], 0)[..., None], 1)
    out = jnp.where((at < windows[:, None])[..., None], mean.astype(x.dtype), other)
    out = jnp.where((at < count[:, None])[..., None], out, jnp.zeros((), x.dtype))
    return jnp.concatenate([front, out], 1), count + front.shape[1]


def key_set(attention: Array, count: Array | None = None, part: float = 0.08) -> Array:
    """The patches that an image's class token attends to most: bool [B, N].

    Args:
      attention: [B, H, 1 + N], the class token's row of an encoder layer, itself first.
      count: int32 [B], tokens there are, the class token included; None: all.
      part: the best ceil(part * patches) are in the set.

    >>> key_set(jnp.array([[[0.5, 0.1, 0.3, 0.1]]]), part=0.3).tolist()
    [[False, True, False]]
    """
    if not 0 <= part <= 1:
        raise ValueError(f"key_set(part={part}): expected a share in [0, 1]")
    score = jnp.mean(attention.astype(jnp.float32), 1)[:, 1:]
    patches = jnp.full(len(score), score.shape[1]) if count is None else count - 1
    there = jnp.arange(score.shape[1]) < patches[:, None]
    number = jnp.ceil(part * patches - 1e-6)
    order = jnp.argsort(jnp.where(there, -score, jnp.inf), axis=1, stable=True)
    return there & (jnp.argsort(order, axis=1) < number[:, None])
