"""Reversible gradient descent: its hypergradients against stored ones, bits found again, what the buffers hold, failure, misuse."""

import functools
import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest

import declarative as dn
from declarative._reversible import optimiser

STEPS = 40


class Weights(eqx.Module):
    """A small network as it comes: nested, with a scalar, and a function among the leaves."""

    layers: dict
    temperature: jax.Array
    activation: Callable = jnp.tanh

    def __call__(self, x):
        hidden = self.activation(self.layers["in"] @ x)
        return self.layers["out"] @ hidden / self.temperature


def network(key, dtype=jnp.float64):
    keys = jr.split(key)
    layers = {"in": jr.normal(keys[0], (4, 3), dtype) / 2, "out": jr.normal(keys[1], (2, 4), dtype) / 2}
    return Weights(layers, jnp.asarray(1.3, dtype))


def fit_loss(w, args, t):
    """A batch that depends on the step, and a penalty."""
    data, penalty = args
    x, y = jax.lax.dynamic_index_in_dim(data, t % 5, keepdims=False), jnp.asarray([0.3, -0.8], data.dtype)
    squares = [jnp.sum(leaf**2) for leaf in jtu.tree_leaves(eqx.filter(w, eqx.is_array))]
    return 0.5 * jnp.mean(jax.vmap(lambda x: w(x) - y)(x) ** 2) + jnp.exp(penalty["log"]) * sum(squares)


def problem(dtype=jnp.float64):
    keys = jr.split(jr.key(1), 4)
    args = (jr.normal(keys[1], (5, 6, 3), dtype), {"log": jnp.asarray(-3.0, dtype)})
    rates = jr.uniform(keys[2], (STEPS,), dtype, 0.2, 0.5)
    momenta = jr.randint(keys[3], (STEPS,), 870, 970).astype(dtype) / 1024  # numbers that the arithmetic has
    return network(keys[0], dtype), args, rates, momenta


def hypergradient(sgd, w0, *others, loss=None):
    """(last weights, the gradient with respect to everything)."""

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def total(inputs):
        w0, args, rates, momenta = inputs
        w = sgd.run(w0, args, learning_rate=rates, momentum=momenta)
        leaves = jtu.tree_leaves(eqx.filter(w, eqx.is_array))
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in leaves) if loss is None else loss(w), w

    (_, w), gradient = total((w0, *others))
    return w, gradient


def furthest(a, b):
    """The largest difference, leaf by leaf, over the leaf's largest entry."""
    pairs = zip(*(jtu.tree_leaves(eqx.filter(tree, eqx.is_array)) for tree in (a, b)), strict=True)
    return max(float(np.max(np.abs(np.subtract(x, y))) / np.max(np.abs(y))) for x, y in pairs)


def plain(objective, steps):
    """(1)-(2) in floating point, for automatic differentiation: knows nothing of integers."""

    class Plain:
        def run(self, w0, args=None, *, learning_rate, momentum):
            arrays, rest = eqx.partition(w0, eqx.is_inexact_array)
            rates, momenta = (jnp.broadcast_to(h, (steps,)) for h in (learning_rate, momentum))

            def step(carry, each):
                w, v = carry
                t, rate, momentum = each
                g = jax.grad(lambda w: objective(eqx.combine(w, rest), args, t))(w)
                v = jtu.tree_map(lambda v, g: momentum * v - (1 - momentum) * g, v, g)
                return (jtu.tree_map(lambda w, v: w + rate * v, w, v), v), None

            init = (arrays, jtu.tree_map(jnp.zeros_like, arrays))
            (w, _), _ = jax.lax.scan(step, init, (jnp.arange(steps, dtype=jnp.int32), rates, momenta))
            return eqx.combine(w, rest)

    return Plain()


def noise(w, args, t):
    """Gradients that never settle, so that velocities stay large and their low bits random."""
    return 0.1 * jnp.sum(w**2) + jnp.sum(w * jr.normal(jr.fold_in(jr.key(3), t), w.shape, w.dtype))


