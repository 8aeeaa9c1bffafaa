r"""Anderson acceleration of $y \leftarrow T(y)$, as an optimistix fixed-point solver.

With $g = T(y) - y$ and the last $m$ differences $\Delta g_i$, $\Delta T_i$ between iterates, the next one is

$$ y^+ = T(y) - \sum_i \gamma_i\,\Delta T_i, \qquad \gamma = \arg\min_\gamma \|g - \textstyle\sum_i \gamma_i\,\Delta g_i\|^2,             \tag{1} $$

the point at which $g$ would vanish were $T$ affine and the differences enough. How it differs from the textbook, and why:

- The differences are scaled to length 1 before their Gram matrix is formed, so that `ridge` is relative: lengths span as many orders of
  magnitude as the iteration converges through, and in float32 a Gram matrix of unscaled ones has no digits left for the short ones.
- The m x m system is eliminated in place, without LAPACK: a batch of these tiny systems costs a few products (and cannot meet the deadlock
  of docs/design.md).
- An extrapolation after which $\|g\|$ is more than `growth` times the least since the last restart, or not finite, is taken back: the
  differences are dropped, and $y \leftarrow T(y)$ is done in its place. It can leave the domain of T, or the region where T is nearly affine.
  So it costs at most two evaluations where Picard iteration costs one.
- The best point is what a solve that runs out of steps returns.

Every example of a batch (`jax.vmap`) has its own differences and its own restarts.

References: Anderson 1965, *Iterative procedures for nonlinear integral equations*; Walker & Ni 2011, *Anderson acceleration for fixed-point
iterations*, section 4 (the form with differences).
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from .._core.implicit import norm
from .._linear.norms import largest


class _State(eqx.Module):
    # The last point that was not taken back, and T there.
    y: Float[Array, " n"]
    value: Float[Array, " n"]
    started: Bool[Array, ""]
    # Differences; row `count % m` is the next to be replaced.
    values: Float[Array, "m n"]
    changes: Float[Array, "m n"]
    count: Int[Array, ""]
    extrapolated: Bool[Array, ""]
    # Least |g| since the restart, and over all, with T there.
    least: Float[Array, ""]
    best: Float[Array, ""]
    best_value: Float[Array, " n"]
    settled: Bool[Array, ""]


class Anderson(optx.AbstractFixedPointSolver):
    """Anderson acceleration; for `FixedPoint(fn, solver=Anderson(rtol, atol))` or `optimistix.fixed_point`.

    - `rtol`, `atol`: it stops where the largest entry of `fn(y) - y` is at most `rtol * max|fn(y)| + atol`, and returns `fn(y)`.
    - `history`: the number m of differences. Each takes two vectors of the size of y.
    - `ridge`: added to the diagonal of the Gram matrix of the differences, all of length 1; None: a hundred times the spacing of the dtype.
    - `growth`: see above.
    """

    rtol: Any
    atol: Any
    history: int = eqx.field(static=True, default=5)
    ridge: float | None = eqx.field(static=True, default=None)
    growth: float = eqx.field(static=True, default=10.0)
    # What optimistix asks of a solver; no use is made of it.
    norm: Any = eqx.field(static=True, default=optx.max_norm)

    def __check_init__(self):
        if isinstance(self.history, bool) or not isinstance(self.history, int) or self.history < 1:
            raise ValueError(f"history must be a positive integer, got {self.history!r}.")
        if self.ridge is not None and not self.ridge >= 0:
            raise ValueError(f"ridge must be at least 0, got {self.ridge!r}.")
        if not self.growth >= 1:
            raise ValueError(f"growth must be at least 1, got {self.growth!r}.")

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        del fn, args, options, f_struct, aux_struct, tags
        vector, _ = ravel_pytree(jtu.tree_map(jnp.zeros_like, y))
        rows = jnp.zeros((self.history, vector.size), vector.dtype)
        infinite, no = jnp.full((), jnp.inf, vector.dtype), jnp.zeros((), bool)
        count = jnp.zeros((), jnp.int32)
        return _State(vector, vector, no, rows, rows, count, no, infinite, infinite, vector, no)

    def step(self, fn, y, args, options, state, tags):
        del options, tags
        vector, unravel = ravel_pytree(y)
        new, aux = fn(y, args)
        value, _ = ravel_pytree(new)
        g = value - vector
        # They decide and are not differentiated (unrolled, the root of zero would be).
        change, size = jax.lax.stop_gradient((largest(g), norm(g)))

        slot = (jnp.arange(self.history, dtype=jnp.int32) == state.count % self.history)[:, None]
        put = lambda rows, row: jnp.where(slot & state.started, row[None], rows)
        values = put(state.values, value - state.value)
        changes = put(state.changes, g - (state.value - state.y))
        count = state.count + jnp.where(state.started, 1, 0).astype(jnp.int32)

        # A plain step is never taken back: it is what remains to be done.
        lost = state.extrapolated & ~(size <= self.growth * state.least)  # true for NaN
        unless = lambda keep, otherwise: jnp.where(lost, keep, otherwise)
        values, changes = unless(0, values), unless(0, changes)
        step = _combination(values, changes, g, self._ridge(g.dtype))
        following = unless(state.value, value - step)

        settled = change <= self.rtol * largest(value) + self.atol
        better = size < state.best
        state = _State(
            y=unless(state.y, vector),
            value=unless(state.value, value),
            started=jnp.ones((), bool),
            values=values,
            changes=changes,
            count=unless(0, count),
            extrapolated=state.started & ~lost,
            least=unless(jnp.inf, jnp.minimum(size, state.least)),
            best=jnp.where(better, size, state.best),
            best_value=jnp.where(better, value, state.best_value),
            settled=settled,
        )
        return unravel(jnp.where(settled, value, following)), state, aux

    def _ridge(self, dtype) -> float:
        return 100 * float(jnp.finfo(dtype).eps) if self.ridge is None else self.ridge

    def terminate(self, fn, y, args, options, state, tags):
        del fn, y, args, options, tags
        return state.settled, optx.RESULTS.successful

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        del fn, args, options, tags, result
        _, unravel = ravel_pytree(y)
        found = state.settled | ~jnp.isfinite(state.best)
        best = unravel(state.best_value)
        return jtu.tree_map(lambda y, best: jnp.where(found, y, best), y, best), aux, {}


def _combination(values, changes, g, ridge: float):
    """sum_i gamma_i values_i with the gamma of (1); rows of zeros count as absent."""
    # Any length will do that is right to a few digits, so it is a constant here; squares of small entries underflow without it.
    top = jax.lax.stop_gradient(jax.vmap(norm)(changes))
    present = top > 0
    scale = jnp.where(present, 1 / jnp.where(present, top, 1), 0)
    unit = scale[:, None] * changes
    absent = jnp.diag(jnp.where(present, ridge, 1)).astype(g.dtype)
    gamma = _eliminate(unit @ unit.T + absent, unit @ g)
    return (scale * gamma) @ values


def _eliminate(matrix: Float[Array, "m m"], vector: Float[Array, " m"]) -> Float[Array, " m"]:
    """Solves a symmetric positive definite system by Gauss-Jordan elimination; no pivoting is needed."""
    rows = jnp.concatenate([matrix, vector[:, None]], axis=1)
    for k in range(vector.size):
        pivot = rows[k] / rows[k, k]
        rows = (rows - rows[:, k : k + 1] * pivot[None]).at[k].set(pivot)
    return rows[:, -1]
