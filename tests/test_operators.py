"""Quadratic programs whose blocks are operators: the splitting method and the matrix-free linear algebra behind it."""

# An absent block is None, and a block an array or an operator: which, is fixed where the program is built.
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportIndexIssue=false, reportArgumentType=false

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from jax.experimental.sparse import BCOO

import declarative as dn
from declarative._core.adjoint import lax_loop
from declarative._linear.matrix_free import minimum_residual

from .helpers import tree_close
from .programs import as_operators, program, with_blocks
from .test_quadratic_program import hostile_run

QUIET = dn.QuadraticProgram(throw=False)
ELASTIC = dn.QuadraticProgram(throw=False, elastic=10.0)
BATCH = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(program(seed) for seed in range(4)))


@eqx.filter_jit
def everything(qp, x, operators: bool):
    """Solutions of a batch, and the gradient of a function of all that they hold."""
    weights = jnp.sin(jnp.arange(1.0, 6.0))

    def solve(x):
        return qp.solve(as_operators(x) if operators else x)

    def loss(x):
        s = jax.vmap(solve)(x)
        parts = (s.value @ weights, s.dual.equality[:, 0], s.dual.inequality @ weights[:4], s.dual.bound @ weights)
        return sum(jnp.sum(part) for part in parts) + jnp.sum(s.objective**2), s

    return jax.grad(loss, has_aux=True)(x)


@pytest.mark.slow
@pytest.mark.parametrize("qp", [QUIET, ELASTIC], ids=["plain", "elastic"])
def test_operators_agree_with_arrays(qp):
    (free_gradient, free), (gradient, solution) = (everything(qp, BATCH, operators) for operators in (True, False))
    assert bool(jnp.all(free.result == dn.RESULTS.successful))
    tree_close((free.value, free.dual, free.objective), (solution.value, solution.dual, solution.objective), 1e-9)
    tree_close(free_gradient, gradient, 1e-8)


def test_a_large_program_in_float32():
    """A portfolio of 3000 assets under a factor model: nothing of size n x n exists."""
    n, rng = 3000, np.random.default_rng(0)
    array = lambda block: jnp.asarray(block, jnp.float32)
    D, F, mu = array(rng.uniform(0.5, 1.5, n)), array(rng.standard_normal((n, 5)) / 2), array(rng.standard_normal(n))
    vector = jax.ShapeDtypeStruct((n,), jnp.float32)

    @jax.jit
    def gradient(D, F, mu):
        def loss(D, F, mu):
            # Closed-over arrays: the operator's own leaves, so they have gradients.
            Q = lx.FunctionLinearOperator(lambda z: D * z + F @ (F.T @ z), vector, lx.positive_semidefinite_tag)
            total = lx.FunctionLinearOperator(lambda z: jnp.sum(z)[None], vector)
            s = QUIET.solve(Q, -mu, A=total, b=jnp.ones(1, jnp.float32), lower=0.0)
            return jnp.sum(s.value**2), s

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(D, F, mu)

    gradients, s = gradient(D, F, mu)
    assert s.result == dn.RESULTS.successful
    # The assets held, and a reference in float64 on those alone.
    held = np.flatnonzero(np.asarray(s.value) > 0)
    assert 1 < held.size < 100
    k = held.size
    wide = lambda block: np.asarray(block, np.float64)[held]
    kkt = np.block([[np.diag(wide(D)) + wide(F) @ wide(F).T, np.ones((k, 1))], [np.ones((1, k)), np.zeros((1, 1))]])
    z = np.linalg.solve(kkt, np.append(wide(mu), 1))[:k]
    back = -np.linalg.solve(kkt, np.append(2 * z, 0))[:k]
    np.testing.assert_allclose(s.value[held], z, atol=1e-5)
    np.testing.assert_allclose(gradients[0][held], back * z, atol=1e-4)
    np.testing.assert_allclose(gradients[2][held], -back, atol=1e-4)
    assert float(jnp.max(jnp.abs(gradients[0].at[held].set(0)))) == 0


@pytest.mark.slow
def test_sparse_matrices_and_one_operator_among_arrays():
    x = program(1)
    dense = QUIET.solve(x)
    sparse = QUIET.solve(
        BCOO.fromdense(x.Q), x.q, A=BCOO.fromdense(x.A), b=x.b, G=x.G, h=x.h, lower=x.lower, upper=x.upper
    )
    tree_close((sparse.value, sparse.dual), (dense.value, dense.dual), 1e-9)


@pytest.mark.slow
def test_a_warm_start_saves_rounds():
    x = as_operators(program(2))
    cold = QUIET.solve(x)
    warm = QUIET.solve(x, y0=cold.unknown)
    assert int(warm.stats["steps"]) <= 1
    tree_close(warm.value, cold.value, 1e-9)


