"""Proximity operators, total variation, the lasso and first-order solvers: values by definition or enumeration, and hostile data."""

import functools as ft
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from jaxtyping import TypeCheckError

import declarative as dn

from .rows.proximal import lasso_reference, regression, total_variation_reference

# ----------------------------------------------------------------------------------------------------------------------
# Proximity operators
# ----------------------------------------------------------------------------------------------------------------------

PROXES = {
    "lasso": (dn.prox_lasso, 0.7, lambda y: 0.7 * np.abs(y).sum(), -np.inf),
    "elastic net": (dn.prox_elastic_net, (0.7, 0.4), lambda y: 0.7 * (np.abs(y).sum() + 0.2 * (y**2).sum()), -np.inf),
    "group lasso": (dn.prox_group_lasso, 0.7, lambda y: 0.7 * np.sqrt((y**2).sum()), -np.inf),
    "ridge": (dn.prox_ridge, 0.7, lambda y: 0.35 * (y**2).sum(), -np.inf),
    "non-negative lasso": (dn.prox_non_negative_lasso, 0.7, lambda y: 0.7 * y.sum(), 0.0),
    "non-negative ridge": (dn.prox_non_negative_ridge, 0.7, lambda y: 0.35 * (y**2).sum(), 0.0),
    "total variation": (dn.prox_total_variation, 0.7, lambda y: 0.7 * np.abs(np.diff(y)).sum(), -np.inf),
}


@pytest.mark.parametrize("name", PROXES)
def test_a_prox_is_the_minimiser_of_its_definition(name):
    """No point near it is better, in any of many directions: the objective is strongly convex, so that is enough."""
    prox, parameters, g, least = PROXES[name]
    rng = np.random.default_rng(0)
    for scale in (1.0, 3.0):
        x = rng.standard_normal(6) * 2
        y = np.asarray(prox(jnp.asarray(x), parameters, scale))
        cost = lambda y, x=x, scale=scale: 0.5 * ((y - x) ** 2).sum() + scale * g(y)
        steps = np.concatenate([np.eye(6), -np.eye(6), np.tril(np.ones((6, 6))), rng.standard_normal((200, 6))]) * 1e-4
        assert all(cost(np.maximum(y + step, least)) >= cost(y) - 1e-14 for step in steps)


@pytest.mark.parametrize("name", PROXES)
def test_prox_derivatives(name):
    prox, parameters, _, _ = PROXES[name]
    x = jnp.array([1.9, -2.3, 0.2, 3.1, -0.15, 0.9])
    leaves, treedef = jax.tree.flatten(parameters)

    def value(v):
        return prox(v[:6], jax.tree.unflatten(treedef, list(v[7:])), v[6])

    v = jnp.concatenate([x, jnp.array([1.1, *leaves])])
    forward, backward = jax.jit(lambda v: (jax.jacfwd(value)(v), jax.jacrev(value)(v)))(v)
    steps = 1e-6 * jnp.eye(v.size)
    difference = jax.vmap(lambda step: (value(v + step) - value(v - step)) / 2e-6)(steps).T
    np.testing.assert_allclose(forward, difference, atol=1e-8)
    np.testing.assert_allclose(backward, forward, atol=1e-14)


def test_kinks_of_proxes():
    one = lambda prox, x, lam: (prox(x, lam), jax.grad(prox)(x, lam), jax.grad(prox, 1)(x, lam))
    x = jnp.array(0.5)
    assert one(dn.prox_lasso, x, jnp.array(0.5)) == (0, 0, 0)
    assert one(dn.prox_lasso, jnp.array(0.0), jnp.array(0.0)) == (0, 1, 0)  # without a penalty it is the identity
    assert one(dn.prox_non_negative_lasso, x, jnp.array(0.5)) == (0, 0, 0)
    zeros = jnp.zeros(3)
    assert not np.any(jax.jacrev(dn.prox_group_lasso)(zeros, 1.0))
    np.testing.assert_array_equal(jax.jacrev(dn.prox_group_lasso)(zeros, 0.0), np.eye(3))
    assert np.all(np.isnan(dn.prox_lasso(jnp.array([jnp.nan]), 1.0)))
    assert np.all(np.isnan(dn.prox_group_lasso(jnp.array([jnp.nan, 1.0]), 1.0)))
    for size in (1e-200, 1e200):  # whose squares leave the range of floats
        np.testing.assert_allclose(
            dn.prox_group_lasso(jnp.array([3.0, 4.0]) * size, size), jnp.array([2.4, 3.2]) * size
        )


