"""Robust pooling: the centre of some points, with a penalty that outliers cannot pull."""

from typing import ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
from jaxtyping import Array, Bool, Float

from ..._core.implicit import LinearSystem, Run
from ..._core.node import AbstractDeclarativeNode, Policy, envelope, evaluate, make_policy
from ..._core.results import RESULTS, choose
from ..._solvers import robust_pooling as kernel
from . import points
from .points import PenaltyName, Points


class RobustPool(AbstractDeclarativeNode):
    r"""Pools an axis (or several) by a robust mean, each channel by itself.

    **Problem.**     $y^*(x) = \arg\min_u \sum_i w_i\,\phi(u - x_i; \alpha)$ for each channel                                     (P)
    **Optimality.**  $\sum_i w_i\,\phi'(x_i - y; \alpha) \,/\, (\alpha \sum_i w_i) = 0$                                           (K1)
    **Solver.**      Newton's method, safeguarded; see `_solvers/robust_pooling.py`. (P) has one local minimum for the first three penalties.
                     For the last two: `start="points"` takes the point with the lowest objective and goes downhill (Welsch), or the global
                     minimum exactly (truncated); O(n²). `start="centre"` goes downhill from the point nearest to the pseudo-Huber centre; O(n).
    **Gradient.**    Implicit function theorem on (K1): $\partial y/\partial x_i = w_i\phi''(r_i) / \sum_j w_j\phi''(r_j)$, $r_i = y - x_i$; also in
                     $\alpha$ and $w$. All modes, any order. It stays in the basin of the value: where the global minimum jumps, the gradient does
                     not see it. Huber and truncated: at $|r_i| = \alpha$, $\phi'' = 0$ is used. Huber, if no point lies within $\alpha$ (as many on
                     either side of a gap wider than $2\alpha$): every $u$ in the middle is a minimum. The middle of the gap is returned, with its
                     own derivative, 1/2 for the two ends; in $w$ it jumps, and 0 is returned. `adjoint=ImplicitAdjoint()` solves the diagonal
                     system of (K1) instead, with the status `singular_jacobian` in that case. Welsch where two minima merge, $\sum w\phi'' = 0$:
                     NaN.
    **Use instead.** `RobustVectorPool` for points in space, so that the result turns with them; `jnp.mean` for the quadratic penalty.

    | `penalty`             | $\phi(r; \alpha)$                          | an outlier's pull                  |
    |-----------------------|--------------------------------------------|------------------------------------|
    | `quadratic`           | $r^2/2$                                    | grows with its distance            |
    | `pseudo-huber`        | $\alpha^2(\sqrt{1 + r^2/\alpha^2} - 1)$    | bounded by $\alpha$, smooth        |
    | `huber`               | $r^2/2$, or $\alpha(|r| - \alpha/2)$ for $|r| > \alpha$ | $\alpha$ beyond $\alpha$ |
    | `welsch`              | $\alpha^2(1 - e^{-r^2/2\alpha^2})$         | fades                              |
    | `truncated-quadratic` | $\min(r^2, \alpha^2)/2$                    | none beyond $\alpha$               |

    | symbol   | code      | shape                     | meaning                                                     |
    |----------|-----------|---------------------------|-------------------------------------------------------------|
    | $x$      | `x`       | `axis`, and a channel axis or none | what is pooled                                     |
    | $\alpha$ | `alpha`   | `()` or `(c,)`            | where residuals begin to count less, in the units of `x`    |
    | $w$      | `weights` | of `x`, or of its pooled axes | weights, >= 0                                           |

    **Arguments:** `penalty`; `alpha`, a positive number or an array, which is learnable; `axis`: what is pooled, one axis or several, counted
    from the front, so that at most one is left: `RobustPool(axis=(1, 2))` takes (channels, height, width). `start`: see Solver. `throw`,
    `on_failure`, `max_steps`, `adjoint`: see `Policy` and `ImplicitAdjoint`.
    **Call:** `pool(x, weights=None, mask=None)`, float32 or float64 (half precision is computed in float32). What the mask takes out may be
    anything, NaN too. A weight of 0 has a gradient, so its point must be finite.
    **Returns:** `Float[Array, " c"]`, or a scalar if no axis is left. Both moves and scales with the data (if `alpha` does).
    **Raises:** `ValueError` for an unknown penalty, `alpha` <= 0, an axis or shape that does not fit (construction, tracing); with `throw=True` a
    `SolveError` at run time: `nonfinite_data` if anything that is not masked is infinite or NaN, a weight is negative, or an array `alpha` is not
    positive; `empty` if a channel has no point with a positive weight; or `max_steps` is reached.
    **Reference:** Gould, Hartley & Campbell 2019, *Deep Declarative Networks*, arXiv:1909.04866, and its `ddn` library. Its Welsch penalty lacks the
    factor $\alpha^2$, which changes nothing but the objective; where $\sum \phi''$ vanishes it returns a gradient of 0.
    """

    alpha: float | Float[Array, "..."]
    adjoint: optx.AbstractAdjoint | None
    policy: Policy
    penalty: PenaltyName = eqx.field(static=True)
    axis: tuple[int, ...] = eqx.field(static=True)
    start: Literal["points", "centre"] = eqx.field(static=True)

    smoothness: ClassVar[str] = (
        "smooth for quadratic and pseudo-Huber; Huber and truncated quadratic have a kink where a residual equals alpha; the minimum of Welsch and "
        "the truncated quadratic can jump"
    )
    closed_form: ClassVar[bool] = True

    def __init__(
        self,
        penalty: PenaltyName = "pseudo-huber",
        alpha: float | Float[Array, "..."] = 1.0,
        *,
        axis: int | tuple[int, ...] = 0,
        start: Literal["points", "centre"] = "points",
        adjoint: optx.AbstractAdjoint | None = None,
        policy: Policy | None = None,
        throw: bool | None = None,
        on_failure: Literal["nan", "zero"] | None = None,
        max_steps: int | None = None,
    ):
        self.alpha = points.checked_alpha(penalty, alpha, start, ranks=(0, 1))
        self.penalty, self.alpha, self.start = penalty, alpha, start
        self.axis = points.check_axis(axis)
        self.adjoint = adjoint
        self.policy = make_policy(policy, throw=throw, on_failure=on_failure, max_steps=max_steps)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Float[Array, "..."],
        weights: Float[Array, "..."] | None = None,
        *,
        mask: Bool[Array, "..."] | None = None,
    ) -> Float[Array, "..."]:
        return evaluate(self, self.pack(x, weights, mask))

    def pack(self, x, weights=None, mask=None):
        return points.pack(x if isinstance(x, Points) else Points(x, weights, mask), self.axis)

    def check(self, x):
        points.check(x, self.axis, "RobustPool")
        channels = points.rows_of(x.x, self.axis).shape[1:]
        shape = jnp.shape(self.alpha)
        if shape not in ((), channels):
            raise ValueError(f"alpha must be a scalar or have one entry a channel, {channels}; got shape {shape}.")

    # Problem and optimality

    def optimality(self, y, x: Points):
        penalty, rows, w, alpha = self._columns(x)
        z = kernel.scaled(jnp.atleast_1d(y), rows, alpha)
        mass = points.mass(w, rows)
        return (-kernel.slope_sum(penalty, w, z) / jnp.where(mass > 0, mass, 1)).reshape(y.shape)

    def objective(self, y, x: Points):
        return envelope(_attained, y, (self, x))

    # Solver

    def run(self, x: Points, y0, loop):
        del y0
        penalty, rows, w, alpha = self._columns(x)
        out = kernel.columns(self.penalty, rows, w, alpha, start=self.start, max_steps=self.policy.max_steps, loop=loop)
        result = choose(out.converged, RESULTS.successful, RESULTS.nonlinear_max_steps_reached)
        result = points.status(out.finite, w, result)
        z = kernel.scaled(out.centre, rows, alpha)
        # The mean pull: what rounding of the data does to (K1).
        pull = alpha * jnp.sum(kernel.weighted(w, jnp.abs(penalty.weight(z * z) * z)), axis=0) / points.mass(w, rows)
        y = out.centre.reshape(self._channels(x))
        return Run(y, result, out.steps, unit=jax.lax.stop_gradient(jnp.max(pull)))

    # Structure of the gradient

    def linear_system(self, y, x: Points, factor):
        del factor
        penalty, rows, w, alpha = self._columns(x)
        z = kernel.scaled(jnp.atleast_1d(y), rows, alpha)
        diagonal = -jnp.sum(kernel.weighted(w, kernel.curvatures(penalty, z)), axis=0) / (alpha * points.mass(w, rows))
        return LinearSystem(lx.DiagonalLinearOperator(diagonal), lx.Diagonal(well_posed=True))

    def kink_distance(self, y, x: Points):
        penalty, rows, w, alpha = self._columns(x)
        if penalty.smooth:
            return None
        distance = jnp.abs(jnp.abs(jnp.atleast_1d(y)[None] - rows) - alpha[None])
        return jnp.min(distance if w is None else jnp.where(w > 0, distance, jnp.inf))

    def _channels(self, x: Points):
        return points.rows_of(x.x, self.axis).shape[1:]

    def _columns(self, x: Points):
        """(penalty, points (n, c), weights (n, c) or (n, 1) or None, alpha (c,))."""
        rows, w = points.columns(x, self.axis)
        alpha = jnp.broadcast_to(jnp.asarray(self.alpha, rows.dtype), rows.shape[1:])
        return kernel.PENALTIES[self.penalty], rows, w, jnp.where(alpha > 0, alpha, jnp.nan)


def _attained(y, bound):
    node, x = bound
    penalty, rows, _, alpha = node._columns(x)
    _, w = points.columns(x, node.axis, scaled=False)
    z = kernel.scaled(jnp.atleast_1d(y), rows, alpha)
    return jnp.sum(kernel.weighted(w, (alpha * alpha)[None] * penalty.value(z * z)))
