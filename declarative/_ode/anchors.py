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
from .trees import precision


class AnchoredState(eqx.Module):
    inner: PyTree
    taken: Int[Array, ""]
    sizes: list[Float[Array, ""]]  # of each leaf that is compared: its largest entry since the last state that was kept
    kept: PyTree[Array]  # (y, state, sizes), stacked
    at: Int[Array, " anchors"]  # after how many steps each was kept; -1: never


class Compared(eqx.Module):
    """What of a reconstructed (y, state) is compared with what was kept, leaf by leaf.

    Not the leaves of y that no field reads (an integral carried along, a log-determinant) where a step is linear but for the field: no
    derivative depends on their values, and one that comes back to zero would be all rounding.
    """

    solver: Any  # an AbstractReversibleSolver
    read: tuple[bool, ...] = eqx.field(static=True)  # by leaf of y

    def __call__(self, y: PyTree, state: PyTree) -> list[Array]:
        parts = self.solver.compared(y, state)
        if not self.solver.linear_but_for_field:
            return jtu.tree_leaves(parts)
        return [leaf for part in parts for leaf, read in zip(jtu.tree_leaves(part), self.read, strict=True) if read]


class Anchored(dfx.AbstractWrappedSolver):
    """`solver`, whose state also keeps (y, state) at the first step past each of `count` equally spaced times."""

    solver: dfx.AbstractSolver
    compared: Compared
    t0: Array
    t1: Array
    order_of_error: Any  # of the terms as the user gave them: whether they hold noise does not show in traced ones
    count: int = eqx.field(static=True)  # -1: nothing will walk back

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
        sizes = self._sizes(y, state)
        count = max(self.count, 0)
        kept = jtu.tree_map(lambda leaf: jnp.zeros((count, *jnp.shape(leaf)), jnp.result_type(leaf)), (y, state, sizes))
        return AnchoredState(state, jnp.zeros((), jnp.int32), sizes, kept, jnp.full(count, -1, jnp.int32))

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        y1, error, dense, inner, result = self.solver.step(terms, t0, t1, y0, args, solver_state.inner, made_jump)
        taken, sizes = solver_state.taken + 1, solver_state.sizes
        here = self._sizes(y1, inner)
        sizes = [jnp.maximum(a, b) for a, b in zip(sizes, here, strict=True)]
        if self.count <= 0:
            state = AnchoredState(inner, taken, sizes, solver_state.kept, solver_state.at)
            return y1, error, dense, state, result
        slot = self._passed(t1)
        crossed = (slot > self._passed(t0)) & (slot <= self.count)
        index = jnp.clip(slot - 1, 0, self.count - 1)
        keep = lambda room, leaf: room.at[index].set(jnp.where(crossed, leaf, room[index]))
        kept = jtu.tree_map(keep, solver_state.kept, (y1, inner, sizes))
        sizes = [jnp.where(crossed, new, old) for new, old in zip(here, sizes, strict=True)]
        state = AnchoredState(inner, taken, sizes, kept, keep(solver_state.at, taken))
        return y1, error, dense, state, result

    def _sizes(self, y, state) -> list:
        if self.count < 0:
            return []
        return [largest(leaf).astype(precision(y)) for leaf in self.compared(y, state)]

    def _passed(self, t):
        """How many of the times were passed by t; count + 1 at the end, where nothing needs to be kept."""
        horizon = jnp.where(self.t1 > self.t0, self.t1 - self.t0, 1)
        return jnp.floor((t - self.t0) / horizon * (self.count + 1)).astype(jnp.int32)


class Drift(eqx.Module):
    """How far off reconstruction was: at the start, and at each anchor."""

    errors: Float[Array, " anchors_plus_1"]
    # Of each leaf that is compared, the largest entry that it had on the stretch being walked, as the way there found it. The scale of a
    # leaf is its own, and local: beside one that is huge, or where a solution grows or decays by much, another scale would hide an
    # error that matters. Of all steps of the stretch, not of its ends alone: an integral that starts at zero may come back to it.
    sizes: list[Float[Array, ""]]

    def noted(self, place, found: list[Array], kept: list[Array], sizes: list) -> "Drift":
        """With the largest error of a leaf, relative to its size; `sizes` are those of the next stretch."""
        errors = []
        for new, old, size in zip(found, kept, self.sizes, strict=True):
            errors.append((largest(new - old) / jnp.where(size > 0, size, 1)).astype(self.errors.dtype))
        return Drift(self.errors.at[place].set(largest(errors)), sizes)


def compare(compared: Compared, kept, at, steps, y, state, drift: Drift):
    """At an anchor: go on from what was kept, and note how far off it was."""
    here = at == steps
    arrived = jnp.any(here)

    def restart(y, state, drift):
        index = jnp.argmax(here)
        old_y, old_state, sizes = jtu.tree_map(lambda room: room[index], kept)
        noted = drift.noted(index + 1, compared(y, state), compared(old_y, old_state), sizes)
        choose = lambda new, old: jnp.where(arrived, new, old)
        return jtu.tree_map(choose, (old_y, old_state, noted), (y, state, drift))

    # Under `vmap` nothing is compared unless a lane is there.
    return jax.lax.cond(eqxi.unvmap_any(arrived), restart, lambda *same: same, y, state, drift)
