"""Weighted linear least squares, by orthogonal factorisation, forward and backward."""

from functools import partial
from typing import ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from ..._core.arguments import flag, number
from ..._core.implicit import Run
from ..._core.node import AbstractDeclarativeNode, Policy, envelope, evaluate, make_policy
from ..._core.precision import full_precision
from ..._core.results import RESULTS, choose
from ..._linear.known_inverse import known_inverse
from ..._linear.lanes import over_lanes
from ..._linear.norms import largest
from ..._linear.scaling import power_of_two


class LeastSquaresData(eqx.Module):
    """One linear system: A (m, n), b (m,) or (m, k), and weights (m,), all at least 0; None weighs all equations alike."""

    A: Float[Array, "..."]
    b: Float[Array, "..."]
    weights: Float[Array, "..."] | None = None


class LeastSquaresPoint(eqx.Module):
    """The unknown of (K1)-(K2): y, and the residual in the units of y."""

    solution: Float[Array, "..."]
    residual: Float[Array, "..."]


class WeightedLeastSquares(AbstractDeclarativeNode):
    r"""The weighted (ridge) least-squares solution of $Ay \approx b$, for one or several right-hand sides.

    **Problem.**     $y^* = \arg\min_y \tfrac12\sum_i w_i (a_i^\top y - b_i)^2 + \tfrac\rho2\|y\|^2$                                        (P)
    **Optimality.**  $b - Ay - r = 0$ (K1),  $A^\top W r - \rho y = 0$ (K2): the augmented system, in which $A^\top WA$ does not appear.
    **Solver.**      QR of $[W^{1/2}A; \rho^{1/2}I] = QR$, columns scaled; one step of refinement. With `minimum_norm` the SVD of $W^{1/2}A$.
    **Gradient.**    With $G = R^{-1}Q^\top W^{1/2}$, $H = R^{-1}R^{-\top}$ (so $H = (A^\top WA + \rho I)^{-1}$ and $G = HA^\top W$)
                     $$ dy = G(db - dA\,y) + H(dA^\top W r + A^\top dW\,r - d\rho\,y) + P_N (dA^\top W + A^\top dW) AHy, \tag{D} $$
                     $P_N = I - GA$, zero for full rank (Golub & Pereyra 1973, Eq. 4.12). No factor that squares the condition number
                     unless the residual brings it in, as it must. All modes, any order. Where a weight is zero (D) is the
                     one-sided derivative, which is finite.
    **Use instead.** `SphereLeastSquares` for a solution of given length; `QuadraticProgram` for constraints.

    | symbol     | code        | shape              | meaning                                                       |
    |------------|-------------|--------------------|---------------------------------------------------------------|
    | $A, b$     | `A`, `b`    | `(m, n)`, `(m[, k])`| equations                                                     |
    | $w$        | `weights`   | `(m,)`             | at least 0; shared by the right-hand sides; W is their diagonal |
    | $\rho$     | `ridge`     | `()`               | at least 0; an array is learnable                             |

    **Arguments:** `ridge`. `minimum_norm`: where A has deficient rank, return the shortest solution, $(W^{1/2}A)^+ W^{1/2} b$ (singular
    values below `max(m, n) * eps` times the largest count as zero), with the derivative that it has while the rank stays what it is;
    needs `ridge=0`. `throw`, `on_failure`, `adjoint`: see `Policy` and `ImplicitAdjoint` (which solves (K1)-(K2) with the same factors).
    **Call:** `lsq(A, b, weights=None)`, or with one `LeastSquaresData`.
    **Returns:** `Float[Array, "n"]`, or `(n, k)`. `solve` also gives the minimum of (P) in `objective`, and $b - Ay$ in `dual`.
    **Raises:** `ValueError` for shapes that do not fit, and for m < n if neither `ridge` nor `minimum_norm` makes the solution unique;
    with `throw=True` a `SolveError` at run time: `not_unique` if the rank is deficient to working accuracy, `nonfinite_data` also for a
    negative weight or ridge.
    **Reference:** Björck 1996, *Numerical Methods for Least Squares Problems*, section 1.5 and Eq. (1.4.24); Golub & Pereyra 1973, *The
    differentiation of pseudo-inverses and nonlinear least squares problems whose variables separate*.
    """

    ridge: float | Float[Array, ""] | None  # None: absent, which is not the same as an array that happens to be zero
    minimum_norm: bool = eqx.field(static=True)
    adjoint: optx.AbstractAdjoint | None
    policy: Policy

    smoothness: ClassVar[str] = "infinitely differentiable while the rank does not change"
    closed_form: ClassVar[bool] = True

    def __init__(
        self,
        ridge: float | Float[Array, ""] = 0.0,
        *,
        minimum_norm: bool = False,
        adjoint: optx.AbstractAdjoint | None = None,
        policy: Policy | None = None,
        throw: bool | None = None,
        on_failure: Literal["nan", "zero"] | None = None,
        max_steps: int | None = None,
    ):
        ridge = number(ridge, "ridge", closed="low")
        if minimum_norm and not (isinstance(ridge, (int, float)) and ridge == 0):
            raise ValueError("minimum_norm is for ridge=0: with a ridge the solution is unique already.")
        self.ridge = None if isinstance(ridge, (int, float)) and ridge == 0 else ridge
        self.minimum_norm = flag(minimum_norm, "minimum_norm")
        self.adjoint = adjoint
        self.policy = make_policy(policy, throw=throw, on_failure=on_failure, max_steps=max_steps)

    def __call__(self, A, b=None, *, weights=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        return evaluate(self, self.pack(A, b, weights))

    def pack(self, A, b=None, weights=None):  # pyright: ignore[reportIncompatibleMethodOverride]  (the names of a call)
        return pack(A, b, weights)

    def check(self, x):
        check(x, "WeightedLeastSquares")
        m, n = x.A.shape
        if m < n and not self.minimum_norm and not self._ridged:
            raise ValueError(
                f"A is ({m}, {n}): fewer equations than unknowns have no unique least-squares solution. Pass minimum_norm=True, or a "
                "positive ridge."
            )

    # Problem and optimality

    def optimality(self, y: LeastSquaresPoint, x: LeastSquaresData) -> LeastSquaresPoint:
        A, b, w, ridge = self._blocks(x)
        a, c = _units(A, w, ridge)
        solution, r = _columns(y.solution), _columns(y.residual)
        first = (b - A @ solution) / a - r
        second = (A.T @ (w[:, None] * r)) * (a / c) - ridge * solution / c
        if self.minimum_norm:
            # The part in the null space of W^{1/2} A, which (K2) does not see, has to vanish.
            gain, _, _ = _inverses(True, False, A, w, ridge)
            second = second - (solution - gain @ (A @ solution))
        return LeastSquaresPoint(second.reshape(y.solution.shape), first.reshape(y.residual.shape))

    def objective(self, y, x):
        return envelope(_cost, y, (x, self._ridge(x)))

    def dual(self, y, x):
        A, _, w, ridge = self._blocks(x)
        return y.residual * _units(A, w, ridge)[0]

    # Solver

    def run(self, x, y0, loop):
        del y0, loop
        A, b, w, ridge = self._blocks(x)
        gain, inverse, regular = _inverses(self.minimum_norm, self._ridged, A, w, ridge)
        solution = _solution(self.minimum_norm, A, b, w, ridge, gain, inverse)
        residual = (b - A @ solution) / _units(A, w, ridge)[0]
        point = LeastSquaresPoint(solution.reshape(x.A.shape[1:] + x.b.shape[1:]), residual.reshape(x.b.shape))
        outside = jnp.any(~(w >= 0)) | ~(ridge >= 0)
        finite = jnp.all(jnp.isfinite(A)) & jnp.all(jnp.isfinite(b)) & jnp.all(jnp.isfinite(w)) & jnp.isfinite(ridge)
        result = choose(regular > 0, RESULTS.successful, RESULTS.not_unique)
        result = choose(finite & ~outside, result, RESULTS.nonfinite_data)
        return Run(point, result, factor=(gain, inverse))

    def value(self, y, x):
        return y.solution

    # Structure of the gradient

    def linear_system(self, y, x, factor):
        A, _, w, ridge = self._blocks(x)
        a, c = _units(A, w, ridge)
        gain, inverse = factor
        shapes = y.solution.shape, y.residual.shape
        arrays = (A, w, gain, inverse, a, c)
        forward = jtu.Partial(partial(_eliminate, shapes, self.minimum_norm), *arrays)
        backward = jtu.Partial(partial(_eliminate_transposed, shapes, self.minimum_norm), *arrays)
        return known_inverse(ravel_pytree(y)[0], forward, backward)

    @property
    def _ridged(self) -> bool:
        return self.ridge is not None

    def _blocks(self, x: LeastSquaresData):
        return x.A, _columns(x.b), weights_of(x), self._ridge(x)

    def _ridge(self, x):
        return jnp.asarray(0.0 if self.ridge is None else self.ridge, x.A.dtype)


def _cost(y, bound):
    x, ridge = bound
    r = _columns(x.b - x.A @ y.solution)
    return (jnp.sum(weights_of(x)[:, None] * r**2) + ridge * jnp.sum(y.solution**2)) / 2


def pack(A, b, weights) -> LeastSquaresData:
    if isinstance(A, LeastSquaresData):
        if b is not None or weights is not None:
            raise ValueError("Pass either a LeastSquaresData or its blocks, not both.")
        return A
    if b is None:
        raise ValueError("b is missing: node(A, b, weights=None).")
    return LeastSquaresData(jnp.asarray(A), jnp.asarray(b), None if weights is None else jnp.asarray(weights))


def check(x, name: str, *, one_column: bool = False) -> None:
    if not isinstance(x, LeastSquaresData):
        raise ValueError(f"{name} takes A and b, or a `LeastSquaresData`; got {type(x).__name__}.")
    blocks = {"A": x.A, "b": x.b} | ({} if x.weights is None else {"weights": x.weights})
    listed = ", ".join(f"{key} {block.dtype}{list(block.shape)}" for key, block in blocks.items())
    if x.A.ndim != 2 or x.A.size == 0:
        raise ValueError(f"A must be a non-empty matrix, got {listed}; for a batch use jax.vmap.")
    m = x.A.shape[0]
    if x.b.ndim not in ((1,) if one_column else (1, 2)) or x.b.shape[0] != m:
        columns = "" if one_column else " or (m, k)"
        raise ValueError(f"b must be (m,){columns} with one entry for each of the {m} rows of A, got {listed}.")
    if x.weights is not None and x.weights.shape != (m,):
        raise ValueError(f"weights must have one entry for each of the {m} rows of A, got {listed}.")
    dtypes = {block.dtype for block in blocks.values()}
    if len(dtypes) > 1 or not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        raise ValueError(f"all blocks must have one floating dtype, got {listed}. Cast them with .astype.")


def weights_of(x: LeastSquaresData) -> Float[Array, " m"]:
    return jnp.ones(x.A.shape[0], x.A.dtype) if x.weights is None else x.weights


def _columns(array):
    return array.reshape(array.shape[0], -1)


def _units(A, w, ridge):
    """Powers of two: of A (what makes the residual as large as y), and of A'WA + ridge. They scale (K1)-(K2) and carry no gradient."""
    A, w, ridge = jax.lax.stop_gradient((A, w, ridge))
    a = largest(A)
    c = a * a * largest(w) + jnp.abs(ridge)
    return 1 / power_of_two(a), 1 / power_of_two(c)


# G and H


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _inverses(minimum_norm: bool, ridged: bool, A, w, ridge):
    """G (n, m), H (n, n), and whether the solution is unique, as 1 or 0."""
    if minimum_norm:
        return _by_svd(A, w)
    return over_lanes(partial(_by_qr, ridged))(A, w, ridge)


@_inverses.defjvp
@full_precision()
def _(minimum_norm: bool, ridged: bool, primals, tangents):
    A, w, ridge = primals
    dA, dw, dridge = tangents
    G, H, regular = _inverses(minimum_norm, ridged, A, w, ridge)
    # G = (A'WA + ridge I)^-1 A'W, with d(A'W) = dA'W + A'dW.
    pulled = dA.T * w[None, :] + A.T * dw[None, :]
    across = H @ pulled
    dG = across - (across @ A) @ G - G @ (dA @ G)
    dH = -(across @ A) @ H - G @ (dA @ H)
    if ridged:
        dG, dH = dG - dridge * (H @ G), dH - dridge * (H @ H)
    if minimum_norm:
        outside = _off_range(A, G, pulled)
        dG = dG + outside @ (A @ (H @ G))
        half = outside @ (A @ (H @ H))
        dH = dH + half + half.T
    return (G, H, regular), (dG, dH, jnp.zeros_like(regular))


def _off_range(A, G, v):
    return v - G @ (A @ v)


def _by_qr(ridged: bool, A, w, ridge):
    m, n = A.shape
    root = jnp.sqrt(jnp.maximum(w, 0))
    rows = root[:, None] * A
    if ridged:
        rows = jnp.concatenate([rows, jnp.sqrt(jnp.maximum(ridge, 0)) * jnp.eye(n, dtype=A.dtype)])
    # QR does not see the scale of a column, and the condition number that decides about the rank should not either.
    scale = power_of_two(jnp.max(jnp.abs(rows), axis=0))
    Q, R = jnp.linalg.qr(rows * scale[None, :])
    eye = jnp.eye(n, dtype=A.dtype)
    zero = jnp.diagonal(R) == 0  # made 1, so that the inverse is finite
    R = R + jnp.where(zero, 1, 0)[:, None].astype(A.dtype) * eye
    inverse = jax.lax.linalg.triangular_solve(R, eye, left_side=True, lower=False)
    condition = jnp.sqrt(jnp.sum(R**2)) * jnp.sqrt(jnp.sum(inverse**2))
    dead = jnp.any(zero)
    regular = (condition * (max(m, n) * float(jnp.finfo(A.dtype).eps)) < 1) & ~dead
    inverse = scale[:, None] * inverse
    return (inverse @ Q[:m].T) * root[None, :], inverse @ inverse.T, regular.astype(A.dtype)


@over_lanes
def _by_svd(A, w):
    root = jnp.sqrt(jnp.maximum(w, 0))
    U, s, Vt = jnp.linalg.svd(root[:, None] * A, full_matrices=False)
    kept = s > max(A.shape) * float(jnp.finfo(A.dtype).eps) * jnp.max(s)
    V = Vt.T * jnp.where(kept, 1 / jnp.where(kept, s, 1), 0)[None, :]
    return (V @ U.T) * root[None, :], V @ V.T, jnp.ones((), A.dtype)


# y


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _solution(minimum_norm: bool, A, b, w, ridge, G, H):
    y = G @ b
    return y + G @ (b - A @ y) - ridge * (H @ y)


@_solution.defjvp
@full_precision()
def _(minimum_norm: bool, primals, tangents):
    """(D). G and H depend on A and w themselves: their own tangents would count those twice, and serve the next order only."""
    A, b, w, ridge, G, H = primals
    dA, db, dw, dridge, _, _ = tangents
    y = _solution(minimum_norm, A, b, w, ridge, G, H)
    pull = lambda v: dA.T @ (w[:, None] * v) + A.T @ (dw[:, None] * v)
    dy = G @ (db - dA @ y) + H @ (pull(b - A @ y) - dridge * y)
    if minimum_norm:
        dy = dy + _off_range(A, G, pull(A @ (H @ y)))
    return y, dy


# (K1)-(K2) solved with G and H: with the residual's scale a and that of the second equation c,
#   second: A'W dr a/c - ridge dy/c - P dy = f,   first: -A dy/a - dr = g   (P the projector onto the null space, 0 without it).


def _split(shapes, vector):
    (solution, residual), size = shapes, 1
    for side in solution:
        size *= side
    return _columns(vector[:size].reshape(solution)), _columns(vector[size:].reshape(residual))


def _join(first, second):
    return jnp.concatenate([first.reshape(-1), second.reshape(-1)])


def _eliminate(shapes, minimum_norm, A, w, G, H, a, c, vector):
    f, g = _split(shapes, vector)
    # dr = -g - A dy/a, so (A'WA + ridge) dy + c P dy = -c f - a A'W g.
    dy = -c * (H @ f) - a * (G @ g)
    if minimum_norm:
        dy = dy - _off_range(A, G, f)
    return _join(dy, -g - A @ dy / a)


def _eliminate_transposed(shapes, minimum_norm, A, w, G, H, a, c, vector):
    f, g = _split(shapes, vector)
    # W A p a/c - q = g  and  -(ridge/c + P) p - A'q/a = f: then (A'WA + ridge) p/c + P p = A'g/a - f.
    right = A.T @ g / a - f
    p = c * (H @ right)
    if minimum_norm:
        # H has the range of A'; P is symmetric.
        p = p + _off_range(A, G, right)
    return _join(p, (w[:, None] * (A @ p)) * (a / c) - g)
