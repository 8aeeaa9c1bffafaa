r"""Denoising of a piecewise constant signal: total variation, its learnt version, and the network to compare them with.

**Problem.**  $z^*(y) = \arg\min_z \tfrac12\|y - z\|^2 + \sum_i w_i |(Dz)_i|$; with first differences for $D$ and $w_i = \lambda$ that is total
variation                                                                                                                       (P)
**Dual.**     $w|t| = \max_{|u| \le w} ut$ turns (P) into $\min_z \max_{-w \le u \le w} \tfrac12\|y - z\|^2 + u^\top Dz$. This is strongly convex
in $z$, linear in $u$, and the box is compact: min and max may change places. Then $z = y - D^\top u$, and what remains is, up to
$\tfrac12\|y\|^2$, a quadratic program with bounds only:
$$ u^* = \arg\min_u \tfrac12 u^\top DD^\top u - (Dy)^\top u \quad\text{subject to}\quad -w \le u \le w, \qquad z^* = y - D^\top u^*   \tag{D} $$
**Optimality.** $|u_i| < w_i$ where $(Dz)_i = 0$, and $u_i = w_i\,\mathrm{sign}\,(Dz)_i$ where the signal jumps: the active bounds are the jumps.
**Gradient.** That of the quadratic program (D), for $y$, $D$ and $w$. Not differentiable where a jump is about to vanish.

Shapes of one example: a noisy signal `(n,)` to a clean one `(n,)`, in the units of the data. Inside, signals are divided by
`scale`, and so are the weights: (P) scales with them. Batches by `jax.vmap`, under which $DD^\top$ is shared.

Reference: Amos & Kolter 2017, arXiv:1703.00443, Section 4.2. Differences: there an OptNet in $(z, t)$ with $|Dz| \le t$, all of whose
matrices are learnt, stands for (P), and its linear cost, hence $w$ too, is an affine function of $y$; here $D$ is learnt in (D), and $w$
is a small convolutional function of $Dy$, the same for all positions.
"""

from dataclasses import dataclass
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

import declarative as dn


@dataclass(frozen=True)
class DenoiseConfig:
    length: int = 100
    """Entries of a signal."""
    model: Literal["tv", "optnet", "mlp"] = "optnet"
    weight: float = 13.0
    """The weight of total variation, in the units of the data: that of `tv` and `optnet` before training."""
    weights: Literal["predicted", "constant"] = "predicted"
    """Whether the weights of `optnet` depend on the signal."""
    filters: int = 16
    """Filters of the convolution that predicts them."""
    window: int = 9
    """Entries of D y that a filter sees, an odd number."""
    width: int = 100
    """Hidden units of the network."""
    scale: float = 10.0
    """What signals are divided by inside; about the noise."""


def differences(length: int, dtype=jnp.float32) -> Float[Array, "m n"]:
    """First differences, z_(i+1) - z_i: (length - 1, length)."""
    return jnp.eye(length - 1, length, 1, dtype) - jnp.eye(length - 1, length, 0, dtype)


def total_variation(
    y: Float[Array, " n"], D: Float[Array, "m n"], w: Float[Array, " m"], program: dn.QuadraticProgram | None = None
) -> Float[Array, " n"]:
    """The minimiser of (P), from (D). `w` must not be negative; `program` is the layer that solves (D)."""
    if y.ndim != 1 or D.shape != w.shape + y.shape:
        raise ValueError(
            f"expected a signal (n,), an operator (m, n) and weights (m,), got {y.shape}, {D.shape} and {w.shape}; "
            "for a batch of signals use jax.vmap."
        )
    if program is None:
        program = dn.QuadraticProgram()
    u = program(D @ D.T, -(D @ y), lower=-w, upper=w)
    return y - u @ D


def _program() -> dn.QuadraticProgram:
    return dn.QuadraticProgram(throw=False, on_failure="zero")


