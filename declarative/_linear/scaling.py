"""Scaling by powers of two, which costs no rounding."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def power_of_two(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The inverse of x, rounded to a power of two; 1 for zero and for what is not finite."""
    usable = (x > 0) & jnp.isfinite(x)
    _, exponent = jnp.frexp(jnp.where(usable, x, 1))
    largest = 200 if x.dtype == jnp.float64 else 40
    exponent = jnp.clip(exponent, -largest, largest)
    return jnp.where(usable, jnp.ldexp(jnp.ones_like(x), 1 - exponent), 1)
