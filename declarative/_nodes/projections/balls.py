"""Balls and spheres of the three norms. The spheres are not convex: where several points are nearest, one is returned, as they say."""

from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._core.results import RESULTS
from ..._linear.norms import norm
from ..._solvers.section import section_root
from .boxes import AbstractBox
from .sets import AbstractOneMultiplierSet, check_length, found, keep, like, parameter, pinned, status
from .simplices import Simplex


class L1Ball(AbstractOneMultiplierSet):
    r"""The ball $\{\sum_i w_i |y_i| \le r\}$.

    **Conditions.** $y_i = \mathrm{sign}(x_i) \max(|x_i| - \tau w_i, 0)$ (K1), $\min(\tau, r - \sum_i w_i|y_i|) = 0$ (K2).

    **Arguments:** `radius` r >= 0, a number or a scalar array; `weights` >= 0, a vector or None for ones; else `infeasible`. Inside the
    ball, its boundary included, the derivative is the identity; where $|x_i| = \tau w_i$ it does not exist, and $y_i$ counts as zero.
    """

    radius: float | Float[Array, ""]
    weights: Float[Array, " n"] | None

    takes_mask: ClassVar[bool] = True

    def __init__(self, radius: Any = 1.0, weights: Any = None):
        self.radius = parameter(radius, "radius")
        self.weights = None if weights is None else parameter(weights, "weights", (1,))

    def check_size(self, shape):
        check_length(self.weights, "weights", shape[0])

    def _weights(self, x):
        return jnp.ones((), x.dtype) if self.weights is None else like(self.weights, x)

    def kernel(self, x, mask, max_steps):
        weights = None if self.weights is None else like(self.weights, x)
        w = self._weights(x)
        radius, zero = like(self.radius, x), jnp.zeros((), x.dtype)
        root = section_root(x, zero, None, weights, radius, mask, max_steps, at_most=True)
        y = _sign(x) * jnp.maximum((jnp.abs(x) - root.tau * w) - root.low * w, 0)
        feasible = root.feasible & (jnp.ones((), bool) if weights is None else jnp.all(keep(mask, weights) >= 0))
        code = status(finite=root.finite, feasible=feasible, converged=root.converged)
        return found(y, root.tau + root.low, code, root.steps)

    def entries(self, x, tau, y, mask):
        shrunk = jnp.abs(x) - tau * self._weights(x)
        # Inside the ball an entry that is zero moves like any other.
        inside = tau <= 0
        picked = jnp.where((y != 0) | inside, x - _sign(x) * (tau * self._weights(x)), 0)
        return keep(mask, pinned(picked, jnp.where(inside, x, _sign(x) * jnp.maximum(shrunk, 0))))

    def balance(self, y, tau, x, mask):
        slack = like(self.radius, x) - jnp.sum(keep(mask, self._weights(x) * (_sign(y) * y)))
        return at_most(tau, slack)

    def kink_distance(self, y, x):
        tau, w = y.multiplier, self._weights(x.x)
        edge = jnp.abs(jnp.abs(x.x) - tau * w)
        edge = jnp.min(edge if x.mask is None else jnp.where(x.mask, edge, jnp.inf))
        slack = like(self.radius, x.x) - jnp.sum(keep(x.mask, w * jnp.abs(y.point)))
        return jnp.where(tau > 0, jnp.minimum(tau, edge), slack)


class L1Sphere(AbstractOneMultiplierSet):
    r"""The sphere $\{\sum_i |y_i| = r\}$: the simplex in the orthant of x.

    **Conditions.** $y_i = \sigma_i \max(|x_i| - \tau, 0)$ (K1), $\sum_i |y_i| = r$ (K2), with $\sigma_i$ the sign of $x_i$, +1 at zero.

    From inside of the sphere $\tau < 0$ and every entry grows. An entry $x_i = 0$ then has two nearest points, of which this is the one with
    $y_i > 0$; the derivative is the one on that side. **Arguments:** `radius` r >= 0, else `infeasible`.
    """

    radius: float | Float[Array, ""]

    takes_mask: ClassVar[bool] = True

    def __init__(self, radius: Any = 1.0):
        self.radius = parameter(radius, "radius")

    def kernel(self, x, mask, max_steps):
        out = Simplex(self.radius).kernel(jnp.abs(x), mask, max_steps)
        return found(_sign(x) * out.point, out.multiplier, out.code, out.steps)

    def entries(self, x, tau, y, mask):
        picked = jnp.where(y != 0, x - _sign(x) * tau, 0)
        return keep(mask, pinned(picked, _sign(x) * jnp.maximum(jnp.abs(x) - tau, 0)))

    def balance(self, y, tau, x, mask):
        del tau
        return jnp.sum(keep(mask, _sign(y) * y)) - like(self.radius, x)

    def kink_distance(self, y, x):
        # Where tau < 0, crossing zero jumps to another nearest point.
        edge = jnp.where(y.multiplier < 0, jnp.abs(x.x), jnp.abs(jnp.abs(x.x) - y.multiplier))
        return jnp.min(edge if x.mask is None else jnp.where(x.mask, edge, jnp.inf))


