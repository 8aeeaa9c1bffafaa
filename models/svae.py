r"""A structured variational autoencoder: a Gaussian mixture whose shape is warped by a network.

Shapes of one example: `x (size,)`, float32. K components, D latent dimensions.

$$ \pi \sim \mathrm{Dir}, \quad (\mu_k, \Lambda_k) \sim \text{Normal-Wishart}, \quad c \sim \pi, \quad z \mid c \sim N(\mu_c, \Lambda_c^{-1}),
\quad x \mid z \sim N(m(z), \mathrm{diag}\,v(z)). $$

**The mixture.** $q(\pi, \mu, \Lambda) = \exp(\langle\eta, t\rangle - A(\eta))$ has the form of its prior. Of it, $A$ is all that is written
down (`log_partition`): the expected statistics are $\bar t = \nabla A(\eta)$, the divergence from the prior is
$\langle\eta - \eta_0, \bar t\rangle - A(\eta) + A(\eta_0)$.

**One datum.** The encoder returns a Gaussian factor $\psi(z)$ of precision $\mathrm{diag}\,J$ in place of the likelihood, so that mean
field over $q(c)\,q(z)$ has closed forms. Its optimum is the fixed point of (`sweep`)

$$ q(z) \propto \psi(z)\,\exp\Bigl(\textstyle\sum_k r_k\, \mathbb E\log N(z; \mu_k, \Lambda_k^{-1})\Bigr), \qquad
r_k \propto \exp\bigl(\mathbb E\log\pi_k + \mathbb E\log N(z; \mu_k, \Lambda_k^{-1})\bigr),                                     \tag{1} $$

which a `FixedPoint` node finds in the responsibilities r. No sweep lowers the objective that has $\psi$ in place of the likelihood.

**Gradient.** The loss is the bound with the likelihood, which is not what (1) maximises. So the derivative of r does not drop out of the
gradient: it comes from the implicit function theorem on (1). Johnson et al. differentiate one sweep at the fixed point for the encoder
and leave the term out for the mixture; Bendekgey et al. add it. Here `OneStepAdjoint` differentiates one sweep for both.

**Natural gradient.** Of a function of $\eta$ it is the ordinary gradient in $\bar t$. The loss sees $\eta$ through $\bar t$ alone, so it
costs nothing: `expected` has the value of $\nabla A$ and the derivative of the identity, and what `jax.grad` returns for the leaves of a `Mixture`
**is the natural gradient**. Were q(c) and q(z) constant, a step of length N (the number of data) against that of the mean loss would be coordinate
ascent, $\eta = \eta_0 + \sum_n \mathbb E\,t(c_n, z_n)$.

References: Johnson et al. 2016, *Composing graphical models with neural networks*, arXiv:1603.06277; Bendekgey, Hope & Sudderth 2023,
*Unbiased learning of deep generative models with structured discrete representations*, arXiv:2306.08230.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.scipy.special import gammaln, multigammaln
from jaxtyping import Array, Float, PRNGKeyArray

import declarative as dn

Gradient = Literal["implicit", "one-step", "unrolled", "none"]
"""How the derivative of the responsibilities is found: `unrolled` through 100 sweeps, `none` leaves it out."""


@dataclass(frozen=True)
class SVAEConfig:
    size: int = 2
    """Entries of x."""
    latent: int = 2
    components: int = 15
    """Of the mixture; 0: a standard normal prior of z in its place, which makes this a plain variational autoencoder."""
    hidden: int = 40
    """Units of each of the two hidden layers of encoder and decoder."""
    concentration: float = 0.05
    """Of the Dirichlet prior, over all components: small, so that components which the data do not need stay empty."""
    reach: float = 4.0
    """At the start, latent units in a unit of x, and the standard deviation of the components' means. The prior has components of
    unit size: with a small reach one of them covers all data, and may do so ever after."""


class Mixture(eqx.Module):
    """Natural parameters; with the same shapes, expected statistics (in brackets)."""

    alpha: Float[Array, " K"]
    """Dirichlet concentrations (E log pi)."""
    h: Float[Array, "K D"]
    """kappa m (E Lambda mu)."""
    J: Float[Array, "K D D"]
    """S + kappa m m^T, where E Lambda = nu S^-1 (-1/2 E Lambda)."""
    kappa: Float[Array, " K"]
    """(-1/2 E mu^T Lambda mu)."""
    nu: Float[Array, " K"]
    """Above D - 1 (1/2 E log |Lambda|)."""

    def scale(self) -> Float[Array, "K D D"]:
        """S."""
        return self.J - self.h[:, :, None] * (self.h / self.kappa[:, None])[:, None]

    def proper(self) -> Float[Array, " K"]:
        """Positive for the components whose parameters are those of a density."""
        least = jnp.linalg.eigvalsh(self.scale())[:, 0]
        excess = self.nu - (self.h.shape[1] - 1)
        return jnp.minimum(jnp.minimum(self.alpha, self.kappa), jnp.minimum(excess, least))


class Potential(eqx.Module):
    """A Gaussian factor of z, up to a constant."""

    location: Float[Array, " D"]
    log_precision: Float[Array, " D"]

    @property
    def J(self):
        return jnp.exp(self.log_precision)

    @property
    def h(self):
        return self.J * self.location


def log_partition(natural: Mixture) -> Float[Array, ""]:
    """A: the log of the integral of exp(<natural, t>), with the base measure 1 / (prod pi * |Lambda|^(D/2))."""
    alpha, kappa, nu = natural.alpha, natural.kappa, natural.nu
    D = natural.h.shape[1]
    dirichlet = jnp.sum(gammaln(alpha)) - gammaln(jnp.sum(alpha))
    normal = D / 2 * jnp.log(2 * jnp.pi / kappa)
    wishart = D / 2 * nu * jnp.log(2) + multigammaln(nu / 2, D) - nu / 2 * jnp.linalg.slogdet(natural.scale())[1]
    return dirichlet + jnp.sum(normal + wishart)


def expected(natural: Mixture) -> Mixture:
    """The expected statistics, with the derivative of the identity: first derivatives through them are natural gradients."""
    value = jax.lax.stop_gradient(jax.grad(log_partition)(natural))
    return jax.tree.map(lambda value, eta: value + (eta - jax.lax.stop_gradient(eta)), value, natural)


def divergence(natural: Mixture, prior: Mixture) -> Float[Array, ""]:
    """KL of the mixture's posterior from its prior in nats; its gradient is the natural one, `natural - prior`."""
    eta, start = jax.lax.stop_gradient((natural, prior))
    pairing = jax.tree.map(lambda a, b, t: jnp.sum((a - b) * t), eta, start, expected(natural))
    return sum(jax.tree.leaves(pairing)) - log_partition(eta) + log_partition(start)


