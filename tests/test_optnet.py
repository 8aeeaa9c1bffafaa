"""OptNet, the Sudoku models, and the puzzles that they learn from."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import declarative as dn
from models.sudoku import SudokuConfig, make
from train.loop.puzzles import full_grids, make_puzzles, solutions
from train.sudoku import DEFAULTS, Config


@pytest.mark.slow
def test_feasible_by_construction_and_learnable(getkey):
    layer = dn.OptNet(5, 2, 3, key=getkey(), nonnegative=True)
    # Whatever the parameters are.
    layer = jax.tree.map(
        lambda leaf: 3 * jr.normal(getkey(), leaf.shape, leaf.dtype) if eqx.is_inexact_array(leaf) else leaf, layer
    )
    costs = jr.normal(getkey(), (4, 5))
    z = jax.vmap(layer)(costs)
    assert layer.A is not None
    assert layer.G is not None
    assert layer.margin is not None
    np.testing.assert_allclose(z @ layer.A.T, np.broadcast_to(layer.A @ layer.inside, (4, 2)), atol=1e-9)
    assert float(jnp.min(z)) >= -1e-12
    assert np.all(
        np.asarray(z @ layer.G.T) <= np.asarray(layer.G @ layer.inside + jax.nn.softplus(layer.margin))[None] + 1e-9
    )
    gradients = eqx.filter_grad(lambda layer: jnp.sum(jnp.sin(jax.vmap(layer)(costs))))(layer)
    for name in ("A", "G", "L", "point", "margin"):
        gradient = np.asarray(getattr(gradients, name))
        assert np.all(np.isfinite(gradient))
        assert np.any(gradient != 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((3, 3, 0), "num_eq < n"), ((0, 0, 0), "n >= 1"), ((3, 1, -1), "num_ineq >= 0")],
)
def test_sizes_that_make_no_layer(arguments, message, getkey):
    with pytest.raises(ValueError, match=message):
        dn.OptNet(*arguments, key=getkey())


def test_the_puzzles_have_one_solution_and_the_splits_share_no_grid():
    grids = full_grids(4)
    assert grids.shape == (288, 4, 4)
    assert len(np.unique(grids.reshape(288, 16), axis=0)) == 288
    for line in (
        grids,
        grids.transpose(0, 2, 1),
        grids.reshape(288, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(288, 4, 4),
    ):
        assert np.all(np.sort(line, axis=2) == np.arange(4))
    puzzles, solved = make_puzzles(grids[:200], 50, (4, 7), 0)
    given = puzzles.sum(-1) > 0
    assert np.all((given.sum((1, 2)) >= 4) & (given.sum((1, 2)) <= 7))
    for puzzle, solution, mask in zip(puzzles.argmax(-1), solved.argmax(-1), given, strict=True):
        assert np.all(puzzle[mask] == solution[mask])
        assert np.sum(np.all(grids[:, mask] == solution[mask], axis=1)) == 1
        assert any(np.all(grid == solution) for grid in grids[:200])


def test_large_boards():
    grids = full_grids(9, 4, seed=0)
    lines = (grids, grids.transpose(0, 2, 1), grids.reshape(4, 3, 3, 3, 3).swapaxes(2, 3).reshape(4, 9, 9))
    assert all(np.all(np.sort(line, axis=2) == np.arange(9)) for line in lines)
    puzzles, solved = make_puzzles(grids[:2], 3, (30, 32), 0)
    for puzzle, solution in zip(puzzles, solved, strict=True):
        board = np.where(puzzle.sum(-1) > 0, puzzle.argmax(-1), -1)
        assert 30 <= np.sum(board >= 0) <= 32
        assert [np.ravel(solution.argmax(-1)).tolist()] == list(solutions(board.ravel().tolist(), 9))
    assert list(solutions([0, 0] + [-1] * 14, 4)) == []


@pytest.mark.parametrize("side", [4, 9])
def test_the_two_models_have_as_many_parameters(side, getkey):
    count = lambda model: sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))
    config = lambda name: SudokuConfig(side, name, DEFAULTS[side]["equations"], DEFAULTS[side]["width"])
    sizes = [count(make(config(name), key=getkey())) for name in ("optnet", "mlp")]
    assert abs(sizes[0] - sizes[1]) < 0.02 * sizes[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clues": (3, 7)}, "Fewer than 4"),
        ({"equations": 64}, "fewer than the 64"),
        ({"side": 9, "clues": (20, 40)}, "Fewer than 30"),
        ({"side": 5}, "side must be 4 or 9"),
        ({"held_out": 1.0}, "held_out"),
        ({"steps": 0}, "steps"),
    ],
)
def test_wrong_arguments_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)


@pytest.mark.slow
def test_a_few_steps_learn_and_draw(tmp_path):
    from train.sudoku import train

    config = Config(
        steps=12, puzzles=100, batch_size=20, out=tmp_path, eval_every=12, save_every=12, tensorboard=False, devices=1
    )
    _, result = train(config)
    assert {"puzzles/board_error", "grids/board_error"} <= set(result)
    assert (tmp_path / "rules.png").stat().st_size > 10_000
    assert (tmp_path / "boards.png").stat().st_size > 5_000
