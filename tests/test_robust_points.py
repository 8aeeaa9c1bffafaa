"""The PointNet with a choice of poolings, its data, and the script that trains it."""

# pyright: reportArgumentType=false

import json

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from models.pointnet import PointNet, PointNetConfig
from train.loop.data import sklearn_digits
from train.robust_points import SHARES, Config, draw_points, main


@pytest.mark.parametrize("pooling", ["max", "mean", "huber"])
def test_the_order_of_the_points_does_not_matter(pooling, getkey):
    model = PointNet(PointNetConfig(width=6, classes=3, pooling=pooling), key=getkey())
    points = jr.uniform(getkey(), (9, 2), jnp.float32)
    logits = model(points)
    assert logits.shape == (3,)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(model(points[::-1]), logits, rtol=1e-5, atol=1e-6)


def test_one_far_point_moves_the_maximum_and_not_the_robust_mean(getkey):
    points = jr.uniform(getkey(), (20, 2), jnp.float32)
    far, key, moved = points.at[0].set(jnp.array([40.0, -30.0], jnp.float32)), getkey(), {}
    for pooling in ("max", "mean", "huber"):
        model = PointNet(PointNetConfig(width=16, pooling=pooling, alpha=0.02), key=key)
        pooled = jax.vmap(lambda points, model=model: model.pool(model.features(points)))(jnp.stack([points, far]))
        moved[pooling] = float(jnp.max(jnp.abs(pooled[1] - pooled[0])))
    assert moved["huber"] < 0.1 * moved["mean"], moved
    assert moved["mean"] < moved["max"], moved


def test_points_are_drawn_from_the_ink_and_outliers_from_the_square():
    images = sklearn_digits()[0][0][:5]
    clean, half = (draw_points(images, 64, share, 0) for share in (0.0, 0.5))
    assert clean.shape == (5, 64, 2)
    on_ink = lambda sets: np.array(
        [image[tuple((8 * points).astype(int).T)] > 0 for image, points in zip(images, sets, strict=True)]
    )
    assert on_ink(clean).all()
    assert on_ink(half[:, 32:]).all()
    assert not on_ink(half[:, :32]).all()
    assert np.all((half >= 0) & (half <= 1))
    np.testing.assert_array_equal(draw_points(images, 64, 0.5, 0), half)


def test_a_short_run_writes_its_table_and_its_figure(tmp_path, capsys):
    run = "--candidates max huber:0.1 --steps 2 --width 4 --points 8 --batch-size 64 --out".split()
    main([*run, str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["candidate"] for row in rows] == ["max", "huber:0.1"]
    assert all(
        len(row[part]) == len(SHARES) and 0 <= min(row[part]) <= max(row[part]) <= 1
        for row in rows
        for part in ("validation", "test")
    )
    assert (tmp_path / "outliers.png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "huber:0.1 less max at 50 %" in printed
    assert "chosen" in printed


def test_misuse(getkey):
    for match, fields in (
        ("a candidate is max, mean, or a penalty", {"candidates": ("huber",)}),
        ("a candidate is max, mean, or a penalty", {"candidates": ("max:0.1",)}),
        ("alpha must be a positive number", {"candidates": ("huber:-1",)}),
        ("candidates must be different", {"candidates": ("max", "max")}),
        ("seeds must be different", {"seeds": (1, 1)}),
        ("points must be at least 1", {"points": 0}),
    ):
        with pytest.raises(ValueError, match=match):
            Config(**fields)
    for match, fields in (("alpha must be positive", {"alpha": 0.0}), ("pooling must be one of", {"pooling": "sum"})):
        with pytest.raises(ValueError, match=match):
            PointNetConfig(**fields)
    with pytest.raises(ValueError, match="use jax.vmap"):
        PointNet(PointNetConfig(width=2), key=getkey())(jnp.ones((2, 5, 2), jnp.float32))
