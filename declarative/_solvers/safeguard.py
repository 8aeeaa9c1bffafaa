r"""What accelerated fixed-point solvers share: when an extrapolation is taken back, what is kept as the best point, and when it is done.

An extrapolation after which $\|T(y) - y\|$ is more than `growth` times the least since the last restart, or not finite, is taken back: what
the solver has learnt is dropped, and $y \leftarrow T(y)$ is done from the point before. It can leave the domain of T, or the region
where T is nearly affine. A plain step is never taken back, so the whole costs at most two evaluations where Picard iteration costs one.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from .._core.arguments import check_tolerances, integer
from .._linear.norms import largest


class Progress(eqx.Module):
    """The state of a solve: the last point that was not taken back, with T there; the least residual; the best point."""

    y: Float[Array, " n"]
    value: Float[Array, " n"]
    size: Float[Array, ""]
    started: Bool[Array, ""]
    extrapolated: Bool[Array, ""]
    # Least |T(y) - y| since the restart, and over all, with T there.
    least: Float[Array, ""]
    best: Float[Array, ""]
    best_value: Float[Array, " n"]
    settled: Bool[Array, ""]

    def advance(
        self, y: Float[Array, " n"], value: Float[Array, " n"], rtol: Any, atol: Any, growth: float
    ) -> tuple["Progress", Bool[Array, ""]]:
        """After T was evaluated at `y`: what is known now, and whether the step to `y` is to be taken back."""
        # They decide and are not differentiated.
        size = jax.lax.stop_gradient(largest(value - y))
        lost = self.extrapolated & ~(size <= growth * self.least)  # true for NaN
        better = size < self.best
        keep = lambda new, old: jnp.where(lost, old, new)
        new = Progress(
            y=keep(y, self.y),
            value=keep(value, self.value),
            size=keep(size, self.size),
            started=jnp.ones((), bool),
            extrapolated=self.started & ~lost,
            least=jnp.where(lost, jnp.inf, jnp.minimum(size, self.least)),
            best=jnp.where(better, size, self.best),
            best_value=jnp.where(better, value, self.best_value),
            settled=size <= rtol * jax.lax.stop_gradient(largest(value)) + atol,
        )
        return new, lost

    def best_of(self, y: PyTree) -> PyTree:
        """What a solve returns that ended at `y`: that, if it settled, or else the best point."""
        _, unravel = ravel_pytree(y)
        found = self.settled | ~jnp.isfinite(self.best)
        return jtu.tree_map(lambda y, best: jnp.where(found, y, best), y, unravel(self.best_value))


def begin(y: PyTree) -> Progress:
    vector, _ = ravel_pytree(jtu.tree_map(jnp.zeros_like, y))
    infinite, no = jnp.full((), jnp.inf, vector.dtype), jnp.zeros((), bool)
    return Progress(vector, vector, infinite, no, no, infinite, infinite, vector, no)


def reciprocal_length(vector: Float[Array, " n"], size: Float[Array, ""]) -> Float[Array, ""]:
    """1 / |vector| for a vector with entries of at most about `size`; 0 if it is nothing beside that.

    One pass, where a norm that is safe on its own takes two. A constant in derivatives: any length will do that is right to a few digits.
    """
    unit = jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0)
    length = jnp.sqrt(jnp.sum((vector * unit) ** 2))
    return jax.lax.stop_gradient(jnp.where(length > 0, unit / jnp.where(length > 0, length, 1), 0))


def check_settings(rtol, atol, history, growth) -> None:
    if (rtol is None) != (atol is None):
        raise ValueError("give rtol and atol, or neither of them.")
    if rtol is not None:
        check_tolerances(rtol, atol)
    integer(history, "history")
    if not growth >= 1:
        raise ValueError(f"growth must be at least 1, got {growth!r}.")


def require_tolerances(solver) -> None:
    if solver.rtol is None:
        raise ValueError(f"{type(solver).__name__} needs rtol and atol, unless it is the solver of a `FixedPoint`.")


def with_tolerances(solver, rtol: Any, atol: Any):
    """The solver, with these for the ones that it leaves open."""
    if solver.rtol is not None:
        return solver
    return eqx.tree_at(lambda s: (s.rtol, s.atol), solver, (rtol, atol), is_leaf=lambda leaf: leaf is None)
