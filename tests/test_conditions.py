"""The three conditions of the implicit function theorem, each broken once."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import declarative as dn


def test_all_hold():
    node = dn.Softmax()
    z = jnp.array([0.3, -1.0, 2.0])
    report = dn.conditions(node, node.solve(z), z)
    assert report.holds() == (True, True, True)
    assert report.exact
    p = np.asarray(node(z))
    jacobian = np.block([[-np.eye(3), -p[:, None]], [np.ones((1, 3)), np.zeros((1, 1))]])
    values = np.linalg.svd(jacobian, compute_uv=False)
    np.testing.assert_allclose([report.sigma_max, report.sigma_min], values[[0, -1]], rtol=1e-12)
    assert "applies" in str(report)


def test_not_a_solution():
    node = dn.Root(lambda y, x: y**2 - x, throw=False)
    solution = node.solve(4.0, y0=1.0)
    early = eqx.tree_at(lambda s: s.unknown, solution, solution.unknown + 1e-3)
    report = dn.conditions(node, early, 4.0)
    assert report.holds() == (False, None, True)
    assert "not a solution" in report.verdict()
    np.testing.assert_allclose(float(report.residual), (2 + 1e-3) ** 2 - 4)


def test_on_a_kink():
    node = dn.Sparsemax()
    z = jnp.array([1.0, 0.0, -3.0])  # the second score equals the threshold
    report = dn.conditions(node, node.solve(z), z)
    assert report.holds() == (True, False, True)
    assert "kink" in report.verdict()
    one_sided = [jax.jacfwd(node)(z.at[1].add(h)) for h in (1e-3, -1e-3)]
    assert np.max(np.abs(np.asarray(one_sided[0] - one_sided[1]))) > 0.4


def test_singular_jacobian():
    node = dn.implicit(lambda y, x: y**2 - x, policy=dn.Policy(throw=False))(jnp.sqrt)
    report = dn.conditions(node, node.solve(0.0), (0.0,))
    assert report.holds() == (True, None, False)
    assert "singular" in report.verdict()
    # Wherever a solver stops near the double root, the Jacobian is tiny but not zero: it must be flagged all the same.
    near = dn.Root(lambda y, x: y**2 - x, throw=False)
    report = dn.conditions(near, near.solve(0.0, y0=1.0), 0.0)
    assert report.sigma_min > 0
    assert not report.holds()[2]


def test_estimates_above_the_dense_size():
    n = 600
    diagonal = jnp.logspace(0, 3, n)
    rotate = jnp.roll(jnp.eye(n), 1, 0)
    node = dn.implicit(lambda y, x: diagonal * (rotate @ y) - x)(lambda x: rotate.T @ (x / diagonal))
    x = jnp.ones(n)
    report = dn.conditions(node, node.solve(x), (x,))
    assert not report.exact
    np.testing.assert_allclose(float(report.sigma_max), 1e3, rtol=1e-3)
    np.testing.assert_allclose(float(report.sigma_min), 1.0, rtol=5e-2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_ill_conditioned_is_said(dtype):
    eps = float(jnp.finfo(dtype).eps)
    d = jnp.array([1.0, eps**0.75], dtype)
    node = dn.implicit(lambda y, x: d * y - x)(lambda x: x / d)
    report = dn.conditions(node, node.solve(d), (d,))
    assert "ill-conditioned" in report.verdict()


def test_under_jit_and_vmap():
    node = dn.Softmax()
    z = jnp.stack([jnp.arange(3.0), -jnp.arange(3.0)])
    reports = jax.jit(jax.vmap(lambda z: dn.conditions(node, node.solve(z), z)))(z)
    assert reports.condition.shape == (2,)
