r"""Robust means: the minimiser of $\sum_i w_i\,\alpha^2\psi(|u - x_i|/\alpha)$, of numbers column by column, or of vectors.

**Penalties.**   $\phi(r; \alpha) = \alpha^2 \psi(r/\alpha)$ with one fixed function $\psi$ each, so that $\alpha$ only scales, and in all
                 $\psi''(0) = 1$. With $z = r/\alpha$, $s = z^2$, weight $\omega = \psi'(z)/z$, and curvature $\psi'' = \omega - \kappa s$,
                 $\kappa = -2\,d\omega/ds \ge 0$.
**Optimality.**  $G(u) = \sum_i w_i\,\omega_i z_i = 0$, $z_i = (u - x_i)/\alpha$                                                    (K1)
**Solver.**      Columns, $\psi$ convex: $G$ is increasing; Newton's method inside a bracket, which is halved where Newton leaves it or is slow. For
                 Huber the last Newton step is exact. Otherwise: a start, then Newton steps as long as they do not climb; else a step of at most 1.9
                 times the one to the weighted mean with weights $w\omega$ (iteratively reweighted least squares). That one descends: $\omega$ falls
                 with $s$, so $\psi(z) \le \psi(z_0) + \omega(z_0)(z^2 - z_0^2)/2$, a quadratic, which falls along its own step up to twice its
                 length. Longer ones are tried where one after the other of these goes down.
**Gradient.**    Implicit function theorem on (K1), for columns: with $k_i = w_i\psi''(z_i)$,
                 $\mathrm du = \big(\sum_i k_i(\mathrm dx_i + z_i\,\mathrm d\alpha) - \alpha\sum_i \psi'(z_i)\,\mathrm dw_i\big) / \sum_i k_i$
                 (G1). All modes, any order.

**Reference:** Gould, Hartley & Campbell 2019, arXiv:1909.04866 (the layer); Huber & Ronchetti 2009, *Robust Statistics*, 7.8 (the descent).
"""

import functools as ft
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from .._core.adjoint import lax_loop
from .._linear.lanes import where_needed
from .._linear.positive_definite import Gram, factorise


class Penalty(NamedTuple):
    r"""One $\psi$, by functions of $s = z^2$, which vectors have without a root."""

    value: Callable  # psi
    weight: Callable  # psi'(z) / z
    bend: Callable  # kappa = -2 d weight / ds; psi'' = weight - kappa s
    convex: bool = True
    smooth: bool = True  # no kink in psi' where |z| = 1
    linear: bool = False  # |psi'| -> 1 far out


def _huber_weight(s):
    return jnp.where(s < 1, 1, jax.lax.rsqrt(jnp.maximum(s, 1)))


def _inside(s):
    return (s < 1).astype(s.dtype)


def _far_root(s):
    return jnp.sqrt(jnp.maximum(s, 1))


PENALTIES: dict[str, Penalty] = {
    "quadratic": Penalty(lambda s: s / 2, jnp.ones_like, jnp.zeros_like),
    "pseudo-huber": Penalty(
        lambda s: s / (jnp.sqrt(1 + s) + 1),
        lambda s: jax.lax.rsqrt(1 + s),
        lambda s: _cube(jax.lax.rsqrt(1 + s)),
        linear=True,
    ),
    "huber": Penalty(
        lambda s: jnp.where(s < 1, s / 2, _far_root(s) - 0.5),
        _huber_weight,
        lambda s: jnp.where(s < 1, 0, _cube(_huber_weight(s))),
        smooth=False,
        linear=True,
    ),
    "welsch": Penalty(lambda s: -jnp.expm1(-s / 2), lambda s: jnp.exp(-s / 2), lambda s: jnp.exp(-s / 2), convex=False),
    "truncated-quadratic": Penalty(
        lambda s: jnp.minimum(s, 1) / 2, _inside, jnp.zeros_like, convex=False, smooth=False
    ),
}


