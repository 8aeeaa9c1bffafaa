r"""Reversible residual networks for small images, and the ordinary residual network to compare them with.

Shapes of one example: image `(height, width)` -> features `(2 w,)` -> depth x block -> logits `(classes,)`. Batches by `jax.vmap`. A branch
is layer normalisation, `w -> hidden`, GELU, `hidden -> w`.

| model      | block                                                          | parameters of a block |
|------------|----------------------------------------------------------------|-----------------------|
| `revnet`   | $y_1 = x_1 + f(x_2)$, $y_2 = x_2 + g(y_1)$ on halves of w       | two branches of w     |
| `momentum` | $v' = \gamma v + (1-\gamma) f(x)$, $x' = x + v'$, x and v of 2 w | one branch of 2 w     |
| `resnet`   | $x' = x + f(x)$ on 2 w                                           | one branch of 2 w     |

A branch of 2 w has as many weights as two of w. Parameters are float32.

References: Gomez et al. 2017, arXiv:1707.04585; Sander et al. 2021, arXiv:2102.07870.
"""

from dataclasses import dataclass
from typing import Any, Literal, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

import declarative as dn


@dataclass(frozen=True)
class RevNetConfig:
    image: tuple[int, int] = (8, 8)
    classes: int = 10
    model: Literal["revnet", "momentum", "resnet"] = "revnet"
    depth: int = 16
    """Number of blocks."""
    width: int = 32
    """w: half of the features."""
    hidden: int = 32
    """Hidden units of a branch."""
    residual: float = 0.1
    """Factor of a branch's last weights at initialisation; small ones make a block nearly the identity."""
    gamma: float = 0.9
    """Of the momentum blocks."""
    backward: Literal["reconstruct", "store"] = "reconstruct"


class Branch(eqx.Module):
    norm: eqx.nn.LayerNorm
    first: eqx.nn.Linear
    last: eqx.nn.Linear

    def __init__(self, width: int, hidden: int, residual: float, *, key: PRNGKeyArray):
        keys = jr.split(key)
        self.norm = eqx.nn.LayerNorm(width, dtype=jnp.float32)
        self.first = eqx.nn.Linear(width, hidden, key=keys[0], dtype=jnp.float32)
        last = eqx.nn.Linear(hidden, width, key=keys[1], dtype=jnp.float32)
        self.last = eqx.tree_at(lambda layer: layer.weight, last, residual * last.weight)

    def __call__(self, x: Float[Array, " w"]) -> Float[Array, " w"]:
        return self.last(jax.nn.gelu(self.first(self.norm(x))))


class ResidualSequence(eqx.Module):
    """x + f(x), `depth` times; stores its activations."""

    blocks: Any

    def __call__(self, x: Float[Array, " features"]) -> Float[Array, " features"]:
        arrays, static = eqx.partition(self.blocks, eqx.is_array)
        return jax.lax.scan(lambda x, arrays: (x + eqx.combine(arrays, static)(x), None), x, arrays)[0]


class RevNet(eqx.Module):
    stem: eqx.nn.Linear
    body: dn.ReversibleSequence | ResidualSequence
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear
    model: str = eqx.field(static=True)

    def __init__(self, config: RevNetConfig, *, key: PRNGKeyArray):
        keys = jr.split(key, 3)
        w, wide = config.width, 2 * config.width
        branch = lambda width, key: Branch(width, config.hidden, config.residual, key=key)
        self.stem = eqx.nn.Linear(config.image[0] * config.image[1], wide, key=keys[0], dtype=jnp.float32)
        if config.model == "resnet":
            make = lambda key: branch(wide, key)
            self.body = ResidualSequence(eqx.filter_vmap(make)(jr.split(keys[1], config.depth)))
        else:
            halves = lambda key: dn.ReversibleBlock(*(branch(w, key) for key in jr.split(key)))
            whole = lambda key: dn.MomentumBlock(branch(wide, key), config.gamma)
            make = halves if config.model == "revnet" else whole
            self.body = dn.ReversibleSequence(make, config.depth, key=keys[1], backward=config.backward)
        self.norm = eqx.nn.LayerNorm(wide, dtype=jnp.float32)
        self.head = eqx.nn.Linear(wide, config.classes, key=keys[2], dtype=jnp.float32)
        self.model = config.model

    def pair(self, image: Float[Array, "height width"]) -> tuple[Array, Array]:
        """What the reversible body starts from."""
        x = self.stem(image.ravel())
        if self.model == "momentum":
            return x, jnp.zeros_like(x)
        first, second = jnp.split(x, 2)
        return first, second

    def __call__(self, image: Float[Array, "height width"]) -> Float[Array, " classes"]:
        if isinstance(self.body, ResidualSequence):
            x = self.body(self.stem(image.ravel()))
        else:
            # Of the momentum network's pair the first is x.
            first, second = cast(tuple[Array, Array], self.body(self.pair(image)))
            x = first if self.model == "momentum" else jnp.concatenate([first, second])
        return self.head(self.norm(x))


def make(config: RevNetConfig, *, key: PRNGKeyArray) -> RevNet:
    return RevNet(config, key=key)
