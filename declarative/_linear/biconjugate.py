r"""The linear system of a fixed point, $(\partial_y T - I)\,v = b$: products only where they suffice, elimination where they do not.

Where T contracts, this matrix is well conditioned whatever its size, and a few products solve the system: stabilised biconjugate
gradients (van der Vorst 1992), which need no history. They can break down (a rotation is enough) and stagnate; each round starts
afresh from the true residual, and what four rounds leave unsolved goes to dense elimination, or above 512 unknowns to conjugate
gradients on the normal equations.

Broyden's method leaves $H = -I + \sum_i u_i v_i^\top$ behind, an approximation of the inverse. It is carried along for the adjoint that takes
it for the inverse itself, and is not used as a preconditioner: measured (256 unknowns, spectral radius .3 to .99), it saves less than one
product in ten, and costs more than a product.
"""

import equinox as eqx
import jax
import jax.extend
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float

from .._core.precision import FullPrecision
from .dense import Dense
from .lanes import over_lanes, where_needed

_ROUNDS = 4
DENSE = 512  # unknowns up to which elimination is what is left


class NearIdentityState(eqx.Module):
    operator: lx.AbstractLinearOperator
    # (us, vs) of H; None: nothing is known.
    inverse: tuple[Float[Array, "m n"], Float[Array, "m n"]] | None

    @property
    def T(self):
        return NearIdentityState(self.operator.T, None if self.inverse is None else (self.inverse[1], self.inverse[0]))

    def stand_in(self, vector):
        """H times a vector."""
        assert self.inverse is not None
        us, vs = self.inverse
        return (vs @ vector) @ us - vector


class NearIdentity(lx.AbstractLinearSolver):
    """Solves a `NearIdentityState` (given as the state) to the relative accuracy `rtol`, within about `max_steps` products."""

    rtol: float = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)

    def init(self, operator, options):
        del options
        return NearIdentityState(operator, None)

    def compute(self, state, vector, options):
        del options
        solution, residual = _biconjugate(state.operator, vector, self.rtol, self.max_steps)
        failed = ~(residual <= 10 * self.rtol)

        if vector.size <= DENSE:
            # What no method solves is for the caller, who checks the residual, to say.
            return jnp.where(failed, _eliminate(state.operator, vector, failed), solution), lx.RESULTS.successful, {}

        def otherwise(one):
            # `one` times the matrix: see `where_needed`.
            matrix = lx.FunctionLinearOperator(lambda v: state.operator.mv(one * v), state.operator.in_structure())
            normal = lx.Normal(lx.CG(rtol=self.rtol, atol=0.0, max_steps=10 * vector.size))
            return lx.linear_solve(matrix, vector, FullPrecision(normal), throw=False).value

        return where_needed(failed, otherwise, solution, _loop), lx.RESULTS.successful, {}

    def transpose(self, state, options):
        return state.T, options

    def conj(self, state, options):
        return state, options  # Real matrices only.

    def assume_full_rank(self):
        return True


def _eliminate(operator: lx.AbstractLinearOperator, vector: Float[Array, " n"], needed: Bool[Array, ""]):
    """By dense elimination, zeros where not needed. On CPU a batch goes lane by lane, each matrix formed only for its own solve."""
    closed = jax.make_jaxpr(operator.mv)(vector)

    def solve(vector, *constants):
        columns = lambda e: jax.extend.core.jaxpr_as_fun(closed.replace(consts=constants))(e)[0]
        matrix = jax.vmap(columns, out_axes=1)(jnp.eye(vector.size, dtype=vector.dtype))
        direct = Dense()
        return direct.compute(direct.init(lx.MatrixLinearOperator(matrix), {}), vector, {})[0]

    @over_lanes
    def kernel(needed, vector, *constants):
        return jax.lax.cond(needed, solve, lambda vector, *_: jnp.zeros_like(vector), vector, *constants)

    return kernel(needed, vector, *map(jnp.asarray, closed.consts))


def _loop(cond, body, init, max_steps):
    del max_steps
    return jax.lax.while_loop(cond, body, init)


class _Carry(eqx.Module):
    x: Array
    r: Array
    shadow: Array
    p: Array
    Ap: Array
    rho: Array
    alpha: Array
    omega: Array
    steps: Array


def _biconjugate(operator: lx.AbstractLinearOperator, b, rtol: float, max_steps: int):
    """(x, relative residual); `b` is of length about 1."""
    apply, size = operator.mv, jnp.sqrt(b @ b)
    enough = (rtol * size) ** 2
    one = jnp.ones((), b.dtype)

    def body(c: _Carry) -> _Carry:
        rho = c.shadow @ c.r
        beta = (rho / c.rho) * (c.alpha / c.omega)
        p = c.r + beta * (c.p - c.omega * c.Ap)
        Ap = apply(p)
        alpha = rho / (c.shadow @ Ap)
        s = c.r - alpha * Ap
        As = apply(s)
        omega = (As @ s) / (As @ As)
        # A residual that is zero already: nothing to smooth.
        omega = jnp.where(s @ s > 0, omega, 0)
        x = c.x + alpha * p + omega * s
        r = s - omega * As
        return _Carry(x, r, c.shadow, p, Ap, rho, alpha, omega, c.steps + 2)

    def going(c: _Carry):
        left = c.r @ c.r
        return (left > enough) & (c.steps < max_steps)  # false for NaN

    def begin(x, r, steps):
        zero = jnp.zeros_like(b)
        return _Carry(x, r, r, zero, zero, one, one, one, steps)

    def round_(carry):
        x, r, steps, rounds = carry
        out = jax.lax.while_loop(going, body, begin(x, r, steps))
        new = b - apply(out.x)
        better = new @ new < r @ r  # false for NaN
        x, r = jnp.where(better, out.x, x), jnp.where(better, new, r)
        return x, r, out.steps, rounds + 1

    unfinished = lambda carry: (carry[1] @ carry[1] > 100 * enough) & (carry[2] < max_steps) & (carry[3] < _ROUNDS)
    x = jnp.zeros_like(b)
    x, r, _, _ = jax.lax.while_loop(unfinished, round_, (x, b, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)))
    return x, jnp.sqrt(r @ r) / jnp.where(size > 0, size, 1)
