"""Least squares on a sphere: the solution has a given length."""

from collections.abc import Callable
from typing import ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
from jaxtyping import Array, Float

from ..._core.arguments import number
from ..._core.implicit import LinearSystem, Run
from ..._core.node import AbstractDeclarativeNode, Policy, envelope, evaluate, make_policy
from ..._core.results import RESULTS, choose
from ..._linear.dense import Dense
from ..._linear.lanes import over_lanes
from ..._linear.norms import norm
from .least_squares import LeastSquaresData, check, pack, weights_of


class SpherePoint(eqx.Module):
    """The unknown of (K1)-(K2): the direction y / radius, and the multiplier in a unit that makes it about 1."""

    direction: Float[Array, "..."]
    multiplier: Float[Array, "..."]


class SphereLeastSquares(AbstractDeclarativeNode):
    r"""Least squares over the vectors of given length.

    **Problem.**     $y^* = \arg\min_y \tfrac12\sum_i w_i (a_i^\top y - b_i)^2$ subject to $\|y\| = \rho$                                   (P)
    **Optimality.**  $A^\top W(Ay - b) + \lambda y = 0$ (K1), $(\rho^2 - y^\top y)/2 = 0$ (K2); of their solutions the minimum is the one with
                     $A^\top WA + \lambda I$ positive semidefinite (Gander 1981, Theorem 2). $\lambda < 0$ where the unconstrained solution is short.
    **Solver.**      SVD of $W^{1/2}A$; then $\|y(\lambda)\| = \rho$, one equation in one unknown. Newton for
                     $1/\|y(\lambda)\| = 1/\rho$ (Moré & Sorensen 1983, section 3), whose left side is concave, from a point left of the
                     root: monotone, a handful of steps.
    **Gradient.**    Implicit function theorem on (K1)-(K2), a bordered system of n + 1 equations, for A, b, w and $\rho$; all modes, any order.
                     In the *hard case*, where $A^\top Wb$ has no part along the right-singular vectors of the least singular value and
                     the rest of y is too short, there are two solutions or a continuum, no derivative, and `not_unique`.
    **Use instead.** `WeightedLeastSquares` without the constraint.

    | symbol     | code        | shape    | meaning                                                  |
    |------------|-------------|----------|----------------------------------------------------------|
    | $A, b, w$  | `A`, `b`, `weights` | `(m, n)`, `(m,)`, `(m,)` | equations and their weights, at least 0     |
    | $\rho$     | `radius`    | `()`     | positive; an array is learnable                          |
    | $\lambda$  | `dual`      | `()`     | multiplier of (K2), in units of $A^\top WA$              |

    **Arguments:** `radius`. `throw`, `on_failure`, `max_steps`, `adjoint`: see `Policy` and `ImplicitAdjoint`.
    **Call:** `node(A, b, weights=None)`, or with one `LeastSquaresData`. **Returns:** `Float[Array, " n"]`, of length `radius`.
    **Raises:** `ValueError` for shapes that do not fit or a radius <= 0; with `throw=True` a `SolveError` at run time: `not_unique`,
    `nonfinite_data` (also for a negative weight, or an array radius that is not positive), `nonlinear_max_steps_reached`.
    **Reference:** Gander 1981, *Least squares with a quadratic constraint*; Gander, Golub & von Matt 1989, *A constrained eigenvalue problem*.
    """

    radius: float | Float[Array, ""]
    adjoint: optx.AbstractAdjoint | None
    policy: Policy

    smoothness: ClassVar[str] = "analytic outside of the hard case"

    def __init__(
        self,
        radius: float | Float[Array, ""] = 1.0,
        *,
        adjoint: optx.AbstractAdjoint | None = None,
        policy: Policy | None = None,
        throw: bool | None = None,
        on_failure: Literal["nan", "zero"] | None = None,
        max_steps: int | None = None,
    ):
        self.radius = number(radius, "radius")
        self.adjoint = adjoint
        self.policy = make_policy(policy, throw=throw, on_failure=on_failure, max_steps=max_steps)

    def __call__(self, A, b=None, *, weights=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        return evaluate(self, self.pack(A, b, weights))

    def pack(self, A, b=None, weights=None):  # pyright: ignore[reportIncompatibleMethodOverride]  (the names of a call)
        return pack(A, b, weights)

    def check(self, x):
        check(x, "SphereLeastSquares", one_column=True)

    # Problem and optimality

    def optimality(self, y: SpherePoint, x: LeastSquaresData) -> SpherePoint:
        radius, unit = self._radius(x), self._unit(x)
        u = y.direction
        first = x.A.T @ (weights_of(x) * (radius * (x.A @ u) - x.b)) / (radius * unit) + y.multiplier * u
        return SpherePoint(first, (1 - u @ u) / 2)

    def objective(self, y, x):
        return envelope(_lagrangian, y, (x, self._radius(x), self._unit(x)))

    def dual(self, y, x):
        return self._unit(x) * y.multiplier

    def value(self, y, x):
        return self._radius(x) * y.direction

    # Solver

    def run(self, x, y0, loop):
        del y0
        radius, unit, w = self._radius(x), self._unit(x), weights_of(x)
        root = jnp.sqrt(jnp.maximum(w, 0))
        rows, right = root[:, None] * x.A, root * x.b
        found = _on_sphere(rows, right, radius, self.policy.max_steps, loop)
        finite = jnp.all(jnp.isfinite(x.A)) & jnp.all(jnp.isfinite(x.b)) & jnp.isfinite(radius)
        outside = jnp.any(~(w >= 0)) | ~(radius > 0)
        result = choose(found.done, RESULTS.successful, RESULTS.nonlinear_max_steps_reached)
        result = choose(found.unique, result, RESULTS.not_unique)
        result = choose(finite & ~outside, result, RESULTS.nonfinite_data)
        return Run(SpherePoint(found.direction, found.multiplier / unit), result, found.steps)

    # Structure of the gradient

    def linear_system(self, y, x, factor):
        del factor
        u, n = y.direction, y.direction.size
        gram = x.A.T @ (weights_of(x)[:, None] * x.A) / self._unit(x) + y.multiplier * jnp.eye(n, dtype=u.dtype)
        # Indefinite at every solution that matters (n positive pivots and one negative): no Cholesky.
        matrix = jnp.block([[gram, u[:, None]], [-u[None, :], jnp.zeros((1, 1), u.dtype)]])
        return LinearSystem(lx.MatrixLinearOperator(matrix), Dense())

    def _radius(self, x):
        radius = jnp.asarray(self.radius, x.A.dtype)
        return jnp.where(radius > 0, radius, jnp.nan)

    def _unit(self, x):
        """Of the multiplier: as large as A'WA, and as A'Wb / radius. It scales (K1) and carries no gradient."""
        x, radius = jax.lax.stop_gradient((x, self._radius(x)))
        w = weights_of(x)
        unit = jnp.sum(w[:, None] * x.A**2) + norm(x.A.T @ (w * x.b)) / radius
        return jnp.where((unit > 0) & jnp.isfinite(unit), unit, 1)


def _lagrangian(y: SpherePoint, bound):
    x, radius, unit = bound
    r = radius * (x.A @ y.direction) - x.b
    # The multiplier of radius^2 (u'u - 1) / 2 is unit * multiplier.
    return jnp.sum(weights_of(x) * r**2) / 2 + unit * y.multiplier * radius**2 * (y.direction @ y.direction - 1) / 2


class _Found(eqx.Module):
    direction: Array
    multiplier: Array
    done: Array
    unique: Array
    steps: Array


@over_lanes
def _svd(rows, right):
    """Squares of the singular values less the least one, A'b in the basis of right-singular vectors, that basis, the largest and least."""
    m, n = rows.shape
    U, s, Vt = jnp.linalg.svd(rows, full_matrices=m < n)
    g = s * (U.T @ right)[: s.size]
    if m < n:
        zeros = jnp.zeros(n - m, rows.dtype)
        s, g = jnp.concatenate([s, zeros]), jnp.concatenate([g, zeros])
    return (s - s[-1]) * (s + s[-1]), g, Vt.T, s[0], s[-1]


def _on_sphere(rows, right, radius, max_steps: int, loop: Callable) -> _Found:
    """With mu = lambda + sigma_min^2 >= 0, the coefficients of y are g_i / (d_i + mu), d_i = sigma_i^2 - sigma_min^2."""
    rows, right, radius = jax.lax.stop_gradient((rows, right, radius))
    m, n = rows.shape
    eps = float(jnp.finfo(rows.dtype).eps)
    d, g, V, top, least = _svd(rows, right)
    ok = jnp.all(jnp.isfinite(g)) & jnp.all(jnp.isfinite(d)) & (radius > 0)

    def length(mu):
        """|y| / radius and its logarithmic derivative; coefficients without a right-hand side are zero whatever mu is."""
        below = d + mu
        live = (g != 0) & (below > 0)
        below = jnp.where(live, below, 1)
        part = jnp.where(live, g / below, 0) / radius
        size = norm(part)
        unit = part / jnp.where(size > 0, size, 1)
        return size, jnp.sum(unit**2 / below)

    # Each coefficient alone is at most radius: mu >= |g_i| / radius - d_i. The last i has d = 0, so this is not negative.
    start = jnp.max(jnp.abs(g) / radius - d)

    def body(carry):
        mu, steps, _ = carry
        size, slope = length(mu)
        # 1/|y| has the derivative slope/|y|; Newton for 1/|y| = 1/radius.
        step = (size - 1) / jnp.where(slope > 0, slope, 1)
        step = jnp.where((slope > 0) & ok, jnp.maximum(step, 0), 0)
        return mu + step, steps + 1, step <= 2 * eps * mu

    # Without a finite problem there is nothing to iterate.
    init = (jnp.where(ok, start, 0), jnp.zeros((), jnp.int32), ~ok)
    mu, steps, done = loop(lambda carry: ~carry[2], body, init, max_steps=max_steps)

    # The noise in g_i bounds what can be known about the coefficient along the least singular vectors.
    noise = 4 * max(m, n) * eps * top * norm(right) + (4 * max(m, n) * eps * top * top * radius if n > 1 else 0)
    unique = mu * radius > noise
    below = d + mu
    live = below > 0
    part = jnp.where(live, g / jnp.where(live, below, 1), 0) / radius
    # In the hard case: one of the solutions.
    missing = jnp.sqrt(jnp.maximum(1 - jnp.sum(part**2), 0))
    part = jnp.where(unique, part, part.at[-1].add(missing))
    size = norm(part)
    return _Found(V @ (part / jnp.where(size > 0, size, 1)), mu - least**2, done, unique, steps)
