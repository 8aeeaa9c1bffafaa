"""Matrix products of a node in the precision of their dtype.

By default JAX lets a GPU round the factors of a float32 product to ten bits (TF32), and a TPU to seven (bfloat16). That is fine for the
layers of a network. A solution is judged, and its gradient computed, to about the square root of the dtype's precision, which such
products do not have; an interior-point method does not converge with them at all.
"""

import contextlib

import jax
import lineax as lx


@contextlib.contextmanager
def full_precision():
    """Products are traced with precision "highest", unless the user has set `jax.default_matmul_precision`, whose word stands."""
    if jax.config.jax_default_matmul_precision is None:  # pyright: ignore[reportAttributeAccessIssue]  (JAX adds its flags at run time)
        with jax.default_matmul_precision("highest"):
            yield
    else:
        yield


class FullPrecision(lx.AbstractLinearSolver):
    """A linear solver whose own products are in full precision, whenever they are traced.

    `lx.linear_solve` is a primitive: its `compute` is traced when the program that it is part of is lowered or batched, outside of the
    context manager above.
    """

    solver: lx.AbstractLinearSolver

    def init(self, operator, options):
        with full_precision():
            return self.solver.init(operator, options)

    def compute(self, state, vector, options):
        with full_precision():
            return self.solver.compute(state, vector, options)

    def transpose(self, state, options):
        return self.solver.transpose(state, options)

    def conj(self, state, options):
        return self.solver.conj(state, options)

    def assume_full_rank(self):
        return self.solver.assume_full_rank()
