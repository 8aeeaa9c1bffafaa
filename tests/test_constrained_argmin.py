"""The general constrained argmin: known optima, closed forms, degenerate and hostile problems, agreement with other nodes."""

# pyright: reportArgumentType=false

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

import declarative as dn

from .programs import program

# Hock & Schittkowski 1981, those that are polynomials: terms (coefficient, exponents) of f, of h and of g (<= 0), the start, f*.
X1, X2, X3, X4 = np.eye(4, dtype=int)
ONE = np.zeros(4, int)
HS = {
    6: ([(1, ONE), (-2, X1), (1, 2 * X1)], [[(10, X2), (-10, 2 * X1)]], [], [-1.2, 1, 0, 0], 0.0),
    28: (
        [(1, 2 * X1), (2, X1 + X2), (2, 2 * X2), (2, X2 + X3), (1, 2 * X3)],
        [[(1, X1), (2, X2), (3, X3), (-1, ONE)]],
        [],
        [-4, 1, 1, 0],
        0.0,
    ),
    35: (
        [(9, ONE), (-8, X1), (-6, X2), (-4, X3), (2, 2 * X1), (2, 2 * X2), (1, 2 * X3), (2, X1 + X2), (2, X1 + X3)],
        [],
        [[(1, X1), (1, X2), (2, X3), (-3, ONE)], [(-1, X1)], [(-1, X2)], [(-1, X3)]],
        [0.5, 0.5, 0.5, 0],
        1 / 9,
    ),
    39: (
        [(-1, X1)],
        [[(1, X2), (-1, 3 * X1), (-1, 2 * X3)], [(1, 2 * X1), (-1, X2), (-1, 2 * X4)]],
        [],
        [2, 2, 2, 2],
        -1.0,
    ),
    40: (
        [(-1, X1 + X2 + X3 + X4)],
        [[(1, 3 * X1), (1, 2 * X2), (-1, ONE)], [(1, 2 * X1 + X4), (-1, X3)], [(1, 2 * X4), (-1, X2)]],
        [],
        [0.8, 0.8, 0.8, 0.8],
        -0.25,
    ),
    43: (
        [(1, 2 * X1), (1, 2 * X2), (2, 2 * X3), (1, 2 * X4), (-5, X1), (-5, X2), (-21, X3), (7, X4)],
        [],
        [
            [(1, 2 * e) for e in (X1, X2, X3, X4)] + [(1, X1), (-1, X2), (1, X3), (-1, X4), (-8, ONE)],
            [(1, 2 * X1), (2, 2 * X2), (1, 2 * X3), (2, 2 * X4), (-1, X1), (-1, X4), (-10, ONE)],
            [(2, 2 * X1), (1, 2 * X2), (1, 2 * X3), (2, X1), (-1, X2), (-1, X4), (-5, ONE)],
        ],
        [0, 0, 0, 0],
        -44.0,
    ),
    71: (
        [(1, 2 * X1 + X4), (1, X1 + X2 + X4), (1, X1 + X3 + X4), (1, X3)],
        [[(1, 2 * e) for e in (X1, X2, X3, X4)] + [(-40, ONE)]],
        [[(25, ONE), (-1, X1 + X2 + X3 + X4)], *([(1, ONE), (-1, e)] for e in (X1, X2, X3, X4))]
        + [[(1, e), (-5, ONE)] for e in (X1, X2, X3, X4)],
        [1, 5, 5, 1],
        17.0140173,
    ),
}


def encode(rows, number, unused=()):
    """Coefficients (number, 10) and exponents (number, 10, 4) of polynomials, padded by zeros."""
    coefficients, exponents = np.zeros((number, 10)), np.zeros((number, 10, 4), int)
    for i, row in enumerate(rows):
        for j, (c, e) in enumerate([*row, *((1.0, 2 * unit) for unit in unused)]):
            coefficients[i, j], exponents[i, j] = c, e
    return coefficients, exponents


