r"""The second-order cone, the cone of positive semidefinite matrices, and its slice of fixed trace.

**Conditions.** The cones K are self-dual: $x - y + \lambda = 0$ (K1) and $y \circ \lambda = 0$ (K2) with $y, \lambda \in K$, where $\circ$ is the
Jordan product of the cone: $(t, z) \circ (s, w) = (ts + z^\top w,\ tw + sz)$ for the second-order cone, $(YL + LY)/2$ for matrices. (K2) is
written in units of x, and by how much y or $\lambda$ lies outside of K is added to it, as a value without a derivative. Its Jacobian is
nonsingular unless x is on a kink.

**Gradient.** Textbook derivatives (Malick & Sendov 2006 for matrices): with eigenvalues $\mu_i$ and f the positive part,

$$ D\Pi(X)[H] = U (B \circ U^\top H U) U^\top, \qquad B_{ij} = \frac{f(\mu_i) - f(\mu_j)}{\mu_i - \mu_j} \tag{D} $$

whose quotients are 1, 0, or $\mu_i / (\mu_i + |\mu_j|)$: finite whatever eigenvalues coincide. It is the solution $Y'$ of
$|X|\,Y' + Y'|X| = YH + HY$ with $Y = \Pi(X)$, $|X| = 2Y - X$, and is differentiated again as such: no derivative of an eigenvector is taken.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._core.implicit import LinearSystem, detach
from ..._core.precision import full_precision
from ..._linear.lanes import over_lanes
from ..._linear.norms import largest, norm
from ..._linear.paired import Paired, PairedDiagonal
from .sets import AbstractSet, ProjectionPoint, as_run, like, parameter, status
from .simplices import Simplex


class SecondOrderCone(AbstractSet):
    r"""The cone $\{(t, z): \|z\|_2 \le t\}$; the first entry is t. The multiplier is $\lambda = y - x$.

    Not differentiable where $\|z\| = |t|$: on the cone and at the apex the derivative is the identity, on its polar zero.
    """

    fails_as_nan: ClassVar[bool] = False

    def run(self, x, max_steps):
        del max_steps
        t, z = x.x[0], x.x[1:]
        size = norm(z)
        inside, polar = size <= t, size <= -t
        between = ~inside & ~polar
        # t + |z| > 0 in between. Elsewhere the quotient has a derivative too, which nothing reads.
        height = (t + size) / 2
        slope = height / jnp.where(between, size, 1)
        shrunk = jnp.concatenate([height[None], slope * z])
        y = jnp.where(inside, x.x, jnp.where(polar, 0, shrunk))
        return as_run(ProjectionPoint(y, y - x.x), status(finite=jnp.isfinite(jnp.sum(jnp.abs(x.x)))))

    def optimality(self, y, x):
        point, dual = y.point, y.multiplier
        product = jnp.append(point @ dual, point[0] * dual[1:] + dual[0] * point[1:])
        product = product / _unit(point, dual)
        lowest = jnp.minimum(_depth(detach(point)), _depth(detach(dual)))
        return ProjectionPoint(x.x - point + dual, product.at[0].add(jnp.minimum(lowest, 0)))

    def kink_distance(self, y, x):
        del y
        return jnp.abs(norm(x.x[1:]) - jnp.abs(x.x[0])) / 2**0.5


def _depth(point):
    return point[0] - norm(point[1:])


def _unit(point, dual):
    """A size of the data; 1 where they vanish."""
    size = detach(jnp.maximum(largest(point), largest(dual)))
    return jnp.where(size > 0, size, 1)


class PositiveSemidefinite(AbstractSet):
    r"""The cone of positive semidefinite matrices, in the Frobenius norm. Of a matrix that is not symmetric its symmetric part counts.

    **Solver.** $\Pi(X) = U \max(\mu, 0) U^\top$, one eigendecomposition. The multiplier is $\Lambda = Y - X$. Not differentiable at singular
    matrices: an eigenvalue of zero counts as negative.
    """

    rank: ClassVar[int] = 2

    def run(self, x, max_steps):
        del max_steps
        X = _symmetric(x.x)
        mu, U = _eigen(detach(X))
        out = _positive_part(X, _clean(mu, 0), U)
        return as_run(ProjectionPoint(out, out - X), status(finite=jnp.isfinite(jnp.sum(jnp.abs(X)))))

    def optimality(self, y, x):
        return ProjectionPoint(_symmetric(x.x) - y.point + y.multiplier, _complementarity(y.point, y.multiplier))

    def linear_system(self, y, x, factor):
        del factor
        mu, U = _eigen(_symmetric(x.x))
        unit = _unit(y.point, y.multiplier)
        sums = lambda values: ((values[:, None] + values[None, :]) / (2 * unit)).reshape(-1)
        ones = jnp.ones_like(sums(mu))
        return LinearSystem(
            PairedDiagonal(-ones, ones, sums(jnp.maximum(-mu, 0)), sums(jnp.maximum(mu, 0)), U), Paired()
        )

    def kink_distance(self, y, x):
        del y
        return jnp.min(jnp.abs(_eigen(_symmetric(x.x))[0]))


class Spectraplex(AbstractSet):
    r"""The spectraplex $\{Y \succeq 0,\ \mathrm{tr}\,Y = r\}$: density matrices for r = 1. The symmetric part of a matrix counts.

    **Conditions.** $X - Y + \Lambda - \tau I = 0$ (K1), (K2), $r - \mathrm{tr}\,Y = 0$ (K3). The multiplier is the pair $(\Lambda, \tau)$.
    **Solver.** $Y = \Pi(X - \tau I)$, with $\tau$ from the projection of the eigenvalues onto the simplex.
    **Gradient.** (D) at $X - \tau I$, and $\mathrm d\tau = (\mathrm{tr}\,D\Pi[\mathrm dX] - \mathrm dr) / \mathrm{tr}\,D\Pi[I]$ from (K3).

    **Arguments:** `radius` r >= 0, a number or a scalar array, else `infeasible`.
    """

    radius: float | Float[Array, ""]

    rank: ClassVar[int] = 2

    def __init__(self, radius: Any = 1.0):
        self.radius = parameter(radius, "radius")

    def run(self, x, max_steps):
        X, radius = _symmetric(x.x), like(self.radius, x.x)
        mu, U = _eigen(detach(X))
        out = Simplex(self.radius).kernel(mu, None, max_steps)
        tau = _threshold(X, radius, detach(out.multiplier), mu, U)
        shifted = X - tau * jnp.eye(X.shape[0], dtype=X.dtype)
        point = _positive_part(shifted, _clean(mu, detach(tau)), U)
        return as_run(ProjectionPoint(point, (point - shifted, tau)), out.code, out.steps)

    def optimality(self, y, x):
        point, (dual, tau) = y.point, y.multiplier
        first = _symmetric(x.x) - point + dual - tau * jnp.eye(point.shape[0], dtype=point.dtype)
        return ProjectionPoint(first, (_complementarity(point, dual), like(self.radius, point) - jnp.trace(point)))

    def kink_distance(self, y, x):
        return jnp.min(jnp.abs(_eigen(_symmetric(x.x))[0] - y.multiplier[1]))


def _symmetric(X):
    return (X + X.T) / 2


def _complementarity(Y, L):
    product = (Y @ L + L @ Y) / (2 * _unit(Y, L))
    lowest = jnp.minimum(jnp.min(_eigen(detach(_symmetric(Y)))[0]), jnp.min(_eigen(detach(_symmetric(L)))[0]))
    return product + jnp.minimum(lowest, 0) * jnp.eye(Y.shape[0], dtype=Y.dtype)


@over_lanes
def _eigen(X: Float[Array, "n n"]) -> tuple[Float[Array, " n"], Float[Array, "n n"]]:
    # LAPACK may not return from NaN; an eigenvalue of NaN makes NaN of all that follows.
    good = jnp.all(jnp.isfinite(X))
    mu, U = jnp.linalg.eigh(jnp.where(good, X, jnp.eye(X.shape[0], dtype=X.dtype)), symmetrize_input=False)
    return jnp.where(good, mu, jnp.nan), U


def _clean(mu, tau):
    """mu - tau, where what is zero but for rounding (of a matrix of low rank, say) is zero."""
    size = jnp.maximum(jnp.max(jnp.abs(mu)), jnp.abs(tau))
    return jnp.where(jnp.abs(mu - tau) <= mu.size * float(jnp.finfo(mu.dtype).eps) * size, 0, mu - tau)


# Below, mu and U are the eigenvalues and eigenvectors of X, known already; they carry no derivative.


@jax.custom_jvp
def _positive_part(X, mu, U):
    del X
    return (U * jnp.maximum(mu, 0)[None, :]) @ U.T


@_positive_part.defjvp
@full_precision()
def _(primals, tangents):
    return _positive_part(*primals), _derivative(*primals, tangents[0])  # pyright: ignore[reportCallIssue]


def _derivative(X, mu, U, H):
    """(D), as the solution of the equation that defines it: a linear solve, which JAX differentiates and transposes by its operator.

    (A rule of its own would be lost where H is a tangent: JAX looks through custom rules there, to products with U, a constant.)
    """
    Y = _positive_part(X, mu, U)
    turn = lambda A: U.T @ A @ U
    # Diagonal, to the last digit, in the basis of the eigenvectors; the rest is there for its derivative. The quotients of (D) then come out
    # between 0 and 1, whatever the eigenvalues are: rounding divided by a small sum would be noise.
    exact = lambda diagonal, A: jnp.diag(diagonal) + (turn(A) - detach(turn(A)))
    up, absolute, H = exact(jnp.maximum(mu, 0), Y), exact(jnp.abs(mu), 2 * Y - X), turn(H)
    total = jnp.abs(mu)[:, None] + jnp.abs(mu)[None, :]
    inverse = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), jnp.where(jnp.isnan(total), total, 0))
    out = jax.lax.custom_linear_solve(
        lambda M: absolute @ M + M @ absolute, up @ H + H @ up, solve=lambda _, right: inverse * right, symmetric=True
    )
    return U @ out @ U.T


@jax.custom_jvp
def _threshold(X, radius, tau, mu, U):
    """tau of (K3), which is known."""
    del X, radius, mu, U
    return tau


@_threshold.defjvp
@full_precision()
def _(primals, tangents):
    X, _, _, mu, U = primals
    dX, d_radius, _, _, _ = tangents
    tau = _threshold(*primals)
    eye = jnp.eye(X.shape[0], dtype=X.dtype)
    shifted, below = X - tau * eye, _clean(mu, detach(tau))
    moved = jnp.trace(_derivative(shifted, below, U, dX)) - d_radius
    # tr of (D) at the identity: the number of positive eigenvalues, a constant.
    count = jnp.sum(jnp.where(below > 0, jnp.ones_like(below), 0))
    return tau, jnp.where(count > 0, moved / jnp.where(count > 0, count, 1), 0)
