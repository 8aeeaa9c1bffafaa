r"""The projection onto a permutahedron, as the optimality conditions that `SoftSort` and `SoftRank` share.

**Problem.**     $y^*(s, w) = \arg\min_y \tfrac12 \|y - s\|^2$, y in the convex hull of the permutations of w, where $s = t / \epsilon$   (P)

With s and w in ascending order (and then y is), the hull is what majorisation says: $\sum_{j \le i} y_j \ge \sum_{j \le i} w_j$ for all i, with
equality for $i = n$. With $\lambda_i$ what constraint i has to spare, and $v = s - y$, whose steps are its multipliers,

$$ w_i + \lambda_i - \lambda_{i-1} - y_i = 0 \tag{K1} \qquad -\min(\lambda_i,\; v_{i+1} - v_i) = 0 \tag{K2} $$

with $\lambda_0 = \lambda_n = 0$. Each piece is linear: y is constant in $s - w$ on blocks, $y = s - \bar s + \bar w$.

**Reference:** Blondel, Teboul, Berthet & Djolonga 2020, *Fast Differentiable Sorting and Ranking*, arXiv:2002.08871: (P) is their
$P_Q(z, w)$, Prop. 3 its solution.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..._core.arguments import number
from ..._core.implicit import LinearSystem, Run
from ..._core.results import RESULTS, choose
from ..._linear.chain import Chain, ChainSolver, with_edges
from ..._solvers.isotonic import permutahedron
from ..projections.sets import pinned


class OrderedPoint(eqx.Module):
    """The unknown: the point of the permutahedron in ascending order, and what each constraint of majorisation has to spare."""

    ordered: Float[Array, " n"]
    dual: Float[Array, " edges"]


class Problem(NamedTuple):
    """(P): t and w ascending, $\\epsilon$."""

    t: Float[Array, " n"]
    strength: Float[Array, ""]
    w: Float[Array, " n"]


def places(x: Float[Array, " n"]) -> Float[Array, " n"]:
    """1, 2, ..., n."""
    return jnp.arange(1, x.size + 1, dtype=x.dtype)


def order(x: Float[Array, " n"]) -> Int[Array, " n"]:
    """Of the entries, ascending; equal ones as they come."""
    return jnp.argsort(jax.lax.stop_gradient(x))


def run(p: Problem) -> Run:
    found = permutahedron(*p)
    result = choose(found.good, RESULTS.successful, RESULTS.nonfinite_data)
    return Run(OrderedPoint(found.point, found.dual), result)


def optimality(y: OrderedPoint, p: Problem) -> OrderedPoint:
    steps = _steps(y, p)
    picked = jnp.where(_tied(y, p), steps, y.dual)
    return OrderedPoint(with_edges(p.w, y.dual) - y.ordered, -pinned(picked, jnp.minimum(y.dual, steps)))


def linear_system(y: OrderedPoint, p: Problem) -> LinearSystem:
    return LinearSystem(Chain(~_tied(y, p), p.w), ChainSolver())


def kink_distance(y: OrderedPoint, p: Problem) -> Float[Array, ""]:
    """In the units of w."""
    return jnp.min(jnp.maximum(y.dual, _steps(y, p)), initial=jnp.inf)


def ties(y: OrderedPoint, p: Problem) -> Float[Array, ""]:
    """The least difference between two entries of w that lie in different blocks: where they meet, their order changes."""
    return jnp.min(jnp.where(_tied(y, p), jnp.inf, p.w[1:] - p.w[:-1]), initial=jnp.inf)


def _steps(y: OrderedPoint, p: Problem) -> Float[Array, " edges"]:
    """Of v."""
    return (p.t[1:] - p.t[:-1]) / p.strength - (y.ordered[1:] - y.ordered[:-1])


def _tied(y: OrderedPoint, p: Problem) -> Bool[Array, " edges"]:
    """The edges inside of blocks, where v has no step but for rounding; at equality they count as such."""
    eps = float(jnp.finfo(p.w.dtype).eps)
    size = jnp.maximum(jnp.abs(y.ordered[1:]), jnp.abs(y.ordered[:-1]))
    # Not "at most": where the data are NaN, every edge is inside, and a NaN cotangent reaches them.
    return ~(_steps(y, p) > jnp.maximum(y.dual, 16 * eps * size))


# The nodes' common parts


def checked_strength(strength: Any) -> float | Float[Array, ""]:
    return number(strength, "strength", hint="; `jnp.sort` and its like are the limit at 0")
