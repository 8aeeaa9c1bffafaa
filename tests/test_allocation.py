"""The allocation model, its regret, and the script that trains it for predictions or for decisions."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from models.allocation import AllocationConfig, Allocator
from train.allocation import TRAIN, VALIDATION, Config, deal, draw, load


def make(getkey, hidden=0):
    """A model in float64, and features, values and costs of some groups of requests."""
    model = Allocator(AllocationConfig(hidden=hidden), key=getkey())
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.float64) if eqx.is_inexact_array(leaf) else leaf, model)
    features = jr.uniform(getkey(), (20, 8, 16))
    values = jr.randint(getkey(), (20, 8), 0, 10).astype(jnp.float64) / 9
    return model, features, values, jr.uniform(getkey(), (20, 8), minval=0.5, maxval=1.5)


@pytest.mark.parametrize("hidden", [0, 5])
def test_shapes_of_predictions_and_decisions(hidden, getkey):
    model = Allocator(AllocationConfig(hidden=hidden), key=getkey())
    features, costs = jr.uniform(getkey(), (8, 16), jnp.float32), jnp.ones(8, jnp.float32)
    for output in (jax.eval_shape(model.predict, features), jax.eval_shape(model, features, costs)):
        assert output.shape == (8,)
        assert output.dtype == jnp.float32


def test_decisions_are_feasible_and_true_values_give_the_best(getkey):
    model, features, values, costs = make(getkey)
    decide, worth = jax.jit(jax.vmap(model.decide)), jax.vmap(model.worth)
    budget = 0.15 * jnp.sum(costs, axis=1)
    best = worth(decide(values, costs), values)
    np.testing.assert_allclose(worth(decide(values.copy(), costs), values), best, atol=1e-12)
    wrong = values + jr.normal(getkey(), values.shape)
    for predicted in (wrong, jax.vmap(model.predict)(features), -wrong, jnp.zeros_like(wrong)):
        decision = decide(predicted, costs)
        assert np.all((decision >= -1e-9) & (decision <= 1 + 1e-9))
        assert np.all(jnp.sum(costs * decision, axis=1) <= budget + 1e-9)
        regret = best - worth(decision, values)
        assert np.all(regret > -1e-9)
        assert np.mean(regret) > 0.05
    # Nor is anything else that can be afforded worth more: equal shares, or one request as far as the budget goes.
    others = [jnp.full_like(values, 0.15)]
    others += [jnp.zeros_like(values).at[:, i].set(jnp.minimum(1, budget / costs[:, i])) for i in range(8)]
    assert all(np.all(best >= worth(other, values) - 1e-9) for other in others)


def test_the_gradient_of_regret_reaches_the_predictor(getkey):
    model, features, values, costs = make(getkey)

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(model):
        return -jnp.mean(jax.vmap(model.worth)(jax.vmap(model)(features, costs), values))

    gradient = loss(model)[1].predictor.weight
    assert np.all(np.isfinite(gradient))
    i, weight, step = int(jnp.argmax(jnp.abs(gradient[0]))), model.predictor.weight, 1e-6
    up, down = (
        loss(eqx.tree_at(lambda m: m.predictor.weight, model, weight.at[0, i].add(s)))[0] for s in (step, -step)
    )
    assert abs(gradient[0, i]) > 1e-3
    np.testing.assert_allclose(gradient[0, i], (up - down) / (2 * step), rtol=1e-5)


def test_the_parts_share_no_image_and_the_test_groups_neither():
    parts = load(4, split=0)
    counts = {name: len(values) for name, (_, values) in parts.items()}
    assert counts == {"train": TRAIN, "validation": VALIDATION, "test": 1797 - TRAIN - VALIDATION}
    index = np.arange(100)
    part = (index[:, None].astype(np.float32), index.astype(np.float32))
    _, values, costs = deal(part, 12, 0.2, 1, seed=0)
    assert values.shape == costs.shape == (8, 12)
    assert len(np.unique(values)) == 96
    batch = draw(part, 12, 0.2, 5, seed=3)
    for features, values, _ in (batch(7), batch(8)):
        assert all(len(np.unique(row)) == 12 for row in values)
        np.testing.assert_array_equal(features[..., 0], values)
    np.testing.assert_array_equal(batch(7)[1], batch(7)[1])
    assert not np.array_equal(batch(7)[1], batch(8)[1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": "mse"}, "two-stage or decision"),
        ({"resolution": 3}, "2, 4 or 8"),
        ({"requests": 1}, "between 2 and the 250"),
        ({"budget": 1.5}, "between 0 and 1"),
        ({"spread": 1.0}, "costs are positive"),
        ({"diminishing": 0.0}, "linear program"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"split": -1}, "split must not be negative"),
        ({"hidden": -1}, "hidden must not be negative"),
    ],
)
def test_wrong_arguments_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)
    if fields.keys() <= {"budget", "diminishing", "hidden"}:
        with pytest.raises(ValueError, match=next(iter(fields))):
            AllocationConfig(**fields)


@pytest.mark.slow
def test_a_few_steps_train_both_and_draw(tmp_path):
    from train.allocation import train

    config = Config(steps=4, requests=6, batch_size=8, out=tmp_path, eval_every=2, tensorboard=False, devices=1)
    test = train(config)
    groups = (1797 - TRAIN - VALIDATION) // 6
    assert {name: regret.shape for name, regret in test.items()} == {"two-stage": (groups,), "decision": (groups,)}
    assert all(np.all(regret > -1e-3) for regret in test.values())  # float32
    assert (tmp_path / "allocation.png").stat().st_size > 10_000
    for name in test:
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert {"test/regret", "validation/regret", "test/mse"} <= set(rows[-1])
        np.testing.assert_allclose(rows[-1]["test/regret"], np.mean(test[name]), rtol=1e-6)
        assert all(row["solver/backward_failures"] == 0 for row in rows)
