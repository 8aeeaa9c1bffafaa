"""Projections against exact programs and closed forms, at ties, at zero, at every scale; derivatives in both modes.

Each function is compiled once for a batch of hostile rows; what the check kit holds (one generic point of every set) is not repeated.
"""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jaxtyping import TypeCheckError

import declarative as dn
from declarative._solvers.section import section_root

from .programs import by_enumeration

N = 4
INF = np.inf


def program(x, **blocks):
    blocks = {name: jnp.asarray(block) for name, block in blocks.items()}
    return np.asarray(by_enumeration(dn.QuadraticProgramData(Q=jnp.ones(x.size), q=-jnp.asarray(x), **blocks)))


def signs(n):
    return np.array([[1.0 if k >> i & 1 else -1.0 for i in range(n)] for k in range(2**n)])


def rows():
    """Vectors of 4 with ties, zeros, and every size of entries relative to the sets."""
    rng = np.random.default_rng(0)
    special = [[0.0] * 4, [1.0] * 4, [0.5, 0.5, 0, 0], [-1.0, -1, -2, -2], [3.0, -3, 3, 0], [0.25] * 4, [0, 0, 0, 1.0]]
    return np.concatenate([special, rng.standard_normal((5, N)) * np.array([[0.1], [0.5], [1], [3], [30]])])


W = np.array([1.0, 0.5, 2.0, 0.3])
LOWER, UPPER = np.array([-0.5, 0.0, -0.2, -1.0]), np.array([0.5, 0.4, 0.9, 1.0])
MIXED = np.array([1.0, -0.5, 0.0, 2.0])  # weights of both signs, and none
A, B = np.array([[1.0, 2, 0, -1], [2.0, 4, 0, -2], [0, 1, 1, 1]]), np.array([0.5, 1.0, -0.3])  # rank 2
G, H = np.array([[1.0, 1, 1, 1], [1.0, -1, 0, 2], [0, 0, -1, 1]]), np.array([0.2, 0.5, 0.1])
ones = np.ones((1, N))
box_section = lambda x: dn.projection_box_section(x, (LOWER, UPPER, MIXED, 0.3))
POLYHEDRAL = {
    "simplex": (dn.projection_simplex, lambda x: program(x, A=ones, b=[1.0], lower=np.zeros(N))),
    "simplex 0.3": (lambda x: dn.projection_simplex(x, 0.3), lambda x: program(x, A=ones, b=[0.3], lower=np.zeros(N))),
    "capped": (
        lambda x: dn.projection_capped_simplex(x, 1.0, 0.4),
        lambda x: program(x, A=ones, b=[1.0], lower=np.zeros(N), upper=np.full(N, 0.4)),
    ),
    "section": (box_section, lambda x: program(x, A=MIXED[None], b=[0.3], lower=LOWER, upper=UPPER)),
    "l1 ball": (dn.projection_l1_ball, lambda x: program(x, G=signs(N), h=np.ones(16))),
    "weighted l1 ball": (
        lambda x: dn.projection_weighted_l1_ball(x, W, 0.7),
        lambda x: program(x, G=signs(N) * W, h=np.full(16, 0.7)),
    ),
    "affine": (lambda x: dn.projection_affine_set(x, (A, B)), lambda x: program(x, A=A[[0, 2]], b=B[[0, 2]])),
    "half-space": (lambda x: dn.projection_halfspace(x, (W, 0.2)), lambda x: program(x, G=W[None], h=[0.2])),
    "hyperplane": (lambda x: dn.projection_hyperplane(x, (W, 0.2)), lambda x: program(x, A=W[None], b=[0.2])),
}


@ft.cache
def compiled(name):
    return jax.jit(jax.vmap(POLYHEDRAL[name][0]))


@pytest.mark.parametrize("name", POLYHEDRAL)
def test_exact_program(name):
    """Against every active set, to rounding; and the same problem in other units, in float32 too."""
    x = rows()
    want = np.stack([POLYHEDRAL[name][1](row) for row in x])
    got = compiled(name)(jnp.asarray(x))
    np.testing.assert_allclose(got, want, atol=1e-13 * 30)
    if name != "affine":  # whose constants are not float32's
        low = compiled(name)(jnp.asarray(x, jnp.float32))
        assert low.dtype == jnp.float32
        np.testing.assert_allclose(low, want, atol=2e-6 * np.max(np.abs(x), initial=1))


