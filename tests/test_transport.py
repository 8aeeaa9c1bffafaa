"""Entropic transport: against Sinkhorn's algorithm run to the end, against exact linear programs, and where it could go wrong."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import declarative as dn

from .rows.transport import nearest
from .sinkhorn import sinkhorn

N, M = 4, 6
INF = np.inf
RTOL = 2e-11  # ten times the solver's own tolerance in float64
LANES = 18
RNG = np.random.default_rng(5)
A, B = RNG.dirichlet(np.ones(N)), RNG.dirichlet(np.ones(M))
C = RNG.uniform(size=(N, M))


def at(array, *entries):
    """A copy with some entries replaced."""
    array = np.array(array, np.float64)
    for index, value in entries:
        array[index] = value
    return array


def summing_to(x, total):
    return x / np.sum(x) * total


# Two parts that have nothing to do with one another, and their masses.
PARTS = at(C, ((slice(0, 2), slice(3, 6)), INF), ((slice(2, 4), slice(0, 3)), INF))
PART_A = np.concatenate([summing_to(A[:2], 0.3), summing_to(A[2:], 0.7)])
PART_B = np.concatenate([summing_to(B[:3], 0.3), summing_to(B[3:], 0.7)])
NO_ROW, NO_COLUMN = at(A, (1, 0)) / (1 - A[1]), at(B, (2, 0)) / (1 - B[2])
# name: (C, a, b, epsilon)
CASES = {
    "smooth": (C, A, B, 2.0),
    "usual": (C, A, B, 0.1),
    "sharp": (C, A, B, 0.02),
    "equal costs": (0 * C, A, B, 0.1),
    "offset": (C + 1e6, A, B, 0.1),
    "rows and columns offset": (C + 100 * np.arange(N)[:, None] - 30 * np.arange(M)[None, :], A, B, 0.1),
    "large costs": (1e8 * C, A, B, 1e7),
    "small costs": (1e-8 * C, A, B, 1e-9),
    "large masses": (C, 1e8 * A, 1e8 * B, 0.1),
    "small masses": (C, 1e-8 * A, 1e-8 * B, 0.1),
    "forbidden pairs": (at(C, ((0, 1), INF), ((2, 3), INF), ((3, 3), INF)), A, B, 0.1),
    "two parts": (PARTS, PART_A, PART_B, 0.1),
    "rows and columns without mass": (C, NO_ROW, NO_COLUMN, 0.1),
    "without mass, all forbidden": (at(C, (1, INF)), NO_ROW, B, 0.1),
    "uneven masses": (C, summing_to(10.0 ** -np.arange(0, 2 * N, 2), 1), summing_to(10.0 ** np.arange(M), 1), 0.1),
}


def stacked(cases, dtype=np.float64):
    return [jnp.asarray(np.stack([np.asarray(case[k]) for case in cases]), dtype) for k in range(4)]


@ft.cache
def solver():
    return jax.jit(
        jax.vmap(
            lambda C, a, b, epsilon, rho: dn.EntropicTransport(epsilon, rho=rho, throw=False).solve(C, a, b),
            in_axes=(0, 0, 0, 0, None),
        )
    )


def solve(cases, rho=None, dtype: type = np.float64):
    """As lanes of one batch, of one size, so that it is compiled once."""
    full = [*cases, *[cases[0]] * (LANES - len(cases))]
    assert len(full) == LANES
    solution = solver()(*stacked(full, dtype), None if rho is None else jnp.asarray(rho, dtype))
    return jax.tree.map(lambda leaf: np.asarray(leaf)[: len(cases)], solution)


def status(solution):
    return [dn.RESULTS._index_to_message[int(code)] for code in solution.result._value]


def name_of(member):
    return dn.RESULTS[getattr(dn.RESULTS, member)]


@pytest.mark.parametrize("rho", [None, 0.3, 0.01], ids=["balanced", "unbalanced", "hardly bound"])
def test_plans_against_sinkhorn(rho):
    """Hostile data as lanes of one batch, beside a lane of NaN."""
    # Offsets and scales of the costs alone, which change nothing, would say with `rho` that mass is to be made or left.
    names = [name for name in CASES if rho is None or not ("offset" in name or "costs" in name)]
    cases = [(C, a, b if rho is None else 1.7 * b, epsilon) for C, a, b, epsilon in (CASES[name] for name in names)]
    solution = solve([*cases, (np.nan * C, A, B, 0.1)], rho)
    for name, (cost, a, b, epsilon), plan in zip(names, cases, solution.value, strict=False):
        exponents = np.where(np.isinf(cost), 0, np.abs(cost)) / epsilon  # their rounding is what is left of the error
        cost = cost - np.min(cost) if rho is None else cost
        want = sinkhorn(cost, a, b, epsilon, rho)
        np.testing.assert_allclose(plan, want, rtol=RTOL + 1e-15 * np.max(exponents), atol=1e-300, err_msg=name)
    assert status(solution)[:-1] == [""] * len(cases)
    assert status(solution)[-1] == name_of("nonfinite_data")
    assert np.max(solution.stats["residual"][:-1]) < RTOL
    assert np.max(solution.stats["steps"]) < 60


@pytest.mark.full
def test_transposed_costs_give_the_transposed_plan():
    """The linear algebra takes the smaller side; here it is the other one."""
    cases = [CASES[name] for name in ("usual", "forbidden pairs", "rows and columns without mass")]
    lanes = stacked(cases)
    flipped = stacked([(C.T, b, a, epsilon) for C, a, b, epsilon in cases])
    weights = jnp.asarray(RNG.standard_normal((N, M)))

    def value(C, a, b, epsilon, weights):
        return jnp.sum(weights * dn.EntropicTransport(epsilon, throw=False)(C, a, b))

    gradient = jax.jit(jax.vmap(jax.value_and_grad(value, (0, 3)), in_axes=(0, 0, 0, 0, None)))
    got, want = gradient(*lanes, weights), gradient(*flipped, weights.T)
    np.testing.assert_allclose(got[0], want[0], rtol=RTOL)
    np.testing.assert_allclose(got[1][0], jnp.swapaxes(want[1][0], 1, 2), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(got[1][1], want[1][1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rho", [None, pytest.param(0.4, marks=pytest.mark.slow)], ids=["balanced", "unbalanced"])
def test_derivatives_of_the_plan_in_all_data(rho):
    """Both modes against finite differences of Sinkhorn's algorithm; masses move with their totals, where these have to stay equal."""
    names = ("smooth", "usual", "large costs", "forbidden pairs", "two parts", "rows and columns without mass")
    cases = [CASES[name] for name in names if rho is None or name != "large costs"]
    rng = np.random.default_rng(1)
    directions, weights = [], rng.standard_normal((len(cases), N, M))
    for cost, a, b, epsilon in cases:
        dC = np.where(np.isinf(cost), 0, rng.standard_normal((N, M))) * epsilon
        # In proportion: the totals of the parts stay what they are.
        da, db = a * rng.standard_normal(N), b * rng.standard_normal(M)
        if rho is None:
            top, left = np.arange(N) < 2, np.arange(M) < 3
            for half, side in ((top, left), (~top, ~left)):
                da = np.where(half, da - a * np.sum(da[half]) / np.sum(a[half]), da)
                db = np.where(side, db - b * np.sum(db[side]) / np.sum(b[side]), db)
        directions.append((dC, da, db, epsilon * rng.uniform(0.2, 0.5)))
    lanes, tangents = stacked(cases), stacked(directions)
    softness = None if rho is None else jnp.asarray(rho)

    def node(rho, *x):
        return dn.EntropicTransport(x[3], rho=rho, throw=False)(*x[:3])

    def both(w, x, dx):
        x, dx = ((softness, *x), (softness, *dx)) if rho is not None else ((None, *x), (None, *dx))
        plan, forward = jax.jvp(node, x, dx)
        _, pullback = jax.vjp(node, *x)
        return plan, forward, pullback(w)

    plan, forward, reverse = jax.jit(jax.vmap(both))(jnp.asarray(weights), tuple(lanes), tuple(tangents))
    step = 1e-5
    for k, (case, direction) in enumerate(zip(cases, directions, strict=True)):
        moved = []
        for sign in (1, -1):
            x = [
                np.where(np.isfinite(v), v, 0) + sign * step * np.asarray(d)
                for v, d in zip(case, direction, strict=True)
            ]
            x[0] = np.where(np.isinf(case[0]), INF, x[0])
            moved.append(sinkhorn(x[0], x[1], x[2], x[3], None if rho is None else rho * (1 + sign * step)))
        difference = (moved[0] - moved[1]) / (2 * step)
        size = np.max(np.abs(difference))
        np.testing.assert_allclose(forward[k], difference, atol=1e-7 * size)
        sides = [
            np.sum(np.where(np.isfinite(g[k]), g[k], np.nan) * np.asarray(d))
            for g, d in zip(reverse[1:], direction, strict=True)
        ]
        total = sum(sides) + (0 if rho is None else reverse[0][k] * rho)
        np.testing.assert_allclose(total, np.sum(weights[k] * np.asarray(forward[k])), atol=1e-9 * size * N * M)


