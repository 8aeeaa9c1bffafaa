r"""Mirror descent, as an optimistix minimiser.

$$ y^+ = \arg\min_{w \in C} \langle\nabla f(y), w\rangle + D_\varphi(w, y)/s                                                      \tag{1} $$

With the negative entropy for $\varphi$: $y^+ \propto y\,e^{-s\nabla f(y)}$ on the simplex, $y^+ = y\,e^{-s\nabla f(y)}$ on the positive orthant.
The step s is halved until $\langle\nabla f(y^+), y^+ - y\rangle \le 0$ (no step goes beyond the minimum along itself, so none climbs), and grows by
a half after a step that was taken at once.

It stops on the natural residual of the Euclidean problem, $|\min(y_i, s_E(\partial_i f - \nu))| \le$ `rtol` $\max|y|$ + `atol`, with
$\nu = \langle y, \nabla f\rangle$ on the simplex, 0 on the orthant, and $s_E$ the inverse of the curvature at the guess. Small moves would not do:
an entry near zero moves little whatever its gradient is. With a mirror of your own, on the move.

Reference: Beck & Teboulle 2003, *Mirror descent and nonlinear projected subgradient methods for convex optimization*.
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
from .._linear.norms import largest
from .proximal_gradient import first_step, gradient_of, search


class _State(eqx.Module):
    step: Float[Array, ""]
    euclidean: Float[Array, ""]
    settled: Bool[Array, ""]


class MirrorDescent(optx.AbstractMinimiser):
    """For `optimistix.minimise(fn, MirrorDescent(rtol, atol), y0, args)`, from a `y0` whose entries are all positive.

    To differentiate the solution, give it to `ProximalArgmin`: see `ProximalGradient`.

    - `rtol`, `atol`: it stops where the natural residual (see the module) is at most `rtol * max|y| + atol`. None, for both:
      those of the dtype, in `ProximalArgmin`.
    - `geometry`: "simplex": entries sum to one (all those of the pytree); "orthant": positive; or a function
      `move(y, gradient, step, args)` that returns the y of (1) for a Bregman divergence of your own.
    - `step_size`: s, used as it is; None: found on the way.

    Where the solution has zeros, entries tend to them linearly at best, and slower where the gradient vanishes there as well:
    `ProjectedGradient` sets them to zero.
    """

    rtol: Any
    atol: Any
    geometry: str | Callable[[PyTree, PyTree, Any, PyTree], PyTree]
    step_size: Any
    # What optimistix asks of a solver; no use is made of it.
    norm: Any = eqx.field(static=True)

    def __init__(
        self,
        rtol: Any = None,
        atol: Any = None,
        geometry: str | Callable[[PyTree, PyTree, Any, PyTree], PyTree] = "simplex",
        step_size: Any = None,
    ):
        if not callable(geometry) and geometry not in ("simplex", "orthant"):
            raise ValueError(f'geometry must be "simplex", "orthant" or a function, got {geometry!r}.')
        check_tolerances(rtol, atol)
        self.rtol, self.atol, self.geometry, self.step_size, self.norm = rtol, atol, geometry, step_size, optx.max_norm

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        del options, f_struct, aux_struct, tags
        require_tolerances(self, "ProximalArgmin")
        vector, unravel = ravel_pytree(y)
        still_fn, still, still_args = detach_tree((fn, vector, args))
        euclidean = first_step(still_fn, still, still_args, unravel)
        # The curvature of the entropy is 1 / y.
        step = (
            euclidean / jnp.maximum(largest(vector), float(jnp.finfo(vector.dtype).tiny))
            if self.step_size is None
            else self.step_size
        )
        step = jax.lax.stop_gradient(jnp.asarray(step).astype(vector.dtype))
        return _State(step, euclidean, jnp.zeros((), bool))

    def step(self, fn, y, args, options, state, tags):
        del options, tags
        vector, unravel = ravel_pytree(y)
        gradient, aux = gradient_of(fn, vector, args, unravel)
        step, tried = state.step, state.step
        if self.step_size is None:
            eps = float(jnp.finfo(vector.dtype).eps)
            still_fn, z, still_args, here = detach_tree((fn, vector, args, gradient))

            def fits(step):
                new = self._move(z, here, step, still_args, unravel)
                slope, change = gradient_of(still_fn, new, still_args, unravel)[0], new - z
                # On the simplex a constant in the gradient does nothing but round.
                slope = slope - jnp.vdot(new, slope) if self.geometry == "simplex" else slope
                noise = 16 * eps * (jnp.abs(slope) + largest(slope) * eps**0.5) @ jnp.abs(change)
                return jnp.vdot(slope, change) <= noise

            step = jax.lax.stop_gradient(search(fits, step))
        new = self._move(vector, gradient, step, args, unravel)
        if callable(self.geometry):
            residual = largest(new - vector)
        else:
            level = jnp.vdot(vector, gradient) if self.geometry == "simplex" else 0
            residual = largest(jnp.minimum(vector, state.euclidean * (gradient - level)))
        settled = jax.lax.stop_gradient(residual <= self.rtol * largest(vector) + self.atol)
        grown = jnp.where(step == tried, 1.5 * step, step) if self.step_size is None else step
        return unravel(jnp.where(settled, vector, new)), _State(grown, state.euclidean, settled), aux

    def terminate(self, fn, y, args, options, state, tags):
        del fn, y, args, options, tags
        return state.settled, optx.RESULTS.successful

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        del fn, args, options, state, tags, result
        return y, aux, {}

    def _move(self, vector, gradient, step, args, unravel):
        if callable(self.geometry):
            return ravel_pytree(self.geometry(unravel(vector), unravel(gradient), step, args))[0]
        if self.geometry == "orthant":
            return vector * jnp.exp(-step * gradient)
        # The least gradient among the entries that live: nothing overflows, and something is left to divide by.
        alive = vector > 0
        least = jax.lax.stop_gradient(jnp.min(jnp.where(alive, gradient, jnp.inf)))
        weights = jnp.where(alive, vector * jnp.exp(-step * jnp.where(alive, gradient - least, 0)), 0)
        total = jnp.sum(weights)
        return weights / jnp.where(total > 0, total, 1) + jnp.where(jnp.isnan(total), jnp.nan, 0)
