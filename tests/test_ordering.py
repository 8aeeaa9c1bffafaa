"""Isotonic regression, soft sorting and soft ranking: against exact arithmetic, at ties and at extreme scales."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import declarative as dn
from declarative._linear.chain import Chain, ChainSolver
from declarative._nodes.ordering.permutahedron import checked_strength
from declarative._solvers.isotonic import pool

# ----------------------------------------------------------------------------------------------------------------------
# References: pool adjacent violators in exact arithmetic
# ----------------------------------------------------------------------------------------------------------------------


def exact_isotonic(x, weights=None):
    """Fractions: the fit of each entry."""
    weights = [Fraction(1)] * len(x) if weights is None else [Fraction(float(w)) for w in weights]
    blocks = []  # weighted sum, weight, length
    for value, weight in zip(x, weights, strict=True):
        value = value if isinstance(value, Fraction) else Fraction(float(value))
        blocks.append((weight * value, weight, 1))
        while len(blocks) > 1 and blocks[-2][0] * blocks[-1][1] >= blocks[-1][0] * blocks[-2][1]:
            last, before = blocks.pop(), blocks.pop()
            blocks.append(tuple(a + b for a, b in zip(before, last, strict=True)))
    return [total / weight for total, weight, length in blocks for _ in range(length)]


def exact_projection(s, w):
    """Of Fractions s onto the hull of the permutations of w, both ascending."""
    fit = exact_isotonic([a - b for a, b in zip(s, w, strict=True)])
    return np.array([float(a - b) for a, b in zip(s, fit, strict=True)])


def exact_soft_rank(x, strength):
    order = np.argsort(x, kind="stable")
    s = [Fraction(float(value)) / Fraction(float(strength)) for value in np.asarray(x)[order]]
    ranks = np.empty(len(s))
    ranks[order] = exact_projection(s, [Fraction(i + 1) for i in range(len(s))])
    return ranks


def exact_soft_sort(x, strength):
    s = [Fraction(i + 1) / Fraction(float(strength)) for i in range(len(x))]
    return exact_projection(s, [Fraction(float(value)) for value in np.sort(x)])


# ----------------------------------------------------------------------------------------------------------------------
# Isotonic regression
# ----------------------------------------------------------------------------------------------------------------------

N = 24  # more than a column of the table that the kernel works on


def sequences(dtype):
    """A batch of awkward sequences with weights."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((8, N))
    spread = np.exp(3 * rng.standard_normal((8, N)))
    place, ones = np.arange(N), np.ones(N)
    rows = [
        (noise[0], ones),
        (noise[1] + place / 10, spread[0]),
        (np.sort(noise[2]), spread[1]),  # nothing to do
        (np.sort(noise[2])[::-1], spread[2]),  # one block
        (np.full(N, 0.1), spread[3]),  # constant
        (np.zeros(N), ones),
        (rng.integers(0, 3, N), ones),  # ties wherever one looks
        (np.where(place % 2, -1.0, 1.0), ones),
        (-(2.0 ** -(place / 2)), ones),  # many scales, in order
        (2.0 ** -(place / 2) * np.sign(noise[3]), spread[4]),
        (np.append(place[:-1], -1e5), ones),  # the last entry pools all
        (1e6 + noise[4], spread[5]),
        (1e8 * noise[5], spread[6]),
        (1e-8 * noise[5], 1e8 * spread[6]),
        (1e30 * noise[6], 1e-30 * spread[7]),
        (1e-30 * noise[6], 1e30 * ones),
        (noise[7], 10.0 ** rng.uniform(-15, 15, N)),
        (np.cumsum(noise[7]), np.where(place % 5, 1e-12, 1.0)),
    ]
    x, w = (np.stack(part).astype(dtype) for part in zip(*rows, strict=True))
    return x, w


@jax.jit
@jax.vmap
def weighted(x, w):
    return dn.Isotonic(throw=False).solve((x, w))


