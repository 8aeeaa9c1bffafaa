"""Learn to solve Sudoku from examples alone: a quadratic program with learnt constraints, beside a network of the same size.

    python -m train.sudoku                  the 4 x 4 boards of the OptNet paper, and the picture of the rules it found
    python -m train.sudoku --model mlp      the network

Hardware and time: 2 CPU cores that do nothing else, two and a half minutes for the layer, 9 s for the network.
Expect, seeds 0, 1, 2: the layer gets 0.0, 1.8 and 2.9 % of the boards of held-out grids wrong; the network, with as many parameters,
90.5, 92.3 and 93.5 %, at the best learning rate of 0.003, 0.01, 0.03 and 0.05 (`--lr 0.03`). Ten times the steps give the network 90 %,
ten times the width and four times the steps 55 %.

Puzzles are generated: a full grid, cells removed in random order as long as the solution stays unique, until `clues` are left. There are
only 288 full 4 x 4 grids, so a random split of puzzles shares nearly every solution between training and test. Both are reported:
`puzzles/`, new puzzles of grids that were seen, and `grids/`, puzzles of grids that were held out. A board counts as wrong if any
cell of it is. The weights are those of the last step; nothing is selected on either set.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

    from .loop.fit import TrainState


@dataclass(frozen=True)
class Config:
    model: Literal["optnet", "mlp"] = "optnet"
    equations: int = 40
    """Rows of the learnt constraint matrix."""
    width: int = 20
    """Hidden units of the network; 20 give it as many parameters as the layer has."""
    clues: tuple[int, int] = (4, 7)
    """Fewest and most cells that are given."""
    puzzles: int = 3000
    """Training puzzles."""
    held_out: float = 0.2
    """Share of the full grids of which no puzzle is trained on."""

    steps: int = 1500
    batch_size: int = 100
    lr: float = 5e-2
    """Peak learning rate: a cosine to zero."""
    seed: int = 0

    out: Path | None = None
    """The run's folder. Default: runs/sudoku-MODEL-SEED. A run that was interrupted there is resumed."""
    resume: bool = True
    log_every: int = 10
    eval_every: int = 200
    save_every: int = 500
    tensorboard: bool = True
    plots: bool = True
    devices: int | None = None
    """Devices to spread each batch over (default: all)."""

    def __post_init__(self):
        for name in "equations width puzzles steps batch_size log_every eval_every save_every".split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but is {getattr(self, name)}.")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie between 0 and 1, but is {self.held_out}.")
        low, high = self.clues
        if not 4 <= low <= high <= 15:
            raise ValueError(
                f"clues must be two numbers, 4 <= fewest <= most <= 15, but are {low} and {high}. Fewer than 4 fix no board."
            )
        if self.equations >= 64:
            raise ValueError(f"equations must be fewer than the 64 unknowns, but are {self.equations}.")

    @property
    def directory(self) -> Path:
        return self.out if self.out is not None else Path("runs") / f"sudoku-{self.model}-{self.seed}"

    def identity(self) -> dict[str, Any]:
        """The fields that determine the result: a folder holds one run of these."""
        free = "out resume log_every eval_every save_every tensorboard plots devices".split()
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if k not in free}


def full_grids() -> "np.ndarray":
    """All 288 solved 4 x 4 boards, digits 0 to 3: (288, 4, 4)."""
    import numpy as np

    grids: list[list[int]] = [[]]
    for cell in range(16):
        row, column = divmod(cell, 4)
        peers = [
            i
            for i in range(cell)
            if i // 4 == row or i % 4 == column or (i // 8 == cell // 8 and i % 4 // 2 == column // 2)
        ]
        grids = [grid + [digit] for grid in grids for digit in range(4) if all(grid[i] != digit for i in peers)]
    return np.array(grids).reshape(-1, 4, 4)


def make_puzzles(
    grids: "np.ndarray", every: "np.ndarray", count: int, clues: tuple[int, int], seed
) -> "tuple[np.ndarray, np.ndarray]":
    """`count` puzzles with a unique solution among `grids`: (puzzles, solutions), one-hot (count, 4, 4, 4) float32."""
    import numpy as np

    rng = np.random.default_rng(seed)
    flat, everything = grids.reshape(-1, 16), every.reshape(-1, 16)
    puzzles, solutions = np.zeros((count, 16, 4), np.float32), np.zeros((count, 16, 4), np.float32)
    made = 0
    while made < count:
        solution, wanted = flat[rng.integers(len(flat))], rng.integers(clues[0], clues[1] + 1)
        given = np.ones(16, bool)
        for cell in rng.permutation(16):
            if given.sum() == wanted:
                break
            given[cell] = False
            # Unique: no other board agrees with all that is given.
            if np.sum(np.all(everything[:, given] == solution[given], axis=1)) > 1:
                given[cell] = True
        if given.sum() == wanted:
            solutions[made, np.arange(16), solution] = 1
            puzzles[made] = solutions[made] * given[:, None]
            made += 1
    return puzzles.reshape(-1, 4, 4, 4), solutions.reshape(-1, 4, 4, 4)


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

    began = time.perf_counter()
    mesh = start(config.devices)
    if config.batch_size % mesh.size:
        raise ValueError(f"batch_size must be a multiple of the {mesh.size} devices, but is {config.batch_size}.")
    every = full_grids()
    # The split does not change with the run's seed, so that runs can be compared.
    order = np.random.default_rng(0).permutation(len(every))
    cut = round(config.held_out * len(every))
    unseen, seen = every[order[:cut]], every[order[cut:]]
    train_set = make_puzzles(seen, every, config.puzzles, config.clues, 1)
    tests = {
        "puzzles": make_puzzles(seen, every, 1000, config.clues, 2),
        "grids": make_puzzles(unseen, every, 1000, config.clues, 3),
    }
    known = {puzzle.tobytes() for puzzle in train_set[0]}
    fresh = np.array([puzzle.tobytes() not in known for puzzle in tests["puzzles"][0]])
    tests["puzzles"] = (tests["puzzles"][0][fresh], tests["puzzles"][1][fresh])

    model_key, train_key = jr.split(jr.key(config.seed))
    model = make(SudokuConfig(4, config.model, config.equations, config.width), key=model_key)
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
        return {"board_error": wrong(output, solution), "loss": jnp.mean((output - solution) ** 2)}

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
            plot_rules(np.asarray(state.model.layer.A), config.directory / "rules.png")
            files.append("rules.png")
        answer = eqx.filter_jit(lambda model, puzzles: jax.vmap(model)(puzzles))
        outputs = np.asarray(answer(state.model, tests["grids"][0][:6]))
        plot_boards(tests["grids"][0][:6], outputs, tests["grids"][1][:6], config.directory / "boards.png")
        files.append("boards.png")
    print(f"\n{config.model}, {parameters} parameters")
    print(
        f"board error    {result['puzzles/board_error']:.2%} of {len(tests['puzzles'][0])} new puzzles of known grids"
    )
    print(f"               {result['grids/board_error']:.2%} of {len(tests['grids'][0])} puzzles of held-out grids")
    seconds = time.perf_counter() - began
    print(f"time           {seconds:.1f} s with compilation, on {mesh.size} {jax.default_backend()} device(s)")
    print(f"files          {config.directory.resolve()}: {', '.join(files)}")
    return state, result


def main(args: list[str] | None = None) -> None:
    import tyro

    train(tyro.cli(Config, args=args, prog="python -m train.sudoku", description=__doc__))


if __name__ == "__main__":
    main()
