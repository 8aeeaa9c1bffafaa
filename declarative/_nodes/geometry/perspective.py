"""The pose of a calibrated camera, from points and where they are seen (perspective-n-point)."""

from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int

from ..._core.implicit import Run
from ..._core.node import AbstractDeclarativeNode, Policy, envelope, evaluate, make_policy
from ..._core.results import RESULTS, choose
from ..._linear.norms import largest
from ..._linear.scaling import power_of_two

_MAX_STEPS = 200


class PerspectiveData(eqx.Module):
    """Points (n, 3), their images (n, 2), weights (n,) or None (all alike), and intrinsics K (3, 3) or None (the identity)."""

    points: Float[Array, "..."]
    pixels: Float[Array, "..."]
    weights: Float[Array, "..."] | None = None
    intrinsics: Float[Array, "..."] | None = None


class Pose(eqx.Module):
    """Takes a point X to R X + t in the frame of the camera, which looks along its third axis: `rotation` (3, 3), `translation` (3,)."""

    rotation: Float[Array, "..."]
    translation: Float[Array, "..."]


class PosePoint(eqx.Module):
    """The unknown of (K1)-(K3): a unit quaternion (real part first), and the centre of the points seen from the camera, in units of its depth."""

    quaternion: Float[Array, "..."]
    centre: Float[Array, "..."]


