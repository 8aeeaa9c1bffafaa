"""Reversible solvers and `ReversibleAdjoint`, held against autodiff of the same discretisation."""

# Every solve here saves something, and some arguments are wrong on purpose.
# pyright: reportOptionalSubscript=false, reportOptionalIterable=false, reportOptionalMemberAccess=false
# pyright: reportOptionalOperand=false, reportArgumentType=false

import warnings

import diffrax as dfx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest

import declarative as dn

CHECKPOINT = dfx.RecursiveCheckpointAdjoint()
HEUN = dfx.ReversibleHeun()
FIXED = dfx.ConstantStepSize()
ADAPTIVE = dfx.PIDController(rtol=1e-4, atol=1e-6)
PENDULUM = (dfx.ODETerm(lambda t, q, k: -k * jnp.sin(q)), dfx.ODETerm(lambda t, p, k: p * jnp.cos(t)))


def spread(tree):
    """A scalar that every entry matters to, differently. Places that were not filled hold inf."""
    leaves = [jnp.where(jnp.isfinite(leaf), leaf, 0) for leaf in jtu.tree_leaves(tree)]
    return sum(
        jnp.sum(jnp.sin(leaf) * jnp.arange(1, leaf.size + 1, dtype=leaf.dtype).reshape(leaf.shape)) for leaf in leaves
    )


def difference(a, b):
    """The largest difference over all leaves, each relative to its own largest entry."""
    pairs = zip(jtu.tree_leaves(a), jtu.tree_leaves(b), strict=True)
    return max(float(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y))) for x, y in pairs)


def solve(x, solver, adjoint, controller=FIXED, dt0=0.07, saveat=None, t1=1.0, max_steps=256, **kwargs):
    """A field that closes over a matrix, takes args (one of them not an array), and depends on time; the state is a pytree."""
    matrix, y0, scale = x

    def field(t, y, args):
        scale, act = args
        return {"a": act(matrix @ y["a"]) * y["b"] * scale, "b": jnp.cos(t) - y["b"] * jnp.sum(y["a"])}

    return dfx.diffeqsolve(
        dfx.ODETerm(field), solver, 0.0, t1, dt0, y0, (scale, jnp.tanh), adjoint=adjoint, stepsize_controller=controller,
        saveat=dfx.SaveAt(t1=True) if saveat is None else saveat, max_steps=max_steps, **kwargs,
    )  # fmt: skip


def data(dtype=jnp.float64):
    matrix = jr.normal(jr.key(0), (2, 2), dtype)
    return matrix, {"a": jnp.array([0.3, -0.5], dtype), "b": jnp.array(1.0, dtype)}, jnp.array(1.3, dtype)


def gradients(x, solver, adjoint=None, reference=CHECKPOINT, **kwargs):
    adjoint = dn.ReversibleAdjoint() if adjoint is None else adjoint
    return [jax.jit(jax.grad(lambda x, a=a: spread(solve(x, solver, a, **kwargs).ys)))(x) for a in (adjoint, reference)]


TIMES = dfx.SaveAt(ts=jnp.array([0.0, 0.11, 0.12, 0.5, 1.0]), t1=True)
STEPS = dfx.SaveAt(t0=True, t1=True, steps=3)
FUNCTION = dfx.SaveAt(ts=jnp.array([0.2, 0.7]), steps=True, fn=lambda t, y, args: (y["a"] * t * args[0], y["b"] ** 2))
PARTS = dfx.SaveAt(subs={"x": dfx.SubSaveAt(ts=jnp.array([0.2, 0.4])), "z": (dfx.SubSaveAt(t1=True, steps=2), None)})
CASES = {
    "heun of diffrax": (dfx.ReversibleHeun(), FIXED, None),
    "heun of diffrax, adaptive, times": (dfx.ReversibleHeun(), ADAPTIVE, TIMES),
    "coupled heun, every third step": (dn.Reversible(dfx.Heun(), 0.99), FIXED, STEPS),
    "asynchronous leapfrog": (dn.AsynchronousLeapfrog(), FIXED, None),
}
MORE = {
    "heun of diffrax, every second step": (dfx.ReversibleHeun(), FIXED, dfx.SaveAt(steps=2)),
    "coupled tsit5, adaptive, function": (dn.Reversible(dfx.Tsit5(), 0.99), ADAPTIVE, FUNCTION),
    "coupled euler, function": (dn.Reversible(dfx.Euler(), 0.99), FIXED, FUNCTION),
    "coupled rk4, times": (dn.Reversible(dn.RungeKutta4(), 0.99), FIXED, TIMES),
    "coupled dopri5, adaptive": (dn.Reversible(dfx.Dopri5(), 0.9), ADAPTIVE, None),
    "coupled bosh3, adaptive, steps": (dn.Reversible(dfx.Bosh3(), 0.9), ADAPTIVE, STEPS),
    "damped leapfrog, adaptive, times": (dn.AsynchronousLeapfrog(0.95), ADAPTIVE, TIMES),
    "parts": (dfx.ReversibleHeun(), FIXED, PARTS),
    "step to": (dn.Reversible(dfx.Midpoint(), 0.9), dfx.StepTo(jnp.array([0, 0.1, 0.3, 0.7, 1.0])), TIMES),
}
SWEEP = [*CASES, *(pytest.param(name, marks=pytest.mark.full) for name in MORE)]