def test_proxes_take_pytrees():
    x = {"a": jnp.array([2.0, -0.3], jnp.float32), "b": jnp.array([[1.0]], jnp.float32)}
    out = dn.prox_lasso(x, {"a": jnp.array([0.5, 1.0], jnp.float32), "b": 0.25}, 2.0)
    np.testing.assert_array_equal(out["a"], np.array([1.0, 0.0]))
    np.testing.assert_array_equal(out["b"], np.array([[0.5]]))
    assert out["a"].dtype == jnp.float32
    np.testing.assert_allclose(dn.prox_group_lasso(x, 1.0)["b"], 1 - 1 / np.sqrt(5.09), rtol=1e-6)
    assert dn.prox_none(x) is x
    box = dn.make_prox_from_projection(lambda v, top=1.0: jnp.clip(v, 0, top))
    np.testing.assert_array_equal(box(jnp.array([3.0, -1.0]), None, 5.0), np.array([1.0, 0.0]))
    np.testing.assert_array_equal(box(jnp.array([3.0, -1.0]), 2.0), np.array([2.0, 0.0]))
    with pytest.raises(ValueError, match="a parameter must"):
        dn.prox_lasso(x, {"a": 1.0}, 1.0)
    with pytest.raises(ValueError, match=r"strength must be a number or have shape \(2,\)"):
        dn.prox_total_variation(jnp.zeros(3), jnp.ones(3))


# ----------------------------------------------------------------------------------------------------------------------
# Total variation
# ----------------------------------------------------------------------------------------------------------------------


class Signal(NamedTuple):
    """`TotalVariationData`, in NumPy."""

    signal: np.ndarray
    strength: np.ndarray


N = 24
tv = dn.TotalVariation(throw=False)


@ft.cache
def denoise():
    def one(signal, strength, cotangent):
        data = dn.TotalVariationData(signal, strength)
        value, pullback = jax.vjp(lambda data: tv.solve(data).value, data)
        return tv.solve(data), value, pullback(cotangent)[0]

    return jax.jit(jax.vmap(one))


