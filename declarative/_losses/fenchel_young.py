r"""Fenchel-Young losses of the simplex maps.

$$ L_\alpha(z; y) = H_\alpha^*(z) - y^\top z - H_\alpha(y), \qquad H_\alpha^*(z) = \max_{p \in \Delta} p^\top z + H_\alpha(p) \tag{FY} $$

with the Tsallis entropy $H_\alpha$, so that $\nabla_z L_\alpha = p^*(z) - y$: the envelope theorem, no linear solve. Convex in $z$,
non-negative, and zero exactly when the map returns $y$. $\alpha = 1$ is the cross-entropy, $\alpha = 2$ the sparsemax loss.

**Reference:** Blondel, Martins & Niculae 2020, *Learning with Fenchel-Young losses*, arXiv:1901.02324; Martins & Astudillo 2016, Eq. (18)
for $\alpha = 2$.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._core.node import Policy, envelope
from .._nodes.maps import simplex
from .._nodes.maps.entmax import Entmax
from .._nodes.maps.softmax import Softmax
from .._nodes.maps.sparsemax import Sparsemax

Target = int | Int[Array, ""] | Float[Array, " n"]

_QUIET = Policy(throw=False)  # NaN scores give a NaN loss, as everywhere in JAX; `fit` stops on it and names the step.


def softmax_loss(scores: Float[Array, " n"], target: Target) -> Float[Array, ""]:
    """Cross-entropy (plus the negative entropy of a soft target): (FY) at alpha = 1. See `entmax_loss` for the arguments."""
    return _loss(Softmax(policy=_QUIET), scores, target, 1.0)


def sparsemax_loss(scores: Float[Array, " n"], target: Target) -> Float[Array, ""]:
    """(FY) at alpha = 2: zero as soon as the right score leads every other by 1. See `entmax_loss` for the arguments."""
    return _loss(Sparsemax(policy=_QUIET), scores, target, 2.0)


def entmax_loss(scores: Float[Array, " n"], target: Target, alpha: float | Float[Array, ""] = 1.5) -> Float[Array, ""]:
    """(FY) for one example; `jax.vmap` for batches.

    **Arguments:**

    - `scores`: `(n,)`, float32 or float64. A score of -inf takes no part (its target must be 0).
    - `target`: an integer class, or a probability vector `(n,)`. A class out of range gives NaN, and so does a vector that is off the simplex by
      more than the square root of the dtype's precision: the loss would not be one.
    - `alpha`: in (1, 4]; an array gets its gradient.

    **Returns:** a non-negative scalar; gradient `entmax(scores) - target`, all modes and orders away from kinks.
    **Raises:** `ValueError` for wrong shapes, or a number `alpha` out of range.
    """
    return _loss(Entmax(alpha, policy=_QUIET), scores, target, alpha)


def _loss(node, scores, target, alpha):
    scores, target = jnp.asarray(scores), jnp.asarray(target)
    x = simplex.pack(scores)
    simplex.check(x, "A Fenchel-Young loss")
    dtype = scores.dtype
    if scores.dtype.itemsize == 2:
        scores = scores.astype(jnp.float32)
    # The loss does not change with a common offset, and its terms would cancel to the rounding error of the largest score.
    top = jax.lax.stop_gradient(jnp.max(scores))
    scores = scores - jnp.where(jnp.isfinite(top), top, 0)
    x = simplex.pack(scores)
    if jnp.issubdtype(target.dtype, jnp.integer):
        if target.shape != ():
            raise ValueError(f"an integer target must be a scalar class, got shape {target.shape}: use jax.vmap.")
        inside = (target >= 0) & (target < scores.size)
        target = jnp.where(inside, jax.nn.one_hot(target, scores.size, dtype=scores.dtype), jnp.nan)
    elif target.shape != scores.shape:
        raise ValueError(f"target must be a class or have the shape of the scores, {scores.shape}; got {target.shape}.")
    else:
        target = target.astype(scores.dtype)
        slack = float(jnp.finfo(scores.dtype if dtype.itemsize > 2 else dtype).eps) ** 0.5
        off = jnp.maximum(jnp.abs(jnp.sum(target) - 1), -jnp.min(target))
        target = target + jnp.where(jax.lax.stop_gradient(off) <= slack, 0, jnp.nan)
    if not isinstance(alpha, (int, float)):
        alpha = jnp.asarray(alpha).astype(scores.dtype)
    return envelope(_gap, node.solve(x).unknown, (x, target, alpha)).astype(dtype)


def _gap(point, data):
    """(FY) at the maximiser; written so that p = y gives exactly 0."""
    x, target, alpha = data
    moved = point.probabilities - target
    linear = jnp.sum(jnp.where(moved == 0, 0, moved) * jnp.where(moved == 0, 0, simplex.masked(x)))
    return linear + simplex.tsallis_entropy(point.probabilities, alpha) - simplex.tsallis_entropy(target, alpha)