plain = jax.jit(jax.vmap(dn.isotonic_regression))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_isotonic_against_exact_pooling(dtype):
    x, w = sequences(dtype)
    eps = float(np.finfo(dtype).eps)
    solution, alone = weighted(x, w), plain(x)
    assert np.all(np.asarray(solution.result._value) == 0)
    for value in (solution.value, alone):
        assert value.dtype == dtype
        assert np.all(np.diff(value, axis=1) >= 0)
    off = lambda value, exact: np.array([abs(float(Fraction(float(a)) - b)) for a, b in zip(value, exact, strict=True)])
    for k in range(len(x)):
        size = float(np.abs(x[k]).max())
        exact = exact_isotonic(x[k], w[k])
        assert np.all(off(solution.value[k], exact) <= 4 * eps * size), k
        assert np.all(off(alone[k], exact_isotonic(x[k])) <= 4 * eps * size), k
        # The multipliers of (K1), in units of the largest pull.
        pulls = [Fraction(float(v)) * (Fraction(float(a)) - b) for v, a, b in zip(w[k], x[k], exact, strict=True)]
        sums = np.array([float(total) for total in np.cumsum(np.array(pulls))][:-1])
        assert np.all(np.abs(np.asarray(solution.dual[k], np.float64) - sums) <= 20 * eps * size * float(w[k].max())), k


def test_the_loop_ends_on_anything():
    """It is never given such data, and would end if it were."""
    jax.block_until_ready(jax.jit(pool)(jnp.array([jnp.inf, 1.0, jnp.nan, -jnp.inf, 3.0, -2.0, jnp.inf, 0.0])))


def test_isotonic_derivatives():
    """Of the means of blocks: to x the average, to w what is above the mean; and mixed second derivatives."""
    x = jnp.array([0.3, -0.8, 1.2, 0.4, 0.9, 0.1, 2.3])
    w = jnp.array([1.0, 0.3, 2.0, 0.7, 1.1, 0.2, 5.0])
    fit = np.array([float(v) for v in exact_isotonic(x, w)])
    same = fit[:, None] == fit[None]
    assert len(set(fit)) == 3
    weight = same @ np.asarray(w)
    to_x, to_w = same * np.asarray(w) / weight[:, None], same * (np.asarray(x) - fit) / weight[:, None]
    value = lambda x, w: dn.isotonic_regression(x, w)

    @jax.jit
    def derivatives(x, w):
        jacobian = lambda mode: mode(value, (0, 1))(x, w)
        return jacobian(jax.jacfwd), jacobian(jax.jacrev), jax.jacrev(jax.jacfwd(value, 1), 0)(x, w)

    forward, backward, mixed = derivatives(x, w)
    for got in (forward, backward):
        np.testing.assert_allclose(got[0], to_x, atol=1e-15)
        np.testing.assert_allclose(got[1], to_w, atol=1e-15)
    # Of (x_j - y_i) / W_i to x_k, with y_i moving as above.
    want = same[:, :, None] * (np.eye(7)[None] - to_x[:, None]) / weight[:, None, None]
    np.testing.assert_allclose(mixed, want, atol=1e-15)


def test_neighbours_that_are_equal_count_as_one_block():
    jacobian = jax.jacrev(dn.isotonic_regression)(jnp.array([0.1, 0.1, 0.1, 5.0]))
    np.testing.assert_allclose(jacobian[:3, :3], np.full((3, 3), 1 / 3), rtol=1e-15)
    np.testing.assert_array_equal(jacobian[3], np.array([0.0, 0, 0, 1]))


