r"""Factors of symmetric positive definite matrices, safe to `vmap` on CPU.

$H^{-1} = W^\top W$ with $W$ the inverse of the Cholesky factor of $H$, so a solve is two products: where a factor serves a dozen
right-hand sides, as in an interior-point step and its gradient, products beat triangular solves under `vmap`. The matrix is scaled
to a unit diagonal first, and shifted by a few roundings, so that a semidefinite one has a factor too.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .lanes import over_lanes

# Above this size the factor is built from blocks by products: LAPACK's triangular inverse is the slow part.
_LEAF = 64


class InverseRoot(eqx.Module):
    """W with H^-1 = W'W; a vector for a diagonal H."""

    root: Float[Array, "n n"] | Float[Array, " n"]

    def solve(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        if self.root.ndim == 1:
            return self.root * self.root * vector
        # (vector' W')W and not W'(W vector): no transposed copy of W.
        return (self.root @ vector) @ self.root


def factorise(matrix: Float[Array, "n n"] | Float[Array, " n"]) -> InverseRoot:
    """The inverse root of a symmetric matrix plus a few roundings of its diagonal; NaN if that is not positive definite.

    A vector is a diagonal matrix. A diagonal entry that is zero counts as 1: the direction is unknown to the matrix.
    """
    n = matrix.shape[0]
    # What Cholesky itself may lose of a matrix with unit diagonal.
    shift = 8 * (n + 8) * float(jnp.finfo(matrix.dtype).eps)
    diagonal = matrix if matrix.ndim == 1 else jnp.diagonal(matrix)
    scale = jnp.where(diagonal > 0, jax.lax.rsqrt(jnp.where(diagonal > 0, diagonal, 1)), 1)
    if matrix.ndim == 1:
        shifted = diagonal * scale**2 + shift
        return InverseRoot(jnp.where(shifted > 0, scale * jax.lax.rsqrt(jnp.where(shifted > 0, shifted, 1)), jnp.nan))
    scaled = scale[:, None] * matrix * scale[None, :] + shift * jnp.eye(n, dtype=matrix.dtype)
    return InverseRoot(inverse_root(scaled) * scale[None, :])


@over_lanes
def inverse_root(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """W lower triangular with W'W = matrix^-1; NaN if the matrix is not positive definite. Not differentiated: see `lanes.py`."""
    return _blocked(matrix)


def _blocked(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    n = matrix.shape[0]
    if n <= _LEAF:
        lower = jax.lax.linalg.cholesky(matrix, symmetrize_input=False)
        eye = jnp.eye(n, dtype=matrix.dtype)
        return jax.lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)
    half = (n + 1) // 2
    first = _blocked(matrix[:half, :half])
    below = matrix[half:, :half] @ first.T
    second = _blocked(matrix[half:, half:] - below @ below.T)
    corner = -(second @ below) @ first
    zeros = jnp.zeros((half, n - half), matrix.dtype)
    return jnp.block([[first, zeros], [corner, second]])


def is_semidefinite(matrix: Float[Array, "n n"] | Float[Array, " n"]) -> Bool[Array, ""]:
    """Whether no eigenvalue lies below zero, to about half the digits of a matrix scaled to a unit diagonal."""
    if matrix.ndim == 1:
        return jnp.all(matrix >= 0)
    diagonal = jnp.diagonal(matrix)
    scale = jnp.where(diagonal > 0, jax.lax.rsqrt(jnp.where(diagonal > 0, diagonal, 1)), 1)
    shift = float(jnp.finfo(matrix.dtype).eps) ** 0.6
    scaled = scale[:, None] * matrix * scale[None, :] + shift * jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    return jnp.all(jnp.isfinite(_cholesky(scaled)))


@over_lanes
def _cholesky(matrix):
    return jax.lax.linalg.cholesky(matrix, symmetrize_input=False)
