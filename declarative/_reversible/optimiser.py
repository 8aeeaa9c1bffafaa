r"""Gradient descent with momentum that runs backwards bit for bit, and the hypergradients that come of it.

**Iteration.** From $w_0$ and $v_0 = 0$, with $g_t = \nabla_w L(w_t, \theta, t)$,

$$ v_{t+1} = \gamma_t v_t - (1-\gamma_t)\, g_t \quad (1), \qquad w_{t+1} = w_t + \alpha_t v_{t+1} \quad (2). $$

**Gradient.** Backwards, $w_t = w_{t+1} - \alpha_t v_{t+1}$ (3), then $g_t$, then $v_t = (v_{t+1} + (1-\gamma_t) g_t)/\gamma_t$ (4); with the
cotangents $\bar w, \bar v$ of $w_{t+1}, v_{t+1}$ on the way, in this order,

$$ \bar\alpha_t = \bar w\cdot v_{t+1}, \quad \bar v \mathrel{+}= \alpha_t\bar w, \quad \bar\gamma_t = \bar v\cdot(v_t + g_t), $$
$$ (\bar w, \bar\theta) \mathrel{-}= (1-\gamma_t)\,\nabla_{(w,\theta)}(\nabla_w L\cdot\bar v), \quad \bar v \leftarrow \gamma_t\bar v. \quad (5) $$

**Arithmetic.** In floating point (4) fails: $\gamma v$ drops $\log_2 1/\gamma$ bits of v in every step, and the division amplifies what is
missing by $1/\gamma$ a step. Here w and v are integers, multiples of a fixed unit. Adding a rounded increment is then exact, and taken back
exactly. In the product $\gamma v$, $\gamma = n/d$ with $d = 2^{16}$ ($2^{32}$ in float64), and the bits that it drops go to a *buffer*
of integers, one for each parameter:

- write $v = hd + jD + r$ with $0 \le jD < d$ and $0 \le r < D$, where D, a power of two from $2^5$ to $2^8$, divides d;
- the D numbers of bin j have only $N_j = \lfloor (j+1) nD/d\rfloor - \lfloor j nD/d\rfloor$ places to go to, those from
  $hn + \lfloor j nD/d\rfloor$ on, so put r into the buffer, and let the buffer choose the place: with $i = bD + r$,
  $v' = hn + \lfloor j nD/d\rfloor + (i \bmod N_j)$ and $b' = \lfloor i/N_j\rfloor$. (6)

Every line can be undone, so nothing is lost: the buffer grows by $\log_2(D/N_j) \approx \log_2 1/\gamma$ bits a step, and $v'$ is within D units
of $\gamma v$. Division rounds down, for negative v too. All in integers of the weights' own width: no float64 is needed.

**Memory.** A buffer is 64 bits. How many steps fit in it at worst follows from the smallest momentum allowed, before anything runs;
after as many steps the next one begins. The whole stack of them is known in size, and is all that grows with the number of steps.

**What differs from the paper.** Its Algorithm 3 is (6) with one bin, $D = d = 2^{16}$: $\gamma v$ is then off by up to $2^{16}$ units, which
32-bit integers cannot afford, and $\gamma$ is a multiple of $2^{-16}$. Its buffers are integers of any length.

Reference: Maclaurin, Duvenaud & Adams 2015, *Gradient-based Hyperparameter Optimization through Reversible Learning*,
arXiv:1502.03492: Algorithm 1 is (1)-(2), Algorithm 2 is (3)-(5).
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32

from .._core.arguments import integer
from .._core.closure import close

_WORD_BITS = 64  # of a buffer: two limbs of 32, as JAX has no 64-bit integers unless x64 is enabled
_TOLERATED = 1.5  # stored bits over log2(1/min_momentum), above which larger bins, that round worse, are taken
_FAILURES = (
    "is not the cause",
    "momentum must lie in [min_momentum, 1): the buffers are sized for `min_momentum`. Pass the smallest momentum that you use as "
    "`min_momentum`, or bound the momentum.",
    "w0 has an entry that is not finite, or not below `limit` in magnitude.",
    "the gradient of the objective is not finite. Does the iteration diverge? Try a smaller learning_rate.",
    "a weight, a velocity or a change of one has reached `limit` in magnitude, or learning_rate is not finite. Does the iteration "
    "diverge? Try a smaller learning_rate; or scale the problem, or raise `limit`.",
    "the iteration, run backwards, did not arrive at the bits that it started from, so there is no gradient. The objective "
    "must compute the same bits on every call: no randomness that is not a function of (w, args, t), no host callbacks, "
    "no reductions in an order that varies (on GPUs: XLA_FLAGS=--xla_gpu_deterministic_ops=true).",
)
_MOMENTUM, _START, _GRADIENT, _OVERFLOW, _IRREVERSIBLE = range(1, 6)
_BACKWARD = ("exact", "store")


class ReversibleSGD(eqx.Module):
    r"""`steps` steps of gradient descent with momentum, whose gradient runs them backwards instead of storing them.

    `ReversibleSGD(objective, steps).run(w0, args, learning_rate=..., momentum=...)` minimises `objective(w, args, t)` from w0 and
    returns the last weights, which can be differentiated in reverse mode with respect to w0, `args` (data, penalties, whatever
    the objective depends on), every learning rate and every momentum, and arrays that `objective` closes over.

    The step is `v = momentum * v - (1 - momentum) * gradient; w = w + learning_rate * v`, with v = 0 at first. It is the
    usual one (`optax.sgd(rate, momentum)`, `v = momentum * v + gradient; w = w - rate * v`) with `rate = (1 - momentum) * learning_rate` where both
    are constant: v is an average of gradients here, not a sum, so a change of momentum does not change the size of the steps.

    **Arithmetic.** Weights and velocities are integers times a unit of `limit / 2**63` (float64: 2.2e-16 by default) or
    `limit / 2**31` (float32: 9.5e-7), and so the weights follow those of floating point to within some tens of units a step. They
    are exact functions of the inputs in this arithmetic, and the same bits are found again backwards; the module's docstring says how.
    In float32 set `limit` as low as your weights allow: the default takes half of the bits that float32 has.
    **Gradient.** That of the iteration with the rounding of w and v taken as constant: exact to the rounding of the backward
    pass. Unlike an implicit gradient it is right at any number of steps, converged or not. Reverse mode, once; forward mode and second
    derivatives raise. The objective must be twice differentiable in reverse mode and compute the same bits on every call.
    **Memory.** A few copies of w and of what is differentiated, and `stored_bits` for each parameter and step: 1.07 at
    `min_momentum=0.5`, 0.22 at 0.9, 0.04 at 0.98. Time: about one gradient a step more than what storage would take.
    **Use instead.** `Argmin`, if the iteration converges and only its limit matters: memory free of the number of steps.

    **Arguments:**

    - `objective`: `objective(w, args, t) -> scalar`; t is the number of the step, an int32 from 0. Arrays that it closes over get gradients.
    - `steps`: how many; static.
    - `min_momentum`: the smallest momentum that is used, in [1/32, 1); static. The nearer to 1, the less is stored.
    - `limit`: weights and velocities stay below it in magnitude; a power of two.
    - `backward`: `"exact"`, or `"store"`: ordinary backpropagation through the same arithmetic, to compare with.
    - `throw`: whether failure raises: momentum outside [min_momentum, 1), weights or velocities that reach `limit`, gradients that are not
      finite, a start that is not found again bit for bit. With False the weights are NaN, or in the last case the gradients.
    """

    objective: Callable
    steps: int = eqx.field(static=True)
    min_momentum: float = eqx.field(static=True)
    limit: float = eqx.field(static=True)
    backward: Literal["exact", "store"] = eqx.field(static=True)
    throw: bool = eqx.field(static=True)

    def __init__(
        self,
        objective: Callable[[PyTree, PyTree, Int[Array, ""]], Float[Array, ""]],
        steps: int,
        *,
        min_momentum: float = 0.5,
        limit: float = 2048.0,
        backward: str = "exact",
        throw: bool = True,
    ):
        if not callable(objective):
            raise ValueError(f"objective must be a function of (w, args, t), got {type(objective).__name__}.")
        integer(steps, "steps")
        if not 1 / 32 <= min_momentum < 1:
            raise ValueError(
                f"min_momentum must lie in [1/32, 1), got {min_momentum!r}: a step with momentum m loses log2(1/m) bits of every "
                "velocity, which are stored."
            )
        if not (limit > 0 and math.isfinite(limit) and math.frexp(limit)[0] == 0.5 and 2**-32 <= limit <= 2**32):
            raise ValueError(f"limit must be a power of two between 2**-32 and 2**32, got {limit!r}.")
        if backward not in _BACKWARD:
            raise ValueError(f"backward must be 'exact' or 'store', got {backward!r}.")
        self.objective = objective
        self.steps = steps
        self.min_momentum = float(min_momentum)
        self.limit = float(limit)
        self.backward = backward  # pyright: ignore[reportAttributeAccessIssue]  (checked above)
        self.throw = throw

    def run(
        self, w0: PyTree, args: PyTree = None, *, learning_rate: PyTree[Any, "..."], momentum: PyTree[Any, "..."]
    ) -> PyTree:
        """The weights after `steps` steps from w0.

        **Arguments:**

        - `w0`: a pytree whose floating arrays (float32 or float64) are trained; the rest of it is left as it is.
        - `args`: any pytree, handed to the objective.
        - `learning_rate`, `momentum`: a scalar, an array `(steps,)`, or a pytree of such of the structure of w0 or of its upper part, for rates
          that differ from leaf to leaf. A momentum is rounded to a multiple of 2**-32 (float32: 2**-16).
        """
        problem, static = self._prepare(w0, args, learning_rate, momentum)
        leaves, code = _run(problem, static)
        if self.throw:
            leaves = _raise(leaves, code)
        rest = eqx.filter(w0, eqx.is_inexact_array, inverse=True)
        return eqx.combine(jtu.tree_unflatten(static.tree, leaves), rest)

    def stored_bits(self, dtype: Any = None) -> float:
        """Bits that the backward pass keeps for each parameter and step, for weights of that dtype (None: JAX's default)."""
        arithmetic = _arithmetic(jnp.dtype(jnp.result_type(float) if dtype is None else dtype), self)
        return _WORD_BITS * arithmetic.words(self.steps) / self.steps

    def information(
        self, w0: PyTree, args: PyTree = None, *, learning_rate: PyTree[Any, "..."], momentum: PyTree[Any, "..."]
    ) -> Float[Array, ""]:
        r"""Bits of information in the buffers after such a run, for each parameter and step: near the mean of $\log_2 1/\gamma$.

        It is the length of the buffers as binary numbers, $\log_2(1 + b)$; `stored_bits` is what they take.
        """
        problem, static = self._prepare(w0, args, learning_rate, momentum)
        final, stacks = _final(problem, static)
        size = sum(leaf.size for leaf in problem.start)
        bits = sum(jnp.sum(_length(stack)) for stack in stacks) / (size * self.steps)
        bits = jnp.where(final.code == 0, bits, jnp.nan)
        return _raise(bits, final.code) if self.throw else bits

    def _prepare(self, w0, args, learning_rate, momentum):
        arrays, rest = eqx.partition(w0, eqx.is_inexact_array)
        leaves, tree = jtu.tree_flatten(arrays)
        if not leaves:
            raise ValueError("w0 has no floating-point array: nothing to train.")
        for leaf in leaves:
            if leaf.dtype not in (jnp.float32, jnp.float64):
                raise ValueError(
                    f"w0 must hold float32 or float64 arrays, got {leaf.dtype}. Cast the weights, and cast them back inside the objective."
                )
        rates, rate_of = _schedule(learning_rate, arrays, self.steps, "learning_rate")
        momenta, momentum_of = _schedule(momentum, arrays, self.steps, "momentum")
        objective = close(self.objective, w0, args, jnp.zeros((), jnp.int32))
        shape = eqx.filter_eval_shape(objective, w0, args, jnp.zeros((), jnp.int32))
        if not hasattr(shape, "shape") or shape.shape != () or not jnp.issubdtype(shape.dtype, jnp.floating):
            raise ValueError(f"objective must return a floating scalar, got {shape}.")
        # What is not trained may still be differentiated, or batched: arrays go with `args`.
        args = eqx.filter((rest, args), eqx.is_array)
        arithmetics = tuple(_arithmetic(leaf.dtype, self) for leaf in leaves)
        static = _Static(tree, self.steps, arithmetics, rate_of, momentum_of, self.backward, self.throw)
        return _Problem(objective, leaves, args, rates, momenta), static


class _Problem(eqx.Module):
    """What may be differentiated."""

    objective: Callable  # closed
    start: list[Array]
    args: PyTree  # the part of w0 that is not trained, and the user's own
    rates: list[Any]  # each () or (steps,)
    momenta: list[Any]

    def loss(self, leaves, t, tree):
        rest, args = self.args
        return self.objective(eqx.combine(jtu.tree_unflatten(tree, leaves), rest), args, t)


class _Static(NamedTuple):
    tree: Any  # of the trained leaves
    steps: int
    arithmetics: "tuple[_Arithmetic, ...]"  # of each leaf
    rate_of: tuple[int, ...]  # of each leaf: its place in `_Problem.rates`
    momentum_of: tuple[int, ...]
    backward: str
    throw: bool


class _State(NamedTuple):
    w: list[Array]
    v: list[Array]
    words: list[Array]  # the buffers in use, (2, *shape) for each leaf
    code: Int[Array, ""]


# Fixed-point numbers and buffers


class _Arithmetic(NamedTuple):
    """Numbers of one dtype: integers times a unit."""

    dtype: Any
    unit: float
    d_bits: int  # gamma = n / 2^d_bits
    bin_bits: int  # D = 2^bin_bits
    n_min: int
    steps_per_word: int

    @property
    def integer(self):
        return jnp.int64 if self.dtype.itemsize == 8 else jnp.int32

    def words(self, steps: int) -> int:
        return -(-steps // self.steps_per_word)

    def encode(self, x: Float[Array, "*s"]) -> tuple[Int[Array, "*s"], Bool[Array, ""]]:
        """The nearest integer to x / unit, and whether all fit."""
        return self.rounded(x / self.unit)

    def decode(self, c: Int[Array, "*s"]) -> Float[Array, "*s"]:
        return c.astype(self.dtype) * self.unit

    def rounded(self, x: Float[Array, "*s"]) -> tuple[Int[Array, "*s"], Bool[Array, ""]]:
        fits = jnp.abs(x) < 2.0 ** (8 * self.dtype.itemsize - 1)  # False for NaN
        return jnp.where(fits, jnp.round(x), 0).astype(self.integer), jnp.all(fits)

    def numerator(self, gamma: Float[Array, ""]) -> Int[Array, ""]:
        """n of the nearest n / d; clipped to what the buffers are made for, which `momentum` was checked to be near to."""
        n = jnp.round(gamma.astype(self.dtype) * 2.0**self.d_bits).astype(self.integer)
        return jnp.clip(n, self.n_min, 2**self.d_bits - 1)

    def gamma(self, n: Int[Array, ""]) -> Float[Array, ""]:
        return n.astype(self.dtype) * 2.0**-self.d_bits

    def one_minus_gamma(self, n: Int[Array, ""]) -> Float[Array, ""]:
        return (2**self.d_bits - n).astype(self.dtype) * 2.0**-self.d_bits

    def _bin(self, j, n):
        """Where bin j begins, and N_j. The products are below 2^59 (float32: 2^27)."""
        shift = self.d_bits - self.bin_bits
        begin = (j * n) >> shift
        return begin, (((j + 1) * n) >> shift) - begin

    def shrink(self, c: Int[Array, "*s"], word: UInt32[Array, "2 *s"], n: Int[Array, ""]):
        """(6): c times n / d, and the buffer that it makes."""
        # Shifts and masks of integers in two's complement round down: floor division by powers of two.
        h, j = c >> self.d_bits, (c & (2**self.d_bits - 1)) >> self.bin_bits
        begin, places = self._bin(j, n)
        digits = _push(_digits(word), c & (2**self.bin_bits - 1), self.bin_bits)
        digits, place = _divide(digits, places)
        return h * n + begin + place.astype(self.integer), _pack(digits)

    def grow(self, c: Int[Array, "*s"], word: UInt32[Array, "2 *s"], n: Int[Array, ""]):
        """The inverse of `shrink`."""
        h = c // n  # rounds down in jax.numpy; in lax it would not
        s = c - h * n
        # The last bin that begins at or before s: floor(j nD/d) <= s where j nD/d < s + 1.
        j = (((s + 1) << (self.d_bits - self.bin_bits)) - 1) // n
        begin, places = self._bin(j, n)
        digits, r = _pop(_multiply(_digits(word), places, s - begin), self.bin_bits)
        return (h << self.d_bits) + (j << self.bin_bits) + r.astype(self.integer), _pack(digits)


def _arithmetic(dtype, sgd: ReversibleSGD) -> _Arithmetic:
    d_bits, width = (32, 64) if dtype.itemsize == 8 else (16, 32)
    n_min = round(sgd.min_momentum * 2**d_bits)
    n_min = min(n_min, 2**d_bits - 1)
    fits = {bits: _steps_per_word(n_min >> (d_bits - bits), 2**bits) for bits in range(5, 9)}
    # Larger bins leave less to the worst case, but put more noise on v. Above 0.995 none reaches the aim: the one that stores least.
    enough = [bits for bits in fits if _WORD_BITS / fits[bits] <= _TOLERATED * math.log2(2**d_bits / n_min)]
    bits = min(enough) if enough else max(fits, key=lambda bits: fits[bits])
    return _Arithmetic(dtype, sgd.limit * 2.0 ** (1 - width), d_bits, bits, n_min, fits[bits])


def _steps_per_word(places: int, D: int) -> int:
    """How often (6) can be applied before bD + r may pass 64 bits, if every N_j is as small as `places` and every r as large as can be."""
    b, count = 0, 0
    while b * D + D - 1 < 2**_WORD_BITS and count < 2**16:
        b, count = (b * D + D - 1) // places, count + 1
    return count


# A buffer in use is four digits of 16 bits in 32-bit integers, the lowest first: all products and partial remainders fit.


def _digits(word):
    return [half for limb in (word[0], word[1]) for half in (limb & 0xFFFF, limb >> 16)]


def _pack(digits):
    return jnp.stack([digits[0] | (digits[1] << 16), digits[2] | (digits[3] << 16)])


def _push(digits, r, bits: int):
    """b 2^bits + r."""
    out, carry = [], r.astype(jnp.uint32)
    for digit in digits:
        total = (digit << bits) | carry
        out.append(total & 0xFFFF)
        carry = total >> 16
    return out


def _pop(digits, bits: int):
    """The inverse of `_push`."""
    out = [(low >> bits) | ((high << (16 - bits)) & 0xFFFF) for low, high in zip(digits, digits[1:], strict=False)]
    return [*out, digits[-1] >> bits], digits[0] & (2**bits - 1)


def _divide(digits, by):
    """Quotient and remainder, by long division."""
    by = by.astype(jnp.uint32)
    out, rest = [], jnp.zeros_like(by)
    for digit in reversed(digits):
        total = (rest << 16) | digit
        quotient = total // by
        out.append(quotient)
        rest = total - quotient * by
    return out[::-1], rest


def _multiply(digits, by, rest):
    """The inverse of `_divide`."""
    by, carry = by.astype(jnp.uint32), rest.astype(jnp.uint32)
    out = []
    for digit in digits:
        total = digit * by + carry
        out.append(total & 0xFFFF)
        carry = total >> 16
    return out


def _length(stack: UInt32[Array, "k 2 *s"]) -> Float[Array, "k *s"]:
    low, high = stack[:, 0].astype(float), stack[:, 1].astype(float)
    return jnp.log2(1 + low + 2.0**32 * high)


# Learning rates and momenta


def _schedule(given, arrays, steps: int, name: str) -> tuple[list[Array], tuple[int, ...]]:
    """The different schedules in `given`, and for each trained leaf which one is its own.

    Leaves that share a schedule share its cotangent, too: a number a step, not one for each of them.
    """
    prefix, tree = jtu.tree_flatten(given)
    try:
        below = tree.flatten_up_to(arrays)
    except ValueError as error:
        raise ValueError(
            f"{name} must be a scalar, an array (steps,), or a pytree of these that w0 fits into: {error}"
        ) from error
    dtype = max((leaf.dtype for leaf in jtu.tree_leaves(arrays)), key=lambda dtype: dtype.itemsize)
    schedules, own = [], []
    for index, (schedule, part) in enumerate(zip(prefix, below, strict=True)):
        schedule = jnp.asarray(schedule, None if eqx.is_inexact_array(schedule) else dtype)
        if schedule.shape not in ((), (steps,)):
            raise ValueError(
                f"{name} must be a scalar or of shape ({steps},), one for each step; got {schedule.shape}."
            )
        schedules.append(schedule)
        own += [index] * len(jtu.tree_leaves(part))
    return schedules, tuple(own)


# The iteration, forwards


def _forward(problem: _Problem, static: _Static) -> tuple[_State, list[Array]]:
    """The last state, and the stack of buffers of each leaf, (number of words, 2, *shape)."""

    def step(t, carry):
        state, stacks = carry
        t = t.astype(jnp.int32)
        g = _gradient(problem, static, t, _decoded(static, state.w))
        state = _advance(problem, static, t, _emptied(static, t, state), g)
        # Written in every step, and read in none: the compiler then updates the stack in place.
        stacks = [
            _set(stack, t // a.steps_per_word, word)
            for a, stack, word in zip(static.arithmetics, stacks, state.words, strict=True)
        ]
        return state, stacks

    start = _begin(problem, static)
    stacks = [
        jnp.zeros((a.words(static.steps), *word.shape), word.dtype)
        for a, word in zip(static.arithmetics, start.words, strict=True)
    ]
    return jax.lax.fori_loop(0, static.steps, step, (start, stacks))


def _begin(problem, static) -> _State:
    w, fit = zip(*(a.encode(leaf) for a, leaf in zip(static.arithmetics, problem.start, strict=True)), strict=True)
    code = _first(_momentum_code(problem, static), jnp.where(jnp.all(jnp.stack(fit)), 0, _START))
    words = [jnp.zeros((2, *leaf.shape), jnp.uint32) for leaf in w]
    return _State(list(w), [jnp.zeros_like(leaf) for leaf in w], words, code)


def _emptied(static, t, state: _State) -> _State:
    """With new buffers where those in use may not hold the bits of step t."""
    words = [
        jnp.where(t % a.steps_per_word == 0, jnp.uint32(0), word)
        for a, word in zip(static.arithmetics, state.words, strict=True)
    ]
    return state._replace(words=words)


def _advance(problem, static, t, state: _State, g) -> _State:
    w, v, words, codes = [], [], [], [state.code, _gradient_code(g)]
    for index, a in enumerate(static.arithmetics):
        alpha, n = _hyperparameters(problem, static, t, index)
        shrunk, word = a.shrink(state.v[index], state.words[index], n)
        change, fits = a.rounded(-a.one_minus_gamma(n) / a.unit * g[index])
        moved, held = _add(shrunk, change)  # (1)
        v.append(moved)
        words.append(word)
        change, fits_too = a.rounded(alpha * moved.astype(a.dtype))
        moved, held_too = _add(state.w[index], change)  # (2)
        w.append(moved)
        codes.append(jnp.where(fits & held & fits_too & held_too, 0, _OVERFLOW))
    return _State(w, v, words, _first(*codes))


def _decoded(static, leaves):
    return [a.decode(leaf) for a, leaf in zip(static.arithmetics, leaves, strict=True)]


def _gradient(problem, static, t, leaves):
    """The gradient of the objective, in the same bits forwards and backwards.

    Where arithmetic is fused with what surrounds it, it rounds otherwise (a product and a sum become one instruction), and an
    `optimization_barrier` does not prevent that on CPU, where it is removed before fusion. A loop that runs once is compiled on its
    own. It must depend on its own carry, or it would be moved out of the loop, and run for a number that the compiler does not know.
    """
    once = jnp.where(t >= 0, 1, 0).astype(jnp.int32)
    body = lambda _, leaves: jax.grad(problem.loss)(leaves, t, static.tree)
    return jax.lax.fori_loop(0, once, body, leaves)


def _hyperparameters(problem, static, t, index):
    """alpha_t and n_t of a leaf; gamma_t is n_t / d."""
    a = static.arithmetics[index]
    alpha, gamma = problem.rates[static.rate_of[index]], problem.momenta[static.momentum_of[index]]
    return _at(alpha, t).astype(a.dtype), a.numerator(_at(gamma, t))


def _at(schedule, t):
    return schedule if schedule.ndim == 0 else _get(schedule, t)


def _get(stack, place):
    return jax.lax.dynamic_index_in_dim(stack, place, keepdims=False)


def _set(stack, place, word):
    return jax.lax.dynamic_update_index_in_dim(stack, word, place, 0)  # in place, inside a compiled loop


def _add(a, b):
    """The sum, and whether it did not wrap around: then it has the sign of one of the two."""
    total = a + b
    return total, jnp.all(((total ^ a) & (total ^ b)) >= 0)


def _first(*codes):
    """The first status that is not 0."""
    out = codes[0]
    for code in codes[1:]:
        out = jnp.where(out == 0, code, out)
    return out.astype(jnp.int32)


def _gradient_code(g):
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in g]))
    return jnp.where(finite, 0, _GRADIENT)