def _cube(q):
    return q * q * q


class Pooled(NamedTuple):
    """`centre` is differentiable, the rest is not."""

    centre: Float[Array, " c"]
    steps: Int[Array, ""]
    converged: Bool[Array, ""]
    finite: Bool[Array, ""]  # the data


def scaled(u: Float[Array, " c"], x: Float[Array, "n c"], alpha: Float[Array, " c"]) -> Float[Array, "n c"]:
    """z, bounded so that its square is finite: out there every penalty has reached its limit."""
    bound = float(jnp.finfo(x.dtype).max) ** 0.5 / 16
    return jnp.clip((u[None] - x) / alpha[None], -bound, bound)


def weighted(w: Float[Array, "..."] | None, terms: Float[Array, "..."]) -> Float[Array, "..."]:
    return terms if w is None else w * terms


def slope_sum(penalty: Penalty, w: Float[Array, "n m"] | None, z: Float[Array, "n c"]) -> Float[Array, " c"]:
    r"""$G$ of (K1), column by column.

    Where $\psi'$ tends to $\pm 1$, the signs are summed by themselves: they cancel exactly when as many points lie on either side, and what is
    left of $G$ is then as accurate as $\psi'' \sim |z|^{-3}$ needs it to be. In one sum it would drown in rounding from $|z| \sim 100$ on (float32).
    """
    if not penalty.linear:
        return jnp.sum(weighted(w, penalty.weight(z * z) * z), axis=0)
    s = z * z
    far = s >= 1
    signs = jnp.where(far, jnp.where(z > 0, 1, -1), 0).astype(z.dtype)
    if penalty.smooth:
        # With q = (1 + z^2)^(-1/2), |psi'| = |z| q, and |psi'| - 1 = -q^2 / (1 + |z| q) does not cancel.
        q = jax.lax.rsqrt(1 + s)
        slope = jnp.where(z > 0, z, -z) * q
        rest = jnp.where(far, -q * q / (1 + slope), slope)
        rest = jnp.where(z > 0, rest, -rest)
    else:
        rest = jnp.where(far, 0, z)
    return jnp.sum(weighted(w, signs), axis=0) + jnp.sum(weighted(w, rest), axis=0)


def curvatures(penalty: Penalty, z: Float[Array, "n c"]) -> Float[Array, "n c"]:
    s = z * z
    # In this form, and not as weight - bend * s, which cancels.
    if penalty is PENALTIES["pseudo-huber"]:
        return _cube(jax.lax.rsqrt(1 + s))
    if penalty is PENALTIES["huber"]:
        return _inside(s)
    return penalty.weight(s) - penalty.bend(s) * s


def columns(
    name: str,
    x: Float[Array, "n c"],
    w: Float[Array, "n m"] | None,
    alpha: Float[Array, " c"],
    *,
    start: str,
    max_steps: int,
    loop: Callable,
) -> Pooled:
    """The minimiser of each column; `w` of shape (n, c) or (n, 1), None for all ones. At least one weight of a column is positive.

    Not unique (Huber, as many points on either side of a gap wider than 2 alpha): the middle of the minimisers, which is that of the gap; that
    is what is differentiated, with 0 for the weights, in which it jumps.
    """
    if loop is lax_loop:
        return _columns(name, start, max_steps, x, w, alpha)
    return _solve(name, start, max_steps, loop, x, w, alpha)


@ft.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _columns(name, start, max_steps, x, w, alpha) -> Pooled:
    return _solve(name, start, max_steps, lax_loop, x, w, alpha)


