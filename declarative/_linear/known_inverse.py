"""A linear solve that a node can write down: for systems whose inverse is a few products with factors that are there already."""

from collections.abc import Callable

import equinox as eqx
import jax
import lineax as lx
from jaxtyping import Array, Float

from .._core.implicit import LinearSystem


class _Side(eqx.Module):
    transposed: bool = eqx.field(static=True)


class KnownInverse(lx.AbstractLinearSolver):
    """`apply(vector)` is the inverse, `apply_transpose(vector)` that of the transpose: `jax.tree_util.Partial`s of their arrays.

    Whatever they return is checked by the core against the JVP of `optimality`: a wrong inverse is a failure, not a wrong gradient.
    """

    apply: Callable
    apply_transpose: Callable

    def init(self, operator, options):
        del operator, options
        return _Side(False)

    def compute(self, state, vector, options):
        del options
        apply = self.apply_transpose if state.transposed else self.apply
        return apply(vector), lx.RESULTS.successful, {}

    def transpose(self, state, options):
        return _Side(not state.transposed), options

    def conj(self, state, options):
        return state, options  # Real matrices only.

    def assume_full_rank(self):
        return True


def known_inverse(vector: Float[Array, " n"], apply: Callable, apply_transpose: Callable) -> LinearSystem:
    """The system on vectors like `vector`. Its operator is never applied (the residual comes from `optimality`), so it is a stand-in.

    (Not an `IdentityLinearOperator`, for which lineax returns the right-hand side without a look at the solver.)
    """
    stand_in = lx.FunctionLinearOperator(_unused, jax.ShapeDtypeStruct(vector.shape, vector.dtype))
    return LinearSystem(stand_in, KnownInverse(apply, apply_transpose), _Side(False))


def _unused(vector):
    return vector
