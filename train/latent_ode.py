"""Train a latent ODE on irregularly sampled series: fill the gaps, and go on where the measurements end.

    python -m train.latent_ode                          damped oscillations at random times (generated)
    python -m train.latent_ode --model gru              the bidirectional GRU that is told the gaps
    python -m train.latent_ode --data eeg --steps 600   four channels of a real electroencephalogram (matplotlib's sample data)

Hardware and time: 2 CPU cores, 66 s for the 4000 steps of the latent ODE, 55 s of the GRU.
Expect, mean squared errors of interpolation and extrapolation:

| data         | steps | latent ODE    | GRU           | straight lines | zero          |
|--------------|-------|---------------|---------------|----------------|---------------|
| oscillations | 4000  | 0.034, 0.039  | 0.023, 0.028  | 0.124, 0.374   | 0.333, 0.160  |
| eeg          | 600   | 1.40, 1.83    | 0.68, 1.74    | 0.34, 3.16     | 1.66, 1.58    |

The latent ODE finds the law of the oscillations from a third of the values, but the GRU, which reads each value where it is needed, is
better still. Of the 600 times of the electroencephalogram neither learns anything that holds in its last quarter.

Of each series a model sees a random part of the values in the first two thirds of the time. It is scored by the mean squared error (of
the posterior mean's curve) on the hidden values there, "interpolation", and on all values of the last third, "extrapolation". Beside it:
linear interpolation between the values seen (the last one seen, beyond them), and zero, which is the mean of the data.

The measurement noise of the oscillations has variance 0.0025, below which no error can fall. The weights are those of the last step;
nothing is selected on the test series.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .loop.config import RunConfig

if TYPE_CHECKING:
    from .loop.fit import TrainState

END = 2 / 3
"""When the measurements end that a model sees."""


@dataclass(frozen=True)
class Config(RunConfig):
    model: Literal["latent_ode", "gru"] = "latent_ode"
    data: Literal["oscillations", "eeg"] = "oscillations"
    length: int = 48
    """Times of a series."""
    rows: int = 20_000
    """Training series of the oscillations."""
    latent: int = 8
    hidden: int = 48
    """State of the GRU, and hidden units of every MLP."""
    solver_steps: int = 40
    noise: float = 0.1
    """Standard deviation of the observations in the likelihood."""

    steps: int = 4000
    batch_size: int = 128
    lr: float = 5e-3
    """Peak learning rate: linear warm-up over a twentieth of the steps, then a cosine to zero."""
    weight_decay: float = 1e-3
    seed: int = 0

    def __post_init__(self):
        self.check_at_least_one("rows latent hidden solver_steps steps batch_size")
        if self.length < 4:
            raise ValueError(f"length must be at least 4, but is {self.length}.")
        if not self.noise > 0:
            raise ValueError(f"noise must be positive, but is {self.noise}.")

    @property
    def name(self) -> str:
        return f"latent-{self.data}-{self.model}-{self.seed}"


def straight_lines(times, values, mask):
    """Linear interpolation between the values seen of each series and channel, constant beyond; zero where none was seen."""
    import numpy as np

    lines = np.zeros_like(values)
    for i, channel in np.ndindex(len(values), values.shape[-1]):
        seen = mask[i, :, channel] > 0
        if seen.any():
            lines[i, :, channel] = np.interp(times[i], times[i][seen], values[i, seen, channel])
    return lines


def train(config: Config) -> "tuple[TrainState, dict[str, tuple[float, float]]]":
    """One run, or the rest of it: the final state, and (interpolation, extrapolation) errors by method."""
    import time

    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import jax.random as jr
    import numpy as np
    import optax

    from models.latent_ode import LatentODEConfig, make

    from .loop.data import eeg, oscillations, shuffled_batches
    from .loop.devices import start
    from .loop.fit import fit, mean_over

    began = time.perf_counter()
    mesh = start(config.devices)
    if config.batch_size % mesh.size:
        raise ValueError(f"batch_size must be a multiple of the {mesh.size} devices, but is {config.batch_size}.")
    if config.data == "eeg":
        train_set, test = eeg(config.length, 0, end=END)
    else:
        train_set, test = (
            oscillations(rows, config.length, (0, i), end=END) for i, rows in enumerate((config.rows, 500))
        )

    model_key, train_key = jr.split(jr.key(config.seed))
    channels = test[1].shape[-1]
    model = make(
        LatentODEConfig(config.model, channels, config.latent, config.hidden, config.solver_steps), key=model_key
    )
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.lr, max(1, config.steps // 20), config.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=config.weight_decay))

    def loss(model, batch, key):
        """The negative evidence bound over the number of values, and what it consists of."""
        times, values, mask = batch
        noise = jr.normal(key, (len(times), config.latent), values.dtype)
        predictions, divergence = jax.vmap(model)(times, values, mask, noise)
        error = jnp.mean((predictions - values) ** 2)
        divergence = jnp.mean(divergence) / (values.shape[1] * channels)
        return error / (2 * config.noise**2) + divergence, {"mse": error, "kl": divergence}

    def metric(model, times, values, mask):
        errors = (model(times, values, mask)[0] - values) ** 2
        within = (times < END).astype(values.dtype)[:, None] * (1 - mask)
        beyond = jnp.broadcast_to((times >= END).astype(values.dtype)[:, None], mask.shape)
        return {
            "interpolation": jnp.sum(errors * within),
            "interpolated": jnp.sum(within),
            "extrapolation": jnp.sum(errors * beyond),
            "extrapolated": jnp.sum(beyond),
        }

    totals = mean_over(metric, test, mesh=mesh, prefix="")

    def on_test(model):
        total = {name.strip("/"): value for name, value in totals(model)}
        yield "test/interpolation", total["interpolation"] / total["interpolated"]
        yield "test/extrapolation", total["extrapolation"] / total["extrapolated"]

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
        evaluate=on_test,
        log_every=config.log_every,
        eval_every=config.eval_every,
        save_every=config.save_every,
        resume=config.resume,
        tensorboard=config.tensorboard,
    )
    seconds = time.perf_counter() - began

    times, values, mask = test
    beyond = np.broadcast_to((times >= END)[..., None], mask.shape)
    hidden = ~beyond & (mask == 0)
    within, after = (value for _, value in on_test(state.model))
    result = {config.model: (within, after)}
    for name, guess in (("linear interpolation", straight_lines(*test)), ("zero", np.zeros_like(values))):
        errors = (guess - values) ** 2
        result[name] = (float(errors[hidden].mean()), float(errors[beyond].mean()))
    print(
        f"\nmean squared error on {len(times)} test series of {config.data}: hidden values within, and beyond the end"
    )
    for name, (within, after) in result.items():
        print(f"  {name:22}{within:8.4f}{after:9.4f}")
    files = ["metrics.jsonl", "checkpoints/"]
    if config.plots:
        from .loop.ode_plots import plot_series

        # The curve: times at which nothing is seen are put among the others.
        smooth = np.linspace(0, 1, 121, dtype=np.float32)
        shown = slice(0, 6) if config.data == "oscillations" else slice(0, None, 4)
        t, v, m = times[shown], values[shown], mask[shown]
        order = np.argsort(np.concatenate([t, np.broadcast_to(smooth, (len(t), 121))], 1), axis=1, kind="stable")
        blank = np.zeros((len(t), 121, channels), np.float32)
        mix = lambda a, b: np.take_along_axis(
            np.concatenate([a, b], 1), order.reshape(order.shape + (1,) * (a.ndim - 2)), 1
        )
        everything = (mix(t, np.broadcast_to(smooth, (len(t), 121))), mix(v, blank), mix(m, blank))
        predictions = np.asarray(eqx.filter_jit(eqx.filter_vmap(lambda *series: state.model(*series)[0]))(*everything))
        places = np.argsort(order, axis=1)[:, t.shape[1] :]
        curves = np.take_along_axis(predictions, places[..., None], 1)
        title = f"{config.model} on {config.data}" + (", first channel" if channels > 1 else "")
        plot_series(t, v, m, smooth, curves, END, config.directory / "series.png", title=title)
        files.append("series.png")
    print(f"time           {seconds:.1f} s with compilation, on {mesh.size} {jax.default_backend()} device(s)")
    print(f"files          {config.directory.resolve()}: {', '.join(files)}")
    return state, result


def main(args: list[str] | None = None) -> None:
    import tyro

    train(tyro.cli(Config, args=args, prog="python -m train.latent_ode", description=__doc__))


if __name__ == "__main__":
    main()
