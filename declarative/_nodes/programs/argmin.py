r"""Constrained minimiser of a user's objective: the general deep declarative node.

**Problem.**     $y^*(x) = \arg\min_y f(y, x)$ subject to $h(y, x) = 0$, $g(y, x) \le 0$, locally, from a guess    (P)
**Optimality.**  $\nabla_y f + \sum_i \nu_i \nabla_y h_i + \sum_i \lambda_i \nabla_y g_i = 0$ (K1),  $h = 0$ (K2),
                 $-\min(w \circ \lambda, -g) = 0$ (K3). The weights $w_i > 0$ only put $\lambda_i$ in the unit of $g_i$.
**Solver.**      `_solvers/augmented_lagrangian.py`: augmented Lagrangian with exact Hessians, then Newton on (K1)-(K3), to rounding; a
                 check of the second-order conditions at the end. Dense: meant for up to about a hundred unknowns.
**Gradient.**    Implicit function theorem on (K1)-(K3): one bordered system, solved by LU with pivoting, since the Hessian $H$ of the
                 Lagrangian may be indefinite where $y^*$ is a minimiser all the same. With $A$ the gradients of equations and active
                 inequalities and $H$, this is Gould et al.'s $\mathrm Dy = H^{-1}A^\top(AH^{-1}A^\top)^{-1}(AH^{-1}B - C) - H^{-1}B$,
                 without $H^{-1}$.
                 Not differentiable where an inequality is weakly active ($g_i = \lambda_i = 0$): the derivative is then one-sided, with the
                 constraint active exactly if its computed multiplier is positive. If gradients of active constraints depend on one
                 another, or the minimiser is not isolated, the system is singular, which is a status; see `dependent`, `minimum_norm`.

| symbol      | code         | shape            | meaning                                     |
|-------------|--------------|------------------|---------------------------------------------|
| $y$         | `primal`     | as `y0`          | unknown                                     |
| $\nu$       | `equality`   | as $h$ returns   | multipliers of equations                    |
| $\lambda$   | `inequality` | as $g$ returns   | multipliers of inequalities, not negative   |

References: Gould, Hartley & Campbell 2019, *Deep Declarative Networks*, arXiv:1909.04866, Propositions 4.5, 4.6 and Section 4.5 (non-unique
solutions); Fiacco 1976 (sensitivity of nonlinear programs).
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from ..._core.adjoint import AbstractAdjoint, refuse_unrolling
from ..._core.closure import close
from ..._core.implicit import LinearSystem, Run, solve_system
from ..._core.node import AbstractDeclarativeNode, Policy, envelope, make_policy
from ..._core.results import RESULTS, choose
from ..._linear.norms import largest, norm
from ..._linear.saddle import Saddle, SaddleSolver
from ..._solvers import augmented_lagrangian as algorithm
from ..generic.root import check_function, require_guess

_MAX_STEPS = 500


class LagrangePoint(eqx.Module):
    """The unknown of (K1)-(K3): the primal, and multipliers shaped like what the constraint functions return (None: no function)."""

    primal: PyTree
    equality: PyTree = None
    inequality: PyTree = None


class LagrangeMultipliers(eqx.Module):
    """Duals of a constrained argmin, shaped like what the constraint functions return; `slack` is -g."""

    equality: PyTree = None
    inequality: PyTree = None
    slack: PyTree = None


class GivenSolution(eqx.Module):
    """As `solver` of a `ConstrainedArgmin`: `y0` is the solution, found elsewhere.

    Multipliers are those that fit (K1) best, non-negative for inequalities that hold with equality, and the conditions are checked as
    those of any solution: `not_a_solution`, `indefinite`. `rtol`: the relative accuracy of what is given; None: that of the dtype.
    """

    rtol: float | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if self.rtol is not None and not 0 < self.rtol < 1:
            raise ValueError(f"rtol must lie between 0 and 1, or be None, got {self.rtol!r}.")


class ConstrainedArgmin(AbstractDeclarativeNode):
    r"""A layer that minimises `objective(y, x)` over `y` under constraints. Called as `node(x, y0=guess)` on one example; `jax.vmap` for batches.

        nearest = dn.ConstrainedArgmin(lambda y, x: jnp.sum((y - x) ** 2), equality=lambda y, x: jnp.sum(y**2) - 1)
        nearest(x, y0=jnp.ones(3))

    **Arguments:**

    - `objective`: `objective(y, x) -> scalar`; `equality`, `inequality`: None, or functions `(y, x) -> pytree`, to be zero and not
      positive. `y` and `x` are pytrees. All must be twice differentiable; arrays that they close over, and those of an Equinox
      module passed as a function, get their gradients.
    - `solver`: None: as above; `GivenSolution()`: `y0` is the solution already, and is only checked and differentiated.
    - `adjoint`: how gradients flow; None: `ImplicitAdjoint()`. Adjoints that unroll or need a contraction raise.
    - `dependent`: whether gradients of active constraints may depend on one another (False: the gradient's status is then
      `singular_jacobian`; True: the gradient of `y` is the right one wherever there is one; multipliers and their derivatives are those of
      least change. In reverse mode data of constraints that repeat one another share the gradient; forward mode flags data that
      move such constraints apart).
    - `minimum_norm`: whether the minimiser may be one of many (False: `singular_jacobian`; True: `y` moves by the least that keeps it
      a minimiser, and the part of a cotangent along other minimisers is dropped, as by the pseudo-inverse of Gould et al.). Forward mode
      flags a direction in which minimisers stop to exist nearby, reverse mode cannot see it. First derivatives only: more raise.
    - `throw`, `on_failure`, `max_steps` (of Newton's method, 500): see `Policy`.

    **Returns:** `y`, a pytree like `y0`: a local minimiser. `solve` also returns multipliers in `dual` (a `LagrangeMultipliers`), the optimal
    value in `objective`, and in `unknown` a `LagrangePoint`, which is also a `y0`: a warm start. No gradient flows to `y0`.
    **Failures:** `infeasible`: the guess leads to a local minimum of the violation that is not zero (for constraints that are not convex
    there may be feasible points elsewhere); `unbounded`: the objective falls along iterates that run off while constraints hold;
    `indefinite`: a stationary point with negative curvature along active constraints (from where a second start did not get away);
    `not_a_solution`: no multipliers exist (as for $y^2 = 0$), or the dtype does not suffice; `nonfinite`, `nonfinite_data`;
    `nonlinear_max_steps_reached`.
    **Raises:** `ValueError` for a missing `y0`, an objective that is not a scalar, constraints that are not floating point;
    `SolveError` at run time with `throw=True`.
    """

    fn: Callable
    equality: Callable | None
    inequality: Callable | None
    solver: GivenSolution | None
    dependent: bool = eqx.field(static=True)
    minimum_norm: bool = eqx.field(static=True)
    adjoint: optx.AbstractAdjoint | None
    policy: Policy

    smoothness: ClassVar[str] = "piecewise smooth: not differentiable where a constraint is weakly active"

    def __init__(
        self,
        objective: Callable[[PyTree, PyTree], Float[Array, ""]],
        equality: Callable[[PyTree, PyTree], PyTree] | None = None,
        inequality: Callable[[PyTree, PyTree], PyTree] | None = None,
        *,
        solver: GivenSolution | None = None,
        dependent: bool = False,
        minimum_norm: bool = False,
        adjoint: optx.AbstractAdjoint | None = None,
        policy: Policy | None = None,
        throw: bool | None = None,
        on_failure: Literal["nan", "zero"] | None = None,
        max_steps: int | None = None,
    ):
        refuse_unrolling(
            adjoint,
            "would differentiate the search for the active constraints, which has no derivative of use. The implicit gradient is exact: use "
            "ImplicitAdjoint(), or adjoint=None.",
        )
        if solver is not None and not isinstance(solver, GivenSolution):
            got = f"the class {solver.__name__} itself: make an instance" if isinstance(solver, type) else repr(solver)
            raise ValueError(f"solver must be None or a GivenSolution, got {got}.")
        if minimum_norm and not isinstance(adjoint, LeastMotion | None):
            raise ValueError("minimum_norm brings its own adjoint: leave adjoint=None.")
        self.fn = check_function(objective, "objective")
        self.equality = None if equality is None else check_function(equality, "equality")
        self.inequality = None if inequality is None else check_function(inequality, "inequality")
        self.solver = solver
        self.dependent = bool(dependent)
        self.minimum_norm = bool(minimum_norm)
        self.adjoint = LeastMotion() if minimum_norm else adjoint
        if policy is None and max_steps is None:
            max_steps = _MAX_STEPS
        self.policy = make_policy(policy, throw=throw, on_failure=on_failure, max_steps=max_steps)

    def guess(self, x, y0):
        given = y0 if isinstance(y0, LagrangePoint) else LagrangePoint(y0)
        primal = require_guess(self, given.primal, x)
        dtype = jnp.result_type(*jtu.tree_leaves(primal))
        parts = {}
        for name in ("equality", "inequality"):
            fn, guess = getattr(self, name), getattr(given, name)
            shape = None if fn is None else eqx.filter_eval_shape(fn, primal, x)
            if fn is not None and not jtu.tree_leaves(shape):
                raise ValueError(
                    f"{name} returned {shape}, no arrays: is a `return` missing? Pass {name}=None for no constraint."
                )
            for leaf in jtu.tree_leaves(shape):
                if not jnp.issubdtype(getattr(leaf, "dtype", np.dtype(object)), jnp.floating):
                    raise ValueError(f"{name} must return floating-point arrays, got {shape}.")
            if guess is None:
                guess = jtu.tree_map(lambda leaf: jnp.zeros(leaf.shape, dtype), shape)
            elif jtu.tree_map(jnp.shape, guess) != jtu.tree_map(lambda leaf: leaf.shape, shape):
                raise ValueError(f"y0.{name} must be shaped like what {name}(y, x) returns: {shape}.")
            parts[name] = jtu.tree_map(lambda leaf: jnp.asarray(leaf, dtype), guess)
        return LagrangePoint(primal, **parts)

    def bind(self, x, y0):
        fn = close(self.fn, y0.primal, x)
        shape = eqx.filter_eval_shape(fn, y0.primal, x)
        if not hasattr(shape, "shape") or shape.shape != () or not jnp.issubdtype(shape.dtype, jnp.floating):
            raise ValueError(f"objective must return a floating scalar, got {shape}.")
        constraints = [None if each is None else close(each, y0.primal, x) for each in (self.equality, self.inequality)]
        is_none = lambda leaf: leaf is None
        fields = lambda node: (node.fn, node.equality, node.inequality)
        return eqx.tree_at(fields, self, (fn, *constraints), is_leaf=is_none)

    def optimality(self, y: LagrangePoint, x):
        stationarity = jax.grad(lambda primal: self._lagrangian(primal, y.equality, y.inequality, x))(y.primal)  # (K1)
        equality = None if self.equality is None else self.equality(y.primal, x)  # (K2)
        inequality = None
        if self.inequality is not None:
            g, unravel = ravel_pytree(self.inequality(y.primal, x))
            lam = ravel_pytree(y.inequality)[0]
            weights, near = self._units(y.primal, x)
            inequality = unravel(-_smaller(weights * lam, -g, near))  # (K3)
        return LagrangePoint(stationarity, equality, inequality)

    def value(self, y, x):
        return _first_order(y.primal) if self.minimum_norm else y.primal

    def dual(self, y, x):
        if self.equality is None and self.inequality is None:
            return None
        slack = None if self.inequality is None else jtu.tree_map(jnp.negative, self.inequality(y.primal, x))
        dual = LagrangeMultipliers(y.equality, y.inequality, slack)
        return _first_order(dual) if self.minimum_norm else dual

    def objective(self, y, x):
        return envelope(_optimal_value, y, (self, x))

    def kink_distance(self, y, x):
        """In the units of y: of the inequalities, the least of the larger of slack and weighted multiplier."""
        if self.inequality is None:
            return None
        g = ravel_pytree(self.inequality(y.primal, x))[0]
        if g.size == 0:
            return None
        weights, _ = self._units(y.primal, x)
        slopes = self._slopes(y.primal, x)
        apart = jnp.maximum(-g, weights * ravel_pytree(y.inequality)[0])
        return jnp.min(apart / jnp.where(slopes > 0, slopes, 1))

    def run(self, x, y0, loop):
        (vector, unravel), problem, multipliers, split = self._flat(y0, x)
        p = ravel_pytree(y0.equality)[0].size
        objective, constraints = problem
        if self.solver is None:
            steps = self.policy.max_steps
            answer = algorithm.solve(objective, constraints, p, vector, multipliers, steps, loop)
        else:
            answer = algorithm.recover(objective, constraints, p, vector, self.solver.rtol, loop)
        result: Any = RESULTS.successful
        for number, member in _CODES.items():
            result = choose(answer.code == number, member, result)
        found = LagrangePoint(unravel(answer.y), *split(answer.multipliers))
        rtol = None if self.solver is None else self.solver.rtol
        return Run(found, result, answer.steps, rtol=rtol, scale=answer.length, final=True)

    def linear_system(self, y, x, factor):
        """None (dense elimination of what `optimality` says), unless singular systems are wanted."""
        del factor
        if not (self.dependent or self.minimum_norm):
            return None
        (vector, _), (objective, constraints), multipliers, _ = self._flat(y, x)
        lagrangian = lambda v: objective(v) + multipliers @ constraints(v)
        p = ravel_pytree(y.equality)[0].size
        active, weights = jnp.ones(p, bool), jnp.ones(p, vector.dtype)
        if self.inequality is not None:
            g = ravel_pytree(self.inequality(y.primal, x))[0]
            units, near = self._units(y.primal, x)
            active = jnp.append(active, _active(units * multipliers[p:], -g, near))
            weights = jnp.append(weights, units)
        hessian = jax.hessian(lagrangian)(vector)
        operator = Saddle((hessian + hessian.T) / 2, jax.jacfwd(constraints)(vector), active, weights)
        solver = SaddleSolver(self.dependent, self.minimum_norm)
        return LinearSystem(operator, solver, solver.init(operator, {}))

    def _lagrangian(self, primal, nu, lam, x):
        total = self.fn(primal, x)
        for fn, multipliers in ((self.equality, nu), (self.inequality, lam)):
            if fn is not None:
                terms = jtu.tree_map(lambda c, mu: jnp.sum(c * mu), fn(primal, x), multipliers)
                total = total + sum(jtu.tree_leaves(terms), jnp.zeros((), total.dtype))
        return total

    def _slopes(self, primal, x):
        """About |grad g_i| for each inequality, from three directions."""
        vector, unravel = ravel_pytree(primal)
        function = lambda v: ravel_pytree(self.inequality(unravel(v), x))[0]  # pyright: ignore[reportOptionalCall]
        rng = np.random.default_rng(0)
        sizes = rng.uniform(0.5, 1.5, (3, vector.size)) * rng.choice([-1.0, 1.0], (3, vector.size))
        _, along = jax.linearize(function, jax.lax.stop_gradient(vector))
        changes = jnp.abs(jax.vmap(along)(jnp.asarray(sizes, vector.dtype)))
        return jax.lax.stop_gradient(jnp.max(changes, axis=0))

    def _units(self, primal, x):
        """(K3)'s weights, and what counts as touching; neither moves."""
        vector = ravel_pytree(primal)[0]
        slopes = self._slopes(primal, x)
        force = largest(jax.grad(self.fn)(primal, x))
        length = largest(vector)
        usable = lambda size: jnp.where((size > 0) & jnp.isfinite(size), size, 1)
        weights = usable(length) * usable(slopes) ** 2 / usable(force)
        accuracy = float(jnp.finfo(vector.dtype).eps) ** 0.5
        if self.solver is not None and self.solver.rtol is not None:
            accuracy = max(accuracy, 10 * self.solver.rtol)
        return jax.lax.stop_gradient((weights, accuracy * slopes * usable(length)))

    def _flat(self, y: LagrangePoint, x):
        """(y and its inverse ravel), (f, c) of a vector, the multipliers as a vector, and how to split one."""
        vector, unravel = ravel_pytree(y.primal)
        duals = (y.equality, y.inequality)
        multipliers, split = ravel_pytree(duals)
        if multipliers.size == 0:
            multipliers, split = jnp.zeros(0, vector.dtype), lambda _: duals

        def constraints(v):
            primal = unravel(v)
            both = [None if fn is None else fn(primal, x) for fn in (self.equality, self.inequality)]
            return ravel_pytree(both)[0].astype(vector.dtype)

        objective = lambda v: self.fn(unravel(v), x).astype(vector.dtype)
        return (vector, unravel), (objective, constraints), multipliers, split


class LeastMotion(AbstractAdjoint):
    """The generalised inverse of `_linear/saddle.py`, which judges its own residual: that of a cotangent is dropped where it should be."""

    modes: ClassVar[frozenset[str]] = frozenset({"forward", "reverse"})
    needs_step: ClassVar[bool] = False
    unrolls: ClassVar[bool] = False

    def linear_solve(self, matvec, vector, system):
        del matvec
        assert system is not None
        size = norm(vector)
        size = jnp.where((size > 0) & jnp.isfinite(size), size, 1).astype(vector.dtype)
        solution, code = solve_system(system, vector / size)
        return solution * size, code, False

    def apply(self, primal_fn, rewrite_fn, inputs, tags):
        raise ValueError("This adjoint belongs to ConstrainedArgmin(minimum_norm=True).")


@jax.custom_jvp
def _first_order(tree):
    """The identity, which can be differentiated once: the pseudo-inverse's derivative would have to know how minimisers turn."""
    return tree


@_first_order.defjvp
def _(primals, tangents):
    return _constant(primals[0]), tangents[0]


@jax.custom_jvp
def _constant(tree):
    return tree


@_constant.defjvp
def _(primals, tangents):
    raise NotImplementedError("ConstrainedArgmin(minimum_norm=True) has first derivatives only.")


def _optimal_value(y: LagrangePoint, bound):
    node, x = bound
    return node._lagrangian(y.primal, y.equality, y.inequality, x)


def _active(v, s, near):
    return jax.lax.stop_gradient((v > 0) & (v >= s - near))


def _smaller(v, s, near):
    """min(v, s) with the derivative of s where active, of v elsewhere."""
    picked = jnp.where(_active(v, s, near), s, v)
    return picked + jax.lax.stop_gradient(jnp.minimum(v, s) - picked)


_CODES: dict[int, Any] = {
    algorithm.INFEASIBLE: RESULTS.infeasible,
    algorithm.UNBOUNDED: RESULTS.unbounded,
    algorithm.INDEFINITE: RESULTS.indefinite,
    algorithm.STALLED: RESULTS.not_a_solution,
    algorithm.OUT_OF_STEPS: RESULTS.nonlinear_max_steps_reached,
    algorithm.NONFINITE: RESULTS.nonfinite,
}
