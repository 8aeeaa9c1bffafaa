"""Rows of the table of nodes: pooling."""

import jax.numpy as jnp
import numpy as np
import scipy.optimize

import declarative as dn

from .row import Row

X = jnp.array([[0.31, -1.2], [0.93, 4.1], [0.12, 0.55], [5.2, -0.4], [-0.47, 0.2], [0.6, 0.83], [4.6, -3.7]])
WEIGHTS = jnp.array([1.0, 0.7, 1.3, 0.9, 0.6, 1.1, 0.8])
MASK = jnp.array([True, True, True, True, True, False, True])
POINTS = dn.Points(X, WEIGHTS, MASK)
ALPHA = 1.3


def penalty_of(name):
    """phi of |r| in units where alpha is 1, in NumPy."""
    return {
        "quadratic": lambda a: a**2 / 2,
        "pseudo-huber": lambda a: np.sqrt(1 + a**2) - 1,
        "huber": lambda a: np.where(a <= 1, a**2 / 2, a - 0.5),
        "welsch": lambda a: 1 - np.exp(-(a**2) / 2),
        "truncated-quadratic": lambda a: np.minimum(a**2, 1) / 2,
    }[name]


def pooled_reference(name, alpha=ALPHA):
    """The global minimum of each channel: the best of a fine grid, then Brent's method for a zero of the slope around it."""
    phi = penalty_of(name)

    def reference(x):
        rows, w = np.asarray(x.x, np.float64), np.asarray(x.weights, np.float64)
        if x.mask is not None:
            w = w * np.asarray(x.mask)
        found = []
        for column in rows.T:
            f = lambda u, column=column: w @ phi(np.abs(u - column) / alpha)
            slope = lambda u, f=f: (f(u + 1e-6) - f(u - 1e-6)) / 2e-6
            grid = np.linspace(column.min() - 1, column.max() + 1, 4001)
            best = int(np.argmin([f(u) for u in grid]))
            centre = scipy.optimize.brentq(slope, grid[best - 1], grid[best + 1], xtol=1e-14)
            # Central differences leave 1e-10 of it; the reweighted mean contracts that.
            for _ in range(200):
                pull = w * pull_of(name, np.abs(centre - column) / alpha)
                centre = pull @ column / pull.sum()
            found.append(centre)
        return jnp.asarray(found)

    return reference


def pull_of(name, a):
    """phi'(|r|) / |r| where alpha is 1."""
    return {
        "quadratic": np.ones_like(a),
        "pseudo-huber": 1 / np.sqrt(1 + a**2),
        "huber": 1 / np.maximum(a, 1),
        "welsch": np.exp(-(a**2) / 2),
        "truncated-quadratic": (a < 1).astype(float),
    }[name]


def vector_reference(name, alpha):
    """The lowest of the fixed points of the reweighted mean, from every point and from the mean."""
    phi = penalty_of(name)

    def reference(x):
        rows, w = np.asarray(x.x, np.float64), np.asarray(x.weights, np.float64)
        if x.mask is not None:
            w = w * np.asarray(x.mask)
        distance = lambda u: np.linalg.norm(rows - u, axis=1) / alpha
        found = []
        for u in [*rows, w @ rows / w.sum()]:
            for _ in range(3000):
                pull = w * pull_of(name, distance(u))
                u = pull @ rows / pull.sum() if pull.sum() > 0 else u
            found.append((w @ phi(distance(u)), tuple(u)))
        return jnp.asarray(min(found)[1])

    return reference


def _spoilt(**leaves):
    return dn.Points(leaves.get("x", X), leaves.get("weights", WEIGHTS), leaves.get("mask", MASK))


FAILURES = {
    "nonfinite_data": _spoilt(weights=WEIGHTS.at[1].set(-0.1)),
    "empty": _spoilt(mask=jnp.zeros(7, bool)),
}

ROWS: list[Row] = [
    *(
        Row(
            f"robust-pool-{name}",
            lambda name=name, **kw: dn.RobustPool(name, jnp.array(ALPHA), **kw),
            POINTS,
            reference=pooled_reference(name),
            failures=FAILURES,
            adjoints=(None, dn.ImplicitAdjoint(), dn.UnrolledAdjoint()),
            fast=name == "pseudo-huber",
        )
        for name in ("quadratic", "pseudo-huber", "huber", "welsch", "truncated-quadratic")
    ),
    *(
        Row(
            f"robust-vector-pool-{name}",
            lambda name=name, **kw: dn.RobustVectorPool(name, jnp.array(1.7), **kw),
            POINTS,
            reference=vector_reference(name, 1.7),
            failures=FAILURES,
            adjoints=(None, dn.UnrolledAdjoint()),
            fast=False,
        )
        for name in ("quadratic", "pseudo-huber", "huber", "welsch", "truncated-quadratic")
    ),
]
