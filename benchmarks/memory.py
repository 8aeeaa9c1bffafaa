r"""What it costs to differentiate a training run, and how wrong each way is.

    python -m benchmarks.memory            about 5 minutes on 2 CPU cores
    python -m benchmarks.memory --quick    about a minute, fewer sizes

K steps of gradient descent with momentum train a classifier of scikit-learn's digits on 200 images. How does the loss on 400 others
change with the weight decay (its logarithm), with the learning rate of every step, and with the momentum of every step? Two models,
in float64 where not said otherwise: **logistic**, logistic regression (650 weights), and **mlp**, a hidden layer of 16 (1210 weights).

| method | backward pass |
|---|---|
| unrolled | automatic differentiation of `lax.scan`: every step is stored |
| checkpointed, sqrt(K) | about sqrt(K) iterates are stored, and the steps between two of them stored again when they are needed |
| checkpointed, 10 | Equinox's binomial checkpoints: 10 iterates are stored at any time, and steps are repeated |
| reversible | `declarative.ReversibleSGD`: the run is run backwards, bit for bit |
| reversible, float32 | the same on 32-bit integers (`limit=64`); its error is that of float32 as well |
| float reversal | the same in floating point, without the buffers of bits: **fails**, and is here to show that it does |
| implicit | `declarative.Argmin` with `ImplicitAdjoint`: knows the last weights only, and no gradient but that of the weight decay |

Figures of merit, printed with `ok` or `FAIL` (and the exit status is 1 on a FAIL):

1. Memory: the temporary buffers of the compiled gradient. What a step adds to them, unrolled, is at least 140 times what it adds to
   the reversible run; also if the weights alone were stored, at 8 bytes each.
2. Accuracy of the reversible gradient, relative to the unrolled one: 1e-8 at every K.
3. Float reversal is wrong by more than 100 % at K = 1000, where the reversible gradient is right.
4. The implicit gradient of `logistic` agrees with the unrolled one (1e-6) where the run has converged, and does not (1e-2) where it has
   not. That of `mlp` is printed and not judged: the run has not converged at the largest K.

Times are medians, methods taking turns. `error` is relative, in the Euclidean norm, of the vector of all derivatives that a method gives;
`decay_error` of the one by the logarithm of the weight decay alone.
"""

import argparse
import datetime
import importlib.util
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
from jaxtyping import Array, Float, Int, PyTree

import declarative

from .adjoints import Compiled, interleaved, merit
from .shared import machine, versions

RESULTS = pathlib.Path(__file__).parent / "results"
STEPS = (10, 30, 100, 300, 1000, 3000)
LIMIT_BYTES = 2.0e9  # a gradient that would need more is not run
MOMENTUM = (
    round(0.9 * 2**16) / 2**16
)  # a number that every arithmetic here has, so that all methods take the same steps
PACKAGES = ("jax", "jaxlib", "equinox", "optimistix", "lineax", "numpy")


# The problem


class Problem(NamedTuple):
    name: str
    w0: PyTree
    objective: Callable  # (w, log of the weight decay, t) -> training loss
    validation: Callable  # w -> validation loss
    log_decay: float
    rate: float


class Data(NamedTuple):
    x: Float[Array, "images pixels"]
    y: Int[Array, " images"]


def digits() -> tuple[Data, Data]:
    """(for training, for validation)."""
    from sklearn.datasets import load_digits

    images, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    order = np.random.default_rng(0).permutation(len(labels))[:600]
    images, labels = images[order] / 16, labels[order]
    part = lambda rows: Data(jnp.asarray(images[rows]), jnp.asarray(labels[rows]))
    return part(slice(0, 200)), part(slice(200, 600))


def cross_entropy(logits: Float[Array, "images classes"], labels: Int[Array, " images"]) -> Float[Array, ""]:
    log_probability = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_probability, labels[:, None], axis=1))


