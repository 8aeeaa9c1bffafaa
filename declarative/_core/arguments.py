"""Arguments of constructors: what is wrong with one is said where it is given, with its name and what would be right."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_INFINITY = float("inf")


def number(
    value: Any,
    name: str,
    low: float = 0.0,
    high: float = _INFINITY,
    *,
    closed: str = "",
    ranks: Sequence[int] = (0,),
    hint: str = "",
) -> float | Float[Array, "..."]:
    """A Python number between `low` and `high`, or a floating array of one of the `ranks`, which is learnable.

    `closed`: the ends that are allowed, of "low" and "high". An array is judged when it has a value, by the node. NumPy's
    scalars become numbers, its other arrays arrays of JAX.
    """
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        value = value.item()
    elif isinstance(value, np.ndarray):
        _check_range(value, name, low, high, closed, hint)
        value = jnp.asarray(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        _check_range(value, name, low, high, closed, hint)
        return value
    good = isinstance(value, jax.Array)
    if good and value.ndim in ranks and jnp.issubdtype(value.dtype, jnp.floating):
        # Not weakly typed, as `jnp.array(0.5)` is: a step of an optimiser would change its type, and everything would compile again.
        return jax.lax.convert_element_type(value, value.dtype)
    kinds = "a floating scalar array" if tuple(ranks) == (0,) else "a floating scalar or vector"
    got = f"{value.dtype}{list(value.shape)}" if good else repr(value)
    raise ValueError(f"{name} must be a number or {kinds}, got {got}{hint}.")


def _check_range(value: Any, name: str, low: float, high: float, closed: str, hint: str) -> None:
    above = value >= low if "low" in closed else value > low
    below = value <= high if "high" in closed else value < high
    if np.all(above & below):
        return
    if high < _INFINITY:
        ends = "[" if "low" in closed else "(", "]" if "high" in closed else ")"
        wanted = f"lie in {ends[0]}{low:g}, {high:g}{ends[1]}"
    elif low == 0 and not closed:
        wanted = "be positive and finite"
    else:
        wanted = f"be {'at least' if 'low' in closed else 'above'} {low:g} and finite"
    raise ValueError(f"{name} must {wanted}, got {value}{hint}.")


def check_tolerances(rtol: Any, atol: Any) -> None:
    """Of a solver: numbers, not negative, or scalar arrays; or None, both."""
    if (rtol is None) != (atol is None):
        raise ValueError("give rtol and atol, or neither of them.")
    if rtol is None:
        return
    for name, value in (("rtol", rtol), ("atol", atol)):
        if isinstance(value, (int, float, np.number)) and not isinstance(value, bool):
            _check_range(value, name, 0.0, _INFINITY, "low", "")
        elif not (isinstance(value, (jax.Array, np.ndarray)) and np.ndim(value) == 0):
            hint = "; functions go to the node, `FixedPoint` or `ProximalArgmin`" if callable(value) else ""
            raise ValueError(f"{name} must be a number, at least 0; got {value!r}{hint}.")


def require_tolerances(solver: Any, node: str) -> None:
    if solver.rtol is None:
        raise ValueError(f"{type(solver).__name__} needs rtol and atol, unless it is the solver of a `{node}`.")


def integer(value: Any, name: str, least: int = 1, *, hint: str = "") -> int:
    """An integer of Python or NumPy, not less than `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        kind = {0: "a non-negative integer", 1: "a positive integer"}.get(least, f"an integer of at least {least}")
        raise ValueError(f"{name} must be {kind}{hint}, got {value!r}.")
    return int(value)


def flag(value: Any, name: str) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False, got {value!r}.")
    return bool(value)