@pytest.mark.parametrize("scale", [1e-8, 1e8])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_units(scale, dtype):
    """Everything that has a size is multiplied by one number; so is the projection."""

    def projections(x, s):
        eye = jnp.eye(2, dtype=dtype)
        matrix = x.reshape(2, 2)
        return [
            dn.projection_simplex(x, s),
            dn.projection_capped_simplex(x, s, 0.4 * s),
            dn.projection_box_section(
                x, (s * LOWER.astype(dtype), s * UPPER.astype(dtype), MIXED.astype(dtype), 0.3 * s)
            ),
            dn.projection_l1_ball(x, s),
            dn.projection_l1_sphere(x, s),
            dn.projection_l2_ball(x, s),
            dn.projection_l2_sphere(x, s),
            dn.projection_linf_ball(x, s),
            dn.projection_hyperplane(x, (W.astype(dtype), s)),
            dn.projection_affine_set(x, (A.astype(dtype) * s, B.astype(dtype) * s * s)),
            dn.projection_second_order_cone(x),
            dn.projection_positive_semidefinite(matrix) + 0 * eye,
            dn.projection_spectraplex(matrix, s),
        ]

    function = jax.jit(projections)
    x = jnp.asarray([0.9, -0.4, 0.7, 0.2], dtype)
    for got, want in zip(
        function(scale * x, jnp.asarray(scale, dtype)), function(x, jnp.asarray(1, dtype)), strict=True
    ):
        np.testing.assert_allclose(got / scale, want, atol=20 * float(jnp.finfo(dtype).eps))


def test_far_from_the_range_of_squares():
    """The norm of entries whose squares overflow or vanish, and float32 data beside a common offset of a million."""
    for size in (1e-30, 1e30):
        x = jnp.asarray([3.0, -4.0], jnp.float32) * jnp.float32(size)
        np.testing.assert_allclose(dn.projection_l2_sphere(x), [0.6, -0.8], rtol=1e-6)
        jacobian = jax.jacrev(dn.projection_l2_sphere)(x) * jnp.float32(size)
        np.testing.assert_allclose(jacobian, np.array([[0.64, 0.48], [0.48, 0.36]]) / 5, rtol=1e-5)
    x = jnp.asarray([1e6, 1e6 + 0.25, 1e6 + 0.5, 1e6 - 7], jnp.float32)
    near = x - jnp.float32(1e6)
    for project in (
        dn.projection_simplex,
        lambda x: dn.projection_simplex(x, 0.7),
        lambda x: dn.projection_capped_simplex(x, 1.0, 0.6),
    ):
        np.testing.assert_allclose(project(x), project(near), atol=1e-6)
        np.testing.assert_array_equal(jax.jacrev(project)(x), jax.jacrev(project)(near))
    ball = dn.projection_l1_ball(x)
    np.testing.assert_allclose(ball, dn.projection_simplex(near), atol=1e-6)


# Derivatives


def test_derivatives_of_balls_at_zero_and_inside():
    """JAXopt and optax divide by the norm, or multiply by the sign, of a zero."""

    def everything(x):
        out = []
        for project in (
            dn.projection_l1_ball,
            dn.projection_l2_ball,
            lambda x: dn.projection_weighted_l1_ball(x, jnp.ones(3)),
            dn.projection_l2_sphere,
        ):
            second = jax.hessian(lambda x, f=project: f(x) @ jnp.arange(3.0))(x)
            out.append((project(x), jax.jacfwd(project)(x), jax.jacrev(project)(x), second))
        return out

    points = jnp.array([[0.0, 0.0, 0.0], [0.2, 0.0, -0.3]])
    *balls, sphere = jax.jit(jax.vmap(everything))(points)
    for value, forward, reverse, second in balls:
        np.testing.assert_array_equal(value, points)
        np.testing.assert_array_equal(forward, np.stack([np.eye(3)] * 2))
        np.testing.assert_array_equal(reverse, forward)
        np.testing.assert_array_equal(second, 0)
    for part in sphere:
        assert np.all(part[0] == 0)
        assert np.all(np.isfinite(part))


