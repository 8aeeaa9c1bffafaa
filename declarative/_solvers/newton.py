r"""Newton's method for F(y) = 0, as an optimistix root finder that judges steps, not residuals.

optimistix's stops when |F| falls below an absolute tolerance, which depends on how F is scaled; this one where the step of the
largest entry is at most `rtol * max|y| + atol`. Convergence being quadratic, the iterate is then far better than that. An exact root
ends the iteration before the Jacobian, which may be singular there, is asked for a step.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool

from .._core.implicit import LinearSystem, solve_system
from .._linear.norms import largest


class _State(eqx.Module):
    settled: Bool[Array, ""]
    result: Any


class Newton(optx.AbstractRootFinder):
    """Newton's method with the given linear solver; `tags` are lineax's, of the Jacobian."""

    rtol: Any
    atol: Any
    linear_solver: lx.AbstractLinearSolver
    tags: Any = eqx.field(static=True, default=())
    norm: Any = eqx.field(static=True, default=optx.max_norm)

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        del fn, y, args, options, f_struct, aux_struct, tags
        return _State(jnp.zeros((), bool), optx.RESULTS.successful)

    def step(self, fn, y, args, options, state, tags):
        del options, state, tags
        vector, unravel = ravel_pytree(y)
        _, aux = fn(y, args)
        value, jacobian = jax.linearize(lambda v: ravel_pytree(fn(unravel(v), args)[0])[0], vector)
        root = largest(value) == 0
        struct = jax.ShapeDtypeStruct(vector.shape, vector.dtype)

        def solve(matvec, b):
            inner = lambda v: matvec(jnp.append(v, 0))[:-1]
            system = LinearSystem(lx.FunctionLinearOperator(inner, struct, self.tags), self.linear_solver)
            solution, code = solve_system(system, b[:-1])
            return jnp.append(solution, code.astype(b.dtype))

        # Unrolled, this solve is differentiated, and lineax's own derivative raises through a host callback whatever happens. The
        # status rides along as one more entry (an auxiliary output of `custom_linear_solve` cannot be batched).
        extended = lambda v: jnp.append(jacobian(v[:-1]), v[-1])
        solution = jax.lax.custom_linear_solve(extended, jnp.append(value, 0), solve, solve)
        step, code = jnp.where(root, 0, solution[:-1]), jax.lax.stop_gradient(solution[-1])
        new = vector - step
        settled = root | (largest(step) <= self.rtol * largest(new) + self.atol)
        failed = optx.RESULTS.where((code == 0) | settled, optx.RESULTS.successful, optx.RESULTS.singular)  # pyright: ignore
        return unravel(new), _State(settled, failed), aux

    def terminate(self, fn, y, args, options, state, tags):
        del fn, y, args, options, tags
        return state.settled, state.result

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        del fn, args, options, state, tags, result
        return y, aux, {}
