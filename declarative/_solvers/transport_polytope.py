r"""Euclidean projection of a matrix onto a transport polytope, $P \ge 0$, $P1 = a$, $P^\top 1 = b$.

With multipliers f and g of the two sets of equations

$$ P_{ij} = \max(X_{ij} - f_i - g_j, 0), \qquad \textstyle\sum_j P_{ij} = a_i, \qquad \sum_i P_{ij} = b_j                    \tag{K} $$

**Solver.** A primal-dual interior-point method (Mehrotra 1992) on (K) with slacks, $P - X + f1^\top + 1g^\top = L$, $P \circ L = \mu$: 10 to 25
steps whatever the masses and the scale of X, where Newton's method on the dual of (K) takes hundreds if the masses are uneven. Its
systems are those of a bipartite graph, $P / (P + L)$. Then Newton's method on (K) itself, a step or two: given g a row is the projection of a
vector onto a simplex, so f is exact, and the entries that are positive decide on what is left.

**Derivative.** Of the support, which is locally constant, $\mathrm dP = W \circ (\mathrm dX - u1^\top - 1v^\top)$ with the system (B) of
`bipartite.py` for u and v. Where the support falls apart into components the system is singular, though P is not: $u_i + v_j$ inside of
a component is unique, and masses can only change by what keeps the two totals of each component equal; the pseudo-inverse is used, which
takes of any other change its orthogonal projection onto those.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._linear.bipartite import Bipartite, Components, bipartite_factor, components, damped_schur_solve, inverse

_POLISH = 3
_STEPS = 100  # four times what the hardest data were seen to take


class Plan(eqx.Module):
    """What is found: the plan, the multipliers, the error of the columns relative to the largest mass."""

    P: Float[Array, "n m"]
    f: Float[Array, " n"]
    g: Float[Array, " m"]
    error: Float[Array, ""]
    steps: Int[Array, ""]


def project(X: Float[Array, "n m"], a: Float[Array, " n"], b: Float[Array, " m"], max_steps: int) -> Plan:
    """By values only. The caller checks the data: finite, masses at least 0 of the same total."""
    n, m = X.shape
    if n < m:  # the smaller side is the one that is factorised
        plan = project(X.T, b, a, max_steps)
        return Plan(plan.P.T, plan.g, plan.f, plan.error, plan.steps)
    # Rows and columns of zero mass take no part, and what is added to a row or column of X makes no difference; masses in units of the largest.
    rows, columns = a > 0, b > 0
    used = rows[:, None] & columns[None, :]
    level = lambda values: jnp.where(jnp.isfinite(values), values, 0)
    top_f = level(jnp.max(jnp.where(used, X, -jnp.inf), axis=1))
    top_g = level(jnp.max(jnp.where(used, X - top_f[:, None], -jnp.inf), axis=0))
    unit = jnp.maximum(jnp.max(a), jnp.max(b))
    unit = jnp.where((unit > 0) & jnp.isfinite(unit), unit, 1)
    Z = jnp.where(used, X - top_f[:, None] - top_g[None, :], 0) / unit
    a, b = jnp.where(rows, a, 0) / unit, jnp.where(columns, b, 0) / unit
    active = jnp.all(jnp.isfinite(Z)) & jnp.all(jnp.isfinite(a)) & jnp.all(jnp.isfinite(b)) & jnp.any(used)
    g, steps = _interior(Z, a, b, used, active, min(max_steps, _STEPS))
    P, f, g, error = _polished(Z, a, b, used, g)
    f, g = unit * f + top_f, unit * g + top_g
    # Rows and columns without mass: the least multipliers that keep their entries at zero.
    f = jnp.where(rows, f, jnp.max(jnp.where(columns[None, :], X - g[None, :], -jnp.inf), axis=1))
    f = level(f)
    g = level(jnp.where(columns, g, jnp.max(X - f[:, None], axis=0)))
    return Plan(unit * P, f, g, error, steps)


class _State(eqx.Module):
    P: Float[Array, "n m"]
    L: Float[Array, "n m"]
    f: Float[Array, " n"]
    g: Float[Array, " m"]
    steps: Int[Array, ""]
    done: Bool[Array, ""]


def _interior(Z, a, b, used, active, max_steps: int) -> tuple[Float[Array, " m"], Int[Array, ""]]:
    """g, near the solution. Pairs that are not `used` have P = 0 and L = 1."""
    dtype = Z.dtype
    n, m = Z.shape
    tol = float(jnp.finfo(dtype).eps) ** 0.75
    count = jnp.maximum(jnp.sum(used.astype(dtype)), 1)
    whole = Components(jnp.zeros(n, jnp.int32), jnp.zeros(m, jnp.int32), 1)
    no_rows, no_columns = jnp.zeros_like(a), jnp.zeros_like(b)
    kept = lambda values: jnp.where(used, values, 0)
    tiny = float(jnp.finfo(dtype).tiny) ** 0.5

    def body(state: _State) -> _State:
        P, L, f, g = state.P, state.L, state.f, state.g
        over = jnp.where(used, 1 / jnp.where(used, P, 1), 0)
        mu = jnp.sum(P * L) / count
        off = kept(P - Z + f[:, None] + g[None, :] - L)
        missing_a, missing_b = a - jnp.sum(P, axis=1), b - jnp.sum(P, axis=0)
        weights = P / (P + L)
        factor = bipartite_factor(Bipartite(weights, no_rows, no_columns), whole, ~state.done)

        def direction(target):
            """Towards P L = target."""
            gain = over * (target - P * L) - off
            pull = weights * gain
            df, dg = factor.solve(jnp.sum(pull, axis=1) - missing_a, jnp.sum(pull, axis=0) - missing_b)
            dP = pull - weights * (df[:, None] + dg[None, :])
            return dP, kept(over * (target - P * L - L * dP)), df, dg

        def reach(dP, dL, part):
            fastest = jnp.maximum(jnp.max(-over * dP), jnp.max(-kept(dL / L)))
            return jnp.minimum(1, part / jnp.maximum(fastest, tiny))

        dP, dL, _, _ = direction(jnp.zeros_like(P))
        size = reach(dP, dL, 1.0)
        ahead = jnp.sum((P + size * dP) * (L + size * dL)) / count
        centring = (ahead / mu) ** 3
        dP, dL, df, dg = direction(kept(centring * mu - dP * dL))
        size = reach(dP, dL, 0.995)
        P, L, f, g = P + size * dP, L + size * dL, f + size * df, g + size * dg
        fine = jnp.isfinite(jnp.sum(P)) & jnp.isfinite(jnp.sum(L))
        small = jnp.sum(P * L) <= tol * jnp.sum(P * P)
        keep = lambda new, old: jnp.where(fine, new, old)
        return _State(
            keep(P, state.P), keep(L, state.L), keep(f, state.f), keep(g, state.g), state.steps + 1, ~fine | small
        )

    P = kept(a[:, None] * b[None, :] / jnp.where(jnp.sum(a) > 0, jnp.sum(a), 1))
    slack = jnp.maximum(0.1 * jnp.sum(-Z), jnp.sum(P)) / count
    f = jnp.max(jnp.where(used, Z - P, -jnp.inf), axis=1)
    f = jnp.where(a > 0, f, 0) + slack
    L = jnp.where(used, P - Z + f[:, None], 1)
    start = _State(P, L, f, no_columns, jnp.zeros((), jnp.int32), ~active)
    end = jax.lax.while_loop(lambda state: ~state.done & (state.steps < max_steps), body, start)
    return end.g, end.steps


def _polished(Z, a, b, used, g):
    """(P, f, g, error) of (K), after as many steps of Newton's method as make the error smaller."""
    columns = b > 0
    below = 2 * jnp.min(Z) - 2 * jnp.max(jnp.abs(g)) - 4
    zeros = jnp.zeros_like(a)

    def at(g):
        z = jnp.where(used, Z - g[None, :], below)
        f = _rows(z, jnp.where(a > 0, a, 1))
        P = jnp.where(used, jnp.maximum(z - f[:, None], 0), 0)
        gap = jnp.where(columns, jnp.sum(P, axis=0) - b, 0)
        return P, jnp.where(a > 0, f, 0), g, gap

    error = lambda point: jnp.max(jnp.abs(point[3]))

    def step(carry):
        point, k, _ = carry
        P, _, g, gap = point
        support = (P > 0).astype(Z.dtype)
        empty = (jnp.sum(support, axis=0) == 0).astype(Z.dtype)
        new = at(g + damped_schur_solve(Bipartite(support, zeros, empty), gap, jnp.zeros_like(gap), jnp.ones((), bool)))
        better = error(new) < error(point)
        return tuple(jnp.where(better, x, y) for x, y in zip(new, point, strict=True)), k + 1, better

    start = (at(g), jnp.zeros((), jnp.int32), jnp.ones((), bool))
    point, _, _ = jax.lax.while_loop(lambda carry: carry[2] & (carry[1] < _POLISH), step, start)
    return point[0], point[1], point[2], error(point)


