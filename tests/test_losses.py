"""Fenchel-Young losses: gradient identity, non-negativity, zero exactly at the map, and the published closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

import declarative as dn

Z = jnp.array([0.3, -1.2, 0.9, 0.1])
LOSSES = [
    (dn.softmax_loss, dn.Softmax()),
    (dn.sparsemax_loss, dn.Sparsemax()),
    (dn.entmax_loss, dn.Entmax(1.5)),
    (lambda z, y: dn.entmax_loss(z, y, jnp.array(1.2)), dn.Entmax(1.2)),
]


@pytest.mark.parametrize(("loss", "node"), LOSSES)
def test_gradient_is_map_minus_target(loss, node):
    soft = jnp.array([0.1, 0.2, 0.3, 0.4])
    for target, vector in ((jnp.array(1), jnp.eye(4)[1]), (soft, soft)):
        np.testing.assert_allclose(np.asarray(jax.grad(loss)(Z, target)), np.asarray(node(Z) - vector), atol=1e-13)
        assert loss(Z, target) > 0
    np.testing.assert_allclose(float(loss(Z, node(Z))), 0, atol=1e-14)
    np.testing.assert_allclose(np.asarray(jax.hessian(loss)(Z, 1)), np.asarray(jax.jacfwd(node)(Z)), atol=1e-12)
    # Adding a constant to every score changes nothing.
    np.testing.assert_allclose(float(loss(Z + 3.0, 1)), float(loss(Z, 1)), rtol=1e-12)


def test_closed_forms():
    np.testing.assert_allclose(float(dn.softmax_loss(Z, 2)), -float(jax.nn.log_softmax(Z)[2]), rtol=1e-13)
    p, tau = dn.Sparsemax()(Z), dn.Sparsemax().solve(Z).dual
    support = np.asarray(p) > 0
    want = -Z[1] + 0.5 * float(np.sum(np.asarray(Z)[support] ** 2 - float(tau) ** 2)) + 0.5
    np.testing.assert_allclose(float(dn.sparsemax_loss(Z, 1)), float(want), rtol=1e-13)
    assert dn.sparsemax_loss(jnp.array([3.0, 1.0, 0.0]), 0) == 0  # a margin of 1 is enough


def test_derivative_in_alpha_and_the_limit_of_softmax():
    loss = lambda alpha: dn.entmax_loss(Z, 1, alpha)
    a, h = jnp.array(1.3), 1e-6
    np.testing.assert_allclose(float(jax.grad(loss)(a)), float(loss(a + h) - loss(a - h)) / (2 * h), rtol=1e-8)
    np.testing.assert_allclose(float(loss(jnp.array(1 + 1e-9))), float(dn.softmax_loss(Z, 1)), rtol=1e-8)


def test_masked_and_wrong_targets():
    z = Z.at[1].set(-jnp.inf)
    assert np.all(np.isfinite(np.asarray(jax.grad(dn.entmax_loss)(z, 2))))
    assert np.isnan(float(dn.entmax_loss(Z, 7)))
    assert np.isnan(float(dn.entmax_loss(Z, Z)))  # no distribution: the loss would be negative
    # Under the tests' type checker a wrong shape is caught before our own message.
    with pytest.raises((ValueError, TypeCheckError), match="scores"):
        dn.softmax_loss(Z, jnp.ones(3))
    with pytest.raises((ValueError, TypeCheckError), match="target"):
        dn.softmax_loss(Z, jnp.array([1, 2]))


def test_half_precision():
    z = Z.astype(jnp.bfloat16)
    assert dn.entmax_loss(z, 1).dtype == jnp.bfloat16
    assert jax.grad(dn.entmax_loss)(z, 1).dtype == jnp.bfloat16
