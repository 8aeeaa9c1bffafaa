r"""What each way of differentiating a solve costs, and how wrong it is.

    python -m benchmarks.adjoints            about 5 minutes on 2 CPU cores
    python -m benchmarks.adjoints --quick    under a minute, fewer sizes

Two problems, each solved by exactly $K$ steps of an iteration:

- **layer**: $y = \tanh(Wy + Ux + b)$, 256 wide, a batch of 64, float32. $W$ is 0.9 times an orthogonal matrix, and the data are
  small enough for $\tanh' \approx 1$, so that the iteration contracts by 0.9 a step (the measured factor is printed).
  The gradient is that of $\sum y^2$ with respect to $(W, U, b)$; the truth is computed in float64 with NumPy.
- **ridge**: $w^*(\lambda) = \arg\min_w \tfrac12\|Aw - b\|^2 + \tfrac\lambda2\|w\|^2$ by gradient descent, float64. The gradient is that of a
  validation loss with respect to $\lambda$; the truth is $\mathrm dw^*/\mathrm d\lambda = -(A^\top A + \lambda I)^{-1}w^*$.

Three figures of merit, printed with `ok` or `FAIL` (and the exit status is 1 on a FAIL):

1. Memory. The temporary buffers of the compiled gradient, from `memory_analysis()`: flat in $K$ for `ImplicitAdjoint`, from 10
   to 10 000 steps; linear for automatic differentiation of a plain `lax.scan`; in between for the ways that recompute.
2. Accuracy. `ImplicitAdjoint` gives $\mathrm dw^*/\mathrm d\lambda$ to a relative 1e-10.
3. What an early stop costs. The error of the implicit gradient is proportional to $\|w_k - w^*\|$: slope 1 on log-log axes, to 1e-12.

Two things to know when you read the code:

- A node judges its own answer, and the gradient of an element that is not a solution is NaN (or zero), never a number that looks
  right. So figure 3, which is about wrong answers, uses the adjoint in a plain `optimistix.fixed_point`, which has no
  such policy. Elsewhere `FixedSteps` declares a loose `rtol`, and a node holds a solver to the accuracy that it declares.
- "Time" is that of one value-and-gradient, compiled, the median of repetitions in which the methods take turns. Compare the
  numbers of one run with each other, not with those of another machine.

Peers (jaxopt) are left out, and the table says so, where they are not installed.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
from jaxtyping import Array, Int

import declarative

from .shared import machine, versions

RESULTS = pathlib.Path(__file__).parent / "results"
STEPS = (10, 30, 100, 300, 1000, 3000, 10_000)
LIMIT_SECONDS = 8.0  # a method whose next size would take longer than this is not timed there (its memory still is)
LIMIT_BYTES = 1.0e9  # nor one that would need more than this


# The iteration: exactly K steps


class _Count(eqx.Module):
    done: Int[Array, ""]


class FixedSteps(optx.AbstractFixedPointSolver):
    """Picard iteration that takes `steps` steps and stops: no tolerance, so every method does the same forward work."""

    steps: int | Int[Array, ""]
    rtol: float = 1.0  # What it claims for its answer, and what a node then holds it to.
    atol: float = 0.0
    norm: Any = eqx.field(static=True, default=optx.max_norm)

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        return _Count(jnp.zeros((), jnp.int32))

    def step(self, fn, y, args, options, state, tags):
        new, aux = fn(y, args)
        return new, _Count(state.done + 1), aux

    def terminate(self, fn, y, args, options, state, tags):
        return state.done >= self.steps, optx.RESULTS.successful

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        return y, aux, {}


# The two problems. `step(y, x, theta)` is the contraction; theta is what the gradient is taken with respect to.


class Problem(NamedTuple):
    name: str
    step: Callable  # (y, x, theta) -> y, one example
    y0: Array  # one example
    x: Any  # a batch, or None for a single example
    theta: Any
    loss: Callable  # y or a batch of y -> scalar
    truth: np.ndarray  # d loss / d theta, flat, from NumPy in float64
    contraction: float
    iterative: lx.AbstractLinearSolver  # a matrix-free alternative to dense elimination


class TanhStep(eqx.Module):
    """One step of the layer, with its parameters as leaves, as a user of `FixedPoint` would write it."""

    theta: tuple[Array, Array, Array]

    def __call__(self, y, x):
        return _tanh_step(y, x, self.theta)


def _tanh_step(y, x, theta):
    W, U, b = theta
    return jnp.tanh(W @ y + U @ x + b)


def layer(width: int = 256, batch: int = 64, factor: float = 0.9) -> Problem:
    rng = np.random.default_rng(0)
    W = factor * np.linalg.qr(rng.standard_normal((width, width)))[0]
    U = 0.03 * rng.standard_normal((width, width)) / width**0.5
    b = 0.01 * rng.standard_normal(width)
    x = rng.standard_normal((batch, width))

    y = np.zeros((batch, width))
    for _ in range(1000):
        y = np.tanh(y @ W.T + x @ U.T + b)
    slope = 1 - y**2  # tanh'(.) at the solution
    # (IFT), transposed: v solves (I - diag(slope) W)' v = dloss/dy, then every parameter sees slope * v.
    jacobian = np.eye(width) - slope[:, :, None] * W
    v = slope * np.linalg.solve(jacobian.transpose(0, 2, 1), 2 * y[..., None])[..., 0]
    truth = np.concatenate([(v.T @ y).ravel(), (v.T @ x).ravel(), v.sum(0)])
    contraction = max(float(np.linalg.norm(s[:, None] * W, 2)) for s in slope)

    single = lambda a: jnp.asarray(a, jnp.float32)
    return Problem(
        name="layer",
        step=_tanh_step,
        y0=jnp.zeros(width, jnp.float32),
        x=single(x),
        theta=(single(W), single(U), single(b)),
        # A sum, not a mean: `iterative` stops by an absolute tolerance too, so the cotangents must not be tiny.
        loss=lambda y: jnp.sum(y**2),
        truth=truth,
        contraction=contraction,
        # Conjugate gradients on J'J, as jaxopt's default. 1e-5 is about eps^(3/4), what the library asks of an iterative solve in
        # float32. Not atol=0: lineax compares entry by entry, and rounding keeps the smallest entries from ever passing.
        iterative=lx.Normal(lx.CG(rtol=1e-5, atol=1e-5, max_steps=1000)),
    )


class Ridge(NamedTuple):
    """The data of the ridge problem, and its exact answers."""

    A: np.ndarray
    b: np.ndarray
    penalty: float
    size: float  # of a gradient step: 1 / (largest curvature)
    w: np.ndarray  # the solution
    dw: np.ndarray  # its derivative with respect to the penalty

    def step(self, w, _, penalty):
        A, b = jnp.asarray(self.A), jnp.asarray(self.b)
        return w - self.size * (A.T @ (A @ w - b) + penalty * w)


def ridge_data(rows: int = 60, columns: int = 20, curvature: float = 30.0) -> Ridge:
    rng = np.random.default_rng(1)
    left, _ = np.linalg.qr(rng.standard_normal((rows, columns)))
    right, _ = np.linalg.qr(rng.standard_normal((columns, columns)))
    A = left * np.geomspace(1, curvature**0.5, columns) @ right
    b = A @ rng.standard_normal(columns) + 0.3 * rng.standard_normal(rows)
    penalty = 0.5
    hessian = A.T @ A + penalty * np.eye(columns)
    w = np.linalg.solve(hessian, A.T @ b)
    return Ridge(A, b, penalty, 1 / (curvature + penalty), w, -np.linalg.solve(hessian, w))


def ridge(data: Ridge) -> Problem:
    rng = np.random.default_rng(2)
    rows, columns = data.A.shape
    validation, target = rng.standard_normal((rows, columns)), rng.standard_normal(rows)
    residual = validation @ data.w - target
    eigenvalues = np.linalg.eigvalsh(data.A.T @ data.A) + data.penalty
    return Problem(
        name="ridge",
        step=data.step,
        y0=jnp.zeros(columns),
        x=None,
        theta=jnp.asarray(data.penalty),
        loss=lambda w: 0.5 * jnp.sum((jnp.asarray(validation) @ w - jnp.asarray(target)) ** 2),
        truth=np.atleast_1d(residual @ (validation @ data.dw)),
        contraction=1 - data.size * eigenvalues[0],
        iterative=lx.Normal(lx.CG(rtol=1e-12, atol=1e-12, max_steps=1000)),
    )


# The methods. Each turns (problem, K) into theta -> solutions, all from the same guess by the same K steps.


class Method(NamedTuple):
    name: str
    solve: Callable  # (problem, K) -> (x, theta) -> y, one example


def through_node(name: str, adjoint: Callable[[Problem], optx.AbstractAdjoint]) -> Method:
    """`declarative.FixedPoint` with this adjoint."""

    def solve(problem, steps):
        def one(x, theta):
            fn = TanhStep(theta) if problem.name == "layer" else lambda w, x: problem.step(w, x, theta)
            node = declarative.FixedPoint(fn, FixedSteps(steps=steps), adjoint(problem), throw=False, max_steps=steps)
            return node(x, y0=problem.y0)

        return one

    return Method(name, solve)


def _optimistix(problem, steps):
    def one(x, theta):
        step = lambda y, args: problem.step(y, *args)
        adjoint = optx.ImplicitAdjoint()
        solver = FixedSteps(steps=steps)
        out = optx.fixed_point(step, solver, problem.y0, (x, theta), adjoint=adjoint, max_steps=steps, throw=False)
        return out.value

    return one


def _jaxopt(problem, steps):
    import jaxopt  # pyright: ignore[reportMissingImports]  (a peer: benchmarks/README.md)

    def one(x, theta):
        # tol=-1 cannot be met, so all `maxiter` steps run. The default backward solve: conjugate gradients on J'J.
        solver = jaxopt.FixedPointIteration(problem.step, maxiter=steps, tol=-1.0, implicit_diff=True)
        return solver.run(problem.y0, x, theta).params

    return one


def _scan(problem, steps):
    def one(x, theta):
        body = lambda y, _: (problem.step(y, x, theta), None)
        return jax.lax.scan(body, problem.y0, None, length=steps)[0]

    return one


DENSE = through_node("implicit (default: dense)", lambda problem: declarative.ImplicitAdjoint())
KRYLOV = through_node("implicit (CG on J'J)", lambda problem: declarative.ImplicitAdjoint(problem.iterative))
ONE_STEP = through_node("one-step", lambda problem: declarative.OneStepAdjoint())
UNROLLED = through_node("unrolled (UnrolledAdjoint)", lambda problem: declarative.UnrolledAdjoint())
CHECKPOINTED = through_node("checkpointed (optimistix)", lambda problem: optx.RecursiveCheckpointAdjoint())
SCAN = Method("unrolled (plain lax.scan)", _scan)
SWEPT = (DENSE, KRYLOV, CHECKPOINTED, UNROLLED, SCAN)


def neumann(terms: int) -> Method:
    return through_node(f"Neumann, {terms} terms", lambda problem: declarative.NeumannAdjoint(terms))


PEERS = {
    "optimistix": Method("peer: optimistix implicit", _optimistix),
    "jaxopt": Method("peer: jaxopt implicit", _jaxopt),
}
ALL = (DENSE, KRYLOV, *map(neumann, (3, 10, 30, 100)), ONE_STEP, UNROLLED, SCAN, CHECKPOINTED, *PEERS.values())


# Measuring


class Compiled(NamedTuple):
    method: str
    call: Callable
    theta: Any
    temp_bytes: int
    compile_seconds: float


_compiled: dict[tuple[str, str, int], Compiled] = {}


def compile_gradient(problem: Problem, method: Method, steps: int) -> Compiled:
    """The value and gradient of `loss` with respect to theta, compiled once; with the size of its temporary buffers."""
    name = (problem.name, method.name, steps)
    if name not in _compiled:
        _compiled[name] = _compile_gradient(problem, method, steps)
    return _compiled[name]


def _compile_gradient(problem: Problem, method: Method, steps: int) -> Compiled:
    one = method.solve(problem, steps)

    def loss(theta):
        y = one(None, theta) if problem.x is None else jax.vmap(lambda x: one(x, theta))(problem.x)
        return problem.loss(y)

    start = time.perf_counter()
    compiled = jax.jit(jax.value_and_grad(loss)).lower(problem.theta).compile()
    seconds = time.perf_counter() - start
    analysis = compiled.memory_analysis()
    assert analysis is not None, "this backend does not report the memory of a compiled program"
    temp = int(analysis.temp_size_in_bytes)
    return Compiled(method.name, compiled, problem.theta, temp, seconds)


def seconds_of(compiled: Compiled) -> float:
    start = time.perf_counter()
    jax.block_until_ready(compiled.call(compiled.theta))
    return time.perf_counter() - start


def interleaved(entries: list[Compiled], repetitions: int) -> list[float]:
    """Median seconds of each, after a warm-up; they take turns, so that a busy minute of the machine hits all of them."""
    warm = [seconds_of(entry) for entry in entries]
    # One repetition is enough where a run is so long that the noise is small against it.
    turns = [[i for i, seconds in enumerate(warm) if seconds < 1 or turn == 0] for turn in range(repetitions)]
    times: list[list[float]] = [[] for _ in entries]
    for i in (i for turn in turns for i in turn):
        times[i].append(seconds_of(entries[i]))
    return [statistics.median(own) for own in times]


def error_of(problem: Problem, compiled: Compiled) -> float:
    _, gradient = compiled.call(compiled.theta)
    flat = np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(gradient)])
    return float(np.linalg.norm(flat - problem.truth) / np.linalg.norm(problem.truth))


def slope(x, y) -> float:
    """Of log y against log x, by least squares."""
    return float(np.polyfit(np.log(np.asarray(x, float)), np.log(np.asarray(y, float)), 1)[0])


# The parts of the report


def sweep(
    problem: Problem, methods: tuple[Method, ...], sizes: tuple[int, ...], repetitions: int
) -> list[dict[str, Any]]:
    """Memory, time and error of the main methods against the number of inner steps."""
    print(f"\n{problem.name}: contraction factor {problem.contraction:.3f} a step")
    print(f"{'K':>6}  {'method':<28}{'temp MB':>10}{'ms':>10}{'error':>10}")
    rows = []
    seen: dict[str, list[tuple[int, float]]] = {method.name: [] for method in methods}
    for steps in sizes:
        entries = [compile_gradient(problem, method, steps) for method in methods]
        small = [entry for entry in entries if entry.temp_bytes < LIMIT_BYTES]
        timed = [entry for entry in small if _predicted(seen[entry.method], steps) < LIMIT_SECONDS]
        seconds = dict(zip([e.method for e in timed], interleaved(timed, repetitions), strict=True))
        for entry in entries:
            time_ = seconds.get(entry.method)
            error = None if time_ is None else error_of(problem, entry)
            if time_ is not None:
                seen[entry.method].append((steps, time_))
            rows.append(_row("sweep", problem, entry, steps, time_, error))
            shown = "   not run" if time_ is None else f"{1e3 * time_:>10.2f}{error:>10.1e}"
            print(f"{steps:>6}  {entry.method:<28}{entry.temp_bytes / 1e6:>10.3f}{shown}", flush=True)
    return rows


def _predicted(seen: list[tuple[int, float]], steps: int) -> float:
    """Seconds for `steps` steps, by a straight line through the last two sizes."""
    if len(seen) < 2:
        return 0.0
    (k0, t0), (k1, t1) = seen[-2:]
    return t1 + max(t1 - t0, 0.0) / (k1 - k0) * (steps - k1)


def _row(table: str, problem: Problem, entry: Compiled, steps: int, seconds, error) -> dict[str, Any]:
    return {
        "table": table,
        "problem": problem.name,
        "method": entry.method,
        "steps": steps,
        "temp_bytes": entry.temp_bytes,
        "seconds": seconds,
        "error": error,
    }


def compare(problem: Problem, methods: tuple[Method, ...], steps: int, repetitions: int) -> list[dict[str, Any]]:
    """Methods and peers at one number of steps."""
    absent = [name for name, peer in PEERS.items() if peer in methods and importlib.util.find_spec(name) is None]
    methods = tuple(method for method in methods if method not in [PEERS[name] for name in absent])
    print(f"\n{problem.name}, {steps} steps; times as ratios to automatic differentiation of lax.scan")
    print(f"{'method':<30}{'temp MB':>10}{'ms':>10}{'ratio':>8}{'error':>10}{'compile s':>11}")
    entries = [compile_gradient(problem, method, steps) for method in methods]
    seconds = interleaved(entries, repetitions)
    unit = next(s for s, entry in zip(seconds, entries, strict=True) if entry.method == SCAN.name)
    rows = []
    for entry, time_ in zip(entries, seconds, strict=True):
        error = error_of(problem, entry)
        print(
            f"{entry.method:<30}{entry.temp_bytes / 1e6:>10.3f}{1e3 * time_:>10.2f}{time_ / unit:>8.2f}{error:>10.1e}"
            f"{entry.compile_seconds:>11.1f}"
        )
        rows.append(_row("compare", problem, entry, steps, time_, error))
    for name in absent:
        print(f"{PEERS[name].name:<30}not installed, left out (pip install {name})")
    return rows


def merit(name: str, ok: bool, text: str) -> dict[str, Any]:
    print(f"{'ok  ' if ok else 'FAIL'}  {name}: {text}")
    return {"table": "merit", "name": name, "ok": bool(ok), "text": text}


def memory_merits(rows: list[dict[str, Any]], problem: str) -> list[dict[str, Any]]:
    """(i): how memory grows with K. Slopes from K = 100 on: below, what does not depend on K is still in sight."""
    out = []
    kinds = {DENSE: "flat", KRYLOV: "flat", CHECKPOINTED: "sublinear", UNROLLED: "sublinear", SCAN: "linear"}
    for method, kind in kinds.items():
        own = [row for row in rows if (row["table"], row["problem"], row["method"]) == ("sweep", problem, method.name)]
        if not own:
            continue
        x, y = np.asarray([(row["steps"], row["temp_bytes"]) for row in own], float).T
        rate, spread = slope(x[x >= 100], y[x >= 100]), y.max() / y.min()
        ok = {"flat": spread < 1.02, "sublinear": rate < 0.6, "linear": abs(rate - 1) < 0.05}[kind]
        text = f"{method.name}: {kind}? log-log slope {rate:+.3f}; largest / smallest {spread:.4g}, K from {x[0]:.0f} to {x[-1]:.0f}"
        out.append(merit(f"(i) memory, {problem}", ok, text))
    return out


def accuracy_merit(data: Ridge) -> list[dict[str, Any]]:
    """(ii): dw/dlambda by several routes to the solution and one rule for the gradient."""

    def objective(w, penalty):
        return 0.5 * jnp.sum((jnp.asarray(data.A) @ w - jnp.asarray(data.b)) ** 2) + 0.5 * penalty * jnp.sum(w**2)

    descend = lambda w, penalty: data.step(w, None, penalty)
    tight, most = optx.FixedPointIteration(rtol=1e-14, atol=1e-14), 20_000
    # Not judged: it stops at a change of 1.8e-12 a step, which for a contraction by 0.95 is about 20 times that from the solution,
    # and figure (iii) says what follows.
    default = "FixedPoint, gradient descent to its default rtol"
    routes = {
        "Argmin, default solver": declarative.Argmin(objective),
        "FixedPoint, gradient descent to rtol=1e-14": declarative.FixedPoint(descend, tight, max_steps=most),
        "FixedPoint, 3000 steps of gradient descent": declarative.FixedPoint(
            descend, FixedSteps(steps=3000), max_steps=3000
        ),
        default: declarative.FixedPoint(descend, max_steps=most),
    }
    out = []
    y0 = jnp.zeros(data.w.size)
    for name, node in routes.items():
        modes = {"forward": jax.jacfwd, "reverse": jax.jacrev} if name.startswith("Argmin") else {"forward": jax.jacfwd}
        for mode, jacobian in modes.items():
            dw = jacobian(lambda penalty, node=node: node(penalty, y0=y0))(jnp.asarray(data.penalty))
            error = float(np.linalg.norm(dw - data.dw) / np.linalg.norm(data.dw))
            text = f"{name}, {mode} mode: relative error {error:.1e}"
            if name == default:
                print(f"note  (ii) dw/dlambda: {text}")
            else:
                out.append(merit("(ii) dw/dlambda", error < 1e-10, text))
    return out


def early_stop(data: Ridge) -> list[dict[str, Any]]:
    """(iii): the error of the gradient against that of the solution, for iterates stopped after 1, 2, ... steps."""
    most = 620
    steps = jnp.arange(1, most + 1, 8)

    def derivative(adjoint):
        def one(steps, penalty):
            # A plain optimistix solve: no policy, so an iterate that is no solution gets the derivative that (IFT) gives for it.
            fn = lambda w, penalty: data.step(w, None, penalty)
            solver, y0 = FixedSteps(steps=steps), jnp.zeros(data.w.size)
            out = optx.fixed_point(fn, solver, y0, penalty, adjoint=adjoint, max_steps=most, throw=False)
            return out.value

        tangent = lambda steps: jax.jvp(
            lambda penalty: one(steps, penalty), (jnp.asarray(data.penalty),), (jnp.ones(()),)
        )
        return jax.jit(jax.vmap(tangent))(steps)

    adjoints = {
        "implicit": declarative.ImplicitAdjoint(),
        "unrolled": declarative.UnrolledAdjoint(),
        "Neumann, 30 terms": declarative.NeumannAdjoint(30),
        "one-step": declarative.OneStepAdjoint(),
    }
    curves = {}
    for name, adjoint in adjoints.items():
        w, dw = (np.asarray(out) for out in derivative(adjoint))
        distance = np.linalg.norm(w - data.w, axis=1) / np.linalg.norm(data.w)
        error = np.linalg.norm(dw - data.dw, axis=1) / np.linalg.norm(data.dw)
        curves[name] = (distance, error)
    distance, error = curves["implicit"]
    used = distance > 1e-12
    rate = slope(distance[used], error[used])
    text = (
        f"slope {rate:.3f} (1 +- 0.05) over {used.sum()} iterates, relative |w_k - w*| from {distance.max():.0e} "
        f"to {distance[used].min():.0e}"
    )
    ok = abs(rate - 1) <= 0.05 and distance[used].min() < 3e-12
    rows = [
        {"table": "early stop", "problem": "ridge", "method": name, "distance": d.tolist(), "error": e.tolist()}
        for name, (d, e) in curves.items()
    ]
    return [*rows, merit("(iii) error of the implicit gradient against that of the solution", ok, text)]


# The figure


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Left: memory of the gradient against K (layer). Right: error of the gradient against that of the iterate (ridge)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    blue, light, red, orange, green, grey = "#1f4e9c", "#6fa3dc", "#c0392b", "#d98a29", "#3a8a5f", "0.45"
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained", width_ratios=(1, 1.25))

    # Colour, marker, label, and how far the label is moved up or down (in points), to keep labels apart.
    styles = {
        SCAN.name: (red, "s", "plain unrolling (lax.scan):\nstores every step", 0),
        DENSE.name: (blue, "o", "implicit, dense solve", 7),
        CHECKPOINTED.name: (orange, "^", "checkpointed: stores some\nsteps, recomputes others", -7),
        UNROLLED.name: (green, "D", "UnrolledAdjoint: nested\nblocks of 16, recomputed", -5),
        KRYLOV.name: (light, "o", "implicit, iterative solve", 0),
    }
    for name, (colour, marker, label, shift) in styles.items():
        own = [r for r in rows if (r["table"], r.get("problem"), r.get("method")) == ("sweep", "layer", name)]
        x, y = [row["steps"] for row in own], [row["temp_bytes"] / 1e6 for row in own]
        bold = 2.6 if name in (DENSE.name, KRYLOV.name) else 1.6
        left.loglog(x, y, marker=marker, markersize=5, color=colour, linewidth=bold)
        left.annotate(label, (x[-1], y[-1]), (9, shift), textcoords="offset points", va="center", color=colour)
    left.set(xlabel="inner steps $K$", ylabel="memory of one gradient (MB)", ylim=(0.3, 5000), xlim=(8, 12_000))
    left.set_title("Memory: the implicit gradient forgets the path", loc="left", fontweight="bold", fontsize=12)
    left.text(0.02, 0.98, "layer of 256 unknowns, batch of 64, float32", transform=left.transAxes, va="top", color=grey)
    left.grid(which="major", color="0.92")

    curves = {
        "one-step": (orange, "one step at the end: biased however long you run", (3e-12, 1.4), "right", "bottom"),
        "Neumann, 30 terms": (green, "30 terms of the Neumann series: less biased", (3e-12, 0.09), "right", "top"),
        "unrolled": (red, "unrolled: converges a little later", (1.5e-6, 1.2e-4), "left", "bottom"),
        "implicit": (blue, "implicit: as accurate as\nthe solution is (slope 1)", (4e-7, 2e-9), "right", "center"),
    }
    for name, (colour, label, at, ha, va) in curves.items():
        own = next(r for r in rows if r["table"] == "early stop" and r["method"] == name)
        x, y = np.asarray(own["distance"]), np.asarray(own["error"])
        seen = x > 1e-12
        bold = 2.6 if name == "implicit" else 1.6
        right.loglog(x[seen], y[seen], "-", color=colour, linewidth=bold)
        right.text(*at, label, color=colour, ha=ha, va=va)
    right.set_xlabel(r"error of the solution, $|w_k - w^\ast|\,/\,|w^\ast|$        (further steps $\rightarrow$)")
    right.set(ylabel="error of the gradient (relative)", xlim=(2, 5e-13), ylim=(2e-13, 30))
    right.set_title("Accuracy: a gradient is as good as its solution", loc="left", fontweight="bold", fontsize=12)
    right.text(0.02, 0.03, "ridge regression by gradient descent, float64", transform=right.transAxes, color=grey)
    right.grid(which="major", color="0.92")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What each way of differentiating a solve costs, and how wrong it is.")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repetitions; under a minute")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        help="folder for the JSON lines and the figure (default: results/; with --quick none)",
    )
    arguments = parser.parse_args(argv)
    quick = arguments.quick

    start = time.perf_counter()
    print(f"{machine()}\n{versions('jax', 'jaxlib', 'equinox', 'optimistix', 'lineax', 'jaxopt', 'numpy')}")
    problem = layer()
    if quick:
        rows = sweep(problem, (DENSE, KRYLOV, SCAN), (100, 1000), 1)
    else:
        rows = sweep(problem, SWEPT, STEPS, 3)
        rows += compare(problem, ALL, 300, 5)

    jax.config.update("jax_enable_x64", True)
    data = ridge_data()
    problem = ridge(data)
    if not quick:
        rows += sweep(problem, (DENSE, CHECKPOINTED, UNROLLED, SCAN), (10, 100, 1000, 10_000), 5)
        rows += compare(problem, ALL, 1000, 5)

    print()
    merits = memory_merits(rows, "layer") + memory_merits(rows, "ridge") + accuracy_merit(data)
    *curves, last = early_stop(data)
    rows += [*curves, *merits, last]
    print(f"\n{time.perf_counter() - start:.0f} s")

    passed = all(row["ok"] for row in rows if row["table"] == "merit")
    out = arguments.out or (None if quick else RESULTS)
    if out is None:
        return 0 if passed else 1
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "run": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "quick": quick,
        "versions": versions("jax", "jaxlib", "equinox", "optimistix", "lineax", "jaxopt", "numpy"),
        "machine": machine(),
    }
    with open(out / "adjoints.jsonl", "a") as file:
        file.writelines(json.dumps({"run": about["run"], **row}) + "\n" for row in [{"table": "run", **about}, *rows])
    if importlib.util.find_spec("matplotlib") is None:
        print("No figure: matplotlib is not installed.")
    else:
        draw(rows, out / "adjoints.png")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
