r"""Eigenvalues and eigenvectors of a symmetric matrix, with a derivative that is finite, and says when it does not exist.

Where eigenvalues coincide, eigenvectors are not functions of the matrix; what is, is the block $B = V^\top S V$ of each group of equal
ones and the span of its vectors. So the kernel differentiates those,

$$ SV = VB, \quad B \text{ zero between groups:} \qquad dB_{ij} = (V^\top dS\,V)_{ij} \text{ within a group}, \quad dV = VX, \quad
   (BX - XB)_{ij} = -(V^\top dS\,V)_{ij} \text{ between groups}, \tag{D} $$

$X$ zero within a group. With all eigenvalues apart this is the textbook formula, $X_{ij} = (V^\top dS\,V)_{ij} / (\lambda_j - \lambda_i)$.
(D) is a linear equation in $X$ with the matrix $B$, not only its diagonal, in it: that is what makes second derivatives of functions
of a whole group (its projector, sums over it) right as well, where $dB$ is not diagonal.
"""

from functools import partial
from typing import ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, Float

from ..._core.arguments import flag, integer
from ..._core.implicit import Run
from ..._core.node import AbstractDeclarativeNode, Policy, evaluate, make_policy
from ..._core.precision import full_precision
from ..._core.results import RESULTS, choose
from ..._linear.known_inverse import known_inverse
from ..._linear.lanes import over_lanes
from ..._linear.norms import largest

# Roundings, times sqrt(n), by which LAPACK's equal eigenvalues differ.
_EQUAL = 10


class Eigenpairs(eqx.Module):
    """Eigenvalues (k,) and the vectors (n, k) that belong to them, in columns; the unknown of (K1)-(K2), and the value."""

    values: Float[Array, "..."]
    vectors: Float[Array, "..."]


