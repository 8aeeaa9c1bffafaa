"""Soft ranking: ranks that are a continuous function of the values."""

from typing import ClassVar, Literal

import equinox as eqx
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Float

from ..._core.adjoint import refuse_unrolling
from ..._core.arguments import flag
from ..._core.node import AbstractDeclarativeNode, Policy, evaluate, make_policy
from . import permutahedron
from .isotonic import check_vector


class SoftRank(AbstractDeclarativeNode):
    r"""Ranks that change continuously, and have a gradient, where values are close to one another.

    **Problem.**     $r^*(x) = \arg\min_r \tfrac12 \|r - x/\epsilon\|^2$, r in the convex hull of the permutations of $\rho = (1, \dots, n)$  (P)
    **Optimality.**  With s = x / $\epsilon$ and r in the order of x, ascending, called y: $\rho_i + \lambda_i - \lambda_{i-1} - y_i = 0$ (K1);
                     $-\min(\lambda_i,\; s_{i+1} - s_i - y_{i+1} + y_i) = 0$ (K2)
    **Solver.**      Direct: a sort, and isotonic regression of $s - \rho$ by divide and conquer; see `_solvers/isotonic.py`.
    **Gradient.**    On a block, the ranks are its mean rank plus $(x - \bar x)/\epsilon$: zero for a value that is alone. All modes, in x and in the
                     strength. Not differentiable where a block is about to merge or split; differentiable at ties, which share a block.
                     `adjoint=ImplicitAdjoint()` solves (K1)-(K2) in O(n).
    **Use instead.** `SoftSort` for the sorted values themselves.

    | symbol     | code       | shape      | meaning                                                                     |
    |------------|------------|------------|-----------------------------------------------------------------------------|
    | $x$        | `x`        | `(n,)`     | values                                                                      |
    | $\epsilon$ | `strength` | `()`       | positive, in units of x: neighbours closer than $\epsilon$ begin to mix     |
    | $\lambda$  | `dual`     | `(n - 1,)` | what $\sum_{j \le i} y_j \ge \sum_{j \le i} \rho_j$ has to spare            |

    **Arguments:** `strength`, a positive number or scalar array (learnable). Below the least gap of neighbours r is exactly the ranks, of which
    equal values share the average one; for a large one r tends to $(n + 1)/2$. `descending`: the largest value has rank 1. `throw`, `on_failure`,
    `max_steps`, `adjoint`: see `Policy` and `ImplicitAdjoint`. (`max_steps` is of no use here.)
    **Call:** `soft_rank(x)`: `Float[Array, " n"]`, float32 or float64; `jax.vmap` for batches.
    **Returns:** `Float[Array, " n"]`, between 1 (the smallest) and n, with the sum $n(n + 1)/2$.
    **Raises:** `ValueError` for a strength <= 0 or data of the wrong shape or dtype; with `throw=True` a `SolveError` at run time if an entry is
    not finite, or an array strength is not positive.
    **Reference:** Blondel, Teboul, Berthet & Djolonga 2020, *Fast Differentiable Sorting and Ranking*, arXiv:2002.08871: their soft rank
    with quadratic regularisation. In the paper the largest value has rank 1; the smallest by default, and the strength, are those of their code.
    """

    strength: float | Float[Array, ""]
    descending: bool = eqx.field(static=True)
    adjoint: optx.AbstractAdjoint | None
    policy: Policy

    smoothness: ClassVar[str] = (
        "piecewise linear in x: not differentiable where a block is about to split, or two to merge"
    )
    closed_form: ClassVar[bool] = True

    def __init__(
        self,
        strength: float | Float[Array, ""] = 1.0,
        *,
        descending: bool = False,
        adjoint: optx.AbstractAdjoint | None = None,
        policy: Policy | None = None,
        throw: bool | None = None,
        on_failure: Literal["nan", "zero"] | None = None,
        max_steps: int | None = None,
    ):
        self.strength = permutahedron.checked_strength(strength)
        self.descending = flag(descending, "descending")
        refuse_unrolling(adjoint, "unrolls iterations, and soft ranking has none: use adjoint=None.")
        self.adjoint = adjoint
        self.policy = make_policy(policy, throw=throw, on_failure=on_failure, max_steps=max_steps)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Array, " n"]
    ) -> Float[Array, " n"]:
        return evaluate(self, x)

    def pack(self, x):
        return jnp.asarray(x)

    def check(self, x):
        check_vector(x, "SoftRank", "x")

    def optimality(self, y: permutahedron.OrderedPoint, x: Float[Array, " n"]) -> permutahedron.OrderedPoint:
        return permutahedron.optimality(y, self._problem(x))

    def dual(self, y, x):
        return y.dual

    def run(self, x, y0, loop):
        del y0, loop
        return permutahedron.run(self._problem(x))

    def value(self, y, x):
        ranks = jnp.zeros_like(x).at[permutahedron.order(x)].set(y.ordered, unique_indices=True)
        return x.size + 1 - ranks if self.descending else ranks

    def linear_system(self, y, x, factor):
        del factor
        return permutahedron.linear_system(y, self._problem(x))

    def kink_distance(self, y, x):
        p = self._problem(x)
        return permutahedron.kink_distance(y, p) * p.strength

    def _problem(self, x: Float[Array, " n"]) -> permutahedron.Problem:
        strength: Array = jnp.asarray(self.strength, x.dtype)
        return permutahedron.Problem(x[permutahedron.order(x)], strength, permutahedron.places(x))
