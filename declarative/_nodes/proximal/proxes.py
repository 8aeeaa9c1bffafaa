r"""Proximity operators $\mathrm{prox}_{sg}(x) = \arg\min_y \tfrac12\|y - x\|^2 + s\,g(y; \text{parameters})$.

All are called as `prox(x, parameters, scaling)`, with $s$ = `scaling`, on a pytree of floating arrays; a parameter is a number (for every
entry) or a pytree like x. They are derivatives' building blocks: exact in both modes, to any order, also in parameters and scaling.
Where two pieces meet, the derivative is that of the piece on which the value is zero or constant. With a parameter of 0 the
operator is the identity, and so is its derivative, at 0 too. NaN stays NaN, and so become parameters below 0 for which there is no minimum, or
for which g is concave across its kink.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ..._linear.norms import largest
from ..._solvers.total_variation import total_variation


def prox_none(x: PyTree, parameters: Any = None, scaling: Any = 1.0) -> PyTree:
    """Of g = 0: x itself. For solvers that want a prox where there is nothing to add."""
    del parameters, scaling
    return x


def prox_lasso(x: PyTree, l1reg: Any = 1.0, scaling: Any = 1.0) -> PyTree:
    r"""Of $g(y) = \sum_i \lambda_i |y_i|$: soft thresholding. `l1reg`: $\lambda$, a number or a pytree like x. At $|x_i| = s\lambda_i$ the
    derivative is that of 0."""
    return jtu.tree_map(lambda x, lam: _soften(x, _cast(scaling, x) * lam), x, _like(l1reg, x))


def prox_elastic_net(x: PyTree, parameters: tuple[Any, Any] = (1.0, 1.0), scaling: Any = 1.0) -> PyTree:
    r"""Of $g(y) = \sum_i \lambda_i (|y_i| + \tfrac{\gamma_i}2 y_i^2)$. `parameters`: $(\lambda, \gamma)$, numbers or pytrees like x."""

    def one(x, lam, gamma):
        strength = _cast(scaling, x) * lam
        return _shrunk(_soften(x, strength), strength * gamma)

    lam, gamma = parameters
    return jtu.tree_map(one, x, _like(lam, x), _like(gamma, x))


def prox_group_lasso(x: PyTree, l2reg: Any = 1.0, scaling: Any = 1.0) -> PyTree:
    r"""Of $g(y) = \lambda \|y\|_2$, the norm over all entries of the pytree: shrinks the group, or sets it to zero. `jax.vmap` for several
    groups. At $\|x\| = s\lambda$, and at a group of zeros, the derivative is that of 0."""
    size = jax.lax.stop_gradient(largest(x))
    size = jnp.where((size > 0) & jnp.isfinite(size), size, 1)
    # In units of the largest entry: neither over- nor underflow, and a root whose derivative exists.
    squares = sum(jnp.sum((leaf / size.astype(leaf.dtype)) ** 2) for leaf in jtu.tree_leaves(x))
    squares = jnp.asarray(squares)
    strength = _cast(scaling, squares) * _cast(l2reg, squares) / size.astype(squares.dtype)
    inside = (squares <= strength**2) & (strength > 0)
    zero = squares == 0
    # Of an infinite entry the direction is unknown: NaN.
    strength = jnp.where(strength < 0, jnp.nan, strength)
    factor = jnp.where(inside, 0, 1 - strength / jnp.sqrt(jnp.where(inside | zero, 1, squares)))
    return jtu.tree_map(lambda leaf: jnp.where(inside, 0, factor.astype(leaf.dtype) * leaf), x)


def prox_ridge(x: PyTree, l2reg: Any = 1.0, scaling: Any = 1.0) -> PyTree:
    r"""Of $g(y) = \tfrac12\sum_i \lambda_i y_i^2$: $x / (1 + s\lambda)$."""
    return jtu.tree_map(lambda x, lam: _shrunk(x, _cast(scaling, x) * lam), x, _like(l2reg, x))


def prox_non_negative_lasso(x: PyTree, l1reg: Any = 1.0, scaling: Any = 1.0) -> PyTree:
    r"""Of $g(y) = \sum_i \lambda_i y_i$ for $y \ge 0$: $\max(x - s\lambda, 0)$. At equality the derivative is that of 0."""
    return jtu.tree_map(lambda x, lam: _positive(x - _cast(scaling, x) * lam), x, _like(l1reg, x))


def prox_non_negative_ridge(x: PyTree, l2reg: Any = 1.0, scaling: Any = 1.0) -> PyTree:
    r"""Of $g(y) = \tfrac12\sum_i \lambda_i y_i^2$ for $y \ge 0$: $\max(x, 0) / (1 + s\lambda)$. At 0 the derivative is that of 0."""
    return jtu.tree_map(lambda x, lam: _shrunk(_positive(x), _cast(scaling, x) * lam), x, _like(l2reg, x))


def prox_total_variation(x: Array, strength: Any = 1.0, scaling: Any = 1.0) -> Array:
    r"""Of $g(y) = \sum_i \lambda_i |y_{i+1} - y_i|$, for a vector: exact and parallel, see `TotalVariation`. `strength`: $\lambda$, a number
    or one for each pair of neighbours. NaN if an entry is not finite or a strength is negative."""
    x = jnp.asarray(x)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"prox_total_variation takes a vector, got shape {x.shape}: use `jax.vmap` for batches.")
    weights = _cast(scaling, x) * _cast(strength, x)
    if weights.shape not in ((), (x.size - 1,)):
        raise ValueError(f"strength must be a number or have shape ({x.size - 1},), got {weights.shape}.")
    return total_variation(x, jnp.broadcast_to(weights, (x.size - 1,))).signal


def make_prox_from_projection(projection: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """The prox of the indicator of a convex set, from the projection onto it: `projection(x)` or, with parameters, `projection(x, parameters)`.

    In `ProximalArgmin` the parameters of a prox are *all the data of the node*: where those are not the projection's parameters, write
    `lambda v, x, step: projection(v, x["radius"])`, or `lambda v, x, step: projection(v)`.
    """

    def prox(x: PyTree, parameters: Any = None, scaling: Any = 1.0) -> PyTree:
        del scaling  # A set has no strength.
        return projection(x) if parameters is None else projection(x, parameters)

    return prox


def _soften(x, strength):
    # The value with the sign of x on its support; `where` and not `maximum`, whose derivative at a tie is a half.
    strength = jnp.where(strength < 0, jnp.nan, strength)
    return jnp.where((jnp.abs(x) <= strength) & (strength > 0), 0, x - strength * jnp.sign(x))


def _shrunk(x, strength):
    # Past -1 the quadratic is stronger than the distance, and has no minimum.
    return x / jnp.where(strength <= -1, jnp.nan, 1 + strength)


def _positive(x):
    return jnp.where(x <= 0, 0, x)


def _cast(parameter, x):
    return jnp.asarray(parameter).astype(x.dtype)


def _like(parameter: Any, x: PyTree) -> PyTree:
    """The parameter for each leaf of x."""
    leaves, treedef = jtu.tree_flatten(x)
    given, structure = jtu.tree_flatten(parameter)
    if structure != treedef:
        if not jtu.treedef_is_leaf(structure) or jnp.ndim(parameter) != 0:
            raise ValueError(f"a parameter must be a number or a pytree like x, {treedef}; got {structure}.")
        given = given * len(leaves)
    cast = [_cast(each, leaf) for each, leaf in zip(given, leaves, strict=True)]
    for each, leaf in zip(cast, leaves, strict=True):
        if each.shape not in ((), leaf.shape):
            raise ValueError(f"a parameter must be a number or have the shape of x, {leaf.shape}; got {each.shape}.")
    return jtu.tree_unflatten(treedef, cast)
