r"""Newton's method on the semi-dual of a regularised transport problem, by continuation in the cost.

Given the multipliers $\gamma$ of the columns, those of the rows are exact, and what is left is a concave function $D(\gamma)$ whose
gradient is the mass that each column misses and whose Hessian is minus the Schur complement of a bipartite graph (`bipartite.py`).

- *Damping.* $(S + \lambda\,\mathrm{diag})\,\delta = \nabla D$, with $\lambda$ in proportion to the missing mass: with $\lambda \approx 1$ this is
  close to a Sinkhorn step, and Newton's convergence is kept near the solution.
- *Line search.* D is concave: a step is too long where its slope at the far end points back by more than half of what it was, unless D
  says that it climbed. By the slope, because near the solution D has no digits left for a comparison.
- *Continuation.* The problem is solved with the cost times $s$, $s$ four times larger at every stage, from where the plan is spread out:
  far from the solution of a nearly linear program the Hessian knows nothing of where to go.

One loop, an evaluation a trip; lanes of a batch that are done, or that search along a line, factorise nothing.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._linear.bipartite import Bipartite, damped_schur_solve

_GROWTH = 4.0
_COARSE = 0.1  # relative error at which a stage is good enough


class Evaluation(eqx.Module):
    """The semi-dual at a point, less what is constant in it."""

    value: Float[Array, ""]
    gradient: Float[Array, " m"]
    hessian: Bipartite
    damping: Float[Array, " m"]  # the diagonal that goes with lambda = 1
    error: Float[Array, ""]  # relative
    rounding: Float[Array, ""]  # of `error`
    rows: Float[Array, " n"]  # multipliers of the rows, here and as the next guess
    gamma: Float[Array, " m"]  # the point, moved along what is maximised in closed form


class Optimum(eqx.Module):
    gamma: Float[Array, " m"]
    rows: Float[Array, " n"]
    error: Float[Array, ""]  # there; infinite if the last stage was not begun
    steps: Int[Array, ""]
    converged: Bool[Array, ""]


class _State(eqx.Module):
    gamma: Float[Array, " m"]
    rows: Float[Array, " n"]
    value: Float[Array, ""]
    error: Float[Array, ""]
    direction: Float[Array, " m"]
    slope: Float[Array, ""]
    length: Float[Array, ""]
    trust: Float[Array, ""]
    scale: Float[Array, ""]
    fresh: Bool[Array, ""]  # a stage begins: there is nothing to compare with
    done: Bool[Array, ""]
    failed: Bool[Array, ""]
    steps: Int[Array, ""]


def maximise(
    evaluate: Callable[[Float[Array, ""], Float[Array, " m"], Float[Array, " n"]], Evaluation],
    gamma: Float[Array, " m"],
    rows: Float[Array, " n"],
    scale: Float[Array, ""],
    active: Bool[Array, ""],
    max_steps: int,
) -> Optimum:
    """`evaluate(s, gamma, rows)`: the semi-dual for s times the cost, from a guess of the rows' multipliers. `scale`: the first s."""
    dtype = gamma.dtype
    eps = float(jnp.finfo(dtype).eps)
    tol = eps**0.75

    def body(state: _State) -> _State:
        trial = state.gamma + state.length * state.direction
        at = evaluate(state.scale, trial, state.rows)
        end = at.gradient @ state.direction
        size = jnp.abs(state.value) + jnp.abs(at.value)
        climbed = at.value >= state.value + 1e-4 * state.length * state.slope
        level = at.value >= state.value - 64 * eps * size
        accept = state.fresh | (end >= 0) | climbed | (level & (end >= -0.5 * state.slope))
        accept = accept & jnp.isfinite(end)
        last = state.scale >= 1
        reached = at.error <= jnp.where(last, tol + at.rounding, _COARSE)
        done = accept & reached & last
        stage = accept & reached & ~last

        trust = jnp.where(state.fresh, state.trust, jnp.where(accept, state.trust / 4, state.trust * 4))
        trust = jnp.clip(trust, 1e-3, 1e3)
        damping = jnp.minimum(at.error, 1) * trust
        direction = damped_schur_solve(at.hessian, at.gradient, damping * at.damping, accept & ~reached)
        back = jnp.clip(state.slope / jnp.where(state.slope > end, state.slope - end, 1), 0.1, 0.5)
        back = jnp.where(jnp.isfinite(end), back, 0.1)

        new_scale = jnp.where(stage, jnp.minimum(_GROWTH * state.scale, 1), state.scale)
        gamma = jnp.where(accept, at.gamma, state.gamma) * (new_scale / state.scale)
        rows = jnp.where(accept, at.rows, state.rows) * (new_scale / state.scale)
        zero = jnp.zeros_like(direction)
        direction = jnp.where(stage | done, zero, jnp.where(accept, direction, state.direction))
        length = jnp.where(accept, jnp.ones_like(back), state.length * back)
        return _State(
            gamma=gamma,
            rows=rows,
            value=jnp.where(accept, at.value, state.value),
            error=jnp.where(stage, jnp.inf, jnp.where(accept, at.error, state.error)),
            direction=direction,
            slope=jnp.where(accept, at.gradient @ direction, state.slope),
            length=length,
            trust=trust,
            scale=new_scale,
            fresh=stage,
            done=done,
            failed=(length < eps) | ~jnp.all(jnp.isfinite(direction)),
            steps=state.steps + 1,
        )

    go_on = lambda state: ~state.done & ~state.failed & (state.steps < max_steps)
    zero, no = jnp.zeros((), dtype), jnp.zeros((), bool)
    start = _State(
        gamma=gamma,
        rows=rows,
        value=zero,
        error=jnp.where(active, jnp.inf, zero),
        direction=jnp.zeros_like(gamma),
        slope=zero,
        length=zero,
        trust=zero + 0.25,
        scale=scale,
        fresh=~no,
        done=~active,
        failed=no,
        steps=jnp.zeros((), jnp.int32),
    )
    end = jax.lax.while_loop(go_on, body, start)
    return Optimum(end.gamma, end.rows, end.error, end.steps, end.done & active)
