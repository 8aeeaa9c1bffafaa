"""Lasso and elastic net regression."""

from typing import ClassVar, Literal

import equinox as eqx
import jax.numpy as jnp
import optimistix as optx
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from ..._core.adjoint import refuse_unrolling
from ..._core.arguments import integer
from ..._core.implicit import LinearSystem, Run
from ..._core.node import AbstractDeclarativeNode, Policy, envelope, evaluate, make_policy
from ..._core.results import RESULTS, choose
from ..._core.tolerances import tolerances
from ..._linear.support import GramSolver, GramSystem, buffer
from ..._solvers.lasso import Penalised, lasso, on_support


class LassoData(eqx.Module):
    """The design `X` (n, p), the target `y` (n,), and the weights of the penalties, each one number or one for each column of X.

    `lam` weighs the absolute values, `ridge` the halved squares (None: no such term); at least 0. `lam` of 0 leaves a coefficient
    unpenalised, of `inf` excludes it. There is no intercept: centre X and y, or give X a column of ones with `lam` 0.
    """

    X: Array
    y: Array
    lam: Array
    ridge: Array | None = None


class Lasso(AbstractDeclarativeNode):
    r"""Sparse linear regression: the lasso, and with `ridge` the elastic net, differentiable in data and penalties.

    **Problem.**     $\beta^* = \arg\min_\beta \tfrac{1}{2n}\|y - X\beta\|^2 + \sum_j \lambda_j |\beta_j| + \tfrac12 \sum_j \rho_j \beta_j^2$   (P)
    **Optimality.**  With $c = X^\top(y - X\beta)/n - \rho\beta$, $L_j = \|X_j\|^2/n + \rho_j$ and the soft threshold S:
                     $S(\beta_j + c_j/L_j,\ \lambda_j/L_j) - \beta_j = 0$                                                        (K1)
    **Solver.**      Coordinate descent on working sets finds the support and its signs, a Cholesky factor on it the coefficients, exactly.
    **Gradient.**    Implicit function theorem on (K1), solved on the support S only: with $H = X_S^\top X_S/n + \rho_S$,
                     $\mathrm d\beta_S = H^{-1}\,\partial_x(c_S - \lambda_S\,\mathrm{sign}\,\beta_S)\,\mathrm dx$ and 0 elsewhere (G1):
                     $n k_{max}^2$ operations in place of $np^2$. All modes, any order. $\beta$ is not differentiable where $|c_j| = \lambda_j$ off
                     the support; there, and within rounding of it, the coefficient stays zero. Where columns of the support depend
                     on one another, the gradient is `RESULTS.singular_jacobian`: a `ridge` cures that.
    **Use instead.** `ProximalArgmin` for another loss or penalty.

    | symbol    | code    | shape         | meaning                                              |
    |-----------|---------|---------------|------------------------------------------------------|
    | $X$, $y$  | `X`, `y`| `(n, p)`, `(n,)` | design and target                                 |
    | $\lambda$ | `lam`   | `()` or `(p,)`| weight of $|\beta_j|$; all of $\beta$ is 0 from $\max_j |X_j^\top y|/n$ on |
    | $\rho$    | `ridge` | `()` or `(p,)`| weight of $\beta_j^2/2$                              |
    | $c$       |         | `(p,)`        | correlation with the residual, within $\pm\lambda$   |

    **Arguments:**

    - `k_max`: the number of columns that the gradient (and the Cholesky factor of the solver) has room for: time goes with
      `n * k_max**2`. None: all that a support can have, min(n, p) without `ridge` and p with it.
    - `throw`, `on_failure`, `max_steps`, `adjoint`: see `Policy` and `ImplicitAdjoint`. Steps are cycles of coordinate descent.

    **Call:** `lasso(X, y, lam, ridge=None)`; `jax.vmap` for batches.
    **Returns:** `Float[Array, " p"]`, with exact zeros. `solve(LassoData(...))` gives the optimal value as `objective`, and as `dual`
    the scaled residual $(y - X\beta)/n$, which is the solution of the dual problem.
    **Raises:** `ValueError` for data of the wrong shape or dtype, a `k_max` that is no positive integer, or an adjoint that unrolls
    (`ProximalArgmin` can be unrolled); with `throw=True` a `SolveError` at run time for data that are not finite or negative weights,
    for a support of more than `k_max` columns (`RESULTS.support_overflow`), and if `max_steps` is reached.
    **Reference:** Tibshirani 1996; Bertrand, Klopfenstein, Blondel, Vaiter, Gramfort & Salmon 2020, *Implicit differentiation of
    lasso-type models for hyperparameter optimization*, arXiv:2002.08943 ((G1) for `lam`).
    """

    k_max: int | None = eqx.field(static=True)
    adjoint: optx.AbstractAdjoint | None
    policy: Policy

    smoothness: ClassVar[str] = "piecewise smooth: not differentiable where the support changes"

    def __init__(
        self,
        k_max: int | None = None,
        *,
        adjoint: optx.AbstractAdjoint | None = None,
        policy: Policy | None = None,
        throw: bool | None = None,
        on_failure: Literal["nan", "zero"] | None = None,
        max_steps: int | None = None,
    ):
        refuse_unrolling(
            adjoint, "would unroll iterations that are not for differentiation: use adjoint=None, or ProximalArgmin."
        )
        self.k_max = None if k_max is None else integer(k_max, "k_max", hint=" or None")
        self.adjoint = adjoint
        self.policy = make_policy(policy, throw=throw, on_failure=on_failure, max_steps=max_steps)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        X: Float[Array, "n p"] | LassoData,
        y: Float[Array, " n"] | None = None,
        lam: float | Float[Array, ""] | Float[Array, " p"] | None = None,
        ridge: float | Float[Array, ""] | Float[Array, " p"] | None = None,
    ) -> Float[Array, " p"]:
        if not isinstance(X, LassoData) and (y is None or lam is None):
            raise ValueError("Lasso is called as `lasso(X, y, lam)`, or with a `LassoData`.")
        return evaluate(self, self.pack(X, y, lam, ridge))

    def pack(self, x, y=None, lam=None, ridge=None):
        if y is not None and lam is not None:
            x = (x, y, lam, ridge)
        if isinstance(x, LassoData) or not isinstance(x, tuple) or len(x) not in (3, 4):
            return x
        X = jnp.asarray(x[0])
        # Python numbers, and weights of another precision, take the dtype of X.
        dtype = X.dtype if jnp.issubdtype(X.dtype, jnp.floating) else None
        ridge = None if len(x) == 3 or x[3] is None else jnp.asarray(x[3], dtype)
        return LassoData(X, jnp.asarray(x[1]), jnp.asarray(x[2], dtype), ridge)

    def check(self, x):
        if not isinstance(x, LassoData):
            raise ValueError(f"Lasso takes `LassoData` or a tuple (X, y, lam[, ridge]), got {type(x).__name__}.")
        if x.X.ndim != 2 or 0 in x.X.shape or not jnp.issubdtype(x.X.dtype, jnp.floating):
            raise ValueError(
                f"X must be a non-empty floating matrix (n, p), got {x.X.dtype}{list(x.X.shape)}; use `jax.vmap` for batches."
            )
        n, p = x.X.shape
        for name, array, shapes in (
            ("y", x.y, ((n,),)),
            ("lam", x.lam, ((), (p,))),
            ("ridge", x.ridge, ((), (p,))),
        ):
            if array is None:
                continue
            if array.shape not in shapes:
                raise ValueError(
                    f"{name} must have shape {' or '.join(map(str, shapes))} for X of {x.X.shape}; got {array.shape}."
                )
            if array.dtype != x.X.dtype:
                raise ValueError(f"{name} must have the dtype of X, {x.X.dtype}; got {array.dtype}.")

    def optimality(self, y: Float[Array, " p"], x: LassoData) -> Float[Array, " p"]:
        problem = _problem(x)
        curvature = stop_gradient(problem.curvature)
        residual = problem.residual(y)
        c = problem.correlation(y, residual)
        on = on_support(*stop_gradient((y, c, problem.lam, curvature, residual)))
        # (K1). The sign is that of y + c / L, and no gradient goes through it.
        shrunk = y + (c - jnp.sign(curvature * y + c) * jnp.where(on, problem.lam, 0)) / curvature
        return jnp.where(on, shrunk, 0) - y

    def objective(self, y, x):
        return envelope(_cost, y, x)

    def dual(self, y, x):
        return _problem(x).residual(y) / x.y.size

    def run(self, x, y0, loop):
        del y0, loop
        problem = _problem(x)
        weights_good = jnp.all(problem.lam >= 0) & jnp.all(problem.ridge >= 0) & jnp.all(jnp.isfinite(problem.ridge))
        good = jnp.all(jnp.isfinite(x.X)) & jnp.all(jnp.isfinite(x.y)) & weights_good
        k = self._room(x)
        found = lasso(problem, k, self.policy.max_steps, tolerances(x.y.dtype).solver)
        result = choose(found.converged, RESULTS.successful, RESULTS.nonlinear_max_steps_reached)
        result = choose(jnp.sum(_support(found.beta, x)) > k, RESULTS.support_overflow, result)
        result = choose(good, result, RESULTS.nonfinite_data)
        return Run(found.beta, result, found.steps)

    def linear_system(self, y, x, factor):
        del factor
        problem = _problem(x)
        on = _support(y, x)
        root_n = x.y.size**0.5
        system = GramSystem(
            problem.columns / root_n, problem.ridge, 1 / problem.curvature, on, buffer(on, self._room(x))
        )
        return LinearSystem(system, GramSolver())

    def kink_distance(self, y, x):
        # In the units of lam: to the threshold off the support, to zero on it.
        problem = _problem(x)
        c = problem.correlation(y, problem.residual(y))
        distance = jnp.where(_support(y, x), jnp.abs(y) * problem.curvature, problem.lam - jnp.abs(c))
        return jnp.min(jnp.where(problem.lam == 0, jnp.inf, distance))

    def _room(self, x: LassoData) -> int:
        n, p = x.X.shape
        # More columns than rows depend on one another, so that there is no gradient; a ridge makes them independent.
        most = min(n, p) if x.ridge is None else p
        return most if self.k_max is None else min(self.k_max, p)


def _problem(x: LassoData) -> Penalised:
    p = x.X.shape[1]
    ridge = jnp.zeros(p, x.y.dtype) if x.ridge is None else jnp.broadcast_to(x.ridge, (p,))
    return Penalised(x.X.T, x.y, jnp.broadcast_to(x.lam, (p,)), ridge)


def _support(y, x: LassoData):
    problem = _problem(x)
    residual = problem.residual(y)
    return on_support(y, problem.correlation(y, residual), problem.lam, problem.curvature, residual)


def _cost(beta, x: LassoData) -> Float[Array, ""]:
    problem = _problem(x)
    size = jnp.abs(beta)
    # A coefficient that is zero may have an infinite weight.
    penalty = jnp.where(size == 0, 0, size * jnp.where(size == 0, 0, problem.lam)) + problem.ridge * beta**2 / 2
    return jnp.sum(problem.residual(beta) ** 2) / (2 * x.y.size) + jnp.sum(penalty)