@pytest.mark.parametrize("name", SWEEP)
def test_gradient_is_that_of_the_discretisation(name):
    solver, controller, saveat = (CASES | MORE)[name]
    dt0 = 0.07 if controller is FIXED else None
    ours, reference = gradients(data(), solver, controller=controller, saveat=saveat, dt0=dt0)
    assert difference(ours, reference) < 1e-10


@pytest.mark.parametrize("solver", [dfx.SemiImplicitEuler(), dn.Leapfrog()], ids=["euler", "leapfrog"])
def test_separable_systems(solver):
    def loss(x, adjoint):
        y0, k = x
        saveat = dfx.SaveAt(ts=jnp.array([0.25, 0.4]), t1=True)
        return spread(dfx.diffeqsolve(PENDULUM, solver, 0.0, 1.0, 0.1, y0, k, adjoint=adjoint, saveat=saveat).ys)

    x = ((jnp.array([0.3, 0.2]), jnp.array([0.1, 0.7])), jnp.array(2.0))
    ours, reference = (jax.jit(jax.grad(loss), static_argnums=1)(x, a) for a in (dn.ReversibleAdjoint(), CHECKPOINT))
    assert difference(ours, reference) < 1e-10


def test_leapfrog_keeps_the_energy():
    pendulum = (dfx.ODETerm(lambda t, q, k: -jnp.sin(q)), dfx.ODETerm(lambda t, p, k: p))
    y0 = (jnp.array(0.0), jnp.array(2.0))
    saveat = dfx.SaveAt(steps=True)
    solution = dfx.diffeqsolve(pendulum, dn.Leapfrog(), 0.0, 200.0, 0.1, y0, saveat=saveat, max_steps=2000)
    assert solution.ys is not None
    p, q = solution.ys
    energy = 0.5 * p**2 - jnp.cos(q)
    assert jnp.max(jnp.abs(energy + jnp.cos(2.0))) < 5e-3  # bounded: no drift over 30 periods


