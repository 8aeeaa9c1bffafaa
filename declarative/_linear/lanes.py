"""LAPACK under `vmap`, one lane at a time.

On CPU, jaxlib 0.10 deadlocks on two cores when two *batched* LAPACK calls that do not depend on each other are in flight: a worker of
XLA's pool waits for that same pool. Two vmapped nodes side by side in a user's model are enough. A call on one matrix waits for
nothing, so here a batch becomes a loop over its lanes around the unbatched call. That costs no time (measured, 128 x 50 and
128 x 100: as fast as the batched call, whose lanes hardly run in parallel), and every lane is bit-identical to the lane alone.
On other platforms a batch is a batch.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool

from .._core.precision import full_precision


def where_needed(needed: Bool[Array, ""], compute: Callable[[Array], Any], otherwise: Any, loop: Callable) -> Any:
    """`compute(one)` where `needed`, else `otherwise`: under `vmap`, nothing is computed unless some lane needs it.

    A `cond` under `vmap` computes both branches; a loop of at most one trip does not. XLA would move what does not change from one
    trip to the next out of the loop, and compute it always: `compute` must multiply its data by its argument, a scalar 1 that
    does change.
    """

    def body(carry):
        _, one, _ = carry
        return jnp.zeros((), bool), 0 * one, compute(one)

    dtype = next(leaf.dtype for leaf in jtu.tree_leaves(otherwise) if jnp.issubdtype(leaf.dtype, jnp.inexact))
    out = loop(lambda carry: carry[0], body, (needed, jnp.ones((), dtype), otherwise), max_steps=1)[2]
    return jtu.tree_map(lambda new, old: jnp.where(needed, new, old), out, otherwise)


def over_lanes(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, a function of arrays that calls LAPACK, made safe to `vmap` on CPU. It is not differentiated: give it a rule.

    Under `vmap`, an array that is the same for all lanes is not copied for each.
    """

    def lane_by_lane(axes, *arrays):
        if not axes:
            return kernel(*arrays)
        sizes = tuple(_size(which, level, axes, arrays) for level, which in enumerate(axes))
        laned = [any(has) for has in zip(*axes, strict=True)]

        def flat(array, has):
            """One axis of all lanes, for an array with some of the axes."""
            shape = iter(array.shape)
            lead = tuple(next(shape) if one else 1 for one in has)
            rest = tuple(shape)
            return jnp.broadcast_to(array.reshape(*lead, *rest), (*sizes, *rest)).reshape(prod(sizes), *rest)

        lanes = tuple(flat(array, has) for array, has in zip(arrays, zip(*axes, strict=True), strict=True) if any(has))

        def one(lane):
            rest = iter(lane)
            return kernel(*(next(rest) if has else array for array, has in zip(arrays, laned, strict=True)))

        one_by_one = lambda *lanes: jax.lax.map(one, lanes)
        out = jax.lax.platform_dependent(*lanes, cpu=one_by_one, default=jax.vmap(lambda *lane: one(lane)))
        return jtu.tree_map(lambda leaf: leaf.reshape(*sizes, *leaf.shape[1:]), out)

    return one_loop(lane_by_lane)


def _size(which, level, axes, arrays) -> int:
    """Of the axis `level` of a batch, from an array that has it."""
    index = which.index(True)
    return arrays[index].shape[sum(outer[index] for outer in axes[:level])]


def one_loop(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays whose batch is up to `kernel(axes, *arrays)`. It is not differentiated: give it a rule.

    `axes` has an entry for each `vmap` around it, the outermost first: which of the arrays have that axis, among their leading ones. The
    outputs have them all.
    """
    # A batching rule traces the kernel anew, in a backward pass after the node's call is over: full precision has to travel with it.
    return _with_axes(full_precision()(kernel), ())


def _with_axes(kernel: Callable[..., Any], axes: tuple[tuple[bool, ...], ...]) -> Callable[..., Any]:
    run = custom_vmap(lambda *arrays: kernel(axes, *arrays))

    @run.def_vmap
    def _(size, in_batched, *arrays):
        del size
        out = _with_axes(kernel, (tuple(in_batched), *axes))(*arrays)
        return out, jtu.tree_map(lambda _: True, out)

    return run
