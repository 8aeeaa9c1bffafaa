"""Figure of a ranking run: what each loss gets from orders, and what the strength of the soft rank does."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float

COLOURS = {"spearman": "#e8590c", "truth": "0.6"}


def plot_ranking(
    result: dict[str, Float[np.ndarray, " splits"]],
    strengths: tuple[float, ...],
    by_strength: Float[np.ndarray, "strengths splits"],
    path: str | Path,
) -> None:
    """Left: test correlation by loss, a dot for each split. Right: that of `spearman` over its strength, lines for the splits."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    splits = len(next(iter(result.values())))
    for place, (name, values) in enumerate(result.items()):
        colour = COLOURS.get(name, "#4269d0")
        # Each split in its own column, so that the losses can be compared on it.
        left.plot(place + np.linspace(-0.25, 0.25, splits), values, "o", color=colour, ms=4, alpha=0.6)
        left.plot([place - 0.35, place + 0.35], 2 * [np.mean(values)], color=colour, lw=2.5)
    left.set_xticks(range(len(result)), list(result))
    left.set(title="By loss; lines are means", ylabel="Spearman's correlation, test patients")
    right.plot(strengths, by_strength, color=COLOURS["spearman"], lw=0.8, alpha=0.4)
    right.plot(strengths, by_strength.mean(1), "o-", color=COLOURS["spearman"], lw=2.5)
    right.set(
        xscale="log",
        xlabel="strength of the soft rank",
        title="Soft ranks, by strength; the line with dots is the mean",
    )
    for ax in (left, right):
        ax.grid(True, color="0.92")
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