@pytest.mark.parametrize("adaptive", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_noise(adaptive):
    # Adaptive steps are the same ones only if the order of the error is that of the noise.
    path = dfx.VirtualBrownianTree(0.0, 1.0, 1e-3, (2,), jr.key(3))
    controller = dfx.PIDController(rtol=1e-2, atol=1e-2) if adaptive else FIXED
    solver = dn.Reversible(dfx.Heun(), 0.99) if adaptive else dfx.ReversibleHeun()

    def loss(x, adjoint):
        y0, a = x
        noise = dfx.ControlTerm(lambda t, y, a: jnp.diag(a * jnp.sin(y)), path)
        terms = dfx.MultiTerm(dfx.ODETerm(lambda t, y, a: -a * y), noise)
        sol = dfx.diffeqsolve(terms, solver, 0.0, 1.0, 0.05, y0, a, adjoint=adjoint, stepsize_controller=controller)
        return spread(sol.ys)

    x = (jnp.array([1.0, 2.0]), jnp.array([0.5, 0.3]))
    ours, reference = (jax.jit(jax.grad(loss), static_argnums=1)(x, a) for a in (dn.ReversibleAdjoint(), CHECKPOINT))
    assert difference(ours, reference) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("solver", [dfx.ReversibleHeun(), dn.Reversible(dfx.Heun(), 0.99)], ids=["heun", "coupled"])
def test_a_control_that_is_learnt(solver):
    def loss(x, adjoint):
        y0, values, matrix = x
        control = dfx.LinearInterpolation(jnp.linspace(0, 1, 5), values)
        term = dfx.ControlTerm(lambda t, y, _: jnp.tanh(matrix * y[:, None]), control)
        return spread(dfx.diffeqsolve(term, solver, 0.0, 1.0, 0.05, y0, adjoint=adjoint).ys)

    x = (jnp.array([1.0, 2.0]), jr.normal(jr.key(1), (5, 3)), jnp.ones((2, 3)))
    ours, reference = (jax.jit(jax.grad(loss), static_argnums=1)(x, a) for a in (dn.ReversibleAdjoint(), CHECKPOINT))
    assert difference(ours, reference) < 1e-10


def lane(matrix, y, adjoint):
    solver = dn.Reversible(dfx.Bosh3(), 0.95)
    term = dfx.ODETerm(lambda t, y, _: jnp.tanh(matrix @ y) * jnp.sum(y**2))
    saveat = dfx.SaveAt(ts=jnp.array([0.2, 0.7, 1.0]))
    return dfx.diffeqsolve(
        term, solver, 0.0, 1.0, None, y, adjoint=adjoint, saveat=saveat, stepsize_controller=ADAPTIVE, max_steps=64
    ).ys  # fmt: skip


@pytest.mark.slow
def test_lanes_with_steps_of_their_own():
    matrix, ys = jr.normal(jr.key(0), (2, 2)), jnp.array([[0.1, 0.2], [2.0, -3.0], [1e-3, 0.0]])
    one = jax.jit(jax.grad(lambda matrix, y: spread(lane(matrix, y, dn.ReversibleAdjoint())), (0, 1)))
    each = [one(matrix, y) for y in ys]
    of_matrix, of_ys = jax.jit(jax.vmap(one, (None, 0)))(matrix, ys)
    assert difference((of_matrix, of_ys), jtu.tree_map(lambda *leaves: jnp.stack(leaves), *each)) < 1e-10

    def total(matrix, ys):
        return sum(spread(y) for y in jax.vmap(lambda y: lane(matrix, y, dn.ReversibleAdjoint()))(ys))

    both = jax.jit(jax.grad(total, (0, 1)))(matrix, ys)
    assert difference(both, (jnp.sum(of_matrix, 0), of_ys)) < 1e-10


@pytest.mark.slow
def test_odd_solves():
    backwards = dict(t1=-1.0, dt0=-0.07, saveat=dfx.SaveAt(ts=jnp.array([0.0, -0.3, -1.0])))
    for odd in (
        backwards,
        dict(t1=0.0, saveat=dfx.SaveAt(ts=jnp.zeros(2), t0=True, t1=True)),  # no step
        dict(max_steps=5, throw=False, saveat=dfx.SaveAt(ts=jnp.array([0.1, 0.9]), t1=True)),  # stopped on the way
    ):
        ours, reference = gradients(data(), dfx.ReversibleHeun(), **odd)
        assert (
            difference(ours[:2], reference[:2]) < 1e-10
            if odd.get("t1") != 0.0
            else difference(ours[1], reference[1]) < 1e-10
        )


def test_float32():
    with jax.enable_x64(False):
        ours, reference = gradients(data(jnp.float32), dn.Reversible(dfx.Heun(), 0.99))
    assert all(leaf.dtype == jnp.float32 for leaf in jtu.tree_leaves(ours))
    assert difference(ours, reference) < 1e-5


ORDERS = {
    "euler": (dn.Reversible(dfx.Euler(), 0.5), 1),
    "heun": (dn.Reversible(dfx.Heun(), 0.9), 2),
    "midpoint": (dn.Reversible(dfx.Midpoint(), 0.9), 2),
    "rk4": (dn.Reversible(dn.RungeKutta4(), 0.9), 4),
    "tsit5": (dn.Reversible(dfx.Tsit5(), 0.9), 5),
    "dopri5": (dn.Reversible(dfx.Dopri5(), 0.5), 5),
    "plain rk4": (dn.RungeKutta4(), 4),
    "asynchronous leapfrog": (dn.AsynchronousLeapfrog(), 2),
}


@pytest.mark.parametrize("name", ORDERS)
def test_order(name):
    # Van der Pol's oscillator, at steps between the range where higher terms still show and that of rounding.
    solver, order = ORDERS[name]
    term = dfx.ODETerm(lambda t, y, _: jnp.stack([y[1], (1 - y[0] ** 2) * y[1] - y[0]]))

    def end(solver, dt):
        return dfx.diffeqsolve(term, solver, 0.0, 3.0, dt, jnp.array([1.0, 0.5]), max_steps=None).ys[0]

    steps = np.array([320, 400, 500, 640])
    exact = end(dfx.Dopri8(), 1e-3)
    errors = [float(jnp.linalg.norm(end(solver, 3.0 / n) - exact)) for n in steps]
    assert abs(np.polyfit(np.log(3.0 / steps), np.log(errors), 1)[0] - order) < 0.1


def test_dense_output_has_the_order_of_the_solver():
    ts = jnp.linspace(0.05, 1.95, 37)

    def error(solver, dt):
        saveat = dfx.SaveAt(ts=ts)
        ys = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, _: -y * jnp.cos(t)), solver, 0.0, 2.0, dt, jnp.array(1.0), saveat=saveat
        ).ys
        return float(jnp.max(jnp.abs(ys - jnp.exp(-jnp.sin(ts)))))

    solver = dn.Reversible(dfx.Tsit5(), 0.99)
    assert error(solver, 0.1) / error(solver, 0.05) > 2**3.7