def signals(dtype=np.float64):
    """A batch of awkward signals and strengths, and the strengths' scale."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((6, N))
    rows = [
        (noise[0], rng.uniform(0, 1, N - 1)),
        (np.cumsum(noise[1]), np.full(N - 1, 0.8)),
        (np.arange(N) ** 2 / 20.0, np.full(N - 1, 1.0)),  # convex: long blocks at the ends
        (np.full(N, 0.1), np.full(N - 1, 0.3)),  # constant
        (np.zeros(N), np.full(N - 1, 0.3)),
        (noise[2], np.zeros(N - 1)),  # nothing to do
        (noise[3], np.full(N - 1, 1e3)),  # one block
        (noise[4], np.where(np.arange(N - 1) % 3 == 0, 0.0, 0.7)),
        (np.where(np.arange(N) % 2, 1.0, -1.0), np.full(N - 1, 0.5)),  # ties wherever one looks
        (2.0 ** -np.arange(N), np.full(N - 1, 1e-3)),  # many scales
        (1e8 + noise[5], np.full(N - 1, 0.4)),
        (1e8 * noise[5], np.full(N - 1, 4e7)),
        (1e-8 * noise[5], np.full(N - 1, 4e-9)),
        (np.repeat([1.0, 4.0, 2.0], N // 3), np.full(N - 1, 0.5)),
    ]
    return tuple(np.stack(part).astype(dtype) for part in zip(*rows, strict=True))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_total_variation_against_dynamic_programming(dtype):
    signal, strength = signals(dtype)
    solution, value, _ = denoise()(signal, strength, np.ones_like(signal))
    assert np.all(np.asarray(solution.result._value) == 0)
    eps = float(np.finfo(dtype).eps)
    for k in range(len(signal)):
        want = total_variation_reference(Signal(signal[k].astype(float), strength[k].astype(float)))
        np.testing.assert_allclose(value[k], want, rtol=0, atol=30 * eps * np.abs(signal[k]).max())
    # (K2), and that the last sum of (K1) vanishes: y has the mean of x.
    dual, size = np.asarray(solution.dual), np.abs(signal).max(1, keepdims=True)
    clipped = np.clip(dual + np.diff(value, axis=1), -strength, strength)
    assert np.all(np.abs(clipped - dual) <= 100 * eps * size)
    assert np.all(np.abs(np.sum(value - signal, axis=1, keepdims=True)) <= 100 * eps * size * N**0.5)


def test_total_variation_gradient_is_that_of_its_blocks():
    """Rows without ties; by finite differences, exact for a piecewise linear map."""
    signal, strength = (part[[0, 1, 2, 6, 13]] for part in signals())
    rng = np.random.default_rng(1)
    cotangent, move, push = (
        rng.standard_normal(signal.shape),
        rng.standard_normal(signal.shape),
        rng.standard_normal(strength.shape),
    )
    step = 1e-5
    _, _, gradient = denoise()(signal, strength, cotangent)
    shifted = [denoise()(signal + s * move, strength + s * push, cotangent)[1] for s in (step, -step)]
    difference = np.sum(cotangent * (shifted[0] - shifted[1]), axis=1) / (2 * step)
    got = np.sum(gradient.signal * move, axis=1) + np.sum(gradient.strength * push, axis=1)
    np.testing.assert_allclose(got, difference, rtol=1e-6, atol=1e-6)


def test_total_variation_ties_count_as_one_block():
    signal, strength = (part[[3, 8]] for part in signals())
    _, value, gradient = denoise()(signal, strength, np.broadcast_to(np.arange(N, dtype=float), signal.shape))
    np.testing.assert_array_equal(value[0], np.full(N, 0.1))
    np.testing.assert_allclose(gradient.signal[0], np.full(N, (N - 1) / 2))
    assert not np.any(gradient.strength[0])


def test_total_variation_hostile():
    bad = jnp.stack(
        [jnp.arange(1.0, N + 1), jnp.full(N, jnp.nan), jnp.arange(1.0, N + 1), jnp.ones(N).at[3].set(jnp.inf)]
    )
    weights = jnp.full((4, N - 1), 0.5).at[2, 4].set(-1)
    solution, _, _ = denoise()(bad, weights, jnp.ones_like(bad))
    nonfinite = int(dn.RESULTS.nonfinite_data._value)
    np.testing.assert_array_equal(solution.result._value, [0, nonfinite, nonfinite, nonfinite])
    alone, _, _ = denoise()(bad[:1], weights[:1], jnp.ones_like(bad[:1]))
    np.testing.assert_array_equal(solution.value[0], alone.value[0])
    # Infinite weights tie; one entry, or two, is a signal too.
    np.testing.assert_allclose(tv(jnp.array([1.0, 3.0, 7.0]), jnp.array([jnp.inf, 0.5])), jnp.array([2.25, 2.25, 6.5]))
    np.testing.assert_array_equal(tv(jnp.array([3.0]), 2.0), np.array([3.0]))
    np.testing.assert_array_equal(tv(jnp.array([3.0, 0.0]), 1.0), np.array([2.0, 1.0]))
    with pytest.raises(ValueError, match="strength must be a number, or one for each of the 2 pairs"):
        tv(jnp.zeros(3), jnp.ones(3))
    with pytest.raises(ValueError, match=r"use `jax.vmap`"):
        tv.solve(jnp.zeros((2, 3)))


# ----------------------------------------------------------------------------------------------------------------------
# Lasso
# ----------------------------------------------------------------------------------------------------------------------


@ft.cache
def fit(k_max, with_ridge):
    node = dn.Lasso(k_max, throw=False)

    def one(X, y, lam, ridge, cotangent):
        data = dn.LassoData(X, y, lam, ridge if with_ridge else None)
        return node.solve(data), jax.grad(lambda data: node(data) @ cotangent)(data)

    return jax.jit(jax.vmap(one))


def solved(data, cotangent=None, k_max=None):
    """Solution and gradient of a list of `LassoData` of one shape."""
    X, y, lam, ridge = zip(
        *[(d.X, d.y, d.lam, np.zeros_like(d.lam) if d.ridge is None else d.ridge) for d in data], strict=True
    )
    cotangent = np.linspace(-1, 2, X[0].shape[1]) if cotangent is None else cotangent
    stack = lambda arrays: jnp.asarray(np.stack(arrays))
    broadcast = jnp.asarray(np.broadcast_to(cotangent, (len(X), cotangent.size)).astype(X[0].dtype))
    return fit(k_max, data[0].ridge is not None)(stack(X), stack(y), stack(lam), stack(ridge), broadcast)


class Regression(NamedTuple):
    """`LassoData`, in NumPy."""

    X: Any
    y: Any
    lam: Any
    ridge: Any = None


def numpy_data(n=12, p=5, seed=0, ridge=None):
    d = regression(n, p, seed, ridge)
    return Regression(*(None if block is None else np.array(block) for block in (d.X, d.y, d.lam, d.ridge)))


def with_(data, **blocks):
    return data._replace(**blocks)


def test_lasso_against_every_set_of_signs():
    base = [numpy_data(seed=seed) for seed in range(4)]
    a = base[0]
    cases = base + [
        with_(a, lam=np.zeros(5)),  # least squares
        with_(a, lam=a.lam * np.array([1, 0, 1, 1, 0])),
        with_(a, lam=np.full(5, 1.01 * np.abs(a.X.T @ a.y).max() / 12)),  # all zero
        with_(a, y=np.zeros(12)),
        with_(a, X=1e8 * a.X, lam=1e8 * a.lam),
        with_(a, X=1e-8 * a.X, lam=1e-8 * a.lam),
        with_(a, y=1e8 * a.y, lam=1e8 * a.lam),
        with_(a, X=a.X * 10.0 ** np.arange(-4, 6, 2), lam=a.lam * 10.0 ** np.arange(-4, 6, 2)),
        with_(a, lam=np.where(np.arange(5) == 2, np.inf, a.lam)),
    ]
    solution, gradient = solved(cases)
    assert np.all(np.asarray(solution.result._value) == 0), solution.report()
    for k, case in enumerate(cases):
        want = lasso_reference(with_(case, lam=np.minimum(case.lam, 1e300)))
        unit = np.sqrt((case.X**2).mean(0))
        scale = np.abs(unit * want).max() + np.finfo(float).tiny
        np.testing.assert_allclose(unit * solution.value[k] / scale, unit * want / scale, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(solution.value[k] == 0, want == 0)
    # (G1), by hand, for each case; nothing moves where all is zero.
    cotangent = np.linspace(-1, 2, 5)
    for k, case in enumerate(cases):
        beta = np.asarray(solution.value[k])
        on = beta != 0
        want = np.zeros(5)
        want[on] = -np.linalg.solve(case.X[:, on].T @ case.X[:, on] / 12, cotangent[on]) * np.sign(beta[on])
        got = np.asarray(gradient.lam[k])
        np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-9 * np.abs(want).max())
    assert not np.any(gradient.X[6])
    assert not np.any(gradient.y[6])
    assert not np.any(gradient.lam[6])


def test_lasso_hypergradient_against_finite_differences():
    """Inside of a linear piece the difference quotient in lam is exact but for rounding."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((40, 60))
    y = X[:, :6] @ np.array([2.0, -1.5, 1, 3, -2, 1.2]) + 0.3 * rng.standard_normal(40)
    lam = np.full(60, 0.15 * np.abs(X.T @ y).max() / 40)
    data, cotangent, move, step = Regression(X, y, lam), rng.standard_normal(60), rng.standard_normal(60), 1e-5
    solution, gradient = solved(
        [data, with_(data, lam=lam + step * move), with_(data, lam=lam - step * move)], cotangent, k_max=24
    )
    assert np.all(np.asarray(solution.result._value) == 0)
    support = np.asarray(solution.value) != 0
    assert np.all(support == support[0])
    assert 4 <= support[0].sum() <= 24
    difference = cotangent @ np.asarray(solution.value[1] - solution.value[2]) / (2 * step)
    np.testing.assert_allclose(np.asarray(gradient.lam[0]) @ move, difference, rtol=1e-6)


