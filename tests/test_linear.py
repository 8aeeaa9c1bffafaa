"""The linear solvers of the library against NumPy, on hard matrices, and that nothing hangs."""

import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest

import declarative as dn
from declarative._linear.bordered import Bordered, BorderedDiagonal
from declarative._linear.dense import Dense
from declarative._linear.lanes import over_lanes
from declarative._linear.norms import finite_largest, largest, maximum, norm

SIZES = (1, 2, 5, 70)


def solve(matrix, vector, transposed=False):
    operator = lx.MatrixLinearOperator(matrix)
    out = lx.linear_solve(operator.T if transposed else operator, vector, Dense(), throw=False)
    return out.value, out.result._value


def backward_error(matrix, solution, vector):
    residual = np.linalg.norm(matrix @ solution - vector)
    return residual / (np.linalg.norm(matrix, 2) * np.linalg.norm(solution) + np.linalg.norm(vector))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_dense_is_backward_stable_batched_and_not(n, transposed, dtype):
    rng = np.random.default_rng(n)
    matrices = rng.standard_normal((4, n, n))
    matrices[1] *= 10.0 ** rng.uniform(-6, 6, (n, 1))  # badly scaled rows
    matrices[2] = matrices[2][::-1] + 1e-3 * np.triu(rng.standard_normal((n, n)))
    if n > 1:
        matrices[3, 0, 0] = 0  # needs a pivot at once
    vectors = rng.standard_normal((4, n))
    matrices, vectors = jnp.asarray(matrices, dtype), jnp.asarray(vectors, dtype)
    batched, codes = jax.jit(jax.vmap(lambda m, v: solve(m, v, transposed)))(matrices, vectors)
    assert np.all(np.asarray(codes) == 0)
    for i in range(4):
        single, _ = solve(matrices[i], vectors[i], transposed)
        exact = np.asarray(matrices[i], np.float64)
        exact = exact.T if transposed else exact
        for got in (batched[i], single):
            assert got.dtype == dtype
            assert backward_error(exact, np.asarray(got, np.float64), np.asarray(vectors[i])) < 20 * float(
                jnp.finfo(dtype).eps
            )


@pytest.mark.parametrize("n", [2, 40])
def test_dense_reports_singular_matrices(n):
    rng = np.random.default_rng(0)
    good = rng.standard_normal((n, n))
    low_rank = good.copy()
    low_rank[-1] = low_rank[0]
    zero_column = good.copy()
    zero_column[:, 1] = 0
    scaled = good * 10.0 ** np.linspace(-8, 8, n)[:, None]  # singular to look at, fine after equilibration
    batch = jnp.asarray(np.stack([good, low_rank, zero_column, scaled]))
    _, codes = jax.vmap(solve)(batch, jnp.ones((4, n)))
    assert (np.asarray(codes) != 0).tolist() == [False, True, True, False]
    for i, singular in enumerate([False, True, True, False]):
        assert (int(solve(batch[i], jnp.ones(n))[1]) != 0) == singular


def test_a_nan_lane_stays_in_its_lane():
    matrices = jnp.stack([jnp.eye(3) * 2, jnp.full((3, 3), jnp.nan), jnp.eye(3) + 0.1])
    clean = matrices.at[1].set(jnp.eye(3))
    got, want = (jax.vmap(solve)(m, jnp.ones((3, 3)))[0] for m in (matrices, clean))
    keep = np.array([0, 2])
    assert np.all(np.asarray(got)[keep] == np.asarray(want)[keep])
    assert np.all(np.isnan(np.asarray(got)[1]))


def test_dense_differentiates():
    rng = np.random.default_rng(0)
    matrix, vector = jnp.asarray(rng.standard_normal((6, 6))), jnp.asarray(rng.standard_normal(6))
    ours = lambda m, v: jnp.sum(jnp.sin(solve(m, v)[0]))
    want = lambda m, v: jnp.sum(jnp.sin(jnp.linalg.solve(m, v)))
    for transform in (jax.grad, jax.jacfwd, jax.hessian):
        for left, right in zip(
            jax.tree.leaves(transform(ours, (0, 1))(matrix, vector)),
            jax.tree.leaves(transform(want, (0, 1))(matrix, vector)),
            strict=True,
        ):
            np.testing.assert_allclose(np.asarray(left), np.asarray(right), rtol=1e-9, atol=1e-9)


def test_bordered_diagonal():
    rng = np.random.default_rng(0)
    for n in (1, 4):
        diagonal, column, row = (jnp.asarray(rng.standard_normal(n)) for _ in range(3))
        operator = BorderedDiagonal(diagonal, column, row, jnp.asarray(rng.standard_normal()))
        vector = jnp.asarray(rng.standard_normal(n + 1))
        dense = np.asarray(operator.as_matrix())
        np.testing.assert_allclose(np.asarray(operator.mv(vector)), dense @ vector, rtol=1e-13)
        for op, matrix in ((operator, dense), (operator.T, dense.T)):
            got = lx.linear_solve(op, vector, Bordered()).value
            np.testing.assert_allclose(np.asarray(got), np.linalg.solve(matrix, vector), rtol=1e-10)
    singular = BorderedDiagonal(jnp.ones(2), jnp.ones(2), jnp.ones(2), jnp.asarray(2.0))
    assert lx.linear_solve(singular, jnp.arange(3.0), Bordered(), throw=False).result != lx.RESULTS.successful