@pytest.mark.slow
def test_a_mass_of_zero_has_a_one_sided_derivative():
    _, a, b, epsilon = CASES["rows and columns without mass"]
    more = np.zeros(N)
    more[1], more[0] = 1, -1
    node = lambda a: dn.EntropicTransport(epsilon)(jnp.asarray(C), a, jnp.asarray(b))
    _, forward = jax.jvp(node, (jnp.asarray(a),), (jnp.asarray(more),))
    step = 1e-6
    plans = [sinkhorn(C, a + t * more, b, epsilon) for t in (0, step, 2 * step)]
    np.testing.assert_allclose(forward, (-3 * plans[0] + 4 * plans[1] - plans[2]) / (2 * step), atol=1e-6)
    assert np.min(forward[1][b > 0]) > 0


def test_masses_of_zero_in_the_unbalanced_minimum():
    """Its gradient there is the one-sided derivative."""
    value = jax.jit(lambda a, b: dn.EntropicTransport(0.3, rho=0.7).solve(jnp.asarray(C), a, b).objective)
    a, b = jnp.asarray(at(A, (1, 0.0))), jnp.asarray(at(B, (2, 0.0)))
    for side, index in ((0, 1), (1, 2)):
        moved = [(a, b)[k].at[index].add(1e-6) if k == side else (a, b)[k] for k in (0, 1)]
        gradient = jax.grad(value, side)(a, b)[index]
        np.testing.assert_allclose(gradient, (value(*moved) - value(a, b)) / 1e-6, rtol=1e-5)


