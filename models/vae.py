r"""The variational autoencoder of Dai, Wang & Wipf: a Gaussian observed through a network, with one noise variance.

Shapes of one example: `x (size,)`, float32. z ~ N(0, I) with `latent` entries, and

$$ x \mid z \sim N(\mu(z), \gamma I), \qquad q(z \mid x) = N(\mu_q, \mathrm{diag}\,\sigma_q^2). $$

$\mu$ is an MLP, or affine: then the model is probabilistic PCA, and its best log-likelihood is known (`pca_log_likelihood`). $\log\gamma$ is a
parameter. Given the rest, the best $\gamma$ is the mean squared misfit, $\gamma = \tfrac{1}{nd}\sum \mathbb E_q\|x - \mu(z)\|^2$ (`misfit`). It needs
a floor, since a model that can reproduce its data makes the density of x unbounded as $\gamma \to 0$.

References: Dai, Wang & Wipf 2019, *The usual suspects? Reassessing blame for VAE posterior collapse*, arXiv:1912.10702, Eq. 3, 4 and 10; Tipping &
Bishop 1999, *Probabilistic principal component analysis*.
"""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

import declarative as dn


@dataclass(frozen=True)
class VAEConfig:
    size: int = 64
    """Entries of x."""
    latent: int = 8
    hidden: int = 64
    """Hidden units of each layer of the encoder and, unless it is affine, the decoder."""
    layers: int = 1
    affine: bool = False
    gamma: float = 0.1
    """At the start."""


class VAE(eqx.Module):
    encoder: eqx.nn.MLP
    decoder: eqx.nn.MLP | eqx.nn.Linear
    log_gamma: Float[Array, ""]

    def __init__(self, config: VAEConfig, *, key: PRNGKeyArray):
        keys = jr.split(key)
        options = {"activation": jnp.tanh, "dtype": jnp.float32}
        d, k, h, n = config.size, config.latent, config.hidden, config.layers
        self.encoder = eqx.nn.MLP(d, 2 * k, h, n, key=keys[0], **options)
        affine = eqx.nn.Linear(k, d, key=keys[1], dtype=jnp.float32)
        self.decoder = affine if config.affine else eqx.nn.MLP(k, d, h, n, key=keys[1], **options)
        self.log_gamma = jnp.asarray(np.log(config.gamma), jnp.float32)

    def propose(self, x: Float[Array, " size"]) -> dn.GaussianParameters:
        """The encoder's variational parameters."""
        return dn.GaussianParameters(*jnp.split(self.encoder(x), 2))

    def elbo(self, samples: int = 1) -> dn.ELBO:
        """`elbo(parameters, (x, gamma), key)` in nats."""
        return dn.ELBO(Likelihood(self.decoder), dn.DiagonalGaussian(), samples=samples)

    def misfit(self, parameters: dn.GaussianParameters, x: Float[Array, " size"], key: PRNGKeyArray, samples: int):
        """The mean squared difference between an entry of x and its reconstruction under q."""
        z = dn.DiagonalGaussian().sample(parameters, key, samples)
        return jnp.mean((x[None] - jax.vmap(self.decoder)(z)) ** 2)


class Likelihood(eqx.Module):
    """log p(x | z) with the data (x, gamma)."""

    decoder: eqx.nn.MLP | eqx.nn.Linear

    def __call__(self, z, data):
        x, gamma = data
        return -jnp.sum((x - self.decoder(z)) ** 2) / (2 * gamma) - x.size / 2 * jnp.log(2 * jnp.pi * gamma)


class AffineELBO(eqx.Module):
    """`elbo(parameters, x)` in nats of an affine decoder, without sampling."""

    weight: Float[Array, "size latent"]
    bias: Float[Array, " size"]
    gamma: float = eqx.field(static=True)

    def __call__(self, parameters: dn.GaussianParameters, x: Float[Array, " size"]) -> Float[Array, ""]:
        misfit = jnp.sum((x - self.weight @ parameters.mean - self.bias) ** 2)
        spread = jnp.sum(self.weight**2, axis=0) @ jnp.exp(2 * parameters.log_scale)
        family = dn.DiagonalGaussian()
        divergence = family.divergence(parameters, family.standard(parameters))
        return -(misfit + spread) / (2 * self.gamma) - x.size / 2 * np.log(2 * np.pi * self.gamma) - divergence


def pca_log_likelihood(rows: np.ndarray, latent: int, gamma: float) -> tuple[float, int]:
    """The best mean log-likelihood of probabilistic PCA with fixed noise variance, in nats, and how many latent variables it uses."""
    values = np.linalg.eigvalsh(np.cov(rows.T, bias=True))[::-1]
    active = int(np.sum(values[:latent] > gamma))
    variances = np.where(np.arange(values.size) < active, values, gamma)
    return float(-0.5 * np.sum(np.log(2 * np.pi * variances) + values / variances)), active


def make(config: VAEConfig, *, key: PRNGKeyArray) -> VAE:
    return VAE(config, key=key)
