r"""The linearised optimality conditions of a quadratic program, factored once, solved in both directions.

$$ J = \begin{bmatrix} Q & A^\top & G^\top & I \\ A & & & \\ \alpha G & & -\beta & \\ \alpha_b & & & -\beta_b \end{bmatrix}
   \qquad \text{unknowns } (z, \nu, \lambda, \mu) \tag{J} $$

with a pair $(\alpha_i, \beta_i)$ for each inequality and each bound: (1, 0) where it is active, (0, positive) where it is not, weights
between them on a central path. Equations go first: $z = Yb + Nw$ (`null_space.py`), and $\nu$ is read off stationarity at the
end. Eliminating $\lambda$ and $\mu$ then leaves $N^\top(Q + G^\top \mathrm{diag}(\alpha/\beta) G + \dots)N$. An active row would divide by zero;
there $\beta$ is at least `softness`, and iterative refinement with (J) itself takes that back: the method of multipliers, which
in a sweep gains a factor of softness over the smallest eigenvalue of the active rows' Schur complement. Where active rows depend on
one another the multipliers are not unique, and it converges to the least-norm ones: equal rows share equally. Where they nearly
do, it does not converge, and LU of (J) takes over, in those lanes only.

Everything is held scaled: rows by `row_scale`, columns by `column_scale`, both powers of two.
"""

import abc
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float

from .dense import inverse_where
from .lanes import where_needed
from .norms import largest
from .null_space import NullSpace
from .positive_definite import Gram, InverseRoot, factorise
from .structured import AbstractStructured, AbstractStructuredSolver

_SWEEPS = 12


def softness(dtype) -> float:
    """Of active rows. Too small, and rounding in a factor of condition 1/softness spoils a sweep; too large, and a sweep gains little.

    Chosen by trial, 128 x 100 and 32 x 200, conditions of Q from 10 to 1e6: two to five sweeps.
    """
    return 3e-7 if dtype == jnp.float64 else 1e-2


class Reduction(eqx.Module):
    """The blocks of (J) on the null space of A: N'QN and the rows GN, then N itself where there are bounds. Without A: Q, G, I."""

    P: Float[Array, "k k"] | Float[Array, " k"]
    R: Float[Array, "m k"] | None
    space: NullSpace | None

    def rows(self, w, size: int):
        """[R; N] w, as far as there are `size` rows."""
        parts = [] if self.R is None else [self.R @ w]
        m = 0 if self.R is None else self.R.shape[0]
        if size > m:
            parts.append(w if self.space is None else self.space.basis @ w)
        return jnp.concatenate(parts) if parts else jnp.zeros(0, w.dtype)

    def transpose(self, v):
        """[R; N]' v."""
        m = 0 if self.R is None else self.R.shape[0]
        total = jnp.zeros(self.P.shape[0], v.dtype) if self.R is None else v[:m] @ self.R
        if v.size > m:
            total = total + (v[m:] if self.space is None else v[m:] @ self.space.basis)
        return total

    def hessian(self, w):
        return self.P * w if self.P.ndim == 1 else self.P @ w

    def factorise(self, weights, needed=True) -> InverseRoot:
        """The inverse root of P + [R; N]' diag(weights) [R; N], in the lanes that need it."""
        m = 0 if self.R is None else self.R.shape[0]
        grams = [] if self.R is None else [Gram(self.R, weights[:m])]
        bounds = weights[m:] if weights.size > m else None
        if bounds is not None and self.space is not None:
            grams.append(Gram(self.space.basis, bounds))
            bounds = None
        return factorise(self.P, bounds, grams, needed)


def reduction(Q, G, space: NullSpace | None) -> Reduction:
    """N'QN and GN; columns of N that are padding get a one on the diagonal."""
    if space is None:
        return Reduction(Q, G, None)
    basis = space.basis
    P = (basis * Q[:, None]).T @ basis if Q.ndim == 1 else basis.T @ (Q @ basis)
    P = P + jnp.diag(1 - space.free.astype(P.dtype))
    return Reduction(P, None if G is None else G @ basis, space)