# Gradients


@functools.cache
def hypergradients(dtype, backward):
    """(weights, gradient) of one problem, for several tests."""
    return hypergradient(dn.ReversibleSGD(fit_loss, STEPS, min_momentum=0.8, backward=backward), *problem(dtype))


# The two agree in every bit of the iteration, so what differs is the rounding of the backward pass: a few hundred additions.
@pytest.mark.parametrize(("dtype", "tol"), [(jnp.float64, 1e-12), (jnp.float32, 1e-4)])
def test_hypergradients_are_those_of_stored_iterates(dtype, tol):
    (w, gradient), (w_stored, stored) = (hypergradients(dtype, backward) for backward in ("exact", "store"))
    for a, b in zip(*(jtu.tree_leaves(eqx.filter(tree, eqx.is_array)) for tree in (w, w_stored)), strict=True):
        assert a.dtype == dtype
        np.testing.assert_array_equal(a, b)
    assert furthest(gradient, stored) < tol


# Each step puts up to 2^5 units of noise on a velocity (13 in root mean square), which moves the weight by rate / (1 - momentum) < 5 as
# much: in 40 steps by 5 * 13 * sqrt(40) = 400 units, and thrice that in the worst of many. Leaves are as small as 0.3.
@pytest.mark.parametrize(("dtype", "limit"), [(jnp.float64, 2048.0), (jnp.float32, 2048.0), (jnp.float32, 8.0)])
def test_hypergradients_are_those_of_floating_point(dtype, limit):
    w, gradient = hypergradients(dtype, "exact")
    if limit != 2048:
        sgd = dn.ReversibleSGD(fit_loss, STEPS, min_momentum=0.8, limit=limit)
        w, gradient = hypergradient(sgd, *problem(dtype))
    double = jtu.tree_map(lambda leaf: leaf.astype(float) if eqx.is_array(leaf) else leaf, problem(dtype))
    w_plain, in_floats = hypergradient(plain(fit_loss, STEPS), *double)
    unit = limit * 2.0 ** (1 - 8 * jnp.dtype(dtype).itemsize)
    eps = float(jnp.finfo(dtype).eps)
    assert furthest(w, w_plain) < 4000 * unit + 100 * eps
    assert (
        furthest(gradient, in_floats) < 12_000 * unit + 1000 * eps
    )  # the weights' errors, times the curvature of the whole


def test_finite_differences():
    w0, args, rates, momenta = problem()
    sgd = dn.ReversibleSGD(fit_loss, STEPS, min_momentum=0.8)
    _, gradient = hypergradients(jnp.float64, "exact")
    value = eqx.filter_jit(
        lambda w0, args, rates, momenta: sum(
            jnp.sum(jnp.sin(leaf))
            for leaf in jtu.tree_leaves(
                eqx.filter(sgd.run(w0, args, learning_rate=rates, momentum=momenta), eqx.is_array)
            )
        )
    )
    h = 1e-4  # errors h^2 of the formula, and 1e-14 / h of the rounding of the iteration

    def difference(move):
        return (value(*move(h)) - value(*move(-h))) / (2 * h)

    log = lambda h: (args[0], {"log": args[1]["log"] + h})
    temperature = lambda h: eqx.tree_at(lambda w: w.temperature, w0, w0.temperature + h)
    of_w0, of_args, of_rates, of_momenta = gradient
    pairs = [(of_rates[t], lambda h, t=t: (w0, args, rates.at[t].add(h), momenta)) for t in (0, 17, STEPS - 1)]
    pairs += [(of_momenta[t], lambda h, t=t: (w0, args, rates, momenta.at[t].add(h))) for t in (1, 17, STEPS - 1)]
    pairs += [(of_args[1]["log"], lambda h: (w0, log(h), rates, momenta))]
    pairs += [(of_w0.temperature, lambda h: (temperature(h), args, rates, momenta))]
    for ours, move in pairs:
        np.testing.assert_allclose(ours, difference(move), rtol=1e-6, atol=1e-8)


