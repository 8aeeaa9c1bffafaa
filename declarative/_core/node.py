"""The contract of a declarative node, and the one path that every call of one takes.

A node is three separable things: the *problem* (`optimality`), the *algorithm* (`run`) and the *adjoint* (how gradients flow).
A subclass writes the first two, and whatever else it can offer: `tests/test_readme.py` holds a complete one in 15 lines.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
from equinox import AbstractVar
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from . import health
from .adjoint import AbstractAdjoint, ImplicitAdjoint, bounded_loop, lax_loop, modes
from .arguments import flag, integer
from .failure import describe, raise_failures
from .implicit import (
    LinearSystem,
    Problem,
    Run,
    as_result,
    detach,
    detach_tree,
    implicit_solution,
    judge,
    norm,
    poison,
    select,
)
from .precision import full_precision
from .results import RESULTS


class Policy(eqx.Module):
    """What to do about failure, and how long to try.

    - `throw`: raise `SolveError` at the call, naming the failed elements and why (also when the linear solve of the gradient
      fails). False: go on, and read the statuses.
    - `on_failure`: with `throw=False`, what a failed element returns. `"nan"` (the default, None): NaN, and NaN gradients.
      `"zero"`: the last finite iterate (zeros where that is not finite), and gradients that are exactly zero.
    - `max_steps`: the most steps that an iterative algorithm may take.
    """

    throw: bool = eqx.field(static=True, default=True)
    on_failure: Literal["nan", "zero"] | None = eqx.field(static=True, default=None)
    max_steps: int = eqx.field(static=True, default=1000)

    def __check_init__(self):
        flag(self.throw, "throw")
        if self.on_failure not in (None, "nan", "zero"):
            raise ValueError(f"on_failure must be 'nan', 'zero' or None, got {self.on_failure!r}.")
        integer(self.max_steps, "max_steps")

    @property
    def fill(self) -> str:
        return self.on_failure or "nan"


def make_policy(policy: Policy | None, **overrides: Any) -> Policy:
    """A policy from the constructor arguments of a node: `policy`, with the keywords that are not None put over it."""
    policy = Policy() if policy is None else policy
    if not isinstance(policy, Policy):
        raise ValueError(f"policy must be a declarative.Policy, got {policy!r}.")
    fields = {name: getattr(policy, name) for name in ("throw", "on_failure", "max_steps")}
    policy = Policy(**{**fields, **{name: value for name, value in overrides.items() if value is not None}})
    if policy.throw and policy.on_failure is not None:
        raise ValueError(f"on_failure={policy.on_failure!r} is for throw=False: with throw=True a failure raises.")
    return policy


class Solution(eqx.Module):
    """A solved problem, differentiable in `unknown`, `value`, `dual` and `objective`.

    - `unknown`: all that `optimality` sees (for softmax the probabilities *and* the multiplier).
    - `value`: what the layer returns; the last iterate for a failed element, whatever the policy.
    - `dual`: multipliers, or None.
    - `objective`: the optimal value, with its envelope gradient, or None.
    - `result`: a `RESULTS` member for each element.
    - `stats`: `steps`, `residual` (relative to what a relative perturbation of the whole unknown causes) and, for a node that knows
      its kinks, `kink_distance`; no gradient.
    """

    unknown: PyTree
    value: PyTree
    dual: PyTree
    objective: Float[Array, "*batch"] | None
    result: Any
    stats: dict[str, Array]

    def report(self) -> str:
        """In words: which elements failed, why, and what to try (concrete arrays only)."""
        codes = np.asarray(self.result._value)
        steps, residual = np.asarray(self.stats["steps"]), np.asarray(self.stats["residual"])
        if np.all(codes == 0):
            count = "" if codes.ndim == 0 else f"all {codes.size} elements: "
            return f"{count}successful, {int(steps.max(initial=0))} steps at most, residual {residual.max(initial=0):.1e} at most."
        return describe(codes, "Forward solve")


class AbstractDeclarativeNode(eqx.Module):
    r"""A layer declared by a problem: its output solves `optimality(y, x) = 0`, and so does its gradient.

    **A subclass defines** two fields and two methods:

    - `adjoint`: how gradients flow; None is the node's best rule.
    - `policy`: a `Policy`.
    - `optimality(y, x)`: shaped like the unknown `y`, zero at the solution and only there. Sign and order as in optimistix.
    - `run(x, y0, loop) -> Run`: any algorithm that finds `y`. Loops that should be unrollable use
      `loop(cond, body, init, max_steps=...)` in place of `jax.lax.while_loop`.

    **It may define** (each has a default): `pack`, `check`, `guess`, `value`, `dual`, `objective`, `step` (a contraction whose fixed
    points are the solutions; needed by the Neumann and one-step adjoints), `linear_system` (structure of dF/dy),
    `kink_distance`, `run_for_value` (a shorter `run` for plain calls), and the class attributes `smoothness`, `closed_form` (without an
    adjoint the derivative of `run` itself is the rule: no linear solve, nothing to check), `fails_as_nan` (of a closed form: a failed
    element is NaN already, value and gradient) and `own_adjoints` (classes of adjoints that `run` applies by itself).

    **Calls.** `node(x)` returns the value and applies the policy; `node.solve(x)` returns a `Solution` and never raises on
    failure. One example each: batches by `jax.vmap`. `x` is any pytree of arrays; the node's own array leaves are learnable.
    Gradients flow to both; a guess `y0` gets none, except through `UnrolledAdjoint`.

    **Dtypes.** float32 or float64; float16 and bfloat16 are computed in float32 and cast back once. Complex data raise.
    """

    adjoint: AbstractVar[optx.AbstractAdjoint | None]
    policy: AbstractVar[Policy]

    smoothness: ClassVar[str] = "not declared"
    closed_form: ClassVar[bool] = False
    fails_as_nan: ClassVar[bool] = False
    own_adjoints: ClassVar[tuple[type, ...]] = ()

    def __check_init__(self):
        if isinstance(self.adjoint, self.own_adjoints):
            return
        if self.own_adjoints and self.adjoint is not None:
            names = " or ".join(f"a {kind.__module__.split('.')[0]}.{kind.__name__}" for kind in self.own_adjoints)
            raise ValueError(f"adjoint of {type(self).__name__} must be None, {names}; got {self.adjoint!r}.")
        if self.adjoint is not None and not isinstance(self.adjoint, optx.AbstractAdjoint):
            raise ValueError(f"adjoint must be an optimistix or declarative adjoint, or None; got {self.adjoint!r}.")
        if isinstance(self.adjoint, AbstractAdjoint) and self.adjoint.needs_step:
            if type(self).step is AbstractDeclarativeNode.step:
                raise ValueError(
                    f"{type(self.adjoint).__name__} needs a contraction, and {type(self).__name__} declares none. Define "
                    "`step(y, x)` with the solutions as fixed points, or use ImplicitAdjoint()."
                )

    @abc.abstractmethod
    def optimality(self, y: PyTree, x: PyTree) -> PyTree:
        """Zero at the solution; shaped like `y`."""

    @abc.abstractmethod
    def run(self, x: PyTree, y0: PyTree, loop: Callable) -> Run:
        """Finds the unknown."""

    def run_for_value(self, x: PyTree, y0: PyTree, loop: Callable) -> Run:
        """As `run`, where nothing will read the unknown but `value`."""
        return self.run(x, y0, loop)

    @property
    def modes(self) -> frozenset[str]:
        """How the node can be differentiated: a subset of {"forward", "reverse", "higher-order"}."""
        return modes(self.adjoint)

    def guess(self, x: PyTree, y0: PyTree) -> PyTree:
        """The initial unknown from the caller's guess (None if there is none)."""
        del x
        return y0

    def pack(self, x: PyTree, *more: Any, **named: Any) -> PyTree:
        """The node's data Module from the friendlier forms that it takes."""
        if more or named:
            raise ValueError(
                f"{type(self).__name__} takes one `x`: put several arrays into a tuple or a dictionary. (A guess is given by name: `y0=...`.)"
            )
        return x

    def check(self, x: PyTree) -> None:
        """Raises `ValueError` for data of the wrong form; sees shapes and dtypes only."""
        del x

    def bind(self, x: PyTree, y0: PyTree) -> "AbstractDeclarativeNode":
        """The node with its user functions closed over their arrays; see `closure.py`."""
        del x, y0
        return self

    def value(self, y: PyTree, x: PyTree) -> PyTree:
        """What the layer returns."""
        del x
        return y

    def dual(self, y: PyTree, x: PyTree) -> PyTree:
        """Multipliers."""
        del y, x
        return None

    def objective(self, y: PyTree, x: PyTree) -> Float[Array, ""] | None:
        """The optimal value; `envelope` gives it its gradient."""
        del y, x
        return None

    def step(self, y: PyTree, x: PyTree) -> PyTree:
        """A contraction in `y` whose fixed points are the solutions."""
        raise NotImplementedError(f"{type(self).__name__} declares no contraction.")

    def linear_system(self, y: PyTree, x: PyTree, factor: PyTree) -> LinearSystem | None:
        """How to solve with dF/dy at a solution, on the raveled unknown; `factor` is what `run` left."""
        del y, x, factor
        return None

    def kink_distance(self, y: PyTree, x: PyTree) -> Float[Array, ""] | None:
        """Distance to the nearest point where the solution map is not differentiable, in the units of `x`."""
        del y, x
        return None

    def __call__(self, x: PyTree, *more: Any, y0: PyTree = None, **named: Any) -> PyTree:
        """The solution for one example, with the policy applied."""
        return evaluate(self, self.pack(x, *more, **named), y0)

    def solve(self, *args: Any, y0: PyTree = None, **named: Any) -> Solution:
        """The `Solution` for one example; takes the arguments of a call. Does not raise when the solve fails: read `result`.

        `solution.result == RESULTS.successful` is a boolean for each element, `solution.report()` the same in words.
        """
        return _solution(self, self.pack(*args, **named), y0)