def test_ties_count_as_on_the_bound():
    x = jnp.array([0.5, 0.0, 0.5])
    jacobian = jax.jacrev(dn.projection_simplex)(x)
    np.testing.assert_allclose(jacobian, [[0.5, 0, -0.5], [0, 0, 0], [-0.5, 0, 0.5]])
    edge = jnp.array([0.0, 1.0, 0.4])
    np.testing.assert_array_equal(jax.jacrev(dn.projection_hypercube)(edge), np.diag([0, 0, 1]))
    np.testing.assert_array_equal(jax.jacrev(dn.projection_non_negative)(edge), np.diag([0, 1, 1]))
    lower, upper = jax.jacrev(lambda bounds: dn.projection_box(edge, bounds))((jnp.zeros(3), jnp.ones(3)))
    np.testing.assert_array_equal(lower, np.diag([1, 0, 0]))
    np.testing.assert_array_equal(upper, np.diag([0, 1, 0]))
    # Weakly active: at the boundary of a ball or half-space, from inside.
    np.testing.assert_array_equal(jax.jacrev(dn.projection_l1_ball)(x), np.eye(3))
    np.testing.assert_array_equal(jax.jacrev(lambda x: dn.projection_halfspace(x, (jnp.ones(3), 1.0)))(x), np.eye(3))
    np.testing.assert_array_equal(jax.jacrev(dn.projection_second_order_cone)(jnp.zeros(3)), np.eye(3))


def second_order(function, vector):
    """(gradient, hessian, their central differences along a fixed direction)."""
    direction = jnp.asarray(np.random.default_rng(2).standard_normal(vector.size))
    gradient = jax.jit(jax.grad(function))
    hessian = jax.jit(lambda v: (jax.hessian(function)(v), jax.jacrev(jax.jacrev(function))(v)))(vector)
    h = 1e-5
    values = [jax.jit(function)(vector + s * h * direction) for s in (1, -1)]
    slopes = [gradient(vector + s * h * direction) for s in (1, -1)]
    return (
        gradient(vector) @ direction,
        (values[0] - values[1]) / (2 * h),
        hessian,
        direction,
        (slopes[0] - slopes[1]) / (2 * h),
    )


def _section(v):
    x, lower, upper, w, c = v[:4], v[4:8], v[8:12], v[12:16], v[16]
    return dn.projection_box_section(x, (lower, upper, w, c))


PARAMETRIC = {
    "section": (_section, np.r_[0.9, -0.4, 0.7, 0.2, LOWER, UPPER, MIXED + 0.1, 0.3]),
    "weighted l1": (lambda v: dn.projection_weighted_l1_ball(v[:4], v[4:8], v[8]), np.r_[0.9, -0.4, 0.7, 0.02, W, 0.6]),
    "simplex": (lambda v: dn.projection_simplex(v[:4], v[4]), np.r_[0.9, -0.4, 0.7, 0.2, 0.8]),
    "l2 ball": (lambda v: dn.projection_l2_ball(v[:4], v[4]), np.r_[0.9, -0.4, 0.7, 0.2, 0.8]),
    "half-space": (lambda v: dn.projection_halfspace(v[:4], (v[4:8], v[8])), np.r_[0.9, -0.4, 0.7, 0.2, W, 0.1]),
    "affine": (
        lambda v: dn.projection_affine_set(v[:4], (v[4:12].reshape(2, 4), v[12:])),
        np.r_[0.9, -0.4, 0.7, 0.2, A[[0, 2]].ravel(), 0.3, 0.1],
    ),
    "cone": (dn.projection_second_order_cone, np.r_[0.3, 0.7, -0.5, 0.4]),
    "semidefinite": (
        lambda v: dn.projection_positive_semidefinite(v.reshape(3, 3)).ravel(),
        np.r_[0.9, 0.2, 0.5, -0.1, -0.7, 0.2, 0.7, 0.4, 0.3],
    ),
    "spectraplex": (
        lambda v: dn.projection_spectraplex(v[:9].reshape(3, 3), v[9]).ravel(),
        np.r_[0.9, 0.2, 0.5, -0.1, 0.7, 0.2, 0.7, 0.4, 0.3, 1.2],
    ),
}