class PerspectiveNPoint(AbstractDeclarativeNode):
    r"""The pose of a camera from n points and their images: the least-squares solution in pixels.

    **Problem.**     $\min_{R \in SO(3),\,t} \tfrac12\sum_i w_i \|r_i\|^2$, $r_i = \pi(K(RX_i + t)) - u_i$, $\pi(p) = (p_1, p_2)/p_3$, over poses with
                     all points that have a weight in front of the camera, $(RX_i + t)_3 > 0$                                        (P)
    **Optimality.**  With $g_i = w_i\,(\partial r_i/\partial p_i)^\top r_i$, the pull on the point $p_i = RX_i + t$, and $\bar X$ the mean of
                     the points: forces balance, $\sum_i g_i = 0$ (K1), torques balance, $\sum_i R(X_i - \bar X) \times g_i = 0$ (K2), and
                     the quaternion of R has $(1 - q^\top q)/2 = 0$ (K3). No chart has an edge here: half a turn is like any rotation.
    **Solver.**      The search: $t$ eliminated from the collinearity equations $(RX_i + t)_{1,2} = (m_i)_{1,2}(RX_i + t)_3$, $m_i = K^{-1}u_i$,
                     leaves $\min_R \mathrm{vec}(R)^\top \Omega\,\mathrm{vec}(R)$, 9 x 9 whatever n is (Terzakis & Lourakis 2020);
                     Levenberg-Marquardt for it from the 24 rotations of a cube. The two best results that differ are refined by damped
                     Newton steps for (P), and the better one is returned. So planar sets, which have a second minimum, need nothing special. A
                     search is no proof; in 8000 random scenes of 4 and 8 points the result was never worse than the true pose.
    **Gradient.**    Implicit function theorem on (K1)-(K3), 7 equations, for points, pixels, weights and K; all modes, any order. It stays in the
                     basin of the value: where the global minimum jumps, it does not see it. No gradient where the pose is not unique: see Raises.
    **Use instead.** `Argmin` for another penalty, or a camera with distortion. Outliers: weights, from RANSAC or learnt.

    | symbol  | code         | shape    | meaning                                                                     |
    |---------|--------------|----------|-----------------------------------------------------------------------------|
    | $X, u$  | `points`, `pixels` | `(n, 3)`, `(n, 2)` | points in any unit of length, and what is seen of them           |
    | $w$     | `weights`    | `(n,)`   | at least 0; None: 1                                                          |
    | $K$     | `intrinsics` | `(3, 3)` | its last row is (0, 0, 1), and not read; None: identity                      |
    | $R, t$  | `rotation`, `translation` | `(3, 3)`, `(3,)` | the pose, from the frame of the points to that of the camera |

    **Arguments:** `throw`, `on_failure`, `max_steps` (200), `adjoint`: see `Policy` and `ImplicitAdjoint`.
    **Call:** `pnp(points, pixels, weights=None, intrinsics=None)`, or with one `PerspectiveData`. A weight of 0 has a gradient, so its
    point must be finite and off the camera's plane.
    **Returns:** a `Pose`. `solve` also gives the minimum of (P) in `objective`.
    **Raises:** `ValueError` for fewer than 4 points (3 have up to four poses), and for shapes that do not fit; with `throw=True` a
    `SolveError` at run time: `not_unique` for fewer than 4 points with a weight, for points on a line, and where another pose is as
    good; `empty` if all weights are zero; `nonfinite_data`, also for a negative weight and for intrinsics without an inverse;
    `nonlinear_max_steps_reached`.
    **Reference:** Terzakis & Lourakis 2020, *A consistently fast and globally optimal solution to the perspective-n-point problem*, ECCV (the
    search); Chen, Parra, Cao, Li & Chin 2020, *End-to-end learnable geometric vision by backpropagating PnP optimization*, arXiv:1909.06043
    (the layer).
    """

    adjoint: optx.AbstractAdjoint | None
    policy: Policy

    smoothness: ClassVar[str] = "analytic wherever the pose is unique"

    def __init__(
        self,
        *,
        adjoint: optx.AbstractAdjoint | None = None,
        policy: Policy | None = None,
        throw: bool | None = None,
        on_failure: Literal["nan", "zero"] | None = None,
        max_steps: int | None = None,
    ):
        self.adjoint = adjoint
        if policy is None and max_steps is None:
            max_steps = _MAX_STEPS
        self.policy = make_policy(policy, throw=throw, on_failure=on_failure, max_steps=max_steps)

    def __call__(self, points, pixels=None, *, weights=None, intrinsics=None) -> Pose:  # pyright: ignore[reportIncompatibleMethodOverride]
        return evaluate(self, self.pack(points, pixels, weights, intrinsics))

    def pack(self, points, pixels=None, weights=None, intrinsics=None):  # pyright: ignore[reportIncompatibleMethodOverride]  (the names of a call)
        return _pack(points, pixels, weights, intrinsics)

    def check(self, x):
        _check(x)

    # Problem and optimality

    def optimality(self, y: PosePoint, x: PerspectiveData) -> PosePoint:
        scene = _scene(x)
        force, torque = _balance(scene, y.quaternion, y.centre)
        return PosePoint(jnp.append(torque, (1 - y.quaternion @ y.quaternion) / 2), force)

    def value(self, y, x):
        scene = _scene(x)
        rotation = _matrix(y.quaternion)
        return Pose(rotation, scene.length * y.centre - rotation @ scene.middle)

    def objective(self, y, x):
        return envelope(_attained, y, x)

    # Solver

    def run(self, x, y0, loop):
        del y0
        scene = _scene(x)
        fixed = jax.lax.stop_gradient(scene)
        found, tie = _refined(fixed, *_search(fixed), self.policy.max_steps, loop)
        quaternion, centre = _polished(scene, found)
        weights = jnp.ones(x.points.shape[0], x.points.dtype) if x.weights is None else x.weights
        blocks = jax.tree.leaves(x)
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(block)) for block in blocks]))
        K = scene.affine
        camera = jnp.abs(K[0, 0] * K[1, 1] - K[0, 1] * K[1, 0]) > 8 * jnp.finfo(K.dtype).eps * largest(K) ** 2
        result = choose(found.done & found.regular, RESULTS.successful, RESULTS.nonlinear_max_steps_reached)
        taken = (weights > 0)[:, None]
        rounding = 8 * jnp.finfo(K.dtype).eps * largest(jnp.where(taken, x.points, 0))
        apart = largest(jnp.where(taken, fixed.offsets, 0)) * fixed.length > rounding
        enough = (jnp.sum(weights > 0) >= 4) & apart
        result = choose(enough & ~tie & ~found.singular, result, RESULTS.not_unique)
        result = choose(jnp.any(weights > 0), result, RESULTS.empty)
        result = choose(finite & camera & jnp.all(weights >= 0), result, RESULTS.nonfinite_data)
        return Run(PosePoint(quaternion, centre), result, found.steps, final=True)


