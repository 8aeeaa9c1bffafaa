r"""A small PointNet whose pooling is a field: the maximum, the mean, or a declarative robust pooling.

A set of points has no order, so a network of sets looks at each point by itself and then pools (Qi et al. 2017, arXiv:1612.00593). What is
pooled decides what a few wrong points can do. The maximum is taken over everything that is there: one outlier is enough to change it. A
robust mean, $\arg\min_u \sum_i \phi(u - f_i; \alpha)$ of the features $f_i$, lets a point count less the further it lies from the rest
(`declarative.RobustPool`; Gould et al. 2019, arXiv:1909.04866).

Shapes of one example:

    points (n, 2) -> features (n, width), the same layers for each point -> pooled (width,) -> logits (classes,)

Batches by `jax.vmap`. Parameters are float32, whatever `jax_enable_x64` says.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

import declarative as dn

Pooling = Literal["max", "mean", "pseudo-huber", "huber", "welsch", "truncated-quadratic"]


@dataclass(frozen=True)
class PointNetConfig:
    dimensions: int = 2
    """Coordinates of a point."""
    width: int = 64
    """Features of a point, and hidden units."""
    classes: int = 10
    pooling: Pooling = "pseudo-huber"
    alpha: float = 0.03
    """Where a feature's distance from the centre begins to count less. `max` and `mean` have none."""

    def __post_init__(self):
        for name in ("dimensions", "width", "classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but is {getattr(self, name)}.")
        if self.pooling not in get_args(Pooling):
            raise ValueError(f"pooling must be one of {', '.join(get_args(Pooling))}, but is {self.pooling!r}.")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be positive, but is {self.alpha}.")


def make_pooling(config: PointNetConfig) -> Callable:
    """features (n, width) -> (width,)."""
    if config.pooling == "max":
        return lambda features: jnp.max(features, axis=0)
    if config.pooling == "mean":
        return lambda features: jnp.mean(features, axis=0)
    # throw=False: training lowers without host callbacks; a set whose pooling failed is NaN, and `train.loop.fit` stops there.
    return dn.RobustPool(config.pooling, config.alpha, start="centre", throw=False)


class PointNet(eqx.Module):
    """points (n, dimensions), float32, to logits (classes,)."""

    point: eqx.nn.MLP
    norm: eqx.nn.LayerNorm
    head: eqx.nn.MLP
    pool: Callable
    config: PointNetConfig = eqx.field(static=True)

    def __init__(self, config: PointNetConfig, *, key: PRNGKeyArray):
        k1, k2 = jr.split(key)
        width = config.width
        mlp = lambda inputs, outputs, depth, key: eqx.nn.MLP(
            inputs, outputs, width, depth, jax.nn.relu, dtype=jnp.float32, key=key
        )
        self.point = mlp(config.dimensions, width, 2, k1)
        self.norm = eqx.nn.LayerNorm(width, dtype=jnp.float32)
        self.head = mlp(width, config.classes, 1, k2)
        self.pool = make_pooling(config)
        self.config = config

    def features(self, points: Float[Array, "n dimensions"]) -> Float[Array, "n width"]:
        """What is pooled: of the points one by one."""
        if points.ndim != 2 or points.shape[1] != self.config.dimensions:
            raise ValueError(
                f"this model takes one set of points (n, {self.config.dimensions}), not {points.shape}; use jax.vmap for a batch."
            )
        return jax.vmap(self.point)(points - 0.5)

    def __call__(self, points: Float[Array, "n dimensions"]) -> Float[Array, " classes"]:
        return self.head(self.norm(self.pool(self.features(points))))
