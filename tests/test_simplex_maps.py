"""The kernels of softmax, entmax and sparsemax against 50 digits, and at every place where they could go wrong.

The reference solves (K2) by bisection in float64 and Newton's method in 50-digit arithmetic, on the rounded input that the kernel
sees, and differentiates by the implicit function theorem; `test_the_reference_derivatives` differences the reference itself.
"""

import functools as ft
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import mpmath
import numpy as np
import pytest
from mpmath import mpf

from declarative._solvers.simplex_maps import simplex_map

# Rows are padded with -inf to one length, and batches to a multiple of one size, so that each kernel is compiled once.
WIDTH, LANES = 32, 20
MAX_STEPS = 200
DIGITS = 50
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
DTYPES = ["float32", "float64"]
GENTLE = (1.0, 1.001, 1.25, 1.5, 1.75, 2.0)
STEEP = (2.5, 3.0, 4.0)
STATIC = (1.0, 1.5, 2.0)
# Every static kernel, then the general one with the exponent as an array.
KERNELS = [*STATIC, *(np.asarray(alpha) for alpha in (1.0, 1.25, 1.5, 2.0, 3.0))]
NAMES = [f"{'static' if isinstance(alpha, float) else 'array'}-{float(alpha):g}" for alpha in KERNELS]
each_kernel = pytest.mark.parametrize("alpha", KERNELS, ids=NAMES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
INF = np.inf


class Found(NamedTuple):
    """All that a kernel gives for a batch of rows; derivatives of `cotangent @ probabilities` but for `for_theta`."""

    p: Any
    theta: Any
    steps: Any
    converged: Any
    finite: Any
    for_theta: Any  # gradient of theta
    for_z: Any
    for_alpha: Any  # zero where the exponent is static
    hessian: Any  # in z and, last, alpha


@ft.cache
def compiled(static):
    def row(scores, alpha, cotangent):
        def value(scores, alpha):
            out = simplex_map(scores, alpha if static is None else static, MAX_STEPS)
            return (out.probabilities, out.theta), out

        def gradient(point):
            (p, theta), pullback, out = jax.vjp(value, point[:-1], point[-1], has_aux=True)
            for_z, for_alpha = pullback((cotangent, jnp.zeros_like(theta)))
            for_theta, _ = pullback((jnp.zeros_like(p), jnp.ones_like(theta)))
            return jnp.append(for_z, for_alpha), (for_z, for_alpha, for_theta, out)

        hessian, (for_z, for_alpha, for_theta, out) = jax.jacfwd(gradient, has_aux=True)(jnp.append(scores, alpha))
        return Found(*out, for_theta=for_theta, for_z=for_z, for_alpha=for_alpha, hessian=hessian)

    return jax.jit(jax.vmap(row, in_axes=(0, None, 0)))


def run(alpha, rows, cotangents=None, dtype="float64"):
    """`Found` for rows of at most `WIDTH` scores; a float `alpha` is static."""
    rows = np.asarray(rows, dtype)
    count, n = rows.shape
    cotangents = np.ones_like(rows) if cotangents is None else np.broadcast_to(cotangents, rows.shape).astype(dtype)
    lanes = LANES * -(-count // LANES)
    scores, weights = np.full((lanes, WIDTH), -INF, dtype), np.zeros((lanes, WIDTH), dtype)
    scores[:count, :n], weights[:count, :n] = rows, cotangents
    kernel = compiled(alpha if isinstance(alpha, float) else None)
    chunks = [
        kernel(scores[k : k + LANES], np.asarray(alpha, dtype), weights[k : k + LANES]) for k in range(0, lanes, LANES)
    ]
    found = Found(
        *(np.concatenate([np.asarray(part) for part in parts])[:count] for parts in zip(*chunks, strict=True))
    )
    assert found.p.dtype == found.theta.dtype == found.for_z.dtype == found.hessian.dtype == dtype
    inside = np.r_[:n, WIDTH]
    return found._replace(
        p=found.p[:, :n],
        for_theta=found.for_theta[:, :n],
        for_z=found.for_z[:, :n],
        hessian=found.hessian[:, inside][:, :, inside],
    )


def probabilities(scores, alpha):
    return simplex_map(scores, alpha, MAX_STEPS).probabilities


# ----------------------------------------------------------------------------------------------------------------------
# Reference
# ----------------------------------------------------------------------------------------------------------------------


def bisected(z, alpha):
    """A lower bound of theta, within 1e-12 of it."""
    c = alpha - 1
    low, high = 0.0, float(np.log(z.size)) if c == 0 else float(-np.expm1(-c * np.log(z.size)) / c)
    x = z - z.max()
    for _ in range(44):
        middle = (low + high) / 2
        t = x - middle
        if c == 0:
            mass = np.sum(np.exp(t))
        else:
            inside = c * t > -1
            mass = np.sum(np.exp(np.log1p(c * t[inside]) / c))
        low, high = (middle, high) if mass >= 1 else (low, middle)
    return low


def exp_alpha(t, c):
    """p, s = p^(2 - alpha), and r, the derivative of p in alpha at fixed t; `c` is alpha - 1."""
    if c == 0:
        p = mpmath.exp(t)
        return p, p, -p * t * t / 2
    v = 1 + c * t
    if v <= 0:
        return mpf(0), mpf(0), mpf(0)
    log_v = mpmath.log(v)
    p = v if c == 1 else v * v if c == 0.5 else mpmath.exp(log_v / c)
    return p, p / v, p * (c * t / v - log_v) / (c * c)


def solved(z, alpha, start):
    """theta from lists of `mpf`. For alpha > 2 Newton may fail at a kink: bisection then."""
    c = alpha - 1
    theta, small = start, mpf(10) ** (5 - DIGITS)
    for _ in range(12):
        terms = [exp_alpha(zi - theta, c) for zi in z]
        residual = sum(p for p, _, _ in terms) - 1
        if abs(residual) < small:
            return theta
        theta += residual / sum(s for _, s, _ in terms)
    low, high = start - mpf(10) ** -9, start + mpf(10) ** -9
    for _ in range(5 * DIGITS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(exp_alpha(zi - middle, c)[0] for zi in z) >= 1 else (low, middle)
    return low


def differentiated(z, alpha, cotangent, theta):
    """p, dtheta/dz, and the cotangents of z and alpha, as lists of `mpf`."""
    p, s, r = zip(*(exp_alpha(zi - theta, alpha - 1) for zi in z), strict=True)
    total = sum(s)
    mean = sum(si * gi for si, gi in zip(s, cotangent, strict=True)) / total
    for_z = [si * (gi - mean) for si, gi in zip(s, cotangent, strict=True)]
    for_alpha = sum(ri * (gi - mean) for ri, gi in zip(r, cotangent, strict=True))
    return p, [si / total for si in s], for_z, for_alpha


def reference(scores, alpha, cotangent):
    """p, theta, dtheta/dz, cotangents of z and alpha, and the distance of the nearest score to the threshold."""
    with mpmath.workdps(DIGITS):
        kept = np.flatnonzero(np.isfinite(scores))
        z, a = [mpf(float(v)) for v in scores[kept]], mpf(float(alpha))
        start = mpf(float(scores[kept].max())) + mpf(bisected(scores[kept].astype(float), float(alpha)))
        theta = solved(z, a, start)
        *vectors, for_alpha = differentiated(z, a, [mpf(float(v)) for v in cotangent[kept]], theta)
        margin = np.inf if a == 1 else min(float(abs(zi - theta + 1 / (a - 1))) for zi in z)
    p, d_theta, for_z = np.zeros((3, scores.size))
    for full, part in zip((p, d_theta, for_z), vectors, strict=True):
        full[kept] = [float(v) for v in part]
    return p, float(theta), d_theta, for_z, float(for_alpha), margin


@ft.cache
def cases(alpha, count, dtype):
    """Random rows, cotangents and their reference: 1 to 30 scores of spread 0.1 to 10, some masked, some tied."""
    rng = np.random.default_rng([int(1000 * alpha), count, len(dtype + "x" * int(dtype[-2:]))])
    scores = np.full((count, WIDTH), -np.inf)
    cotangents = rng.standard_normal((count, WIDTH)).astype(dtype)
    for row in scores:
        n = rng.integers(1, 31)
        z = rng.standard_normal(n) * 10 ** rng.uniform(-1, 1) + rng.choice([0.0, 5.0])
        if rng.random() < 0.15:
            z = np.round(z, 1)
        if rng.random() < 0.4:
            z[rng.random(n) < 0.3] = -np.inf
        if not np.any(np.isfinite(z)):
            z[rng.integers(n)] = 0.5
        row[rng.permutation(WIDTH)[:n]] = z
    scores = scores.astype(dtype)
    alpha = np.asarray(alpha, dtype)
    columns = zip(*(reference(z, alpha, g) for z, g in zip(scores, cotangents, strict=True)), strict=True)
    return scores, alpha, cotangents, [np.array(column) for column in columns]


def check_gentle(alpha, count, dtype, static):
    scores, rounded, cotangents, (p, theta, d_theta, for_z, for_alpha, margin) = cases(alpha, count, dtype)
    found = run(alpha if static else rounded, scores, cotangents, dtype)
    tol = TOLERANCE[dtype]
    assert np.all(found.converged & found.finite)
    assert np.all(found.p[scores == -INF] == 0)
    assert np.all(found.for_z[scores == -INF] == 0)
    assert np.max(np.abs(found.p - p)) <= tol
    assert np.max(np.abs(found.theta - theta) / np.maximum(1, np.abs(theta))) <= tol
    smooth = margin > 1e-4
    assert np.mean(smooth) >= 0.9
    size = np.maximum(1, np.max(np.abs(for_z), axis=1))
    assert np.max((np.max(np.abs(found.for_z - for_z), axis=1) / size)[smooth]) <= tol
    assert np.max(np.abs(found.for_theta - d_theta)[smooth]) <= tol
    if static:
        assert np.all(found.for_alpha == 0)
    else:
        assert np.max((np.abs(found.for_alpha - for_alpha) / np.maximum(1, np.abs(for_alpha)))[smooth]) <= tol


def condition(p, alpha, cotangent):
    """First-order change of p, of the cotangent of z and of that of alpha when each score moves by 1 / (alpha - 1).

    That is the radius within which a score takes part, hence the size to which the data are known when they are known to a
    relative eps; a stable algorithm is right to a small multiple of eps times this. One is added for the rounding of the
    result. Columns: dz_j. With s = p^(2-alpha), S its sum, m = s'g / S:
    dp = diag(s) - s s'/S; d(cotangent of z) = diag(g - m) ds - s dm, where ds = diag((2 - alpha) p^(3 - 2 alpha)) (I - 1 s'/S)
    and dm = (g - m)' ds / S; d(cotangent of alpha) = (g - m)' dr - (1'r) dm, where dr = diag(ds/dalpha) (I - 1 s'/S).
    """
    on = p > 0
    p, g = p[on], cotangent[on]
    c = alpha - 1
    s, log_v, v = p ** (2 - alpha), c * np.log(p), p**c
    t = (v - 1) / c
    r = p * (c * t / v - log_v) / c**2
    moved = np.eye(p.size) - s / s.sum()
    centred = g - s @ g / s.sum()
    ds = ((2 - alpha) * p ** (3 - 2 * alpha))[:, None] * moved
    dm = centred @ ds / s.sum()
    dr = (s * (-log_v / c**2 + (2 - alpha) / c * t / v))[:, None] * moved
    d_p = s[:, None] * moved
    d_z = centred[:, None] * ds - s[:, None] * dm
    d_alpha = centred @ dr - r.sum() * dm
    return [1 + np.max(np.sum(np.abs(np.atleast_2d(d)), axis=1)) / c for d in (d_p, d_z, d_alpha)]


def check_steep(alpha, count, dtype):
    scores, rounded, cotangents, (p, theta, _, for_z, for_alpha, margin) = cases(alpha, count, dtype)
    found = run(rounded, scores, cotangents, dtype)
    assert np.all(found.converged & found.finite)
    kappa = np.array([condition(row, float(rounded), g.astype(float)) for row, g in zip(p, cotangents, strict=True)])
    eps = float(np.finfo(dtype).eps)
    for_p, for_gradient, for_exponent = 10 * eps * kappa.T
    assert np.max(np.max(np.abs(found.p - p), axis=1) / for_p) <= 1
    assert np.max(np.abs(np.sum(found.p, axis=1, dtype=np.float64) - 1)) <= 10 * eps
    assert np.max(np.abs(found.theta - theta) / np.maximum(1, np.abs(theta))) <= TOLERANCE[dtype]
    smooth = margin > 1e-4
    assert np.mean(smooth) >= 0.8
    assert np.max((np.max(np.abs(found.for_z - for_z), axis=1) / for_gradient)[smooth]) <= 1
    assert np.max((np.abs(found.for_alpha - for_alpha) / for_exponent)[smooth]) <= 1


SWEEPS = [pytest.param(20, id="120-cases"), pytest.param(400, id="2400-cases", marks=pytest.mark.full)]


@pytest.mark.parametrize("count", SWEEPS)
@each_dtype
@pytest.mark.parametrize("alpha", GENTLE)
def test_value_and_gradient_against_50_digits(alpha, dtype, count):
    check_gentle(alpha, count, dtype, static=False)
    if alpha in STATIC:
        check_gentle(alpha, count, dtype, static=True)


@pytest.mark.parametrize("count", SWEEPS)
@each_dtype
@pytest.mark.parametrize("alpha", STEEP)
def test_value_and_gradient_beyond_sparsemax(alpha, dtype, count):
    check_steep(alpha, count, dtype)


ROW = np.array([0.31, -0.27, 0.12, 0.45, -9.0])
COTANGENT = np.array([1.0, -2.0, 0.7, 3.1, 5.0])


def exact(z, alpha, cotangent=COTANGENT):
    """The reference on lists of `mpf`, at the current precision: cotangents of z and alpha, then p."""
    values = np.array([float(v) for v in z])
    theta = solved(z, alpha, mpf(values.max()) + mpf(bisected(values, float(alpha))))
    p, _, for_z, for_alpha = differentiated(z, alpha, [mpf(v) for v in cotangent], theta)
    return [*for_z, for_alpha], p


def differences(fn, z, alpha):
    """Central differences of `fn(z, alpha)` in the entries of z, then alpha; the step costs 30 of the 50 digits."""
    h = mpf(10) ** -15
    columns = []
    for j in range(len(z) + 1):
        ends = []
        for sign in (1, -1):
            point = [*z, alpha]
            point[j] += sign * h
            ends.append(fn(point[:-1], point[-1]))
        columns.append([float((up - down) / (2 * h)) for up, down in zip(*ends, strict=True)])
    return np.array(columns).T


@pytest.mark.parametrize("alpha", [1.001, 1.25, 1.5, 2.0, 3.0])
def test_the_reference_derivatives(alpha):
    with mpmath.workdps(DIGITS):
        z, a = [mpf(v) for v in ROW], mpf(alpha)
        jacobian = differences(lambda z, a: exact(z, a)[1], z, a)
        expected = np.array([float(v) for v in exact(z, a)[0]])
    np.testing.assert_allclose(COTANGENT @ jacobian, expected, rtol=1e-13, atol=1e-14)


# ----------------------------------------------------------------------------------------------------------------------
# Values
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize(
    ("alpha", "expected"), [(1.0, (0.0486, 0.3592, 0.5922)), (2.0, (0, 0.25, 0.75)), (1.5, (0, 0.3260, 0.6740))]
)
def test_published_values(alpha, expected, static):
    found = run(alpha if static else np.asarray(alpha), [[-2.0, 0.0, 0.5]])
    np.testing.assert_allclose(found.p[0], expected, atol=5e-5)


def test_theta_is_logsumexp_and_the_usual_thresholds():
    soft, half, sparse = (run(alpha, ROW[None]) for alpha in STATIC)
    assert soft.theta[0] == pytest.approx(float(np.log(np.sum(np.exp(ROW)))), abs=1e-15)
    np.testing.assert_allclose(np.maximum(ROW / 2 - (half.theta[0] / 2 - 1), 0) ** 2, half.p[0], atol=1e-15)
    np.testing.assert_allclose(np.maximum(ROW - (sparse.theta[0] - 1), 0), sparse.p[0], atol=1e-15)


@each_dtype
@pytest.mark.parametrize("alpha", STATIC)
def test_an_array_alpha_joins_the_static_kernels(alpha, dtype):
    eps = float(np.finfo(dtype).eps)
    expected = run(alpha, ROW[None], COTANGENT, dtype)
    # Next to it as well: no jump there, and the derivative in alpha is of order one.
    for near in (alpha, alpha * (1 + eps), alpha * (1 - eps) if alpha > 1 else 1 + 2 * eps):
        found = run(np.asarray(near, dtype), ROW[None], COTANGENT, dtype)
        for name in ("p", "theta", "for_z", "for_theta"):
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=30 * eps, err_msg=name)


@each_kernel
def test_ties_share_equally(alpha):
    rows = np.full((2, 8), -3.3)
    rows[1] = [0.2, 1.7, -0.4, 1.7, 1.6, 1.7, -INF, -INF]
    found = run(alpha, rows, [1.0, 2, 3, 4, 5, 6, 7, 8])
    np.testing.assert_allclose(found.p[0], np.full(8, 1 / 8), rtol=1e-15)
    np.testing.assert_allclose(found.for_z[0], (np.arange(8) - 3.5) * 8.0 ** (float(alpha) - 2), rtol=1e-13)
    p = found.p[1]
    assert p[1] == p[3] == p[5] > p[4] >= p[0] >= p[2]


@each_kernel
@each_dtype
def test_shift_and_permutation(alpha, dtype):
    order = np.array([3, 0, 4, 2, 1])
    rows = np.stack([ROW, ROW + 64, ROW[order]]).astype(dtype)
    found = run(alpha, rows, dtype=dtype)
    eps = float(np.finfo(dtype).eps)
    np.testing.assert_allclose(found.p[1], found.p[0], atol=400 * eps)
    np.testing.assert_allclose(found.p[2], found.p[0, order], atol=10 * eps)


@each_kernel
@each_dtype
def test_magnitudes(alpha, dtype):
    for factor in (1e-8, 1e8, 1e30):
        row = (ROW * factor).astype(dtype)
        found = run(alpha, row[None], COTANGENT, dtype)
        assert found.converged[0]
        expected, _, _, for_z, _, margin = reference(row, float(alpha), COTANGENT)
        np.testing.assert_allclose(found.p[0], expected, atol=TOLERANCE[dtype])
        if margin > 1e-4:
            np.testing.assert_allclose(found.for_z[0], for_z, atol=10 * TOLERANCE[dtype])
        assert np.all(np.isfinite(found.hessian))
    large = [[-3.4e38, 3.3e38, 3.4e38, -INF, 3.4e38], [3.4e38, -3.3e38, -3.4e38, -INF, -3.4e38]]
    found = run(alpha, large, COTANGENT, dtype)
    np.testing.assert_allclose(found.p, [[0, 0, 0.5, 0, 0.5], [1, 0, 0, 0, 0]], rtol=1e-6)
    assert np.all(np.isfinite(found.hessian))


@each_kernel
@each_dtype
def test_one_score(alpha, dtype):
    found = run(alpha, [[-7.3]], [[2.0]], dtype)
    assert found.p == 1
    assert found.theta == np.asarray(-7.3, dtype)
    assert found.for_z == 0
    assert found.for_theta == 1
    assert np.all(found.hessian == 0)


LENGTHS = [
    (1003, "float64"),
    (20011, "float32"),
    *(pytest.param(n, dtype, marks=pytest.mark.full) for n in (255, 256, 32768) for dtype in DTYPES),
]


@pytest.mark.parametrize(("n", "dtype"), LENGTHS)
def test_long_rows(n, dtype):
    """Rows that are cut into pieces: the largest scores in what the pieces leave over, two in one column, thin spread."""
    rng = np.random.default_rng(n)
    rows = rng.standard_normal((4, n))
    rows[0, -3:] = [4.6, 4.4, 4.8]
    width = n // (8 if n < 8192 else 16)
    rows[0, [7, 7 + width, 7 + 3 * width]] = [4.55, 4.7, 4.1]
    # Nearly equal scores: p is far below one unit in the last place of theta, which must not show.
    rows[1:] = np.abs(rows[1:]) * 10.0 ** np.array([[-6], [-4], [-2]])
    rows = rows.astype(dtype)
    descending = np.sort(rows.astype(np.float64), axis=1)[:, ::-1]
    sums = np.cumsum(descending, axis=1) - 1
    size = np.sum(descending * np.arange(1, n + 1) > sums, axis=1)
    tau = sums[np.arange(4), size - 1] / size
    sparse = np.maximum(rows.astype(np.float64) - tau[:, None], 0)
    eps = float(np.finfo(dtype).eps)

    def batch(alpha):
        static = alpha if isinstance(alpha, float) else None
        kernel = jax.jit(jax.vmap(lambda z, a: simplex_map(z, a if static is None else static, MAX_STEPS), (0, None)))
        out = kernel(rows, np.asarray(alpha, dtype))
        assert np.all(out.converged)
        assert np.all(out.steps <= 8)
        np.testing.assert_allclose(np.sum(np.asarray(out.probabilities, np.float64), axis=1), 1, atol=50 * eps)
        return np.asarray(out.probabilities)

    general = jax.jit(jax.vmap(lambda z, a: probabilities(z, a).astype(float), (0, None)))
    scale = np.max(sparse, axis=1, keepdims=True)  # relative to the largest probability, which is 1e-4 in thin rows
    np.testing.assert_allclose(batch(2.0) / scale, sparse / scale, atol=30 * eps)
    np.testing.assert_allclose(general(rows, np.asarray(2.0, dtype)) / scale, sparse / scale, atol=50 * eps)
    half = batch(1.5)
    np.testing.assert_allclose(half / scale, general(rows, np.asarray(1.5, dtype)) / scale, atol=50 * eps)
    np.testing.assert_allclose(np.sum(general(rows, np.asarray(2.5, dtype)), axis=1), 1, atol=50 * eps)
    np.testing.assert_allclose(general(rows, np.asarray(1.0, dtype)), jax.nn.softmax(rows), rtol=1e3 * eps)


# ----------------------------------------------------------------------------------------------------------------------
# Derivatives
# ----------------------------------------------------------------------------------------------------------------------


def second_derivatives(alpha):
    with mpmath.workdps(DIGITS):
        # alpha = 1 from above: an error of 1e-12, and not the end of the domain.
        a = mpf(alpha) if alpha > 1 else mpf(1) + mpf(10) ** -12
        return differences(lambda z, a: exact(z, a)[0], [mpf(v) for v in ROW], a)


@pytest.mark.parametrize("alpha", [1.0, 1.001, 1.25, 1.5, 1.75, 2.0, 3.0, 4.0])
def test_second_derivatives(alpha):
    """In scores and exponent, against differences of the reference gradient."""
    expected = second_derivatives(alpha)
    tol = 1e-10 * np.max(np.abs(expected))
    np.testing.assert_allclose(run(np.asarray(alpha), ROW[None], COTANGENT).hessian[0], expected, atol=tol)
    if alpha in STATIC:
        hessian = run(alpha, ROW[None], COTANGENT).hessian[0, :-1, :-1]
        np.testing.assert_allclose(hessian, expected[:-1, :-1], atol=tol)


def weighted(point):
    return jnp.array(COTANGENT) @ probabilities(point[:-1], point[-1])


def test_reverse_over_reverse():
    """And the other orders of modes; forward over reverse is in `run`."""
    point = np.append(ROW, 1.25)
    expected = second_derivatives(1.25)
    for outer, inner in ((jax.jacrev, jax.jacrev), (jax.jacrev, jax.jacfwd), (jax.jacfwd, jax.jacfwd)):
        np.testing.assert_allclose(jax.jit(outer(inner(weighted)))(point), expected, atol=1e-10)
    z = jnp.array(ROW)
    hessian = jax.jit(jax.jacrev(jax.jacrev(lambda z: jnp.array(COTANGENT) @ probabilities(z, 1.5))))(z)
    np.testing.assert_allclose(hessian, second_derivatives(1.5)[:-1, :-1], atol=1e-10)


@pytest.mark.full
@each_kernel
def test_third_derivatives_in_every_mode(alpha):
    def weighted(z):
        return jnp.array(COTANGENT) @ probabilities(z, alpha if isinstance(alpha, float) else jnp.asarray(alpha))

    forward = jax.jit(jax.jacfwd(jax.jacfwd(jax.jacfwd(weighted))))(jnp.array(ROW))
    reverse = jax.jit(jax.jacrev(jax.jacrev(jax.jacrev(weighted))))(jnp.array(ROW))
    np.testing.assert_allclose(reverse, forward, atol=1e-12 * (1 + np.max(np.abs(forward))))
    assert np.any(forward != 0) or float(alpha) == 2


@pytest.mark.parametrize("alpha", [1.0, 2.0, np.asarray(1.75)], ids=["static-1", "static-2", "array-1.75"])
def test_jvp_and_vjp_are_adjoint(alpha):
    alpha = alpha if isinstance(alpha, float) else jnp.asarray(alpha)

    def value(z):
        return simplex_map(z, alpha, 50)[:2]

    @jax.jit
    def both(z, tangent, cotangent):
        moved = jax.jvp(value, (z,), (tangent,))[1]
        return moved, jax.vjp(value, z)[1](cotangent)[0]

    tangent, cotangent = np.array([0.3, 1.1, -0.8, 0.9, 2.0]), (COTANGENT, np.asarray(1.7))
    moved, pulled = both(ROW, tangent, cotangent)
    left = cotangent[0] @ moved[0] + cotangent[1] * moved[1]
    assert left == pytest.approx(float(pulled @ tangent), abs=1e-14)
    assert abs(left) > 0.1
    assert np.sum(moved[0]) == pytest.approx(0, abs=1e-15)


KINKS = [
    (2.0, [1.0, 0.0], [1, 0]),
    (2.0, [0.5, 0.0, 0.5], [0.5, 0, 0.5]),
    (np.asarray(2.0), [0.5, 0.0, 0.5], [0.5, 0, 0.5]),
    (1.5, [2.0, 0.0], [1, 0]),
    (np.asarray(1.5), [2.0, 0.0], [1, 0]),
    (np.asarray(3.0), [0.5, 0.0], [1, 0]),
]


@pytest.mark.parametrize(("alpha", "scores", "value"), KINKS)
def test_a_score_on_the_threshold_has_no_gradient(alpha, scores, value):
    n = len(scores)
    found = run(alpha, np.tile(scores, (n, 1)), np.eye(n))
    np.testing.assert_array_equal(found.p, np.tile(value, (n, 1)))
    kept = (np.array(value) > 0).astype(float)
    np.testing.assert_allclose(found.for_z, np.diag(kept) - np.outer(kept, kept) / kept.sum(), atol=1e-15)
    np.testing.assert_array_equal(found.for_theta[0], kept / kept.sum())
    assert np.all(np.isfinite(found.hessian))


@each_dtype
def test_one_sensitivity_that_dominates(dtype):
    """s = p^(2 - alpha) of the second score is thousands of times the others', and its gradient a difference of close numbers."""
    row = np.array([0.0, -1 / 3 + 0.012, -0.9, -3.0], dtype)
    cotangent = np.array([1.0, -2.0, 0.7, 3.1], dtype)
    p, _, _, for_z, for_alpha, _ = reference(row, 4.0, cotangent)
    assert 0 < p[1] < 0.02
    found = run(np.asarray(4.0), row[None], cotangent[None], dtype)
    tol = 30 * float(np.finfo(dtype).eps)
    np.testing.assert_allclose(found.for_z[0], for_z, atol=tol * np.max(np.abs(for_z)))
    np.testing.assert_allclose(found.for_alpha[0], for_alpha, atol=100 * tol)


@each_dtype
@pytest.mark.parametrize("alpha", [1.0, 1.001, 1.5, 2.0, 2.5, 4.0])
def test_derivatives_are_finite_next_to_the_threshold(alpha, dtype):
    """The second score goes from far below the threshold to far above it in steps down to one unit in the last place."""
    tiny = 2.0 ** np.arange(-60, 3, 2)
    edge = np.concatenate([-tiny[::-1], [0], tiny]) - (1 / (alpha - 1) if alpha > 1 else 700)
    rows = np.stack([np.zeros_like(edge), edge, edge - 0.3], axis=1)
    kernels = [alpha, np.asarray(alpha)] if alpha in STATIC else [np.asarray(alpha)]
    for kernel in kernels:
        found = run(kernel, rows, [1.0, -2.0, 3.0], dtype)
        assert np.all(found.converged)
        assert all(np.all(np.isfinite(part)) for part in found)
        np.testing.assert_allclose(np.sum(found.p, axis=1), 1, atol=10 * np.finfo(dtype).eps)


# ----------------------------------------------------------------------------------------------------------------------
# Infinities, NaN, lanes
# ----------------------------------------------------------------------------------------------------------------------


@each_kernel
@each_dtype
def test_infinities(alpha, dtype):
    rows = np.array(
        [[INF, 0.3, -INF, INF], [-INF] * 4, [-INF, INF, 1.0, 1e38], [-INF, 0.4, -INF, 0.1], [0.4, 0.1, -INF, -INF]]
    )
    found = run(alpha, rows, [1.0, 2.0, -3.0, 5.0], dtype)
    np.testing.assert_allclose(found.p[:3], [[0.5, 0, 0, 0.5], [0, 0, 0, 0], [0, 1, 0, 0]], rtol=1e-6)
    assert found.p[0, 0] == found.p[0, 3]
    np.testing.assert_array_equal(found.theta[:3], [INF, -INF, INF])
    assert np.all(found.converged & found.finite)
    assert found.steps[1] == 0
    for part in (found.for_z, found.for_theta, found.for_alpha, found.hessian):
        assert np.all(part[:3] == 0)
    np.testing.assert_array_equal(found.p[3, [1, 3, 0, 2]], found.p[4])
    np.testing.assert_array_equal(found.for_z[3, ::2], 0)
    assert found.for_z[3, 1] < 0 < found.for_z[3, 3]
    assert np.all(np.isfinite(found.hessian))


@each_kernel
@each_dtype
def test_nan_stays_in_its_lane(alpha, dtype):
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((6, 30)) * np.array([[0.1], [1], [3], [1], [0.3], [10]])
    cotangents = rng.standard_normal((6, 30))
    clean = run(alpha, rows, cotangents, dtype)
    rows[2, 17], rows[4, :] = np.nan, np.nan
    found = run(alpha, rows, cotangents, dtype)
    others, spoilt = [0, 1, 3, 5], [2, 4]
    for got, expected in zip(found, clean, strict=True):
        np.testing.assert_array_equal(got[others], expected[others])
    assert np.all(np.isnan(found.p[spoilt]))
    assert np.all(np.isnan(found.theta[spoilt]))
    assert np.all(np.isnan(found.for_z[spoilt]))
    assert not np.any(found.finite[spoilt] | found.converged[spoilt])
    assert np.all(found.steps[spoilt] == 0)


@each_kernel
def test_lanes_that_have_converged_are_frozen(alpha):
    rng = np.random.default_rng(4)
    easy, slow = 1e-3 * rng.standard_normal((3, 30)), rng.standard_normal((3, 30))
    mixed = run(alpha, np.concatenate([easy, slow]), np.arange(30.0))
    alone = run(alpha, np.concatenate([easy, np.full((3, 30), -INF)]), np.arange(30.0))
    for got, expected in zip(mixed, alone, strict=True):
        np.testing.assert_array_equal(got[:3], expected[:3])
    if 1 < float(alpha) <= 2:
        assert np.max(mixed.steps[3:]) > np.max(mixed.steps[:3])


# ----------------------------------------------------------------------------------------------------------------------
# Contract
# ----------------------------------------------------------------------------------------------------------------------


@each_kernel
@each_dtype
def test_few_steps_on_awkward_rows(alpha, dtype):
    """Geometric, harmonic and heavy-tailed rows: where sequences of supports are long."""
    rng = np.random.default_rng(5)
    k = np.arange(WIDTH)
    rows = [sign * ratio**k for ratio in (0.3, 0.7, 0.9, 0.99) for sign in (1, -1, -3)]
    rows += [1 / (k + 1), -np.log(k + 1), -k / WIDTH, -np.sqrt(k) / WIDTH]
    rows += [
        -(np.abs(rng.standard_normal(WIDTH)) ** rng.uniform(0.1, 20)) * 10 ** rng.uniform(-6, 3) for _ in range(64)
    ]
    found = run(alpha, rows, dtype=dtype)
    assert np.all(found.converged)
    assert np.max(found.steps) <= (0 if alpha == 1.0 and isinstance(alpha, float) else 9 if alpha <= 2 else 50)
    np.testing.assert_allclose(np.sum(found.p, axis=1), 1, atol=20 * np.finfo(dtype).eps)


@pytest.mark.parametrize("alpha", [2.0, 1.5, np.asarray(1.75)], ids=["static-2", "static-1.5", "array-1.75"])
def test_max_steps(alpha):
    row = -(np.abs(np.random.default_rng(6).standard_normal(30)) ** 9)
    needed = int(run(alpha, row[None]).steps[0])
    assert needed > 2
    alpha = alpha if isinstance(alpha, float) else jnp.asarray(alpha)
    short = jax.jit(lambda z: simplex_map(z, alpha, needed - 1))(row)
    assert not short.converged
    assert short.finite
    assert short.steps == needed - 1
    assert jax.jit(lambda z: simplex_map(z, alpha, needed))(row).converged


@pytest.mark.parametrize("alpha", [0.999, 4.001, np.nan, INF, -INF])
def test_an_exponent_outside_its_range(alpha):
    with pytest.raises(ValueError, match="alpha must be in"):
        simplex_map(jnp.array(ROW), alpha, 10)
    found = run(np.asarray(alpha), ROW[None])
    assert np.all(np.isnan(found.p))
    assert np.all(np.isnan(found.theta))
    assert not found.finite[0]
    assert not found.converged[0]
    assert found.steps[0] == 0


def test_misuse_raises():
    with pytest.raises(ValueError, match=r"non-empty floating vector, got float64\[0\].*use jax\.vmap"):
        simplex_map(jnp.zeros(0), 2.0, 10)
    for scores in (jnp.zeros((2, 3)), jnp.arange(3)):  # with type checking on, jaxtyping is first
        with pytest.raises((ValueError, jaxtyping.TypeCheckError)):
            simplex_map(scores, 2.0, 10)
    with pytest.raises(ValueError, match="max_steps must be at least 1"):
        simplex_map(jnp.zeros(3), 2.0, 0)


@each_kernel
def test_float32_stays_float32_and_nothing_sorts_or_solves(alpha):
    z, exponent = jnp.zeros(600, jnp.float32), jnp.asarray(alpha, jnp.float32)

    def gradient(z, exponent):
        fixed = alpha if isinstance(alpha, float) else exponent
        return jax.hessian(lambda z: z @ probabilities(z, fixed))(z)

    program = str(jax.make_jaxpr(gradient)(z, exponent))
    assert "while" in program or alpha == 1
    for word in ("f64", "sort", "custom_linear_solve", "callback", "triangular"):
        assert word not in program
