"""Soft sorting: sorted values, each a smooth function of all that are near it."""

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


class SoftSort(AbstractDeclarativeNode):
    r"""Sorting with a gradient that knows of the neighbours: values closer than they should be are mixed.

    **Problem.**     $y^*(x) = \arg\min_y \tfrac12 \|y - \rho/\epsilon\|^2$, y in the convex hull of the permutations of x,
                     $\rho = (1, \dots, n)$                                                                                          (P)
    **Optimality.**  With w = x in ascending order and $s = \rho/\epsilon$: $w_i + \lambda_i - \lambda_{i-1} - y_i = 0$ (K1);
                     $-\min(\lambda_i,\; s_{i+1} - s_i - y_{i+1} + y_i) = 0$ (K2)
    **Solver.**      Direct: a sort, and isotonic regression of $s - w$ by divide and conquer; see `_solvers/isotonic.py`.
    **Gradient.**    On a block of places y is $\rho/\epsilon$ plus a constant, with the mean of the x that were sorted there: the derivative
                     averages over the block. All modes, in x and in the strength. Not differentiable where a block is about to merge or
                     split, and where equal values lie in different blocks (they keep the order in which they come).
                     `adjoint=ImplicitAdjoint()` solves (K1)-(K2) in O(n).
    **Use instead.** `SoftRank` for the places of values. `jnp.sort`, the limit of a small strength, has a gradient too: that of a permutation.

    | symbol     | code       | shape      | meaning                                                                             |
    |------------|------------|------------|-------------------------------------------------------------------------------------|
    | $x$        | `x`        | `(n,)`     | values                                                                              |
    | $\epsilon$ | `strength` | `()`       | positive, in units of 1 / x: neighbours more than $1/\epsilon$ apart begin to mix   |
    | $\lambda$  | `dual`     | `(n - 1,)` | what $\sum_{j \le i} y_j \ge \sum_{j \le i} w_j$ has to spare                       |

    **Arguments:** `strength`, a positive number or scalar array (learnable). Below 1 over the largest gap of neighbours y is x sorted; for a
    large one y tends to the mean. `descending`: the largest first. `throw`, `on_failure`, `max_steps`, `adjoint`: see `Policy` and
    `ImplicitAdjoint`. (`max_steps` is of no use here.)
    **Call:** `soft_sort(x)`: `Float[Array, " n"]`, float32 or float64; `jax.vmap` for batches.
    **Returns:** `Float[Array, " n"]`, in order, with the sum of x.
    **Raises:** `ValueError` for a strength <= 0 or data of the wrong shape or dtype; with `throw=True` a `SolveError` at run time if an entry is
    not finite, or an array strength is not positive.
    **Reference:** Blondel, Teboul, Berthet & Djolonga 2020, *Fast Differentiable Sorting and Ranking*, arXiv:2002.08871: their soft sort
    with quadratic regularisation. They sort in descending order; ascending by default, and the strength, are those of their code.
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
        refuse_unrolling(adjoint, "unrolls iterations, and soft sorting has none: use adjoint=None.")
        self.adjoint = adjoint
        self.policy = make_policy(policy, throw=throw, on_failure=on_failure, max_steps=max_steps)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Array, " n"]
    ) -> Float[Array, " n"]:
        return evaluate(self, x)

    def pack(self, x):
        return jnp.asarray(x)

    def check(self, x):
        check_vector(x, "SoftSort", "x")

    def optimality(self, y: permutahedron.OrderedPoint, x: Float[Array, " n"]) -> permutahedron.OrderedPoint:
        return permutahedron.optimality(y, self._problem(x))

    def dual(self, y, x):
        return y.dual

    def run(self, x, y0, loop):
        del y0, loop
        return permutahedron.run(self._problem(x))

    def value(self, y, x):
        return y.ordered[::-1] if self.descending else y.ordered

    def linear_system(self, y, x, factor):
        del factor
        return permutahedron.linear_system(y, self._problem(x))

    def kink_distance(self, y, x):
        p = self._problem(x)
        return jnp.minimum(permutahedron.kink_distance(y, p), permutahedron.ties(y, p))

    def _problem(self, x: Float[Array, " n"]) -> permutahedron.Problem:
        strength: Array = jnp.asarray(self.strength, x.dtype)
        return permutahedron.Problem(permutahedron.places(x), strength, x[permutahedron.order(x)])
