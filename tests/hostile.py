"""Hostile quadratic programs with known answers, and a judge that trusts nothing but the data.

Every family is built around a known truth: a primal-dual pair, a Farkas certificate, or a ray. The judge recomputes the optimality
conditions in NumPy, row by row, each against its own size.
"""

import dataclasses

import numpy as np

SHAPES = ((1, 2, 0), (3, 4, 1), (6, 8, 2), (8, 5, 3))  # n, m, p


@dataclasses.dataclass
class Family:
    name: str
    truth: str  # "solvable", "infeasible", "unbounded", "indefinite", "nonfinite", or "any" where nothing is promised
    Q: np.ndarray
    q: np.ndarray
    A: np.ndarray
    b: np.ndarray
    G: np.ndarray
    h: np.ndarray
    hard: bool = False  # degenerate or badly conditioned: may be flagged, must not be wrong


def _solvable(rng, n, m, p, rank=None, active=None, cond=1.0):
    """A program with a strictly complementary solution, by choosing the solution first."""
    rank = n if rank is None else rank
    L = rng.standard_normal((n, rank)) * 10 ** (
        -rng.uniform(0, np.log10(cond), rank) / 2 if cond > 1 else np.zeros(rank)
    )
    Q = L @ L.T
    A, G = rng.standard_normal((p, n)), rng.standard_normal((m, n))
    z = rng.standard_normal(n)
    active = rng.integers(0, min(m, n - p) + 1) if active is None else active
    on = np.arange(m) < active
    lam = np.where(on, rng.uniform(0.1, 1, m), 0)
    s = np.where(on, 0, rng.uniform(0.1, 1, m))
    nu = rng.standard_normal(p)
    q = -(Q @ z + A.T @ nu + G.T @ lam)
    return Q, q, A, A @ z, G, G @ z + s