def test_memory_does_not_grow_with_the_steps():
    def temporary(adjoint, steps, controller=FIXED):
        loss = lambda x: spread(
            solve(x, dfx.ReversibleHeun(), adjoint, controller, dt0=1.0 / steps, max_steps=steps + 1).ys
        )
        return jax.jit(jax.grad(loss)).lower(data()).compile().memory_analysis().temp_size_in_bytes

    ours = [temporary(dn.ReversibleAdjoint(), n) for n in (100, 10_000)]
    assert abs(ours[1] - ours[0]) <= 0.05 * ours[0]
    adaptive = [temporary(dn.ReversibleAdjoint(), n, ADAPTIVE) for n in (100, 10_000)]
    assert adaptive[1] - adaptive[0] <= 1.05 * 8 * 9_900  # one float64 a step
    assert temporary(CHECKPOINT, 10_000) > 4 * ours[1]


def test_one_evaluation_a_step():
    # What makes reversible Heun worth having: one evaluation a step in each direction, and one at either end.
    count = 0

    def field(t, y, args):
        jax.debug.callback(tick)
        return -y * args

    def tick():
        nonlocal count
        count += 1

    def loss(y, adjoint):
        return dfx.diffeqsolve(dfx.ODETerm(field), dfx.ReversibleHeun(), 0.0, 1.0, 0.05, y, 2.0, adjoint=adjoint).ys[0]

    jax.block_until_ready(jax.jit(jax.grad(loss), static_argnums=1)(jnp.array(1.0), dn.ReversibleAdjoint()))
    jax.effects_barrier()
    assert count <= 2 * 20 + 4


def contracting(adjoint, coupling=0.5, rate=1.0):
    """A state that is forgotten: reversal fails, and the nonlinear read-out of the parameter's effect needs it."""
    solver = dn.Reversible(dfx.Heun(), coupling)

    def loss(p):
        term = dfx.ODETerm(lambda t, y, p: jnp.tanh(p @ y) * rate - y)
        return jnp.sum(
            dfx.diffeqsolve(term, solver, 0.0, 10.0, 0.02, jnp.array([0.5, 1.0]), p, adjoint=adjoint).ys ** 2
        )

    return loss


MATRIX = jnp.array([[1.5, -2.0], [2.0, 1.0]])


def test_drift_is_never_silent():
    with pytest.raises(Exception, match="could not reconstruct"):
        jax.block_until_ready(jax.jit(jax.grad(contracting(dn.ReversibleAdjoint())))(MATRIX))
    assert jnp.all(jnp.isnan(jax.jit(jax.grad(contracting(dn.ReversibleAdjoint(on_drift="nan"))))(MATRIX)))
    exact = jax.jit(jax.grad(contracting(CHECKPOINT)))(MATRIX)
    again = jax.jit(jax.grad(contracting(dn.ReversibleAdjoint(on_drift="checkpoint"))))(MATRIX)
    assert difference(again, exact) < 1e-12
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrong = jax.block_until_ready(jax.jit(jax.grad(contracting(dn.ReversibleAdjoint(on_drift="warn"))))(MATRIX))
        jax.effects_barrier()
    assert any("could not reconstruct" in str(w.message) for w in caught)
    assert difference(wrong, exact) > 1e-3
    # The same horizon with the coupling that it bears.
    fine = jax.jit(jax.grad(contracting(dn.ReversibleAdjoint(), "auto")))(MATRIX)
    same = jax.jit(jax.grad(contracting(CHECKPOINT, dn.coupling_for(500))))(MATRIX)
    assert difference(fine, same) < 1e-8