class _Scene(NamedTuple):
    """The data in units in which everything is about 1. The units, and `middle`, carry no gradient: the pose does not depend on them."""

    offsets: Float[Array, "n 3"]  # points from their middle, in lengths
    images: Float[Array, "n 2"]  # pixels from the principal point, in focal lengths
    weights: Float[Array, " n"]
    affine: Float[Array, "2 2"]  # of K
    middle: Float[Array, " 3"]
    length: Float[Array, ""]  # about the depth of the middle
    focal: Float[Array, ""]
    mass: Float[Array, ""]  # unit of the weights


def _scene(x: PerspectiveData) -> _Scene:
    dtype, n = x.points.dtype, x.points.shape[0]
    weights = jnp.ones(n, dtype) if x.weights is None else x.weights
    K = jnp.eye(3, dtype=dtype) if x.intrinsics is None else x.intrinsics
    per_mass, per_focal = jax.lax.stop_gradient((power_of_two(largest(weights)), power_of_two(largest(K[:2, :2]))))
    weights, affine, images = per_mass * weights, per_focal * K[:2, :2], per_focal * (x.pixels - K[:2, 2][None])
    points, w, A, u = jax.lax.stop_gradient((x.points, weights, affine, images))
    w = jnp.maximum(w, 0) / jnp.maximum(jnp.sum(jnp.maximum(w, 0)), jnp.finfo(dtype).tiny)
    middle = w @ points
    # What an object so wide and an image so wide make of the depth.
    _, spread = _centred(w, _back_projected(A, u))
    wide = largest(jnp.where((w > 0)[:, None], points - middle[None], 0))
    per_length = power_of_two(wide * power_of_two(spread))
    return _Scene(
        per_length * (x.points - middle[None]),
        images,
        weights,
        affine,
        middle,
        1 / per_length,
        1 / per_focal,
        1 / per_mass,
    )


def _back_projected(affine, images):
    """(m_i)_{1,2}, the points seen in the plane at depth 1."""
    a, b, c, d = affine[0, 0], affine[0, 1], affine[1, 0], affine[1, 1]
    determinant = a * d - b * c
    inverse = jnp.stack([jnp.stack([d, -b]), jnp.stack([-c, a])]) / jnp.where(determinant == 0, 1, determinant)
    return images @ inverse.T


def _centred(w, m):
    """Mean of m, and its spread."""
    mean = w @ m
    return mean, jnp.sqrt(jnp.sum(w[:, None] * (m - mean[None]) ** 2))


# Rotations


def _products() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Constants: e_i x e_j (3, 3, 3), the product of quaternion units (4, 4, 4), and R(q) of q q' (3, 3, 4, 4), all by last axes."""
    eye = np.eye(3)
    cross = np.cross(eye[:, None], eye[None]).transpose(2, 0, 1)
    product = np.zeros((4, 4, 4))
    product[0, 0, 0], product[0, 1:, 1:] = 1, -eye
    product[1:, 0, 1:], product[1:, 1:, 0], product[1:, 1:, 1:] = eye, eye, cross
    # x -> q (0, x) q*.
    conjugate = np.diag([1, -1, -1, -1])
    turn = np.einsum("iam,ajk,ml->ikjl", product, product, conjugate)
    return cross, product, turn[1:, 1:]


_CROSS, _PRODUCT, _TURN = _products()


def _cross(a: Float[Array, "... 3"], b: Float[Array, "... 3"]) -> Float[Array, "... 3"]:
    return jnp.einsum("kij,...i,...j->...k", jnp.asarray(_CROSS, a.dtype), a, b)


