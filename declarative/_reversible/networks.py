r"""Reversible residual networks: backpropagation that recomputes activations from the output instead of storing them.

A block maps a pair to a pair of the same shapes, and has an inverse in closed form:

| block             | forward                                                    | inverse                                              |
|-------------------|------------------------------------------------------------|------------------------------------------------------|
| `ReversibleBlock` | $y_1 = x_1 + f(x_2)$, $y_2 = x_2 + g(y_1)$                  | $x_2 = y_2 - g(y_1)$, $x_1 = y_1 - f(x_2)$            |
| `MomentumBlock`   | $v' = \gamma v + (1-\gamma) f(x)$, $x' = x + v'$             | $x = x' - v'$, $v = (v' - (1-\gamma) f(x))/\gamma$    |

**Gradient.** Backwards through the blocks, each first inverted and then differentiated at the input so found: one evaluation and one
vector-Jacobian product of every f and g. Memory is that of one block, whatever the depth, and the gradients of the parameters, one of each
also where `jax.vmap` runs a batch through the network inside a loss.
**Rounding.** The input found differs from the one that was there by rounding, which the blocks before amplify; the momentum block's
division by $\gamma$ amplifies it by $1/\gamma$ a block, so a sequence of N needs $N \ln(1/\gamma) \lesssim \ln(\mathrm{tol}/\epsilon)$.
`ReversibleSequence.round_trip` measures it.

References: Gomez et al. 2017, arXiv:1707.04585 (Section 3; the backward pass is its Algorithm 1); Sander et al. 2021, arXiv:2102.07870
(momentum).
"""

import abc
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._core.arguments import integer
from .._core.summed import Rule, vjp
from .._linear.norms import largest


class AbstractReversibleBlock(eqx.Module):
    """A bijection of pairs, for `ReversibleSequence`. A block of your own defines `forward` and `inverse`; `pull_back` follows from them.

    `key` and `state` are handed to the modules inside if they are not None. In the blocks here a module f inside is called as `f(x)`,
    `f(x, key=key)`, `f(x, state)` or `f(x, state, key=key)`; with a state it returns `(value, state)`, as Equinox's stateful layers do.
    """

    @abc.abstractmethod
    def forward(
        self, x: tuple[PyTree, PyTree], state: Any, key: PRNGKeyArray | None
    ) -> tuple[tuple[PyTree, PyTree], Any]:
        """(output, new state)."""

    @abc.abstractmethod
    def inverse(self, y: tuple[PyTree, PyTree], state: Any, key: PRNGKeyArray | None) -> tuple[PyTree, PyTree]:
        """The input that `forward` maps to y, with the state and the key that it had then."""

    def pull_back(self, y, cotangent, state, key):
        """(input, its cotangent, the block's cotangent) from the output and its cotangent."""
        x = self.inverse(y, state, key)
        _, back = _vjp(lambda block, x: block.forward(x, state, key)[0], self, x)
        of_block, of_x = back(cotangent)
        return x, of_x, of_block

    def __call__(self, x, state=None, *, key: PRNGKeyArray | None = None):
        y, new = self.forward(_pair(x), state, key)
        return y if state is None else (y, new)


class ReversibleBlock(AbstractReversibleBlock):
    """$y_1 = x_1 + f(x_2)$, $y_2 = x_2 + g(y_1)$.

    **Arguments:** `f`, from the second half's structure to the first's, and `g` the other way: Equinox modules or functions.
    """

    f: Callable
    g: Callable

    def forward(self, x, state, key):
        x1, x2 = x
        keys = (None, None) if key is None else jr.split(key)
        step, state = _call(self.f, x2, state, keys[0])
        y1 = _add(x1, step)
        step, state = _call(self.g, y1, state, keys[1])
        return (y1, _add(x2, step)), state

    def inverse(self, y, state, key):
        y1, y2 = y
        keys = (None, None) if key is None else jr.split(key)
        x2 = _subtract(y2, _call(self.g, y1, state, keys[1])[0])
        return _subtract(y1, _call(self.f, x2, state, keys[0])[0]), x2

    def pull_back(self, y, cotangent, state, key):
        # As in the paper: the evaluation that inverts is the one that is differentiated.
        (y1, y2), (c1, c2) = y, cotangent
        keys = (None, None) if key is None else jr.split(key)
        step, back = _vjp(lambda g, y1: _call(g, y1, state, keys[1])[0], self.g, y1)
        of_g, more = back(_of_type(c2, step))
        x2, c1 = _subtract(y2, step), _add(c1, more)
        step, back = _vjp(lambda f, x2: _call(f, x2, state, keys[0])[0], self.f, x2)
        of_f, more = back(_of_type(c1, step))
        return (_subtract(y1, step), x2), (c1, _add(c2, more)), _cotangent(self, f=of_f, g=of_g)


