"""Learn to solve Sudoku from examples alone: a quadratic program with learnt constraints, beside a network of the same size.

    python -m train.sudoku                  the 4 x 4 boards of the OptNet paper, and the picture of the rules it found
    python -m train.sudoku --model mlp      the network
    python -m train.sudoku --side 9         9 x 9 boards: 729 unknowns, 260 learnt equations

Hardware and time: 2 CPU cores that do nothing else, two and a half minutes for the layer, 9 s for the network.
Expect, seeds 0, 1, 2: the layer gets 0.0, 1.8 and 2.9 % of the boards of held-out grids wrong; the network, with as many parameters,
90.5, 92.3 and 93.5 %, at the best learning rate of 0.003, 0.01, 0.03 and 0.05 (`--lr 0.03`). Ten times the steps give the network 90 %,
ten times the width and four times the steps 55 %.
Of 9 x 9 expect to see it learn, not to see it solve: after 150 steps of 16 boards (24 minutes beside other load) the squared error of the
training boards had fallen from 0.078 to 0.066, 83 % of the empty cells of new puzzles of known grids were wrong and 88 % of those of held-out
grids (chance is 89 %), and no board was right.

Puzzles are generated: a full grid, cells removed in random order as long as the solution stays unique, until `clues` are left. There are
only 288 full 4 x 4 grids, so a random split of puzzles shares nearly every solution between training and test. Both are reported:
`puzzles/`, new puzzles of grids that were seen, and `grids/`, puzzles of grids that were held out. A board counts as wrong if any
cell of it is. The weights are those of the last step; nothing is selected on either set.
"""

# Fields that are None take the default of their board's side, before anything reads them.
# pyright: reportArgumentType=false, reportOptionalOperand=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportOptionalIterable=false

from dataclasses import dataclass, field
from math import log
from typing import TYPE_CHECKING, Any, Literal

from .loop.config import RunConfig

if TYPE_CHECKING:
    from .loop.fit import TrainState


FEWEST_CLUES = {4: 4, 9: 30}
DEFAULTS: dict[int, dict[str, Any]] = {
    4: {
        "equations": 40,
        "width": 20,
        "start": log(2),
        "clues": (4, 7),
        "puzzles": 3000,
        "steps": 1500,
        "batch_size": 100,
        "lr": 5e-2,
    },
    9: {
        "equations": 260,
        "width": 130,
        "start": 0.11,
        "clues": (40, 55),
        "puzzles": 1000,
        "steps": 150,
        "batch_size": 16,
        "lr": 5e-2,
    },
}
GRIDS = 1000  # random full grids of side 9; of side 4 all 288 are taken


@dataclass(frozen=True)
class Config(RunConfig):
    model: Literal["optnet", "mlp"] = "optnet"
    side: Literal[4, 9] = 4
    """Rows, columns and digits of a board. The defaults of the fields below that are None depend on it: see `DEFAULTS`."""
    equations: int | None = None
    """Rows of the learnt constraint matrix."""
    width: int | None = None
    """Hidden units of the network; by default it has as many parameters as the layer."""
    start: float | None = None
    """Entries of the layer's feasible point before training."""
    clues: tuple[int, int] | None = None
    """Fewest and most cells that are given."""
    puzzles: int | None = None
    """Training puzzles."""
    held_out: float = 0.2
    """Share of the full grids of which no puzzle is trained on."""

    steps: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    """Peak learning rate: a cosine to zero."""
    seed: int = 0

    eval_every: int = field(default=200, kw_only=True)

    def __post_init__(self):
        if self.side not in DEFAULTS:
            raise ValueError(f"side must be 4 or 9, but is {self.side}.")
        for name, value in DEFAULTS[self.side].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self.check_at_least_one("equations width puzzles steps batch_size")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie between 0 and 1, but is {self.held_out}.")
        (low, high), fewest, cells = self.clues, FEWEST_CLUES[self.side], self.side**2
        if not fewest <= low <= high < cells:
            raise ValueError(
                f"clues must be two numbers, {fewest} <= fewest <= most < {cells}, but are {low} and {high}. "
                f"Fewer than {fewest} leave no way, or hardly any, to fix a board of side {self.side}."
            )
        if self.equations >= self.side**3:
            raise ValueError(f"equations must be fewer than the {self.side**3} unknowns, but are {self.equations}.")

    @property
    def name(self) -> str:
        return f"sudoku{'' if self.side == 4 else self.side}-{self.model}-{self.seed}"


