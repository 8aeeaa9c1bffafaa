r"""What the maps onto the probability simplex share: their data, their unknown and their one optimality system.

With $\exp_\alpha(t) = [1 + (\alpha - 1)t]_+^{1/(\alpha - 1)}$ ($\alpha \to 1$: $e^t$), all three are

$$ p_i = \exp_\alpha(z_i - \theta) \tag{K1} \qquad 1^\top p = 1 \tag{K2} $$

for softmax ($\alpha = 1$), entmax and sparsemax ($\alpha = 2$). The Jacobian of (K1)-(K2) in $(p, \theta)$ is the bordered diagonal
$\begin{bmatrix} -I & -s \\ 1^\top & 0 \end{bmatrix}$ with $s_i = p_i^{2-\alpha}$ on the support: its Schur complement is $-\sum_i s_i$, never zero.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._core.adjoint import lax_loop
from ..._core.implicit import LinearSystem, Run
from ..._core.results import RESULTS, choose
from ..._linear.bordered import Bordered, BorderedDiagonal
from ..._solvers.simplex_maps import simplex_map


class Scores(eqx.Module):
    """One row of scores, shape (n,), and the entries that take part: `mask` is True where an entry is kept, None keeps all.

    A batch of them, shape (batch, n), is what `jax.vmap(node.solve)` takes; so shapes are checked by the node, not here.
    """

    scores: Array
    mask: Array | None = None


class SimplexPoint(eqx.Module):
    """The unknown of a simplex map: the probabilities, and the multiplier of (K2) less the largest score.

    Less the largest score, because differences of scores are exact where their sizes are not: at a common offset of 1e6 a
    float32 multiplier would be off by 0.06.
    """

    probabilities: Float[Array, " n"]
    theta: Float[Array, ""]


def pack(x, mask=None) -> Scores:
    """`Scores` from whatever the caller gave. What the mask takes out may be anything, NaN too: it becomes -inf here."""
    x = x if isinstance(x, Scores) else Scores(jnp.asarray(x), None if mask is None else jnp.asarray(mask))
    good = x.mask is not None and x.mask.dtype == jnp.bool_ and x.mask.shape == x.scores.shape
    return Scores(masked(x), x.mask) if good else x  # anything else is for `check` to name


def check(x, name: str) -> None:
    """Shapes and dtypes of `Scores`; nothing that depends on values."""
    if not isinstance(x, Scores):
        raise ValueError(f"{name} takes a vector of scores or a `Scores`, got {type(x).__name__}.")
    if x.scores.ndim != 1:
        raise ValueError(
            f"{name} takes one row of scores, shape (n,), got shape {x.scores.shape}: use `jax.vmap` for batches."
        )
    if x.scores.size == 0 or not jnp.issubdtype(x.scores.dtype, jnp.floating):
        raise ValueError(f"scores must be a non-empty floating vector, got {x.scores.dtype}{list(x.scores.shape)}.")
    if x.mask is not None and (x.mask.dtype != jnp.bool_ or x.mask.shape != x.scores.shape):
        raise ValueError(
            f"mask must be boolean with the shape of the scores, {x.scores.shape}; got {x.mask.dtype}{list(x.mask.shape)}."
        )


def masked(x: Scores) -> Float[Array, " n"]:
    return x.scores if x.mask is None else jnp.where(x.mask, x.scores, -jnp.inf)


def reference(x: Scores) -> Float[Array, ""]:
    """The largest score, without its gradient; 0 for a row that has no finite one."""
    top = jax.lax.stop_gradient(jnp.max(masked(x)))
    return jnp.where(jnp.isfinite(top), top, 0)


def multiplier(y: SimplexPoint, x: Scores) -> Float[Array, ""]:
    """theta of (K1)."""
    return y.theta + reference(x)


def exp_alpha(t: Float[Array, " n"], alpha) -> Float[Array, " n"]:
    """(K1), finite and with finite derivatives for every `t` that a score and a multiplier can make."""
    eps = alpha - 1
    if isinstance(eps, (int, float)) and eps == 0:
        return jnp.exp(t)
    u = eps * t
    inside = u > -1
    safe = jnp.where(inside, u, 0)  # A select on both sides: no derivative of log or power at a bad point.
    if isinstance(eps, (int, float)):
        return jnp.where(inside, (1 + safe) ** (1 / eps) if eps > 0.1 else jnp.exp(jnp.log1p(safe) / eps), 0)
    near_one = jnp.abs(eps) < jnp.finfo(t.dtype).tiny
    limit, eps = jnp.where(near_one, t, 0), jnp.where(near_one, 1, eps)
    return jnp.where(inside, jnp.exp(jnp.where(near_one, limit, jnp.log1p(safe) / eps)), 0)


def optimality(y: SimplexPoint, x: Scores, alpha) -> SimplexPoint:
    """(K1)-(K2), as T(y) - y. Rows without a finite maximum have no root: their documented value is the solution instead."""
    z = masked(x)
    top = jnp.max(z)
    regular = jnp.isfinite(top)
    # -inf is a masked entry (p = 0, no derivative), whatever theta is.
    kept = regular & (z > -jnp.inf)
    t = jnp.where(kept, z - reference(x), 0) - y.theta
    infinite = z == jnp.inf
    shares = infinite.astype(z.dtype) / jnp.maximum(jnp.sum(infinite), 1).astype(z.dtype)
    p = jnp.where(kept, exp_alpha(t, alpha), jnp.where(regular, 0, shares))
    # A row with a NaN stays connected to its scores, so that a NaN cotangent reaches them.
    p = jnp.where(jnp.isnan(top), z, p)
    return SimplexPoint(p - y.probabilities, jnp.where(regular, jnp.sum(y.probabilities) - 1, y.theta))


def linear_system(y: SimplexPoint, x: Scores, alpha) -> LinearSystem:
    """The bordered diagonal of (K1)-(K2)."""
    regular = jnp.isfinite(jnp.max(masked(x)))
    support = (y.probabilities > 0) & regular
    p = jnp.where(support, y.probabilities, 1)
    s = jnp.where(support, p ** (2 - alpha), 0)
    ones = jnp.ones_like(p)
    corner = jnp.where(regular, 0, 1).astype(p.dtype)
    return LinearSystem(BorderedDiagonal(-ones, -s, jnp.where(regular, ones, 0), corner), Bordered())


def run(x: Scores, alpha, max_steps: int, loop: Callable, *, shifted: bool) -> Run:
    """The kernel, which has the derivative in closed form; under an adjoint that unrolls, iterations that can be unrolled.

    `shifted` makes the multiplier as accurate as the probabilities, for one more pass over the row: an adjoint that solves (K1)-(K2)
    looks at it, the closed form does not.
    """
    if loop is not lax_loop:
        return _unrollable(x, alpha, max_steps, loop)
    top = reference(x)
    solution = simplex_map(masked(x) - top if shifted else masked(x), alpha, max_steps)
    result = choose(solution.converged, RESULTS.successful, RESULTS.nonlinear_max_steps_reached)
    result = choose(solution.finite, result, RESULTS.nonfinite_data)
    # Infinite and empty rows have no multiplier; the optimality system asks for 0 there.
    theta = solution.theta if shifted else solution.theta - top
    theta = jnp.where(jnp.isinf(theta), 0, theta)
    return Run(SimplexPoint(solution.probabilities, theta), result, solution.steps)


def _unrollable(x: Scores, alpha, max_steps: int, loop: Callable) -> Run:
    """Newton on (K2) from the largest score, monotone for alpha <= 2, where the mass is convex in theta."""
    if isinstance(alpha, (int, float)) and alpha > 2:
        raise ValueError(f"iterations can be unrolled for alpha <= 2 only, got alpha = {alpha}: use adjoint=None.")
    z = masked(x)
    top = jnp.max(z)
    regular = jnp.isfinite(top)
    kept = regular & (z > -jnp.inf)
    safe = jnp.where(kept, z - reference(x), 0)
    eps = float(jnp.finfo(z.dtype).eps)

    def step(theta):
        p = jnp.where(kept, exp_alpha(safe - theta, alpha), 0)
        positive = p > 0
        slope = jnp.sum(jnp.where(positive, jnp.where(positive, p, 1) ** (2 - alpha), 0))
        return (jnp.sum(p) - 1) / jnp.where(slope > 0, slope, 1)

    def body(carry):
        theta, steps, _ = carry
        change = jnp.where(regular, step(theta), 0)
        return theta + change, steps + 1, jnp.abs(change) <= 8 * eps * jnp.maximum(jnp.abs(theta), 1)

    theta = jnp.zeros_like(top)
    start = (theta, jnp.zeros((), jnp.int32), ~regular)
    theta, steps, done = loop(lambda carry: ~carry[2], body, start, max_steps=max_steps)
    point = optimality(SimplexPoint(jnp.zeros_like(z), theta), x, alpha)
    result = choose(done, RESULTS.successful, RESULTS.nonlinear_max_steps_reached)
    return Run(SimplexPoint(point.probabilities, theta), result, steps)


def tsallis_entropy(p: Float[Array, " n"], alpha) -> Float[Array, ""]:
    r"""$H_\alpha(p) = \sum_i (p_i - p_i^\alpha) / (\alpha(\alpha - 1))$; Shannon's at $\alpha = 1$; entries that are 0 count 0."""
    positive = p > 0
    logs = jnp.log(jnp.where(positive, p, 1))
    eps = jnp.asarray(alpha, p.dtype) - 1
    near_one = jnp.abs(eps) < jnp.finfo(p.dtype).tiny
    eps = jnp.where(near_one, 1, eps)
    terms = jnp.where(near_one, logs, jnp.expm1(eps * logs) / eps)
    return -jnp.sum(jnp.where(positive, p * terms, 0)) / jnp.asarray(alpha, p.dtype)


def attained(y: SimplexPoint, x: Scores, alpha) -> Float[Array, ""]:
    """p'z + H(p), the entries of p that are 0 counting 0 (their score may be infinite)."""
    z = jnp.where(y.probabilities > 0, masked(x), 0)
    return y.probabilities @ z + tsallis_entropy(y.probabilities, alpha)


def threshold_distance(y: SimplexPoint, x: Scores, alpha) -> Float[Array, ""]:
    """How far the nearest score is from the threshold, in the units of the scores."""
    z = masked(x)
    distance = jnp.abs(z - reference(x) - (y.theta - 1 / (alpha - 1)))
    return jnp.min(jnp.where(jnp.isfinite(z), distance, jnp.inf))