# The exact pieces in the full tier; those with an equation of their own in CI.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if n in ("section", "semidefinite", "spectraplex") else pytest.mark.full)
        for n in PARAMETRIC
    ],
)
def test_second_derivatives_in_data_and_parameters(name):
    project, vector = PARAMETRIC[name]
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(project(jnp.asarray(vector)).size))
    slope, slope_fd, (hessian, reverse), t, change = second_order(
        lambda v: weights @ jnp.sin(project(v)), jnp.asarray(vector)
    )
    np.testing.assert_allclose(slope, slope_fd, atol=1e-8)
    np.testing.assert_allclose(hessian @ t, change, atol=1e-7)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-12)
    np.testing.assert_allclose(reverse, hessian, atol=1e-12)


def test_repeated_eigenvalues():
    """Divided differences are finite for equal eigenvalues, and so is what is differentiated again: on blocks, the formulas are known."""
    values = jnp.array([1.0, 1.0, -2.0, -2.0])
    rng = np.random.default_rng(3)
    U = jnp.asarray(scipy.linalg.qr(rng.standard_normal((4, 4)))[0])
    X = (U * values[None, :]) @ U.T
    H = jnp.asarray(rng.standard_normal((4, 4)))
    H = (H + H.T) / 2
    ramp = lambda t: dn.projection_positive_semidefinite(X + t * H)
    ramp = jax.jit(ramp)
    first = jax.jacfwd(ramp)(0.0)
    B = np.array([[1, 1, 1 / 3, 1 / 3]] * 2 + [[1 / 3, 1 / 3, 0, 0]] * 2)
    np.testing.assert_allclose(first, U @ (B * (U.T @ H @ U)) @ U.T, atol=1e-14)
    second = jax.jit(jax.jacfwd(jax.jacfwd(ramp)))(0.0)
    h = 1e-4
    np.testing.assert_allclose(second, (ramp(h) - 2 * ramp(0.0) + ramp(-h)) / h**2, atol=1e-6)
    point = dn.projection_spectraplex(X, 1.0)
    np.testing.assert_allclose(point, U[:, :2] @ U[:, :2].T / 2, atol=1e-14)
    assert np.all(np.isfinite(jax.jit(jax.jacrev(dn.projection_spectraplex))(X)))


@pytest.mark.parametrize(("dtype", "tol"), [(np.float64, 1e-13), (np.float32, 1e-5)])
def test_low_rank(dtype, tol):
    """Eigenvalues that are zero but for rounding make no noise: on their pairs the derivative is 0, as documented."""
    rng = np.random.default_rng(4)
    v = rng.standard_normal((50, 5))
    v = v / np.linalg.norm(v, axis=1, keepdims=True)
    H = rng.standard_normal((50, 5, 5))
    H = H + np.swapaxes(H, 1, 2)
    X = np.einsum("li,lj->lij", v, v)
    off = np.eye(5) - X
    want = H - off @ H @ off
    run = lambda fn: jax.jit(jax.vmap(lambda X, H: jax.jvp(fn, (X,), (H,))[1]))(
        jnp.asarray(X, dtype), jnp.asarray(H, dtype)
    )
    np.testing.assert_allclose(run(dn.projection_positive_semidefinite), want, atol=tol)
    # The trace of a point of the spectraplex does not move.
    tangent = run(dn.projection_spectraplex)
    np.testing.assert_allclose(tangent, want - np.trace(want, axis1=1, axis2=2)[:, None, None] * X, atol=tol)


