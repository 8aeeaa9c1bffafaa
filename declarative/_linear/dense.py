r"""Dense LU with partial pivoting, in products and selects only: the default linear solver of the library.

Why not LAPACK: on CPU, jaxlib 0.10 deadlocks on two cores when two batched LAPACK calls that do not depend on each other are
in flight (a worker of XLA's pool waits for that same pool). Two vmapped nodes side by side in a user's model are enough. Nothing
here is a LAPACK call once it is batched, so nothing can wait. One unbatched system, which cannot hang, still goes to LAPACK, as
does everything on other platforms.

The matrix is equilibrated by rows and columns, then factored right-looking in panels of `_PANEL` columns: pivots are found column
by column inside a panel, the trailing matrix is one matrix product. Diagonal blocks are inverted once, so that a solve is a short
sequence of products. Every solution is refined once with the original matrix, and the caller (`implicit.py`) checks its residual.
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

_PANEL = 16


class DenseState(eqx.Module):
    """`(R A C)[order] = L U`, padded to m rows; `packed` holds L below and U on and above the diagonal, `lower` and `upper` the
    inverses of their diagonal blocks."""

    matrix: Float[Array, "n n"]
    rows: Float[Array, " n"]
    columns: Float[Array, " n"]
    order: Int[Array, " m"]
    packed: Float[Array, "m m"]
    lower: Float[Array, "blocks b b"]
    upper: Float[Array, "blocks b b"]
    structures: Any = eqx.field(static=True)
    transposed: bool = eqx.field(static=True)


class Dense(lx.AbstractLinearSolver):
    """LU for square nonsingular operators, safe to vmap on CPU. A numerically singular matrix is reported, not inverted."""

    def init(self, operator, options):
        del options
        if operator.in_size() != operator.out_size():
            raise ValueError(f"the operator must be square, got {operator.out_size()} x {operator.in_size()}.")
        structures = tuple(_hashable(tree) for tree in (operator.in_structure(), operator.out_structure()))
        return _factor(operator.as_matrix(), structures)

    def compute(self, state, vector, options):
        del options
        solve, matrix = (_solve_transposed, state.matrix.T) if state.transposed else (_solve, state.matrix)
        flat, _ = ravel_pytree(vector)
        solution = solve(state, flat)
        solution = solution + solve(state, flat - matrix @ solution)
        pivots = jnp.abs(jnp.diagonal(state.packed))
        bound = 4 * pivots.size * float(jnp.finfo(pivots.dtype).eps) * jnp.max(pivots)
        result = lx.RESULTS.where(jnp.min(pivots) > bound, lx.RESULTS.successful, lx.RESULTS.singular)
        return _unravel(solution, state.structures[1 if state.transposed else 0]), result, {}

    def transpose(self, state, options):
        del options
        return _with_transposed(state, not state.transposed), {}

    def conj(self, state, options):
        return state, options  # Real matrices only.

    def assume_full_rank(self):
        return True


def _with_transposed(state: DenseState, transposed: bool) -> DenseState:
    fields = (state.matrix, state.rows, state.columns, state.order, state.packed, state.lower, state.upper)
    return DenseState(*fields, state.structures, transposed)


def _hashable(struct):
    leaves, treedef = jtu.tree_flatten(struct)
    return tuple((leaf.shape, jnp.dtype(leaf.dtype).name) for leaf in leaves), treedef


def _unravel(flat, structure):
    leaves, treedef = structure
    zeros = jtu.tree_unflatten(treedef, [jnp.zeros(shape, dtype) for shape, dtype in leaves])
    return ravel_pytree(zeros)[1](flat)


def _factor(matrix: Float[Array, "n n"], structures) -> DenseState:
    rows = _scale(jnp.max(jnp.abs(matrix), axis=1, initial=0))
    columns = _scale(jnp.max(jnp.abs(rows[:, None] * matrix), axis=0, initial=0))
    packed, order = _lu(_pad(rows[:, None] * matrix * columns[None, :]))
    n = packed.shape[0]
    b = _block(n)
    blocks = jax.vmap(lambda k: jax.lax.dynamic_slice(packed, (k, k), (b, b)))(jnp.arange(0, n, b))
    lower = jax.vmap(_inverse_of_unit_lower)(jnp.tril(blocks, -1))
    return DenseState(
        matrix, rows, columns, order, packed, lower, jax.vmap(_inverse_of_upper)(blocks), structures, False
    )


def _block(n: int) -> int:
    return min(n, _PANEL)


def _pad(matrix):
    """Bordered with an identity to a whole number of panels, so that every loop below has one body."""
    n = matrix.shape[0]
    extra = -n % _block(n)
    if extra == 0:
        return matrix
    return jnp.pad(matrix, (0, extra)) + jnp.diag(jnp.arange(n + extra) >= n).astype(matrix.dtype)


def _scale(largest):
    # Powers of two, so that equilibration costs no rounding. Zero and non-finite rows are left to the pivot test.
    _, exponent = jnp.frexp(jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1))
    return jnp.ldexp(jnp.ones_like(largest), -exponent)


def _solve(state: DenseState, vector: Float[Array, " n"]) -> Float[Array, " n"]:
    n, size = vector.size, state.order.size
    y = jnp.pad(state.rows * vector, (0, size - n))[state.order]
    y = _substitute(state.packed, state.lower, y, forward=True)
    return state.columns * _substitute(state.packed, state.upper, y, forward=False)[:n]


def _solve_transposed(state: DenseState, vector: Float[Array, " n"]) -> Float[Array, " n"]:
    # (R A C)^T = U^T L^T P, so U^T first, and the permutation is undone at the end.
    n, size = vector.size, state.order.size
    y = jnp.pad(state.columns * vector, (0, size - n))
    y = _substitute(state.packed.T, state.upper.mT, y, forward=True)
    y = _substitute(state.packed.T, state.lower.mT, y, forward=False)
    return state.rows * jnp.zeros_like(y).at[state.order].set(y)[:n]


def _substitute(packed, inverses, vector, *, forward: bool):
    """Block substitution with the lower (forward) or upper triangle of `packed`, whose diagonal blocks come inverted."""
    n, (count, b, _) = vector.size, inverses.shape

    def block(i, y):
        i = i if forward else count - 1 - i
        part = inverses[i] @ jax.lax.dynamic_slice(y, (i * b,), (b,))
        columns = jax.lax.dynamic_slice(packed, (0, i * b), (n, b))
        behind = jnp.arange(n) >= (i + 1) * b if forward else jnp.arange(n) < i * b
        y = jnp.where(behind, y - columns @ part, y)
        return jax.lax.dynamic_update_slice(y, part, (i * b,))

    return jax.lax.fori_loop(0, count, block, vector)


def _inverse_of_unit_lower(strict: Float[Array, "k k"]) -> Float[Array, "k k"]:
    def row(i, inverse):
        return inverse.at[i].add(-strict[i] @ inverse)

    # Rows from i on are still those of the identity, and strict[i] vanishes there.
    return jax.lax.fori_loop(1, strict.shape[0], row, jnp.eye(strict.shape[0], dtype=strict.dtype))


def _inverse_of_upper(block: Float[Array, "k k"]) -> Float[Array, "k k"]:
    # An upper triangle is a unit lower one once its diagonal is divided out and its axes are reversed.
    diagonal = jnp.diagonal(block)
    strict = jnp.triu(block, 1) / jnp.where(diagonal == 0, 1, diagonal)[:, None]
    return _inverse_of_unit_lower(strict[::-1, ::-1])[::-1, ::-1] / diagonal[None, :]


@custom_vmap
def _lu(matrix):
    packed, _, order = jax.lax.linalg.lu(matrix)
    return packed, order


@_lu.def_vmap
def _(axis_size, in_batched, matrices):
    del axis_size, in_batched

    def library(matrices):
        packed, _, order = jax.lax.linalg.lu(matrices)
        return packed, order

    return jax.lax.platform_dependent(matrices, cpu=jax.vmap(_panel_lu), default=library), (True, True)


def _panel_lu(matrix: Float[Array, "n n"]) -> tuple[Float[Array, "n n"], Int[Array, " n"]]:
    """Right-looking LU that moves no row until the end: a row is used up when it has been a pivot."""
    n = matrix.shape[0]
    b = _block(n)
    index = jnp.arange(n, dtype=jnp.int32)

    def panel(k, carry):
        matrix, place = carry  # place[i]: when row i was a pivot, n if not yet
        columns, place = jax.lax.fori_loop(0, b, lambda j, c: _eliminate(j, k, *c), (_columns(matrix, k, b), place))
        matrix = jax.lax.dynamic_update_slice(matrix, columns, (0, k * b))
        # The pivot rows of this panel, in order; L11 is their part of the panel.
        pivots = jnp.zeros(n, jnp.int32).at[jnp.where(place < n, place, n)].set(index, mode="drop")
        pivots = jax.lax.dynamic_slice(pivots, (k * b,), (b,))
        rows = _inverse_of_unit_lower(jnp.tril(columns[pivots], -1)) @ matrix[pivots]
        behind = index[None, :] >= (k + 1) * b
        rows = jnp.where(behind, rows, 0)  # the columns behind the panel
        multipliers = jnp.where((place == n)[:, None], columns, 0)
        updated = matrix - multipliers @ rows
        return updated.at[pivots].set(jnp.where(behind, rows, matrix[pivots])), place

    matrix, place = jax.lax.fori_loop(0, n // b, panel, (matrix, jnp.full(n, n, jnp.int32)))
    order = jnp.zeros(n, jnp.int32).at[place].set(index)
    return matrix[order], order


def _columns(matrix, k, b: int):
    return jax.lax.dynamic_slice(matrix, (0, k * b), (matrix.shape[0], b))


def _eliminate(j, k, columns: Float[Array, "n b"], place: Int[Array, " n"]):
    """One column of panel k: the largest entry among the unused rows becomes the pivot."""
    n, b = columns.shape
    index = jnp.arange(n, dtype=jnp.int32)
    free = place == n
    entries = columns[:, j]
    pivot = jnp.argmax(jnp.where(free, jnp.abs(entries), -1)).astype(jnp.int32)
    row = columns[pivot]
    place = jnp.where(index == pivot, (k * b + j).astype(jnp.int32), place)
    free = free & (index != pivot)
    multiplier = jnp.where(free, entries / jnp.where(row[j] == 0, 1, row[j]), 0)
    columns = columns - multiplier[:, None] * jnp.where(jnp.arange(b) > j, row, 0)[None, :]
    return columns.at[:, j].set(jnp.where(free, multiplier, entries)), place