def polynomial(block, y):
    coefficients, exponents = block
    powers = jnp.stack([jnp.ones_like(y), y, y**2, y**3])
    picked = jnp.take_along_axis(powers, exponents.reshape(-1, 4), axis=0).reshape(exponents.shape)
    return jnp.sum(coefficients * jnp.prod(picked, axis=-1), axis=-1)


POLYNOMIAL = dn.ConstrainedArgmin(
    lambda y, x: polynomial(x[0], y)[0],
    lambda y, x: polynomial(x[1], y),
    lambda y, x: polynomial(x[2], y),
    throw=False,
)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_known_optima(dtype):
    batch = []
    for f, h, g, start, _ in HS.values():
        used = np.sum([e for row in [f, *h, *g] for _, e in row], axis=0)
        free = [unit for unit, count in zip(np.eye(4, dtype=int), used, strict=True) if count == 0]
        batch.append(((encode([f], 1, free), encode(h, 3), encode(g, 9)), np.array(start, float)))
    cast = lambda leaf: jnp.asarray(leaf, dtype) if leaf.dtype == float else jnp.asarray(leaf, jnp.int32)
    x, y0 = jax.tree.map(lambda *leaves: cast(np.stack(leaves)), *batch)
    solution = jax.jit(jax.vmap(lambda x, y0: POLYNOMIAL.solve(x, y0=y0)))(x, y0)
    assert np.all(np.asarray(solution.result._value) == 0), solution.report()
    best = np.array([optimum for *_, optimum in HS.values()])
    tol = 1e-9 if dtype == np.float64 else 1e-5
    # HS71's optimum is known to nine digits.
    np.testing.assert_allclose(solution.objective, best, rtol=max(tol, 1e-8), atol=tol)
    assert np.max(np.asarray(solution.stats["steps"])) < 150


# One family for everything small: f = y'Qy/2 + q'y, rows A y = b, rows G y <= h, and |y|^2 <= r where r is finite.
def quadratic(y, x):
    return y @ (x["Q"] @ y) / 2 + x["q"] @ y


def family(**options):
    return dn.ConstrainedArgmin(
        quadratic,
        lambda y, x: x["A"] @ y - x["b"],
        lambda y, x: (
            x["G"] @ y - x["h"],
            jnp.where(jnp.isfinite(x["r"]), x["c"] * (y @ y - x["r"]), -1.0).astype(y.dtype),
        ),
        **{"throw": False, **options},
    )


def data(Q=((0, 0), (0, 0)), q=(1, 2), A=((0, 0),), b=(0,), G=((0, 0), (0, 0)), h=(1, 1), r=np.inf, c=1.0):
    return {name: np.asarray(block, float) for name, block in locals().items()}


