"""Rows of the table of nodes: projections."""

# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false

import jax.numpy as jnp
import numpy as np
import scipy.linalg

import declarative as dn

from ..programs import by_enumeration
from .row import Row

X = jnp.array([0.93, -0.41, 0.72, 0.18])
MATRIX = jnp.array([[0.9, -0.3, 0.5], [-0.1, -0.7, 0.2], [0.7, 0.4, 0.3]])
NAN = X.at[1].set(jnp.nan)
NORMAL = jnp.array([0.5, -1.2, 2.0, 0.7])
WEIGHTS = jnp.array([1.0, 0.4, -1.5, 2.0])
A, B = jnp.array([[1.0, 2.0, -1.0, 0.5], [0.3, -1.0, 0.4, 2.0]]), jnp.array([0.6, -0.2])
G, H = jnp.array([[1.0, 1.0, 0.2, -1.0], [-0.5, 1.5, 1.0, 0.0], [2.0, 0.1, -1.0, 0.3]]), jnp.array([0.1, 0.3, 0.4])
MASK = jnp.array([True, True, False, True])


def nearest(**blocks):
    """The projection onto a polyhedron, by trying every active set."""

    def reference(data):
        x = jnp.asarray(np.where(np.ones(4, bool) if data.mask is None else data.mask, data.x, 0))
        return by_enumeration(dn.QuadraticProgramData(Q=jnp.ones(x.size), q=-x, **blocks))

    return reference


def simplex(total, cap, mask=np.ones(4, bool)):
    return nearest(
        A=jnp.ones((1, 4)), b=jnp.array([total]), lower=jnp.zeros(4), upper=jnp.where(jnp.asarray(mask), cap, 0.0)
    )


def signs(n):
    return jnp.array([[1.0 if k >> i & 1 else -1.0 for i in range(n)] for k in range(2**n)])


def in_ball(radius):
    return lambda data: data.x * min(1.0, radius / np.linalg.norm(data.x))


def in_sphere(data):
    """The nearest point of the l1 sphere of radius 3 around X, which is inside of it: every entry grows by the same."""
    x = np.asarray(data.x)
    return jnp.asarray(x + np.sign(x) * (3 - np.abs(x).sum()) / x.size)


def positive_part(data):
    """By the matrix sign function, sqrt(X^2) = |X|, and no eigenvectors."""
    x = (np.asarray(data.x) + np.asarray(data.x).T) / 2
    return jnp.asarray((x + np.real(scipy.linalg.sqrtm(x @ x))) / 2)


def spectraplex(data):
    """Bisection on the trace of the positive part of X - tau I."""
    x, eye = np.asarray(data.x), np.eye(3)
    low, high = -10.0, 10.0
    for _ in range(60):
        tau = (low + high) / 2
        part = positive_part(dn.ProjectionData(jnp.asarray(x - tau * eye)))
        low, high = (tau, high) if np.trace(part) > 0.8 else (low, tau)
    return part


# Of each kind one in CI; the others, whose rules are the same, in the exhaustive tier. The values of all: tests/test_projections.py.
CI = ("simplex", "l1-ball", "capped-simplex", "l2-ball", "affine-set", "second-order-cone", "positive-semidefinite")


def row(name, onto, x=X, reference=None, slow=True, **failures):
    return Row(
        f"projection-{name}",
        lambda **kw: dn.Projection(onto, **kw),
        x,
        reference=reference,
        failures=failures,
        adjoints=(None, dn.ImplicitAdjoint()),
        unrolled=False,  # a projection has no iterations to unroll: the node raises
        slow=slow,
        fast=name in CI,
    )


CONE = jnp.array([0.3, 0.7, -0.5, 0.4])
ROWS = [
    row(
        "simplex",
        dn.Simplex(jnp.array(1.3)),
        dn.ProjectionData(X, MASK),
        simplex(1.3, 9.0, MASK),
        slow=False,
        nonfinite_data=NAN,
        infeasible=dn.ProjectionData(X, jnp.zeros(4, bool)),
    ),
    row(
        "capped-simplex",
        dn.CappedSimplex(jnp.array(1.3), jnp.array([0.4, 0.5, 0.6, 0.7])),
        X,
        nearest(A=jnp.ones((1, 4)), b=jnp.array([1.3]), lower=jnp.zeros(4), upper=jnp.array([0.4, 0.5, 0.6, 0.7])),
        infeasible=dn.ProjectionData(X, jnp.array([True, True, False, False])),
    ),
    row(
        "box-section",
        dn.BoxSection(jnp.array(-0.2), jnp.array([0.5, 0.6, 0.7, 0.8]), WEIGHTS, jnp.array(0.3)),
        X,
        nearest(A=WEIGHTS[None], b=jnp.array([0.3]), lower=jnp.full(4, -0.2), upper=jnp.array([0.5, 0.6, 0.7, 0.8])),
        nonfinite_data=NAN,
    ),
    row("l1-ball", dn.L1Ball(jnp.array(0.9)), X, nearest(G=signs(4), h=jnp.full(16, 0.9)), slow=False),
    row(
        "weighted-l1-ball",
        dn.L1Ball(jnp.array(1.1), jnp.abs(WEIGHTS)),
        X,
        nearest(G=signs(4) * jnp.abs(WEIGHTS)[None], h=jnp.full(16, 1.1)),
    ),
    row("l1-sphere", dn.L1Sphere(jnp.array(3.0)), X, in_sphere),
    row("l2-ball", dn.L2Ball(jnp.array(0.8)), X, in_ball(0.8), nonfinite_data=NAN),
    row("l2-sphere", dn.L2Sphere(jnp.array(0.8)), X, in_ball(0.8), not_a_solution=jnp.zeros(4)),
    row("linf-ball", dn.LInfBall(jnp.array(0.6)), X, lambda data: jnp.clip(data.x, -0.6, 0.6)),
    row(
        "box",
        dn.Box(jnp.array(-0.2), jnp.array([0.5, 0.6, 0.9, 0.8])),
        X,
        nearest(lower=jnp.full(4, -0.2), upper=jnp.array([0.5, 0.6, 0.9, 0.8])),
    ),
    row("non-negative", dn.NonNegative(), X, lambda data: jnp.maximum(data.x, 0)),
    row("hyperplane", dn.Hyperplane(NORMAL, jnp.array(0.4)), X, nearest(A=NORMAL[None], b=jnp.array([0.4]))),
    row("half-space", dn.HalfSpace(NORMAL, jnp.array(0.4)), X, nearest(G=NORMAL[None], h=jnp.array([0.4]))),
    row("affine-set", dn.AffineSet(A, B), X, nearest(A=A, b=B)),
    row("polyhedron", dn.Polyhedron(A[:1], B[:1], G, H), X, nearest(A=A[:1], b=B[:1], G=G, h=H)),
    row(
        "second-order-cone",
        dn.SecondOrderCone(),
        CONE,
        lambda data: (
            jnp.append(jnp.array(1.0), data.x[1:] / np.linalg.norm(data.x[1:]))
            * (data.x[0] + np.linalg.norm(data.x[1:]))
            / 2
        ),
    ),
    row("positive-semidefinite", dn.PositiveSemidefinite(), MATRIX, positive_part),
    row("spectraplex", dn.Spectraplex(jnp.array(0.8)), MATRIX, spectraplex),
]
