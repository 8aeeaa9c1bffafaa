"""Figure of an allocation run: what each objective of training costs in decisions, and what its predictor learnt instead."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes

from .log import read_metrics

COLOURS = {"two-stage": "#4269d0", "decision": "#e8590c", "best": "0.6"}
NAMES = {
    "two-stage": "two-stage: trained on squared error",
    "decision": "decision-focused: trained on regret",
    "best": "the true priorities",
}


def _one_group(ax: Axes, images, priority, decisions) -> None:
    """Up to twelve requests of one group, as the predictor sees them, and below each a bar for the share that each decision serves."""
    shown = min(12, len(images))
    order = np.argsort(-priority[:shown], kind="stable")
    for place, i in enumerate(order):
        row, column = divmod(place, 4)
        x, y = 1.2 * column, -1.55 * row
        ax.imshow(images[i], cmap="gray_r", extent=(x, x + 1, y, y + 1), vmin=0, vmax=1)
        ax.plot([x, x + 1, x + 1, x, x], [y, y, y + 1, y + 1, y], color="0.6", lw=0.6)
        ax.text(x - 0.04, y + 0.98, str(priority[i]), ha="right", va="top", fontsize=9, color="0.3")
        for line, (name, decision) in enumerate(decisions.items()):
            ax.barh(y - 0.08 - 0.11 * line, decision[i], 0.09, left=x, color=COLOURS[name])
    ax.set(xlim=(-0.25, 4.65), ylim=(-1.55 * ((shown - 1) // 4) - 0.42, 1.05), aspect="equal")
    ax.set_title("One group, as the predictor sees it; bars: shares served")
    ax.axis("off")


def plot_allocation(
    runs: dict[str, Path],
    features: Float[np.ndarray, "groups k d"],
    values: Float[np.ndarray, "groups k"],
    predictions: dict[str, Float[np.ndarray, "groups k"]],
    decisions: dict[str, Float[np.ndarray, "groups k"]],
    path: str | Path,
) -> None:
    """One test group; test regret against the step; and over all test groups, predictions and shares served by true priority.

    `runs` are the folders with the `metrics.jsonl`, by objective. The rest is of the test groups: their data, what was predicted
    and what was decided, with `decisions["best"]` those made with the true values.
    """
    figure, axes = plt.subplots(2, 2, figsize=(12, 8.4), layout="constrained")
    levels, priority = np.arange(10), np.rint(9 * values).astype(int)

    def by_priority(quantity, statistic=np.mean):
        return np.array([statistic(quantity[priority == level]) for level in levels if np.any(priority == level)])

    present = levels[np.isin(levels, priority)]
    side = round(features.shape[-1] ** 0.5)
    _one_group(
        axes[0, 0],
        features[0].reshape(-1, side, side),
        priority[0],
        {name: decision[0] for name, decision in decisions.items()},
    )

    ax = axes[0, 1]
    for name, run in runs.items():
        rows = [row for row in read_metrics(run / "metrics.jsonl") if "test/regret" in row]
        step, regret = [row["step"] for row in rows], [100 * row["test/regret"] for row in rows]
        ax.plot(step, regret, "o-", color=COLOURS[name], ms=3.5, lw=1.6)
        ax.annotate(
            f"{regret[-1]:.0f} %",
            (step[-1], regret[-1]),
            (6, 0),
            textcoords="offset points",
            va="center",
            color=COLOURS[name],
            fontweight="bold",
        )
    ax.axhline(0, color=COLOURS["best"], lw=1.4, ls="--", clip_on=False)
    ax.margins(x=0.1)
    ax.set_xlim(0)
    ax.set_ylim(0)
    ax.set(title="Test regret, in % of the best constant prediction's", xlabel="training step")

    ax = axes[1, 0]
    ax.plot(levels, levels, color=COLOURS["best"], lw=1.4, ls="--")
    for (name, predicted), shift in zip(predictions.items(), (-0.09, 0.09), strict=False):
        mean, deviation = 9 * by_priority(predicted), 9 * by_priority(predicted, np.std)
        style = {"ms": 4.5, "lw": 1.6, "elinewidth": 1, "capsize": 2.5}
        ax.errorbar(present + shift, mean, deviation, fmt="o-", color=COLOURS[name], **style)
    ax.set(title="Predicted priority (mean ± standard deviation)", xlabel="true priority", xticks=levels)

    ax = axes[1, 1]
    for name, decision in decisions.items():
        line, width = ("o--", 1.4) if name == "best" else ("o-", 1.6)
        ax.plot(present, 100 * by_priority(decision), line, color=COLOURS[name], ms=4.5, lw=width, label=NAMES[name])
    ax.set_ylim(0)
    ax.set(title="Share served (mean, %)", xlabel="true priority", xticks=levels)

    for ax in axes.flat[1:]:
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[1, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)