def test_failures_of_one_lane_leave_the_others_alone():
    x = BATCH
    bad = with_blocks(
        x,
        q=x.q.at[0, 1].set(jnp.nan),
        G=x.G.at[1, 1].set(-x.G[1, 0]),
        h=x.h.at[1, :2].set(jnp.array([0.0, -1.0])),
        Q=x.Q.at[2].set(-x.Q[2]),
    )
    solve = eqx.filter_jit(lambda x: jax.vmap(lambda x: QUIET.solve(as_operators(x)))(x))
    fine, out = solve(x), solve(bad)
    expected = ("nonfinite_data", "infeasible", "indefinite", "successful")
    for i, name in enumerate(expected):
        assert bool((out.result == getattr(dn.RESULTS, name))[i]), name
    assert np.array_equal(out.value[3], fine.value[3])
    nu, lam, mu = out.dual.equality[1], out.dual.inequality[1], out.dual.bound[1]
    np.testing.assert_allclose(bad.A[1].T @ nu + bad.G[1].T @ lam + mu, 0, atol=1e-5)
    reach = jnp.where(mu > 0, mu * bad.upper[1], mu * bad.lower[1])
    np.testing.assert_allclose(bad.b[1] @ nu + bad.h[1] @ lam + jnp.sum(reach), -1, rtol=1e-9)


def test_an_unbounded_program_ends_with_a_ray():
    flat = lx.DiagonalLinearOperator(jnp.array([1.0, 0.0]))
    s = QUIET.solve(flat, jnp.array([0.5, -2.0]), lower=0.0)
    assert s.result == dn.RESULTS.unbounded
    tree_close(s.value, jnp.array([0.0, 0.5]), 1e-6)


def test_a_curved_program_is_not_unbounded_and_a_flat_one_not_indefinite():
    n = 60
    laplacian = 2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    lower = np.full(n, -1e3)
    lower[[10, 40]] = 30, 60
    single = lambda block: jnp.asarray(block, jnp.float32)
    s = QUIET.solve(lx.MatrixLinearOperator(single(laplacian)), single(-np.ones(n)), lower=single(lower))
    # Curvature of (pi / n)^2: the last iterate may be flagged, the program is not unbounded.
    assert s.result != dn.RESULTS.unbounded
    np.testing.assert_allclose(s.value[:3], [30, 59, 87], rtol=1e-4)
    half = lx.DiagonalLinearOperator(jnp.asarray(np.repeat([1.0, 0.0], 30)))
    s = QUIET.solve(half, jnp.ones(60), lower=-1.0, upper=1.0)
    assert s.result == dn.RESULTS.successful
    tree_close(s.value, -jnp.ones(60), 1e-12)


def test_rows_that_differ_in_sign_are_seen():
    """Random signs would cancel on some row z_i - z_j: the constraint would have no size."""
    n = 300
    rng = np.random.default_rng(n)
    signs = rng.choice([-1.0, 1.0], (8, n))
    i, j = np.argwhere(np.triu(signs.T @ signs == 8, 1))[0]
    row = np.zeros((1, n))
    row[0, [i, j]] = 1e-12, -1e-12
    q = -1e12 * row[0]
    G = lx.MatrixLinearOperator(jnp.asarray(row))
    s = QUIET.solve(lx.DiagonalLinearOperator(jnp.ones(n)), jnp.asarray(q), G=G, h=jnp.array([0.5e-12]))
    assert s.result == dn.RESULTS.successful
    np.testing.assert_allclose(s.value[i] - s.value[j], 0.5, rtol=1e-9)


def test_what_operators_cannot_do_is_said():
    one = lx.DiagonalLinearOperator(jnp.ones(2))
    with pytest.raises(ValueError, match="central path"):
        dn.QuadraticProgram(gradient="smoothed")(one, jnp.ones(2), lower=0.0)
    with pytest.raises(ValueError, match="A must be a matrix with 2 columns"):
        QUIET(one, jnp.ones(2), A=lx.MatrixLinearOperator(jnp.ones((1, 3))), b=jnp.ones(1))
    with pytest.raises(ValueError, match="the sparse matrix Q must hold floating-point numbers"):
        QUIET(BCOO.fromdense(jnp.eye(2, dtype=jnp.int32)), jnp.ones(2))
    pairs = lx.FunctionLinearOperator(lambda z: (z, z), jax.ShapeDtypeStruct((2,), jnp.float64))
    with pytest.raises(ValueError, match="must map vectors to vectors"):
        QUIET(one, jnp.ones(2), G=pairs, h=jnp.ones(2))


def test_minimum_residual():
    rng = np.random.default_rng(0)
    K, H = rng.standard_normal((3, 6)), rng.standard_normal((6, 6))
    matrix = jnp.asarray(np.block([[H @ H.T + np.eye(6), K.T], [K, np.zeros((3, 3))]]))
    b = jnp.asarray(rng.standard_normal(9))
    x = minimum_residual(lambda v: matrix @ v, b, jnp.ones(9), lax_loop, rtol=1e-12)
    np.testing.assert_allclose(matrix @ x, b, atol=1e-10)
    # Singular and consistent: the solution of least norm.
    twice = jnp.concatenate([matrix, matrix[6:]], axis=0)
    twice = jnp.concatenate([twice, twice[:, 6:9]], axis=1)
    x = minimum_residual(lambda v: twice @ v, jnp.append(b, b[6:]), jnp.ones(12), lax_loop, rtol=1e-12)
    np.testing.assert_allclose(x[6:9], x[9:], atol=1e-9)
    np.testing.assert_allclose(twice @ x, jnp.append(b, b[6:]), atol=1e-9)


@pytest.mark.full
def test_hostile_programs_by_operators():
    wrong, tally = hostile_run([(3, 4, 1), (6, 8, 2)], range(4), operators=True)
    assert not wrong
    assert all(answered >= 0.9 * asked for answered, asked in tally.values())
