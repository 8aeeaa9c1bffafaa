r"""Factors of symmetric positive definite matrices, safe to `vmap` on CPU.

$H^{-1} = W^\top W$ with $W$ the inverse of the Cholesky factor of $H$, so a solve is two products: where a factor serves a dozen
right-hand sides, as in an interior-point step and its gradient, products beat triangular solves under `vmap`. The matrix is scaled
to a unit diagonal first, and shifted by a few roundings, so that a semidefinite one has a factor too.
"""

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .lanes import over_lanes

# Above this size the factor is built from blocks by products: LAPACK's triangular inverse is the slow part.
_LEAF = 32


class InverseRoot(eqx.Module):
    """W with H^-1 = W'W; a vector for a diagonal H."""

    root: Float[Array, "n n"] | Float[Array, " n"]

    def solve(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        if self.root.ndim == 1:
            return self.root * self.root * vector
        # (vector' W')W and not W'(W vector): no transposed copy of W.
        return (self.root @ vector) @ self.root


class Gram(NamedTuple):
    """R' diag(weights) R, not multiplied out."""

    rows: Float[Array, "m n"]
    weights: Float[Array, " m"]


def factorise(
    matrix: Float[Array, "n n"] | Float[Array, " n"],
    diagonal: Float[Array, " n"] | None = None,
    grams: Sequence[Gram] = (),
    needed: bool | Bool[Array, ""] = True,
) -> InverseRoot:
    """The inverse root of a symmetric matrix plus a few roundings of its diagonal; NaN if that is not positive definite.

    The matrix is `matrix` (a vector is a diagonal one) plus a diagonal plus Gram matrices. A diagonal entry that is zero counts as 1:
    the direction is unknown to the matrix. Lanes of a batch that do not need the factor of a matrix cost little on CPU, and get zeros.
    """
    n = matrix.shape[0]
    if matrix.ndim == 1 and not grams:
        entries = matrix if diagonal is None else matrix + diagonal
        scale = _unit_diagonal(entries)
        shifted = entries * scale**2 + _shift(n, entries.dtype)
        return InverseRoot(jnp.where(shifted > 0, scale * jax.lax.rsqrt(jnp.where(shifted > 0, shifted, 1)), jnp.nan))
    diagonal = jnp.zeros(n, matrix.dtype) if diagonal is None else diagonal
    return InverseRoot(
        _inverse_root_of_sum(jnp.asarray(needed), matrix, diagonal, *(array for gram in grams for array in gram))
    )


@over_lanes
def _inverse_root_of_sum(needed, matrix, diagonal, *grams):
    """In one lane from data to factor: what a lane works on stays in the cache."""
    n = matrix.shape[0]

    def compute(matrix, diagonal, *grams):
        total = matrix + jnp.diag(diagonal) if matrix.ndim == 2 else jnp.diag(matrix + diagonal)
        for rows, weights in zip(grams[::2], grams[1::2], strict=True):
            total = total + rows.T @ (weights[:, None] * rows)
        scale = _unit_diagonal(jnp.diagonal(total))
        scaled = scale[:, None] * total * scale[None, :] + _shift(n, total.dtype) * jnp.eye(n, dtype=total.dtype)
        return _blocked(scaled) * scale[None, :]

    nothing = lambda matrix, *_: jnp.zeros((n, n), matrix.dtype)
    return jax.lax.cond(needed, compute, nothing, matrix, diagonal, *grams)


def _unit_diagonal(diagonal):
    return jnp.where(diagonal > 0, jax.lax.rsqrt(jnp.where(diagonal > 0, diagonal, 1)), 1)


def _shift(n: int, dtype) -> float:
    """What Cholesky itself may lose of a matrix with unit diagonal."""
    return 8 * (n + 8) * float(jnp.finfo(dtype).eps)


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
    scale = _unit_diagonal(jnp.diagonal(matrix))
    shift = float(jnp.finfo(matrix.dtype).eps) ** 0.6
    scaled = scale[:, None] * matrix * scale[None, :] + shift * jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    return jnp.all(jnp.isfinite(_cholesky(scaled)))


@over_lanes
def _cholesky(matrix):
    return jax.lax.linalg.cholesky(matrix, symmetrize_input=False)