class L2Ball(AbstractOneMultiplierSet):
    r"""The ball $\{\|y\|_2 \le r\}$.

    **Conditions.** $y - x + \mu y = 0$, $\min(\mu, r - \|y\|) = 0$. In terms of the factor $f = 1/(1 + \mu)$, which is the multiplier here:
    $y = fx$ (K1), $\min(1 - f,\ r - f\|x\|) = 0$ (K2), which has no singularity at r = 0 or x = 0.

    **Arguments:** `radius` r >= 0, a number or a scalar array, else `infeasible`. Inside the ball, its boundary included, the derivative
    is the identity.
    """

    radius: float | Float[Array, ""]

    takes_mask: ClassVar[bool] = True

    def __init__(self, radius: Any = 1.0):
        self.radius = parameter(radius, "radius")

    def kernel(self, x, mask, max_steps):
        del max_steps
        radius, size = like(self.radius, x), norm(keep(mask, x))
        inside = size <= radius
        factor = jnp.where(inside, 1, radius / jnp.where(inside, 1, size))
        code = status(finite=jnp.isfinite(size) & ~jnp.isnan(radius), feasible=radius >= 0)
        return found(factor * x, factor, code)

    def entries(self, x, tau, y, mask):
        del y
        return keep(mask, tau * x)

    def balance(self, y, tau, x, mask):
        del y
        return at_most(1 - tau, like(self.radius, x) - tau * norm(keep(mask, x)))

    def kink_distance(self, y, x):
        return jnp.abs(norm(keep(x.mask, x.x)) - like(self.radius, x.x))


class L2Sphere(AbstractOneMultiplierSet):
    r"""The sphere $\{\|y\|_2 = r\}$.

    **Conditions.** $y = fx$ (K1), $r - f\|x\| = 0$ (K2); f is the multiplier here.

    At x = 0 every point of the sphere is nearest: the projection function returns 0 there, with the gradient 0, and the node ends with
    `not_a_solution`. **Arguments:** `radius` r >= 0, a number or a scalar array, else `infeasible`.
    """

    radius: float | Float[Array, ""]

    takes_mask: ClassVar[bool] = True

    def __init__(self, radius: Any = 1.0):
        self.radius = parameter(radius, "radius")

    def kernel(self, x, mask, max_steps):
        del max_steps
        radius, size = like(self.radius, x), norm(keep(mask, x))
        somewhere = size > 0
        factor = jnp.where(somewhere, radius / jnp.where(somewhere, size, 1), 0)
        out = found(
            factor * x,
            factor,
            status(finite=jnp.isfinite(size) & (jnp.abs(radius) < jnp.inf), feasible=radius >= 0),
        )
        nowhere = (out.code == 0) & ~somewhere & (radius > 0)
        code = jnp.where(nowhere, int(RESULTS.not_a_solution._value), out.code).astype(jnp.int32)
        return type(out)(out.point, out.multiplier, code, out.steps)

    def entries(self, x, tau, y, mask):
        del y
        return keep(mask, tau * x)

    def balance(self, y, tau, x, mask):
        del y
        return like(self.radius, x) - tau * norm(keep(mask, x))

    def kink_distance(self, y, x):
        del y
        return norm(keep(x.mask, x.x))


class LInfBall(AbstractBox):
    r"""The ball $\{\max_i |y_i| \le r\}$, a box. **Arguments:** `radius` r >= 0, a number or a scalar array, else `infeasible`."""

    radius: float | Float[Array, ""]

    def __init__(self, radius: Any = 1.0):
        self.radius = parameter(radius, "radius")

    def bounds(self, x):
        radius = like(self.radius, x)
        return -radius, radius


def at_most(multiplier: Float[Array, ""], slack: Float[Array, ""]) -> Float[Array, ""]:
    """min(multiplier, slack), with the derivative of the slack where the multiplier is positive."""
    return pinned(jnp.where(multiplier > 0, slack, multiplier), jnp.minimum(multiplier, slack))


def _sign(x):
    return jnp.where(x < 0, -jnp.ones_like(x), 1)
