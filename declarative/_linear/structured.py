"""What lineax asks of an operator and of a solver, said once for systems whose structure it has no name for."""

import abc
from typing import ClassVar

import jax
import jax.numpy as jnp
import lineax as lx


class AbstractStructured(lx.AbstractLinearOperator):
    """A real square operator on vectors like `space`; a subclass has `mv` and `transpose` as well."""

    @property
    @abc.abstractmethod
    def space(self) -> jax.ShapeDtypeStruct:
        """Shape `(n,)` and dtype of the vectors."""

    def as_matrix(self):
        return jax.vmap(self.mv, out_axes=1)(jnp.eye(self.space.shape[0], dtype=self.space.dtype))

    def in_structure(self):
        return self.space

    def out_structure(self):
        return self.space


for _function in (lx.linearise, lx.materialise, lx.conj):
    _function.register(AbstractStructured)(lambda operator: operator)
for _function in (
    lx.is_symmetric,
    lx.is_diagonal,
    lx.is_tridiagonal,
    lx.is_lower_triangular,
    lx.is_upper_triangular,
    lx.is_positive_semidefinite,
    lx.is_negative_semidefinite,
    lx.has_unit_diagonal,
):
    _function.register(AbstractStructured)(lambda operator: False)


@lx.diagonal.register(AbstractStructured)
def _(operator):
    return jnp.diagonal(operator.as_matrix())


class AbstractStructuredSolver(lx.AbstractLinearSolver):
    """A solver of the operators `solves`; a subclass has `compute`. The state, which has a `transpose()`, is the operator if nothing is prepared."""

    solves: ClassVar[type[lx.AbstractLinearOperator]]

    def init(self, operator, options):
        del options
        if not isinstance(operator, self.solves):
            name, kind = type(self).__name__, self.solves.__name__
            raise ValueError(f"`{name}` solves `{kind}` systems only, got {type(operator).__name__}.")
        return self.prepare(operator)

    def prepare(self, operator):
        return operator

    def transpose(self, state, options):
        return state.transpose(), options

    def conj(self, state, options):
        return state, options  # Real matrices only.

    def assume_full_rank(self) -> bool:
        return True