def test_rounding_grows_as_predicted():
    def error(coupling, steps):
        adjoint = dn.ReversibleAdjoint(anchors=0, report=True)
        term = dfx.ODETerm(lambda t, y, _: jnp.sin(y[::-1]))
        sol = dfx.diffeqsolve(
            term, dn.Reversible(dfx.Heun(), coupling), 0.0, 2.0, 2.0 / steps, jnp.array([0.4, 1.0]), adjoint=adjoint
        )
        return float(sol.stats["round_trip"][0])

    # lambda^-N: from 100 to 200 steps of coupling 0.9 by 0.9^-100.
    ratio = error(0.9, 200) / error(0.9, 100)
    assert 0.05 < ratio * 0.9**100 < 5
    kept = dn.ReversibleAdjoint(anchors=8, report=True)
    sol = dfx.diffeqsolve(
        dfx.ODETerm(lambda t, y, _: jnp.sin(y[::-1])),
        dn.Reversible(dfx.Heun(), 0.9),
        0.0,
        2.0,
        0.01,
        jnp.array([0.4, 1.0]),
        adjoint=kept,
    )
    assert sol.stats["round_trip"].shape == (9,)
    assert jnp.max(sol.stats["round_trip"]) < 1e-4 * error(0.9, 200)


def test_a_linear_field_does_not_need_its_states():
    # Known limit of the guard, on the safe side: a round trip that fails, and a gradient that is exact all the same.
    loss = lambda p, a: jnp.sum(
        dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, p: -y), dn.Reversible(dfx.Heun(), 0.5), 0.0, 5.0, 0.01, p, adjoint=a
        ).ys
    )  # fmt: skip
    y0 = jnp.array([1.0, -2.0])
    reference = jax.grad(lambda p: loss(p, CHECKPOINT))(y0)
    assert (
        difference(jax.grad(lambda p: loss(p, dn.ReversibleAdjoint(tolerance=1e300, on_drift="nan")))(y0), reference)
        < 1e-10
    )
    assert jnp.all(jnp.isnan(jax.grad(lambda p: loss(p, dn.ReversibleAdjoint(on_drift="nan")))(y0)))


def test_refusals():
    x = data()
    adjoint = dn.ReversibleAdjoint()
    refuses = lambda message: pytest.raises(ValueError, match=message)
    with refuses(r"declarative\.Reversible\(diffrax\.Tsit5\(\)\)"):
        solve(x, dfx.Tsit5(), adjoint)
    with refuses("no inverse|has not"):
        solve(x, dfx.Kvaerno3(), adjoint, ADAPTIVE, dt0=None)
    with refuses("dense output"):
        solve(x, dfx.ReversibleHeun(), adjoint, saveat=dfx.SaveAt(dense=True))
    with refuses("events"):
        solve(x, dfx.ReversibleHeun(), adjoint, event=dfx.Event(lambda t, y, args, **_: y["b"] < 0))
    with refuses("max_steps"):
        solve(x, dfx.ReversibleHeun(), adjoint, ADAPTIVE, dt0=None, max_steps=None)
    with refuses("jump_ts"):
        solve(
            x, dfx.ReversibleHeun(), adjoint, dfx.ClipStepSizeController(ADAPTIVE, jump_ts=jnp.array([0.5])), dt0=None
        )
    with refuses("coupling_for"):
        solve(x, dn.Reversible(dfx.Heun()), CHECKPOINT)
    noise = dfx.ControlTerm(lambda t, y, _: jnp.ones((1, 1)), dfx.UnsafeBrownianPath((1,), jr.key(0)))
    with refuses("UnsafeBrownianPath"):
        dfx.diffeqsolve(noise, dfx.ReversibleHeun(), 0.0, 1.0, 0.1, jnp.ones(1), adjoint=adjoint)
    noise = dfx.ControlTerm(lambda t, y, _: jnp.ones((1, 1)), dfx.VirtualBrownianTree(0.0, 1.0, 1e-2, (1,), jr.key(0)))
    for solver in (dn.Reversible(dfx.Bosh3(), 0.9), dn.AsynchronousLeapfrog()):
        with refuses("SDE"), pytest.warns(UserWarning, match="not marked"):
            dfx.diffeqsolve(noise, solver, 0.0, 1.0, 0.1, jnp.ones(1), adjoint=adjoint)
    with refuses("explicit Runge-Kutta"):
        dn.Reversible(dfx.Kvaerno3())
    with refuses("coupling"):
        dn.Reversible(dfx.Heun(), 0.0)
    with refuses("damping"):
        dn.AsynchronousLeapfrog(0.5)
    with refuses("steps"):
        dn.coupling_for(0)
    with refuses("dtype"):
        dn.coupling_for(10, jnp.bfloat16)
    with refuses("float32 or float64"):
        dt, half = (jnp.asarray(t, jnp.bfloat16) for t in (0.1, 1.0))
        dfx.diffeqsolve(dfx.ODETerm(lambda t, y, _: -y), HEUN, 0 * dt, half, dt, half, adjoint=adjoint)
    for wrong in (dict(anchors=-1), dict(on_drift="ignore"), dict(tolerance=0.0)):
        with refuses(next(iter(wrong))):
            dn.ReversibleAdjoint(**wrong)


