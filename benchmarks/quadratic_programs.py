"""Quadratic programs as a layer: time, accuracy and compile time of `QuadraticProgram` beside qpth, qpax, ProxQP, jaxopt, cvxpylayers.

    python -m benchmarks.quadratic_programs            every size in float64 and float32; up to 40 minutes on 2 CPU cores
    python -m benchmarks.quadratic_programs --quick    two sizes, a few minutes
    python -m benchmarks.quadratic_programs --sizes 128x100 --dtypes float64 --equations half
    python -m benchmarks.quadratic_programs --scaling  time against the batch, 1 to 4096, and against n, 10 to 500; a figure; 15 minutes

Problems: n variables, n inequalities, n/2 equations or none; Q = L L' + 1e-3 I with L ~ U[0, 1] (condition about 1e6 at n = 100), or
with --well L normal, Q = L L'/n + I, rows of unit length. The time is that of the solution and of its product with a cotangent,
for a batch. Each contender has a process of its own (some stop answering under default flags; after `--patience` seconds one
is given up, and the table says so), and they take turns: compare the ratios of one table, not milliseconds across tables.

Errors: one relative error per problem over all data gradients together, against the exact derivative of the active set in NumPy
and float64, on the data as rounded to the dtype; median and maximum over the problems that are not answered by NaN (ours are, where the
solve is flagged), whose number is shown. qpax differentiates a relaxed problem by
design, and cvxpylayers runs at its default tolerance. On a GPU: JAX's and qpth run there, ProxQP and cvxpylayers on the CPU.
"""

# The peers may be absent where types are checked.
# pyright: reportMissingImports=false

import argparse
import datetime
import importlib.util
import itertools
import json
import multiprocessing as mp
import os
import pathlib
import statistics
import sys
import time
from typing import Any, NamedTuple

import numpy as np

from .shared import machine, versions

RESULTS = pathlib.Path(__file__).parent / "results"
SIZES = ((1, 10), (128, 10), (128, 100), (32, 200), (1, 500))
SCALING_N, SCALING_BATCH = 10, 16
SCALING = (
    *((batch, SCALING_N) for batch in (1, 8, 64, 512, 4096)),
    *((SCALING_BATCH, n) for n in (10, 20, 50, 100, 200, 500)),
)
SCALING_METHODS = ("declarative", "qpth", "qpax, implicit backend", "ProxQP")
BLOCKS = ("Q", "q", "A", "b", "G", "h")
NEEDS = {
    "declarative": "declarative",
    "declarative, smoothed": "declarative",
    "qpth": "qpth",
    "qpax, default": "qpax",
    "qpax, implicit backend": "qpax",
    "ProxQP": "proxsuite",
    "jaxopt BoxOSQP": "jaxopt",
    "cvxpylayers": "cvxpylayers",
}


class Case(NamedTuple):
    batch: int
    n: int
    equations: int
    dtype: str
    well: bool

    def __str__(self):
        kind = "well conditioned" if self.well else "badly conditioned"
        return f"{self.batch} x (n = {self.n}, {self.n} inequalities, {self.equations} equations), {self.dtype}, {kind}"


