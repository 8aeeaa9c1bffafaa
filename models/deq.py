r"""An equilibrium network for small images: its hidden layer is the fixed point of one cell, and the weight-tied network of finite depth.

Shapes of one example: image `(height, width)` -> injection `(width,)` -> state `(width,)` -> logits `(classes,)`. Batches by `jax.vmap`. With the
injection $h = Ux + b$ the cell is

$$ T(z) = \tanh(Wz + h), \qquad \sum_j |W_{ij}| \le \gamma < 1 \ \text{for every row } i,                                \tag{1} $$

a contraction of factor $\gamma$ in the largest entry whatever the weights are: rows of the free parameter V that are longer than $\gamma$ are
shortened to it. `depth=None` returns $z^* = T(z^*)$; `depth=L` applies T L times to zero.

References: Bai, Kolter & Koltun 2019, *Deep Equilibrium Models*, arXiv:1909.01377; El Ghaoui et al. 2021, *Implicit Deep Learning*, arXiv:1908.06315
(the bound on rows).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

import declarative as dn

SolverName = Literal["picard", "anderson", "broyden"]
AdjointName = Literal["implicit", "one-step", "neumann", "phantom"]


@dataclass(frozen=True)
class EquilibriumConfig:
    image: tuple[int, int] = (8, 8)
    classes: int = 10
    width: int = 96
    contraction: float = 0.9
    """The bound gamma of (1), below 1."""
    depth: int | None = None
    """Applications of the cell; None: infinitely many."""
    solver: SolverName = "anderson"
    adjoint: AdjointName = "implicit"
    terms: int = 5
    """Of the Neumann series, or steps of the phantom gradient."""


def solver_of(name: str):
    """For float32, to about the last two digits."""
    match name:
        case "picard":
            return None
        case "anderson":
            return dn.Anderson(1e-5, 1e-7)
        case "broyden":
            return dn.Broyden(1e-5, 1e-7)
    raise ValueError(f"solver must be one of {', '.join(get_args(SolverName))}, but is {name!r}.")


def adjoint_of(name: str, terms: int):
    match name:
        case "implicit":
            return dn.ImplicitAdjoint()
        case "one-step":
            return dn.OneStepAdjoint()
        case "neumann":
            return dn.NeumannAdjoint(terms)
        case "phantom":
            return dn.PhantomAdjoint(terms)
    raise ValueError(f"adjoint must be one of {', '.join(get_args(AdjointName))}, but is {name!r}.")


def cell(z: Float[Array, " width"], x: tuple[Array, Array]) -> Float[Array, " width"]:
    """(1), for `x` = (W, h)."""
    W, h = x
    return jnp.tanh(W @ z + h)


class EquilibriumNetwork(eqx.Module):
    inject: eqx.nn.Linear
    free: Float[Array, "width width"]
    layer: dn.FixedPoint
    head: eqx.nn.Linear
    contraction: float = eqx.field(static=True)
    depth: int | None = eqx.field(static=True)

    def __init__(self, config: EquilibriumConfig, *, key: PRNGKeyArray):
        if not 0 < config.contraction < 1:
            raise ValueError(f"contraction must lie in (0, 1), but is {config.contraction}.")
        keys, width = jr.split(key, 3), config.width
        self.inject = eqx.nn.Linear(config.image[0] * config.image[1], width, key=keys[0], dtype=jnp.float32)
        self.free = jr.normal(keys[1], (width, width), jnp.float32) / width**0.5
        self.layer = dn.FixedPoint(
            cell, solver_of(config.solver), adjoint_of(config.adjoint, config.terms), throw=False, max_steps=500
        )
        self.head = eqx.nn.Linear(width, config.classes, key=keys[2], dtype=jnp.float32)
        self.contraction, self.depth = config.contraction, config.depth

    @property
    def weight(self) -> Float[Array, "width width"]:
        """W of (1)."""
        rows = jnp.sum(jnp.abs(self.free), axis=1, keepdims=True)
        return self.free * jnp.minimum(1, self.contraction / rows)

    def state(self, image: Float[Array, "height width"], guess: Float[Array, " width"] | None = None):
        """`(state, steps)`; a `guess` saves steps, and no gradient flows to it."""
        x = self.weight, self.inject(image.ravel())
        start = jnp.zeros_like(x[1]) if guess is None else guess
        if self.depth is None:
            solution = self.layer.solve(x, y0=start)
            return solution.value, solution.stats["steps"]
        z, _ = jax.lax.scan(lambda z, _: (cell(z, x), None), start, None, length=self.depth)
        return z, jnp.asarray(self.depth, jnp.int32)

    def __call__(self, image: Float[Array, "height width"]) -> Float[Array, " classes"]:
        return self.head(self.state(image)[0])
