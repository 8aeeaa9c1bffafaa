r"""Neural ODE: the state at the end of a differential equation, as a layer.

**Problem.**     $y(t_1)$, where $\dot y = f(t, y, a)$ and $y(t_0) = y_0$                                                             (P)
**Optimality.**  A solver replaces (P) by its step equations, which declare what is computed: $y_{n+1} - \Phi_n(y_n, s_n) = 0$,
                 $n = 0 \dots N - 1$  (K1). $\Phi_n$ is one step from $t_n$ to $t_{n+1}$, $s_n$ what the solver carries besides the state
                 (the other half of a reversible pair, an evaluation kept for the next step), itself a function of the earlier y.
                 In the unknowns $y_1 \dots y_N$ the Jacobian is unit lower triangular: never singular.
**Solver.**      `diffrax.diffeqsolve`; substitution, step after step.
**Gradient.**    That of (K1), by back substitution. `ReversibleAdjoint` finds the $y_n$ again from the last one, the other exact adjoints
                 keep or recompute them, `BacksolveAdjoint` solves another equation and is right up to the error of the solver. The times of
                 the steps are data: where a controller chose them from y, that choice is not differentiated.
"""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from ..._core.adjoint import UnrolledAdjoint, modes
from ..._core.arguments import integer
from ..._core.closure import close
from ..._core.implicit import Run, detach, detach_tree
from ..._core.node import AbstractDeclarativeNode, Policy, evaluate, make_policy
from ..._core.results import RESULTS
from ..._ode.adjoint import ReversibleAdjoint
from ..._ode.foreign import has_inverse
from ..._ode.reversible import ANCHORS, Reversible, coupling_for
from ..._ode.trees import precision


class InitialValue(eqx.Module):
    """The data of a `NeuralODE`.

    - `y0`: the state at t0, a pytree of float32 or float64 arrays (half precision is computed in float32).
    - `args`: what else the field sees, any pytree; its arrays have gradients.
    - `ts`: times to save at, shape `(times,)`, in order, between t0 and t1. None: at t1 alone.
    """

    y0: PyTree
    args: PyTree = None
    ts: Any = None


class Trajectory(eqx.Module):
    """The unknown of a `NeuralODE`: the state after every step (after an adaptive solve's last one it repeats), and when that was.

    A plain call keeps the last state only, and no times.
    """

    ys: PyTree[Array]
    ts: Float[Array, " steps"] | None
    saved: PyTree[Array] | None  # at the times that were asked for


class _EqualSteps(dfx.ConstantStepSize):
    """So many; with a `dt0` diffrax would check its sign in a host callback."""

    steps: int = eqx.field(static=True)

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        del dt0
        return super().init(terms, t0, t1, y0, (t1 - t0) / self.steps, args, func, error_order)