def test_rates_for_each_leaf(getkey):
    """A prefix of w0's structure, some scalars and some of one rate a step; a shared one gets the sum."""
    keys = jr.split(getkey(), 3)
    w0 = {"a": (jr.normal(keys[0], (3, 2)), jr.normal(keys[1], (2,))), "b": jnp.asarray(0.4)}
    objective = lambda w, args, t: (
        jnp.sum(jnp.cosh(w["a"][0] * w["b"])) + jnp.sum(jnp.sin(w["a"][1]) ** 2) + w["b"] ** 4
    )
    rates = {"a": (jr.uniform(keys[2], (STEPS,)), jnp.asarray(0.2)), "b": jnp.asarray(0.05)}
    momenta = {"a": jnp.asarray(0.9), "b": jnp.full((STEPS,), 0.8)}
    gradients = [
        hypergradient(dn.ReversibleSGD(objective, STEPS, backward=mode), w0, None, rates, momenta)[1]
        for mode in ("exact", "store")
    ]
    assert furthest(*gradients) < 1e-12
    _, _, of_rates, of_momenta = gradients[0]
    assert (of_rates["a"][0].shape, of_rates["a"][1].shape, of_momenta["a"].shape) == ((STEPS,), (), ())
    # As many leaves with numbers of their own.
    apart = {"a": (0.9, jnp.full((STEPS,), 0.9)), "b": momenta["b"]}
    apart = jtu.tree_map(jnp.asarray, apart)
    _, (_, _, _, more) = hypergradient(dn.ReversibleSGD(objective, STEPS), w0, None, rates, apart)
    np.testing.assert_allclose(more["a"][0] + jnp.sum(more["a"][1]), of_momenta["a"], rtol=1e-12)


def test_arrays_that_the_objective_closes_over(getkey):
    target, w0 = jr.normal(getkey(), (5,)), jr.normal(getkey(), (5,))

    def last(target, backward):
        objective = lambda w, args, t: 0.5 * jnp.sum((w - jnp.sin(target)) ** 2) + jnp.sum(jnp.cos(w))
        sgd = dn.ReversibleSGD(objective, 30, backward=backward)
        return jnp.sum(sgd.run(w0, learning_rate=0.3, momentum=0.7) ** 2)

    ours, stored = (jax.grad(last)(target, backward) for backward in ("exact", "store"))
    np.testing.assert_allclose(ours, stored, rtol=1e-12)
    assert np.all(np.abs(ours) > 1e-4)


def test_leaves_of_two_dtypes(getkey):
    w0 = {"a": jr.normal(getkey(), (3,), jnp.float32), "b": jr.normal(getkey(), (2,)), "c": None, "d": jnp.arange(3)}

    def objective(w, args, t):
        assert w["d"].dtype == jnp.arange(3).dtype
        return jnp.sum(jnp.sin(w["a"])).astype(float) * args + jnp.sum((w["b"] - args) ** 2)

    def total(args, rate, sgd):
        w = sgd.run(w0, args, learning_rate=rate, momentum=0.9)
        return jnp.sum(w["a"].astype(jnp.float64) ** 2) + jnp.sum(w["b"] ** 3), w

    gradients = []
    for backward in ("exact", "store"):
        sgd = dn.ReversibleSGD(objective, 700, min_momentum=0.9, backward=backward)
        of_sgd = jax.jit(lambda args, rate, sgd=sgd: jax.grad(total, (0, 1), has_aux=True)(args, rate, sgd))
        gradient, w = of_sgd(jnp.asarray(0.3), jnp.asarray(0.01))
        assert (w["a"].dtype, w["b"].dtype) == (jnp.float32, jnp.float64)
        np.testing.assert_array_equal(w["d"], w0["d"])
        gradients.append(gradient)
    for ours, stored in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, stored, rtol=1e-5)


