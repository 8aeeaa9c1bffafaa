r"""Quadratic programs by products with their blocks: operator splitting, restarted and finished by Newton.

$$ \min_{z, v} \tfrac12 z^\top Q z + q^\top z \quad\text{subject to}\quad Kz = v, \; v \in C \tag{S} $$

with $K = [A; G; I]$ and $C$ a box: equations have equal sides, inequalities one. The alternating direction method of multipliers
(Stellato et al. 2020, arXiv:1711.08013: over-relaxed, a penalty $\rho$ a thousand times larger for equations) takes rounds of a
fixed number of iterations, each one linear solve by conjugate gradients from where the last one ended. After a round, $\rho$ is
balanced anew, certificates are looked for in what the round changed, and if the round has not changed the set of active
rows, Newton's method on the optimality conditions with that set is tried. If that solves the program, it is solved to rounding; if
it comes nearer, the next round starts from there; and its linear system is the one of the gradient.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float, Int

from .._linear.lanes import where_needed
from .._linear.matrix_free import Blocks, matrix_free_kkt, penalised, probes, scaled_blocks
from .._linear.norms import largest
from . import interior_point as ipm
from .quadratic_program import Answer

_ITERATIONS = 25  # a round
_RELAXATION = 1.6
_NEWTON = 6
_STIFF = 1e3


class Box(eqx.Module):
    """C, scaled, row by row; `compliance` lets a row be violated at a cost of |violation|^2 / (2 compliance)."""

    low: Float[Array, " rows"]
    up: Float[Array, " rows"]
    compliance: Float[Array, " rows"]

    def nearest(self, v):
        return jnp.clip(v, self.low, self.up)

    def size(self):
        finite = lambda side: jnp.where(jnp.isfinite(side), side, 0)
        return jnp.maximum(largest(finite(self.low)), largest(finite(self.up)))


class _Point(eqx.Module):
    z: Float[Array, " n"]
    v: Float[Array, " rows"]
    y: Float[Array, " rows"]


class _State(eqx.Module):
    at: _Point
    rho: Float[Array, ""]
    best: Float[Array, " size"]
    side: Int[Array, " rows"]
    error: Float[Array, ""]
    # The set that Newton was last tried with, and the error of the splitting then.
    tried: Int[Array, " rows"]
    tried_at: Float[Array, ""]
    code: Int[Array, ""]
    steps: Int[Array, ""]


def solve(
    Q: lx.AbstractLinearOperator,
    q: Float[Array, " n"],
    A: lx.AbstractLinearOperator | None,
    G: lx.AbstractLinearOperator | None,
    low: Float[Array, " rows"],
    up: Float[Array, " rows"],
    bounded: bool,
    compliance: float,
    guess: Float[Array, " size"] | None,
    residual: Callable,
    coefficients: Callable,
    max_steps: int,
    loop: Callable,
) -> Answer:
    """Solves (S); `low`, `up` over equations, inequalities and bounds.

    `residual(vector)` is the node's F in natural units, `coefficients(vector, side)` the alpha and beta of its linearisation.
    `max_steps` counts rounds of 25 iterations.
    """
    n, dtype = q.size, q.dtype
    eps = float(jnp.finfo(dtype).eps)
    # A row whose side is NaN, or that asks for the impossible, is bad data; so is an operator that maps a finite vector to NaN.
    finite = jnp.all(jnp.isfinite(q)) & jnp.all(low < jnp.inf) & jnp.all(up > -jnp.inf)
    blocks = scaled_blocks(Q, A, G, bounded, dtype)
    finite = finite & jnp.all(jnp.isfinite(blocks.hessian(probes(1, n, dtype)[0])))
    finite = finite & jnp.all(jnp.isfinite(blocks.rows(probes(1, n, dtype)[0])))
    row_scale, column_scale = blocks.row_scale(), blocks.column_scale()
    q = jnp.where(finite, row_scale[:n] * q, 0)
    clean = lambda side, value: jnp.where(finite, blocks.e * side, value)
    general = low.size - n * bounded
    soft = jnp.where(jnp.arange(low.size) < general, compliance * blocks.e**2 / blocks.c, 0)
    box = Box(clean(low, 0), clean(up, 0), soft)
    crossed = jnp.any(box.low > box.up)
    # An objective that overwhelms the sides, or the other way round: rho has to be found, and starts from the ratio.
    ratio = largest(q) / jnp.maximum(box.size(), eps)
    rho = jnp.where((ratio > 0) & jnp.isfinite(ratio), jnp.clip(0.1 * ratio, 1e-3, 1e3), 0.1)
    stiff = jnp.where(box.low == box.up, _STIFF, 1).astype(dtype)

    def measure(vector):
        """The error of a point in natural units: scaled, relative."""
        F = row_scale * residual(vector)
        v = vector / column_scale
        forces = (q, blocks.hessian(v[:n]), v[n:])
        tiny = jnp.finfo(dtype).tiny ** 0.5
        dual = largest(F[:n]) / jnp.maximum(largest(forces), tiny)
        return jnp.maximum(dual, largest(F[n:]) / jnp.maximum(jnp.maximum(largest(v[:n]), box.size()), tiny))

    def side_of(z, y, rho):
        """+1 at the upper side, -1 at the lower; equal sides count as the upper."""
        v = blocks.rows(z) - box.compliance * y
        side = jnp.where(y > rho * (box.up - v), 1, jnp.where(-y > rho * (v - box.low), -1, 0))
        return jnp.where(box.low == box.up, 1, side).astype(jnp.int32)

    def newton(z, y, side):
        """One step on the program in which every row stays on its side."""
        active = side != 0
        y = jnp.where(active, y, 0)
        start = column_scale * jnp.concatenate([z, y])
        kkt = matrix_free_kkt(blocks, *coefficients(start, side))
        limit = jnp.where(side == 1, box.up, box.low)
        gap = blocks.rows(z) - jnp.where(active, limit, 0) - box.compliance * y
        F = jnp.concatenate([blocks.hessian(z) + q + blocks.transpose(y), jnp.where(active, gap, 0)])
        # (J) in natural units takes F in natural units.
        step = kkt.solve(F / row_scale, loop, floor=largest((z, y)))
        new = start - step
        z, y = new[:n] / column_scale[:n], jnp.where(active, new[n:] / column_scale[n:], 0)
        return z, y, column_scale * jnp.concatenate([z, y])

    def finish(one, z, y, side, rho, best, best_side, error):
        """Newton until the set of active rows stays: the better of its points and `best`."""

        def body(carry):
            z, y, side, best, best_side, error, changed, _ = carry
            z, y, vector = newton(z, y, side)
            new = measure(vector)
            better = new < error
            best, best_side = jnp.where(better, vector, best), jnp.where(better, side, best_side)
            next_side = side_of(z, y, rho)
            # Far from the right set the changes do not die out: leave it to the splitting.
            wrong = jnp.sum(next_side != side)
            going = (wrong > 0) & (wrong <= changed) & jnp.isfinite(new)
            return z, y, next_side, best, best_side, jnp.where(better, new, error), wrong, going

        few = jnp.asarray(4 + side.size // 1000)
        carry = (one * z, one * y, side, best, best_side, error, few, jnp.ones((), bool))
        carry = loop(lambda carry: carry[-1], body, carry, max_steps=_NEWTON)
        return carry[3], carry[4], carry[5]

    def body(state):
        rho, start = state.rho, state.at
        weights = rho * stiff
        system = penalised(blocks, weights, 1e-6)

        def iteration(at, _):
            rhs = 1e-6 * at.z - q + blocks.transpose(weights * at.v - at.y)
            wrong = largest(blocks.hessian(at.z) + q + blocks.transpose(at.y))
            apart = largest(blocks.rows(at.z) - at.v)
            # An inexact solve is a perturbation of the dual residual: a tenth of what is there already.
            z = system.solve(rhs, at.z, rtol=eps, atol=0.1 * jnp.minimum(wrong, rho * apart) + eps * largest(q))
            v = _RELAXATION * blocks.rows(z) + (1 - _RELAXATION) * at.v
            shifted = v + at.y / weights
            nearest = box.nearest(shifted)
            give = weights * box.compliance
            new_v = nearest + (shifted - nearest) * (give / (1 + give))
            y = weights * (shifted - new_v)
            return _Point(_RELAXATION * z + (1 - _RELAXATION) * at.z, new_v, y), None

        at, _ = jax.lax.scan(iteration, start, length=_ITERATIONS)
        vector = column_scale * jnp.concatenate([at.z, at.y])
        error = measure(vector)
        side = jnp.where(box.low == box.up, 1, jnp.sign(at.y)).astype(jnp.int32)
        better = error < state.error
        best, best_side = jnp.where(better, vector, state.best), jnp.where(better, side, state.side)
        # Worth a try where the round has left the set alone.
        before = jnp.where(box.low == box.up, 1, jnp.sign(start.y)).astype(jnp.int32)
        settled = (jnp.mean(side != before) <= 0.002) & jnp.isfinite(error)
        # What did not work once does not work again from about the same point.
        settled = settled & (jnp.any(side != state.tried) | (error < 0.1 * state.tried_at))
        least = jnp.minimum(error, state.error)
        attempt = lambda one: finish(one, at.z, at.y, side, rho, best, best_side, least)
        polished, polished_side, least = where_needed(settled, attempt, (best, best_side, least), loop)
        # From a polished point that is better, the splitting goes on.
        jump = least < 0.1 * error
        scaled = polished / column_scale
        moved = _Point(scaled[:n], box.nearest(blocks.rows(scaled[:n])), scaled[n:])
        code = jnp.where(least <= eps**0.75, ipm.OPTIMAL, -1)
        proof, verdict = _certificate(blocks, box, q, start, at, elastic=compliance > 0)
        code = jnp.where(code == -1, verdict, code)
        code = jnp.where(jnp.isfinite(error), code, ipm.STALLED)
        apart = largest(blocks.rows(at.z) - at.v) / jnp.maximum(largest((blocks.rows(at.z), at.v)), eps)
        forces = (blocks.hessian(at.z), blocks.transpose(at.y), q)
        wrong = largest(forces[0] + forces[1] + q) / jnp.maximum(largest(forces), eps)
        factor = jnp.sqrt(jnp.clip(apart / jnp.maximum(wrong, eps), 1e-4, 1e4))
        factor = jnp.where((factor > 2) | (factor < 0.5), factor, 1)
        rho = jnp.clip(rho * factor, 1e-6, 1e6)
        next_at = jax.tree.map(lambda a, b: jnp.where(jump, a, b), moved, at)
        best = jnp.where((verdict != -1) & (code == verdict), proof, polished)
        tried, tried_at = jnp.where(settled, side, state.tried), jnp.where(settled, error, state.tried_at)
        code = code.astype(jnp.int32)
        return _State(next_at, rho, best, polished_side, least, tried, tried_at, code, state.steps + 1)

    zeros = jnp.zeros(n + low.size, dtype)
    vector = zeros if guess is None else jnp.where(jnp.all(jnp.isfinite(guess)), guess, 0)
    z, y = vector[:n] / column_scale[:n], vector[n:] / column_scale[n:]
    at = _Point(z, box.nearest(blocks.rows(z)), y)
    convex = _is_convex(blocks) if not lx.is_positive_semidefinite(Q) else jnp.ones((), bool)
    code = jnp.where(crossed, ipm.INFEASIBLE, -1)
    code = jnp.where(convex, code, ipm.INDEFINITE)
    code = jnp.where(finite, code, ipm.NONFINITE).astype(jnp.int32)
    error = jnp.where(finite, measure(vector), jnp.inf)
    none = jnp.where(box.low == box.up, 1, jnp.sign(y)).astype(jnp.int32)
    never = jnp.full_like(none, 2)
    state = _State(at, rho, vector, none, error, never, jnp.asarray(jnp.inf, dtype), code, jnp.zeros((), jnp.int32))
    end = loop(lambda state: state.code == -1, body, state, max_steps=max_steps)
    accepted = (end.code == -1) & (end.error <= eps**0.65)
    code = jnp.where(accepted, ipm.OPTIMAL, jnp.where(end.code == -1, ipm.OUT_OF_STEPS, end.code))
    best, y = end.best, end.best[n:]
    # A row is active if and only if its multiplier is not zero: F reads the set from the point.
    tiny = jnp.finfo(dtype).tiny ** 0.5 * column_scale[n:]
    snapped = jnp.where(end.side == 1, jnp.maximum(y, tiny), jnp.where(end.side == -1, jnp.minimum(y, -tiny), 0))
    free = (box.low == box.up) | (code != ipm.OPTIMAL)
    best = best.at[n:].set(jnp.where(free, y, snapped))
    return Answer(best, matrix_free_kkt(blocks, *coefficients(best, end.side)), code, end.steps)


def _certificate(blocks: Blocks, box: Box, q, before: _Point, after: _Point, elastic: bool):
    """(vector in natural units, INFEASIBLE or UNBOUNDED or -1): what a round has changed tends to a certificate, if there is one."""
    eps, n = float(jnp.finfo(q.dtype).eps), q.size
    bounded_below, bounded_above = jnp.isfinite(box.low), jnp.isfinite(box.up)
    # Multipliers y with K'y = 0 for which the sides add up to less than nothing. What is left of K'y refutes every z of entries up to
    # value / |K'y|_1: that must be far beyond the size of the sides.
    y = after.y - before.y
    y = jnp.where(bounded_above, y, jnp.minimum(y, 0))
    y = jnp.where(bounded_below, y, jnp.maximum(y, 0))
    finite = lambda side: jnp.where(jnp.isfinite(side), side, 0)
    value = -jnp.sum(finite(box.up) * jnp.maximum(y, 0) + finite(box.low) * jnp.minimum(y, 0))
    pull = jnp.sum(jnp.abs(blocks.transpose(y))) * box.size()
    infeasible = (value > 0) & (pull <= eps**0.5 * value) & (not elastic)
    y = y / jnp.where(value > 0, value, 1)
    # A direction in which nothing holds the objective: no row, and no curvature. The least value along the ray lies at
    # progress / curvature: that must be far beyond any size that the data have.
    z = after.z - before.z
    z = z / jnp.maximum(largest(z), jnp.finfo(q.dtype).tiny ** 0.5)
    progress, rows = -(q @ z), blocks.rows(z)
    blocked = jnp.maximum(jnp.where(bounded_above, rows, 0), jnp.where(bounded_below, -rows, 0))
    curvature = jnp.maximum(z @ blocks.hessian(z), 0)
    far = progress > eps**-0.75 * curvature * jnp.maximum(largest(q), box.size())
    downhill = progress > eps**0.25 * jnp.sqrt((q @ q) * (z @ z))
    unbounded = far & downhill & (largest(jnp.maximum(blocked, 0)) <= eps**0.6)
    z = z / jnp.where(progress > 0, progress, 1)
    code = jnp.where(infeasible, ipm.INFEASIBLE, jnp.where(unbounded, ipm.UNBOUNDED, -1))
    # h'lam + ... = -1 and q'z = -1 in natural units.
    proof = jnp.concatenate([jnp.zeros(n, q.dtype), blocks.e * y])
    ray = jnp.concatenate([blocks.c * blocks.d * z, jnp.zeros_like(y)])
    return jnp.where(infeasible, proof, ray), code


def _is_convex(blocks: Blocks) -> Bool[Array, ""]:
    """Whether conjugate gradients from a random start meet no direction of negative curvature in Q, in forty steps."""
    n, dtype = blocks.d.size, blocks.d.dtype
    shift = float(jnp.finfo(dtype).eps) ** 0.5

    start = probes(1, n, dtype)[0]
    eps, least = float(jnp.finfo(dtype).eps), float(jnp.finfo(dtype).eps) ** 2 * (start @ start)

    def body(carry, _):
        r, p, ok = carry
        Hp = blocks.hessian(p) + shift * p
        curvature, size = p @ Hp, r @ r
        # With few distinct eigenvalues it ends early; what goes on is rounding.
        going = (curvature > 0) & (size > least)
        negative = (size > least) & (curvature < -4 * eps * jnp.sqrt((p @ p) * (Hp @ Hp)))
        new = r - jnp.where(going, size / jnp.where(going, curvature, 1), 0) * Hp
        following = new + (new @ new) / jnp.where(size > 0, size, 1) * p
        return (jnp.where(going, new, r), jnp.where(going, following, p), ok & ~negative), None

    (_, _, ok), _ = jax.lax.scan(body, (start, start, jnp.ones((), bool)), length=min(n, 40))
    return ok
