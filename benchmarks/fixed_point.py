"""Fixed points: iterations and time to a residual, forward and backward, beside jaxopt, optimistix and torchdeq.

    python -m benchmarks.fixed_point            about 40 minutes on 2 CPU cores
    python -m benchmarks.fixed_point --quick    two maps

Maps y = T(y) of 256 unknowns in float32, 64 examples that differ in a constant: `affine`, y = Wy + u with W symmetric, and `tanh`, y = tanh(Wy + u)
with W symmetric or Gaussian; the spectral norm of W is the contraction in the table.

*Iterations*: the fewest after which the worst example has ||T(y) - y|| <= 1e-6 ||T(y)||, the same rule for every method and judged here, not by the
method; *forward*: the time of that many. All methods take turns in every round; the table has medians, and their ratio to `Anderson`. A method of
jaxopt or torchdeq that takes the batch as one state is run as its documentation does it; `jaxopt, vmap` is one state an example, as ours.

*Forward + backward*: a cotangent pulled back to W and u, at each method's own tolerance, set for the same residual; *error*: relative, of the
gradient with respect to W, against dense elimination in float64.

The bars: no more iterations than the peers' Anderson and Broyden, and half their time. `FAIL` where one is missed, with exit status 1. Peers
that are not installed are shown as absent. PyTorch runs on the CPU whatever JAX runs on.
"""

import argparse
import datetime
import importlib
import importlib.util
import json
import pathlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx

import declarative as dn
from declarative._solvers.accelerated import accelerate

from .shared import machine, versions

RESULTS = pathlib.Path(__file__).parent / "results"
UNKNOWNS, BATCH, RESIDUAL, MOST = 256, 64, 1e-6, 1000
RADII = (0.5, 0.9, 0.95, 0.99)
MAPS = [(kind, radius) for radius in RADII for kind in ("affine", "tanh symmetric", "tanh gaussian")]


class Map(NamedTuple):
    name: str
    W: np.ndarray
    u: np.ndarray
    affine: bool


def make(kind: str, contraction: float) -> Map:
    rng = np.random.default_rng(0)
    W = rng.standard_normal((UNKNOWNS, UNKNOWNS))
    if "gaussian" not in kind:
        W = W + W.T
    W = W * contraction / np.linalg.norm(W, 2)
    u = rng.standard_normal((BATCH, UNKNOWNS))
    return Map(f"{kind} {contraction}", W.astype(np.float32), u.astype(np.float32), kind == "affine")


def residual(problem: Map, y: np.ndarray) -> float:
    """The worst of the batch."""
    W, u, y = (np.asarray(array, np.float64) for array in (problem.W, problem.u, y))
    value = y @ W.T + u if problem.affine else np.tanh(y @ W.T + u)
    with np.errstate(invalid="ignore", over="ignore"):
        worst = np.max(np.linalg.norm(value - y, axis=1) / np.linalg.norm(value, axis=1))
    return float(worst) if np.isfinite(worst) else np.inf


def exact_gradient(problem: Map, cotangent: np.ndarray) -> np.ndarray:
    """Of sum(cotangent * y) with respect to W, in float64."""
    W, u, c = (np.asarray(array, np.float64) for array in (problem.W, problem.u, cotangent))
    y = np.zeros_like(u)

    def linearised(y):
        a = y @ W.T + u
        value, slope = (a, np.ones_like(a)) if problem.affine else (np.tanh(a), 1 - np.tanh(a) ** 2)
        return value, slope, np.eye(UNKNOWNS) - slope[:, :, None] * W[None]

    for _ in range(8):  # Newton
        value, _, J = linearised(y)
        y = y + np.linalg.solve(J, (value - y)[..., None])[..., 0]
    _, slope, J = linearised(y)
    w = np.linalg.solve(np.swapaxes(J, 1, 2), c[..., None])[..., 0] * slope
    return w.T @ y


# ----------------------------------------------------------------------------------------------------------------------
# Methods: for a map, a function of a number of iterations that returns a compiled solve, and the compiled gradient
# ----------------------------------------------------------------------------------------------------------------------


class Method(NamedTuple):
    name: str
    solve: Callable[[Map, int], Callable[[], Any]] | None  # None: not installed
    gradient: Callable[[Map, np.ndarray], Callable[[], Any]] | None = None
    steps_matter: bool = True
    peer: bool = False


def _one(problem: Map):
    if problem.affine:
        return lambda y, p: p[0] @ y + p[1]
    return lambda y, p: jnp.tanh(p[0] @ y + p[1])


def _batched(problem: Map):
    if problem.affine:
        return lambda y, p: y @ p[0].T + p[1]
    return lambda y, p: jnp.tanh(y @ p[0].T + p[1])


def _ready(compiled, *args):
    return lambda: jax.block_until_ready(compiled(*args))


