r"""OptNet: a quadratic program whose constraints are learnt, and which is feasible whatever is learnt.

$$ z^*(q) = \arg\min_z \tfrac12 z^\top Q z + q^\top z \quad\text{subject to}\quad Az = Az_0,\; Gz \le Gz_0 + s_0,\; z \ge 0 \text{ (optional)} $$

with $Q = LL^\top + \epsilon I$ and $s_0 > 0$: $z_0$ satisfies all constraints for every value of the parameters $L, A, G, z_0, s_0$, and the
objective is strictly convex, so there is always exactly one solution.

Reference: Amos & Kolter 2017, arXiv:1703.00443, Section 3.3 and the authors' experiments (whose Sudoku layer has
$Q = 0.1 I$, no G, $z \ge 0$). Difference: $s_0$ and, with $z \ge 0$, $z_0$ are kept positive by a softplus.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .quadratic_program import QuadraticProgram


class OptNet(eqx.Module):
    """A layer from linear costs q (n,) to the solution z (n,) of a learnt quadratic program. `jax.vmap` for batches.

    **Arguments:**

    - `n`, `num_eq`, `num_ineq`: variables, equations (fewer than n) and inequalities.
    - `key`: for the initial A, G and L, normal with unit rows in the mean.
    - `nonnegative`: constrains z >= 0 as well (bounds, which cost less than rows of G).
    - `quadratic`: learns L. False: Q = `curvature` times the identity.
    - `curvature`: the $\\epsilon$ of Q.
    - `program`: the `QuadraticProgram` that solves it; its policy, gradient and adjoint.
    - `dtype`: of the parameters; default the default float type.
    """

    A: Float[Array, "p n"] | None
    G: Float[Array, "m n"] | None
    L: Float[Array, "n n"] | None
    point: Float[Array, " n"]
    margin: Float[Array, " m"] | None
    program: QuadraticProgram
    curvature: float = eqx.field(static=True)
    nonnegative: bool = eqx.field(static=True)

    def __init__(
        self,
        n: int,
        num_eq: int,
        num_ineq: int,
        *,
        key: PRNGKeyArray,
        nonnegative: bool = False,
        quadratic: bool = True,
        curvature: float = 1e-2,
        program: QuadraticProgram | None = None,
        dtype=None,
    ):
        if n < 1 or num_ineq < 0 or not 0 <= num_eq < n:
            raise ValueError(f"expected n >= 1, 0 <= num_eq < n and num_ineq >= 0, got {n}, {num_eq} and {num_ineq}.")
        if not curvature > 0:
            raise ValueError(f"curvature must be positive, got {curvature!r}.")
        dtype = jnp.result_type(float) if dtype is None else dtype
        keys = jr.split(key, 3)
        draw = lambda key, rows: jr.normal(key, (rows, n), dtype) / jnp.sqrt(jnp.asarray(n, dtype))
        self.A = draw(keys[0], num_eq) if num_eq else None
        self.G = draw(keys[1], num_ineq) if num_ineq else None
        self.L = draw(keys[2], n) if quadratic else None
        self.point = jnp.zeros(n, dtype)
        self.margin = jnp.zeros(num_ineq, dtype) if num_ineq else None
        self.program = QuadraticProgram() if program is None else program
        self.curvature = curvature
        self.nonnegative = nonnegative

    @property
    def inside(self) -> Float[Array, " n"]:
        """z0, the point that satisfies all constraints."""
        return jax.nn.softplus(self.point) if self.nonnegative else self.point

    def __call__(self, q: Float[Array, " n"]) -> Float[Array, " n"]:
        n, dtype = self.point.size, self.point.dtype
        curvature = jnp.full(n, self.curvature, dtype)
        Q = curvature if self.L is None else self.L @ self.L.T + jnp.diag(curvature)
        blocks = {}
        if self.A is not None:
            blocks |= {"A": self.A, "b": self.A @ self.inside}
        if self.G is not None and self.margin is not None:
            blocks |= {"G": self.G, "h": self.G @ self.inside + jax.nn.softplus(self.margin)}
        if self.nonnegative:
            blocks["lower"] = jnp.zeros(n, dtype)
        return self.program(Q, q.astype(dtype), **blocks)
