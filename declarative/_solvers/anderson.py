r"""Anderson acceleration of $y \leftarrow T(y)$, as an optimistix fixed-point solver.

With $g = T(y) - y$ and the last $m$ differences $\Delta g_i$, $\Delta T_i$ between iterates, the next one is

$$ y^+ = T(y) - \sum_i \gamma_i\,\Delta T_i, \qquad \gamma = \arg\min_\gamma \|g - \textstyle\sum_i \gamma_i\,\Delta g_i\|^2,             \tag{1} $$

the point at which $g$ would vanish were $T$ affine and the differences enough. How it differs from the textbook, and why:

- The differences are scaled to length 1 before their Gram matrix is formed, so that `ridge` is relative: lengths span as many orders of
  magnitude as the iteration converges through, and in float32 a Gram matrix of unscaled ones has no digits left for the short ones.
- The m x m system is eliminated in place, without LAPACK: a batch of these tiny systems costs a few products (and cannot meet the deadlock
  of docs/design.md).
- Extrapolations that fail are taken back, and the best point is what a solve that runs out of steps returns: see `safeguard.py`.

Every example of a batch (`jax.vmap`) has its own differences and its own restarts.

References: Anderson 1965, *Iterative procedures for nonlinear integral equations*; Walker & Ni 2011, *Anderson acceleration for fixed-point
iterations*, section 4 (the form with differences).
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from .._core.implicit import norm
from .safeguard import Progress, begin, check_settings


class _State(eqx.Module):
    progress: Progress
    # Differences; row `count % m` is the next to be replaced.
    values: Float[Array, "m n"]
    changes: Float[Array, "m n"]
    count: Int[Array, ""]


class Anderson(optx.AbstractFixedPointSolver):
    """Anderson acceleration; for `FixedPoint(fn, solver=Anderson(rtol, atol))` or `optimistix.fixed_point`.

    - `rtol`, `atol`: it stops where the largest entry of `fn(y) - y` is at most `rtol * max|fn(y)| + atol`, and returns `fn(y)`.
    - `history`: the number m of differences. Each takes two vectors of the size of y.
    - `ridge`: added to the diagonal of the Gram matrix of the differences, all of length 1; None: a hundred times the spacing of the dtype.
    - `growth`: an extrapolation after which the residual is more than this times the least one is taken back.
    """

    rtol: Any
    atol: Any
    history: int = eqx.field(static=True, default=5)
    ridge: float | None = eqx.field(static=True, default=None)
    growth: float = eqx.field(static=True, default=10.0)
    # What optimistix asks of a solver; no use is made of it.
    norm: Any = eqx.field(static=True, default=optx.max_norm)

    def __check_init__(self):
        check_settings(self.history, self.growth)
        if self.ridge is not None and not self.ridge >= 0:
            raise ValueError(f"ridge must be at least 0, got {self.ridge!r}.")

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        del fn, args, options, f_struct, aux_struct, tags
        progress = begin(y)
        rows = jnp.zeros((self.history, progress.y.size), progress.y.dtype)
        return _State(progress, rows, rows, jnp.zeros((), jnp.int32))

    def step(self, fn, y, args, options, state, tags):
        del options, tags
        vector, unravel = ravel_pytree(y)
        new, aux = fn(y, args)
        value, _ = ravel_pytree(new)
        before, g = state.progress, value - vector
        progress, lost = before.advance(vector, value, self.rtol, self.atol, self.growth)

        slot = (jnp.arange(self.history, dtype=jnp.int32) == state.count % self.history)[:, None]
        learn = lambda rows, row: jnp.where(lost, 0, jnp.where(slot & before.started, row[None], rows))
        values = learn(state.values, value - before.value)
        changes = learn(state.changes, g - (before.value - before.y))
        count = jnp.where(lost, 0, state.count + before.started.astype(jnp.int32))

        ridge = 100 * float(jnp.finfo(g.dtype).eps) if self.ridge is None else self.ridge
        following = jnp.where(lost, before.value, value - _combination(values, changes, g, ridge))
        return unravel(jnp.where(progress.settled, value, following)), _State(progress, values, changes, count), aux

    def terminate(self, fn, y, args, options, state, tags):
        del fn, y, args, options, tags
        return state.progress.settled, optx.RESULTS.successful

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        del fn, args, options, tags, result
        return state.progress.best_of(y), aux, {}


def _combination(values, changes, g, ridge: float):
    """sum_i gamma_i values_i with the gamma of (1); rows of zeros count as absent."""
    # Any length will do that is right to a few digits, so it is a constant here; squares of small entries underflow without it.
    length = jax.lax.stop_gradient(jax.vmap(norm)(changes))
    present = length > 0
    scale = jnp.where(present, 1 / jnp.where(present, length, 1), 0)
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
