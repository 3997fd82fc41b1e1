"""Recurrent layers: what a kind of layer must say so that models, caches and loops run it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax import Array

from kvjax.cache.recurrent import Recurrence


@dataclasses.dataclass(frozen=True)
class RecurrentLayer(Recurrence):
    """A kind of recurrent layer: its sizes as fields, its mathematics as methods.

    Everything around it is the decoder's: the norm before it, the residual stream, the MLP (where
    the model has one), embeddings. `kvjax.models.mamba2` is one; `docs/recurrent.md` shows how to
    write another.
    """

    @property
    def float32(self) -> tuple[str, ...]:
        """Names of parameters that stay float32 whatever the dtype of the others."""
        return ()

    def parameters(self, width: int) -> dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]:
        """Name -> (shape of one layer, logical axis names), for a model of that width.

        Matrices are [out, in], for `kvjax.models.linear.linear`. Norm weights are called "...norm",
        biases "...bias"; the names of `kvjax.models.llama.BLOCK` are taken.
        """
        raise NotImplementedError(f"{type(self).__name__} has no parameters")

    def draw(self, name: str, shape: tuple[int, ...], key: Array) -> Array | None:
        """Random values for one parameter, all layers [L, ...], or None: as `init` does for all
        (normal, one for norms, zero for biases)."""
        return None

    def prepare(self, valid: Array) -> Any:
        """What all layers of a forward pass share, from which rows are no padding, bool [B, T]."""
        return None

    def mix(
        self, layer: Any, x: Array, state: Any, valid: Array, shared: Any, eps: float,
        split: bool = False,
    ) -> tuple[Array, Any]:  # fmt: skip
        """One layer: new rows, after all that the state remembers, in their order.

        Args:
          layer: parameters of one layer, read as `layer.name[...]`.
          x: [B, T, D], normalised; finite in padding.
          state: of one layer, arrays [B, ...]; to be read only.
          valid: bool [B, T]; other rows must not be felt by valid ones.
          shared: from `prepare`.
          eps: of norms.
          split: rows may lie on different devices: for `kvjax.models.linear.linear`.

        Returns:
          (output [B, T, D], rows): rows is a pytree of arrays [B, T, ...] from which `advance`
          brings the state forward, without weights.
        """
        raise NotImplementedError(f"{type(self).__name__} has no mix")


def one_layer(tree: Any, index: Array) -> Any:
    """One layer of stacked arrays [L, ...]; None stays None."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, 0, False), tree)