@pytest.mark.timeout(120)
def test_two_batched_nodes_side_by_side_do_not_hang():
    """Two independent batched LAPACK calls in flight deadlock jaxlib 0.10 on two cores; ours go lane by lane."""
    n, batch = 50, 128
    weight = jnp.eye(n) + 0.01 * jnp.asarray(np.random.default_rng(0).standard_normal((n, n)))
    node = dn.Root(lambda y, x: weight @ y + 0.1 * y**3 - x, throw=False)
    solve = jax.vmap(lambda x: node(x, y0=jnp.zeros(n)))

    @jax.jit
    def gradient(x):
        def loss(x):
            body = lambda i, c: (jnp.tanh(solve(c[0])) + x, jnp.tanh(solve(2 * c[1])) - x)
            first, second = jax.lax.fori_loop(0, 3, body, (x, -x))
            return jnp.sum(first * second)

        return jax.grad(loss)(x)

    out = jax.block_until_ready(gradient(jnp.ones((batch, n))))
    assert np.all(np.isfinite(np.asarray(out)))


def test_lapack_is_never_called_on_a_batch_on_cpu():
    calls = []

    def kernel(matrix):
        calls.append(matrix.ndim)
        return jnp.linalg.cholesky(matrix), matrix[0]

    matrices = jnp.broadcast_to(4 * jnp.eye(3), (2, 5, 3, 3)) + jnp.arange(2.0)[:, None, None, None]
    each = over_lanes(kernel)
    factor, row = jax.jit(jax.vmap(jax.vmap(each)))(matrices)
    np.testing.assert_allclose(np.asarray(factor), np.linalg.cholesky(np.asarray(matrices)), rtol=1e-15)
    np.testing.assert_allclose(np.asarray(row), np.asarray(matrices[:, :, 0]))
    text = jax.jit(jax.vmap(jax.vmap(each))).lower(matrices).compile().as_text() or ""
    targets = [line for line in text.splitlines() if "lapack_dpotrf" in line]
    assert targets
    assert not [line for line in targets if "[2,5,3,3]" in line or "[10,3,3]" in line]
    shared = jax.vmap(over_lanes(lambda a, b: a @ b), in_axes=(0, None))(matrices[:, 0], jnp.eye(3))
    np.testing.assert_allclose(np.asarray(shared), np.asarray(matrices[:, 0]))


def test_a_nan_does_not_hide_from_a_maximum():
    """XLA's CPU backend loses it in `jnp.max` of a batch of this size."""
    x = jnp.ones((512, 12)).at[200, 3].set(jnp.nan).at[300, 5].set(-jnp.inf)
    got = jax.jit(jax.vmap(lambda row: largest((row, jnp.zeros(2)))))(x)
    assert jnp.isnan(got[200])
    assert got[300] == jnp.inf
    assert got[0] == 1
    columns = jax.jit(lambda x: maximum(x, axis=1))(x)
    assert jnp.isnan(columns[200])


def test_lanes_of_which_arrays_have_only_some_axes():
    rng = np.random.default_rng(0)
    scale, matrix, vector = rng.standard_normal(3), rng.standard_normal((2, 4, 4)), rng.standard_normal((3, 2, 4))
    shared = rng.standard_normal((4, 4))

    @over_lanes
    def kernel(scale, matrix, vector, shared):
        return scale * jnp.linalg.solve(matrix, vector), shared @ vector

    inner = jax.vmap(kernel, in_axes=(None, 0, 0, None))
    outer = jax.jit(jax.vmap(inner, in_axes=(0, None, 0, None)))
    solved, product = outer(scale, matrix, vector, shared)
    for i in range(3):
        for j in range(2):
            np.testing.assert_allclose(solved[i, j], scale[i] * np.linalg.solve(matrix[j], vector[i, j]), rtol=1e-10)
            np.testing.assert_allclose(product[i, j], shared @ vector[i, j], rtol=1e-12)


@pytest.mark.parametrize("n", [37, 3000])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_norm_over_the_range_of_the_dtype(dtype, n):
    limits = jnp.finfo(dtype)
    some = jr.normal(jr.key(0), (n,), dtype)
    compiled = jax.jit(jax.vmap(norm))
    for scale in (
        float(limits.tiny) * 1e3,
        float(limits.tiny) ** 0.5,
        1.0,
        float(limits.max) ** 0.5,
        float(limits.max) / 100,
    ):
        # Among others: the compiler must not square a factor that scales them.
        rows = jnp.stack([some * scale, 0 * some, some])
        np.testing.assert_allclose(
            compiled(rows), np.linalg.norm(np.asarray(rows, np.longdouble), axis=1), rtol=8 * float(limits.eps)
        )
    bad = jnp.asarray([[jnp.inf, 1], [jnp.nan, jnp.inf], [jnp.nan, 1]], dtype)
    bad = jnp.concatenate([bad, jnp.ones((3, n), dtype)], axis=1)
    np.testing.assert_array_equal(compiled(bad), [np.inf, np.nan, np.nan])
    np.testing.assert_array_equal(jax.grad(norm)(jnp.zeros(3, dtype)), jnp.zeros(3))
    np.testing.assert_allclose(jax.grad(norm)(some), some / norm(some), rtol=8 * float(limits.eps))


def test_second_derivative_of_the_norm_at_every_scale():
    vector = jnp.array([3.0, 4.0], jnp.float32)
    for scale in (1e-20, 1.0, 1e20):
        np.testing.assert_allclose(
            jax.hessian(norm)(vector * scale) * scale, [[0.128, -0.096], [-0.096, 0.072]], rtol=1e-5
        )


def test_finite_largest():
    rows = np.zeros((5, 5000))
    rows[0, 7], rows[1, 7], rows[2, 7], rows[3, :] = -3, np.nan, -np.inf, -1e-300
    np.testing.assert_array_equal(jax.jit(jax.vmap(finite_largest))(rows), [3, np.nan, np.nan, 1e-300, 0])
    assert finite_largest(jnp.zeros(0)) == 0
