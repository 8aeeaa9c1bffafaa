"""Isotonic regression, soft sorting and soft ranking as functions: one example (`jax.vmap` for batches), NaN where the node would fail."""

from typing import Any

from jaxtyping import Array, Float

from .isotonic import Isotonic
from .soft_rank import SoftRank
from .soft_sort import SoftSort


def isotonic_regression(
    x: Float[Array, " n"], weights: Float[Array, " n"] | None = None, *, increasing: bool = True
) -> Float[Array, " n"]:
    """The monotone sequence nearest to x: see `Isotonic`. NaN if an entry is not finite, or a weight not positive and finite."""
    return Isotonic(increasing=increasing, throw=False)(x, weights)


def soft_sort(x: Float[Array, " n"], strength: Any = 1.0, *, descending: bool = False) -> Float[Array, " n"]:
    """x in order, softly: see `SoftSort`. NaN if an entry is not finite, or an array `strength` not positive."""
    return SoftSort(strength, descending=descending, throw=False)(x)


def soft_rank(x: Float[Array, " n"], strength: Any = 1.0, *, descending: bool = False) -> Float[Array, " n"]:
    """The rank of each entry of x, softly, the smallest being 1: see `SoftRank`. NaN if an entry is not finite, or an array `strength` not
    positive."""
    return SoftRank(strength, descending=descending, throw=False)(x)