def posterior(r: Float[Array, " K"], statistics: Mixture, potential: Potential):
    """Mean (D,) and covariance (D, D) of q(z) given the responsibilities: the first half of (1).

    Its precision is diag J + sum_k r_k E Lambda_k, of which `statistics.J` holds -1/2, and that times its mean h + sum_k r_k E Lambda_k mu_k.
    """
    covariance = jnp.linalg.inv(jnp.diag(potential.J) - 2 * jnp.tensordot(r, statistics.J, 1))
    covariance = (covariance + covariance.T) / 2
    return covariance @ (potential.h + r @ statistics.h), covariance


def log_joint(mean, covariance, statistics: Mixture) -> Float[Array, " K"]:
    """E log pi_k + E log N(z; mu_k, Lambda_k^-1) under q."""
    second = covariance + jnp.outer(mean, mean)
    quadratic = statistics.h @ mean + jnp.tensordot(statistics.J, second, 2)
    return statistics.alpha + quadratic + statistics.kappa + statistics.nu - mean.size / 2 * jnp.log(2 * jnp.pi)


def sweep(r: Float[Array, " K"], x: tuple[Mixture, Potential]) -> Float[Array, " K"]:
    """(1), one half after the other."""
    statistics, potential = x
    return jax.nn.softmax(log_joint(*posterior(r, statistics, potential), statistics))


def responsibilities(x: tuple[Mixture, Potential], guess: Float[Array, " K"], gradient: Gradient) -> Float[Array, " K"]:
    """The fixed point of `sweep`. A datum whose sweeps have not settled keeps its last responsibilities, as constants.

    Between two components that fit a datum exactly as well, sweeps that start in the middle stay there, also where any
    difference would grow: the derivative is then that of a point which no other start finds.
    """
    if gradient not in get_args(Gradient):
        raise ValueError(f"gradient must be one of {', '.join(get_args(Gradient))}; got {gradient!r}.")
    if gradient == "unrolled":
        return jax.lax.scan(lambda r, _: (sweep(r, x), None), guess, length=100)[0]
    adjoint = dn.OneStepAdjoint() if gradient == "one-step" else dn.ImplicitAdjoint()
    r = dn.FixedPoint(sweep, adjoint=adjoint, throw=False, on_failure="zero", max_steps=500)(x, y0=guess)
    return jax.lax.stop_gradient(r) if gradient == "none" else r


class Local(eqx.Module):
    """Inference about one datum."""

    r: Float[Array, " K"]
    mean: Float[Array, " D"]
    covariance: Float[Array, "D D"]
    divergence: Float[Array, ""]
    """Of q(c) q(z) from p(c, z), expected over the mixture's parameters, in nats; with q(c) the best for this q(z), as `r` is."""

    def sample(self, samples: int, *, key: PRNGKeyArray) -> Float[Array, "samples D"]:
        noise = jr.normal(key, (samples, self.mean.size), self.mean.dtype)
        return self.mean[None] + noise @ jnp.linalg.cholesky(self.covariance).T


