"""Rows of the table of nodes: functions of the user, maps onto the simplex, inference, differential equations, quadratic programs."""

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import declarative as dn

from ..programs import by_enumeration, program, with_blocks, worst_violation
from .row import Row

WEIGHT = 0.35 * jr.normal(jr.key(0), (4, 4))
BIAS = jr.normal(jr.key(1), (4,))
SCORES = jnp.array([0.31, -1.2, 0.93, 0.12, 0.55])
MASK = jnp.array([True, True, True, False, True])


def contraction(y, x):
    weight, bias = x
    return jnp.tanh(weight @ y + bias)


def wide_contraction(y, x):
    weight, bias = x
    return jnp.tanh((y.reshape(10, 4) @ weight).reshape(40) + 0.3 * jnp.roll(y, 1) + bias)


def cubic(y, x):
    return {"u": y["u"] ** 3 + y["u"] - x["a"] + 0.1 * y["v"], "v": 2 * y["v"] - jnp.sum(jnp.sin(y["u"])) - x["b"]}


def valley(y, x):
    centre, weight = x
    return jnp.sum(jnp.cosh(y - centre)) + weight * jnp.sum((y[1:] - y[:-1] ** 2) ** 2)


def picard_reference(x):
    weight, bias = (np.asarray(leaf, np.float64) for leaf in x)
    y = np.zeros(4)
    for _ in range(2000):
        y = np.tanh(weight @ y + bias)
    return y


def flow(t, y, args):
    return jnp.tanh(args @ y + t)


def flow_reference(x, steps):
    """Heun's method coupled to itself (McCallum & Foster 2024, Eq. 4), in NumPy and with the pair that the paper has."""
    y = z = np.asarray(x.y0, np.float64)
    h, weight = 1 / steps, np.asarray(x.args, np.float64)
    coupling = np.exp(-13 * h / (1 / 9 + h))
    field = lambda t, y: np.tanh(weight @ y + t)

    def heun(t, y, h):
        k = field(t, y)
        return h / 2 * (k + field(t + h, y + h * k))

    for n in range(steps):
        y = coupling * y + (1 - coupling) * z + heun(n * h, z, h)
        z = z - heun((n + 1) * h, y, -h)
    return y


def linear_elbo(parameters, x):
    """The ELBO, without sampling, of z ~ N(0, I), x | z ~ N(Wz, I / 2), for a diagonal Gaussian."""
    misfit = jnp.sum((x["x"] - x["W"] @ parameters.mean) ** 2)
    spread = jnp.sum(x["W"] ** 2, axis=0) @ jnp.exp(2 * parameters.log_scale)
    family = dn.DiagonalGaussian()
    return (
        -misfit
        - spread
        - len(x["x"]) / 2 * float(np.log(np.pi))
        - family.divergence(parameters, family.standard(parameters))
    )


def linear_inference(rho, moreau):
    """What `ELBOOptimizer` makes of `linear_elbo`, in NumPy: a linear system for the mean, bisection for each scale."""

    def reference(evidence):
        observed, W = (np.asarray(evidence.x[name], np.float64) for name in ("x", "W"))
        mean0, s0 = (np.asarray(leaf, np.float64) for leaf in (evidence.start.mean, evidence.start.log_scale))
        metric = rho * np.exp(-2 * s0)
        mean = np.linalg.solve(2 * W.T @ W + np.eye(s0.size) + np.diag(metric), 2 * W.T @ observed + metric * mean0)
        precision = 2 * np.sum(W**2, axis=0) + 1
        low, s, high = np.full_like(s0, -10.0), np.zeros_like(s0), np.full_like(s0, 10.0)
        for _ in range(200):
            rising = precision * np.exp(2 * s) - 1 + 2 * rho * (s - s0) > 0
            low, high = np.where(rising, low, s), np.where(rising, s, high)
            s = (low + high) / 2
        elbo = (
            -np.sum((observed - W @ mean) ** 2) - precision @ np.exp(2 * s) / 2 - np.sum(mean**2) / 2 + np.sum(s + 0.5)
        )
        elbo -= observed.size / 2 * np.log(np.pi)
        distance = np.sum((mean - mean0) ** 2 * np.exp(-2 * s0)) / 2 + np.sum((s - s0) ** 2)
        found = dn.GaussianParameters(jnp.asarray(mean), jnp.asarray(s))
        return dn.Inference(found, jnp.asarray(elbo), jnp.asarray(-elbo + moreau * rho * distance))

    return reference


