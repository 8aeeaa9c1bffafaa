r"""Variational families: a pytree of unconstrained parameters, and the distribution that they stand for.

Densities, divergences, samples and bijections are NumPyro's. Its functions promote dtypes and ranks freely, so they are called with JAX's
checks of both relaxed, and what they return is brought back to the dtype of the parameters.

Reference for the distance: Amari 1998, *Natural gradient works efficiently in learning*; the Fisher information of $N(\mu, \sigma^2)$ in
$(\mu, \log\sigma)$ is $\mathrm{diag}(\sigma^{-2}, 2)$.
"""

import abc
import contextlib
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..._ode.trees import precision


class AbstractFamily(eqx.Module):
    """What `ELBO` and `ELBOOptimizer` ask of a family: the distribution of given parameters, and its standard member."""

    @abc.abstractmethod
    def distribution(self, parameters: PyTree) -> Any:
        """A NumPyro distribution, reparameterised: differentiable through its samples."""

    @abc.abstractmethod
    def standard(self, parameters: PyTree) -> PyTree:
        """Parameters, like those given, of the member that serves as prior unless another one is named."""

    def distance(self, parameters: PyTree, start: PyTree) -> Float[Array, ""]:
        """Half the squared distance in the metric of `start`; Euclidean unless a family knows better."""
        return half_squared(parameters, start)

    def unit(self, parameters: PyTree) -> Float[Array, ""]:
        """A change of the parameters that matters: what their accuracy is measured against where all of them vanish, as those of
        a collapsed posterior do. Unless a family knows better, only zero is small."""
        return jnp.zeros((), precision(parameters))

    def sample(self, parameters: PyTree, key: PRNGKeyArray, count: int) -> Float[Array, "count *event"]:
        with _relaxed():
            z = self.distribution(parameters).rsample(key, (count,))
        return z.astype(precision(parameters))

    def log_prob(self, parameters: PyTree, z: Float[Array, "*event"]) -> Float[Array, ""]:
        return log_prob(self.distribution(parameters), z)

    def divergence(self, parameters: PyTree, other: PyTree) -> Float[Array, ""]:
        r"""$\mathrm{KL}(q_\text{parameters} \,\|\, q_\text{other})$ in nats, in closed form."""
        return divergence(self.distribution(parameters), self.distribution(other))


class GaussianParameters(eqx.Module):
    """Mean $\\mu$ and $\\log\\sigma$, of one shape."""

    mean: Float[Array, "*event"]
    log_scale: Float[Array, "*event"]

    def __check_init__(self):
        if jnp.shape(self.mean) != jnp.shape(self.log_scale):
            raise ValueError(
                f"mean and log_scale must have one shape, got {jnp.shape(self.mean)} and {jnp.shape(self.log_scale)}."
            )


class DiagonalGaussian(AbstractFamily):
    """Independent Gaussians: `GaussianParameters(mean, log_scale)`. The standard member is N(0, I)."""

    def distribution(self, parameters: GaussianParameters):
        import numpyro.distributions as dist

        mean, log_scale = parameters.mean, parameters.log_scale
        return dist.Normal(mean, jnp.exp(log_scale)).to_event(mean.ndim)

    def standard(self, parameters: GaussianParameters) -> GaussianParameters:
        return jtu.tree_map(jnp.zeros_like, parameters)

    def distance(self, parameters: GaussianParameters, start: GaussianParameters) -> Float[Array, ""]:
        """In the Fisher information at `start`: a step of one standard deviation of the mean counts 1/2."""
        of_mean = (parameters.mean - start.mean) * jnp.exp(-start.log_scale)
        of_scale = parameters.log_scale - start.log_scale
        return jnp.sum(of_mean**2) / 2 + jnp.sum(of_scale**2)

    def unit(self, parameters: GaussianParameters) -> Float[Array, ""]:
        return jnp.exp(jnp.min(parameters.log_scale, initial=0))


class CholeskyParameters(eqx.Module):
    """Mean, shape (d,), and the lower triangle of the Cholesky factor, row by row, shape (d (d + 1) / 2,); logarithms on its diagonal."""

    mean: Float[Array, " d"]
    triangle: Float[Array, " m"]


class FullGaussian(AbstractFamily):
    """Gaussians with any covariance: `CholeskyParameters(mean, triangle)`. The standard member is N(0, I)."""

    def distribution(self, parameters: CholeskyParameters):
        import numpyro.distributions as dist

        return dist.MultivariateNormal(parameters.mean, scale_tril=self.factor(parameters))

    def factor(self, parameters: CholeskyParameters) -> Float[Array, "d d"]:
        # NumPyro's `LowerCholeskyTransform` takes no float32 where x64 is enabled.
        if not isinstance(parameters, CholeskyParameters):
            raise ValueError(f"the parameters of FullGaussian are CholeskyParameters, got {type(parameters).__name__}.")
        d, m = parameters.mean.size, parameters.triangle.size
        if m != d * (d + 1) // 2:
            raise ValueError(
                f"triangle must have d (d + 1) / 2 = {d * (d + 1) // 2} entries for a mean of {d}, got {m}."
            )
        matrix = jnp.zeros((d, d), parameters.triangle.dtype).at[jnp.tril_indices(d)].set(parameters.triangle)
        return matrix - jnp.diag(jnp.diag(matrix)) + jnp.diag(jnp.exp(jnp.diag(matrix)))

    def standard(self, parameters: CholeskyParameters) -> CholeskyParameters:
        return jtu.tree_map(jnp.zeros_like, parameters)

    def unit(self, parameters: CholeskyParameters) -> Float[Array, ""]:
        return jnp.min(jnp.abs(jnp.diag(self.factor(parameters))), initial=1)


def half_squared(parameters: PyTree, start: PyTree) -> Float[Array, ""]:
    parts = jtu.tree_map(lambda a, b: jnp.sum((a - b) ** 2) / 2, parameters, start)
    return sum(jtu.tree_leaves(parts), jnp.zeros((), precision(parameters)))


def divergence(q, p) -> Float[Array, ""]:
    """NumPyro's closed form of KL(q || p); `NotImplementedError` where it has none."""
    import numpyro.distributions as dist

    with _relaxed():
        value = dist.kl_divergence(q, p)
    return scalar(value, f"the divergence from {type(q).__name__} to {type(p).__name__} must be a scalar{_EVENT}")


def log_prob(distribution, z) -> Float[Array, ""]:
    with _relaxed():
        value = distribution.log_prob(z)
    return scalar(value, f"the log_prob of {type(distribution).__name__} at one z must be a scalar{_EVENT}")


def check_events(q, prior) -> None:
    """A prior over another space would be broadcast against q."""
    ours, theirs = (getattr(distribution, "event_shape", None) for distribution in (q, prior))
    if None not in (ours, theirs) and ours != theirs:
        raise ValueError(
            f"the prior must be over what the family is over, {type(q).__name__} with events of shape {ours}; it is "
            f"{type(prior).__name__} with events of shape {theirs}. (`.to_event(...)` makes dimensions parts of one event.)"
        )


_EVENT = ": make all dimensions of z one event, with NumPyro's `.to_event(...)`"


def scalar(value, message: str):
    """`value`, or a `ValueError` that also says which shape it has."""
    if jnp.shape(value) != ():
        raise ValueError(f"{message}; got shape {jnp.shape(value)}.")
    return value


@contextlib.contextmanager
def _relaxed():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
