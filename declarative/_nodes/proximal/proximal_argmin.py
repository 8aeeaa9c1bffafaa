r"""Minimiser of a smooth function of the user plus one whose proximity operator is known.

**Problem.**     $y^*(x) = \arg\min_y f(y, x) + g(y, x)$, f smooth, g convex, given by its prox (an indicator's: a projection)        (P)
**Optimality.**  $F(y, x) = \mathrm{prox}_{sg}(y - s\nabla_y f(y, x)) - y$, for any $s > 0$                                             (K1)
**Solver.**      Accelerated proximal gradient with adaptive restart.
**Gradient.**    Implicit function theorem on (K1). With D the Jacobian of the prox, $\partial_y F = D(I - s\nabla^2 f) - I$; where D has a
                 row of zeros, so that the entry stays at zero (or at its bound), that row is $-I$, and with more than 512 unknowns the
                 system is solved on the others only, by conjugate gradients on products.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

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
from ..._core.implicit import LinearSystem, Run, detach_tree, typical_scale
from ..._core.node import AbstractDeclarativeNode, Policy, make_policy
from ..._core.results import RESULTS, choose
from ..._core.tolerances import check_rtol, solver_rtol, tolerances, with_tolerances, zero_tolerance
from ..._linear.norms import norm
from ..._linear.support import ConjugateGradients, Restricted
from ..._solvers.proximal_gradient import ProximalGradient
from ..generic.root import check_function, check_shape, check_solver, require_guess

_DENSE = 512  # unknowns, as for every node: dense elimination up to here


class ProximalArgmin(AbstractDeclarativeNode):
    """A layer that minimises `objective(y, x)` plus what `prox` is the proximity operator of. Called as `node(x, y0=guess)`.

    **Arguments:**

    - `objective`: `objective(y, x) -> scalar`, f: twice differentiable. Arrays that it closes over get their gradients, as those of `prox` do.
    - `prox`: `prox(v, x, step) -> y`, shaped like v: the proximity operator of `step * g` at v, for the data x. Those of this library
      fit where x are their parameters; else `lambda v, x, step: dn.prox_lasso(v, x["lam"], step)`. For a convex set, its
      projection: `lambda v, x, step: project(v)`. It must be differentiable in forward mode, and is where the solution's kinks come from.
    - `solver`: any optimistix minimiser that knows the prox (`ProximalGradient`, `ProjectedGradient`, `MirrorDescent`,
      `BlockCoordinateDescent`), used as it is, but for a prox and tolerances that it leaves open; None: `ProximalGradient()`.
    - `adjoint`: how gradients flow; None: `ImplicitAdjoint()`. Neumann and one-step adjoints need `step_size`.
    - `step_size`: s, in (K1), in `step` and for the default solver, which diverges unless it is at most 1 / (largest curvature of f).
      None: found from curvatures.
    - `throw`, `on_failure`, `max_steps`: see `Policy`.

    **Returns:** `y`, a pytree like `y0`: a point of (K1) about which f + g is not concave along one fixed direction of those that the
    prox leaves open (else `RESULTS.indefinite`). A solver that knows another prox, or none, ends in `RESULTS.not_a_solution`. No gradient
    flows to `y0` except through `UnrolledAdjoint`.
    **Raises:** as `Argmin`.
    **Reference:** Parikh & Boyd 2014, *Proximal algorithms*, section 4.2: (K1); Bertrand et al. 2022, arXiv:2105.01637 (the support).
    """

    fn: Callable
    prox: Callable
    solver: optx.AbstractMinimiser | None
    adjoint: optx.AbstractAdjoint | None
    step_size: float | Float[Array, ""] | None
    policy: Policy

    smoothness: ClassVar[str] = "not declared"

    def __init__(
        self,
        objective: Callable[[PyTree, PyTree], Float[Array, ""]],
        prox: Callable[[PyTree, PyTree, Any], PyTree],
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
        if not callable(prox):
            raise ValueError(f"prox must be a function of (v, x, step), got {type(prox).__name__}.")
        self.prox = prox
        self.solver = check_solver(
            solver, (optx.AbstractMinimiser,), "ProximalArgmin", "minimiser (`ProximalGradient` and its like)"
        )
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
        fn = close(self.fn, y0, x)
        shape = eqx.filter_eval_shape(fn, y0, x)
        if not hasattr(shape, "shape") or shape.shape != () or not jnp.issubdtype(shape.dtype, jnp.floating):
            raise ValueError(f"objective must return a floating scalar, got {shape}.")
        prox = close(self.prox, y0, x, jnp.ones((), ravel_pytree(y0)[0].dtype))
        check_shape(self, lambda y, x: prox(y, x, jnp.ones((), ravel_pytree(y)[0].dtype)), y0, x, "prox(v, x, step)")
        return eqx.tree_at(lambda node: (node.fn, node.prox), self, (fn, prox))

    def step(self, y, x):
        """The proximal gradient step whose fixed points are the solutions."""
        size = self._step_size(y, x)
        moved = jtu.tree_map(lambda y, g: y - size.astype(y.dtype) * g, y, jax.grad(self.fn)(y, x))
        return self.prox(moved, x, size)

    def optimality(self, y, x):
        return jtu.tree_map(jnp.subtract, self.step(y, x), y)

    def _step_size(self, y, x) -> Float[Array, ""]:
        """s of (K1): given, or the inverse of a typical curvature. Whatever it is, the solution is the same, so it has no gradient."""
        vector, unravel = ravel_pytree(y)
        if self.step_size is not None:
            return jnp.asarray(self.step_size).astype(vector.dtype)
        fn, vector, x = detach_tree((self.fn, vector, x))
        direction = jnp.cos(jnp.arange(1, vector.size + 1).astype(vector.dtype))
        gradient = lambda v: ravel_pytree(jax.grad(fn)(unravel(v), x))[0]
        curvature = norm(jax.jvp(gradient, (vector,), (direction,))[1]) / norm(direction)
        usable = (curvature > 0) & jnp.isfinite(curvature)
        return jnp.where(usable, 1 / jnp.where(usable, curvature, 1), 1)

    def run(self, x, y0, loop):
        dtype = jnp.result_type(*jtu.tree_leaves(y0))
        check_rtol(self.solver, dtype)
        tol, scale = tolerances(dtype), typical_scale(lambda y: self.optimality(y, x), y0)
        solver = ProximalGradient(step_size=self.step_size) if self.solver is None else self.solver
        solver = with_tolerances(solver, tol.solver, zero_tolerance(tol.solver) * scale)
        if getattr(solver, "prox", self.prox) is None:
            solver = eqx.tree_at(lambda s: s.prox, solver, self.prox, is_leaf=lambda leaf: leaf is None)
        out = optx.minimise(
            self.fn, solver, y0, x, max_steps=self.policy.max_steps, adjoint=PlainLoop(loop), throw=False
        )
        result = choose(self._concave(out.value, x), RESULTS.indefinite, RESULTS.promote(out.result))
        return Run(out.value, result, out.stats["num_steps"], rtol=solver_rtol(self.solver), scale=scale)

    def _concave(self, y, x):
        """Whether f + g curves down, beyond rounding, along what the prox makes of one fixed direction.

        With D the Jacobian of the prox and u = Dd, the second derivative of s(f + g) along u is s u.Hu + u.(d - u).
        """
        fn, prox, x, y = detach_tree((self.fn, self.prox, x, y))
        vector, unravel = ravel_pytree(y)
        size = self._step_size(y, x)
        gradient = lambda v: ravel_pytree(jax.grad(fn)(unravel(v), x))[0]
        d = jnp.cos(jnp.arange(1, vector.size + 1).astype(vector.dtype))
        moved = vector - size * gradient(vector)
        u = jax.jvp(lambda v: ravel_pytree(prox(unravel(v), x, size))[0], (moved,), (d,))[1]
        bent = size * jax.jvp(gradient, (vector,), (u,))[1]
        # D is about 1 at most, so u is known to about eps.
        eps = float(jnp.finfo(vector.dtype).eps)
        noise = eps**0.5 * norm(u) * (norm(bent) + norm(d - u)) + 64 * eps * norm(d) ** 2
        return u @ bent + u @ (d - u) < -noise

    def linear_system(self, y, x, factor):
        del factor
        vector, unravel = ravel_pytree(y)
        if vector.size <= _DENSE:
            return None
        residual = lambda v: ravel_pytree(self.optimality(unravel(v), x))[0]
        _, product = jax.linearize(residual, vector)
        # The rows of D that are zero: those through which no direction passes.
        step = self._step_size(y, x)
        v = jtu.tree_map(lambda y, g: y - step.astype(y.dtype) * g, y, jax.grad(self.fn)(y, x))
        direction = unravel(1 + jnp.cos(jnp.arange(1, vector.size + 1).astype(vector.dtype)) / 2)
        support = ravel_pytree(jax.jvp(lambda v: self.prox(v, x, step), (v,), (direction,))[1])[0] != 0
        struct = jax.ShapeDtypeStruct(vector.shape, vector.dtype)
        return LinearSystem(Restricted(lx.FunctionLinearOperator(product, struct), support), ConjugateGradients())