def test_what_is_not_differentiable_raises():
    x = data()
    end = lambda t1: spread(solve(x, dfx.ReversibleHeun(), dn.ReversibleAdjoint(), t1=t1).ys)
    with pytest.raises(Exception, match="no gradient with respect to t0, t1"):
        jax.grad(end)(1.0)
    start = lambda y: spread(solve((x[0], y, x[2]), dfx.ReversibleHeun(), dn.ReversibleAdjoint()).ys)
    with pytest.raises(Exception, match="differentiated once"):
        jax.jacrev(jax.grad(start))(x[1])
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(start, (x[1],), (x[1],))


class Symplectic(dn.AbstractReversibleSolver):
    """A solver of one's own: semi-implicit Euler for y'' = f, on y = [q, p]."""

    term_structure = dfx.AbstractTerm
    interpolation_cls = dfx.LocalLinearInterpolation

    def order(self, terms):
        return 1

    def init(self, terms, t0, t1, y0, args):
        return None

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        p = y0[1] + (t1 - t0) * terms.vf(t0, y0, args)[1]
        y1 = jnp.stack([y0[0] + (t1 - t0) * p, p])
        return y1, None, dict(y0=y0, y1=y1), None, dfx.RESULTS.successful

    def inverse(self, terms, t0, t1, y1, args, state1):
        q = y1[0] - (t1 - t0) * y1[1]
        return jnp.stack([q, y1[1] - (t1 - t0) * terms.vf(t0, jnp.stack([q, y1[1]]), args)[1]]), None


def test_a_solver_of_ones_own():
    term = dfx.ODETerm(lambda t, y, k: jnp.stack([y[1], -k * jnp.sin(y[0])]))
    loss = lambda k, a: spread(
        dfx.diffeqsolve(term, Symplectic(), 0.0, 1.0, 0.1, jnp.array([1.0, 0.0]), k, adjoint=a).ys
    )
    ours, reference = (jax.grad(lambda k, a=a: loss(k, a))(2.0) for a in (dn.ReversibleAdjoint(), CHECKPOINT))
    assert abs(ours - reference) < 1e-12


def test_a_function_that_is_singular_where_nothing_is_saved():
    # The square root has no derivative at the start, which is not saved.
    def loss(y, adjoint):
        saveat = dfx.SaveAt(t1=True, steps=3, fn=lambda t, y, args: jnp.sqrt(y))
        term = dfx.ODETerm(lambda t, y, args: jnp.ones(2))
        return spread(dfx.diffeqsolve(term, HEUN, 0.0, 1.0, 0.1, y, adjoint=adjoint, saveat=saveat, max_steps=16).ys[0])

    ours, reference = (jax.grad(loss)(jnp.zeros(2), a) for a in (dn.ReversibleAdjoint(), CHECKPOINT))
    assert difference(ours, reference) < 1e-10