def families(rng, n, m, p) -> list[Family]:
    out = []

    def add(name, truth, data, hard=False):
        out.append(Family(name, truth, *(np.array(block, dtype=np.float64) for block in data), hard=hard))

    add("plain", "solvable", _solvable(rng, n, m, p))
    add("vertex", "solvable", _solvable(rng, n, m, p, active=min(m, n - p)))
    add("ill-conditioned", "solvable", _solvable(rng, n, m, p, cond=1e6))
    # Semidefinite with enough active rows for a unique solution.
    need = min(m, n - p)
    add("semidefinite", "solvable", _solvable(rng, n, m, p, rank=max(n - need, 0), active=need))
    if m >= n - p:
        add("linear program", "solvable", _solvable(rng, n, m, p, rank=0, active=n - p))
    Q, q, A, b, G, h = _solvable(rng, n, m, p)
    k = rng.uniform(-8, 8)
    add("objective times 1e+-8", "solvable", (Q * 10**k, q * 10**k, A, b, G, h))
    add("lengths times 1e+-8", "solvable", (Q, q * 10**k, A, b * 10**k, G, h * 10**k))
    r, e = 10 ** rng.uniform(-8, 8, m), 10 ** rng.uniform(-8, 8, p)
    add("rows times 1e+-8", "solvable", (Q, q, A * e[:, None], b * e, G * r[:, None], h * r))
    d = 10 ** rng.uniform(-4, 4, n)
    add("variables times 1e+-4", "solvable", (Q * np.outer(d, d), q * d, A * d, b, G * d, h))
    add("far away", "solvable", (Q, q - 1e6 * Q @ np.ones(n), A, b + 1e6 * A.sum(1), G, h + 1e6 * G.sum(1)))
    infinite = h.copy()
    infinite[-1] = np.inf
    Q2, q2, A2, b2, G2, h2 = _solvable(rng, n, m, p, active=0)
    add("no constraint at h = inf", "solvable", (Q2, q2, A2, b2, G2, np.where(np.arange(m) == m - 1, np.inf, h2)))
    # Degenerate: dependent rows, doubled constraints, weakly active ones.
    doubled = np.arange(m) % max(m // 2, 1)
    add("doubled inequalities", "solvable", (Q, q, A, b, G[doubled], h[doubled]), hard=True)
    if p > 1:
        mix = rng.standard_normal((p, p - 1)) @ A[: p - 1]
        add(
            "dependent equations",
            "solvable",
            (Q, q, mix, mix @ (z := np.linalg.lstsq(A, b, rcond=None)[0]), G, G @ z + 1),
            hard=True,
        )
        add(
            "contradicting equations",
            "infeasible",
            (Q, q, np.vstack([A[:-1], A[:1]]), np.append(b[:-1], b[0] + 1e-3), G, h),
        )
        near = np.vstack([A[:-1], A[0] + 1e-5 * rng.standard_normal(n)])
        w = rng.standard_normal(n)
        add("nearly dependent equations", "solvable", (Q, q, near, near @ w, G, G @ w + 1), hard=True)
    z = rng.standard_normal(n)
    add("weakly active", "solvable", (Q, -(Q @ z), A, A @ z, G, G @ z + (np.arange(m) > 0)), hard=True)
    # Infeasible by a margin: 0 = y'[A; G] z <= y'[b; h] < 0.
    lam, nu = rng.uniform(0.1, 1, m), rng.standard_normal(p)
    lam[2:] *= rng.integers(0, 2, max(m - 2, 0))
    GG, AA = rng.standard_normal((m, n)), rng.standard_normal((p, n))
    GG[0] = -(lam[1:] @ GG[1:] + nu @ AA) / lam[0]
    h3, b3 = rng.standard_normal(m), rng.standard_normal(p)
    margin = 10 ** rng.uniform(-4, 1)
    size = np.abs(h3).max() + 1
    h3[0] = (-margin * size * (lam.sum() + np.abs(nu).sum()) - lam[1:] @ h3[1:] - nu @ b3) / lam[0]
    add("infeasible", "infeasible", (Q, q, AA, b3, GG, h3))
    add("infeasible, scaled", "infeasible", (Q * 1e6, q * 1e6, AA, b3 * 1e-4, GG, h3 * 1e-4))
    # Unbounded: a ray d with Qd = 0, Ad = 0, Gd <= 0, q'd < 0.
    ray = rng.standard_normal(n)
    ray /= np.linalg.norm(ray)
    P = np.eye(n) - np.outer(ray, ray)
    Q4, A4, G4 = P @ Q @ P, A @ P, G @ P - np.outer(rng.uniform(0, 1, m), ray)
    w = rng.standard_normal(n)
    margin = 10 ** rng.uniform(-3, 1)
    q4 = P @ q - margin * (np.linalg.norm(q) + 1) * ray
    if np.linalg.matrix_rank(A4) == p:
        add("unbounded", "unbounded", (Q4, q4, A4, A4 @ w, G4, G4 @ w + 1))
    # Indefinite on the null space of A.
    v = rng.standard_normal(n)
    v = v - (np.linalg.pinv(A) @ (A @ v) if p else 0)
    if np.linalg.norm(v) > 0.1:
        add("indefinite", "indefinite", (Q - (v @ Q @ v / (v @ v) + 1) * np.outer(v, v) / (v @ v), q, A, b, G, h))
    for name, value in (("NaN", np.nan), ("infinity", np.inf)):
        block = [Q.copy(), q.copy(), A.copy(), b.copy(), G.copy(), h.copy()]
        i = rng.choice([0, 1, 4] + ([2, 3] if p else []) + ([5] if name == "NaN" else []))
        block[i].flat[rng.integers(block[i].size)] = value
        add(f"{name} in the data", "nonfinite", block)
    return out


def violation(f: Family, z, nu, lam) -> float:
    """How far (z, nu, lam) is from the optimality conditions, relative to the terms of each equation."""
    size = lambda *terms: np.maximum(np.max([np.abs(term) for term in terms], axis=0), 1e-300)
    terms = [f.Q @ z, f.q, f.A.T @ nu, f.G.T @ lam]
    # Every entry of the gradient against the largest one that its terms could have had.
    stationarity = np.abs(sum(terms)) / size(
        *terms, np.abs(f.Q) @ np.abs(z), np.abs(f.A.T) @ np.abs(nu), np.abs(f.G.T) @ np.abs(lam)
    )
    live = np.isfinite(f.h)
    G, h, lam_live = f.G[live], f.h[live], lam[live]
    rows = size(np.abs(G) @ np.abs(z), h)
    slack = h - G @ z
    parts = [stationarity, np.maximum(-slack, 0) / rows]
    parts.append(np.abs(f.A @ z - f.b) / size(np.abs(f.A) @ np.abs(z), f.b))
    largest = max(np.abs(lam).max(initial=0), 1e-300)
    parts.append(np.maximum(-lam, 0) / largest)
    # Complementarity: a row is off or its multiplier is, each in its own unit.
    strength = np.abs(lam_live)[:, None] * np.abs(G) / size(*[np.abs(term) for term in terms])[None, :]
    parts.append(np.minimum(np.maximum(slack, 0) / rows, strength.max(1, initial=0)))
    parts.append(np.abs(lam[~live]) / largest)
    return float(max(np.max(part, initial=0) for part in parts))


def refutes(f: Family, nu, lam) -> bool:
    """Whether (nu, lam) proves that there is no feasible point (of a size that could matter)."""
    lam = np.where(np.isfinite(f.h), lam, 0)
    h = np.where(np.isfinite(f.h), f.h, 0)
    value = f.b @ nu + h @ lam
    pull = np.abs(f.A.T @ nu + f.G.T @ lam)
    weight = np.abs(f.A.T) @ np.abs(nu) + np.abs(f.G.T) @ np.abs(lam)
    return bool(np.all(lam >= 0) and value < 0 and np.all(pull <= 1e-6 * np.maximum(weight, 1e-300)))


def escapes(f: Family, ray) -> bool:
    """Whether the objective falls for ever along the ray."""
    small = lambda part, whole: np.all(part <= 1e-6 * np.maximum(whole, 1e-300))
    live = np.isfinite(f.h)
    size = np.abs(ray)
    return bool(
        f.q @ ray < 0
        and small(np.abs(f.Q @ ray), np.abs(f.Q).max() * size.max())
        and small(np.abs(f.A @ ray), np.abs(f.A) @ size)
        and small(f.G[live] @ ray, np.abs(f.G[live]) @ size)
    )
