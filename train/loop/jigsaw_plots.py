"""Figure of a jigsaw run: test pictures as they were, shuffled, and with every piece where a plan has most of it; the figures by step."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Bool, Float

from .log import read_metrics

COLOURS = {"transport": "#e8590c", "softmax": "#4269d0"}


def together(pieces: Float[np.ndarray, "n p"]) -> Float[np.ndarray, "side side"]:
    """The picture, its pieces row by row."""
    grid, side = round(len(pieces) ** 0.5), round(pieces.shape[1] ** 0.5)
    return pieces.reshape(grid, grid, side, side).swapaxes(1, 2).reshape(grid * side, grid * side)


def _draw(ax, pieces, wrong: Bool[np.ndarray, " n"] | None = None) -> None:
    """A picture of pieces, row by row; NaN is a place left empty."""
    picture = together(pieces)
    ax.imshow(np.ma.masked_invalid(picture), cmap="gray_r", vmin=0, vmax=1)
    ax.set_facecolor("#ffd8a8")
    side = round(pieces.shape[1] ** 0.5)
    grid = len(picture) // side
    for k in range(1, grid):
        ax.axhline(k * side - 0.5, color="0.8", lw=0.5)
        ax.axvline(k * side - 0.5, color="0.8", lw=0.5)
    for place in np.flatnonzero(wrong) if wrong is not None else ():
        y, x = divmod(int(place), grid)
        ax.add_patch(plt.Rectangle((x * side - 0.5, y * side - 0.5), side, side, fill=False, edgecolor="red", lw=1.2))
    ax.set_xticks([])
    ax.set_yticks([])


def placed(plan: Float[np.ndarray, "n n"], pieces, fits) -> tuple[np.ndarray, np.ndarray]:
    """Every piece in its own best place, and where that is wrong; of several in one place the one that has most of it, none is NaN."""
    picture, wrong = np.full(pieces.shape, np.nan), np.zeros(len(pieces), bool)
    best = np.argmax(plan, axis=1)
    for piece in np.argsort(np.max(plan, axis=1)):
        picture[best[piece]] = pieces[piece]
        wrong[best[piece]] = fits[piece, best[piece]] == 0
    return picture, wrong


def plot_jigsaw(
    pieces: Float[np.ndarray, "k n p"],
    mixed: Float[np.ndarray, "k n p"],
    plans: dict[str, Float[np.ndarray, "k n n"]],
    fits: Float[np.ndarray, "k n n"],
    runs: dict[str, Path],
    path: str | Path,
    *,
    shown: int = 10,
) -> None:
    """`pieces` in their places, `mixed` as the network got them; `runs` are the folders with the `metrics.jsonl`, by layer."""
    figure = plt.figure(figsize=(1.0 * shown + 4.2, 1.15 * (2 + len(plans))), layout="constrained")
    grid = figure.add_gridspec(1, 2, width_ratios=(shown, 4))
    left, right = (figure.add_subfigure(grid[k]) for k in range(2))
    axes = left.subplots(2 + len(plans), shown, squeeze=False)
    for column in range(shown):
        _draw(axes[0, column], pieces[column])
        _draw(axes[1, column], mixed[column])
        for row, plan in enumerate(plans.values(), 2):
            _draw(axes[row, column], *placed(plan[column], mixed[column], fits[column]))
    for row, name in enumerate(("picture", "pieces", *plans)):
        axes[row, 0].set_ylabel(name)
    ax = right.subplots()
    for name, folder in runs.items():
        rows = [row for row in read_metrics(folder / "metrics.jsonl") if "test/pieces" in row]
        steps = [row["step"] for row in rows]
        for figure_of, style in (("by choice", "-"), ("pictures", "--")):
            label = f"{name}{', assigned' if figure_of == 'pictures' else ''}"
            ax.plot(steps, [row[f"test/{figure_of}"] for row in rows], color=COLOURS[name], ls=style, label=label)
    ax.set(xlabel="step", ylabel="test pictures wholly right", ylim=(0, 1))
    ax.legend(fontsize=8)
    figure.savefig(path, dpi=140)
    plt.close(figure)
