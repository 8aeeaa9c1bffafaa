r"""Picard iteration $y \leftarrow T(y)$, as an optimistix fixed-point solver.

optimistix has one. Its state starts in the default float type, so that float32 data fail to trace when x64 is enabled; this one
takes the dtype of the data. It stops where the change of the largest entry is at most `rtol * max|T(y)| + atol`: normwise, so an
entry that tends to zero does not hold up the rest.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool

from .._linear.norms import largest


class _State(eqx.Module):
    settled: Bool[Array, ""]


class Picard(optx.AbstractFixedPointSolver):
    """Repeats `y = fn(y, args)`; converges where `fn` is a contraction."""

    rtol: Any
    atol: Any
    norm: Any = eqx.field(static=True, default=optx.max_norm)

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        del fn, y, args, options, f_struct, aux_struct, tags
        return _State(jnp.zeros((), bool))

    def step(self, fn, y, args, options, state, tags):
        del options, state, tags
        new, aux = fn(y, args)
        change = largest(jtu.tree_map(jnp.subtract, new, y))
        return new, _State(change <= self.rtol * largest(new) + self.atol), aux

    def terminate(self, fn, y, args, options, state, tags):
        del fn, y, args, options, tags
        return state.settled, optx.RESULTS.successful

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        del fn, args, options, state, tags, result
        return y, aux, {}
