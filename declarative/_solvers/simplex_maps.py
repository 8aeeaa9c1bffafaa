r"""Softmax, sparsemax and $\alpha$-entmax of one row of scores: one scalar equation, one derivative rule.

**Problem.**     $p^*(z) = \arg\max_p p^\top z + H_\alpha(p)$ subject to $p \ge 0$, $1^\top p = 1$, with the Tsallis
                 entropy $H_\alpha(p) = \sum_i (p_i - p_i^\alpha) / (\alpha(\alpha - 1))$, Shannon's as $\alpha \to 1$   (P)
**Optimality.**  $p_i = \exp_\alpha(z_i - \theta)$ (K1), $\sum_i \exp_\alpha(z_i - \theta) - 1 = 0$ (K2), where
                 $\exp_\alpha(t) = [1 + (\alpha - 1) t]_+^{1/(\alpha - 1)}$, $e^t$ as $\alpha \to 1$.
                 $\alpha = 1$: softmax, $\theta$ = logsumexp. $\alpha = 1.5$: entmax15. $\alpha = 2$: sparsemax, whose usual
                 threshold is $\theta - 1$; in general the usual one is $(\alpha - 1)\theta - 1$.
**Solver.**      (K2) is scalar, decreasing and piecewise smooth in $\theta$. No sort: Newton on the Tsallis logarithm of
                 the mass, $\ln_\alpha m = (m^{\alpha-1} - 1)/(\alpha - 1)$, one read of the row a step; see `_advance`.
**Gradient.**    Implicit function theorem on (K2). With $s_i = p_i^{2 - \alpha}$ on the support and 0 off it, and
                 $r_i = \partial p_i / \partial \alpha$ at fixed $\theta$:
                 $d\theta = (s^\top dz + 1^\top r\, d\alpha) / 1^\top s$ (G1), $dp = s \circ (dz - d\theta) + r\, d\alpha$ (G2).
                 Not differentiable in $z$ where some $z_i$ sits on the threshold and $\alpha \ge 2$ (for $\alpha < 2$, not
                 twice): $s_i = 0$ is used there. For $\alpha > 2$, $s_i$ grows without bound as $p_i \to 0^+$.
                 Forward and reverse mode, to any order.

| symbol       | code           | shape  | meaning                                                                           |
|--------------|----------------|--------|-----------------------------------------------------------------------------------|
| $z$          | `scores`       | `(n,)` | scores, dimensionless                                                             |
| $\theta$     | `theta`        | `()`   | multiplier of $1^\top p = 1$, same units as `scores`                              |
| $M$          | `top`          | `()`   | largest score, clipped to the finite range                                        |
| $x$          | `x`            | `(n,)` | $z - M$, in [-inf, 0]                                                             |
| $\delta$     | `delta`, `low` | `()`   | $\theta - M$ as an unevaluated sum; in $[0, (1 - n^{1-\alpha})/(\alpha - 1)]$     |
| $\xi$        | `xi`           | `()`   | $\delta - 1/(\alpha - 1)$: entries with $x_i > \xi$ are the support               |
| $\sum_i p_i$ | `mass`         | `()`   | left side of (K2) plus one, at the current $\delta$                               |
| $\sum_i s_i$ | `slope`        | `()`   | minus the derivative of `mass` with respect to $\delta$                           |

**Reference:** Martins & Astudillo 2016, arXiv:1602.02068 (sparsemax); Peters, Niculae & Martins 2019, arXiv:1905.05702
(entmax); Michelot 1986 (the finite iteration of $\alpha = 2$). They sort, bisect, or start from the whole row; the starting
point, the step and the arithmetic of the threshold here are ours.
"""

import functools as ft
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from .._linear.rows import column_maxima, row_sums, two_sum

_Kind = Literal["softmax", "entmax15", "sparsemax", "general"]


