"""Hyperplanes, half-spaces, affine sets and polyhedra."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._core.adjoint import lax_loop
from ..._core.implicit import detach
from ..._core.precision import full_precision
from ..._core.tolerances import tolerances
from ..._linear.lanes import over_lanes
from ..._linear.norms import largest, maximum
from ..._linear.scaling import power_of_two
from ..programs.quadratic_program import QuadraticProgram, QuadraticProgramData
from .balls import at_most
from .sets import AbstractOneMultiplierSet, AbstractSet, ProjectionPoint, as_run, found, like, parameter, status


class Hyperplane(AbstractOneMultiplierSet):
    r"""The hyperplane $\{a^\top y = b\}$.

    **Conditions.** $y = x - \tau a$ (K1), $a^\top y = b$ (K2), with a and b scaled by a power of two such that the entries of a are about 1.

    **Arguments:** `normal` a, a vector; `offset` b, a number or a scalar array. a = 0 with b != 0 is `infeasible`. Smooth where a != 0.
    """

    normal: Float[Array, " n"]
    offset: float | Float[Array, ""]

    def __init__(self, normal: Any, offset: Any):
        self.normal, self.offset = parameter(normal, "normal", (1,)), parameter(offset, "offset")

    def check_size(self, shape):
        _check_normal(self.normal, shape)

    def kernel(self, x, mask, max_steps):
        del mask, max_steps
        a, b = _scaled(self, x)
        square = a @ a
        tau = (a @ x - b) / jnp.where(square > 0, square, 1)
        # Not finite if an entry of x, a or b is not.
        finite = jnp.isfinite(tau)
        return found(
            x - tau * a,
            jnp.where(square > 0, tau, 0),
            status(finite=finite, feasible=(square > 0) | (b == 0)),
        )

    def entries(self, x, tau, y, mask):
        del y, mask
        return x - tau * _scaled(self, x)[0]

    def balance(self, y, tau, x, mask):
        del tau, mask
        a, b = _scaled(self, x)
        return a @ y - b

    def kink_distance(self, y, x):
        return jnp.full_like(y.multiplier, jnp.inf)


class HalfSpace(AbstractOneMultiplierSet):
    r"""The half-space $\{a^\top y \le b\}$.

    **Conditions.** $y = x - \tau a$ (K1), $\min(\tau, b - a^\top y) = 0$ (K2), with a and b scaled as in `Hyperplane`.

    **Arguments:** `normal` a, a vector; `offset` b, a number or a scalar array. a = 0 with b < 0 is `infeasible`. Inside, the boundary
    included, the derivative is the identity.
    """

    normal: Float[Array, " n"]
    offset: float | Float[Array, ""]

    def __init__(self, normal: Any, offset: Any):
        self.normal, self.offset = parameter(normal, "normal", (1,)), parameter(offset, "offset")

    def check_size(self, shape):
        _check_normal(self.normal, shape)

    def kernel(self, x, mask, max_steps):
        del mask, max_steps
        a, b = _scaled(self, x)
        square = a @ a
        excess = (a @ x - b) / jnp.where(square > 0, square, 1)
        tau = jnp.where(square > 0, jnp.maximum(excess, 0), 0)
        return found(x - tau * a, tau, status(finite=jnp.isfinite(excess), feasible=(square > 0) | (b >= 0)))

    def entries(self, x, tau, y, mask):
        del y, mask
        return x - tau * _scaled(self, x)[0]

    def balance(self, y, tau, x, mask):
        del mask
        a, b = _scaled(self, x)
        return at_most(tau, b - a @ y)

    def kink_distance(self, y, x):
        a, b = _scaled(self, x.x)
        return jnp.abs(a @ x.x - b) / jnp.sqrt(a @ a)


def _check_normal(normal, shape):
    if normal.shape != shape:
        raise ValueError(f"normal must have one entry for each of the {shape[0]} projected, got shape {normal.shape}.")


def _scaled(onto: Hyperplane | HalfSpace, x):
    scale = power_of_two(detach(jnp.max(jnp.abs(onto.normal)))).astype(x.dtype)
    return scale * like(onto.normal, x), scale * like(onto.offset, x)


class AffineSet(AbstractSet):
    r"""The affine set $\{Ay = b\}$.

    **Conditions.** $x - y - A^\top\nu = 0$ (K1), $b - Ay - (I - AA^+)\nu = 0$ (K2): where rows depend on one another the multipliers are
    those of least norm. With the rows of A and b scaled by powers of two.
    **Solver.** $y = x - A^+(Ax - b)$, the pseudo-inverse by the singular value decomposition.
    **Gradient.** Of the pseudo-inverse, at constant rank (Golub & Pereyra 1973, Eq. 4.12); any order.

    **Arguments:** `A`: `(p, n)`; `b`: `(p,)`. Dependent rows are fine; if they contradict one another, `infeasible`.
    """

    A: Float[Array, "p n"]
    b: Float[Array, " p"]

    def __init__(self, A: Any, b: Any):
        self.A, self.b = parameter(A, "A", (2,)), parameter(b, "b", (1,))
        if self.A.shape[:1] != self.b.shape:
            raise ValueError(f"b must have one entry for each row of A, {self.A.shape[0]}, got shape {self.b.shape}.")

    def check_size(self, shape):
        _check_columns("A", self.A, shape)

    def _rows(self, x):
        scale = power_of_two(detach(jnp.max(jnp.abs(self.A), axis=1, initial=0))).astype(x.dtype)
        return scale[:, None] * like(self.A, x), scale * like(self.b, x)

    def run(self, x, max_steps):
        del max_steps
        A, b = self._rows(x.x)
        inverse = _pseudo_inverse(A)
        y = x.x - inverse @ (A @ x.x - b)
        y = y - inverse @ (A @ y - b)
        multiplier = inverse.T @ (x.x - y)
        size = jnp.max(jnp.abs(A), initial=0) * largest(y) + maximum(jnp.abs(b))
        feasible = largest(A @ y - b) <= 10 * tolerances(x.x.dtype).solver * size
        finite = jnp.isfinite(jnp.sum(jnp.abs(x.x)) + jnp.sum(jnp.abs(A)) + jnp.sum(jnp.abs(b)))
        code = status(finite=finite, feasible=feasible)
        gate = jnp.where(code == 0, jnp.ones((), x.x.dtype), jnp.nan)
        return as_run(ProjectionPoint(gate * y, gate * multiplier), code)

    def optimality(self, y, x):
        A, b = self._rows(x.x)
        outside = y.multiplier - A @ (_pseudo_inverse(A) @ y.multiplier)
        return ProjectionPoint(x.x - y.point - y.multiplier @ A, b - A @ y.point - outside)

    def kink_distance(self, y, x):
        return jnp.full((), jnp.inf, x.x.dtype)


@jax.custom_jvp
def _pseudo_inverse(A: Float[Array, "p n"]) -> Float[Array, "n p"]:
    return _svd_inverse(A)


@over_lanes
def _svd_inverse(A):
    # LAPACK may not return from NaN.
    u, s, vt = jnp.linalg.svd(jnp.where(jnp.all(jnp.isfinite(A)), A, 0), full_matrices=False)
    cutoff = 4 * max(A.shape) * float(jnp.finfo(A.dtype).eps) * jnp.max(s, initial=0)
    kept = s > cutoff
    return (vt.T * jnp.where(kept, 1 / jnp.where(kept, s, 1), 0)[None, :]) @ u.T


@_pseudo_inverse.defjvp
@full_precision()
def _(primals, tangents):
    (A,), (dA,) = primals, tangents
    P = _pseudo_inverse(A)
    unreached = dA - A @ (P @ dA)  # the part of dA outside of the range of A; zero where the rows are independent
    turned = dA.T @ (P.T @ P)
    return P, P @ (P.T @ unreached.T) - P @ (dA @ P) + turned - P @ (A @ turned)


def _check_columns(name: str, matrix, shape) -> None:
    if matrix.shape[1:] != shape:
        raise ValueError(f"{name} must have one column for each of the {shape[0]} projected, got shape {matrix.shape}.")


class Polyhedron(AbstractSet):
    r"""The polyhedron $\{Ay = b,\ Gy \le h\}$, by `QuadraticProgram` with Q = I and q = -x: its conditions, kinks and failures.

    **Arguments:** `A` `(p, n)` and `b` `(p,)`, `G` `(m, n)` and `h` `(m,)`; either pair may be None. An infinite `h` is no constraint.
    """

    A: Float[Array, "p n"] | None
    b: Float[Array, " p"] | None
    G: Float[Array, "m n"] | None
    h: Float[Array, " m"] | None

    closed_form: ClassVar[bool] = False

    def __init__(
        self,
        A: Any = None,
        b: Any = None,
        G: Any = None,
        h: Any = None,
    ):
        blocks: list[Any] = []
        for (matrix, vector), (names) in (((A, b), ("A", "b")), ((G, h), ("G", "h"))):
            if (matrix is None) != (vector is None):
                raise ValueError(f"{names[0]} and {names[1]} come together; one is missing.")
            if matrix is None:
                blocks += [None, None]
                continue
            matrix, vector = parameter(matrix, names[0], (2,)), parameter(vector, names[1], (1,))
            if matrix.shape[:1] != vector.shape:
                raise ValueError(
                    f"{names[1]} must have one entry for each row of {names[0]}, {matrix.shape[0]}, got {vector.shape}."
                )
            blocks += [matrix, vector]
        self.A, self.b, self.G, self.h = blocks

    def check_size(self, shape):
        for name in ("A", "G"):
            if getattr(self, name) is not None:
                _check_columns(name, getattr(self, name), shape)

    def _program(self, x: Float[Array, " n"]) -> QuadraticProgramData:
        cast = lambda block: None if block is None else like(block, x)
        return QuadraticProgramData(jnp.ones_like(x), -x, cast(self.A), cast(self.b), cast(self.G), cast(self.h))

    def run(self, x, max_steps):
        node = QuadraticProgram(throw=False, max_steps=min(max_steps, 100))
        return node.run(self._program(x.x), None, lax_loop)

    def optimality(self, y, x):
        return QuadraticProgram().optimality(y, self._program(x.x))

    def linear_system(self, y, x, factor):
        return QuadraticProgram().linear_system(y, self._program(x.x), factor)

    def kink_distance(self, y, x):  # pyright: ignore[reportIncompatibleMethodOverride]
        return QuadraticProgram().kink_distance(y, self._program(x.x))

    def point(self, y):
        return y.primal

    def dual(self, y):
        return y.equality, y.inequality
