"""Figures of a finished run."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float, Int
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm

from .log import read_metrics

TRAIN, TEST, OTHER = "#4269d0", "#e8590c", "#3a9d5d"


def _series(rows: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return np.array([p[0] for p in points]), np.array([p[1] for p in points])


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Running mean over the last `width` values, fewer at the start."""
    total = np.cumsum(np.insert(values, 0, 0.0))
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - width, 0)
    return (total[last] - total[first]) / (last - first)


def plot_curves(metrics: str | Path, path: str | Path, *, title: str) -> None:
    """Loss, accuracy, and how sparse attention is, against the step, from a `metrics.jsonl`."""
    rows = read_metrics(metrics)
    alphas = sorted({name for row in rows for name in row if name.startswith("alpha/")})
    figure, axes = plt.subplots(1, 3 + bool(alphas), figsize=(4.0 * (3 + bool(alphas)), 3.4), layout="constrained")
    width = max(1, len(rows) // 25)

    ax = axes[0]
    step, value = _series(rows, "loss")
    ax.plot(step, value, color=TRAIN, alpha=0.25, lw=0.8)
    ax.plot(step, _smooth(value, width), color=TRAIN, lw=1.8, label=f"training (mean of {width})")
    step, value = _series(rows, "test/loss")
    ax.plot(step, value, "o-", color=TEST, ms=4, lw=1.2, label="test")
    ax.set(title="Cross-entropy", yscale="log")
    ax.legend(frameon=False, fontsize=8)

    ax = axes[1]
    step, value = _series(rows, "accuracy")
    ax.plot(step, 100 * _smooth(value, width), color=TRAIN, lw=1.8, label="training (augmented)")
    step, value = _series(rows, "test/accuracy")
    ax.plot(step, 100 * value, "o-", color=TEST, ms=4, lw=1.2, label="test")
    if len(value):
        ax.annotate(
            f"{100 * value[-1]:.1f} %",
            (step[-1], 100 * value[-1]),
            (0, -18),
            textcoords="offset points",
            ha="right",
            color=TEST,
        )
    ax.set(title="Accuracy (%)", ylim=(min(70.0, 100 * value.min() - 5) if len(value) else 0, 101))
    ax.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.05))

    ax = axes[2]
    step, value = _series(rows, "attention/support")
    ax.plot(step, 100 * value, color=OTHER, lw=1.5)
    ax.set(title="Attention weights above zero (%)", ylim=(0, 104))

    if alphas:
        ax = axes[3]
        blocks = sorted({name.split(".")[0] for name in alphas})
        for name in alphas:
            block = blocks.index(name.split(".")[0])
            first = name == next(a for a in alphas if a.startswith(blocks[block]))
            label = (
                f"{blocks[block].removeprefix('alpha/').replace('block', 'block ')}, a line a head" if first else None
            )
            ax.plot(*_series(rows, name), ".-", lw=1.2, color=plt.get_cmap("Dark2")(block), label=label)
        ax.set(title=r"Learnt $\alpha$ (1: softmax, 2: sparsemax)")
        ax.legend(frameon=False, fontsize=8)

    for ax in axes:
        ax.set(xlabel="step", xlim=(0, rows[-1]["step"] * 1.02))
        ax.grid(alpha=0.25, lw=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontweight="bold")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_attention(
    images: Float[np.ndarray, "n height width"],
    maps: Float[np.ndarray, "n heads patches"],
    predicted: Int[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    path: str | Path,
    *,
    patch: int,
    title: str,
    heads: list[str],
) -> None:
    """One column an image, one row a head: which patches the class token draws from. Grey patches have weight exactly 0."""
    count, height, width = images.shape
    rows, columns = height // patch, width // patch
    norm, colours = PowerNorm(0.6, 0.0, float(maps.max()), clip=True), plt.get_cmap("YlOrRd")
    grid = maps.reshape(count, len(heads), rows, columns)
    tall = 1.18 * height / width
    figure, axes = plt.subplots(
        1 + len(heads),
        count,
        figsize=(1.05 * count + 1.6, tall * (1 + len(heads)) + 0.9),
        layout="constrained",
        squeeze=False,
    )
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set(color="#999999", lw=0.6)
    for j in range(count):
        ax = axes[0, j]
        ax.imshow(1 - images[j], cmap="gray", vmin=0, vmax=1)
        right = predicted[j] == labels[j]
        name = f"{labels[j]}" if right else f"{labels[j]}, read as {predicted[j]}"
        ax.set_title(name, fontsize=11 if right else 8, color="black" if right else "#c00000", fontweight="bold")
        for h in range(len(heads)):
            weight = grid[j, h].repeat(patch, 0).repeat(patch, 1)
            # Ink is multiplied into the colour of its patch, and nearly hidden where the head does not look.
            background = np.where((weight > 0)[..., None], colours(norm(weight))[..., :3], 0.86)
            ink = images[j] * np.where(weight > 0, 0.6, 0.12)
            ax = axes[1 + h, j]
            ax.imshow(background * (1 - ink[..., None]))
            for y in range(1, rows):
                ax.axhline(y * patch - 0.5, color="white", lw=0.7)
            for x in range(1, columns):
                ax.axvline(x * patch - 0.5, color="white", lw=0.7)
            ax.set_xlabel(
                f"{np.count_nonzero(grid[j, h])} of {rows * columns}", fontsize=7, labelpad=1.5, color="#555555"
            )
    axes[0, 0].set_ylabel("image", rotation=0, ha="right", va="center", labelpad=6)
    for h, name in enumerate(heads):
        axes[1 + h, 0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=6)
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes[1:, :], fraction=0.02, pad=0.01, aspect=30)
    ticks = [t for t in (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0) if t <= maps.max()]
    bar.set_ticks(ticks, labels=[f"{t:g}" for t in ticks])
    bar.set_label("attention weight (grey: exactly 0)")
    figure.suptitle(title, fontweight="bold")
    figure.savefig(path, dpi=150)
    plt.close(figure)
