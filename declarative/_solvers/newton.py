r"""Newton's method for F(y) = 0, as an optimistix root finder that judges steps, not residuals.

optimistix's stops when |F| falls below an absolute tolerance, which depends on how F is scaled; this one where the step of the
largest entry is at most `rtol * max|y| + atol`. Convergence being quadratic, the iterate is then far better than that. An exact root
ends the iteration before the Jacobian, which may be singular there, is asked for a step.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import optimistix as optx
from jaxtyping import Array, Bool

from .._core.implicit import largest


class _State(eqx.Module):
    settled: Bool[Array, ""]
    result: Any


class Newton(optx.AbstractRootFinder):
    """Newton's method with the given linear solver."""

    rtol: Any
    atol: Any
    linear_solver: lx.AbstractLinearSolver
    norm: Any = eqx.field(static=True, default=optx.max_norm)

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        del fn, y, args, options, f_struct, aux_struct, tags
        return _State(jnp.zeros((), bool), optx.RESULTS.successful)

    def step(self, fn, y, args, options, state, tags):
        del options, state
        value, aux = fn(y, args)
        operator = lx.JacobianLinearOperator(lambda y, args: fn(y, args)[0], y, args, tags=tags)
        solution = lx.linear_solve(operator, value, self.linear_solver, throw=False)
        root = largest(value) == 0
        step = jtu.tree_map(lambda leaf: jnp.where(root, 0, leaf), solution.value)
        new = jtu.tree_map(jnp.subtract, y, step)
        settled = root | (largest(step) <= self.rtol * largest(new) + self.atol)
        result = optx.RESULTS.promote(solution.result)
        return new, _State(settled, optx.RESULTS.where(settled, optx.RESULTS.successful, result)), aux  # pyright: ignore

    def terminate(self, fn, y, args, options, state, tags):
        del fn, y, args, options, tags
        return state.settled, state.result

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        del fn, args, options, state, tags, result
        return y, aux, {}
