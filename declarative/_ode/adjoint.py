r"""The adjoint that walks a reversible solver's trajectory backwards.

**Gradient.** Of the discrete solution, exactly: at each step backwards the state before it is recomputed by the solver's inverse, and
the vector-Jacobian products of that step are added up. No state of the trajectory is stored but a few anchors; adaptive steps keep their
times, one scalar each.
**Rounding.** The state that is recomputed differs from the one that was there. At the anchors (eight, evenly spread in time, and the
start) the two are compared, and the walk goes on from the one that was kept: rounding grows over a ninth of the horizon only, and
what it grew to is known. Where it exceeds `tolerance` the policy `on_drift` applies; nothing is silently wrong.

Reference: McCallum & Foster 2024, arXiv:2410.11648 (Algorithm 2 is the walk); anchors and guard are ours.
"""

import functools as ft
import warnings
from typing import Any

import diffrax as dfx
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

# diffrax has no public name for what a `SubSaveAt` fills.
from diffrax._integrate import SaveState
from jaxtyping import Array, PyTree

from .._core.arguments import integer
from .._core.closure import close
from .._core.summed import Rule, nan_where, summing, vjp
from .._linear.norms import maximum
from .anchors import Anchored, Compared, Drift, compare
from .foreign import reversible
from .reversible import ANCHORS, AbstractReversibleSolver, Interval, Pair, Reversible
from .saved import SAVE_Y, Field, Saved, walk
from .trees import add, precision


class ReversibleAdjoint(dfx.AbstractAdjoint):
    r"""Backpropagation through `diffrax.diffeqsolve` by reconstruction: `adjoint=ReversibleAdjoint()`.

    For the solvers `Reversible(solver)`, `AsynchronousLeapfrog`, `Leapfrog`, any `AbstractReversibleSolver`, and diffrax's
    `ReversibleHeun` and `SemiImplicitEuler`; fixed and adaptive steps; `SaveAt` of t0, t1, ts, steps, with or without fn; SDEs as far
    as the solver goes. Gradients with respect to y0, args, and every array that the terms or the function of `SaveAt` hold or close over;
    with respect to times it raises. Reverse mode, once; forward mode and second derivatives raise.

    **Arguments:**

    - `anchors`: how many states are kept on the way.
    - `on_drift`: what to do if a state was reconstructed worse than `tolerance`: `"raise"`; `"warn"`; `"nan"`, NaN gradients;
      `"checkpoint"`, compute them again as `diffrax.DirectAdjoint` does, from checkpoints (under `vmap` for all lanes, if for one).
    - `tolerance`: of each leaf of the state, relative to its largest entry on the stretch between two anchors. None: 1e-6 in
      float64, 3e-4 in float32. Leaves that no field reads (integrals carried along) are left out: no gradient depends on them.
    - `report`: put the errors of reconstruction, at the start and at the anchors, into `solution.stats["round_trip"]`, shape
      `(anchors + 1,)`. Walks back once more, whether or not there is a gradient.

    **Raises:** `ValueError` for a solver without inverse, events, dense output, jumps, an `UnsafeBrownianPath`, and adaptive steps
    without `max_steps` (their times need room).
    """

    anchors: int = eqx.field(static=True, default=ANCHORS)
    on_drift: str = eqx.field(static=True, default="raise")
    tolerance: float | None = eqx.field(static=True, default=None)
    report: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        integer(self.anchors, "anchors", 0)
        if self.on_drift not in ("raise", "warn", "nan", "checkpoint"):
            raise ValueError(f"on_drift must be 'raise', 'warn', 'nan' or 'checkpoint', got {self.on_drift!r}.")
        if self.tolerance is not None and not self.tolerance > 0:
            raise ValueError(f"tolerance must be positive, got {self.tolerance!r}.")

    def loop(
        self, *, args, terms, solver, saveat, init_state, passed_solver_state, passed_controller_state, throw, **rest
    ):
        del passed_controller_state, throw
        _check(terms, saveat, init_state, rest)
        solver = reversible(solver)
        y, state = init_state.y, init_state.solver_state
        order = solver.error_order(terms)
        terms = solver.hoist(terms, rest["t0"], y, args)
        fns = [None if sub.fn is SAVE_Y else close(sub.fn, rest["t0"], y, args) for sub in _subs(saveat)]
        compared = Compared(solver, _read(terms, fns, y))
        # Times and what controls them are data; `tprev` is t0.
        rest = {name: _constant(value, "t0, t1, dt0 or the step size controller") for name, value in rest.items()}
        saveat = _constant(
            eqx.tree_at(lambda s: [sub.fn for sub in _subs(s)], saveat, [None] * len(fns)), "SaveAt(ts=...)"
        )
        init_state = eqx.tree_at(lambda s: (s.y, s.solver_state), init_state, (None, None), is_leaf=_is_none)
        init_state = _constant(init_state, "t0, t1, dt0 or controller_state")
        if passed_solver_state:
            state = _constant(state, "solver_state")
        if isinstance(solver, Reversible):
            stretch = (rest["t1"] - rest["t0"]) / (self.anchors + 1) if solver.coupling == "auto" else None
            z = jtu.tree_map(jnp.subtract, y, state.d) if passed_solver_state else state.z
            state = Pair(z, state.d, stretch)

        constants = {
            "adjoint": self,
            "solver": solver,
            "compared": compared,
            "order": order,
            "init_state": init_state,
            "saveat": saveat,
            "rest": rest,
        }
        final, trail = _walked(((y, state), (args, terms, fns)), constants)
        stats = {}
        if self.report:
            held = _stopped((y, state, args, terms, (final.y, final.solver_state), trail))
            stats["round_trip"] = _round_trip(solver, compared, *held)
        return _only_ys(final), stats


