"""The models and scripts of variational inference: closed forms that a trained model must reach, and short runs."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.optimize
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_wine

import declarative as dn
from models import mean_field, oracle, vae

SHORT: dict[str, Any] = dict(
    steps=20, batch_size=32, log_every=10, eval_every=20, save_every=20, tensorboard=False, devices=1
)


@pytest.mark.parametrize(
    "gamma",
    [
        pytest.param(0.32, marks=pytest.mark.full),
        0.8,
        pytest.param(2.0, marks=pytest.mark.slow),
        pytest.param(5.0, marks=pytest.mark.full),
    ],
)
def test_an_affine_decoder_is_probabilistic_pca(gamma):
    # Dai et al. 2019: no spurious minima, and the latent variables in use are the eigenvalues above gamma, exactly.
    rows = load_wine().data  # pyright: ignore[reportAttributeAccessIssue]  (a Bunch)
    rows = (rows - rows.mean(0)) / rows.std(0)
    latent = 8
    values = np.linalg.eigvalsh(np.cov(rows.T, bias=True))
    assert np.min(np.abs(values / gamma - 1)) > 0.05
    best, expected = vae.pca_log_likelihood(rows, latent, gamma)
    assert expected == min(latent, np.sum(values > gamma))

    start = dn.GaussianParameters(jnp.zeros(latent), jnp.zeros(latent))
    vector, unravel = ravel_pytree((0.3 * jr.normal(jr.key(0), (13, latent)), jnp.zeros(13)))

    def inference(vector):
        weight, bias = unravel(vector)
        return dn.ELBOOptimizer(vae.AffineELBO(weight, bias, gamma), "svi", throw=False)

    @jax.jit
    def loss(vector):
        return jax.value_and_grad(
            lambda vector: jnp.mean(jax.vmap(lambda x: inference(vector)(x, start).loss)(jnp.asarray(rows)))
        )(vector)

    found = scipy.optimize.minimize(
        lambda vector: tuple(map(np.asarray, loss(vector))), vector, jac=True, method="L-BFGS-B",
        options={"maxiter": 500, "gtol": 1e-7, "ftol": 1e-13},
    )  # fmt: skip
    assert abs(best + found.fun) < 1e-3  # nats an example
    posterior = jax.vmap(lambda x: inference(jnp.asarray(found.x))(x, start).parameters)(jnp.asarray(rows))
    assert np.sum(np.var(np.asarray(posterior.mean), axis=0) > 0.01) == expected


def test_the_oracle_knows_its_evidence():
    config = oracle.OracleConfig(length=2, vocabulary=4, state=6)
    decoder = oracle.make_oracle(config, key=jr.key(0))
    every = jnp.stack(jnp.meshgrid(jnp.arange(4), jnp.arange(4)), axis=-1).reshape(-1, 2).astype(jnp.int32)
    evidence = jax.jit(jax.vmap(decoder.log_evidence))(every)
    np.testing.assert_allclose(jnp.sum(jnp.exp(evidence)), 1, atol=1e-5)
    drawn = jax.jit(jax.vmap(lambda key: decoder.sample(2, key=key)))(jr.split(jr.key(1), 20_000))
    share = jnp.mean(jnp.all(drawn[:, None] == every[None], axis=-1), axis=0)
    np.testing.assert_allclose(share, jnp.exp(evidence), atol=0.02)


def test_quadrature_is_an_expectation():
    decoder = oracle.make_oracle(oracle.OracleConfig(sharpness=1.0), key=jr.key(0))
    tokens = jnp.array([1, 3, 0, 7, 2], jnp.int32)
    parameters = dn.GaussianParameters(jnp.array([0.3, -0.5], jnp.float32), jnp.array([-0.5, -0.2], jnp.float32))
    sampled = dn.ELBO(lambda z, x: decoder(z, x), dn.DiagonalGaussian(), samples=20_000)(parameters, tokens, jr.key(0))
    assert abs(oracle.QuadratureELBO(decoder)(parameters, tokens) - sampled) < 0.02


def random_isings(n: int, count: int, strength: float) -> mean_field.Ising:
    first, second = jr.split(jr.key(n))
    W = strength * jr.normal(first, (count, n, n)) / n**0.5
    W = jnp.triu(W, 1)
    return mean_field.Ising(strength * jr.normal(second, (count, n)), W + W.mT)


@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.full), 5, pytest.param(12, marks=pytest.mark.slow)])
def test_mean_field_bounds_the_partition_function(n):
    gaps = []
    for strength in (0.0, 0.3, 1.0, 3.0):
        models = random_isings(n, 40, strength)
        mu = jax.jit(jax.vmap(mean_field.MeanField()))(models)
        gap = jax.vmap(lambda m, mu: m.log_partition() - m.bound(mu))(models, mu)
        assert jnp.all(gap > -1e-10)
        gaps.append(float(jnp.mean(gap)))
    assert gaps[0] < 1e-12
    if n == 1:
        assert max(gaps) < 1e-12  # nothing to be coupled to
    else:
        assert gaps == sorted(gaps)


def test_sensitivities_of_marginals():
    field = mean_field.MeanField()
    models = random_isings(8, 30, 1.5)

    @jax.jit
    @jax.vmap
    def sensitivity(model):
        mu = field(model)
        at = lambda theta: field(mean_field.Ising(theta, model.W), mu)
        closed = jnp.diag(1 / (mu * (1 - mu))) - model.W
        jacobian = (mu * (1 - mu))[:, None] * model.W
        eye = jnp.eye(8)
        near = lambda size: jax.vmap(lambda d: at(model.theta + size * d))(eye)
        differences = (8 * (near(1e-3) - near(-1e-3)) - near(2e-3) + near(-2e-3)) / 12e-3
        bound = jax.grad(lambda theta: mean_field.optimal_bound(mean_field.Ising(theta, model.W), mu))(model.theta)
        return (
            jax.jacobian(at)(model.theta),
            jnp.linalg.inv(closed),
            differences.T,
            jnp.linalg.cond(eye - jacobian),
            bound - mu,
        )

    implicit, closed, differences, condition, envelope = sensitivity(models)
    regular = condition <= 1e4
    assert jnp.sum(regular) > 20
    np.testing.assert_allclose(implicit[regular], closed[regular], atol=1e-8)
    np.testing.assert_allclose(implicit[regular], differences[regular], atol=1e-7)
    np.testing.assert_allclose(envelope, 0, atol=1e-12)


def test_the_condition_grows_towards_the_phase_transition():
    # A uniform ferromagnet without field is critical where the largest eigenvalue of W is 4.
    n, sizes = 6, []
    for share in (0.5, 0.9, 0.99):
        W = share * 4 / (n - 1) * (jnp.ones((n, n)) - jnp.eye(n))
        model = mean_field.Ising(-jnp.sum(W, axis=1) / 2, W)
        mu = mean_field.MeanField()(model)
        np.testing.assert_allclose(mu, 0.5, atol=1e-12)
        slope = jax.jacobian(lambda theta, W=W: mean_field.MeanField()(mean_field.Ising(theta, W)))(model.theta)
        sizes.append(float(jnp.linalg.norm(slope, 2)))
    np.testing.assert_allclose(sizes, [0.25 / (1 - share) for share in (0.5, 0.9, 0.99)], rtol=1e-6)


@pytest.mark.slow
def test_short_runs(tmp_path):
    import train.savi_oracle
    import train.vae

    config = train.savi_oracle.Config(inner_steps=3, rows=64, hidden=8, out=tmp_path / "oracle", plots=False, **SHORT)
    _, gaps = train.savi_oracle.train(config)
    assert gaps["start"] > gaps["refined"] > gaps["optimal"] > 0
    _, result = train.vae.train(
        train.vae.Config(latent=2, hidden=8, inner_steps=3, rho_end=0.1, out=tmp_path / "vae", **SHORT)
    )
    assert result["elbo"] < result["refined"] < result["log_likelihood"]
    for name in ("reconstructions", "samples", "latent"):
        assert (tmp_path / "vae" / f"{name}.png").stat().st_size > 10_000


def test_wrong_arguments_are_named():
    import train.savi_oracle
    import train.vae

    wrong: list[tuple[Any, dict[str, Any]]] = [
        (train.savi_oracle.Config, {"rho": 0.0}),
        (train.savi_oracle.Config, {"inner_lr": -1.0}),
        (train.savi_oracle.Config, {"inner_steps": 0}),
        (train.vae.Config, {"gamma": 0.0}),
        (train.vae.Config, {"rho_end": 0.0}),
        (train.vae.Config, {"floor": 0.0}),
        (train.vae.Config, {"inner_momentum": 1.0}),
    ]
    for make, fields in wrong:
        with pytest.raises(ValueError, match=next(iter(fields))):
            make(**fields)
