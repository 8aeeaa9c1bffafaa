r"""How contractive a map is at a point, and a penalty that keeps it so.

A fixed point $y = T(y, x)$ can be found by iteration, and differentiated by Neumann series, where the spectral radius of $J = \partial_y T$ is
below 1. Training tends to let it grow. Bai, Koltun & Kolter 2021, *Stabilizing equilibrium models by Jacobian regularization*,
arXiv:2106.14342, add $\|J\|_F^2 = \mathbb E\|v^\top J\|^2$, v standard normal, to the loss.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.random as jr
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..._core.arguments import integer
from ..._linear.norms import norm


def _vector_map(fn: Callable, y: PyTree, x: PyTree):
    vector, unravel = ravel_pytree(y)
    if vector.size == 0 or not jnp.issubdtype(vector.dtype, jnp.floating):
        raise ValueError("y must be a pytree of floating arrays, with at least one entry.")

    def function(vector):
        value, _ = ravel_pytree(fn(unravel(vector), x))
        if value.shape != vector.shape:
            raise ValueError(f"fn must return what y is shaped like: {vector.size} entries, got {value.size}.")
        return value

    return function, vector


def jacobian_penalty(
    fn: Callable[[PyTree, PyTree], PyTree], y: PyTree, x: PyTree, *, key: PRNGKeyArray, probes: int = 1
) -> Float[Array, ""]:
    """Unbiased estimate of the mean squared length of a row of J, |J|_F^2 / n, from `probes` products v^T J.

    Add a multiple of it to the loss, with y the fixed point: it is differentiable in y, in x and in what `fn` holds. Below 1 / n it
    bounds the spectral radius below 1; in practice it is the trend that counts.

    **Arguments:** `fn(y, x) -> y` as in `FixedPoint`; one example (`jax.vmap` for batches, with a key for each).
    **Raises:** `ValueError` if `fn` does not map y to its like, or `probes` is not positive.
    """
    integer(probes, "probes")
    function, vector = _vector_map(fn, y, x)
    _, pull = jax.vjp(function, vector)
    rows = jax.vmap(lambda v: pull(v)[0])(jr.normal(key, (probes, vector.size), vector.dtype))
    return jnp.sum(rows**2) / (probes * vector.size)


def spectral_radius(
    fn: Callable[[PyTree, PyTree], PyTree], y: PyTree, x: PyTree, *, key: PRNGKeyArray, steps: int = 100
) -> Float[Array, ""]:
    """Estimate of the largest modulus of an eigenvalue of J, from `steps` products J v (power iteration); it carries no gradient.

    It is the geometric mean of the growth of v over the second half of the steps, so that pairs of complex eigenvalues, under which v turns and
    its growth oscillates, are measured as well. Picard iteration converges near y if it is below 1; its error then shrinks by this factor a step.

    **Arguments:** `fn(y, x) -> y` as in `FixedPoint`; one example (`jax.vmap` for batches, with a key for each).
    **Raises:** `ValueError` if `fn` does not map y to its like, or `steps` is below 2.
    """
    integer(steps, "steps", 2)
    function, vector = _vector_map(fn, *jax.lax.stop_gradient((y, x)))
    _, push = jax.linearize(function, vector)

    def step(v, _):
        image = push(v)
        size = norm(image)
        return jnp.where(size > 0, image / jnp.where(size > 0, size, 1), v), size

    start = jr.normal(key, vector.shape, vector.dtype)
    _, growth = jax.lax.scan(step, start / norm(start), length=steps)
    return jax.lax.stop_gradient(jnp.exp(jnp.mean(jnp.log(growth[steps // 2 :]))))