def _arrays(problem: Map):
    return jnp.asarray(problem.W), jnp.asarray(problem.u), jnp.zeros((BATCH, UNKNOWNS), jnp.float32)


def ours(solver: Callable[[float], Any], root: bool = False):
    def solve(problem: Map, steps: int):
        W, u, y0 = _arrays(problem)
        fn = _one(problem)

        def one(y0, u, W):
            if root:
                target = lambda y, p: fn(y, p) - y
                return optx.root_find(target, solver(0.0), y0, (W, u), max_steps=steps, throw=False).value
            # What `FixedPoint` runs, without its judgement, which makes NaN of what did not meet a tolerance.
            return accelerate(solver(0.0), fn, y0, (W, u), steps).y

        return _ready(jax.jit(jax.vmap(one, in_axes=(0, 0, None))), y0, u, W)

    def gradient(problem: Map, cotangent):
        W, u, y0 = _arrays(problem)
        fn, c = _one(problem), jnp.asarray(cotangent)
        if root:
            target = lambda y, p: fn(y, p) - y
            layer = lambda p, y0: optx.root_find(target, solver(RESIDUAL), y0, p, throw=False).value
        else:
            node = dn.FixedPoint(fn, solver=solver(RESIDUAL), throw=False)
            layer = lambda p, y0: node(p, y0=y0)

        def loss(W, u):
            return jnp.sum(c * jax.vmap(lambda u, y0: layer((W, u), y0))(u, y0))

        return _ready(jax.jit(jax.grad(loss, argnums=(0, 1))), W, u)

    return solve, gradient


def from_jaxopt(kind: str, vmapped: bool):
    if importlib.util.find_spec("jaxopt") is None:
        return None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jaxopt = importlib.import_module("jaxopt")

    def build(fn, steps, tol):
        if kind == "Anderson":
            return jaxopt.AndersonAcceleration(fn, history_size=5, ridge=1e-5, maxiter=steps, tol=tol)
        return jaxopt.FixedPointIteration(fn, maxiter=steps, tol=tol)

    def layer(problem, steps, tol):
        if vmapped:
            run = build(_one(problem), steps, tol).run
            return lambda y0, W, u: jax.vmap(lambda y0, u: run(y0, (W, u)).params)(y0, u)
        run = build(_batched(problem), steps, tol).run
        return lambda y0, W, u: run(y0, (W, u)).params

    def solve(problem: Map, steps: int):
        W, u, y0 = _arrays(problem)
        return _ready(jax.jit(layer(problem, steps, 0.0)), y0, W, u)

    def gradient(problem: Map, cotangent):
        W, u, y0 = _arrays(problem)
        c = jnp.asarray(cotangent)
        # Its tolerance is absolute: that of the worst example in the l2 norm of an example, or of the batch.
        size = 10.0 * (1 if vmapped else BATCH**0.5)
        run = layer(problem, MOST, RESIDUAL * size)
        return _ready(jax.jit(jax.grad(lambda W, u: jnp.sum(c * run(y0, W, u)), argnums=(0, 1))), W, u)

    return solve, gradient


def from_torchdeq(kind: str):
    if importlib.util.find_spec("torchdeq") is None:
        return None, None
    torch = importlib.import_module("torch")
    get_deq = importlib.import_module("torchdeq").get_deq

    torch.set_num_threads(2)

    def function(problem, W, u):
        return (lambda y: y @ W.T + u) if problem.affine else (lambda y: torch.tanh(y @ W.T + u))

    def solve(problem: Map, steps: int):
        W, u = torch.from_numpy(problem.W), torch.from_numpy(problem.u)
        deq = get_deq(f_solver=kind, f_max_iter=steps, f_tol=0.0)
        deq.eval()

        def run():
            with torch.no_grad():
                out, _ = deq(function(problem, W, u), torch.zeros(BATCH, UNKNOWNS))
            return out[-1].numpy()

        return run

    def gradient(problem: Map, cotangent):
        W = torch.from_numpy(problem.W).requires_grad_()
        u = torch.from_numpy(problem.u).requires_grad_()
        c = torch.from_numpy(cotangent)
        options = {"f_max_iter": MOST, "f_tol": RESIDUAL, "b_max_iter": MOST, "b_tol": RESIDUAL}
        deq = get_deq(ift=True, f_solver=kind, b_solver=kind, **options)

        def run():
            out, _ = deq(function(problem, W, u), torch.zeros(BATCH, UNKNOWNS))
            found = torch.autograd.grad((c * out[-1]).sum(), (W, u))
            return tuple(g.numpy() for g in found)

        return run

    return solve, gradient


