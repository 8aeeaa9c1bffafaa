r"""Elimination of linear equations: $A z = b$ exactly where $z = Y b + N w$, with $A N = 0$ and $A Y = I$.

LU of $A^\top$ with partial pivoting, $\Pi A^\top = \begin{bmatrix}L_1\\L_2\end{bmatrix}U$, gives
$N = \Pi^\top \begin{bmatrix}-L_1^{-\top}L_2^\top\\I\end{bmatrix}$ and $Y = \Pi^\top \begin{bmatrix}L_1^{-\top}U^{-\top}\\0\end{bmatrix}$. $U$, where
nearly dependent equations show, is not in $N$: they make $Y$ large, not $N$ wrong. $N$ is then made orthonormal (Cholesky of
$N^\top N$) and $Y$ orthogonal to it, so both are those of a QR factorisation at a fraction of its time.

*Dependent equations* are those with a zero on the diagonal of $U$. They are dropped: set to zero and factored again, with ones on the
diagonal of $U$ in their place, which turns their columns of $Y$ into the directions that they no longer hold back. $N$ has `spare`
more columns than $n - p$ to take these in; columns that stay empty are padding.
"""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .lanes import over_lanes
from .positive_definite import inverse_root


class NullSpace(eqx.Module):
    """`basis` N (n, k) and `particular` Y (n, p), with zero columns for the equations that are dropped.

    `free` (k,) marks the columns of N that are not padding; `complete` is False where there were more equations to drop than N has
    room for.
    """

    basis: Float[Array, "n k"]
    particular: Float[Array, "n p"]
    free: Bool[Array, " k"]
    complete: Bool[Array, ""]


def null_space(matrix: Float[Array, "p n"], spare: int) -> NullSpace:
    """For rows of similar size. With p >= n the basis has n columns, mostly padding."""
    p, n = matrix.shape
    kernel = _by_svd if p >= n else partial(_eliminate, min(spare, p))
    return NullSpace(*over_lanes(kernel)(matrix))


def _eliminate(spare, matrix):
    p, n = matrix.shape
    packed, order, kept = _lu(matrix)
    lower_inverse, upper_inverse = _triangular_inverses(packed[:p])
    coupling = packed[p:] @ lower_inverse
    # N'N = I + coupling coupling', whose inverse root makes N orthonormal to eps times its condition: enough for what it is for.
    free = inverse_root(coupling @ coupling.T + jnp.eye(n - p, dtype=matrix.dtype)).T
    pivots = -coupling.T @ free
    particular = lower_inverse.T @ upper_inverse.T
    overlap = pivots.T @ particular
    top, bottom = particular - pivots @ overlap, -free @ overlap
    # The first `spare` dropped equations give their columns to N, orthonormal among themselves.
    first = jnp.argsort(kept)[:spare]
    taken = ~kept[first]
    extra = jnp.where(taken[None, :], jnp.concatenate([top, bottom])[:, first], 0)
    extra = extra @ inverse_root(extra.T @ extra + jnp.diag((~taken).astype(matrix.dtype))).T
    particular = jnp.where(kept[None, :], jnp.concatenate([top, bottom]), 0)
    columns = jnp.concatenate([jnp.concatenate([pivots, free]), extra, particular], axis=1)[jnp.argsort(order)]
    k = n - p + spare
    marks = jnp.concatenate([jnp.ones(n - p, bool), taken])
    return columns[:, :k], columns[:, k:], marks, jnp.sum(~kept) <= spare


def _by_svd(matrix):
    n = matrix.shape[1]
    left, values, right = jnp.linalg.svd(matrix, full_matrices=True)
    in_range = values > _rank_tolerance(matrix) * jnp.max(values, initial=0)
    inverses = jnp.where(in_range, 1 / jnp.where(in_range, values, 1), 0)
    particular = (right.T * inverses[None, :]) @ left[:, :n].T
    return jnp.where(in_range[None, :], 0, right.T), particular, ~in_range, jnp.ones((), bool)


def _rank_tolerance(matrix):
    return 10 * max(matrix.shape) * float(jnp.finfo(matrix.dtype).eps)


def _lu(matrix):
    packed, _, order = jax.lax.linalg.lu(matrix.T)
    sizes = jnp.abs(jnp.diagonal(packed))
    kept = sizes > _rank_tolerance(matrix) * jnp.max(sizes, initial=0)

    def again(matrix):
        packed, _, order = jax.lax.linalg.lu(jnp.where(kept[:, None], matrix, 0).T)
        p = kept.size
        return packed.at[jnp.arange(p), jnp.arange(p)].add(jnp.where(kept, 0, 1).astype(matrix.dtype)), order

    packed, order = jax.lax.cond(jnp.all(kept), lambda matrix: (packed, order), again, matrix)
    return packed, order, kept


def _triangular_inverses(packed):
    eye = jnp.eye(packed.shape[0], dtype=packed.dtype)
    lower = jax.lax.linalg.triangular_solve(packed, eye, left_side=True, lower=True, unit_diagonal=True)
    return lower, jax.lax.linalg.triangular_solve(packed, eye, left_side=True, lower=False)