class NeuralODE(AbstractDeclarativeNode):
    r"""A layer that carries its input along a differential equation. One example a call; batches by `jax.vmap`.

        ode = dn.NeuralODE(field, steps=20)     # field(t, y, args) -> dy/dt
        y1 = ode(y0)                            # y(1); ode(y0, args, ts=ts) for y at several times

    **Arguments:**

    - `field`: `field(t, y, args)`, shaped like y: a function or Equinox module. Its arrays, and those that it closes over, have gradients.
      For a separable system $\dot p = f(t, q)$, $\dot q = g(t, p)$ under `Leapfrog()` or `diffrax.SemiImplicitEuler()`: the pair `(f, g)`,
      with y = (p, q).
    - `solver`: any diffrax solver of ODEs. None: `Reversible(diffrax.Heun())` for equal steps, `Reversible(diffrax.Tsit5())` for adaptive ones.
    - `steps`: so many equal steps, whatever `max_steps` is; or
    - `stepsize_controller`: a diffrax controller, `diffrax.PIDController(rtol=1e-4, atol=1e-4)` for instance, which takes at most
      `max_steps`, with `dt0` as its first step (None: it finds one).
    - `t0`, `t1`: numbers, in either order.
    - `adjoint`: how gradients flow, as a diffrax adjoint. None: `ReversibleAdjoint()` where the solver has an inverse, else
      `diffrax.DirectAdjoint()`.
    - `throw`, `on_failure`, `max_steps`: see `Policy`.

    | `adjoint`                    | gradient                       | modes                          | states kept in N steps |
    |------------------------------|--------------------------------|--------------------------------|------------------------|
    | `ReversibleAdjoint`          | of the steps, by reconstruction; drift is found | reverse       | 9                      |
    | `RecursiveCheckpointAdjoint` | of the steps, by recomputation | reverse                        | about sqrt(2N)         |
    | `DirectAdjoint`              | of the steps                   | forward, reverse, higher-order | about 16 log_16(N)     |
    | `ForwardMode`                | of the steps                   | forward                        | 1                      |
    | `BacksolveAdjoint`           | of (P), approximately          | reverse                        | 1                      |

    `UnrolledAdjoint` is taken for `DirectAdjoint`.

    **Call:** `ode(y0, args=None, ts=None)`. **Returns:** y(t1), shaped like y0; with `ts`, leaves `(times, ...)`. `ode.solve(y0)` or
    `ode.solve(InitialValue(y0, args, ts))` keeps the state after every step as well, as a `Trajectory`.
    **Failure:** `ode_unfinished` where the steps ran out, `ode_nonfinite` where the solution ran off, `nonfinite_data`, `bad_times`.
    A gradient that drifted (see `ReversibleAdjoint`) raises with `throw=True`, out of compiled code and hence as JAX's own runtime error,
    and is NaN with `throw=False`.
    **Raises:** `ValueError` for a field that does not return the shape and dtype of y, neither or both of `steps` and
    `stepsize_controller`. A mode that the adjoint has not raises JAX's or diffrax's error.
    **Reference:** Chen et al. 2018, arXiv:1806.07366; McCallum & Foster 2024, arXiv:2410.11648.
    """

    field: PyTree[Callable]
    solver: dfx.AbstractSolver
    stepsize_controller: dfx.AbstractStepSizeController | None
    adjoint: dfx.AbstractAdjoint | UnrolledAdjoint | None
    policy: Policy
    steps: int | None = eqx.field(static=True)
    t0: float = eqx.field(static=True)
    t1: float = eqx.field(static=True)
    dt0: float | None = eqx.field(static=True)

    smoothness: ClassVar[str] = "as smooth as the field, for given times of the steps"
    closed_form: ClassVar[bool] = True
    own_adjoints: ClassVar[tuple[type, ...]] = (dfx.AbstractAdjoint, UnrolledAdjoint)

    def __init__(
        self,
        field: PyTree[Callable],
        solver: dfx.AbstractSolver | None = None,
        stepsize_controller: dfx.AbstractStepSizeController | None = None,
        adjoint: dfx.AbstractAdjoint | UnrolledAdjoint | None = None,
        *,
        steps: int | None = None,
        t0: float = 0.0,
        t1: float = 1.0,
        dt0: float | None = None,
        policy: Policy | None = None,
        throw: bool | None = None,
        on_failure: Literal["nan", "zero"] | None = None,
        max_steps: int | None = None,
    ):
        if (steps is None) == (stepsize_controller is None):
            raise ValueError(
                "NeuralODE takes either steps=20, so many equal steps, or stepsize_controller=diffrax.PIDController(...): give one."
            )
        steps = None if steps is None else integer(steps, "steps")
        if steps is not None and dt0 is not None:
            raise ValueError(
                f"dt0 is the first step of a stepsize_controller; {steps} equal steps have their own size."
            )
        for name, value in (("t0", t0), ("t1", t1)):
            if not isinstance(value, (int, float)) or not abs(value) < float("inf"):
                raise ValueError(f"{name} must be a finite number, got {value!r}. Times that are data go into `ts`.")
        if t0 == t1:
            raise ValueError(f"t0 and t1 must differ, both are {t0}.")
        pair = isinstance(field, list | tuple)
        if not (len(field) == 2 and all(callable(f) for f in field) if pair else callable(field)):
            raise ValueError(
                f"field must be a function of (t, y, args), or the pair (f, g) of a separable system; got a {type(field).__name__}."
            )
        if solver is not None and not isinstance(solver, dfx.AbstractSolver):
            raise ValueError(f"solver must be a diffrax solver, got {solver!r}.")
        if pair != isinstance(getattr(solver, "term_structure", None), tuple):
            raise ValueError(
                "field=(f, g) is for the solvers of separable systems, declarative.Leapfrog() and diffrax.SemiImplicitEuler(), and they are "
                f"for nothing else; got {'a pair' if pair else 'one field'} and {type(solver).__name__ if solver else 'no solver'}."
            )
        self.field = tuple(field) if isinstance(field, list) else field
        self.solver = Reversible(dfx.Heun() if steps else dfx.Tsit5()) if solver is None else solver
        self.stepsize_controller = stepsize_controller
        self.adjoint = adjoint  # pyright: ignore[reportIncompatibleVariableOverride]  (one of own_adjoints)
        self.policy = make_policy(policy, throw=throw, on_failure=on_failure, max_steps=max_steps)
        self.steps, self.t0, self.t1, self.dt0 = steps, float(t0), float(t1), dt0

    def __check_init__(self):
        if isinstance(self.adjoint, dfx.ImplicitAdjoint):
            raise ValueError(
                "diffrax.ImplicitAdjoint differentiates a steady state, which y(t1) is not. For the steady state of a field use "
                "Root(lambda y, x: field(0.0, y, x))."
            )

    # The friendlier form that the contract asks for.
    def __call__(self, y0: PyTree, args: PyTree = None, ts: Any = None) -> PyTree:  # pyright: ignore[reportIncompatibleMethodOverride]
        return evaluate(self, self.pack(y0, args, ts))

    @property
    def modes(self) -> frozenset[str]:
        return modes(self._adjoint())

    def pack(self, y0, args=None, ts=None):  # pyright: ignore[reportIncompatibleMethodOverride]  (the names of a call)
        y0 = y0 if isinstance(y0, InitialValue) else InitialValue(y0, args, ts)
        return y0 if y0.ts is None else InitialValue(y0.y0, y0.args, jnp.asarray(y0.ts))

    def check(self, x: InitialValue):
        leaves = jtu.tree_leaves(x.y0)
        if not leaves or not all(eqx.is_inexact_array(leaf) for leaf in leaves):
            kinds = sorted({jnp.result_type(leaf).name for leaf in leaves})
            raise ValueError(f"NeuralODE needs floating-point arrays in y0, got {', '.join(kinds) or 'none'}.")
        if x.ts is not None and (x.ts.ndim != 1 or x.ts.size == 0):
            raise ValueError(f"ts must be a vector of times, got shape {x.ts.shape}.")
        if isinstance(self.field, tuple) and not (isinstance(x.y0, tuple) and len(x.y0) == 2):
            raise ValueError("NeuralODE with a pair of fields needs y0 = (p, q).")

    def guess(self, x, y0):
        if not (y0 is None or isinstance(y0, Trajectory)):
            raise ValueError("NeuralODE takes no guess: the initial state is its data, `ode(y0)` or `ode.solve(y0)`.")
        return y0

    def bind(self, x: InitialValue, y0):
        del y0
        t, _ = self._times(x)
        if isinstance(self.field, tuple):
            (f, g), (p, q) = self.field, x.y0
            closed = _close(f, t, q, p, x.args, "f(t, q, args)"), _close(g, t, p, q, x.args, "g(t, p, args)")
        else:
            closed = _close(self.field, t, x.y0, x.y0, x.args, "field(t, y, args)")
        return eqx.tree_at(lambda node: node.field, self, closed)

    # Problem and optimality

    def optimality(self, y: Trajectory, x: InitialValue) -> Trajectory:
        if y.ts is None:
            raise ValueError("The optimality of a NeuralODE needs the whole trajectory, which `solve` returns.")
        solver, terms, y0, args = self._solver(x), self._terms(), x.y0, x.args
        t0, t1 = self._times(x)
        times = detach(y.ts)
        if self.steps is not None:
            times = t0 + (t1 - t0) * (jnp.arange(1, self.steps + 1, dtype=t0.dtype) / self.steps)
        state = self._told(solver.init(terms, t0, times[0], y0, args), t0, t1)
        asked, saved = None if x.ts is None else jnp.asarray(x.ts, t0.dtype), None
        if asked is not None:
            saved = jtu.tree_map(lambda leaf: jnp.stack([leaf] * asked.size), y0)

        def step(carry, now):
            start, before, state, saved = carry
            end, after = now
            computed, _, dense, state, _ = solver.step(terms, start, end, before, args, state, made_jump=False)
            if asked is not None:
                inside = ((asked - start) * (end - start) > 0) & ((asked - end) * (end - start) <= 0)
                path = solver.interpolation_cls(t0=start, t1=end, **dense)
                at = jax.vmap(path.evaluate)(asked)
                saved = jtu.tree_map(lambda old, new: jnp.where(_like(inside, old), new, old), saved, at)
            moved = end != start
            residual = jtu.tree_map(lambda a, b, c: a - jnp.where(moved, b, c), after, computed, before)
            return (end, after, state, saved), residual

        (*_, saved), residual = jax.lax.scan(step, (t0, y0, state, saved), (times, y.ys))
        return Trajectory(residual, y.ts - times, None if saved is None else jtu.tree_map(jnp.subtract, y.saved, saved))

    def value(self, y: Trajectory, x: InitialValue):
        return jtu.tree_map(lambda leaf: leaf[-1], y.ys) if x.ts is None else y.saved

    # Solver

    def run(self, x: InitialValue, y0, loop):
        del y0, loop
        return self._run(x, whole=True)

    def run_for_value(self, x: InitialValue, y0, loop):
        del y0, loop
        return self._run(x, whole=False)

    def _run(self, x: InitialValue, whole: bool) -> Run:
        t0, t1 = self._times(x)
        ordered = jnp.asarray(True)
        if x.ts is not None:
            x = eqx.tree_at(lambda x: x.ts, x, jnp.asarray(x.ts, t0.dtype))
            forwards = (x.ts - t0) / (t1 - t0)
            ordered = (forwards[0] >= 0) & (forwards[-1] <= 1) & jnp.all(forwards[1:] >= forwards[:-1])
            x = eqx.tree_at(lambda x: x.ts, x, jnp.where(ordered, x.ts, t1))
        adjoint, steps, end, times = (
            self._adjoint(),
            dfx.SubSaveAt(steps=True),
            dfx.SubSaveAt(t1=True),
            None if x.ts is None else dfx.SubSaveAt(ts=x.ts),
        )
        if isinstance(adjoint, dfx.BacksolveAdjoint):
            # It saves one kind only. The trajectory of `solve` is another solve's, and has no gradient but in what it ends with.
            out = self._diffeqsolve(x, adjoint, dfx.SaveAt(subs=end if times is None else times))
            assert out.ys is not None
            last, saved = jtu.tree_map(lambda leaf: leaf[-1:], out.ys), out.ys
            ts, ys = None, last
            if whole:
                path = self._diffeqsolve(x, dfx.RecursiveCheckpointAdjoint(), dfx.SaveAt(subs=[steps]))
                ts, ys = detach_tree(_every_step(path))
                ys = jtu.tree_map(lambda leaf, last: leaf.at[-1:].set(last), ys, last)
        else:
            out = self._diffeqsolve(x, adjoint, dfx.SaveAt(subs=(steps if whole else end, times)))
            assert out.ys is not None
            (ts, ys), saved = _every_step(out) if whole else (None, out.ys[0]), out.ys[-1]
        saved = None if x.ts is None else saved
        return Run(Trajectory(ys, ts, saved), self._result(x, out, ordered, ys, saved), out.stats["num_steps"])

    def _diffeqsolve(self, x: InitialValue, adjoint, saveat) -> dfx.Solution:
        t0, t1 = self._times(x)
        if self.steps is None:
            controller, max_steps = self.stepsize_controller, self.policy.max_steps
            first = None if self.dt0 is None else jnp.asarray(self.dt0, t0.dtype)
        elif isinstance(adjoint, dfx.BacksolveAdjoint):
            controller, max_steps, first = dfx.ConstantStepSize(), self.steps, (t1 - t0) / self.steps
        else:
            controller, max_steps, first = _EqualSteps(self.steps), self.steps, None
        assert controller is not None
        if isinstance(adjoint, dfx.RecursiveCheckpointAdjoint):
            x = _one_batch(x, self.field)
        solver, terms, state = self._solver(x), self._terms(), None
        if self._automatic and not isinstance(adjoint, (ReversibleAdjoint, dfx.BacksolveAdjoint)):
            state = self._told(solver.init(terms, t0, t1, x.y0, x.args), t0, t1)
        return dfx.diffeqsolve(
            terms, solver, t0, t1, first, x.y0, x.args, saveat=saveat, stepsize_controller=controller, adjoint=adjoint,
            max_steps=max_steps, solver_state=state, throw=False,
        )  # fmt: skip

    def _result(self, x, out, ordered, ys, saved):
        code = detach(out.result._value)
        own = (
            dfx.RESULTS.max_steps_reached, dfx.RESULTS.dt_min_reached, dfx.RESULTS.max_steps_rejected,
            dfx.RESULTS.internal_error, dfx.RESULTS.event_occurred,
        )  # fmt: skip
        number = lambda member: int(member._value)
        unfinished = jnp.any(jnp.stack([code == number(member) for member in own]))
        code = jnp.where(unfinished, number(RESULTS.ode_unfinished), code)
        finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jtu.tree_leaves((ys, saved))]
        code = jnp.where((code == 0) & ~jnp.all(jnp.stack(finite)), number(RESULTS.ode_nonfinite), code)
        code = jnp.where(ordered, code, number(RESULTS.bad_times))
        x = InitialValue(x.y0, x.args)
        data = [~jnp.any(jnp.isnan(leaf)) for leaf in jtu.tree_leaves(eqx.filter((self, x), eqx.is_inexact_array))]
        code = jnp.where(jnp.all(jnp.stack(data)), code, number(RESULTS.nonfinite_data))
        return eqx.tree_at(lambda member: member._value, RESULTS.successful, code)

    def _times(self, x: InitialValue):
        dtype = precision(x.y0)
        return jnp.asarray(self.t0, dtype), jnp.asarray(self.t1, dtype)

    def _terms(self):
        return jtu.tree_map(dfx.ODETerm, self.field, is_leaf=callable)

    def _solver(self, x: InitialValue) -> dfx.AbstractSolver:
        """The solver; the automatic coupling of equal steps is a number under any adjoint."""
        if isinstance(self.solver, dfx.AbstractImplicitSolver) and self.steps is None:
            # The root finder's tolerances are the controller's, where it has none: as `diffeqsolve` does, for the optimality too.
            names = [
                n
                for n in ("rtol", "atol", "norm")
                if "_UseStepSizeTol" in type(getattr(self.solver.root_finder, n)).__name__
            ]
            values = [getattr(self.stepsize_controller, n) for n in names]
            return eqx.tree_at(lambda s: [getattr(s.root_finder, n) for n in names], self.solver, values)
        if not self._automatic or self.steps is None:
            return self.solver
        assert isinstance(self.solver, Reversible)
        return Reversible(self.solver.solver, coupling_for(self.steps, precision(x.y0), anchors=self._anchors))

    @property
    def _automatic(self) -> bool:
        return type(self.solver) is Reversible and self.solver.coupling == "auto"

    @property
    def _anchors(self) -> int:
        adjoint = self._adjoint()
        return adjoint.anchors if isinstance(adjoint, ReversibleAdjoint) else ANCHORS

    def _told(self, state: PyTree, t0, t1):
        """The solver's state, told the horizon if the coupling of adaptive steps depends on it."""
        return state.told((t1 - t0) / (self._anchors + 1)) if self._automatic and self.steps is None else state

    def _adjoint(self) -> dfx.AbstractAdjoint:
        if isinstance(self.adjoint, UnrolledAdjoint):
            return dfx.DirectAdjoint()
        adjoint = self.adjoint
        if adjoint is None:
            adjoint = ReversibleAdjoint() if has_inverse(self.solver) else dfx.DirectAdjoint()
        if isinstance(adjoint, ReversibleAdjoint) and adjoint.on_drift == "raise" and not self.policy.throw:
            return ReversibleAdjoint(adjoint.anchors, "nan", adjoint.tolerance, adjoint.report)
        return adjoint


