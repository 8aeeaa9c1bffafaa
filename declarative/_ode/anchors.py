"""States that a forward solve keeps on its way, to check the way back against and to go on from."""

# diffrax declares as class variables what its own subclasses have as fields and properties.
# pyright: reportIncompatibleVariableOverride=false, reportIncompatibleMethodOverride=false

from typing import Any

import diffrax as dfx
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PyTree

from .._linear.norms import largest


class AnchoredState(eqx.Module):
    inner: PyTree
    taken: Int[Array, ""]
    kept: PyTree[Array]  # (y, state), stacked
    at: Int[Array, " anchors"]  # after how many steps each was kept; -1: never


class Anchored(dfx.AbstractWrappedSolver):
    """`solver`, whose state also keeps (y, state) at the first step past each of `count` equally spaced times."""

    solver: dfx.AbstractSolver
    t0: Array
    t1: Array
    order_of_error: Any  # of the terms as the user gave them: whether they hold noise does not show in traced ones
    count: int = eqx.field(static=True)

    @property
    def term_structure(self):
        return self.solver.term_structure

    @property
    def interpolation_cls(self):
        return self.solver.interpolation_cls

    def order(self, terms):
        return self.solver.order(terms)

    def strong_order(self, terms):
        return self.solver.strong_order(terms)

    def error_order(self, terms):
        return self.order_of_error

    def func(self, terms, t0, y0, args):
        return self.solver.func(terms, t0, y0, args)

    def init(self, terms, t0, t1, y0, args):
        return self.start(y0, self.solver.init(terms, t0, t1, y0, args))

    def start(self, y, state) -> AnchoredState:
        room = jtu.tree_map(lambda leaf: jnp.zeros((self.count, *jnp.shape(leaf)), jnp.result_type(leaf)), (y, state))
        return AnchoredState(state, jnp.zeros((), jnp.int32), room, jnp.full(self.count, -1, jnp.int32))

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        y1, error, dense, inner, result = self.solver.step(terms, t0, t1, y0, args, solver_state.inner, made_jump)
        taken = solver_state.taken + 1
        if self.count == 0:
            return y1, error, dense, AnchoredState(inner, taken, solver_state.kept, solver_state.at), result
        slot = self._passed(t1)
        crossed = (slot > self._passed(t0)) & (slot <= self.count)
        index = jnp.clip(slot - 1, 0, self.count - 1)
        keep = lambda room, leaf: room.at[index].set(jnp.where(crossed, leaf, room[index]))
        kept = jtu.tree_map(keep, solver_state.kept, (y1, inner))
        return y1, error, dense, AnchoredState(inner, taken, kept, keep(solver_state.at, taken)), result

    def _passed(self, t):
        """How many of the times were passed by t; count + 1 at the end, where nothing needs to be kept."""
        horizon = jnp.where(self.t1 > self.t0, self.t1 - self.t0, 1)
        return jnp.floor((t - self.t0) / horizon * (self.count + 1)).astype(jnp.int32)


class Drift(eqx.Module):
    """How far off reconstruction was: at the start, and at each anchor."""

    errors: Float[Array, " anchors_plus_1"]
    # What is compared, at the later end of the stretch being walked. The scale of a leaf is its own, and local: beside one that is huge,
    # or where a solution grows or decays by much, another scale would hide an error that matters.
    later: PyTree[Array]

    def noted(self, place, found: PyTree, kept: PyTree) -> "Drift":
        """With the largest error of a leaf, relative to its largest entry at the two ends of the stretch."""
        errors = []
        for new, old, end in zip(*map(jtu.tree_leaves, (found, kept, self.later)), strict=True):
            scale = jnp.maximum(largest(old), largest(end))
            errors.append((largest(new - old) / jnp.where(scale > 0, scale, 1)).astype(self.errors.dtype))
        return Drift(self.errors.at[place].set(largest(errors)), kept)


def compare(solver, kept, at, steps, y, state, drift: Drift):
    """At an anchor: go on from what was kept, and note how far off it was."""
    here = at == steps
    arrived = jnp.any(here)

    def restart(y, state, drift):
        index = jnp.argmax(here)
        old_y, old_state = jtu.tree_map(lambda room: room[index], kept)
        noted = drift.noted(index + 1, solver.compared(y, state), solver.compared(old_y, old_state))
        choose = lambda new, old: jnp.where(arrived, new, old)
        return jtu.tree_map(choose, (old_y, old_state, noted), (y, state, drift))

    # Under `vmap` nothing is compared unless a lane is there.
    return jax.lax.cond(eqxi.unvmap_any(arrived), restart, lambda *same: same, y, state, drift)