HOSTILE = {
    # name: (data, y0, status, y or None)
    "vertex": (data(G=((-1, 0), (0, -1)), h=(1, 3)), (3, 4), "successful", (-1, -3)),
    "nothing active": (data(Q=((2, 0), (0, 4)), G=((1, 0), (0, 1)), h=(9, 9)), (3, 4), "successful", (-0.5, -0.5)),
    "twice the same row": (data(Q=np.eye(2), G=((-1, 0), (-2, 0)), h=(-3, -6)), (0, 0), "successful", (3, -2)),
    "no objective": (data(q=(0, 0), A=((1, 1),), b=(4,)), (1, 3), "successful", None),
    "inconsistent": (data(q=(1, 0), Q=np.eye(2), G=((1, 0), (-1, 0)), h=(-1, -1)), (0.3, 0.1), "infeasible", None),
    "a ball of negative radius": (data(Q=np.eye(2), r=-1.0), (0.3, 0.1), "infeasible", None),
    "inconsistent from a stationary point": (data(Q=np.eye(2), q=(0, 0), r=-1.0), (0, 0), "infeasible", None),
    "downhill for ever": (data(G=((1, 0), (0, 0))), (0.3, 0.1), "unbounded", None),
    "concave for ever": (data(Q=-np.eye(2), G=((1, 0), (0, 0))), (0.3, 0.1), "unbounded", None),
    "linear on a disc": (data(r=1.0), (0.1, 0.2), "successful", (-(5**-0.5), -2 * 5**-0.5)),
    "from the maximum": (data(r=1.0), (5**-0.5, 2 * 5**-0.5), "successful", (-(5**-0.5), -2 * 5**-0.5)),
    "concave on a disc": (data(Q=((-2, 0), (0, -4)), q=(0.3, 0.5), r=1.0), (0.0, 0.0), "successful", None),
    "far outside": (data(r=1.0), (1e4, -3e4), "successful", (-(5**-0.5), -2 * 5**-0.5)),
    "tiny objective, huge constraint": (
        data(q=(1e-8, 2e-8), r=1.0, c=1e8),
        (0.1, 0.2),
        "successful",
        (-(5**-0.5), -2 * 5**-0.5),
    ),
    "huge objective, tiny constraint": (
        data(q=(1e8, 2e8), r=1.0, c=1e-8),
        (0.1, 0.2),
        "successful",
        (-(5**-0.5), -2 * 5**-0.5),
    ),
    "huge unknowns": (data(r=1e16), (1e7, 2e7), "successful", (-1e8 * 5**-0.5, -2e8 * 5**-0.5)),
    "tiny unknowns": (data(r=1e-16), (1e-9, 2e-9), "successful", (-1e-8 * 5**-0.5, -2e-8 * 5**-0.5)),
    "not a number": (data(q=(np.nan, 1), r=1.0), (0.1, 0.2), "nonfinite_data", None),
}


@pytest.mark.parametrize("dtype", [np.float64, pytest.param(np.float32, marks=pytest.mark.full)])
def test_hostile(dtype):
    x = {name: jnp.asarray(np.stack([case[0][name] for case in HOSTILE.values()]), dtype) for name in data()}
    y0 = jnp.asarray([case[1] for case in HOSTILE.values()], dtype)
    solution = jax.jit(jax.vmap(lambda x, y0: family().solve(x, y0=y0)))(x, y0)
    ends = [dn.RESULTS._index_to_message[int(code)] for code in solution.result._value]
    tol = 1e-11 if dtype == np.float64 else 3e-5
    wrong = []
    for i, (name, (_, _, status, y)) in enumerate(HOSTILE.items()):
        if ends[i] != dn.RESULTS[getattr(dn.RESULTS, status)]:
            wrong.append(f"{name}: {ends[i][:60]}")
        elif y is not None and not np.allclose(solution.value[i], y, rtol=tol, atol=tol * np.max(np.abs(y))):
            wrong.append(f"{name}: {solution.value[i]}")
    assert not wrong, "\n".join(wrong)
    assert np.all(np.asarray(solution.dual.inequality[0])[[0, 1, 2]] >= 0)


POINT = jnp.array([1.0, 2.0, -0.5])


def test_given_solutions_differentiate_as_solved_ones_and_wrong_ones_are_told():
    """Projection onto the sphere: the Hessian of f is 2I, that of the Lagrangian 2(1 + nu)I; J = (I - uu')/|x|."""
    distance, sphere = lambda y, x: jnp.sum((y - x) ** 2), lambda y, x: jnp.sum(y**2) - 1
    r = jnp.linalg.norm(POINT)
    u = POINT / r
    exact = (jnp.eye(3) - jnp.outer(u, u)) / r
    given = dn.ConstrainedArgmin(distance, sphere, solver=dn.GivenSolution(), throw=False)
    jacobian = jax.jit(
        jax.vmap(lambda y: (given.solve(POINT, y0=y).result._value, jax.jacrev(lambda x: given(x, y0=y))(POINT)))
    )
    codes, jacobians = jacobian(jnp.stack([u, -u, u + 1e-3]))
    assert [dn.RESULTS._index_to_message[int(code)] for code in codes] == [
        dn.RESULTS[dn.RESULTS.successful],
        dn.RESULTS[dn.RESULTS.indefinite],
        dn.RESULTS[dn.RESULTS.not_a_solution],
    ]
    np.testing.assert_allclose(jacobians[0], exact, atol=1e-13)
    assert np.all(np.isnan(jacobians[1:]))