def make(name: str, predict: Callable, w0: PyTree, log_decay: float, rate: float) -> Problem:
    train, valid = digits()

    def loss(w, data):
        dtype = jtu.tree_leaves(w)[0].dtype
        return cross_entropy(predict(w, data.x.astype(dtype)), data.y)

    def objective(w, log_decay, t):
        squares = sum(jnp.sum(leaf**2) for leaf in jtu.tree_leaves(w))
        return loss(w, train) + jnp.exp(log_decay) / 2 * squares

    return Problem(name, w0, objective, lambda w: loss(w, valid), log_decay, rate)


def logistic() -> Problem:
    return make("logistic", _affine, (jnp.zeros((64, 10)), jnp.zeros((1, 10))), log_decay=-5.5, rate=2.0)


def mlp() -> Problem:
    key = jr.key(0)
    first = jr.normal(key, (64, 16)) / 8, jnp.zeros((1, 16))
    last = jr.normal(jr.fold_in(key, 1), (16, 10)) / 4, jnp.zeros((1, 10))
    predict = lambda w, x: _affine(w[1], jnp.tanh(_affine(w[0], x)))
    return make("mlp", predict, (first, last), log_decay=-5.5, rate=2.0)


def _affine(w, x):
    weight, bias = w
    return x @ weight + bias


def hyperparameters(problem: Problem, steps: int, dtype: Any = float) -> tuple[Array, Array, Array]:
    """(log of the weight decay, rates, momenta)."""
    return (
        jnp.asarray(problem.log_decay, dtype),
        jnp.full(steps, problem.rate, dtype),
        jnp.full(steps, MOMENTUM, dtype),
    )


def count(problem: Problem) -> int:
    return sum(leaf.size for leaf in jtu.tree_leaves(problem.w0))


# The iteration in floating point


def _step(problem, carry, each, log_decay):
    """One step, as in `declarative.ReversibleSGD`."""
    w, v = carry
    t, rate, momentum = each
    g = jax.grad(problem.objective)(w, log_decay, t)
    v = jtu.tree_map(lambda v, g: momentum * v - (1 - momentum) * g, v, g)
    return (jtu.tree_map(lambda w, v: w + rate * v, w, v), v), None


def _start(problem):
    return problem.w0, jtu.tree_map(jnp.zeros_like, problem.w0)


def _times(steps):
    return jnp.arange(steps, dtype=jnp.int32)


# The methods: from a problem and a number of steps to the gradient as a function of the hyperparameters


class Method(NamedTuple):
    name: str
    gradient: Callable
    dtype: Any = float
    all_hyperparameters: bool = True  # False: of the weight decay only


def through_run(name: str, run: Callable, **fields) -> Method:
    """Automatic differentiation of the validation loss after `run(problem, steps, *hyperparameters)`."""

    def gradient(problem, steps):
        loss = lambda *hyper: problem.validation(run(problem, steps, *hyper))
        return jax.grad(loss, argnums=(0, 1, 2))

    return Method(name, gradient, **fields)


def _unrolled(problem, steps, log_decay, rates, momenta):
    body = lambda carry, each: _step(problem, carry, each, log_decay)
    return jax.lax.scan(body, _start(problem), (_times(steps), rates, momenta))[0][0]


def _square_root(problem, steps, log_decay, rates, momenta):
    inner = min((k for k in range(1, steps + 1) if steps % k == 0), key=lambda k: abs(k - steps**0.5))
    body = lambda carry, each: _step(problem, carry, each, log_decay)
    block = jax.checkpoint(lambda carry, some: jax.lax.scan(body, carry, some))
    blocks = jtu.tree_map(lambda leaf: leaf.reshape(-1, inner), (_times(steps), rates, momenta))
    return jax.lax.scan(block, _start(problem), blocks)[0][0]


def _binomial(problem, steps, log_decay, rates, momenta):
    body = lambda carry, each: _step(problem, carry, each, log_decay)
    xs = (_times(steps), rates, momenta)
    return eqxi.scan(body, _start(problem), xs, kind="checkpointed", checkpoints=10)[0][0]


