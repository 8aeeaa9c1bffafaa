"""Rows of the table of nodes: geometry."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false

import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.spatial

import declarative as dn

from .row import Row

_RNG = np.random.default_rng(7)
TALL = jnp.asarray(_RNG.standard_normal((5, 3)))
SIDES = jnp.asarray(_RNG.standard_normal((5, 2)))
WEIGHTS = jnp.array([0.5, 1.2, 0.3, 2.0, 0.9])
SYMMETRIC = jnp.array([[2.0, 0.3, -0.5, 0.1], [0.3, -1.0, 0.7, 0.2], [-0.5, 0.7, 0.4, -0.6], [0.1, 0.2, -0.6, 3.1]])
BOX = dn.InequalityData(
    jnp.concatenate([jnp.eye(3), -jnp.eye(3), jnp.array([[1.0, 2.0, -0.5]])]),
    jnp.array([2.0, 3.0, 1.5, 0.5, 0.7, 0.4, 1.0]),
    jnp.array([[1.0, 1.0, 1.0]]),
    jnp.array([0.6]),
)


def arrays(x):
    return [None if leaf is None else np.asarray(leaf, np.float64) for leaf in vars(x).values()]


def least_squares(ridge):
    """The ridge as more rows, and NumPy's SVD-based solver."""

    def reference(x):
        A, b, w = arrays(x)
        w = np.ones(len(A)) if w is None else w
        b = b.reshape(len(A), -1)
        n, k = A.shape[1], b.shape[1]
        rows = np.vstack([np.sqrt(w)[:, None] * A, np.sqrt(ridge) * np.eye(n)])
        return np.linalg.lstsq(rows, np.vstack([np.sqrt(w)[:, None] * b, np.zeros((n, k))]), rcond=None)[0]

    return reference


def eigenpairs(k):
    def reference(x):
        values, vectors = np.linalg.eigh((np.asarray(x) + np.asarray(x).T) / 2)
        values, vectors = values[::-1][:k], vectors[:, ::-1][:, :k]
        signs = np.sign(vectors[np.argmax(np.abs(vectors), axis=0), np.arange(k)])
        return dn.Eigenpairs(jnp.asarray(values), jnp.asarray(vectors * signs))

    return reference


def on_sphere(radius):
    """Bisection on the multiplier, to the right of minus the least eigenvalue."""

    def reference(x):
        A, b, w = arrays(x)
        gram, right = A.T @ (w[:, None] * A), A.T @ (w * b)
        point = lambda lam: np.linalg.solve(gram + lam * np.eye(len(gram)), right)
        low = -np.linalg.eigvalsh(gram)[0]
        high = low + np.linalg.norm(right) / radius + 1
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if np.linalg.norm(point(middle)) > radius else (low, middle)
        return point(high)

    return reference


def centre(x):
    """Newton in the null space of A, from a feasible point that a linear program finds."""
    G, h, A, b = arrays(x)
    n = G.shape[1]
    lengths = np.linalg.norm(G, axis=1)[:, None]
    program = scipy.optimize.linprog(
        np.append(np.zeros(n), -1), np.hstack([G, lengths]), h, np.hstack([A, np.zeros((len(A), 1))]), b, (None, None)
    )
    basis = np.linalg.svd(A)[2][len(A) :].T
    y = program.x[:n]
    for _ in range(100):
        s = h - G @ y
        gradient, hessian = basis.T @ (G.T @ (1 / s)), basis.T @ (G.T @ (G / s[:, None] ** 2)) @ basis
        step = np.linalg.solve(hessian, -gradient)
        decrement = np.sqrt(-step @ gradient)
        y = y + basis @ step / (1 + decrement if decrement > 0.25 else 1)
    return y


def pose(x):
    """SciPy's least squares in a rotation vector about the true pose, then Newton steps with a Hessian by differences."""
    X, u, w, K = arrays(x)
    turn = scipy.spatial.transform.Rotation.from_rotvec

    def residuals(p):
        # The rotation by p[:3] in front of the true one, to more than the order that a derivative at p = 0 can see; complex p welcome.
        (a, b, c), zero = p[:3], 0 * p[0]
        skew = np.array([[zero, -c, b], [c, zero, -a], [-b, a, zero]])
        cayley = np.linalg.solve(np.eye(3) - skew / 2, np.eye(3) + skew / 2)
        seen = X @ (cayley @ start).T + p[3:] + SHIFT
        image = seen @ K.T
        return (np.sqrt(w)[:, None] * (image[:, :2] / image[:, 2:] - u)).reshape(-1)

    step = 1e-30j
    jacobian = lambda p: np.stack([residuals(p + step * e).imag / 1e-30 for e in np.eye(6)], axis=1)
    start = turn(TURN).as_matrix()
    p = scipy.optimize.least_squares(
        residuals, np.zeros(6), jacobian, method="lm", xtol=1e-15, ftol=1e-15, gtol=1e-15
    ).x
    gradient = lambda p: jacobian(p).T @ residuals(p)
    hessian = np.stack([(gradient(p + h) - gradient(p - h)) / 2e-5 for h in 1e-5 * np.eye(6)], axis=1)
    for _ in range(5):
        p = p - np.linalg.solve(hessian, gradient(p))
    (a, b, c) = p[:3]
    skew = np.array([[0, -c, b], [c, 0, -a], [-b, a, 0]])
    rotation = np.linalg.solve(np.eye(3) - skew / 2, np.eye(3) + skew / 2) @ start
    return dn.Pose(jnp.asarray(rotation), jnp.asarray(p[3:] + SHIFT))


