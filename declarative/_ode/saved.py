"""Cotangents of saved values, in the order in which a walk backwards meets them."""

from collections.abc import Callable

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .trees import add

SAVE_Y: Callable = dfx.SubSaveAt(t1=True).fn  # what diffrax saves unless told otherwise


class Field(eqx.Module):
    """Functions of (terms, args), and their pullbacks to whatever of those is differentiated."""

    parameters: PyTree[Array]
    constants: PyTree

    def __call__(self, fn: Callable, *x):
        """`fn(terms, args, *x)` and its pullback `cotangent -> (of_parameters, *of_x)`."""

        def flat(parameters, *x):
            args, terms, _ = eqx.combine(parameters, self.constants)
            return fn(terms, args, *x)

        return jax.vjp(flat, self.parameters, *x)

    def save(self, index: int, t, y):
        """The same of the function of a `SaveAt`."""

        def flat(parameters, y):
            args, _, fns = eqx.combine(parameters, self.constants)
            return y if fns[index] is None else eqx.filter(fns[index](t, y, args), eqx.is_inexact_array)

        return jax.vjp(flat, self.parameters, y)


class Saved(eqx.Module):
    """One SubSaveAt. What is left to meet are the first `left` of its values, and the first `left_ts` of its times."""

    t0: bool = eqx.field(static=True)
    t1: bool = eqx.field(static=True)
    steps: int = eqx.field(static=True)
    ts: Array | None
    index: int = eqx.field(static=True)
    cotangents: PyTree  # of its values; None where a leaf is not differentiated

    def at_end(self, field, left, t, steps, y):
        """`(left, of_y, of_parameters)`: from the value at the end of the solve, unless it was the last of `SaveAt(steps=...)`."""
        if not self.t1 or self.steps == 1:
            return left, None, None
        # diffrax counts this place whether or not it fills it.
        there = True if self.steps == 0 else steps % self.steps != 0
        return self._value(field, left - 1, t, y, there)

    def at_step(self, field, left, t, steps, y):
        """The same from the value after `steps` steps."""
        if not self.steps:
            return left, None, None
        there = steps % self.steps == 0
        return self._value(field, left - jnp.where(there, 1, 0), t, y, there)

    def between(self, field, left, left_ts, interval, interpolation, info):
        """`(left, left_ts, of_info, of_parameters)`: from the values at times within a step, its start left out."""
        ts = self.ts
        assert ts is not None

        def there(carry):
            _, left_ts, *_ = carry
            time = ts[jnp.maximum(left_ts - 1, 0)]
            return (left_ts > 0) & (time > interval.start)

        def meet(carry):
            left, left_ts, of_info, of_parameters = carry
            left, left_ts = left - 1, left_ts - 1
            time = ts[left_ts]
            evaluate = lambda info: interpolation(t0=interval.start, t1=interval.end, **info).evaluate(time)
            y, back_info = jax.vjp(evaluate, info)
            value, back = field.save(self.index, time, y)
            more, of_y = back(self._cotangent(value, left))
            return left, left_ts, add(of_info, back_info(of_y)[0]), add(of_parameters, more)

        none = jtu.tree_map(jnp.zeros_like, (info, field.parameters))
        return jax.lax.while_loop(there, meet, (left, left_ts, *none))

    def at_start(self, field, left, t, y):
        """`(of_y, of_parameters)` from all values that are left: those at the start, by `t0` or among `ts`."""
        if not self.t0 and self.ts is None:
            return None, None

        def total(c):
            place = jnp.arange(len(c)).reshape(-1, *(1,) * (c.ndim - 1))
            return jnp.sum(jnp.where(place < left, c, 0), axis=0)

        return self._pulled(field, t, y, left > 0, total)

    def _value(self, field, left, t, y, there):
        return left, *self._pulled(field, t, y, there, lambda c: c[jnp.maximum(left, 0)])

    def _cotangent(self, value, position):
        return self._picked(value, lambda c: c[position])

    def _pulled(self, field, t, y, there, pick):
        """`(of_y, of_parameters)`, zero where nothing was saved: there the function may have no derivative."""
        value, back = field.save(self.index, t, y)
        of_parameters, of_y = back(self._picked(value, pick))
        return jtu.tree_map(lambda leaf: jnp.where(there, leaf, 0), (of_y, of_parameters))

    def _picked(self, value, pick):
        def one(value, c):
            if value is None:
                return None
            return jnp.zeros_like(value) if c is None else pick(c)

        return jtu.tree_map(one, value, self.cotangents, is_leaf=lambda leaf: leaf is None)
