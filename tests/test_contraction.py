import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import declarative as dn


def affine(y, x):
    return {"a": x @ y["a"]}


def test_spectral_radius_of_real_and_complex_spectra():
    turn = lambda angle: jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    block = jax.scipy.linalg.block_diag(0.9 * turn(1.0), 0.5 * turn(0.3), jnp.array([[-0.7]]))
    skew = jnp.eye(5) + 0.3 * jnp.triu(jnp.ones((5, 5)), 1)  # not normal
    for matrix, radius in ((jnp.diag(jnp.array([0.99, -0.5, 0.1])), 0.99), (skew @ block @ jnp.linalg.inv(skew), 0.9)):
        y = {"a": jnp.zeros(len(matrix))}
        found = jax.jit(lambda m, y=y: dn.spectral_radius(affine, y, m, key=jr.key(0), steps=400))(matrix)
        np.testing.assert_allclose(found, radius, rtol=0.01)
    assert dn.spectral_radius(lambda y, x: 0 * y, jnp.ones(3), None, key=jr.key(0)) == 0
    scaled = dn.spectral_radius(
        lambda y, x: jnp.tanh(x * y), jnp.zeros(3, jnp.float32), jnp.float32(0.8), key=jr.key(0)
    )
    assert scaled.dtype == jnp.float32
    np.testing.assert_allclose(scaled, 0.8, rtol=1e-5)


def test_penalty_is_unbiased_and_differentiable():
    W = jr.normal(jr.key(1), (4, 4))
    y = jnp.array([0.1, -0.3, 0.2, 0.5])
    fn = lambda y, W: jnp.tanh(W @ y)
    jacobian = lambda W: jax.jacobian(lambda y: fn(y, W))(y)
    exact = lambda W: jnp.sum(jacobian(W) ** 2) / 4
    estimate = lambda W: dn.jacobian_penalty(fn, y, W, key=jr.key(2), probes=40_000)
    value, slope = jax.jit(jax.value_and_grad(estimate))(W)
    np.testing.assert_allclose(value, exact(W), rtol=0.02)
    np.testing.assert_allclose(slope, jax.grad(exact)(W), atol=0.03 * float(jnp.max(jnp.abs(slope))))
    batch = jax.vmap(lambda key: dn.jacobian_penalty(fn, y, W, key=key))(jr.split(jr.key(3), 2000))
    np.testing.assert_allclose(jnp.mean(batch), exact(W), rtol=0.1)


def test_the_penalty_lowers_the_radius():
    cell = eqx.nn.Linear(6, 6, key=jr.key(0))
    cell = eqx.tree_at(lambda cell: cell.weight, cell, 3 * cell.weight)
    radius = lambda cell: dn.spectral_radius(lambda y, x: cell(y), jnp.zeros(6), None, key=jr.key(1))
    before = radius(cell)

    @eqx.filter_jit
    def descend(cell, key):
        slope = eqx.filter_grad(lambda cell: dn.jacobian_penalty(lambda y, x: cell(y), jnp.zeros(6), None, key=key))(
            cell
        )
        return eqx.apply_updates(cell, jax.tree.map(lambda g: -0.3 * g, slope))

    for key in jr.split(jr.key(2), 20):
        cell = descend(cell, key)
    assert radius(cell) < 0.7 * before


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="probes"):
        dn.jacobian_penalty(lambda y, x: y, jnp.ones(2), None, key=jr.key(0), probes=0)
    with pytest.raises(ValueError, match="steps"):
        dn.spectral_radius(lambda y, x: y, jnp.ones(2), None, key=jr.key(0), steps=1)
    for function in (dn.jacobian_penalty, dn.spectral_radius):
        with pytest.raises(ValueError, match="2 entries, got 1"):
            function(lambda y, x: y[:1], jnp.ones(2), None, key=jr.key(0))
        with pytest.raises(ValueError, match="y must be"):
            function(lambda y, x: y, jnp.ones(2, jnp.int32), None, key=jr.key(0))
