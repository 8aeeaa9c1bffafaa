"""User functions whose closed-over arrays get their gradient.

`Root(lambda y, x: y - jnp.tanh(weight @ y + x))` closes over `weight`. Under `jax.grad` that is a tracer which a custom
derivative rule may not capture, and which jaxopt silently treated as a constant. Here the function is traced once, at the call,
into a jaxpr and the arrays that it captured; they become ordinary inputs of the node.
"""

import itertools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.extend
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree


class _Trace:
    """A jaxpr that compares equal to another trace of the same function to the same text.

    Equality is what `jax.jit` keys its cache on: an eager caller does not compile again on a second call, and a Python number
    that the function closes over, and that has changed since, shows in the text and does compile again.
    """

    def __init__(self, fn, jaxpr, in_tree, out_tree):
        self.jaxpr, self.in_tree, self.out_tree = jaxpr, in_tree, out_tree
        self.key = (str(jaxpr), in_tree, out_tree, _identity(fn))

    def __hash__(self):
        return hash(self.key[:3])

    def __eq__(self, other):
        return isinstance(other, _Trace) and self.key == other.key


def _identity(fn):
    # The text of a jaxpr does not show the rule behind a custom derivative, so the function itself is compared as well; an
    # Equinox module by its structure, its arrays being among the captured ones.
    if isinstance(fn, eqx.Module):
        static = eqx.filter(fn, eqx.is_array, inverse=True)
        return jtu.tree_structure(fn), tuple(jtu.tree_leaves(static))
    return fn


class Closed(eqx.Module):
    """A function with the arrays that it captured as leaves."""

    captured: list[Array]
    trace: Any = eqx.field(static=True)

    def __call__(self, *args: PyTree) -> PyTree:
        # Static leaves (functions in a module) were fixed by the trace.
        leaves, in_tree = jtu.tree_flatten(eqx.filter(args, eqx.is_array))
        assert in_tree == self.trace.in_tree, "A closed function is called with the structure that it was traced for."
        closed = jax.extend.core.ClosedJaxpr(self.trace.jaxpr, self.captured)
        out = jax.extend.core.jaxpr_as_fun(closed)(*leaves)
        return jtu.tree_unflatten(self.trace.out_tree, out)

    def read(self, *, returned: bool) -> PyTree[bool]:
        """For each array among the arguments, whether the function computes something from it that it returns; True if in doubt.

        `returned`: what is to be said of an argument that is returned as it is.
        """
        jaxpr = self.trace.jaxpr
        inputs = set() if returned else set(jaxpr.invars)
        computed = [atom for atom in jaxpr.outvars if _is_variable(atom) and atom not in inputs]
        return jtu.tree_unflatten(self.trace.in_tree, _read(jaxpr, computed))


def _read(jaxpr, returned) -> list[bool]:
    """Which inputs of a jaxpr `returned` depends on. Looks into `jax.jit`; whatever else is called reads all that it is given."""
    live = set(filter(_is_variable, returned))
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not live.isdisjoint(equation.outvars):
            inner = itertools.repeat(True)
            if equation.primitive.name == "jit":
                called = equation.params["jaxpr"].jaxpr
                inner = _read(called, called.outvars)
            live |= {var for var, read in zip(equation.invars, inner, strict=False) if read and _is_variable(var)}
    return [var in live for var in jaxpr.invars]


def _is_variable(atom) -> bool:
    return not isinstance(atom, jax.extend.core.Literal)


def close(fn: Callable, *args: PyTree) -> Closed:
    """Traces `fn(*args)` once. Arguments are arrays; `fn` may be a function, a partial or an Equinox module."""
    if isinstance(fn, Closed):
        return fn
    is_data = lambda leaf: eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)
    dynamic, static = eqx.partition(args, is_data)
    leaves, in_tree = jtu.tree_flatten(dynamic)
    out_tree = None

    def flat(*leaves):
        nonlocal out_tree
        out, out_tree = jtu.tree_flatten(fn(*eqx.combine(jtu.tree_unflatten(in_tree, leaves), static)))
        return out

    closed = jax.make_jaxpr(flat)(*leaves)
    # NumPy arrays in a closure are captured as they are.
    return Closed([jnp.asarray(const) for const in closed.consts], _Trace(fn, closed.jaxpr, in_tree, out_tree))
