"""Passes over one row of numbers, as fast as the row can be read."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_PIECES = 8  # of a row, see `row_reductions`; 16 is as fast
# Shorter rows go without column maxima: for them a pass costs no more than the detour.
SHORTEST_ROW_WITH_A_DETOUR = 256


_COMBINE = {"sum": jnp.add, "min": jnp.minimum, "max": jnp.maximum}
_REDUCE = {"sum": jnp.sum, "min": jnp.min, "max": jnp.max}
_NOTHING = {"sum": 0.0, "min": jnp.inf, "max": -jnp.inf}


Term = tuple[Literal["sum", "min", "max"], Float[Array, " m"]]


def row_reductions(*terms: Term) -> tuple[Float[Array, ""], ...]:
    """Several sums, least and greatest entries in one read of a row; infinite for an empty one.

    One reduction with several operands, over pieces of the row that are combined element by element: XLA's CPU backend
    vectorises this. Plain reductions of expressions that share a term it neither vectorises nor fuses: the term is written to
    memory and read back by each, three to ten times slower. The partial sums also round less than one long sum.
    """
    kinds, rows = zip(*terms, strict=True)
    n = rows[0].size
    whole = lambda kind, row: _REDUCE[kind](row, initial=_NOTHING[kind])
    if n < 2 * _PIECES:
        return tuple(map(whole, kinds, rows))
    width = n // _PIECES
    pieces = tuple(row[: _PIECES * width].reshape(_PIECES, width) for row in rows)
    nothing = tuple(jnp.asarray(_NOTHING[kind], row.dtype) for kind, row in terms)
    combine = lambda x, y: tuple(_COMBINE[kind](a, b) for kind, a, b in zip(kinds, x, y, strict=True))
    heads = jax.lax.reduce(pieces, nothing, combine, (0,))
    if n == _PIECES * width:
        return tuple(map(whole, kinds, heads))
    rest = (row[_PIECES * width :] for row in rows)
    return tuple(
        _COMBINE[kind](whole(kind, head), whole(kind, tail))
        for kind, head, tail in zip(kinds, heads, rest, strict=True)
    )


def row_sums(*terms: Float[Array, " m"]) -> tuple[Float[Array, ""], ...]:
    """Several sums in one read of a row; see `row_reductions`."""
    summed: tuple[Term, ...] = tuple(("sum", term) for term in terms)
    return row_reductions(*summed)


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
