"""Lengths that neither overflow nor underflow, and maxima that a NaN cannot hide from.

XLA's CPU backend drops NaN from `max` and `min` reductions that it vectorises (openxla/xla issue 21461; with jaxlib 0.10, batches from
about 4000 numbers on): the largest entry of a vector with a NaN in it is then a number, and a residual that is NaN looks like zero.
"""

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from .lanes import where_needed
from .rows import row_sums


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


_SHORT = 2048  # up to here, three sums in one read take no longer than to look whether one is enough


@jax.custom_jvp
def norm(vector: Float[Array, " n"]) -> Float[Array, ""]:
    """Euclidean norm that neither overflows nor underflows; its derivative at 0 is 0."""
    limits, vector = jnp.finfo(vector.dtype), vector.ravel()
    least = 1e8 * float(limits.tiny) * max(vector.size, 1)
    enough = lambda square: (square > least) & (square < jnp.inf)
    if vector.size <= _SHORT:
        size = jnp.abs(vector)
        square, *others = row_sums(jnp.square(size), *_rescaled(size))
        return jnp.where(enough(square), jnp.sqrt(square), _unscaled(square, *others))
    square = jnp.sum(jnp.square(vector))
    again = lambda one: _unscaled(square, *row_sums(*_rescaled(jnp.abs(one * vector))))
    loop = lambda cond, body, init, max_steps: jax.lax.while_loop(cond, body, init)
    return where_needed(~enough(square), again, jnp.sqrt(square), loop)


def _scale(dtype) -> tuple[float, float]:
    exponents = float(jnp.finfo(dtype).maxexp)
    return 2.0 ** round(0.7 * exponents), 2.0 ** round(0.45 * exponents)


def _rescaled(size):
    """Squares of magnitudes scaled down, and scaled up (Blue 1978, *A portable Fortran program to find the Euclidean norm of a vector*)."""
    scale, bound = _scale(size.dtype)
    # The bounds change nothing that counts. They keep XLA from squaring the scale, which overflows, in place of the scaled entries.
    return jnp.square(jnp.maximum(size / scale, 1 / bound)), jnp.square(jnp.minimum(size * scale, bound))


def _unscaled(square, large, small):
    scale, _ = _scale(square.dtype)
    return jnp.where(square < 1, jnp.sqrt(small) / scale, jnp.sqrt(large) * scale)


@jax.custom_jvp
def _unit(vector):
    size = norm(vector)
    return vector / jnp.where(size > 0, size, 1)


@norm.defjvp
def _(primals, tangents):
    (vector,), (moved,) = primals, tangents
    return norm(vector), jnp.sum(_unit(vector) * moved)


@_unit.defjvp
def _(primals, tangents):
    # The derivative of a quotient has a square of the norm in it, which may overflow where this does not.
    (vector,), (moved,) = primals, tangents
    unit, size = _unit(vector), norm(vector)
    return unit, (moved - unit * jnp.sum(unit * moved)) / jnp.where(size > 0, size, 1)