def _momentum_code(problem, static):
    right = []
    for index, a in enumerate(static.arithmetics):
        gamma = problem.momenta[static.momentum_of[index]]
        least = a.n_min * 2.0**-a.d_bits
        # A momentum of float32 may be below the same number in float64.
        right.append(jnp.all((gamma >= least * (1 - 1e-6)) & (gamma < 1)))
    return jnp.where(jnp.all(jnp.stack(right)), 0, _MOMENTUM)


def _raise(tree, code):
    # The comparison drops the (zero) tangent that a status has as an output of `_exact`, and that Equinox's check has no rule for.
    code = jnp.argmax(code == jnp.arange(len(_FAILURES), dtype=code.dtype))
    return eqx.branched_error_if(tree, code != 0, code, ["ReversibleSGD: " + text for text in _FAILURES])


def _finish(static, state: _State):
    """The last weights as floats; NaN where the run failed, so that nobody takes them for weights."""
    return [jnp.where(state.code == 0, leaf, jnp.nan) for leaf in _decoded(static, state.w)]


# Both are compiled here, so that an eager caller compiles once.


@eqx.filter_jit
def _final(problem, static):
    return _forward(problem, static)


@eqx.filter_jit
def _run(problem, static):
    return (_exact if static.backward == "exact" else _stored)(problem, static)


