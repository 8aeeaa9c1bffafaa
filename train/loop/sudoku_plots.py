"""Figures of a Sudoku run: what was learnt of the rules, and some boards."""

from math import isqrt
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float


def true_rules(side: int) -> np.ndarray:
    """The 4 side^2 rules of a board as rows over its side^3 unknowns: one digit a cell; each digit once a row, column and block."""
    k, rules = isqrt(side), []
    unknown = np.arange(side**3).reshape(side, side, side)
    row, column = np.divmod(np.arange(side), k)
    for i in range(side):
        for j in range(side):
            rows, columns = k * (i // k) + row, k * (i % k) + column
            for cells in (unknown[i, j, :], unknown[i, :, j], unknown[:, i, j], unknown[rows, columns, j]):
                rules.append(np.isin(np.arange(side**3), cells).astype(float))
    return np.array(rules)


def explained(rules: np.ndarray, A: np.ndarray) -> np.ndarray:
    """For each row of `rules`, the share of its length that lies in the row space of A."""
    _, values, right = np.linalg.svd(A, full_matrices=False)
    span = right[values > 1e-3 * values[0]]
    return np.linalg.norm(rules @ span.T, axis=1) / np.linalg.norm(rules, axis=1)


def projector(rows: np.ndarray) -> np.ndarray:
    """The projector on the row space, directions below a hundredth of the largest singular value left out."""
    _, values, right = np.linalg.svd(rows, full_matrices=False)
    span = right[values > 1e-2 * values[0]]
    return span.T @ span


def plot_rules(A: Float[np.ndarray, "p n"], side: int, path: str | Path) -> None:
    """The row space of the learnt equations beside that of the true rules, and how much of each rule was found."""
    rules = true_rules(side)
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    for ax, matrix, title in ((axes[0], rules, "True rules"), (axes[1], A, "Learnt equations")):
        image = ax.imshow(projector(matrix), cmap="RdBu_r", vmin=-2 / side, vmax=2 / side)
        rank = round(np.trace(projector(matrix)))
        ax.set(title=f"{title} (rank {rank})", xlabel="unknown: row, column, digit", ylabel="the same")
    figure.colorbar(image, ax=axes[:2], shrink=0.8, label="projector on the row space")
    found = explained(rules, A).reshape(side * side, 4)
    for i in range(4):
        axes[2].plot(i + np.linspace(-0.3, 0.3, side * side), np.sort(found[:, i]), "o", ms=4)
    random = np.sqrt(np.linalg.matrix_rank(A) / A.shape[1])
    axes[2].axhline(random, color="0.6", lw=1)
    axes[2].annotate(
        "a random row space of this rank", (3.4, random), (0, 4), textcoords="offset points", ha="right", color="0.4"
    )
    axes[2].set(
        xticks=range(4),
        xticklabels=("cell", "row", "column", "block"),
        ylim=(0, 1.02),
        title="Share of each true rule that was learnt",
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_boards(puzzles, outputs, solutions, path: str | Path) -> None:
    """Puzzles (clues black) with the answers: green where right, red where wrong."""
    side = puzzles.shape[1]
    size = 2.2 * (side / 4) ** 0.5
    figure, axes = plt.subplots(1, len(puzzles), figsize=(size * len(puzzles), size + 0.3), layout="constrained")
    for ax, puzzle, output, solution in zip(np.atleast_1d(axes), puzzles, outputs, solutions, strict=True):
        answer, truth, given = output.argmax(-1), solution.argmax(-1), puzzle.sum(-1) > 0
        for row in range(side):
            for column in range(side):
                right = answer[row, column] == truth[row, column]
                colour = "black" if given[row, column] else "#3a9d5d" if right else "#d62728"
                weight = "bold" if given[row, column] else "normal"
                text = str(answer[row, column] + 1)
                ax.text(
                    column + 0.5,
                    side - 0.5 - row,
                    text,
                    ha="center",
                    va="center",
                    color=colour,
                    fontsize=round(22 / side**0.5) + 4,
                    fontweight=weight,
                )
        for line in range(side + 1):
            width = 1.8 if line % isqrt(side) == 0 else 0.6
            ax.plot([line, line], [0, side], color="0.3", lw=width)
            ax.plot([0, side], [line, line], color="0.3", lw=width)
        ax.set(aspect="equal", title="solved" if np.all(answer == truth) else "wrong")
        ax.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)
