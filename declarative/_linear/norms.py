"""Maxima that a NaN cannot hide from.

XLA's CPU backend drops NaN from `max` and `min` reductions that it vectorises (openxla/xla issue 21461; with jaxlib 0.10, batches from
about 4000 numbers on): the largest entry of a vector with a NaN in it is then a number, and a residual that is NaN looks like zero.
"""

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree


def maximum(array: Float[Array, "..."], axis: int | None = None) -> Float[Array, "..."]:
    """The largest entry, at least zero; NaN if any entry is."""
    lost = jnp.any(jnp.isnan(array), axis=axis)
    return jnp.where(lost, jnp.nan, jnp.max(array, axis=axis, initial=0))


def largest(tree: PyTree) -> Float[Array, ""]:
    """The largest magnitude in a pytree of arrays (0 if it has none); NaN if any entry is."""
    maxima = [maximum(jnp.abs(leaf)) for leaf in jtu.tree_leaves(tree)]
    return maximum(jnp.stack(maxima)) if maxima else jnp.zeros(())


def finite_largest(vector: Float[Array, " n"]) -> Float[Array, ""]:
    """The largest magnitude in a vector (0 if it is empty); NaN if any entry is not finite. Half the time of `largest`."""
    top = jnp.maximum(jnp.max(vector, initial=0), -jnp.min(vector, initial=0))
    return jnp.where(jnp.isfinite(jnp.sum(0 * vector)), top, jnp.nan)
