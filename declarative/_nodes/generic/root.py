r"""Root of a user's function.

**Problem.**     $y^*(x)$ with $f(y^*, x) = 0$                                                                        (P)
**Optimality.**  $F(y, x) = f(y, x)$                                                                                 (K1)
**Solver.**      Newton, to the tolerance of the dtype, relative to the size of the guess or of the step that $f$ asks for.
**Gradient.**    Implicit function theorem on (K1), wherever $\partial_y f$ is nonsingular at the root. Any adjoint but the
                 Neumann and one-step ones: $f$ is not a contraction (use `FixedPoint` for one).
"""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import optimistix as optx
from jaxtyping import PyTree

from ..._core.adjoint import PlainLoop, default_linear_solver
from ..._core.closure import close
from ..._core.implicit import Run, typical_scale
from ..._core.node import AbstractDeclarativeNode, Policy, make_policy
from ..._core.tolerances import check_rtol, solver_rtol, tolerances, zero_tolerance
from ..._solvers.newton import Newton


class Root(AbstractDeclarativeNode):
    """A layer that solves `fn(y, x) = 0` for `y`. Called as `root(x, y0=guess)` on one example; batches by `jax.vmap`.

    **Arguments:**

    - `fn`: `fn(y, x) -> residual`, shaped like `y`; pytrees of float32 or float64 arrays. Arrays that it closes over, and those
      of an Equinox module passed as `fn`, get their gradients. It must be forward-differentiable.
    - `solver`: any optimistix root finder, least-squares solver or minimiser, used verbatim; None: Newton, at the tolerance of
      the dtype.
    - `adjoint`: how gradients flow; None: `ImplicitAdjoint()`.
    - `options`: what the solver asks for besides, as in optimistix: `{"lower": a, "upper": b}` for `optimistix.Bisection`. No gradient.
    - `throw`, `on_failure`, `max_steps`: see `Policy`.

    **Returns:** `y`, a pytree like `y0`. No gradient flows to `y0` except through `UnrolledAdjoint`.
    **Raises:** `ValueError` for a solver `rtol` below the spacing of the dtype, a missing `y0`, complex data; `SolveError` at run
    time with `throw=True`.
    """

    fn: Callable
    solver: optx.AbstractRootFinder | optx.AbstractLeastSquaresSolver | optx.AbstractMinimiser | None
    options: dict[str, Any] | None
    adjoint: optx.AbstractAdjoint | None
    policy: Policy

    def __init__(
        self,
        fn: Callable[[PyTree, PyTree], PyTree],
        solver: optx.AbstractRootFinder | optx.AbstractLeastSquaresSolver | optx.AbstractMinimiser | None = None,
        adjoint: optx.AbstractAdjoint | None = None,
        *,
        options: dict[str, Any] | None = None,
        policy: Policy | None = None,
        throw: bool | None = None,
        on_failure: Literal["nan", "zero"] | None = None,
        max_steps: int | None = None,
    ):
        self.fn = check_function(fn, "fn")
        kinds = (optx.AbstractRootFinder, optx.AbstractLeastSquaresSolver, optx.AbstractMinimiser)
        self.solver = check_solver(solver, kinds, "Root", "root finder")
        if options is not None and not isinstance(options, dict):
            raise ValueError(f"options must be a dictionary that the solver reads, or None; got {options!r}.")
        if isinstance(solver, optx.Bisection) and not {"lower", "upper"} <= set(options or ()):
            raise ValueError('Bisection needs its bracket: options={"lower": ..., "upper": ...}.')
        self.options = options
        self.adjoint = adjoint
        self.policy = make_policy(policy, throw=throw, on_failure=on_failure, max_steps=max_steps)

    def guess(self, x, y0):
        return require_guess(self, y0, x)

    def bind(self, x, y0):
        closed = close(self.fn, y0, x)
        if not isinstance(self.solver, (optx.AbstractLeastSquaresSolver, optx.AbstractMinimiser)):
            check_shape(self, closed, y0, x)
        return eqx.tree_at(lambda node: node.fn, self, closed)

    def optimality(self, y, x):
        return self.fn(y, x)

    def run(self, x, y0, loop):
        dtype = jnp.result_type(*jtu.tree_leaves(y0))
        check_rtol(self.solver, dtype)
        tol, scale = tolerances(dtype), typical_scale(lambda y: self.fn(y, x), y0)
        solver = newton(tol.solver, scale, y0) if self.solver is None else self.solver
        out = optx.root_find(
            self.fn,
            solver,
            y0,
            x,
            options=jtu.tree_map(lambda leaf: jnp.asarray(leaf, dtype) if _is_real(leaf) else leaf, self.options),
            max_steps=self.policy.max_steps,
            adjoint=PlainLoop(loop),
            throw=False,
        )
        return Run(out.value, out.result, out.stats["num_steps"], rtol=solver_rtol(self.solver), scale=scale)


