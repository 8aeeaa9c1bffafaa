"""Train an encoder for a generative model whose evidence is known, and see how much of log p(x) its inference loses, by mode.

    python -m train.savi_oracle                       the Moreau envelope: the encoder learns where the optimiser should start
    python -m train.savi_oracle --mode amortised      a plain VAE's encoder, refined after training only (VAE + SVI)
    python -m train.savi_oracle --mode unrolled       backpropagation through the inner steps
    python -m benchmarks.savi                         every mode, three seeds, with times and memory

Hardware and time: 2 CPU cores, one to three minutes; 15 s for `amortised`.
Expect (seed 0), gaps in nats an example of 1000 held-out sequences, at the encoder's proposal and after 20 steps:

| mode      | proposal | after 20 steps |
|-----------|----------|----------------|
| amortised | 0.218    | 0.038          |
| moreau    | 0.220    | 0.038          |
| proximal  | 0.226    | 0.038          |
| unrolled  | 0.919    | 0.038          |

Twenty steps find the optimum of almost every sequence from anywhere, so what is trained through them hardly trains the encoder.

The gap is log p(x) - ELBO, both to three digits at least: the one by a grid over the two latent variables, the other by quadrature. It has two
parts. The gap after many steps is the family's (a Gaussian is not the posterior), the rest is the encoder's, and that of steps not taken.
Every encoder is scored in the same way, whatever it was trained with. The decoder is drawn at random and fixed; sequences are drawn from it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .loop.config import RunConfig

if TYPE_CHECKING:
    from .loop.fit import TrainState


@dataclass(frozen=True)
class Config(RunConfig):
    mode: Literal["amortised", "unrolled", "reversible", "implicit", "proximal", "moreau", "kl"] = "moreau"
    rho: float = 1.0
    """Weight of the proximal term, where there is one."""
    inner_steps: int = 20
    inner_lr: float = 0.1
    inner_momentum: float = 0.5
    rows: int = 5000
    """Training sequences."""
    hidden: int = 32
    """Hidden units of the encoder."""
    oracle_seed: int = 0

    steps: int = 400
    batch_size: int = 128
    lr: float = 5e-3
    """Peak learning rate: linear warm-up over a twentieth of the steps, then a cosine to zero."""
    seed: int = 0

    def __post_init__(self):
        self.check_at_least_one("inner_steps rows hidden steps batch_size")
        if not self.rho > 0:
            raise ValueError(f"rho must be positive, but is {self.rho}.")
        if not self.inner_lr > 0:
            raise ValueError(f"inner_lr must be positive, but is {self.inner_lr}.")
        if not 0 <= self.inner_momentum < 1:
            raise ValueError(f"inner_momentum must lie in [0, 1), but is {self.inner_momentum}.")

    @property
    def name(self) -> str:
        return f"savi-oracle-{self.mode}-{self.seed}"


def train(config: Config) -> "tuple[TrainState, dict[str, float]]":
    """One run, or the rest of it: the final state, and the mean gaps `start`, `refined` (after `inner_steps`) and `optimal` (400 steps)."""
    import time

    import jax
    import jax.numpy as jnp
    import jax.random as jr
    import numpy as np
    import optax

    import declarative as dn
    from models.oracle import Encoder, OracleConfig, QuadratureELBO, make_oracle

    from .loop.data import shuffled_batches
    from .loop.devices import start
    from .loop.fit import fit, mean_over

    began = time.perf_counter()
    mesh = start(config.devices)
    if config.batch_size % mesh.size:
        raise ValueError(f"batch_size must be a multiple of the {mesh.size} devices, but is {config.batch_size}.")
    oracle_key, data_key = jr.split(jr.key(config.oracle_seed))
    sizes = OracleConfig(hidden=config.hidden)
    decoder = make_oracle(sizes, key=oracle_key)
    sample = jax.jit(jax.vmap(lambda key: decoder.sample(sizes.length, key=key)))
    tokens = sample(jr.split(data_key, config.rows + 1000))
    held_out = tokens[config.rows :]
    evidence = jax.jit(lambda tokens: jax.lax.map(decoder.log_evidence, tokens, batch_size=8))(held_out)
    train_set, test = (np.asarray(tokens[: config.rows]),), (np.asarray(held_out), np.asarray(evidence))

    encoder_key, train_key = jr.split(jr.key(config.seed))
    steps = lambda count: dn.GradientSteps(count, config.inner_lr, config.inner_momentum)
    inner = None if config.mode == "amortised" else steps(config.inner_steps)
    node = dn.ELBOOptimizer(QuadratureELBO(decoder), config.mode, rho=config.rho, solver=inner, throw=False)
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.lr, max(1, config.steps // 20), config.steps)

    def loss(encoder, batch, key):
        del key
        (tokens,) = batch
        out = jax.vmap(lambda x: node(x, encoder(x)))(tokens)
        return jnp.mean(out.loss), {"elbo": jnp.mean(out.elbo)}

    # Twelve nodes to a side, so that no encoder is scored by the quadrature that it was trained with.
    exact, coarse = QuadratureELBO(decoder, 12), QuadratureELBO(decoder)

    def gaps_after(**counts: int):
        def metric(encoder, tokens, evidence):
            points = {"start": encoder(tokens)}
            for name, count in counts.items():
                refine = dn.ELBOOptimizer(coarse, "unrolled", solver=steps(count), throw=False)
                points[name] = refine(tokens, points["start"]).parameters
            return {name: evidence - exact(point, tokens) for name, point in points.items()}

        return mean_over(metric, test, mesh=mesh, prefix="test", batch_size=250)

    state = fit(
        Encoder(sizes, key=encoder_key),
        optax.adam(schedule),
        loss,
        shuffled_batches(train_set, config.batch_size, config.seed),
        steps=config.steps,
        directory=config.directory,
        config=config.identity(),
        mesh=mesh,
        key=train_key,
        evaluate=gaps_after(refined=config.inner_steps),
        log_every=config.log_every,
        eval_every=config.eval_every,
        save_every=config.save_every,
        resume=config.resume,
        tensorboard=config.tensorboard,
    )
    seconds = time.perf_counter() - began
    final = gaps_after(refined=config.inner_steps, optimal=400)(state.model)
    gaps = {name.removeprefix("test/"): value for name, value in final}
    print(f"\ngap to log p(x), nats, mean over {len(held_out)} held-out sequences; encoder trained by {config.mode}")
    for name, what in (
        ("start", "at the encoder's proposal"),
        ("refined", f"after {config.inner_steps} steps"),
        ("optimal", "after 400 steps"),
    ):
        print(f"  {what:28}{gaps[name]:8.4f}")
    print(f"log p(x)       {float(jnp.mean(evidence)):.4f} nats, mean")
    print(f"time           {seconds:.1f} s with compilation, on {mesh.size} {jax.default_backend()} device(s)")
    print(f"files          {config.directory.resolve()}: metrics.jsonl, checkpoints/")
    return state, gaps


def main(args: list[str] | None = None) -> None:
    import tyro

    train(tyro.cli(Config, args=args, prog="python -m train.savi_oracle", description=__doc__))


if __name__ == "__main__":
    main()