class SimplexMap(NamedTuple):
    """A row of scores mapped to the simplex. `probabilities` and `theta` are differentiable, the rest is not."""

    probabilities: Float[Array, " n"]
    theta: Float[Array, ""]
    steps: Int[Array, ""]  # reads of the whole row by the root finder; 0 for softmax
    converged: Bool[Array, ""]
    finite: Bool[Array, ""]


def simplex_map(scores: Float[Array, " n"], alpha: int | float | Float[Array, ""], max_steps: int) -> SimplexMap:
    r"""Solve (K2) for one row; `jax.vmap` for batches. Lanes that have converged are frozen.

    A Python number `alpha` is static, and 1, 1.5 and 2 then have kernels of their own. An array `alpha` uses the general
    kernel, which agrees with those three, and has a gradient. `max_steps` bounds the reads of the row.

    **Conventions.** `-inf` is a masked entry: probability 0 and gradient 0. A row of nothing but `-inf`: probabilities 0,
    `theta` `-inf`, gradient 0, and both flags true. `+inf` entries share the mass equally, `theta` is `inf`, gradient 0. A
    NaN in the row, or an array `alpha` that is NaN or outside [1, 4]: probabilities, `theta` and derivatives NaN, both flags
    false, no iteration. A score exactly on the threshold has probability 0 and gradient 0.

    **Returns:** `SimplexMap` in the dtype of `scores` (float32 or float64). Where `max_steps` was reached, `converged` is
    false and the last iterate is returned.
    **Raises:** `ValueError` if `scores` is not a non-empty floating vector, if a static `alpha` is outside [1, 4], or if
    `max_steps` < 1.
    """
    if scores.ndim != 1 or scores.size == 0 or not jnp.issubdtype(scores.dtype, jnp.floating):
        raise ValueError(
            f"a simplex map needs a non-empty floating vector, got {scores.dtype}{list(scores.shape)}; "
            "use jax.vmap for batches"
        )
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    if isinstance(alpha, int | float):
        if not 1 <= alpha <= 4:
            raise ValueError(f"alpha must be in [1, 4], got {alpha}")
        special: dict[float, _Kind] = {1.0: "softmax", 1.5: "entmax15", 2.0: "sparsemax"}
        kind = special.get(alpha, "general")
    else:
        kind = "general"
    return _map(kind, max_steps, scores, jnp.asarray(alpha).astype(scores.dtype))


# ----------------------------------------------------------------------------------------------------------------------
# Solution
# ----------------------------------------------------------------------------------------------------------------------


@ft.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _map(kind: _Kind, max_steps: int, scores: Float[Array, " n"], alpha: Float[Array, ""]) -> SimplexMap:
    highest = float(jnp.finfo(scores.dtype).max)
    nan = jnp.full((), jnp.nan, scores.dtype)
    columns = column_maxima(scores)
    # Every special value is caught by the maximum, which is needed anyway: no pass over the row looks for them.
    largest = jnp.max(columns)
    if kind == "general":
        largest = jnp.where((alpha >= 1) & (alpha <= 4), largest, nan)
    finite = ~jnp.isnan(largest)
    has_root = finite & (largest > -jnp.inf)
    # Clipped, so that `_shifted` never forms inf - inf: a +inf score then lies at 0, the finite ones at about -highest.
    top = jnp.maximum(jnp.minimum(largest, highest), -highest)
    if kind == "softmax":
        weights = jnp.exp(_shifted(scores, top))
        total = jnp.sum(weights)
        probabilities = weights / jnp.where(total == 0, 1, total)
        delta = jnp.log(jnp.where(has_root, total, 1))
        steps, converged = jnp.zeros((), jnp.int32), finite
    else:
        state = _initial(kind, alpha, scores.size, has_root)
        if columns is not scores:
            state = _starting_point(state, _root(kind, max_steps, columns, top, alpha, state))
        state = _root(kind, max_steps, scores, top, alpha, state)
        delta, steps, converged = state.delta + state.low, state.steps, state.done & finite
        probabilities = _exp_alpha(kind, alpha, _shifted(scores, top), state.delta, state.low)
        probabilities = jnp.where(finite, probabilities, nan)
    theta = jnp.where(jnp.isfinite(largest), top + delta, largest)
    return SimplexMap(probabilities, theta, steps, converged, finite)