def _matrix(q: Float[Array, " 4"]) -> Float[Array, "3 3"]:
    """Of q / |q|."""
    return jnp.einsum("ikjl,j,l->ik", jnp.asarray(_TURN, q.dtype), q, q) / (q @ q)


def _turned(q: Float[Array, " 4"], turn: Float[Array, " 3"]) -> Float[Array, " 4"]:
    """q, then a rotation about `turn` by twice the arctangent of half its length."""
    factor = jnp.concatenate([jnp.ones(1, q.dtype), turn / 2])
    new = jnp.einsum("kij,i,j->k", jnp.asarray(_PRODUCT, q.dtype), factor, q)
    return new / jnp.sqrt(new @ new)


def _rotations_of_a_cube() -> np.ndarray:
    """(24, 4) quaternions: no rotation is further than 63 degrees from the nearest of them."""
    units = [np.eye(4)[i] for i in range(4)]
    edges = [np.eye(4)[i] + sign * np.eye(4)[j] for i in range(4) for j in range(i) for sign in (1, -1)]
    signs = [np.array([1, *(1 - 2 * (k >> b & 1) for b in range(3))]) for k in range(8)]
    rotations = np.array([*units, *edges, *signs], np.float64)
    return rotations / np.linalg.norm(rotations, axis=1, keepdims=True)


# The conditions


def _seen(scene: _Scene, q, centre):
    """Offsets as turned (n, 3), images (n, 2) in the plane at depth 1, depths (n,), and residuals r (n, 2) in focal lengths."""
    turned = scene.offsets @ _matrix(q).T
    points = turned + centre[None]
    depths = points[:, 2]
    images = points[:, :2] / depths[:, None]
    return turned, images, depths, images @ scene.affine.T - scene.images


def _balance(scene: _Scene, q, centre):
    """(K1) and (K2)."""
    turned, images, depths, r = _seen(scene, q, centre)
    across = (scene.weights[:, None] * r) @ scene.affine / depths[:, None]
    g = jnp.concatenate([across, -jnp.sum(across * images, axis=1, keepdims=True)], axis=1)
    return jnp.sum(g, axis=0), jnp.sum(_cross(turned, g), axis=0)


def _gradient(scene: _Scene, q, centre) -> Float[Array, " 6"]:
    """Of (P), by a turn of the points about their middle, and a shift."""
    force, torque = _balance(scene, q, centre)
    return jnp.concatenate([torque, force])


def _hessian(scene: _Scene, q, centre) -> Float[Array, "6 6"]:
    moved = lambda step: _gradient(scene, _turned(q, step[:3]), centre + step[3:])
    matrix = jax.jacfwd(moved)(jnp.zeros(6, q.dtype))
    # A turn after a turn is no turn about the sum: what is antisymmetric here is that times the gradient.
    return (matrix + matrix.T) / 2


def _gauss_newton(scene: _Scene, q, centre) -> Float[Array, "6 6"]:
    """Without the second derivatives of r: positive semidefinite wherever it is."""
    turned, images, depths, _ = _seen(scene, q, centre)
    one, zero = jnp.ones_like(depths), jnp.zeros_like(depths)
    rows = [jnp.stack([one, zero, -images[:, 0]], axis=1), jnp.stack([zero, one, -images[:, 1]], axis=1)]
    shifts = jnp.einsum("ab,bni->nai", scene.affine, jnp.stack(rows)) / depths[:, None, None]
    # A turn by v moves a point at a by v x a, and s . (v x a) = v . (a x s).
    turns = _cross(jnp.broadcast_to(turned[:, None], shifts.shape), shifts)
    jacobian = jnp.concatenate([turns, shifts], axis=2)
    return jnp.einsum("n,nai,naj->ij", scene.weights, jacobian, jacobian)


def _half_squares(scene: _Scene, q, centre):
    """The objective of (P), infinite unless every point with a weight is in front of the camera."""
    _, _, depths, r = _seen(scene, q, centre)
    in_front = jnp.all((depths > 0) | ~(scene.weights > 0))
    return jnp.where(in_front, jnp.sum(scene.weights[:, None] * r**2) / 2, jnp.inf)


