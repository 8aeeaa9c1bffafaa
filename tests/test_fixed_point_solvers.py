"""Accelerated fixed-point solvers: what they find, how fast, and what happens where extrapolation fails."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optimistix as optx
import pytest

import declarative as dn

BOTH = pytest.mark.parametrize("kind", [dn.Anderson, dn.Broyden])


def solve(fn, solver, y0, args=None, max_steps=1000):
    out = optx.fixed_point(fn, solver, y0, args, max_steps=max_steps, throw=False)
    return out.value, out.stats["num_steps"], out.result == optx.RESULTS.successful


def symmetric(n, radius, key):
    W = jr.normal(key, (n, n))
    W = W + W.T
    return W * radius / jnp.linalg.norm(W, 2)


def test_an_affine_map_of_few_dimensions_is_solved_by_the_differences(getkey):
    W, b = 0.9 * jr.normal(getkey(), (4, 4)), jr.normal(getkey(), (4,))
    exact = jnp.linalg.solve(jnp.eye(4) - W, b)
    value, steps, found = solve(lambda y, _: W @ y + b, dn.Anderson(1e-9, 0.0), jnp.zeros(4))
    assert found
    assert steps <= 4 + 3  # one difference for each dimension, one step to see it
    np.testing.assert_allclose(value, exact, rtol=1e-8)


@pytest.mark.parametrize(
    ("solver", "radius", "factor"),
    [(dn.Anderson(1e-10, 0.0), 0.99, 8), (dn.Anderson(1e-10, 0.0), 0.9999, 100), (dn.Broyden(1e-10, 0.0), 0.99, 8)],
)
def test_faster_than_picard_on_slow_contractions(solver, radius, factor):
    W, b = symmetric(50, radius, jr.key(0)), jr.normal(jr.key(1), (50,))
    fn = lambda y, _: W @ y + b
    exact = jnp.linalg.solve(jnp.eye(50) - W, b)
    value, steps, found = jax.jit(lambda: solve(fn, solver, jnp.zeros(50)))()
    assert found
    plain = np.log(1e-10) / np.log(radius)
    assert steps < plain / factor
    np.testing.assert_allclose(value, exact, atol=1e-6 * float(jnp.max(jnp.abs(exact))))


@BOTH
def test_a_map_that_is_no_contraction(kind):
    W, b = jnp.diag(jnp.array([-3.0, 1.5, 0.2])), jnp.array([1.0, 2.0, 3.0])
    value, _, found = solve(lambda y, _: W @ y + b, kind(1e-12, 0.0), jnp.zeros(3))
    assert found
    np.testing.assert_allclose(value, b / (1 - jnp.diag(W)), rtol=1e-9)


@BOTH
def test_extrapolation_out_of_the_domain_is_taken_back(kind):
    # T is defined for y > 0 only, and the first extrapolation from here leaves that.
    fn = lambda y, a: jnp.sqrt(a * jnp.where(y > 0, y, jnp.nan))
    value, steps, found = jax.jit(jax.vmap(lambda a, y: solve(fn, kind(1e-12, 0.0), y, a)))(
        jnp.array([[2.0], [2.0], [1e-8]]), jnp.array([[1e-9], [1e9], [1e6]])
    )
    assert jnp.all(found)
    assert jnp.max(steps) < 100
    np.testing.assert_allclose(value[:, 0], [2, 2, 1e-8], rtol=1e-9)


@BOTH
def test_where_the_residual_has_a_minimum_that_is_no_fixed_point(kind):
    # T(y) - y is (x + y^2) / 2, nearly, about y = 0; the fixed point is 2. Picard iteration drifts through in 49 to 98 steps.
    def fn(y, x):
        return jnp.stack([y[0] + 0.25 * (x + y[0] ** 2) * (2 - y[0]), 0.5 * y[1] + 0.3 * y[0], 0.2 * y[1] * y[0]])

    start, gaps = jnp.array([-1.0, 0.0, 0.0]), jnp.array([0.01, 0.02, 0.03, 0.05, 0.1, 0.2])
    value, steps, found = jax.jit(jax.vmap(lambda x: solve(fn, kind(1e-10, 0.0), start, x)))(gaps)
    assert jnp.all(found)
    assert jnp.max(steps) < 200
    np.testing.assert_allclose(value[:, :2], [[2, 1.2]] * 6, rtol=1e-8)


@pytest.mark.parametrize(
    ("solver", "low", "high"),
    [
        (dn.Anderson(1e-10, 0.0, history=2, growth=1.0), -10, 0.5),
        (dn.Broyden(1e-10, 0.0, history=5, growth=1.0), -3, 0.9),
    ],
    ids=["anderson", "broyden"],
)
def test_runs_of_plain_steps_that_stray_lead_back(solver, low, high):
    # Picard iteration diverges, and with little memory and no growth allowed extrapolations fail often.
    Qs = jnp.linalg.qr(jr.normal(jr.key(0), (8, 20, 20)))[0]
    Ws, bs = (Qs * jnp.linspace(low, high, 20)[None, None]) @ Qs.mT, jr.normal(jr.key(1), (8, 20))
    run = jax.jit(jax.vmap(lambda W, b: solve(lambda y, x: x[0] @ y + x[1], solver, 0 * b, (W, b))))
    value, steps, found = run(Ws, bs)
    assert jnp.all(found)
    assert jnp.max(steps) < 700
    np.testing.assert_allclose(jnp.einsum("bij,bj->bi", Ws, value) + bs, value, atol=1e-8)


@BOTH
def test_scale_and_dtype(kind):
    W, b = symmetric(20, 0.95, jr.key(0)), jr.normal(jr.key(1), (20,))
    for dtype, solver in ((jnp.float32, kind(1e-6, 0.0)), (jnp.float64, kind(1e-12, 0.0))):
        run = jax.jit(lambda W, b, s=solver: solve(lambda y, x: x[0] @ y + x[1], s, 0 * b, (W, b)))
        taken = []
        for scale in (1e-25, 1.0, 1e25):
            value, steps, found = run(W.astype(dtype), (scale * b).astype(dtype))
            assert found
            assert value.dtype == dtype
            taken.append(int(steps))
        assert max(taken) <= 1.2 * min(taken), taken


@BOTH
def test_out_of_steps_it_returns_the_best(kind):
    W, b = symmetric(50, 0.999, jr.key(0)), jr.normal(jr.key(1), (50,))
    fn = lambda y, _: W @ y + b
    value, _, found = solve(fn, kind(1e-12, 0.0), jnp.zeros(50), max_steps=12)
    assert not found
    assert jnp.linalg.norm(fn(value, None) - value) < 0.2 * jnp.linalg.norm(b)
    diverging, _, found = solve(lambda y, _: y**2 + 10, kind(1e-12, 0.0), jnp.ones(1), max_steps=50)
    assert not found
    assert jnp.all(jnp.isfinite(diverging))


@BOTH
def test_lanes_do_not_touch_each_other(kind):
    fn = lambda y, x: jnp.tanh(x[0] @ y + x[1])
    Ws = jnp.stack([symmetric(10, radius, jr.key(i)) for i, radius in enumerate((0.1, 0.9, 0.99))])
    bs = jr.normal(jr.key(9), (3, 10))
    together = jax.jit(jax.vmap(lambda W, b: solve(fn, kind(1e-12, 0.0), jnp.zeros(10), (W, b))))(Ws, bs)
    with_nan = jax.jit(jax.vmap(lambda W, b: solve(fn, kind(1e-12, 0.0), jnp.zeros(10), (W, b))))(
        Ws, bs.at[1].set(jnp.nan)
    )
    np.testing.assert_array_equal(together[0][::2], with_nan[0][::2])
    np.testing.assert_array_equal(with_nan[2], [True, False, True])


@pytest.mark.parametrize("adjoint", [dn.ImplicitAdjoint(), dn.UnrolledAdjoint()], ids=["implicit", "unrolled"])
@BOTH
def test_gradients_through_the_node(kind, adjoint):
    W, b = symmetric(6, 0.9, jr.key(0)), jr.normal(jr.key(1), (6,))
    node = dn.FixedPoint(lambda y, x: jnp.tanh(x[0] @ y + x[1]), kind(1e-11, 0.0), adjoint, max_steps=60)
    plain = dn.FixedPoint(lambda y, x: jnp.tanh(x[0] @ y + x[1]))
    loss = lambda x, node: jnp.sum(jnp.sin(node(x, y0=jnp.zeros(6))))
    ours, reference = (jax.jit(jax.grad(loss), static_argnums=1)((W, b), n) for n in (node, plain))
    for a, c in zip(ours, reference, strict=True):
        np.testing.assert_allclose(a, c, atol=1e-8)


def test_three_differences_of_a_symmetric_map_do_what_all_would():
    W, b = symmetric(60, 0.99, jr.key(0)), jr.normal(jr.key(1), (60,))
    steps = [int(solve(lambda y, _: W @ y + b, dn.Anderson(1e-9, 0.0, history=m), 0 * b)[1]) for m in (2, 3, 60)]
    assert steps[1] == steps[2] < 60
    assert steps[0] > 1.5 * steps[1]


@BOTH
def test_a_batch_in_one_loop_is_its_examples_alone(kind):
    """Two axes of a batch, one of them of the weights alone, and lanes that end at different steps or not at all."""
    Ws = jnp.stack([symmetric(10, radius, jr.key(i)) for i, radius in enumerate((0.1, 0.95, 3.0))])
    bs = jr.normal(jr.key(9), (2, 10)).at[1, 0].set(jnp.nan)
    node = dn.FixedPoint(lambda y, x: jnp.tanh(x[0] @ y) + x[1], kind(1e-10, 0.0), max_steps=25, throw=False)
    one = lambda W, b: node.solve((W, b), y0=jnp.zeros(10))
    together = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(Ws, bs)
    for i, W in enumerate(Ws):
        for j, b in enumerate(bs):
            alone, lane = one(W, b), jax.tree.map(lambda leaf, at=(i, j): leaf[at], together)
            assert lane.result == alone.result
            assert lane.stats["steps"] == alone.stats["steps"]
            np.testing.assert_allclose(lane.value, alone.value, rtol=1e-9, atol=1e-9)
    assert together.stats["steps"][0, 0] < together.stats["steps"][1, 0]


@BOTH
def test_the_node_does_what_optimistix_does(kind):
    W, b = symmetric(20, 0.9, jr.key(0)), jr.normal(jr.key(1), (20,))
    fn, solver = lambda y, x: x[0] @ y + x[1], kind(1e-11, 0.0)
    found = dn.FixedPoint(fn, solver, max_steps=100).solve((W, b), y0=0 * b)
    value, steps, _ = solve(fn, solver, 0 * b, (W, b))
    assert found.stats["steps"] == steps
    np.testing.assert_allclose(found.value, value, rtol=1e-12, atol=1e-12)


def test_maps_that_talk_to_other_lanes_or_to_the_host():
    """Their lanes go through JAX's own loop, which knows the name of the axis."""
    mean = lambda y, x: 0.5 * jnp.cos(y - jax.lax.pmean(y, "batch")) + x
    node = dn.FixedPoint(mean, dn.Anderson(), max_steps=50)
    x = jnp.array([[0.1], [0.7], [-2.0]])
    y = jax.vmap(lambda x: node(x, y0=jnp.zeros(1)), axis_name="batch")(x)
    np.testing.assert_allclose(y, 0.5 * jnp.cos(y - jnp.mean(y)) + x, atol=1e-8)

    seen = []

    def watched(y, x):
        jax.debug.callback(lambda _: seen.append(1), y)
        return jnp.cos(y) * x

    dn.FixedPoint(watched, dn.Anderson())(jnp.array([0.5]), y0=jnp.zeros(1)).block_until_ready()
    jax.effects_barrier()
    assert seen


