"""Softmax, sparsemax and entmax as attention maps: time and error beside `jax.nn.softmax`, jaxopt, optax and PyTorch `entmax`.

    python -m benchmarks.attention_maps            about 3 minutes on 2 CPU cores
    python -m benchmarks.attention_maps --quick    under a minute, fewer repetitions

Rows of standard normal scores in float32, at three shapes; forward, and forward with the product of a cotangent and the
Jacobian. All methods take turns in every round, and the table has the medians and their ratio to `jax.nn.softmax` in the same
run: compare the ratios, the milliseconds are those of one machine on one day.

"Error" is the largest absolute error of the probabilities (forward) and of the gradient (forward+vjp) against NumPy in
float64: bisection on the scalar equation, and the closed form of the derivative. Note `entmax` with `k=100`: it looks at the
100 largest scores first, and starts again where the support may be larger.

Two figures of merit, forward+vjp, printed with `ok` or `FAIL` (and the exit status is 1 on a FAIL): softmax at most 1.3 times
`jax.nn.softmax`, and sparsemax and entmax15 at most 8 times at the two larger shapes, where sorting costs 35 to 100 times.

Peers that are not installed are shown as absent. PyTorch runs on the CPU whatever JAX runs on.
"""

import argparse
import datetime
import functools as ft
import importlib
import importlib.metadata
import importlib.util
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import declarative as dn

from .shared import machine, versions

RESULTS = pathlib.Path(__file__).parent / "results"
SHAPES = ((4096, 64), (1024, 1024), (64, 32768))
PASSES = ("forward", "forward+vjp")
BASE = "jax.nn.softmax"
EXPONENTS = {"softmax": 1.0, "sparsemax": 2.0, "entmax15": 1.5, "entmax, alpha an array": 1.5}
BARS = {"softmax": (1.3, SHAPES), "sparsemax": (8.0, SHAPES[1:]), "entmax15": (8.0, SHAPES[1:])}
SLOW_SECONDS = 2.0  # a method that has used this much is left out of further rounds, after three


class Method(NamedTuple):
    map: str
    name: str
    prepare: Callable[[np.ndarray, np.ndarray], dict[str, Callable[[], Any]]] | None  # None: the peer is not installed


# ----------------------------------------------------------------------------------------------------------------------
# Methods
# ----------------------------------------------------------------------------------------------------------------------


def in_jax(batched: Callable[[jax.Array], jax.Array]):
    """Both passes of a function of a batch of rows, compiled."""

    def prepare(scores: np.ndarray, cotangent: np.ndarray) -> dict[str, Callable[[], Any]]:
        z, g = jnp.asarray(scores), jnp.asarray(cotangent)

        def both(z, g):
            p, pullback = jax.vjp(batched, z)
            return p, pullback(g)[0]

        forward, both = jax.jit(batched), jax.jit(both)
        return {
            "forward": lambda: jax.block_until_ready((forward(z),)),
            "forward+vjp": lambda: jax.block_until_ready(both(z, g)),
        }

    return prepare


def in_torch(batched: Callable):
    def prepare(scores: np.ndarray, cotangent: np.ndarray) -> dict[str, Callable[[], Any]]:
        torch = importlib.import_module("torch")
        z, g = torch.tensor(scores), torch.tensor(cotangent)
        leaf = torch.tensor(scores, requires_grad=True)

        def forward():
            with torch.no_grad():
                return (batched(z),)

        def both():
            p = batched(leaf)
            return p.detach(), torch.autograd.grad(p, leaf, g)[0]

        return {"forward": forward, "forward+vjp": both}

    return prepare