def _attained(y: PosePoint, x: PerspectiveData):
    scene = _scene(x)
    r = _seen(scene, y.quaternion, y.centre)[3]
    return scene.mass * scene.focal**2 * jnp.sum(scene.weights[:, None] * r**2) / 2


# The search


def _search(scene: _Scene):
    """Two poses to begin with, (2, 4) and (2, 3): the best, and the best that differs from it.

    With weights that sum to 1 and m centred and divided by its spread s, the sum of the E_i'E_i, E_i = [I, -m_i], is the identity. The change
    of m is one of the camera's frame, p -> S p.
    """
    dtype = scene.offsets.dtype
    w = jnp.maximum(scene.weights, 0)
    w = w / jnp.maximum(jnp.sum(w), jnp.finfo(dtype).tiny)
    m = _back_projected(scene.affine, scene.images)
    mean, spread = _centred(w, m)
    spread = jnp.where(spread > 0, spread, 1)
    S = jnp.stack([jnp.stack([1, 0, -mean[0]]), jnp.stack([0, 1, -mean[1]]), jnp.stack([0, 0, spread])]).astype(dtype)
    m = (m - mean[None]) / spread
    unit = power_of_two(largest(jnp.where(scene.weights[:, None] > 0, scene.offsets, 0)))
    offsets = unit * scene.offsets
    ones, zeros = jnp.ones_like(w), jnp.zeros_like(w)
    E = jnp.stack([jnp.stack([ones, zeros, -m[:, 0]], 1), jnp.stack([zeros, ones, -m[:, 1]], 1)], 1)
    gram = jnp.einsum("n,nki,nkj->nij", w, E, E)
    shift = jnp.einsum("nij,nk->ijk", gram, offsets).reshape(3, 9)  # centre = -shift vec(SR)
    omega = jnp.einsum("nij,nk,nl->ikjl", gram, offsets, offsets).reshape(9, 9) - shift.T @ shift

    def cost(q):
        vector = (S @ _matrix(q)).reshape(9)
        return vector @ omega @ vector

    def body(_, state):
        q, at, damping = state
        rotation = _matrix(q)
        slopes = jnp.einsum("ab,bkc,cd->kad", S, jnp.asarray(_CROSS, dtype), rotation).reshape(3, 9)
        gradient, matrix = slopes @ omega @ (S @ rotation).reshape(9), slopes @ omega @ slopes.T
        diagonal = jnp.diagonal(matrix)
        inverse, _ = _inverse(matrix, diagonal + 1e-3 * jnp.max(diagonal), damping)
        new = _turned(q, jnp.clip(-(inverse @ gradient), -1, 1))
        value = cost(new)
        lower = value < at
        return jnp.where(lower, new, q), jnp.where(lower, value, at), damping * jnp.where(lower, 0.1, 10)

    starts = jnp.asarray(_rotations_of_a_cube(), dtype)

    def descended(q):
        q = jax.lax.fori_loop(0, 20, body, (q, cost(q), jnp.asarray(1e-2, dtype)))[0]
        seen = -(shift @ (S @ _matrix(q)).reshape(9)) / unit
        # Back from the frame of S.
        depth = seen[2] / spread
        centre = jnp.append(seen[:2] + mean * depth, depth)
        # With a point behind the camera, (P) has to begin further off.
        nearest = jnp.min(jnp.where(w > 0, (scene.offsets @ _matrix(q).T)[:, 2], jnp.inf))
        further = -2 * jnp.minimum(nearest, 0) + 1
        ahead = depth + nearest > 0
        centre = jnp.where(ahead, centre, jnp.append(mean * further, further))
        return q, centre, _half_squares(scene, q, centre), ahead

    q, centres, values, ahead = jax.vmap(descended)(starts)
    values = jnp.where(jnp.isnan(values) | (jnp.any(ahead) & ~ahead), jnp.inf, values)
    best = jnp.argmin(values)
    others = jnp.where(jnp.abs(q @ q[best]) > 1 - 1e-4, jnp.inf, values)
    second = jnp.argmin(others)
    chosen = jnp.stack([best, jnp.where(others[second] < jnp.inf, second, best)])
    return q[chosen], centres[chosen]