def test_unbalanced_totals_far_apart():
    """A weak penalty on one constant in the potentials: hundreds of steps, were it left to the iteration."""
    cost, a, b = C[:3, :4], np.full(3, 1 / 3), np.full(4, 1 / 4)
    lanes = [(cost, a, total * b, 0.01, rho) for total in (1.1, 100.0) for rho in (1e2, 1e4)]
    node = lambda C, a, b, epsilon, rho: dn.EntropicTransport(epsilon, rho=rho, throw=False).solve(C, a, b)
    solution = jax.jit(jax.vmap(node))(*(jnp.asarray(np.stack(part)) for part in zip(*lanes, strict=True)))
    assert status(solution) == [""] * 4
    assert np.max(solution.stats["steps"]) < 30
    np.testing.assert_allclose(
        np.sum(np.asarray(solution.value)[[1, 3]], axis=(1, 2)), np.sqrt([1.1, 100.0]), rtol=2e-3
    )


def test_loss_of_a_confident_plan_in_float32():
    """-log P of the pairs that are right: the potentials' cotangent is nothing but rounding, if it is formed as a difference."""
    cost = 8 * np.random.default_rng(0).uniform(size=(60, 4, 4))

    def loss(C):
        return -jnp.mean(jnp.log(jnp.diagonal(4 * dn.EntropicTransport(0.2, throw=False)(C))))

    exact, rounded = (jax.jit(jax.vmap(jax.grad(loss)))(jnp.asarray(cost, dtype)) for dtype in (np.float64, np.float32))
    assert np.max(np.abs(exact)) > 1
    np.testing.assert_allclose(rounded, exact, atol=2e-4)


