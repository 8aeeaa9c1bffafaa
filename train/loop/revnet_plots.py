"""What a reversible network's gradient costs beside one that stores its activations, measured and drawn."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
import numpy as np


def compare(loss: Callable, models: list[Any], batch: Any, rounds: int = 7) -> dict[str, Any]:
    """Temporary memory and time of the gradient of `loss(model, batch)` for two models with the same parameters,
    one that reconstructs and one that stores its activations, and how far the two differ.

    `{"reconstruct": {"bytes", "ms"}, "store": {...}, "time ratio", "difference"}`; the difference is the norm of that of all parameter
    gradients over their norm.
    """
    row: dict[str, Any] = {}
    runs, gradients = {}, {}
    for name, model in zip(("reconstruct", "store"), models, strict=True):
        arrays, static = eqx.partition(model, eqx.is_inexact_array)
        gradient = jax.grad(lambda arrays, static=static: loss(eqx.combine(arrays, static), batch))
        compiled = jax.jit(gradient).lower(arrays).compile()
        memory = compiled.memory_analysis()
        row[name] = {"bytes": 0 if memory is None else memory.temp_size_in_bytes}
        gradients[name] = [np.asarray(leaf, np.float64).ravel() for leaf in jtu.tree_leaves(compiled(arrays))]
        runs[name] = lambda compiled=compiled, arrays=arrays: jax.block_until_ready(compiled(arrays))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    for name in runs:
        row[name]["ms"] = 1e3 * statistics.median(seconds[name])
    ours, stored = np.concatenate(gradients["reconstruct"]), np.concatenate(gradients["store"])
    row["difference"] = float(np.linalg.norm(ours - stored) / np.linalg.norm(stored))
    row["time ratio"] = row["reconstruct"]["ms"] / row["store"]["ms"]
    return row


def plot_costs(
    rows: list[dict[str, Any]], trained: dict[str, Any], depth: int, path: str | Path, *, title: str
) -> None:
    """Memory and exactness of the gradient against depth; `trained` is the run's own network, of `depth` blocks, after training."""
    depths = [row["depth"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name, label, colour in (
        ("reconstruct", "reconstructed", "#1f77b4"),
        ("store", "stored", "#d62728"),
    ):
        mib = [row[name]["bytes"] / 2**20 for row in rows]
        left.plot(depths, mib, "o-", color=colour)
        left.annotate(label, (depths[-1], mib[-1]), (6, 0), textcoords="offset points", color=colour, va="center")
    left.set(xscale="log", yscale="log", xlabel="blocks", ylabel="temporary memory of one gradient, MiB", title=title)
    right.plot(depths, [row["difference"] for row in rows], "o-", color="#1f77b4", label="at initialisation")
    right.plot(depth, trained["difference"], "k*", ms=11, label="after training")
    right.set(xscale="log", yscale="log", xlabel="blocks", title="Difference of the two gradients, relative")
    right.legend(frameon=False)
    for ax in (left, right):
        ax.set_xticks(depths, [str(depth) for depth in depths])
        ax.minorticks_off()
        ax.grid(True, color="0.92")
        ax.margins(x=0.22 if ax is left else 0.05)
    figure.savefig(path, dpi=110)
    plt.close(figure)
