"""`check_node`: every promise of a declarative node, tested on your node and your data.

The reference for a derivative is never another solver's tolerance: the implicit gradient is held against finite differences of the
solution, against the derivative of the iterations, and against its own transpose, and the value against whatever reference the
caller has. Data are cast to float64 for that where x64 is enabled.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree

from .._core.adjoint import UnrolledAdjoint
from .._core.failure import SolveError
from .._core.node import AbstractDeclarativeNode, Policy, _evaluate
from .._core.results import RESULTS
from .._core.tolerances import tolerances

PLATFORMS = ("tpu", "cuda", "cpu")


@dataclasses.dataclass
class CheckReport:
    """What was checked, and how far from exact it was; `str` is a table."""

    node: str
    rows: list[tuple[str, bool, str]] = dataclasses.field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(ok for _, ok, _ in self.rows)

    def __str__(self):
        width = max((len(name) for name, _, _ in self.rows), default=0)
        lines = [f"{'ok  ' if ok else 'FAIL'}  {name:<{width}}  {detail}" for name, ok, detail in self.rows]
        return "\n".join([f"check_node({self.node})", *lines])


def check_node(
    node: AbstractDeclarativeNode,
    x: PyTree,
    *,
    y0: PyTree = None,
    reference: Callable[[PyTree], PyTree] | None = None,
    feasible: Callable[[PyTree, PyTree], Any] | None = None,
    project: Callable[[PyTree], PyTree] | None = None,
    failures: Mapping[str, PyTree] | None = None,
    unrolled: bool = True,
    full: bool = True,
) -> CheckReport:
    """Checks a node on the data `x`, one example.

    **Arguments:**

    - `x`, `y0`: as for `node.solve(x, y0=y0)`. Choose data at which the solution is unique and away from kinks, and asymmetric, so
      that a wrong sign shows.
    - `reference`: `x -> value`, by an independent method.
    - `feasible`: `(value, x) -> violation`, zero or negative where the value satisfies its constraints.
    - `project`: applied to values before derivatives are compared, to remove directions in which the solution is not unique.
    - `failures`: a `RESULTS` member's name -> data that must end with it. NaN data are always tried.
    - `unrolled`: whether the node's iterations can be differentiated (False: say why where you call this).
    - `full`: False leaves out second order, low precision and the exports, which are most of the time.

    **Returns:** a `CheckReport`. **Raises:** `AssertionError` with the whole table if any check fails.

    **Checks:** value and status, residual, reference, feasibility; the derivative three ways (implicit, through the iterations,
    finite differences) and its transpose; jit, vmap, grad of vmap against vmap of grad, jacfwd against jacrev; no retrace; failed
    elements: status, NaN or zero gradient, bit-identical neighbours, an error that names the lane; modes that the adjoint does
    not support raise. With `full`: hessian against finite differences of the gradient, reverse over reverse, float32 against
    float64, bfloat16 in and out, export for TPU, CUDA and CPU, value and gradient, without a host callback and (unless
    `jax.default_matmul_precision` is set) with every matrix product in full precision.
    """
    report = CheckReport(type(node).__name__)
    x = jtu.tree_map(jnp.asarray, node.pack(x))
    quiet = replace(node, policy=_quiet(node.policy))
    setting = _Setting(report, quiet, x, y0, project or (lambda value: value))
    checks: list[tuple[Callable, tuple]] = [
        (_check_value, (reference, feasible)),
        (_check_first_order, (unrolled,)),
        (_check_batching, ()),
        (_check_retrace, ()),
        (_check_failures, (failures or {},)),
        (_check_unsupported_modes, ()),
    ]
    if full:
        checks += [(_check_second_order, ()), (_check_low_precision, ()), (_check_export, ())]
    for check, args in checks:
        try:
            check(setting, *args)
        except Exception as error:  # A check that dies is a failed check, and the others still run.
            name = check.__name__.removeprefix("_check_").replace("_", " ")
            report.rows.append((name, False, f"{type(error).__name__}: {error}"))
    if not report.passed:
        raise AssertionError(str(report))
    return report


def replace(node: AbstractDeclarativeNode, **fields: Any) -> Any:
    """The node with some fields replaced, whatever its constructor looks like; construction checks run."""
    new = object.__new__(type(node))
    for field in dataclasses.fields(node):
        object.__setattr__(new, field.name, fields.get(field.name, getattr(node, field.name)))
    AbstractDeclarativeNode.__check_init__(new)
    return new


def _quiet(policy: Policy, on_failure=None) -> Policy:
    return Policy(throw=False, on_failure=on_failure, max_steps=policy.max_steps)


class _Setting:
    """The node as a function of one vector: its own inexact leaves and those of x."""

    def __init__(self, report: CheckReport, node, x, y0, project):
        self.report, self.node, self.x, self.y0, self.project, self.supported = report, node, x, y0, project, node.modes
        self.dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32  # pyright: ignore[reportAttributeAccessIssue]
        moving, self.still = eqx.partition((_cast(node, self.dtype), _cast(x, self.dtype)), eqx.is_inexact_array)
        self.vector, self.unravel = ravel_pytree(moving)
        self.tol = tolerances(self.dtype)
        rng = np.random.default_rng(0)
        finite = jnp.isfinite(self.vector)
        # Infinite data (masked scores) stay where they are.
        self.direction = jnp.where(finite, jnp.asarray(rng.standard_normal(self.vector.size), self.dtype), 0)
        self.scale = jnp.where(finite, jnp.maximum(jnp.abs(self.vector), 1e-3), 0)
        # Traced once: the transforms below start from what was traced, as those of a jitted model do.
        self.traced = jax.jit(lambda vector: self.value(vector))
        size = jax.eval_shape(self.traced, self.vector).size
        self.cotangent = jnp.asarray(rng.standard_normal(size), self.dtype)
        self.scalar = lambda vector: jnp.sum(self.cotangent * self.traced(vector))
        # Compiled once, used by several checks.
        self.jvp = jax.jit(lambda v, t: jax.jvp(self.traced, (v,), (t,)))
        self.gradient = jax.jit(jax.grad(self.scalar))

    def inputs(self, vector):
        return eqx.combine(self.unravel(vector), self.still)

    def value(self, vector, adjoint=None, policy=None):
        node, x = self.inputs(vector)
        if adjoint is not None:
            node = replace(node, adjoint=adjoint)
        if policy is not None:
            node = replace(node, policy=policy)
        y0 = None if self.y0 is None else _cast(self.y0, self.dtype)
        return ravel_pytree(self.project(AbstractDeclarativeNode.__call__(node, x, y0=y0)))[0].astype(self.dtype)

    def row(self, name: str, ok, detail: str = ""):
        self.report.rows.append((name, bool(ok), detail))

    def close(self, name: str, got, want, tol: float):
        got, want = jnp.asarray(got), jnp.asarray(want)
        error = float(jnp.max(jnp.abs(got - want), initial=0) / jnp.maximum(jnp.max(jnp.abs(want), initial=0), 1e-2))
        self.row(name, error <= tol, f"relative error {error:.1e} (at most {tol:.0e})")


def _cast(tree, dtype):
    return jtu.tree_map(lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, _arrays(tree))


def _arrays(tree):
    return jtu.tree_map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, (np.ndarray, float)) else leaf, tree)


def _solve_at(setting: _Setting, node, x):
    y0 = None if setting.y0 is None else _cast(setting.y0, setting.dtype)
    return AbstractDeclarativeNode.solve(node, x, y0=y0)


def _check_value(setting: _Setting, reference, feasible):
    node, x = setting.inputs(setting.vector)
    solution = _solve_at(setting, node, x)
    code = int(solution.result._value)
    setting.row("solves", code == 0, solution.report())
    residual = float(solution.stats["residual"])
    setting.row("residual", residual <= setting.tol.solution, f"{residual:.1e} (at most {setting.tol.solution:.0e})")
    if reference is not None:
        want = ravel_pytree(reference(x))[0]
        setting.close("value against the reference", ravel_pytree(solution.value)[0], want, 10 * setting.tol.solver)
    if feasible is not None:
        violation = float(jnp.max(jnp.asarray(feasible(solution.value, x))))
        setting.row("feasible", violation <= 10 * setting.tol.solver, f"violation {violation:.1e}")
    distance = node.kink_distance(solution.unknown, x)
    if distance is not None:
        setting.row(
            "away from kinks", float(distance) > 1e-3, f"distance {float(distance):.1e}; choose other data below 1e-3"
        )


def _check_first_order(setting: _Setting, unrolled: bool):
    v, t, u = setting.vector, setting.direction * setting.scale, setting.cotangent
    step = float(jnp.finfo(setting.dtype).eps) ** (1 / 3)
    # The solver's own error is divided by the step.
    loose = 1e-5 if setting.dtype == jnp.float64 else 3e-2
    difference = (setting.traced(v + step * t) - setting.value(v - step * t)) / (2 * step)
    reverse = setting.gradient(v) if "reverse" in setting.supported else None
    if "forward" in setting.supported:
        _, forward = setting.jvp(v, t)
        setting.close("jvp against finite differences", forward, difference, loose)
        if reverse is not None:
            # <u, Jv> - <J'u, v> by its own rounding: the two products may cancel to anything.
            size = jnp.maximum(jnp.abs(u) @ jnp.abs(forward), jnp.abs(reverse) @ jnp.abs(t)) + 1e-30
            gap = float(jnp.abs(u @ forward - reverse @ t) / size)
            tol = 100 * setting.tol.gradient
            setting.row("<u, Jv> = <J'u, v>", gap <= tol, f"gap {gap:.1e} (at most {tol:.0e})")
    if reverse is not None:
        setting.close("vjp against finite differences", reverse @ t, u @ difference, 10 * loose)
    if unrolled:
        through = lambda v: setting.value(v, adjoint=UnrolledAdjoint())
        _, iterated = jax.jit(lambda v, t: jax.jvp(through, (v,), (t,)))(v, t)
        tol = 1e3 * setting.tol.gradient
        if "forward" in setting.supported:
            setting.close("implicit against the iterations' derivative", setting.jvp(v, t)[1], iterated, tol)
        elif reverse is not None:
            setting.close("implicit against the iterations' derivative", reverse @ t, u @ iterated, tol)


def _check_batching(setting: _Setting):
    v = setting.vector
    lanes = v[None] + 1e-3 * jnp.arange(3, dtype=v.dtype)[:, None] * (setting.direction * setting.scale)[None]
    batched = jax.jit(jax.vmap(setting.traced))(lanes)
    single = jnp.stack([setting.value(lane) for lane in lanes])
    setting.close("vmap against a loop; jit against eager", batched, single, 100 * setting.tol.solver)
    if "reverse" in setting.supported:
        outside = jax.jit(jax.grad(lambda lanes: jnp.sum(jax.vmap(setting.scalar)(lanes))))(lanes)
        inside = jax.jit(jax.vmap(jax.grad(setting.scalar)))(lanes)
        setting.close("grad of vmap against vmap of grad", outside, inside, 100 * setting.tol.solver)
        setting.close("vmap of grad against grad", inside[0], setting.gradient(lanes[0]), 100 * setting.tol.gradient)
    if {"reverse", "forward"} <= setting.supported:
        forward, reverse = jax.jit(lambda v: (jax.jacfwd(setting.traced)(v), jax.jacrev(setting.traced)(v)))(v)
        setting.close("jacfwd against jacrev", forward, reverse, 100 * setting.tol.gradient)


def _check_retrace(setting: _Setting):
    count = 0

    def counted(vector):
        nonlocal count
        count += 1
        return setting.value(vector)

    compiled = jax.jit(counted)
    compiled(setting.vector)
    compiled(setting.vector * (1 + 1e-3))
    setting.row("no retrace under jit", count == 1, f"{count} traces")
    setting.value(setting.vector)
    before = _evaluate._cached._cache_size()  # pyright: ignore[reportFunctionMemberAccess]
    setting.value(setting.vector * (1 + 1e-3))
    after = _evaluate._cached._cache_size()  # pyright: ignore[reportFunctionMemberAccess]
    setting.row("no compilation on a second eager call", before == after, f"{after - before} new")


def _check_failures(setting: _Setting, failures: Mapping[str, PyTree]):
    for name, x in failures.items():
        x = _cast(setting.node.pack(x), setting.dtype)
        got = RESULTS._index_to_message[int(_solve_at(setting, setting.node, x).result._value)]
        setting.row(
            f"failure: {name}",
            got == RESULTS[getattr(RESULTS, name)],
            f"ended with: {got.split('.')[0] or 'successful'}",
        )
    parameters = ravel_pytree(setting.unravel(setting.vector)[0])[0].size
    node_vector, x_vector = setting.vector[:parameters], setting.vector[parameters:]
    if x_vector.size == 0:
        return
    good = jnp.stack([x_vector, x_vector * (1 - 1e-3), x_vector])
    first = int(jnp.argmax(jnp.isfinite(x_vector)))
    bad = good.at[1, first].set(jnp.nan)

    def value(x_vector, node_vector, policy):
        return setting.value(jnp.concatenate([node_vector, x_vector]), policy=policy)

    raising = Policy(throw=True, max_steps=setting.node.policy.max_steps)
    try:
        jax.vmap(lambda lane: value(lane, node_vector, raising))(bad)
        message = "nothing was raised"
    except SolveError as error:
        message = str(error)
    setting.row("throw=True names the element", "element 1:" in message, message.splitlines()[0])
    if "reverse" not in setting.supported:
        return
    # The third lane's neighbours must not notice; the parameters' gradient is over the good lanes.
    weights = jnp.asarray([1.0, 0.0, 1.0], setting.dtype)

    def loss(lanes, node_vector, policy):
        per_lane = jax.vmap(lambda lane: value(lane, node_vector, policy))(lanes) @ setting.cotangent
        return weights @ jnp.where(weights > 0, per_lane, 0)

    # A foreign adjoint knows no policy for its failures.
    zero, nan = (
        jax.jit(jax.grad(lambda a, b, p=p: loss(a, b, _quiet(setting.node.policy, p)), (0, 1))) for p in ("zero", "nan")
    )
    clean, dirty = zero(good, node_vector), zero(bad, node_vector)
    same = all(
        bool(jnp.all(a[keep] == b[keep]))
        for a, b, keep in ((clean[0], dirty[0], np.array([0, 2])), (clean[1], dirty[1], np.arange(node_vector.size)))
    )
    setting.row("a failed element leaves its neighbours bit-identical", same)
    setting.row("on_failure='zero' gives a zero gradient", bool(jnp.all(dirty[0][1] == 0)))
    weights = jnp.ones(3, setting.dtype)
    poisoned = nan(bad, node_vector)[0]
    # All of it, but for what never has a gradient, such as masked entries.
    moved = jnp.all(jnp.isnan(poisoned[1]) | (nan(good, node_vector)[0][1] == 0))
    apart = jnp.all(jnp.isfinite(poisoned[np.array([0, 2])]))
    setting.row("on_failure='nan' gives a NaN gradient, to that element only", bool(moved & apart))


def _check_unsupported_modes(setting: _Setting):
    if "forward" not in setting.supported:
        setting.row(
            "forward mode raises", _raises(lambda: jax.jvp(setting.value, (setting.vector,), (setting.direction,)))
        )
    if "reverse" not in setting.supported:
        setting.row("reverse mode raises", _raises(lambda: jax.grad(setting.scalar)(setting.vector)))
    if "higher-order" not in setting.supported:
        second = lambda: jax.jacrev(jax.jacrev(setting.scalar))(setting.vector)
        setting.row("reverse over reverse raises", _raises(second))


def _raises(call) -> bool:
    try:
        call()
    except Exception:
        return True
    return False


def _check_second_order(setting: _Setting):
    if not {"higher-order", "forward", "reverse"} <= setting.supported:
        return
    v, t = setting.vector, setting.direction * setting.scale
    step = float(jnp.finfo(setting.dtype).eps) ** (1 / 3)
    loose = 1e-4 if setting.dtype == jnp.float64 else 1e-1
    hessian, reverse = jax.jit(lambda v: (jax.hessian(setting.scalar)(v), jax.jacrev(jax.jacrev(setting.scalar))(v)))(v)
    difference = (setting.gradient(v + step * t) - setting.gradient(v - step * t)) / (2 * step)
    setting.close("hessian against finite differences", hessian @ t, difference, loose)
    setting.close("reverse over reverse against hessian", reverse, hessian, 1e3 * setting.tol.gradient)
    setting.close("hessian is symmetric", hessian, hessian.T, 1e3 * setting.tol.gradient)


def _check_low_precision(setting: _Setting):
    node, x = setting.inputs(setting.vector)
    for dtype, tol in ((jnp.float32, 1e-3), (jnp.bfloat16, 1e-1)):
        x_low = _cast(x, dtype)
        y0 = None if setting.y0 is None else _cast(setting.y0, dtype)
        node_low = _cast(node, dtype)
        value = lambda node, x, y0=y0: AbstractDeclarativeNode.__call__(node, x, y0=y0)
        out = value(node_low, x_low)
        kinds = {leaf.dtype for leaf in jtu.tree_leaves(out)}
        name = jnp.dtype(dtype).name
        setting.row(f"{name} in, {name} out", kinds == {jnp.dtype(dtype)}, f"got {[kind.name for kind in kinds]}")
        got = ravel_pytree(setting.project(out))[0].astype(setting.dtype)
        # The data were rounded too, so the value at the rounded data is what to compare with.
        rounded, _ = ravel_pytree(
            eqx.filter((_cast(node_low, setting.dtype), _cast(x_low, setting.dtype)), eqx.is_inexact_array)
        )
        setting.close(f"{name} value", got, setting.value(rounded), tol)
        if "reverse" not in setting.supported:
            continue
        moving, still = eqx.partition((node_low, x_low), eqx.is_inexact_array)
        scalar = lambda moving, still=still, value=value: (
            setting.cotangent.astype(jnp.float32)
            @ ravel_pytree(setting.project(value(*eqx.combine(moving, still))))[0].astype(jnp.float32)
        )
        low = ravel_pytree(jax.grad(scalar)(moving))[0].astype(setting.dtype)
        setting.row(f"{name} gradient is finite", bool(jnp.all(jnp.isfinite(low))))
        setting.close(f"{name} gradient", low, setting.gradient(rounded), 10 * tol)


def _check_export(setting: _Setting):
    function = jax.value_and_grad(setting.scalar) if "reverse" in setting.supported else setting.scalar
    exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(setting.vector)
    setting.row("export for " + ", ".join(PLATFORMS), set(exported.platforms) == set(PLATFORMS))
    # Targets of custom calls, not any text: source locations are in there too.
    program = exported.mlir_module()
    callbacks = re.findall(r"custom_call @\w*callback\w*", program)
    setting.row("no host callback with throw=False", not callbacks, ", ".join(callbacks))
    if jax.config.jax_default_matmul_precision is None:  # pyright: ignore[reportAttributeAccessIssue]  (JAX adds its flags at run time)
        products = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
        rounded = [line.strip() for line in products if "HIGHEST" not in line]
        detail = "; ".join([f"{len(products)} products", *rounded[:1]])
        setting.row("matrix products in full precision", not rounded, detail)
