"""Robust pooling beyond the check kit: hostile data, conventions where a minimum is not unique, units, masks, shapes."""

# pyright: reportArgumentType=false, reportCallIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import declarative as dn

PENALTIES = ("quadratic", "pseudo-huber", "huber", "welsch", "truncated-quadratic")
each = pytest.mark.parametrize("penalty", PENALTIES)
DATA = jnp.array([0.3, -1.2, 0.9, 5.2, 0.1, -0.4, 4.6])


@each
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.float64, marks=pytest.mark.full)])
def test_units_duplicates_and_single_points(penalty, dtype):
    pool = jax.jit(lambda x, a: dn.RobustPool(penalty, a)(x))
    x, alpha = DATA.astype(dtype), jnp.asarray(0.8, dtype)
    tol = 20 * float(jnp.finfo(dtype).eps)
    plain = pool(x, alpha)
    assert plain.dtype == dtype
    for scale in (1e-8, 1e8):
        unit = jnp.asarray(scale, dtype)
        np.testing.assert_allclose(pool(unit * x, unit * alpha) / unit, plain, rtol=tol)
    np.testing.assert_allclose(pool(jnp.full(5, 3.7, dtype), alpha), 3.7, rtol=tol)
    np.testing.assert_allclose(pool(jnp.asarray([2.5], dtype), alpha), 2.5, rtol=tol)
    np.testing.assert_allclose(pool(jnp.concatenate([x, x]), alpha), plain, rtol=tol)


@each
def test_masked_and_weightless_points_are_as_good_as_absent(penalty):
    pool = dn.RobustPool(penalty, 0.8)
    part = pool(DATA[:4])
    mask, weights = jnp.arange(7) < 4, jnp.where(jnp.arange(7) < 4, 1.0, 0.0)
    spoilt = DATA.at[5].set(jnp.nan)
    np.testing.assert_allclose(pool(spoilt, mask=mask), part, rtol=1e-14)
    np.testing.assert_allclose(pool(DATA, weights), part, rtol=1e-14)
    gradient = jax.grad(lambda x: pool(x, mask=mask))(spoilt)
    np.testing.assert_array_equal(gradient[4:], 0)
    np.testing.assert_allclose(gradient[:4], jax.grad(pool)(DATA[:4]), rtol=1e-13)
    np.testing.assert_allclose(jnp.sum(gradient), 1, rtol=1e-13)  # it moves with its points


@each
def test_failures_stay_in_their_lane(penalty):
    x = jnp.stack([DATA, DATA.at[2].set(jnp.nan), DATA, DATA])
    mask = jnp.ones((4, 7), bool).at[2].set(False)
    node = dn.RobustPool(penalty, 0.8, throw=False)
    solve = jax.jit(jax.vmap(lambda x, m: node.solve(dn.Points(x, None, m))))
    out = solve(x, mask)
    good = np.asarray(out.result == dn.RESULTS.successful)
    np.testing.assert_array_equal(good, [True, False, False, True])
    gradient = jax.jit(jax.vmap(jax.grad(lambda x, m: node(x, mask=m))))(x, mask)
    alone = jax.jit(jax.vmap(jax.grad(lambda x: node(x))))(x[:1])
    np.testing.assert_allclose(gradient[jnp.array([0, 3])], jnp.concatenate([alone, alone]), rtol=1e-13)
    assert jnp.all(jnp.isnan(gradient[1]))


def test_an_outlier_has_no_pull_where_the_penalty_is_bounded():
    for penalty, most in (
        ("quadratic", 1 / 7),
        ("pseudo-huber", 1e-3),
        ("huber", 0),
        ("welsch", 1e-6),
        ("truncated-quadratic", 0),
    ):
        gradient = jax.grad(dn.RobustPool(penalty, 0.8))(DATA.at[3].set(50.0))
        assert abs(float(gradient[3])) <= most + 1e-15, penalty


def test_a_gap_in_the_middle_is_where_hubers_minimum_is_not_unique():
    x = jnp.array([-3.0, -5.0, 4.0, 7.0])
    pool = dn.RobustPool("huber", 0.5)
    np.testing.assert_allclose(pool(x), 0.5)
    np.testing.assert_allclose(jax.grad(pool)(x), [0.5, 0, 0.5, 0])


@pytest.mark.parametrize("penalty", ["welsch", "truncated-quadratic"])
def test_the_global_minimum_is_found(penalty):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(2, 0.1, (40, 9)), rng.uniform(-6, 6, (40, 25))], axis=1)
    found = jax.jit(jax.vmap(dn.RobustPool(penalty, 0.4)))(jnp.asarray(x))
    phi = lambda r: 1 - np.exp(-(r**2) / 2) if penalty == "welsch" else np.minimum(r**2, 1) / 2
    cost = lambda u: phi((u[:, None] - x) / 0.4).sum(1)
    grid = np.linspace(-6, 6, 2401)
    best = np.min([cost(np.full(40, u)) for u in grid], axis=0)
    # Both go downhill from a point or better; of Welsch's minima it is the best that can be reached from the best point.
    assert np.mean(cost(np.asarray(found)) <= best + 1e-3) >= (1.0 if penalty == "truncated-quadratic" else 0.95)


def test_shapes():
    images = jnp.asarray(np.random.default_rng(1).standard_normal((3, 4, 5)))
    pooled = dn.RobustPool("pseudo-huber", 0.7, axis=(1, 2))(images)
    np.testing.assert_allclose(pooled, jax.vmap(dn.RobustPool("pseudo-huber", 0.7))(images.reshape(3, 20)), rtol=1e-12)
    points = images[0]
    turn = jnp.asarray(np.linalg.qr(np.random.default_rng(2).standard_normal((5, 5)))[0])
    vector = dn.RobustVectorPool("pseudo-huber", 0.7)
    np.testing.assert_allclose(vector(points @ turn), vector(points) @ turn, rtol=1e-10)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: dn.RobustPool("huber", -1.0), "alpha"),
        (lambda: dn.RobustPool("huber")(DATA, mask=jnp.ones(3, bool)), "mask"),
    ],
)
def test_misuse_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("node", [dn.RobustPool, dn.RobustVectorPool])
def test_welsch_does_not_crawl_past_an_inflection(node):
    """Two points so far apart that the middle is all but flat, a little downhill to one side: reweighting alone takes over 800 steps."""
    x, w = jnp.array([[-1.002], [0.0], [1.002]]), jnp.array([1.0, 1e-4, 1 + 1e-6])
    pool = node("welsch", 1.0, start="centre", throw=False)
    out = pool.solve(dn.Points(x, w))
    assert out.result == dn.RESULTS.successful
    assert out.stats["steps"] < 60
    slope = lambda u: float(
        np.sum(np.asarray(w) * np.exp(-((u - np.asarray(x)[:, 0]) ** 2) / 2) * (u - np.asarray(x)[:, 0]))
    )
    np.testing.assert_allclose(float(out.value[0]), scipy.optimize.brentq(slope, 0.01, 0.5, xtol=1e-15), rtol=1e-7)
