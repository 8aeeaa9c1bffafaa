"""What happens to the elements of a batch that cannot be solved, and to their neighbours."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import declarative as dn

# An eager call raises a SolveError; out of a compiled function JAX raises one of these, with the same message in it.
RAISED = (dn.SolveError, jax.errors.JaxRuntimeError, ValueError)
BATCH, N = 64, 5
GONE, STUCK = 17, 40
KEEP = np.setdiff1d(np.arange(BATCH), [GONE, STUCK])


def _root(weight, **policy):
    # tanh is bounded: no root for |x| > 1, and Newton runs off.
    node = dn.Root(lambda y, x: jnp.tanh(weight @ y) - x, max_steps=30, **policy)
    return lambda x: node(x, y0=jnp.zeros(N))


def _fixed_point(weight, **policy):
    # A large x makes the map expand: it cycles for ever.
    node = dn.FixedPoint(
        lambda y, x: jnp.sin(jnp.where(jnp.abs(x[0]) > 5, 30 * x[0], 0) * y) + 0.3 * jnp.tanh(weight @ y) + x,
        max_steps=60,
        **policy,
    )
    return lambda x: node(x, y0=jnp.zeros(N))


def _argmin(weight, **policy):
    # exp(-y) has no minimum; the others are strongly convex.
    def objective(y, x):
        runaway = jnp.abs(x) > 5
        return jnp.sum(jnp.where(runaway, jnp.exp(-y), (y - x) ** 2)) + 0.1 * jnp.sum(
            jnp.where(runaway, 0, jnp.sin(weight @ y))
        )

    node = dn.Argmin(objective, max_steps=40, **policy)
    return lambda x: node(x, y0=jnp.zeros(N))


def _entmax(alpha, **policy):
    # Two leading scores settle in five passes, a row that is spread out needs a sixth. The shared parameter is alpha.
    return dn.Entmax(alpha, max_steps=5, **policy)


MAKERS = {"Root": _root, "FixedPoint": _fixed_point, "Argmin": _argmin, "Entmax": _entmax}
WEIGHT = jnp.eye(N) + 0.1 * jr.normal(jr.key(0), (N, N))


def batches(name):
    if name == "Entmax":
        good = jnp.zeros((BATCH, N)).at[:, 1].set(jnp.linspace(1, 1.2, BATCH)).at[:, 3].set(1.0)
        good = good + 0.01 * jr.normal(jr.key(1), (BATCH, N))
        weight, stuck = jnp.array(1.7), jnp.array([0.9, 0.31, 0.123, 0.77, 0.01])
    else:
        good = 0.5 * jnp.tanh(jr.normal(jr.key(1), (BATCH, N)))
        weight, stuck = WEIGHT, jnp.full(N, 7.0)
    return weight, good, good.at[GONE, 2].set(jnp.nan).at[STUCK].set(stuck)


def per_element(name, weight, lanes, **policy):
    out = jax.vmap(MAKERS[name](weight, throw=False, **policy))(lanes)
    return jnp.sum(jnp.cos(out) * jnp.arange(1.0, N + 1)[None], axis=1)


@pytest.mark.parametrize("name", MAKERS)
def test_two_bad_elements_leave_sixty_two_bit_identical(name):
    weight, good, bad = batches(name)

    @jax.jit
    def gradients(weight, lanes):
        others = lambda weight, lanes: jnp.sum(per_element(name, weight, lanes, on_failure="zero")[KEEP])
        own = lambda lane: per_element(name, weight, lane[None], on_failure="zero")[0]
        return jax.grad(others, (0, 1))(weight, lanes), jax.vmap(jax.grad(own))(lanes)

    (clean_weight, clean_lanes), clean_own = gradients(weight, good)
    (weight_gradient, lanes_gradient), own = gradients(weight, bad)
    assert np.all(np.asarray(clean_weight) == np.asarray(weight_gradient))
    assert np.all(np.asarray(clean_lanes)[KEEP] == np.asarray(lanes_gradient)[KEEP])
    assert np.all(np.asarray(clean_own)[KEEP] == np.asarray(own)[KEEP])
    assert np.all(np.asarray(own)[[GONE, STUCK]] == 0)
    assert np.any(np.asarray(clean_own)[KEEP] != 0)
    # Summed over all 64 elements too: the failed ones add exactly zero to the shared parameters.
    everything = jax.jit(jax.grad(lambda w: jnp.sum(per_element(name, w, bad, on_failure="zero"))))(weight)
    np.testing.assert_allclose(np.asarray(everything), np.asarray(weight_gradient), rtol=1e-12, atol=1e-14)


# The expensive nodes share the code of the cheap ones here: they belong to the exhaustive tier.
SAMPLE = ["FixedPoint", "Entmax", *(pytest.param(name, marks=pytest.mark.full) for name in ("Root", "Argmin"))]


@pytest.mark.parametrize("name", SAMPLE)
def test_nan_policy_poisons_the_failed_elements_only(name):
    weight, _, bad = batches(name)
    values = per_element(name, weight, bad)
    own = jax.jit(jax.vmap(jax.grad(lambda lane: per_element(name, weight, lane[None])[0])))(bad)
    for out in (values, own[:, 0]):
        assert np.all(np.isnan(np.asarray(out)[[GONE, STUCK]]))
        assert np.all(np.isfinite(np.asarray(out)[KEEP]))


@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_throw_names_both_elements(name, compiled):
    weight, good, bad = batches(name)
    call = jax.vmap(MAKERS[name](weight, throw=True))
    call = jax.jit(call) if compiled else call
    jax.block_until_ready(call(good))
    with pytest.raises(RAISED) as caught:
        jax.block_until_ready(call(bad))
    message = str(caught.value)
    assert f"{name} failed for 2 of 64 elements" in message
    assert "element 17: The data hold NaN" in message
    assert "element 40: " in message


@pytest.mark.parametrize("name", ["Root", "FixedPoint", pytest.param("Argmin", marks=pytest.mark.full)])
def test_health_tells_forward_failures(name):
    weight, _, bad = batches(name)
    loss = lambda weight: jnp.sum(per_element(name, weight, bad, on_failure="zero"))
    _, _, health = jax.jit(dn.value_and_grad_with_health(loss))(weight)
    (label,) = health.solves
    assert label.startswith(name)
    assert health.solves[label].shape == (BATCH,)
    assert np.flatnonzero(np.asarray(health.forward_failures[label])).tolist() == [GONE, STUCK]
    assert np.asarray(health.backward_failures[label]).sum() == 0
    text = health.report()
    assert "forward, element 17: The data hold NaN" in text
    assert "forward, element 40" in text


def test_health_tells_forward_from_backward():
    """Element 1 has no solution; element 3 has one at which dF/dy is singular; the others are fine."""
    node = dn.implicit(lambda y, x: y**2 - x, policy=dn.Policy(throw=False))(lambda x: jnp.sqrt(jnp.maximum(x, 0)))
    x = jnp.array([4.0, -1.0, 9.0, 0.0])
    value, grads, health = dn.value_and_grad_with_health(lambda x: jnp.sum(jnp.nan_to_num(jax.vmap(node)(x))))(x)
    assert np.asarray(health.forward_failures["ImplicitFunction #0"]).tolist() == [0, 1, 0, 0]
    assert np.asarray(health.backward_failures["ImplicitFunction #0"]).tolist() == [0, 0, 0, 1]
    assert "backward, element 3: The backward linear solve failed: dF/dy is singular" in health.report()
    assert np.isnan(np.asarray(grads)[3])
    np.testing.assert_allclose(np.asarray(grads)[[0, 2]], [0.25, 1 / 6])
    _, _, total = dn.value_and_grad_with_health(
        lambda x: jnp.sum(jnp.nan_to_num(jax.vmap(node)(x))), per_element=False
    )(x)
    assert (total.solves, total.forward_failures, total.backward_failures) == (4, 1, 1)


def test_a_singular_backward_solve_raises_under_throw():
    node = dn.implicit(lambda y, x: y**2 - x)(jnp.sqrt)
    with pytest.raises(RAISED, match="linear solve of the gradient failed"):
        jax.block_until_ready(jax.grad(node)(0.0))
    with pytest.raises(RAISED, match="element 2: The backward linear solve failed"):
        jax.block_until_ready(jax.jit(jax.vmap(jax.grad(node)))(jnp.array([1.0, 4.0, 0.0])))
    with pytest.raises(RAISED, match="linear solve of the gradient failed"):
        jax.block_until_ready(jax.jvp(node, (0.0,), (1.0,)))


def test_a_finite_but_wrong_backward_solve_is_reported():
    """An ill-posed float32 system: LU gives numbers, and its residual says that they mean nothing."""
    hilbert = jnp.asarray(1 / (np.arange(12)[:, None] + np.arange(12)[None] + 1.0), jnp.float32)
    node = dn.implicit(lambda y, b: hilbert @ (y - b), policy=dn.Policy(throw=False))(lambda b: b)
    _, grads, health = dn.value_and_grad_with_health(lambda b: node(b) @ jnp.cos(jnp.arange(12, dtype=jnp.float32)))(
        jnp.ones(12, jnp.float32)
    )
    assert health.backward_failures["ImplicitFunction #0"] == 1
    assert np.all(np.isnan(np.asarray(grads)))


def test_health_in_nested_batches_scans_and_twice_the_same_node():
    node = dn.FixedPoint(lambda y, x: 0.5 * jnp.tanh(y) + x, throw=False)
    call = lambda x: node(x, y0=0.0)

    def loss(x):
        first = jnp.sum(jax.vmap(jax.vmap(call))(x))
        carried, _ = jax.lax.scan(lambda c, _: (call(c), None), x[0, 0], None, length=5)
        return first + carried + call(x[1, 2])

    _, _, health = jax.jit(dn.value_and_grad_with_health(loss))(jnp.ones((2, 3)))
    shapes = {name: (solves.shape, float(solves.sum())) for name, solves in health.solves.items()}
    assert shapes == {"FixedPoint #0": ((2, 3), 6), "FixedPoint #1": ((), 5), "FixedPoint #2": ((), 1)}
    # Inside a jitted function that was traced before without anyone listening.
    inner = jax.jit(lambda x: jnp.sum(jax.vmap(call)(x)))
    inner(jnp.ones(4))
    _, _, health = dn.value_and_grad_with_health(inner)(jnp.ones(4))
    assert health.solves["FixedPoint #0"].shape == (4,)
    # And vmapped as a whole: one report an example.
    _, _, health = jax.vmap(dn.value_and_grad_with_health(call))(jnp.ones(3))
    assert health.solves["FixedPoint #0"].shape == (3,)


def test_health_equals_the_plain_gradient():
    weight, good, _ = batches("Root")
    loss = lambda weight: jnp.sum(per_element("Root", weight, good))
    value, grads, _ = jax.jit(dn.value_and_grad_with_health(loss))(weight)
    want = jax.jit(jax.value_and_grad(loss))(weight)
    np.testing.assert_allclose(np.asarray(value), np.asarray(want[0]), rtol=1e-14)
    np.testing.assert_allclose(np.asarray(grads), np.asarray(want[1]), rtol=1e-12)


def test_nan_through_an_upstream_layer():
    """What docs/failure.md says: the node's own cotangent is zero, but 0 * NaN upstream is NaN again, so mask before it."""
    weight, good, bad = batches("Root")
    node = MAKERS["Root"](weight, throw=False, on_failure="zero")

    def loss(slope, lanes):
        return jnp.sum(jax.vmap(lambda x: node(0.9 * jnp.sin(slope * x)))(lanes))

    assert np.isnan(jax.grad(loss)(1.0, bad.at[STUCK].set(good[STUCK])))
    fine = jnp.all(jnp.isfinite(bad), axis=1, keepdims=True) & (jnp.abs(bad) < 5)
    assert np.isfinite(jax.grad(loss)(1.0, jnp.where(fine, bad, 0.0)))