def test_dependent_rows():
    x = jnp.array([0.9, -0.4, 0.7, 0.2])
    whole, part = (
        jax.jacfwd(lambda x, rows=rows: dn.projection_affine_set(x, (A[rows], B[rows])))(x)
        for rows in ([0, 1, 2], [0, 2])
    )
    np.testing.assert_allclose(whole, part, atol=1e-14)
    gradient = jax.jit(jax.grad(lambda b: jnp.sum(dn.projection_affine_set(x, (A, b)) ** 2)))(jnp.asarray(B))
    # How the two dependent rows share it is a convention; along what keeps them consistent it is that of one of them.
    single = jax.grad(lambda b: jnp.sum(dn.projection_affine_set(x, (A[[0, 2]], b)) ** 2))(jnp.asarray(B[[0, 2]]))
    np.testing.assert_allclose(gradient @ jnp.array([[1.0, 0], [2, 0], [0, 1]]), single, rtol=1e-12)
    assert np.all(np.isnan(dn.projection_affine_set(x, (A, B + np.array([0, 0.1, 0])))))
    solution = dn.Projection(dn.AffineSet(A, B + np.array([0, 0.1, 0])), throw=False).solve(x)
    assert solution.result == dn.RESULTS.infeasible


# Failures, masks, lanes


def test_nan_stays_in_its_lane():
    x = jnp.array([[0.9, -0.4, 0.7, 0.2], [0.9, np.nan, 0.7, 0.2], [0.1, 0.3, -0.2, 0.05]])
    radius = jnp.array([0.8, 0.8, -1.0])

    def all_of(x, r):
        return jnp.concatenate(
            [
                dn.projection_simplex(x, r),
                dn.projection_capped_simplex(x, r, 0.6),
                dn.projection_box_section(x, (-0.5 * r, r, MIXED, 0.2)),
                dn.projection_l1_ball(x, r),
                dn.projection_weighted_l1_ball(x, W, r),
                dn.projection_l1_sphere(x, r),
                dn.projection_l2_ball(x, r),
                dn.projection_l2_sphere(x, r),
                dn.projection_linf_ball(x, r),
                dn.projection_spectraplex(x.reshape(2, 2), r).ravel(),
            ]
        )

    def both(x, r):
        value, pull = jax.vjp(all_of, x, r)
        return value, jax.vmap(pull)(jnp.eye(value.size))

    function = jax.jit(jax.vmap(both))
    value, (for_x, for_r) = function(x, radius)
    assert np.all(np.isfinite(value[0]))
    assert np.all(np.isfinite(for_x[0]))
    alone, _ = function(x[:1].repeat(3, 0), radius)
    np.testing.assert_array_equal(value[0], alone[0])
    value, for_x = value.reshape(3, 10, 4), for_x.reshape(3, 10, 4, 4)
    # A box is entry by entry; everything else is NaN as a whole.
    whole = [i for i in range(10) if i != 8]
    assert np.all(np.isnan(value[1:, whole]))
    assert np.all(np.isnan(value[1, 8]) == [False, True, False, False])
    assert np.all(np.isnan(value[2, 8]))
    assert np.all(np.isnan(for_x[1:, whole]).any(-1))


def test_failures_are_nan_in_every_gradient():
    """Also where the failed algorithm did not look at an entry."""
    X, half = jnp.array([[np.nan, 1.0], [2.0, 0.0]]), jnp.full(2, 0.5)
    calls = [
        (lambda x: dn.projection_second_order_cone(x)[1], (jnp.array([np.nan, 1.0, 2.0]),)),
        (lambda X: dn.projection_birkhoff(X)[1, 1], (X,)),
        (lambda X, a, b: dn.projection_transport(X, (a, b))[1, 1], (X, half, half)),
        (lambda X, a, b: jnp.sum(dn.projection_transport(X, (a, 2 * b)) ** 2), (jnp.eye(2), half, half)),
        (lambda X, a, b: dn.Projection(dn.TransportPolytope(a, b), throw=False)(X)[1, 1], (X, half, half)),
        (lambda x: dn.SoftRank(1.0, throw=False, adjoint=dn.ImplicitAdjoint())(x)[0], (jnp.array([np.nan]),)),
    ]
    for call, data in calls:
        for gradient in jax.grad(call, tuple(range(len(data))))(*data):
            assert np.all(np.isnan(gradient))


