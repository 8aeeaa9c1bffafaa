"""Rows of the table of nodes: constrained."""

import jax.numpy as jnp
import numpy as np

import declarative as dn

from .row import Row


def weighted_distance(y, x):
    return jnp.sum(x["weight"] * (y - x["target"]) ** 2) / 2


def budget_reference(x):
    """Bisection on the multiplier of the ball, in NumPy; that of the budget is then a quotient."""
    d, a, b, r = (np.asarray(x[name], np.float64) for name in ("weight", "target", "budget", "radius"))

    def at(lam):
        inverse = 1 / (d + lam)
        nu = (np.sum(d * a * inverse) - b) / np.sum(inverse)
        return (d * a - nu) * inverse

    low, high = 0.0, 1.0
    while np.sum(at(high) ** 2) > r**2:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.sum(at(middle) ** 2) > r**2 else (low, middle)
    return at((low + high) / 2)


BUDGET = {
    "weight": jnp.array([1.0, 2.5, 0.7, 1.6]),
    "target": jnp.array([1.3, -0.8, 0.4, 2.1]),
    "budget": jnp.array(1.1),
    "radius": jnp.array(1.4),
}

ROWS: list[Row] = [
    Row(
        "constrained-argmin",
        lambda **kw: dn.ConstrainedArgmin(
            weighted_distance,
            equality=lambda y, x: jnp.sum(y) - x["budget"],
            inequality=lambda y, x: {"ball": jnp.sum(y**2) - x["radius"] ** 2, "floor": -y - 2},
            **kw,
        ),
        BUDGET,
        y0=jnp.zeros(4),
        reference=budget_reference,
        feasible=lambda y, x: jnp.maximum(jnp.abs(jnp.sum(y) - x["budget"]), jnp.sum(y**2) - x["radius"] ** 2),
        failures={"infeasible": {**BUDGET, "budget": jnp.array(50.0)}},
        unrolled=False,  # the search for the active set is not for differentiation: the node raises
        fast=False,
    ),
]
