"""Projections onto simple sets: time beside JAXopt, forward, and forward with the product of a cotangent and the Jacobian.

    uv run --group bench python -m benchmarks.projections            about 10 minutes on 2 CPU cores
    uv run --group bench python -m benchmarks.projections --quick    one size, fewer repetitions

64 vectors of 1000 and of 10000 standard normal entries, float32 and float64; both sides jitted and vmapped, in turns in one process, and the
table has the medians and how many times faster ours is. JAXopt runs as it is by default: its bisection (box sections, and what can be
written as one) stops at 1e-5, its L-BFGS (matrices with given sums of rows and columns, 16 of 32 x 32 or 64 x 32) at 1e-3, ours at the last
digit. "Error" is the largest entry of a violation that needs no reference: of the equation of the set, relative to its right side;
JAXopt's beside ours.

Figures of merit, printed with `ok` or `FAIL` (and the exit status is 1 on a FAIL): at least 3 times as fast where JAXopt sorts,
bisects or minimises, at least 0.9 times where both are one line. Most of the bisected cases miss theirs at 1000 entries: JAXopt's 1e-5 takes
about 20 plain passes, as long as 8 to 10 reads that check, sum or clip. So do the Kullback-Leibler projections of these gentle matrices, for
which its L-BFGS stops after a few evaluations, with sums that are off by 5e-4 to 1e-2.

A case is a row of `cases`: another family adds its own.
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

import declarative as dn

from .shared import machine, versions

RESULTS = pathlib.Path(__file__).parent / "results"
PASSES = ("forward", "forward+vjp")
BATCH = 64
SORTED, PLAIN, BISECTED, ITERATED = 3.0, 0.9, 3.0, 3.0  # bars
PLANS = ((32, 32), (64, 32))  # shapes of matrices, 16 of them at a time


class Case(NamedTuple):
    name: str
    ours: Callable[[jax.Array], jax.Array]
    theirs: Callable[[jax.Array], jax.Array] | None  # None: the peer is not installed, or has no such thing
    bar: float | None
    violation: Callable[[np.ndarray], np.ndarray] = lambda y: np.zeros(1)  # of a batch of points


def plans(n: int, m: int, dtype) -> list[Case]:
    """Onto matrices with given sums of rows and columns; JAXopt's are L-BFGS on the dual, to its default of 1e-3."""
    jaxopt = importlib.import_module("jaxopt.projection") if importlib.util.find_spec("jaxopt") else None
    rng = np.random.default_rng(1)
    a, b = (jnp.asarray(rng.uniform(0.5, 1.5, size), dtype) for size in (n, m))
    masses = (a / jnp.sum(a), b / jnp.sum(b))

    def violation(a, b):
        wanted = [np.asarray(sums, np.float64) for sums in (a, b)]
        return lambda y: np.concatenate([np.max(np.abs(y.sum(2 - k) - w), 1) / np.max(w) for k, w in enumerate(wanted)])

    def case(name, project, violation):
        theirs = None if jaxopt is None else lambda x: project(jaxopt, x)
        return Case(name, lambda x: project(dn, x), theirs, ITERATED, violation)

    doubly = violation(np.ones(n), np.ones(m))

    def closer(project, violation):
        """JAXopt told to stop 100 times later (in float64 100 000 times), to see what the digits cost it."""
        tol = 1e-5 if dtype == "float32" else 1e-8

        def theirs(x):
            solver = lambda fun: importlib.import_module("jaxopt").LBFGS(fun, maxiter=500, tol=tol, linesearch="zoom")
            return project(jaxopt, x, make_solver=solver)

        return Case(
            "kl transport, closer", lambda x: project(dn, x), None if jaxopt is None else theirs, None, violation
        )

    found = [
        case("transport", lambda lib, x: lib.projection_transport(x, masses), violation(*masses)),
        case("kl transport", lambda lib, x: lib.kl_projection_transport(x, masses), violation(*masses)),
        closer(lambda lib, x, **kw: lib.kl_projection_transport(x, masses, **kw), violation(*masses)),
    ]
    if n == m:
        found += [
            case("birkhoff", lambda lib, x: lib.projection_birkhoff(x), doubly),
            case("kl birkhoff", lambda lib, x: lib.kl_projection_birkhoff(x), doubly),
        ]
    return found


