"""Learn to remove noise from piecewise constant signals: total variation with a learnt operator and learnt weights.

    python -m train.denoise                        D and weights learnt, the weights predicted from the signal
    python -m train.denoise --weights constant     D and weights learnt, the same for every signal
    python -m train.denoise --model tv             the one weight of total variation, found by its gradient
    python -m train.denoise --model mlp --width 400 --lr 1e-3 --batch-size 100 --steps 10000     a network

Hardware and time: 2 CPU cores, 4 minutes for the first, of which 2 go into the fixed weights that it is compared with; 20 s for the
network. Where other work shares the cores, set OPENBLAS_NUM_THREADS=1: threads of OpenBLAS that wait for a core make the layer a
hundred times slower.
Expect, mean squared error on the test set: total variation with one fixed weight 15.99, at 21 (best on the validation set; on the
test set 20 is better, by 0.001). Learnt, seeds 0, 1, 2: 11.68, 11.70, 11.73, which is 27 % less; rounding alone moves them
by 0.03. With constant weights 15.91 three times, 0.5 % less: the gain comes from weights that look at the signal, hardly any of it
from D, which stays near first differences. The gradient of `tv` goes from 13 to 21.1. The network, with 8 times the parameters, 30.5,
30.1, 29.6 (26.6 with `--width 1600`, the widest that was tried).
The paper (its Table 1, other signals) has 16.5, 14.4, which is 12 % less, and 29.8; in its learnt model, too, the weights depend on the
signal, there as an affine function of it.

Signals have 100 entries and 1 to 9 segments with heights uniform in [10, 100]; the noise has standard deviation 10. All choices (filters,
window, learning rates, steps, the fixed weight) were made on the validation set; the weights are those of the last step.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from .loop.config import RunConfig

if TYPE_CHECKING:
    import numpy as np

    from .loop.fit import TrainState


@dataclass(frozen=True)
class Config(RunConfig):
    model: Literal["tv", "optnet", "mlp"] = "optnet"
    weights: Literal["predicted", "constant"] = "predicted"
    """Whether the weights of `optnet` depend on the signal."""
    filters: int = 16
    """Filters of the convolution that predicts them."""
    window: int = 9
    """Entries of D y that a filter sees, an odd number."""
    width: int = 100
    """Hidden units of the network."""
    signals: int = 10000
    """Training signals."""
    held_out: int = 1000
    """Signals for validation, and as many for the test."""
    grid: tuple[float, float, float] = (12.0, 30.0, 1.0)
    """Fixed weights to compare with: the first, the last, the step."""

    steps: int = 600
    batch_size: int = 50
    lr: float = 3e-2
    """Peak learning rate: a cosine to zero."""
    lr_operator: float = 3e-4
    """The same for D. Its 9900 entries are far more than the rest, and learn the noise of a batch at a larger rate."""
    seed: int = 0

    eval_every: int = field(default=200, kw_only=True)
    save_every: int = field(default=200, kw_only=True)

    def __post_init__(self):
        self.check_at_least_one("filters window width signals held_out steps batch_size")
        if self.window % 2 == 0:
            raise ValueError(f"window must be odd, so that a filter is centred, but is {self.window}.")
        if self.batch_size > self.signals:
            raise ValueError(f"batch_size must be at most the {self.signals} signals, but is {self.batch_size}.")
        first, last, step = self.grid
        if not (0 < first <= last and step > 0):
            raise ValueError(
                f"grid must be first, last and step with 0 < first <= last and step > 0, but is {first}, {last}, {step}."
            )

    @property
    def name(self) -> str:
        model = "optnet-constant" if (self.model, self.weights) == ("optnet", "constant") else self.model
        return f"denoise-{model}-{self.seed}"


LENGTH, NOISE, HEIGHTS, SEGMENTS = 100, 10.0, (10.0, 100.0), (1, 9)


def make_signals(count: int, seed: int) -> "tuple[np.ndarray, np.ndarray]":
    """`count` piecewise constant signals: (with noise, without), each (count, 100) float32. Any two places for a jump differ."""
    import numpy as np

    rng = np.random.default_rng(seed)
    clean = np.zeros((count, LENGTH))
    for signal in clean:
        segments = rng.integers(SEGMENTS[0], SEGMENTS[1] + 1)
        jumps = np.sort(rng.choice(np.arange(1, LENGTH), segments - 1, replace=False))
        lengths = np.diff(np.concatenate([[0], jumps, [LENGTH]]))
        signal[:] = np.repeat(rng.uniform(*HEIGHTS, segments), lengths)
    return (clean + NOISE * rng.standard_normal(clean.shape)).astype(np.float32), clean.astype(np.float32)


def train(config: Config) -> "tuple[TrainState, dict[str, float]]":
    """One run, or the rest of it: the final state, and what was evaluated there."""
    import time

    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import jax.random as jr
    import numpy as np
    import optax

    from models.denoise import DenoiseConfig, differences, make

    from .loop.data import shuffled_batches
    from .loop.devices import start
    from .loop.fit import fit, mean_over

    began = time.perf_counter()
    mesh = start(config.devices)
    if config.batch_size % mesh.size:
        raise ValueError(f"batch_size must be a multiple of the {mesh.size} devices, but is {config.batch_size}.")
    # The signals do not change with the run's seed, so that runs can be compared.
    train_set = make_signals(config.signals, 1)
    validation, test = make_signals(config.held_out, 2), make_signals(config.held_out, 3)

    def metric(model, noisy, clean):
        return {"mse": jnp.mean((model(noisy) - clean) ** 2)}

    evaluate = mean_over(metric, validation, mesh=mesh, prefix="validation")
    evaluate_test = mean_over(metric, test, mesh=mesh, prefix="test")

    model_key, train_key = jr.split(jr.key(config.seed))

    def fixed(weight: float):
        return make(DenoiseConfig(LENGTH, "tv", weight), key=model_key)

    result: dict[str, float] = {}
    weight = DenoiseConfig.weight
    grid, curve = np.zeros(0), np.zeros(0)
    if config.model != "mlp":
        first, last, step = config.grid
        grid = np.arange(first, last + step / 2, step)
        scores = [dict(evaluate(fixed(w))) | dict(evaluate_test(fixed(w))) for w in grid]
        best = int(np.argmin([score["validation/mse"] for score in scores]))
        curve = np.array([score["test/mse"] for score in scores])
        result = {
            "fixed/weight": float(grid[best]),
            "fixed/validation": scores[best]["validation/mse"],
            "fixed/test": scores[best]["test/mse"],
            # What no choice of one weight could beat, had it seen the test set.
            "fixed/test_lowest": float(curve.min()),
            "fixed/test_lowest_at": float(grid[curve.argmin()]),
        }
        if config.model == "optnet":
            weight = result["fixed/weight"]
    searched = time.perf_counter()

    model = make(
        DenoiseConfig(
            LENGTH, config.model, weight, config.weights, config.filters, config.window, config.width, scale=NOISE
        ),
        key=model_key,
    )
    parameters = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))

    def group(parameters):
        """Which learning rate each leaf has."""
        return jax.tree.map_with_path(lambda path, _: "operator" if path[0].name == "D" else "rest", parameters)

    adam = lambda rate: optax.adam(optax.cosine_decay_schedule(rate, config.steps))
    optimizer = optax.partition({"operator": adam(config.lr_operator), "rest": adam(config.lr)}, group)

    def loss(model, batch, key):
        del key
        noisy, clean = batch
        return jnp.mean((jax.vmap(model)(noisy) - clean) ** 2), {}

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
    result |= dict(evaluate(state.model)) | dict(evaluate_test(state.model))
    files = ["metrics.jsonl", "checkpoints/"]
    if config.plots:
        from .loop.denoise_plots import plot_curve, plot_operator, plot_signals

        shown = slice(0, 3)
        answer = eqx.filter_jit(lambda model, noisy: jax.vmap(model)(noisy))
        noisy, clean = test[0][shown], test[1][shown]
        outputs = {config.model: np.asarray(answer(state.model, noisy))}
        weights = None
        if config.model == "optnet":
            outputs = {"total variation": np.asarray(answer(fixed(weight), noisy)), "learnt": outputs["optnet"]}
            weights = np.asarray(jax.vmap(state.model.weights)(noisy))
            plot_operator(np.asarray(differences(LENGTH)), np.asarray(state.model.D), config.directory / "operator.png")
            files.append("operator.png")
        if config.model != "mlp":
            plot_curve(grid, curve, {config.model: result["test/mse"]}, config.directory / "weight.png")
            files.append("weight.png")
        plot_signals(noisy, clean, outputs, weights, config.directory / "signals.png", fixed_weight=weight)
        files.append("signals.png")
    print(f"\n{config.model}, {parameters} parameters")
    print(f"test MSE       {result['test/mse']:.3f}   (validation {result['validation/mse']:.3f})")
    if config.model != "mlp":
        print(
            f"               {result['fixed/test']:.3f}   total variation with the best weight on the validation set, "
            f"{result['fixed/weight']:g}: {result['test/mse'] / result['fixed/test'] - 1:+.1%}"
        )
        print(
            f"               {result['fixed/test_lowest']:.3f}   and with the best one on the test set, {result['fixed/test_lowest_at']:g}"
        )
    if config.model == "tv":
        print(f"weight         {float(state.model.weight):.2f}, from {weight:g}")
    now = time.perf_counter()
    print(
        f"time           {now - began:.1f} s with compilation, {searched - began:.1f} s of it for the fixed weights, "
        f"on {mesh.size} {jax.default_backend()} device(s)"
    )
    print(f"files          {config.directory.resolve()}: {', '.join(files)}")
    return state, result


def main(args: list[str] | None = None) -> None:
    import tyro

    train(tyro.cli(Config, args=args, prog="python -m train.denoise", description=__doc__))


if __name__ == "__main__":
    main()