def test_indefinite_hessian_with_positive_reduced_hessian():
    """min y'Hy/2 + x'y on a plane, H indefinite: the bordered solve is right where a Cholesky factor of H does not exist."""
    H = jnp.diag(jnp.array([3.0, 2.0, -1.0]))
    node = dn.ConstrainedArgmin(lambda y, x: y @ (H @ y) / 2 + x @ y, lambda y, x: y[2] - 0.3 * (y[0] + y[1]) - x[0])
    a = np.array([[-0.3, -0.3, 1.0]])
    system = np.block([[np.asarray(H), a.T], [a, np.zeros((1, 1))]])
    moved = np.vstack([-np.eye(3), [[1.0, 0.0, 0.0]]])
    solution, jacobian = jax.jit(
        lambda x: (node.solve(x, y0=jnp.zeros(3)).value, jax.jacrev(lambda x: node(x, y0=jnp.zeros(3)))(x))
    )(POINT)
    np.testing.assert_allclose(jacobian, np.linalg.solve(system, moved)[:3], atol=1e-12)
    np.testing.assert_allclose(solution, np.linalg.solve(system, np.append(-POINT, POINT[0]))[:3], atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("dependent", [False, True])
def test_dependent_constraints(dependent):
    distance = lambda y, x: jnp.sum((y - x) ** 2)
    repeated = lambda y, x: {"a": jnp.sum(y) - 1, "b": 3 * jnp.sum(y) - 3}
    node = dn.ConstrainedArgmin(distance, repeated, dependent=dependent, throw=False)
    reverse = jax.jacrev(lambda x: node(x, y0=jnp.ones(3)))(POINT)
    forward = jax.jacfwd(lambda x: node(x, y0=jnp.ones(3)))(POINT)
    for jacobian in (forward, reverse):
        if dependent:
            np.testing.assert_allclose(jacobian, np.eye(3) - 1 / 3, atol=1e-12)
        else:
            assert np.all(np.isnan(jacobian))
    # Data that move the two apart have no derivative, and forward mode says so.
    apart = dn.ConstrainedArgmin(
        distance, lambda y, t: jnp.stack([jnp.sum(y) - 1, jnp.sum(y) - 1 - t]), dependent=dependent, throw=False
    )
    _, tangent = jax.jvp(lambda t: apart(t, y0=jnp.ones(3)), (jnp.zeros(()),), (jnp.ones(()),))
    assert np.all(np.isnan(tangent))


@pytest.mark.slow
def test_minimisers_that_are_not_unique():
    A = jnp.array([[1.0, 2.0, 0.5], [0.0, 1.0, -1.0]])
    fit = lambda y, b: jnp.sum((A @ y - b) ** 2)
    b, y0 = jnp.array([1.0, 2.0]), jnp.ones(3)
    flagged = dn.ConstrainedArgmin(fit, throw=False)
    assert np.all(np.isnan(jax.jacrev(lambda b: flagged(b, y0=y0))(b)))
    node = dn.ConstrainedArgmin(fit, minimum_norm=True, throw=False)
    for mode in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(mode(lambda b: node(b, y0=y0))(b), np.linalg.pinv(A), atol=1e-12)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        jax.hessian(lambda b: jnp.sum(node(b, y0=y0)))(b)
    # A datum that ends the degeneracy has no derivative.
    tilted = dn.ConstrainedArgmin(lambda y, t: y[0] ** 2 + t * y[1], minimum_norm=True, throw=False)
    _, tangent = jax.jvp(lambda t: tilted(t, y0=jnp.ones(2)), (jnp.zeros(()),), (jnp.ones(()),))
    assert np.all(np.isnan(tangent))


@pytest.mark.slow
def test_agrees_with_the_quadratic_program():
    programs = [program(seed, n=5, m=4, p=2, bounds=False) for seed in range(4)]
    x = jax.tree.map(lambda *leaves: jnp.stack(leaves), *programs)
    node = dn.ConstrainedArgmin(
        lambda y, x: y @ (x.Q @ y) / 2 + x.q @ y, lambda y, x: x.A @ y - x.b, lambda y, x: x.G @ y - x.h
    )
    weights = jnp.cos(jnp.arange(5.0))

    def outputs(solve):
        def scalar(x):
            solution = solve(x)
            duals = solution.dual
            total = weights @ solution.value + jnp.sum(jnp.sin(duals.equality)) + jnp.sum(duals.inequality**2)
            return total + solution.objective, (solution.value, duals.equality, duals.inequality)

        return jax.jit(jax.vmap(jax.value_and_grad(scalar, has_aux=True)))(x)

    ours = outputs(lambda x: node.solve(x, y0=jnp.zeros(5)))
    theirs = outputs(lambda x: dn.QuadraticProgram().solve(x))
    symmetric = lambda out: jax.tree.map(
        lambda leaf: leaf + jnp.swapaxes(leaf, -1, -2) if leaf.shape[1:] == (5, 5) else leaf, out
    )
    for left, right in zip(jax.tree.leaves(symmetric(ours)), jax.tree.leaves(symmetric(theirs)), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-8, atol=1e-8)


def test_wrong_arguments_are_named():
    objective = lambda y, x: jnp.sum((y - x) ** 2)
    with pytest.raises(ValueError, match="ImplicitAdjoint"):
        dn.ConstrainedArgmin(objective, adjoint=dn.UnrolledAdjoint())
    with pytest.raises(ValueError, match="minimum_norm"):
        dn.ConstrainedArgmin(objective, adjoint=dn.ImplicitAdjoint(), minimum_norm=True)
    with pytest.raises(ValueError, match="y0"):
        dn.ConstrainedArgmin(objective)(POINT)
    with pytest.raises(ValueError, match="scalar"):
        dn.ConstrainedArgmin(lambda y, x: y)(POINT, y0=POINT)
    with pytest.raises(ValueError, match="equality must return floating"):
        dn.ConstrainedArgmin(objective, lambda y, x: jnp.zeros(2, jnp.int32))(POINT, y0=POINT)
    with pytest.raises(ValueError, match="a `return` missing"):
        dn.ConstrainedArgmin(objective, inequality=lambda y, x: None)(POINT, y0=POINT)
    with pytest.raises((ValueError, TypeCheckError), match="make an instance|'solver'"):
        dn.ConstrainedArgmin(objective, solver=dn.GivenSolution)  # pyright: ignore[reportArgumentType]  (what is tested)
    with pytest.raises(ValueError, match="y0.equality"):
        dn.ConstrainedArgmin(objective, lambda y, x: y)(POINT, y0=dn.LagrangePoint(POINT, jnp.zeros(2)))


def against_slsqp(y, x):
    """A quartic bowl, tilted by x, in a shell that is not convex."""
    return jnp.sum((y - x) ** 2) + 0.1 * jnp.sum(y**4) + 0.3 * y[0] * y[1]


@pytest.mark.full
def test_agrees_with_slsqp_and_with_the_plain_argmin():
    import scipy.optimize

    inner, outer = (lambda y, x: 1 - y @ y), (lambda y, x: y @ y - 4)
    node = dn.ConstrainedArgmin(
        against_slsqp, inequality=lambda y, x: jnp.stack([inner(y, x), outer(y, x)]), throw=False
    )
    x = jnp.asarray(
        np.random.default_rng(0).standard_normal((6, 4)) * np.array([[0.2], [0.4], [1.0], [2.0], [4.0], [8.0]])
    )
    start = jnp.sign(x) * 0.8
    solution = jax.jit(jax.vmap(lambda x, y0: node.solve(x, y0=y0)))(x, start)
    assert np.all(np.asarray(solution.result._value) == 0), solution.report()
    value, slope = jax.jit(against_slsqp), jax.jit(jax.grad(against_slsqp))
    for point, data, y0 in zip(solution.value, x, start, strict=True):
        found = scipy.optimize.minimize(
            lambda y, data=data: float(value(jnp.asarray(y), data)),
            np.asarray(y0),
            jac=lambda y, data=data: np.asarray(slope(jnp.asarray(y), data)),
            method="SLSQP",
            constraints={"type": "ineq", "fun": lambda y: np.array([y @ y - 1, 4 - y @ y])},
            options={"ftol": 1e-15, "maxiter": 500},
        )
        np.testing.assert_allclose(point, found.x, atol=1e-6)
    # Without constraints, and where they do not bind, it is `Argmin`, gradients included.
    free = dn.ConstrainedArgmin(against_slsqp, inequality=outer)
    plain = dn.Argmin(against_slsqp)
    data = jnp.array([0.3, -0.6, 0.2, 0.5])
    for f in (lambda node: node(data, y0=data), lambda node: jax.jacobian(lambda data: node(data, y0=data))(data)):
        np.testing.assert_allclose(f(free), f(plain), rtol=1e-7, atol=1e-9)


@pytest.mark.full
def test_rosenbrock_on_a_disc_and_problems_7_and_26():
    rosenbrock = lambda y, x: 100 * (y[1] - y[0] ** 2) ** 2 + (1 - y[0]) ** 2
    disc = dn.ConstrainedArgmin(rosenbrock, inequality=lambda y, r: y @ y - r**2)
    optimum = disc.solve(jnp.array(1.0), y0=jnp.array([-0.5, 0.5]))
    np.testing.assert_allclose(optimum.value, [0.786415151, 0.617698316], atol=1e-8)  # to nine digits
    slope = jax.jit(jax.grad(lambda r: rosenbrock(disc(r, y0=jnp.array([0.5, 0.5])), r)))(jnp.array(1.0))
    # The envelope theorem: the multiplier, times what the radius does to the constraint.
    np.testing.assert_allclose(slope, -2 * optimum.dual.inequality, rtol=1e-6)

    seven = dn.ConstrainedArgmin(
        lambda y, x: jnp.log1p(y[0] ** 2) - y[1], lambda y, x: (1 + y[0] ** 2) ** 2 + y[1] ** 2 - 4
    )
    np.testing.assert_allclose(seven(None, y0=jnp.array([2.0, 2.0])), [0, 3**0.5], atol=1e-7)

    # The Hessian of the Lagrangian is singular at the minimum of problem 26: found to what that allows, or told.
    flat = dn.ConstrainedArgmin(
        lambda y, x: (y[0] - y[1]) ** 2 + (y[1] - y[2]) ** 4,
        lambda y, x: (1 + y[1] ** 2) * y[0] + y[2] ** 4 - 3,
        throw=False,
    )
    solution = flat.solve(None, y0=jnp.array([-2.6, 2.0, 2.0]))
    found = bool(solution.result == dn.RESULTS.successful)
    assert not found or float(solution.objective) < 1e-10, solution.report()


@pytest.mark.full
def test_in_series_and_in_parallel():
    onto = dn.ConstrainedArgmin(lambda y, x: jnp.sum((y - x[0]) ** 2), lambda y, x: x[1] @ y**2 - 1)
    near = dn.ConstrainedArgmin(
        lambda y, x: jnp.sum((y - x) ** 2) + jnp.sum(y**4), inequality=lambda y, x: y[0] + y[1] - 1
    )

    def model(x, axes):
        first = onto((x, axes), y0=x)
        left, right = near(first, y0=first), onto((first + x, 2 * axes), y0=x)
        return jnp.sum(jnp.sin(left) * right)

    x, axes = jnp.array([0.9, 1.4, -0.5]), jnp.array([0.5, 1.0, 2.0])
    gradient = jax.jit(jax.grad(model, (0, 1)))(x, axes)
    value = jax.jit(model)
    for number, (data, slope) in enumerate(zip((x, axes), gradient, strict=True)):
        for i in range(3):
            shift = 1e-5 * jnp.eye(3)[i]
            ends = [value(*((x, axes + s * shift) if number else (x + s * shift, axes))) for s in (1, -1)]
            np.testing.assert_allclose(slope[i], (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-7)
        del data
