r"""A neural ODE that classifies small images: the depth of the network is the time of a differential equation.

Shapes of one example: image `(height, width)` -> state `(width + augment,)` -> the state at time 1 -> logits `(classes,)`. Batches by
`jax.vmap`. The state starts as a linear map of the pixels beside `augment` zeros, moves by $\dot y = f(t, y)$ with a tanh MLP f, and is read
out linearly. Without the zeros the flow is a homeomorphism of the features, which cannot untangle what is nested.

Solver and adjoint are fields of the `declarative.NeuralODE` in the middle. `scheme` names the pairs:

| `adjoint`      | solver                 | gradient                                                    | states kept in N steps |
|----------------|------------------------|-------------------------------------------------------------|------------------------|
| `reversible`   | reversible Heun        | of the discrete solution, by reconstruction                 | constant               |
| `coupled`      | `Reversible(Heun())`   | the same; its solver is damped, at twice Heun's evaluations | constant               |
| `checkpointed` | reversible Heun        | of the discrete solution, by recomputation                  | about sqrt(2 N)        |
| `stored`       | reversible Heun        | of the discrete solution, a checkpoint at every step        | N                      |
| `direct`       | reversible Heun        | of the discrete solution, through nested loops of 16        | about 16 log_16(N)     |
| `backsolve`    | reversible Heun        | of the continuous equation, solved backwards: approximate   | constant               |

The rows with reversible Heun compute the same logits, and all but the last the same gradient. Parameters and time are float32.

References: Chen et al. 2018, arXiv:1806.07366; Dupont et al. 2019, arXiv:1904.01681 (augmentation).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

import declarative as dn

AdjointName = Literal["reversible", "coupled", "checkpointed", "stored", "direct", "backsolve"]


@dataclass(frozen=True)
class NeuralODEConfig:
    image: tuple[int, int] = (8, 8)
    classes: int = 10
    width: int = 64
    """Features that come from the image."""
    augment: int = 16
    """Features that start at zero."""
    hidden: int = 64
    """Hidden units of the field, in each of two layers."""
    steps: int = 32
    """Steps of the solver over [0, 1]."""
    adjoint: AdjointName = "reversible"


def scheme(name: str, steps: int) -> tuple[dfx.AbstractSolver, dfx.AbstractAdjoint]:
    """Solver and adjoint of that name, for so many steps."""
    match name:
        case "reversible":
            return dfx.ReversibleHeun(), dn.ReversibleAdjoint()
        case "coupled":
            return dn.Reversible(dfx.Heun()), dn.ReversibleAdjoint()
        case "checkpointed":
            return dfx.ReversibleHeun(), dfx.RecursiveCheckpointAdjoint()
        case "stored":
            return dfx.ReversibleHeun(), dfx.RecursiveCheckpointAdjoint(checkpoints=steps)
        case "direct":
            return dfx.ReversibleHeun(), dfx.DirectAdjoint()
        case "backsolve":
            return dfx.ReversibleHeun(), dfx.BacksolveAdjoint(solver=dfx.ReversibleHeun())
    raise ValueError(f"adjoint must be one of {', '.join(get_args(AdjointName))}, but is {name!r}.")


class Field(eqx.Module):
    """f(t, y): a tanh MLP of (t, y)."""

    mlp: eqx.nn.MLP

    def __init__(self, size: int, hidden: int, *, key: PRNGKeyArray):
        self.mlp = eqx.nn.MLP(size + 1, size, hidden, 2, activation=jnp.tanh, key=key, dtype=jnp.float32)

    def __call__(self, t, y: Float[Array, " size"], args: None) -> Float[Array, " size"]:
        del args
        return self.mlp(jnp.append(y, t))


class NeuralODEClassifier(eqx.Module):
    stem: eqx.nn.Linear
    ode: dn.NeuralODE
    head: eqx.nn.Linear
    augment: int = eqx.field(static=True)

    def __init__(self, config: NeuralODEConfig, *, key: PRNGKeyArray):
        keys, size = jr.split(key, 3), config.width + config.augment
        self.stem = eqx.nn.Linear(config.image[0] * config.image[1], config.width, key=keys[0], dtype=jnp.float32)
        field, (solver, adjoint) = Field(size, config.hidden, key=keys[1]), scheme(config.adjoint, config.steps)
        self.ode = dn.NeuralODE(field, solver, adjoint=adjoint, steps=config.steps, throw=False)
        self.head = eqx.nn.Linear(size, config.classes, key=keys[2], dtype=jnp.float32)
        self.augment = config.augment

    def __call__(self, image: Float[Array, "height width"]) -> Float[Array, " classes"]:
        return self.head(self.ode(jnp.pad(self.stem(image.ravel()), (0, self.augment))))


def make(config: NeuralODEConfig, *, key: PRNGKeyArray) -> NeuralODEClassifier:
    return NeuralODEClassifier(config, key=key)