def test_potentials_and_minimum():
    """The plan from the potentials; the minimum by the definition; its gradient, the plan itself."""
    for rho in (None, 0.4):
        step = 1e-6
        usual = CASES["usual"]
        near = [(*usual[:3], usual[3] + sign * step) for sign in (1, -1)]
        solution = solve([usual, CASES["forbidden pairs"], *near], rho)
        for k, name in enumerate(("usual", "forbidden pairs")):
            cost, a, b, epsilon = CASES[name]
            P, (f, g) = np.asarray(solution.value[k]), (np.asarray(part[k]) for part in solution.dual)
            np.testing.assert_allclose(P, a[:, None] * b * np.exp((f[:, None] + g - cost) / epsilon), rtol=1e-12)
            kl = lambda p, q: np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / q), 0) - p + q)
            want = np.sum(np.where(P > 0, cost, 0) * P) + epsilon * kl(P, a[:, None] * b)
            if rho is None:
                np.testing.assert_allclose(a @ f, b @ g, rtol=1e-12)
            else:
                want += rho * (kl(P.sum(1), a) + kl(P.sum(0), b))
            np.testing.assert_allclose(solution.objective[k], want, rtol=1e-12)
        difference = (solution.objective[2] - solution.objective[3]) / (2 * step)
        if rho is None:
            minimum = lambda C, a, b, epsilon: dn.EntropicTransport(epsilon).solve(C, a, b).objective
            for_C, for_epsilon = jax.jit(jax.grad(minimum, (0, 3)))(*map(jnp.asarray, usual))
            np.testing.assert_allclose(for_C, solution.value[0], rtol=RTOL)
            np.testing.assert_allclose(for_epsilon, difference, rtol=1e-7)


def test_small_epsilon_against_the_linear_program():
    """The bound of the entropy, 0 <= <C, P> - min <= epsilon KL(P* | ab'), down to epsilon at a millionth of the costs."""
    equations = np.concatenate([np.kron(np.eye(N), np.ones(M)), np.kron(np.ones(N), np.eye(M))])
    program = scipy.optimize.linprog(C.ravel(), A_eq=equations, b_eq=np.concatenate([A, B]), method="highs")
    best = program.x.reshape(N, M)
    divergence = np.sum(np.where(best > 1e-12, best * np.log(np.maximum(best, 1e-12) / (A[:, None] * B)), 0))
    shares = np.array([1e-2, 1e-3, 1e-4, 1e-6]) * np.max(C)
    solution = solve([(C, A, B, share) for share in shares])
    assert status(solution) == [""] * 4
    gaps = np.sum(np.asarray(solution.value) * C, axis=(1, 2)) - program.fun
    assert np.all(gaps >= -1e-9 * program.fun)
    assert np.all(gaps <= shares * divergence + 1e-9 * program.fun)
    np.testing.assert_allclose(np.sum(solution.value, axis=2), np.broadcast_to(A, (4, N)), rtol=1e-12)
    np.testing.assert_allclose(np.sum(solution.value, axis=1), np.broadcast_to(B, (4, M)), rtol=1e-7)
    assert np.max(solution.stats["steps"]) < 150


def test_float32():
    """Right to what rounding the costs does; below, a status and no plan."""
    names = ("smooth", "usual", "sharp", "forbidden pairs", "large costs", "small masses")
    cases = [*(CASES[name] for name in names), (C, A, B, 1e-3)]
    solution = solve([*cases, (C, A, B, 1e-6)], dtype=np.float32)
    assert solution.value.dtype == np.float32
    assert status(solution) == [""] * len(cases) + [name_of("not_a_solution")]
    for case, plan in zip(cases, solution.value, strict=False):
        rounded = [np.asarray(part, np.float32).astype(np.float64) for part in case]
        want, total = sinkhorn(*rounded), np.sum(case[1])
        spread = np.ptp(case[0][np.isfinite(case[0])]) / case[3]
        np.testing.assert_allclose(plan, want, atol=total * (1e-6 + 2e-7 * spread))
        np.testing.assert_allclose(np.sum(plan, axis=1), case[1], rtol=1e-5)


