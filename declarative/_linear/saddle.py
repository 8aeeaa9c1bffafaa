r"""A symmetric generalised inverse of saddle-point matrices whose constraints depend on one another, or whose minimiser is not unique.

$$ K = \begin{bmatrix} H & A^\top \\ A & 0 \end{bmatrix}, \qquad
   K^{\sharp} = \begin{bmatrix} Z & (I - ZH)A^+ \\ (A^+)^\top(I - HZ) & -(A^+)^\top(H - HZH)A^+ \end{bmatrix}, \qquad
   Z = (PHP)^+, \quad P = I - A^+A \tag{S} $$

$K^\sharp = K^{-1}$ where that exists. Where the rows of $A$ depend on one another, $K^\sharp b$ for a consistent $b$ has the unique primal part,
and multipliers of least norm (of the rows scaled to length 1). Where $PHP$ is singular on the null space of $A$ as well, the primal part is the
shortest of all solutions. $K^\sharp$ is symmetric, so the transposed solve gives the transposed derivative.
"""

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float

from .lanes import over_lanes
from .structured import AbstractStructured, AbstractStructuredSolver


class Saddle(AbstractStructured):
    """Linearised optimality conditions: stationarity `H dy + A' dmu`; `A dy` of active rows, `-weights dmu` of others."""

    hessian: Float[Array, "n n"]
    rows: Float[Array, "q n"]
    active: Bool[Array, " q"]
    weights: Float[Array, " q"]
    transposed: bool = eqx.field(static=True, default=False)

    def mv(self, vector):
        n = self.hessian.shape[0]
        y, mu = vector[:n], vector[n:]
        keep = lambda other: jnp.where(self.active, other, 0)
        first = self.hessian @ y + (keep(mu) if self.transposed else mu) @ self.rows
        pulled = self.rows @ y
        rest = jnp.where(self.active, 0, -self.weights * mu)
        return jnp.concatenate([first, (pulled if self.transposed else keep(pulled)) + rest])

    def as_matrix(self):
        keep = jnp.where(self.active[:, None], self.rows, 0)
        corner = jnp.diag(jnp.where(self.active, 0, -self.weights))
        left, below = (keep.T, self.rows) if self.transposed else (self.rows.T, keep)
        top = jnp.concatenate([self.hessian, left], axis=1)
        return jnp.concatenate([top, jnp.concatenate([below, corner], axis=1)], axis=0)

    def transpose(self):
        return Saddle(self.hessian, self.rows, self.active, self.weights, not self.transposed)

    @property
    def space(self):
        return eqx.filter_eval_shape(lambda: jnp.zeros(sum(self.rows.shape), self.hessian.dtype))


class SaddleState(eqx.Module):
    operator: Saddle
    primal: Float[Array, "n n"]  # Z
    rows_inverse: Float[Array, "n q"]  # A^+
    dependent: Bool[Array, ""]
    loose: Bool[Array, ""]

    def transpose(self):
        return eqx.tree_at(lambda state: state.operator, self, self.operator.transpose())


class SaddleSolver(AbstractStructuredSolver):
    """(S) for a `Saddle`. What it may not ignore, it reports as singular.

    - `dependent`: whether active rows may depend on one another.
    - `nonunique`: whether solutions may be: then the part of a cotangent along them is dropped, and a right-hand side that is not
      consistent is singular all the same.
    """

    dependent: bool = eqx.field(static=True)
    nonunique: bool = eqx.field(static=True)

    solves = Saddle

    def prepare(self, operator):
        rows = jnp.where(operator.active[:, None], operator.rows, 0)
        norms = jnp.sqrt(jnp.sum(rows**2, axis=1))
        lengths = jnp.where(norms > 0, norms, 1)
        primal, rows_inverse, rank, free = _generalised(rows / lengths[:, None], operator.hessian)
        dependent = rank < jnp.sum(operator.active)
        loose = free > rank  # the range of A' is in the kernel of PHP in any case
        return SaddleState(operator, primal, rows_inverse / lengths[None, :], dependent, loose)

    def compute(self, state, vector, options):
        del options
        operator = state.operator
        solution = _apply(state, vector)
        solution = solution + _apply(state, vector - operator.mv(solution))
        left = vector - operator.mv(solution)
        eps = float(jnp.finfo(vector.dtype).eps)
        size = jnp.sqrt(jnp.sum(vector**2))
        n = operator.hessian.shape[0]
        if self.nonunique and operator.transposed:
            # The part of the cotangent along other solutions: what Z cannot see of the null space of A.
            along = left[:n] - state.rows_inverse @ (jnp.where(operator.active[:, None], operator.rows, 0) @ left[:n])
            left = left.at[:n].add(-jnp.where(state.loose, along, 0))
        bad = ~(jnp.sqrt(jnp.sum(left**2)) <= 10 * eps**0.5 * size) if self.nonunique else jnp.zeros((), bool)
        if not self.dependent:
            bad = bad | state.dependent
        if not self.nonunique:
            bad = bad | state.loose
        return solution, lx.RESULTS.where(bad, lx.RESULTS.singular, lx.RESULTS.successful), {}

    def assume_full_rank(self):
        return False


def _apply(state: SaddleState, vector):
    op, plus = state.operator, state.rows_inverse
    n = op.hessian.shape[0]
    first, second = vector[:n], vector[n:]
    inactive = jnp.where(op.active, 0, second)
    second = jnp.where(op.active, second, 0)
    weights = jnp.where(op.weights > 0, op.weights, 1)
    idle = -inactive / weights
    if not op.transposed:
        # Multipliers of inactive rows, which their own equations give, enter stationarity.
        first = first - idle @ op.rows
    particular = plus @ second
    y = particular + state.primal @ (first - op.hessian @ particular)
    mu = jnp.where(op.active, (first - op.hessian @ y) @ plus, 0)
    if op.transposed:
        idle = jnp.where(op.active, 0, (op.rows @ y - inactive) / weights)
    return jnp.concatenate([y, mu + idle])


@over_lanes
def _generalised(rows, hessian):
    """Z, A^+, the rank of A, and the number of zero eigenvalues of PHP."""
    n = hessian.shape[0]
    eps = float(jnp.finfo(hessian.dtype).eps)
    left, values, right = jnp.linalg.svd(rows, full_matrices=False)
    kept = values > max(rows.shape) * eps**0.75 * jnp.max(values, initial=0)
    plus = (right.T * jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)[None, :]) @ left.T
    basis = jnp.where(kept[:, None], right, 0)
    projector = jnp.eye(n, dtype=hessian.dtype) - basis.T @ basis
    inside = projector @ hessian @ projector
    curvatures, vectors = jnp.linalg.eigh((inside + inside.T) / 2)
    some = jnp.abs(curvatures) > n * eps**0.75 * jnp.max(jnp.abs(hessian), initial=0)
    primal = (vectors * jnp.where(some, 1 / jnp.where(some, curvatures, 1), 0)[None, :]) @ vectors.T
    primal = projector @ primal @ projector
    return primal, plus, jnp.sum(kept), jnp.sum(~some)