def methods() -> list[Method]:
    newton = lambda rtol: optx.Newton(rtol=max(rtol, 1e-7), atol=0.0)
    return [
        Method("Anderson", *ours(lambda rtol: dn.Anderson(rtol, 0.0))),
        Method("Broyden", *ours(lambda rtol: dn.Broyden(rtol, 0.0))),
        Method("jaxopt Anderson", *from_jaxopt("Anderson", False), peer=True),
        Method("jaxopt Anderson, vmap", *from_jaxopt("Anderson", True), peer=True),
        Method("torchdeq Anderson", *from_torchdeq("anderson"), peer=True),
        Method("torchdeq Broyden", *from_torchdeq("broyden"), peer=True),
        Method("jaxopt fixed point", *from_jaxopt("fixed point", False)),
        Method("torchdeq fixed point", *from_torchdeq("fixed_point_iter")),
        Method("optimistix Newton", *ours(newton, root=True)),
    ]


def fewest(method: Method, problem: Map) -> int | None:
    """The fewest iterations that reach the residual, by doubling and halving (None: not within the most)."""
    assert method.solve is not None
    reached = lambda steps: residual(problem, np.asarray(method.solve(problem, steps)())) <= RESIDUAL  # pyright: ignore
    high = 4
    while not reached(high):
        high *= 2
        if high > MOST:
            return None
    low = high // 2 if high > 4 else 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def timed(runs: dict[str, Callable[[], Any]], rounds: int, slow: float = 1.0) -> dict[str, float]:
    """Median milliseconds; the methods take turns, and a slow one leaves after three."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            if len(seconds[name]) >= 3 and sum(seconds[name]) > slow:
                continue
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two maps, fewer repetitions")
    parser.add_argument(
        "--contractions", type=float, nargs="+", choices=RADII, default=RADII, help="of the maps to run"
    )
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS / "fixed_point.jsonl", help="where the lines go")
    args = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")  # a GPU would round products to three digits
    rounds = 7 if args.quick else 21
    chosen = (
        [("affine", 0.9), ("tanh gaussian", 0.99)]
        if args.quick
        else [one for one in MAPS if one[1] in args.contractions]
    )
    stamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    peers = versions("jax", "equinox", "optimistix", "jaxopt", "torch", "torchdeq")
    about = {"machine": machine(), "versions": peers, "unknowns": UNKNOWNS, "batch": BATCH, "residual": RESIDUAL}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    lines, failed = [], False
    everything = methods()
    absent = [method.name for method in everything if method.solve is None]
    if absent:
        print(f"not installed: {', '.join(absent)}")
    present = [method for method in everything if method.solve is not None]
    cotangent = np.random.default_rng(1).standard_normal((BATCH, UNKNOWNS)).astype(np.float32)

    for kind, contraction in chosen:
        problem = make(kind, contraction)
        exact = exact_gradient(problem, cotangent)
        counts = {method.name: fewest(method, problem) for method in present}
        solves = {
            method.name: method.solve(problem, count)
            for method in present
            if method.solve is not None and (count := counts[method.name]) is not None
        }
        forward = timed(solves, rounds)
        gradients = {
            method.name: method.gradient(problem, cotangent)
            for method in present
            if method.gradient is not None and counts[method.name] is not None
        }
        both = timed(gradients, rounds)
        print(f"\n{problem.name}")
        print(
            f"  {'':<24}{'iterations':>10}{'forward':>10}{'ratio':>7}{'forward+backward':>18}{'ratio':>7}{'error':>9}"
        )
        for method in present:
            name, count = method.name, counts[method.name]
            line = {"time": stamp, "map": problem.name, "method": name, "iterations": count}
            if count is None:
                print(f"  {name:<24}{'> ' + str(MOST):>10}")
            else:
                found = np.asarray(gradients[name]()[0], np.float64)
                error = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
                ratios = forward[name] / forward["Anderson"], both[name] / both["Anderson"]
                line |= {"forward_ms": forward[name], "forward_backward_ms": both[name], "gradient_error": error}
                print(
                    f"  {name:<24}{count:>10}{forward[name]:>8.2f}ms{ratios[0]:>7.1f}{both[name]:>16.2f}ms{ratios[1]:>7.1f}{error:>9.0e}"
                )
            lines.append(line)
        for own in ("Anderson", "Broyden"):
            if counts[own] is None:
                print(f"  FAIL  {own} did not reach the residual")
                failed = True
                continue
            for method in present:
                if not method.peer or own not in method.name:
                    continue
                theirs = counts[method.name]
                more = theirs is not None and (counts[own] or 0) > theirs
                ratio = np.inf if theirs is None else forward[method.name] / forward[own]
                whole = np.inf if theirs is None else both[method.name] / both[own]
                ok = not more and ratio >= 2
                failed |= not ok
                print(
                    f"  {'ok  ' if ok else 'FAIL'}  {own} against {method.name}: {counts[own]} iterations against "
                    f"{theirs or f'more than {MOST}'}, {ratio:.1f} times faster (with the gradient {whole:.1f})"
                )
        # Map by map: it takes long, and what is there is there.
        args.json.write_text("".join(json.dumps(line) + "\n" for line in [about, *lines]))
    print(f"\nwritten to {args.json.name}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
