"""The quadratic program layer: values and gradients against exact references, conventions, failures, hostile data."""

# An absent block is None. Which blocks are there is fixed where the program is built; to prove it again at every use would hide the maths.
# pyright: reportOptionalMemberAccess=false, reportOptionalOperand=false, reportOptionalSubscript=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optimistix as optx
import pytest

import declarative as dn

from . import hostile
from .helpers import tree_close
from .programs import as_operators, by_enumeration, gradients, program, worst_violation

QUIET = dn.QuadraticProgram(throw=False)


@functools.cache
def compiled(kind: str, **fields):
    """One compiled batch function for each kind of node, shared by the tests."""
    node = dn.QuadraticProgram(throw=False, **fields)
    if kind == "solve":
        return jax.jit(jax.vmap(lambda x: node.solve(x)))
    if kind == "solve by operators":
        return jax.jit(jax.vmap(lambda x: node.solve(as_operators(x))))
    if kind == "vjp":
        return jax.jit(jax.vmap(lambda x, c: jax.vjp(lambda x: node(x), x)[1](c)[0]))
    raise KeyError(kind)


def batch(*programs):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *programs)


def test_every_block_against_enumeration():
    programs = [program(seed, n=4, m=3, p=1) for seed in range(24)]
    solution = compiled("solve")(batch(*programs))
    assert np.all(np.asarray(solution.result._value) == 0)
    for i, x in enumerate(programs):
        tree_close(solution.value[i], by_enumeration(x), 1e-9)
        assert worst_violation(solution.value[i], x) < 1e-12
        z = np.asarray(solution.value[i])
        duals = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), solution.dual)
        force = (
            np.asarray(x.Q) @ z
            + np.asarray(x.q)
            + duals.equality @ np.asarray(x.A)
            + duals.inequality @ np.asarray(x.G)
        )
        np.testing.assert_allclose(force + duals.bound, 0, atol=1e-11)
        assert np.all(duals.inequality >= 0)
        np.testing.assert_allclose(duals.inequality * duals.slack, 0, atol=1e-12)
        np.testing.assert_allclose(
            solution.objective[i], z @ np.asarray(x.Q) @ z / 2 + np.asarray(x.q) @ z, rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize(
    ("dtype", "tol"), [(jnp.float64, 1e-9), pytest.param(jnp.float32, 1e-3, marks=pytest.mark.slow)]
)
def test_gradients_of_every_datum_against_the_active_set(dtype, tol):
    programs = [program(seed, n=6, m=6, p=2, bounds=False, dtype=dtype) for seed in range(16)]
    cotangents = jnp.asarray(np.random.default_rng(0).standard_normal((16, 6)), dtype)
    solution = compiled("solve")(batch(*programs))
    got = compiled("vjp")(batch(*programs), cotangents)
    compared = 0
    for i, x in enumerate(programs):
        active = np.asarray(solution.dual.inequality[i]) > 0
        z, want, condition = gradients(x, active, cotangents[i])
        if condition > 1e3 and dtype == jnp.float32:
            continue
        compared += 1
        tree_close(solution.value[i], jnp.asarray(z, dtype), tol)
        error = sum(float(np.sum((np.asarray(getattr(got, name)[i], np.float64) - want[name]) ** 2)) for name in want)
        assert error**0.5 < tol * sum(float(np.sum(leaf**2)) for leaf in want.values()) ** 0.5
    assert compared >= 8


def closed_form(Q, q, A, b):
    n, p = q.size, b.size
    kkt = jnp.block([[Q, A.T], [A, jnp.zeros((p, p))]])
    return jnp.linalg.solve(kkt, jnp.concatenate([-q, b]))[:n]


@pytest.mark.slow
def test_second_derivatives_of_equality_programs():
    x = program(3, n=4, m=0, p=2, bounds=False)
    value = lambda q: QUIET.solve(x.Q, q, A=x.A, b=x.b).objective
    cost = lambda z, q: z @ x.Q @ z / 2 + q @ z
    want = lambda q: cost(closed_form(x.Q, q, x.A, x.b), q)
    tree_close(jax.hessian(value)(x.q), jax.hessian(want)(x.q), 1e-9)
    loss = lambda solve: lambda q: jnp.sum(jnp.sin(solve(q)))
    got = jax.jacrev(jax.jacrev(loss(lambda q: QUIET(x.Q, q, A=x.A, b=x.b))))(x.q)
    tree_close(got, jax.jacrev(jax.jacrev(loss(lambda q: closed_form(x.Q, q, x.A, x.b))))(x.q), 1e-9)
    matrix = lambda solve: lambda A: jnp.sum(jnp.sin(solve(A)))
    got = jax.jacrev(jax.jacrev(matrix(lambda A: QUIET(x.Q, x.q, A=A, b=x.b))))(x.A)
    tree_close(got, jax.jacrev(jax.jacrev(matrix(lambda A: closed_form(x.Q, x.q, A, x.b))))(x.A), 1e-9)


def finite_difference(f, x, direction, step=1e-6):
    move = lambda sign: jax.tree.map(lambda leaf, d: leaf + sign * step * d, x, direction)
    return (f(move(1)) - f(move(-1))) / (2 * step)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"gradient": "smoothed", "smoothing": 1e-2}, {"elastic": 50.0}], ids=str)
