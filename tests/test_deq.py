"""The equilibrium network and its training script."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from models.deq import EquilibriumConfig, EquilibriumNetwork
from train.deq import Config, train


def test_the_equilibrium_is_the_limit_of_depth():
    image = jr.uniform(jr.key(0), (4, 4), jnp.float32)
    build = lambda **fields: EquilibriumNetwork(
        EquilibriumConfig(image=(4, 4), classes=3, width=12, **fields), key=jr.key(1)
    )
    model, deep = build(), build(depth=200)
    assert jnp.max(jnp.sum(jnp.abs(model.weight), axis=1)) <= 0.9 + 1e-6
    np.testing.assert_allclose(model(image), deep(image), rtol=1e-5, atol=1e-6)
    loss = lambda model: jnp.sum(jnp.cos(model(image)))
    exact, unrolled = (jax.tree.leaves(eqx.filter_jit(eqx.filter_grad(loss))(model)) for model in (model, deep))
    for left, right in zip(exact, unrolled, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-6)


def test_a_warm_started_run_goes_on_where_it_was_interrupted(tmp_path):
    run = lambda name, **fields: Config(
        out=tmp_path / name,
        warm_start=True,
        width=8,
        batch_size=1024,
        plots=False,
        tensorboard=False,
        save_every=2,
        **fields,
    )
    whole, _ = train(run("whole", steps=4))
    assert jnp.any(whole.carried != 0)
    # The learning rate's schedule knows the number of steps, so the interruption must be one: the newest checkpoint is taken away.
    train(run("halves", steps=4))
    lines = [json.loads(line) for line in (tmp_path / "halves" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    newest = tmp_path / "halves" / "checkpoints" / "4"
    assert newest.is_dir()
    newest.rename(tmp_path / "taken away")
    again, _ = train(run("halves", steps=4))
    leaves = lambda state: jax.tree.leaves(eqx.filter(state, eqx.is_array))
    for left, right in zip(leaves(whole), leaves(again), strict=True):
        left, right = (jr.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a for a in (left, right))
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"depth": 3, "warm_start": True}, "warm_start is for the equilibrium"),
        ({"contraction": 1.0}, "must lie in"),
        ({"depth": -1}, "depth"),
    ],
)
def test_wrong_settings_are_named(fields, match):
    with pytest.raises(ValueError, match=match):
        Config(**fields)