@ft.partial(_columns.defjvp, symbolic_zeros=True)
def _columns_jvp(name, start, max_steps, primals, tangents):
    """(G1)."""
    penalty = PENALTIES[name]
    x, w, alpha = primals
    d_x, d_w, d_alpha = tangents
    out = _columns(name, start, max_steps, x, w, alpha)
    z = scaled(out.centre, x, alpha)
    k = weighted(w, curvatures(penalty, z))
    total = jnp.sum(k, axis=0)
    if penalty.linear:
        flat = total == 0
        k = _where_flat(
            flat, k, *(None if leaf is None else jax.lax.stop_gradient(leaf) for leaf in (out.centre, x, w))
        )
        total = jnp.where(flat, 1, total)
    else:
        # Two minimisers are about to merge or to appear there (Welsch).
        flat = jnp.zeros_like(total, bool)
        total = jnp.where(total > 0, total, jnp.nan)
    moved = jnp.zeros_like(out.centre)
    if not isinstance(d_x, SymbolicZero):
        moved = moved + jnp.sum(k * d_x, axis=0)
    if not isinstance(d_alpha, SymbolicZero):
        moved = moved + jnp.where(flat, 0, jnp.sum(k * z, axis=0)) * d_alpha
    if w is not None and not isinstance(d_w, SymbolicZero):
        slopes = jnp.where(flat[None], 0, alpha[None] * penalty.weight(z * z) * z)
        moved = moved - jnp.sum(slopes * d_w, axis=0)
    float0 = lambda: np.zeros((), jax.dtypes.float0)
    return out, Pooled(moved / total, float0(), float0(), float0())  # pyright: ignore[reportArgumentType]


def _neighbours(u, x, w):
    """The points next to u, on its left and on its right (infinite if there is none)."""
    there = jnp.ones_like(x, bool) if w is None else jnp.broadcast_to(w > 0, x.shape)
    left = jnp.max(jnp.where(there & (x <= u[None]), x, -jnp.inf), axis=0)
    right = jnp.min(jnp.where(there & (x > u[None]), x, jnp.inf), axis=0)
    return left, right, there


def _where_flat(flat, k, u, x, w):
    """`k`; in a column that is flat, the derivative of the middle of the gap: 1/2 for each of its ends, shared if several points are there."""

    def compute(one):
        left, right, there = _neighbours(u, x * one, w)
        ends = [(there & (x == end[None])).astype(x.dtype) for end in (left, right)]
        return sum(end / (2 * jnp.maximum(jnp.sum(end, axis=0), 1))[None] for end in ends)

    return jnp.where(flat[None], where_needed(jnp.any(flat), compute, jnp.zeros_like(x), lax_loop), k)


def _solve(name, start, max_steps, loop, x, w, alpha) -> Pooled:
    penalty = PENALTIES[name]
    mass = jnp.full(alpha.shape, x.shape[0], x.dtype) if w is None else jnp.sum(w, axis=0)
    mass = jnp.broadcast_to(mass, alpha.shape)
    # Twice: the second time the rounding of the first is taken off, which is what an offset of the data leaves.
    mean = jnp.sum(weighted(w, x), axis=0) / mass
    finite = jnp.isfinite(mean + alpha)  # NaN, or infinite, if any number in the sum is
    if name == "quadratic":
        # Again, from the differences: this takes off the rounding of the first sum, which an offset of the data leaves.
        mean = mean + jnp.sum(weighted(w, x - mean[None]), axis=0) / mass
        return Pooled(mean, jnp.zeros((), jnp.int32), jnp.ones((), bool), jnp.all(finite))
    if penalty.convex:
        centre, steps, converged = _bracketed(penalty, max_steps, loop, x, w, alpha, mean, finite)
    else:
        if start == "points":
            first, before = _best_point(name, x, w, alpha), 0
        else:
            huber = PENALTIES["pseudo-huber"]
            middle, before, _ = _bracketed(huber, max_steps, loop, x, w, alpha, mean, finite)
            # From the point next to it: around the centre itself there may be nothing that pulls.
            away = jnp.abs(x - middle[None])
            nearest = jnp.argmin(away if w is None else jnp.where(w > 0, away, jnp.inf), axis=0)
            first = jnp.take_along_axis(x, nearest[None], axis=0)[0]
        centre, steps, converged = _descend(penalty, max_steps, loop, x, w, alpha, first, finite)
        steps = steps + before
    return Pooled(jnp.where(finite, centre, jnp.nan), steps, converged, jnp.all(finite))


