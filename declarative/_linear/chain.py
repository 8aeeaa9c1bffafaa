r"""The linearised optimality conditions of a problem on a chain whose solution is constant on blocks, and their O(n) solve.

With D the differences of neighbours, and I and A the edges inside of blocks and between them,

$$ J = \begin{bmatrix} -I & -D^\top \\ D_I & -I_A \end{bmatrix} \quad\text{unknowns } (y, u) \tag{J} $$

Edges between blocks are unknowns by themselves. Inside a block the differences of y are given, its mean follows from the sum of the
first rows, in which the inner edges cancel, and u is what is left of those rows, summed up along the chain. The transpose alike.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from .bordered import declare_unstructured


def block_index(cut: Bool[Array, " edges"]) -> Int[Array, " n"]:
    """Number of the block of each entry."""
    first = jnp.zeros(1, jnp.int32)
    return jnp.concatenate([first, jnp.cumsum(cut.astype(jnp.int32))])


def block_mean(x: Float[Array, " n"], index: Int[Array, " n"]) -> Float[Array, " n"]:
    """The mean over each block, at each of its entries; linear, symmetric."""
    sums = lambda values: jax.ops.segment_sum(values, index, x.size, indices_are_sorted=True)
    counts = sums(jnp.ones_like(x))
    return (sums(x) / jnp.where(counts > 0, counts, 1))[index]


def with_edges(x: Float[Array, " n"], edge: Float[Array, " edges"]) -> Float[Array, " n"]:
    r"""$x - D^\top u$, that is $x_i + u_i - u_{i-1}$ with u = 0 beyond the ends."""
    zero = jnp.zeros(1, x.dtype)
    return x + jnp.concatenate([edge, zero]) - jnp.concatenate([zero, edge])


class Chain(lx.AbstractLinearOperator):
    """(J), or its transpose, on vectors of 2n - 1 entries: y, then u."""

    cut: Bool[Array, " edges"]
    like: Float[Array, " n"]  # its dtype
    transposed: bool = eqx.field(static=True, default=False)

    def mv(self, vector):
        y, u = self.split(vector)
        differences = lambda y: y[1:] - y[:-1]
        # -D'u
        spread = lambda u: with_edges(jnp.zeros_like(y), u)
        if self.transposed:
            return jnp.concatenate(
                [-y - spread(jnp.where(self.cut, 0, u)), -differences(y) - jnp.where(self.cut, u, 0)]
            )
        return jnp.concatenate([-y + spread(u), jnp.where(self.cut, -u, differences(y))])

    def split(self, vector):
        n = self.like.size
        return vector[:n], vector[n:]

    def as_matrix(self):
        return jax.vmap(self.mv, out_axes=1)(jnp.eye(2 * self.like.size - 1, dtype=self.like.dtype))

    def transpose(self):
        return Chain(self.cut, self.like, not self.transposed)

    def in_structure(self):
        return jax.ShapeDtypeStruct((2 * self.like.size - 1,), self.like.dtype)

    def out_structure(self):
        return self.in_structure()


declare_unstructured(Chain)


@lx.diagonal.register(Chain)
def _(operator):
    return jnp.concatenate([-jnp.ones_like(operator.like), jnp.where(operator.cut, -1, 0).astype(operator.like.dtype)])


class ChainSolver(lx.AbstractLinearSolver):
    """Solves `Chain` systems, which are never singular."""

    def init(self, operator, options):
        del options
        if not isinstance(operator, Chain):
            raise ValueError(f"`ChainSolver` solves `Chain` systems only, got {type(operator).__name__}.")
        return operator

    def compute(self, state, vector, options):
        del options
        flat, unravel = ravel_pytree(vector)
        a, b = state.split(flat)
        index = block_index(state.cut)
        inside = jnp.where(state.cut, 0, -b if state.transposed else b)
        shape = jnp.cumsum(jnp.concatenate([jnp.zeros(1, a.dtype), inside]))
        shape = shape - block_mean(shape, index)
        if state.transposed:
            y = shape - block_mean(a, index)
            u = jnp.where(state.cut, -b - (y[1:] - y[:-1]), -jnp.cumsum(a + y)[:-1])
        else:
            edge = jnp.where(state.cut, -b, 0)
            shifted = with_edges(-a, edge)
            y = shape + block_mean(shifted, index)
            u = jnp.where(state.cut, edge, jnp.cumsum(y - shifted)[:-1])
        return unravel(jnp.concatenate([y, u])), lx.RESULTS.successful, {}

    def transpose(self, state, options):
        return state.transpose(), options

    def conj(self, state, options):
        return state, options  # Real matrices only.

    def assume_full_rank(self):
        return True