def test_elastic_net_has_a_gradient_where_columns_are_equal():
    twin = numpy_data(seed=2)
    twin = with_(twin, X=np.concatenate([twin.X[:, :4], twin.X[:, :1]], axis=1), lam=np.full(5, 0.1))
    net = with_(twin, ridge=np.full(5, 0.2))
    solution, gradient = solved([net])
    np.testing.assert_allclose(solution.value[0], lasso_reference(net), atol=1e-12)
    np.testing.assert_allclose(solution.value[0, 0], solution.value[0, 4], rtol=1e-12)
    assert np.all(np.isfinite(gradient.X))
    # Without a ridge and without a penalty the twins are in the support, and depend on one another.
    plain = with_(twin, lam=np.array([0.0, 0.1, 0.1, 0.1, 0.0]))
    solution, gradient = solved([plain, numpy_data(seed=2)])
    assert np.all(np.isnan(gradient.lam[0]))
    assert np.all(np.isfinite(gradient.lam[1]))
    with pytest.raises(jax.errors.JaxRuntimeError, match="dF/dy is singular"):
        jax.grad(lambda lam: jnp.sum(dn.Lasso()(jnp.asarray(plain.X), jnp.asarray(plain.y), lam)))(
            jnp.asarray(plain.lam)
        )


