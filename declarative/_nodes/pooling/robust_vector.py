"""Robust pooling of points in space: one centre, by their distances from it."""

from typing import ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Bool, Float

from ..._core.implicit import Run
from ..._core.node import AbstractDeclarativeNode, Policy, envelope, evaluate, make_policy
from ..._core.results import RESULTS, choose
from ..._solvers import robust_pooling as kernel
from . import points
from .points import PenaltyName, Points


class RobustVectorPool(AbstractDeclarativeNode):
    r"""Pools vectors by a robust mean that turns with them: the penalty is one of the Euclidean distance.

    **Problem.**     $y^*(x) = \arg\min_u \sum_i w_i\,\phi(\|u - x_i\|; \alpha)$, $\phi$ as in `RobustPool`                       (P)
    **Optimality.**  $\sum_i w_i\,\omega_i\,(x_i - y) \,/\, (\alpha\sum_i w_i) = 0$, $\omega_i = \phi'(\|r_i\|)/\|r_i\|$, $r_i = y - x_i$       (K1)
    **Solver.**      Newton's method, and steps of the iteratively reweighted mean where it climbs. (P) has one local minimum for the first three
                     penalties. For Welsch and truncated: downhill from the point with the lowest objective (`start="points"`, O(n²)), or from the
                     one nearest to the pseudo-Huber centre (`"centre"`); a local minimum below every point, not always the global one.
    **Gradient.**    Implicit function theorem on (K1), with the c × c Hessian $\sum_i w_i(\omega_i I - \kappa_i r_i r_i^\top)$,
                     $\kappa_i = -\omega'_i/\|r_i\|$; in $x$, $w$ and $\alpha$. All modes, any order. It stays in the basin of the value. Not
                     differentiable where some $\|r_i\| = \alpha$ (Huber, truncated), and where the minimum is not unique (Huber: two groups on a
                     line, wide apart): the backward solve fails with `singular_jacobian`.
    **Use instead.** `RobustPool`, by far cheaper, where the channels have nothing to do with one another.

    | symbol   | code      | shape                     | meaning                                              |
    |----------|-----------|---------------------------|------------------------------------------------------|
    | $x$      | `x`       | `axis`, and one axis more | vectors                                              |
    | $\alpha$ | `alpha`   | `()`                      | the distance at which points begin to count less     |
    | $w$      | `weights` | the pooled axes           | one for each vector, >= 0                            |

    **Arguments, Call, Raises, Reference:** as `RobustPool`, but that `alpha` is a scalar, the vectors' axis must be there, and `weights` and `mask`
    have the shape of the pooled axes.
    **Returns:** `Float[Array, " c"]`.
    """

    alpha: float | Float[Array, ""]
    adjoint: optx.AbstractAdjoint | None
    policy: Policy
    penalty: PenaltyName = eqx.field(static=True)
    axis: tuple[int, ...] = eqx.field(static=True)
    start: Literal["points", "centre"] = eqx.field(static=True)

    smoothness: ClassVar[str] = (
        "smooth for quadratic and pseudo-Huber; Huber and truncated quadratic have a kink where a distance equals alpha; the minimum of Welsch and "
        "the truncated quadratic can jump"
    )

    def __init__(
        self,
        penalty: PenaltyName = "pseudo-huber",
        alpha: float | Float[Array, ""] = 1.0,
        *,
        axis: int | tuple[int, ...] = 0,
        start: Literal["points", "centre"] = "points",
        adjoint: optx.AbstractAdjoint | None = None,
        policy: Policy | None = None,
        throw: bool | None = None,
        on_failure: Literal["nan", "zero"] | None = None,
        max_steps: int | None = None,
    ):
        self.alpha = points.checked_alpha(penalty, alpha, start, ranks=(0,))
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
    ) -> Float[Array, " c"]:
        return evaluate(self, self.pack(x, weights, mask))

    def pack(self, x, weights=None, mask=None):
        return points.pack(x if isinstance(x, Points) else Points(x, weights, mask), self.axis)

    def check(self, x):
        points.check(x, self.axis, "RobustVectorPool")
        if x.x.ndim == len(self.axis):
            raise ValueError(
                f"RobustVectorPool needs an axis for the vectors beside axis={self.axis}, got shape {x.x.shape}."
            )
        for name, leaf in (("weights", x.weights), ("mask", x.mask)):
            if leaf is not None and leaf.ndim == x.x.ndim:
                raise ValueError(
                    f"{name} must have one entry for each vector, got shape {leaf.shape} for x of {x.x.shape}."
                )

    # Problem and optimality

    def optimality(self, y, x: Points):
        penalty, rows, w, alpha = self._rows(x)
        mass = points.mass(w, rows)
        return -jnp.sum(kernel.pulls(penalty, y, rows, w, alpha), axis=0) / jnp.where(mass > 0, mass, 1)

    def objective(self, y, x: Points):
        return envelope(_attained, y, (self, x))

    # Solver

    def run(self, x: Points, y0, loop):
        del y0
        penalty, rows, w, alpha = self._rows(x)
        out = kernel.vector(self.penalty, rows, w, alpha, start=self.start, max_steps=self.policy.max_steps, loop=loop)
        result = choose(out.converged, RESULTS.successful, RESULTS.nonlinear_max_steps_reached)
        # The mean pull: what rounding of the data does to (K1).
        pull = (
            alpha * jnp.sum(jnp.abs(kernel.pulls(penalty, out.centre, rows, w, alpha)), axis=0) / points.mass(w, rows)
        )
        return Run(
            out.centre, points.status(out.finite, w, result), out.steps, unit=jax.lax.stop_gradient(jnp.max(pull))
        )

    def kink_distance(self, y, x: Points):
        penalty, rows, w, alpha = self._rows(x)
        if penalty.smooth:
            return None
        distance = jnp.abs(jnp.sqrt(jnp.sum((y[None] - rows) ** 2, axis=1, keepdims=True)) - alpha)
        return jnp.min(distance if w is None else jnp.where(w > 0, distance, jnp.inf))

    def _rows(self, x: Points):
        """(penalty, vectors (n, c), weights (n, 1) or None, alpha)."""
        rows, w = points.columns(x, self.axis)
        alpha = jnp.asarray(self.alpha, rows.dtype)
        return kernel.PENALTIES[self.penalty], rows, w, jnp.where(alpha > 0, alpha, jnp.nan)


def _attained(y, bound):
    node, x = bound
    penalty, rows, _, alpha = node._rows(x)
    _, w = points.columns(x, node.axis, scaled=False)
    z = kernel.scaled(y, rows, jnp.broadcast_to(alpha, y.shape))
    return alpha * alpha * jnp.sum(kernel.weighted(w, penalty.value(jnp.sum(z * z, axis=1))[:, None]))
