r"""Unconstrained minimiser of a user's objective.

**Problem.**     $y^*(x) = \arg\min_y f(y, x)$, locally, from a guess                                                  (P)
**Optimality.**  $F(y, x) = \nabla_y f(y, x)$                                                                        (K1)
**Solver.**      BFGS, then Newton on (K1): a quasi-Newton method stops where the objective no longer changes, which is half
                 the digits of $y$, and the error of the gradient is that of $y$.
**Gradient.**    Implicit function theorem on (K1): $\nabla^2_{yy} f\,\mathrm dy = -\nabla^2_{yx} f\,\mathrm dx$, wherever the Hessian
                 is nonsingular. The optimal value has its envelope gradient $\partial_x f$, without a linear solve.
"""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import optimistix as optx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from ..._core.adjoint import AbstractAdjoint, PlainLoop
from ..._core.arguments import number
from ..._core.closure import close
from ..._core.implicit import Run, typical_scale
from ..._core.node import AbstractDeclarativeNode, Policy, envelope, make_policy
from ..._core.results import RESULTS, choose
from ..._core.tolerances import check_rtol, solver_rtol, tolerances
from .root import check_function, check_solver, newton, require_guess

_POLISH_STEPS = 8
_DENSE_POLISH = 64  # unknowns up to which the Hessian is formed for them


def _polisher(size: int, dtype) -> lx.AbstractLinearSolver | None:
    """Of many unknowns: conjugate gradients, to a few digits a step. Where the Hessian is not positive, the step is not wanted."""
    if size <= _DENSE_POLISH:
        return None
    limits = jnp.finfo(dtype)
    return lx.CG(rtol=float(limits.eps) ** 0.25, atol=float(limits.tiny), max_steps=min(size, 1000))


