r"""A score that is learnt from orders: groups whose members were put in order, each group by itself, and a soft rank to compare with.

**Model.**  A score $f_\theta(x)$ of the features of one member; a group of k is put in the order of its scores.
**Loss.**   One minus Spearman's correlation of the ranks $r$ that were given and those of the scores, made continuous (`SoftRank`):

$$ \ell(\theta) = \frac{6}{k^2 - 1} \cdot \frac1k \sum_{i=1}^{k} \big(r_\epsilon(f_\theta(x_1), \dots, f_\theta(x_k))_i - r_i\big)^2        \tag{S} $$

For $\epsilon \to 0$ it is that correlation, whose derivative is zero almost everywhere; for a large $\epsilon$, where all the ranks are one block,
$r_\epsilon = (k + 1)/2 + (f - \bar f)/\epsilon$, and (S) is a squared error of centred scores. $\epsilon$ is in the units of the scores.

Shapes of one example, a group: features `(k, d)`, ranks `(k,)` from 1 to k; scores `(k,)`. Batches by `jax.vmap`. Parameters are float32.

Reference: Blondel, Teboul, Berthet & Djolonga 2020, arXiv:2002.08871, whose label ranking has this loss. Burges et al. 2005, *Learning to rank
using gradient descent* (the logistic loss of pairs).
"""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

import declarative as dn


@dataclass(frozen=True)
class RankerConfig:
    features: int = 10
    """Numbers that describe a member."""
    hidden: int = 0
    """Hidden units of the score; 0 is a linear one."""

    def __post_init__(self):
        if self.features < 1 or self.hidden < 0:
            raise ValueError(
                f"features must be at least 1 and hidden at least 0, but are {self.features} and {self.hidden}."
            )


class Ranker(eqx.Module):
    """The features of a group to the scores of its members."""

    score: eqx.nn.Linear | eqx.nn.MLP

    def __init__(self, config: RankerConfig, *, key: PRNGKeyArray):
        if config.hidden:
            self.score = eqx.nn.MLP(config.features, "scalar", config.hidden, 1, jnp.tanh, key=key, dtype=jnp.float32)
        else:
            # An order has no use for a constant.
            self.score = eqx.nn.Linear(config.features, "scalar", use_bias=False, key=key, dtype=jnp.float32)

    def __call__(self, features: Float[Array, "k d"]) -> Float[Array, " k"]:
        return jax.vmap(self.score)(features)


def spearman_loss(scores: Float[Array, " k"], ranks: Float[Array, " k"], strength) -> Float[Array, ""]:
    """(S)."""
    difference = dn.soft_rank(scores, strength) - ranks
    return 6 / (scores.size**2 - 1) * jnp.mean(difference**2)


def pairwise_loss(scores: Float[Array, " k"], ranks: Float[Array, " k"]) -> Float[Array, ""]:
    """The logistic loss of every pair: minus the logarithm of the odds that the scores give to the order that was found."""
    above = (ranks[:, None] > ranks[None]).astype(scores.dtype)
    return jnp.sum(above * jax.nn.softplus(scores[None] - scores[:, None])) / jnp.maximum(jnp.sum(above), 1)
