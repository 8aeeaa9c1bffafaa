r"""Sets that are one interval for each entry.

**Conditions.** $x - y - \mu = 0$ (K1), $\mathrm{clip}(y + \mu, l, u) - y = 0$ (K2): one signed multiplier for each entry, positive at an upper
bound. A two by two system for each entry.
"""

import abc
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._core.implicit import LinearSystem
from ..._linear.paired import Paired, PairedDiagonal
from .sets import AbstractSet, ProjectionPoint, as_run, check_length, keep, like, parameter, pinned, status


class AbstractBox(AbstractSet):
    """(K1)-(K2) for the bounds that a set declares. On a bound, ties included, an entry moves with the bound and not with x."""

    takes_mask: ClassVar[bool] = True

    @abc.abstractmethod
    def bounds(self, x: Float[Array, " n"]) -> tuple[Any, Any]:
        """(lower, upper), each None, a scalar or a vector, in the dtype of x."""

    def run(self, x, max_steps):
        del max_steps
        lower, upper = self.bounds(x.x)
        y = keep(x.mask, _clip(x.x, x.x, lower, upper))
        feasible = jnp.ones((), bool)
        if lower is not None and upper is not None:
            y, feasible = _nan_where_empty(y, lower, upper, x.mask)
        # Infinite entries are fine where a bound stops them.
        code = status(finite=jnp.all(jnp.isfinite(y)) | ~feasible, feasible=feasible)
        return as_run(ProjectionPoint(y, x.x - y), code)

    def optimality(self, y, x):
        point, mu = y.point, y.multiplier
        lower, upper = self.bounds(x.x)
        picked = keep(x.mask, _clip(point + mu, point, lower, upper))
        natural = keep(x.mask, _clip(point + mu, point + mu, lower, upper))
        return ProjectionPoint(x.x - point - mu, pinned(picked, natural) - point)

    def linear_system(self, y, x, factor):
        del factor
        lower, upper = self.bounds(x.x)
        ones = jnp.ones_like(y.point)
        at = jnp.zeros(y.point.shape, bool) if x.mask is None else ~x.mask
        at = at if lower is None else at | (y.point <= lower)
        at = at if upper is None else at | (y.point >= upper)
        inside = jnp.where(at, 0, ones)
        return LinearSystem(PairedDiagonal(-ones, -ones, inside - 1, inside), Paired())

    def kink_distance(self, y, x):
        del y
        distances = [jnp.abs(x.x - bound) for bound in self.bounds(x.x) if bound is not None]
        return jnp.min(
            jnp.stack([jnp.where(jnp.isnan(d) if x.mask is None else ~x.mask, jnp.inf, d) for d in distances])
        )


class Box(AbstractBox):
    r"""The box $\{l \le y \le u\}$. **Arguments:** `lower`, `upper`: numbers or arrays; infinite entries are no bounds.

    `infeasible` where they cross.
    """

    lower: float | Float[Array, "..."]
    upper: float | Float[Array, "..."]

    def __init__(self, lower: Any, upper: Any):
        self.lower, self.upper = parameter(lower, "lower", (0, 1)), parameter(upper, "upper", (0, 1))

    def check_size(self, shape):
        check_length(self.lower, "lower", shape[0])
        check_length(self.upper, "upper", shape[0])

    def bounds(self, x):
        return like(self.lower, x), like(self.upper, x)


class NonNegative(AbstractBox):
    r"""The non-negative orthant $\{y \ge 0\}$."""

    def bounds(self, x):
        return jnp.zeros((), x.dtype), None


def _clip(values, side, lower, upper):
    """`values` between the bounds; `side` says which entries are on one."""
    # The lower bound wins where both hold, so the upper one comes first.
    out = values if upper is None else jnp.where(side >= upper, upper, values)
    return out if lower is None else jnp.where(side <= lower, lower, out)


def _nan_where_empty(y, lower, upper, mask):
    """NaN, gradient included, in entries whose bounds cross or are NaN; and whether there are none."""
    good = lower <= upper
    feasible = jnp.all(good if mask is None else good | ~mask)
    return y * jnp.where(good, jnp.ones_like(lower), jnp.nan), feasible
