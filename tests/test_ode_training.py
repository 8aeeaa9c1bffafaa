"""The models that are differential equations, their data, and their training scripts."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest

from models import flow, latent_ode, neural_ode
from train.loop.data import digits_pca, eeg, oscillations, plane


def stirred(size: int, steps: int = 40) -> flow.Flow:
    """A flow that is not the identity."""
    model = flow.make(flow.FlowConfig(size, hidden=16, steps=steps), key=jr.key(0))
    weight = 0.5 * jr.normal(jr.key(1), (size, 16), jnp.float32)
    return eqx.tree_at(lambda model: model.mlp.layers[-1].weight, model, weight)


# Neural ODE


def test_every_adjoint_gives_the_gradient_of_its_solver(getkey):
    images = jr.normal(getkey(), (3, 8, 8), jnp.float32)

    def gradient(adjoint):
        config = neural_ode.NeuralODEConfig(width=6, augment=2, hidden=8, steps=12, adjoint=adjoint)
        model = neural_ode.make(config, key=jr.key(0))
        loss = lambda model: jnp.sum(jax.vmap(model)(images) ** 2)
        value, gradient = eqx.filter_jit(eqx.filter_value_and_grad(loss))(model)
        leaves = [np.ravel(leaf) for leaf in jtu.tree_leaves(gradient)]
        return value, np.concatenate(leaves)

    value, reference = gradient("stored")
    size = np.abs(reference).max()
    for adjoint, apart in (("reversible", 1e-5), ("checkpointed", 1e-5), ("coupled", 2e-2), ("backsolve", 2e-2)):
        again, other = gradient(adjoint)
        np.testing.assert_allclose(again, value, rtol=1e-2)
        np.testing.assert_allclose(other, reference, atol=apart * size, rtol=0)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"adjoint must be one of reversible.*'symplectic'"):
        neural_ode.make(neural_ode.NeuralODEConfig(adjoint="symplectic"), key=jr.key(0))  # pyright: ignore[reportArgumentType]  (wrong on purpose, or a parameter of the test)
    with pytest.raises(ValueError, match="adjoint must be reversible or checkpointed"):
        flow.make(flow.FlowConfig(adjoint="direct"), key=jr.key(0))  # pyright: ignore[reportArgumentType]  (wrong on purpose, or a parameter of the test)
    with pytest.raises(ValueError, match="model must be latent_ode or gru"):
        latent_ode.make(latent_ode.LatentODEConfig(model="lstm"), key=jr.key(0))  # pyright: ignore[reportArgumentType]  (wrong on purpose, or a parameter of the test)


# Flow


def test_an_untrained_flow_is_the_base_density(getkey):
    model = flow.make(flow.FlowConfig(3, hidden=8, steps=5), key=getkey())
    x = jr.normal(getkey(), (3,), jnp.float32)
    expected = -0.5 * float(jnp.sum(x**2)) - 1.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(model.log_density(x), expected, rtol=1e-6)


def test_the_density_of_a_flow_integrates_to_one():
    line = np.linspace(-7, 7, 71, dtype=np.float32)
    points = np.stack([a.ravel() for a in np.meshgrid(line, line)], 1)
    density = jnp.exp(eqx.filter_jit(eqx.filter_vmap(stirred(2).log_density))(jnp.asarray(points)))
    assert float(density.max()) != pytest.approx(1 / (2 * np.pi), rel=0.05)
    assert float(density.sum()) * float(line[1] - line[0]) ** 2 == pytest.approx(1, abs=2e-3)


def test_a_flow_is_inverted_and_its_divergence_is_the_log_determinant(getkey):
    model = stirred(3)
    x = jr.normal(getkey(), (3,), jnp.float32)

    @eqx.filter_jit
    def both(model, x):
        z, divergence = model.forward(x)
        return model.inverse(z), divergence

    again, divergence = both(model, x)
    np.testing.assert_allclose(again, x, atol=1e-4)
    small = 1e-2 * jnp.eye(3, dtype=jnp.float32)
    ends = eqx.filter_jit(eqx.filter_vmap(lambda x: model.forward(x)[0]))(
        jnp.concatenate([x[None] + small, x[None] - small])
    )
    jacobian = np.asarray(ends[:3] - ends[3:], np.float64) / 2e-2
    np.testing.assert_allclose(divergence, np.linalg.slogdet(jacobian)[1], atol=5e-3)


def test_hutchinsons_estimate_is_unbiased(getkey):
    model = stirred(2, steps=10)
    x = jr.normal(getkey(), (2,), jnp.float32)
    # Over all sign vectors of the plane the mean is exact.
    signs = jnp.array([[1, 1], [1, -1], [-1, 1], [-1, -1]], jnp.float32)
    estimates = eqx.filter_jit(eqx.filter_vmap(lambda noise: model.forward(x, noise)[1]))(signs)
    np.testing.assert_allclose(estimates.mean(), model.forward(x)[1], atol=1e-5)
    assert float(jnp.ptp(estimates)) > 1e-3


# Latent ODE


@pytest.mark.parametrize("name", ["latent_ode", "gru"])
def test_what_is_hidden_is_not_seen(name, getkey):
    config = latent_ode.LatentODEConfig(name, 2, latent=4, hidden=8, steps=8)  # pyright: ignore[reportArgumentType]  (wrong on purpose, or a parameter of the test)
    model = latent_ode.make(config, key=getkey())
    times = jnp.sort(jr.uniform(getkey(), (9,), jnp.float32))
    values = jr.normal(getkey(), (9, 2), jnp.float32)
    mask = jnp.ones((9, 2), jnp.float32).at[jnp.array([2, 5]), :].set(0).at[3, 1].set(0)
    call = eqx.filter_jit(lambda model, *series: model(*series))
    predictions, divergence = call(model, times, values, mask)
    assert predictions.shape == (9, 2)
    assert divergence.shape == ()
    assert float(divergence) >= 0
    other, _ = call(model, times, jnp.where(mask > 0, values, 7), mask)
    np.testing.assert_array_equal(other, predictions)
    changed, _ = call(model, times, values.at[4, 0].add(1), mask)
    assert float(jnp.abs(changed - predictions)[2:].max()) > 1e-4
    if name == "gru":  # the value at a time does not predict itself
        np.testing.assert_array_equal(changed[4], predictions[4])
    # A time at which nothing is seen may be taken away.
    kept = np.delete(np.arange(9), 5)
    fewer, _ = call(model, times[kept], values[kept], mask[kept])
    np.testing.assert_allclose(fewer, predictions[kept], atol=1e-5)


# Data


def test_generated_data_and_masks():
    for name in ("moons", "pinwheel"):
        points = plane(name, 50, 0)
        assert points.shape == (50, 2)
        assert points.dtype == np.float32
        np.testing.assert_array_equal(points, plane(name, 50, 0))
    with pytest.raises(ValueError, match="moons and pinwheel, not 'rings'"):
        plane("rings", 5, 0)
    times, values, mask = oscillations(20, 30, 0, end=0.5)
    assert (np.diff(times) >= 0).all()
    assert values.shape == mask.shape == (20, 30, 1)
    assert not mask[times >= 0.5].any()
    assert mask.any()
    train, test = eeg(40, 0)
    assert train[1].shape == (561, 40, 4)
    assert test[1].shape == (21, 40, 4)
    assert all(part.dtype == np.float32 for part in (*train, *test))
    with pytest.raises(ValueError, match="between 4 and 200"):
        eeg(300, 0)


def test_components_of_digits_are_scaled_on_the_training_part():
    train, test, to_images = digits_pca(5)
    np.testing.assert_allclose(train.std(0), 1, atol=1e-2)
    assert len(train) + len(test) == 1797
    assert to_images(test[:2]).shape == (2, 8, 8)
    with pytest.raises(ValueError, match="between 1 and 61"):
        digits_pca(64)


# Scripts

# Little enough to run in seconds.
SHORT: dict[str, Any] = dict(steps=4, batch_size=32, eval_every=4, save_every=4, tensorboard=False, devices=1)


def test_wrong_arguments_are_named():
    import train.flow
    import train.latent_ode
    import train.ode_digits

    wrong: list[tuple[Any, dict[str, Any]]] = [
        (train.ode_digits.Config, {"augment": -1}),
        (train.flow.Config, {"solver_steps": 0}),
        (train.latent_ode.Config, {"noise": 0.0}),
        (train.latent_ode.Config, {"length": 3}),
    ]
    for make, fields in wrong:
        with pytest.raises(ValueError, match=next(iter(fields))):
            make(**fields)


@pytest.mark.slow
def test_a_short_run_of_the_latent_ode(tmp_path):
    from train.latent_ode import Config, train

    _, result = train(Config(rows=64, length=12, latent=4, hidden=8, solver_steps=8, out=tmp_path, **SHORT))
    assert all(np.isfinite(value) for value in result["latent_ode"])
    assert (tmp_path / "series.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_other_scripts_run_and_draw(tmp_path, monkeypatch):
    import train.flow
    import train.ode_digits

    monkeypatch.setattr(train.ode_digits, "STEPS", (4, 16))
    # Each is a compilation; the gradients of all of them are compared above.
    monkeypatch.setattr(train.ode_digits, "ADJOINTS", ("reversible", "coupled", "stored"))
    short: dict[str, Any] = SHORT | {"steps": 60}
    _, result = train.ode_digits.train(train.ode_digits.Config(solver_steps=8, out=tmp_path / "digits", **short))
    assert result["test/accuracy"] > 0.5
    assert (tmp_path / "digits" / "costs.png").stat().st_size > 10_000
    _, result = train.flow.train(train.flow.Config(hidden=16, solver_steps=8, out=tmp_path / "moons", **short))
    assert result["integral"] == pytest.approx(1, abs=0.02)
    assert result["flow"] > -3.5
    config = train.flow.Config("digits", 4, "hutchinson", hidden=16, solver_steps=8, out=tmp_path / "pca", **short)
    train.flow.train(config)
    assert (tmp_path / "pca" / "samples.png").stat().st_size > 10_000