def test_lasso_failures():
    a = numpy_data()
    good = solved([a])[0]
    bad = with_(a, y=np.where(np.arange(12) == 3, np.nan, a.y))
    cases = [
        a,
        bad,
        with_(a, lam=-a.lam),
        with_(a, X=np.where(np.eye(12, 5) > 0, np.inf, a.X)),
        with_(a, lam=a.lam * 1e-3),
    ]
    solution, gradient = solved(cases, k_max=3)
    codes = [int(getattr(dn.RESULTS, name)._value) for name in ("successful", "nonfinite_data", "support_overflow")]
    np.testing.assert_array_equal(solution.result._value, np.array(codes)[[0, 1, 1, 1, 2]])
    np.testing.assert_allclose(solution.value[0], good.value[0], rtol=1e-12)
    assert np.all(np.isfinite(gradient.X[0]))
    assert np.any(np.isnan(gradient.X[1]))
    assert np.any(np.isnan(gradient.X[4]))
    with pytest.raises(dn.SolveError, match="raise `k_max`"):
        dn.Lasso(3)(jnp.asarray(a.X), jnp.asarray(a.y), 1e-3)
    for call, words in (
        (lambda: dn.Lasso(0), "k_max must be a positive integer"),
        (lambda: dn.Lasso(adjoint=dn.UnrolledAdjoint()), "not for differentiation"),
        (lambda: dn.Lasso().solve((jnp.ones(3), jnp.ones(3), 0.1)), r"X must be a non-empty floating matrix"),
        (lambda: dn.Lasso().solve((jnp.ones((3, 2)), jnp.ones(2), 0.1)), r"y must have shape \(3,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_lasso_in_float32_and_with_one_column():
    cases = [numpy_data(seed=seed) for seed in range(3)]
    single = [Regression(*(np.float32(block) for block in (d.X, d.y, d.lam))) for d in cases]
    exact, low = solved(cases), solved(single)
    assert low[0].value.dtype == jnp.float32
    assert np.all(np.asarray(low[0].result._value) == 0)
    np.testing.assert_allclose(low[0].value, exact[0].value, atol=1e-5)
    np.testing.assert_allclose(low[1].lam, exact[1].lam, atol=1e-4)
    x, y = jnp.array([[1.0], [2.0], [-1.0]]), jnp.array([1.0, 3.0, 0.0])
    np.testing.assert_allclose(dn.Lasso()(x, y, 0.5), jnp.array([(7 / 3 - 0.5) / 2]), rtol=1e-14)


# ----------------------------------------------------------------------------------------------------------------------
# First-order solvers, and the node
# ----------------------------------------------------------------------------------------------------------------------

rng = np.random.default_rng(5)
ROOT = rng.standard_normal((7, 6))
HESSIAN = jnp.asarray(ROOT.T @ ROOT / 7 + 0.05 * np.eye(6))
LINEAR = jnp.asarray(rng.standard_normal(6))


def quadratic(y, x):
    return y @ HESSIAN @ y / 2 - x @ y


def cone_reference(linear, total=None):
    """argmin of the quadratic over y >= 0 (and a sum of 1), by trying every support."""
    H, q = np.asarray(HESSIAN), np.asarray(linear)
    for mask in range(1, 2**6):
        on = np.array([mask >> k & 1 for k in range(6)], bool)
        y, nu = np.zeros(6), 0.0
        if total is None:
            y[on] = np.linalg.solve(H[np.ix_(on, on)], q[on])
        else:
            k = on.sum()
            kkt = np.block([[H[np.ix_(on, on)], np.ones((k, 1))], [np.ones((1, k)), np.zeros((1, 1))]])
            *y[on], nu = np.linalg.solve(kkt, np.append(q[on], total))
        if np.all(y[on] > 0) and np.all((H @ y - q + nu)[~on] >= 0):
            return y
    raise AssertionError("no support fits")


ORTHANT = lambda v, x: jnp.where(v > 0, v, 0)
SPARSEMAX = dn.Sparsemax()
SIMPLEX = lambda v, x: SPARSEMAX(v)
SOLVERS = {
    "proximal": (dn.ProximalGradient(1e-12, 0.0, lambda v, x, step: ORTHANT(v, x)), None, 1e-10),
    "not accelerated": (
        dn.ProximalGradient(1e-12, 0.0, lambda v, x, step: ORTHANT(v, x), accelerate=False),
        None,
        1e-9,
    ),
    "given step": (dn.ProximalGradient(1e-12, 0.0, lambda v, x, step: ORTHANT(v, x), 0.15), None, 1e-10),
    "orthant": (dn.ProjectedGradient(1e-12, 0.0, ORTHANT), None, 1e-10),
    "simplex": (dn.ProjectedGradient(1e-12, 0.0, SIMPLEX), 1.0, 1e-10),
    "mirror simplex": (dn.MirrorDescent(1e-9, 0.0), 1.0, 1e-7),
    "mirror orthant": (dn.MirrorDescent(1e-9, 0.0, "orthant"), None, 1e-7),
    "blocks": (dn.BlockCoordinateDescent(1e-12, 0.0, lambda v, x, step: ORTHANT(v, x)), None, 1e-10),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_first_order_solvers(name):
    """In plain optimistix, over a batch, at scales from 1e-8 to 1e8: the same steps, since nothing is absolute."""
    solver, total, tol = SOLVERS[name]

    def solve(x):
        out = optx.minimise(quadratic, solver, jnp.full(6, 1 / 6), x, max_steps=20000, throw=False)
        return out.value, out.result._value

    scales = [1.0, 3.0, 0.2] if total else [1.0, 1e8, 1e-8]
    # A start at 1/6 is far from a solution of size 1e8, for a multiplicative step.
    scales = [1.0, 3.0, 0.2] if name == "mirror orthant" else scales
    values, codes = jax.jit(jax.vmap(solve))(jnp.stack([scale * LINEAR for scale in scales]))
    assert not np.any(codes)
    for value, scale in zip(values, scales, strict=True):
        want = cone_reference(scale * LINEAR, total)
        np.testing.assert_allclose(value, want, rtol=0, atol=tol * np.abs(want).max())


def test_solvers_take_rows_as_blocks_and_mirrors_of_ones_own():
    target = jnp.array([[3.0, 4.0], [0.1, 0.2], [-1.0, 1.0]])
    fn = lambda y, x: jnp.sum(jnp.array([[1.0], [2.0], [40.0]]) * (y - x) ** 2) / 2
    prox = lambda v, x, step: jax.vmap(lambda row: dn.prox_group_lasso(row, 0.5, step))(v)
    out = optx.minimise(fn, dn.BlockCoordinateDescent(1e-12, 0.0, prox), jnp.zeros((3, 2)), target, max_steps=100)
    rows = [dn.prox_group_lasso(row, 0.5 / weight) for row, weight in zip(target, (1, 2, 40), strict=True)]
    np.testing.assert_allclose(out.value, jnp.stack(rows), atol=1e-12)
    move = lambda y, gradient, step, x: y - step * gradient
    out = optx.minimise(fn, dn.MirrorDescent(1e-12, 0.0, move), jnp.ones((3, 2)), target, max_steps=5000)
    np.testing.assert_allclose(out.value, target, atol=1e-10)
    with pytest.raises(ValueError, match="geometry must be"):
        dn.MirrorDescent(1e-6, 0.0, "sphere")  # pyright: ignore[reportArgumentType]  (what is tested)


def test_proximal_argmin_with_other_solvers_and_adjoints():
    """One problem, one derivative, whoever finds the solution and however the gradient flows."""
    prox = lambda v, x, step: ORTHANT(v, x)
    want = cone_reference(LINEAR)
    on = want > 0
    jacobian = np.zeros((6, 6))
    jacobian[np.ix_(on, on)] = np.linalg.inv(np.asarray(HESSIAN)[np.ix_(on, on)])
    for solver, adjoint, step_size, tol in (
        (None, None, None, 1e-9),
        (dn.ProjectedGradient(1e-12, 0.0, ORTHANT), None, None, 1e-9),
        (dn.BlockCoordinateDescent(1e-12, 0.0, prox), None, None, 1e-9),
        (None, dn.NeumannAdjoint(2000), 0.15, 1e-6),
        (None, dn.UnrolledAdjoint(), None, 1e-6),
    ):
        node = dn.ProximalArgmin(quadratic, prox, solver, adjoint, step_size=step_size)
        got = jax.jit(jax.jacrev(lambda x, node=node: node(x, y0=jnp.full(6, 0.1))))(LINEAR)
        np.testing.assert_allclose(got, jacobian, atol=tol * np.abs(jacobian).max())
    with pytest.raises(ValueError, match="pass step_size"):
        dn.ProximalArgmin(quadratic, prox, adjoint=dn.OneStepAdjoint())
    # A solver of another problem is found out.
    wrong = dn.ProximalArgmin(quadratic, prox, optx.BFGS(1e-10, 1e-10), throw=False)
    assert wrong.solve(LINEAR, y0=jnp.full(6, 0.1)).result == dn.RESULTS.not_a_solution


def test_a_prox_and_tolerances_that_a_solver_leaves_open_are_those_of_the_node():
    prox = lambda v, x, step: dn.prox_lasso(v, 0.3, step)
    want = dn.ProximalArgmin(quadratic, prox)(LINEAR, y0=jnp.zeros(6))
    assert np.any(want == 0)
    for solver in (dn.ProximalGradient(accelerate=False), dn.BlockCoordinateDescent()):
        got = dn.ProximalArgmin(quadratic, prox, solver)(LINEAR, y0=jnp.zeros(6))
        np.testing.assert_allclose(got, want, atol=1e-10)
    with pytest.raises(ValueError, match="ProximalGradient needs rtol and atol"):
        optx.minimise(quadratic, dn.ProximalGradient(), jnp.zeros(6), LINEAR)
    with pytest.raises((ValueError, TypeCheckError), match="make an instance|'solver'"):
        dn.ProximalArgmin(quadratic, prox, dn.ProximalGradient)  # pyright: ignore[reportArgumentType]  (what is tested)
    with pytest.raises((ValueError, TypeCheckError), match="for `FixedPoint`|'solver'"):
        dn.ProximalArgmin(quadratic, prox, dn.Anderson())  # pyright: ignore[reportArgumentType]  (what is tested)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_maxima_are_no_minima(dtype):
    away = lambda y, x: -jnp.sum((y - x) ** 2)
    onto = lambda y, x: jnp.sum((y - x) ** 2) / 2
    ones, nothing = jnp.ones(2, dtype), lambda v, x, step: v
    ridge = lambda lam: lambda v, x, step: dn.prox_ridge(v, lam, step)
    status = lambda fn, prox: dn.ProximalArgmin(fn, prox, throw=False).solve(ones, y0=ones).result
    assert status(away, nothing) == dn.RESULTS.indefinite
    # A quadratic that is outweighed: by a penalty below zero, or by the curvature of f.
    for outcome in (status(onto, ridge(-20.0)), status(away, ridge(0.5))):
        assert outcome != dn.RESULTS.successful
    concave = lambda v, x, step: v / (1 - 20 * step)  # what the prox of -20 |y|^2 / 2 would be, were there one
    assert status(onto, concave) == dn.RESULTS.indefinite
    assert status(onto, ridge(-0.5)) == dn.RESULTS.successful  # the sum is convex
    assert status(away, ridge(5.0)) == dn.RESULTS.successful


def test_penalties_below_zero_are_not_numbers():
    x = jnp.array([0.5, -2.0, 0.0])
    cases: list[tuple[Any, Any]] = [
        (dn.prox_lasso, -0.1),
        (dn.prox_elastic_net, (-0.1, 1.0)),
        (dn.prox_elastic_net, (1.0, -1.0)),
        (dn.prox_group_lasso, -0.1),
        (dn.prox_ridge, -1.0),
        (dn.prox_non_negative_ridge, -2.0),
        (dn.prox_total_variation, -0.1),
    ]
    for prox, parameters in cases:
        assert jnp.all(jnp.isnan(prox(x, parameters))), prox
    np.testing.assert_allclose(dn.prox_ridge(x, -0.5), 2 * x)


def test_proximal_argmin_gives_gradients_to_closures():
    def value(lam, x):
        node = dn.ProximalArgmin(quadratic, lambda v, x, step: dn.prox_lasso(v, lam, step))
        return jnp.sum(node(x, y0=jnp.zeros(6)) ** 2)

    lam = jnp.array(0.2)
    got = jax.grad(value)(lam, LINEAR)
    difference = (value(lam + 1e-5, LINEAR) - value(lam - 1e-5, LINEAR)) / 2e-5
    np.testing.assert_allclose(got, difference, rtol=1e-6)


@pytest.mark.slow
def test_proximal_argmin_solves_on_the_support_when_it_is_large():
    """700 unknowns: against the lasso's own system, both modes, and where D(I - sH) - I is not symmetric."""
    rng = np.random.default_rng(0)
    n, p = 60, 700
    X = jnp.asarray(rng.standard_normal((n, p)))
    y = X[:, :5].sum(1) + 0.1 * jnp.asarray(rng.standard_normal(n))
    cotangent, tangent = (jnp.asarray(rng.standard_normal(p)) for _ in range(2))
    loss = lambda beta, x: jnp.sum((x.X @ beta - x.y) ** 2) / (2 * n)
    node = dn.ProximalArgmin(loss, lambda v, x, step: dn.prox_lasso(v, x.lam, step))
    data = dn.LassoData(X, y, jnp.asarray(rng.uniform(0.2, 0.4, p)))
    reverse = lambda solve: jax.grad(lambda data: cotangent @ solve(data))(data)
    ours, theirs = reverse(lambda data: node(data, y0=jnp.zeros(p))), reverse(dn.Lasso())
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7 * float(jnp.max(jnp.abs(b))))
    forward = lambda solve: jax.jvp(
        lambda lam: solve(eqx.tree_at(lambda d: d.lam, data, lam)), (data.lam,), (tangent,)
    )[1]
    a, b = forward(lambda data: node(data, y0=jnp.zeros(p))), forward(dn.Lasso())
    np.testing.assert_allclose(a, b, atol=1e-7 * float(jnp.max(jnp.abs(b))))
    # A diagonal of D that differs from entry to entry.
    net = lambda v, x, step: dn.prox_elastic_net(v, (x.lam, jnp.linspace(0.5, 5, p)), step)
    node = dn.ProximalArgmin(loss, net)
    enet = lambda data: dn.Lasso()(data.X, data.y, data.lam, data.lam * jnp.linspace(0.5, 5, p))
    ours, theirs = reverse(lambda data: node(data, y0=jnp.zeros(p))), reverse(enet)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7 * float(jnp.max(jnp.abs(b))))
