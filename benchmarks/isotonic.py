"""Isotonic regression: time beside JAXopt and SciPy; and soft ranking beside the sort that it contains.

    uv run --group bench python -m benchmarks.isotonic               about 2 minutes on 2 CPU cores
    uv run --group bench --with numba python -m benchmarks.isotonic  JAXopt's fast route
    uv run --group bench python -m benchmarks.isotonic --quick       one size, fewer repetitions

64 sequences of 1000 and of 4000 entries, float32 and float64: noise, noise on a trend, and the same sorted and reversed; all sides in turns in
one process, and the table has the medians. JAXopt pools on the host, row after row, by numba where that is installed (it is in no group of this
project) and else in Python; the first line says which of the two ran. As it is, its numba route stops at JAX's arrays: here they are made
NumPy's for it. Its derivative builds n x n matrices, so it is timed at 1000 only. SciPy (C++) is called row by row, forward only, outside of
JAX: what a host callback could reach at best, and on a CPU 2 to 11 times as fast as ours, which is made of parallel passes.

Figures of merit, printed with `ok` or `FAIL` (and the exit status is 1 on a FAIL): at least 3 times as fast as JAXopt, forward and
forward+vjp, for noise; and an error below 4 units in the last place of the largest entry, against SciPy in float64.
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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import declarative as dn

from .shared import machine, versions

RESULTS = pathlib.Path(__file__).parent / "results"
BATCH = 64
BAR = 3.0
ULPS = 4.0


def jaxopt_route() -> tuple[Callable[[jax.Array], jax.Array] | None, str]:
    """JAXopt's function, and how it pools."""
    if importlib.util.find_spec("jaxopt") is None:
        return None, "absent"
    inside: Any = importlib.import_module("jaxopt._src.isotonic")
    numba = bool(inside.NUMBA_AVAILABLE)
    # The host callback hands over JAX's arrays. numba refuses them, and plain Python would wait for the device at every entry.
    pool = inside._isotonic_l2_pav_numba
    inside._isotonic_l2_pav_numba = lambda y: pool(np.array(y))
    return inside.isotonic_l2_pav, "numba, on NumPy's arrays" if numba else "Python (no numba here), on NumPy's arrays"


def sequences(n: int, dtype: str) -> dict[str, np.ndarray]:
    noise = np.random.default_rng(0).standard_normal((BATCH, n))
    ordered = np.sort(noise, axis=1)
    rows = {"noise": noise, "trend": noise + np.linspace(0, 3, n), "sorted": ordered, "reversed": ordered[:, ::-1]}
    return {name: np.ascontiguousarray(x.astype(dtype)) for name, x in rows.items()}


def compiled(function: Callable[[jax.Array], jax.Array], with_vjp: bool) -> Callable[[Any], Any]:
    batched = jax.vmap(function)
    if not with_vjp:
        return jax.jit(batched)

    @jax.jit
    def both(x):
        y, pullback = jax.vjp(batched, x)
        return y, pullback(x)[0]

    return both


def timed(sides: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median milliseconds of each, in turns, for about so many seconds and at least three times each."""
    for call in sides.values():
        call()
    spent: dict[str, list[float]] = {name: [] for name in sides}
    end = time.perf_counter() + seconds
    while len(next(iter(spent.values()))) < 3 or time.perf_counter() < end:
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            spent[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(times) for name, times in spent.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one size, fewer repetitions")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder for isotonic.jsonl")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # JAXopt's own
    warnings.filterwarnings("ignore", message="Numba could not be imported")
    from scipy.optimize import isotonic_regression as scipy_isotonic

    theirs, route = jaxopt_route()
    about = {
        "benchmark": "isotonic",
        "quick": arguments.quick,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions("jax", "jaxlib", "equinox", "numpy", "scipy", "jaxopt", "numba"),
        "machine": machine(),
        "jaxopt_route": route,
    }
    print(f"JAXopt pools by: {route}")
    found, verdicts = [], []
    budget = 0.5 if arguments.quick else 2.0
    for n in (1000,) if arguments.quick else (1000, 4000):
        for dtype in ("float32", "float64"):
            jax.config.update("jax_enable_x64", dtype == "float64")
            print(f"\n{BATCH} sequences of {n}, {dtype}; milliseconds")
            ours = {which: compiled(dn.isotonic_regression, which) for which in (False, True)}
            peer = {} if theirs is None else {which: compiled(theirs, which) for which in (False, True)}
            for name, data in sequences(n, dtype).items():
                x = jnp.asarray(data)
                call = lambda function, x=x: lambda: jax.block_until_ready(function(x))
                reference = np.stack([scipy_isotonic(row.astype(np.float64)).x for row in data])
                error = np.abs(np.asarray(ours[False](x), np.float64) - reference).max() / np.abs(data).max()
                row: dict[str, Any] = {"data": name, "batch": BATCH, "n": n, "dtype": dtype}
                row["ulps"] = float(error / np.finfo(dtype).eps)
                for which, title in ((False, "forward"), (True, "forward+vjp")):
                    if which and name != "noise":
                        continue
                    sides = {"ours": call(ours[which])}
                    if peer and not (which and n > 1000):
                        sides["jaxopt"] = call(peer[which])
                    if not which:
                        sides["scipy"] = lambda data=data: [scipy_isotonic(row) for row in data]
                    times = timed(sides, budget)
                    row |= {f"{side}_{title}_ms": value for side, value in times.items()}
                    print(
                        f"  {name:9}{title:12}" + "".join(f"  {side} {value:8.2f}" for side, value in times.items()),
                        flush=True,
                    )
                    if name == "noise" and "jaxopt" in times:
                        verdicts.append(
                            (f"{n} {dtype}, {title}: times as fast as JAXopt", times["jaxopt"] / times["ours"], BAR)
                        )
                found.append(row)
            verdicts.append(
                (f"{n} {dtype}: error in units in the last place", -max(r["ulps"] for r in found[-4:]), -ULPS)
            )
            x = jnp.asarray(sequences(n, dtype)["noise"])
            sides = {}
            for title, function in (("jnp.argsort", jnp.argsort), ("soft rank", dn.soft_rank)):
                sides[title] = lambda f=compiled(function, False), x=x: jax.block_until_ready(f(x))
            sides["soft rank + vjp"] = lambda f=compiled(dn.soft_rank, True), x=x: jax.block_until_ready(f(x))
            times = timed(sides, budget)
            found.append(
                {"data": "noise", "batch": BATCH, "n": n, "dtype": dtype} | {f"{k}_ms": v for k, v in times.items()}
            )
            print("  " + "  ".join(f"{side} {value:.2f}" for side, value in times.items()), flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with open(arguments.out / "isotonic.jsonl", "a") as file:
        file.writelines(json.dumps({**about, **row}) + "\n" for row in found)

    print()
    for text, value, bar in verdicts:
        bound = f"at least {bar:g}" if bar > 0 else f"at most {-bar:g}"
        print("ok  " if value >= bar else "FAIL", f"{text}: {abs(value):.2f}, {bound}")
    return 0 if all(value >= bar for _, value, bar in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
