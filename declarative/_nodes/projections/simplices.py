r"""Sets cut from a box by one linear equation: the simplex, the capped simplex, the box section.

$$ y_i = \mathrm{clip}(x_i - \tau w_i,\ l_i, u_i) \tag{K1} \qquad w^\top y = c \tag{K2} $$

is what all three come to. (K2) is scalar, decreasing and piecewise linear in $\tau$: Newton, finite and without a sort
(`_solvers/section.py`; for the simplex the kernel of sparsemax). The derivative (G) of `sets.py` is then, with I the entries strictly
between their bounds, $\mathrm dy_I = \mathrm dx_I - w_I\, (w_I^\top \mathrm dx_I) / (w_I^\top w_I)$ and 0 elsewhere.
"""

import abc
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._solvers.section import section_root
from ..._solvers.simplex_maps import simplex_map
from .sets import AbstractOneMultiplierSet, check_length, found, keep, like, parameter, pinned, status


class AbstractSection(AbstractOneMultiplierSet):
    """(K1)-(K2) for the bounds, weights and total that a set declares."""

    takes_mask: ClassVar[bool] = True

    @abc.abstractmethod
    def section(self, x: Float[Array, " n"]) -> tuple[Any, Any, Any, Float[Array, ""]]:
        """(lower, upper or None, weights or None, total) in the dtype of x."""

    def entries(self, x, tau, y, mask):
        lower, upper, weights, _ = self.section(x)
        t = x - tau if weights is None else x - tau * weights
        # On a bound an entry does not move; a tie counts as on it.
        picked, natural = jnp.where(y <= lower, lower, t), jnp.maximum(t, lower)
        if upper is not None:
            picked = jnp.where((y >= upper) & (y > lower), upper, picked)
            natural = jnp.minimum(natural, upper)
        return keep(mask, pinned(picked, natural))

    def balance(self, y, tau, x, mask):
        del tau
        _, _, weights, total = self.section(x)
        return jnp.sum(keep(mask, y if weights is None else weights * y)) - total

    def kink_distance(self, y, x):
        lower, upper, weights, _ = self.section(x.x)
        t = x.x - y.multiplier * (1 if weights is None else weights)
        distance = jnp.abs(t - lower)
        distance = distance if upper is None else jnp.minimum(distance, jnp.abs(upper - t))
        return jnp.min(distance if x.mask is None else jnp.where(x.mask, distance, jnp.inf))


class Simplex(AbstractSection):
    r"""The simplex $\{y \ge 0,\ 1^\top y = r\}$. The multiplier is the threshold: $y_i = \max(x_i - \tau, 0)$.

    **Arguments:** `radius` r >= 0, a number or a scalar array. Entries of -inf, and masked ones, get 0 and no gradient; with nothing else
    left there is no point (unless r = 0): `infeasible`. Not differentiable where some $x_i = \tau$: such an entry counts as zero.
    """

    radius: float | Float[Array, ""]

    def __init__(self, radius: Any = 1.0):
        self.radius = parameter(radius, "radius")

    def section(self, x):
        return jnp.zeros((), x.dtype), None, None, like(self.radius, x)

    def kernel(self, x, mask, max_steps):
        z = x if mask is None else jnp.where(mask, x, -jnp.inf)
        if isinstance(self.radius, (int, float)) and self.radius == 1:
            out = simplex_map(z, 2.0, max_steps)
            code = status(
                finite=out.finite & (out.theta < jnp.inf),
                feasible=out.theta > -jnp.inf,
                converged=out.converged,
            )
            return found(out.probabilities, out.theta - 1, code, out.steps)
        radius = like(self.radius, x)
        top = jnp.max(z)
        some = jnp.isfinite(top)
        # Scores less their maximum before the division: differences of close numbers are exact, and no quotient overflows to +inf.
        scale = jnp.where(radius > 0, radius, 1)
        out = simplex_map((z - jnp.where(some, top, 0)) / scale, 2.0, max_steps)
        finite = out.finite & ~(top == jnp.inf) & (jnp.abs(radius) < jnp.inf)
        none = top == -jnp.inf
        feasible = jnp.where(none, radius == 0, radius >= 0)
        code = status(finite=finite, feasible=feasible, converged=out.converged)
        tau = jnp.where(none, 0, top + radius * (out.theta - 1))
        return found(jnp.maximum(radius, 0) * out.probabilities, tau, code, out.steps)


class CappedSimplex(AbstractSection):
    r"""The capped simplex $\{0 \le y_i \le \text{cap}_i,\ 1^\top y = r\}$: probabilities with a ceiling; soft top-k for r = k, cap = 1.

    The multiplier is the threshold: $y_i = \mathrm{clip}(x_i - \tau, 0, \text{cap}_i)$.

    **Arguments:** `radius` r, a number or a scalar array; `cap`, a number, a scalar or a vector; both in $0 \le r \le \sum_i
    \text{cap}_i$, else `infeasible`. Not differentiable where an entry meets 0 or its cap without a push: it counts as on it.
    """

    radius: float | Float[Array, ""]
    cap: float | Float[Array, "..."]

    def __init__(self, radius: Any = 1.0, cap: Any = 1.0):
        self.radius = parameter(radius, "radius")
        self.cap = parameter(cap, "cap", (0, 1))

    def check_size(self, shape):
        check_length(self.cap, "cap", shape[0])

    def section(self, x):
        return jnp.zeros((), x.dtype), like(self.cap, x), None, like(self.radius, x)

    def kernel(self, x, mask, max_steps):
        return _by_newton(self, x, mask, max_steps)


class BoxSection(AbstractSection):
    r"""The box section $\{l \le y \le u,\ w^\top y = c\}$, for weights of either sign, or zero.

    The multiplier: $y_i = \mathrm{clip}(x_i - \tau w_i, l_i, u_i)$.

    **Arguments:** `lower`, `upper`: numbers or arrays, infinite where there is no bound; `weights`: a vector, or None for ones; `total`
    c, a number or a scalar array. `infeasible` where bounds cross, or c is not between the least and the largest $w^\top y$ of the box.
    Not differentiable where an entry meets a bound without a push: it counts as on it.
    """

    lower: float | Float[Array, "..."]
    upper: float | Float[Array, "..."]
    weights: Float[Array, " n"] | None
    total: float | Float[Array, ""]

    def __init__(
        self,
        lower: Any,
        upper: Any,
        weights: Any,
        total: Any,
    ):
        self.lower, self.upper = parameter(lower, "lower", (0, 1)), parameter(upper, "upper", (0, 1))
        self.weights = None if weights is None else parameter(weights, "weights", (1,))
        self.total = parameter(total, "total")

    def check_size(self, shape):
        for name in ("lower", "upper", "weights"):
            check_length(getattr(self, name), name, shape[0])

    def section(self, x):
        weights = None if self.weights is None else like(self.weights, x)
        return like(self.lower, x), like(self.upper, x), weights, like(self.total, x)

    def kernel(self, x, mask, max_steps):
        return _by_newton(self, x, mask, max_steps)


def _by_newton(onto: AbstractSection, x, mask, max_steps: int):
    lower, upper, weights, total = onto.section(x)
    root = section_root(x, lower, upper, weights, total, mask, max_steps, at_most=False)
    y = (x - root.tau) - root.low if weights is None else (x - root.tau * weights) - root.low * weights
    code = status(finite=root.finite, feasible=root.feasible, converged=root.converged)
    return found(keep(mask, jnp.clip(y, lower, upper)), root.tau + root.low, code, root.steps)