def _is_real(leaf) -> bool:
    return eqx.is_inexact_array_like(leaf) or (isinstance(leaf, int) and not isinstance(leaf, bool))


def newton(
    rtol: float, scale: Any, y0: PyTree, least: Any = 0, linear_solver: lx.AbstractLinearSolver | None = None
) -> Newton:
    """Newton's method; quadratic convergence makes the last step far smaller than the tolerance that stops it.

    `least`: an absolute tolerance; `linear_solver`: None for that of the library, or one for positive definite Jacobians.
    """
    size = jax.eval_shape(lambda y: jnp.zeros(sum(leaf.size for leaf in jtu.tree_leaves(y)), scale.dtype), y0)
    atol = jnp.maximum(zero_tolerance(rtol) * scale, least)
    if linear_solver is None:
        return Newton(rtol=rtol, atol=atol, linear_solver=default_linear_solver(size))
    return Newton(rtol=rtol, atol=atol, linear_solver=linear_solver, tags=lx.positive_semidefinite_tag)


def check_function(fn, name: str):
    if not callable(fn):
        raise ValueError(f"{name} must be a function of (y, x), got {type(fn).__name__}.")
    return fn


_SOLVES = {
    optx.AbstractFixedPointSolver: "`FixedPoint`",
    optx.AbstractRootFinder: "`Root`",
    optx.AbstractMinimiser: "`Argmin` or `ProximalArgmin`",
}


def check_solver(solver, kinds: tuple[type, ...], node: str, kind: str):
    """`kind`: of solvers that `node` takes, in words."""
    if solver is None or isinstance(solver, kinds):
        return solver
    if isinstance(solver, type):
        got = f"the class {solver.__name__} itself: make an instance"
    else:
        others = [other for base, other in _SOLVES.items() if isinstance(solver, base)]
        got = f"{solver!r}, which is for {others[0]}" if others else repr(solver)
    raise ValueError(f"solver of {node} must be None or an optimistix {kind}; got {got}.")


def require_guess(node: AbstractDeclarativeNode, y0: PyTree, x: PyTree) -> PyTree:
    """The guess as inexact arrays: a number or integers take the dtype of the data, and no dtype is below it."""
    if y0 is None or not jtu.tree_leaves(y0):
        raise ValueError(f"{type(node).__name__} needs a guess: call it as `node(x, y0=...)`; y0 fixes the shape of y.")

    dtypes = [leaf.dtype for leaf in jtu.tree_leaves((node, x)) if eqx.is_inexact_array(leaf)]
    widest = lambda dtypes: max(dtypes, key=lambda dtype: dtype.itemsize)
    dtype = widest(dtypes) if dtypes else jnp.result_type(float)

    def inexact(leaf):
        leaf = jnp.asarray(leaf)
        typed = jnp.issubdtype(leaf.dtype, jnp.inexact) and not leaf.weak_type
        # `convert_element_type` also forgets that a Python number has no dtype of its own.
        return jax.lax.convert_element_type(leaf, widest([leaf.dtype, dtype]) if typed else dtype)

    return jtu.tree_map(inexact, y0)


def check_shape(node: AbstractDeclarativeNode, fn, y0: PyTree, x: PyTree, name: str = "fn(y, x)") -> None:
    """Raises if `fn(y0, x)` is not shaped and typed like `y0`; `name` is the user's word for it."""
    describe = lambda tree: jtu.tree_map(lambda leaf: f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}", tree)
    got, want = describe(eqx.filter_eval_shape(fn, y0, x)), describe(y0)
    if got != want:
        raise ValueError(
            f"{type(node).__name__}: {name} must have the shape of the unknown and its dtype. y0 is {want}, "
            f"{name.split('(')[0]} returned {got}."
        )
