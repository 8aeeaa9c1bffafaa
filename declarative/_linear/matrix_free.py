r"""The linearised optimality conditions of a quadratic program whose blocks are operators: products only, no factor.

The system is (J) of `kkt.py`, with equations as rows that are always active. What is not active, and what an active bound fixes, is
read off; the rest is symmetric and indefinite,

$$ \begin{bmatrix} Q & K^\top \\ K & -\beta \end{bmatrix} \tag{S} $$

over free variables and active rows, and solved by the minimum residual method (Paige & Saunders 1975), restarted as iterative
refinement. Where active rows depend on one another it converges to the multipliers of least norm (in the scaling used).

Norms of rows and columns, for scaling and for the preconditioner, come from products with random vectors: $\mathbb{E}(Ks)_i^2 = \|K_i\|^2$ for
standard normal $s$.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Float

from .kkt import AbstractKKT, refine
from .scaling import power_of_two

_PROBES = 8
_SWEEPS = 20
_STEPS = 2000
_EQUILIBRATIONS = 3


def probes(count: int, size: int, dtype) -> Float[Array, "count size"]:
    """Fixed normal numbers, the same for every lane and every call. (Random signs would cancel on rows such as z_i - z_j.)"""
    return jnp.asarray(np.random.default_rng(size).standard_normal((count, size)), dtype)


def row_norms(apply: Callable, size: int, dtype) -> Float[Array, " rows"]:
    """The Euclidean norms of the rows of a linear map, to about a factor of two."""
    images = jax.vmap(apply)(probes(_PROBES, size, dtype))
    return jnp.sqrt(jnp.mean(images**2, axis=0))


class Blocks(eqx.Module):
    """Q and K = [A; G; I], each with its scales: unknowns z = d z', rows times e, objective times c."""

    Q: lx.AbstractLinearOperator
    A: lx.AbstractLinearOperator | None
    G: lx.AbstractLinearOperator | None
    bounded: bool = eqx.field(static=True)
    d: Float[Array, " n"]
    e: Float[Array, " rows"]
    c: Float[Array, ""]

    def hessian(self, z):
        z = self.d * z
        product = self.Q.mv(z)
        if not lx.is_symmetric(self.Q):
            product = (product + self.Q.transpose().mv(z)) / 2
        return self.c * self.d * product

    def rows(self, z):
        z = self.d * z
        parts = [block.mv(z) for block in (self.A, self.G) if block is not None]
        return self.e * jnp.concatenate([*parts, *([z] if self.bounded else []), jnp.zeros(0, z.dtype)])

    def transpose(self, y):
        y, at = self.e * y, 0
        total = jnp.zeros_like(self.d)
        for block in (self.A, self.G):
            if block is not None:
                size = block.out_size()
                total = total + block.transpose().mv(y[at : at + size])
                at += size
        if self.bounded:
            total = total + y[at:]
        return self.d * total

    def row_scale(self):
        return jnp.concatenate([self.c * self.d, self.e])

    def column_scale(self):
        return jnp.concatenate([self.d, self.e / self.c])


def scaled_blocks(Q, A, G, bounded: bool, dtype) -> Blocks:
    """Scales by powers of two after which rows and columns have norms of about 1, as far as random vectors can tell."""
    n = Q.in_size()
    sizes = [block.out_size() for block in (A, G) if block is not None]
    general = sum(sizes)
    one = jnp.ones((), dtype)
    blocks = Blocks(Q, A, G, bounded, jnp.ones(n, dtype), jnp.ones(general + n * bounded, dtype), one)
    for _ in range(_EQUILIBRATIONS):
        blocks = _equilibrated(blocks, general)
    c = power_of_two(jnp.max(row_norms(blocks.hessian, n, dtype)))
    return eqx.tree_at(lambda b: b.c, blocks, blocks.c * c)


def _equilibrated(blocks: Blocks, general: int) -> Blocks:
    n, dtype = blocks.d.size, blocks.d.dtype
    e = blocks.e * power_of_two(row_norms(blocks.rows, n, dtype))
    blocks = eqx.tree_at(lambda b: b.e, blocks, e)
    from_Q = row_norms(blocks.hessian, n, dtype)
    c = power_of_two(jnp.max(from_Q))
    columns = jnp.sqrt(c * from_Q)
    if general:
        columns = jnp.maximum(columns, row_norms(lambda s: blocks.transpose(s.at[general:].set(0)), e.size, dtype))
    d = blocks.d * power_of_two(columns)
    # Bounds are rows of the identity before and after.
    e = e.at[general:].set(1 / d) if blocks.bounded else e
    return eqx.tree_at(lambda b: (b.d, b.e, b.c), blocks, (d, e, blocks.c * c))


