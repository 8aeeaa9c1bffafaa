r"""A small vision transformer whose attention map is any declarative node.

Attention turns a row of scores $s_i = q^\top k_i / \sqrt d$ into weights $p$ on the simplex. Softmax is one such map; this
model takes any node `node(scores) -> weights`. With `Sparsemax` and `Entmax` most weights are *exactly* zero, so that a
head looks at a few patches and one can read which. `LearnedEntmax` lets every head learn how sparse it is: a learnt
$\alpha$ between softmax ($\alpha \to 1$) and sparsemax ($\alpha = 2$), with its gradient from the implicit function theorem.

Shapes of one example, with `tokens = patches + 1` (a class token is read out):

    image (height, width) -> patches (patches, width) -> tokens (tokens, width)
      depth × block: scores (heads, tokens, tokens) -> weights, same shape -> tokens (tokens, width)
    -> logits (classes,)

Batches by `jax.vmap`. Parameters are float32, whatever `jax_enable_x64` says.

References: Dosovitskiy et al. 2021 (the transformer on patches), arXiv:2010.11929; Correia, Niculae & Martins 2019
(attention with a learnt α per head), arXiv:1909.00015.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from declarative import AbstractAdjoint, Entmax, ImplicitAdjoint, Softmax, Sparsemax

AttentionMap = Literal["softmax", "sparsemax", "entmax", "entmax-fixed"]


@dataclass(frozen=True)
class TransformerConfig:
    image: tuple[int, int] = (8, 8)
    """Height and width of an image; the patch size divides both."""
    patch: int = 2
    """Side of a square patch, in pixels."""
    overlap: int = 1
    """How many pixels a patch sees beyond each of its sides. Some overlap helps much on small images."""
    classes: int = 10
    width: int = 64
    """Size of a token; the number of heads divides it."""
    depth: int = 2
    """Number of blocks."""
    heads: int = 4
    attention: AttentionMap = "softmax"
    """`entmax` learns one alpha per head, starting at `alpha`; `entmax-fixed` keeps `alpha`."""
    alpha: float = 1.5
    adjoint: Literal["closed-form", "implicit"] = "closed-form"
    """The node's gradient: its formula, or a linear solve with its optimality conditions, whose health is then logged."""

    def __post_init__(self):
        for name in ("patch", "classes", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but is {getattr(self, name)}.")
        if self.overlap < 0:
            raise ValueError(f"overlap must not be negative, but is {self.overlap}.")
        if self.attention not in get_args(AttentionMap):
            raise ValueError(
                f"attention must be one of {', '.join(get_args(AttentionMap))}; {self.attention!r} is none."
            )
        if self.attention == "entmax" and not 1 < self.alpha < 2:
            raise ValueError(
                f"alpha must lie strictly between 1 and 2 where it is learnt, but is {self.alpha}. Start from 1.5, "
                'or choose attention="entmax-fixed" for a fixed alpha in (1, 4].'
            )
        if not 1 < self.alpha <= 4:
            raise ValueError(
                f'alpha must lie in (1, 4], but is {self.alpha}. For alpha = 1 choose attention="softmax".'
            )
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, but {self.width} is not one of {self.heads}.")
        height, width = self.image
        if min(height, width) < 1 or height % self.patch or width % self.patch:
            raise ValueError(
                f"patch must divide the image, but {self.patch} does not divide {height} x {width}. "
                f"Both sides are multiples of {', '.join(map(str, _divisors(math.gcd(height, width))))}."
            )

    @property
    def patches(self) -> int:
        return (self.image[0] // self.patch) * (self.image[1] // self.patch)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


# A step of Adam has the size of the learning rate, whatever the gradient. This factor lets alpha cross its interval within
# the few hundred steps of a run; without it no head moves by more than 0.02.
_PACE = 10.0


class LearnedEntmax(eqx.Module):
    r"""`Entmax` with a learnt $\alpha = 1 + \sigma(10 a) \in (1, 2)$: no step of an optimizer can leave the interval."""

    raw: Float[Array, ""]
    adjoint: AbstractAdjoint | None

    def __init__(self, alpha: float, *, adjoint: AbstractAdjoint | None = None):
        self.raw = jnp.asarray(math.log((alpha - 1) / (2 - alpha)) / _PACE, jnp.float32)
        self.adjoint = adjoint

    @property
    def alpha(self) -> Float[Array, ""]:
        return 1 + jax.nn.sigmoid(_PACE * self.raw)

    def __call__(self, z: Float[Array, " n"], *, mask: Bool[Array, " n"] | None = None) -> Float[Array, " n"]:
        return Entmax(self.alpha, adjoint=self.adjoint, throw=False)(z, mask=mask)


def attention_map(config: TransformerConfig) -> Callable:
    """A fresh map for one head."""
    # throw=False: a run-time error needs a host callback, and training lowers for TPU and GPU without one. A row whose solve
    # failed is NaN instead, and `train.loop.fit` stops at the first of them.
    adjoint = ImplicitAdjoint() if config.adjoint == "implicit" else None
    match config.attention:
        case "softmax":
            return Softmax(adjoint=adjoint, throw=False)
        case "sparsemax":
            return Sparsemax(adjoint=adjoint, throw=False)
        case "entmax":
            return LearnedEntmax(config.alpha, adjoint=adjoint)
        case "entmax-fixed":
            return Entmax(config.alpha, adjoint=adjoint, throw=False)


class Attention(eqx.Module):
    """Multi-head self-attention: tokens (tokens, width) -> tokens (tokens, width).

    `maps` is one node with a leading axis `heads` on its array leaves, if it has any: head h uses slice h.
    """

    query_key_value: eqx.nn.Linear
    output: eqx.nn.Linear
    maps: Callable
    heads: int = eqx.field(static=True)

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray):
        k1, k2 = jr.split(key)
        self.query_key_value = eqx.nn.Linear(config.width, 3 * config.width, dtype=jnp.float32, key=k1)
        self.output = eqx.nn.Linear(config.width, config.width, dtype=jnp.float32, key=k2)
        heads = [attention_map(config) for _ in range(config.heads)]
        self.maps = jax.tree.map(lambda *a: jnp.stack(a) if eqx.is_array(a[0]) else a[0], *heads)
        self.heads = config.heads

    def __call__(
        self, x: Float[Array, "tokens width"]
    ) -> tuple[Float[Array, "tokens width"], Float[Array, "heads tokens tokens"]]:
        tokens, width = x.shape
        qkv = jax.vmap(self.query_key_value)(x).reshape(tokens, 3, self.heads, width // self.heads)
        query, key, value = jnp.moveaxis(qkv, (1, 2), (0, 1))  # each (heads, tokens, width / heads)
        scores = query @ jnp.swapaxes(key, -1, -2) / math.sqrt(width // self.heads)
        weights = eqx.filter_vmap(lambda node, rows: jax.vmap(node)(rows), in_axes=(eqx.if_array(0), 0))(
            self.maps, scores
        )
        mixed = jnp.moveaxis(weights @ value, 0, 1).reshape(tokens, width)
        return jax.vmap(self.output)(mixed), weights


class Block(eqx.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    norm1: eqx.nn.LayerNorm
    attention: Attention
    norm2: eqx.nn.LayerNorm
    hidden: eqx.nn.Linear
    output: eqx.nn.Linear

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray):
        k1, k2, k3 = jr.split(key, 3)
        self.norm1 = eqx.nn.LayerNorm(config.width, dtype=jnp.float32)
        self.attention = Attention(config, key=k1)
        self.norm2 = eqx.nn.LayerNorm(config.width, dtype=jnp.float32)
        self.hidden = eqx.nn.Linear(config.width, 2 * config.width, dtype=jnp.float32, key=k2)
        self.output = eqx.nn.Linear(2 * config.width, config.width, dtype=jnp.float32, key=k3)

    def __call__(
        self, x: Float[Array, "tokens width"]
    ) -> tuple[Float[Array, "tokens width"], Float[Array, "heads tokens tokens"]]:
        mixed, weights = self.attention(jax.vmap(self.norm1)(x))
        x = x + mixed
        mlp = jax.vmap(lambda t: self.output(jax.nn.gelu(self.hidden(self.norm2(t)))))
        return x + mlp(x), weights


class VisionTransformer(eqx.Module):
    """One image (height, width), float32 in [0, 1], to logits (classes,)."""

    embed: eqx.nn.Conv2d
    positions: Float[Array, "tokens width"]
    blocks: list[Block]
    norm: eqx.nn.LayerNorm
    readout: eqx.nn.Linear
    config: TransformerConfig = eqx.field(static=True)

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray):
        k1, k2, k3, k4 = jr.split(key, 4)
        size = config.patch + 2 * config.overlap
        self.embed = eqx.nn.Conv2d(1, config.width, size, config.patch, config.overlap, dtype=jnp.float32, key=k1)
        # As large as what is embedded (the usual 0.02 is lost beside it for the first half of a run this short).
        self.positions = 0.25 * jr.normal(k2, (config.patches + 1, config.width), jnp.float32)
        self.blocks = [Block(config, key=k) for k in jr.split(k3, config.depth)]
        self.norm = eqx.nn.LayerNorm(config.width, dtype=jnp.float32)
        self.readout = eqx.nn.Linear(config.width, config.classes, dtype=jnp.float32, key=k4)
        self.config = config

    def with_maps(
        self, image: Float[Array, "height width"]
    ) -> tuple[Float[Array, " classes"], Float[Array, "depth heads tokens tokens"]]:
        """Logits and every attention weight: row i of a map says where token i looks; token 0 is the class token."""
        if image.shape != self.config.image:
            raise ValueError(
                f"this model takes one image of shape {self.config.image}, not {image.shape}; use jax.vmap for a batch."
            )
        patches = self.embed(image[None]).reshape(self.config.width, self.config.patches).T
        x = self.positions.at[1:].add(patches)  # row 0, which has no patch, is the class token
        maps = []
        for block in self.blocks:
            x, weights = block(x)
            maps.append(weights)
        return self.readout(self.norm(x[0])), jnp.stack(maps)

    def __call__(self, image: Float[Array, "height width"]) -> Float[Array, " classes"]:
        return self.with_maps(image)[0]

    def alphas(self) -> Float[Array, "depth heads"] | None:
        """The learnt alpha of every head, or None where none is learnt."""
        maps = [block.attention.maps for block in self.blocks]
        learnt = [jax.vmap(lambda m: m.alpha)(m) for m in maps if isinstance(m, LearnedEntmax)]
        return jnp.stack(learnt) if learnt else None
