r"""Two blocks of unknowns that meet entry by entry: a two by two system for each pair, maybe in a rotated basis.

$$ \begin{bmatrix} A & B \\ C & D \end{bmatrix} \begin{bmatrix} v \\ w \end{bmatrix} = \begin{bmatrix} f \\ g \end{bmatrix},
   \qquad A, B, C, D \text{ diagonal} $$

The optimality conditions of a projection onto a box are of this form, a point and its multiplier meeting in each entry; those onto
the positive semidefinite cone too, in the basis of the eigenvectors.
"""

import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from .structured import AbstractStructured, AbstractStructuredSolver


class PairedDiagonal(AbstractStructured):
    """The operator on 2m entries. With a `basis` U (n, n), m = n^2: on pairs of matrices, whose entries meet in U' V U."""

    a: Float[Array, " m"]
    b: Float[Array, " m"]
    c: Float[Array, " m"]
    d: Float[Array, " m"]
    basis: Float[Array, "n n"] | None = None

    def mv(self, vector):
        v, w = self._rotated(vector)
        return self._back(self.a * v + self.b * w, self.c * v + self.d * w)

    def solve(self, vector):
        """Cramer's rule on every pair; a vanishing determinant gives infinities."""
        f, g = self._rotated(vector)
        det = self.a * self.d - self.b * self.c
        return self._back((self.d * f - self.b * g) / det, (self.a * g - self.c * f) / det)

    def _rotated(self, vector):
        v, w = jnp.split(vector, 2)
        basis = self.basis
        if basis is None:
            return v, w
        rotate = lambda matrix: (basis.T @ matrix.reshape(basis.shape) @ basis).reshape(-1)
        return rotate(v), rotate(w)

    def _back(self, v, w):
        basis = self.basis
        if basis is not None:
            rotate = lambda matrix: (basis @ matrix.reshape(basis.shape) @ basis.T).reshape(-1)
            v, w = rotate(v), rotate(w)
        return jnp.concatenate([v, w])

    def transpose(self):
        return PairedDiagonal(self.a, self.c, self.b, self.d, self.basis)

    @property
    def space(self):
        return jax.ShapeDtypeStruct((2 * self.a.size,), self.a.dtype)


class Paired(AbstractStructuredSolver):
    """Solves `PairedDiagonal` systems. A pair without a solution gives infinities, which lineax reports as singular."""

    solves = PairedDiagonal

    def compute(self, state, vector, options):
        del options
        vector, unravel = ravel_pytree(vector)
        return unravel(state.solve(vector)), lx.RESULTS.successful, {}