def test_statuses():
    two_for_one = at(C, ((0, slice(1, None)), INF), ((1, slice(1, None)), INF))  # rows 0 and 1 may use column 0 only
    alone = at(C, (0, INF))
    cases = {
        "infeasible": [
            (C, A, 2 * B),
            (alone, A, B),
            (at(C, ((slice(None), 1), INF)), A, B),
            (PARTS, A, B),
            (C, A, 0 * B),
        ],
        "empty": [(C, 0 * A, 0 * B)],
        "nonfinite_data": [
            (C, -A, B),
            (at(C, ((0, 0), -INF)), A, B),
            (C, at(A, (0, INF)), B),
            (C, A, at(B, (0, np.nan))),
        ],
        "nonlinear_max_steps_reached": [(two_for_one, A, B)],
    }
    flat = [(name, case) for name, group in cases.items() for case in group]
    wrong = [(C, A, B, epsilon) for epsilon in (0.0, -1.0, np.inf, np.nan)]
    solution = solve([*((*case, 0.1) for _, case in flat), *wrong])
    assert status(solution) == [*(name_of(name) for name, _ in flat), *[name_of("nonfinite_data")] * 4]
    # With `rho` what cannot be sent is left behind.
    solution = solve([(alone, A, B, 0.1), (C, A, 0 * B, 0.1), (INF * np.ones((N, M)), A, B, 0.1)], 0.3)
    assert status(solution) == [""] * 3
    np.testing.assert_allclose(solution.value[0][1:], sinkhorn(C[1:], A[1:], B, 0.1, 0.3), rtol=1e-12)
    assert np.all(solution.value[0][0] == 0)
    assert np.all(solution.value[1:] == 0)
    np.testing.assert_allclose(solution.objective[2], 0.3 * 2 + 0.1, rtol=1e-12)


@pytest.mark.slow
def test_one_row_or_column():
    transport = dn.EntropicTransport(0.1)
    np.testing.assert_allclose(transport(jnp.ones((1, 1))), 1)
    np.testing.assert_allclose(transport(jnp.asarray(C[:1])), np.full((1, M), 1 / M), rtol=1e-14)
    np.testing.assert_allclose(transport(jnp.asarray(C[:, :1]), 3 * jnp.asarray(A)), 3 * A[:, None], rtol=1e-14)


@pytest.mark.slow
def test_kl_projections():
    """Row and column scalings of exp(S), with the sums that were asked for."""
    S = jnp.asarray(RNG.normal(size=(N, M)))
    P = dn.kl_projection_transport(S, (jnp.asarray(A), jnp.asarray(B)))
    np.testing.assert_allclose(np.sum(P, axis=1), A, rtol=RTOL)
    np.testing.assert_allclose(np.sum(P, axis=0), B, rtol=RTOL)
    scaling = np.log(P) - S
    scaling = scaling - scaling[:, :1]
    np.testing.assert_allclose(scaling, np.broadcast_to(scaling[:1], (N, M)), atol=RTOL)
    Q = dn.kl_projection_birkhoff(S[:, :N])
    np.testing.assert_allclose([np.sum(Q, axis=0), np.sum(Q, axis=1)], np.ones((2, N)), rtol=RTOL)
    assert np.all(np.isnan(dn.kl_projection_transport(S, (jnp.asarray(A), 2 * jnp.asarray(B)))))
    with pytest.raises(ValueError, match="square"):
        dn.kl_projection_birkhoff(S)


# Euclidean projections


@ft.cache
def projected():
    return jax.jit(jax.vmap(lambda X, a, b: dn.Projection(dn.TransportPolytope(a, b), throw=False).solve(X)))


def project(X, a, b, dtype: type = np.float64):
    count = len(X)
    padded = [np.concatenate([array, np.repeat(array[:1], LANES + 1 - count, axis=0)]) for array in (X, a, b)]
    solution = projected()(*(jnp.asarray(array, dtype) for array in padded))
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:count], solution)


