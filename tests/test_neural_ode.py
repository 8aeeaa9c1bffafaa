"""The NeuralODE node, beyond the check kit: controllers, solvers, adjoints, what it saves, and what it says when it fails."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import declarative as dn

from .helpers import tree_close
from .rows.core import WEIGHT, flow

Y0 = jnp.array([0.3, -0.5, 0.8, 0.1])
TIMES = jnp.array([0.0, 0.13, 0.5, 0.97, 1.0])
ADAPTIVE = dfx.PIDController(rtol=1e-5, atol=1e-5)


def gradient(node, ts=None):
    return jax.jit(jax.grad(lambda inputs: jnp.sum(jnp.sin(node(*inputs, ts=ts)))))((Y0, WEIGHT))


@pytest.mark.parametrize(
    "solver",
    [
        pytest.param(dn.Reversible(dfx.Bosh3()), marks=pytest.mark.full),
        pytest.param(dfx.ReversibleHeun(), marks=pytest.mark.full),
        dn.AsynchronousLeapfrog(),
    ],
    ids=["coupled", "reversible heun", "leapfrog"],
)
def test_adaptive_steps(solver):
    """The gradient of the steps as they were taken, the first of which was rejected; and their equations, at the times asked for too."""
    ode = lambda adjoint=None: dn.NeuralODE(flow, solver, ADAPTIVE, adjoint, dt0=0.3, max_steps=400)
    tree_close(gradient(ode(), TIMES), gradient(ode(dfx.DirectAdjoint()), TIMES), 1e-9)
    solution = ode().solve(dn.InitialValue(Y0, WEIGHT, TIMES))
    assert solution.result == dn.RESULTS.successful
    assert solution.stats["residual"] < 1e-13
    tree_close(solution.value, ode()(Y0, WEIGHT, ts=TIMES), 1e-14)
    tree_close(solution.value[0], Y0, 0)
    taken = np.asarray(solution.unknown.ts) < 1
    assert np.all(np.diff(np.asarray(solution.unknown.ts)[taken]) > 0)
    assert 5 < np.sum(taken) < int(solution.stats["steps"])  # some were rejected
    moved = eqx.tree_at(lambda y: y.ys, solution.unknown, solution.unknown.ys.at[2].add(1e-3))
    residual = ode().optimality(moved, dn.InitialValue(Y0, WEIGHT, TIMES)).ys
    assert np.flatnonzero(np.any(np.abs(np.asarray(residual)) > 1e-8, axis=1))[0] == 2


@pytest.mark.slow
def test_few_unequal_steps_are_no_drift():
    """An adaptive solve that begins with small steps and goes on with a few large ones, longer than the time between two anchors."""
    fields = 0.6 * jr.normal(jr.key(3), (100, 6, 6), jnp.float32)
    for rtol in (1e-2, 1e-3, 1e-4):
        controller = dfx.PIDController(rtol=rtol, atol=rtol)
        ode = dn.NeuralODE(lambda t, y, a: jnp.tanh(a @ y), None, controller, throw=False)
        gradients = jax.jit(jax.vmap(jax.grad(lambda a, ode=ode: jnp.sum(ode(jnp.ones(6, jnp.float32), a)))))(fields)
        assert np.isfinite(gradients).all()


def test_without_an_inverse_it_is_differentiated_directly_and_an_implicit_solver_works():
    exact = gradient(dn.NeuralODE(flow, None, dfx.PIDController(rtol=1e-10, atol=1e-10)))
    stiff = dn.NeuralODE(flow, dfx.Kvaerno3(), ADAPTIVE)
    assert stiff.modes == {"forward", "reverse", "higher-order"}
    tree_close(gradient(stiff), exact, 1e-4)
    solution = stiff.solve(dn.InitialValue(Y0, WEIGHT))
    assert solution.result == dn.RESULTS.successful
    assert solution.stats["residual"] < 1e-13


@pytest.mark.parametrize(
    "kind",
    [{"steps": 100}, pytest.param({"stepsize_controller": ADAPTIVE}, marks=pytest.mark.slow)],
    ids=["equal", "adaptive"],
)
def test_backsolve_is_close_and_reaches_what_a_field_closes_over(kind):
    """diffrax's own call leaves a closed-over array without a gradient."""
    ode = lambda weight, adjoint: dn.NeuralODE(lambda t, y, _: flow(t, y, weight), dfx.Heun(), adjoint=adjoint, **kind)
    value = lambda adjoint: lambda weight: jnp.sum(ode(weight, adjoint)(Y0))
    back, exact = (jax.grad(value(a))(WEIGHT) for a in (dfx.BacksolveAdjoint(), dfx.DirectAdjoint()))
    assert 1e-12 < jnp.max(jnp.abs(back - exact)) < 1e-4
    solution = ode(WEIGHT, dfx.BacksolveAdjoint()).solve(Y0)
    tree_close(solution.value, ode(WEIGHT, dfx.BacksolveAdjoint())(Y0), 1e-14)
    assert solution.stats["residual"] < 1e-13
    through = jax.grad(lambda weight: jnp.sum(ode(weight, dfx.BacksolveAdjoint()).solve(Y0).value))(WEIGHT)
    tree_close(through, back, 1e-12)


