"""Regressions found by adversarial review: each of these was once silently wrong, a crash, or a false alarm."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optimistix as optx
import pytest

import declarative as dn


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_guess_far_larger_than_the_solution_costs_no_accuracy(dtype):
    tight = 1e-4 if dtype == jnp.float32 else 1e-10
    half = dn.FixedPoint(lambda y, x: 0.5 * y + x)
    np.testing.assert_allclose(float(half(jnp.asarray(1e-8, dtype), y0=jnp.asarray(1.0, dtype))), 2e-8, rtol=tight)
    np.testing.assert_allclose(float(half(jnp.asarray(5e-4, dtype), y0=jnp.asarray(1e3, dtype))), 1e-3, rtol=tight)
    square = dn.Root(lambda y, x: y**2 - x)
    value, slope = jax.value_and_grad(lambda x: square(x, y0=jnp.asarray(1.0, dtype)))(jnp.asarray(1e-12, dtype))
    np.testing.assert_allclose(float(value), 1e-6, rtol=tight)
    np.testing.assert_allclose(float(slope), 5e5, rtol=tight)


def test_a_strongly_scaled_equation_does_not_cover_for_a_weak_one():
    wrong = dn.implicit(lambda y, x: jnp.array([1e9, 1.0]) * (y - x))(lambda x: x * jnp.array([1.0, 1.5]))
    with pytest.raises(dn.SolveError, match="does not satisfy the optimality conditions"):
        wrong(jnp.ones(2))
    slow = dn.FixedPoint(lambda y, x: y + jnp.array([1.0, 1e-12]) * (x - y), throw=False)
    assert slow.solve(jnp.ones(2), y0=jnp.zeros(2)).result != dn.RESULTS.successful


def test_losses_do_not_notice_a_common_offset():
    z = jnp.array([0.0, 16.0, 8.0, 1.0], jnp.float32)
    for loss in (dn.softmax_loss, dn.sparsemax_loss, dn.entmax_loss):
        for offset in (1e4, 1e6):
            np.testing.assert_allclose(float(loss(z + jnp.float32(offset), 1)), float(loss(z, 1)), atol=1e-5)


@pytest.mark.parametrize("guess", [1.0, 1, np.float64(1.0), jnp.float32(1.0), jnp.float64(1.0)], ids=repr)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32, jnp.float64])
def test_guesses_of_every_kind(guess, dtype):
    x = jnp.asarray(2.0, dtype)
    out = dn.Root(lambda y, x: y**3 + y - x.astype(y.dtype))(x, y0=guess)
    np.testing.assert_allclose(float(out), 1.0, rtol=1e-2 if dtype == jnp.float16 else 1e-6)


def test_a_shape_that_does_not_fit_is_named():
    for node in (dn.FixedPoint(lambda y, x: 0.5 * y + x), dn.Root(lambda y, x: 0.5 * y + x)):
        with pytest.raises(ValueError, match=r"y0 is float64\[\], fn returned float64\[5\]"):
            node(jnp.ones(5), y0=0.0)


def test_a_module_with_functions_inside_as_data():
    mlp = eqx.nn.MLP(2, 2, 4, 1, key=jr.key(0), dtype=jnp.float64)
    node = dn.Root(lambda y, m: y - 0.1 * m(y) - 1)
    f = lambda m: jnp.sum(node(m, y0=jnp.zeros(2)))
    grads = eqx.filter_grad(f)(mlp)
    h = 1e-6
    bias = jnp.asarray(mlp.layers[0].bias)
    bump = lambda sign: eqx.tree_at(lambda m: m.layers[0].bias, mlp, bias.at[1].add(sign * h))
    np.testing.assert_allclose(
        float(grads.layers[0].bias[1]), float(f(bump(1)) - f(bump(-1))) / (2 * h), rtol=1e-6, atol=1e-9
    )


def test_health_of_an_empty_batch_and_of_many_failures_in_a_scan():
    fine = dn.Root(lambda y, x: y**3 + y - x, throw=False)
    loss = lambda x: jnp.sum(jax.vmap(lambda x: fine(x, y0=1.0))(x))
    _, _, health = dn.value_and_grad_with_health(loss)(jnp.zeros(0))
    assert health.solves["Root #0"].shape == (0,)
    none = dn.Root(lambda y, x: y**2 + x, throw=False, on_failure="zero", max_steps=20)
    loss = lambda x: jax.lax.scan(lambda c, x: (c + none(x, y0=1.0), None), 0.0, x)[0]
    _, _, health = dn.value_and_grad_with_health(loss)(jnp.ones(20))
    assert "20 failures" in health.report()


def test_an_empty_unknown():
    assert dn.Root(lambda y, x: y - x)(jnp.zeros(0), y0=jnp.zeros(0)).shape == (0,)


def test_a_temperature_that_is_no_scalar_is_refused():
    with pytest.raises((ValueError, TypeError), match="temperature"):
        dn.Softmax(jnp.ones(3))


@pytest.mark.parametrize("n", [60, 600])
def test_a_rotation_is_no_obstacle_at_any_size(n):
    rotation = jnp.asarray(np.linalg.qr(np.random.default_rng(0).standard_normal((n, n)))[0])
    node = dn.Root(lambda y, x: rotation @ y - x)
    slope = jax.grad(lambda x: node(x, y0=jnp.zeros(n))[0])(jnp.ones(n))
    np.testing.assert_allclose(np.asarray(slope), np.asarray(rotation[:, 0]), atol=1e-9)


def test_newton_does_not_depend_on_the_scale_of_the_equation():
    for scale in (1e-12, 1.0, 1e12):
        solution = dn.Root(lambda y, x, scale=scale: scale * (y**3 + y - x)).solve(2.5, y0=0.0)
        assert solution.result == dn.RESULTS.successful
        assert solution.stats["steps"] < 12


def test_conditions_are_blind_to_units():
    node = dn.Root(lambda y, x: jnp.exp(1e9 * y) - x)
    assert dn.conditions(node, node.solve(2.0, y0=0.0), 2.0).holds() == (True, None, True)


@pytest.mark.parametrize("make", [dn.Softmax, dn.Sparsemax, lambda **kw: dn.Entmax(1.5, **kw)])
def test_the_implicit_route_does_not_notice_a_common_offset(make):
    z = jnp.array([0.0, 0.5, 1.0], jnp.float32)
    for offset in (1e4, 1e6):
        moved = z + jnp.float32(offset)
        for node in (make(), make(adjoint=dn.ImplicitAdjoint())):
            slope = jax.grad(lambda z, node=node: node(z)[2])(moved)
            np.testing.assert_allclose(np.asarray(slope), np.asarray(jax.grad(lambda z: make()(z)[2])(z)), atol=1e-5)


def test_the_matrix_free_gradient_of_a_mean_loss_in_float32():
    n = 600
    weight = 0.9 * jnp.asarray(np.linalg.qr(np.random.default_rng(0).standard_normal((n, n)))[0], jnp.float32)
    node = dn.FixedPoint(lambda y, x: jnp.tanh(weight @ y + x), throw=False)
    loss = lambda x: jnp.mean(1e-4 * jax.vmap(lambda x: node(x, y0=jnp.zeros(n, jnp.float32)))(x) ** 2)
    _, _, health = jax.jit(dn.value_and_grad_with_health(loss))(jr.normal(jr.key(0), (2, n), jnp.float32))
    assert np.sum(health.forward_failures["FixedPoint #0"]) == np.sum(health.backward_failures["FixedPoint #0"]) == 0


def test_a_foreign_adjoint_with_a_solver_of_the_users():
    solver = optx.Newton(1e-8, 1e-8)
    node = dn.FixedPoint(lambda y, x: jnp.tanh(0.5 * y + x), solver, optx.ImplicitAdjoint())
    want = dn.FixedPoint(lambda y, x: jnp.tanh(0.5 * y + x))
    slopes = [jax.grad(lambda x, node=node: node(x, y0=0.0))(1.0) for node in (node, want)]
    np.testing.assert_allclose(float(slopes[0]), float(slopes[1]), rtol=1e-6)