def test_smoothed_and_elastic_programs_have_exact_derivatives(fields):
    x = program(1, n=4, m=3, p=1)
    if "elastic" in fields:  # and no feasible point
        x = dn.QuadraticProgramData(
            x.Q, x.q, x.A, x.b, x.G.at[1].set(-x.G[0]), x.h.at[1].set(-x.h[0] - 1), x.lower, x.upper
        )
    node = dn.QuadraticProgram(throw=False, **fields)

    def loss(x):
        solution = node.solve(x)
        return jnp.sum(jnp.sin(solution.value)) + jnp.sum(jnp.cos(solution.dual.inequality)) + solution.objective

    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape)), x)
    compiled_loss, gradient = jax.jit(loss), jax.jit(jax.grad(loss))(x)
    want = finite_difference(compiled_loss, x, direction)
    got = sum(jnp.sum(g * d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert node.solve(x).result == dn.RESULTS.successful


@pytest.mark.slow
def test_smoothing_is_the_central_path_and_elastic_tends_to_the_program():
    x = program(2, n=3, m=3, p=0, bounds=False)
    exact = QUIET.solve(x)
    smooth = dn.QuadraticProgram(gradient="smoothed", smoothing=1e-4).solve(x)
    np.testing.assert_allclose(np.asarray(smooth.dual.inequality * smooth.dual.slack), 1e-4, rtol=1e-8)
    assert 0 <= float(smooth.objective - exact.objective) <= 3 * 1e-4
    penalised = dn.QuadraticProgram(elastic=True).solve(x)
    tree_close(penalised.value, exact.value, 1e-4)


@pytest.mark.slow
def test_conventions_at_degenerate_points():
    eye = jnp.eye(2)
    # Equal rows share their multiplier, and the derivative in h.
    G, h = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), jnp.array([-1.0, -1.0, 5.0])
    q = jnp.array([0.5, -1.0])
    solution = QUIET.solve(eye, q, G=G, h=h)
    tree_close(solution.value, jnp.array([-1.0, 1.0]), 1e-12)
    tree_close(solution.dual.inequality, jnp.array([0.25, 0.25, 0.0]), 1e-9)
    sensitivity = jax.grad(lambda h: QUIET(eye, q, G=G, h=h)[0])(h)
    tree_close(sensitivity, jnp.array([0.5, 0.5, 0.0]), 1e-9)
    # A weakly active row: one of the two one-sided derivatives, nothing between them, and `kink_distance` says so.
    G, h = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), jnp.array([-0.5, 7.0, 9.0])
    weak = QUIET.solve(eye, q, G=G, h=h)
    assert float(QUIET.kink_distance(weak.unknown, dn.QuadraticProgramData(eye, q, G=G, h=h))) < 1e-12
    derivative = jax.jacrev(lambda q: QUIET(eye, q, G=G, h=h))(q)
    assert abs(float(derivative[0, 0])) < 1e-12 or abs(float(derivative[0, 0]) + 1) < 1e-12


def test_direct_cases():
    rng = np.random.default_rng(0)
    Q, q = jnp.asarray(rng.random(5) + 0.1), jnp.asarray(rng.standard_normal(5))
    box = QUIET.solve(Q, q, lower=-0.3, upper=0.2)
    tree_close(box.value, jnp.clip(-q / Q, -0.3, 0.2), 1e-15)
    assert int(box.stats["steps"]) == 1
    free = QUIET.solve(Q, q)
    tree_close(free.value, -q / Q, 1e-14)
    assert QUIET.solve(Q.at[2].set(0.0), q).result == dn.RESULTS.unbounded
    assert QUIET.solve(Q, q, lower=1.0, upper=0.0).result == dn.RESULTS.infeasible
    # Blocks without rows, and numbers as bounds beside float32.
    empty = QUIET.solve(
        Q, q, A=jnp.zeros((0, 5)), b=jnp.zeros(0), G=jnp.zeros((0, 5)), h=jnp.zeros(0), lower=-0.3, upper=0.2
    )
    tree_close(empty.value, box.value, 1e-14)
    single = QUIET(Q.astype(jnp.float32), q.astype(jnp.float32), lower=-0.3, upper=0.2)
    assert single.dtype == jnp.float32
    # A fixed variable is a constraint like any other.
    lower, upper = jnp.full(5, -0.3).at[1].set(0.7), jnp.full(5, 0.2).at[1].set(0.7)
    fixed = QUIET.solve(Q, q, lower=lower, upper=upper)
    assert float(fixed.value[1]) == 0.7
    assert float(fixed.stats["kink_distance"]) > 1e-3