class MomentumBlock(AbstractReversibleBlock):
    r"""$v' = \gamma v + (1-\gamma) f(x)$, $x' = x + v'$ on pairs (x, v): a residual network with momentum; v starts at any value.

    **Arguments:** `f`: an Equinox module or function from x to an update of the same structure. `gamma`: in (0, 1]; static, not learnt.
    """

    f: Callable
    gamma: float = eqx.field(static=True)

    def __init__(self, f: Callable, gamma: float = 0.9):
        if not 0 < gamma <= 1:
            raise ValueError(
                f"gamma must lie in (0, 1], got {gamma!r}: at 0 a block forgets its momentum and has no inverse."
            )
        self.f = f
        self.gamma = gamma

    def forward(self, x, state, key):
        x, v = x
        step, state = _call(self.f, x, state, key)
        v = _add(_times(self.gamma, v), _times(1 - self.gamma, step))
        return (_add(x, v), v), state

    def inverse(self, y, state, key):
        x, v = _subtract(*y), y[1]
        step, _ = _call(self.f, x, state, key)
        return x, self._before(v, step)

    def _before(self, v, step):
        return jtu.tree_map(lambda v: v / self.gamma, _subtract(v, _times(1 - self.gamma, step)))

    def pull_back(self, y, cotangent, state, key):
        c, d = cotangent
        x, v = _subtract(*y), y[1]
        step, back = _vjp(lambda f, x: _call(f, x, state, key)[0], self.f, x)
        d = _add(c, d)
        of_f, more = back(_of_type(_times(1 - self.gamma, d), step))
        return (x, self._before(v, step)), (_add(c, more), _times(self.gamma, d)), _cotangent(self, f=of_f)


class ReversibleSequence(eqx.Module):
    """`depth` blocks of one kind in a row, compiled once, whose gradient takes the memory of one.

    `ReversibleSequence(make, depth, key=key)` builds the blocks as `make(key)`, with stacked parameters. A call maps a pair (x1, x2) to a
    pair. Reverse mode only; to differentiate twice stores what the backward pass computes.

    **Arguments:**

    - `make`: from a key to a block.
    - `depth`: how many, at least 1.
    - `key`: split among the blocks.
    - `backward`: `"reconstruct"`, or `"store"`: ordinary backpropagation, to compare with.

    **Call:** `sequence(x, state=None, key=None)`. With `key` each module inside is given one of its own, the same in both passes. With
    `state`, the `eqx.nn.State` of the model around it (`eqx.nn.make_with_state`), the result is `(y, new_state)`: the forward pass alone
    updates it. Every module inside then takes and returns a state (`f(x, state)`), the modules of one block do not share a stateful
    layer, and gradients do not flow through the state. Batch normalisation needs modules that take the batch and bind its axis
    themselves (`jax.vmap(..., axis_name=...)` inside of f): a `vmap` around a call returns a new state for each of its lanes.
    """

    blocks: AbstractReversibleBlock
    depth: int = eqx.field(static=True)
    backward: Literal["reconstruct", "store"] = eqx.field(static=True)

    def __init__(
        self,
        make: Callable[[PRNGKeyArray], Any],
        depth: int,
        *,
        key: PRNGKeyArray,
        backward: str = "reconstruct",
    ):
        integer(depth, "depth")
        if backward not in ("reconstruct", "store"):
            raise ValueError(f"backward must be 'reconstruct' or 'store', got {backward!r}.")
        self.blocks = eqx.filter_vmap(make)(jr.split(key, depth))
        if not isinstance(self.blocks, AbstractReversibleBlock):
            raise ValueError(f"make must return a reversible block, got {type(self.blocks).__name__}.")
        self.depth = depth
        self.backward = backward  # pyright: ignore[reportAttributeAccessIssue]  (checked above)

    def __call__(self, x, state=None, *, key: PRNGKeyArray | None = None):
        x = _pair(x)
        keys = None if key is None else jr.split(key, self.depth)
        run = _reconstructing if self.backward == "reconstruct" else _primal
        if state is None:
            return run((x, self.blocks), (self.depth, None, keys))[0]
        y, new = run((x, self.blocks), (self.depth, _constant(state.substate(self.blocks)), keys))
        return y, _copy(state).update(_constant(new))

    def inverse(self, y, state=None, *, key: PRNGKeyArray | None = None):
        """The input that was mapped to y, with the state and key that the call had."""
        keys = None if key is None else jr.split(key, self.depth)
        state = None if state is None else state.substate(self.blocks)
        arrays, static = eqx.partition(self.blocks, eqx.is_array)

        def back(y, each):
            arrays, state, key = each
            return eqx.combine(arrays, static).inverse(y, state, key), None

        return jax.lax.scan(back, _pair(y), (arrays, state, keys), self.depth, reverse=True)[0]

    def round_trip(self, x, state=None, *, key: PRNGKeyArray | None = None) -> Float[Array, ""]:
        """How far `inverse` of the output is from x: the largest difference over the largest entry of x (over 1 if x is zero)."""
        keys = None if key is None else jr.split(key, self.depth)
        sub = None if state is None else state.substate(self.blocks)
        y, _ = _forward((self.blocks, _pair(x)), self.depth, sub, keys)
        off = _subtract(self.inverse(y, state, key=key), _pair(x))
        size = largest(x)
        return largest(off) / jnp.where(size > 0, size, 1)


