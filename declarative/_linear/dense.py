r"""Dense solves by LU: the default linear solver of the library.

The matrix is equilibrated by rows and columns, by powers of two, and inverted from its LU factors with partial pivoting. An explicit
inverse costs three times the arithmetic of LU; every further right-hand side, transposed or not, is then one product, which is what
a Jacobian asks for. What it loses in accuracy, $\epsilon\kappa$ in the residual, one step of refinement with the original matrix
gives back, and the caller (`implicit.py`) checks the residual anyway. Batches: see `lanes.py`.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float

from .lanes import over_lanes
from .scaling import power_of_two


class DenseState(eqx.Module):
    """The matrix, its approximate inverse, and the pivots met on the way."""

    matrix: Float[Array, "n n"]
    inverse: Float[Array, "n n"]
    pivots: Float[Array, " n"]
    structures: Any = eqx.field(static=True)
    transposed: bool = eqx.field(static=True)


class Dense(lx.AbstractLinearSolver):
    """For square nonsingular operators, safe to vmap on CPU. A numerically singular matrix is reported, not inverted."""

    def init(self, operator, options):
        del options
        if operator.in_size() != operator.out_size():
            raise ValueError(f"the operator must be square, got {operator.out_size()} x {operator.in_size()}.")
        structures = tuple(_hashable(tree) for tree in (operator.in_structure(), operator.out_structure()))
        matrix = operator.as_matrix()
        inverse, pivots = _equilibrated_inverse(matrix)
        return DenseState(matrix, inverse, pivots, structures, False)

    def compute(self, state, vector, options):
        del options
        matrix, inverse = (state.matrix.T, state.inverse.T) if state.transposed else (state.matrix, state.inverse)
        flat, _ = ravel_pytree(vector)
        solution = inverse @ flat
        solution = solution + inverse @ (flat - matrix @ solution)
        sizes = jnp.abs(state.pivots)
        bound = 4 * sizes.size * float(jnp.finfo(sizes.dtype).eps) * jnp.max(sizes, initial=0)
        result = lx.RESULTS.where(jnp.min(sizes, initial=jnp.inf) > bound, lx.RESULTS.successful, lx.RESULTS.singular)
        return _unravel(solution, state.structures[1 if state.transposed else 0]), result, {}

    def transpose(self, state, options):
        del options
        return DenseState(state.matrix, state.inverse, state.pivots, state.structures, not state.transposed), {}

    def conj(self, state, options):
        return state, options  # Real matrices only.

    def assume_full_rank(self):
        return True


def _hashable(struct):
    leaves, treedef = jtu.tree_flatten(struct)
    return tuple((leaf.shape, jnp.dtype(leaf.dtype).name) for leaf in leaves), treedef


def _unravel(flat, structure):
    leaves, treedef = structure
    zeros = jtu.tree_unflatten(treedef, [jnp.zeros(shape, dtype) for shape, dtype in leaves])
    return ravel_pytree(zeros)[1](flat)


def _lu_inverse(matrix: Float[Array, "n n"]) -> tuple[Float[Array, "n n"], Float[Array, " n"]]:
    packed, _, order = jax.lax.linalg.lu(matrix)
    inverse = jnp.eye(matrix.shape[0], dtype=matrix.dtype)[order]
    inverse = jax.lax.linalg.triangular_solve(packed, inverse, left_side=True, lower=True, unit_diagonal=True)
    inverse = jax.lax.linalg.triangular_solve(packed, inverse, left_side=True, lower=False)
    return inverse, jnp.diagonal(packed)


_invert = over_lanes(_lu_inverse)


def _equilibrated_inverse(matrix):
    rows = power_of_two(jnp.max(jnp.abs(matrix), axis=1, initial=0))[:, None]
    columns = power_of_two(jnp.max(jnp.abs(rows * matrix), axis=0, initial=0))[None, :]
    inverse, pivots = _invert(rows * matrix * columns)
    return columns.T * inverse * rows.T, pivots


def inverse(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """By LU of the equilibrated matrix; not finite where that is singular."""
    return _equilibrated_inverse(matrix)[0]


@over_lanes
def inverse_where(needed: Bool[Array, ""], matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The inverse of a matrix with entries of about 1, or zeros, at no cost on CPU, where it is not needed."""
    invert = lambda matrix: _lu_inverse(matrix)[0]
    return jax.lax.cond(needed, invert, jnp.zeros_like, matrix)