def _inverse(matrix, diagonal, damping):
    """Of matrix + damping * diag(diagonal), by Gauss-Jordan steps, and the least pivot of it as scaled to a unit diagonal.

    The matrix should be positive definite: if not, the least pivot is not positive, and the inverse of no use.
    """
    n = matrix.shape[0]
    eye = jnp.eye(n, dtype=matrix.dtype)
    scale = jnp.where(diagonal > 0, jax.lax.rsqrt(jnp.where(diagonal > 0, diagonal, 1)), 1)
    table = scale[:, None] * matrix * scale[None, :] + damping * eye
    least = jnp.asarray(jnp.inf, matrix.dtype)
    for k in range(n):
        pivot = table[k, k]
        least = jnp.minimum(least, pivot)
        pivot = jnp.where(pivot == 0, 1, pivot)
        table = table - jnp.outer(table[:, k] - eye[k], table[k] + eye[k]) / pivot
    return scale[:, None] * table * scale[None, :], least


# The refinement


class _State(NamedTuple):
    quaternion: Float[Array, " 4"]
    centre: Float[Array, " 3"]
    value: Float[Array, ""]
    damping: Float[Array, ""]
    exact: Bool[Array, ""]  # with the Hessian, not with Gauss and Newton's matrix
    inverse: Float[Array, "6 6"]  # of the matrix of the last step
    regular: Bool[Array, ""]  # that was the Hessian itself, and well away from singular
    singular: Bool[Array, ""]  # when last looked at, it was not
    done: Bool[Array, ""]
    steps: Int[Array, ""]


def _refined(scene: _Scene, quaternions, centres, max_steps: int, loop: Callable) -> tuple[_State, Bool[Array, ""]]:
    eps = float(jnp.finfo(scene.offsets.dtype).eps)
    size = jnp.sqrt(jnp.sum(scene.weights[:, None] * scene.images**2)) + jnp.sqrt(jnp.sum(scene.weights))
    noise = lambda value: (jnp.sqrt(value) + 16 * eps * size) ** 2 - value

    def refine(q, centre):
        def body(state: _State) -> _State:
            q, centre = state.quaternion, state.centre
            simple = _gauss_newton(scene, q, centre)
            # In its diagonal a direction may be missing; bounded below, among turns and shifts each by themselves.
            parts = jnp.diagonal(simple).reshape(2, 3)
            diagonal = jnp.maximum(parts, eps * jnp.max(parts, axis=1, keepdims=True)).reshape(6)
            matrix = jnp.where(state.exact, _hessian(scene, q, centre), simple)
            inverse, least = _inverse(matrix, diagonal, state.damping)
            convex = least > 0
            step = -(inverse @ _gradient(scene, q, centre))
            turn = step[:3] / jnp.maximum(1, largest(step[:3]))
            new_q, new_centre = _turned(q, turn), centre + step[3:]
            new = _half_squares(scene, new_q, new_centre)
            better = convex & jnp.isfinite(new) & ((new <= state.value + noise(state.value)) | (state.value == jnp.inf))
            small = jnp.maximum(largest(turn), largest(step[3:]) / largest(centre)) <= eps**0.75
            newton = state.exact & (state.damping == 0)
            # Nothing is better, however short the step: where it is, or nowhere.
            stuck = state.damping > 1e8
            choose = lambda new, old: jnp.where(better, new, old)
            lower, higher = state.damping / 100, 10 * jnp.maximum(state.damping, 1e-5)
            lower = jnp.where(lower < 1e-7, 0, lower)
            # Not convex: Gauss and Newton's matrix instead, which is.
            damping = jnp.where(better, lower, jnp.where(state.exact & ~convex, state.damping, higher))
            return _State(
                choose(new_q, q),
                choose(new_centre, centre),
                choose(new, state.value),
                damping,
                better | (state.exact & convex),
                inverse,
                newton & (least > 64 * eps),
                jnp.where(newton, ~(least > 64 * eps), state.singular),
                (better & small & newton) | stuck,
                state.steps + 1,
            )

        start, no = _half_squares(scene, q, centre), jnp.zeros((), bool)
        # Data that are not finite have nothing to converge to.
        hopeless = jnp.isnan(start) | ~jnp.isfinite(size)
        damping, table = jnp.asarray(1e-4, start.dtype), jnp.zeros((6, 6), start.dtype)
        state = _State(q, centre, start, damping, ~no, table, no, no, hopeless, jnp.zeros((), jnp.int32))
        return loop(lambda state: ~state.done, body, state, max_steps=max_steps)

    both = jax.vmap(refine)(quaternions, centres)
    chosen = jnp.argmin(jnp.where(jnp.isnan(both.value), jnp.inf, both.value))
    best = jax.tree.map(lambda leaf: leaf[chosen], both)
    # Two minima of one height: which of them is returned would be up to rounding.
    apart = jnp.abs(both.quaternion[0] @ both.quaternion[1]) < 1 - 1e-6
    level = jnp.abs(both.value[0] - both.value[1]) <= noise(best.value)
    tie = apart & level & jnp.all(both.regular)
    return best._replace(steps=jnp.max(both.steps)), tie