def certified(X, a, b, solution, tol):
    """(K1)-(K2), which are necessary and sufficient: any P that satisfies them is the projection. `tol` is of the largest mass."""
    P, (f, g) = np.asarray(solution.value), (np.asarray(part) for part in solution.unknown.multiplier)
    size = np.maximum(a.max(axis=1), b.max(axis=1))[:, None]
    assert np.min(P) >= 0
    assert np.all(np.abs(P.sum(2) - a) <= tol * size)
    assert np.all(np.abs(P.sum(1) - b) <= tol * size)
    gaps = X - f[:, :, None] - g[:, None, :]
    live = (a > 0)[:, :, None] & (b > 0)[:, None, :]
    rounding = 8 * np.finfo(X.dtype).eps * (np.abs(X).max((1, 2)) + np.abs(f).max(1) + np.abs(g).max(1))
    error = np.where(live, np.abs(P - np.maximum(gaps, 0)), P).max((1, 2))
    assert np.all(error <= rounding + tol * size[:, 0])


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((9, 6), np.float64),
        pytest.param((6, 9), np.float64, marks=pytest.mark.full),
        pytest.param((9, 6), np.float32, marks=pytest.mark.slow),
    ],
)
def test_projections_have_a_certificate(shape, dtype):
    """From nearly uniform plans to vertices; masses that are alike, uneven, or zero; ties."""
    rng = np.random.default_rng(3)
    n, m = shape
    scales = [0.01, 1, 10, 100, *([] if dtype == np.float32 else [1e4, 1e6])]
    lanes = []
    for scale in scales:
        X = scale * rng.standard_normal((n, m))
        lanes += [(X, np.full(n, 1 / n), np.full(m, 1 / m)), (X, rng.dirichlet(np.ones(n)), rng.dirichlet(np.ones(m)))]
    X, a, b = lanes[3]
    lanes += [
        (X, summing_to(at(a, (2, 0)), 1), summing_to(at(b, (0, 0), (3, 0)), 1)),
        (0 * X, a, b),
        (np.round(X), np.full(n, 1.0 * m), np.full(m, 1.0 * n)),
        (1e8 * X, 1e8 * a, 1e8 * b),
        (1e-8 * X, 1e-8 * a, 1e-8 * b),
        (X + 50 * np.arange(n)[:, None] - 30 * np.arange(m), a, b),
    ]
    X, a, b = (np.stack([lane[k] for lane in lanes]).astype(dtype) for k in range(3))
    bad = np.concatenate([X, X[:1] * np.nan]), np.concatenate([a, a[:1]]), np.concatenate([b, b[:1]])
    solution = project(*bad, dtype)
    assert status(solution) == [""] * len(X) + [name_of("nonfinite_data")]
    assert np.all(np.isnan(solution.value[-1]))
    solution = jax.tree.map(lambda leaf: leaf[:-1], solution)
    certified(X, a, b, solution, 1e-9 if dtype == np.float64 else 3e-4)
    assert np.max(solution.stats["steps"]) < 40


@pytest.mark.slow
def test_projection_against_enumeration_and_assignment():
    X = RNG.normal(size=(3, 3))
    want = nearest(np.ones(3), np.ones(3))(dn.ProjectionData(jnp.asarray(X)))
    np.testing.assert_allclose(dn.projection_birkhoff(jnp.asarray(X)), want, atol=1e-12)
    a, b = np.array([0.7, 0.5]), np.array([0.3, 0.4, 0.5])
    want = nearest(a, b)(dn.ProjectionData(jnp.asarray(X[:2])))
    got = dn.projection_transport(jnp.asarray(X[:2]), (jnp.asarray(a), jnp.asarray(b)))
    np.testing.assert_allclose(got, want, atol=1e-12)
    far = 1e3 * RNG.normal(size=(9, 9))
    P, pullback = jax.vjp(dn.projection_birkhoff, jnp.asarray(far))
    best = np.zeros((9, 9))
    best[scipy.optimize.linear_sum_assignment(far, maximize=True)] = 1
    np.testing.assert_array_equal(P > 0, best > 0)
    np.testing.assert_allclose(P, best, atol=1e-12)
    np.testing.assert_allclose(pullback(jnp.asarray(far))[0], 0, atol=1e-9)  # a vertex does not move


