"""Isotonic regression: the nearest monotone sequence."""

from typing import Any, ClassVar, Literal

import equinox as eqx
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Float

from ..._core.adjoint import refuse_unrolling
from ..._core.arguments import flag
from ..._core.implicit import LinearSystem, Run
from ..._core.node import AbstractDeclarativeNode, Policy, envelope, evaluate, make_policy
from ..._core.results import RESULTS, choose
from ..._linear.chain import Chain, ChainSolver, with_edges
from ..._solvers.isotonic import inverse_unit, isotonic, relative
from ..projections.sets import pinned


class IsotonicData(eqx.Module):
    """A sequence, shape (n,), and positive weights of its entries (None: ones)."""

    x: Array
    weights: Array | None = None


class IsotonicPoint(eqx.Module):
    """The unknown: the fit, and the multiplier on each pair of neighbours, for weights whose largest is about 1."""

    fit: Float[Array, " n"]
    dual: Float[Array, " edges"]


class Isotonic(AbstractDeclarativeNode):
    r"""Isotonic regression: the monotone sequence that is nearest to the data.

    **Problem.**     $y^*(x, w) = \arg\min_y \tfrac12 \sum_i w_i (y_i - x_i)^2$ subject to $y_1 \le \dots \le y_n$                     (P)
    **Optimality.**  $w_i (x_i - y_i) - \lambda_i + \lambda_{i-1} = 0$, $\lambda_0 = \lambda_n = 0$ (K1);
                     $-\min(\lambda_i,\; y_{i+1} - y_i) = 0$ (K2)
    **Solver.**      Direct: pooling by divide and conquer, $\log_2 n$ parallel levels; see `_solvers/isotonic.py`.
    **Gradient.**    y is constant on blocks, the weighted mean of x on each: linear in x, smooth in w, all modes. Not differentiable where
                     two blocks are about to merge, or one to split ($\lambda_i = y_{i+1} - y_i = 0$): neighbours that are equal count as one block.
                     `adjoint=ImplicitAdjoint()` solves (K1)-(K2) in O(n).
    **Use instead.** `QuadraticProgram` for other constraints on differences; `TotalVariation` for few jumps, of either sign.

    | symbol    | code      | shape      | meaning                                            |
    |-----------|-----------|------------|----------------------------------------------------|
    | $x$       | `x`       | `(n,)`     | the data                                           |
    | $w$       | `weights` | `(n,)`     | positive                                           |
    | $\lambda$ | `dual`    | `(n - 1,)` | multiplier of $y_i \le y_{i+1}$, in units of $w x$ |

    **Arguments:** `increasing`: False for $y_1 \ge \dots \ge y_n$. `throw`, `on_failure`, `max_steps`, `adjoint`: see `Policy` and
    `ImplicitAdjoint`. (`max_steps` is of no use here.)
    **Call:** `isotonic(x, weights=None)`: `Float[Array, " n"]`, float32 or float64; `jax.vmap` for batches. Between bounds, the solution is
    `jnp.clip(isotonic(x), lower, upper)`.
    **Returns:** `Float[Array, " n"]`, in order to the last digit.
    **Raises:** `ValueError` for data of the wrong shape or dtype; with `throw=True` a `SolveError` at run time if an entry is not finite, or
    a weight is not positive and finite. (An entry without weight has no unique fit: leave it out, or give it a small one.)
    **Reference:** Barlow, Bartholomew, Bremner & Brunk 1972, *Statistical Inference under Order Restrictions*.
    """

    increasing: bool = eqx.field(static=True)
    adjoint: optx.AbstractAdjoint | None
    policy: Policy

    smoothness: ClassVar[str] = "piecewise smooth: not differentiable where a block is about to split, or two to merge"
    closed_form: ClassVar[bool] = True

    def __init__(
        self,
        *,
        increasing: bool = True,
        adjoint: optx.AbstractAdjoint | None = None,
        policy: Policy | None = None,
        throw: bool | None = None,
        on_failure: Literal["nan", "zero"] | None = None,
        max_steps: int | None = None,
    ):
        self.increasing = flag(increasing, "increasing")
        refuse_unrolling(adjoint, "unrolls iterations, and isotonic regression has none: use adjoint=None.")
        self.adjoint = adjoint
        self.policy = make_policy(policy, throw=throw, on_failure=on_failure, max_steps=max_steps)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Array, " n"] | IsotonicData, weights: Float[Array, " n"] | None = None
    ) -> Float[Array, " n"]:
        return evaluate(self, self.pack(x, weights))

    def pack(self, x: Any, weights: Any = None):
        if isinstance(x, IsotonicData):
            return x
        data, weights = x if isinstance(x, tuple) and len(x) == 2 else (x, weights)
        data = jnp.asarray(data)
        # Integers, or float64 weights, for float32 data: the data decide.
        dtype = data.dtype if jnp.issubdtype(data.dtype, jnp.floating) else None
        return IsotonicData(data, None if weights is None else jnp.asarray(weights, dtype))

    def check(self, x: Any):
        if not isinstance(x, IsotonicData):
            raise ValueError(f"Isotonic takes x, (x, weights) or `IsotonicData`, got {type(x).__name__}.")
        check_vector(x.x, "Isotonic", "x")
        if x.weights is not None and (x.weights.shape != x.x.shape or x.weights.dtype != x.x.dtype):
            raise ValueError(
                f"weights must have the shape and dtype of x, {x.x.dtype}{list(x.x.shape)}; "
                f"got {x.weights.dtype}{list(x.weights.shape)}."
            )

    def optimality(self, y: IsotonicPoint, x: IsotonicData) -> IsotonicPoint:
        pull = x.x - y.fit if x.weights is None else relative(x.weights) * (x.x - y.fit)
        step = self._sign * (y.fit[1:] - y.fit[:-1])
        picked = jnp.where(self._tied(y), step, y.dual)
        return IsotonicPoint(with_edges(pull, -self._sign * y.dual), -pinned(picked, jnp.minimum(y.dual, step)))

    def objective(self, y, x):
        return envelope(_distance, y, x)

    def dual(self, y, x):
        return y.dual if x.weights is None else y.dual / inverse_unit(x.weights)

    def run(self, x, y0, loop):
        del y0, loop
        found = isotonic(self._sign * x.x, x.weights)
        result = choose(found.good, RESULTS.successful, RESULTS.nonfinite_data)
        return Run(IsotonicPoint(self._sign * found.point, found.dual), result)

    def value(self, y, x):
        return y.fit

    def linear_system(self, y, x, factor):
        del factor
        weight = None if x.weights is None else relative(x.weights)
        return LinearSystem(Chain(~self._tied(y), x.x, weight=weight, sign=-self._sign), ChainSolver())

    def kink_distance(self, y, x):
        # To a split: the multiplier inside of a block; to a merger: the jump. At most.
        return jnp.min(jnp.maximum(y.dual, self._sign * (y.fit[1:] - y.fit[:-1])), initial=jnp.inf)

    @property
    def _sign(self) -> int:
        return 1 if self.increasing else -1

    def _tied(self, y: IsotonicPoint):
        """The edges inside of blocks: at equality they count as such."""
        return self._sign * (y.fit[1:] - y.fit[:-1]) <= jnp.maximum(y.dual, 0)


def check_vector(x: Array, node: str, name: str) -> None:
    """Shape and dtype of what is put in order."""
    if x.ndim != 1:
        raise ValueError(
            f"{node} takes one vector {name}, shape (n,), got shape {x.shape}: use `jax.vmap` for batches."
        )
    if x.size == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{node} takes a non-empty floating vector {name}, got {x.dtype}{list(x.shape)}.")


def _distance(y: IsotonicPoint, x: IsotonicData) -> Float[Array, ""]:
    square = jnp.square(y.fit - x.x)
    return jnp.sum(square if x.weights is None else x.weights * square) / 2