def _check(terms, saveat, init_state, rest):
    if jnp.finfo(precision(init_state.y)).bits < 32:
        raise ValueError("ReversibleAdjoint needs y0 in float32 or float64: rounding grows on its way back.")
    if rest["event"] is not None:
        raise ValueError("ReversibleAdjoint cannot take events; use diffrax.RecursiveCheckpointAdjoint().")
    if saveat.dense:
        raise ValueError(
            "ReversibleAdjoint cannot give dense output, which keeps every step; name the times: SaveAt(ts=...)."
        )
    unsafe = lambda leaf: isinstance(leaf, dfx.UnsafeBrownianPath)
    if any(unsafe(leaf) for leaf in jtu.tree_leaves(terms, is_leaf=unsafe)):
        raise ValueError(
            "ReversibleAdjoint evaluates the noise again on its way back, which an UnsafeBrownianPath does not allow; use a "
            "diffrax.VirtualBrownianTree."
        )
    controller = rest["stepsize_controller"]
    if not _is_fixed(controller) and rest["max_steps"] is None:
        raise ValueError(
            "ReversibleAdjoint keeps the times of adaptive steps and needs room for them: give max_steps a number."
        )
    while controller is not None:
        if getattr(controller, "jump_ts", None) is not None:
            raise ValueError("ReversibleAdjoint cannot take jump_ts; solve piece by piece, or use another adjoint.")
        controller = getattr(controller, "controller", None)
    if init_state.made_jump is not False:
        raise ValueError("ReversibleAdjoint cannot start from made_jump.")


def _read(terms, fns, y) -> tuple[bool, ...]:
    """Of the leaves of y, which ones the field reads, or a function of `SaveAt`; all, in a separable system."""
    if isinstance(terms, tuple):
        return tuple(True for _ in jtu.tree_leaves(y))
    # What a field returns as it is is read all the same if it is multiplied by something that may be differentiated.
    multiplied = any(map(eqx.is_inexact_array, (*terms.control.captured, *terms.product.captured)))
    readers = [terms.field.read(returned=multiplied)[1], *(fn.read(returned=False)[1] for fn in fns if fn is not None)]
    return tuple(any(leaf) for leaf in zip(*map(jtu.tree_leaves, readers), strict=True))


class _Grid(eqx.Module):
    """The times of the accepted steps: from the controller where they are known in advance, else recorded."""

    t0: Array
    t1: Array
    first: Array  # the end of the first step, if the times are known
    last: Array  # and of the last, which diffrax may have moved to t1
    steps: Array
    controller: Any  # ConstantStepSize or StepTo; None if the times are recorded
    state: Any
    recorded: Array | None

    def time(self, steps):
        """After so many steps; t0 also for less than none."""
        if self.recorded is not None:
            # The first step that was tried may have been rejected, the first that was recorded was not.
            time = self.recorded[jnp.maximum(steps - 1, 0)]
            return jnp.where(steps <= 0, self.t0, jnp.where(steps >= self.steps, self.last, time))
        if isinstance(self.controller, dfx.StepTo):
            time = self.controller.ts[jnp.maximum(self.state - 2 + steps, 0)]
        else:
            # What the controller says after the step before, of which it needs the number alone; with no end, the time as well.
            state = (self.state[0] + steps - 2, *self.state[1:])
            before = self.t0 + (self.first - self.t0) * (steps - 1).astype(self.t0.dtype)
            _, _, time, *_ = self.controller.adapt_step_size(self.t0, before, None, None, None, None, None, state)
            time = jnp.minimum(time, self.t1)
        time = jnp.where(steps == 1, self.first, time)
        return jnp.where(steps <= 0, self.t0, jnp.where(steps >= self.steps, self.last, time))


