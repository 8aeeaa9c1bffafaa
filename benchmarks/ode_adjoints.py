r"""What the gradient of an ODE solve costs, by adjoint.

    python -m benchmarks.ode_adjoints            about 10 minutes on 2 CPU cores
    python -m benchmarks.ode_adjoints --quick    about a minute, the small sizes
    python -m benchmarks.ode_adjoints --drift    the drift guard of ReversibleAdjoint, on fields where reversal fails; 2 minutes
    python -m benchmarks.ode_adjoints --gpu      sizes for an accelerator, where a step waits for its kernels to start

The field is an MLP of width 64 with tanh, float32, the horizon 1, the loss $\sum y(1)^2$, its gradient with respect to the parameters and
y(0). "vmap" solves each example of the batch by itself, "batched" the batch as one state. Compared are

- `ReversibleAdjoint`, and diffrax's `RecursiveCheckpointAdjoint`, `DirectAdjoint` and `BacksolveAdjoint`, all on reversible Heun;
- `Reversible(Heun | Tsit5)` under `ReversibleAdjoint` beside the plain solver under `RecursiveCheckpointAdjoint`, at equal steps;
- `scan`: reversible Heun written as a `jax.lax.scan`, differentiated as it is (memory only);
- `torchdiffeq.odeint_adjoint` (midpoint, fixed steps, batched; on a GPU if JAX is), where it is installed. Its gradient is that of a
  backward solve, not of the discretisation, and a midpoint step evaluates the field twice.

Time is the median over rounds in which the methods take turns; memory that of the temporary buffers of the compiled gradient; error the
largest relative one over parameters and y(0), against float64 autodiff of the same scheme at the same float32 parameters. Read ratios.
"""

import argparse
import datetime
import importlib.util
import json
import pathlib
import statistics
import time
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np

import declarative as dn

from .shared import machine, versions

RESULTS = pathlib.Path(__file__).parent / "results"
LIMIT_BYTES = 2e9


class Case(NamedTuple):
    dim: int
    batch: int
    steps: int
    mapped: bool
    adaptive: bool = False

    def __str__(self):
        kind = "adaptive" if self.adaptive else f"{self.steps} steps"
        return f"dim {self.dim}, batch {self.batch} {'vmap' if self.mapped else 'batched'}, {kind}"


QUICK = [Case(2, 16, 1000, True), Case(2, 16, 1000, False)]
CASES = [
    *QUICK,
    Case(2, 16, 100, False),
    Case(2, 16, 10_000, False),
    Case(2, 16, 10_000, True),
    Case(16, 1, 1000, False),
    Case(64, 1, 1000, False),
    Case(256, 1, 1000, False),
    Case(16, 1000, 200, True),
    Case(16, 1000, 200, False),
    Case(2, 16, 4000, True, adaptive=True),
]
GPU = [
    Case(2, 16, 1000, True),
    Case(256, 1, 1000, False),
    Case(16, 1000, 200, True),
    Case(16, 1000, 200, False),
    Case(64, 20_000, 100, True),
    Case(64, 20_000, 100, False),
]
HEUN = dfx.ReversibleHeun()
CHECKPOINT = dfx.RecursiveCheckpointAdjoint()
REVERSIBLE = dn.ReversibleAdjoint(on_drift="nan")  # as the default, without the host's check
METHODS: dict[str, tuple[Any, Any]] = {
    "reversible": (HEUN, REVERSIBLE),
    "recursive checkpoint": (HEUN, CHECKPOINT),
    "direct": (HEUN, dfx.DirectAdjoint()),
    "backsolve": (HEUN, dfx.BacksolveAdjoint()),
    "Reversible(Heun)": (dn.Reversible(dfx.Heun(), 0.999), REVERSIBLE),
    "Heun, checkpoint": (dfx.Heun(), CHECKPOINT),
    "Reversible(Tsit5)": (dn.Reversible(dfx.Tsit5(), 0.999), REVERSIBLE),
    "Tsit5, checkpoint": (dfx.Tsit5(), CHECKPOINT),
}


def problem(case: Case, dtype=jnp.float32):
    keys = jr.split(jr.key(0))
    mlp = eqx.nn.MLP(case.dim, case.dim, 64, 1, jnp.tanh, dtype=jnp.float32, key=keys[0])
    cast = lambda tree: jtu.tree_map(lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, tree)
    parameters, static = eqx.partition(cast(mlp), eqx.is_array)
    return parameters, static, cast(jr.normal(keys[1], (case.batch, case.dim), jnp.float32))


