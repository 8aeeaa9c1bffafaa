r"""Accelerated proximal gradient descent, as an optimistix minimiser.

$$ y^+ = \mathrm{prox}_{sg}(z - s\nabla f(z)), \quad z^+ = y^+ + \tfrac{t - 1}{t^+}(y^+ - y), \quad t^+ = (1 + \sqrt{1 + 4t^2})/2   \tag{1} $$

minimises f + g, f smooth. The momentum is dropped ($t = 1$) when it points uphill, $\langle z - y^+, y^+ - y\rangle > 0$: with that, the method
is as fast as if it knew the strong convexity. The step s is halved until $s\langle\nabla f(y^+) - \nabla f(z), y^+ - z\rangle \le \|y^+ - z\|^2$,
the curvature that it met. (The usual test compares values of f, which near a solution agree in all their digits.)

It stops on the natural residual, $\max|y^+ - z| \le$ `rtol` $\max|y^+|$ + `atol`, z being where (1) was evaluated: zero at a solution
and only there, and no momentum in it that could make two iterates agree by chance.

References: Beck & Teboulle 2009 (FISTA); O'Donoghue & Candès 2015, *Adaptive restart for accelerated gradient schemes*, section 3.2
(the gradient scheme), arXiv:1204.3982.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from .._core.arguments import check_tolerances, require_tolerances
from .._core.implicit import detach_tree
from .._linear.norms import largest, norm

_HALVINGS = 60


class _State(eqx.Module):
    z: Float[Array, " n"]
    momentum: Float[Array, ""]
    step: Float[Array, ""]
    settled: Bool[Array, ""]


class ProximalGradient(optx.AbstractMinimiser):
    """For `optimistix.minimise(fn, ProximalGradient(rtol, atol, prox), y0, args)`, or
    `ProximalArgmin(objective, prox, solver=ProximalGradient(accelerate=False))`.

    Differentiate `ProximalArgmin`. The default adjoint of a plain `optx.minimise` differentiates "the gradient of fn vanishes", and knows
    nothing of a prox: its gradient would be wrong. (`adjoint=UnrolledAdjoint()` is right there.)

    - `rtol`, `atol`: it stops where a step changes the largest entry by at most `rtol * max|y| + atol`. None, for both: those of the
      dtype, in `ProximalArgmin`.
    - `prox(v, args, step)`: the proximity operator of `step * g` at v, for the `args` of the objective. Those of this library fit where
      args are their parameters; else write `lambda v, args, step: prox_lasso(v, args["lam"], step)`. None: that of the node, in
      `ProximalArgmin`; else g = 0.
    - `step_size`: s, used as it is, below 1 / (largest curvature of f); None: found on the way.
    - `accelerate`: False for plain proximal gradient steps.
    """

    rtol: Any
    atol: Any
    prox: Callable[[PyTree, PyTree, Any], PyTree] | None
    step_size: Any
    accelerate: bool = eqx.field(static=True)
    # What optimistix asks of a solver; no use is made of it.
    norm: Any = eqx.field(static=True)

    def __init__(
        self,
        rtol: Any = None,
        atol: Any = None,
        prox: Callable[[PyTree, PyTree, Any], PyTree] | None = None,
        step_size: Any = None,
        accelerate: bool = True,
    ):
        check_tolerances(rtol, atol)
        self.rtol, self.atol, self.prox, self.step_size = rtol, atol, prox, step_size
        self.accelerate, self.norm = accelerate, optx.max_norm

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        del options, f_struct, aux_struct, tags
        require_tolerances(self, "ProximalArgmin")
        vector, unravel = ravel_pytree(y)
        one = jnp.ones((), vector.dtype)
        if self.step_size is None:
            still_fn, still, still_args = detach_tree((fn, vector, args))
            step = first_step(still_fn, still, still_args, unravel)
        else:
            step = jnp.asarray(self.step_size).astype(vector.dtype)
        return _State(vector, one, step, jnp.zeros((), bool))

    def step(self, fn, y, args, options, state, tags):
        del options, tags
        before, unravel = ravel_pytree(y)
        gradient, aux = gradient_of(fn, state.z, args, unravel)

        def move(z, gradient, args, step):
            v = unravel(z - step * gradient)
            return ravel_pytree(v if self.prox is None else self.prox(v, args, step))[0]

        step = state.step
        if self.step_size is None:
            # The search decides and is not differentiated.
            still_fn, z, still_args, slope = detach_tree((fn, state.z, args, gradient))

            def fits(step):
                new = move(z, slope, still_args, step)
                change = new - z
                curved = jnp.vdot(gradient_of(still_fn, new, still_args, unravel)[0] - slope, change)
                return step * curved <= norm(change) ** 2 * (1 + 1e-3)  # False for NaN

            step = jax.lax.stop_gradient(search(fits, step))
        new = move(state.z, gradient, args, step)
        settled = jax.lax.stop_gradient(largest(new - state.z) <= self.rtol * largest(new) + self.atol)
        if not self.accelerate:
            return unravel(new), _State(new, state.momentum, step, settled), aux
        uphill = jax.lax.stop_gradient(jnp.vdot(state.z - new, new - before) > 0)
        t = jnp.where(uphill, 1, state.momentum)
        following = (1 + jnp.sqrt(1 + 4 * t * t)) / 2
        z = new + jnp.where(uphill, 0, (t - 1) / following) * (new - before)
        # A step that one steep place made small may grow again.
        step = jnp.where(uphill & (self.step_size is None), 1.5 * step, step)
        return unravel(new), _State(z, following, step, settled), aux

    def terminate(self, fn, y, args, options, state, tags):
        del fn, y, args, options, tags
        return state.settled, optx.RESULTS.successful

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        del fn, args, options, state, tags, result
        return y, aux, {}


class ProjectedGradient(optx.AbstractMinimiser):
    """`ProximalGradient` onto a convex set: `projection(v, args)` is the Euclidean projection of v, for the `args` of the
    objective. To differentiate the solution, see `ProximalGradient`."""

    rtol: Any
    atol: Any
    projection: Callable[[PyTree, PyTree], PyTree]
    step_size: Any
    accelerate: bool = eqx.field(static=True)
    norm: Any = eqx.field(static=True)

    def __init__(
        self,
        rtol: Any,
        atol: Any,
        projection: Callable[[PyTree, PyTree], PyTree],
        step_size: Any = None,
        accelerate: bool = True,
    ):
        check_tolerances(rtol, atol)
        self.rtol, self.atol, self.projection, self.step_size = rtol, atol, projection, step_size
        self.accelerate, self.norm = accelerate, optx.max_norm

    @property
    def _solver(self) -> ProximalGradient:
        prox = lambda v, args, step: self.projection(v, args)
        return ProximalGradient(self.rtol, self.atol, prox, self.step_size, self.accelerate)

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        return self._solver.init(fn, y, args, options, f_struct, aux_struct, tags)

    def step(self, fn, y, args, options, state, tags):
        return self._solver.step(fn, y, args, options, state, tags)

    def terminate(self, fn, y, args, options, state, tags):
        return self._solver.terminate(fn, y, args, options, state, tags)

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        return self._solver.postprocess(fn, y, aux, args, options, state, tags, result)


def gradient_of(fn, vector: Float[Array, " n"], args: PyTree, unravel: Callable) -> tuple[Float[Array, " n"], Any]:
    """The gradient of an optimistix objective, and its auxiliary output."""
    return jax.grad(lambda v: fn(unravel(v), args), has_aux=True)(vector)


def first_step(fn, vector: Float[Array, " n"], args: PyTree, unravel: Callable) -> Float[Array, ""]:
    """The inverse of the curvature along the gradient: at least 1 / (largest curvature), in the units of the problem."""
    slope = lambda v: gradient_of(fn, v, args, unravel)[0]
    gradient = slope(vector)
    size = norm(gradient)
    # Where the gradient vanishes, any direction will do.
    direction = jnp.where(
        size > 0, gradient / jnp.where(size > 0, size, 1), jnp.cos(jnp.arange(vector.size).astype(vector.dtype))
    )
    curvature = norm(jax.jvp(slope, (vector,), (direction,))[1])
    flat = ~(curvature > 0) | ~jnp.isfinite(curvature)
    # A flat objective says nothing of a scale but that of the guess.
    length = jnp.where(
        (size > 0) & jnp.isfinite(size), jnp.maximum(largest(vector), 1) / jnp.where(size > 0, size, 1), 1
    )
    return jax.lax.stop_gradient(jnp.where(flat, length, 1 / jnp.where(flat, 1, curvature)))


def search(fits: Callable[[Any], Any], step: Float[Array, ""]) -> Float[Array, ""]:
    """The first of step, step / 2, step / 4 ... that fits; unrollable, since nothing in it is differentiated."""
    going = lambda carry: ~carry[1] & (carry[2] < _HALVINGS)

    def halve(carry):
        step, _, count = carry
        return step / 2, fits(step / 2), count + 1

    return jax.lax.while_loop(going, halve, (step, fits(step), jnp.zeros((), jnp.int32)))[0]