def simplex_reference(alpha):
    """Bisection on the multiplier in NumPy, 200 halvings: slow, independent, and right."""

    def reference(x):
        z = np.asarray(x.scores, np.float64)
        keep = np.ones(z.size, bool) if x.mask is None else np.asarray(x.mask)
        z = z[keep]

        def mass(theta):
            t = z - theta
            if alpha == 1:
                return np.exp(t)
            return np.maximum(1 + (alpha - 1) * t, 0) ** (1 / (alpha - 1))

        low, high = z.max(), z.max() + (np.log(z.size) if alpha == 1 else 1 / (alpha - 1))
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if mass(middle).sum() > 1 else (low, middle)
        p = np.zeros(keep.size)
        p[keep] = mass((low + high) / 2)
        return jnp.asarray(p)

    return reference


def on_simplex(p, x):
    off = 0.0 if x.mask is None else jnp.max(jnp.where(x.mask, 0.0, p))
    return jnp.max(jnp.stack([jnp.max(-p), jnp.abs(jnp.sum(p) - 1), jnp.asarray(off)]))


SCORED = dn.Scores(SCORES, MASK)
EVIDENCE = dn.Evidence(
    {"x": jnp.array([0.9, -0.4, 0.3]), "W": jr.normal(jr.key(2), (3, 2))},
    dn.GaussianParameters(jnp.array([0.5, -1.0]), jnp.array([-0.3, 0.2])),
)
INFINITE = dn.Scores(jnp.array([jnp.nan, 0.0, 1.0, 0.0, 2.0]))