class _Trail(eqx.Module):
    """What a solve leaves behind for the way back."""

    steps: Array
    grid: _Grid
    sizes: list[Array]  # of the last stretch
    kept: PyTree[Array]  # anchors: (y, state, sizes), stacked, and after how many steps each
    at: Array


def _forwards(
    differentiable, *, adjoint, solver, compared, order, init_state, saveat, rest, anchors, kind: Any = "lax"
):
    """diffrax's own loop, with anchors in the solver's state, and the times of adaptive steps saved beside what the user saves."""
    (y, state), (args, terms, fns) = differentiable
    controller, t0, max_steps = rest["stepsize_controller"], rest["t0"], rest["max_steps"]
    saveat = eqx.tree_at(
        lambda s: [sub.fn for sub in _subs(s)], saveat, [SAVE_Y if fn is None else fn for fn in fns], is_leaf=_is_none
    )
    while_loop: Any = ft.partial(eqxi.while_loop, kind=kind)
    walk = kind == "lax"
    anchored = Anchored(solver, compared, t0, rest["t1"], order, anchors)
    recording = walk and not _is_fixed(controller)
    state = anchored.start(y, state)
    if recording:
        record = SaveState(
            saveat_ts_index=0, ts=jnp.full(max_steps, jnp.inf, t0.dtype), ys=jnp.zeros((max_steps, 0)), save_index=0
        )
        saveat = eqx.tree_at(
            lambda s: s.subs, saveat, (saveat.subs, dfx.SubSaveAt(steps=True, fn=_nothing)), is_leaf=_is_none
        )
        init_state = eqx.tree_at(lambda s: s.save_state, init_state, (init_state.save_state, record), is_leaf=_is_none)
    init_state = eqx.tree_at(lambda s: (s.y, s.solver_state), init_state, (y, state), is_leaf=_is_none)
    outer = ft.partial(while_loop, checkpoints=64) if kind == "checkpointed" else while_loop
    final, _ = adjoint._loop(
        args=args, terms=terms, solver=anchored, saveat=saveat, init_state=init_state, inner_while_loop=while_loop,
        outer_while_loop=outer, **rest,
    )  # fmt: skip
    if not walk:
        return final, None
    recorded = None
    if recording:
        saved, record = final.save_state
        final = eqx.tree_at(lambda s: s.save_state, final, saved, is_leaf=_is_none)
        recorded = record.ts
    if isinstance(final.made_jump, jax.Array) and not isinstance(controller, dfx.ClipStepSizeController):
        raise ValueError("ReversibleAdjoint cannot take a step size controller that reports jumps.")
    known = (None, None) if recording else (controller, init_state.controller_state)
    steps = jnp.asarray(final.num_accepted_steps)
    grid = _Grid(t0, rest["t1"], init_state.tnext, final.tprev, steps, *known, recorded)
    end = final.solver_state
    final = eqx.tree_at(lambda s: s.solver_state, final, end.inner, is_leaf=_is_none)
    return final, _Trail(end.taken, grid, end.sizes, end.kept, end.at)


def _primal(differentiable, constants):
    # Without a gradient (or a report) nothing walks back, and no anchor is needed.
    adjoint = constants["adjoint"]
    final, trail = _forwards(differentiable, **constants, anchors=adjoint.anchors if adjoint.report else -1)
    return final, trail if adjoint.report else None


def _kept(differentiable, constants):
    adjoint = constants["adjoint"]
    final, trail = _forwards(differentiable, **constants, anchors=adjoint.anchors)
    places = [(save.save_index, save.saveat_ts_index) for save in _states(final)]
    return (final, trail if adjoint.report else None), (final.y, final.solver_state, places, trail)