def data(case: Case) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    batch, n, p = case.batch, case.n, case.equations
    G, A = rng.standard_normal((batch, n, n)), rng.standard_normal((batch, p, n))
    if case.well:
        L = rng.standard_normal((batch, n, n))
        Q = L @ L.transpose(0, 2, 1) / n + np.eye(n)
        G /= np.linalg.norm(G, axis=2, keepdims=True)
        A /= np.linalg.norm(A, axis=2, keepdims=True)
    else:
        L = rng.random((batch, n, n))
        Q = L @ L.transpose(0, 2, 1) + 1e-3 * np.eye(n)
    q, z = rng.standard_normal((batch, n)), rng.standard_normal((batch, n))
    h = (G @ z[:, :, None])[:, :, 0] + rng.random((batch, n))
    b = (A @ z[:, :, None])[:, :, 0]
    blocks = {"Q": Q, "q": q, "A": A, "b": b, "G": G, "h": h, "cotangent": rng.standard_normal((batch, n))}
    return {name: block.astype(case.dtype) for name, block in blocks.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Contenders: each returns a function that solves and differentiates once: (solution, {block: gradient})
# ----------------------------------------------------------------------------------------------------------------------


def in_jax(solve, blocks: dict[str, np.ndarray], case: Case):
    import jax
    import jax.numpy as jnp

    names = [name for name in BLOCKS if case.equations or name not in ("A", "b")]
    arrays = [jnp.asarray(blocks[name]) for name in names]
    cotangent = jnp.asarray(blocks["cotangent"])
    batched = jax.vmap(lambda *arrays: solve(**dict(zip(names, arrays, strict=True))))

    @jax.jit
    def both(*arrays):
        z, pullback = jax.vjp(batched, *arrays)
        return z, pullback(cotangent)

    def run():
        z, grads = jax.block_until_ready(both(*arrays))
        return z, dict(zip(names, grads, strict=True))

    return run


def in_torch(solve, blocks: dict[str, np.ndarray], case: Case, device: str = "cpu"):
    import torch

    names = [name for name in BLOCKS if case.equations or name not in ("A", "b")]
    tensors = {name: torch.tensor(blocks[name], device=device) for name in names}
    cotangent = torch.tensor(blocks["cotangent"], device=device)

    def run():
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        z = solve(**leaves)
        z.backward(cotangent)
        if device == "cuda":
            torch.cuda.synchronize()
        return z.detach(), {name: leaf.grad for name, leaf in leaves.items()}

    return run


def prepare(method: str, blocks: dict[str, np.ndarray], case: Case):
    n, p = case.n, case.equations
    if method in ("declarative", "declarative, smoothed"):
        import declarative as dn

        extra = {"gradient": "smoothed", "smoothing": 1e-3} if "smoothed" in method else {}
        return in_jax(dn.QuadraticProgram(throw=False, **extra), blocks, case)
    if method.startswith("qpax"):
        import jax.numpy as jnp
        import qpax

        none = lambda q: (jnp.zeros((0, n), q.dtype), jnp.zeros(0, q.dtype))
        options = (
            {"backend": "e"}
            if "default" in method
            else {"backend": "i", "solver_tol": 1e-8 if case.dtype == "float64" else 1e-5}
        )

        def solve(Q, q, G, h, A=None, b=None):
            A, b = none(q) if A is None else (A, b)
            return qpax.solve_qp_primal(Q, q, A, b, G, h, **options)

        return in_jax(solve, blocks, case)
    if method == "jaxopt BoxOSQP":
        import jax.numpy as jnp
        import jaxopt

        def solve(Q, q, G, h, A=None, b=None):
            rows = G if A is None else jnp.concatenate([A, G])
            low = jnp.full(n, -jnp.inf, q.dtype) if b is None else jnp.concatenate([b, jnp.full(n, -jnp.inf, q.dtype)])
            high = h if b is None else jnp.concatenate([b, h])
            return (
                jaxopt.BoxOSQP(tol=1e-6)
                .run(params_obj=(Q, q), params_eq=rows, params_ineq=(low, high))
                .params.primal[0]
            )

        return in_jax(solve, blocks, case)
    import torch

    def empty(like):
        options = {"dtype": like.dtype, "device": like.device}
        return torch.zeros(case.batch, 0, n, **options), torch.zeros(case.batch, 0, **options)

    if method == "qpth":
        from qpth.qp import QPFunction

        function = QPFunction(verbose=-1)

        def solve(Q, q, G, h, A=None, b=None):
            A, b = empty(q) if A is None else (A, b)
            return function(Q, q, G, h, A, b)

        return in_torch(solve, blocks, case, "cuda" if torch.cuda.is_available() else "cpu")
    if method == "ProxQP":
        from proxsuite.torch.qplayer import QPFunction

        function = QPFunction()

        def solve(Q, q, G, h, A=None, b=None):
            A, b = empty(q) if A is None else (A, b)
            return function(Q, q, A, b, G, torch.full_like(h, -1e20), h)[0]

        return in_torch(solve, blocks, case)
    if method == "cvxpylayers":
        import cvxpy as cp
        from cvxpylayers.torch import CvxpyLayer

        z = cp.Variable(n)
        root, q, G, h = cp.Parameter((n, n)), cp.Parameter(n), cp.Parameter((n, n)), cp.Parameter(n)
        parameters, constraints = [root, q, G, h], [G @ z <= h]
        if p:
            A, b = cp.Parameter((p, n)), cp.Parameter(p)
            parameters, constraints = [*parameters, A, b], [*constraints, A @ z == b]
        layer = CvxpyLayer(
            cp.Problem(cp.Minimize(cp.sum_squares(root.T @ z) / 2 + q @ z), constraints), parameters, [z]
        )

        def solve(Q, q, G, h, A=None, b=None):
            given = [torch.linalg.cholesky(Q), q, G, h] + ([] if A is None else [A, b])
            return layer(*given)[0]

        return in_torch(solve, blocks, case)
    raise KeyError(method)


def work(connection, method: str, case: Case):
    """A contender's process: answers one message with one run."""
    try:
        if case.dtype == "float64" and NEEDS[method] in ("declarative", "qpax", "jaxopt"):
            import jax

            jax.config.update("jax_enable_x64", True)
        start = time.perf_counter()
        run = prepare(method, data(case), case)
        z, grads = run()
        seconds = time.perf_counter() - start
        host = lambda array: np.asarray(array.cpu() if hasattr(array, "cpu") else array)
        connection.send((seconds, (host(z), {name: host(grad) for name, grad in grads.items()})))
        while connection.recv() is not None:
            # A turn is a few runs where they are short: waking up is not what is measured.
            seconds = []
            while len(seconds) < 10 and sum(seconds) < 0.05:
                start = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - start)
            connection.send(statistics.median(seconds))
    except Exception as error:
        connection.send(f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}")