TURN, SHIFT = np.array([0.4, -1.1, 0.7]), np.array([0.3, -0.2, 5.0])
CAMERA = np.array([[1.2, 0.1, 0.3], [0.0, 1.1, -0.2], [0.0, 0.0, 1.0]])


def scene(line=None):
    """Seven points, on a line if one is given, and images of them with some noise."""
    X = np.random.default_rng(8).standard_normal((7, 3))
    X = X if line is None else X[:, :1] * np.asarray(line)
    image = (X @ scipy.spatial.transform.Rotation.from_rotvec(TURN).as_matrix().T + SHIFT) @ CAMERA.T
    u = image[:, :2] / image[:, 2:] + 0.02 * np.random.default_rng(9).standard_normal((7, 2))
    w = np.array([0.5, 1.2, 0.3, 2.0, 0.9, 1.5, 0.7])
    return dn.PerspectiveData(*(jnp.asarray(block) for block in (X, u, w, CAMERA)))


SCENE = scene()
LINE = scene(jnp.array([[1.0, 2.0, -1.0]]))
RADIUS = jnp.array(0.8)

ROWS = [
    Row(
        "weighted-least-squares",
        lambda **kw: dn.WeightedLeastSquares(jnp.array(0.3), **kw),
        dn.LeastSquaresData(TALL, SIDES, WEIGHTS),
        reference=least_squares(0.3),
        failures={"nonfinite_data": dn.LeastSquaresData(TALL, SIDES, -WEIGHTS)},
        adjoints=(None, dn.ImplicitAdjoint()),
    ),
    Row(
        "minimum-norm-least-squares",
        lambda **kw: dn.WeightedLeastSquares(minimum_norm=True, **kw),
        dn.LeastSquaresData(TALL.T, SIDES[:3, 0], WEIGHTS[:3]),
        reference=least_squares(0.0),
        adjoints=(None, dn.ImplicitAdjoint()),
        fast=False,
    ),
    Row(
        "eigendecomposition",
        lambda **kw: dn.Eigendecomposition(2, **kw),
        SYMMETRIC,
        reference=eigenpairs(2),
        failures={"not_unique": jnp.eye(4)},
        adjoints=(None, dn.ImplicitAdjoint()),
    ),
    Row(
        "sphere-least-squares",
        lambda **kw: dn.SphereLeastSquares(RADIUS, **kw),
        dn.LeastSquaresData(TALL, SIDES[:, 0], WEIGHTS),
        reference=on_sphere(0.8),
        feasible=lambda y, x: jnp.abs(jnp.linalg.norm(y) - 0.8),
        failures={"not_unique": dn.LeastSquaresData(TALL, 0 * SIDES[:, 0], WEIGHTS)},
        unrolled=False,  # the singular value decomposition is not differentiated
        slow=True,
    ),
    Row(
        "analytic-centre",
        lambda **kw: dn.AnalyticCentre(**kw),
        BOX,
        reference=centre,
        feasible=lambda y, x: jnp.maximum(jnp.max(x.G @ y - x.h), jnp.max(jnp.abs(x.A @ y - x.b))),
        failures={
            "infeasible": dn.InequalityData(BOX.G, BOX.h, BOX.A, jnp.array([9.0])),
            "unbounded": dn.InequalityData(BOX.G[:2], BOX.h[:2], BOX.A, BOX.b),
        },
        unrolled=False,  # the centre is not a function of the path; the elimination in the loop has no derivative
        fast=False,
    ),
    Row(
        "perspective-n-point",
        lambda **kw: dn.PerspectiveNPoint(**kw),
        SCENE,
        reference=pose,
        feasible=lambda y, x: jnp.max(jnp.abs(y.rotation @ y.rotation.T - jnp.eye(3))),
        failures={
            "empty": dn.PerspectiveData(SCENE.points, SCENE.pixels, 0 * SCENE.weights, SCENE.intrinsics),
            "not_unique": LINE,
        },
        fast=False,  # a minute of compilation; tests/test_perspective.py has the gradient in both modes
    ),
]