def test_a_wrapper_is_not_what_it_wraps():
    for wrapped in (dfx.HalfSolver(dfx.SemiImplicitEuler()), dfx.HalfSolver(HEUN), dfx.HalfSolver(dn.Leapfrog())):
        with pytest.raises(ValueError, match="HalfSolver has not"):
            dfx.diffeqsolve(
                PENDULUM if isinstance(wrapped.solver, dfx.SemiImplicitEuler | dn.Leapfrog) else PENDULUM[0], wrapped, 0.0, 1.0, 0.1,
                (jnp.ones(1), jnp.ones(1)) if isinstance(wrapped.solver, dfx.SemiImplicitEuler | dn.Leapfrog) else jnp.ones(1), 1.0,
                adjoint=dn.ReversibleAdjoint(),
            )  # fmt: skip
    for inner in (dfx.HalfSolver(dfx.Tsit5()), dn.Reversible(dfx.Heun())):
        with pytest.raises(ValueError, match="explicit Runge-Kutta"):
            dn.Reversible(inner)


def test_a_solve_that_goes_on_from_another():
    # In two pieces, with a kick between: the second solve takes the solver's state of the first, and y0 counts.
    solver = dn.Reversible(dfx.Heun(), 0.9)
    term = dfx.ODETerm(lambda t, y, args: jnp.sin(y[::-1]))
    first = dfx.diffeqsolve(
        term, solver, 0.0, 1.0, 0.1, jnp.array([0.3, 1.0]), saveat=dfx.SaveAt(t1=True, solver_state=True)
    )
    state = jax.lax.stop_gradient(first.solver_state)
    second = lambda y, a: spread(dfx.diffeqsolve(term, solver, 1.0, 2.0, 0.1, y, solver_state=state, adjoint=a).ys)
    kicked = first.ys[-1] + 0.3
    assert abs(second(kicked, CHECKPOINT) - second(first.ys[-1], CHECKPOINT)) > 1e-2
    ours, reference = (jax.grad(second)(kicked, a) for a in (dn.ReversibleAdjoint(), CHECKPOINT))
    assert difference(ours, reference) < 1e-10


def test_the_guard_looks_at_each_leaf():
    # A huge component beside the one that is lost.
    def loss(p):
        term = dfx.ODETerm(lambda t, y, p: {"y": jnp.tanh(p @ y["y"]) - y["y"], "huge": jnp.zeros(1)})
        y0 = {"y": jnp.array([0.5, 1.0]), "huge": jnp.array([1e9])}
        adjoint = dn.ReversibleAdjoint(on_drift="nan")
        ys = dfx.diffeqsolve(term, dn.Reversible(dfx.Heun(), 0.5), 0.0, 10.0, 0.02, y0, p, adjoint=adjoint).ys
        return jnp.sum(ys["y"] ** 2)

    assert jnp.all(jnp.isnan(jax.grad(loss)(MATRIX)))


@pytest.mark.parametrize(
    "solver",
    [HEUN, dn.AsynchronousLeapfrog(), dn.Reversible(dfx.Heun(), 0.9)],
    ids=lambda solver: type(solver).__name__,
)
def test_the_guard_skips_what_no_field_reads(solver):
    # The log-determinant of a flow that keeps volumes is nothing but rounding.
    def field(t, y, p):
        turn = jnp.linalg.qr(p + jnp.eye(2))[0]
        swirl = lambda x: turn @ (jnp.array([1.0, -1.0]) * jnp.tanh(turn.T @ x)[::-1])
        velocity, pushforward = jax.linearize(swirl, y[0])
        return velocity, jnp.trace(jax.vmap(pushforward)(jnp.eye(2)))

    def loss(p, adjoint, fn=lambda t, y, args: y):
        saveat = dfx.SaveAt(t1=True, fn=fn)
        y0 = jnp.array([0.3, -0.8]), jnp.zeros(())
        ys = dfx.diffeqsolve(dfx.ODETerm(field), solver, 0.0, 1.0, 0.02, y0, p, saveat=saveat, adjoint=adjoint).ys
        assert ys is not None
        x, volume = ys
        return jnp.sum(x**2) + jnp.sum(volume)

    nan = dn.ReversibleAdjoint(on_drift="nan")
    ours, reference = (jax.grad(loss)(MATRIX, adjoint) for adjoint in (nan, CHECKPOINT))
    assert difference(ours, reference) < 1e-10
    # A gradient may depend on what a function of `SaveAt` reads.
    assert jnp.all(jnp.isnan(jax.grad(loss)(MATRIX, nan, lambda t, y, args: (y[0], jnp.sin(y[1])))))


