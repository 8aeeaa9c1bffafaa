r"""Isotonic regression and the projection onto a permutahedron, by divide and conquer: elementwise arithmetic and reductions only.

**Problem.**     $y^*(x, w) = \arg\min_y \tfrac12 \sum_i w_i (y_i - x_i)^2$ subject to $y_1 \le \dots \le y_n$, $w > 0$                  (P)
**Structure.**   y is constant on blocks of neighbours, on each the weighted mean of its x. The multiplier of $y_i \le y_{i+1}$ is
                 $\lambda_i = \sum_{j \le i} w_j (x_j - y_j) \ge 0$, summed over the part of the block up to i.                         (B)
**Solver.**      Two neighbouring pieces that are solved, l and r, are merged by one number v, the value of the block that forms across the
                 middle if l ends above the start of r:

                 $$ g(v) = \sum_{l_i > v} w_i (l_i - v) - \sum_{r_i < v} w_i (v - r_i) = 0, \qquad y = (\min(l, v), \max(r, v)) \tag{M} $$

                 All pairs of a level are merged at once, in $\lceil\log_2 n\rceil$ levels. The means are taken of differences to the last
                 iterate: there is no running sum over the row, hence no cancellation.
**Gradient.**    Of the mean in (B), the blocks held fixed: a block sum is linear and symmetric. Any order, both modes.

Why (M): a pair has the solution of (P) with each half replaced by its own solution, whose blocks are never split; and min(l, v), max(r, v)
is in order and, with g(v) = 0, has the block means and nonnegative multipliers that (B) asks for.

g is decreasing and piecewise linear. Newton's step is the mean of what lies beyond v, and exact if that does not change on the way: (M) is solved
once a step has found the members of the block as it left them. (A short step is no sign of that: a heavy entry just above v makes it short.)
g is neither convex nor concave, so a step that leaves the bracket, and every eighth one, is a bisection instead. **It ends:** the bracket is
halved at least once in eight steps, from at most twice its larger end in magnitude, and it is done at two units in the last place of
that: `_cap` steps suffice. (Data that are not finite never get here.)

The textbook algorithm (pool adjacent violators, entry by entry) takes two steps an entry, each a few numbers: slow as a loop in XLA, and under
`vmap` its reads and writes become gathers and scatters.

**Reference:** Barlow, Bartholomew, Bremner & Brunk 1972, *Statistical Inference under Order Restrictions* (pooling). Blondel, Teboul, Berthet &
Djolonga 2020, arXiv:2002.08871, Prop. 3 (the projection onto a permutahedron is an isotonic regression). The merge (M), its layout and its
safeguards are ours.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._linear.scaling import power_of_two

# Entries down a column, see `_to_table`. Of 8, 16, 32 and 64 the fastest (64 rows of 1000 and of 4000, one CPU core).
_ROWS = 16


class Ordered(NamedTuple):
    """`point` y and `dual` are differentiable; `good` says whether the data are in the domain, else all is NaN."""

    point: Float[Array, " n"]
    dual: Float[Array, " edges"]
    good: Bool[Array, ""]


def isotonic(x: Float[Array, " n"], weights: Float[Array, " n"] | None = None) -> Ordered:
    """(P) and its multipliers, in the units of x: the weights count as `relative` has them. The domain: finite x, and 0 < w < inf."""
    good = jnp.all(jnp.isfinite(x))
    w = None
    if weights is not None:
        good = good & jnp.all((weights > 0) & jnp.isfinite(weights))
        w = relative(weights)
    y = _pooled(x, w, good)
    return Ordered(y, _inside_blocks(y, prefix_sums(y, x - y if w is None else w * (x - y))), good)


@jax.custom_jvp
def _pooled(x, w, good):
    """NaN where the data are not `good`; they are replaced for the pooling, which has to end, but not in the derivative, which is NaN then."""
    x = jnp.where(good, x, 0)
    scale = power_of_two(jnp.max(jnp.abs(x)))
    return pool(x * scale, None if w is None else jnp.where(good, w, 1)) / scale + jnp.where(good, 0, jnp.nan)


@_pooled.defjvp
def _(primals, tangents):
    """Of the mean in (B): the mean of what moves x, and of what moves the weights times what is above y."""
    (x, w, good), (t_x, t_w, _) = primals, tangents
    y = _pooled(x, w, good)  # Itself: so that this rule can be differentiated again.
    moved = t_x if w is None else w * t_x + t_w * (x - y)
    return y, block_sums(y, moved) / block_sums(y, jnp.ones_like(x) if w is None else w)


def _inside_blocks(y, sums):
    """The sums up to each edge inside of a block; zero at the edges between blocks, where only rounding is left of them."""
    return jnp.where(y[1:] == y[:-1], sums[:-1], 0 * sums[:-1])


def relative(weights: Float[Array, " n"]) -> Float[Array, " n"]:
    """The weights in units of about the largest: what (P) minimises has no scale."""
    return weights * inverse_unit(weights)


def inverse_unit(weights: Float[Array, " n"]) -> Float[Array, ""]:
    return power_of_two(jnp.max(jax.lax.stop_gradient(weights)))


def permutahedron(t: Float[Array, " n"], strength: Float[Array, ""], w: Float[Array, " n"]) -> Ordered:
    r"""The projection of $t/\epsilon$ onto the convex hull of the permutations of w, both in ascending order.

    It is $y = s - v$, $s = t/\epsilon$, where v is (P) for $s - w$ (Blondel et al. 2020, Prop. 3), and the multiplier of $v_i \le v_{i+1}$ is
    what the majorisation $\sum_{j \le i} y_j \ge \sum_{j \le i} w_j$ has to spare. On a block, $y = (s - \bar s) + \bar w$: that difference
    and that mean have all their digits, where s - v would have lost them to the size of s. The domain: finite, and $0 < \epsilon < \infty$.
    """
    good = jnp.all(jnp.isfinite(t)) & jnp.all(jnp.isfinite(w)) & (strength > 0) & jnp.isfinite(strength)
    a, b, c = jax.lax.stop_gradient((t, w, strength))
    # Only differences matter: among the entries near the middle one they have all their digits, whatever a common offset is.
    middle = t.size // 2
    steps = (a - a[middle]) - c * (b - b[middle])
    good = good & jnp.all(jnp.isfinite(steps))
    steps = jnp.where(good, steps, 0)
    fit = pool(steps * power_of_two(jnp.max(jnp.abs(steps))))
    # The mean of t over the block, and what rounding left out of it: equal entries have an exact one.
    size = block_sums(fit, jnp.ones_like(a))
    mean = block_sums(fit, a) / size
    mean = mean + block_sums(fit, a - mean) / size
    centred = (t - mean) / strength
    y = centred + block_sums(fit, w - centred) / size
    spare = prefix_sums(fit, y - w)
    return Ordered(y + jnp.where(good, 0, jnp.nan), _inside_blocks(fit, spare), good)


# Blocks


def block_sums(fit: Float[Array, " n"], t: Float[Array, " n"]) -> Float[Array, " n"]:
    """For each entry, the sum of `t` over its block: the entries with the same `fit`. A symmetric matrix applied to `t`."""
    fixed = jax.lax.stop_gradient(fit)
    # Its own transpose: this is how JAX can be told. (The "matvec" is only there to be differentiated, and depends on nothing.)
    return jax.lax.custom_linear_solve(lambda v: v, t, solve=lambda _, v: _tree_sums(fixed, v)[0], symmetric=True)


def prefix_sums(fit: Float[Array, " n"], t: Float[Array, " n"]) -> Float[Array, " n"]:
    """For each entry, the sum of `t` over its block up to it, itself included."""
    return _tree_sums(jax.lax.stop_gradient(fit), t)[1]


def _tree_sums(fit: Float[Array, " n"], t: Float[Array, " n"]) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    # Each entry holds the sum over that part of its block which is in its piece; where a block crosses the middle of a pair, the
    # two entries there hold both parts. Pairwise summation: the rounding error grows with the logarithm of the length.
    label, total = _to_table(fit, jnp.inf), _to_table(t, 0.0)
    prefix = total
    rows, columns = label.shape
    half = 1
    while half < rows:
        shape = (rows // (2 * half), 2 * half, columns)
        y, s, p = label.reshape(shape), total.reshape(shape), prefix.reshape(shape)
        low, high = y[:, half - 1 : half], y[:, half : half + 1]
        before, after = s[:, half - 1 : half], s[:, half : half + 1]
        crossing = (low == high) & (y == low)
        right = (jnp.arange(2 * half) >= half)[:, None]
        prefix = jnp.where(crossing & right[None], p + before, p).reshape(rows, columns)
        total = jnp.where(crossing, before + after, s).reshape(rows, columns)
        half *= 2
    half = 1
    while half < columns:
        pairs, width = columns // (2 * half), 2 * half
        spread = lambda t, k, p=pairs, m=width: jnp.broadcast_to(t.reshape(p, m)[:, k : k + 1], (p, m)).reshape(1, -1)
        low, high = spread(label[-1], half - 1), spread(label[0], half)
        before, after = spread(total[-1], half - 1), spread(total[0], half)
        crossing = (low == high) & (label == low)
        right = (jnp.arange(columns) % width >= half)[None]
        prefix = jnp.where(crossing & right, prefix + before, prefix)
        total = jnp.where(crossing, before + after, total)
        half *= 2
    return _to_row(total, fit.size), _to_row(prefix, fit.size)


# Pooling


def pool(x: Float[Array, " n"], weights: Float[Array, " n"] | None = None) -> Float[Array, " n"]:
    """(P) by (M), for finite x and positive weights, both of a moderate size. Not to be differentiated."""
    # Padding is above everything at the end of the row, and has no weight: no merge touches it.
    y = _to_table(x, jnp.inf)
    w = None if weights is None else _to_table(weights, 0.0)
    rows, columns = y.shape
    half = 1
    while half < rows:  # pairs of pieces within a column
        shape = (rows // (2 * half), 2 * half, columns)
        y = y.reshape(shape)
        left = (jnp.arange(2 * half) < half)[:, None]
        y = _merge(y, None if w is None else w.reshape(shape), left, y[:, half - 1], y[:, half], lambda total: total)
        y = y.reshape(rows, columns)
        half *= 2
    half = 1
    while half < columns:  # pairs of groups of columns; what belongs to a pair is repeated for each of its columns
        pairs, width = columns // (2 * half), 2 * half
        spread = lambda t, p=pairs, m=width: jnp.broadcast_to(t[:, None], (p, m)).reshape(1, -1)
        low = spread(y[-1].reshape(pairs, width)[:, half - 1])
        high = spread(y[0].reshape(pairs, width)[:, half])
        left = jnp.arange(columns) % width < half
        over = lambda t, s=spread, p=pairs, m=width: s(jnp.sum(t.reshape(p, m), axis=1))
        y = _merge(y[None], None if w is None else w[None], left[None, None], low, high, over)[0]
        half *= 2
    return _to_row(y, x.size)


def _to_table(row: Float[Array, " n"], fill: float) -> Float[Array, "rows columns"]:
    """The row down the columns of a table of powers of two: sums down the columns take many columns in one instruction."""
    levels = (row.size - 1).bit_length()
    rows = min(_ROWS, 1 << levels)
    columns = (1 << levels) // rows
    padded = jnp.concatenate([row, jnp.full((rows * columns - row.size,), fill, row.dtype)])
    return padded.reshape(columns, rows).T


def _to_row(table: Float[Array, "rows columns"], n: int) -> Float[Array, " n"]:
    return table.T.reshape(-1)[:n]


def _cap(dtype) -> int:
    """Steps after which (M) is solved whatever the data: see "It ends" above."""
    return 8 * (jnp.finfo(dtype).nmant + 4)


def _merge(
    y: Float[Array, "groups size columns"],
    w: Float[Array, "groups size columns"] | None,
    left: Bool[Array, "..."],
    low: Float[Array, "groups columns"],
    high: Float[Array, "groups columns"],
    over: Callable[[Array], Array],
) -> Float[Array, "groups size columns"]:
    """(M) for all pairs of a level. `low` and `high` are the last entry of the left half and the first of the right one; `over`
    completes a sum down the columns to one over the pair."""
    violated = low > high
    eps = float(jnp.finfo(y.dtype).eps)
    # The entries that can be pooled lie between the two: their rounding errors are that of v.
    resolution = 2 * eps * jnp.maximum(jnp.abs(low), jnp.abs(high))

    def inside(v):
        return violated[:, None] & jnp.where(left, y > v[:, None], y < v[:, None])

    def unfinished(carry):
        return jnp.any(~carry[4]) & (carry[5] < _cap(y.dtype))

    def step(carry):
        a, b, v, found, done, k = carry  # the root is in [a, b]
        members = inside(v)
        one = jnp.where(members, 1, 0).astype(y.dtype)
        moved = jnp.where(members, y - v[:, None], 0)
        # As v grows, members on the left leave and some on the right join: this count falls with either, so it says whether any did.
        count = jnp.where(left, one, -one)
        terms = (moved, one, count) if w is None else (w * moved, w * one, count)
        moment, total, count = (over(t) for t in _sums(*terms))
        new = v + moment / jnp.where(total > 0, total, 1)
        a, b = jnp.where(moment >= 0, v, a), jnp.where(moment <= 0, v, b)
        # A step of less than a unit in the last place has no entry on its way.
        ending = (count == found) | (new == v) | (b - a <= resolution)
        bisect = ~ending & (~((new > a) & (new < b)) | (k % 8 == 7))
        new = jnp.where(done, v, jnp.where(bisect, a + (b - a) / 2, new))
        return a, b, new, jnp.where(bisect, jnp.nan, count), done | ending, k + 1

    start = jnp.where(violated, low + (high - low) / 2, 0)
    carry = (high, low, start, jnp.full_like(low, jnp.nan), ~violated, jnp.zeros((), jnp.int32))
    v = jax.lax.while_loop(unfinished, step, carry)[2]
    return jnp.where(inside(v), v[:, None], y)


def _sums(*terms: Float[Array, "groups size columns"]) -> tuple[Float[Array, "groups columns"], ...]:
    """Several sums down the columns in one read of the table: XLA's CPU backend fuses one reduction, not several."""
    zeros = tuple(jnp.zeros((), term.dtype) for term in terms)
    return jax.lax.reduce(terms, zeros, lambda a, b: tuple(map(jnp.add, a, b)), (1,))
