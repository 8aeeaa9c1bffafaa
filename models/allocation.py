r"""A predictor and the quadratic program that acts on what it predicts: which requests get a share of a limited budget.

**Problem.** Request $i$ of $k$ has a value $v_i$ that is not known, a cost $c_i > 0$ that is, and features $x_i$ to predict $v_i$ from. The
share $z_i$ of it that is served maximises

$$ w(z, v) = v^\top z - \tfrac\gamma2 \|z\|^2 \quad\text{subject to}\quad c^\top z \le \beta\, 1^\top c,\;\; 0 \le z \le 1: $$

the budget pays for the part $\beta$ of all the work, and the last bit of a request is worth $\gamma$ less than the first. $z(\hat v)$ is the
decision taken with predictions $\hat v$. **Regret** is what they cost, $w(z(v), v) - w(z(\hat v), v) \ge 0$, zero for $\hat v = v$.

Shapes of one example: features `(k, d)` and costs `(k,)`, predicted values `(k,)`, decision `(k,)`. Batches by `jax.vmap`. Parameters are
float32.

References: Donti, Amos & Kolter 2017, arXiv:1703.04529; Wilder, Dilkina & Tambe 2019, arXiv:1809.05504 (the quadratic term as what makes
a linear program differentiable; here it is part of the problem); Elmachtoub & Grigas 2022 (regret as a loss).
"""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

import declarative as dn


@dataclass(frozen=True)
class AllocationConfig:
    features: int = 16
    """Numbers that describe a request."""
    hidden: int = 0
    """Hidden units of the predictor; 0 is a linear one."""
    budget: float = 0.15
    """beta: the part of all costs that can be paid."""
    diminishing: float = 0.2
    """gamma: how much less the last bit of a request is worth than the first."""
    start: float = 0.5
    """What is predicted before training, roughly. Where nothing is worth serving, no decision has a gradient."""

    def __post_init__(self):
        if self.features < 1 or self.hidden < 0:
            raise ValueError(
                f"features must be at least 1 and hidden at least 0, but are {self.features} and {self.hidden}."
            )
        if not 0 < self.budget < 1:
            raise ValueError(f"budget must lie between 0 and 1, a part of all costs, but is {self.budget}.")
        if not self.diminishing > 0:
            raise ValueError(
                f"diminishing must be positive, but is {self.diminishing}. At zero the program is linear: its decisions jump "
                "from corner to corner, and their gradient is zero in between."
            )


class Allocator(eqx.Module):
    """Features and costs of k requests to the share of each that is served."""

    predictor: eqx.nn.Linear | eqx.nn.MLP
    program: dn.QuadraticProgram
    config: AllocationConfig = eqx.field(static=True)

    def __init__(self, config: AllocationConfig, *, key: PRNGKeyArray):
        if config.hidden:
            predictor = eqx.nn.MLP(config.features, "scalar", config.hidden, 1, key=key, dtype=jnp.float32)
            bias = lambda predictor: predictor.layers[-1].bias
        else:
            predictor = eqx.nn.Linear(config.features, "scalar", key=key, dtype=jnp.float32)
            bias = lambda predictor: predictor.bias
        self.predictor = eqx.tree_at(bias, predictor, jnp.full((1,), config.start, jnp.float32))
        self.program = dn.QuadraticProgram(throw=False, on_failure="zero")
        self.config = config

    def predict(self, features: Float[Array, "k d"]) -> Float[Array, " k"]:
        return jax.vmap(self.predictor)(features)

    def decide(self, values: Float[Array, " k"], costs: Float[Array, " k"]) -> Float[Array, " k"]:
        """The best decision if `values` were true."""
        return self.program(
            jnp.full_like(values, self.config.diminishing),  # a diagonal
            -values,
            G=costs[None],
            h=self.config.budget * jnp.sum(costs)[None],
            lower=0.0,
            upper=1.0,
        )

    def worth(self, decision: Float[Array, " k"], values: Float[Array, " k"]) -> Float[Array, ""]:
        """w(z, v): what a decision brings if `values` are the true ones."""
        return values @ decision - self.config.diminishing / 2 * decision @ decision

    def __call__(self, features: Float[Array, "k d"], costs: Float[Array, " k"]) -> Float[Array, " k"]:
        return self.decide(self.predict(features), costs)
