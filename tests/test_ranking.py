"""The ranking model, its losses, and the script that compares them."""

import json

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from models.ranking import Ranker, RankerConfig, pairwise_loss, spearman_loss
from train.ranking import LOSSES, Config, deal, main, spearman


def test_the_loss_is_one_minus_the_correlation_and_has_a_gradient():
    scores = jnp.array([0.3, 2.0, -1.0, 0.9, 0.5])
    ranks = jnp.array([2.0, 4.0, 1.0, 5.0, 3.0])
    loss = jax.jit(jax.value_and_grad(spearman_loss))
    value, gradient = loss(scores, ranks, jnp.array(1e-3))
    np.testing.assert_allclose(value, 1 - spearman(np.asarray(scores), np.asarray(ranks)), atol=1e-12)
    assert not np.any(gradient)  # alone in their blocks
    # A large strength: a squared error of centred scores, as the docstring has it.
    centred = 6 / 24 * np.mean((3 + (scores - scores.mean()) / 50 - ranks) ** 2)
    np.testing.assert_allclose(loss(scores, ranks, jnp.array(50.0))[0], centred, rtol=1e-12)
    value, gradient = loss(scores, ranks, jnp.array(1.0))
    assert gradient[3] < 0 < gradient[1]  # these two change places
    assert loss(scores - 0.1 * gradient / jnp.max(jnp.abs(gradient)), ranks, jnp.array(1.0))[0] < value
    assert pairwise_loss(10 * ranks, ranks) < 1e-3 < pairwise_loss(-ranks, ranks)


def test_clinics_share_no_patient_and_report_orders():
    config = Config(splits=1)
    parts = deal(config, 0)
    rows = np.concatenate([part["features"].reshape(-1, 10) for part in parts.values()])
    assert len(np.unique(rows, axis=0)) == len(rows) == 442
    clinics = parts["train"]
    assert clinics["ranks"].shape == (20, 10)
    assert np.all(spearman(clinics["grades"], clinics["ranks"]) > 1 - 1e-6)
    assert np.all(spearman(clinics["truth"], clinics["ranks"]) > 1 - 1e-6)
    # Specialised: the clinics' means spread more than those of ten patients at random.
    spread = lambda specialised: deal(Config(specialised=specialised), 0)["train"]["truth"].mean(1).std()
    assert spread(0.7) > 2 * spread(0.0)


@pytest.mark.parametrize("hidden", [0, 4])
def test_shapes(hidden):
    model = Ranker(RankerConfig(hidden=hidden), key=jr.key(0))
    scores = jax.eval_shape(model, jnp.zeros((7, 10), jnp.float32))
    assert (scores.shape, scores.dtype) == ((7,), jnp.float32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patients": 1}, "patients must be at least 2"),
        ({"clinics": 60}, "40 patients are left"),
        ({"specialised": 1.5}, "between 0 and 1"),
        ({"hidden": -1}, "hidden must not be negative"),
        ({"strength": 0.0}, "strength must be positive"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"splits": 0}, "splits must be at least 1"),
    ],
)
def test_wrong_settings_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)


def test_a_few_steps_from_the_command_line(tmp_path, capsys):
    options = "--steps 2 --splits 1 --patients 4 --clinics 6 --no-plots --no-tensorboard --devices 1"
    main([*options.split(), "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert all(name in shown for name in LOSSES)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert {f"test/{name}" for name in LOSSES} <= set(last)
    assert all(-1 <= last[f"test/{name}"] <= 1 for name in LOSSES)
