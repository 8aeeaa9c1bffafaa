r"""Anderson acceleration of $y \leftarrow T(y)$, as an optimistix fixed-point solver.

With $g = T(y) - y$ and the last $m$ differences $\Delta g_i$, $\Delta T_i$ between iterates, the next one is

$$ y^+ = T(y) - \sum_i \gamma_i\,\Delta T_i, \qquad \gamma = \arg\min_\gamma \|g - \textstyle\sum_i \gamma_i\,\Delta g_i\|^2,             \tag{1} $$

the point at which $g$ would vanish were $T$ affine and the differences enough. How it differs from the textbook, and why:

- The differences are scaled to length 1 before their Gram matrix is formed, so that `ridge` is relative: lengths span as many orders of
  magnitude as the iteration converges through, and in float32 a Gram matrix of unscaled ones has no digits left for the short ones.
- The Gram matrix is kept, and gains a row with each difference. The m x m system is eliminated entry by entry, without LAPACK: a batch of
  these tiny systems costs next to nothing (and cannot meet the deadlock of docs/design.md).
- The newest difference enters (1) beside the stored ones, not through them: under `jax.vmap` the history is then written once a step, with
  what keeps finished lanes as they are.
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

from .._linear.norms import largest
from .safeguard import Progress, begin, check_settings, reciprocal_length, require_tolerances


class _State(eqx.Module):
    progress: Progress
    # Differences divided by the length of that of g; row `count % m` is the next to be replaced. `gram` is `changes @ changes.T`, ridge and all.
    values: Float[Array, "m n"]
    changes: Float[Array, "m n"]
    gram: Float[Array, "m m"]
    count: Int[Array, ""]


class Anderson(optx.AbstractFixedPointSolver):
    """Anderson acceleration; for `FixedPoint(fn, solver=Anderson(rtol, atol))` or `optimistix.fixed_point`.

    - `rtol`, `atol`: it stops where the largest entry of `fn(y) - y` is at most `rtol * max|fn(y)| + atol`, and returns `fn(y)`.
      None, for both: those of the dtype, in `FixedPoint`.
    - `history`: the number m of differences. Each takes two vectors of the size of y.
    - `ridge`: added to the diagonal of the Gram matrix of the differences, all of length 1; None: a hundred times the spacing of the dtype.
    - `growth`: an extrapolation after which the residual is more than this times the least one is taken back.
    """

    rtol: Any = None
    atol: Any = None
    history: int = eqx.field(static=True, default=5)
    ridge: float | None = eqx.field(static=True, default=None)
    growth: float = eqx.field(static=True, default=10.0)
    # What optimistix asks of a solver; no use is made of it.
    norm: Any = eqx.field(static=True, default=optx.max_norm)

    def __check_init__(self):
        check_settings(self.rtol, self.atol, self.history, self.growth)
        if self.ridge is not None and not self.ridge >= 0:
            raise ValueError(f"ridge must be at least 0, got {self.ridge!r}.")

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        del fn, args, options, f_struct, aux_struct, tags
        require_tolerances(self)
        progress = begin(y)
        rows = jnp.zeros((self.history, progress.y.size), progress.y.dtype)
        return _State(progress, rows, rows, jnp.eye(self.history, dtype=rows.dtype), jnp.zeros((), jnp.int32))

    def step(self, fn, y, args, options, state, tags):
        del options, tags
        vector, unravel = ravel_pytree(y)
        new, aux = fn(y, args)
        value, _ = ravel_pytree(new)
        before, g = state.progress, value - vector
        progress, lost = before.advance(vector, value, self.rtol, self.atol, self.growth)

        slot = (jnp.arange(self.history, dtype=jnp.int32) == state.count % self.history) & before.started
        difference = g - (before.value - before.y)
        scale = reciprocal_length(difference, jax.lax.stop_gradient(jnp.maximum(largest(g), before.size)))
        # One that vanishes counts as absent: a row of zeros, with 1 on the diagonal.
        ridge = 100 * float(jnp.finfo(g.dtype).eps) if self.ridge is None else self.ridge
        change, step = scale * difference, scale * (value - before.value)
        own = jnp.where(scale > 0, change @ change + ridge, 1)

        products = jnp.where(slot, own, state.changes @ change)
        gram = jnp.where(slot[:, None], products[None], jnp.where(slot[None], products[:, None], state.gram))
        gamma = _eliminate(gram, jnp.where(slot, change @ g, state.changes @ g))
        newest = jnp.sum(jnp.where(slot, gamma, 0))
        combination = jnp.where(slot, 0, gamma) @ state.values + newest * step
        following = jnp.where(lost, before.value, value - combination)

        learn = lambda rows, row: jnp.where(lost, 0, jnp.where(slot[:, None], row[None], rows))
        gram = jnp.where(lost, jnp.eye(self.history, dtype=g.dtype), gram)
        count = jnp.where(lost, 0, state.count + before.started.astype(jnp.int32))
        state = _State(progress, learn(state.values, step), learn(state.changes, change), gram, count)
        return unravel(jnp.where(progress.settled, value, following)), state, aux

    def terminate(self, fn, y, args, options, state, tags):
        del fn, y, args, options, tags
        return state.progress.settled, optx.RESULTS.successful

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        del fn, args, options, tags, result
        return state.progress.best_of(y), aux, {}


def _eliminate(matrix: Float[Array, "m m"], vector: Float[Array, " m"]) -> Float[Array, " m"]:
    """Solves a symmetric positive definite system; no pivoting is needed. One number at a time, which the compiler fuses."""
    m = vector.size
    a, x = [list(row) for row in matrix], list(vector)
    for k in range(m):
        for i in range(k + 1, m):
            factor = a[i][k] / a[k][k]
            a[i] = [a[i][j] - factor * a[k][j] if j > k else a[i][j] for j in range(m)]
            x[i] = x[i] - factor * x[k]
    for k in reversed(range(m)):
        x[k] = (x[k] - sum((a[k][j] * x[j] for j in range(k + 1, m)), jnp.zeros_like(x[k]))) / a[k][k]
    return jnp.stack(x)