# and backwards


@eqx.filter_custom_vjp
def _exact(problem, static):
    state, _ = _forward(problem, static)
    return _finish(static, state), state.code


@_exact.def_fwd
def _(perturbed, problem, static):
    del perturbed
    state, stacks = _forward(problem, static)
    return (_finish(static, state), state.code), (state, stacks)


class _Back(NamedTuple):
    state: _State
    of_w: list[Array]
    of_v: list[Array]
    of_rates: list[Array | None]
    of_momenta: list[Array | None]
    of_rest: PyTree  # of the objective's arrays and of `args`


@_exact.def_bwd
def _(run, cotangents, perturbed, problem, static):
    # Integers have no derivative: to differentiate the reversal would give zeros, not second derivatives.
    run, cotangents, problem = eqxi.nondifferentiable(
        (run, cotangents, problem),
        msg="ReversibleSGD(backward='exact') can be differentiated once only, in reverse mode. backward='store' can be differentiated again.",
    )
    out = _reversal(run, cotangents, perturbed, problem, static)
    code = _first(out.state.code, jnp.where(_at_start(problem, static, out.state), 0, _IRREVERSIBLE))
    of_objective, of_args = out.of_rest
    gradient = _Problem(of_objective, out.of_w, of_args, out.of_rates, out.of_momenta)
    gradient = jtu.tree_map(lambda leaf: jnp.where(code == 0, leaf, jnp.nan), gradient)
    return _raise(gradient, code) if static.throw else gradient


