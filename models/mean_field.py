r"""Naive mean field for small Ising models, as a fixed point whose marginals can be differentiated.

$$ p(s) = \exp\bigl(\theta^\top s + \tfrac12 s^\top W s\bigr) / Z, \qquad s \in \{0, 1\}^n,\quad W = W^\top,\ W_{ii} = 0. $$

Of all product distributions with means $\mu$, the ones that maximise the bound

$$ A(\mu) = \theta^\top\mu + \tfrac12\mu^\top W\mu + \sum_i H(\mu_i) \;\le\; \log Z $$

satisfy $\mu_i = \sigma(\theta_i + \sum_j W_{ij}\mu_j)$. One application of the node's map updates one site after the other, which never
lowers A; all at once can oscillate. Fixed points need not be unique: the guess decides the basin.

**Derivatives.** Of the optimal bound $\partial_\theta A = \mu$, by the envelope theorem. Of the marginals, by the implicit function theorem,
$\mathrm d\mu/\mathrm d\theta = (\mathrm{diag}(1/(\mu(1-\mu))) - W)^{-1}$, which is singular at a phase transition.

Reference: Wainwright & Jordan 2008, *Graphical models, exponential families, and variational inference*, section 5.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import declarative as dn


class Ising(eqx.Module):
    theta: Float[Array, " n"]
    W: Float[Array, "n n"]

    def log_partition(self) -> Float[Array, ""]:
        """log Z by enumeration of all 2^n states."""
        n = self.theta.size
        states = jnp.asarray((np.arange(2**n)[:, None] >> np.arange(n)) & 1, self.theta.dtype)
        return jax.nn.logsumexp(states @ self.theta + jnp.sum((states @ self.W) * states, axis=1) / 2)

    def bound(self, mu: Float[Array, " n"]) -> Float[Array, ""]:
        """A(mu), at most log Z for any mu in [0, 1]."""
        entropy = jnp.sum(jax.scipy.special.entr(mu) + jax.scipy.special.entr(1 - mu))
        return self.theta @ mu + mu @ self.W @ mu / 2 + entropy


def sweep(mu: Float[Array, " n"], model: Ising) -> Float[Array, " n"]:
    """Every site in turn, given the others."""

    def update(mu, i):
        return mu.at[i].set(jax.nn.sigmoid(model.theta[i] + model.W[i] @ mu)), None

    return jax.lax.scan(update, mu, jnp.arange(mu.size))[0]


class MeanField(eqx.Module):
    """Marginals of an `Ising` model in the basin of `guess` (one half everywhere, if None)."""

    node: dn.FixedPoint

    def __init__(self, *, throw: bool = True, max_steps: int = 10_000):
        self.node = dn.FixedPoint(sweep, throw=throw, max_steps=max_steps)

    def __call__(self, model: Ising, guess: Float[Array, " n"] | None = None) -> Float[Array, " n"]:
        return self.node(model, y0=jnp.full_like(model.theta, 0.5) if guess is None else guess)


def optimal_bound(model: Ising, mu: Float[Array, " n"]) -> Float[Array, ""]:
    """A at the marginals mu that mean field found, with its envelope gradient in the model."""
    return dn.envelope(lambda mu, model: model.bound(mu), mu, model)
