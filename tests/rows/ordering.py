"""Rows of the table of nodes: ordering."""

import itertools

import jax.numpy as jnp
import numpy as np

import declarative as dn

from .row import Row


def isotonic_reference(x, weights=None, increasing=True):
    """The max-min formula: the largest, over all starts, of the least mean up to any end. In NumPy, float64."""
    x = np.asarray(x, np.float64) * (1 if increasing else -1)
    w = np.ones_like(x) if weights is None else np.asarray(weights, np.float64)
    n = x.size
    mean = lambda a, b: x[a] + np.sum(w[a : b + 1] * (x[a : b + 1] - x[a])) / np.sum(w[a : b + 1])
    means = {(a, b): mean(a, b) for a in range(n) for b in range(a, n)}
    y = [max(min(means[a, b] for b in range(i, n)) for a in range(i + 1)) for i in range(n)]
    return np.array(y) * (1 if increasing else -1)


def permutahedron_reference(s, w):
    """The nearest point of the hull of the permutations of w: of all blocks of neighbours of the sorted s, those of a KKT point."""
    s, w = np.asarray(s, np.float64), np.sort(np.asarray(w, np.float64))
    order, n = np.argsort(s, kind="stable"), s.size
    s, slack = s[order], 1e-12 * (np.abs(s).max() + np.abs(w).max())
    for cuts in itertools.product((False, True), repeat=n - 1):
        y = np.empty(n)
        for block in np.split(np.arange(n), 1 + np.flatnonzero(cuts)):
            y[block] = s[block] - s[block].mean() + w[block].mean()
        multipliers = np.diff(s - y)
        if np.all(np.cumsum(y - w) >= -slack) and np.all(multipliers >= -slack):
            out = np.empty(n)
            out[order] = y
            return out
    raise AssertionError("no blocks fit")


SEQUENCE = dn.IsotonicData(
    jnp.array([0.3, -0.8, 1.2, 0.4, 0.9, 0.1, 2.3, 2.1]), jnp.array([1.0, 0.3, 2.0, 0.7, 1.1, 0.2, 5.0, 0.6])
)
VALUES = jnp.array([0.4, -1.3, 2.2, 0.1, 0.75, 3.9, -1.0])

ROWS: list[Row] = [
    Row(
        "isotonic",
        lambda **kw: dn.Isotonic(**kw),
        SEQUENCE,
        reference=lambda x: isotonic_reference(x.x, x.weights),
        feasible=lambda y, x: -jnp.diff(y),
        failures={"nonfinite_data": dn.IsotonicData(SEQUENCE.x, jnp.zeros(8).at[2].set(1.0))},
        adjoints=(None, dn.ImplicitAdjoint(), dn.UnrolledAdjoint()),
        slow=True,
    ),
    Row(
        "isotonic-decreasing",
        lambda **kw: dn.Isotonic(**{"increasing": False, **kw}),
        dn.IsotonicData(SEQUENCE.x[::-1] + jnp.array([0.1, 0.0, 0.3, 0.7, 0.2, 0.0, 0.4, 0.9])),
        reference=lambda x: isotonic_reference(x.x, increasing=False),
        feasible=lambda y, x: jnp.diff(y),
        adjoints=(None, dn.ImplicitAdjoint()),
        fast=False,  # the same code with another sign
    ),
    Row(
        "soft-sort",
        lambda **kw: dn.SoftSort(jnp.array(0.9), **kw),
        VALUES,
        reference=lambda x: np.sort(permutahedron_reference(np.arange(1, x.size + 1) / 0.9, x)),
        feasible=lambda y, x: jnp.append(-jnp.diff(y), jnp.abs(jnp.sum(y - x))),
        failures={"nonfinite_data": VALUES.at[3].set(jnp.inf)},
        adjoints=(None, dn.ImplicitAdjoint()),
        fast=False,  # the code of soft-rank
    ),
    Row(
        "soft-rank",
        lambda **kw: dn.SoftRank(jnp.array(0.6), **kw),
        VALUES,
        reference=lambda x: permutahedron_reference(np.asarray(x) / 0.6, np.arange(1, x.size + 1)),
        feasible=lambda y, x: jnp.append(jnp.array([1 - y.min(), y.max() - y.size]), jnp.abs(jnp.sum(y) - 28)),
        failures={"nonfinite_data": VALUES.at[3].set(jnp.inf)},
        adjoints=(None, dn.ImplicitAdjoint(), dn.UnrolledAdjoint()),
        fast=False,
    ),
]
