"""Total variation as a quadratic program, the models built on it, and the signals they learn from."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from models.denoise import DenoiseConfig, DenoiseMLP, LearntVariation, differences, make, total_variation
from train.denoise import Config, make_signals


def taut_string(y: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The exact minimiser of 1/2 |y - z|^2 + sum_i w_i |z_(i+1) - z_i|: the slopes of the shortest path through a tube.

    The tube has half-width w_i around the running sum of y after i + 1 entries, and none at the ends (Davies & Kovac 2001).
    """
    n = len(y)
    total, half = np.concatenate([[0.0], np.cumsum(y)]), np.concatenate([[0.0], w, [0.0]])
    z, start, height = np.zeros(n), 0, 0.0
    while start < n:
        low, high, at_low, at_high = -np.inf, np.inf, start, start
        for k in range(start + 1, n + 1):
            least, most = (total[k] - half[k] - height) / (k - start), (total[k] + half[k] - height) / (k - start)
            if least > high:  # the path touches the upper wall, and bends there
                end, slope = at_high, high
                break
            if most < low:
                end, slope = at_low, low
                break
            low, at_low = max((low, at_low), (least, k))
            high, at_high = min((high, at_high), (most, k))
        else:
            end, slope = n, (total[n] - height) / (n - start)
        z[start:end] = slope
        height += slope * (end - start)
        start = end
    return z


# One shape for all of them, and so one compilation.
batched = jax.jit(jax.vmap(total_variation, in_axes=(0, None, None)))


def test_against_the_taut_string():
    noisy, _ = make_signals(4, 7)
    y = noisy.astype(np.float64) / 10
    D = differences(100, jnp.float64)
    for w in (np.full(99, 2.0), np.random.default_rng(0).uniform(0.2, 4.0, 99)):
        expected = np.array([taut_string(signal, w) for signal in y])
        np.testing.assert_allclose(batched(y, D, w), expected, atol=1e-10)
        assert np.any(np.abs(np.diff(expected)) < 1e-12)
        assert np.any(np.abs(np.diff(expected)) > 0.1)


@pytest.mark.full
def test_the_model_in_float32_is_total_variation_before_training(getkey):
    noisy, _ = make_signals(2, 8)
    expected = np.array([taut_string(signal, np.full(99, 20.0)) for signal in noisy.astype(np.float64)])
    model = make(DenoiseConfig(weight=20.0), key=getkey())
    z = eqx.filter_jit(lambda model, noisy: jax.vmap(model)(noisy))(model, jnp.asarray(noisy))
    assert z.dtype == jnp.float32
    # Signals reach 100: about 10 units in the last place.
    np.testing.assert_allclose(z, expected, atol=1e-4)


def test_any_operator_and_weights_give_the_minimum(getkey):
    D, y = jr.normal(getkey(), (99, 100)) / 10, jr.normal(getkey(), (4, 100))
    w = jr.uniform(getkey(), (99,), minval=0.05, maxval=0.8)
    for signal, z in zip(y, batched(y, D, w), strict=True):
        objective = lambda z, signal=signal: jnp.sum((signal - z) ** 2) / 2 + w @ jnp.abs(D @ z)
        assert 0 < np.sum(np.abs(D @ z) < 1e-9) < 99
        # Strongly convex: away from the minimum by d, the objective is larger by at least |d|^2 / 2.
        step = 1e-3 * jr.normal(getkey(), (100, 100))
        excess = jax.vmap(objective)(z[None] + step) - objective(z)
        assert np.all(excess >= jnp.sum(step**2, axis=1) / 2 - 1e-12)