def evaluate(node: AbstractDeclarativeNode, x: PyTree, y0: PyTree = None) -> PyTree:
    """`node(x)`: for nodes that give `__call__` a friendlier signature."""
    with full_precision():
        inputs, probe = _inputs_and_probe(node, x, y0)
        with health.unobserved():
            value, code = _evaluate(inputs, probe)
    if node.policy.throw:
        code = raise_failures(code, type(node).__name__)
        if isinstance(code, jax.core.Tracer):
            # The check happens only if its result is used; where something failed this is never reached.
            value = select(code == 0, value, lambda leaf: jnp.nan)
    return _as_given(value, x)


def _solution(node, x, y0) -> Solution:
    with full_precision():
        inputs, probe = _inputs_and_probe(node, x, y0)
        with health.unobserved():
            out = _solve(inputs, probe)
    unknown, value, dual, objective = _as_given((out.unknown, out.value, out.dual, out.objective), x)
    return Solution(unknown, value, dual, objective, out.result, out.stats)


def bound_inputs(
    node: AbstractDeclarativeNode, x: PyTree, y0: PyTree
) -> tuple[AbstractDeclarativeNode, PyTree, PyTree]:
    """(node, x, y0) in the working dtype, checked, with the guess completed and user functions closed over their arrays."""
    node, x, y0 = (_working(tree, name) for tree, name in ((node, "node"), (node.pack(x), "x"), (y0, "y0")))
    node.check(x)
    with health.unobserved():
        y0 = _working(node.guess(x, y0), "y0")
        return node.bind(x, y0), x, y0


