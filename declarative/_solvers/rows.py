"""Passes over one row of numbers, as fast as the row can be read."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_PIECES = 8  # of a row, see `row_sums`; 16 is as fast
# Shorter rows go without column maxima: for them a pass costs no more than the detour.
SHORTEST_ROW_WITH_A_DETOUR = 256


def row_sums(*terms: Float[Array, " m"]) -> tuple[Float[Array, ""], ...]:
    """Several sums over a row in one read of it.

    One reduction with several operands, over pieces of the row that are added element by element: XLA's CPU backend
    vectorises this. Plain sums of expressions that share a term it neither vectorises nor fuses: the term is written to
    memory and read back by each sum, three to ten times slower. The partial sums also round less than one long sum.
    """
    n = terms[0].size
    if n < 2 * _PIECES:
        return tuple(jnp.sum(term) for term in terms)
    width = n // _PIECES
    pieces = tuple(term[: _PIECES * width].reshape(_PIECES, width) for term in terms)
    zeros = tuple(jnp.zeros((), term.dtype) for term in terms)
    partial = jax.lax.reduce(pieces, zeros, lambda x, y: tuple(map(jnp.add, x, y)), (0,))
    return tuple(jnp.sum(head) + jnp.sum(term[_PIECES * width :]) for head, term in zip(partial, terms, strict=True))


def column_maxima(scores: Float[Array, " n"]) -> Float[Array, " m"]:
    """The row itself if it is short; else the row cut into pieces, their elementwise maximum, and what was left over."""
    n = scores.size
    if n < SHORTEST_ROW_WITH_A_DETOUR:
        return scores
    pieces = 8 if n < 8192 else 16
    width = n // pieces
    columns = jnp.max(scores[: pieces * width].reshape(pieces, width), axis=0)
    return jnp.concatenate([columns, scores[pieces * width :]])


def two_sum(a: Float[Array, ""], b: Float[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """a + b rounded, and the rounding error (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)