# ----------------------------------------------------------------------------------------------------------------------
# Truth, rounds, tables
# ----------------------------------------------------------------------------------------------------------------------


def truth(blocks: dict[str, np.ndarray], i: int, guesses) -> tuple[np.ndarray, dict[str, np.ndarray], float]:
    """Solution and data gradients of problem i by its active set, found from a guess, changed until all signs are right."""
    Q, q, A, b, G, h, c = (blocks[name][i].astype(np.float64) for name in (*BLOCKS, "cotangent"))
    n, p = q.size, b.size
    for guess, touching in itertools.product(guesses, (1e-4, 1e-6, 1e-8)):
        active = h - G @ guess < touching * (1 + np.abs(h))
        for _ in range(200):
            on = np.flatnonzero(active)
            rows = np.concatenate([A, G[on]])
            kkt = np.block([[Q, rows.T], [rows, np.zeros((rows.shape[0],) * 2)]])
            if len(rows) > n:
                break
            try:
                solution = np.linalg.solve(kkt, np.concatenate([-q, b, h[on]]))
            except np.linalg.LinAlgError:
                break
            z, lam = solution[:n], np.zeros(h.size)
            lam[on] = solution[n + p :]
            slack = h - G @ z
            wrong = np.where(active, -lam * (lam < 0), -slack * (slack < -1e-9))
            if not np.any(wrong > 0):
                back = np.linalg.solve(kkt, np.concatenate([-c, np.zeros(rows.shape[0])]))
                return z, *_gradients(z, solution, back, on, h.size, p), float(np.linalg.cond(kkt))
            worst = np.argmax(wrong)
            active[worst] = ~active[worst]
    raise RuntimeError(f"no active set found for problem {i}")