@pytest.mark.parametrize("w0", [jnp.asarray(0.7), jnp.asarray([-0.7]), jnp.asarray(0.7, jnp.float32)])
def test_one_weight(w0):
    run = lambda backward: (
        lambda w0, rate: jnp.sum(
            dn.ReversibleSGD(lambda w, args, t: jnp.sum(jnp.cosh(w)), 30, backward=backward).run(
                w0, learning_rate=rate, momentum=0.9
            )
        )
    )
    rate = jnp.asarray(0.3, w0.dtype)
    ours, stored = (jax.grad(run(backward), (0, 1))(w0, rate) for backward in ("exact", "store"))
    for a, b in zip(ours, stored, strict=True):
        np.testing.assert_allclose(a, b, rtol=20 * float(jnp.finfo(w0.dtype).eps))


def test_without_a_gradient_nothing_moves():
    w0 = jnp.asarray([0.1, -0.3, 1e-17, 0.0])
    sgd = dn.ReversibleSGD(lambda w, args, t: 0.0 * jnp.sum(w) + args, 100)
    run = lambda w0, rate: sgd.run(w0, 1.0, learning_rate=rate, momentum=0.9)
    w, pull_back = jax.vjp(run, w0, jnp.asarray(0.5))
    np.testing.assert_allclose(w, w0, atol=2**-53)  # the nearest multiples of the unit
    of_w0, of_rate = pull_back(jnp.asarray([1.0, 2.0, -3.0, 4.0]))
    np.testing.assert_array_equal(of_w0, [1.0, 2.0, -3.0, 4.0])
    assert of_rate == 0
    assert sgd.information(w0, 1.0, learning_rate=0.5, momentum=0.9) == 0


# Transforms


def test_batches(getkey):
    w0 = jr.normal(getkey(), (3,))
    momenta, scales = jnp.asarray([0.6, 0.9, 0.95]), jnp.asarray([0.5, 1.0, 0.8])

    def total(scale, momentum, backward):
        sgd = dn.ReversibleSGD(lambda w, args, t: jnp.sum(jnp.cosh(w * args)), STEPS, backward=backward)
        return jnp.sum(sgd.run(w0, scale, learning_rate=0.3, momentum=momentum) ** 3)

    of_one = lambda backward: jax.grad(lambda scale, momentum: total(scale, momentum, backward), (0, 1))
    lanes = jax.jit(jax.vmap(of_one("exact")))(scales, momenta)
    each = lambda scales, momenta: jax.vmap(lambda scale, momentum: total(scale, momentum, "exact"))(scales, momenta)
    batch = jax.jit(jax.grad(lambda scales, momenta: jnp.sum(each(scales, momenta)), (0, 1)))
    one_by_one = jax.lax.map(lambda x: of_one("store")(*x), (scales, momenta))
    for a, b, c in zip(lanes, batch(scales, momenta), one_by_one, strict=True):
        np.testing.assert_allclose(a, c, rtol=1e-9)
        np.testing.assert_allclose(b, c, rtol=1e-9)


def test_modes_that_it_does_not_have(getkey):
    w0 = jr.normal(getkey(), (3,))
    run = lambda backward: (
        lambda w0: jnp.sum(
            dn.ReversibleSGD(lambda w, args, t: jnp.sum(jnp.cosh(w)), 10, backward=backward).run(
                w0, learning_rate=0.3, momentum=0.9
            )
        )
    )
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(run("exact"), (w0,), (w0,))
    for second in (jax.hessian, lambda f: jax.jacrev(jax.grad(f))):
        with pytest.raises((RuntimeError, TypeError), match="once only|forward-mode"):
            second(run("exact"))(w0)
    in_floats = lambda w0: jnp.sum(
        plain(lambda w, args, t: jnp.sum(jnp.cosh(w)), 10).run(w0, learning_rate=0.3, momentum=0.9)
    )
    np.testing.assert_allclose(jax.hessian(run("store"))(w0), jax.hessian(in_floats)(w0), rtol=1e-8, atol=1e-10)


