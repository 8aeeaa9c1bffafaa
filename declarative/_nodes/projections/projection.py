"""Euclidean projection onto a set, as a layer."""

from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Bool, Float

from ..._core.adjoint import ImplicitAdjoint, refuse_unrolling
from ..._core.node import AbstractDeclarativeNode, Policy, evaluate, make_policy
from .sets import AbstractSet, check, keep, pack


class Projection(AbstractDeclarativeNode):
    r"""Euclidean projection onto a set: the nearest of its points.

    **Problem.**     $y^*(x) = \arg\min_{y \in C} \tfrac12 \|y - x\|^2$                                                        (P)
    **Optimality.**  $x - y$ in the normal cone of C at y: the conditions of the set, with their multipliers.
    **Solver.**      Closed forms; a scalar equation by a finite Newton iteration, without a sort; an eigendecomposition; or, for
                     `Polyhedron`, a quadratic program. Each set says.
    **Gradient.**    In closed form by the structure of the set, in x and in all parameters of the set that are arrays; forward and
                     reverse mode, any order. Projections are not differentiable on kinks, where the set says what is
                     returned; `solve(x).stats["kink_distance"]` is how far the nearest one is. `adjoint=ImplicitAdjoint()` solves the
                     conditions instead. What has no iterations cannot be unrolled.
    **Use instead.** `projection_simplex(x)` and its like: bare functions, without a status. `Sparsemax` for attention.

    | symbol | code         | shape                | meaning                                       |
    |--------|--------------|----------------------|-----------------------------------------------|
    | $x$    | `x`          | `(n,)`, or a matrix  | what is projected                             |
    | $y$    | `value`      | as x                 | the point of the set                          |
    |        | `dual`       | see the set          | multipliers                                   |
    |        | `objective`  | `()`                 | $\tfrac12\|y - x\|^2$                         |

    **Arguments:** `onto`: `Simplex`, `CappedSimplex`, `BoxSection`, `L1Ball`, `L2Ball`, `LInfBall`, `L1Sphere`, `L2Sphere`, `Box`,
    `NonNegative`, `Hyperplane`, `HalfSpace`, `AffineSet`, `Polyhedron`, `SecondOrderCone`, `PositiveSemidefinite`, `Spectraplex`,
    `TransportPolytope`, `Birkhoff`. `throw`, `on_failure`, `max_steps`, `adjoint`: see `Policy` and `ImplicitAdjoint`.
    **Call:** `projection(x, mask=None)`; `mask` is boolean, True where an entry takes part (simplices, box sections, balls, spheres, boxes).
    Masked entries give 0 and get no gradient.
    **Returns:** an array like x, float32 or float64 (half precision is computed in float32).
    **Raises:** `ValueError` for data or parameters of the wrong shape or dtype; with `throw=True` a `SolveError` at run time:
    `infeasible` if the set is empty, `nonfinite_data`, `not_a_solution` for the sphere around x.
    **Reference:** Gould, Hartley & Campbell 2019, arXiv:1909.04866 (balls and spheres as declarative nodes); Blondel et al. 2021,
    arXiv:2105.15183 (the projections of JAXopt, whose names the functions keep).
    """

    onto: AbstractSet
    adjoint: optx.AbstractAdjoint | None
    policy: Policy

    smoothness: ClassVar[str] = (
        "piecewise smooth: not differentiable where a constraint is met without a push (see the set)"
    )
    closed_form: ClassVar[bool] = True

    def __init__(
        self,
        onto: Any,
        *,
        adjoint: optx.AbstractAdjoint | None = None,
        policy: Policy | None = None,
        throw: bool | None = None,
        on_failure: Literal["nan", "zero"] | None = None,
        max_steps: int | None = None,
    ):
        if not isinstance(onto, AbstractSet):
            raise ValueError(f"onto must be a set, such as `declarative.Simplex()`; got {onto!r}.")
        refuse_unrolling(adjoint, "unrolls iterations, and a projection has none: use adjoint=None.")
        self.onto = onto
        self.adjoint = ImplicitAdjoint() if adjoint is None and not onto.closed_form else adjoint
        self.policy = make_policy(policy, throw=throw, on_failure=on_failure, max_steps=max_steps)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Array, "..."], mask: Bool[Array, " n"] | None = None
    ) -> Float[Array, "..."]:
        return evaluate(self, self.pack(x, mask))

    def pack(self, x, mask=None):
        return pack(x, mask)

    def check(self, x):
        check(self.onto, x)

    def optimality(self, y, x):
        return self.onto.optimality(y, x)

    def run(self, x, y0, loop):
        del y0, loop
        return self.onto.run(x, self.policy.max_steps)

    def value(self, y, x):
        return self.onto.point(y)

    def dual(self, y, x):
        return self.onto.dual(y)

    def objective(self, y, x):
        return jnp.sum(jnp.square(keep(x.mask, self.onto.point(y) - x.x))) / 2

    def linear_system(self, y, x, factor):
        return self.onto.linear_system(y, x, factor)

    def kink_distance(self, y, x):
        return self.onto.kink_distance(y, x)
