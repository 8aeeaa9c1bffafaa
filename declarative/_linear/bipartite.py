r"""Weighted bipartite graphs as linear systems: what the two sets of multipliers of a transport plan obey.

$$ \begin{bmatrix} \mathrm{diag}(r) & W \\ W^\top & \mathrm{diag}(c) \end{bmatrix} \begin{bmatrix} u \\ v \end{bmatrix} =
   \begin{bmatrix} p \\ q \end{bmatrix}, \qquad W \ge 0, \quad r = W 1 + \rho, \quad c = W^\top 1 + \sigma, \quad \rho, \sigma \ge 0 \tag{B} $$

The matrix is the signless Laplacian of the graph with weights $W$, plus a diagonal: positive semidefinite. On a connected component without
any $\rho$ or $\sigma$ it has the null vector $(1, -1)$, and (B) a solution if $p$ and $q$ have the same sum there; solutions
differ by what $W \circ (u 1^\top + 1 v^\top)$ does not see. The Schur complement on $v$,

$$ S = \mathrm{diag}(c) - G, \quad G = W^\top \mathrm{diag}(r)^{-1} W, \qquad
   S_{jj} = \sigma_j + (W^\top (\rho / r))_j + \sum_{k \ne j} G_{jk},                                                    \tag{S} $$

has a diagonal without a difference in it, so that weights of any size keep their digits. A row with $r_i = 0$ takes no part: $u_i = 0$.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .lanes import over_lanes
from .positive_definite import InverseRoot, factorise

# Size up to which the Schur complement is formed.
_DENSE = 1024
_REFINEMENTS = 2


class Bipartite(eqx.Module):
    """The matrix of (B), by its parts: W, rho and sigma."""

    weights: Float[Array, "n m"]
    row_excess: Float[Array, " n"]
    column_excess: Float[Array, " m"]

    @property
    def rows(self) -> Float[Array, " n"]:
        return jnp.sum(self.weights, axis=1) + self.row_excess

    @property
    def columns(self) -> Float[Array, " m"]:
        return jnp.sum(self.weights, axis=0) + self.column_excess

    @property
    def flipped(self) -> "Bipartite":
        return Bipartite(self.weights.T, self.column_excess, self.row_excess)

    def schur(self, v: Float[Array, " m"]) -> Float[Array, " m"]:
        """S v."""
        return self.columns * v - (inverse(self.rows) * (self.weights @ v)) @ self.weights


def inverse(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 / x, and 0 for 0."""
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)


@over_lanes
def _schur_root(needed, weights, row_excess, column_excess, pinned) -> Float[Array, "m m"]:
    """The inverse root of S + `pinned`; zeros, at no cost on CPU, where it is not needed."""

    def compute(weights, row_excess, column_excess, pinned):
        m = column_excess.size
        reciprocal = inverse(jnp.sum(weights, axis=1) + row_excess)
        gram = weights.T @ (reciprocal[:, None] * weights)
        off = jnp.where(jnp.eye(m, dtype=bool), 0, gram)
        diagonal = column_excess + (reciprocal * row_excess) @ weights + jnp.sum(off, axis=1)
        return factorise(pinned + jnp.diag(diagonal) - off).root

    nothing = lambda weights, *_: jnp.zeros((weights.shape[1],) * 2, weights.dtype)
    return jax.lax.cond(needed, compute, nothing, weights, row_excess, column_excess, pinned)


def damped_schur_solve(
    system: Bipartite, rhs: Float[Array, " m"], damping: Float[Array, " m"], needed: Bool[Array, ""]
) -> Float[Array, " m"]:
    """(S + diag(damping)) v = rhs. Lanes of a batch that do not need it get zeros, at little cost on CPU."""
    system = Bipartite(system.weights, system.row_excess, system.column_excess + damping)
    if rhs.size > _DENSE:
        # A right-hand side of zeros takes no step.
        return _conjugate_gradients(system, jnp.where(needed, rhs, 0))
    zeros = jnp.zeros((rhs.size, rhs.size), rhs.dtype)
    root = _schur_root(needed, system.weights, system.row_excess, system.column_excess, zeros)
    return InverseRoot(root).solve(rhs)


# Components


class Components(eqx.Module):
    """The component of every row and column that has one: an index below `count`, which stands for none."""

    rows: Int[Array, " n"]
    columns: Int[Array, " m"]
    count: int = eqx.field(static=True)

    @property
    def flipped(self) -> "Components":
        return Components(self.columns, self.rows, self.count)

    def sums(self, p: Float[Array, " n"], q: Float[Array, " m"]) -> Float[Array, " count"]:
        """For each component, the sum of its entries of p and q."""
        total = jax.ops.segment_sum(p, self.rows, self.count + 1) + jax.ops.segment_sum(q, self.columns, self.count + 1)
        return total[:-1]

    def spread(self, values: Float[Array, " count"]) -> tuple[Float[Array, " n"], Float[Array, " m"]]:
        """The value of its component at every row and column; 0 at those without."""
        values = jnp.append(values, 0)
        return values[self.rows], values[self.columns]


