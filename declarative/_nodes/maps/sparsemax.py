"""Sparsemax: Euclidean projection onto the probability simplex."""

from typing import ClassVar, Literal

import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Bool, Float

from ..._core.node import AbstractDeclarativeNode, Policy, envelope, evaluate, make_policy
from . import simplex


class Sparsemax(AbstractDeclarativeNode):
    r"""Euclidean projection of a score vector onto the probability simplex.

    **Problem.**     $p^*(z) = \arg\min_p \tfrac12\|p - z\|^2$ subject to $p \ge 0$, $1^\top p = 1$                                  (P)
    **Optimality.**  $p_i = \max(z_i - \tau, 0)$ (K1),   $\sum_i \max(z_i - \tau, 0) - 1 = 0$ (K2)
    **Solver.**      (K2) is scalar, decreasing and piecewise linear in $\tau$: Newton from the left, monotone and finite; no sort.
    **Gradient.**    Implicit function theorem on (K1)-(K2): $\partial p/\partial z = \mathrm{diag}(s) - ss^\top/|S|$, $s_i = 1[z_i > \tau]$,
                     $|S| = \sum_i s_i$. Not differentiable where some $z_i = \tau$; $s_i = 0$ is used there. All modes; the second
                     derivative is zero almost everywhere. `adjoint=ImplicitAdjoint()` solves the bordered system in O(n).
    **Use instead.** `Softmax` when no exact zeros are wanted: cheaper, and smooth everywhere; `Entmax(1.5)` in between.

    | symbol   | code      | shape  | meaning                                                             |
    |----------|-----------|--------|---------------------------------------------------------------------|
    | $z$      | `scores`  | `(n,)` | scores, dimensionless                                               |
    | $\tau$   | `dual`    | `()`   | threshold, same units as `z`; `unknown.theta` is $\tau + 1 - \max z$ |
    | $s$      |           | `(n,)` | entries of `p` that are positive                                    |

    **Arguments:** `throw`, `on_failure`, `max_steps`, `adjoint`: see `Policy` and `ImplicitAdjoint`.
    **Call:** `sparsemax(z, mask=None)`: `Float[Array, " n"]`, float32 or float64 (half precision is computed in float32); `mask` is
    boolean, True where an entry takes part.
    **Returns:** `Float[Array, " n"]`, non-negative, summing to 1. Masked entries and scores of -inf get 0 and no gradient; a row of
    nothing else gets zeros; scores of +inf share the mass equally, with no gradient.
    **Raises:** `ValueError` for data of the wrong rank or dtype; with `throw=True` a `SolveError` at run time if a score is NaN or
    `max_steps` is reached.
    **Reference:** Martins & Astudillo 2016, *From Softmax to Sparsemax*, arXiv:1602.02068: Eq. (2) is (P), Prop. 1 is (K1)-(K2).
    """

    adjoint: optx.AbstractAdjoint | None
    policy: Policy

    smoothness: ClassVar[str] = "piecewise linear: not differentiable where a score equals the threshold"
    closed_form: ClassVar[bool] = True

    def __init__(
        self,
        *,
        adjoint: optx.AbstractAdjoint | None = None,
        policy: Policy | None = None,
        throw: bool | None = None,
        on_failure: Literal["nan", "zero"] | None = None,
        max_steps: int | None = None,
    ):
        self.adjoint = adjoint
        self.policy = make_policy(policy, throw=throw, on_failure=on_failure, max_steps=max_steps)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, z: Float[Array, " n"], *, mask: Bool[Array, " n"] | None = None
    ) -> Float[Array, " n"]:
        return evaluate(self, self.pack(z, mask))

    def pack(self, z, mask=None):  # pyright: ignore[reportIncompatibleMethodOverride]  (the names of a call)
        return simplex.pack(z, mask)

    def check(self, x):
        simplex.check(x, "Sparsemax")

    def optimality(self, y: simplex.SimplexPoint, x: simplex.Scores) -> simplex.SimplexPoint:
        return simplex.optimality(y, x, 2.0)

    def objective(self, y, x):
        return envelope(_half_square_distance, y, x)

    def dual(self, y, x):
        return simplex.multiplier(y, x) - 1

    def run(self, x, y0, loop):
        del y0
        return simplex.run(x, 2.0, self.policy.max_steps, loop, shifted=self.adjoint is not None)

    def value(self, y, x):
        return y.probabilities

    def linear_system(self, y, x, factor):
        del factor
        return simplex.linear_system(y, x, 2.0)

    def kink_distance(self, y, x):
        return simplex.threshold_distance(y, x, 2.0)


def _half_square_distance(y, x):
    kept = simplex.masked(x) > -jnp.inf
    return jnp.sum(jnp.where(kept, y.probabilities - jnp.where(kept, x.scores, 0), 0) ** 2) / 2
