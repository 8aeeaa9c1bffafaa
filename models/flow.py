r"""A continuous normalising flow: a density as the base density carried along a differential equation.

Shapes of one example: `x (d,)` -> log-density, a scalar in nats. Batches by `jax.vmap`. The data x are where $\dot x = f(t, x)$ starts at
t = 0, z is where it arrives at t = 1, and with z standard normal

$$ \log p(x) = \log N(z; 0, I) + \int_0^1 \operatorname{div} f(t, x(t))\,dt. $$

The divergence is exact (d products Jv a step), or Hutchinson's unbiased estimate $\epsilon^\top J \epsilon$ (one product) with one noise
vector for the whole solve: noise is an argument, so the field is a deterministic function that the backward pass evaluates again.
The field's last layer starts at zero: an untrained flow is the identity.

Solver: the reversible Heun method with `ReversibleAdjoint`; memory of the gradient does not grow with the number of steps. Parameters
and time are float32.

References: Chen et al. 2018, arXiv:1806.07366; Grathwohl et al. 2019, arXiv:1810.01367 (FFJORD).
"""

from dataclasses import dataclass
from typing import Literal

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

import declarative as dn


@dataclass(frozen=True)
class FlowConfig:
    size: int = 2
    """d."""
    hidden: int = 64
    """Hidden units of the field, in each of `layers` layers."""
    layers: int = 2
    steps: int = 40
    """Steps of the solver over [0, 1]."""
    adjoint: Literal["reversible", "checkpointed"] = "reversible"


class Flow(eqx.Module):
    mlp: eqx.nn.MLP
    solver: dfx.AbstractSolver
    adjoint: dfx.AbstractAdjoint
    size: int = eqx.field(static=True)
    steps: int = eqx.field(static=True)

    def __init__(self, config: FlowConfig, *, key: PRNGKeyArray):
        if config.adjoint not in ("reversible", "checkpointed"):
            raise ValueError(f"adjoint must be reversible or checkpointed, but is {config.adjoint!r}.")
        d = config.size
        mlp = eqx.nn.MLP(d + 1, d, config.hidden, config.layers, activation=jnp.tanh, key=key, dtype=jnp.float32)
        last = lambda mlp: (mlp.layers[-1].weight, mlp.layers[-1].bias)
        self.mlp = eqx.tree_at(last, mlp, tuple(jnp.zeros_like(leaf) for leaf in last(mlp)))
        self.solver = dfx.ReversibleHeun()
        reversible = config.adjoint == "reversible"
        self.adjoint = dn.ReversibleAdjoint() if reversible else dfx.RecursiveCheckpointAdjoint()
        self.size, self.steps = d, config.steps

    def velocity(self, t: Float[Array, ""], x: Float[Array, " d"]) -> Float[Array, " d"]:
        return self.mlp(jnp.append(x, t))

    def forward(
        self, x: Float[Array, " d"], noise: Float[Array, " d"] | None = None
    ) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        """`(z, integral of the divergence)`: exact without `noise`, else estimated with it (mean 0, covariance I)."""

        def field(t, y, noise):
            at = lambda x: self.velocity(t, x)
            if noise is not None:
                v, product = jax.jvp(at, (y[0],), (noise,))
                return v, jnp.vdot(noise, product)
            v, pushforward = jax.linearize(at, y[0])
            return v, jnp.trace(jax.vmap(pushforward)(jnp.eye(self.size, dtype=x.dtype)))

        return self._solve(field, (x, jnp.zeros((), x.dtype)), noise, 0.0, 1.0)

    def inverse(self, z: Float[Array, " d"]) -> Float[Array, " d"]:
        """The x that flows to z: a sample of the density if z is one of the standard normal."""
        return self._solve(lambda t, x, args: self.velocity(t, x), z, None, 1.0, 0.0)

    def log_density(self, x: Float[Array, " d"], noise: Float[Array, " d"] | None = None) -> Float[Array, ""]:
        z, divergence = self.forward(x, noise)
        return base_log_density(z) + divergence

    def _solve(self, field, y0, args, start: float, end: float):
        # Both fields close over the network; the layer gives it its gradient all the same.
        options = {"adjoint": self.adjoint, "steps": self.steps, "t0": start, "t1": end, "throw": False}
        return dn.NeuralODE(field, self.solver, **options)(y0, args)


def base_log_density(z: Float[Array, " d"]) -> Float[Array, ""]:
    return jnp.sum(jax.scipy.stats.norm.logpdf(z))


def make(config: FlowConfig, *, key: PRNGKeyArray) -> Flow:
    return Flow(config, key=key)