class _Bracket(NamedTuple):
    u: Float[Array, " c"]
    low: Float[Array, " c"]
    high: Float[Array, " c"]
    move: Float[Array, " c"]  # size of the last one
    flat: Bool[Array, " c"]  # every point near u is as good
    done: Bool[Array, " c"]
    steps: Int[Array, ""]


def _bracketed(penalty, max_steps, loop, x, w, alpha, mean, finite):
    """The root of G, which is increasing."""
    if w is None:
        low, high = jnp.min(x, axis=0), jnp.max(x, axis=0)
    else:
        low = jnp.min(jnp.where(w > 0, x, jnp.inf), axis=0)
        high = jnp.max(jnp.where(w > 0, x, -jnp.inf), axis=0)
    low, high = (jax.lax.stop_gradient(end) for end in (low, high))
    eps = float(jnp.finfo(x.dtype).eps)
    reach = jnp.minimum(alpha, high - low)

    def body(state: _Bracket) -> _Bracket:
        z = scaled(state.u, x, alpha)
        slope = slope_sum(penalty, w, z)
        curvature = jnp.sum(weighted(w, curvatures(penalty, z)), axis=0)
        low, high = jnp.where(slope < 0, state.u, state.low), jnp.where(slope > 0, state.u, state.high)
        newton = state.u - alpha * slope / jnp.where(curvature > 0, curvature, 1)
        move = jnp.abs(newton - state.u)
        size = jnp.maximum(jnp.abs(newton), reach)
        inside = (curvature > 0) & (newton >= low) & (newton <= high)
        settled = move <= 4 * eps * size
        if penalty.smooth and loop is lax_loop:
            # Newton's error is then its square: |psi'''| <= 1.5 psi''. (Unrolled, the derivative is one step behind.)
            settled = settled | (move * move <= eps * alpha * size)
        exact = slope == 0
        # Too slow: Newton in a flat part, or in the rounding of G.
        good = inside & (settled | (move <= 0.5 * state.move))
        middle = low + (high - low) / 2
        new = jnp.where(exact, state.u, jnp.where(good, newton, middle))
        closed = high - low <= 2 * eps * jnp.maximum(jnp.abs(low), jnp.abs(high))
        done = exact | (inside & settled) | closed
        new = jnp.where(state.done, state.u, new)
        move = jnp.where(good, move, jnp.inf)
        flat = state.flat | (~state.done & exact & (curvature == 0))
        return _Bracket(new, low, high, move, flat, state.done | done, state.steps + 1)

    start = jnp.clip(mean, low, high)
    infinite, no = jnp.full_like(start, jnp.inf), jnp.zeros_like(finite)
    # Data that are not finite have nothing to converge to.
    state = _Bracket(start, low, high, infinite, no, ~finite, jnp.zeros((), jnp.int32))
    state = loop(lambda state: ~jnp.all(state.done), body, state, max_steps=max_steps)

    def middle_of_gap(one):
        left, right, _ = _neighbours(state.u, x * one, w)
        return left / 2 + right / 2

    middle = where_needed(jnp.any(state.flat), middle_of_gap, state.u, loop)
    return jnp.where(state.flat, middle, state.u), state.steps, jnp.all(state.done)