ROWS = [
    Row(
        "fixed-point",
        lambda **kw: dn.FixedPoint(contraction, **{"max_steps": 300, **kw}),
        (WEIGHT, BIAS),
        y0=jnp.zeros(4),
        reference=picard_reference,
        failures={"nonlinear_max_steps_reached": (-3 * jnp.eye(4), 0.1 * BIAS)},
        adjoints=(None, dn.ImplicitAdjoint(), dn.NeumannAdjoint(60), dn.PhantomAdjoint(120, 0.5), dn.UnrolledAdjoint()),
    ),
    Row(
        "fixed-point-of-many",  # enough unknowns for the products of `biconjugate.py`
        lambda **kw: dn.FixedPoint(wide_contraction, **{"max_steps": 300, **kw}),
        (WEIGHT, jr.normal(jr.key(3), (40,))),
        y0=jnp.zeros(40),
        failures={"nonlinear_max_steps_reached": (-30 * jnp.eye(4), jr.normal(jr.key(3), (40,)))},
        fast=False,
    ),
    *(
        Row(
            kind.__name__.lower(),
            lambda kind=kind, **kw: dn.FixedPoint(contraction, kind(), **{"max_steps": 60, **kw}),
            (WEIGHT, BIAS),
            y0=jnp.zeros(4),
            reference=picard_reference,
            failures={
                "nonlinear_max_steps_reached": (jnp.kron(jnp.eye(2), jnp.array([[0.0, 30], [-30, 0]])), 0.1 * BIAS)
            },
            adjoints=(None, dn.UnrolledAdjoint()),
            fast=False,
        )
        for kind in (dn.Anderson, dn.Broyden)
    ),
    Row(
        "root",
        lambda **kw: dn.Root(cubic, **{"max_steps": 40, **kw}),
        {"a": jnp.array([0.5, -1.1, 2.0]), "b": jnp.array(0.3)},
        y0={"u": jnp.zeros(3), "v": jnp.zeros(())},
        adjoints=(None, dn.UnrolledAdjoint()),
    ),
    Row(
        "argmin",
        lambda **kw: dn.Argmin(valley, **{"max_steps": 200, **kw}),
        (jnp.array([0.4, -0.3, 1.1]), jnp.array(0.7)),
        y0=jnp.zeros(3),
    ),
    Row(
        "softmax",
        lambda **kw: dn.Softmax(jnp.array(1.7), **kw),
        SCORED,
        reference=lambda x: simplex_reference(1)(dn.Scores(x.scores / 1.7, x.mask)),
        feasible=on_simplex,
        failures={"nonfinite_data": INFINITE},
        adjoints=(None, dn.ImplicitAdjoint(), dn.UnrolledAdjoint()),
    ),
    Row(
        "sparsemax",
        lambda **kw: dn.Sparsemax(**kw),
        SCORED,
        reference=simplex_reference(2),
        feasible=on_simplex,
        failures={"nonfinite_data": INFINITE},
        adjoints=(None, dn.ImplicitAdjoint(), dn.UnrolledAdjoint()),
    ),
    Row(
        "entmax15",
        lambda **kw: dn.Entmax(1.5, **kw),
        SCORED,
        reference=simplex_reference(1.5),
        feasible=on_simplex,
        failures={"nonfinite_data": INFINITE},
        adjoints=(None, dn.ImplicitAdjoint(), dn.UnrolledAdjoint()),
    ),
    Row(
        "entmax-learnable",
        lambda **kw: dn.Entmax(jnp.array(1.3), **kw),
        SCORED,
        reference=simplex_reference(1.3),
        feasible=on_simplex,
        failures={"nonfinite_data": INFINITE},
        adjoints=(None, dn.ImplicitAdjoint(), dn.UnrolledAdjoint()),
    ),
    Row(
        "entmax3",
        lambda **kw: dn.Entmax(3.0, **kw),
        SCORED,
        reference=simplex_reference(3.0),
        feasible=on_simplex,
        failures={"nonfinite_data": INFINITE},
        adjoints=(None, dn.ImplicitAdjoint()),
        unrolled=False,  # the mass is not convex in the multiplier for alpha > 2: the unrolled Newton iteration is not offered
    ),
    Row(
        "neural-ode",
        lambda **kw: dn.NeuralODE(flow, **{"steps": 60, **kw}),
        dn.InitialValue(jnp.array([0.3, -0.5, 0.8, 0.1]), WEIGHT),
        reference=lambda x: flow_reference(x, 60),
        adjoints=(None, dfx.DirectAdjoint(), dfx.RecursiveCheckpointAdjoint(), dfx.ForwardMode(), dn.UnrolledAdjoint()),
    ),
    *(
        Row(
            f"elbo-{mode}",
            lambda mode=mode, **kw: dn.ELBOOptimizer(linear_elbo, mode, family=dn.DiagonalGaussian(), rho=0.7, **kw),
            EVIDENCE,
            reference=linear_inference(0.0 if mode == "implicit" else 0.7, mode == "moreau"),
            failures={"nonfinite_data": eqx.tree_at(lambda e: e.x["x"], EVIDENCE, jnp.full(3, jnp.nan))},
            fast=False,  # tests/test_elbo.py is their fast tier
        )
        for mode in ("implicit", "proximal", "moreau")
    ),
    Row(
        "quadratic-program",
        lambda **kw: dn.QuadraticProgram(**kw),
        program(n=4, m=3, p=1),
        reference=by_enumeration,
        feasible=worst_violation,
        failures={"infeasible": with_blocks(program(n=4, m=3, p=1), b=jnp.array([50.0]))},
        unrolled=False,  # an interior-point method's iterations are not for differentiation: the node raises
        fast=False,  # tests/test_quadratic_program.py is its fast tier
    ),
]
