"""Quadratic programs for tests, and their exact solution by trying every active set: slow, independent, and right."""

import itertools

import jax.numpy as jnp
import lineax as lx
import numpy as np

import declarative as dn


def program(seed=0, n=5, m=4, p=2, bounds=True, dtype=np.float64) -> dn.QuadraticProgramData:
    """Feasible and strictly convex, with some inequalities active."""
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((n, n))
    inside = rng.random(n)
    A, G = rng.standard_normal((p, n)), rng.standard_normal((m, n))
    array = lambda block: jnp.asarray(block, dtype)
    return dn.QuadraticProgramData(
        Q=array(root @ root.T + 0.1 * np.eye(n)),
        q=array(3 * rng.standard_normal(n)),
        A=array(A) if p else None,
        b=array(A @ inside) if p else None,
        G=array(G) if m else None,
        h=array(G @ inside + 0.2 * rng.random(m)) if m else None,
        lower=array(inside - 0.4 * rng.random(n)) if bounds else None,
        upper=array(inside + 0.4 * rng.random(n)) if bounds else None,
    )


def with_blocks(x: dn.QuadraticProgramData, **changes) -> dn.QuadraticProgramData:
    """The same program with some blocks replaced."""
    return dn.QuadraticProgramData(
        **{**{name: getattr(x, name) for name in ("Q", "q", "A", "b", "G", "h", "lower", "upper")}, **changes}
    )


def as_operators(x: dn.QuadraticProgramData) -> dn.QuadraticProgramData:
    """The same program with its matrices as lineax operators."""
    matrices = {name: getattr(x, name) for name in ("Q", "A", "G")}
    operators = {name: lx.MatrixLinearOperator(block) for name, block in matrices.items() if block is not None}
    return with_blocks(x, **operators)


def blocks(x: dn.QuadraticProgramData):
    """Q, q, A, b and all inequalities as one pair G, h, in NumPy."""
    n = x.q.size
    get = lambda leaf, shape: np.zeros(shape) if leaf is None else np.asarray(leaf, np.float64)
    Q = np.asarray(x.Q, np.float64)
    Q = np.diag(Q) if Q.ndim == 1 else (Q + Q.T) / 2
    G, h = [get(x.G, (0, n))], [get(x.h, 0)]
    for side, sign in ((x.lower, -1), (x.upper, 1)):
        if side is not None:
            G.append(sign * np.eye(n))
            h.append(sign * np.asarray(side, np.float64))
    G, h = np.concatenate(G), np.concatenate(h)
    return Q, get(x.q, n), get(x.A, (0, n)), get(x.b, 0), G[np.isfinite(h)], h[np.isfinite(h)]


def by_enumeration(x: dn.QuadraticProgramData):
    """The minimiser: the best feasible solution of an equality-constrained program over all sets of active rows."""
    Q, q, A, b, G, h = blocks(x)
    n, best, value = q.size, None, np.inf
    for size in range(0, n - b.size + 1):
        for active in itertools.combinations(range(h.size), size):
            rows = np.concatenate([A, G[list(active)]])
            right = np.concatenate([b, h[list(active)]])
            kkt = np.block([[Q, rows.T], [rows, np.zeros((right.size, right.size))]])
            if np.linalg.cond(kkt) > 1e12:
                continue
            z = np.linalg.solve(kkt, np.concatenate([-q, right]))[:n]
            cost = z @ Q @ z / 2 + q @ z
            if np.all(G @ z <= h + 1e-9) and cost < value:
                best, value = z, cost
    return jnp.asarray(best)


def worst_violation(z, x: dn.QuadraticProgramData):
    _, _, A, b, G, h = blocks(x)
    z = np.asarray(z, np.float64)
    return max(np.max(np.abs(A @ z - b), initial=0), np.max(G @ z - h, initial=0))


def gradients(x: dn.QuadraticProgramData, active, cotangent):
    """All data gradients from the KKT system of a given active set (G rows only, no bounds), in float64: (solution, dict)."""
    Q, q, A, b, G, h = blocks(x)
    n, p, on = q.size, b.size, np.flatnonzero(active)
    rows = np.concatenate([A, G[on]])
    kkt = np.block([[Q, rows.T], [rows, np.zeros((rows.shape[0],) * 2)]])
    solution = np.linalg.solve(kkt, np.concatenate([-q, b, h[on]]))
    back = np.linalg.solve(kkt, np.concatenate([-np.asarray(cotangent, np.float64), np.zeros(rows.shape[0])]))
    z, d = solution[:n], back[:n]
    multipliers, shifts = np.zeros(p + h.size), np.zeros(p + h.size)
    index = np.concatenate([np.arange(p), p + on])
    multipliers[index], shifts[index] = solution[n:], back[n:]
    both = np.outer(shifts, z) + np.outer(multipliers, d)
    grads = {
        "Q": (np.outer(d, z) + np.outer(z, d)) / 2,
        "q": d,
        "A": both[:p],
        "b": -shifts[:p],
        "G": both[p:],
        "h": -shifts[p:],
    }
    return z, grads, np.linalg.cond(kkt)
