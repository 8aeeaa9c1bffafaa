"""States that a forward solve keeps on its way, to check the way back against and to go on from."""

# diffrax declares as class variables what its own subclasses have as fields and properties.
# pyright: reportIncompatibleVariableOverride=false, reportIncompatibleMethodOverride=false

from typing import Any

import diffrax as dfx
import equinox as eqx
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
    end: PyTree[Array]  # what is compared, at the end of the solve

    def noted(self, place, found: PyTree, kept: PyTree) -> "Drift":
        """With the largest difference, relative to the largest entry of the state there or at the end."""
        # Of all leaves together: a leaf that starts at zero (a log-density, a cost) has no scale of its own.
        scale = jnp.maximum(largest(kept), largest(self.end))
        worst = largest(jtu.tree_map(jnp.subtract, found, kept)) / jnp.where(scale > 0, scale, 1)
        return Drift(self.errors.at[place].set(worst.astype(self.errors.dtype)), self.end)


def compare(solver, kept, at, steps, y, state, drift: Drift):
    """At an anchor: go on from what was kept, and note how far off it was."""
    here = at == steps

    def restart(y, state, drift):
        index = jnp.argmax(here)
        old_y, old_state = jtu.tree_map(lambda room: room[index], kept)
        return old_y, old_state, drift.noted(index + 1, solver.compared(y, state), solver.compared(old_y, old_state))

    return jax.lax.cond(jnp.any(here), restart, lambda *same: same, y, state, drift)
