"""Gradients of fixed points: the matrix-free solve and what it falls back to, truncated and borrowed inverses."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optimistix as optx
import pytest

import declarative as dn

N = 48


def affine(y, x):
    W, u = x
    return W @ y + u


def layer(adjoint=None, solver=None, **options):
    return dn.FixedPoint(affine, solver, adjoint, **{"throw": False, **options})


def data(radius, key=0, dtype=jnp.float64):
    W = jr.normal(jr.key(key), (N, N), dtype)
    return radius * W / jnp.max(jnp.abs(jnp.linalg.eigvals(W))).astype(dtype), jr.normal(jr.key(key + 1), (N,), dtype)


def gradient(node, x, y0=None):
    """Of a linear function of the solution with respect to u: the transposed solve itself."""
    c = jnp.cos(jnp.arange(N, dtype=x[1].dtype))
    y0 = jnp.zeros_like(x[1]) if y0 is None else y0
    return jax.jit(jax.grad(lambda u: c @ node((x[0], u), y0=y0)))(x[1]), c


@pytest.mark.parametrize(("dtype", "tol"), [(jnp.float64, 1e-10), (jnp.float32, 1e-4)])
def test_products_solve_what_contracts(dtype, tol):
    x = data(0.9, dtype=dtype)
    found, c = gradient(layer(max_steps=5000), x)
    np.testing.assert_allclose(found, jnp.linalg.solve(jnp.eye(N, dtype=dtype) - x[0].T, c), rtol=tol, atol=tol)


def test_elimination_solves_what_products_do_not():
    # A cyclic shift, turned: biconjugate gradients break down (the residual is orthogonal to its image), and nothing contracts.
    W, u = 4 * jnp.roll(jnp.eye(N), 1, axis=0), jr.normal(jr.key(1), (N,))
    node = layer(solver=dn.Broyden(1e-12, 0.0, history=60), max_steps=500)
    found, c = gradient(node, (W, u), jnp.linalg.solve(jnp.eye(N) - W, u))
    np.testing.assert_allclose(found, jnp.linalg.solve(jnp.eye(N) - W.T, c), rtol=1e-8)


def test_a_singular_system_is_reported_and_no_answer():
    # The eigenvalue 1: every point of a line is a fixed point.
    W = jnp.diag(jnp.linspace(0.1, 1.0, N))
    x = (W, jnp.zeros(N))
    node = layer(max_steps=20)
    loss = lambda u: jnp.sum(node((W, u), y0=jnp.zeros(N)))
    _, grad, health = dn.value_and_grad_with_health(lambda u: loss(u), per_element=False)(x[1])
    assert int(health.backward_failures) == 1
    assert jnp.all(jnp.isnan(grad))


def test_one_lane_that_needs_elimination_leaves_its_neighbours_alone():
    easy, hard = data(0.5)[0], 4 * jnp.roll(jnp.eye(N), 1, axis=0)
    u, c = jr.normal(jr.key(2), (N,)), jnp.cos(jnp.arange(N, dtype=jnp.float64))
    node = layer(max_steps=500, solver=dn.Broyden(1e-12, 0.0, history=60))
    solve = jax.jit(jax.vmap(jax.grad(lambda u, W, y0: c @ node((W, u), y0=y0)), in_axes=(None, 0, 0)))
    starts = jnp.stack([jnp.linalg.solve(jnp.eye(N) - W, u) for W in (easy, hard)])
    both = solve(u, jnp.stack([easy, hard]), starts)
    for found, W in zip(both, (easy, hard), strict=True):
        np.testing.assert_allclose(found, jnp.linalg.solve(jnp.eye(N) - W.T, c), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("radius", [0.5, 0.9])
def test_phantom_gradients_are_the_damped_series(radius):
    x = data(radius)
    found, c = gradient(layer(dn.PhantomAdjoint(7, 0.6), max_steps=5000), x)
    damped = 0.4 * np.eye(N) + 0.6 * np.asarray(x[0]).T
    want = 0.6 * sum(np.linalg.matrix_power(damped, i) for i in range(7)) @ np.asarray(c)
    np.testing.assert_allclose(found, want, rtol=1e-10, atol=1e-12)


def test_phantom_gradients_are_those_of_damped_steps_from_the_solution():
    x = data(0.8)
    y = jnp.linalg.solve(jnp.eye(N) - x[0], x[1])
    found, c = gradient(layer(dn.PhantomAdjoint(4, 0.3), max_steps=5000), x)

    def unrolled(u):
        z = y
        for _ in range(4):
            z = 0.7 * z + 0.3 * affine(z, (x[0], u))
        return c @ z

    np.testing.assert_allclose(found, jax.grad(unrolled)(x[1]), rtol=1e-8, atol=1e-10)


def test_one_undamped_step_is_the_one_step_gradient():
    x = data(0.8)
    one, _ = gradient(layer(dn.OneStepAdjoint(), max_steps=5000), x)
    phantom, _ = gradient(layer(dn.PhantomAdjoint(1, 1.0), max_steps=5000), x)
    np.testing.assert_allclose(one, phantom, rtol=1e-14)


def test_the_inverse_that_broyden_leaves():
    x, c = data(0.5), jnp.cos(jnp.arange(N, dtype=jnp.float64))
    solver = dn.Broyden(1e-12, 0.0)
    node = dn.FixedPoint(affine, solver, dn.QuasiNewtonAdjoint(), throw=False)
    state = optx.fixed_point(affine, solver, jnp.zeros(N), x, max_steps=1000).state
    us, vs = solver.inverse(state.memory)
    H = -np.eye(N) + np.asarray(us).T @ np.asarray(vs)
    found, _ = gradient(node, x)
    np.testing.assert_allclose(found, -H.T @ c, rtol=1e-9, atol=1e-12)
    forward = jax.jvp(lambda u: node((x[0], u), y0=jnp.zeros(N)), (x[1],), (c,))[1]
    np.testing.assert_allclose(forward, -H @ c, rtol=1e-9, atol=1e-12)
    exact = np.linalg.solve(np.eye(N) - np.asarray(x[0]), c)
    # It has learnt something: on the span of its steps, which is what the secant equations hold on.
    assert np.linalg.norm(-H @ c - exact) < np.linalg.norm(c - exact)


def test_what_broyden_leaves_of_a_lane_that_ended_early():
    x, slow = data(0.3), data(0.95)
    node = dn.FixedPoint(affine, dn.Broyden(1e-12, 0.0, history=12), dn.QuasiNewtonAdjoint(), throw=False)
    alone, _ = gradient(node, x)
    together = jax.vmap(lambda *x: gradient(node, x)[0])(*(jnp.stack(pair) for pair in zip(x, slow, strict=True)))
    np.testing.assert_allclose(together[0], alone, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: dn.FixedPoint(affine, adjoint=dn.QuasiNewtonAdjoint()), "solver=Broyden"),
        (lambda: dn.PhantomAdjoint(0), "steps must be a positive integer"),
        (lambda: dn.PhantomAdjoint(3, 1.5), "damping must lie in"),
    ],
)
def test_misuse(make, match):
    with pytest.raises(ValueError, match=match):
        make()