def _every_step(out: dfx.Solution):
    """(times, states) of its first saves: the last accepted step's stand where diffrax leaves infinities after it."""
    assert out.ts is not None
    assert out.ys is not None
    ts, ys = out.ts[0], out.ys[0]
    last = jnp.maximum(out.stats["num_accepted_steps"] - 1, 0)
    taken = jnp.arange(ts.size) < last
    return jtu.tree_map(lambda leaf: jnp.where(_like(taken, leaf), leaf, leaf[last]), (ts, ys))


def _one_batch(x: InitialValue, field: PyTree) -> InitialValue:
    """The same data, of which every leaf of y0 is batched by a `vmap` that batches anything of it or of the field.

    The loop of diffrax's checkpointing counts the gradient of a leaf that no lane changes once for each lane.
    """
    floats = [leaf for leaf in jtu.tree_leaves((x, field)) if eqx.is_inexact_array(leaf) and leaf.size]
    zeros = [jnp.where(False, jnp.ravel(leaf)[0], 0) for leaf in floats]
    spread = lambda leaf: sum((zero.astype(leaf.dtype) for zero in zeros), leaf)
    return eqx.tree_at(lambda x: x.y0, x, jtu.tree_map(spread, x.y0))


def _like(mask: Array, leaf: Array) -> Array:
    """`mask` over the leading axis of `leaf`."""
    return mask.reshape(mask.shape + (1,) * (leaf.ndim - 1))


def _close(field, t, y, like, args, signature: str):
    try:
        inspect.signature(field).bind(t, y, args)
    except TypeError:
        raise ValueError(
            f"NeuralODE calls its field as {signature}, which {getattr(field, '__name__', type(field).__name__)} does not take. Wrap it: "
            "lambda t, y, args: net(y), or a module with such a __call__."
        ) from None
    closed = close(field, t, y, args)
    one = lambda leaf: f"{jnp.result_type(leaf).name}{list(jnp.shape(leaf))}"
    got, want = (jtu.tree_map(one, tree) for tree in (eqx.filter_eval_shape(closed, t, y, args), like))
    if got != want:
        raise ValueError(
            f"NeuralODE: {signature} must return the shape and dtype of what it moves, {want}; it returned {got}."
        )
    return closed
