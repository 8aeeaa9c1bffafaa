"""Entmax: the family of sparse maps from softmax to sparsemax and beyond, with a learnable exponent."""

from typing import ClassVar, Literal

import optimistix as optx
from jaxtyping import Array, Bool, Float

from ..._core.arguments import number
from ..._core.node import AbstractDeclarativeNode, Policy, envelope, evaluate, make_policy
from . import simplex


class Entmax(AbstractDeclarativeNode):
    r"""The distribution that maximises expected score plus Tsallis entropy.

    **Problem.**     $p^*(z) = \arg\max_p \; p^\top z + H_\alpha(p)$ subject to $1^\top p = 1$, $p \ge 0$,
                     $H_\alpha(p) = \sum_i (p_i - p_i^\alpha) / (\alpha(\alpha - 1))$                                                     (P)
    **Optimality.**  $p_i = [(\alpha - 1) z_i - \tau]_+^{1/(\alpha - 1)}$ (K1),   $1^\top p - 1 = 0$ (K2)
    **Solver.**      (K2) is scalar and decreasing in $\tau$: safeguarded Newton-like steps, no sort; exact quadratics at $\alpha = 1.5$.
    **Gradient.**    Implicit function theorem on (K1)-(K2): with $s_i = p_i^{2-\alpha}$ on the support,
                     $\partial p/\partial z = \mathrm{diag}(s) - ss^\top/1^\top s$; also with respect to $\alpha$, if that is an array. All modes, any
                     order. For $\alpha < 2$ differentiable everywhere (twice: away from $(\alpha - 1) z_i = \tau$); at $\alpha = 2$ kinked as
                     `Sparsemax`; for $\alpha > 2$ the derivative is unbounded as $p_i \to 0^+$. On a kink $s_i = 0$ is used.
    **Use instead.** `Softmax` for $\alpha = 1$; `Sparsemax` for $\alpha = 2$ (the same kernel runs).

    | symbol   | code      | shape  | meaning                                                                                        |
    |----------|-----------|--------|------------------------------------------------------------------------------------------------|
    | $z$      | `scores`  | `(n,)` | scores, dimensionless                                                                          |
    | $\alpha$ | `alpha`   | `()`   | exponent in (1, 4]; a Python number is fixed, an array is a learnable leaf                     |
    | $\tau$   | `dual`    | `()`   | threshold; `unknown.theta` is $(\tau + 1)/(\alpha - 1) - \max z$, finite as $\alpha \to 1$       |

    **Arguments:** `alpha`. `throw`, `on_failure`, `max_steps`, `adjoint`: see `Policy` and `ImplicitAdjoint`.
    **Call:** `entmax(z, mask=None)`: `Float[Array, " n"]`, float32 or float64 (half precision is computed in float32); `mask` is boolean,
    True where an entry takes part.
    **Returns:** `Float[Array, " n"]`, non-negative, summing to 1. Masked entries and scores of -inf get 0 and no gradient; a row of
    nothing else gets zeros; scores of +inf share the mass equally, with no gradient.
    **Raises:** `ValueError` for a number `alpha` outside (1, 4] or data of the wrong rank or dtype; with `throw=True` a `SolveError` at
    run time if a score is NaN, an array `alpha` has left [1, 4], or `max_steps` is reached.
    **Reference:** Peters, Niculae & Martins 2019, *Sparse Sequence-to-Sequence Models*, arXiv:1905.05702; Correia, Niculae & Martins 2019,
    *Adaptively Sparse Transformers*, arXiv:1909.00015 (the derivative with respect to alpha).
    """

    alpha: float | Float[Array, ""]
    adjoint: optx.AbstractAdjoint | None
    policy: Policy

    smoothness: ClassVar[str] = (
        "continuous; differentiable where no score equals the threshold (for alpha < 2 everywhere; unbounded derivative near it for "
        "alpha > 2)"
    )
    closed_form: ClassVar[bool] = True

    def __init__(
        self,
        alpha: float | Float[Array, ""],
        *,
        adjoint: optx.AbstractAdjoint | None = None,
        policy: Policy | None = None,
        throw: bool | None = None,
        on_failure: Literal["nan", "zero"] | None = None,
        max_steps: int | None = None,
    ):
        self.alpha = number(alpha, "alpha", 1.0, 4.0, closed="high")
        self.adjoint = adjoint
        self.policy = make_policy(policy, throw=throw, on_failure=on_failure, max_steps=max_steps)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, z: Float[Array, " n"], *, mask: Bool[Array, " n"] | None = None
    ) -> Float[Array, " n"]:
        return evaluate(self, self.pack(z, mask))

    def pack(self, z, mask=None):  # pyright: ignore[reportIncompatibleMethodOverride]  (the names of a call)
        return simplex.pack(z, mask)

    def check(self, x):
        simplex.check(x, "Entmax")

    def optimality(self, y: simplex.SimplexPoint, x: simplex.Scores) -> simplex.SimplexPoint:
        return simplex.optimality(y, x, self._alpha(x))

    def objective(self, y, x):
        return envelope(_attained, y, (x, self._alpha(x)))

    def dual(self, y, x):
        return (self._alpha(x) - 1) * simplex.multiplier(y, x) - 1

    def run(self, x, y0, loop):
        del y0
        return simplex.run(x, self._alpha(x), self.policy.max_steps, loop, shifted=self.adjoint is not None)

    def value(self, y, x):
        return y.probabilities

    def linear_system(self, y, x, factor):
        del factor
        return simplex.linear_system(y, x, self._alpha(x))

    def kink_distance(self, y, x):
        return simplex.threshold_distance(y, x, self._alpha(x))

    def _alpha(self, x):
        # A float32 parameter beside float64 scores is meant, and exact.
        return self.alpha if isinstance(self.alpha, (int, float)) else self.alpha.astype(x.scores.dtype)


def _attained(y, bound):
    return simplex.attained(y, *bound)
