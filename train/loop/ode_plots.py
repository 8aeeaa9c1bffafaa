"""Figures of the ODE scripts: what a gradient costs by adjoint, densities of a flow, series and their predictions."""

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
from jaxtyping import Float

COLOURS = {
    "reversible": "#1f77b4",
    "coupled": "#17a2a2",
    "checkpointed": "#e8890c",
    "stored": "#d62728",
    "direct": "#8c4fb5",
    "backsolve": "#7f7f7f",
}


def gradient_costs(
    loss: Callable, models: dict[str, Any], batch: Any, reference: str, rounds: int = 3
) -> dict[str, dict[str, float]]:
    """Temporary memory and time of the gradient of `loss(model, batch)` for models with the same parameters.

    `{name: {"bytes", "ms", "difference"}}`; the difference is the norm of that to the gradient of `reference`, over the latter's norm.
    """
    costs: dict[str, dict[str, float]] = {}
    runs, gradients = {}, {}
    for name, model in models.items():
        arrays, static = eqx.partition(model, eqx.is_inexact_array)
        gradient = jax.grad(lambda arrays, static=static: loss(eqx.combine(arrays, static), batch))
        compiled = jax.jit(gradient).lower(arrays).compile()
        memory = compiled.memory_analysis()
        costs[name] = {"bytes": 0 if memory is None else memory.temp_size_in_bytes}
        gradients[name] = np.concatenate(
            [np.asarray(leaf, np.float64).ravel() for leaf in jtu.tree_leaves(compiled(arrays))]
        )
        runs[name] = lambda compiled=compiled, arrays=arrays: jax.block_until_ready(compiled(arrays))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    for name, cost in costs.items():
        cost["ms"] = 1e3 * statistics.median(seconds[name])
        apart = np.linalg.norm(gradients[name] - gradients[reference])
        cost["difference"] = float(apart / np.linalg.norm(gradients[reference]))
    return costs


def _name_lines(ax, x: float, ends: dict[str, float], apart: float = 1.42) -> None:
    """Names at the right ends of lines on a logarithmic axis, at least a factor `apart` from each other."""
    names = sorted(ends, key=lambda name: ends[name])
    places = np.log([ends[name] for name in names])
    for _ in range(100):  # neighbours that are too close give way, each by half
        overlap = np.maximum(np.log(apart) - np.diff(places), 0) / 2
        places[1:] += overlap
        places[:-1] -= overlap
    for name, place in zip(names, np.exp(places), strict=True):
        ax.annotate(name, (x, place), (7, 0), textcoords="offset points", color=COLOURS[name], va="center")


def plot_costs(rows: list[dict[str, Any]], path: str | Path, *, title: str) -> None:
    """Memory and time of one gradient against the number of steps, by adjoint."""
    steps = [row["steps"] for row in rows]
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4), layout="constrained")
    quantities = (("Temporary memory of one gradient, MiB", "bytes", 2**20), ("Time of one gradient, ms", "ms", 1))
    for ax, (label, key, unit) in zip(axes, quantities, strict=True):
        ends = {}
        for name in rows[0].keys() - {"steps"}:
            values = [row[name][key] / unit for row in rows]
            ax.plot(steps, values, "o-", color=COLOURS[name], ms=4)
            ends[name] = values[-1]
        ax.set(xscale="log", yscale="log", xlabel="steps of the solver", title=label)
        limits = ax.get_ylim()
        _name_lines(ax, steps[-1], ends, (limits[1] / limits[0]) ** 0.065)
        ax.set_xlim(steps[0] * 0.85, steps[-1] * (steps[-1] / steps[0]) ** 0.36)
        ax.set_xticks(steps, [str(n) for n in steps])
        ax.xaxis.minorticks_off()
        ax.grid(True, color="0.92")
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def grid(limit: float, side: int) -> Float[np.ndarray, "side*side 2"]:
    """Points of a square around 0, row by row from below."""
    line = np.linspace(-limit, limit, side, dtype=np.float32)
    return np.stack([a.ravel() for a in np.meshgrid(line, line)], 1)


def plot_plane(data, densities: dict[str, np.ndarray], samples, limit: float, path: str | Path) -> None:
    """Points of the plane; densities on `grid`, by name, on one scale of colours; samples of the flow."""
    figure, axes = plt.subplots(1, 2 + len(densities), figsize=(3.3 * (2 + len(densities)), 3.9), layout="constrained")
    for ax, points, title in ((axes[0], data, "Held-out data"), (axes[-1], samples, "Samples of the flow")):
        ax.scatter(*points.T, s=2, color="#1f3b73", alpha=0.5, lw=0)
        ax.set_title(title)
    brightest = max(density.max() for density in densities.values())
    for ax, (title, density) in zip(axes[1:-1], densities.items(), strict=True):
        side = round(density.size**0.5)
        image = density.reshape(side, side)
        ax.imshow(image, origin="lower", extent=(-limit, limit, -limit, limit), cmap="magma_r", vmin=0, vmax=brightest)
        ax.set_title(title)
    for ax in axes:
        ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_digit_samples(samples: dict[str, np.ndarray], path: str | Path) -> None:
    """Rows of images (n, 8, 8), by name."""
    count = len(next(iter(samples.values())))
    figure, axes = plt.subplots(
        len(samples), count, figsize=(0.75 * count + 1.6, 0.78 * len(samples)), layout="constrained"
    )
    for line, (name, images) in zip(axes, samples.items(), strict=True):
        for ax, image in zip(line, images, strict=True):
            ax.imshow(image, cmap="gray_r", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set(color="0.8")
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=6)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_series(times, values, mask, smooth, curves, end: float, path: str | Path, *, title: str) -> None:
    """The first channel of some series: what the model saw, what it did not, and its prediction at the times `smooth`."""
    count = len(times)
    columns = min(3, count)
    lines = -(-count // columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(4 * columns, 2.4 * lines),
        layout="constrained",
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for i, ax in enumerate(axes.flat):
        if i >= count:
            ax.set_visible(False)
            continue
        seen, y = mask[i, :, 0] > 0, values[i, :, 0]
        ax.axvspan(end, 1, color="0.95", lw=0)
        ax.axhline(0, color="0.88", lw=0.8, zorder=0)
        ax.plot(smooth, curves[i, :, 0], color="#1f77b4", lw=1.6, label="prediction")
        ax.plot(times[i][~seen], y[~seen], "o", mfc="white", mec="0.45", ms=4, label="hidden")
        ax.plot(times[i][seen], y[seen], "o", color="black", ms=4, label="seen")
        ax.set_xlim(0, 1)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[-1]:
        ax.set_xlabel("time (shaded: nothing seen)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