def loss_of(case: Case, static, solver, adjoint):
    def solve(parameters, y0, many):
        field = lambda t, y, parameters: (jax.vmap if many else lambda f: f)(eqx.combine(parameters, static))(y)
        dtype = y0.dtype
        start, end, dt = (jnp.asarray(value, dtype) for value in (0.0, 1.0, 1.0 / case.steps))
        tolerance = 1e-5
        controller = dfx.PIDController(rtol=tolerance, atol=tolerance) if case.adaptive else dfx.ConstantStepSize()
        ys = dfx.diffeqsolve(
            dfx.ODETerm(field), solver, start, end, 0.01 if case.adaptive else dt, y0, parameters, adjoint=adjoint,
            stepsize_controller=controller, max_steps=case.steps + 1,
        ).ys  # fmt: skip
        assert ys is not None
        return ys[0]

    def loss(x):
        parameters, y0 = x
        if case.mapped:
            return jnp.sum(jax.vmap(lambda y: solve(parameters, y, False))(y0) ** 2)
        return jnp.sum(solve(parameters, y0, True) ** 2)

    return loss


def scan_loss(case: Case, static):
    h = 1.0 / case.steps

    def loss(x):
        parameters, y = x
        field = jax.vmap(eqx.combine(parameters, static))

        def step(carry, _):
            y, z, f = carry
            z = 2 * y - z + h * f
            new = field(z)
            return (y + 0.5 * h * (f + new), z, new), None

        return jnp.sum(jax.lax.scan(step, (y, y, field(y)), None, case.steps)[0][0] ** 2)

    return loss


def temporary(program) -> int:
    """Bytes of the temporary buffers of a compiled program."""
    analysis = program.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def relative(a, b):
    pairs = zip(jtu.tree_leaves(a), jtu.tree_leaves(b), strict=True)
    return max(float(np.max(np.abs(np.asarray(x, np.float64) - y)) / np.max(np.abs(y))) for x, y in pairs)


def exact(case: Case, solver):
    """Float64 autodiff of the same scheme; adaptive steps would be others in float64, so there is none then."""
    if case.adaptive:
        return None
    with jax.enable_x64(True):
        parameters, static, y0 = problem(case, jnp.float64)
        gradient = jax.jit(jax.grad(loss_of(case, static, solver, CHECKPOINT)))((parameters, y0))
        return jtu.tree_map(np.asarray, gradient)


def measure(case: Case, rounds: int) -> list[dict]:
    parameters, static, y0 = problem(case)
    x = (parameters, y0)
    rows, running = [], {}
    truth: dict[str, Any] = {}
    for name, (solver, adjoint) in METHODS.items():
        begin = time.perf_counter()
        program = jax.jit(jax.grad(loss_of(case, static, solver, adjoint))).lower(x).compile()
        row = {"case": str(case), **case._asdict(), "method": name, "compile_s": round(time.perf_counter() - begin, 2)}
        row["bytes"] = temporary(program)
        rows.append(row)
        if row["bytes"] < LIMIT_BYTES:
            key = repr(solver)
            if key not in truth:
                truth[key] = exact(case, solver)
            gradient = jax.block_until_ready(program(x))
            row["error"] = None if truth[key] is None else relative(gradient, truth[key])
            running[name] = program
    if not (case.adaptive or case.mapped):
        program = jax.jit(jax.grad(scan_loss(case, static))).lower(x).compile()
        row = {
            "case": str(case),
            **case._asdict(),
            "method": "scan",
            "bytes": temporary(program),
        }
        rows.append(row)
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, program in running.items():
            begin = time.perf_counter()
            jax.block_until_ready(program(x))
            times[name].append(time.perf_counter() - begin)
    for row in rows:
        if row["method"] in times:
            row["ms"] = 1e3 * statistics.median(times[row["method"]])
    if not (case.adaptive or case.mapped) and importlib.util.find_spec("torchdiffeq") is not None:
        rows.append(by_torch(case, rounds))
    return rows