def test_infeasible_and_radius_zero():
    x = jnp.array([0.9, -0.4, 0.7, 0.2])
    empty = [
        dn.Simplex(-1.0), dn.CappedSimplex(1.0, 0.2), dn.BoxSection(0.0, 1.0, W, 9.0), dn.BoxSection(1.0, 0.0, None, 2.0),
        dn.L1Ball(-1.0), dn.L2Ball(-1.0), dn.L2Sphere(-1.0), dn.L1Sphere(-1.0), dn.Box(1.0, 0.0), dn.LInfBall(-1.0),
        dn.Hyperplane(jnp.zeros(4), 1.0), dn.HalfSpace(jnp.zeros(4), -1.0),
    ]  # fmt: skip
    for value in jax.jit(lambda x: [onto.project(x) for onto in empty])(x):
        assert np.all(np.isnan(value))
    for onto in (empty[1], empty[3], empty[4], empty[5], empty[8], empty[10]):
        assert dn.Projection(onto, throw=False).solve(x).result == dn.RESULTS.infeasible, onto
    with pytest.raises(dn.SolveError, match="no feasible point"):
        dn.Projection(empty[0])(x)
    points = [
        f(0.0) for f in (dn.Simplex, dn.L1Ball, dn.L2Ball, dn.L1Sphere, dn.L2Sphere, dn.LInfBall, dn.CappedSimplex)
    ]
    for value, jacobian in jax.jit(lambda x: [(p.project(x), jax.jacrev(p.project)(x)) for p in points])(x):
        np.testing.assert_allclose(value, 0, atol=1e-16)
        assert np.all(np.isfinite(jacobian))
    # The least and the largest total that a box has are feasible in spite of rounding.
    for dtype in (jnp.float32, jnp.float64):
        np.testing.assert_allclose(dn.projection_capped_simplex(jnp.zeros(10, dtype), 1.0, 0.1), 0.1, rtol=1e-6)


def test_masks():
    x = jnp.array([0.9, np.nan, 0.7, 0.2])
    mask = jnp.array([True, False, True, True])
    part = x[np.array([0, 2, 3])]
    for onto in (
        dn.Simplex(0.8), dn.CappedSimplex(0.8, 0.5), dn.BoxSection(0.1, 0.5, None, 0.8), dn.L1Ball(0.8), dn.L1Sphere(0.8),
        dn.L2Ball(0.8), dn.L2Sphere(0.8), dn.LInfBall(0.4), dn.Box(0.3, 0.4),
    ):  # fmt: skip
        value, jacobian = jax.jit(lambda x, f=onto: (f.project(x, mask), jax.jacrev(f.project)(x, mask)))(x)
        np.testing.assert_allclose(value[np.array([0, 2, 3])], onto.project(part), atol=1e-15)
        assert value[1] == 0
        np.testing.assert_array_equal(jacobian[1], 0)
        np.testing.assert_array_equal(jacobian[:, 1], 0)
    with pytest.raises(ValueError, match="takes no mask"):
        dn.Projection(dn.SecondOrderCone())(part, mask[1:])


