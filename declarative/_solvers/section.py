r"""The multiplier of one linear equation beside bounds: a monotone piecewise linear equation in one unknown.

$$ g(\tau) = \sum_i w_i \,\mathrm{clip}(x_i - \tau w_i, l_i, u_i) - c = 0 \tag{E} $$

is what the projection onto $\{p : l \le p \le u,\ w^\top p = c\}$ comes to. g falls; it is linear between the points where an entry
meets a bound. Newton's step is exact once no such point lies between the iterate and the root, so the iteration ends there: no
sort, and no tolerance on $\tau$. Steps that leave the bracket of the root, or that do not shrink it fast enough, are replaced by the
chord of the bracket, then by its middle (with two bounds g is neither convex nor concave, and Newton alone may cycle).

The iterate is an unevaluated sum $\delta + \epsilon$: of close numbers $x_i - \delta$ is exact, so entries far smaller than $\tau$ keep
their digits (`simplex_maps.py` says more). Where the bounds are closer than two neighbours of $\delta$, no $\delta$ alone has an entry between
them: once the bracket is down to neighbours, $\delta$ stays and the search goes on in $\epsilon$.

References: Cominetti, Mascarenhas & Silva 2014 (Newton for the continuous quadratic knapsack problem); Michelot 1986 for $u = \infty$.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._linear.rows import column_maxima, row_reductions, row_sums, two_sum

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


class _Bracket(NamedTuple):
    """Of the root, with g at its ends (0: not yet known)."""

    left: Float[Array, ""]
    right: Float[Array, ""]
    g_left: Float[Array, ""]
    g_right: Float[Array, ""]

    def narrowed(self, here, g, before) -> "_Bracket":
        """By g at `here`, and `before` at the last point. An end that stays counts half (the Illinois rule), else chords creep up on it."""
        on_left = g >= 0
        return _Bracket(
            jnp.where(on_left, here, self.left),
            jnp.where(on_left, self.right, here),
            jnp.where(on_left, g, jnp.where(before < 0, 0.5, 1) * self.g_left),
            jnp.where(on_left, jnp.where(before >= 0, 0.5, 1) * self.g_right, g),
        )

    def moved(self, by) -> "_Bracket":
        return self._replace(left=self.left - by, right=self.right - by)

    @property
    def known(self) -> Bool[Array, ""]:
        return (self.g_left > 0) & (self.g_right < 0)

    @property
    def middle(self) -> Float[Array, ""]:
        return self.left + (self.right - self.left) / 2

    def chord(self, otherwise) -> Float[Array, ""]:
        slope = jnp.where(self.known, self.g_left - self.g_right, 1)
        meets = self.left + (self.right - self.left) * self.g_left / slope
        return jnp.where(self.known & (meets > self.left) & (meets < self.right), meets, otherwise)

    def has(self, point) -> Bool[Array, ""]:
        """An end that has been looked at is not the root; one that has not may be."""
        right_of = (point > self.left) | ((point == self.left) & (self.g_left == 0))
        return right_of & ((point < self.right) | ((point == self.right) & (self.g_right == 0)))


class _State(NamedTuple):
    tau: Float[Array, ""]
    low: Float[Array, ""]
    bracket: _Bracket
    g: Float[Array, ""]  # at the last iterate
    rank: Float[Array, ""]  # entries at their last bound less entries at their first one: grows with tau
    newton: Bool[Array, ""]  # the last step was Newton's
    fine: Bool[Array, ""]  # tau stays, the bracket is of low
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
    """The root of (E), by values only (no derivative).

    `lower` and `upper` are vectors or scalars; infinite entries are no bounds. `weights` None: ones. `at_most`: of max(g, 0) with tau >= 0, for
    |x| in place of x and weights that are not negative; then `lower` is 0 and `upper` None, no bound.
    """
    eps = float(jnp.finfo(x.dtype).eps)
    kept = lambda term: term if mask is None else jnp.where(mask, term, 0)
    w = jnp.ones((), x.dtype) if weights is None else weights
    ones = jnp.ones_like(x)
    sign = jnp.where(w < 0, -ones, ones)

    def sums(tau, low):
        """(left side of (E) plus c, minus its slope, rank): in one read, and as few sums as tell the pieces of g apart."""
        # Nothing of the size of x is made before the loop: to write it to fresh memory takes as long as six steps.
        t = (x - tau * w) - low * w
        t = jnp.maximum(t, -((x + tau * w) + low * w)) if at_most else t
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
        side = jnp.where(below, sign, jnp.where(above, -sign, 0))
        return row_sums(kept(w * y), kept(jnp.where(below | above, 0, square)), kept(side))

    start = _start_at_most(x, w, total, mask) if at_most else _start(x, lower, upper, w, total, mask)
    total, tau = start.total, start.tau
    if x.size >= _SHORTEST_WITH_A_SAMPLE and not sampled:
        guess = _from_sample(x, lower, upper, weights, total, mask, max_steps, at_most, tau)
        tau = jnp.where(start.inactive, tau, jnp.clip(guess, start.left, start.right))
    zero, never, no = jnp.zeros_like(tau), jnp.full_like(tau, jnp.nan), jnp.array(False)
    bracket = _Bracket(start.left, start.right, zero, zero)
    over = start.inactive | ~start.finite | ~start.feasible

    def step(state: _State) -> _State:
        mass, slope, rank = sums(state.tau, state.low)
        g = mass - total
        here = jnp.where(state.fine, state.low, state.tau + state.low)
        bracket = state.bracket.narrowed(here, g, state.g)
        narrow = bracket.right - bracket.left <= 2 * eps * jnp.abs(here)
        small = jnp.abs(g) <= 4 * eps * (jnp.abs(mass) + jnp.abs(total))
        within_noise = narrow & state.fine & (jnp.abs(g) <= start.noise)
        done = small | within_noise | (state.newton & (rank == state.rank))
        # Two numbers do not have the digits: x is larger than the bounds are apart by more than the square of the precision.
        given_up = narrow & state.fine & ~done

        move, newton = _move(here, g, slope, bracket, state, start, done)
        refine = narrow & ~state.fine & ~done
        fine = state.fine | refine
        bracket = bracket.moved(jnp.where(refine, state.tau, 0))
        low = jnp.where(refine, bracket.middle, state.low + move)
        tau, low = _parts(fine, state.tau, low)
        steps = jnp.where(given_up, max_steps, state.steps + 1)
        return _State(tau, low, bracket, g, rank, newton & ~refine, fine, steps, done)

    state = _State(tau, zero, bracket, never, never, no, no, jnp.zeros((), jnp.int32), over)
    state = jax.lax.while_loop(lambda s: ~s.done & (s.steps < max_steps), step, state)
    converged = state.done & start.finite & start.feasible
    return Root(state.tau, state.low, state.steps, converged, start.finite, start.feasible)


def _move(here, g, slope, bracket: _Bracket, state: _State, start: "_Start", done):
    """(the way to the next iterate, whether it is Newton's)."""
    eps = float(jnp.finfo(g.dtype).eps)
    move = jnp.where(slope > 0, g / jnp.where(slope > 0, slope, 1), 0)
    late = (state.steps > _PATIENCE) & (state.steps % 3 == 0)
    # `low` may need a correction that the bracket does not resolve.
    inside = bracket.has(here + move) | (jnp.abs(move) <= 4 * eps * jnp.abs(here))
    # Where bounds are so close that few entries are between them, the slope here says little about g: the chord does.
    slow = state.newton & bracket.known & (jnp.abs(g) > jnp.abs(state.g) / 4)
    newton = (slope > 0) & inside & ~late & ~slow
    # Towards an infinite end: past the last bound there, where g is linear; and no root is nearer than g over its steepest slope.
    least = here + g / start.steepest
    past = jnp.where(g >= 0, jnp.maximum(least, start.last), jnp.minimum(least, start.first))
    middle = jnp.where(jnp.isfinite(bracket.middle), bracket.middle, past)
    jump = jnp.where(late, middle, bracket.chord(middle)) - here
    # The step is taken in the last pass too: it corrects the iterate by the rounding error of the sums.
    return jnp.where(done | newton, move, jump), newton


def _parts(fine, tau, low):
    total, rest = two_sum(tau, low)
    return jnp.where(fine, tau, total), jnp.where(fine, low, rest)


def _from_sample(x, lower, upper, weights, total, mask, max_steps, at_most, otherwise):
    """A first iterate near the root: the root for an eighth of the entries, at an eighth of the cost."""
    if at_most and weights is None:
        # The left side of (E) only grows with more entries, so this is a lower bound of the root; and the maxima of columns miss an
        # entry above it only where two of them share a column.
        part, share = (column_maxima(jnp.abs(x)), lower, upper, None), total
        mask = None
    else:
        thin = lambda block: block if block is None or block.ndim == 0 else block[::_STRIDE]
        part = tuple(thin(block) for block in (x, lower, upper, weights))
        share = total * (part[0].size / x.size)  # pyright: ignore[reportOptionalMemberAccess]
        mask = thin(mask)
    root = section_root(*part, share, mask, max_steps, at_most=at_most, sampled=True)  # pyright: ignore[reportCallIssue]
    return jnp.where(jnp.isfinite(root.tau) & root.feasible, root.tau, otherwise)


class _Start(NamedTuple):
    left: Float[Array, ""]  # a bracket, infinite where unbounded entries make g so
    right: Float[Array, ""]
    tau: Float[Array, ""]  # the first iterate
    finite: Bool[Array, ""]  # the data are
    feasible: Bool[Array, ""]
    total: Float[Array, ""]  # c, inside of what the bounds allow
    inactive: Bool[Array, ""]  # tau = 0 is the answer
    first: Float[Array, ""]  # the least and the greatest point where an entry meets a bound
    last: Float[Array, ""]
    steepest: Float[Array, ""]  # the slope where all entries are free
    noise: Float[Array, ""]  # of g


def _start_at_most(x, w, total, mask) -> _Start:
    kept = lambda term: term if mask is None else jnp.where(mask, term, 0)
    ones, size = jnp.ones_like(x), jnp.abs(x)
    moment, square, last = row_reductions(
        ("sum", kept(w * size)),
        ("sum", kept(w * w * ones)),
        ("max", kept(jnp.where(w > 0, size / jnp.where(w > 0, w, 1), 0))),
    )
    finite, free, steepest = _unbounded(moment, square, total)
    # One-sided, hence convex: `free` is left of the root. At max |x| / w nothing is left.
    inactive, zero = moment <= total, jnp.zeros_like(free)
    tau = jnp.where(inactive, zero, jnp.maximum(free, 0))
    right = last * (1 + 8 * float(jnp.finfo(x.dtype).eps))
    noise = _noise(x, total, total)
    return _Start(zero, right, tau, finite, total >= 0, total, inactive, zero, right, steepest, noise)


def _start(x, lower, upper, w, total, mask) -> _Start:
    kept = lambda term, nothing=0.0: term if mask is None else jnp.where(mask, term, nothing)
    ones = jnp.ones_like(x)
    if lower.ndim == upper.ndim == w.ndim == 0:
        # The same bounds for all, and weights of 1: a few numbers say what they allow.
        moment, least, most = row_reductions(("sum", kept(x)), ("min", kept(x, jnp.inf)), ("max", kept(x, -jnp.inf)))
        square = jnp.asarray(x.size, x.dtype) if mask is None else jnp.sum(kept(ones))
        bad = jnp.isnan(lower) | jnp.isnan(upper)
        crossed = jnp.where(bad, jnp.nan, jnp.where((lower > upper) & (square > 0), 1.0, 0.0))
        top, bottom = (jnp.where(square > 0, square * bound, 0) for bound in (upper, lower))
        heights, beyond = (jnp.abs(top), jnp.abs(bottom)), jnp.zeros_like(top)
        meets = [
            jnp.where(jnp.isfinite(bound), extreme - bound, nothing)
            for nothing, extreme in ((jnp.inf, least), (-jnp.inf, most))
            for bound in (upper, lower)
        ]
        first, last = jnp.minimum(*meets[:2]), jnp.maximum(*meets[2:])
    else:
        each = jnp.ones_like(lower * upper * w)
        low, high, counts = lower * each, upper * each, kept(w * each) != 0
        ends = [jnp.where(counts, w * bound, 0) for bound in (low, high)]
        highest, lowest = jnp.maximum(*ends), jnp.minimum(*ends)
        # Apart from what is of x: a batch of x has bounds and weights in common, as a rule.
        bad = jnp.isnan(low) | jnp.isnan(high)
        square, crossed, top, bottom, *heights = row_sums(
            kept(w * w * each),
            kept(jnp.where(bad, jnp.nan, jnp.where(low > high, each, 0))),
            highest,
            lowest,
            jnp.abs(highest),
            jnp.abs(lowest),
        )
        # Beside a tiny weight the quotient may overflow: `first` or `last` is infinite then.
        weight = jnp.where(counts, w, 1)
        meets = [
            (counts & jnp.isfinite(bound), (x - jnp.where(jnp.isfinite(bound), bound, 0)) / weight)
            for bound in (low, high)
        ]
        least, most = ([jnp.where(does, point, nothing) for does, point in meets] for nothing in (jnp.inf, -jnp.inf))
        moment, first, last = row_reductions(
            ("sum", kept(w * x)), ("min", jnp.minimum(*least)), ("max", jnp.maximum(*most))
        )
        beyond = jnp.where((first == -jnp.inf) | (last == jnp.inf), 1.0, 0.0)
    finite, free, steepest = _unbounded(moment, square, total)
    eps = float(jnp.finfo(x.dtype).eps)
    over, under = (_noise(x, total, height) for height in heights)
    finite = finite & ~jnp.isnan(crossed)
    feasible = (total <= top + over) & (total >= bottom - under) & (crossed == 0) & jnp.isfinite(total)
    total = jnp.clip(total, bottom, top)
    some = jnp.isfinite(first) & jnp.isfinite(last)
    first, last = jnp.where(some, first, free), jnp.where(some, last, free)
    margin = 8 * eps * (jnp.abs(first) + jnp.abs(last))
    first, last = first - margin, last + margin
    # Left of every bound that is met, the entries that are bounded there are at their bounds, and g is at least 0: if all are.
    left = jnp.where((top < jnp.inf) & (beyond == 0), first, -jnp.inf)
    right = jnp.where((bottom > -jnp.inf) & (beyond == 0), last, jnp.inf)
    tau = jnp.clip(free, first, last)
    return _Start(left, right, tau, finite, feasible, total, jnp.array(False), first, last, steepest, over + under)


def _noise(x, total, height):
    """What rounding may do to a sum of terms whose magnitudes sum to `height`, less `total`."""
    return 4 * float(jnp.finfo(x.dtype).eps) * (8 + x.size**0.5) * (jnp.abs(total) + height)


def _unbounded(moment, square, total):
    """(the data are finite, the root where no bound is met, the slope there)."""
    finite = jnp.isfinite(moment) & jnp.isfinite(square) & ~jnp.isnan(total)
    steepest = jnp.where(square > 0, square, 1)
    return finite, (moment - total) / steepest, steepest