def _inputs_and_probe(node, x, y0):
    inputs = bound_inputs(node, x, y0)
    if not _solves_linear_system(node):
        return inputs, None
    return inputs, health.probe_for(type(node).__name__, inputs)


# Compiled, so that an eager call costs no more than its arithmetic; two functions, so that a plain call computes nothing else.
@eqx.filter_jit
def _evaluate(inputs, probe):
    """(value with failed elements filled as the policy says, status code)."""
    node, x, _ = inputs
    policy = node.policy
    point = _differentiable_point(inputs, probe, policy.throw, measured=False)
    code = point.code
    if policy.fill == "zero" and not policy.throw:
        # What `value` reads of the data directly: a zero cotangent times a NaN in there is NaN.
        node, x = select(code == 0, (node, x), detach)
    value = node.value(point.unknown, x)
    if policy.throw:
        return value, code
    if policy.fill == "zero":
        # Zeros for non-finite data; else the last iterate, which is finite unless the solver overflowed.
        data_ok = code != int(RESULTS.nonfinite_data._value)
        last = lambda leaf: jnp.where(data_ok & jnp.isfinite(leaf), detach(leaf), 0)
        return select(code == 0, value, last), code
    if _rule(node) is None and node.fails_as_nan:
        return value, code
    failed = poison((node, x), code == 0)
    return jtu.tree_map(lambda leaf: leaf + failed.astype(leaf.dtype), value), code


