r"""Custom backward passes that know about `vmap`: gradients of what the lanes share are summed as they arise.

`jax.custom_vjp` under `vmap` runs its backward pass lane by lane: each lane holds a whole gradient of the network's weights until the end,
where they are summed. For a pass that walks backwards through many steps that is most of its memory and much of its time. Here a
function that is first batched and then differentiated, as in `grad(loss)` with a `vmap` inside, walks back with all lanes at once, and
`vjp` inside of it sums over the lanes at every step, as JAX does for functions without a custom rule. Differentiated first and then
batched, `vmap(grad(f))`, each lane keeps its own gradient, as it must.

The order of the two is what a primitive sees and a `custom_vjp` does not: hence the primitive.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.core
import jax.extend.core
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.custom_batching import custom_vmap
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Bool, PyTree

from .closure import Closed, close


class Level(NamedTuple):
    """One `vmap`: which leaves it maps (over their first axis), how many lanes, and the name of its axis."""

    mapped: tuple[bool, ...]
    size: int
    name: Any


class Rule(NamedTuple):
    """A function of `((own, parameters), constants)`, pytrees of anything, with a backward pass of its own.

    - `primal((own, parameters), constants) -> out`
    - `forward((own, parameters), constants) -> (out, residuals)`
    - `backward(residuals, cotangents, perturbed, (own, parameters), constants)`: a tree like `(own, parameters)`, with a cotangent at
      each leaf that `perturbed` asks for. Those of `parameters` come from `vjp` below, summed over the lanes that share them already: they
      are added to each other, and scaled by nothing that depends on the lane. Those of `own` are the lane's.
    """

    primal: Callable
    forward: Callable
    backward: Callable

    def __call__(self, differentiable: tuple[PyTree, PyTree], constants: PyTree) -> PyTree:
        arrays, static = eqx.partition((differentiable, constants), eqx.is_array)
        leaves, treedef = jtu.tree_flatten(arrays)
        struct = eqx.filter_eval_shape(self.primal, differentiable, constants)
        shapes, rest = eqx.partition(struct, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
        shapes, out_tree = jtu.tree_flatten(shapes)
        call = _Call(self, treedef, static, shapes, out_tree)
        return eqx.combine(jtu.tree_unflatten(out_tree, _call_p.bind(*leaves, call=call, levels=())), rest)


class _Call:
    """One call of a rule: everything about it that is no array. Its methods are those of one lane."""

    def __init__(self, rule: Rule, treedef, static, shapes, out_tree):
        self.rule, self.treedef, self.static, self.shapes, self.out_tree = rule, treedef, static, shapes, out_tree

    def arguments(self, leaves):
        return eqx.combine(jtu.tree_unflatten(self.treedef, leaves), self.static)

    def primal(self, leaves):
        return jtu.tree_leaves(eqx.filter(self.rule.primal(*self.arguments(leaves)), eqx.is_array))

    def forward(self, leaves):
        out, residuals = self.rule.forward(*self.arguments(leaves))
        return jtu.tree_leaves(eqx.filter(out, eqx.is_array)), residuals

    def backward(self, leaves, residuals, cotangents, asked):
        differentiable, constants = self.arguments(leaves)
        flags = jtu.tree_unflatten(self.treedef, asked)[0]
        perturbed = eqx.combine(flags, jtu.tree_map(lambda _: False, differentiable))
        cotangents = jtu.tree_unflatten(self.out_tree, cotangents)
        result = self.rule.backward(residuals, cotangents, perturbed, differentiable, constants)
        found = jtu.tree_structure(flags).flatten_up_to(result)
        return [
            jnp.zeros_like(leaf) if c is None else c
            for c, leaf, wanted in zip(found, leaves, asked, strict=False)
            if wanted
        ]

    def owned(self) -> list[bool]:
        """Of the leaves of `(own, parameters)`, which come first: whether they are in `own`."""
        parts, _ = jtu.tree_unflatten(self.treedef, range(self.treedef.num_leaves))
        own, parameters = (len(jtu.tree_leaves(part)) for part in parts)
        return [True] * own + [False] * parameters


def _over(fn: Callable, levels: tuple[Level, ...], in_axes: Callable, out_axes: Callable) -> Callable:
    """`fn` under as many `vmap`s; axes are functions of the level. Its results may hold what is no array."""
    static: list = []

    def of_arrays(*args):
        arrays, rest = eqx.partition(fn(*args), eqx.is_array)
        static.append(rest)
        return arrays

    batched = of_arrays
    for level in levels:
        batched = jax.vmap(batched, in_axes(level), out_axes(level), axis_name=level.name, axis_size=level.size)
    return lambda *args: eqx.combine(batched(*args), static[-1])


def _axes(level: Level) -> list[int | None]:
    return [0 if mapped else None for mapped in level.mapped]


def _differentiated(call: _Call, levels: tuple[Level, ...], asked: tuple[bool, ...]) -> Callable:
    """The function of `(leaves that are asked for, the others)`, with its rule."""

    owned = [own for own, wanted in zip(call.owned(), asked, strict=False) if wanted]

    def merged(moving, still):
        moving, still = iter(moving), iter(still)
        return [next(moving) if wanted else next(still) for wanted in asked]

    @eqx.filter_custom_vjp
    def function(moving, still):
        return _over(call.primal, levels, lambda level: (_axes(level),), lambda level: 0)(merged(moving, still))

    @function.def_fwd
    def _(perturbed, moving, still):
        del perturbed
        out, *residuals = _forward(call, levels, merged(moving, still))
        return out, residuals

    @function.def_bwd
    def _(residuals, cotangents, perturbed, moving, still):
        del perturbed
        arrays, (tree, rest), varies = residuals

        def backward(leaves, arrays, cotangents):
            with _summing(tuple(level.name for level in levels)):
                residuals = eqx.combine(jtu.tree_unflatten(tree, arrays), rest)
                return call.backward(leaves, residuals, cotangents, asked)

        for level, axes in zip(levels, varies, strict=True):
            backward = _with_lanes(backward, level, axes, asked, owned)
        return backward(merged(moving, still), arrays, cotangents)

    return function


@functools.cache
def _tracer_of_vmap() -> type:
    """The class of what `vmap` hands to a function; JAX has no public name for it."""
    kinds: list[type] = []
    jax.eval_shape(jax.vmap(lambda x: kinds.append(type(x))), jax.ShapeDtypeStruct((1,), jnp.float32))
    return kinds[0]


def _forward(call: _Call, levels: tuple[Level, ...], leaves):
    """`(out, arrays of the residuals, their structure, which of them vary among the lanes of each level)`."""
    structure, varies = [], []

    def run(leaves):
        out, residuals = call.forward(leaves)
        arrays, rest = eqx.partition(residuals, eqx.is_array)
        arrays, tree = jtu.tree_flatten(arrays)
        structure.append((tree, rest))
        return out, arrays

    for level in levels:
        run = _forward_with_lanes(run, level, varies)
    out, arrays = run(leaves)
    return out, arrays, structure[-1], varies


def _forward_with_lanes(run: Callable, level: Level, varies: list) -> Callable:
    def over(leaves):
        common: list = []

        def lane(leaves):
            out, arrays = run(leaves)
            # What no lane changed is no tracer of this vmap: it is taken out past it, and the way back knows that the lanes agree.
            flags = [isinstance(leaf, _tracer_of_vmap()) for leaf in arrays]
            common.append((flags, [leaf for leaf, flag in zip(arrays, flags, strict=True) if not flag]))
            return out, [leaf for leaf, flag in zip(arrays, flags, strict=True) if flag]

        out, own = jax.vmap(lane, (_axes(level),), 0, axis_name=level.name, axis_size=level.size)(leaves)
        flags, same = common[-1]
        varies.append(flags)
        own, same = iter(own), iter(same)
        return out, [next(own) if flag else next(same) for flag in flags]

    return over


def _with_lanes(backward: Callable, level: Level, varies, asked, owned) -> Callable:
    """The backward pass under one `vmap` more. Cotangents of parameters that its lanes share come summed; those of the own are summed here."""
    mapped = [m for m, wanted in zip(level.mapped, asked, strict=True) if wanted]
    out_axes = [0 if m or own else None for m, own in zip(mapped, owned, strict=True)]
    of_arrays = [0 if flag else None for flag in varies]
    lanes = jax.vmap(backward, (_axes(level), of_arrays, 0), out_axes, axis_name=level.name, axis_size=level.size)

    def summed(*args):
        found = zip(lanes(*args), mapped, owned, strict=True)
        return [jnp.sum(c, axis=0) if own and not m else c for c, m, own in found]

    return summed


def _run(*leaves, call: _Call, levels: tuple[Level, ...]):
    return _over(call.primal, levels, lambda level: (_axes(level),), lambda level: 0)(list(leaves))


def _shapes(*avals, call: _Call, levels: tuple[Level, ...]):
    lanes = tuple(level.size for level in reversed(levels))
    return [jax.core.ShapedArray(lanes + s.shape, s.dtype, weak_type=s.weak_type) for s in call.shapes]


def _jvp(primals, tangents, *, call: _Call, levels: tuple[Level, ...]):
    asked = tuple(type(t) is not ad.Zero for t in tangents)
    if any(asked[len(call.owned()) :]):
        raise ValueError("what a rule is not differentiated in must carry no tangent: jax.lax.stop_gradient it.")
    pick = lambda items, flag: [item for item, wanted in zip(items, asked, strict=True) if wanted is flag]
    function, still = _differentiated(call, levels, asked), pick(primals, False)
    out, out_tangents = jax.jvp(
        lambda *moving: function(list(moving), still), pick(primals, True), pick(tangents, True)
    )
    zero = lambda value: ad.Zero(jax.typeof(value).to_tangent_aval())
    return out, [zero(v) if t.dtype == jax.dtypes.float0 else t for v, t in zip(out, out_tangents, strict=True)]


def _batched(axis, leaves, dims, *, call: _Call, levels: tuple[Level, ...]):
    if all(dim is None for dim in dims):
        out = _call_p.bind(*leaves, call=call, levels=levels)
        return out, [None] * len(out)
    leaves = [leaf if dim is None else jnp.moveaxis(leaf, dim, 0) for leaf, dim in zip(leaves, dims, strict=True)]
    level = Level(tuple(dim is not None for dim in dims), axis.size, axis.name)
    out = _call_p.bind(*leaves, call=call, levels=(*levels, level))
    return out, [0] * len(out)


_call_p = jax.extend.core.Primitive("declarative_summed_vjp")
_call_p.multiple_results = True
_call_p.def_impl(_run)
_call_p.def_abstract_eval(_shapes)
ad.primitive_jvps[_call_p] = _jvp
batching.fancy_primitive_batchers[_call_p] = _batched
mlir.register_lowering(_call_p, mlir.lower_fun(_run, multiple_results=True))


# Inside of a backward pass

# The `vmap`s of the pass being traced that sum what their lanes share, innermost first: the names of their axes.
_levels: contextvars.ContextVar[tuple] = contextvars.ContextVar("levels", default=())


@contextlib.contextmanager
def _summing(levels: tuple):
    token = _levels.set(levels)
    try:
        yield
    finally:
        _levels.reset(token)


def summing(*decisive: PyTree) -> bool:
    """Whether lanes of the backward pass being traced walk together and (given arrays) differ in any of these."""
    arrays = jtu.tree_leaves(decisive)
    return bool(_levels.get()) and (not decisive or any(isinstance(leaf, _tracer_of_vmap()) for leaf in arrays))


def vjp(fn: Callable, parameters: PyTree, *x: PyTree, where: Bool[Array, ""] | None = None):
    """`jax.vjp(fn, parameters, *x)`, whose cotangent of `parameters` is summed over the lanes that share them.

    `where`: False for a lane that takes no part: its cotangents are zero, even if `fn` has no finite derivative at its x.
    """
    levels = _levels.get()
    if not levels or not jtu.tree_leaves(parameters):
        value, back = jax.vjp(fn, parameters, *x)
        if where is None:
            return value, back
        return value, lambda cotangent: jtu.tree_map(lambda leaf: jnp.where(where, leaf, 0), back(cotangent))
    closed = close(fn, parameters, *x)
    where = jnp.asarray(True) if where is None else where
    lane = lambda captured, parameters, x, where: Closed(captured, closed.trace)(parameters, *x)
    value, pull = _together(lane, levels, _value), _together(lane, levels, _pull)

    def back(cotangent):
        of_parameters, of_x = pull(closed.captured, parameters, x, where, cotangent)
        return of_parameters, *of_x

    # The pullback computes the value again, by the same operations in the same loop: the compiler makes one of the two.
    return value(closed.captured, parameters, x, where), back


def _value(fn, captured, parameters, x, where):
    return fn(captured, parameters, x, where)


def _pull(fn, captured, parameters, x, where, cotangent):
    _, back = jax.vjp(lambda parameters, x: fn(captured, parameters, x, where), parameters, x)
    return jtu.tree_map(lambda leaf: jnp.where(jnp.any(where), leaf, 0), back(cotangent))


def _together(fn: Callable, levels: tuple, use: Callable) -> Callable:
    """`use(fn, captured, parameters, x, where[, cotangent])`, of which the lanes of so many vmaps make one call."""
    plain = lambda *args: use(fn, *args)
    if not levels:
        return plain
    together = custom_vmap(plain)

    @together.def_vmap
    def _(size, mapped, captured, parameters, x, where, *cotangent):
        of_captured, of_parameters, of_x, of_where, *of_cotangent = mapped
        spread = lambda leaf, flag: leaf if flag else jnp.broadcast_to(leaf, (size, *jnp.shape(leaf)))
        x, cotangent = jtu.tree_map(spread, x, of_x), jtu.tree_map(spread, cotangent, tuple(of_cotangent))
        axes = lambda flags: jtu.tree_map(lambda flag: 0 if flag else None, flags)
        lane_axes = axes(of_captured), axes(of_parameters), 0, axes(of_where)
        apart = of_where and size > 0

        def some(where):
            return jnp.any(where.reshape(size, -1), axis=1)

        def choose(where, leaf, other):
            return jnp.where(some(where).reshape(size, *(1,) * (leaf.ndim - 1)), leaf, other)

        def batched(captured, parameters, x, where):
            if apart:
                # A lane that takes no part stands where one that does stands: it must have a derivative there. Inside of what is
                # differentiated: the cotangents of parameters are then summed as if nothing had happened.
                one, taking_part = jnp.argmax(some(where)), where
                stand = lambda leaf, flag=True: choose(taking_part, leaf, leaf[one]) if flag else leaf
                captured = jtu.tree_map(stand, captured, of_captured)
                parameters = jtu.tree_map(stand, parameters, of_parameters)
                x, where = jtu.tree_map(stand, x), stand(where)
            return jax.vmap(fn, lane_axes, axis_size=size, axis_name=levels[0])(captured, parameters, x, where)

        if apart:
            cotangent = jtu.tree_map(lambda leaf: choose(where, leaf, 0), cotangent)
        out = _together(batched, levels[1:], use)(captured, parameters, x, where, *cotangent)
        everywhere = lambda tree: jtu.tree_map(lambda _: True, tree)
        return out, (of_parameters, everywhere(x)) if cotangent else everywhere(out)

    return together


def nan_where(bad: Bool[Array, ""], tree: PyTree) -> PyTree:
    """NaN in place of cotangents of a lane that is bad; of sums over lanes, if one of them is."""
    levels, fill = _levels.get(), lambda leaf, bad: jnp.where(bad, jnp.nan, leaf)
    return jtu.tree_map(lambda leaf: _nan_where(fill, levels)(leaf, bad), tree)


def _nan_where(fill: Callable, levels: tuple) -> Callable:
    if not levels:
        return fill
    together = custom_vmap(fill)

    @together.def_vmap
    def _(size, mapped, leaf, bad):
        of_leaf, of_bad = mapped
        if not of_leaf:
            return _nan_where(fill, levels[1:])(leaf, jnp.any(bad, axis=0)), False
        lanes = jax.vmap(fill, (0, 0 if of_bad else None), axis_size=size)
        return _nan_where(lanes, levels[1:])(leaf, bad), True

    return together
