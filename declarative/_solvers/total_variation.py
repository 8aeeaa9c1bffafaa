r"""One-dimensional total variation, exactly and in parallel: where the solution is constant, and its value there.

**Problem.**     $y^*(x, \lambda) = \arg\min_y \tfrac12\|y - x\|^2 + \sum_i \lambda_i |y_{i+1} - y_i|$, $\lambda \ge 0$                       (P)
**Structure.**   y is constant on blocks. With $r_i \in \{-1, 0, 1\}$ the sign of $y_{i+1} - y_i$ and $u_i = r_i\lambda_i$ on the edges
                 between blocks, the value on a block B from a to b is $y_B = \big(\sum_{i\in B} x_i + u_b - u_{a-1}\big) / |B|$   (B)
**Solver.**      Divide and conquer over levels: $\{i : y_i > z\}$ is the least minimiser $\theta \in \{0, 1\}^n$ of

                 $$ \sum_i \theta_i (z - x_i) + \sum_i \lambda_i |\theta_{i+1} - \theta_i|                                      \tag{L} $$

                 Every block is cut at the z that is its own value (B) were it constant. If (L) leaves it whole, it is constant; if
                 not, the order across the cut is known, its edges enter (B), and both parts go on by themselves. All blocks are cut
                 in one pass over the signal: (L) on a chain is a recursion of clips, $\delta_i = \mathrm{clip}(\delta_{i-1},
                 -\lambda_{i-1}, \lambda_{i-1}) + z - x_i$, which compose associatively, and read backwards $\theta_i$ is 1 below
                 $-\lambda_i$, 0 from $\lambda_i$ on, and $\theta_{i+1}$ in between. About log n passes; n for a signal made for it.
**Gradient.**    (B) is linear in x and $\lambda$ where the blocks do not change: the mean of $\mathrm dx$ over the block, plus
                 $r\,\mathrm d\lambda$ at its ends over its length. Not differentiable where a block is about to split ($|u_i| = \lambda_i$
                 inside of it): it counts as whole there.

The taut string (Davies & Kovac 2001) and dynamic programming (Johnson 2013) need O(n) operations, one after the other; here they are
O(n log n) for a pass, side by side, also across a batch, which is what an accelerator can do. That the level sets of (P) are
independent binary problems: Chambolle & Darbon 2009, *On total variation minimization and surface evolution using parametric maximum
flows*, section 2; Hochbaum 2001, JACM 48(4).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._linear.chain import block_index, block_mean, with_edges


class Blocks(NamedTuple):
    """Where the solution is constant. No gradient."""

    number: Int[Array, " n"]  # of the block that an entry belongs to, in order
    cut: Bool[Array, " edges"]  # the edges between blocks
    rise: Float[Array, " edges"]  # sign of the jump at an edge, 0 inside of a block
    passes: Int[Array, ""]


class Denoised(NamedTuple):
    """`signal` y and `dual` u are differentiable; `blocks` are not."""

    signal: Float[Array, " n"]
    dual: Float[Array, " edges"]
    blocks: Blocks


def total_variation(x: Float[Array, " n"], weights: Float[Array, " edges"]) -> Denoised:
    """(P). NaN throughout where an entry is not finite or a weight is negative or NaN; an infinite weight ties its neighbours."""
    good = jnp.all(jnp.isfinite(x)) & jnp.all(weights >= 0)
    detached, bounds = jax.lax.stop_gradient((x, weights))
    blocks = _blocks(jnp.where(good, detached, 0), jnp.where(good, bounds, 0))
    edge = _edge(blocks.rise, weights)
    # The derivative of a mean is a mean; a second one, of what is left, makes the value right to the last digit.
    shifted = with_edges(x, edge)
    first = jax.lax.stop_gradient(block_mean(shifted, blocks.number))
    y = first + block_mean(shifted - first, blocks.number)
    y = y + jnp.where(good, 0, jnp.nan)
    u = jnp.where(blocks.cut, edge, jnp.cumsum(y - shifted)[:-1])
    return Denoised(y, u, blocks)


def _edge(rise, weights):
    # Infinite weights are never cut, and 0 * inf is NaN.
    return jnp.where(rise == 0, 0, rise * jnp.where(rise == 0, 0, weights))


class _State(NamedTuple):
    cut: Bool[Array, " edges"]
    rise: Float[Array, " edges"]
    passes: Int[Array, ""]
    going: Bool[Array, ""]


def _blocks(x: Float[Array, " n"], weights: Float[Array, " edges"]) -> Blocks:
    # Only differences matter. Around 0 they have all their digits.
    x = x - (jnp.max(x) / 2 + jnp.min(x) / 2)
    # An edge without a weight ties nothing: its ends are two blocks, also where they happen to be equal.
    free = weights == 0
    start = _State(free, jnp.zeros_like(weights), jnp.zeros((), jnp.int32), jnp.ones((), bool))

    def level(state: _State) -> _State:
        above = _above(x, weights, state)
        change = above[1:] - above[:-1]
        new = ~state.cut & (change != 0)
        return _State(state.cut | new, jnp.where(new, change, state.rise), state.passes + 1, jnp.any(new))

    end = jax.lax.while_loop(lambda state: state.going, level, start)
    index = block_index(end.cut)
    # For the derivative in a weight that is zero.
    y = block_mean(with_edges(x, _edge(end.rise, weights)), index)
    rise = jnp.where(free, jnp.sign(y[1:] - y[:-1]), end.rise)
    return Blocks(index, end.cut, rise, end.passes)


def _above(x, weights, state: _State) -> Float[Array, " n"]:
    """theta of (L), 0 or 1, every block at its own level."""
    n = x.size
    index = block_index(state.cut)
    shifted = with_edges(x, _edge(state.rise, weights))
    level = block_mean(shifted, index)
    level = level + block_mean(shifted - level, index)
    gap = level - shifted
    bound = jnp.concatenate([jnp.where(state.cut, 0, weights), jnp.zeros(1, x.dtype)])
    before = jnp.roll(bound, 1)  # 0 at the first entry of a block: it forgets what came before
    delta = _running((gap - before, gap + before, gap))
    # A block that rounding alone would split is whole.
    size = jax.ops.segment_max(jnp.abs(gap), index, n, indices_are_sorted=True)[index]
    slack = 16 * float(jnp.finfo(x.dtype).eps) * size
    one, zero = delta < -bound - slack, delta >= jnp.where(bound == 0, -slack, bound)
    places = jnp.arange(n, dtype=jnp.int32)
    decided = jax.lax.cummin(jnp.where(one | zero, places, n - 1), reverse=True)
    return one[decided].astype(x.dtype)


def _running(maps):
    """The compositions of the first i maps, for every i, each a constant: its value. By doubling, in a loop that compiles fast."""
    n = maps[0].size
    places = jnp.arange(n, dtype=jnp.int32)

    def double(k, maps):
        reach = jnp.left_shift(jnp.int32(1), k)
        earlier = jnp.maximum(places - reach, 0)
        joined = _compose(tuple(part[earlier] for part in maps), maps)
        return tuple(jnp.where(places >= reach, new, old) for new, old in zip(joined, maps, strict=True))

    return jax.lax.fori_loop(0, max(n - 1, 0).bit_length(), double, maps)[0]


def _compose(first, second):
    """t -> clip(t + shift, low, high), first one and then the other; equal low and high are a constant."""
    low1, high1, shift1 = first
    low2, high2, shift2 = second
    low, high = jnp.clip(low1 + shift2, low2, high2), jnp.clip(high1 + shift2, low2, high2)
    # A constant first map leaves nothing to shift; its sum would only grow.
    return low, high, jnp.where(low == high, 0, shift1 + shift2)
