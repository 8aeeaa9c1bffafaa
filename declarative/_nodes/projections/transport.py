r"""Matrices with given row and column sums: the transport polytopes, and the Birkhoff polytope among them.

**Conditions.** $P_{ij} - \max(X_{ij} - f_i - g_j, 0) = 0$ (K1), $P1 - a = 0$, $P^\top 1 - b = 0$ (K2): the multiplier is the pair (f, g). They are
unique only as far as the support of P is connected; P always is. **Solver and gradient:** `_solvers/transport_polytope.py`.
"""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._core.implicit import detach
from ..._core.precision import full_precision
from ..._linear.bipartite import components
from ..._solvers.transport_polytope import Plan, moved, project
from .sets import AbstractSet, ProjectionPoint, as_run, parameter, pinned, status


class TransportPolytope(AbstractSet):
    r"""The transport plans $\{P \ge 0,\ P1 = a,\ P^\top 1 = b\}$.

    Not differentiable where $X_{ij} = f_i + g_j$: such an entry counts as zero. Where the support of P falls apart into components,
    masses can only change by what keeps the two totals of each the same, and the derivative is that of the nearest such change.

    **Arguments:** `a` (n,) and `b` (m,), at least 0, of the same total within the square root of the dtype's precision; else `infeasible`.
    """

    a: Float[Array, " n"]
    b: Float[Array, " m"]

    rank: ClassVar[int] = 2
    square: ClassVar[bool] = False
    fails_as_nan: ClassVar[bool] = False

    def __init__(self, a: Any, b: Any):
        self.a, self.b = parameter(a, "a", (1,)), parameter(b, "b", (1,))

    def run(self, x, max_steps):
        return _run(x.x, *_masses(self, x.x), max_steps)

    def optimality(self, y, x):
        return _optimality(y, x.x, *_masses(self, x.x))

    def kink_distance(self, y, x):
        return _kink_distance(y, x.x)

    def check_size(self, shape):
        if shape != (self.a.size, self.b.size):
            raise ValueError(f"a and b have {self.a.size} and {self.b.size} entries, for a matrix of shape {shape}.")


class Birkhoff(AbstractSet):
    r"""The doubly stochastic matrices, $\{P \ge 0,\ P1 = 1,\ P^\top 1 = 1\}$: see `TransportPolytope`."""

    rank: ClassVar[int] = 2
    fails_as_nan: ClassVar[bool] = False

    def run(self, x, max_steps):
        return _run(x.x, *_ones(x.x), max_steps)

    def optimality(self, y, x):
        return _optimality(y, x.x, *_ones(x.x))

    def kink_distance(self, y, x):
        return _kink_distance(y, x.x)


def _masses(onto: TransportPolytope, X):
    return onto.a.astype(X.dtype), onto.b.astype(X.dtype)


def _ones(X):
    return jnp.ones(X.shape[0], X.dtype), jnp.ones(X.shape[1], X.dtype)


def _run(X, a, b, max_steps):
    plan = _projected(X, a, b, max_steps)
    fixed_a, fixed_b = detach(a), detach(b)
    tolerance = float(jnp.finfo(X.dtype).eps) ** 0.5
    total, other = jnp.sum(fixed_a), jnp.sum(fixed_b)
    finite = jnp.all(jnp.isfinite(X)) & jnp.all(jnp.isfinite(fixed_a)) & jnp.all(jnp.isfinite(fixed_b))
    feasible = (
        jnp.all(fixed_a >= 0)
        & jnp.all(fixed_b >= 0)
        & (jnp.abs(total - other) <= tolerance * jnp.maximum(total, other))
    )
    code = status(finite=finite, feasible=feasible, converged=plan.error <= tolerance)
    fail = jnp.where(code == 0, 0, jnp.nan).astype(X.dtype)
    return as_run(ProjectionPoint(plan.P + fail, (plan.f + fail, plan.g + fail)), code, plan.steps)


def _optimality(y, X, a, b):
    P, (f, g) = y.point, y.multiplier
    inside = ~(detach(P) <= 0)  # with NaN inside, so that a failed element passes it on to its data
    piece = pinned(jnp.where(inside, X - f[:, None] - g[None, :], 0), jnp.maximum(X - f[:, None] - g[None, :], 0))
    # What (K1)-(K2) do not say of the multipliers: a constant for each component of the support, which may have any value. Its derivative
    # alone is added, so that the Jacobian is nonsingular.
    parts = components(inside, jnp.any(inside, axis=1), jnp.any(inside, axis=0))
    of_rows, of_columns = parts.spread(parts.sums(f, -g))
    of_rows = jnp.where(parts.rows < parts.count, of_rows, f)
    of_columns = jnp.where(parts.columns < parts.count, of_columns, -g)
    sums = (
        jnp.sum(P, axis=1) - a + of_rows - detach(of_rows),
        jnp.sum(P, axis=0) - b - of_columns + detach(of_columns),
    )
    return ProjectionPoint(piece - P, sums)


def _kink_distance(y, X):
    f, g = y.multiplier
    return jnp.min(jnp.abs(X - f[:, None] - g[None, :]))


@eqx.filter_custom_jvp
def _projected(X, a, b, max_steps) -> Plan:
    return project(X, a, b, max_steps)


@_projected.def_jvp
@full_precision()
def _(primals, tangents):
    X, a, b, _ = primals
    plan = _projected(*primals)
    filled = [jnp.zeros_like(p) if t is None else t for p, t in zip((X, a, b), tangents, strict=False)]
    P, f, g = moved(plan.P > 0, *filled)
    leaves, treedef = jax.tree.flatten(plan)
    del leaves
    return plan, jax.tree.unflatten(treedef, [P, f, g, None, None])