def _shifted(scores: Float[Array, " n"], top: Float[Array, ""]) -> Float[Array, " n"]:
    """Scores less their maximum. Recomputed in every pass: an elementwise operation is free there, a copy is not."""
    return jnp.minimum(scores - top, 0)


def _exp_alpha(
    kind: _Kind, alpha: Float[Array, ""], x: Float[Array, " n"], delta: Float[Array, ""], low: Float[Array, ""]
) -> Float[Array, " n"]:
    """(K1)."""
    match kind:
        case "sparsemax":
            return jnp.maximum(_above_threshold(1.0, x, delta, low), 0)
        case "entmax15":
            return jnp.square(jnp.maximum(_above_threshold(2.0, x, delta, low) / 2, 0))
        case _:
            return _power(alpha, x, delta, low)[0]


def _above_threshold(
    radius: float | Float[Array, ""], x: Float[Array, " n"], delta: Float[Array, ""], low: Float[Array, ""]
) -> Float[Array, " n"]:
    r"""$x - \xi$, where $\xi = \delta - r$ and the radius $r$ is $1/(\alpha - 1)$, with the relative accuracy of `x`.

    Of close numbers the difference is exact, and the digits that $\xi$ loses are subtracted after it. From $r + (x - \delta)$
    every entry would have the same error, half a unit in the last place of r: more than p itself where p is spread thin
    (a float32 row of 32768 nearly equal scores would sum to 1.001), and $\alpha > 2$ amplifies it without bound.
    """
    xi, xi_low = two_sum(delta, -radius * jnp.ones_like(delta))
    return (x - xi) - (xi_low + low)