@BOTH
def test_more_room_than_steps_is_not_taken(kind):
    W, b = symmetric(40, 0.5, jr.key(0)), jr.normal(jr.key(1), (40,))
    node = dn.FixedPoint(lambda y, x: x[0] @ y + x[1], kind(1e-10, 0.0, history=1000), max_steps=30)
    program = jax.jit(lambda W, b: node((W, b), y0=0 * b)).lower(W, b).as_text()
    assert "tensor<30x40x" in program
    assert "tensor<1000x40x" not in program


@BOTH
def test_a_lane_that_leaves_the_numbers_is_given_up_at_once(kind):
    node = dn.FixedPoint(lambda y, x: x * y * y + 1, kind(), throw=False)
    solution = jax.vmap(lambda x, y0: node.solve(x, y0=y0))(
        jnp.array([0.1, 1.0, jnp.nan], jnp.float32), jnp.array([[1.0], [1e25], [1.0]], jnp.float32)
    )
    ended = [jax.tree.map(lambda leaf, i=i: leaf[i], solution).result for i in range(3)]
    assert ended[0] == dn.RESULTS.successful
    assert ended[1] == dn.RESULTS.nonfinite
    assert np.max(solution.stats["steps"]) < 20


def test_a_batch_of_models_and_data_copies_neither():
    W, b = jnp.zeros((3, 50, 50)), jnp.zeros((40, 50))
    node = dn.FixedPoint(lambda y, x: jnp.tanh(x[0] @ y) + x[1], dn.Anderson(), throw=False)
    one = lambda W, b: node((W, b), y0=jnp.zeros(50))
    program = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None))).lower(W, b).as_text()
    assert "x50x50x" in program
    assert "tensor<3x40x50x50x" not in program
    assert "tensor<120x50x50x" not in program


def test_settings_are_checked():
    for name, value in (("history", 0), ("growth", 0.5)):
        with pytest.raises(ValueError, match=name):
            dn.Anderson(1e-6, 1e-6, **{name: value})  # pyright: ignore[reportArgumentType]  (wrong on purpose)
    with pytest.raises(ValueError, match="history"):
        dn.Broyden(1e-6, 1e-6, history=0)
