r"""Lasso and elastic net: coordinate descent finds the support, a Newton step on it the coefficients.

**Problem.**     $\min_\beta \tfrac{1}{2n}\|y - X\beta\|^2 + \sum_j \lambda_j |\beta_j| + \tfrac12\sum_j \rho_j \beta_j^2$                  (P)
**Optimality.**  With $c = X^\top(y - X\beta)/n - \rho\beta$, $L_j = \|X_j\|^2/n + \rho_j$ and the soft threshold
                 $\beta_j = S(\beta_j + c_j/L_j,\ \lambda_j/L_j)$                                                                            (K1)
**Solver.**      Rounds. A round measures (K1); cycles coordinate descent over a working set: the non-zero coefficients, and those
                 whose violation is within a factor of the largest; and, once a cycle leaves all signs as they are, minimises over
                 the orthant of these signs: one Cholesky factor of $X_S^\top X_S/n + \rho$, up to where the first coefficient
                 would change its sign, which is then zero. Every step lowers (P), and the last one is exact.

Working sets: Massias, Gramfort & Salmon 2018, *Celer*, arXiv:1802.07481. The step on the orthant: Lee, Battle, Raina & Ng 2007,
*Efficient sparse coding algorithms* (feature-sign search). Violations are measured in units of $\sqrt{L_j}\beta_j$, those of y, so
that the scale of a column does not matter.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._linear.norms import largest, norm
from .._linear.support import buffer, solve_gram

_CYCLES = 10  # of coordinate descent in a round, at most
_WORKING = 0.3  # of the largest violation: what enters the working set


class Penalised(NamedTuple):
    """(P): `columns` is X transposed, (p, n)."""

    columns: Float[Array, "p n"]
    y: Float[Array, " n"]
    lam: Float[Array, " p"]
    ridge: Float[Array, " p"]

    @property
    def curvature(self) -> Float[Array, " p"]:
        """L, 1 where it vanishes."""
        n = self.y.size
        found = jnp.sum(self.columns**2, axis=1) / n + self.ridge
        return jnp.where(found > 0, found, 1)

    def residual(self, beta: Float[Array, " p"]) -> Float[Array, " n"]:
        return self.y - beta @ self.columns

    def correlation(self, beta: Float[Array, " p"], residual: Float[Array, " n"]) -> Float[Array, " p"]:
        """c, the negative gradient of the smooth part."""
        return self.columns @ residual / residual.size - self.ridge * beta


class Found(NamedTuple):
    beta: Float[Array, " p"]
    converged: Bool[Array, ""]
    steps: Int[Array, ""]  # rounds and cycles


def on_support(
    beta: Float[Array, " p"],
    c: Float[Array, " p"],
    lam: Float[Array, " p"],
    curvature: Float[Array, " p"],
    residual: Float[Array, " n"],
) -> Bool[Array, " p"]:
    """Where (K1) is not zero: above the threshold by more than rounding, or without one."""
    eps = float(jnp.finfo(beta.dtype).eps)
    noise = 16 * eps * (jnp.sqrt(curvature) * norm(residual) / residual.size**0.5 + lam)
    return (jnp.abs(curvature * beta + c) > lam + noise) | (lam == 0)


class _State(NamedTuple):
    beta: Float[Array, " p"]
    error: Float[Array, ""]
    done: Bool[Array, ""]
    steps: Int[Array, ""]


def lasso(problem: Penalised, k: int, max_steps: int, rtol: float) -> Found:
    """(P) by its own rules; supports of more than `k` are left to coordinate descent alone. No derivative rule."""
    columns, y, lam, ridge = problem
    p, n = columns.shape
    curvature = problem.curvature
    root = jnp.sqrt(curvature)
    eps = float(jnp.finfo(y.dtype).eps)
    # Infinite weights exclude a column.
    threshold = lam / curvature

    def soften(v, threshold):
        return jnp.where(jnp.abs(v) <= threshold, 0, v - jnp.sign(v) * jnp.where(jnp.isinf(threshold), 0, threshold))

    def round(state: _State) -> _State:
        beta = state.beta
        residual = problem.residual(beta)
        c = problem.correlation(beta, residual)
        on = on_support(beta, c, lam, curvature, residual)
        violation = root * jnp.abs(jnp.where(on, soften(beta + c / curvature, threshold), 0) - beta)
        error = largest(violation)
        tolerance = rtol * largest(root * beta) + 8 * eps * norm(residual) / n**0.5
        # Coefficients that are smaller than rounding of what holds them up are zero.
        done = (error <= tolerance) | ~jnp.isfinite(error)
        beta = jnp.where(done & ~on, 0, beta)
        working = (beta != 0) | (violation > _WORKING * error)
        working = working & ~done
        cycled, stable, cycles = descend(beta, residual, working, error)
        moved = newton(cycled, stable & ~done)
        return _State(jnp.where(done, beta, moved), error, done, state.steps + cycles + jnp.where(done, 0, 1))

    def descend(beta, residual, working, error):
        order = jnp.nonzero(working, size=p, fill_value=0)[0].astype(jnp.int32)
        count = jnp.sum(working, dtype=jnp.int32)

        def visit(carry):
            i, beta, residual, change, stable = carry
            j = order[i]
            column, old = columns[j], beta[j]
            c = column @ residual / n - ridge[j] * old
            new = soften(old + c / curvature[j], threshold[j])
            residual = residual - (new - old) * column
            change = jnp.maximum(change, root[j] * jnp.abs(new - old))
            stable = stable & (jnp.sign(new) == jnp.sign(old))
            return i + 1, beta.at[j].set(new), residual, change, stable

        def cycle(carry):
            beta, residual, _, _, cycles = carry
            start = (jnp.zeros((), jnp.int32), beta, residual, jnp.zeros_like(error), jnp.ones((), bool))
            _, beta, residual, change, stable = jax.lax.while_loop(lambda carry: carry[0] < count, visit, start)
            return beta, residual, change, stable, cycles + 1

        def going(carry):
            _, _, change, stable, cycles = carry
            settled = (change <= 0.02 * error) | (stable & (cycles >= 2) & (count <= k))
            return (cycles < _CYCLES) & (count > 0) & ~settled

        start = (beta, residual, jnp.full_like(error, jnp.inf), jnp.zeros((), bool), jnp.zeros((), jnp.int32))
        beta, _, _, stable, cycles = jax.lax.while_loop(going, cycle, start)
        return beta, stable, cycles

    def newton(beta, wanted):
        support = (beta != 0) & jnp.isfinite(beta)
        held = buffer(support, k)
        wanted = wanted & (held.count > 0) & (held.count <= k)
        sign = jnp.sign(beta)
        c = problem.correlation(beta, problem.residual(beta))
        slope = jnp.where(support, c - sign * jnp.where(jnp.isinf(lam), 0, lam), 0)
        scaled = (columns / n**0.5, ridge, held.index, held.gather(slope)[:, None])
        step, _ = solve_gram(wanted, *scaled)
        step = held.scatter(step[:, 0], p)
        crossed = (lam > 0) & support & (jnp.sign(beta + step) != sign)
        ratio = jnp.where(crossed, -beta / jnp.where(crossed, step, 1), jnp.inf)
        length = jnp.minimum(jnp.min(ratio, initial=jnp.inf), 1)
        moved = jnp.where(ratio <= length, 0, beta + length * step)
        return jnp.where(wanted & jnp.all(jnp.isfinite(step)), moved, beta)

    zero = jnp.zeros(p, y.dtype)
    start = _State(zero, jnp.full((), jnp.inf, y.dtype), jnp.zeros((), bool), jnp.zeros((), jnp.int32))
    end = jax.lax.while_loop(lambda state: ~state.done & (state.steps < max_steps), round, start)
    return Found(end.beta, end.done & jnp.isfinite(end.error), end.steps)