@pytest.mark.full
def test_gradient_against_finite_differences(getkey):
    config = DenoiseConfig(length=14, filters=3, window=5, weight=8.0)
    model = make(config, key=getkey())
    # Somewhere in general position: no symmetry, no zero.
    perturb = lambda leaf: leaf.astype(jnp.float64) + 0.1 * jr.normal(getkey(), leaf.shape)
    model = jax.tree.map(lambda leaf: perturb(leaf) if eqx.is_inexact_array(leaf) else leaf, model)
    signals = 50 + 20 * jr.normal(getkey(), (3, 14))
    arrays, rest = eqx.partition((model, signals), eqx.is_inexact_array)

    def loss(arrays):
        model, signals = eqx.combine(arrays, rest)
        return jnp.mean(jnp.sin(jax.vmap(model)(signals) / 10))

    value_and_gradient = jax.jit(jax.value_and_grad(loss))  # one compilation serves both
    _, gradient = value_and_gradient(arrays)
    leaves, treedef = jax.tree.flatten(arrays)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(arrays)]
    assert any(".D" in name for name in names)
    for i, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
        direction = jr.normal(getkey(), leaf.shape)
        at = lambda t, i=i, leaf=leaf, direction=direction: value_and_gradient(
            treedef.unflatten([*leaves[:i], leaf + t * direction, *leaves[i + 1 :]])
        )[0]
        slope = (at(1e-5) - at(-1e-5)) / 2e-5
        product = jnp.vdot(jax.tree.leaves(gradient)[i], direction)
        assert abs(float(slope)) > 1e-6, name
        np.testing.assert_allclose(product, slope, rtol=1e-5, atol=1e-8, err_msg=name)


def test_the_signals_are_what_they_should_be():
    noisy, clean = make_signals(300, 0)
    assert noisy.shape == clean.shape == (300, 100)
    assert noisy.dtype == clean.dtype == np.float32
    segments = 1 + np.sum(np.diff(clean) != 0, axis=1)
    assert set(segments) == set(range(1, 10))
    assert clean.min() >= 10
    assert clean.max() <= 100
    assert abs(np.std(noisy - clean) - 10) < 0.2
    np.testing.assert_array_equal(make_signals(300, 0)[0], noisy)
    assert not np.array_equal(make_signals(300, 1)[0], noisy)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grid": (30.0, 12.0, 1.0)}, "grid"),
        ({"window": 4}, "odd"),
        ({"batch_size": 20, "signals": 10}, "at most the 10 signals"),
        ({"steps": 0}, "steps"),
    ],
)
def test_wrong_arguments_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)


def test_wrong_shapes_are_named(getkey):
    with pytest.raises(ValueError, match="use jax.vmap"):
        total_variation(jnp.ones((2, 5)), differences(5), jnp.ones(4))
    with pytest.raises(ValueError, match=r"weights \(m,\)"):
        total_variation(jnp.ones(5), differences(5), jnp.ones(5))
    with pytest.raises(ValueError, match="window must be odd"):
        make(DenoiseConfig(window=2), key=getkey())


@pytest.mark.slow
def test_a_few_steps_learn_and_draw(tmp_path):
    from train.denoise import train

    config = Config(
        steps=4,
        signals=40,
        held_out=8,
        batch_size=8,
        lr=3e-3,
        grid=(20.0, 21.0, 1.0),
        out=tmp_path,
        eval_every=4,
        save_every=4,
        tensorboard=False,
        devices=1,
    )
    state, result = train(config)
    assert isinstance(state.model, LearntVariation)
    assert np.any(np.asarray(state.model.D) != np.asarray(differences(100)))
    assert np.any(np.asarray(state.model.readout) != 0)
    assert {"test/mse", "validation/mse", "fixed/test", "fixed/test_lowest"} <= set(result)
    assert result["fixed/test_lowest"] <= result["fixed/test"]
    for name in ("signals.png", "operator.png", "weight.png", "metrics.jsonl"):
        assert (tmp_path / name).stat().st_size > 1_000


def test_the_network_trains(tmp_path):
    from train.denoise import train

    config = Config(
        model="mlp", steps=30, signals=100, held_out=20, batch_size=20, out=tmp_path, tensorboard=False, devices=1
    )
    state, result = train(config)
    assert isinstance(state.model, DenoiseMLP)
    assert result["test/mse"] < 3000  # the mean square of a signal, which an output of zero would give, is 3700
    assert "fixed/test" not in result
    assert (tmp_path / "signals.png").stat().st_size > 1_000
