"""How packed keys and values lie: the static part of a call beside its `Shape`."""

from __future__ import annotations

import dataclasses

from jax import Array


@dataclasses.dataclass(frozen=True)
class Form:
    """Codes of keys go along tokens, those of values along channels.

    Attributes:
      k_bits, v_bits: of a code: 2, 4 or 8.
      k_group: tokens that share a key's scale. v_groups: groups of one value's channels.
    """

    k_bits: int
    v_bits: int
    k_group: int
    v_groups: int


def form_of(
    k: dict[str, Array], v: dict[str, Array], k_bits: int, v_bits: int, width: int
) -> tuple[Form, tuple[int, ...], int]:
    """(form, [L, B, H], slots that both sides have) of codes as `kvjax.codecs.quantize` makes them.

    Raises:
      ValueError: arrays that do not fit each other, or other bits than 2, 4 and 8.
    """
    for name, code, bits in (("k", k, k_bits), ("v", v, v_bits)):
        if bits not in (2, 4, 8):
            raise ValueError(f"{name}_bits={bits!r}: expected 2, 4 or 8")
        if set(code) != {"codes", "scale", "min"}:
            raise ValueError(f"{name} has {sorted(code)}: expected codes, scale and min")
        if code["scale"].shape != code["min"].shape:
            raise ValueError(
                f"{name}: scale has shape {code['scale'].shape}, min {code['min'].shape}"
            )
    kc, ks, vc, vs = k["codes"], k["scale"], v["codes"], v["scale"]
    lead, byte = kc.shape[:3], width * v_bits // 8
    fits = kc.ndim == 6 and vc.ndim == vs.ndim == 5 and kc.shape[5] == width
    fits = fits and ks.shape == (*kc.shape[:4], width) and vc.shape[:3] == lead
    fits = fits and vc.shape[4] == byte and vs.shape[:4] == vc.shape[:4]
    if not fits or width % vs.shape[4] or byte % vs.shape[4]:
        raise ValueError(
            f"codes of keys {kc.shape} with scales {ks.shape}, of values {vc.shape} with scales "
            f"{vs.shape}: expected [L, B, H, U, g b/8, {width}] with [L, B, H, U, {width}] and "
            f"[L, B, H, N, {width} b/8] with [L, B, H, N, {width}/g]"
        )
    group = kc.shape[4] * 8 // k_bits
    return Form(k_bits, v_bits, group, vs.shape[4]), lead, min(kc.shape[3] * group, vc.shape[3])