class AbstractKKT(eqx.Module):
    """(J) with a way to solve with it, in unscaled coordinates."""

    row_scale: eqx.AbstractVar[Float[Array, " size"]]

    @abc.abstractmethod
    def multiply(self, vector: Float[Array, " size"], transposed: bool = False) -> Float[Array, " size"]:
        """J vector, or its transpose."""

    @abc.abstractmethod
    def solve(
        self, vector: Float[Array, " size"], loop: Callable, transposed: bool = False, floor: float | Array = 0.0
    ) -> Float[Array, " size"]:
        """J^-1 vector, or its transpose; refined until the residual stops falling.

        `floor`: the (scaled) size of what the result will be added to; digits below its rounding are not sought.
        """


class KKT(AbstractKKT):
    """(J), scaled, with its factor. `alpha`, `beta` run over the rows of G, then over the bounds where there are any."""

    Q: Float[Array, "n n"] | Float[Array, " n"]
    A: Float[Array, "p n"] | None
    G: Float[Array, "m n"] | None
    alpha: Float[Array, " rows"]
    beta: Float[Array, " rows"]
    row_scale: Float[Array, " size"]
    column_scale: Float[Array, " size"]
    reduced: Reduction
    root: InverseRoot

    def solve(
        self, vector: Float[Array, " size"], loop: Callable, transposed: bool = False, floor: float | Array = 0.0
    ) -> Float[Array, " size"]:
        into, out_of = self.row_scale, self.column_scale
        if transposed:
            into, out_of = out_of, into
        b = into * vector
        x = self._eliminate(b, loop, transposed, floor)
        # A right-hand side that is not finite must show.
        return out_of * jnp.where(jnp.all(jnp.isfinite(b)), x, jnp.nan)

    def multiply(self, vector: Float[Array, " size"], transposed: bool = False) -> Float[Array, " size"]:
        into, out_of = self.column_scale, self.row_scale
        if transposed:
            into, out_of = out_of, into
        return self._multiply(vector / into, transposed) / out_of

    def _split(self, vector):
        n = self.Q.shape[0]
        p = 0 if self.A is None else self.A.shape[0]
        return vector[:n], vector[n : n + p], vector[n + p :]

    def _hessian(self, z):
        return self.Q * z if self.Q.ndim == 1 else self.Q @ z

    def _rows(self, z):
        return Reduction(self.Q, self.G, None).rows(z, self.alpha.size)

    def _multiply(self, vector, transposed):
        z, nu, lam = self._split(vector)
        first = self._hessian(z) + rows_transposed(self.G, self._force(lam, transposed), z.size)
        if self.A is not None:
            first = first + nu @ self.A
        third = self._pull(self._rows(z), transposed) - self.beta * lam
        return jnp.concatenate([first, *([] if self.A is None else [self.A @ z]), third])

    def _force(self, lam, transposed):
        """What enters stationarity, and (`_pull`) what the rows of z give: alpha sits on one side or the other."""
        return self.alpha * lam if transposed else lam

    def _pull(self, rows, transposed):
        return rows if transposed else self.alpha * rows

    def _weights(self):
        return self.alpha / soften(self.alpha, self.beta)

    def _eliminate(self, b, loop, transposed, floor):
        """z = Y r2 + N w, then (w, lambda) by refinement in reduced coordinates, then nu from stationarity."""
        r1, r2, r3 = self._split(b)
        reduced, space, size = self.reduced, self.reduced.space, self.alpha.size
        if space is not None:
            z = space.particular @ r2
            r1_reduced = (r1 - self._hessian(z)) @ space.basis
            r3 = r3 - self._pull(self._rows(z), transposed)
        else:
            z, r1_reduced = jnp.zeros_like(r1), r1
        k = r1_reduced.size
        beta = soften(self.alpha, self.beta)

        def multiply(x):
            w, lam = x[:k], x[k:]
            first = reduced.hessian(w) + reduced.transpose(self._force(lam, transposed))
            return jnp.concatenate([first, self._pull(reduced.rows(w, size), transposed) - self.beta * lam])

        def precondition(r):
            first, third = r[:k], r[k:]
            w = self.root.solve(first + reduced.transpose(self._force(third / beta, transposed)))
            lam = (self._pull(reduced.rows(w, size), transposed) - third) / beta
            return jnp.concatenate([w, lam])

        rhs = jnp.concatenate([r1_reduced, r3])
        x, error, rounding = refine(rhs, multiply, precondition, loop, floor)
        # Active rows that nearly depend on one another: their Schur complement squares the condition, LU of the whole does not.
        slow = error > 100 * rounding

        def compute(one):
            eye = jnp.eye(rhs.size, dtype=rhs.dtype)
            inverse = inverse_where(slow, jax.vmap(multiply, out_axes=1)(one * eye))
            return refine(rhs, multiply, lambda r: inverse @ r, loop, floor)[:2]

        other, other_error = where_needed(slow, compute, (x, error), loop)
        x = jnp.where(other_error < error, other, x)
        w, lam = x[:k], x[k:]
        if space is None:
            return x
        z = z + space.basis @ w
        force = r1 - self._hessian(z) - rows_transposed(self.G, self._force(lam, transposed), z.size)
        return jnp.concatenate([z, force @ space.particular, lam])