def _gradients(z, solution, back, on, m: int, p: int):
    n = z.size
    index = np.concatenate([np.arange(p), p + on])
    multipliers, shifts = np.zeros(p + m), np.zeros(p + m)
    multipliers[index], shifts[index] = solution[n:], back[n:]
    d, both = back[:n], np.outer(shifts, z) + np.outer(multipliers, back[:n])
    return (
        {
            "Q": (np.outer(d, z) + np.outer(z, d)) / 2,
            "q": d,
            "A": both[:p],
            "b": -shifts[:p],
            "G": both[p:],
            "h": -shifts[p:],
        },
    )


def errors(answer, references) -> tuple[np.ndarray, np.ndarray]:
    z, grads = answer
    of_z, of_grads = [], []
    for i, (want_z, want, _) in enumerate(references):
        of_z.append(np.linalg.norm(z[i] - want_z) / np.linalg.norm(want_z))
        off = sum(np.sum((grads[name][i].astype(np.float64) - want[name]) ** 2) for name in grads)
        of_grads.append(np.sqrt(off / sum(np.sum(leaf**2) for leaf in want.values())))
    return np.array(of_z), np.array(of_grads)


def measure(case: Case, methods: list[str], rounds: int, patience: float) -> list[dict[str, Any]]:
    context, rows, running = mp.get_context("spawn"), [], []
    blocks, answers = data(case), []
    for method in methods:
        row: dict[str, Any] = {**case._asdict(), "method": method}
        rows.append(row)
        if importlib.util.find_spec(NEEDS[method]) is None:
            row["state"] = "absent"
            continue
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, method, case), daemon=True)
        process.start()
        if not ours.poll(patience):
            process.kill()
            row["state"] = f"not in {patience:.0f} s"
            continue
        first = ours.recv()
        if isinstance(first, str):
            row["state"] = first
            continue
        row["first call s"], answer = first
        answers.append((row, answer))
        running.append((row, ours, process, []))
    # The active set may start from anyone's answer: it is changed until every sign is right.
    guesses = [answer[0] for _, answer in answers]
    references = (
        []
        if not answers
        else [truth(blocks, i, [guess[i].astype(np.float64) for guess in guesses]) for i in range(case.batch)]
    )
    for row, answer in answers:
        of_z, of_grads = errors(answer, references)
        row["condition"] = max(condition for _, _, condition in references)
        answered = np.isfinite(of_z) & np.isfinite(of_grads)
        row["not answered"] = int(np.sum(~answered))
        for name, values in (("z", of_z[answered]), ("gradient", of_grads[answered])):
            row[f"{name} median"] = float(np.median(values)) if values.size else None
            row[f"{name} max"] = float(np.max(values)) if values.size else None
    for _ in range(rounds):
        for row, ours, process, seconds in running:
            if "state" in row or sum(seconds) > patience:
                continue
            ours.send(True)
            if not ours.poll(patience):
                process.kill()
                row["state"] = f"stopped answering ({patience:.0f} s)"
                continue
            seconds.append(ours.recv())
    for row, ours, process, seconds in running:
        if seconds and "state" not in row:
            row |= {"ms": 1e3 * statistics.median(seconds), "repetitions": len(seconds), "state": "ok"}
            ours.send(None)
        process.join(5)
        if process.is_alive():
            process.kill()
    return rows


