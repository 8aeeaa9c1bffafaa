"""Perspective-n-point: known poses, SciPy's least squares, degenerate sets, units, and gradients."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from scipy.spatial.transform import Rotation

import declarative as dn
from declarative import RESULTS

CAMERA = np.array([[800.0, 2.0, 320.0], [0.0, 780.0, 240.0], [0.0, 0.0, 1.0]])
N = 6
NODE = dn.PerspectiveNPoint(throw=False)


@jax.jit
@jax.vmap
def solved(points, pixels, weights, intrinsics):
    """One compilation for all tests in float64: 16 lanes of 6 points."""
    return NODE.solve(points, pixels, weights=weights, intrinsics=intrinsics)


def seen(X, R, t, K=CAMERA):
    image = (np.einsum("...ij,...nj->...ni", R, X) + t[..., None, :]) @ np.swapaxes(K, -1, -2)
    return image[..., :2] / image[..., 2:]


def scenes(rng, lanes=16, depth=6.0):
    X = np.clip(rng.standard_normal((lanes, N, 3)), -2, 2)
    t = np.concatenate([rng.uniform(-1, 1, (lanes, 2)), np.full((lanes, 1), depth)], axis=1)
    return X, Rotation.random(lanes, random_state=rng).as_matrix(), t


def broadcast(X, u, w=None, K=CAMERA):
    w = np.ones(N) if w is None else w
    return tuple(jnp.asarray(np.broadcast_to(a, (16, *a.shape[-k:]))) for a, k in ((X, 2), (u, 2), (w, 1), (K, 2)))


def names(result):
    return [
        next(name for name in RESULTS._name_to_item if RESULTS._name_to_item[name]._value == c)
        for c in np.asarray(result._value)
    ]


def test_known_poses_are_recovered():
    """General, planar and nearly collinear sets; half turns about all axes; far away; 4 of 6 points with a weight."""
    rng = np.random.default_rng(0)
    X, R, t = scenes(rng)
    X[4:8, :, 2] = 0
    R[8:11] = [np.diag(signs) for signs in ((1, -1, -1), (-1, 1, -1), (-1, -1, 1))]
    R[11] = Rotation.from_rotvec(np.pi * np.array([0.6, 0.0, 0.8])).as_matrix()
    R[12] = np.eye(3)
    t[13:15, 2] = 300.0
    w = np.ones((16, N))
    w[15, :2] = 0
    out = solved(*broadcast(X, seen(X, R, t), w))
    assert names(out.result) == ["successful"] * 16
    np.testing.assert_allclose(out.value.rotation, R, atol=1e-10)
    np.testing.assert_allclose(out.value.translation, t, rtol=0, atol=1e-10 * 300)
    np.testing.assert_allclose(out.value.translation[:13], t[:13], atol=1e-10)
    np.testing.assert_allclose(out.objective, 0, atol=1e-18)


def test_noise_against_scipy_from_the_true_pose():
    """Never worse than what SciPy finds from the truth, and equal to it where it is the same minimum."""
    rng = np.random.default_rng(1)
    X, R, t = scenes(rng)
    u = seen(X, R, t) + 2 * rng.standard_normal((16, N, 2))
    w = rng.uniform(0.2, 2, (16, N))
    out = solved(*broadcast(X, u, w))
    assert names(out.result) == ["successful"] * 16
    for i in range(16):

        def residuals(p, i=i):
            turned = Rotation.from_rotvec(p[:3]).as_matrix() @ R[i]
            return (np.sqrt(w[i])[:, None] * (seen(X[i], turned, p[3:]) - u[i])).ravel()

        best = scipy.optimize.least_squares(
            residuals, np.append(np.zeros(3), t[i]), "3-point", xtol=1e-15, ftol=1e-15, gtol=1e-15
        )
        assert out.objective[i] <= best.cost * (1 + 1e-12)
        if best.cost < out.objective[i] * (1 + 1e-6):
            np.testing.assert_allclose(out.value.translation[i], best.x[3:], atol=1e-5)


def test_units_do_not_matter():
    """Lengths, weights, and pixels, each by 1e-6 and 1e6: the same pose in other units."""
    rng = np.random.default_rng(2)
    X, R, t = (part[0] for part in scenes(rng))
    u = seen(X, R, t) + rng.standard_normal((N, 2))
    w = rng.uniform(0.2, 2, N)
    lengths, masses, pixels = (np.ones(16) for _ in range(3))
    lengths[1:3], masses[3:5], pixels[5:7] = (1e-6, 1e6), (1e-6, 1e6), (1e-6, 1e6)
    lengths[7], masses[7], pixels[7] = 1e6, 1e6, 1e-6
    scale = lambda s, a: s.reshape(-1, *[1] * a.ndim) * a
    K = np.broadcast_to(CAMERA, (16, 3, 3)).copy()
    K[:, :2] *= pixels[:, None, None]
    out = solved(*broadcast(scale(lengths, X), scale(pixels, u), scale(masses, w), K))
    assert names(out.result) == ["successful"] * 16
    np.testing.assert_allclose(out.value.rotation, np.broadcast_to(out.value.rotation[:1], (16, 3, 3)), atol=1e-11)
    np.testing.assert_allclose(
        out.value.translation / lengths[:, None], np.broadcast_to(out.value.translation[:1], (16, 3)), rtol=1e-11
    )
    np.testing.assert_allclose(out.objective / (masses * pixels**2), np.full(16, out.objective[0]), rtol=1e-10)


def test_hostile_lanes():
    """Each has its own fate, and the first its value whatever the others are."""
    rng = np.random.default_rng(3)
    X, R, t = (part[:1].repeat(16, 0) for part in scenes(rng))
    u = seen(X, R, t)
    w, K = np.ones((16, N)), np.broadcast_to(CAMERA, (16, 3, 3)).copy()
    clean = solved(*broadcast(X, u, w, K))
    want = ["successful"] * 16
    X, u = X.copy(), u.copy()

    def lane(i, name):
        want[i] = name

    X[1] = X[1, :1]  # all in one place
    lane(1, "not_unique")
    X[2] = np.linspace(-1, 1, N)[:, None] * np.array([1.0, 2.0, -0.5])
    u[2] = seen(X[2], R[2], t[2])  # on a line
    lane(2, "not_unique")
    w[3, 3:] = 0  # three points
    lane(3, "not_unique")
    w[4] = 0
    lane(4, "empty")
    w[5, 0] = -1
    lane(5, "nonfinite_data")
    u[6, 2, 1] = np.nan
    lane(6, "nonfinite_data")
    X[7, 0, 0] = np.inf
    lane(7, "nonfinite_data")
    K[8, 0] = 0  # a camera that sees no width
    lane(8, "nonfinite_data")
    X[9, 0] = X[9, 1]
    u[9, 0] = u[9, 1]  # a point twice
    u[10] = u[10, :1]  # a different set of points, all seen in one place
    lane(10, None)
    u[11] = rng.uniform(0, 500, (N, 2))  # nonsense
    out = solved(*broadcast(X, u, w, K))
    got = names(out.result)
    assert [g for g, n in zip(got, want, strict=True) if n is not None] == [n for n in want if n is not None]
    assert got[10] != "successful"
    np.testing.assert_array_equal(out.value.rotation[0], clean.value.rotation[0])
    np.testing.assert_array_equal(out.value.rotation[12:], clean.value.rotation[12:])
    np.testing.assert_allclose(out.value.rotation[9], R[9], atol=1e-10)
    # Nonsense has a best pose too, with every point in front of the camera.
    depth = np.einsum("ij,nj->ni", out.value.rotation[11], X[11])[:, 2] + out.value.translation[11, 2]
    assert np.all(depth > 0)


def test_two_poses_of_one_quality_are_not_unique():
    """A planar set that looks the same from either side of its middle: which end of it is nearer, nothing says."""
    a = np.array([[1.0, 0, 0], [0.5, 0.9, 0], [-0.5, 0.9, 0], [-1.0, 0, 0], [-0.5, -0.9, 0], [0.5, -0.9, 0]])
    # Foreshortened, but as large at one end as at the other.
    u = a[:, :2] * np.array([1.0, 0.7]) / 10
    out = solved(*broadcast(a, u, None, np.eye(3)))
    assert names(out.result) == ["not_unique"] * 16


@pytest.mark.slow
def test_gradients_at_half_a_turn_in_float64_and_float32():
    """Both modes against differences at a rotation by pi, with a weight of zero, for all blocks; float32 against float64."""
    rng = np.random.default_rng(4)
    X, R, t = (part[0] for part in scenes(rng))
    R = np.diag([1.0, -1.0, -1.0])
    data = (X, seen(X, R, t) + rng.standard_normal((N, 2)), np.array([1.0, 0.5, 0.0, 2.0, 0.7, 1.3]), CAMERA)
    c = rng.standard_normal((3, 3)), rng.standard_normal(3)

    def loss(node, X, u, w, K):
        pose = node(X, u, weights=w, intrinsics=K)
        return jnp.sum(c[0].astype(X.dtype) * pose.rotation) + c[1].astype(X.dtype) @ pose.translation

    gradient = jax.jit(jax.grad(partial(loss, NODE), (0, 1, 2, 3)))
    blocks = tuple(jnp.asarray(block) for block in data)
    got = gradient(*blocks)
    tangent = tuple(jnp.asarray(rng.standard_normal(block.shape) * np.abs(block)) for block in blocks)
    _, forward = jax.jit(lambda b, t: jax.jvp(partial(loss, NODE), b, t))(blocks, tangent)

    def value(lanes):
        """By the function that the other tests have compiled."""
        lanes = [*lanes, *[lanes[0]] * (16 - len(lanes))]
        pose = solved(*(jnp.stack(block) for block in zip(*lanes, strict=True))).value
        return np.sum(c[0][None] * pose.rotation, axis=(1, 2)) + pose.translation @ c[1]

    h = 1e-6
    at = value([tuple(block + k * h * d for block, d in zip(blocks, tangent, strict=True)) for k in (-2, -1, 1, 2)])
    want = (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * h)
    np.testing.assert_allclose(forward, want, rtol=1e-7)
    np.testing.assert_allclose(sum(jnp.sum(g * d) for g, d in zip(got, tangent, strict=True)), forward, rtol=1e-10)
    # The weight of zero, by a difference to one side.
    more = value([(blocks[0], blocks[1], blocks[2].at[2].set(w), blocks[3]) for w in (0, 1e-5, 2e-5)])
    np.testing.assert_allclose(got[2][2], (4 * more[1] - more[2] - 3 * more[0]) / 2e-5, rtol=1e-4)
    low = tuple(block.astype(jnp.float32) for block in blocks)
    same = gradient(*(block.astype(jnp.float64) for block in low))
    for a, b in zip(gradient(*low), same, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=2e-3 * float(jnp.max(jnp.abs(b))))


def test_misuse():
    X, u = jnp.ones((5, 3)), jnp.ones((5, 2))
    node = dn.PerspectiveNPoint()
    for match, args, more in (
        ("points must hold at least 4", (X[:3], u[:3]), {}),
        ("points must be .n, 3.*vmap", (X[None], u[None]), {}),
        ("pixels must be", (X, u[:4]), {}),
        ("pixels are missing", (X,), {}),
        ("weights must have one entry", (X, u), {"weights": jnp.ones(4)}),
        ("intrinsics must be .3, 3.", (X, u), {"intrinsics": jnp.ones(4)}),
        ("one floating dtype", (X, u.astype(jnp.float32)), {}),
    ):
        with pytest.raises(ValueError, match=match):
            node(*args, **more)