def _reversible(problem, steps, log_decay, rates, momenta):
    sgd = declarative.ReversibleSGD(problem.objective, steps, min_momentum=MOMENTUM, throw=False)
    return sgd.run(problem.w0, log_decay, learning_rate=rates, momentum=momenta)


def _reversible_float32(problem, steps, log_decay, rates, momenta):
    sgd = declarative.ReversibleSGD(problem.objective, steps, min_momentum=MOMENTUM, limit=64.0, throw=False)
    w0 = jtu.tree_map(lambda leaf: leaf.astype(jnp.float32), problem.w0)
    return sgd.run(w0, log_decay, learning_rate=rates, momentum=momenta)


class MomentumDescent(optx.AbstractMinimiser):
    """The same run as an optimistix solver, for `declarative.Argmin`: exactly `steps` steps, converged or not."""

    steps: int = eqx.field(static=True)
    rates: Array
    momenta: Array
    # What it claims for its answer, and what the node then holds it to: next to nothing, or the node would refuse to differentiate
    # runs that have not converged, and there would be nothing to plot.
    rtol: float = 1.0
    atol: float = 0.0
    norm: Any = eqx.field(static=True, default=optx.max_norm)

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        return jnp.zeros((), jnp.int32), jtu.tree_map(jnp.zeros_like, y)

    def step(self, fn, y, args, options, state, tags):
        t, v = state
        g, aux = jax.grad(fn, has_aux=True)(y, args)
        rate, momentum = self.rates[t], self.momenta[t]
        v = jtu.tree_map(lambda v, g: momentum * v - (1 - momentum) * g, v, g)
        return jtu.tree_map(lambda y, v: y + rate * v, y, v), (t + 1, v), aux

    def terminate(self, fn, y, args, options, state, tags):
        return state[0] >= self.steps, optx.RESULTS.successful

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        return y, aux, {}


def _implicit(problem, steps, log_decay, rates, momenta):
    objective = lambda w, log_decay: problem.objective(w, log_decay, 0)
    rates, momenta = jax.lax.stop_gradient((rates, momenta))
    solver = MomentumDescent(steps=steps, rates=rates, momenta=momenta)
    adjoint = declarative.ImplicitAdjoint()
    node = declarative.Argmin(objective, solver, adjoint, max_steps=steps, throw=False)
    return node(log_decay, y0=problem.w0)


def float_reversal(problem: Problem, steps: int) -> Callable:
    """(3)-(5) of `declarative.ReversibleSGD` in floating point. For demonstration: the gradient is wrong for all but short runs."""

    def gradient(log_decay, rates, momenta):
        body = lambda carry, each: _step(problem, carry, each, log_decay)
        w, v = jax.lax.scan(body, _start(problem), (_times(steps), rates, momenta))[0]
        add = lambda a, b, factor=1.0: jtu.tree_map(lambda a, b: a + factor * b, a, b)
        inner = lambda a, b: sum(jnp.sum(a * b) for a, b in zip(jtu.tree_leaves(a), jtu.tree_leaves(b), strict=True))

        def back(carry, each):
            w, v, of_w, of_v, of_decay = carry
            t, rate, momentum = each
            moved = v
            w = add(w, moved, -rate)
            g, pull_back = jax.vjp(lambda w, decay: jax.grad(problem.objective)(w, decay, t), w, log_decay)
            v = jtu.tree_map(lambda v, g: (v + (1 - momentum) * g) / momentum, moved, g)
            of_rate, of_v = inner(of_w, moved), add(of_v, of_w, rate)
            of_momentum = inner(of_v, add(v, g))
            more_w, more_decay = pull_back(jtu.tree_map(lambda of_v: -(1 - momentum) * of_v, of_v))
            of_v = jtu.tree_map(lambda of_v: momentum * of_v, of_v)
            return (w, v, add(of_w, more_w), of_v, of_decay + more_decay), (of_rate, of_momentum)

        of_w = jax.grad(problem.validation)(w)
        init = (w, v, of_w, jtu.tree_map(jnp.zeros_like, of_w), jnp.zeros_like(log_decay))
        carry, schedules = jax.lax.scan(back, init, (_times(steps), rates, momenta), reverse=True)
        return (carry[-1], *schedules)

    return gradient