def by_torch(case: Case, rounds: int) -> dict:
    import torch  # pyright: ignore[reportMissingImports]  (a peer, by hand)
    import torchdiffeq  # pyright: ignore[reportMissingImports]  (a peer, by hand)

    parameters, _, y0 = problem(case)
    first, second = parameters.layers
    device = torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")
    to_torch = lambda leaf: torch.tensor(np.asarray(leaf), requires_grad=True, device=device)
    tensors = [to_torch(leaf) for leaf in (first.weight, first.bias, second.weight, second.bias)]

    class Field(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.held = torch.nn.ParameterList([torch.nn.Parameter(tensor.detach()) for tensor in tensors])

        def forward(self, t, y):
            w, b, v, c = self.held
            return torch.tanh(y @ w.T + b) @ v.T + c

    field, span = Field(), torch.tensor([0.0, 1.0], device=device)

    def run():
        field.zero_grad()
        start = to_torch(y0)
        begin = time.perf_counter()
        options = {"step_size": 1.0 / case.steps}
        end = torchdiffeq.odeint_adjoint(field, start, span, method="midpoint", options=options)[-1]
        (end**2).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin, start.grad

    _, of_y0 = run()
    gradient = [leaf.grad.cpu().numpy() for leaf in field.held] + [of_y0.cpu().numpy()]
    truth = exact(case, dfx.Midpoint())
    assert truth is not None
    times = [run()[0] for _ in range(max(3, rounds // 3))]
    return {
        "case": str(case),
        **case._asdict(),
        "method": "torchdiffeq adjoint, midpoint",
        "ms": 1e3 * statistics.median(times),
        "error": relative(gradient, [*jtu.tree_leaves(truth[0]), truth[1]]),
    }


def show(rows: list[dict]) -> None:
    base = next(row["ms"] for row in rows if row["method"] == "reversible")
    print(f"\n{rows[0]['case']}")
    print(f"{'method':32s} {'ms':>9s} {'to ours':>8s} {'KiB':>10s} {'error':>9s} {'compile s':>9s}")
    for row in rows:
        ms = f"{row['ms']:9.2f} {row['ms'] / base:8.2f}" if "ms" in row else f"{'-':>9s} {'-':>8s}"
        memory = f"{row['bytes'] / 1024:10.1f}" if "bytes" in row else f"{'-':>10s}"
        error = f"{row['error']:9.1e}" if row.get("error") is not None else f"{'-':>9s}"
        print(f"{row['method']:32s} {ms} {memory} {error} {row.get('compile_s', '-')!s:>9s}")


def picture(rows: list[dict], folder: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    sizes = [
        row for row in rows if row["dim"] == 2 and row["batch"] == 16 and not row["mapped"] and not row["adaptive"]
    ]
    for name in ("scan", "direct", "recursive checkpoint", "backsolve", "reversible"):
        points = sorted((row["steps"], row["bytes"] / 1024) for row in sizes if row["method"] == name)
        left.loglog(*zip(*points, strict=True), "o-", label=name)
    left.set(
        xlabel="steps", ylabel="temporary memory of the gradient, KiB", title="dim 2, a batch of 16, reversible Heun"
    )
    left.legend(fontsize=8)
    names = [name for name in METHODS if name != "reversible"]
    cases = [case for case in dict.fromkeys(row["case"] for row in rows)]
    for i, name in enumerate(names[:3]):
        ratio = []
        for case in cases:
            ms = {row["method"]: row.get("ms", np.nan) for row in rows if row["case"] == case}
            ratio.append(ms[name] / ms["reversible"])
        right.barh(np.arange(len(cases)) + 0.25 * i, ratio, 0.25, label=name)
    right.axvline(1, color="black", linewidth=0.8)
    right.set_yticks(np.arange(len(cases)) + 0.25, cases, fontsize=7)
    right.invert_yaxis()
    right.set(xlabel="time over that of ReversibleAdjoint", title="gradient, reversible Heun")
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "ode_adjoints.png", dpi=150)


def drift() -> None:
    """Fields $W_2\\tanh(W_1 y)$: does the guard speak where the gradient is wrong, and only there?"""
    jax.config.update("jax_enable_x64", True)
    grid = [
        (s, scale, n, t)
        for s in range(3)
        for scale in (0.3, 1.0, 2.0, 3.0)
        for n in (64, 256, 1024)
        for t in (1.0, 6.0, 30.0)
    ]
    total: dict[str, list] = {"missed": [], "false": []}
    for dtype, tolerance in ((jnp.float64, 1e-6), (jnp.float32, 3e-4)):
        made = [jr.split(jr.key(s), 3) for s, *_ in grid]
        first = jnp.stack(
            [scale * jr.normal(k[0], (16, 3), dtype) / 3**0.5 for k, (_, scale, *_) in zip(made, grid, strict=True)]
        )
        second = jnp.stack(
            [scale * jr.normal(k[1], (3, 16), dtype) / 4 for k, (_, scale, *_) in zip(made, grid, strict=True)]
        )
        start = jnp.stack([jr.normal(k[2], (3,), dtype) for k in made])
        horizon = jnp.array([t for *_, t in grid], dtype)
        dt = horizon / jnp.array([n for _, _, n, _ in grid], dtype)
        for coupling in (0.4, 0.7, 0.9, 0.99, 0.999):

            def run(adjoint, dtype, coupling=coupling, x=(first, second, start), horizon=horizon, dt=dt):
                def loss(x, horizon, dt):
                    term = dfx.ODETerm(lambda t, y, x: x[1] @ jnp.tanh(x[0] @ y))
                    sol = dfx.diffeqsolve(
                        term, dn.Reversible(dfx.Heun(), coupling), jnp.zeros((), dtype), horizon, dt, x[2], x, adjoint=adjoint,
                        max_steps=1100, throw=False,
                    )  # fmt: skip
                    assert sol.ys is not None
                    return jnp.sum(jnp.sin(sol.ys[-1]) + sol.ys[-1] ** 2), sol.stats.get("round_trip", jnp.zeros(9))

                cast = lambda leaf: leaf.astype(dtype)
                gradient, trip = jax.jit(jax.vmap(jax.grad(loss, has_aux=True)))(
                    jtu.tree_map(cast, x), cast(horizon), cast(dt)
                )
                flat = np.concatenate(
                    [np.asarray(leaf, np.float64).reshape(len(grid), -1) for leaf in gradient], axis=1
                )
                return flat, np.max(np.asarray(trip, np.float64), axis=1)

            ours, trip = run(dn.ReversibleAdjoint(tolerance=1e300, on_drift="nan", report=True), dtype)
            same, _ = run(CHECKPOINT, dtype)
            truth = run(CHECKPOINT, jnp.float64)[0]
            size = np.linalg.norm(truth, axis=1)
            error = np.linalg.norm(ours - same, axis=1) / np.linalg.norm(same, axis=1)
            noise = np.linalg.norm(same - truth, axis=1) / size
            speaks = ~(trip <= tolerance)
            # What autodiff in the same precision gets wrong as well is not the walk back's doing.
            clear = (noise < 0.3 * error) | (error < tolerance / 10)
            bad, good = ~(error <= 10 * tolerance) & clear, (error < tolerance / 10) & clear
            total["missed"].append((np.sum(bad & ~speaks), np.sum(bad)))
            total["false"].append((np.sum(good & speaks), np.sum(good)))
            print(
                f"{np.dtype(dtype).name} coupling {coupling:5.3f}: wrong {np.sum(bad):3d}, missed {np.sum(bad & ~speaks)}; "
                f"right {np.sum(good):3d}, false alarms {np.sum(good & speaks)}",
                flush=True,
            )
    for name, counts in total.items():
        print(f"{name}: {sum(a for a, _ in counts)} of {sum(b for _, b in counts)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Gradients of ODE solves: time, memory and error by adjoint.")
    parser.add_argument("--quick", action="store_true", help="the small sizes only; nothing is saved")
    parser.add_argument("--drift", action="store_true", help="the guard of ReversibleAdjoint instead")
    parser.add_argument("--gpu", action="store_true", help="sizes for an accelerator; saved as ode_adjoints_gpu.jsonl")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args()
    if args.drift:
        return drift()
    about = {
        "date": datetime.date.today().isoformat(),
        **machine(),
        **versions("jax", "diffrax", "equinox", "torch", "torchdiffeq"),
    }
    print(about)
    rows = []
    for case in QUICK if args.quick else GPU if args.gpu else CASES:
        new = measure(case, rounds=5 if case.steps * case.batch > 100_000 else 15)
        show(new)
        rows += new
    if not args.quick:
        args.out.mkdir(parents=True, exist_ok=True)
        with open(args.out / f"ode_adjoints{'_gpu' if args.gpu else ''}.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in [about, *rows])
        if not args.gpu:
            picture(rows, args.out)


if __name__ == "__main__":
    main()
