r"""The linearised optimality conditions of a problem on a chain whose solution is constant on blocks, and their O(n) solve.

With D the differences of neighbours, and I and A the edges inside of blocks and between them,

$$ J = \begin{bmatrix} -W & -\sigma D^\top \\ \sigma D_I & -I_A \end{bmatrix} \quad\text{unknowns } (y, u) \tag{J} $$

W is the identity or a diagonal of positive weights, and $\sigma = \pm 1$. Edges between blocks are unknowns by themselves. Inside a block the
differences of y are given, its weighted mean follows from the sum of the first rows, in which the inner edges cancel, and u is what is left of
those rows, summed up along the chain. The transpose alike.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from .structured import AbstractStructured, AbstractStructuredSolver


def block_index(cut: Bool[Array, " edges"]) -> Int[Array, " n"]:
    """Number of the block of each entry."""
    first = jnp.zeros(1, jnp.int32)
    return jnp.concatenate([first, jnp.cumsum(cut.astype(jnp.int32))])


def block_mean(x: Float[Array, " n"], index: Int[Array, " n"]) -> Float[Array, " n"]:
    """The mean over each block, at each of its entries; linear, symmetric."""
    return block_ratio(x, jnp.ones_like(x), index)


def block_ratio(x: Float[Array, " n"], weight: Float[Array, " n"], index: Int[Array, " n"]) -> Float[Array, " n"]:
    """The sum of x over each block, by that of the weights, at each of its entries."""
    sums = lambda values: jax.ops.segment_sum(values, index, x.size, indices_are_sorted=True)
    totals = sums(weight)
    return (sums(x) / jnp.where(totals > 0, totals, 1))[index]


def with_edges(x: Float[Array, " n"], edge: Float[Array, " edges"]) -> Float[Array, " n"]:
    r"""$x - D^\top u$, that is $x_i + u_i - u_{i-1}$ with u = 0 beyond the ends."""
    zero = jnp.zeros(1, x.dtype)
    return x + jnp.concatenate([edge, zero]) - jnp.concatenate([zero, edge])


class Chain(AbstractStructured):
    """(J), or its transpose, on vectors of 2n - 1 entries: y, then u."""

    cut: Bool[Array, " edges"]
    like: Float[Array, " n"]  # its dtype
    transposed: bool = eqx.field(static=True, default=False)
    weight: Float[Array, " n"] | None = None  # the diagonal of W; None: ones
    sign: int = eqx.field(static=True, default=1)

    def mv(self, vector):
        y, u = self.split(vector)
        u = self.sign * u
        differences = lambda y: y[1:] - y[:-1]
        # -D'u
        spread = lambda u: with_edges(jnp.zeros_like(y), u)
        pull = y if self.weight is None else self.weight * y
        if self.transposed:
            rest = -differences(y) - jnp.where(self.cut, u, 0)
            return jnp.concatenate([-pull - spread(jnp.where(self.cut, 0, u)), self.sign * rest])
        return jnp.concatenate([-pull + spread(u), self.sign * jnp.where(self.cut, -u, differences(y))])

    def split(self, vector):
        n = self.like.size
        return vector[:n], vector[n:]

    def transpose(self):
        return Chain(self.cut, self.like, not self.transposed, self.weight, self.sign)

    @property
    def space(self):
        return jax.ShapeDtypeStruct((2 * self.like.size - 1,), self.like.dtype)


@lx.diagonal.register(Chain)
def _(operator):
    ones = jnp.ones_like(operator.like) if operator.weight is None else operator.weight
    return jnp.concatenate([-ones, jnp.where(operator.cut, -1, 0).astype(operator.like.dtype)])


class ChainSolver(AbstractStructuredSolver):
    """Solves `Chain` systems, which are never singular."""

    solves = Chain

    def compute(self, state, vector, options):
        del options
        flat, unravel = ravel_pytree(vector)
        a, b = state.split(flat)
        b = state.sign * b
        index = block_index(state.cut)
        weight = jnp.ones_like(a) if state.weight is None else state.weight
        inside = jnp.where(state.cut, 0, -b if state.transposed else b)
        shape = jnp.cumsum(jnp.concatenate([jnp.zeros(1, a.dtype), inside]))
        shape = shape - block_ratio(weight * shape, weight, index)
        if state.transposed:
            y = shape - block_ratio(a, weight, index)
            u = jnp.where(state.cut, -b - (y[1:] - y[:-1]), -jnp.cumsum(a + weight * y)[:-1])
        else:
            edge = jnp.where(state.cut, -b, 0)
            shifted = with_edges(-a, edge)
            y = shape + block_ratio(shifted, weight, index)
            u = jnp.where(state.cut, edge, jnp.cumsum(weight * y - shifted)[:-1])
        return unravel(jnp.concatenate([y, state.sign * u])), lx.RESULTS.successful, {}