def _gradient(residuals, cotangents, perturbed, differentiable, constants):
    adjoint, solver, saveat = constants["adjoint"], constants["solver"], constants["saveat"]
    perturbed = jtu.tree_map(lambda leaf, wanted: wanted and eqx.is_inexact_array(leaf), differentiable, perturbed)
    y, state, places, trail = _once(residuals)
    differentiable = _once(differentiable)
    of_ys = [save.ys for save in _states(cotangents[0])]
    saved, left = [], []
    for index, (sub, of, place) in enumerate(zip(_subs(saveat), of_ys, places, strict=True)):
        if jtu.tree_leaves(of):
            saved.append(Saved(sub.t0, sub.t1, sub.steps, sub.ts, index, of))
            left.append(place)
    *result, drift = _backwards(
        solver, constants["compared"], perturbed, differentiable, (y, state), trail, saved, left
    )
    # Cotangents of what is differentiated, None elsewhere.
    result = jtu.tree_map(lambda wanted, c: c if wanted else None, perturbed, tuple(result), is_leaf=_is_none)

    drift = maximum(drift)
    drifted = ~(drift <= _tolerance(adjoint, y))
    if adjoint.on_drift == "raise":
        return eqx.error_if(result, drifted, _DRIFT)
    if adjoint.on_drift == "nan":
        return nan_where(drifted, result)
    if adjoint.on_drift == "warn":
        jax.debug.callback(_warn, eqxi.unvmap_any(drifted), eqxi.unvmap_max(drift))
        return result

    def again():
        (own, parameters), others = eqx.partition(differentiable, perturbed)
        # equinox's checkpointed loop counts the gradient of what no lane of a vmap changes once for each of them.
        bounded = constants["rest"]["max_steps"] is not None

        def values(parameters, own):
            everything = eqx.combine((own, parameters), others)
            final, _ = _forwards(everything, **constants, anchors=-1, kind="bounded" if bounded else "checkpointed")
            return eqx.filter([save.ys for save in _states(final)], eqx.is_inexact_array)

        ys, back = vjp(values, parameters, own)
        of_parameters, of_own = back(_full(of_ys, ys))
        return of_own, of_parameters

    better = jax.lax.cond(eqxi.unvmap_any(drifted), again, lambda: result)
    chosen = jtu.tree_map(lambda new, old: jnp.where(drifted, new, old), better, result)
    # A sum over lanes cannot be chosen lane by lane.
    return (chosen[0], better[1]) if summing() else chosen


def _backwards(solver: AbstractReversibleSolver, compared, perturbed, differentiable, end, trail: _Trail, saved, left):
    """`((of_y0, of_state0), of_parameters, drift)`."""
    (y0, state0), parameters = differentiable
    apart = summing(trail.steps, trail.grid, [save.ts for save in saved], left)
    field = Field(*eqx.partition(parameters, perturbed[1]), apart)
    grid, steps = trail.grid, trail.steps
    between = any(save.ts is not None or save.steps for save in saved)
    y, state = end
    of_y, of_state, of_parameters = _zeros(y), _zeros(state), _zeros(field.parameters)
    interval = Interval(grid.time(steps - 2), grid.time(steps - 1), grid.time(steps))
    left_ts = [ts for _, ts in left]
    left = [values for values, _ in left]

    for i, save in enumerate(saved):
        left[i], *more = save.at_end(field, left[i], interval.end, steps, y)
        of_y, of_parameters = _plus_both((of_y, of_parameters), more)
    of_state, more = solver.begin(field, interval, y, state, of_y, of_state, between)
    of_parameters = _plus(of_parameters, more)

    def back(field, carry, of_parameters):
        steps, interval, y, state, of_y, of_state, left, left_ts, drift = carry
        left, left_ts = list(left), list(left_ts)
        for i, save in enumerate(saved):
            left[i], *more = save.at_step(field, left[i], interval.end, steps, y)
            of_y, of_parameters = _plus_both((of_y, of_parameters), more)
        y, state, info, pullback = solver.reverse(field, interval, y, state, between)
        of_info = _zeros(info)
        for i, save in enumerate(saved):
            if save.ts is not None:
                left[i], left_ts[i], *more = save.between(
                    field, left[i], left_ts[i], interval, solver.interpolation_cls, info
                )
                of_info, of_parameters = _plus_both((of_info, of_parameters), more)
        of_y, of_state, more = pullback(of_y, of_state, of_info)
        of_parameters = _plus(of_parameters, more)
        steps = steps - 1
        y, state, drift = _at_anchor(compared, trail, steps, y, state, drift)
        interval = Interval(grid.time(steps - 2), interval.before, interval.start)
        return (steps, interval, y, state, of_y, of_state, left, left_ts, drift), of_parameters

    carry = (steps, interval, y, state, of_y, of_state, left, left_ts, _no_drift(trail, y, state))
    carry, of_parameters = walk(lambda carry: carry[0] > 0, back, field, carry, of_parameters)
    _, _, y, state, of_y, of_state, left, _, drift = carry
    for i, save in enumerate(saved):
        more = save.at_start(field, left[i], grid.t0, y0)
        of_y, of_parameters = _plus_both((of_y, of_parameters), more)
    drift = drift.noted(0, compared(y, state), compared(y0, state0), drift.sizes)
    return (of_y, of_state), of_parameters, drift.errors