def _best_point(name, x, w, alpha):
    """Where to start: the data point with the lowest objective; for the truncated quadratic, the global minimiser itself.

    That one is the mean of the points in some open interval of length 2 alpha, and there are at most 2n such sets: those that end at some
    point, and those that begin there. Each is summed relative to that point, so nothing cancels that should not; O(n^2), in one fused loop.
    """
    there = jnp.ones_like(x, bool) if w is None else jnp.broadcast_to(w > 0, x.shape)
    weight = None if w is None else jnp.broadcast_to(w, x.shape)[None]
    z = (x[None] - x[:, None]) / alpha[None, None]  # of point i seen from point j, [j, i]
    z = jnp.where(there[None], z, jnp.inf)
    if name == "welsch":
        bounded = jnp.clip(z, -1e3, 1e3)
        objective = jnp.sum(weighted(weight, PENALTIES[name].value(bounded * bounded)), axis=1)
        best = jnp.argmin(jnp.where(there, objective, jnp.inf), axis=0)
        return jnp.take_along_axis(x, best[None], axis=0)[0]
    candidates, values = [], []
    for side in (-1.0, 1.0):
        inside = (side * z >= 0) & (side * z < 2)
        distance = jnp.where(inside, z, 0)
        total = jnp.sum(weighted(weight, inside.astype(x.dtype)), axis=1)
        first = jnp.sum(weighted(weight, distance), axis=1)
        second = jnp.sum(weighted(weight, distance * distance), axis=1)
        safe = jnp.where(total > 0, total, 1)
        # Twice the objective, less the constant sum of all weights.
        values.append(jnp.where(there, second - first * first / safe - total, jnp.inf))
        candidates.append(x + alpha[None] * first / safe)
    values, candidates = (jnp.concatenate(pair) for pair in (values, candidates))
    best = jnp.argmin(values, axis=0)
    return jnp.take_along_axis(candidates, best[None], axis=0)[0]


class _Sums(NamedTuple):
    value: Float[Array, " c"]
    slope: Float[Array, " c"]
    weight: Float[Array, " c"]
    curvature: Float[Array, " c"]
    pull: Float[Array, " c"]  # the sum of the sizes of what cancels in `slope`


class _Descent(NamedTuple):
    u: Float[Array, " c"]
    sums: _Sums
    cautious: Bool[Array, " c"]  # the last step climbed
    stride: Float[Array, " c"]  # of a step that is not Newton's, in steps to the reweighted mean
    done: Bool[Array, " c"]
    steps: Int[Array, ""]


def _descend(penalty, max_steps, loop, x, w, alpha, start, finite):
    """The minimiser downhill from `start`."""
    eps = float(jnp.finfo(x.dtype).eps)
    mass = jnp.full_like(start, x.shape[0]) if w is None else jnp.broadcast_to(jnp.sum(w, axis=0), start.shape)

    def sums(u):
        z = scaled(u, x, alpha)
        s = z * z
        total = lambda terms: jnp.sum(weighted(w, terms), axis=0)
        weight = penalty.weight(s)
        curvature = total(weight - penalty.bend(s) * s)
        return _Sums(total(penalty.value(s)), total(weight * z), total(weight), curvature, total(weight * jnp.abs(z)))

    def body(state: _Descent) -> _Descent:
        at = state.sums
        weight = jnp.where(at.weight > 0, at.weight, 1)
        step = -alpha * at.slope / weight
        curved = at.curvature > 0
        ratio = weight / jnp.where(curved, at.curvature, 1)
        # The Newton step, not further than alpha: beyond, there may be another minimum.
        newton = curved & ((ratio <= 1.9) | (~state.cautious & (ratio * jnp.abs(step) <= alpha)))
        # Where the slope is small and the curvature negative, a little downhill of an inflection, 1.9 crawls: twice as far each time, at most
        # by alpha, as long as that leads nowhere but further down.
        far = jnp.minimum(state.stride, jnp.maximum(alpha / jnp.maximum(jnp.abs(step), 1e-30), 1.9))
        step = step * jnp.where(newton, ratio, far)
        # Nothing left but rounding: a minimum, or else a maximum, from which any small step goes down.
        still = jnp.abs(at.slope) <= eps * at.pull
        step = jnp.where(still & ~curved, eps**0.25 * alpha, step)
        u = state.u + step
        new = sums(u)
        lower = new.value <= at.value + 4 * eps * mass
        lower = lower & (newton | (far <= 1.9) | (at.slope * new.slope >= 0))
        # What rounding leaves of a step; the step is taken even so.
        settled = newton & (jnp.abs(step) <= 4 * eps * jnp.maximum(jnp.abs(u), alpha))
        if penalty.smooth and loop is lax_loop:
            # Newton's error is then the square of the step: |psi'''| <= 1.4. (Unrolled, the derivative is one step behind.)
            size = jnp.maximum(jnp.abs(u), eps**0.5 * alpha)
            settled = settled | (newton & (ratio * step * step <= eps * alpha * size))
        settled = settled | (still & curved) | (at.pull == 0)
        keep = state.done | ~(lower | settled)
        choose = lambda old, new: jnp.where(keep, old, new)
        stride = jnp.where(newton & keep, state.stride, jnp.where(keep | newton, 1.9, 2 * state.stride))
        return _Descent(
            choose(state.u, u),
            jax.tree.map(choose, at, new),
            keep & ~state.done,
            stride,
            state.done | settled,
            state.steps + 1,
        )

    first = jnp.full_like(start, 1.9)
    state = _Descent(start, sums(start), jnp.zeros_like(finite), first, ~finite, jnp.zeros((), jnp.int32))
    state = loop(lambda state: ~jnp.all(state.done), body, state, max_steps=max_steps)
    return state.u, state.steps, jnp.all(state.done)


