"""What a decoder is, as data: one frozen value for the Llama family and for recurrent layers."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from kvjax.models.recurrent import RecurrentLayer


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary frequencies as a rule over the pair index (see `frequencies`).

    Attributes:
      base: theta, the base of the geometric series of frequencies.
      kind: "default", "linear", "dynamic", "llama3", "yarn" or "longrope".
      factor: context extension factor (linear, dynamic, llama3, yarn).
      original_length: context length of pre-training, in tokens; None: the model's `max_length`.
      low_freq, high_freq: llama3's band edges, in turns over the original length.
      beta_fast, beta_slow: yarn's band edges, in turns over the original length.
      attention_factor: multiplies cos and sin; None: the rule's own value.
      mscale, mscale_all_dim: yarn's optional temperature pair (DeepSeek style).
      short_factor, long_factor: longrope's divisors, one per pair.
    """

    base: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_length: int | None = None
    low_freq: float = 1.0
    high_freq: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def frequencies(self, width: int, max_length: int, length: int) -> tuple[np.ndarray, float]:
        """Angular frequencies and the factor on cos and sin.

        Args:
          width: rotated channels per head (even).
          max_length: the model's `max_position_embeddings`.
          length: the longest sequence to be served, in tokens. Only "dynamic" and "longrope"
            depend on it: it is fixed for the life of a cache, so that stored keys stay valid.

        Returns:
          (frequencies [width / 2] float64 in radians per token, factor).
        """
        half = width // 2
        pair = np.arange(half)
        freq = self.base ** (-2.0 * pair / width)
        original = self.original_length or max_length
        if self.kind == "default":
            return freq, 1.0
        if self.kind == "linear":
            return freq / self.factor, 1.0
        if self.kind == "dynamic":
            longest = max(length, max_length)
            stretch = self.factor * longest / max_length - self.factor + 1
            base = self.base * stretch ** (width / (width - 2))
            return base ** (-2.0 * pair / width), 1.0
        if self.kind == "llama3":
            wave = 2 * np.pi / freq
            keep = (original / wave - self.low_freq) / (self.high_freq - self.low_freq)
            keep = np.clip(keep, 0.0, 1.0)
            return (1 - keep) * freq / self.factor + keep * freq, 1.0
        if self.kind == "yarn":

            def pair_of(turns: float) -> float:
                return (
                    width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(self.base))
                )

            low = max(math.floor(pair_of(self.beta_fast)), 0)
            high = min(math.ceil(pair_of(self.beta_slow)), width - 1)
            ramp = np.clip((pair - low) / max(high - low, 1e-3), 0.0, 1.0)
            return freq * (1 - ramp) + freq / self.factor * ramp, self._yarn_factor()
        if self.kind == "longrope":
            divisor = np.asarray(self.long_factor if length > original else self.short_factor)
            if divisor.shape != (half,):
                raise ValueError(
                    f"longrope needs {half} factors per table (rotated width {width}), "
                    f"got {divisor.size}"
                )
            factor = self.attention_factor
            if factor is None:
                ratio = max_length / original
                factor = 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(original))
            return freq / divisor, factor
        raise ValueError(f"rope kind {self.kind!r} is not one of {', '.join(ROPE_KINDS)}")

    def _yarn_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor

        def temperature(m: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * m * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:
            return temperature(self.mscale) / temperature(self.mscale_all_dim)
        return temperature(1.0)


ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True)
class Config:
    """A decoder: attention layers as in Llama, recurrent layers, or both. Every difference between
    models is a field.

    Attributes:
      family: Hugging Face `model_type` ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2",
        "gemma3_text", "phi3", "llada", "mamba2", "bamba"); names only how weights are stored, never
        read by the forward pass.
      width, mlp_width, layers, heads, kv_heads, head_dim: sizes D, F, L, Hq, H, d. Without
        attention layers the last three are 0; mlp_width is 0 where layers have no MLP.
      norm_eps, norm_offset: RMSNorm epsilon; whether weights are stored as (w - 1) (Gemma).
      activation: "silu" or "gelu_tanh".
      qkv_bias, out_bias, mlp_bias: which linear maps have biases.
      qk_norm: RMSNorm over the channels of each query and key head, before rotation.
      post_norms: norms after attention and MLP too (Gemma 2 and 3).
      embed_scale: factor on token embeddings, rounded to the weight dtype.
      query_scale: factor on q.k; None: head_dim ** -0.5.
      attention_softcap, final_softcap: c in c * tanh(x / c), or None.
      windows: per layer, how many keys a query sees, itself included; None: all. Empty: all None.
      rope, local_rope: rotary rule; `local_rope`, where given, is that of windowed layers.
      unrotated: layers without rotary embedding.
      rotary_width: rotated channels per head; None: all.
      tied: whether the output head is the embedding.
      max_length: `max_position_embeddings`.
      bos, eos: token ids; `eos` may hold several.
      mask_token: token id that stands for an unknown token in masked-diffusion models, or None.
      bidirectional: every token sees all others, as masked-diffusion models do.
      recurrence: the kind of recurrent layer, such as `kvjax.models.mamba2.Mamba2(...)`, or None.
      recurrent_layers: which layers are recurrent in place of attention, ascending.
      residual_float32: the residual stream is float32 whatever the dtype of the parameters.
    """

    vocab_size: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    family: str = "llama"
    norm_eps: float = 1e-5
    norm_offset: bool = False
    activation: str = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    embed_scale: float | None = None
    query_scale: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    windows: tuple[int | None, ...] = ()
    rope: RopeConfig = RopeConfig()
    local_rope: RopeConfig | None = None
    unrotated: tuple[int, ...] = ()
    rotary_width: int | None = None
    tied: bool = True
    max_length: int = 2048
    bos: int | None = None
    eos: tuple[int, ...] = ()
    mask_token: int | None = None
    bidirectional: bool = False
    recurrence: RecurrentLayer | None = None
    recurrent_layers: tuple[int, ...] = ()
    residual_float32: bool = False

    def __post_init__(self) -> None:
        own = self.recurrent_layers
        if own != tuple(sorted(set(own))) or not set(own) <= set(range(self.layers)):
            raise ValueError(
                f"recurrent_layers={own}: expected ascending numbers below layers={self.layers}"
            )
        if bool(own) != (self.recurrence is not None):
            raise ValueError(
                f"recurrence={self.recurrence} and recurrent_layers={own}: expected both or neither"
            )
        if self.attention_layers and min(self.heads, self.kv_heads, self.head_dim) < 1:
            raise ValueError(
                f"heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}: at least "
                f"1 each, for {len(self.attention_layers)} attention layers"
            )
        if self.attention_layers and self.heads % self.kv_heads:
            raise ValueError(
                f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}: "
                "each key-value head serves the same number of query heads"
            )
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(
                f"windows has {len(self.windows)} entries, expected one per layer ({self.layers})"
            )
        if bad := [i for i in self.unrotated if not 0 <= i < self.layers]:
            raise ValueError(f"unrotated={bad}: expected layers from 0 to {self.layers - 1}")
        if self.activation not in ("silu", "gelu_tanh"):
            raise ValueError(f"activation={self.activation!r}: expected 'silu' or 'gelu_tanh'")
        if self.rotated % 2 or self.rotated > self.head_dim:
            raise ValueError(
                f"rotary_width={self.rotated} must be even and at most head_dim={self.head_dim}"
            )

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Which layers attend, ascending."""
        return tuple(i for i in range(self.layers) if i not in self.recurrent_layers)

    @property
    def groups(self) -> int:
        """Query heads per key-value head."""
        return self.heads // self.kv_heads

    @property
    def rotated(self) -> int:
        """Rotated channels per head."""
        return self.head_dim if self.rotary_width is None else self.rotary_width

    @property
    def scale(self) -> float:
        """Factor on q.k."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None
