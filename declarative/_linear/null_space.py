r"""Elimination of linear equations: $A z = b$ exactly where $z = Y b + N w$, with $A N = 0$ and $A Y = I$.

Full row rank: LU of $A^\top$ with partial pivoting, $\Pi A^\top = \begin{bmatrix}L_1\\L_2\end{bmatrix}U$, gives
$N = \Pi^\top \begin{bmatrix}-L_1^{-\top}L_2^\top\\I\end{bmatrix}$. It does not contain $U$, which is where nearly dependent equations
show: they make $Y$ large, not $N$ wrong. $N$ is then made orthonormal (Cholesky of $N^\top N$) and $Y$ orthogonal to it, so
both are those of a QR factorisation at a fraction of its time. Dependent equations are counted on the diagonal of $U$; for them,
`by_svd` gives the same two matrices with the dependent directions in zero columns.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .lanes import over_lanes
from .positive_definite import inverse_root


class NullSpace(eqx.Module):
    """`basis` N (n, k) and `particular` Y (n, p); `free` marks the columns of N that are not padding (None: all)."""

    basis: Float[Array, "n k"]
    particular: Float[Array, "n p"]
    full_rank: Bool[Array, ""]
    free: Bool[Array, " k"] | None = None


def by_elimination(matrix: Float[Array, "p n"]) -> NullSpace:
    """For p < n rows of similar size; `full_rank` is False where they are dependent (then nothing else is to be used)."""
    return NullSpace(*_eliminate(matrix))


@jax.custom_jvp
def _eliminate(matrix):
    p, n = matrix.shape
    packed, order = _lu(matrix.T)
    sizes = jnp.abs(jnp.diagonal(packed))
    full_rank = jnp.min(sizes, initial=jnp.inf) > _rank_tolerance(matrix) * jnp.max(sizes, initial=0)
    # Harmless numbers in a lane that will be solved another way.
    safe = jnp.where(full_rank, packed, jnp.eye(n, p, dtype=matrix.dtype))
    lower_inverse, upper_inverse = _triangular_inverses(safe[:p])
    coupling = safe[p:] @ lower_inverse
    # N'N = I + coupling coupling', whose inverse root makes N orthonormal to eps times its condition: enough for what it is for.
    free = inverse_root(coupling @ coupling.T + jnp.eye(n - p, dtype=matrix.dtype)).T
    pivots = -coupling.T @ free
    particular = lower_inverse.T @ upper_inverse.T
    overlap = pivots.T @ particular
    top = jnp.concatenate([pivots, particular - pivots @ overlap], axis=1)
    bottom = jnp.concatenate([free, -free @ overlap], axis=1)
    both = jnp.concatenate([top, bottom])[jnp.argsort(order)]
    basis, particular = both[:, : n - p], both[:, n - p :]
    return basis, particular, full_rank


@_eliminate.defjvp
def _(primals, tangents):
    # Any N and Y with A N = 0 and A Y = I will do, so these derivatives need only keep those two equations.
    (matrix,), (t_matrix,) = primals, tangents
    basis, particular, full_rank = _eliminate(matrix)
    moved = particular @ t_matrix
    t_rank = np.zeros(full_rank.shape, jax.dtypes.float0)
    return (basis, particular, full_rank), (-moved @ basis, -moved @ particular, t_rank)


def by_svd(matrix: Float[Array, "p n"]) -> tuple[NullSpace, Float[Array, "p p"]]:
    """For any matrix: the basis is padded to n columns, and Y is the pseudoinverse.

    Also returns the projector on the left null space: the part of b on which it does not vanish is inconsistent.
    """
    p, n = matrix.shape
    left, values, right = _svd(matrix)
    kept = values > _rank_tolerance(matrix) * jnp.max(values, initial=0)
    rank_slots = values.size
    free = jnp.ones(n, bool).at[:rank_slots].set(~kept)
    basis = jnp.where(free[None, :], right.T, 0)
    inverses = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    particular = (right.T[:, :rank_slots] * inverses[None, :]) @ left[:, :rank_slots].T
    span = jnp.where(kept[None, :], left[:, :rank_slots], 0)
    outside = jnp.eye(p, dtype=matrix.dtype) - span @ span.T
    return NullSpace(basis, particular, jnp.sum(kept) == p, free), outside


def _rank_tolerance(matrix):
    return 10 * max(matrix.shape) * float(jnp.finfo(matrix.dtype).eps)


@over_lanes
def _lu(matrix):
    packed, _, order = jax.lax.linalg.lu(matrix)
    return packed, order


@over_lanes
def _triangular_inverses(packed):
    eye = jnp.eye(packed.shape[0], dtype=packed.dtype)
    lower = jax.lax.linalg.triangular_solve(packed, eye, left_side=True, lower=True, unit_diagonal=True)
    return lower, jax.lax.linalg.triangular_solve(packed, eye, left_side=True, lower=False)


@over_lanes
def _svd(matrix):
    return jnp.linalg.svd(matrix, full_matrices=True)