# ----------------------------------------------------------------------------------------------------------------------
# Vectors
# ----------------------------------------------------------------------------------------------------------------------


def pulls(
    penalty: Penalty,
    u: Float[Array, " c"],
    x: Float[Array, "n c"],
    w: Float[Array, "n 1"] | None,
    alpha: Float[Array, ""],
) -> Float[Array, "n c"]:
    r"""The terms $w_i\,\omega_i z_i$ of (K1)."""
    z = scaled(u, x, jnp.broadcast_to(alpha, u.shape))
    return weighted(w, penalty.weight(_squares(z))[:, None] * z)


def _squares(z):
    # The penalties see no more than this (1e30 in float32), whose square root is far beyond where they have reached their limit.
    return jnp.minimum(jnp.sum(z * z, axis=1), float(jnp.finfo(z.dtype).max) ** 0.8)


class _VectorSums(NamedTuple):
    value: Float[Array, ""]
    slope: Float[Array, " c"]
    weight: Float[Array, ""]
    pull: Float[Array, ""]


class _VectorDescent(NamedTuple):
    u: Float[Array, " c"]
    sums: _VectorSums
    cautious: Bool[Array, ""]
    stride: Float[Array, ""]
    done: Bool[Array, ""]
    steps: Int[Array, ""]