def test_isotonic_failures_leave_the_neighbours_alone():
    x, w = (part[:6].copy() for part in sequences(np.float64))
    good = weighted(x, w)
    x[1, 3], x[2, 0] = np.nan, np.inf
    w[3, 7], w[4, 5] = 0.0, -1.0
    solution = weighted(x, w)
    code = int(dn.RESULTS.nonfinite_data._value)
    np.testing.assert_array_equal(solution.result._value, np.array([0, code, code, code, code, 0]))
    for k in (0, 5):
        np.testing.assert_array_equal(solution.value[k], good.value[k])
    assert np.all(np.isnan(solution.value[1:5]))
    gradient = jax.jit(jax.vmap(jax.grad(lambda x, w: jnp.sum(dn.isotonic_regression(x, w) ** 2), (0, 1))))(x, w)
    for part in gradient:
        assert np.all(np.isnan(part[1:5]).any(1))
        assert np.all(np.isfinite(part[np.array([0, 5])]))


def test_weighted_chains_are_solved():
    """The linear systems of both orders, and their transposes, against dense matrices."""
    rng = np.random.default_rng(0)
    cut = jnp.array([False, True, False, False, True])
    weight, vector = jnp.asarray(rng.uniform(0.1, 3, 6)), rng.standard_normal(11)
    for sign in (1, -1):
        chain = Chain(cut, weight, weight=weight, sign=sign)
        for operator in (chain, chain.transpose()):
            got = ChainSolver().compute(operator, jnp.asarray(vector), {})[0]
            matrix = np.asarray(operator.as_matrix())
            np.testing.assert_allclose(got, np.linalg.solve(matrix, vector), atol=1e-12)
        np.testing.assert_array_equal(chain.transpose().as_matrix(), chain.as_matrix().T)
        np.testing.assert_array_equal(lx.diagonal(chain), np.diag(chain.as_matrix()))


def test_decreasing_and_bounds():
    x, w = (jnp.asarray(part[1]) for part in sequences(np.float64))
    down = jax.jit(lambda x, w: dn.isotonic_regression(x, w, increasing=False))(x, w)
    np.testing.assert_allclose(down, [-float(v) for v in exact_isotonic(-x, w)], atol=1e-14)
    # What the docstring says about bounds: no sequence in order and within them is better.
    y = np.clip(-down, 0.2, 2.1)
    cost = lambda y: np.sum(np.asarray(w) * (y + np.asarray(x)) ** 2, axis=-1)
    rng = np.random.default_rng(0)
    moves = 1e-3 * rng.standard_normal((1000, N)) * rng.integers(0, 2, (1000, N))
    assert np.all(cost(np.clip(np.sort(y + moves, axis=1), 0.2, 2.1)) >= cost(y))


# ----------------------------------------------------------------------------------------------------------------------
# Soft sorting and soft ranking
# ----------------------------------------------------------------------------------------------------------------------


def test_published_values():
    @jax.jit
    def all_of(x, strength):
        return [
            function(x, strength, descending=down)
            for function in (dn.soft_rank, dn.soft_sort)
            for down in (False, True)
        ]

    x = jnp.array([5.0, 1.0, 2.0])
    rank, rank_down, _, _ = all_of(x, jnp.array(2.0))
    np.testing.assert_allclose(rank, np.array([3.0, 1.25, 1.75]), rtol=1e-15)
    np.testing.assert_allclose(rank_down, np.array([1.0, 2.75, 2.25]), rtol=1e-15)
    _, _, sort, sort_down = all_of(x, jnp.array(1.0))
    np.testing.assert_allclose(sort, np.array([5, 8, 11]) / 3, rtol=1e-15)
    np.testing.assert_allclose(sort_down, np.array([11, 8, 5]) / 3, rtol=1e-15)
    hard = all_of(x, jnp.array(0.1))
    for got, want in zip(hard, ([3.0, 1, 2], [1.0, 3, 2], [1.0, 2, 5], [5.0, 2, 1]), strict=True):
        np.testing.assert_array_equal(got, np.array(want))


M = 12


@jax.jit
@jax.vmap
def ordered(x, strength):
    sort, rank = (node(strength, throw=False).solve(x) for node in (dn.SoftSort, dn.SoftRank))
    return sort, rank