@pytest.mark.parametrize(
    "adjoint",
    [
        None,
        pytest.param(dfx.RecursiveCheckpointAdjoint(), marks=pytest.mark.full),
        pytest.param(dn.ReversibleAdjoint(on_drift="checkpoint", tolerance=1e-30), marks=pytest.mark.slow),
    ],
    ids=["default", "checkpoints", "fallback"],
)  # fmt: skip
def test_a_leaf_that_no_lane_changes_counts_once_a_lane(adjoint):
    """diffrax's checkpointed loop counts it once too often for each."""
    field = lambda t, y, a: (-a * jnp.sin(y[0]), -a * y[1])
    ode = dn.NeuralODE(field, dfx.ReversibleHeun() if adjoint else dfx.Tsit5(), adjoint=adjoint, steps=10)
    one = lambda x, a: sum(jnp.sum(y) for y in ode((x, jnp.array(1.0)), a))
    xs, a = jnp.array([0.1, 0.5, 2.0]), jnp.array(1.3)
    together = jax.jit(jax.grad(lambda a: jnp.sum(jax.vmap(lambda x: one(x, a))(xs))))(a)
    np.testing.assert_allclose(together, sum(jax.grad(one, 1)(x, a) for x in xs), rtol=1e-9)

    def member(weight, a):  # an ensemble: nothing but the field differs among the lanes
        field = lambda t, y, a: (-a * weight * jnp.sin(y[0]), -a * y[1])
        ode = dn.NeuralODE(field, dfx.ReversibleHeun() if adjoint else dfx.Tsit5(), adjoint=adjoint, steps=10)
        return sum(jnp.sum(y) for y in ode((jnp.array(0.7), jnp.array(1.0)), a))

    together = jax.jit(jax.grad(lambda a: jnp.sum(jax.vmap(lambda w: member(w, a))(xs))))(a)
    np.testing.assert_allclose(together, sum(jax.grad(member, 1)(w, a) for w in xs), rtol=1e-9)


def test_a_separable_system_and_time_that_runs_backwards():
    circle = dn.NeuralODE((lambda t, q, _: -q, lambda t, p, _: p), dn.Leapfrog(), steps=400, t1=2 * np.pi)
    tree_close(circle((jnp.ones(1), jnp.zeros(1))), (jnp.ones(1), jnp.zeros(1)), 1e-4)
    assert circle.solve((jnp.ones(1), jnp.zeros(1))).stats["residual"] < 1e-13
    there = dn.NeuralODE(flow, steps=300)(Y0, WEIGHT)
    back = dn.NeuralODE(flow, steps=300, t0=1.0, t1=0.0)
    tree_close(back(there, WEIGHT), Y0, 1e-7)
    solution = back.solve(dn.InitialValue(there, WEIGHT, TIMES[::-1]))
    assert solution.result == dn.RESULTS.successful
    assert solution.stats["residual"] < 1e-13


def test_failures_have_a_status_and_nan_where_asked_for():
    quiet = dn.NeuralODE(lambda t, y, _: y**2, None, ADAPTIVE, t1=0.9, throw=False, max_steps=200)
    start = jnp.array([[1.0], [2.0], [jnp.nan]])
    solution = jax.vmap(quiet.solve)(start)
    codes = [dn.RESULTS.successful, dn.RESULTS.ode_unfinished, dn.RESULTS.nonfinite_data]
    assert solution.result._value.tolist() == [int(code._value) for code in codes]
    value, slope = jax.vmap(jax.value_and_grad(lambda y: jnp.sum(quiet(y))))(start)
    np.testing.assert_allclose(value[0], 10, rtol=1e-3)
    np.testing.assert_allclose(slope[0], 100, rtol=1e-2)
    assert np.all(np.isnan(value[1:]))
    assert np.all(np.isnan(slope[1:]))
    off = dn.NeuralODE(lambda t, y, _: y**2, steps=50, t1=10.0, throw=False).solve(jnp.ones(1))
    assert off.result == dn.RESULTS.ode_nonfinite
    # It runs off in the last but one step: the halves of the coupled state cancel to zero, which is no solution.
    last = dn.NeuralODE(lambda t, y, _: y**2, steps=20, throw=False).solve(jnp.array(1.1))
    assert last.result == dn.RESULTS.ode_nonfinite
    assert np.isnan(last.value)
    for ts in (TIMES[::-1], 2 * TIMES, TIMES.at[1].set(jnp.nan)):
        assert quiet.solve(dn.InitialValue(jnp.ones(1), None, ts)).result == dn.RESULTS.bad_times
    with pytest.raises(dn.SolveError, match="not solved up to its end"):
        dn.NeuralODE(lambda t, y, _: y**2, None, ADAPTIVE, t1=2.0, max_steps=100)(jnp.ones(1))


