"""The structured autoencoder: its exponential family against closed forms, mean field, and the gradient through it."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
import scipy.special
import scipy.stats
from jax.flatten_util import ravel_pytree

from models import svae
from train.loop.data import pinwheel

ROWS = pinwheel(np.arange(40) % 5, np.random.default_rng(0))


def double(tree):
    return jtu.tree_map(lambda leaf: leaf.astype(jnp.float64) if eqx.is_inexact_array(leaf) else leaf, tree)


def mixture(K=3, D=2, seed=0) -> svae.Mixture:
    keys = jr.split(jr.key(seed), 5)
    m, root = jr.normal(keys[0], (K, D)), jr.normal(keys[1], (K, D, D))
    kappa, nu = jr.uniform(keys[2], (K,), minval=0.5, maxval=5), D - 1 + jr.uniform(keys[3], (K,), minval=0.3, maxval=9)
    J = root @ root.mT + jnp.eye(D)[None] + kappa[:, None, None] * m[:, :, None] * m[:, None]
    return svae.Mixture(jr.uniform(keys[4], (K,), minval=0.1, maxval=9), kappa[:, None] * m, J, kappa, nu)


@pytest.mark.parametrize("D", [1, 3])
def test_expected_statistics(D):
    eta = mixture(D=D)
    found, S, m = svae.expected(eta), eta.scale(), eta.h / eta.kappa[:, None]
    precision = eta.nu[:, None, None] * jnp.linalg.inv(S)
    order = np.arange(D)
    logdet = (
        scipy.special.digamma((np.asarray(eta.nu)[:, None] - order) / 2).sum(1)
        + D * np.log(2)
        - jnp.linalg.slogdet(S)[1]
    )
    quadratic = D / eta.kappa + jnp.einsum("ki,kij,kj->k", m, precision, m)
    alpha = np.asarray(eta.alpha)
    np.testing.assert_allclose(
        found.alpha, scipy.special.digamma(alpha) - scipy.special.digamma(alpha.sum()), rtol=1e-12
    )
    np.testing.assert_allclose(found.J, -precision / 2, rtol=1e-9)
    np.testing.assert_allclose(found.h, jnp.einsum("kij,kj->ki", precision, m), rtol=1e-9)
    np.testing.assert_allclose(found.kappa, -quadratic / 2, rtol=1e-9)
    np.testing.assert_allclose(found.nu, logdet / 2, rtol=1e-9)
    assert jnp.all(eta.proper() > 0)
    broken = eqx.tree_at(lambda eta: eta.nu, eta, eta.nu.at[1].set(D - 1.5))
    np.testing.assert_array_equal(broken.proper() > 0, [True, False, True])


def test_divergence_against_samples():
    # One component, so that the Dirichlet part is zero.
    q, p = (
        eqx.tree_at(lambda eta: eta.nu, mixture(K=1, seed=seed), jnp.array([nu])) for seed, nu in ((1, 9.0), (2, 7.0))
    )
    rng = np.random.default_rng(0)

    def parts(eta):
        return (
            np.asarray(eta.h / eta.kappa[:, None])[0],
            float(eta.kappa[0]),
            np.asarray(eta.scale())[0],
            float(eta.nu[0]),
        )

    m, kappa, S, nu = parts(q)
    precision = scipy.stats.wishart(nu, np.linalg.inv(S)).rvs(20_000, random_state=rng)
    root = np.linalg.cholesky(np.linalg.inv(precision) / kappa)
    mu = m + np.einsum("nij,nj->ni", root, rng.standard_normal((len(precision), 2)))

    def log_density(eta):
        m, kappa, S, nu = parts(eta)
        distance = np.einsum("ni,nij,nj->n", mu - m, precision, mu - m)
        normal = np.linalg.slogdet(precision)[1] / 2 + np.log(kappa / (2 * np.pi)) - kappa * distance / 2
        return normal + scipy.stats.wishart(nu, np.linalg.inv(S)).logpdf(precision.transpose(1, 2, 0))

    ratio = log_density(q) - log_density(p)
    error = np.std(ratio) / np.sqrt(ratio.size)
    assert error < 0.01 * np.mean(ratio)
    assert abs(svae.divergence(q, p) - np.mean(ratio)) < 4 * error
    np.testing.assert_allclose(svae.divergence(q, q), 0, atol=1e-12)


def test_gradients_of_a_mixture_are_natural():
    eta, prior = mixture(), mixture(seed=3)
    vector, unravel = ravel_pytree(eta)

    def plainly(vector):
        eta = unravel(vector)
        pairs = jtu.tree_map(lambda a, b, t: jnp.sum((a - b) * t), eta, prior, jax.grad(svae.log_partition)(eta))
        return sum(jtu.tree_leaves(pairs)) - svae.log_partition(eta) + svae.log_partition(prior)

    np.testing.assert_allclose(svae.divergence(eta, prior), plainly(vector), rtol=1e-12)
    natural = ravel_pytree(jax.grad(svae.divergence)(eta, prior))[0]
    fisher = jax.hessian(lambda vector: svae.log_partition(unravel(vector)))(vector)
    np.testing.assert_allclose(fisher @ natural, jax.grad(plainly)(vector), rtol=1e-7, atol=1e-9)


def test_a_whole_natural_step_is_coordinate_ascent():
    eta, prior = mixture(), mixture(seed=3)
    keys = jr.split(jr.key(5), 3)
    r, mean = jax.nn.softmax(jr.normal(keys[0], (7, 3))), jr.normal(keys[1], (7, 2))
    root = jr.normal(keys[2], (7, 2, 2))
    covariance = root @ root.mT

    def total(eta):
        joint = jax.vmap(lambda mean, covariance: svae.log_joint(mean, covariance, svae.expected(eta)))(
            mean, covariance
        )
        return svae.divergence(eta, prior) - jnp.sum(r * joint)

    after = jtu.tree_map(jnp.subtract, eta, jax.grad(total)(eta))
    second = covariance + mean[:, :, None] * mean[:, None]
    counts = jnp.sum(r, axis=0)
    np.testing.assert_allclose(after.alpha, prior.alpha + counts, rtol=1e-12)
    np.testing.assert_allclose(after.h, prior.h + r.T @ mean, atol=1e-12)
    np.testing.assert_allclose(after.J, prior.J + jnp.einsum("nk,nij->kij", r, second), atol=1e-12)
    np.testing.assert_allclose(after.kappa, prior.kappa + counts, rtol=1e-12)
    np.testing.assert_allclose(after.nu, prior.nu + counts, rtol=1e-12)


def test_no_sweep_lowers_the_surrogate():
    statistics = svae.expected(mixture(K=4))
    potential = svae.Potential(jnp.array([0.3, -0.2]), jnp.array([-1.0, 0.2]))

    def surrogate(r):
        mean, covariance = svae.posterior(r, statistics, potential)
        factor = -jnp.sum(potential.J * ((mean - potential.location) ** 2 + jnp.diag(covariance))) / 2
        entropy = jnp.linalg.slogdet(covariance)[1] / 2
        return factor + entropy + jax.nn.logsumexp(svae.log_joint(mean, covariance, statistics))

    r = jnp.array([0.97, 0.01, 0.01, 0.01])
    values = []
    for _ in range(30):
        values.append(float(surrogate(r)))
        r = svae.sweep(r, (statistics, potential))
    assert np.all(np.diff(values) > -1e-13)
    assert values[-1] > values[0] + 1e-3
    found = svae.responsibilities((statistics, potential), jnp.full(4, 0.25), "implicit")
    slope = jax.grad(surrogate)(found)
    np.testing.assert_allclose(slope, jnp.mean(slope), atol=1e-9)  # constant on the simplex


@pytest.fixture(scope="module")
def slopes():
    """For fresh weights, where labels are undecided: the gradient of the bound by every route, in one vector for each part."""
    model = svae.make(svae.SVAEConfig(reach=2.0), key=jr.key(0))

    @eqx.filter_jit
    def slope(model, rows, gradient):
        def bound(model):
            one = lambda x, key: model.elbo(model.recognise(x), x, 4, gradient, key=key)[0]
            return jnp.mean(jax.vmap(one)(rows, jr.split(jr.key(1), len(rows)))) - model.shared() / 40

        found = eqx.filter_grad(bound)(model)
        return {
            name: ravel_pytree(eqx.filter(getattr(found, name), eqx.is_array))[0]
            for name in ("mixture", "encoder", "decoder")
        }

    return lambda cast: {
        name: slope(cast(model), cast(jnp.asarray(ROWS)), name) for name in ("unrolled", "implicit", "one-step", "none")
    }


def cosine(a, b):
    return float(a @ b / jnp.linalg.norm(a) / jnp.linalg.norm(b))


@pytest.mark.parametrize(
    ("cast", "tol"),
    [
        pytest.param(double, 1e-8, id="float64", marks=pytest.mark.full),
        pytest.param(lambda tree: tree, 1e-3, id="float32", marks=pytest.mark.full),
    ],
)
def test_the_gradient_is_that_of_a_hundred_sweeps(slopes, cast, tol):
    found = slopes(cast)
    for part in ("mixture", "encoder"):
        exact = found["unrolled"][part]
        assert cosine(found["implicit"][part], exact) > 0.999
        assert jnp.linalg.norm(found["implicit"][part] - exact) < tol * jnp.linalg.norm(exact)
        for biased in ("one-step", "none"):
            assert jnp.linalg.norm(found[biased][part] - exact) > 0.05 * jnp.linalg.norm(exact)
    # The decoder is behind all this: it has one gradient.
    np.testing.assert_allclose(found["none"]["decoder"], found["unrolled"]["decoder"], rtol=tol, atol=tol)


def test_a_standard_normal_prior():
    model = double(svae.make(svae.SVAEConfig(components=0), key=jr.key(0)))
    potential = svae.Potential(jnp.array([0.5, -2.0]), jnp.array([0.1, 1.0]))
    local = model.infer(potential)
    variance = 1 / (1 + potential.J)
    mean = variance * potential.h
    np.testing.assert_allclose(local.divergence, jnp.sum(mean**2 + variance - 1 - jnp.log(variance)) / 2, rtol=1e-12)
    np.testing.assert_allclose(local.r, [1.0])
    assert model.shared() == 0


@pytest.mark.slow
@pytest.mark.parametrize("components", [0, pytest.param(4, marks=pytest.mark.full)])
def test_a_short_run(tmp_path, components):
    from train.svae import Config, train

    options: dict[str, Any] = dict(
        steps=40, eval_every=20, save_every=20, samples=2, hidden=8, tensorboard=False, devices=1
    )
    state, result = train(Config(components=components, out=tmp_path, **options))
    assert (tmp_path / "svae.png").stat().st_size > 10_000
    assert np.isfinite(list(result.values())).all()
    assert result["train/elbo"] > -4  # about -9 before training
    if components:
        assert jnp.all(state.model.mixture.proper() > 0)
        assert result["error/encoder/implicit"] < 1e-3


def test_configurations_are_checked():
    from train.svae import Config

    wrong: dict[str, Any] = {"seed": -1, "components": -1, "natural_lr": 0.0, "lr": -1.0, "samples": 0}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            Config(**{name: value})
