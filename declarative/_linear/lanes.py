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
    """`kernel`, a function of arrays that calls LAPACK, made safe to `vmap` on CPU. It is not differentiated: give it a rule."""
    return _with_axes(kernel, ())


def _with_axes(kernel: Callable[..., Any], batch: tuple[int, ...]) -> Callable[..., Any]:
    depth = len(batch)

    @custom_vmap
    def run(*arrays):
        if not batch:
            return kernel(*arrays)
        flat = tuple(array.reshape(prod(batch), *array.shape[depth:]) for array in arrays)
        one_by_one = lambda *lanes: jax.lax.map(lambda lane: kernel(*lane), lanes)
        out = jax.lax.platform_dependent(*flat, cpu=one_by_one, default=jax.vmap(kernel))
        return jtu.tree_map(lambda leaf: leaf.reshape(*batch, *leaf.shape[1:]), out)

    @run.def_vmap
    def _(size, in_batched, *arrays):
        spread = lambda array, batched: array if batched else jnp.broadcast_to(array, (size, *array.shape))
        arrays = tuple(spread(array, batched) for array, batched in zip(arrays, in_batched, strict=True))
        out = _with_axes(kernel, (size, *batch))(*arrays)
        return out, jtu.tree_map(lambda _: True, out)

    return run
