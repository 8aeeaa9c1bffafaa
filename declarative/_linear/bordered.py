r"""A diagonal matrix bordered by one row and one column, and its O(n) solve.

$$ \begin{bmatrix} D & c \\ r^\top & \gamma \end{bmatrix} \begin{bmatrix} v \\ \mu \end{bmatrix} = \begin{bmatrix} a \\ \beta \end{bmatrix},
   \qquad \mu = \frac{\beta - r^\top D^{-1} a}{\gamma - r^\top D^{-1} c}, \quad v = D^{-1}(a - c\mu) \tag{S} $$

The KKT systems of separable problems with one equality constraint are of this form: the simplex maps, and projections onto
anything cut out by one linear equation. (S) is block elimination on D, with the Schur complement in the denominator.
"""

import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from .structured import AbstractStructured, AbstractStructuredSolver


class BorderedDiagonal(AbstractStructured):
    """The operator on vectors of n + 1 entries, the border last."""

    diagonal: Float[Array, " n"]
    column: Float[Array, " n"]
    row: Float[Array, " n"]
    corner: Float[Array, ""]

    def mv(self, vector):
        v, mu = vector[:-1], vector[-1]
        return jnp.append(self.diagonal * v + self.column * mu, self.row @ v + self.corner * mu)

    def transpose(self):
        return BorderedDiagonal(self.diagonal, self.row, self.column, self.corner)

    @property
    def space(self):
        return jax.ShapeDtypeStruct((self.diagonal.size + 1,), self.diagonal.dtype)


class Bordered(AbstractStructuredSolver):
    """(S). A vanishing diagonal entry or Schur complement gives infinities, which lineax reports as singular."""

    solves = BorderedDiagonal

    def compute(self, state, vector, options):
        del options
        vector, unravel = ravel_pytree(vector)
        a, beta = vector[:-1] / state.diagonal, vector[-1]
        c = state.column / state.diagonal
        mu = (beta - state.row @ a) / (state.corner - state.row @ c)
        return unravel(jnp.append(a - c * mu, mu)), lx.RESULTS.successful, {}


@lx.diagonal.register(BorderedDiagonal)
def _(operator):
    return jnp.append(operator.diagonal, operator.corner)
