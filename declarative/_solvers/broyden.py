r"""Broyden's method for $y = T(y)$, with limited memory, as an optimistix fixed-point solver.

With $g = T(y) - y$, the step is $-Hg$, where $H$ approximates the inverse of $\partial g/\partial y$. It starts as $-I$, so the first step is
Picard's, and learns from each difference $s = \Delta y$ by the least change of its inverse (in the Frobenius norm) that satisfies the secant
equation $H \Delta g = s$ (Broyden's first, "good", method, by the Sherman-Morrison formula):

$$ H^+ = H + u v^\top, \qquad u = \frac{s - H\Delta g}{s^\top H \Delta g}, \qquad v = H^\top s.                             \tag{1} $$

$H = -I + \sum_i u_i v_i^\top$ is kept as the last m pairs. How it differs from the textbook, and why:

- s and $\Delta g$ are divided by the length of s, so that u and v are numbers near 1 at every scale.
- The pair that is to be replaced is dropped before the new one is computed, so that the secant equation holds for the H that is used.
- A pair with $|s^\top H\Delta g|$ below a thousandth of $\|s\|\|H\Delta g\|$ would make H nearly singular: it is not learnt.
- Extrapolations that fail are taken back, and the best point is what a solve that runs out of steps returns: see `safeguard.py`.

Every example of a batch (`jax.vmap`) has its own H and its own restarts.

References: Broyden 1965, *A class of methods for solving nonlinear simultaneous equations*; Bai, Kolter & Koltun 2019, arXiv:1909.01377, Eq. 10.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from .._core.implicit import norm
from .._linear.norms import largest
from .safeguard import Progress, begin, check_settings, reciprocal_length, require_tolerances


class _State(eqx.Module):
    progress: Progress
    # The pairs of (1); row `count % m` is the next to be replaced.
    us: Float[Array, "m n"]
    vs: Float[Array, "m n"]
    count: Int[Array, ""]


class Broyden(optx.AbstractFixedPointSolver):
    """Broyden's method; for `FixedPoint(fn, solver=Broyden(rtol, atol))` or `optimistix.fixed_point`.

    - `rtol`, `atol`: it stops where the largest entry of `fn(y) - y` is at most `rtol * max|fn(y)| + atol`, and returns `fn(y)`.
      None, for both: those of the dtype, in `FixedPoint`.
    - `history`: the number m of pairs. Each takes two vectors of the size of y.
    - `growth`: an extrapolation after which the residual is more than this times the least one is taken back.
    """

    rtol: Any = None
    atol: Any = None
    history: int = eqx.field(static=True, default=40)
    growth: float = eqx.field(static=True, default=10.0)
    # What optimistix asks of a solver; no use is made of it.
    norm: Any = eqx.field(static=True, default=optx.max_norm)

    def __check_init__(self):
        check_settings(self.rtol, self.atol, self.history, self.growth)

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        del fn, args, options, f_struct, aux_struct, tags
        require_tolerances(self)
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

        slot = jnp.arange(self.history, dtype=jnp.int32) == state.count % self.history
        dropped = lambda coefficients: jnp.where(slot, 0, coefficients)
        difference = vector - before.y
        scale = reciprocal_length(difference, jax.lax.stop_gradient(largest(difference)))
        s, change = scale * difference, scale * (g - (before.value - before.y))
        # H of the pairs that stay, applied to `change` from the left and to `s` from the right.
        image = dropped(state.vs @ change) @ state.us - change
        row = dropped(state.us @ s) @ state.vs - s
        pivot = s @ image
        sound = jnp.abs(pivot) > 1e-3 * jax.lax.stop_gradient(norm(image))
        learnt = before.started & ~lost & sound
        u = (s - image) / jnp.where(sound, pivot, 1)

        # Beside the stored pairs, not through them: see `anderson.py`.
        put = slot & learnt
        newest = jnp.where(learnt, row @ g, 0)
        following = value - (jnp.where(put, 0, state.vs @ g) @ state.us + newest * u)
        following = jnp.where(lost, before.value, following)

        learn = lambda rows, row: jnp.where(lost, 0, jnp.where(put[:, None], row[None], rows))
        count = jnp.where(lost, 0, state.count + learnt.astype(jnp.int32))
        state = _State(progress, learn(state.us, u), learn(state.vs, row), count)
        return unravel(jnp.where(progress.settled, value, following)), state, aux

    def terminate(self, fn, y, args, options, state, tags):
        del fn, y, args, options, tags
        return state.progress.settled, optx.RESULTS.successful

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        del fn, args, options, tags, result
        return state.progress.best_of(y), aux, {}
