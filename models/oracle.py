r"""A generative model of short sequences whose evidence is known: two latent variables, so that log p(x) is a sum over a grid.

Shapes of one example: tokens `(length,)`, int32. z ~ N(0, I) in two dimensions; the decoder, a GRU that sees z and the token before, gives the
next token's distribution. Its weights are drawn at random, never trained: the oracle. What is trained is the encoder, an MLP from one-hot
tokens to the mean and log standard deviation of a diagonal Gaussian.

The ELBO takes its expectation by Gauss-Hermite quadrature, so it has no noise, and neither has the inner problem.

Reference: the oracle experiment of Kim et al. 2018, arXiv:1802.02550, section 4.1, at a smaller scale.
"""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

import declarative as dn


@dataclass(frozen=True)
class OracleConfig:
    length: int = 5
    vocabulary: int = 20
    state: int = 12
    """Size of the decoder's GRU."""
    sharpness: float = 3.0
    """Factor of the decoder's random weights: how much z matters."""
    hidden: int = 32
    """Hidden units of the encoder."""


class Decoder(eqx.Module):
    start: eqx.nn.Linear
    embedding: eqx.nn.Embedding
    cell: eqx.nn.GRUCell
    readout: eqx.nn.Linear

    def __init__(self, config: OracleConfig, *, key: PRNGKeyArray):
        keys = jr.split(key, 4)
        v, h = config.vocabulary, config.state
        self.start = eqx.nn.Linear(2, h, key=keys[0], dtype=jnp.float32)
        self.embedding = eqx.nn.Embedding(v + 1, h, key=keys[1], dtype=jnp.float32)
        self.cell = eqx.nn.GRUCell(h + 2, h, key=keys[2], dtype=jnp.float32)
        self.readout = eqx.nn.Linear(h, v, key=keys[3], dtype=jnp.float32)

    def _step(self, z, state, before):
        state = self.cell(jnp.concatenate([self.embedding(before), z]), state)
        return state, jax.nn.log_softmax(self.readout(state))

    def _begin(self, z):
        return jnp.tanh(self.start(z)), jnp.asarray(self.readout.out_features, jnp.int32)

    def __call__(self, z: Float[Array, "2"], tokens: Int[Array, " length"]) -> Float[Array, ""]:
        """log p(tokens | z), in nats."""

        def step(carry, token):
            state, scores = self._step(z, *carry)
            return (state, token), scores[token]

        return jnp.sum(jax.lax.scan(step, self._begin(z), tokens)[1])

    def sample(self, length: int, *, key: PRNGKeyArray) -> Int[Array, " length"]:
        z_key, key = jr.split(key)
        z = jr.normal(z_key, (2,), jnp.float32)

        def step(carry, key):
            state, scores = self._step(z, *carry)
            token = jr.categorical(key, scores).astype(jnp.int32)
            return (state, token), token

        return jax.lax.scan(step, self._begin(z), jr.split(key, length))[1]

    def log_evidence(self, tokens: Int[Array, " length"], points: int = 81, reach: float = 5.0) -> Float[Array, ""]:
        """log p(tokens) by the trapezoidal rule on a grid, `points` to a side over [-reach, reach]."""
        line = jnp.linspace(-reach, reach, points, dtype=jnp.float32)
        grid = jnp.stack(jnp.meshgrid(line, line), axis=-1).reshape(-1, 2)
        prior = jnp.sum(jax.scipy.stats.norm.logpdf(grid), axis=1)
        joint = jax.vmap(lambda z: self(z, tokens))(grid) + prior
        return jax.nn.logsumexp(joint) + 2 * jnp.log(line[1] - line[0])


class QuadratureELBO(eqx.Module):
    """`elbo(parameters, tokens)` in nats, its expectation by `nodes` x `nodes` Gauss-Hermite points."""

    decoder: Decoder
    nodes: int = eqx.field(static=True, default=6)
    family: dn.DiagonalGaussian = dn.DiagonalGaussian()

    def __call__(self, parameters: dn.GaussianParameters, tokens: Int[Array, " length"]) -> Float[Array, ""]:
        line, weights = np.polynomial.hermite_e.hermegauss(self.nodes)
        points = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
        weights = np.outer(weights, weights).ravel() / (2 * np.pi)
        dtype = parameters.mean.dtype
        z = parameters.mean[None] + jnp.exp(parameters.log_scale)[None] * jnp.asarray(points, dtype)
        likelihood = jnp.asarray(weights, dtype) @ jax.vmap(lambda z: self.decoder(z, tokens))(z)
        return likelihood - self.family.divergence(parameters, self.family.standard(parameters))


class Encoder(eqx.Module):
    mlp: eqx.nn.MLP
    vocabulary: int = eqx.field(static=True)

    def __init__(self, config: OracleConfig, *, key: PRNGKeyArray):
        size = config.length * config.vocabulary
        self.mlp = eqx.nn.MLP(size, 4, config.hidden, 1, activation=jnp.tanh, key=key, dtype=jnp.float32)
        self.vocabulary = config.vocabulary

    def __call__(self, tokens: Int[Array, " length"]) -> dn.GaussianParameters:
        mean, log_scale = jnp.split(self.mlp(jax.nn.one_hot(tokens, self.vocabulary, dtype=jnp.float32).ravel()), 2)
        return dn.GaussianParameters(mean, log_scale)


def make_oracle(config: OracleConfig, *, key: PRNGKeyArray) -> Decoder:
    """A decoder with random weights, `sharpness` times those of an untrained network."""
    decoder = Decoder(config, key=key)
    return jax.tree.map(lambda leaf: config.sharpness * leaf if eqx.is_inexact_array(leaf) else leaf, decoder)