class Penalised(eqx.Module):
    """H = Q + sigma + K' diag(weights) K, and the inverse of about its diagonal."""

    blocks: Blocks
    weights: Float[Array, " rows"]
    sigma: Float[Array, ""] | float
    inverse_diagonal: Float[Array, " n"]

    def mv(self, z):
        blocks = self.blocks
        return blocks.hessian(z) + self.sigma * z + blocks.transpose(self.weights * blocks.rows(z))

    def solve(self, b, x0, rtol: float, atol: Any):
        """Conjugate gradients from x0 until the residual is below rtol |b| or atol."""
        precondition = lambda r: self.inverse_diagonal * r
        with jax.numpy_dtype_promotion("standard"):
            x, _ = jax.scipy.sparse.linalg.cg(self.mv, b, x0=x0, tol=rtol, atol=atol, maxiter=_STEPS, M=precondition)
        return x


def penalised(blocks: Blocks, weights, sigma) -> Penalised:
    n, dtype = blocks.d.size, blocks.d.dtype
    general = weights.size - n if blocks.bounded else weights.size
    diagonal = row_norms(blocks.hessian, n, dtype) + sigma
    if general:
        root = jnp.sqrt(weights).at[general:].set(0)
        diagonal = diagonal + row_norms(lambda s: blocks.transpose(root * s), root.size, dtype) ** 2
    if blocks.bounded:
        # Rows of the identity, d and e taking each other back.
        diagonal = diagonal + weights[general:]
    return Penalised(blocks, weights, sigma, 1 / jnp.where(diagonal > 0, diagonal, 1))


class MatrixFreeKKT(AbstractKKT):
    """(J) of `kkt.py` by products. `alpha` and `beta` run over equations (1 and 0), inequalities and bounds; all scaled.

    `curvature` is about the diagonal of Q and of the active rows' squares, `stiffness` that of K curvature^-1 K'.
    """

    blocks: Blocks
    alpha: Float[Array, " rows"]
    beta: Float[Array, " rows"]
    row_scale: Float[Array, " size"]
    column_scale: Float[Array, " size"]
    curvature: Float[Array, " n"]
    stiffness: Float[Array, " general"]

    def with_operators(self, Q, A, G) -> "MatrixFreeKKT":
        """The same system over these operators; with None for each, what can leave a compiled function."""
        where = lambda kkt: [kkt.blocks.Q, kkt.blocks.A, kkt.blocks.G]
        return eqx.tree_at(where, self, [Q, A, G], is_leaf=lambda leaf: leaf is None)

    def multiply(self, vector: Float[Array, " size"], transposed: bool = False) -> Float[Array, " size"]:
        into, out_of = self.column_scale, self.row_scale
        if transposed:
            into, out_of = out_of, into
        return self._multiply(vector / into, transposed) / out_of

    def _multiply(self, vector, transposed):
        blocks, n = self.blocks, self.blocks.d.size
        z, y = vector[:n], vector[n:]
        rows = blocks.rows(z)
        first = blocks.hessian(z) + blocks.transpose(self.alpha * y if transposed else y)
        return jnp.concatenate([first, (rows if transposed else self.alpha * rows) - self.beta * y])

    def solve(self, vector, loop: Callable, transposed: bool = False, floor: float | Array = 0.0):
        into, out_of = self.row_scale, self.column_scale
        if transposed:
            into, out_of = out_of, into
        b = into * vector
        precondition = lambda r: self._approximate(r, loop, transposed)
        x, _, _ = refine(b, lambda x: self._multiply(x, transposed), precondition, loop, floor, _SWEEPS)
        return out_of * jnp.where(jnp.all(jnp.isfinite(b)), x, jnp.nan)

    def _approximate(self, r, loop, transposed):
        """One run of the minimum residual method on (S), and what can be read off."""
        blocks, n, general = self.blocks, self.blocks.d.size, self.stiffness.size
        first, third = r[:n], r[n:]
        active = self.alpha > 0
        beta = jnp.where(active, self.beta / jnp.where(active, self.alpha, 1), 1)
        divided = jnp.where(active & (not transposed), third / jnp.where(active, self.alpha, 1), third)
        # Multipliers of what is not active: -beta y = r, or z - beta y = r in the transpose, where they push nothing.
        idle = jnp.where(active, 0, -third / jnp.where(active, 1, self.beta))
        fixed = active[general:] if blocks.bounded else jnp.zeros(n, bool)
        z0 = jnp.where(fixed, divided[general:], 0) if blocks.bounded else jnp.zeros_like(first)
        known = blocks.hessian(z0) + (0 if transposed else blocks.transpose(idle))
        working = active.at[general:].set(False)
        rhs_z = jnp.where(fixed, 0, first - known)
        rhs_y = jnp.where(working, divided - blocks.rows(z0), 0)[:general]
        pad = lambda y: jnp.concatenate([y, jnp.zeros(self.alpha.size - general, y.dtype)])

        def multiply(x):
            z, y = jnp.where(fixed, 0, x[:n]), jnp.where(working[:general], x[n:], 0)
            top = jnp.where(fixed, x[:n], blocks.hessian(z) + blocks.transpose(pad(y)))
            bottom = jnp.where(working[:general], blocks.rows(z)[:general] - beta[:general] * y, x[n:])
            return jnp.concatenate([top, bottom])

        diagonal = jnp.concatenate(
            [jnp.where(fixed, 1, self.curvature), jnp.where(working[:general], self.stiffness, 1)]
        )
        x = minimum_residual(multiply, jnp.concatenate([rhs_z, rhs_y]), 1 / diagonal, loop, rtol=1e-3)
        z, y = z0 + x[:n], pad(x[n:])
        if blocks.bounded:
            push = y if transposed else y + idle
            reaction = first - blocks.hessian(z) - blocks.transpose(push.at[general:].set(0))
            # Scaled rows of the identity: d and e take each other back.
            y = y.at[general:].set(jnp.where(fixed, reaction, 0))
        if transposed:
            # y is alpha times the unknown so far.
            idle = (blocks.rows(z) - third) / jnp.where(active, 1, self.beta)
            y = y / jnp.where(active, self.alpha, 1)
        return jnp.concatenate([z, jnp.where(active, y, idle)])


