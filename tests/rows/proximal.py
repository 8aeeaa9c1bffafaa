"""Rows of the table of nodes: proximal."""

import itertools

import equinox as eqx
import jax.numpy as jnp
import numpy as np

import declarative as dn

from .row import Row

NOISY = dn.TotalVariationData(
    jnp.array([0.3, 0.5, 0.1, 1.9, 2.4, 2.0, -0.7]), jnp.array([0.2, 0.35, 0.3, 0.25, 0.4, 0.3])
)


def total_variation_reference(x):
    """Dynamic programming (Johnson 2013) on the derivative of the messages, as a list of linear pieces, in NumPy."""
    signal, weights = np.asarray(x.signal, np.float64), np.broadcast_to(np.asarray(x.strength), x.signal.size - 1)
    # The derivative of the cost to the left as a function of y_i: pieces (from, slope, intercept).
    pieces, bounds = [(-np.inf, 1.0, -signal[0])], []

    def root(pieces, target):
        """Where the derivative, which increases, reaches the target."""
        for k, (start, slope, intercept) in enumerate(pieces):
            end = pieces[k + 1][0] if k + 1 < len(pieces) else np.inf
            if slope > 0:
                at = (target - intercept) / slope
                if at <= end and (at >= start or k == 0):
                    return at
                if at < start:
                    return start
            elif intercept >= target:
                return start
        return np.inf

    for value, weight in zip(signal[1:], weights, strict=True):
        low, high = root(pieces, -weight), root(pieces, weight)
        bounds.append((low, high))
        clipped = [(-np.inf, 0.0, -weight)]
        for k, (start, slope, intercept) in enumerate(pieces):
            end = pieces[k + 1][0] if k + 1 < len(pieces) else np.inf
            if max(start, low) < min(end, high):
                clipped.append((max(start, low), slope, intercept))
        clipped.append((high, 0.0, weight))
        pieces = [(start, slope + 1, intercept - value) for start, slope, intercept in clipped]
    y = [root(pieces, 0.0)]
    for low, high in reversed(bounds):
        y.append(min(max(y[-1], low), high))
    return np.array(y[::-1])


def regression(n, p, seed, ridge=None):
    """A design with correlated columns, and half of the coefficients zero at `lam`, with room to the kinks."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, p))
    X[:, 1:] = 0.8 * X[:, 1:] + 0.6 * X[:, :-1]
    y = X[:, ::2] @ rng.uniform(1, 2, X[:, ::2].shape[1]) + 0.3 * rng.standard_normal(n)
    lam = rng.uniform(0.2, 0.6, p)
    return dn.LassoData(jnp.asarray(X), jnp.asarray(y), jnp.asarray(lam), None if ridge is None else jnp.asarray(ridge))


def lasso_reference(x):
    """Every set of signs: the one whose coefficients have them, and satisfy the conditions of optimality off the support."""
    X, y, lam = (np.asarray(block, np.float64) for block in (x.X, x.y, x.lam))
    n, p = X.shape
    lam = np.broadcast_to(lam, p)
    ridge = np.broadcast_to(0.0 if x.ridge is None else np.asarray(x.ridge), p)
    H, b = X.T @ X / n + np.diag(ridge), X.T @ y / n
    for signs in itertools.product((0, 1, -1), repeat=p):
        signs = np.array(signs)
        on = signs != 0
        beta = np.zeros(p)
        beta[on] = np.linalg.solve(H[np.ix_(on, on)], (b - lam * signs)[on])
        c = b - H @ beta
        if np.all(np.sign(beta) == signs) and np.all(np.abs(c[~on]) <= lam[~on] * (1 + 1e-12)):
            return beta
    raise AssertionError("no set of signs fits")


LASSO = regression(12, 5, 0)


def regression_loss(beta, x):
    return jnp.sum((x.X @ beta - x.y) ** 2) / (2 * x.y.size)


def weighted_lasso(v, x, step):
    return dn.prox_lasso(v, x.lam, step)


ROWS: list[Row] = [
    Row(
        "proximal-argmin",
        lambda **kw: dn.ProximalArgmin(regression_loss, weighted_lasso, **{"step_size": 0.3, **kw}),
        LASSO,
        y0=jnp.full(5, 0.1),
        reference=lasso_reference,
        adjoints=(None, dn.NeumannAdjoint(200)),
        slow=True,
    ),
    Row(
        "lasso",
        lambda **kw: dn.Lasso(**kw),
        LASSO,
        reference=lasso_reference,
        failures={"nonfinite_data": eqx.tree_at(lambda x: x.lam, LASSO, LASSO.lam.at[1].set(-0.1))},
        unrolled=False,  # iterations that are not for differentiation: the node raises
        fast=False,
    ),
    Row(
        "elastic-net",
        lambda **kw: dn.Lasso(4, **kw),
        regression(4, 5, 3, ridge=0.3),
        reference=lasso_reference,
        failures={"support_overflow": eqx.tree_at(lambda x: x.lam, regression(4, 5, 3, ridge=0.3), jnp.zeros(5))},
        unrolled=False,
        fast=False,  # the lasso's code
    ),
    Row(
        "total-variation",
        lambda **kw: dn.TotalVariation(**kw),
        NOISY,
        reference=total_variation_reference,
        failures={
            "nonfinite_data": eqx.tree_at(lambda x: x.strength, NOISY, NOISY.strength.at[2].set(-0.1)),
        },
        adjoints=(None, dn.ImplicitAdjoint(), dn.UnrolledAdjoint()),
        fast=False,
    ),
]