class Network(eqx.Module):
    """An MLP beside a linear map, as two vectors: a location, at the start near `gain` times the input, and a log-scale."""

    mlp: eqx.nn.MLP
    linear: Float[Array, "out in"]
    bias: Float[Array, " out"]

    def __init__(self, size: int, out: int, hidden: int, gain: float, log_scale: float, *, key: PRNGKeyArray):
        self.mlp = eqx.nn.MLP(size, 2 * out, hidden, 2, jnp.tanh, key=key, dtype=jnp.float32)
        self.linear = gain * jnp.eye(out, size, dtype=jnp.float32)
        self.bias = jnp.full(out, log_scale, jnp.float32)

    def __call__(self, x):
        location, log_scale = jnp.split(self.mlp(x), 2)
        return location + self.linear @ x, log_scale + self.bias


class SVAE(eqx.Module):
    mixture: Mixture | None
    encoder: Network
    decoder: Network
    config: SVAEConfig = eqx.field(static=True)

    def __init__(self, config: SVAEConfig, *, key: PRNGKeyArray):
        keys = jr.split(key, 3)
        self.config = config
        self.encoder = Network(config.size, config.latent, config.hidden, config.reach, 0.0, key=keys[0])
        self.decoder = Network(
            config.latent, config.size, config.hidden, 1 / config.reach, -np.log(config.reach), key=keys[1]
        )
        self.mixture = None
        if config.components:
            means = config.reach * jr.normal(keys[2], (config.components, config.latent), jnp.float32)
            prior = self.prior()
            J = prior.J + means[:, :, None] * means[:, None]
            self.mixture = Mixture(jnp.ones_like(prior.alpha), means, J, prior.kappa, prior.nu)

    def prior(self) -> Mixture:
        """Means around 0 and precisions around I, worth one observation."""
        K, D, dtype = self.config.components, self.config.latent, self.encoder.linear.dtype
        ones, nu = jnp.ones(K, dtype), D + 1.0
        J = jnp.broadcast_to(nu * jnp.eye(D, dtype=dtype), (K, D, D))
        return Mixture(self.config.concentration / K * ones, jnp.zeros((K, D), dtype), J, ones, nu * ones)

    def shared(self) -> Float[Array, ""]:
        """KL of the mixture's posterior from its prior in nats; to be paid once for all data."""
        return jnp.zeros((), jnp.float32) if self.mixture is None else divergence(self.mixture, self.prior())

    def recognise(self, x: Float[Array, " size"]) -> Potential:
        return Potential(*self.encoder(x))

    def infer(self, potential: Potential, gradient: Gradient = "implicit") -> Local:
        if self.mixture is None:
            covariance = jnp.diag(1 / (1 + potential.J))
            mean = covariance @ potential.h
            joint = -(jnp.sum(mean**2) + jnp.trace(covariance) + mean.size * jnp.log(2 * jnp.pi))[None] / 2
        else:
            statistics = expected(self.mixture)
            # What the factor alone says about z: a guess that depends on the datum, so that neighbours share a basin.
            guess = jax.nn.softmax(log_joint(potential.location, jnp.diag(1 / potential.J), statistics))
            r = responsibilities((statistics, potential), guess, gradient)
            mean, covariance = posterior(r, statistics, potential)
            joint = log_joint(mean, covariance, statistics)
        entropy = (mean.size * jnp.log(2 * jnp.pi * jnp.e) + jnp.linalg.slogdet(covariance)[1]) / 2
        # With the labels that are best for this q(z), sum r (log r - joint) is -logsumexp(joint): a bound whether or not r has
        # settled, and with a derivative where a responsibility underflows.
        return Local(jax.nn.softmax(joint), mean, covariance, -entropy - jax.nn.logsumexp(joint))

    def log_likelihood(self, z: Float[Array, " D"], x: Float[Array, " size"]) -> Float[Array, ""]:
        location, log_scale = self.decoder(z)
        return jnp.sum(jax.scipy.stats.norm.logpdf(x, location, jnp.exp(log_scale)))

    def elbo(
        self,
        potential: Potential,
        x: Float[Array, " size"],
        samples: int,
        gradient: Gradient = "implicit",
        *,
        key: PRNGKeyArray,
    ) -> tuple[Float[Array, ""], Local]:
        """What one datum adds to the evidence lower bound in nats, which is the sum over all data less `shared`."""
        local = self.infer(potential, gradient)
        z = local.sample(samples, key=key)
        return jnp.mean(jax.vmap(self.log_likelihood, (0, None))(z, x)) - local.divergence, local


def make(config: SVAEConfig, *, key: PRNGKeyArray) -> SVAE:
    return SVAE(config, key=key)