def _rows(z: Float[Array, "n m"], a: Float[Array, " n"]) -> Float[Array, " n"]:
    """f with sum_j max(z_ij - f_i, 0) = a_i. Newton's method from below, where it is monotone and finite: the mass is convex in f."""

    def body(carry):
        f, before, _, steps = carry
        gap = z - f[:, None]
        on = gap > 0
        number = jnp.sum(on, axis=1, dtype=jnp.int32)
        missing = jnp.sum(jnp.where(on, gap, 0), axis=1) - a
        return f + missing / jnp.maximum(number, 1).astype(z.dtype), number, jnp.any(number != before), steps + 1

    # Rounding could make it go back and forth at the end.
    go_on = lambda carry: carry[2] & (carry[3] < z.shape[1] + 2)
    start = (jnp.max(z, axis=1) - a, jnp.zeros(a.size, jnp.int32), jnp.ones((), bool), jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(go_on, body, start)[0]


def moved(
    support: Bool[Array, "n m"], X: Float[Array, "n m"], a: Float[Array, " n"], b: Float[Array, " m"]
) -> tuple[Float[Array, "n m"], Float[Array, " n"], Float[Array, " m"]]:
    """The derivative of (P, f, g) along changes of the data: linear in them, symmetric, and to be differentiated as such."""
    weights = jax.lax.stop_gradient(support).astype(X.dtype)
    n, m = weights.shape
    system = Bipartite(weights, jnp.zeros(n, X.dtype), jnp.zeros(m, X.dtype))
    flipped = n < m
    parts = components(support, jnp.any(support, axis=1), jnp.any(support, axis=0))
    sizes = inverse(parts.sums(jnp.ones(n, X.dtype), jnp.ones(m, X.dtype)))

    def balanced(u, v):
        """Orthogonal to the null vectors (1, -1) of the components; zero at rows and columns without any entry."""
        of_rows, of_columns = parts.spread(parts.sums(u, -v) * sizes)
        inside = lambda labels, values: jnp.where(labels < parts.count, values, 0)
        return inside(parts.rows, u - of_rows), inside(parts.columns, v + of_columns)

    def solve(_, vector):
        p, q = balanced(vector[:n], vector[n:])
        if flipped:
            v, u = bipartite_factor(system.flipped, parts.flipped).solve(q, p)
        else:
            u, v = bipartite_factor(system, parts).solve(p, q)
        return jnp.concatenate(balanced(u, v))

    def product(vector):
        u, v = vector[:n], vector[n:]
        return jnp.concatenate([system.rows * u + weights @ v, system.columns * v + u @ weights])

    inner = weights * X
    rhs = jnp.concatenate([jnp.sum(inner, axis=1) - a, jnp.sum(inner, axis=0) - b])
    out = jax.lax.custom_linear_solve(product, rhs, solve=solve, symmetric=True)
    u, v = out[:n], out[n:]
    return inner - weights * (u[:, None] + v[None, :]), u, v