@pytest.mark.slow
def test_a_previous_solution_starts_the_next():
    x = program(0, n=4, m=3, p=1)
    first = compiled("solve")(batch(x))
    restarted = jax.jit(jax.vmap(lambda x, y0: QUIET.solve(x, y0=y0)))
    warm = restarted(batch(x), first.unknown)
    assert int(warm.stats["steps"][0]) <= 2 < int(first.stats["steps"][0])
    tree_close(warm.value, first.value, 1e-12)
    useless = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), first.unknown)
    fresh = restarted(batch(x), useless)
    tree_close(fresh.value, first.value, 1e-12)
    assert int(fresh.result._value[0]) == 0


@pytest.mark.full
def test_a_bad_lane_leaves_its_neighbours_bit_identical():
    programs = [program(seed, n=4, m=3, p=1) for seed in range(4)]
    clean = batch(*programs)
    x = programs[2]
    for bad in (
        dn.QuadraticProgramData(x.Q.at[0, 0].set(jnp.nan), x.q, x.A, x.b, x.G, x.h, x.lower, x.upper),
        dn.QuadraticProgramData(x.Q, x.q, x.A, x.b + 1e3, x.G, x.h, x.lower, x.upper),
    ):
        dirty = batch(*programs[:2], bad, programs[3])
        cotangents = jnp.ones((4, 4))
        keep = np.array([0, 1, 3])
        for f, args in ((compiled("solve"), ()), (compiled("vjp", on_failure="zero"), (cotangents,))):
            for left, right in zip(jax.tree.leaves(f(clean, *args)), jax.tree.leaves(f(dirty, *args)), strict=True):
                np.testing.assert_array_equal(np.asarray(left)[keep], np.asarray(right)[keep])
        gradient = compiled("vjp", on_failure="zero")(dirty, cotangents)
        assert all(np.all(np.asarray(leaf)[2] == 0) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.ones((2, 3))}, "q must be a non-empty vector"),
        ({"Q": jnp.eye(4)}, r"Q must be \(3, 3\)"),
        ({"A": jnp.ones((1, 3))}, "A and b come together: got A without b"),
        ({"Q": "Q"}, "Q must be an array, got str"),
        ({"y0": jnp.ones(3)}, "y0 must be the `unknown`"),
        ({"G": jnp.ones((2, 4)), "h": jnp.ones(2)}, "G must be a matrix with 3 columns"),
        ({"G": jnp.ones((2, 3)), "h": jnp.ones(3)}, "h must have one entry for each row of G, 2"),
        ({"lower": jnp.ones(2)}, "lower must have one entry"),
        ({"upper": jnp.ones(3, jnp.float32)}, "one floating dtype"),
        ({"q": None}, "q is missing"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    fields = {"Q": jnp.eye(3), "q": jnp.ones(3), **change}
    with pytest.raises(ValueError, match=message):
        QUIET(fields.pop("Q"), fields.pop("q"), **fields)


def test_constructor_errors():
    with pytest.raises(ValueError, match="gradient must be"):
        dn.QuadraticProgram(gradient="smooth")
    with pytest.raises(ValueError, match="smoothing must be positive"):
        dn.QuadraticProgram(smoothing=0.0)
    with pytest.raises(ValueError, match="elastic must be"):
        dn.QuadraticProgram(elastic=-1.0)
    with pytest.raises(ValueError, match="dependent_equations must be"):
        dn.QuadraticProgram(dependent_equations=-1)
    for adjoint in (dn.UnrolledAdjoint(), optx.RecursiveCheckpointAdjoint()):
        with pytest.raises(ValueError, match="would differentiate interior-point iterations"):
            dn.QuadraticProgram(adjoint=adjoint)


STATUS = (
    "successful",
    "infeasible",
    "unbounded",
    "indefinite",
    "nonfinite_data",
    "not_a_solution",
    "nonlinear_max_steps_reached",
)
CERTIFIED = {"solvable": "successful", "infeasible": "infeasible", "unbounded": "unbounded", "indefinite": "indefinite"}


def hostile_run(shapes, seeds, dtype=jnp.float64, tol=1e-6, operators=False):
    """(wrong answers, {truth: (answered, asked)}) over all families; hard families may be flagged, never wrong."""
    names = {int(getattr(dn.RESULTS, name)._value): name for name in STATUS}
    wrong, tally = [], {}
    for n, m, p in shapes:
        families = [f for s in seeds for f in hostile.families(np.random.default_rng([s, n, m, p]), n, m, p)]
        stack = lambda name, families=families: jnp.asarray(np.stack([getattr(f, name) for f in families]), dtype)
        equations = {"A": stack("A"), "b": stack("b")} if p else {}
        x = dn.QuadraticProgramData(stack("Q"), stack("q"), G=stack("G"), h=stack("h"), **equations)
        solution = compiled("solve by operators" if operators else "solve")(x)
        for i, f in enumerate(families):
            status = names.get(int(solution.result._value[i]), "other")
            z = np.asarray(solution.value[i], np.float64)
            nu = np.asarray(solution.dual.equality[i], np.float64) if p else np.zeros(0)
            lam = np.asarray(solution.dual.inequality[i], np.float64)
            right = {
                "successful": lambda f=f, z=z, nu=nu, lam=lam: (
                    f.truth == "solvable" and hostile.violation(f, z, nu, lam) <= tol
                ),
                "infeasible": lambda f=f, nu=nu, lam=lam: f.truth == "infeasible" and hostile.refutes(f, nu, lam),
                "unbounded": lambda f=f, z=z: f.truth == "unbounded" and hostile.escapes(f, z),
                "indefinite": lambda f=f: f.truth == "indefinite",
                "nonfinite_data": lambda f=f: f.truth == "nonfinite",
            }.get(status, lambda: True)()
            if not right:
                wrong.append((f.name, (n, m, p), i, status))
            if not f.hard and f.truth in CERTIFIED:
                answered, asked = tally.get(f.truth, (0, 0))
                tally[f.truth] = (answered + (status == CERTIFIED[f.truth]), asked + 1)
    return wrong, tally


def test_hostile_programs():
    wrong, tally = hostile_run([(3, 4, 1)], range(6))
    assert not wrong
    assert all(answered >= asked - 1 for answered, asked in tally.values())


def test_a_guess_does_not_make_a_solution_of_a_failure():
    flat = lambda primal, bound: dn.KKTPoint(jnp.array([primal]), bound=jnp.array([bound]))
    one = jnp.ones(1)
    saddle = QUIET.solve(-one, 0 * one, lower=-1.0, upper=1.0, y0=flat(1.0, 1.0))
    assert saddle.result == dn.RESULTS.indefinite
    crossed = QUIET.solve(one, -one, lower=1.0, upper=0.0, y0=flat(0.0, 1.0))
    assert crossed.result == dn.RESULTS.infeasible


def test_rays_and_what_only_looks_like_one():
    eye = jnp.eye(2, dtype=jnp.float32)
    nearly = jnp.array([[1.0, 0.999], [0.999, 1.0]], jnp.float32)
    q = jnp.array([1.0, -1.0], jnp.float32)
    assert QUIET.solve(nearly, q).result != dn.RESULTS.unbounded
    convex = QUIET.solve(nearly.astype(jnp.float64), q.astype(jnp.float64))
    tree_close(convex.value, jnp.array([-1.0, 1.0]) / (1 - nearly[0, 1].astype(jnp.float64)), 1e-9)
    elastic = dn.QuadraticProgram(throw=False, elastic=True)
    soft = elastic.solve(eye, q, A=jnp.ones((1, 2), jnp.float32), b=jnp.zeros(1, jnp.float32))
    assert soft.result == dn.RESULTS.successful
    tree_close(soft.value, jnp.array([-1.0, 1.0], jnp.float32), 1e-4)
    flat = QUIET.solve(jnp.zeros(2), jnp.array([10.0, 0.0]))
    assert flat.result == dn.RESULTS.unbounded
    tree_close(flat.value, jnp.array([-0.1, 0.0]), 1e-12)


def test_the_apex_of_a_cone():
    G, q = jnp.array([[1.0, 0.3], [0.2, 1.0]]), jnp.array([-1.14, -1.0])
    solution = QUIET.solve(jnp.eye(2), q, G=G, h=jnp.zeros(2))
    assert solution.result == dn.RESULTS.successful
    tree_close(solution.value, jnp.zeros(2), 1e-12)
    tree_close(solution.dual.inequality, jnp.array([1.0, 0.7]), 1e-9)


@pytest.mark.slow
def test_equations_that_depend_on_one_another():
    x = program(0, n=4, m=3, p=1, bounds=False)
    A, b = jnp.concatenate([x.A, 2 * x.A]), jnp.concatenate([x.b, 2 * x.b])
    doubled = QUIET.solve(x.Q, x.q, A=A, b=b, G=x.G, h=x.h)
    tree_close(doubled.value, by_enumeration(x), 1e-9)
    contradiction = QUIET.solve(x.Q, x.q, A=A, b=b + jnp.array([0.0, 1.0]), G=x.G, h=x.h)
    assert contradiction.result == dn.RESULTS.infeasible
    np.testing.assert_allclose(A.T @ contradiction.dual.equality, 0, atol=1e-9)
    np.testing.assert_allclose((b + jnp.array([0.0, 1.0])) @ contradiction.dual.equality, -1, rtol=1e-9)
    strict = dn.QuadraticProgram(throw=False, dependent_equations=0)
    assert strict.solve(x.Q, x.q, A=A, b=b, G=x.G, h=x.h).result == dn.RESULTS.dependent_equations


@pytest.mark.full
def test_ten_thousand_hostile_programs():
    seeds = range(125)
    rng = np.random.default_rng
    assert (
        sum(len(list(hostile.families(rng([s, *shape]), *shape))) for s in seeds for shape in hostile.SHAPES) > 10_000
    )
    wrong, tally = hostile_run(hostile.SHAPES, seeds)
    print({truth: f"{answered} of {asked}" for truth, (answered, asked) in tally.items()})
    assert not wrong
    for answered, asked in tally.values():
        assert answered >= 0.99 * asked


def test_a_set_that_no_point_satisfies_is_left_again():
    """The last variable lies just inside of its bound, where the interior-point method took it to be (float32)."""
    v, c = jnp.array([2.0, 0.95, 0.81], jnp.float32), jnp.array([[0.94, 0.84, 1.04]], jnp.float32)
    h = jnp.array([1.786], jnp.float32)
    s = QUIET.solve(jnp.full(3, 0.2, jnp.float32), -v, G=c, h=h, lower=0.0, upper=1.0)
    assert s.result == dn.RESULTS.successful
    np.testing.assert_allclose(s.value, [1, 1, (1.786 - 0.94 - 0.84) / 1.04], atol=2e-6)


@pytest.mark.slow
def test_a_slow_start_is_not_given_up():
    """Of 512 random programs one whose homogeneous iterates hardly improve in their first six steps."""
    rng, n, p = np.random.default_rng(0), 10, 5
    G, A, L = (rng.standard_normal((512, n, n)), rng.standard_normal((512, p, n)), rng.random((512, n, n)))
    q, z = rng.standard_normal((512, n)), rng.standard_normal((512, n))
    slack = rng.random((512, n))
    G, A, L, q, z, slack = (block[98] for block in (G, A, L, q, z, slack))
    solution = QUIET.solve(*map(jnp.asarray, (L @ L.T + 1e-3 * np.eye(n), q)), A=A, b=A @ z, G=G, h=G @ z + slack)
    assert solution.result == dn.RESULTS.successful
    assert solution.stats["residual"] < 1e-12


@pytest.mark.full
def test_what_a_batch_shares_stays_shared(getkey):
    n, p, batch = 30, 24, 32
    keys = jr.split(getkey(), 4)
    Q, A = jnp.eye(n) * 2, jr.normal(keys[0], (p, n))
    q, z = jr.normal(keys[1], (batch, n)), jr.normal(keys[2], (batch, n))
    b = z @ A.T

    def solve(Q, A, q, b):
        return QUIET(Q, q, A=A, b=b, lower=-3.0)

    def compiled(axes, *args):
        program = jax.jit(jax.vmap(solve, in_axes=axes)).lower(*args).compile()
        analysis = program.memory_analysis()
        assert analysis is not None
        return program(*args), analysis.temp_size_in_bytes

    stack = lambda leaf: jnp.broadcast_to(leaf, (batch, *leaf.shape))
    one, shared = compiled((None, None, 0, 0), Q, A, q, b)
    each, own = compiled(0, stack(Q), stack(A), q, b)
    tree_close(one, each, 1e-9)
    assert own - shared > 1.5 * batch * (Q.nbytes + A.nbytes)
