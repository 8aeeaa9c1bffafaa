r"""A network that puts the pieces of a picture back in place: it scores every piece at every place, and a layer makes a plan of the scores.

Piece $i$ of n is described by a network of its own pixels (with `context` also of what all pieces look like on average), which gives its
scores $S_{i1}, \ldots, S_{in}$ at the places. Nothing tells the network in which order the pieces come: permuting them permutes the rows of
S. The plan is

- `transport`: $P = \arg\max_P \langle S, P\rangle - \epsilon \sum P\log P$ over doubly stochastic matrices,
  `declarative.EntropicTransport`. A place that one piece takes is closed to the others (Mena et al. 2018, arXiv:1802.08665, who run
  some steps of Sinkhorn's algorithm);
- `softmax`: the same without the constraint on the columns. Every piece chooses for itself.

Shapes of one example: pieces (n, p), p pixels each; plan (n, n), pieces by places.
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
class JigsawConfig:
    places: int = 4
    pixels: int = 16
    """Of one piece."""
    width: int = 96
    context: bool = False
    """Whether a piece's scores depend on what the other pieces look like."""
    layer: Literal["transport", "softmax"] = "transport"
    epsilon: float = 1.0
    """Weight of the entropy, in units of the scores."""


class Jigsaw(eqx.Module):
    look: eqx.nn.MLP
    place: eqx.nn.MLP
    transport: dn.EntropicTransport
    softmax: dn.Softmax
    layer: str = eqx.field(static=True)
    context: bool = eqx.field(static=True)

    def __init__(self, config: JigsawConfig, *, key: PRNGKeyArray):
        one, two = jr.split(key)
        width = config.width
        self.look = eqx.nn.MLP(config.pixels, width, width, 1, activation=jax.nn.gelu, key=one, dtype=jnp.float32)
        self.place = eqx.nn.MLP(2 * width, config.places, width, 1, activation=jax.nn.gelu, key=two, dtype=jnp.float32)
        self.transport = dn.EntropicTransport(config.epsilon, throw=False, on_failure="zero")
        self.softmax = dn.Softmax(config.epsilon, throw=False)
        self.layer = config.layer
        self.context = config.context

    def scores(self, pieces: Float[Array, "n p"]) -> Float[Array, "n n"]:
        looks = jax.vmap(self.look)(pieces)
        average = jnp.mean(looks, axis=0, keepdims=True)
        others = jnp.broadcast_to(average if self.context else jnp.zeros_like(average), looks.shape)
        return jax.vmap(self.place)(jnp.concatenate([looks, others], axis=1))

    def plan(self, scores: Float[Array, "n n"]) -> Float[Array, "n n"]:
        if self.layer == "softmax":
            return jax.vmap(self.softmax)(scores)
        ones = jnp.ones_like(scores[0])
        return self.transport(-scores, ones, ones)

    def __call__(self, pieces: Float[Array, "n p"]) -> Float[Array, "n n"]:
        return self.plan(self.scores(pieces))