def test_a_gradient_that_drifted_is_nan_or_an_error_as_the_policy_says():
    """The field contracts by e^60 between two anchors, which no reversal can undo."""
    decay = lambda t, y, _: -600 * jnp.tanh(y - jnp.sin(5 * t))
    options = {"solver": dn.Reversible(dfx.Heun(), coupling=0.5), "steps": 2000}
    quiet = dn.NeuralODE(decay, throw=False, **options)
    assert np.isfinite(quiet(jnp.ones(2))).all()
    assert np.isnan(jax.grad(lambda y: jnp.sum(quiet(y)))(jnp.ones(2))).all()
    loud = dn.NeuralODE(decay, **options)
    with pytest.raises(Exception, match="could not reconstruct"):
        jax.block_until_ready(eqx.filter_jit(jax.grad(lambda y: jnp.sum(loud(y))))(jnp.ones(2)))


def test_dtype_and_numbers():
    ode = dn.NeuralODE(lambda t, y, _: -y * t, steps=100, t1=2.0)
    np.testing.assert_allclose(ode(1.0), np.exp(-2), rtol=1e-3)
    assert ode(jnp.ones(2, jnp.float32), ts=np.array([0.5, 1.0])).dtype == jnp.float32
    tree_close(ode(jnp.ones(2), None, [2.0])[0], ode(jnp.ones(2)), 1e-12)
    for steps in (1, 3, 7, 4999):  # equal steps of float32 that are no more and no fewer
        solution = dn.NeuralODE(lambda t, y, _: -y, dfx.Euler(), steps=steps, t0=0.3, t1=1.1).solve(
            jnp.ones(1, jnp.float32)
        )
        assert solution.value.dtype == jnp.float32
        assert solution.stats["steps"] == steps
        np.testing.assert_allclose(solution.value, (1 - 0.8 / steps) ** steps, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dn.NeuralODE(flow), "give one"),
        (lambda: dn.NeuralODE(flow, None, ADAPTIVE, steps=3), "give one"),
        (lambda: dn.NeuralODE(flow, steps=0), "positive integer"),
        (lambda: dn.NeuralODE(flow, steps=3, dt0=0.1), "first step"),
        (lambda: dn.NeuralODE(flow, steps=3, t1=0.0), "must differ"),
        (lambda: dn.NeuralODE((flow, flow, flow), steps=3), "pair"),
        (lambda: dn.NeuralODE(flow, steps=3, adjoint=dfx.ImplicitAdjoint()), "steady state"),
        (lambda: dn.NeuralODE(flow, dfx.Heun(), steps=3, adjoint=dn.ReversibleAdjoint())(Y0, WEIGHT), "Reversible\\("),
        (lambda: dn.NeuralODE(lambda t, y, _: y[:2], steps=3)(Y0), "shape and dtype"),
        (lambda: dn.NeuralODE(flow, steps=3)(jnp.arange(4), WEIGHT), "floating-point"),
        (lambda: dn.NeuralODE(flow, steps=3)(Y0, WEIGHT, ts=jnp.ones((2, 2))), "vector of times"),
        (lambda: dn.NeuralODE(flow, steps=3).solve(Y0, y0=Y0), "takes no guess"),
        (lambda: dn.NeuralODE((flow, flow), dn.Leapfrog(), steps=3)(Y0), "y0 = \\(p, q\\)"),
        (lambda: dn.NeuralODE((flow, flow), steps=3), "separable"),
        (lambda: dn.NeuralODE(flow, dn.Leapfrog(), steps=3), "separable"),
        (lambda: dn.NeuralODE(jnp.tanh, steps=3)(Y0), "calls its field as field"),
        (lambda: dn.NeuralODE(lambda t, y, _: 1.0, steps=3)(Y0), "shape and dtype"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
