"""Linear algebra and geometry: accuracy, degenerate data and scale, against NumPy in float64."""

# pyright: reportArgumentType=false, reportCallIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import declarative as dn
from declarative import RESULTS

QUIET = {"throw": False}


def code(result):
    return np.asarray(result._value)


def is_all(result, member):
    return np.all(code(result) == int(member._value))


def with_condition(rng, m, n, condition):
    left, right = (np.linalg.qr(rng.standard_normal((size, n if size == m else n)))[0] for size in (m, n))
    return left * np.geomspace(1, 1 / condition, n) @ right.T


# ----------------------------------------------------------------------------------------------------------------------
# Weighted least squares
# ----------------------------------------------------------------------------------------------------------------------


def test_least_squares_in_float32_loses_the_condition_number_once():
    """Value and gradient of consistent systems, against float64 on the same (rounded) data."""
    rng = np.random.default_rng(0)
    eps = float(np.finfo(np.float32).eps)
    node = dn.WeightedLeastSquares()
    run = jax.jit(jax.vmap(lambda A, b, c: jax.vjp(node, A, b)[0:2][1](c)[1]))
    value = jax.jit(jax.vmap(lambda A, b: node(A, b)))
    conditions = np.array([1e1, 1e3, 1e5])
    A = np.stack([with_condition(rng, 12, 4, c) for c in conditions]).astype(np.float32)
    b = np.einsum("lij,lj->li", A, rng.standard_normal((3, 4)).astype(np.float32))
    c = rng.standard_normal((3, 4)).astype(np.float32)
    got, for_b = value(A, b), run(A, b, c)
    assert got.dtype == for_b.dtype == jnp.float32
    got, for_b = (np.asarray(array, np.float64) for array in (got, for_b))
    for i, condition in enumerate(conditions):
        inverse = np.linalg.pinv(A[i].astype(np.float64))
        want, want_b = inverse @ b[i], inverse.T @ c[i]
        tol = 30 * eps * condition
        assert np.linalg.norm(got[i] - want) <= tol * np.linalg.norm(want)
        assert np.linalg.norm(for_b[i] - want_b) <= tol * np.linalg.norm(want_b)


