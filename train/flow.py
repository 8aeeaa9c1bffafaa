"""Train a continuous normalising flow, and compare its log-likelihood on held-out data with that of a Gaussian and of a Gaussian mixture.

    python -m train.flow                                two moons
    python -m train.flow --data pinwheel
    python -m train.flow --data digits --trace hutchinson --steps 300     ten principal components of digits

Hardware and time: 2 CPU cores, up to two minutes each.
Expect (seed 0), in nats an example of held-out rows:

| data     | flow    | Gaussian | Gaussian mixture    | integral of the flow's density |
|----------|---------|----------|---------------------|--------------------------------|
| moons    | -1.627  | -2.696   | -1.615 (of 20)      | 1.0001                         |
| pinwheel | -2.490  | -3.244   | -2.445 (of 40)      | 1.0007                         |
| digits   | -11.146 | -14.214  | -10.482 (of 15)     |                                |

The flow does not beat the mixture here, whose density is the lumpier one in the pictures.

Log-likelihoods are in nats per example, of the exact divergence whatever `--trace` is. Both baselines are scikit-learn's, fitted to the
same training rows; the mixture (full covariances) has the number of components, of 1 to 40, that 5-fold cross-validation on those rows
prefers. For points of the plane the run also integrates the density over a square, which should give 1.

The points of the plane are drawn anew from their density (4000 to train, 2000 held out). The digits are scikit-learn's, their split, PCA
and scale from the training part only. The weights are those of the last step; nothing is selected on held-out rows.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .loop.config import RunConfig

if TYPE_CHECKING:
    from .loop.fit import TrainState

LIMIT = {"moons": 3.5, "pinwheel": 5.5}


@dataclass(frozen=True)
class Config(RunConfig):
    data: Literal["moons", "pinwheel", "digits"] = "moons"
    components: int = 10
    """Principal components of the digits."""
    trace: Literal["exact", "hutchinson"] = "exact"
    """Divergence in training: exact, or estimated with one random vector for each example and step."""
    hidden: int = 64
    """Hidden units of the field, in each of two layers."""
    solver_steps: int = 40
    adjoint: Literal["reversible", "checkpointed"] = "reversible"

    steps: int = 1500
    batch_size: int = 256
    lr: float = 5e-3
    """Peak learning rate: linear warm-up over a twentieth of the steps, then a cosine to zero."""
    weight_decay: float = 1e-3
    seed: int = 0

    def __post_init__(self):
        self.check_at_least_one("components hidden solver_steps steps batch_size")

    @property
    def name(self) -> str:
        return f"flow-{self.data}-{self.trace}-{self.seed}"


def train(config: Config) -> "tuple[TrainState, dict[str, float]]":
    """One run, or the rest of it: the final state, and the log-likelihoods on held-out rows."""
    import time

    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import jax.random as jr
    import numpy as np
    import optax
    from sklearn.mixture import GaussianMixture

    from models.flow import FlowConfig, make

    from .loop.baselines import fit_mixture
    from .loop.data import digits_pca, plane, shuffled_batches
    from .loop.devices import start
    from .loop.fit import fit, mean_over

    began = time.perf_counter()
    mesh = start(config.devices)
    if config.batch_size % mesh.size:
        raise ValueError(f"batch_size must be a multiple of the {mesh.size} devices, but is {config.batch_size}.")
    to_images = None
    if config.data == "digits":
        rows, held_out, to_images = digits_pca(config.components)
    else:
        rows, held_out = plane(config.data, 4000, (0, 0)), plane(config.data, 2000, (0, 1))
    size = rows.shape[1]

    model_key, train_key = jr.split(jr.key(config.seed))
    build = lambda steps: make(FlowConfig(size, config.hidden, 2, steps, config.adjoint), key=model_key)
    model = build(config.solver_steps)
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.lr, max(1, config.steps // 20), config.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=config.weight_decay))

    def loss(model, batch, key):
        (x,) = batch
        if config.trace == "exact":
            logs = jax.vmap(model.log_density)(x)
        else:
            logs = jax.vmap(model.log_density)(x, jr.rademacher(key, x.shape, x.dtype))
        return -jnp.mean(logs), {}

    on_held_out = mean_over(
        lambda model, x: {"log_likelihood": model.log_density(x)}, (held_out,), mesh=mesh, prefix="test"
    )
    state = fit(
        model,
        optimizer,
        loss,
        shuffled_batches((rows,), config.batch_size, config.seed),
        steps=config.steps,
        directory=config.directory,
        config=config.identity(),
        mesh=mesh,
        key=train_key,
        evaluate=on_held_out,
        log_every=config.log_every,
        eval_every=config.eval_every,
        save_every=config.save_every,
        resume=config.resume,
        tensorboard=config.tensorboard,
    )
    flow = state.model
    seconds = time.perf_counter() - began

    on_train = mean_over(lambda model, x: {"log_likelihood": model.log_density(x)}, (rows,), mesh=mesh, prefix="train")
    # Four times as many steps show the error of the discretisation, which training could exploit.
    finer = eqx.tree_at(lambda flow: flow.mlp, build(4 * config.solver_steps), flow.mlp)
    gaussian, mixture = GaussianMixture(1, reg_covar=1e-6).fit(rows), fit_mixture(rows, config.seed)
    result = {
        "flow": dict(on_held_out(flow))["test/log_likelihood"],
        "flow, 4x the steps": dict(on_held_out(finer))["test/log_likelihood"],
        "flow, on training rows": dict(on_train(flow))["train/log_likelihood"],
        "Gaussian": float(gaussian.score(held_out)),
        f"mixture of {mixture.n_components}": float(mixture.score(held_out)),
    }
    print(
        f"\nlog-likelihood, nats an example, of {len(held_out)} held-out rows of {config.data} ({len(rows)} to train)"
    )
    for name, value in result.items():
        print(f"  {name:24}{value:9.3f}")

    z = jr.normal(jr.key(config.seed + 1), (2000 if to_images is None else 16, size), jnp.float32)
    samples = np.asarray(eqx.filter_jit(eqx.filter_vmap(flow.inverse))(z))
    files = ["metrics.jsonl", "checkpoints/"]
    if to_images is None:
        from .loop.ode_plots import grid

        limit, side = LIMIT[config.data], 161
        points = grid(limit, side)
        density = np.exp(np.asarray(eqx.filter_jit(eqx.filter_vmap(flow.log_density))(points)))
        result["integral"] = float(density.sum() * (2 * limit / (side - 1)) ** 2)
        print(f"integral of the density over the square: {result['integral']:.4f}")
        if config.plots:
            from .loop.ode_plots import plot_plane

            densities = {
                f"Flow: {result['flow']:.3f} nats": density,
                f"Mixture: {mixture.score(held_out):.3f} nats": np.exp(mixture.score_samples(points)),
            }
            plot_plane(held_out, densities, samples, limit, config.directory / "density.png")
            files.append("density.png")
    elif config.plots:
        from .loop.ode_plots import plot_digit_samples

        drawn = {
            "data": held_out[:16],
            "flow": samples,
            "mixture": mixture.sample(16)[0][np.random.default_rng(0).permutation(16)],
            "Gaussian": gaussian.sample(16)[0],
        }
        plot_digit_samples({k: to_images(v) for k, v in drawn.items()}, config.directory / "samples.png")
        files.append("samples.png")
    print(f"time           {seconds:.1f} s with compilation, on {mesh.size} {jax.default_backend()} device(s)")
    print(f"files          {config.directory.resolve()}: {', '.join(files)}")
    return state, result


def main(args: list[str] | None = None) -> None:
    import tyro

    train(tyro.cli(Config, args=args, prog="python -m train.flow", description=__doc__))


if __name__ == "__main__":
    main()