def _round_trip(solver, compared, y0, state0, args, terms, end, trail):
    """The errors of reconstruction at the start and the anchors."""
    grid = trail.grid

    def back(carry):
        steps, (y, state), drift = carry
        y, state = solver.inverse(terms, grid.time(steps - 1), grid.time(steps), y, args, state)
        y, state, drift = _at_anchor(compared, trail, steps - 1, y, state, drift)
        return steps - 1, (y, state), drift

    _, found, drift = jax.lax.while_loop(lambda c: c[0] > 0, back, (trail.steps, end, _no_drift(trail, *end)))
    return drift.noted(0, compared(*found), compared(y0, state0), drift.sizes).errors


def _no_drift(trail, y, state) -> Drift:
    return Drift(jnp.zeros(len(trail.at) + 1, precision(y)), trail.sizes)


def _at_anchor(compared, trail, steps, y, state, drift):
    return compare(compared, trail.kept, trail.at, steps, y, state, drift) if len(trail.at) else (y, state, drift)


def _tolerance(adjoint, y):
    if adjoint.tolerance is not None:
        return adjoint.tolerance
    return 1e-6 if jnp.finfo(precision(y)).bits == 64 else 3e-4


_DRIFT = (
    "ReversibleAdjoint could not reconstruct the trajectory well enough for its gradient: rounding grew past the tolerance on the way "
    "back. The field contracts too much over this horizon (L T must stay below about 20 in float64 and 9 in float32 between two anchors), "
    "the coupling is too small for so many steps, or the solve is unstable. Try coupling='auto', more anchors, "
    "ReversibleAdjoint(on_drift='checkpoint'), float64, or diffrax.RecursiveCheckpointAdjoint(). "
    "ReversibleAdjoint(report=True) shows how far off it is."
)


def _warn(drifted, drift):
    if drifted.any():
        warnings.warn(f"{_DRIFT} (relative error {drift.max():.1e})", stacklevel=2)


def _is_fixed(controller) -> bool:
    return isinstance(controller, dfx.ConstantStepSize | dfx.StepTo)


def _nothing(t, y, args):
    return jnp.zeros(0)


def _is_none(leaf):
    return leaf is None


def _subs(saveat) -> list[dfx.SubSaveAt]:
    is_sub = lambda node: isinstance(node, dfx.SubSaveAt)
    return [node for node in jtu.tree_leaves(saveat.subs, is_leaf=is_sub) if is_sub(node)]


def _states(final) -> list[SaveState]:
    is_state = lambda node: isinstance(node, SaveState)
    return [node for node in jtu.tree_leaves(final.save_state, is_leaf=is_state) if is_state(node)]


def _constant(tree, name: str):
    return eqxi.nondifferentiable(
        tree,
        msg=f"ReversibleAdjoint has no gradient with respect to {name}; use another adjoint, or jax.lax.stop_gradient on it.",
    )


def _once(tree):
    return eqxi.nondifferentiable(
        tree,
        msg="ReversibleAdjoint is differentiated once, in reverse mode. For second derivatives use diffrax.DirectAdjoint().",
    )


def _only_ys(final):
    """The final state, of which only saved values may be differentiated."""
    get = lambda final: [save.ys for save in _states(final)]
    ys = get(final)
    final = eqxi.nondifferentiable_backward(final, name="ReversibleAdjoint: what is not in solution.ys", symbolic=False)
    return eqx.tree_at(get, final, ys)


def _stopped(tree):
    arrays, rest = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.lax.stop_gradient(arrays), rest)


def _zeros(tree):
    return jtu.tree_map(jnp.zeros_like, tree)


def _plus(tree, more):
    return tree if more is None else add(tree, more)


def _plus_both(pair, more):
    return _plus(pair[0], more[0]), _plus(pair[1], more[1])


_walked = Rule(_primal, _kept, _gradient)


def _full(cotangents, values):
    def one(value, c):
        if value is None:
            return None
        return jnp.zeros_like(value) if c is None else c

    return jtu.tree_map(one, values, cotangents, is_leaf=_is_none)