def test_an_eager_call_compiles_once(getkey):
    w0 = jr.normal(getkey(), (3,))
    sgd = dn.ReversibleSGD(lambda w, args, t: jnp.sum((w - args) ** 2), 10)
    run = lambda args: sgd.run(w0, args, learning_rate=0.3, momentum=0.9)
    run(jnp.asarray(1.0))
    with pytest.MonkeyPatch.context() as patch:
        traced = []
        patch.setattr(optimiser, "_forward", lambda *args: traced.append(args))
        run(jnp.asarray(2.0))
    assert not traced


def test_lowers_for_every_platform():
    sgd = dn.ReversibleSGD(noise, 400, min_momentum=0.9, throw=False)
    run = jax.jit(jax.grad(lambda w0, rate: jnp.sum(sgd.run(w0, learning_rate=rate, momentum=0.9) ** 2), (0, 1)))
    shapes = jax.ShapeDtypeStruct((3,), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    module = jax.export.export(run, platforms=("tpu", "cuda", "cpu"))(*shapes).mlir_module()
    text = "\n".join(line.split(" loc(")[0] for line in module.splitlines() if not line.startswith("#loc"))
    assert "callback" not in text
    assert "xi64>" not in text  # no arrays of them: the integers are those of float32's width, with x64 on as well


# Bits


def test_products_are_undone_bit_by_bit():
    """Against Python's unbounded integers, at both ends of the range and on either side of zero; a few hundred steps."""
    rng = np.random.default_rng(0)
    for dtype, least in ((jnp.float64, 0.9), (jnp.float32, 0.9), (jnp.float64, 0.5), (jnp.float32, 0.98)):
        a = optimiser._arithmetic(jnp.dtype(dtype), dn.ReversibleSGD(noise, 1, min_momentum=least))
        width = 8 * a.dtype.itemsize
        low, high = -(2 ** (width - 1)), 2 ** (width - 1) - 1
        numbers = [low, low + 1, -(2**a.d_bits), -(2**a.bin_bits) - 1, -1, 0, 1, high]
        numbers += [int(x) for x in rng.integers(low, high, 40)] + [int(x) for x in rng.integers(-300, 300, 40)]
        c, word = jnp.asarray(numbers, a.integer), jnp.zeros((2, len(numbers)), jnp.uint32)
        buffers = [0] * len(numbers)
        D, d = 2**a.bin_bits, 2**a.d_bits
        shrink, grow = jax.jit(a.shrink), jax.jit(a.grow)
        history = []
        for _ in range(min(a.steps_per_word, 300)):
            n = int(rng.integers(a.n_min, d))
            history.append((n, c, word))
            new, word = shrink(c, word, jnp.asarray(n, a.integer))
            for index, number in enumerate(numbers):  # (6)
                h, rest = number // d, number % d
                j, r = rest // D, rest % D
                places = (j + 1) * n * D // d - j * n * D // d
                i = buffers[index] * D + r
                assert i < 2**64
                buffers[index], numbers[index] = i // places, h * n + j * n * D // d + i % places
                assert abs(numbers[index] - number * n / d) <= D + abs(number) * 2**-50
            assert [int(x) for x in new] == numbers
            assert [int(low) + 2**32 * int(high) for low, high in np.asarray(word).T] == buffers
            # Take something off, so that products do not all end at zero.
            change = rng.integers(-(2 ** (width - 4)), 2 ** (width - 4), len(numbers))
            numbers = [x + int(y) if abs(x) < 2 ** (width - 3) else x for x, y in zip(numbers, change, strict=True)]
            c = jnp.asarray(numbers, a.integer)
            history[-1] = (*history[-1], new, word)
        for n, c, before, new, word in reversed(history):
            again, buffer = grow(new, word, jnp.asarray(n, a.integer))
            np.testing.assert_array_equal(again, c)
            np.testing.assert_array_equal(buffer, before)


@pytest.mark.parametrize(("dtype", "x64"), [(jnp.float64, True), (jnp.float32, True), (jnp.float32, False)])
def test_the_start_is_found_again_after_10_000_steps(dtype, x64):
    """The backward pass itself asserts it; here it is looked at. Then, that the assertion would notice."""
    with jax.enable_x64(x64):
        w0 = jnp.asarray([0.3, -1.7, 5.0, -1e-3], dtype)
        sgd = dn.ReversibleSGD(noise, 10_000, min_momentum=0.9)
        inputs, static = sgd._prepare(w0, None, jnp.asarray(0.2, dtype), jnp.asarray(0.9, dtype))
        run = optimiser._final(inputs, static)
        reverse = jax.jit(
            lambda inputs, run, c: optimiser._reversal(
                run, ([c],), jtu.tree_map(lambda _: True, inputs), inputs, static
            )
        )
        out = reverse(inputs, run, jnp.ones_like(w0))
        (a,) = static.arithmetics
        np.testing.assert_array_equal(out.state.w[0], a.encode(w0)[0])
        np.testing.assert_array_equal(a.decode(out.state.w[0]), jnp.round(w0 / a.unit) * a.unit)
        assert out.state.w[0].dtype == (jnp.int64 if dtype == jnp.float64 else jnp.int32)
        assert not np.any(out.state.v[0])
        assert not np.any(out.state.words[0])
        assert out.state.code == 0
        # The weights had moved, and one bit amiss does not pass.
        (state, stacks) = run
        assert np.all(np.abs(state.w[0] - out.state.w[0]) > 1000)
        amiss = state._replace(v=[state.v[0].at[2].add(1)])
        assert not optimiser._at_start(inputs, static, reverse(inputs, (amiss, stacks), jnp.ones_like(w0)).state)


def test_hypergradients_without_x64():
    with jax.enable_x64(False):

        def total(w0, rate, momenta, backward):
            sgd = dn.ReversibleSGD(lambda w, args, t: jnp.sum(jnp.cosh(w)), STEPS, backward=backward)
            w = sgd.run(w0, learning_rate=rate, momentum=momenta)
            assert w.dtype == jnp.float32
            return jnp.sum(w**3)

        inputs = jnp.asarray([0.3, -1.0]), jnp.asarray(0.3), jnp.full(STEPS, 0.9)
        ours, stored = (jax.grad(total, (0, 1, 2))(*inputs, backward) for backward in ("exact", "store"))
        assert furthest(ours, stored) < 1e-4


def test_the_gradient_has_the_same_bits_in_both_passes():
    """Fused with what surrounds it, in one pass or the other, this objective's gradient rounds differently."""
    x = jr.normal(jr.key(0), (64,))
    objective = lambda w, args, t: (
        jnp.sum(jnp.tanh(jnp.sin(jnp.roll(w, 1) * w * (x + w)))) + 0.05 * jnp.sum(w**2) * args
    )
    sgd = dn.ReversibleSGD(objective, 60, min_momentum=0.9)

    def total(w0, args, rate):
        w = sgd.run(jnp.sin(w0 * 1.1 + args) + w0, args, learning_rate=rate * 0.7 + args, momentum=0.9 + rate * args)
        return jnp.sum(w * w0)

    gradient = jax.grad(total, (0, 1, 2))
    inputs = x, jnp.asarray(0.01), jnp.asarray(0.1)
    eager = gradient(*inputs)
    within = jax.jit(lambda *x: jtu.tree_map(lambda leaf: 2 * leaf + jnp.sum(x[0]), gradient(*x)))(*inputs)
    lanes = jax.jit(jax.vmap(gradient, (None, 0, None)))(inputs[0], jnp.asarray([0.01, 0.02, 0.03]), inputs[2])
    # Each of them found its start again, or it would have raised. (The iteration is chaotic: they need not agree.)
    assert all(np.all(np.isfinite(leaf)) for leaf in (*eager, *within, *lanes))


def test_an_objective_that_is_not_a_function_is_noticed():
    """Another gradient on every call, as from a reduction in a varying order."""
    calls = []

    def host(t, w):
        calls.append(0)
        return np.float64(1.0 + 2.0**-30 * len(calls))

    def objective(w, args, t):
        fickle = jax.pure_callback(host, jax.ShapeDtypeStruct((), jnp.float64), t, jax.lax.stop_gradient(w))
        return jnp.sum(w) * fickle

    run = lambda throw: (
        lambda w0: jnp.sum(dn.ReversibleSGD(objective, 20, throw=throw).run(w0, learning_rate=0.1, momentum=0.9))
    )
    with pytest.raises(RuntimeError, match="did not arrive at the bits"):
        jax.grad(run(True))(jnp.ones(3))
    assert np.isfinite(run(False)(jnp.ones(3)))
    assert np.all(np.isnan(jax.grad(run(False))(jnp.ones(3))))


def test_floating_point_cannot_be_reversed():
    """What the integers are for: without them the weights grow wrong by 1/momentum a step back, until nothing is right."""
    from benchmarks import memory

    problem, steps = memory.logistic(), 700
    hyper = memory.hyperparameters(problem, steps)
    methods = memory.UNROLLED, memory.REVERSIBLE, memory.FLOAT
    truth, ours, naive = (jax.jit(method.gradient(problem, steps))(*hyper) for method in methods)
    assert memory.errors(memory.REVERSIBLE, ours, truth)[0] < 1e-10
    assert memory.errors(memory.FLOAT, naive, truth)[0] > 1


# What is stored


@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.98])
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_buffers_hold_what_the_momentum_drops(momentum, dtype):
    theory = math.log2(1 / momentum)
    full = optimiser._arithmetic(jnp.dtype(dtype), dn.ReversibleSGD(noise, 1, min_momentum=momentum)).steps_per_word
    sgd = dn.ReversibleSGD(noise, 2 * full, min_momentum=momentum)
    w0 = jnp.zeros(50, dtype)
    held = sgd.information(w0, learning_rate=0.1, momentum=jnp.asarray(momentum, dtype))
    assert abs(held / theory - 1) < 0.05
    assert sgd.stored_bits(dtype) < 1.6 * theory
    assert dn.ReversibleSGD(noise, 10_000, min_momentum=momentum).stored_bits(dtype) < 1.6 * theory


