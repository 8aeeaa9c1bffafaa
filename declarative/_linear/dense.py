r"""Dense solves in products and selects only: the default linear solver of the library.

Why not LAPACK: on CPU, jaxlib 0.10 deadlocks on two cores when two batched LAPACK calls that do not depend on each other are
in flight (a worker of XLA's pool waits for that same pool). Two vmapped nodes side by side in a user's model are enough. Nothing
here is a LAPACK call once it is batched, so nothing can wait. One unbatched system, which cannot hang, still goes to LAPACK, as
does everything on other platforms.

The matrix is equilibrated by rows and columns and inverted in place by Gauss-Jordan elimination with partial pivoting, in panels of
`_PANEL` columns: pivots are found column by column inside a panel, the rest of a panel's work is one matrix product. An explicit
inverse costs three times the arithmetic of LU and compiles to a tenth of its loops; what it loses in accuracy,
$\epsilon\kappa$ in the residual, one step of refinement with the original matrix gives back, and the caller (`implicit.py`) checks the
residual anyway.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jax.custom_batching import custom_vmap
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

_PANEL = 32


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
        rows = _scale(jnp.max(jnp.abs(matrix), axis=1, initial=0))[:, None]
        columns = _scale(jnp.max(jnp.abs(rows * matrix), axis=0, initial=0))[None, :]
        inverse, pivots = _invert(rows * matrix * columns)
        return DenseState(matrix, columns.T * inverse * rows.T, pivots, structures, False)

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


def _scale(largest):
    # Powers of two, so that equilibration costs no rounding. Zero and non-finite rows are left to the pivot test.
    _, exponent = jnp.frexp(jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1))
    return jnp.ldexp(jnp.ones_like(largest), -exponent)


@custom_vmap
def _invert(matrix):
    return _library_inverse(matrix)


@_invert.def_vmap
def _(axis_size, in_batched, matrices):
    del axis_size, in_batched
    ours, library = jax.vmap(_gauss_jordan), jax.vmap(_library_inverse)
    return jax.lax.platform_dependent(matrices, cpu=ours, default=library), (True, True)


def _library_inverse(matrix: Float[Array, "n n"]) -> tuple[Float[Array, "n n"], Float[Array, " n"]]:
    packed, _, order = jax.lax.linalg.lu(matrix)
    inverse = jnp.eye(matrix.shape[0], dtype=matrix.dtype)[order]
    inverse = jax.lax.linalg.triangular_solve(packed, inverse, left_side=True, lower=True, unit_diagonal=True)
    inverse = jax.lax.linalg.triangular_solve(packed, inverse, left_side=True, lower=False)
    return inverse, jnp.diagonal(packed)


def _gauss_jordan(matrix: Float[Array, "n n"]) -> tuple[Float[Array, "n n"], Float[Array, " n"]]:
    """In place and without moving a row: row i becomes row place[i] of the inverse of the permuted matrix."""
    n = matrix.shape[0]
    if n <= _PANEL:
        matrix, place, pivots = _eliminate(matrix)
        return _put_in_place(matrix, place), pivots
    # Bordered with an identity to a whole number of panels.
    extra = -n % _PANEL
    size = n + extra
    padded = jnp.pad(matrix, (0, extra)) + jnp.diag(jnp.arange(size) >= n).astype(matrix.dtype)
    index = jnp.arange(size, dtype=jnp.int32)

    def panel(k, carry):
        matrix, place, pivots = carry
        columns = jax.lax.dynamic_slice(matrix, (0, k * _PANEL), (size, _PANEL))
        chosen, found = _panel_pivots(columns, place == size)
        block, order, _ = _eliminate(columns[chosen])
        inner = _put_in_place(block, order)
        # Block elimination: the pivot rows times the inverse of their block, and everything else cleared by them.
        rows = jax.lax.dynamic_update_slice(inner @ matrix[chosen], inner, (0, k * _PANEL))
        matrix = jax.lax.dynamic_update_slice(matrix, jnp.zeros_like(columns), (0, k * _PANEL))
        others = columns.at[chosen].set(0)
        matrix = (matrix - others @ rows).at[chosen].set(rows)
        place = place.at[chosen].set(k * _PANEL + jnp.arange(_PANEL, dtype=jnp.int32))
        return matrix, place, jax.lax.dynamic_update_slice(pivots, found, (k * _PANEL,))

    start = (padded, jnp.full_like(index, size), jnp.zeros(size, matrix.dtype))
    inverse, place, pivots = jax.lax.fori_loop(0, size // _PANEL, panel, start)
    return _put_in_place(inverse, place)[:n, :n], pivots[:n]


def _put_in_place(matrix: Float[Array, "n n"], place: Int[Array, " n"]) -> Float[Array, "n n"]:
    # Row i of the eliminated matrix belongs at place[i]; its column j belongs to the row that was the j-th pivot.
    order = jnp.zeros_like(place).at[place].set(jnp.arange(place.size, dtype=place.dtype))
    return jnp.zeros_like(matrix).at[:, order].set(matrix[order])


def _eliminate(matrix: Float[Array, "n n"]) -> tuple[Float[Array, "n n"], Int[Array, " n"], Float[Array, " n"]]:
    """Gauss-Jordan one column at a time: (eliminated matrix, when each row was the pivot, the pivots)."""
    n = matrix.shape[0]
    index = jnp.arange(n, dtype=jnp.int32)

    def column(j, carry):
        matrix, place, pivots = carry
        j = j.astype(jnp.int32)
        entries = matrix[:, j]
        pivot = _largest(entries, place == n)
        row = matrix[pivot]
        value = row[j]
        row = row.at[j].set(1) / jnp.where(value == 0, 1, value)
        matrix = matrix.at[:, j].set(0)
        matrix = jnp.where((index == pivot)[:, None], row[None, :], matrix - entries[:, None] * row[None, :])
        return matrix, jnp.where(index == pivot, j, place), pivots.at[j].set(value)

    start = (matrix, jnp.full(n, n, jnp.int32), jnp.zeros(n, matrix.dtype))
    return jax.lax.fori_loop(0, n, column, start)


def _panel_pivots(columns: Float[Array, "n b"], free) -> tuple[Int[Array, " b"], Float[Array, " b"]]:
    """The rows that partial pivoting picks for one panel, and the pivots: LU elimination of a copy of the panel."""
    n, b = columns.shape
    index = jnp.arange(n, dtype=jnp.int32)

    def column(j, carry):
        columns, free, chosen, pivots = carry
        entries = columns[:, j]
        pivot = _largest(entries, free)
        row = columns[pivot]
        free = free & (index != pivot)
        multiplier = jnp.where(free, entries / jnp.where(row[j] == 0, 1, row[j]), 0)
        columns = columns - multiplier[:, None] * row[None, :]
        return columns, free, chosen.at[j].set(pivot), pivots.at[j].set(row[j])

    start = (columns, free, jnp.zeros(b, jnp.int32), jnp.zeros(b, columns.dtype))
    _, _, chosen, pivots = jax.lax.fori_loop(0, b, column, start)
    return chosen, pivots


def _largest(entries, free):
    return jnp.argmax(jnp.where(free, jnp.abs(entries), -1)).astype(jnp.int32)