UNROLLED = through_run("unrolled", _unrolled)
SQUARE_ROOT = through_run("checkpointed, sqrt(K)", _square_root)
BINOMIAL = through_run("checkpointed, 10", _binomial)
REVERSIBLE = through_run("reversible", _reversible)
FLOAT32 = through_run("reversible, float32", _reversible_float32, dtype=jnp.float32)
FLOAT = Method("float reversal", float_reversal)
IMPLICIT = through_run("implicit", _implicit, all_hyperparameters=False)
METHODS = (UNROLLED, SQUARE_ROOT, BINOMIAL, REVERSIBLE, FLOAT32, FLOAT, IMPLICIT)


# Measuring


def compile_gradient(problem: Problem, method: Method, steps: int) -> Compiled:
    hyper = hyperparameters(problem, steps, method.dtype)
    start = time.perf_counter()
    compiled = jax.jit(method.gradient(problem, steps)).lower(*hyper).compile()
    seconds = time.perf_counter() - start
    analysis = compiled.memory_analysis()
    assert analysis is not None, "this backend does not report the memory of a compiled program"
    return Compiled(method.name, lambda hyper: compiled(*hyper), hyper, int(analysis.temp_size_in_bytes), seconds)


def errors(method: Method, gradient, truth) -> tuple[float, float]:
    """(of all derivatives that the method gives, of the weight decay's)."""
    flat = lambda parts: np.concatenate([np.asarray(part, np.float64).ravel() for part in parts])
    relative = lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b))
    of_decay = relative(flat(gradient[:1]), flat(truth[:1]))
    return relative(flat(gradient), flat(truth)) if method.all_hyperparameters else of_decay, of_decay


def sweep(problem: Problem, sizes: tuple[int, ...], repetitions: int) -> list[dict[str, Any]]:
    print(f"\n{problem.name}: {count(problem)} weights, momentum {MOMENTUM:.4g}")
    print(f"{'K':>6}  {'method':<24}{'temp kB':>12}{'ms':>10}{'error':>10}{'decay only':>12}{'compile s':>11}")
    rows = []
    for steps in sizes:
        entries = [compile_gradient(problem, method, steps) for method in METHODS]
        run = [entry for entry in entries if entry.temp_bytes < LIMIT_BYTES]
        seconds = dict(zip([e.method for e in run], interleaved(run, repetitions), strict=True))
        gradients = {entry.method: jax.device_get(entry.call(entry.theta)) for entry in run}
        truth = gradients.get(UNROLLED.name, gradients[SQUARE_ROOT.name])
        for method, entry in zip(METHODS, entries, strict=True):
            row: dict[str, Any] = {"table": "sweep", "problem": problem.name, "method": entry.method, "steps": steps}
            row |= {"temp_bytes": entry.temp_bytes, "compile_seconds": entry.compile_seconds, "seconds": None}
            shown = "   not run"
            if entry in run:
                error, of_decay = errors(method, gradients[entry.method], truth)
                row |= {"seconds": seconds[entry.method], "error": _number(error), "decay_error": _number(of_decay)}
                shown = f"{1e3 * row['seconds']:>10.2f}{error:>10.1e}{of_decay:>12.1e}"
            rows.append(row)
            print(f"{steps:>6}  {entry.method:<24}{entry.temp_bytes / 1e3:>12.1f}{shown}{entry.compile_seconds:>11.1f}")
            sys.stdout.flush()
    return rows


def _number(x: float) -> float | str:
    """JSON has no NaN."""
    return x if np.isfinite(x) else "not finite"