def test_memory_is_one_word_a_parameter_for_hundreds_of_steps():
    n = 1000

    def bytes_of(steps, backward):
        sgd = dn.ReversibleSGD(noise, steps, min_momentum=0.9, backward=backward, throw=False)
        run = lambda rate: jnp.sum(sgd.run(jnp.ones(n), learning_rate=rate, momentum=0.9))
        analysis = jax.jit(jax.grad(run)).lower(0.1).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    sgd = lambda steps: dn.ReversibleSGD(noise, steps, min_momentum=0.9)
    # All that grows is the stack, once.
    stack = n / 8 * (10_000 * sgd(10_000).stored_bits() - 1000 * sgd(1000).stored_bits())
    grown = bytes_of(10_000, "exact") - bytes_of(1000, "exact")
    assert 0 < grown < 1.02 * stack
    slope = (bytes_of(1000, "store") - bytes_of(200, "store")) / 800
    assert slope / (grown / 9000) > 140


# Failure


def quartic(w, args, t):
    return jnp.sum(w**4)


@pytest.mark.parametrize(
    ("objective", "w0", "rate", "momentum", "message"),
    [
        (quartic, [1.0, 2.0], 0.01, 0.4, r"momentum must lie in \[min_momentum, 1\)"),
        (quartic, [1.0, 2.0], 0.01, 1.0, "momentum must lie"),
        (quartic, [1.0, 2.0], 0.01, math.nan, "momentum must lie"),
        (quartic, [1.0, 2.0], 0.01, [0.9] * 49 + [0.1], "momentum must lie"),
        (quartic, [1.0, 3000.0], 1e-6, 0.9, "w0 has an entry"),
        (quartic, [1.0, math.inf], 1e-6, 0.9, "w0 has an entry"),
        (quartic, [1.0, -9.0], 10.0, 0.9, "has reached `limit`"),
        (lambda w, args, t: jnp.sum(w), [-2040.0, 1.0], 1.0, 0.9, "has reached `limit`"),  # by a small step
        (lambda w, args, t: -1e4 * jnp.sum(w), [0.0], 1e-9, 0.9, "has reached `limit`"),  # the velocity
        (quartic, [1.0, 2.0], math.nan, 0.9, "learning_rate is not finite"),
        (
            lambda w, args, t: jnp.sum(jnp.sqrt(w - t.astype(w.dtype) / 20)),
            [1.1],
            1e-3,
            0.9,
            "gradient of the objective is not finite",
        ),
    ],
)
def test_failure_is_named_and_never_a_number(objective, w0, rate, momentum, message):
    w0 = jnp.asarray(w0)
    run = lambda throw: (
        lambda w0, rate: dn.ReversibleSGD(objective, 50, throw=throw).run(
            w0, learning_rate=rate, momentum=jnp.asarray(momentum)
        )
    )
    for call in (run(True), jax.grad(lambda w0, rate: jnp.sum(run(True)(w0, rate)))):
        with pytest.raises(RuntimeError, match=message):
            call(w0, rate)
    assert np.all(np.isnan(run(False)(w0, rate)))
    of_w0, of_rate = jax.grad(lambda w0, rate: jnp.sum(run(False)(w0, rate)), (0, 1))(w0, rate)
    assert np.all(np.isnan(of_w0))
    assert np.isnan(of_rate)