def values(dtype):
    """Values and strengths: every combination of these."""
    rng = np.random.default_rng(3)
    noise = rng.standard_normal((2, M))
    rows = [
        noise[0],
        1e8 * noise[0],
        1e-8 * noise[0],
        1e6 + 3 * noise[1],
        np.round(2 * noise[1]),  # ties
        np.append(noise[1][1:], 1e8),  # an outlier
    ]
    strengths = [1e-6, 1e-2, 1.0, 30.0, 1e6]
    pairs = [(row, strength) for row in rows for strength in strengths]
    pairs += [(1e8 * noise[0], 1e8), (1e-8 * noise[0], 1e-9), (1e8 * noise[0], 3e-9), (1e-8 * noise[0], 1e8)]
    x, strength = zip(*pairs, strict=True)
    return np.stack(x).astype(dtype), np.array(strength).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.slow)])
def test_soft_sort_and_rank_against_exact_arithmetic(dtype):
    x, strength = values(dtype)
    eps = float(np.finfo(dtype).eps)
    sort, rank = ordered(x, strength)
    for k in range(len(x)):
        spread = float(np.max(np.abs(x[k] - np.sort(x[k])[M // 2])))
        # Ranks: to the rounding of n, and of the data in units of the strength, if that is what mixes them.
        want = exact_soft_rank(x[k], strength[k])
        hard = min(np.diff(np.unique(x[k])).tolist()) > float(strength[k]) * (1 + 8 * eps)
        allowed = 2 * eps * (M + (0 if hard else min(spread / float(strength[k]), M * M)))
        assert np.all(np.abs(np.asarray(rank.value[k]) - want) <= allowed), (
            k,
            np.abs(np.asarray(rank.value[k]) - want).max() / allowed,
        )
        # Sorted values: to the rounding of the largest, or of n / strength, if that is what mixes them.
        want = exact_soft_sort(x[k], strength[k])
        allowed = 2 * eps * max(float(np.abs(x[k]).max()), min(M / float(strength[k]), M * spread))
        assert np.all(np.abs(np.asarray(sort.value[k]) - want) <= allowed), (
            k,
            np.abs(np.asarray(sort.value[k]) - want).max() / allowed,
        )
    assert not np.any(np.asarray(sort.result._value))
    assert not np.any(np.asarray(rank.result._value))


def test_a_small_strength_gives_ranks_in_which_ties_share_the_average():
    x = jnp.array([3.0, 1.0, 3.0, 2.0, 1.0, 3.0], jnp.float32)

    @jax.jit
    def both(x, strength):
        return dn.soft_rank(x, strength), dn.soft_sort(x, strength), jax.jacrev(dn.soft_rank)(x, strength)

    ranks, ordered, _ = both(x, jnp.float32(1e-6))
    np.testing.assert_array_equal(ranks, np.array([5.0, 1.5, 5.0, 3.0, 1.5, 5.0]))
    np.testing.assert_array_equal(ordered, np.sort(x))
    # A tie is in one block, so it is no kink: the derivative is that of the block.
    tied = np.asarray(x)[:, None] == np.asarray(x)[None]
    want = (np.eye(6) - tied / tied.sum(1)) / 0.4
    np.testing.assert_allclose(both(x, jnp.float32(0.4))[2], want, atol=1e-6)
    large = jnp.array([1e30, -1e30, 5.0, 0.0, 1.0, 2.0], jnp.float32)
    np.testing.assert_array_equal(both(large, jnp.float32(1e-30))[0], np.array([6.0, 1, 5, 2, 3, 4]))


def test_derivatives_of_soft_rank():
    """By finite differences, exact inside of a piece; in the strength as well, to which it is not linear."""
    x = jnp.array([0.4, -1.3, 2.2, 0.1, 0.75, 3.9, -1.0])
    move = jnp.array([0.3, -0.2, 0.5, 0.1, -0.6, 0.2, 0.4])
    value = lambda t: dn.soft_rank(x + t * move, 0.6 * jnp.exp(0.3 * t))

    @jax.jit
    @jax.vmap
    def derivatives(t):
        pullback = jax.vjp(value, t)[1]
        return (
            value(t),
            jax.jacfwd(value)(t),
            jax.vmap(lambda g: pullback(g)[0])(jnp.eye(7)),
            jax.jacfwd(jax.jacrev(value))(t),
        )

    values, forward, backward, second = derivatives(jnp.array([-1e-4, 0.0, 1e-4]))
    np.testing.assert_allclose(forward[1], (values[2] - values[0]) / 2e-4, atol=1e-7)
    np.testing.assert_allclose(backward, forward, atol=1e-14)
    np.testing.assert_allclose(second[1], (values[2] - 2 * values[1] + values[0]) / 1e-8, atol=1e-6)
    assert np.abs(forward[1]).max() > 0.1


def test_one_entry_and_low_precision():
    one = jnp.array([2.5])
    for node, want in ((dn.SoftRank(), 1.0), (dn.SoftSort(), 2.5), (dn.Isotonic(), 2.5)):
        solution = node.solve(one)
        assert solution.value[0] == want
        assert solution.dual.shape == (0,)
        assert jnp.isinf(solution.stats["kink_distance"])
    half = jnp.array([5.0, 1.0, 2.0], jnp.bfloat16)
    out = dn.soft_rank(half, 2.0)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(jnp.float32), np.array([3.0, 1.25, 1.75]))


def test_kink_distances():
    x = jnp.array([0.0, 0.7, 2.0, 3.5])
    distance = dn.SoftRank(1.0).solve(x).stats["kink_distance"]
    np.testing.assert_allclose(distance, 0.15, rtol=1e-12)  # what the first two have to spare
    # Equal values in different blocks: their order is that in which they come.
    assert dn.SoftSort(1.0).solve(jnp.array([1.0, 1.0, 1.5, 1.8])).stats["kink_distance"] == 0


def test_soft_failures():
    x, strength = (part[:4].copy() for part in values(np.float32))
    good = ordered(x, strength)
    x[1, 3], strength[2], strength[3] = np.nan, 0.0, -1.0
    code = int(dn.RESULTS.nonfinite_data._value)
    for before, after in zip(good, ordered(x, strength), strict=True):
        np.testing.assert_array_equal(after.result._value, np.array([0, code, code, code]))
        np.testing.assert_array_equal(before.value[0], after.value[0])
        assert np.all(np.isnan(after.value[1:]))
    one = jnp.ones(3, jnp.float32)
    for call, words in (
        (lambda: dn.SoftRank(0.0), "strength must be positive"),
        (lambda: dn.SoftSort(float("nan")), "strength must be positive"),
        (lambda: checked_strength(jnp.ones(2)), "strength must be a number or a floating scalar"),
        (lambda: dn.SoftRank().solve(jnp.ones((2, 3))), "use `jax.vmap`"),
        (lambda: dn.SoftSort().solve(jnp.ones(0)), "non-empty floating"),
        (lambda: dn.Isotonic().solve(jnp.arange(3)), "non-empty floating"),
        (lambda: dn.Isotonic().solve((one, one[:2])), "weights must have the shape"),
        (lambda: dn.SoftRank(adjoint=dn.UnrolledAdjoint()), "has none"),
        (lambda: dn.Isotonic(adjoint=dn.UnrolledAdjoint()), "has none"),
        (lambda: dn.SoftSort(adjoint=dn.UnrolledAdjoint()), "has none"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.slow
def test_isotonic_of_any_length():
    """Around the powers of two at which the kernel's table grows."""
    rng = np.random.default_rng(0)
    for n in (2, 3, 15, 16, 17, 65, 1000):
        x = rng.standard_normal(n) + np.linspace(0, 2, n)
        exact = np.array([float(v) for v in exact_isotonic(x)])
        np.testing.assert_allclose(dn.isotonic_regression(jnp.asarray(x)), exact, rtol=0, atol=9e-16 * np.abs(x).max())