def _reversal(run, cotangents, perturbed, problem, static) -> _Back:
    state, stacks = run
    of_w = [
        jnp.zeros(leaf.shape, leaf.dtype) if c is None else c
        for c, leaf in zip(cotangents[0], problem.start, strict=True)
    ]
    # Only what is differentiated costs memory and time: not a whole data set in `args`.
    rest, constant = eqx.partition((problem.objective, problem.args), (perturbed.objective, perturbed.args))
    zeros = lambda leaves, which: [
        jnp.zeros_like(leaf) if wanted else None for leaf, wanted in zip(leaves, which, strict=True)
    ]
    of_rates, of_momenta = zeros(problem.rates, perturbed.rates), zeros(problem.momenta, perturbed.momenta)
    of_v, of_rest = [jnp.zeros_like(c) for c in of_w], jtu.tree_map(jnp.zeros_like, rest)

    def step(count, carry):
        t = static.steps - 1 - count.astype(jnp.int32)
        return _back(problem, static, t, _filled(static, t, carry, stacks), rest, constant)

    init = _Back(state, of_w, of_v, of_rates, of_momenta, of_rest)
    return jax.lax.fori_loop(0, static.steps, step, init)


def _filled(static, t, carry: _Back, stacks) -> _Back:
    """With the buffers that step t left: the inverse of `_emptied`."""
    words, empty = [], []
    for a, word, stack in zip(static.arithmetics, carry.state.words, stacks, strict=True):
        new = (t % a.steps_per_word == a.steps_per_word - 1) & (t < static.steps - 1)
        empty.append(~new | jnp.all(word == 0))
        words.append(jnp.where(new, _get(stack, t // a.steps_per_word), word))
    code = _first(carry.state.code, jnp.where(jnp.all(jnp.stack(empty)), 0, _IRREVERSIBLE))
    return carry._replace(state=carry.state._replace(words=words, code=code))


def _back(problem, static, t, carry: _Back, rest, constant) -> _Back:
    state = carry.state
    w, moved = [], state.v
    for index, a in enumerate(static.arithmetics):
        alpha, _ = _hyperparameters(problem, static, t, index)
        w.append(state.w[index] - a.rounded(alpha * moved[index].astype(a.dtype))[0])  # (3)
    floats = _decoded(static, w)
    g = _gradient(problem, static, t, floats)

    of_rates, of_momenta = list(carry.of_rates), list(carry.of_momenta)
    v, words, of_v, direction = [], [], [], []
    for index, a in enumerate(static.arithmetics):
        alpha, n = _hyperparameters(problem, static, t, index)
        one_minus_gamma = a.one_minus_gamma(n)
        change, _ = a.rounded(-one_minus_gamma / a.unit * g[index])
        before, word = a.grow(moved[index] - change, state.words[index], n)  # (4)
        v.append(before)
        words.append(word)
        # (5)
        of_w = carry.of_w[index]
        _accumulate(of_rates, static.rate_of[index], t, of_w, a.decode(moved[index]))
        of_moved = carry.of_v[index] + alpha * of_w
        _accumulate(of_momenta, static.momentum_of[index], t, of_moved, a.decode(before) + g[index])
        of_v.append(a.gamma(n) * of_moved)
        direction.append(-one_minus_gamma * of_moved)

    # Apart from the evaluation that fixes the bits of g, see `_gradient`.
    floats, direction, g, t = jax.lax.optimization_barrier((floats, direction, g, t))

    def gradient(leaves, rest):
        objective, args = eqx.combine(rest, constant)
        return jax.grad(_Problem(objective, [], args, [], []).loss)(leaves, t, static.tree)

    _, pull_back = jax.vjp(gradient, floats, rest)
    more_w, more_rest = pull_back(direction)
    add = lambda a, b: jtu.tree_map(lambda a, b: a + b, a, b)
    back = _State(w, v, words, state.code)
    return _Back(back, add(carry.of_w, more_w), of_v, of_rates, of_momenta, add(carry.of_rest, more_rest))


def _accumulate(totals, place, t, a, b):
    """Adds a . b to the cotangent of a schedule, which several leaves may share, if it is asked for."""
    if totals[place] is not None:
        inner = jnp.sum(a * b).astype(totals[place].dtype)
        totals[place] = (
            totals[place] + inner if totals[place].ndim == 0 else _set(totals[place], t, _get(totals[place], t) + inner)
        )


def _at_start(problem, static, state: _State):
    """Whether the reversal ended in the very bits that the run began with: those weights, no velocity, empty buffers."""
    start = [a.encode(leaf)[0] for a, leaf in zip(static.arithmetics, problem.start, strict=True)]
    same = [jnp.all(w == w0) for w, w0 in zip(state.w, start, strict=True)]
    empty = [jnp.all(leaf == 0) for leaf in [*state.v, *state.words]]
    return jnp.all(jnp.stack([*same, *empty]))


# To compare with: the same numbers, and automatic differentiation


def _stored(problem, static):
    """Beside the integers go floats of the same values, whose derivatives are those of (1)-(2)."""
    constant = jax.lax.stop_gradient(problem)
    through = lambda values, smooth: [
        value + (leaf - jax.lax.stop_gradient(leaf)) for value, leaf in zip(values, smooth, strict=True)
    ]

    def step(t, carry):
        state, w, v = carry
        t = t.astype(jnp.int32)
        # Twice, since what is differentiated is compiled otherwise: the integers are those of "exact", bit for bit.
        bits = _gradient(constant, static, t, _decoded(static, state.w))
        state = _advance(constant, static, t, _emptied(static, t, state), bits)
        g = jax.grad(problem.loss)(w, t, static.tree)
        smooth_v, alphas = [], []
        for index, a in enumerate(static.arithmetics):
            alpha, n = _hyperparameters(problem, static, t, index)
            given = _at(problem.momenta[static.momentum_of[index]], t).astype(a.dtype)
            (gamma,) = through([a.gamma(n)], [given])
            smooth_v.append(gamma * v[index] - (1 - gamma) * g[index])
            alphas.append(alpha)
        v = through(_decoded(static, state.v), smooth_v)
        smooth_w = [w + alpha * v for w, alpha, v in zip(w, alphas, v, strict=True)]
        return state, through(_decoded(static, state.w), smooth_w), v

    state = _begin(constant, static)
    w = through(_decoded(static, state.w), problem.start)
    state, w, _ = jax.lax.fori_loop(0, static.steps, step, (state, w, [jnp.zeros_like(leaf) for leaf in w]))
    return [jnp.where(state.code == 0, leaf, jnp.nan) for leaf in w], state.code