def methods() -> list[Method]:
    """Every way to compute each map; `jax.nn.softmax`, to which all are compared, is the first."""

    def node(node):
        return in_jax(jax.vmap(node))

    def simplex(package: str, module: str, name: str):
        if importlib.util.find_spec(package) is None:
            return None
        return in_jax(jax.vmap(getattr(importlib.import_module(module), name)))

    def torch(name: str, **options):
        if importlib.util.find_spec("torch") is None or importlib.util.find_spec("entmax") is None:
            return None
        return in_torch(ft.partial(getattr(importlib.import_module("entmax"), name), dim=-1, **options))

    array = "entmax, alpha an array"
    return [
        Method("softmax", BASE, in_jax(jax.nn.softmax)),
        Method("softmax", "declarative.Softmax", node(dn.Softmax(throw=False))),
        Method("sparsemax", "declarative.Sparsemax", node(dn.Sparsemax(throw=False))),
        Method("sparsemax", "jaxopt", simplex("jaxopt", "jaxopt.projection", "projection_simplex")),
        Method("sparsemax", "optax", simplex("optax", "optax.projections", "projection_simplex")),
        Method("sparsemax", "entmax, sort", torch("sparsemax")),
        Method("sparsemax", "entmax, k = 100", torch("sparsemax", k=100)),
        Method("sparsemax", "entmax, bisection", torch("sparsemax_bisect")),
        Method("entmax15", "declarative.Entmax(1.5)", node(dn.Entmax(1.5, throw=False))),
        Method("entmax15", "entmax, sort", torch("entmax15")),
        Method("entmax15", "entmax, k = 100", torch("entmax15", k=100)),
        Method(array, "declarative.Entmax(alpha)", node(dn.Entmax(jnp.asarray(1.5, jnp.float32), throw=False))),
        Method(array, "entmax, bisection", torch("entmax_bisect", alpha=1.5)),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Truth, and measurement
# ----------------------------------------------------------------------------------------------------------------------


def truth(alpha: float, scores: np.ndarray, cotangent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """p = exp_alpha(z - theta) by bisection on sum(p) = 1, and the cotangent of z, s (g - sum(s g) / sum(s)), s = p^(2 - alpha)."""
    x = scores.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)

    def exp_alpha(delta):
        return np.exp(x - delta) if alpha == 1 else np.maximum(1 + (alpha - 1) * (x - delta), 0) ** (1 / (alpha - 1))

    if alpha == 1:
        delta = np.log(np.sum(np.exp(x), axis=1, keepdims=True))
    else:
        low = np.zeros((len(x), 1))
        high = np.full_like(low, 1 / (alpha - 1))
        for _ in range(54):
            delta = (low + high) / 2
            heavy = np.sum(exp_alpha(delta), axis=1, keepdims=True) >= 1
            low, high = np.where(heavy, delta, low), np.where(heavy, high, delta)
        delta = low
    p = exp_alpha(delta)
    s = np.where(p > 0, p ** (2 - alpha), 0)
    mean = np.sum(s * cotangent, axis=1, keepdims=True) / np.sum(s, axis=1, keepdims=True)
    return p, s * (cotangent - mean)


def measure(shape: tuple[int, int], rounds: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    scores = rng.standard_normal(shape).astype(np.float32)
    cotangent = rng.standard_normal(shape).astype(np.float32)
    truths = {alpha: truth(alpha, scores, cotangent) for alpha in sorted(set(EXPONENTS.values()))}

    rows, runs = [], []
    for method in methods():
        calls = {} if method.prepare is None else method.prepare(scores, cotangent)
        for index, which in enumerate(PASSES):
            row = {"map": method.map, "method": method.name, "rows": shape[0], "columns": shape[1], "pass": which}
            rows.append(row)
            if calls:
                result = np.asarray(calls[which]()[index], np.float64)  # compiles
                row["error"] = float(np.max(np.abs(result - truths[EXPONENTS[method.map]][index])))
                calls[which]()
                runs.append((row, calls[which], []))
    for _ in range(rounds):
        runs[0][1]()  # not timed: the last peer's threads may still be spinning
        for _, call, seconds in runs:
            if len(seconds) < 3 or sum(seconds) < SLOW_SECONDS:
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
    for row, _, seconds in runs:
        row |= {"ms": 1e3 * statistics.median(seconds), "repetitions": len(seconds)}
    base = {row["pass"]: row["ms"] for row in rows if row["method"] == BASE}
    for row, _, _ in runs:
        row["ratio"] = row["ms"] / base[row["pass"]]
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Report
# ----------------------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    def cell(row):
        if "ms" not in row:
            return f"{'absent':^30}"
        return f"{row['ms']:9.2f} ms {row['ratio']:6.1f}x {row['error']:10.1e}"

    lines = [f"{'map':24}{'method':28}" + "".join(f"{which + ': median, ratio, error':^30}  " for which in PASSES)]
    for forward, both in zip(rows[::2], rows[1::2], strict=True):
        lines.append(f"{forward['map']:24}{forward['method']:28}{cell(forward)}  {cell(both)}")
    return "\n".join(lines)


def merits(rows: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    found = []
    for row in rows:
        bar, shapes = BARS.get(row["map"], (None, ()))
        if (
            row["method"].startswith("declarative")
            and row["pass"] == PASSES[1]
            and (row["rows"], row["columns"]) in shapes
        ):
            text = f"{row['map']} at {row['rows']} x {row['columns']}: {row['ratio']:.2f}x {BASE}, at most {bar}"
            found.append((text, row["ratio"] <= bar))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder for attention_maps.jsonl")
    arguments = parser.parse_args()

    about = {
        "benchmark": "attention_maps",
        "quick": arguments.quick,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions("jax", "jaxlib", "equinox", "numpy", "jaxopt", "optax", "torch", "entmax"),
        "machine": machine(),
    }
    rows = []
    for shape in SHAPES:
        found = measure(shape, rounds=7 if arguments.quick else 41)
        print(f"\n{shape[0]} rows of {shape[1]} scores, float32\n{table(found)}", flush=True)
        rows += found
    arguments.out.mkdir(parents=True, exist_ok=True)
    with open(arguments.out / "attention_maps.jsonl", "a") as file:
        file.writelines(json.dumps({**about, **row}) + "\n" for row in rows)

    print()
    judged = merits(rows)
    for text, good in judged:
        print("ok  " if good else "FAIL", text)
    return 0 if all(good for _, good in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