def plot_scaling(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Time of a solution and its gradient against the batch (n fixed) and against n (batch fixed), one line a method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    panels = (("batch", "n", SCALING_N, "programs in the batch"), ("n", "batch", SCALING_BATCH, "variables n"))
    for ax, (over, fixed, value, label) in zip(axes, panels, strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            mine = [row for row in rows if row["method"] == method and row[fixed] == value and "ms" in row]
            mine = sorted({row[over]: row["ms"] for row in mine}.items())
            ours = method.startswith("declarative")
            ax.plot(
                *zip(*mine, strict=True), "o-", ms=4, lw=2.4 if ours else 1.2, label=method, zorder=3 if ours else 2
            )
        what = f"n = {value}, {value // 2} equations, {value} inequalities" if fixed == "n" else f"a batch of {value}"
        ax.set(xscale="log", yscale="log", xlabel=label, title=what)
        ax.grid(True, which="major", color="0.9")
    axes[0].set_ylabel("solution and gradient, ms")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(rows: list[dict[str, Any]]) -> str:
    base = next((row["ms"] for row in rows if row["method"] == "declarative" and "ms" in row), None)
    lines = [
        f"{'method':26}{'solve + gradient':>18}{'ratio':>8}{'first call':>12}   {'z: median, max':20}{'gradient: median, max':22}"
    ]
    for row in rows:
        if "ms" not in row:
            lines.append(f"{row['method']:26}{row['state']}")
            continue
        ratio = f"{row['ms'] / base:7.2f}x" if base else ""
        missing = f"   {row['not answered']} answered by NaN" if row["not answered"] else ""
        shown = lambda name, row=row: ", ".join(
            "-" if row[f"{name} {which}"] is None else f"{row[f'{name} {which}']:.1e}" for which in ("median", "max")
        )
        lines.append(
            f"{row['method']:26}{row['ms']:15.2f} ms{ratio:>8}{row['first call s']:10.1f} s   {shown('z')}    "
            f"{shown('gradient')}{missing}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="128 x 10 and 128 x 100 in float64, half as many equations"
    )
    parser.add_argument("--scaling", action="store_true", help="against batch and n, float64, half as many equations")
    parser.add_argument("--sizes", nargs="+", help="like 128x100; default: all")
    parser.add_argument("--dtypes", nargs="+", choices=("float64", "float32"), default=("float64", "float32"))
    parser.add_argument("--equations", nargs="+", choices=("half", "none"), default=("half", "none"))
    parser.add_argument("--methods", nargs="+", choices=tuple(NEEDS), default=tuple(NEEDS))
    parser.add_argument("--well", action="store_true", help="well-conditioned problems")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--patience", type=float, default=100.0, help="seconds before a contender is given up")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder for quadratic_programs.jsonl")
    arguments = parser.parse_args()
    try:
        sizes = (
            SIZES if arguments.sizes is None else tuple(tuple(map(int, size.split("x"))) for size in arguments.sizes)
        )
        assert all(len(size) == 2 and min(size) >= 1 for size in sizes)
    except (ValueError, AssertionError):
        parser.error(f"--sizes: expected BATCHxN, like 128x100, got {' '.join(arguments.sizes or ())}")
    # On a GPU every contender's process needs its share of the memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if arguments.quick:
        sizes, arguments.dtypes, arguments.equations, arguments.rounds = (
            ((128, 10), (128, 100)),
            ("float64",),
            ("half",),
            7,
        )

    if arguments.scaling:
        sizes, arguments.dtypes, arguments.equations = SCALING, ("float64",), ("half",)
        arguments.methods, arguments.rounds = SCALING_METHODS, 5

    about = {
        "benchmark": "quadratic_programs",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(
            "jax", "jaxlib", "equinox", "numpy", "torch", "qpth", "qpax", "proxsuite", "jaxopt", "cvxpylayers"
        ),
        "machine": machine(),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    every = []
    for equations in arguments.equations:
        for dtype in arguments.dtypes:
            for batch, n in sizes:
                case = Case(batch, n, n // 2 if equations == "half" else 0, dtype, arguments.well)
                rows = measure(case, list(arguments.methods), arguments.rounds, arguments.patience)
                every += rows
                print(f"\n{case}\n{table(rows)}", flush=True)
                with open(arguments.out / "quadratic_programs.jsonl", "a") as file:
                    file.writelines(json.dumps({**about, **row}) + "\n" for row in rows)
    if arguments.scaling:
        plot_scaling(every, arguments.out / "quadratic_programs.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