def components(edges: Bool[Array, "n m"], rows: Bool[Array, " n"], columns: Bool[Array, " m"]) -> Components:
    """Of the graph of the rows and columns that take part. One that does not gets the component of its first neighbour that does.

    A row without a neighbour has none; a column that takes part is one by itself then.
    """
    m = columns.size
    to_rows, to_columns = edges & columns[None, :], edges & rows[:, None]

    def of_rows(labels):
        return jnp.min(jnp.where(to_rows, labels[None, :], m), axis=1)

    def of_columns(labels):
        return jnp.min(jnp.where(to_columns, labels[:, None], m), axis=0)

    def body(carry):
        labels, _ = carry
        new = jnp.where(columns, jnp.minimum(labels, of_columns(of_rows(labels))), m)
        return new, jnp.any(new != labels)

    # Usually there is one component, because every pair is an edge.
    complete = jnp.all(edges | ~rows[:, None] | ~columns[None, :]) & jnp.any(rows)
    alone = jnp.where(complete, jnp.argmax(columns).astype(jnp.int32), jnp.arange(m, dtype=jnp.int32))
    start = (jnp.where(columns, alone, m), ~complete)
    labels, _ = jax.lax.while_loop(lambda carry: carry[1], body, start)
    by_row = of_rows(labels)
    return Components(by_row, jnp.where(columns, labels, of_columns(by_row)), m)


# Factors


class BipartiteFactor(eqx.Module):
    """(B), factorised once, for systems with no more columns than rows.

    With `groups` the system has a null vector for each component: v is then pinned to sum_j c_j v_j = 0, and what of the data no solution
    can match is taken from `q`, in proportion to c.
    """

    system: Bipartite
    groups: Components | None
    root: InverseRoot | None

    def solve(self, p: Float[Array, " n"], q: Float[Array, " m"]) -> tuple[Float[Array, " n"], Float[Array, " m"]]:
        weights, reciprocal = self.system.weights, inverse(self.system.rows)
        rhs = self._balanced(q - (reciprocal * p) @ weights)
        if self.root is None:
            v = self._pin(_conjugate_gradients(self.system, rhs))
        else:
            v = self.root.solve(rhs)
            for _ in range(_REFINEMENTS):
                v = self._pin(v + self.root.solve(self._balanced(rhs - self.system.schur(v))))
        return reciprocal * (p - weights @ v), v

    def _balanced(self, rhs):
        return rhs if self.groups is None else rhs - self.system.columns * self._mean(rhs)

    def _pin(self, v):
        return v if self.groups is None else v - self._mean(self.system.columns * v)

    def _mean(self, x):
        """The sum over the component of each column, by its weight."""
        assert self.groups is not None
        nothing = jnp.zeros(self.groups.rows.size, x.dtype)
        sums = self.groups.sums(nothing, x) * inverse(self.groups.sums(nothing, self.system.columns))
        return self.groups.spread(sums)[1]


def bipartite_factor(
    system: Bipartite, groups: Components | None, needed: bool | Bool[Array, ""] = True, shift: float = 0.0
) -> BipartiteFactor:
    """As it says; lanes of a batch that do not need it cost little on CPU, and get zeros.

    The factor is that of S + `shift` diag(c), so that refinement leaves out of the solution what belongs to eigenvalues far below `shift`.
    """
    n, m = system.weights.shape
    assert m <= n
    if m > _DENSE:
        return BipartiteFactor(system, groups, None)
    c = system.columns
    pinned = jnp.zeros((m, m), c.dtype)
    if groups is not None:
        labels = groups.columns
        _, total = groups.spread(groups.sums(jnp.zeros(n, c.dtype), c))
        pinned = jnp.where(labels[:, None] == labels[None, :], c[:, None] * c[None, :] * inverse(total)[None, :], 0)
    excess = system.column_excess if shift == 0 else system.column_excess + shift * c
    root = _schur_root(jnp.asarray(needed), system.weights, system.row_excess, excess, pinned)
    return BipartiteFactor(system, groups, InverseRoot(root))


def _conjugate_gradients(system: Bipartite, rhs: Float[Array, " m"]) -> Float[Array, " m"]:
    """S v = rhs, preconditioned by diag(c). A semidefinite system that is consistent is no trouble."""
    rows, columns = inverse(system.rows), system.columns
    scale = inverse(columns)
    matrix = lambda v: columns * v - (rows * (system.weights @ v)) @ system.weights
    tol = float(jnp.finfo(rhs.dtype).eps) ** 0.8

    def body(carry):
        v, r, d, size, steps = carry
        product = matrix(d)
        curvature = d @ product
        alpha = jnp.where(curvature > 0, size / jnp.where(curvature > 0, curvature, 1), 0)
        v, r = v + alpha * d, r - alpha * product
        z = scale * r
        new = r @ z
        return v, r, z + new / jnp.where(size > 0, size, 1) * d, new, steps + 1

    z = scale * rhs
    start = rhs @ z
    go_on = lambda carry: (carry[3] > tol**2 * start) & (carry[4] < 2 * rhs.size)
    return jax.lax.while_loop(go_on, body, (jnp.zeros_like(rhs), rhs, z, start, jnp.zeros((), jnp.int32)))[0]