@eqx.filter_jit
def _solve(inputs, probe) -> Solution:
    node, x, _ = inputs
    point = _differentiable_point(inputs, probe, throw=False, measured=True)
    if node.policy.fill == "zero":
        # As above: a caller who selects by `result` sends zero cotangents to the rest.
        node, x = select(point.ok, (node, x), detach)
    stats = {"steps": point.steps, "residual": detach(point.residual)}
    distance = node.kink_distance(*detach_tree((point.unknown, x)))
    if distance is not None:
        stats["kink_distance"] = detach(distance)
    return Solution(
        unknown=point.unknown,
        value=node.value(point.unknown, x),
        dual=node.dual(point.unknown, x),
        objective=node.objective(point.unknown, x),
        result=as_result(point.code),
        stats=stats,
    )


def _differentiable_point(inputs, probe, throw: bool, measured: bool):
    node = inputs[0]
    adjoint = _rule(node)
    fill, title = node.policy.fill, type(node).__name__ if throw else None
    if isinstance(adjoint, AbstractAdjoint) and not adjoint.unrolls:
        problem = Problem(
            run=_run,
            residual=_step_residual if adjoint.needs_step else _optimality,
            system=_no_system if adjoint.needs_step else _linear_system,
            linear_solve=adjoint.linear_solve,
            check=True,
            fill=fill,
            title=title,
        )
        return implicit_solution(inputs, probe, problem=problem)
    # From here on the derivative is that of the algorithm itself (or a foreign adjoint's).
    residual = None if adjoint is None else _optimality
    plain = _run if measured or residual is not None else _run_for_value
    if fill == "zero":
        # A NaN inside the iterations would make NaN of a zero cotangent: the inputs of failed elements must be cut off before.
        ok = judge(detach_tree(plain(detach_tree(inputs))), residual, detach_tree(inputs)).ok
        inputs = select(ok, inputs, detach)
    if adjoint is None:
        run = plain(inputs)
    elif isinstance(adjoint, AbstractAdjoint):
        run = _run(inputs, bounded_loop)
    else:
        unknown, rest = adjoint.apply(_foreign_primal, _foreign_rewrite, inputs, frozenset())
        run = eqx.tree_at(lambda run: run.unknown, rest, unknown, is_leaf=lambda leaf: leaf is None)
    point = judge(detach_tree(run), residual, detach_tree(inputs))
    if residual is None and measured:
        # A closed form needs no check on every call; `solve` reports its residual all the same.
        vector = ravel_pytree(node.optimality(point.unknown, inputs[1]))[0]
        point = eqx.tree_at(lambda p: p.residual, point, norm(vector))
    return eqx.tree_at(lambda p: p.unknown, point, run.unknown)


# The functions of a Problem, and of a foreign adjoint: global and free of closures, so that every array is in `inputs`.
def _run(inputs, loop=lax_loop):
    node, x, y0 = inputs
    return _checked(node, node.run(x, y0, loop))


def _run_for_value(inputs):
    node, x, y0 = inputs
    return _checked(node, node.run_for_value(x, y0, lax_loop))


def _checked(node, run) -> Run:
    if not isinstance(run, Run):
        raise TypeError(f"{type(node).__name__}.run must return a declarative.Run, got {type(run).__name__}.")
    return run


def _optimality(unknown, inputs):
    node, x, _ = inputs
    residual = node.optimality(unknown, x)
    ours, theirs = (jtu.tree_map(jnp.shape, tree) for tree in (residual, unknown))
    if ours != theirs:
        raise ValueError(
            f"{type(node).__name__}.optimality must return the shape of the unknown, {theirs}; it returned {ours}."
        )
    return residual