def _power(
    alpha: Float[Array, ""], x: Float[Array, " n"], delta: Float[Array, ""], low: Float[Array, ""]
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    r"""$p = \exp_\alpha(t)$ and $s = p^{2 - \alpha} = p / v$, $t = x - \delta$, $v = 1 + (\alpha - 1) t$, for `alpha` in [1, 4].

    Away from $\alpha = 1$, v by `_above_threshold`. Near it that would cancel; there v is near 1 and its rounding error,
    `v_low`, matters instead: $\log(v + v_{low}) = \log v + v_{low}/v$ is the well conditioned log1p.
    """
    curvature = alpha - 1
    far = curvature >= 0.5
    safe = jnp.where(curvature == 0, 1, curvature)
    t = jnp.maximum(x - delta, jnp.finfo(x.dtype).min) - low  # bounded: 0 * -inf at alpha = 1
    u = curvature * t
    v = jnp.where(far, curvature * _above_threshold(1 / safe, x, delta, low), 1 + u)
    support = v > 0
    v = jnp.where(support, v, 1)
    reciprocal = 1 / v
    v_low = jnp.where(far, 0, u - (v - 1))
    log_p = jnp.where(curvature == 0, t, (jnp.log(v) + v_low * reciprocal) / safe)
    p = jnp.where(support, jnp.exp(log_p), 0)
    return p, p * reciprocal


# ----------------------------------------------------------------------------------------------------------------------
# Root of (K2)
# ----------------------------------------------------------------------------------------------------------------------


class _State(NamedTuple):
    delta: Float[Array, ""]  # the iterate is delta + low, see `_above_threshold`
    low: Float[Array, ""]
    below: Float[Array, ""]  # the root is in [iterate - below, iterate + above], up to rounding
    above: Float[Array, ""]
    move: Float[Array, ""]  # size of the last move
    size: Float[Array, ""]  # of the support at the last iterate
    exact: Bool[Array, ""]  # the last move solves (K2) if it left the support as it was
    steps: Int[Array, ""]
    done: Bool[Array, ""]


class _Sums(NamedTuple):
    mass: Float[Array, ""]
    slope: Float[Array, ""]
    size: Float[Array, ""]  # of the support; 0 where nothing depends on it (general alpha)


def _initial(kind: _Kind, alpha: Float[Array, ""], n: int, has_root: Bool[Array, ""]) -> _State:
    # (K2) at delta = 0 is >= 0 (the largest term alone is 1) and where exp_alpha(-delta) = 1/n it is <= 0 (no term exceeds
    # 1/n): always a root.
    match kind:
        case "sparsemax":
            upper = jnp.full_like(alpha, 1 - 1 / n)
        case "entmax15":
            upper = jnp.full_like(alpha, 2 * (1 - n**-0.5))
        case _:
            curvature = alpha - 1
            safe = jnp.where(curvature == 0, 1, curvature)
            log_n = jnp.full_like(alpha, float(np.log(n)))
            upper = jnp.where(curvature == 0, log_n, -jnp.expm1(-curvature * log_n) / safe)
    # The root is there when all scores are equal; rounding must not put it outside.
    upper = upper * (1 + 16 * float(jnp.finfo(alpha.dtype).eps))
    zero = jnp.zeros_like(alpha)
    # Without a root (all masked, or NaN) the lane is done before it starts.
    return _State(zero, zero, zero, upper, upper, zero - 1, jnp.array(False), jnp.zeros((), jnp.int32), ~has_root)


def _starting_point(state: _State, of_columns: _State) -> _State:
    # The left side of (K2) only grows when scores are added, so the root of a subset of the row is a lower bound of the
    # root; and the column maxima miss a supporting score only where two share a column. Solved on them, an eighth of the
    # row or less, (K2) is left with one to three full passes instead of five to ten.
    delta, low, below = of_columns.delta, of_columns.low, of_columns.below
    return state._replace(delta=delta, low=low, below=below, above=state.above - delta)


def _root(
    kind: _Kind,
    max_steps: int,
    scores: Float[Array, " m"],
    top: Float[Array, ""],
    alpha: Float[Array, ""],
    state: _State,
) -> _State:
    def unfinished(state: _State) -> Bool[Array, ""]:
        return ~state.done & (state.steps < max_steps)

    def step(state: _State) -> _State:
        return _advance(kind, alpha, state, _sums(kind, alpha, _shifted(scores, top), state.delta, state.low))

    return jax.lax.while_loop(unfinished, step, state)


def _sums(
    kind: _Kind, alpha: Float[Array, ""], x: Float[Array, " m"], delta: Float[Array, ""], low: Float[Array, ""]
) -> _Sums:
    one, zero = jnp.ones((), x.dtype), jnp.zeros((), x.dtype)
    match kind:
        case "sparsemax":
            p = _exp_alpha(kind, alpha, x, delta, low)
            mass, size = row_sums(p, jnp.where(p > 0, one, zero))
            return _Sums(mass, size, size)
        case "entmax15":
            root_p = jnp.maximum(_above_threshold(2.0, x, delta, low) / 2, 0)
            return _Sums(*row_sums(jnp.square(root_p), root_p, jnp.where(root_p > 0, one, zero)))
        case _:
            mass, slope = row_sums(*_power(alpha, x, delta, low))
            return _Sums(mass, slope, zero)


def _advance(kind: _Kind, alpha: Float[Array, ""], state: _State, sums: _Sums) -> _State:
    r"""One step to the root from the sums at the iterate.

    Newton's method on $\ln_\alpha(\text{mass}) = 0$. Its left side is affine in $\delta$ when all scores are equal, so the step
    tends to the exact one as $\alpha \to 1$, and it is the plain Newton step at $\alpha = 2$. For $\alpha \le 2$ it is a norm of
    $[1 + u]_+$, $u = (\alpha - 1) t$, up to a factor and a constant, hence convex: Newton's iterates are lower bounds of the
    root, whatever the point they start from.

    $\alpha = 2$: on a fixed support the step is exact. The support shrinks from the second step on; once it does not, done.
    $\alpha = 1.5$: on a fixed support mass is a quadratic; its exact root is taken when real and in the bracket, else Newton's.
    $\alpha > 2$: not convex; a step that leaves the bracket, or fails to halve the last one, becomes a bisection.
    """
    mass, slope, size = sums
    slope = jnp.where(slope > 0, slope, 1)  # only in a lane without a root, whose step is dropped
    eps = float(jnp.finfo(mass.dtype).eps)
    tol = 4 * eps
    left = mass >= 1
    below, above = jnp.where(left, 0, state.below), jnp.where(left, state.above, 0)
    exact = jnp.array(False)
    match kind:
        case "sparsemax":
            move, exact = (mass - 1) / slope, jnp.array(True)
            done = (jnp.abs(mass - 1) <= tol) | (state.exact & (size >= state.size))
        case "entmax15":
            # mass(delta + 2h) = size h^2 - 2 slope h + mass on this support; the smaller root, without cancellation.
            discriminant = slope * slope - size * (mass - 1)
            move = 2 * (mass - 1) / (slope + jnp.sqrt(jnp.maximum(discriminant, 0)))
            newton = 2 * (mass - jnp.sqrt(mass)) / slope
            below = jnp.minimum(below, -newton * (1 - 4 * tol))  # a little less: rounding must not pass the root
            done = (jnp.abs(move) <= tol) | (state.exact & (size == state.size))
            done = done | ((below + above <= tol) & (state.steps > 0))
            exact = (discriminant >= 0) & (move >= -below) & (move <= above)
            # The bracket is good to a rounding error of delta, the last move to one of the sums: not cut, it is the better one.
            move = jnp.where(exact | done, move, -below)
        case _:
            curvature = alpha - 1
            log_mass = jnp.log(jnp.where(mass > 0, mass, 1))
            safe = jnp.where(curvature == 0, 1, curvature)
            tsallis = jnp.where(curvature == 0, log_mass, jnp.expm1(curvature * log_mass) / safe)
            move = tsallis * jnp.exp((1 - curvature) * log_mass) / slope
            # alpha > 2: by the residual, because the slope is unbounded there; p = v^(1/3) at worst, hence eps^3.
            small = jnp.where(alpha > 2, jnp.abs(mass - 1) <= tol, jnp.abs(move) <= tol * (1 + state.delta))
            resolution = jnp.where(alpha > 2, jnp.full_like(mass, eps**3), eps * (1 + state.delta))
            done = small | (below + above <= resolution)
            stuck = (alpha > 2) & (2 * jnp.abs(move) > state.move)
            # Right of the root by a rounding error: the slope there may know nothing of a steep piece before it.
            move = jnp.where(small & ~left & (alpha > 2), 0, move)
            bisect = ~done & (stuck | (move <= -below) | (move >= above))
            move = jnp.where(bisect, (above - below) / 2, jnp.where(small, move, jnp.clip(move, -below, above)))
    # The step is taken in the last pass too: it corrects the iterate by the rounding error of the sums, so that p sums to 1.
    delta, low = two_sum(state.delta, state.low + move)
    return _State(delta, low, below + move, above - move, jnp.abs(move), size, exact, state.steps + 1, done)


# ----------------------------------------------------------------------------------------------------------------------
# Derivative: (G1), (G2). `_map` is called for the primal, so that this rule is itself differentiable, to any order.
# ----------------------------------------------------------------------------------------------------------------------


@ft.partial(_map.defjvp, symbolic_zeros=True)
def _map_jvp(kind: _Kind, max_steps: int, primals: tuple, tangents: tuple) -> tuple[SimplexMap, SimplexMap]:
    scores, alpha = primals
    d_scores, d_alpha = tangents
    out = _map(kind, max_steps, scores, alpha)
    p = out.probabilities
    support = p >= float(jnp.finfo(p.dtype).tiny)  # a subnormal p may or may not be flushed to zero: call it zero
    s = _sensitivity(kind, alpha, p, support)
    # 1; 0 in a row with +inf or all masked, which does not move; NaN in a row of NaN. It multiplies the tangents, which costs
    # nothing; a `where` on s would cost a copy of the row in every backward pass.
    nan = jnp.full((), jnp.nan, p.dtype)
    gate = jnp.where(jnp.isfinite(out.theta), jnp.ones_like(nan), jnp.where(out.finite, 0, nan))
    # (G2) as v - s sum(v) / sum(s): its transpose is s (g - sum(s g) / sum(s)), two reads of s and g, nothing stored between.
    v = jnp.zeros_like(p)
    if not isinstance(d_scores, SymbolicZero):
        v = v + s * (gate * d_scores)
    if not isinstance(d_alpha, SymbolicZero):
        v = v + _alpha_derivative(alpha, p, support) * (gate * d_alpha)
    if kind == "softmax":
        d_theta = jnp.sum(v)  # s = p, which sums to one
    else:
        (total,) = row_sums(s)
        d_theta = jnp.sum(v) / jnp.where(total > 0, total, 1)
    d_p = v - s * d_theta
    if kind == "general":
        # Where alpha > 2 lets one s_i dominate, its d_p is the difference of close numbers; from 1'dp = 0 it is accurate.
        steepest = jnp.where(s >= jnp.max(s), jnp.ones_like(s), 0)
        (ties,) = row_sums(steepest)
        d_p = d_p - steepest * (jnp.sum(d_p) / jnp.where(ties > 0, ties, 1))
    zero_steps, zero_flag = np.zeros((), jax.dtypes.float0), np.zeros((), jax.dtypes.float0)
    return out, SimplexMap(d_p, d_theta, zero_steps, zero_flag, zero_flag)  # pyright: ignore[reportArgumentType]


def _sensitivity(
    kind: _Kind, alpha: Float[Array, ""], p: Float[Array, " n"], support: Bool[Array, " n"]
) -> Float[Array, " n"]:
    r"""$s = p^{2 - \alpha}$ on the support. `where` inside and outside: no derivative of a power at p = 0 is formed."""
    match kind:
        case "softmax":
            return p
        case "sparsemax":
            return jnp.where(support, jnp.ones_like(p), 0)
        case "entmax15":
            return jnp.where(support, jnp.sqrt(jnp.where(support, p, 1)), 0)
        case _:
            return jnp.where(support, jnp.exp((2 - alpha) * jnp.log(jnp.where(support, p, 1))), 0)


def _alpha_derivative(alpha: Float[Array, ""], p: Float[Array, " n"], support: Bool[Array, " n"]) -> Float[Array, " n"]:
    r"""$r = \partial \exp_\alpha(t) / \partial\alpha$ at fixed $t$, from $p$ alone.

    $\log p = \log(1 + u)/(\alpha - 1)$ gives $r = p\,(u/(1 + u) - \log(1 + u)) / (\alpha - 1)^2$. With
    $y = -(\alpha - 1) \log p \ge 0$, $\log(1 + u) = -y$ and $u/(1 + u) = 1 - e^y$, so $r = -p (\log p)^2 \psi(y)$,
    $\psi(y) = (e^y - 1 - y)/y^2$: entire, 1/2 at 0.
    """
    log_p = jnp.log(jnp.where(support, p, 1))
    y = (1 - alpha) * log_p
    near = y < 0.5
    series = jnp.zeros_like(y)
    for k in range(14, -1, -1):  # sum_k y^k / (k + 2)!: the first term left out is below 1e-17 of the sum at y = 1/2
        series = 1 + series * jnp.where(near, y, 0) / (k + 3)
    near_value = -p * log_p * log_p * (series / 2)
    # p e^y = p^{2 - alpha}, in one exponential: e^y alone may overflow.
    y_safe = jnp.where(near, 1, y)
    quotient = log_p / y_safe
    far_value = -(jnp.exp((2 - alpha) * log_p) - p * (1 + y)) * quotient * quotient
    return jnp.where(support, jnp.where(near, near_value, far_value), 0)