def slopes(rows: list[dict[str, Any]], problem: Problem) -> list[dict[str, Any]]:
    """(1): bytes that a step adds, between the two largest numbers of steps."""
    own = lambda method: [
        (r["steps"], r["temp_bytes"]) for r in rows if (r["problem"], r["method"]) == (problem.name, method.name)
    ]
    per_step = {}
    for method in METHODS:
        (k0, b0), (k1, b1) = own(method)[-2:]
        per_step[method.name] = (b1 - b0) / (k1 - k0)
        constant = b1 - per_step[method.name] * k1
        print(f"{problem.name}, {method.name}: {per_step[method.name]:.1f} bytes a step and {constant / 1e3:.0f} kB")
    ours, weights = per_step[REVERSIBLE.name], 8 * count(problem)
    stored = declarative.ReversibleSGD(problem.objective, 10**6, min_momentum=MOMENTUM).stored_bits(jnp.float64)
    text = f"{per_step[UNROLLED.name]:.0f} bytes a step unrolled, {ours:.1f} reversible: {per_step[UNROLLED.name] / ours:.0f} times; "
    text += f"the weights alone, {weights} bytes: {weights / ours:.0f} times (the buffers are {stored:.3f} bits a parameter and step)"
    return [merit(f"(1) memory, {problem.name}", weights / ours >= 140 and per_step[UNROLLED.name] / ours >= 140, text)]


def accuracy(rows: list[dict[str, Any]], problem: Problem) -> list[dict[str, Any]]:
    """(2)-(4)."""
    own = {(r["method"], r["steps"]): r for r in rows if r["problem"] == problem.name}
    large = lambda x: float("inf") if isinstance(x, str) else x
    ours = [
        large(r[kind]) for (name, _), r in own.items() if name == REVERSIBLE.name for kind in ("error", "decay_error")
    ]
    worst = max(ours)
    out = [merit(f"(2) reversible, {problem.name}", worst < 1e-8, f"largest relative error {worst:.1e}")]
    steps = sorted({k for _, k in own})
    long = [k for k in steps if k >= 1000] or steps[-1:]
    naive = [large(own[FLOAT.name, k]["error"]) for k in long]
    text = f"float reversal at K = {long}: relative error {', '.join(f'{x:.1e}' for x in naive)}"
    out.append(merit(f"(3) float reversal fails, {problem.name}", min(naive) > 1, text))
    first, last = (large(own[IMPLICIT.name, k]["error"]) for k in (steps[0], steps[-1]))
    name = f"(4) implicit, {problem.name}"
    text = f"relative error {first:.1e} at K = {steps[0]}, {last:.1e} at K = {steps[-1]}"
    if problem.name == "logistic":
        out.append(merit(name, first > 1e-2 and last < 1e-6, text))
    else:
        print(f"note  {name}: {text}")
    return out


# The figures


BLUE, LIGHT, RED, ORANGE, YELLOW, GREEN, GREY = "#1f4e9c", "#6fa3dc", "#c0392b", "#d98a29", "#b8a13a", "#3a8a5f", "0.45"
STYLES = {
    UNROLLED.name: (RED, "s"),
    SQUARE_ROOT.name: (ORANGE, "^"),
    BINOMIAL.name: (YELLOW, "v"),
    REVERSIBLE.name: (BLUE, "o"),
    FLOAT.name: (GREY, "X"),
    IMPLICIT.name: (GREEN, "D"),
}


