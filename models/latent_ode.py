r"""A latent ODE for irregularly sampled series, and a bidirectional GRU that is told the gaps, to compare it with.

Shapes of one example: times `(n,)`, ascending in [0, 1]; values and mask `(n, channels)`, the mask 1 where a value may be seen ->
`(predictions (n, channels), a scalar KL term)`. Batches by `jax.vmap`; each series has its own times.

- `latent_ode`: a GRU reads the observed values backwards in time and gives a Gaussian over $z_0$; $\dot z = f(z)$ moves it from t = 0
  through all times (`SaveAt(ts)`), and an MLP reads predictions off. The same $z_0$ explains the whole series.
- `gru`: one GRU from each side, fed values, mask, time and time gap; the prediction at a time uses the state just before it from either side
  and the gaps to the last values that they read, never the value itself. Its KL term is 0.

Solver: `Reversible(Heun())` with `ReversibleAdjoint` (reversible Heun is unstable where solutions decay). Parameters and times are
float32.

References: Rubanova et al. 2019, arXiv:1907.03907; Chen et al. 2018, arXiv:1806.07366.
"""

from dataclasses import dataclass
from typing import Literal

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

import declarative as dn


@dataclass(frozen=True)
class LatentODEConfig:
    model: Literal["latent_ode", "gru"] = "latent_ode"
    channels: int = 1
    latent: int = 8
    """Size of z."""
    hidden: int = 32
    """State of the GRU, and hidden units of every MLP."""
    steps: int = 32
    """Steps of the solver over [0, 1]."""
    speed: float = 15.0
    """Factor of the field: how many natural time units pass in [0, 1]."""


def _gaps(times: Float[Array, " n"], seen: Float[Array, " n"], reverse: bool) -> Float[Array, " n"]:
    """At each time, how long ago the last time was at which something was seen (0 before the first)."""

    def step(last, now):
        t, s = now
        return jnp.where(s > 0, t, last), jnp.abs(t - last)

    return jax.lax.scan(step, times[-1] if reverse else times[0], (times, seen), reverse=reverse)[1]


def _read(cell, times, values, mask, reverse: bool) -> Float[Array, "n+1 hidden"]:
    """States of the GRU in the order of its reading, the first before anything; unchanged by times at which nothing is seen."""
    seen = jnp.max(mask, axis=1)
    when = jnp.stack([times, _gaps(times, seen, reverse)], axis=1)
    inputs = jnp.concatenate([values * mask, mask, when], axis=1)
    if reverse:
        inputs, seen = inputs[::-1], seen[::-1]

    def step(state, now):
        x, s = now
        state = jnp.where(s > 0, cell(x, state), state)
        return state, state

    start = jnp.zeros(cell.hidden_size, jnp.float32)
    return jnp.concatenate([start[None], jax.lax.scan(step, start, (inputs, seen))[1]])


class Field(eqx.Module):
    mlp: eqx.nn.MLP
    speed: float = eqx.field(static=True)

    def __call__(self, t, z: Float[Array, " latent"], args: None) -> Float[Array, " latent"]:
        del t, args
        return self.speed * self.mlp(z)


class LatentODE(eqx.Module):
    cell: eqx.nn.GRUCell
    posterior: eqx.nn.Linear
    ode: dn.NeuralODE
    decoder: eqx.nn.MLP

    def __init__(self, config: LatentODEConfig, *, key: PRNGKeyArray):
        keys = jr.split(key, 4)
        c, z, h = config.channels, config.latent, config.hidden
        self.cell = eqx.nn.GRUCell(2 * c + 2, h, key=keys[0], dtype=jnp.float32)
        self.posterior = eqx.nn.Linear(h, 2 * z, key=keys[1], dtype=jnp.float32)
        field = Field(eqx.nn.MLP(z, z, h, 2, activation=jnp.tanh, key=keys[2], dtype=jnp.float32), config.speed)
        self.ode = dn.NeuralODE(field, dn.Reversible(dfx.Heun()), steps=config.steps, throw=False)
        self.decoder = eqx.nn.MLP(z, c, h, 1, activation=jnp.tanh, key=keys[3], dtype=jnp.float32)

    def encode(self, times, values, mask) -> tuple[Float[Array, " latent"], Float[Array, " latent"]]:
        """Mean and logarithm of the standard deviation of z at t = 0."""
        mean, log_std = jnp.split(self.posterior(_read(self.cell, times, values, mask, True)[-1]), 2)
        return mean, log_std - 2  # starts sharp, so that the decoder sees a signal

    def decode(self, z: Float[Array, " latent"], times: Float[Array, " n"]) -> Float[Array, "n channels"]:
        return jax.vmap(self.decoder)(self.ode(z, ts=times))

    def __call__(
        self,
        times: Float[Array, " n"],
        values: Float[Array, "n channels"],
        mask: Float[Array, "n channels"],
        noise: Float[Array, " latent"] | None = None,
    ) -> tuple[Float[Array, "n channels"], Float[Array, ""]]:
        """With standard normal `noise` one sample of the posterior is decoded, without it the posterior's mean."""
        mean, log_std = self.encode(times, values, mask)
        divergence = jnp.sum((jnp.exp(2 * log_std) + mean**2 - 1) / 2 - log_std)
        return self.decode(mean if noise is None else mean + jnp.exp(log_std) * noise, times), divergence


class BidirectionalGRU(eqx.Module):
    forwards: eqx.nn.GRUCell
    backwards: eqx.nn.GRUCell
    decoder: eqx.nn.MLP

    def __init__(self, config: LatentODEConfig, *, key: PRNGKeyArray):
        keys, c, h = jr.split(key, 3), config.channels, config.hidden
        self.forwards = eqx.nn.GRUCell(2 * c + 2, h, key=keys[0], dtype=jnp.float32)
        self.backwards = eqx.nn.GRUCell(2 * c + 2, h, key=keys[1], dtype=jnp.float32)
        self.decoder = eqx.nn.MLP(2 * h + 2, c, h, 2, activation=jnp.tanh, key=keys[2], dtype=jnp.float32)

    def __call__(
        self,
        times: Float[Array, " n"],
        values: Float[Array, "n channels"],
        mask: Float[Array, "n channels"],
        noise: Float[Array, " latent"] | None = None,
    ) -> tuple[Float[Array, "n channels"], Float[Array, ""]]:
        del noise
        seen = jnp.max(mask, axis=1)
        before = _read(self.forwards, times, values, mask, False)[:-1]
        after = _read(self.backwards, times, values, mask, True)[:-1][::-1]
        gaps = jnp.stack([_gaps(times, seen, reverse) for reverse in (False, True)], axis=1)
        return jax.vmap(self.decoder)(jnp.concatenate([before, after, gaps], axis=1)), jnp.zeros((), jnp.float32)


def make(config: LatentODEConfig, *, key: PRNGKeyArray) -> LatentODE | BidirectionalGRU:
    if config.model not in ("latent_ode", "gru"):
        raise ValueError(f"model must be latent_ode or gru, but is {config.model!r}.")
    return (LatentODE if config.model == "latent_ode" else BidirectionalGRU)(config, key=key)
