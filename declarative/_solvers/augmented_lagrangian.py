r"""A local solver for smooth constrained problems of moderate size: augmented Lagrangian first, then Newton on the KKT conditions.

$$ \min_y f(y) \quad\text{subject to}\quad c_i(y) = 0 \;(i \le p), \qquad c_i(y) \le 0 \;(i > p) \tag{P} $$

*Far away*: for fixed multipliers and penalty $\rho$,

$$ \varphi(y) = f(y) + \tfrac\rho2 \sum_i t_i^2, \qquad t_i = c_i + \mu_i/\rho, \text{ its positive part for inequalities}, \tag{A1} $$

is minimised by Newton's method with a shift $\delta I$ that grows until $\nabla^2\varphi + \delta I$ has a Cholesky factor and the step a
decrease; then $\mu \leftarrow \rho t$ (A2). Constraint gradients may depend on one another, and multipliers need not be unique. Where
the violation stops falling, $\tfrac12\sum_i t_i^2$ at $\mu = 0$ is minimised alone: it either leads to a feasible point, from which all
starts again, or to a stationary point of infeasibility, which is the answer `INFEASIBLE`. Where iterates run off, $\rho$ is raised; if they
run off all the same, with constraints that hold, it is `UNBOUNDED`.

*Close by*: Newton on $\nabla f + \sum_i \mu_i \nabla c_i = 0$, $c_i = 0$ for the constraints with $\mu_i + c_i > 0$ (an equation always), $\mu_i = 0$
for the others (the primal-dual active set method). The system is the bordered one, since the Hessian may be indefinite, with a
$-\delta$ of a few roundings in the corner so that dependent rows do not make it singular; it converges to rounding.

*At the end*: the Hessian of the Lagrangian on the null space of the gradients of active constraints. Negative curvature there is a way
down, and the solve starts once more from a point that way; likewise from a point of infeasibility that is a saddle.

All is done in scaled quantities: $y$ in units of a length seen from the guess, $f$ and every $c_i$ divided by the norms of their
gradients, all of it again from where the last round ended.

Differs from ALGENCAN (Andreani, Birgin, Martinez & Schuverdt 2008, *On augmented Lagrangian methods with general lower-level
constraints*, whose multiplier safeguards and penalty rule are ours): Newton steps with exact Hessians inside; infeasibility is
certified by a phase of its own; the end game is Newton. Polishing with the active set: Hintermueller, Ito & Kunisch 2002.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._linear.dense import inverse
from .._linear.lanes import over_lanes
from .._linear.norms import largest
from .._linear.scaling import power_of_two

OPTIMAL, INFEASIBLE, UNBOUNDED, INDEFINITE, STALLED, OUT_OF_STEPS, NONFINITE = range(7)
_RUNNING = -1

_ROUNDS = 3
_POLISH = 12
_PENALTY = 10.0  # the first one, in scaled quantities
_LENGTHS = (1.0, 0.25, 4.0, 16.0)  # of a step, the first one preferred
_ROOM = 10.0  # how much further than the guess the free minimiser may set the length


class Answer(eqx.Module):
    """`code` is one of the numbers above; `error` is relative, in scaled quantities."""

    y: Float[Array, " n"]
    multipliers: Float[Array, " q"]
    code: Int[Array, ""]
    steps: Int[Array, ""]
    error: Float[Array, ""]
    length: Float[Array, ""]


class Scaled(eqx.Module):
    """(P) in the unit u = y / length, with f and c divided by the norms of their gradients; powers of two throughout."""

    objective: Callable = eqx.field(static=True)
    constraints: Callable = eqx.field(static=True)
    equations: int = eqx.field(static=True)
    length: Float[Array, ""]
    of_objective: Float[Array, ""]
    of_constraints: Float[Array, " q"]

    @property
    def equation(self):
        return np.arange(self.of_constraints.size) < self.equations

    def f(self, u):
        return self.of_objective * self.objective(self.length * u)

    def c(self, u):
        return self.of_constraints * self.constraints(self.length * u)

    def lagrangian(self, u, mu):
        return self.f(u) + mu @ self.c(u)

    def violation(self, c):
        return jnp.where(self.equation, jnp.abs(c), jnp.maximum(c, 0))

    def augmented(self, u, mu, rho, weight):
        """(A1), f times `weight`; and t."""
        t = self.c(u) + mu / rho
        t = jnp.where(self.equation, t, jnp.maximum(t, 0))
        return weight * self.f(u) + rho / 2 * (t @ t), t


class _Search(eqx.Module):
    """The state of (A1)-(A2). `base`: where the last update of the multipliers was."""

    u: Float[Array, " n"]
    mu: Float[Array, " q"]
    base: Float[Array, " n"]
    rho: Float[Array, ""]
    shift: Float[Array, ""]
    inner: Float[Array, ""]
    violation: Float[Array, ""]
    restoring: Bool[Array, ""]
    restored: Int[Array, ""]
    escapes: Int[Array, ""]
    stuck: Int[Array, ""]
    code: Int[Array, ""]
    steps: Int[Array, ""]


class _Round(eqx.Module):
    y: Float[Array, " n"]
    multipliers: Float[Array, " q"]
    start: Float[Array, " n"]
    code: Int[Array, ""]
    steps: Int[Array, ""]
    error: Float[Array, ""]
    length: Float[Array, ""]
    rounds: Int[Array, ""]
    again: Bool[Array, ""]


def solve(
    objective: Callable,
    constraints: Callable,
    equations: int,
    y0: Float[Array, " n"],
    multipliers0: Float[Array, " q"],
    max_steps: int,
    loop: Callable,
) -> Answer:
    """Solves (P) from a guess. `constraints(y)` is the vector c, whose first `equations` entries are equations."""
    zero = jnp.zeros((), jnp.int32)
    infinite = jnp.full((), jnp.inf, y0.dtype)
    start = _Round(y0, multipliers0, y0, zero + STALLED, zero, infinite, infinite, zero, jnp.ones((), bool))

    def body(at: _Round) -> _Round:
        problem = scale(objective, constraints, equations, at.start)
        eps = float(jnp.finfo(y0.dtype).eps)
        # Each round asks for more before it hands over to Newton.
        tol = eps**0.4 * 0.03 ** at.rounds.astype(y0.dtype)
        mu0 = at.multipliers * problem.of_objective / problem.of_constraints
        mu0 = jnp.where(jnp.isfinite(mu0), mu0, 0)
        found = search(problem, at.start / problem.length, mu0, tol, max_steps - at.steps, loop)
        u, mu, error = polish(problem, found.u, found.mu, found.code == OPTIMAL, loop)
        solved = error <= eps**0.5
        lowest, direction = curvature(problem, u, mu, found.code == INFEASIBLE)
        saddle = (solved | (found.code == INFEASIBLE)) & (lowest < 0)
        code = jnp.where((found.code == OPTIMAL) & ~solved, STALLED, found.code)
        code = jnp.where((found.code == OPTIMAL) & saddle, INDEFINITE, code)
        loose = (found.code == OPTIMAL) & (error > 10 * eps**0.75)
        again = (saddle | loose | (code == STALLED)) & (at.rounds + 1 < _ROUNDS) & (at.steps + found.steps < max_steps)
        y = problem.length * u
        # A round that was only to gain digits does not lose the answer of the one before.
        worse = (at.code == OPTIMAL) & ~((code == OPTIMAL) & (error < at.error))
        keep = lambda new, old: jnp.where(worse, old, new)
        return _Round(
            y=keep(y, at.y),
            multipliers=keep(mu * problem.of_constraints / problem.of_objective, at.multipliers),
            start=jnp.where(saddle, problem.length * (u + 0.1 * direction), y),
            code=keep(code, at.code),
            steps=at.steps + found.steps,
            error=keep(error, at.error),
            length=problem.length,
            rounds=at.rounds + 1,
            again=again,
        )

    out = loop(lambda at: at.again, body, start, max_steps=_ROUNDS)
    return Answer(out.y, out.multipliers, out.code, out.steps, out.error, out.length)


def recover(
    objective: Callable, constraints: Callable, equations: int, y, rtol: float | None, loop: Callable
) -> Answer:
    """Multipliers for a solution that is known to `rtol`: the least-squares ones of (K1), not negative, of constraints that it touches."""
    problem = scale(objective, constraints, equations, y)
    eps = float(jnp.finfo(y.dtype).eps)
    accuracy = eps**0.5 if rtol is None else max(eps**0.5, 10 * rtol)
    u = y / problem.length
    c, slope = problem.c(u), jax.grad(problem.f)(u)
    q = c.size
    mu, active = jnp.zeros_like(c), jnp.ones(q, bool)
    if q:
        rows = jax.jacfwd(problem.c)(u)
        touching = problem.equation | (c > -accuracy * jnp.maximum(largest(u), 1))

        def body(carry):
            _, active, _, count = carry
            held = jnp.where(active[:, None], rows, 0)
            # A shift of a few roundings: rows that depend on one another share their multiplier.
            shift = jnp.diag(jnp.where(active, eps**0.75, 1).astype(y.dtype))
            approximate, right = inverse(held @ held.T + shift), -(held @ slope)
            mu = approximate @ right
            for _ in range(2):
                mu = mu + approximate @ (right - held @ (mu @ held) - jnp.where(active, 0, mu))
            pull = rows @ (slope + mu @ held)
            new = problem.equation | touching & jnp.where(active, mu > 0, pull < -(eps**0.5) * largest(slope))
            return mu, new, jnp.any(new != active), count + 1

        start = (mu, touching, jnp.ones((), bool), jnp.zeros((), jnp.int32))
        mu, _, _, _ = loop(lambda carry: carry[2] & (carry[3] < 2 * q + 2), body, start, max_steps=None)
        mu = jnp.where(problem.equation, mu, jnp.maximum(mu, 0))
        active = problem.equation | (mu > 0)
    error = _error(problem, u, mu, active, _linearised(problem, u, mu))
    lowest, _ = curvature(problem, u, mu, jnp.zeros((), bool), accuracy)
    code = jnp.where(error <= accuracy, jnp.where(lowest < 0, INDEFINITE, OPTIMAL), STALLED)
    code = jnp.where(jnp.isfinite(error), code, NONFINITE).astype(jnp.int32)
    mu = mu * problem.of_constraints / problem.of_objective
    return Answer(y, mu, code, jnp.zeros((), jnp.int32), error, problem.length)


def scale(objective, constraints, equations, y) -> Scaled:
    """Units from the slopes and curvatures at a guess, and at a point beside it, where the guess may be a stationary point."""
    n, dtype = y.size, y.dtype
    one = jnp.ones((), dtype)
    rng = np.random.default_rng(0)
    signs = rng.choice([-1.0, 1.0], n)
    probe = jnp.asarray(signs * rng.uniform(0.5, 1.5, n), dtype)
    both = lambda y: jnp.append(constraints(y), objective(y))
    slopes = lambda y: jnp.sqrt(jnp.sum(jax.jacrev(both)(y) ** 2, axis=1))
    value, first = both(y), slopes(y)
    # Of one entry along a direction of about unit size in every variable, and as an even sum over the variables that is |c''| / sqrt(n).
    second = jnp.abs(jax.jvp(lambda y: jax.jvp(both, (y,), (probe,))[1], (y,), (probe,))[1]) / n
    usable = lambda x: jnp.where(jnp.isfinite(x), x, 0)
    # The positive root of slope L + curvature L^2 / 2 = |c|.
    root = first[:-1] + jnp.sqrt(first[:-1] ** 2 + 2 * second[:-1] * jnp.abs(value[:-1]))
    distance = usable(2 * jnp.abs(value[:-1]) / jnp.where(root > 0, root, jnp.inf))
    equation = np.arange(value.size - 1) < equations
    ahead = jnp.where(equation | (value[:-1] > 0), distance, 0)
    length = jnp.maximum(usable(largest(y)), jnp.max(ahead, initial=0))
    free = usable(first[-1] / jnp.where(second[-1] > 0, second[-1], jnp.inf))
    length = jnp.where(length > 0, jnp.clip(free, length, _ROOM * length), free)
    nearest = jnp.min(jnp.where(distance > 0, distance, jnp.inf), initial=jnp.inf)
    length = jnp.where(length > 0, length, jnp.where(jnp.isfinite(nearest), nearest, one))
    length = 1 / power_of_two(length)
    size = jnp.maximum(usable(first), usable(slopes(y + 0.1 * length * probe)))
    # One after the other: the product may lie outside of what float32 can scale by.
    inverse_size = power_of_two(size) * power_of_two(length)
    return Scaled(objective, constraints, equations, length, inverse_size[-1], inverse_size[:-1])


def search(problem: Scaled, u, mu, tol, max_steps, loop) -> _Search:
    """(A1) and (A2), until the KKT conditions hold to `tol`."""
    dtype = u.dtype
    eps = float(jnp.finfo(dtype).eps)
    number = lambda value: jnp.asarray(value, dtype)
    zero, one = jnp.zeros((), jnp.int32), jnp.ones((), dtype)
    steepest, far, cap = 1 / eps**0.6, number(3 / eps**0.5), 10 / eps**0.5
    far = far * jnp.maximum(largest(u), 1)
    # Off any point that symmetry makes stationary, but no better than the points around it.
    rng = np.random.default_rng(1)
    off = u + eps**0.3 * jnp.asarray(rng.uniform(0.5, 1.5, u.size) * rng.choice([-1.0, 1.0], u.size), dtype)
    inside = jnp.isfinite(problem.augmented(off, mu, one, one)[0])
    u = jnp.where(inside, off, u)
    first, at_first = problem.f(u), jax.grad(problem.lagrangian)(u, mu)
    lengths = jnp.asarray(_LENGTHS, dtype)
    usable = jnp.isfinite(first) & jnp.all(jnp.isfinite(problem.c(u))) & jnp.all(jnp.isfinite(at_first))
    state = _Search(
        u=u,
        mu=mu,
        base=u,
        rho=_PENALTY * one,
        shift=number(0.1),
        inner=number(0.1),
        violation=number(jnp.inf),
        restoring=jnp.zeros((), bool),
        restored=zero,
        escapes=zero,
        stuck=zero,
        code=jnp.where(usable, _RUNNING, NONFINITE).astype(jnp.int32),
        steps=zero,
    )

    def body(s: _Search) -> _Search:
        weight = jnp.where(s.restoring, 0, 1).astype(dtype)
        function = lambda u: problem.augmented(u, s.mu, s.rho, weight)
        (value, t), gradient = jax.value_and_grad(function, has_aux=True)(s.u)
        _, along = jax.linearize(jax.grad(lambda u: function(u)[0]), s.u)
        hessian = jax.vmap(along, out_axes=1)(jnp.eye(u.size, dtype=dtype))
        slope = largest(gradient)
        violation = largest(problem.violation(problem.c(s.u)))

        # A Newton step.
        size = largest(hessian) + slope / jnp.maximum(largest(s.u), 1)
        newton = _shifted_solve(hessian, s.shift * size, gradient)
        values = jax.vmap(lambda length: function(s.u + length * newton)[0])(lengths)
        decreases = jnp.where(jnp.isfinite(values), value - values, -jnp.inf)
        # The shift is a guess of how far the quadratic model holds: a quarter of the step or several times as much may be better.
        best = jnp.argmax(decreases)
        best = jnp.where(decreases[0] >= 0.9 * decreases[best], 0, best)
        step = lengths[best] * newton
        new, new_value, decrease = s.u + step, values[best], value - values[best]
        new_gradient = jax.grad(lambda u: function(u)[0])(new)
        predicted = -(gradient @ step) - step @ (hessian @ step) / 2
        # Of a difference of values that are nearly equal the last digits say nothing: there the slope decides.
        noise = 10 * eps * (jnp.abs(value) + jnp.abs(new_value))
        flat = (jnp.abs(decrease) <= noise) & (largest(new_gradient) <= slope)
        moved = (predicted > 0) & jnp.isfinite(new_value) & ((decrease > 1e-4 * predicted) | flat)
        moved = moved & jnp.all(jnp.isfinite(new_gradient))
        good = moved & (lengths[best] >= 1) & ((decrease > 0.5 * predicted) | flat)
        poor = moved & ~flat & ((decrease < 0.2 * predicted) | (lengths[best] < 1))
        shift = jnp.where(good, s.shift * jnp.where(lengths[best] > 1, 0.1, 0.2), s.shift)
        shift = jnp.where(poor, 4 * s.shift, shift)
        shift = jnp.clip(jnp.where(moved, shift, 5 * jnp.maximum(s.shift, 1e-4)), eps**1.5, 1e12)
        stuck = ~moved & (s.shift >= 1e10)

        # The end of an inner minimisation.
        inner = jnp.where(s.restoring, 0, s.inner)
        still = (slope <= inner) | stuck
        update = still & ~s.restoring
        mu = jnp.clip(s.rho * t, -cap, cap)
        complementary = jnp.where(problem.equation, t - s.mu / s.rho, jnp.maximum(t - s.mu / s.rho, -s.mu / s.rho))
        progress = jnp.maximum(largest(complementary), violation)
        solved = update & (slope <= tol * (1 + largest(mu))) & (progress <= tol)
        slow = update & ~solved & (progress > 0.25 * s.violation)
        hopeless = slow & (progress > 0.9 * s.violation) & (s.rho >= 1e3)
        restore = update & ~solved & (violation > tol) & (hopeless | (s.rho >= steepest)) & (s.restored < 2)
        exhausted = update & ~solved & ~restore & (s.rho >= steepest) & (progress > 0.25 * s.violation)
        gave_up = stuck & update & ~solved & (s.stuck >= 5)

        # The end of a restoration.
        feasible = s.restoring & (violation <= 0.1 * tol)
        pushed = slope <= eps**0.5 * violation
        hemmed = s.restoring & ~feasible & (pushed | (stuck & (slope <= eps**0.4 * violation)))
        lost = s.restoring & ~feasible & ~hemmed & stuck

        # Iterates that run off.
        off = ~still & moved & (largest(new) > far)
        held = largest(problem.violation(problem.c(new))) <= 1e-3 * largest(new)
        falls = off & ~s.restoring & held & (problem.f(new) < problem.f(s.base) - 10)
        escape = off & ~falls & (s.escapes < 2) & ~s.restoring
        gone = off & ~escape

        code = jnp.where(s.steps + 1 >= max_steps, OUT_OF_STEPS, _RUNNING)
        code = jnp.where(gone, jnp.where(falls, UNBOUNDED, STALLED), code)
        code = jnp.where(lost | exhausted | gave_up, STALLED, code)
        code = jnp.where(hemmed, INFEASIBLE, code)
        code = jnp.where(solved, OPTIMAL, code)
        anew = restore | feasible
        pick = lambda cases, default: jnp.select([case for case, _ in cases], [then for _, then in cases], default)
        no = jnp.zeros_like
        return _Search(
            u=pick([(escape, s.base), (moved & ~still & ~feasible & ~hemmed, new)], s.u),
            mu=pick([(anew, no(mu)), (update, mu)], s.mu),
            base=jnp.where(update | feasible, s.u, s.base),
            rho=pick(
                [
                    (restore, number(1)),
                    (feasible, number(100 * _PENALTY)),
                    (escape, 100 * s.rho),
                    (slow, jnp.minimum(10 * s.rho, steepest)),
                ],
                s.rho,
            ),
            shift=jnp.where(anew | escape | (update & stuck), number(0.1), shift),
            inner=pick(
                [(anew, number(0.1)), (update, jnp.maximum(tol, jnp.minimum(0.1 * s.inner, progress)))], s.inner
            ),
            violation=pick([(anew, number(jnp.inf)), (update, progress)], s.violation),
            restoring=(s.restoring | restore) & ~feasible,
            restored=s.restored + jnp.where(restore, 1, 0),
            escapes=s.escapes + jnp.where(escape, 1, 0),
            stuck=s.stuck + jnp.where(stuck & update, 1, 0),
            code=code.astype(jnp.int32),
            steps=s.steps + 1,
        )

    return loop(lambda s: s.code == _RUNNING, body, state, max_steps=None)


@over_lanes
def _shifted_solve(matrix, shift, gradient):
    """-(matrix + shift I)^-1 gradient; NaN if that is not positive definite."""
    matrix = (matrix + matrix.T) / 2 + shift * jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    root = jax.lax.linalg.cholesky(matrix, symmetrize_input=False)
    solve = lambda b, transpose: jax.lax.linalg.triangular_solve(
        root, b, left_side=True, lower=True, transpose_a=transpose
    )
    return -solve(solve(gradient[:, None], False), True)[:, 0]


def polish(problem: Scaled, u, mu, needed, loop):
    """Newton on the KKT conditions of the active set, which every step may change; the best point of all, and its error."""
    n, dtype = u.size, u.dtype
    eps = float(jnp.finfo(dtype).eps)
    soft = eps**0.6
    zero = jnp.zeros((), jnp.int32)

    def body(carry):
        u, mu, best, idle, count = carry
        active = problem.equation | (mu + problem.c(u) > 0)
        mu = jnp.where(active, mu, 0)
        linearised = _linearised(problem, u, mu)
        gradient, c, hessian, jacobian = linearised
        error = _error(problem, u, mu, active, linearised)
        better = error < best[2]
        idle = jnp.where(error < 0.5 * best[2], 0, idle + 1)
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), (u, mu, error), best)
        rows = jnp.where(active[:, None], jacobian, 0)
        corner = jnp.diag(jnp.where(active, -soft, 1).astype(dtype))
        top = hessian + soft * jnp.maximum(largest(hessian), 1e-3 * largest(jacobian)) * jnp.eye(n, dtype=dtype)
        system = jnp.concatenate(
            [jnp.concatenate([top, rows.T], axis=1), jnp.concatenate([rows, corner], axis=1)], axis=0
        )
        rhs = -jnp.concatenate([gradient, jnp.where(active, c, 0)])
        approximate = inverse(system)
        step = approximate @ rhs
        step = step + approximate @ (rhs - system @ step)
        finite = jnp.all(jnp.isfinite(step))
        idle = jnp.where(finite & (error > 0), idle, _POLISH)
        step = jnp.where(finite, step, 0)
        return u + step[:n], mu + step[n:], best, idle, count + 1

    infinite = jnp.full((), jnp.inf, dtype)
    carry = (u, mu, (u, mu, infinite), zero, jnp.where(needed, 0, _POLISH).astype(jnp.int32))
    out = loop(lambda carry: (carry[3] < 2) & (carry[4] < _POLISH), body, carry, max_steps=_POLISH)
    return out[2]


def _linearised(problem: Scaled, u, mu):
    """Gradient of the Lagrangian, c, and the derivatives of both in u."""
    pair = lambda u: (jax.grad(problem.lagrangian)(u, mu), problem.c(u))
    (gradient, c), along = jax.linearize(pair, u)
    hessian, jacobian = jax.vmap(along, out_axes=1)(jnp.eye(u.size, dtype=u.dtype))
    return gradient, c, (hessian + hessian.T) / 2, jacobian


def _error(problem: Scaled, u, mu, active, linearised):
    """Of the KKT conditions, each by the size of the terms that cancel in it or by what moving y by its own size would do."""
    gradient, c, hessian, jacobian = linearised
    tiny = jnp.finfo(u.dtype).tiny
    reach = jnp.maximum(largest(u), 1)
    force = jnp.abs(mu) @ jnp.abs(jacobian)
    size = jnp.maximum(jnp.maximum(largest(jax.grad(problem.f)(u)), largest(force)), largest(hessian) * reach)
    stationarity = largest(gradient) / jnp.maximum(size, tiny)
    allowed = jnp.sum(jnp.abs(jacobian), axis=1) * reach
    miss = jnp.where(active, jnp.abs(c), jnp.maximum(c, 0))
    feasibility = largest(jnp.where(miss == 0, 0, miss / jnp.maximum(allowed, tiny)))
    wrong = jnp.where(problem.equation, 0, jnp.maximum(-mu, 0))
    sign = largest(wrong) / jnp.maximum(largest(mu), tiny)
    return jnp.maximum(stationarity, jnp.maximum(feasibility, sign))


def curvature(problem: Scaled, u, mu, infeasible, accuracy: float | None = None):
    """The least curvature, 0 if it is lost in rounding, and its direction of unit size, heading into the feasible set.

    Of the Lagrangian on the null space of the gradients of equations and of constraints with positive multipliers; of the violation
    at a point of infeasibility. Where constraints are weakly active this asks for more than a minimum needs.
    """
    dtype = u.dtype
    eps = float(jnp.finfo(dtype).eps)
    gradient, c, hessian, jacobian = _linearised(problem, u, mu)
    norms = jnp.sqrt(jnp.sum(jacobian**2, axis=1))
    used = problem.equation | (mu > 0)
    rows = jnp.where(used[:, None], jacobian, 0) / jnp.where(norms > 0, norms, 1)[:, None]
    total = lambda u: jnp.sum(problem.violation(problem.c(u)) ** 2) / 2
    of_violation = jax.hessian(total)(u)
    lowest, direction = _reduced(rows, jnp.where(infeasible, of_violation, hessian), infeasible)
    size = jnp.sqrt(jnp.sum(jnp.where(infeasible, of_violation, hessian) ** 2))
    floor = eps**0.5 if accuracy is None else accuracy
    lowest = jnp.where(lowest < -floor * jnp.maximum(size, jnp.finfo(dtype).tiny), lowest, 0)
    near = jnp.where(~problem.equation & (c > -(eps**0.5)), 1, 0).astype(dtype)
    into = (near @ jacobian) @ direction
    into = jnp.where(into != 0, into, gradient @ direction)
    direction = jnp.where(into > 0, -direction, direction)
    return lowest, jnp.where(jnp.isfinite(direction), direction, 0)


@over_lanes
def _reduced(rows, matrix, whole):
    """The least eigenvalue, with its vector, of a symmetric matrix on the null space of the rows, or on the whole space."""
    n = matrix.shape[0]
    eps = float(jnp.finfo(matrix.dtype).eps)
    values, vectors = jnp.linalg.eigh(rows.T @ rows)
    keep = jnp.where(whole | (values <= n * eps**0.75), 1, 0).astype(matrix.dtype)
    basis = vectors * keep[None, :]
    # What is not in the null space gets the largest curvature there is.
    top = jnp.sqrt(jnp.sum(matrix**2)) + jnp.finfo(matrix.dtype).tiny
    inside = basis.T @ matrix @ basis + jnp.diag((1 - keep) * top)
    values, inner = jnp.linalg.eigh((inside + inside.T) / 2)
    return values[0], basis @ inner[:, 0]
