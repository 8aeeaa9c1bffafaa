"""The jigsaw model, its rounding, and the script that trains it with either layer."""

import json

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from models.jigsaw import Jigsaw, JigsawConfig
from train.jigsaw import Config, assigned, cut, main, put_by_choice, shuffled
from train.loop.jigsaw_plots import together


def test_pieces_are_cut_and_put_together():
    images = np.arange(2 * 64, dtype=np.float32).reshape(2, 8, 8)
    for grid in (2, 4):
        pieces = cut(images, grid)
        assert pieces.shape == (2, grid**2, 64 // grid**2)
        np.testing.assert_array_equal([together(picture) for picture in pieces], images)
    np.testing.assert_array_equal(cut(images, 4)[0, 1], [2, 3, 10, 11])


def test_pieces_that_look_alike_fit_each_others_places():
    pieces = np.array([[[0.0], [1.0], [0.0], [2.0]]], np.float32)
    mixed, fits = shuffled(pieces, np.random.default_rng(0))
    np.testing.assert_array_equal(np.sort(mixed[0, :, 0]), [0, 0, 1, 2])
    np.testing.assert_array_equal(fits[0], mixed[0] == pieces[0, :, 0][None])
    exact = np.zeros((1, 4, 4))
    for i, place in enumerate(np.argsort(np.argsort(mixed[0, :, 0]))):
        exact[0, i, [0, 2, 1, 3][place]] = 1
    assert np.all(assigned(exact, fits))
    exact[0] = exact[0][:, [1, 0, 2, 3]]
    assert np.sum(assigned(exact, fits)) == 2


def test_a_place_is_taken_once():
    fits = np.stack([np.eye(3)] * 3)
    plans = np.array([np.eye(3), np.eye(3)[[1, 0, 2]], [[0.9, 0.1, 0], [0.6, 0.4, 0], [0, 0, 1]]])
    np.testing.assert_array_equal(put_by_choice(plans, fits), [True, False, False])
    np.testing.assert_array_equal(np.all(assigned(plans, fits), axis=1), [True, False, True])


@pytest.mark.parametrize("layer", ["transport", "softmax"])
def test_permuted_pieces_permute_the_plan(layer):
    model = Jigsaw(JigsawConfig(places=4, pixels=3, width=8, layer=layer), key=jr.key(0))
    pieces, order = jr.normal(jr.key(1), (4, 3), jnp.float32), jnp.array([2, 0, 3, 1])
    plan = model(pieces)
    np.testing.assert_allclose(model(pieces[order]), plan[order], atol=1e-6)
    np.testing.assert_allclose(jnp.sum(plan, axis=1), 1, atol=1e-5)
    if layer == "transport":
        np.testing.assert_allclose(jnp.sum(plan, axis=0), 1, atol=1e-4)


def test_a_run(tmp_path, capsys):
    options = "--layer transport --steps 2 --width 8 --batch-size 16 --no-tensorboard --log-every 1"
    main([*options.split(), "--out", str(tmp_path)])
    assert "transport" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "transport" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert {"test/pieces", "test/pictures", "test/by choice", "test/loss"} <= set(rows[-1])
    assert rows[-1]["solver/forward_failures"] == 0
    assert (tmp_path / "jigsaw.png").stat().st_size > 10000


@pytest.mark.parametrize(
    ("fields", "match"), [({"epsilon": 0.0}, "epsilon must be positive"), ({"grid": 3}, "grid must be 2 or 4")]
)
def test_misuse(fields, match):
    with pytest.raises(ValueError, match=match):
        Config(**fields)
