"""One-dimensional total variation denoising (fused lasso signal approximation)."""

from typing import Any, ClassVar, Literal

import equinox as eqx
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Float

from ..._core.implicit import LinearSystem, Run
from ..._core.node import AbstractDeclarativeNode, Policy, envelope, evaluate, make_policy
from ..._core.results import RESULTS, choose
from ..._linear.chain import Chain, ChainSolver
from ..._solvers.total_variation import total_variation, with_edges


class TotalVariationData(eqx.Module):
    """A signal, shape (n,), and the strength: one number, or one for each pair of neighbours, shape (n - 1,); at least 0."""

    signal: Array
    strength: Array


class TotalVariationPoint(eqx.Module):
    """The unknown: the denoised signal, and the dual variable on each edge."""

    signal: Float[Array, " n"]
    dual: Float[Array, " edges"]


class TotalVariation(AbstractDeclarativeNode):
    r"""Piecewise constant approximation of a signal: total variation denoising in one dimension, exact.

    **Problem.**     $y^*(x, \lambda) = \arg\min_y \tfrac12\|y - x\|^2 + \sum_i \lambda_i |y_{i+1} - y_i|$                             (P)
    **Optimality.**  $x_i + u_i - u_{i-1} - y_i = 0$, $u_0 = u_n = 0$ (K1);
                     $\mathrm{clip}(u_i + y_{i+1} - y_i, -\lambda_i, \lambda_i) - u_i = 0$ (K2)
    **Solver.**      Direct: level sets by divide and conquer, about $\log n$ parallel passes; see `_solvers/total_variation.py`.
    **Gradient.**    y is constant on blocks, $y_B = (\sum_{i \in B} x_i + u_b - u_{a-1}) / |B|$ with $u_i = \pm\lambda_i$ at their ends:
                     linear, all modes; the second derivative is zero almost everywhere. Not differentiable where $|u_i| = \lambda_i$
                     inside of a block: it counts as whole. At $\lambda_i = 0$, one-sided. `adjoint=ImplicitAdjoint()` solves (K1)-(K2) in O(n).
    **Use instead.** `QuadraticProgram` for other penalties on differences (see `models/denoise.py`, which learns them).

    | symbol      | code       | shape              | meaning                                          |
    |-------------|------------|--------------------|--------------------------------------------------|
    | $x$         | `signal`   | `(n,)`             | the data                                         |
    | $\lambda$   | `strength` | `()` or `(n - 1,)` | weight of a jump, in units of x; `inf` forbids it |
    | $u$         | `dual`     | `(n - 1,)`         | multiplier of an edge, in units of x             |

    **Arguments:** `throw`, `on_failure`, `max_steps`, `adjoint`: see `Policy` and `ImplicitAdjoint`. (`max_steps` is of no use here.)
    **Call:** `total_variation(x, strength=1.0)`: `Float[Array, " n"]`, float32 or float64; `jax.vmap` for batches.
    **Returns:** `Float[Array, " n"]`.
    **Raises:** `ValueError` for data of the wrong shape or dtype; with `throw=True` a `SolveError` at run time if an entry of the signal is
    not finite, or a strength is negative or NaN.
    **Reference:** Rudin, Osher & Fatemi 1992; Chambolle & Darbon 2009 (level sets).
    """

    adjoint: optx.AbstractAdjoint | None
    policy: Policy

    smoothness: ClassVar[str] = "piecewise linear: not differentiable where a block is about to split, or two to merge"
    closed_form: ClassVar[bool] = True
    fails_as_nan: ClassVar[bool] = False

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
        self,
        x: Float[Array, " n"] | TotalVariationData,
        strength: float | Float[Array, ""] | Float[Array, " edges"] = 1.0,
    ) -> Float[Array, " n"]:
        return evaluate(self, self.pack(x, strength))

    def pack(self, x, strength: Any = 1.0):
        if isinstance(x, TotalVariationData):
            return x
        signal, strength = x if isinstance(x, tuple) and len(x) == 2 else (x, strength)
        signal = jnp.asarray(signal)
        # A number, or float64 weights, for a float32 signal: the signal decides.
        dtype = signal.dtype if jnp.issubdtype(signal.dtype, jnp.floating) else None
        return TotalVariationData(signal, jnp.asarray(strength, dtype))

    def check(self, x):
        if not isinstance(x, TotalVariationData):
            raise ValueError(
                f"TotalVariation takes (signal, strength) or `TotalVariationData`, got {type(x).__name__}."
            )
        if x.signal.ndim != 1:
            raise ValueError(
                f"signal must have shape (n,), got {x.signal.shape}: use `jax.vmap` for batches (there is one dimension only)."
            )
        if x.signal.size == 0 or not jnp.issubdtype(x.signal.dtype, jnp.floating):
            raise ValueError(f"signal must be a non-empty floating vector, got {x.signal.dtype}{list(x.signal.shape)}.")
        if x.strength.shape not in ((), (x.signal.size - 1,)):
            raise ValueError(
                f"strength must be a number, or one for each of the {x.signal.size - 1} pairs of neighbours; got shape {x.strength.shape}."
            )
        if x.strength.dtype != x.signal.dtype:
            raise ValueError(f"strength must have the dtype of signal, {x.signal.dtype}; got {x.strength.dtype}.")

    def optimality(self, y: TotalVariationPoint, x: TotalVariationData) -> TotalVariationPoint:
        weights = _weights(x)
        raised = y.dual + y.signal[1:] - y.signal[:-1]
        clipped = jnp.where(_inside(y, x), raised, jnp.sign(raised) * weights)
        return TotalVariationPoint(with_edges(x.signal, y.dual) - y.signal, clipped - y.dual)

    def objective(self, y, x):
        return envelope(_energy, y, x)

    def dual(self, y, x):
        return y.dual

    def run(self, x, y0, loop):
        del y0, loop
        weights = _weights(x)
        found = total_variation(x.signal, weights)
        good = jnp.all(jnp.isfinite(x.signal)) & jnp.all(weights >= 0)
        result = choose(good, RESULTS.successful, RESULTS.nonfinite_data)
        # Of a signal that is zero, what counts is the data's size; of a constant one, (K2) is about u, which vanishes.
        return Run(TotalVariationPoint(found.signal, found.dual), result, found.blocks.passes)

    def value(self, y, x):
        return y.signal

    def linear_system(self, y, x, factor):
        del factor
        return LinearSystem(Chain(~_inside(y, x), x.signal), ChainSolver())

    def kink_distance(self, y, x):
        # To a split: the slack of u inside of a block; to a merger: half of the jump for either block, at most.
        room = jnp.maximum(_weights(x) - jnp.abs(y.dual), jnp.abs(y.signal[1:] - y.signal[:-1]))
        return jnp.min(room, initial=jnp.inf)


def _weights(x: TotalVariationData) -> Float[Array, " edges"]:
    return jnp.broadcast_to(x.strength, (x.signal.size - 1,))


def _inside(y: TotalVariationPoint, x: TotalVariationData):
    """Edges inside of a block, as (K2) has it; at equality (to rounding) it counts as whole. An edge without weight ties nothing."""
    weights = _weights(x)
    eps = float(jnp.finfo(x.signal.dtype).eps)
    raised = jnp.abs(y.dual + y.signal[1:] - y.signal[:-1])
    return (raised <= weights * (1 + 64 * eps)) & (weights > 0)


def _energy(y: TotalVariationPoint, x: TotalVariationData) -> Float[Array, ""]:
    jumps = y.signal[1:] - y.signal[:-1]
    # Where there is no jump, a weight may be infinite.
    costs = jnp.where(jumps == 0, 0, jnp.abs(jumps) * jnp.where(jumps == 0, 0, _weights(x)))
    return jnp.sum((y.signal - x.signal) ** 2) / 2 + jnp.sum(costs)