def test_the_guard_looks_at_what_a_learnt_control_multiplies():
    # dy = y dX: the field returns y as it is, and the derivative in X is y.
    class Control(dfx.AbstractPath):
        rate: jax.Array
        t0, t1 = -jnp.inf, jnp.inf  # pyright: ignore  (diffrax declares them as class variables)

        def evaluate(self, t0, t1=None, left=True):
            return -self.rate * (t0 if t1 is None else t1 - t0)

    def loss(rate, adjoint):
        term = dfx.ControlTerm(lambda t, y, args: y, Control(rate))
        return jnp.sum(
            dfx.diffeqsolve(
                term, dn.Reversible(dfx.Heun(), 0.99), 0.0, 1.0, 1 / 2000, jnp.array(1.0), adjoint=adjoint,
                max_steps=2005, saveat=dfx.SaveAt(ts=jnp.linspace(0, 1, 5)),
            ).ys
        )  # fmt: skip

    adjoint = dn.ReversibleAdjoint(anchors=0, on_drift="nan")
    assert jnp.isnan(jax.grad(loss)(jnp.array(80.0), adjoint))
    assert abs(jax.grad(loss)(jnp.array(1.0), adjoint) / jax.grad(loss)(jnp.array(1.0), CHECKPOINT) - 1) < 1e-6


def test_a_quadrature_has_nothing_to_compare():
    def loss(p, adjoint):
        term = dfx.ODETerm(lambda t, y, p: jnp.cos(p * t))
        return dfx.diffeqsolve(term, HEUN, 0.0, 1.0, 0.1, jnp.zeros(()), p, adjoint=adjoint).ys[0]

    reports = dn.ReversibleAdjoint(tolerance=1e-300, report=True)
    assert difference(jax.grad(loss)(2.0, reports), jax.grad(loss)(2.0, CHECKPOINT)) < 1e-12


def test_the_guard_looks_at_where_the_field_is_evaluated():
    # Where a solution has grown, reversible Heun's way back loses its second state while y looks right.
    def loss(k, adjoint):
        t0, t1, dt, y0 = (jnp.asarray(t, jnp.float32) for t in (0.0, 20.0, 0.01, 1e-6))
        term = dfx.ODETerm(lambda t, y, k: k * y - y**3)
        return dfx.diffeqsolve(term, HEUN, t0, t1, dt, y0, k, adjoint=adjoint).ys[0]

    assert jnp.isnan(jax.grad(loss)(jnp.float32(1.0), dn.ReversibleAdjoint(anchors=0, on_drift="nan")))
    # With anchors it stays as good as autodiff, which float32 takes 6 % from here.
    assert jnp.isfinite(jax.grad(loss)(jnp.float32(1.0), dn.ReversibleAdjoint(on_drift="nan")))


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 10, 100])
def test_auto_bears_few_steps(steps):
    # Fewer steps than kept states, too: the coupling of a step is bounded, not only that of a stretch.
    term = dfx.ODETerm(lambda t, y, _: jnp.sin(y[::-1]))
    y0, adjoint = jnp.array([0.4, 1.0], jnp.float32), dn.ReversibleAdjoint(report=True)
    t0, t1, dt = (jnp.asarray(t, jnp.float32) for t in (0.0, 1.0, 1 / steps))
    sol = dfx.diffeqsolve(term, dn.Reversible(dfx.Heun()), t0, t1, dt, y0, adjoint=adjoint)
    assert jnp.max(sol.stats["round_trip"]) < 1e-4  # e^6 times the rounding of float32, a bit more
    assert dn.coupling_for(steps, jnp.float32) > 0.9 * jnp.exp(-6.0)


def test_times_near_the_end_of_float32():
    # diffrax goes to t1 from 100 units in the last place before it.
    with jax.enable_x64(False):
        term = dfx.ODETerm(lambda t, y, k: jnp.sin(k * y))
        solve = lambda k, a: dfx.diffeqsolve(term, HEUN, 1000.0, 1001.0, 5e-3, jnp.array([0.3]), k, adjoint=a).ys[0, 0]
        ours, reference = (jax.grad(solve)(2.0, a) for a in (dn.ReversibleAdjoint(), CHECKPOINT))
    assert abs(ours - reference) < 1e-5 * abs(reference)