class Eigendecomposition(AbstractDeclarativeNode):
    r"""Eigenvalues and eigenvectors of a symmetric matrix: all, or those at one end of the spectrum.

    **Problem.**     $\max_V \mathrm{tr}(V^\top S V)$ subject to $V^\top V = I_k$ (min for `largest=False`), V the eigenvectors of S      (P)
    **Optimality.**  $S v_i - \lambda_i v_i = 0$ (K1),  $(1 - v_i^\top v_i)/2 = 0$ (K2) for $i = 1 \dots k$. Orthogonality of different ones follows,
                     where their eigenvalues differ.
    **Solver.**      LAPACK's symmetric eigensolver, one example at a time on CPU. The sign of a vector: its entry of largest magnitude is
                     positive (of several within a part in a thousand, the first).
    **Gradient.**    $d\lambda_i = v_i^\top dS\,v_i$, $dv_i = \sum_{j \ne i} v_j (v_j^\top dS\,v_i)/(\lambda_i - \lambda_j)$; all modes, any order.
                     Eigenvalues no further apart than `tolerance` times $\|S\|$ are equal: terms between them are left out. A single vector
                     of a group has no derivative there; functions of the whole group, as its projector $\sum_i v_iv_i^\top$ or sum
                     of eigenvalues, do, and get it exactly (see the top of this file). `jnp.linalg.eigh` gives NaN for all of
                     them, or a finite number that is wrong where eigenvalues are equal but for rounding.
                     `adjoint=ImplicitAdjoint()` solves (K1)-(K2), which is singular there, and says so instead.
    **Use instead.** `jnp.linalg.eigvalsh` for eigenvalues alone that are known to be apart.

    | symbol      | code             | shape    | meaning                                                     |
    |-------------|------------------|----------|-------------------------------------------------------------|
    | $S$         |                  | `(n, n)` | the matrix; its symmetric part counts                       |
    | $\lambda$   | `value.values`   | `(k,)`   | descending for `largest=True`, else ascending               |
    | $V$         | `value.vectors`  | `(n, k)` | eigenvectors, in columns                                    |

    **Arguments:** `k`, how many (None: all). `largest`: from which end. `tolerance`, relative to the largest magnitude of an eigenvalue
    (None: $10\sqrt n$ times the spacing of the dtype). `equal`: `"drop"`, as above, or `"fail"`: equal eigenvalues among those that are
    returned end with `not_unique`. `throw`, `on_failure`, `adjoint`: see `Policy` and `ImplicitAdjoint`.
    **Call:** `eigen(S)`, float32 or float64. **Returns:** `Eigenpairs`. `stats["kink_distance"]` is the least distance of a returned
    eigenvalue from any other.
    **Raises:** `ValueError` for a matrix that is not square, and for k outside of 1 to n; with `throw=True` a `SolveError` at run time:
    `nonfinite_data`, and `not_unique` where the k-th and the next eigenvalue are equal (whatever `equal` says: the span of the returned
    vectors is then arbitrary).
    **Reference:** Magnus 1985, *On differentiating eigenvalues and eigenvectors*, Theorem 1.
    """

    k: int | None = eqx.field(static=True)
    largest: bool = eqx.field(static=True)
    tolerance: float | None = eqx.field(static=True)
    equal: Literal["drop", "fail"] = eqx.field(static=True)
    adjoint: optx.AbstractAdjoint | None
    policy: Policy

    smoothness: ClassVar[str] = "analytic where the returned eigenvalues differ from all others"
    closed_form: ClassVar[bool] = True

    def __init__(
        self,
        k: int | None = None,
        *,
        largest: bool = True,
        tolerance: float | None = None,
        equal: Literal["drop", "fail"] = "drop",
        adjoint: optx.AbstractAdjoint | None = None,
        policy: Policy | None = None,
        throw: bool | None = None,
        on_failure: Literal["nan", "zero"] | None = None,
        max_steps: int | None = None,
    ):
        if tolerance is not None and not 0 <= tolerance < 1:
            raise ValueError(f"tolerance must be at least 0 and below 1, got {tolerance!r}.")
        if equal not in ("drop", "fail"):
            raise ValueError(f"equal must be 'drop' or 'fail', got {equal!r}.")
        self.k = None if k is None else integer(k, "k", hint=", or None for all eigenvalues")
        self.largest = flag(largest, "largest")
        self.tolerance = tolerance
        self.equal = equal
        self.adjoint = adjoint
        self.policy = make_policy(policy, throw=throw, on_failure=on_failure, max_steps=max_steps)

    def __call__(self, x: Float[Array, "n n"]) -> Eigenpairs:  # pyright: ignore[reportIncompatibleMethodOverride]
        return evaluate(self, x)

    def check(self, x):
        if not eqx.is_array(x) or x.ndim != 2 or x.shape[0] != x.shape[1] or x.size == 0:
            shape = f" of shape {x.shape}" if eqx.is_array(x) else ""
            raise ValueError(
                f"Eigendecomposition takes one square matrix, got {type(x).__name__}{shape}; for a batch use jax.vmap."
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"the matrix must be floating, got {x.dtype}. Cast it with .astype.")
        if self.k is not None and self.k > x.shape[0]:
            raise ValueError(f"k = {self.k} is more than the {x.shape[0]} eigenvalues that the matrix has.")

    # Problem and optimality

    def optimality(self, y: Eigenpairs, x) -> Eigenpairs:
        size = _size(x)
        first = ((x + x.T) @ y.vectors / 2) / size - y.vectors * (y.values / size)[None, :]
        return Eigenpairs((1 - jnp.sum(y.vectors**2, axis=0)) / 2, first)

    def kink_distance(self, y, x):
        values, _ = _ordered(self.largest, _symmetric(x))
        return jnp.min(_distances(values)[: y.values.size])

    # Solver

    def run(self, x, y0, loop):
        del y0, loop
        symmetric = _symmetric(x)
        n = x.shape[0]
        k = n if self.k is None else self.k
        tolerance = _EQUAL * n**0.5 * float(jnp.finfo(x.dtype).eps) if self.tolerance is None else self.tolerance
        vectors, block = _frame(self.largest, tolerance, symmetric)
        values = jnp.diagonal(block)
        spectrum = jax.lax.stop_gradient(values)
        apart = _distances(spectrum) > tolerance * jnp.max(jnp.abs(spectrum))
        cut = jnp.zeros((), bool) if k == n else _groups(spectrum, tolerance)[k - 1, k]
        unique = ~cut & (jnp.all(apart[:k]) if self.equal == "fail" else True)
        result = choose(unique, RESULTS.successful, RESULTS.not_unique)
        result = choose(jnp.all(jnp.isfinite(x)), result, RESULTS.nonfinite_data)
        return Run(Eigenpairs(values[:k], vectors[:, :k]), result, factor=(vectors, values))

    # Structure of the gradient

    def linear_system(self, y, x, factor):
        vectors, values = factor
        apply = jtu.Partial(partial(_spectral_solve, y.values.size), vectors, values, _size(x))
        transposed = jtu.Partial(partial(_spectral_solve_transposed, y.values.size), vectors, values, _size(x))
        return known_inverse(jnp.concatenate([y.values, y.vectors.reshape(-1)]), apply, transposed)