def minimum_residual(multiply: Callable, b: Float[Array, " n"], inverse_diagonal, loop: Callable, rtol: float):
    """MINRES with a diagonal preconditioner: x with |b - multiply(x)| <= rtol |b| in its norm, for a symmetric `multiply`."""
    zero = jnp.zeros((), b.dtype)

    def divide(a, b):
        return jnp.where(b != 0, a / jnp.where(b != 0, b, 1), 0)

    start_z = inverse_diagonal * b
    beta = jnp.sqrt(jnp.maximum(b @ start_z, 0))

    class State(eqx.Module):
        x: Array
        before: Array  # two Lanczos vectors, not normalised
        now: Array
        now_z: Array
        beta: Array
        beta_before: Array
        direction: Array
        direction_before: Array
        cosine: Array
        sine: Array
        epsilon: Array
        delta: Array
        error: Array

    def body(s: State):
        v = divide(s.now_z, s.beta)
        Av = multiply(v)
        alpha = v @ Av
        # Three-term recurrence for the next Lanczos vector.
        new = Av - divide(alpha, s.beta) * s.now - divide(s.beta, s.beta_before) * s.before
        new_z = inverse_diagonal * new
        new_beta = jnp.sqrt(jnp.maximum(new @ new_z, 0))
        # The last rotation, applied to the new column; then a new one.
        delta = s.cosine * s.delta + s.sine * alpha
        gamma_bar = s.sine * s.delta - s.cosine * alpha
        epsilon, next_delta = s.sine * new_beta, -s.cosine * new_beta
        gamma = jnp.sqrt(gamma_bar**2 + new_beta**2)
        cosine, sine = divide(gamma_bar, gamma), divide(new_beta, gamma)
        length, error = cosine * s.error, sine * s.error
        direction = divide(v - s.epsilon * s.direction_before - delta * s.direction, gamma)
        x = s.x + length * direction
        return State(
            x, s.now, new, new_z, new_beta, s.beta, direction, s.direction, cosine, sine, epsilon, next_delta, error
        )

    zeros = jnp.zeros_like(b)
    one = jnp.ones((), b.dtype)
    state = State(zeros, zeros, b, start_z, beta, zero, zeros, zeros, -one, zero, zero, zero, beta)
    going = lambda s: (jnp.abs(s.error) > rtol * beta) & (s.beta > 0) & jnp.isfinite(s.error)
    return loop(going, body, state, max_steps=_STEPS).x


def matrix_free_kkt(blocks: Blocks, alpha, beta) -> MatrixFreeKKT:
    """`alpha`, `beta` in natural units (rows of A included)."""
    row_scale, column_scale, n, dtype = blocks.row_scale(), blocks.column_scale(), blocks.d.size, blocks.d.dtype
    beta = beta * row_scale[n:] * column_scale[n:]
    general = alpha.size - n if blocks.bounded else alpha.size
    working = (alpha > 0).at[general:].set(False)
    from_Q = row_norms(blocks.hessian, n, dtype)
    from_rows = row_norms(lambda s: blocks.transpose(jnp.where(working, s, 0)), alpha.size, dtype) if general else 0
    curvature = from_Q + from_rows**2
    curvature = jnp.where(curvature > 0, curvature, 1)
    root = jax.lax.rsqrt(curvature)
    stiffness = row_norms(lambda s: blocks.rows(root * s), n, dtype)[:general] ** 2
    stiffness = stiffness + jnp.where(alpha > 0, beta / jnp.where(alpha > 0, alpha, 1), 0)[:general]
    stiffness = jnp.where(stiffness > 0, stiffness, 1)
    return MatrixFreeKKT(
        blocks=blocks,
        alpha=alpha,
        beta=beta,
        row_scale=row_scale,
        column_scale=column_scale,
        curvature=curvature,
        stiffness=stiffness,
    )
