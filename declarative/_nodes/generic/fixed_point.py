r"""Fixed point of a user's function.

**Problem.**     $y^*(x)$ with $y^* = T(y^*, x)$                                                                      (P)
**Optimality.**  $F(y, x) = T(y, x) - y$                                                                             (K1)
**Solver.**      Picard iteration $y \leftarrow T(y, x)$, which converges where $T(\cdot, x)$ is a contraction.
**Gradient.**    Implicit function theorem on (K1): $(I - \partial_y T)\,\mathrm dy = \partial_x T\,\mathrm dx$, wherever 1 is no
                 eigenvalue of $\partial_y T$, by products with the Jacobian as long as that converges (`biconjugate.py`). `step` is $T$
                 itself, so every adjoint applies.
"""

from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import optimistix as optx
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree

from ..._core.adjoint import PlainLoop, QuasiNewtonAdjoint, lax_loop
from ..._core.closure import close
from ..._core.implicit import LinearSystem, Run, typical_scale
from ..._core.node import AbstractDeclarativeNode, Policy, make_policy
from ..._core.results import RESULTS, choose
from ..._core.tolerances import check_rtol, solver_rtol, tolerances, with_tolerances, zero_tolerance
from ..._linear.biconjugate import NearIdentity, NearIdentityState
from ..._solvers.accelerated import AbstractAccelerated, accelerate
from ..._solvers.broyden import Broyden
from ..._solvers.picard import Picard
from .root import check_function, check_shape, check_solver, require_guess

_SMALL = 32  # unknowns up to which elimination is the shorter way

_Solver = (
    optx.AbstractFixedPointSolver | optx.AbstractRootFinder | optx.AbstractLeastSquaresSolver | optx.AbstractMinimiser
)


_KINDS = (
    optx.AbstractFixedPointSolver,
    optx.AbstractRootFinder,
    optx.AbstractLeastSquaresSolver,
    optx.AbstractMinimiser,
)


class FixedPoint(AbstractDeclarativeNode):
    """A layer that solves `y = fn(y, x)` for `y`. Called as `fixed_point(x, y0=guess)` on one example; `jax.vmap` for batches.

    **Arguments:**

    - `fn`: `fn(y, x) -> y`, shaped like `y`; pytrees of float32 or float64 arrays. Arrays that it closes over, and those of an
      Equinox module passed as `fn`, get their gradients. It must be forward-differentiable.
    - `solver`: any optimistix solver that `optx.fixed_point` takes, used verbatim; None: Picard iteration at the tolerance of
      the dtype. `Anderson` and `Broyden` need far fewer evaluations where `fn` contracts slowly, and no contraction.
    - `adjoint`: how gradients flow; None: `ImplicitAdjoint()`. Cheaper and biased: `OneStepAdjoint`, `NeumannAdjoint`, `PhantomAdjoint`, and
      behind `Broyden` `QuasiNewtonAdjoint`.
    - `throw`, `on_failure`, `max_steps`: see `Policy`.

    **Returns:** `y`, a pytree like `y0`. No gradient flows to `y0` except through `UnrolledAdjoint`.
    **Raises:** as `Root`.
    """

    fn: Callable
    solver: _Solver | None
    adjoint: optx.AbstractAdjoint | None
    policy: Policy

    def __init__(
        self,
        fn: Callable[[PyTree, PyTree], PyTree],
        solver: _Solver | None = None,
        adjoint: optx.AbstractAdjoint | None = None,
        *,
        policy: Policy | None = None,
        throw: bool | None = None,
        on_failure: Literal["nan", "zero"] | None = None,
        max_steps: int | None = None,
    ):
        self.fn = check_function(fn, "fn")
        self.solver = check_solver(solver, _KINDS, "FixedPoint", "fixed-point solver or root finder")
        self.adjoint = adjoint
        self.policy = make_policy(policy, throw=throw, on_failure=on_failure, max_steps=max_steps)
        if isinstance(adjoint, QuasiNewtonAdjoint) and not isinstance(solver, Broyden):
            raise ValueError(
                f"QuasiNewtonAdjoint needs the inverse that solver=Broyden(...) leaves; solver is {solver!r}."
            )

    def guess(self, x, y0):
        return require_guess(self, y0, x)

    def bind(self, x, y0):
        closed = close(self.fn, y0, x)
        check_shape(self, closed, y0, x)
        return eqx.tree_at(lambda node: node.fn, self, closed)

    def optimality(self, y, x):
        return jtu.tree_map(jnp.subtract, self.fn(y, x), y)

    def step(self, y, x):
        return self.fn(y, x)

    def run(self, x, y0, loop):
        dtype = jnp.result_type(*jtu.tree_leaves(y0))
        check_rtol(self.solver, dtype)
        tol, scale = tolerances(dtype), typical_scale(lambda y: self.optimality(y, x), y0)
        own = tol.solver, zero_tolerance(tol.solver) * scale
        solver = Picard(*own) if self.solver is None else with_tolerances(self.solver, *own)
        fn, most = close(self.fn, y0, x), self.policy.max_steps
        # What `fn` does besides (communication between lanes by their axis name, callbacks) is for JAX's own loop.
        if isinstance(solver, AbstractAccelerated) and loop is lax_loop and not fn.trace.jaxpr.effects:
            out = accelerate(solver, fn, y0, x, most)
            ended = choose(out.lost, RESULTS.nonfinite, RESULTS.nonlinear_max_steps_reached)
            result = choose(out.settled, RESULTS.successful, ended)
            value, steps, memory = out.y, out.steps, out.memory
        else:
            out = optx.fixed_point(fn, solver, y0, x, max_steps=most, adjoint=PlainLoop(loop), throw=False)
            value, result, steps = out.value, out.result, out.stats["num_steps"]
            memory = out.state.memory if isinstance(solver, AbstractAccelerated) else None
        inverse = solver.inverse(memory) if isinstance(solver, Broyden) else None
        return Run(value, result, steps, inverse, rtol=solver_rtol(self.solver), scale=scale)

    def linear_system(self, y, x, factor):
        vector, unravel = ravel_pytree(y)
        if factor is None and vector.size <= _SMALL:
            return None
        _, product = jax.linearize(lambda vector: ravel_pytree(self.optimality(unravel(vector), x))[0], vector)
        operator = lx.FunctionLinearOperator(product, jax.ShapeDtypeStruct(vector.shape, vector.dtype))
        # As many products as elimination would need to see the matrix, or what a slow contraction needs.
        solver = NearIdentity(tolerances(vector.dtype).solver, max_steps=min(vector.size, 1000))
        return LinearSystem(operator, solver, NearIdentityState(operator, factor))
