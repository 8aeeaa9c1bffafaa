r"""Linear systems of a sparse solution: trivial off its support, so solved on the support only.

Where F is a natural residual, $F = \mathrm{prox}(y - s\nabla f) - y$, an entry that the prox sets to zero has the row
$\mathrm dF_j = -\mathrm dy_j$. With S the rest,

$$ J = \begin{bmatrix} J_{SS} & J_{SN} \\ 0 & -I \end{bmatrix}, \qquad v_N = -b_N, \quad J_{SS} v_S = b_S - J_{SN} v_N,          \tag{J} $$

and for the transpose $J_{SS}^\top w_S = c_S$, $w_N = J_{SN}^\top w_S - c_N$. `GramSystem` has
$J_{SS} = -\mathrm{diag}(s)\,(X_S^\top X_S + \mathrm{diag}(d_S))$ and factors that on a buffer of static size; `Restricted` knows products
with J only, and uses conjugate gradients.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from .._core.precision import FullPrecision
from .lanes import over_lanes
from .norms import largest
from .structured import AbstractStructured, AbstractStructuredSolver


class Buffer(eqx.Module):
    """Up to k entries of a support: `index` is p where there are fewer; `count` of all entries, which may be more than k."""

    index: Int[Array, " k"]
    count: Int[Array, ""]

    @property
    def filled(self) -> Bool[Array, " k"]:
        return jnp.arange(self.index.size, dtype=jnp.int32) < self.count

    def gather(self, vector: Float[Array, " p"]) -> Float[Array, " k"]:
        return vector.at[self.index].get(mode="fill", fill_value=0)

    def scatter(self, entries: Float[Array, " k"], p: int) -> Float[Array, " p"]:
        return jnp.zeros(p, entries.dtype).at[self.index].set(entries, mode="drop")


def buffer(support: Bool[Array, " p"], k: int) -> Buffer:
    p = support.size
    index = jnp.nonzero(support, size=k, fill_value=p)[0].astype(jnp.int32)
    return Buffer(index, jnp.sum(support, dtype=jnp.int32))


@over_lanes
def solve_gram(
    needed: Bool[Array, ""],
    columns: Float[Array, "p n"],
    diagonal: Float[Array, " p"],
    index: Int[Array, " k"],
    vectors: Float[Array, "k m"],
) -> tuple[Float[Array, "k m"], Bool[Array, ""]]:
    """$(X_S^\\top X_S + \\mathrm{diag}(d_S))^{-1}$ times vectors, and whether the matrix is regular; `columns` is X transposed.

    Cholesky of the matrix scaled to a unit diagonal, with one refinement. Its smallest pivot is what tells a dependent column from the
    rest: squared, the sine of the angle to the columns before. Lanes that do not need it cost nothing on CPU.
    """
    k = index.size

    def compute(columns, diagonal, index, vectors):
        rows = columns.at[index].get(mode="fill", fill_value=0)
        # Padding is a column of zeros: a one on the diagonal.
        padding = (index >= columns.shape[0]).astype(columns.dtype)
        gram = rows @ rows.T + jnp.diag(diagonal.at[index].get(mode="fill", fill_value=0) + padding)
        entries = jnp.diagonal(gram)
        scale = jnp.where(entries > 0, jax.lax.rsqrt(jnp.where(entries > 0, entries, 1)), 1)
        gram = scale[:, None] * gram * scale[None, :]
        lower = jax.lax.linalg.cholesky(gram, symmetrize_input=False)

        def solve(b):
            half = jax.lax.linalg.triangular_solve(lower, b, left_side=True, lower=True)
            return jax.lax.linalg.triangular_solve(lower, half, left_side=True, lower=True, transpose_a=True)

        b = scale[:, None] * vectors
        x = solve(b)
        x = x + solve(b - gram @ x)
        regular = jnp.min(jnp.diagonal(lower), initial=1) ** 2 > 4 * (k + 4) * float(jnp.finfo(gram.dtype).eps)
        # The diagonal of a NaN factor: a comparison with NaN is false.
        return scale[:, None] * x, regular & jnp.all(jnp.isfinite(jnp.diagonal(lower)))

    nothing = lambda columns, diagonal, index, vectors: (jnp.zeros_like(vectors), jnp.ones((), bool))
    return jax.lax.cond(needed, compute, nothing, columns, diagonal, index, vectors)


class GramSystem(AbstractStructured):
    """(J) with $J_{SS}$, $J_{SN}$ rows of $-\\mathrm{diag}(s)(X^\\top X + \\mathrm{diag}(d))$, or its transpose."""

    columns: Float[Array, "p n"]  # X transposed
    diagonal: Float[Array, " p"]  # d
    steps: Float[Array, " p"]  # s
    support: Bool[Array, " p"]
    buffer: Buffer
    transposed: bool = eqx.field(static=True, default=False)

    def hessian(self, v):
        return self.columns @ (v @ self.columns) + self.diagonal * v

    def mv(self, vector):
        if self.transposed:
            return -self.hessian(jnp.where(self.support, self.steps * vector, 0)) - jnp.where(self.support, 0, vector)
        return jnp.where(self.support, -self.steps * self.hessian(vector), -vector)

    def transpose(self):
        return GramSystem(
            self.columns, self.diagonal, self.steps, self.support, self.buffer, transposed=not self.transposed
        )

    @property
    def space(self):
        return jax.ShapeDtypeStruct(self.steps.shape, self.steps.dtype)


class GramSolver(AbstractStructuredSolver):
    """Cholesky on the buffer. Dependent columns on the support, or a support larger than the buffer, are reported as singular."""

    solves = GramSystem

    def compute(self, state, vector, options):
        del options
        b, unravel = ravel_pytree(vector)
        on, p = state.support, state.steps.size
        off = jnp.where(on, 0, -b)
        if state.transposed:
            rhs = jnp.where(on, -b, 0)
        else:
            rhs = jnp.where(on, -b / state.steps - state.hessian(off), 0)
        gathered = state.buffer.gather(rhs)[:, None]
        solved, regular = solve_gram(jnp.ones((), bool), state.columns, state.diagonal, state.buffer.index, gathered)
        v = state.buffer.scatter(solved[:, 0], p)
        if state.transposed:
            x = jnp.where(on, v / state.steps, off - state.hessian(v))
        else:
            x = jnp.where(on, v, off)
        good = regular & (state.buffer.count <= state.buffer.index.size)
        return unravel(x), lx.RESULTS.where(good, lx.RESULTS.successful, lx.RESULTS.singular), {}


class Restricted(AbstractStructured):
    """(J) by products with it, or its transpose."""

    product: lx.AbstractLinearOperator  # J
    support: Bool[Array, " p"]
    transposed: bool = eqx.field(static=True, default=False)

    def mv(self, vector):
        return (self.product.transpose() if self.transposed else self.product).mv(vector)

    def as_matrix(self):
        return self.product.transpose().as_matrix() if self.transposed else self.product.as_matrix()

    def transpose(self):
        return Restricted(self.product, self.support, transposed=not self.transposed)

    @property
    def space(self):
        return self.product.in_structure()


class ConjugateGradients(AbstractStructuredSolver):
    r"""Conjugate gradients on $-J_{SS}$ where that is symmetric (it then is positive definite at a minimum), else on its normal equations.

    Symmetry is measured: $u^\top J_{SS} w = w^\top J_{SS} u$ for two fixed vectors.
    """

    transposed: bool = eqx.field(static=True, default=False)

    solves = Restricted

    def compute(self, state, vector, options):
        del options
        b, unravel = ravel_pytree(vector)
        on, n, dtype, transposed = state.support, state.support.size, b.dtype, state.transposed
        product, transpose = state.product.mv, state.product.transpose().mv
        off = jnp.where(on, 0, -b)
        inner = lambda v: jnp.where(on, product(jnp.where(on, v, 0)), 0)
        inner_transpose = lambda v: jnp.where(on, transpose(jnp.where(on, v, 0)), 0)
        rhs = jnp.where(on, b if transposed else b - product(off), 0)
        u, w = (jnp.where(on, jnp.cos(jnp.arange(1, n + 1).astype(dtype) * a), 0) for a in (1.0, 2.3))
        ju, jw = inner(u), inner(w)
        gap = jnp.abs(w @ ju - u @ jw)
        size = largest(ju) * jnp.sum(jnp.abs(w)) + largest(jw) * jnp.sum(jnp.abs(u))
        symmetric = gap <= 100 * float(jnp.finfo(dtype).eps) * size
        # Off the support the identity, which conjugate gradients never leave zero for.
        apply = lambda v: jax.lax.cond(
            symmetric,
            lambda v: -inner(v),
            (lambda v: inner(inner_transpose(v))) if transposed else (lambda v: inner_transpose(inner(v))),
            v,
        )
        rhs_normal = jnp.where(symmetric, -rhs, inner(rhs) if transposed else inner_transpose(rhs))
        tol = float(jnp.finfo(dtype).eps) ** 0.75
        top = largest(rhs_normal)
        top = jnp.where((top > 0) & jnp.isfinite(top), top, 1)
        struct = jax.ShapeDtypeStruct(b.shape, dtype)
        full = lambda v: apply(v) + jnp.where(on, 0, v)
        out = lx.linear_solve(
            lx.FunctionLinearOperator(full, struct, lx.positive_semidefinite_tag),
            rhs_normal / top,
            FullPrecision(lx.CG(rtol=tol, atol=tol, max_steps=10 * n)),
            throw=False,
        )
        v = jnp.where(on, out.value * top, 0)
        x = jnp.where(on, v, off + transpose(v)) if transposed else jnp.where(on, v, off)
        return unravel(x), out.result, {}