class Argmin(AbstractDeclarativeNode):
    """A layer that minimises `objective(y, x)` over `y`. Called as `argmin(x, y0=guess)` on one example; `jax.vmap` for batches.

    **Arguments:**

    - `objective`: `objective(y, x) -> scalar`, twice differentiable in forward mode. Arrays that it closes over, and those of an
      Equinox module passed as `objective`, get their gradients.
    - `solver`: any optimistix minimiser, used verbatim; None: BFGS followed by Newton steps, at the tolerance of the dtype.
    - `adjoint`: how gradients flow; None: `ImplicitAdjoint()`. Neumann and one-step adjoints need `step_size`.
    - `step_size`: makes `y - step_size * grad` the contraction that those adjoints use; below 2 / (largest curvature).
    - `throw`, `on_failure`, `max_steps`: see `Policy`.

    **Returns:** `y`, a pytree like `y0`: a stationary point near which the objective is not concave along a random direction (else
    `RESULTS.indefinite`); `declarative.conditions` looks at every direction. `solve` also returns the optimal value in
    `objective`. No gradient flows to `y0` except through `UnrolledAdjoint`.
    **Raises:** as `Root`; also `ValueError` if the objective is not a scalar.
    """

    fn: Callable
    solver: optx.AbstractMinimiser | None
    adjoint: optx.AbstractAdjoint | None
    step_size: float | Float[Array, ""] | None
    policy: Policy

    def __init__(
        self,
        objective: Callable[[PyTree, PyTree], Float[Array, ""]],
        solver: optx.AbstractMinimiser | None = None,
        adjoint: optx.AbstractAdjoint | None = None,
        *,
        step_size: float | Float[Array, ""] | None = None,
        policy: Policy | None = None,
        throw: bool | None = None,
        on_failure: Literal["nan", "zero"] | None = None,
        max_steps: int | None = None,
    ):
        self.fn = check_function(objective, "objective")
        self.solver = check_solver(solver, (optx.AbstractMinimiser,), "Argmin", "minimiser")
        self.adjoint = adjoint
        self.step_size = None if step_size is None else number(step_size, "step_size")
        self.policy = make_policy(policy, throw=throw, on_failure=on_failure, max_steps=max_steps)
        if isinstance(adjoint, AbstractAdjoint) and adjoint.needs_step and step_size is None:
            raise ValueError(
                f"{type(adjoint).__name__} needs a contraction: pass step_size, below 2 / (largest curvature of the objective)."
            )

    def guess(self, x, y0):
        return require_guess(self, y0, x)

    def bind(self, x, y0):
        closed = close(self.fn, y0, x)
        shape = eqx.filter_eval_shape(closed, y0, x)
        if not hasattr(shape, "shape") or shape.shape != () or not jnp.issubdtype(shape.dtype, jnp.floating):
            raise ValueError(f"objective must return a floating scalar, got {shape}.")
        return eqx.tree_at(lambda node: node.fn, self, closed)

    def optimality(self, y, x):
        return jax.grad(self.fn)(y, x)

    def objective(self, y, x):
        return envelope(_objective, y, (self.fn, x))

    def step(self, y, x):
        size = self.step_size
        return jtu.tree_map(lambda y, g: y - jnp.asarray(size, y.dtype) * g, y, self.optimality(y, x))

    def run(self, x, y0, loop, unit: Callable[[PyTree], Float[Array, ""]] | None = None):
        """`unit(y)`: see `Run`."""
        dtype = jnp.result_type(*jtu.tree_leaves(y0))
        check_rtol(self.solver, dtype)
        tol, scale = tolerances(dtype), typical_scale(lambda y: self.optimality(y, x), y0)
        least = 0 if unit is None else unit(y0)
        atol: Any = tol.solver * jnp.maximum(scale, least)  # optimistix annotates a float; an array is as good
        solver = optx.BFGS(tol.solver, atol) if self.solver is None else self.solver
        minimise = lambda fn, solver, y0: optx.minimise(
            fn, solver, y0, x, max_steps=self.policy.max_steps, adjoint=PlainLoop(loop), throw=False
        )
        out = minimise(self.fn, solver, y0)
        y, steps = out.value, out.stats["num_steps"]
        if self.solver is None:
            size = sum(leaf.size for leaf in jtu.tree_leaves(y0))
            polished = optx.root_find(
                self.optimality,
                newton(tol.solver, scale, y0, tol.solver * least, _polisher(size, dtype)),
                y,
                x,
                max_steps=_POLISH_STEPS,
                adjoint=PlainLoop(loop),
                throw=False,
            )
            # Newton goes to any stationary point, so its answer counts only if it did not climb.
            slack = jnp.asarray(float(jnp.finfo(dtype).eps) ** 0.5, dtype) * jnp.abs(self.fn(y, x))
            better = self.fn(polished.value, x) <= self.fn(y, x) + slack
            y = jtu.tree_map(lambda new, old: jnp.where(better, new, old), polished.value, y)
            steps = steps + polished.stats["num_steps"]
        result = choose(self._concave(y, x), RESULTS.indefinite, RESULTS.promote(out.result))
        found = None if unit is None else unit(y)
        return Run(y, result, steps, rtol=solver_rtol(self.solver), scale=scale, unit=found)

    def _concave(self, y, x):
        """Whether the objective curves down along one fixed direction, beyond rounding."""
        vector, unravel = ravel_pytree(jax.lax.stop_gradient(y))
        node, x = jax.lax.stop_gradient(eqx.filter(self, eqx.is_array)), jax.lax.stop_gradient(x)
        fn = eqx.combine(node, eqx.filter(self, eqx.is_array, inverse=True)).fn
        gradient = lambda v: ravel_pytree(jax.grad(fn)(unravel(v), x))[0]
        direction = jnp.cos(jnp.arange(1, vector.size + 1).astype(vector.dtype))
        curved = jax.jvp(gradient, (vector,), (direction,))[1]
        noise = float(jnp.finfo(vector.dtype).eps) ** 0.5 * jnp.linalg.norm(curved) * jnp.linalg.norm(direction)
        return direction @ curved < -noise


def _objective(y, bound):
    fn, x = bound
    return fn(y, x)
