r"""Broyden's method for $y = T(y)$, with limited memory, as an optimistix fixed-point solver.

With $g = T(y) - y$, the step is $-Hg$, where $H$ approximates the inverse of $\partial g/\partial y$. It starts as $-I$, so the first step is
Picard's, and learns from each difference $s = \Delta y$ by the least change of its inverse (in the Frobenius norm) that satisfies the secant
equation $H \Delta g = s$ (Broyden's first, "good", method, by the Sherman-Morrison formula):

$$ H^+ = H + u v^\top, \qquad u = \frac{s - H\Delta g}{s^\top H \Delta g}, \qquad v = H^\top s.                             \tag{1} $$

$H = -I + \sum_i u_i v_i^\top$ is kept as the last m pairs. How it differs from the textbook, and why:

- s and $\Delta g$ are divided by the length of s, so that u and v are numbers near 1 at every scale.
- The pair that is to be replaced is dropped before the new one is computed, so that the secant equation holds for the H that is used.
- A pair with $|s^\top H\Delta g|$ below a thousandth of $\|s\|\|H\Delta g\|$ would make H nearly singular: it is not learnt.
- Extrapolations that fail are taken back, and the best point is what a solve that runs out of steps returns: see `accelerated.py`.

Every example of a batch (`jax.vmap`) has its own H and its own restarts.

References: Broyden 1965, *A class of methods for solving nonlinear simultaneous equations*; Bai, Kolter & Koltun 2019, arXiv:1909.01377, Eq. 10.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Bool, Float

from .._linear.norms import finite_largest, norm
from .accelerated import AbstractAccelerated, reciprocal_length


class _Memory(eqx.Module):
    # The pairs of (1), and which of them count.
    us: Float[Array, "m n"]
    vs: Float[Array, "m n"]
    known: Bool[Array, " m"]


class Broyden(AbstractAccelerated):
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

    def memory(self, rows):
        return _Memory(rows, rows, jnp.zeros(len(rows), bool))

    def extrapolate(self, memory, step):
        g, stay = step.change, memory.known & ~step.here
        # The step that was made, y - y_before.
        made = (step.value - g) - (step.before.value - step.before.change)
        scale = reciprocal_length(made, jax.lax.stop_gradient(finite_largest(made)))
        s, change = scale * made, scale * (g - step.before.change)

        # H of the pairs that stay, applied to `change` from the left and to `s` from the right.
        image = jnp.where(stay, memory.vs @ change, 0) @ memory.us - change
        row = jnp.where(stay, memory.us @ s, 0) @ memory.vs - s
        pivot = row @ change
        least = jnp.maximum(1e-3 * norm(image), jnp.finfo(g.dtype).tiny / jnp.finfo(g.dtype).eps)
        sound = jnp.abs(pivot) > jax.lax.stop_gradient(least)
        learnt = step.learn & sound
        # `us` and `vs` are read for both rows before either is written, else XLA copies them, to have them as they were.
        us = step.put(memory.us, (s - image) / jnp.where(sound, pivot, 1), learnt)
        vs = step.put(memory.vs, row, learnt)
        known = jnp.where(step.learn, stay | step.here & learnt, memory.known)
        following = step.value - jnp.where(known, vs @ g, 0) @ us
        return following, _Memory(us, vs, known & ~step.back)

    def inverse(self, memory):
        """(u, v) of what was learnt; see (1)."""
        return jnp.where(memory.known[:, None], memory.us, 0), memory.vs