def test_misuse_raises():
    x = jnp.zeros(4)
    for call, words in (
        (lambda: dn.Simplex().project(jnp.zeros((2, 4))), "use `jax.vmap`"),
        (lambda: dn.PositiveSemidefinite().project(jnp.zeros((2, 3))), "square matrix"),
        (lambda: dn.Simplex(jnp.ones(2)), "radius must be a number"),
        (lambda: dn.L1Ball(1.0, jnp.ones(3)).project(x), "weights must have one entry"),
        (lambda: dn.AffineSet(jnp.ones((2, 4)), jnp.ones(3)), "b must have one entry for each row"),
        (lambda: dn.AffineSet(jnp.ones((2, 3)), jnp.ones(2)).project(x), "A must have one column"),
        (lambda: dn.Hyperplane(jnp.ones(3), 1.0).project(x), "normal must have one entry"),
        (lambda: dn.Polyhedron(A=jnp.ones((1, 4))), "come together"),
        (lambda: dn.Projection(dn.Simplex), "onto must be a set"),
        (lambda: dn.Projection(dn.Simplex(), adjoint=dn.UnrolledAdjoint()), "has none"),
        (lambda: dn.projection_sparse_simplex(x, 5), "max_nz must be between"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises((ValueError, TypeCheckError), match=r"\(A, b, G, h\).*got 2|'hyperparams'"):
        dn.projection_polyhedron(x, (x[None], x[:1]))  # pyright: ignore[reportArgumentType]  (what is tested)


def test_functions_that_are_not_sets():
    x = jnp.array([0.9, -0.4, 0.7, 0.2, 0.65])
    np.testing.assert_allclose(dn.projection_sparse_simplex(x, 2), [0.6, 0, 0.4, 0, 0], atol=1e-15)
    kept = np.array([1.0, 0, 1, 0, 0])
    np.testing.assert_allclose(
        jax.jacrev(lambda x: dn.projection_sparse_simplex(x, 2))(x), np.diag(kept) - np.outer(kept, kept) / 2
    )
    assert np.all(np.isnan(dn.projection_sparse_simplex(x.at[3].set(jnp.nan), 2)))
    tree = {"a": jnp.array([[3.0, 0.0]]), "b": jnp.array(4.0)}
    np.testing.assert_allclose(dn.projection_l2_ball(tree)["b"], 0.8)
    np.testing.assert_allclose(dn.projection_box(tree, (0.0, {"a": 1.0, "b": 2.0}))["b"], 2.0)
    np.testing.assert_allclose(dn.projection_hyperplane(tree, (tree, 0.0))["a"], 0, atol=1e-15)
    # From inside of the l1 sphere every entry grows, zeros upwards.
    np.testing.assert_allclose(dn.projection_l1_sphere(jnp.array([0.3, 0.0, -0.1]), 1.0), [0.5, 0.2, -0.3], atol=1e-15)
    with pytest.raises((dn.SolveError, jax.errors.JaxRuntimeError), match="no feasible point"):
        jax.jit(lambda x: dn.projection_box_section(x, (0.0, 1.0, None, 9.0), check_feasible=True))(x)


@pytest.mark.slow
def test_polyhedron():
    for x in rows()[::3]:
        np.testing.assert_allclose(
            dn.projection_polyhedron(jnp.asarray(x), (None, None, G, H)), program(x, G=G, h=H), atol=1e-8
        )
    assert np.all(
        np.isnan(
            dn.projection_polyhedron(
                jnp.zeros(2), (None, None, np.array([[1.0, 0], [-1.0, 0]]), np.array([-1.0, -1.0]))
            )
        )
    )


# The scalar equation


def test_few_steps():
    """Close bounds, wide ones, heavy tails, ties and missing bounds: the root to rounding, in a few reads of the data."""
    rng = np.random.default_rng(0)
    lanes, n = 16, 600

    def solve(x, lower, upper, w, c):
        root = section_root(x, lower, upper, w, c, None, 1000, at_most=False)
        return jnp.clip((x - root.tau * w) - root.low * w, lower, upper), root

    function = jax.jit(jax.vmap(solve))
    for kind in ("plain", "close", "wide", "heavy", "infinite", "integers"):
        x, w = rng.standard_normal((lanes, n)), rng.uniform(0.1, 2, (lanes, n))
        l, u = -rng.uniform(0, 1, (lanes, n)), rng.uniform(0, 1, (lanes, n))
        if kind in ("close", "wide"):
            l, u = (side * (0.01 if kind == "close" else 100) for side in (l, u))
        if kind == "heavy":
            x, u, w = (part * 10 ** rng.uniform(-2, 2, part.shape) for part in (x, u, w))
        if kind == "infinite":
            l, u = (np.where(rng.random(l.shape) < 0.3, s * INF, side) for s, side in ((-1, l), (1, u)))
        if kind == "integers":
            x, w, l, u = np.round(2 * x), np.ones_like(w), np.zeros_like(l), np.ones_like(u)
        ends = np.clip(l, -3, 3), np.clip(u, -3, 3)
        c = np.sum(w * (ends[0] + (ends[1] - ends[0]) * rng.random((lanes, 1))), axis=1)
        y, root = function(x, l, u, w, c)
        assert np.all(root.converged), kind
        assert np.max(root.steps) <= 40, kind
        assert np.mean(root.steps) <= 12, kind
        low, high = np.full((lanes, 1), -1e9), np.full((lanes, 1), 1e9)
        for _ in range(120):
            tau = (low + high) / 2
            heavy = np.sum(w * np.clip(x - tau * w, l, u), axis=1, keepdims=True) >= c[:, None]
            low, high = np.where(heavy, tau, low), np.where(heavy, high, tau)
        want = np.clip(x - low * w, l, u)
        np.testing.assert_allclose(y, want, atol=1e-10 * np.max(np.abs(want)), err_msg=kind)


def test_bounds_on_one_side_and_weights_of_either_sign():
    """Small sections, where a start on a bound has no slope to go by, and the root is beyond every bound."""
    rng = np.random.default_rng(3)
    lanes = 100
    solve = jax.jit(jax.vmap(lambda x, l, u, w, c: dn.Projection(dn.BoxSection(l, u, w, c), throw=False)(x)))
    for n in (1, 2, 3, 7):
        x, w = np.round(2 * rng.standard_normal((lanes, n))), rng.standard_normal((lanes, n))
        l, u = -np.round(2 * rng.random((lanes, n))), np.round(2 * rng.random((lanes, n)))
        l, u = np.where(rng.random(l.shape) < 0.4, -INF, l), np.where(rng.random(u.shape) < 0.4, INF, u)
        w = np.where(rng.random(w.shape) < 0.2, 0, w)
        c = np.sum(w * np.clip(rng.standard_normal((lanes, n)), l, u), axis=1)
        low, high = np.full((lanes, 1), -1e9), np.full((lanes, 1), 1e9)
        for _ in range(120):
            tau = (low + high) / 2
            heavy = np.sum(w * np.clip(x - tau * w, l, u), axis=1, keepdims=True) >= c[:, None]
            low, high = np.where(heavy, tau, low), np.where(heavy, high, tau)
        np.testing.assert_allclose(solve(x, l, u, w, c), np.clip(x - low * w, l, u), atol=1e-9)


def test_bounds_closer_than_neighbours_of_the_multiplier():
    """In float32 no multiplier near 1e8 has an entry between 0 and 1; and what two numbers cannot resolve is said."""
    found = lambda onto, x: dn.Projection(onto, throw=False).solve(jnp.asarray(x, jnp.float32))
    weights = jnp.array([1.0, 2.0, 3.0], jnp.float32)
    for onto, x, want in (
        (dn.CappedSimplex(1.5), [1e7, 1e7 - 8, 1e7 + 8], [0.5, 0, 1]),
        (dn.CappedSimplex(1.5), [1e8, 1e8 - 8, 1e8 + 8], [0.5, 0, 1]),
        (dn.BoxSection(0.0, 1.0, None, 0.5), [1e9], [0.5]),
        (dn.BoxSection(0.0, 1.0, jnp.array([1, 1, 1e-32], jnp.float32), 0.5), [5, 1, 1e7], [0.5, 0, 1]),
    ):
        np.testing.assert_allclose(found(onto, x).value, want, atol=1e-6)
    y = found(dn.BoxSection(0.0, 1.0, weights, 0.5), [1e9] * 3).value
    np.testing.assert_allclose(weights @ y, 0.5, rtol=1e-6)
    assert found(dn.BoxSection(0.0, 1.0, None, 1.0), [1e30, 1e30, 0.0]).result == dn.RESULTS.nonlinear_max_steps_reached


def test_a_large_bound_on_one_side_does_not_blur_the_other():
    for lower, upper, total in ((-1e10, 0.0, 100.0), (-1e30, 1.0, 10.0), (0.0, 1e10, -1.0)):
        onto = dn.BoxSection(lower, upper, None, total)
        solution = dn.Projection(onto, throw=False).solve(jnp.array([3.0, 2.9, 5.0], jnp.float32))
        assert solution.result == dn.RESULTS.infeasible
