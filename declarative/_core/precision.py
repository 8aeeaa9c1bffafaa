"""Matrix products of a node in the precision of their dtype.

By default JAX lets a GPU round the factors of a float32 product to ten bits (TF32), and a TPU to seven (bfloat16). That is fine for the
layers of a network. A solution is judged, and its gradient computed, to about the square root of the dtype's precision, which such
products do not have; an interior-point method does not converge with them at all.
"""

import contextlib

import jax


@contextlib.contextmanager
def full_precision():
    """Products are traced with precision "highest", unless the user has set `jax.default_matmul_precision`, whose word stands."""
    if jax.config.jax_default_matmul_precision is None:  # pyright: ignore[reportAttributeAccessIssue]  (JAX adds its flags at run time)
        with jax.default_matmul_precision("highest"):
            yield
    else:
        yield
