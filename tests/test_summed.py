"""Custom backward passes under `vmap`: right in every order of differentiating and batching, and no gradient is held lane by lane."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from jaxtyping import Array

import declarative as dn
from declarative._core.summed import Rule, nan_where, vjp

W = jr.normal(jr.key(0), (3, 3))
Y = jr.normal(jr.key(1), (4, 3))
SCALES = jnp.array([1.0, 20.0, 3.0, 0.1])
STEPS = 6


def step(weight, y):
    return y + 0.3 * jnp.tanh(weight @ y)


def primal(differentiable, constants):
    y, weight = differentiable
    return jax.lax.scan(lambda y, _: (step(weight, y), None), y, None, length=STEPS)[0]


def forward(differentiable, constants):
    y, weight = differentiable
    return jax.lax.scan(lambda y, _: (step(weight, y), y), y, None, length=STEPS)


def backward(ys, cotangent, perturbed, differentiable, constants):
    _, weight = differentiable

    def back(carry, y):
        cotangent, of_weight = carry
        more, cotangent = vjp(step, weight, y)[1](cotangent)
        return (cotangent, of_weight + more), None

    return jax.lax.scan(back, (cotangent, jnp.zeros_like(weight)), ys, reverse=True)[0]


rule = Rule(primal, forward, backward)
CUSTOM = lambda weight, y: rule((y, weight), None)
PLAIN = lambda weight, y: primal((y, weight), None)

ORDERS = {
    "grad": lambda f: jax.grad(lambda w, y: jnp.sum(f(w, y[0]) ** 2), (0, 1))(W, Y),
    "grad of vmap": lambda f: jax.grad(lambda w, y: jnp.sum(jax.vmap(f, (None, 0))(w, y) ** 2), (0, 1))(W, Y),
    "vmap of grad": lambda f: jax.vmap(jax.grad(lambda w, y: jnp.sum(f(w, y) ** 2), (0, 1)), (None, 0))(W, Y),
    "grad of vmap of vmap": lambda f: jax.grad(
        lambda w, y: jnp.sum(jax.vmap(lambda s: jax.vmap(lambda y: f(s * w, y))(y))(SCALES) ** 2), (0, 1)
    )(W, Y),
    "grad of vmap of vmap, one map each": lambda f: jax.grad(
        lambda w, y: jnp.sum(jax.vmap(lambda w: jax.vmap(lambda y: f(w, y))(y))(w) ** 2), (0, 1)
    )(jnp.stack([W, 2 * W]), Y),
    "vmap of grad of vmap": lambda f: jax.vmap(
        jax.grad(lambda w, y: jnp.sum(jax.vmap(f, (None, 0))(w, y) ** 2), (0, 1)), (0, None)
    )(jnp.stack([W, 2 * W]), Y),
    "vmap of grad of vmap, shared weights": lambda f: jax.vmap(
        lambda s: jax.grad(lambda w: jnp.sum(jax.vmap(f, (None, 0))(w, s * Y) ** 2))(W)
    )(SCALES),
    "jacrev": lambda f: jax.jacrev(f, (0, 1))(W, Y[0]),
    "lanes along the last axis": lambda f: jax.grad(lambda w, y: jnp.sum(jax.vmap(f, (None, 1), 1)(w, y) ** 2), (0, 1))(
        W, Y.T
    ),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_every_order_of_grad_and_vmap(order, compiled):
    run = lambda f: (jax.jit(lambda: ORDERS[order](f)) if compiled else lambda: ORDERS[order](f))()
    for ours, theirs in zip(*(jtu.tree_leaves(run(f)) for f in (CUSTOM, PLAIN)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-13)


def test_what_is_constant_must_carry_no_tangent():
    with pytest.raises(ValueError, match="no tangent"):
        jax.grad(lambda c: jnp.sum(rule((Y[0], W), c)))(1.0)


def temporary(f, lanes, size):
    weight, y = jnp.zeros((size, size)), jnp.zeros((lanes, size))
    loss = lambda weight, y: jnp.sum(jax.vmap(f, (None, 0))(weight, y))
    return bytes_of(jax.jit(jax.grad(loss)).lower(weight, y))


def bytes_of(lowered) -> int:
    return lowered.compile().memory_analysis().temp_size_in_bytes


def solve(weight, y, adaptive=False):
    term = dfx.ODETerm(lambda t, y, args: jnp.tanh(weight @ y))
    controller = dfx.PIDController(rtol=1e-3, atol=1e-3) if adaptive else dfx.ConstantStepSize()
    adjoint = dn.ReversibleAdjoint()
    return dfx.diffeqsolve(
        term, dfx.ReversibleHeun(), 0.0, 1.0, 0.01, y, adjoint=adjoint, max_steps=128, stepsize_controller=controller
    ).ys  # fmt: skip


@pytest.mark.parametrize("adaptive", [False, True], ids=["equal steps", "adaptive"])
def test_no_lane_holds_a_gradient_of_the_weights_in_an_ode(adaptive):
    lanes, size = 128, 64
    states = lanes * size * 8
    memory = temporary(lambda weight, y: solve(weight, y, adaptive), lanes, size)
    assert memory < 75 * states < 2 * size * states  # two gradients a lane is what a loop would need


@pytest.mark.slow
def test_lanes_of_nested_vmaps_with_steps_of_their_own():
    """Each of the two maps shares what the other one maps."""
    ys, rates = jnp.array([0.5, 2.0, 1e-3]), jnp.array([1.0, 4.0])
    controller = dfx.PIDController(rtol=1e-3, atol=1e-3)

    def loss(adjoint, swapped):
        def one(y, rate):
            term = dfx.ODETerm(lambda t, y, rate: -rate * jnp.sin(y))
            options = {"adjoint": adjoint, "stepsize_controller": controller, "max_steps": 400}
            return dfx.diffeqsolve(term, dfx.ReversibleHeun(), 0.0, 1.0, 0.1, y, rate, **options).ys[0]  # pyright: ignore  (options of mixed types)

        def total(ys, rates):
            inner = jax.vmap(one, (0, None) if swapped else (None, 0))
            return jnp.sum(jax.vmap(inner, (None, 0) if swapped else (0, None))(ys, rates) ** 2)

        return jax.jit(jax.grad(total, (0, 1)))

    for swapped in (False, True):
        pair = [loss(adjoint, swapped)(ys, rates) for adjoint in (dn.ReversibleAdjoint(), dfx.DirectAdjoint())]
        for ours, theirs in zip(*pair, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9)


class Branch(eqx.Module):
    weight: Array

    def __call__(self, x):
        return jnp.tanh(self.weight @ x)


def test_no_lane_holds_a_gradient_of_the_weights_in_a_network():
    depth, lanes, size = 20, 128, 32
    block = lambda key: dn.ReversibleBlock(*(Branch(0.1 * jr.normal(k, (size, size))) for k in jr.split(key)))
    params, static = eqx.partition(dn.ReversibleSequence(block, depth, key=jr.key(0)), eqx.is_array)
    x = jr.normal(jr.key(1), (lanes, 2, size))

    def loss(params):
        network = eqx.combine(params, static)
        return sum(jnp.sum(y**2) for y in jax.vmap(lambda x: network((x[0], x[1])))(x))

    memory = bytes_of(jax.jit(jax.grad(loss)).lower(params))
    assert memory < 15 * lanes * 2 * size * 8 < depth * lanes * 2 * size * 8


def test_a_lane_that_takes_no_part_and_has_no_derivative():
    """The square root of zero, which was not asked for, by lanes that share a factor."""

    def back(ys, cotangent, perturbed, differentiable, constants):
        y, factor = differentiable
        of_factor, of_y = vjp(lambda factor, y: factor * jnp.sqrt(y), factor, y, where=y > 0)[1](cotangent)
        return of_y, of_factor

    value = lambda differentiable, constants: differentiable[1] * jnp.sqrt(differentiable[0])
    root = Rule(value, lambda differentiable, constants: (value(differentiable, constants), ()), back)
    loss = lambda y, factor: jnp.sum(jax.vmap(lambda y: root((y, factor), None))(y))
    for y, of_factor in ((jnp.array([0.0, 4.0, 9.0]), 5.0), (jnp.zeros(3), 0.0)):
        of_y, got = jax.grad(loss, (0, 1))(y, jnp.array(2.0))
        np.testing.assert_allclose(of_y, jnp.where(y > 0, 1 / jnp.sqrt(jnp.where(y > 0, y, 1)), 0), rtol=1e-12)
        np.testing.assert_allclose(got, of_factor, rtol=1e-12)
    alone = jax.vmap(jax.grad(lambda y, factor: root((y, factor), None), (0, 1)), (0, None))(jnp.array([0.0, 4.0]), 2.0)
    np.testing.assert_allclose(alone[1], [0.0, 2.0])


def test_a_bad_lane_spoils_its_own_cotangents_and_the_sums_it_is_in():
    def back(residuals, cotangent, perturbed, differentiable, constants):
        y, factor = differentiable
        of_factor, of_y = vjp(lambda factor, y: factor * y, factor, y)[1](cotangent)
        return nan_where(y > 2, (of_y, of_factor))

    value = lambda differentiable, constants: differentiable[0] * differentiable[1]
    product = Rule(value, lambda differentiable, constants: (value(differentiable, constants), ()), back)
    y = jnp.array([[1.0, 2.0], [2.0, 3.0]])
    loss = lambda y, each, shared: jnp.sum(
        jax.vmap(lambda y, each: jax.vmap(lambda y: product((y, each * shared), None))(y))(y, each)
    )
    of_y, of_each, of_shared = jax.grad(loss, (0, 1, 2))(y, jnp.array([1.0, 1.0]), jnp.array(1.0))
    assert np.isnan(of_y).tolist() == [[False, False], [False, True]]
    assert np.isnan(of_each).tolist() == [False, True]
    assert np.isnan(of_shared)


def solved(adjoint):
    def f(field, y):
        term = dfx.ODETerm(lambda t, y, args: field(y))
        return dfx.diffeqsolve(term, dfx.ReversibleHeun(), 0.0, 1.0, 0.1, y, adjoint=adjoint).ys

    return f


def network(backward):
    def f(field, y):
        block = lambda key: dn.ReversibleBlock(field, field)
        out = dn.ReversibleSequence(block, 3, key=jr.key(0), backward=backward)((y, 2 * y))
        return jnp.concatenate(out)

    return f


@pytest.mark.parametrize(
    "pair", [(solved(dn.ReversibleAdjoint()), solved(dfx.DirectAdjoint())), (network("reconstruct"), network("store"))],
    ids=["ode", "network"],
)  # fmt: skip
def test_a_collective_inside(pair):
    """Both passes know the axis of the `vmap` around them."""

    class Normalised(eqx.Module):
        weight: Array

        def __call__(self, y):
            return jnp.tanh(self.weight @ (y - jax.lax.pmean(y, "lanes")))

    def gradients(f):
        lane = lambda weight, y: f(Normalised(weight), y)
        return jax.grad(lambda w, y: jnp.sum(jax.vmap(lane, (None, 0), axis_name="lanes")(w, y) ** 2), (0, 1))(W, Y)

    for ours, theirs in zip(*map(gradients, pair), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)