def draw(rows: list[dict[str, Any]], path: pathlib.Path, problem: str = "logistic") -> None:
    """Left: memory of the gradient against K. Right: its error against K."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(13.5, 5.2), layout="constrained")
    own = lambda method: [
        r for r in rows if (r["table"], r.get("problem"), r.get("method")) == ("sweep", problem, method)
    ]

    labels = {
        UNROLLED.name: ("unrolled: stores\nevery step", 0),
        SQUARE_ROOT.name: ("$\\sqrt{K}$ checkpoints", 0),
        BINOMIAL.name: ("10 checkpoints (and\n4 times the time)", 20),
        REVERSIBLE.name: ("reversible", 7),
        IMPLICIT.name: ("implicit", -8),
        FLOAT.name: ("reversed in floating\npoint (wrong)", -4),
    }
    for method, (text, shift) in labels.items():
        colour, marker = STYLES[method]
        x, y = np.asarray([(r["steps"], r["temp_bytes"] / 1e6) for r in own(method)]).T
        left.loglog(
            x, y, marker=marker, color=colour, markersize=5, linewidth=2.6 if method == REVERSIBLE.name else 1.6
        )
        left.annotate(text, (x[-1], y[-1]), (9, shift), textcoords="offset points", va="center", color=colour)
    left.set(xlabel="training steps $K$", ylabel="memory of one gradient (MB)", xlim=(8, 50_000), ylim=(0.04, 400))
    left.set_xticks([10, 100, 1000])
    left.set_title("Memory: run it backwards instead of storing it", loc="left", fontweight="bold", fontsize=12)

    floor, ceiling = 1e-15, 1e3
    notes = {
        FLOAT.name: ("reversed in floating point:\nlost past 300 steps", (1150, 20), "left", "center"),
        IMPLICIT.name: ("implicit: wrong until\nthe run has converged", (13, 2e-4), "left", "center"),
        REVERSIBLE.name: ("reversible, bit for bit", (13, 2e-12), "left", "center"),
        SQUARE_ROOT.name: ("checkpoints: rounding only", (1150, 2.5e-16), "left", "center"),
    }
    for method, (text, at, ha, va) in notes.items():
        colour, marker = STYLES[method]
        x, y = zip(*((r["steps"], r["error"]) for r in own(method) if "error" in r), strict=True)
        y = [ceiling if isinstance(error, str) else min(max(error, floor), ceiling) for error in y]
        right.loglog(
            x, y, marker=marker, color=colour, markersize=5, linewidth=2.6 if method == REVERSIBLE.name else 1.6
        )
        right.text(*at, text, color=colour, ha=ha, va=va)
    right.axhline(1, color="0.8", linewidth=1, zorder=0)
    right.text(100, 1.5, "100 %", color=GREY, fontsize=10)
    right.set(xlabel="training steps $K$", ylabel="error of the gradient (relative)")
    right.set(xlim=(8, 50_000), ylim=(5e-17, 1e4))
    right.set_xticks([10, 100, 1000])
    right.set_title("Accuracy: floating point cannot be reversed", loc="left", fontweight="bold", fontsize=12)
    for axes in (left, right):
        axes.grid(which="major", color="0.92")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What it costs to differentiate a training run, and how wrong it is.")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repetitions; about a minute")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        help="folder for the JSON lines and the figure (default: results/; with --quick none)",
    )
    arguments = parser.parse_args(argv)
    quick = arguments.quick
    jax.config.update("jax_enable_x64", True)
    start = time.perf_counter()
    print(f"{machine()}\n{versions(*PACKAGES)}")

    rows, merits = [], []
    for problem in (logistic(),) if quick else (logistic(), mlp()):
        rows += sweep(problem, (10, 1000, 2000) if quick else STEPS, 1 if quick else 5)
        print()
        merits += slopes(rows, problem) + accuracy(rows, problem)
    print(f"\n{time.perf_counter() - start:.0f} s")

    passed = all(row["ok"] for row in merits)
    out = arguments.out or (None if quick else RESULTS)
    if out is None:
        return 0 if passed else 1
    out.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about = {"table": "run", "quick": quick, "versions": versions(*PACKAGES), "machine": machine()}
    with open(out / "memory.jsonl", "a") as file:
        file.writelines(json.dumps({"run": now, **row}) + "\n" for row in [about, *rows, *merits])
    if importlib.util.find_spec("matplotlib") is None:
        print("No figure: matplotlib is not installed.")
    else:
        draw(rows, out / "memory.png")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