def test_a_failed_lane_leaves_the_others_alone():
    sgd = dn.ReversibleSGD(quartic, 50, throw=False)
    run = jax.grad(lambda w0, rate: jnp.sum(sgd.run(w0, learning_rate=rate, momentum=0.9)))
    w0 = jnp.asarray([1.0, 2.0])
    lanes = jax.vmap(run, (None, 0))(w0, jnp.asarray([0.01, 100.0, 0.02]))
    assert np.all(np.isnan(lanes[1]))
    np.testing.assert_allclose(lanes[0], run(w0, 0.01), rtol=1e-9)
    np.testing.assert_allclose(lanes[2], run(w0, 0.02), rtol=1e-9)


def test_misuse_is_named():
    for fields, message in (
        ({"steps": 0}, "steps"),
        ({"steps": True}, "steps"),
        ({"min_momentum": 0.0}, "min_momentum"),
        ({"min_momentum": 1.0}, "min_momentum"),
        ({"limit": 1000.0}, "limit must be a power of two"),
        ({"limit": -2.0}, "limit"),
        ({"backward": "float"}, "backward"),
    ):
        with pytest.raises(ValueError, match=message):
            dn.ReversibleSGD(**{"objective": quartic, "steps": 5, **fields})
    sgd = dn.ReversibleSGD(quartic, 5)
    fine = {"learning_rate": 0.1, "momentum": 0.9}
    for w0, fields, message in (
        (jnp.arange(3), {}, "no floating-point array"),
        (jnp.ones(3, jnp.bfloat16), {}, "float32 or float64"),
        (jnp.ones(3), {"learning_rate": jnp.ones(4)}, r"learning_rate must be a scalar or of shape \(5,\)"),
        (jnp.ones(3), {"momentum": [0.9, 0.9]}, "momentum must be a scalar, an array"),
    ):
        with pytest.raises(ValueError, match=message):
            sgd.run(w0, **{**fine, **fields})
    with pytest.raises(ValueError, match="floating scalar"):
        dn.ReversibleSGD(lambda w, args, t: w, 5).run(jnp.ones(3), **fine)