def vector(
    name: str,
    x: Float[Array, "n c"],
    w: Float[Array, "n 1"] | None,
    alpha: Float[Array, ""],
    *,
    start: str,
    max_steps: int,
    loop: Callable,
) -> Pooled:
    r"""The minimiser of $\sum_i w_i \psi(\|u - x_i\|/\alpha)$. It carries no derivative of its own; unrolled, it is the reweighted mean, iterated.

    The Hessian is $\sum_i w_i (\omega_i I - \kappa_i z_i z_i^\top)$; where that is not positive definite, or the Newton step climbs, a step towards
    the reweighted mean is taken.
    """
    penalty = PENALTIES[name]
    ones = jnp.ones((x.shape[0], 1), x.dtype) if w is None else w
    mass = jnp.sum(ones)
    mean = jnp.sum(weighted(w, x), axis=0) / mass
    finite = jnp.all(jnp.isfinite(mean)) & jnp.isfinite(alpha)
    if name == "quadratic":
        mean = mean + jnp.sum(weighted(w, x - mean[None]), axis=0) / mass
        return Pooled(mean, jnp.zeros((), jnp.int32), jnp.ones((), bool), finite)
    if penalty.convex:
        first, before, converged = mean, 0, True
    elif start == "points":
        z = (x[None] - x[:, None]) / alpha
        objective = jnp.sum(penalty.value(jnp.sum(jnp.clip(z, -1e9, 1e9) ** 2, axis=2)) * ones[:, 0][None], axis=1)
        first = x[jnp.argmin(jnp.where(ones[:, 0] > 0, objective, jnp.inf))]
        before, converged = 0, True
    else:
        middle, before, converged, _ = vector("pseudo-huber", x, w, alpha, start=start, max_steps=max_steps, loop=loop)
        away = jnp.sum(((x - middle[None]) / alpha) ** 2, axis=1)
        first = x[jnp.argmin(jnp.where(ones[:, 0] > 0, away, jnp.inf))]
    eps = float(jnp.finfo(x.dtype).eps)

    def at(u):
        z = scaled(u, x, jnp.broadcast_to(alpha, u.shape))
        s = _squares(z)
        weight = weighted(w, penalty.weight(s)[:, None])
        terms = weight * z
        # `pull` decides and is not differentiated: unrolled, the root of zero would be.
        pull = alpha * jnp.sum(jnp.sqrt(jax.lax.stop_gradient(jnp.sum(terms * terms, axis=1)))) / mass
        value = jnp.sum(weighted(w, penalty.value(s)[:, None]))
        return _VectorSums(value, jnp.sum(terms, axis=0), jnp.sum(weight), pull)

    def newton_step(u, sums):
        z = scaled(u, x, jnp.broadcast_to(alpha, u.shape))
        bend = weighted(w, penalty.bend(_squares(z))[:, None])[:, 0]
        # Both by the sum of the weights, so that what is factorised is about 1.
        diagonal = jnp.broadcast_to(jnp.ones_like(alpha), u.shape)
        root = factorise(diagonal, grams=[Gram(z, -bend / sums.weight)])
        return -alpha * root.solve(sums.slope / sums.weight)

    def body(state: _VectorDescent) -> _VectorDescent:
        sums = state.sums
        weight = jnp.where(sums.weight > 0, sums.weight, 1)
        step = -alpha * sums.slope / weight
        length = lambda step: jax.lax.stop_gradient(jnp.max(jnp.abs(step)))
        newton, far = jnp.zeros((), bool), jnp.ones_like(weight)
        if loop is lax_loop:
            # As for columns, but for the 1.9.
            far = jnp.minimum(state.stride, jnp.maximum(alpha / jnp.maximum(length(step), 1e-30), 1))
            exact = newton_step(state.u, sums._replace(weight=weight))
            newton = jnp.all(jnp.isfinite(exact)) & ~state.cautious
            if not penalty.convex:
                newton = newton & (length(exact) <= alpha)
            step = jnp.where(newton, exact, far * step)
        u = state.u + step
        new = at(u)
        lower = new.value <= sums.value + 8 * eps * (mass + jnp.abs(sums.value))
        lower = lower & (newton | (far <= 1) | (sums.slope @ new.slope >= 0))
        size = jnp.maximum(length(u), sums.pull)
        settled = (
            (length(step) <= 4 * eps * size) | (newton & (length(step) <= eps**0.75 * size)) | jnp.all(sums.slope == 0)
        )
        keep = state.done | ~(lower | settled)
        choose = lambda old, new: jnp.where(keep, old, new)
        stride = jnp.where(newton & keep, state.stride, jnp.where(keep | newton, 1, 2 * state.stride))
        return _VectorDescent(
            choose(state.u, u),
            jax.tree.map(choose, sums, new),
            keep,
            stride,
            state.done | settled,
            state.steps + 1,
        )

    state = _VectorDescent(
        first, at(first), jnp.zeros((), bool), jnp.ones_like(mass), ~finite, jnp.zeros((), jnp.int32)
    )
    state = loop(lambda state: ~state.done, body, state, max_steps=max_steps)
    return Pooled(jnp.where(finite, state.u, jnp.nan), state.steps + before, state.done & converged, finite)