def train(config: Config) -> "tuple[TrainState, dict[str, float]]":
    """One run, or the rest of it: the final state, and what was evaluated there."""
    import time

    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import jax.random as jr
    import numpy as np
    import optax

    from models.sudoku import SudokuConfig, make

    from .loop.data import shuffled_batches
    from .loop.devices import start
    from .loop.fit import fit, mean_over
    from .loop.puzzles import full_grids, make_puzzles

    began = time.perf_counter()
    mesh = start(config.devices)
    if config.batch_size % mesh.size:
        raise ValueError(f"batch_size must be a multiple of the {mesh.size} devices, but is {config.batch_size}.")
    every = full_grids(config.side, None if config.side == 4 else GRIDS)
    # The split does not change with the run's seed, so that runs can be compared.
    order = np.random.default_rng(0).permutation(len(every))
    cut = min(max(1, round(config.held_out * len(every))), len(every) - 1)
    unseen, seen = every[order[:cut]], every[order[cut:]]
    count = 1000 if config.side == 4 else 100
    train_set = make_puzzles(seen, config.puzzles, config.clues, 1)
    tests = {
        "puzzles": make_puzzles(seen, count, config.clues, 2),
        "grids": make_puzzles(unseen, count, config.clues, 3),
    }
    known = {puzzle.tobytes() for puzzle in train_set[0]}
    fresh = np.array([puzzle.tobytes() not in known for puzzle in tests["puzzles"][0]])
    tests["puzzles"] = (tests["puzzles"][0][fresh], tests["puzzles"][1][fresh])

    model_key, train_key = jr.split(jr.key(config.seed))
    model = make(SudokuConfig(config.side, config.model, config.equations, config.width, config.start), key=model_key)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))
    optimizer = optax.adam(optax.cosine_decay_schedule(config.lr, config.steps))

    def wrong(output, solution):
        """1 for a board with any wrong cell."""
        same = jnp.argmax(output, -1) == jnp.argmax(solution, -1)
        return 1 - jnp.all(same, axis=(-2, -1)).astype(jnp.float32)

    def loss(model, batch, key):
        del key
        puzzles, solutions = batch
        outputs = jax.vmap(model)(puzzles)
        return jnp.mean((outputs - solutions) ** 2), {"board_error": jnp.mean(wrong(outputs, solutions))}

    def metric(model, puzzle, solution):
        output = model(puzzle)
        empty = jnp.sum(puzzle, -1) == 0
        missed = empty & (jnp.argmax(output, -1) != jnp.argmax(solution, -1))
        return {
            "board_error": wrong(output, solution),
            "cell_error": jnp.sum(missed.astype(jnp.float32)) / jnp.sum(empty.astype(jnp.float32)),
            "loss": jnp.mean((output - solution) ** 2),
        }

    evaluators = [mean_over(metric, arrays, mesh=mesh, prefix=name) for name, arrays in tests.items()]

    def evaluate(model):
        for evaluator in evaluators:
            yield from evaluator(model)

    state = fit(
        model,
        optimizer,
        loss,
        shuffled_batches(train_set, config.batch_size, config.seed),
        steps=config.steps,
        directory=config.directory,
        config=config.identity(),
        mesh=mesh,
        key=train_key,
        evaluate=evaluate,
        log_every=config.log_every,
        eval_every=config.eval_every,
        save_every=config.save_every,
        resume=config.resume,
        tensorboard=config.tensorboard,
    )
    result = dict(evaluate(state.model))
    files = ["metrics.jsonl", "checkpoints/"]
    if config.plots:
        from .loop.sudoku_plots import plot_boards, plot_rules

        if config.model == "optnet":
            plot_rules(np.asarray(state.model.layer.A), config.side, config.directory / "rules.png")
            files.append("rules.png")
        answer = eqx.filter_jit(lambda model, puzzles: jax.vmap(model)(puzzles))
        outputs = np.asarray(answer(state.model, tests["grids"][0][:6]))
        plot_boards(tests["grids"][0][:6], outputs, tests["grids"][1][:6], config.directory / "boards.png")
        files.append("boards.png")
    print(f"\n{config.model}, {parameters} parameters")
    what = {"puzzles": "new puzzles of known grids", "grids": "puzzles of held-out grids"}
    for name, (arrays, _) in tests.items():
        board, cell = result[f"{name}/board_error"], result[f"{name}/cell_error"]
        print(
            f"wrong          {board:7.2%} of the boards, {cell:6.2%} of the empty cells of {len(arrays)} {what[name]}"
        )
    seconds = time.perf_counter() - began
    print(f"time           {seconds:.1f} s with compilation, on {mesh.size} {jax.default_backend()} device(s)")
    print(f"files          {config.directory.resolve()}: {', '.join(files)}")
    return state, result


def main(args: list[str] | None = None) -> None:
    import tyro

    train(tyro.cli(Config, args=args, prog="python -m train.sudoku", description=__doc__))


if __name__ == "__main__":
    main()
