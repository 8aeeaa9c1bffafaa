"""Sudoku solvers that are told nothing about Sudoku: a learnt quadratic program, and the network to compare it with.

Shapes of one example, for boards of side s = k * k: a puzzle is `(s, s, s)`, one-hot over the digits and all zero at an empty cell;
the output is `(s, s, s)`, a score for each digit of each cell.
"""

from dataclasses import dataclass
from math import log
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

import declarative as dn


@dataclass(frozen=True)
class SudokuConfig:
    side: int = 4
    """Rows, columns and digits of a board."""
    model: Literal["optnet", "mlp"] = "optnet"
    equations: int = 40
    """Rows of the learnt constraint matrix."""
    width: int = 20
    """Hidden units of the network; 20 give it as many parameters as the layer has."""
    start: float = log(2)
    """Each entry of the point that satisfies the equations, before training. A solved board's entries are 1 / side in the mean."""


class SudokuOptNet(eqx.Module):
    """The layer of Amos & Kolter 2017: the puzzle is the linear cost, the rules are the learnt equations A z = b over z >= 0."""

    layer: dn.OptNet

    def __init__(self, config: SudokuConfig, *, key: PRNGKeyArray):
        cells = config.side**3
        program = dn.QuadraticProgram(throw=False, on_failure="zero")
        layer = dn.OptNet(
            cells,
            config.equations,
            0,
            key=key,
            nonnegative=True,
            quadratic=False,
            curvature=0.1,
            program=program,
            dtype=jnp.float32,
        )
        # As in the paper: entries of A uniform in [0, 1], so that rules of the form "these cells add up to ..." lie near.
        A = jr.uniform(key, (config.equations, cells), jnp.float32)
        point = jnp.full_like(layer.point, jnp.log(jnp.expm1(config.start)))
        self.layer = eqx.tree_at(lambda layer: (layer.A, layer.point), layer, (A, point))

    def __call__(self, puzzle: Float[Array, "s s s"]) -> Float[Array, "s s s"]:
        return self.layer(-puzzle.ravel()).reshape(puzzle.shape)


class SudokuMLP(eqx.Module):
    """One hidden layer."""

    first: eqx.nn.Linear
    last: eqx.nn.Linear

    def __init__(self, config: SudokuConfig, *, key: PRNGKeyArray):
        cells, keys = config.side**3, jr.split(key)
        self.first = eqx.nn.Linear(cells, config.width, key=keys[0], dtype=jnp.float32)
        self.last = eqx.nn.Linear(config.width, cells, key=keys[1], dtype=jnp.float32)

    def __call__(self, puzzle: Float[Array, "s s s"]) -> Float[Array, "s s s"]:
        return self.last(jax.nn.relu(self.first(puzzle.ravel()))).reshape(puzzle.shape)


def make(config: SudokuConfig, *, key: PRNGKeyArray) -> SudokuOptNet | SudokuMLP:
    return (SudokuOptNet if config.model == "optnet" else SudokuMLP)(config, key=key)