@pytest.mark.slow
def test_derivatives_of_projections():
    """Both modes against differences, in X and in masses that keep their total; the support of a generic plan of this size is connected."""
    rng = np.random.default_rng(4)
    lanes = 5
    X, dX = rng.normal(size=(2, lanes, 9, 6))
    a, b = (rng.dirichlet(np.full(k, 5.0), size=lanes) for k in (9, 6))
    X, dX = 0.05 * X, 0.05 * dX
    da, db = (mass * rng.normal(size=mass.shape) for mass in (a, b))
    da, db = (d - mass * d.sum(1, keepdims=True) for d, mass in ((da, a), (db, b)))
    weights = rng.normal(size=X.shape)
    node = lambda X, a, b: dn.projection_transport(X, (a, b))

    def both(x, dx, w):
        P, forward = jax.jvp(node, x, dx)
        return P, forward, jax.vjp(node, *x)[1](w)

    x, dx = (tuple(map(jnp.asarray, group)) for group in ((X, a, b), (dX, da, db)))
    P, forward, reverse = jax.jit(jax.vmap(both))(x, dx, jnp.asarray(weights))
    assert 0.3 < np.mean(P > 0) < 0.9
    batched, step = jax.jit(jax.vmap(node)), 1e-6
    moved = [batched(*(v + sign * step * d for v, d in zip(x, dx, strict=True))) for sign in (1, -1)]
    np.testing.assert_allclose(forward, (moved[0] - moved[1]) / (2 * step), atol=1e-7)
    sides = sum(np.sum(g * d, axis=tuple(range(1, d.ndim))) for g, d in zip(reverse, dx, strict=True))
    np.testing.assert_allclose(sides, np.sum(weights * forward, axis=(1, 2)), rtol=1e-9)


def test_multipliers_of_rows_and_columns_without_mass():
    X, a, b = np.array([[1.0, 2, 0], [0.5, 0, 1], [0, 0, 3]]), np.array([0.0, 1, 0]), np.array([0.2, 0, 0.8])
    for transposed in (False, True):
        data = (X.T, b, a) if transposed else (X, a, b)
        node = lambda x, a, b, **options: dn.Projection(dn.TransportPolytope(a, b), **options)(x)
        solution = dn.Projection(dn.TransportPolytope(*map(jnp.asarray, data[1:]))).solve(jnp.asarray(data[0]))
        Xs, rows, columns = (part[None] for part in data)
        certified(Xs, rows, columns, jax.tree.map(lambda leaf: leaf[None], solution), 1e-12)
        assert solution.stats["residual"] < 1e-12
        slopes = [
            jax.grad(lambda x: jnp.sum(node(x, *data[1:], adjoint=adjoint) ** 2))(jnp.asarray(data[0]))  # noqa: B023
            for adjoint in (None, dn.ImplicitAdjoint())
        ]
        np.testing.assert_allclose(*slopes, atol=1e-12)


def test_infeasible_and_misused_projections():
    a, b = np.full(9, 1 / 9), np.full(6, 1 / 6)
    X = RNG.normal(size=(9, 6))
    minus = at(a, (0, -1 / 9), (1, 3 / 9))
    solution = project(np.stack([X] * 3), np.stack([a, minus, 2 * a]), np.stack([b, b, b]))
    assert status(solution) == ["", name_of("infeasible"), name_of("infeasible")]
    with pytest.raises(ValueError, match="9 and 6 entries"):
        dn.projection_transport(jnp.ones((6, 9)), (jnp.asarray(a), jnp.asarray(b)))
    with pytest.raises(ValueError, match="one square matrix"):
        dn.projection_birkhoff(jnp.ones((6, 9)))
    with pytest.raises(ValueError, match="has none"):
        dn.Projection(dn.Birkhoff(), adjoint=dn.UnrolledAdjoint())


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: dn.EntropicTransport(0.0), "epsilon must be positive"),
        (lambda: dn.EntropicTransport(0.1, rho=float("inf")), "rho must be positive"),
        (lambda: dn.EntropicTransport(jnp.ones(2)), "scalar array"),
        (lambda: dn.EntropicTransport(0.1)(jnp.ones(3)), "use `jax.vmap`"),
        (lambda: dn.EntropicTransport(0.1)(jnp.ones((3, 2), int)), "floating"),
        (lambda: dn.EntropicTransport(0.1)(jnp.ones((3, 2)), jnp.ones(2)), "one mass for each row"),
        (
            lambda: dn.EntropicTransport(0.1)(jnp.ones((3, 2)), None, jnp.ones(2, jnp.float32)),
            "one mass for each column",
        ),
    ],
)
def test_misuse(call, match):
    with pytest.raises(ValueError, match=match):
        call()
