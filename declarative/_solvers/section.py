r"""The multiplier of one linear equation beside bounds: a monotone piecewise linear equation in one unknown.

$$ g(\tau) = \sum_i w_i \,\mathrm{clip}(x_i - \tau w_i, l_i, u_i) - c = 0, \qquad w \ge 0 \tag{E} $$

is what the projection onto $\{p : l \le p \le u,\ w^\top p = c\}$ comes to. g falls; it is linear between the points where an entry
meets a bound. Newton's step is exact once no such point lies between the iterate and the root, so the iteration ends there: no
sort, and no tolerance on $\tau$. Steps that leave the bracket of the root, or that do not shrink it fast enough, are replaced by the
chord of the bracket, then by its middle (with two bounds g is neither convex nor concave, and Newton alone may cycle).

The iterate is an unevaluated sum $\delta + \epsilon$: of close numbers $x_i - \delta$ is exact, so entries far smaller than $\tau$ keep
their digits (`simplex_maps.py` says more). References: Cominetti, Mascarenhas & Silva 2014 (Newton for the continuous quadratic
knapsack problem); Michelot 1986 for $u = \infty$.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .rows import column_maxima, row_sums, two_sum

# Newton has met the last piece in 3 to 9 steps on every kind of data tried; from here on every third step halves the bracket.
_PATIENCE = 8
# Shorter vectors go without a sample: for them a step costs no more than the detour.
_SHORTEST_WITH_A_SAMPLE = 2048
_STRIDE = 8


class Root(NamedTuple):
    """The root tau + low of (E), and how it was found."""

    tau: Float[Array, ""]
    low: Float[Array, ""]
    steps: Int[Array, ""]
    converged: Bool[Array, ""]
    finite: Bool[Array, ""]  # the data are
    feasible: Bool[Array, ""]


class _State(NamedTuple):
    tau: Float[Array, ""]
    low: Float[Array, ""]
    left: Float[Array, ""]  # the bracket, and g at its ends (0: not yet known)
    right: Float[Array, ""]
    g_left: Float[Array, ""]
    g_right: Float[Array, ""]
    g: Float[Array, ""]  # at the last iterate
    rank: Float[Array, ""]  # entries at their last bound less entries at their first one: grows with tau
    newton: Bool[Array, ""]  # the last step was Newton's
    steps: Int[Array, ""]
    done: Bool[Array, ""]


def section_root(
    x: Float[Array, " n"],
    lower: Float[Array, "..."],
    upper: Float[Array, "..."] | None,
    weights: Float[Array, " n"] | None,
    total: Float[Array, ""],
    mask: Bool[Array, " n"] | None,
    max_steps: int,
    *,
    at_most: bool,
    sampled: bool = False,
) -> Root:
    """The root of (E), by values only (no derivative). `at_most`: of max(g, 0), with tau >= 0, and `x` and `lower` are not negative.

    `lower` and `upper` are vectors or scalars, `upper` None for no bound; infinite entries are no bounds. `weights` None: ones.
    """
    eps = float(jnp.finfo(x.dtype).eps)
    kept = lambda term: term if mask is None else jnp.where(mask, term, 0)
    w = jnp.ones((), x.dtype) if weights is None else weights
    ones = jnp.ones_like(x)

    def sums(tau, low):
        """(left side of (E) plus c, minus its slope, rank): in one read, and as few sums as tell the pieces of g apart."""
        t = (x - tau * w) - low * w
        below = t <= lower
        y = jnp.maximum(t, lower)
        square = w * w * ones
        if upper is None:  # entries only ever leave as tau grows, so the slope tells
            mass, slope = row_sums(kept(w * y), kept(jnp.where(below, 0, square)))
            return mass, slope, -slope
        y = jnp.minimum(y, upper)
        above = t >= upper
        if weights is None:
            count = float(x.size) if mask is None else jnp.sum(kept(ones))
            mass, low_ones, high_ones = row_sums(
                kept(y), kept(jnp.where(below, ones, 0)), kept(jnp.where(above, ones, 0))
            )
            return mass, count - low_ones - high_ones, low_ones - high_ones
        side = jnp.where(below, ones, jnp.where(above, -ones, 0))
        return row_sums(kept(w * y), kept(jnp.where(below | above, 0, square)), kept(side))

    left, right, tau, finite, feasible, total, inactive = _start(x, lower, upper, w, total, mask, at_most)
    if x.size >= _SHORTEST_WITH_A_SAMPLE and not sampled:
        guess = _from_sample(x, lower, upper, weights, total, mask, max_steps, at_most, tau)
        tau = jnp.where(inactive, tau, jnp.clip(guess, left, right))
    zero = jnp.zeros_like(tau)
    never = jnp.full_like(tau, jnp.nan)
    state = _State(
        tau,
        zero,
        left,
        right,
        zero,
        zero,
        never,
        never,
        jnp.array(False),
        jnp.zeros((), jnp.int32),
        inactive | ~finite | ~feasible,
    )

    def step(state: _State) -> _State:
        mass, slope, rank = sums(state.tau, state.low)
        g = mass - total
        on_left = g >= 0
        here = state.tau + state.low
        left, right = jnp.where(on_left, here, state.left), jnp.where(on_left, state.right, here)
        # An end of the bracket that stays counts half (the Illinois rule), so that chords do not creep up on it.
        g_left = jnp.where(on_left, g, jnp.where(state.g < 0, 0.5, 1) * state.g_left)
        g_right = jnp.where(on_left, jnp.where(state.g >= 0, 0.5, 1) * state.g_right, g)
        small = jnp.abs(g) <= 4 * eps * (jnp.abs(mass) + jnp.abs(total))
        move = g / jnp.where(slope > 0, slope, 1)
        done = small | (state.newton & (rank == state.rank)) | (right - left <= 2 * eps * jnp.abs(here))
        move = jnp.where(slope > 0, move, 0)
        target = here + move
        both = (g_left > 0) & (g_right < 0)
        chord = left + (right - left) * g_left / jnp.where(both, g_left - g_right, 1)
        middle = left + (right - left) / 2
        late = (state.steps > _PATIENCE) & (state.steps % 3 == 0)
        chord = jnp.where(both & (chord > left) & (chord < right), chord, middle)
        # An end of the bracket that has been looked at is not the root; one that has not may be.
        inside = ((target > left) | ((target == left) & (g_left == 0))) & (
            (target < right) | ((target == right) & (g_right == 0))
        )
        inside = inside | (
            jnp.abs(move) <= 4 * eps * jnp.abs(here)
        )  # a correction of `low`, which the bracket does not resolve
        # Where bounds are so close that few entries are between them, the slope here says little about g: the chord does.
        slow = state.newton & both & (jnp.abs(g) > jnp.abs(state.g) / 4)
        good = (slope > 0) & inside & ~late & ~slow
        jump = jnp.where(late, middle, chord) - here
        # The step is taken in the last pass too: it corrects the iterate by the rounding error of the sums.
        move = jnp.where(done | good, move, jump)
        tau, low = two_sum(state.tau, state.low + move)
        return _State(tau, low, left, right, g_left, g_right, g, rank, good, state.steps + 1, done)

    state = jax.lax.while_loop(lambda s: ~s.done & (s.steps < max_steps), step, state)
    return Root(state.tau, state.low, state.steps, state.done & finite & feasible, finite, feasible)


def _from_sample(x, lower, upper, weights, total, mask, max_steps, at_most, otherwise):
    """A first iterate near the root: the root for an eighth of the entries, at an eighth of the cost."""
    if at_most and weights is None:
        # The left side of (E) only grows with more entries, so this is a lower bound of the root; and the maxima of columns miss an
        # entry above it only where two of them share a column.
        part, share = (column_maxima(x), lower, upper, None), total
        mask = None
    else:
        thin = lambda block: block if block is None or block.ndim == 0 else block[::_STRIDE]
        part = tuple(thin(block) for block in (x, lower, upper, weights))
        share = total * (part[0].size / x.size)  # pyright: ignore[reportOptionalMemberAccess]
        mask = thin(mask)
    root = section_root(*part, share, mask, max_steps, at_most=at_most, sampled=True)  # pyright: ignore[reportCallIssue]
    return jnp.where(jnp.isfinite(root.tau) & root.feasible, root.tau, otherwise)


def _start(x, lower, upper, w, total, mask, at_most: bool):
    """(bracket, first iterate, data are finite, feasible, c inside of what the bounds allow, tau = 0 is the answer)."""
    eps = float(jnp.finfo(x.dtype).eps)
    kept = lambda term: term if mask is None else jnp.where(mask, term, 0)
    ones = jnp.ones_like(x)
    moment, square, size = row_sums(*(kept(part) for part in (w * x, w * w * ones, jnp.abs(x))))
    finite = jnp.isfinite(size) & jnp.isfinite(moment) & jnp.isfinite(square) & ~jnp.isnan(total)
    free = (moment - total) / jnp.where(square > 0, square, 1)  # the root where no bound is met
    if at_most:
        # One-sided, hence convex: `free` is left of the root. At max x / w nothing is left.
        last = jnp.max(kept(jnp.where(w > 0, x / jnp.where(w > 0, w, 1), 0)))
        inactive = moment <= total
        tau = jnp.where(inactive, jnp.zeros_like(free), jnp.maximum(free, 0))
        return jnp.zeros_like(free), last * (1 + 8 * eps), tau, finite, total >= 0, total, inactive
    low, high = lower * ones, (jnp.inf if upper is None else upper) * ones
    # Left of every point where an entry meets a bound, the entries without an upper bound are free and the others at it.
    left, top = _end(x, low, high, w * ones, total, mask)
    right, bottom = _end(-x, -high, -low, w * ones, -total, mask)
    right, bottom = -right, -bottom
    slack = 4 * eps * (8 + x.size**0.5) * (jnp.abs(total) + _finite(jnp.abs(top)) + _finite(jnp.abs(bottom)))
    (nans, crossed) = row_sums(
        *(kept(jnp.where(bad, ones, 0)) for bad in (jnp.isnan(low) | jnp.isnan(high), low > high))
    )
    finite = finite & (nans == 0)
    feasible = (total <= top + slack) & (total >= bottom - slack) & (crossed == 0) & jnp.isfinite(total)
    total = jnp.clip(total, bottom, top)
    tau = jnp.clip(free, left, right)
    margin = 8 * eps * (jnp.abs(left) + jnp.abs(right))
    return left - margin, right + margin, tau, finite, feasible, total, jnp.array(False)


def _end(x, lower, upper, w, total, mask):
    """(a point where g >= 0, the largest moment that the bounds allow)."""
    counts = w > 0 if mask is None else mask & (w > 0)
    bounded = counts & (upper < jnp.inf)
    free = counts & ~bounded
    fixed, moment, square = row_sums(
        jnp.where(bounded, w * jnp.where(bounded, upper, 0), 0), jnp.where(free, w * x, 0), jnp.where(free, w * w, 0)
    )
    nearest = jnp.where(bounded, upper, lower)
    meets = counts & jnp.isfinite(nearest)
    first = jnp.min(jnp.where(meets, (x - jnp.where(meets, nearest, 0)) / jnp.where(counts, w, 1), jnp.inf))
    linear = jnp.where(square > 0, (moment + fixed - total) / jnp.where(square > 0, square, 1), jnp.inf)
    point = jnp.minimum(first, linear)
    return jnp.where(jnp.isfinite(point), point, 0), jnp.where(square > 0, jnp.inf, fixed)


def _finite(value):
    return jnp.where(jnp.isfinite(value), value, 0)