def test_solve_returns_the_last_iterate_and_reports():
    node = dn.FixedPoint(lambda y, x: y + x, max_steps=7)
    solution = node.solve(1.0, y0=0.0)
    assert solution.value == 7
    assert solution.result == dn.RESULTS.nonlinear_max_steps_reached
    assert "took `max_steps` steps" in solution.report()
    assert dn.FixedPoint(lambda y, x: y + x, max_steps=7, throw=False, on_failure="zero")(1.0, y0=0.0) == 7
    assert dn.FixedPoint(lambda y, x: y + x, throw=False, on_failure="zero")(jnp.nan, y0=0.0) == 0


@pytest.mark.parametrize("adjoint", [dn.UnrolledAdjoint(), dn.NeumannAdjoint(5)], ids=lambda a: type(a).__name__)
def test_policies_hold_under_the_other_adjoints(adjoint):
    make = lambda on_failure: dn.FixedPoint(
        lambda y, x: 0.5 * jnp.tanh(y) + x, adjoint=adjoint, throw=False, on_failure=on_failure, max_steps=80
    )
    x = jnp.array([0.3, jnp.nan, -0.4])
    gradient = lambda on_failure: np.asarray(
        jax.grad(lambda x: jnp.sum(jax.vmap(lambda x: make(on_failure)(x, y0=0.0))(x)))(x)
    )
    assert np.isnan(gradient("nan")[1])
    assert np.all(np.isfinite(gradient("nan")[[0, 2]]))
    assert gradient("zero")[1] == 0
    assert np.all(gradient("zero")[[0, 2]] == gradient("nan")[[0, 2]])
