"""Figures of a denoising run: some signals, the learnt operator, and the error against one fixed weight."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from matplotlib.colors import SymLogNorm

FIXED, LEARNT, TRUE = "#e8590c", "#4269d0", "#333333"


def plot_signals(
    noisy: Float[np.ndarray, "k n"],
    clean: Float[np.ndarray, "k n"],
    outputs: dict[str, Float[np.ndarray, "k n"]],
    weights: Float[np.ndarray, "k m"] | None,
    path: str | Path,
    *,
    fixed_weight: float,
) -> None:
    """One column a signal: the signal with each of `outputs`, and below it the weights that were predicted for it."""
    rows = 1 if weights is None else 2
    figure, axes = plt.subplots(
        rows,
        len(noisy),
        figsize=(4.4 * len(noisy), 3.4 if rows == 1 else 4.8),
        height_ratios=[1] if rows == 1 else [2.6, 1],
        sharex=True,
        sharey="row",
        layout="constrained",
        squeeze=False,
    )
    position = np.arange(noisy.shape[1])
    colours = [LEARNT] if len(outputs) == 1 else [FIXED, LEARNT]
    for j, ax in enumerate(axes[0]):
        ax.plot(position, noisy[j], ".", color="0.72", ms=4, label="with noise")
        ax.step(position, clean[j], where="mid", color=TRUE, lw=1.0, ls=(0, (4, 2)), label="true", zorder=4)
        errors = []
        for (name, output), colour in zip(outputs.items(), colours, strict=True):
            ax.step(position, output[j], where="mid", color=colour, lw=1.7, label=name)
            errors.append(f"{name} {np.mean((output[j] - clean[j]) ** 2):.1f}")
        ax.set_title(f"squared error: {', '.join(errors)}", fontsize=9)
    axes[0, 0].legend(frameon=False, fontsize=8)
    if weights is not None:
        for j, ax in enumerate(axes[1]):
            ax.axhline(fixed_weight, color=FIXED, lw=1.2)
            ax.step(position[1:] - 0.5, weights[j], where="mid", color=LEARNT, lw=1.2)
            ax.set(yscale="log")
        axes[1, 0].set_ylabel("weight")
    for ax in axes[-1]:
        ax.set(xlabel="position", xlim=(-1, noisy.shape[1]))
    for ax in axes.flat:
        ax.grid(alpha=0.25, lw=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_operator(initial: Float[np.ndarray, "m n"], learnt: Float[np.ndarray, "m n"], path: str | Path) -> None:
    """D before and after training, on a scale that shows small entries; and how much each row has moved, by diagonal."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained", width_ratios=[1, 1, 1.1])
    image = None
    for ax, matrix, title in (
        (axes[0], initial, "D before training: first differences"),
        (axes[1], learnt, "D learnt"),
    ):
        image = ax.imshow(matrix, cmap="RdBu_r", norm=SymLogNorm(3e-3, vmin=-1, vmax=1), interpolation="nearest")
        ax.set(title=title, xlabel="entry of the signal", ylabel="row")
    assert image is not None
    figure.colorbar(image, ax=axes[:2], shrink=0.8, label="entry of D (logarithmic beyond ±0.003)")
    offsets = np.arange(-12, 14)
    moved = learnt - initial
    diagonals = [np.diagonal(moved, k) for k in offsets]
    ax = axes[2]
    ax.axhline(0, color="0.6", lw=0.8)
    mean = np.array([d.mean() for d in diagonals])
    spread = np.array([d.std() for d in diagonals])
    ax.bar(offsets, mean, color=LEARNT, width=0.7)
    ax.errorbar(offsets, mean, spread, fmt="none", ecolor="0.35", elinewidth=0.8, capsize=2)
    ax.set(
        title="Mean change along each diagonal of D, and its spread",
        xlabel="column minus row (first differences: 0 and 1)",
        ylabel="learnt minus initial",
    )
    ax.grid(alpha=0.25, lw=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_curve(
    grid: Float[np.ndarray, " g"], curve: Float[np.ndarray, " g"], levels: dict[str, float], path: str | Path
) -> None:
    """The test error of total variation against its one weight, with the levels of the models."""
    figure, ax = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
    ax.plot(grid, curve, "o-", color=FIXED, ms=4, lw=1.5, label="total variation, one fixed weight")
    best = int(np.argmin(curve))
    ax.annotate(
        f"{curve[best]:.2f} at {grid[best]:g}",
        (grid[best], curve[best]),
        (0, 10),
        textcoords="offset points",
        ha="center",
    )
    for name, level in levels.items():
        ax.axhline(level, color=LEARNT, lw=1.5, ls="--")
        ax.annotate(
            f"{name}: {level:.2f} ({level / curve[best] - 1:+.0%})",
            (grid[-1], level),
            (0, 5),
            textcoords="offset points",
            ha="right",
            color=LEARNT,
        )
    low, high = min(curve.min(), *levels.values()), curve.max()
    ax.set(xlabel="weight", ylabel="mean squared error on the test set", ylim=(low - 0.12 * (high - low), None))
    ax.legend(frameon=False)
    ax.grid(alpha=0.25, lw=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
