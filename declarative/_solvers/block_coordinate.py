r"""Cyclic block coordinate descent with a separable prox, as an optimistix minimiser.

$$ y_i \leftarrow \mathrm{prox}_{s_i g_i}\big(y_i - s_i\nabla_i f(y)\big), \qquad i = 1, \dots, m, \quad\text{in turn}       \tag{1} $$

The blocks are the entries of y along its first axis. $1/s_i$ is the curvature of f within the block, the largest row sum of the block of
its Hessian (exact for a block of one entry), taken at the guess and doubled whenever a move meets more. Each move sees the
moves before it, and its step knows its own block only: far fewer sweeps than proximal gradient where blocks are scaled
differently. A sweep, one step of the solver, costs 2 m gradients of f, since f is any function: for the lasso, `Lasso` has a kernel of its own.

Reference: Tseng 2001, *Convergence of a block coordinate descent method for nondifferentiable minimization*; Beck & Tetruashvili 2013.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Bool, Float, PyTree

from .._core.arguments import check_tolerances, require_tolerances
from .._core.implicit import detach_tree
from .._linear.norms import largest, maximum


class _State(eqx.Module):
    steps: Float[Array, " m"]
    settled: Bool[Array, ""]


class BlockCoordinateDescent(optx.AbstractMinimiser):
    """For `optimistix.minimise(fn, BlockCoordinateDescent(rtol, atol, prox), y0, args)`; `y0` is one array, its rows the blocks.

    To differentiate the solution, give it to `ProximalArgmin`: see `ProximalGradient`.

    - `rtol`, `atol`: it stops where a sweep changes no entry by more than `rtol * max|y| + atol`. None, for both: those of the dtype, in
      `ProximalArgmin`.
    - `prox(v, args, step)`: as for `ProximalGradient`, block by block separable; it sees all of y, and its block i is used. None:
      that of the node, in `ProximalArgmin`; else g = 0.
    """

    rtol: Any
    atol: Any
    prox: Callable[[PyTree, PyTree, Any], PyTree] | None
    # What optimistix asks of a solver; no use is made of it.
    norm: Any = eqx.field(static=True)

    def __init__(self, rtol: Any = None, atol: Any = None, prox: Callable[[PyTree, PyTree, Any], PyTree] | None = None):
        check_tolerances(rtol, atol)
        self.rtol, self.atol, self.prox, self.norm = rtol, atol, prox, optx.max_norm

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        del options, f_struct, aux_struct, tags
        require_tolerances(self, "ProximalArgmin")
        if not eqx.is_array(y) or y.ndim == 0:
            raise ValueError(
                "BlockCoordinateDescent takes one array with at least one axis for y: its rows are the blocks."
            )
        fn, y, args = detach_tree((fn, y, args))

        def curvature(i):
            within = lambda block: _gradient(fn, y.at[i].set(block), args)[i]
            hessian = jax.jacfwd(within)(y[i]).reshape(y[i].size, y[i].size)
            return maximum(jnp.sum(jnp.abs(hessian), axis=1))

        found = jax.lax.map(curvature, jnp.arange(y.shape[0]))
        return _State(1 / jnp.where((found > 0) & jnp.isfinite(found), found, 1), jnp.zeros((), bool))

    def step(self, fn, y, args, options, state, tags):
        del options, tags
        _, aux = fn(y, args)
        still_fn, still_args = detach_tree((fn, args))

        def visit(carry, i):
            y, steps = carry
            gradient, step = _gradient(fn, y, args)[i], steps[i]
            moved = self._moved(y, gradient, args, step, i)
            before, after, slope = jax.lax.stop_gradient((y, moved, gradient))
            change = after[i] - before[i]
            curved = jnp.sum((_gradient(still_fn, after, still_args)[i] - slope) * change)
            # A step that was too long is taken back, and is shorter the next time.
            long = ~(step * curved <= jnp.sum(change**2) * (1 + 1e-3)) & (largest(change) > 0)
            return (jnp.where(long, y, moved), steps.at[i].set(jnp.where(long, step / 2, step))), long

        start = (y, jax.lax.stop_gradient(state.steps))
        (new, steps), long = jax.lax.scan(visit, start, jnp.arange(y.shape[0]))
        settled = (largest(new - y) <= self.rtol * largest(new) + self.atol) & ~jnp.any(long)
        return new, _State(steps, jax.lax.stop_gradient(settled)), aux

    def _moved(self, y, gradient, args, step, i):
        v = y.at[i].add(-step * gradient)
        return v if self.prox is None else y.at[i].set(self.prox(v, args, step)[i])

    def terminate(self, fn, y, args, options, state, tags):
        del fn, y, args, options, tags
        return state.settled, optx.RESULTS.successful

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        del fn, args, options, state, tags, result
        return y, aux, {}


def _gradient(fn, y, args):
    return jax.grad(lambda y: fn(y, args)[0])(y)
