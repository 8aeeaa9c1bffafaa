r"""Softmax as an optimisation layer: the tutorial of the library. Copy this file to start a node.

Reads from top to bottom as every node does: the problem, its optimality conditions, how it is solved, how it is differentiated.
The closed form is what runs; the generic route (`adjoint=ImplicitAdjoint()`) solves the same conditions by the implicit function
theorem, and `tests/test_softmax.py` holds the two and the published Jacobian together.
"""

from typing import ClassVar, Literal

import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Bool, Float

from ..._core.arguments import number
from ..._core.node import AbstractDeclarativeNode, Policy, envelope, evaluate, make_policy
from . import simplex


class Softmax(AbstractDeclarativeNode):
    r"""The distribution that maximises expected score plus entropy.

    **Problem.**     $p^*(z) = \arg\max_p \; p^\top z + T\,H(p)$ subject to $1^\top p = 1$, $p \ge 0$, $H(p) = -\sum_i p_i \log p_i$          (P)
    **Optimality.**  $z_i - T(\log p_i + 1) + u = 0$ (K1), $1^\top p - 1 = 0$ (K2). The gradient of $H$ is infinite at $p_i = 0$, so
                     $p > 0$ and the bounds have no multiplier. Computed in the form that stays finite when $p_i$ underflows,
                     $\exp(z_i / T - \theta) - p_i = 0$ with $\theta = 1 - u/T$.
    **Solver.**      Closed form: $\theta = \log \sum_i \exp(z_i / T)$.
    **Gradient.**    Implicit function theorem on (K1)-(K2): $\partial p/\partial z = (\mathrm{diag}(p) - pp^\top)/T$. Smooth everywhere; all modes,
                     any order. `adjoint=ImplicitAdjoint()` solves the bordered-diagonal system in O(n) instead.
    **Use instead.** `Sparsemax` or `Entmax` when exact zeros are wanted.

    | symbol   | code          | shape  | meaning                                                                   |
    |----------|---------------|--------|---------------------------------------------------------------------------|
    | $z$      | `scores`      | `(n,)` | scores                                                                    |
    | $T$      | `temperature` | `()`   | positive, in the units of the scores; an array is learnable               |
    | $u$      | `dual`        | `()`   | multiplier of (K2), $T(1 - \mathrm{logsumexp}(z/T))$; of either sign      |

    **Arguments:** `temperature`, a positive number or scalar array. `throw`, `on_failure`, `adjoint`: see `Policy` and
    `ImplicitAdjoint`.
    **Call:** `softmax(z, mask=None)`: `Float[Array, " n"]`, float32 or float64 (half precision is computed in float32); `mask` is
    boolean, True where an entry takes part.
    **Returns:** `Float[Array, " n"]`, non-negative, summing to 1. Masked entries and scores of -inf get 0 and no gradient; a row of
    nothing else gets zeros; scores of +inf share the mass equally, with no gradient.
    **Raises:** `ValueError` for a temperature <= 0 or data of the wrong rank or dtype; with `throw=True` a `SolveError` at run time
    if a score is NaN, or an array temperature is not positive.
    **Reference:** Chiu 2021, *Implicit Differentiation*, Eq. (1)-(7). Errata: its primal feasibility $u(1^\top p - 1) = 0$ makes the
    Jacobian singular where $u = 0$, so (K2) is the plain row; $u > 0$ does not hold; the sign in its Eq. (5). Gao & Pavel 2018.
    """

    temperature: float | Float[Array, ""]
    adjoint: optx.AbstractAdjoint | None
    policy: Policy

    smoothness: ClassVar[str] = "infinitely differentiable everywhere"
    closed_form: ClassVar[bool] = True
    fails_as_nan: ClassVar[bool] = True  # there is no iteration to run out of steps

    def __init__(
        self,
        temperature: float | Float[Array, ""] = 1.0,
        *,
        adjoint: optx.AbstractAdjoint | None = None,
        policy: Policy | None = None,
        throw: bool | None = None,
        on_failure: Literal["nan", "zero"] | None = None,
        max_steps: int | None = None,
    ):
        self.temperature = number(temperature, "temperature")
        self.adjoint = adjoint
        self.policy = make_policy(policy, throw=throw, on_failure=on_failure, max_steps=max_steps)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]  (the friendlier form that DESIGN §4 asks for)
        self, z: Float[Array, " n"], *, mask: Bool[Array, " n"] | None = None
    ) -> Float[Array, " n"]:
        return evaluate(self, self.pack(z, mask))

    def pack(self, z, mask=None):  # pyright: ignore[reportIncompatibleMethodOverride]  (the names of a call)
        return simplex.pack(z, mask)

    def check(self, x):
        simplex.check(x, "Softmax")

    # Problem and optimality

    def optimality(self, y: simplex.SimplexPoint, x: simplex.Scores) -> simplex.SimplexPoint:
        return simplex.optimality(y, self._in_units_of_temperature(x), 1.0)

    def objective(self, y, x):
        return envelope(_attained, y, (x, self.temperature))

    def dual(self, y, x):
        return self._temperature(x) * (1 - simplex.multiplier(y, self._in_units_of_temperature(x)))

    # Solver

    def run(self, x, y0, loop):
        del y0
        return simplex.run(
            self._in_units_of_temperature(x), 1.0, self.policy.max_steps, loop, shifted=self.adjoint is not None
        )

    def value(self, y, x):
        return y.probabilities

    # Structure of the gradient

    def linear_system(self, y, x, factor):
        del factor
        return simplex.linear_system(y, self._in_units_of_temperature(x), 1.0)

    def _temperature(self, x: simplex.Scores):
        temperature = jnp.asarray(self.temperature, x.scores.dtype)
        return jnp.where(temperature > 0, temperature, jnp.nan)

    def _in_units_of_temperature(self, x: simplex.Scores) -> simplex.Scores:
        if isinstance(self.temperature, (int, float)) and self.temperature == 1:
            return x
        # A select on both sides of the quotient: its derivative at an infinite score would be 0 * inf.
        finite = jnp.isfinite(x.scores)
        scaled = jnp.where(finite, x.scores, 0) / self._temperature(x)
        return simplex.Scores(jnp.where(finite, scaled, x.scores), x.mask)


def _attained(y, bound):
    x, temperature = bound
    p, t = y.probabilities, jnp.asarray(temperature, y.probabilities.dtype)
    return p @ jnp.where(p > 0, simplex.masked(x), 0) + t * simplex.tsallis_entropy(p, 1.0)