def _step_residual(unknown, inputs):
    node, x, _ = inputs
    return jtu.tree_map(jnp.subtract, node.step(unknown, x), unknown)


def _linear_system(unknown, inputs, factor):
    node, x, _ = inputs
    return node.linear_system(unknown, x, factor)


def _no_system(unknown, inputs, factor):
    del unknown, inputs, factor
    return None


def _foreign_primal(inputs):
    *inputs, loop = inputs
    run = _run(tuple(inputs), loop)
    kept = {name: getattr(run, name) for name in ("rtol", "scale", "unit", "final")}
    return run.unknown, Run(None, run.result, run.steps, **kept)


def _foreign_rewrite(unknown, _, inputs):
    return _optimality(unknown, inputs[:3])


# optimistix's implicit adjoint insists on plain functions; jaxtyping's import hook, under which the tests run, wraps ours.
_foreign_primal = getattr(_foreign_primal, "__wrapped__", _foreign_primal)
_foreign_rewrite = getattr(_foreign_rewrite, "__wrapped__", _foreign_rewrite)


def _rule(node) -> optx.AbstractAdjoint | None:
    """The adjoint that goes around `run`; None where the derivative of `run` itself is the rule."""
    if isinstance(node.adjoint, node.own_adjoints):
        return None
    if node.adjoint is None and not node.closed_form:
        return ImplicitAdjoint()
    return node.adjoint


def _solves_linear_system(node) -> bool:
    rule = _rule(node)
    return isinstance(rule, AbstractAdjoint) and not rule.unrolls


@eqx.filter_custom_jvp
def _envelope(y, x, *, lagrangian):
    return lagrangian(y, x)


@_envelope.def_jvp
def _(primals, tangents, *, lagrangian):
    y, x = primals
    _, t_x = tangents
    moving, still = eqx.partition(x, jtu.tree_map(lambda t: t is not None, t_x, is_leaf=lambda t: t is None))
    value = _envelope(y, x, lagrangian=lagrangian)
    if len(jtu.tree_leaves(t_x)) == 0:
        return value, jnp.zeros_like(value)
    return value, jax.jvp(lambda moving: lagrangian(y, eqx.combine(moving, still)), (moving,), (t_x,))[1]


def envelope(lagrangian: Callable[[PyTree, PyTree], Float[Array, ""]], y: PyTree, x: PyTree) -> Float[Array, ""]:
    r"""The optimal value with its envelope gradient $\mathrm d\,\mathcal L(y^*, x) = \partial_x \mathcal L(y^*, x)\,\mathrm dx$.

    At a solution $\partial_y \mathcal L = 0$, so the first derivative needs no linear solve; the rule differentiates again, in
    `y` too, so higher orders are right.
    """
    return _envelope(y, x, lagrangian=lagrangian)


def _as_given(tree: PyTree, x: PyTree) -> PyTree:
    """Back to half precision, if all the data came in it."""
    dtypes = [leaf.dtype for leaf in jtu.tree_leaves(x) if eqx.is_inexact_array(leaf)]
    if not dtypes or any(dtype.itemsize > 2 for dtype in dtypes):
        return tree
    half = jnp.result_type(*dtypes)
    return jtu.tree_map(lambda leaf: leaf.astype(half) if eqx.is_inexact_array(leaf) else leaf, tree)


def _working(tree: PyTree, name: str) -> PyTree:
    """Arrays in the working dtype: Python numbers become arrays, half precision becomes float32, complex raises."""

    def convert(leaf):
        if isinstance(leaf, np.generic):
            leaf = leaf.item()  # NumPy's scalars are numbers, whose dtype means as little as that of Python's
        if name != "node" and isinstance(leaf, (bool, int, float, complex, np.ndarray)):
            leaf = jnp.asarray(leaf)
        if eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise ValueError(f"{name} is complex ({leaf.dtype}); split it into real and imaginary parts.")
        if eqx.is_inexact_array(leaf) and leaf.dtype.itemsize == 2:
            leaf = leaf.astype(jnp.float32)
        return leaf

    return jtu.tree_map(convert, tree)