class TotalVariation(eqx.Module):
    """(P) with first differences and one learnt weight."""

    log_weight: Float[Array, ""]
    program: dn.QuadraticProgram
    scale: float = eqx.field(static=True)

    def __init__(self, config: DenoiseConfig, *, key: PRNGKeyArray):
        del key
        self.log_weight = jnp.log(jnp.asarray(config.weight / config.scale, jnp.float32))
        self.program = _program()
        self.scale = config.scale

    @property
    def weight(self) -> Float[Array, ""]:
        """In the units of the data."""
        return self.scale * jnp.exp(self.log_weight)

    def __call__(self, y: Float[Array, " n"]) -> Float[Array, " n"]:
        w = jnp.broadcast_to(jnp.exp(self.log_weight), (y.size - 1,))
        return self.scale * total_variation(y / self.scale, differences(y.size, y.dtype), w, self.program)


class LearntVariation(eqx.Module):
    r"""(P) with a learnt $D$ and learnt weights, one a row.

    Predicted weights are $\log w = \log w^0 + \sum_c r_c\,\mathrm{relu}(k_c * Dy + b_c)$: near what looks like a jump they can be small, so that
    the jump is not shrunk, and elsewhere large. $r = 0$ at first: before training this is `TotalVariation`.
    """

    D: Float[Array, "m n"]
    log_weights: Float[Array, " m"]
    filters: eqx.nn.Conv1d | None
    readout: Float[Array, " c"] | None
    program: dn.QuadraticProgram
    scale: float = eqx.field(static=True)

    def __init__(self, config: DenoiseConfig, *, key: PRNGKeyArray):
        if config.window % 2 == 0:
            raise ValueError(f"window must be odd, so that a filter is centred on its row, but is {config.window}.")
        self.D = differences(config.length)
        self.log_weights = jnp.full(config.length - 1, jnp.log(config.weight / config.scale), jnp.float32)
        self.filters = self.readout = None
        if config.weights == "predicted":
            self.filters = eqx.nn.Conv1d(
                1, config.filters, config.window, padding=config.window // 2, key=key, dtype=jnp.float32
            )
            self.readout = jnp.zeros(config.filters, jnp.float32)
        self.program = _program()
        self.scale = config.scale

    def weights(self, y: Float[Array, " n"]) -> Float[Array, " m"]:
        """The weights for the signal `y`, both in the units of the data."""
        log_weights = self.log_weights
        if self.filters is not None and self.readout is not None:
            hidden = jax.nn.relu(self.filters((self.D @ y)[None] / self.scale))
            log_weights = log_weights + self.readout @ hidden
        return self.scale * jnp.exp(log_weights)

    def __call__(self, y: Float[Array, " n"]) -> Float[Array, " n"]:
        w = self.weights(y) / self.scale
        return self.scale * total_variation(y / self.scale, self.D, w, self.program)


class DenoiseMLP(eqx.Module):
    """One hidden layer of rectifiers, as in the paper."""

    first: eqx.nn.Linear
    last: eqx.nn.Linear
    scale: float = eqx.field(static=True)

    def __init__(self, config: DenoiseConfig, *, key: PRNGKeyArray):
        keys = jr.split(key)
        self.first = eqx.nn.Linear(config.length, config.width, key=keys[0], dtype=jnp.float32)
        self.last = eqx.nn.Linear(config.width, config.length, key=keys[1], dtype=jnp.float32)
        self.scale = config.scale

    def __call__(self, y: Float[Array, " n"]) -> Float[Array, " n"]:
        return self.scale * self.last(jax.nn.relu(self.first(y / self.scale)))


def make(config: DenoiseConfig, *, key: PRNGKeyArray) -> TotalVariation | LearntVariation | DenoiseMLP:
    models = {"tv": TotalVariation, "optnet": LearntVariation, "mlp": DenoiseMLP}
    return models[config.model](config, key=key)