def _forward(blocks_and_x, depth, state, keys):
    blocks, x = blocks_and_x
    arrays, static = eqx.partition(blocks, eqx.is_array)

    def step(x, each):
        arrays, state, key = each
        return eqx.combine(arrays, static).forward(x, state, key)

    return jax.lax.scan(step, x, (arrays, state, keys), depth)


def _primal(x_and_blocks, constants):
    x, blocks = x_and_blocks
    return _forward((blocks, x), *constants)


def _forwards(x_and_blocks, constants):
    y, new = _primal(x_and_blocks, constants)
    return (y, new), y


def _backwards(y, cotangents, perturbed, x_and_blocks, constants):
    del perturbed
    _, blocks = x_and_blocks
    depth, state, keys = constants
    arrays, static = eqx.partition(blocks, eqx.is_array)
    cotangent = jtu.tree_map(lambda c, y: jnp.zeros_like(y) if c is None else c, cotangents[0], y, is_leaf=_is_none)

    def back(carry, each):
        arrays, state, key = each
        y, cotangent = carry
        x, cotangent, of_block = eqx.combine(arrays, static).pull_back(y, cotangent, state, key)
        return (x, cotangent), eqx.filter(of_block, eqx.is_array)

    (_, of_x), of_blocks = jax.lax.scan(back, (y, cotangent), (arrays, state, keys), depth, reverse=True)
    return of_x, of_blocks


_reconstructing = Rule(_primal, _forwards, _backwards)


def _vjp(fn, module, x):
    """`fn(module, x)` and its pullback `cotangent -> (of_module, of_x)`, summed over lanes that share the module."""
    (of_module, of_x), still = eqx.partition((module, x), eqx.is_inexact_array)
    return vjp(lambda *moving: fn(*eqx.combine(moving, still)), of_module, of_x)


def _cotangent(block, **fields):
    """A cotangent of the block from those of some of its fields."""
    empty = jtu.tree_map(lambda _: None, eqx.filter(block, eqx.is_array))
    names = list(fields)
    return eqx.tree_at(
        lambda block: [getattr(block, name) for name in names],
        empty,
        [fields[name] for name in names],
        is_leaf=_is_none,
    )


def _is_none(leaf):
    return leaf is None


def _pair(x) -> tuple[PyTree, PyTree]:
    if not (isinstance(x, tuple) and len(x) == 2):
        raise ValueError(
            "a reversible block maps a pair (x1, x2) to a pair; split the features with jnp.split(x, 2, axis=-1), for instance. "
            f"Got a {type(x).__name__}{f' of {len(x)}' if isinstance(x, tuple | list) else ''}."
        )
    return x[0], x[1]


def _call(function, x, state, key):
    # Equinox lets a `State` be used once; both passes, and both modules of a block, start from the same one.
    arguments = (x,) if state is None else (x, _copy(state))
    keywords = {} if key is None else {"key": key}
    out = function(*arguments, **keywords)
    return (out, None) if state is None else out


def _copy(state):
    return jtu.tree_map(lambda leaf: leaf, state)


def _constant(state):
    """State carries no gradient, whichever the backward pass."""
    return jtu.tree_map(lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_inexact_array(leaf) else leaf, state)


def _of_type(cotangent, value):
    """The cotangent of a branch's output, whose dtype may be lower than that of the sum that it goes into."""
    return jtu.tree_map(lambda c, v: c.astype(v.dtype), cotangent, value)


def _times(factor: float, tree):
    return jtu.tree_map(lambda leaf: factor * leaf, tree)


def _add(a, b):
    return jtu.tree_map(lambda a, b: a + _fitting(a, b), a, b)


def _subtract(a, b):
    return jtu.tree_map(lambda a, b: a - _fitting(a, b), a, b)


def _fitting(a, b):
    if jnp.shape(a) != jnp.shape(b):
        raise ValueError(
            f"a module inside a reversible block must return the shape that it is added to, {jnp.shape(a)}, but returned {jnp.shape(b)}."
        )
    half, got = jnp.result_type(a), jnp.result_type(b)
    if got.itemsize > half.itemsize:
        raise ValueError(
            f"a module inside a reversible block returned {got}, which does not fit into the {half} that it is added to: cast the input "
            f"to {got}, or the module to {half}."
        )
    return b
