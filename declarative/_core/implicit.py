r"""The implicit function theorem, stated and wired once.

A solve declares $y^*(x)$ by $F(y^*, x) = 0$. Where $F$ is $C^1$ and $\partial F/\partial y$ is nonsingular at the solution,

$$ \partial_y F \; \mathrm{d}y = -\,\partial_x F \; \mathrm{d}x                                                   \tag{IFT} $$

whatever algorithm found $y^*$. The rule below is (IFT) as a JVP whose linear solve can be transposed, so it serves forward and
reverse mode; it calls the solve itself for the primal point, so differentiating the rule gives every higher order.

Three things make it fit for batches in which some elements fail:

- *Status.* Each element carries the code of its forward solve, and the residual of every linear solve is checked here, in
  both directions: a finite but wrong answer counts as failed. (lineax's own tangent and transpose solves would raise through a
  host callback whatever `throw` says; `jax.lax.custom_linear_solve` around it keeps both directions in our hands.)
- *Masking.* A failed element under `on_failure="zero"` must give exactly zero. Zeroing its linear solve is not enough, since
  0 * NaN in the transposed $\partial_x F$ is NaN: its inputs are masked too, as a select whose transpose selects the cotangent.
- *Probe.* Reports the backward solve under `jax.grad`; see `health.py`.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optimistix as optx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._linear.norms import largest, maximum, norm
from . import health
from .failure import raise_failures
from .precision import FullPrecision, full_precision
from .results import RESULTS
from .tolerances import tolerances, zero_tolerance


class Run(eqx.Module):
    """What an algorithm returns: the unknown, and what it says about it.

    - `unknown`: pytree of inexact arrays, all that `optimality` sees.
    - `result`: how the algorithm ended (an optimistix or lineax status will do); None means that it thinks it succeeded.
    - `steps`: iterations, or None for a direct method.
    - `factor`: anything worth reusing for the backward solve (a lineax solver state); it carries no gradient.
    - `rtol`, `scale`: the relative accuracy that the algorithm aimed at (a Python number; None: that of the dtype) and the
      typical magnitude of the unknown (None: its own largest entry, or 1 if it vanishes). They set what counts as a solution.
    - `unit`: a change of the unknown that its user would notice, where the problem says so (None: nothing is known, and an unknown that
      vanishes has to vanish to many digits, which rounding inside of `optimality` may forbid).
    - `final`: the algorithm has measured its own error: that it ran out of steps is not overruled by a small residual here. (The
      scale above is that of the whole unknown. Multipliers that run off, as those of an infeasible program do, make it large.)
    """

    unknown: PyTree
    result: Any = None
    steps: Int[Array, ""] | None = None
    factor: PyTree = None
    rtol: float | None = eqx.field(static=True, default=None)
    scale: Float[Array, ""] | None = None
    unit: Float[Array, ""] | None = None
    final: bool = eqx.field(static=True, default=False)


class LinearSystem(eqx.Module):
    r"""How to solve with $\partial_y F$ at a point, on the raveled unknown: an operator, a solver and (optionally) its state.

    The state is a factorisation reused from the forward solve. None of the three carries a gradient or decides what is
    solved: the residual, and all derivatives, come from the JVP of `optimality`.
    """

    operator: lx.AbstractLinearOperator
    solver: lx.AbstractLinearSolver
    state: PyTree = None


class Point(eqx.Module):
    """The outcome of one forward solve: what the rule differentiates (`unknown`) and what it does not."""

    unknown: PyTree
    code: Int[Array, ""]
    residual: Float[Array, ""]
    steps: Int[Array, ""]
    factor: PyTree = None

    @property
    def ok(self) -> Bool[Array, ""]:
        return self.code == 0


class Problem(eqx.Module):
    """One solve as the rule sees it. The four functions are static; every array they need is in `inputs`.

    - `run(inputs) -> Run`: any algorithm; never differentiated by the rule.
    - `residual(unknown, inputs)`: F, shaped like the unknown.
    - `system(unknown, inputs, factor) -> LinearSystem | None`: structure of dF/dy, None for the adjoint's own choice.
    - `linear_solve(matvec, vector, system, n) -> (solution, RESULTS code, residual is to be checked)`: the adjoint's.
    """

    run: Callable = eqx.field(static=True)
    residual: Callable = eqx.field(static=True)
    system: Callable = eqx.field(static=True)
    linear_solve: Callable = eqx.field(static=True)
    check: bool = eqx.field(static=True)
    fill: str = eqx.field(static=True)
    title: str | None = eqx.field(static=True)


def select(ok: Bool[Array, ""], tree: PyTree, other: Callable[[Array], Any]) -> PyTree:
    """`tree` where `ok`, `other(leaf)` elsewhere, over the inexact arrays of `tree`."""
    return jtu.tree_map(lambda leaf: jnp.where(ok, leaf, other(leaf)) if eqx.is_inexact_array(leaf) else leaf, tree)


@eqx.filter_custom_jvp
def poison(data: PyTree, ok: Bool[Array, ""]) -> Float[Array, ""]:
    """0 where `ok`, else NaN; its derivative in every inexact array of `data` is that number as well.

    Added to what a failed element returns it makes NaN of the whole gradient, also of what the failed algorithm did not look at.
    """
    del data
    return jnp.where(ok, 0.0, jnp.nan)


@poison.def_jvp
def _(primals, tangents):
    value = poison(*primals)
    # Any sum over all entries will do that does not overflow. Before the product: the data of a batch may be shared, the value is not.
    moved = [jnp.sum(leaf / max(leaf.size, 1)) for leaf in jtu.tree_leaves(tangents[0])]
    return value, sum((value * change.astype(value.dtype) for change in moved), jnp.zeros_like(value))


def detach(leaf):
    return jax.lax.stop_gradient(leaf)


def detach_tree(tree: PyTree) -> PyTree:
    """`tree` with no gradient through its inexact arrays; other leaves pass."""
    return jtu.tree_map(lambda leaf: detach(leaf) if eqx.is_inexact_array(leaf) else leaf, tree)


def typical_scale(function: Callable[[PyTree], PyTree], y: PyTree) -> Float[Array, ""]:
    """Magnitude of the unknown of F(y) = 0 as seen from a guess: the guess itself, or the size of a step that F asks for.

    The step is estimated by |F| / |J s| with fixed random signs s: one JVP, and blind to how F is scaled.
    """
    value, change = jax.jvp(function, (y,), (_signs(y),))
    slope = largest(change)
    step = largest(value) / jnp.where(slope > 0, slope, 1)
    scale = jnp.maximum(largest(y), step)
    return jax.lax.stop_gradient(jnp.where((scale > 0) & jnp.isfinite(scale), scale, 1))


def _directions(vector):
    # Signs alone would cancel exactly in an equation like y1 + y2 = 1.
    rng = np.random.default_rng(1)
    sizes = rng.uniform(0.5, 1.5, (3, vector.size))
    return jnp.asarray(sizes * rng.choice([-1.0, 1.0], sizes.shape), vector.dtype)


def _signs(tree: PyTree) -> PyTree:
    rng = np.random.default_rng(0)
    return jtu.tree_map(lambda leaf: jnp.asarray(rng.choice([-1.0, 1.0], leaf.shape), leaf.dtype), tree)


def forward(problem: Problem, inputs: PyTree) -> Point:
    """Runs the algorithm and judges its answer."""
    return judge(problem.run(inputs), problem.residual if problem.check else None, inputs)


def judge(run: Run, residual_function: Callable | None, inputs: PyTree) -> Point:
    """The status of a run by its residual, whatever the algorithm says; None (a closed form) trusts it, if it says anything."""
    code = _code(run.result)
    steps = jnp.zeros((), jnp.int32) if run.steps is None else jnp.asarray(run.steps).astype(jnp.int32)
    vector, unravel = ravel_pytree(run.unknown)
    if residual_function is not None:
        function = lambda vector: ravel_pytree(residual_function(unravel(vector), inputs))[0]
        tol = tolerances(vector.dtype, run.rtol)
        # The floor is for unknowns that vanish: the solvers' absolute tolerance, seen from this check (see `zero_tolerance`).
        floor = 0 if run.scale is None else run.scale * (zero_tolerance(tol.solver) / tol.solution)
        floor = floor if run.unit is None else jnp.maximum(run.unit, floor)
        scale = jnp.maximum(largest(vector), floor).astype(vector.dtype)
        scale = jnp.where(scale > 0, scale, 1)
        # What a relative change of the whole unknown does to each entry of F, along three random directions. Entry by
        # entry, so that a strongly scaled equation cannot cover for a weak one; three, since one may cancel.
        value, jvp = jax.linearize(function, vector)
        allowed = scale * maximum(jnp.abs(jax.vmap(jvp)(_directions(vector))), axis=0)
        # An exact zero counts as such even where dF/dy vanishes.
        ratio = jnp.where(value == 0, 0, jnp.abs(value) / jnp.where(allowed > 0, allowed, jnp.finfo(vector.dtype).tiny))
        residual = maximum(ratio)
        # A solver that ran out of steps at its own tolerance (rounding kept it from noticing) has solved the problem.
        tired = code == _number(RESULTS.nonlinear_max_steps_reached)
        if not run.final:
            code = jnp.where(tired & (residual <= tol.solver), 0, code)
        code = jnp.where((code == 0) & ~(residual <= tol.solution), _number(RESULTS.not_a_solution), code)
    else:
        residual = jnp.zeros((), vector.dtype)
    if residual_function is not None or run.result is None:
        code = jnp.where((code == 0) & ~jnp.all(jnp.isfinite(vector)), _number(RESULTS.nonfinite), code)
        nan = [jnp.any(jnp.isnan(leaf)) for leaf in jtu.tree_leaves(eqx.filter(inputs, eqx.is_inexact_array))]
        if nan:
            code = jnp.where(jnp.any(jnp.stack(nan)), _number(RESULTS.nonfinite_data), code)
    return Point(run.unknown, code, residual, steps, run.factor)


def _code(result) -> Int[Array, ""]:
    if result is None:
        return jnp.zeros((), jnp.int32)
    if result._enumeration is not RESULTS:
        result = RESULTS.promote(result)
    return jnp.asarray(result._value).astype(jnp.int32)


def _number(member) -> int:
    return int(member._value)


def as_result(code: Int[Array, ""]):
    """The `RESULTS` member with this code (a batched one under vmap)."""
    return eqx.tree_at(lambda item: item._value, RESULTS.successful, code)


@eqx.filter_custom_jvp
def implicit_solution(inputs: PyTree, probe: Float[Array, " fields"], *, problem: Problem) -> Point:
    """Solves the problem; differentiable through (IFT) in everything that `problem.residual` reads from `inputs`."""
    del probe
    return forward(problem, inputs)


@implicit_solution.def_jvp
@full_precision()
def _implicit_solution_jvp(primals, tangents, *, problem: Problem):
    inputs, probe = primals
    t_inputs, t_probe = tangents
    point = implicit_solution(inputs, probe, problem=problem)  # Itself: so that this rule can be differentiated again.
    ok = point.ok

    perturbed = jtu.tree_map(lambda t: t is not None, t_inputs, is_leaf=lambda t: t is None)
    moving, still = eqx.partition(inputs, perturbed)
    if problem.fill == "zero":
        moving, still = select(ok, moving, detach), select(ok, still, detach)
        t_inputs = select(ok, t_inputs, jnp.zeros_like)
        y = select(ok, point.unknown, detach)
    else:
        y = point.unknown
    vector, unravel = ravel_pytree(y)
    n = vector.size

    def residual(vector, moving):
        return ravel_pytree(problem.residual(unravel(vector), eqx.combine(moving, still)))[0]

    if len(jtu.tree_leaves(t_inputs)) == 0:
        rhs = jnp.zeros_like(vector)
    else:
        rhs = -jax.jvp(lambda moving: residual(vector, moving), (moving,), (t_inputs,))[1]
    _, jacobian = jax.linearize(lambda vector: residual(vector, moving), vector)
    system = problem.system(*detach_tree((point.unknown, inputs, point.factor)))

    def solve(matvec, vector, *, transposed: bool):
        vector, rest = vector[:n], vector[n:]
        linear = None if system is None else _transpose(system) if transposed else system
        apply = lambda v: matvec(jnp.concatenate([v, jnp.zeros_like(rest)]))[:n]
        solution, code, residual = _checked_solve(problem, apply, vector, linear)
        failed = ~ok | (code != 0)
        solution = jnp.where(failed, jnp.nan if problem.fill == "nan" else 0.0, solution).astype(vector.dtype)
        if problem.title is not None:
            # A failed forward solve has raised already.
            code = raise_failures(jnp.where(ok, code, 0), f"{problem.title}: linear solve of the gradient")
            solution = jnp.where(code == 0, solution, jnp.nan).astype(vector.dtype)
        if transposed:
            rest = rest + health.report(point.code, code, point.residual, residual, point.steps, rest.dtype)
        return jnp.concatenate([solution, rest])

    extended = lambda v: jnp.concatenate([jacobian(v[:n]), v[n:]])
    t_probe = (jnp.zeros_like(probe) if t_probe is None else t_probe).astype(vector.dtype)
    tangent = jax.lax.custom_linear_solve(
        extended,
        jnp.concatenate([rhs, t_probe]),
        solve=lambda matvec, b: solve(matvec, b, transposed=False),
        transpose_solve=lambda vecmat, b: solve(vecmat, b, transposed=True),
    )[:n]
    # Status, statistics and factor carry no gradient; `unknown` is the first field of a Point.
    leaves, treedef = jtu.tree_flatten(point)
    moved = jtu.tree_leaves(unravel(tangent))
    return point, jtu.tree_unflatten(treedef, moved + [None] * (len(leaves) - len(moved)))


def _checked_solve(problem: Problem, matvec, vector, system):
    """(solution, code, relative residual) of one linear solve, for one element."""
    solution, code, exact = problem.linear_solve(matvec, vector, system)
    size = norm(vector)
    residual = norm(matvec(solution) - vector) / jnp.where(size > 0, size, 1)
    finite = jnp.isfinite(residual) & jnp.all(jnp.isfinite(solution))
    singular = ~finite | (code == _number(RESULTS.singular))
    # An approximate inverse (damped, truncated) leaves a residual by design; it is reported, not judged.
    wrong = ~(residual <= tolerances(vector.dtype).linear) if exact else jnp.zeros((), bool)
    code = jnp.where(wrong, _number(RESULTS.inaccurate_backward), 0).astype(jnp.int32)
    code = jnp.where(singular, _number(RESULTS.singular_jacobian), code)
    code = jnp.where(jnp.all(jnp.isfinite(vector)), code, _number(RESULTS.nonfinite_backward))
    return solution, code, residual


def _transpose(system: LinearSystem) -> LinearSystem:
    state = None if system.state is None else system.solver.transpose(system.state, {})[0]
    return LinearSystem(system.operator.T, system.solver, state)


def solve_system(system: LinearSystem, vector: Float[Array, " n"]) -> tuple[Float[Array, " n"], Int[Array, ""]]:
    """Solves with lineax, and reports instead of raising."""
    kwargs = {} if system.state is None else {"state": system.state}
    out = lx.linear_solve(system.operator, vector, FullPrecision(system.solver), throw=False, **kwargs)
    return out.value, _code(optx.RESULTS.promote(out.result))
