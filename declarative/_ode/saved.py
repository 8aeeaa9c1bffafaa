"""Cotangents of saved values, in the order in which a walk backwards meets them."""

from collections.abc import Callable

import diffrax as dfx
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree

from .._core.summed import vjp
from .trees import add

SAVE_Y: Callable = dfx.SubSaveAt(t1=True).fn  # what diffrax saves unless told otherwise


class Field(eqx.Module):
    """Functions of (terms, args), and their pullbacks to whatever of those is differentiated.

    The pullbacks are zero for a lane that takes no part (`where` is False); `where=None`: every lane does.
    """

    parameters: PyTree[Array]
    constants: PyTree
    apart: bool = False  # whether lanes that walk together take steps of their own
    where: Bool[Array, ""] | None = None

    def __call__(self, fn: Callable, *x):
        """`fn(terms, args, *x)` and its pullback `cotangent -> (of_parameters, *of_x)`."""

        def flat(parameters, *x):
            args, terms, _ = eqx.combine(parameters, self.constants)
            return fn(terms, args, *x)

        return vjp(flat, self.parameters, *x, where=self.where)

    def save(self, index: int, t, y):
        """The same of the function of a `SaveAt`; of_parameters is None if that is y itself."""
        fns = eqx.combine(self.parameters, self.constants)[2]
        if fns[index] is None:
            return y, lambda cotangent: (None, self._kept(cotangent))

        def flat(parameters, y):
            args, _, fns = eqx.combine(parameters, self.constants)
            return eqx.filter(fns[index](t, y, args), eqx.is_inexact_array)

        return vjp(flat, self.parameters, y, where=self.where)

    def _kept(self, cotangent):
        where = self.where
        return cotangent if where is None else jtu.tree_map(lambda leaf: jnp.where(where, leaf, 0), cotangent)

    def only(self, where) -> "Field":
        """For the lanes, of those that take part, where it is True."""
        where = where if self.where is None else self.where & where
        return Field(self.parameters, self.constants, self.apart, where)


def walk(more: Callable, step: Callable, field: Field, carry: PyTree, of_parameters: PyTree):
    """`carry, of_parameters = step(field, carry, of_parameters)` while `more(carry)`.

    Lanes that walk together, with steps of their own, all go on until the last is done: one that is done keeps its carry, and takes no
    part.
    """
    if not field.apart:
        return jax.lax.while_loop(lambda both: more(both[0]), lambda both: step(field, *both), (carry, of_parameters))

    def together(both):
        carry, of_parameters = both
        going = more(carry)
        new, of_parameters = step(field.only(going), carry, of_parameters)
        return jtu.tree_map(lambda new, old: jnp.where(going, new, old), new, carry), of_parameters

    return jax.lax.while_loop(lambda both: eqxi.unvmap_any(more(both[0])), together, (carry, of_parameters))


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
        if self.steps == 1 or not (self.t1 or self.steps):
            return left, None, None
        # With `steps` diffrax counts this place whether or not it fills it.
        there = self.t1 if self.steps == 0 else self.t1 & (steps % self.steps != 0)
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
            _, left_ts, _ = carry
            time = ts[jnp.maximum(left_ts - 1, 0)]
            return (left_ts > 0) & (time > interval.start)

        def meet(field, carry, of_parameters):
            left, left_ts, of_info = carry
            left, left_ts = jnp.maximum(left - 1, 0), jnp.maximum(left_ts - 1, 0)
            time = ts[left_ts]
            evaluate = lambda info: interpolation(t0=interval.start, t1=interval.end, **info).evaluate(time)
            y, back_info = jax.vjp(evaluate, info)
            value, back = field.save(self.index, time, y)
            more, of_y = back(self._cotangent(value, left))
            of_parameters = of_parameters if more is None else add(of_parameters, more)
            return (left, left_ts, add(of_info, back_info(of_y)[0])), of_parameters

        none = jtu.tree_map(jnp.zeros_like, (info, field.parameters))
        (left, left_ts, of_info), of_parameters = walk(there, meet, field, (left, left_ts, none[0]), none[1])
        return left, left_ts, of_info, of_parameters

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
        value, back = field.only(jnp.asarray(there)).save(self.index, t, y)
        of_parameters, of_y = back(self._picked(value, pick))
        return of_y, of_parameters

    def _picked(self, value, pick):
        def one(value, c):
            if value is None:
                return None
            return jnp.zeros_like(value) if c is None else pick(c)

        return jtu.tree_map(one, value, self.cotangents, is_leaf=lambda leaf: leaf is None)
