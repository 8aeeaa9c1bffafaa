"""What the robust pooling nodes share: their data, penalties by name, and what they check."""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..._core.arguments import number
from ..._core.results import RESULTS, choose
from ..._linear.scaling import power_of_two
from ..._solvers import robust_pooling as kernel

PenaltyName = Literal["quadratic", "pseudo-huber", "huber", "welsch", "truncated-quadratic"]


class Points(eqx.Module):
    """What is pooled: an array with the axes of the node; weights >= 0, and a mask, True where a point takes part (None: all do).

    `weights` and `mask` have the shape of `x`, or that of its pooled axes alone.
    """

    x: Array
    weights: Array | None = None
    mask: Array | None = None


def checked_alpha(penalty, alpha, start, ranks) -> float | Array:
    if penalty not in kernel.PENALTIES:
        raise ValueError(f"penalty must be one of {', '.join(map(repr, kernel.PENALTIES))}; got {penalty!r}.")
    if start not in ("points", "centre"):
        raise ValueError(f"start must be 'points' or 'centre', got {start!r}.")
    return number(alpha, "alpha", ranks=ranks)


def check_axis(axis) -> tuple[int, ...]:
    axes = axis if isinstance(axis, tuple) else (axis,)
    if (
        not axes
        or len(set(axes)) < len(axes)
        or any(isinstance(a, bool) or not isinstance(a, int) or a < 0 for a in axes)
    ):
        raise ValueError(f"axis must be a non-negative integer or a tuple of different ones, got {axis!r}.")
    return axes


def pack(x, axis: tuple[int, ...]) -> Points:
    """`Points` from whatever the caller gave. What the mask takes out becomes 0 here."""
    if not isinstance(x, Points):
        x = Points(jnp.asarray(x))
    x = Points(*(None if leaf is None else jnp.asarray(leaf) for leaf in (x.x, x.weights, x.mask)))  # pyright: ignore[reportArgumentType]
    if x.mask is None or x.mask.dtype != jnp.bool_ or x.mask.shape not in _shapes(x.x, axis):
        return x  # anything wrong is for `check` to name
    clean = jnp.where(_expand(x.mask, x.x, axis), x.x, 0)
    weights = x.weights
    if weights is not None and weights.shape in _shapes(x.x, axis):
        # One shape for both, that of x if either has it.
        shape = max((weights.shape, x.mask.shape), key=len)
        full = lambda leaf: leaf if leaf.shape == shape else jnp.broadcast_to(_expand(leaf, x.x, axis), shape)
        return Points(clean, jnp.where(full(x.mask), full(weights), 0), full(x.mask))
    return Points(clean, weights, x.mask)


def check(x, axis: tuple[int, ...], name: str) -> None:
    """Shapes and dtypes of `Points`; nothing that depends on values."""
    if not isinstance(x, Points):
        raise ValueError(f"{name} takes an array or `Points`, got {type(x).__name__}.")
    if not jnp.issubdtype(x.x.dtype, jnp.floating):
        raise ValueError(f"what is pooled must be floating, got {x.x.dtype}{list(x.x.shape)}.")
    rank, most = x.x.ndim, len(axis) + 1
    if not (max(axis) < rank and len(axis) <= rank <= most):
        raise ValueError(
            f"{name} with axis={axis} takes arrays of {len(axis)} or {most} axes, got shape {x.x.shape}: use `jax.vmap` for batches."
        )
    if any(x.x.shape[a] == 0 for a in axis):
        raise ValueError(f"there is nothing to pool along axis={axis} of shape {x.x.shape}.")
    shapes = " or ".join(map(str, _shapes(x.x, axis)))
    if x.weights is not None and (x.weights.dtype != x.x.dtype or x.weights.shape not in _shapes(x.x, axis)):
        raise ValueError(
            f"weights must be {x.x.dtype} of shape {shapes}, got {x.weights.dtype}{list(x.weights.shape)}."
        )
    if x.mask is not None and (x.mask.dtype != jnp.bool_ or x.mask.shape not in _shapes(x.x, axis)):
        raise ValueError(f"mask must be boolean of shape {shapes}, got {x.mask.dtype}{list(x.mask.shape)}.")


def _shapes(x, axis):
    """The shapes that a weight of `x` may have."""
    pooled = tuple(x.shape[a] for a in axis if a < x.ndim)
    return (x.shape,) if pooled == x.shape else (x.shape, pooled)


def _expand(leaf, x, axis):
    """A weight of the pooled axes, with an axis of 1 for the channels."""
    return leaf if leaf.ndim == x.ndim else jnp.moveaxis(leaf[..., None], tuple(range(leaf.ndim)), axis)


def rows_of(x, axis):
    """The pooled axes first, as one: (n,) or (n, c)."""
    moved = jnp.moveaxis(x, axis, tuple(range(len(axis))))
    return moved.reshape(-1, *moved.shape[len(axis) :])


def columns(x: Points, axis: tuple[int, ...], *, scaled: bool = True):
    """(points (n, c), weights (n, c) or (n, 1), or None for all ones). `scaled`: the weights to about 1, as only their ratios matter."""
    rows = rows_of(x.x, axis)
    rows = rows if rows.ndim == 2 else rows[:, None]
    given = x.weights if x.weights is not None else x.mask
    if given is None:
        return rows, None
    w = given.astype(rows.dtype)
    w = rows_of(w, axis) if w.shape == x.x.shape else w.reshape(-1)
    w = w if w.ndim == 2 else w[:, None]
    # So that no sum of them leaves the range of the dtype.
    return rows, w * power_of_two(jax.lax.stop_gradient(jnp.max(w))) if scaled else w


def mass(w, rows):
    """The sum of the weights of each channel."""
    return jnp.broadcast_to(rows.shape[0] if w is None else jnp.sum(w, axis=0), rows.shape[1:]).astype(rows.dtype)


def status(good, w, result):
    """What is wrong with the data, if anything is; `good`: they are finite."""
    if w is None:
        return choose(good, result, RESULTS.nonfinite_data)
    result = choose(good & jnp.all(w >= 0), result, RESULTS.nonfinite_data)
    # Without weights there is no mean, finite or not.
    none = jnp.any(jnp.all(w == 0, axis=0))
    return choose(none, RESULTS.empty, result)