def test_least_squares_hostile_lanes():
    """Zero weights, a rank that zero weights take away, a negative weight, NaN: each lane has its own fate."""
    rng = np.random.default_rng(1)
    A, b = rng.standard_normal((5, 2)), rng.standard_normal(5)
    weights = np.array([[1, 2, 0, 0.5, 0], [1, 0, 0, 0, 0], [1, 1, -1, 1, 1], [1, 1, np.nan, 1, 1], [1.0, 1, 1, 1, 1]])
    node = dn.WeightedLeastSquares(**QUIET)
    solve = lambda w: node.solve(A, b, weights=w)
    out = jax.vmap(solve)(jnp.asarray(weights))
    names = ["successful", "not_unique", "nonfinite_data", "nonfinite_data", "successful"]
    np.testing.assert_array_equal(code(out.result), [int(getattr(RESULTS, name)._value) for name in names])
    gradient = np.asarray(jax.vmap(jax.grad(lambda w: jnp.sum(node(A, b, weights=w) ** 2)))(jnp.asarray(weights)))
    assert np.all(np.isfinite(gradient[[0, 4]]))
    assert np.all(np.isnan(gradient[1:4]))
    # One-sided differences where a weight is zero.
    h, w = 1e-6, weights[0]
    loss = lambda w: np.sum(np.linalg.solve(A.T @ (w[:, None] * A), A.T @ (w * b)) ** 2)
    for i in range(5):
        forward = loss(w + h * np.eye(5)[i]), loss(w + 2 * h * np.eye(5)[i])
        np.testing.assert_allclose(gradient[0, i], (4 * forward[0] - forward[1] - 3 * loss(w)) / (2 * h), rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_least_squares_at_any_scale(dtype):
    rng = np.random.default_rng(2)
    A, b = rng.standard_normal((6, 3)).astype(dtype), rng.standard_normal(6).astype(dtype)
    want = np.linalg.lstsq(A.astype(np.float64), b.astype(np.float64), rcond=None)[0]
    solve = jax.jit(jax.vmap(lambda s, t: dn.WeightedLeastSquares(**QUIET).solve(s * A, t * b)))
    s, t = (np.asarray(v, dtype) for v in ([1e8, 1e-8, 1e-8, 1e8], [1e8, 1e-8, 1e8, 1e-8]))
    out = solve(s, t)
    assert is_all(out.result, RESULTS.successful)
    np.testing.assert_allclose(
        out.value * (s / t)[:, None], np.broadcast_to(want, (4, 3)), rtol=50 * np.finfo(dtype).eps
    )


def test_minimum_norm_along_matrices_of_one_rank():
    """A = B C of rank 2: value and both derivatives against NumPy's pseudo-inverse and finite differences."""
    rng = np.random.default_rng(3)
    B, C, b = rng.standard_normal((5, 2)), rng.standard_normal((2, 4)), rng.standard_normal(5)
    w, u = np.array([1.0, 0.5, 2.0, 1.5, 0.7]), rng.standard_normal(4)
    node = dn.WeightedLeastSquares(minimum_norm=True)
    loss = lambda B, C: u @ node(B @ C, b, weights=jnp.asarray(w)) ** 2
    root = np.sqrt(w)
    exact = lambda B, C: u @ (np.linalg.pinv(root[:, None] * (B @ C), rcond=1e-10) @ (root * b)) ** 2
    np.testing.assert_allclose(loss(B, C), exact(B, C), rtol=1e-12)
    dB, dC, h = rng.standard_normal((5, 2)), rng.standard_normal((2, 4)), 1e-4
    along = lambda t: loss(B + t * dB, C + t * dC)
    first, second = jax.jit(lambda t: (jax.grad(along)(t), jax.hessian(along)(t)))(0.0)
    at = [exact(B + k * h * dB, C + k * h * dC) for k in (-2, -1, 0, 1, 2)]
    np.testing.assert_allclose(first, (at[0] - 8 * at[1] + 8 * at[3] - at[4]) / (12 * h), rtol=1e-7)
    np.testing.assert_allclose(
        second, (-at[0] + 16 * at[1] - 30 * at[2] + 16 * at[3] - at[4]) / (12 * h * h), rtol=1e-5
    )


def test_least_squares_misuse():
    with pytest.raises(ValueError, match="minimum_norm=True"):
        dn.WeightedLeastSquares()(jnp.ones((2, 3)), jnp.ones(2))
    with pytest.raises(ValueError, match="b must be"):
        dn.WeightedLeastSquares()(jnp.ones((3, 2)), jnp.ones(2))
    with pytest.raises(ValueError, match="ridge must be"):
        dn.WeightedLeastSquares(-1.0)
    with pytest.raises(dn.SolveError, match="not unique"):
        dn.WeightedLeastSquares()(jnp.ones((3, 2)), jnp.ones(3))


# ----------------------------------------------------------------------------------------------------------------------
# Eigendecomposition
# ----------------------------------------------------------------------------------------------------------------------


def test_equal_eigenvalues_functions_of_the_group_are_exact():
    """At S = Q diag(2, 2, 2, -1, 0.5) Q': the projector onto the group, to second order; `jnp.linalg.eigh` gives NaN."""
    rng = np.random.default_rng(4)
    Q = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    S = Q * np.array([2.0, 2.0, 2.0, -1.0, 0.5]) @ Q.T
    H, K, U = (a + a.T for a in rng.standard_normal((3, 5, 5)))
    node = dn.Eigendecomposition(3)

    def projected(S):
        pairs = node(S)
        return jnp.sum(U * (pairs.vectors @ pairs.vectors.T)), jnp.sum(pairs.values)

    along = lambda s, t: projected(S + s * H + t * K)
    first = jax.jit(jax.jacfwd(along))(0.0, 0.0)
    mixed = jax.jit(jax.jacrev(jax.jacfwd(along), 1))(0.0, 0.0)

    def exact(s, t):
        values, vectors = np.linalg.eigh(S + s * H + t * K)
        return np.array([np.sum(U * (vectors[:, 2:] @ vectors[:, 2:].T)), np.sum(values[2:])])

    h = 1e-4
    np.testing.assert_allclose(first, (exact(h, 0) - exact(-h, 0)) / (2 * h), rtol=1e-6)
    differences = (exact(h, h) - exact(h, -h) - exact(-h, h) + exact(-h, -h)) / (4 * h * h)
    np.testing.assert_allclose(mixed, differences, rtol=1e-5)
    assert np.any(np.isnan(jax.grad(lambda S: jnp.sum(jnp.linalg.eigh(S)[1][0]))(jnp.eye(3))))


def test_eigendecomposition_statuses_and_kinks():
    S = np.stack(
        [np.diag([3.0, 3.0, 1.0]), np.diag([3.0, 2.0, 2.0]), np.diag([3.0, np.nan, 1.0]), np.diag([3.0, 2.0, 1.0])]
    )
    result = lambda **kw: code(
        jax.vmap(lambda S: dn.Eigendecomposition(2, **QUIET, **kw).solve(S).result)(jnp.asarray(S))
    )
    ok, lost, bad = (int(member._value) for member in (RESULTS.successful, RESULTS.not_unique, RESULTS.nonfinite_data))
    np.testing.assert_array_equal(result(), [ok, lost, bad, ok])
    np.testing.assert_array_equal(result(equal="fail"), [lost, lost, bad, ok])
    distances = [
        float(dn.Eigendecomposition(2, **QUIET).solve(jnp.asarray(S[i])).stats["kink_distance"]) for i in (0, 3)
    ]
    np.testing.assert_allclose(distances, [0, 1], atol=1e-12)
    # The implicit system is singular within a group, and says so.
    implicit = dn.Eigendecomposition(2, adjoint=dn.ImplicitAdjoint(), **QUIET)
    gradient = jax.grad(lambda S: jnp.sum(implicit(S).vectors[:, 0] * jnp.array([1.0, 2.0, 3.0])))
    assert np.all(np.isnan(gradient(jnp.asarray(S[0]))))
    assert np.all(np.isfinite(gradient(jnp.asarray(S[3]))))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_eigendecomposition_scale_sign_and_order(dtype):
    rng = np.random.default_rng(5)
    S = rng.standard_normal((6, 6))
    S = ((S + S.T) / 2).astype(dtype)
    node = dn.Eigendecomposition(2, largest=False)
    scales = np.asarray([1e-8, 1, 1e8], dtype)
    pairs = jax.jit(jax.vmap(lambda s: node(s * S)))(scales)
    values, vectors = np.linalg.eigh(S.astype(np.float64))
    tol = 50 * np.finfo(dtype).eps
    np.testing.assert_allclose(pairs.values / scales[:, None], np.broadcast_to(values[:2], (3, 2)), rtol=tol)
    for got in np.asarray(pairs.vectors):
        assert np.all(got[np.argmax(np.abs(got), axis=0), [0, 1]] > 0)
        np.testing.assert_allclose(np.abs(np.sum(got * vectors[:, :2], axis=0)), 1, rtol=tol)
    one = dn.Eigendecomposition()(jnp.array([[-3.0]]))
    assert one.values[0] == -3
    assert one.vectors[0, 0] == 1


# ----------------------------------------------------------------------------------------------------------------------
# Sphere
# ----------------------------------------------------------------------------------------------------------------------


def test_sphere_against_the_best_of_a_fine_sweep():
    """In the plane the circle can be searched: inside, outside, and far outside of the unconstrained solution's length."""
    rng = np.random.default_rng(6)
    angles = np.linspace(0, 2 * np.pi, 200_001)
    circle = np.stack([np.cos(angles), np.sin(angles)])
    A, b = rng.standard_normal((8, 3, 2)), rng.standard_normal((8, 3))
    for radius in (0.05, 1.0, 20.0):
        out = jax.vmap(lambda A, b, r=radius: dn.SphereLeastSquares(r, **QUIET).solve(A, b))(
            jnp.asarray(A), jnp.asarray(b)
        )
        assert is_all(out.result, RESULTS.successful)
        costs = np.sum((radius * A @ circle - b[:, :, None]) ** 2, axis=1) / 2
        assert np.all(np.asarray(out.objective) <= costs.min(1) * (1 + 1e-12))
        np.testing.assert_allclose(out.objective, costs.min(1), rtol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(out.value, axis=1), radius, rtol=1e-14)


def test_sphere_hard_case_and_one_unknown():
    node = dn.SphereLeastSquares(2.0, **QUIET)
    A = np.diag([2.0, 1.0])
    out = jax.vmap(node.solve)(
        jnp.broadcast_to(A, (4, 2, 2)), jnp.array([[1.0, 0.0], [9.0, 0.0], [1.0, 1e-3], [np.nan, 1.0]])
    )
    ok, lost, bad = (int(member._value) for member in (RESULTS.successful, RESULTS.not_unique, RESULTS.nonfinite_data))
    # No part along the second direction: hard if the first is short of the radius, y_1 = 2 / (4 - 1); not for y_1 = 18 / 3 > 2.
    np.testing.assert_array_equal(code(out.result), [lost, ok, ok, bad])
    np.testing.assert_allclose(out.value[1], [2, 0], atol=1e-15)
    np.testing.assert_allclose(np.linalg.norm(out.value[0]), 2, rtol=1e-14)
    line = lambda b: node(jnp.array([[1.0], [2.0]]), b)
    np.testing.assert_allclose(line(jnp.array([-1.0, 0.2])), [-2.0], rtol=1e-14)
    np.testing.assert_array_equal(jax.jacobian(line)(jnp.array([-1.0, 0.2])), [[0.0, 0.0]])


# ----------------------------------------------------------------------------------------------------------------------
# Analytic centre
# ----------------------------------------------------------------------------------------------------------------------


def test_analytic_centre_of_boxes():
    """The centre of a box is its middle, wherever the box lies and however thin it is; infinite sides are no constraints."""
    G = np.concatenate([np.eye(2), -np.eye(2), [[1.0, 1.0]]])
    middle = np.array([[0.0, 0.0], [7.0, -3.0], [1e3, 1e3], [1e-8, 2e-8], [1e8, -1e8]])
    half = np.array([[1.0, 2.0], [1e-3, 1e3], [0.1, 0.2], [1e-8, 1e-9], [1e8, 3e8]])
    h = np.concatenate([middle + half, half - middle, np.full((5, 1), np.inf)], axis=1)
    out = jax.jit(jax.vmap(lambda h: dn.AnalyticCentre(**QUIET).solve(G, h)))(jnp.asarray(h))
    assert is_all(out.result, RESULTS.successful)
    np.testing.assert_allclose(np.asarray(out.value - middle) / half, 0, atol=1e-8)


def test_analytic_centre_random_families():
    """Feasible ones around a known point, refuted ones, and ones with a ray: none may end in another way."""
    rng = np.random.default_rng(8)
    lanes, m, n = 40, 9, 3
    G = rng.standard_normal((lanes, m, n))
    G[:, -1] = -np.einsum("lm,lmn->ln", rng.uniform(0.1, 1, (lanes, m - 1)), G[:, :-1])
    point = rng.standard_normal((lanes, n)) * 10 ** rng.uniform(-2, 2, (lanes, 1))
    inside = np.einsum("lmn,ln->lm", G, point)
    bounded = inside + 10 ** rng.uniform(-2, 1, (lanes, m))
    empty = np.copy(bounded)
    # The rows add up to zero with positive weights: pushing all of them beyond the point leaves nothing.
    empty = inside - rng.uniform(0.1, 1, (lanes, m))
    ray = rng.standard_normal((lanes, n))
    along = np.einsum("lmn,ln->lm", G, ray)
    open_G = (
        G
        - (np.maximum(along, 0) + rng.uniform(0.1, 1, along.shape))[:, :, None]
        * (ray / np.sum(ray**2, 1)[:, None])[:, None]
    )
    open_h = np.einsum("lmn,ln->lm", open_G, point) + 1
    solve = jax.jit(jax.vmap(lambda G, h: dn.AnalyticCentre(**QUIET).solve(G, h)))
    out = solve(np.concatenate([G, G, open_G]), np.concatenate([bounded, empty, open_h]))
    wanted = np.repeat(
        [int(getattr(RESULTS, name)._value) for name in ("successful", "infeasible", "unbounded")], lanes
    )
    np.testing.assert_array_equal(code(out.result), wanted)
    s = bounded - np.einsum("lmn,ln->lm", G, out.value[:lanes])
    assert np.all(s > 0)
    # The gradient of the barrier, in units of the largest of its terms.
    terms = G / s[:, :, None]
    assert np.all(np.abs(terms.sum(1)) <= 1e-8 * np.abs(terms).max(1))
