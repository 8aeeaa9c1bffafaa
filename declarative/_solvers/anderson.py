r"""Anderson acceleration of $y \leftarrow T(y)$ by truncated Gram-Schmidt, as an optimistix fixed-point solver.

With $g = T(y) - y$, every step adds the differences $\Delta g$, $\Delta T$ between two iterates to what is known. Anderson's next iterate is

$$ y^+ = T(y) - \sum_i \gamma_i\,t_i, \qquad \gamma = \arg\min_\gamma \|g - \textstyle\sum_i \gamma_i\,q_i\|^2,                  \tag{1} $$

the point at which $g$ would vanish were $T$ affine and the pairs $(q_i, t_i)$ of differences enough. The textbook takes the last m pairs as they
are. Here each is made orthogonal to the m - 1 before it, and of length 1, as it comes in:

$$ q \propto \Delta g - \sum_i c_i\,q_i, \qquad t \propto \Delta T - \sum_i c_i\,t_i, \qquad c_i = q_i \cdot \Delta g,               \tag{2} $$

so that $\gamma_i = q_i \cdot g$, without a Gram matrix and its ridge. With all pairs kept both are the same method. With m of them (2) forgets less:
where T is affine with a symmetric matrix, three pairs do what all would (the conjugate residual method), and maps that come from optimisation
(gradient and proximal steps, expectation maximisation) are near that kind. Where the matrix is far from symmetric the textbook's last m
are worth somewhat more (measured on random ones: 3 to 25 % fewer steps), which a longer history makes up for.

- A difference of which next to nothing is left in (2) is not kept: it holds rounding.
- Extrapolations that fail are taken back, and the best point is what a solve that runs out of steps returns: see `accelerated.py`.

Every example of a batch (`jax.vmap`) has its own differences and its own restarts.

References: Anderson 1965, *Iterative procedures for nonlinear integral equations*; Walker & Ni 2011, *Anderson acceleration for fixed-point
iterations*, section 4 (the form with differences); Tang, Xu, He, Saad & Xi 2024, *Anderson acceleration with truncated Gram-Schmidt*,
arXiv:2403.14961 (without their estimate of when to restart; ours is the growth of the residual).
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Bool, Float

from .accelerated import AbstractAccelerated, reciprocal_length


class _Memory(eqx.Module):
    # q and t of (2), and which of them count.
    changes: Float[Array, "m n"]
    values: Float[Array, "m n"]
    known: Bool[Array, " m"]


class Anderson(AbstractAccelerated):
    """Anderson acceleration; for `FixedPoint(fn, solver=Anderson(rtol, atol))` or `optimistix.fixed_point`.

    - `rtol`, `atol`: it stops where the largest entry of `fn(y) - y` is at most `rtol * max|fn(y)| + atol`, and returns `fn(y)`.
      None, for both: those of the dtype, in `FixedPoint`.
    - `history`: the number m of differences. Each takes two vectors of the size of y.
    - `growth`: an extrapolation after which the residual is more than this times the least one is taken back.
    """

    rtol: Any = None
    atol: Any = None
    history: int = eqx.field(static=True, default=6)
    growth: float = eqx.field(static=True, default=2.0)
    # What optimistix asks of a solver; no use is made of it.
    norm: Any = eqx.field(static=True, default=optx.max_norm)

    def room(self, n):
        # More than n differences are dependent, and new ones would not be kept.
        return min(self.history, max(n, 1))

    def memory(self, rows):
        return _Memory(rows, rows, jnp.zeros(len(rows), bool))

    def extrapolate(self, memory, step):
        before, g = step.before, step.change
        stay = memory.known & ~step.here
        difference = g - before.change
        scale = reciprocal_length(difference, jax.lax.stop_gradient(jnp.maximum(step.size, before.size)))
        scaled = lambda row: jnp.where(scale > 0, scale * row, 0)
        change, value = scaled(difference), scaled(step.value - before.value)

        # What a new row is made of is read before it is written, else XLA copies all rows, to have them as they were.
        shares = jnp.where(stay, memory.changes @ change, 0)
        change, value = change - shares @ memory.changes, value - shares @ memory.values
        square = change @ change
        new = square > 100 * jnp.finfo(g.dtype).eps
        rescale = jnp.where(new, jax.lax.rsqrt(jnp.where(new, square, 1)), 0)
        changes = step.put(memory.changes, rescale * change, step.learn)
        values = step.put(memory.values, rescale * value, step.learn)
        known = jnp.where(step.learn, stay | step.here & new, memory.known)

        gamma = jnp.where(known, changes @ g, 0)
        return step.value - gamma @ values, _Memory(changes, values, known & ~step.back)