def _polished(scene: _Scene, found: _State):
    """Three more Newton steps with the same Hessian: to rounding; and, unrolled, one order of the derivative each."""
    q, centre = found.quaternion, found.centre
    inverse = jnp.where(found.regular, found.inverse, 0)
    for _ in range(3):
        step = -(inverse @ _gradient(scene, q, centre))
        q, centre = _turned(q, step[:3]), centre + step[3:]
    return q * jnp.where(q[0] < 0, -1, 1), centre


def _pack(points, pixels, weights, intrinsics) -> PerspectiveData:
    if isinstance(points, PerspectiveData):
        if any(block is not None for block in (pixels, weights, intrinsics)):
            raise ValueError("Pass either a PerspectiveData or its blocks, not both.")
        return points
    if pixels is None:
        raise ValueError("pixels are missing: pnp(points, pixels, weights=None, intrinsics=None).")
    array = lambda block: None if block is None else jnp.asarray(block)
    return PerspectiveData(jnp.asarray(points), jnp.asarray(pixels), array(weights), array(intrinsics))


def _check(x):
    if not isinstance(x, PerspectiveData):
        raise ValueError(f"PerspectiveNPoint takes points and pixels, or a `PerspectiveData`; got {type(x).__name__}.")
    blocks = {name: block for name, block in vars(x).items() if block is not None}
    listed = ", ".join(f"{name} {block.dtype}{list(block.shape)}" for name, block in blocks.items())
    if x.points.ndim != 2 or x.points.shape[1] != 3:
        raise ValueError(f"points must be (n, 3), got {listed}; for a batch use jax.vmap.")
    n = x.points.shape[0]
    if n < 4:
        raise ValueError(f"points must hold at least 4 points, got {listed}: 3 points have up to four poses.")
    if x.pixels.shape != (n, 2):
        raise ValueError(f"pixels must be (n, 2), one for each of the {n} points, got {listed}.")
    if x.weights is not None and x.weights.shape != (n,):
        raise ValueError(f"weights must have one entry for each of the {n} points, got {listed}.")
    if x.intrinsics is not None and x.intrinsics.shape != (3, 3):
        raise ValueError(f"intrinsics must be (3, 3), got {listed}.")
    dtypes = {block.dtype for block in blocks.values()}
    if len(dtypes) > 1 or not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        raise ValueError(f"all blocks must have one floating dtype, got {listed}. Cast them with .astype.")