def _symmetric(x):
    return (x + x.T) / 2


def _size(x):
    """The unit of S and its eigenvalues."""
    size = jax.lax.stop_gradient(largest(x))
    return jnp.where((size > 0) & jnp.isfinite(size), size, 1).astype(x.dtype)


def _distances(values: Float[Array, " n"]) -> Float[Array, " n"]:
    """From each eigenvalue to the nearest other one (they are in order)."""
    infinite = jnp.full(1, jnp.inf, values.dtype)
    gaps = jnp.concatenate([infinite, jnp.abs(jnp.diff(values)), infinite])
    return jnp.minimum(gaps[:-1], gaps[1:])


def _groups(values: Float[Array, " n"], tolerance: float) -> Bool[Array, "n n"]:
    """Whether two eigenvalues belong to one group: neighbours in it are no further apart than the tolerance."""
    new = jnp.abs(jnp.diff(values)) > tolerance * jnp.max(jnp.abs(values))
    group = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(new.astype(jnp.int32))])
    return group[:, None] == group[None, :]


def _ordered(from_largest: bool, symmetric: Float[Array, "n n"]):
    return over_lanes(partial(_eigh, from_largest))(symmetric)


def _eigh(from_largest: bool, symmetric):
    values, vectors = jnp.linalg.eigh(symmetric, symmetrize_input=False)
    if from_largest:
        values, vectors = values[::-1], vectors[:, ::-1]
    magnitude = jnp.abs(vectors)
    # argmax takes the first of the entries that are as large as any, up to what rounding could turn round.
    leading = jnp.argmax(magnitude >= 0.999 * jnp.max(magnitude, axis=0)[None, :], axis=0)
    sign = jnp.sign(jnp.take_along_axis(vectors, leading[None, :], axis=0))
    return values, vectors * jnp.where(sign == 0, 1, sign)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _frame(from_largest: bool, tolerance: float, symmetric: Float[Array, "n n"]):
    """V and B of (D)."""
    values, vectors = _ordered(from_largest, symmetric)
    return vectors, jnp.diag(values)


@_frame.defjvp
@full_precision()
def _(from_largest: bool, tolerance: float, primals, tangents):
    (symmetric,), (change,) = primals, tangents
    V, B = _frame(from_largest, tolerance, symmetric)
    rotated = V.T @ change @ V
    values = jax.lax.stop_gradient(jnp.diagonal(B))
    within = _groups(values, tolerance)
    gaps = jnp.where(within, 1, values[None, :] - values[:, None])
    # Diagonal at this point; as a function of S it is not, which `custom_linear_solve` differentiates.
    between = lambda X: jnp.where(within, X, X @ B - B @ X)
    divide = lambda _, right: right / gaps
    X = jax.lax.custom_linear_solve(between, jnp.where(within, 0, rotated), divide, divide)
    return (V, B), (V @ X, jnp.where(within, rotated, 0))


# (K1)-(K2), divided by the size t of S: with dv = V a + ..., (S - lambda_i) dv - v_i dlambda_i = t f_i and -v_i'dv = g_i.


def _spectral_solve(k: int, vectors, values, size, vector):
    g, f = _parts(k, vectors, vector)
    coefficients, gaps = vectors.T @ f, _gaps(k, values)
    along = jnp.eye(gaps.shape[0], k, dtype=bool)
    change = vectors @ jnp.where(along, -g[None, :], size * coefficients / gaps)
    return _joined(-size * jnp.diagonal(coefficients), change)


def _spectral_solve_transposed(k: int, vectors, values, size, vector):
    """-v_i'p_i / t = g_i and (S - lambda_i) p_i / t - v_i q_i = f_i."""
    g, f = _parts(k, vectors, vector)
    coefficients, gaps = vectors.T @ f, _gaps(k, values)
    along = jnp.eye(gaps.shape[0], k, dtype=bool)
    p = vectors @ jnp.where(along, -size * g[None, :], size * coefficients / gaps)
    return _joined(-jnp.diagonal(coefficients), p)


def _gaps(k: int, values):
    gaps = values[:, None] - values[None, :k]
    # Equal eigenvalues: no solution, whatever is divided by; the core sees the residual.
    return jnp.where(gaps == 0, 1, gaps)


def _parts(k: int, vectors, vector):
    return vector[:k], vector[k:].reshape(vectors.shape[0], k)


def _joined(first, second):
    return jnp.concatenate([first, second.reshape(-1)])
