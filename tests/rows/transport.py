"""Rows of the table of nodes: transport."""

import jax.numpy as jnp
import numpy as np

import declarative as dn

from ..programs import by_enumeration
from ..sinkhorn import sinkhorn
from .row import Row

_RNG = np.random.default_rng(11)
COSTS = jnp.asarray(_RNG.uniform(size=(3, 4)))
SOURCE = jnp.array([0.5, 0.9, 0.2])
TARGET = jnp.array([0.3, 0.1, 0.8, 0.6])
EPSILON, RHO = jnp.array(0.2), jnp.array(0.7)


def reference(rho=None):
    def plan(x):
        n, m = x.C.shape
        a, b = np.full(n, 1 / n) if x.a is None else x.a, np.full(m, 1 / m) if x.b is None else x.b
        return sinkhorn(x.C, a, b, float(EPSILON), rho)

    return plan


def worst_violation(P, x):
    return jnp.max(jnp.abs(jnp.sum(P, axis=1) - 1 / P.shape[0])) + jnp.max(jnp.abs(jnp.sum(P, axis=0) - 1 / P.shape[1]))


def nearest(a, b):
    """The nearest plan, by trying every support; one of the equations follows from the others."""
    n, m = len(a), len(b)
    equations = np.concatenate([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])[:-1]
    sums = jnp.asarray(np.concatenate([a, b])[:-1])

    def plan(x):
        blocks = {"A": jnp.asarray(equations), "b": sums, "lower": jnp.zeros(n * m)}
        return by_enumeration(dn.QuadraticProgramData(Q=jnp.ones(n * m), q=-x.x.reshape(-1), **blocks)).reshape(n, m)

    return plan


# Asymmetric, and with both zeros and positive entries.
MATRIX = jnp.array([[0.9, -0.3, 0.5], [-0.1, -0.7, 0.25], [0.7, 0.4, 0.3]])

ROWS = [
    Row(
        "birkhoff",
        lambda **kw: dn.Projection(dn.Birkhoff(), **kw),
        dn.ProjectionData(MATRIX),
        reference=nearest(np.ones(3), np.ones(3)),
        feasible=lambda y, x: jnp.maximum(-jnp.min(y), jnp.max(jnp.abs(jnp.sum(y, axis=1) - 1))),
        failures={"nonfinite_data": dn.ProjectionData(MATRIX.at[0, 1].set(jnp.inf))},
        adjoints=(None, dn.ImplicitAdjoint()),
        unrolled=False,  # an interior-point method's iterations are not for differentiation: the node raises
        fast=False,
    ),
    Row(
        "entropic-transport",
        lambda **kw: dn.EntropicTransport(EPSILON, **kw),
        dn.TransportData(COSTS),
        reference=reference(),
        feasible=worst_violation,
        failures={
            "infeasible": dn.TransportData(COSTS, SOURCE, TARGET),
            "empty": dn.TransportData(COSTS, 0 * SOURCE, 0 * TARGET),
            "nonfinite_data": dn.TransportData(COSTS, -SOURCE, TARGET),
        },
        adjoints=(None, dn.UnrolledAdjoint()),
        slow=True,
    ),
    Row(
        "unbalanced-transport",
        lambda **kw: dn.EntropicTransport(EPSILON, rho=RHO, **kw),
        dn.TransportData(COSTS, SOURCE, TARGET),
        reference=reference(float(RHO)),
        failures={"nonfinite_data": dn.TransportData(-jnp.inf * COSTS, SOURCE, TARGET)},
        adjoints=(None, dn.UnrolledAdjoint()),
        fast=False,
    ),
]
