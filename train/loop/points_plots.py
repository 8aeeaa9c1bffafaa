"""Figure of point sets with outliers: what they look like, and what is left of the accuracy."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float

_COLOURS = ("#4269d0", "#3a9d5d", "#9467bd", "#8c6d31", "#17a2b8", "#c2185b")
_FIXED = {"max": "#e8590c", "mean": "0.45"}


def plot_outliers(
    shares: Sequence[float],
    curves: dict[str, Float[np.ndarray, "seeds shares"]],
    chosen: str | None,
    examples: dict[float, Float[np.ndarray, "k n 2"]],
    path: str | Path,
) -> None:
    """Left: `examples` by share, clean points dark and outliers red. Right: accuracy against the share; a band spans the seeds."""
    count = len(next(iter(examples.values())))
    figure = plt.figure(figsize=(11.5, 4.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.35])  # pyright: ignore[reportGeneralTypeIssues]
    axes = left.subplots(len(examples), count, squeeze=False)
    for row, (share, sets) in zip(axes, examples.items(), strict=True):
        for ax, points in zip(row, sets, strict=True):
            wrong = round(share * len(points))
            ax.plot(points[wrong:, 1], points[wrong:, 0], ".", color="0.15", ms=4)
            ax.plot(points[:wrong, 1], points[:wrong, 0], ".", color="#d62728", ms=4)
            ax.set(xlim=(0, 1), ylim=(1, 0), aspect="equal", xticks=[], yticks=[])
        row[0].set_ylabel(f"{share:.0%}", rotation=0, ha="right", va="center", fontsize=11)
    left.suptitle("Point sets by share of outliers (red)", fontsize=11)

    ax = right.subplots()
    free = iter(_COLOURS * (1 + len(curves) // len(_COLOURS)))
    percent = 100 * np.asarray(shares)
    for name, accuracy in curves.items():
        colour = _FIXED[name] if name in _FIXED else next(free)
        label = name.replace(":", r", $\alpha$ = ") + "  (chosen on validation)" * (name == chosen)
        values = 100 * accuracy
        ax.plot(percent, values.mean(0), "o-", color=colour, ms=4, lw=2.6 if name == chosen else 1.5, label=label)
        ax.fill_between(percent, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)
    ax.axhline(10, color="0.6", lw=0.8, ls=(0, (4, 3)))
    ax.text(percent[0], 11, "guessing", fontsize=8, color="0.45")
    ax.set(xlabel="outliers among the points (%)", ylabel="test accuracy (%)", ylim=(0, 100))
    ax.set_title("Trained on clean points", fontsize=11)
    ax.legend(frameon=False, fontsize=9, loc="upper right")
    ax.grid(alpha=0.25, lw=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