def cases(n: int, dtype) -> list[Case]:
    jaxopt = importlib.import_module("jaxopt.projection") if importlib.util.find_spec("jaxopt") else None
    rng = np.random.default_rng(1)
    a = jnp.asarray(rng.uniform(0.1, 2, n), dtype)
    lower, upper = jnp.asarray(-rng.uniform(0, 1, n), dtype), jnp.asarray(rng.uniform(0, 1, n), dtype)
    zeros, ones, far = jnp.zeros(n, dtype), jnp.ones(n, dtype), jnp.full(n, 10.0, dtype)
    total, count, one = (jnp.asarray(value, dtype) for value in (n / 20, n / 50, 1.0))

    def case(name, project, bar, violation=None, ours=None, theirs=None):
        """`project(module, x)`, the same call of either library, or one for each."""
        mine = ours or (lambda x: project(dn, x))
        other = None if jaxopt is None else theirs or (lambda x: project(jaxopt, x))
        return Case(name, mine, other, bar, *(() if violation is None else (violation,)))

    sums = lambda weights, value: lambda y: np.abs(np.abs(y) @ np.asarray(weights, np.float64) / float(value) - 1)
    signed = lambda weights, value: lambda y: np.abs(y @ np.asarray(weights, np.float64) / float(value) - 1)
    magnitude = lambda x, w, c: jnp.sign(x) * jaxopt.projection_box_section(jnp.abs(x), (zeros, far, w, c))  # pyright: ignore
    return [
        case("simplex", lambda lib, x: lib.projection_simplex(x), SORTED, sums(ones, 1)),
        case("l1 ball", lambda lib, x: lib.projection_l1_ball(x), SORTED, sums(ones, 1)),
        case("l1 ball, wide", lambda lib, x: lib.projection_l1_ball(x, n / 20), SORTED, sums(ones, total)),
        case("l1 sphere", lambda lib, x: lib.projection_l1_sphere(x, 2.0), SORTED, sums(ones, 2)),
        case(
            "capped simplex",
            None,
            BISECTED,
            sums(ones, count),
            lambda x: dn.projection_capped_simplex(x, count),
            lambda x: jaxopt.projection_box_section(x, (zeros, ones, ones, count)),  # pyright: ignore
        ),
        case(
            "capped simplex, close",
            None,
            BISECTED,
            sums(ones, 1),
            lambda x: dn.projection_capped_simplex(x, one, 5 / n),
            lambda x: jaxopt.projection_box_section(x, (zeros, jnp.full(n, 5 / n, dtype), ones, one)),  # pyright: ignore
        ),
        case(
            "box section",
            lambda lib, x: lib.projection_box_section(x, (lower, upper, a, total)),
            BISECTED,
            signed(a, total),
        ),
        case(
            "weighted l1 ball",
            None,
            BISECTED,
            sums(a, total),
            lambda x: dn.projection_weighted_l1_ball(x, a, total),
            lambda x: magnitude(x, a, total),
        ),
        case("l2 ball", lambda lib, x: lib.projection_l2_ball(x), PLAIN),
        case("l2 sphere", lambda lib, x: lib.projection_l2_sphere(x), PLAIN),
        case("linf ball", lambda lib, x: lib.projection_linf_ball(x), PLAIN),
        case("box", lambda lib, x: lib.projection_box(x, (lower, upper)), PLAIN),
        case("non-negative", lambda lib, x: lib.projection_non_negative(x), PLAIN),
        case("hyperplane", lambda lib, x: lib.projection_hyperplane(x, (a, one)), PLAIN),
        case("half-space", lambda lib, x: lib.projection_halfspace(x, (a, one)), PLAIN),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Measurement
# ----------------------------------------------------------------------------------------------------------------------


def compiled(project: Callable[[jax.Array], jax.Array], which: str):
    batched = jax.vmap(project)
    if which == "forward":
        return jax.jit(lambda x, g: (batched(x),))

    def both(x, g):
        y, pullback = jax.vjp(batched, x)
        return y, pullback(g)[0]

    return jax.jit(both)


def measure(case: Case, x: jax.Array, g: jax.Array, which: str, rounds: int) -> dict[str, Any]:
    sides = {"ours": case.ours} | ({} if case.theirs is None else {"jaxopt": case.theirs})
    row: dict[str, Any] = {"bar": case.bar, "pass": which}
    calls = {}
    for side, project in sides.items():
        function = compiled(project, which)
        calls[side] = lambda function=function: jax.block_until_ready(function(x, g))
        y = np.asarray(calls[side]()[0], np.float64)
        row[f"{side}_error"] = float(np.max(case.violation(y)))
    seconds: dict[str, list[float]] = {side: [] for side in calls}
    for _ in range(rounds):
        for side, call in calls.items():
            if sum(seconds[side]) > 5 and len(seconds[side]) >= 3:
                continue
            start = time.perf_counter()
            call()
            seconds[side].append(time.perf_counter() - start)
    row |= {f"{side}_ms": 1e3 * statistics.median(times) for side, times in seconds.items()}
    if "jaxopt" in seconds:
        row["speedup"] = statistics.median(b / a for a, b in zip(seconds["ours"], seconds["jaxopt"], strict=False))
    return row


def line(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        peer = f"{row['jaxopt_ms']:8.2f} {row['speedup']:6.1f}x" if "speedup" in row else f"{'absent':>16}"
        cells.append(f"{row['ours_ms']:8.2f} {peer}")
    errors = f"{rows[0]['ours_error']:8.0e} {rows[0].get('jaxopt_error', float('nan')):8.0e}"
    return f"{rows[0]['set']:24}" + "  |".join(cells) + "  |" + errors


def write(out: pathlib.Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Case by case: what is measured is kept, whatever becomes of the rest."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "projections.jsonl", "a") as file:
        file.writelines(json.dumps({**about, **row}) + "\n" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one size, fewer repetitions")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder for projections.jsonl")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # JAXopt's own

    about = {
        "benchmark": "projections",
        "quick": arguments.quick,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions("jax", "jaxlib", "equinox", "numpy", "jaxopt"),
        "machine": machine(),
    }
    found = []
    for n in (1000,) if arguments.quick else (1000, 10000):
        for dtype in ("float32", "float64"):
            # JAXopt's bisection makes float64 of float32 data where float64 is enabled.
            jax.config.update("jax_enable_x64", dtype == "float64")
            rng = np.random.default_rng(0)
            x, g = (jnp.asarray(rng.standard_normal((BATCH, n)), dtype) for _ in range(2))
            print(
                f"\n{BATCH} vectors of {n}, {dtype}: ms of ours, of JAXopt, speedup, forward | forward+vjp | errors, ours and JAXopt's"
            )
            for case in cases(n, dtype):
                rows = []
                for which in PASSES:
                    about_row = {"set": case.name, "batch": BATCH, "n": n, "dtype": dtype}
                    rows.append(about_row | measure(case, x, g, which, 9 if arguments.quick else 41))
                print(line(rows), flush=True)
                found += rows
                write(arguments.out, about, rows)
    for n, m in PLANS[:1] if arguments.quick else PLANS:
        for dtype in ("float32", "float64"):
            jax.config.update("jax_enable_x64", dtype == "float64")
            rng = np.random.default_rng(0)
            x, g = (jnp.asarray(rng.standard_normal((BATCH // 4, n, m)), dtype) for _ in range(2))
            print(f"\n{BATCH // 4} matrices of {n} x {m}, {dtype}: as above")
            for case in plans(n, m, dtype):
                rows = []
                for which in PASSES:
                    about_row = {"set": case.name, "batch": BATCH // 4, "n": n * m, "dtype": dtype}
                    rows.append(about_row | measure(case, x, g, which, 5))
                print(line(rows), flush=True)
                found += rows
                write(arguments.out, about, rows)
    print()
    judged = [row for row in found if row["bar"] is not None and "speedup" in row]
    for row in judged:
        text = f"{row['set']}, {row['n']} {row['dtype']}, {row['pass']}: {row['speedup']:.2f}x JAXopt, at least {row['bar']}"
        print("ok  " if row["speedup"] >= row["bar"] else "FAIL", text)
    return 0 if all(row["speedup"] >= row["bar"] for row in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