def refine(b, multiply: Callable, precondition: Callable, loop: Callable, floor, sweeps: int = _SWEEPS):
    """Iterative refinement: x with multiply(x) = b, as long as a sweep at least halves the residual; x, residual, its rounding."""
    eps = float(jnp.finfo(b.dtype).eps)
    size = jnp.maximum(largest(b), floor)

    def body(carry):
        x, r, error, _ = carry
        new = x + precondition(r)
        new_r = b - multiply(new)
        new_error = largest(new_r)
        better = new_error < error
        x, r = jnp.where(better, new, x), jnp.where(better, new_r, r)
        # The entries of the matrix are about 1, so rounding in `multiply` is about eps times the larger of b and x.
        rounding = 8 * eps * jnp.maximum(size, largest(x))
        return x, r, jnp.where(better, new_error, error), (new_error < 0.5 * error) & (new_error > rounding)

    start = (jnp.zeros_like(b), b, largest(b), jnp.any(b != 0))
    x, _, error, _ = loop(lambda carry: carry[3], body, start, max_steps=sweeps)
    return x, error, 8 * eps * jnp.maximum(size, largest(x))


def rows_transposed(G, v, n: int):
    """[G; I]' v, either block absent where `v` is too short for it."""
    m = 0 if G is None else G.shape[0]
    total = v[m:] if v.size > m else jnp.zeros(n, v.dtype)
    return total if G is None else total + v[:m] @ G


def soften(alpha, beta):
    return jnp.where(alpha > 0, jnp.maximum(beta, alpha * softness(alpha.dtype)), beta)


class KKTOperator(AbstractStructured):
    """(J) or its transpose as lineax sees it."""

    kkt: AbstractKKT
    transposed: bool = eqx.field(static=True, default=False)

    def mv(self, vector):
        return self.kkt.multiply(vector, self.transposed)

    def transpose(self):
        return KKTOperator(self.kkt, not self.transposed)

    @property
    def space(self):
        return jax.ShapeDtypeStruct(self.kkt.row_scale.shape, self.kkt.row_scale.dtype)


class KKTSolver(AbstractStructuredSolver):
    """Solves a `KKTOperator` with the factor that it carries."""

    loop: Callable = eqx.field(static=True)

    solves = KKTOperator

    def compute(self, state, vector, options):
        del options
        return state.kkt.solve(vector, self.loop, state.transposed), lx.RESULTS.successful, {}
